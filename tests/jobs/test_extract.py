import json
import os
import shutil
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sae_ray.jobs import encoding, extract
from sae_ray.jobs.progress import Progress

from sae_ray.encoders import load_encoder, load_preprocess
from sae_ray.encoders.sites import Site
from sae_ray.errors import SaeRayError, UsageError
from sae_ray.images import decode_image
from sae_ray.images.manifest import MANIFEST_SCHEMA
from sae_ray.store.activations import ActivationStore, read_parts
from sae_ray.store.attempts import begin
from sae_ray.store.files import Folder
from sae_ray.store.steps import check_shared, hold
from sae_ray.store.tables import StoredTable, spooled
from sae_ray.study.config import ExtractResources


def rows(folder: Folder) -> list[tuple[int, int, bytes]]:
    """Everything a store holds, in reading order, values as bytes: equal lists are equal bits."""
    store = ActivationStore(folder)
    found = []
    for number in range(len(store.parts)):
        index, token, activation = store.read(number)
        found += [(int(i), int(t), a.tobytes()) for i, t, a in zip(index, token, activation, strict=True)]
    return found


def test_activations_are_those_of_the_encoder(extracted, make_plan, world):
    plan = make_plan(extracted)
    chosen = next(e for e in plan.extracts if e.images.name == "heldout" and e.step.label.startswith("activations"))
    store = ActivationStore(chosen.step.folder)
    ids = chosen.images.manifest["image_id"].to_pylist()
    encoder = load_encoder(f"{world}/clip")
    preprocess = load_preprocess(f"{world}/clip")
    index, token, activation = store.read(1)
    per_part = chosen.step.config["images_per_part"]
    assert index.tolist() == list(range(per_part, 2 * per_part))
    assert set(token.tolist()) == {-1}
    images = [decode_image((world / "heldout" / ids[i]).read_bytes()) for i in index]
    pixels = torch.from_numpy(np.stack([preprocess(image) for image in images]))
    expected = encoder.tap(pixels, [chosen.site], [ids[i] for i in index], seed=0)[chosen.site].activation
    np.testing.assert_allclose(activation.astype(np.float32), expected.numpy(), rtol=2e-3, atol=2e-3)


def test_images_decoded_in_tasks_of_their_own_give_identical_values(ray_cluster, extracted, make_plan, tmp_path):
    """As where encoders have GPUs."""
    plan = make_plan(tmp_path / "root", **{"resources.extract.decoders": 2})
    extract.run(plan)
    for one, reference in zip(plan.extracts, make_plan(extracted).extracts, strict=True):
        assert rows(one.step.folder) == rows(reference.step.folder)


class OnceDeadlyBoard:
    """Kills an actor, the first that reports to it once a part of a store is written. Notes the files of all there."""

    def __init__(self, store: Folder, noted: Path):
        self.store, self.noted = store, noted

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        encoding.REPORT_SECONDS = 0.0  # in this worker: small parts take less

    def set(self, piece: str, amount: int) -> None:
        parts = read_parts(self.store)
        if parts and not self.noted.exists():
            self.noted.write_text(json.dumps([part.file for part in parts]))
            os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_actor_has_written_of_its_run_stays(ray_cluster, extracted, make_plan, tmp_path, monkeypatch):
    """Runs of several parts give the same bits as parts alone, too."""
    plan = make_plan(tmp_path / "root", **{"resources.extract.workers": 1})
    chosen = next(one for one in plan.extracts if one.images.name == "train")
    board = OnceDeadlyBoard(chosen.step.folder, tmp_path / "noted.json")
    monkeypatch.setattr(Progress, "board", lambda progress: board)
    monkeypatch.setattr(extract, "RUNS_PER_ACTOR", 1)
    extract.run_only(plan, [chosen])
    files = {part.file for part in ActivationStore(chosen.step.folder).parts.values()}
    assert files > set(json.loads(board.noted.read_text()))
    reference = next(one for one in make_plan(extracted).extracts if one.step.name == chosen.step.name)
    assert rows(chosen.step.folder) == rows(reference.step.folder)


