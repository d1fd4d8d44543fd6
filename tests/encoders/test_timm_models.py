"""Models of timm that cannot be had, or whose files are wrong: named errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from sae_ray.encoders import check_site, check_text_side, describe_encoder, load_encoder, load_preprocess
from sae_ray.encoders.sites import Site
from sae_ray.encoders.text import load_text_encoder
from sae_ray.errors import UsageError
from tests.encoders.test_encoders import Payload

WEIGHTS = "model.safetensors"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A tiny vision transformer as timm saves it."""
    path = tmp_path / "model"
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=16, depth=2, num_heads=2, img_size=32, num_classes=5)
    timm.models.save_for_hf(
        model, str(path), model_config={"pretrained_cfg": {"input_size": [3, 32, 32]}}, safe_serialization=True
    )
    return path


def change_config(directory: Path, **values: Any) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["pretrained_cfg"] |= values.pop("pretrained_cfg", {})
    file.write_text(json.dumps(config | values))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / WEIGHTS)
    change(weights)
    save_file(weights, directory / WEIGHTS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "vit_smal_patch14_dinov2.lvd142m",
            r"not known to timm \(near names: vit_small_patch14_dinov2, .*timm:<model>",
        ),
        ("resnet5", r"not known to timm \(near names: .*resnet50"),
        ("No-Such-Model", "not known to timm; an encoder is named by"),
        ("", "not known to timm; an encoder is named by"),
        ("timm/vit_small_patch14_dinov2.lvd142m", "not known to timm.*timm: followed by local-dir:.*or hf-hub:"),
        ("vit_small_patch14_dinov2.lvd", "no weights 'lvd' of .*; vit_small_patch14_dinov2 has the tags lvd142m"),
        (
            "vit_giant_patch14_224",
            r"no weights of .* on the hub; name another model \(near names: .*vit_giant_patch14_clip_224",
        ),
        ("gcvit_xtiny.in1k", "no weights of .* on the hub"),
        ("tf_efficientnet_b0_ns", "timm calls the encoder .* timm:tf_efficientnet_b0.ns_jft_in1k now"),
    ],
)
def test_names_that_do_not_exist_are_refused_with_near_ones(name, words):
    for ask in (describe_encoder, load_preprocess, load_encoder):
        with pytest.raises(UsageError, match=words):
            ask(f"timm:{name}")


def remove_weights(directory: Path) -> None:
    (directory / WEIGHTS).unlink()


def pickle_weights(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    torch.save({"a": Payload(directory / "executed")}, directory / "pytorch_model.bin")


def weigh_twice(directory: Path) -> None:
    for name in ("a", "b"):
        (directory / f"{name}.safetensors").write_bytes((directory / WEIGHTS).read_bytes())
    (directory / WEIGHTS).unlink()


def tear(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:-1])


