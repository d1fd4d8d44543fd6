"""Models and activations in an object store: the same as on a disk, copied once by each node."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_ray.encoders import Site, describe_encoder, load_encoder
from sae_ray.encoders.text import load_text_encoder
from sae_ray.errors import SaeRayError, UsageError
from sae_ray.steering.llava import describe_llava, load_llava
from sae_ray.store import copies
from sae_ray.store.activations import ActivationStore
from sae_ray.store.copies import local_copy, shared_activations
from sae_ray.store.files import Folder
from sae_ray.store.stream import TrainingStream
from sae_ray.world.write import MODELS
from tests.object_store import KEY, upload

OPEN_CLIP = "open_clip:local-dir:"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a node that has no copy yet."""
    monkeypatch.setenv(copies.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def uploaded(bucket: str) -> Callable[[str], str]:
    """Puts a model of the world into the store, into a folder of this test's own."""
    folder = uuid.uuid4().hex
    return lambda name: upload(MODELS / name, bucket.format(f"{folder}/{name}"))


def bits(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(("name", "prefix"), [("clip", ""), ("judge", OPEN_CLIP)])
def test_an_encoder_in_a_store_is_the_one_of_the_directory(name: str, prefix: str, uploaded, cache):
    uri, local = f"{prefix}{uploaded(name)}", f"{prefix}{MODELS / name}"
    described, expected = describe_encoder(uri), describe_encoder(local)
    assert asdict(described) == asdict(expected) | {"model": uri}
    assert described.revision == expected.revision, "steps are named by it"

    images = torch.randint(256, (2, 3, *expected.image_size), dtype=torch.uint8)
    site = Site(point="projection")
    ours, theirs = (
        load_encoder(model, described.revision).tap(images, [site], ["a", "b"], 0)[site].activation
        for model in (uri, local)
    )
    assert torch.equal(ours, theirs)
    words = ["a star", "a cross"]
    assert torch.equal(load_text_encoder(uri).embed_texts(words), load_text_encoder(local).embed_texts(words))
    [copy] = (path for path in cache.iterdir() if path.is_dir())
    assert bits(copy) == bits(MODELS / name)


def test_a_llava_in_a_store_is_the_one_of_the_directory(uploaded, cache):
    uri, local = uploaded("llava"), str(MODELS / "llava")
    described, expected = describe_llava(uri), describe_llava(local)
    assert described.tower.revision == expected.tower.revision
    assert (described.layer, described.n_image_tokens) == (expected.layer, expected.n_image_tokens)
    ours, theirs = (load_llava(model) for model in (uri, local))
    assert ours.answer(ours.white(), "What is shown?") == theirs.answer(theirs.white(), "What is shown?")


COPY = """
import os, sys
from sae_ray.store.copies import local_copy
from sae_ray.store.files import Folder
folder = Folder(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
copy = local_copy(folder, "models")
print(copy, os.stat(copy).st_ino)
"""


def test_processes_that_need_a_model_at_once_copy_it_once(uploaded, cache):
    """Its folder keeps its inode: nobody copied it a second time."""
    command = [sys.executable, "-c", COPY, uploaded("llava")]
    started = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for _ in range(3)]
    for one in started:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in started:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    found = {one.communicate()[0] for one in started}
    assert [one.returncode for one in started] == [0] * 3
    assert len(found) == 1
    [copy] = (path for path in cache.iterdir() if path.is_dir())
    assert found == {f"{copy} {copy.stat().st_ino}\n"}
    assert bits(copy) == bits(MODELS / "llava")


def test_a_damaged_copy_and_what_a_killed_process_left_are_replaced(uploaded, cache):
    folder = Folder(uploaded("clip"))
    copy = local_copy(folder, "models")
    (copy / "model.safetensors").write_bytes(b"torn")
    left = copy.with_name(f"{copy.name}.partial")
    left.mkdir()
    (left / "strange.bin").write_bytes(b"from a killed process")
    assert local_copy(folder, "models") == copy
    assert bits(copy) == bits(MODELS / "clip")
    assert [path for path in cache.iterdir() if path.is_dir()] == [copy]


def test_a_changed_model_is_another_one(uploaded, cache, tmp_path):
    uri = uploaded("clip")
    before = describe_encoder(uri)
    config = (MODELS / "clip" / "config.json").read_bytes()
    Folder(uri).write_bytes("config.json", config.replace(b"}", b" }", 1))
    after = describe_encoder(uri)
    assert after.revision != before.revision
    with pytest.raises(UsageError, match=r"revision is '.*', but that of s3://study/.*/clip is"):
        load_encoder(uri, before.revision)


def test_a_model_that_changes_while_it_is_copied_is_refused(uploaded, cache, monkeypatch):
    folder = Folder(uploaded("clip"))
    copy_files = copies.copy_files

    def copy_and_change(*given: object) -> None:
        copy_files(*given)
        folder.write_bytes("config.json", b"{}")

    monkeypatch.setattr(copies, "copy_files", copy_and_change)
    with pytest.raises(SaeRayError, match="/clip changed while it was copied; wait until its upload is complete"):
        local_copy(folder, "models")
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: folder.delete("config.json"), "there are no models in s3://study/.*/clip, which has none of"),
        (lambda folder: folder.delete("model.safetensors"), "s3://study/.*/clip cannot be loaded: .*model.safetensors"),
        (
            lambda folder: folder.write_bytes("model.safetensors", folder.read_bytes("model.safetensors")[:-1]),
            "s3://study/.*/clip cannot be loaded: .*not fully covered",
        ),
    ],
)
def test_a_faulty_model_is_refused_and_no_key_is_shown(spoil, words, uploaded, cache):
    uri = uploaded("clip")
    spoil(Folder(uri))
    with pytest.raises(UsageError) as refusal:
        load_encoder(uri, device="meta")
    assert re.search(words, str(refusal.value))
    assert KEY not in str(refusal.value)


