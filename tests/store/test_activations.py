"""The activation store: any reader opens it, and a part exists whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pyarrow import fs

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.store.activations import (
    ActivationStore,
    Part,
    finish_store,
    finished_parts,
    read_parts,
    remove_orphans,
    write_part,
)
from sae_ray.store.casting import stored_rows
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step
from tests.counting import Counting

WriteStore = Callable[..., ActivationStore]
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def rows(first_image: int, n_images: int, n_tokens: int = 2, d: int = 3, seed: int = 0) -> Rows:
    """Activations of consecutive images, two tokens each."""
    image_index = np.repeat(np.arange(first_image, first_image + n_images), n_tokens)
    token = np.tile(np.arange(n_tokens), n_images)
    return image_index, token, np.random.default_rng([seed, first_image]).normal(size=(len(token), d)).astype("float32")


@pytest.mark.parametrize("store_dtype", ["float16", "float32"])
def test_other_readers_see_the_same_rows(tmp_path: Path, write_store: WriteStore, store_dtype: str):
    parts = [rows(0, 4), rows(4, 0), rows(5, 2)]  # the second range has rejects alone
    store = write_store(tmp_path, parts, store_dtype)
    data = Path(str(store.folder / "data"))
    image_index, token, activation = (np.concatenate(column) for column in zip(*parts, strict=True))
    activation = activation.astype(store_dtype)

    table = pq.read_table(data)
    scalar = pa.float16() if store_dtype == "float16" else pa.float32()
    vectors = pa.list_(scalar, 3)
    assert table.schema.equals(pa.schema({"image_index": pa.int64(), "token": pa.int16(), "activation": vectors}))

    frame = polars.read_parquet(data / "*.parquet").sort("image_index", "token")
    query = f"select * from read_parquet('{data}/*.parquet') order by image_index, token"
    found = duckdb.connect().execute(query).fetchall()
    ours = [store.read(number) for number in range(3)]
    for seen in (
        (*(table[name].to_numpy() for name in ("image_index", "token")), np.array(table["activation"].to_pylist())),
        (*(frame[name].to_numpy() for name in ("image_index", "token")), np.array(frame["activation"].to_list())),
        tuple(np.array(column) for column in zip(*found, strict=True)),
        tuple(np.concatenate(column) for column in zip(*ours, strict=True)),
    ):
        assert np.array_equal(seen[0], image_index)
        assert np.array_equal(seen[1], token)
        assert np.array_equal(seen[2].astype(store_dtype), activation)
    assert ours[0][2].dtype == store_dtype


@given(st.data())
def test_any_rows_come_back(data: st.DataObject):
    n, d = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 4))
    store_dtype = data.draw(st.sampled_from(["float16", "float32"]))
    width = 16 if store_dtype == "float16" else 32
    activation = data.draw(arrays.arrays(store_dtype, (n, d), elements=st.floats(width=width, allow_nan=False,
                                                                                 allow_infinity=False)))  # fmt: skip
    image_index = np.sort(data.draw(arrays.arrays("int64", n, elements=st.integers(0, 2**40))))
    token = data.draw(arrays.arrays("int16", n, elements=st.integers(-1, 2**15 - 1)))
    with tempfile.TemporaryDirectory() as root:
        part = write_part(Folder(root), 7, stored_rows(image_index, token, activation, store_dtype), [("a", "b")])
        assert read_parts(Folder(root)) == [part]
        table = Folder(root).read_parquet(part.file)
    assert np.array_equal(table["image_index"].to_numpy(), image_index)
    assert np.array_equal(table["token"].to_numpy(), token)
    assert np.array_equal(np.array(table["activation"].to_pylist(), store_dtype).reshape(n, d), activation)
    assert (part.rows, part.images) == (n, len(np.unique(image_index)))
    assert part.sum_squares == pytest.approx(np.square(activation.astype("float64")).sum())


def test_a_table_in_many_row_groups_is_one_part(
    tmp_path: Path, write_store: WriteStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sae_ray.store.activations.ROW_GROUP_BYTES", 40)  # three rows of three float32
    parts = [rows(0, 5)]
    store = write_store(tmp_path, parts)
    assert pq.ParquetFile(store.folder.path_of(store.parts[0].file)).num_row_groups == 4
    assert np.array_equal(store.read(0)[2], parts[0][2])


@pytest.mark.parametrize("group_bytes", [24, 60, 1000])
def test_pieces_of_a_part_are_its_rows(
    tmp_path: Path, write_store: WriteStore, monkeypatch: pytest.MonkeyPatch, group_bytes: int
):
    """Whatever row groups they cut through."""
    monkeypatch.setattr("sae_ray.store.activations.ROW_GROUP_BYTES", group_bytes)
    monkeypatch.setattr("sae_ray.store.activations.PIECE_BYTES", 50)  # four rows of three float32
    store = write_store(tmp_path, [rows(0, 7)])
    whole, pieces = store.read(0), [store.read(0, images) for images in store.pieces(0)]
    assert len(pieces) == -(-len(whole[0]) * 12 // 50) > 1
    assert list(chain(*store.pieces(0))) == list(range(7))
    for column, parts in zip(whole, zip(*pieces, strict=True), strict=True):
        assert np.array_equal(np.concatenate(parts), column)


def test_what_does_not_fit_into_the_stored_dtype_is_refused():
    fits = np.array([[65504.0, -65504.0]], np.float32)
    for store_dtype in ("float16", "float32"):
        assert stored_rows(np.arange(1), np.zeros(1), fits, store_dtype).activation.shape == (1, 2)
    too_large = np.array([[1.0, -70000.0]], np.float32)
    assert stored_rows(np.arange(1), np.zeros(1), too_large, "float32").activation.shape == (1, 2)
    refusal = (
        r'an activation of 7e\+04 does not fit into extraction.store_dtype = "float16"; set store_dtype = "float32"'
    )
    with pytest.raises(SaeRayError, match=refusal):
        stored_rows(np.arange(1), np.zeros(1), too_large, "float16")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(value: float):
    with pytest.raises(SaeRayError, match="not finite"):
        stored_rows(np.arange(2), np.zeros(2), np.array([[1.0], [value]], np.float32), "float32")


def test_what_a_killed_writer_left_is_not_read_and_is_removed(tmp_path: Path):
    code = """
