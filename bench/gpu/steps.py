"""Inside a training step: how often the host waits for the device, how many kernels run, and which take the time."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu.timing import in_a_row, wait
from bench.gpu.training import Steps, make_data, make_trainer
from bench.record import Table

if TYPE_CHECKING:
    from bench.gpu.sizes import Sizes

PROFILED = 5
ARCHITECTURES = ("batch_topk", "matryoshka_batch_topk", "topk")


def tables(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    data = make_data(sizes, device)
    rows, longest, waits = [], Counter(), Counter()
    for d_sae in (sizes.widths[0], sizes.widths[-1]):
        for architecture in ARCHITECTURES:
            for half_dead in (False, True):
                trainer = make_trainer(sizes, architecture, d_sae, "bfloat16", device)
                step = Steps(trainer, data, half_dead)
                ms = in_a_row(device, step, 2 * PROFILED, sizes.warmup)
                places = host_waits(step) if device.type == "cuda" else Counter()
                n_kernels, kernels = busy_kernels(step, device)
                rows.append(
                    [f"{architecture}{', half dead' * half_dead}", d_sae, places.total(), n_kernels,
                     f"{kernels.total():.2f}", f"{ms:.2f}"]
                )  # fmt: skip
                if d_sae == sizes.d_sae and architecture == "batch_topk":
                    (longest, waits) = (kernels, places) if not half_dead else (longest, waits)
                yield Table(
                    title=f"Inside a step, bfloat16 product, batch {sizes.batch}",
                    columns=["step of", "latents", "times the host waits", "kernels", "ms of kernels", "ms"],
                    rows=rows,
                )
    yield Table(
        title=f"The longest kernels of a batch_topk step with {sizes.d_sae} latents",
        columns=["kernel", "ms per step"],
        rows=[[name, f"{taken:.3f}"] for name, taken in longest.most_common(15)],
    )
    yield Table(
        title="Where the host waits in that step",
        columns=["line", "times"],
        rows=[[place, times] for place, times in waits.most_common()],
    )


def host_waits(step: Steps) -> Counter[str]:
    """How often each line made the host wait for the device in one step, as far as torch notices."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    package = Path(__file__).parents[2]
    return Counter(
        f"{Path(one.filename).relative_to(package)}:{one.lineno}"
        if Path(one.filename).is_relative_to(package)
        else f"{Path(one.filename).name}:{one.lineno}"
        for one in caught
        if "synchroniz" in str(one.message)
    )


def busy_kernels(step: Steps, device: torch.device) -> tuple[int, Counter[str]]:
    """Number of kernels per step, and milliseconds per step by kernel."""
    activities = [ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED):
            step()
        wait(device)
    on_device: Any = [one for one in profiler.key_averages() if one.device_type.name == "CUDA"]
    taken: Counter[Any] = Counter()
    for one in on_device:
        taken[one.key[:80]] += one.self_device_time_total / 1000 / PROFILED
    return round(sum(one.count for one in on_device) / PROFILED), taken
