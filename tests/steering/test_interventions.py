"""Interventions against the formulas written out for dense codes, and what they refuse."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from sae_ray.encoders.resizing import WHOLE
from sae_ray.errors import SaeRayError, UsageError
from sae_ray.sae import SAE
from sae_ray.sae.architectures import ARCHITECTURES
from sae_ray.steering import Box, Condition, Intervention, LatentEdit, Region, load_max_token
from sae_ray.steering.interventions import edit_each
from sae_ray.store.files import Folder
from tests.steering.test_regions import TOWER

D_IN, D_SAE, N = 6, 12, 5


def random_sae(architecture: str = "batch_topk", seed: int = 0, d_in: int = D_IN, d_sae: int = D_SAE) -> SAE:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return SAE(
        architecture,
        normal(d_in, d_sae),
        normal(d_sae, d_in),
        normal(d_sae) / 2,
        normal(d_in),
        threshold=normal(d_sae).abs() if ARCHITECTURES[architecture].has_threshold else None,
        k=3 if ARCHITECTURES[architecture].latents_compete else None,
    )


def tokens_of(seed: int, n: int = N, d_in: int = D_IN) -> torch.Tensor:
    return 2 * torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def written_out(intervention: Intervention, x: torch.Tensor) -> torch.Tensor:
    """METHODS in dense codes: encode, edit, decode; all tokens at once, then only those that are chosen."""
    sae = intervention.sae
    codes = sae.encode(x.float())
    W_dec = sae.W_dec.to(codes)
    mine = [edit.latent for edit in intervention.edits]
    edited = torch.zeros_like(codes) if intervention.isolate else codes.clone()
    edited[:, mine] = codes[:, mine]
    for edit in intervention.edits:
        strength = edit.strength * (intervention.max_token[edit.latent].item() if edit.unit == "max" else 1)
        a = edited[:, edit.latent]
        edited[:, edit.latent] = {
            "set": torch.full_like(a, strength),
            "add": a + strength,
            "scale": a * strength,
            "ablate": torch.zeros_like(a),
        }[edit.mode]
    rows = x.float()
    spread, mean = (rows.std(1, keepdim=True), rows.mean(1, keepdim=True)) if sae.kind.standardises_rows else (1, 0)
    replaced, corrected = (edited @ W_dec + sae.b_dec) * spread + mean, rows + spread * ((edited - codes) @ W_dec)
    result = replaced if intervention.error == "drop" else corrected
    chosen = torch.full((len(x), 1), intervention.tokens is None)
    chosen[list(intervention.tokens or ())] = True
    if intervention.when is not None:
        when = intervention.when
        above = when.above * (intervention.max_token[when.latent].item() if when.unit == "max" else 1)
        chosen &= codes[:, [when.latent]] > above
    return torch.where(chosen, result.to(x.dtype), x)


@st.composite
def interventions(draw) -> Intervention:
    edits = []
    for latent in draw(st.lists(st.integers(0, D_SAE - 1), unique=True, max_size=4)):
        mode = draw(st.sampled_from(["set", "add", "scale", "ablate"]))
        strength = 0.0 if mode == "ablate" else draw(st.floats(-20, 20, width=32))
        unit = draw(st.sampled_from(["absolute", "max"])) if mode in ("set", "add") else "absolute"
        edits.append(LatentEdit(latent, mode, strength, unit))
    seed = draw(st.integers(0, 1000))
    return Intervention(
        random_sae(draw(st.sampled_from(list(ARCHITECTURES))), seed),
        tuple(edits),
        error=draw(st.sampled_from(["drop", "keep"])),
        isolate=draw(st.booleans()),
        tokens=draw(st.none() | st.lists(st.integers(0, N - 1), unique=True, min_size=1).map(tuple)),
        max_token=torch.rand(D_SAE, generator=torch.Generator().manual_seed(seed)) + 0.1,
        when=draw(st.none() | conditions()),
    )


def conditions() -> st.SearchStrategy[Condition]:
    above = st.just(0.0) | st.floats(0, 4, width=32)
    return st.builds(Condition, st.integers(0, D_SAE - 1), above, st.sampled_from(["absolute", "max"]))


@given(interventions(), st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_an_intervention_is_the_formula(intervention, seed, dtype):
    x = tokens_of(seed).to(dtype)
    before = x.clone()
    result = intervention(x)
    assert result.dtype == dtype
    assert torch.equal(x, before)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(result, written_out(intervention, x), rtol=tolerance, atol=tolerance)


@given(st.data())
def test_images_edited_together_are_as_if_alone(data):
    """Of two SAEs, of every kind, of several chosen tokens and numbers of them."""
    saes = [random_sae(data.draw(st.sampled_from(list(ARCHITECTURES))), seed) for seed in range(2)]
    own = [
        replace(one, sae=data.draw(st.sampled_from(saes))) for one in data.draw(st.lists(interventions(), max_size=6))
    ]
    images = [tokens_of(seed, N + seed % 3) for seed in range(len(own))]
    before = [x.clone() for x in images]
    together = edit_each(own, images)
    assert all(torch.equal(x, old) for x, old in zip(images, before, strict=True))
    for one, x, found in zip(own, images, together, strict=True):
        torch.testing.assert_close(found, one(x), rtol=1e-5, atol=1e-5)


@given(interventions(), conditions(), st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_where_the_condition_does_not_hold_every_bit_stays(intervention, when, seed, dtype):
    x = tokens_of(seed, 40).to(dtype)
    intervention = replace(intervention, when=when, tokens=None)
    above = when.threshold(intervention.max_token)
    holds = intervention.sae.encode(x.float())[:, when.latent] > above
    result = intervention(x)
    assert torch.equal(result[~holds], x[~holds])
    everywhere = replace(intervention, when=None)(x)
    torch.testing.assert_close(result[holds], everywhere[holds], rtol=1e-5, atol=1e-5)
    if intervention.isolate and intervention.error == "drop":
        assert not any(torch.equal(new, old) for new, old in zip(result[holds], x[holds], strict=True))


def test_a_region_is_that_of_the_image():
    """4 × 6 patches behind a CLS token, as in the tests of regions."""
    sae, x = random_sae(), tokens_of(0, 25)
    edit = Intervention(sae, (LatentEdit(3, "set", 7.0),), region=Region((Box(0, 0, 0.5, 0.5),)))
    with pytest.raises(UsageError, match="region needs the image"):
        edit(x)
    found = edit.at(WHOLE, TOWER)
    assert (found.region, found.tokens) == (None, (1, 2, 3, 7, 8, 9))
    assert torch.equal(found(x)[[0, *range(10, 25)]], x[[0, *range(10, 25)]])
    assert edit.at(Box(0, 0, 1, 0.5), TOWER).tokens == (1, 2, 3, 7, 8, 9, 13, 14, 15, 19, 20, 21)
    assert replace(edit, tokens=(0, 12, 9, 1)).at(WHOLE, TOWER).tokens == (9, 1)
    with pytest.raises(UsageError, match=r"none of tokens \[0, 12\] lies in region, which has \[1, 2"):
        replace(edit, tokens=(0, 12)).at(WHOLE, TOWER)
    plain = Intervention(sae, tokens=(3,))
    assert plain.at(WHOLE, TOWER) is plain


@pytest.mark.gpu
@pytest.mark.parametrize("tower", ["cuda", "cpu"])
@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("error", ["drop", "keep"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_intervention_on_a_gpu_is_the_formula(architecture, error, isolate, tower):
    """With every mode, on all tokens and on some, and whichever device the tokens come from."""
    sae = random_sae(architecture)
    top = torch.linspace(0.5, 6, D_SAE, dtype=torch.float64)  # stays where `load_max_token` puts it
    edits = (LatentEdit(0, "set", -3.0), LatentEdit(4, "set", 2.0, "max"), LatentEdit(5, "add", 0.5, "max"),
             LatentEdit(7, "scale", 3.0), LatentEdit(11, "ablate"))  # fmt: skip
    for tokens, when in ((None, None), ((4, 1), None), ((4, 1, 2), Condition(1, 0.05, "max"))):
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
            x = tokens_of(1).to(dtype)
            settings = {"error": error, "isolate": isolate, "tokens": tokens, "max_token": top, "when": when}
            result = Intervention(sae.to("cuda"), edits, **settings)(x.to(tower))
            assert (result.device.type, result.dtype) == (tower, dtype)
            expected = written_out(Intervention(sae, edits, **settings), x)
            torch.testing.assert_close(result.cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeping_the_error_an_edit_that_changes_nothing_leaves_every_bit(architecture, dtype, device):
    sae, x = random_sae(architecture).to(device), tokens_of(1).to(device, dtype)
    nothing = [(), (LatentEdit(3, "add", 0.0),), (LatentEdit(3, "scale", 1.0), LatentEdit(7, "add"))]
    for edits in nothing:
        assert torch.equal(Intervention(sae, edits, "keep")(x), x)
    inactive = [latent for latent in range(D_SAE) if not sae.encode(x)[:, latent].any()]
    assert torch.equal(Intervention(sae, tuple(LatentEdit(one, "ablate") for one in inactive), "keep")(x), x)
    assert not torch.equal(Intervention(sae, (LatentEdit(3, "add", 5.0),), "keep")(x), x)


def test_without_edits_dropping_the_error_is_the_reconstruction():
    sae, x = random_sae(), tokens_of(2)
    torch.testing.assert_close(Intervention(sae)(x), sae.decode(sae.encode(x)))
    torch.testing.assert_close(Intervention(sae, isolate=True)(x), sae.b_dec.expand(N, D_IN))


def test_a_strength_in_multiples_is_that_many_times_the_maximum():
    sae, x, top = random_sae(), tokens_of(3), torch.linspace(0.5, 6, D_SAE, dtype=torch.float64)
    relative = Intervention(sae, (LatentEdit(4, "set", 4, "max"),), max_token=top)
    assert torch.equal(relative(x), Intervention(sae, (LatentEdit(4, "set", 4 * top[4].item()),))(x))


def test_a_wide_sae_on_the_tokens_of_a_large_tower():
    """65 536 latents, about 20 of them active, on 577 tokens."""
    sae = random_sae(d_in=16, d_sae=65_536)
    x = tokens_of(4, 577, 16)
    top = (x - sae.b_dec) @ sae.W_enc[:, :1024] + sae.b_enc[:1024]
    sae = SAE(
        "jumprelu", sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, torch.full((65_536,), top.quantile(0.9997).item())
    )
    assert 5 < len(sae.encode_sparse(x).values) / 577 < 80
    edits = (LatentEdit(65_535, "set", 30.0), LatentEdit(12, "scale", 3.0), LatentEdit(40_000, "ablate"))
    for error in ("drop", "keep"):
        intervention = Intervention(sae, edits, error)
        torch.testing.assert_close(
            intervention(x)[100:103], written_out(intervention, x[100:103]), rtol=1e-4, atol=1e-3
        )


def test_weights_of_another_precision():
    intervention = Intervention(random_sae(), (LatentEdit(3, "set", 7.0),))
    x = tokens_of(5)
    for dtype in (torch.float64, torch.bfloat16):
        other = Intervention(intervention.sae.to(dtype=dtype), intervention.edits)
        result = other(x)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, written_out(other, x), rtol=1e-4, atol=1e-4)


def test_plain_values_there_and_back():
    values = {
        "edits": [
            {"latent": 3, "mode": "set", "strength": 4.0, "unit": "max"},
            {"latent": 5, "mode": "ablate", "strength": 0.0, "unit": "absolute"},
        ],
        "error": "keep",
        "isolate": True,
        "tokens": [0, 4],
        "region": {"rectangles": [[0.0, 0.25, 0.5, 1.0]]},
        "when": {"latent": 7, "above": 0.5, "unit": "max"},
    }
    intervention = Intervention.from_dict(values, random_sae(), torch.ones(D_SAE))
    assert intervention.edits == (LatentEdit(3, "set", 4.0, "max"), LatentEdit(5, "ablate"))
    assert intervention.to_dict() == values
    assert Intervention.from_dict({}, random_sae()).to_dict() == {
        "edits": [],
        "error": "drop",
        "isolate": False,
        "tokens": None,
        "region": None,
        "when": None,
    }


@pytest.mark.parametrize(
    ("alias", "mode"),
    [("pin", "set"), ("clamp", "set"), ("nudge", "add"), ("mul", "scale"), ("suppress", "ablate"), ("add", "add")],
)
def test_modes_go_by_the_names_of_other_apis(alias, mode):
    strength = {} if mode == "ablate" else {"strength": 2}
    made = Intervention.from_dict({"edits": [{"latent": 1, "mode": alias} | strength]}, random_sae())
    assert made.edits == (LatentEdit(1, mode, strength.get("strength", 0.0)),)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"latent": -1}, "latent is -1"),
        ({"latent": D_SAE}, "latent is 12; the SAE has latents 0 to 11"),
        ({"latent": True}, "latent is True"),
        ({"latent": 1.0}, "latent is 1.0"),
        ({}, "latent is missing"),
        (7, "must be a table"),
        ({"latent": 1, "strength": math.nan}, "strength of latent 1 is nan"),
        ({"latent": 1, "strength": -math.inf}, "strength of latent 1 is -inf"),
        ({"latent": 1, "strength": 1e300}, "finite in float32"),
        ({"latent": 1, "strength": 10**400}, "finite in float32"),
        ({"latent": 1, "strength": "40"}, "strength of latent 1 is '40'; it must be a number"),
        ({"latent": 1, "mode": "boost"}, "mode is 'boost'; it must be one of set, add, scale, ablate"),
        ({"latent": 1, "mode": ["set"]}, "mode is"),
        ({"latent": 1, "unit": "x"}, "unit is 'x'"),
        ({"latent": 1, "mode": "ablate", "strength": 2}, "ablate takes none"),
        ({"latent": 1, "mode": "scale", "strength": 2, "unit": "max"}, "cannot be used with scale"),
        ({"latent": 2, "strength": 2, "unit": "max"}, "latent 2 .* never fired"),
        ({"latent": 1, "strenght": 2}, "unknown key 'strenght'; did you mean 'strength'"),
    ],
)
def test_edits_that_cannot_be_are_refused(edit, words):
    top = torch.ones(D_SAE)
    top[2] = 0
    with pytest.raises(UsageError, match=words):
        Intervention.from_dict({"edits": [edit]}, random_sae(), top)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"error": "ignore"}, "error is 'ignore'; it must be one of drop, keep"),
        ({"isolate": 1}, "isolate is 1"),
        ({"tokens": [-1]}, r"tokens is \[-1\]"),
        ({"tokens": []}, r"tokens is \[\]"),
        ({"tokens": 3}, "tokens is 3"),
        ({"edits": {"latent": 1}}, "edits is .* must be a list"),
        ({"edits": [{"latent": 1}, {"latent": 1, "mode": "ablate"}]}, "latent 1 is edited twice"),
        ({"edits": [{"latent": 1, "strength": 2, "unit": "max"}]}, "max_token, which is unknown"),
        ({"features": []}, "unknown key 'features'; known keys: edits, error, isolate, tokens, region, when"),
        ({"region": {}}, "region is empty"),
        ({"when": 7}, "when is 7; it must be a table"),
        ({"when": {}}, "when: latent is missing"),
        ({"when": {"latent": D_SAE}}, "latent of when is 12; the SAE has latents 0 to 11"),
        ({"when": {"latent": -1}}, "latent of when is -1"),
        ({"when": {"latent": 1, "over": 2}}, "when has the unknown key 'over'"),
        ({"when": {"latent": 1, "above": -0.5}}, "above of when is -0.5"),
        ({"when": {"latent": 1, "above": math.nan}}, "above of when is nan"),
        ({"when": {"latent": 1, "above": 10**400}}, "above of when is 1"),
        ({"when": {"latent": 1, "above": "1x"}}, "above of when is '1x'"),
        ({"when": {"latent": 1, "unit": "x"}}, "unit of when is 'x'"),
        ({"when": {"latent": 1, "above": 1, "unit": "max"}}, "above of latent 1 .* max_token, which is unknown"),
        ([], "must be a table"),
    ],
)
def test_interventions_that_cannot_be_are_refused(values, words):
    with pytest.raises(UsageError, match=words):
        Intervention.from_dict(values, random_sae())


def test_what_does_not_fit_the_tokens_is_refused():
    for error in ("drop", "keep"):
        with pytest.raises(UsageError, match="6 wide"):
            Intervention(random_sae(d_in=4), (LatentEdit(3),), error)(tokens_of(0))
    with pytest.raises(UsageError, match="tokens has 5; there are only tokens 0 to 4"):
        Intervention(random_sae(), tokens=(1, 5))(tokens_of(0))
    with pytest.raises(UsageError, match=r"max_token has shape \[3\]"):
        Intervention(random_sae(), max_token=torch.ones(3))


@pytest.fixture(scope="module")
def gsae() -> tuple[SAE, dict[str, torch.Tensor]]:
    """The SAE of the golden data of G-SAE, and what its reference steers with it."""
    golden = load_file(Path(__file__).parents[1] / "golden" / "gsae.safetensors")
    weights = (golden["init.encoder_weight"].T, golden["init.decoder_weight"].T)
    biases = (golden["init.latent_bias"], golden["init.pre_bias"])
    return SAE("guided_topk", *(one.contiguous() for one in weights), *biases, k=5), golden


@pytest.mark.parametrize(("variant", "entries"), [("balanced", None), ("top6", 6)])
@pytest.mark.parametrize("strength", [-0.5, 0.4])
@pytest.mark.parametrize("latent", [0, 2])
def test_balanced_steering_is_that_of_the_reference(gsae, latent, strength, variant, entries):
    """Alone, on some tokens, and beside another image's edit of the same latent."""
    sae, golden = gsae
    expected = golden[f"steer.latent{latent}.alpha{strength}.{variant}"]
    edit = Intervention(sae, (LatentEdit(latent, "balanced", strength, entries=entries),), "keep")
    ablated = Intervention(sae, (LatentEdit(latent, "ablate"),), "keep")
    first, second = golden["steer.residual"]
    found = edit_each([edit, ablated, edit], [first, second, second])
    for ours, wanted in zip(found[::2], expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1], ablated(second))
    some = replace(edit, tokens=(2,))(first)
    assert torch.equal(some[:2], first[:2])
    torch.testing.assert_close(some[2], expected[0, 2], rtol=0, atol=1e-6)
    assert Intervention.from_dict(edit.to_dict(), sae).edits == edit.edits


