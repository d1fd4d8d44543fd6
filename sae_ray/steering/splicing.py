"""What an encoder can still do with an SAE's reconstruction in place of its activations.

For language models this is "cross-entropy recovered". For an image encoder it is the accuracy of a classifier that
reads the encoder's output: zero-shot, by the embeddings of the classes' names, or a linear probe.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from torch.nn.functional import normalize

from sae_ray.encoders.base import Encoder
from sae_ray.encoders.sites import Site
from sae_ray.errors import UsageError
from sae_ray.sae.model import SAE
from sae_ray.steering.interventions import Intervention, TowerEdit

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8
    from torch import Tensor, nn

PROJECTION = Site("projection")
Outputs = Callable[[TowerEdit | None], "Float[Tensor, 'images d']"]
"""The encoder's output for some images, given an edit of the activations at a site."""
Classifier = Callable[["Float[Tensor, 'images d']"], "Int[Tensor, ' images']"]
"""The class of each image, given the encoder's output; -1 is no class."""


class Spliced(NamedTuple):
    """How many images a classifier gets right. Counts of different images merge."""

    n_images: int
    original: int
    """With the activations as they are."""
    reconstruction: int
    """With the SAE's reconstruction in their place, its error dropped."""
    ablation: int
    """With their mean in their place, the same for every image."""
    zero: int
    """With zeros in their place."""

    @classmethod
    def merged(cls, parts: Iterable[Self]) -> Self:
        """Over all images."""
        return cls(*map(sum, zip(*parts, strict=True)))

    @property
    def accuracy(self) -> tuple[float, float, float, float]:
        """Shares of the images: original, reconstruction, ablation, zero. NaN without images."""
        n = self.n_images or math.nan
        return self.original / n, self.reconstruction / n, self.ablation / n, self.zero / n

    @property
    def recovered(self) -> float:
        """Share of what ablation by the mean loses that the reconstruction keeps: 1 if it is as good as activations.

        NaN if ablation loses nothing, as at a site that the output does not depend on.
        """
        lost = self.original - self.ablation
        return (self.reconstruction - self.ablation) / lost if lost > 0 else math.nan


def count_spliced(
    outputs: Outputs, sae: SAE, mean: Float[Tensor, " d_in"], classify: Classifier, classes: Int[Tensor, " images"]
) -> Spliced:
    """Counts the images that are classified right, with activations, reconstructions, means and zeros.

    Args:
        outputs: `outputs_at` for images, or `outputs_of` for stored embeddings.
        sae: Of the site.
        mean: Of the site's activations, over training images.
        classify: `zero_shot` or `linear_probe`.
        classes: The class of each image; images of a negative one are left out.

    Raises:
        UsageError: the SAE or the mean does not fit the site, or the classifier the output.
    """
    if mean.shape != (sae.d_in,):
        raise UsageError(f"mean has the shape {list(mean.shape)}; the SAE takes activations of width {sae.d_in}")
    edits: tuple[TowerEdit | None, ...] = (
        None,
        Intervention(sae),
        lambda x: mean.to(x).expand_as(x),
        torch.zeros_like,
    )
    labelled = classes >= 0
    right = [int((classify(outputs(edit)).cpu() == classes.cpu())[labelled.cpu()].sum()) for edit in edits]
    return Spliced(int(labelled.sum()), *right)


def outputs_of(embeddings: Float[Tensor, "images d"]) -> Outputs:
    """For an SAE of the very output that is classified: embeddings as they are stored, at the site `projection`."""
    return lambda edit: embeddings if edit is None else edit(embeddings)


def outputs_at(
    encoder: Encoder, pixels: UInt8[Tensor, "images 3 h w"], site: Site, readout: Site = PROJECTION
) -> Outputs:
    """For an SAE of any site: the encoder runs on with the edited activations.

    A site `cls` edits the CLS token, `all` and `random:n` all tokens but registers.

    Args:
        pixels: The output of `load_preprocess`, stacked.
        readout: The output that is classified: `projection` or `pooled`.

    Raises:
        UsageError: the encoder has no such site or readout, or what is at the site does not reach the readout: the mean
            of tokens, or another output.
    """
    if site.tokens == "mean" or (site.point != "residual" and site != readout):
        raise UsageError(
            f"the site {site.name} cannot be spliced: {readout.name} is not computed from it; take the SAE of a "
            f"layer with the tokens cls, all or random:n, or one of {readout.name}"
        )
    ids = [""] * len(pixels)  # only needed to draw tokens

    def outputs(edit: TowerEdit | None) -> Tensor:
        inside = edit if site.layer is not None else None
        with contextlib.nullcontext() if inside is None else _edited(encoder, site, inside):
            output = encoder.tap(pixels, [readout], ids, seed=0)[readout].activation
        return edit(output) if edit is not None and inside is None else output

    return outputs


@contextlib.contextmanager
def _edited(encoder: Encoder, site: Site, edit: TowerEdit) -> Iterator[None]:
    """While it lasts, the tokens of a residual site are edited in every forward pass."""
    n_cls, n_registers = int(encoder.info.has_cls), encoder.info.n_registers

    def hook(module: nn.Module, args: object, stream: Float[Tensor, "n t d"]) -> Tensor:
        places = np.arange(stream.shape[1])
        places = places[:1] if site.tokens == "cls" else np.delete(places, slice(n_cls, n_cls + n_registers))
        tokens, edited = stream[:, places], stream.clone()
        edited[:, places] = edit(tokens.flatten(0, 1)).view_as(tokens)
        return edited

    assert site.layer is not None, "a residual site"
    hook_handle = encoder.tower.blocks[site.layer].register_forward_hook(hook)
    try:
        yield
    finally:
        hook_handle.remove()


def zero_shot(texts: Float[Tensor, "classes d"]) -> Classifier:
    """The class whose text embedding has the largest cosine with the image's. The norm of the output plays no part.

    Args:
        texts: Embeddings of the names of all classes, in their order, by the same model's `TextEncoder`.
    """
    return lambda output: (output.float() @ normalize(texts.float(), dim=1).to(output.device).T).argmax(1)


def linear_probe(outputs: Float[Tensor, "images d"], classes: Int[Tensor, " images"]) -> Classifier:
    """A logistic regression (L2, C = 1, standardised inputs), fitted on unedited outputs; for encoders without texts.

    Args:
        outputs: Of other images than are judged.
        classes: Their classes; images of a negative one are left out.

    Raises:
        UsageError: fewer than two classes have images.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known = classes >= 0
    if len(classes[known].unique()) < 2:
        raise UsageError("classes has fewer than two classes; a probe tells at least two apart")
    probe: Any = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(outputs[known].double().cpu().numpy(), classes[known].cpu().numpy())
    return lambda output: torch.from_numpy(probe.predict(output.double().cpu().numpy()))
