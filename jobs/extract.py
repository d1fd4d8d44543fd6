"""The extraction stage: Ray Data streams images through encoder actors into the activation store.

One dataset covers both image sets. One row is one part, a fixed range of `image_index`. If encoders have GPUs, a task
decodes its images, otherwise the encoder's own actor. The actor encodes them batch by batch, and writes the part of
every site (and of the judge's embeddings) while it encodes the next one. A part depends on its images alone, so what a
killed run finished is not repeated.

Ray repeats what a lost process did, without end. So attempts are counted, but for those lost with a whole node: a part
whose decoding ended its process is decoded image by image in a process of its own, and one that still ends its process
is an error.
"""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sae_ray.encoders import Encoder, load_encoder, load_preprocess
from sae_ray.encoders.part import encode_part
from sae_ray.encoders.sites import Site
from sae_ray.encoders.sources import named_by
from sae_ray.errors import SaeRayError
from sae_ray.images.part import Preparation, decode_part
from sae_ray.images.rendering import Rendering
from sae_ray.store.activations import (
    REJECTS_SCHEMA,
    Part,
    finish_store,
    finished_parts,
    part_name,
    read_parts,
    write_part,
    write_rejects,
)
from sae_ray.store.attempts import begin
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step, check_shared, hold
from sae_ray.store.tables import StoredTable
from sae_ray.study.config import ExtractResources
from sae_ray.study.plan import ExtractPlan, ImagePlan, StudyPlan

from .cluster import at_most_a_node, gpus_or_default, n_cpus, require, room, slots
from .progress import Progress, say
from .stage import at_work, noting_failures, unfinished

REPORT_SECONDS = 1.0
"""Between two reports on a part: more of them from hundreds of workers would drown the board."""
MOST_TRIES = 5
"""How often a part may be begun in one run."""
ENCODER_BYTES = 3 * 2**29
"""Memory of an actor besides its parts: torch, and an encoder of the size of ViT-L in float32."""


def run(plan: StudyPlan) -> None:
    """Writes the lists of images and labels, then extracts the sites of both image sets that are missing.

    Raises:
        SaeRayError: too many images are bad, a value overflows the stored dtype, the disk is too full, another driver
            is at work on the same step.
    """
    run_only(plan, plan.extracts)


def run_only(plan: StudyPlan, wanted: Sequence[ExtractPlan]) -> None:
    """As `run`, for some of the sites or for one that the study itself does not need."""
    for images in plan.images.values():
        _write_lists(images)
    todo = unfinished(wanted)
    if todo:
        with at_work(plan.root, "extract", todo):
            _extract(plan, todo)


def _write_lists(images: ImagePlan) -> None:
    """The manifest and the labels."""
    lists: list[tuple[Step, Literal["manifest", "labels"]]]
    lists = [(images.step, "manifest"), (images.labels_step, "labels")]
    for step, name in lists:
        if not step.finished:
            with hold([step]), noting_failures([step]):
                started = time.monotonic()
                table = images.stored(name)
                step.folder.write_copy(f"{name}.parquet", table.folder, table.name)
                skipped = {"skipped": images.surveyed.skipped} if name == "manifest" else {}
                step.finish(time.monotonic() - started, {"images": table.num_rows, **skipped})


@dataclass(frozen=True)
class ImageSource:
    """What a decoder needs to know about one image set."""

    folder: Folder
    manifest: StoredTable
    """The one under the root, which every node can read."""
    per_part: int

    def images(self, part: int) -> tuple[list[str], list[int]]:
        """The `image_id` and the bytes of the images of a part."""
        rows = self.manifest.slice(part * self.per_part, self.per_part)
        return rows["image_id"].to_pylist(), rows["n_bytes"].to_pylist()


@dataclass(frozen=True)
class SitePart:
    """What an encoder actor needs to know about one step."""

    folder: Folder
    site: Site
    store_dtype: str


