"""Directories of EleutherAI's sparsify: `cfg.json` and `sae.safetensors`.

Its SAEs keep the k largest codes of each sample.
"""

from __future__ import annotations

from typing import Any

import safetensors
import safetensors.torch
import torch

from sae_ray.errors import SaeRayError, UsageError, check
from sae_ray.sae.architectures import TopK
from sae_ray.sae.formats.places import CONFIG_FILE, SPARSIFY_FILE, WEIGHTS_FILE, Place
from sae_ray.sae.formats.tensors import not_tensors, unwrapped
from sae_ray.sae.model import SAE
from sae_ray.store.files import Folder

_TENSORS = ["W_dec", "b_dec", "encoder.bias", "encoder.weight"]
_NEEDED = {
    "activation": ("topk", "sae-ray has no groups of latents of which one is kept"),
    "transcode": (False, "it predicts another activation than it reads"),
    "skip_connection": (False, "sae-ray has no skip connection"),
    "signed": (False, "its codes are signed"),
}
"""Key of `cfg.json` -> the value that can be opened, and why others cannot. Some are missing in some versions."""


def recognises(place: Place) -> bool:
    return place.file is None and SPARSIFY_FILE in place.files and WEIGHTS_FILE not in place.files


def read(place: Place) -> SAE:
    if CONFIG_FILE not in place.files:
        raise SaeRayError(f"{place} is an SAE of sparsify, but has no {CONFIG_FILE}; copy it again")
    config = place.folder.read_json(CONFIG_FILE)
    where = str(place.folder / CONFIG_FILE)
    check(isinstance(config, dict), where, config, "not a JSON object; copy it again")
    for key, (value, why) in _NEEDED.items():
        check(config.get(key, value) == value, f"{where}: {key}", config.get(key), f"cannot be opened, since {why}")
    check(type(config.get("k")) is int, f"{where}: k", config.get("k"), "not a whole number; copy it again")
    weights = str(place.folder / SPARSIFY_FILE)
    data = place.folder.read_bytes(SPARSIFY_FILE)
    try:
        tensors = unwrapped(safetensors.torch.load(data), weights)
    except safetensors.SafetensorError as error:
        raise not_tensors(data, weights, f"is damaged ({error}); copy it again") from error
    if sorted(tensors) != _TENSORS:
        raise UsageError(f"{weights} holds the tensors {sorted(tensors)}, but must hold exactly {_TENSORS}")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    return SAE(
        architecture=TopK.name,
        W_enc=tensors["encoder.weight"].T.contiguous(),
        W_dec=tensors["W_dec"],
        b_enc=tensors["encoder.bias"],
        b_dec=tensors["b_dec"],
        k=config["k"],
        metadata={"sparsify": config},
    )


def write(sae: SAE, folder: Folder) -> None:
    """Writes `cfg.json` and `sae.safetensors`. Raises UsageError unless the SAE keeps the k largest of each sample."""
    if sae.kind is not TopK:
        raise UsageError(
            f"architecture = {sae.architecture!r}: SAEs of sparsify keep the k largest codes of each sample and have "
            "no threshold; export a topk SAE, or choose another form"
        )
    config: dict[str, Any] = {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": True,
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
    }
    tensors = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    saved = {name: tensor.detach().cpu().to(torch.float32).contiguous() for name, tensor in tensors.items()}
    folder.write_bytes(SPARSIFY_FILE, safetensors.torch.save(saved))
    folder.write_json(CONFIG_FILE, config)
