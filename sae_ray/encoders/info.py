"""What is known about an encoder without its weights, and which sites it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, assert_never

from sae_ray.encoders.sites import Site
from sae_ray.errors import UsageError
from sae_ray.store.files import address_shown

IMPORTED = "imported"
"""What stands for the encoder, and for the path of images, where activations come from elsewhere."""


@dataclass(frozen=True)
class EncoderInfo:
    """What is known about an encoder without its weights; `dataclasses.asdict` and `from_dict` store it as JSON."""

    model: str
    """Its specification, as the user gave it."""
    revision: str | None
    """What pins the weights: the commit on the hub, the SHA-256 of a directory's files, or open_clip's tag."""
    family: str
    """Such as `clip`, `llava` or `open_clip`."""
    n_layers: int
    """Blocks that have a residual stream; 0 for a convolutional tower."""
    residual_width: int | None
    """Width of the residual stream; None where there is none."""
    projection_width: int | None
    """Width of the image embedding shared with text; None where there is none."""
    pooled_width: int | None
    """Width of the pooler output; None where there is none."""
    has_cls: bool
    """Whether token 0 is a CLS token."""
    n_registers: int
    """Register tokens, which no site takes."""
    n_tokens: int
    """Length of the sequence without registers, with CLS."""
    image_size: tuple[int, int]
    """Height and width in pixels that the preprocessing yields."""
    has_text: bool
    """Whether it embeds texts too, in the space of `projection`."""
    imported: Mapping[str, Sequence[int]] = field(default_factory=dict, hash=False)
    """Of activations from elsewhere: name of the site -> width, rows per image. Empty for an encoder."""

    @classmethod
    def of_imported(cls, sites: Mapping[str, Sequence[int]]) -> EncoderInfo:
        """What stands for the encoder of activations from elsewhere."""
        return cls(IMPORTED, None, IMPORTED, 0, None, None, None, False, 0, 1, (0, 0), False, sites)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderInfo:
        """The inverse of `dataclasses.asdict`, also from JSON, which has no tuples."""
        height, width = values["image_size"]
        return cls(**{**values, "image_size": (height, width)})

    @property
    def name(self) -> str:
        """The specification as it may be shown: without keys."""
        return address_shown(self.model)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of the patches, in proportion to the image's sides; for towers that have patches."""
        n_patches = self.n_tokens - self.has_cls
        rows = round((n_patches * self.image_size[0] / self.image_size[1]) ** 0.5)
        return rows, n_patches // rows

    def width(self, point: Literal["residual", "mlp", "projection", "pooled", "imported"]) -> int | None:
        match point:
            case "residual":
                return self.residual_width
            case "mlp":  # the towers of these name their MLPs in many ways
                return None if self.family in ("open_clip", "timm") else self.residual_width
            case "projection":
                return self.projection_width
            case "pooled":
                return self.pooled_width
            case "imported":  # each site has its own
                return None
            case never:
                assert_never(never)


def check_site(info: EncoderInfo, site: Site) -> None:
    """Refuses a site that the encoder does not have.

    Raises:
        UsageError: The site does not exist; the message names those that do.
    """
    if site.label is not None:
        if site.label not in info.imported:
            there = ", ".join(info.imported) or "none"
            raise UsageError(f"site is {site.label!r}, which was not imported; there is {there}: use `sae-ray import`")
        return
    if info.width(site.point) is None:
        there = [point for point in ("residual", "mlp", "projection", "pooled") if info.width(point) is not None]
        raise UsageError(f"point is {site.point!r}, which {info.name} does not have; it has {', '.join(there)}")
    if site.layer is not None and site.layer >= info.n_layers:
        raise UsageError(
            f"layer is {site.layer}, but {info.name} has {info.n_layers} layers; name one from 0 to {info.n_layers - 1}"
        )
    if site.tokens == "cls" and not info.has_cls:
        raise UsageError(f"tokens is 'cls', but {info.name} has no CLS token; take mean, all or random:n")
    if site.n_random is not None and site.n_random > info.n_tokens:
        raise UsageError(
            f"tokens is {site.tokens!r}, but {info.name} has {info.n_tokens} tokens per image; ask for at most "
            f"{info.n_tokens}"
        )


def readout(info: EncoderInfo, site: Site) -> Site | None:
    """The output that is computed from the activations at a site: `projection`, or else `pooled`, or the site itself.

    None if there is none. The mean of tokens is computed beside the encoder's own path, and of an MLP's output only the
    residual stream is made.
    """
    if site.point in ("projection", "pooled"):
        return site
    if site.point != "residual" or site.tokens == "mean":
        return None
    sites = [Site("projection"), Site("pooled")]
    return next((one for one in sites if info.width(one.point) is not None), None)


def check_text_side(info: EncoderInfo) -> None:
    """Refuses an encoder that embeds images only.

    Raises:
        UsageError: It has no text side.
    """
    if not info.has_text:
        raise UsageError(f"{info.name} does not embed texts; name a CLIP, SigLIP or open_clip model")


def site_width(info: EncoderInfo, site: Site) -> int:
    """`d_in` of the site's activations."""
    check_site(info, site)
    width = info.imported[site.label][0] if site.label is not None else info.width(site.point)
    assert width is not None
    return width


def rows_per_image(info: EncoderInfo, site: Site) -> int:
    """How many activations the site gives per image."""
    check_site(info, site)
    if site.label is not None:
        return info.imported[site.label][1]
    if site.tokens == "all":
        return info.n_tokens
    return site.n_random or 1
