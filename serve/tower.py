"""The tower deployment: vision tower, interventions and projector, for batches of differently steered images."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from ray import serve

from sae_ray.errors import UsageError
from sae_ray.sae import SAE, load_sae
from sae_ray.steering import Intervention, LatentEdit, TowerEdit, load_llava, load_max_token
from sae_ray.store.files import Folder

from .config import ServeConfig

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from PIL import Image
    from torch import Tensor


@dataclass(frozen=True)
class Change:
    """What to do to an image: an `Intervention` without the SAE's weights."""

    folder: Folder
    """The SAE's folder."""
    edits: tuple[LatentEdit, ...]
    error: str
    isolate: bool


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
        self.llava = load_llava(config.model, config.revision, config.device, config.dtype)
        # The language model has its own deployment. If that is on the same GPU, it needs the memory.
        del self.llava.model.model.language_model, self.llava.model.lm_head
        torch.cuda.empty_cache()
        self._saes: OrderedDict[Folder, _Sae] = OrderedDict()
        self._most_saes = config.tower.saes_in_memory
        self._thread = ThreadPoolExecutor(1)  # slow work runs here, so that the event loop stays free
        batching: Any = self._embed_batch
        batching.set_max_batch_size(config.tower.batch_size)
        batching.set_batch_wait_timeout_s(config.tower.batch_wait_s)

    async def embed(
        self, pixels: UInt8[np.ndarray, "height width 3"], change: Change | None
    ) -> Float[np.ndarray, "patches hidden"]:
        """The image's embedding, as the language model gets it.

        Raises UsageError for an invalid edit.
        """
        edits = () if change is None else (await self._in_thread(self._intervention, change),)
        embedding: Any = await self._embed_batch(_image(pixels), edits)  # type: ignore  # Serve batches single calls
        if isinstance(embedding, UsageError):
            raise embedding
        return embedding

    async def ping(self) -> None:
        """Succeeds once a replica is running."""

    async def inspect(self, pixels: UInt8[np.ndarray, "height width 3"], folder: Folder, most: int) -> Look:
        """What the tower sees of an image, and the latents with the largest values on any patch."""
        return await self._in_thread(self._inspect, _image(pixels), folder, most)

    @serve.batch  # pyright: ignore[reportArgumentType, reportCallIssue]  # its stubs do not cover methods
    async def _embed_batch(
        self, images: list[Image.Image], edits: list[Sequence[TowerEdit]]
    ) -> list[Float[np.ndarray, "patches hidden"] | UsageError]:
        return await self._in_thread(self._forward, images, edits)

    def _forward(self, images: Sequence[Image.Image], edits: Sequence[Sequence[TowerEdit]]) -> list:
        try:
            found = self.llava.image_embeddings(images, edits)
        except UsageError as error:
            if len(images) == 1:
                return [error]
            # One invalid edit fails the whole pass: run the images one by one, so that only its request fails.
            return [self._forward([image], [chain])[0] for image, chain in zip(images, edits, strict=True)]
        # Copies, since a slice of a batch would be serialised with the whole batch.
        return [one.float().cpu().numpy().copy() if one.isfinite().all() else _not_finite() for one in found]

    def _intervention(self, change: Change) -> Intervention:
        loaded = self._load(change.folder)
        return Intervention(
            loaded.sae,
            change.edits,
            error=change.error,  # type: ignore[arg-type]  # checked there
            isolate=change.isolate,
            max_token=loaded.max_token,
        )

    @torch.no_grad()
    def _inspect(self, image: Image.Image, folder: Folder, most: int) -> Look:
        sae, tokens = self._load(folder).sae, []

        def look(x: Tensor) -> Tensor:
            tokens.append(x)
            return x

        self.llava.image_embeddings([image], [[look]])
        patches = tokens[0][int(self.llava.info.has_cls) :]
        codes = sae.encode_sparse(patches.to(sae.device))
        latents, place = codes.latents.unique(return_inverse=True)
        values = torch.zeros(len(latents), len(patches), device=sae.device)
        values[place, codes.rows] = codes.values.to(values)
        grid = self.llava.info.patch_grid
        strongest = values.amax(dim=1).argsort(descending=True, stable=True)[:most].tolist()
        active = [Active(int(latents[one]), values[one].reshape(grid).cpu().numpy().copy()) for one in strongest]
        return Look(self.llava.seen(image), active)

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


def _image(pixels: UInt8[np.ndarray, "height width 3"]) -> Image.Image:
    from PIL import Image

    return Image.fromarray(pixels)
