"""A trained sparse autoencoder: encoding and decoding."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from sae_ray.errors import UsageError
from sae_ray.sae.architectures import architecture
from sae_ray.sae.rows import standardised
from sae_ray.sae.screening import pays, screening
from sae_ray.sae.sparse import Pattern, SparseCodes
from sae_ray.store.files import Folder, writing
from sae_ray.store.tensors import as_tensor

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from jaxtyping import Float
    from torch import Tensor

    from sae_ray.sae.architectures.base import Architecture

# Pre-activations held at once by `encode_sparse`: 64 MiB of float32. The size of a chunk depends only on the SAE.
_PRE_ENTRIES = 2**24
# A GPU waits for the host after every chunk, so that its chunks are larger.
_PRE_ENTRIES_ON_GPU = 2**26
# Rows of every product on a GPU. The order of its sums depends on the shape: with one shape alone, the codes of a row
# are the same bits whatever the rows beside it.
_ROWS_ON_GPU = 256


@dataclass(frozen=True, eq=False, repr=False)
class SAE:
    """A sparse autoencoder for inference.

    `pre = (x - b_dec) @ W_enc + b_enc`; the codes are `relu(pre)` where the architecture keeps it: strictly above the
    threshold, among the `k` largest of a sample, or everywhere. The reconstruction is `codes @ W_dec + b_dec`. It is
    computed in float32, or in float64 if the weights are. Some architectures compute other codes, or bring rows to a
    common mean and spread first: their classes say so.
    """

    architecture: str
    """How it was trained; decides which latents are kept."""
    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_in"]
    threshold: Float[Tensor, " d_sae"] | None = None
    """float32 whatever the dtype of the weights; None for architectures without one."""
    k: int | None = None
    """Active latents per sample, exactly or on average; None for architectures that are tuned otherwise."""
    concepts: tuple[str, ...] = ()
    """Those that the first latents were guided by, in their order; none for most SAEs."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Facts that travel with the SAE; plain JSON values."""
    source: Folder | None = field(default=None, repr=False)
    """Where it was opened; None for an SAE that was not."""

    def __post_init__(self):
        if self.W_enc.ndim != 2:
            raise UsageError(f"W_enc has shape {tuple(self.W_enc.shape)}; an SAE needs [d_in, d_sae]")
        d_in, d_sae = self.W_enc.shape
        for name, shape in (("W_dec", (d_sae, d_in)), ("b_enc", (d_sae,)), ("b_dec", (d_in,)), ("threshold", (d_sae,))):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise UsageError(f"{name} has shape {tuple(tensor.shape)}; W_enc [{d_in}, {d_sae}] needs {shape}")
        self.kind.check_sae(self)

    def __repr__(self) -> str:
        sizes = f"d_in={self.d_in}, d_sae={self.d_sae}" + (f", k={self.k}" if self.k is not None else "")
        return f"{type(self).__name__}({self.architecture}, {sizes}, {self.W_enc.dtype} on {self.device})"

    @property
    def kind(self) -> type[Architecture]:
        """The class of its architecture."""
        return architecture(self.architecture)

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    def to(self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None) -> SAE:
        """The same SAE on another device or with weights of another dtype, which may also come first, as in torch; the
        threshold stays float32."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        weights = {name: getattr(self, name).to(device, dtype) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        threshold = None if self.threshold is None else self.threshold.to(device)
        return dataclasses.replace(self, **weights, threshold=threshold)

    def save(self, directory: str | Path) -> None:
        """Writes it, in float32, as a directory that `load_sae` and SAELens open; a local path or a URI.

        Raises SaeRayError if it cannot be written.
        """
        from sae_ray.sae.formats import save_sae

        folder = Folder(directory)
        with writing(folder):
            save_sae(self, folder)

    def push_to_hub(
        self,
        repo_id: str,
        folder: str | None = None,
        *,
        private: bool | None = None,
        license: str | None = None,
    ) -> str:
        """Uploads it to a repository on the Hugging Face hub, which is made if it is missing, with a model card.

        The card tells what is known of all SAEs that were pushed there: where this one was opened from, the steps of
        the study beside it are read.

        Args:
            repo_id: as `owner/name`.
            folder: its folder there; the name of the cell that it is in a study, or else the repository's top.
            private: whether a new repository is private; by default what the owner has chosen.
            license: an id of the hub, such as `apache-2.0`, for the card.

        Returns:
            The address of the commit.

        Raises:
            UsageError: the hub cannot be reached, or may not be written to.
            SaeRayError: the connection was lost.
        """
        from sae_ray.sae.sharing import push

        return push(self, repo_id, folder, private=private, license=license)

    def encode(self, x: Float[Tensor | np.ndarray, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Dense codes of a tensor or array. Raises UsageError when x is neither, or has another width than `d_in`."""
        return self.kind.codes(self._pre(x), self)

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor | np.ndarray, "n d_in"]) -> SparseCodes:
        """The active latents of each row. Memory grows with their number: the dense codes of all rows are never formed.

        Raises UsageError when x is not [n, d_in]: tokens of several images are flattened into rows first.
        """
        x = as_tensor(x)
        if x.ndim != 2:
            raise UsageError(f"the input has shape {list(x.shape)}; flatten it to [n, {self.d_in}] first")
        if self.device.type == "cuda":
            chunks = x.split(_ROWS_ON_GPU * max(1, _PRE_ENTRIES_ON_GPU // (_ROWS_ON_GPU * self.d_sae)))
            found_in = screening(self) if pays(self) else lambda rows: self._active(self._pre_of_one_shape(rows))
            active = [found_in(self._centred(chunk)) for chunk in chunks]
        else:
            chunks = x.split(max(1, _PRE_ENTRIES // self.d_sae))
            active = [self._active(self._pre(chunk)) for chunk in chunks]
        starts = [start * chunks[0].shape[0] for start in range(len(chunks))]
        return SparseCodes(
            torch.cat([flat // self.d_sae + start for (flat, _), start in zip(active, starts, strict=True)]),
            torch.cat([flat % self.d_sae for flat, _ in active]),
            torch.cat([values for _, values in active]),
            len(x),
            self.d_sae,
        )

    def decode(
        self,
        codes: SparseCodes | Float[Tensor | np.ndarray, "... d_sae"],
        x: Float[Tensor | np.ndarray, "... d_in"] | None = None,
    ) -> Float[Tensor, "... d_in"]:
        """Reconstructions, [n_rows, d_in] for sparse codes.

        Args:
            x: what was encoded; for architectures that standardise rows, whose mean and spread it gives back.

        Raises UsageError when such an architecture is not given x, or the codes are not `d_sae` wide.
        """
        W_dec, b_dec = self.W_dec.to(self._dtype), self.b_dec.to(self._dtype)
        if isinstance(codes, SparseCodes):
            pattern = Pattern(codes.rows, codes.latents, codes.n_rows, codes.d_sae)
            decoded = pattern.row_sums(codes.values.to(self._dtype), W_dec) + b_dec
        else:
            codes = as_tensor(codes)
            if codes.ndim == 0 or codes.shape[-1] != self.d_sae:
                raise UsageError(f"the codes have shape {list(codes.shape)}; give [..., {self.d_sae}], as encode does")
            decoded = codes.to(self.device, self._dtype) @ W_dec + b_dec
        return self.restored(decoded, x)

    def restored(
        self, decoded: Float[Tensor, "... d_in"], x: Float[Tensor | np.ndarray, "... d_in"] | None
    ) -> Float[Tensor, "... d_in"]:
        """What was decoded, with the mean and the spread of the rows x where the architecture standardises them.

        Raises as `decode`.
        """
        if not self.kind.standardises_rows:
            return decoded
        if x is None:
            raise UsageError(f"a {self.architecture} SAE decodes to rows of mean 0; give what was encoded, too")
        _, mean, spread = standardised(as_tensor(x).to(decoded))
        return decoded * spread + mean

    def added(self, x: Float[Tensor, "... d_in"], change: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
        """Rows x after a change of what is decoded: in their own spread where the architecture standardises them."""
        return x + (standardised(x).spread * change if self.kind.standardises_rows else change)

    def pre_of_first(self, x: Float[Tensor, "n d_in"], n: int) -> Float[Tensor, "n n_first"]:
        """Pre-activations of the first latents alone."""
        W_enc, b_enc = self.W_enc[:, :n].to(self._dtype), self.b_enc[:n].to(self._dtype)
        return self._centred(x) @ W_enc + b_enc

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.W_enc.dtype, torch.float32)

    def _pre(self, x: Tensor | np.ndarray) -> Tensor:
        W_enc, b_enc = self.W_enc.to(self._dtype), self.b_enc.to(self._dtype)
        return self._centred(x) @ W_enc + b_enc

    def _pre_of_one_shape(self, centred: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """As `_pre`, by products of `_ROWS_ON_GPU` rows."""
        W_enc, b_enc = self.W_enc.to(self._dtype), self.b_enc.to(self._dtype)
        padded = F.pad(centred, (0, 0, 0, -len(centred) % _ROWS_ON_GPU))
        pre = padded.new_empty(len(padded), self.d_sae)
        for rows, out in zip(padded.split(_ROWS_ON_GPU), pre.split(_ROWS_ON_GPU), strict=True):
            torch.addmm(b_enc, rows, W_enc, out=out)
        return pre[: len(centred)]

    def _centred(self, x: Float[Tensor | np.ndarray, "... d_in"]) -> Float[Tensor, "... d_in"]:
        x = as_tensor(x)
        if x.ndim == 0:
            raise UsageError(f"the input is a single number; give [..., {self.d_in}]")
        if x.shape[-1] != self.d_in:
            raise UsageError(
                f"the input is {x.shape[-1]} wide, this SAE takes {self.d_in}; use the site it was trained on"
            )
        x = x.to(self.device, self._dtype)
        if self.kind.standardises_rows:
            x = standardised(x).values
        return x - self.b_dec.to(self._dtype)

    def _active(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Ascending flat indices and values of the active entries of `pre`."""
        flat = self.kind.active(pre, self)
        return flat, self.kind.activation(pre.flatten()[flat])
