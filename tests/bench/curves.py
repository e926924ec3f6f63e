"""How the processor time of PromQL queries grows, against Prometheus and VictoriaMetrics from the path.

    pip install numpy
    python tests/bench/curves.py --binary target/release/thalweg --folder /tmp/bench [--only range|select]

The first curve is that of long ranges: 14 days of 5,000 series at 60-second steps, queries of `--select` of them over up to 7 days at 5-minute
steps with windows of 5 minutes, 1 hour and 6 hours. Samples that a query touches are the same for all windows but for the first one's, so
processor time should be too. The second is that of selectors: 10 series of 1,000, 10,000 and 100,000, where it should stay the same. Prints the
median processor time of the process in milliseconds, warm, and how much the slowest answer differs.
"""

import argparse
import json
import os
import statistics
import threading
import time

import numpy

from servers import Server, field, labels, varint

DAY = 86_400_000
NAMES = ["prometheus", "victoriametrics", "thalweg"]


class Sender:
    """Writes the same samples to several servers: blocks of (series, times), series with labels of equal length."""

    def __init__(self, servers, all_labels, at_a_time):
        self.servers, self.at_a_time = servers, at_a_time
        # A sample is 0x12 0x10 0x09 <8 bytes> 0x10 <6 bytes>: a time of this century has a varint of 6 bytes.
        message = [l + bytes(18) * at_a_time for l in all_labels]
        heads = [b"\x0a" + varint(len(m)) for m in message]
        rows = [h + m for h, m in zip(heads, message)]
        assert len({len(r) for r in rows}) == 1, "labels of all series have one length"
        self.rows = numpy.frombuffer(b"".join(rows), numpy.uint8).reshape(len(rows), -1).copy()
        self.samples = self.rows[:, -18 * at_a_time :].reshape(len(rows), at_a_time, 18)

    def send(self, times, values):
        """`values` has a row per series and a column per time."""
        self.samples[:, :, :3] = (0x12, 0x10, 0x09)
        self.samples[:, :, 3:11] = numpy.ascontiguousarray(values, "<f8").view(numpy.uint8).reshape(*values.shape, 8)
        self.samples[:, :, 11] = 0x10
        for byte in range(6):
            part = times >> (7 * byte) & 127 | (128 if byte < 5 else 0)
            self.samples[:, :, 12 + byte] = part.astype(numpy.uint8)
        for first in range(0, len(self.rows), 1000):
            body = self.rows[first : first + 1000].tobytes()
            # Each server takes the request at the same time.
            threads = [threading.Thread(target=s.write, args=(body,)) for s in self.servers]
            [t.start() for t in threads]
            [t.join() for t in threads]


def cost(server, query, repetitions, **parameters):
    """Median processor time in milliseconds, and the answer."""
    path = "/api/v1/query_range" if "step" in parameters else "/api/v1/query"
    costs, status, answer = [], 0, b""
    for repetition in range(repetitions + 1):
        before = server.processor()
        status, answer = server.get(path, query=query, **parameters)
        costs.append(server.processor() - before)
        if status != 200:
            raise SystemExit(f"{server.name}: {status} {answer[:300]}")
        if sum(costs) > 30_000:
            break
    return statistics.median(costs[1:] or costs), json.loads(answer)["data"]["result"]


def difference(reference, answer):
    """The largest relative difference of points that both have, and how many points one of them lacks."""
    points = lambda result: {(tuple(sorted(s["metric"].items())), t): float(v) for s in result for t, v in s.get("values") or [s["value"]]}
    a, b = points(reference), points(answer)
    both = a.keys() & b.keys()
    worst = max((abs(a[k] - b[k]) / max(abs(a[k]), abs(b[k]), 1e-300) for k in both), default=0)
    return worst, len(a.keys() ^ b.keys())


