"""Measuring work on a GPU, which runs behind the calls that start it."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch


def milliseconds(device: torch.device, run: Callable[[], Any], rounds: int, warmup: int = 2) -> float:
    """The median of `rounds` calls, each from an idle device to an idle device."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(rounds):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        times.append(1000 * (time.perf_counter() - started))
    return median(times)


def in_a_row(device: torch.device, run: Callable[[], Any], calls: int, warmup: int = 2) -> float:
    """Mean milliseconds of calls that follow one another without waiting for the device in between."""
    for _ in range(warmup):
        run()
    wait(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    wait(device)
    return 1000 * (time.perf_counter() - started) / calls


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
