"""One server for all tests: the application in its usual configuration, on a study of the embedded world."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml
from PIL import Image
from sae_ray.jobs.cluster import free_port
from sae_ray.serve.local import HTTP_GRACE_S

from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import recalled_plan
from sae_ray.world import write_world
from tests.machine import PATIENCE_S, cluster, until

KEY = "a-key-for-tests"
LIMITS = {"max_running": 16, "max_waiting": 32, "timeout_s": PATIENCE_S, "body_mb": 4}
STEERS = "layer3.random-4-matryoshka_batch_topk-x1-k4"
OTHER = "layer3.random-4-matryoshka_batch_topk-x2-k4"
ONE_WORD = "What is shown in this image? Use exactly one word!"


class Server(NamedTuple):
    """Where it is, and how to change it."""

    url: str
    key: str
    root: Path
    llava: str
    deploy: Callable[..., None]
    """Takes the `user_config` of the API, which soon is in force, and waits until there is an answer."""

    def client(self, **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE_S, **options)


def data_url(image: Image.Image | bytes) -> str:
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, "PNG")
        image = file.getvalue()
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def stored(upright: Image.Image, orientation: int, kind: str) -> bytes:
    """A file that shows this image by its EXIF orientation, though its pixels are turned otherwise."""
    turn = Image.Transpose
    turned = [None, turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE, turn.ROTATE_90]
    turned += [turn.TRANSVERSE, turn.ROTATE_270]
    way = turned[orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    (upright if way is None else upright.transpose(way)).save(stream, kind, exif=exif, quality=95)
    return stream.getvalue()


def white() -> Image.Image:
    return Image.new("RGB", (56, 56), "white")


def chat(prompt: str = ONE_WORD, *images: Image.Image, **rest: Any) -> dict[str, Any]:
    """A request for the likeliest answer about a white image, or other ones."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images or (white(),)]
    content = [*parts, {"type": "text", "text": prompt}]
    return {"messages": [{"role": "user", "content": content}], "temperature": 0} | rest


@pytest.fixture(scope="package")
def ray_cluster() -> Iterator[None]:
    """One real Ray cluster for the server. It ends with these tests, so that it does not slow those that follow."""
    with cluster():
        yield


@pytest.fixture(scope="package")
def served_study(ray_cluster, tmp_path_factory) -> Path:
    """The root of a finished study with two SAEs where the world's LLaVA reads its tower."""
    from sae_ray.jobs import evaluate, extract, score, train

    from sae_ray.study.root import remember

    world = tmp_path_factory.mktemp("served_world")
    write_world(world, n_train=2400, n_heldout=200)
    values = {
        "name": "served",
        "images": {"train": {"path": f"{world}/train"}, "heldout": {"path": f"{world}/heldout"}},
        "encoder": {"model": f"{world}/clip"},
        "judge": {"model": f"open_clip:local-dir:{world}/judge", "point": "projection"},
        "grid": [
            {
                "sites": ["layer3:random:4"],
                "architectures": ["matryoshka_batch_topk"],
                "expansions": [1, 2],
                "k": [4],
                "score_tokens": "all",
            }
        ],
        "training": {
            "batch_size": 512,
            "steps": 600,
            "warmup_steps": 60,
            "decay_start": 480,
            "threshold_beta": 0.99,
            "threshold_start_step": 150,
            "threshold": "average",
            "dead_after_samples": 75_000,
            "auxk_select": "pre",
        },
        "scoring": {"min_images": 5, "pictures": "train"},
        "steering": {"llava": f"{world}/llava", "scorer": f"{world}/clip", "ignore_labels": ["blank"]},
    }
    root = tmp_path_factory.mktemp("served") / "root"
    plan = StudyPlan(Study.from_dict(values), Folder(root))
    remember(plan)
    for stage in (extract, train, evaluate, score):
        stage.run(plan)
    return root


@pytest.fixture(scope="package")
def server(served_study) -> Server:
    """Deployed as `serve deploy cluster/serve/local.yaml` deploys it, but for root, port, limits and a key."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    file = Path(__file__).parents[2] / "cluster" / "serve" / "local.yaml"
    config = yaml.safe_load(file.read_text())
    [application] = config["applications"]
    application["args"] |= {"root": str(served_study), "limits": LIMITS, "without_key": False}
    application["runtime_env"] = {"env_vars": {"SAE_RAY_API_KEY": KEY}}
    for deployment in ("tower", "language"):
        application["args"].setdefault(deployment, {})["cpus"] = 0.1
    # Not the configuration's own, whose timeout is that of its own limits.
    config["http_options"] |= {"port": free_port(), "request_timeout_s": PATIENCE_S + HTTP_GRACE_S}
    serve.start(proxy_location=config["proxy_location"], http_options=config["http_options"])
    url = f"http://127.0.0.1:{config['http_options']['port']}"

    def deploy(user_config: dict[str, Any] | None = None) -> None:
        application["deployments"] = [] if user_config is None else [{"name": "Api", "user_config": user_config}]
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)
        until(lambda: status(url) == 200)

    deploy()
    yield Server(url, KEY, served_study, recalled_plan(str(served_study)).study.steering.llava, deploy)
    serve.shutdown()


def status(url: str) -> int | None:
    try:
        return httpx.get(f"{url}/ready", timeout=PATIENCE_S).status_code
    except httpx.HTTPError:
        return None


@pytest.fixture(scope="package")
def http(server) -> httpx.Client:
    with server.client() as client:
        yield client


@pytest.fixture(scope="package")
def star(http) -> int:
    """The feature that a search for stars finds first."""
    found = http.get(f"/v1/saes/{STEERS}/features", params={"search": "star"}).json()["data"]
    return found[0]["index"]


@pytest.fixture(scope="package")
def openai_client(server):
    from openai import OpenAI

    return OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0)
