"""SAEs on disk: our own round trip, SAELens itself, the reference's checkpoints, and what is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.sae import SAE, load_sae, save_sae
from sae_ray.sae.architectures import ARCHITECTURES
from sae_ray.store.files import Folder

GOLDEN = Path(__file__).parents[1] / "golden"


def make_sae(name: str, d_in: int = 8, d_sae: int = 24, seed: int = 0, metadata: dict | None = None) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(d_in, d_sae, generator=generator)
    return SAE(
        architecture=name,
        W_enc=W_enc,
        W_dec=W_enc.T.contiguous() + 0.1,
        b_enc=torch.randn(d_sae, generator=generator),
        b_dec=torch.randn(d_in, generator=generator),
        threshold=torch.rand(d_sae, generator=generator) if ARCHITECTURES[name].has_threshold else None,
        k=min(3, d_sae) if ARCHITECTURES[name].tuned_by == "k" else None,
        metadata=metadata or {},
    )


def inputs(d_in: int = 8) -> torch.Tensor:
    return torch.randn(50, d_in, generator=torch.Generator().manual_seed(1))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(
    name=st.sampled_from(list(ARCHITECTURES)),
    d_in=st.integers(1, 9),
    d_sae=st.integers(1, 20),
    seed=st.integers(0, 2**31),
    metadata=st.dictionaries(st.text(), json_values, max_size=3),
)
@settings(deadline=None, max_examples=50)
def test_what_is_saved_is_what_is_opened(tmp_path_factory, name, d_in, d_sae, seed, metadata):
    sae = make_sae(name, d_in, d_sae, seed, metadata)
    folder = Folder(tmp_path_factory.mktemp("sae"))
    save_sae(sae, folder)
    opened = load_sae(folder)
    for tensor in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        left, right = getattr(sae, tensor), getattr(opened, tensor)
        assert left is right is None or (torch.equal(left, right) and left.dtype == right.dtype)
    assert (sae.architecture, sae.k, sae.metadata) == (opened.architecture, opened.k, opened.metadata)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_files_hold_exactly_the_tensors_of_the_format(tmp_path, name):
    save_sae(make_sae(name), Folder(tmp_path))
    expected = {"W_enc": (8, 24), "W_dec": (24, 8), "b_enc": (24,), "b_dec": (8,)}
    if ARCHITECTURES[name].has_threshold:
        expected["threshold"] = (24,)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    assert {key: tuple(value.shape) for key, value in tensors.items()} == expected
    assert {value.dtype for value in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sae_lens_opens_our_directories(tmp_path, name):
    import sae_lens

    sae, x = make_sae(name, metadata={"site": "projection"}), inputs()
    save_sae(sae, Folder(tmp_path))
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        codes = theirs.encode(x)
        torch.testing.assert_close(sae.encode(x), codes)
        torch.testing.assert_close(sae.decode(sae.encode_sparse(x)), theirs.decode(codes))
    assert 0 < (codes > 0).sum() < codes.numel()
    assert theirs.cfg.metadata.sae_ray["facts"] == {"site": "projection"}
    assert theirs.cfg.metadata.sae_ray["architecture"] == name


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu"])
def test_directories_of_sae_lens_open(tmp_path, kind, apply_b_dec_to_input):
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

    sae_class, config_class, extra = {
        "standard": (StandardSAE, StandardSAEConfig, {}),
        "topk": (TopKSAE, TopKSAEConfig, {"k": 3}),
        "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
    }[kind]
    theirs = sae_class(config_class(d_in=8, d_sae=24, apply_b_dec_to_input=apply_b_dec_to_input, **extra))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(2))
        theirs.save_model(tmp_path)
        sae, x = load_sae(tmp_path), inputs()
        torch.testing.assert_close(sae.encode(x), theirs.encode(x))
        torch.testing.assert_close(sae.decode(sae.encode(x)), theirs(x))
    assert sae.k == extra.get("k")


def test_batch_topk_trained_in_sae_lens_opens_as_jumprelu(tmp_path):
    from sae_lens import SAE as TheirSAE
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    trained = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=8, d_sae=24, k=3))
    trained.topk_threshold.fill_(0.7)
    trained.save_inference_model(tmp_path)
    with torch.no_grad():
        sae, theirs, x = load_sae(tmp_path), TheirSAE.load_from_disk(tmp_path), inputs()
        torch.testing.assert_close(sae.encode(x), theirs.encode(x))
    assert sae.architecture == "jumprelu"
    assert sae.threshold is not None


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("architecture", "gated", "gated"),
        ("normalize_activations", "layer_norm", "layer_norm"),
        ("reshape_activations", "hook_z", "hook_z"),
        ("rescale_acts_by_decoder_norm", True, "fold_W_dec_norm"),
        ("metadata", {}, "SAELens 6"),
        ("metadata", {"sae_lens_version": "5.11.0"}, "SAELens 6"),
    ],
)
def test_other_conventions_are_refused_by_name(tmp_path, key, value, said):
    save_sae(make_sae("topk"), Folder(tmp_path))
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UsageError, match=said):
        load_sae(tmp_path)


@pytest.mark.parametrize("kind", ["gated", "batchtopk", ["topk"], None])
def test_other_architectures_of_sae_lens_are_refused_by_name(tmp_path, kind):
    save_sae(make_sae("topk"), Folder(tmp_path))
    config = json.loads((tmp_path / "cfg.json").read_text())
    theirs = {"sae_lens_version": config["metadata"]["sae_lens_version"]}
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"architecture": kind, "metadata": theirs}))
    said = rf"architecture {re.escape(repr(kind))} cannot be opened; known are topk, standard, jumprelu\. .* inference"
    with pytest.raises(UsageError, match=said):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("schema", 2, "schema = 2: this sae-ray reads schema 1; use the version that wrote it"),
        ("schema", None, "schema = None"),
        ("architecture", "topkk", "architecture = 'topkk': unknown architecture; did you mean 'topk'"),
        ("architecture", None, "architecture = None: unknown architecture"),
        ("architecture", ["topk"], "architecture = ['topk']: unknown architecture"),
        ("architecture", "relu", "architecture = 'topk': relu is stored as 'standard'"),
        ("k", "3", "k = '3': not a whole number"),
        ("k", None, "k = None: a topk SAE of 24 latents needs a k from 1 to 24"),
        ("k", 99, "k = 99: a topk SAE"),
        ("facts", [1], "facts = [1]: not an object"),
    ],
    ids=str,
)
@pytest.mark.parametrize("missing", [False, True])
def test_malformed_facts_of_ours_are_refused(tmp_path, key, value, said, missing):
    save_sae(make_sae("topk"), Folder(tmp_path))
    config = json.loads((tmp_path / "cfg.json").read_text())
    if missing:
        del config["metadata"]["sae_ray"][key]
        said = f"{key} = None"
    else:
        config["metadata"]["sae_ray"][key] = value
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=re.escape(said)):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"metadata": [1]}, {"metadata": "x"}, {"d_in": None}, {"d_sae": "24"}, {"sae_ray": []}, {"sae_ray": None}],
)
def test_a_configuration_of_another_form_is_refused(tmp_path, change):
    save_sae(make_sae("topk"), Folder(tmp_path))
    config = json.loads((tmp_path / "cfg.json").read_text())
    changed = {"metadata": config["metadata"] | change} if "sae_ray" in change else change
    (tmp_path / "cfg.json").write_text(json.dumps(config | changed))
    with pytest.raises(UsageError, match=next(iter(change))):
        load_sae(tmp_path)
    (tmp_path / "cfg.json").write_text("[]")
    with pytest.raises(UsageError, match="not a JSON object"):
        load_sae(tmp_path)


def test_damaged_and_missing_files_are_told_apart(tmp_path):
    with pytest.raises(UsageError, match=r"cfg\.json"):
        load_sae(tmp_path / "nothing")
    with pytest.raises(UsageError, match="does not exist"):
        load_sae(tmp_path / "nothing.pt")
    save_sae(make_sae("relu"), Folder(tmp_path))
    weights = tmp_path / "sae_weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SaeRayError, match="damaged"):
        load_sae(tmp_path)
    weights.unlink()
    with pytest.raises(SaeRayError, match="has no sae_weights"):
        load_sae(tmp_path)
    save_file({"W_enc": torch.zeros(8, 24)}, weights)
    with pytest.raises(UsageError, match="exactly"):
        load_sae(tmp_path)
    save_sae(make_sae("relu", d_sae=25), Folder(tmp_path / "other"))
    weights.write_bytes((tmp_path / "other/sae_weights.safetensors").read_bytes())
    with pytest.raises(SaeRayError, match="belong together"):
        load_sae(tmp_path)


@pytest.mark.parametrize("kind", ["batch_top_k", "matryoshka"])
def test_reference_checkpoint_without_a_threshold_is_refused(tmp_path, kind):
    saved = torch.load(GOLDEN / f"{kind}.ae.pt", weights_only=True)
    torch.save(saved | {"threshold": torch.tensor(-1.0)}, tmp_path / "early.pt")
    with pytest.raises(UsageError, match="never set"):
        load_sae(tmp_path / "early.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UsageError, match="encoder"):
        load_sae(tmp_path / "other.pt")


def test_pickled_code_is_never_run(tmp_path):
    torch.save({"threshold": math.sqrt, "W_enc": Path("x")}, tmp_path / "code.pt")
    with pytest.raises(SaeRayError, match="safely"):
        load_sae(tmp_path / "code.pt")


@pytest.mark.parametrize("kind", ["batch_top_k", "matryoshka"])
def test_reference_checkpoint_survives_the_native_format(tmp_path, kind):
    sae = load_sae(GOLDEN / f"{kind}.ae.pt")
    save_sae(sae, Folder(tmp_path))
    opened = load_sae(str(tmp_path))
    x = load_file(GOLDEN / f"{kind}.safetensors")["test.x"]
    assert torch.equal(opened.encode(x), sae.encode(x))
    assert opened.metadata == sae.metadata