@dataclass(frozen=True)
class EncoderJob:
    """One encoder and the steps it feeds."""

    model: str
    revision: str | None
    dtype: str
    at_least: int | None
    """For fast pixels: a JPEG decoded at reduced size keeps at least this many pixels per side. None: exact."""
    field: str
    """Of the study, that names the encoder."""
    steps: dict[str, list[SitePart]]
    """Name of the image set -> its steps."""


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
    def source(self) -> ImageSource:
        manifest = StoredTable(self.images.step.folder, "manifest.parquet")
        return ImageSource(self.images.folder, manifest, self.per_part)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The missing parts as rows of the dataset."""
        return [{"images": self.images.name, "part": number} for number in sorted(self.missing)]


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
            for name, number, written, dim in encoded:
                parts = sets[name]
                parts.dim += dim
                parts.missing.remove(number)
                for step, part in written.items():
                    parts.written[step][number] = part
                progress.advance(parts.n_images(number))
                if not parts.missing:
                    finish(parts)


def _encoded(
    sets: Sequence[PartsOf], plan: StudyPlan, board: Any
) -> Generator[tuple[str, int, dict[str, Part], list[str]]]:
    """Runs the dataset over the missing parts; yields of each as it is written its image set, its number, by the name
    of the step what was written, and which of its images are dim.

    `board` is told of the images of unfinished parts.
    """
    if not sets:
        return
    import ray
    from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # progress is shown in our own way, and errors are raised
    context = DataContext.get_current()
    context.raise_original_map_exception = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False

    jobs = _encoder_jobs([extract for parts in sets for extract in parts.todo])
    resources = plan.study.resources.extract
    memory = ENCODER_BYTES + 2 * max(_bytes_of_a_part(parts) for parts in sets)
    workers, gpus, decoders = _shares(resources, memory)
    actor: dict[str, Any] = {
        "num_cpus": resources.cpus,
        "num_gpus": gpus,
        "memory": at_most_a_node(memory, resources.cpus, gpus),
    }
    # Where tasks ask for what the actors do, Ray runs both in the actors. Tasks of their own find no CPU where lost
    # nodes leave so few that the actors, which wait for these tasks, take them all.
    task: dict[str, Any] = {} if decoders else actor
    rows = [row for parts in sets for row in parts.rows]
    run = uuid.uuid4().hex
    sources = {parts.images.name: parts.source for parts in sets}
    decode = PartDecoder(sources, jobs, run, board, plan.study.images.rendering)
    dataset = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(
            decode,
            batch_size=1,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(size=min(decoders, len(rows)) if decoders else None),
            **task,
        )
        .map_batches(
            PartEncoder,
            fn_constructor_args=(
                jobs,
                "cuda" if gpus else "cpu",
                resources.batch_size,
                plan.study.seed,
                run,
                board,
            ),
            batch_size=1,
            batch_format="pyarrow",
            # Two parts at a time, so that one is written while the other is encoded.
            compute=ActorPoolStrategy(
                size=min(workers, len(rows)), max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
            ),
            **actor,
        )
    )
    for row in dataset.iter_rows():
        if row["problem"]:
            raise SaeRayError(row["problem"])
        written = {step: Part.from_json(marker) for step, marker in json.loads(row["written"]).items()}
        yield row["images"], row["part"], written, row["dim"]


def _bytes_of_a_part(parts: PartsOf) -> int:
    """Of its pixels for every encoder, and of its rows."""
    sizes = {extract.info.model: 3 * math.prod(extract.info.image_size) for extract in parts.todo}
    share = parts.per_part / parts.images.n_images
    return int(parts.per_part * sum(sizes.values()) + share * sum(extract.bytes for extract in parts.todo))


def _shares(resources: ExtractResources, memory: float) -> tuple[int, float, int | None]:
    """Encoder actors, GPUs of each, decode tasks at once; None if actors decode. `memory`: bytes of an actor."""
    gpus = gpus_or_default(resources.gpus)
    # Without GPUs an actor decodes as well, two parts at a time.
    at_most = int(slots(resources.cpus, gpus))
    workers = resources.workers or max(1, min(at_most, room(resources.cpus, gpus, memory)))
    decoders = resources.decoders
    if gpus and not decoders:
        decoders = max(1, int(n_cpus() - workers * resources.cpus))
    require("resources.extract", workers, resources.cpus, gpus, beside=1 if decoders else 0)
    return workers, gpus, decoders


def _encoder_jobs(todo: Sequence[ExtractPlan]) -> tuple[EncoderJob, ...]:
    jobs: dict[tuple[str, str | None, str, int | None], EncoderJob] = {}
    for extract in todo:
        at_least = 2 * max(extract.info.image_size) if extract.step.config["pixels"] == "fast" else None
        # The revision resolved for the step: a branch may have moved since.
        key = (extract.info.model, extract.info.revision, extract.encoder.dtype, at_least)
        job = jobs.setdefault(key, EncoderJob(*key, extract.field, {}))
        part = SitePart(extract.step.folder, extract.site, extract.step.config["store_dtype"])
        job.steps.setdefault(extract.images.name, []).append(part)
    return tuple(jobs.values())


class PartDecoder:
    """The task that decodes: a row of `PartsOf` -> the same with pixels for every encoder, and the rejects.

    It adds the part's images, and `begun`: how often it was begun before.
    """

    def __init__(
        self,
        sources: dict[str, ImageSource],
        jobs: Sequence[EncoderJob],
        run: str,
        board: Any,
        rendering: Rendering | None = None,
    ):
        """`sources`: every image set, by name."""
        self.sources = sources
        self.jobs = jobs
        self.run = run
        self.board = board
        self.rendering = rendering
        self.preparations = [_preparation(job) for job in jobs]

    def __call__(self, batch: pa.Table) -> pa.Table:
        name, part = batch["images"][0].as_py(), batch["part"][0].as_py()
        source = self.sources[name]
        used = [number for number, job in enumerate(self.jobs) if name in job.steps]
        preparations = [self.preparations[number] for number in used]
        begun = begin_part(self.jobs, name, part, self.run, "decode")
        image_ids, sizes = source.images(part)
        piece = f"{name} {part}"

        @now_and_then
        def tell(done: int) -> None:
            self.board.set.remote(piece, done // 2)  # the other half is encoding

        n = len(image_ids) if begun < MOST_TRIES else 0
        decoded = decode_part(
            *(source.folder, image_ids[:n], preparations, begun > 0, tell), rendering=self.rendering, sizes=sizes[:n]
        )
        batch = batch.append_column("first_image", pa.array([part * source.per_part]))
        batch = batch.append_column("image_ids", pa.array([image_ids], pa.list_(pa.string())))
        batch = batch.append_column("begun", pa.array([begun]))
        batch = batch.append_column("accepted", pa.array([decoded.accepted], pa.list_(pa.int64())))
        batch = batch.append_column("rejects", pa.array([decoded.rejects], pa.list_(pa.struct(REJECTS_SCHEMA))))
        batch = batch.append_column("dim", pa.array([decoded.dim], pa.list_(pa.string())))
        pixels = dict(zip(used, decoded.pixels, strict=True))
        for number in range(len(self.jobs)):
            of_encoder = pixels.get(number)
            value = pa.nulls(1, pa.large_binary()) if of_encoder is None else _one_value(of_encoder)
            shape = pa.array([None if of_encoder is None else of_encoder.shape], pa.list_(pa.int64()))
            batch = batch.append_column(f"pixels_{number}", value).append_column(f"shape_{number}", shape)
        return batch


def _preparation(job: EncoderJob) -> Preparation:
    with named_by(job.field, job.model):
        return Preparation(load_preprocess(job.model, job.revision, job.at_least is not None), job.at_least)


def now_and_then(tell: Callable[[int], None]) -> Callable[[int], None]:
    """As `tell`, which is called at most every `REPORT_SECONDS`."""
    last = time.monotonic()

    def seldom(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            tell(done)

    return seldom


def begin_part(jobs: Sequence[EncoderJob], images: str, part: int, run: str, what: str) -> int:
    """Notes an attempt, and returns how many there were before; those that ended with their node do not count.

    Raises SaeRayError where this node does not see the root.
    """
    import ray

    first = next(step for job in jobs for step in job.steps.get(images, ()))
    check_shared(first.folder)
    before = begin(first.folder, run, f"{part_name(part)}-{what}", ray.get_runtime_context().get_node_id())
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} if before else set()
    return sum(node in alive for node in before)


def _one_value(array: np.ndarray) -> pa.Array:
    """A column of one row, whose value is the array's bytes; nothing is copied."""
    ends = np.array([0, array.nbytes], np.int64)
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(ends), pa.py_buffer(array.reshape(-1))])


