"""The draft of a study: for a folder of images and a model, after a look at both, with a comment on every choice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sae_ray.encoders.info import EncoderInfo
from sae_ray.encoders.sources import directory_named, is_digest, named_by
from sae_ray.errors import UsageError
from sae_ray.study.config import ImageSet, JudgeConfig
from sae_ray.study.survey import list_set

if TYPE_CHECKING:
    from sae_ray.images.manifest import ImageList

EPOCHS = 30
"""How often training sees every image: like the studies of the embedded world and of photographs."""
MANY_IMAGES = 200_000
"""From so many training images on, steps are as large as the paper's."""
FEW_IMAGES = 5000
"""With fewer, more of them are held out, and neurons that fire on two of those are counted: else few would be."""
OTHER_JUDGE = "timm:tf_efficientnet_lite0.in1k"
"""Where the encoder is the judge by default, or one like it: another architecture with another training."""


def draft(name: str, images: str, model: str, revision: str | None = None) -> str:
    """The text of a study file.

    Args:
        name: of the study.
        images: a folder, as `images.train.path`.
        model: of the encoder, as `encoder.model`.
        revision: as `encoder.revision`.

    Raises:
        UsageError: the folder or the model is missing, or not supported.
        SaeRayError: the folder has no images, or cannot be read.
    """
    from sae_ray.encoders.loading import describe_encoder
    from sae_ray.steering.llava import describe_llava

    images, model = _absolute(images), _absolute(model)
    found = list_set("images.train", ImageSet(images))
    with named_by("encoder.model", model):
        info = describe_encoder(model, revision)
        read_layer = describe_llava(model, revision).layer if info.family == "llava" else None
    parts = [
        [
            f"# A study of {found.manifest.num_rows:,} images through {info.name}.",
            "# `sae-ray run` takes it; with --dry-run it shows steps, bytes and work, and does nothing.",
            "# What is not here has a default: every field is described in sae_ray/study/config.py.",
            f"name = {_toml(name)}",
            "seed = 0",
        ],
        _images(images, found),
        _encoder(info),
        _judge(info),
        _grid(info, read_layer),
        _training(found.manifest.num_rows),
        [
            "[scoring]",
            "# Neurons that fire on fewer held-out images are left out of the summary.",
            f"min_images = {2 if found.manifest.num_rows < FEW_IMAGES else 5}",
            "# Top images come from the training images, which are more. Scores always come from held-out ones.",
            'pictures = "train"',
        ],
        [
            "# What neurons mean, by many measures: with labels, and without. Remove the table to skip it.",
            "[concepts]",
        ],
        _steering(info, read_layer),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def new_file(file: str) -> Path:
    """The path of a file that is to be written. Raises UsageError if it is there already."""
    path = Path(file).expanduser()
    if path.exists():
        raise UsageError(f"{file} is there already; give another name, or delete it")
    return path


def write_draft(file: str, images: str, model: str, revision: str | None) -> None:
    """Writes the draft to a new file, whose name is that of the study.

    Raises:
        UsageError: there is such a file already, or it cannot be written; or as `draft`.
        SaeRayError: as `draft`.
    """
    path = new_file(file)
    text = draft(path.stem, images, model, revision)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file} cannot be written ({error.strerror}); choose a folder of your own") from error


def site_lines(info: EncoderInfo) -> list[str]:
    """The sites that an encoder has, one kind a line: how they are written, and the width of their activations."""
    lines = []
    if info.residual_width is not None:
        blocks = f"layer0 to layer{info.n_layers - 1}"
        tokens = f"{'cls, ' if info.has_cls else ''}mean, all ({info.n_tokens:,} tokens) or random:n (n of these)"
        lines += [f"{blocks}, {info.residual_width:,} wide, with the tokens {tokens}"]
    if info.width("mlp") is not None:
        lines += [
            f"layer0.mlp and so on, {info.residual_width:,} wide: the output of a block's MLP, with the same tokens"
        ]
    if info.projection_width is not None:
        lines += [f"projection, {info.projection_width:,} wide: the image embedding that is compared with texts"]
    if info.pooled_width is not None:
        lines += [f"pooled, {info.pooled_width:,} wide: the tower's own summary of the image"]
    return lines


