"""The models of a study, faulty in every way that is known before any of their weights is read."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socketserver
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sae_ray.encoders import EncoderInfo, check_text_side, describe_encoder, load_encoder
from sae_ray.encoders.text import load_text_encoder
from sae_ray.errors import UsageError
from sae_ray.steering import load_llava
from sae_ray.steering.info import LlavaInfo
from sae_ray.steering.llava import describe_llava
from sae_ray.study.models import ModelUse, check_models
from sae_ray.world.write import MODELS

OPEN_CLIP = "open_clip:local-dir:"


def use(kind: str, directory: Path, prefix: str = "") -> ModelUse:
    field = {"images": "judge.model", "texts": "steering.scorer", "llava": "steering.llava"}[kind]
    return ModelUse(field, kind, f"{prefix}{directory}", None, "float32")  # pyright: ignore[reportArgumentType]


def copy_of(name: str, directory: Path) -> Path:
    return Path(shutil.copytree(MODELS / name, directory / name))


def edit_weights(directory: Path, change: Callable[[dict], object]) -> None:
    [path] = directory.glob("*.safetensors")
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def tear(directory: Path) -> None:
    [path] = directory.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])


def remove(*names: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return spoil


def lose(name: str) -> Callable[[Path], None]:
    return lambda directory: edit_weights(directory, lambda weights: weights.pop(name))


def narrow(name: str) -> Callable[[Path], None]:
    return lambda directory: edit_weights(
        directory, lambda weights: weights.update({name: weights[name][:-1].contiguous()})
    )


VISION = "vision_model.encoder.layers.0.mlp.fc1.weight"
TEXT = "text_model.encoder.layers.0.mlp.fc1.weight"
TORN = "file not fully covered"
FAULTS = {
    "images: no weights": ("images", "clip", remove("model.safetensors"), "no file named model.safetensors"),
    "images: torn": ("images", "clip", tear, TORN),
    "images: tensor missing": ("images", "clip", lose(VISION), f"{VISION} is missing"),
    "images: wrong shape": (
        "images",
        "clip",
        narrow(VISION),
        rf"{VISION} has the shape \[\d+, \d+\], not \[\d+, \d+\]",
    ),
    "images: no config": ("images", "clip", remove("config.json"), "config.json"),
    "images: no preprocessing": ("images", "clip", remove("preprocessor_config.json"), "preprocessor_config.json"),
    "images: model type": (
        "images",
        "clip",
        lambda directory: edit_json(directory / "config.json", model_type="swin"),
        "model type swin; encoders are CLIP",
    ),
    "open_clip: no weights": ("images", "judge", remove("open_clip_model.safetensors"), "weights"),
    "open_clip: torn": ("images", "judge", tear, TORN),
    "open_clip: tensor missing": (
        "images",
        "judge",
        lose("visual.conv1.weight"),
        r"Missing key.*visual\.conv1\.weight",
    ),
    "open_clip: wrong shape": (
        "images",
        "judge",
        narrow("visual.conv1.weight"),
        r"size mismatch for visual\.conv1\.weight",
    ),
    "open_clip: no config": ("images", "judge", remove("open_clip_config.json"), "open_clip_config.json"),
    "texts: no text side": ("texts", "llava", lambda directory: None, "model type llava, which does not embed texts"),
    "texts: tensor missing": ("texts", "clip", lose(TEXT), f"{TEXT} is missing"),
    "texts: no tokenizer": ("texts", "clip", remove("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    "open_clip texts: no tokenizer": ("texts", "judge", remove("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    "open_clip texts: tensor missing": ("texts", "judge", lose("text_projection"), r"Missing key.*text_projection"),
    "llava: model type": ("llava", "clip", lambda directory: None, "model type clip, not llava"),
    "llava: tower": (
        "llava",
        "llava",
        lose("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"),
        r"vision_tower\.encoder\.layers\.0\.mlp\.fc1\.weight is missing",
    ),
    "llava: language model": (
        "llava",
        "llava",
        narrow("language_model.model.layers.0.mlp.up_proj.weight"),
        r"layers\.0\.mlp\.up_proj\.weight has the shape",
    ),
    "llava: torn": ("llava", "llava", tear, TORN),
    "llava: no tokenizer": ("llava", "llava", remove("tokenizer.json"), "tokenizer"),
    "llava: no processor": ("llava", "llava", remove("processor_config.json"), "processor"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_model_is_refused_by_its_field_before_it_is_loaded(fault: str, tmp_path: Path):
    kind, name, spoil, words = FAULTS[fault]
    directory = copy_of(name, tmp_path)
    one = use(kind, directory, OPEN_CLIP if name == "judge" else "")
    spoil(directory)
    with pytest.raises(UsageError, match=f"(?s)^{one.field} = {re.escape(repr(one.model))}: .*{words}"):
        check_models([one])


def test_sound_models_pass(tmp_path: Path):
    uses = [
        use("images", MODELS / "clip"),
        use("images", MODELS / "judge", OPEN_CLIP),
        use("texts", MODELS / "clip"),
        use("texts", MODELS / "judge", OPEN_CLIP),
        use("llava", MODELS / "llava"),
        use("images", MODELS / "llava"),
    ]
    check_models([one._replace(dtype=dtype) for one in uses for dtype in ("float32", "bfloat16")])


def test_what_passes_and_fails_is_what_loads_and_does_not(tmp_path: Path):
    """Loading refuses with the same words."""
    loaders = {"images": load_encoder, "texts": load_text_encoder, "llava": load_llava}
    for kind, name, spoil in (("images", "clip", tear), ("texts", "clip", lose(TEXT)), ("llava", "llava", tear)):
        directory = copy_of(name, tmp_path / kind)
        spoil(directory)
        with pytest.raises(UsageError) as loading:
            loaders[kind](str(directory))
        with pytest.raises(UsageError) as checking:
            check_models([use(kind, directory)])
        assert str(checking.value).endswith(str(loading.value))


def test_reasons_are_told_whole(tmp_path: Path):
    """Of open_clip they have several lines: one for each key."""
    directory = copy_of("judge", tmp_path)
    edit_weights(directory, lambda weights: [weights.pop(name) for name in ("text_projection", "logit_scale")])
    edit_weights(directory, lambda weights: weights.update(stray=weights["visual.conv1.weight"].clone()))
    with pytest.raises(UsageError) as refused:
        check_models([use("images", directory, OPEN_CLIP)])
    for words in ("text_projection", "logit_scale", 'Unexpected key(s) in state_dict: "stray"'):
        assert words in str(refused.value)


VOCABULARY = {
    "clip": ("config.json", ("text_config",), ["text_model.embeddings.token_embedding.weight"]),
    "judge": ("open_clip_config.json", ("model_cfg", "text_cfg"), ["token_embedding.weight"]),
    "llava": (
        "config.json",
        ("text_config",),
        ["language_model.model.embed_tokens.weight"],
    ),
}


def swell(directory: Path) -> int:
    """Gives the language side a vocabulary whose embeddings are a hole in the file, and returns the file's size."""
    name, where, tensors = VOCABULARY[directory.name]
    config = json.loads((directory / name).read_text())
    part = config
    for key in where:
        part = part[key]
    [path] = directory.glob("*.safetensors")
    weights = load_file(path)
    rows = part["vocab_size"] = 2**27 // sum(weights[key].shape[1] for key in tensors)
    (directory / name).write_text(json.dumps(config))
    header, end = {}, 0
    for key, tensor in weights.items():
        width = tensor.shape[-1] if tensor.ndim else 1
        shape = [rows, width] if key in tensors else list(tensor.shape)
        size = 4 * rows * width if key in tensors else 4 * tensor.numel()
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


