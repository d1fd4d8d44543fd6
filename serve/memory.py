"""How a language deployment divides the memory of its device, and for how many requests that is enough."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from sae_ray.encoders.base import DTYPES
from sae_ray.encoders.hub import find
from sae_ray.errors import UsageError
from sae_ray.host import total_memory
from sae_ray.steering.decoding import READ_TOKENS, bytes_per_token, rounded
from sae_ray.steering.llava import FORMS

from .config import Language, ServeConfig

GB = 10**9
CPU_CACHE = 2**30
"""Bytes of keys and values on a CPU, unless set: that memory is for other things, too."""
GPU_SHARE = 0.8
"""Of what weights and work leave of a GPU, for keys and values, unless set: a tower may be on the same one."""


class Memory(NamedTuple):
    """In bytes, unless it says tokens."""

    weights: int
    """Of the language model."""
    work: int
    """While prompts are read."""
    cache: int
    """Of keys and values."""
    per_token: int
    """Of the cache."""
    context: int
    """Tokens of the longest request with its answer."""

    @property
    def tokens(self) -> int:
        """How many the cache holds."""
        return self.cache // self.per_token

    @property
    def at_once(self) -> int:
        """Requests of the longest length that fit at once."""
        return self.tokens // rounded(self.context)

    def __str__(self) -> str:
        weights, cache, work = (f"{one / GB:.1f} GB" for one in (self.weights, self.cache, self.work))
        return (
            f"{weights} of weights, {cache} for keys and values, {work} for reading prompts: room for {self.tokens:,} "
            f"tokens, which is {self.at_once} at once of the longest requests ({self.context:,} tokens)"
        )


def divided(language: Language, model: Any, dtype: torch.dtype, on_gpu: bool, there: int, where: str) -> Memory:
    """Divides `there` bytes of memory.

    Args:
        model: transformers' configuration of a LLaVA.
        where: Names that memory in errors.

    Raises:
        UsageError: They are too few, or `kv_cache_mb` is too little for one request of the longest length.
    """
    text = model.text_config
    per_token = bytes_per_token(text, dtype)
    context = min(language.context or text.max_position_embeddings, text.max_position_embeddings)
    wide = 4 * text.hidden_size + 3 * getattr(text, "intermediate_size", 4 * text.hidden_size)
    work = max(READ_TOKENS, context) * (per_token + wide * dtype.itemsize)
    weights = _n_weights(model) * dtype.itemsize
    least, most = rounded(context) * per_token, language.max_running * rounded(context) * per_token
    left = there - weights - work
    if left < least:
        raise UsageError(
            f"the language model does not fit {where}: its weights take {weights / GB:.1f} GB, reading prompts "
            f"{work / GB:.1f} GB, and one request of {context:,} tokens {least / GB:.1f} GB, of {there / GB:.1f} GB; "
            f"choose a smaller language.context{', or dtype = bfloat16' if dtype.itemsize > 2 else ''}, or use another "
            "device"
        )
    if language.kv_cache_mb is None:
        cache = min(most, max(least, int(GPU_SHARE * left) if on_gpu else min(CPU_CACHE, left)))
    else:
        cache = language.kv_cache_mb * 2**20
    if not least <= cache <= left:
        raise UsageError(
            f"language.kv_cache_mb is {language.kv_cache_mb}; it must be at least {-(-least // 2**20)}, so that a "
            f"request of {context:,} tokens fits, and at most {left // 2**20}, which weights ({weights / GB:.1f} GB) "
            f"and the reading of prompts ({work / GB:.1f} GB) leave of {where} ({there / GB:.1f} GB)"
        )
    return Memory(weights, work, cache, per_token, context)


def language_memory(config: ServeConfig) -> Memory:
    """As `divided`, of this machine or its GPU, by the LLaVA's configuration alone."""
    model = find(config.model, config.revision, FORMS).config
    device, dtype = torch.device(config.device), DTYPES[config.dtype]
    if device.type == "cuda":
        there, where = torch.cuda.mem_get_info(device)[0], f"what is free of {config.device}"
    else:
        there, where = total_memory(), "this machine's memory"
    return divided(config.language, model, dtype, device.type == "cuda", there, where)


def _n_weights(model: Any) -> int:
    """Of the language model, its embeddings and its head."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(one.numel() for one in AutoModelForCausalLM.from_config(model.text_config).parameters())
