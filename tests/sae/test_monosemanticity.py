"""MonoSemanticity over a batch against the score itself, and its gradients against autograd of the formula."""

from __future__ import annotations

import pytest
import torch

from sae_ray.sae.monosemanticity import batch_monosemanticity
from sae_ray.sae.ranks import ALONE, Ranks, Split
from sae_ray.sae.sparse import Pattern
from sae_ray.scores import monosemanticity
from tests.sae.thread_ranks import on_ranks

ROWS, LATENTS, WIDTH = 24, 15, 6


def make() -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, with a latent on one row and one on none, and embeddings."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(ROWS, LATENTS, generator=generator, dtype=torch.float64)
    codes *= torch.rand(ROWS, LATENTS, generator=generator) < 0.3
    codes[:, 4], codes[1:, 7], codes[0, 7] = 0, 0, 0.5
    unit = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64) + 0.5
    return codes, torch.nn.functional.normalize(unit, dim=1)


def entries(codes: torch.Tensor) -> tuple[torch.Tensor, Pattern]:
    flat = codes.flatten().nonzero().squeeze(1)
    return codes.flatten()[flat], Pattern.of_flat(flat, *codes.shape)


def mean_score(codes: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """By pairs of rows, for autograd."""
    codes = codes[:, (codes > 0).sum(0) >= 2]
    pairs = codes.T.unsqueeze(2) * codes.T.unsqueeze(1) * (1 - torch.eye(len(codes)))
    return ((pairs * (unit @ unit.T)).sum((1, 2)) / pairs.sum((1, 2))).mean()


def test_it_is_the_score_over_the_rows_of_a_batch():
    codes, unit = make()
    values, pattern = entries(codes)
    found = batch_monosemanticity(values, pattern, unit, ALONE)
    assert found.item() == pytest.approx(monosemanticity(codes, 3 * unit).nanmean().item())
    torch.testing.assert_close(found, mean_score(codes, unit))
    assert batch_monosemanticity(7 * values, pattern, unit, ALONE).item() == pytest.approx(found.item())


def test_its_gradient_is_that_of_the_formula():
    codes, unit = make()
    values, pattern = entries(codes)
    values.requires_grad_()
    [found] = torch.autograd.grad(3 * batch_monosemanticity(values, pattern, unit, ALONE), values)
    codes.requires_grad_()
    [expected] = torch.autograd.grad(3 * mean_score(codes, unit), codes)
    torch.testing.assert_close(found, expected[codes > 0])


def test_ranks_find_the_score_of_the_whole_batch_and_their_part_of_its_gradient():
    codes, unit = make()
    values, pattern = entries(codes)
    values.requires_grad_()
    whole = batch_monosemanticity(values, pattern, unit, ALONE)
    [gradient] = torch.autograd.grad(whole, values)
    of_entries = torch.zeros_like(codes)
    of_entries[pattern.rows, pattern.latents] = gradient

    def by_rows(ranks: Ranks) -> None:
        part = slice(ranks.rank * ROWS // 2, (ranks.rank + 1) * ROWS // 2)
        own, own_pattern = entries(codes[part])
        own.requires_grad_()
        found = batch_monosemanticity(own, own_pattern, unit[part], Split(rows=ranks))
        [own_gradient] = torch.autograd.grad(found, own)
        torch.testing.assert_close(found, whole)
        torch.testing.assert_close(own_gradient / 2, of_entries[part][codes[part] > 0])  # averaged over ranks later

    def by_latents(ranks: Ranks) -> None:
        mine = codes[:, ranks.rank :: 2]
        own, own_pattern = entries(mine)
        own.requires_grad_()
        found = batch_monosemanticity(own, own_pattern, unit, Split(latents=ranks))
        [own_gradient] = torch.autograd.grad(found, own)
        torch.testing.assert_close(found.detach(), whole.detach())
        torch.testing.assert_close(own_gradient, of_entries[:, ranks.rank :: 2][mine > 0])

    on_ranks(2, by_rows)
    on_ranks(2, by_latents)


def test_latents_on_fewer_than_two_rows_have_none():
    codes = torch.eye(3, dtype=torch.float64)
    values, pattern = entries(codes)
    values.requires_grad_()
    found = batch_monosemanticity(values, pattern, torch.eye(3, dtype=torch.float64), ALONE)
    assert found == 0
    assert (torch.autograd.grad(found, values)[0] == 0).all()
