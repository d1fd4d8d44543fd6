"""Sites: their names, their refusals, and the random choice of tokens."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_ray.encoders.sites import Site, select_tokens
from sae_ray.errors import UsageError


@pytest.mark.parametrize(
    ("text", "site", "name"),
    [
        ("layer22:cls", Site("residual", 22, "cls"), "layer22.cls"),
        ("layer0:all", Site("residual", 0, "all"), "layer0.all"),
        ("layer3:mean", Site("residual", 3, "mean"), "layer3.mean"),
        ("layer22:random:2", Site("residual", 22, "random:2"), "layer22.random-2"),
        ("layer22.mlp:random:2", Site("mlp", 22, "random:2"), "layer22.mlp.random-2"),
        ("projection", Site("projection"), "projection"),
        ("pooled", Site("pooled"), "pooled"),
    ],
)
def test_a_site_is_written_named_and_rebuilt(text, site, name):
    assert Site.parse(text) == site
    assert site.name == name
    assert {site: 1}[Site(**dataclasses.asdict(site))] == 1


@pytest.mark.parametrize(
    ("point", "layer", "tokens", "words"),
    [
        ("logits", None, "image", "point is 'logits'; it must be residual, mlp, projection or pooled"),
        ("residual", None, "cls", "layer is None"),
        ("residual", -1, "cls", "layer is -1"),
        ("residual", True, "cls", "layer is True"),
        ("residual", "22", "cls", "layer is '22'"),
        ("mlp", None, "all", "layer is None; a mlp site names its block"),
        ("mlp", 1, "image", "tokens is 'image'; for a mlp site"),
        ("residual", 1, "image", "tokens is 'image'; .* cls, mean, all or random:n"),
        ("residual", 1, "random:0", "tokens is 'random:0'"),
        ("residual", 1, "random:02", "tokens is 'random:02'"),
        ("residual", 1, "random:-1", "tokens is 'random:-1'"),
        ("projection", 1, "image", "layer is 1; a projection site has no layer"),
        ("pooled", None, "cls", "tokens is 'cls'; a pooled site has one vector per image"),
    ],
)
def test_sites_that_make_no_sense_are_refused(point, layer, tokens, words):
    with pytest.raises(UsageError, match=words):
        Site(point, layer, tokens)


@pytest.mark.parametrize(
    "text", ["layer22", "22:cls", "layer:cls", "layer-1:cls", "layer2.cls", "", "layer2:", "layer2.fc:all"]
)
def test_text_of_another_form_is_refused(text):
    with pytest.raises(UsageError, match="write layer<number>:<tokens>"):
        Site.parse(text)


def test_fixed_selections():
    assert select_tokens(Site("residual", 0, "cls"), 17, "a", 0).tolist() == [0]
    assert select_tokens(Site("residual", 0, "all"), 4, "a", 0).tolist() == [0, 1, 2, 3]


@given(st.integers(1, 300), st.integers(1, 300), st.text(max_size=20), st.integers(-(2**63), 2**63))
def test_random_tokens_are_distinct_sorted_in_range_and_repeatable(n_tokens, n, image_id, seed):
    site = Site("residual", 5, f"random:{n}")
    if n > n_tokens:
        with pytest.raises(UsageError, match=f"ask for at most {n_tokens}"):
            select_tokens(site, n_tokens, image_id, seed)
        return
    tokens = select_tokens(site, n_tokens, image_id, seed).tolist()
    assert len(tokens) == n
    assert tokens == sorted(set(tokens))
    assert set(tokens) <= set(range(n_tokens))
    assert tokens == select_tokens(Site("residual", 9, f"random:{n}"), n_tokens, image_id, seed).tolist()


def test_random_tokens_are_spread_evenly_over_the_sequence_with_cls():
    site = Site("residual", 0, "random:2")
    drawn = np.concatenate([select_tokens(site, 17, f"{i}.png", 0) for i in range(8500)])
    counts = np.bincount(drawn, minlength=17)
    # 1000 expected of each; six standard deviations of a binomial count are about 180.
    assert counts.min() > 820
    assert counts.max() < 1180


def test_the_draw_does_not_change_between_versions():
    """A stored activation must be found again at the same token years later."""
    site = Site("residual", 22, "random:4")
    assert select_tokens(site, 577, "n01440764/n01440764_10026.JPEG", 0).tolist() == [188, 208, 309, 469]
