"""What holds for the tensors of every format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.images.imposters import kind_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from sae_ray.sae.model import SAE

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put before the names of the module, or
part of one, that they wrap."""


def unwrapped(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values under the names that they had before the module was wrapped.

    Raises UsageError if two of them would have the same name.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        own = ".".join(part for part in str(name).split(".") if part not in _WRAPPERS)
        if own in found:
            raise UsageError(f"{where} holds {own!r} twice, once wrapped ({name!r}); save the unwrapped module")
        found[own] = value
    return found


def not_tensors(data: bytes, where: str, otherwise: str) -> SaeRayError:
    """The error for a file that cannot be opened, which names what it is: a git-lfs pointer, an HTML page.

    Args:
        otherwise: what is said of one that may once have been a file of tensors.
    """
    kind = kind_of(data) if data else "empty"
    if kind in (None, "a ZIP archive", "a pickle"):
        return SaeRayError(f"{where} {otherwise}")
    return SaeRayError(f"{where} is {kind}, not a file of tensors; fetch it again")


def check_finite(sae: SAE, where: str) -> None:
    """Raises SaeRayError, which names the tensor, if a weight or threshold is not finite."""
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        tensor = getattr(sae, name)
        if tensor is not None and (n_bad := int((~tensor.isfinite()).sum())):
            raise SaeRayError(
                f"{where}: {n_bad} of the {tensor.numel()} values of {name} are NaN or infinite; its training "
                "diverged, or the file is damaged: take an earlier checkpoint, or copy it again"
            )


def of_centred(
    W_enc: Float[Tensor, "d_in d_sae"], b_enc: Float[Tensor, " d_sae"], b_dec: Float[Tensor, " d_in"]
) -> Float[Tensor, " d_sae"]:
    """The encoder's bias for inputs less `b_dec`, from that for inputs as they are: the codes stay the same."""
    return (b_enc.double() + b_dec.double() @ W_enc.double()).to(b_enc.dtype)


def of_uncentred(
    W_enc: Float[Tensor, "d_in d_sae"], b_enc: Float[Tensor, " d_sae"], b_dec: Float[Tensor, " d_in"]
) -> Float[Tensor, " d_sae"]:
    """The inverse of `of_centred`."""
    return of_centred(W_enc, b_enc, -b_dec)


def unit_norms(norms: Float[Tensor, " d_sae"]) -> bool:
    """Whether all are 1 up to rounding."""
    return bool(((norms - 1).abs() <= 1e-5).all())
