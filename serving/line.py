"""A gateway's line to a challenger: one connection that both keep, on which requests follow each other without waiting.

A call through Serve's handle takes milliseconds of the gateway's own time, which every caller would pay for; a frame
takes tens of microseconds. Serve still starts, watches and replaces the challenger, and says where it is.

A frame is its length, the number of the request and its kind, and then the message. The first bytes of a connection
are the secret of the one who listens, so that nobody asks who was not told by Serve.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import secrets
import selectors
import socket
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

logger = logging.getLogger(__name__)

_FRAME = struct.Struct("<QII")
_ASK, _CANCEL, _ANSWER, _FAILURE = range(4)
_SECRET_BYTES = 32
_MOST_BYTES = 64 * 2**20
_READ_BYTES = 256 * 2**10
_SEND_S = 5.0
_MOST_WAITING = 96
_MOST_UNSENT_BYTES = 8 * 2**20  # to one that does not read


class Lost(ConnectionError):
    """The connection ended before the answer came."""


class Failed(RuntimeError):
    """What the other side said of its failure."""


@dataclass(frozen=True)
class Place:
    """Where one listens, and the secret that it wants to hear first."""

    host: str
    port: int
    secret: bytes


class Line(asyncio.Protocol):
    """The asking end, of one event loop; see ``connect``."""

    def __init__(self) -> None:
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._numbers = itertools.count()
        self._got = bytearray()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def connect(cls, place: Place) -> Line:
        """A line to whoever listens there; raises ``OSError``."""
        transport, line = await asyncio.get_running_loop().create_connection(cls, place.host, place.port)
        transport.write(place.secret)
        return line

    @property
    def lost(self) -> bool:
        """Whether nothing more can be asked."""
        return self._transport is None

    async def ask(self, message: bytes) -> bytes:
        """The answer to a message; raises ``Failed`` with what the other side says, ``Lost`` when it is gone.

        Who is no longer waited for is not answered, if that is still to be done.
        """
        if self._transport is None:
            raise Lost("the line is lost")
        if len(self._waiting) >= _MOST_WAITING:
            raise Failed(f"{_MOST_WAITING} requests wait already")
        if self._transport.get_write_buffer_size() > _MOST_UNSENT_BYTES:
            raise Failed("it does not read what it is asked")
        number = next(self._numbers) & 0xFFFFFFFF
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._transport.write(_FRAME.pack(len(message), number, _ASK) + message)
        try:
            answer: bytes = await future
        except asyncio.CancelledError:
            if self._waiting.pop(number, None) is not None:
                self._transport.write(_FRAME.pack(0, number, _CANCEL))
            raise
        return answer

    def close(self) -> None:
        """Ends the line; who still waits gets ``Lost``."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See ``asyncio.Protocol``."""
        self._transport = cast("asyncio.Transport", transport)  # that of uvloop, under Serve, is none by its class

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        self._got += data
        while (frame := _taken(self._got)) is not None:
            number, kind, message = frame
            future = self._waiting.pop(number, None)
            if future is None or future.done():
                continue
            if kind == _ANSWER:
                future.set_result(message)
            else:
                future.set_exception(Failed(message.decode(errors="replace")))

    def connection_lost(self, exc: Exception | None) -> None:
        """See ``asyncio.Protocol``."""
        self._transport = None
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(Lost(f"the line was lost: {exc or 'the other side is gone'}"))


@dataclass(eq=False)
class _Caller:
    """A connection: whether it has said the secret, and what of its next frame is there."""

    connection: socket.socket
    known: bool = False
    got: bytearray = field(default_factory=bytearray)


