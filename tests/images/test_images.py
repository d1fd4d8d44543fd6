"""Images: manifests of every folder layout, splits, and the decoding of good, odd and broken files."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import struct
import tracemalloc
import zlib
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pyarrow import fs

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.images import BadImage, ImageList, decode_image, list_images, manifest_digest, select_split
from sae_ray.images import manifest as manifest_module
from sae_ray.images.manifest import LABELS_SCHEMA, MANIFEST_SCHEMA, describe_change, labels_digest
from sae_ray.images.part import Preparation, decode_part
from sae_ray.store import tables
from sae_ray.store.files import Folder
from sae_ray.store.tables import spooled
from tests.endless import Endless


def fill(folder: Path, *paths: str) -> Folder:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"")
    return Folder(folder)


def label_names(images: ImageList) -> dict[str, str | None]:
    return dict(zip(images.manifest["image_id"].to_pylist(), images.labels["label_name"].to_pylist(), strict=True))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (23, 17)) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], bands) if bands > 1 else (size[1], size[0])
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return Image.frombytes(mode, size, pixels.tobytes())


# Manifests


def test_a_flat_folder_lists_every_visible_file_that_may_be_an_image(tmp_path):
    folder = fill(tmp_path, "b.png", "B.JPG", "a.jpeg", "é.webp", "notes.txt", "raw", ".hidden.png", ".cache/x.png")
    table, labels, skipped = list_images(folder)
    assert (table.schema, labels.schema) == (MANIFEST_SCHEMA, LABELS_SCHEMA)
    assert table["image_id"].to_pylist() == ["B.JPG", "a.jpeg", "b.png", "raw", "é.webp"]
    assert table["image_index"].to_pylist() == [0, 1, 2, 3, 4]
    assert labels["image_index"] == table["image_index"]
    assert labels["label"].null_count == labels["label_name"].null_count == 5
    assert skipped == {".txt": 1}


names = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0.", exclude_categories=["C"]), min_size=1, max_size=8
)


@settings(max_examples=30, deadline=None)
@given(st.sets(names, min_size=1, max_size=8))
def test_the_order_is_that_of_the_utf8_bytes(tmp_path_factory, stems):
    folder = fill(tmp_path_factory.mktemp("ordered"), *(f"{stem}.png" for stem in stems))
    table = list_images(folder).manifest
    assert [path.encode() for path in table["image_id"].to_pylist()] == sorted(f"{stem}.png".encode() for stem in stems)
    assert table["image_index"].to_pylist() == list(range(len(stems)))


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["n01440764/a.JPEG", "n01443537/b.JPEG"], ["n01440764", "n01443537"]),
        (["train/n01440764/a.JPEG", "train/n01443537/b.JPEG"], ["n01440764", "n01443537"]),
        (
            ["00000_Animalia_Annelida_x/a.jpg", "00001_Animalia_y/b.jpg"],
            ["00000_Animalia_Annelida_x", "00001_Animalia_y"],
        ),
        (["a/abbey/1.jpg", "a/airfield/2.jpg", "b/beach/3.jpg"], ["a/abbey", "a/airfield", "b/beach"]),
        (["cat/1.jpg", "cat/2.jpg"], ["cat", "cat"]),
        (["train/cat/1.jpg"], ["cat"]),
        (["cat/1.jpg", "cat/kittens/2.jpg"], ["cat", "cat/kittens"]),
        (["1.jpg", "cat/2.jpg"], [None, None]),
        (["README.md", "cat/2.jpg", "dog/3.jpg"], ["cat", "dog"]),
        (["raw", "cat/2.jpg", "dog/3.jpg"], ["cat", "dog", None]),
    ],
)
def test_sub_folders_are_classes(tmp_path, paths, expected):
    assert list_images(fill(tmp_path, *paths)).labels["label_name"].to_pylist() == expected


def test_labels_are_dense_over_the_sorted_names(tmp_path):
    folder = fill(tmp_path, "zebra/1.jpg", "ant/2.jpg", "zebra/3.jpg", "bee/4.jpg")
    table = list_images(folder).labels
    assert table["label_name"].to_pylist() == ["ant", "bee", "zebra", "zebra"]
    assert table["label"].to_pylist() == [0, 1, 2, 2]
    assert list_images(folder, "none").labels["label"].null_count == 4


def test_a_csv_file_labels_by_path(tmp_path):
    folder = fill(tmp_path / "images", "x/1.jpg", "2.jpg", "3.jpg", "broken", "notes.txt")
    file = tmp_path / "images" / "labels.csv"
    file.write_text('﻿image_id,source,label\n3.jpg,web,"dog, brown"\n2.jpg,web,\nx/1.jpg,web,cat\nabsent.jpg,web,emu\n')
    found = list_images(folder, str(file))
    table = found.labels
    assert label_names(found) == {"2.jpg": None, "3.jpg": "dog, brown", "broken": None, "x/1.jpg": "cat"}
    assert table["label"].to_pylist() == [None, 1, None, 0]
    assert found.skipped == {".txt": 1}, "the label file itself is in use"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image_id,label\n1.jpg,cat\n", "has no row for the image 2.jpg"),
        ("image_id,label\n1.jpg,cat\n2.jpg\n", "row 3: label is missing"),
        ("image_id,label\n1.jpg,cat\n2.jpg,dog\n1.jpg,cat\n", "row 4: '1.jpg' already has a row"),
        ('image_id,label\n1.jpg,"cat" x\n2.jpg,dog\n', "row 2"),
        ("file,class\n1.jpg,cat\n", "columns file, class; labels must be auto, none"),
        ("", "columns \\(none\\)"),
    ],
)
def test_csv_files_that_do_not_fit_are_refused(tmp_path, text, words):
    folder = fill(tmp_path / "images", "1.jpg", "2.jpg")
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UsageError, match=words) as refusal:
        list_images(folder, str(tmp_path / "labels.csv"))
    assert "labels.csv" in str(refusal.value)


def test_kaggles_solution_file_labels_by_stem(tmp_path):
    folder = fill(tmp_path / "val", *(f"ILSVRC2012_val_0000000{i}.JPEG" for i in (1, 2, 3)))
    (tmp_path / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\n"
        "ILSVRC2012_val_00000003,n02012849 1 2 3 4 n02012849 5 6 7 8 \n"
        "ILSVRC2012_val_00000001,n03126707 1 2 3 4 \n"
        "ILSVRC2012_val_00000002,n02012849 1 2 3 4 \n"
    )
    file = str(tmp_path / "LOC_val_solution.csv")
    assert list_images(folder, file).labels["label_name"].to_pylist() == ["n03126707", "n02012849", "n02012849"]
    (tmp_path / "LOC_synset_mapping.txt").write_text("n02012849 crane\nn03126707 crane\n")
    table = list_images(folder, file).labels
    # The bird and the machine are two classes of one name.
    assert table["label_name"].to_pylist() == ["n03126707 crane", "n02012849 crane", "n02012849 crane"]
    assert table["label"].to_pylist() == [1, 0, 0]


def test_label_files_inside_the_folder_are_not_images(tmp_path):
    folder = fill(tmp_path, "a.jpg", "LOC_synset_mapping.txt")
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\na,n02012849 1 2 3 4\n")
    assert list_images(folder, str(tmp_path / "LOC_val_solution.csv")).manifest["image_id"].to_pylist() == ["a.jpg"]
    assert list_images(folder, "none").manifest["image_id"].to_pylist() == ["a.jpg"]


def test_the_devkits_ground_truth_labels_by_order(tmp_path):
    folder = fill(tmp_path / "val", "c.JPEG", "a.JPEG", "b.JPEG")
    file = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    file.write_text("490\n361\n490\n")
    assert label_names(list_images(folder, str(file))) == {"a.JPEG": "490", "b.JPEG": "361", "c.JPEG": "490"}
    file.write_text("490\n361\n")
    with pytest.raises(UsageError, match="2 rows for 3 images"):
        list_images(folder, str(file))
    file.write_text("490\ncat\n1\n")
    with pytest.raises(UsageError, match="row 2: 'cat' is not a class number"):
        list_images(folder, str(file))


def test_labels_that_cannot_be_read_are_refused(tmp_path):
    folder = fill(tmp_path / "images", "1.jpg")
    (tmp_path / "labels.json").write_text("{}")
    (tmp_path / "labels.csv").write_bytes(b"image_id,label\n1.jpg,\xff\xfe\n")
    for name, words in (("labels.json", "labels must be"), ("labels.csv", "not UTF-8"), ("no.csv", "does not exist")):
        with pytest.raises(UsageError, match=words):
            list_images(folder, str(tmp_path / name))


def test_folders_without_images_are_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for name in ("nowhere", "file"):
        with pytest.raises(UsageError, match=f"no image folder .*{name}; give a folder"):
            list_images(Folder(tmp_path / name))
    fill(tmp_path / "empty", ".hidden.png")
    with pytest.raises(SaeRayError, match="contains no files"):
        list_images(Folder(tmp_path / "empty"))
    (tmp_path / "latin").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "latin") + b"/caf\xe9.png")).write_bytes(b"")
    with pytest.raises(SaeRayError, match=r"not UTF-8.*; rename it"):
        list_images(Folder(tmp_path / "latin"))


def test_links_are_followed(tmp_path):
    fill(tmp_path, "far/cat/1.jpg", "images/dog/2.jpg")
    (tmp_path / "images" / "cat").symlink_to(tmp_path / "far" / "cat")
    assert label_names(list_images(Folder(tmp_path / "images"))) == {"cat/1.jpg": "cat", "dog/2.jpg": "dog"}


def listing(image_ids: list[str]) -> ImageList:
    n = len(image_ids)
    index = pa.array(range(n), pa.int64())
    manifest = [index, pa.array(image_ids, pa.string()), pa.array([9] * n, pa.int64())]
    labels = [index, pa.array([0] * n, pa.int32()), pa.array(image_ids, pa.string())]
    return ImageList(
        spooled(MANIFEST_SCHEMA, [pa.table(manifest, schema=MANIFEST_SCHEMA)]),
        spooled(LABELS_SCHEMA, [pa.table(labels, schema=LABELS_SCHEMA)]),
    )


@given(st.sets(st.text(min_size=1, max_size=10), max_size=30), st.floats(0, 1), st.floats(0, 1), st.data())
def test_the_split_is_disjoint_exhaustive_and_stable(image_ids, fraction, other, data):
    table = listing(sorted(image_ids))
    sides = {part: select_split(table, fraction, part) for part in ("train", "heldout")}
    found = {part: side.manifest["image_id"].to_pylist() for part, side in sides.items()}
    assert sorted(found["train"] + found["heldout"]) == sorted(image_ids)
    for side in sides.values():
        assert (side.manifest.schema, side.labels.schema) == (MANIFEST_SCHEMA, LABELS_SCHEMA)
        assert side.labels["image_index"] == side.manifest["image_index"]
        assert side.labels["label_name"].to_pylist() == side.manifest["image_id"].to_pylist()
        assert side.manifest["image_index"].to_pylist() == list(range(side.manifest.num_rows))
        assert side.manifest["image_id"].to_pylist() == sorted(side.manifest["image_id"].to_pylist())
    fewer = sorted(data.draw(st.sets(st.sampled_from(sorted(image_ids))))) if image_ids else []
    heldout_of_fewer = select_split(listing(fewer), fraction, "heldout").manifest["image_id"].to_pylist()
    assert set(heldout_of_fewer) == set(fewer) & set(found["heldout"])
    if other >= fraction:
        more = select_split(table, other, "heldout").manifest["image_id"].to_pylist()
        assert set(found["heldout"]) <= set(more)


def test_the_split_holds_out_its_fraction():
    table = listing([f"{i:05}.png" for i in range(10_000)])
    # Six standard deviations of a binomial count are 240.
    assert abs(select_split(table, 0.2, "heldout").manifest.num_rows - 2000) < 240
    for fraction, part in ((0, "train"), (1, "heldout")):
        for side, whole in zip(select_split(table, fraction, part)[:2], table[:2], strict=True):
            assert side.read().equals(whole.read())
    for fraction, part, words in ((1.5, "train", "heldout_fraction is 1.5"), (0.5, "test", "part is 'test'")):
        with pytest.raises(UsageError, match=words):
            select_split(table, fraction, part)


def test_images_and_labels_have_digests_of_their_own(tmp_path):
    first = list_images(fill(tmp_path / "a", "x/1.jpg", "y/2.jpg"))
    again = list_images(fill(tmp_path / "b", "x/1.jpg", "y/2.jpg"))
    unlabelled = list_images(Folder(tmp_path / "a"), "none")
    other = list_images(fill(tmp_path / "c", "x/1.jpg", "z/2.jpg"))
    digests = [(manifest_digest(one.manifest), labels_digest(one.labels)) for one in (first, again, unlabelled, other)]
    assert digests[0] == digests[1]
    assert digests[0][0] == digests[2][0] != digests[3][0]
    assert len({labels for _, labels in digests}) == 3
    assert {len(digest) for pair in digests for digest in pair} == {64}
    assert manifest_digest(spooled(MANIFEST_SCHEMA, [first.manifest.slice(0, 1)])) != digests[0][0]


@given(st.lists(st.tuples(st.text(max_size=5), st.integers(0, 9), st.none() | st.text(max_size=3)), max_size=25))
def test_digests_are_those_of_the_columns_as_json(rows):
    """They name steps, so they must never change."""
    image_ids, sizes, names = ([row[column] for row in rows] for column in range(3))
    index, codes = range(len(rows)), [None if name is None else len(name) for name in names]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "GROUP_ROWS", 7)
        manifest = spooled(MANIFEST_SCHEMA, [pa.table([index, image_ids, sizes], schema=MANIFEST_SCHEMA)])
        labels = spooled(LABELS_SCHEMA, [pa.table([index, codes, names], schema=LABELS_SCHEMA)])
    assert manifest_digest(manifest) == sha256(json.dumps([image_ids, sizes]).encode()).hexdigest()
    assert labels_digest(labels) == sha256(json.dumps([codes, names]).encode()).hexdigest()


def peak_of_a_survey(n_folders: int) -> int:
    """Bytes of Python and of Arrow that listing, splitting and naming a folder take at most in this process."""
    for module in (manifest_module, tables):
        module.GROUP_ROWS = 1000
    folder = Folder("/images")
    folder.filesystem, folder.is_local = fs.PyFileSystem(Endless("/images", n_folders, 500)), False
    tracemalloc.start()
    whole = list_images(folder)
    sides = [select_split(whole, 0.1, "train"), select_split(whole, 0.1, "heldout")]
    digests = [(manifest_digest(side.manifest), labels_digest(side.labels)) for side in sides]
    peak = tracemalloc.get_traced_memory()[1] + pa.default_memory_pool().max_memory()
    assert digests[0] != digests[1]
    assert sum(side.manifest.num_rows for side in sides) == 500 * n_folders
    assert set(sides[1].labels["label_name"].to_pylist()) == {f"n{number:08}" for number in range(n_folders)}
    return peak


def test_the_memory_of_a_survey_does_not_grow_with_the_images():
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        few, many = fresh.map(peak_of_a_survey, (10, 50))
    assert many - few < 20 * 20_000, "names alone would take five times as much"


def test_a_changed_folder_is_described(tmp_path):
    before = list_images(fill(tmp_path, "a.jpg", "b.jpg", "c.jpg")).manifest
    assert describe_change(before.groups(), before.groups()) == ""
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "b.jpg").write_bytes(b"another picture")
    after = list_images(fill(tmp_path, "d.jpg", "e.jpg")).manifest
    assert describe_change(before.groups(), after.groups()) == "2 added, 1 removed, 1 changed"


# Decoding


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_files_come_back_exactly(kind, options):
    image = noise()
    decoded = decode_image(encoded(image, kind, **options))
    assert (decoded.mode, decoded.size) == ("RGB", image.size)
    assert decoded.tobytes() == image.tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_each_mode_of_png_becomes_rgb_as_clip_converts_it(mode):
    image = noise("RGB").convert(mode) if mode in ("1", "P") else noise(mode)
    decoded = decode_image(encoded(image))
    assert decoded.mode == "RGB"
    assert decoded.tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_each_mode_of_jpeg_becomes_rgb(mode, progressive):
    data = encoded(noise(mode), "JPEG", progressive=progressive)
    assert decode_image(data).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_palettes_with_transparency_keep_their_colours(transparency):
    image = noise("RGB").quantize(256)
    assert decode_image(encoded(image, transparency=transparency)).tobytes() == image.convert("RGB").tobytes()


def test_sixteen_bit_gray_is_scaled_not_clipped():
    wide = np.array([[0, 257, 32_896, 65_535]], np.uint16)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(wide))))
    assert decoded[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    decoded = decode_image(data)
    assert decoded.size == ((17, 23) if orientation >= 5 else (23, 17))
    assert decoded.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("at_least", "size"), [(9, (16, 20)), (8, (8, 10)), (33, (64, 80)), (64, (64, 80)), (99, (64, 80))]
)
def test_a_jpeg_may_come_reduced(at_least, size):
    ramp = np.add.outer(np.arange(80), np.arange(64)).astype(np.uint8)  # smooth, so that reduction loses little
    image = Image.fromarray(ramp).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(image, "JPEG", exif=exif, quality=95)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    reduced = decode_image(data, at_least=at_least)
    assert reduced.size == size[::-1]
    expected = upright.resize(reduced.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(reduced, float) - np.asarray(expected, float)).max() <= 4
    for kind in ("PNG", "WEBP"):
        assert decode_image(encoded(image, kind), at_least=at_least).size == image.size


def test_broken_metadata_does_not_spoil_the_picture():
    data = encoded(noise(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode_image(data).size == (23, 17)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(data).getpixel((0, 0)) == (255, 0, 0)


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def png_bomb(width: int, height: int) -> bytes:
    data = zlib.compress(b"\0" * 1000)
    chunk = b"IDAT" + data
    return png_header(width, height) + struct.pack(">I", len(data)) + chunk + struct.pack(">I", zlib.crc32(chunk))


def jpeg_bomb(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_bomb() -> bytes:
    data = bytearray(encoded(noise("RGBA"), "WEBP", exif=b"Exif\0\0"))
    assert data[12:16] == b"VP8X"
    data[24:30] = b"\xfe\x3f\0" * 2
    return bytes(data)


def reason(data: bytes) -> str:
    with pytest.raises(BadImage) as refusal:
        decode_image(data)
    return refusal.value.reason


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "zero bytes"),
        (b"hello, \xff world", "not an image"),
        (png_bomb(50_000, 50_000), "pixel bomb: 50000x50000"),
        (png_bomb(13_378, 13_378), "pixel bomb: 13378x13378"),
        (jpeg_bomb(60_000, 60_000), "pixel bomb: 60000x60000"),
        (encoded(Image.new("RGB", (2010, 10))), "aspect ratio: 2010x10"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_an_image_is_refused_with_its_reason(data, expected):
    assert reason(data) == expected


def test_a_webp_bomb_is_refused():
    assert reason(webp_bomb()).startswith("pixel bomb")


def test_large_but_allowed_images_do_not_warn(recwarn):
    assert decode_image(encoded(Image.new("L", (10_000, 9_000)))).size == (10_000, 9_000)
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.5, 0.9])
def test_truncated_files_are_refused(kind, kept):
    data = encoded(noise(size=(120, 90)), kind)
    assert reason(data[: max(int(kept * len(data)), 20)]) == "truncated"


def outcome(data: bytes) -> str:
    try:
        return decode_image(data).mode
    except BadImage as refusal:
        return refusal.reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_decode_or_are_refused(kind, data):
    """Whatever bytes are flipped, nothing but BadImage comes out."""
    good = bytearray(encoded(noise(), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    assert 0 < len(outcome(bytes(good))) < 120


def test_the_digest_sees_another_file_under_the_same_name(tmp_path):
    folder = fill(tmp_path, "cat/1.jpg")
    before = manifest_digest(list_images(folder).manifest)
    (tmp_path / "cat" / "1.jpg").write_bytes(b"another picture, another size")
    assert manifest_digest(list_images(folder).manifest) != before


class Failing(Folder):
    """The first `failures` reads of a file fail."""

    def __init__(self, uri: Path, failures: int, error: OSError):
        super().__init__(uri)
        self.failures, self.error = failures, error

    def read_bytes(self, name: str) -> bytes:
        self.failures -= 1
        if self.failures >= 0:
            raise self.error
        return super().read_bytes(name)


class Deadly:
    """Prepares an image, but is killed by one of three pixels."""

    def __call__(self, image: Image.Image) -> np.ndarray:
        if image.width == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.asarray(image.resize((4, 4))).transpose(2, 0, 1)


def test_an_image_that_kills_its_decoder_is_rejected_where_it_is_decoded_apart(tmp_path):
    names = [f"{number}.png" for number in range(6)]
    for number, name in enumerate(names):
        Image.new("RGB", (3 if number in (1, 5) else 4, 1), (number, 0, 0)).save(tmp_path / name)
    (tmp_path / "2.png").write_bytes(b"")
    decoded = decode_part(Folder(tmp_path), names, [Preparation(Deadly())], apart=True)
    killed = "ends the process that decodes it"
    assert decoded.rejects == [("1.png", killed), ("2.png", "zero bytes"), ("5.png", killed)]
    assert decoded.accepted.tolist() == [0, 3, 4]
    assert decoded.pixels[0][:, 0, 0, 0].tolist() == [0, 3, 4]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EIO, "of a disk"), "could not be read: Input/output error"),
        (OSError("AWS Error SLOW_DOWN, request 4711"), "could not be read: the store did not deliver it"),
    ],
)
def test_a_read_that_fails_for_a_moment_is_tried_again(tmp_path, monkeypatch, error, reason):
    monkeypatch.setattr("sae_ray.images.part.RETRY_SECONDS", (0.0, 0.0))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    preparation = Preparation(lambda image: np.asarray(image).transpose(2, 0, 1))
    for failures, rejects in ((0, []), (2, []), (3, [("a.png", reason)])):
        decoded = decode_part(Failing(tmp_path, failures, error), ["a.png"], [preparation])
        assert decoded.rejects == rejects
        assert len(decoded.accepted) == len(decoded.pixels[0]) == 1 - len(rejects)


def test_images_are_not_rejected_because_their_store_is_away(tmp_path, monkeypatch):
    class Away(Failing):
        def exists(self, name: str = "") -> bool:
            raise self.error

    monkeypatch.setattr("sae_ray.images.part.RETRY_SECONDS", (0.0, 0.0))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    preparation = Preparation(lambda image: np.asarray(image).transpose(2, 0, 1))
    refused = OSError("AWS Error NETWORK_CONNECTION: could not connect")
    assert decode_part(Away(tmp_path, 1, refused), ["a.png"], [preparation]).rejects == []
    with pytest.raises(OSError, match="could not connect"):
        decode_part(Away(tmp_path, 2, refused), ["a.png"], [preparation])
