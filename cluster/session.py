"""A Ray cluster with Serve on this machine: started with the flags Serve needs, connected to, and ended completely.

``up`` starts one head node as processes of its own session; everything it starts inherits the session's marker,
by which ``down`` finds and ends all of it, a leftover HAProxy included. ``connect`` joins it as a driver.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster import processes
from cluster.settings import Settings

NAMESPACE = "tidegate"
_MARKER = "TIDEGATE_SESSION"


def _silent(_: str) -> None:
    """The default listener of progress: none."""


class SessionError(RuntimeError):
    """The cluster cannot be started, reached or ended; the message says what to do."""


@dataclass(frozen=True)
class Session:
    """A running head node. ``address`` is for drivers, ``dashboard`` for jobs, ``http`` for callers."""

    marker: str
    pid: int
    address: str
    dashboard: str
    http: str
    temp_dir: str
    metrics_port: int
    stats_port: int
    fallback_port: int = 8500

    @property
    def environment_marker(self) -> str:
        """The variable that every process of the session carries, as ``NAME=value``."""
        return f"{_MARKER}={self.marker}"

    def alive(self) -> bool:
        """Whether the head node's process still runs."""
        return self.pid in processes.session_pids(self.environment_marker)


def driver_environment(settings: Settings) -> dict[str, str]:
    """What Ray and Serve read when they are imported; set it before the first import, on every node alike."""
    return {
        **_authentication(settings),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Predict, events (idempotent by event id) and feedback may all be repeated; refusals may not.
        "RAY_SERVE_HAPROXY_RETRIES": "3",
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response response-timeout",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "RAY_SERVE_HAPROXY_NBTHREAD": "2",
    }


def _node_environment(settings: Settings, session: Session) -> dict[str, str]:
    """What the processes of the node inherit besides."""
    proxy = settings.home / "haproxy"
    return {
        **settings.environment(),
        **driver_environment(settings),
        _MARKER: session.marker,
        # A job's `python` is the interpreter that started the cluster, whether or not its environment is activated.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "NUMBA_CACHE_DIR": str(settings.cache_dir / "numba"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(session.metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(session.stats_port),
        # Where the proxy sends calls while no replica runs. Shared with another cluster of this machine, as Ray would
        # let it be, it would answer with that one's gateways.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(session.fallback_port),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(proxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(Path(session.temp_dir) / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(proxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(proxy / "server-state"),
    }


