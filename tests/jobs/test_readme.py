"""What the README says runs as it stands."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_the_python_example_runs(finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(finished)
    (tmp_path / "studies").symlink_to(REPOSITORY / "studies")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert "projection-batch_topk-x4-k5" in capsys.readouterr().out
    assert names["reconstruction"].shape == names["activations"].shape
    assert names["scores"].shape == (names["sae"].d_sae,)


def test_the_first_screen_holds_exactly_the_two_commands():
    first_screen = (REPOSITORY / "README.md").read_text().split("##")[0]
    fences = "".join(re.findall(r"```\n(.*?)```", first_screen, re.DOTALL))
    commands = re.findall(r"^(?:make|sae-ray|ray|pip|python) .*", fences, re.MULTILINE)
    assert [command.split("#")[0].strip() for command in commands] == ["make demo", "make test"]
