"""A steered LLaVA for many users: ours behind HTTP with either engine, and the reference's way, a plain loop.

The language model has random weights (8 layers, 768 wide, float32), so that every answer has the same length; the
vision tower is that of the embedded world. Every system gets the same images, question and edits, and its answers are
compared first.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import httpx
from PIL import Image

from bench.record import record

CONCURRENCY = {1: 8, 8: 24, 32: 64}
"""Requests to send, by how many are sent at a time."""
N_TOKENS = 32
PORT = 18_431
QUESTION = "Describe the image."
LATENT, STRENGTH = 5, 40.0


class Load(NamedTuple):
    """One system under one load."""

    requests_per_second: float
    median_ms: float
    p95_ms: float
    p95_first_ms: float | None
    """Until the first token; None for a system that does not stream."""
    answers: list[str]


def main() -> None:
    import torch

    torch.set_num_threads(2)
    scratch = Path(tempfile.mkdtemp(prefix="sae-ray-bench-"))
    root, llava, images = prepare(scratch)
    measured: dict[str, dict[tuple[bool, int], Load]] = {}
    started: dict[str, float] = {}
    for engine in ("transformers", "vllm"):
        with serving(root, llava, engine) as seconds:
            started[engine] = seconds
            measured[f"sae-ray serve, {engine}"] = measure(over_http, images)
    reference = Reference(llava, root)
    measured["a loop: load, hook, one at a time"] = measure(reference.run, images)
    check(measured)
    rows = [
        [
            name,
            "steered" if steered else "plain",
            at_once,
            round(load.requests_per_second, 2),
            round(load.requests_per_second * N_TOKENS),
            round(load.median_ms),
            round(load.p95_ms),
            "" if load.p95_first_ms is None else round(load.p95_first_ms),
        ]
        for name, loads in measured.items()
        for (steered, at_once), load in loads.items()
    ]
    columns = ["system", "requests are", "at a time", "requests/s", "tokens/s", "median ms", "95 % below ms"]
    columns += ["first token, 95 % below ms"]
    record(
        "serve",
        [{"title": f"Answers of {N_TOKENS} tokens about one image each", "columns": columns, "rows": rows}],
        {"seconds_until_ready": {name: round(value, 1) for name, value in started.items()}},
    )


def prepare(scratch: Path) -> tuple[Path, Path, list[bytes]]:
    """A finished study where the LLaVA reads its tower, that LLaVA, and images as PNG files."""
    import ray
    from sae_ray.jobs import extract, score, train

    from sae_ray.store.files import Folder
    from sae_ray.study.config import Study
    from sae_ray.study.plan import StudyPlan
    from sae_ray.study.root import remember
    from sae_ray.world import write_world

    world, llava, root = scratch / "world", scratch / "llava", scratch / "root"
    write_world(world, n_train=600, n_heldout=64)
    write_llava(world, llava)
    values = {
        "name": "serve-bench",
        "images": {"train": {"path": f"{world}/train"}, "heldout": {"path": f"{world}/heldout"}},
        "encoder": {"model": f"{world}/clip"},
        "judge": {"model": f"open_clip:local-dir:{world}/judge", "point": "projection"},
        "grid": [
            {
                "sites": ["layer3:random:4"],
                "architectures": ["matryoshka_batch_topk"],
                "expansions": [64],
                "k": [20],
                "score_tokens": "all",
            }
        ],
        "training": {"batch_size": 256, "steps": 60, "warmup_steps": 6, "threshold_start_step": 20},
        "scoring": {"min_images": 5, "pictures": "train"},
        "steering": {"llava": str(llava), "scorer": f"{world}/clip"},
    }
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    plan = StudyPlan(Study.from_dict(values), Folder(root))
    remember(plan)
    for stage in (extract, train, score):
        stage.run(plan)
    ray.shutdown()
    return root, llava, [file.read_bytes() for file in sorted((world / "heldout").rglob("*.png"))]


def write_llava(world: Path, folder: Path) -> None:
    """The world's LLaVA with a larger, untrained language model."""
    import torch
    from transformers import LlamaConfig, LlavaForConditionalGeneration, LlavaProcessor

    from tools.world.make_llava import save_in_hub_layout

    small = LlavaForConditionalGeneration.from_pretrained(world / "llava")
    config: Any = small.config
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "initializer_range": 0.05}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64}
    config.text_config = LlamaConfig(**{**config.text_config.to_dict(), **sizes, **heads})
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(small.model.vision_tower.state_dict())
    model.generation_config = small.generation_config
    with torch.no_grad():  # a logit of 0 is never the largest: no answer ends by itself
        model.get_input_embeddings().weight[small.generation_config.eos_token_id] = 0
    save_in_hub_layout(model.half(), folder)
    LlavaProcessor.from_pretrained(world / "llava").save_pretrained(folder)


@contextmanager
def serving(root: Path, llava: Path, engine: str) -> Iterator[float]:
    """`sae-ray serve`, as long as it lasts; gives the seconds it took to be ready."""
    config = root.parent / f"{engine}.yaml"
    config.write_text("language: {kv_cache_mb: 512}\n" if engine == "vllm" else "{}\n")
    command = [Path(sys.executable).parent / "sae-ray", "serve", "--root", root, "--llava", llava, "--engine", engine]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    begun = time.monotonic()
    server = subprocess.Popen([*command, "--port", str(PORT), "--config", config], env=environment)
    try:
        while not ready():
            if server.poll() is not None or time.monotonic() - begun > 300:
                raise SystemExit(f"the server with the engine {engine} did not start")
            time.sleep(0.2)
        yield time.monotonic() - begun
    finally:
        server.terminate()
        server.wait(120)


