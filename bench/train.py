"""The BatchTopK training step on a CPU beside that of `dictionary-learning` and SAELens, and the overhead of a grid.

`python -m bench.train` writes `bench/results/train.json`. Every contestant runs in a process and an environment of its
own on the same data from the same initial weights; they take turns in rounds, so that what else the machine does hits
all of them. What they learned is compared before their times are.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from bench import environments
from bench.contestants import ours
from bench.contestants.worker import PARTS, Settings
from bench.record import Table, record
from sae_ray.sae import BundleJob, Cell, CellJob, CellTrainer, TrainingConfig, train_cells
from sae_ray.sae.training import geometric_median
from sae_ray.store.activations import ActivationStore, finish_store, write_part
from sae_ray.store.casting import stored_rows
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step
from sae_ray.store.stream import TrainingStream

ROOT = Path(__file__).parent.parent
D_IN, K, BATCH, THREADS = 512, 20, 1024, 2
# Width -> training steps before fidelity is compared, in rounds of as many steps.
ROUNDS = {8192: (6, 4), 32768: (5, 3)}
REQUIRED = {8192: 5.0, 32768: 6.0}
AUXK_ROUNDS = (3, 3)
R2_TOLERANCE, L0_TOLERANCE = 0.02, 0.1
"""How far a peer's R² may lie from ours, and its L0 relative to ours."""
# SAELens averages the threshold from 0 on, the others from its first value: after a dozen steps that must not show.
THRESHOLD_BETA = 0.5
GRID_STEPS = 16
STEADY = slice(3, -1)
"""Of them: the first allocate, the last comes with a checkpoint."""
NAMES = {
    "ours.BatchTopK": "sae-ray",
    "dictionary_learning.BatchTopK": "dictionary-learning",
    "sae_lens.BatchTopK": "SAELens",
    "floor.Product": "the encoder's product alone",
    "floor.TorchProduct": "the same product by torch.addmm",
    "floor.FusedAdam": "fused Adam alone",
}
PEERS = ("dictionary_learning.BatchTopK", "sae_lens.BatchTopK")


