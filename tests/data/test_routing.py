"""The split of traffic: by key alone, as even as its weight, and never taking a unit back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.database import Database, StaleEpoch
from serving import routing
from serving.routing import place


@given(st.text(max_size=50), st.text(max_size=10), st.floats(0, 1), st.floats(0, 1))
def test_raising_the_weight_never_takes_an_instance_back(key, salt, one, other):
    low, high = sorted((one, other))
    where = place(key, salt)
    assert 0 <= where < 1
    assert where == place(key, salt)
    assert not (where < low and not where < high)


def test_the_split_follows_its_weight_and_another_rollout_splits_anew():
    keys = [f"key-{i}" for i in range(20_000)]
    first, second = ([place(key, salt) < 0.1 for key in keys] for salt in ("aqua/1", "aqua/2"))
    assert sum(first) == pytest.approx(2000, abs=150)
    assert sum(a and b for a, b in zip(first, second, strict=True)) == pytest.approx(200, abs=60)


def test_epochs_only_rise_the_same_table_is_written_once_and_a_stale_writer_is_refused(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/control.db")
    database.create()
    first = routing.publish(database, "aqua", None, {"champion": "1"})
    assert routing.publish(database, "aqua", first, {"champion": "1"}) is first
    second = routing.publish(database, "aqua", first, {"champion": "2", "previous": "1"})
    assert second.epoch == first.epoch + 1
    with pytest.raises(StaleEpoch):
        routing.publish(database, "aqua", first, {"champion": "3"})
    assert routing.read(database, "aqua") == second
    assert second.versions("one") == {"1", "2"}
    preparing = second.model_copy(update={"prepare": "3", "prepare_in": "one"})
    assert [preparing.versions(name) for name in ("one", "other")] == [{"1", "2", "3"}, {"1", "2"}]
    assert preparing.model_copy(update={"prepare_in": None}).versions("other") == {"1", "2", "3"}
