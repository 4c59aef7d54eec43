"""Tells what a disk says through LMDB, which has no class of errors for most of it."""

from __future__ import annotations

import errno
import os

import lmdb

# A disk that fills up within one write of LMDB's makes that write short, which LMDB reports as EIO.
_REFUSALS = tuple(map(os.strerror, (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))


def disk_refuses(error: lmdb.Error) -> bool:
    """Whether ``error`` says that the disk is full, over quota or broken, and not that LMDB was misused."""
    return any(refusal in str(error) for refusal in _REFUSALS)
