"""Checkpoints: the newest two, each whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sae_ray.store.checkpoints import newest_checkpoint, save_checkpoint
from sae_ray.store.files import Folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "checkpoints")


def save(folder: Folder, step: int) -> None:
    save_checkpoint(folder, step, {"w": torch.full((2,), float(step))}, {"n_steps": step})


def newest(folder: Folder) -> tuple[list[float], dict]:
    found = newest_checkpoint(folder)
    assert found is not None
    return found[0]["w"].tolist(), found[1]


def names(folder: Folder) -> list[str]:
    return list(folder.files())


def test_there_is_none_before_the_first(folder: Folder):
    assert newest_checkpoint(folder) is None


def test_tensors_and_facts_come_back(folder: Folder):
    tensors = {
        "w": torch.randn(3, 2),
        "half": torch.randn(4).bfloat16(),
        "count": torch.tensor([2**40]),
        "flag": torch.tensor([True, False]),
        "none": torch.zeros(0, 3),
    }
    facts = {"n_steps": 7, "threshold": 0.1 + 0.2, "seed": 2**62, "unset": None}
    save_checkpoint(folder, 7, tensors, facts)
    found = newest_checkpoint(folder)
    assert found is not None
    assert found[1] == facts
    assert found[0].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[0][name].dtype == tensor.dtype
        assert torch.equal(found[0][name], tensor)


def test_the_newest_two_are_kept(folder: Folder):
    for step in (500, 1000, 1500, 1_000_000_000):
        save(folder, step)
    assert names(folder) == [
        "step-000001500.json",
        "step-000001500.safetensors",
        "step-1000000000.json",
        "step-1000000000.safetensors",
    ]
    assert newest(folder) == ([1e9, 1e9], {"n_steps": 1_000_000_000})


def test_half_of_a_checkpoint_is_none(folder: Folder):
    for step in (1, 2):
        save(folder, step)
    folder.write_bytes("step-000000003.safetensors", b"killed before the facts were written")
    assert newest(folder) == ([2.0, 2.0], {"n_steps": 2})
    folder.delete("step-000000002.safetensors")
    assert newest(folder) == ([1.0, 1.0], {"n_steps": 1})
    folder.delete("step-000000001.json")
    assert newest_checkpoint(folder) is None


def test_a_step_that_was_half_written_is_written_again(folder: Folder):
    save(folder, 1)
    folder.write_bytes("step-000000002.safetensors", b"half")
    save(folder, 2)
    save(folder, 3)
    assert newest(folder) == ([3.0, 3.0], {"n_steps": 3})
    assert [name for name in names(folder) if name.endswith(".json")] == ["step-000000002.json", "step-000000003.json"]
