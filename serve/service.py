"""Answers requests: images go to the tower, their embeddings to the language model, and its tokens become text."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sae_ray.editing import load_patch
from sae_ray.encoders.resizing import Box
from sae_ray.encoders.sources import model_name
from sae_ray.encoders.transformers_models import preprocess
from sae_ray.errors import UsageError
from sae_ray.steering.llava import describe_llava
from sae_ray.steering.regions import MASK_RENDERING, Region, mask_of, tokens_in

from .catalogue import SaeEntry, read_catalogue
from .config import Selection, ServeConfig
from .conversation import Prompt, TextStream, Tokenizer
from .engine import Sampling, Scored, Task
from .errors import ApiError, invalid, request_id
from .images import read_image
from .limiter import Limiter
from .metrics import Metrics
from .schemas import ChatRequest, Edits, Finish, Logprobs, SteeringType, TokenLogprob, TopLogprob, Usage
from .tower import Change, Look

if TYPE_CHECKING:
    from jaxtyping import UInt8

logger = logging.getLogger("ray.serve")


SEEDS = 2**63
"""Seeds count modulo this, so that every engine takes the negative ones, too."""
SMALLEST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON cannot express."""
CONTEXT = 8
"""Tokens of the prompt that decide how an answer that goes on after them is spelled."""


@dataclass(frozen=True)
class Event:
    """The next text of a choice."""

    choice: int
    text: str
    finish: Finish | None = None
    scored: list[Scored] = field(default_factory=list)


class Seen(NamedTuple):
    """An image as the tower takes it."""

    pixels: UInt8[np.ndarray, "3 height width"]
    """Resized and cropped."""
    size: tuple[int, int]
    """Width and height before."""


@dataclass
class Whole:
    """A whole answer."""

    text: str = ""
    finish: Finish = "stop"
    scored: list[Scored] = field(default_factory=list)


@dataclass(eq=False)
class Completion:
    """A validated request, ready to run with `Service.events`."""

    request: ChatRequest
    prompt: Prompt
    sampling: Sampling
    change: Change | None
    types: list[SteeringType]
    """The type of each choice."""
    image_names: Sequence[str]
    """Where in the request each image is."""
    tokenizer: Tokenizer
    id: str = field(default_factory=request_id)
    created: int = field(default_factory=lambda: int(time.time()))
    n_tokens: int = 0
    """Tokens generated so far, over all choices."""

    @property
    def usage(self) -> Usage:
        prompt = self.prompt.length
        return Usage(prompt_tokens=prompt, completion_tokens=self.n_tokens, total_tokens=prompt + self.n_tokens)

    def logprobs(self, scored: Sequence[Scored]) -> Logprobs | None:
        """In the format of OpenAI's API, if the request asks for them."""
        if self.sampling.n_top_logprobs is None:
            return None
        return Logprobs(
            content=[
                TokenLogprob(
                    **self._logprob(one.token, one.logprob),
                    top_logprobs=[TopLogprob(**self._logprob(*other)) for other in one.top],
                )
                for one in scored
            ]
        )

    def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.piece(token)
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, SMALLEST_LOGPROB), "bytes": data}


