"""SAEs on the Hugging Face hub: how they are named, and their files in its cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote

from sae_ray.errors import UsageError
from sae_ray.store.files import Folder

SCHEME = "hf://"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
"""What the name of a repository looks like: `owner/name`."""
_NAME = re.compile(rf"({REPOSITORY.pattern})(?:@([^/@]+))?(?:/([^@]+?))?/?(?:@([^@]+))?")


class HubName(NamedTuple):
    """A place in a repository of models. It is shown as `hf://owner/name/folder@revision`."""

    repo: str
    """As `owner/name`."""
    inside: str
    """A folder or file there; empty for the repository's top."""
    revision: str | None
    """A branch, tag or commit; None for the main branch."""

    def __str__(self) -> str:
        inside = f"/{self.inside}" if self.inside else ""
        return f"{SCHEME}{self.repo}{inside}" + (f"@{self.revision}" if self.revision else "")

    @staticmethod
    def fits(text: str) -> bool:
        """Whether a text has the form of a name."""
        return _NAME.fullmatch(text.removeprefix(SCHEME)) is not None

    @classmethod
    def parse(cls, text: str) -> HubName:
        """From `owner/name/folder@revision` or huggingface_hub's `owner/name@revision/folder`, with or without `hf://`.

        Raises UsageError for any other form.
        """
        found = _NAME.fullmatch(text.removeprefix(SCHEME))
        if found is None or (found[2] and found[4]):
            raise UsageError(f"{text} is no place on the Hugging Face hub; name one as hf://owner/name/folder@revision")
        early = unquote(found[2]) if found[2] else None
        return cls(found[1], found[3] or "", early or found[4])


def downloaded(name: HubName, files: Sequence[str], forms: str) -> Folder:
    """The folder of a repository in the cache, with those of its `files` that lie in the named folder.

    Args:
        forms: How an SAE is named; ends every error message.

    Raises:
        UsageError: there is no such repository or revision; or the hub cannot be reached, and the cache lacks it.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import logging

    from sae_ray.encoders.hub import refusing

    within = f"{name.inside}/" if name.inside else ""
    wanted = [within + file for file in files] + [name.inside] * bool(name.inside)
    folder = PurePosixPath(name.inside).parent if name.inside.endswith(".pt") else PurePosixPath(name.inside)
    if folder.name == "checkpoints":  # of dictionary_learning, whose configuration lies one level above
        wanted.append(str(folder.parent / "config.json"))
    shown = f"{name} is neither a file nor a folder here, and {name.repo} on the Hugging Face hub"
    verbosity, endpoint = logging.get_verbosity(), constants.ENDPOINT
    logging.set_verbosity_error()  # it warns where nothing is found; what is said then is better
    try:
        with refusing(shown, forms, of_hub=True):
            found = snapshot_download(name.repo, revision=name.revision, allow_patterns=wanted, endpoint=endpoint)
    finally:
        logging.set_verbosity(verbosity)
    return Folder(found)


def listed(name: HubName, snapshot: Folder, forms: str) -> list[str]:
    """The paths of all files of the repository; without a connection those in the cache.

    Raises UsageError if the hub does not tell; `forms` as for `downloaded`.
    """
    from huggingface_hub import HfApi, constants

    from sae_ray.encoders.hub import hub_problem, refusing

    if hub_problem():
        return list(snapshot.files(recursive=True))
    with refusing(f"{name.repo} on the Hugging Face hub", forms, of_hub=True):
        return HfApi(endpoint=constants.ENDPOINT).list_repo_files(name.repo, revision=name.revision)
