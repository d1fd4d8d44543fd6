"""What of a study's resources a cluster can never have is said, not waited for."""

import pytest
from sae_ray.jobs.cluster import require

from sae_ray.errors import UsageError


@pytest.mark.parametrize(
    "resources",
    [(4, 1, 0), (1, 4, 0), (8, 0.5, 0), (2, 1.5, 0, 1), (3, 1, 0, 1), (99, 0, 0)],
)
def test_what_the_cluster_holds_passes(ray_cluster, resources):
    require("resources.steering", *resources)


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ((5, 1, 0), "5 at once with cpus = 1 and gpus = 0 each do not fit in the cluster of 4 CPUs and 0 GPUs; lower"),
        ((1, 4.5, 0), "1 at once with cpus = 4.5"),
        ((3, 1.5, 0), "3 at once"),
        ((1, 1, 0.5), "1 at once with cpus = 1 and gpus = 0.5"),
        ((4, 1, 0, 1), "4 at once with cpus = 1 and gpus = 0 each, and 1 CPU beside them, do not fit"),
    ],
)
def test_what_it_does_not_hold_is_refused(ray_cluster, resources, words, monkeypatch, capsys):
    with pytest.raises(UsageError) as refusal:
        require("resources.steering", *resources)
    assert str(refusal.value).startswith(f"resources.steering: {words}")

    monkeypatch.setenv("RAY_ADDRESS", "auto")  # a cluster that may grow
    require("resources.steering", *resources)
    assert f"resources.steering: {words.removesuffix('; lower')}" in capsys.readouterr().err
