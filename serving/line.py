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
import sys
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
_LOOK_S = 0.2
_MOST_WAITING = 96
_MOST_UNSENT_BYTES = 8 * 2**20  # to one that does not read
_STRANGER_S, _MOST_STRANGERS = 2.0, 64
_GONE_S = 10  # until the other side's node is taken to be gone


class Lost(ConnectionError):
    """The connection ended before the answer came."""


class Failed(RuntimeError):
    """What the other side said of its failure."""


class Busy(RuntimeError):
    """The other side was not asked, because it does not keep up or is not there just now."""


@dataclass(frozen=True)
class Place:
    """Where one listens, and the secret that it wants to hear first."""

    host: str
    port: int
    secret: bytes = field(repr=False)


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
        connection = transport.get_extra_info("socket")
        _keep_alive(connection)
        transport.write(place.secret)
        return line

    @property
    def lost(self) -> bool:
        """Whether nothing more can be asked."""
        return self._transport is None

    async def ask(self, message: bytes) -> bytes:
        """The answer to a message; raises ``Failed`` with what the other side says, ``Lost`` when it is gone, and
        ``Busy`` when too much waits for it already.

        Who is no longer waited for is not answered, if that is still to be done.
        """
        if self._transport is None:
            raise Lost("the line is lost")
        if len(self._waiting) >= _MOST_WAITING:
            raise Busy(f"{_MOST_WAITING} requests wait already")
        if self._transport.get_write_buffer_size() > _MOST_UNSENT_BYTES:
            raise Busy("it does not read what it is asked")
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
        """Ends the line, whether or not all was read; who still waits gets ``Lost``."""
        if self._transport is not None:
            self._transport.abort()

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
    """A connection: since when it is there, whether it has said the secret, what of its next frame has come, and what
    is still to be sent to it, since when.
    """

    connection: socket.socket
    since: float
    known: bool = False
    got: bytearray = field(default_factory=bytearray)
    unsent: bytearray = field(default_factory=bytearray)
    unsent_since: float = 0.0


class Listener:
    """The answering end: a thread that answers one request after the other, of all lines, in the order they came."""

    def __init__(self, host: str, answer: Callable[[bytes], bytes]) -> None:
        """What ``answer`` raises goes to who asked."""
        self._answer = answer
        self._listening = socket.create_server((host, 0), backlog=64)
        self._listening.setblocking(False)
        self.place = Place(host, self._listening.getsockname()[1], secrets.token_bytes(_SECRET_BYTES))
        self._selector = selectors.DefaultSelector()
        self._callers: set[_Caller] = set()
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
        self._selector.register(self._listening, selectors.EVENT_READ)
        try:
            while not self._stop.is_set():
                # What there is to hear is heard first: it may say that a request is no longer waited for.
                for key, events in self._selector.select(0 if self._waiting else _LOOK_S):
                    if key.data is None:
                        self._accept()
                    elif key.data in self._callers:
                        self._attend(key.data, events)
                if self._waiting:
                    (caller, number), message = self._waiting.popitem(last=False)
                    self._began = time.monotonic()
                    said = self._answered(number, message)
                    self._began = None
                    self._say(caller, said)
                self._leave_the_idle()
        finally:  # nobody is to wait for one that no longer listens
            for caller in tuple(self._callers):
                self._leave(caller)
            self._listening.close()
            self._selector.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError as error:  # too many files are open, or it is gone already
            logger.warning("nobody could be let in: %s", error)
            self._stop.wait(_LOOK_S)  # it would be tried again at once
            return
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _keep_alive(connection)
        caller = _Caller(connection, time.monotonic())
        self._callers.add(caller)
        self._selector.register(connection, selectors.EVENT_READ, caller)
        strangers = [one for one in self._callers if not one.known]
        if len(strangers) > _MOST_STRANGERS:
            self._leave(min(strangers, key=lambda one: one.since))

    def _leave_the_idle(self) -> None:
        """Ends the lines of those who do not say the secret, or do not read."""
        now = time.monotonic()
        for caller in tuple(self._callers):
            if not caller.known and now - caller.since > _STRANGER_S:
                self._leave(caller)
            elif caller.unsent and now - caller.unsent_since > _SEND_S:
                logger.warning("a line ended: what it was sent was not read for %g s", _SEND_S)
                self._leave(caller)

    def _leave(self, caller: _Caller) -> None:
        self._callers.discard(caller)
        self._selector.unregister(caller.connection)
        caller.connection.close()
        for waiting in [key for key in self._waiting if key[0] is caller]:
            del self._waiting[waiting]

    def _attend(self, caller: _Caller, events: int) -> None:
        """Takes what came of a line and sends on what it was to be sent."""
        try:
            if events & selectors.EVENT_READ and not self._hear(caller):
                self._leave(caller)
            elif events & selectors.EVENT_WRITE:
                self._send(caller)
        except (OSError, ValueError, MemoryError) as error:
            logger.warning("a line ended: %s", error)
            self._leave(caller)

    def _hear(self, caller: _Caller) -> bool:
        """False when the other side has ended the line, or is not to be listened to."""
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
        return bool(data)

    def _answered(self, number: int, message: bytes) -> bytes:
        """The frame of an answer, or of what went wrong with it."""
        try:
            kind, said = _ANSWER, self._answer(message)
        except Exception as error:  # noqa: BLE001 — whatever goes wrong is told to who asked
            kind, said = _FAILURE, _told(error)
        return _FRAME.pack(len(said), number, kind) + said

    def _say(self, caller: _Caller, said: bytes) -> None:
        try:
            if not caller.unsent:
                caller.unsent_since = time.monotonic()
            caller.unsent += said
            self._send(caller)
        except (OSError, MemoryError) as error:
            logger.warning("a line ended before its answer was given: %s", error)
            self._leave(caller)

    def _send(self, caller: _Caller) -> None:
        """Sends what the other side takes now; the rest waits, and keeps nobody else waiting."""
        try:
            while caller.unsent:
                sent = caller.connection.send(caller.unsent)
                del caller.unsent[:sent]
                caller.unsent_since = time.monotonic()
        except BlockingIOError:
            pass
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if caller.unsent else 0)
        if self._selector.get_key(caller.connection).events != wanted:
            self._selector.modify(caller.connection, wanted, caller)


def _told(error: Exception) -> bytes:
    """What an error says, whatever that is made of."""
    try:
        said = f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 — an error that cannot even be shown
        said = type(error).__name__
    return said.encode(errors="replace")


def _keep_alive(connection: socket.socket) -> None:
    """Has the kernel notice within about ``_GONE_S`` that the other side's node is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _GONE_S // 2)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _GONE_S // 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _GONE_S * 1000)


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
