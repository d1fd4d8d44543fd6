"""Training an SAE on vectors from anywhere, without a study: for notebooks and scripts."""

from __future__ import annotations

import dataclasses
import inspect
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sae_ray.encoders.base import placement
from sae_ray.errors import SaeRayError, UsageError, check
from sae_ray.sae.architectures import architecture as named_architecture
from sae_ray.sae.bundle import BundleJob, CellJob, train_cells
from sae_ray.sae.config import Cell, TrainingConfig
from sae_ray.sae.formats import LATENTS_FILE, load_sae, save_sae
from sae_ray.sae.history import HISTORY_FILE
from sae_ray.sae.model import SAE
from sae_ray.store.files import Folder, writing
from sae_ray.store.steps import Step, hold
from sae_ray.store.vectors import Vectors, write_vectors

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.figure import Figure

    from sae_ray.sae.bundle import CellReport
    from sae_ray.sae.training import StepMetrics

CHECKPOINT_SECONDS = 30.0
SHUFFLE_ROWS = 2**20
K = 20
MOST_DEAD_AFTER = 10_000_000


@dataclass(frozen=True, eq=False, repr=False)
class TrainedSAE(SAE):
    """An SAE that `train_sae` has trained, and how its training went."""

    history: pa.Table | None = None
    """Metrics of about 1,000 steps (`History.table`)."""
    latents: pa.Table | None = None
    """How each latent fires on the training activations: `frequency`, `mean_active`, `max_token`."""

    def save(self, directory: str | Path) -> None:
        """Writes the SAE as `SAE.save` does, and beside it `latents.parquet` and `metrics.parquet`."""
        folder = Folder(directory)
        with writing(folder):
            for name, table in ((LATENTS_FILE, self.latents), (HISTORY_FILE, self.history)):
                if table is not None:
                    folder.write_parquet(name, table)
            save_sae(self, folder)

    def plot(self) -> Figure:
        """Reconstruction loss, active latents per activation and dead latents over the steps of training."""
        from sae_ray.sae.shown_figure import ShownFigure

        if self.history is None:
            raise UsageError("history = None: only an SAE that train_sae has returned can be plotted")
        shown = (("reconstruction_loss", "Reconstruction loss"), ("l0", "L0"), ("n_dead", "Dead latents"))
        figure = ShownFigure(figsize=(11, 3), layout="constrained")
        for axes, (name, title) in zip(figure.subplots(1, len(shown)), shown, strict=True):
            axes.plot(self.history["step"].to_numpy(), self.history[name].to_numpy())
            axes.set(title=title, xlabel="Step")
        return figure


def train_sae(
    activations: Any,
    *,
    architecture: str = "batch_topk",
    expansion: float = 8,
    k: int | None = None,
    sparsity: float | None = None,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    steps: int = 2000,
    batch_size: int = 1024,
    column: str | None = None,
    directory: str | Path | None = None,
    device: str | None = None,
    progress: bool = True,
    callback: Callable[[StepMetrics], None] | None = None,
    **training: Any,
) -> TrainedSAE:
    """Trains an SAE on vectors by the code of a study's training, in this process.

    Args:
        activations: what `Vectors` takes: a [n, d] tensor or array, a file, a table, a Hugging Face dataset.
        architecture: any but the guided ones, whose labels a study gives.
        expansion: latents per dimension of the activations.
        k: active latents per activation, for architectures that are tuned by it; 20 by default, or a quarter of the
            latents where that is less.
        sparsity: coefficient of the penalty, for the other architectures.
        seed: of the initial weights and of the order of the activations.
        settings: the architecture's own, by name.
        steps, batch_size: of Adam. Together they decide how long it takes: a study's 100,000 steps of 4,096 are meant
            for large data.
        column: see `Vectors`.
        directory: where the activations, checkpoints and the SAE are written. The same call resumes there, or returns
            at once what it finds finished. By default a temporary one, which is deleted.
        device: cuda where there is one, by default.
        progress: show a bar.
        callback: called with the metrics of about 1,000 steps, evenly apart, and of the last.
        training: any other setting of `TrainingConfig`. `dead_after_samples` is by default a tenth of all samples, at
            most 10 million.

    Raises:
        UsageError: a setting is unknown or out of range; the activations are none (`Vectors`); this machine does not
            have the device.
        SaeRayError: a value of the activations is not finite; all of them are 0 or equal; the loss became infinite;
            the directory cannot be written, or another process trains the same SAE there.
    """
    check(callback is None or callable(callback), "callback", callback, "give a function of the metrics of a step")
    on, _ = placement(device or ("cuda" if torch.cuda.is_available() else "cpu"), "float32")
    vectors = Vectors(activations, column)
    given = {"architecture": architecture, "expansion": expansion, "k": k, "sparsity": sparsity, "seed": seed}
    cell = _cell(vectors.d, given, settings, {"steps": steps, "batch_size": batch_size, **training})
    with ExitStack() as stack:
        if directory is None:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="sae-ray-"))
        root = Folder(directory)
        stored = write_vectors(vectors, root, "activations")
        step = Step(root, "train", "sae", {"activations": stored.name, "cell": cell.identity()})
        if not step.finished:
            with hold([step]):
                _train(step, cell, stored, on, progress, callback)
        if step.failure:
            raise SaeRayError(step.failure)
        return _trained(step.folder)


