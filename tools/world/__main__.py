"""Rebuilds the world's models: `python -m tools.world [--only clip|judge|llava] [--out DIR]`.

Takes about 20 minutes on two CPU cores. Images 0 to 39 999 are for training, images from 40 000 on for evaluation.
Everything is seeded, but the exact bits depend on the machine, its thread count and the version of torch.

These shortcuts make minutes of training enough, and limit what the models can show:

- The **CLIP** has an auxiliary loss: a linear head on every patch token of `hidden_states[-2]` names the shape, the
  colour and the background of the image. Its contrastive loss counts every caption that is true of an image as a
  positive, not only the image's own.
- The **judge** is supervised on the same labels. It shares no weights, no architecture and no seed with the CLIP, but
  it does share the label vocabulary of that auxiliary loss: their agreement is partly agreement on the labels.
- The **LLaVA** keeps the CLIP's vision tower unchanged and learns a projector and a language model on top of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from sae_ray.world.write import FIRST_HELDOUT, MODELS
from tools.world import make_clip, make_judge, make_llava, measure
from tools.world.cards import card
from tools.world.data import Rendered, rendered

N_HELDOUT = 4_000


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the embedded world's models again.")
    parser.add_argument("--only", choices=tuple(MAKERS), help="one model; llava builds on the clip beside it")
    parser.add_argument("--out", type=Path, default=MODELS, help="where the model directories go")
    options = parser.parse_args()
    torch.set_num_threads(2)
    train, heldout = rendered(0, FIRST_HELDOUT), rendered(FIRST_HELDOUT, FIRST_HELDOUT + N_HELDOUT)
    for name in (options.only,) if options.only else MAKERS:
        publish(name, train, heldout, options.out)


def publish(name: str, train: Rendered, heldout: Rendered, out: Path) -> None:
    """Trains a model in a temporary folder, measures it, writes its card, moves it and updates `measured.json`."""
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out, prefix=".") as temporary:
        folder = Path(temporary) / name
        figures = MAKERS[name](train, heldout, out, folder)
        (folder / "README.md").write_text(card(name, figures), encoding="utf-8")
        for file in folder.iterdir():
            file.chmod(0o644)
        shutil.rmtree(out / name, ignore_errors=True)
        folder.rename(out / name)
    measured = out / "measured.json"
    known = json.loads(measured.read_text()) if measured.exists() else {}
    measured.write_text(json.dumps(dict(sorted((known | {name: figures}).items())), indent=1) + "\n")


def _clip(train: Rendered, heldout: Rendered, out: Path, folder: Path) -> dict:
    minutes = _minutes(make_clip.make_clip, train, folder)
    return {**_effort(make_clip.STEPS, minutes), "accuracy": measure.clip_accuracy(folder, heldout)}


def _judge(train: Rendered, heldout: Rendered, out: Path, folder: Path) -> dict:
    minutes = _minutes(make_judge.make_judge, train, folder)
    figures = {**_effort(make_judge.STEPS, minutes), "accuracy": measure.judge_accuracy(folder, train, heldout)}
    if (out / "clip").exists():
        figures["monosemanticity_of_clip_coordinates"] = measure.raw_monosemanticity(out / "clip", folder, heldout)
    return figures


def _llava(train: Rendered, heldout: Rendered, out: Path, folder: Path) -> dict:
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(out / "clip", dtype="float32")
    minutes = _minutes(make_llava.make_llava, train, clip, folder)
    return {**_effort(make_llava.STEPS, minutes), "accuracy": measure.llava_accuracy(folder, heldout)}


MAKERS = {"clip": _clip, "judge": _judge, "llava": _llava}


def _minutes(work: Callable[..., None], *inputs) -> float:
    begun = time.monotonic()
    work(*inputs)
    return (time.monotonic() - begun) / 60


def _effort(steps: int, minutes: float) -> dict:
    return {"steps": steps, "minutes_on_2_cores": round(minutes, 1), "heldout_images": N_HELDOUT}


if __name__ == "__main__":
    main()
