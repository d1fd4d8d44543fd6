"""What host and device tell each other of a few steps at once, so that the host does not wait for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float
    from torch import Tensor


class Window:
    """A few steps: numbers that the host knows of each go to the device before the first, its figures come back after
    the last."""

    def __init__(self, length: int, n_numbers: int, n_figures: int, device: torch.device):
        self.length = length
        """Steps at most."""
        self.done = 0
        """Steps since it was opened."""
        self.stopped = torch.zeros((), dtype=torch.bool, device=device)
        """Whether none of its further steps is to be taken."""
        self._numbers = torch.zeros(length, n_numbers, device=device)
        self._figures = torch.zeros(length, n_figures, device=device)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)

    def open(self, numbers: Sequence[Sequence[float]]) -> None:
        """Before its first step: the numbers of each."""
        self._numbers.copy_(torch.tensor(numbers))
        self._place.zero_()
        self.stopped.zero_()

    def numbers(self) -> tuple[Float[Tensor, ""], ...]:
        """Those of the current step."""
        return self._numbers.index_select(0, self._place).squeeze(0).unbind()

    def note(self, figures: Float[Tensor, " n_figures"], stop: Bool[Tensor, ""]) -> None:
        """Ends the current step."""
        self._figures.index_copy_(0, self._place, figures.unsqueeze(0))
        self._place += 1
        self.stopped |= stop

    def close(self) -> list[list[float]]:
        """The figures of its steps. The host waits for the device."""
        figures = self._figures[: self.done].tolist()
        self.done = 0
        return figures
