"""What the entry points have in common."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from deltalake.exceptions import TableNotFoundError
from sqlalchemy.exc import DBAPIError, OperationalError

from cluster.database import OtherLoad
from cluster.disk import disk_takes_no_more
from cluster.log import LogUnavailable
from cluster.table_schemas import OtherSchema
from pipelines.contracts.leases import LeaseLost
from pipelines.contracts.sources import NoSource
from pipelines.features.state import StateError

_TOLD = (
    *(StateError, LogUnavailable, LeaseLost, NoSource, OtherLoad, OtherSchema),
    *(FileNotFoundError, TimeoutError),
)
"""Whose own words say what to do."""


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
    except (
        StateError,
        LogUnavailable,
        LeaseLost,
        NoSource,
        OtherLoad,
        OtherSchema,
        FileNotFoundError,
        TimeoutError,
    ) as error:
        sys.exit(f"tidegate: {error}")
    except (OSError, DBAPIError) as error:
        if (refusal := disk_takes_no_more(error)) is None:
            if isinstance(error, OperationalError):
                sys.exit(f"tidegate: the database does not answer: {str(error).splitlines()[0]}")
            raise
        sys.exit(f"tidegate: the disk takes no more ({refusal}). Make room, and run it again: it goes on where it was")
