"""Runs a study on a cluster of three nodes, and in the midst of every stage's work something dies.

    python -m tests.jobs.struck '{"study": …, "root": …, "scratch": …, "faults": ["worker", "node", "driver"]}'

Whoever reports progress to the driver is at work, so that is where it is struck: exactly one process per stage and
fault. Marks in a folder tell who. Prints what was struck, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from sae_ray.jobs import asking, encoding, extract, naming, score, steering, study
from sae_ray.jobs.cluster import allow_slow_starts
from sae_ray.jobs.progress import Progress

from sae_ray.scores import scoring
from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan

STAGES = ("extract", "train", "evaluate", "score", "concepts", "steering", "naming", "pictures")
GIVEN = "SAE_RAY_TESTS_STRUCK"
"""The environment variable by which every process of the cluster knows what was given."""
QUICKLY = {"RAY_health_check_initial_delay_ms": "0", "RAY_health_check_period_ms": "500"}
"""For Ray's controller, which by default needs a quarter of a minute to find that a node is gone."""
N_NODES = 2
"""Beside that of the driver."""
DRIVER = "driver"


def given() -> dict[str, Any]:
    return json.loads(os.environ[GIVEN])


def marks() -> Path:
    return Path(given()["scratch"]) / "marks"


def strike(stage: str) -> None:
    """Called by a process at its work. Every fault strikes one; the others wait until it has."""
    import ray

    for fault in given()["faults"]:
        mark = marks() / f"{stage}-{fault}"
        if fault == "worker" and claim(mark):
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "driver" and claim(mark):
            os.kill(int((marks() / DRIVER).read_text()), signal.SIGKILL)
            time.sleep(1e6)  # until Ray ends it, too
        if fault == "node":
            if claim(mark, ray.get_runtime_context().get_node_id()):
                time.sleep(1e6)
            while not over(mark).exists():
                time.sleep(0.02)


def claim(mark: Path, text: str = "") -> bool:
    """Whether this process is the first one; the mark appears with its text."""
    own = mark.with_name(uuid.uuid4().hex)
    own.write_text(text)
    try:
        os.link(own, mark)
    except FileExistsError:
        return False
    finally:
        own.unlink()
    return True


def over(mark: Path) -> Path:
    return mark.with_name(f"{mark.name}-over")


class StruckBoard:
    """A `StageBoard` that strikes who reports to it; of scoring late, when there are sums on the nodes."""

    def __init__(self, board: Any, stage: str):
        self.board, self.stage = board, stage

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        encoding.REPORT_SECONDS = 0.0  # in this worker: small parts take less

    def set(self, piece: str, amount: int, *more: Any) -> None:
        self.board.set(piece, amount, *more)
        if amount and (self.stage != "score" or int(piece.split()[-1]) >= 6):
            strike(self.stage)


class StruckActor(asking.Actor):
    """Of the blocks of answers the first one passes."""

    def answer(self, step: Folder, sae: Folder, directions: Any, folder: Folder, file: str, *asked: Any) -> Any:
        if folder.name in ("answers", "train") and not file.startswith("part-00000"):
            strike(step.name.split("-")[0])
        return super().answer(step, sae, directions, folder, file, *asked)


class StruckSteeringActor(StruckActor, steering.SteeringActor):
    pass


def drive() -> None:
    """The driver."""
    board_of = Progress.board
    Progress.board = lambda progress: StruckBoard(board_of(progress), progress.label.split()[0])
    extract.RUNS_PER_ACTOR = 1
    steering.SteeringActor = naming.SteeringActor = StruckSteeringActor
    asking.QUESTIONS_PER_BLOCK = 64
    score.BLOCKS_PER_FOLD = 2
    scoring.IMAGES_PER_BLOCK = given()["images_per_block"]
    (marks() / DRIVER).write_text(str(os.getpid()))
    study.run(StudyPlan(Study.from_dict(given()["study"], {}), Folder(given()["root"])))


def supervise() -> list[str]:
    """Starts the cluster and the driver, and replaces what is taken away; returns all `<stage>-<fault>`."""
    from ray.cluster_utils import Cluster

    allow_slow_starts()
    os.environ.update(QUICKLY)
    marks().mkdir()
    quiet = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=quiet | {"num_cpus": 0, "temp_dir": given()["scratch"]})
    os.environ["RAY_ADDRESS"] = cluster.address

    def another_node() -> Any:
        return cluster.add_node(wait=False, num_cpus=2, object_store_memory=100 * 2**20)

    def another_driver() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-m", "tests.jobs.struck"], stdout=subprocess.DEVNULL)

    nodes = {node.node_id: node for node in (another_node() for _ in range(N_NODES))}
    driver, begun = another_driver(), time.monotonic()
    while (status := driver.poll()) != 0:
        if status == -signal.SIGKILL:
            driver = another_driver()
        elif status is not None:
            sys.exit(f"the driver ended with exit code {status}")
        for mark in marks().glob("*-node"):
            if not over(mark).exists():
                cluster.remove_node(nodes.pop(mark.read_text()), allow_graceful=False)
                over(mark).touch()
                print(f"{mark.name}: gone after {time.monotonic() - begun:.0f} s", file=sys.stderr)
                node = another_node()
                nodes[node.node_id] = node
        time.sleep(0.1)
    return sorted(mark.name for mark in marks().glob("*-*") if not mark.name.endswith("-over"))


def main() -> None:
    if len(sys.argv) == 1:
        drive()
    else:
        os.environ[GIVEN] = sys.argv[1]
        print(json.dumps(supervise()))


if __name__ == "__main__":
    from tests.jobs import struck  # so that workers find its classes by name

    struck.main()