import os, signal, sys
import numpy as np
from sae_ray.store.activations import write_part
from sae_ray.store.casting import stored_rows
from sae_ray.store.files import Folder

class Killed(Folder):
    def write_json(self, name, value):
        os.kill(os.getpid(), signal.SIGKILL)  # after the part's file, before its marker

for number, kind in enumerate((Folder, Killed)):
    rows = stored_rows(np.arange(2), np.zeros(2), np.ones((2, 3)), "float32")
    write_part(kind(sys.argv[1]), number, rows, [])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = Folder(tmp_path)
    assert len((folder / "data").files()) == 2
    assert finished_parts(folder) == {0}

    again = write_part(folder, 1, stored_rows(np.arange(2, 4), np.zeros(2), np.ones((2, 3)), "float32"), [])
    parts = read_parts(folder)
    assert [part.file for part in parts] == [parts[0].file, again.file]
    assert len((folder / "data").files()) == 3
    remove_orphans(folder, parts)
    assert {f"data/{name}" for name in (folder / "data").files()} == {part.file for part in parts}
    assert pq.read_table(tmp_path / "data")["image_index"].to_pylist() == [0, 1, 2, 3]


def test_parts_are_read_in_the_order_of_their_numbers(tmp_path: Path):
    folder = Folder(tmp_path)
    for number in (2, 100_000, 0):
        write_part(folder, number, stored_rows(*rows(number, 1), "float32"), [(f"{number}.png", "truncated")])
    (tmp_path / "parts" / "part-00005.json.0badcafe.tmp").touch()  # what a killed write of a marker leaves
    assert finished_parts(folder) == {0, 2, 100_000}
    assert [part.rejects for part in read_parts(folder)] == [
        (("0.png", "truncated"),),
        (("2.png", "truncated"),),
        (("100000.png", "truncated"),),
    ]