def test_another_site_extracts_only_that_site(ray_cluster, extracted, make_plan, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(extracted, root)
    before = {step.name for step in make_plan(root).steps if step.finished}
    plan = make_plan(root, **{"grid.sites": ["projection", "layer2:random:3"], "grid.score_tokens": None})
    todo = [e for e in plan.extracts if not e.step.finished]
    assert {e.site.name for e in todo} == {"layer2.random-3"}
    extract.run(plan)
    store = ActivationStore(todo[0].step.folder)
    index, token, _ = store.read(0)
    per_part = todo[0].step.config["images_per_part"]
    assert np.bincount(index).tolist() == [3] * per_part
    assert all(len(set(token[index == i])) == 3 for i in range(per_part))
    assert before <= {step.name for step in plan.steps if step.finished}


def test_bad_images_become_rejects(ray_cluster, make_plan, world, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(world / "heldout", images)
    files = sorted(images.rglob("*.png"))
    (images / "a").mkdir()
    (images / "a" / "empty.png").write_bytes(b"")
    (images / "a" / "notes.png").write_text("no picture")
    (images / "a" / "README.txt").write_text("no picture either, and no image by its name")
    (images / "a" / "torn.png").write_bytes(files[0].read_bytes()[:200])
    Image.open(files[1]).convert("L").save(images / "a" / "gray.webp")
    overrides = {"images.train.path": str(images)}
    strict = make_plan(tmp_path / "root", **overrides, **{"images.max_bad_fraction": 0.01})
    with pytest.raises(SaeRayError, match=r"(?s)3 of .* could not be read.*a/torn.png: truncated"):
        extract.run(strict)
    assert not next(e for e in strict.extracts if e.images.name == "train").step.finished
    # The same images with a wider margin: all parts are there, only the verdict changes.
    plan = make_plan(tmp_path / "root", **overrides, **{"images.max_bad_fraction": 0.05})
    train = next(e for e in plan.extracts if e.images.name == "train")
    extract.run_only(plan, [train])
    rejects = train.step.folder.read_parquet("rejects.parquet").to_pydict()
    assert dict(zip(rejects["image_id"], rejects["reason"], strict=True)) == {
        "a/empty.png": "zero bytes",
        "a/notes.png": "not an image: text",
        "a/torn.png": "truncated",
    }
    store = ActivationStore(train.step.folder)
    assert store.n_images == len(train.images.manifest) - 3
    assert (train.images.step.record() or {})["counts"]["skipped"] == {".txt": 1}
    stored = pq.read_table(str(train.step.folder / "data"))["image_index"].to_pylist()
    ids = train.images.manifest["image_id"].to_pylist()
    assert {ids[i] for i in range(len(ids))} - {ids[i] for i in stored} == set(rejects["image_id"])


def test_images_that_are_almost_black_are_told_of_and_have_a_setting(ray_cluster, make_plan, world, tmp_path, capfd):
    folders = {name: tmp_path / name for name in ("grey", "deep")}
    for number, path in enumerate(sorted((world / "heldout").rglob("*.png"))[:20]):
        grey = np.asarray(Image.open(path).convert("L"))
        for name, values in {"grey": grey, "deep": grey.astype(np.uint16) * 16}.items():
            folders[name].mkdir(exist_ok=True)
            Image.fromarray(values).save(folders[name] / f"{number}.png")

    def activations(name: str, **overrides) -> np.ndarray:
        plan = make_plan(tmp_path / f"root-{name}", **{"images.train.path": str(folders[name])}, **overrides)
        train = next(e for e in plan.extracts if e.images.name == "train")
        extract.run_only(plan, [train])
        table = pq.read_table(str(train.step.folder / "data")).sort_by("image_index")
        return np.stack(table["activation"].to_numpy())

    expected = activations("grey")
    assert "almost black" not in capfd.readouterr().err
    assert not np.array_equal(activations("deep"), expected)
    told = capfd.readouterr().err
    assert "almost black, such as" in told
    assert "images.white = 4095" in told
    assert np.array_equal(activations("deep", **{"images.white": 255 * 16}), expected)
    assert "almost black" not in capfd.readouterr().err


def test_a_file_that_may_not_be_read_is_a_reject(ray_cluster, world, tmp_path):
    class Locked(Folder):
        """Whoever runs the tests may read everything, as root."""

        def read_bytes(self, name):
            if name.endswith("0.png"):
                raise PermissionError(name)
            return super().read_bytes(name)

    names = [str(path.relative_to(world)) for path in sorted((world / "heldout").rglob("*.png"))[:12]]
    (tmp_path / "lock-of-the-driver.json").touch()
    step = encoding.SitePart(Folder(tmp_path), Site("projection"), "float32")
    job = encoding.EncoderJob(f"{world}/clip", None, "float32", None, "encoder.model", {"train": [step]})
    manifest = spooled(MANIFEST_SCHEMA, [pa.table([range(12), names, [1] * 12], schema=MANIFEST_SCHEMA)])
    source = encoding.ImageSource(Locked(str(world)), manifest, 12)
    [pixels] = (decoded := encoding.PartDecoder({"train": source}, [job], "run")("train", 0)).pixels
    locked = [name for name in names if name.endswith("0.png")]
    assert decoded.rejects == [(name, "no permission to read it") for name in locked]
    assert len(decoded.accepted) == len(pixels) == len(names) - len(locked) > 0
    assert locked


@dataclass
class Deadly:
    """An encoder's preprocessing that one image kills."""

    preprocess: Callable

    def __call__(self, image: Image.Image) -> np.ndarray:
        if image.size == (31, 17):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.preprocess(image)


@pytest.mark.parametrize("asked", [{}, {"resources.extract.decoders": 1}])
def test_an_image_that_kills_its_decoder_becomes_a_reject(ray_cluster, make_plan, world, tmp_path, monkeypatch, asked):
    images = tmp_path / "images"
    images.mkdir()
    for number, path in enumerate(sorted((world / "heldout").rglob("*.png"))[:10]):
        shutil.copy(path, images / f"{number}.png")
    Image.new("RGB", (31, 17)).save(images / "deadly.png")
    monkeypatch.setattr(encoding, "load_preprocess", lambda *given: Deadly(load_preprocess(*given)))
    asked = asked | {"images.train.path": str(images), "images.max_bad_fraction": 0.1}
    plan = make_plan(tmp_path / "root", **asked)
    train = next(e for e in plan.extracts if e.images.name == "train")
    extract.run_only(plan, [train])
    rejects = train.step.folder.read_parquet("rejects.parquet").to_pylist()
    assert rejects == [{"image_id": "deadly.png", "reason": "ends the process that decodes it"}]
    assert ActivationStore(train.step.folder).n_images == 10
    assert not (train.step.folder / "attempts").exists()


def test_reports_are_rare_however_short_the_work(monkeypatch):
    clock = iter(np.arange(0, 100, 0.3))
    monkeypatch.setattr(encoding, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    told: list[int] = []
    tell = encoding.now_and_then(told.append)
    for done in range(20):
        tell(done)
    assert 3 <= len(told) <= 6
    assert told == sorted(told)


def test_a_part_that_keeps_ending_its_process_is_an_error(ray_cluster, world, tmp_path):
    step = encoding.SitePart(Folder(tmp_path), Site("projection"), "float32")
    jobs = (encoding.EncoderJob(f"{world}/clip", None, "float32", None, "encoder.model", {"train": [step]}),)
    names = [f"{number}.png" for number in range(8)]
    manifest = spooled(MANIFEST_SCHEMA, [pa.table([range(8), names, [1] * 8], schema=MANIFEST_SCHEMA)])
    decode = encoding.PartDecoder({"train": encoding.ImageSource(Folder(tmp_path), manifest, 2)}, jobs, "run")
    (tmp_path / "lock-of-the-driver.json").touch()
    for _ in range(encoding.MOST_TRIES):
        begin(step.folder, "run", "part-00003", "a node that was lost")
        assert encoding.begin_part(jobs, "train", 3, "run") < encoding.MOST_TRIES
    encoding.begin_part(jobs, "train", 3, "another run")
    told = r"part 3 of images\.train \(6\.png to 7\.png\) crashed its process 5 times; if memory ran out, "
    with pytest.raises(SaeRayError, match=told):
        decode("train", 3)


def test_what_only_the_driver_sees_is_missed_by_name(ray_cluster, make_plan, world, tmp_path, monkeypatch):
    """Workers are processes of a node: they have another home than this driver."""
    plan = make_plan(tmp_path / "root")
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(world / "clip", tmp_path / "clip")
    shutil.copytree(world / "heldout", tmp_path / "images")
    homely = make_plan(tmp_path / "root", **{"encoder.model": "~/clip", "images.heldout.path": f"{tmp_path}/images"})
    assert [step.name for step in homely.steps] == [step.name for step in plan.steps]
    heldout = [one for one in homely.extracts if one.images.name == "heldout" and one.field == "encoder.model"]
    with pytest.raises(SaeRayError) as missed:
        extract.run_only(homely, heldout)
    host = socket.gethostname()
    assert str(missed.value).startswith(f"encoder.model = '~/clip': there is no directory ~/clip on {host}, though")

    (tmp_path / "images").rename(tmp_path / "elsewhere")
    for there in (False, True):
        if there:
            (tmp_path / "images").mkdir()  # where a disk is to be mounted
        heldout = [one for one in homely.extracts if one.field == "judge.model"]
        with pytest.raises(SaeRayError, match=rf"{tmp_path}/images is missing or empty on {host}; image folders must"):
            extract.run_only(homely, heldout)
    assert not any(one.step.finished for one in homely.extracts)


def test_a_node_that_does_not_share_the_root_is_refused(make_plan, world, tmp_path):
    [train, *_] = make_plan(tmp_path / "root").extracts
    folder = train.step.folder
    with pytest.raises(SaeRayError, match=rf"{socket.gethostname()} does not see the files that the driver writes to"):
        check_shared(folder)
    with hold([train.step]):
        check_shared(folder)


def test_a_model_without_weights_is_told_of_plainly(ray_cluster, make_plan, world, tmp_path):
    hollow = tmp_path / "hollow"
    shutil.copytree(world / "clip", hollow, ignore=shutil.ignore_patterns("*.safetensors"))
    plan = make_plan(tmp_path / "root", **{"encoder.model": str(hollow)})
    with pytest.raises(SaeRayError, match=r"hollow.*safetensors"):
        extract.run_only(plan, [next(e for e in plan.extracts if e.images.name == "train")])


def test_fast_pixels_are_another_step(ray_cluster, make_plan, world, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number, path in enumerate(sorted((world / "heldout").rglob("*.png"))[:6]):
        Image.open(path).resize((260, 230)).save(images / f"{number}.jpg")
    overrides = {"images.train.path": str(images), "extraction.store_dtype": "float32"}
    found = {}
    encoder = load_encoder(f"{world}/clip")
    for kind in ("exact", "fast"):
        fast = kind == "fast"
        preprocess = load_preprocess(f"{world}/clip", fast=fast)
        plan = make_plan(tmp_path / "root", **overrides, **{"extraction.pixels": kind})
        [chosen] = [e for e in plan.extracts if e.images.name == "train"]
        extract.run_only(plan, [chosen])
        _, _, found[kind] = ActivationStore(chosen.step.folder).read(0)
        at_least = 2 * 56 if fast else None
        decoded = [decode_image((images / f"{number}.jpg").read_bytes(), at_least=at_least) for number in range(6)]
        assert decoded[0].size == ((130, 115) if fast else (260, 230))
        pixels = torch.from_numpy(np.stack([preprocess(image) for image in decoded]))
        expected = encoder.tap(pixels, [chosen.site], [""] * 6, seed=0)[chosen.site].activation
        np.testing.assert_allclose(found[kind], expected.numpy(), atol=1e-5)
    assert not np.allclose(found["exact"], found["fast"], atol=1e-3)


def test_actors_that_take_all_cpus_decode_themselves(ray_cluster, extracted, make_plan, tmp_path):
    """As on the nodes that are left when others are lost. Tasks of their own would never run."""
    plan = make_plan(tmp_path / "root", **{"resources.extract.workers": 4})
    extract.run(plan)
    for one, reference in zip(plan.extracts, make_plan(extracted).extracts, strict=True):
        assert rows(one.step.folder) == rows(reference.step.folder)


@pytest.mark.parametrize(
    "asked", [{"workers": 5}, {"workers": 1, "cpus": 4, "decoders": 1}, {"workers": 4, "decoders": 1}]
)
def test_actors_that_would_wait_for_ever_are_refused(ray_cluster, make_plan, tmp_path, asked):
    """Four actors of one CPU fit, but leave none for tasks that decode."""
    asked = {f"resources.extract.{name}": value for name, value in asked.items()}
    with pytest.raises(UsageError, match=r"resources\.extract: .* do not fit in the cluster of 4 CPUs"):
        extract.run(make_plan(tmp_path / "root", **asked))


def test_little_work_starts_one_actor(ray_cluster):
    """An actor takes ten seconds of a core to start."""
    works = [extract.Work(share * seconds, (1 - share) * seconds) for share in (0, 0.5) for seconds in (0.1, 9, 11)]
    asked = [extract.shares(ExtractResources(), 1.0, 1.0, work)[0] for work in works]
    assert asked == [1, 1, 2, 1, 1, 2]
    assert extract.shares(ExtractResources(workers=3), 1.0, 1.0, works[0])[0] == 3


@pytest.mark.parametrize(
    ("cores", "decoding", "expected"), [(2, 0, 2), (4, 0, 4), (4, 1e6, 2), (4, 5e5, 2), (3, 1e5, 2)]
)
def test_actors_keep_all_cores_busy(ray_cluster, monkeypatch, cores, decoding, expected):
    """One that has little to decode keeps one core busy; the cluster has room for four."""
    monkeypatch.setattr(extract, "usable_cpus", lambda: cores)
    work = extract.Work(decoding, 1e6)
    assert extract.shares(ExtractResources(), 1.0, 1.0, work)[0] == expected


def test_the_files_that_a_gpu_decodes_are_planned_for_by_the_largest_part(tmp_path):
    """Whatever row groups they are in."""
    sizes = [1, 2, 3, 10_000_000, 5, 6, 7]
    images = [{"image_index": n, "image_id": str(n), "n_bytes": size} for n, size in enumerate(sizes)]
    pq.write_table(pa.Table.from_pylist(images, MANIFEST_SCHEMA), tmp_path / "manifest.parquet", row_group_size=3)
    manifest = StoredTable(Folder(tmp_path), "manifest.parquet")
    found = [extract.most_bytes(manifest, per_part) for per_part in (1, 2, 4, 100)]
    assert found == [10_000_000, 10_000_003, 10_000_006, sum(sizes)]


def test_what_needs_a_gpu_is_refused_where_there_is_none():
    job = encoding.EncoderJob("a clip", None, "float32", None, "judge.model", {})
    extract.check_without_gpus([job])
    with pytest.raises(UsageError, match=r"judge\.compile = True: encoders are compiled for GPUs alone"):
        extract.check_without_gpus([replace(job, compiled=True)])
    with pytest.raises(UsageError, match=r"extraction\.pixels = 'gpu': there is no GPU to extract on; choose exact"):
        extract.check_without_gpus([replace(job, on_gpu=True)])


def test_overflow_names_the_remedy(ray_cluster, make_plan, world, tmp_path):
    from safetensors.torch import load_file, save_file

    loud = tmp_path / "loud"
    shutil.copytree(world / "clip", loud)
    weights = load_file(loud / "model.safetensors")
    weights["visual_projection.weight"] = weights["visual_projection.weight"].float() * 1e6
    save_file(weights, loud / "model.safetensors", metadata={"format": "pt"})
    overrides = {"encoder.model": str(loud)}
    plan = make_plan(tmp_path / "root", **overrides)
    with pytest.raises(SaeRayError, match='store_dtype = "float32"'):
        extract.run(plan)
    wide = make_plan(tmp_path / "root", **overrides | {"extraction.store_dtype": "float32"})
    chosen = next(e for e in wide.extracts if e.images.name == "heldout")
    extract.run_only(wide, [chosen])
    assert chosen.step.finished