class Service:
    """The application behind the HTTP API, one per API replica.

    Args:
        config: a configuration that names its LLaVA (see `with_llava`).
        tower, language: handles of the deployments.
    """

    def __init__(self, config: ServeConfig, tower: Any, language: Any):
        self.config = config
        self.tower, self.language = tower, language
        self.tokenizer = Tokenizer(config.model, config.revision, config.language.context)
        self._preprocess = preprocess(config.model, config.revision)
        self._seen_by = describe_llava(config.model, config.revision).tower
        self.saes: dict[str, SaeEntry] = {}
        self.limiter = Limiter(config.limits.max_running, config.limits.max_waiting)
        self.metrics = Metrics(self.limiter)
        self.model = model_name(config.model)
        self.edit = None if config.edit is None else load_patch(config.edit).facts
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

    def check_model(self, name: str | None) -> None:
        """Raises ApiError (404) for an id other than the model's; None is the model."""
        if name is not None and name != self.model:
            raise ApiError(404, "unknown_model", f"unknown model {name[:100]!r}; available: {self.model}", "model")

    def check(self, request: ChatRequest, image_names: Sequence[str] | None = None) -> Completion:
        """Validates a request before any image is decoded. Raises ApiError if it is invalid.

        Args:
            image_names: what errors call the images; default: their places in the request.
        """
        limits, steering = self.config.limits, request.steering
        self.check_model(request.model)
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
            self._sampling(request, prompt),
            change,
            [kind for kind in types for _ in range(request.n)],
            request.image_names if image_names is None else image_names,
            self.tokenizer,
        )

    async def images(self, urls: Sequence[str], names: Sequence[str]) -> list[Seen]:
        """Images as the tower takes them: decoded, resized and cropped.

        Raises ApiError for an invalid one, and if they have too many pixels together.
        """
        limits, images = self.config.limits, []
        left = limits.image_megapixels * 1e6
        for url, name in zip(urls, names, strict=True):
            try:
                image = await read_image(url, self.config.image_hosts, limits.body_mb * 1e6, left)
            except ApiError as error:
                error.param = name
                raise
            left -= image.width * image.height
            images.append(Seen(await asyncio.to_thread(self._preprocess, image), image.size))
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
            [image] = await self.images([url], ["image"])
            return entry, await self.tower.inspect.remote(image.pixels, entry.folder, limit)

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

    async def _embedded(self, completion: Completion) -> dict[SteeringType, tuple[np.ndarray, ...]]:
        """The image embeddings per type. The pixels are freed here, before the long generation starts."""
        steering = completion.request.steering
        region = await self._region(steering) if steering else None
        images = await self.images(completion.request.image_urls, completion.image_names)
        types = list(dict.fromkeys(completion.types))
        changes = [self._located(completion.change, region, image) for image in images]
        async with asyncio.TaskGroup() as tasks:
            embedded = [
                tasks.create_task(self._embed(image.pixels, [change if kind == "STEERED" else None for kind in types]))
                for image, change in zip(images, changes, strict=True)
            ]
        return {kind: tuple(task.result()[place] for task in embedded) for place, kind in enumerate(types)}

    async def _region(self, steering: Edits) -> Region | None:
        """Raises ApiError for a mask that cannot be used."""
        if steering.region is None:
            return None
        limits, mask, param = self.config.limits, None, "steering.region.mask"
        try:
            if steering.region.mask is not None:
                most_bytes, most_pixels = limits.body_mb * 1e6, limits.image_megapixels * 1e6
                mask = mask_of(await read_image(steering.region.mask, (), most_bytes, most_pixels, MASK_RENDERING))
            return Region(tuple(Box(*one) for one in steering.region.rectangles), mask)
        except ApiError as error:
            error.param = param
            raise
        except UsageError as error:
            raise invalid(str(error), param) from error

    def _located(self, change: Change | None, region: Region | None, image: Seen) -> Change | None:
        """The change with the tokens of the region in this image. Raises ApiError if there are none."""
        if change is None or region is None:
            return change
        try:
            return replace(change, tokens=tokens_in(region, self._preprocess.view(image.size), self._seen_by))
        except UsageError as error:
            raise invalid(str(error), "steering.region") from error

    async def _embed(self, pixels: np.ndarray, changes: Sequence[Change | None]) -> list[np.ndarray]:
        return await self.tower.embed.remote(pixels, changes)

    async def _answer(
        self, completion: Completion, choice: int, images: tuple[np.ndarray, ...], queue: asyncio.Queue[Event | None]
    ) -> None:
        prompt = completion.prompt
        text = TextStream(self.tokenizer, completion.request.stops, prompt.tokens[-CONTEXT:] if prompt.goes_on else ())
        task = Task(prompt.tokens, images, self._of_choice(completion, choice))
        ended = False
        steps = self.language.options(stream=True).generate.remote(task)
        try:
            async for step in steps:
                before = text.n_tokens
                piece = text.push(step.tokens)
                taken = text.n_tokens - before
                completion.n_tokens += taken
                if piece or step.scored:
                    queue.put_nowait(Event(choice, piece, scored=step.scored[:taken]))
                if text.stopped or step.finish is not None:
                    queue.put_nowait(Event(choice, text.end(), "stop" if text.stopped else step.finish))
                    ended = True
                if text.stopped:
                    break
            if not ended:
                raise RuntimeError("the engine stopped before the end of the answer")
        finally:
            steps.cancel()

    def _sampling(self, request: ChatRequest, prompt: Prompt) -> Sampling:
        return Sampling(
            max_tokens=self._length(request, prompt),
            temperature=request.temperature if request.top_p > 0 else 0.0,
            top_p=request.top_p or 1.0,
            top_k=max(request.top_k, 0),
            min_p=request.min_p,
            frequency_penalty=request.frequency_penalty,
            presence_penalty=request.presence_penalty,
            repetition_penalty=request.repetition_penalty,
            seed=request.seed,
            n_top_logprobs=request.n_top_logprobs,
        )

    def _of_choice(self, completion: Completion, choice: int) -> Sampling:
        """Each choice has its own seed, shared by its steered and its default version."""
        one = completion.sampling
        seed = None if one.seed is None else (one.seed + choice % completion.request.n) % SEEDS
        return replace(one, seed=seed)

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
            name = "max_tokens" if request.max_tokens is not None else "max_completion_tokens"
            raise invalid(
                f"{name} is {request.length}; at most {min(most, room)} are possible, since the messages take "
                f"{prompt.length} tokens and the server allows {most} per answer",
                name,
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
        when = steering.when
        if when is not None and when.index >= entry.n_features:
            message = f"index is {when.index}; {entry.name} has features 0 to {entry.n_features - 1}"
            raise invalid(message, "steering.when.index")
        if when is not None and when.unit == "max" and when.index not in entry.concepts:
            message = f"feature {when.index} never fired, so the unit max is undefined; give an absolute value"
            raise invalid(message, "steering.when.unit")
        condition = when and when.condition()
        return Change(entry.folder, steering.latent_edits(), steering.error, steering.isolate, condition)

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


async def collect(events: AsyncGenerator[Event, None], n_choices: int) -> list[Whole]:
    """Runs to the end; returns each choice."""
    answers = [Whole() for _ in range(n_choices)]
    async with aclosing(events):
        async for event in events:
            answer = answers[event.choice]
            answer.text += event.text
            answer.finish = event.finish or answer.finish
            answer.scored += event.scored
    return answers
