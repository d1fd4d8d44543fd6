"""SAELens directories, ours and others': the native format.

A directory of `cfg.json` and `sae_weights.safetensors` that SAELens 6 opens as it is. Facts that SAELens does not know
are in `cfg.json` under `metadata.sae_ray`, those per latent in `latents.parquet` beside it. Directories of earlier
versions, as most releases have them, are read as SAELens 6 reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError

from sae_ray.errors import SaeRayError, UsageError, check
from sae_ray.sae.architectures import ARCHITECTURES, architecture
from sae_ray.sae.formats.places import CONFIG_FILE, LATENTS_FILE, WEIGHTS_FILE, Place
from sae_ray.sae.formats.tensors import not_tensors, of_centred, unwrapped
from sae_ray.sae.model import SAE
from sae_ray.store.tensors import read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from sae_ray.sae.architectures import Architecture
    from sae_ray.sae.metrics import LatentStatistics
    from sae_ray.store.files import Folder

_COPY_AGAIN = "copy the SAE again"
# Without a version in the metadata, SAELens reads the directory as one of its older formats.
_SAE_LENS_VERSION = "6.54.0"
_SCHEMA = 1
"""Schema version of `metadata.sae_ray`."""
_TRAINING = "It is a training checkpoint: write it with save_inference_model() in SAELens"
_NOT_OPENED = {
    "abstopk": "Its codes are signed, and sae-ray's thresholds, scores and steering take codes of 0 or more: train a "
    "topk SAE instead",
    "batchtopk": _TRAINING,
    "gated": "sae-ray has no gate: train one of the others",
    "matching_pursuit": "It picks its latents one after the other: train one of the others",
    "matryoshka_batchtopk": _TRAINING,
    "temporal": "Its codes depend on the tokens before: train one of the others",
}
"""Architectures of SAELens -> why they are refused, and what to do."""
_FACTS = ("model_name", "hook_name", "hook_layer", "dataset_path", "context_size", "neuronpedia_id", "sae_lens_version")
"""What an earlier version says of the data, in its `cfg.json`."""
_EARLIER = {"hook_point", "hook_name", "activation_fn", "activation_fn_str"}
"""Keys of which SAELens before 6 wrote at least one."""


def write(sae: SAE, folder: Folder) -> None:
    """As `save_sae`, but raises UsageError if SAELens would refuse the directory."""
    if sae.kind.sae_lens.startswith("sae_ray_"):
        raise UsageError(f"architecture = {sae.architecture!r}: SAELens has none that computes the same codes")
    save_sae(sae, folder)


def save_sae(sae: SAE, folder: Folder) -> None:
    """Writes the SAE into `folder`, in float32; `cfg.json` comes last."""
    tensors = {name: getattr(sae, name).detach().cpu().float().contiguous() for name in _names(sae.kind)}
    config: dict[str, Any] = {
        "architecture": sae.kind.sae_lens,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": _SAE_LENS_VERSION, "sae_ray": _facts(sae)},
        **sae.kind.sae_lens_config(sae),
    }
    write_tensors(folder, WEIGHTS_FILE, tensors)
    folder.write_json(CONFIG_FILE, config)


def _facts(sae: SAE) -> dict[str, Any]:
    """What SAELens does not know."""
    facts: dict[str, Any] = {"schema": _SCHEMA, "architecture": sae.architecture, "k": sae.k, "facts": sae.metadata}
    return facts | ({"concepts": list(sae.concepts)} if sae.concepts else {})


def save_latents(latents: LatentStatistics, folder: Folder, concepts: Sequence[str] = ()) -> None:
    """Writes the sidecar `latents.parquet` of an SAE's directory: `latent` and a column per statistic.

    Args:
        concepts: those of the first latents of a guided SAE, which get a column `concept`.
    """
    n = len(latents.frequency)
    columns: dict[str, Any] = {name: column.numpy() for name, column in latents._asdict().items()}
    if concepts:
        columns["concept"] = pa.array([*concepts, *[None] * (n - len(concepts))], pa.string())
    folder.write_parquet(LATENTS_FILE, pa.table({"latent": np.arange(n), **columns}))


def _names(kind: type[Architecture]) -> list[str]:
    names = ["W_enc", "W_dec", "b_enc", "b_dec"]
    return [*names, "threshold"] if kind.has_threshold else names


def recognises(place: Place) -> bool:
    return place.file is None and CONFIG_FILE in place.files


def read(place: Place) -> SAE:
    folder = place.folder
    config = folder.read_json(CONFIG_FILE)
    where = str(folder / CONFIG_FILE)
    if not isinstance(config, dict):
        raise UsageError(f"{where} is not a JSON object; {_COPY_AGAIN}")
    metadata = config.get("metadata") or {}
    check(isinstance(metadata, dict), f"{where}: metadata", metadata, f"make it an object; {_COPY_AGAIN}")
    version = str(metadata.get("sae_lens_version") or config.get("sae_lens_version") or "")
    if not version.split(".")[0].isdigit() or int(version.split(".")[0]) < 6:
        if not config.keys() & _EARLIER:
            raise UsageError(
                f"{folder}: sae_lens_version = {version or None!r}, and {CONFIG_FILE} has none of the keys of earlier "
                "versions; open it and save it again with SAELens 6"
            )
        config, metadata = _as_version_6(config), {}
    ours = "sae_ray" in metadata
    kind, k, facts = _ours(config, where) if ours else _foreign(config, where)
    concepts = _concepts(metadata["sae_ray"].get("concepts", []), where) if ours else ()
    _check_conventions(config, where)
    for name in ("d_in", "d_sae"):
        check(type(config.get(name)) is int, f"{where}: {name}", config.get(name),
              "not a width; correct it ([d_in, d_sae] is the shape of W_enc), or save the SAE again")  # fmt: skip
    tensors = _read_weights(place, _names(kind))
    if tuple(tensors["W_enc"].shape) != (config["d_in"], config["d_sae"]):
        raise SaeRayError(
            f"{folder}: W_enc has shape {list(tensors['W_enc'].shape)}, {CONFIG_FILE} says d_in = {config['d_in']}, "
            f"d_sae = {config['d_sae']}; the two files do not belong together"
        )
    if not config.get("apply_b_dec_to_input", True):
        tensors["b_enc"] = of_centred(tensors["W_enc"], tensors["b_enc"], tensors["b_dec"])
    weights: dict[str, Any] = {name: tensors[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    threshold = tensors.get("threshold")
    return SAE(architecture=kind.name, **weights, threshold=threshold, k=k, concepts=concepts, metadata=facts)


def _as_version_6(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a directory of SAELens before 6, in the terms of version 6."""
    terms = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    config = {terms.get(key, key): value for key, value in config.items()}
    function, settings = config.get("activation_fn", "relu"), config.get("activation_fn_kwargs") or {}
    config["architecture"] = config.get("architecture") or "standard"
    if function == "topk" and settings.get("k") is not None:
        config |= {"architecture": "topk", "activation_fn": "relu", "k": settings["k"]}
    if isinstance(config.get("normalize_activations"), bool):
        config["normalize_activations"] = "expected_average_only_in" if config["normalize_activations"] else "none"
    if "hook_z" in str(config.get("hook_name")):
        config.setdefault("reshape_activations", "hook_z")
    config["metadata"] = {key: config[key] for key in _FACTS if config.get(key) is not None}
    return config


