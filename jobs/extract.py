"""The extraction stage: Ray Data streams images through encoder actors into the activation store.

One dataset covers both image sets. A part is a fixed range of `image_index`, and one row is a run of parts, so that the
driver, which needs some 5 ms for a row, has little to do. An actor decodes the parts of a run, encodes them and writes
every site (and the judge's embeddings), a few parts at a time. Where it has a GPU, it has tasks decode for it: threads
of its own would hold up the calls that keep the GPU busy. A part depends on its images alone, so what a killed run
finished is not repeated.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import uuid
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np

from sae_ray.encoders.info import EncoderInfo
from sae_ray.errors import SaeRayError, check
from sae_ray.store.activations import (
    Part,
    finish_store,
    finished_parts,
    read_parts,
    write_rejects,
)
from sae_ray.store.steps import hold
from sae_ray.store.tables import StoredTable
from sae_ray.study.config import ExtractResources
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import ExtractPlan, ImagePlan

from .cluster import (
    PROCESS_BYTES,
    at_most_a_node,
    gpus_or_default,
    n_cpus,
    require,
    room,
    slots,
    store_bytes,
    usable_cpus,
)
from .encoding import EncoderJob, ImageSource, PartDecoder, RunEncoder, SitePart, job_of
from .progress import Progress, StageBoard, say
from .stage import at_work, noting_failures, unfinished

LONGEST_RUN = 64
"""Parts that the driver hands out at once, at most."""
RUNS_PER_ACTOR = 8
"""At least, where there are as many parts: so that all actors are busy until shortly before the end."""
ENCODER_BYTES = 3 * 2**29
"""Memory of an actor besides its parts, at least: torch, and an encoder of the size of ViT-B in float32."""
HELD_WIDTHS = 16
"""Of what a forward pass holds of every token, in widths of the residual stream: above all what its MLPs make, four
widths each of what they read and of up to three steps of their activation."""
START_SECONDS = 10.0
"""What starting an actor takes of a core: less work is not worth another one."""
IMAGE_SECONDS = 2e-3
"""What decoding and resizing an image takes of a core, at least for photographs."""
CORE_FLOPS = 5e10
"""In a second, in the encoder."""


def run(plan: StudyPlan) -> None:
    """Writes the lists of images and labels, then extracts the sites of both image sets that are missing.

    Raises:
        SaeRayError: too many images are bad, a value overflows the stored dtype, the disk is too full, another driver
            is at work on the same step.
    """
    run_only(plan, plan.extracts)


def run_only(plan: StudyPlan, wanted: Sequence[ExtractPlan]) -> None:
    """As `run`, for some of the sites or for one that the study itself does not need."""
    plan.check_imported()
    for images in plan.images.values():
        _write_lists(images)
    todo = unfinished(wanted)
    if todo:
        with at_work(plan.root, "extract", todo):
            _extract(plan, todo)


def _write_lists(images: ImagePlan) -> None:
    """The manifest and the labels."""
    for step, name in images.lists:
        if not step.finished:
            with hold([step]), noting_failures([step]):
                images.write(name)


class Work(NamedTuple):
    """Seconds of a core."""

    decoding: float
    encoding: float

    @property
    def seconds(self) -> float:
        return sum(self)

    @property
    def at_once(self) -> float:
        """Cores that an actor keeps busy which has no GPU: it decodes one part while it encodes another."""
        return self.seconds / max(*self, 1e-9)


class PartsOf:
    """The parts of one image set, and which of them some of its steps still lack."""

    def __init__(self, images: ImagePlan, todo: Sequence[ExtractPlan]):
        self.images = images
        self.todo = todo
        self.per_part = per_part = todo[0].step.config["images_per_part"]
        present = [finished_parts(extract.step.folder) for extract in todo]
        numbers = range(-(-images.n_images // per_part))
        self.missing = {number for number in numbers if any(number not in parts for parts in present)}
        self.written: dict[str, dict[int, Part]] = {extract.step.name: {} for extract in todo}
        """Name of the step -> its parts that this run wrote: their markers need not be read."""
        self.dim: list[str] = []
        """The images that are almost black."""

    def n_images(self, number: int) -> int:
        return min(self.per_part, self.images.n_images - number * self.per_part)

    @property
    def work(self) -> Work:
        """What is missing takes of a core, approximately."""
        encoders = {extract.info.model: extract.info for extract in self.todo}.values()
        flops = sum(24 * info.n_layers * (info.residual_width or 0) ** 2 * info.n_tokens for info in encoders)
        n = sum(map(self.n_images, self.missing))
        return Work(n * IMAGE_SECONDS, n * flops / CORE_FLOPS)

    @property
    def source(self) -> ImageSource:
        manifest = StoredTable(self.images.step.folder, "manifest.parquet")
        return ImageSource(self.images.folder, manifest, self.per_part)

    def runs(self, length: int) -> list[dict[str, Any]]:
        """The missing parts as rows of the dataset."""
        numbers = sorted(self.missing)
        starts = range(0, len(numbers), length)
        return [{"images": self.images.name, "parts": numbers[start : start + length]} for start in starts]

    def add(self, written: dict[int, dict[str, Part]], dim: list[str]) -> int:
        """Notes parts that were written; returns how many images they have."""
        for number, of_steps in written.items():
            self.missing.remove(number)
            for step, part in of_steps.items():
                self.written[step][number] = part
        self.dim += dim
        return sum(map(self.n_images, written))


def _extract(plan: StudyPlan, todo: Sequence[ExtractPlan]) -> None:
    started = time.monotonic()
    sets = {
        images.name: PartsOf(images, wanted)
        for images in plan.images.values()
        if (wanted := [extract for extract in todo if extract.images is images])
    }

    def finish(parts: PartsOf) -> None:
        nonlocal started
        seconds = time.monotonic() - started
        if parts.dim:
            say(
                f"images.{parts.images.name}: {len(parts.dim):,} images have more than 8 bits but use less than an "
                f"eighth of their range and are almost black, such as {parts.dim[0]}; if they hold 12-bit values, set "
                "images.white = 4095"
            )
        for extract in parts.todo:
            _finish(extract, parts.written.pop(extract.step.name), seconds, plan.study.images.max_bad_fraction)
        started = time.monotonic()

    sites = dict.fromkeys(extract.site.name for extract in todo)
    total = sum(parts.images.n_images for parts in sets.values())
    missing = sum(parts.n_images(number) for parts in sets.values() for number in parts.missing)
    label, steps = f"extract {' and '.join(sets)} ({', '.join(sites)})", [extract.step for extract in todo]
    with Progress(label, total, "images", total - missing, steps) as progress:
        for parts in sets.values():
            if not parts.missing:
                finish(parts)
        # Closed, so that nothing is written any more once the locks are released.
        left = [parts for parts in sets.values() if parts.missing]
        with closing(_encoded(left, plan, progress.board())) as encoded:
            for name, written, dim in encoded:
                parts = sets[name]
                progress.advance(parts.add(written, dim))
                if not parts.missing:
                    finish(parts)


def _encoded(
    sets: Sequence[PartsOf], plan: StudyPlan, board: StageBoard
) -> Generator[tuple[str, dict[int, dict[str, Part]], list[str]]]:
    """Runs the dataset over the missing parts; yields of each run as it is written its image set, by number and name of
    the step what was written, and which of its images are dim.

    `board` is told of the images of unfinished runs.
    """
    if not sets:
        return
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # progress is shown in our own way, and errors are raised
    context = DataContext.get_current()
    context.raise_original_map_exception = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False

    resources = plan.study.resources.extract
    part = max(_bytes_of_a_part(parts) for parts in sets)
    infos = [extract.info for parts in sets for extract in parts.todo]
    wanted = encoder_bytes(infos, resources.batch_size, resources.gpus) + 2 * part
    memory = at_most_a_node(wanted, resources.cpus, gpus_or_default(resources.gpus))
    work = Work(*map(sum, zip(*(parts.work for parts in sets), strict=True)))
    workers, gpus, decoders = shares(resources, memory, part, work)
    jobs = _encoder_jobs([extract for parts in sets for extract in parts.todo])
    if not gpus:
        check_without_gpus(jobs)
    length = run_length(sum(len(parts.missing) for parts in sets), workers)
    runs = [run for parts in sets for run in parts.runs(length)]
    workers = min(workers, len(runs))
    decode = PartDecoder(
        {parts.images.name: parts.source for parts in sets},
        jobs,
        uuid.uuid4().hex,
        plan.study.images.rendering,
    )
    dataset = ray.data.from_items(runs, override_num_blocks=len(runs)).map(
        RunEncoder,  # pyright: ignore[reportArgumentType]
        fn_constructor_args=(
            decode,
            max(1, decoders // workers) if decoders else None,
            "cuda" if gpus else "cpu",
            resources.batch_size,
            plan.study.seed,
            board,
        ),
        # Two runs at a time, so that one begins while the last parts of the other are in work.
        compute=ActorPoolStrategy(
            size=workers,
            max_tasks_in_flight_per_actor=2,
            max_concurrent_calls_per_actor=2,
            enable_true_multi_threading=True,
        ),
        num_cpus=resources.cpus,
        num_gpus=gpus,
        memory=memory,
    )
    for row in dataset.iter_rows():
        images, written, dim, problem = json.loads(row["told"])
        if problem:
            raise SaeRayError(problem)
        parts = {
            int(number): {step: Part.from_json(marker) for step, marker in of_steps.items()}
            for number, of_steps in written.items()
        }
        yield images, parts, dim


def check_without_gpus(jobs: Sequence[EncoderJob]) -> None:
    """Raises UsageError if one of them needs a GPU."""
    for job in jobs:
        table = job.field.partition(".")[0]
        check(not job.compiled, f"{table}.compile", True, "encoders are compiled for GPUs alone, and here is none to "
              "extract on; leave it out")  # fmt: skip
        check(not job.on_gpu, "extraction.pixels", "gpu", "there is no GPU to extract on; choose exact or fast")


def run_length(n_parts: int, workers: int) -> int:
    """Parts that are handed out at once."""
    return max(1, min(LONGEST_RUN, n_parts // (RUNS_PER_ACTOR * workers)))


def encoder_bytes(infos: Sequence[EncoderInfo], batch_size: int, gpus: float | None) -> int:
    """Memory of a process besides its parts: its encoders, in float32, and on a CPU what they make of a batch."""
    of_model = {info.model: (info, info.residual_width or 0) for info in infos}.values()
    weights = sum(4 * 12 * info.n_layers * width**2 for info, width in of_model)
    token = max((HELD_WIDTHS * 4 * info.n_tokens * width for info, width in of_model), default=0)
    return max(ENCODER_BYTES, PROCESS_BYTES + weights + (0 if gpus_or_default(gpus) else batch_size * token))


def _bytes_of_a_part(parts: PartsOf) -> int:
    """Of its pixels for every encoder, of its files where a GPU decodes them, and of its rows."""
    sizes = {extract.info.model: 3 * math.prod(extract.info.image_size) for extract in parts.todo}
    on_gpu = any(extract.step.config["pixels"] == "gpu" for extract in parts.todo)
    files = most_bytes(parts.source.manifest, parts.per_part) if on_gpu else 0
    share = parts.per_part / parts.images.n_images
    return int(parts.per_part * sum(sizes.values()) + files + share * sum(extract.bytes for extract in parts.todo))


def most_bytes(manifest: StoredTable, per_part: int) -> int:
    """Of the files of a part."""
    totals = np.zeros(-(-manifest.num_rows // per_part), np.int64)
    for group in manifest.groups(["image_index", "n_bytes"]):
        np.add.at(totals, group["image_index"].to_numpy() // per_part, group["n_bytes"].to_numpy())
    return int(totals.max(initial=0))


def shares(resources: ExtractResources, memory: float, part: float, work: Work) -> tuple[int, float, int | None]:
    """Encoder actors, GPUs of each, decode tasks at once; None if actors decode.

    Args:
        resources: what the study asks for.
        memory: bytes of an actor.
        part: bytes of a decoded part, which waits for its actor in Ray's object stores.
        work: all that is to be done.
    """
    gpus = gpus_or_default(resources.gpus)
    at_most = int(slots(resources.cpus, gpus))
    if not gpus:
        cores = n_cpus() if os.environ.get("RAY_ADDRESS") else usable_cpus()
        at_most = max(at_most, int(cores / (max(resources.cpus, 1) * work.at_once)))
        at_most = min(at_most, math.ceil(work.seconds / START_SECONDS))
    workers = resources.workers or max(1, min(at_most, room(resources.cpus, gpus, memory)))
    decoders = resources.decoders
    if gpus and not decoders:
        decoders = max(1, min(int(n_cpus() - workers * resources.cpus), int(store_bytes() / 2 / part)))
    require("resources.extract", workers, resources.cpus, gpus, beside=1 if decoders else 0)
    return workers, gpus, decoders


def _encoder_jobs(todo: Sequence[ExtractPlan]) -> tuple[EncoderJob, ...]:
    jobs: dict[tuple[str, str | None, str, int | None, bool], EncoderJob] = {}
    for extract in todo:
        one = job_of(extract)
        job = jobs.setdefault((one.model, one.revision, one.dtype, one.at_least, one.compiled), one)
        part = SitePart(extract.step.folder, extract.site, extract.step.config["store_dtype"])
        job.steps.setdefault(extract.images.name, []).append(part)
    return tuple(jobs.values())


def _finish(extract: ExtractPlan, written: dict[int, Part], seconds: float, max_bad_fraction: float) -> None:
    images = extract.images
    parts = read_parts(extract.step.folder, written)
    rejects = write_rejects(extract.step.folder, parts)
    if len(rejects) > max_bad_fraction * images.n_images or len(rejects) == images.n_images:
        listed = "\n".join(f"  {image_id}: {reason}" for image_id, reason in rejects[:20])
        more = f"\n  … and {len(rejects) - 20:,} more" if len(rejects) > 20 else ""
        raise SaeRayError(
            f"{len(rejects):,} of {images.n_images:,} images in {images.folder} could not be read, more than "
            f"images.max_bad_fraction = {max_bad_fraction:g} allows (all: {extract.step.folder / 'rejects.parquet'}):\n"
            f"{listed}{more}\nfix or remove them, or raise the fraction"
        )
    if rejects:
        few = f"{len(rejects):,} of {images.n_images:,} images could not be read"
        say(f"{extract.step.label}: {few} (see rejects.parquet)")
    finish_store(extract.step, parts, extract.width, seconds)


if __name__ == "__main__":
    from .cli import extract as command

    command()
