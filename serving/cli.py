"""The ``tidegate`` command. With the base package alone it says what is missing instead of failing on an import."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel

    from pipelines.spec import ABTest, ReleasePolicy
    from serving.client import Client

Model = TypeVar("Model", bound="BaseModel")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses and runs one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="tidegate", description="From data contracts to guarded releases on Ray.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start a one-machine cluster with Serve")
    commands.add_parser("down", help="end it, with every process it started")
    commands.add_parser("status", help="what runs and what answers")
    deploy = commands.add_parser("deploy", help="let a use case's released version answer over HTTP")
    deploy.add_argument("usecase")
    rollout = commands.add_parser("rollout", help="see and steer a use case's release")
    rollout.add_argument("usecase")
    actions = rollout.add_subparsers(dest="action")
    actions.add_parser("status", help="where it stands, with its evidence (the default)")
    actions.add_parser("differences", help="what the version that is tried says differently, with the worst cases")
    start = actions.add_parser("start", help="ask for the release of a version")
    start.add_argument("version")
    start.add_argument("--policy", type=Path, help="a JSON file with the policy, instead of the page's")
    start.add_argument("--force", action="store_true", help="although its gates did not pass; needs --reason")
    start.add_argument("--reason", default="", help="kept in the journal")
    steering = {
        "pause": "no next stage until it is resumed",
        "resume": "go on, and begin the sample-ratio test anew",
        "approve": "allow the promotion of a version whose policy asks for it",
        "abort": "withdraw the version that is being tried",
        "revert": "let the previous version answer again, at once; what is being tried is withdrawn",
    }
    for action, meaning in steering.items():
        actions.add_parser(action, help=meaning).add_argument("--reason", default="", help="kept in the journal")
    test = commands.add_parser("ab", help="see and steer a use case's A/B test")
    test.add_argument("usecase")
    parts = test.add_subparsers(dest="action")
    parts.add_parser("status", help="where it stands, and how the versions compare (the default)")
    begin = parts.add_parser("start", help="let versions answer for different units at the same time")
    begin.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="VERSION=SHARE",
        help="a version beside the champion; repeated",
    )
    begin.add_argument("--definition", type=Path, help="a JSON file of everything else that a test has")
    begin.add_argument("--force", action="store_true", help="although gates did not pass; needs --reason")
    begin.add_argument("--reason", default="", help="kept in the journal")
    page = parts.add_parser("report", help="write it as a page with a plot")
    page.add_argument("--out", type=Path, help="the file (default USECASE-ab.html)")
    meanings = {
        "pause": "let the champion answer all until it is resumed",
        "resume": "go on, and begin the sample-ratio test anew",
        "abort": "end it without a winner",
    }
    for action, meaning in meanings.items():
        parts.add_parser(action, help=meaning).add_argument("--reason", default="", help="kept in the journal")
    features = commands.add_parser("features", help="make, rebuild, audit and look at features")
    kinds = features.add_subparsers(dest="action", required=True)
    kinds.add_parser("backfill", help="make the training table").add_argument("usecase")
    kinds.add_parser("materialize", help="rebuild online state from table and log").add_argument("usecase")
    audit = kinds.add_parser("audit", help="make what was served again and compare it to the last bit")
    audit.add_argument("usecase")
    audit.add_argument("--hours", default="24", help="how far back (default 24)")
    audit.add_argument("--share", default="0.05", help="of the predictions (default 0.05)")
    show = kinds.add_parser("show", help="what state holds for an entity: value, status and age of every feature")
    show.add_argument("usecase")
    show.add_argument("entity")
    commands.add_parser("contract", help="show a contract, tell what a change of it breaks, check it, replay rows")
    demo = commands.add_parser("demo", help="the main job on real data, on a cluster of its own")
    demo.add_argument("usecase", nargs="?", default="aqua")
    demo.add_argument("--home", type=Path, help="where the demo keeps everything (default var/demo); emptied first")
    demo.add_argument("--history-days", type=int, help="how many days of history to take (default all)")
    demo.add_argument("--replay-days", type=int, default=90, help="how many days to replay (default 90)")
    demo.add_argument("--trials", type=int, help="how many settings the search of step 9 tries (default the page's)")
    demo.add_argument("--keep", action="store_true", help="leave the cluster running")
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Its own parser is with its packages, which a caller's machine has not.
    options = parser.parse_args(given[:1] if given[:1] == ["contract"] else given)
    options.arguments = given[1:]
    if importlib.util.find_spec("ray") is None:
        print("this command needs the cluster's packages: pip install 'tidegate[cluster]'", file=sys.stderr)
        return 2
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    from cluster.session import SessionError

    try:
        if options.command == "demo":
            from serving.demo.report import Size
            from serving.demo.run import demo

            demo(
                options.usecase,
                home=options.home or Path("var/demo"),
                size=Size(options.history_days, options.replay_days, options.trials),
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
    if settings.api_keys is None and settings.keys_file is None:
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


def _rollout(options: argparse.Namespace) -> int:
    def act(client: Client) -> BaseModel:
        match options.action:
            case None | "status":
                return client.rollout()
            case "differences":
                return client.rollout_differences()
            case "start":
                policy = _policy(options.policy) if options.policy else None
                return client.rollout_start(options.version, policy=policy, force=options.force, reason=options.reason)
            case _:
                return client.rollout_command(options.action, options.reason)

    return _said(options, act)


def _ab(options: argparse.Namespace) -> int:
    def act(client: Client) -> BaseModel:
        match options.action:
            case "start":
                return client.ab_start(_definition(options), force=options.force, reason=options.reason)
            case "report":
                into = options.out or Path(f"{options.usecase}-ab.html")
                into.write_text(client.ab_report(), encoding="utf-8")
                print(into, file=sys.stderr)
            case "pause" | "resume" | "abort":
                return client.ab_command(options.action, options.reason)
        return client.ab_test()

    return _said(options, act)


def _policy(path: Path) -> ReleasePolicy:
    """The policy of a file; raises ``ValueError`` when it holds none."""
    from pipelines.spec import ReleasePolicy

    return _valid(ReleasePolicy, _document(path), f"{path} holds no release policy")


def _definition(options: argparse.Namespace) -> ABTest:
    """The test that the options describe; raises ``ValueError`` when they describe none."""
    from pipelines.spec import ABTest

    given = _document(options.definition) if options.definition else {}
    if options.variant:
        if "variants" in given:
            raise ValueError(f"variants are given by --variant and in {options.definition}: leave one of them out")
        pairs = [text.partition("=") for text in options.variant]
        given["variants"] = [{"version": version, "share": share} for version, _, share in pairs]
    return _valid(ABTest, given, "that is no A/B test")


def _document(path: Path) -> dict[str, Any]:
    """The JSON object of a file; raises ``ValueError``."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return given


