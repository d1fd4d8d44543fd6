"""What an edit does: to the latent, to the other latents, to the writers of its direction, and to answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from sae_ray.concepts.naming import mentions, names, words_of
from sae_ray.editing.changes import RankOne, Replaced
from sae_ray.editing.operators import Mask, Operator, Projection, direction_of
from sae_ray.encoders.transformers_models import blocks_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from sae_ray.editing.patch import Patch
    from sae_ray.sae import SAE
    from sae_ray.steering.protocol import Question

EDIT = "edit.parquet"
EDIT_SCHEMA = pa.schema(
    [
        ("latent", pa.int64()),
        ("concept", pa.string()),
        ("mode", pa.string()),
        ("scope", pa.string()),
        ("keep", pa.string()),
        ("own_variance_left", pa.float64()),
        ("others_relative_change", pa.float64()),
        ("n_firing_before", pa.int64()),
        ("n_firing_after", pa.int64()),
        ("reliability", pa.float64()),
        ("locality", pa.float64()),
        ("generality", pa.float64()),
        ("unchanged", pa.float64()),
        ("own_share_by_writer", pa.map_(pa.string(), pa.float64())),
    ]
)
_ROWS = 1024
"""Activations whose dense codes are held at once."""


class OnCodes(NamedTuple):
    """What an edit does to activations, as an SAE reads them."""

    own_variance_left: float
    """Variance along û after the edit over that before; NaN if that was 0."""
    others_relative_change: float
    """‖change of all other latents' codes‖ / ‖those codes‖ (Frobenius); NaN if none of them fires."""
    n_firing_before: int
    """Activations on which the latent fires."""
    n_firing_after: int


class OnAnswers(NamedTuple):
    """What an edit does to answers; None if there is nothing to count."""

    reliability: float | None
    """Share of the images of the class, of those that were named by it, that lose the name."""
    locality: float | None
    """Share of the images of other classes, of those that were named by theirs, that keep the name."""
    generality: float | None
    """Share of the answers to other prompts about images of the class, of those that had the name, that lose it."""
    unchanged: float | None
    """Share of the answers to other prompts without the name that stay the same, word by word."""


@torch.no_grad()
def on_codes(sae: SAE, latent: int, before: Float[Tensor, "rows d_in"], after: Float[Tensor, "rows d_in"]) -> OnCodes:
    """Compares activations at the SAE's site with those of the edited model, row by row."""
    unit = direction_of(sae, latent)
    own = [(x.double().cpu() @ unit).var(correction=0) for x in (before, after)]
    fired, change, size = [0, 0], 0.0, 0.0
    for old, new in zip(before.split(_ROWS), after.split(_ROWS), strict=True):
        codes = [sae.encode(x).double() for x in (old, new)]
        for place, one in enumerate(codes):
            fired[place] += int((one[:, latent] > 0).sum())
            one[:, latent] = 0
        change += float((codes[1] - codes[0]).square().sum())
        size += float(codes[0].square().sum())
    relative = (change / size) ** 0.5 if size else float("nan")
    return OnCodes(float(own[1] / own[0]), relative, *fired)


def on_answers(
    asked: Sequence[Question],
    before: Sequence[str],
    after: Sequence[str],
    concept: str | None,
    class_name: Mapping[str, str],
    prompt: str,
) -> OnAnswers:
    """Compares the answers about images, without and with the edit.

    Args:
        asked: Questions whose `concept` is the class of the image.
        concept: The class that the latent stands for.
        class_name: Class -> its readable name.
        prompt: The one that asks for the class. All others are about something else, or ask in another way.
    """
    lost, kept, forgotten, same = [], [], [], []
    own_name = class_name.get(concept or "")
    for question, old, new in zip(asked, before, after, strict=True):
        is_own = concept is not None and question.concept == concept
        name = class_name.get(question.concept or "")
        if question.prompt == prompt:
            if name is not None and names(old, name):
                (lost if is_own else kept).append(names(new, name) != is_own)
        elif own_name is not None and mentions(old, own_name):
            if is_own:
                forgotten.append(not mentions(new, own_name))
        else:
            same.append(words_of(old) == words_of(new))
    return OnAnswers(*(float(np.mean(one)) if one else None for one in (lost, kept, forgotten, same)))


def seen_by_reader(patch: Patch, sae: SAE, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
    """What is left of activations for an edited reader, or in an edited projection's output: the unedited matrix gives
    of this what the edited one gives of `x`."""
    operator = _operator(patch, sae)
    if patch.facts.keep == "origin":
        return operator(x)
    mean = sae.b_dec.to(x)
    return operator(x) + mean - operator(mean)


def _operator(patch: Patch, sae: SAE) -> Operator:
    [change] = [change for name, change in patch.changes.items() if name.endswith(".weight")]
    match change:
        case RankOne():
            return Projection(direction_of(sae, patch.facts.latent))
        case Replaced(_, index, _):
            return Mask(index)


def edit_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """In `EDIT_SCHEMA`; what is missing or NaN becomes null."""
    columns = [pa.array([row.get(field.name) for row in rows], field.type, from_pandas=True) for field in EDIT_SCHEMA]
    return pa.table(columns, schema=EDIT_SCHEMA)


class WriterShares:
    """How much each writer of the residual stream writes along a direction: the variance of its output along û.

    The writers are the embeddings (with the LayerNorm that CLIP has after them) and each block's attention and MLP
    (times LayerScale in DINOv2), up to a block. Their outputs add up to the stream after it.
    """

    def __init__(self, module: nn.Module, layer: int, direction: Float[Tensor, " d"]):
        """`module` is a vision tower of transformers."""
        self._blocks = blocks_of(module)[: layer + 1]
        self._unit = direction
        self._seen: dict[str, list[Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it lasts, forward passes are counted."""
        with ExitStack() as hooks:

            def watch(name: str, writer: nn.Module) -> None:
                hooks.callback(writer.register_forward_hook(lambda _, args, out: self._add(name, out)).remove)

            first = self._blocks[0]
            hooks.callback(
                first.register_forward_pre_hook(
                    lambda _, args, kwargs: self._add("embeddings", args[0] if args else kwargs["hidden_states"]),
                    with_kwargs=True,
                ).remove
            )
            for number, block in enumerate(self._blocks):
                attention, mlp = _writers_of(block)
                watch(f"block {number} attention", attention)
                watch(f"block {number} mlp", mlp)
            yield

    def _add(self, name: str, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        self._seen.setdefault(name, []).append((tensor.double() @ self._unit.to(tensor.device)).flatten().cpu())

    def values(self) -> dict[str, Float[Tensor, " tokens"]]:
        """Writer -> what it wrote along û, token by token."""
        return {name: torch.cat(parts) for name, parts in self._seen.items()}

    def shares(self) -> dict[str, float]:
        """Writer -> its variance along û over the sum of all writers'."""
        variances = {name: float(values.var(correction=0)) for name, values in self.values().items()}
        return {name: variance / sum(variances.values()) for name, variance in variances.items()}


def _writers_of(block: Any) -> tuple[nn.Module, nn.Module]:
    """The modules whose outputs a block adds to the stream: attention and MLP."""
    if hasattr(block, "layer_scale1"):
        return block.layer_scale1, block.layer_scale2
    return block.self_attn, block.mlp
