"""MonoSemanticity, statistics and top images from sparse codes: ours against the dense closed form and the double loop.

Codes are synthetic: a few latents fire on up to 30 % of the images and most of them rarely, k on average. What makes
codes (the encoder) is no part of what is timed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

from bench.record import record
from sae_ray.scores.scoring import joined
from sae_ray.scores.statistics import IMAGES_PER_BLOCK, BlockImages, Entries, NeuronStats, neuron_blocks, pool_tokens
from sae_ray.scores.tables import score_table, top_images_table

THREADS = 2
N, D_SAE, K = 50_000, 65_536, 20
JUDGE_WIDTH = 768
N_TOP = 16
MOST_FREQUENT = 0.3
IMAGES_PER_PART = 512
DENSE_LATENTS = 4096
"""Latents of which the dense form holds the codes of all images at once: 0.8 GB. All of them would take 13 GB."""
RUN_EVERY = 3
"""Chunks between two runs of ours."""
ROUNDS = 2
"""Rounds over all sizes, of which the fastest run of each counts."""
LOOP_IMAGES = 64
"""Images of the double loop, all pairs of which are timed; its time is scaled to all pairs."""
SIZES = (6_250, 12_500, 25_000, 50_000, 100_000)
WIDTHS = (8_192, 16_384, 32_768, 65_536, 131_072)
MEMORY_SIZES = (12_500, 50_000, 200_000)
TOLERANCE = 2e-5
"""Allowed difference of scores: the dense form computes in float32."""


class Part(NamedTuple):
    """Codes of one part of images as an SAE gives them, and the judge's embeddings."""

    row: np.ndarray
    latent: np.ndarray
    value: np.ndarray
    embeddings: np.ndarray