def _images(images: str, found: ImageList) -> list[str]:
    names = {name for group in found.labels.groups(["label_name"]) for name in group["label_name"].unique().to_pylist()}
    n_classes = len(names - {None})
    labels = f"{n_classes} classes, which are its sub-folders" if n_classes else "no sub-folders, and so no classes"
    return [
        "[images]",
        f"# It has {labels}. The path of a label file can be given beside it, as labels.",
        f"train = {{ path = {_toml(images)} }}",
        "# Images that are only measured on. Without such a folder, a share of the training images is.",
        '# heldout = { path = "FOLDER" }',
        f"heldout_fraction = {0.3 if found.manifest.num_rows < FEW_IMAGES else 0.1}",
    ]


def _encoder(info: EncoderInfo) -> list[str]:
    lines = ["[encoder]", f"model = {_toml(info.model)}"]
    if info.revision and re.fullmatch("[0-9a-f]{40}", info.revision):
        lines += ["# The commit that the hub had when this was written.", f"revision = {_toml(info.revision)}"]
    return [*lines, "# On a GPU:", '# dtype = "bfloat16"']


def _judge(info: EncoderInfo) -> list[str]:
    model = OTHER_JUDGE if "dino" in info.model.lower() else JudgeConfig.model
    return [
        "# The model that says which images are alike: MonoSemanticity is measured with it. It should be of another",
        "# kind than the encoder.",
        "[judge]",
        f"model = {_toml(model)}",
        f"point = {_toml(JudgeConfig.point)}",
    ]


def _grid(info: EncoderInfo, read_layer: int | None) -> list[str]:
    return [
        "# The SAEs: one for every combination. The model has these sites:",
        *(f"#   {line}" for line in site_lines(info)),
        "[[grid]]",
        f"sites = [{_toml(_likely_site(info, read_layer))}]",
        '# "matryoshka_batch_topk" orders latents from coarse to fine. See docs/methods.md.',
        'architectures = ["batch_topk"]',
        "# Latents per dimension of the activation.",
        "expansions = [1, 4]",
        "# Latents that are active on an image, on average: fewer are purer, more are more faithful.",
        "k = [5, 20]",
    ]


def _likely_site(info: EncoderInfo, read_layer: int | None) -> str:
    """What a LLaVA reads; else near the end, where features are most abstract, but not after the last block, which
    serves the model's own goal."""
    if read_layer is not None:
        return f"layer{read_layer}:random:2"
    if info.residual_width is None:
        return "projection" if info.pooled_width is None else "pooled"
    return f"layer{max(0, info.n_layers - 2)}:{'cls' if info.has_cls else 'mean'}"


def _training(n_images: int) -> list[str]:
    batch_size = 4096 if n_images >= MANY_IMAGES else 512
    steps = max(300, 100 * round(EPOCHS * n_images / batch_size / 100))
    return [
        "[training]",
        f"# {steps:,} steps see every image about {max(1, round(steps * batch_size / n_images))} times.",
        f"batch_size = {batch_size}",
        f"steps = {steps}",
        f"decay_start = {steps * 4 // 5}",
        '# A latent that is silent on so many samples is dead. With "pre", training also revives latents that are',
        "# negative on every image.",
        f"dead_after_samples = {steps * batch_size // 8}",
        'auxk_select = "pre"',
    ]


def _steering(info: EncoderInfo, read_layer: int | None) -> list[str]:
    if read_layer is None:
        return []
    return [
        f"# The LLaVA, which reads layer {read_layer}, is asked about images while latents are set. Remove the table",
        "# to skip it.",
        "[steering]",
        f"llava = {_toml(info.model)}",
        *([f"revision = {_toml(info.revision)}"] if info.revision and not is_digest(info.revision) else []),
        "# In multiples of the largest value that the latent took on a token.",
        "strength = 4",
        'unit = "max"',
    ]


def _absolute(path: str) -> str:
    """A study file may be read from anywhere."""
    inside = directory_named(path)
    if inside is not None:
        return path.removesuffix(inside) + _absolute(inside)
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
