"""The embedded world: rendered images and three small models trained on such images. It works offline.

`write_world` writes them as an ordinary image folder and ordinary model directories, which are then read like a user's
own."""

from typing import TYPE_CHECKING

from sae_ray.lazy import exports

if TYPE_CHECKING:
    from sae_ray.world.write import FIRST_HELDOUT as FIRST_HELDOUT
    from sae_ray.world.write import write_world as write_world

__getattr__ = exports(
    __name__,
    {
        "write": ["FIRST_HELDOUT", "write_world"],
    },
)
