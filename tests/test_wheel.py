"""The wheel: whole, alone under its own name, and working far from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.release import LARGEST, build

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"sae_ray": "sae_ray", "jobs": "sae_ray/jobs", "serve": "sae_ray/serve", "studies": "sae_ray/studies"}
COMMIT_TIME = 1_700_000_000


def shipped(room: str) -> set[str]:
    """Paths in the wheel of what a room of the checkout ships: its modules, the world's models, assets, studies."""
    folders = ("world/models", "report/assets", "playground")
    named = [file for name in ("*.py", "py.typed", "*.toml") for file in (ROOT / room).rglob(name)]
    files = [*named, *(file for folder in folders for file in (ROOT / room / folder).rglob("*"))]
    return {f"{ROOMS[room]}/{file.relative_to(ROOT / room).as_posix()}" for file in files if file.is_file()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_of_copy(tmp_path_factory.mktemp("wheel"))


def build_of_copy(folder: Path) -> Path:
    """A wheel of the checkout as it is. A build leaves its folders, and the files of builds before it, in the tree."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for room in ROOMS:
        unneeded = shutil.ignore_patterns("__pycache__")
        # Files are as old as the copy.
        shutil.copytree(ROOT / room, source / room, ignore=unneeded, copy_function=shutil.copyfile)
    build(source, folder, COMMIT_TIME)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    pip("install", "--no-deps", "--no-compile", "--target", folder, wheel)
    return folder


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-index", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def run(target: Path, cwd: Path, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a command that sees the target before the editable installation."""
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, done.stderr
    return done


def test_the_wheel_is_whole(wheel: Path):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == set().union(*map(shipped, ROOMS))


def test_a_wheel_is_small_and_the_same_when_it_is_built_again_by_others(wheel: Path, tmp_path: Path):
    before = os.umask(0o077)
    try:
        again = build_of_copy(tmp_path)
    finally:
        os.umask(before)
    assert again.read_bytes() == wheel.read_bytes()
    assert wheel.stat().st_size < LARGEST


def test_the_wheel_owns_one_name(target: Path):
    names = {path.name for path in target.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"sae_ray", "bin"}


def test_the_command_line_is_that_of_the_wheel(target: Path, tmp_path: Path):
    code = "import sae_ray, sae_ray.jobs.cli as cli; print(sae_ray.__file__, cli.__file__); cli.main(['--help'])"
    first, _, help_text = run(target, tmp_path, sys.executable, "-c", code).stdout.partition("\n")
    assert first == f"{target / 'sae_ray' / '__init__.py'} {target / 'sae_ray' / 'jobs' / 'cli.py'}"
    assert "Run a whole study." in help_text
    code = "from sae_ray.jobs.cli import main; main(['studies'])"
    listed = run(target, tmp_path, sys.executable, "-c", code).stdout
    assert {Path(line.strip()) for line in listed.splitlines()[1::2]} == {
        target / "sae_ray" / "studies" / file.name for file in (ROOT / "studies").glob("*.toml")
    }
    code = "from sae_ray import Study; import sae_ray; print(sae_ray.__file__, Study.load('demo').name)"
    assert run(target, tmp_path, sys.executable, "-c", code).stdout.split() == [first.split()[0], "demo"]


def test_the_installed_command_writes_the_world(target: Path, tmp_path: Path):
    run(target, tmp_path, target / "bin" / "sae-ray", "world", "w", "--train", "3", "--heldout", "2")
    written = [path for path in (tmp_path / "w").rglob("*") if path.is_file()]
    assert len([path for path in written if path.suffix == ".png"]) == 5
    models = ROOT / "sae_ray" / "world" / "models"
    assert {path.relative_to(tmp_path / "w") for path in written if path.suffix != ".png"} == {
        path.relative_to(models) for path in models.glob("*/*")
    }


def test_a_stage_run_by_its_name_tells_what_to_mend_without_a_traceback(target: Path, tmp_path: Path):
    done = run(target, tmp_path, sys.executable, "-m", "sae_ray.jobs.extract", "nowhere.toml", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: study file nowhere.toml cannot be read")
