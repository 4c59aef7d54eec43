"""How a kernel is compiled: once for every version of this package, and never with ``fastmath``."""

from __future__ import annotations

import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from numba import njit
from numba.core import config as _config

_PACKAGE = Path(__file__).parent
_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])

# numba's stubs know neither its settings nor all of its options.
_settings: Any = _config
_njit: Any = njit


def _directory() -> str:
    """Where compiled kernels are kept: a directory per content of this package.

    numba's cache watches only the file of the function that it compiled, so a kernel that calls one of another file
    would go on with the old callee.
    """
    digest = blake2b(digest_size=8)
    for path in sorted(_PACKAGE.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return os.path.join(_settings.CACHE_DIR or _PACKAGE / "__pycache__", digest.hexdigest())


_DIRECTORY = _directory()


def compiled(kernel: _Kernel) -> _Kernel:
    """Compiles ``kernel`` at its first call, or loads what an earlier process compiled.

    ``fastmath`` is off, because it would let the compiler reassociate; the interpreter's lock is released.
    """
    return _compiled(kernel, callable_from_python=True)


def inner(kernel: _Kernel) -> _Kernel:
    """``compiled`` for a function that only kernels call: without an entry for the interpreter, put into its callers.

    Left to itself the compiler calls the larger ones, handing accumulators of ten words over through memory.
    """
    return _compiled(kernel, callable_from_python=False)


def _compiled(kernel: _Kernel, callable_from_python: bool) -> _Kernel:
    base, _settings.CACHE_DIR = _settings.CACHE_DIR, _DIRECTORY
    try:
        made = _njit(
            cache=True,
            fastmath=False,
            error_model="numpy",
            nogil=True,
            no_cpython_wrapper=not callable_from_python,
            no_cfunc_wrapper=True,
            forceinline=not callable_from_python,
        )(kernel)
    finally:
        _settings.CACHE_DIR = base
    kept: _Kernel = made
    return kept
