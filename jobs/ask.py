"""Steering from the command line: asks one question about one image, with and without edited latents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sae_ray.editing import edited, load_patch
from sae_ray.encoders.base import placement
from sae_ray.errors import UsageError
from sae_ray.images import BadImage, decode_image
from sae_ray.images.rendering import ON_WHITE
from sae_ray.sae import load_sae
from sae_ray.sae.formats import LATENTS_FILE, sae_folder
from sae_ray.steering import Intervention, load_llava, load_max_token
from sae_ray.steering.interventions import ALIASES
from sae_ray.store.files import parent_and_name
from sae_ray.text_table import table_lines

if TYPE_CHECKING:
    import torch
    from PIL import Image

WHITE = "white"


def steered_answers(
    image: str,
    prompt: str,
    llava: str,
    *,
    sae: str | None,
    edit: str | None,
    asked: Sequence[dict[str, Any]],
    max_new_tokens: int,
    device: str,
    dtype: str,
) -> dict[str, Any]:
    """The unsteered answer of the LLaVA and one answer per intervention, as plain values.

    With `edit`, a patch, the answers are those of the edited LLaVA, and its answer without an intervention is among
    them; the unsteered one is that of the LLaVA as it is.

    Args:
        image: A path or URI, or `white`.
        asked: The interventions, as `Intervention.from_dict` takes them.

    Raises:
        UsageError: The image, a model, the patch or an intervention is invalid.
        SaeRayError: Files of the SAE or the patch are damaged.
    """
    interventions = _interventions(sae, asked, placement(device, dtype)[0])
    patch = None if edit is None else load_patch(edit)
    picture = None if image == WHITE else _image(image)
    model = load_llava(llava, device=device, dtype=dtype)
    shown = picture or model.white()

    def answers(chains: Sequence[Sequence[Intervention]]) -> list[str]:
        return model.answers([shown] * len(chains), [prompt] * len(chains), chains, max_new_tokens)

    chains = [(one,) for one in interventions]
    said = {}
    if patch is None:
        unsteered, *steered = answers([(), *chains])
    else:
        patch.check_model(model.info.name, model.info.revision)
        [unsteered] = answers([()])
        with edited(model.model, patch):
            said["edited"], *steered = answers([(), *chains])
        said["edit"] = {"patch": edit, **asdict(patch.facts)}
    return {
        "image": image,
        "prompt": prompt,
        "llava": llava,
        "revision": model.info.revision,
        "sae": sae,
        "unsteered": unsteered,
        **said,
        "steered": [
            {"intervention": one.to_dict(), "answer": answer}
            for one, answer in zip(interventions, steered, strict=True)
        ],
    }


def _interventions(sae: str | None, asked: Sequence[dict[str, Any]], device: torch.device) -> list[Intervention]:
    if not asked:
        return []
    if sae is None:
        raise UsageError("--sae is missing; name the directory of the SAE whose latents are edited")
    loaded, folder = load_sae(sae).to(device), sae_folder(sae)
    max_token = load_max_token(folder) if folder.exists(LATENTS_FILE) else None
    return [Intervention.from_dict(values, loaded, max_token) for values in asked]


def interventions_asked(
    latents: Sequence[str],
    mode: str | None,
    error: str | None,
    isolate: bool,
    tokens: Sequence[int],
    regions: Sequence[str],
    mask: str | None,
    when: str | None,
    file: str | None,
    sweep: str | None,
    is_edited: bool = False,
) -> list[dict[str, Any]]:
    """The interventions that the options describe: one table per answer, several for a sweep. There may be none if
    the LLaVA's weights are edited.

    Raises UsageError if options contradict each other or cannot be read.
    """
    if file is not None:
        if latents or mode or error or isolate or tokens or sweep or regions or mask or when:
            raise UsageError(
                "--intervention FILE describes the whole intervention; leave out --latent, --mode, --error, --isolate, "
                "--token, --region, --mask, --when and --sweep, or leave out the file"
            )
        return [_read_json(file)]
    if not latents:
        if is_edited and not (mode or error or isolate or tokens or sweep or regions or mask or when):
            return []
        raise UsageError("no latent: give one, as in --latent 39=40, or give --intervention FILE")
    edits = [_edit(text, mode, swept=sweep is not None) for text in latents]
    strengths = [{}] if sweep is None else [_strength(text.strip(), "--sweep") for text in sweep.split(",")]
    if mode == "balanced" and error is None:
        error = "keep"  # it knows no other
    region = {"rectangles": [_rectangle(text) for text in regions], "mask": mask}
    rest = {"error": error, "isolate": isolate or None, "tokens": list(tokens) or None}
    rest |= {"region": region if regions or mask else None, "when": None if when is None else _condition(when)}
    rest = {key: value for key, value in rest.items() if value is not None}
    return [{"edits": [edit | strength for edit in edits], **rest} for strength in strengths]


def lines(result: dict[str, Any], sweep: str | None) -> list[str]:
    """The answers side by side; for a sweep one below the other."""
    without = [("unsteered", result["unsteered"])]
    if "edit" in result:
        facts = result["edit"]
        without.append((f"edited: latent {facts['latent']} out ({facts['mode']}, {facts['scope']})", result["edited"]))
    if sweep is None:
        columns = list(without)
        for steered in result["steered"]:
            changes = ", ".join(_change(edit) for edit in steered["intervention"]["edits"]) or "no latent edited"
            columns.append((f"steered: {changes}{_place(steered['intervention'])}", steered["answer"]))
        rows = list(zip(*columns, strict=True))
        return table_lines(rows, "<" * len(columns))
    strengths = [text.strip() for text in sweep.split(",")]
    answers = [steered["answer"] for steered in result["steered"]]
    rows = [("strength", "answer"), *without, *zip(strengths, answers, strict=True)]
    return table_lines(rows, "<<")


def _edit(text: str, mode: str | None, swept: bool) -> dict[str, Any]:
    latent, equals, strength = text.partition("=")
    try:
        edit: dict[str, Any] = {"latent": int(latent)}
    except ValueError:
        raise UsageError(f"--latent {text}: write a latent's number and its strength, as in 39=40 or 39=4x") from None
    if mode is not None:
        edit["mode"] = mode
    takes_none = swept or ALIASES.get(mode or "", mode) == "ablate"
    if swept and equals:
        raise UsageError(f"--latent {text}: --sweep already gives the strengths; write --latent {latent}")
    if not takes_none and not equals:
        raise UsageError(f"--latent {text}: the strength is missing, as in {latent}=40 or {latent}=4x")
    return edit | (_strength(strength, f"--latent {text}") if equals else {})


def _strength(text: str, where: str) -> dict[str, Any]:
    in_multiples = text.endswith("x")
    try:
        return {"strength": float(text.removesuffix("x")), "unit": "max" if in_multiples else "absolute"}
    except ValueError:
        raise UsageError(
            f"{where}: {text!r} is not a strength; write a number, or a number and x for multiples of max_token"
        ) from None


def _change(edit: dict[str, Any]) -> str:
    amount = f"{edit['strength']:g}{' × max' if edit['unit'] == 'max' else ''}"
    what = {
        "set": f"set to {amount}",
        "add": f"plus {amount}",
        "scale": f"times {amount}",
        "ablate": "ablated",
        "balanced": f"pushed by {amount} of the length of tokens",
    }
    return f"latent {edit['latent']} {what[edit['mode']]}"


def _place(intervention: dict[str, Any]) -> str:
    """Where it is edited, if that is not everywhere."""
    condition = intervention["when"]
    inside = ", in the region" if intervention["region"] is not None else ""
    if condition is None:
        return inside
    unit = " × max" if condition["unit"] == "max" else ""
    return f"{inside}, where latent {condition['latent']} is above {condition['above']:g}{unit}"


def _rectangle(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise UsageError(
            f"--region {text}: write left, top, right and bottom as fractions of the image, as in 0,0,0.5,0.5"
        ) from None


def _condition(text: str) -> dict[str, Any]:
    latent, above, strength = text.partition(">")
    try:
        condition: dict[str, Any] = {"latent": int(latent)}
    except ValueError:
        raise UsageError(f'--when {text}: write a latent\'s number, as in 7, "7>20" or "7>0.5x"') from None
    if not above:
        return condition
    given = _strength(strength, f"--when {text}")
    return condition | {"above": given["strength"], "unit": given["unit"]}


def _image(path: str) -> Image.Image:
    try:
        return decode_image(_read(path, "IMAGE"), rendering=ON_WHITE)
    except BadImage as error:
        raise UsageError(
            f"IMAGE is {path}, which is not a usable image ({error}); give a JPEG, PNG or other image file, or {WHITE}"
        ) from error


def _read_json(path: str) -> Any:
    try:
        return json.loads(_read(path, "--intervention"))
    except ValueError as error:
        raise UsageError(f"--intervention is {path}, which is not valid JSON ({error}); fix the file") from error


def _read(path: str, what: str) -> bytes:
    try:
        folder, name = parent_and_name(path)
        return folder.read_bytes(name)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{what} is {path}, which cannot be read ({reason}); check the path") from error
