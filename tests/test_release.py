"""What is said of a version in several places is the same in each."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

from sae_ray.store.steps import SCHEMA_VERSIONS
from sae_ray.study.root import LAYOUT

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CHANGES = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
VERSIONS = [found.rsplit(" ", 1)[1] for found in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", found)]
"""Of Python."""


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))


def test_the_newest_version_is_that_of_the_package_and_of_the_citation():
    newest = re.findall(r"^## (\d+\.\d+\.\d+)\b", CHANGES, re.MULTILINE)[0]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert newest == citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


def test_the_changelog_has_the_schema_versions_of_the_newest_version():
    head, _, *rows = re.findall(r"^\|(.*)\|$", CHANGES, re.MULTILINE)
    assert head.split("|")[1].strip() == PROJECT["version"], "the newest version is the first column"
    stages = {row.split("|")[0].strip(" `"): int(row.split("|")[1]) for row in rows}
    assert stages == {"layout": LAYOUT, **SCHEMA_VERSIONS}


def test_the_pythons_that_are_promised_are_tested():
    assert workflow("checks")["jobs"]["test"]["strategy"]["matrix"]["python"] == VERSIONS
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.findall(r"^PYTHONS \?= (.*)$", makefile, re.MULTILINE) == [" ".join(VERSIONS[1:])]
    assert PROJECT["requires-python"] == f">={VERSIONS[0]}"


def test_workflows_run_what_a_checkout_runs():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in ("checks", "release"):
        steps = [step for job in workflow(name)["jobs"].values() for step in job["steps"]]
        ours = [step["run"].split() for step in steps if re.match(r"make|\.ci/run", step.get("run", ""))]
        assert ours
        for command, target in ours:
            assert command == "make" or (ROOT / command).stat().st_mode & 0o111
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
