#!/bin/sh
# Makes a Debian package of a binary that is built already.
# Usage: packaging/deb.sh BINARY [FOLDER]; prints the package's path. Needs dpkg-deb.
set -eu
binary=$1 out=${2:-.}
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
here=$root/packaging

version=$("$binary" version | sed 's/^thalweg //')
architecture=$(dpkg --print-architecture)
# The newest version of libc that the binary asks for; a script in its place asks for none.
libc=$(grep -ao 'GLIBC_2\.[0-9]*' "$binary" | sed 's/GLIBC_//' | sort -Vu | tail -n 1)

tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
chmod 755 "$tree"
umask 022
install -D -m 755 "$binary" "$tree/usr/bin/thalweg"
install -D -m 644 "$here/thalweg.service" "$tree/usr/lib/systemd/system/thalweg.service"
install -D -m 644 "$here/thalweg.sysusers" "$tree/usr/lib/sysusers.d/thalweg.conf"
install -D -m 640 "$here/thalweg.toml" "$tree/etc/thalweg/thalweg.toml"
install -D -m 640 "$here/thalweg.default" "$tree/etc/default/thalweg"
doc=$tree/usr/share/doc/thalweg
install -D -m 644 "$root/LICENSE" "$doc/copyright"
for page in "$root/README.md" "$root/CHANGELOG.md" "$root"/docs/*; do
    install -m 644 "$page" "$doc/"
done

install -d "$tree/DEBIAN"
cat > "$tree/DEBIAN/control" <<END
Package: thalweg
Version: $version
Architecture: $architecture
Maintainer: The Thalweg project <packages@thalweg.invalid>
Installed-Size: $(du -sk --exclude=DEBIAN "$tree" | cut -f1)
Depends: libc6 (>= ${libc:-2.28}), ca-certificates
Recommends: systemd
Section: database
Priority: optional
Homepage: https://github.com/thalweg/thalweg
Description: observability database on object storage
 Stores metrics as Parquet files in a folder or a bucket, takes Prometheus remote
 write, answers PromQL through the Prometheus HTTP API and SQL through the
 PostgreSQL protocol.
END
printf '/etc/thalweg/thalweg.toml\n/etc/default/thalweg\n' > "$tree/DEBIAN/conffiles"

cat > "$tree/DEBIAN/postinst" <<'END'
#!/bin/sh
set -e
if [ "$1" = configure ]; then
    if command -v systemd-sysusers >/dev/null; then
        systemd-sysusers thalweg.conf
    elif ! getent passwd thalweg >/dev/null; then
        useradd --system --user-group --home-dir /var/lib/thalweg --shell /usr/sbin/nologin thalweg
    fi
    # Settings can name secrets.
    chgrp thalweg /etc/thalweg /etc/thalweg/thalweg.toml
    chmod 750 /etc/thalweg
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload
        if [ -z "$2" ]; then systemctl enable --now thalweg.service; else systemctl try-restart thalweg.service; fi
    fi
fi
END
cat > "$tree/DEBIAN/prerm" <<'END'
#!/bin/sh
set -e
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
    systemctl disable --now thalweg.service
fi
END
cat > "$tree/DEBIAN/postrm" <<'END'
#!/bin/sh
set -e
# Data stay, also on purge: whoever wants them gone removes /var/lib/thalweg.
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
fi
END
chmod 755 "$tree/DEBIAN/postinst" "$tree/DEBIAN/prerm" "$tree/DEBIAN/postrm"

package=$out/thalweg_${version}_$architecture.deb
dpkg-deb --root-owner-group --build "$tree" "$package" >/dev/null
echo "$package"