def most_memory() -> int:
    """Bytes that this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(("kind", "name"), [("texts", "clip"), ("images", "judge"), ("llava", "llava")])
def test_the_weights_themselves_are_not_read(kind: str, name: str, tmp_path: Path):
    directory = copy_of(name, tmp_path)
    check_models([use(kind, directory, OPEN_CLIP if name == "judge" else "")])
    size = swell(directory)
    assert size > 500 * 2**20
    before = most_memory()
    check_models([use(kind, directory, OPEN_CLIP if name == "judge" else "")])
    assert most_memory() - before < size / 4


@pytest.mark.parametrize("name", ["clip", "judge", "llava"])
def test_descriptions_are_stored_as_plain_json(name: str):
    """And say whether texts are embedded too."""
    model = f"{OPEN_CLIP if name == 'judge' else ''}{MODELS / name}"
    info = describe_encoder(model)
    assert EncoderInfo.from_dict(json.loads(json.dumps(asdict(info)))) == info
    assert info.has_text == (name != "llava")
    if name == "llava":
        llava = describe_llava(model)
        assert LlavaInfo.from_dict(json.loads(json.dumps(asdict(llava)))) == llava
        with pytest.raises(UsageError, match="llava does not embed texts; name a CLIP, SigLIP or open_clip model"):
            check_text_side(info)
    else:
        check_text_side(info)


def test_stored_descriptions_are_read_without_torch_and_transformers():
    program = (
        "import sys\n"
        "from sae_ray.steering.info import LlavaInfo\n"
        "from sae_ray.encoders import EncoderInfo, check_site, check_text_side\n"
        "from sae_ray.study.models import ModelUse, models_needed\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


UNREACHABLE = """
import os, shutil, sys
from pathlib import Path
from sae_ray.encoders import describe_encoder, load_encoder
from sae_ray.encoders.text import load_text_encoder
from sae_ray.errors import UsageError
from sae_ray.steering.llava import describe_llava, load_llava

