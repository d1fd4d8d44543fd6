"""The engine that needs only transformers: concurrent answers take turns, token by token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from sae_ray.steering import load_llava

from .config import ServeConfig
from .engine import Sampling, Scored, Step, Task

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

GREEDY = 1e-5
"""Lower temperatures are treated as 0: dividing logits by them may overflow."""


class TransformersEngine:
    """A LLaVA's language model."""

    def __init__(self, config: ServeConfig):
        llava = load_llava(config.model, config.revision, config.device, config.dtype)
        self.model: Any = llava.model
        del self.model.model.vision_tower  # it has its own deployment
        self.image_token = llava.processor.image_token_id
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self._thread = ThreadPoolExecutor(1)

    async def generate(self, task: Task) -> AsyncGenerator[Step, None]:
        """Generates one token at a time. Other answers take their turn in between."""
        loop = asyncio.get_running_loop()
        answer = _Answer(self, task)
        for left in range(task.sampling.max_tokens - 1, -1, -1):
            token, scored = await loop.run_in_executor(self._thread, answer.next)
            if token in self.ends:
                yield Step([], [], "stop")
                return
            yield Step([token], scored, None if left else "length")

    def check(self) -> None:
        pass


class _Answer:
    """The state of one answer between its tokens."""

    def __init__(self, engine: TransformersEngine, task: Task):
        self.engine, self.task = engine, task
        self.cache: Any = None
        self.said: list[int] = []
        self.random: torch.Generator | None = None
        if task.sampling.seed is not None:
            self.random = torch.Generator().manual_seed(task.sampling.seed)

    @torch.inference_mode()
    def next(self) -> tuple[int, list[Scored]]:
        embed = self.engine.model.get_input_embeddings()
        device = embed.weight.device
        inputs = embed(torch.tensor([self.said[-1:]], device=device)) if self.said else self._prompt(embed)
        output = self.engine.model(inputs_embeds=inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        sampling, logits = self.task.sampling, output.logits[0, -1].float().cpu()
        token = choose(penalised(logits, sampling, self.task.tokens, self.said), sampling, self.random)
        self.said.append(token)
        return token, score(logits, token, sampling.n_top_logprobs)

    def _prompt(self, embed: Any) -> Float[Tensor, "1 tokens hidden"]:
        """The embedded prompt, with the images inserted."""
        pieces, images = [], iter(self.task.images)
        for token in self.task.tokens:
            if token == self.engine.image_token:
                pieces.append(torch.from_numpy(next(images).copy()).to(embed.weight))
            else:
                pieces.append(embed(torch.tensor([token], device=embed.weight.device)))
        return torch.cat(pieces)[None]


def score(logits: Float[Tensor, " vocabulary"], token: int, n_top: int | None) -> list[Scored]:
    """The log probabilities of a token and of the most likely ones; nothing if `n_top` is None."""
    if n_top is None:
        return []
    logprobs = logits.log_softmax(0)
    top = logprobs.topk(n_top)
    return [Scored(token, float(logprobs[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))]


def penalised(
    logits: Float[Tensor, " vocabulary"], sampling: Sampling, prompt: Sequence[int], said: Sequence[int]
) -> Float[Tensor, " vocabulary"]:
    """The logits less the penalties, as vLLM applies them."""
    if sampling.repetition_penalty == 1 and sampling.frequency_penalty == 0 and sampling.presence_penalty == 0:
        return logits
    counts = torch.bincount(torch.tensor(said, dtype=torch.int64), minlength=len(logits))
    seen = counts > 0
    seen[[token for token in prompt if token < len(logits)]] = True
    factor = torch.where(logits > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
    logits = torch.where(seen, logits * factor, logits)
    return logits - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)


def choose(logits: Float[Tensor, " vocabulary"], sampling: Sampling, random: torch.Generator | None) -> int:
    """Samples the next token."""
    if sampling.temperature < GREEDY:
        return int(logits.argmax())
    probability, token = (logits / sampling.temperature).softmax(0).sort(descending=True, stable=True)
    probability = probability.where(probability >= sampling.min_p * probability[0], 0.0)
    if sampling.top_k:
        probability[sampling.top_k :] = 0.0
    probability = probability / probability.sum()
    before = probability.cumsum(0) - probability
    probability = probability.where(before < sampling.top_p, 0.0)
    return int(token[torch.multinomial(probability, 1, generator=random)])
