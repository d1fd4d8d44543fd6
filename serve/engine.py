"""The interface of a language engine: tokens and image embeddings in, tokens out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled."""

    max_tokens: int
    temperature: float = 0.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    """Samples from the most likely tokens whose probabilities sum to this."""
    seed: int | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """One answer to generate."""

    tokens: tuple[int, ...]
    """The prompt, with one image token per image."""
    images: tuple[Float[np.ndarray, "patches hidden"], ...]
    """The image embeddings from the tower."""
    sampling: Sampling


class Step(NamedTuple):
    """The next tokens of an answer."""

    tokens: list[int]
    """Without the end-of-sequence token."""
    finish: Literal["stop", "length"] | None = None
    """Set in the last step: the model ended the answer (`stop`), or `max_tokens` was reached (`length`)."""


class Engine(Protocol):
    """Generates many answers at once. Closing a generator aborts its answer and frees its memory."""

    def generate(self, task: Task) -> AsyncGenerator[Step, None]: ...

    def check(self) -> None:
        """Raises if the engine has failed."""
        ...
