"""The extraction stage: Ray Data streams images through encoder actors into the activation store.

One row of the dataset is one part, a fixed range of `image_index`. If encoders have GPUs, a task decodes its images,
otherwise the encoder's own actor. The actor encodes them batch by batch, and writes the part of every site (and of the
judge's embeddings) while it encodes the next one. A part depends on its images alone, so what a killed run finished is
not repeated.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock

import numpy as np
import pyarrow as pa

from sae_ray.encoders import Encoder, load_encoder, load_preprocess
from sae_ray.encoders.part import encode_part
from sae_ray.encoders.sites import Site
from sae_ray.errors import SaeRayError
from sae_ray.images.part import Preparation, decode_part
from sae_ray.store.activations import (
    REJECTS_SCHEMA,
    activation_table,
    finish_store,
    finished_parts,
    write_part,
    write_rejects,
)
from sae_ray.store.files import Folder
from sae_ray.store.steps import hold
from sae_ray.study.config import ExtractResources
from sae_ray.study.plan import ExtractPlan, ImagePlan, StudyPlan

from .cluster import gpus_or_default, n_cpus, n_gpus, require
from .progress import Progress, say
from .stage import at_work, unfinished


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
        todo = unfinished([extract for extract in wanted if extract.images is images])
        if todo:
            with at_work(plan.root, "extract", todo):
                _extract(images, todo, plan)


def _write_lists(images: ImagePlan) -> None:
    """The manifest and the labels."""
    for step, name in ((images.step, "manifest"), (images.labels_step, "labels")):
        if not step.finished:
            with hold([step]):
                started = time.monotonic()
                table = getattr(images, name)
                step.folder.write_parquet(f"{name}.parquet", table)
                step.finish(time.monotonic() - started, {"images": table.num_rows})


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
    steps: tuple[SitePart, ...]


def _extract(images: ImagePlan, todo: Sequence[ExtractPlan], plan: StudyPlan) -> None:
    started = time.monotonic()
    per_part = plan.study.extraction.images_per_part
    n_images = images.n_images
    n_parts = -(-n_images // per_part)
    present = {extract.step.name: finished_parts(extract.step.folder) for extract in todo}
    missing = [number for number in range(n_parts) if any(number not in parts for parts in present.values())]
    sizes = {number: min(per_part, n_images - number * per_part) for number in range(n_parts)}

    label = f"extract {images.name} ({', '.join(extract.site.name for extract in todo)})"
    done = n_images - sum(sizes[number] for number in missing)
    with Progress(label, n_images, "images", done) as progress:
        if missing:
            for number in _encoded(images, todo, missing, plan):
                progress.advance(sizes[number])

    seconds = time.monotonic() - started
    for extract in todo:
        _finish(extract, seconds, plan.study.images.max_bad_fraction)


def _encoded(images: ImagePlan, todo: Sequence[ExtractPlan], missing: Sequence[int], plan: StudyPlan) -> Iterator[int]:
    """Runs the dataset over the missing parts; yields the number of each part as it is written."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # progress is shown in our own way
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False

    jobs = _encoder_jobs(todo)
    resources = plan.study.resources.extract
    workers, gpus, decoders = _shares(resources)
    per_part = plan.study.extraction.images_per_part
    ids = images.manifest["image_id"]
    rows = [{"part": number, "image_ids": ids.slice(number * per_part, per_part).to_pylist()} for number in missing]
    decode = PartDecoder(
        images.folder,
        tuple(_preparation(job) for job in jobs),
    )
    dataset = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(
            decode,
            batch_size=1,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(size=min(decoders, len(rows))),
        )
        .map_batches(
            PartEncoder,
            fn_constructor_args=(jobs, "cuda" if gpus else "cpu", per_part, resources.batch_size, plan.study.seed),
            batch_size=1,
            batch_format="pyarrow",
            # Two parts at a time, so that one is written while the other is encoded.
            compute=ActorPoolStrategy(
                size=min(workers, len(rows)), max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
            ),
            num_cpus=resources.cpus,
            num_gpus=gpus,
        )
    )
    for row in dataset.iter_rows():
        if row["problem"]:
            raise SaeRayError(row["problem"])
        yield row["part"]


def _shares(resources: ExtractResources) -> tuple[int, float, int]:
    """Encoder actors, GPUs of each, decode tasks at once."""
    gpus = gpus_or_default(resources.gpus)
    # Without GPUs an actor decodes as well, two parts at a time.
    at_most = n_gpus() / gpus if gpus else n_cpus() / (2 * max(resources.cpus, 1))
    workers = resources.workers or max(1, int(at_most))
    # Ray decodes in the actors themselves where they ask for just what its tasks do, 1 CPU.
    fused = not gpus and resources.cpus == 1
    require("resources.extract", workers, resources.cpus, gpus, beside=0 if fused else 1)
    return workers, gpus, resources.decoders or max(1, int(n_cpus() - workers * resources.cpus))


