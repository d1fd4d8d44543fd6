"""Image embeddings on their way between deployments: in the model's dtype, as arrays, which Ray does not copy twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Shaped
    from torch import Tensor


def packed(embedding: Tensor) -> Shaped[np.ndarray, "patches hidden"]:
    """An embedding in the host's memory as an array that shares it. numpy has no bfloat16: its bits go as uint16."""
    return (embedding.view(torch.uint16) if embedding.dtype == torch.bfloat16 else embedding).numpy()


def unpacked(array: Shaped[np.ndarray, "patches hidden"]) -> Tensor:
    """The embedding again, in memory of its own: what Ray hands over is read-only."""
    embedding = torch.from_numpy(array.copy())
    return embedding.view(torch.bfloat16) if embedding.dtype == torch.uint16 else embedding
