"""Runs a study on a cluster of three nodes, and in the midst of every stage's work something dies.

    python -m tests.jobs.faults '{"study": …, "root": …, "scratch": …, "faults": ["worker", "node", "driver"]}'

Whatever reports progress to the driver is at work, so that is where it is struck: by the marks in a folder, exactly one
process per stage and fault. Prints what was struck, as JSON.
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

from sae_ray.jobs import score, steering, study
from sae_ray.jobs.progress import Progress

from sae_ray.scores import scoring
from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan

STAGES = ("extract", "train", "evaluate", "score", "steering", "pictures")
QUICKLY = {"RAY_health_check_initial_delay_ms": "0", "RAY_health_check_period_ms": "500"}
"""For Ray's controller, which by default needs a quarter of a minute to find that a node is gone."""
N_NODES = 2
"""Beside that of the driver."""


class Strikes:
    """What one stage of a run suffers. Copies of it share a folder of marks."""

    def __init__(self, stage: str, marks: Path, faults: list[str]):
        self.stage, self.marks, self.faults = stage, marks, faults
        self.driver = os.getpid()

    def mark(self, fault: str) -> Path:
        return self.marks / f"{self.stage}-{fault}"

    def strike(self) -> None:
        """Called by a process at its work. Every fault strikes one; the others wait for it."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        for fault in self.faults:
            mark = self.mark(fault)
            if fault == "node" and claim(mark, node):
                time.sleep(1e6)
            if fault == "worker" and claim(mark, str(os.getpid())):
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "driver" and claim(mark, str(self.driver)):
                os.kill(self.driver, signal.SIGKILL)
                time.sleep(1e6)  # until Ray ends it, too
            while fault == "node" and not over(mark).exists():
                time.sleep(0.02)


def claim(mark: Path, text: str) -> bool:
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
    """A `Board` that strikes who reports to it; of scoring late, when there are sums on the nodes."""

    def __init__(self, board: Any, strikes: Strikes):
        self.board, self.strikes, self.set = board, strikes, self

    def remote(self, piece: str, amount: int) -> None:
        self.board.set.remote(piece, amount)
        if amount and (self.strikes.stage != "score" or int(piece.split()[-1]) >= 6):
            self.strikes.strike()


def drive(given: dict[str, Any]) -> None:
    """The driver."""
    marks, faults = Path(given["scratch"]) / "marks", given["faults"]
    board_of = Progress.board

    def board(progress: Progress) -> StruckBoard:
        return StruckBoard(board_of(progress), Strikes(progress.label.split()[0], marks, faults))

    strikes = Strikes("steering", marks, faults)

    class StruckActor(steering.Actor):
        def answer(self, folder: Folder, file: str, *asked: Any) -> Any:
            if folder.name == "answers" and not file.startswith("part-00000"):
                strikes.strike()
            return super().answer(folder, file, *asked)

    Progress.board = board
    steering.Actor = StruckActor
    steering.QUESTIONS_PER_BLOCK = 64
    score.BLOCKS_PER_FOLD = 2
    scoring.IMAGES_PER_BLOCK = given["images_per_block"]
    study.run(StudyPlan(Study.from_dict(given["study"], {}), Folder(given["root"])))


def supervise(given: dict[str, Any]) -> list[str]:
    """Starts the cluster and the driver, replaces nodes that are taken away; returns all `<stage>-<fault>`."""
    from ray.cluster_utils import Cluster

    os.environ.update(QUICKLY)
    marks = Path(given["scratch"]) / "marks"
    marks.mkdir()
    quiet = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=quiet | {"num_cpus": 0, "temp_dir": given["scratch"]})

    def another_node() -> Any:
        return cluster.add_node(wait=False, num_cpus=2, object_store_memory=100 * 2**20)

    nodes = {node.node_id: node for node in (another_node() for _ in range(N_NODES))}
    command = [sys.executable, "-m", "tests.jobs.faults", "drive", json.dumps(given)]
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    begun = time.monotonic()
    while (status := driver.poll()) != 0:
        if status == -signal.SIGKILL:
            driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        elif status is not None:
            sys.exit(f"the driver ended with exit code {status}")
        for mark in marks.glob("*-node"):
            if not over(mark).exists():
                cluster.remove_node(nodes.pop(mark.read_text()), allow_graceful=False)
                over(mark).touch()
                print(f"{time.monotonic() - begun:6.1f} s  a node is gone: {mark.name}", file=sys.stderr)
                node = another_node()
                nodes[node.node_id] = node
        time.sleep(0.1)
    return sorted(mark.name for mark in marks.iterdir() if not mark.name.endswith("-over"))


if __name__ == "__main__":
    if sys.argv[1] == "drive":
        drive(json.loads(sys.argv[2]))
    else:
        print(json.dumps(supervise(json.loads(sys.argv[1]))))
