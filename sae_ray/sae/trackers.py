"""Trackers: what hears the metrics of a training and shows them elsewhere. They decide nothing of the result.

A tracker is called with the metrics of about 1,000 steps of one SAE, and closed at the end. It opens at the first call,
so that a training that resumes goes on where the newest checkpoint is. Each kind needs an extra of its name.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Mapping
from contextvars import Context
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from sae_ray.errors import UsageError, check

if TYPE_CHECKING:
    from sae_ray.sae.training import StepMetrics


class Tracker:
    """One kind of tracker, for one SAE.

    Args:
        name: of the SAE, stable: a training that resumes goes on with the run of this name.
        project: what its run is grouped under.
        directory: where those kinds write that have no place of their own in the environment; made if need be.
        config: what the run is described by, as plain values.
    """

    package: str
    """What is imported."""

    def __init__(self, name: str, project: str, directory: Path, config: Mapping[str, Any]):
        # Absolute, since a process of W&B's own outlives a change of this one's working directory.
        self.name, self.project, self.directory, self.config = name, project, directory.absolute(), dict(config)
        self._log: Callable[[dict[str, float], int], None] | None = None

    def __call__(self, metrics: StepMetrics) -> None:
        values = {key: float(value) for key, value in metrics._asdict().items() if key != "step"}
        if self._log is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._log = self.open(metrics.step)
        self._log({key: value for key, value in values.items() if math.isfinite(value)}, metrics.step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Writes what is not written yet. Nothing happens if there never was a call."""
        if self._log is not None:
            self._log = None
            self.end()

    def open(self, step: int) -> Callable[[dict[str, float], int], None]:
        """Begins the run, or goes on with it at this step; returns what takes finite values by name, and their step."""
        raise NotImplementedError

    def end(self) -> None:
        raise NotImplementedError


class TensorBoard(Tracker):
    """Event files under `directory`, a folder per SAE."""

    package = "torch.utils.tensorboard"

    def open(self, step: int) -> Callable[[dict[str, float], int], None]:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed process wrote of later steps is not shown.
        self._writer = SummaryWriter(str(self.directory / self.name), purge_step=step)

        def log(values: dict[str, float], step: int) -> None:
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)

        return log

    def end(self) -> None:
        self._writer.close()


class Wandb(Tracker):
    """A run of Weights & Biases; its own environment variables decide where, such as WANDB_MODE=offline."""

    package = "wandb"

    def open(self, step: int) -> Callable[[dict[str, float], int], None]:
        import wandb

        self._run = wandb.init(
            project=self.project,
            name=self.name,
            id=self.name.replace("/", "-"),
            resume="allow",
            dir=str(self.directory),
            config=self.config,
            reinit="create_new",  # a bundle trains several SAEs at once
            settings=wandb.Settings(silent=True),
        )
        return lambda values, step: self._run.log(values, step=step)

    def end(self) -> None:
        self._run.finish()


class MLflow(Tracker):
    """A run of MLflow, at MLFLOW_TRACKING_URI or in a database under `directory`."""

    package = "mlflow"

    def open(self, step: int) -> Callable[[dict[str, float], int], None]:
        import mlflow  # pyright: ignore[reportMissingImports]  # an extra
        from filelock import FileLock
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

        given, here = mlflow.is_tracking_uri_set(), self.directory.resolve()
        with FileLock(here / "mlflow.lock"):  # the first one makes the tables
            self._client = mlflow.MlflowClient(mlflow.get_tracking_uri() if given else f"sqlite:///{here}/mlflow.db")
        experiment = self._client.get_experiment_by_name(self.project)
        place = None if given else (here / "artifacts").as_uri()
        number = experiment.experiment_id if experiment else self._client.create_experiment(self.project, place)
        named = f"attributes.run_name = '{self.name}'"
        found = self._client.search_runs([number], named, max_results=1)
        run = found[0] if found else self._client.create_run(number, run_name=self.name)
        self._run = run.info.run_id
        if not found:
            params = [Param(key, str(value)) for key, value in self.config.items()]
            self._client.log_batch(self._run, params=params)

        def log(values: dict[str, float], step: int) -> None:
            now = int(1000 * time.time())
            self._client.log_batch(self._run, [Metric(key, value, now, step) for key, value in values.items()])

        return log

    def end(self) -> None:
        self._client.set_terminated(self._run)


class Trackio(Tracker):
    """A run of Trackio, in its own folder (TRACKIO_DIR) or on a Space (TRACKIO_SPACE_ID)."""

    package = "trackio"

    def open(self, step: int) -> Callable[[dict[str, float], int], None]:
        import trackio  # pyright: ignore[reportMissingImports]

        settings: dict[str, Any] = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        # In a context of its own: there, beginning a run ends no other one.
        begin = partial(trackio.init, self.project, self.name, config=self.config, resume="allow", **settings)
        self._run = Context().run(begin)
        return lambda values, step: self._run.log(values, step=step)

    def end(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def open_tracker(
    kind: str,
    name: str,
    *,
    project: str = "sae-ray",
    directory: str | Path = "trackers",
    config: Mapping[str, Any] | None = None,
) -> Tracker:
    """A tracker to give to `train_sae` as its callback, in a `with` block that closes it.

    Args:
        kind: `tensorboard`, `wandb`, `mlflow` or `trackio`.
        name, project, directory, config: see `Tracker`.

    Raises UsageError if there is no such kind, or it is not installed.
    """
    check(kind in TRACKERS, "tracker", kind, f"choose one of {', '.join(TRACKERS)}")
    tracker = TRACKERS[kind]
    try:
        importlib.import_module(tracker.package)
    except ImportError as error:
        raise UsageError(f"tracker = {kind!r}: {error}; install sae-ray[{kind}]") from error
    return tracker(name, project, Path(directory), config or {})
