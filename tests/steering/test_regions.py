"""Regions of images and the patches in them: known answers, properties, and the geometry of real processors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil

from sae_ray.encoders.info import EncoderInfo
from sae_ray.encoders.resizing import WHOLE, Box
from sae_ray.encoders.transformers_models import Preprocess, resizing
from sae_ray.errors import UsageError
from sae_ray.steering.regions import Region, tokens_in
from tests.serve.conftest import stored

ROWS, COLUMNS, PATCH = 4, 6, 7
TOWER = EncoderInfo(
    model="tower",
    revision=None,
    family="clip",
    n_layers=3,
    residual_width=32,
    projection_width=None,
    pooled_width=None,
    has_cls=True,
    n_registers=0,
    n_tokens=1 + ROWS * COLUMNS,
    image_size=(ROWS * PATCH, COLUMNS * PATCH),
    has_text=False,
)
ALL = tuple(range(1, TOWER.n_tokens))
BOX_OF_CLIP = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
PROCESSORS = {
    "cropped": CLIPImageProcessorPil(**BOX_OF_CLIP),
    "cropped smaller": CLIPImageProcessorPil(**BOX_OF_CLIP | {"crop_size": {"height": 21, "width": 24}}),
    "padded": CLIPImageProcessorPil(**BOX_OF_CLIP | {"size": {"shortest_edge": 23}}),
    "not cropped": CLIPImageProcessorPil(size={"height": 28, "width": 42}, do_center_crop=False),
    "stretched": SiglipImageProcessorPil(size={"height": 28, "width": 28}),
}


@st.composite
def boxes(draw, smallest: float = 0.01) -> Box:
    (left, right), (top, bottom) = (
        sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda ends: abs(ends[0] - ends[1]) > smallest)))
        for _ in range(2)
    )
    return Box(left, top, right, bottom)


def tokens(region: Region, view: Box = WHOLE, tower: EncoderInfo = TOWER) -> set[int]:
    """Empty where they are refused."""
    try:
        return set(tokens_in(region, view, tower))
    except UsageError:
        return set()


@st.composite
def spans(draw, n: int) -> tuple[int, int]:
    start = draw(st.integers(0, n - 1))
    return start, draw(st.integers(start + 1, n))


@given(spans(ROWS), spans(COLUMNS), st.booleans())
def test_a_rectangle_around_patches_has_these(rows, columns, has_cls):
    box = Box(columns[0] / COLUMNS, rows[0] / ROWS, columns[1] / COLUMNS, rows[1] / ROWS)
    tower = replace(TOWER, has_cls=has_cls, n_tokens=TOWER.n_tokens - (not has_cls))
    expected = [has_cls + row * COLUMNS + column for row in range(*rows) for column in range(*columns)]
    assert list(tokens_in(Region((box,)), WHOLE, tower)) == expected


def test_the_whole_image_has_all_patches_and_never_cls():
    assert tokens_in(Region((WHOLE,)), WHOLE, TOWER) == ALL
    assert tokens_in(Region((WHOLE,)), Box(0.2, 0, 0.8, 1), TOWER) == ALL
    assert tokens_in(Region(mask=np.ones((3, 1), dtype=bool)), Box(0, 0.4, 1, 0.6), TOWER) == ALL


@given(st.lists(boxes(), min_size=1, max_size=4), boxes(), boxes())
def test_more_region_has_no_fewer_patches(some, more, view):
    seen = [one for one in some if one.meets(view)]
    if seen:
        apart = set().union(*(tokens(Region((one,)), view) for one in seen))
        together = tokens(Region(tuple(seen)), view)
        assert apart <= together <= tokens(Region((*seen, more if more.meets(view) else WHOLE)), view) <= set(ALL)
    wider = Box(more.left / 2, more.top, (1 + more.right) / 2, more.bottom)
    if more.meets(view):
        assert tokens(Region((more,)), view) <= tokens(Region((wider,)), view)


@given(boxes(), boxes())
def test_a_patch_counts_by_half(box, view):
    """Against the area of the rectangle in the patch, wherever that is not too close to a half for whole pixels."""
    found = tokens(Region((box,)), view)
    for token in ALL:
        row, column = divmod(token - 1, COLUMNS)
        width, height = (view.right - view.left) / COLUMNS, (view.bottom - view.top) / ROWS
        left, top = view.left + column * width, view.top + row * height
        shares = [
            max(0.0, min(box.right, left + width) - max(box.left, left)) / width,
            max(0.0, min(box.bottom, top + height) - max(box.top, top)) / height,
        ]
        low, high = (np.prod([min(1, max(0, share + by)) for share in shares]) for by in (-1.01 / PATCH, 1.01 / PATCH))
        if low >= 0.5 or high < 0.5:
            assert (token in found) == (low >= 0.5), (token, shares)


@pytest.mark.parametrize("size", [(2, 2), (28, 42), (200, 300), (1000, 10)])
def test_a_mask_of_any_size_lies_over_the_image(size):
    mask = np.zeros(size, dtype=bool)
    mask[: size[0] // 2, size[1] // 2 :] = True
    assert tokens_in(Region(mask=mask), WHOLE, TOWER) == tokens_in(Region((Box(0.5, 0, 1, 0.5),)), WHOLE, TOWER)
    both = Region((Box(0, 0.5, 0.5, 1),), mask)
    assert set(tokens_in(both, WHOLE, TOWER)) == tokens(Region(mask=mask)) | tokens(Region(both.rectangles))


@given(st.sampled_from(list(PROCESSORS)), st.integers(20, 250), st.integers(20, 250))
def test_the_tower_sees_that_part_of_the_image(name, width, height):
    """Every pixel of the image tells where it is. What the processor makes of that is what the view says."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    preprocess = resizing(PROCESSORS[name])
    seen = preprocess(Image.fromarray(np.stack([x, y, 0 * x], axis=-1))).astype(float)
    view = preprocess.view((width, height))
    for values, low, high, length in (
        (seen[0], view.left, view.right, width),
        (seen[1].T, view.top, view.bottom, height),
    ):
        across = low + (np.arange(values.shape[1]) + 0.5) / values.shape[1] * (high - low)
        middle = values[values.shape[0] // 2]
        blurred = max(3, 3 * length * (high - low) / len(across))  # pixels that the image's edge reaches
        for share, value in zip(across, middle, strict=True):
            place = share * length - 0.5
            if blurred < place < length - 1 - blurred:
                assert abs(value - place) <= 1.01
            elif not 0 < share < 1:
                assert value == 0, "padding"


def test_a_photo_is_cropped_to_its_middle():
    view = resizing(PROCESSORS["cropped"]).view
    assert view((84, 56)) == pytest.approx((1 / 6, 0, 5 / 6, 1))
    assert view((50, 100)) == (0, 0.25, 1, 0.75)
    assert view((33, 33)) == (0, 0, 1, 1)
    assert resizing(PROCESSORS["stretched"]).view((84, 56)) == WHOLE
    padded = resizing(PROCESSORS["padded"]).view((23, 23))
    assert padded == pytest.approx((-3 / 23, -3 / 23, 25 / 23, 25 / 23))
    assert tokens(Region((WHOLE,)), Box(-0.4, -0.4, 1.4, 1.4)) == set(ALL) - {
        *range(1, 7),
        *range(19, 25),
        7,
        12,
        13,
        18,
    }


@pytest.mark.parametrize("outside", [Box(0, 0, 0.16, 1), Box(0.84, 0.4, 1, 0.6)])
def test_a_rectangle_outside_of_the_crop_is_refused(outside):
    view = resizing(PROCESSORS["cropped"]).view((84, 56))
    with pytest.raises(
        UsageError, match=r"outside of what the model sees .* crops images, here to \[0.167, 0, 0.833, 1\]"
    ):
        tokens_in(Region((WHOLE, outside)), view, TOWER)


def test_a_region_of_less_than_half_a_patch_is_refused():
    speck = np.zeros((56, 84), dtype=bool)
    speck[3, 4] = True
    for region in (Region((Box(0, 0, 0.08, 0.9),)), Region(mask=speck)):
        with pytest.raises(UsageError, match=r"no patch lies in region by at least half: .* 4 × 6 patches"):
            tokens_in(region, WHOLE, TOWER)


def test_other_preprocessing_is_refused():
    with pytest.raises(UsageError, match="LlavaImageProcessorPil does more, so name tokens"):
        Preprocess(LlavaImageProcessorPil(), plain=False, fast=False).view((40, 30))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "region is empty"),
        ({"rectangles": []}, "region is empty"),
        ([0, 0, 1, 1], "must be a table with the keys rectangles and mask"),
        ({"rectangle": [[0, 0, 1, 1]]}, "must be a table with the keys"),
        ({"rectangles": [0, 0, 1, 1]}, "must be a list of"),
        ({"rectangles": [[0, 0, 1]]}, "must be a list of"),
        ({"rectangles": [[0, 0, 1, "1"]]}, "must be a list of"),
        ({"rectangles": [[0.5, 0, 0.5, 1]]}, r"rectangle \[0.5, 0, 0.5, 1\]; .* left < right"),
        ({"rectangles": [[0, 0.6, 1, 0.5]]}, "top < bottom"),
        ({"rectangles": [[0, 0, 56, 56]]}, "fractions of the image from 0 to 1"),
        ({"rectangles": [[-0.1, 0, 1, 1]]}, "from 0 to 1"),
        ({"rectangles": [[0, 0, 1, float("nan")]]}, "from 0 to 1"),
        ({"mask": 7}, "mask of region is 7"),
        ({"mask": "nowhere.png"}, "mask of region is nowhere.png, which is not a usable image"),
        ({"mask": "data:image/png;base64,AAAA"}, "not a usable image"),
        ({"mask": "data:image/png;base64,?"}, "not a usable image"),
    ],
)
def test_regions_that_cannot_be_are_refused(values, words):
    with pytest.raises(UsageError, match=words):
        Region.from_dict(values)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_upright(orientation, tmp_path):
    drawn = Image.new("L", (84, 56))
    drawn.paste(255, (42, 0, 84, 20))
    (tmp_path / "mask.png").write_bytes(stored(drawn, orientation, "PNG"))
    assert np.array_equal(Region.from_dict({"mask": str(tmp_path / "mask.png")}).mask, np.asarray(drawn) > 0)


