"""SAEs of KempnerInstitute/overcomplete and of ViSAEBench: tensors in `sae.pt`, the rest in `config.json`.

overcomplete itself keeps only tensors. ViSAEBench adds the configuration, in whose terms it is written here too, and
knows another set of tensors, with a bias of the decoder. Neither subtracts anything from its input.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
import yaml

from sae_ray.errors import SaeRayError, UsageError, check
from sae_ray.sae.architectures import BatchTopK, JumpReLU, ReLU, TopK
from sae_ray.sae.formats.others import CONVERT
from sae_ray.sae.formats.places import AE_CONFIG_FILE, CONFIG_FILE, OVERCOMPLETE_CONFIG_FILES, OVERCOMPLETE_FILES, Place
from sae_ray.sae.formats.tensors import not_tensors, of_centred, unwrapped
from sae_ray.sae.model import SAE
from sae_ray.store.files import Folder

if TYPE_CHECKING:
    from torch import Tensor

    from sae_ray.sae.architectures import Architecture

_KINDS: dict[str, type[Architecture]] = {"topk": TopK, "batchtopk": BatchTopK, "jumprelu": JumpReLU, "relu": ReLU}
"""`activation` of the configuration -> architecture."""
_CLASSES = {TopK: "TopKSAE", JumpReLU: "JumpSAE", ReLU: "SAE"}
_ENCODER = "encoder.final_block.0"
_ACTIVATIONS = ("activation", "sae_type", "architecture")
"""Keys that may name it."""


def recognises(place: Place) -> bool:
    if place.file is not None or CONFIG_FILE in place.files:
        return False
    if not place.files & {*OVERCOMPLETE_FILES} or not place.files & {*OVERCOMPLETE_CONFIG_FILES}:
        return False
    # Models of transformers lie in a `model.safetensors` too, beside their own configuration.
    return "sae.pt" in place.files or _activation(_config(place)) in _KINDS


def read(place: Place) -> SAE:
    config, where = _config(place), str(place)
    named = _activation(config)
    check(named in _KINDS, f"{where}: activation", named, f"not known; it is one of {', '.join(_KINDS)}")
    kind, tensors = _KINDS[str(named)], _tensors(place)
    W_enc, b_enc, W_dec, b_dec = _weights(tensors, config, where)
    threshold = _threshold(kind, tensors, config, len(b_enc), where)
    if tensors:
        raise UsageError(f"{where} also holds {sorted(tensors)}, which a {named} SAE does not; {CONVERT}")
    if "centre" in config:
        b_dec = torch.tensor(config.pop("centre"), dtype=torch.float32)
    else:
        b_enc = of_centred(W_enc, b_enc, b_dec)
    k = config.get("k")
    check(k is None or (type(k) is int and k > 0), f"{where}: k", k, "not a whole number from 1")
    return SAE(
        architecture=kind.name,
        W_enc=W_enc.contiguous(),
        W_dec=W_dec.contiguous(),
        b_enc=b_enc,
        b_dec=b_dec,
        threshold=threshold,
        k=k if kind.tuned_by == "k" else None,
        metadata={"overcomplete": config},
    )


def _config(place: Place) -> dict[str, Any]:
    name = next(name for name in OVERCOMPLETE_CONFIG_FILES if name in place.files)
    if name == AE_CONFIG_FILE:
        config = place.folder.read_json(name)
    else:
        try:
            config = yaml.safe_load(place.folder.read_bytes(name))
        except yaml.YAMLError as error:
            raise SaeRayError(f"{place.folder / name} is not YAML ({error}); copy it again") from error
    check(isinstance(config, dict), str(place.folder / name), config, "not an object; copy it again")
    return config


def _activation(config: dict[str, Any]) -> str | None:
    """In lower case, as its reader takes it; topk where nothing is said."""
    named = next((config[key] for key in _ACTIVATIONS if key in config), "topk")
    return named.lower() if isinstance(named, str) else None


def _tensors(place: Place) -> dict[str, Tensor]:
    name = next(name for name in OVERCOMPLETE_FILES if name in place.files)
    where = str(place.folder / name)
    data = place.folder.read_bytes(name)
    if data.startswith(b"{"):
        raise UsageError(f"{where} begins with a line of JSON, as an SAE of saev does; {CONVERT}")
    try:
        if name.endswith(".safetensors"):
            saved = safetensors.torch.load(data)
        else:
            saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise not_tensors(data, where, "is no file of tensors that can be opened safely; copy it again") from error
    check(isinstance(saved, dict), where, type(saved).__name__, "not the named tensors of an SAE")
    for key, value in saved.items():
        check(isinstance(value, torch.Tensor), f"{where}: {key}", type(value).__name__, "not a tensor")
    return {key: value.float() for key, value in unwrapped(saved, where).items()}


def _weights(tensors: dict[str, Tensor], config: dict[str, Any], where: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_enc, b_enc, W_dec and the decoder's bias, which are taken out of the tensors."""
    if {"encoder.weight", "encoder.bias", "decoder.weight"} <= tensors.keys():
        W_enc, b_enc, W_dec = (tensors.pop(name) for name in ("encoder.weight", "encoder.bias", "decoder.weight"))
        b_dec = tensors.pop("decoder.bias", W_enc.new_zeros(W_enc.shape[1]))
        return W_enc.T, b_enc, W_dec, b_dec
    needed = (f"{_ENCODER}.weight", f"{_ENCODER}.bias", "dictionary._weights")
    if not tensors.keys() >= {*needed}:
        raise UsageError(
            f"{where} holds the tensors {sorted(tensors)}, which make no SAE with a linear encoder of overcomplete or "
            f"ViSAEBench; {CONVERT}"
        )
    W_enc, b_enc, W_dec = (tensors.pop(name) for name in needed)
    W_dec = W_dec * tensors.pop("dictionary.multiplier", W_dec.new_zeros(())).exp()
    normalised = config.get("normalization", "identity")
    check(normalised in ("identity", "l2"), f"{where}: normalization", normalised, "make it identity or l2")
    if normalised == "l2":
        W_dec = W_dec / (W_dec.norm(dim=1, keepdim=True) + 1e-8)
    return W_enc.T, b_enc, W_dec, W_enc.new_zeros(W_enc.shape[1])


