"""The embedded world: rendered images and three small models trained on such images, all real and all offline.

`write_world` lays them out as an ordinary image folder and ordinary model directories; from there on they are read as
anybody's own would be.
"""

from sae_ray.world.write import FIRST_HELDOUT, write_world

__all__ = ["FIRST_HELDOUT", "write_world"]
