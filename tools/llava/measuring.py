"""How often a LLaVA names what photographs of known classes show."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from sae_ray.concepts.naming import class_names, class_of, first_synonym, names
from sae_ray.errors import SaeRayError, UsageError
from sae_ray.images import BadImage, decode_image, list_images
from sae_ray.images.part import read_file
from sae_ray.steering.config import ONE_WORD
from sae_ray.steering.llava import Llava
from sae_ray.steering.protocol import sample
from sae_ray.store.files import Folder
from tools.llava.progress import Progress, Rate

BATCH = 16
MAX_NEW_TOKENS = 5


class Measured(NamedTuple):
    """Answers to the one-word question, by class."""

    right: Counter[str]
    asked: Counter[str]
    others: Counter[str]
    """Wrong answers."""

    @property
    def accuracy(self) -> float:
        return self.right.total() / self.asked.total()

    def lines(self) -> list[str]:
        """For the user."""
        shares = [f"{self.right[name] / n:6.1%}  {self.right[name]} of {n}  {name}" for name, n in self.asked.items()]
        wrong = ", ".join(f"{answer!r} {n}×" for answer, n in self.others.most_common(8))
        total = f"{self.accuracy:6.1%}  {self.right.total()} of {self.asked.total()}  named in answer to {ONE_WORD!r}"
        return [*shares, total, *([f"commonest wrong answers: {wrong}"] if wrong else [])]


def measure(llava: Llava, folder: Folder, n_images: int, seed: int, progress: Progress) -> Measured:
    """Asks about a random sample of images in class folders. An answer is right if it begins with the class's name.

    Raises:
        UsageError: The images are not in class folders.
        SaeRayError: None of them can be read.
    """
    images = list_images(folder)
    labels, image_ids = (images.labels["label_name"].to_pylist(), images.manifest["image_id"].to_pylist())
    readable = class_names(label for label in labels if label is not None)
    named = [row for row, label in enumerate(labels) if label is not None and class_of(label) in readable]
    if not named:
        raise UsageError(
            f"the images in {folder} are in no folders named by what they show; sort them into such folders"
        )
    chosen = sample(named, n_images, seed)
    right, asked, others = Counter[str](), Counter[str](), Counter[str]()
    rate = Rate(0, len(chosen), "images")
    for start in range(0, len(chosen), BATCH):
        rows, pictures = [], []
        for row in chosen[start : start + BATCH]:
            try:
                pictures.append(decode_image(read_file(folder, image_ids[row])))
                rows.append(row)
            except BadImage as error:
                progress.say(f"{image_ids[row]} is left out: {error.reason}")
        answers = llava.answers(pictures, [ONE_WORD] * len(rows), [()] * len(rows), MAX_NEW_TOKENS)
        for row, answer in zip(rows, answers, strict=True):
            name = readable[class_of(labels[row])]
            asked[first_synonym(name)] += 1
            if names(answer, name):
                right[first_synonym(name)] += 1
            else:
                others[answer] += 1
        progress(f"{rate.line(min(start + BATCH, len(chosen)))}, {right.total()} right")
    if not asked:
        raise SaeRayError(f"none of the {len(chosen):,} images in {folder} can be read; give a folder of images")
    return Measured(right, asked, others)
