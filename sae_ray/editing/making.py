"""Makes the patch that takes a latent out of a model. Of the model's files only the changed tensors are read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, assert_never, get_args

import torch

from sae_ray.editing.changes import Change, RankOne, Replaced
from sae_ray.editing.checkpoint import Stored, directory_of, stored_tensors
from sae_ray.editing.operators import Mask, Operator, Projection, direction_of, exchanged_vectors
from sae_ray.editing.patch import Facts, Keep, Mode, Patch, Scope
from sae_ray.encoders.hub import find
from sae_ray.encoders.info import EncoderInfo
from sae_ray.encoders.sources import FORMS
from sae_ray.encoders.transformers_models import describe
from sae_ray.errors import UsageError, check
from sae_ray.store.files import address_shown

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from sae_ray.sae import SAE

READER = "multi_modal_projector.linear_1"
PROJECTION = "visual_projection"
_EMBEDDINGS = ("embeddings.patch_embedding.", "embeddings.patch_embeddings.projection.")
_TABLES = (
    "embeddings.class_embedding",
    "embeddings.cls_token",
    "embeddings.register_tokens",
    "embeddings.position_embedding",
)
_WRITER = re.compile(
    r"encoder\.layers?\.(?P<block>\d+)\."
    r"(?P<part>self_attn\.out_proj|attention\.output\.dense|mlp\.fc2|mlp\.weights_out)\.(weight|bias)"
)


def make_patch(
    model: str,
    sae: SAE,
    latent: int,
    *,
    sae_name: str,
    revision: str | None = None,
    mode: Mode = "project",
    scope: Scope | None = None,
    layer: int | None = None,
    keep: Keep = "origin",
    share: float = 0.9,
    kappa: float | None = None,
    value: float | None = None,
) -> Patch:
    """The change of a model's weights that takes out one latent.

    Args:
        model: A LLaVA, CLIP, SigLIP or DINOv2 in the transformers format.
        sae: Of what the scope writes or reads: the residual stream after the block `layer`, for `projection` the image
            embedding; for the mode `vectors` the output of that block's MLP.
        sae_name: How the SAE is named in the patch.
        scope: Default: `mlp` for the mode `vectors`; else `reader` for a LLaVA, and for others `writers` if a layer is
            given and `projection` if not.
        layer: Default for a LLaVA: the block that it reads.
        keep: `mean` leaves the value of the SAE's `b_dec` along û instead of 0; for the scope `reader`.
        share: For `rows`: the share of ‖d‖² that the coordinates carry.
        kappa, value: For `vectors`, as `exchanged_vectors` has them; the authors choose them per concept.

    Raises:
        UsageError: A value is unknown, values do not go together, or the SAE does not fit the model.
    """
    check(mode in get_args(Mode), "mode", mode, f"choose one of {', '.join(get_args(Mode))}")
    check(keep in get_args(Keep), "keep", keep, f"choose one of {', '.join(get_args(Keep))}")
    check(0 < share <= 1, "share", share, "choose a share above 0, at most 1")
    if model.startswith("open_clip:"):
        raise UsageError(f"model is {model!r}; edits need a model in the transformers format: a directory or a hub id")
    source = find(model, revision, FORMS)
    info = describe(model, source.revision)
    is_llava = info.family == "llava"
    if is_llava and layer is None:
        from sae_ray.steering.llava import describe_llava

        layer = describe_llava(model, source.revision).layer
    if scope is None:
        scope = _default_scope(mode, is_llava, layer)
    check(scope in get_args(Scope), "scope", scope, f"choose one of {', '.join(get_args(Scope))}")
    check(mode != "vectors" or scope == "mlp", "scope", scope,
          "the mode vectors needs an SAE of an MLP's output (a site layer<L>.mlp), and the scope mlp")  # fmt: skip
    check(keep == "origin" or scope == "reader", "keep", keep, "only the scope reader keeps a mean; leave it out")
    stored = stored_tensors(directory_of(source))
    if mode == "vectors":
        changes = _vectors(stored, info, sae, latent, layer, kappa, value)
    else:
        check(kappa is None and value is None, "kappa, value", (kappa, value), "only the mode vectors takes them")
        direction = direction_of(sae, latent)
        operator = Projection(direction) if mode == "project" else Mask.of(direction, share)
        changes = _linear(stored, info, sae, operator, scope, layer, keep)
    block = layer if scope in ("writers", "mlp") else None
    return Patch(Facts(address_shown(model), source.revision, sae_name, latent, mode, scope, block, keep), changes)


def _default_scope(mode: Mode, is_llava: bool, layer: int | None) -> Scope:
    if mode == "vectors":
        return "mlp"
    if is_llava:
        return "reader"
    return "projection" if layer is None else "writers"


def _linear(
    stored: Mapping[str, Stored],
    info: EncoderInfo,
    sae: SAE,
    operator: Operator,
    scope: Scope,
    layer: int | None,
    keep: Keep,
) -> dict[str, Change]:
    match scope:
        case "reader":
            return _reader(stored, info, sae, operator, keep)
        case "projection":
            weight = _tensor(stored, f"{PROJECTION}.weight", info, scope, "take a CLIP, or the scope writers")
            _check_width(sae, len(weight), f"{PROJECTION} of {info.name} gives")
            return {f"{PROJECTION}.weight": operator.written(weight)}
        case "writers" | "mlp":
            block = _block(info, scope, layer)
            _check_width(sae, info.residual_width, f"the residual stream of {info.name} is")
            return dict(_writers(stored, operator, block, scope == "mlp"))
        case never:
            assert_never(never)


def _reader(
    stored: Mapping[str, Stored], info: EncoderInfo, sae: SAE, operator: Operator, keep: Keep
) -> dict[str, Change]:
    weight = _tensor(stored, f"{READER}.weight", info, "reader", "take a LLaVA, or the scope writers")
    _check_width(sae, weight.shape[1], f"{READER} of {info.name} reads")
    changes = {f"{READER}.weight": operator.read(weight)}
    if keep == "mean":
        _tensor(stored, f"{READER}.bias", info, "reader", "leave out keep = 'mean'")
        mean = sae.b_dec.double().cpu()
        changes[f"{READER}.bias"] = RankOne(weight.double() @ (mean - operator(mean)), torch.ones(1))
    return changes


def _writers(
    stored: Mapping[str, Stored], operator: Operator, block: int, only_mlp: bool
) -> Iterator[tuple[str, Change]]:
    """Of all that writes into the residual stream up to a block, or of that block's MLP alone.

    Where a LayerNorm stands between embeddings and stream, as in CLIP, no change of the embeddings would take anything
    out of the stream, and none is made.
    """
    normed = any(name.startswith("pre_layrnorm.") for name in stored)
    for name, place in stored.items():
        if found := _WRITER.fullmatch(name):
            number, is_mlp = int(found["block"]), found["part"].startswith("mlp.")
            if (number == block and is_mlp) if only_mlp else number <= block:
                yield name, operator.written(_by_output(place.read()), _layer_scale(stored, number, is_mlp))
        elif normed or only_mlp:
            continue
        elif name.startswith(_EMBEDDINGS):
            yield name, operator.written(_by_output(place.read()))
        elif name.startswith(_TABLES):
            tokens = place.read()
            yield name, operator.read(tokens.reshape(-1, tokens.shape[-1]))


def _layer_scale(stored: Mapping[str, Stored], block: int, is_mlp: bool) -> Float[Tensor, " d"] | None:
    """What DINOv2 multiplies a writer's output with; None for others."""
    place = stored.get(f"encoder.layer.{block}.layer_scale{1 + is_mlp}.lambda1")
    if place is None:
        return None
    scale = place.read().double()
    if not scale.all():
        raise UsageError(
            f"{place.name} has zeros, so nothing before it can remove a direction; choose the scope reader"
        )
    return scale


