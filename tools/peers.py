"""SAEs between sae-ray and the libraries whose forms it reads and writes, checked with these libraries themselves.

`python -m tools.peers` writes tests/golden/forms: SAEs as these libraries save them, with the codes and
reconstructions that they compute. It also opens an export of every architecture in them and compares what they compute.
They want other versions of packages than sae-ray, so they are not installed with the tests:

    pip install --no-deps --target PEERS dictionary-learning==0.1.0 eai-sparsify==1.3.3 overcomplete==0.3.0 \
        natsort simple-parsing docstring-parser schedulefree opencv-python-headless scikit-image lazy-loader zstandard
    SPARSIFY_DISABLE_TRITON=1 PYTHONPATH=PEERS python -m tools.peers
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from safetensors.torch import save_file

from sae_ray.errors import UsageError
from sae_ray.sae import SAE, export_sae, load_sae
from sae_ray.sae.architectures import ARCHITECTURES
from sae_ray.store.files import Folder

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "forms"
D_IN, D_SAE, K = 8, 24, 3
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def _anything(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return object


class NotNeeded(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules in place of nnsight, which dictionary_learning imports to read activations from language models."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "nnsight":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = _anything  # type: ignore[method-assign]
        return module

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, NotNeeded())
# overcomplete asks for it as matplotlib had it before 3.9.
matplotlib.cm.get_cmap = lambda name=None: matplotlib.colormaps[name or "viridis"]  # type: ignore[attr-defined]

import dictionary_learning.dictionary as dl  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402
from dictionary_learning.utils import load_dictionary  # noqa: E402
from overcomplete.sae import SAE as PlainSAE  # noqa: E402
from overcomplete.sae import BatchTopKSAE as OvercompleteBatchTopK  # noqa: E402
from overcomplete.sae import JumpSAE, TopKSAE  # noqa: E402
from sparsify import SparseCoder, SparseCoderConfig  # noqa: E402


class Computed(NamedTuple):
    """What a library computes."""

    codes: torch.Tensor
    reconstruction: torch.Tensor


def inputs() -> torch.Tensor:
    return torch.randn(50, D_IN, generator=torch.Generator().manual_seed(1)) * 2 + 0.5


def randomised(module: torch.nn.Module, unit_decoder: bool = True) -> torch.nn.Module:
    """With other parameters than zeros and ones, and decoder directions of norm 1 unless not."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in module.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim == 1 else 0.5)
        if unit_decoder and name in ("decoder.weight", "W_dec", "dictionary._weights"):
            parameter.data /= parameter.data.norm(dim=0 if name == "decoder.weight" else 1, keepdim=True)
    return module


# How each library opens a directory, and what it computes then


def by_dictionary_learning(folder: Path, x: torch.Tensor) -> Computed:
    dictionary, _ = load_dictionary(str(folder), "cpu")
    codes = dictionary.encode(x)
    return Computed(codes, dictionary.decode(codes))


def by_sparsify(folder: Path, x: torch.Tensor) -> Computed:
    coder = SparseCoder.load_from_disk(folder)
    values, latents, _ = coder.encode(x)
    codes = torch.zeros(len(values), coder.num_latents).scatter(1, latents, values)
    return Computed(codes, coder.decode(values, latents))


def by_overcomplete(folder: Path, x: torch.Tensor) -> Computed:
    config = json.loads((folder / "config.json").read_text())
    kinds = {"TopKSAE": TopKSAE, "JumpSAE": JumpSAE, "SAE": PlainSAE, "BatchTopKSAE": OvercompleteBatchTopK}
    settings: dict[str, Any] = {"dictionary_params": {"normalization": config["normalization"]}}
    if "k" in config:
        settings["top_k"] = config["k"]
    sae = kinds[config["class"]](config["input_dim"], config["hidden_dim"], **settings)
    sae.load_state_dict(torch.load(folder / "sae.pt", weights_only=True))
    if "threshold" in config:
        sae.running_threshold = torch.tensor(config["threshold"])
    sae = sae.eval()
    centre = torch.tensor(config.get("centre", [0.0] * config["input_dim"]))
    _, codes = sae.encode(x - centre)
    return Computed(codes, sae.decode(codes) + centre)


OPENED_BY: dict[str, Callable[[Path, torch.Tensor], Computed]] = {
    "dictionary_learning": by_dictionary_learning,
    "sparsify": by_sparsify,
    "overcomplete": by_overcomplete,
}


# SAEs as each library saves them


def save_dictionary_learning(folder: Path) -> None:
    made = {
        "AutoEncoder": dl.AutoEncoder(D_IN, D_SAE),
        "AutoEncoderNew": dl.AutoEncoderNew(D_IN, D_SAE),
        "JumpReluAutoEncoder": dl.JumpReluAutoEncoder(D_IN, D_SAE),
        "BatchTopKSAE": BatchTopKSAE(D_IN, D_SAE, K),
        "AutoEncoderTopK": AutoEncoderTopK(D_IN, D_SAE, K),
        "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [4, 8, 12]),
    }
    for name, dictionary in made.items():
        # The loader of AutoEncoder makes these norms 1, and codes larger or smaller.
        randomised(dictionary, unit_decoder=name != "AutoEncoder")
        if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            dictionary.threshold.fill_(0.7)
        if name == "JumpReluAutoEncoder":
            dictionary.threshold.data.abs_()
        place = folder / f"dictionary_learning-{name}"
        place.mkdir(parents=True, exist_ok=True)
        torch.save(dictionary.state_dict(), place / "ae.pt")
        trainer = {"dict_class": name} | ({"k": K} if "k" in dictionary.state_dict() else {})
        (place / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
        keep(place, by_dictionary_learning(place, inputs()))


def save_sparsify(folder: Path) -> None:
    coder = randomised(SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K)))
    coder.save_to_disk(folder / "sparsify")
    keep(folder / "sparsify", by_sparsify(folder / "sparsify", inputs()))


