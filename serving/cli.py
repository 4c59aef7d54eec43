"""The ``tidegate`` command. With the base package alone it says what is missing instead of failing on an import."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses and runs one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="tidegate", description="From data contracts to guarded releases on Ray.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start a one-machine cluster with Serve")
    commands.add_parser("down", help="end it, with every process it started")
    commands.add_parser("status", help="what runs and what answers")
    deploy = commands.add_parser("deploy", help="let a use case's released version answer over HTTP")
    deploy.add_argument("usecase")
    demo = commands.add_parser("demo", help="the main job on real data, on a cluster of its own")
    demo.add_argument("usecase", nargs="?", default="aqua")
    demo.add_argument("--home", type=Path, help="where the demo keeps everything (default var/demo); emptied first")
    demo.add_argument("--history-days", type=int, help="how many days of history to take (default all)")
    demo.add_argument("--replay-days", type=int, default=30, help="how many days to replay (default 30)")
    demo.add_argument("--keep", action="store_true", help="leave the cluster running")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("ray") is None:
        print("this command needs the cluster's packages: pip install 'tidegate[cluster]'", file=sys.stderr)
        return 2
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    from cluster.session import SessionError

    try:
        if options.command == "demo":
            from serving.demo.run import demo

            demo(
                options.usecase,
                home=options.home or Path("var/demo"),
                history_days=options.history_days,
                replay_days=options.replay_days,
                keep=options.keep,
            )
            return 0
        return _COMMANDS[options.command](options)
    except (SessionError, ValueError, KeyError) as error:
        print(f"tidegate: {error.args[0] if error.args else error}", file=sys.stderr)
        return 1


def _up(_: argparse.Namespace) -> int:
    from cluster import session
    from cluster.settings import Settings
    from serving.auth import owner_key

    settings = Settings.from_environment()
    running = session.up(settings, say=print)
    session.disconnect()
    if settings.api_keys is None:
        owner_key(settings)
        print(f"API key: {settings.api_key_file}")
    print(f"up: HTTP {running.http}, jobs {running.dashboard}")
    print("for `ray job submit`: " + " ".join(f"{k}={v}" for k, v in session.job_environment(settings).items()))
    return 0


def _down(_: argparse.Namespace) -> int:
    from cluster import session
    from cluster.settings import Settings

    settings = Settings.from_environment()
    print("down" if session.down(settings) else f"nothing was up for {settings.home}")
    return 0


def _status(_: argparse.Namespace) -> int:
    from cluster import session
    from cluster.settings import Settings

    settings = Settings.from_environment()
    running = session.current(settings)
    if running is None or not running.alive():
        print(f"nothing is up for {settings.home}: `tidegate up` starts a cluster")
        return 1
    session.connect(settings)
    from ray import serve

    applications = {name: str(app.status.value) for name, app in serve.status().applications.items()}
    session.disconnect()
    print(json.dumps({"http": running.http, "jobs": running.dashboard, "applications": applications}, indent=1))
    return 0


def _deploy(options: argparse.Namespace) -> int:
    from cluster import session
    from cluster.settings import Settings

    settings = Settings.from_environment()
    session.connect(settings)
    from serving.app import deploy
    from serving.releases import ReleaseError

    try:
        table = deploy(options.usecase, settings)
    except ReleaseError as error:
        print(f"tidegate: {error}", file=sys.stderr)
        return 1
    finally:
        session.disconnect()
    print(f"{options.usecase}: version {table.champion} answers (epoch {table.epoch})")
    return 0


_COMMANDS = {"up": _up, "down": _down, "status": _status, "deploy": _deploy}
