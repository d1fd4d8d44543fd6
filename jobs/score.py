"""The scoring stage: one pass over (SAE, image set) in Ray tasks gives scores and top images of every neuron.

A task scores one block of images and returns one `NeuronStats` per block of neurons; chains of merges fold them in the
order of the images. Blocks are fixed by the format, so the result is the same to the bit for any number of workers and
any order of completion.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pyarrow as pa

from sae_ray.activations import ActivationStore
from sae_ray.errors import SaeRayError
from sae_ray.files import Folder
from sae_ray.plan import ScorePlan, StudyPlan
from sae_ray.sae import SAE, load_sae
from sae_ray.scores import histogram_table, image_blocks, score_block, score_table, top_images_table
from sae_ray.statistics import NeuronStats, neuron_blocks
from sae_ray.steps import hold
from sae_ray.study import ScoreResources

from .cluster import connect, n_cpus, n_gpus, user_error
from .disk import check_disk
from .progress import Progress


def run(plan: StudyPlan) -> None:
    """Scores every SAE of the study, and the raw activations, where that is not done yet. Failed cells are left out.

    Raises:
        SaeRayError: activations or SAEs are missing, the disk is too full, another driver is at work on the same step.
    """
    todo = [score for score in plan.scores if not score.step.finished and not (score.sae and score.sae.step.failure)]
    if not todo:
        return
    for step in (step for score in todo for step in score.inputs):
        if not step.finished:
            raise SaeRayError(f"{step.label} is not there yet; run the {step.stage} stage first")
    check_disk(plan.root, "score", sum(score.bytes for score in todo))
    connect()
    with hold([score.step for score in todo]):
        try:
            resources = plan.study.resources.score
            _score([Pass(score, resources) for score in todo], resources)
        except Exception as error:
            known = user_error(error)
            if known is not None:
                raise known from None
            raise


def _score(passes: Sequence[Pass], resources: ScoreResources) -> None:
    import ray

    slots = n_gpus() / resources.gpus if resources.gpus else n_cpus() / max(resources.cpus, 1)
    at_once = 2 * (resources.workers or max(1, int(slots)))
    waiting = deque((one, parts) for one in passes for parts in one.blocks)
    running: dict[ray.ObjectRef, Pass] = {}
    with Progress(f"score {len(passes)} passes", len(waiting), "blocks") as progress:
        while waiting or running:
            # Bounded, so that the statistics in flight do not grow with the number of images.
            while waiting and len(running) < at_once:
                one, parts = waiting.popleft()
                running[one.submit(parts)] = one
            finished, _ = ray.wait(list(running), num_returns=1)
            ray.get(finished)
            one = running.pop(finished[0])
            progress.advance(1)
            if one.n_submitted == len(one.blocks) and one not in running.values():
                one.write()


class Pass:
    """One pass: its blocks of images, and the fold of their statistics."""

    def __init__(self, score: ScorePlan, resources: ScoreResources):
        import ray

        self.step = score.step
        self.n_submitted = 0
        self._sae = score.sae.step.folder if score.sae else None
        self._activations = score.activations.step.folder
        self._embeddings = score.embeddings.step.folder if score.embeddings else None
        store = ActivationStore(self._activations)
        self.blocks = image_blocks(store)
        n_neuron_blocks = len(list(neuron_blocks(score.neurons, score.embeddings.width if score.embeddings else 0)))
        self._counts = {"images": store.n_images, "neurons": score.neurons}
        options = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "num_returns": n_neuron_blocks}
        self._block = ray.remote(**options)(block_statistics)
        self._merge = ray.remote(num_cpus=0)(NeuronStats.merge)
        self._tables = ray.remote(num_cpus=0)(tables)
        self._folded: list = []
        self._started = time.monotonic()

    def submit(self, parts: range) -> Any:
        """Starts one block, in image order, and appends it to the fold; returns what to wait for."""
        n_top = self.step.config["top_images"]
        result: Any = self._block.remote(self._sae, self._activations, self._embeddings, parts, n_top)
        blocks = result if isinstance(result, list) else [result]
        if self._folded:
            self._folded = [self._merge.remote(*pair) for pair in zip(self._folded, blocks, strict=True)]
        else:
            self._folded = blocks
        self.n_submitted += 1
        return self._folded[0]

    def write(self) -> None:
        """Writes the tables and finishes the step."""
        import ray

        found = ray.get(self._tables.remote(*self._folded))
        self._folded = []
        for name, table in found.items():
            self.step.folder.write_parquet(f"{name}.parquet", table)
        self.step.finish(time.monotonic() - self._started, self._counts)


def block_statistics(
    sae: Folder | None, activations: Folder, embeddings: Folder | None, parts: range, n_top: int
) -> list[NeuronStats] | NeuronStats:
    """The task: statistics of one block of images, one result per block of neurons."""
    import torch

    torch.set_num_threads(1)  # the number of threads would show in the last bits
    judged = ActivationStore(embeddings) if embeddings else None
    found = score_block(_sae(sae) if sae else None, ActivationStore(activations), judged, parts, n_top)
    return found if len(found) > 1 else found[0]


def tables(*folded: NeuronStats) -> dict[str, pa.Table]:
    """The task that turns the statistics of all images into what is written."""
    return {
        "scores": score_table(folded),
        "top_images": top_images_table(folded),
        "histogram": histogram_table(folded),
    }


@lru_cache(maxsize=1)
def _sae(folder: Folder) -> SAE:
    import torch

    return load_sae(folder).to("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    from .cli import score as command

    command()