def test_a_cache_that_cannot_be_written_is_named(uploaded, monkeypatch):
    monkeypatch.setenv(copies.CACHE, "/proc/nowhere")
    with pytest.raises(SaeRayError, match=r"cannot be copied to /proc/nowhere/models .*variable SAE_RAY_CACHE"):
        load_encoder(uploaded("clip"))


def test_a_directory_that_was_there_when_the_study_was_planned_is_missed_by_name():
    described = describe_encoder(str(MODELS / "clip"))
    with pytest.raises(SaeRayError, match=r"no directory /gone on .*, though there was one .*s3://") as refusal:
        load_encoder("/gone", described.revision)
    assert refusal.value.exit_code == 1


@pytest.fixture
def stored(bucket: str, write_store) -> Callable[[int], ActivationStore]:
    """Activations in the object store, each call's in a root of its own."""

    def make(seed: int) -> ActivationStore:
        rows = np.random.default_rng(seed).standard_normal((3, 40, 8), dtype=np.float32)
        parts = [(np.arange(40) + 40 * number, np.zeros(40), vectors) for number, vectors in enumerate(rows)]
        return write_store(bucket.format(uuid.uuid4().hex), parts)

    return make


def batches(folder: Folder) -> torch.Tensor:
    stream = TrainingStream(ActivationStore(folder), batch_size=50, seed=0, shuffle_rows=60)
    return torch.stack(list(itertools.islice(stream.batches(), 7)))


def copied(cache: Path) -> list[Path]:
    return [path for path in (cache.parent / "activations").iterdir() if path.is_dir()]


def test_activations_are_read_from_a_copy_that_stays(stored, cache):
    folder = stored(0).folder
    with shared_activations(folder) as first, shared_activations(folder) as second:
        assert first == second
        assert first.is_local
        assert torch.equal(batches(first), batches(folder))
    assert copied(cache) == [Path(first.path)]
    with shared_activations(first) as on_disk:
        assert on_disk == first, "no copy of what lies on a disk"
    assert copied(cache) == [Path(first.path)]


READ = """
import sys
from sae_ray.store.copies import shared_activations
from sae_ray.store.files import Folder
with shared_activations(Folder(sys.argv[1])) as place:
    print(place.is_local, flush=True)
    sys.stdin.readline()
"""


def test_short_space_takes_copies_that_nobody_reads_and_none_that_is_read(stored, cache, monkeypatch):
    """A copy is read by another process, which is then killed."""
    old, read, wanted = (stored(seed).folder for seed in range(3))
    with shared_activations(old) as place:
        gone = Path(place.path)
    reader = subprocess.Popen([sys.executable, "-c", READ, read.uri], stdin=-1, stdout=-1, text=True)
    assert reader.stdout is not None
    assert reader.stdout.readline() == "True\n"
    [kept] = set(copied(cache)) - {gone}

    usage = shutil.disk_usage(cache.parent)

    def disk_usage(path: Path) -> object:
        return usage._replace(free=0) if copied(cache) else usage

    monkeypatch.setattr(copies.shutil, "disk_usage", disk_usage)
    with shared_activations(wanted) as place:
        assert place == wanted, "it is read from the store: there is no space while the other copy is read"
    assert copied(cache) == [kept], "what nobody reads has gone"
    reader.kill()
    reader.wait()
    with shared_activations(wanted) as place:
        assert place.is_local
        assert copied(cache) == [Path(place.path)]


def test_activations_are_read_from_the_store_where_no_copy_can_be_made(stored, monkeypatch):
    monkeypatch.setenv(copies.CACHE, "/proc/nowhere")
    folder = stored(0).folder
    with shared_activations(folder) as place:
        assert place == folder
