"""SAEs on disk: one module per format. `sae_lens` is the native one; the others are only read.

A format is a module with `recognises(place)` and `read(place)`; `others` knows those that are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sae_ray.errors import UsageError
from sae_ray.sae.formats import others, reference, sae_lens
from sae_ray.sae.formats.places import FORMS, place_of
from sae_ray.sae.formats.places import LATENTS_FILE as LATENTS_FILE
from sae_ray.sae.formats.sae_lens import save_latents as save_latents
from sae_ray.sae.formats.sae_lens import save_sae as save_sae
from sae_ray.sae.formats.tensors import check_finite
from sae_ray.store.files import Folder

if TYPE_CHECKING:
    from sae_ray.sae.model import SAE

FORMATS = (reference, sae_lens)


def load_sae(path: str | Path | Folder) -> SAE:
    """Opens an SAE: a directory of ours or of SAELens v6 (standard, topk or jumprelu), or a reference `.pt` file.

    Args:
        path: The directory or a file in it, local or as a URI; or `owner/name` or `owner/name/folder` on the Hugging
            Face hub.

    Raises:
        UsageError: there is no SAE, or there are several; the hub cannot be reached; or the SAE uses a convention that
            cannot be expressed. The message names it.
        SaeRayError: the files are damaged, or weights are not finite.
    """
    place = place_of(path)
    others.refuse_by_files(place)
    for one in FORMATS:
        if one.recognises(place):
            sae = one.read(place)
            check_finite(sae, str(place))
            return sae
    raise UsageError(f"{place} is not an SAE; {FORMS}")


def sae_folder(path: str | Path | Folder) -> Folder:
    """The folder of an SAE that is named as for `load_sae`. Raises UsageError as that does."""
    return place_of(path).folder
