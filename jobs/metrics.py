"""How far stages and cells are, as Ray's metrics. The agent of each node exports them to Prometheus as `ray_sae_ray_…`.

Only drivers set them, from what they show anyway. A gauge vanishes some seconds after its stage has ended or its driver
has died; a counter stays with the agent.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from sae_ray.store.steps import Step

STAGE = {
    "sae_ray_stage_units_done": ("done", "Units of work done of a stage: images, steps, activations, answers."),
    "sae_ray_stage_units": ("total", "Units of work of a stage."),
    "sae_ray_stage_units_per_second": ("per_second", "Units per second since the driver began the stage."),
    "sae_ray_stage_eta_seconds": ("eta_seconds", "Seconds until the stage is done, at that rate."),
}
"""Gauges: name -> the part of a pace that it shows, and its description."""
CELL = {
    "sae_ray_cell_steps_done": ("done", "Training steps done of an SAE."),
    "sae_ray_cell_steps": ("total", "Training steps of an SAE."),
    "sae_ray_cell_steps_per_second": ("per_second", "Steps per second since its workers began."),
    "sae_ray_cell_loss": ("loss", "Loss of the last step."),
    "sae_ray_cell_l0": ("l0", "Active latents per sample in the last step."),
    "sae_ray_cell_dead": ("dead", "Latents that are dead, as a share of all."),
}
FAILURES = "sae_ray_failures"
"""A counter; Prometheus shows `sae_ray_failures_total`."""


def show_stage(step: Step, pace: dict[str, Any]) -> None:
    """`step`: one of the stage's."""
    tags = {"root": str(step.root), "stage": step.stage, "unit": pace["unit"]}
    for name, (part, description) in STAGE.items():
        if pace[part] is not None:
            _metric("Gauge", name, description, tuple(tags)).set(pace[part], tags)


def show_cell(step: Step, pace: dict[str, Any]) -> None:
    tags = {"root": str(step.root), "step": step.name}
    values = pace | {"dead": pace["n_dead"] / pace["d_sae"]}
    for name, (part, description) in CELL.items():
        _metric("Gauge", name, description, tuple(tags)).set(values[part], tags)


def count_failure(step: Step) -> None:
    tags = {"root": str(step.root), "stage": step.stage, "step": step.name}
    _metric("Counter", FAILURES, "How often work on a step ended with an error.", tuple(tags)).inc(tags=tags)


@cache
def _metric(kind: str, name: str, description: str, tags: tuple[str, ...]) -> Any:
    from ray.util import metrics

    return getattr(metrics, kind)(name, description, tags)
