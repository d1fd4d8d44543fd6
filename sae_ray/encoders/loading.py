"""Opening an encoder by its specification string.

The forms of a specification:

- `openai/clip-vit-large-patch14-336`: a model id on the hub, loaded by transformers, pinned by `revision`;
- `/models/clip`, `~/models/clip`: a directory in the transformers format;
- `open_clip:ViT-B-32/laion2b_s34b_b79k`: an open_clip architecture and the tag of its pretrained weights;
- `open_clip:local-dir:/models/judge`: a directory with `open_clip_config.json` and weights;
- `open_clip:hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224`: such files on the hub, pinned by
  `revision`;
- `timm:vit_small_patch16_dinov3.lvd1689m`: a model of timm's and the tag of its pretrained weights, without which it is
  timm's default one; `revision` pins the commit on the hub;
- `timm:local-dir:/models/judge`: a directory with timm's `config.json` and weights;
- `timm:hf-hub:timm/vit_base_patch16_siglip_224.v2_webli`: such files on the hub, pinned by `revision`.
"""

from __future__ import annotations

from sae_ray.encoders.base import Encoder, placement
from sae_ray.encoders.info import EncoderInfo
from sae_ray.encoders.lean import uncollected
from sae_ray.encoders.resizing import Preprocessing


def _backend(model: str):
    if model.startswith("open_clip:"):
        from sae_ray.encoders import open_clip_models as backend
    elif model.startswith("timm:"):
        from sae_ray.encoders import timm_models as backend
    else:
        from sae_ray.encoders import transformers_models as backend
    return backend


@uncollected()
def describe_encoder(model: str, revision: str | None = None) -> EncoderInfo:
    """What an encoder is, from its configuration alone; no weights are loaded, though those of a directory are hashed.

    Raises:
        UsageError: The encoder is unknown, cannot be reached, is of an unsupported family or has another revision.
    """
    return _backend(model).describe(model, revision)


@uncollected()
def load_preprocess(model: str, revision: str | None = None, fast: bool = False) -> Preprocessing:
    """The encoder's own resizing and cropping of an RGB image; it pickles, and needs no weights.

    Rescaling and normalisation follow on the device, in `Encoder.tap`. With `fast` images are resized by `fast_resize`,
    unless the encoder's own processor does more than resizing and cropping.

    Raises:
        UsageError: As `describe_encoder`.
    """
    return _backend(model).preprocess(model, revision, fast)


@uncollected()
def load_encoder(model: str, revision: str | None = None, device: str = "cpu", dtype: str = "float32") -> Encoder:
    """Loads an encoder's vision tower.

    Args:
        model: Its specification, as above.
        revision: Pins the weights: give `EncoderInfo.revision` to get what was described, or an error.
        device: A torch device. `meta` checks all files as loading does, but reads only the headers of the weights.
        dtype: Dtype of the forward pass: `float32`, `bfloat16` or `float16`. Activations are always float32.

    Raises:
        UsageError: As `describe_encoder`; or the weights are missing, do not fit the configuration or are not
            safetensors; or the device or dtype is not available.
    """
    place = placement(device, dtype)
    backend = _backend(model)
    info = backend.describe(model, revision)
    return Encoder(info, backend.load(info, *place))