class Listener:
    """The answering end: a thread that answers one request after the other, of all lines, in the order they came."""

    def __init__(self, host: str, answer: Callable[[bytes], bytes]) -> None:
        """What ``answer`` raises goes to who asked."""
        self._answer = answer
        self._listening = socket.create_server((host, 0), backlog=64)
        self.place = Place(host, self._listening.getsockname()[1], secrets.token_bytes(_SECRET_BYTES))
        self._waiting: OrderedDict[tuple[_Caller, int], bytes] = OrderedDict()
        self._stop = threading.Event()
        self._began: float | None = None
        self._thread = threading.Thread(target=self._listen, name="line", daemon=True)
        self._thread.start()

    def alive(self) -> bool:
        """Whether somebody is still there to answer."""
        return self._thread.is_alive()

    def busy_s(self) -> float:
        """For how long the request has been under way that is being answered; 0 when none is."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def close(self) -> None:
        """Stops listening, and ends all lines once the request under way is answered."""
        self._stop.set()
        self._thread.join(_SEND_S)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector, self._listening:
            selector.register(self._listening, selectors.EVENT_READ)
            while not self._stop.is_set():
                # What there is to hear is heard first: it may say that a request is no longer waited for.
                for key, _ in selector.select(0 if self._waiting else 0.2):
                    if key.data is None:
                        connection, _ = self._listening.accept()
                        connection.settimeout(_SEND_S)
                        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        selector.register(connection, selectors.EVENT_READ, _Caller(connection))
                    elif not self._hear(key.data):
                        self._leave(selector, key.data)
                if self._waiting:
                    (caller, number), message = self._waiting.popitem(last=False)
                    self._began = time.monotonic()
                    if not self._say(caller, number, message):
                        self._leave(selector, caller)
                    self._began = None
            for caller in [key.data for key in selector.get_map().values() if key.data is not None]:
                self._leave(selector, caller)

    def _leave(self, selector: selectors.BaseSelector, caller: _Caller) -> None:
        selector.unregister(caller.connection)
        caller.connection.close()
        for waiting in [key for key in self._waiting if key[0] is caller]:
            del self._waiting[waiting]

    def _hear(self, caller: _Caller) -> bool:
        """Takes what came of a line; False when it is to end."""
        try:
            data = caller.connection.recv(_READ_BYTES)
            caller.got += data
            if not caller.known and len(caller.got) >= _SECRET_BYTES:
                said = bytes(caller.got[:_SECRET_BYTES])
                del caller.got[:_SECRET_BYTES]
                caller.known = hmac.compare_digest(said, self.place.secret)
                if not caller.known:
                    logger.warning("somebody who does not know the secret of this line was not listened to")
                    return False
            while caller.known and (frame := _taken(caller.got)) is not None:
                number, kind, message = frame
                if kind == _ASK:
                    self._waiting[caller, number] = message
                else:
                    self._waiting.pop((caller, number), None)
        except (OSError, ValueError, MemoryError) as error:
            logger.warning("a line ended: %s", error)
            return False
        return bool(data)

    def _say(self, caller: _Caller, number: int, message: bytes) -> bool:
        """Answers one request; False when its line is to end."""
        try:
            try:
                kind, said = _ANSWER, self._answer(message)
            except Exception as error:  # noqa: BLE001 — whatever goes wrong is told to who asked
                kind, said = _FAILURE, f"{type(error).__name__}: {error}".encode()
            caller.connection.sendall(_FRAME.pack(len(said), number, kind) + said)
        except (OSError, MemoryError) as error:
            logger.warning("a line ended before its answer was given: %s", error)
            return False
        return True


def _taken(got: bytearray) -> tuple[int, int, bytes] | None:
    """The number, kind and message of the first frame, which is taken away; None as long as it is not whole.

    Raises ``ValueError`` for one that is too long to be one.
    """
    if len(got) < _FRAME.size:
        return None
    length, number, kind = _FRAME.unpack_from(got)
    if length > _MOST_BYTES:
        raise ValueError(f"a frame of {length} bytes")
    ends = _FRAME.size + length
    if len(got) < ends:
        return None
    message = bytes(memoryview(got)[_FRAME.size : ends])
    del got[:ends]
    return number, kind, message
