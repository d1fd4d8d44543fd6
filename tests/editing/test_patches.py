"""Patches of real models: what is gone, what stays, and that everything comes back bit by bit."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sae_ray.editing import apply_patch, edited, edited_copy, load_edited, load_patch, make_patch, save_patch, undo
from sae_ray.editing.changes import RankOne
from sae_ray.editing.effects import WriterShares, on_codes, seen_by_reader
from sae_ray.editing.operators import direction_of
from sae_ray.encoders import Encoder, Site, load_encoder, load_preprocess
from sae_ray.encoders.info import site_width
from sae_ray.encoders.sources import directory_digest
from sae_ray.errors import SaeRayError, UsageError
from sae_ray.sae import save_sae
from sae_ray.steering import load_llava
from sae_ray.store.files import Folder

from .conftest import FAMILIES, random_sae

LATENT = 5


def photos(n: int = 4) -> list[Image.Image]:
    dice = np.random.default_rng(0)
    return [Image.fromarray(dice.integers(0, 256, (40, 50, 3), np.uint8)) for _ in range(n)]


def pixels_of(model: str) -> torch.Tensor:
    preprocess = load_preprocess(model)
    return torch.from_numpy(np.stack([preprocess(one) for one in photos()]))


def tapped(encoder: Encoder, site: Site) -> torch.Tensor:
    pixels = pixels_of(encoder.info.model)
    return encoder.tap(pixels, [site], [""] * len(pixels), 0)[site].activation.double()


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.clone() for name, one in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("mode", ["project", "rows"])
def test_the_writers_of_every_family_write_nothing_along_the_direction(saved, kind, mode):
    model = str(saved(kind))
    encoder = load_encoder(model)
    sae, layer = random_sae(site_width(encoder.info, Site("residual", 1, "all"))), 1
    patch = make_patch(model, sae, LATENT, sae_name="s", mode=mode, layer=layer, share=0.999999)
    assert (patch.facts.scope, patch.facts.layer) == ("writers", layer)
    unit = direction_of(sae, LATENT)

    def watched() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        shares = WriterShares(encoder.tower.module, layer, unit)
        with shares.watching():
            stream = tapped(encoder, Site("residual", layer, "all"))
        return shares.values(), stream

    before, stream = watched()
    as_it_was = state(encoder.tower.module)
    with edited(encoder.tower.module, patch):
        after, edited_stream = watched()
    assert same(state(encoder.tower.module), as_it_was)
    assert torch.equal(tapped(encoder, Site("residual", layer, "all")), stream)

    n_registers = encoder.info.n_registers
    total = sum(before.values()).view(len(photos()), -1)
    if n_registers:
        total = torch.cat([total[:, :1], total[:, 1 + n_registers :]], dim=1)
    torch.testing.assert_close(total.flatten(), stream @ unit, rtol=1e-4, atol=1e-4)

    assert list(before) == ["embeddings", *(f"block {b} {part}" for b in (0, 1) for part in ("attention", "mlp"))]
    for name, own in before.items():
        if name == "embeddings" and kind == "clip":
            torch.testing.assert_close(after[name], own, rtol=0, atol=0)  # its LayerNorm comes after them
        else:
            assert rms(after[name]) <= 1e-5 * rms(own), name
    if kind != "clip":
        assert rms(edited_stream @ unit) <= 1e-5 * rms(stream @ unit)


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_one_mlp_removes_its_share_alone(saved, kind):
    model = str(saved(kind))
    encoder = load_encoder(model)
    sae = random_sae(site_width(encoder.info, Site("residual", 1, "all")))
    patch = make_patch(model, sae, LATENT, sae_name="s", scope="mlp", layer=1)
    assert len(patch.changes) == 2  # weight and bias
    shares = WriterShares(encoder.tower.module, 1, direction_of(sae, LATENT))
    with edited(encoder.tower.module, patch), shares.watching():
        tapped(encoder, Site("residual", 1, "all"))
    found = shares.shares()
    assert found.pop("block 1 mlp") < 1e-9
    assert min(found.values()) > 1e-6
    assert sum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize("mode", ["project", "rows"])
def test_the_projection_has_nothing_along_the_direction(saved, mode):
    model = str(saved("clip"))
    encoder, site = load_encoder(model), Site("projection")
    sae = random_sae(site_width(encoder.info, site))
    patch = make_patch(model, sae, LATENT, sae_name="s", mode=mode)
    assert patch.facts.scope == "projection"
    before, unit = tapped(encoder, site), direction_of(sae, LATENT)
    with edited(encoder.tower.module, patch):
        after = tapped(encoder, site)
    if mode == "project":
        assert rms(after @ unit) <= 1e-5 * rms(before @ unit)
    torch.testing.assert_close(after, seen_by_reader(patch, sae, before), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", ["origin", "mean"])
@pytest.mark.parametrize("mode", ["project", "rows"])
def test_a_reader_gives_what_it_would_give_without_the_direction(tiny_llava, mode, keep):
    llava = load_llava(tiny_llava)
    sae = random_sae(llava.width)
    patch = make_patch(tiny_llava, sae, LATENT, sae_name="s", mode=mode, keep=keep)
    assert patch.facts.scope == "reader"
    images = photos()
    expected = llava.image_embeddings(images, [[lambda x: seen_by_reader(patch, sae, x)]] * len(images))
    before, as_it_was = llava.image_embeddings(images, [()] * len(images)), state(llava.model)
    with edited(llava.model, patch):
        found = llava.image_embeddings(images, [()] * len(images))
    for one, other, old in zip(found, expected, before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
        assert not torch.allclose(one, old, rtol=1e-2, atol=1e-2)
    assert same(state(llava.model), as_it_was)
    if (mode, keep) == ("project", "mean"):
        x = torch.randn(30, llava.width)
        along = seen_by_reader(patch, sae, x).double() @ direction_of(sae, LATENT)
        mean = float(sae.b_dec.double() @ direction_of(sae, LATENT))
        torch.testing.assert_close(along, torch.full_like(along, mean), rtol=1e-5, atol=1e-5)


def test_the_pages_example_runs(tiny_llava, tmp_path, capsys):
    page = (Path(__file__).parents[2] / "docs" / "editing.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    llava, image, folder = load_llava(tiny_llava), photos()[0], str(tmp_path / "sae")
    sae = random_sae(llava.width)
    save_sae(sae, Folder(folder))
    exec(example.replace("54", str(LATENT)), {"model": tiny_llava, "folder": folder, "image": image})
    with edited(llava.model, make_patch(tiny_llava, sae, LATENT, sae_name=folder)):
        expected = llava.answer(image, "Describe the image.")
    assert capsys.readouterr().out == f"{expected}\n"


def test_vectors_change_columns_of_one_mlp(tiny_llava):
    llava = load_llava(tiny_llava)
    sae = random_sae(llava.width)
    patch = make_patch(tiny_llava, sae, LATENT, sae_name="s", mode="vectors", kappa=0.5, value=-2.0)
    assert (patch.facts.scope, patch.facts.layer) == ("mlp", llava.layer)
    [name] = patch.changes
    assert name == f"encoder.layers.{llava.layer}.mlp.fc2.weight"
    before = state(llava.model)
    apply_patch(llava.model, patch)
    [moved] = [key for key, one in state(llava.model).items() if not torch.equal(one, before[key])]
    columns = (llava.model.state_dict()[moved] != before[moved]).any(dim=0).nonzero().flatten()
    assert moved.endswith(name)
    assert columns.tolist() == patch.changes[name].index.tolist()
    assert 0 < len(columns) < before[moved].shape[1]


@pytest.mark.parametrize("settings", [{}, {"mode": "rows"}, {"scope": "writers"}, {"keep": "mean"}])
def test_a_patch_file_says_it_all(tiny_llava, tmp_path, settings):
    sae = random_sae(32)
    patch = make_patch(tiny_llava, sae, LATENT, sae_name="runs/sae", **settings)
    save_patch(patch, tmp_path / "p.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]
    read = load_patch(tmp_path / "p.safetensors")
    assert read.facts == patch.facts
    one, two = load_llava(tiny_llava), load_llava(tiny_llava)
    apply_patch(one.model, patch)
    apply_patch(two.model, read)
    assert same(state(one.model), state(two.model))
    assert same(state(load_edited(tiny_llava, tmp_path / "p.safetensors").model), state(one.model))


@pytest.mark.parametrize("scope", ["reader", "writers"])
def test_an_edited_copy_is_an_ordinary_model_and_undo_gives_every_byte_back(tiny_llava, tmp_path, scope):
    patch = make_patch(tiny_llava, random_sae(32), LATENT, sae_name="s", scope=scope)
    save_patch(patch, tmp_path / "p.safetensors")
    bytes_before = {file.name: file.read_bytes() for file in Path(tiny_llava).iterdir()}
    copy = edited_copy(tmp_path / "p.safetensors", tiny_llava, tmp_path / "copy")
    assert {file.name: file.read_bytes() for file in Path(tiny_llava).iterdir()} == bytes_before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy", "p.safetensors"]
    assert directory_digest(copy) != directory_digest(Path(tiny_llava))
    expected = load_edited(tiny_llava, tmp_path / "p.safetensors")
    assert same(state(load_llava(str(copy)).model), state(expected.model))

    undo(copy)
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == bytes_before
    with pytest.raises(UsageError, match="is not an edited copy"):
        undo(copy)


def test_undo_of_a_copy_that_was_changed_otherwise_is_an_error(tiny_llava, tmp_path):
    save_patch(make_patch(tiny_llava, random_sae(32), LATENT, sae_name="s"), tmp_path / "p.safetensors")
    copy = edited_copy(tmp_path / "p.safetensors", tiny_llava, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"more": 1}))
    with pytest.raises(SaeRayError, match="something else changed it"):
        undo(copy)
    with pytest.raises(UsageError, match="itself an edited copy"):
        edited_copy_of(copy, tmp_path)


def edited_copy_of(copy: Path, tmp_path: Path) -> None:
    save_patch(make_patch(str(copy), random_sae(32), LATENT, sae_name="s"), tmp_path / "again.safetensors")
    edited_copy(tmp_path / "again.safetensors", str(copy), tmp_path / "copy2")


def test_a_checkpoint_in_half_precision_in_several_files_keeps_its_form(tiny_llava, tmp_path):
    model = tmp_path / "half"
    llava = load_llava(tiny_llava, dtype="float16")
    llava.model.save_pretrained(model, max_shard_size="20KB")
    llava.processor.save_pretrained(model)
    assert len(list(model.glob("*.safetensors"))) > 1
    sae = random_sae(32)
    save_patch(make_patch(str(model), sae, LATENT, sae_name="s", scope="writers"), tmp_path / "p.safetensors")
    copy = edited_copy(tmp_path / "p.safetensors", str(model), tmp_path / "copy")
    expected = load_edited(str(model), tmp_path / "p.safetensors", dtype="float16")
    assert same(state(load_llava(str(copy), dtype="float16").model), state(expected.model))
    undo(copy)
    assert directory_digest(copy) == directory_digest(model)


def test_the_effect_on_codes_is_counted_over_all_rows():
    sae, x = random_sae(12), torch.randn(3000, 12, generator=torch.Generator().manual_seed(3))
    after = x + 0.1
    found = on_codes(sae, LATENT, x, after)
    codes = [sae.encode(one).double() for one in (x, after)]
    others = torch.arange(48) != LATENT
    change = (codes[1] - codes[0])[:, others].norm() / codes[0][:, others].norm()
    assert found.own_variance_left == pytest.approx(1, abs=1e-6)
    assert found.others_relative_change == pytest.approx(float(change))
    assert found[2:] == tuple(int((one[:, LATENT] > 0).sum()) for one in codes)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "delete"}, "mode = 'delete': choose one of project, rows, vectors"),
        ({"scope": "head"}, "scope = 'head': choose one of reader, writers, mlp, projection"),
        ({"keep": "median"}, "keep = 'median': choose one of origin, mean"),
        ({"keep": "mean", "scope": "writers"}, "only the scope reader keeps a mean"),
        ({"share": 0.0, "mode": "rows"}, "share = 0.0: choose a share above 0"),
        ({"kappa": 0.5}, "only the mode vectors takes them"),
        ({"mode": "vectors"}, "the mode vectors needs both"),
        ({"mode": "vectors", "kappa": 0.5, "value": 0.0, "scope": "reader"}, r"a site layer<L>\.mlp"),
        ({"scope": "writers", "layer": 9}, "layer is 9; the scope writers needs the block .* blocks 0 to 2"),
        ({"scope": "projection"}, "scope is 'projection', but .* has no visual_projection.weight; take a CLIP"),
    ],
)
def test_what_cannot_be_made_is_refused(tiny_llava, settings, words):
    with pytest.raises(UsageError, match=words):
        make_patch(tiny_llava, random_sae(32), LATENT, sae_name="s", **settings)


def test_models_and_saes_that_do_not_fit_are_refused(tiny_llava, tiny_clip):
    with pytest.raises(UsageError, match=r"d_in = 16, but multi_modal_projector.linear_1 of .* reads 32 wide"):
        make_patch(tiny_llava, random_sae(16), LATENT, sae_name="s")
    with pytest.raises(UsageError, match=r"scope is 'reader', but .* has no multi_modal_projector.linear_1.weight"):
        make_patch(tiny_clip, random_sae(32), LATENT, sae_name="s", scope="reader")
    with pytest.raises(UsageError, match="transformers format"):
        make_patch("open_clip:local-dir:x", random_sae(32), LATENT, sae_name="s")


def test_a_patch_fits_the_weights_that_it_was_made_for_and_no_others(tiny_llava, make_llava, saved, tmp_path):
    patch = make_patch(tiny_llava, random_sae(32), LATENT, sae_name="s")
    save_patch(patch, tmp_path / "p.safetensors")
    other = make_llava(tmp_path / "other", layer=-1)
    for fails in (load_edited, lambda model, file: edited_copy(file, model, tmp_path / "copy")):
        with pytest.raises(UsageError, match=r"the patch was made for .* of the revision .* make it again"):
            fails(other, tmp_path / "p.safetensors")
    clip = load_encoder(str(saved("clip")))
    before = state(clip.tower.module)
    with pytest.raises(UsageError, match=r"the model has no multi_modal_projector.linear_1.weight"):
        apply_patch(clip.tower.module, patch)
    llava = load_llava(tiny_llava)
    narrow = dataclasses.replace(patch, changes={"multi_modal_projector.linear_1.weight": RankOne(*torch.ones(2, 3))})
    with pytest.raises(UsageError, match=r"the shape \[32, 32\], which the patch does not fit"):
        apply_patch(llava.model, narrow)
    assert same(state(clip.tower.module), before)
    (tmp_path / "copy").mkdir()
    with pytest.raises(UsageError, match=r"--out is .* which exists"):
        edited_copy(tmp_path / "p.safetensors", tiny_llava, tmp_path / "copy")


def test_files_that_are_no_patches_are_refused(tiny_llava, tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        load_patch(tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match="is not a patch"):
        load_patch(Path(tiny_llava) / "model.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(SaeRayError, match="damaged"):
        load_patch(tmp_path / "torn.safetensors")
    good = tmp_path / "p.safetensors"
    save_patch(make_patch(tiny_llava, random_sae(32), LATENT, sae_name="s"), good)
    tensors = load_file(good)
    from safetensors import safe_open

    with safe_open(good, "pt") as file:
        facts = json.loads(file.metadata()["sae_ray_edit"])
    for changed, error in (({"schema": 9}, UsageError), ({"mode": "delete"}, SaeRayError), ({"more": 1}, SaeRayError)):
        save_file(tensors, tmp_path / "bad.safetensors", {"sae_ray_edit": json.dumps(facts | changed)})
        with pytest.raises(error):
            load_patch(tmp_path / "bad.safetensors")
    del tensors["multi_modal_projector.linear_1.weight/right"]
    save_file(tensors, tmp_path / "bad.safetensors", {"sae_ray_edit": json.dumps(facts)})
    with pytest.raises(SaeRayError, match="damaged"):
        load_patch(tmp_path / "bad.safetensors")
    with pytest.raises(UsageError, match=r"--out is .* cannot be written"):
        save_patch(load_patch(good), good / "p.safetensors")
