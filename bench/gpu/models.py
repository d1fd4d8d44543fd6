"""Models of real sizes with random weights, as the product's own classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from sae_ray.encoders.base import Encoder, Tower
from sae_ray.encoders.info import EncoderInfo
from sae_ray.encoders.transformers_models import blocks_of
from sae_ray.sae import SAE

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from bench.gpu.sizes import Sizes

CLIP_MEAN, CLIP_STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)


def make_clip(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Encoder:
    """A CLIP vision tower."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.device(device):
        module = CLIPVisionModelWithProjection._from_config(CLIPVisionConfig(**sizes.vision), dtype=dtype).eval()

    def embed(pixels: Tensor) -> dict[str, Tensor]:
        pooled = module.vision_model(pixel_values=pixels).pooler_output
        return {"pooled": pooled, "projection": module.visual_projection(pooled)}

    return Encoder(info_of(sizes, "clip"), Tower(module, blocks_of(module), embed, 1 / 255, CLIP_MEAN, CLIP_STD))


def make_llava_model(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' LLaVA that reads the last block but one, without its CLS token."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes.vision),
        text_config=LlamaConfig(**sizes.text),
        image_token_index=sizes.text["vocab_size"] - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=info_of(sizes, "llava").n_tokens - 1,
    )
    with torch.device(device):
        return LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()


def info_of(sizes: Sizes, family: str) -> EncoderInfo:
    vision = sizes.vision
    edge = vision["image_size"]
    return EncoderInfo(
        model="random", revision=None, family=family, n_layers=vision["num_hidden_layers"],
        residual_width=vision["hidden_size"], projection_width=vision["projection_dim"],
        pooled_width=vision["hidden_size"], has_cls=True, n_registers=0,
        n_tokens=1 + (edge // vision["patch_size"]) ** 2, image_size=(edge, edge), has_text=False,
    )  # fmt: skip


@torch.no_grad()
def make_sae(x: Float[Tensor, "n d_in"], d_sae: int, k: int) -> SAE:
    """A BatchTopK SAE of whose latents about `k` are active on a row like those of `x`."""
    generator = torch.Generator(x.device).manual_seed(0)
    W_dec = F.normalize(torch.randn(d_sae, x.shape[1], device=x.device, generator=generator), dim=1)
    # Of a few rows: more would not fit beside the rest.
    some = x[:256].float()
    threshold = (some @ W_dec.T).flatten().topk(k * len(some), sorted=False).values.amin()
    bias = W_dec.new_zeros
    return SAE(
        "batch_topk",
        W_dec.T.contiguous(),
        W_dec,
        bias(d_sae),
        bias(x.shape[1]),
        threshold.expand(d_sae).clone(),
        k,
    )
