"""The tower deployment's class, without Ray."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from sae_ray.serve.config import ServeConfig
from sae_ray.serve.embeddings import unpacked
from sae_ray.serve.tower import Change, Tower

from sae_ray.encoders.loading import load_preprocess
from sae_ray.errors import UsageError
from sae_ray.steering import Condition, Intervention, LatentEdit, load_llava
from sae_ray.store.files import Folder
from tests.jobs.test_ask import save_random_sae

from .conftest import white


def tower_of(llava: str, dtype: str = "float32") -> Any:
    return Tower.func_or_class(ServeConfig(root="nowhere", llava=llava, dtype=dtype))


@pytest.fixture(scope="module")
def tower(tiny_llava):
    return tower_of(tiny_llava)


@pytest.fixture(scope="module")
def pixels(tiny_llava) -> list[np.ndarray]:
    """Two images as they travel from the API."""
    preprocess, dice = load_preprocess(tiny_llava), np.random.default_rng(0)
    noise = Image.fromarray(dice.integers(0, 256, (61, 37, 3), np.uint8))
    return [preprocess(white()), preprocess(noise)]


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    from sae_ray.sae import load_sae

    return load_sae(save_random_sae(tmp_path_factory.mktemp("sae")))


def test_the_language_model_is_not_kept(tower):
    assert not hasattr(tower.llava.model.model, "language_model")
    assert not hasattr(tower.llava.model, "lm_head")


def test_one_edit_that_cannot_be_does_not_spoil_the_pass(tower, tiny_llava, sae, pixels):
    good = (Intervention(sae, (LatentEdit(3, "set", 5.0),)),)
    spoiling = (Intervention(sae, (LatentEdit(3, "set", 3e38), LatentEdit(4, "set", 3e38))),)
    first, refused, last = tower._forward(pixels[:1] * 3, [good, spoiling, ()])
    assert isinstance(refused, UsageError)
    llava = load_llava(tiny_llava)
    for seen, edits in ((first, good), (last, ())):
        [expected] = llava.image_embeddings([white()], [edits])
        # Beside others an image passes products of another shape, which add up in another order.
        torch.testing.assert_close(torch.from_numpy(seen), expected, rtol=1e-5, atol=1e-4)
    assert not np.array_equal(first, last)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_embeddings_arrive_as_they_are_in_the_models_dtype(tiny_llava, sae, pixels, dtype):
    tower, chain = tower_of(tiny_llava, dtype), (Intervention(sae, (LatentEdit(3, "set", 5.0),)),)
    images, edits = [pixels[0], pixels[1], pixels[1]], [chain, (), chain]
    sent = tower._forward(images, edits)
    seen = [unpacked(pickle.loads(pickle.dumps(one, protocol=5))) for one in sent]
    assert [one.dtype for one in seen] == [tower.llava.dtype] * 3
    for one, expected in zip(seen, tower.llava.image_embeddings(images, edits), strict=True):
        assert torch.equal(one, expected)


def test_an_embedding_is_sent_without_the_rest_of_its_batch(tower, pixels):
    sent = tower._forward(pixels * 4, [()] * 8)
    parts: list[pickle.PickleBuffer] = []
    pickle.dumps(sent[3], protocol=5, buffer_callback=parts.append)
    assert sum(part.raw().nbytes for part in parts) == sent[3].nbytes


def test_every_image_of_a_batch_gets_an_embedding_per_change(tower, tiny_llava, sae, tmp_path, pixels):
    folder = Folder(save_random_sae(tmp_path))
    folder.write_parquet("latents.parquet", pa.table({"latent": np.arange(sae.d_sae), "max_token": np.ones(sae.d_sae)}))
    change = Change(folder, (LatentEdit(3, "set", 5.0, "max"),), "drop", False)
    steered = tower._intervention(change)
    condition = Condition(5, 0.2, "max")
    partly = tower._intervention(Change(folder, change.edits, "keep", True, condition, (2, 3, 16)))
    assert (partly.tokens, partly.when, partly.error, partly.isolate) == ((2, 3, 16), condition, "keep", True)
    ways = [[(), (steered,)], [(steered,), (partly,)]]
    batch = Tower.func_or_class._embed_batch.__wrapped__
    found = asyncio.run(batch(tower, pixels, ways))
    llava = load_llava(tiny_llava)
    for image, seen, chains in zip(pixels, found, ways, strict=True):
        for one, chain in zip(seen, chains, strict=True):
            [expected] = llava.image_embeddings([image], [chain])
            torch.testing.assert_close(unpacked(one), expected, rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def patch(tiny_llava, tmp_path_factory) -> str:
    """Takes a latent out of the projector of the tiny LLaVA."""
    from sae_ray.editing import make_patch, save_patch
    from tests.editing.conftest import random_sae

    file = str(tmp_path_factory.mktemp("patch") / "p.safetensors")
    save_patch(make_patch(tiny_llava, random_sae(32), 5, sae_name="runs/sae-layer1"), file)
    return file


def test_an_edited_tower_embeds_as_the_edited_llava(tiny_llava, patch, pixels, sae):
    from sae_ray.editing import load_edited

    chains = [(), (Intervention(sae, (LatentEdit(3, "set", 5.0),)),)]
    config = ServeConfig(root="nowhere", llava=tiny_llava, edit=patch)
    sent = Tower.func_or_class(config)._forward([pixels[1]] * 2, chains)
    expected = load_edited(tiny_llava, patch).image_embeddings([pixels[1]] * 2, chains)
    plain = load_llava(tiny_llava).image_embeddings([pixels[1]] * 2, chains)
    for one, edited, unedited in zip(sent, expected, plain, strict=True):
        assert torch.equal(unpacked(one), edited)
        assert not torch.allclose(edited, unedited, rtol=1e-2, atol=1e-2)


def test_a_tower_of_other_weights_refuses_the_patch(make_llava, patch, tmp_path):
    other = make_llava(tmp_path / "other", layer=-1)
    with pytest.raises(UsageError, match=r"the patch was made for .* make it again"):
        Tower.func_or_class(ServeConfig(root="nowhere", llava=other, edit=patch))
