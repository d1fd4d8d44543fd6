"""Interventions: typed edits of SAE latents, applied to the tokens of one image (Pach et al., section 3.3)."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, assert_never, get_args

import pyarrow as pa
import torch

from sae_ray.encoders.info import EncoderInfo
from sae_ray.encoders.resizing import Box
from sae_ray.errors import SaeRayError, UsageError
from sae_ray.sae.few_latents import codes_of, divided
from sae_ray.sae.formats import LATENTS_FILE
from sae_ray.sae.model import SAE
from sae_ray.sae.sparse import Pattern
from sae_ray.steering.balanced import pushed
from sae_ray.steering.regions import Region, tokens_in
from sae_ray.store.files import Folder

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

Mode = Literal["set", "add", "scale", "ablate", "balanced"]
Unit = Literal["absolute", "max"]
OnError = Literal["drop", "keep"]

ALIASES: dict[str, Mode] = {"clamp": "set", "pin": "set", "nudge": "add", "mul": "scale", "suppress": "ablate"}
"""Names of the modes in other steering APIs; accepted by `Intervention.from_dict`."""

TowerEdit = Callable[["Float[Tensor, 'tokens d_in']"], "Float[Tensor, 'tokens d_in']"]
"""Maps one image's tokens, including CLS if there is one, to edited tokens. An `Intervention` is a `TowerEdit`."""


@dataclass(frozen=True)
class LatentEdit:
    """An edit of the value `a` of one latent, on every token.

    Raises UsageError for an unknown mode or unit, and for a strength that is not finite or does not fit the mode.
    """

    latent: int
    mode: Mode = "set"
    """`set`: a = strength. `add`: a + strength. `scale`: a * strength. `ablate`: a = 0. `balanced`: a push along the
    latent's decoder row in multiples of the token's own length (`sae_ray.steering.balanced`)."""
    strength: float = 0.0
    """Negative values suppress the latent. Must be left out for `ablate`."""
    unit: Unit = "absolute"
    """`max`: the strength is a multiple of the latent's largest value on a single token. For `set` and `add` only."""
    entries: int | None = None
    """Push along this many largest entries of the decoder row alone, however far the concept is present already. For
    `balanced` only."""

    def __post_init__(self):
        if not _is_index(self.latent):
            raise UsageError(f"latent is {self.latent!r}; it must be an integer, counted from 0")
        for name, value, known in (("mode", self.mode, Mode), ("unit", self.unit, Unit)):
            if value not in get_args(known):
                raise UsageError(f"{name} is {value!r}; it must be one of {', '.join(get_args(known))}")
        if isinstance(self.strength, bool) or not isinstance(self.strength, int | float):
            raise UsageError(f"strength of latent {self.latent} is {self.strength!r}; it must be a number")
        if not abs(self.strength) <= torch.finfo(torch.float32).max:  # NaN compares as false
            raise UsageError(f"strength of latent {self.latent} is {self.strength}; it must be finite in float32")
        if self.mode == "ablate" and self.strength != 0:
            raise UsageError(
                f"strength of latent {self.latent} is {self.strength:g}, but ablate takes none; leave it out"
            )
        if self.entries is not None and (self.mode != "balanced" or not _is_index(self.entries) or self.entries == 0):
            raise UsageError(
                f"entries of latent {self.latent} is {self.entries!r}; give a number from 1, and the mode balanced"
            )
        if self.unit == "max" and self.mode not in ("set", "add"):
            raise UsageError(
                f"unit of latent {self.latent} is 'max', which cannot be used with {self.mode}; use set or add"
            )

    def affine(self, max_token: Tensor | None) -> tuple[float, float]:
        """Factor and summand: the edited value is `factor * a + summand`."""
        strength = float(self.strength)
        if self.unit == "max":
            assert max_token is not None, "checked by Intervention"
            strength *= float(max_token[self.latent])
        match self.mode:
            case "set":
                return 0.0, strength
            case "add":
                return 1.0, strength
            case "scale":
                return strength, 0.0
            case "ablate":
                return 0.0, 0.0
            case "balanced":  # it is the token that changes
                return 1.0, 0.0
            case _:
                assert_never(self.mode)


