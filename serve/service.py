"""Answers requests: images go to the tower, their embeddings to the language model, and its tokens become text."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_ray.encoders.sources import model_name

from .catalogue import SaeEntry, read_catalogue
from .config import Selection, ServeConfig
from .conversation import Prompt, TextStream, Tokenizer
from .engine import Sampling, Task
from .errors import ApiError, invalid, request_id
from .images import read_image
from .limiter import Limiter
from .metrics import Metrics
from .schemas import ChatRequest, Edits, Finish, SteeringType, Usage
from .tower import Change, Look

if TYPE_CHECKING:
    from jaxtyping import UInt8

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Event:
    """The next text of a choice."""

    choice: int
    text: str
    finish: Finish | None = None


@dataclass(eq=False)
class Completion:
    """A validated request, ready to run with `Service.events`."""

    request: ChatRequest
    prompt: Prompt
    sampling: Sampling
    change: Change | None
    types: list[SteeringType]
    """The type of each choice."""
    id: str = field(default_factory=request_id)
    created: int = field(default_factory=lambda: int(time.time()))
    n_tokens: int = 0
    """Tokens generated so far, over all choices."""

    @property
    def usage(self) -> Usage:
        prompt = self.prompt.length
        return Usage(prompt_tokens=prompt, completion_tokens=self.n_tokens, total_tokens=prompt + self.n_tokens)


class Service:
    """The application behind the HTTP API, one per API replica.

    Args:
        config: a configuration that names its LLaVA (see `with_llava`).
        tower, language: handles of the deployments.
    """

    def __init__(self, config: ServeConfig, tower: Any, language: Any):
        self.config = config
        self.tower, self.language = tower, language
        self.tokenizer = Tokenizer(config.model, config.revision)
        self.saes: dict[str, SaeEntry] = {}
        self.limiter = Limiter(config.limits.max_running, config.limits.max_waiting)
        self.metrics = Metrics(self.limiter)
        self.model = model_name(config.model)
        self.started = int(time.time())

    def load_saes(self, wanted: Selection) -> None:
        """Replaces the SAEs available for steering; initially there are none. Raises as `read_catalogue` does."""
        self.saes = read_catalogue(wanted.root, self.config.model, self.config.revision, wanted.saes)

    def sae(self, name: str | None, param: str = "sae") -> SaeEntry:
        """The SAE with this id; the first one by default. Raises ApiError (404) for an unknown id."""
        if name is None:
            return next(iter(self.saes.values()))
        if name not in self.saes:
            message = f"unknown SAE {name[:100]!r}; available: {', '.join(self.saes)}"
            raise ApiError(404, "unknown_sae", message, param)
        return self.saes[name]

    def check(self, request: ChatRequest) -> Completion:
        """Validates a request before any image is decoded. Raises ApiError if it is invalid."""
        limits, steering = self.config.limits, request.steering
        if request.model is not None and request.model != self.model:
            message = f"unknown model {request.model[:100]!r}; available: {self.model}"
            raise ApiError(404, "unknown_model", message, "model")
        if len(request.image_urls) > limits.images:
            raise invalid(f"the request has {len(request.image_urls)} images; send at most {limits.images}", "messages")
        types: list[SteeringType] = steering.types if steering else ["DEFAULT"]
        if request.n * len(types) > limits.choices:
            raise invalid(
                f"n times the number of steering types is {request.n * len(types)}; at most {limits.choices} answers "
                "are allowed per request",
                "n",
            )
        change = self._change(steering) if steering else None
        prompt = self.tokenizer.prompt(request.messages)
        return Completion(
            request,
            prompt,
            Sampling(self._length(request, prompt), request.temperature, request.top_p, request.seed),
            change,
            [kind for kind in types for _ in range(request.n)],
        )

    async def images(self, urls: Sequence[str]) -> list[UInt8[np.ndarray, "height width 3"]]:
        """Decodes images. Raises ApiError for an invalid one, and if they have too many pixels together."""
        limits, images = self.config.limits, []
        left = limits.image_megapixels * 1e6
        for url in urls:
            image = await read_image(url, self.config.image_hosts, limits.body_mb * 1e6, left)
            left -= image.width * image.height
            images.append(np.asarray(image))
        return images

    async def events(self, completion: Completion) -> AsyncGenerator[Event, None]:
        """Generates all choices at once; their events are interleaved. Closing the generator aborts the work.

        Raises ApiError, TimeoutError after `limits.timeout_s`, and whatever the deployments raise.
        """
        started = time.monotonic()
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        work = asyncio.create_task(self._work(completion, queue))
        # None ends the queue, whether the work succeeds or fails.
        work.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while True:
                left = started + self.config.limits.timeout_s - time.monotonic()
                event = await asyncio.wait_for(queue.get(), left)
                if event is None:
                    await work
                    return
                yield event
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            self._log(completion, time.monotonic() - started)

    async def inspect(self, url: str, name: str | None, limit: int) -> tuple[SaeEntry, Look]:
        """What the tower sees of an image, and the features with the largest values on any patch of it."""
        entry = self.sae(name)
        async with asyncio.timeout(self.config.limits.timeout_s), self.limiter.slot():
            [image] = await self.images([url])
            return entry, await self.tower.inspect.remote(image, entry.folder, limit)

    async def ready(self) -> bool:
        """Whether a tower and a language model respond."""
        try:
            async with asyncio.timeout(2):
                await asyncio.gather(self.tower.ping.remote(), self.language.running.remote())
        except Exception:  # any failure means not ready
            return False
        return True

    async def _work(self, completion: Completion, queue: asyncio.Queue[Event | None]) -> None:
        async with self.limiter.slot():
            embedded = await self._embedded(completion)
            async with asyncio.TaskGroup() as tasks:
                for choice, kind in enumerate(completion.types):
                    tasks.create_task(self._answer(completion, choice, embedded[kind], queue))

    async def _embedded(self, completion: Completion) -> dict[str, tuple[np.ndarray, ...]]:
        """The image embeddings per type. The pixels are freed here, before the long generation starts."""
        images = await self.images(completion.request.image_urls)
        async with asyncio.TaskGroup() as tasks:
            embedded = {
                kind: [
                    tasks.create_task(self._embed(pixels, completion.change if kind == "STEERED" else None))
                    for pixels in images
                ]
                for kind in dict.fromkeys(completion.types)
            }
        return {kind: tuple(task.result() for task in of) for kind, of in embedded.items()}

    async def _embed(self, pixels: np.ndarray, change: Change | None) -> np.ndarray:
        return await self.tower.embed.remote(pixels, change)

    async def _answer(
        self, completion: Completion, choice: int, images: tuple[np.ndarray, ...], queue: asyncio.Queue[Event | None]
    ) -> None:
        text = TextStream(self.tokenizer, completion.request.stops)
        task = Task(completion.prompt.tokens, images, self._sampling(completion, choice))
        ended = False
        steps = self.language.options(stream=True).generate.remote(task)
        try:
            async for step in steps:
                completion.n_tokens += len(step.tokens)
                if piece := text.push(step.tokens):
                    queue.put_nowait(Event(choice, piece))
                if text.stopped or step.finish is not None:
                    queue.put_nowait(Event(choice, text.end(), "stop" if text.stopped else step.finish))
                    ended = True
                if text.stopped:
                    break
            if not ended:
                raise RuntimeError("the engine stopped before the end of the answer")
        finally:
            steps.cancel()

    def _sampling(self, completion: Completion, choice: int) -> Sampling:
        """Each choice has its own seed, shared by its steered and its default version."""
        one = completion.sampling
        seed = None if one.seed is None else one.seed + choice % completion.request.n
        return Sampling(one.max_tokens, one.temperature, one.top_p, seed)

    def _length(self, request: ChatRequest, prompt: Prompt) -> int:
        most, room = self.config.limits.max_tokens, self.tokenizer.context - prompt.length
        if room < 1:
            raise invalid(
                f"the messages take {prompt.length} tokens, including images, and leave no room for an answer: the "
                f"model's context is {self.tokenizer.context} tokens",
                "messages",
            )
        if request.length is None:
            return min(most, room)
        if request.length > min(most, room):
            raise invalid(
                f"max_tokens is {request.length}; at most {min(most, room)} are possible, since the messages take "
                f"{prompt.length} tokens and the server allows {most} per answer",
                "max_tokens",
            )
        return request.length

    def _change(self, steering: Edits) -> Change:
        limits, entry = self.config.limits, self.sae(steering.sae, "steering.sae")
        if len(steering.features) > limits.features:
            raise invalid(
                f"{len(steering.features)} features are edited; at most {limits.features} are allowed per request",
                "steering.features",
            )
        for place, feature in enumerate(steering.features):
            if feature.index >= entry.n_features:
                raise invalid(
                    f"index is {feature.index}; {entry.name} has features 0 to {entry.n_features - 1}",
                    f"steering.features.{place}.index",
                )
            if feature.unit == "max" and feature.index not in entry.concepts:
                raise invalid(
                    f"feature {feature.index} never fired, so the unit max is undefined; give an absolute strength",
                    f"steering.features.{place}.unit",
                )
        return Change(entry.folder, steering.latent_edits(), steering.error, steering.isolate)

    def _log(self, completion: Completion, seconds: float) -> None:
        """Logs numbers only, never images or text."""
        steering = completion.request.steering
        usage = completion.usage
        self.metrics.tokens(usage.prompt_tokens, usage.completion_tokens)
        facts = {
            "images": len(completion.request.image_urls),
            "choices": len(completion.types),
            "features": len(steering.features) if steering else 0,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "seconds": round(seconds, 4),
        }
        logger.info("completion", extra=facts)


async def collect(events: AsyncGenerator[Event, None], n_choices: int) -> list[tuple[str, Finish]]:
    """Runs to the end; returns each choice's text and finish reason."""
    texts, ends = [""] * n_choices, ["stop"] * n_choices
    async with aclosing(events):
        async for event in events:
            texts[event.choice] += event.text
            ends[event.choice] = event.finish or ends[event.choice]
    return list(zip(texts, ends, strict=True))  # type: ignore[arg-type]
