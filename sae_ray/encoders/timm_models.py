"""Encoders that timm loads: vision transformers at all their sites, and any other model as `pooled`."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae_ray.encoders.base import Tower
from sae_ray.encoders.hub import bad_files, hub_unreachable, refusal
from sae_ray.encoders.info import EncoderInfo
from sae_ray.encoders.sources import FORMS, check_revision, directory_digest, directory_named, local_directory
from sae_ray.encoders.steps import Preprocess, preprocess_of
from sae_ray.errors import UsageError
from sae_ray.store.files import address_shown

_HUB = "timm:hf-hub:"
_WEIGHTS = "model.safetensors"
_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".tar", ".npz")
_PLACES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")
"""Keys of a timm configuration that say where weights are: here the specification does."""


class _Source(NamedTuple):
    """A model's configuration, and where its files are."""

    model: str
    """As it was named by the user, without keys."""
    architecture: str
    pretrained: dict[str, Any]
    """What timm calls `pretrained_cfg`: the preprocessing, and what the weights were trained as."""
    settings: dict[str, Any]
    """Arguments of the architecture that differ from its own."""
    revision: str
    directory: Path
    """Of a model of the hub: that of the commit in the cache."""
    hub_id: str | None


class _Outline(NamedTuple):
    """What a forward pass without weights shows of a model."""

    blocks: list[nn.Module]
    width: int | None
    has_cls: bool
    n_registers: int
    n_tokens: int
    pooled_width: int | None


def describe(model: str, revision: str | None) -> EncoderInfo:
    source = _find(model, revision)
    module = _skeleton(source)
    outline = _outline(source, module)
    return EncoderInfo(
        model=model,
        revision=source.revision,
        family="timm",
        n_layers=len(outline.blocks),
        residual_width=outline.width,
        projection_width=None,
        pooled_width=outline.pooled_width,
        has_cls=outline.has_cls,
        n_registers=outline.n_registers,
        n_tokens=outline.n_tokens,
        image_size=_image_size(module),
        has_text=False,
    )


def preprocess(model: str, revision: str | None, fast: bool = False) -> Preprocess:
    source = _find(model, revision)
    return preprocess_of(_transform(source, _skeleton(source)), fast)


def load(info: EncoderInfo, device: torch.device, dtype: torch.dtype) -> Tower:
    source = _find(info.model, info.revision)
    module = _with_weights(source, device).to(dtype)
    normalise = _transform(source, module)[-1]
    return Tower(
        module,
        blocks=_blocks(module),
        embed=lambda pixels: {"pooled": _pooled(module, pixels)},
        rescale=1 / 255,
        mean=normalise.mean.tolist(),
        std=normalise.std.tolist(),
    )


def _find(model: str, revision: str | None) -> _Source:
    shown = address_shown(model)
    path = directory_named(model)
    if path is not None:
        directory = local_directory(path, revision, FORMS)
        if directory is None or not (directory / "config.json").is_file():
            raise UsageError(f"{shown} does not name a directory with a config.json of timm's; {FORMS}")
        digest = directory_digest(directory)
        check_revision(shown, revision, digest)
        return _Source(shown, *_read_config(shown, directory), digest, directory, None)

    known = None if model.startswith(_HUB) else _registered(shown, model.removeprefix("timm:"))
    hub_id = known.hf_hub_id if known else model.removeprefix(_HUB)
    directory = _cached(shown, hub_id, "config.json", revision).parent
    # What timm itself says of a model that it knows goes first, as in timm.
    config = (known.architecture, _without_places(known.to_dict()), {}) if known else _read_config(shown, directory)
    return _Source(shown, *config, directory.name, directory, hub_id)


def _registered(shown: str, name: str) -> Any:
    """What timm knows of a model that it has weights for.

    Raises:
        UsageError: It has none; the message names near ones.
    """
    from timm.models import get_deprecated_models, get_pretrained_cfg, is_model, list_models

    architecture, _, tag = name.partition(".")
    if not is_model(architecture):
        raise UsageError(f"the encoder {shown} is not known to timm{_near(architecture)}; {FORMS}")
    now = get_deprecated_models().get(name)
    if now:
        raise UsageError(f"timm calls the encoder {shown} timm:{now} now")
    tags = [one.partition(".")[2] for one in list_models(architecture, pretrained=True)]
    if tag and tag not in tags:
        there = f"{architecture} has the tags {', '.join(tags)}" if tags else f"name another model{_near(architecture)}"
        raise UsageError(f"timm has no weights {tag!r} of the encoder {shown}; {there}")
    config: Any = get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise UsageError(
            f"timm has no weights of the encoder {shown} on the hub; name another model{_near(architecture)}"
        )
    return config


def _near(architecture: str) -> str:
    from timm.models import list_models

    with_weights = sorted({name.partition(".")[0] for name in list_models(pretrained=True)} - {architecture})
    near = difflib.get_close_matches(architecture, with_weights, n=3)
    return f" (near names: {', '.join(near)})" if near else ""


def _cached(shown: str, hub_id: str, file: str, revision: str | None) -> Path:
    """A file of the hub. The cache keeps each commit's files in a folder named by it."""
    from huggingface_hub import hf_hub_download

    with _refusing(shown, of_hub=True):
        return Path(hf_hub_download(hub_id, file, revision=revision))


