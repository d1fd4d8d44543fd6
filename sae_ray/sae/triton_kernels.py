"""The training step's sparse parts as Triton kernels, for CUDA tensors.

Each function computes what the plain torch formulation beside its call computes, which stays the path of CPUs and the
reference of the tests. Sums run in a fixed order: results are the same every time. Kernels run on the device of their
tensors, whichever is the current one.
"""

# Triton is not everywhere, and what its decorator makes of a function is not what pyright sees.
# pyright: reportMissingImports=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

_ENTRIES = 8
"""Entries of a sum that are read at once."""
_COMPACTED = 4096
"""Values that one program of the search looks at."""


def bag_sums(
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " n_bags+1"],
    weights: Float[Tensor, " nnz"],
    table: Float[Tensor, "n d"],
) -> Float[Tensor, "n_bags d"]:
    """Per bag the weighted sum of the rows of `table` that its entries name."""
    n_bags, d = len(offsets) - 1, table.shape[1]
    table = table.contiguous()
    sums = table.new_empty(n_bags, d)
    if sums.numel():
        width = min(1024, triton.next_power_of_2(d))
        with torch.cuda.device_of(table):
            _bag_sums[(n_bags, triton.cdiv(d, width))](indices, offsets, weights, table, sums, d, width, _ENTRIES)
    return sums


def dots(
    rows: Int[Tensor, " nnz"],
    latents: Int[Tensor, " nnz"],
    left: Float[Tensor, "n_rows d"],
    right: Float[Tensor, "n_latents d"],
) -> Float[Tensor, " nnz"]:
    """Per entry the dot product of its rows of `left` and `right`; 0 where there is no such row of `left`."""
    d = left.shape[1]
    products = left.new_empty(len(rows))
    if len(rows):
        width = triton.next_power_of_2(d)
        with torch.cuda.device_of(left):
            _dots[(len(rows),)](rows, latents, left.contiguous(), right.contiguous(), products, len(left), d, width)
    return products


def at_least(flat: Float[Tensor, " n"], bound: float, capacity: int) -> Int[Tensor, " found"] | None:
    """Ascending indices of the values that are not below `bound`; None if they are more than `capacity`."""
    n_programs = triton.cdiv(len(flat), _COMPACTED)
    counts = torch.empty(n_programs, dtype=torch.int32, device=flat.device)
    with torch.cuda.device_of(flat):
        _count[(n_programs,)](flat, bound, counts, len(flat), _COMPACTED)
    ends = counts.cumsum(0)
    total = int(ends[-1])
    if total > capacity:
        return None
    found = torch.empty(total, dtype=torch.int64, device=flat.device)
    with torch.cuda.device_of(flat):
        _compact[(n_programs,)](flat, bound, counts, ends, found, len(flat), _COMPACTED)
    return found


def orthogonalise_rows(values: Float[Tensor, "n d"], directions: Float[Tensor, "n d"]) -> None:
    """Takes from each row of `values`, in place, what is parallel to its row of `directions`, which has unit norm."""
    n, d = values.shape
    with torch.cuda.device_of(values):
        _orthogonalise[(n,)](values, directions, d, triton.next_power_of_2(d))


def adam_rows(
    parameter: Float[Tensor, "n d"],
    exp_avg: Float[Tensor, "n d"],
    exp_avg_sq: Float[Tensor, "n d"],
    gradient: Float[Tensor, "n d"],
    scalars: Float[Tensor, " 4"],
    unit_rows: bool,
) -> None:
    """A step of Adam in place.

    Args:
        scalars: `adam_scalars` of the step, a factor for the gradient, and whether to take the step: 1 or 0.
        unit_rows: divide each row of the parameter by its norm afterwards.
    """
    n, d = parameter.shape
    with torch.cuda.device_of(parameter):
        _adam_rows[(n,)](parameter, exp_avg, exp_avg_sq, gradient, scalars, d, triton.next_power_of_2(d), unit_rows)


@triton.jit
def _bag_sums(indices, offsets, weights, table, sums, d, WIDTH: tl.constexpr, ENTRIES: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    start, end = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    total = tl.zeros((WIDTH,), dtype=table.dtype.element_ty)
    for first in range(start, end, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        there = entries < end
        index = tl.load(indices + entries, mask=there, other=0)
        weight = tl.load(weights + entries, mask=there, other=0.0)
        inside = there[:, None] & (columns < d)[None, :]
        part = tl.load(table + index[:, None] * d + columns[None, :], mask=inside, other=0.0)
        total += tl.sum(weight[:, None] * part, axis=0)
    tl.store(sums + bag * d + columns, total, mask=columns < d)


@triton.jit
def _dots(rows, latents, left, right, products, n_rows, d, WIDTH: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    row = tl.load(rows + entry)
    inside = columns < tl.where(row < n_rows, d, 0)
    x = tl.load(left + row * d + columns, mask=inside, other=0.0)
    y = tl.load(right + tl.load(latents + entry) * d + columns, mask=inside, other=0.0)
    tl.store(products + entry, tl.sum(x * y, axis=0))


@triton.jit
def _count(flat, bound, counts, n, SIZE: tl.constexpr):
    program = tl.program_id(0)
    places = program.to(tl.int64) * SIZE + tl.arange(0, SIZE)
    values = tl.load(flat + places, mask=places < n, other=float("-inf"))
    tl.store(counts + program, tl.sum((values >= bound).to(tl.int32), axis=0))


@triton.jit
def _compact(flat, bound, counts, ends, found, n, SIZE: tl.constexpr):
    program = tl.program_id(0)
    here = tl.load(counts + program)
    if here > 0:
        places = program.to(tl.int64) * SIZE + tl.arange(0, SIZE)
        wanted = tl.load(flat + places, mask=places < n, other=float("-inf")) >= bound
        slots = tl.load(ends + program) - here + tl.cumsum(wanted.to(tl.int32), axis=0) - 1
        tl.store(found + slots, places, mask=wanted)


@triton.jit
def _orthogonalise(values, directions, d, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < d
    value = tl.load(values + row * d + columns, mask=inside, other=0.0)
    direction = tl.load(directions + row * d + columns, mask=inside, other=0.0)
    parallel = tl.sum(value * direction, axis=0)
    tl.store(values + row * d + columns, value - parallel * direction, mask=inside)


@triton.jit
def _adam_rows(parameter, exp_avg, exp_avg_sq, gradients, scalars, d, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    step_size, root_bias2 = tl.load(scalars), tl.load(scalars + 1)
    factor, taken = tl.load(scalars + 2), tl.load(scalars + 3)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < tl.where(taken > 0, d, 0)
    gradient = factor * tl.load(gradients + row * d + columns, mask=inside, other=0.0)
    mean = tl.load(exp_avg + row * d + columns, mask=inside, other=0.0)
    square = tl.load(exp_avg_sq + row * d + columns, mask=inside, other=0.0)
    weight = tl.load(parameter + row * d + columns, mask=inside, other=0.0)
    mean += 0.1 * (gradient - mean)
    square = 0.999 * square + 0.001 * gradient * gradient
    weight -= step_size * mean / (tl.sqrt(square) / root_bias2 + 1e-8)
    if UNIT:
        norm = tl.sqrt(tl.sum(weight * weight, axis=0))
        weight /= tl.maximum(norm, 1.1754943508222875e-38)
    tl.store(exp_avg + row * d + columns, mean, mask=inside)
    tl.store(exp_avg_sq + row * d + columns, square, mask=inside)
    tl.store(parameter + row * d + columns, weight, mask=inside)
