"""Every block of code in the documentation is of a kind that is checked: here, or by the test that runs it.

Studies are read as `sae-ray run` reads them, commands as the command line does, and Python is compiled; `RUN` says
where it runs. A block without a language holds commands, with what they put out if they follow `$ `. `text` is no code.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
import pytest
import yaml
from sae_ray.jobs.cli import main
from sae_ray.serve.schemas import Steering

from sae_ray.errors import UsageError
from sae_ray.study.config import Study

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in
         sorted([*ROOT.glob("*.md"), *ROOT.glob(".github/**/*.md"), *ROOT.glob("docs/*.md")])}  # fmt: skip
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(page, *found.groups()) for page, text in PAGES.items() for found in BLOCK.finditer(text)]
INLINE = [(page, code) for page, text in PAGES.items() for code in re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))]

RUN = {
    ("docs/concepts.md", "python"): "tests/concepts/test_concepts_page.py",
    ("docs/concepts.md", "py"): "tests/concepts/test_agreement.py",
    ("docs/editing.md", "py"): "tests/editing/test_patches.py",
    ("docs/formats.md", "python"): "tests/test_formats_page.py",
    ("docs/monitoring.md", "py"): "tests/sae/test_trackers.py",
    ("docs/notebooks.md", "python"): "tests/sae/test_fitting.py",
    ("docs/notebooks.md", "py"): "tests/report/test_results.py and tests/encoders/test_extracting.py",
    ("docs/python.md", "python"): "tests/jobs/test_readme.py",
    ("docs/serving.md", "py"): "tests/serve/test_serving_page.py",
    ("docs/serving.md", "bash"): "tests/serve/test_serving_page.py",
    ("docs/sharing.md", "python"): "tests/sae/test_hub.py",
    ("docs/sharing.md", "py"): "tools/peers.py, with the library itself",
    ("docs/steering.md", "python"): "tests/jobs/test_readme.py",
    ("docs/tools.md", "python"): "tests/test_tools_page.py",
}
"""Where blocks run: `python` as it stands but for places, `py` with other values too."""
OTHERS = {"export", "kubectl", "pip", "prometheus", "ray", "sbatch", "tensorboard"}
"""Programs of others that pages name."""
TARGETS = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1].split())
ANY: dict[str, Any] = {
    "name": "any",
    "images": {"train": {"path": "images"}},
    "encoder": {"model": "model"},
    "grid": [{"sites": ["layer1:cls"]}],
    "scoring": {"pictures": "train"},
    "steering": {"llava": "llava"},
}
"""What the studies of pages leave out."""


def of(*languages: str) -> list[Any]:
    found = [(page, language, code) for page, language, code in BLOCKS if language in languages]
    return [pytest.param(*one, id=f"{one[0]}-{number}") for number, one in enumerate(found)]


def commands(code: str) -> Iterator[str]:
    """The commands of a block: the lines after `$ ` if there are any, otherwise all but comments."""
    lines = code.replace("\\\n", " ").splitlines()
    typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")] or lines
    yield from (line for line in typed if line.strip() and not line.startswith("#"))


def test_every_block_is_of_a_kind_that_is_checked():
    kinds = {language for _, language, _ in BLOCKS}
    assert kinds <= {"", "bash", "bibtex", "json", "py", "python", "text", "toml", "yaml"}
    assert {(page, language) for page, language, _ in BLOCKS if language in ("bash", "py", "python")} == set(RUN)
    for (page, _), test in RUN.items():
        for file in re.findall(r"tests/\S+\.py", test):
            assert Path(page).name in (ROOT / file).read_text(encoding="utf-8"), f"{file} does not read {page}"


@pytest.mark.parametrize(("page", "language", "code"), of("py", "python"))
def test_python_compiles(page: str, language: str, code: str):
    compile(code, page, "exec")


@pytest.mark.parametrize(("page", "language", "code"), of("toml"))
def test_a_study_is_read(page: str, language: str, code: str):
    values = tomllib.loads(code)
    Study.from_dict(values if "name" in values else ANY | values)


@pytest.mark.parametrize(("page", "language", "code"), of("json", "yaml"))
def test_data_are_read(page: str, language: str, code: str):
    if language == "json":
        Steering.model_validate(json.loads(code))
    else:
        assert yaml.safe_load(code)


@pytest.mark.parametrize("page", sorted({page for page, language, _ in BLOCKS if language == ""}))
def test_commands_are_understood(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for line in (line for one, language, code in BLOCKS if (one, language) == (page, "") for line in commands(code)):
        program, *words = shlex.split(line, comments=True)
        for file in (Path(word) for word in words if re.fullmatch(r"\w+\.(csv|npy)", word)):
            file.touch()  # the reader's own
        if program == "sae-ray":
            parse(words, line)
        elif program == "make":
            assert words[0] in TARGETS, line
        elif program == "python":
            assert words[0] == "-m", line
            assert find_spec(words[1]), line
        else:
            assert program in OTHERS, line


def parse(words: list[str], line: str) -> None:
    """Reads a command as `sae-ray` does, without running it."""
    command, names = main, ["sae-ray"]
    while isinstance(command, click.Group):
        names.append(words.pop(0))
        assert names[-1] in command.commands, line
        command = command.commands[names[-1]]
    try:
        given = command.make_context(" ".join(names), words).params
    except click.ClickException as error:
        pytest.fail(f"{line}: {error.format_message()}")
    if (study := given.get("study") or "").startswith("studies/"):
        assert (ROOT / study).exists(), line


def test_commands_in_the_text_have_their_options():
    """Those in a line of text may leave out what they need."""
    unknown = []
    for page, code in INLINE:
        program, *words = code.split()
        if program == "make" and words and re.fullmatch(r"[a-z-]+", words[0]) and words[0] not in TARGETS:
            unknown.append(f"{page}: {code}")
        if code.startswith("python -m ") and not find_spec(words[1].strip(",")):
            unknown.append(f"{page}: {code}")
        if program == "sae-ray" and words:
            command = main
            while words and isinstance(command, click.Group) and words[0] in command.commands:
                command = command.commands[words.pop(0)]
            known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
            given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            if (command is main and words[0] not in ("COMMAND", "--help")) or given - known - {"--help"}:
                unknown.append(f"{page}: {code}")
    assert unknown == []


def paths(kind: Any = Study, at: str = "") -> Iterator[str]:
    """The dotted names of all settings of a study."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        yield at + field.name
        for inner in (hints[field.name], *get_args(hints[field.name])):
            if is_dataclass(inner):
                yield from paths(inner, f"{at}{field.name}.")


def test_settings_in_the_text_exist():
    """Of every `name = value`, which names the setting by its whole path or by the end of it."""
    known, unknown = list(paths()), []
    for page, code in INLINE:
        name, _, value = code.partition(" = ")
        try:
            given: Mapping = tomllib.loads(f"value = {value}")
        except tomllib.TOMLDecodeError:
            continue
        if value and re.fullmatch(r"[a-z_.]+", name):
            meant = [path for path in known if f".{path}".endswith(f".{name}")]
            if not any(takes(path, one) for path in meant for one in (given["value"], [given["value"]])):
                unknown.append(f"{page}: {code}")
    assert unknown == []


def takes(path: str, value: Any) -> bool:
    try:
        Study.from_dict(ANY, {path: value})
    except UsageError:
        return False
    return True
