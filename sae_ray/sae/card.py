"""The model card of a repository of SAEs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from sae_ray.encoders.sources import is_digest
from sae_ray.sae.formats.hub_names import REPOSITORY
from sae_ray.text_table import number

MARK = "<!-- Written by sae-ray from the figures.json of each SAE; the next push writes it again. -->"
_FIDELITY = {"l0": "L0", "r2": "R²", "cosine": "cosine", "dead_fraction": "dead latents"}
_COLUMNS = ["SAE", "site", "architecture", "latents", "K", "L0", "R²", "dead", "mean MS"]


def card(repo_id: str, saes: Mapping[str, Mapping[str, Any]], license: str | None = None) -> str:
    """The card, in Markdown.

    Args:
        saes: folder in the repository (empty for its top) -> its figures.
        license: an id of the hub.
    """
    names = sorted(saes)
    lines = [
        f"---\n{yaml.safe_dump(_metadata(saes, license), sort_keys=False)}---",
        MARK,
        f"# {repo_id.partition('/')[2]}",
        f"{'One SAE' if len(names) == 1 else f'{len(names)} SAEs'} (sparse autoencoders), uploaded by sae-ray.",
        "\n".join([_cells(_COLUMNS), "|---" * len(_COLUMNS) + "|", *(_row(name, saes[name]) for name in names)]),
        "L0 is the number of active latents per activation, R² the share of the variance that is reconstructed, dead "
        "the share of latents that never fire; all on held-out images. MS is MonoSemanticity (arXiv 2504.02821).",
        _loading(repo_id, names, saes),
        *(text for name in names if (text := _details(name, saes[name]))),
    ]
    return "\n\n".join(lines) + "\n"


def metadata_of(text: str) -> dict[str, Any]:
    """What a card says at its top."""
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        values = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        values = None
    return values if isinstance(values, dict) else {}


def _metadata(saes: Mapping[str, Mapping[str, Any]], license: str | None) -> dict[str, Any]:
    models = {one["encoder"]["model"] for one in saes.values() if "encoder" in one}
    on_hub = sorted(filter(REPOSITORY.fullmatch, models))
    found: dict[str, Any] = {"license": license} if license else {}
    if any(one.get("sae_lens") for one in saes.values()):
        found["library_name"] = "saelens"
    if on_hub:
        found["base_model"] = on_hub
    return found | {"tags": ["sparse-autoencoder", "mechanistic-interpretability", "saelens", "sae-ray"]}


def _row(name: str, sae: Mapping[str, Any]) -> str:
    fidelity, ms = sae.get("fidelity", {}), sae.get("monosemanticity", {})
    cells = [
        f"`{name}`" if name else "(top)",
        sae.get("site", ""),
        sae["architecture"],
        f"{sae['d_sae']:,}",
        str(sae.get("k", "")),
        number(fidelity.get("l0"), 1),
        number(fidelity.get("r2"), 3),
        number(fidelity.get("dead_fraction"), 2),
        number(ms.get("mean"), 3),
    ]
    return _cells(cells)


def _cells(texts: list[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _loading(repo_id: str, names: list[str], saes: Mapping[str, Mapping[str, Any]]) -> str:
    first = names[0]
    address = f"hf://{repo_id}" + (f"/{first}" if first else "")
    text = (
        f'## Use\n\nWith sae-ray:\n\n```python\nfrom sae_ray import load_sae\n\nsae = load_sae("{address}")\n'
        f"codes = sae.encode(x)  # [n, {saes[first]['d_in']}], activations as the encoder gives them\n```\n\n"
    )
    opened = [name for name in names if saes[name].get("sae_lens")]
    if opened and opened[0]:
        text += (
            "With SAELens 6:\n\n```python\nfrom sae_lens import SAE\n\n"
            f'sae = SAE.from_pretrained("{repo_id}", "{opened[0]}")\n```'
        )
    elif opened:
        text += (
            "With SAELens 6:\n\n```python\nfrom huggingface_hub import snapshot_download\nfrom sae_lens import SAE\n\n"
            f'sae = SAE.load_from_disk(snapshot_download("{repo_id}"))\n```'
        )
    refused = [f"`{name or 'top'}`" for name in names if not saes[name].get("sae_lens")]
    if refused:
        text += f"\n\nSAELens has no architecture with the codes of {', '.join(refused)}: use sae-ray."
    return text.rstrip("\n")


def _details(name: str, sae: Mapping[str, Any]) -> str:
    lines = []
    if encoder := sae.get("encoder"):
        lines.append(f"- Encoder: `{encoder['model']}`, {_revision(encoder['revision'])}.")
        licensed = encoder.get("license")
        lines.append(f"- Licence of the encoder: {licensed or 'not known; see the encoder'}.")
    if "site" in sae:
        width = f"{sae['d_in']:,} dimensions"
        lines.append(f"- Site: `{sae['site']}`, {width}.")
    if "images" in sae:
        where = f" (`{sae['data']}`)" if "data" in sae else ""
        lines.append(f"- Trained on {sae['activations']:,} activations of {sae['images']:,} images{where}.")
    if (steps := sae.get("steps")) and (training := sae.get("training")):
        batch = training["training"]["batch_size"]
        lines.append(f"- {steps:,} steps of {batch:,} activations, seed {training['seed']}.")
    if fidelity := sae.get("fidelity"):
        n = f"{fidelity['n_samples']:,} " if "n_samples" in fidelity else ""
        told = [f"{word} {number(fidelity[key], 4)}" for key, word in _FIDELITY.items() if key in fidelity]
        lines.append(f"- On {n}held-out activations: {', '.join(told)}.")
    if (ms := sae.get("monosemanticity")) and ms["neurons"]:
        by = f", judged by `{ms['judge']}`" if "judge" in ms else ""
        lines.append(
            f"- MonoSemanticity: mean {ms['mean']:.3f}, best {ms['best']:.3f}, of the {ms['neurons']:,} latents that "
            f"are active on at least {ms['min_images']} held-out images{by}."
        )
    return "\n".join([f"## {name or 'The SAE'}\n", *lines]) if lines else ""


def _revision(revision: str | None) -> str:
    if revision is None:
        return "of no known revision"
    return f"SHA-256 of its files `{revision[:12]}…`" if is_digest(revision) else f"revision `{revision}`"
