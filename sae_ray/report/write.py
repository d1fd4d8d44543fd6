"""Makes the report of a study."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sae_ray.encoders import load_preprocess
from sae_ray.errors import SaeRayError
from sae_ray.report.album import MOST, Album, thumbnail_size, write_sprites
from sae_ray.report.data import WITH_NEIGHBOURS, write_captions, write_cell
from sae_ray.report.heat import HeatMaps, heat_maps
from sae_ray.report.neurons import Neurons, read_neurons
from sae_ray.report.page import ASSETS, render
from sae_ray.report.steering import SteeringResult, read_steering, write_steering
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step, digest, hold
from sae_ray.study.plan import StudyPlan
from sae_ray.study.summary import summarise

REPORT = "report"
RECORD = "report.json"
"""Records what the report shows; written last."""
BLOCK = 32
"""How many neurons of a cell have their images numbered together, so that they share sprites."""


def write_report(plan: StudyPlan) -> bool:
    """Makes `<root>/report/` from the finished steps, unless an up-to-date report exists.

    The report appears all at once: it is made in a temporary folder and renamed. In an object store, `index.html` is
    uploaded after the files it needs.

    Returns:
        Whether the report was made.

    Raises:
        SaeRayError: a step's files are incomplete, or another driver is making the report.
    """
    place = plan.root / REPORT
    study = plan.study.to_dict() | {"resources": None}
    shows = digest([_program(), study, [[step.name, step.status()] for step in plan.steps]])
    if place.exists(RECORD) and place.read_json(RECORD)["shows"] == shows:
        return False
    workshop = Step(plan.root, "report", "report", {})
    with hold([workshop]):
        started = time.monotonic()
        for left_by_a_kill in ("new", "old"):
            workshop.folder.delete(left_by_a_kill)
        made = Path((workshop.folder / "new").path) if plan.root.is_local else Path(tempfile.mkdtemp())
        try:
            _make(plan, made)
            seconds = round(time.monotonic() - started, 1)
            Folder(made).write_json(RECORD, {"shows": shows, "seconds": seconds})
            _publish(made, place, workshop.folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
            workshop.folder.delete("old")
    return True


def _program() -> str:
    """A hash of this package's files: another version makes the report again."""
    files = sorted(path for path in Path(__file__).parent.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def _make(plan: StudyPlan, made: Path) -> None:
    rows = summarise(plan)
    cells = read_neurons(plan)
    steering = [result for result in read_steering(plan) if result.plan.name in {cell.name for cell in cells}]
    album = Album(list(plan.images.values()), [*_answered(steering), *_in_turn(cells)])
    image_size = plan.encoder.image_size
    preprocess = load_preprocess(plan.encoder.model, plan.encoder.revision)
    n_missing = write_sprites(album, made / "sprites", preprocess, thumbnail_size(image_size))
    heat, trouble = _heat(plan, cells, steering)

    data = made / "data"
    write_captions(data, album)
    for cell in cells:
        write_cell(data, cell, album, heat.get(cell.name))
    for result in steering:
        write_steering(data, result, album)

    notes = [*_limits(cells, album, n_missing), *trouble]
    (made / "index.html").write_text(render(plan, rows, cells, steering, album, notes), encoding="utf-8")
    for name in ("report.css", "report.js"):
        shutil.copyfile(ASSETS / name, made / name)


def _answered(steering: Sequence[SteeringResult]) -> Iterator[tuple[str, np.ndarray]]:
    for result in steering:
        yield result.plan.heldout.name, np.array([one.image_index for one in result.examples], dtype=np.int64)


def _in_turn(cells: Sequence[Neurons]) -> Iterator[tuple[str, np.ndarray]]:
    """Top images in blocks of neurons: first the best few neurons of all cells, then the next few, and so on."""
    for start in range(0, max((len(cell.order) for cell in cells), default=0), BLOCK):
        for cell in cells:
            yield cell.pictures.name, cell.top_image[cell.order[start : start + BLOCK]].astype(np.int64)


def _heat(
    plan: StudyPlan, cells: Sequence[Neurons], steering: Sequence[SteeringResult]
) -> tuple[dict[str, HeatMaps], list[str]]:
    try:
        return heat_maps(plan, cells, {result.plan.name: result.best for result in steering}), []
    except SaeRayError as error:
        return {}, [f"There are no heat maps because the encoder could not be run: {error}"]


def _limits(cells: Sequence[Neurons], album: Album, n_missing: int) -> list[str]:
    """Notes on what the report leaves out."""
    notes = []
    if len(album) > MOST:
        notes.append(f"Only {MOST:,} of {len(album):,} top images have a thumbnail: those of each SAE's best neurons.")
    if n_missing:
        notes.append(f"{n_missing:,} images can no longer be read, so they have no thumbnail.")
    if any(len(cell.order) > WITH_NEIGHBOURS and cell.score.sae is not None for cell in cells):
        notes.append(f"Decoder neighbours are shown only for the {WITH_NEIGHBOURS:,} best neurons of each SAE.")
    return notes


def _publish(made: Path, place: Folder, workshop: Folder) -> None:
    if place.is_local:
        if place.exists():
            os.rename(place.path, workshop.path_of("old"))
        os.rename(made, place.path)
        return
    place.delete(RECORD)
    files = sorted((path for path in made.rglob("*") if path.is_file()), key=lambda path: _turn(path.name))
    for path in files:
        place.write_bytes(path.relative_to(made).as_posix(), path.read_bytes())


def _turn(name: str) -> int:
    return {"index.html": 1, RECORD: 2}.get(name, 0)
