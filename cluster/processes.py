"""What runs on this machine, read from /proc: who listens on a port, which processes belong to one session; the
environment of those that are started, and how much memory one may take.

A process is known to be ours by a marker in the environment that it inherited, never by its name, so ending a
session can end nothing else.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_STARTED = 19  # place of the start time after the command's name in /proc/PID/stat, see proc(5)
_LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp, see include/net/tcp_states.h of Linux


@dataclass(frozen=True)
class Listener:
    """Who listens on a TCP port. ``pid`` is None when the process belongs to another user."""

    port: int
    pid: int | None
    command: str


def python_environment() -> dict[str, str]:
    """The environment of a Python process that is to find the code that this one has.

    A worker may have found it by its ``sys.path`` alone (an unpacked working directory).
    """
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def bound_memory(more_mb: int) -> None:
    """Lets this process take ``more_mb`` MiB beyond what it has now, and refuses what it asks for after that.

    Private writable memory counts (RLIMIT_DATA, see setrlimit(2)), also such as is asked for and never written to;
    mapped files and shared memory, Ray's object store among them, do not. Python then raises ``MemoryError``; native
    code may end the process. Each process that this one starts may take as much as this one may in all.
    """
    taken = next(line for line in _read(_PROC / "self" / "status").splitlines() if line.startswith(b"VmData:"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = int(taken.split()[1]) * 1024 + more_mb * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def listener(port: int) -> Listener | None:
    """The process that listens on ``port`` on any address of this machine, or None."""
    inodes = {
        fields[9]
        for table in ("tcp", "tcp6")
        for fields in _rows(_PROC / "net" / table)
        if fields[3] == _LISTEN and int(fields[1].rsplit(":", 1)[1], 16) == port
    }
    if not inodes:
        return None
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for pid in pids():
        if wanted & set(_links(_PROC / str(pid) / "fd")):
            return Listener(port, pid, command(pid))
    return Listener(port, None, "a process of another user")


def pids() -> list[int]:
    """All process ids of the machine."""
    return [int(entry) for entry in os.listdir(_PROC) if entry.isdigit()]


def command(pid: int) -> str:
    """The command line of a process, or "" when it is gone."""
    return _read(_PROC / str(pid) / "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()


def session_pids(marker: str) -> list[int]:
    """Ids of the living processes, this one left out, whose environment holds ``NAME=value`` marker exactly."""
    wanted = marker.encode()
    return [
        pid
        for pid in pids()
        if pid != os.getpid() and wanted in _read(_PROC / str(pid) / "environ").split(b"\0") and not _is_zombie(pid)
    ]


def descendants(roots: Iterable[int]) -> dict[int, bytes]:
    """The processes that ``roots`` started, directly or not: pid and start time, which together never recur."""
    children: dict[int, list[int]] = {}
    for pid in pids():
        stat = _stat(pid)
        if stat:
            children.setdefault(int(stat[1]), []).append(pid)
    found: dict[int, bytes] = {}
    waiting = list(roots)
    while waiting:
        for pid in children.get(waiting.pop(), []):
            if pid not in found and pid != os.getpid() and (stat := _stat(pid)):
                found[pid] = stat[_STARTED]
                waiting.append(pid)
    return found


def still_alive(known: dict[int, bytes]) -> list[int]:
    """Those of ``descendants`` that still run: the same process, not another with its number."""
    return [pid for pid, started in known.items() if not _is_zombie(pid) and _stat(pid)[_STARTED:][:1] == [started]]


def end(find: Callable[[], Iterable[int]], *, grace_s: float = 5.0) -> list[int]:
    """Ends what ``find`` names: SIGTERM, and SIGKILL after ``grace_s`` seconds. Returns what is left."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + grace_s
        for pid in find():
            _signal(pid, sent)
        while time.monotonic() < deadline:
            remaining = list(find())
            if not remaining:
                return []
            if sent is signal.SIGKILL:
                for pid in remaining:  # a child started between two looks
                    _signal(pid, sent)
            time.sleep(0.1)
    return list(find())


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it ended by itself


def runs(pid: int) -> bool:
    """Whether a process of this machine has that id and has not ended."""
    return not _is_zombie(pid)


def is_orphan(pid: int) -> bool:
    """Whether the process that started ``pid`` is gone, so that the init process has taken it over."""
    return _stat(pid)[1:2] == [b"1"]


def _is_zombie(pid: int) -> bool:
    return _stat(pid)[:1] in ([], [b"Z"])


def _stat(pid: int) -> list[bytes]:
    # After the command's name in parentheses (which may itself hold any character): state, parent, …
    stat = _read(_PROC / str(pid) / "stat")
    return stat.rsplit(b")", 1)[1].split() if stat else []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""  # gone, or another user's


def _links(folder: Path) -> list[str]:
    links = []
    try:
        for entry in os.listdir(folder):
            try:
                links.append(os.readlink(folder / entry))
            except FileNotFoundError:
                continue  # closed in between
    except (FileNotFoundError, PermissionError):
        return []
    return links


def _rows(path: Path) -> list[list[str]]:
    return [line.split() for line in _read(path).decode().splitlines()[1:]]
