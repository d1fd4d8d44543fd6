"""Folders: what is written appears whole or not at all, and is found again."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pyarrow.fs import FileSystem

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.store.files import Folder, parent_and_name, without_keys


def test_nothing_is_created_until_something_is_written(tmp_path: Path):
    folder = Folder(tmp_path / "a") / "b"
    assert not folder.exists()
    assert not folder.exists("x")
    assert folder.files(recursive=True) == {}
    assert folder.folders() == []
    folder.delete("x")
    assert list(tmp_path.iterdir()) == []
    folder.write_bytes("c/x", b"12")
    assert (tmp_path / "a" / "b" / "c" / "x").read_bytes() == b"12"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "s3://key:secret@study/root/a?endpoint_override=http%3A%2F%2F1.2.3.4&region=x is full",
            "s3://study/root/a is full",
        ),
        ("no Folder('s3://key:secret@study/a?region=x') and no s3://b/c", "no Folder('s3://study/a') and no s3://b/c"),
        ("write to me@here.org? yes: /tmp/a@b", "write to me@here.org? yes: /tmp/a@b"),
    ],
)
def test_texts_lose_the_keys_of_their_uris(text: str, shown: str):
    assert without_keys(text) == shown


def test_what_is_written_is_read(tmp_path: Path):
    folder = Folder(tmp_path)
    folder.write_json("a.json", {"ü": [1, 2.5, None]})
    assert folder.read_json("a.json") == {"ü": [1, 2.5, None]}
    table = pa.table({"x": [1, 2], "y": ["a", None]})
    folder.write_parquet("deep/t.parquet", table)
    assert folder.read_parquet("deep/t.parquet").equals(table)
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("missing")


def test_values_that_json_does_not_have_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        Folder(tmp_path).write_json("a.json", float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_files_are_listed_by_relative_path_with_their_sizes(tmp_path: Path):
    folder = Folder(tmp_path)
    for name in ("b/2", "b/1", "a", "b.txt", "ä/c/ 1"):
        folder.write_bytes(name, name.encode())
    assert folder.files() == {"a": 1, "b.txt": 5}
    assert list(folder.files(recursive=True).items()) == [("a", 1), ("b.txt", 5), ("b/1", 3), ("b/2", 3), ("ä/c/ 1", 7)]
    assert folder.folders() == ["b", "ä"]
    assert (folder / "b").files() == {"1": 3, "2": 3}


def test_delete_takes_a_file_or_a_folder(tmp_path: Path):
    folder = Folder(tmp_path)
    for name in ("a", "b/c/1", "b/2"):
        folder.write_bytes(name, b"")
    folder.delete("a")
    assert folder.files(recursive=True) == {"b/2": 0, "b/c/1": 0}
    folder.delete("b")
    assert list(tmp_path.iterdir()) == []


def test_one_place_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    here = Folder(tmp_path / "runs")
    assert Folder("runs") == here == Folder("~/runs") == pickle.loads(pickle.dumps(here))
    assert hash(Folder("runs")) == hash(here)
    assert here / "x" == Folder(tmp_path / "runs" / "x") != here
    assert (here / "x").name == "x"
    monkeypatch.chdir("/")
    assert str(here) == str(tmp_path / "runs")


@given(st.lists(st.text(min_size=1).filter(lambda name: "/" not in name and name not in (".", "..")), max_size=3))
@example([])
@example(["a b", "50%", "é+x"])
def test_a_path_in_a_store_is_what_pyarrow_makes_of_it(names: list[str]):
    """While a process has one object per store, however many folders of it are named."""
    for store in ("gs://anonymous@bucket", "abfs://container@account.dfs.core.windows.net"):
        uri = "/".join([store, *(quote(name, safe="") for name in names)])
        folder = Folder(uri)
        assert folder.path == FileSystem.from_uri(uri)[1].rstrip("/")
        assert folder.filesystem is (Folder(store) / "other").filesystem


def test_a_uri_is_read_by_the_same_code(tmp_path: Path):
    folder = Folder(f"{tmp_path.as_uri()}/a")
    (folder / "b").write_bytes("x", b"1")
    assert Folder(tmp_path / "a").files(recursive=True) == folder.files(recursive=True) == {"b/x": 1}
    assert str(folder / "b") == f"{tmp_path.as_uri()}/a/b"


def test_what_a_uri_says_of_its_store_stays_behind_the_path(tmp_path: Path):
    bucket = Folder("s3://bucket/root/?region=eu-west-1")
    below = bucket / "a" / "b"
    assert (below.uri, below.path) == ("s3://bucket/root/a/b?region=eu-west-1", "bucket/root/a/b")
    parent, name = parent_and_name("s3://bucket/a/labels.csv?region=eu-west-1")
    assert (parent.uri, parent.path_of(name)) == ("s3://bucket/a/?region=eu-west-1", "bucket/a/labels.csv")
    assert (Folder(tmp_path / "why?") / "x").path == f"{tmp_path}/why?/x"
    assert parent_and_name(f"{tmp_path}/why?/x?y") == (Folder(tmp_path / "why?"), "x?y")
    assert parent_and_name("x") == (Folder("."), "x")


def test_paths_are_shown_without_keys(tmp_path: Path):
    bucket = Folder("s3://id:secret@bucket/root?region=eu-west-1&scheme=http")
    assert f"{bucket / 'a'}" == "s3://bucket/root/a"
    assert bucket / "a" == pickle.loads(pickle.dumps(bucket / "a"))
    assert str(Folder(tmp_path / "why?" / "a@b:c")) == f"{tmp_path}/why?/a@b:c"


@pytest.mark.parametrize("uri", ["s4://bucket", "https://example.com/cat.jpg", "s3://bucket?zone=1"])
def test_a_uri_of_no_filesystem_is_refused(uri: str):
    with pytest.raises(UsageError, match=r"cannot be opened \(.*\); give a local path or a URI such as s3://"):
        Folder(uri)


@pytest.mark.parametrize("path", ["", None, 3, [1] * 1000])
def test_what_is_no_path_is_refused(path: Any):
    with pytest.raises(UsageError, match="names no folder; give a path or a URI"):
        Folder(path)


def test_any_object_that_is_a_path_names_a_folder(tmp_path: Path):
    with os.scandir(tmp_path.parent) as entries:
        [entry] = [entry for entry in entries if entry.name == tmp_path.name]
    assert Folder(entry) == Folder(tmp_path)


def test_a_torn_json_file_is_named(tmp_path: Path):
    (tmp_path / "step.json").write_text('{"a": ')
    with pytest.raises(SaeRayError, match=r"step\.json is not JSON .* or delete its folder and run again"):
        Folder(tmp_path).read_json("step.json")


def test_writing_leaves_nothing_beside_the_file(tmp_path: Path):
    folder = Folder(tmp_path)
    folder.write_bytes("x", b"old")
    folder.write_bytes("x", b"new")
    assert folder.files(recursive=True) == {"x": 3}
    assert folder.read_bytes("x") == b"new"


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path):
    folder = Folder(tmp_path)
    folder.write_bytes("x", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # to a file's writer as good as a full disk
        with pytest.raises(OSError, match="File too large"):
            folder.write_bytes("x", bytes(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folder.files(recursive=True) == {"x": 3}
    assert folder.read_bytes("x") == b"old"


def test_a_reader_never_sees_half_a_file_even_of_a_killed_writer(tmp_path: Path):
    folder = Folder(tmp_path)
    size = 2_000_000
    folder.write_bytes("x", b"a" * size)
    code = """
import sys
from sae_ray.store.files import Folder
print("ready", flush=True)
while True:
    for letter in (b"a", b"b"):
        Folder(sys.argv[1]).write_bytes("x", letter * int(sys.argv[2]))
"""
    command = [sys.executable, "-c", code, str(tmp_path), str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            letters, n_read = set(), 0
            while n_read < 100 or len(letters) < 2:
                n_read += 1
                assert writer.poll() is None
                content = folder.read_bytes("x")
                assert len(content) == size
                assert content == content[:1] * size
                letters.add(content[:1])
        finally:
            writer.send_signal(signal.SIGKILL)
    assert letters == {b"a", b"b"}
    assert len(folder.read_bytes("x")) == size


def test_free_space_is_that_of_the_nearest_folder_there_is(tmp_path: Path):
    free = Folder(tmp_path / "not" / "there").free_bytes()
    assert free is not None
    assert free > 0
