"""SAEs on disk: one module per format. `sae_lens` is the native one.

A format is a module with `recognises(place)`, `read(place)` and, unless it is only read, `write(sae, folder)`; `others`
knows those that are refused.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from sae_ray.errors import UsageError, check
from sae_ray.sae.formats import dictionary_learning, others, overcomplete, sae_lens, sparsify
from sae_ray.sae.formats.places import FORMS, place_of
from sae_ray.sae.formats.places import LATENTS_FILE as LATENTS_FILE
from sae_ray.sae.formats.sae_lens import save_latents as save_latents
from sae_ray.sae.formats.sae_lens import save_sae as save_sae
from sae_ray.sae.formats.tensors import check_finite
from sae_ray.store.files import Folder

if TYPE_CHECKING:
    from sae_ray.sae.model import SAE

FORMATS = (dictionary_learning, sparsify, overcomplete, sae_lens)
WRITTEN = {
    "saelens": sae_lens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
    "overcomplete": overcomplete,
}
"""Name of a library -> the format that it opens."""


def load_sae(path: str | Path | Folder) -> SAE:
    """Opens an SAE of ours, of SAELens (standard, topk or jumprelu), dictionary_learning, sparsify, overcomplete or
    ViSAEBench.

    Args:
        path: The directory or a file in it, local or as a URI; or `owner/name`, `owner/name/folder` or
            `hf://owner/name/folder@revision` on the Hugging Face hub.

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
            return dataclasses.replace(sae, source=place.folder)
    raise UsageError(f"{place} is not an SAE; {FORMS}")


def export_sae(sae: SAE, folder: Folder, library: str, centred: bool = False) -> None:
    """Writes the SAE into `folder` as another library opens it, with the same codes and reconstructions.

    Args:
        library: `saelens`, `dictionary_learning`, `sparsify` or `overcomplete`.
        centred: For overcomplete, which has no bias of the decoder: write the SAE of activations less `b_dec`.

    Raises UsageError when that library's form cannot express the SAE. The message says why.
    """
    check(library in WRITTEN, "library", library, f"it is one of {', '.join(WRITTEN)}")
    if sae.kind.standardises_rows:
        raise UsageError(
            f"architecture = {sae.architecture!r}: its codes are sigmoids of standardised activations, which no other "
            "library computes; sae-ray opens it as it is"
        )
    check(
        library == "overcomplete" or not centred, "centred", centred, f"{library} subtracts b_dec itself; leave it out"
    )
    if library == "overcomplete":
        overcomplete.write(sae, folder, centred)
    else:
        WRITTEN[library].write(sae, folder)


def sae_folder(path: str | Path | Folder) -> Folder:
    """The folder of an SAE that is named as for `load_sae`. Raises UsageError as that does."""
    return place_of(path).folder
