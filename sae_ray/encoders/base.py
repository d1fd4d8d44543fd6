"""A loaded vision tower, tapped at sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sae_ray.encoders.compiling import compile_blocks
from sae_ray.encoders.info import EncoderInfo, check_site
from sae_ray.encoders.sites import Site, select_tokens
from sae_ray.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def placement(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that a model is loaded to.

    Raises:
        UsageError: The dtype is not one of `DTYPES`, or this machine does not have the device.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    try:
        return torch.empty(0, device=device).device, DTYPES[dtype]
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device is {device!r}, which this machine does not offer ({error}); try cpu") from error


class Tapped(NamedTuple):
    """The activations of one batch at one site, sorted by (`position`, `token`), on the encoder's device."""

    position: Int[Tensor, " r"]
    """int64: the image's place in the batch."""
    token: Int[Tensor, " r"]
    """int16: the token's number; -1 where the row stands for the whole image."""
    activation: Float[Tensor, "r d"]
    """float32, whatever the encoder computes in."""


class Tower(NamedTuple):
    """A vision tower as a backend loads it."""

    module: nn.Module
    """Owns all weights; in eval mode, on its device, in its dtype."""
    blocks: Sequence[nn.Module]
    """The output of `blocks[i]` is the residual stream after block i: `[n, tokens, d]`, CLS and registers first. Where
    there are `mlp` sites, `blocks[i].mlp` is its MLP."""
    embed: Callable[[Tensor], dict[str, Tensor]]
    """The whole forward: normalised pixels to `projection` and `pooled`, whichever exist, `[n, d]` each."""
    rescale: float
    """Factor that brings uint8 pixels to the scale of `mean` and `std`."""
    mean: Sequence[float]
    """Per channel, subtracted after rescaling."""
    std: Sequence[float]
    """Per channel, divided by after that."""


class _Deepest(Exception):
    """Ends a forward pass once the deepest wanted layer has run."""


class Encoder:
    """A loaded vision tower that gives the activations of many sites in one forward pass."""

    def __init__(self, info: EncoderInfo, tower: Tower):
        self.info = info
        self.tower = tower
        weights = next(tower.module.parameters())
        self.device, self.dtype = weights.device, weights.dtype
        self.compiled = False
        # Made once: each copy of a few numbers would wait for the batch before.
        self._mean, self._std = (torch.tensor(of, device=self.device).view(3, 1, 1) for of in (tower.mean, tower.std))

    def compile(self) -> None:
        """Has torch compile the blocks when they first run, and again for every other number of images in a batch.

        Raises:
            UsageError: There are no blocks; later, in `tap`, this machine cannot compile them.
        """
        compile_blocks(self.tower.blocks, self.info.name)
        self.compiled = True

    @torch.inference_mode()
    def tap(
        self, pixels: UInt8[Tensor, "n 3 h w"], sites: Sequence[Site], image_ids: Sequence[str], seed: int
    ) -> dict[Site, Tapped]:
        """Runs a batch and takes its activations at the sites.

        The pass stops after the deepest site of a block, unless a `projection` or `pooled` site needs all of it.

        Args:
            pixels: The output of `load_preprocess`, stacked.
            sites: Where to tap; all of them must exist (`check_site`).
            image_ids: One per image; the draw of `random:n` depends on them.
            seed: The study's, for `random:n`.

        Raises:
            UsageError: A site does not exist.
        """
        for site in sites:
            check_site(self.info, site)
        if len(pixels) != len(image_ids):
            raise ValueError(f"{len(pixels)} images came with {len(image_ids)} image ids")
        inside: dict[tuple[int, bool], list[Site]] = {}
        for site in sites:
            if site.layer is not None:
                inside.setdefault((site.layer, site.point == "residual"), []).append(site)  # sorts as they run
        # Before the pass, so that it does not wait for them.
        tokens = {site: self._tokens(site, image_ids, seed) for of_place in inside.values() for site in of_place}
        whole = any(site.layer is None for site in sites)
        tapped: dict[Site, Tapped] = {}

        def hook_of(place: tuple[int, bool]):
            def hook(module: nn.Module, args: object, stream: Float[Tensor, "n t d"]) -> None:
                for site in inside[place]:
                    tapped[site] = self._select(stream, tokens[site])
                if not whole and place == max(inside):
                    raise _Deepest

            return hook

        hooks = [self._module(*place).register_forward_hook(hook_of(place)) for place in inside]
        try:
            embedded = self.tower.embed(self._normalise(pixels)) if sites else {}
        except _Deepest:
            embedded = {}
        finally:
            for hook in hooks:
                hook.remove()
        for site in sites:
            if site.layer is None:
                tapped[site] = self._per_image(embedded[site.point])
        return {site: tapped[site] for site in sites}

    def _module(self, layer: int, whole_block: bool) -> nn.Module:
        block: Any = self.tower.blocks[layer]
        return block if whole_block else block.mlp

    def _normalise(self, pixels: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        # In place: allocating memory for each of these took as long as the arithmetic.
        scaled = pixels.to(self.device, non_blocking=True).float().mul_(self.tower.rescale)
        return scaled.sub_(self._mean).div_(self._std).to(self.dtype)

    def _tokens(self, site: Site, image_ids: Sequence[str], seed: int) -> Int[Tensor, "n k"] | None:
        """The numbers of the tokens to take of each image; None for the mean of all."""
        if site.tokens == "mean":
            return None
        tokens_nk = np.stack([select_tokens(site, self.info.n_tokens, image_id, seed) for image_id in image_ids])
        return torch.from_numpy(tokens_nk).to(self.device, non_blocking=True)

    def _select(self, stream: Float[Tensor, "n t d"], tokens_nk: Int[Tensor, "n k"] | None) -> Tapped:
        if tokens_nk is None:
            n_cls = int(self.info.has_cls)
            kept = torch.cat([stream[:, :n_cls], stream[:, n_cls + self.info.n_registers :]], dim=1)
            return self._per_image(kept.float().mean(1))
        # Registers stand between the CLS token and the patches.
        places_nk = torch.where(tokens_nk >= self.info.has_cls, tokens_nk + self.info.n_registers, tokens_nk)
        positions_nk = torch.arange(len(stream), device=stream.device).unsqueeze(1).expand_as(tokens_nk)
        activation = stream[positions_nk, places_nk].flatten(0, 1).float()
        return Tapped(positions_nk.flatten(), tokens_nk.flatten().short(), activation)

    @staticmethod
    def _per_image(vectors: Float[Tensor, "n d"]) -> Tapped:
        n = len(vectors)
        token = torch.full((n,), -1, dtype=torch.int16, device=vectors.device)
        return Tapped(torch.arange(n, device=vectors.device), token, vectors.float())
