"""Trains the world's CLIP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from sae_ray.world.render import COLOURS, SHAPES, SIDE, article
from tools.world.data import BACKGROUND_NAMES, LABEL_NAMES, SHAPE_NAMES, Rendered, image_processor
from tools.world.fit import fit
from tools.world.words import CAPTION_WORDS, SPECIAL, word_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import CLIPModel

STEPS, BATCH, PEAK_LR = 1500, 256, 1.5e-3
LABEL_WEIGHTS = (1.0, 0.3, 0.3)
"""Of shape, colour and background in the auxiliary loss."""
MAX_WORDS = 16
BLANK = SHAPE_NAMES.index(None)
UNSAID = -1
"""In place of a label: the caption does not mention that attribute."""


def make_clip(train: Rendered, folder: Path) -> None:
    """Trains on `train` and writes a transformers directory."""
    torch.manual_seed(0)
    model = new_clip()
    tokenizer = word_tokenizer(CAPTION_WORDS, MAX_WORDS)
    heads = nn.Linear(model.vision_model.config.hidden_size, sum(map(len, LABEL_NAMES)))

    def loss_on(rows: torch.Tensor) -> torch.Tensor:
        labels = train.labels[rows]
        said = mentioned(labels)
        texts = tokenizer([words(row) for row in said.tolist()], padding=True, return_tensors="pt")
        pixels = train.normalized(rows)
        seen = model(input_ids=texts["input_ids"], pixel_values=pixels, output_hidden_states=True)
        patches = seen.vision_model_output.hidden_states[-2][:, 1:]
        return contrastive_loss(seen.logits_per_image, is_true(said, labels)) + patch_loss(heads(patches), labels)

    fit("clip", [*model.parameters(), *heads.parameters()], loss_on, len(train.shown), STEPS, BATCH, PEAK_LR)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor().save_pretrained(folder)


def new_clip() -> CLIPModel:
    """An untrained CLIP. Unit-gain weights and sin-cos positions save the first hundreds of steps."""
    from transformers import CLIPConfig, CLIPModel

    special = {"pad_token_id": SPECIAL.index("<pad>"), "bos_token_id": SPECIAL.index("<bos>")}
    text = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": MAX_WORDS,
        "eos_token_id": SPECIAL.index("<eos>"),
        "projection_dim": 64,
        **special,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 14,
        "projection_dim": 64,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        if "embedding.weight" in name:
            nn.init.normal_(weight)
        else:
            gain = 0.3 if name.endswith(("out_proj.weight", "fc2.weight")) else 1
            nn.init.normal_(weight, std=gain * weight[0].numel() ** -0.5)
    with torch.no_grad():
        positions = model.vision_model.embeddings.position_embedding.weight
        positions[0] = 0
        positions[1:] = sin_cos_positions(SIDE // 14, positions.shape[1])
        model.text_model.embeddings.position_embedding.weight.mul_(0.5)
    return model


def sin_cos_positions(side: int, width: int) -> torch.Tensor:
    """[side², width]: sines and cosines of the row in one half, of the column in the other."""
    frequency = torch.pi / 2 ** torch.linspace(1, 4, width // 4)
    angles = torch.arange(side)[:, None] * frequency
    line = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.cat([line.repeat_interleave(side, 0), line.repeat(side, 1)], 1)


def mentioned(labels: torch.Tensor) -> torch.Tensor:
    """What a caption of each image says [images, 3]: the labels, some of them dropped at random."""
    kept = torch.rand(labels.shape) < torch.tensor([0.8, 0.6, 0.6])
    kept[:, 0] |= ~kept.any(1)
    kept[labels[:, 0] == BLANK, :2] = True
    return torch.where(kept, labels, UNSAID)


def words(said: list[int]) -> str:
    """A caption that says just that, in one of a few wordings."""
    shape, colour, background = said
    place = "" if background == UNSAID else f" on {article(BACKGROUND_NAMES[background])} background"
    start, with_article = [("a photo of ", True), ("", True), ("", False)][int(torch.randint(3, ()))]
    if shape == BLANK:
        return ("nothing" if start else "a blank photo") + place
    thing = "object" if shape == UNSAID else SHAPES[shape]
    if colour != UNSAID:
        thing = f"{tuple(COLOURS)[colour]} {thing}"
    return start + (article(thing) if with_article else thing) + place


def is_true(said: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """bool [images, captions]: whether a caption holds for an image, be it its own or another's."""
    agrees = (said == labels[:, None]) | (said == UNSAID)
    return agrees.all(2) & ((said[:, 0] == BLANK) == (labels[:, 0] == BLANK)[:, None])


def contrastive_loss(logits: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """CLIP's loss where every true pair is a positive: cross-entropy with the mean over the positives, both ways."""
    by_image = (logits.log_softmax(1) * true).sum(1) / true.sum(1)
    by_caption = (logits.log_softmax(0) * true).sum(0) / true.sum(0)
    return -(by_image.mean() + by_caption.mean()) / 2


def patch_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every patch token [images, patches, classes] against the labels of its image."""
    total = torch.zeros(())
    for part, label, weight in zip(logits.split([*map(len, LABEL_NAMES)], 2), labels.T, LABEL_WEIGHTS, strict=True):
        total = total + weight * F.cross_entropy(part.flatten(0, 1), label.repeat_interleave(part.shape[1]))
    return total
