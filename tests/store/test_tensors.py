"""Files of tensors: those of safetensors, without a copy of all of them in memory."""

from __future__ import annotations

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


def test_what_cannot_be_written_leaves_no_file(tmp_path: Path):
    with pytest.raises(ValueError, match="non contiguous"):
        write_tensors(Folder(tmp_path), "w.safetensors", {"w": torch.randn(3, 2).T})
    assert not list(tmp_path.iterdir())


def test_a_torn_file_is_an_error_of_safetensors(tmp_path: Path):
    (tmp_path / "w.safetensors").write_bytes(save({"w": torch.randn(3, 2)})[:-1])
    with pytest.raises(SafetensorError):
        read_tensors(Folder(tmp_path), "w.safetensors")
