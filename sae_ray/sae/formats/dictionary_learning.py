"""Checkpoints of dictionary_learning, and of the paper's reference code, ExplainableML/sae-for-vlm, which builds on it.

`ae.pt` has the tensors, and `config.json` beside it names the class. They are read as version 0.1.0 reads them.
"""

from __future__ import annotations

import io
import pickle
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sae_ray.errors import UsageError, check
from sae_ray.sae.architectures import BatchTopK, JumpReLU, MatryoshkaBatchTopK, ReLU, TopK
from sae_ray.sae.formats.others import CONVERT, refuse_by_tensors
from sae_ray.sae.formats.places import AE_CONFIG_FILE, AE_FILE, Place
from sae_ray.sae.formats.tensors import not_tensors, of_centred, of_uncentred, unit_norms, unwrapped
from sae_ray.sae.model import SAE
from sae_ray.store.files import Folder, parent_and_name

if TYPE_CHECKING:
    from torch import Tensor

    from sae_ray.sae.architectures import Architecture


class _Class(NamedTuple):
    """A class of dictionary_learning."""

    kind: type[Architecture]
    needed: frozenset[str]
    """Names of its tensors."""
    optional: frozenset[str] = frozenset()
    """Those that older versions lack."""


_LINEAR = frozenset({"encoder.weight", "encoder.bias", "decoder.weight"})
_PLAIN = frozenset({"W_enc", "W_dec", "b_enc", "b_dec"})
_CLASSES = {
    "BatchTopKSAE": _Class(BatchTopK, _LINEAR | {"b_dec", "threshold"}, frozenset({"k"})),
    "AutoEncoderTopK": _Class(TopK, _LINEAR | {"b_dec"}, frozenset({"k", "threshold"})),
    "MatryoshkaBatchTopKSAE": _Class(MatryoshkaBatchTopK, _PLAIN | {"k", "threshold", "group_sizes"}),
    "JumpReluAutoEncoder": _Class(JumpReLU, _PLAIN | {"threshold"}),
    "AutoEncoder": _Class(ReLU, _LINEAR | {"bias"}),
    "AutoEncoderNew": _Class(ReLU, _LINEAR | {"decoder.bias"}),
}
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
    named = _class(saved, trainer, where)
    kind = _CLASSES[named].kind

    def tensor(name: str) -> Tensor:
        return _tensor(saved, name, where)

    facts: dict[str, Any] = {"reference_file": place.file}
    if "W_enc" in saved:
        W_enc, b_enc, W_dec = (tensor(name) for name in ("W_enc", "b_enc", "W_dec"))
    else:
        W_enc, b_enc, W_dec = (tensor(name) for name in ("encoder.weight", "encoder.bias", "decoder.weight"))
        W_enc, W_dec = W_enc.T, W_dec.T
    b_dec = tensor({"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(named, "b_dec"))
    if kind is MatryoshkaBatchTopK:
        sizes = facts["group_sizes"] = [int(size) for size in tensor("group_sizes").flatten()]
        check(min(sizes) > 0 and sum(sizes) == len(b_enc), f"{where}: group_sizes", sizes,
              f"they must sum to the number of latents, {len(b_enc)}")  # fmt: skip
    if named in ("JumpReluAutoEncoder", "AutoEncoderNew"):
        b_enc = of_centred(W_enc, b_enc, b_dec)
    norms = W_dec.norm(dim=1)
    if named == "AutoEncoder" and not unit_norms(norms):  # its loader makes them 1, too
        W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
    if named == "JumpReluAutoEncoder" and not unit_norms(norms):
        warnings.warn(
            f"{where} is read as dictionary_learning 0.1.0 does. Other versions multiply codes by the norms of the "
            "decoder's rows, which are not 1 here",
            stacklevel=2,
        )
    return SAE(
        architecture=kind.name,
        W_enc=W_enc.contiguous(),
        W_dec=W_dec.contiguous(),
        b_enc=b_enc,
        b_dec=b_dec,
        threshold=_threshold(saved, len(b_enc), where) if kind.has_threshold else None,
        k=_k(saved if "k" in saved else trainer, where) if kind.tuned_by == "k" else None,
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


def _class(saved: dict[str, Any], trainer: dict[str, Any], where: str) -> str:
    """The name of the class. Tensors of BatchTopK and TopK have the same names: only `config.json` tells them apart."""
    named = trainer.get("dict_class")
    if named is not None and named not in _CLASSES:
        raise UsageError(f"{where} is a {named}, as {AE_CONFIG_FILE} says; known are {', '.join(_CLASSES)}. {CONVERT}")
    fitting = [name for name, one in _CLASSES.items() if one.needed <= saved.keys()]
    unnamed = [name for name in fitting if name != "AutoEncoderTopK"]
    if named not in fitting if named is not None else not unnamed:
        known = "; ".join(f"{name}: {', '.join(sorted(one.needed))}" for name, one in _CLASSES.items())
        raise UsageError(
            f"{where} holds {sorted(saved)}, which does not make {f'a {named}' if named else 'an SAE'}; a reference "
            f"checkpoint holds one of these: {known}"
        )
    chosen = named or unnamed[0]
    one = _CLASSES[chosen]
    if further := saved.keys() - one.needed - one.optional:
        raise UsageError(
            f"{where} also holds {sorted(further)}, which no {one.kind.name} SAE of the reference does; {CONVERT}"
        )
    if chosen == "BatchTopKSAE" and named is None:
        warnings.warn(
            f"{where} is taken for BatchTopK, as the reference code trains it. TopK of dictionary_learning has the "
            f"same tensors: if it is that, put its {AE_CONFIG_FILE} beside it",
            stacklevel=2,
        )
    return chosen


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


def write(sae: SAE, folder: Folder) -> None:
    """Writes `ae.pt` and `config.json`, which dictionary_learning's `load_dictionary` opens.

    Classes with one threshold for all latents get it; an SAE whose thresholds differ becomes a JumpReluAutoEncoder.
    """
    name, tensors = _expressed(sae)
    trainer: dict[str, Any] = {"dict_class": name, "activation_dim": sae.d_in, "dict_size": sae.d_sae}
    if "k" in tensors:
        trainer["k"] = sae.k
    data = io.BytesIO()
    torch.save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, data)
    folder.write_bytes(AE_FILE, data.getvalue())
    folder.write_json(AE_CONFIG_FILE, {"trainer": trainer, "buffer": {}})


def _expressed(sae: SAE) -> tuple[str, dict[str, Tensor]]:
    """The name of the class, and its tensors."""
    plain = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    linear = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc, "decoder.weight": sae.W_dec.T}
    uncentred = of_uncentred(sae.W_enc, sae.b_enc, sae.b_dec)
    if sae.threshold is None and sae.k is None:
        return "AutoEncoderNew", linear | {"encoder.bias": uncentred, "decoder.bias": sae.b_dec}
    k = torch.tensor(sae.k or 0, dtype=torch.int32)
    if sae.threshold is None:
        return "AutoEncoderTopK", linear | {"b_dec": sae.b_dec, "k": k, "threshold": torch.tensor(-1.0)}
    one = sae.threshold[0].clamp_min(0)
    if sae.k is None or not torch.equal(sae.threshold.clamp_min(0), one.expand(sae.d_sae)):
        return "JumpReluAutoEncoder", plain | {"b_enc": uncentred, "threshold": sae.threshold}
    if issubclass(sae.kind, MatryoshkaBatchTopK):
        sizes = torch.tensor(_group_sizes(sae))
        return "MatryoshkaBatchTopKSAE", plain | {"k": k, "threshold": one, "group_sizes": sizes}
    return "BatchTopKSAE", linear | {"b_dec": sae.b_dec, "k": k, "threshold": one}


def _group_sizes(sae: SAE) -> list[int]:
    """Of the nested prefixes, from the facts of its training; one group where they do not tell."""
    settings = sae.metadata.get("cell", {}).get("settings")
    if settings is not None:
        return sae.kind.groups(sae.kind.Settings(**settings), sae.d_sae)
    return sae.metadata.get("group_sizes", [sae.d_sae])
