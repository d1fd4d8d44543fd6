"""`sae-ray ask` as users call it, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from sae_ray.jobs.cli import main

from sae_ray.sae import SAE, load_sae, save_sae
from sae_ray.steering import Box, Condition, Intervention, LatentEdit, Llava, Region, load_llava
from sae_ray.store.files import Folder
from tests.serve.conftest import stored

D_SAE = 64
MAX_TOKEN = torch.linspace(0, 6.3, D_SAE, dtype=torch.float64)
"""Latent 0 never fired."""


def save_random_sae(folder: Path, d_in: int = 32) -> str:
    generator = torch.Generator().manual_seed(0)
    W_enc = torch.randn(d_in, D_SAE, generator=generator) / d_in**0.5
    b_enc, b_dec = torch.randn(D_SAE, generator=generator), torch.randn(d_in, generator=generator)
    save_sae(SAE("relu", W_enc, W_enc.T.contiguous(), b_enc, b_dec), Folder(folder))
    return str(folder)


@pytest.fixture(scope="module")
def sae(tmp_path_factory) -> str:
    """The directory of a random SAE for the tiny LLaVA, with the sidecar that a study writes."""
    folder = tmp_path_factory.mktemp("sae")
    columns = {"latent": np.arange(D_SAE), "frequency": np.full(D_SAE, 0.1), "max_token": MAX_TOKEN.numpy()}
    Folder(folder).write_parquet("latents.parquet", pa.table(columns))
    return save_random_sae(folder)


@pytest.fixture(scope="module")
def llava(tiny_llava) -> Llava:
    return load_llava(tiny_llava)


@pytest.fixture
def call(tiny_llava, sae):
    """`sae-ray ask IMAGE PROMPT …` with the tiny LLaVA and its SAE, unless others are named."""

    def run(*arguments, llava: str = tiny_llava, sae: str = sae) -> Result:
        models = ["--llava", llava, "--sae", sae, "--max-new-tokens", "6"]
        return CliRunner().invoke(main, ["ask", *map(str, arguments), *models])

    return run


def refused(result: Result, *words: str, code: int = 2) -> None:
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert "Error: " in result.stderr
    for word in words:
        assert word in result.stderr


def white() -> Image.Image:
    return Image.new("RGB", (28, 28), "white")


def test_both_answers_side_by_side(call, llava, sae):
    result = call("white", "w3 w4?", "--latent", "39=25")
    assert result.exit_code == 0, result.output
    edit = Intervention(load_sae(sae), (LatentEdit(39, "set", 25.0),))
    unsteered, steered = (llava.answer(white(), "w3 w4?", chain, 6) for chain in ((), (edit,)))
    assert unsteered != steered
    head, answers = result.stdout.splitlines()
    column = len(unsteered) + 2
    assert (head[:column].rstrip(), head[column:]) == ("unsteered", "steered: latent 39 set to 25")
    assert (answers[:column].rstrip(), answers[column:]) == (unsteered, steered)
    assert result.stderr == ""


def test_json_tells_everything(call, llava, sae, tmp_path):
    path = tmp_path / "photo.png"
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    photo.save(path)
    options = ["--latent", "3=4x", "--latent", "5=-2", "--mode", "nudge", "--error", "keep", "--isolate"]
    result = call(path, "w5", *options, "--token", "2", "--token", "16", "--json")
    assert result.exit_code == 0, result.output
    edits = (LatentEdit(3, "add", 4.0, "max"), LatentEdit(5, "add", -2.0))
    chain = [Intervention(load_sae(sae), edits, "keep", True, (2, 16), MAX_TOKEN)]
    assert json.loads(result.stdout) == {
        "image": str(path),
        "prompt": "w5",
        "llava": llava.info.model,
        "revision": llava.info.revision,
        "sae": sae,
        "unsteered": llava.answer(photo, "w5", max_new_tokens=6),
        "steered": [
            {
                "intervention": {
                    "edits": [
                        {"latent": 3, "mode": "add", "strength": 4.0, "unit": "max"},
                        {"latent": 5, "mode": "add", "strength": -2.0, "unit": "absolute"},
                    ],
                    "error": "keep",
                    "isolate": True,
                    "tokens": [2, 16],
                    "region": None,
                    "when": None,
                },
                "answer": llava.answer(photo, "w5", chain, 6),
            }
        ],
    }


def test_a_sweep_is_a_table_of_strengths_and_answers(call, llava, sae):
    result = call("white", "w5", "--latent", "39", "--latent", "7", "--sweep", "0x, 2x,8x,12")
    assert result.exit_code == 0, result.output
    rows = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    assert rows[0] == ["strength", "answer"]
    assert rows[1] == ["unsteered", llava.answer(white(), "w5", max_new_tokens=6)]
    assert [row[0] for row in rows[2:]] == ["0x", "2x", "8x", "12"]
    for strength, unit, (_, answer) in zip([0, 2, 8, 12], ["max"] * 3 + ["absolute"], rows[2:], strict=True):
        edits = tuple(LatentEdit(latent, "set", strength, unit) for latent in (39, 7))
        chain = [Intervention(load_sae(sae), edits, max_token=MAX_TOKEN)]
        assert answer == llava.answer(white(), "w5", chain, 6)
    assert len({answer for _, answer in rows[1:]}) > 2


def test_an_intervention_file_says_the_same(call, tmp_path):
    path = tmp_path / "intervention.json"
    edits = [{"latent": 39, "mode": "pin", "strength": 25}, {"latent": 3, "mode": "suppress"}]
    path.write_text(json.dumps({"edits": edits}))
    result = call("white", "w5", "--intervention", path, "--json")
    assert result.exit_code == 0, result.output
    (steered,) = json.loads(result.stdout)["steered"]
    assert [edit["mode"] for edit in steered["intervention"]["edits"]] == ["set", "ablate"]
    ablated = json.loads(call("white", "w5", "--latent", "39", "--mode", "ablate", "--json").stdout)["steered"]
    assert ablated[0]["intervention"]["edits"] == [
        {"latent": 39, "mode": "ablate", "strength": 0.0, "unit": "absolute"}
    ]
    result = call("white", "w5", "--intervention", path)
    assert "steered: latent 39 set to 25, latent 3 ablated" in result.stdout


def test_a_balanced_push_keeps_the_error(call, llava, sae):
    result = call("white", "w5", "--latent", "39=0.8", "--mode", "balanced", "--json")
    assert result.exit_code == 0, result.output
    (steered,) = json.loads(result.stdout)["steered"]
    edit = LatentEdit(39, "balanced", 0.8)
    assert steered["intervention"]["error"] == "keep"
    assert steered["answer"] == llava.answer(
        white(), "w5", [Intervention(load_sae(sae), (edit,), "keep", max_token=MAX_TOKEN)], 6
    )
    plain = call("white", "w5", "--latent", "39=0.8", "--mode", "balanced")
    assert "steered: latent 39 pushed by 0.8 of the length of tokens" in plain.stdout


def test_the_question_is_that_of_the_paper_unless_another_is_asked(call):
    result = call("white", "--latent", "39=25", "--json")
    assert json.loads(result.stdout)["prompt"] == "What is shown in this image? Use exactly one word!"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--latent", "-1=40"], ["latent is -1"]),
        (["--latent", "64=40"], ["latent is 64", "0 to 63"]),
        (["--latent", "star=40"], ["--latent star=40", "39=4x"]),
        (["--latent", "39"], ["--latent 39", "strength is missing"]),
        (["--latent", "39=nan"], ["strength of latent 39 is nan", "finite"]),
        (["--latent", "39=inf"], ["strength of latent 39 is inf", "finite"]),
        (["--latent", "39=much"], ["--latent 39=much", "'much' is not a strength"]),
        (["--latent", "0=4x"], ["latent 0", "never fired"]),
        (["--latent", "39=4", "--latent", "39=5"], ["latent 39 is edited twice"]),
        (["--latent", "39=4", "--mode", "boost"], ["mode is 'boost'", "set, add, scale, ablate"]),
        (["--latent", "39=4", "--mode", "ablate"], ["ablate takes none"]),
        (["--latent", "39=4x", "--mode", "mul"], ["cannot be used with scale"]),
        (["--latent", "39=4x", "--mode", "balanced"], ["cannot be used with balanced"]),
        (["--latent", "39=1", "--mode", "balanced", "--error", "drop"], ["error is 'drop'", "make it 'keep'"]),
        (["--latent", "0=1", "--mode", "balanced"], ["how present latent 0 is", "unknown or 0"]),
        (["--latent", "39=4", "--error", "ignore"], ["error is 'ignore'", "drop, keep"]),
        (["--latent", "39=4", "--token", "17"], ["tokens has 17", "0 to 16"]),
        (["--latent", "39=4", "--token", "-1"], ["tokens is [-1]"]),
        (["--latent", "39=4", "--sweep", "1x,2x"], ["--sweep already gives", "--latent 39"]),
        (["--latent", "39", "--sweep", "1x,,2x"], ["--sweep", "'' is not a strength"]),
        (["--latent", "39", "--sweep", "1x,nan"], ["strength of latent 39 is nan"]),
        (["--intervention", "x.json", "--latent", "39=4"], ["--intervention", "leave out --latent"]),
        (["--intervention", "x.json", "--region", "0,0,1,1"], ["--intervention", "--region"]),
        (["--latent", "39=4", "--region", "left"], ["--region left", "0,0,0.5,0.5"]),
        (["--latent", "39=4", "--region", "0,0,1"], ["rectangles of region", "[left, top, right, bottom]"]),
        (["--latent", "39=4", "--region", "0,0,28,28"], ["[0, 0, 28, 28]", "fractions of the image"]),
        (["--latent", "39=4", "--region", "0,0,0.1,1"], ["no patch", "4 × 4 patches"]),
        (["--latent", "39=4", "--mask", "nowhere.png"], ["mask of region is nowhere.png"]),
        (["--latent", "39=4", "--when", "star"], ["--when star", "7>20"]),
        (["--latent", "39=4", "--when", "7>much"], ["--when 7>much", "'much' is not a strength"]),
        (["--latent", "39=4", "--when", "64"], ["latent of when is 64", "0 to 63"]),
        (["--latent", "39=4", "--when", "0>1x"], ["latent 0", "never fired"]),
        (["--latent", "39=4", "--when", "7>-1"], ["above of when is -1"]),
        (["--latent", "39=4", "--dtype", "int8"], ["dtype is 'int8'", "bfloat16"]),
        (["--latent", "39=4", "--device", "cuda:99"], ["device is 'cuda:99'"]),
        ([], ["no latent", "--latent 39=40"]),
    ],
)
def test_options_that_cannot_be_are_refused(call, options, words):
    refused(call("white", "w1", *options), *words)


def test_only_a_region_is_edited_and_only_where_a_latent_fires(call, llava, sae, tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    photo.save(tmp_path / "photo.png")
    mask = np.zeros((20, 20), dtype=bool)
    mask[12:, :9] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    where = [
        "--region",
        "0.5,0,1,0.5",
        "--region",
        "0.2,0,0.5,0.3",
        "--mask",
        tmp_path / "mask.png",
        "--when",
        "7>0.1x",
    ]
    result = call(tmp_path / "photo.png", "w5", "--latent", "39=25", *where, "--json")
    assert result.exit_code == 0, result.output
    (steered,) = json.loads(result.stdout)["steered"]
    region = Region((Box(0.5, 0, 1, 0.5), Box(0.2, 0, 0.5, 0.3)), mask)
    condition = Condition(7, 0.1, "max")
    edit = (LatentEdit(39, "set", 25.0),)
    chain = [Intervention(load_sae(sae), edit, max_token=MAX_TOKEN, region=region, when=condition)]
    assert steered["answer"] == llava.answer(photo, "w5", chain, 6)
    assert steered["intervention"]["region"] == region.to_dict()
    assert steered["intervention"]["when"] == {"latent": 7, "above": 0.1, "unit": "max"}
    everywhere = llava.answer(photo, "w5", [Intervention(load_sae(sae), edit)], 6)
    assert steered["answer"] != everywhere
    (tmp_path / "same.json").write_text(json.dumps(steered["intervention"]))
    result = call(tmp_path / "photo.png", "w5", "--intervention", tmp_path / "same.json")
    assert "steered: latent 39 set to 25, in the region, where latent 7 is above 0.1 × max" in result.stdout
    assert steered["answer"] in result.stdout


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_region_is_one_of_the_upright_image(call, tmp_path, orientation):
    """By every EXIF orientation, of image and mask: the same answer, and not that of another region."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    mask = Image.new("L", (60, 40))
    mask.paste(255, (10, 20, 30, 40))
    (tmp_path / "photo.png").write_bytes(stored(upright, orientation, "PNG"))
    (tmp_path / "mask.png").write_bytes(stored(mask, orientation, "PNG"))
    upright.save(tmp_path / "upright.png")

    def steered(image: str, *where) -> str:
        result = call(tmp_path / image, "w5", "--latent", "39=25", *where, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["steered"][0]["answer"]

    expected = steered("upright.png", "--region", "0.16,0.5,0.5,1")
    assert steered("photo.png", "--region", "0.16,0.5,0.5,1") == expected
    assert steered("photo.png", "--mask", tmp_path / "mask.png") == expected
    assert steered("photo.png", "--region", "0.5,0,0.84,0.5") != expected


def test_an_image_that_is_no_image_is_refused(call, tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    refused(call(tmp_path / "text.png", "--latent", "39=4"), "text.png", "not an image", "white")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    refused(call(tmp_path / "broken.jpg", "--latent", "39=4"), "broken.jpg", "not a usable image")
    refused(call(tmp_path / "none.png", "--latent", "39=4"), "IMAGE is", "none.png", "cannot be read")
    refused(call(tmp_path, "--latent", "39=4"), "IMAGE is", "cannot be read")
    refused(call("https://example.com/cat.jpg", "--latent", "39=4"), "https://example.com", "cannot be opened")


def test_an_intervention_file_that_cannot_be_is_refused(call, tmp_path):
    path = tmp_path / "intervention.json"
    refused(call("white", "--intervention", path), "--intervention is", "cannot be read")
    for text, words in (
        ("{", ["--intervention is", "not valid JSON"]),
        ("[]", ["must be a table"]),
        ('{"edits": [], "eror": "keep"}', ["unknown key 'eror'", "did you mean 'error'"]),
        ('{"edits": [{"latent": 3, "strenght": 4}]}', ["edits[0]", "unknown key 'strenght'", "'strength'"]),
        ('{"edits": [{"latent": 3, "strength": NaN}]}', ["strength of latent 3 is nan"]),
    ):
        path.write_text(text)
        refused(call("white", "--intervention", path), *words)


def test_models_that_do_not_fit_are_refused(call, tiny_clip, tmp_path):
    latent = ["--latent", "39=4"]
    (tmp_path / "empty").mkdir()
    refused(call("white", *latent, llava=str(tmp_path / "empty")), "empty", "a LLaVA is named by")
    refused(call("white", *latent, llava=tiny_clip), "of the model type clip, not llava")
    refused(call("white", *latent, sae=str(tmp_path / "empty")), "is not an SAE")
    narrow = save_random_sae(tmp_path / "narrow", d_in=16)
    refused(call("white", *latent, sae=narrow), "d_in = 16", "32 wide", "layer1")
    refused(call("white", "--latent", "39=4x", sae=narrow), "max_token, which is unknown", "latents.parquet")
    (tmp_path / "narrow" / "sae_weights.safetensors").write_bytes(b"\x08\0\0torn")
    refused(call("white", *latent, sae=narrow), "damaged", code=1)
