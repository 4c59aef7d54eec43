"""What goes over a gateway's line to a challenger: instances one way, answers the other, and nothing that is executed.

A message is a JSON header and the bytes of its arrays after it. Floats arrive with the bits that they had.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from pipelines.training.artifact import Prediction
from serving.runner import Rows

_HEADER = struct.Struct("<Q")
_ALIGNED = 8
_KINDS = {"<f8", "<f4", "<i8", "<i4", "|u1", "|b1"}


class Malformed(ValueError):
    """The bytes are no such message; it says why."""


@dataclass(frozen=True)
class Reply:
    """A challenger's answers [n] each, and how long it spent inside the runner."""

    value: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    seconds: float

    @property
    def prediction(self) -> Prediction:
        """The answers as a runner gives them."""
        return Prediction(self.value, self.lower, self.upper)


def pack_rows(rows: Rows) -> bytes:
    """The message of n instances; raises ``TypeError`` for strings that JSON does not have."""
    said = {"count": rows.count, "columns": list(rows.columns), "strings": rows.strings}
    return _pack(said, [*rows.columns.values(), rows.level])


def unpack_rows(message: bytes) -> Rows:
    """The instances of a message; raises ``Malformed``."""
    said, arrays = _unpack(message)
    try:
        names, *levels = said["columns"], *arrays[len(said["columns"]) :]
        (level,) = levels
        return Rows(dict(zip(names, arrays, strict=False)), said["strings"], level, said["count"])
    except (KeyError, TypeError, ValueError) as error:
        raise Malformed(f"no instances: {error}") from error


def pack_reply(found: Prediction, seconds: float) -> bytes:
    """The message of a runner's answers, whatever their shapes; raises ``ValueError`` when they are no numbers."""
    answers = [np.asarray(series, dtype=np.float64) for series in (found.value, found.lower, found.upper)]
    return _pack({"seconds": seconds}, answers)


def unpack_reply(message: bytes) -> Reply:
    """The answers of a message; raises ``Malformed``."""
    said, arrays = _unpack(message)
    try:
        value, lower, upper = arrays
        return Reply(value, lower, upper, said["seconds"])
    except (KeyError, ValueError) as error:
        raise Malformed(f"no answers: {error}") from error


def _pack(said: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> bytes:
    for array in arrays:
        if array.dtype.str not in _KINDS:
            raise TypeError(f"an array of {array.dtype} does not go over a line")
    header = orjson.dumps({**said, "arrays": [(array.dtype.str, array.shape) for array in arrays]})
    header += b" " * (-len(header) % _ALIGNED)
    parts = [array.tobytes() for array in arrays]
    return b"".join((_HEADER.pack(len(header)), header, *(part + bytes(-len(part) % _ALIGNED) for part in parts)))


def _unpack(message: bytes) -> tuple[dict[str, Any], list[np.ndarray]]:
    try:
        (length,) = _HEADER.unpack_from(message)
        at = _HEADER.size + length
        said = orjson.loads(memoryview(message)[_HEADER.size : at])
        arrays = []
        for kind, shape in said.pop("arrays"):
            if kind not in _KINDS or not all(type(length) is int and length >= 0 for length in shape):
                raise Malformed(f"an array of {kind!r} with the shape {shape}")
            count = math.prod(shape)
            arrays.append(np.frombuffer(message, np.dtype(kind), count, at).reshape(shape))
            size = count * np.dtype(kind).itemsize
            at += size + -size % _ALIGNED
    except (struct.error, KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise Malformed(f"no message: {error}") from error
    return said, arrays