class PartEncoder:
    """An actor that encodes parts and writes them; returns which part it wrote, or the error that prevented it."""

    def __init__(self, jobs: tuple[EncoderJob, ...], device: str, batch_size: int, seed: int, run: str, board: Any):
        self.jobs = jobs
        self.device = device
        self.batch_size = batch_size
        self.seed = seed
        self.run = run
        self.board = board
        self.encoding = Lock()
        self.encoders: dict[int, Encoder] = {}
        # The pixels are only read.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

    def __call__(self, batch: pa.Table) -> pa.Table:
        images, part = batch["images"][0].as_py(), batch["part"][0].as_py()
        try:
            written, problem = self._write(images, part, batch), ""
        except SaeRayError as error:  # as a row: an exception would reach the driver without its type
            written, problem = {}, str(error)
        columns = {"images": [images], "part": [part], "problem": [problem], "dim": batch["dim"]}
        return pa.table({**columns, "written": [json.dumps(written, default=asdict)]})

    def _encoder(self, number: int) -> Encoder:
        """Loaded when it is first needed: an actor whose start fails cannot tell the driver why."""
        if number not in self.encoders:
            job = self.jobs[number]
            with named_by(job.field, job.model):
                self.encoders[number] = load_encoder(job.model, job.revision, self.device, job.dtype)
        return self.encoders[number]

    def _write(self, images: str, part: int, batch: pa.Table) -> dict[str, Part]:
        """What was written, by the name of the step."""
        ids = batch["image_ids"][0].as_py()
        begun = begin_part(self.jobs, images, part, self.run, "encode")
        if max(begun, batch["begun"][0].as_py()) >= MOST_TRIES:
            raise SaeRayError(
                f"part {part} of images.{images} ({ids[0]} to {ids[-1]}) ended its process {MOST_TRIES} times; if "
                "memory ran out, lower extraction.images_per_part or resources.extract.batch_size"
            )
        accepted = batch["accepted"][0].as_py()
        rejects = [(reject["image_id"], reject["reason"]) for reject in batch["rejects"][0].as_py()]
        image_index = batch["first_image"][0].as_py() + np.asarray(accepted, dtype=np.int64)
        image_ids = [ids[position] for position in accepted]
        wanted = {number: job.steps[images] for number, job in enumerate(self.jobs) if images in job.steps}
        with self.encoding:
            encoders = {number: self._encoder(number) for number in wanted}

        piece, n = f"{images} {part}", len(accepted)

        @now_and_then
        def tell(encoded: int) -> None:
            share = encoded / max(1, n * len(wanted))
            self.board.set.remote(piece, int(n * (1 + share) / 2))  # decoding was the other half

        written = {}
        for turn, (number, steps) in enumerate(wanted.items()):
            pixels = np.frombuffer(batch[f"pixels_{number}"][0].as_buffer(), dtype=np.uint8)
            pixels = pixels.reshape(batch[f"shape_{number}"][0].as_py())
            sites = [(step.site, step.store_dtype) for step in steps]
            with self.encoding:
                found = encode_part(
                    *(encoders[number], sites, pixels, image_index, image_ids, self.seed, self.batch_size),
                    after_batch=lambda done, before=turn * n: tell(before + done),
                )
            for step, rows in zip(steps, found, strict=True):
                written[step.folder.name] = write_part(step.folder, part, rows, rejects)
        self.board.set.remote(piece, 0)  # the driver counts it now
        return written


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
