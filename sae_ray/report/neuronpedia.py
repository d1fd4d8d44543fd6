"""The neurons of an SAE as Neuronpedia exchanges features: files that an instance of it imports.

Neuronpedia shows texts. An image is one token, its name; where a latent has heat maps, squares follow, one per patch
and a line per row, so that its page shades them by the latent's value there.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_ray.encoders.sources import model_name
from sae_ray.errors import SaeRayError, UsageError
from sae_ray.report.names import Named, read_names
from sae_ray.report.neurons import Neurons, read_neurons
from sae_ray.report.pictures import HEAT, finished_pictures
from sae_ray.scores.statistics import HISTOGRAM_EDGES
from sae_ray.store.files import Folder, parent_and_name
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import recalled_plan
from sae_ray.study.step_plans import TrainPlan

if TYPE_CHECKING:
    from jaxtyping import Float

CREATOR = "clkht01d40000jv08hvalcvly"
"""The user whom every instance of Neuronpedia has from the start; what is imported belongs to someone."""
PER_FILE = 1024
"""Features; as in the exports of Neuronpedia."""
PATCH = "■"


def write_neuronpedia(sae: Folder, out: Folder) -> Folder:
    """Writes the features of an SAE under `<model>/<source>`, as Neuronpedia's own exports lie. Returns that folder.

    Args:
        sae: The folder of the SAE's step, in the root of a study whose scores are there.

    Raises:
        UsageError: the folder is none of a study.
        SaeRayError: the SAE is not scored yet.
    """
    root, name = parent_and_name(sae.uri)
    if not root.exists("study.json"):
        raise UsageError(
            f"{sae} does not lie in the root of a study, where the images and scores of its latents are; name the "
            "folder of an SAE that `sae-ray run` trained, such as runs/demo/sae-projection-…"
        )
    plan = recalled_plan(root.uri)
    train = next((one for one in plan.trains if one.step.name == name), None)
    if train is None:
        raise UsageError(f"{sae} is no SAE of the study that {root} remembers; run that study again, or name another")
    export = _Export(plan, train)
    folder = out / export.model / export.source
    for file, row in export.facts().items():
        folder.write_bytes(f"{file}.jsonl", _lines([row]))
    for kind, rows_of in export.rows().items():
        for number, start in enumerate(range(0, train.d_sae, PER_FILE)):
            rows = [row for latent in range(start, min(start + PER_FILE, train.d_sae)) for row in rows_of(latent)]
            if rows:  # its importer takes the columns from the first one
                folder.write_bytes(f"{kind}/batch-{number}.jsonl.gz", gzip.compress(_lines(rows), 5, mtime=0))
    return folder


@dataclass(frozen=True)
class _Export:
    plan: StudyPlan
    train: TrainPlan

    @cached_property
    def neurons(self) -> Neurons:
        name = self.train.grid_cell.name
        found = read_neurons(self.plan, [name])
        if not found:
            raise SaeRayError(f"{name} is not scored yet; run the score stage first")
        return found[0]

    @cached_property
    def names(self) -> list[Named]:
        """Of its neurons, by method."""
        return read_names(self.plan, [self.neurons]).get(self.neurons.name, [])

    @cached_property
    def heat(self) -> dict[tuple[int, int], Float[np.ndarray, " patches"]]:
        """(latent, rank) -> the values on the patches of that top image; empty where there are no pictures."""
        pictures = finished_pictures(self.plan)
        if pictures is None:
            return {}
        table = pictures.step.folder.read_parquet(HEAT)
        rows = (row for row in table.to_pylist() if row["cell"] == self.neurons.name)
        return {(row["latent"], row["rank"]): np.array(row["map"]) for row in rows}

    @cached_property
    def vectors(self) -> Float[np.ndarray, "latents d_in"]:
        from sae_ray.sae import load_sae

        return load_sae(self.train.step.folder).W_dec.numpy()

    @cached_property
    def firing(self) -> Float[np.ndarray, " latents"]:
        """The share of activations on which each latent fires."""
        folder = self.train.step.folder
        if folder.exists("latents.parquet"):
            return folder.read_parquet("latents.parquet").sort_by("latent")["frequency"].to_numpy()
        return self.neurons.columns.n_firing / self.neurons.score.activations.images.n_images

    @property
    def model(self) -> str:
        return _id(model_name(self.plan.encoder.model))

    @property
    def set_name(self) -> str:
        """A source of Neuronpedia is named by its layer and its set."""
        return _id(re.sub(r"^layer\d+\.?", "", self.train.grid_cell.name))

    @property
    def layer(self) -> int:
        """Of the site; that after the last block for one that has none."""
        layer = self.train.grid_cell.site.layer
        return self.plan.encoder.n_layers if layer is None else layer

    @property
    def source(self) -> str:
        return f"{self.layer}-{self.set_name}"

    def facts(self) -> dict[str, dict[str, Any]]:
        """The one line of each file about the whole."""
        shown, site = model_name(self.plan.encoder.model), self.train.grid_cell.site.name
        release, creator = _id(self.plan.study.name), {"creatorId": CREATOR, "visibility": "PUBLIC"}
        described = f"SAE of {shown} at {site}, trained by sae-ray"
        return {
            "release": {
                "name": release,
                "description": described,
                "descriptionShort": self.plan.study.name,
                "urls": [],
                "creatorName": "sae-ray",
                **creator,
            },
            "model": {
                "id": self.model,
                "displayNameShort": shown,
                "displayName": shown,
                "layers": self.plan.encoder.n_layers + 1,
                "neuronsPerLayer": 0,
                "owner": "",
                **creator,
            },
            "sourceset": {
                "modelId": self.model,
                "name": self.set_name,
                "description": described,
                "type": "sae",
                "creatorName": "sae-ray",
                "urls": [],
                "releaseName": release,
                "hasDashboards": True,
                "allowInferenceSearch": False,
                **creator,
            },
            "source": {
                "id": self.source,
                "modelId": self.model,
                "setName": self.set_name,
                "dataset": self.neurons.pictures.name,
                "num_prompts": self.neurons.pictures.n_images,
                "num_tokens_in_prompt": 1,
                **creator,
            },
        }

    def rows(self) -> dict[str, Callable[[int], Iterable[dict[str, Any]]]]:
        """Folder -> the lines about a latent."""
        return {"features": self._features, "activations": self._activations, "explanations": self._explanations}

    def _place(self, latent: int) -> dict[str, Any]:
        return {"modelId": self.model, "layer": self.source, "index": str(latent)}

    def _features(self, latent: int) -> Iterator[dict[str, Any]]:
        counts = self.neurons.histogram[latent]
        filled = np.flatnonzero(counts)
        largest = max((one["maxValue"] for one in self._activations(latent)), default=0.0)
        yield {
            **self._place(latent),
            "sourceSetName": self.set_name,
            "creatorId": CREATOR,
            "maxActApprox": largest,
            "frac_nonzero": float(self.firing[latent]),
            # Parallel: the middle of each half octave, and the images in it.
            "freq_hist_data_bar_values": _rounded(np.sqrt(HISTOGRAM_EDGES[filled] * HISTOGRAM_EDGES[filled + 1])),
            "freq_hist_data_bar_heights": counts[filled].tolist(),
            "hasVector": True,
            "vector": _rounded(self.vectors[latent]),
            "vectorDefaultSteerStrength": largest,
            "hookName": self.train.grid_cell.site.name,
        }

    def _activations(self, latent: int) -> Iterator[dict[str, Any]]:
        """Of each top image, strongest first."""
        images, values = self.neurons.top_image[latent], self.neurons.top_activation[latent]
        for rank, (image, value) in enumerate(zip(images.tolist(), values.tolist(), strict=True)):
            if image < 0:
                return
            tokens, shown = self._tokens(latent, rank, image, value)
            best = int(np.argmax(shown))
            yield {
                "id": _unique(self.model, self.source, latent, rank),
                **self._place(latent),
                "tokens": tokens,
                "values": shown,
                "maxValue": shown[best],
                "maxValueTokenIndex": best,
                "minValue": min(shown),
                "dataIndex": str(image),
                "dataSource": self.neurons.pictures.name,
                "creatorId": CREATOR,
            }

    def _tokens(self, latent: int, rank: int, image: int, value: float) -> tuple[list[str], list[float]]:
        name = self.neurons.pictures.manifest["image_id"][image].as_py()
        patches = self.heat.get((latent, rank))
        if patches is None:
            return [name], _rounded(np.array([value]))
        _, columns = self.plan.encoder.patch_grid
        ends = ["\n" if place % columns == columns - 1 else "" for place in range(len(patches))]
        return [f"{name}\n", *(PATCH + end for end in ends)], [0.0, *_rounded(patches)]

    def _explanations(self, latent: int) -> Iterator[dict[str, Any]]:
        """Its names. Of methods, Neuronpedia has a list of its own, so they are notes."""
        for one in self.names:
            place = np.flatnonzero(self.neurons.order[one.place] == latent)
            if len(place):
                score = one.score[place[0]]
                yield {
                    "id": _unique(self.model, self.source, latent, one.method),
                    **self._place(latent),
                    "description": one.name[place[0]],
                    "authorId": CREATOR,
                    "notes": one.method + ("" if np.isnan(score) else f", score {score:.3g}"),
                }


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()


def _rounded(values: Float[np.ndarray, " n"]) -> list[float]:
    """To six significant digits, as JSON numbers."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def _id(name: str) -> str:
    """As Neuronpedia's addresses have it: lower case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "sae"


def _unique(*parts: object) -> str:
    return "c" + hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]
