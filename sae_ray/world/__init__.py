"""The embedded world: rendered images and three small models trained on such images, all real and all offline.

`write_world` lays them out as an ordinary image folder and ordinary model directories; from there on they are read as
anybody's own would be."""

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
