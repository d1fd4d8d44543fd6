"""What the README and the examples for Python in docs/ say runs as it stands."""

import re
from pathlib import Path

import torch

from sae_ray.sae import SAE, save_sae
from sae_ray.store.files import Folder

REPOSITORY = Path(__file__).parents[2]
[STEERED], [STUDIED] = (
    re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / page).read_text(), re.DOTALL)
    for page in ("steering.md", "python.md")
)


def test_the_example_of_a_study_runs(finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(finished)
    (tmp_path / "studies").symlink_to(REPOSITORY / "studies")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(STUDIED, names)
    assert "projection-batch_topk-x4-k5" in capsys.readouterr().out
    assert names["reconstruction"].shape == names["activations"].shape
    assert names["scores"].shape == (names["sae"].d_sae,)


def test_the_example_of_steering_runs(world, tmp_path, monkeypatch, capsys):
    W_dec = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    sae = SAE("topk", W_dec.T.clone(), W_dec, torch.zeros(64), torch.zeros(128), k=4)
    save_sae(sae, Folder(tmp_path / "runs" / "demo" / "sae-layer3.random-4"))
    monkeypatch.chdir(tmp_path)
    exec(STEERED.replace("~/.cache/sae-ray/world", str(world)), {})
    assert capsys.readouterr().out.strip()


def test_the_first_screen_holds_exactly_the_two_commands():
    first_screen = (REPOSITORY / "README.md").read_text().split("##")[0]
    fences = "".join(re.findall(r"```\n(.*?)```", first_screen, re.DOTALL))
    commands = re.findall(r"^(?:make|sae-ray|ray|pip|python) .*", fences, re.MULTILINE)
    assert [command.split("#")[0].strip() for command in commands] == ["make demo", "make test"]