def table(title, names, rows):
    print(f"\n| {title} | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
    for name, costs in rows:
        print(f"| {name} | " + " | ".join(f"{c:.3g}" for c in costs) + " |", flush=True)


def long_ranges(servers, arguments, end):
    series, select, step = arguments.series, arguments.select, 60_000
    names = [f"node-{n:05d}" for n in range(series)]
    all_labels = [labels({"__name__": "cpu_seconds_total", "node": n, "shard": f"{i // select:03d}"}) for i, n in enumerate(names)]
    sender, random = Sender(servers, all_labels, 15), numpy.random.default_rng(1)
    start, last, begun = end - arguments.days * DAY, numpy.zeros(series), time.time()
    for at in range(start + step, end + 1, 15 * step):
        times = at + numpy.arange(15) * step
        values = last[:, None] + numpy.cumsum(random.integers(0, 60_000, (series, 15)) / 1000, axis=1)
        last = values[:, -1].copy()
        sender.send(times, values)
    print(f"# {series} series of {arguments.days} days written in {time.time() - begun:.0f} s", flush=True)
    for server in servers:
        server.settle()
    rows = []
    for days in [1, 3, 7]:
        for window in ["5m", "1h", "6h"]:
            for function in ["rate", "max_over_time"]:
                query = f'sum({function}(cpu_seconds_total{{shard="000"}}[{window}]))'
                span = dict(start=end // 1000 - days * 86_400, end=end // 1000, step=300)
                answers = [cost(s, query, arguments.repetitions, **span) for s in servers]
                for server, (_, answer) in zip(servers, answers):
                    worst, lacking = difference(answers[-1][1], answer)
                    if worst > 1e-9 or lacking:
                        print(f"# {days} d {function} [{window}]: {server.name} differs by {worst:.2g}, {lacking} points in one only")
                rows.append((f"{function} [{window}], {days} days", [c for c, _ in answers]))
                print("#", rows[-1], flush=True)
    table(f"{select} of {series} series, ms CPU", [s.name for s in servers], rows)


def selectors(of, servers, arguments, end):
    step, scrapes = 15_000, 60
    wanted = numpy.linspace(0, of - 1, 10).astype(int).tolist()
    group = {n: "wanted" for n in wanted}
    all_labels = [
        labels({"__name__": "requests_total", "group": group.get(n, f"g{n % 1000:05d}"), "pod": f"pod-{n:06d}"}) for n in range(of)
    ]
    sender = Sender(servers, all_labels, scrapes)
    times = end - numpy.arange(scrapes)[::-1] * step
    sender.send(times, numpy.cumsum(numpy.random.default_rng(2).integers(0, 1000, (of, scrapes)), axis=1).astype(float))
    for server in servers:
        server.settle()
    pods = "|".join(f"pod-{n:06d}" for n in wanted)
    queries = {
        "equal": 'rate(requests_total{group="wanted"}[5m])',
        "alternatives": f'rate(requests_total{{pod=~"{pods}"}}[5m])',
        "regex": 'rate(requests_total{group=~"want.*"}[5m])',
        "not equal": 'rate(requests_total{group="wanted",pod!="pod-000000"}[5m])',
    }
    span = dict(start=end // 1000 - 840, end=end // 1000, step=15)
    return {
        f"{name}, {kind}": [cost(s, query, 4 * arguments.repetitions, **parameters)[0] for s in servers]
        for name, query in queries.items()
        for kind, parameters in [("range", span), ("instant", {"time": end // 1000})]
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--servers", default=",".join(NAMES))
    parser.add_argument("--only", choices=["range", "select"])
    parser.add_argument("--series", type=int, default=5_000)
    parser.add_argument("--select", type=int, default=500)
    parser.add_argument("--days", type=int, default=14)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    end = int(time.time() * 1000) // 3_600_000 * 3_600_000
    names = arguments.servers.split(",")

    def run(work):
        servers = []
        try:
            for name in names:
                servers.append(Server(name, arguments.binary, arguments.folder))
            return work(servers)
        finally:
            for server in servers:
                server.__exit__()

    os.makedirs(arguments.folder, exist_ok=True)
    if arguments.only != "range":
        sizes = [1_000, 10_000, 100_000]
        found = [run(lambda servers, of=of: selectors(of, servers, arguments, end)) for of in sizes]
        columns = [f"{name} {of}" for name in names for of in sizes]
        rows = [(q, [found[j][q][i] for i in range(len(names)) for j in range(len(sizes))]) for q in found[0]]
        table("10 series of, ms CPU", columns, rows)
    if arguments.only != "select":
        run(lambda servers: long_ranges(servers, arguments, end))


if __name__ == "__main__":
    main()
