"""The extraction stage: Ray Data streams images through encoder actors into the activation store.

One row of the dataset is one part, a fixed range of `image_index`. Its images are decoded: where encoders have GPUs in
a task, else in the encoder's own actor. That actor encodes them batch by batch and writes the part of every site, the
judge's embeddings included, while it encodes the next one. Thus a part is a function of its images alone, and what a
killed run finished is not done again.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock

import numpy as np
import pyarrow as pa

from sae_ray.encoders import Encoder, load_encoder, load_preprocess, site_width
from sae_ray.encoders.sites import Site
from sae_ray.errors import SaeRayError
from sae_ray.images import BadImage, decode_image
from sae_ray.store.activations import (
    REJECTS_SCHEMA,
    activation_table,
    finished_parts,
    read_parts,
    remove_orphans,
    write_part,
)
from sae_ray.store.files import Folder
from sae_ray.store.steps import hold
from sae_ray.study.config import ExtractResources
from sae_ray.study.plan import ExtractPlan, ImagePlan, StudyPlan

from .cluster import connect, gpus_or_default, n_cpus, n_gpus, require
from .disk import check_disk
from .progress import Progress, say


def run(plan: StudyPlan) -> None:
    """Writes the manifests, then extracts whatever site of either image set is not there yet.

    Raises:
        SaeRayError: too many images are bad, a value overflows the stored dtype, the disk is too full, another driver
            is at work on the same step.
    """
    run_only(plan, plan.extracts)


def run_only(plan: StudyPlan, wanted: Sequence[ExtractPlan]) -> None:
    """As `run`, for some of the sites or for one that the study itself does not need."""
    for images in plan.images.values():
        _write_manifest(images)
        todo = [extract for extract in wanted if extract.images is images and not extract.step.finished]
        if todo:
            check_disk(plan.root, "extract", sum(extract.bytes for extract in todo))
            with hold([extract.step for extract in todo]):
                _extract(images, todo, plan)


def _write_manifest(images: ImagePlan) -> None:
    if images.step.finished:
        return
    with hold([images.step]):
        started = time.monotonic()
        images.step.folder.write_parquet("manifest.parquet", images.manifest)
        images.step.finish(time.monotonic() - started, {"images": len(images.manifest)})


@dataclass(frozen=True)
class SitePart:
    """What an encoder actor needs to know of one step."""

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
    """Of fast pixels: how many per side a JPEG must have that is decoded at reduced size. None makes exact ones."""
    steps: tuple[SitePart, ...]


def _extract(images: ImagePlan, todo: Sequence[ExtractPlan], plan: StudyPlan) -> None:
    started = time.monotonic()
    per_part = plan.study.extraction.images_per_part
    n_images = len(images.manifest)
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
    connect()
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
        tuple((load_preprocess(job.model, job.revision, job.at_least is not None), job.at_least) for job in jobs),
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
        # The revision that was resolved for the step, whatever its name means by now.
        key = (extract.info.model, extract.info.revision, extract.encoder.dtype, at_least)
        part = SitePart(extract.step.folder, extract.site, extract.step.config["store_dtype"])
        by_encoder.setdefault(key, []).append(part)
    return tuple(EncoderJob(*key, tuple(steps)) for key, steps in by_encoder.items())


class PartDecoder:
    """Reads the images of a part: {part, image_ids} -> the same with pixels for every encoder, and the rejects."""

    def __init__(self, folder: Folder, preprocesses: tuple[tuple[Callable, int | None], ...]):
        """`preprocesses`: of every encoder, with the `at_least` of its job."""
        self.folder = folder
        self.preprocesses = preprocesses

    def __call__(self, batch: pa.Table) -> pa.Table:
        accepted, rejects = [], []
        pixels: list[list[np.ndarray]] = [[] for _ in self.preprocesses]
        for position, image_id in enumerate(batch["image_ids"][0].as_py()):
            try:
                prepared = self._prepared(self.folder.read_bytes(image_id))
            except BadImage as error:
                rejects.append((image_id, str(error)))
                continue
            except FileNotFoundError:
                rejects.append((image_id, "vanished since it was listed"))
                continue
            except PermissionError:
                rejects.append((image_id, "no permission to read it"))
                continue
            accepted.append(position)
            for column, array in zip(pixels, prepared, strict=True):
                column.append(array)
        batch = batch.append_column("accepted", pa.array([accepted], pa.list_(pa.int64())))
        batch = batch.append_column("rejects", pa.array([rejects], pa.list_(pa.struct(REJECTS_SCHEMA))))
        for number, column in enumerate(pixels):
            shape = column[0].shape if column else (3, 0, 0)
            array = np.empty((len(column), *shape), np.uint8)
            for place, one in enumerate(column):
                array[place] = one
            batch = batch.append_column(f"pixels_{number}", _one_value(array))
            batch = batch.append_column(f"shape_{number}", pa.array([array.shape]))
        return batch

    def _prepared(self, data: bytes) -> list[np.ndarray]:
        images = {
            at_least: decode_image(data, at_least=at_least) for at_least in {least for _, least in self.preprocesses}
        }
        return [preprocess(images[at_least]) for preprocess, at_least in self.preprocesses]


def _one_value(array: np.ndarray) -> pa.Array:
    """A column of one row, whose value is the array's bytes; nothing is copied."""
    ends = np.array([0, array.nbytes], np.int64)
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(ends), pa.py_buffer(array.reshape(-1))])