# What is in the cache works.
commit, cache = "1f" * 20, Path(os.environ["HF_HUB_CACHE"])
for name in ("clip", "llava"):
    repository = cache / f"models--someone--{name}"
    shutil.copytree(f"{sys.argv[1]}/{name}", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
assert load_encoder("someone/clip").info.revision == commit
load_text_encoder("someone/clip", commit).embed_texts(["a star"])
assert load_llava("someone/llava", commit).info.revision == commit

asked = {
    "openai/clip-vit-base-patch32": [describe_encoder, load_encoder, load_text_encoder],
    "open_clip:ViT-B-32/laion2b_s34b_b79k": [load_encoder, load_text_encoder],
    "llava-hf/llava-1.5-7b-hf": [describe_llava, load_llava, describe_encoder],
}
for model, loaders in asked.items():
    for load in loaders:
        try:
            load(model)
        except UsageError as error:
            print(error)
"""


@pytest.fixture
def broken_hub() -> Iterator[tuple[str, list[object]]]:
    """The address of a hub that hangs up on everyone, and who called."""
    calls: list[object] = []

    class HangUp(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            calls.append(self.client_address)

    with socketserver.TCPServer(("127.0.0.1", 0), HangUp) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", calls
        server.shutdown()
        thread.join()


def test_a_hub_out_of_reach_is_tried_once_and_the_cache_still_works(broken_hub, tmp_path: Path):
    """In a process of its own, since the hub's settings are read at import. huggingface_hub would try six times a file,
    with half a minute in between."""
    hub, calls = broken_hub
    environment = {key: value for key, value in os.environ.items() if not key.upper().endswith("_PROXY")}
    environment |= {"HF_ENDPOINT": hub, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", UNREACHABLE, str(MODELS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(calls) == 1
    assert done.stdout.count(f"{hub} cannot be reached: ") == 8
    assert done.stdout.count("Name a local directory, or fill the cache") == 8
    for model in ("openai/clip-vit-base-patch32", "open_clip:ViT-B-32/laion2b_s34b_b79k", "llava-hf/llava-1.5-7b-hf"):
        assert f"{model} cannot be loaded: " in done.stdout
