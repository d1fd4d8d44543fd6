"""SAEs on the Hugging Face hub: uploading, with a model card of all that a repository holds."""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_ray.encoders.hub import hub_problem
from sae_ray.errors import SaeRayError, UsageError, check
from sae_ray.sae.card import MARK, card, metadata_of
from sae_ray.sae.figures import cell_name, figures
from sae_ray.sae.formats.hub_names import REPOSITORY
from sae_ray.sae.formats.places import FIGURES_FILE, SIDECARS
from sae_ray.store.files import Folder

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from sae_ray.sae.model import SAE

CARD = "README.md"


def push(
    sae: SAE, repo_id: str, folder: str | None = None, *, private: bool | None = None, license: str | None = None
) -> str:
    """Uploads an SAE to the hub, as `SAE.push_to_hub` says. Returns the address of the commit."""
    from huggingface_hub import CommitOperationAdd, HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import httpx, validate_repo_id

    check(REPOSITORY.fullmatch(repo_id) is not None, "repo_id", repo_id, "name it as owner/name")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"repo_id = {repo_id!r}: {error}") from error
    inside = (cell_name(sae.source) or "") if folder is None else folder.strip("/")
    parts = inside.split("/") if inside else []
    fits = all(re.fullmatch(r"[\w.-]*[\w-][\w.-]*", part) for part in parts)
    check(fits, "folder", folder, "make it of letters, digits, -, _, . and /")
    if problem := hub_problem():
        raise UsageError(f"{repo_id} cannot be written: {problem}; push again where there is a connection")
    api = HfApi(endpoint=constants.ENDPOINT)
    with tempfile.TemporaryDirectory(prefix="sae-ray-") as directory:
        place = Path(directory) / "sae"
        found = figures(sae)
        _add_licence(found.get("encoder"))
        _write(sae, found, Folder(place))
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            files = {f"{inside}/{path.name}" if inside else path.name: path for path in sorted(place.iterdir())}
            cards = _cards(api, repo_id, inside, found, license)
            files |= {name: Path(directory) / f"card-{number}.md" for number, name in enumerate(cards)}
            for name, text in cards.items():
                files[name].write_text(text, encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that tables belong into repositories of data
                commit = api.create_commit(
                    repo_id,
                    [CommitOperationAdd(name, path) for name, path in files.items()],
                    commit_message=f"SAE {inside}" if inside else "SAE",
                )
        except HfHubHTTPError as error:
            raise UsageError(f"{repo_id} cannot be written: {_reason(error)}") from error
        except (httpx.HTTPError, OSError, RuntimeError) as error:
            reason = str(error) or type(error).__name__
            raise SaeRayError(f"{repo_id} cannot be written: {reason}; push again") from error
    return commit.commit_url


def _write(sae: SAE, found: dict[str, Any], folder: Folder) -> None:
    """The SAE, its figures, and the tables that lie beside it."""
    sae.save(folder.path)
    folder.write_json(FIGURES_FILE, found)
    for name in SIDECARS:
        if sae.source is not None and sae.source.exists(name) and not folder.exists(name):
            folder.write_copy(name, sae.source, name)


def _cards(api: HfApi, repo_id: str, inside: str, found: dict[str, Any], license: str | None) -> dict[str, str]:
    """The card of the repository; or that of this SAE alone in its folder, where others wrote a card for the whole."""
    listed = api.list_repo_files(repo_id)
    existing = _read(api, repo_id, CARD) if CARD in listed else ""
    if existing and MARK not in existing and _body(existing):
        return {f"{inside}/{CARD}": card(repo_id, {inside: found}, license)} if inside else {}
    saes = {}
    for name in listed:
        folder, _, file = name.rpartition("/")
        if file == FIGURES_FILE and (told := _figures(_read(api, repo_id, name))):
            saes[folder] = told
    return {CARD: card(repo_id, saes | {inside: found}, license or metadata_of(existing).get("license"))}


def _figures(text: str) -> dict[str, Any] | None:
    """What another push has written; None for a file of that name which is no such thing."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.keys() >= {"architecture", "d_in", "d_sae"} else None


def _read(api: HfApi, repo_id: str, name: str) -> str:
    return Path(api.hf_hub_download(repo_id, name)).read_text(encoding="utf-8")


def _body(text: str) -> str:
    return re.sub(r"\A---\n.*?\n---\n", "", text, count=1, flags=re.DOTALL).strip()


def _add_licence(encoder: dict[str, Any] | None) -> None:
    """The licence of an encoder on the hub; nothing where there is none."""
    if encoder is None or "license" in encoder or not REPOSITORY.fullmatch(encoder["model"]):
        return
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import httpx

    try:
        data = HfApi(endpoint=constants.ENDPOINT).model_info(encoder["model"], revision=encoder["revision"]).card_data
    except (httpx.HTTPError, OSError, ValueError):
        return
    if data is not None and isinstance(data.license, str):
        encoder["license"] = data.license


def _reason(error: Any) -> str:
    status = error.response.status_code
    if status in (401, 403):
        return (
            f"the hub refuses this account ({status}); log in with `hf auth login`, or set HF_TOKEN to a token that "
            "may write there"
        )
    return str(error).strip()