class PartEncoder:
    """An actor that encodes parts and writes them; returns which part it wrote, or what stood in its way."""

    def __init__(self, jobs: tuple[EncoderJob, ...], device: str, per_part: int, batch_size: int, seed: int):
        self.jobs = jobs
        self.device = device
        self.per_part = per_part
        self.batch_size = batch_size
        self.seed = seed
        self.encoding = Lock()
        # The pixels are only read, and copied to nowhere but the device.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

    def __call__(self, batch: pa.Table) -> pa.Table:
        part = batch["part"][0].as_py()
        try:
            self._write(part, batch)
            problem = ""
        except SaeRayError as error:  # as a row: raised, it would reach the driver without its type
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
            with self.encoding:
                tables = self._tables(self.encoders[number], job.steps, pixels, image_index, image_ids)
            for step, table in zip(job.steps, tables, strict=True):
                write_part(step.folder, part, table, rejects)

    def _tables(
        self,
        encoder: Encoder,
        steps: Sequence[SitePart],
        pixels: np.ndarray,
        image_index: np.ndarray,
        image_ids: Sequence[str],
    ) -> list[pa.Table]:
        import torch

        pieces: list[list[pa.Table]] = [[] for _ in steps]
        for start in range(0, len(pixels), self.batch_size):
            batch = slice(start, start + self.batch_size)
            tensor = torch.from_numpy(pixels[batch])
            tapped = encoder.tap(tensor, [step.site for step in steps], image_ids[batch], self.seed)
            for step, tables in zip(steps, pieces, strict=True):
                rows = tapped[step.site]
                index = image_index[batch][rows.position.cpu().numpy()]
                activation = rows.activation.cpu().numpy()
                tables.append(activation_table(index, rows.token.cpu().numpy(), activation, step.store_dtype))
        empty = np.zeros(0, dtype=np.int64)
        for step, tables in zip(steps, pieces, strict=True):
            if not tables:
                nothing = np.zeros((0, site_width(encoder.info, step.site)), dtype=np.float32)
                tables.append(activation_table(empty, empty, nothing, step.store_dtype))
        return [pa.concat_tables(tables) for tables in pieces]


def _finish(extract: ExtractPlan, seconds: float, max_bad_fraction: float) -> None:
    folder = extract.step.folder
    parts = read_parts(folder)
    remove_orphans(folder, parts)
    rejects = [reject for part in parts for reject in part.rejects]
    n_images = len(extract.images.manifest)
    ids, reasons = ([reject[column] for reject in rejects] for column in range(2))
    folder.write_parquet("rejects.parquet", pa.table([ids, reasons], schema=REJECTS_SCHEMA))
    if len(rejects) > max_bad_fraction * n_images or len(rejects) == n_images:
        listed = "\n".join(f"  {image_id}: {reason}" for image_id, reason in rejects[:20])
        more = f"\n  … and {len(rejects) - 20:,} more" if len(rejects) > 20 else ""
        raise SaeRayError(
            f"{len(rejects):,} of {n_images:,} images in {extract.images.folder} could not be read, more than "
            f"images.max_bad_fraction = {max_bad_fraction:g} allows (all: {folder / 'rejects.parquet'}):\n"
            f"{listed}{more}\nmend or remove them, or raise the fraction"
        )
    if rejects:
        say(f"{extract.step.label}: {len(rejects):,} of {n_images:,} images could not be read (see rejects.parquet)")
    counts = {
        "images": sum(part.images for part in parts),
        "rejects": len(rejects),
        "rows": sum(part.rows for part in parts),
        "width": extract.width,
    }
    extract.step.finish(seconds, counts)


if __name__ == "__main__":
    from .cli import extract as command

    command()
