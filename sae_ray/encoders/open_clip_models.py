"""Encoders that open_clip loads: its own vision transformers, timm's as trunks, and ResNets (projection only)."""

from __future__ import annotations

import contextlib
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sae_ray.encoders.base import Tower
from sae_ray.encoders.hub import bad_files, hub_unreachable, refusal, refusing
from sae_ray.encoders.info import EncoderInfo
from sae_ray.encoders.lean import import_transformers
from sae_ray.encoders.sources import FORMS, check_revision, directory_digest, local_directory
from sae_ray.encoders.steps import Preprocess, preprocess_of
from sae_ray.errors import UsageError
from sae_ray.store.files import address_shown

_HUB = "hf-hub:"


class _Source(NamedTuple):
    """How open_clip names a model, and its configuration."""

    model: str
    """As it was named by the user, without keys."""
    name: str
    """Architecture, or `local-dir:<path>`."""
    tag: str | None
    """Of the pretrained weights; None for a directory and for an id on the hub."""
    revision: str
    model_config: dict[str, Any]
    preprocess_config: dict[str, Any]
    """For a tag, also whether its weights need QuickGELU."""
    hub_id: str | None = None
    """For a model that is named by its id on the hub; its directory is then that of the commit in the cache."""

    @property
    def of_hub(self) -> bool:
        """Whether files may have to be downloaded."""
        return self.hub_id is not None or (self.tag is not None and "file" not in self.preprocess_config)


class _Trunk(NamedTuple):
    """The residual stream of a vision tower."""

    blocks: list[nn.Module]
    width: int | None
    has_cls: bool
    n_registers: int
    n_tokens: int


def describe(model: str, revision: str | None) -> EncoderInfo:
    source = _find(model, revision)
    tower = _skeleton(source)
    trunk = _trunk(tower)
    return EncoderInfo(
        model=model,
        revision=source.revision,
        family="open_clip",
        n_layers=len(trunk.blocks),
        residual_width=trunk.width,
        projection_width=source.model_config["embed_dim"],
        pooled_width=None,
        has_cls=trunk.has_cls,
        n_registers=trunk.n_registers,
        n_tokens=trunk.n_tokens,
        image_size=_pair(tower.image_size),
        has_text=True,
    )


def preprocess(model: str, revision: str | None, fast: bool = False) -> Preprocess:
    return preprocess_of(_transform(_find(model, revision)), fast)


def load(info: EncoderInfo, device: torch.device, dtype: torch.dtype) -> Tower:
    source = _find(info.model, info.revision)
    tower = _create(source, device).visual.to(dtype)
    tower.output_tokens = False  # CoCa's towers give their tokens beside the embedding
    normalise = _transform(source)[-1]
    return Tower(
        tower,
        blocks=_trunk(tower).blocks,
        embed=lambda pixels: {"projection": tower(pixels)},
        rescale=1 / 255,
        mean=normalise.mean,
        std=normalise.std,
    )


def load_text(model: str, revision: str | None, device: torch.device) -> Callable[[list[str]], torch.Tensor]:
    """The text side: texts to vectors in the space of `projection`."""
    source = _find(model, revision)
    import open_clip

    module = _create(source, device)
    with _refusing(source):
        # A repository on the hub may name the tokenizer of another one.
        tokenizer = open_clip.get_tokenizer(f"{_HUB}{source.hub_id}" if source.hub_id else source.name)
    return lambda texts: module.encode_text(tokenizer(texts).to(device))


def _create(source: _Source, device: torch.device) -> Any:
    """The whole model; on the meta device its files are checked, but of safetensors only the header is read."""
    import open_clip

    empty = device.type == "meta"
    if source.hub_id:
        _fetch_weights(source, source.hub_id)
    with _refusing(source), warnings.catch_warnings(), device if empty else contextlib.nullcontext():
        if empty:
            # Each weight that is not copied is reported.
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        created: Any = open_clip.create_model(
            source.name,
            source.tag,
            device=device,
            # open_clip itself only warns when the tag's weights were trained with the other activation function.
            force_quick_gelu=source.preprocess_config.get("quick_gelu", False),
            require_pretrained=True,
            weights_only=True,
        )
    return created.eval()


