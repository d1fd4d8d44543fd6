"""SAEs on disk: one module per format. `sae_lens` is the native one; the others are only read.

A format is a module with `FORM` (what a user may give), `recognises(path)` and `read(path)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sae_ray.errors import UsageError
from sae_ray.sae.formats import reference, sae_lens
from sae_ray.sae.formats.sae_lens import LATENTS_FILE as LATENTS_FILE
from sae_ray.sae.formats.sae_lens import save_latents as save_latents
from sae_ray.sae.formats.sae_lens import save_sae as save_sae
from sae_ray.store.files import Folder

if TYPE_CHECKING:
    from sae_ray.sae.model import SAE

FORMATS = (reference, sae_lens)


def load_sae(path: str | Path | Folder) -> SAE:
    """Opens an SAE: a directory of ours or of SAELens v6 (standard, topk or jumprelu), or a reference `.pt` file.

    Raises:
        UsageError: the path does not exist, `cfg.json` is malformed, or it uses a convention that cannot be expressed;
            the message names it.
        SaeRayError: the files are damaged.
    """
    given = path if isinstance(path, Folder) else str(path)
    for one in FORMATS:
        if one.recognises(given):
            return one.read(given)
    raise UsageError(f"{given} is not an SAE, or does not exist; give {' or '.join(one.FORM for one in FORMATS)}")
