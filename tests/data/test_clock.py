"""The clocks: the system's tells the system's time, and a replay clock is one time for all processes."""

from __future__ import annotations

import multiprocessing
import pickle
import time

import pytest

from cluster.clock import ReplayClock, SystemClock, open_clock
from cluster.settings import Settings


def test_the_system_clock_tells_microseconds():
    before = time.time()
    now = SystemClock().now()
    assert isinstance(now, int)
    assert before - 1e-3 <= now / 1e6 <= time.time() + 1e-3


def test_a_replay_clock_never_set_has_no_time(tmp_path):
    with pytest.raises(RuntimeError, match="never been set"):
        ReplayClock(tmp_path / "clock").now()


def test_it_moves_forward_only(tmp_path):
    clock = ReplayClock(tmp_path / "deep" / "clock")
    clock.set(5_000)
    clock.set(5_000)
    assert clock.now() == 5_000
    with pytest.raises(ValueError, match="at 5000 us and cannot go back to 4999"):
        clock.set(4_999)
    assert clock.now() == 5_000


@pytest.mark.parametrize("moment", [0, -1])
def test_it_refuses_times_before_its_epoch(tmp_path, moment):
    with pytest.raises(ValueError, match="after 1970"):
        ReplayClock(tmp_path / "clock").set(moment)


def test_opening_it_again_keeps_its_time(tmp_path):
    ReplayClock(tmp_path / "clock").set(7)
    assert ReplayClock(tmp_path / "clock").now() == 7
    assert pickle.loads(pickle.dumps(ReplayClock(tmp_path / "clock"))).now() == 7  # noqa: S301


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "clock").write_text("tick tock")
    with pytest.raises(ValueError, match="not a replay clock"):
        ReplayClock(tmp_path / "clock")


def _report(path, wanted, answer):
    clock = ReplayClock(path)
    while clock.now() != wanted:
        time.sleep(0.001)
    answer.put(clock.now())


def test_another_process_sees_the_time_move(tmp_path):
    clock = ReplayClock(tmp_path / "clock")
    clock.set(1)
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    child = context.Process(target=_report, args=(tmp_path / "clock", 2**40 + 3, answer))
    child.start()
    clock.set(2**40 + 3)
    assert answer.get(timeout=60) == 2**40 + 3
    child.join()


LAST = 1 << 62 | 1 << 30


def _watch(path, started, answer):
    clock, seen, mixed = ReplayClock(path), 0, []
    started.set()
    while (word := clock.now()) != LAST:
        seen += 1
        if word >> 32 != word & 0xFFFFFFFF:
            mixed.append(word)
    answer.put((seen, mixed))


def test_a_reader_never_sees_half_a_store(tmp_path):
    # The two halves of every stored word but the last are equal, so any mixture of two stores shows.
    clock = ReplayClock(tmp_path / "clock")
    clock.set(1 << 32 | 1)
    context = multiprocessing.get_context("spawn")
    started, answer = context.Event(), context.Queue()
    child = context.Process(target=_watch, args=(clock.path, started, answer))
    child.start()
    assert started.wait(60)
    half, end = 1, time.monotonic() + 0.5
    while time.monotonic() < end:
        half += 1
        clock.set(half << 32 | half)
    clock.set(LAST)
    seen, mixed = answer.get(timeout=60)
    child.join()
    assert seen > 1_000
    assert mixed == []


def test_settings_choose_the_clock(tmp_path):
    assert isinstance(open_clock(Settings(home=tmp_path)), SystemClock)
    replay = open_clock(Settings(home=tmp_path, clock="replay"))
    assert isinstance(replay, ReplayClock)
    assert replay.path == tmp_path / "clock"
