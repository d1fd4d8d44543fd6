"""SAEs of other projects that cannot be opened: they are recognised so that they are refused by name."""

from __future__ import annotations

from collections.abc import Iterable

from sae_ray.errors import UsageError
from sae_ray.sae.formats.places import CONFIG_FILE, OVERCOMPLETE_CONFIG_FILES, WEIGHTS_FILE, Place

CONVERT = (
    "convert it to a SAELens 6 directory first: docs/formats.md says under `sae-*` which tensors it holds and what is "
    "computed with them"
)
GEMMA = (
    "an SAE of Gemma Scope; SAELens opens it with SAE.from_pretrained(release, sae_id), and its save_model writes what "
    "sae-ray opens"
)
BY_FILE = {
    "params.npz": GEMMA,
    "params.safetensors": GEMMA,
    "hyperparams.json": f"an SAE of Llama Scope, whose activations are normalised; {CONVERT}",
    "sae.pt": f"an SAE of saev; {CONVERT}",
    "weights.pt": f"an SAE of ViT-Prisma; {CONVERT}",
}
"""A file of this project's directories -> what is said."""
BY_TENSORS = {
    "pre_bias": f"an SAE of OpenAI's sparse_autoencoder, which may normalise each sample; {CONVERT}",
    "gate_bias": f"a GatedAutoEncoder of dictionary_learning, whose gate sae-ray does not have; {CONVERT}",
    "W_skip": f"a transcoder, which predicts another activation than it reads; {CONVERT}",
    "state_dict": f"a training checkpoint, or an SAE of ViT-Prisma; {CONVERT}",
    "model_state_dict": f"a training checkpoint; {CONVERT}",
    "optimizer": f"a training checkpoint; {CONVERT}",
}
"""A name that only this kind of file holds -> what is said."""


def refuse_by_files(place: Place) -> None:
    """Raises UsageError if the files are those of another project."""
    if place.file is not None:  # a `.pt` file may have any name
        held = {place.file} if not place.file.endswith(".pt") else set()
    else:
        held = place.files if not {CONFIG_FILE, WEIGHTS_FILE} <= place.files else set()
        if held & {*OVERCOMPLETE_CONFIG_FILES}:  # beside them it is one of overcomplete
            held -= {"sae.pt"}
    for file, said in BY_FILE.items():
        if file in held:
            raise UsageError(f"{place} is {said}")


def refuse_by_tensors(where: str, names: Iterable[str]) -> None:
    """Raises UsageError if these are the names of another project's tensors."""
    held = set(names)
    for name, said in BY_TENSORS.items():
        if name in held:
            raise UsageError(f"{where} is {said}")
