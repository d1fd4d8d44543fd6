"""Encoders: vision towers of transformers, open_clip and timm, named by a specification string and tapped at sites.

An encoder is described without its weights (`describe_encoder`), loaded (`load_encoder`), and tapped at many sites in
one forward pass. A family of models is a module of its own; no layer's forward is re-implemented."""

from typing import TYPE_CHECKING

from sae_ray.lazy import exports

if TYPE_CHECKING:
    from sae_ray.encoders.base import Encoder as Encoder
    from sae_ray.encoders.base import Tapped as Tapped
    from sae_ray.encoders.base import placement as placement
    from sae_ray.encoders.extracting import Extracted as Extracted
    from sae_ray.encoders.extracting import extract as extract
    from sae_ray.encoders.info import EncoderInfo as EncoderInfo
    from sae_ray.encoders.info import check_site as check_site
    from sae_ray.encoders.info import check_text_side as check_text_side
    from sae_ray.encoders.info import rows_per_image as rows_per_image
    from sae_ray.encoders.info import site_width as site_width
    from sae_ray.encoders.loading import describe_encoder as describe_encoder
    from sae_ray.encoders.loading import load_encoder as load_encoder
    from sae_ray.encoders.loading import load_preprocess as load_preprocess
    from sae_ray.encoders.sites import Site as Site
    from sae_ray.encoders.sites import select_tokens as select_tokens

__getattr__ = exports(
    __name__,
    {
        "base": ["Encoder", "Tapped", "placement"],
        "extracting": ["Extracted", "extract"],
        "info": ["EncoderInfo", "check_site", "check_text_side", "rows_per_image", "site_width"],
        "loading": ["describe_encoder", "load_encoder", "load_preprocess"],
        "sites": ["Site", "select_tokens"],
    },
)
