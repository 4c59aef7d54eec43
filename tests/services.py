"""Real services that tests start for themselves: PostgreSQL and Redis from Debian's binaries, S3 from moto."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def postgresql_binaries() -> Path:
    """The newest installed PostgreSQL; ``FileNotFoundError`` that says how to install it."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    if not found:
        raise FileNotFoundError("no PostgreSQL below /usr/lib/postgresql: run `make deps`, which installs it")
    return max(found, key=lambda path: int(path.parent.name))


@contextmanager
def postgresql() -> Iterator[str]:
    """The URL of a new, empty database on a server of its own, which is gone at the end.

    It listens on a socket in its own directory alone. PostgreSQL refuses to run as root, so root starts
    it as ``nobody``.
    """
    binaries = postgresql_binaries()
    home = Path(tempfile.mkdtemp(prefix="tidegate-postgresql-"))
    owner: dict[str, Any] = {}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(home, nobody.pw_uid, nobody.pw_gid)
        owner = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    server = None
    try:
        _run(
            [binaries / "initdb", "-D", home / "data", "-U", "tidegate", "-A", "trust", "-E", "UTF8", "-N"],
            home,
            owner,
        )
        command: list[Any] = [binaries / "postgres", "-D", home / "data", "-k", home, "-h", "", "-F"]
        with open(home / "log", "w") as log:
            server = subprocess.Popen(command, cwd=home, stdout=log, stderr=subprocess.STDOUT, **owner)
        deadline = time.monotonic() + 60
        while subprocess.run([binaries / "pg_isready", "-q", "-h", home, "-d", "postgres"]).returncode:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{(home / 'log').read_text()}")
            time.sleep(0.05)
        yield f"postgresql://tidegate@/postgres?host={home}"
    finally:
        if server is not None and server.poll() is None:
            server.send_signal(signal.SIGINT)  # "fast": ends the sessions that tests left open
            server.wait(30)
        shutil.rmtree(home)


def _run(command: list[Any], home: Path, owner: dict[str, Any]) -> None:
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, **owner)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")


@contextmanager
def s3(bucket: str) -> Iterator[dict[str, str]]:
    """The storage options of an S3 server on 127.0.0.1 that has ``bucket``."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=endpoint, **keys).create_bucket(Bucket=bucket)
        yield {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ALLOW_HTTP": "true",
        }
    finally:
        server.stop()


class RedisServer:
    """A Redis server of a test's own that keeps what it acknowledges; it can be killed and started again."""

    def __init__(self) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            raise FileNotFoundError("no redis-server on the path: run `make deps`, which installs it")
        self._home = Path(tempfile.mkdtemp(prefix="tidegate-redis-"))
        self._socket = self._home / "socket"
        self._command = [
            binary, "--port", "0", "--unixsocket", str(self._socket), "--dir", str(self._home), "--save", "",
            "--appendonly", "yes", "--appendfsync", "always", "--logfile", str(self._home / "log"),
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        """The URL of the server's first database."""
        return f"unix://{self._socket}?db=0"

    def start(self, *options: str) -> None:
        """Returns when the server answers, with all that it kept; ``options`` take the place of its usual ones."""
        self._process = subprocess.Popen([*self._command, *options])
        deadline = time.monotonic() + 60
        while self.ask("PING") != "PONG":
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Redis did not start:\n{(self._home / 'log').read_text()}")
            time.sleep(0.02)

    def ask(self, *command: str) -> str:
        """What the server answers to a command of ``redis-cli``."""
        done = subprocess.run(["redis-cli", "-s", self._socket, *command], capture_output=True, text=True)
        return done.stdout.strip()

    def empty(self) -> None:
        """Forgets everything."""
        if self.ask("FLUSHALL") != "OK":
            raise RuntimeError(f"Redis does not answer:\n{(self._home / 'log').read_text()}")

    def kill(self) -> None:
        """SIGKILL, in the middle of whatever it does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Ends the server and removes its files."""
        self.kill()
        shutil.rmtree(self._home)


@contextmanager
def redis() -> Iterator[RedisServer]:
    """A new, empty Redis server, which is gone at the end."""
    server = RedisServer()
    try:
        yield server
    finally:
        server.close()
