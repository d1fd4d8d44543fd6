"""What a root was given from elsewhere: which image sets, the activations of which sites, and a judge's embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sae_ray.encoders.info import EncoderInfo
from sae_ray.errors import UsageError
from sae_ray.store.files import Folder

FILE = "imported.json"
JUDGE = "judge"
"""The site of the judge's embeddings."""


@dataclass(frozen=True)
class ImportedImages:
    """An image set of which no more is known than ids and labels."""

    n_images: int
    manifest_digest: str
    labels_digest: str


@dataclass(frozen=True)
class ImportedSite:
    """Vectors of all images of one set or of both."""

    width: int
    rows_per_image: int
    configs: Mapping[str, dict[str, Any]]
    """Name of the image set -> configuration of the step that holds them."""


@dataclass(frozen=True)
class Imported:
    """Everything that was imported under a root."""

    images: Mapping[str, ImportedImages]
    """`train` and `heldout`."""
    sites: Mapping[str, ImportedSite]
    judge: ImportedSite | None = None
    """Of held-out images. Without it there are no MonoSemanticity scores."""

    @property
    def encoder(self) -> EncoderInfo:
        """What stands for the encoder in a plan."""
        return EncoderInfo.of_imported({name: [one.width, one.rows_per_image] for name, one in self.sites.items()})

    @property
    def judge_info(self) -> EncoderInfo:
        """What stands for the judge; without sites if there is none."""
        judge = self.judge
        return EncoderInfo.of_imported({JUDGE: [judge.width, judge.rows_per_image]} if judge else {})

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Imported:
        """The inverse of `to_dict`."""
        images = {name: ImportedImages(**one) for name, one in values["images"].items()}
        sites = {name: ImportedSite(**one) for name, one in values["sites"].items()}
        return cls(images, sites, ImportedSite(**values["judge"]) if values["judge"] else None)

    def write(self, root: Folder) -> None:
        root.write_json(FILE, self.to_dict())


def read_imported(root: Folder) -> Imported | None:
    """What was imported under a root; None where nothing was.

    Raises UsageError when the root cannot be read.
    """
    try:
        root.check_reachable()
        return Imported.from_dict(root.read_json(FILE)) if root.exists(FILE) else None
    except OSError as error:
        raise UsageError(f"--root {root} cannot be read ({error}); check it or choose another") from error
