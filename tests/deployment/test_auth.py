"""Keys: who may do what, when a key ends, and where the generated one lies."""

from __future__ import annotations

import json
import multiprocessing
from datetime import UTC, datetime

import pytest

from cluster.settings import Settings
from serving.auth import ConfiguredKey, KeyRing, Scope, owner_key
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