def _encoder_jobs(todo: Sequence[ExtractPlan]) -> tuple[EncoderJob, ...]:
    by_encoder: dict[tuple[str, str | None, str, int | None], list[SitePart]] = {}
    for extract in todo:
        at_least = 2 * max(extract.info.image_size) if extract.step.config["pixels"] == "fast" else None
        # The revision resolved for the step: a branch may have moved since.
        key = (extract.info.model, extract.info.revision, extract.encoder.dtype, at_least)
        part = SitePart(extract.step.folder, extract.site, extract.step.config["store_dtype"])
        by_encoder.setdefault(key, []).append(part)
    return tuple(EncoderJob(*key, tuple(steps)) for key, steps in by_encoder.items())


def _preparation(job: EncoderJob) -> Preparation:
    return Preparation(load_preprocess(job.model, job.revision, job.at_least is not None), job.at_least)


class PartDecoder:
    """The task that decodes: {part, image_ids} -> the same with pixels for every encoder, and the rejects."""

    def __init__(self, folder: Folder, preparations: tuple[Preparation, ...]):
        """`preparations`: of every encoder."""
        self.folder = folder
        self.preparations = preparations

    def __call__(self, batch: pa.Table) -> pa.Table:
        decoded = decode_part(self.folder, batch["image_ids"][0].as_py(), self.preparations)
        batch = batch.append_column("accepted", pa.array([decoded.accepted], pa.list_(pa.int64())))
        batch = batch.append_column("rejects", pa.array([decoded.rejects], pa.list_(pa.struct(REJECTS_SCHEMA))))
        for number, pixels in enumerate(decoded.pixels):
            batch = batch.append_column(f"pixels_{number}", _one_value(pixels))
            batch = batch.append_column(f"shape_{number}", pa.array([pixels.shape]))
        return batch


def _one_value(array: np.ndarray) -> pa.Array:
    """A column of one row, whose value is the array's bytes; nothing is copied."""
    ends = np.array([0, array.nbytes], np.int64)
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(ends), pa.py_buffer(array.reshape(-1))])


class PartEncoder:
    """An actor that encodes parts and writes them; returns which part it wrote, or the error that prevented it."""

    def __init__(self, jobs: tuple[EncoderJob, ...], device: str, per_part: int, batch_size: int, seed: int):
        self.jobs = jobs
        self.device = device
        self.per_part = per_part
        self.batch_size = batch_size
        self.seed = seed
        self.encoding = Lock()
        # The pixels are only read.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

    def __call__(self, batch: pa.Table) -> pa.Table:
        part = batch["part"][0].as_py()
        try:
            self._write(part, batch)
            problem = ""
        except SaeRayError as error:  # as a row: an exception would reach the driver without its type
            problem = str(error)
        return pa.table({"part": [part], "problem": [problem]})

    @cached_property
    def encoders(self) -> list[Encoder]:
        """Loaded when they are first needed: an actor whose start fails cannot tell the driver why."""
        return [load_encoder(job.model, job.revision, self.device, job.dtype) for job in self.jobs]

    def _write(self, part: int, batch: pa.Table) -> None:
        ids = batch["image_ids"][0].as_py()
        accepted = batch["accepted"][0].as_py()
        rejects = [(reject["image_id"], reject["reason"]) for reject in batch["rejects"][0].as_py()]
        image_index = part * self.per_part + np.asarray(accepted, dtype=np.int64)
        image_ids = [ids[position] for position in accepted]
        for number, job in enumerate(self.jobs):
            pixels = np.frombuffer(batch[f"pixels_{number}"][0].as_buffer(), dtype=np.uint8)
            pixels = pixels.reshape(batch[f"shape_{number}"][0].as_py())
            sites = [step.site for step in job.steps]
            with self.encoding:
                found = encode_part(
                    self.encoders[number], sites, pixels, image_index, image_ids, self.seed, self.batch_size
                )
            for step, rows in zip(job.steps, found, strict=True):
                write_part(step.folder, part, activation_table(*rows, step.store_dtype), rejects)


def _finish(extract: ExtractPlan, seconds: float, max_bad_fraction: float) -> None:
    images = extract.images
    rejects = write_rejects(extract.step.folder)
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
    finish_store(extract.step, extract.width, seconds)


if __name__ == "__main__":
    from .cli import extract as command

    command()
