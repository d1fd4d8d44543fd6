"""What random kills cost. A small study runs over and over on a cluster of three nodes and an S3 server, while drivers,
workers, nodes and the server are killed at random; whatever died is started again. Every finished root must have the
bits of an undisturbed run.

    python -m bench.chaos [--kills 100] [--seed 0]

Kills are SIGKILL. The node of Ray's controller is spared, as on a cluster whose head is not preemptible.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any
from urllib.parse import quote

import psutil
from pyarrow.fs import FileSelector, FileSystem, LocalFileSystem, copy_files
from ray.cluster_utils import Cluster
from sae_ray.jobs.cluster import allow_slow_starts, free_port

from bench.record import Table, record
from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan
from sae_ray.world import write_world
from tests.jobs import struck
from tests.machine import until
from tests.roots import differences

IMAGES = {"train": 500, "heldout": 150}
PAUSE_S = (5.0, 40.0)
"""Between two kills."""
TARGETS = {"worker": 5, "node": 3, "driver": 2, "store": 2}
"""How often each is chosen."""
STAGES = ("start", *struck.STAGES)
AT_WORK = re.compile(rf"^({'|'.join(STAGES)})\b.*: \S", re.MULTILINE)
"""The driver's progress lines."""
NO_WORK = re.compile(r"/lock-|/attempts/|/\.ray-train/")
"""Files of a root that stand for none."""
HANGS_S = 600
"""Without a new file in the root, and without a kill."""
NODES = 2
PORTS = ("master.port", "volume.port", "filer.port", "s3.port")


def study(world: Path, images: Callable[[str], str]) -> dict[str, Any]:
    """Small, with every stage. `images`: where a set of them is."""
    grid = {"sites": ["layer3:random:4"], "architectures": ["matryoshka_batch_topk"], "expansions": [2, 4], "k": [8]}
    training = {"batch_size": 64, "steps": 400, "warmup_steps": 10, "threshold_start_step": 40}
    return {
        "name": "chaos",
        "images": {name: {"path": images(name)} for name in IMAGES},
        "encoder": {"model": f"{world}/clip"},
        "judge": {"model": f"open_clip:local-dir:{world}/judge", "point": "projection"},
        "grid": [grid | {"score_tokens": "all"}],
        "training": training | {"dead_after_samples": 2000},
        "scoring": {"pictures": "train"},
        "extraction": {"images_per_part": 25},
        "concepts": {"ignore_labels": ["blank"], "min_images": 10},
        "naming": {"n_latents": 20},
        "steering": {
            "llava": f"{world}/llava",
            "scorer": f"{world}/clip",
            "strength": 4,
            "unit": "max",
            "other_prompts": ["What colour is it?"],
            "ignore_labels": ["blank"],
            "min_images": 8,
            "min_purity": 0.5,
            "n_images": 10,
            "n_image_latents": 3,
        },
        "resources": {"extract": {"batch_size": 25, "workers": 2}, "train": {"checkpoint_every": 25}},
    }


class Store:
    """An S3 server that keeps what it has stored when it is killed: SeaweedFS."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder = folder
        ports = {name: free_port() for port in PORTS for name in (port, f"{port}.grpc")}
        key = {"accessKey": "testing", "secretKey": "testing"}
        may = ["Admin", "Read", "Write", "List"]
        identities = {"identities": [{"name": "testing", "credentials": [key], "actions": may}]}
        (folder / "s3.json").write_text(json.dumps(identities))
        address = quote(f"http://127.0.0.1:{ports['s3.port']}", safe="")
        self.uri = f"s3://testing:testing@study/{{}}?endpoint_override={address}&region=us-east-1"
        options = {
            "dir": folder,
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "s3.config": folder / "s3.json",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": 64,
            "volume.max": 30,
        }
        ours = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.command = [shutil.which("weed", path=ours) or "weed", "server", "-filer", "-s3"]
        self.command += [f"-{name}={value}" for name, value in (options | ports).items()]
        self.start()
        until(self.serves)

    def serves(self) -> bool:
        with suppress(OSError):
            # Not by a `Folder`: that waits for a store which is away.
            filesystem, _ = FileSystem.from_uri(f"{self.uri.format('')}&allow_bucket_creation=true")
            filesystem.create_dir("study")
            with filesystem.open_output_stream("study/check") as stream:
                stream.write(b"")
            return True
        return False

    def start(self) -> None:
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Nodes:
    """A head without CPUs, where the driver runs, and `NODES` of two CPUs."""

    def __init__(self, scratch: Path):
        quiet = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
        head = quiet | {"num_cpus": 0, "temp_dir": str(scratch)}
        self.cluster = Cluster(initialize_head=True, shutdown_at_exit=True, head_node_args=head)
        self.alive = [self.another() for _ in range(NODES)]

    def another(self) -> Any:
        return self.cluster.add_node(wait=False, num_cpus=2, object_store_memory=100 * 2**20)

    def lose(self, node: Any) -> None:
        """Its workers end by themselves."""
        self.alive.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def workers(self) -> list[psutil.Process]:
        """Processes that run a task or hold an actor; any, if none does. Without Ray's agents: those are the node."""
        found = []
        for node in (self.cluster.head_node, *self.alive):
            with suppress(psutil.Error):
                raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
                found += [(_title(child), child) for child in raylet.children()]
        found = [(title, child) for title, child in found if title.startswith("ray::") and not title.endswith("Agent")]
        return [child for title, child in found if title != "ray::IDLE"] or [child for _, child in found]


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return "".join(process.cmdline()[:1])
    return ""


