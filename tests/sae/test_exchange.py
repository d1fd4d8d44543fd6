"""SAEs of other libraries, and ours for them. What these compute is in tests/golden/forms (tools/peers.py)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.sae import SAE, export_sae, load_sae, save_sae
from sae_ray.sae.architectures import ARCHITECTURES
from sae_ray.store.files import Folder
from tests.sae.test_formats import inputs, make_sae

GOLDEN = Path(__file__).parents[1] / "golden" / "forms"
FORMS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
EQUAL = {"rtol": 1e-5, "atol": 1e-5}
OTHER_CLASS = ("dictionary_learning-AutoEncoder", "overcomplete-batchtopk")
"""Their SAEs are written as another class, which computes the same."""


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    for file in folder.iterdir():
        if file.name in ("ae.pt", "sae.pt"):
            return torch.load(file, weights_only=True)
        if file.name == "sae.safetensors":
            return load_file(file)
    raise AssertionError(f"{folder} has no weights")


@pytest.mark.parametrize("form", FORMS)
def test_it_computes_what_its_library_computes(form):
    theirs = load_file(GOLDEN / form / "computed.safetensors")
    sae = load_sae(GOLDEN / form)
    codes = sae.encode(theirs["x"])
    torch.testing.assert_close(codes, theirs["codes"], **EQUAL)
    assert torch.equal((codes > 0).sum(1), (theirs["codes"] > 0).sum(1))
    torch.testing.assert_close(sae.decode(sae.encode_sparse(theirs["x"])), theirs["reconstruction"], **EQUAL)
    assert 0 < (codes > 0).sum() < codes.numel()


@pytest.mark.parametrize("form", [form for form in FORMS if form not in OTHER_CLASS])
def test_what_is_written_is_what_its_library_writes(form, tmp_path):
    """So that it opens what we write as it opens its own."""
    export_sae(load_sae(GOLDEN / form), Folder(tmp_path), form.partition("-")[0])
    ours, theirs = weights_of(tmp_path), weights_of(GOLDEN / form)
    assert {name: (one.shape, one.dtype) for name, one in ours.items()} == {
        name: (one.shape, torch.int32 if name == "k" else one.dtype) for name, one in theirs.items()
    }
    for name, one in theirs.items():
        torch.testing.assert_close(ours[name].to(one.dtype), one, **EQUAL)
    config = "cfg.json" if form == "sparsify" else "config.json"
    ours, theirs = (json.loads((folder / config).read_text()) for folder in (tmp_path, GOLDEN / form))
    if form.startswith("dictionary_learning"):
        ours, theirs = ours["trainer"], theirs["trainer"]
    assert {key: ours[key] for key in theirs if key != "expansion_factor"} == {
        key: value for key, value in theirs.items() if key != "expansion_factor"
    }


@pytest.mark.parametrize("library", ["saelens", "dictionary_learning", "sparsify", "overcomplete"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_keeps_its_codes_or_is_refused(name, library, tmp_path):
    sae, x = make_sae(name, metadata={"group_sizes": [4, 8, 12]}), inputs()
    centred = library == "overcomplete"
    if name == "guided_topk" or (library == "sparsify" and name != "topk"):
        with pytest.raises(UsageError, match=f"architecture = '{name}': "):
            export_sae(sae, Folder(tmp_path), library, centred)
        assert not list(tmp_path.iterdir())
        return
    export_sae(sae, Folder(tmp_path), library, centred)
    if library == "dictionary_learning" and sae.threshold is not None:  # its thresholds differ, and its norms are not 1
        with pytest.warns(UserWarning, match=r"as dictionary_learning 0\.1\.0 does"):
            again = load_sae(tmp_path)
    else:
        again = load_sae(tmp_path)
    codes = sae.encode(x)
    torch.testing.assert_close(again.encode(x), codes, **EQUAL)
    torch.testing.assert_close(again.decode(codes), sae.decode(codes), **EQUAL)


@pytest.mark.parametrize(
    ("name", "kept"), [("batch_topk", "batch_topk"), ("guided_batch_topk", "batch_topk"), ("random", "batch_topk"),
                       ("matryoshka_batch_topk", "matryoshka_batch_topk")],
)  # fmt: skip
def test_one_threshold_for_all_latents_stays_one(name, kept, tmp_path):
    sae = make_sae(name, metadata={"cell": {"settings": {"group_fractions": [0.25, 0.75]}}} if "mat" in name else None)
    assert sae.threshold is not None
    sae.threshold.fill_(0.7)
    export_sae(sae, Folder(tmp_path), "dictionary_learning")
    again = load_sae(tmp_path)
    assert (again.architecture, again.k) == (kept, 3)
    assert weights_of(tmp_path)["threshold"].shape == ()
    assert again.metadata.get("group_sizes") == ([6, 18] if "mat" in name else None)
    assert torch.equal(again.encode(inputs()), sae.encode(inputs()))


@pytest.mark.parametrize("threshold", [0.0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("library", ["dictionary_learning", "overcomplete"])
def test_a_value_that_equals_the_threshold_is_no_code(library, threshold, tmp_path):
    """Whole numbers, which are exact."""
    eye, zeros = torch.eye(4), torch.zeros(4)
    sae = SAE("jumprelu", eye, eye, zeros, zeros, torch.full((4,), threshold))
    export_sae(sae, Folder(tmp_path), library)
    x = torch.arange(0.0, 5.0)[:, None].repeat(1, 4)
    expected = torch.where(x > threshold, x, 0)
    assert torch.equal(sae.encode(x), expected)
    assert torch.equal(load_sae(tmp_path).encode(x), expected)
    if library == "overcomplete":  # which keeps what reaches the exponential of its threshold
        reached = weights_of(tmp_path)["thresholds"].exp()
        assert torch.equal(torch.where(x >= reached, x, 0), expected)


def test_what_overcomplete_cannot_say_is_named(tmp_path):
    sae = make_sae("topk")
    with pytest.raises(UsageError, match=r"b_dec has the norm .*overcomplete's decoder has no bias; with --centred"):
        export_sae(sae, Folder(tmp_path), "overcomplete")
    with pytest.raises(UsageError, match="centred = True: sparsify subtracts b_dec itself"):
        export_sae(sae, Folder(tmp_path), "sparsify", centred=True)
    with pytest.raises(UsageError, match="library = 'prisma': it is one of saelens, "):
        export_sae(sae, Folder(tmp_path), "prisma")
    export_sae(sae, Folder(tmp_path), "overcomplete", centred=True)
    assert json.loads((tmp_path / "config.json").read_text())["centre"] == sae.b_dec.tolist()
    assert torch.equal(load_sae(tmp_path).b_dec, sae.b_dec)


def visaebench(folder: Path, activation: str, key: str = "activation", **config) -> SAE:
    """An SAE as ViSAEBench's repositories hold it, and what its reader computes of it."""
    sae = make_sae("topk" if activation == "topk" else "jumprelu")
    tensors = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc, "decoder.weight": sae.W_dec}
    tensors["decoder.bias"] = sae.b_dec
    if activation == "jumprelu":
        tensors["jump_thresholds"] = sae.threshold
    torch.save({name: one.clone() for name, one in tensors.items()}, folder / "sae.pt")
    (folder / "config.json").write_text(json.dumps({key: activation, "input_dim": 8, "hidden_dim": 24, **config}))
    return sae


