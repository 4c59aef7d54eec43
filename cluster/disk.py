"""Tells what a disk says through libraries that have no class of errors for it."""

from __future__ import annotations

import errno
import os

import lmdb
from sqlalchemy.exc import DBAPIError

_FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))
# A disk that fills up within one write of LMDB's makes that write short, which LMDB reports as EIO.
_REFUSALS = (os.strerror(errno.EIO), *_FULL)
_SQLITE_REFUSALS = ("disk I/O error", "database or disk is full")


def disk_refuses(error: lmdb.Error) -> bool:
    """Whether ``error`` says that the disk is full, over quota or broken, and not that LMDB was misused."""
    return any(refusal in str(error) for refusal in _REFUSALS)


def disk_takes_no_more(error: OSError | DBAPIError) -> str | None:
    """In which words ``error``, of a file, a table or the database, says that the disk takes no more; None if it does
    not.
    """
    words = _SQLITE_REFUSALS if isinstance(error, DBAPIError) else _FULL
    return next((refusal for refusal in words if refusal in str(error)), None)
