"""A LLaVA of the size of LLaVA-1.5-7B, with random weights: memory and time of one steered answer in bfloat16.

It runs in a process of its own, by the functions that the steering stage calls, on all cores. See `bench.real_sizes`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.gpu.models import make_sae
from bench.real_models import llava
from bench.real_sizes import COLUMNS, K, Rows, apart, finish, here, step, write_photos
from bench.record import Table
from sae_ray.images import decode_image
from sae_ray.sae import load_sae, save_sae
from sae_ray.steering import Intervention, LatentEdit, load_llava
from sae_ray.store.files import Folder

QUESTION = "What is shown in this image? Use exactly one word!"
NEW_TOKENS = (1, 5)
"""Of two answers: the second shows what each further token takes."""
STRENGTH = 10.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.real_llava", description=__doc__)
    parser.add_argument("--scratch", type=Path, help="folder for what is written and deleted again, 15 GB at once")
    parser.add_argument("--layers", type=int, help="of the language model, for machines of less memory; 32 by default")
    parser.add_argument("--small", action="store_true", help="a tiny model, in this process; figures are only printed")
    given = parser.parse_args(arguments)
    model, run = llava(given.small, given.layers), here if given.small else apart
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        folder, sae, photos = (Path(scratch) / name for name in ("model", "sae", "photos"))
        run(model.write, folder)
        run(write_sae, sae, model.d_in, 512 if given.small else 65_536)
        write_photos(photos, 1)
        rows = run(steer, folder, sae, photos / "00000.jpg")
    with_layers = f" with {given.layers} of its 32 layers" if given.layers else ""
    title = f"{model.name}{with_layers}: one image steered by an SAE of 65,536 latents"
    finish("real_llava", [Table(title=title, columns=COLUMNS, rows=rows)], given.small)


def write_sae(folder: Path, d_in: int, d_sae: int) -> None:
    save_sae(make_sae(torch.randn(256, d_in), d_sae, K), Folder(folder))


def steer(model: Path, sae: Path, photo: Path) -> Rows:
    rows: Rows = []
    llava = step(rows, "the model loaded, from float16 to bfloat16", lambda: load_llava(str(model), dtype="bfloat16"))
    opened = step(rows, "the SAE loaded", lambda: load_sae(sae))
    edited = Intervention(opened, (LatentEdit(7, "set", STRENGTH),))
    image = decode_image(photo.read_bytes())
    for n in NEW_TOKENS:
        what = f"an answer of {n} token{'s' * (n > 1)}, {llava.n_tokens} tokens of the image edited"
        step(rows, what, lambda: llava.answer(image, QUESTION, [edited], n))  # noqa: B023
    return rows


if __name__ == "__main__":
    main()
