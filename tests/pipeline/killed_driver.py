"""A driver that loads one file and kills itself at a named point; run by ``python -m``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from cluster.database import Database
from cluster.tables import Tables
from pipelines.contracts import enforce, leases
from tests.pipeline import loads


def kill(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_once(flag: str, name: str, *arguments: Any, **options: Any) -> Any:
    """``enforce.<name>``, but the first process to have done all its work dies before it can tell."""
    result = getattr(enforce, name)(*arguments, **options)
    try:
        Path(flag).touch(exist_ok=False)
    except FileExistsError:
        return result
    return kill()


def main(home: str, source: str, point: str) -> None:
    leases._SECONDS = 0.5  # what a dead driver held is free again soon
    commit = Tables.commit

    def commit_unless(table: str) -> Any:
        def dying(self: Tables, name: str, *rest: Any, **options: Any) -> Any:
            return kill() if name.endswith(table) else commit(self, name, *rest, **options)

        return dying

    if point == "staged":
        enforce.settle = kill
    if point == "settled":
        Tables.commit = commit_unless("/events")
    if point in ("between", "undecided"):
        Tables.commit = commit_unless("/quarantine")
    if point == "committed":
        Database.finish_load = kill
    loads.world(Path(home)).load([source], load_id="one")


if __name__ == "__main__":
    main(*sys.argv[1:])
