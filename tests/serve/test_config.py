"""The configurations in cluster/serve are what Ray Serve and the application take."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema
from sae_ray.jobs.cluster import connect
from sae_ray.serve.config import API_KEY, ServeConfig
from sae_ray.serve.local import HTTP_GRACE_S, read_config, run

from sae_ray.errors import UsageError

FILES = sorted((Path(__file__).parents[2] / "cluster" / "serve").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_configuration_fits(file):
    values = yaml.safe_load(file.read_text())
    [application] = ServeDeploySchema.model_validate(values).applications
    config = ServeConfig.model_validate(application.args)
    assert application.import_path == "sae_ray.serve.app:build"
    assert values["http_options"]["request_timeout_s"] >= config.limits.timeout_s + HTTP_GRACE_S
    assert config.without_key == (values["http_options"]["host"] == "127.0.0.1"), "others need a key"


def test_options_override_the_file(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("root: there\nlanguage: {engine: transformers, max_running: 3}\n")
    config = read_config(str(file), "vllm", {"root": "here", "llava": None, "saes": ()})
    assert (config.root, config.language.engine, config.language.max_running) == ("here", "vllm", 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "is not a table of fields"),
        ("root: x\nlanguag: {}", "languag"),
        ("root: x\nlimits: {images: 0}", "limits.images"),
        ("{}", "root is missing"),
        ("root: [", "cannot be read"),
        ("root: x\nlanguage: vllm", "language is 'vllm'"),
    ],
)
def test_a_bad_file_is_told_what_is_wrong(tmp_path, text, words):
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=words):
        read_config(str(file), "vllm", {})


def test_unknown_fields_are_refused():
    with pytest.raises(ValidationError, match="rooot"):
        ServeConfig.model_validate({"rooot": "x"})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org"])
def test_other_machines_need_a_key(monkeypatch, host):
    monkeypatch.delenv(API_KEY, raising=False)
    with pytest.raises(UsageError, match=API_KEY):
        run(ServeConfig(root="nowhere"), host, 8000, connect, print)


def test_another_cluster_is_left_to_serve_deploy(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UsageError, match="serve deploy"):
        run(ServeConfig(root="nowhere"), "127.0.0.1", 0, connect, print)


def test_a_port_that_is_taken_and_a_root_that_is_not_there(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match="is not free"):
        run(ServeConfig(root="nowhere"), "127.0.0.1", taken.getsockname()[1], connect, print)
    with pytest.raises(UsageError, match=r"has no study\.json"):
        run(ServeConfig(root=str(tmp_path)), "127.0.0.1", 0, connect, print)
