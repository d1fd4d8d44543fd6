"""What every encoder is to the rest of the program: a description, a check of sites, and a tap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, assert_never

import numpy as np
import torch
from torch import Tensor, nn

from sae_ray.errors import UsageError
from sae_ray.sites import Site, select_tokens

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


@dataclass(frozen=True)
class EncoderInfo:
    """What is known of an encoder without its weights."""

    model: str
    """The specification it was asked for by."""
    revision: str | None
    """What pins the weights: the commit on the hub, the SHA-256 of a local directory's files, or open_clip's tag."""
    family: str
    """`clip`, `siglip`, `dinov2`, `dinov2_with_registers`, `llava` or `open_clip`."""
    n_layers: int
    """Blocks that have a residual stream; 0 for a convolutional tower."""
    residual_width: int | None
    """Width of the residual stream; None where there is none."""
    projection_width: int | None
    """Width of the image embedding shared with text; None where there is none."""
    pooled_width: int | None
    """Width of the pooler output; None where there is none."""
    has_cls: bool
    """Whether token 0 is a CLS token."""
    n_registers: int
    """Register tokens, which no site takes."""
    n_tokens: int
    """Length of the sequence without registers, with CLS."""
    image_size: tuple[int, int]
    """Height and width in pixels that the preprocessing yields."""

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of the patches, as the image's sides have them; of towers that have patches."""
        n_patches = self.n_tokens - self.has_cls
        rows = round((n_patches * self.image_size[0] / self.image_size[1]) ** 0.5)
        return rows, n_patches // rows

    def width(self, point: Literal["residual", "projection", "pooled"]) -> int | None:
        match point:
            case "residual":
                return self.residual_width
            case "projection":
                return self.projection_width
            case "pooled":
                return self.pooled_width
            case never:
                assert_never(never)


def check_site(info: EncoderInfo, site: Site) -> None:
    """Refuses a site that the encoder does not have.

    Raises:
        UsageError: It names what there is instead.
    """
    if info.width(site.point) is None:
        there = [point for point in ("residual", "projection", "pooled") if info.width(point) is not None]
        raise UsageError(f"point is {site.point!r}, which {info.model} does not have; it has {', '.join(there)}")
    if site.layer is not None and site.layer >= info.n_layers:
        raise UsageError(
            f"layer is {site.layer}, but {info.model} has {info.n_layers} layers; "
            f"name one from 0 to {info.n_layers - 1}"
        )
    if site.tokens == "cls" and not info.has_cls:
        raise UsageError(f"tokens is 'cls', but {info.model} has no CLS token; take mean, all or random:n")
    if site.n_random is not None and site.n_random > info.n_tokens:
        raise UsageError(
            f"tokens is {site.tokens!r}, but {info.model} has {info.n_tokens} tokens per image; ask for at most those"
        )


def site_width(info: EncoderInfo, site: Site) -> int:
    """`d_in` of the site's activations."""
    check_site(info, site)
    width = info.width(site.point)
    assert width is not None
    return width


def rows_per_image(info: EncoderInfo, site: Site) -> int:
    """How many activations the site gives per image."""
    check_site(info, site)
    if site.tokens == "all":
        return info.n_tokens
    return site.n_random or 1


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
    """The output of `blocks[i]` is the residual stream after block i: `[n, tokens, d]`, CLS and registers first."""
    embed: Callable[[Tensor], dict[str, Tensor]]
    """The whole forward: normalised pixels to `projection` and `pooled`, whichever there are, `[n, d]` each."""
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

    @torch.inference_mode()
    def tap(
        self, pixels: UInt8[Tensor, "n 3 h w"], sites: Sequence[Site], image_ids: Sequence[str], seed: int
    ) -> dict[Site, Tapped]:
        """Runs a batch and takes its activations at the sites.

        The pass stops behind the deepest residual site, unless a `projection` or `pooled` site needs the whole of it.

        Args:
            pixels: What `load_preprocess` gives, stacked.
            sites: Where to tap; all of them must exist (`check_site`).
            image_ids: One per image; `random:n` draws by them.
            seed: The study's, for `random:n`.

        Raises:
            UsageError: A site does not exist.
        """
        for site in sites:
            check_site(self.info, site)
        if len(pixels) != len(image_ids):
            raise ValueError(f"{len(pixels)} images came with {len(image_ids)} image ids")
        residual: dict[int, list[Site]] = {}
        for site in sites:
            if site.layer is not None:
                residual.setdefault(site.layer, []).append(site)
        whole = any(site.point != "residual" for site in sites)
        tapped: dict[Site, Tapped] = {}

        def hook_of(layer: int):
            def hook(module: nn.Module, args: object, stream: Float[Tensor, "n t d"]) -> None:
                for site in residual[layer]:
                    tapped[site] = self._select(site, stream, image_ids, seed)
                if not whole and layer == max(residual):
                    raise _Deepest

            return hook

        hooks = [self.tower.blocks[layer].register_forward_hook(hook_of(layer)) for layer in residual]
        try:
            embedded = self.tower.embed(self._normalise(pixels)) if sites else {}
        except _Deepest:
            embedded = {}
        finally:
            for hook in hooks:
                hook.remove()
        for site in sites:
            if site.point != "residual":
                tapped[site] = self._per_image(embedded[site.point])
        return {site: tapped[site] for site in sites}

    def _normalise(self, pixels: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        mean = torch.tensor(self.tower.mean, device=self.device).view(3, 1, 1)
        std = torch.tensor(self.tower.std, device=self.device).view(3, 1, 1)
        # In place: making room anew for each of these took as long as the arithmetic.
        return pixels.to(self.device).float().mul_(self.tower.rescale).sub_(mean).div_(std).to(self.dtype)

    def _select(self, site: Site, stream: Float[Tensor, "n t d"], image_ids: Sequence[str], seed: int) -> Tapped:
        if site.tokens == "mean":
            n_cls = int(self.info.has_cls)
            kept = torch.cat([stream[:, :n_cls], stream[:, n_cls + self.info.n_registers :]], dim=1)
            return self._per_image(kept.float().mean(1))
        tokens_nk = torch.from_numpy(
            np.stack([select_tokens(site, self.info.n_tokens, image_id, seed) for image_id in image_ids])
        ).to(stream.device)
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
