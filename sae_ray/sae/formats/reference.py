"""Checkpoints of the paper's reference code, ExplainableML/sae-for-vlm.

BatchTopK is held in torch Linear layers, Matryoshka in plain matrices.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.sae.architectures import BatchTopK, MatryoshkaBatchTopK
from sae_ray.sae.model import SAE
from sae_ray.store.files import Folder, parent_and_name

FORM = "a .pt file of the reference code"


def recognises(path: str | Folder) -> bool:
    return (path.name if isinstance(path, Folder) else parent_and_name(path)[1]).endswith(".pt")


def read(path: str | Folder) -> SAE:
    where = str(path)
    folder, name = parent_and_name(path.uri if isinstance(path, Folder) else path)
    if not folder.exists(name):
        raise UsageError(f"{where} does not exist; check the path")
    try:
        saved = torch.load(io.BytesIO(folder.read_bytes(name)), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise SaeRayError(f"{where} is not a file of tensors that can be opened safely: {error}") from error
    linear = {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k", "threshold"}
    plain = {"W_enc", "W_dec", "b_enc", "b_dec", "k", "threshold", "group_sizes"}
    facts: dict[str, Any] = {"reference_file": name}
    if isinstance(saved, dict) and linear <= set(saved):
        kind = BatchTopK
        W_enc, b_enc, W_dec = saved["encoder.weight"].T, saved["encoder.bias"], saved["decoder.weight"].T
    elif isinstance(saved, dict) and plain <= set(saved):
        kind = MatryoshkaBatchTopK
        W_enc, b_enc, W_dec = saved["W_enc"], saved["b_enc"], saved["W_dec"]
        facts["group_sizes"] = saved["group_sizes"].tolist()
    else:
        held = sorted(saved) if isinstance(saved, dict) else type(saved).__name__
        raise UsageError(
            f"{where} holds {held}; a reference checkpoint holds {sorted(linear)} (BatchTopK) or {sorted(plain)} "
            "(Matryoshka)"
        )
    threshold = saved["threshold"].float()
    if threshold < 0:
        raise UsageError(
            f"{where}: threshold = {threshold.item():g} means that it was never set: the SAE was saved before the "
            "reference's threshold_start_step, and without a threshold it would keep every positive value; train longer"
        )
    return SAE(
        architecture=kind.name,
        W_enc=W_enc.float().contiguous(),
        W_dec=W_dec.float().contiguous(),
        b_enc=b_enc.float(),
        b_dec=saved["b_dec"].float(),
        threshold=threshold.expand(len(b_enc)).clone(),
        k=int(saved["k"]),
        metadata=facts,
    )
