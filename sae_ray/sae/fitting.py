"""Training an SAE on vectors from anywhere, without a study: for notebooks and scripts."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_ray.errors import SaeRayError, UsageError, check
from sae_ray.sae.architectures import architecture as named_architecture
from sae_ray.sae.bundle import BundleJob, CellJob, train_cells
from sae_ray.sae.config import Cell, TrainingConfig
from sae_ray.sae.formats import LATENTS_FILE, load_sae, save_sae
from sae_ray.sae.history import HISTORY_FILE
from sae_ray.sae.model import SAE
from sae_ray.store.files import Folder
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


@dataclass(frozen=True, eq=False)
class TrainedSAE(SAE):
    """An SAE that `train_sae` has trained, and how its training went."""

    history: pa.Table | None = None
    """Metrics of about 1,000 steps (`History.table`)."""
    latents: pa.Table | None = None
    """How each latent fires on the training activations: `frequency`, `mean_active`, `max_token`."""

    def save(self, directory: str | Path) -> None:
        """Writes the SAE as `SAE.save` does, and beside it `latents.parquet` and `metrics.parquet`."""
        folder = Folder(directory)
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
        UsageError: a setting is unknown or out of range; the activations are none (`Vectors`).
        SaeRayError: a value of the activations is not finite; all of them are 0 or equal; the loss became infinite;
            another process trains the same SAE in the same directory.
    """
    kind = named_architecture(architecture)
    check(not kind.guided, "architecture", architecture, "guided SAEs learn labels: train them in a study")
    vectors = Vectors(activations, column)
    if k is None and kind.tuned_by == "k":
        k = max(1, min(K, int(expansion * vectors.d) // 4))
    training.setdefault("dead_after_samples", max(1, min(MOST_DEAD_AFTER, steps * batch_size // 10)))
    config = _made(TrainingConfig, "train_sae", steps=steps, batch_size=batch_size, **training)
    own = _made(kind.Settings, f"settings of {architecture}", **(settings or {}))
    cell = Cell(architecture, expansion, k, sparsity, seed, config, own)
    check(config.init is None, "init", config.init, "start from an SAE in a study")
    cell.check(vectors.d)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with ExitStack() as stack:
        root = Folder(directory or stack.enter_context(tempfile.TemporaryDirectory(prefix="sae-ray-")))
        stored = write_vectors(vectors, root, "activations")
        step = Step(root, "train", "sae", {"activations": stored.name, "cell": cell.identity()})
        if not step.finished:
            with hold([step]):
                _train(step, cell, stored, device, progress, callback)
        if step.failure:
            raise SaeRayError(step.failure)
        return _trained(step.folder)


def _train(
    step: Step,
    cell: Cell,
    stored: Step,
    device: str,
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


def _made(kind: type, what: str, **settings: Any) -> Any:
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise UsageError(f"{what} has no setting {unknown[0]!r}; known: {', '.join(known)}")
    return kind(**settings)
