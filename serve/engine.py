"""What a language engine is to the application: tokens and image embeddings in, tokens out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_tokens: int
    temperature: float = 0.0
    """0 takes the likeliest."""
    top_p: float = 1.0
    """The likeliest tokens that hold this much probability take part."""
    seed: int | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """One answer to generate."""

    tokens: tuple[int, ...]
    """The prompt, one image token for each image."""
    images: tuple[Float[np.ndarray, "patches hidden"], ...]
    """What the tower saw."""
    sampling: Sampling


class Step(NamedTuple):
    """Some more of an answer."""

    tokens: list[int]
    """Without the token that ended it."""
    finish: Literal["stop", "length"] | None = None
    """Of the last step: the model came to its end, or `max_tokens` to theirs."""


class Engine(Protocol):
    """Generates many answers at once. Closing a generator ends its answer and frees what it took."""

    def generate(self, task: Task) -> AsyncGenerator[Step, None]: ...

    def check(self) -> None:
        """Raises when the engine cannot go on."""
        ...