def save_overcomplete(folder: Path) -> None:
    made = {
        "topk": TopKSAE(D_IN, D_SAE, top_k=K),
        "jumprelu": JumpSAE(D_IN, D_SAE),
        "relu": PlainSAE(D_IN, D_SAE),
        "batchtopk": OvercompleteBatchTopK(D_IN, D_SAE, top_k=K),
    }
    for name, sae in made.items():
        place = folder / f"overcomplete-{name}"
        place.mkdir(parents=True, exist_ok=True)
        config = {"class": type(sae).__name__, "activation": name, "input_dim": D_IN, "hidden_dim": D_SAE}
        config |= {"normalization": "identity"} | ({"k": K} if "topk" in name else {})
        config |= {"threshold": 0.7} if name == "batchtopk" else {}
        torch.save(randomised(sae).state_dict(), place / "sae.pt")
        (place / "config.json").write_text(json.dumps(config))
        keep(place, by_overcomplete(place, inputs()))


def keep(place: Path, computed: Computed) -> None:
    tensors = {name: value.detach().contiguous() for name, value in computed._asdict().items()}
    save_file({"x": inputs(), **tensors}, place / "computed.safetensors")


# Every architecture, exported and opened there


def made_here(name: str) -> SAE:
    generator = torch.Generator().manual_seed(3)
    W_dec = torch.randn(D_SAE, D_IN, generator=generator)
    kind = ARCHITECTURES[name]
    threshold = torch.rand(D_SAE, generator=generator)
    return SAE(
        architecture=name,
        W_enc=W_dec.T.contiguous() + 0.1,
        W_dec=W_dec / W_dec.norm(dim=1, keepdim=True),
        b_enc=torch.randn(D_SAE, generator=generator),
        b_dec=torch.randn(D_IN, generator=generator),
        threshold=(threshold if kind.tuned_by == "sparsity" else threshold[0].repeat(D_SAE))
        if kind.has_threshold
        else None,
        k=K if kind.tuned_by == "k" else None,
    )


@torch.no_grad()
def check_exports() -> None:
    for name in ARCHITECTURES:
        sae = made_here(name)
        for library, opened in OPENED_BY.items():
            with tempfile.TemporaryDirectory() as folder:
                try:
                    export_sae(sae, Folder(folder), library, centred=library == "overcomplete")
                except UsageError as error:
                    print(f"{name} -> {library}: refused: {str(error)[:70]} …")
                    continue
                theirs = opened(Path(folder), inputs())
                codes = sae.encode(inputs())
                torch.testing.assert_close(theirs.codes, codes, **TOLERANCE)
                torch.testing.assert_close(theirs.reconstruction, sae.decode(codes), **TOLERANCE)
                assert ((theirs.codes > 0).sum(1) == (codes > 0).sum(1)).all()
                again = load_sae(folder)
                torch.testing.assert_close(again.encode(inputs()), codes, **TOLERANCE)
                error = (theirs.codes - codes).abs().max().item()
                print(
                    f"{name} -> {library}: the same; codes differ by at most {error:.1e}; opens as {again.architecture}"
                )


@torch.no_grad()
def check_thresholds() -> None:
    """A value that equals the threshold is no code. All numbers are whole, and so exact."""
    eye, zeros = torch.eye(D_IN), torch.zeros(D_IN)
    x = torch.arange(1.0, 5.0)[:, None].expand(4, D_IN).contiguous()
    for name, k in (("batch_topk", 1), ("jumprelu", None)):
        for threshold in (1.0, 2.0, 3.0):
            sae = SAE(name, eye, eye, zeros, zeros, torch.full((D_IN,), threshold), k)
            for library in ("dictionary_learning", "overcomplete"):
                with tempfile.TemporaryDirectory() as folder:
                    export_sae(sae, Folder(folder), library)
                    codes = OPENED_BY[library](Path(folder), x).codes
                    assert torch.equal(load_sae(folder).encode(x), codes)
                assert torch.equal(codes, sae.encode(x)), (name, library, threshold)
                print(f"{name} -> {library}: {threshold:g} does not exceed a threshold of {threshold:g}")


@torch.no_grad()
def main() -> None:
    for save in (save_dictionary_learning, save_sparsify, save_overcomplete):
        save(GOLDEN)
    for place in sorted(path for path in GOLDEN.iterdir() if path.is_dir()):
        print(place.name, load_sae(place).architecture)
    check_exports()
    check_thresholds()


if __name__ == "__main__":
    main()
