"""What control groups leave to a process: folders as the kernel shows them."""

import sys
from pathlib import Path

import pytest

from sae_ray.control_groups import cpu_quota, memory

GB = 10**9


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"": "max 100000"}, None),
        ({}, None),
        ({"user.slice/job.scope": "200000 100000"}, 2),
        ({"user.slice": "350000 100000", "user.slice/job.scope": "max 100000"}, 4),
        ({"user.slice": "100000 100000", "user.slice/job.scope": "800000 100000"}, 1),
        ({"": "50000 100000"}, 1),
        ({"other.slice": "100000 100000"}, None),
    ],
)
def test_cpus_are_those_of_every_control_group_around(tmp_path, limits, expected):
    for group, limit in limits.items():
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / group / "cpu.max").write_text(f"{limit}\n")
    assert cpu_quota("1:cpu:/x\n0::/user.slice/job.scope\n", tmp_path) == expected


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
V2 = ("memory.max", "memory.current", "")
UNLIMITED = {V1: 2**63 - 4096, V2: "max"}


def show(folder: Path, names: tuple[str, str, str], limit: int | None, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{UNLIMITED[names] if limit is None else limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    active = cached // 3
    lines = [f"cache {cached + 1}", f"{names[2]}inactive_file {cached - active}", f"{names[2]}active_file {active}"]
    (folder / "memory.stat").write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize(
    ("groups", "names", "top"),
    [
        ("4:memory:/user.slice/job.scope\n0::/\n", V1, "memory"),
        ("11:cpu,memory:/user.slice/job.scope\n1:name=systemd:/x\n0::/x\n", V1, "memory"),
        ("0::/user.slice/job.scope\n", V2, ""),
    ],
)
def test_memory_is_what_every_control_group_around_leaves(tmp_path, groups, names, top):
    around = tmp_path / top
    assert min(memory(groups, tmp_path)) > 2**60, "nothing is there"
    show(around / "user.slice/job.scope", names, None, 3 * GB, GB)
    assert min(memory(groups, tmp_path)) > 2**60
    show(around / "user.slice", names, 8 * GB, 6 * GB, GB)
    assert memory(groups, tmp_path) == (8 * GB, 3 * GB), "what is cached can be dropped"
    show(around / "user.slice/job.scope", names, 4 * GB, 3 * GB, 2 * GB)
    assert memory(groups, tmp_path) == (4 * GB, 3 * GB)
    show(around / "user.slice/job.scope", names, 4 * GB, 5 * GB, 0)
    assert memory(groups, tmp_path) == (4 * GB, 0), "a limit that was lowered below what is used"
    show(around / "other.slice", names, GB, 0, 0)
    assert memory(groups, tmp_path) == (4 * GB, 0)


def test_in_a_container_the_groups_around_it_are_named_but_not_there(tmp_path):
    show(tmp_path, V2, 2 * GB, GB, 0)
    assert memory("0::/docker/abc\n", tmp_path) == (2 * GB, GB)
    assert memory("", tmp_path) == (sys.maxsize, sys.maxsize)


def test_a_group_that_cannot_be_read_is_left_out(tmp_path):
    """A sandbox may lack some of the files, and a group may go away while it is read."""
    show(tmp_path, V2, 8 * GB, GB, 0)
    show(tmp_path / "job", V2, 2 * GB, GB, 0)
    (tmp_path / "job/memory.stat").unlink()
    (tmp_path / "job/cpu.max").mkdir()
    assert memory("0::/job\n", tmp_path) == (8 * GB, 7 * GB)
    assert cpu_quota("0::/job\n", tmp_path) is None
