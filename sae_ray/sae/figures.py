"""What is known of an SAE beside its weights: read from its own facts, and from the steps of a study beside it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sae_ray.encoders.sources import directory_named, model_name
from sae_ray.errors import SaeRayError
from sae_ray.sae.card import metadata_of
from sae_ray.sae.formats.places import FIGURES_FILE
from sae_ray.store.files import Folder, address_shown, parent_and_name
from sae_ray.store.steps import read_record

if TYPE_CHECKING:
    from sae_ray.sae.model import SAE

_HASH = 13
"""Characters that end the name of a step."""


def cell_name(source: Folder | None) -> str | None:
    """The name that an SAE has in its study, from the folder of its step; None for other folders."""
    record = None if source is None else _record(source)
    return None if source is None or record is None else source.name.removeprefix("sae-")[:-_HASH]


def figures(sae: SAE) -> dict[str, Any]:
    """Architecture, encoder, data, fidelity and MonoSemanticity, as far as they are known; plain JSON values.

    What was measured is left out for an SAE whose weights are no longer those of the folder that it was opened from.
    """
    found: dict[str, Any] = {
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "sae_lens": None if sae.kind.sae_lens.startswith("sae_ray_") else sae.kind.sae_lens,
        "training": sae.metadata.get("cell"),
        "steps": sae.metadata.get("steps"),
    }
    source = sae.source
    if source is not None and (cell_name(source) or source.exists(FIGURES_FILE)) and _is_as_opened(sae):
        found |= _of_study(source) if cell_name(source) else source.read_json(FIGURES_FILE)
    return {key: value for key, value in found.items() if value is not None}


def _is_as_opened(sae: SAE) -> bool:
    from sae_ray.sae.formats import load_sae

    assert sae.source is not None
    opened = load_sae(sae.source)
    if opened.W_enc.shape != sae.W_enc.shape or (opened.architecture, opened.k) != (sae.architecture, sae.k):
        return False
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        mine, theirs = getattr(sae, name), getattr(opened, name)
        if mine is not None and not torch.equal(mine.cpu().float(), theirs):
            return False
    return True


def _of_study(source: Folder) -> dict[str, Any]:
    """From the steps of the study that the SAE is a step of."""
    root, name = parent_and_name(source.uri)
    record = _record(source)
    assert record is not None
    found: dict[str, Any] = {"trained": record["finished_at"]}
    study = root.read_json("study.json") if root.exists("study.json") else {}
    models = study.get("survey", {}).get("models", {})
    activations = _record(root / record["config"]["activations"])
    if activations is not None:
        config, counts = activations["config"], activations["counts"]
        # The settings of imported activations name neither site nor encoder.
        site = config.get("site") or record["config"]["activations"].removeprefix("activations-train-")[:-_HASH]
        found |= {"site": site, "images": counts["images"], "activations": counts["rows"]}
        encoder = models.get("encoder", {})
        if "encoder" in config and encoder.get("revision") in config["encoder"]:
            found["encoder"] = _encoder(encoder["model"], encoder["revision"])
            found |= _data(root, study, config["manifest"])
    for step in _judging(root, name, "fidelity-"):
        found["fidelity"] = step["counts"]
    min_images = study.get("study", {}).get("scoring", {}).get("min_images", 2)
    for step in _judging(root, name, "scores-heldout-"):
        if step["config"].get("embeddings") is not None:
            judge = models.get("judge")
            found["monosemanticity"] = _scores(root / step["name"], min_images)
            found["monosemanticity"] |= {"judge": model_name(judge["model"], judge.get("revision"))} if judge else {}
    return found


def _data(root: Folder, study: dict[str, Any], manifest: str) -> dict[str, str]:
    """The name of the images' folder. The root's last study knows it, if it has the images of this manifest."""
    images = _record(root / manifest)
    known = study.get("survey", {}).get("images", {}).get("train", {}).get("manifest_digest")
    if images is None or images["config"]["images"] != known:
        return {}
    return {"data": PurePosixPath(address_shown(study["study"]["images"]["train"]["path"])).name}


def _encoder(model: str, revision: str) -> dict[str, Any]:
    """Its name, without the path of a directory; revision; and the licence that the card in a directory tells."""
    found = {"model": model_name(model, revision), "revision": revision}
    card = Path(directory_named(model) or model).expanduser() / "README.md"
    licence = metadata_of(card.read_text(encoding="utf-8")).get("license") if card.exists() else None
    return found | ({"license": licence} if isinstance(licence, str) else {})


def _judging(root: Folder, sae: str, prefix: str) -> list[dict[str, Any]]:
    """The records, each with its `name`, of finished steps about an SAE."""
    beginning = prefix + sae.removeprefix("sae-")[:-_HASH]
    names = [name for name in root.folders() if name.startswith(beginning) and len(name) == len(beginning) + _HASH]
    records = [(name, _record(root / name)) for name in names]
    return [one | {"name": name} for name, one in records if one is not None and one["config"].get("sae") == sae]


def _scores(folder: Folder, min_images: int) -> dict[str, Any]:
    table = folder.read_parquet("scores.parquet")
    ms, n_active = (table[name].to_numpy() for name in ("ms", "n_active"))
    scored = ms[(n_active >= min_images) & ~np.isnan(ms)]
    if not len(scored):
        return {"neurons": 0}
    return {"mean": float(scored.mean()), "best": float(scored.max()), "neurons": len(scored), "min_images": min_images}


def _record(folder: Folder) -> dict[str, Any] | None:
    """Of a step that is done; None for any other folder."""
    try:
        record = read_record(folder)
    except SaeRayError:
        return None
    return record if record["status"] == "done" else None
