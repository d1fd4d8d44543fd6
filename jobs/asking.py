"""Questions for the study's LLaVA: Ray actors answer them in blocks of fixed size and write each block as one part.

So a killed run redoes at most one block per actor, and the answers do not depend on the number of actors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from sae_ray.concepts.labelling import image_classes
from sae_ray.encoders.sources import named_by
from sae_ray.errors import SaeRayError
from sae_ray.images import decode_image
from sae_ray.images.grid import grid_of
from sae_ray.images.part import read_file
from sae_ray.images.rendering import Rendering
from sae_ray.sae import SAE, load_sae
from sae_ray.steering.config import Steering
from sae_ray.steering.llava import Llava, load_llava
from sae_ray.steering.protocol import WHITE, Question, usable_images
from sae_ray.steering.respondent import Directions, Respondent
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step, check_shared, digest
from sae_ray.study.config import SteeringResources
from sae_ray.study.step_plans import ImagePlan, TrainPlan

from .cluster import RETRIES, gpus_or_default, n_gpus, require
from .progress import Progress

if TYPE_CHECKING:
    from PIL import Image

QUESTIONS_PER_BLOCK = 256
NO_DIRECTIONS = Directions()
ImageId = str | tuple[str, ...]
"""Of an image, or of several that are shown in a grid."""


class AskingPlan(Protocol):
    """The plan of a step that asks about an SAE."""

    @property
    def name(self) -> str:
        """Name of the cell."""
        ...

    @property
    def sae(self) -> TrainPlan: ...

    @property
    def step(self) -> Step: ...


class Images:
    """One image set to ask questions about.

    Args:
        ignored: classes whose images are left out.
        extracted: the folder of a step that says which images could be read.
    """

    def __init__(self, plan: ImagePlan, ignored: Sequence[str], extracted: Folder):
        rejected = set(extracted.read_parquet("rejects.parquet")["image_id"].to_pylist())
        self.folder, self.rendering = plan.folder, plan.rendering
        self.files: list[str] = plan.manifest["image_id"].to_pylist()
        self.ids: Sequence[ImageId] = self.files
        """What an index in a question stands for."""
        label_names = plan.labels["label_name"].to_pylist()
        self.classes = image_classes(plan.labels, ignored)
        self.usable = usable_images(self.files, label_names, rejected, ignored)
        self.labels = set(label_names) - {None, *ignored}

    def picture(self, index: int) -> Image.Image:
        """One of the images."""
        return decode_image(read_file(self.folder, self.files[index]), rendering=self.rendering)

    def in_grids(self, rows: Sequence[Sequence[int]]) -> Images:
        """Grids of these images, to ask questions about by their places in `rows`."""
        grids = copy(self)
        grids.ids = [tuple(self.files[index] for index in row) for row in rows]
        return grids


class Actor:
    """Holds a LLaVA and the SAE that it was last asked about; both are loaded when they are needed.

    An error in the constructor would kill it and reach the driver without its type.
    """

    def __init__(self, steering: Steering, batch_size: int, on_gpu: bool):
        self.steering = steering
        self.batch_size = batch_size
        self.device = "cuda" if on_gpu else "cpu"
        self._sae = lru_cache(maxsize=1)(self._load_sae)

    def answer(
        self,
        step: Folder,
        sae: Folder,
        directions: Directions,
        folder: Folder,
        file: str,
        asked: Sequence[Question],
        images: Folder,
        ids: Mapping[int, ImageId],
        rendering: Rendering,
    ) -> int | SaeRayError:
        """Answers one block, writes its part, and returns the number of answers or the error."""

        def image(index: int) -> Image.Image:
            found = ids[index]
            if isinstance(found, str):
                return decoded(found)
            return grid_of([decoded(one) for one in found])

        def decoded(image_id: str) -> Image.Image:
            return decode_image(read_file(images, image_id), rendering=rendering)

        try:
            check_shared(step)
            respondent = Respondent(self._llava, self._sae(sae), directions, self.steering)
            answers = respondent.answers(asked, image, self.batch_size)
        except SaeRayError as error:  # not raised: Ray would also report errors that the driver no longer waits for
            return error
        folder.write_parquet(file, pa.table({"answer": answers}))
        return len(answers)

    @cached_property
    def _llava(self) -> Llava:
        steering = self.steering
        with named_by("steering.llava", steering.llava):
            return load_llava(steering.llava, steering.revision, self.device, steering.dtype)

    def _load_sae(self, folder: Folder) -> SAE:
        return load_sae(folder).to(self.device)


class Actors:
    """The actors of a stage, or of one after the other; they stop when nobody holds them."""

    def __init__(self, steering: Steering, resources: SteeringResources, kind: type[Actor] = Actor):
        import ray
        from ray.util import ActorPool

        self.steering = steering
        gpus = gpus_or_default(resources.gpus)
        n_actors = resources.workers or (max(1, int(n_gpus() / gpus)) if gpus else 1)
        require("resources.steering", n_actors, resources.cpus, gpus)
        actor = ray.remote(num_cpus=resources.cpus, num_gpus=gpus, max_restarts=RETRIES, max_task_retries=RETRIES)(kind)
        self.all: list[Any] = [actor.remote(steering, resources.batch_size, gpus > 0) for _ in range(n_actors)]
        self._pool = ActorPool(self.all)

    def map(self, submit: Callable[[Any, Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """The results of the calls that `submit` makes of an actor and an item, in order."""
        return self._pool.map(submit, items)  # pyright: ignore[reportArgumentType, reportReturnType]

    def answers(
        self,
        plan: AskingPlan,
        phase: str,
        asked: Sequence[Question],
        images: Images,
        directions: Directions = NO_DIRECTIONS,
    ) -> list[str]:
        """The answers to all questions, in order. Answers of finished parts are read, not asked again.

        A part is named after its questions, so parts of other questions or of another block size are not taken for it.

        Args:
            phase: a folder of the step, for these images alone.
            directions: what the questions add.
        """
        folder = plan.step.folder / phase
        blocks = [asked[start : start + QUESTIONS_PER_BLOCK] for start in range(0, len(asked), QUESTIONS_PER_BLOCK)]
        files = [f"part-{number:05d}-{digest(block)[:16]}.parquet" for number, block in enumerate(blocks)]
        present = folder.files()
        missing = [place for place, file in enumerate(files) if file not in present]
        of_all = (plan.step.folder, plan.sae.step.folder, directions, folder)

        def submit(actor: Any, place: int) -> Any:
            wanted = {question.image_index for question in blocks[place]} - {WHITE}
            ids = {index: images.ids[index] for index in wanted}
            return actor.answer.remote(*of_all, files[place], blocks[place], images.folder, ids, images.rendering)

        done = len(asked) - sum(len(blocks[place]) for place in missing)
        label = f"{plan.step.stage} {plan.name}: {phase}"
        with Progress(label, len(asked), "answers", done, [plan.step]) as progress:
            answered: Any = self._pool.map_unordered(submit, missing)
            for found in answered:
                if isinstance(found, SaeRayError):
                    raise found
                progress.advance(found)
        return [answer for file in files for answer in folder.read_parquet(file)["answer"].to_pylist()]
