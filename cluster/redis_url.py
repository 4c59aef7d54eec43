"""Redis URLs: which ones are taken, and how one is shown without its credentials."""

from __future__ import annotations

import ipaddress
from urllib.parse import SplitResult, parse_qsl, urlsplit

_TLS = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"})
_OPTIONS: dict[str, frozenset[str]] = {"redis": frozenset(), "rediss": _TLS, "unix": frozenset({"db"})}
_FORMS = "redis://host:port/db, rediss://host:port/db or unix:///path/of/socket?db=0"


def check_url(url: str) -> None:
    """Raises ``ValueError``, which never shows the URL's credentials, for anything but the three forms."""
    parts, port = _split(url)
    if parts.scheme not in _OPTIONS:
        raise ValueError(f"a state URL is {_FORMS}, not {parts.scheme or 'no scheme'!r}: without one, state is in LMDB")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := sorted(options.keys() - _OPTIONS[parts.scheme]):
        known = ", ".join(sorted(_OPTIONS[parts.scheme])) or "none"
        raise ValueError(f"a {parts.scheme}:// URL does not take {', '.join(unknown)}; it takes {known}")
    if parts.scheme == "unix":
        if parts.hostname or len(parts.path) < 2:
            raise ValueError("a unix:// URL names an absolute path, with three slashes: unix:///run/redis.sock?db=0")
        database = options.get("db", "0")
    else:
        if not parts.hostname or port == 0:
            raise ValueError(f"a {parts.scheme}:// URL names a host and, unless it is 6379, a port: {_FORMS}")
        database = parts.path.removeprefix("/") or "0"
    if not (database.isascii() and database.isdigit()) or parts.fragment:
        raise ValueError(f"a state URL ends with the number of a database: {_FORMS}")


def address(url: str) -> str:
    """The URL without credentials and options, for messages."""
    parts, port = _split(url)
    if parts.scheme == "unix":
        return f"unix://{parts.path}"
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}:{port or 6379}{parts.path}"


def is_node_local(url: str) -> bool:
    """Whether every node that uses the URL would reach a server of its own."""
    parts, _ = _split(url)
    if parts.scheme == "unix" or parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False  # a name


def _split(url: str) -> tuple[SplitResult, int | None]:
    try:
        parts = urlsplit(url)
        return parts, parts.port
    except ValueError:
        raise ValueError(f"a state URL is {_FORMS}: its host or port cannot be read") from None