def _valid(kind: type[Model], given: dict[str, Any], otherwise: str) -> Model:
    from pydantic import ValidationError

    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{place}: " for place in [".".join(map(str, first["loc"]))] if place)
        raise ValueError(f"{otherwise}: {where}{first['msg'].removeprefix('Value error, ')}") from error


def _said(options: argparse.Namespace, act: Callable[[Client], BaseModel]) -> int:
    """Prints what the gateway of the use case answers."""
    import httpx

    from cluster import session
    from cluster.settings import Settings
    from pipelines import usecases
    from serving.auth import owner_key
    from serving.client import Client, TidegateError

    settings = Settings.from_environment()
    usecases.load(options.usecase)  # an unknown one is told here
    running = session.current(settings)
    if running is None and "TIDEGATE_URL" not in os.environ:
        print(
            f"tidegate: nothing is up for {settings.home}: `tidegate up` starts a cluster, and TIDEGATE_URL names one "
            "that is elsewhere",
            file=sys.stderr,
        )
        return 1
    url = os.environ.get("TIDEGATE_URL") or (running.http if running else None)
    generated = settings.api_keys is None and settings.keys_file is None
    key = os.environ.get("TIDEGATE_API_KEY") or (owner_key(settings) if generated else None)
    try:
        with Client(options.usecase, url=url, api_key=key) as client:
            answer = act(client)
    except (TidegateError, httpx.TransportError, OSError) as error:
        print(f"tidegate: {error}", file=sys.stderr)
        return 1
    print(answer.model_dump_json(indent=1))
    return 0


def _contract(options: argparse.Namespace) -> int:
    from pipelines import contract

    return contract.main(options.arguments, prog="tidegate contract")


def _features(options: argparse.Namespace) -> int:
    from pipelines import audit, backfill, usecases

    match options.action:
        case "backfill":
            return backfill.main([options.usecase])
        case "audit":
            found = [options.usecase, f"--hours={options.hours}", f"--share={options.share}"]
            return audit.main(found, prog="tidegate features audit")
    use_case = usecases.load(options.usecase)
    if options.action == "materialize":
        return backfill.main([use_case.name, "--materialize", "--only-state"])
    from cluster.clock import open_clock
    from cluster.settings import Settings
    from pipelines.commands import explained
    from pipelines.features.online import open_log
    from pipelines.features.views import open_views
    from serving.answers import Predictor
    from serving.problems import Problem

    settings = Settings.from_environment()
    with explained(use_case.name), closing(open_views(settings, use_case)) as views:
        for fed in views.sources:
            log = open_log(settings, fed.source)
            fed.look(log)
            log.close()
        try:
            shown = Predictor(use_case, views).features(options.entity, open_clock(settings).now(), views.present)
        except Problem as problem:
            print(f"tidegate: {problem.detail}", file=sys.stderr)
            return 1
    print(json.dumps(shown, indent=1))
    return 0


_COMMANDS = {
    "up": _up,
    "down": _down,
    "status": _status,
    "deploy": _deploy,
    "rollout": _rollout,
    "ab": _ab,
    "contract": _contract,
    "features": _features,
}