@pytest.mark.parametrize(
    ("activation", "config"),
    [("topk", {"k": 3}), ("batchtopk", {"k": 3, "threshold": 0.5}), ("jumprelu", {}), ("BatchTopK", {"threshold": 0})],
)
@pytest.mark.parametrize("key", ["activation", "sae_type"])
def test_saes_of_visaebench_open(activation, config, key, tmp_path):
    made = visaebench(tmp_path, activation, key, **config)
    pre = (inputs() @ made.W_enc + made.b_enc).relu()  # it subtracts nothing
    expected = {
        "topk": pre * (pre >= pre.topk(3).values[:, -1:]),
        "batchtopk": pre * (pre >= config.get("threshold", 0)),
        "jumprelu": pre * (pre > made.threshold) if made.threshold is not None else pre,
    }[activation.lower()]
    sae = load_sae(tmp_path)
    torch.testing.assert_close(sae.encode(inputs()), expected, **EQUAL)
    torch.testing.assert_close(sae.decode(expected), expected @ made.W_dec + made.b_dec, **EQUAL)
    assert sae.architecture == {"topk": "topk", "batchtopk": "batch_topk", "jumprelu": "jumprelu"}[activation.lower()]
    saved = torch.load(tmp_path / "sae.pt", weights_only=True)
    (tmp_path / "sae.pt").unlink()
    save_file({name: one.contiguous() for name, one in saved.items()}, tmp_path / "model.safetensors")
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.yaml").write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    assert torch.equal(load_sae(tmp_path / "model.safetensors").encode(inputs()), sae.encode(inputs()))


