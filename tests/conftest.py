"""What all tests share: the environment, hypothesis' profile, small stores, images and encoders."""

from __future__ import annotations

import functools
import gc
import json
import os
import secrets
import shutil
import signal
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
# Small matrices: threads that wait for one another cost more than they bring, above all beside Ray's processes.
os.environ["OMP_NUM_THREADS"] = "1"
# Ray would leave one in the home of whoever runs the tests.
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
# By default Ray's workers give way to whatever else runs, so that beside other work some tests would wait for minutes.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # Ray reads it in this spelling
os.environ["WANDB_MODE"] = "offline"
# Copies from object stores; workers of the cluster see it, too.
os.environ["SAE_RAY_CACHE"] = tempfile.mkdtemp(prefix="sae-ray-cache-")

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from sae_ray.store.activations import ActivationStore, finish_store, write_part
from sae_ray.store.casting import stored_rows
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step
from sae_ray.study.plan import StudyPlan
from tests.machine import PATIENCE_S, cluster

# What imports and collected tests made stays; looking through it again and again took a fifth of the time.
gc.set_threshold(100_000, 50, 100)
# Tests send it to what they start, which would ignore it if a script had started them in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "sae-ray", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("sae-ray")


def pytest_collection_finish() -> None:
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()
    shutil.rmtree(os.environ["SAE_RAY_CACHE"], ignore_errors=True)


MARKS_BY_FIXTURE = {"ray_cluster": "ray", "ran": "ray", "server": "serve", "browser": "browser"}


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


FAULTS = Path(__file__).parents[1] / "docs" / "faults"


ON_A_CLUSTER = ("tests/jobs/", "tests/serve/")
"""Folders whose tests share a cluster. They take longest, so they begin first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests by what they use; those that start Ray or a server in processes of their own say so themselves."""
    for item in items:
        for fixture, mark in MARKS_BY_FIXTURE.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(mark)
    items.sort(key=lambda item: ON_A_CLUSTER.index(_folder(item.nodeid)) if _folder(item.nodeid) else len(ON_A_CLUSTER))


def _folder(nodeid: str) -> str | None:
    """Of `ON_A_CLUSTER`; None for other tests."""
    return next((folder for folder in ON_A_CLUSTER if nodeid.startswith(folder)), None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-faults", action="store_true", help="Write what tests of faults show to docs/faults, for its table."
    )


@pytest.fixture
def record_fault(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str, str], None]]:
    """`record_fault(fault, stage, outcome)`: what the test has just shown, for the table of the documentation."""
    rows: list[dict[str, str]] = []
    test = request.node.nodeid.partition("[")[0]

    def record(fault: str, stage: str, outcome: str) -> None:
        rows.append({"fault": fault, "stage": stage, "outcome": outcome, "test": test})

    yield record
    if rows and request.config.getoption("--record-faults"):
        FAULTS.mkdir(exist_ok=True)
        file = FAULTS / f"{request.node.name}.json"
        file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Processes (`make test` starts two) get all tests of a folder that share a cluster, or else a file at a time."""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class ByCluster(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _folder(nodeid) or super()._split_scope(nodeid)

    return ByCluster(config, log)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the product computes what the test expects of a CPU.

    A GPU convolves in float32 as it is: by default cuDNN first rounds the inputs to ten bits of mantissa (TF32). What
    the product runs on a GPU wherever there is one, it runs on the CPU if that is the device.
    """
    import torch

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if request.param == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return request.param


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One real Ray cluster for the drivers."""
    with cluster():
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Chromium. Its event loop runs in this thread, so that other modules could not run theirs beside it."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright for Python is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium here; apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        sync_api.expect.set_options(timeout=1000 * PATIENCE_S)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an empty bucket of a real S3 server, to be formatted with a path."""
    from sae_ray.jobs.cluster import free_port

    from tests.object_store import object_store

    with object_store(tmp_path_factory.mktemp("s3") / "log", "127.0.0.1", free_port()) as address:
        yield address


