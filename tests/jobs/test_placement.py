"""Which SAEs are trained together, and in what order."""

import heapq
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_ray.jobs.cluster import PROCESS_BYTES
from sae_ray.jobs.placement import ALONE, PACES, bundles, memory, work
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae_ray.sae import BundleJob, CellTrainer
from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan

WIDEST = 2**22
"""As many times the 16 dimensions of the projection: the work of 65,536 latents of 1,024 dimensions."""


@pytest.fixture(scope="module")
def make_plan(tiny_clip, tmp_path_factory) -> Callable[..., StudyPlan]:
    """A plan with these expansions at two sites."""
    images = tmp_path_factory.mktemp("images")
    for number in range(40):
        (images / f"{number:02d}.png").touch()

    def make(expansions: list[float], steps: int = 1000, **overrides: Any) -> StudyPlan:
        values = {
            "name": "s",
            "images": {"train": {"path": str(images)}, "heldout_fraction": 0.25},
            "encoder": {"model": tiny_clip},
            "judge": {"model": tiny_clip, "point": "projection"},
            "grid": [{"sites": ["projection", "layer1:cls"], "expansions": expansions, "k": [4]}],
            "training": {"batch_size": 4096, "steps": steps, "warmup_steps": 1, "threshold_start_step": 1},
        }
        return StudyPlan(Study.from_dict(values, overrides), Folder(Path("/nowhere")))

    return make


def sizes(packed: list[BundleJob], plan: StudyPlan, device: str = "cpu") -> list[float]:
    of = {train.step.name: work(train, PACES[device]) for train in plan.trains}
    return [sum(of[job.step.name] for job in bundle.cells) for bundle in packed]


@settings(max_examples=25)
@given(
    expansions=st.lists(st.sampled_from([2.0**n for n in range(1, 19)]), min_size=1, max_size=12, unique=True),
    slots=st.integers(1, 20),
    most=st.integers(1, 16),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_every_cell_is_in_one_bundle_and_none_is_too_large(make_plan, expansions, slots, most, device):
    plan = make_plan(expansions, **{"resources.train.cells_per_bundle": most})
    packed, pace = bundles(plan, plan.trains, slots, device), PACES[device]
    cells = [job.step.name for bundle in packed for job in bundle.cells]
    assert sorted(cells) == sorted(train.step.name for train in plan.trains)
    folder_of = {train.step.name: train.activations.step.folder for train in plan.trains}
    loads = sizes(packed, plan, device)
    assert loads == sorted(loads, reverse=True)
    fair = max(sum(loads) / (2 * slots if slots > 1 else 1), pace.worker)
    for bundle, load in zip(packed, loads, strict=True):
        assert {folder_of[job.step.name] for job in bundle.cells} == {bundle.activations}
        assert len(bundle.cells) <= most
        assert len(bundle.cells) == 1 or load <= min(fair, 1000 * (ALONE + pace.step)) * (1 + 1e-9)


def test_the_widest_cell_is_alone(make_plan):
    plan = make_plan([1, 64, 1024, WIDEST / 16])
    for device in ("cpu", "cuda"):
        packed = bundles(plan, plan.trains, 1, device)
        together = [[job.cell.expansion for job in bundle.cells] for bundle in packed]
        assert together[:2] == 2 * [[WIDEST / 16]]
        assert sorted(map(sorted, together[2:])) == 2 * [[1, 64, 1024]]


def test_slots_are_kept_busy(make_plan):
    """As workers take bundles in this order, the last one ends not much later than it must."""
    plan = make_plan([2.0**n for n in range(18)], steps=10_000)
    slots = 4
    loads = sizes(bundles(plan, plan.trains, slots, "cpu"), plan)
    ends = [0.0] * slots
    for load in loads:
        heapq.heapreplace(ends, ends[0] + load)
    assert max(ends) <= 4 / 3 * max(sum(loads) / slots, max(loads))


class Made(TorchDispatchMode):
    """What torch makes within, as far as it is still in memory."""

    def __init__(self):
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and one.layout is torch.strided:
                storage = one.untyped_storage()
                self.made[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes(self) -> int:
        return sum(size for storage, size in self.made.values() if not storage.expired())


@pytest.mark.parametrize("kind", ["batch_topk", "jumprelu"])
def test_a_bundle_asks_for_the_memory_of_all_that_a_step_holds(make_plan, kind):
    """Between its steps a cell holds weights and moments, and the pre-activations that the next cell overwrites."""
    own = {"k": [4]} if kind == "batch_topk" else {"sparsity": [0.1]}
    grid = [{"sites": ["projection"], "architectures": [kind], "expansions": [64, 64.5], **own}]
    one, two = make_plan([1], grid=grid).trains
    cell, d_in = one.grid_cell.cell, one.activations.width
    trainer = CellTrainer(cell, d_in)
    x = torch.randn(cell.training.batch_size, d_in)
    with Made() as made:
        trainer.step(x)
    tensors, _ = trainer.state()
    held = sum(tensor.nbytes for tensor in tensors.values())
    pre = 4 * cell.training.batch_size * trainer.d_sae
    assert one.held_bytes == pytest.approx(held, rel=0.1)
    assert made.bytes() < 1.1 * pre + x.nbytes
    assert memory([one], 0) - PROCESS_BYTES > held + pre
    assert memory([one, two], 0) - memory([one], 0) == two.held_bytes + two.step_bytes - one.step_bytes
    assert memory([one], one.rows) - memory([one], 0) == one.activations.bytes


def test_every_worker_asks_for_the_activations_that_it_reads(make_plan):
    """On a GPU weights only pass through the memory of the host."""
    one, two = make_plan([64, 64.5], **{"training.batch_size": 4}).trains[:2]
    on_gpu = memory([one, two], one.rows, "cuda")
    assert on_gpu - memory([one, two], 0, "cuda") == one.activations.bytes
    assert on_gpu == PROCESS_BYTES + one.activations.bytes + two.held_bytes
    shared = memory([one, two], one.rows, shards=2)
    assert shared == PROCESS_BYTES + one.activations.bytes + (one.held_bytes + two.held_bytes) // 2 + two.held_bytes


def test_the_embeddings_of_a_goal_count_once(make_plan):
    grid = [{"sites": ["layer1:cls"], "expansions": [64], "k": [4], "monosemanticity": [0.0, 0.5, 1.0]}]
    plain, *judged = make_plan([1], grid=grid).trains
    assert [one.embeddings is None for one in (plain, *judged)] == [True, False, False]
    extra = memory(judged, 0) - memory([plain, plain], 0)
    assert extra == judged[0].embeddings.bytes > 0


def test_little_work_is_not_spread(make_plan):
    plan = make_plan([1, 2, 4], steps=20)
    assert len(bundles(plan, plan.trains, 8, "cpu")) == 2, "one per site"