@pytest.mark.parametrize(
    ("form", "changes", "said"),
    [
        (
            "sparsify",
            {"activation": "groupmax"},
            "activation = 'groupmax': cannot be opened, since sae-ray has no gr",
        ),
        ("sparsify", {"transcode": True}, "transcode = True: cannot be opened, since it predicts another activation"),
        ("sparsify", {"skip_connection": True}, "skip_connection = True"),
        ("sparsify", {"k": None}, "k = None: not a whole number"),
        ("overcomplete-topk", {"activation": "gelu"}, "activation = 'gelu': not known; it is one of topk, batchtopk"),
        ("overcomplete-topk", {"k": 2.5}, "k = 2.5: not a whole number"),
        ("overcomplete-topk", {"k": None}, "k = None: a topk SAE of 24 latents needs a k"),
        ("overcomplete-topk", {"normalization": "l1"}, "normalization = 'l1': make it identity or l2"),
        ("overcomplete-batchtopk", {"threshold": None}, "has no threshold, without which it would keep every"),
        ("overcomplete-topk", {"activation": "jumprelu"}, "has no thresholds, neither as"),
        ("overcomplete-jumprelu", {"activation": "relu"}, "also holds ['thresholds'], which a relu SAE does not"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(form, changes, said, tmp_path):
    shutil.copytree(GOLDEN / form, tmp_path / "sae")
    file = tmp_path / "sae" / ("cfg.json" if form == "sparsify" else "config.json")
    config = {key: value for key, value in (json.loads(file.read_text()) | changes).items() if value is not None}
    file.write_text(json.dumps(config))
    with pytest.raises(UsageError, match=re.escape(said)):
        load_sae(tmp_path / "sae")


def test_other_tensors_and_damaged_files_are_named(tmp_path):
    for form in ("sparsify", "overcomplete-topk"):
        shutil.copytree(GOLDEN / form, tmp_path / form)
    save_file({"W_dec": torch.zeros(24, 8)}, tmp_path / "sparsify" / "sae.safetensors")
    with pytest.raises(UsageError, match=r"sae\.safetensors holds the tensors \['W_dec'\], but must hold exactly"):
        load_sae(tmp_path / "sparsify")
    (tmp_path / "sparsify" / "cfg.json").unlink()
    with pytest.raises(SaeRayError, match=r"is an SAE of sparsify, but has no cfg\.json"):
        load_sae(tmp_path / "sparsify" / "sae.safetensors")
    batch_norm = torch.load(GOLDEN / "overcomplete-topk" / "sae.pt", weights_only=True)
    torch.save({f"{name}.1": one for name, one in batch_norm.items()}, tmp_path / "overcomplete-topk" / "sae.pt")
    with pytest.raises(UsageError, match="which make no SAE with a linear encoder of overcomplete or ViSAEBench"):
        load_sae(tmp_path / "overcomplete-topk")
    for data, said in ((b'{"schema": 2}\n', "as an SAE of saev does"), (b"<!DOCTYPE html><html>", "is an HTML page")):
        (tmp_path / "overcomplete-topk" / "sae.pt").write_bytes(data)
        with pytest.raises(SaeRayError, match=said):
            load_sae(tmp_path / "overcomplete-topk")


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("relu", {"hook_point": "blocks.8.hook_resid_pre", "architecture": "standard"}),
        ("relu", {"hook_name": "blocks.8.hook_resid_pre", "activation_fn_str": "relu", "apply_b_dec_to_input": False}),
        ("relu", {"hook_name": "blocks.8.hook_resid_pre", "normalize_activations": False}),
        ("topk", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "hook_name": "x"}),
        ("jumprelu", {"architecture": "jumprelu", "activation_fn_str": "relu", "sae_lens_version": "3.22.2"}),
    ],
)
def test_directories_of_sae_lens_before_6_open(kind, config, tmp_path):
    """As most releases on the hub still have them; SAELens 6 converts them when it opens them."""
    import sae_lens

    sae = make_sae(kind)
    save_sae(sae, Folder(tmp_path))
    common = {"d_in": 8, "d_sae": 24, "dtype": "torch.float32", "model_name": "vit", "finetuning_scaling_factor": False}
    (tmp_path / "cfg.json").write_text(json.dumps(common | config))
    if kind == "relu":
        tensors = load_file(tmp_path / "sae_weights.safetensors")
        save_file(tensors | {"scaling_factor": torch.ones(24)}, tmp_path / "sae_weights.safetensors")
    opened, theirs = load_sae(tmp_path), sae_lens.SAE.load_from_disk(tmp_path, dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(opened.encode(inputs()), theirs.encode(inputs()), **EQUAL)
        torch.testing.assert_close(opened.decode(opened.encode(inputs())), theirs(inputs()), **EQUAL)
    assert opened.architecture == kind
    assert opened.metadata["sae_lens"]["model_name"] == "vit"
    for key, value in (("normalize_activations", True), ("activation_fn_str", "tanh-relu")):
        (tmp_path / "cfg.json").write_text(json.dumps(common | config | {"activation_fn_kwargs": {}, key: value}))
        with pytest.raises(UsageError, match=key.removesuffix("_str") + " = "):
            load_sae(tmp_path)
