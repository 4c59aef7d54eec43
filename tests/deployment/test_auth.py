"""Keys: who may do what, when a key ends, and where the generated one lies."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.settings import Settings
from serving.auth import ConfiguredKey, KeyRing, Scope, owner_key
from serving.limits import Limit
from serving.problems import Problem

KEY = "k" * 32


def ring(**options) -> KeyRing:
    return KeyRing([ConfiguredKey(name="app", key=KEY, scopes=frozenset({Scope.PREDICT}), **options)])


@pytest.mark.parametrize("scope", list(Scope))
def test_a_key_may_do_only_what_its_scopes_say(scope):
    authorization = f"Bearer {KEY}".encode()
    if scope is Scope.PREDICT:
        assert ring().require(authorization, scope).name == "app"
    else:
        with pytest.raises(Problem) as refused:
            ring().require(authorization, scope)
        assert refused.value.status == 403
        assert KEY not in refused.value.body().decode()


@pytest.mark.parametrize(
    "authorization", [None, b"", b"Bearer", b"Bearer ", b"Bearer wrong", f"Basic {KEY}".encode(), KEY.encode()]
)
def test_without_a_known_key_the_answer_is_401(authorization):
    with pytest.raises(Problem) as refused:
        ring().require(authorization, Scope.PREDICT)
    assert refused.value.status == 401
    assert (b"www-authenticate", b"Bearer") in refused.value.headers()


def test_an_expired_key_is_refused_from_its_moment_on():
    end = datetime(2026, 1, 1, tzinfo=UTC)
    keys = ring(expires=end)
    authorization = f"Bearer {KEY}".encode()
    assert keys.require(authorization, Scope.PREDICT, now=datetime(2025, 12, 31, tzinfo=UTC))
    with pytest.raises(Problem) as refused:
        keys.require(authorization, Scope.PREDICT, now=end)
    assert refused.value.status == 401


def test_configured_keys_replace_the_generated_one(home):
    keys = json.dumps([{"name": "reader", "key": KEY, "scopes": ["read"]}])
    settings = Settings(home=home, api_keys=keys)
    assert KeyRing.open(settings).require(f"Bearer {KEY}".encode(), Scope.READ).name == "reader"
    assert not settings.api_key_file.exists()


@pytest.mark.parametrize(
    "keys", ["[", "{}", '[{"name":"a","key":"short","scopes":["read"]}]', '[{"name":"a","key":"%s","scopes":["all"]}]']
)
def test_a_malformed_configuration_is_refused_without_showing_a_key(home, keys):
    secret = "s" * 40
    with pytest.raises(ValueError, match="TIDEGATE_API_KEYS") as refused:
        KeyRing.open(Settings(home=home, api_keys=keys.replace("%s", secret)))
    assert secret not in str(refused.value)


class Hand:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def may(keys: KeyRing, key: str, scope: Scope = Scope.READ) -> int:
    """The status of the refusal, or 200."""
    try:
        keys.require(f"Bearer {key}".encode(), scope)
    except Problem as problem:
        return problem.status
    return 200


def listed(*keys: str, **options: object) -> list[dict[str, object]]:
    """Entries that name keys by their digests."""
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    return [{"name": "reader", "sha256": digest, "scopes": ["read"], **options} for digest in digests]


OLD, NEW = "old-key-of-a-reader", "new-key-of-a-reader"


def test_keys_are_changed_in_their_file_while_the_gateway_runs(home):
    file, clock = home / "keys.json", Hand()
    home.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(listed(OLD)))
    keys = KeyRing.open(Settings(home=home, keys_file=file), real=clock)
    assert (may(keys, OLD), may(keys, NEW)) == (200, 401)
    file.write_text(json.dumps(listed(OLD, NEW)))
    assert may(keys, NEW) == 401, "it is looked at once a second"
    clock.time += 1
    assert (may(keys, OLD), may(keys, NEW)) == (200, 200)
    for broken in (lambda: file.write_text("[{"), file.unlink):
        broken()
        clock.time += 1
        assert (may(keys, OLD), may(keys, NEW)) == (200, 200)
        assert keys.failure is not None
        clock.time += 1
        assert may(keys, NEW) == 200
        assert keys.failure is not None, "it is still so"
    file.write_text(json.dumps(listed(NEW)))
    clock.time += 1
    assert (may(keys, OLD), may(keys, NEW), keys.failure) == (401, 200, None)
    aside = file.rename(home / "aside.json")
    clock.time += 1
    assert (may(keys, NEW), keys.failure is None) == (200, False)
    aside.rename(file)
    clock.time += 1
    assert (may(keys, NEW), keys.failure) == (200, None)


def test_the_generated_key_is_changed_in_its_file_too(home):
    clock = Hand()
    keys = KeyRing.open(Settings(home=home), real=clock)
    first = owner_key(Settings(home=home))
    Settings(home=home).api_key_file.write_text(NEW)
    clock.time += 1
    assert (may(keys, first), may(keys, NEW, Scope.RELEASE)) == (401, 200)


def test_keys_that_others_may_read_are_refused_and_digests_are_not(home):
    file = home / "keys.json"
    home.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([{"name": "reader", "key": KEY, "scopes": ["read"]}]))
    file.chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600") as refused:
        KeyRing.open(Settings(home=home, keys_file=file))
    assert KEY not in str(refused.value)
    file.chmod(0o600)
    assert may(KeyRing.open(Settings(home=home, keys_file=file)), KEY) == 200
    file.write_text(json.dumps(listed(KEY)))
    file.chmod(0o644)
    assert may(KeyRing.open(Settings(home=home, keys_file=file)), KEY) == 200


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (listed(KEY, key=KEY), "either key or sha256"),
        ([{"name": "reader", "scopes": ["read"]}], "either key or sha256"),
        (listed(KEY, sha256="ab"), "sha256"),
        (listed(KEY, KEY), "listed twice"),
        (listed(KEY, requests_per_s=0), "requests_per_s"),
    ],
)
def test_entries_that_do_not_fit_are_refused(home, entries, words):
    with pytest.raises(ValueError, match=words):
        KeyRing.open(Settings(home=home, api_keys=json.dumps(entries)))
    with pytest.raises(ValueError, match="not both"):
        KeyRing.open(Settings(home=home, api_keys=json.dumps(entries), keys_file=home / "keys.json"))


def test_a_key_has_its_own_limit_and_is_told_when_to_come_again(home):
    clock = Hand()
    keys = [
        ConfiguredKey(name="busy", key=KEY, scopes=frozenset({Scope.READ}), requests_per_s=2),
        ConfiguredKey(name="other", key=OLD, scopes=frozenset({Scope.READ})),
    ]
    ring = KeyRing(keys, real=clock)
    assert [may(ring, KEY) for _ in range(3)] == [200, 200, 429]
    assert may(ring, KEY, Scope.INGEST) == 403
    assert may(ring, OLD) == 200
    with pytest.raises(Problem) as refused:
        ring.require(f"Bearer {KEY}".encode(), Scope.READ)
    assert (refused.value.retry_after_s, "'busy' may send 2 a second" in refused.value.detail) == (1, True)
    clock.time += 0.5
    assert [may(ring, KEY) for _ in range(2)] == [200, 429]


@given(
    per_s=st.sampled_from([0.1, 0.5, 1.0, 3.0, 25.0]),
    pauses=st.lists(st.sampled_from([0.0, 0.01, 0.1, 0.4, 1.0, 7.0]), min_size=1, max_size=80),
)
def test_within_any_time_no_more_is_taken_than_the_limit_says_and_no_less_after_a_wait(per_s, pauses):
    now, limit, taken = 0.0, Limit(per_s, 0.0), []
    for pause in pauses:
        now += pause
        wait_s = limit.take(now)
        if wait_s == 0:
            taken.append(now)
        else:
            assert limit.take(now + 0.99 * wait_s) > 0
            now += wait_s + 1e-9
            assert limit.take(now) == 0
            taken.append(now)
    for i, begin in enumerate(taken):
        for j, end in enumerate(taken[i:], start=1):
            assert j <= max(per_s, 1.0) + (end - begin) * per_s + 1e-6


def _make(home, keys) -> None:
    keys.put(owner_key(Settings(home=home)))


def test_processes_that_start_at_once_agree_on_one_generated_key(home):
    context = multiprocessing.get_context("spawn")
    keys = context.Queue()
    started = [context.Process(target=_make, args=(home, keys)) for _ in range(4)]
    for process in started:
        process.start()
    made = {keys.get(timeout=60) for _ in started}
    for process in started:
        process.join()
    assert len(made) == 1
    assert Settings(home=home).api_key_file.stat().st_mode & 0o077 == 0
    assert KeyRing.open(Settings(home=home)).require(f"Bearer {made.pop()}".encode(), Scope.RELEASE)
