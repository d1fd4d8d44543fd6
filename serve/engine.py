"""The interface of a language engine: tokens and image embeddings in, tokens out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Shaped

    from .memory import Memory


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled."""

    max_tokens: int
    temperature: float = 0.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    """Samples from the most likely tokens whose probabilities sum to this."""
    top_k: int = 0
    """Samples from this many of the most likely tokens; 0 means all."""
    min_p: float = 0.0
    """Samples from tokens whose probability is at least this share of the most likely one's."""
    frequency_penalty: float = 0.0
    """Is subtracted from a token's logit for each time it was generated."""
    presence_penalty: float = 0.0
    """Is subtracted from a token's logit if it was generated."""
    repetition_penalty: float = 1.0
    """Divides the logit of tokens of the prompt and the answer; multiplies it if it is negative."""
    seed: int | None = None
    """Not negative."""
    n_top_logprobs: int | None = None
    """How many of the most likely tokens to tell at each place; None: not even the chosen one's log probability."""


@dataclass(frozen=True, eq=False)
class Task:
    """One answer to generate."""

    tokens: tuple[int, ...]
    """The prompt, with one image token per image."""
    images: tuple[Shaped[np.ndarray, "patches hidden"], ...]
    """The image embeddings from the tower, `packed`."""
    sampling: Sampling

    @property
    def n_tokens(self) -> int:
        """Of the prompt with its images and the longest answer."""
        prompt = len(self.tokens) + sum(len(image) - 1 for image in self.images)
        return prompt + self.sampling.max_tokens


class Scored(NamedTuple):
    """A token's log probability in the model itself, before temperature and penalties."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The most likely tokens and their log probabilities, likeliest first."""


class Step(NamedTuple):
    """The next tokens of an answer."""

    tokens: list[int]
    """Without the end-of-sequence token."""
    scored: list[Scored]
    """Of the same tokens; empty unless asked for."""
    finish: Literal["stop", "length"] | None = None
    """Set in the last step: the model ended the answer (`stop`), or `max_tokens` was reached (`length`)."""


class Engine(Protocol):
    """Generates many answers at once. Closing a generator aborts its answer and frees its memory."""

    memory: Memory

    def generate(self, task: Task) -> AsyncGenerator[Step, None]: ...

    def check(self) -> None:
        """Raises if the engine has failed."""
        ...
