"""The pictures of a report: thumbnails in sprites, and heat maps. They are a step of their own, made sprite by sprite.

The step's directory holds `sprites/<n>.jpg` and `heat.parquet`. While it is made, `parts/<n>.parquet` holds the heat
maps of a sprite's images, and `parts/<n>.json`, written last, makes the sprite exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from sae_ray.encoders import load_preprocess
from sae_ray.encoders.sources import named_by
from sae_ray.images import BadImage, decode_image
from sae_ray.images.part import READS_AT_ONCE, read_file
from sae_ray.images.rendering import Rendering
from sae_ray.report.album import SIDE, Album, sprite_of, thumbnail_size
from sae_ray.report.heat import HeatCell, HeatMaker, HeatMaps, heat_cells
from sae_ray.report.neurons import Neurons, read_neurons, shown_cells
from sae_ray.report.steering import SteeringResult, read_steering
from sae_ray.store.files import Folder
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import PicturesPlan

if TYPE_CHECKING:
    from sae_ray.encoders import Encoder

BLOCK = 32
"""How many neurons of a cell have their images numbered together, so that they share sprites."""
BATCH = 32
"""Images per forward pass."""
HEAT = "heat.parquet"
HEAT_SCHEMA = pa.schema(
    [("cell", pa.string()), ("latent", pa.int32()), ("rank", pa.int16()), ("map", pa.list_(pa.float32()))]
)
"""`map`: the latent's value on each patch of its top image of this rank, row by row."""


def finished_pictures(plan: StudyPlan) -> PicturesPlan | None:
    """Those of the cells that are scored; None where they are not made yet or could not be, or there are no images."""
    if plan.imported is not None:
        return None
    pictures = plan.pictures_of(shown_cells(plan))
    return pictures if pictures.step.finished and not pictures.step.failure else None


class Shown:
    """What a report shows: the cells of some pictures, and steering with them."""

    def __init__(self, plan: StudyPlan, pictures: PicturesPlan):
        self.cells: list[Neurons] = read_neurons(plan, {score.name for score in pictures.scores})
        steered = {one.name for one in pictures.steerings}
        self.steering: list[SteeringResult] = [one for one in read_steering(plan) if one.plan.name in steered]
        self.album = Album(list(plan.images.values()), [*self._answered(), *self._in_turn()])

    @property
    def heat_cells(self) -> list[HeatCell]:
        """The cells that get heat maps, each with its best latents and those of steering."""
        return heat_cells(self.cells, {result.plan.name: result.best for result in self.steering})

    def _answered(self) -> Iterator[tuple[str, np.ndarray]]:
        for result in self.steering:
            yield result.plan.heldout.name, np.array([one.image_index for one in result.examples], dtype=np.int64)

    def _in_turn(self) -> Iterator[tuple[str, np.ndarray]]:
        """Top images in blocks of neurons: first the best few neurons of all cells, then the next few, and so on."""
        for start in range(0, max((len(cell.order) for cell in self.cells), default=0), BLOCK):
            for cell in self.cells:
                yield cell.pictures.name, cell.top_image[cell.order[start : start + BLOCK]].astype(np.int64)


class Wanted(NamedTuple):
    """A heat map to make."""

    place: int
    """Of the image in its sprite."""
    cell: int
    """Place among the cells of the job."""
    latent: int
    """Place among the cell's latents."""
    rank: int


class Sprite(NamedTuple):
    """A sprite to make."""

    number: int
    images: list[tuple[str, str]]
    """Image set and `image_id`."""
    heat: list[Wanted]


@dataclass(frozen=True)
class PicturesJob:
    """What is common to all sprites."""

    step: Folder
    model: str
    revision: str | None
    dtype: str
    seed: int
    size: tuple[int, int]
    """Height and width of a thumbnail."""
    folders: dict[str, Folder]
    """Of the image sets."""
    rendering: Rendering
    cells: tuple[HeatCell, ...]


def pictures_job(
    plan: StudyPlan, pictures: PicturesPlan, shown: Shown, cells: Sequence[HeatCell]
) -> tuple[PicturesJob, list[Sprite]]:
    """The work, and the sprites that are not made yet. `cells` get heat maps."""
    job = PicturesJob(
        pictures.step.folder,
        plan.encoder.model,
        plan.encoder.revision,
        plan.study.encoder.dtype,
        plan.study.seed,
        thumbnail_size(plan.encoder.image_size),
        {name: images.folder for name, images in plan.images.items()},
        plan.study.images.rendering,
        tuple(cells),
    )
    album, sprites = shown.album, shown.album.sprites
    present = (pictures.step.folder / "parts").files()
    heat: list[list[Wanted]] = [[] for _ in sprites]
    by_name = {cell.name: cell for cell in shown.cells}
    for number, cell in enumerate(cells):
        neurons = by_name[cell.name]
        images = album.numbers(neurons.pictures.name, neurons.top_image[list(cell.latents)])
        for latent, rank in zip(*np.nonzero((images >= 0) & (images < album.n_pictured)), strict=True):
            sprite, place = divmod(int(images[latent, rank]), SIDE**2)
            heat[sprite].append(Wanted(place, number, int(latent), int(rank)))
    missing = [number for number in range(len(sprites)) if f"{number}.json" not in present]
    return job, [Sprite(number, [_image(album, one) for one in sprites[number]], heat[number]) for number in missing]