def _vectors(
    stored: Mapping[str, Stored],
    info: EncoderInfo,
    sae: SAE,
    latent: int,
    layer: int | None,
    kappa: float | None,
    value: float | None,
) -> dict[str, Change]:
    direction_of(sae, latent)
    block = _block(info, "mlp", layer)
    if kappa is None or value is None or not 0 <= kappa < 1:
        raise UsageError(
            f"kappa, value = {kappa}, {value}: the mode vectors needs both, kappa from 0 to below 1; a value of 0 "
            "ablates, a negative one pushes away"
        )
    weights = [f"encoder.layer{s}.{block}.mlp.{one}.weight" for s in ("s", "") for one in ("fc2", "weights_out")]
    [name] = [one for one in weights if one in stored]
    weight = stored[name].read()
    _check_width(sae, len(weight), f"the MLP of block {block} of {info.name} gives")
    found = exchanged_vectors(weight.float().T, sae, {latent: 1.0}, kappa, value)
    if not len(found.index):
        raise UsageError(f"kappa, value = {kappa}, {value}: no value vector of block {block} changes; lower kappa")
    return {name: Replaced(1, found.index, found.vectors.T)}


def _by_output(tensor: Tensor) -> Float[Tensor, "d n"]:
    return tensor.reshape(len(tensor), -1)


def _tensor(stored: Mapping[str, Stored], name: str, info: EncoderInfo, scope: Scope, remedy: str) -> Tensor:
    if name not in stored:
        raise UsageError(f"scope is {scope!r}, but {info.name} has no {name}; {remedy}")
    return stored[name].read()


def _block(info: EncoderInfo, scope: Scope, layer: int | None) -> int:
    if layer is None or not 0 <= layer < info.n_layers:
        raise UsageError(
            f"layer is {layer}; the scope {scope} needs the block that the SAE was trained at, and {info.name} has "
            f"blocks 0 to {info.n_layers - 1}"
        )
    return layer


def _check_width(sae: SAE, width: int | None, what: str) -> None:
    if sae.d_in != width:
        raise UsageError(f"the SAE has d_in = {sae.d_in}, but {what} {width} wide; take an SAE that was trained there")
