"""The same questions with one edit after the other, on a small LLaVA, against answers asked for one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sae_ray.editing import load_edited, make_patch, save_patch
from sae_ray.editing.effects import on_codes
from sae_ray.editing.trial import Trial
from sae_ray.steering import Intervention, LatentEdit, load_llava
from sae_ray.steering.config import Steering
from sae_ray.steering.protocol import Question

from .conftest import random_sae

LATENT, PROMPTS = 5, ("w3 w4?", "w5 w6")


def image(index: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (30, 40, 3), np.uint8))


@pytest.fixture(scope="module")
def trial(tiny_llava) -> Trial:
    asked = [Question("unsteered", -1, "a", 0.0, index, prompt) for index in range(6) for prompt in PROMPTS]
    steering = Steering(tiny_llava, prompt=PROMPTS[0], other_prompts=PROMPTS[1:])
    return Trial(load_llava(tiny_llava), random_sae(32), asked, image, {}, steering, batch_size=5)


def unchanged(before: list[str], after: list[str]) -> float:
    return float(
        np.mean([one.lower().split() == other.lower().split() for one, other in zip(before, after, strict=True)])
    )


def answers(llava, chain=()) -> list[str]:
    return [llava.answer(image(index), PROMPTS[1], chain, 5) for index in range(6)]


@pytest.mark.parametrize("scope", ["reader", "writers"])
def test_a_patch_is_tried_as_the_edited_model_answers(trial, tiny_llava, tmp_path, scope):
    patch = make_patch(tiny_llava, trial.sae, LATENT, sae_name="s", scope=scope)
    row = trial.of_patch(patch, "a")
    save_patch(patch, tmp_path / "p.safetensors")
    edited = load_edited(tiny_llava, tmp_path / "p.safetensors")
    plain = answers(load_llava(tiny_llava))
    assert row["unchanged"] == pytest.approx(unchanged(plain, answers(edited))) != 1
    assert trial.of_patch(patch, "a") == row  # nothing of the edit stays


@pytest.mark.parametrize("error", ["drop", "keep"])
def test_a_hook_is_tried_as_steering_ablates(trial, tiny_llava, error):
    row = trial.of_hook(LATENT, "a", error)
    hook = Intervention(trial.sae, (LatentEdit(LATENT, "ablate"),), error=error)
    llava, seen = load_llava(tiny_llava), []
    assert row["unchanged"] == pytest.approx(unchanged(answers(llava), answers(llava, [hook]))) != 1
    for index in range(6):
        llava.image_embeddings([image(index)], [[lambda x: seen.append(x) or x]])
    before = torch.cat(seen)
    expected = on_codes(trial.sae, LATENT, before, torch.cat([hook(one) for one in seen]))
    assert row["others_relative_change"] == pytest.approx(expected.others_relative_change, rel=1e-3)
    assert row["n_firing_before"] == expected.n_firing_before > 0
    assert row["mode"] == f"hook, error {error}"
