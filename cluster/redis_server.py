"""Connections to one Redis server, and the proof that it keeps what it acknowledges.

Errors of the server never show its credentials: a server is named by ``where``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError
from redis.retry import Retry

from cluster.redis_url import address, check_url

T = TypeVar("T")

_CONNECT_S, _PAUSE_S = 2.0, 0.05
# What must hold of a server that never loses what it acknowledged.
_DURABLE = {"appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "no"}

Durability: TypeAlias = Literal["checked", "guaranteed"]


class NotDurable(redis.RedisError):
    """The server may lose what it acknowledges, or does not show that it keeps it; the message says what to set."""


class RedisServer:
    """A server by URL; threads share the object, each using a connection of its own.

    An answer may take ``answer_s`` seconds and a connection no more than that, at most two; both are tried twice. With
    ``durability`` every connection, so also the first after a restart of the server, begins by asking the server
    whether it keeps what it acknowledges, and raises ``NotDurable`` unless it does. ``guaranteed`` believes a server
    that does not show its configuration.
    """

    def __init__(self, url: str, *, answer_s: float = 10.0, durability: Durability | None = None) -> None:
        """Raises ``ValueError`` for a URL that is not taken; nothing is connected yet."""
        check_url(url)
        self.where = address(url)
        self._durability = durability
        # A second try at once: after a restart of the server a pooled connection is dead once.
        self.client: Any = redis.Redis.from_url(
            url,
            protocol=2,
            socket_connect_timeout=min(_CONNECT_S, answer_s),
            socket_timeout=answer_s,
            retry=Retry(NoBackoff(), 1),
            redis_connect_func=self._begin,
        )

    def script(self, text: str) -> Callable[[list[bytes], list[Any]], Any]:
        """A Lua script as a function of its keys and arguments; all keys must lie in one hash slot."""
        registered = self.client.register_script(text)
        return lambda keys, arguments: registered(keys, arguments)

    def patiently(self, ask: Callable[[], T], patience_s: float) -> T:
        """``ask()``, again and again while the server does not answer; the last error after ``patience_s``."""
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return ask()
            except (AuthenticationError, AuthorizationError):
                raise  # trying again changes nothing
            except (redis.ConnectionError, redis.TimeoutError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(_PAUSE_S)

    def close(self) -> None:
        """Closes the connections; the object is of no use afterwards."""
        self.client.close()

    def _begin(self, connection: Any) -> None:
        connection.on_connect()
        if self._durability is None:
            return

        def configured(name: str) -> str:
            connection.send_command("CONFIG", "GET", name)
            found: list[bytes] = connection.read_response()
            return found[1].decode() if found else "unknown"

        try:
            found = {name: configured(name) for name in _DURABLE}
            evicts = configured("maxmemory") != "0" and configured("maxmemory-policy").startswith("allkeys")
        except redis.ResponseError as error:
            if self._durability == "guaranteed":
                return
            raise NotDurable(
                f"Redis at {self.where} does not show whether it keeps what it acknowledges ({error}): allow CONFIG "
                "GET, or, if its operator guarantees that an acknowledged write survives a crash, set "
                "TIDEGATE_STATE_DURABILITY=guaranteed"
            ) from None
        wrong = [f"{name} {found[name]} (must be {must})" for name, must in _DURABLE.items() if found[name] != must]
        if evicts:
            wrong.append("maxmemory-policy allkeys-… (must be noeviction)")
        if wrong:
            raise NotDurable(
                f"Redis at {self.where} may lose what it acknowledges: {', '.join(wrong)}; use CONFIG SET and the "
                "server's configuration file"
            )
