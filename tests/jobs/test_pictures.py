import shutil

import pytest
from sae_ray.jobs import pictures, study

from sae_ray.errors import SaeRayError
from sae_ray.report.pictures import Shown, make_sprite, pictures_job
from sae_ray.store.files import Folder


def contents(folder: Folder) -> dict[str, bytes]:
    return {name: folder.read_bytes(name) for name in folder.files(recursive=True) if name != "step.json"}


def test_pictures_resume_sprite_by_sprite(ray_cluster, finished, make_plan, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(finished, root, ignore=shutil.ignore_patterns("pictures-*", "report"))
    plan = make_plan(root)
    shown = Shown(plan, plan.pictures)
    job, sprites = pictures_job(plan, plan.pictures, shown, shown.heat_cells)
    assert len(sprites) == 2
    make_sprite(job, sprites[0])  # what a killed run left
    folder = plan.pictures.step.folder
    folder.write_bytes("sprites/1.jpg", b"half")  # and what it had begun
    made = (root / plan.pictures.step.name / "sprites" / "0.jpg").stat().st_mtime_ns
    assert [one.number for one in pictures_job(plan, plan.pictures, shown, shown.heat_cells)[1]] == [1]

    study.make_report(plan)
    assert (root / plan.pictures.step.name / "sprites" / "0.jpg").stat().st_mtime_ns == made
    assert contents(folder) == contents(make_plan(finished).pictures.step.folder)
    assert (plan.root / "report").exists("sprites/1.jpg")
    assert plan.pictures.step.record()["counts"] == {"images": len(shown.album), "missing": 0, "heat_maps": 0}


def test_an_encoder_that_is_gone_is_told_of_plainly(ray_cluster, finished, make_plan, world, tmp_path):
    """Where there are thumbnails to make, its own resizing is needed."""
    root, clip = tmp_path / "root", tmp_path / "clip"
    shutil.copytree(finished, root, ignore=shutil.ignore_patterns("pictures-*", "report"))
    shutil.copytree(world / "clip", clip)
    plan = make_plan(root, **{"encoder.model": str(clip)})
    shutil.rmtree(clip)
    with pytest.raises(SaeRayError, match=str(clip)):
        pictures.run(plan)
    assert not plan.pictures.step.finished
