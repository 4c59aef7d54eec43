"""Runs the demo on a cluster of its own and leaves nothing running, unless it is asked to."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import session
from cluster.settings import Settings
from pipelines import usecases
from pipelines.spec import SearchSpace, UseCase
from serving.demo.report import Report, Size

_MARK = ".tidegate-demo"
_STEPS = (
    ("contract", "readings pass their contract into the events table"),
    ("features", "features: the training set and the serving state"),
    ("train", "training on the pinned snapshot"),
    ("gate", "the gate against the baseline"),
    ("serve", "a held-out stretch replayed over HTTP"),
    ("skew", "logged predictions recomputed, bit for bit"),
)
# For a use case whose page declares matured labels and a fallback.
_RELEASE_STEPS = (
    ("release", "versions tried by the rollout controller under replayed traffic"),
    ("sensor", "one district's readings stop and come back"),
    ("retrain", "one district's demand grows: trigger, search, training, gates, rollout"),
)


def demo(usecase: str, *, home: Path, size: Size, keep: bool) -> None:
    """Runs all steps; a step that fails is named, and its error raised. ``home`` is emptied first."""
    usecases.load(usecase)  # an unknown name is refused before anything is emptied
    settings = _settings(home)
    with _only_run(settings.home):
        session.down(settings)  # what a killed run left
        _empty(settings.home)
        _all_steps(usecase, settings, size, keep)


@contextmanager
def _only_run(home: Path) -> Iterator[None]:
    """One demo at a time in one home; the lock ends with the process that holds it, however it ends."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with (home.parent / f".{home.name}.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise session.SessionError(
                f"another demo (pid {lock.read().strip()}) runs in {home}: wait for it, or choose another --home"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        os.set_inheritable(lock.fileno(), False)
        yield


def _all_steps(usecase: str, settings: Settings, size: Size, keep: bool) -> None:
    use_case = usecases.load(usecase)
    report = Report(settings.home / "report.json", _say)
    _say(f"{use_case.title}; everything is kept in {settings.home}")
    done = False
    try:
        _run(usecase, settings, report, size)
        done = True
    finally:
        session.disconnect()
        if keep and session.current(settings) is not None:
            _say(f"the cluster is left running: TIDEGATE_HOME={settings.home} tidegate down ends it")
        else:
            session.down(settings)
        _say(report.scoreboard())
        if not done:
            _say(f"the step {report.steps[-1]['step'] if report.steps else 'start'!r} failed; report: {report.path}")
    _say(f"report: {report.path}")


def _searching(use_case: UseCase, trials: int | None) -> UseCase:
    """The use case with that many trials in its search; unchanged when None."""
    if trials is None or use_case.retraining is None:
        return use_case
    search = SearchSpace.model_validate({**use_case.retraining.search.model_dump(), "trials": trials})
    retraining = use_case.retraining.model_copy(update={"search": search})
    return use_case.model_copy(update={"retraining": retraining})


def _quiet() -> None:
    """What libraries say of their own progress; their warnings stay."""
    for name in ("ray.serve", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # which operators of packages it does not have


def _run(usecase: str, settings: Settings, report: Report, size: Size) -> None:
    running = session.up(settings, say=_say)
    from serving.demo.steps import Demo  # after `up`: Serve reads its flags when it is imported

    _quiet()
    demo = Demo.over(_searching(usecases.load(usecase), size.trials), settings, _say, running.http, size)
    try:
        for name, title in (*_STEPS, *(_RELEASE_STEPS if demo.tries_releases else ())):
            report.run(name, title, getattr(demo, name))
    finally:
        demo.close()


def _settings(home: Path) -> Settings:
    home = home.absolute()
    environment = {
        **os.environ,
        "TIDEGATE_HOME": str(home),
        "TIDEGATE_CLOCK": "replay",
        "TIDEGATE_DRILLS": str(home / "drills.json"),
    }
    return Settings.from_environment(environment)


def _empty(home: Path) -> None:
    if home.exists() and any(home.iterdir()) and not (home / _MARK).exists():
        raise SystemExit(f"{home} is not empty and was not made by the demo: choose another --home")
    home.mkdir(parents=True, exist_ok=True)
    for entry in home.iterdir():
        if entry.name == "cache":  # compiled code may stay, fetched models may not
            shutil.rmtree(entry / "models", ignore_errors=True)
        elif entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (home / _MARK).touch()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
