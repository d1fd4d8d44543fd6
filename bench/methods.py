"""What methods of training cost, and what they bring: `python -m bench.methods ROOT`, ROOT being that of a finished
`studies/methods.toml`.

The step of each method beside that of BatchTopK; the dictionary that weights of dimensions find in noise; and SAEs of
the embedded world, the mean of all seeds.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from bench.record import Table, record
from bench.train import BATCH, D_IN, THREADS, K, activations
from sae_ray.concepts.labelling import image_classes, label_concepts
from sae_ray.sae import SAE, Cell, CellTrainer, TrainingConfig, load_sae
from sae_ray.sae.weighing import Weighing
from sae_ray.scores.tables import ScoreTables
from sae_ray.store.activations import ActivationStore
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import recalled_plan
from sae_ray.study.step_plans import ScorePlan, TrainPlan
from sae_ray.study.summary import CellSummary, summarise

EXPANSION = 16
ROUNDS, STEPS = 3, 2
"""The methods take turns: rounds, the first of which does not count, and steps of each method in a round."""
JUDGE_WIDTH = 768
"""Of the judge's embeddings, as DINOv2 has it."""
SEEDS, FEATURES, RECOVERY_STEPS = 2, 48, 1200
NOISE = torch.tensor([0.03] * 16 + [0.6] * 16)
"""Standard deviation of the noise in each of 32 dimensions."""
PURE = 0.75
LARGEST = 4
"""Coordinates of the largest variance that R² is also given without."""


def main() -> None:
    torch.set_num_threads(THREADS)
    plan = recalled_plan(sys.argv[1])
    steps = Table(
        title=f"One step on a CPU: d_in {D_IN}, d_sae {EXPANSION * D_IN}, batch {BATCH}, float32, {THREADS} threads",
        columns=["method", "ms (median)", "times BatchTopK"],
        rows=step_rows(),
    )
    recovery = Table(
        title=f"{FEATURES} features in 32 dimensions, half of them noisy: mean largest cosine with a decoder row",
        columns=["weights", *(f"seed {seed}" for seed in range(SEEDS)), "mean"],
        rows=recovery_rows(),
    )
    world = Table(
        title="The embedded world, mean over seeds, in brackets half of their range: latents active on "
        f"{plan.study.scoring.min_images} held-out images or more; purity is the share of the commonest shape among "
        f"their 16 top images, and pure are those of {PURE:.0%} or more; R² also without the {LARGEST} coordinates of "
        "the largest variance",
        columns=["SAE", "mean MS", "best 32", "purity", "pure", "L0", "R²", "R², others", "dead", "max γ / min γ"],
        rows=world_rows(plan),
    )
    print(record("methods", [steps, recovery, world]))
    for table in (steps, recovery, world):
        print(table["title"], *table["rows"], sep="\n")


def step_rows() -> list[list[Any]]:
    batches = torch.from_numpy(activations((ROUNDS * STEPS) * BATCH, 0)).split(BATCH)
    methods = dict(trainers())
    taken: dict[str, list[float]] = defaultdict(list)
    for number in range(ROUNDS):
        for name, step in methods.items():
            for batch in batches[number * STEPS : (number + 1) * STEPS]:
                started = time.perf_counter()
                step(batch)
                taken[name].append(1000 * (time.perf_counter() - started))
    ms = {name: median(times[STEPS:]) for name, times in taken.items()}
    return [[name, round(one, 1), f"{one / ms['BatchTopK']:.2f}"] for name, one in ms.items()]


def trainers() -> Iterator[tuple[str, Callable[[torch.Tensor], Any]]]:
    """Every method by its name, and its step."""
    training = TrainingConfig(batch_size=BATCH, steps=1000, learning_rate=1e-3)
    gamma = torch.from_numpy(Weighing.of(np.linspace(1, 2, D_IN), 0.5).gamma)

    def cell(name: str, **given: Any) -> Cell:
        return Cell(name, EXPANSION, training=training, **({"k": K} if "sparsity" not in given else {}), **given)

    yield "BatchTopK", CellTrainer(cell("batch_topk"), D_IN).step
    yield "BatchTopK, weights of dimensions", CellTrainer(cell("batch_topk", weights="ms"), D_IN, gamma=gamma).step
    goal = CellTrainer(cell("batch_topk", monosemanticity=0.1), D_IN)
    judged = torch.randn(BATCH, JUDGE_WIDTH, generator=torch.Generator().manual_seed(0))
    yield "BatchTopK, MonoSemanticity as a goal", partial(goal.step, embeddings=judged)
    yield "Matryoshka BatchTopK", CellTrainer(cell("matryoshka_batch_topk"), D_IN).step
    yield "TopK", CellTrainer(cell("topk"), D_IN).step
    yield "JumpReLU", CellTrainer(cell("jumprelu", sparsity=1e-3), D_IN).step


