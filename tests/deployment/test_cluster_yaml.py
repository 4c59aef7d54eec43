"""The AWS launcher's configuration, checked offline by Ray, by botocore's model of EC2 and by a shell."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from jsonschema import ValidationError
from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.session import driver_environment
from cluster.settings import Settings

FILE = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("this check must not need a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def run_instances_faults(node_config: dict[str, Any]) -> str:
    """What EC2's RunInstances would not understand in ``node_config``, by botocore's own model of it."""
    model = botocore.session.Session().get_service_model("ec2").operation_model("RunInstances")
    parameters = {**node_config, "MinCount": 1, "MaxCount": 1}  # the launcher adds these two
    return ParamValidator().validate(parameters, model.input_shape).generate_report()


def test_ray_takes_the_configuration(config):
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert prepared["available_node_types"]["worker"]["min_workers"] <= prepared["max_workers"]


@pytest.mark.parametrize(
    "break_it", [{"max_worker": 3}, {"head_node_type": "nowhere"}, {"max_workers": "many"}], ids=str
)
def test_ray_would_notice_a_mistake(config, break_it):
    with pytest.raises((ValidationError, ValueError)):
        validate_config(prepare_config({**config, **break_it}))


@pytest.mark.parametrize("node_type", ["head", "worker"])
def test_ec2_knows_every_key_of_the_nodes(config, node_type):
    assert run_instances_faults(config["available_node_types"][node_type]["node_config"]) == ""


@pytest.mark.parametrize(
    "mistake",
    [
        {"InstanceTyp": "m7i.large"},
        {"MetadataOptions": {"HttpToken": "required"}},
        {"BlockDeviceMappings": "100"},
    ],
    ids=str,
)
def test_a_misspelt_node_key_would_be_noticed(config, mistake):
    node_config = config["available_node_types"]["head"]["node_config"]
    assert run_instances_faults({**node_config, **mistake}) != ""


@pytest.fixture
def node_environment(config, tmp_path) -> dict[str, str]:
    """What a start command sees once the set-up command, run as the launcher runs it, wrote the file."""
    (write,) = [command for command in config["setup_commands"] if "tidegate.env" in command]
    clean = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "TERM": "dumb"}
    for command in (write, ". ~/tidegate.env && env > ~/seen"):
        wrapped = " ".join(_with_interactive(command))
        subprocess.run(wrapped, shell=True, env=clean, check=True, capture_output=True, timeout=30)
    return dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines() if "=" in line)


def test_nodes_run_with_the_flags_of_a_local_session(node_environment, tmp_path):
    wanted = driver_environment(Settings(home=tmp_path / "home"))
    wanted["RAY_AUTH_TOKEN_PATH"] = f"{tmp_path}/.ray/auth_token"
    assert {key: node_environment.get(key) for key in wanted} == wanted
    assert wanted["RAY_AUTH_MODE"] == "token"


def test_nodes_have_settings_that_several_nodes_can_share(node_environment):
    settings = Settings.from_environment(node_environment)
    assert settings.tables_url.startswith("s3://")
    assert settings.mlflow_artifacts.startswith("s3://")
    assert settings.database_url.startswith("postgresql://")
    assert (settings.state_url or "").startswith("rediss://")
    assert settings.mlflow_url.startswith("postgresql+psycopg://")


@pytest.mark.parametrize("kind", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_ray_command_reads_the_flags_first(config, kind):
    assert config[kind][-1].count("ray start") == 1
    for command in config[kind]:
        assert command.startswith(". ~/tidegate.env && ")


def test_every_node_gets_the_token(config):
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
