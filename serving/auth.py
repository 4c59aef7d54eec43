"""API keys and their scopes. A key is made at the first start into a file that only its owner can read.

Keys are kept in memory as SHA-256 digests and looked up by digest, so the time of a look-up says nothing about how
much of a guess was right, and no key can reach a log. (A fast hash is enough: keys are long and drawn, not chosen.)
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from cluster.settings import Settings
from serving.limits import Limit
from serving.problems import Problem

_LOOK_S = 1.0


class Scope(StrEnum):
    """What a key may do."""

    PREDICT = "predict"
    INGEST = "ingest"
    FEEDBACK = "feedback"
    READ = "read"
    RELEASE = "release"


class ConfiguredKey(BaseModel):
    """One key: itself, or its SHA-256 in hexadecimal digits, so that no key lies anywhere but with who uses it.

    Keys may share a ``name``: a new one works beside the old one until everybody has it. ``requests_per_s`` is what a
    gateway takes of the key, as many at once as in a second; None for no limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    key: str | None = Field(default=None, min_length=16)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    scopes: frozenset[Scope]
    expires: AwareDatetime | None = None
    requests_per_s: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("give either key or sha256")
        return self

    @property
    def digest(self) -> bytes:
        """What the key is known by."""
        return _digest(self.key.encode()) if self.key is not None else bytes.fromhex(self.sha256 or "")


@dataclass(frozen=True)
class Principal:
    """Who asks: the name of the key, never the key."""

    name: str
    scopes: frozenset[Scope]
    expires: datetime | None
    limit: Limit | None = None


class KeyRing:
    """The keys that are in force. Threads may share it."""

    def __init__(
        self, keys: list[ConfiguredKey], *, file: KeyFile | None = None, real: Callable[[], float] = time.monotonic
    ) -> None:
        """``file`` is where they came from: once a second it is looked at, and read again when it has changed."""
        self.failure: str | None = None
        self._real, self._file = real, file
        self._looked = real()
        self._by_digest: dict[bytes, Principal] = {}
        self._take_over(keys)

    @classmethod
    def open(cls, settings: Settings, *, real: Callable[[], float] = time.monotonic) -> KeyRing:
        """The keys of TIDEGATE_KEYS_FILE or TIDEGATE_API_KEYS, or else the generated one with every scope.

        Raises ``ValueError`` when they are malformed, without showing a key.
        """
        if settings.keys_file is not None and settings.api_keys is not None:
            raise ValueError("set TIDEGATE_KEYS_FILE or TIDEGATE_API_KEYS, not both")
        if settings.api_keys is not None:
            return cls(_parse("TIDEGATE_API_KEYS", settings.api_keys.encode()), real=real)
        if settings.keys_file is not None:
            file = KeyFile(settings.keys_file, _parse_file)
        else:
            owner_key(settings)
            file = KeyFile(settings.api_key_file, _parse_owner)
        return cls(file.read(), file=file, real=real)

    def require(self, authorization: bytes | None, scope: Scope, *, now: datetime | None = None) -> Principal:
        """The principal of an ``Authorization: Bearer`` header; raises ``Problem`` 401, 403, 429 beyond its limit."""
        self._look()
        kind, _, key = (authorization or b"").partition(b" ")
        principal = self._by_digest.get(_digest(key.strip())) if kind.lower() == b"bearer" else None
        if principal is None:
            raise Problem(401, "No valid API key", "Send the header `Authorization: Bearer <key>` with a known key.")
        if principal.expires is not None and (now or datetime.now(UTC)) >= principal.expires:
            raise Problem(401, "The API key has expired", f"The key {principal.name!r} expired; ask for a new one.")
        if scope not in principal.scopes:
            raise Problem(
                403, "The API key lacks a scope", f"The key {principal.name!r} lacks the scope {str(scope)!r}."
            )
        if principal.limit is not None and (wait_s := principal.limit.take(self._real())) > 0:
            said = f"The key {principal.name!r} may send {principal.limit.per_s:g} a second to a gateway."
            raise Problem(429, "Too many requests", said, retry_after_s=math.ceil(wait_s))
        return principal

    def _look(self) -> None:
        """Takes over a file that has changed; while it cannot be read, the keys of before stay in force."""
        now = self._real()
        if self._file is None or now - self._looked < _LOOK_S:
            return
        self._looked = now
        try:
            if self.failure is not None or self._file.changed():
                self._take_over(self._file.read())
                self.failure = None
        except (OSError, ValueError) as error:
            self.failure = f"API keys are not read again: {error}"

    def _take_over(self, keys: list[ConfiguredKey]) -> None:
        before = self._by_digest
        found: dict[bytes, Principal] = {}
        for key in keys:
            had = before.get(key.digest)
            limit = None if key.requests_per_s is None else Limit(key.requests_per_s, self._real())
            if had is not None and had.limit is not None and had.limit.per_s == key.requests_per_s:
                limit = had.limit  # whoever has used it up does not get it anew
            if key.digest in found:
                raise ValueError(f"one key is listed twice, under {found[key.digest].name!r} and {key.name!r}")
            found[key.digest] = Principal(key.name, key.scopes, key.expires, limit)
        self._by_digest = found


class KeyFile:
    """A file with keys, and how it looked when it was last read."""

    def __init__(self, path: Path, parse: Callable[[Path, bytes], list[ConfiguredKey]]) -> None:
        self._path, self._parse = path, parse
        self._seen: tuple[int, ...] = ()

    def read(self) -> list[ConfiguredKey]:
        """The keys; raises ``OSError`` or ``ValueError``, without showing one."""
        self._seen = self._look()
        return self._parse(self._path, self._path.read_bytes())

    def changed(self) -> bool:
        """Whether it looks otherwise than when it was last read; raises ``OSError`` when it is gone."""
        return self._look() != self._seen

    def _look(self) -> tuple[int, ...]:
        found = self._path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns


def _parse(where: str, text: bytes) -> list[ConfiguredKey]:
    try:
        return TypeAdapter(list[ConfiguredKey]).validate_json(text)
    except ValidationError as error:
        places = ", ".join(".".join(map(str, e["loc"])) + ": " + e["msg"] for e in error.errors())
        raise ValueError(  # the value itself would put keys into a log
            f"{where} must be a JSON list of {{name, key or sha256, scopes, expires, requests_per_s}}; wrong: {places}"
        ) from None


def _parse_file(path: Path, text: bytes) -> list[ConfiguredKey]:
    keys = _parse(f"TIDEGATE_KEYS_FILE {path}", text)
    if path.stat().st_mode & 0o077 and any(key.key is not None for key in keys):
        raise ValueError(f"{path} holds keys and others may read it: `chmod 600` it, or list each key by its sha256")
    return keys


def _parse_owner(path: Path, text: bytes) -> list[ConfiguredKey]:
    key = text.decode(errors="replace").strip()
    if len(key) < 16:
        raise ValueError(f"{path} must hold a key of at least 16 characters")
    return [ConfiguredKey(name="owner", key=key, scopes=frozenset(Scope))]


def owner_key(settings: Settings) -> str:
    """The generated key; made on first use, 256 bits, readable by the owner alone."""
    path = Path(settings.api_key_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written whole under another name first: a reader never sees half a key, and the first writer wins.
    fresh = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    if not path.exists():
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32))
        try:
            os.link(fresh, path)
        except FileExistsError:
            pass  # another process made the key first; its key counts
        finally:
            fresh.unlink()
    return path.read_text().strip()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
