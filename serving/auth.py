"""API keys and their scopes. A key is made at the first start into a file that only its owner can read.

Keys are kept in memory as SHA-256 digests and looked up by digest, so the time of a look-up says nothing about how
much of a guess was right, and no key can reach a log.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cluster.settings import Settings
from serving.problems import Problem


class Scope(StrEnum):
    """What a key may do."""

    PREDICT = "predict"
    INGEST = "ingest"
    FEEDBACK = "feedback"
    READ = "read"
    RELEASE = "release"


class ConfiguredKey(BaseModel):
    """One entry of TIDEGATE_API_KEYS, a JSON list of these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    key: str = Field(min_length=16)
    scopes: frozenset[Scope]
    expires: AwareDatetime | None = None


@dataclass(frozen=True)
class Principal:
    """Who asks: the name of the key, never the key."""

    name: str
    scopes: frozenset[Scope]
    expires: datetime | None


class KeyRing:
    """The keys that are in force."""

    def __init__(self, keys: list[ConfiguredKey]) -> None:
        self._by_digest = {_digest(k.key.encode()): Principal(k.name, k.scopes, k.expires) for k in keys}

    @classmethod
    def open(cls, settings: Settings) -> KeyRing:
        """The keys of TIDEGATE_API_KEYS, or else the generated one with every scope."""
        if settings.api_keys is None:
            return cls([ConfiguredKey(name="owner", key=owner_key(settings), scopes=frozenset(Scope))])
        try:
            return cls(TypeAdapter(list[ConfiguredKey]).validate_json(settings.api_keys))
        except ValidationError as error:
            places = ", ".join(".".join(map(str, e["loc"])) + ": " + e["msg"] for e in error.errors())
            raise ValueError(  # the value itself would put keys into a log
                f"TIDEGATE_API_KEYS must be a JSON list of {{name, key, scopes, expires}}; wrong: {places}"
            ) from None

    def require(self, authorization: bytes | None, scope: Scope, *, now: datetime | None = None) -> Principal:
        """The principal of an ``Authorization: Bearer`` header; raises ``Problem`` 401 or 403."""
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
        return principal


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
