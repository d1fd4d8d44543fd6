"""`python -m tools.llava`: makes a LLaVA of a vision tower and a language model, and measures it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from jobs.cli import Group


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Make a LLaVA of a frozen vision tower and a frozen language model, and measure it."""


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--tower", required=True, help="A transformers vision tower: a directory or a model id.")
@click.option("--language", required=True, help="A causal language model: a directory or a model id, or a GGUF file.")
@click.option("--images", required=True, help="The folder of training images.")
@click.option("--captions", help="A CSV file with the columns image_id and caption. Default: class folders.")
@click.option("--layer", default=-2, show_default=True, help="The tower's hidden state that is read.")
@click.option("--image-size", type=int, help="Side of the images in pixels. Default: the tower's own.")
@click.option("--with-cls", is_flag=True, help="Read the tower's CLS token, too.")
@click.option("--epochs", default=3.0, show_default=True, help="How often every image is seen.")
@click.option("--batch", default=16, show_default=True, help="Images per step.")
@click.option("--lr", "peak_lr", default=1e-3, show_default=True, help="The highest learning rate.")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--tower-revision", help="Commit of a model id.")
@click.option("--language-revision", help="Commit of a model id.")
def train(
    out: Path,
    images: str,
    captions: str | None,
    epochs: float,
    batch: int,
    peak_lr: float,
    seed: int,
    device: str,
    **parts: Any,
) -> None:
    """Train a projector and write the LLaVA to OUT. If it was killed, the same command resumes where it left off."""
    from tools.llava.joining import Parts
    from tools.llava.making import make
    from tools.llava.progress import Progress
    from tools.llava.training import Training

    with Progress() as progress:
        make(out, Parts(**parts), images, captions, Training(epochs, batch, peak_lr, seed), device, progress)


@main.command()
@click.argument("llava")
@click.option("--images", required=True, help="A folder of class folders, best of images that were not trained on.")
@click.option("--n-images", default=1000, show_default=True, help="How many to ask about.")
@click.option("--seed", default=0, show_default=True, help="Of the sample.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
def measure(llava: str, images: str, n_images: int, seed: int, device: str, dtype: str) -> None:
    """Ask LLAVA what each of some images shows, and count the right answers."""
    from sae_ray.steering.llava import load_llava
    from sae_ray.store.files import Folder
    from tools.llava.measuring import measure
    from tools.llava.progress import Progress

    with Progress() as progress:
        measured = measure(load_llava(llava, device=device, dtype=dtype), Folder(images), n_images, seed, progress)
    click.echo("\n".join(measured.lines()))


if __name__ == "__main__":
    main(prog_name="python -m tools.llava")
