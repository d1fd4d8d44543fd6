"""Stored data: the file layer, steps and their locks, activations, checkpoints, and the training stream.

Each format is described here or in the module that writes it. A file MUST appear completely or not at all; a step MUST
NOT be read before its `step.json` exists; readers MUST ignore files left by a killed writer."""

from typing import TYPE_CHECKING

from sae_ray.lazy import exports

if TYPE_CHECKING:
    from sae_ray.store.activations import ActivationStore as ActivationStore
    from sae_ray.store.checkpoints import newest_checkpoint as newest_checkpoint
    from sae_ray.store.checkpoints import save_checkpoint as save_checkpoint
    from sae_ray.store.files import Folder as Folder
    from sae_ray.store.files import parent_and_name as parent_and_name
    from sae_ray.store.steps import Step as Step
    from sae_ray.store.steps import hold as hold
    from sae_ray.store.steps import read_record as read_record
    from sae_ray.store.stream import TrainingStream as TrainingStream

__getattr__ = exports(
    __name__,
    {
        "activations": ["ActivationStore"],
        "checkpoints": ["newest_checkpoint", "save_checkpoint"],
        "files": ["Folder", "parent_and_name"],
        "steps": ["Step", "hold", "read_record"],
        "stream": ["TrainingStream"],
    },
)
