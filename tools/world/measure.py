"""Measures the accuracy of the written models on unseen images, with the same loaders as users' models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn import functional as F

from sae_ray.world.render import BACKGROUNDS, COLOURS, SHAPES, article
from tools.world.data import LABEL_NAMES, Rendered
from tools.world.make_llava import BACKGROUND, COLOUR, DESCRIBE, ONE_WORD, answer, prompt

JUDGE_KNOWN = 2_000
ATTRIBUTES = ("shape", "colour", "background")
CLIP_PROMPTS = (
    tuple(f"a photo of {article(shape)}" for shape in SHAPES),
    tuple(f"a photo of {article(colour)} object" for colour in COLOURS),
    tuple(f"a photo of an object on {article(background)} background" for background in BACKGROUNDS),
)


@torch.inference_mode()
def clip_embeddings(folder: Path, images: Rendered) -> torch.Tensor:
    """float32 [images, 64]: the projection, not normalised."""
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(folder, dtype="float32"), AutoProcessor.from_pretrained(folder)
    batches = (processor(images=pictures, return_tensors="pt") for pictures in _pictures(images))
    return torch.cat([model.get_image_features(**batch).pooler_output for batch in batches])


@torch.inference_mode()
def clip_accuracy(folder: Path, images: Rendered) -> dict[str, float]:
    """Zero-shot accuracy per attribute, on the images that are not blank."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder, dtype="float32"), AutoTokenizer.from_pretrained(folder)
    vectors = clip_embeddings(folder, images)
    accuracy = {}
    for attribute, prompts, labels in zip(ATTRIBUTES, CLIP_PROMPTS, images.labels.T, strict=True):
        texts = model.get_text_features(**tokenizer(list(prompts), padding=True, return_tensors="pt")).pooler_output
        accuracy[attribute] = _accuracy((vectors @ F.normalize(texts).T).argmax(1), labels, images)
    return accuracy


@torch.inference_mode()
def judge_embeddings(folder: Path, images: Rendered) -> torch.Tensor:
    """float32 [images, 64] of unit length."""
    import open_clip

    model, _, transform = cast(Any, open_clip.create_model_and_transforms(f"local-dir:{folder}"))
    model.eval()
    batches = (torch.stack([transform(picture) for picture in pictures]) for pictures in _pictures(images))
    return torch.cat([model.encode_image(batch, normalize=True) for batch in batches])


def judge_accuracy(folder: Path, known: Rendered, images: Rendered) -> dict[str, float]:
    """Accuracy per attribute of the nearest mean embedding, on the images not blank.

    The means are those of the first `JUDGE_KNOWN` images of `known`.
    """
    known = Rendered(known.pixels[:JUDGE_KNOWN], known.labels[:JUDGE_KNOWN], known.shown[:JUDGE_KNOWN])
    vectors, mine = judge_embeddings(folder, images), judge_embeddings(folder, known)
    accuracy = {}
    for attribute, names, labels, own in zip(ATTRIBUTES, LABEL_NAMES, images.labels.T, known.labels.T, strict=True):
        means = torch.stack([mine[own == label].mean(0) for label in range(len(names))])
        accuracy[attribute] = _accuracy((vectors @ F.normalize(means).T).argmax(1), labels, images)
    return accuracy


@torch.inference_mode()
def llava_accuracy(folder: Path, images: Rendered) -> dict[str, float]:
    """Share of greedy answers that are exactly right, per question; "blank": share of blank images called nothing."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype="float32")
    processor = AutoProcessor.from_pretrained(folder)
    questions = {"one word": ONE_WORD, "describe": DESCRIBE, "colour": COLOUR, "background": BACKGROUND}
    accuracy = {}
    blank = images.labels[:, 0] == len(SHAPES)
    for name, question in questions.items():
        right = []
        for low, pictures in enumerate(_pictures(images)):
            texts = [prompt(question)] * len(pictures)
            batch = processor(images=pictures, text=texts, return_tensors="pt")
            ids = model.generate(**batch, max_new_tokens=16, do_sample=False)[:, batch["input_ids"].shape[1] :]
            truths = [answer(question, seen) for seen in images.shown[low * _BATCH : (low + 1) * _BATCH]]
            said = processor.batch_decode(ids, skip_special_tokens=True)
            right += [one.strip() == truth for one, truth in zip(said, truths, strict=True)]
        right = torch.tensor(right, dtype=torch.float64)
        accuracy[name] = right[~blank].mean().item()
        if question == ONE_WORD:
            accuracy["blank"] = right[blank].mean().item()
    return accuracy


def raw_monosemanticity(clip: Path, judge: Path, images: Rendered) -> dict[str, float]:
    """Mean and best MonoSemanticity of the coordinates of the CLIP's projection, under the judge."""
    raw, unit = clip_embeddings(clip, images).double(), judge_embeddings(judge, images).double()
    low, high = raw.min(0).values, raw.max(0).values
    scaled = (raw - low) / (high - low)
    squares = scaled.square().sum(0)
    scores = ((scaled.T @ unit).square().sum(1) - squares) / (scaled.sum(0).square() - squares)
    return {"mean": scores.mean().item(), "best": scores.max().item()}


_BATCH = 500


def _pictures(images: Rendered) -> Iterator[list]:
    from PIL import Image

    for low in range(0, len(images.shown), _BATCH):
        yield [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in images.pixels[low : low + _BATCH]]


def _accuracy(named: torch.Tensor, labels: torch.Tensor, images: Rendered) -> float:
    """Over the images that are not blank."""
    return (named == labels)[images.labels[:, 0] < len(SHAPES)].double().mean().item()
