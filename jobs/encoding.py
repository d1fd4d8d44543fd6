"""What works on an extraction: actors that decode runs of parts, encode them and write them, and tasks that decode for
them.

Ray repeats what a lost process did, without end. So attempts are counted, but for those lost with a whole node: a part
that was in work when its process ended is decoded image by image in a process of its own, and one that still ends its
process is an error.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from threading import Lock, Semaphore
from typing import Any

from sae_ray.encoders import Encoder, load_encoder, load_preprocess
from sae_ray.encoders.on_gpu import check_decoder, decoded_on_gpu
from sae_ray.encoders.part import encode_part
from sae_ray.encoders.sites import Site
from sae_ray.encoders.sources import named_by
from sae_ray.errors import SaeRayError, UsageError
from sae_ray.images.part import DecodedPart, Preparation, decode_part
from sae_ray.images.rendering import Rendering
from sae_ray.store.activations import Part, part_name, read_part, write_part
from sae_ray.store.attempts import begin
from sae_ray.store.files import Folder
from sae_ray.store.steps import check_shared
from sae_ray.store.tables import StoredTable
from sae_ray.study.step_plans import ExtractPlan

from .progress import StageBoard

REPORT_SECONDS = 1.0
"""Between two reports on a part: more of them from hundreds of workers would drown the board."""
USUAL_SIZE = (640, 480)
"""Of a photograph."""
MOST_TRIES = 5
"""How often a part may be begun while the driver lives."""


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
    compiled: bool = False
    """Whether torch compiles its blocks."""
    on_gpu: bool = False
    """Whether the encoder's GPU decodes JPEGs."""


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
        self.preparations = [preparation(job) for job in jobs]
        self.for_gpu = any(job.on_gpu for job in jobs)

    def __call__(self, images: str, part: int, after_image: Callable[[int], None] = lambda done: None) -> DecodedPart:
        """Its pixels for each encoder that has steps of these images, in order.

        Raises SaeRayError where the part has ended its process too often.
        """
        source = self.sources[images]
        begun = begin_part(self.jobs, images, part, self.run)
        ids, sizes = source.images(part)
        if begun >= MOST_TRIES:
            raise SaeRayError(
                f"part {part} of images.{images} ({ids[0]} to {ids[-1]}) crashed its process {MOST_TRIES} times; if "
                "memory ran out, lower extraction.images_per_part or resources.extract.batch_size"
            )
        used = self.preparations_of(images)
        return decode_part(source.folder, ids, used, begun > 0, after_image, self.rendering, sizes, self.for_gpu)

    def preparations_of(self, images: str) -> list[Preparation]:
        """Those of the encoders that have steps of these images."""
        return [one for one, job in zip(self.preparations, self.jobs, strict=True) if images in job.steps]


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


def job_of(extract: ExtractPlan) -> EncoderJob:
    """The encoder of a step, without any steps."""
    info = extract.info
    pixels, encoder = extract.step.config["pixels"], extract.encoder
    at_least = 2 * max(info.image_size) if pixels == "fast" else None
    # The revision resolved for the step: a branch may have moved since.
    identity = info.model, info.revision, encoder.dtype, at_least
    return EncoderJob(*identity, extract.field, {}, compiled=encoder.compile, on_gpu=pixels == "gpu")


def preparation(job: EncoderJob) -> Preparation:
    """What the encoder does to an image."""
    with named_by(job.field, job.model):
        preprocess = load_preprocess(job.model, job.revision, job.at_least is not None)
        if job.on_gpu and preprocess.cut(USUAL_SIZE) is None:
            raise UsageError(
                "its preprocessing does more than resize, bilinearly or bicubically, and crop, which is all that "
                "extraction.pixels = 'gpu' can do; choose exact or fast"
            )
        return Preparation(preprocess, job.at_least)


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

    def __init__(
        self, decode: PartDecoder, decoders: int | None, device: str, batch_size: int, seed: int, board: StageBoard
    ):
        """`decoders`: tasks that decode for this actor at the same time; None: it decodes itself."""
        import ray

        self.decoder = decode
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
        self.on_gpu = Semaphore(2) if decode.for_gpu else nullcontext()  # more parts' pixels would not speed it up
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
            self.board.set(piece, total)

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
        finally:
            for part in work.values():
                part.cancel()
        self.board.set(piece, 0)  # the driver counts it now
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
        ids, _ = source.images(number)
        with self.on_gpu:
            pixels = decoded.pixels
            if self.decoder.for_gpu:
                decoded, pixels = self._decoded_on_gpu(images, decoded, ids, encoders)
            image_index = number * source.per_part + decoded.accepted
            image_ids, n = [ids[place] for place in decoded.accepted], len(decoded.accepted)
            batch_size = min(self.batch_size, source.per_part)

            written = {}
            for turn, (steps, encoder, shown) in enumerate(zip(wanted.values(), encoders, pixels, strict=True)):
                sites = [(step.site, step.store_dtype) for step in steps]
                with self.encoding:
                    found = encode_part(
                        *(encoder, sites, shown, image_index, image_ids, self.seed, batch_size),
                        # Decoding was the other half.
                        after_batch=lambda coded, before=turn * n: tell((n + (before + coded) // len(wanted)) // 2),
                    )
                for step, rows in zip(steps, found, strict=True):
                    written[step.folder.name] = write_part(step.folder, number, rows, decoded.rejects)
        tell(len(ids))
        return written, decoded.dim

    def _decoded_on_gpu(self, images: str, decoded: DecodedPart, ids: list[str], encoders: list[Encoder]) -> Any:
        sizes = [encoder.info.image_size for encoder in encoders]
        used, rendering = self.decoder.preparations_of(images), self.decoder.rendering
        return decoded_on_gpu(decoded, ids, used, sizes, encoders[0].device, rendering)

    def _encoder(self, which: int) -> Encoder:
        """Loaded when it is first needed: an actor whose start fails cannot tell the driver why."""
        if which not in self.encoders:
            job = self.jobs[which]
            with named_by(job.field, job.model):
                encoder = load_encoder(job.model, job.revision, self.device, job.dtype)
                if job.compiled:
                    encoder.compile()
            if job.on_gpu:
                check_decoder(encoder.device)
            self.encoders[which] = encoder
        return self.encoders[which]


def _written(steps: Sequence[SitePart], number: int) -> dict[str, Part] | None:
    """A part of each step; None where one lacks it."""
    try:
        return {step.folder.name: read_part(step.folder, number) for step in steps}
    except FileNotFoundError:
        return None
