"""What the entry points have in common."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from deltalake.exceptions import TableNotFoundError

from cluster.log import LogUnavailable
from pipelines.features.state import StateError


@contextmanager
def explained(use_case: str) -> Iterator[None]:
    """Ends the process with 1 and a line that says what to do, for what its user can do something about.

    Everything else is a defect, whose traceback is wanted.
    """
    try:
        yield
    except TableNotFoundError as error:
        said = f"{error.args[0]}; load its rows first, for events with `python -m pipelines.ingest {use_case} FILE …`"
        sys.exit(f"tidegate: {said}")
    except (StateError, LogUnavailable, FileNotFoundError) as error:
        sys.exit(f"tidegate: {error}")
