"""Other people's folders: what is listed, skipped and refused. docs/inputs.md says the same."""

from __future__ import annotations

import io
import os
import re
import socket
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.images import BadImage, ImageList, decode_image, imposters, list_images
from sae_ray.images.manifest import labels_digest, manifest_digest
from sae_ray.images.part import Preparation, decode_part
from sae_ray.images.skipping import is_skipped_folder, skipped_as, skipped_line
from sae_ray.images.wordnet import imagenet_words
from sae_ray.store.files import Folder
from sae_ray.store.walking import Found, walk

DOCS = (Path(__file__).parents[2] / "docs" / "inputs.md").read_text(encoding="utf-8")
SECTION = DOCS.partition("## Folders and names")[2].partition("\n## ")[0]
NFC, NFD = (unicodedata.normalize(form, "café.jpg") for form in ("NFC", "NFD"))


def fill(folder: Path, *paths: str) -> Folder:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"")
    return Folder(folder)


def ids(images: ImageList) -> list[str]:
    return images.manifest["image_id"].to_pylist()


def names(images: ImageList) -> dict[str, str | None]:
    return dict(zip(ids(images), images.labels["label_name"].to_pylist(), strict=True))


def documented() -> list[tuple[str, str]]:
    """Path and fate, from the first table of the page."""
    table = SECTION.partition("| what becomes of it |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`.*`) \| (.*) \|$", table, re.MULTILINE)
    return [(path, fate) for paths, fate in rows for path in re.findall("`(.*?)`", paths)]


# By name


@pytest.mark.parametrize(("path", "fate"), documented())
def test_the_page_says_what_becomes_of_a_name(tmp_path, path, fate):
    found = list_images(fill(tmp_path, "cat/1.png", "dog/2.png", path))
    rest = set(ids(found)) - {"cat/1.png", "dog/2.png"}
    if fate.startswith(("an image", "tried")):
        assert (rest, found.skipped) == ({path}, {})
        return
    assert not rest
    assert names(found) == {"cat/1.png": "cat", "dog/2.png": "dog"}
    if fate.startswith("hidden"):
        assert found.skipped == {}
    else:
        [(kind, count)] = found.skipped.items()
        assert count == 1
        assert kind.lower() in path.lower()
        assert kind.endswith("/") == fate.startswith("the folder")


def test_no_name_of_a_picture_is_skipped():
    Image.init()
    skipped = {suffix for suffix in Image.registered_extensions() if skipped_as(Found(f"a{suffix}", "file"))}
    assert skipped == {".h5", ".mpeg", ".mpg", ".pdf"}, "Pillow only recognises these, or writes them"


def test_every_row_of_the_page_is_read():
    assert len({fate for _, fate in documented()}) == 8


def test_what_is_skipped_changes_no_digest(tmp_path):
    images = ("cat/1.png", "dog/2.png")
    tidy, untidy = (
        list_images(fill(tmp_path / "a", *images)),
        list_images(
            fill(
                tmp_path / "b",
                *images,
                "README.md",
                "cat/1.xml",
                "cat/Thumbs.db",
                "cat/@eaDir/1.png/x.jpg",
                "notes/a.txt",
            )
        ),
    )
    assert untidy.skipped == {".md": 1, ".xml": 1, ".db": 1, "@eaDir/": 1, ".txt": 1}
    assert manifest_digest(tidy.manifest) == manifest_digest(untidy.manifest)
    assert labels_digest(tidy.labels) == labels_digest(untidy.labels)


def test_a_folder_of_nothing_but_skipped_files_says_what_it_holds(tmp_path):
    with pytest.raises(
        SaeRayError, match=r"contains no images, only what is skipped for its name \(2 × .txt, 1 × .csv"
    ):
        list_images(fill(tmp_path, "a.txt", "b.txt", "c.csv"))


def test_the_line_tells_of_the_most_frequent_kinds():
    skipped = {f".{letter}": place for place, letter in enumerate("abcdefghij", start=1)}
    assert skipped_line(skipped) == "10 × .j, 9 × .i, 8 × .h, 7 × .g, 6 × .f, 5 × .e, 4 × .d, 3 × .c and 2 other kinds"


