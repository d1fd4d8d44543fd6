"""The engine that needs only transformers: answers that run at the same time are generated in one batch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sae_ray.steering import load_llava
from sae_ray.steering.decoding import Decoder, rounded

from .config import ServeConfig
from .embeddings import unpacked
from .engine import Sampling, Scored, Step, Task
from .memory import language_memory

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

GREEDY = 1e-5
"""Lower temperatures are treated as 0: dividing logits by them may overflow."""


class TransformersEngine:
    """A LLaVA's language model. What waits joins the batch before its next token."""

    def __init__(self, config: ServeConfig):
        self.memory = language_memory(config)
        llava = load_llava(config.model, config.revision, config.device, config.dtype)
        self.model: Any = llava.model
        del self.model.model.vision_tower  # it has its own deployment
        self._image_token = llava.processor.image_token_id
        ends = self.model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])
        most = config.language.max_running
        tokens = min(self.memory.tokens, most * rounded(self.memory.context))
        self._decoder = Decoder(self.model, tokens, most)
        self._batch = _Batch(self.model, self._decoder, self._image_token)
        self._waiting: list[_Answer] = []
        self._work: asyncio.Task | None = None
        self._thread = ThreadPoolExecutor(1)

    async def generate(self, task: Task) -> AsyncGenerator[Step, None]:
        """Yields one token at a time. Raises ValueError for a task that no empty cache has room for."""
        if not self._decoder.holds(task.n_tokens):
            raise ValueError(f"{task.n_tokens} tokens do not fit into the cache, which has {self._decoder.n_tokens}")
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
                late = await loop.run_in_executor(self._thread, self._batch.step, arrived)
                self._waiting = late + self._waiting
            except Exception as error:  # out of memory, say: those who wait must hear of it
                for answer in (*self._batch.answers, *arrived):
                    answer.found.put_nowait(error)
                self._batch.clear()
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

    def add(self, token: int, scored: list[Scored]) -> None:
        self.said.append(token)
        self.last = token, scored


class _Batch:
    """The answers that are generated together, each in its row of the decoder."""

    def __init__(self, model: Any, decoder: Decoder, image_token: int):
        self.answers: list[_Answer] = []
        self._decoder, self._image_token = decoder, image_token
        self._embed = model.get_input_embeddings()

    def clear(self) -> None:
        self.answers = []
        self._decoder.clear()

    @torch.no_grad()
    def step(self, waiting: Sequence[_Answer]) -> list[_Answer]:
        """Generates the next token of every answer, after those that have ended left and others joined.

        Returns those for which there is no room yet. Nobody overtakes another.
        """
        for row in reversed(range(len(self.answers))):
            if self.answers[row].ended:
                self._decoder.drop(row)
                self.answers[row] = self.answers[-1]
                self.answers.pop()
        if self.answers:
            last = torch.tensor([answer.said[-1] for answer in self.answers], device=self._embed.weight.device)
            self._choose(self.answers, self._decoder.step(last))
        return self._join([answer for answer in waiting if not answer.ended])

    def _join(self, waiting: list[_Answer]) -> list[_Answer]:
        n = self._decoder.room([answer.task.n_tokens for answer in waiting])
        joining = waiting[:n]
        if joining:
            prompts = [self._embedded(answer.task) for answer in joining]
            logits = self._decoder.join(prompts, [answer.task.sampling.max_tokens for answer in joining])
            self.answers += joining
            self._choose(joining, logits)
        return waiting[n:]

    def _choose(self, answers: Sequence[_Answer], logits: Float[Tensor, "answers vocabulary"]) -> None:
        asked = [answer.task.sampling for answer in answers]
        changed = [
            penalised(one, sampling, answer.task.tokens, answer.said)
            for answer, sampling, one in zip(answers, asked, logits, strict=True)
        ]
        tokens = choose(torch.stack(changed), asked, [answer.random for answer in answers])
        for answer, sampling, one, token in zip(answers, asked, logits, tokens, strict=True):
            answer.add(token, score(one, token, sampling.n_top_logprobs))

    def _embedded(self, task: Task) -> Float[Tensor, "tokens hidden"]:
        """The embedded prompt, with the images inserted."""
        weight = self._embed.weight
        text = self._embed(torch.tensor(task.tokens, device=weight.device))
        pieces, start = [], 0
        places = [place for place, token in enumerate(task.tokens) if token == self._image_token]
        for place, image in zip(places, task.images, strict=True):
            pieces += [text[start:place], unpacked(image).to(weight)]
            start = place + 1
        return torch.cat([*pieces, text[start:]])


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
    generated = torch.tensor(said, dtype=torch.int64, device=logits.device)
    counts = torch.bincount(generated, minlength=len(logits))
    seen = counts > 0
    seen[[token for token in prompt if token < len(logits)]] = True
    factor = torch.where(logits > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
    logits = torch.where(seen, logits * factor, logits)
    return logits - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)


def choose(
    logits: Float[Tensor, "answers vocabulary"],
    samplings: Sequence[Sampling],
    randoms: Sequence[torch.Generator | None],
) -> list[int]:
    """Samples the next token of each answer. Only the last draw is made on the host, where the generators are."""
    tokens = logits.argmax(-1)
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature >= GREEDY]
    if drawn:
        some = [samplings[row] for row in drawn]

        def column(values: Sequence[float]) -> Float[Tensor, "drawn 1"]:
            return torch.tensor(values, dtype=logits.dtype, device=logits.device)[:, None]

        scaled = logits[drawn] / column([one.temperature for one in some])
        probability, token = scaled.softmax(-1).sort(descending=True, stable=True)
        probability = probability.where(probability >= column([one.min_p for one in some]) * probability[:, :1], 0.0)
        most = column([one.top_k or logits.shape[1] for one in some])
        probability = probability.where(torch.arange(logits.shape[1], device=logits.device) < most, 0.0)
        probability = probability / probability.sum(-1, keepdim=True)
        before = probability.cumsum(-1) - probability
        probability = probability.where(before < column([one.top_p for one in some]), 0.0).cpu()
        places = [
            torch.multinomial(one, 1, generator=randoms[row]) for row, one in zip(drawn, probability, strict=True)
        ]
        tokens[drawn] = token.gather(1, torch.stack(places).to(token.device))[:, 0]
    return tokens.tolist()