def main() -> None:
    torch.set_num_threads(THREADS)
    blocks = list(code_blocks(N, D_SAE))
    runs: list[tuple[float, dict[str, float]]] = []
    stats, _ = score(blocks, D_SAE)
    dense_seconds, differences = dense_form(blocks, stats, lambda: runs.append(timed(blocks)))
    seconds, spent = sorted(runs, key=lambda run: run[0])[len(runs) // 2]
    parts_seconds = [[name, round(value, 2)] for name, value in spent.items()]
    loop_seconds = double_loop(blocks[0])
    columns = ["way", "seconds", "times ours"]
    rows = [
        ["ours, from sparse codes", round(seconds, 2), 1.0],
        ["dense closed form, the same results", *ratio(sum(dense_seconds.values()), seconds)],
        ["dense closed form, the score alone", *ratio(dense_seconds["score"], seconds)],
        [f"double loop over pairs, scaled from {LOOP_IMAGES} images", *ratio(loop_seconds, seconds)],
    ]
    title = f"Score, statistics and {N_TOP} top images of {D_SAE:,} latents on {N:,} images, k {K}, judge {JUDGE_WIDTH}"
    by_n, slope_n = scaling([(n, D_SAE) for n in SIZES])
    by_width, slope_width = scaling([(N, width) for width in WIDTHS])
    memory = [[n, *measured_memory(n)] for n in MEMORY_SIZES]
    facts = {
        "threads": THREADS,
        "slope_of_time_against_images": round(slope_n, 3),
        "slope_of_time_against_latents": round(slope_width, 3),
        "dense_chunk_latents": DENSE_LATENTS,
        "double_loop_images": LOOP_IMAGES,
    }
    record(
        "scoring",
        [
            {"title": title, "columns": columns, "rows": rows},
            {"title": "Largest differences between ours and the dense form, which computes in float32",
             "columns": ["of", "difference"], "rows": [[name, f"{found:.0e}"] for name, found in differences.items()]},
            {"title": "Where the time goes", "columns": ["part", "seconds"], "rows": parts_seconds},
            {"title": f"CPU time against images, {D_SAE:,} latents: slope {slope_n:.2f} on log axes",
             "columns": ["images", "CPU seconds"], "rows": by_n},
            {"title": f"CPU time against latents, {N:,} images: slope {slope_width:.2f} on log axes",
             "columns": ["latents", "CPU seconds"], "rows": by_width},
            {"title": f"Memory that scoring {D_SAE:,} latents takes",
             "columns": ["images", "MB at the peak", "of which the statistics"], "rows": memory},
        ],
        facts,
    )  # fmt: skip
    assert sum(dense_seconds.values()) >= 20 * seconds, "less than 20 times the dense form"
    assert max(slope_n, slope_width) <= 1, "the cost grows faster than the work"


def code_blocks(n: int, d_sae: int) -> Iterator[list[Part]]:
    """Blocks of parts, each from its own seed: so those of fewer images are the first of those of more."""
    per_block = IMAGES_PER_BLOCK // IMAGES_PER_PART
    sizes = [min(IMAGES_PER_PART, n - start) for start in range(0, n, IMAGES_PER_PART)]
    for first in range(0, len(sizes), per_block):
        yield [
            synthetic_part(number, sizes[number], d_sae) for number in range(first, min(first + per_block, len(sizes)))
        ]


def synthetic_part(number: int, n: int, d_sae: int) -> Part:
    rng = np.random.default_rng([number, d_sae])
    rates = firing_rates(d_sae)
    # Independent firing: a Poisson number of draws, a latent drawn twice fires once.
    n_draws = rng.poisson(rates[-1], n)
    row = np.repeat(np.arange(n), n_draws)
    latent = np.searchsorted(rates, rng.uniform(0, rates[-1], len(row)), side="right")
    flat = np.unique(row * d_sae + latent)
    value = rng.exponential(size=len(flat)).astype(np.float32) + np.float32(0.1)
    return Part(flat // d_sae, flat % d_sae, value, rng.normal(size=(n, JUDGE_WIDTH)).astype(np.float32))


@cache
def firing_rates(d_sae: int) -> np.ndarray:
    """Cumulated rates: latent j fires on min(30 %, c / (j + 1)) of the images, c such that k fire on average."""
    inverse = 1 / np.arange(1, d_sae + 1)
    low, high = 0.0, float(K)
    for _ in range(60):
        scale = (low + high) / 2
        low, high = (scale, high) if np.minimum(MOST_FREQUENT, scale * inverse).sum() < K else (low, scale)
    frequency = np.minimum(MOST_FREQUENT, high * inverse)
    return np.cumsum(-np.log1p(-np.random.default_rng(0).permutation(frequency)))


def score(blocks: Iterator[list[Part]] | list[list[Part]], d_sae: int) -> tuple[list[NeuronStats], dict[str, float]]:
    """Everything after the encoder, as the scoring stage does it: one thread per range of neurons."""
    ranges = list(neuron_blocks(d_sae, JUDGE_WIDTH))
    stats = [NeuronStats(len(neurons), JUDGE_WIDTH, N_TOP) for neurons in ranges]
    spent = dict.fromkeys(("codes to sorted entries", "added to the statistics", "scores and tables"), 0.0)
    n_seen = 0
    with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for parts in blocks:
            begun = time.perf_counter()
            images, entries = entries_of(parts, n_seen)
            n_seen += len(images.image_index)
            sorted_at = time.perf_counter()
            list(pool.map(lambda one, neurons: one.add(entries.of_range(neurons), images), stats, ranges))  # noqa: B023
            spent["codes to sorted entries"] += sorted_at - begun
            spent["added to the statistics"] += time.perf_counter() - sorted_at
    begun = time.perf_counter()
    score_table(stats), top_images_table(stats)
    spent["scores and tables"] = time.perf_counter() - begun
    return stats, spent


def entries_of(parts: list[Part], first_image: int) -> tuple[BlockImages, Entries]:
    pooled, n = [], 0
    for part in parts:
        entries = pool_tokens(np.arange(len(part.embeddings)), part.row, part.latent, part.value)
        pooled.append(entries._replace(image=entries.image + n))
        n += len(part.embeddings)
    images = BlockImages.of(first_image + np.arange(n), np.concatenate([part.embeddings for part in parts]))
    return images, joined(pooled)


def timed(blocks: list[list[Part]]) -> tuple[float, dict[str, float]]:
    begun = time.perf_counter()
    _, spent = score(blocks, D_SAE)
    return time.perf_counter() - begun, spent


def dense_form(
    blocks: list[list[Part]], stats: list[NeuronStats], between: Callable[[], None]
) -> tuple[dict[str, float], dict[str, float]]:
    """The closed form on dense codes, latents in chunks; its seconds, and how far ours is from it.

    `between` is called every few chunks, where ours is timed: whatever else the machine does meets both alike. The
    seconds are those of the median chunk times their number.
    """
    unit = torch.from_numpy(np.concatenate([part.embeddings for parts in blocks for part in parts]))
    unit = torch.nn.functional.normalize(unit, dim=1)
    spent: dict[str, list[float]] = {"score": [], "statistics and top images": []}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ("ms", "mean", "firing", "top")}
    latents_of_all = [np.concatenate(column) for column in zip(*all_codes(blocks), strict=True)]
    chunks = range(0, D_SAE, DENSE_LATENTS)
    for first in chunks:
        codes = dense_chunk(*latents_of_all, first)
        begun = time.perf_counter()
        low, total = codes.amin(0), codes.sum(0)
        squares = codes.square().sum(0)
        shifted = codes.T @ unit - low[:, None] * unit.sum(0)
        sums = total - N * low
        moved = squares - 2 * low * total + N * low.square()
        found["ms"].append((shifted.square().sum(1) - moved) / (sums.square() - moved))
        scored = time.perf_counter()
        found["mean"].append(total / N)
        found["firing"].append((codes > 0).sum(0))
        found["top"].append(codes.topk(N_TOP, dim=0).values.T)
        spent["score"].append(scored - begun)
        spent["statistics and top images"].append(time.perf_counter() - scored)
        del codes
        if len(spent["score"]) % RUN_EVERY == 0:
            between()
    dense = {name: torch.cat(pieces).double().numpy() for name, pieces in found.items()}
    ms = np.concatenate([one.monosemanticity() for one in stats])
    alive = np.isfinite(ms)
    top = np.concatenate([one.top_value for one in stats])
    ours_top, dense_top = np.where(np.isfinite(top), top, 0), dense["top"]
    differences = {
        "ms": float(np.abs(ms - dense["ms"])[alive].max()),
        "mean": float(np.abs(np.concatenate([one.total for one in stats]) / N - dense["mean"]).max()),
        "firing": float(np.abs(np.concatenate([one.n_firing for one in stats]) - dense["firing"]).max()),
        "top values": float(np.abs(ours_top - dense_top).max()),
    }
    print("largest differences from the dense form:", differences)
    assert max(differences.values()) <= TOLERANCE, differences
    return {name: len(chunks) * median(values) for name, values in spent.items()}, differences


def all_codes(blocks: list[list[Part]]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    n = 0
    for part in (part for parts in blocks for part in parts):
        yield part.row + n, part.latent, part.value
        n += len(part.embeddings)


def dense_chunk(row: np.ndarray, latent: np.ndarray, value: np.ndarray, first: int) -> torch.Tensor:
    kept = (latent >= first) & (latent < first + DENSE_LATENTS)
    codes = torch.zeros(N, DENSE_LATENTS)
    codes[torch.from_numpy(row[kept]), torch.from_numpy(latent[kept] - first)] = torch.from_numpy(value[kept])
    return codes


def double_loop(parts: list[Part]) -> float:
    """Seconds of a loop over all pairs of images, all latents at a time, scaled from a few images."""
    codes = torch.zeros(LOOP_IMAGES, D_SAE)
    part = parts[0]
    kept = part.row < LOOP_IMAGES
    codes[torch.from_numpy(part.row[kept]), torch.from_numpy(part.latent[kept])] = torch.from_numpy(part.value[kept])
    unit = torch.nn.functional.normalize(torch.from_numpy(part.embeddings[:LOOP_IMAGES]), dim=1)
    weighted, weights = torch.zeros(D_SAE), torch.zeros(D_SAE)
    begun = time.perf_counter()
    for n in range(LOOP_IMAGES):
        for m in range(n + 1, LOOP_IMAGES):
            pair = codes[n] * codes[m]
            weighted += pair * (unit[n] @ unit[m])
            weights += pair
    pairs = LOOP_IMAGES * (LOOP_IMAGES - 1) / 2
    return (time.perf_counter() - begun) * (N * (N - 1) / 2) / pairs


def scaling(sizes: list[tuple[int, int]]) -> tuple[list[list], float]:
    """CPU seconds of every (images, latents), and their slope on log axes against the one that changes.

    CPU time of all threads: how the cost grows, whatever else the machine does.
    """
    changing = 0 if sizes[0][1] == sizes[-1][1] else 1
    fastest = dict.fromkeys(sizes, float("inf"))
    for _ in range(ROUNDS):
        for n, d_sae in sizes:
            blocks = list(code_blocks(n, d_sae))
            begun = time.process_time()
            score(blocks, d_sae)
            fastest[n, d_sae] = min(fastest[n, d_sae], time.process_time() - begun)
    rows = [[size[changing], round(seconds, 3)] for size, seconds in fastest.items()]
    x, y = np.log(np.array(rows)).T
    return rows, float(np.polyfit(x, y, 1)[0])


def measured_memory(n: int) -> list[float]:
    """Growth of the resident memory, in a process of its own that makes every block as it is needed."""
    code = f"from bench.scoring import grown; grown({n})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def grown(n: int) -> None:
    """Prints the growth at the peak in MB, and how much of it the statistics are."""
    torch.set_num_threads(1)
    score(code_blocks(IMAGES_PER_PART, 1024), 1024)  # libraries and their buffers
    before = peak_kilobytes()
    stats, _ = score(code_blocks(n, D_SAE), D_SAE)
    after = peak_kilobytes()
    held = sum(value.nbytes for one in stats for value in vars(one).values() if isinstance(value, np.ndarray))
    print(json.dumps([round((after - before) / 1024), round(held / 2**20)]))


def peak_kilobytes() -> int:
    """Of this program: what `getrusage` gives begins with the peak of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def ratio(seconds: float, ours: float) -> list[float]:
    return [round(seconds, 1), round(seconds / ours, 1)]


if __name__ == "__main__":
    main()
