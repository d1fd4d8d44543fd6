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


@pytest.mark.parametrize(
    "name", [name for name, kind in ARCHITECTURES.items() if not kind.sae_lens.startswith("sae_ray_")]
)
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
    ],
)
def test_other_conventions_are_refused_by_name(tmp_path, key, value, said):
    save_sae(make_sae("topk"), Folder(tmp_path))
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UsageError, match=said):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("abstopk", "signed"),
        ("batchtopk", "save_inference_model"),
        ("gated", "gate"),
        ("jumprelu_skip_transcoder", "another activation"),
        ("matching_pursuit", "one after the other"),
        ("matryoshka_batchtopk", "save_inference_model"),
        ("skip_transcoder", "another activation"),
        ("temporal", "tokens before"),
        ("transcoder", "another activation"),
        ("batch_topk", "convert"),
        (["topk"], "convert"),
        (None, "convert"),
    ],
    ids=str,
)
def test_other_architectures_of_sae_lens_are_refused_by_name(tmp_path, kind, why):
    save_sae(make_sae("topk"), Folder(tmp_path))
    config = json.loads((tmp_path / "cfg.json").read_text())
    theirs = {"sae_lens_version": config["metadata"]["sae_lens_version"]}
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"architecture": kind, "metadata": theirs}))
    said = rf"architecture {re.escape(repr(kind))} cannot be opened; known are topk, standard, jumprelu\. .*{why}"
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
    with pytest.raises(UsageError, match=r"docs/sharing\.md"):
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


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a git-lfs pointer"),
        (b"<!DOCTYPE html><html>", "is an HTML page, not a file of tensors; fetch it again"),
        (b"", "is empty"),
    ],
)
def test_what_is_in_the_place_of_weights_is_named(tmp_path, data, said):
    (tmp_path / "ae.pt").write_bytes(data)
    with pytest.raises(SaeRayError, match=said):
        load_sae(tmp_path)
    save_sae(make_sae("relu"), Folder(tmp_path))
    (tmp_path / "sae_weights.safetensors").write_bytes(data)
    with pytest.raises(SaeRayError, match=said):
        load_sae(tmp_path / "cfg.json")


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


def changed_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | changes))


def theirs(folder: Path, name: str, **changes: object) -> Path:
    """A directory as SAELens itself would write it."""
    save_sae(make_sae(name), Folder(folder))
    changed_config(folder, metadata={"sae_lens_version": "6.54.0"}, **changes)
    return folder


def same_codes(left: SAE, right: SAE) -> bool:
    return torch.equal(left.encode(inputs(left.d_in)), right.encode(inputs(left.d_in)))


@pytest.mark.parametrize("named", ["cfg.json", "sae_weights.safetensors", ""])
def test_a_file_of_a_directory_stands_for_it(tmp_path, named):
    save_sae(make_sae("batch_topk"), Folder(tmp_path))
    assert same_codes(load_sae(tmp_path / named), make_sae("batch_topk"))


def test_the_folder_of_several_saes_names_them(tmp_path):
    saes = tmp_path / "me@home"
    for name in ("a", "b/trainer_0", "c/d/too_deep"):
        save_sae(make_sae("relu"), Folder(saes / name))
    torch.save({}, saes / "ae.tmp")
    with pytest.raises(UsageError, match=rf"the folder of 2: a, b/trainer_0; name one, such as {saes}/a$"):
        load_sae(saes)
    (tmp_path / "empty/deep").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"empty is not an SAE; name the folder of an SAE"):
        load_sae(tmp_path / "empty")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The hub's cache with one repository, as huggingface_hub lays it out, and no connection."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "cache/models--someone--saes"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    return repository / "snapshots" / ("0" * 40)


def test_an_sae_of_the_hub_opens_from_its_cache(hub):
    save_sae(make_sae("topk"), Folder(hub / "layer22"))
    for named in ("someone/saes/layer22", "someone/saes/layer22/cfg.json"):
        assert same_codes(load_sae(named), make_sae("topk"))
    with pytest.raises(UsageError, match=r"the folder of 1: layer22; name one"):
        load_sae("someone/saes")
    with pytest.raises(UsageError, match=r"someone/saes on the Hugging Face hub has no SAE at layer7"):
        load_sae("someone/saes/layer7")
    save_sae(make_sae("relu"), Folder(hub))
    assert same_codes(load_sae("someone/saes"), make_sae("relu"))


def test_an_sae_of_the_hub_that_is_not_cached_is_refused_with_the_remedy(hub):
    said = r"other/saes/layer22 is neither a file nor a folder here, and other/saes on the Hugging Face hub cannot be "
    with pytest.raises(UsageError, match=said + r"(.|\n)*fill the cache where there is a connection"):
        load_sae("other/saes/layer22")


