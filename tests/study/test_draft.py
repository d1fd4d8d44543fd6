"""`sae-ray new`: a draft is a study that runs as it is, at sites that its model has."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from sae_ray.encoders.info import EncoderInfo
from sae_ray.encoders.loading import describe_encoder
from sae_ray.errors import UsageError
from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.draft import draft, site_lines, write_draft
from sae_ray.study.root import plan_study
from sae_ray.world.write import MODELS

JUDGE = {"judge.model": f"open_clip:local-dir:{MODELS / 'judge'}", "judge.point": "projection"}
SCORER = {"steering.scorer": str(MODELS / "clip")}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of two classes."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(60):
        file = folder / "ab"[index % 2] / f"{index}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (56, 56), (index, 0, 0)).save(file)
    return folder


def convolutional(folder: Path) -> str:
    import timm

    timm.models.save_for_hf(timm.create_model("test_efficientnet"), str(folder / "net"), safe_serialization=True)
    return f"timm:local-dir:{folder / 'net'}"


@pytest.mark.parametrize(
    ("model", "site", "points"),
    [
        (str(MODELS / "clip"), "layer3:cls", {"residual", "mlp", "projection", "pooled"}),
        (str(MODELS / "llava"), "layer3:random:2", {"residual", "mlp", "pooled"}),
        (f"open_clip:local-dir:{MODELS / 'judge'}", "projection", {"projection"}),
        (convolutional, "pooled", {"pooled"}),
    ],
    ids=["clip", "llava", "open_clip", "convolutional"],
)
def test_a_draft_can_be_planned_as_it_is(model, site: str, points: set[str], images: Path, tmp_path: Path):
    model = model(tmp_path) if callable(model) else model
    write_draft(str(tmp_path / "mine.toml"), str(images), model, None)
    is_llava = model == str(MODELS / "llava")
    study = Study.load(tmp_path / "mine.toml", JUDGE | SCORER if is_llava else JUDGE)
    assert study.name == "mine"
    assert study.grid[0].sites == (site,)
    plan = plan_study(study, Folder(tmp_path / "root"), None)
    n_train, n_heldout = (plan.images[name].surveyed.n_images for name in ("train", "heldout"))
    assert n_train + n_heldout == 60
    assert n_heldout > 10
    assert (study.steering is not None) == is_llava
    assert told(describe_encoder(model)) == points


def told(info: EncoderInfo) -> set[str]:
    """The points of the sites that a draft names, with the widths that they have."""
    names = {"layer0 to": "residual", "layer0.mlp": "mlp", "projection": "projection", "pooled": "pooled"}
    found = {}
    for line in site_lines(info):
        [point] = [point for start, point in names.items() if line.startswith(start)]
        found[point] = int(re.search(r" ([\d,]+) wide", line)[1].replace(",", ""))  # type: ignore[index]
    assert all(info.width(point) == width for point, width in found.items())
    return set(found)


def test_a_draft_says_what_it_found(images: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(images.parent)
    text = draft('my "own"', images.name, str(MODELS / "clip"))
    assert tomllib.loads(text)["name"] == 'my "own"'
    assert tomllib.loads(text)["images"]["train"]["path"] == str(images), "it may be read from another folder"
    assert "60 images" in text
    assert "2 classes" in text
    assert "layer0 to layer4, 128 wide, with the tokens cls, mean, all (17 tokens) or random:n" in text


def test_a_draft_overwrites_nothing_and_names_what_is_wrong(images: Path, tmp_path: Path):
    file = tmp_path / "mine.toml"
    file.write_text("mine")
    with pytest.raises(UsageError, match=r"mine\.toml is there already"):
        write_draft(str(file), str(images), str(MODELS / "clip"), None)
    assert file.read_text() == "mine"
    with pytest.raises(UsageError, match=r"images\.train: there is no image folder .*nowhere"):
        draft("mine", str(tmp_path / "nowhere"), str(MODELS / "clip"))
    with pytest.raises(UsageError, match=r"encoder\.model = '/nowhere'"):
        draft("mine", str(images), "/nowhere")