def _check_conventions(config: dict[str, Any], where: str) -> None:
    """Raises UsageError if the SAE computes something else than its architecture says."""
    function = "name the right architecture (topk, with its k) instead, or save it again with SAELens 6"
    needed = {
        "normalize_activations": ("none", "fold the normalisation into the weights in SAELens and save it again"),
        "reshape_activations": ("none", "save it for flat activations in SAELens"),
        "rescale_acts_by_decoder_norm": (
            False,
            "call fold_W_dec_norm() and set it to false in SAELens, and save it again",
        ),
        "finetuning_scaling_factor": (False, "multiply b_dec and W_dec by it in SAELens and save it again"),
        "activation_fn": ("relu", function),
        "activation_fn_str": ("relu", function),
    }
    for key, (value, remedy) in needed.items():
        check(config.get(key) in (None, value), f"{where}: {key}", config.get(key), f"cannot be opened; {remedy}")
    applied = config.get("apply_b_dec_to_input", True)
    check(isinstance(applied, bool), f"{where}: apply_b_dec_to_input", applied, "make it true or false")


def _ours(config: dict[str, Any], where: str) -> tuple[type[Architecture], int | None, dict[str, Any]]:
    """Architecture, k and facts of a directory that sae-ray wrote."""
    ours, at = config["metadata"]["sae_ray"], f"{where}: metadata.sae_ray"
    check(isinstance(ours, dict), at, ours, f"not an object; {_COPY_AGAIN}")
    check(ours.get("schema") == _SCHEMA, f"{at}.schema", ours.get("schema"),
          f"this sae-ray reads schema {_SCHEMA}; use the version that wrote it")  # fmt: skip
    kind = architecture(ours.get("architecture"), f"{at}.architecture", "; or use the version that wrote it")
    check(kind.sae_lens == config.get("architecture"), f"{where}: architecture", config.get("architecture"),
          f"{kind.name} is stored as {kind.sae_lens!r}; {_COPY_AGAIN}")  # fmt: skip
    facts = ours.get("facts")
    check(isinstance(facts, dict), f"{at}.facts", facts, f"not an object; {_COPY_AGAIN}")
    return kind, _k(ours.get("k"), f"{at}.k"), facts