def test_a_folder_here_comes_before_the_hub(hub):
    save_sae(make_sae("topk"), Folder(hub))
    save_sae(make_sae("relu"), Folder(Path("someone/saes")))
    assert load_sae("someone/saes").architecture == "relu"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 3}}, "activation_fn = 'topk'"),
        ({"activation_fn_str": "topk"}, "activation_fn_str = 'topk'"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor = True"),
        ({"apply_b_dec_to_input": "false"}, "apply_b_dec_to_input = 'false'"),
        ({"d_in": None}, r"d_in = None: not a width; correct it \(\[d_in, d_sae\] is the shape of W_enc\)"),
        ({"d_in": True}, "d_in = True"),
    ],
    ids=str,
)
def test_a_standard_sae_that_computes_something_else_is_refused(tmp_path, changes, said):
    theirs(tmp_path, "relu", activation_fn="relu", finetuning_scaling_factor=False)
    assert load_sae(tmp_path).architecture == "relu"
    changed_config(tmp_path, **changes)
    with pytest.raises(UsageError, match=said):
        load_sae(tmp_path)


@pytest.mark.parametrize("k", [True, 3.0, "3", None, 0])
def test_a_k_that_is_no_number_of_latents_is_refused(tmp_path, k):
    with pytest.raises(UsageError, match=r"\bk = "):
        load_sae(theirs(tmp_path, "topk", k=k))


@pytest.mark.parametrize("tensor", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, tensor, value):
    sae = make_sae("jumprelu")
    getattr(sae, tensor)[0] = value
    save_sae(sae, Folder(tmp_path))
    n_values = r"8 of the 192" if tensor == "W_dec" else r"24 of the 192" if tensor == "W_enc" else r"1 of the \d+"
    with pytest.raises(SaeRayError, match=rf"{n_values} values of {tensor} are NaN or infinite"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module.", "module._checkpoint_wrapped_module."],
)
def test_names_of_wrapped_modules_are_unwrapped(tmp_path, prefix):
    sae = make_sae("topk")
    save_sae(sae, Folder(tmp_path))
    weights = load_file(tmp_path / "sae_weights.safetensors")
    save_file({prefix + name: tensor for name, tensor in weights.items()}, tmp_path / "sae_weights.safetensors")
    assert same_codes(load_sae(tmp_path), sae)
    for kind in ("batch_top_k", "matryoshka"):
        saved = torch.load(GOLDEN / f"{kind}.ae.pt", weights_only=True)
        torch.save({prefix + name: value for name, value in saved.items()}, tmp_path / "wrapped.pt")
        assert same_codes(load_sae(tmp_path / "wrapped.pt"), load_sae(GOLDEN / f"{kind}.ae.pt"))
    linear = torch.load(GOLDEN / "batch_top_k.ae.pt", weights_only=True)
    inside = {name.replace("coder.", f"coder.{prefix}"): value for name, value in linear.items()}
    torch.save(inside, tmp_path / "inside.pt")
    assert same_codes(load_sae(tmp_path / "inside.pt"), load_sae(GOLDEN / "batch_top_k.ae.pt"))
    torch.save(saved | {f"{prefix}b_dec": saved["b_dec"]}, tmp_path / "twice.pt")
    with pytest.raises(UsageError, match="holds 'b_dec' twice"):
        load_sae(tmp_path / "twice.pt")