@dataclass(frozen=True)
class Condition:
    """Holds on the tokens on which a latent is above some value, before the edits that depend on it.

    Raises UsageError for an unknown unit, and for a value that is negative or not finite.
    """

    latent: int
    above: float = 0.0
    unit: Unit = "absolute"
    """`max`: `above` is a multiple of the latent's largest value on a single token."""

    def __post_init__(self):
        if not _is_index(self.latent):
            raise UsageError(f"latent of when is {self.latent!r}; it must be an integer, counted from 0")
        if self.unit not in get_args(Unit):
            raise UsageError(f"unit of when is {self.unit!r}; it must be one of {', '.join(get_args(Unit))}")
        number = isinstance(self.above, int | float) and not isinstance(self.above, bool)
        if not number or not 0 <= self.above <= torch.finfo(torch.float32).max:
            raise UsageError(f"above of when is {self.above!r}; it must be a finite number, and at least 0")

    def threshold(self, max_token: Tensor | None) -> float:
        if self.unit == "absolute":
            return float(self.above)
        assert max_token is not None, "checked by Intervention"
        return float(self.above * max_token[self.latent])


@dataclass(frozen=True, eq=False)
class Intervention:
    """Edits of latents, applied to the tokens of an image: `intervention(x)` with x [tokens, d_in].

    With `a = encode(x)` and the edited codes ã, the result is `decode(ã)` (the paper), or `x + (ã - a) @ W_dec` with
    `error="keep"`. It is computed on the SAE's device and in its precision, at least float32. The result has the dtype
    and device of x. Tokens outside of `tokens` and `region`, and those on which `when` does not hold, keep every bit.

    Raises UsageError if an edit or the condition does not fit the SAE.
    """

    sae: SAE
    edits: tuple[LatentEdit, ...] = ()
    """At most one per latent."""
    error: OnError = "drop"
    """Whether to drop or keep the part of x that the SAE does not reconstruct."""
    isolate: bool = False
    """Set all other latents to zero."""
    tokens: tuple[int, ...] | None = None
    """The tokens to edit, numbered as in a `Site` (0 is CLS if there is one); None for all."""
    max_token: Float[Tensor, " d_sae"] | None = None
    """Each latent's largest value on a single token (`load_max_token`); needed for the unit `max`."""
    region: Region | None = None
    """The part of the image to edit: its patches (`tokens_in`), never CLS; None for all. A `Llava` finds them by the
    image; for tokens alone, use `at`."""
    when: Condition | None = None
    """Where it holds, tokens are edited; None for everywhere."""

    def __post_init__(self):
        d_sae = self.sae.d_sae
        if self.error not in get_args(OnError):
            raise UsageError(f"error is {self.error!r}; it must be one of {', '.join(get_args(OnError))}")
        if not isinstance(self.isolate, bool):
            raise UsageError(f"isolate is {self.isolate!r}; it must be true or false")
        if self.tokens is not None and (not self.tokens or not all(_is_index(token) for token in self.tokens)):
            raise UsageError(
                f"tokens is {list(self.tokens)!r}; give token numbers from 0 (the CLS token if there is one), "
                "or leave it out to edit all tokens"
            )
        if self.max_token is not None and self.max_token.shape != (d_sae,):
            raise UsageError(f"max_token has shape {list(self.max_token.shape)}, but the SAE has {d_sae} latents")
        latents = [edit.latent for edit in self.edits]
        for edit in self.edits:
            if edit.latent >= d_sae:
                raise UsageError(f"latent is {edit.latent}; the SAE has latents 0 to {d_sae - 1} (d_sae = {d_sae})")
            if latents.count(edit.latent) > 1:
                raise UsageError(f"latent {edit.latent} is edited twice; remove one of the edits")
            if edit.mode == "balanced":
                self._check_balanced(edit)
            if edit.unit == "max":
                self._check_maximum(edit.latent, "strength")
        if self.when is not None:
            if self.when.latent >= d_sae:
                raise UsageError(f"latent of when is {self.when.latent}; the SAE has latents 0 to {d_sae - 1}")
            if self.when.unit == "max":
                self._check_maximum(self.when.latent, "above")

    def _check_maximum(self, latent: int, what: str) -> None:
        if self.max_token is None:
            raise UsageError(
                f"{what} of latent {latent} is in multiples of max_token, which is unknown; give an absolute {what}, "
                f"or an SAE whose directory has a {LATENTS_FILE}, as written by a study"
            )
        if not self.max_token[latent] > 0:
            raise UsageError(
                f"{what} of latent {latent} is in multiples of max_token, but this latent never fired; give an "
                f"absolute {what} or another latent"
            )

    def _check_balanced(self, edit: LatentEdit) -> None:
        if self.error != "keep":
            raise UsageError(f"error is {self.error!r}; balanced changes the activation itself, so make it 'keep'")
        if edit.entries is not None and edit.entries > self.sae.d_in:
            raise UsageError(f"entries of latent {edit.latent} is {edit.entries}; a decoder row has {self.sae.d_in}")
        known = self.max_token is not None and bool(self.max_token[edit.latent] > 0)
        if edit.entries is None and not self.sae.kind.codes_below_1 and not known:
            raise UsageError(
                f"balanced asks how present latent {edit.latent} is, in multiples of its max_token, which is unknown "
                f"or 0; give an SAE whose directory has a {LATENTS_FILE}, another latent, or entries"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], sae: SAE, max_token: Tensor | None = None) -> Intervention:
        """From plain values, as in a JSON file. Aliases of modes are accepted.

        Args:
            values: `{"edits": [{"latent": 39, "mode": "set", "strength": 4, "unit": "max"}], "error": "drop",
                "isolate": false, "tokens": null, "region": {"rectangles": [[0, 0, 0.5, 1]], "mask": "mask.png"},
                "when": {"latent": 7, "above": 1, "unit": "max"}}`. All keys except `latent` may be left out for their
                defaults.

        Raises:
            UsageError: A key is unknown, or a value is invalid.
        """
        values = _checked(values, "the intervention", ("edits", "error", "isolate", "tokens", "region", "when"))
        edits = values.pop("edits", ())
        if not _is_list(edits):
            raise UsageError(f"edits is {edits!r}; it must be a list")
        tokens = values.pop("tokens", None)
        if tokens is not None and not _is_list(tokens):
            raise UsageError(f"tokens is {tokens!r}; it must be a list of token numbers, or null for all")
        region, when = values.pop("region", None), values.pop("when", None)
        return cls(
            sae,
            tuple(_edit_from(edit, f"edits[{place}]") for place, edit in enumerate(edits)),
            tokens=None if tokens is None else tuple(tokens),
            max_token=max_token,
            region=None if region is None else Region.from_dict(region),
            when=None if when is None else _condition_from(when),
            **values,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` takes them."""
        edits = [asdict(edit) for edit in self.edits]
        return {
            "edits": [{name: value for name, value in edit.items() if value is not None} for edit in edits],
            "error": self.error,
            "isolate": self.isolate,
            "tokens": None if self.tokens is None else list(self.tokens),
            "region": None if self.region is None else self.region.to_dict(),
            "when": None if self.when is None else asdict(self.when),
        }

    def at(self, view: Box, tower: EncoderInfo) -> Intervention:
        """The same with `tokens` in place of a region, for an image of which the tower sees this part.

        Raises UsageError as `tokens_in`, and if none of `tokens` lies in the region.
        """
        if self.region is None:
            return self
        inside = tokens_in(self.region, view, tower)
        tokens = tuple(token for token in self.tokens if token in inside) if self.tokens is not None else inside
        if not tokens:
            raise UsageError(f"none of tokens {list(self.tokens or ())} lies in region, which has {list(inside)}")
        return replace(self, region=None, tokens=tokens)

    def __call__(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_in"]:
        """The edited tokens; x is not changed.

        Raises UsageError if the width of x differs from the SAE's, `tokens` names a token that x does not have, or
        there is a region, whose tokens depend on the image.
        """
        return edit_each([self], [x])[0]

    def _present(self, latent: int, codes: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
        """How far a latent's concept is present, from 0 to 1."""
        if self.sae.kind.codes_below_1 or self.max_token is None:
            return codes
        return (codes / float(self.max_token[latent])).clamp(max=1)

    def _chosen(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "chosen d_in"]:
        """The tokens to edit."""
        if self.region is not None:
            raise UsageError("region needs the image to find its tokens; give the image to a Llava, or use at(…)")
        if self.tokens is None:
            return x
        if max(self.tokens) >= len(x):
            raise UsageError(f"tokens has {max(self.tokens)}; there are only tokens 0 to {len(x) - 1}")
        return x[list(self.tokens)]

    def _put_back(
        self, chosen: Float[Tensor, "chosen d_in"], x: Float[Tensor, "tokens d_in"]
    ) -> Float[Tensor, "tokens d_in"]:
        """The image with these in place of its chosen tokens."""
        if self.tokens is None:
            return chosen
        result = x.clone()
        result[list(self.tokens)] = chosen
        return result


@torch.no_grad()
def edit_each(
    interventions: Sequence[Intervention], images: Sequence[Float[Tensor, "tokens d_in"]]
) -> list[Float[Tensor, "tokens d_in"]]:
    """Each image with its own intervention. Those of one SAE and one kind are encoded and decoded together.

    An image's result is the one that it has alone, up to rounding: products of another shape add up in another order.

    Args:
        images: the tokens of each, of one dtype and on one device. They are not changed.

    Raises UsageError as an `Intervention` does.
    """
    edited = list(images)
    kinds: dict[tuple[int, OnError, bool], list[int]] = {}
    for place, one in enumerate(interventions):
        if one.error == "drop" or one.edits or one.isolate:
            kinds.setdefault((id(one.sae), one.error, one.isolate), []).append(place)
    for places in kinds.values():
        alike = [interventions[place] for place in places]
        chosen = [one._chosen(images[place]) for one, place in zip(alike, places, strict=True)]
        lengths = [len(tokens) for tokens in chosen]
        x = torch.cat(chosen)
        replaced = _replaced(alike, x, lengths)
        if any(one.when is not None for one in alike):
            replaced = torch.where(_holds(alike, x, lengths)[:, None], replaced, x)
        for one, place, tokens in zip(alike, places, replaced.split(lengths), strict=True):
            edited[place] = one._put_back(tokens, images[place])
    return edited


def _replaced(
    alike: Sequence[Intervention], x: Float[Tensor, "rows d_in"], lengths: Sequence[int]
) -> Float[Tensor, "rows d_in"]:
    """The edited rows of several images, `lengths` of each. Their interventions are of one SAE and one kind."""
    sae, drop, isolate = alike[0].sae, alike[0].error == "drop", alike[0].isolate
    latents = list(dict.fromkeys(edit.latent for one in alike for edit in one.edits))
    column = {latent: place for place, latent in enumerate(latents)}
    if drop == isolate:  # no other latent has a part in the result
        before, others = codes_of(sae, latents)(x), None
    else:
        before, others = divided(sae.encode_sparse(x), latents)

    # What only another image edits stays as it is, unless it is among all those that are set to zero.
    affine = torch.tensor([0.0 if isolate else 1.0, 0.0], dtype=torch.float64).repeat(len(alike), len(latents), 1)
    for own, one in zip(affine, alike, strict=True):
        for edit in one.edits:
            own[column[edit.latent]] = own.new_tensor(edit.affine(one.max_token))
    of_image = torch.tensor(lengths, device=before.device)
    factor, summand = affine.to(before).repeat_interleave(of_image, dim=0, output_size=len(x)).unbind(-1)
    after = before * factor + summand

    change = (after if drop else after - before) @ sae.W_dec[latents].to(before)
    if others is not None:
        pattern = Pattern(others.rows, others.latents, others.n_rows, others.d_sae)
        sums = pattern.row_sums(others.values, sae.W_dec.to(before))
        change = change - sums if isolate else change + sums
    start = x.to(before)
    if drop:
        return sae.restored(sae.b_dec.to(before) + change, start).to(x)
    result = sae.added(start, change)
    pieces = (rows.split(lengths) for rows in (result, start, before))
    for one, own, tokens, codes in zip(alike, *pieces, strict=True):
        for edit in one.edits:
            if edit.mode == "balanced":
                direction = sae.W_dec[edit.latent].to(before)
                present = one._present(edit.latent, codes[:, column[edit.latent]])
                own += pushed(tokens, present, direction, edit.strength, edit.entries)
    return result.to(x)


def _holds(
    alike: Sequence[Intervention], x: Float[Tensor, "rows d_in"], lengths: Sequence[int]
) -> Bool[Tensor, " rows"]:
    """On which rows of several images, `lengths` of each, the conditions of their interventions hold."""
    latents = list(dict.fromkeys(one.when.latent for one in alike if one.when is not None))
    codes = codes_of(alike[0].sae, latents)(x)
    holds = [
        torch.ones(len(own), dtype=torch.bool, device=codes.device)
        if one.when is None
        else own[:, latents.index(one.when.latent)] > one.when.threshold(one.max_token)
        for one, own in zip(alike, codes.split(list(lengths)), strict=True)
    ]
    return torch.cat(holds).to(x.device)


def load_max_token(folder: str | Path | Folder) -> Float[Tensor, " d_sae"]:
    """Each latent's largest value on a single token, float64, from the `latents.parquet` in an SAE's directory.

    Raises:
        UsageError: There is no such file.
        SaeRayError: The file is damaged.
    """
    folder = folder if isinstance(folder, Folder) else Folder(folder)
    if not folder.exists(LATENTS_FILE):
        raise UsageError(
            f"{folder} has no {LATENTS_FILE}, so strengths in multiples of max_token are undefined; give absolute "
            "strengths, or an SAE directory written by a study"
        )
    try:
        return torch.from_numpy(folder.read_parquet(LATENTS_FILE).sort_by("latent")["max_token"].to_numpy().copy())
    except (pa.ArrowInvalid, KeyError) as error:
        raise SaeRayError(f"{folder / LATENTS_FILE} has no max_token per latent ({error}); copy it again") from error


def _edit_from(values: Any, where: str) -> LatentEdit:
    values = _checked(values, where, [item.name for item in fields(LatentEdit)])
    if "latent" not in values:
        raise UsageError(f"{where}: latent is missing; give a latent's number")
    mode = values.get("mode")
    if isinstance(mode, str):
        values["mode"] = ALIASES.get(mode, mode)
    return LatentEdit(**values)


def _condition_from(values: Any) -> Condition:
    values = _checked(values, "when", [item.name for item in fields(Condition)])
    if "latent" not in values:
        raise UsageError("when: latent is missing; give a latent's number")
    return Condition(**values)


def _checked(values: Any, where: str, known: Sequence[str]) -> dict[str, Any]:
    """A copy of the table. Raises UsageError if it is not a table or has unknown keys."""
    if not isinstance(values, Mapping):
        raise UsageError(f"{where} is {values!r}; it must be a table with the keys {', '.join(known)}")
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise UsageError(f"{where} has the unknown key {key!r}; {hint}")
    return dict(values)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
