"""The tower deployment: vision tower, interventions and projector, for batches of differently steered images."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from ray import serve

from sae_ray.editing import load_edited
from sae_ray.encoders.base import placement
from sae_ray.errors import UsageError
from sae_ray.host import to_host
from sae_ray.sae import SAE, load_sae
from sae_ray.steering import Condition, Intervention, LatentEdit, Llava, TowerEdit, load_llava, load_max_token
from sae_ray.store.files import Folder

from .config import ServeConfig
from .embeddings import packed

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped, UInt8
    from torch import Tensor


@dataclass(frozen=True)
class Change:
    """What to do to an image: an `Intervention` without the SAE's weights, and with the tokens of its region."""

    folder: Folder
    """The SAE's folder."""
    edits: tuple[LatentEdit, ...]
    error: str
    isolate: bool
    when: Condition | None = None
    tokens: tuple[int, ...] | None = None


class Active(NamedTuple):
    """A latent that fires on an image."""

    latent: int
    patches: Float[np.ndarray, "rows columns"]
    """Its value on every patch."""


class Look(NamedTuple):
    """An image as the tower sees it."""

    pixels: UInt8[np.ndarray, "height width 3"]
    """Resized and cropped."""
    active: list[Active]
    """The strongest latents, strongest first. Their grids of patches cover the pixels."""


class _Sae(NamedTuple):
    sae: SAE
    max_token: Tensor


@serve.deployment
class Tower:
    """Embeds images. A replica loads an SAE on first use, so that SAEs can change without a restart."""

    def __init__(self, config: ServeConfig):
        device, _ = placement(config.device, config.dtype)
        place = (config.revision, "cpu", config.dtype)
        if config.edit is None:
            whole = load_llava(config.model, *place)
        else:
            whole = load_edited(config.model, config.edit, *place)
        # The language model has its own deployment. If that is on the same GPU, it has the memory already.
        del whole.model.model.language_model, whole.model.lm_head
        self.llava = Llava(whole.info, whole.layer, whole.model.to(device), whole.processor)
        self._saes: OrderedDict[Folder, _Sae] = OrderedDict()
        self._most_saes = config.tower.saes_in_memory
        self._thread = ThreadPoolExecutor(1)  # slow work runs here, so that the event loop stays free
        batching: Any = self._embed_batch
        batching.set_max_batch_size(config.tower.batch_size)
        batching.set_batch_wait_timeout_s(config.tower.batch_wait_s)

    async def embed(
        self, pixels: UInt8[np.ndarray, "3 height width"], changes: Sequence[Change | None]
    ) -> list[Shaped[np.ndarray, "patches hidden"]]:
        """The image's embeddings, one per change, as the language model gets them: `packed`, in the model's dtype.

        Args:
            pixels: Resized and cropped by the model's own processor (`load_preprocess`).
            changes: What to do to the image; None for nothing.

        Raises UsageError for an invalid edit.
        """
        chains = [() if one is None else (await self._in_thread(self._intervention, one),) for one in changes]
        embeddings: Any = await self._embed_batch(pixels, chains)  # type: ignore  # Serve batches single calls
        for one in embeddings:
            if isinstance(one, UsageError):
                raise one
        return embeddings

    async def ping(self) -> None:
        """Succeeds once a replica is running."""

    async def inspect(self, pixels: UInt8[np.ndarray, "3 height width"], folder: Folder, most: int) -> Look:
        """What the tower sees of an image, and the latents with the largest values on any patch."""
        return await self._in_thread(self._inspect, pixels, folder, most)

    @serve.batch  # pyright: ignore[reportArgumentType, reportCallIssue]  # its stubs do not cover methods
    async def _embed_batch(
        self, images: list[UInt8[np.ndarray, "3 height width"]], chains: list[list[Sequence[TowerEdit]]]
    ) -> list[list[Shaped[np.ndarray, "patches hidden"] | UsageError]]:
        edits = [chain for of_image in chains for chain in of_image]
        shown = [image for image, of_image in zip(images, chains, strict=True) for _ in of_image]
        embeddings = iter(await self._in_thread(self._forward, shown, edits))
        return [list(islice(embeddings, len(of_image))) for of_image in chains]

    def _forward(
        self, images: Sequence[UInt8[np.ndarray, "3 height width"]], edits: Sequence[Sequence[TowerEdit]]
    ) -> list[Shaped[np.ndarray, "patches hidden"] | UsageError]:
        try:
            found = torch.stack(self.llava.image_embeddings(images, edits))
        except UsageError as error:
            if len(images) == 1:
                return [error]
            # One invalid edit fails the whole pass: run the images one by one, so that only its request fails.
            return [self._forward([image], [chain])[0] for image, chain in zip(images, edits, strict=True)]
        embeddings, finite = to_host(found, found.isfinite().flatten(1).all(1))
        return [packed(one) if fine else _not_finite() for one, fine in zip(embeddings, finite, strict=True)]

    def _intervention(self, change: Change) -> Intervention:
        loaded = self._load(change.folder)
        return Intervention(
            loaded.sae,
            change.edits,
            error=change.error,  # type: ignore[arg-type]  # checked there
            isolate=change.isolate,
            tokens=change.tokens,
            when=change.when,
            max_token=loaded.max_token,
        )

    @torch.no_grad()
    def _inspect(self, pixels: UInt8[np.ndarray, "3 height width"], folder: Folder, most: int) -> Look:
        sae, tokens = self._load(folder).sae, []

        def look(x: Tensor) -> Tensor:
            tokens.append(x)
            return x

        self.llava.image_embeddings([pixels], [[look]])
        patches = tokens[0][int(self.llava.info.has_cls) :]
        codes = sae.encode_sparse(patches.to(sae.device))
        latents, place = codes.latents.unique(return_inverse=True)
        values = torch.zeros(len(latents), len(patches), device=sae.device)
        values[place, codes.rows] = codes.values.to(values)
        grid = self.llava.info.patch_grid
        strongest = values.amax(dim=1).argsort(descending=True, stable=True)[:most].tolist()
        active = [Active(int(latents[one]), values[one].reshape(grid).cpu().numpy().copy()) for one in strongest]
        return Look(pixels.transpose(1, 2, 0), active)

    def _load(self, folder: Folder) -> _Sae:
        if folder not in self._saes:
            self._saes[folder] = _Sae(load_sae(folder).to(self.llava.device), load_max_token(folder))
        self._saes.move_to_end(folder)
        while len(self._saes) > self._most_saes:
            self._saes.popitem(last=False)
        return self._saes[folder]

    async def _in_thread(self, work, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)


def _not_finite() -> UsageError:
    return UsageError("the steered image embedding is not finite; lower the strengths")