@pytest.mark.parametrize("kind", ["batch_top_k", "matryoshka"])
@pytest.mark.parametrize("change", ["lists", "arrays", "floats", "vectors", "parameters", "half"])
def test_reference_checkpoints_may_hold_lists_floats_and_vectors(tmp_path, kind, change):
    saved = torch.load(GOLDEN / f"{kind}.ae.pt", weights_only=True)
    n_latents = len(saved.get("b_enc", saved.get("encoder.bias")))
    changed = {
        "lists": lambda: {name: value.tolist() for name, value in saved.items()},
        "arrays": lambda: {name: value.numpy() if value.ndim else value.numpy()[()] for name, value in saved.items()},
        "floats": lambda: saved | {"threshold": saved["threshold"].item(), "k": float(saved["k"])},
        "vectors": lambda: saved | {"threshold": saved["threshold"].expand(n_latents).clone(), "k": saved["k"].view(1)},
        "parameters": lambda: {
            name: torch.nn.Parameter(value) if value.is_floating_point() else value for name, value in saved.items()
        },
        "half": lambda: saved | {"k": int(saved["k"])},
    }[change]()
    torch.save(changed, tmp_path / "ae.pt")
    expected, opened = load_sae(GOLDEN / f"{kind}.ae.pt"), load_sae(tmp_path)
    assert same_codes(opened, expected)
    assert (opened.k, opened.architecture) == (expected.k, expected.architecture)
    assert opened.metadata.get("group_sizes") == expected.metadata.get("group_sizes")
    assert opened.threshold is not None
    assert opened.threshold.shape == (n_latents,)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": 2.5}, "k = 2.5: not a whole number"),
        ({"k": torch.tensor([2, 3])}, "k = tensor.* not a whole number"),
        ({"k": None}, "k is a NoneType"),
        ({"threshold": "0.5"}, "threshold is a str, not a tensor"),
        ({"threshold": [0.5, 0.5]}, r"threshold has shape \(2,\)"),
        ({"b_dec": None}, "b_dec is a NoneType"),
        ({"b_enc": torch.zeros(3, dtype=torch.complex64)}, "b_enc is a Tensor, .*it is complex"),
        ({"b_enc": torch.zeros(3, device="meta")}, "b_enc is a Tensor, .*it has no values"),
        ({"group_sizes": [-1, 129]}, r"group_sizes = \[-1, 129\]"),
        ({"scale": torch.ones(3)}, r"also holds \['scale'\]"),
        ({"group_sizes": [1, 1]}, r"group_sizes = \[1, 1\]: they must sum to the number of latents"),
    ],
    ids=str,
)
def test_malformed_values_of_a_reference_checkpoint_are_refused_by_name(tmp_path, changes, said):
    saved = torch.load(GOLDEN / "matryoshka.ae.pt", weights_only=True)
    torch.save(saved | changes, tmp_path / "ae.pt")
    with pytest.raises(UsageError, match=said):
        load_sae(tmp_path)


def test_what_config_json_says_tells_topk_from_batch_topk(tmp_path):
    saved = torch.load(GOLDEN / "batch_top_k.ae.pt", weights_only=True)
    torch.save(saved, tmp_path / "ae.pt")
    with pytest.warns(UserWarning, match="taken for BatchTopK"):
        assert load_sae(tmp_path).architecture == "batch_topk"
    for checkpoints in (tmp_path, tmp_path / "checkpoints"):
        checkpoints.mkdir(exist_ok=True)
        torch.save({name: value for name, value in saved.items() if name != "k"}, checkpoints / "ae.pt")
        (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoderTopK", "k": 3}}))
        sae = load_sae(checkpoints / "ae.pt")
        assert (sae.architecture, sae.k, sae.threshold) == ("topk", 3, None)
        assert ((sae.encode(inputs(sae.d_in)) > 0).sum(1) == 3).all()
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "GatedAutoEncoder"}}))
    with pytest.raises(UsageError, match=r"is a GatedAutoEncoder, as config\.json says"):
        load_sae(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "MatryoshkaBatchTopKSAE"}}))
    with pytest.raises(UsageError, match="does not make a MatryoshkaBatchTopKSAE"):
        load_sae(tmp_path)


def _linear(*names: str) -> dict[str, torch.Tensor]:
    shapes = {"encoder.weight": (24, 8), "encoder.bias": (24,), "decoder.weight": (8, 24)}
    return {name: torch.ones(shapes.get(name, (8,))) for name in (*shapes, *names)}


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (_linear("gate_bias", "mag_bias", "r_mag", "decoder_bias"), "a GatedAutoEncoder of dictionary_learning"),
        (_linear("pre_bias", "latent_bias"), "OpenAI's sparse_autoencoder"),
        (_linear("b_dec"), "a reference checkpoint holds"),
        ({"state_dict": _linear("b_dec"), "cfg": {}}, "a training checkpoint, or an SAE of ViT-Prisma"),
        ({"model_state_dict": {}, "optimizer": {}}, "a training checkpoint"),
        ([torch.ones(1)], "holds a list"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_other_projects_files_are_refused_by_name(tmp_path, saved, said):
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(UsageError, match=said):
        load_sae(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("params.npz", "Gemma Scope"),
        ("params.safetensors", "Gemma Scope"),
        ("hyperparams.json", "Llama Scope"),
        ("sae.pt", "saev; convert it to a SAELens 6 directory"),
        ("weights.pt", "ViT-Prisma"),
    ],
)
@pytest.mark.parametrize("with_config", [False, True])
def test_other_projects_directories_are_refused_by_name(tmp_path, file, said, with_config):
    (tmp_path / file).write_bytes(b"")
    if with_config:
        (tmp_path / "cfg.json").write_text(json.dumps({"d_in": 8, "activation": "topk", "k": 3}))
    with pytest.raises(UsageError, match=said):
        load_sae(tmp_path)


def test_a_file_of_saev_is_refused_by_name(tmp_path):
    (tmp_path / "x.pt").write_bytes(b'{"schema": 2, "cfg": {}}\n...')
    with pytest.raises(UsageError, match="as an SAE of saev does"):
        load_sae(tmp_path / "x.pt")
