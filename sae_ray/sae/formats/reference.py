"""Checkpoints of the paper's reference code, ExplainableML/sae-for-vlm, and of dictionary_learning, which it builds on.

BatchTopK and TopK are held in torch Linear layers, Matryoshka in plain matrices.
"""

from __future__ import annotations

import io
import pickle
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sae_ray.errors import UsageError, check
from sae_ray.sae.architectures import BatchTopK, MatryoshkaBatchTopK, TopK
from sae_ray.sae.formats.others import CONVERT, refuse_by_tensors
from sae_ray.sae.formats.places import AE_CONFIG_FILE, Place
from sae_ray.sae.formats.tensors import not_tensors, unwrapped
from sae_ray.sae.model import SAE
from sae_ray.store.files import parent_and_name

if TYPE_CHECKING:
    from torch import Tensor

    from sae_ray.sae.architectures import Architecture

_LINEAR = {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec"}
_PLAIN = {"W_enc", "W_dec", "b_enc", "b_dec", "k", "threshold", "group_sizes"}
_CLASSES: dict[str, type[Architecture]] = {
    "BatchTopKSAE": BatchTopK,
    "AutoEncoderTopK": TopK,
    "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopK,
}
"""Names of the classes in dictionary_learning."""
_NUMPY: list[Any] = [
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLefd"},
    np.float64(0).__reduce__()[0],  # rebuilds a number
    np.zeros(0).__reduce__()[0],  # rebuilds an array
]
"""What arrays and numbers of numpy are made of: they hold no code."""


def recognises(place: Place) -> bool:
    return place.file is not None and place.file.endswith(".pt")


def read(place: Place) -> SAE:
    where = str(place)
    saved = _opened(place)
    refuse_by_tensors(where, saved)
    trainer = _trainer(place)
    kind = _kind(saved, trainer, where)
    facts: dict[str, Any] = {"reference_file": place.file}
    if kind is MatryoshkaBatchTopK:
        W_enc, b_enc, W_dec = (_tensor(saved, name, where) for name in ("W_enc", "b_enc", "W_dec"))
        facts["group_sizes"] = [int(size) for size in _tensor(saved, "group_sizes", where).flatten()]
        sizes = facts["group_sizes"]
        check(min(sizes) > 0 and sum(sizes) == len(b_enc), f"{where}: group_sizes", facts["group_sizes"],
              f"they must sum to the number of latents, {len(b_enc)}")  # fmt: skip
    else:
        names = ("encoder.weight", "encoder.bias", "decoder.weight")
        W_enc, b_enc, W_dec = (_tensor(saved, name, where) for name in names)
        W_enc, W_dec = W_enc.T, W_dec.T
    return SAE(
        architecture=kind.name,
        W_enc=W_enc.contiguous(),
        W_dec=W_dec.contiguous(),
        b_enc=b_enc,
        b_dec=_tensor(saved, "b_dec", where),
        threshold=_threshold(saved, len(b_enc), where) if kind.has_threshold else None,
        k=_k(saved if "k" in saved else trainer, where),
        metadata=facts,
    )


def _opened(place: Place) -> dict[str, Any]:
    assert place.file is not None
    data = place.folder.read_bytes(place.file)
    if data.startswith(b"{"):
        raise UsageError(f"{place} begins with a line of JSON, as an SAE of saev does; {CONVERT}")
    try:
        with torch.serialization.safe_globals(_NUMPY):
            saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        otherwise = (
            "is not a file of tensors that can be opened safely: it is damaged, or holds objects whose code would have "
            "to be run, which is never done; copy it again, or save its state_dict()"
        )
        raise not_tensors(data, str(place), otherwise) from error
    if not isinstance(saved, dict):
        raise UsageError(f"{place} holds a {type(saved).__name__}, not the named tensors of an SAE; {CONVERT}")
    return unwrapped(saved, str(place))


def _trainer(place: Place) -> dict[str, Any]:
    """What `config.json` says of training: it lies beside the SAE, or one level above if that is a checkpoint."""
    folder = place.folder
    if AE_CONFIG_FILE not in place.files and folder.name == "checkpoints":
        folder, _ = parent_and_name(folder.uri)
    if not folder.exists(AE_CONFIG_FILE):
        return {}
    config = folder.read_json(AE_CONFIG_FILE)
    trainer = config.get("trainer") if isinstance(config, dict) else None
    return trainer if isinstance(trainer, dict) else {}


def _kind(saved: dict[str, Any], trainer: dict[str, Any], where: str) -> type[Architecture]:
    """The architecture. Tensors of BatchTopK and TopK have the same names: only `config.json` tells them apart."""
    named = trainer.get("dict_class")
    if named is not None and named not in _CLASSES:
        raise UsageError(f"{where} is a {named}, as {AE_CONFIG_FILE} says; known are {', '.join(_CLASSES)}. {CONVERT}")
    fitting: list[type[Architecture]] = []
    if saved.keys() >= _PLAIN:
        fitting = [MatryoshkaBatchTopK]
    elif saved.keys() >= _LINEAR:
        fitting = [TopK, BatchTopK] if "threshold" in saved else [TopK]
    kind = _CLASSES[named] if named is not None else fitting[-1] if fitting else None
    if kind is None or kind not in fitting or (kind is TopK and named is None):
        raise UsageError(
            f"{where} holds {sorted(saved)}, which does not make {f'a {named}' if named else 'an SAE'}; a reference "
            f"checkpoint holds {sorted(_LINEAR | {'k', 'threshold'})} (BatchTopK) or {sorted(_PLAIN)} (Matryoshka)"
        )
    if further := saved.keys() - (_PLAIN if kind is MatryoshkaBatchTopK else _LINEAR | {"k", "threshold"}):
        raise UsageError(
            f"{where} also holds {sorted(further)}, which no {kind.name} SAE of the reference does; {CONVERT}"
        )
    if kind is BatchTopK and named is None:
        warnings.warn(
            f"{where} is taken for BatchTopK, as the reference code trains it. TopK of dictionary_learning has the "
            f"same tensors: if it is that, put its {AE_CONFIG_FILE} beside it",
            stacklevel=2,
        )
    return kind


def _tensor(saved: dict[str, Any], name: str, where: str) -> Tensor:
    """In float32; lists, arrays and numbers are tensors too."""
    value = saved[name]
    try:
        tensor = torch.as_tensor(value).detach()
        if tensor.is_complex() or tensor.is_meta:
            raise TypeError("it is complex" if tensor.is_complex() else "it has no values")
        return tensor.to_dense().float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{where}: {name} is a {type(value).__name__}, not a tensor or numbers ({error})") from error


def _threshold(saved: dict[str, Any], d_sae: int, where: str) -> Tensor:
    threshold = _tensor(saved, "threshold", where)
    if (threshold < 0).any():
        raise UsageError(
            f"{where}: threshold = {threshold.min().item():g} means that it was never set: the SAE was saved before "
            "the reference's threshold_start_step, and without a threshold it would keep every positive value; train "
            "longer"
        )
    return threshold.expand(d_sae).clone() if threshold.numel() == 1 else threshold


def _k(values: dict[str, Any], where: str) -> int:
    k = _tensor(values, "k", where) if "k" in values else torch.zeros(())
    check(k.numel() == 1 and k.item() >= 1 and k.item() == int(k), f"{where}: k", values.get("k"),
          f"not a whole number from 1; put it under trainer.k in the {AE_CONFIG_FILE} beside the file")  # fmt: skip
    return int(k)
