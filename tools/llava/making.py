"""The whole way from two models and captioned images to a LLaVA, which goes on where it was killed."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from sae_ray.errors import UsageError
from sae_ray.steering.llava import describe_llava, load_llava
from sae_ray.store.files import Folder
from sae_ray.store.steps import digest
from tools.llava.captions import counted, said_of
from tools.llava.features import Features, compute_features
from tools.llava.joining import Parts, join
from tools.llava.progress import Progress
from tools.llava.training import CHECKPOINT_SECONDS, Training, faster_dtype, train_projector

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS = "settings.json"
JOINED = "joined"
"""The LLaVA before training."""
PROJECTOR = "multi_modal_projector."


def make(
    out: Path,
    parts: Parts,
    images: str,
    captions: str | None,
    training: Training,
    device: str,
    progress: Progress,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> None:
    """Makes a LLaVA and writes it to `out`, which appears when it is finished.

    Until then `<out>.unfinished` holds the LLaVA with its first projector, what its tower makes of the images (float16:
    twice tokens × width bytes per image) and the newest checkpoints. Called again, it goes on from there.

    Raises:
        UsageError: `out` exists, or was begun with other settings; or as `said_of`, `join` and `train_projector`.
        SaeRayError: No image can be read.
    """
    if out.exists():
        raise UsageError(f"{out} exists; name another folder for the LLaVA, or delete it")
    said = said_of(Folder(images), captions)
    work = Path(f"{out}.unfinished")
    asked = {**parts._asdict(), **asdict(training), "said": digest(said)}
    progress.say(counted(said))
    if not (work / SETTINGS).exists():
        progress("joining vision tower and language model")
        shutil.rmtree(work, ignore_errors=True)
        join(parts, work / JOINED)
        Folder(work).write_json(SETTINGS, {**asked, "dtype": faster_dtype(device)})  # last: it makes it begun
    dtype = _dtype_of(out, Folder(work), asked)
    info = describe_llava(str(work / JOINED))
    progress.say(f"an image of {info.tower.image_size[0]} pixels takes {info.n_image_tokens} tokens")
    compute_features(info, Folder(images), list(said), Folder(work / "features"), device, progress)
    llava = load_llava(str(work / JOINED), device=device, dtype=dtype)
    features = Features(Folder(work / "features"))
    try:
        checkpoints = Folder(work / "checkpoints")
        trained = train_projector(llava, features, said, training, checkpoints, progress, checkpoint_seconds)
    finally:
        features.close()
    _finish(work, trained, out)
    progress.say(f"written to {out}")


def _dtype_of(out: Path, work: Folder, asked: dict[str, Any]) -> str:
    """What the language model computes in. Raises UsageError if the work was begun with other settings."""
    before = work.read_json(SETTINGS)
    for name, value in asked.items():
        if before[name] != value:
            raise UsageError(
                f"{out} was begun with {name} = {before[name]!r}, and this is {value!r}; give the settings that it was "
                f"begun with, name another folder, or delete {work}"
            )
    return before["dtype"]


def _finish(work: Path, projector: dict[str, Tensor], out: Path) -> None:
    """Writes the LLaVA with its trained projector beside the other files, moves it to its place and tidies up."""
    finished = work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    shutil.copytree(work / JOINED, finished, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in sorted((work / JOINED).glob("*.safetensors")):
        tensors = load_file(file)
        for name in tensors:
            if PROJECTOR in name:
                tensors[name] = projector[name.partition(PROJECTOR)[2]]
        save_file(tensors, finished / file.name, metadata={"format": "pt"})
    finished.rename(out)
    shutil.rmtree(work)
