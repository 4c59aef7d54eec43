"""The body of a request: read up to a limit, parsed, and refused in the same words on every route."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from serving.problems import Problem

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


async def read_body(receive: Receive, limit: int) -> bytes:
    """The whole body; raises ``Problem`` 413 as soon as it exceeds ``limit`` bytes."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Problem(400, "The body ended early", "The connection closed before the whole body came.")
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise Problem(413, "The body is too large", f"At most {limit} bytes are taken: send several requests.")
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


def parse(body: bytes) -> Any:
    """What the JSON says; raises ``Problem`` 400."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Problem(400, "The body is not JSON", str(error)) from error


def entries(document: Any, name: str, most: int) -> list[Any]:
    """The list that is in ``document`` under ``name``, beside nothing else; raises ``Problem`` 400, 413 or 422."""
    found = document.get(name) if isinstance(document, dict) else None
    if not isinstance(found, list) or not found:
        raise Problem(400, f"No {name}", f'Send {{"{name}": [{{…}}, …]}} with at least one in the list.')
    if len(found) > most:
        raise Problem(413, f"Too many {name}", f"{len(found)} exceed {most} a request: send several requests.")
    if len(document) > 1:
        said = f"The body has {name} and nothing else."
        odd = [{"pointer": f"/{key}", "rule": "extra_forbidden", "detail": said} for key in document if key != name]
        raise invalid(odd)
    return found


def invalid(errors: list[dict[str, Any]]) -> Problem:
    """The refusal of a request that is not as the API describes it."""
    return Problem(422, "The request is not valid", "Mend the fields listed under errors.", errors)
