"""SAEs trained on vectors from anywhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

import sae_ray
from sae_ray.errors import SaeRayError, UsageError
from sae_ray.sae import BundleJob, Cell, CellJob, StepMetrics, TrainingConfig, load_sae, train_cells, train_sae
from sae_ray.sae.fitting import TrainedSAE
from sae_ray.store.activations import ActivationStore
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step, hold
from sae_ray.store.vectors import ROWS_PER_PART, Vectors, write_vectors

SMALL = {"expansion": 4, "k": 2, "steps": 60, "batch_size": 32, "learning_rate": 3e-3, "progress": False}


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    """Sums of two of 16 directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(16, 8, generator=generator), dim=1)
    places = torch.rand(300, 16, generator=generator).topk(2).indices
    codes = torch.zeros(300, 16).scatter(1, places, 1 + torch.rand(300, 2, generator=generator))
    return codes @ directions


def weights(sae: sae_ray.sae.SAE) -> list[torch.Tensor | None]:
    return [sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, sae.threshold]


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.fixture(scope="module")
def trained(x: torch.Tensor) -> TrainedSAE:
    return train_sae(x, **SMALL)


def sources(x: torch.Tensor, directory: Path) -> dict[str, tuple[Any, str | None]]:
    import datasets

    np.save(directory / "x.npy", x.numpy())
    lists = pa.array(x.tolist(), pa.list_(pa.float32()))
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(x.numpy().reshape(-1)), 8)
    table = pa.table({"name": pa.array(map(str, range(len(x)))), "vector": fixed})
    pq.write_table(table, directory / "x.parquet")
    pq.write_table(pa.table({"vector": lists}), directory / "lists.parquet")
    save_file({"x": x, "y": x + 1}, directory / "x.safetensors")
    dataset = datasets.Dataset.from_dict({"label": list(range(len(x))), "vector": x.tolist()})
    frame = pd.DataFrame({"name": range(len(x)), "vector": list(x.numpy())}, index=np.linspace(0, 1, len(x)))
    polar = polars.DataFrame({"name": range(len(x)), "vector": x.tolist()})
    parts = directory / "parts"
    (parts / ".ipynb_checkpoints").mkdir(parents=True)
    (parts / ".ipynb_checkpoints" / "a.parquet").write_text("no parquet")
    (parts / "notes.txt").write_text("notes")
    for name, some in (("a", lists[:100]), ("b", lists[100:])):
        pq.write_table(pa.table({"vector": some}), parts / f"{name}.parquet")
    return {
        "data frame": (frame, "vector"),
        "column of a data frame": (frame["vector"], None),
        "data frame of numbers": (pd.DataFrame(x.numpy(), index=frame.index), None),
        "polars": (polar, "vector"),
        "column of polars": (polar["vector"], None),
        "numbers of polars": (polars.DataFrame(x.numpy()), None),
        "arrow array": (fixed, None),
        "arrow tensors": (pa.table({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(x.numpy())}), None),
        "folder": (parts, None),
        "home": ("~/x.npy", None),
        "array": (x.numpy(), None),
        "float64": (x.double().numpy(), None),
        "lists": (x.tolist(), None),
        "transposed": (x.T.contiguous().T, None),
        "requires_grad": (x.clone().requires_grad_(), None),
        "npy": (directory / "x.npy", None),
        "npy by name": (str(directory / "x.npy"), None),
        "parquet": (directory / "x.parquet", "vector"),
        "parquet of lists": (directory / "lists.parquet", None),
        "table": (table, "vector"),
        "column of a table": (table["vector"], None),
        "safetensors": (directory / "x.safetensors", "x"),
        "dataset": (dataset, "vector"),
        "column of a dataset": (dataset["vector"], None),
    }