def test_a_store_knows_its_size_and_the_scale_of_its_rows(tmp_path: Path, write_store: WriteStore):
    parts = [rows(0, 4), rows(4, 2)]
    store = write_store(tmp_path, parts)
    assert (store.d, store.n_rows, store.n_images) == (3, 12, 6)
    norms = np.linalg.norm(np.concatenate([part[2] for part in parts]), axis=1)
    assert store.root_mean_square_norm == pytest.approx(np.sqrt(np.square(norms).mean()))


def test_squares_of_large_float16_do_not_overflow(tmp_path: Path, write_store: WriteStore):
    large = np.full((2, 4), 60000.0, np.float32)
    store = write_store(tmp_path, [(np.arange(2), np.zeros(2), large)], "float16")
    assert store.root_mean_square_norm == pytest.approx(2 * float(np.float16(60000)))


def test_a_store_of_many_parts_opens_with_few_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And a task that is handed some of them asks for these alone."""
    counting = Counting(LocalFileSystem())
    store = (fs.PyFileSystem(counting), str(tmp_path))
    monkeypatch.setattr("sae_ray.store.files._store", lambda uri: store)
    step = Step(Folder("counting://store/root"), "extract", "many", {"store_dtype": "float32", "images_per_part": 2})
    first = write_part(step.folder, 0, stored_rows(*rows(0, 2), "float32"), [])
    data = Path(step.folder.path) / first.file
    parts = [replace(first, file=f"data/part-{number:05d}.parquet") for number in range(2500)]
    for part in parts:
        os.link(data, Path(step.folder.path) / part.file)
    finish_store(step, parts, 3, 0.0)
    assert not (step.folder / "parts").exists(), "the markers are no longer needed"

    counting.asked = 0
    opened = ActivationStore(step.folder)
    assert len(opened.parts) == 2500
    assert opened.root_mean_square_norm > 0
    assert counting.asked <= 10
    handed = opened.only(range(1000, 1008))
    counting.asked = 0
    assert [len(handed.read(number)[0]) for number in handed.parts] == [4] * 8
    assert counting.asked == 8


def test_markers_are_read_of_what_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a store of many parts each marker is a request that takes its time."""
    counting = Counting(LocalFileSystem())
    store = (fs.PyFileSystem(counting), str(tmp_path))
    monkeypatch.setattr("sae_ray.store.files._store", lambda uri: store)
    folder = Folder("counting://store/root")
    rejects = [("é.jpg", "truncated")]
    parts = [
        write_part(folder, n, stored_rows(*rows(2 * n, 2), "float32"), rejects if n == 2 else []) for n in range(5)
    ]
    assert read_parts(folder) == parts
    known = {number: Part.from_json(json.loads(json.dumps(asdict(parts[number])))) for number in (0, 2, 4)}
    counting.asked = 0
    assert read_parts(folder, known) == parts
    assert counting.asked == 1 + 2


def test_only_a_finished_extraction_is_opened(tmp_path: Path):
    unfinished = Folder(tmp_path / "nothing")
    with pytest.raises(SaeRayError, match="is not a finished step"):
        ActivationStore(unfinished)
    step = Step(Folder(tmp_path), "train", "sae", {})
    step.finish(0.0, {})
    with pytest.raises(UsageError, match="is a train step, not activations; give an extract step"):
        ActivationStore(step.folder)


def test_a_torn_store_is_not_opened(tmp_path: Path, write_store: WriteStore):
    store = write_store(tmp_path, [rows(0, 4)])
    store.folder.delete(store.parts[0].file)
    with pytest.raises(SaeRayError, match="is torn"):
        ActivationStore(store.folder)