def ready() -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{PORT}/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def measure(run: Callable[[list[tuple[bytes, bool]], int], Load], images: list[bytes]) -> dict[tuple[bool, int], Load]:
    """Every load, steered and not, after a warm-up."""
    found = {}
    run([(images[0], steered) for steered in (False, True)], 1)
    for at_once, n in CONCURRENCY.items():
        for steered in (False, True):
            found[steered, at_once] = run([(images[number % len(images)], steered) for number in range(n)], at_once)
    return found


def over_http(jobs: list[tuple[bytes, bool]], at_once: int) -> Load:
    async def run() -> Load:
        turn, times, answers = asyncio.Semaphore(at_once), [0.0] * len(jobs), [""] * len(jobs)
        firsts = [0.0] * len(jobs)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=600) as client:

            async def one(number: int) -> None:
                async with turn:
                    begun = time.monotonic()
                    async with client.stream("POST", "/v1/chat/completions", json=body(*jobs[number])) as answer:
                        answer.raise_for_status()
                        pieces, usage = [], {}
                        async for line in answer.aiter_lines():
                            if not line.startswith("data: {"):
                                continue
                            facts = json.loads(line[6:])
                            usage = facts.get("usage") or usage
                            text = "".join(choice["delta"].get("content") or "" for choice in facts["choices"])
                            if text and not pieces:
                                firsts[number] = time.monotonic() - begun
                            pieces += [text] if text else []
                    times[number] = time.monotonic() - begun
                assert usage["completion_tokens"] == N_TOKENS, usage
                answers[number] = "".join(pieces)

            begun = time.monotonic()
            await asyncio.gather(*map(one, range(len(jobs))))
            return load(time.monotonic() - begun, times, answers, firsts)

    return asyncio.run(run())


def body(image: bytes, steered: bool) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    request = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": N_TOKENS}
    request |= {"stream": True, "stream_options": {"include_usage": True}}
    return request | ({"steering": {"features": [{"index": LATENT, "strength": STRENGTH}]}} if steered else {})


class Reference:
    """As the paper's code steers: a hook that replaces the layer's output by a dense reconstruction, `generate` for one
    request, and then for the next one."""

    def __init__(self, llava: Path, root: Path):
        import torch
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        from sae_ray.sae import load_sae

        self.model = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32)
        self.processor = AutoProcessor.from_pretrained(llava, backend="pil")
        self.sae = load_sae(next(root.glob("sae-*")))
        self.one_at_a_time = threading.Lock()

    def run(self, jobs: list[tuple[bytes, bool]], at_once: int) -> Load:
        def one(job: tuple[bytes, bool]) -> tuple[float, str]:
            begun = time.monotonic()
            with self.one_at_a_time:
                answer = self.answer(*job)
            return time.monotonic() - begun, answer

        begun = time.monotonic()
        with ThreadPoolExecutor(at_once) as users:
            done = list(users.map(one, jobs))
        return load(time.monotonic() - begun, [seconds for seconds, _ in done], [answer for _, answer in done])

    def answer(self, image: bytes, steered: bool) -> str:
        import torch

        def replace(module: object, args: object, stream: torch.Tensor) -> torch.Tensor:
            sae = self.sae
            codes = torch.relu((stream - sae.b_dec) @ sae.W_enc + sae.b_enc)
            codes = codes * (codes > sae.threshold)
            codes[..., LATENT] = STRENGTH
            return codes @ sae.W_dec + sae.b_dec

        model: Any = self.model
        inputs = self.processor(
            images=Image.open(io.BytesIO(image)).convert("RGB"),
            text=self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
                add_generation_prompt=True,
                tokenize=False,
            ),
            return_tensors="pt",
        )
        layer = model.model.vision_tower.encoder.layers[-2]
        hooks = [layer.register_forward_hook(replace, prepend=True)] if steered else []
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=N_TOKENS, do_sample=False)
        for hook in hooks:
            hook.remove()
        return self.processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def load(seconds: float, times: list[float], answers: list[str], firsts: list[float] | None = None) -> Load:
    first = None if firsts is None else 1000 * p95(firsts)
    return Load(len(times) / seconds, 1000 * median(times), 1000 * p95(times), first, answers)


def p95(times: list[float]) -> float:
    return sorted(times)[min(len(times) - 1, int(0.95 * len(times)))]


def check(measured: dict[str, dict[tuple[bool, int], Load]]) -> None:
    """All systems must say the same; ties of random logits may fall either way in a few."""
    *ours, reference = measured.values()
    for loads in ours:
        pairs = [
            (mine.strip(), theirs.strip())
            for key in reference
            for mine, theirs in zip(loads[key].answers, reference[key].answers, strict=True)
        ]
        equal = sum(mine == theirs for mine, theirs in pairs) / len(pairs)
        if equal < 0.95:
            raise SystemExit(f"only {equal:.0%} of the answers are equal: the systems do not do the same work")


if __name__ == "__main__":
    main()
