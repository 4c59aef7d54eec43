"""State that keeps rows under keys: points under the cells of a map, facts under what they are of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from pipelines.features.projection import Projection
from pipelines.features.state import StateError
from pipelines.features.stores import Rebuild, Store, Transaction
from pipelines.spec import Contract

_FORMAT = 1
_FORMAT_AT, _NOTE_AT, _HEADER = 0, 1, 2  # words of a key before its rows


class RowsState(Projection[list[tuple[str, np.ndarray]]]):
    """Rows of ``words`` int64 words by key, and of each key a note, a word that is ``blank`` where there are none yet.

    A change writes all rows of a key anew.
    """

    def __init__(self, store: Store, use_case: str, contract: Contract, words: int, blank: int) -> None:
        super().__init__(store, use_case, contract)
        self._words, self._blank = words, blank

    @abstractmethod
    def kept(self, note: int, rows: np.ndarray) -> tuple[int, np.ndarray]:
        """What a key keeps of its rows int64[n, words], some of which are new; its note before and after."""

    def apply(self, txn: Transaction | Rebuild, seen: list[tuple[str, np.ndarray]]) -> int:
        """See ``Projection``: keys with their new rows; every row can be placed."""
        names = [name for name, _ in seen]
        made = [self._joined(blob, rows) for blob, (_, rows) in zip(txn.get(names), seen, strict=True)]
        txn.put(names, made)
        return 0

    def opened(self, blob: bytes | memoryview) -> tuple[int, np.ndarray]:
        """The note and the rows int64[n, words] of a stored key; ``StateError`` when another format wrote it."""
        found = np.frombuffer(blob, np.int64)
        if len(found) < _HEADER or found[_FORMAT_AT] != _FORMAT or (len(found) - _HEADER) % self._words:
            raise StateError(
                f"what is stored in {self.store.where} has another format than this code reads: rebuild it with "
                f"`python -m pipelines.backfill {self._page} --materialize`"
            )
        return int(found[_NOTE_AT]), found[_HEADER:].reshape(-1, self._words)

    def _joined(self, blob: bytes | memoryview | None, rows: np.ndarray) -> bytes:
        note = self._blank
        if blob is not None:
            note, held = self.opened(blob)
            rows = np.concatenate([held, rows])
        note, rows = self.kept(note, rows)
        return np.array([_FORMAT, note], np.int64).tobytes() + rows.tobytes()


def by_key(names: Sequence[str], codes: np.ndarray, rows: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """The ``rows`` [n, …] of each name; ``codes`` int64[n] are places in ``names``, each of which has a row."""
    order = np.argsort(codes, kind="stable")
    begins = np.searchsorted(codes[order], np.arange(len(names)))
    return list(zip(names, np.split(rows[order], begins)[1:], strict=True))
