"""Parts that the benchmarks share: servers under test on loopback, what they take of the machine, and remote write.

`prometheus` and `victoria-metrics` are looked for on the path; Thalweg is the binary that is named.
"""

import http.client
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
import urllib.parse

COMMANDS = {
    "thalweg": "{binary} serve --data-dir {folder} --http 127.0.0.1:{port} --grpc off --postgres off --standard-ports off",
    "prometheus": "prometheus --config.file={folder}/prometheus.yml --storage.tsdb.path={folder}/tsdb --web.listen-address=127.0.0.1:{port} "
    "--web.enable-remote-write-receiver --storage.tsdb.retention.time=10y --query.max-samples=500000000 --query.timeout=10m --log.level=warn",
    "victoriametrics": "victoria-metrics -storageDataPath={folder}/data -httpListenAddr=127.0.0.1:{port} -retentionPeriod=10y "
    "-search.maxQueryDuration=10m -search.latencyOffset=0s -search.maxUniqueTimeseries=1000000 -search.maxSamplesPerQuery=10000000000 "
    "-search.disableCache -loggerLevel=ERROR",
}
READY = {"thalweg": "/-/ready", "prometheus": "/-/ready", "victoriametrics": "/health"}


class Server:
    """A process that listens on a free port and keeps its data in a folder of its own."""

    def __init__(self, name, binary, folder):
        self.name, self.folder = name, os.path.join(folder, name)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.folder)
        with open(os.path.join(self.folder, "prometheus.yml"), "w") as config:
            config.write("global: {}\n")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = COMMANDS[name].format(binary=binary, folder=self.folder, port=self.port)
        with open(os.path.join(folder, f"{name}.log"), "w") as log:
            self.process = subprocess.Popen(command.split(), stdout=log, stderr=log)
        while True:
            try:
                if self.get(READY[name])[0] == 200:
                    return
            except OSError:
                pass
            if self.process.poll() is not None:
                raise SystemExit(f"{name} ended, see {folder}/{name}.log")
            time.sleep(0.05)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, method, path, body=b"", headers=None):
        """Status and body of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=900)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def get(self, path, **parameters):
        return self.ask("GET", path + ("?" + urllib.parse.urlencode(parameters) if parameters else ""))

    def settle(self):
        """Has what was written moved to data files, and waits until the processor is at rest."""
        if self.name == "thalweg":
            for what in ["flush", "compact"]:
                self.ask("POST", f"/api/v1/admin/{what}")
        if self.name == "victoriametrics":
            self.get("/internal/force_flush")
        before = self.processor()
        while True:
            time.sleep(1)
            now = self.processor()
            if now - before < 50:
                return
            before = now

    def processor(self):
        """User and system time in milliseconds, by the nanosecond counters of the threads."""
        return processor(self.process.pid)

    def memory(self):
        """Resident memory now and its peak since `forget_peak`, MB."""
        lines = open(f"/proc/{self.process.pid}/status").read().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
        return sizes["VmRSS"], sizes["VmHWM"]

    def forget_peak(self):
        with open(f"/proc/{self.process.pid}/clear_refs", "w") as refs:
            refs.write("5")

    def write(self, body):
        """Sends a remote write request, again when it is told to wait."""
        body = snappy(body)
        headers = {"Content-Encoding": "snappy", "Content-Type": "application/x-protobuf", "X-Prometheus-Remote-Write-Version": "0.1.0"}
        while True:
            status, answer = self.ask("POST", "/api/v1/write", body, headers)
            if status < 300:
                return
            if status not in (429, 503):
                raise SystemExit(f"{self.name} refused a write: {status} {answer[:300]}")
            time.sleep(0.1)


def processor(pid):
    """User and system time of a process in milliseconds, by the nanosecond counters of its threads."""
    total = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        try:
            total += int(open(f"/proc/{pid}/task/{thread}/schedstat").read().split()[0])
        except FileNotFoundError:
            pass
    return total / 1e6


def varint(n):
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def field(number, body):
    return varint(number << 3 | 2) + varint(len(body)) + body


def labels(pairs):
    """The labels of a series in a remote write request."""
    return b"".join(field(1, field(1, k.encode()) + field(2, v.encode())) for k, v in sorted(pairs.items()))


def sample(ms, value):
    """A sample of a series in a remote write request."""
    return field(2, b"\x09" + struct.pack("<d", value) + b"\x10" + varint(ms))


def snappy(body):
    """Snappy's format without any compression: literals alone."""
    out = bytearray(varint(len(body)))
    for at in range(0, len(body), 65536):
        part = body[at : at + 65536]
        out += b"\xf4" + struct.pack("<H", len(part) - 1) + part
    return bytes(out)
