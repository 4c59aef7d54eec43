"""How a kernel is compiled: once for every version of this package, and never with ``fastmath``."""

from __future__ import annotations

import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from numba import config, njit

_PACKAGE = Path(__file__).parent
_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])


def _directory() -> str:
    """Where compiled kernels are kept: a directory per content of this package.

    numba's cache watches only the file of the function that it compiled, so a kernel that calls one of another file
    would go on with the old callee.
    """
    digest = blake2b(digest_size=8)
    for path in sorted(_PACKAGE.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return os.path.join(config.CACHE_DIR or _PACKAGE / "__pycache__", digest.hexdigest())


_DIRECTORY = _directory()


def compiled(kernel: _Kernel) -> _Kernel:
    """Compiles ``kernel`` at its first call, or loads what an earlier process compiled.

    ``fastmath`` is off, because it would let the compiler reassociate; the interpreter's lock is released.
    """
    base, config.CACHE_DIR = config.CACHE_DIR, _DIRECTORY
    try:
        made: Any = njit(cache=True, fastmath=False, error_model="numpy", nogil=True)(kernel)
    finally:
        config.CACHE_DIR = base
    kept: _Kernel = made
    return kept
