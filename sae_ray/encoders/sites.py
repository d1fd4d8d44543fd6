"""Sites: where an encoder is tapped."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from sae_ray.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Int

TOKENS = "cls, mean, all or random:n (n tokens per image)"


@dataclass(frozen=True)
class Site:
    """A point of an encoder and the tokens that are taken there.

    Tokens are numbered by their position in the sequence once register tokens are removed: 0 is the CLS token where
    there is one. A row that stands for the whole image has the number -1.
    """

    point: Literal["residual", "mlp", "projection", "pooled", "imported"]
    """`residual`: the residual stream after a block. `mlp`: the output of a block's MLP, before any LayerScale.
    `projection`: the image embedding in the space shared with text. `pooled`: the vision tower's pooler output, before
    any projection. `imported`: activations from elsewhere."""
    layer: int | None = None
    """For `residual` and `mlp`: the block, counted from 0; its output is `hidden_states[layer + 1]` in transformers."""
    tokens: str = "image"
    """For `residual` and `mlp`: `cls`, `all`, `mean` (the mean of what `all` gives) or `random:n` (n tokens of what
    `all` gives, drawn without replacement per image). For `projection` and `pooled`: `image`, one vector per image."""
    label: str | None = None
    """For `imported`: the name that they were given."""

    def __post_init__(self):
        match self.point:
            case "residual" | "mlp":
                if not isinstance(self.layer, int) or isinstance(self.layer, bool) or self.layer < 0:
                    raise UsageError(
                        f"layer is {self.layer!r}; a {self.point} site names its block by a number, counted from 0"
                    )
                if self.tokens not in ("cls", "mean", "all") and not re.fullmatch(r"random:[1-9]\d*", self.tokens):
                    raise UsageError(f"tokens is {self.tokens!r}; for a {self.point} site it must be {TOKENS}")
            case "projection" | "pooled":
                if self.layer is not None:
                    raise UsageError(f"layer is {self.layer!r}; a {self.point} site has no layer: leave it out")
                if self.tokens != "image":
                    raise UsageError(
                        f"tokens is {self.tokens!r}; a {self.point} site has one vector per image: leave it out"
                    )
            case "imported":
                if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.label or ""):
                    raise UsageError(
                        f"site is {self.label!r}; name imported activations by letters, digits, dots, - and _"
                    )
                if self.layer is not None or self.tokens != "image":
                    raise UsageError(
                        f"tokens is {self.tokens!r}; imported activations are used as they are: leave it out"
                    )
            case unknown:
                raise UsageError(f"point is {unknown!r}; it must be residual, mlp, projection or pooled")

    @classmethod
    def parse(cls, text: str) -> Site:
        """Reads the form of study files: `layer22:cls`, `layer22:random:2`, `layer22.mlp:all`, `projection`, `pooled`.

        Raises:
            UsageError: The text has another form.
        """
        if text in ("projection", "pooled"):
            return cls(point=text)
        found = re.fullmatch(r"layer(\d+)(\.mlp)?:(.+)", text)
        if found is None:
            raise UsageError(
                f"site is {text!r}; write layer<number>:<tokens> or layer<number>.mlp:<tokens> with tokens {TOKENS}, "
                "projection or pooled"
            )
        return cls("mlp" if found[2] else "residual", int(found[1]), found[3])

    @property
    def name(self) -> str:
        """A name that is safe in file names: `layer22.cls`, `layer22.random-2`, `layer22.mlp.all`, `projection`."""
        if self.label is not None:
            return self.label
        if self.layer is None:
            return self.point
        of_mlp = ".mlp" if self.point == "mlp" else ""
        return f"layer{self.layer}{of_mlp}.{self.tokens.replace(':', '-')}"

    @property
    def n_random(self) -> int | None:
        """n of `random:n`."""
        return int(self.tokens.removeprefix("random:")) if self.tokens.startswith("random:") else None


def select_tokens(site: Site, n_tokens: int, image_id: str, seed: int) -> Int[np.ndarray, " k"]:
    """The numbers of the tokens that a site of a block takes of one image, ascending.

    `random:n` depends on the seed and the image's id alone: not on its place in a batch, the layer or the machine.

    Args:
        n_tokens: Length of the sequence without registers, with CLS.

    Raises:
        UsageError: `random:n` asks for more tokens than there are.
    """
    if site.tokens == "cls":
        return np.zeros(1, np.int64)
    if site.n_random is None:
        return np.arange(n_tokens)
    if site.n_random > n_tokens:
        raise UsageError(
            f"tokens is {site.tokens!r}, but the sequence has {n_tokens} tokens; ask for at most {n_tokens}"
        )
    digest = hashlib.sha256(f"{seed}\0{image_id}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:16]))
    return np.sort(generator.choice(n_tokens, site.n_random, replace=False))
