"""A whole small study, finished without Ray: real images, random encoders, random SAEs, real statistics."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from sae_ray.concepts.measuring import measure
from sae_ray.concepts.naming_by_answers import plain
from sae_ray.concepts.word_names import Texts
from sae_ray.encoders import load_encoder, load_preprocess
from sae_ray.encoders.part import encode_part
from sae_ray.images.part import Preparation, decode_part
from sae_ray.report import write_report
from sae_ray.report.neurons import shown_cells
from sae_ray.report.pictures import Shown, finish_pictures, make_sprite, pictures_job
from sae_ray.sae import SAE, load_sae, save_sae
from sae_ray.sae.history import HISTORY_FILE, History
from sae_ray.sae.training import StepMetrics
from sae_ray.scores.scoring import score_store
from sae_ray.scores.tables import write_tables
from sae_ray.steering.evaluation import ANSWERS_SCHEMA, CONCEPTS_SCHEMA, rates
from sae_ray.steering.latent_names import LATENT_NAMES_SCHEMA, NAMES
from sae_ray.steering.protocol import WHITE
from sae_ray.store.activations import ActivationStore, finish_store, write_part, write_rejects
from sae_ray.store.files import Folder
from sae_ray.study.concepts import asked
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import (
    ConceptsPlan,
    EvaluatePlan,
    ExtractPlan,
    NamingPlan,
    PicturesPlan,
    ScorePlan,
    SteeringPlan,
    TrainPlan,
)

LABELS = ("red", "green", "<b>&blue\"'")
COLOURS = ((220, 40, 40), (40, 180, 60), (50, 70, 220))
DEAD = 0
"""A latent that never fires, in every SAE."""
HISTORY_STEPS = 600
STEERED = (3, 5, 8, 13, 21)
"""Latents that the answers are about, the first of each label the best one."""


def draw_images(folder: Path, per_label: int, seed: int) -> None:
    """Coloured squares on noise, in one folder per label, and one file that is no image."""
    rng = np.random.default_rng(seed)
    for label, colour in zip(LABELS, COLOURS, strict=True):
        (folder / label).mkdir(parents=True)
        for number in range(per_label):
            pixels = rng.integers(0, 90, (28, 28, 3), dtype=np.uint8)
            row, column = rng.integers(0, 16, 2)
            pixels[row : row + 12, column : column + 12] = colour
            Image.fromarray(pixels).save(folder / label / f"{number:03}.png")
    (folder / LABELS[0] / "broken.png").write_bytes(b"no image")


def write_taxonomy(file: Path) -> None:
    """The first two labels have a rank in common."""
    with file.open("w", newline="") as opened:
        rows = csv.writer(opened)
        rows.writerow(["label_name", "path"])
        rows.writerows(
            [label, f"colour > {'warm' if place < 2 else 'cold'} > {place}"] for place, label in enumerate(LABELS)
        )


def plan_study(directory: Path, llava: str, clip: str, judge: str, **overrides) -> StudyPlan:
    """The plan of the study; draws its images where they are missing."""
    if not (directory / "train").exists():
        draw_images(directory / "train", per_label=20, seed=0)
        draw_images(directory / "heldout", per_label=14, seed=1)
        write_taxonomy(directory / "taxonomy.csv")
    values = {
        "name": "small <study>",
        "images": {
            "train": {"path": str(directory / "train")},
            "heldout": {"path": str(directory / "heldout")},
            "max_bad_fraction": 0.1,
        },
        "encoder": {"model": llava},
        "judge": {"model": judge, "point": "projection"},
        "grid": [
            {"sites": ["layer1:all"], "architectures": ["matryoshka_batch_topk"], "expansions": [2, 4], "k": [4]},
            {"sites": ["pooled"], "expansions": [2], "k": [2, 4]},
            {"sites": ["layer0:cls"], "architectures": ["topk"], "expansions": [2], "k": [4]},
        ],
        "scoring": {"pictures": "train"},
        "concepts": {"taxonomy": str(directory / "taxonomy.csv")},
        "steering": {"llava": llava, "scorer": clip, "strength": 4.0, "unit": "max", "other_prompts": ["What colour?"]},
        "naming": {},
        "extraction": {"images_per_part": 16},
    }
    return StudyPlan(Study.from_dict(values, overrides), Folder(directory / "root"))


def finish_study(plan: StudyPlan) -> StudyPlan:
    """Does every step that is not done."""
    for images in plan.images.values():
        for step, name in ((images.step, "manifest"), (images.labels_step, "labels")):
            step.folder.write_parquet(f"{name}.parquet", getattr(images, name))
            step.finish(0.1, {"images": images.n_images})
    for extract in plan.extracts:
        finish_extract(extract)
    for train in plan.trains:
        finish_train(train)
    for one in plan.evaluations:
        finish_evaluation(one)
    for score in plan.scores:
        finish_score(score)
    for concepts in plan.concepts:
        finish_concepts(plan, concepts)
    for steering in plan.steerings:
        finish_steering(steering)
    for naming in plan.namings:
        finish_naming(naming)
    finish_pictures_of(plan, plan.pictures)
    return plan


def finish_pictures_of(plan: StudyPlan, pictures: PicturesPlan) -> None:
    """By the very functions of the stage."""
    shown = Shown(plan, pictures)
    job, sprites = pictures_job(plan, pictures, shown, shown.heat_cells)
    for sprite in sprites:
        make_sprite(job, sprite)
    finish_pictures(pictures, shown.album, 1.0)


def make_report(plan: StudyPlan) -> bool:
    """As `sae-ray report` does, without Ray."""
    cells = shown_cells(plan)
    if cells and not (pictures := plan.pictures_of(cells)).step.finished:
        finish_pictures_of(plan, pictures)
    return write_report(plan)


def finish_extract(extract: ExtractPlan) -> None:
    """By the very functions of the stage."""
    encoder = load_encoder(extract.encoder.model)
    preparations = [Preparation(load_preprocess(extract.encoder.model))]
    ids, folder = extract.images.manifest["image_id"].to_pylist(), extract.step.folder
    per_part = extract.step.config["images_per_part"]
    parts = []
    for number, start in enumerate(range(0, len(ids), per_part)):
        part = ids[start : start + per_part]
        decoded = decode_part(extract.images.folder, part, preparations)
        kept = [part[place] for place in decoded.accepted]
        sites = [(extract.site, extract.step.config["store_dtype"])]
        [rows] = encode_part(encoder, sites, decoded.pixels[0], start + decoded.accepted, kept, 0, batch_size=64)
        parts.append(write_part(folder, number, rows, decoded.rejects))
    write_rejects(folder, parts)
    finish_store(extract.step, parts, extract.width, 61.5)


def finish_train(train: TrainPlan) -> None:
    """Saves a random SAE whose latents fire on a fifth of the training rows, but for the dead one."""
    store = ActivationStore(train.activations.step.folder)
    x = torch.from_numpy(np.concatenate([store.read(number)[2] for number in range(len(store.parts))])).float()
    cell = train.grid_cell.cell
    generator = torch.Generator().manual_seed(cell.seed)
    W_enc = torch.nn.functional.normalize(torch.randn(store.d, train.d_sae, generator=generator), dim=0)
    b_enc = torch.zeros(train.d_sae)
    b_enc[DEAD] = -1e6
    threshold = None if cell.architecture == "topk" else ((x - x.mean(0)) @ W_enc).quantile(0.8, 0).clamp_min(0)
    sae = SAE(cell.architecture, W_enc, W_enc.T.clone(), b_enc, x.mean(0), threshold, cell.k)
    save_sae(sae, train.step.folder)
    if cell.architecture != "topk":  # as of earlier versions
        train.step.folder.write_parquet(HISTORY_FILE, made_up_history(train.d_sae).table())
    train.step.finish(12.0, {"d_sae": train.d_sae})


def made_up_history(d_sae: int) -> History:
    """The loss falls as 1 / step, L0 is 4, and a quarter of the latents are dead from the middle on."""
    history = History(HISTORY_STEPS)
    for step in range(HISTORY_STEPS):
        fields = dict.fromkeys(StepMetrics._fields, 0.0) | {"step": step, "loss": 1 / (step + 1), "l0": 4.0}
        history.add([StepMetrics(**fields | {"n_dead": d_sae // 4 if step >= HISTORY_STEPS // 2 else 0})])
    return history


def finish_evaluation(one: EvaluatePlan) -> None:
    store = ActivationStore(one.activations.step.folder)
    sae, cell = load_sae(one.sae.step.folder), one.sae.grid_cell.cell
    x = torch.from_numpy(np.concatenate([store.read(number)[2] for number in range(len(store.parts))])).float()
    counts = {"l0": float((sae.encode(x) > 0).sum(1).float().mean()), "r2": 0.5 + 0.01 * (cell.k or 0)}
    one.step.finish(2.0, counts | {"dead_fraction": 1 / sae.d_sae})


def finish_score(score: ScorePlan) -> None:
    store = ActivationStore(score.activations.step.folder)
    embeddings = ActivationStore(score.embeddings.step.folder) if score.embeddings else None
    sae = load_sae(score.sae.step.folder) if score.sae else None
    stats = score_store(sae, store, embeddings, score.step.config["top_images"])
    write_tables(score.step.folder, stats)
    score.step.finish(3.0, {"images": store.n_images, "neurons": score.neurons})


def finish_concepts(plan: StudyPlan, one: ConceptsPlan) -> None:
    """Measured as by the stage, with made-up embeddings of the words."""
    given = asked(plan)
    words = given.words
    assert words is not None
    assert one.embeddings is not None
    images = ActivationStore(one.embeddings.step.folder)
    directions = np.random.default_rng(0).normal(size=(len(words.words), images.d))
    embeddings = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    found = measure(
        load_sae(one.sae.step.folder) if one.sae else None,
        ActivationStore(one.activations.step.folder),
        given.labels,
        one.settings,
        texts=Texts.of(words.words, embeddings, images, words.word_of),
        patches=one.patches,
        paths=given.paths,
        group_sizes=one.group_sizes,
        seed=plan.study.seed,
    )
    found.write(one.step.folder)
    one.step.finish(4.0, found.counts)


def finish_naming(plan: NamingPlan) -> None:
    """Made-up names of the steered latents: their classes, but for the last one, whose name does not hold."""
    rows = []
    for place, latent in enumerate(STEERED):
        right = latent != STEERED[-1]
        row = [
            latent,
            "vlm",
            plain(LABELS[place % len(LABELS)]) if right else "nothing",
            0.9 if right else 0.5,
            0.75,
            16,
        ]
        rows.append(dict(zip(LATENT_NAMES_SCHEMA.names, [*row, "nothing", 0.5], strict=True)))
    plan.step.folder.write_parquet(NAMES, pa.Table.from_pylist(rows, LATENT_NAMES_SCHEMA))
    plan.step.finish(6.0, {"rows": len(rows)})


def finish_steering(plan: SteeringPlan) -> None:
    """Made-up answers: five latents name their class on white and on every second image of other classes."""
    labels = plan.heldout.labels["label_name"].to_pylist()
    prompt, other_prompt = plan.steering.prompt, *plan.steering.other_prompts
    answers, concepts = [], []

    def ask(kind: str, latent: int, concept: str, image: int, prompt: str, answer: tuple[str, str], right) -> None:
        steered, unsteered = answer
        row = [kind, latent, concept, 4.0, image, prompt, unsteered, steered, *right, 0.3, 0.2]
        answers.append(dict(zip(ANSWERS_SCHEMA.names, row, strict=True)))

    for place, latent in enumerate(STEERED):
        concept = LABELS[place % len(LABELS)]
        row = [latent, concept, 0.9, 20, 0.4, 2.0, True, place < len(LABELS), 0.5, 0.1]
        concepts.append(dict(zip(CONCEPTS_SCHEMA.names, row, strict=True)))
        ask("white", latent, concept, WHITE, prompt, (concept, "nothing"), (True, False))
        for image, label in enumerate(labels):
            if label == concept:
                ask("suppression", latent, concept, image, prompt, ("nothing", label), (True, False))
                continue
            right = image % 2 == 0
            ask("insertion", latent, concept, image, prompt, (concept if right else label, label), (right, False))
            ask("insertion", latent, concept, image, other_prompt, ("dark", "bright"), (False, True))
    answer_table = pa.Table.from_pylist(answers, ANSWERS_SCHEMA)
    concept_table = pa.Table.from_pylist(concepts, CONCEPTS_SCHEMA)
    plan.step.folder.write_parquet("answers.parquet", answer_table)
    plan.step.folder.write_parquet("concepts.parquet", concept_table)
    plan.step.finish(5.0, {"rows": len(answers)} | rates(answer_table, concept_table, prompt))