@contextlib.contextmanager
def _refusing(source: _Source) -> Iterator[None]:
    """Turns what open_clip raises on bad files into a UsageError."""
    unreachable = hub_unreachable() if source.of_hub else None
    try:
        yield
    except (*bad_files(), pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise refusal(source.model, error, unreachable or FORMS) from error


def _find(model: str, revision: str | None) -> _Source:
    import_transformers()
    import open_clip

    shown = address_shown(model)
    name = model.removeprefix("open_clip:")
    if name.startswith("local-dir:"):
        directory = local_directory(name.removeprefix("local-dir:"), revision, FORMS)
        if directory is None or not (directory / "open_clip_config.json").is_file():
            raise UsageError(f"{shown} does not name a directory with an open_clip_config.json; {FORMS}")
        digest = directory_digest(directory)
        check_revision(shown, revision, digest)
        model_config, preprocess_config = _read_config(directory / "open_clip_config.json")
        return _Source(shown, f"local-dir:{directory}", None, digest, model_config, preprocess_config)

    if name.startswith(_HUB):
        return _find_on_hub(shown, name.removeprefix(_HUB), revision)

    architecture, _, tag = name.rpartition("/")
    architecture = architecture.replace("/", "-")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        there = f"{architecture} has the tags {', '.join(tags)}" if tags else FORMS
        raise UsageError(f"the encoder {model} is not known to open_clip; {there}")
    check_revision(model, revision, tag)
    model_config: Any = open_clip.get_model_config(architecture)
    return _Source(shown, architecture, tag, tag, model_config, open_clip.get_pretrained_cfg(architecture, tag))


def _find_on_hub(shown: str, hub_id: str, revision: str | None) -> _Source:
    from huggingface_hub import hf_hub_download

    with refusing(shown, FORMS, of_hub=True):
        config = Path(hf_hub_download(hub_id, "open_clip_config.json", revision=revision))
    # The cache keeps each commit's files in a folder named by it. open_clip itself would take the newest commit.
    return _Source(shown, f"local-dir:{config.parent}", None, config.parent.name, *_read_config(config), hub_id)


def _fetch_weights(source: _Source, hub_id: str) -> None:
    """Puts the weights beside the configuration in the cache, as safetensors if the hub has them."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    with refusing(source.model, FORMS, of_hub=True):
        try:
            hf_hub_download(hub_id, HF_SAFE_WEIGHTS_NAME, revision=source.revision)
        except EntryNotFoundError:
            hf_hub_download(hub_id, HF_WEIGHTS_NAME, revision=source.revision)


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        config = json.loads(path.read_bytes())
        return config["model_cfg"], config.get("preprocess_cfg", {})
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not an open_clip configuration: it needs a JSON object with model_cfg") from error


def _skeleton(source: _Source) -> Any:
    """The vision tower without weights."""
    from open_clip.model import _build_vision_tower  # private, as of open_clip 3.3

    with _refusing(source), torch.device("meta"):
        vision: Any = {**source.model_config["vision_cfg"], "timm_model_pretrained": False}
        return _build_vision_tower(source.model_config["embed_dim"], vision)


def _transform(source: _Source) -> list[Any]:
    """The steps of open_clip's own inference transform."""
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    size = _skeleton(source).image_size
    with _refusing(source):
        overlay = {**source.preprocess_config, "size": size}
        config = PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(), overlay))
        transform: Any = image_transform_v2(config, is_train=False)
    return transform.transforms


def _trunk(tower: Any) -> _Trunk:
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer
    from timm.models import Eva
    from timm.models import VisionTransformer as TimmVisionTransformer

    if isinstance(tower, VisionTransformer):
        n_patches = tower.grid_size[0] * tower.grid_size[1]
        return _Trunk(list(tower.transformer.resblocks), tower.transformer.width, True, 0, 1 + n_patches)
    if isinstance(tower, TimmModel) and isinstance(tower.trunk, TimmVisionTransformer | Eva):
        trunk: Any = tower.trunk
        has_cls = trunk.cls_token is not None
        # Some trunks take any size, so the patches follow from the images rather than from the trunk's own default.
        rows, columns = (
            size // patch for size, patch in zip(_pair(tower.image_size), trunk.patch_embed.patch_size, strict=True)
        )
        n_registers = trunk.num_prefix_tokens - has_cls
        return _Trunk(list(trunk.blocks), trunk.embed_dim, has_cls, n_registers, has_cls + rows * columns)
    return _Trunk([], None, False, 0, 0)


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
