"""The Ray cluster that a driver works on."""

from __future__ import annotations

import logging
import os

from sae_ray.errors import SaeRayError


def connect() -> None:
    """Joins the cluster of `RAY_ADDRESS` (a submitted job has one), else starts one on this machine.

    Does nothing where Ray is initialised already.
    """
    # Ray Train polls its workers; at the default of two seconds short runs spend most of their time waiting.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its warnings are not about anything a user can change
    import ray

    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it tells of its default at every start
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
        return
    # Logical CPUs: readers and actors that mostly wait need more than two of them to run at once.
    ray.init(
        address="local",
        num_cpus=max(4, os.cpu_count() or 1),
        include_dashboard=False,
        logging_level=logging.WARNING,
        log_to_driver=False,
    )


def n_gpus() -> int:
    """GPUs of the cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def n_cpus() -> int:
    """Logical CPUs of the cluster."""
    import ray

    return int(ray.cluster_resources().get("CPU", 1))


def gpus_or_default(gpus: float | None) -> float:
    """GPUs of a worker: as many as are asked for, else 1 where the cluster has any."""
    return float(n_gpus() > 0) if gpus is None else gpus


def user_error(error: BaseException | None) -> SaeRayError | None:
    """The error that a user can mend, if one lies beneath what Ray raised."""
    while error is not None:
        if isinstance(error, SaeRayError):
            # Ray raises a subclass of both whose text carries a remote traceback; its cause says it better.
            cause = getattr(error, "cause", None)
            return cause if isinstance(cause, SaeRayError) else error
        failed_workers = getattr(error, "worker_failures", {})
        error = getattr(error, "cause", None) or next(iter(failed_workers.values()), None) or error.__cause__
    return None
