"""Makes the full set of feature columns out of stored features, inputs and the clock: the only function that
does.

Derived features are traced once: only elementwise NumPy operations pass, because reductions and matrix
products may differ in the last bit between one row and many. The trace is also what a view's fingerprint is
made of.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pipelines.features.localtime import calendar_columns
from pipelines.spec import FeatureView

_FLOAT64 = np.dtype(np.float64)
_SCALARS = (bool, int, float, np.bool_, np.integer, np.floating)


class DerivedError(TypeError):
    """A derived feature does something that could differ between one row and many, or names no column."""


class Column(np.lib.mixins.NDArrayOperatorsMixin):
    """A stand-in for a column: it records elementwise operations and refuses everything else."""

    def __init__(self, feature: str, operation: tuple[Any, ...]) -> None:
        self.feature, self.operation = feature, operation

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Column):
            return value
        if isinstance(value, _SCALARS):
            return (type(value).__name__, repr(value.item() if isinstance(value, np.generic) else value))
        raise DerivedError(
            f"derived feature {self.feature!r} mixes a column with a {type(value).__name__}; use columns and numbers"
        )

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Column:
        name = ufunc.__name__
        if method != "__call__" or ufunc.signature is not None or ufunc.nout != 1:
            raise DerivedError(
                f"derived feature {self.feature!r} calls "
                f"{name}{'' if method == '__call__' else '.' + method}, which "
                "is not elementwise with one result; use a stored window feature for anything over "
                "several rows"
            )
        if options:
            raise DerivedError(f"derived feature {self.feature!r} gives {name} the options {sorted(options)}")
        return Column(self.feature, (name, *(self._argument(value) for value in inputs)))

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Column:
        if function is not np.where or len(args) != 3 or kwargs:
            raise DerivedError(
                f"derived feature {self.feature!r} calls {function.__name__}, which is not an elementwise "
                "ufunc; "
                "ufuncs, operators and np.where with three arguments are allowed"
            )
        return Column(self.feature, ("where", *(self._argument(value) for value in args)))

    def __bool__(self) -> bool:
        raise DerivedError(f"derived feature {self.feature!r} branches on a column; use np.where")

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise DerivedError(f"derived feature {self.feature!r} turns a column into an array; columns stay columns")

    def _refuse(self, *_: Any) -> Any:
        raise DerivedError(
            f"derived feature {self.feature!r} takes a column for one number or for a list; use NumPy functions"
        )

    __float__ = __int__ = __index__ = __len__ = __iter__ = __getitem__ = _refuse


@dataclass(frozen=True)
class Trace:
    """The operations of one derived feature, equal ones once, in the order in which they are needed."""

    arguments: tuple[str, ...]
    text: str


def trace(feature: str, function: Any) -> Trace:
    """What ``function`` does to its columns; ``DerivedError`` when it is not elementwise."""
    parameters = inspect.signature(function).parameters
    if odd := [
        p.name for p in parameters.values() if p.kind is not p.POSITIONAL_OR_KEYWORD or p.default is not p.empty
    ]:
        raise DerivedError(f"derived feature {feature!r}: {odd} must be plain arguments that name columns")
    result = function(*(Column(feature, ("column", (name,))) for name in parameters))
    if not isinstance(result, Column):
        raise DerivedError(f"derived feature {feature!r} returns a {type(result).__name__}, not a column")
    numbers: dict[str, int] = {}

    def visit(node: Column) -> int:
        name, *arguments = node.operation
        told = [f"%{visit(a)}" if isinstance(a, Column) else ":".join(a) for a in arguments]
        return numbers.setdefault(f"{name}({','.join(told)})", len(numbers))

    visit(result)
    return Trace(tuple(parameters), ";".join(numbers))


def traces(view: FeatureView) -> dict[str, Trace]:
    """The trace of every derived feature by name, in the view's order; computed once per view.

    Raises ``DerivedError`` unless every one is elementwise and names columns before it.
    """
    return _compiled(_Same(view)).traces


@dataclass(frozen=True)
class _Columns:
    """What ``columns`` needs of a view: the view's own properties are too slow for every request."""

    stored: tuple[str, ...]
    traces: dict[str, Trace]
    steps: tuple[tuple[str, Callable[..., Any], tuple[str, ...]], ...]


class _Same:
    """A view as a cache key, equal to itself alone: hashing every part of it would take longer than the
    lookup.
    """

    __slots__ = ("view",)

    def __init__(self, view: FeatureView) -> None:
        self.view = view

    def __hash__(self) -> int:
        return id(self.view)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.view is self.view


@lru_cache(maxsize=64)
def _compiled(same: _Same) -> _Columns:
    view = same.view
    have = {*view.stored, *view.inputs, *view.calendar_columns}
    found: dict[str, Trace] = {}
    for derived in view.derived:
        found[derived.name] = trace(derived.name, derived.function)
        if missing := sorted(set(found[derived.name].arguments) - have):
            raise DerivedError(
                f"derived feature {derived.name!r} of view {view.name!r} names {missing}, which are not "
                f"columns before it; there are {sorted(have)}"
            )
        have.add(derived.name)
    steps = tuple((d.name, d.function, found[d.name].arguments) for d in view.derived)
    return _Columns(view.stored, found, steps)


def columns(
    view: FeatureView,
    stored: np.ndarray,
    inputs: Mapping[str, Sequence[Any] | np.ndarray],
    time_us: np.ndarray,
) -> dict[str, np.ndarray]:
    """Every numeric column of the view, float64[n] each: stored, inputs, calendar, derived, in this order.

    stored float64[n, len(view.stored)]; inputs one sequence of length n per numeric input (None becomes NaN,
    booleans 0 and 1; string inputs may be among them and are passed over); time_us int64[n], the request
    times. Training and serving both call this.
    """
    compiled, rows = _compiled(_Same(view)), len(time_us)
    if stored.shape != (rows, len(compiled.stored)):
        raise ValueError(
            f"view {view.name!r} wants stored features of shape {(rows, len(compiled.stored))}, got {stored.shape}"
        )
    answer = dict(zip(compiled.stored, np.ascontiguousarray(stored.T), strict=True))
    for name in view.inputs:
        column = _numbers(inputs[name]) if name in inputs else None
        if column is None:
            continue
        if column.shape != (rows,):
            raise ValueError(f"input {name!r} has the shape {column.shape}, not ({rows},)")
        answer[name] = column
    if view.calendar is not None:
        answer.update(calendar_columns(view.calendar, time_us))
    with np.errstate(all="ignore"):  # 0/0 is NaN, which is what a feature without a value is
        for name, function, arguments in compiled.steps:
            try:
                given = [answer[argument] for argument in arguments]
            except KeyError as missing:
                raise ValueError(
                    f"derived feature {name!r} needs the input {missing} as numbers; got {sorted(inputs)}"
                ) from None
            result = function(*given)
            answer[name] = result if result.dtype is _FLOAT64 else result.astype(np.float64)
    return answer


def _numbers(values: Sequence[Any] | np.ndarray) -> np.ndarray | None:
    """The values as contiguous float64, or None when they are strings."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "fiub":
        return np.ascontiguousarray(values, dtype=np.float64)
    if any(isinstance(value, str) for value in values):
        return None
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
