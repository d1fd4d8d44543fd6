"""What the paper's study takes: hours by the rates in `bench/results`, storage by the plan's own figures.

`python -m bench.cost` writes the tables of docs/cluster.md. Nothing is run: ImageNet and the models are only described.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.record import RESULTS
from bench.tables import table
from sae_ray.encoders.info import EncoderInfo
from sae_ray.steering.info import LlavaInfo
from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import AnyPlan, ScorePlan, TrainPlan
from sae_ray.study.survey import Survey, SurveyedImages, SurveyedModels

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "cluster.md"
PLACE = re.compile(r"<!-- costs -->\n.*?<!-- /costs -->", re.DOTALL)

IMAGES = {"train": 1_281_167, "heldout": 50_000}
MEASURED_WIDTHS = (8192, 16_384, 65_536)
"""Latents of the measured training steps. Below the first the GPU waits for Python, so a step takes no less."""
GPUS = 8


def vit(model: str, layers: int, width: int, projection: int | None, tokens: int, pixels: int) -> EncoderInfo:
    """A vision transformer, as its configuration on the hub describes it."""
    has_text = projection is not None
    return EncoderInfo(model, None, "", layers, width, projection, width, True, 0, tokens, (pixels, pixels), has_text)


CLIP = vit("openai/clip-vit-large-patch14-336", 24, 1024, 768, 577, 336)
DINO = vit("facebook/dinov2-base", 12, 768, None, 257, 224)
SCORER = vit("openai/clip-vit-base-patch32", 12, 768, 512, 50, 224)
LLAVA = LlavaInfo(CLIP, layer=22, n_image_tokens=576)


def paper() -> StudyPlan:
    """The plan of studies/pach2025.toml on ImageNet."""
    images = {name: SurveyedImages(n_images, name, name) for name, n_images in IMAGES.items()}
    study = Study.load(REPOSITORY / "studies" / "pach2025.toml")
    return StudyPlan(study, Folder("/nowhere"), Survey(images, SurveyedModels(CLIP, DINO, SCORER, LLAVA)))


def measured(name: str, title: str, column: str, *row: Any) -> float:
    """A figure of `bench/results/<name>.json`: of the table whose title begins so, of the row whose cells begin so.

    Raises LookupError when the results have none or several.
    """
    tables = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["tables"]
    found = [
        line[one["columns"].index(column)]
        for one in tables
        if one["title"].startswith(title)
        for line in one["rows"]
        if line[: len(row)] == list(row)
    ]
    if len(found) != 1:
        raise LookupError(f"{name}.json has {len(found)} figures for {title!r}, {column!r}, {row}")
    return float(found[0])


def step_s(train: TrainPlan, column: str) -> float:
    """Seconds of a step of the narrowest measured SAE that is as wide, in the precision of the study."""
    width = min(width for width in MEASURED_WIDTHS if width >= train.d_sae)
    cell = train.grid_cell.cell
    name = f"{cell.architecture}, {cell.training.dtype}"
    return measured("gpu_training", "Our training step", column, name, width) / 1000


def training_s(plan: StudyPlan, column: str) -> list[float]:
    """Seconds of every SAE."""
    return [train.grid_cell.cell.training.steps * step_s(train, column) for train in plan.trains]


def scoring_s(passes: Iterable[ScorePlan]) -> float:
    """Seconds of the encoders' products, of reading each site once, and of adding the codes up."""
    passes = list(passes)
    product_ms = measured("gpu_scoring", "Codes of 512 images", "ms", "encode_sparse in chunks of 16,156 rows")
    per_entry = product_ms / 1000 / (512 * 577 * 65_536)
    window = "larger than shuffle_rows: one epoch, each window read when it is due"
    rows_per_s = measured("gpu_scoring", "TrainingStream", "rows/s", window)
    added = measured("scoring", "Score, statistics and 16 top images", "seconds", "ours, from sparse codes") / 50_000
    return (
        sum(one.rows * one.neurons * per_entry for one in passes if one.sae)
        + sum({one.activations.step.name: one.rows for one in passes}.values()) / rows_per_s
        + sum(one.activations.images.n_images * added for one in passes)
    )


