"""MonoSemanticity as a goal of training: of every latent, how alike the rows of a batch are on which it is active.

The score is that of `sae_ray.scores.monosemanticity`, over the rows of one batch. The idea of a loss that raises it is
that of MonoLoss (arXiv 2602.12403). Scaling a latent does not change its score, so the loss shrinks nothing: it takes
activation from rows that look unlike the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_ray.errors import SaeRayError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from sae_ray.sae.ranks import Split
    from sae_ray.sae.sparse import Pattern
    from sae_ray.store.activations import ActivationStore

_CANCELLED = 1e-6
"""Below this share of the square of their sum, what the values of a latent amount to in pairs is rounding."""


def embeddings_by_image(judge: ActivationStore, activations: ActivationStore) -> Float[Tensor, "images d"]:
    """The judge's embeddings of the images of some activations, by `image_index` and in the stored dtype.

    Raises SaeRayError if the judge could not read all of them, or gives one an embedding of length zero.
    """
    if judge.n_images != activations.n_images:
        raise SaeRayError(
            f"{judge.folder} has embeddings of {judge.n_images} images, {activations.folder} activations of "
            f"{activations.n_images}; delete both and run the extract stage again"
        )
    # Part by part: of large sets the vectors must not be there twice.
    indices = [judge.images_of_groups(number, range(len(judge.group_rows(number)))) for number in judge.parts]
    n = max((int(index.max(initial=-1)) for index in indices), default=-1) + 1
    found = np.zeros((n, judge.d), judge.config["store_dtype"])
    for number in judge.parts:
        image_index, _, vectors = judge.read(number)
        if not (lengths := np.abs(vectors).max(1)).all():
            raise SaeRayError(
                f"the judge gives the image with image_index {image_index[lengths == 0][0]} an embedding of length "
                "zero, which has no direction; remove the image or choose another judge"
            )
        found[image_index] = vectors
    return torch.from_numpy(found)


def batch_monosemanticity(
    values: Float[Tensor, " nnz"], pattern: Pattern, unit: Float[Tensor, "rows d"], split: Split
) -> Float[Tensor, ""]:
    """Mean score of the latents that are active on two rows of the batch or more, with gradients for `values`; 0 if
    there are none.

    Where ranks split the rows, scores are those over all rows. The cost grows with the number of entries.

    Args:
        values: the active entries, above 0; those that a padded pattern misses are 0.
        unit: the judge's embedding of the image that each row belongs to, of length 1.
    """
    result = _MeanScore.apply(values, pattern, unit, split)
    assert isinstance(result, torch.Tensor)
    return split.latents.joined(result)


class _MeanScore(torch.autograd.Function):
    """This rank's part of the mean over all latents. Its gradient is found at once, from the same sums."""

    @staticmethod
    def forward(ctx, values, pattern, unit, split):
        d, ones = unit.shape[1], unit.new_ones(len(unit), 1)
        sums = torch.cat(
            [
                pattern.latent_sums(values, torch.cat([unit, ones], 1)),
                pattern.latent_sums(values.square(), ones),
                pattern.latent_sums((values > 0).to(values.dtype), ones),
            ],
            dim=1,
        )
        place = torch.searchsorted(pattern.used, pattern.latents)
        if split.rows.size > 1:
            sums, place = split.rows.sum(pattern.of_used(sums).to_dense()), pattern.latents
        place = place.clamp(max=len(sums) - 1)  # of missing entries it does not matter
        weighted, total, squares, n_active = sums[:, :d], sums[:, d], sums[:, d + 1], sums[:, d + 2]
        pairs = total.square() - squares
        scored = (n_active >= 2) & (pairs > _CANCELLED * total.square())
        score = torch.where(scored, (weighted.square().sum(1) - squares) / pairs, 0.0)
        share = torch.where(scored, 1 / (pairs * split.latents.sum(scored.sum()).clamp(min=1)), 0.0)
        likeness = type(pattern)(pattern.rows, place, pattern.n_rows, len(sums)).dots(unit, weighted)
        gradient = 2 * share[place] * (likeness - values - score[place] * (total[place] - values))
        # Gradients are averaged over ranks that split the rows; each has found those of its own entries.
        ctx.save_for_backward(split.rows.size * gradient * (values > 0))
        return (score * share * pairs).sum()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None, None
