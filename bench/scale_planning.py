"""Planning and scheduling 100 million images, really executed: `python -m bench.scale_planning`.

The images are made up: a file system lists them, but none can be read. One process lists, labels and plans them and
writes the lists under a root. Another one then drives their extraction on a Ray cluster of three nodes. Its dataset,
actors, attempts, parts, markers and the finished step are those of the product; only decoding and encoding do nothing,
and a vector is one number wide.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from pyarrow import fs
from sae_ray.jobs import extract
from sae_ray.jobs.cluster import allow_slow_starts

from bench.record import Table, record
from sae_ray.images.part import DecodedPart
from sae_ray.store.activations import Rows
from sae_ray.store.files import Folder
from sae_ray.store.tables import StoredTable
from sae_ray.study import survey as surveying
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import recalled_plan, remember
from sae_ray.world import write_world
from tests.endless import Endless

PLANNED = (1_000_000, 10_000_000, 100_000_000)
"""Images that are listed and planned."""
PER_FOLDER = 1250
SCHEDULED_PARTS = 195_313
"""All parts of the largest."""
CPUS = (2, 1, 1)
"""Logical CPUs of the nodes."""
ENDLESS = "/endless"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        write_world(f"{scratch}/world", n_train=20, n_heldout=10)
        rows = []
        for n_images in PLANNED:
            told = own_process("plan", f"{scratch}/root", f"{scratch}/world", str(n_images))
            rows.append([n_images, *told])
            print(rows[-1], flush=True)
        columns = ["images", "listed, labelled, digests: s", "of which the made-up file system: s"]
        columns += ["lists written: s", "MB of lists", "names of a part read: ms", "peak MB"]
        planned = Table(title="Planning, one process", columns=columns, rows=rows)
        record("scale_planning", [planned], {"command": "python -m bench.scale_planning, the lists alone"})
        told = own_process("schedule", f"{scratch}/root", str(SCHEDULED_PARTS))
        nodes = f"{len(CPUS)} nodes of {', '.join(map(str, CPUS))} logical CPUs"
        title = f"The driver of {SCHEDULED_PARTS:,} of {PLANNED[-1] // 512 + 1:,} parts, one site, {nodes}"
        scheduled = Table(title=title, columns=["what", "value"], rows=told)
    record("scale_planning", [planned, scheduled], {"command": "python -m bench.scale_planning"})


def own_process(*arguments: str) -> list:
    """What a process of this module tells."""
    command = [sys.executable, "-m", "bench.scale_planning", *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def plan(root: str, world: str, n_images: str) -> list[float]:
    """Plans a study of made-up images, and writes their lists under the root."""
    endless = Folder(ENDLESS)
    made_up = Endless(ENDLESS, int(n_images) // PER_FOLDER, PER_FOLDER)
    endless.filesystem, endless.is_local = fs.PyFileSystem(made_up), False
    vars(surveying).update(Folder=lambda uri: endless if uri == ENDLESS else Folder(uri))
    study = Study.from_dict(
        {
            "name": "scale",
            "images": {"train": {"path": ENDLESS}, "heldout": {"path": f"{world}/heldout"}},
            "encoder": {"model": f"{world}/clip"},
            "judge": {"model": f"open_clip:local-dir:{world}/judge", "point": "projection"},
            "grid": [{"sites": ["projection"], "expansions": [4], "k": [8]}],
        }
    )
    surveyed, listing = timed(lambda: surveying.survey(study))
    made_up = timed(lambda: [endless.filesystem.get_file_info(fs.FileSelector(f"{ENDLESS}/n1")) for _ in range(100)])[1]
    made_up *= int(n_images) / PER_FOLDER / 100
    planned = StudyPlan(study, Folder(root), surveyed)
    remember(planned)
    _, writing = timed(lambda: [extract._write_lists(images) for images in planned.images.values()])
    manifest = StoredTable(planned.images["train"].step.folder, "manifest.parquet")
    source = extract.ImageSource(endless, manifest, 512)
    parts = random.Random(0).sample(range(int(n_images) // 512), 50)
    _, reading = timed(lambda: [source.images(part) for part in parts])
    megabytes = (
        sum(
            images.stored(name).folder.files()["table.parquet"]
            for images in [planned.images["train"]]
            for name in ("manifest", "labels")
        )
        / 1e6
    )
    return [
        round(listing, 1),
        round(made_up, 1),
        round(writing, 1),
        round(megabytes),
        round(20 * reading, 1),
        peak_mb(),
    ]


def schedule(root: str, n_parts: str) -> list[list]:
    """Drives the extraction of the first parts."""
    import ray
    from ray.cluster_utils import Cluster

    class Some(extract.PartsOf):
        def __init__(self, *given: Any):
            super().__init__(*given)
            self.missing = {number for number in self.missing if number < int(n_parts)}

    allow_slow_starts()
    vars(extract).update(PartsOf=Some)
    recalled, recalling = timed(lambda: recalled_plan(root))
    cluster = Cluster()
    for cpus in CPUS:
        cluster.add_node(num_cpus=cpus, object_store_memory=200 * 2**20, include_dashboard=False)
    hook = {"worker_process_setup_hook": work_on_nothing}
    ray.init(address=cluster.address, log_to_driver=False, runtime_env=hook)
    one = next(one for one in recalled.extracts if one.images.name == "train")
    finish, finishing = extract._finish, 0.0

    def timed_finish(*given: Any) -> None:
        nonlocal finishing
        finishing = timed(lambda: finish(*given))[1]

    vars(extract).update(_finish=timed_finish)
    before, cpu = peak_mb(), cpu_seconds()
    _, seconds = timed(lambda: extract.run_only(recalled, [one]))
    cpu = cpu_seconds() - cpu
    ray_cpu = sum(
        sum(child.cpu_times()[:2])
        for child in psutil.Process().children(recursive=True)
        if child.name() in ("gcs_server", "raylet")
    )
    peak = peak_mb()
    n = int(n_parts)
    reading = timed(one.step.record)[1]
    assert one.step.finished
    return [
        ["plan recalled: s", round(recalling, 1)],
        ["wall time: s", round(seconds)],
        ["of which the step was finished in: s", round(finishing, 1)],
        ["step.json read and its files compared: s", round(reading, 1)],
        ["wall time per part, until the last is written: ms", round(1000 * (seconds - finishing) / n, 2)],
        ["CPU time of the driver per part: ms", round(1000 * cpu / n, 2)],
        ["CPU time of Ray's own processes on all nodes per part: ms", round(1000 * ray_cpu / n, 2)],
        ["peak MB of the driver before", before],
        ["peak MB of the driver", peak],
    ]


def undecoded(folder: Folder, image_ids: list[str], preparations: list, *given: Any, **named: Any) -> DecodedPart:
    """In place of `decode_part`."""
    pixels = np.zeros((len(image_ids), 0), np.uint8)
    return DecodedPart(np.arange(len(image_ids)), [], [pixels for _ in preparations], [])


def unencoded(encoder: Any, sites: list, pixels: Any, image_index: np.ndarray, *given: Any, **named: Any) -> list[Rows]:
    """In place of `encode_part`."""
    n = len(image_index)
    rows = Rows(image_index, np.full(n, -1), np.zeros((n, 1), np.float16), np.zeros(n))
    return [rows for _ in sites]


def work_on_nothing() -> None:
    """In every worker, when it starts."""
    vars(extract).update(decode_part=undecoded, load_encoder=lambda *given: None, encode_part=unencoded)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_mb() -> int:
    """Of this process, what it shares with others included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [peak] = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return round(int(peak) / 1000)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps({"plan": plan, "schedule": schedule}[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
