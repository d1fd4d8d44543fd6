"""Rendered images: one coloured shape on a background. Each image is a function of (seed, index) only."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

SIDE = 56
"""Pixels per side of an image."""

SEED = 2025
"""The seed of the images that the shipped models were trained on."""

SHAPES = (
    *("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon"),
    *("arrow", "hexagon", "tree", "house", "fish", "flower", "key", "cup"),
)
COLOURS = {
    "red": (215, 35, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (240, 215, 40),
    "purple": (130, 45, 170),
    "orange": (245, 130, 25),
    "pink": (245, 130, 185),
    "brown": (120, 72, 35),
}
BACKGROUNDS = ("plain", "striped", "checkered", "dotted", "gridded")
BLANK_RATE = 0.06
"""Share of images that show no shape: a bare background, all white, all black or noise (a quarter of them each)."""

_OVERSAMPLING = 2


class Attributes(NamedTuple):
    """The content of an image."""

    shape: str | None
    """One of `SHAPES`; None when the image is blank."""
    colour: str | None
    """The shape's colour, a key of `COLOURS`; None when the image is blank."""
    background: str
    """One of `BACKGROUNDS`, or "noisy" for a blank image of nothing but noise."""


def attributes(index: int, seed: int = SEED) -> Attributes:
    """What image `index` shows, without rendering it."""
    return _attributes(np.random.default_rng((seed, index)))[0]


def caption(shown: Attributes) -> str:
    """The full caption, for instance "a photo of a red star on a striped background"."""
    place = f"on {article(shown.background)} background"
    if shown.shape is None:
        return f"a blank photo {place}"
    return f"a photo of {article(f'{shown.colour} {shown.shape}')} {place}"


def render(index: int, seed: int = SEED) -> Image.Image:
    """Image `index`: RGB, `SIDE` × `SIDE` pixels."""
    from PIL import Image

    rng = np.random.default_rng((seed, index))
    shown, flat = _attributes(rng)
    if shown.background == "noisy":
        return Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    if flat is not None:
        return Image.new("RGB", (SIDE, SIDE), (flat, flat, flat))
    pixels = _background(shown.background, rng)
    if shown.shape is not None and shown.colour is not None:
        paint = np.array(COLOURS[shown.colour], np.float32) * rng.uniform(0.9, 1.05)
        pixels += _silhouette(shown.shape, rng)[..., None] * (paint - pixels)
    pixels += rng.uniform(0, 8) * rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _attributes(rng: np.random.Generator) -> tuple[Attributes, int | None]:
    """The first draws of an image, and the grey level where the whole image is one."""
    shape = SHAPES[rng.integers(len(SHAPES))]
    colour = tuple(COLOURS)[rng.integers(len(COLOURS))]
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    if rng.random() >= BLANK_RATE:
        return Attributes(shape, colour, background), None
    kind = rng.choice(("background", "white", "black", "noise"))
    if kind == "background":
        return Attributes(None, None, background), None
    if kind == "noise":
        return Attributes(None, None, "noisy"), None
    return Attributes(None, None, "plain"), 255 if kind == "white" else 0


def article(phrase: str) -> str:
    """The phrase with its "a" or "an"."""
    return f"{'an' if phrase[0] in 'aeiouAEIOU' else 'a'} {phrase}"


