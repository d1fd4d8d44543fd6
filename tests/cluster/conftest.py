"""A cluster of hosts of their own, an object store on another one, and the small study that they work on."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan
from tests.cluster.hosts import Host, make_bridge, why_not
from tests.cluster.nodes import KEYS, Cluster
from tests.jobs.conftest import Ran, make_plan, ran, to_toml, world
from tests.jobs.conftest import study_values as quick_values
from tests.object_store import KEY, object_store, upload

__all__ = ["make_plan", "quick_values", "ran", "world"]


@pytest.fixture(scope="session")
def study_values(quick_values: dict) -> dict:
    """The study of the tests of drivers, but trained for so long that a host can be taken away meanwhile."""
    resources = {"extract": {"batch_size": 16, "workers": 2}, "train": {"checkpoint_every": 50}}
    return quick_values | {"training": quick_values["training"] | {"steps": 1000}, "resources": resources}


@pytest.fixture(scope="session")
def network() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    make_bridge()


@pytest.fixture(scope="session")
def store_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One line per request that the object store answered; it begins with the address of who asked."""
    return tmp_path_factory.mktemp("s3") / "log"


@pytest.fixture(scope="session")
def bucket(network: None, store_log: Path) -> Iterator[str]:
    """Its addresses are without keys, which the environment has: Ray shows the commands of jobs."""
    host = Host("store", 9)
    os.environ.update(KEYS)
    try:
        with object_store(store_log, host.address, 5000, host.inside) as address:
            yield address.replace(f"{KEY}:{KEY}@", "")
    finally:
        host.end()


@pytest.fixture(scope="session")
def cluster(network: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and two workers. The clock of one worker is five minutes ahead."""
    cluster = Cluster(tmp_path_factory.mktemp("nodes"))
    try:
        cluster.add("worker-1")
        cluster.add("worker-ahead", ahead=True)
        cluster.wait_until_up()
        yield cluster
    finally:
        cluster.end()


class Submitted(NamedTuple):
    """A study all of whose images and models are in the store."""

    file: Path
    bucket: str

    def plan(self, root: str) -> StudyPlan:
        """With a root of this name in the store."""
        return StudyPlan(Study.load(str(self.file)), Folder(self.bucket.format(f"roots/{root}")))


@pytest.fixture(scope="session")
def submitted(study_values, world, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    def there(name: str) -> str:
        return upload(world / name, bucket.format(f"world/{name}"))

    values = study_values | {
        "images": {name: {"path": there(name)} for name in ("train", "heldout")},
        "encoder": {"model": there("clip")},
        "judge": study_values["judge"] | {"model": f"open_clip:local-dir:{there('judge')}"},
    }
    file = tmp_path_factory.mktemp("study") / "small.toml"
    file.write_text(to_toml(values))
    return Submitted(file, bucket)


@pytest.fixture(scope="session")
def alone(ran: Ran, make_plan) -> StudyPlan:
    """The study as one machine has done it, all from its own disk."""
    return make_plan(ran.root)
