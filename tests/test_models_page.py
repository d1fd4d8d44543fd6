"""docs/inputs.md, "Models and SAEs": every row of its tables is made here as real files, and opened or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_ray.errors import SaeRayError
from sae_ray.sae import load_sae, save_sae
from sae_ray.steering.llava import describe_llava, load_llava
from sae_ray.store.files import Folder
from tests.sae.test_formats import GOLDEN, make_sae

PAGE = Path(__file__).parents[1] / "docs" / "inputs.md"


class Case(NamedTuple):
    """A row: what is given, and what comes of it."""

    given: str
    outcome: str
    """Begins with `opens` or `refused`."""
    make: Callable[..., str | None]
    """Writes it below a directory; the path to open, unless that is the directory."""
    said: str = ""
    """What the refusal says."""


def sae_lens(name: str = "relu", **config: Any) -> Callable[[Path], None]:
    """A directory as SAELens writes it, with another configuration."""

    def make(folder: Path) -> None:
        save_sae(make_sae(name), Folder(folder))
        values = json.loads((folder / "cfg.json").read_text()) | {"metadata": {"sae_lens_version": "6.54.0"}} | config
        (folder / "cfg.json").write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return make


def ours(name: str = "batch_topk", opened: str = "", **facts: Any) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        save_sae(make_sae(name), Folder(folder))
        config = json.loads((folder / "cfg.json").read_text())
        config["metadata"]["sae_ray"] |= facts
        (folder / "cfg.json").write_text(json.dumps(config))
        return str(folder / opened)

    return make


def changed_weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        save_sae(make_sae("jumprelu"), Folder(folder))
        file = folder / "sae_weights.safetensors"
        save_file(change(load_file(file)), file)

    return make


def ae(
    kind: str = "batch_top_k", config: dict | None = None, change: Callable[[dict], dict] = lambda saved: saved
) -> Callable[[Path], None]:
    """A directory with an `ae.pt` and perhaps a `config.json`."""

    def make(folder: Path) -> None:
        torch.save(change(torch.load(GOLDEN / f"{kind}.ae.pt", weights_only=True)), folder / "ae.pt")
        if config is not None:
            (folder / "config.json").write_text(json.dumps({"trainer": config}))

    return make


def files(**contents: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name, content in contents.items():
            (folder / name.replace("__", ".")).write_bytes(content)

    return make


def form(
    name: str, file: str = "config.json", weights: dict[str, torch.Tensor] | None = None, **config: Any
) -> Callable[[Path], None]:
    """A directory as another library writes it, with another configuration or further tensors."""

    def make(folder: Path) -> None:
        shutil.copytree(GOLDEN / "forms" / name, folder, dirs_exist_ok=True)
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | config))
        if weights is not None:
            torch.save(torch.load(folder / "sae.pt", weights_only=True) | weights, folder / "sae.pt")

    return make


def several(folder: Path) -> None:
    for name in ("a", "b"):
        save_sae(make_sae("relu"), Folder(folder / name))


BATCH_TOPK = {"dict_class": "BatchTopKSAE", "k": 3}
SAES = [
    Case("a directory that sae-ray wrote", "opens as it was trained", ours()),
    Case("… named by its `cfg.json` or its weights", "opens", ours(opened="cfg.json")),
    Case("… of an architecture that this version does not know", "refused: use the version that wrote it",
         ours(architecture="gated_topk"), "unknown architecture; .*or use the version that wrote it"),
    Case("SAELens 6, `standard`", "opens as `relu`", sae_lens()),
    Case("SAELens 6, `topk`", "opens as `topk`", sae_lens("topk", k=3)),
    Case("SAELens 6, `jumprelu` (also what it makes of BatchTopK for inference)", "opens as `jumprelu`",
         sae_lens("jumprelu")),
    Case("SAELens 6, `standard` with `activation_fn` `topk`", "refused: name the architecture that it is",
         sae_lens(activation_fn="topk"), "activation_fn = 'topk': cannot be opened"),
    Case("SAELens 6, `abstopk`", "refused: its codes are signed", sae_lens(architecture="abstopk"), "signed"),
    Case("SAELens 6, `batchtopk`, `matryoshka_batchtopk`", "refused: save it for inference first",
         sae_lens(architecture="batchtopk"), "save_inference_model"),
    Case("SAELens 6, `gated`, `matching_pursuit`, `temporal`, transcoders", "refused: sae-ray has no such architecture",
         sae_lens(architecture="gated"), "'gated' cannot be opened"),
    Case("SAELens 6 with normalised or reshaped activations, or codes scaled by the decoder's norms",
         "refused: fold it into the weights in SAELens", sae_lens(normalize_activations="layer_norm"), "layer_norm"),
    Case("SAELens before 6", "opens as SAELens 6 opens it",
         sae_lens(metadata=..., sae_lens_version="5.11.0", hook_name="blocks.8.hook_resid_pre")),
    Case("`cfg.json` without `d_in` or `d_sae`", "refused: write them there", sae_lens(d_in=...), "d_in = None"),
    Case("names with `module.`, `_orig_mod.`, `_fsdp_wrapped_module.` or `_checkpoint_wrapped_module.`", "opens",
         changed_weights(lambda saved: {f"module._orig_mod.{name}": one for name, one in saved.items()})),
    Case("a git-lfs pointer, an HTML page or another file in the place of its weights", "refused: fetch it again",
         files(ae__pt=b"version https://git-lfs.github.com/spec/v1\noid"), "a git-lfs pointer .run `git lfs pull`."),
    Case("weights or thresholds that are not finite", "refused: take an earlier checkpoint",
         changed_weights(lambda saved: saved | {"threshold": saved["threshold"] / 0}), "24 of the 24 values of thresh"),
    Case("other tensors than `docs/formats.md` lists", "refused: the names are shown",
         changed_weights(lambda saved: saved | {"b_mag": saved["b_enc"].clone()}), "must hold exactly"),
    Case("`ae.pt` of the reference code, BatchTopK", "opens as `batch_topk`", ae(config=BATCH_TOPK)),
    Case("`ae.pt` of the reference code, Matryoshka", "opens as `matryoshka_batch_topk`", ae("matryoshka")),
    Case("… with lists, numbers, vectors or arrays of numpy for tensors", "opens",
         ae("matryoshka", change=lambda saved: {name: value.tolist() for name, value in saved.items()})),
    Case("… saved before its threshold was set", "refused: train longer",
         ae("matryoshka", change=lambda saved: saved | {"threshold": -1.0}), "never set"),
    Case("… with other tensors besides", "refused: convert it",
         ae(change=lambda saved: saved | {"input_mean": saved["b_dec"]}), r"also holds \['input_mean'\]"),
    Case("`ae.pt` of dictionary_learning, TopK, beside its `config.json`", "opens as `topk`",
         ae(config={"dict_class": "AutoEncoderTopK", "k": 3})),
    Case("… without `config.json`", "opens as `batch_topk`, with a warning: TopK has the same tensors", ae()),
    Case("… `AutoEncoder` and `AutoEncoderNew`", "opens as `relu`", form("dictionary_learning-AutoEncoderNew")),
    Case("… `JumpReluAutoEncoder`", "opens as `jumprelu`", form("dictionary_learning-JumpReluAutoEncoder")),
    Case("… of another class", "refused: convert it", ae(config={"dict_class": "GatedAutoEncoder"}),
         "is a GatedAutoEncoder"),
    Case("EleutherAI's sparsify (`sae.safetensors` and `cfg.json`)", "opens as `topk`", form("sparsify", "cfg.json")),
    Case("… with groups of latents or a skip connection, transcoders", "refused: sae-ray has no such architecture",
         form("sparsify", "cfg.json", activation="groupmax"), "activation = 'groupmax': cannot be opened"),
    Case("overcomplete and ViSAEBench (`sae.pt`, `config.json`), TopK", "opens as `topk`", form("overcomplete-topk")),
    Case("… BatchTopK, with its threshold", "opens as `batch_topk`", form("overcomplete-batchtopk")),
    Case("… JumpReLU", "opens as `jumprelu`", form("overcomplete-jumprelu")),
    Case("… without an activation", "opens as `relu`", form("overcomplete-relu")),
    Case("… with another encoder than a linear one", "refused: convert it",
         form("overcomplete-topk", weights={"encoder.mlp_blocks.0.weight": torch.zeros(8, 8)}), "also holds .*convert"),
    Case("saev (`sae.pt`)", "refused: convert it", files(sae__pt=b'{"schema": 2}\n'), "saev; convert it"),
    Case("ViT-Prisma (`weights.pt`)", "refused: convert it", files(weights__pt=b""), "ViT-Prisma; convert it"),
    Case("OpenAI's sparse_autoencoder", "refused: convert it",
         ae(change=lambda saved: {"pre_bias": saved["b_dec"], "latent_bias": saved["encoder.bias"]}), "OpenAI's"),
    Case("Gemma Scope (`params.npz`, `params.safetensors`)", "refused: save it with SAELens", files(params__npz=b""),
         "Gemma Scope"),
    Case("Llama Scope (`hyperparams.json`)", "refused: convert it", files(hyperparams__json=b"{}"), "Llama Scope"),
    Case("a checkpoint of a training run", "refused: convert it", ae(change=lambda saved: {"state_dict": saved}),
         "a training checkpoint"),
    Case("the folder of several SAEs", "refused: name one of those that are listed", several, "the folder of 2: a, b"),
    Case("`owner/name/folder` or `hf://owner/name/folder@revision` on the hub, neither cached nor reachable",
         "refused: fill the cache where there is a connection", lambda folder: "hf://nobody/no-sae/layer22@v1",
         "fill the cache where there is a connection"),
    Case("pickled code", "refused: it is never run", ae(change=lambda saved: saved | {"k": Path("x")}), "safely"),
]  # fmt: skip


def llava(tower: str = "clip", strategy: str = "default", layer: Any = -2, **config: Any) -> Callable[..., str]:
    """`config` is of `config.json`; values of ... are removed from `processor_config.json`."""

    def make(folder: Path, make_llava: Callable[..., str]) -> str:
        path = Path(make_llava(folder / "llava", tower, strategy, layer if isinstance(layer, int) else -2))
        removed = {name for name, value in config.items() if value is ...}
        changed = {name: value for name, value in config.items() if value is not ...}
        for name in ("config.json", "processor_config.json"):
            values = json.loads((path / name).read_text())
            if name == "config.json":
                values |= {"vision_feature_layer": layer} | changed
            kept = {key: value for key, value in values.items() if key not in removed}
            (path / name).write_text(json.dumps(kept))
        return str(path)

    return make


def pointer(folder: Path, make_llava: Callable[..., str]) -> str:
    path = make_llava(folder / "llava")
    (Path(path) / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    return path


LLAVAS = [
    Case("a CLIP tower, `vision_feature_select_strategy` `default`", "opens: block 1 of 3, 16 places per image",
         llava()),
    Case("a CLIP tower, `full`", "opens: block 1 of 3, 17 places per image", llava(strategy="full")),
    Case("a SigLIP tower, `default` (transformers drops a patch)", "opens: block 1 of 3, 15 places per image",
         llava("siglip")),
    Case("a SigLIP tower, `full`", "opens: block 1 of 3, 16 places per image", llava("siglip", "full")),
    Case("a DINOv2 or ViT tower, `default`", "opens: block 1 of 3, 16 places per image", llava("dinov2")),
    Case("a tower with registers", "refused: encoders and LLaVAs are listed",
         llava(vision_config={"model_type": "dinov2_with_registers"}), "without registers"),
    Case("`vision_feature_layer` 3, counted from the input of block 0", "opens: block 2 of 3, 16 places per image",
         llava(layer=3)),
    Case("`vision_feature_layer` -1", "opens: block 2 of 3, 16 places per image", llava(layer=-1)),
    Case("`vision_feature_layer` [-2]", "opens: block 1 of 3, 16 places per image", llava(layer=[-2])),
    Case("`vision_feature_layer` [-2, -1]", "refused: steering takes a LLaVA that reads one layer",
         llava(layer=[-2, -1]), "reads several layers"),
    Case("`vision_feature_layer` 0, or beyond the blocks", "refused: the layers that there are",
         llava(layer=0), "named 1 to 3 or -3 to -1"),
    Case("another `vision_feature_select_strategy`", "refused: the two that there are",
         llava(vision_feature_select_strategy="cls"), "'default', 'full'"),
    Case("`vision_feature_layer` []", "refused: steering takes a LLaVA that reads one layer", llava(layer=[]),
         "no layer"),
    Case("a processor configuration without `patch_size`", "opens: block 1 of 3, 16 places per image",
         llava(patch_size=..., num_additional_image_tokens=...)),
    Case("weights that are git-lfs pointers", "refused: run `git lfs pull`", pointer, "model.safetensors is a git-lfs"),
    Case("another model type", "refused: encoders and LLaVAs are listed", llava(model_type="mllama"),
         "cannot be loaded|not llava"),
]  # fmt: skip


@pytest.mark.parametrize("case", SAES, ids=lambda case: case.given)
@pytest.mark.filterwarnings("ignore:.*taken for BatchTopK")
def test_an_sae_opens_or_is_refused_as_the_page_says(tmp_path, case):
    given = case.make(tmp_path) or tmp_path
    if case.outcome.startswith("opens"):
        sae = load_sae(given)
        assert ("as `" not in case.outcome) or f"as `{sae.architecture}`" in case.outcome
        return
    with pytest.raises(SaeRayError, match=rf"(?s){case.said}"):
        load_sae(given)


@pytest.mark.parametrize("case", LLAVAS, ids=lambda case: case.given)
def test_a_llava_opens_or_is_refused_as_the_page_says(tmp_path, make_llava, case):
    given = case.make(tmp_path, make_llava)
    if case.outcome.startswith("opens"):
        info, loaded = describe_llava(given), load_llava(given)
        [embedding] = loaded.image_embeddings([loaded.white()], [()])
        blocks = info.tower.n_layers
        assert case.outcome == f"opens: block {loaded.layer} of {blocks}, {len(embedding)} places per image"
        assert (info.layer, info.n_image_tokens) == (loaded.layer, len(embedding))
        return
    with pytest.raises(SaeRayError, match=rf"(?s){case.said}"):
        load_llava(given)


@pytest.mark.parametrize(("title", "cases"), [("SAEs", SAES), ("LLaVAs", LLAVAS)])
def test_the_page_shows_these_cases(title, cases):
    section = PAGE.read_text(encoding="utf-8").partition("## Models and SAEs\n")[2].partition("\n## ")[0]
    table = section.partition(f"| {title} | |\n|---|---|\n")[2].partition("\n\n")[0]
    assert table.strip().splitlines() == [f"| {case.given} | {case.outcome} |" for case in cases]
