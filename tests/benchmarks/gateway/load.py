"""The load generator, in a process of its own: HTTP/1.1 over kept-alive raw sockets, and nothing but Python's library.

``python -m tests.benchmarks.gateway.load`` reads a ``Plan`` as JSON and prints a ``Load``. A *closed* loop has one
request under way on each connection; an *open* one sends at moments that were drawn beforehand (exponential distances,
seeded) whatever became of the requests before, and counts latency from those moments.
"""

from __future__ import annotations

import gc
import json
import random
import select
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass

_HOST = "127.0.0.1"
_SILENCE_S = 30.0


@dataclass(frozen=True)
class Plan:
    """``requests`` are whole HTTP/1.1 requests, sent in turn; ``rate`` (requests/s) makes the loop an open one.

    What is answered in the first ``warm_s`` seconds is not counted; the ``seconds`` after them are.
    """

    port: int
    requests: list[str]
    connections: int
    warm_s: float
    seconds: float
    rate: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Load:
    """``count`` answers, all of status 200; the generator computed for the share ``busy`` of the time."""

    count: int
    per_s: float
    p50_ms: float
    p99_ms: float
    busy: float


class _Connection:
    """One kept-alive connection with at most one request under way, which was due at ``due`` (seconds)."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection((_HOST, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.due = 0.0
        self._got = b""

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, request: bytes, due: float) -> None:
        self.due = due
        self.socket.sendall(request)

    def complete(self) -> bool:
        """Takes what came; whether the answer is whole. Raises ``RuntimeError`` for any answer but a 200."""
        part = self.socket.recv(262_144)
        if not part:
            raise RuntimeError(f"the server closed a connection under a request, after {self._got[:200]!r}")
        got = self._got + part if self._got else part
        head_ends = got.find(b"\r\n\r\n")
        if head_ends >= 0:
            head = got[:head_ends].lower()
            at = head.find(b"content-length:")
            if got[9:12] != b"200" or at < 0:
                raise RuntimeError(f"not a 200 with a declared length: {got[:600]!r}")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0])
            if len(got) >= head_ends + 4 + length:
                self._got = b""
                return True
        self._got = got
        return False


def closed(plan: Plan, connections: list[_Connection]) -> list[float]:
    """Latencies in seconds, in the order of the answers."""
    requests, sent, clock = [request.encode("latin-1") for request in plan.requests], 0, time.perf_counter
    poll, by_file = select.epoll(), {}
    for connection in connections:
        by_file[connection.fileno()] = connection
        poll.register(connection, select.EPOLLIN)
        connection.send(requests[sent % len(requests)], clock())
        sent += 1
    counted_from = clock() + plan.warm_s
    upto = counted_from + plan.seconds
    took: list[float] = []
    while True:
        ready = poll.poll(_SILENCE_S)
        if not ready:
            raise RuntimeError(f"nothing was answered for {_SILENCE_S:g} s")
        for file, _ in ready:
            connection = by_file[file]
            if not connection.complete():
                continue
            now = clock()
            if now >= upto:
                return took
            if now >= counted_from:
                took.append(now - connection.due)
            connection.send(requests[sent % len(requests)], now)
            sent += 1


def opened(plan: Plan, connections: list[_Connection]) -> list[float]:
    """Latencies in seconds from the moments at which the requests were due."""
    assert plan.rate is not None
    requests, drawn, clock = [r.encode("latin-1") for r in plan.requests], random.Random(plan.seed), time.perf_counter
    begun = clock()
    counted_from, upto = begun + plan.warm_s, begun + plan.warm_s + plan.seconds
    idle, sent, due = deque(connections), 0, begun
    busy: list[_Connection] = []
    took: list[float] = []
    while due < upto or busy:
        # select() and not epoll: its time-outs have microseconds.
        now = clock()
        while due < upto and due <= now and idle:
            connection = idle.popleft()
            connection.send(requests[sent % len(requests)], due)
            busy.append(connection)
            sent += 1
            due += drawn.expovariate(plan.rate)
        wait_s = max(due - now, 0.0) if due < upto and idle else _SILENCE_S
        ready, _, _ = select.select(busy, (), (), wait_s)
        if not ready and wait_s == _SILENCE_S:
            raise RuntimeError(f"nothing was answered for {_SILENCE_S:g} s")
        for connection in ready:
            if connection.complete():
                if connection.due >= counted_from:
                    took.append(clock() - connection.due)
                busy.remove(connection)
                idle.append(connection)
    return took


def run(plan: Plan) -> Load:
    """Carries the plan out in this process."""
    connections = [_Connection(plan.port) for _ in range(plan.connections)]
    gc.disable()
    began, computed = time.perf_counter(), time.process_time()
    took = sorted((closed if plan.rate is None else opened)(plan, connections))
    busy = (time.process_time() - computed) / (time.perf_counter() - began)
    for connection in connections:
        connection.socket.close()
    if not took:
        raise RuntimeError("no request was answered while they were counted")
    p50, p99 = (took[min(int(len(took) * q), len(took) - 1)] * 1e3 for q in (0.5, 0.99))
    return Load(len(took), len(took) / plan.seconds, p50, p99, busy)


def apart(plan: Plan) -> Load:
    """Carries the plan out in a process of its own; ``RuntimeError`` with what it said when it failed."""
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(asdict(plan)), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the load generator failed: {done.stderr.strip()[-2000:]}")
    return Load(**json.loads(done.stdout))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(run(Plan(**json.load(sys.stdin))))))