@pytest.fixture(scope="session")
def write_store() -> Callable[..., ActivationStore]:
    """Writes a finished extraction step and opens it.

    Call it with a root and the parts, each `(image_index, token, activation)`; `label` tells stores of a root apart.
    """

    def write(
        root: Path | str,
        parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
        store_dtype: str = "float32",
        images_per_part: int = 512,
        label: str = "activations",
    ) -> ActivationStore:
        config = {"store_dtype": store_dtype, "images_per_part": images_per_part}
        step = Step(Folder(root), "extract", label, config)
        written = [
            write_part(step.folder, number, stored_rows(*rows, store_dtype), []) for number, rows in enumerate(parts)
        ]
        finish_store(step, written, parts[0][2].shape[1], 0.0)
        return ActivationStore(step.folder)

    return write


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., str]:
    """Saves a randomly initialised CLIP of 28 × 28 pixels in the transformers format and returns its directory."""

    def make(directory: Path, n_layers: int = 2, width: int = 32, projection: int = 16, seed: int = 0) -> str:
        import torch
        from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

        shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2}
        text = {"num_hidden_layers": 1, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        vision = {"num_hidden_layers": n_layers, "image_size": 28, "patch_size": 14}
        torch.manual_seed(seed)
        config = CLIPConfig(text_config=shape | text, vision_config=shape | vision, projection_dim=projection)
        CLIPModel(config).save_pretrained(directory)
        processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        processor.save_pretrained(directory)
        return str(directory)

    return make


@pytest.fixture(scope="session")
def tiny_clip(make_clip: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP of two layers, 32 wide, with a projection to 16."""
    return make_clip(tmp_path_factory.mktemp("encoders") / "clip")


@pytest.fixture(scope="session")
def tiny_judge(make_clip: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another CLIP of that shape, for a judge."""
    return make_clip(tmp_path_factory.mktemp("encoders") / "judge", seed=1)


@pytest.fixture(scope="session")
def make_llava() -> Callable[..., str]:
    """Saves a randomly initialised LLaVA of 28 × 28 pixels in the transformers format and returns its directory.

    The vision tower is 32 wide and has 3 blocks and 16 patches; the weights are large enough that answers differ.
    """

    def make(
        directory: Path, tower: str = "clip", strategy: str = "default", layer: int = -2, template: str | None = None
    ) -> str:
        import torch
        import transformers as tf
        from tokenizers import Tokenizer, models, pre_tokenizers, processors

        shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "initializer_range": 0.4}
        seen = {"num_hidden_layers": 3, "image_size": 28, "patch_size": 7, "initializer_factor": 8.0}
        configs = {
            "clip": tf.CLIPVisionConfig,
            "siglip": tf.SiglipVisionConfig,
            "dinov2": functools.partial(tf.Dinov2Config, mlp_ratio=2),
            "vit": tf.ViTConfig,
        }
        vision = configs[tower](**{**shape, **seen})
        special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        words = [*special.values(), "<image>", "USER", "ASSISTANT", ":", "?", *(f"w{i}" for i in range(51))]
        ids = {word: i for i, word in enumerate(words)}
        text = {"num_hidden_layers": 2, "vocab_size": len(words), "max_position_embeddings": 128}
        ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
        llama = tf.LlamaConfig(**shape, **text, **ends)
        config = tf.LlavaConfig(
            vision_config=vision,
            text_config=llama,
            image_token_index=ids["<image>"],
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
        )
        torch.manual_seed(0)
        model = tf.LlavaForConditionalGeneration(config)
        model.generation_config = tf.GenerationConfig(**ends)
        model.save_pretrained(directory)

        backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
        tokenizer = tf.PreTrainedTokenizerFast(
            tokenizer_object=backend,
            **special,
            additional_special_tokens=["<image>"],
            clean_up_tokenization_spaces=False,
        )
        square = {"height": 28, "width": 28}
        images = {
            "clip": lambda: tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=square),
            "siglip": lambda: tf.SiglipImageProcessor(size=square),
            "dinov2": lambda: tf.BitImageProcessor(size={"shortest_edge": 32}, crop_size=square),
            "vit": lambda: tf.ViTImageProcessor(size=square),
        }[tower]()
        tf.LlavaProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=7,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=int(tower != "siglip"),
            chat_template=template,
        ).save_pretrained(directory)
        return str(directory)

    return make


@pytest.fixture(scope="session")
def tiny_llava(make_llava: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LLaVA whose language model reads the last block but one of a CLIP tower."""
    return make_llava(tmp_path_factory.mktemp("llava") / "llava")


@pytest.fixture(scope="session")
def plan_small_study(tiny_llava: str, tiny_clip: str, tiny_judge: str) -> Callable[..., StudyPlan]:
    """`plan_small_study(directory, **{"scoring.min_images": 5})`: the plan of `tests.small_study` there."""
    from tests.small_study import plan_study

    def plan(directory: Path, **overrides: object) -> StudyPlan:
        return plan_study(directory, tiny_llava, tiny_clip, tiny_judge, **overrides)

    return plan


@pytest.fixture(scope="session")
def small_study(plan_small_study: Callable[..., StudyPlan], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with its images and all its steps done, under `root`; copy it before writing to it."""
    from tests.small_study import finish_study

    directory = tmp_path_factory.mktemp("small_study") / "study"
    finish_study(plan_small_study(directory))
    return directory