def steering_s(plan: StudyPlan) -> float:
    """Seconds of the LLaVA's answers, 32 at a time."""
    assert plan.study.steering is not None
    title = "Answers of 17 tokens by Llava.generate"
    first_ms = measured("gpu_serving", title, "ms to the first token", 32)
    further_ms = measured("gpu_serving", title, "ms per further token", 32)
    answer_ms = (first_ms + (plan.study.steering.max_new_tokens - 1) * further_ms) / 32
    return sum(one.rows for one in plan.steerings) * answer_ms / 1000


def hours(plan: StudyPlan) -> list[list[str]]:
    """Per stage: what its rate is, hours on one GPU, and on `GPUS` of them at best."""
    sites = "CLS token of 4 blocks, and projection"
    encoded = measured("gpu_extraction", "Activations of a part", "images/s", sites, 256)
    decoded = measured("gpu_decoding", "JPEGs of 500 × 375", 'images/s, pixels = "exact"', 16)
    others = {one.step.name: one.images.n_images for one in plan.extracts if one.field != "encoder.model"}
    extracting = sum(IMAGES.values()) / min(encoded, decoded) + sum(others.values()) / decoded
    alive, dead = (training_s(plan, column) for column in ("ms", "ms, half of the latents dead"))
    scoring, steering = scoring_s(plan.scores), steering_s(plan)
    one_gpu = [extracting, sum(alive), sum(dead), scoring, steering]
    many_gpus = [extracting / GPUS, max(sum(alive) / GPUS, max(alive)), max(sum(dead) / GPUS, max(dead))]
    many_gpus += [scoring / GPUS, steering / GPUS]
    labels = [
        ("extract", f"{encoded:,.0f} images/s; judge and scorer as fast as 16 cores decode, {decoded:,.0f} images/s"),
        ("train", f"{len(plan.trains)} SAEs in float32, no latent dead"),
        ("", "or half of the latents dead"),
        ("score", f"{len(plan.scores)} passes; statistics on two cores"),
        ("steering", f"{sum(one.rows for one in plan.steerings):,} answers of a LLaVA of 7 billion weights"),
    ]
    rows = [[*label, *map(hour, times)] for label, *times in zip(labels, one_gpu, many_gpus, strict=True)]
    return [*rows, ["all", "", *(f"{hour(sum(t) - t[2])} to {hour(sum(t) - t[1])}" for t in (one_gpu, many_gpus))]]


def hour(seconds: float) -> str:
    return f"{seconds / 3600:.1f}"


def storage(plan: StudyPlan) -> list[list[Any]]:
    """Per stage: steps, gigabytes while it works and afterwards, and how many parts there are."""
    stages: dict[str, list[AnyPlan]] = {}
    for one in plan.plans:
        stages.setdefault(one.step.stage, []).append(one)
    parts = sum(-(-one.images.n_images // one.step.config["images_per_part"]) for one in plan.extracts)
    rows = []
    for stage, plans in stages.items():
        at_most = sum(one.bytes for one in plans)
        kept = sum(one.weight_bytes if isinstance(one, TrainPlan) else one.bytes for one in plans)
        rows.append([stage, len(plans), at_most / 1e9, kept / 1e9, parts if stage == "extract" else None])
    rows.append(["all", *(sum(row[column] for row in rows) for column in (1, 2, 3)), None])
    return [[stage, steps, f"{most:,.1f}", f"{kept:,.1f}", parts] for stage, steps, most, kept, parts in rows]


def with_costs(page: str) -> str:
    """The page with what lies between `<!-- costs -->` and `<!-- /costs -->` made anew."""
    plan = paper()
    tables = [
        table(["stage", "rate", "hours on 1 GPU", f"hours on {GPUS} GPUs at best"], hours(plan)),
        table(["stage", "steps", "GB at most", "GB kept", "parts"], storage(plan)),
    ]
    made = "\n\n".join(["<!-- costs -->", *tables, "<!-- /costs -->"])
    return PLACE.sub(lambda _: made, page)


if __name__ == "__main__":
    PAGE.write_text(with_costs(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
