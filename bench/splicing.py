"""What a CLIP still knows with an SAE's reconstruction in place of its activations: python -m bench.splicing ROOT

Of a finished study of the embedded world: zero-shot accuracy of shapes on the held-out images, for every SAE. The mean
activation that ablation puts in place is that of the training images.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from bench.record import Table, record
from sae_ray.concepts.labelling import image_classes
from sae_ray.encoders import Encoder, load_encoder, load_preprocess
from sae_ray.encoders.text import load_text_encoder
from sae_ray.images.part import Preparation, decode_part
from sae_ray.sae import load_sae
from sae_ray.steering.splicing import PROJECTION, Spliced, count_spliced, outputs_at, zero_shot
from sae_ray.store.activations import ActivationStore
from sae_ray.study.plan import ImagePlan, StudyPlan
from sae_ray.study.root import recalled_plan
from sae_ray.world.render import SHAPES, article

BATCH = 500
COLUMNS = ["SAE", "R²", "original", "reconstruction", "mean ablation", "zeros", "recovered"]


def batches(images: ImagePlan, model: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels and classes of all images that can be read."""
    ids, shapes = images.manifest["image_id"].to_pylist(), list(SHAPES)
    classes = [shapes.index(one) if one in shapes else -1 for one in image_classes(images.labels)]
    preparations = [Preparation(load_preprocess(model))]
    for start in range(0, len(ids), BATCH):
        accepted, _, [pixels], _ = decode_part(images.folder, ids[start : start + BATCH], preparations)
        yield torch.from_numpy(pixels), torch.tensor([classes[start + place] for place in accepted])


def mean_of(store: ActivationStore) -> Tensor:
    total, n = np.zeros(store.d), 0
    for part in store.parts:
        activation = store.read(part)[2].astype(np.float64)
        total, n = total + activation.sum(axis=0), n + len(activation)
    return torch.from_numpy(total / n).float()


def spliced(plan: StudyPlan, encoder: Encoder) -> dict[str, Spliced]:
    """Of every SAE."""
    model = plan.study.encoder.model
    texts = load_text_encoder(model).embed_texts([f"a photo of {article(shape)}" for shape in SHAPES])
    saes = {train.grid_cell.name: load_sae(train.step.folder) for train in plan.trains}
    means = {train.grid_cell.name: mean_of(ActivationStore(train.activations.step.folder)) for train in plan.trains}
    counted: dict[str, list[Spliced]] = {name: [] for name in saes}
    for pixels, classes in batches(plan.images["heldout"], model):
        for train in plan.trains:
            name = train.grid_cell.name
            outputs = outputs_at(encoder, pixels, train.grid_cell.site, PROJECTION)
            counted[name].append(count_spliced(outputs, saes[name], means[name], zero_shot(texts), classes))
    return {name: Spliced.merged(parts) for name, parts in counted.items()}


def main() -> None:
    plan = recalled_plan(sys.argv[1])
    r2 = {one.sae.grid_cell.name: (one.step.record() or {})["counts"]["r2"] for one in plan.evaluations}
    found = spliced(plan, load_encoder(plan.study.encoder.model))
    rows = [
        [f"`{name}`", round(r2[name], 3), *(round(share, 3) for share in one.accuracy), round(one.recovered, 3)]
        for name, one in found.items()
    ]
    title = f"Zero-shot accuracy of 16 shapes on {next(iter(found.values())).n_images:,} held-out images"
    for row in [COLUMNS, *rows]:
        print("  ".join(map(str, row)))
    record("splicing", [Table(title=title, columns=COLUMNS, rows=rows)])


if __name__ == "__main__":
    main()
