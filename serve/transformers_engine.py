"""The engine that needs only transformers: concurrent answers take turns, token by token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from sae_ray.steering import load_llava

from .config import ServeConfig
from .engine import Sampling, Step, Task

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
            token = await loop.run_in_executor(self._thread, answer.next)
            if token in self.ends:
                yield Step([], "stop")
                return
            yield Step([token], None if left else "length")

    def check(self) -> None:
        pass


class _Answer:
    """The state of one answer between its tokens."""

    def __init__(self, engine: TransformersEngine, task: Task):
        self.engine, self.task = engine, task
        self.cache: Any = None
        self.last: int | None = None
        self.random: torch.Generator | None = None
        if task.sampling.seed is not None:
            self.random = torch.Generator().manual_seed(task.sampling.seed)

    @torch.inference_mode()
    def next(self) -> int:
        embed = self.engine.model.get_input_embeddings()
        device = embed.weight.device
        inputs = self._prompt(embed) if self.last is None else embed(torch.tensor([[self.last]], device=device))
        output = self.engine.model(inputs_embeds=inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        self.last = choose(output.logits[0, -1].float().cpu(), self.task.sampling, self.random)
        return self.last

    def _prompt(self, embed: Any) -> Float[Tensor, "1 tokens hidden"]:
        """The embedded prompt, with the images inserted."""
        pieces, images = [], iter(self.task.images)
        for token in self.task.tokens:
            if token == self.engine.image_token:
                pieces.append(torch.from_numpy(next(images).copy()).to(embed.weight))
            else:
                pieces.append(embed(torch.tensor([token], device=embed.weight.device)))
        return torch.cat(pieces)[None]


def choose(logits: Float[Tensor, " vocabulary"], sampling: Sampling, random: torch.Generator | None) -> int:
    """Samples the next token."""
    if sampling.temperature < GREEDY:
        return int(logits.argmax())
    probability, token = (logits / sampling.temperature).softmax(0).sort(descending=True, stable=True)
    before = probability.cumsum(0) - probability
    probability = probability.where(before < sampling.top_p, 0.0)
    return int(token[torch.multinomial(probability, 1, generator=random)])
