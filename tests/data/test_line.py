"""A gateway's line to a challenger: what arrives, in which order, and what becomes of those who wait when it breaks."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import orjson
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipelines.training.artifact import Prediction
from serving import line as lines
from serving.frames import Malformed, pack_reply, pack_rows, unpack_reply, unpack_rows
from serving.line import Busy, Failed, Line, Listener, Lost, Place
from serving.runner import Rows

FLOATS = st.floats(width=64)
HOST = "127.0.0.1"


@contextmanager
def listening(answer: Callable[[bytes], bytes]) -> Iterator[Listener]:
    made = Listener(HOST, answer)
    try:
        yield made
    finally:
        made.close()


class Held:
    """Answers with what it was asked, once it may go on."""

    def __init__(self) -> None:
        self.under_way, self.go_on = threading.Event(), threading.Event()
        self.answered: list[bytes] = []

    def __call__(self, message: bytes) -> bytes:
        self.under_way.set()
        self.go_on.wait(5)
        self.answered.append(message)
        return message


def asking(place: Place, act: Callable[[Line], Any]) -> Any:
    async def run() -> Any:
        line = await Line.connect(place)
        try:
            return await act(line)
        finally:
            line.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as under Serve
        return runner.run(run())


@given(
    st.integers(0, 5).flatmap(
        lambda n: st.tuples(
            st.dictionaries(
                st.text(max_size=4),
                arrays.arrays(np.float64, n, elements=FLOATS) | arrays.arrays(st.sampled_from(["?", "u1", "<i8"]), n),
                max_size=4,
            ),
            st.dictionaries(st.text(max_size=4), st.lists(st.none() | st.text(), min_size=n, max_size=n), max_size=3),
            arrays.arrays(np.uint8, n),
        )
    )
)
@settings(max_examples=200, deadline=None)
def test_instances_arrive_as_they_were_to_the_last_bit(made) -> None:
    columns, strings, level = made
    found = unpack_rows(pack_rows(Rows(columns, strings, level, len(level))))
    assert list(found.columns) == list(columns)
    for name, values in columns.items():
        assert found.columns[name].tobytes() == values.tobytes()
        assert found.columns[name].dtype == values.dtype
    assert found.strings == strings
    assert found.level.tolist() == level.tolist()
    assert found.count == len(level)


@given(st.lists(arrays.arrays(np.float64, arrays.array_shapes(min_dims=0, max_dims=2, min_side=0)), min_size=3))
@settings(max_examples=100, deadline=None)
def test_answers_of_any_shape_arrive_as_they_were(made) -> None:
    value, lower, upper = made[:3]
    found = unpack_reply(pack_reply(Prediction(value, lower, upper), 0.25))
    for series, wanted in ((found.value, value), (found.lower, lower), (found.upper, upper)):
        assert series.shape == wanted.shape
        assert series.tobytes() == wanted.tobytes()
    assert found.seconds == 0.25


def test_what_is_no_number_is_no_answer() -> None:
    words = np.array(["ten"], dtype=object)
    with pytest.raises(ValueError, match="could not convert"):
        pack_reply(Prediction(words, words, words), 0.0)
    with pytest.raises(TypeError, match="does not go over a line"):
        pack_rows(Rows({"x": words}, {}, np.zeros(1, np.uint8), 1))


@given(st.binary(max_size=64), st.integers(0, 200))
@settings(max_examples=300, deadline=None)
def test_bytes_that_are_no_message_are_named_as_such(garbage, cut) -> None:
    whole = pack_rows(Rows({"x": np.ones(3)}, {"s": ["a", "b", None]}, np.zeros(3, np.uint8), 3))
    for message in (garbage, whole[: min(cut, len(whole) - 8)]):
        with pytest.raises(Malformed):
            unpack_rows(message)
        with pytest.raises(Malformed):
            unpack_reply(message)


@pytest.mark.parametrize("shape", [[-1], [10**30], [2**62, 2], [1.5], ["a"], [True], 3])
def test_shapes_of_no_sense_are_malformed(shape) -> None:
    header = (
        orjson.dumps({"seconds": 0.0, "arrays": [["<f8", shape]] * 3})
        if shape != [10**30]
        else (b'{"seconds": 0.0, "arrays": [["<f8", [1000000000000000000000000000000]]]}')
    )
    header += b" " * (-len(header) % 8)
    with pytest.raises(Malformed):
        unpack_reply(struct.pack("<Q", len(header)) + header + bytes(64))


def test_requests_follow_each_other_without_waiting_and_each_gets_its_own_answer() -> None:
    order: list[bytes] = []

    def answer(message: bytes) -> bytes:
        order.append(message)
        return message * 2

    messages = [b"%d-" % i * (1 + 3000 * (i % 7)) for i in range(90)]
    with listening(answer) as made:
        found = asking(made.place, lambda line: asyncio.gather(*map(line.ask, messages)))
    assert found == [message * 2 for message in messages]
    assert order == messages


def test_two_lines_do_not_mix_their_requests() -> None:
    with listening(lambda message: message) as made:

        async def both() -> Any:
            one, other = await Line.connect(made.place), await Line.connect(made.place)
            asked = [line.ask(b"%s%d" % (name, i)) for i in range(20) for line, name in ((one, b"a"), (other, b"b"))]
            return await asyncio.gather(*asked)

        assert asyncio.run(both()) == [b"%s%d" % (name, i) for i in range(20) for name in (b"a", b"b")]


def test_what_goes_wrong_there_is_told_here_and_the_next_is_answered() -> None:
    def answer(message: bytes) -> bytes:
        if message == b"bad":
            raise ZeroDivisionError("out of luck")
        return message

    async def act(line: Line) -> Any:
        return await asyncio.gather(line.ask(b"bad"), line.ask(b"good"), return_exceptions=True)

    with listening(answer) as made:
        error, good = asking(made.place, act)
    assert isinstance(error, Failed)
    assert str(error) == "ZeroDivisionError: out of luck"
    assert good == b"good"


def test_who_is_no_longer_waited_for_is_not_answered() -> None:
    held = Held()

    async def act(line: Line) -> Any:
        first = asyncio.ensure_future(line.ask(b"first"))
        await asyncio.to_thread(held.under_way.wait, 5)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(line.ask(b"late"), 0.02)
        last = asyncio.ensure_future(line.ask(b"last"))
        await asyncio.sleep(0.02)
        held.go_on.set()
        return await first, await last

    with listening(held) as made:
        assert asking(made.place, act) == (b"first", b"last")
    assert held.answered == [b"first", b"last"]


def test_no_more_than_so_many_wait_at_once(monkeypatch) -> None:
    monkeypatch.setattr(lines, "_MOST_WAITING", 3)
    go_on = threading.Event()

    async def act(line: Line) -> Any:
        waiting = [asyncio.ensure_future(line.ask(b"x")) for _ in range(3)]
        await asyncio.sleep(0.01)
        with pytest.raises(Busy, match="3 requests wait already"):
            await line.ask(b"one too many")
        go_on.set()
        return await asyncio.gather(*waiting)

    with listening(lambda message: message if go_on.wait(5) else b"") as made:
        assert asking(made.place, act) == [b"x"] * 3


def test_one_that_does_not_read_is_not_written_to_without_end(monkeypatch) -> None:
    monkeypatch.setattr(lines, "_MOST_UNSENT_BYTES", 100_000)
    go_on = threading.Event()

    async def act(line: Line) -> str:
        for _ in range(200):
            try:
                await asyncio.wait_for(line.ask(bytes(100_000)), 0.001)
            except TimeoutError:
                continue
            except Busy as error:
                go_on.set()
                return str(error)
        raise AssertionError("all was taken")

    with listening(lambda message: message if go_on.wait(5) else b"") as made:
        assert "does not read" in asking(made.place, act)


@pytest.mark.parametrize("said", ["no file m\udcff.bin", None])
def test_an_error_that_cannot_be_spelt_or_shown_is_told_all_the_same(said) -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            if said is None:
                raise ZeroDivisionError
            return said

    def answer(message: bytes) -> bytes:
        if message == b"bad":
            raise Odd
        return message

    async def act(line: Line) -> Any:
        return await asyncio.gather(line.ask(b"bad"), line.ask(b"good"), return_exceptions=True)

    with listening(answer) as made:
        error, good = asking(made.place, act)
        assert made.alive()
    assert str(error) == ("Odd" if said is None else "Odd: no file m?.bin")
    assert good == b"good"


def test_one_that_stalls_keeps_nobody_else_waiting_and_is_left_in_the_end(monkeypatch) -> None:
    monkeypatch.setattr(lines, "_SEND_S", 0.5)
    huge = bytes(20_000_000)
    with listening(lambda message: huge if message == b"huge" else message) as made:
        with socket.create_connection((HOST, made.place.port), timeout=5) as stalled:
            stalled.sendall(made.place.secret + lines._FRAME.pack(4, 0, 0) + b"huge")
            time.sleep(0.2)
            assert asking(made.place, lambda line: asyncio.wait_for(line.ask(b"x"), 0.3)) == b"x"
            time.sleep(1.0)
            with suppress(ConnectionResetError):
                while stalled.recv(1_000_000):
                    pass  # it ends before all of it came
        assert asking(made.place, lambda line: line.ask(b"huge")) == huge


def test_who_says_nothing_is_left_and_there_are_never_many_of_them(monkeypatch) -> None:
    monkeypatch.setattr(lines, "_STRANGER_S", 0.3)
    monkeypatch.setattr(lines, "_MOST_STRANGERS", 3)
    with listening(lambda message: message) as made:
        strangers = [socket.create_connection((HOST, made.place.port), timeout=5) for _ in range(5)]
        assert [stranger.recv(1) for stranger in strangers[:2]] == [b"", b""]
        assert len([caller for caller in made._callers if not caller.known]) == 3
        assert [stranger.recv(1) for stranger in strangers[2:]] == [b""] * 3
        for stranger in strangers:
            stranger.close()
        assert asking(made.place, lambda line: line.ask(b"x")) == b"x"


def test_it_goes_on_when_nobody_can_be_let_in_for_a_while(monkeypatch) -> None:
    with listening(lambda message: message) as made:
        real, refused = made._listening, []

        class Full:
            def accept(self) -> Any:
                refused.append(1)
                raise OSError("too many open files")

        made._listening = Full()  # type: ignore[assignment]
        waiting = socket.create_connection((HOST, made.place.port), timeout=5)
        deadline = time.monotonic() + 5
        while not refused:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert made.alive()
        made._listening = real
        assert asking(made.place, lambda line: line.ask(b"x")) == b"x"
        waiting.close()


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_line_that_is_closed_or_makes_no_sense_ends_for_all_who_wait(loop) -> None:
    with socket.create_server((HOST, 0)) as silent:
        place = Place(HOST, silent.getsockname()[1], bytes(32))

        async def act() -> tuple[list[Any], Any]:
            line = await Line.connect(place)
            asked = [asyncio.ensure_future(line.ask(bytes(1_000_000))) for _ in range(5)]
            await asyncio.sleep(0.05)
            line.close()  # with much of it unread
            ended = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 2)
            assert line.lost
            other = await Line.connect(place)
            one = asyncio.ensure_future(other.ask(b"x"))
            await asyncio.sleep(0)
            silent.accept()[0].close()
            connection, _ = silent.accept()
            connection.sendall(lines._FRAME.pack(2**60, 0, 2))
            odd = await asyncio.wait_for(asyncio.gather(one, return_exceptions=True), 2)
            connection.close()
            return ended, odd[0]

        with asyncio.Runner(loop_factory=loop) as runner:
            ended, odd = runner.run(act())
    assert [type(error) for error in ended] == [Lost] * 5
    assert isinstance(odd, Lost)


def test_both_ends_notice_when_the_other_node_is_gone() -> None:
    with listening(lambda message: message) as made:

        async def act(line: Line) -> None:
            await line.ask(b"x")
            assert line._transport is not None
            ours = line._transport.get_extra_info("socket")
            (theirs,) = (caller.connection for caller in made._callers)
            for end in (ours, theirs):
                assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000

        asking(made.place, act)
        assert "secret" not in repr(made.place)


def test_those_who_wait_hear_of_it_when_the_other_side_goes() -> None:
    under_way, go_on = threading.Event(), threading.Event()

    def answer(message: bytes) -> bytes:
        under_way.set()
        go_on.wait(5)
        return message

    made = Listener(HOST, answer)

    async def act(line: Line) -> Any:
        asked = asyncio.gather(line.ask(b"a"), line.ask(b"b"), return_exceptions=True)
        await asyncio.to_thread(under_way.wait, 5)
        made._stop.set()
        go_on.set()
        first, second = await asked
        await asyncio.to_thread(made.close)
        assert line.lost
        with pytest.raises(Lost):
            await line.ask(b"c")
        return first, second

    first, second = asking(made.place, act)
    assert first == b"a"
    assert isinstance(second, Lost)
    assert not made.alive()


@pytest.mark.parametrize("said", [bytes(32), b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"])
def test_who_does_not_know_the_secret_is_not_answered(said) -> None:
    answered = []
    with listening(lambda message: answered.append(message) or b"") as made:
        with socket.create_connection((HOST, made.place.port), timeout=5) as stranger:
            stranger.sendall(said + lines._FRAME.pack(1, 0, 0) + b"x")
            with suppress(ConnectionResetError):  # it was closed with the rest unread
                assert stranger.recv(100) == b""
        assert asking(made.place, lambda line: line.ask(b"y")) == b""
    assert answered == [b"y"]


def test_a_frame_of_no_sense_ends_its_line_and_no_other() -> None:
    with listening(lambda message: message) as made:

        async def act(line: Line) -> Any:
            with socket.create_connection((HOST, made.place.port), timeout=5) as other:
                other.sendall(made.place.secret + lines._FRAME.pack(2**60, 0, 0))
                assert await asyncio.to_thread(other.recv, 100) == b""
            return await line.ask(b"x")

        assert asking(made.place, act) == b"x"


def test_how_long_a_request_has_been_under_way_is_known() -> None:
    go_on = threading.Event()
    with listening(lambda message: message if go_on.wait(5) else b"") as made:
        assert made.busy_s() == 0

        async def act(line: Line) -> Any:
            asked = asyncio.ensure_future(line.ask(b"x"))
            await asyncio.sleep(0.1)
            assert 0.03 < made.busy_s() < 5
            go_on.set()
            return await asked

        assert asking(made.place, act) == b"x"
        deadline = time.monotonic() + 5
        while made.busy_s():
            assert time.monotonic() < deadline


def test_nothing_is_computed_for_a_line_that_is_gone() -> None:
    held = Held()

    async def act(line: Line) -> Any:
        waiting = asyncio.gather(line.ask(b"first"), line.ask(b"second"), return_exceptions=True)
        await asyncio.to_thread(held.under_way.wait, 5)
        line.close()
        gone = await waiting
        held.go_on.set()
        return gone

    with listening(held) as made:
        assert [type(error) for error in asking(made.place, act)] == [Lost, Lost]
        assert asking(made.place, lambda line: line.ask(b"third")) == b"third"
    assert held.answered == [b"first", b"third"]
