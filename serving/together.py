"""Requests that wait at the same moment are answered together: a model costs by the call more than by the row.

Nobody waits for others to come: what is there when the event loop has let every ready request speak is answered at
once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from serving.answers import Answered

Records = Sequence[Mapping[str, Any]]
MOST_INSTANCES = 64
"""Of requests that are answered in one go, so that the event loop is held for no longer than by a few of them."""


class Together:
    """Collects small requests for ``answer``, which answers any number of records. Of one event loop."""

    def __init__(self, answer: Callable[[Records], Answered]) -> None:
        self._answer = answer
        self._waiting: list[tuple[Records, asyncio.Future[Answered]]] = []

    async def answered(self, records: Records) -> Answered:
        """The answer to a request's records, with those of whoever waits as well; raises what ``answer`` does."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answered] = loop.create_future()
        self._waiting.append((records, future))
        if len(self._waiting) == 1:
            loop.call_soon(self._flush)
        return await future

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        group: list[tuple[Records, asyncio.Future[Answered]]] = []
        size = 0
        for records, future in waiting:
            if future.cancelled():
                continue  # its caller went away, or its deadline passed
            if group and size + len(records) > MOST_INSTANCES:
                self._settle(group)
                group, size = [], 0
            group.append((records, future))
            size += len(records)
        if group:
            self._settle(group)

    def _settle(self, group: list[tuple[Records, asyncio.Future[Answered]]]) -> None:
        try:
            whole = self._answer([record for records, _ in group for record in records])
        except Exception as error:  # noqa: BLE001 — it is raised where the request is answered
            if len(group) == 1:
                group[0][1].set_exception(error)
                return
            for one in group:  # the fault of one request is not the others'
                self._settle([one])
            return
        at = 0
        for records, future in group:
            future.set_result(whole.part(at, at := at + len(records)))
