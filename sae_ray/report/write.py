"""Makes the report of a study."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from sae_ray.errors import SaeRayError
from sae_ray.report.album import MOST
from sae_ray.report.concepts_page import render_concepts
from sae_ray.report.data import WITH_NEIGHBOURS, write_captions, write_cell
from sae_ray.report.heat import HeatMaps
from sae_ray.report.meanings import read_meanings, write_meaning
from sae_ray.report.names import read_names
from sae_ray.report.neurons import shown_cells
from sae_ray.report.page import ASSETS, page_facts, render
from sae_ray.report.people import agreement_steps, read_agreements
from sae_ray.report.pictures import Shown, read_heat
from sae_ray.report.steering import write_steering
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step, digest, hold
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import PicturesPlan
from sae_ray.study.summary import summarise

REPORT = "report"
RECORD = "report.json"
"""Records what the report shows; written last."""
FILES = ("report.css", "theme.js", "common.js", "gallery.js", "views.js", "report.js")
CONCEPTS_FILES = ("concepts.css", "concepts.js")
"""Beside the others, where there is a page of concepts."""


def write_report(plan: StudyPlan) -> bool:
    """Makes `<root>/report/` from the finished steps, unless an up-to-date report exists.

    The report appears all at once: it is made in a temporary folder and renamed. In an object store, the pages are
    uploaded after the files they need.

    Returns:
        Whether the report was made.

    Raises:
        SaeRayError: the pictures are not made, a step's files are incomplete, or another driver is making the report.
    """
    place = plan.root / REPORT
    study = plan.study.to_dict() | {"resources": None}
    people = agreement_steps(plan.root) if plan.concepts else []
    shows = digest([_program(), study, [[step.name, step.status()] for step in plan.steps], people])
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
    rows, pictures = summarise(plan), plan.pictures_of(shown_cells(plan))
    shown = Shown(plan, pictures)
    heat, n_missing = _pictures(plan, pictures, shown, made)
    data = made / "data"
    write_captions(data, shown.album)
    meanings, names = read_meanings(plan, shown.cells), read_names(plan, shown.cells)
    for cell in shown.cells:
        of_cell = heat.get(cell.name), meanings.get(cell.name), names.get(cell.name, [])
        write_cell(data, cell, shown.album, *of_cell)
    for meaning in meanings.values():
        write_meaning(data, meaning, names.get(meaning.name, []))
    for result in shown.steering:
        write_steering(data, result, shown.album)

    facts = page_facts(plan, rows, shown.cells, meanings, shown.steering, shown.album)
    pages = {
        "index.html": render(plan, rows, shown.cells, shown.steering, shown.album, facts, _limits(shown, n_missing))
    }
    files = [*FILES]
    if meanings:
        judged = read_agreements(plan.root, meanings)
        pages["concepts.html"] = render_concepts(plan, rows, meanings, judged, facts)
        files += CONCEPTS_FILES
    for name, text in pages.items():
        (made / name).write_text(text, encoding="utf-8")
    for name in files:
        shutil.copyfile(ASSETS / name, made / name)


def _pictures(plan: StudyPlan, pictures: PicturesPlan, shown: Shown, made: Path) -> tuple[dict[str, HeatMaps], int]:
    """Copies the sprites; returns the heat maps of each cell, and how many images have no thumbnail."""
    sprites = made / "sprites"
    sprites.mkdir(parents=True)
    if not shown.cells:
        return {}, 0
    record = pictures.step.record()
    if record is None:
        raise SaeRayError(f"{pictures.step.label} does not exist yet; run the pictures stage first")
    folder = pictures.step.folder / "sprites"
    for name in folder.files():
        (sprites / name).write_bytes(folder.read_bytes(name))
    cells, heat = shown.heat_cells, {}
    if cells:
        heat = read_heat(pictures, cells, (plan.study.scoring.top_images, *plan.encoder.patch_grid))
    return heat, record["counts"]["missing"]


def _limits(shown: Shown, n_missing: int) -> list[str]:
    """Notes on what the report leaves out."""
    notes, n_images = [], len(shown.album)
    if n_images > MOST:
        notes.append(f"Only {MOST:,} of {n_images:,} top images have a thumbnail: those of each SAE's best neurons.")
    if n_missing:
        notes.append(f"{n_missing:,} images can no longer be read, so they have no thumbnail.")
    if any(len(cell.order) > WITH_NEIGHBOURS and cell.score.sae is not None for cell in shown.cells):
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
    return 2 if name == RECORD else int(name.endswith(".html"))
