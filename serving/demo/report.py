"""What a demo run takes and says: its size, progress while it runs, a scoreboard at its end, and ``report.json``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Size:
    """How much of the real data is taken, and how many settings are searched; None is all, and the page's number."""

    history_days: int | None
    replay_days: int
    trials: int | None

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for a size that no step could be done with."""
        least = {"history_days": 1, "replay_days": 1, "trials": 1}
        for name, smallest in least.items():
            given = getattr(self, name)
            if given is not None and given < smallest:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {smallest}, not {given}")


class StepFailed(RuntimeError):
    """A step did not do what it promises; the message says what was found instead."""


@dataclass
class Report:
    """The steps so far. The file is written after each step, so a killed run leaves what it had reached."""

    path: Path
    say: Callable[[str], None]
    steps: list[dict[str, Any]] = field(default_factory=list)

    def run(self, name: str, title: str, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Runs one step and records its figures; a failure is recorded under its name and raised again."""
        self.say(f"[{len(self.steps) + 1}] {title}")
        started = time.perf_counter()
        entry: dict[str, Any] = {"step": name, "ok": False, "figures": {}}
        self.steps.append(entry)
        try:
            figures = entry["figures"] = step()
            entry["ok"] = True
        except BaseException as error:
            entry["error"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            entry["figures"]["seconds"] = round(time.perf_counter() - started, 2)
            self._write()
        self.say("    " + ", ".join(f"{k} {_short(v)}" for k, v in entry["figures"].items() if not isinstance(v, dict)))
        return figures

    def scoreboard(self) -> str:
        """A table of all steps and their figures."""
        lines = ["", f"{'step':<10} {'ok':<4} figures", "-" * 78]
        for entry in self.steps:
            mark = "yes" if entry["ok"] else "NO"
            figures = [f"{k} {_short(v)}" for k, v in entry["figures"].items() if not isinstance(v, dict)]
            for start in range(0, len(figures), 4):
                head = f"{entry['step']:<10} {mark:<4}" if start == 0 else " " * 15
                lines.append(f"{head} {', '.join(figures[start : start + 4])}")
            if "error" in entry:
                lines.append(f"{'':<15} {entry['error'][:200]}")
        return "\n".join([*lines, "-" * 78])

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"steps": self.steps}, indent=1) + "\n")


def expect(condition: bool, what: str) -> None:
    """Raises ``StepFailed`` when a promise of the step does not hold."""
    if not condition:
        raise StepFailed(what)


def known(value: Any, what: str) -> Any:
    """The value; raises ``StepFailed`` when there is none."""
    expect(value is not None, what)
    return value


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
