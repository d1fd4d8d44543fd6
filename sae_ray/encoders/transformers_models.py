"""Encoders that transformers loads: CLIP, SigLIP and SigLIP 2, DINOv2 (with registers too), DINOv3, ViT, and the vision
tower of a LLaVA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sae_ray.encoders.base import Tower
from sae_ray.encoders.hub import Source, find, load_weights, refusing
from sae_ray.encoders.info import EncoderInfo
from sae_ray.encoders.resizing import WHOLE, Box, Cut, cut, fast_resize, size_with_shortest
from sae_ray.encoders.sources import FORMS
from sae_ray.errors import UsageError, check

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from PIL import Image

FAMILIES = (
    "CLIP, SigLIP and SigLIP 2 (fixed resolution), DINOv2 (with or without registers), DINOv3 (ViT), ViT, and LLaVA "
    "with a tower of these without registers"
)
LLAVA_TOWERS = ("clip_vision_model", "siglip_vision_model", "dinov2", "vit")
"""Model types of a LLaVA's tower. It would take registers for parts of an image."""
TEXT_TYPES = ("clip", "siglip")
"""Model types that also embed texts."""
_LLAVA_TOWER = r"^(?:model\.)?vision_tower\.(?:vision_model\.)?"
"""Prefixes of the tower's weights in a LLaVA: on the hub, and as various versions of transformers save them."""


class _Plan(NamedTuple):
    """How the vision tower of a checkpoint is loaded."""

    family: str
    loader: str
    """Name of the transformers class."""
    config: Any
    """That class's configuration."""
    projection_width: int | None = None
    pooled: bool = True
    key_mapping: dict[str, str] | None = None
    """Renames the checkpoint's weights to the class's."""
    arguments: Mapping[str, Any] = MappingProxyType({})
    """Of the class, besides its configuration."""


def describe(model: str, revision: str | None) -> EncoderInfo:
    return describe_found(model, find(model, revision, FORMS))


