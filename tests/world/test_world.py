"""The embedded world: images are functions of their index, the shipped models are what their cards say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sae_ray.errors import UsageError
from sae_ray.world import FIRST_HELDOUT, write_world
from sae_ray.world.render import BACKGROUNDS, BLANK_RATE, COLOURS, SHAPES, SIDE, attributes, caption, render
from sae_ray.world.write import MODELS
from tools.world.data import Rendered, rendered
from tools.world.measure import clip_accuracy, judge_accuracy, llava_accuracy, raw_monosemanticity


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its modification time and inode."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


def part(images: Rendered, rows: slice) -> Rendered:
    return Rendered(images.pixels[rows], images.labels[rows], images.shown[rows])


def test_an_image_is_a_function_of_seed_and_index():
    first, again, seeded = (np.asarray(render(i, s)) for i, s in ((7, 1), (7, 1), (7, 2)))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, seeded)
    assert first.shape == (SIDE, SIDE, 3)
    code = "import sys; from sae_ray.world.render import render; sys.stdout.buffer.write(render(7, 1).tobytes())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == first.tobytes()


def test_every_attribute_is_about_as_frequent_as_the_next():
    shown = [attributes(index) for index in range(6000)]
    blank = sum(one.shape is None for one in shown)
    assert blank / len(shown) == pytest.approx(BLANK_RATE, abs=0.012)
    assert all((one.shape is None) == (one.colour is None) for one in shown)
    for position, names in enumerate((SHAPES, COLOURS, BACKGROUNDS)):
        counts = Counter(one[position] for one in shown if one.shape is not None)
        assert set(counts) == set(names)
        expected = (len(shown) - blank) / len(names)
        assert max(abs(count / expected - 1) for count in counts.values()) < 0.25


def test_blank_images_are_bare_backgrounds_white_black_and_noise():
    blanks = [(i, attributes(i)) for i in range(2000) if attributes(i).shape is None]
    flat = Counter(np.asarray(render(i)).max() for i, shown in blanks if np.asarray(render(i)).std() == 0)
    assert set(flat) == {0, 255}
    assert {shown.background for _, shown in blanks} == {*BACKGROUNDS, "noisy"}
    assert np.mean([np.asarray(render(i)).std() for i, shown in blanks if shown.background == "noisy"]) > 60


def test_the_shape_has_the_colour_that_the_caption_names():
    palette = np.array(list(COLOURS.values()))
    for index in range(60):
        shown = attributes(index)
        if shown.shape is None:
            continue
        distance = np.abs(np.asarray(render(index), float).reshape(-1, 1, 3) - palette).sum(2)
        painted = distance.argmin(1)[distance.min(1) < 60]
        assert list(COLOURS)[np.bincount(painted).argmax()] == shown.colour
        assert f"{shown.colour} {shown.shape} on a {shown.background} background" in caption(shown)


def test_the_world_is_an_ordinary_folder(tmp_path):
    write_world(tmp_path, n_train=30, n_heldout=12, processes=1)
    pictures = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    truth = {("train", i) for i in range(30)} | {("heldout", FIRST_HELDOUT + i) for i in range(12)}
    assert pictures == {f"{split}/{attributes(i).shape or 'blank'}/{i:06d}.png" for split, i in truth}
    path = tmp_path / "train" / str(attributes(3).shape) / "000003.png"
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(render(3)))
    before = snapshot(tmp_path)
    assert not [name for name in before if name.endswith(".tmp")]
    write_world(tmp_path, n_train=30, n_heldout=12, processes=1)
    assert snapshot(tmp_path) == before


def test_more_processes_write_the_same(tmp_path):
    seen = []
    write_world(tmp_path / "two", n_train=700, n_heldout=0, processes=2, progress=lambda *counts: seen.append(counts))
    write_world(tmp_path / "one", n_train=700, n_heldout=0, processes=1)
    one, two = (sorted((tmp_path / name).rglob("*.png")) for name in ("one", "two"))
    assert len(one) == 700
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert seen == [(500, 700), (700, 700)]


def test_an_interrupted_call_leaves_whole_images_and_the_next_one_finishes(tmp_path):
    script = f"from sae_ray.world import write_world; write_world({str(tmp_path)!r}, 4000, 0, processes=1)"
    with subprocess.Popen([sys.executable, "-c", script]) as writer:
        while len(list(tmp_path.glob("train/*/*.png"))) < 20:
            assert writer.poll() is None
        writer.kill()
    left = list(tmp_path.glob("train/*/*.png"))
    assert 20 <= len(left) < 4000
    for path in left:
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(render(int(path.stem))))
    kept = {path: path.stat().st_mtime_ns for path in left}
    write_world(tmp_path, n_train=len(left) + 20, n_heldout=0, processes=1)
    assert {path: path.stat().st_mtime_ns for path in left} == kept
    assert len(list(tmp_path.glob("train/*/*.png"))) == len(left) + 20


def test_a_damaged_model_is_mended(tmp_path):
    write_world(tmp_path, n_train=1, n_heldout=0)
    weights = tmp_path / "clip" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    write_world(tmp_path, n_train=1, n_heldout=0)
    assert weights.read_bytes() == whole


def test_training_images_cannot_reach_into_the_heldout_ones(tmp_path):
    with pytest.raises(UsageError, match="n_train = 40001"):
        write_world(tmp_path, n_train=40_001)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def heldout() -> Rendered:
    return rendered(FIRST_HELDOUT, FIRST_HELDOUT + 500, processes=1)


def test_the_models_are_small_and_hold_no_pickle():
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6_000_000
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md", ".jinja"}


def test_the_stated_accuracies_are_those_of_the_cards():
    measured = json.loads((MODELS / "measured.json").read_text())
    for name, figures in measured.items():
        text = (MODELS / name / "README.md").read_text()
        assert all(f"{value:.3f}" in text for value in figures["accuracy"].values())


def stated(name: str) -> dict[str, float]:
    return json.loads((MODELS / "measured.json").read_text())[name]["accuracy"]


def assert_about_as_stated(name: str, accuracy: dict[str, float]) -> None:
    """500 images: a share near .95 has a standard error of .01; the margin is four of them."""
    assert accuracy.keys() == stated(name).keys()
    for what, value in accuracy.items():
        assert value > stated(name)[what] - 0.04, (what, value)


def test_clip_names_what_it_sees(heldout):
    assert_about_as_stated("clip", clip_accuracy(MODELS / "clip", heldout))


def test_the_judge_tells_things_apart_and_raw_coordinates_mean_little_to_it(heldout):
    assert_about_as_stated("judge", judge_accuracy(MODELS / "judge", rendered(0, 1000, processes=1), heldout))
    assert raw_monosemanticity(MODELS / "clip", MODELS / "judge", heldout)["mean"] < 0.2


def test_llava_answers_its_four_questions(heldout):
    few = part(heldout, slice(0, 150))
    accuracy = llava_accuracy(MODELS / "llava", few)
    blank = accuracy.pop("blank")
    for what, value in accuracy.items():
        assert value > stated("llava")[what] - 0.08, (what, value)
    assert blank > 0.8


def test_llava_loads_without_a_missing_weight():
    from transformers import LlavaForConditionalGeneration

    loaded: Any = LlavaForConditionalGeneration.from_pretrained(MODELS / "llava", output_loading_info=True)
    assert not any(loaded[1].values()), loaded[1]


def test_llava_sees_through_the_clips_tower():
    from transformers import AutoModel, LlavaForConditionalGeneration

    tower = LlavaForConditionalGeneration.from_pretrained(MODELS / "llava").model.vision_tower.state_dict()
    clip = AutoModel.from_pretrained(MODELS / "clip").vision_model.state_dict()
    assert tower.keys() == clip.keys()
    assert all(torch.equal(tower[name], clip[name]) for name in clip)
