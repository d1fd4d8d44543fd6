"""Shells complete what is typed, by the scripts that docs/install.md names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sae_ray.study.shipped import shipped_studies

PAGE = (Path(__file__).parents[2] / "docs" / "install.md").read_text(encoding="utf-8")
TYPED = {
    "bash": """
        complete_words() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _sae_ray_completion sae-ray 2>/dev/null
                           printf '%s\\n' "${COMPREPLY[@]}"; COMPREPLY=(); }""",
    # What its completion system would call, outside of a line editor.
    "zsh": """
        compadd() { print -l -- $completions }; _describe() { print -l -- ${completions_with_descriptions%%:*} }
        _path_files() { : }
        complete_words() { words=("$@"); CURRENT=$#; _sae_ray_completion }""",
    "fish": """
        function complete_words; complete -C (string join ' ' -- $argv) | string replace -r '\\t.*' ''; end""",
}
"""Defines `complete_words`, which prints what the shell would offer."""


@pytest.mark.parametrize("shell", TYPED)
def test_a_shell_completes_commands_options_and_studies(shell: str, tmp_path: Path):
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    for name in ("torch", "transformers", "ray"):  # too slow for a key
        (tmp_path / f"{name}.py").write_text("raise ImportError('completion needs none of these')")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path),
        "HOME": str(tmp_path),
    }
    [line] = re.findall(rf"`([^`]*{shell}_source.*?)` \|$", PAGE.replace(r"\|", "|"), re.MULTILINE)
    first = "compdef() { : }" if shell == "zsh" else ""
    typed = ("sae-ray stud", "sae-ray run ph", "sae-ray run demo --exp")
    script = "\n".join([first, line, TYPED[shell], *(f"echo =; complete_words {words}" for words in typed)])
    done = subprocess.run([shell, "-c", script], env=environment, capture_output=True, text=True, check=False)
    _, *offered = done.stdout.split("=\n")
    photos = [name for name in shipped_studies() if name.startswith("ph")]
    assert [set(one.split()) for one in offered] == [{"studies"}, set(photos), {"--expansion"}], done.stderr
