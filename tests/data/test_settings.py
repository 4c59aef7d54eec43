"""Settings: what the environment says arrives, and reaches another process; errors name their cause."""

from __future__ import annotations

import os
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.redis_url import address, is_node_local
from cluster.settings import Settings

TEXT = st.text(string.ascii_letters + string.digits + "äß '\"=,:/{}", min_size=1, max_size=20)
WORD = st.text(string.ascii_letters + string.digits, min_size=1, max_size=8)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "home": WORD.map(lambda word: Path("/srv", word)),
        "tables_url": WORD.map(lambda word: f"s3://{word}/tables"),
        "storage_options": st.dictionaries(TEXT, st.text(string.printable, max_size=20), max_size=3),
        "database_url": TEXT,
        "mlflow_url": TEXT,
        "mlflow_artifacts": TEXT,
        "state_dir": WORD.map(lambda word: Path("/state", word)),
        "state_url": st.none() | st.builds("redis://u:{}@{}:1/2".format, WORD, WORD),
        "state_durability": st.sampled_from(["checked", "guaranteed"]),
        "clock": st.sampled_from(["system", "replay"]),
        "http_host": TEXT,
        "http_port": st.integers(0, 65535),
        "gateway_replicas": st.integers(1, 9),
        "buckets": st.integers(1, 512),
        "ray_rows": st.integers(0, 10**9),
        "remember_seconds": st.integers(1, 10**8),
        "drain_seconds": st.floats(1e-3, 1e6),
        "drain_rows": st.integers(1, 10**7),
        "body_limit": st.integers(1, 10**9),
        "num_cpus": st.none() | st.integers(1, 512),
        "api_keys": st.none() | TEXT,
        "webhook_url": st.none() | st.builds("https://{}/{}".format, WORD, WORD),
        "keys_file": st.none() | st.builds("/etc/{}.json".format, WORD).map(Path),
    },
)


@settings(max_examples=100)
@given(SETTINGS)
def test_environment_gives_the_same_settings_back(values):
    made = Settings(**values)
    assert Settings.from_environment(made.environment()) == made


def test_every_field_has_a_variable():
    assert set(Settings().environment()) == {f"TIDEGATE_{name.upper()}" for name in Settings.model_fields}


