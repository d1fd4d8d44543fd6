"""The usual extraction loop: `python -m bench.contestants.loop <images> <number> <CLIP> <layer> <target> <way>...`.

A DataLoader opens the images, the model's processor runs where batches are put together, a hook on the layer collects
its CLS tokens, and a tensor is saved in the end. A way is `<backend>:<workers>`, the backend being `pil`, `torchvision`
or, for versions of transformers that offer no choice, `own`. The answer is a JSON line of images per second, one for
each way; imports and the loading of the model do not count. Batches are those of the reference's script.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

THREADS = 2
BATCH = 128


class Files(torch.utils.data.Dataset):
    """Images of a folder, opened as torchvision's folders open them."""

    def __init__(self, folder: Path, n: int):
        self.paths = sorted(folder.iterdir())[:n]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        with self.paths[index].open("rb") as file:
            return Image.open(file).convert("RGB")


def main() -> None:
    images, number, clip, layer, target, *ways = sys.argv[1:]
    torch.set_num_threads(THREADS)
    model = CLIPVisionModelWithProjection.from_pretrained(clip).float().eval()
    rates = []
    for way in ways:
        backend, workers = way.split(":")
        processor = AutoImageProcessor.from_pretrained(clip, **({} if backend == "own" else {"backend": backend}))
        collected, rate = loop(model, processor, Files(Path(images), int(number)), int(layer), int(workers))
        torch.save(collected, Path(target) / f"{backend}.pt")
        rates.append(rate)
    print(json.dumps(rates))


def loop(model: Any, processor: Any, files: Files, layer: int, workers: int) -> tuple[torch.Tensor, float]:
    """The activations, and images per second."""
    collected: list[torch.Tensor] = []

    def collect(module: Any, inputs: Any, output: Any) -> None:
        collected.append((output if isinstance(output, torch.Tensor) else output[0])[:, 0].clone())

    hook = model.vision_model.encoder.layers[layer].register_forward_hook(collect)
    loader: Any = torch.utils.data.DataLoader(
        files,
        batch_size=BATCH,
        num_workers=workers,
        collate_fn=lambda images: processor(images=images, return_tensors="pt"),
    )
    begun = time.perf_counter()
    with torch.no_grad():
        for batch in loader:
            model(**batch)
    activations = torch.cat(collected)
    seconds = time.perf_counter() - begun
    hook.remove()
    return activations, len(files) / seconds


if __name__ == "__main__":
    main()