FAULTS = {
    "no weights": (remove_weights, "has no weights; give it a model.safetensors"),
    "pickled weights": (pickle_weights, "has only pytorch_model.bin; .* pickled weights are never read"),
    "several files of weights": (weigh_twice, "a.safetensors, b.safetensors; name the right one model.safetensors"),
    "torn": (tear, "file not fully covered"),
    "a tensor is missing": (
        lambda directory: change_weights(directory, lambda weights: weights.pop("blocks.1.mlp.fc1.weight")),
        r"Missing key.*blocks\.1\.mlp\.fc1\.weight",
    ),
    "a tensor too many": (
        lambda directory: change_weights(directory, lambda weights: weights.update(other=torch.zeros(1))),
        r"Unexpected key.*other",
    ),
    "another shape": (
        lambda directory: change_weights(directory, lambda weights: weights.update({"norm.bias": torch.zeros(3)})),
        r"size mismatch for norm\.bias",
    ),
    "another head": (lambda directory: change_config(directory, num_classes=7), r"size mismatch for head\.weight"),
    "another width": (
        lambda directory: change_config(
            directory, model_args={"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32}
        ),
        r"size mismatch for cls_token",
    ),
}


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_are_missing_or_do_not_fit_are_refused(directory, fault, device):
    spoil, words = FAULTS[fault]
    load_encoder(f"timm:local-dir:{directory}", device=device)
    spoil(directory)
    with pytest.raises(UsageError, match=rf"(?s){directory}.*{words}"):
        load_encoder(f"timm:local-dir:{directory}", device=device)
    assert not (directory / "executed").exists()


CONFIGS = {
    "unknown architecture": (
        {"architecture": "vit_tiny_patch61_224"},
        "is of the architecture vit_tiny_patch61_224, which is not known to timm .*vit_tiny_patch16_224",
    ),
    "an argument that it does not take": ({"model_args": {"colour": "blue"}}, "cannot be loaded: .*colour"),
    "a key that it does not know": ({"pretrained_cfg": {"colour": "blue"}}, "cannot be loaded: .*colour"),
    "four channels": (
        {"model_args": {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32, "in_chans": 4}},
        "images of 4 channels; name a model that takes 3",
    ),
    "NaFlex": (
        {"architecture": "naflexvit_base_patch16_siglip", "model_args": {"embed_dim": 16, "depth": 1, "num_heads": 2}},
        r"a NaFlex model.*fixed resolution, such as timm:vit_base_patch16_siglip_224\.v2_webli",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_cannot_be_are_refused(directory, case):
    values, words = CONFIGS[case]
    change_config(directory, **values)
    for ask in (describe_encoder, load_encoder):
        with pytest.raises(UsageError, match=rf"(?s){directory}.*{words}"):
            ask(f"timm:local-dir:{directory}")


@pytest.mark.parametrize("config", ["null", "3", "[]", "{}", '{"architecture": 3}', "{"])
def test_a_malformed_configuration_is_refused(directory, config):
    (directory / "config.json").write_text(config)
    with pytest.raises(UsageError, match=f"{directory}"):
        describe_encoder(f"timm:local-dir:{directory}")


def test_a_directory_without_a_configuration_is_refused(directory):
    (directory / "config.json").unlink()
    with pytest.raises(UsageError, match=r"does not name a directory with a config\.json of timm's"):
        describe_encoder(f"timm:local-dir:{directory}")


def test_a_transformer_that_does_not_pool_has_tokens_only(directory):
    change_config(directory, model_args={
        "embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32, "global_pool": "",
    })  # fmt: skip
    info = describe_encoder(f"timm:local-dir:{directory}")
    assert (info.pooled_width, info.residual_width, info.n_tokens) == (None, 16, 5)
    with pytest.raises(UsageError, match=r"point is 'pooled', which .* does not have; it has residual"):
        check_site(info, Site("pooled"))


def test_it_embeds_no_texts(directory):
    spec = f"timm:local-dir:{directory}"
    for ask in (load_text_encoder, lambda spec: check_text_side(describe_encoder(spec))):
        with pytest.raises(UsageError, match="does not embed texts; name a CLIP, SigLIP or open_clip model"):
            ask(spec)


COMMIT = "1f" * 20


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as serves the files of a folder as one commit of any repository."""

    folder: Path

    def do_HEAD(self) -> bytes:
        file = self.folder / self.path.rpartition("/")[2]
        content = file.read_bytes() if "/resolve/" in self.path and file.is_file() else b""
        self.send_response(200 if content else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{file.name}"')
        self.send_header("Content-Length", str(len(content)))
        if not content:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        return content

    def do_GET(self) -> None:
        self.wfile.write(self.do_HEAD())

    def log_message(self, *args: Any) -> None:
        pass


def test_models_are_fetched_from_the_hub_but_no_pickles(directory, tmp_path):
    """In a process of its own, as the hub's address is read at import."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Serving", (Hub,), {"folder": directory}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {key: value for key, value in os.environ.items() if not key.upper().endswith("_PROXY")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    environment["HF_HUB_CACHE"] = str(tmp_path)
    program = (
        "from sae_ray.encoders import describe_encoder, load_encoder\n"
        "from sae_ray.errors import UsageError\n"
        "print(load_encoder('timm:hf-hub:someone/tiny').info.revision, flush=True)\n"
        "input()\n"
        "try:\n"
        "    load_encoder('timm:hf-hub:someone/pickled')\n"
        "except UsageError as error:\n"
        "    print(describe_encoder('timm:hf-hub:someone/pickled').revision, error)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == COMMIT
        pickle_weights(directory)
        said, _ = process.communicate("\n")
    assert said.startswith(f"{COMMIT} timm:hf-hub:someone/pickled has no model.safetensors on the hub; name an")
    server.shutdown()


def test_a_name_of_timms_is_pinned_by_the_commit_on_the_hub(tmp_path):
    """In a process of its own, as the hub's cache folder is read at import."""
    files = tmp_path / "models--timm--test_vit.r160_in1k"
    model = timm.create_model("test_vit")
    timm.models.save_for_hf(model, str(files / "snapshots" / COMMIT), safe_serialization=True)
    (files / "refs").mkdir()
    (files / "refs" / "main").write_text(COMMIT)
    program = (
        "from sae_ray.encoders import describe_encoder, load_encoder\n"
        "for name in ('timm:test_vit', 'timm:test_vit.r160_in1k', 'timm:hf-hub:timm/test_vit.r160_in1k'):\n"
        "    info = describe_encoder(name)\n"
        f"    assert (info.revision, info.image_size) == ({COMMIT!r}, (160, 160)), info\n"
        "    assert load_encoder(name, info.revision).info == info\n"
        "assert 'transformers' not in __import__('sys').modules\n"
    )
    environment = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