def describe_found(model: str, source: Source) -> EncoderInfo:
    """The same for a model whose configuration has been read: reading it costs more than the rest."""
    with refusing(source.model, FORMS):
        plan = _plan(source.model, source.config)
        height, width = _preprocess(source).image_size()
    vision = plan.config
    if plan.loader.startswith(("CLIP", "Siglip", "ViT")) and (height, width) != (vision.image_size, vision.image_size):
        raise UsageError(
            f"{source.model} takes images of {vision.image_size} × {vision.image_size} pixels, but its preprocessing "
            f"yields {height} × {width}; fix preprocessor_config.json"
        )
    has_cls = not plan.loader.startswith("Siglip")
    return EncoderInfo(
        model=model,
        revision=source.revision,
        family=plan.family,
        n_layers=vision.num_hidden_layers,
        residual_width=vision.hidden_size,
        projection_width=plan.projection_width,
        pooled_width=vision.hidden_size if plan.pooled else None,
        has_cls=has_cls,
        n_registers=getattr(vision, "num_register_tokens", 0),
        n_tokens=has_cls + (height // vision.patch_size) * (width // vision.patch_size),
        image_size=(height, width),
        has_text=source.config.model_type in TEXT_TYPES,
    )


@dataclass(frozen=True)
class Preprocess:
    """Resizes and crops as the model's own processor does, or nearly so but faster."""

    processor: Any
    plain: bool
    """Whether the processor resizes, perhaps crops, and does no more to the shape of an image."""
    fast: bool
    early: bool = False
    """Whether the processor rescales before it resizes, as DINOv3's does. Values are then rounded to whole ones, which
    changes each by half a grey level at most."""

    def __call__(self, image: Image.Image) -> UInt8[np.ndarray, "3 h w"]:
        processor = self.processor
        if self.early:
            scaled = processor(image, do_normalize=False, return_tensors="np")["pixel_values"][0]
            return np.rint(scaled / scale_factor(processor)).clip(0, 255).astype(np.uint8)
        if not self.plain:
            return processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
        # The same steps. The processor would turn the image into an array and back, which costs as much as resizing it.
        size, resample = _target(processor.size, image.size), processor.resample
        resized = fast_resize(image, size, resample) if self.fast else image.resize(size, resample)
        pixels = np.asarray(resized).transpose(2, 0, 1)
        crop = processor.crop_size
        if not processor.do_center_crop or pixels.shape[1:] == (crop.height, crop.width):
            return pixels
        return processor.center_crop(pixels, crop)

    def view(self, size: tuple[int, int]) -> Box:
        """The part that comes out of an image of this width and height; where it is padded, that exceeds the image.

        Raises:
            UsageError: The processor does more than resizing and cropping.
        """
        if not self.plain:
            kind = type(self.processor).__name__
            raise UsageError(f"regions need a model that resizes and crops images; {kind} does more, so name tokens")
        if not self.processor.do_center_crop:
            return WHOLE
        (width, height), crop = _target(self.processor.size, size), self.processor.crop_size
        left, top = (width - crop.width) // 2, (height - crop.height) // 2
        return Box(left / width, top / height, (left + crop.width) / width, (top + crop.height) / height)

    def cut(self, size: tuple[int, int]) -> Cut | None:
        """As `Preprocessing.cut`."""
        if not self.plain:
            return None
        processor, crop = self.processor, self.processor.crop_size
        middle = (crop.height, crop.width) if processor.do_center_crop else None
        return cut(_target(processor.size, size), processor.resample, middle, to_even=False)

    def image_size(self) -> tuple[int, int]:
        """Height and width of what comes out.

        Raises:
            UsageError: The size depends on the image.
        """
        from PIL import Image

        wide, tall = (self(Image.new("RGB", size)) for size in ((64, 32), (32, 64)))
        if wide.shape != tall.shape or wide.ndim != 3:
            raise UsageError(
                f"preprocessing gives {wide.shape} for a wide and {tall.shape} for a tall image; "
                "it must crop or resize all images to one size; fix preprocessor_config.json"
            )
        return wide.shape[1], wide.shape[2]


def _is_plain(processor: Any) -> bool:
    from transformers.image_processing_backends import PilBackend

    own = ("process_image", "resize", "center_crop", "_preprocess")
    unchanged = all(getattr(type(processor), name, None) is getattr(PilBackend, name) for name in own)
    size = processor.size
    sized = (size.height and size.width) or (size.shortest_edge and not size.longest_edge)
    return bool(unchanged and processor.do_resize and not processor.do_pad and sized)


def _target(wanted: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height that a plain processor resizes an image of this width and height to."""
    if wanted.height and wanted.width:
        return wanted.width, wanted.height
    return size_with_shortest(size, wanted.shortest_edge)


def preprocess(model: str, revision: str | None, fast: bool = False) -> Preprocess:
    return _preprocess(find(model, revision, FORMS), fast)


def _preprocess(source: Source, fast: bool = False) -> Preprocess:
    from transformers import AutoImageProcessor

    with refusing(source.model, FORMS, of_hub=source.commit is not None):
        processor = AutoImageProcessor.from_pretrained(source.path, revision=source.commit, backend="pil")
    return resizing(processor, fast)


def resizing(processor: Any, fast: bool = False) -> Preprocess:
    from transformers.image_processing_backends import PilBackend

    return Preprocess(processor, _is_plain(processor), fast, early=not isinstance(processor, PilBackend))


def load(info: EncoderInfo, device: torch.device, dtype: torch.dtype) -> Tower:
    source = find(info.model, info.revision, FORMS)
    plan = _plan(source.model, source.config)
    settings = {"config": plan.config, "key_mapping": plan.key_mapping, **plan.arguments}
    module = load_weights(source, plan.loader, device, dtype, FORMS, **settings)
    processor = _preprocess(source).processor
    return Tower(
        module,
        blocks=blocks_of(module),
        embed=lambda pixels: _embed(module, plan, pixels),
        **scale_of(source.model, processor)._asdict(),
    )


class Scale(NamedTuple):
    """How a processor brings uint8 pixels to a model's scale: times `rescale`, minus `mean`, divided by `std`."""

    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


def scale_factor(processor: Any) -> float:
    """What a processor multiplies values with before it normalises them."""
    return processor.rescale_factor if processor.do_rescale else 1.0


def scale_of(model: str, processor: Any) -> Scale:
    """Raises UsageError, which names the model, for channels that cannot be."""
    rescale = scale_factor(processor)
    if not processor.do_normalize:
        return Scale(rescale, (0.0,) * 3, (1.0,) * 3)
    return Scale(rescale, _channels(model, processor, "image_mean"), _channels(model, processor, "image_std"))


def _plan(model: str, config: Any) -> _Plan:
    match config.model_type:
        case "clip":
            vision = config.vision_config
            vision.projection_dim = config.projection_dim  # the outer one sized the weights
            return _Plan("clip", "CLIPVisionModelWithProjection", vision, config.projection_dim)
        case "clip_vision_model" if "CLIPVisionModelWithProjection" in (config.architectures or ()):
            return _Plan("clip", "CLIPVisionModelWithProjection", config, config.projection_dim)
        case "clip_vision_model":
            return _Plan("clip", "CLIPVisionModel", config)
        case "siglip":
            # SigLIP compares the pooler output itself with text.
            plan = _plan(model, config.vision_config)
            return plan._replace(projection_width=plan.config.hidden_size if plan.pooled else None)
        case "siglip_vision_model":
            return _Plan("siglip", "SiglipVisionModel", config, pooled=getattr(config, "vision_use_head", True))
        case "siglip2" | "siglip2_vision_model":
            raise UsageError(
                f"{model} is a NaFlex model, which has other numbers of tokens for images of other shapes; name a "
                "SigLIP 2 of fixed resolution, such as google/siglip2-base-patch16-224"
            )
        case "vit":
            # Most checkpoints have no weights of the pooler; what their classifier reads is the CLS token.
            return _Plan("vit", "ViTModel", config, arguments={"add_pooling_layer": False})
        case "dinov3_vit":
            return _Plan("dinov3_vit", "DINOv3ViTModel", config)
        case "dinov2":
            return _Plan("dinov2", "Dinov2Model", config)
        case "dinov2_with_registers":
            return _Plan("dinov2_with_registers", "Dinov2WithRegistersModel", config)
        case "llava" if config.vision_config.model_type in LLAVA_TOWERS:
            plan = _plan(model, config.vision_config)
            return plan._replace(family="llava", key_mapping={_LLAVA_TOWER: ""})
        case other:
            raise UsageError(f"{model} is of the model type {other}; encoders are {FAMILIES}")


def blocks_of(module: Any) -> list[nn.Module]:
    """The blocks of a vision tower whose outputs are its residual stream."""
    tower = getattr(module, "vision_model", module)
    # Beside the embeddings in a module of its own, but for ViT.
    holder = getattr(tower, "encoder", None) or getattr(tower, "model", tower)
    return list(holder.layer if hasattr(holder, "layer") else holder.layers)


def _embed(module: Any, plan: _Plan, pixels: Tensor) -> dict[str, Tensor]:
    if plan.loader == "CLIPVisionModelWithProjection":
        pooled = module.vision_model(pixel_values=pixels).pooler_output
        return {"pooled": pooled, "projection": module.visual_projection(pooled)}
    output = module(pixel_values=pixels)
    pooled = output.last_hidden_state[:, 0] if plan.loader == "ViTModel" else output.pooler_output
    return {"pooled": pooled, "projection": pooled}


def _channels(model: str, processor: Any, name: str) -> tuple[float, ...]:
    value: float | Sequence[float] = getattr(processor, name)
    channels = (value,) * 3 if isinstance(value, float | int) else tuple(value)
    check(len(channels) == 3 and (name != "image_std" or all(channels)), f"{name} of {model}", value,
          "give one number per channel, none of them 0; fix preprocessor_config.json")  # fmt: skip
    return channels
