"""Planning and scheduling 100 million images, really executed: `python -m bench.scale_planning`.

The images are made up: a file system lists them, but none can be read. One process lists, labels and plans them and
writes the lists under a root. Another one then drives an extraction of as many parts on a Ray cluster of three nodes,
each part of few images. Its dataset, actors, attempts, parts, markers and the finished step are those of the product;
only decoding and encoding do nothing, and a vector is one number wide.

`python -m bench.scale_planning scheduling` measures the extraction alone, and keeps what is recorded of the lists.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from pyarrow import fs
from sae_ray.jobs import encoding, extract
from sae_ray.jobs.cluster import allow_slow_starts

from bench.record import RESULTS, Table, record
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
PER_PART = 512
SCHEDULED = ((4_000, 1), (4_000, None), (16_000, None), (195_375, None))
"""Parts, and the longest run of them if it is not the product's. The last one has as many as the largest list."""
IMAGES_OF_SCHEDULED = 10
"""Of a part: the driver knows parts alone."""
CPUS = (2, 1, 1)
"""Logical CPUs of the nodes."""
ENDLESS = "/endless"


def main() -> None:
    command = "python -m bench.scale_planning"
    with tempfile.TemporaryDirectory() as scratch:
        write_world(f"{scratch}/world", n_train=20, n_heldout=10)
        if sys.argv[1:] == ["scheduling"]:
            command += " scheduling"
            planned = json.loads((RESULTS / "scale_planning.json").read_text(encoding="utf-8"))["tables"][0]
        else:
            planned = planning(scratch)
            record("scale_planning", [planned], {"command": f"{command}, the lists alone"})
        for scheduled in scheduling(scratch):
            record("scale_planning", [planned, scheduled], {"command": command})


def planning(scratch: str) -> Table:
    rows = []
    for n_images in PLANNED:
        told = own_process("plan", f"{scratch}/root-{n_images}", f"{scratch}/world", str(n_images), str(PER_PART))
        rows.append([n_images, *told])
        print(rows[-1], flush=True)
    columns = ["images", "listed, labelled, digests: s", "of which the made-up file system: s"]
    columns += ["lists written: s", "MB of lists", "names of a part read: ms", "peak MB"]
    return Table(title="Planning, one process", columns=columns, rows=rows)


def scheduling(scratch: str) -> Iterator[Table]:
    """The table, each time with one more column."""
    nodes = f"{len(CPUS)} nodes of {', '.join(map(str, CPUS))} logical CPUs"
    title = f"The driver of an extraction, one site, {nodes}, {len(os.sched_getaffinity(0))} cores in all"
    columns, rows = ["what"], []
    for n_parts, longest in SCHEDULED:
        root, n_images = f"{scratch}/root-{n_parts}-{longest}", str(n_parts * IMAGES_OF_SCHEDULED)
        own_process("plan", root, f"{scratch}/world", n_images, str(IMAGES_OF_SCHEDULED))
        told = own_process("schedule", root, str(longest or extract.LONGEST_RUN))
        columns = [*columns, f"{n_parts:,} parts, runs of {longest or extract.LONGEST_RUN}"]
        rows = [[*row, value] for row, (_, value) in zip(rows or [[what] for what, _ in told], told, strict=True)]
        print(columns[-1], told, flush=True)
        yield Table(title=title, columns=columns, rows=rows)


def own_process(*arguments: str) -> list:
    """What a process of this module tells."""
    command = [sys.executable, "-m", "bench.scale_planning", *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def plan(root: str, world: str, n_images: str, per_part: str) -> list[float]:
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
            "extraction": {"images_per_part": int(per_part)},
        }
    )
    surveyed, listing = timed(lambda: surveying.survey(study, Folder(root)))
    made_up = timed(lambda: [endless.filesystem.get_file_info(fs.FileSelector(f"{ENDLESS}/n1")) for _ in range(100)])[1]
    made_up *= int(n_images) / PER_FOLDER / 100
    planned = StudyPlan(study, Folder(root), surveyed)
    remember(planned)
    _, writing = timed(lambda: [extract._write_lists(images) for images in planned.images.values()])
    manifest = StoredTable(planned.images["train"].step.folder, "manifest.parquet")
    source = encoding.ImageSource(endless, manifest, int(per_part))
    parts = random.Random(0).sample(range(int(n_images) // int(per_part)), 50)
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


def schedule(root: str, longest_run: str) -> list[list]:
    """Drives the extraction."""
    import ray
    from ray.cluster_utils import Cluster

    allow_slow_starts()
    vars(extract).update(LONGEST_RUN=int(longest_run))
    recalled, recalling = timed(lambda: recalled_plan(root))
    cluster = Cluster()
    for cpus in CPUS:
        cluster.add_node(num_cpus=cpus, object_store_memory=200 * 2**20, include_dashboard=False)
    hook = {"worker_process_setup_hook": work_on_nothing}
    ray.init(address=cluster.address, log_to_driver=False, runtime_env=hook)
    one = next(one for one in recalled.extracts if one.images.name == "train")
    finish, finishing, finishing_cpu = extract._finish, 0.0, 0.0

    def timed_finish(*given: Any) -> None:
        nonlocal finishing, finishing_cpu
        used = cpu_seconds()
        finishing = timed(lambda: finish(*given))[1]
        finishing_cpu = cpu_seconds() - used

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
    n = len(one.step.folder.read_parquet("parts.parquet"))
    reading = timed(one.step.record)[1]
    assert one.step.finished
    ray.shutdown()
    cluster.shutdown()
    return [
        ["plan recalled: s", round(recalling, 1)],
        ["wall time: s", round(seconds)],
        ["of which the step was finished in: s", round(finishing, 1)],
        ["step.json read and its files compared: s", round(reading, 1)],
        ["wall time per part, until the last is written: ms", round(1000 * (seconds - finishing) / n, 2)],
        ["CPU time of the driver per part: ms", round(1000 * cpu / n, 2)],
        ["of which to finish the step: ms", round(1000 * finishing_cpu / n, 2)],
        ["CPU time of Ray's own processes on all nodes per part: ms", round(1000 * ray_cpu / n, 2)],
        ["peak MB of the driver before", before],
        ["peak MB of the driver", peak],
    ]


def undecoded(folder: Folder, image_ids: list[str], preparations: list, *given: Any, **named: Any) -> DecodedPart:
    """In place of `decode_part`."""
    pixels = np.zeros((len(image_ids), 0), np.uint8)
    return DecodedPart(np.arange(len(image_ids)), [], [pixels for _ in preparations], [], {})


def unencoded(encoder: Any, sites: list, pixels: Any, image_index: np.ndarray, *given: Any, **named: Any) -> list[Rows]:
    """In place of `encode_part`."""
    n = len(image_index)
    rows = Rows(image_index, np.full(n, -1), np.zeros((n, 1), np.float16), np.zeros(n))
    return [rows for _ in sites]


def work_on_nothing() -> None:
    """In every worker, when it starts."""
    vars(encoding).update(decode_part=undecoded, load_encoder=lambda *given: None, encode_part=unencoded)


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
    if sys.argv[1:] and sys.argv[1] != "scheduling":
        print(json.dumps({"plan": plan, "schedule": schedule}[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
