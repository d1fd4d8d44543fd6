"""`sae-ray export`: SAEs for other libraries."""

from __future__ import annotations

from sae_ray.errors import UsageError
from sae_ray.store.files import Folder, writing

NEURONPEDIA = "neuronpedia"


def export(sae: str, to: str, out: str, centred: bool) -> Folder:
    """Writes an SAE as another library opens it, or its features for Neuronpedia. Returns the folder.

    `latents.parquet` goes with it: it defines strengths in multiples of `max_token`, and no library minds it.

    Raises:
        UsageError: there is something in the folder, it cannot be one, or the form cannot express the SAE.
        SaeRayError: the folder cannot be written.
    """
    from sae_ray.report.neuronpedia import write_neuronpedia
    from sae_ray.sae import export_sae, load_sae
    from sae_ray.sae.formats import LATENTS_FILE, sae_folder

    if centred and to == NEURONPEDIA:
        raise UsageError("--centred is for the SAE itself, and Neuronpedia takes its latents; leave it out")
    folder = Folder(out)
    if folder.is_file():
        raise UsageError(f"--out {folder} is a file; choose a new folder")
    if folder.files() or folder.folders():
        raise UsageError(f"--out {folder} is not empty; choose a new folder")
    if to == NEURONPEDIA:
        source = sae_folder(sae)
        with writing(folder):
            return write_neuronpedia(source, folder)
    opened = load_sae(sae)
    with writing(folder):
        export_sae(opened, folder, to, centred)
        if opened.source is not None and opened.source.exists(LATENTS_FILE):
            folder.write_copy(LATENTS_FILE, opened.source, LATENTS_FILE)
    return folder
