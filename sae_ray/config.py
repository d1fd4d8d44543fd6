"""What configuration dataclasses share. Pydantic reads these when a study file is opened; nothing here imports it."""

import math
from typing import Annotated, Literal

from annotated_types import Ge, Lt

STRICT = {"extra": "forbid", "use_attribute_docstrings": True}
"""Their `__pydantic_config__`."""
Dtype = Literal["float32", "bfloat16", "float16"]
Count = Annotated[int, Ge(1)]
Amount = Annotated[float, Ge(0), Lt(math.inf)]