# Links and special files


def above(folder: Path) -> None:
    (folder / "up").symlink_to(folder)


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "b.png")


def closed_file(folder: Path) -> None:
    (folder / "b.png").touch(0)


def closed_folder(folder: Path) -> None:
    (folder / "b").mkdir(0)


def not_utf8(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).touch()


def link(*targets: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder.parent / "far").mkdir()
        (folder.parent / "far" / "1.png").write_bytes((folder / "a.png").read_bytes())
        for name, target in zip("bc", targets, strict=False):
            (folder / name).symlink_to(target)

    return make


LOCAL = [
    ("a link to a file", "the file", link("a.png"), "['a.png', 'b'] {}"),
    (
        "a link to a folder",
        "its images, unless the folder is listed already: a real folder is listed once, where it really is if that is "
        "below the image folder. The link is skipped",
        link("../far", "../far"),
        "['a.png', 'b/1.png'] {'link to a folder above it or listed already': 1}",
    ),
    (
        "a link to a folder above itself",
        "skipped",
        above,
        "['a.png'] {'link to a folder above it or listed already': 1}",
    ),
    ("a link to nothing or to itself", "a reject: `a link to nothing`", link("gone", "c"), "['a.png', 'b', 'c'] {}"),
    ("a pipe, a socket, a device", "skipped", pipe, "['a.png'] {'special file': 1}"),
    ("a file without read permission", "a reject: `no permission to read it`", closed_file, "['a.png', 'b.png'] {}"),
    ("a folder without read permission", "refused, with its path", closed_folder, "images/b cannot be read: no perm"),
    ("an image whose name is not UTF-8", "refused, with its name", not_utf8, r"not UTF-8: b'caf\xe9.png'; rename it"),
]
"""What is in a local folder beside `a.png`, as the page says it; what becomes of it; how to make it; what is found."""


@pytest.mark.parametrize(("given", "fate", "make", "found"), LOCAL, ids=[one[0] for one in LOCAL])
def test_the_page_says_what_becomes_of_links_and_closed_files(given, fate, make, found):
    with tempfile.TemporaryDirectory() as scratch:  # pytest's own folders are closed to others
        Path(scratch).chmod(0o755)
        folder = Path(scratch, "images")
        folder.mkdir()
        Image.new("RGB", (4, 4)).save(folder / "a.png")
        make(folder)
        said = subprocess.run(
            [sys.executable, "-c", LISTED, str(folder)], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    assert found in said[0]
    rejected = re.fullmatch("a reject: `(.*)`", fate)
    assert set(said[1:]) == ({rejected[1]} if rejected else set())


LISTED = """
import os, sys
import numpy as np
from sae_ray.errors import SaeRayError
from sae_ray.images import decode_image, list_images, part
from sae_ray.store.files import Folder

decode_image(open(sys.argv[1] + "/a.png", "rb").read())  # loads what another user may not read
if os.geteuid() == 0:
    os.setuid(65534)  # root may read everything
folder = Folder(sys.argv[1])
try:
    images = list_images(folder)
except SaeRayError as error:
    print(error)
else:
    ids = images.manifest["image_id"].to_pylist()
    print(ids, dict(images.skipped))
    keep = part.Preparation(lambda image: np.asarray(image).transpose(2, 0, 1))
    for _, reason in part.decode_part(folder, ids, [keep]).rejects:
        print(reason)
"""


def test_the_page_shows_these_links_and_closed_files():
    table = SECTION.partition("| in a local folder | what becomes of it |\n|---|---|\n")[2].partition("\n\n")[0]
    assert table.splitlines() == [f"| {given} | {fate} |" for given, fate, *_ in LOCAL]


def test_a_link_above_itself_ends(tmp_path):
    fill(tmp_path / "images", "cat/1.jpg", "dog/2.jpg")
    (tmp_path / "secret.jpg").touch()
    (tmp_path / "images" / "cat" / "up").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "dog" / "self").symlink_to(".")
    (tmp_path / "images" / "out").symlink_to("..")
    found = list_images(Folder(tmp_path / "images"))
    assert ids(found) == ["cat/1.jpg", "dog/2.jpg"]
    assert found.skipped == {"link to a folder above it or listed already": 3}