def _foreign(config: dict[str, Any], where: str) -> tuple[type[Architecture], int | None, dict[str, Any]]:
    """The same of a directory that SAELens wrote."""
    kinds = [kind for kind in ARCHITECTURES.values() if kind.opens_sae_lens]
    for kind in kinds:
        if kind.sae_lens == config.get("architecture"):
            return kind, _k(config.get("k"), f"{where}: k"), {"sae_lens": config.get("metadata") or {}}
    named = str(config.get("architecture"))
    reason = _NOT_OPENED.get(named, "Train one of these, or convert it")
    if named.endswith("transcoder"):
        reason = "It predicts another activation than it reads: train an SAE"
    raise UsageError(
        f"{where}: architecture {config.get('architecture')!r} cannot be opened; known are "
        f"{', '.join(kind.sae_lens for kind in kinds)}. {reason}"
    )


def _concepts(value: Any, where: str) -> tuple[str, ...]:
    names = isinstance(value, list) and all(isinstance(name, str) for name in value)
    check(names, f"{where}: metadata.sae_ray.concepts", value, f"not a list of names; {_COPY_AGAIN}")
    return tuple(value)


def _k(value: Any, field: str) -> int | None:
    check(value is None or type(value) is int, field, value, f"not a whole number; {_COPY_AGAIN}")
    return value


def _read_weights(place: Place, names: list[str]) -> dict[str, Tensor]:
    where = str(place.folder / WEIGHTS_FILE)
    if WEIGHTS_FILE not in place.files:
        raise SaeRayError(f"{place} has no {WEIGHTS_FILE}; copy it again")
    try:
        tensors = unwrapped(read_tensors(place.folder, WEIGHTS_FILE), where)
    except SafetensorError as error:
        raise not_tensors(
            place.folder.read_bytes(WEIGHTS_FILE), where, f"is damaged ({error}); copy it again"
        ) from error
    if "scaling_factor" in tensors and (tensors["scaling_factor"] == 1).all():
        del tensors["scaling_factor"]  # earlier versions of SAELens wrote it where it was not used
    if set(tensors) != set(names):
        raise UsageError(f"{where} holds the tensors {sorted(tensors)}, but must hold exactly {names}")
    for name, tensor in tensors.items():
        check(tensor.is_floating_point(), f"{where}: dtype of {name}", str(tensor.dtype), "save it in float32")
    return {name: tensor.float() for name, tensor in tensors.items()}
