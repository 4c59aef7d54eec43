"""A gateway's way to a version that is being tried: its answers within a deadline, and which of them may be given."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pipelines.training.artifact import Prediction
from serving.answers import Prepared
from serving.frames import Reply
from serving.line import Busy
from serving.runner import DescribedVersion, LoadedVersion, Rows

logger = logging.getLogger(__name__)

_KINDS_TOLD = 256
Described = DescribedVersion | LoadedVersion
"""Says how a version's own rows are made."""
RowsOf = Callable[[Described], Awaitable[Prepared]]
"""Makes the instances of a request as that version is to have them, by the view of its own."""


class Ask(Protocol):
    """Asks a version (``serving.challenger.Asker.ask``)."""

    def __call__(self, rows: Rows) -> Coroutine[Any, Any, Reply]:
        """Its answers, or whatever error it had."""
        ...


@dataclass(frozen=True)
class Got:
    """What a version gave, None when it failed, and of what; ``late`` when it gave nothing in time."""

    reply: Reply | None
    tried: Prepared | None = None
    late: bool = False


@dataclass(frozen=True)
class Allowed:
    """The lowest and the highest answer of the output's contract."""

    low: float
    high: float

    def valid(self, found: Prediction) -> np.ndarray:
        """bool [n]: answers that the contract allows, inside an interval with two ends."""
        with np.errstate(invalid="ignore"):
            ordered = (found.lower <= found.value) & (found.value <= found.upper)
            ended = np.isfinite(found.lower) & np.isfinite(found.upper)
            valid: np.ndarray = ordered & ended & (found.value >= self.low) & (found.value <= self.high)
        return valid

    def first(self, found: Prediction) -> bool:
        """The same of the first answer alone, for less."""
        lower, value, upper = float(found.lower[0]), float(found.value[0]), float(found.upper[0])
        return -math.inf < lower <= value <= upper < math.inf and self.low <= value <= self.high


async def within(
    deadline_s: float, ask: Ask, described: Described, rows_of: RowsOf, of: Callable[[Prepared], Rows]
) -> Got:
    """The version's reply to the rows ``of`` what it is to have, if one comes in time and in form.

    The deadline is for making these too: a view of its own may be slow, or its state away.

    A late one is harm, but no evidence of errors: the way to a process of its own and a busy machine would be held
    against a version that is as good as the champion, which has no such way. So is one that could not be asked.
    """

    async def work() -> tuple[Prepared, Rows, Reply]:
        tried = await rows_of(described)
        rows = of(tried)
        return tried, rows, await ask(rows)

    try:
        tried, rows, found = await asyncio.wait_for(work(), deadline_s)
        value, lower, upper = (
            np.asarray(answer, dtype=np.float64) for answer in (found.value, found.lower, found.upper)
        )
        reply = Reply(value, lower, upper, float(found.seconds))
    except asyncio.CancelledError:
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise  # the caller went away
        return Got(None)
    except (TimeoutError, Busy):
        return Got(None, late=True)
    except Exception as error:  # noqa: BLE001 — whatever a version raises or answers is its failure, and counted as one
        _tell(described.version, type(error), str(error))
        return Got(None)
    return Got(reply if value.shape == lower.shape == upper.shape == (rows.count,) else None, tried)


_told: OrderedDict[tuple[str, type], None] = OrderedDict()


def _tell(version: str, kind: type, said: str) -> None:
    """Each kind of failure is told once, or a version that always fails would fill the log."""
    if (version, kind) not in _told:
        _told[version, kind] = None
        logger.warning(
            "version %s failed: %s: %s; more of this kind is counted and not logged", version, kind.__name__, said
        )
        if len(_told) > _KINDS_TOLD:
            _told.popitem(last=False)


def put(prediction: Prediction, rows: np.ndarray, good: np.ndarray, reply: Reply) -> Prediction:
    """The answers [n] with those of a ``reply`` to the instances at ``rows`` [m] in their place where ``good`` [m]."""
    answers = [series.copy() for series in (prediction.value, prediction.lower, prediction.upper)]
    for into, given in zip(answers, (reply.value, reply.lower, reply.upper), strict=True):
        into[rows[good]] = given[good]
    return Prediction(*answers)
