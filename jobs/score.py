"""The scoring stage: one pass over a site and an image set in Ray tasks gives scores and top images of every neuron of
all SAEs there.

A task reads one block of images for all of them; chains of folds, one per range of neurons, add the blocks to a
`NeuronStats` in the order of the images. Blocks are fixed by the format, so the result is bit-identical for any number
of workers, any grouping of SAEs and any order of completion.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import cache
from itertools import chain, islice
from typing import Any

from sae_ray.sae import SAE, load_sae
from sae_ray.scores.scoring import Piece, image_blocks, read_block
from sae_ray.scores.statistics import BlockImages, Entries, NeuronStats, neuron_blocks
from sae_ray.scores.tables import write_tables
from sae_ray.store.activations import PIECE_BYTES, ActivationStore
from sae_ray.store.files import Folder
from sae_ray.store.steps import check_shared
from sae_ray.study.config import ScoreResources
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import ConceptsPlan, ScorePlan

from .cluster import PROCESS_BYTES, RETRIES, at_most_a_node, share
from .progress import Progress, StageBoard
from .stage import at_work, unfinished

BLOCKS_PER_FOLD = 8
"""Every fold copies the statistics once, so several blocks are added at a time, of at most `FOLD_BYTES`."""
FOLD_BYTES = 2**30
GROUP_BYTES = {"cpu": 2 * 2**30, "cuda": 8 * 2**30}
"""Of weights and entries that a task holds at most. SAEs of a site which exceed it share several passes."""
TYPICAL_K = 64
"""Active latents per activation of an SAE without a k, for estimates of memory."""


def run(plan: StudyPlan) -> None:
    """Scores the SAEs of the study and the raw activations that are not scored yet. Failed cells are left out.

    Raises:
        SaeRayError: activations or SAEs are missing, the disk is too full, another driver is at work on the same step.
    """
    run_only(plan, plan.scores)


def run_only(plan: StudyPlan, scores: Sequence[ScorePlan]) -> None:
    """As `run`, for some of the passes."""
    todo = unfinished(scores)
    if todo:
        with at_work(plan.root, "score", todo):
            _score(todo, plan.study.resources.score)


def _score(todo: Sequence[ScorePlan], resources: ScoreResources) -> None:
    import ray

    gpus, slots = share("resources.score", resources)
    device = "cuda" if gpus else "cpu"
    opened = cache(ActivationStore)
    limit = GROUP_BYTES[device] * (min(1, gpus) or 1)
    passes = [Pass(group, opened, device, resources.cpus, gpus) for group in groups(todo, opened, slots, limit)]
    waiting = deque((one, block) for one in passes for block in one.blocks)
    running: dict[ray.ObjectRef, tuple[Pass, int]] = {}
    total = sum(score.activations.images.n_images for score in todo)
    with Progress(f"score {len(todo)} cells", total, "images", steps=[score.step for score in todo]) as progress:
        board = progress.board()
        while waiting or running:
            # Bounded, so that the statistics in flight do not grow with the number of images.
            while waiting and len(running) < 2 * slots:
                one, block = waiting.popleft()
                first, *others = one.submit(block, board)
                running[first] = one, len(one.scores) * sum(len(piece.images) for piece in block)
                running |= dict.fromkeys(others, (one, 0))
            # Each of these is an empty result, so that this process never receives the data themselves.
            finished, _ = ray.wait(list(running), num_returns=1, fetch_local=False)
            ray.get(finished)
            one, images = running.pop(finished[0])
            progress.advance(images)
            if one.n_submitted == len(one.blocks) and all(other is not one for other, _ in running.values()):
                one.write()


def groups(
    todo: Sequence[ScorePlan], opened: Callable[[Folder], ActivationStore], slots: int, limit: float
) -> Iterator[list[ScorePlan]]:
    """The plans that share a pass, and so one read: of the same activations and embeddings, within `limit` bytes.

    A store of fewer blocks than `slots` is read several times, so that no slot idles.
    """
    by_store: dict[tuple[str, str | None], list[ScorePlan]] = {}
    for score in todo:
        embeddings = score.embeddings.step.name if score.embeddings else None
        by_store.setdefault((score.activations.step.name, embeddings), []).append(score)
    for scores in by_store.values():
        store = opened(scores[0].activations.step.folder)
        most = -(-len(scores) * max(1, len(image_blocks(store))) // slots)
        group: list[ScorePlan] = []
        for score in scores:
            if group and (len(group) >= most or sum(held_bytes(one, store) for one in (*group, score)) > limit):
                yield group
                group = []
            group.append(score)
        yield group


def held_bytes(score: ScorePlan, store: ActivationStore) -> int:
    """What a task holds of one SAE, approximately: its weights, and the entries of a block."""
    return score.weight_bytes + entry_bytes(score, store)


def entry_bytes(score: ScorePlan, store: ActivationStore) -> int:
    """Of one block: four numbers of eight bytes for every neuron that is active on an image, approximately."""
    images = largest_block(store)
    tokens = store.n_rows // max(1, store.n_images)
    return 32 * images * min(score.neurons, tokens * active_per_token(score))


def active_per_token(plan: ScorePlan | ConceptsPlan) -> int:
    """Neurons that are active on an activation, about."""
    return plan.sae.grid_cell.cell.k or TYPICAL_K if plan.sae else plan.neurons


@cache
def largest_block(store: ActivationStore) -> int:
    """Images."""
    return max(sum(len(piece.images) for piece in block) for block in image_blocks(store))


class Pass:
    """One pass: its blocks of images, and the folds of their statistics, of every cell in turn."""

    def __init__(
        self,
        scores: Sequence[ScorePlan],
        opened: Callable[[Folder], ActivationStore],
        device: str,
        cpus: float,
        gpus: float,
    ):
        import ray

        self.scores = scores
        self.n_submitted = 0
        self._saes = tuple(score.sae and score.sae.step.folder for score in scores)
        self._activations = opened(scores[0].activations.step.folder)
        embeddings = scores[0].embeddings
        self._embeddings = opened(embeddings.step.folder) if embeddings else None
        self.blocks = image_blocks(self._activations)
        width = embeddings.width if embeddings else 0
        self._shapes = [
            [(len(neurons), width, score.step.config["top_images"]) for neurons in neuron_blocks(score.neurons, width)]
            for score in scores
        ]
        n_ranges = sum(map(len, self._shapes))
        self._device = device
        entries = sum(entry_bytes(score, self._activations) for score in scores)
        self._blocks_per_fold = max(1, min(BLOCKS_PER_FOLD, FOLD_BYTES // max(1, entries)))
        # The vectors in the stored dtype and in float32, and what an encoder makes of them.
        read = 4 * min(PIECE_BYTES, self._activations.n_rows * self._activations.row_bytes)
        # An SAE is there twice while it is loaded. On the way to a GPU they pass through the host's memory one by one.
        largest = max(score.weight_bytes for score in scores)
        weights = largest if gpus else sum(score.weight_bytes for score in scores)
        memory = at_most_a_node(PROCESS_BYTES + weights + max(largest, entries + read), cpus, gpus)
        # Blocks and sums that are lost with their node are made again by Ray, from the first block on if need be.
        task = ray.remote(num_cpus=cpus, max_retries=RETRIES)
        self._block = task(block_entries).options(num_gpus=gpus, memory=memory, num_returns=2 + n_ranges)
        self._fold = task(folded).options(num_returns=2)
        self._write = task(written).options(num_cpus=0)
        self._waiting: list[list] = []
        self._folded: list = [None] * n_ranges
        self._started = time.monotonic()

    def submit(self, block: Sequence[Piece], board: StageBoard) -> list[Any]:
        """Starts one block, in image order, and sometimes folds; returns what to wait for."""
        # The parts alone: a task that opened the stores would list all of them.
        parts = {piece.part for piece in block}
        stores = (self._activations.only(parts), self._embeddings and self._embeddings.only(parts))
        piece = f"{self.scores[0].step.name} {self.n_submitted}"
        step = self.scores[0].step.folder
        results: Any = self._block.remote(step, self._saes, self._device, *stores, block, board, piece)
        done, *entries = results
        self._waiting.append(entries)
        self.n_submitted += 1
        if len(self._waiting) < self._blocks_per_fold and self.n_submitted < len(self.blocks):
            return [done]
        waiting, *columns = zip(*self._waiting, strict=True)
        folds: Any = [
            self._fold.remote(stats, shape, *waiting, *column)
            for stats, shape, column in zip(self._folded, chain(*self._shapes), columns, strict=True)
        ]
        self._folded = [stats for _, stats in folds]
        self._waiting = []
        return [done, *(folded for folded, _ in folds)]

    def write(self) -> None:
        """Writes the tables and finishes the steps."""
        import ray

        ranges = iter(self._folded)
        for score, shapes in zip(self.scores, self._shapes, strict=True):
            ray.get(self._write.remote(score.step.folder, *islice(ranges, len(shapes))))
            counts = {"images": self._activations.n_images, "neurons": score.neurons}
            score.step.finish(time.monotonic() - self._started, counts)
        self._folded = []


def block_entries(
    step: Folder,
    saes: tuple[Folder | None, ...],
    device: str,
    activations: ActivationStore,
    embeddings: ActivationStore | None,
    block: Sequence[Piece],
    board: StageBoard,
    piece: str,
) -> tuple[BlockImages | Entries | None, ...]:
    """The task: nothing, to be waited for; one block of images; its entries for every range of neurons of every SAE.

    `board` is told how many images of `piece` are done, each counted for every SAE.
    """
    import torch

    check_shared(step)
    torch.set_num_threads(1)  # the last bits depend on the number of threads
    images, entries = read_block(
        _loaded(saes, device), activations, embeddings, block, lambda done: board.set(piece, done)
    )
    board.set(piece, 0)  # the driver counts it now
    return None, images, *chain(*entries)


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
    check_shared(folder)
    write_tables(folder, folded)


_saes: dict[tuple, list[SAE | None]] = {}
"""Those of the last block: the next one most likely needs the same."""


def _loaded(folders: tuple[Folder | None, ...], device: str) -> list[SAE | None]:
    if (folders, device) not in _saes:
        _saes.clear()  # before others take their memory
        _saes[folders, device] = [load_sae(folder).to(device) if folder else None for folder in folders]
    return _saes[folders, device]


if __name__ == "__main__":
    from .cli import score as command

    command()