def test_balanced_steering_of_other_saes_counts_in_multiples_of_the_maximum():
    sae, x, top = random_sae(), tokens_of(3), torch.full((D_SAE,), 2.0)
    direction = sae.W_dec[4] / sae.W_dec[4].norm()
    present = (sae.encode(x)[:, 4] / 2).clamp(max=1)
    assert 0 < (present > 0).sum() < N
    for strength, weight in ((0.7, 1 - present), (-0.7, present)):
        pushed = Intervention(sae, (LatentEdit(4, "balanced", strength),), "keep", max_token=top)(x)
        expected = x + (strength * weight * x.norm(dim=1)).unsqueeze(1) * direction
        torch.testing.assert_close(pushed, expected)


@pytest.mark.parametrize(
    ("edit", "values", "words"),
    [
        (
            {"strength": 1},
            {"error": "drop"},
            "error is 'drop'; balanced changes the activation itself, so make it 'keep'",
        ),
        ({"strength": 1}, {}, "how present latent 1 is, in multiples of its max_token, which is unknown or 0; give"),
        ({"strength": 1, "unit": "max"}, {}, "unit of latent 1 is 'max', which cannot be used with balanced"),
        ({"entries": 7}, {}, "entries of latent 1 is 7; a decoder row has 6"),
        ({"entries": 0}, {}, "entries of latent 1 is 0; give a number from 1"),
        ({"entries": True}, {}, "entries of latent 1 is True"),
        ({"mode": "set", "entries": 3}, {}, "entries of latent 1 is 3; give a number from 1, and the mode balanced"),
    ],
)
def test_balanced_steering_that_cannot_be_is_refused(edit, values, words):
    with pytest.raises(UsageError, match=words):
        Intervention.from_dict(
            {"error": "keep", **values, "edits": [{"latent": 1, "mode": "balanced"} | edit]}, random_sae()
        )


def test_max_token_comes_from_the_saes_directory(tmp_path):
    with pytest.raises(UsageError, match=r"has no latents\.parquet"):
        load_max_token(tmp_path)
    order = np.array([2, 0, 1])
    folder = Folder(tmp_path)
    folder.write_parquet("latents.parquet", pa.table({"latent": order, "max_token": order / 2}))
    assert load_max_token(tmp_path).tolist() == [0, 0.5, 1]
    folder.write_parquet("latents.parquet", pa.table({"latent": order}))
    with pytest.raises(SaeRayError, match="max_token"):
        load_max_token(folder)
    folder.write_bytes("latents.parquet", b"torn")
    with pytest.raises(SaeRayError, match="max_token"):
        load_max_token(str(tmp_path))


def test_importing_steering_is_light():
    code = "import sys, sae_ray.steering; print({'transformers', 'PIL', 'ray', 'open_clip'} & set(sys.modules))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