def test_any_source_gives_the_same_sae(x: torch.Tensor, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = sources(x, tmp_path)
    for name, (source, column) in given.items():
        vectors = Vectors(source, column)
        assert (vectors.n, vectors.d, vectors.dtype) == (300, 8, "float32"), name
        assert np.array_equal(np.concatenate(list(vectors.blocks(70))), x.numpy()), name
    source, column = given["dataset"]
    assert same(train_sae(source, column=column, **SMALL), train_sae(x.numpy(), **SMALL))


def test_half_precision_stays_as_it_is(x: torch.Tensor, tmp_path: Path):
    step = write_vectors(Vectors(x.half()), Folder(tmp_path), "activations")
    assert step.config["store_dtype"] == "float16"
    bfloat16 = x.bfloat16()
    assert np.array_equal(next(Vectors(bfloat16).blocks()), bfloat16.float().numpy())


def test_it_is_the_sae_of_a_bundle(x: torch.Tensor, trained: TrainedSAE, tmp_path: Path):
    """Written and trained as the job does."""
    root = Folder(tmp_path)
    config = TrainingConfig(steps=60, batch_size=32, learning_rate=3e-3, dead_after_samples=192)
    cell = Cell("batch_topk", 4, 2, training=config)
    step = Step(root, "train", "other", {})
    stored = write_vectors(Vectors(x), root, "activations")
    with hold([step]):
        train_cells(BundleJob(stored.folder, (CellJob(step, cell),), 0, 10_000, 25))
    assert same(load_sae(step.folder), trained)
    assert step.folder.read_parquet("metrics.parquet").equals(trained.history)


def test_it_learns(x: torch.Tensor):
    sae = train_sae(x, **SMALL | {"steps": 400, "learning_rate": 1e-2})
    assert sae_ray.evaluate(sae, [x]).summary().r2 > 0.9
    assert sae.encode(x).shape == (300, 32)
    assert sae.decode(sae.encode_sparse(x)).shape == x.shape


def test_a_callback_hears_what_the_history_keeps(x: torch.Tensor, monkeypatch):
    monkeypatch.setattr("sae_ray.sae.history._ROWS", 20)
    heard: list[StepMetrics] = []
    sae = train_sae(x, **SMALL, callback=heard.append)
    assert [one.step for one in heard] == [*range(2, 60, 3)]
    assert sae.history["step"].to_pylist() == [one.step for one in heard]
    assert sae.history["loss"].to_pylist() == pytest.approx([one.loss for one in heard])
    assert sae.history["threshold"].null_count > 0


def test_an_interrupted_training_resumes(x: torch.Tensor, trained: TrainedSAE, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("sae_ray.sae.fitting.CHECKPOINT_SECONDS", 0.0)

    def interrupt(metrics: StepMetrics) -> None:
        if metrics.step == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sae(x, **SMALL, directory=tmp_path, callback=interrupt)
    heard: list[int] = []
    again = train_sae(x, **SMALL, directory=tmp_path, callback=lambda metrics: heard.append(metrics.step))
    assert heard == [*range(40, 60)]
    assert same(again, trained)
    assert again.history.equals(trained.history)
    train_sae(x, **SMALL, directory=tmp_path, callback=lambda metrics: pytest.fail("it was finished"))
    other = train_sae(x + 1, **SMALL, directory=tmp_path)
    assert not same(other, trained)


def test_what_is_saved_can_be_loaded(x: torch.Tensor, trained: TrainedSAE, tmp_path: Path):
    trained.save(tmp_path / "sae")
    loaded = load_sae(tmp_path / "sae")
    assert same(loaded, trained)
    assert torch.equal(loaded.encode(x), trained.encode(x))
    names = sorted(file.name for file in (tmp_path / "sae").iterdir())
    assert names == ["cfg.json", "latents.parquet", "metrics.parquet", "sae_weights.safetensors"]
    loaded.save(tmp_path / "again")
    assert same(load_sae(tmp_path / "again"), trained)


def test_the_plot_shows_the_history(trained: TrainedSAE):
    figure = trained.plot()
    assert figure._repr_png_().startswith(b"\x89PNG"), "a notebook shows it"
    axes = figure.axes
    assert [one.get_title() for one in axes] == ["Reconstruction loss", "L0", "Dead latents"]
    assert axes[0].lines[0].get_ydata().tolist() == trained.history["reconstruction_loss"].to_pylist()


def test_many_rows_are_many_parts(tmp_path: Path):
    rows = np.arange(2 * ROWS_PER_PART + 5, dtype=np.float32).reshape(-1, 1)
    step = write_vectors(Vectors(rows), Folder(tmp_path), "activations")
    store = ActivationStore(step.folder)
    read = [store.read(number) for number in store.parts]
    assert len(read) == 3
    assert np.array_equal(np.concatenate([vectors for *_, vectors in read]), rows)
    assert np.array_equal(np.concatenate([index for index, *_ in read]), np.arange(len(rows)))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (torch.zeros(0, 4), {}, "has no rows"),
        (torch.zeros(4), {}, r"has shape \[4\]; give \[n, d\]"),
        (torch.zeros(4, 2, 3), {}, r"has shape \[4, 2, 3\]; give \[n, d\], for example x.reshape"),
        (torch.tensor(1.0), {}, "has no rows"),
        (torch.zeros(4, 3, dtype=torch.complex64), {}, "holds complex64; give real numbers"),
        (np.array([["a", "b"]]), {}, "give real numbers"),
        (3, {}, "cannot read vectors from int"),
        ("nowhere.npy", {}, "there is no file nowhere.npy"),
        (__file__, {}, "is not a .npy, .parquet or .safetensors file"),
        ("", {}, "'' is no file"),
        ("~nobody-at-all/x.npy", {}, "is no path here .*; write the folder out"),
        ("s3://bucket/x.npy", {}, "is not on this machine; copy it here"),
        (torch.eye(4).to_sparse(), {}, "is a tensor of layout torch.sparse_coo; give a dense one"),
        (torch.ones(4, 3, device="meta"), {}, "is a tensor without values"),
        (pd.DataFrame({"a": ["x"], "b": [1.0]}), {}, "has several columns; choose one as column .*: a, b"),
        (torch.ones(4, 3), {"column": "x"}, "column = 'x', but Tensor has no columns"),
        (pa.table({"a": [1.0], "b": [2.0]}), {}, r"several columns; choose one as column \(--column\), or .*: a, b"),
        (pa.table({"a": [1.0], "b": [2.0]}), {"column": "c"}, "has no column 'c'; choose one as column"),
        (torch.ones(4, 3), {"architecture": "batchtopk"}, "did you mean 'batch_topk'"),
        (torch.ones(4, 3), {"architecture": "guided_topk"}, "guided SAEs learn labels"),
        (torch.ones(4, 3), {"lr": 1e-3}, "train_sae has no setting 'lr'; known: .*learning_rate"),
        (torch.ones(4, 3), {"d_sae": 12}, "train_sae has no setting 'd_sae'; known: architecture, expansion, .*steps"),
        (torch.ones(4, 3), {"settings": 3}, "settings = 3: give those of batch_topk by name"),
        (torch.ones(4, 3), {"k": 2.5}, "k = 2.5: Input should be a valid integer"),
        (torch.ones(4, 3), {"k": True}, "k = True: give a number"),
        (torch.ones(4, 3), {"learning_rate": np.True_}, "learning_rate = True: give a number"),
        (torch.ones(4, 3), {"seed": "a"}, "seed = 'a': Input should be a valid integer"),
        (torch.ones(4, 3), {"steps": 2.5}, "steps = 2.5: Input should be a valid integer"),
        (torch.ones(4, 3), {"learning_rate": "fast"}, "learning_rate = 'fast': Input should be a valid number"),
        (torch.ones(4, 3), {"expansion": "wide"}, "expansion = 'wide': make it a number above 0"),
        (torch.ones(4, 3), {"device": "gpu"}, "device is 'gpu', which this machine does not offer"),
        (torch.ones(4, 3), {"callback": 3}, "callback = 3: give a function"),
        (torch.ones(4, 3), {"directory": ""}, "'' names no folder"),
        (torch.ones(4, 3), {"settings": {"levels": 2}}, "settings of batch_topk has no setting 'levels'"),
        (torch.ones(4, 3), {"k": 200}, "k = 200: make it at most d_sae = 24"),
        (torch.ones(4, 3), {"steps": 0}, "training.steps = 0: make it at least 1"),
        (torch.ones(4, 3), {"init": "elsewhere"}, "start from an SAE in a study"),
    ],
)  # fmt: skip
def test_bad_input_is_named(source, options, message):
    with pytest.raises(UsageError, match=message):
        train_sae(source, **options, progress=False)


