"""Trains the world's judge: a small CNN with labels, in open_clip's format, so that it sees otherwise than the CLIP."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from sae_ray.world.render import SIDE
from tools.world.data import LABEL_NAMES, MEAN, STD, Rendered
from tools.world.fit import fit
from tools.world.words import CAPTION_WORDS, word_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

STEPS, BATCH, PEAK_LR = 600, 128, 3e-3
LABEL_WEIGHTS = (1.0, 0.5, 0.5)
SHARPNESS = 16.0
"""Logits are this times the product of the unit embedding and a label's vector."""

MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": SIDE, "layers": [1, 2, 2, 1], "width": 10, "head_width": 32, "patch_size": None},
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 64,
        "width": 32,
        "heads": 2,
        "layers": 1,
        "hf_tokenizer_name": "the tokenizer beside this file",
    },
}


def make_judge(train: Rendered, folder: Path) -> None:
    """Trains on `train` and writes a directory for `open_clip.create_model_and_transforms("local-dir:<folder>")`."""
    from open_clip import CLIP
    from safetensors.torch import save_file

    torch.manual_seed(1)
    model = CLIP(**MODEL).train()
    heads = nn.Linear(MODEL["embed_dim"], sum(map(len, LABEL_NAMES)), bias=False)
    nn.init.normal_(heads.weight, std=MODEL["embed_dim"] ** -0.5)

    def loss_on(rows: torch.Tensor) -> torch.Tensor:
        vectors = model.encode_image(train.normalized(rows), normalize=True)
        logits = (SHARPNESS * heads(vectors)).split([*map(len, LABEL_NAMES)], 1)
        losses = [F.cross_entropy(part, label) for part, label in zip(logits, train.labels[rows].T, strict=True)]
        return (torch.stack(losses) * torch.tensor(LABEL_WEIGHTS)).sum()

    learnt = [*model.visual.parameters(), *heads.parameters()]
    fit("judge", learnt, loss_on, len(train.shown), STEPS, BATCH, PEAK_LR)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    preprocess = {"mean": list(MEAN), "std": list(STD), "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": MODEL, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    word_tokenizer(CAPTION_WORDS, MODEL["text_cfg"]["context_length"]).save_pretrained(folder)
