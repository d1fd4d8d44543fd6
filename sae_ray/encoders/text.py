"""Text embeddings, in a space shared with images: CLIP and SigLIP of transformers, and open_clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import normalize

from sae_ray.encoders.base import placement
from sae_ray.encoders.hub import check_tokenizer, find, load_weights, refusing
from sae_ray.encoders.info import check_text_side
from sae_ray.encoders.sources import FORMS
from sae_ray.encoders.transformers_models import TEXT_TYPES
from sae_ray.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

_BATCH = 256


class TextEncoder:
    """Embeds texts; made by `load_text_encoder`."""

    def __init__(self, embed: Callable[[list[str]], Tensor]):
        self._embed = embed

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "texts d"]:
        """Unit vectors, float32 on the CPU; compare them with the `projection` of the same model's images."""
        batches = [list(texts[start : start + _BATCH]) for start in range(0, len(texts), _BATCH)]
        return torch.cat([normalize(self._embed(batch).float().cpu(), dim=1) for batch in batches])


def load_text_encoder(model: str, revision: str | None = None, device: str = "cpu") -> TextEncoder:
    """Loads the text side of an encoder.

    Args:
        model: Its specification, as in `sae_ray.encoders`.
        revision: Pins the weights.
        device: A torch device; `meta` checks the files without reading the weights.

    Raises:
        UsageError: The encoder is unknown or cannot be reached, has no text side or tokenizer, or its weights do not
            fit.
    """
    place, dtype = placement(device, "float32")
    if model.startswith("open_clip:"):
        from sae_ray.encoders import open_clip_models

        return TextEncoder(open_clip_models.load_text(model, revision, place))
    if model.startswith("timm:"):
        from sae_ray.encoders import timm_models

        check_text_side(timm_models.describe(model, revision))
    return TextEncoder(_of_transformers(model, revision, place, dtype))


def _of_transformers(
    model: str, revision: str | None, device: torch.device, dtype: torch.dtype
) -> Callable[[list[str]], Tensor]:
    source = find(model, revision, FORMS)
    from transformers import AutoTokenizer

    kind = source.config.model_type
    if kind not in TEXT_TYPES:
        raise UsageError(
            f"{source.model} is of the model type {kind}, which does not embed texts; name a CLIP, SigLIP "
            "or open_clip model"
        )
    length = source.config.text_config.max_position_embeddings
    with refusing(source.model, FORMS, of_hub=source.commit is not None):
        tokenizer = AutoTokenizer.from_pretrained(source.path, revision=source.commit)
    check_tokenizer(source.model, tokenizer, FORMS)
    module: Any = load_weights(source, "AutoModel", device, dtype, FORMS)

    def embed(texts: list[str]) -> Tensor:
        # SigLIP was trained on texts padded to this length; to CLIP the padding makes no difference.
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return module.get_text_features(**tokens.to(device)).pooler_output

    return embed
