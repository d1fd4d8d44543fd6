"""What the card itself does: copies and products, on which all lower bounds rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from bench.gpu.timing import in_a_row
from bench.record import Table
from sae_ray.sae.product import rough_affine

if TYPE_CHECKING:
    from bench.gpu.sizes import Sizes

CALLS = 10
KINDS = {
    "bfloat16": (torch.bfloat16, "highest"),
    "TF32": (torch.float32, "high"),
    "float32": (torch.float32, "highest"),
    "float64": (torch.float64, "highest"),
}
"""Of products: the dtype, and torch's precision of float32 products."""


def tables(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    rows: list[list[Any]] = [["copy, bytes read and written", f"{bandwidth(sizes, device) / 1e9:.2f} TB/s"]]
    edge = sizes.matmul
    for kind in KINDS:
        for shape in ((edge, edge, edge), (sizes.batch, sizes.d_in, sizes.d_sae)):
            rate = 2 * shape[0] * shape[1] * shape[2] / product_ms(kind, shape, device) / 1e9
            rows.append([f"product [{shape[0]}, {shape[1]}] @ [{shape[1]}, {shape[2]}], {kind}", f"{rate:.0f} TFLOP/s"])
            yield Table(title="The card", columns=["what", "rate"], rows=rows)
    yield from encoder_products(sizes, device)


def encoder_products(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    """The encoder's product in bfloat16 with a float32 bias: what the trainer calls, and what else there is."""
    x = torch.randn(sizes.batch, sizes.d_in, device=device).bfloat16()
    W_enc = torch.randn(sizes.d_sae, sizes.d_in, device=device).bfloat16().T
    bias = torch.randn(sizes.d_sae, device=device)
    forms: dict[str, Callable[[], Any]] = {"bfloat16 result, no bias": lambda: x @ W_enc}
    if device.type == "cuda":
        forms["float32 result, no bias"] = lambda: torch.mm(x, W_enc, out_dtype=torch.float32)
        forms["float32 result, float32 bias added by the product"] = lambda: torch.addmm(
            bias, x, W_enc, out_dtype=torch.float32
        )
    rough, weight = x.float(), W_enc.T.float()
    forms["float32 result, both rounded, bias as columns (ours)"] = lambda: rough_affine(rough, weight, bias)
    forms["float32 result, bias added afterwards"] = lambda: (x @ W_enc).float().add_(bias)
    rows = []
    for name, run in forms.items():
        rows.append([name, f"{in_a_row(device, run, CALLS):.2f}"])
        yield Table(
            title=f"Pre-activations of {sizes.batch} rows and {sizes.d_sae} latents, bfloat16",
            columns=["form of the product", "ms"],
            rows=rows,
        )


def bandwidth(sizes: Sizes, device: torch.device) -> float:
    """Bytes per millisecond of a copy on the device, read and written ones both counted."""
    source = torch.randint(0, 256, (sizes.copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * sizes.copied / in_a_row(device, lambda: target.copy_(source), CALLS)


def product_ms(kind: str, shape: tuple[int, int, int], device: torch.device) -> float:
    """Milliseconds of a product of these shapes, of random numbers."""
    dtype, precision = KINDS[kind]
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype).T
    torch.set_float32_matmul_precision(precision)
    taken = in_a_row(device, lambda: left @ right, CALLS)
    torch.set_float32_matmul_precision("highest")
    return taken
