# docker build -t thalweg . && docker run -v thalweg:/data -p 7300:7300 -e THALWEG_INSECURE=true thalweg
#
# The server refuses addresses that other machines reach until requests are authenticated (docs/security.md), and every
# port of a container is one; THALWEG_INSECURE=true says that this is meant. The PostgreSQL port encrypts nothing and stays
# within the container unless THALWEG_POSTGRES=0.0.0.0:5433 is given as well.
FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --release --locked --bin thalweg

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --user-group --home-dir /data --shell /usr/sbin/nologin thalweg \
    && install -d -o thalweg -g thalweg -m 750 /data
COPY --from=build /src/target/release/thalweg /usr/local/bin/thalweg
USER 10001:10001
VOLUME /data
ENV THALWEG_DATA_DIR=/data \
    THALWEG_HTTP=0.0.0.0:7300 \
    THALWEG_GRPC=0.0.0.0:4317
EXPOSE 7300 4317
# A long log is replayed before the server is ready; until then it is alive.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["thalweg", "health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["thalweg"]
CMD ["serve"]