def up(settings: Settings, *, say: Callable[[str], None] = _silent) -> Session:
    """Starts a head node with Serve's proxy for ``settings.home`` and waits until it answers.

    Raises ``SessionError`` when one is already up, when a port is taken (naming by whom), or when Ray does not
    come up within 90 s (naming its log).
    """
    before = current(settings)
    if before is not None and before.alive():
        raise SessionError(f"a cluster is already up for {settings.home} (pid {before.pid}); `tidegate down` ends it")
    if before is not None:
        say("a session that ended without `tidegate down` is cleaned up first")
        down(settings)
    _refuse_taken(settings.http_port)

    temp_dir = _short_directory(settings)
    shutil.rmtree(temp_dir, ignore_errors=True)
    temp_dir.mkdir(parents=True, mode=0o700)
    for folder in (settings.home, settings.home / "haproxy", settings.cache_dir):
        folder.mkdir(parents=True, exist_ok=True)
    port, dashboard = free_port(), _port_beside(settings, 8265)
    session = Session(
        marker=secrets.token_hex(8),
        pid=0,
        address=f"127.0.0.1:{port}",
        dashboard=f"http://127.0.0.1:{dashboard}",
        http=f"http://{settings.http_host}:{settings.http_port}",
        temp_dir=str(temp_dir),
        metrics_port=_port_beside(settings, 9101),
        stats_port=_port_beside(settings, 8404),
        fallback_port=_port_beside(settings, 8500),
    )
    environment = {**os.environ, **_node_environment(settings, session)}
    environment.pop("RAY_ADDRESS", None)
    arguments = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        "--include-dashboard=true", f"--temp-dir={temp_dir}", "--include-log-monitor=false",
        # Ray's fixed defaults for these collide with any other cluster of the machine, and then jobs find no agent.
        f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}",
        f"--num-cpus={settings.num_cpus or os.cpu_count() or 1}",
    ]  # fmt: skip
    log = settings.home / "ray-start.log"
    with log.open("wb") as output:
        head = subprocess.Popen(
            arguments,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    session = replace(session, pid=head.pid)
    _session_file(settings).write_text(json.dumps(asdict(session)))
    try:
        _wait_for_head(head, session, log)
        _start_serve(settings)
    except BaseException:  # also an interrupt: nothing of a start that did not succeed may stay
        down(settings)
        raise
    return session


def current(settings: Settings) -> Session | None:
    """The session recorded for ``settings.home``, alive or not."""
    try:
        return Session(**json.loads(_session_file(settings).read_text()))
    except FileNotFoundError:
        return None


def down(settings: Settings) -> bool:
    """Ends every process of the recorded session and forgets it; False when there was none.

    Raises ``SessionError`` naming the processes that would not end.
    """
    session = current(settings)
    if session is None:
        return False

    # Some of Ray's agents overwrite their environment with a new title, so descendants are looked for as well.
    family = processes.descendants(processes.session_pids(session.environment_marker))

    def ours() -> list[int]:
        marked = processes.session_pids(session.environment_marker)
        return [*marked, *(pid for pid in processes.still_alive(family) if pid not in marked)]

    # Ray's servers take many seconds over a SIGTERM, and nothing acknowledged depends on it: a short grace. The head's
    # own process comes last, because it reaps the others and then ends by itself.
    processes.end(lambda: [pid for pid in ours() if pid != session.pid], grace_s=1.5)
    left = processes.end(ours, grace_s=5)
    if left:
        names = ", ".join(f"{pid} ({processes.command(pid)[:60]})" for pid in left)
        raise SessionError(f"these processes of the session did not end: {names}")
    shutil.rmtree(session.temp_dir, ignore_errors=True)
    _session_file(settings).unlink(missing_ok=True)
    return True


def connect(settings: Settings) -> Session | None:
    """Joins Ray as a driver: the cluster of ``settings.home``, or inside a job the one it was submitted to.

    Returns the session, or None inside a job on somebody else's cluster. Raises ``SessionError`` when neither is
    there. Connecting twice is allowed.
    """
    session = current(settings)
    if session is not None:
        os.environ.update(driver_environment(settings))
    import ray

    if ray.is_initialized():
        return session
    if "RAY_JOB_ID" in os.environ or (session is None and "RAY_ADDRESS" in os.environ):
        ray.init(namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        return session
    if session is None or not session.alive():
        raise SessionError(f"no cluster is up for {settings.home}: `tidegate up` starts one")
    ray.init(address=session.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    return session


def disconnect() -> None:
    """Leaves Ray; the cluster goes on."""
    import ray

    ray.shutdown()


def nodes() -> list[dict[str, Any]]:
    """What Ray says of each node of the cluster that this process is connected to."""
    import ray

    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray declares no type for it
    return found


def job_environment(settings: Settings) -> dict[str, str]:
    """What a shell needs for `ray job submit` to this session: the dashboard's address and the token's file."""
    session = current(settings)
    if session is None:
        raise SessionError(f"no cluster is up for {settings.home}: `tidegate up` starts one")
    return {"RAY_ADDRESS": session.dashboard, **_authentication(settings)}


@contextmanager
def running(settings: Settings, *, say: Callable[[str], None] = _silent) -> Iterator[Session]:
    """A session for the length of a block: up and connected, then left and down."""
    session = up(settings, say=say)
    try:
        connect(settings)
        yield session
    finally:
        disconnect()
        down(settings)


def free_port() -> int:
    """A TCP port that was free on 127.0.0.1 a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _port_beside(settings: Settings, usual: int) -> int:
    """The usual port for the cluster on the usual HTTP port; any other cluster of this machine keeps off it."""
    usual_cluster = settings.http_port == Settings.model_fields["http_port"].default
    return usual if usual_cluster and processes.listener(usual) is None else free_port()


def _refuse_taken(port: int) -> None:
    holder = processes.listener(port)
    if holder is None:
        return
    if "haproxy" in holder.command and holder.pid is not None and processes.is_orphan(holder.pid):
        raise SessionError(
            f"port {port} is held by a haproxy (pid {holder.pid}) that a Ray cluster left behind when it was killed; "
            f"end it with `kill {holder.pid}` and start again"
        )
    raise SessionError(
        f"port {port} is taken by pid {holder.pid} ({holder.command[:80]}); end that process or set "
        "TIDEGATE_HTTP_PORT to another port"
    )


def _wait_for_head(head: subprocess.Popen[bytes], session: Session, log: Path) -> None:
    deadline = time.monotonic() + 90
    ports = [int(session.address.rsplit(":", 1)[1]), int(session.dashboard.rsplit(":", 1)[1])]
    while any(processes.listener(port) is None for port in ports):
        if head.poll() is not None:
            raise SessionError(f"ray start ended with {head.returncode}: {log.read_text()[-2000:]}")
        if time.monotonic() > deadline:
            raise SessionError(f"Ray did not come up within 90 s; see {log} and {session.temp_dir}")
        time.sleep(0.1)


def _start_serve(settings: Settings) -> None:
    connect(settings)
    from ray import serve

    serve.start(http_options={"host": settings.http_host, "port": settings.http_port})


def _authentication(settings: Settings) -> dict[str, str]:
    """Token mode for Ray's own ports; the token is made once and only the owner can read it."""
    path = settings.home / "ray-token"
    if not path.exists():
        settings.home.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def _short_directory(settings: Settings) -> Path:
    # Ray puts UNIX sockets below its temporary directory, and their paths may not exceed 107 bytes.
    from hashlib import blake2b

    name = blake2b(str(settings.home).encode(), digest_size=4).hexdigest()
    return Path("/tmp") / f"tidegate-{os.getuid()}-{name}"


def _session_file(settings: Settings) -> Path:
    return settings.home / "session.json"