def _threshold(
    kind: type[Architecture], tensors: dict[str, Tensor], config: dict[str, Any], d_sae: int, where: str
) -> Tensor | None:
    """What codes must exceed, which is taken out of the tensors. There, most of them need only reach it."""
    if kind is JumpReLU:
        if "jump_thresholds" in tensors:
            return tensors.pop("jump_thresholds")
        if "thresholds" in tensors:
            return _below(tensors.pop("thresholds").exp())
        raise UsageError(f"{where} has no thresholds, neither as jump_thresholds nor as thresholds; copy it again")
    if kind is not BatchTopK:
        return None
    running = tensors.pop("_running_threshold", None)
    value = config.get("threshold", running)
    if value is None:
        raise UsageError(
            f"{where} has no threshold, without which it would keep every positive value: put it under threshold in "
            f"its configuration (running_threshold in overcomplete)"
        )
    return _below(torch.as_tensor(value, dtype=torch.float32).reshape(()).expand(d_sae).clone())


def _below(reached: Tensor) -> Tensor:
    """x > this exactly where x >= `reached`, for x above 0."""
    return torch.nextafter(reached, torch.full_like(reached, -torch.inf)).clamp_min(0)


def _logarithms(threshold: Tensor) -> Tensor:
    """Float32 numbers whose exponentials are just above the threshold: there, they are reached and not exceeded."""
    infinity = torch.full_like(threshold, torch.inf)
    found = torch.nextafter(threshold, infinity).double().log().float()
    for _ in range(4):  # rounding may have brought some down again
        found = torch.where(found.exp() > threshold, found, torch.nextafter(found, infinity))
    return found.where(threshold > 0, -infinity)


def write(sae: SAE, folder: Folder, centred: bool = False) -> None:
    """Writes `sae.pt`, the tensors of overcomplete's TopKSAE, JumpSAE or SAE, and `config.json`.

    Args:
        centred: Write the SAE of activations less `b_dec`, which is `centre` in `config.json`.

    Raises UsageError for an SAE with a `b_dec` unless `centred`: overcomplete's decoder has no bias.
    """
    if sae.b_dec.any() and not centred:
        raise UsageError(
            f"b_dec has the norm {sae.b_dec.norm().item():.3g}, and overcomplete's decoder has no bias; with --centred "
            "the SAE is written for activations less b_dec, which is then `centre` in config.json"
        )
    kind = JumpReLU if sae.kind.has_threshold else sae.kind
    tensors = {
        f"{_ENCODER}.weight": sae.W_enc.T,
        f"{_ENCODER}.bias": sae.b_enc,
        "dictionary._weights": sae.W_dec,
        "dictionary.multiplier": torch.zeros(()),
    }
    if sae.threshold is not None:
        tensors["thresholds"] = _logarithms(sae.threshold.clamp_min(0))
    config: dict[str, Any] = {
        "library": "overcomplete",
        "class": _CLASSES[kind],
        "activation": next(name for name, one in _KINDS.items() if one is kind),
        "input_dim": sae.d_in,
        "hidden_dim": sae.d_sae,
        "normalization": "identity",
    }
    config |= {"k": sae.k} if kind is TopK else {}
    config |= {"centre": sae.b_dec.tolist()} if sae.b_dec.any() else {}
    data = io.BytesIO()
    torch.save({name: tensor.detach().cpu().float().contiguous().clone() for name, tensor in tensors.items()}, data)
    folder.write_bytes("sae.pt", data.getvalue())
    folder.write_json(AE_CONFIG_FILE, config)
