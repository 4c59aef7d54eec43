"""One frozen Settings object: the only place where Tidegate reads its environment.

It promises that ``environment()`` gives another process exactly the same settings, and that a misspelt
variable is an error, never a silent default.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, HttpUrl, TypeAdapter, ValidationError, field_validator

from cluster.redis_url import check_url

PREFIX = "TIDEGATE_"
# Variables of that prefix that other parts read for themselves.
_ALLOWED = frozenset({"TIDEGATE_SESSION", "TIDEGATE_URL", "TIDEGATE_API_KEY"})
# Characters that mean something else in a database URL or a file URI.
_UNSAFE = frozenset("?#%")
_HTTP_URL = TypeAdapter(HttpUrl)


def _below(*parts: str) -> Any:
    def path(data: dict[str, Any]) -> Path:
        return Path(data["home"], *parts)

    return path


def _file_uri(name: str) -> Any:
    return lambda data: Path(data["home"], name).as_uri()


def _sqlite_url(name: str) -> Any:
    return lambda data: f"sqlite:///{Path(data['home'], name)}"


class Settings(BaseModel):
    """Where Tidegate keeps things and how it runs. Fields not given follow from ``home``.

    ``buckets`` is the number of partitions an events table is made with. Above ``ray_rows`` rows Ray
    carries a job, below it plain Arrow does; one task of a backfill or a join takes about ``task_rows``.
    Event ids are remembered for ``remember_seconds``.
    The ingest log is drained to its table every ``drain_seconds``, at most ``drain_rows`` rows at once;
    a stream of it that holds ``log_rows`` is refused more until it is drained.
    ``body_limit`` is the largest request body in bytes; a prediction is refused when it takes longer than
    ``deadline_seconds`` from its first byte on. ``num_cpus`` None lets Ray count.
    A challenger's process may take ``challenger_memory_mb`` MiB to load its version and to answer. ``drills`` is a file
    of faults for challengers (``serving.drills``). Fields that may hold secrets are left out of ``repr``.

    Ingest log and entity state live in LMDB below ``state_dir``, for one node, or, when ``state_url`` is given, in the
    Redis server of that URL, for several. The server must show by CONFIG GET that it fsyncs before it acknowledges;
    where it may not, ``state_durability`` ``guaranteed`` says that its operator answers for that.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)

    home: Path = Path("var/tidegate")
    tables_url: str = Field(default_factory=_file_uri("tables"))
    storage_options: dict[str, str] = Field(default_factory=dict, repr=False)
    database_url: str = Field(default_factory=_sqlite_url("control.db"), repr=False)
    mlflow_url: str = Field(default_factory=_sqlite_url("mlflow.db"), repr=False)
    mlflow_artifacts: str = Field(default_factory=_file_uri("mlflow-artifacts"))
    state_dir: Path = Field(default_factory=_below("state"))
    state_url: str | None = Field(default=None, repr=False)
    state_durability: Literal["checked", "guaranteed"] = "checked"
    clock: Literal["system", "replay"] = "system"
    http_host: str = "127.0.0.1"
    http_port: int = Field(default=8000, ge=0, le=65535)
    gateway_replicas: int = Field(default=1, ge=1)
    buckets: int = Field(default=8, ge=1)
    ray_rows: int = Field(default=100_000, ge=0)
    task_rows: int = Field(default=2_000_000, ge=1)
    remember_seconds: int = Field(default=7 * 86_400, gt=0)
    drain_seconds: float = Field(default=2.0, gt=0)
    drain_rows: int = Field(default=50_000, ge=1)
    log_rows: int = Field(default=5_000_000, ge=1)
    body_limit: int = Field(default=4 * 1024 * 1024, ge=1)
    deadline_seconds: float = Field(default=10.0, gt=0)
    num_cpus: int | None = Field(default=None, ge=1)
    api_keys: str | None = Field(default=None, repr=False)
    keys_file: Path | None = None
    webhook_url: str | None = Field(default=None, repr=False)
    challenger_memory_mb: int = Field(default=1024, ge=64)
    drills: Path | None = None

    @field_validator("home", "state_dir")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        if bad := sorted(_UNSAFE & set(str(path))):
            raise ValueError(f"path {str(path)!r} must not contain {' '.join(bad)}: choose another directory")
        return path.expanduser().absolute()

    @field_validator("state_url")
    @classmethod
    def _redis_if_any(cls, url: str | None) -> str | None:
        if url is not None:
            check_url(url)
        return url

    @field_validator("webhook_url")
    @classmethod
    def _http_if_any(cls, url: str | None) -> str | None:
        if url is not None:
            try:
                _HTTP_URL.validate_python(url)
            except ValidationError:  # whose text holds the URL, which may be a secret
                raise ValueError("a webhook is an http:// or https:// URL") from None
        return url

    @field_validator("drills", "keys_file")
    @classmethod
    def _absolute_if_any(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser().absolute()

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Settings from ``TIDEGATE_<FIELD>`` variables; an empty variable counts as not set.

        Raises ``ValueError`` naming the variable when one is unknown or its value does not fit.
        """
        environ = os.environ if environ is None else environ
        known = {PREFIX + name.upper(): name for name in cls.model_fields}
        values: dict[str, Any] = {}
        for variable, text in environ.items():
            if not variable.startswith(PREFIX) or variable in _ALLOWED:
                continue
            if variable not in known:
                near = difflib.get_close_matches(variable, known, n=1, cutoff=0)[0]
                raise ValueError(f"unknown environment variable {variable}: did you mean {near}?")
            if text:
                values[known[variable]] = _parse(variable, known[variable], text)
        try:
            return cls(**values)
        except ValidationError as error:
            faults = "; ".join(
                f"{PREFIX}{str(fault['loc'][0]).upper()}: {fault['msg']}"
                for fault in error.errors(include_input=False, include_url=False)
                if fault["type"] != "default_factory_not_called"
            )
            raise ValueError(f"bad environment: {faults}") from None

    def environment(self) -> dict[str, str]:
        """The variables from which ``from_environment`` makes these same settings, in any directory."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {PREFIX + name.upper(): "" if value is None else _text(value) for name, value in values.items()}

    @property
    def clock_file(self) -> Path:
        """The file that the processes of a node share as their replay clock."""
        return self.home / "clock"

    @property
    def api_key_file(self) -> Path:
        """Where the generated API key is kept."""
        return self.home / "api-key"

    @property
    def cache_dir(self) -> Path:
        """Compiled code and downloads; may be deleted at any time."""
        return self.home / "cache"


def _parse(variable: str, name: str, text: str) -> Any:
    if name != "storage_options":
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{variable} must be a JSON object of strings: {error.msg} at {error.pos}") from None


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)