def test_a_folder_is_listed_once_and_where_it_really_is(tmp_path):
    fill(tmp_path / "images", "cat/1.jpg", "dog/2.jpg", ".store/emu/3.jpg")
    for link, target in (("alias", "cat"), ("zebra", "cat"), ("emu", ".store/emu"), ("emu2", ".store/emu")):
        (tmp_path / "images" / link).symlink_to(tmp_path / "images" / target)
    found = list_images(Folder(tmp_path / "images"))
    assert ids(found) == ["cat/1.jpg", "dog/2.jpg", "emu/3.jpg"], "a hidden folder is listed through its first link"
    assert found.skipped == {"link to a folder above it or listed already": 3}


@pytest.mark.parametrize(("first", "second"), [("far", "far/cat"), ("far/cat", "far")])
def test_folders_outside_are_listed_once_however_links_overlap(tmp_path, first, second):
    fill(tmp_path / "far", "1.jpg", "cat/2.jpg", "cat/kitten/3.jpg")
    (tmp_path / "far" / "cat" / "back").symlink_to(tmp_path / "images")
    images = tmp_path / "images"
    images.mkdir()
    (images / "a").symlink_to(tmp_path / first)
    (images / "b").symlink_to(tmp_path / second)
    assert sorted(path.rpartition("/")[2] for path in ids(list_images(Folder(images)))) == ["1.jpg", "2.jpg", "3.jpg"]


def test_links_that_lead_to_each_other_end(tmp_path):
    fill(tmp_path, "one/1.jpg", "two/2.jpg", "images/0.jpg")
    (tmp_path / "one" / "on").symlink_to(tmp_path / "two")
    (tmp_path / "two" / "on").symlink_to(tmp_path / "one")
    (tmp_path / "images" / "in").symlink_to(tmp_path / "one")
    assert ids(list_images(Folder(tmp_path / "images"))) == ["0.jpg", "in/1.jpg", "in/on/2.jpg"]


def test_the_image_folder_may_be_a_link_and_hidden(tmp_path):
    fill(tmp_path / ".cache" / "images", "cat/1.jpg")
    (tmp_path / ".cache" / "images" / "also").symlink_to("cat")
    (tmp_path / "images").symlink_to(tmp_path / ".cache" / "images")
    for folder in (tmp_path / "images", tmp_path / ".cache" / "images"):
        assert ids(list_images(Folder(folder))) == ["cat/1.jpg"]


PLACES = ["images", "images/a", "images/a/b", "images/.h", "images/.h/c", "images/@eaDir", "far", "far/d", "far/d/e"]


@given(st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from([".", *PLACES])), max_size=8))
def test_whatever_the_links_each_real_folder_is_listed_at_most_once(tmp_path_factory, links):
    top = tmp_path_factory.mktemp("linked")
    fill(top, *(f"{place}/{number}.jpg" for number, place in enumerate(PLACES)))
    for number, (place, target) in enumerate(links):
        (top / place / f"link{number}").symlink_to(top / target)
    found = [one.path for one in walk(Folder(top / "images"), is_skipped_folder) if one.kind == "file"]
    assert found == sorted(found)
    real = [os.path.realpath(top / "images" / path) for path in found]
    assert len(real) == len(set(real))
    assert {"0.jpg", "a/1.jpg", "a/b/2.jpg"} <= set(found), "what is below the folder is listed where it is"
    if any(target == "far" for place, target in links if place in PLACES[:3]):
        assert {str(top / f"{PLACES[number]}/{number}.jpg") for number in (6, 7, 8)} <= set(real)