def _train(
    step: Step,
    cell: Cell,
    stored: Step,
    device: torch.device,
    progress: bool,
    callback: Callable[[StepMetrics], None] | None,
) -> None:
    from tqdm.auto import tqdm

    written = time.monotonic()
    with tqdm(total=cell.training.steps, unit="step", disable=not progress) as bar:

        def after_step(done: int, reports: dict[str, CellReport]) -> bool:
            nonlocal written
            bar.update(done - bar.n)
            for metrics, _, kept in reports.values():
                told = {"loss": f"{metrics.loss:.3g}", "l0": f"{metrics.l0:.1f}", "dead": metrics.n_dead}
                bar.set_postfix(told, refresh=False)
                if callback is not None:
                    for one in kept:
                        callback(one)
            due = time.monotonic() - written >= CHECKPOINT_SECONDS
            if due:
                written = time.monotonic()
            return due

        bundle = BundleJob(stored.folder, (CellJob(step, cell),), cell.seed, SHUFFLE_ROWS, cell.training.steps)
        train_cells(bundle, device, after_step=after_step)


def _trained(folder: Folder) -> TrainedSAE:
    sae = load_sae(folder)
    fields = {field.name: getattr(sae, field.name) for field in dataclasses.fields(SAE)}
    history, latents = (folder.read_parquet(name) for name in (HISTORY_FILE, LATENTS_FILE))
    return TrainedSAE(**fields, history=history, latents=latents)


def _cell(d: int, given: dict[str, Any], settings: Any, training: dict[str, Any]) -> Cell:
    """The SAE that is asked for, of activations of width d.

    Args:
        given: fields of the cell itself.
        settings: the architecture's own.
    """
    name, expansion = given["architecture"], given["expansion"]
    kind = named_architecture(name)
    check(not kind.guided, "architecture", name, "guided SAEs learn labels: train them in a study")
    fits = isinstance(expansion, int | float | np.number) and bool(0 < expansion < math.inf)
    check(fits, "expansion", expansion, "make it a number above 0")
    if given["k"] is None and kind.tuned_by == "k":
        given = {**given, "k": max(1, min(K, int(expansion * d) // 4))}
    arguments = [*inspect.signature(train_sae).parameters][1:-1]
    config = _made(TrainingConfig, "train_sae", training, arguments)
    check(config.init is None, "init", config.init, "start from an SAE in a study")
    if "dead_after_samples" not in training:
        dead_after = max(1, min(MOST_DEAD_AFTER, config.steps * config.batch_size // 10))
        config = dataclasses.replace(config, dead_after_samples=dead_after)
    check(isinstance(settings, Mapping | None), "settings", settings, f"give those of {name} by name")
    own = _made(kind.Settings, f"settings of {name}", settings or {})
    cell = _made(Cell, "train_sae", {**given, "training": config, "settings": own})
    cell.check(d)
    return cell


def _made(kind: type, what: str, values: Mapping[str, Any], also: Sequence[str] = ()) -> Any:
    """A configuration, as a study makes it from its file: values of another type are converted or refused.

    Args:
        what: is configured, for errors.
        also: what else may be given there.
    """
    from pydantic import TypeAdapter, ValidationError

    own = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(values.keys() - {*own})
    if unknown:
        known = ", ".join(dict.fromkeys([*also, *own])) or "none"
        raise UsageError(f"{what} has no setting {unknown[0]!r}; known: {known}")
    values = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
    try:
        made: Any = TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        [problem, *_] = error.errors()
        name = ".".join(map(str, problem["loc"]))
        raise UsageError(f"{name} = {problem['input']!r}: {problem['msg']}") from None
    for name, value in values.items():
        check(not isinstance(value, bool) or isinstance(getattr(made, name), bool), name, value, "give a number")
    # A whole number stays one: 4.0 in place of 4 would be the name of another step.
    return dataclasses.replace(made, **{name: value for name, value in values.items() if type(value) is int})
