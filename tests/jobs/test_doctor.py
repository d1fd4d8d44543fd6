"""`sae-ray doctor`, on this machine as it is and with real faults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from sae_ray.jobs.cli import main
from sae_ray.jobs.cluster import free_port, usable_cpus
from sae_ray.jobs.doctor import packages, python


@pytest.fixture
def old_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another installation left behind is found first."""
    about = tmp_path / "site" / "ray-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(about.parent)


def test_what_is_needed_and_missing_is_named_with_a_remedy(old_ray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAE_RAY_CACHE", str(tmp_path / "file" / "cache"))
    result = CliRunner().invoke(main, ["doctor", "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert {name for name, one in found.items() if one["state"] == "missing"} == {"packages", "disk", "ray"}
    assert "ray is 1.0, not ==2.60.0" in found["packages"]["text"]
    assert found["packages"]["remedy"].startswith("pip install")
    assert f"not writable: the cache {tmp_path}" in found["disk"]["text"]
    assert "SAE_RAY_CACHE" in found["disk"]["remedy"]
    assert "ConnectionRefusedError" in found["ray"]["text"]
    assert address in found["ray"]["remedy"]
    assert all(one["remedy"] for one in found.values() if one["state"] != "ok")


def test_a_machine_on_which_the_tests_run_lacks_nothing(ray_cluster):
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "a worker on this machine answered" in result.stdout
    assert f"{usable_cpus()} of " in result.stdout
    assert {python().state, packages().state} == {"ok"}
