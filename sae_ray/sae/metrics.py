"""How faithful an SAE is, as sums that merge over batches and workers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_ray.errors import SaeRayError
from sae_ray.store.tensors import as_tensor
from sae_ray.store.vectors import Vectors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from jaxtyping import Float, Int
    from torch import Tensor

    from sae_ray.sae.model import SAE
    from sae_ray.sae.sparse import SparseCodes
    from sae_ray.store.activations import ActivationStore

ROWS_PER_BATCH = 4096
MEASURED_ROWS = 2**20


class FidelitySummary(NamedTuple):
    """One SAE on one set of activations."""

    n_samples: int
    """Activations looked at."""
    l0: float
    """Active latents per sample at inference."""
    r2: float
    """Fraction of variance explained, mean subtracted: 1 - sum |x - x_hat|^2 / sum |x - mean|^2."""
    nmse: float
    """Squared error relative to the squared norm: sum |x - x_hat|^2 / sum |x|^2."""
    cosine: float
    """Mean over samples of the cosine between x and x_hat."""
    dead_fraction: float
    """Share of latents that were never active."""


class LatentStatistics(NamedTuple):
    """Per latent, over single samples (tokens)."""

    frequency: Float[Tensor, " d_sae"]
    """Share of samples on which it is active."""
    mean_active: Float[Tensor, " d_sae"]
    """Mean over those samples; 0 if there are none."""
    max_token: Float[Tensor, " d_sae"]
    """Largest value; 0 if it never fired."""


class LatentSums:
    """Sums per latent over samples, in float64 on the CPU."""

    def __init__(self, d_sae: int):
        self.n_samples = 0
        self.n_active: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.int64)
        self.activation: Float[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.float64)
        """Sum of the codes."""
        self.max_token: Float[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.float64)

    def update(self, codes: SparseCodes) -> None:
        """Adds samples."""
        latents, values = codes.latents.cpu(), codes.values.double().cpu()
        self.n_samples += codes.n_rows
        self.n_active += torch.bincount(latents, minlength=len(self.n_active))
        self.activation.index_add_(0, latents, values)
        self.max_token.scatter_reduce_(0, latents, values, "amax")

    def merge(self, other: LatentSums) -> None:
        """Adds the samples of `other`."""
        self.n_samples += other.n_samples
        self.n_active += other.n_active
        self.activation += other.activation
        self.max_token = torch.maximum(self.max_token, other.max_token)

    def statistics(self) -> LatentStatistics:
        return LatentStatistics(
            frequency=self.n_active / max(1, self.n_samples),
            mean_active=self.activation / self.n_active.clamp_min(1),
            max_token=self.max_token,
        )


class Fidelity:
    """Sums over samples, in float64, taken where the samples are. Those of parts of the data merge into the whole's."""

    def __init__(self, d_in: int, d_sae: int):
        self.latent_sums = LatentSums(d_sae)
        self.error = 0.0
        """Sum of |x - x_hat|^2."""
        self.power = 0.0
        """Sum of |x|^2."""
        self.cosine = 0.0
        self.total: Float[Tensor, " d_in"] = torch.zeros(d_in, dtype=torch.float64)
        """Sum of x."""

    def update(self, x: Float[Tensor, "n d_in"], codes: SparseCodes, x_hat: Float[Tensor, "n d_in"]) -> None:
        """Adds samples with their codes and reconstructions."""
        x, x_hat = x.double(), x_hat.double()
        self.latent_sums.update(codes)
        self.error += (x - x_hat).square().sum().item()
        self.power += x.square().sum().item()
        # By default vectors shorter than 1e-8 are taken for longer ones.
        self.cosine += torch.nn.functional.cosine_similarity(x, x_hat, dim=1, eps=1e-150).sum().item()
        self.total += x.sum(0).cpu()

    def merge(self, other: Fidelity) -> None:
        """Adds the samples of `other`."""
        self.latent_sums.merge(other.latent_sums)
        for name in ("error", "power", "cosine", "total"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def summary(self) -> FidelitySummary:
        """NaN where there are no samples, and in `r2` and `nmse` where they do not vary or are all 0."""
        n_samples, n_active = self.latent_sums.n_samples, self.latent_sums.n_active
        n = n_samples or float("nan")
        variance = self.power - (self.total.square().sum().item() / n)
        return FidelitySummary(
            n_samples=n_samples,
            l0=n_active.sum().item() / n,
            r2=1 - self.error / variance if variance > 0 else float("nan"),
            nmse=self.error / self.power if self.power > 0 else float("nan"),
            cosine=self.cosine / n,
            dead_fraction=(n_active == 0).double().mean().item(),
        )

    def latents(self) -> LatentStatistics:
        return self.latent_sums.statistics()

    def __repr__(self) -> str:
        return repr(self.summary()).replace(FidelitySummary.__name__, type(self).__name__)


def evaluate(sae: SAE, activations: Any, column: str | None = None) -> Fidelity:
    """Fidelity on activations that are not normalised, with inference-threshold codes.

    Args:
        activations: what `train_sae` takes, a [n, d_in] tensor or a file say; or such tensors or arrays one after the
            other: a list of them, an iterator, a DataLoader.
        column: as for `train_sae`.

    Raises:
        UsageError: these are no vectors, or of another width than `d_in`.
        SaeRayError: a value is not finite; the message names its row, counted over all batches.
    """
    fidelity = Fidelity(sae.d_in, sae.d_sae)
    done = 0
    for batch in _given(activations, column):
        x = as_tensor(_alone(batch))
        if x.is_floating_point() and not (finite := x.isfinite()).all():
            row = done + int((~finite).nonzero()[0, 0])
            raise SaeRayError(f"row {row} of the activations has values that are not finite; leave it out")
        _measure(sae, x.to(sae.device), fidelity)
        done += len(x)
    return fidelity


def _given(activations: Any, column: str | None) -> Iterable[Any]:
    """Batches of [n, d_in]: what gives them one after the other, without a place for each row, is of batches."""
    if isinstance(activations, torch.Tensor) and activations.ndim == 2:
        return activations.split(ROWS_PER_BATCH)
    if isinstance(activations, list | tuple):
        of_batches = bool(activations) and getattr(_alone(activations[0]), "ndim", 0) == 2
    else:
        of_batches = isinstance(activations, Iterable) and not hasattr(activations, "__getitem__")
    return activations if of_batches else Vectors(activations, column).blocks(ROWS_PER_BATCH)


def _alone(batch: Any) -> Any:
    """The tensor of a batch of a TensorDataset, which is a list."""
    return batch[0] if isinstance(batch, list | tuple) and len(batch) == 1 else batch


def evaluate_store(
    sae: SAE,
    store: ActivationStore,
    after_piece: Callable[[int], None] = lambda rows: None,
    also: Callable[[Tensor, SparseCodes, Tensor], None] | None = None,
) -> Fidelity:
    """Fidelity on all activations of a store.

    Args:
        after_piece: called with the number of activations done.
        also: called with activations, their codes and their `image_index`, some rows at a time.
    """
    fidelity = Fidelity(sae.d_in, sae.d_sae)
    for batch, images in _batches(store, store.n_rows, after_piece):
        x = batch.to(sae.device)
        codes = _measure(sae, x, fidelity)
        if also is not None:
            also(x, codes, images)
    return fidelity


def _measure(sae: SAE, x: Float[Tensor, "n d_in"], fidelity: Fidelity) -> SparseCodes:
    codes = sae.encode_sparse(x)
    fidelity.update(x, codes, sae.decode(codes, x))
    return codes


def measure_latents(saes: Sequence[SAE], store: ActivationStore) -> list[LatentStatistics]:
    """How the latents of each SAE fire on the store's first 2**20 activations, in the order of its parts.

    The SAEs belong to one site and share one read. The result depends on SAE and store alone.
    """
    sums = [LatentSums(sae.d_sae) for sae in saes]
    for batch, _ in _batches(store, min(store.n_rows, MEASURED_ROWS)) if saes else ():
        for sae, own in zip(saes, sums, strict=True):
            own.update(sae.encode_sparse(batch))
    return [own.statistics() for own in sums]


def _batches(
    store: ActivationStore, n_rows: int, after_piece: Callable[[int], None] = lambda rows: None
) -> Iterator[tuple[Float[Tensor, "n d_in"], Int[Tensor, " n"]]]:
    """The first rows of a store, in float32, and the `image_index` of each."""
    left = n_rows
    for number in store.parts:
        for images in store.pieces(number):
            image_index, _, vectors = store.read(number, images)
            rows, of_rows = torch.tensor(vectors[:left]), torch.tensor(image_index[:left])
            for batch, of_batch in zip(rows.split(ROWS_PER_BATCH), of_rows.split(ROWS_PER_BATCH), strict=True):
                yield batch.float(), of_batch
            left -= len(rows)
            after_piece(n_rows - left)
            if left == 0:
                return
