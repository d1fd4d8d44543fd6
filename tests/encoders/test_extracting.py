"""Activations of images without a study."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import sae_ray
from sae_ray import extract, train_sae
from sae_ray.errors import SaeRayError, UsageError
from sae_ray.store.activations import ActivationStore
from sae_ray.study.plan import StudyPlan

QUIET = {"device": "cpu", "progress": False}


def test_it_is_what_a_study_extracts(small_study: Path, plan_small_study: Callable[[Path], StudyPlan]):
    """In its stored dtype, broken image included; its batches are others."""
    plan = plan_small_study(small_study)
    images = plan.images["train"]
    sites = ["layer1:all", "pooled", "layer0:cls"]
    found = extract(images.path, plan.encoder.model, sites, store_dtype="float16", batch_size=16, **QUIET)
    assert found.image_ids == images.manifest["image_id"].to_pylist()
    assert list(found.rejects) == ["red/broken.png"]
    of_study = {one.site.name: one for one in plan.extracts if one.images is images and one.field == "encoder.model"}
    for site in sites:
        store = ActivationStore(of_study[site.replace(":", ".")].step.folder)
        index, token, rows = (np.concatenate(some) for some in zip(*map(store.read, store.parts), strict=True))
        mine = found.rows[site]
        assert np.array_equal(mine.image_index, index)
        assert np.array_equal(mine.token, token)
        np.testing.assert_allclose(mine.activation.astype(float), rows.astype(float), rtol=2e-3, atol=1e-3)


def test_images_of_any_kind(tmp_path: Path, tiny_clip: str):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)) for _ in range(5)]
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    expected = extract(tmp_path, tiny_clip, "projection", **QUIET)["projection"]
    column = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    series = pd.Series(paths, index=range(5, 10))
    for some in (images, paths, [str(path) for path in paths], column["image"], [images[0], *paths[1:]], series):
        assert np.array_equal(extract(some, Path(tiny_clip), "projection", **QUIET)["projection"], expected)
    broken = extract([tmp_path / "nowhere.png", *paths], tiny_clip, "layer1:random:2", **QUIET)
    assert repr(broken) == "Extracted(6 images, 1 rejects, {'layer1:random:2': [10, 32]})"
    with pytest.raises(UsageError, match="site = 'projection': choose one that was asked for: layer1:random:2"):
        broken["projection"]
    assert broken.rejects == {str(tmp_path / "nowhere.png"): "could not be read: No such file or directory"}
    table = broken.table("layer1:random:2")
    assert table["image_index"].to_pylist() == [one for one in range(1, 6) for _ in range(2)]
    assert table["image_id"].to_pylist()[:3] == [str(paths[0]), str(paths[0]), str(paths[1])]
    assert train_sae(broken["layer1:random:2"], k=2, steps=5, batch_size=4, progress=False).d_in == 32
    # What it gives goes into a study.
    train, heldout = table.slice(0, 6), table.slice(6)
    imported = sae_ray.import_activations(
        tmp_path / "root", "mine", train, heldout, column="activation", images=train, heldout_images=heldout
    )
    assert imported.sites["mine"].rows_per_image == 2


def test_the_pages_example_runs(small_study: Path, tiny_clip: str):
    page = (Path(__file__).parents[2] / "docs" / "notebooks.md").read_text(encoding="utf-8")
    [example] = [one for one in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if "extract(" in one]
    here = {"~/photos": small_study / "train", "openai/clip-vit-base-patch32": tiny_clip, "layer10": "layer1"}
    for theirs, ours in (here | {"k=16": "k=4, steps=5"}).items():
        example = example.replace(theirs, str(ours))
    scope: dict = {}
    exec(example, scope)
    assert (scope["sae"].d_in, len(scope["found"].rejects)) == (16, 1)


def test_what_cannot_be_is_named(tmp_path: Path, tiny_clip: str):
    with pytest.raises(UsageError, match="there is no image folder"):
        extract(tmp_path / "nowhere", tiny_clip, "projection", **QUIET)
    with pytest.raises(UsageError, match="images = 'list': give a folder, or a list of paths"):
        extract([], tiny_clip, "projection", **QUIET)
    with pytest.raises(UsageError, match="images = 'DataFrame': give one of its columns"):
        extract(pd.DataFrame({"path": ["a.png"]}), tiny_clip, "projection", **QUIET)
    with pytest.raises(UsageError, match="layer is 7, but"):
        extract(tmp_path, tiny_clip, "layer7:cls", **QUIET)
    with pytest.raises(UsageError, match="batch_size = 0: make it at least 1"):
        extract(tmp_path, tiny_clip, "projection", batch_size=0)
    with pytest.raises(UsageError, match="model = '': name the encoder"):
        extract(tmp_path, "", "projection")
    with pytest.raises(UsageError, match=r"sites = \[\]: name at least one"):
        extract(tmp_path, tiny_clip, [])
    with pytest.raises(UsageError, match="store_dtype = 'bfloat16'"):
        extract(tmp_path, tiny_clip, "projection", store_dtype="bfloat16", **QUIET)
    with pytest.raises(UsageError, match="ndarray is no Pillow image and no path"):
        extract([np.zeros((3, 3))], tiny_clip, "projection", **QUIET)
    with pytest.raises(SaeRayError, match=r"none of the 1 images can be read; .*x\.png: could not"):
        extract([tmp_path / "x.png"], tiny_clip, "projection", **QUIET)
    with pytest.raises(SaeRayError, match="none of the 2 images can be read"):  # which are one file
        extract([tmp_path / "x.png"] * 2, tiny_clip, "projection", **QUIET)