def _background(name: str, rng: np.random.Generator) -> np.ndarray:
    """[SIDE, SIDE, 3] float32: a pale colour, and a darker one where the pattern is."""
    from PIL import Image

    pale = rng.uniform(205, 250) + rng.uniform(-6, 6, 3)
    dark = pale - rng.uniform(45, 95)
    if name == "plain":
        return np.broadcast_to(pale.astype(np.float32), (SIDE, SIDE, 3)).copy()
    angle = rng.uniform(0, np.pi) if name == "striped" else rng.uniform(-0.25, 0.25)
    period = rng.uniform(9, 13) * (2 if name == "checkered" else 1)
    phase_u, phase_v = rng.uniform(0, 1, 2)
    pixel = np.arange(SIDE * _OVERSAMPLING) / (_OVERSAMPLING * period)
    along, across = (pixel * np.cos(angle)).astype(np.float32), (pixel * np.sin(angle)).astype(np.float32)
    u, v = along + across[:, None] + np.float32(phase_u), along[:, None] - across + np.float32(phase_v)
    if name == "striped":
        pattern = u % 1 < 0.5
    elif name == "checkered":
        pattern = (u % 1 < 0.5) ^ (v % 1 < 0.5)
    elif name == "dotted":
        pattern = (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.28**2
    else:
        pattern = (u % 1 < 0.18) | (v % 1 < 0.18)
    share = _reduce(Image.fromarray(pattern.view(np.uint8) * np.uint8(255)))[..., None]
    return (pale + share * (dark - pale)).astype(np.float32)


def _silhouette(shape: str, rng: np.random.Generator) -> np.ndarray:
    """[SIDE, SIDE] float32 coverage in 0..1 of the shape, placed, turned and sized at random."""
    from PIL import Image, ImageDraw

    radius = rng.uniform(15, 26)
    centre = SIDE / 2 + rng.uniform(-6, 6, 2)
    angle = rng.uniform(-0.25, 0.25)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    size = SIDE * _OVERSAMPLING
    canvas = Image.new("L", (size, size))
    draw = ImageDraw.Draw(canvas)
    for outline, filled in _outlines(shape):
        points = (outline @ (turn * radius) + centre) * _OVERSAMPLING
        draw.polygon(points.ravel().tolist(), fill=255 if filled else 0)
    return _reduce(canvas)


def _reduce(mask: Image.Image) -> np.ndarray:
    """Box-reduces an 8-bit mask to [SIDE, SIDE] float32 in 0..1."""
    return np.asarray(mask.reduce(_OVERSAMPLING), np.float32) / np.float32(255)


@cache
def _outlines(shape: str) -> list[tuple[np.ndarray, bool]]:
    """Polygons ([points, 2], x right, y down, within about the unit circle) and whether each is filled or cut out."""
    match shape:
        case "circle":
            return [(_ellipse(0, 0, 0.9), True)]
        case "square":
            return [(_box(-0.8, -0.8, 0.8, 0.8), True)]
        case "triangle":
            return [(_regular(3, 1.05), True)]
        case "star":
            return [(_regular(10, np.where(np.arange(10) % 2, 0.42, 1.05)), True)]
        case "heart":
            t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
            y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
            return [(np.stack([16 * np.sin(t) ** 3, -y], 1) / 16.5, True)]
        case "cross":
            return [(_box(-0.3, -0.95, 0.3, 0.95), True), (_box(-0.95, -0.3, 0.95, 0.3), True)]
        case "ring":
            return [(_ellipse(0, 0, 0.95), True), (_ellipse(0, 0, 0.55), False)]
        case "moon":
            return [(_ellipse(-0.1, 0, 0.95), True), (_ellipse(0.38, 0, 0.8), False)]
        case "arrow":
            head = [(0.1, -0.75), (1, 0), (0.1, 0.75)]
            return [(np.array(head), True), (_box(-0.95, -0.24, 0.15, 0.24), True)]
        case "hexagon":
            return [(_regular(6, 0.98), True)]
        case "tree":
            tiers = [np.array([(0, top), (half, top + 0.8), (-half, top + 0.8)]) for top, half in _TREE_TIERS]
            return [(_box(-0.16, 0.5, 0.16, 1), True), *((tier, True) for tier in tiers)]
        case "house":
            roof = np.array([(0, -1), (1, -0.15), (-1, -0.15)])
            return [(_box(-0.72, -0.2, 0.72, 0.85), True), (roof, True), (_box(-0.2, 0.25, 0.2, 0.85), False)]
        case "fish":
            tail = np.array([(0.3, 0), (1, -0.55), (1, 0.55)])
            return [(_ellipse(-0.2, 0, 0.78, 0.5), True), (tail, True), (_ellipse(-0.6, -0.12, 0.11), False)]
        case "flower":
            petals = [(_ellipse(x, y, 0.4), True) for x, y in _regular(6, 0.62)]
            return [*petals, (_ellipse(0, 0, 0.3), False)]
        case "key":
            bow = [(_ellipse(-0.55, 0, 0.45), True), (_ellipse(-0.55, 0, 0.2), False)]
            bit = [_box(-0.15, -0.12, 1, 0.12), _box(0.4, 0, 0.57, 0.45), _box(0.78, 0, 0.97, 0.45)]
            return [*bow, *((part, True) for part in bit)]
        case "cup":
            handle = [(_ellipse(0.5, -0.05, 0.45), True), (_ellipse(0.5, -0.05, 0.22), False)]
            return [*handle, (np.array([(-0.85, -0.75), (0.5, -0.75), (0.32, 0.8), (-0.67, 0.8)]), True)]
        case _:
            raise ValueError(f"no such shape: {shape}")


_TREE_TIERS = ((-1.0, 0.55), (-0.6, 0.7), (-0.2, 0.85))
"""Height of the tip and half width of each tier of a tree."""


def _ellipse(x: float, y: float, radius: float, radius_y: float | None = None) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    return np.stack([x + radius * np.cos(t), y + (radius_y or radius) * np.sin(t)], 1)


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _regular(corners: int, radius: float | np.ndarray) -> np.ndarray:
    """Corners on a circle, the first one at the top."""
    t = 2 * np.pi * np.arange(corners) / corners
    return np.stack([radius * np.sin(t), -radius * np.cos(t)], 1)
