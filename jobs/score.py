"""The scoring stage: one pass over (SAE, image set) in Ray tasks gives scores and top images of every neuron.

A task prepares one block of images; chains of folds, one per range of neurons, add the blocks to a `NeuronStats` in the
order of the images. Blocks are fixed by the format, so the result is bit-identical for any number of workers and any
order of completion.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache, lru_cache
from typing import Any

from sae_ray.sae import SAE, load_sae
from sae_ray.scores.scoring import image_blocks, read_block
from sae_ray.scores.statistics import BlockImages, Entries, NeuronStats, neuron_blocks
from sae_ray.scores.tables import write_tables
from sae_ray.store.activations import ActivationStore
from sae_ray.store.files import Folder
from sae_ray.study.config import ScoreResources
from sae_ray.study.plan import ScorePlan, StudyPlan

from .cluster import gpus_or_default, n_cpus, n_gpus, require
from .progress import Progress
from .stage import at_work, unfinished

BLOCKS_PER_FOLD = 8
"""Every fold copies the statistics once, so several blocks are added at a time."""


def run(plan: StudyPlan) -> None:
    """Scores the SAEs of the study and the raw activations that are not scored yet. Failed cells are left out.

    Raises:
        SaeRayError: activations or SAEs are missing, the disk is too full, another driver is at work on the same step.
    """
    todo = unfinished(plan.scores)
    if todo:
        with at_work(plan.root, "score", todo):
            _score(todo, plan.study.resources.score)


def _score(todo: Sequence[ScorePlan], resources: ScoreResources) -> None:
    import ray

    gpus = gpus_or_default(resources.gpus)
    require("resources.score", 1, resources.cpus, gpus)
    opened = cache(ActivationStore)
    passes = [Pass(score, opened, resources.cpus, gpus) for score in todo]
    slots = n_gpus() / gpus if gpus else n_cpus() / max(resources.cpus, 1)
    at_once = 2 * (resources.workers or max(1, int(slots)))
    waiting = deque((one, parts) for one in passes for parts in one.blocks)
    running: dict[ray.ObjectRef, Pass] = {}
    with Progress(f"score {len(passes)} passes", len(waiting), "blocks") as progress:
        while waiting or running:
            # Bounded, so that the statistics in flight do not grow with the number of images.
            while waiting and len(running) < at_once:
                one, parts = waiting.popleft()
                running[one.submit(parts)] = one
            # Each of these is an empty result, so that this process never receives the data themselves.
            finished, _ = ray.wait(list(running), num_returns=1, fetch_local=False)
            ray.get(finished)
            one = running.pop(finished[0])
            progress.advance(1)
            if one.n_submitted == len(one.blocks) and one not in running.values():
                one.write()


class Pass:
    """One pass: its blocks of images, and the fold of their statistics."""

    def __init__(self, score: ScorePlan, opened: Callable[[Folder], ActivationStore], cpus: float, gpus: float):
        import ray

        self.step = score.step
        self.n_submitted = 0
        self._sae = score.sae.step.folder if score.sae else None
        self._activations = opened(score.activations.step.folder)
        self._embeddings = opened(score.embeddings.step.folder) if score.embeddings else None
        self.blocks = image_blocks(self._activations)
        width = score.embeddings.width if score.embeddings else 0
        ranges = list(neuron_blocks(score.neurons, width))
        self._shapes = [(len(neurons), width, self.step.config["top_images"]) for neurons in ranges]
        self._counts = {"images": self._activations.n_images, "neurons": score.neurons}
        self._device = "cuda" if gpus else "cpu"
        self._block = ray.remote(num_cpus=cpus, num_gpus=gpus, num_returns=2 + len(ranges))(block_entries)
        self._fold = ray.remote(num_cpus=cpus, num_returns=2)(folded)
        self._write = ray.remote(num_cpus=0)(written)
        self._waiting: list[list] = []
        self._folded: list = [None for _ in ranges]
        self._started = time.monotonic()

    def submit(self, parts: range) -> Any:
        """Starts one block, in image order, and sometimes a fold; returns what to wait for."""
        # The parts alone: a task that opened the stores would list all of them.
        stores = (self._activations.only(parts), self._embeddings and self._embeddings.only(parts))
        results: Any = self._block.remote(self._sae, self._device, *stores, parts)
        done, *block = results
        self._waiting.append(block)
        self.n_submitted += 1
        if len(self._waiting) < BLOCKS_PER_FOLD and self.n_submitted < len(self.blocks):
            return done
        waiting, *columns = zip(*self._waiting, strict=True)
        folds: Any = [
            self._fold.remote(stats, shape, *waiting, *column)
            for stats, shape, column in zip(self._folded, self._shapes, columns, strict=True)
        ]
        self._folded = [stats for _, stats in folds]
        self._waiting = []
        return folds[0][0]

    def write(self) -> None:
        """Writes the tables and finishes the step."""
        import ray

        ray.get(self._write.remote(self.step.folder, *self._folded))
        self._folded = []
        self.step.finish(time.monotonic() - self._started, self._counts)


def block_entries(
    sae: Folder | None, device: str, activations: ActivationStore, embeddings: ActivationStore | None, parts: range
) -> tuple[BlockImages | Entries | None, ...]:
    """The task: nothing, to be waited for; one block of images; its entries for every range of neurons."""
    import torch

    torch.set_num_threads(1)  # the last bits depend on the number of threads
    images, entries = read_block(_sae(sae, device) if sae else None, activations, embeddings, parts)
    return None, images, *entries


def folded(
    stats: NeuronStats | None, shape: tuple[int, int, int], *blocks: BlockImages | Entries
) -> tuple[None, NeuronStats]:
    """The task that adds blocks to the statistics of one range of neurons: nothing, to be waited for, and these.

    Args:
        stats: None at the start.
        shape: of empty statistics.
        blocks: the images of each block, then the entries of each: Ray only resolves arguments at the top level.
    """
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # blocks are only read
    # A copy: objects from Ray's store are read-only.
    stats = NeuronStats(*shape) if stats is None else deepcopy(stats)
    n_blocks = len(blocks) // 2
    for images, entries in zip(blocks[:n_blocks], blocks[n_blocks:], strict=True):
        assert isinstance(images, BlockImages)
        assert isinstance(entries, Entries)
        stats.add(entries, images)
    return None, stats


def written(folder: Folder, *folded: NeuronStats) -> None:
    """The task that writes the tables of a pass; Ray hands over only what is an argument of its own."""
    write_tables(folder, folded)


@lru_cache(maxsize=1)
def _sae(folder: Folder, device: str) -> SAE:
    return load_sae(folder).to(device)


if __name__ == "__main__":
    from .cli import score as command

    command()