@dataclass
class Kill:
    """One kill and what came of it."""

    root: int
    at_s: float
    """Since the root was begun."""
    target: str
    stage: str
    what: str = ""
    back_s: float | None = None
    """Until the root had another file."""
    restarts: int = 0
    """Drivers that ended before that, this one among them, and had to be started again."""


@dataclass
class Run:
    """A study under one root, run until it is finished."""

    number: int
    uri: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    kills: list[Kill] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """Of drivers that ended by themselves."""
    hangs: int = 0
    seconds: float = 0.0
    differ: list[str] = field(default_factory=list)
    """Files that are not those of the undisturbed run."""

    def start(self) -> None:
        self.output = self.log.open("w")
        self.driver = subprocess.Popen(
            self.command, env=self.environment, stdout=self.output, stderr=self.output, start_new_session=True
        )

    def stage(self) -> str:
        found = AT_WORK.findall(self.log.read_text())
        return found[-1] if found else "start"

    def work(self) -> set[str] | None:
        """The files that stand for work; None while the store is away."""
        with suppress(OSError):
            filesystem, path = FileSystem.from_uri(self.uri)
            found = filesystem.get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
            return {one.path for one in found if one.is_file and not NO_WORK.search(one.path)}
        return None

    def until_done(self, strike: Callable[[Run, float], None]) -> float:
        """Seconds that it took. `strike` is called all the time."""
        begun = news = time.monotonic()
        seen: set[str] = set()
        self.start()
        while (status := self.driver.poll()) != 0:
            now = time.monotonic()
            if status is not None:
                if status != -signal.SIGKILL:
                    said = self.log.read_text().strip().splitlines()
                    self.errors.append(next((line for line in said if line.startswith("Error: ")), said[-1]))
                    print(
                        f"{self.number} {now - begun:6.1f} s  the driver ended:", *said[-15:], sep="\n    ", flush=True
                    )
                for kill in self.kills:
                    kill.restarts += kill.back_s is None
                self.start()
            found = self.work()
            if found is not None and found - seen:
                seen |= found
                news = now
                for kill in self.kills:
                    if kill.back_s is None:
                        kill.back_s = round(now - begun - kill.at_s, 1)
            if now - max([news, *(begun + kill.at_s for kill in self.kills)]) > HANGS_S:
                self.hangs += 1
                os.killpg(self.driver.pid, signal.SIGKILL)
                news = now
            strike(self, now - begun)
            time.sleep(0.2)
        return time.monotonic() - begun


class Chaos:
    """Chooses what is killed when, and starts it again."""

    def __init__(self, seed: int, most: int, nodes: Nodes, store: Store):
        self.random = random.Random(seed)
        self.left, self.nodes, self.store = most, nodes, store
        self.later: list[tuple[float, Callable[[], Any]]] = []
        """When something is to be started again."""
        self.next = time.monotonic() + self.random.uniform(*PAUSE_S)

    def strike(self, run: Run, at_s: float) -> None:
        now = time.monotonic()
        self.mend(now)
        if not self.left or now < self.next:
            return
        [target] = self.random.choices(list(TARGETS), list(TARGETS.values()))
        kill = Kill(run.number, round(at_s, 1), target, run.stage())
        if getattr(self, f"_kill_{target}")(run, kill):
            self.left -= 1
            run.kills.append(kill)
            print(f"{run.number} {at_s:6.1f} s  {kill.stage:9} {target:7} {kill.what}", flush=True)
            self.next = time.monotonic() + self.random.uniform(*PAUSE_S)

    def mend(self, now: float = math.inf) -> None:
        """Starts again what is due."""
        for one in [one for one in self.later if one[0] <= now]:
            _, start = one
            start()
            self.later.remove(one)

    def _kill_worker(self, run: Run, kill: Kill) -> bool:
        workers = self.nodes.workers()
        if workers:
            chosen = self.random.choice(workers)
            kill.what = _title(chosen)
            with suppress(psutil.NoSuchProcess):
                chosen.kill()
                return True
        return False

    def _kill_node(self, run: Run, kill: Kill) -> bool:
        if not self.nodes.alive:
            return False
        self.nodes.lose(self.random.choice(self.nodes.alive))
        self._again(lambda: self.nodes.alive.append(self.nodes.another()))
        return True

    def _kill_driver(self, run: Run, kill: Kill) -> bool:
        with suppress(ProcessLookupError):
            os.killpg(run.driver.pid, signal.SIGKILL)
            return run.driver.wait() == -signal.SIGKILL
        return False

    def _kill_store(self, run: Run, kill: Kill) -> bool:
        if self.store.process.poll() is not None:
            return False
        self.store.kill()
        self._again(self.store.start)
        return True

    def _again(self, start: Callable[[], Any]) -> None:
        self.later.append((time.monotonic() + self.random.uniform(0, 5), start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="sr", dir="/tmp"))
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_worker_niceness": "0"}
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    allow_slow_starts()
    store = nodes = None
    try:
        store, nodes = Store(scratch / "store"), Nodes(scratch / "ray")
        measure(asked.kills, asked.seed, scratch, store, nodes)
    finally:
        if nodes is not None:
            nodes.cluster.shutdown()
        if store is not None:
            store.kill()
        shutil.rmtree(scratch, ignore_errors=True)