def _image(album: Album, number: int) -> tuple[str, str]:
    images, _ = album.image(number)
    return images.name, album.name(number)


def make_sprite(
    job: PicturesJob, sprite: Sprite, device: str = "cpu", after_batch: Callable[[int], None] = lambda done: None
) -> None:
    """Writes a sprite and the heat maps of its images.

    `after_batch` is called with the number of images done.

    Raises SaeRayError if the encoder cannot be loaded, or this node does not have the images.
    """
    preprocess = _preprocess(job.model, job.revision)
    with ThreadPoolExecutor(READS_AT_ONCE) as readers:
        reads = [readers.submit(read_file, job.folders[images], image_id) for images, image_id in sprite.images]
        pixels = [_pixels(read, preprocess, job.rendering) for read in reads]
    rows = list(_heat_rows(job, sprite, pixels, device, after_batch))
    job.step.write_parquet(f"parts/{sprite.number}.parquet", pa.Table.from_pylist(rows, HEAT_SCHEMA))
    job.step.write_bytes(f"sprites/{sprite.number}.jpg", sprite_of(pixels, job.size))
    job.step.write_json(f"parts/{sprite.number}.json", {"missing": sum(one is None for one in pixels)})


def _pixels(read: Future[bytes], preprocess: Callable, rendering: Rendering) -> np.ndarray | None:
    """The image as the encoder sees it; None if it can no longer be read."""
    try:
        return preprocess(decode_image(read.result(), rendering=rendering))
    except BadImage:
        return None


@lru_cache(maxsize=1)
def _preprocess(model: str, revision: str | None) -> Callable:
    with named_by("encoder.model", model):
        return load_preprocess(model, revision)


def _heat_rows(
    job: PicturesJob,
    sprite: Sprite,
    pixels: Sequence[np.ndarray | None],
    device: str,
    after_batch: Callable[[int], None],
) -> Iterator[dict]:
    wanted: dict[tuple[int, int], list[Wanted]] = {}
    for one in sprite.heat:
        wanted.setdefault((one.place, one.cell), []).append(one)
    needed = {one.place for one in sprite.heat}
    places = [place for place, one in enumerate(pixels) if one is not None and place in needed]
    if not places:
        return
    import torch

    encoder, makers = _loaded(job.model, job.revision, device, job.dtype, job.cells)
    sites = list({maker.site for maker in makers})
    for start in range(0, len(places), BATCH):
        batch = places[start : start + BATCH]
        stacked = torch.from_numpy(np.stack([one for place in batch if (one := pixels[place]) is not None]))
        tapped = encoder.tap(stacked, sites, [sprite.images[place][1] for place in batch], job.seed)
        for number, (cell, maker) in enumerate(zip(job.cells, makers, strict=True)):
            maps = maker.maps(tapped[maker.site].activation, len(batch))
            for place, of_image in zip(batch, maps, strict=True):
                for one in wanted.get((place, number), ()):
                    latent, values = cell.latents[one.latent], of_image[:, one.latent]
                    yield {"cell": cell.name, "latent": latent, "rank": one.rank, "map": values}
        after_batch(batch[-1] + 1)


@lru_cache(maxsize=1)
def _loaded(
    model: str, revision: str | None, device: str, dtype: str, cells: tuple[HeatCell, ...]
) -> tuple[Encoder, list[HeatMaker]]:
    from sae_ray.encoders import load_encoder

    with named_by("encoder.model", model):
        encoder = load_encoder(model, revision, device, dtype)
    return encoder, [HeatMaker(cell, encoder) for cell in cells]


def finish_pictures(pictures: PicturesPlan, album: Album, seconds: float) -> None:
    """Finishes the step, whose sprites are all made."""
    folder = pictures.step.folder
    numbers = range(len(album.sprites))
    maps = [HEAT_SCHEMA.empty_table(), *(folder.read_parquet(f"parts/{number}.parquet") for number in numbers)]
    heat = pa.concat_tables(maps).sort_by([(name, "ascending") for name in ("cell", "latent", "rank")])
    folder.write_parquet(HEAT, heat)
    missing = sum(folder.read_json(f"parts/{number}.json")["missing"] for number in numbers)
    counts = {"images": album.n_pictured, "missing": missing, "heat_maps": heat.num_rows}
    pictures.step.finish(seconds, counts)


def read_heat(pictures: PicturesPlan, cells: Sequence[HeatCell], shape: tuple[int, int, int]) -> dict[str, HeatMaps]:
    """The heat maps of the cells.

    Args:
        pictures: finished.
        cells: those that got heat maps.
        shape: top images per latent, and rows and columns of the patch grid.
    """
    table = pictures.step.folder.read_parquet(HEAT)
    names, latent, rank = (table[name].to_numpy() for name in ("cell", "latent", "rank"))
    maps = table["map"].combine_chunks().flatten().to_numpy().reshape(-1, *shape[1:])
    found = {}
    for cell in cells:
        mine = names == cell.name
        of_cell = np.full((len(cell.latents), *shape), np.nan, dtype=np.float32)
        of_cell[np.searchsorted(cell.latents, latent[mine]), rank[mine]] = maps[mine]
        found[cell.name] = HeatMaps(np.array(cell.latents, dtype=np.int64), of_cell)
    return found