def test_another_process_in_another_directory_reads_the_same(tmp_path, monkeypatch):
    made = Settings.from_environment({"TIDEGATE_HOME": "relative/home", "TIDEGATE_BUCKETS": "3"})
    code = (
        "from cluster.settings import Settings; import sys\n"
        "sys.stdout.write(Settings.from_environment().model_dump_json())"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith("TIDEGATE_")}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | made.environment() | {"PYTHONPATH": str(root)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Settings.model_validate_json(done.stdout) == made


def test_everything_lies_below_home_unless_said_otherwise(tmp_path):
    made = Settings.from_environment({"TIDEGATE_HOME": str(tmp_path)})
    assert made.tables_url == (tmp_path / "tables").as_uri()
    assert made.database_url == f"sqlite:///{tmp_path}/control.db"
    assert made.mlflow_url == f"sqlite:///{tmp_path}/mlflow.db"
    assert made.mlflow_artifacts == (tmp_path / "mlflow-artifacts").as_uri()
    assert made.state_dir == tmp_path / "state"
    for path in (made.clock_file, made.api_key_file, made.cache_dir):
        assert path.parent == tmp_path


def test_home_is_absolute_and_an_empty_variable_counts_as_unset(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    made = Settings.from_environment({"TIDEGATE_HOME": "", "TIDEGATE_NUM_CPUS": ""})
    assert made.home == tmp_path / "var" / "tidegate"
    assert made.num_cpus is None


def test_a_misspelt_variable_names_the_nearest():
    with pytest.raises(ValueError, match="TIDEGATE_HTTP_PROT: did you mean TIDEGATE_HTTP_PORT"):
        Settings.from_environment({"TIDEGATE_HTTP_PROT": "1"})


def test_variables_of_others_are_left_alone():
    assert Settings.from_environment({"TIDEGATE_SESSION": "x", "HOME": "y", "tidegate_home": "z"}) == Settings()


@pytest.mark.parametrize(
    ("variable", "text", "reason"),
    [
        ("TIDEGATE_HTTP_PORT", "http", "TIDEGATE_HTTP_PORT"),
        ("TIDEGATE_HTTP_PORT", "70000", "TIDEGATE_HTTP_PORT"),
        ("TIDEGATE_BUCKETS", "0", "TIDEGATE_BUCKETS"),
        ("TIDEGATE_CLOCK", "sundial", "system"),
        ("TIDEGATE_STORAGE_OPTIONS", "{", "JSON object"),
        ("TIDEGATE_STORAGE_OPTIONS", '{"a": 1}', "TIDEGATE_STORAGE_OPTIONS"),
        ("TIDEGATE_HOME", "/srv/a?b", "must not contain"),
        ("TIDEGATE_STATE_URL", "lmdb:///srv", "TIDEGATE_STATE_URL: .*redis://host:port/db.*, not 'lmdb'"),
        ("TIDEGATE_STATE_URL", "host:6379", "redis://host:port/db"),
        ("TIDEGATE_STATE_URL", "redis://", "names a host"),
        ("TIDEGATE_STATE_URL", "redis://host:0/1", "names a host"),
        ("TIDEGATE_STATE_URL", "redis://host:many/1", "cannot be read"),
        ("TIDEGATE_STATE_URL", "redis://host/one", "number of a database"),
        ("TIDEGATE_STATE_URL", "redis://host/1?socket_timeout=9", "does not take socket_timeout"),
        ("TIDEGATE_STATE_URL", "unix://run/redis.sock", "three slashes"),
        ("TIDEGATE_STATE_DURABILITY", "hoped", "guaranteed"),
        ("TIDEGATE_WEBHOOK_URL", "ftp://host/", "http://"),
        ("TIDEGATE_WEBHOOK_URL", "https://host:port/", "http://"),
        ("TIDEGATE_WEBHOOK_URL", "https://xn--.x/", "http://"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_its_variable(variable, text, reason):
    with pytest.raises(ValueError, match=reason):
        Settings.from_environment({variable: text})


def test_an_error_about_a_webhook_does_not_show_it():
    with pytest.raises(ValueError) as caught:
        Settings(webhook_url="https://host:port/hunter2")
    assert "hunter2" not in str(caught.value)


def test_an_error_about_a_secret_does_not_show_it():
    with pytest.raises(ValueError) as caught:
        Settings.from_environment({"TIDEGATE_STORAGE_OPTIONS": '{"secret": ["hunter2"]}'})
    assert "hunter2" not in str(caught.value)


def test_secrets_do_not_show_in_repr():
    made = Settings(
        api_keys="hunter2",
        storage_options={"k": "hunter2"},
        database_url="postgresql://u:hunter2@h/d",
        state_url="rediss://u:hunter2@h/1",
        webhook_url="https://chat/hunter2",
    )
    assert "hunter2" not in repr(made)


@pytest.mark.parametrize(
    "url", ["bogus://u:hunter2@h/1", "redis://u:hunter2@h/x", "unix://u:hunter2@run/s", "redis://u:hunter2@h:x/1"]
)
def test_an_error_about_a_state_url_does_not_show_its_password(url):
    with pytest.raises(ValueError) as caught:
        Settings(state_url=url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown", "node_local"),
    [
        ("redis://u:p@cache.example:7000/3", "redis://cache.example:7000/3", False),
        ("rediss://:p@10.0.0.7?ssl_ca_certs=/ca.pem", "rediss://10.0.0.7:6379", False),
        ("redis://localhost", "redis://localhost:6379", True),
        ("redis://127.0.0.1:1/0", "redis://127.0.0.1:1/0", True),
        ("redis://[::1]:1/0", "redis://[::1]:1/0", True),
        ("unix://u:p@/run/redis.sock?db=2", "unix:///run/redis.sock", True),
    ],
)
def test_a_state_url_is_shown_without_credentials_and_known_to_reach_one_node_or_all(url, shown, node_local):
    made = Settings(state_url=url)
    assert made.state_url == url
    assert (address(url), is_node_local(url)) == (shown, node_local)