def test_links_to_nothing_are_rejects(tmp_path, monkeypatch):
    monkeypatch.setattr("sae_ray.images.part.RETRY_SECONDS", ())
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "c.png").symlink_to("c.png")
    (tmp_path / "d.png").symlink_to(tmp_path / "a.png" / "x")
    (tmp_path / "e.png").symlink_to("a.png")
    (tmp_path / "readme.txt").symlink_to(tmp_path / "gone.txt")
    found = list_images(Folder(tmp_path))
    size = (tmp_path / "a.png").stat().st_size
    assert found.manifest["n_bytes"].to_pylist() == [size, 0, 0, 0, size]
    assert found.skipped == {".txt": 1}
    preparation = Preparation(lambda image: np.asarray(image).transpose(2, 0, 1))
    decoded = decode_part(Folder(tmp_path), ids(found), [preparation])
    assert decoded.rejects == [(f"{name}.png", "a link to nothing") for name in "bcd"]
    assert decoded.accepted.tolist() == [0, 4]


def test_what_is_neither_file_nor_folder_is_skipped(tmp_path):
    folder = fill(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.jpg"))
        (tmp_path / "device.jpg").symlink_to("/dev/null")
        found = list_images(folder)
    assert ids(found) == ["a.jpg"]
    assert found.skipped == {"special file": 3}


LOCKED = """
import os, sys
from pathlib import Path
from sae_ray.study.config import ImageSet
from sae_ray.study.survey import list_set
if os.geteuid() == 0:
    os.setuid(65534)  # root may read everything
from sae_ray.errors import SaeRayError
try:
    print(list_set("images.train", ImageSet(sys.argv[1])).manifest["image_id"].to_pylist())
except SaeRayError as error:
    print(error.exit_code, error)
"""


def test_a_folder_that_cannot_be_read_is_one_clear_message():
    with tempfile.TemporaryDirectory() as scratch:  # pytest's own folders are closed to others
        Path(scratch).chmod(0o755)
        fill(Path(scratch), "images/n01440764/1.jpg", "images/lost+found/2.jpg", "images/words.txt")
        (Path(scratch) / "images" / "lost+found").chmod(0)

        def said() -> str:
            command = [sys.executable, "-c", LOCKED, f"{scratch}/images"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

        def closed(name: str) -> str:
            place = Path(scratch, name)
            mode = place.stat().st_mode
            place.chmod(0)
            try:
                return said()
            finally:
                place.chmod(mode)

        try:
            assert said() == "['n01440764/1.jpg']", "what is skipped need not be readable"
            images, none = f"{scratch}/images", "no permission"
            assert closed("images/n01440764") == (
                f"1 images.train: the folder {images}/n01440764 cannot be read: {none}; make it readable, or move it "
                f"out of {images}"
            )
            assert closed("images/words.txt") == (
                f"1 images.train: {images}/words.txt, which names classes, cannot be read: {none}; make it readable"
            )
            assert closed("images") == f"1 images.train: the folder {images} cannot be read: {none}; make it readable"
            assert closed("") == (
                f"1 images.train: the image folder {images} cannot be reached: {none} for a folder above it"
            )
        finally:
            (Path(scratch) / "images" / "lost+found").chmod(0o755)


def test_a_local_walk_finds_what_a_store_lists(tmp_path):
    folder = fill(tmp_path, "b/c/1.jpg", "b.jpg", "b/c.jpg", "b-/2.jpg", "é/3.jpg", "A/x.txt", ".x/4.jpg", "b/.y.jpg")
    elsewhere = Folder(tmp_path)
    elsewhere.is_local = False
    local, stored = list(walk(folder)), list(walk(elsewhere))
    assert local == stored
    assert [one.path for one in local] == ["A/x.txt", "b-/2.jpg", "b.jpg", "b/c.jpg", "b/c/1.jpg", "é/3.jpg"]


# Label files


@pytest.mark.parametrize(
    "text",
    [
        f"image_id,label\n{NFD},drink\ncat/1.jpg,cat\n",
        f"image_id,label\n./{NFC},drink\n.//cat/./1.jpg,cat\n",
        f"image_id,label\n{NFC},drink\ncat\\1.jpg,cat\n",
        f"image_id,label\n/{NFC},drink\n cat/1.jpg ,cat\n",
        f"image_id,label\nimages/{NFC},drink\nimages/cat/1.jpg,cat\n",
        "image_id,label\nHERE/images/café.jpg,drink\nHERE/images/cat/1.jpg,cat\n",
        "image_id,label\nfile://HERE/images/caf%C3%A9.jpg,drink\nfile:HERE/images/cat/1.jpg,cat\n",
        "image_id;label;\ncafé.jpg;drink;\n;;\ncat/1.jpg;cat;\n;;\n ; ;\n",
        f"image_id;label\n{NFC};drink\ncat/1.jpg;cat\n",
        f"image_id\tlabel\n{NFC}\tdrink\ncat/1.jpg\tcat\n",
        f"label|image_id\ndrink|{NFC}\ncat|cat/1.jpg\n",
        f"sep=;\r\nimage_id;label\r\n{NFC};drink\r\ncat/1.jpg;cat\r\n",
        f"image_id, label\n{NFC}, drink\ncat/1.jpg, cat\n",
        f"image_id,label\r{NFC},drink\rcat/1.jpg,cat\r",
        f"image_id;comment;label\n{NFC};a, b, c, d;drink\ncat/1.jpg;e;cat\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("named", [NFC, NFD])
def test_rows_meet_images_however_they_are_spelled(tmp_path, text, encoding, named):
    folder = fill(tmp_path / "images", named, "cat/1.jpg")
    (tmp_path / "labels.csv").write_bytes(text.replace("HERE", str(tmp_path)).encode(encoding))
    assert names(list_images(folder, str(tmp_path / "labels.csv"))) == {named: "drink", "cat/1.jpg": "cat"}


def test_kaggles_stems_meet_however_they_are_spelled(tmp_path):
    folder = fill(tmp_path / "val", NFD)
    (tmp_path / "LOC_val_solution.csv").write_text(f"ImageId;PredictionString\n{NFC[:-4]};n02012849 1 2 3 4\n")
    assert names(list_images(folder, str(tmp_path / "LOC_val_solution.csv"))) == {NFD: "n02012849"}


def test_the_very_same_name_goes_first(tmp_path):
    folder = fill(tmp_path / "images", NFC, NFD)
    (tmp_path / "labels.csv").write_text(f"image_id,label\n{NFC},composed\n{NFD},decomposed\n")
    assert names(list_images(folder, str(tmp_path / "labels.csv"))) == {NFC: "composed", NFD: "decomposed"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["./1.jpg,cat", "1.jpg,dog", "2.jpg,dog"], "the rows './1.jpg' and '1.jpg' name the same image; keep one"),
        (["1.jpg,cat"], r"labels.csv has no row for the image 2.jpg \(its first row is '1.jpg'\); add the row '2.jpg'"),
        (["а.jpg,cat"], "names none of the 2 images in .*images: it has no row for the image 1.jpg"),
        (
            ["train/1.jpg,cat", "train/2.jpg,cat"],
            "the row 'train/1.jpg' is nearest; rows are paths below the image folder",
        ),
        (["1,cat", "2,cat"], "the row '1' is nearest; rows are paths below the image folder, with suffixes"),
        (
            ["1.JPG,cat", "2.JPG,cat"],
            "'1.JPG' differs from it only in U\\+004A U\\+0050 U\\+0047, where the image's name has U\\+006A",
        ),
        (["1\u200b.jpg,cat", "2.jpg,cat"], "differs from it only in U\\+200B, where the image's name has nothing"),
        (["１.jpg,cat", "2.jpg,cat"], "differs from it only in U\\+FF11, where the image's name has U\\+0031"),
        ([], r"\(it has no rows\)"),
    ],
)
def test_an_error_says_why_rows_and_images_do_not_meet(tmp_path, rows, words):
    folder = fill(tmp_path / "images", "1.jpg", "2.jpg")
    (tmp_path / "labels.csv").write_text("\n".join(["image_id,label", *rows, ""]), encoding="utf-8")
    with pytest.raises(UsageError, match=words):
        list_images(folder, str(tmp_path / "labels.csv"))


def test_letters_of_another_alphabet_are_told_by_their_code_points(tmp_path):
    folder = fill(tmp_path / "images", "cat.jpg")
    (tmp_path / "labels.csv").write_text("image_id,label\nc\u0430t.jpg,cat\n", encoding="utf-8")
    with pytest.raises(
        UsageError, match=r"'cаt.jpg' differs from it only in U\+0430, where the image's name has U\+0061"
    ):
        list_images(folder, str(tmp_path / "labels.csv"))


# WordNet


@pytest.mark.parametrize("name", ["LOC_synset_mapping.txt", "words.txt", "synset_words.txt"])
@pytest.mark.parametrize("place", ["", "images", "images/train", "images/train/val"])
def test_words_beside_class_folders_name_them(tmp_path, name, place):
    fill(
        tmp_path,
        "images/train/n01440764/1.JPEG",
        "images/train/n01443537/images/2.JPEG",
        "images/train/n09999999/3.JPEG",
    )
    separator = "\t" if name == "words.txt" else " "
    (tmp_path / place).mkdir(exist_ok=True)
    lines = (f"n01440764{separator}tench, Tinca tinca", f"n01443537{separator}goldfish", f"n00000001{separator}entity")
    (tmp_path / place / name).write_text("\n".join(lines) + "\n")
    found = list(names(list_images(Folder(tmp_path / "images"))).values())
    if place == "images/train/val":
        assert found == ["n01440764", "n01443537/images", "n09999999"], "that is no place beside them"
    else:
        assert found == ["n01440764 tench, Tinca tinca", "n01443537 goldfish/images", "n09999999"]


def test_other_class_folders_have_no_words(tmp_path):
    fill(tmp_path, "images/cat/1.jpg", "images/n1/2.jpg")
    (tmp_path / "images" / "words.txt").write_text("cat dog\nn1 one\n")
    (tmp_path / "words.txt").mkdir()
    assert list(names(list_images(Folder(tmp_path / "images"))).values()) == ["cat", "n1"]


def test_imagenets_own_table_is_read_without_loading_timm():
    assert len(imagenet_words()) > 21_000
    assert imagenet_words()["n01440764"] == "tench, Tinca tinca"
    program = (
        "import sys; from sae_ray.concepts.naming import class_names; assert class_names(['n01440764']); "
        "assert not {'timm', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# What is saved as an image


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.jpg", b"x")
    return stream.getvalue()


def tarred() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    return stream.getvalue()


def array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return stream.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
DENIED = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'
)


IMPOSTERS: list[tuple[bytes, str | None]] = [
    (b"\0" * 5000, "zeros only"),
    (LFS, "a git-lfs pointer (run `git lfs pull`)"),
    (b"/annex/objects/SHA256E-s3--abc.jpg\n", "a git-annex pointer (run `git annex get`)"),
    (b"../.git/annex/objects/Xq/7j/SHA256E-s3--abc.jpg", "a git-annex pointer (run `git annex get`)"),
    (b"<html><body>404</body></html>", "an HTML page"),
    (b"\n\n<!DOCTYPE html>\n<!-- x --><html lang=en>" + b"x" * 9000, "an HTML page"),
    (b'\xef\xbb\xbf<?xml version="1.0"?><!DOCTYPE html PUBLIC "-//W3C"><html>', "an HTML page"),
    (b"<HEAD><TITLE>Forbidden</TITLE></HEAD>", "an HTML page"),
    ("<html>gone</html>".encode("utf-16"), "an HTML page"),
    ("<!DOCTYPE html><title>エラー</title>".encode("shift_jis"), "an HTML page"),
    ("<html><title>Zurück</title>".encode("cp1252"), "an HTML page"),
    (b"<br />\n<b>Fatal error</b>: Uncaught Error", "an HTML page"),
    (b"<pre>Cannot GET /a.jpg</pre>", "an HTML page"),
    (b"<a href='/login'>Found</a>.", "an HTML page"),
    (DENIED, "an object store's error: AccessDenied"),
    (DENIED.replace(b"<Error>", b"<Error xmlns='x'>"), "an object store's error: AccessDenied"),
    (b"<ErrorResponse xmlns='x'>" + DENIED[39:] + b"</ErrorResponse>", "an object store's error: AccessDenied"),
    (DENIED.replace(b"AccessDenied", b"BlobNotFound"), "an object store's error: BlobNotFound"),
    (b'{"message": "Not found"}', "a JSON document"),
    (b'[{"image_id": 1}]', "a JSON document"),
    (b"[null, 1]", "a JSON document"),
    (b"null\n", "a JSON document"),
    ('{"message": "zurück"}'.encode("latin-1"), "a JSON document"),
    (b"<annotation><folder>x</folder></annotation>", "an XML document"),
    (b'<?xml version="1.0"?><!-- made by x --><svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
    (b"data:image/png;base64,iVBORw0KGgo=", "a data URL"),
    (b"/9j/4AAQSkZJRgABAQAAAQABAAD", "base64"),
    (b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ", "base64"),
    (b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n\xff\xd8\xff", "a server's answer with its header"),
    (b"hello, world", "text"),
    ("ä".encode() * 4096, "text"),
    (b"x" + "ä".encode() * 4096, "text"),
    (b"%PDF-1.7\n", "a PDF"),
    (zipped(), "a ZIP archive"),
    (tarred(), "a tar archive"),
    (b"\x1f\x8b\x08\0", "a gzip file"),
    (b"\0\0\0\x20ftypisom\0\0\2\0", "a video"),
    (b"\0\0\0\x18ftyp3gp4", "a video"),
    (b"\0\0\0\x08wide\0\0\0\0mdat", "a video"),
    (b"\0\0\x10\0moov\0\0\0\x6cmvhd", "a video"),
    (b"FLV\1\5\0\0\0\x09", "a video"),
    (b"\0\x05\x16\x07\0\2\0\0", "what macOS keeps beside a file"),
    (b"FORM\0\0\0\x10AIFFCOMM", "sound"),
    (b"RIFF\x10\0\0\0AVI LIST", "a video"),
    (b"RIFF\x10\0\0\0WAVEfmt ", "sound"),
    (array(), "a NumPy array"),
    (b"SQLite format 3\0", "a database"),
    (b"\x7fELF\2\1\1" + bytes(50), "a program"),
    (bytes.fromhex("d0cf11e0a1b11ae1") + bytes(600), "an old Office document"),
    (bytes.fromhex("4c0000000114020000000000c000000000000046"), "a shortcut of Windows"),
    (b"hello, \xff\xfe world", None),
    (b"<\0h\0t\0m\0l\0>\0", None),
    (b"\x01\x02\x03", None),
    (np.random.default_rng(0).bytes(9000), None),
]


@pytest.mark.parametrize(("data", "kind"), IMPOSTERS)
def test_what_is_saved_as_an_image_is_named_as_what_it_is(data, kind):
    with pytest.raises(BadImage) as refusal:
        decode_image(data)
    assert refusal.value.reason == ("not an image" if kind is None else f"not an image: {kind}")
    assert len(refusal.value.reason) < 80
    if kind:
        assert kind.replace("BlobNotFound", "AccessDenied") in SECTION


def test_every_reason_of_the_page_is_given():
    table = SECTION.partition("| content | reason |")[2].partition("\n\n")[0]
    shown = {reason.strip("` ") for reason in re.findall(r"\| (`.*?`)(?=;|,| \|)", table)}
    assert shown == {"zero bytes", "not an image"} | {
        f"not an image: {kind}" for _, kind in IMPOSTERS if kind and f"not an image: {kind}" in shown
    }


@pytest.mark.parametrize("kind", sorted({*imposters.MAGIC.values(), *imposters.CONTAINERS.values()}))
def test_the_page_names_every_kind_that_is_known_by_its_first_bytes(kind):
    assert kind in SECTION
