"""The extraction stage: Ray Data streams images through encoder actors into the activation store.

One dataset covers both image sets. A part is a fixed range of `image_index`, and one row is a run of parts, so that the
driver, which needs about 14 ms for a row, has little to do. An actor takes the parts of a run through decoding, the
encoder and the writing of every site (and of the judge's embeddings), a few at a time. Without a GPU it decodes
them itself. With one, tasks of its own decode for it: threads would hold up those calls that keep the GPU busy. A part
depends on its images alone, so what a killed run finished is not repeated.

Ray repeats what a lost process did, without end. So attempts are counted, but for those lost with a whole node: a part
that was in work when its process ended is decoded image by image in a process of its own, and one that still ends its
process is an error.
"""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from threading import Lock, Semaphore
from typing import Any, Literal

from sae_ray.encoders import Encoder, load_encoder, load_preprocess
from sae_ray.encoders.part import encode_part
from sae_ray.encoders.sites import Site
from sae_ray.encoders.sources import named_by
from sae_ray.errors import SaeRayError
from sae_ray.images.part import DecodedPart, Preparation, decode_part
from sae_ray.images.rendering import Rendering
from sae_ray.store.activations import (
    Part,
    finish_store,
    finished_parts,
    part_name,
    read_part,
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
LONGEST_RUN = 64
"""Parts that the driver hands out at once, at most."""
RUNS_PER_ACTOR = 8
"""At least, where there are as many parts: so that all actors are busy until shortly before the end."""
MOST_TRIES = 5
"""How often a part may be begun while the driver lives."""
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
    sets: Sequence[PartsOf], plan: StudyPlan, board: Any
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
    memory = ENCODER_BYTES + 2 * max(_bytes_of_a_part(parts) for parts in sets)
    workers, gpus, decoders = _shares(resources, memory)
    n_parts = sum(len(parts.missing) for parts in sets)
    length = max(1, min(LONGEST_RUN, n_parts // (RUNS_PER_ACTOR * workers)))
    runs = [run for parts in sets for run in parts.runs(length)]
    workers = min(workers, len(runs))
    decode = PartDecoder(
        {parts.images.name: parts.source for parts in sets},
        _encoder_jobs([extract for parts in sets for extract in parts.todo]),
        uuid.uuid4().hex,
        plan.study.images.rendering,
    )
    dataset = ray.data.from_items(runs, override_num_blocks=len(runs)).map(
        RunEncoder,
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
        memory=at_most_a_node(memory, resources.cpus, gpus),
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


def _bytes_of_a_part(parts: PartsOf) -> int:
    """Of its pixels for every encoder, and of its rows."""
    sizes = {extract.info.model: 3 * math.prod(extract.info.image_size) for extract in parts.todo}
    share = parts.per_part / parts.images.n_images
    return int(parts.per_part * sum(sizes.values()) + share * sum(extract.bytes for extract in parts.todo))


def _shares(resources: ExtractResources, memory: float) -> tuple[int, float, int | None]:
    """Encoder actors, GPUs of each, decode tasks at once; None if actors decode. `memory`: bytes of an actor."""
    gpus = gpus_or_default(resources.gpus)
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
    """Decodes parts, in the process of an actor or in that of a task."""

    def __init__(
        self, sources: dict[str, ImageSource], jobs: Sequence[EncoderJob], run: str, rendering: Rendering | None = None
    ):
        """`sources`: every image set, by name."""
        self.sources = sources
        self.jobs = jobs
        self.run = run
        self.rendering = rendering
        self.preparations = [_preparation(job) for job in jobs]

    def __call__(self, images: str, part: int, after_image: Callable[[int], None] = lambda done: None) -> DecodedPart:
        """Its pixels for each encoder that has steps of these images, in order.

        Raises SaeRayError where the part has ended its process too often.
        """
        source = self.sources[images]
        begun = begin_part(self.jobs, images, part, self.run)
        ids, sizes = source.images(part)
        if begun >= MOST_TRIES:
            raise SaeRayError(
                f"part {part} of images.{images} ({ids[0]} to {ids[-1]}) ended its process {MOST_TRIES} times; if "
                "memory ran out, lower extraction.images_per_part or resources.extract.batch_size"
            )
        used = [one for one, job in zip(self.preparations, self.jobs, strict=True) if images in job.steps]
        return decode_part(source.folder, ids, used, begun > 0, after_image, self.rendering, sizes)


def by_tasks(decode: PartDecoder) -> Callable[[str, int, Callable[[int], None]], DecodedPart]:
    """As `decode`, in tasks of one CPU each. They share their memory with this process: no pixels are copied."""
    import ray
    from ray.exceptions import RayTaskError

    shared = ray.put(decode)
    task = ray.remote(num_cpus=1, max_retries=-1)(_decoded)

    def decoded(images: str, part: int, after_image: Callable[[int], None]) -> DecodedPart:
        try:
            return ray.get(task.remote(shared, images, part))
        except RayTaskError as error:
            raise error.cause from None

    return decoded


def _decoded(decode: PartDecoder, images: str, part: int) -> DecodedPart:
    return decode(images, part)


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


def begin_part(jobs: Sequence[EncoderJob], images: str, part: int, run: str) -> int:
    """Notes an attempt, and returns how many there were before; those that ended with their node do not count.

    Raises SaeRayError where this node does not see the root.
    """
    import ray

    first = next(step for job in jobs for step in job.steps.get(images, ()))
    check_shared(first.folder)
    before = begin(first.folder, run, part_name(part), ray.get_runtime_context().get_node_id())
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} if before else set()
    return sum(node in alive for node in before)


class RunEncoder:
    """An actor that encodes runs of parts and writes them."""

    def __init__(self, decode: PartDecoder, decoders: int | None, device: str, batch_size: int, seed: int, board: Any):
        """`decoders`: tasks that decode for this actor at the same time; None: it decodes itself."""
        import ray

        self.jobs = decode.jobs
        self.sources = decode.sources
        self.device = device
        self.batch_size = batch_size
        self.seed = seed
        self.board = board
        self.encoders: dict[int, Encoder] = {}
        self.encoding = Lock()
        # One part is written while another one is encoded; without tasks, it is decoded meanwhile.
        self.decode = by_tasks(decode) if decoders else decode
        self.decoding = Semaphore(decoders or 2)
        self.parts = ThreadPoolExecutor(decoders + 2 if decoders else 2)
        self.restarted = ray.get_runtime_context().was_current_actor_reconstructed
        # The pixels are only read.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """Takes a row of `PartsOf.runs`; tells what was written, or the error that prevented it."""
        images, numbers = row["images"], [int(number) for number in row["parts"]]
        piece, done = f"{images} {numbers[0]}", dict.fromkeys(numbers, 0)

        @now_and_then
        def report(total: int) -> None:
            self.board.set.remote(piece, total)

        def tell(number: int, images_done: int) -> None:
            done[number] = images_done
            report(sum(done.values()))

        work = {number: self.parts.submit(self._part, images, number, partial(tell, number)) for number in numbers}
        written: dict[int, dict[str, Part]] = {}
        dim: list[str] = []
        problem = ""
        try:
            for number, part in work.items():
                written[number], of_part = part.result()
                dim += of_part
        except SaeRayError as error:  # told: an exception would reach the driver without its type
            problem = str(error)
            for part in work.values():
                part.cancel()
        self.board.set.remote(piece, 0)  # the driver counts it now
        return {"told": json.dumps([images, written, dim, problem], default=asdict)}

    def _part(self, images: str, number: int, tell: Callable[[int], None]) -> tuple[dict[str, Part], list[str]]:
        """What was written, by the name of the step, and the dim images."""
        wanted = {which: job.steps[images] for which, job in enumerate(self.jobs) if images in job.steps}
        if self.restarted and (written := _written([step for steps in wanted.values() for step in steps], number)):
            return written, []
        with self.decoding:
            decoded = self.decode(images, number, lambda read: tell(read // 2))
        with self.encoding:
            encoders = [self._encoder(which) for which in wanted]
        source = self.sources[images]
        image_index = number * source.per_part + decoded.accepted
        ids, _ = source.images(number)
        image_ids, n = [ids[place] for place in decoded.accepted], len(decoded.accepted)

        written = {}
        for turn, (steps, encoder, pixels) in enumerate(zip(wanted.values(), encoders, decoded.pixels, strict=True)):
            sites = [(step.site, step.store_dtype) for step in steps]
            with self.encoding:
                found = encode_part(
                    *(encoder, sites, pixels, image_index, image_ids, self.seed, self.batch_size),
                    # Decoding was the other half.
                    after_batch=lambda coded, before=turn * n: tell((n + (before + coded) // len(wanted)) // 2),
                )
            for step, rows in zip(steps, found, strict=True):
                written[step.folder.name] = write_part(step.folder, number, rows, decoded.rejects)
        tell(len(ids))
        return written, decoded.dim

    def _encoder(self, which: int) -> Encoder:
        """Loaded when it is first needed: an actor whose start fails cannot tell the driver why."""
        if which not in self.encoders:
            job = self.jobs[which]
            with named_by(job.field, job.model):
                self.encoders[which] = load_encoder(job.model, job.revision, self.device, job.dtype)
        return self.encoders[which]


def _written(steps: Sequence[SitePart], number: int) -> dict[str, Part] | None:
    """A part of each step; None where one lacks it."""
    try:
        return {step.folder.name: read_part(step.folder, number) for step in steps}
    except FileNotFoundError:
        return None


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