def test_an_empty_mask_is_refused():
    with pytest.raises(UsageError, match="the mask of region is empty"):
        Region(mask=np.zeros((3, 3), dtype=bool))


def test_plain_values_there_and_back():
    mask = np.random.default_rng(0).random((13, 21)) > 0.5
    region = Region((Box(0, 0, 0.5, 1), Box(0.25, 0.5, 0.75, 1)), mask)
    again = Region.from_dict(region.to_dict())
    assert again.rectangles == region.rectangles
    assert np.array_equal(again.mask, mask)
    assert Region(region.rectangles).to_dict() == {"rectangles": [[0, 0, 0.5, 1], [0.25, 0.5, 0.75, 1]]}


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "LA", "P"])
def test_masks_are_white_in_every_kind_of_image(mode, tmp_path):
    """What is transparent is outside, as is what is black or dark."""
    expected = np.zeros((8, 8), dtype=bool)
    expected[2:5, 1:7] = True
    image = Image.fromarray(np.where(expected, 255, 0 if mode == "1" else 40).astype(np.uint8)).convert(mode)
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, image.size, "white")
        image.putalpha(Image.fromarray(expected))
    image.save(tmp_path / "mask.png")
    assert np.array_equal(Region.from_dict({"mask": str(tmp_path / "mask.png")}).mask, expected)
