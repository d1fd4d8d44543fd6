"""The configurations for `ray up` are what Ray's launcher takes, and what they start is closed.

AWS is moto's: Ray's own code sets the account up and starts a node of each type there.
"""

from __future__ import annotations

import copy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config

REPOSITORY = Path(__file__).parents[2]
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
each_cloud = pytest.mark.parametrize("cloud", ["aws", "gcp"])
SSH = 22


def written(cloud: str) -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "cluster" / f"{cloud}.yaml").read_text(encoding="utf-8"))


def prepared(cloud: str) -> dict[str, Any]:
    """As `ray up` reads it: with Ray's defaults for what is left out, and checked by its schema."""
    config = prepare_config(written(cloud))
    validate_config(config)
    return config


@each_cloud
def test_ray_takes_it(cloud):
    config = prepared(cloud)
    types = config["available_node_types"]
    assert set(types) == {"head", "cpu", "gpu"}
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert types["gpu"]["resources"]["GPU"] == 1
    assert types["gpu"]["min_workers"] == 1
    assert types["cpu"]["max_workers"] + types["gpu"]["max_workers"] == config["max_workers"]


@each_cloud
def test_an_unknown_field_is_refused(cloud):
    config = prepared(cloud) | {"max_worker": 3}
    with pytest.raises(Exception, match="max_worker"):
        validate_config(config)


@each_cloud
def test_a_token_is_asked_for(cloud):
    config = prepared(cloud)
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}, "and nothing else is copied"
    assert shlex.split(" ".join(config["docker"]["run_options"]))[:2] == ["--env", "RAY_AUTH_MODE=token"]


@each_cloud
def test_the_dashboard_is_the_heads_own(cloud):
    config = prepared(cloud)
    [start] = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in shlex.split(start)


@each_cloud
def test_nothing_is_installed_at_the_start(cloud):
    config = prepared(cloud)
    assert config["docker"]["image"] == f"registry.example.com/sae-ray:{VERSION}-gpu"
    assert not config["setup_commands"]
    assert not config["head_setup_commands"]
    assert not config["worker_setup_commands"]


@pytest.fixture
def account(monkeypatch, tmp_path) -> Iterator[None]:
    """An account of AWS in which only the instance profile exists."""
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the key for SSH there
    (tmp_path / ".ssh").mkdir()
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    with mock_aws():
        boto3.client("iam").create_instance_profile(InstanceProfileName="sae-ray")
        yield


def test_aws_starts_nodes_that_only_ssh_reaches(account):
    config = bootstrap_aws(prepared("aws"))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    started = {}
    for name, of in config["available_node_types"].items():
        [started[name]] = provider.create_node(copy.deepcopy(of["node_config"]), {}, 1).values()
    types = {name: instance.instance_type for name, instance in started.items()}
    assert types == {"head": "m7i.xlarge", "cpu": "m7i.4xlarge", "gpu": "g6e.4xlarge"}
    assert {name: one.instance_lifecycle for name, one in started.items() if one.instance_lifecycle} == {"gpu": "spot"}
    assert all(one.iam_instance_profile["Arn"].endswith("/sae-ray") for one in started.values())
    groups = {group["GroupId"] for one in started.values() for group in one.security_groups}
    assert groups
    for group in groups:
        for rule in boto3.resource("ec2").SecurityGroup(group).ip_permissions:
            from_anywhere = rule["IpRanges"] or rule["Ipv6Ranges"] or rule["PrefixListIds"]
            if from_anywhere:
                assert (rule["FromPort"], rule["ToPort"]) == (SSH, SSH)
            else:
                assert {pair["GroupId"] for pair in rule["UserIdGroupPairs"]} <= groups