def main() -> None:
    torch.set_num_threads(THREADS)
    pythons = {peer: environments.python_of(peer) for peer in (name.partition(".")[0] for name in PEERS)}
    steps, parts, auxk, differences, slow = [], [], [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        data, heldout = activations(64 * BATCH, 0), activations(4 * BATCH, 1)
        for d_sae, rounds in ROUNDS.items():
            folder = prepare(Path(scratch), data, heldout, d_sae, rounds, auxk=False)
            times, fidelity = race(folder, NAMES, pythons, *rounds)
            steps += step_rows(d_sae, times, fidelity)
            differences += unequal(d_sae, fidelity)
            slow += too_slow(d_sae, times)
            parts += part_rows(folder, sum(rounds))
            folder = prepare(Path(scratch), data, heldout, d_sae, AUXK_ROUNDS, auxk=True)
            dead_times, fidelity = race(folder, list(NAMES)[:3], pythons, *AUXK_ROUNDS)
            differences += unequal(d_sae, fidelity)
            auxk += [
                [d_sae, NAMES[name], round(median(times[name]), 1), *shown(name, dead_times, fidelity)]
                for name in dead_times
            ]
    if differences:
        sys.exit("\n".join(differences))
    grid, grid_ratio = grid_rows()
    tables = [
        Table(
            title=f"One BatchTopK step on a CPU: d_in {D_IN}, batch {BATCH}, k {K}, float32, {THREADS} threads, "
            "no latent dead",
            columns=["d_sae", "step of", "ms (median)", "ms (fastest)", "times ours", "R²", "L0"],
            rows=steps,
        ),
        Table(
            title="Where the time of our step goes",
            columns=["d_sae", "part", "ms (median)", "share"],
            rows=parts,
        ),
        Table(
            title="The same step with AuxK: half of the latents dead",
            columns=["d_sae", "step of", "ms, none dead", "ms, half dead", "times ours", "R²", "L0"],
            rows=auxk,
        ),
        Table(
            title=f"A grid in one process: 12 cells, d_in {D_IN}, batch {BATCH}, one read of the data",
            columns=["what", "ms per step"],
            rows=grid,
        ),
    ]
    facts = {
        "peers": {peer: environments.PEERS[peer] for peer in pythons},
        "tolerance": {"r2": R2_TOLERANCE, "l0": L0_TOLERANCE},
        "required": {str(d_sae): factor for d_sae, factor in REQUIRED.items()},
        "grid_ratio": round(grid_ratio, 3),
    }
    print(record("train", tables, facts))
    for table in tables:
        print(table["title"], *table["rows"], sep="\n")
    if grid_ratio > 1.15:
        slow.append(f"the grid takes {grid_ratio:.2f} times the sum of its cells, more than 1.15")
    if slow:
        sys.exit("\n".join(slow))


def activations(rows: int, seed: int) -> np.ndarray:
    """Sparse mixtures of the same 4096 directions plus noise, float32, of mean squared norm 1; a few are common."""
    directions = np.random.default_rng(7).standard_normal((4096, D_IN), dtype=np.float32) / np.sqrt(D_IN)
    rng = np.random.default_rng([8, seed])
    chances = 1 / np.arange(1, 4097) ** 0.7
    cumulative = np.cumsum(chances / chances.sum())
    chosen = np.searchsorted(cumulative, rng.random((rows, K))).clip(max=4095)
    amounts = rng.exponential(size=(rows, K)).astype(np.float32)
    mixed = np.zeros((rows, D_IN), np.float32)
    for column in range(K):
        mixed += amounts[:, column, None] * directions[chosen[:, column]]
    mixed += 0.2 * rng.standard_normal(mixed.shape, dtype=np.float32) * np.sqrt(K / D_IN)
    return mixed / np.sqrt(np.square(mixed).sum(1).mean())


def prepare(
    scratch: Path, data: np.ndarray, heldout: np.ndarray, d_sae: int, rounds: tuple[int, int], auxk: bool
) -> Path:
    """Writes what the contestants read (`bench/contestants/worker.py`)."""
    folder = scratch / f"{d_sae}-{auxk}"
    folder.mkdir()
    W_dec = np.random.default_rng(9).standard_normal((d_sae, D_IN), dtype=np.float32)
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    # Smaller than the decoder's transpose: the first reconstructions then do not overshoot.
    W_enc_t = 0.3 * W_dec
    if auxk:
        W_enc_t[-(d_sae // 2) :] *= 0.1  # their pre-activations are never among the largest
    parts = {
        "data": data,
        "heldout": heldout,
        "W_enc_t": W_enc_t,
        "W_dec": W_dec,
        "b_dec": geometric_median(torch.from_numpy(data[:BATCH])).numpy(),
    }
    for name, value in parts.items():
        np.save(folder / f"{name}.npy", value)
    settings = Settings(D_IN, d_sae, K, BATCH, rounds[0] * rounds[1], 3e-3, THRESHOLD_BETA, auxk, THREADS)
    (folder / "settings.json").write_text(json.dumps(settings._asdict()))
    return folder


def race(
    folder: Path, names: Sequence[str] | dict[str, str], pythons: dict[str, Path], n_rounds: int, n_steps: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Milliseconds of the steps after the first round, and what was learned."""
    times: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(worker(name, folder, pythons)) for name in names}
        for number in range(n_rounds):
            for name, ask in workers.items():
                taken = ask({"do": "step", "n": n_steps})
                if number > 0:
                    times[name] += taken
        fidelity = {name: ask({"do": "score"}) for name, ask in workers.items() if not name.startswith("floor")}
    return times, fidelity


@contextmanager
def worker(name: str, folder: Path, pythons: dict[str, Path]) -> Iterator[Any]:
    """A contestant's process, as a function that sends a command and returns its answer."""
    python = pythons.get(name.partition(".")[0], sys.executable)
    process = subprocess.Popen(
        [python, "-m", "bench.contestants.worker", name, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def answer() -> Any:
        line = answers.readline()
        if not line:
            raise RuntimeError(f"{name} ended with exit code {process.wait()}; what it said is above")
        return json.loads(line)

    def ask(command: dict[str, Any]) -> Any:
        requests.write(json.dumps(command) + "\n")
        requests.flush()
        return answer()

    try:
        answer()
        yield ask
    finally:
        requests.close()
        process.wait()


def step_rows(d_sae: int, times: dict[str, list[float]], fidelity: dict[str, dict[str, float]]) -> list[list[Any]]:
    rows = []
    for name, taken in times.items():
        ms, *others = shown(name, times, fidelity)
        rows.append([d_sae, NAMES[name], ms, round(min(taken), 1), *others])
    return rows


def shown(name: str, times: dict[str, list[float]], fidelity: dict[str, dict[str, float]]) -> list[Any]:
    """Milliseconds, times ours, R² and L0 of a contestant."""
    ms, ours, learned = median(times[name]), median(times["ours.BatchTopK"]), fidelity.get(name)
    return [
        round(ms, 1),
        f"{ms / ours:.2f}",
        *([f"{learned['r2']:.3f}", f"{learned['l0']:.1f}"] if learned else ["", ""]),
    ]


def part_rows(folder: Path, n_steps: int) -> list[list[Any]]:
    """Our step alone, in this process, with a clock around its parts."""
    settings = Settings(**json.loads((folder / "settings.json").read_text()))
    data, _, *start = (torch.from_numpy(np.load(folder / f"{part}.npy")) for part in PARTS)
    contestant = ours.BatchTopK(settings, *start)
    trainer, taken = contestant.trainer, defaultdict(list)

    def clock(owner: object, method: str, part: str) -> None:
        plain = getattr(owner, method)

        def clocked(*args: Any) -> Any:
            started = time.perf_counter()
            result = plain(*args)
            taken[part].append(1000 * (time.perf_counter() - started))
            return result

        setattr(owner, method, clocked)

    clock(trainer.architecture, "pre_activations", "the encoder's product")
    clock(trainer.architecture, "select", "selection")
    clock(trainer, "_gradients", "gradients, projection, clipping")
    clock(trainer.optimizer, "step", "Adam and renormalisation")
    clock(trainer, "step", "whole step")
    for number in range(n_steps):
        contestant.step(data[number * settings.batch : (number + 1) * settings.batch])
    ms = {part: median(times[2:]) for part, times in taken.items()}
    whole = ms.pop("whole step")
    ms["decoding, loss, counters"] = whole - sum(ms.values())
    return [[settings.d_sae, part, round(one, 1), f"{one / whole:.0%}"] for part, one in ms.items()]


def unequal(d_sae: int, fidelity: dict[str, dict[str, float]]) -> list[str]:
    """Peers that learned something else: their times say nothing."""
    ours = fidelity["ours.BatchTopK"]
    return [
        f"d_sae {d_sae}: {NAMES[peer]} learned {theirs}, sae-ray {ours}"
        for peer, theirs in fidelity.items()
        if abs(theirs["r2"] - ours["r2"]) > R2_TOLERANCE or abs(theirs["l0"] / ours["l0"] - 1) > L0_TOLERANCE
    ]


def too_slow(d_sae: int, times: dict[str, list[float]]) -> list[str]:
    factors = {peer: median(times[peer]) / median(times["ours.BatchTopK"]) for peer in PEERS}
    return [
        f"d_sae {d_sae}: {factor:.2f} times as fast as {NAMES[peer]}, not {REQUIRED[d_sae]}"
        for peer, factor in factors.items()
        if factor < REQUIRED[d_sae]
    ]


def grid_rows() -> tuple[list[list[Any]], float]:
    """The steps of a bundle of 12 cells; after each of them one cell trains by itself."""
    training = TrainingConfig(batch_size=BATCH, steps=GRID_STEPS, warmup_steps=0, threshold_start_step=1)
    cells = [
        Cell(architecture, expansion, k=k, training=training)
        for architecture in ("batch_topk", "matryoshka_batch_topk")
        for expansion in (1, 4, 16)
        for k in (5, K)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        root = Folder(scratch)
        n_rows = 32 * BATCH
        step = Step(root, "extract", "activations", {"store_dtype": "float16", "images_per_part": 8 * BATCH})
        parts = []
        for number, part in enumerate(np.split(activations(n_rows, 0), n_rows // (8 * BATCH))):
            index = np.arange(len(part)) + number * len(part)
            rows = stored_rows(index, np.zeros(len(part)), part, "float16")
            parts.append(write_part(step.folder, number, rows, []))
        finish_store(step, parts, D_IN, 0.0)
        bundle = BundleJob(
            activations=step.folder,
            cells=tuple(CellJob(Step(root, "train", f"cell-{number}", {}), cell) for number, cell in enumerate(cells)),
            stream_seed=0,
            shuffle_rows=16 * BATCH,
            checkpoint_every=GRID_STEPS + 1,
        )
        store = ActivationStore(step.folder)
        stream = TrainingStream(store, BATCH, 0, bundle.shuffle_rows).batches()
        scale = store.root_mean_square_norm
        batches = [next(stream).float() / scale for _ in range(GRID_STEPS)]

        together, alone = [], []
        since = time.perf_counter()

        def after_step(done: int, _: object) -> bool:
            """Takes the time of the bundle's step, then all steps of one cell."""
            nonlocal since
            together.append(1000 * (time.perf_counter() - since))
            if len(alone) < len(cells):
                trainer = CellTrainer(cells[len(alone)], D_IN)
                taken = []
                for batch in batches:
                    started = time.perf_counter()
                    trainer.step(batch)
                    taken.append(1000 * (time.perf_counter() - started))
                alone.append(mean(taken[STEADY]))
            since = time.perf_counter()
            return False

        train_cells(bundle, after_step=after_step)
    joint, pure = mean(together[STEADY]), sum(alone)
    rows = [["each cell alone, summed", round(pure, 1)], ["all cells in the training job", round(joint, 1)]]
    return [*rows, ["ratio", f"{joint / pure:.2f}"]], joint / pure


if __name__ == "__main__":
    main()
