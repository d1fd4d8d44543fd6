"""Files of tensors: those of safetensors, without a copy of all of them in memory."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save

from sae_ray.store.files import Folder
from sae_ray.store.tensors import read_tensors, write_tensors


def test_a_file_is_that_of_safetensors_and_may_change_once_it_is_read(tmp_path: Path):
    folder = Folder(tmp_path)
    tensors = {"w": torch.randn(3, 2), "half": torch.randn(4).bfloat16(), "none": torch.zeros(0, 3)}
    write_tensors(folder, "w.safetensors", tensors)
    file = tmp_path / "w.safetensors"
    assert file.read_bytes() == save(tensors)
    assert list(folder.files()) == ["w.safetensors"]

    found = read_tensors(folder, "w.safetensors")
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_it_may_be_read_by_whom_other_files_may(tmp_path: Path):
    folder = Folder(tmp_path)
    folder.write_bytes("other", b"")
    write_tensors(folder, "w.safetensors", {"w": torch.randn(3, 2)})
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path):
    """As of every other file: such work is tried again, or stops with a word about its disk."""
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, largest[1]))
    try:
        with pytest.raises(OSError, match=r"w\.safetensors: "):
            write_tensors(Folder(tmp_path), "w.safetensors", {"w": torch.randn(1024)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, largest)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_leaves_no_file(tmp_path: Path):
    with pytest.raises(ValueError, match="non contiguous"):
        write_tensors(Folder(tmp_path), "w.safetensors", {"w": torch.randn(3, 2).T})
    assert not list(tmp_path.iterdir())


def test_a_torn_file_is_an_error_of_safetensors(tmp_path: Path):
    (tmp_path / "w.safetensors").write_bytes(save({"w": torch.randn(3, 2)})[:-1])
    with pytest.raises(SafetensorError):
        read_tensors(Folder(tmp_path), "w.safetensors")
