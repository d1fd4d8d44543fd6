"""Models of the sizes that people use, as directories in the transformers format, with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save_file

from bench.gpu.sizes import FULL, SMALL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

SHARD_BYTES = 2**29
"""Of a file of weights, about: a model is never in memory as a whole."""
RANDOM = 4_194_301
"""Different numbers, a prime, after which they repeat: to draw 7 billion would take longer than to write them."""


class RealModel(NamedTuple):
    """A model and where it is tapped."""

    name: str
    d_in: int
    """Width of its residual stream."""
    layer: int
    """From 0; the one whose activations SAEs are usually trained on."""
    write: Callable[[Path], None]


def encoders(small: bool) -> list[RealModel]:
    """Three vision encoders, in float32, as their configurations on the hub say."""
    sizes = SMALL if small else FULL
    clip_text = _sizes(32, 64, 2, 2) if small else _sizes(768, 3072, 12, 12) | {"vocab_size": 49408}
    dino = _sizes(32, 128, 3, 2) if small else _sizes(768, 3072, 12, 12)
    so400m = _sizes(32, 72, 4, 2) if small else _sizes(1152, 4304, 27, 16)
    dino_side, so400m_side = (28, 28) if small else (224, 384)
    return [
        _encoder("CLIP ViT-L/14-336", sizes.vision, -2, partial(_write_clip, sizes.vision, clip_text)),
        # Its weights are for 518 pixels, its processor crops to 224.
        _encoder("DINOv2-B/14", dino, -1, partial(_write_dino, dino, dino_side)),
        _encoder("SigLIP so400m/14-384", so400m, -2, partial(_write_siglip, so400m, so400m_side)),
    ]


def _encoder(name: str, vision: dict[str, Any], layer: int, write: Callable[[Path], None]) -> RealModel:
    return RealModel(name, vision["hidden_size"], vision["num_hidden_layers"] + layer, write)


def llava(small: bool, n_layers: int | None = None) -> RealModel:
    """LLaVA-1.5-7B, stored in float16 as on the hub: CLIP ViT-L/14-336, two linear layers, a Llama of 32 layers, or of
    `n_layers`."""
    sizes = SMALL if small else FULL
    text = sizes.text | {"num_hidden_layers": n_layers or sizes.text["num_hidden_layers"]}
    return _encoder("LLaVA-1.5-7B", sizes.vision, -2, partial(_write_llava, sizes.vision, text))


def write_weights(model: str, config: Any, folder: Path, dtype: torch.dtype) -> None:
    """The configuration, and random weights for the transformers class `model`, shard by shard."""
    import transformers

    with torch.device("meta"):
        empty = getattr(transformers, model)(config).to(dtype)
    config.architectures, config.dtype = [model], dtype
    config.save_pretrained(folder)
    numbers = torch.randn(RANDOM, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    shards = list(_shards(empty.state_dict()))
    of_name: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights = {name: _random(name, tensor, numbers) for name, tensor in shard.items()}
        save_file(weights, folder / file, metadata={"format": "pt"})
        of_name |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": of_name}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if shard and sum(one.nbytes for one in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _random(name: str, like: Tensor, numbers: Tensor) -> Tensor:
    """Matrices of small numbers; vectors as a new network has them, so that activations stay finite."""
    if like.ndim < 2:
        scales = "lambda" in name or ("norm" in name and name.endswith("weight"))
        return torch.full(like.shape, float(scales), dtype=like.dtype)
    times = -(-like.numel() // len(numbers))
    return numbers.repeat(times)[: like.numel()].view(like.shape)


def _sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate}
    return sizes | {"num_hidden_layers": layers, "num_attention_heads": heads}


def _write_clip(vision: dict[str, Any], text: dict[str, Any], folder: Path) -> None:
    from transformers import CLIPConfig

    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=vision["projection_dim"])
    write_weights("CLIPModel", config, folder, torch.float32)
    _clip_processor(vision["image_size"]).save_pretrained(folder)


def _write_dino(vision: dict[str, Any], side: int, folder: Path) -> None:
    from transformers import BitImageProcessor, Dinov2Config

    write_weights("Dinov2Model", Dinov2Config(**vision, image_size=518, patch_size=14), folder, torch.float32)
    sides = {"size": {"shortest_edge": side * 8 // 7}, "crop_size": {"height": side, "width": side}}
    BitImageProcessor(**sides).save_pretrained(folder)


def _write_siglip(sizes: dict[str, Any], side: int, folder: Path) -> None:
    from transformers import SiglipConfig, SiglipImageProcessor

    config = SiglipConfig(vision_config=sizes | {"image_size": side, "patch_size": 14}, text_config=sizes)
    write_weights("SiglipModel", config, folder, torch.float32)
    SiglipImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)


def _write_llava(vision: dict[str, Any], text: dict[str, Any], folder: Path) -> None:
    from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig

    from tools.world.make_llava import new_processor

    processor: Any = new_processor()  # the world's words are a few of the vocabulary
    processor.image_processor = _clip_processor(vision["image_size"])
    processor.patch_size = vision["patch_size"]
    tokenizer = processor.tokenizer
    text = text | {"vocab_size": max(text["vocab_size"], len(tokenizer))}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        image_token_index=processor.image_token_id,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    write_weights("LlavaForConditionalGeneration", config, folder, torch.float16)
    # No end: a random model would put it anywhere.
    GenerationConfig(bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    processor.save_pretrained(folder)


def _clip_processor(side: int) -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