def measure(most: int, seed: int, scratch: Path, store: Store, nodes: Nodes) -> None:
    world = scratch / "world"
    write_world(world, n_train=IMAGES["train"], n_heldout=IMAGES["heldout"])
    for name in IMAGES:
        target = Folder(store.uri.format(f"images/{name}"))
        copy_files(str(world / name), target.path, LocalFileSystem(), target.filesystem)
    values = study(world, lambda name: store.uri.format(f"images/{name}"))
    file = scratch / "chaos.toml"
    file.write_text("\n".join(f"{key} = {_toml(value)}" for key, value in values.items()))
    environment = os.environ | {"RAY_ADDRESS": nodes.cluster.address}

    def run(number: int) -> Run:
        root = store.uri.format(f"root-{number}")
        command = [sys.executable, "-m", "sae_ray.jobs.cli", "run", str(file), "--root", root]
        return Run(number, root, command, environment, scratch / f"driver-{number}.log")

    def plan(one: Run) -> StudyPlan:
        return StudyPlan(Study.from_dict(values, {}), Folder(one.uri))

    reference = run(0)
    undisturbed = reference.until_done(lambda *_: None)
    assert not reference.errors, reference.errors
    print(f"undisturbed: {undisturbed:.0f} s", flush=True)
    chaos = Chaos(seed, most, nodes, store)
    runs: list[Run] = []
    while chaos.left:
        runs.append(run(len(runs) + 1))
        runs[-1].seconds = runs[-1].until_done(chaos.strike)
        chaos.mend()
        until(store.serves)
        runs[-1].differ = differences(plan(runs[-1]), plan(reference))
        print(f"root {runs[-1].number}: {runs[-1].seconds:.0f} s, differ: {runs[-1].differ}", flush=True)
        facts = {
            "command": f"make chaos (--kills {most} --seed {seed})",
            "kills": [vars(kill) for one in runs for kill in one.kills],
            "errors": [error for one in runs for error in one.errors],
            "differ": [name for one in runs for name in one.differ],
        }
        record("chaos", tables(runs, undisturbed), facts)  # every time: a long run may be cut short
    if any(one.differ or one.hangs for one in runs):
        sys.exit("a run hung, or files differ: see bench/results/chaos.json")


def tables(runs: list[Run], undisturbed: float) -> list[Table]:
    kills = [kill for one in runs for kill in one.kills]
    errors = [error for one in runs for error in one.errors]
    hangs = sum(one.hangs for one in runs)
    lost = sum(one.seconds - undisturbed for one in runs) / len(kills)
    count = Counter((kill.target, kill.stage) for kill in kills)
    rows = []
    for target, of in {name: [kill for kill in kills if kill.target == name] for name in TARGETS}.items():
        rows.append([target, *(count[target, stage] for stage in STAGES), *_effects(of)])
    rows.append(["all", *(sum(kill.stage == stage for kill in kills) for stage in STAGES), *_effects(kills)])
    driver_restarts = len(errors) + sum(kill.target == "driver" for kill in kills) + hangs
    return [
        {
            "title": "Random kills of a small study, by the stage that was at work",
            "columns": ["killed", *STAGES, "kills", "driver went on", "back after s, median", "at most"],
            "rows": rows,
        },
        {
            "title": "What they came to",
            "columns": ["", "all roots"],
            "rows": [
                ["studies finished", len(runs)],
                ["files that differ from the undisturbed run's", sum(len(one.differ) for one in runs)],
                ["drivers started again", driver_restarts],
                ["of these, ended with a named error", sum(error.startswith("Error: ") for error in errors)],
                ["of these, ended otherwise by themselves", sum(not error.startswith("Error: ") for error in errors)],
                ["runs that hung", hangs],
                ["undisturbed study, s", round(undisturbed)],
                ["time lost per kill, s (mean)", round(lost, 1)],
                ["kills per study (mean)", round(mean(len(one.kills) for one in runs), 1)],
            ],
        },
    ]


def _effects(kills: list[Kill]) -> list[float | None]:
    back = [kill.back_s for kill in kills if kill.back_s is not None]
    times = [round(median(back), 1), round(max(back), 1)] if back else [None, None]
    return [len(kills), sum(not kill.restarts for kill in kills), *times]


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


if __name__ == "__main__":
    main()
