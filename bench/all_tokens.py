"""Whole studies on all tokens of every image: seconds of each stage, and the most memory that a process takes.

One is on the embedded world's CLIP, one on a random encoder of the size of CLIP ViT-B/16. Memory is what a process does
not share with others (USS): shared memory belongs to Ray's object store.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from bench.record import Table, record
from sae_ray.world import write_world

WORLD_IMAGES, VIT_IMAGES, HELDOUT = 2000, 300, 100
DONE = re.compile(r"^(\w[\w ]*?)(?: (?:train|heldout|and|\d|\().*)?: done in ([\d.]+) s$", re.MULTILINE)
"""What each stage says at its end."""
TRAINING = [
    "training.batch_size=512",
    "training.steps=300",
    "training.warmup_steps=30",
    "training.threshold_start_step=100",
]


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        write_vit_b(Path(scratch) / "vit-b")
        for what, n_images, encoder, site, tokens in (
            ("the world's CLIP, 64 wide", WORLD_IMAGES, f"{scratch}/2000/clip", "layer3:all", 17),
            ("a random ViT-B/16, 768 wide", VIT_IMAGES, f"{scratch}/vit-b", "layer10:all", 197),
        ):
            world = Path(scratch) / str(n_images)
            write_world(world, n_train=n_images, n_heldout=HELDOUT)
            seconds, stages, peak = run(world, encoder, site)
            told = ", ".join(f"{stage} {duration}" for stage, duration in stages)
            rows.append([what, n_images + HELDOUT, tokens, round(seconds), told, round(peak / 1e6)])
    columns = ["encoder", "images", "tokens", "seconds", "seconds of the stages", "peak MB of a process"]
    title = "A study on all tokens: batch_topk x 4, K 5 and 20, and the raw neurons, on two cores"
    # Named here, since a result's name is read as words otherwise.
    command = {"command": "python -m bench.all_tokens"}
    record("all_tokens", [Table(title=title, columns=columns, rows=rows)], command)


def run(world: Path, encoder: str, site: str) -> tuple[float, list[tuple[str, str]], int]:
    """Seconds of a whole study, those of its stages, and the peak of its processes."""
    settings = [
        f"images.train.path={world}/train",
        f"images.heldout.path={world}/heldout",
        f"judge.model=open_clip:local-dir:{world}/judge",
        "judge.point=projection",
        f"encoder.model={encoder}",
        f'grid=[{{sites=["{site}"], expansions=[4], k=[5, 20]}}]',
        "scoring.pictures=train",
        *TRAINING,
    ]
    command = [sys.executable, "-m", "sae_ray.jobs.cli", "run", "--root", f"{world}/{Path(encoder).name}-root"]
    for setting in settings:
        command += ["--set", setting]
    started, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as said:
        study = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        while study.poll() is None:
            peak = max(peak, largest(psutil.Process(study.pid)))
            time.sleep(1)
        seconds = time.perf_counter() - started
        said.seek(0)
        text = said.read()
    if study.returncode:
        raise SystemExit(text)
    return seconds, DONE.findall(text), peak


def largest(process: psutil.Process) -> int:
    """Bytes of the largest of a process and those below it."""
    sizes = [0]
    try:
        for one in (process, *process.children(recursive=True)):
            sizes.append(one.memory_full_info().uss)
    except psutil.NoSuchProcess:
        pass  # it has just ended
    return max(sizes)


def write_vit_b(folder: Path) -> None:
    """A CLIP with the vision tower of ViT-B/16 and hardly a text side, as transformers saves it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(0)
    sizes = {"image_size": 224, "patch_size": 16}
    CLIPModel(CLIPConfig(vision_config=vision | sizes, text_config=text | special)).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)


if __name__ == "__main__":
    main()