def _read_config(shown: str, directory: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The architecture, and the other two of a `_Source`."""
    from timm.models import is_model
    from timm.models._hub import load_model_config_from_path

    with _refusing(shown):
        pretrained, architecture, settings = load_model_config_from_path(directory)
        known = is_model(architecture)
        # The head is that of the weights: with another one, timm would not miss weights.
        settings = {key: value for key, value in settings.items() if key not in ("num_classes", "checkpoint_path")}
    if not known:
        raise UsageError(
            f"{shown} is of the architecture {architecture}, which is not known to timm{_near(architecture)}; "
            f"fix {directory / 'config.json'}"
        )
    return architecture, _without_places(pretrained), settings


def _without_places(pretrained: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in pretrained.items() if key not in _PLACES}


def _skeleton(source: _Source) -> Any:
    """The model without weights, on the meta device."""
    with _refusing(source.model), torch.device("meta"):
        return _create(source, source.pretrained, pretrained=False)


def _with_weights(source: _Source, device: torch.device) -> Any:
    """The model; on the meta device the names and shapes of its weights are checked, but only their header is read."""
    file = _weights_file(source)
    with _refusing(source.model):
        if device.type == "meta":
            with device:
                return _create(source, {**source.pretrained, "state_dict": _outlines(file)}, pretrained=True)
        return _create(source, {**source.pretrained, "file": str(file)}, pretrained=True).to(device)


def _create(source: _Source, config: dict[str, Any], pretrained: bool) -> Any:
    import timm
    from timm.models.naflexvit import NaFlexVit

    module: Any = timm.create_model(
        source.architecture, pretrained=pretrained, pretrained_cfg=config, **source.settings
    )
    if isinstance(module, NaFlexVit):
        raise UsageError(
            f"{source.model} is a NaFlex model, which has other numbers of tokens for images of other shapes; name a "
            "model of fixed resolution, such as timm:vit_base_patch16_siglip_224.v2_webli"
        )
    channels = module.pretrained_cfg["input_size"][0]
    if channels != 3:
        raise UsageError(f"{source.model} takes images of {channels} channels; name a model that takes 3")
    return module.eval()


def _weights_file(source: _Source) -> Path:
    """Raises UsageError where there is none, or only one that a pickle could hide in."""
    remedy = f"give it a {_WEIGHTS}: pickled weights are never read, as they can run code"
    if source.hub_id is not None:
        from huggingface_hub.errors import RemoteEntryNotFoundError

        try:
            return _cached(source.model, source.hub_id, _WEIGHTS, source.revision)
        except UsageError as error:
            if isinstance(error.__cause__, RemoteEntryNotFoundError):
                raise UsageError(f"{source.model} has no {_WEIGHTS} on the hub; name another model") from error
            raise
    files = sorted(source.directory.glob("*.safetensors"))
    named = source.directory / _WEIGHTS
    if named in files or len(files) == 1:
        return named if named in files else files[0]
    if files:
        names = ", ".join(file.name for file in files)
        raise UsageError(f"{source.model} has several files of weights: {names}; name the right one {_WEIGHTS}")
    pickled = sorted(file.name for file in source.directory.iterdir() if file.name.endswith(_PICKLES))
    there = f"only {', '.join(pickled)}" if pickled else "no weights"
    raise UsageError(f"{source.model} has {there}; {remedy}")


def _outlines(file: Path) -> dict[str, Tensor]:
    """Tensors of the shapes that the header of a file names, without values."""
    from safetensors import safe_open
    from timm.models import clean_state_dict

    with safe_open(file, framework="pt") as weights:
        return clean_state_dict(
            {name: torch.empty(weights.get_slice(name).get_shape(), device="meta") for name in weights.keys()}  # noqa: SIM118
        )


def _outline(source: _Source, module: Any) -> _Outline:
    streams: list[tuple[int, ...]] = []
    blocks = _blocks(module)
    hooks = [block.register_forward_hook(lambda *args: streams.append(tuple(args[2].shape))) for block in blocks]
    with _refusing(source.model), torch.inference_mode():
        pooled = _pooled(module, torch.empty(1, 3, *_image_size(module), device="meta"))
    for hook in hooks:
        hook.remove()
    width = pooled.shape[1] if pooled.ndim == 2 else None
    if not blocks:
        if width is None:
            raise UsageError(f"{source.model} gives an image no single vector, and has no tokens; name another model")
        return _Outline([], None, False, 0, 0, width)
    has_cls = module.cls_token is not None
    n_registers = module.num_prefix_tokens - has_cls
    _, n_tokens, d = streams[0]
    return _Outline(blocks, d, has_cls, n_registers, n_tokens - n_registers, width)


def _blocks(module: Any) -> list[nn.Module]:
    """The blocks whose outputs are the residual stream; none where the model is no vision transformer."""
    from timm.models import Beit, Eva, VisionTransformer, VisionTransformerRelPos

    transformer = isinstance(module, Beit | Eva | VisionTransformer | VisionTransformerRelPos)
    return [*module.blocks.children()] if transformer else []


def _pooled(module: Any, pixels: Tensor) -> Tensor:
    """What the model's classifier reads."""
    return module.forward_head(module.forward_features(pixels), pre_logits=True)


def _transform(source: _Source, module: Any) -> list[Any]:
    """The steps of timm's own inference transform."""
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    with _refusing(source.model):
        transform: Any = create_transform(**resolve_model_data_config(module), is_training=False)
    return transform.transforms


def _image_size(module: Any) -> tuple[int, int]:
    from timm.data.config import resolve_model_data_config

    _, height, width = resolve_model_data_config(module)["input_size"]
    return height, width


@contextlib.contextmanager
def _refusing(model: str, of_hub: bool = False) -> Iterator[None]:
    """Turns what timm raises on bad files into a UsageError."""
    unreachable = hub_unreachable() if of_hub else None
    try:
        yield
    except (*bad_files(), AssertionError) as error:
        raise refusal(model, error, unreachable or FORMS) from error
