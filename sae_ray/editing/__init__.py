"""Editing: taking what a latent stands for out of a model's weights, as a patch that can be undone.

`make_patch` writes down the change, `edited` lends it to a loaded model, `edited_copy` makes a directory of it, and
`undo` gives such a directory its bytes back. No file of the model is ever changed."""

from typing import TYPE_CHECKING

from sae_ray.lazy import exports

if TYPE_CHECKING:
    from sae_ray.editing.applying import apply_patch as apply_patch
    from sae_ray.editing.applying import edited as edited
    from sae_ray.editing.applying import load_edited as load_edited
    from sae_ray.editing.copies import edited_copy as edited_copy
    from sae_ray.editing.copies import undo as undo
    from sae_ray.editing.making import make_patch as make_patch
    from sae_ray.editing.patch import Patch as Patch
    from sae_ray.editing.patch import load_patch as load_patch
    from sae_ray.editing.patch import save_patch as save_patch

__getattr__ = exports(
    __name__,
    {
        "applying": ["apply_patch", "edited", "load_edited"],
        "copies": ["edited_copy", "undo"],
        "making": ["make_patch"],
        "patch": ["Patch", "load_patch", "save_patch"],
    },
)
