"""Queries that ask for everything: a server with many series answers them or refuses them within its limits, and goes on.

    python tests/bench/hostile.py --binary target/release/thalweg --folder /tmp/bench

Writes 100,000 series, then asks one query after another. Prints for each the status, seconds, processor seconds, resident memory before
it and at its peak, and the answer's size or error. The last ones are asked by a client that goes away after half a second: what counts is
the processor time from half a second after that on. Ends with status 1 when the server is gone, when an answer is an internal error, or when
the processor is not free.
"""

import argparse
import json
import os
import socket
import sys
import time
import urllib.parse

from servers import Server, labels, field, sample

SCRAPES, STEP_MS, POINTS = 24, 15_000, 11_000
ALL = '{__name__=~".+"}'
NESTED = 400


def fill(server, series, start):
    body = bytearray()
    for n in range(series):
        metric = f"m{n % 50:02d}_total"
        pairs = {"__name__": metric, "job": f"job-{n % 20}", "namespace": f"ns-{n % 97:02d}", "pod": f"pod-{n:06d}-{n * 7919 % 65536:04x}"}
        samples = b"".join(sample(start + i * STEP_MS, float(i * (n % 37 + 1))) for i in range(SCRAPES))
        body += field(1, labels(pairs) + samples)
        if len(body) > 1_000_000:
            server.write(bytes(body))
            body.clear()
    server.write(bytes(body))


def nested(open_, close, inner="m01_total", times=NESTED):
    return open_ * times + inner + close * times


QUERIES = [
    ALL,
    f"rate({ALL}[5m])",
    f"sum by (pod) ({ALL})",
    f"sum by (job) (rate({ALL}[5m]))",
    f"sum(rate({ALL}[5m]))",
    f"sum({ALL})",
    f"count by (__name__) ({ALL})",
    f"topk(10, {ALL})",
    f"topk(50000, {ALL})",
    f"quantile by (job) (0.9, {ALL})",
    f"stddev({ALL})",
    f'count_values("v", {ALL})',
    f"sort({ALL})",
    f'label_replace({ALL}, "x", "$1", "pod", "(.*)")',
    f"{ALL} + {ALL}",
    f"{ALL} and on (pod) {ALL}",
    f"{ALL} or {ALL}",
    f"{ALL} * on (job) group_left m00_total",
    f"max_over_time({ALL}[1h:1s])",
    f"max_over_time(rate({ALL}[1m])[1h:15s])",
    f"quantile_over_time(0.5, {ALL}[1h])",
    f"absent({ALL})",
    f"histogram_quantile(0.9, {ALL})",
    f"sum by (job) (max_over_time(sum by (pod) ({ALL})[5m:15s]))",
    nested("(", ")"),
    nested("abs(", ")"),
    nested("-", ""),
    nested("sum(", ")"),
    nested("max_over_time(", "[1m:15s])", times=20),
    nested("(", ")", times=100_000),
    " + ".join(["m01_total"] * 300),
    " or ".join([ALL] * 20),
    " + ".join(["1"] * 100_000),
    '{pod=~"(a+)+b|(x*)*y|(pod-.*)+$"}',
    '{pod=~"((((a?){100}){100}){100}){100}"}',
    '{pod=~"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)0{50}"}',
    '{pod=~".*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*z"}',
    '{pod=~"' + "|".join(f"pod-{n:06d}.*" for n in range(20_000)) + '"}',
    "m01_total{" + ",".join(f'pod!~".*{n}x.*"' for n in range(1_000)) + "}",
    'label_replace(m01_total, "x", "$1", "pod", "((a|b|c|d|p)*)*(.*)(.*)(.*)")',
]
GONE = [ALL, f"max_over_time({ALL}[1h:1s])", f"sort(sum by (pod) ({ALL}))", f"quantile_over_time(0.5, {ALL}[1h])", f"{ALL} or {ALL}"]


def told(status, body):
    if status == 200:
        return f"{len(body) / 1e6:.1f} MB"
    try:
        return json.loads(body)["error"][:110]
    except ValueError:
        return repr(body[:110])


def free_after_leaving(server, query, span):
    """Seconds of processor time in the second that begins half a second after the client left."""
    path = "/api/v1/query_range?" + urllib.parse.urlencode(dict(span, query=query))
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        time.sleep(0.5)
    time.sleep(0.5)
    before = server.processor()
    time.sleep(1)
    return (server.processor() - before) / 1000


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--series", type=int, default=100_000)
    parser.add_argument("--only", type=int, help="the query of this number alone")
    arguments = parser.parse_args()
    bad = []
    os.makedirs(arguments.folder, exist_ok=True)
    with Server("thalweg", arguments.binary, arguments.folder) as server:
        end = int(time.time()) // 60 * 60
        fill(server, arguments.series, (end * 1000) - SCRAPES * STEP_MS)
        server.settle()
        span = {"start": end - POINTS, "end": end, "step": 1}
        print("| no | query | status | s | CPU s | MB before | MB peak | answer |\n|" + "---|" * 8)
        for number, query in enumerate(QUERIES):
            if arguments.only not in (None, number):
                continue
            before = server.memory()[0]
            server.forget_peak()
            cpu, begun = server.processor(), time.time()
            try:
                body = urllib.parse.urlencode(dict(span, query=query))
                headers = {"Content-Type": "application/x-www-form-urlencoded"}
                status, answer = server.ask("POST", "/api/v1/query_range", body, headers)
            except OSError as e:
                status, answer = 0, str(e).encode()
            if server.process.poll() is not None:
                raise SystemExit(f"the server is gone after query {number}")
            seconds, cpu, peak = time.time() - begun, (server.processor() - cpu) / 1000, server.memory()[1]
            text = query if len(query) < 60 else f"{query[:50]}... ({len(query)} characters)"
            answer = f"`{told(status, answer)}`"
            print(f"| {number} | `{text}` | {status} | {seconds:.1f} | {cpu:.1f} | {before:.0f} | {peak:.0f} | {answer} |", flush=True)
            if status not in (200, 400, 413, 422, 503):
                bad.append(number)
        for query in GONE if arguments.only is None else []:
            busy = free_after_leaving(server, query, span)
            print(f"client gone: `{query}`: {busy:.2f} s of processor time in the second after", flush=True)
            if busy > 0.5:
                bad.append(query)
        status, answer = server.get("/api/v1/query", query="count(m01_total)", time=end)
        print("afterwards:", status, answer.decode()[:200], f"{server.memory()[0]:.0f} MB")
        if status != 200:
            bad.append("afterwards")
    sys.exit(f"not as it should be: {bad}" if bad else 0)


if __name__ == "__main__":
    main()