def recovery_rows() -> list[list[Any]]:
    by = {"uniform": None, "1 / (noise + 0.1)": gamma_by(1 / (NOISE + 0.1)), "noise + 0.1": gamma_by(NOISE + 0.1)}
    rows = []
    for name, gamma in by.items():
        found = [recovered(seed, FEATURES, NOISE, gamma, RECOVERY_STEPS) for seed in range(SEEDS)]
        rows.append([name, *(f"{one:.3f}" for one in (*found, mean(found)))])
    return rows


def gamma_by(significance: torch.Tensor) -> torch.Tensor:
    """γ proportional to it."""
    return torch.from_numpy(Weighing.of(significance.numpy(), 1.0).gamma).float()


def recovered(seed: int, n_features: int, noise: torch.Tensor, gamma: torch.Tensor | None, steps: int) -> float:
    """Trains on mixtures of 3 features of unit norm with noise; the mean over features of their largest cosine with a
    decoder row.

    Args:
        noise: its standard deviation in each dimension.
    """
    generator, d = torch.Generator().manual_seed(1000 + seed), len(noise)
    truth = torch.nn.functional.normalize(torch.randn(n_features, d, generator=generator), dim=1)
    training = TrainingConfig(
        batch_size=256, steps=steps, learning_rate=1e-2, dead_after_samples=10_000, decay_start=steps * 4 // 5,
        threshold_beta=0.9,
    )  # fmt: skip
    weights = "uniform" if gamma is None else "ms"
    cell = Cell("batch_topk", n_features / d, k=3, seed=seed, training=training, weights=weights)
    trainer = CellTrainer(cell, d, gamma=gamma)
    for _ in range(steps):
        chosen = torch.rand(256, n_features, generator=generator).topk(3, dim=1).indices
        amounts = torch.zeros(256, n_features).scatter(1, chosen, 1 + torch.rand(256, 3, generator=generator) / 2)
        x = amounts @ truth + noise * torch.randn(256, d, generator=generator)
        trainer.step(x / x.square().sum(1).mean().sqrt())
    return (truth @ trainer.weights.W_dec.detach().T).amax(1).mean().item()


def world_rows(plan: StudyPlan) -> list[list[Any]]:
    trains = {train.grid_cell.name: train for train in plan.trains}
    scores = {score.name: score for score in plan.scores if score.embeddings}
    classes = image_classes(plan.images["heldout"].labels, ("blank",))
    families: dict[str, list[CellSummary]] = defaultdict(list)
    for row in summarise(plan):
        families[row.grid_cell.recipe if row.grid_cell else row.name].append(row)
    rows = []
    for recipe, seeds in families.items():
        of = [seed for seed in seeds if seed.grid_cell is not None]
        others = [r2_of_others(trains[one.name], plan) for one in of]
        purities = [purities_of(scores[one.name], classes, plan.study.scoring.min_images) for one in seeds]
        ratios = [trains[one.name].step.record()["counts"].get("gamma_ratio") for one in of]
        rows.append(
            [
                recipe,
                *(spread([getattr(one, name) for one in seeds], 3) for name in ("mean_ms", "top_ms")),
                spread([float(np.mean(found)) for found in purities], 3),
                spread([sum(purity >= PURE for purity in found) for found in purities], 0),
                *(spread([getattr(one, name) for one in of], digits) for name, digits in (("l0", 1), ("r2", 3))),
                spread(others, 3),
                spread([one.dead_fraction for one in of], 2),
                f"{ratios[0]:.3g}" if ratios and ratios[0] else "",
            ]
        )
    return rows


def purities_of(score: ScorePlan, classes: Sequence[str | None], min_images: int) -> list[float]:
    """Of the latents that are scored, the share of the commonest shape among the top images."""
    tables = ScoreTables(score.step.folder)
    found = label_concepts(tables.scores, tables.top_images.image, classes, tables.scores.max_token)
    scored = (tables.scores.n_active >= min_images) & ~np.isnan(tables.scores.ms)
    return [one.purity for one in found if scored[one.latent]]


def r2_of_others(train: TrainPlan, plan: StudyPlan) -> float:
    """R² on held-out activations without the coordinates of the largest variance."""
    [one] = [one for one in plan.evaluations if one.sae is train]
    store, sae = ActivationStore(one.activations.step.folder), load_sae(train.step.folder)
    x = torch.from_numpy(np.concatenate([store.read(number)[2] for number in store.parts])).float()
    error, variance = errors(sae, x), x.double().var(0, correction=0)
    others = variance.argsort()[:-LARGEST]
    return 1 - (error[others].sum() / variance[others].sum()).item()


def errors(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """Mean squared error of every coordinate."""
    return (x - sae.decode(sae.encode_sparse(x), x)).double().square().mean(0)


def spread(values: list[Any], digits: int) -> str:
    """Mean, and half of the range."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    text = f"{mean(known):,.{digits}f}"
    return f"{text} ({(max(known) - min(known)) / 2:.{digits}f})" if len(known) > 1 else text


if __name__ == "__main__":
    main()
