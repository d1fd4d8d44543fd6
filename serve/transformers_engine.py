"""The engine that needs only transformers: answers that run at the same time are generated in one batch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from sae_ray.steering import load_llava

from .config import ServeConfig
from .embeddings import unpacked
from .engine import Sampling, Scored, Step, Task

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

GREEDY = 1e-5
"""Lower temperatures are treated as 0: dividing logits by them may overflow."""


class TransformersEngine:
    """A LLaVA's language model. What waits joins the batch before its next token."""

    def __init__(self, config: ServeConfig):
        llava = load_llava(config.model, config.revision, config.device, config.dtype)
        self.model: Any = llava.model
        del self.model.model.vision_tower  # it has its own deployment
        self._image_token = llava.processor.image_token_id
        ends = self.model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])
        self._batch = _Batch(self.model, self._image_token)
        self._waiting: list[_Answer] = []
        self._work: asyncio.Task | None = None
        self._thread = ThreadPoolExecutor(1)

    async def generate(self, task: Task) -> AsyncGenerator[Step, None]:
        """Yields one token at a time."""
        answer = _Answer(task)
        self._waiting.append(answer)
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._run())
        try:
            for left in range(task.sampling.max_tokens - 1, -1, -1):
                found = await answer.found.get()
                if isinstance(found, Exception):
                    raise found
                token, scored = found
                if token in self._ends:
                    yield Step([], [], "stop")
                    return
                yield Step([token], scored, None if left else "length")
        finally:
            answer.ended = True

    def check(self) -> None:
        pass

    async def _run(self) -> None:
        """Works until nobody waits for anything."""
        loop = asyncio.get_running_loop()
        while self._waiting or self._batch.answers:
            arrived, self._waiting = self._waiting, []
            try:
                await loop.run_in_executor(self._thread, self._batch.step, arrived)
            except Exception as error:  # out of memory, say: those who wait must hear of it
                for answer in (*self._batch.answers, *arrived):
                    answer.found.put_nowait(error)
                self._batch = _Batch(self.model, self._image_token)
                continue
            for answer in self._batch.answers:
                answer.found.put_nowait(answer.last)
                answer.ended |= answer.last[0] in self._ends or len(answer.said) == answer.task.sampling.max_tokens


@dataclass(eq=False)
class _Answer:
    """The state of one answer between its tokens."""

    task: Task
    said: list[int] = field(default_factory=list)
    last: tuple[int, list[Scored]] = (0, [])
    """The newest token and what is told of it."""
    found: asyncio.Queue[tuple[int, list[Scored]] | Exception] = field(default_factory=asyncio.Queue)
    ended: bool = False

    def __post_init__(self) -> None:
        seed = self.task.sampling.seed
        self.random = None if seed is None else torch.Generator().manual_seed(seed)

    def choose(self, logits: Float[Tensor, " vocabulary"]) -> None:
        sampling = self.task.sampling
        token = choose(penalised(logits, sampling, self.task.tokens, self.said), sampling, self.random)
        self.said.append(token)
        self.last = token, score(logits, token, sampling.n_top_logprobs)


class _Batch:
    """The answers that are generated together. Their keys and values are padded on the left, to the longest one."""

    def __init__(self, model: Any, image_token: int):
        self.answers: list[_Answer] = []
        self._model, self._image_token = model, image_token
        self._embed = model.get_input_embeddings()
        self._device = self._embed.weight.device
        self._cache: Any = None
        self._mask: Int[Tensor, "answers tokens"] = torch.zeros(0, 0, dtype=torch.int64, device=self._device)
        """1 where a token is, 0 where padding is."""

    @torch.inference_mode()
    def step(self, arrived: Sequence[_Answer]) -> None:
        """Generates the next token of every answer, after those that have ended left and others arrived."""
        self._leave()
        if self.answers:
            last = torch.tensor([answer.said[-1:] for answer in self.answers], device=self._device)
            self._mask = pad(self._mask, (0, 1), value=1)
            self._cache = self._forward(self.answers, self._embed(last), self._mask, self._cache)
        if arrived := [answer for answer in arrived if not answer.ended]:
            self._join(arrived)

    def _leave(self) -> None:
        staying = [place for place, answer in enumerate(self.answers) if not answer.ended]
        if len(staying) == len(self.answers):
            return
        self.answers = [self.answers[place] for place in staying]
        if not staying:
            self._cache = None
            return
        rows = torch.tensor(staying, device=self._device)
        start = int(self._mask[rows].any(dim=0).int().argmax())  # what is padding in all that stay is dropped
        self._mask = self._mask[rows, start:]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[rows, :, start:], layer.values[rows, :, start:]

    def _join(self, arrived: list[_Answer]) -> None:
        prompts = [self._embedded(answer.task) for answer in arrived]
        mask = pad_sequence(
            [torch.ones(len(prompt), dtype=torch.int64, device=self._device) for prompt in prompts],
            batch_first=True,
            padding_side="left",
        )
        cache = self._forward(arrived, pad_sequence(prompts, batch_first=True, padding_side="left"), mask, None)
        if self.answers:
            length = max(self._mask.shape[1], mask.shape[1])
            self._mask = torch.cat([_longer(one, length, dim=1) for one in (self._mask, mask)])
            for layer, other in zip(self._cache.layers, cache.layers, strict=True):
                layer.keys = torch.cat([_longer(one, length, dim=2) for one in (layer.keys, other.keys)])
                layer.values = torch.cat([_longer(one, length, dim=2) for one in (layer.values, other.values)])
        else:
            self._mask, self._cache = mask, cache
        self.answers += arrived

    def _forward(
        self,
        answers: Sequence[_Answer],
        inputs: Float[Tensor, "answers new hidden"],
        mask: Int[Tensor, "answers tokens"],
        cache: Any,
    ) -> Any:
        """Chooses the next token of each answer; returns the cache."""
        from transformers import DynamicCache

        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
        output = self._model(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=DynamicCache() if cache is None else cache,
            use_cache=True,
            logits_to_keep=1,
        )
        for answer, logits in zip(answers, output.logits[:, -1].float().cpu(), strict=True):
            answer.choose(logits)
        return output.past_key_values

    def _embedded(self, task: Task) -> Float[Tensor, "tokens hidden"]:
        """The embedded prompt, with the images inserted."""
        pieces, images = [], iter(task.images)
        for token in task.tokens:
            if token == self._image_token:
                pieces.append(unpacked(next(images)).to(self._embed.weight))
            else:
                pieces.append(self._embed(torch.tensor([token], device=self._device)))
        return torch.cat(pieces)


def _longer(x: Tensor, length: int, dim: int) -> Tensor:
    """Padded with zeros at the start of a dimension."""
    return pad(x, (0, 0) * (x.ndim - 1 - dim) + (length - x.shape[dim], 0))


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
