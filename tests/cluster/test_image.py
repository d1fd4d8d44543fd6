"""The image holds what a node needs and nothing else. It is not built here: `make lint` checks its Dockerfile."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from sae_ray.jobs.cluster import KEEPALIVE

from tests.test_wheel import ROOMS

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = (REPOSITORY / "cluster" / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_build_sees_what_the_wheel_is_made_of_and_nothing_else():
    lines = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    seen = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert seen == {"pyproject.toml", "README.md", "LICENSE", *ROOMS}


def test_torch_is_the_makefiles():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for argument in ("TORCH", "TORCHVISION"):
        [default] = re.findall(rf"^ARG {argument}=(.*)$", DOCKERFILE, re.MULTILINE)
        assert f"{argument.lower()}=={default}\n" in makefile
        assert f"--build-arg {argument}={default}+cpu" in DOCKERFILE


@pytest.mark.parametrize("extras", [[], ["aws"], ["vllm", "gcp"]])
def test_all_dependencies_are_installed_before_the_code(extras: list[str]):
    [code] = re.findall(r"python -c '(.*?)' \$EXTRAS", DOCKERFILE, re.DOTALL)
    code = code.replace("\\\n", "").replace("/tmp/pyproject.toml", str(REPOSITORY / "pyproject.toml"))
    told = subprocess.run([sys.executable, "-c", code, *extras], capture_output=True, text=True, check=True).stdout
    wanted = [*PROJECT["dependencies"], *(one for extra in extras for one in PROJECT["optional-dependencies"][extra])]
    assert told.splitlines() == wanted


def test_nobody_is_root_and_a_token_is_asked_for():
    last = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    assert re.findall(r"^USER (.*)$", last, re.MULTILINE) == ["1000"]
    assert "RAY_AUTH_MODE=token" in re.findall(r"^ENV (.*)$", last, re.MULTILINE)[-1].split()


@pytest.mark.parametrize("file", ["Dockerfile", "slurm/on_ray.sbatch"])
def test_nodes_give_up_machines_as_soon_as_drivers_do(file: str):
    text = (REPOSITORY / "cluster" / file).read_text(encoding="utf-8")
    [values] = re.findall(r"^(?:ENV|export) (RAY_grpc_client_keepalive_time_ms=.*)$", text, re.MULTILINE)
    assert values.split() == [f"{name}={value}" for name, value in KEEPALIVE.items()]
