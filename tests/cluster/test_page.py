"""What docs/cluster.md says to type fits the files that it names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from sae_ray.jobs.cli import main

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "cluster.md").read_text(encoding="utf-8")
FENCES = "".join(re.findall(r"^```\w*\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
COMMANDS = [line for line in FENCES.replace("\\\n", " ").splitlines() if line]


@pytest.mark.parametrize("name", ["docs/cluster.md", "docs/security.md", "SECURITY.md"])
def test_links_lead_somewhere(name):
    page = REPOSITORY / name
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_files_are_there():
    named = set(re.findall(r"(?<![\w./-])(?:cluster|studies)/[\w./-]+", PAGE))
    assert {"cluster/aws.yaml", "cluster/kuberay/study.yaml", "studies/pach2025.toml"} <= named
    assert [name for name in sorted(named) if not (REPOSITORY / name.rstrip(".")).exists()] == []


def test_commands_are_ours():
    ours = [found.groups() for line in COMMANDS if (found := re.search(r"(?:^| )sae-ray ([a-z]+) (.*)", line))]
    assert {command for command, _ in ours} == {"run", "submit"}
    for command, arguments in ours:
        given = main.commands[command].make_context(command, shlex.split(arguments)).params
        assert (REPOSITORY / given["study"]).exists()
        assert given["root"]


def test_names_are_those_of_the_manifests():
    manifests = [yaml.safe_load(file.read_text()) for file in (REPOSITORY / "cluster" / "kuberay").iterdir()]
    names = {manifest["kind"]: manifest["metadata"]["name"] for manifest in manifests}
    assert f"service/{names['RayCluster']}-head-svc " in FENCES, "KubeRay's name for it"
    assert f"get secret {names['RayCluster']} " in FENCES, "KubeRay's name for it"
    assert f"logs --follow job/{names['RayJob']}\n" in FENCES
    assert f"`{names['RayService']}-serve-svc`" in PAGE
    used = (REPOSITORY / "cluster" / "kuberay" / "study.yaml").read_text()
    assert f"claimName: {names['PersistentVolumeClaim']}}}" in used
    for kind, name in (("secret generic", "sae-ray-keys"), ("configmap", "sae-ray-studies")):
        assert f"create {kind} {name} " in FENCES
        assert f"name: {name}" in used
