"""The tower deployment's class, without Ray."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sae_ray.serve.config import ServeConfig
from sae_ray.serve.tower import Tower

from sae_ray.errors import UsageError
from sae_ray.steering import Intervention, LatentEdit, load_llava
from tests.jobs.test_ask import save_random_sae

from .conftest import white


@pytest.fixture(scope="module")
def tower(tiny_llava):
    return Tower.func_or_class(ServeConfig(root="nowhere", llava=tiny_llava))


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    from sae_ray.sae import load_sae

    return load_sae(save_random_sae(tmp_path_factory.mktemp("sae")))


def test_the_language_model_is_not_kept(tower):
    assert not hasattr(tower.llava.model.model, "language_model")
    assert not hasattr(tower.llava.model, "lm_head")


def test_one_edit_that_cannot_be_does_not_spoil_the_pass(tower, tiny_llava, sae):
    good = (Intervention(sae, (LatentEdit(3, "set", 5.0),)),)
    spoiling = (Intervention(sae, (LatentEdit(3, "set", 3e38), LatentEdit(4, "set", 3e38))),)
    first, refused, last = tower._forward([white()] * 3, [good, spoiling, ()])
    assert isinstance(refused, UsageError)
    llava = load_llava(tiny_llava)
    for seen, edits in ((first, good), (last, ())):
        [expected] = llava.image_embeddings([white()], [edits])
        torch.testing.assert_close(torch.from_numpy(seen), expected)
    assert not np.array_equal(first, last)
