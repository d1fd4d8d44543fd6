"""From stored tokens to image-level codes: the activation store, the stream from it, encoding and pooling."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import sae_ray.sae.model
from bench.gpu.in_turn import in_turn
from bench.gpu.models import info_of, make_sae
from bench.gpu.sizes import Sizes
from bench.gpu.timing import milliseconds, wait
from bench.record import Table
from sae_ray.sae import SAE
from sae_ray.sae.sparse import SparseCodes
from sae_ray.scores.scoring import image_blocks, read_block
from sae_ray.scores.statistics import pool_codes, pool_tokens
from sae_ray.store.activations import ROW_GROUP_BYTES, ActivationStore, finish_store, write_part
from sae_ray.store.casting import stored_rows
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step
from sae_ray.store.stream import TrainingStream

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

STORED_SHARE = 8
"""A stored part has an eighth of the scored images: all of them would take too long to write."""
CHUNK_ROWS = 28 * 577
"""Of a larger chunk: whole images of 577 tokens, about 16 thousand rows."""
STREAMED_BATCHES = 200


def stored(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    """One part of all tokens, written to this machine's disk and read again (from the page cache)."""
    image, activation = _rows(sizes, sizes.scored // STORED_SHARE or 1)
    token = (np.arange(len(image)) % _tokens(sizes)).astype(np.int16)
    n_images = int(image[-1]) + 1
    megabytes = activation.nbytes / 2e6
    table = Table(
        title=f"A part of all {_tokens(sizes)} tokens of {n_images} images, {megabytes:.0f} MB of float16, one writer",
        columns=["format", "write, MB/s", "write, images/s", "read, MB/s", "size, MB"],
        rows=[],
    )

    def row(what: str, write: Callable[[], Any], read: Callable[[], Any] | None, file: Callable[[], Path]) -> Table:
        seconds = _seconds(write)
        cells = [what, round(megabytes / seconds), round(n_images / seconds), "", ""]
        if read is not None:
            cells[3:] = [round(megabytes / _seconds(read)), round(file().stat().st_size / 1e6, 1)]
        table["rows"].append(cells)
        return table

    with tempfile.TemporaryDirectory() as scratch:
        folder = Folder(scratch)
        made = stored_rows(image, token, activation, "float16")
        yield row(
            "checks and cast from float32, on the CPU (stored_rows)",
            lambda: stored_rows(image, token, activation, "float16"),
            None,
            Path,
        )
        written = []
        yield row(
            "parquet as the product writes it: zstd, vectors without dictionary and statistics",
            lambda: written.append(write_part(folder, 0, made, [])),
            lambda: _vectors(folder.read_parquet(written[0].file)),
            lambda: Path(scratch) / written[0].file,
        )
        path = Path(scratch) / "other.parquet"
        group = ROW_GROUP_BYTES // (2 * sizes.d_in)
        without: dict[str, dict[str, Any]] = {
            "parquet as pyarrow writes it by default, with zstd": {"compression": "zstd"},
            "parquet without dictionary": {"use_dictionary": False, "compression": "zstd"},
            "parquet without dictionary, statistics and compression": {
                "use_dictionary": False, "write_statistics": False, "compression": "none",
            },
        }  # fmt: skip
        for what, options in without.items():
            yield row(
                what,
                lambda options=options: pq.write_table(made.table(), path, row_group_size=group, **options),
                lambda: _vectors(folder.read_parquet(path.name)),
                lambda: path,
            )
        yield row(
            "Arrow IPC, not compressed", lambda: _write_ipc(made.table(), path), lambda: _read_ipc(path), lambda: path
        )


def streamed(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    """Batches of training from a store of two parts."""
    with tempfile.TemporaryDirectory() as scratch:
        store = _store(Folder(scratch), sizes, parts=2)
        table = Table(
            title=f"TrainingStream from a store of {store.n_rows:,} rows in 2 parts, batches of {sizes.batch} rows",
            columns=["store", "rows/s"],
            rows=[],
        )
        fits = _batches(store, sizes, store.n_rows, device)
        seconds = _seconds(lambda: next(fits), device)
        table["rows"].append(
            ["fits into shuffle_rows: all rows read, until the first batch", _rate(store.n_rows, seconds)]
        )
        yield table
        seconds = _seconds(lambda: [next(fits) for _ in range(STREAMED_BATCHES)], device)
        table["rows"].append(
            ["fits into shuffle_rows: further batches", _rate(STREAMED_BATCHES * sizes.batch, seconds)]
        )
        yield table
        fits.close()
        larger = _batches(store, sizes, store.n_rows - 1, device)
        count = max(1, store.n_rows // sizes.batch)
        seconds = _seconds(lambda: [next(larger) for _ in range(count)], device)
        what = "larger than shuffle_rows: one epoch, each window read when it is due"
        table["rows"].append([what, _rate(count * sizes.batch, seconds)])
        yield table
        larger.close()


def encoded(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    """Sparse codes of all tokens of a part, in small and in large chunks; and their pooling over the tokens."""
    x = _random_rows(sizes.scored * _tokens(sizes), sizes.d_in, device)
    sae = make_sae(x, sizes.d_sae, sizes.k)
    table = Table(
        title=f"Codes of {sizes.scored} images × {_tokens(sizes)} tokens, SAE of {sizes.d_sae:,} latents, float32",
        columns=["what", "ms", "images/s", "entries"],
        rows=[],
    )

    def row(what: str, ms: float, entries: int) -> Table:
        table["rows"].append([what, round(ms, 1), round(1000 * sizes.scored / ms), entries])
        return table

    rows, exact = sae_ray.sae.model._ROWS_ON_GPU, replace(sae, k=None)
    sae.encode_sparse(x[: 8 * rows])
    codes, ms = _timed(lambda: sae.encode_sparse(x), device)
    yield row("encode_sparse as it is: a product in bfloat16 screens, float32 decides", ms, len(codes.values))
    exact.encode_sparse(x[: 8 * rows])
    whole, ms = _timed(lambda: exact.encode_sparse(x), device)
    what = f"by products in float32 of {rows} rows; compared with the first row: {_differing(whole, codes)}"
    yield row(what, ms, len(whole.values))
    _, ms = _timed(lambda: _by_unlike_chunks(exact, x, rows), device)
    yield row("the same, the host waits for each product, and the last one has fewer rows", ms, len(whole.values))
    with _chunks_of(CHUNK_ROWS, sizes):
        exact.encode_sparse(x[: 2 * CHUNK_ROWS])
        larger, ms = _timed(lambda: exact.encode_sparse(x), device)
        yield row(f"encode_sparse in chunks of {CHUNK_ROWS:,} rows", ms, len(larger.values))
        torch.set_float32_matmul_precision("high")
        try:
            exact.encode_sparse(x[: 2 * CHUNK_ROWS])
            rough, ms = _timed(lambda: exact.encode_sparse(x), device)
        finally:
            torch.set_float32_matmul_precision("highest")
        yield row(f"the same with products in TF32; {_differing(larger, rough)}", ms, len(rough.values))

    image = np.repeat(np.arange(sizes.scored), _tokens(sizes))
    host, ms = _timed(lambda: [one.cpu().numpy() for one in (codes.rows, codes.latents, codes.values)], device)
    yield row("codes copied to the host", ms, len(host[0]))
    entries, ms = _timed(lambda: pool_tokens(image, *host), device)
    yield row("pool_tokens on one core", ms, len(entries.value))
    pool_codes(image, codes)
    pooled, ms = _timed(lambda: pool_codes(image, codes), device)
    same = all(np.array_equal(one, other) for one, other in zip(pooled, entries, strict=True))
    what = f"pooled on the GPU and copied to the host (pool_codes); {'' if same else 'not '}the same bits"
    yield row(what, ms, len(pooled.value))


def blocks(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    """What a scoring task does with one stored part, without a judge."""
    with tempfile.TemporaryDirectory() as scratch:
        store = _store(Folder(scratch), sizes, parts=1)
        x = torch.from_numpy(store.read(0)[2].astype(np.float32)).to(device)
        sae = make_sae(x, sizes.d_sae, sizes.k)
        sae.encode_sparse(x)
        table = Table(
            title=f"Scoring {store.n_images} images, all tokens, {sizes.d_sae:,} latents: the work of one task",
            columns=["work", "ms", "images/s"],
            rows=[],
        )

        def row(what: str, ms: float) -> Table:
            table["rows"].append([what, round(ms), round(1000 * store.n_images / ms)])
            return table

        found, ms = _timed(lambda: store.read(0), device)
        yield row("read the part", ms)
        _, ms = _timed(lambda: torch.tensor(found[2]).to(device).float(), device)
        yield row("copied to the GPU and cast to float32", ms)
        _, ms = _timed(lambda: sae.encode_sparse(x), device)
        yield row("encoded", ms)
        _, ms = _timed(lambda: read_block([sae], store, None, image_blocks(store)[0]), device)
        yield row("all of read_block: the above, then pooled, sorted and cut by ranges of neurons", ms)


def bits(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    """Whether the codes of a row depend on the run, or on the rows around it."""
    n_rows = (sizes.scored // STORED_SHARE or 1) * _tokens(sizes)
    x = _random_rows(n_rows, sizes.d_in, device)
    sae = make_sae(x, sizes.d_sae, sizes.k)
    rows, exact = sae_ray.sae.model._ROWS_ON_GPU, replace(sae, k=None)
    ways = {
        "as it is: screened": sae.encode_sparse,
        f"products of {rows} rows": exact.encode_sparse,
        f"products of {rows} rows, the last one of fewer": lambda some: _by_unlike_chunks(exact, some, rows),
    }
    third = n_rows // 3
    parts = {
        "the same rows twice": slice(0, n_rows),
        "the first third alone": slice(0, third),
        "the middle third alone, of which chunks start elsewhere": slice(third, 2 * third),
    }
    wholes = {way: encode(x) for way, encode in ways.items()}
    yield Table(
        title=f"Codes of {n_rows:,} rows, {sizes.d_sae:,} latents: the same bits?",
        columns=["compared", *ways],
        rows=[
            [what, *(_differing(_only(wholes[way], part), encode(x[part])) for way, encode in ways.items())]
            for what, part in parts.items()
        ],
    )


def products(sizes: Sizes, device: torch.device) -> Iterator[Table]:
    """The score's weighted embeddings as one dense product, as a prototype might form them."""
    images, judge = (4096, 768) if device.type == "cuda" else (64, 16)
    values = torch.rand(sizes.d_sae, images, device=device, dtype=torch.float64)
    unit = torch.rand(images, judge, device=device, dtype=torch.float64)
    ms = milliseconds(device, lambda: values @ unit, 5)
    rate = 2 * sizes.d_sae * images * judge / ms / 1e9
    yield Table(
        title="float64 product of image-level codes and judge embeddings",
        columns=["shapes", "ms", "TFLOP/s"],
        rows=[[f"[{sizes.d_sae} × {images}] · [{images} × {judge}]", round(ms, 2), round(rate, 2)]],
    )


def _tokens(sizes: Sizes) -> int:
    return info_of(sizes, "clip").n_tokens


def _random_rows(n: int, d: int, device: torch.device) -> Float[Tensor, "n d"]:
    return torch.randn(n, d, device=device, generator=torch.Generator(device).manual_seed(0))


def _rows(sizes: Sizes, n_images: int, seed: int = 0) -> tuple[Int[np.ndarray, " rows"], Float[np.ndarray, "rows d"]]:
    """The image of each row, ascending, and float32 rows."""
    image = np.repeat(np.arange(n_images), _tokens(sizes))
    return image, np.random.default_rng(seed).standard_normal((len(image), sizes.d_in), np.float32)


def _store(root: Folder, sizes: Sizes, parts: int) -> ActivationStore:
    n_images = sizes.scored // STORED_SHARE or 1
    step = Step(root, "extract", "bench", {"store_dtype": "float16", "images_per_part": n_images})
    written = []
    for number in range(parts):
        image, activation = _rows(sizes, n_images, seed=number)
        token = np.arange(len(image)) % _tokens(sizes)
        rows = stored_rows(number * n_images + image, token, activation, "float16")
        written.append(write_part(step.folder, number, rows, []))
    finish_store(step, written, sizes.d_in, 0.0)
    return ActivationStore(step.folder)


def _batches(
    store: ActivationStore, sizes: Sizes, shuffle_rows: int, device: torch.device
) -> Generator[Float[Tensor, "batch d"]]:
    stream = TrainingStream(store, sizes.batch, seed=0, shuffle_rows=shuffle_rows, device=device)
    return cast("Generator[Tensor]", stream.batches())  # closing it ends its reader


def _vectors(table: pa.Table) -> np.ndarray:
    return table["activation"].combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _write_ipc(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _read_ipc(path: Path) -> np.ndarray:
    with pa.OSFile(str(path), "rb") as source:
        return _vectors(pa.ipc.open_file(source).read_all())


def _by_unlike_chunks(sae: SAE, x: Float[Tensor, "n d_in"], rows: int) -> SparseCodes:
    """As a CPU encodes: chunks of so many rows but for the last one, and a wait after each."""
    found = [sae._active(sae._pre(chunk)) for chunk in x.split(rows)]
    flat = torch.cat([flat + start * rows * sae.d_sae for start, (flat, _) in enumerate(found)])
    values = torch.cat([values for _, values in found])
    return SparseCodes(flat // sae.d_sae, flat % sae.d_sae, values, len(x), sae.d_sae)


def _only(codes: SparseCodes, rows: slice) -> SparseCodes:
    """The entries of some rows, which are counted from the first of them."""
    kept = (codes.rows >= rows.start) & (codes.rows < rows.stop)
    n_rows = rows.stop - rows.start
    return SparseCodes(codes.rows[kept] - rows.start, codes.latents[kept], codes.values[kept], n_rows, codes.d_sae)


def _differing(one: SparseCodes, other: SparseCodes) -> str:
    """How many entries are not in both with the same bits."""
    keys = [codes.rows * codes.d_sae + codes.latents for codes in (one, other)]
    places = torch.searchsorted(keys[1], keys[0]).clamp(max=max(0, len(keys[1]) - 1))
    found = keys[1][places] == keys[0]
    equal = found & (other.values[places] == one.values)
    if bool(equal.all()) and len(keys[0]) == len(keys[1]):
        return "yes"
    n = len(keys[0])
    return f"no: {n - int(equal.sum()):,} of {n:,} entries differ, {n - int(found.sum()):,} by not being active"


def _chunks_of(rows: int, sizes: Sizes) -> Any:
    """While it lasts, `encode_sparse` takes chunks of so many rows on a GPU."""
    return patch.multiple(sae_ray.sae.model, _ROWS_ON_GPU=rows, _PRE_ENTRIES_ON_GPU=rows * sizes.d_sae)


def _timed(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Result and milliseconds of one call."""
    wait(device)
    began = time.perf_counter()
    result = run()
    wait(device)
    return result, 1000 * (time.perf_counter() - began)


def _seconds(run: Callable[[], Any], device: torch.device | None = None) -> float:
    return _timed(run, device or torch.device("cpu"))[1] / 1000


def _rate(rows: int, seconds: float) -> int:
    return round(rows / seconds)


tables = in_turn(encoded, bits, products, stored, streamed, blocks)