def test_bad_values_are_named(x: torch.Tensor):
    bad = x.clone()
    bad[123, 4] = torch.nan
    with pytest.raises(SaeRayError, match="Tensor: row 123 is not finite as float32"):
        train_sae(bad, **SMALL)
    with pytest.raises(SaeRayError, match="all 300 activations of this site are 0"):
        train_sae(torch.zeros_like(x), **SMALL)
    ragged = pa.table({"x": pa.array([[1.0, 2.0], [3.0, 4.0, 5.0]])})
    with pytest.raises(SaeRayError, match="differ in width"):
        list(Vectors(ragged).blocks())
    for odd, why in (([3.0], r"shape \[1, 1\], not \[1, 2\]"), (["a", "b"], "it holds <U"), (None, "shape")):
        rows = [[1.0, 2.0], [5.0, 6.0], odd, [7.0, 8.0]]
        for source in (pd.Series(rows), rows):
            with pytest.raises(SaeRayError, match=rf": row 2 cannot be read \(.*{why}.*\); write it again"):
                list(Vectors(source).blocks())
    with pytest.raises(SaeRayError, match="has masked values, which are no numbers"):
        train_sae(np.ma.masked_greater(x.numpy(), 1), **SMALL)


def test_numbers_of_numpy_are_numbers(x: torch.Tensor, trained: TrainedSAE, tmp_path: Path):
    options = {name: np.array(value)[()] for name, value in SMALL.items() if name != "progress"}
    assert same(train_sae(x, **options, progress=False, directory=tmp_path), trained)
    train_sae(x, **SMALL, directory=tmp_path, callback=lambda metrics: pytest.fail("it is the same step"))


def test_a_folder_that_cannot_be_written_is_named(x: torch.Tensor, trained: TrainedSAE, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SaeRayError, match=r"file cannot be written .*; make room, or choose another folder"):
        trained.save(tmp_path / "file")
    with pytest.raises(SaeRayError, match=r"file/activations-.* cannot be written"):
        train_sae(x, **SMALL, directory=tmp_path / "file")


def test_it_is_shown_by_what_it_is(trained: TrainedSAE):
    assert repr(trained) == "TrainedSAE(batch_topk, d_in=8, d_sae=32, k=2, torch.float32 on cpu)"


def test_few_latents_have_a_k_of_their_own(x: torch.Tensor):
    assert train_sae(x, steps=20, batch_size=32, progress=False, expansion=1).k == 2
    assert train_sae(x, steps=20, batch_size=32, progress=False, architecture="relu", sparsity=0.1).k is None


def test_the_pages_examples_run(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "notebooks.md"
    scope: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(example, scope)
    assert scope["reconstruction"].shape == scope["x"].shape
