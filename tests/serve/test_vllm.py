"""The vLLM engine says what the transformers engine says, which is what the LLaVA itself says."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("vllm")

from sae_ray.serve.config import ServeConfig, open_study, with_llava
from sae_ray.serve.conversation import Tokenizer
from sae_ray.serve.engine import Engine, Sampling, Task
from sae_ray.serve.transformers_engine import TransformersEngine
from sae_ray.serve.vllm_engine import VllmEngine
from sae_ray.serve.wire import ImagePart, ImageUrl, Message, TextPart

from sae_ray.files import Folder
from sae_ray.sae import load_sae
from sae_ray.steering import Intervention, LatentEdit, load_llava, load_max_token

from .conftest import ONE_WORD, STEERS

N = 100
PROMPTS = (ONE_WORD, "What colour is it?", "What is the background?", "Describe the image.")


@pytest.fixture(scope="module")
def config(served_study) -> ServeConfig:
    language = {"engine": "vllm", "kv_cache_mb": 64}
    return with_llava(ServeConfig.model_validate({"root": str(served_study), "language": language}))


@pytest.fixture(scope="module")
def asked(config) -> tuple[list[Task], list[str]]:
    """Tasks, plain and differently steered, with one image and with two; and the answers of the LLaVA itself."""
    llava, tokenizer = load_llava(config.model), Tokenizer(config.model, None)
    root = Folder(config.root)
    folder = root / next(name for name in root.folders() if name.startswith(f"sae-{STEERS}"))
    sae, max_token = load_sae(folder), load_max_token(folder)
    live = [latent for latent in range(sae.d_sae) if max_token[latent] > 0]
    files = sorted(Path(open_study(config.root).images.heldout.path).rglob("*.png"))
    dice = random.Random(0)
    tasks, answers = [], []
    for number in range(N):
        images = [Image.open(dice.choice(files)).convert("RGB") for _ in range(2 if number % 10 == 0 else 1)]
        chain, prompt = (), dice.choice(PROMPTS)
        if number % 3:
            chain = (Intervention(sae, (LatentEdit(dice.choice(live), "set", 4.0, "max"),), max_token=max_token),)
        seen = llava.image_embeddings(images, [chain] * len(images))
        answers += llava.generate([seen], [prompt], 16)
        parts = [ImagePart(type="image_url", image_url=ImageUrl(url="…")) for _ in images]
        message = Message(role="user", content=[*parts, TextPart(type="text", text=prompt)])
        tokens = tokenizer.prompt([message]).tokens
        tasks.append(Task(tokens, tuple(one.numpy() for one in seen), Sampling(16)))
    return tasks, answers


async def answer(engine: Engine, task: Task) -> tuple[list[int], str | None]:
    tokens, finish = [], None
    async for step in engine.generate(task):
        tokens += step.tokens
        finish = step.finish
    return tokens, finish


async def shuffled(engine: Engine, tasks: list[Task]) -> list[tuple[list[int], str | None]]:
    """All at once, in random order."""
    order = random.sample(range(N), N)
    answers = dict(zip(order, await asyncio.gather(*(answer(engine, tasks[place]) for place in order)), strict=True))
    return [answers[place] for place in range(N)]


def test_engines_agree_token_for_token(config, asked):
    tasks, expected = asked
    tokenizer = Tokenizer(config.model, None)
    engine = VllmEngine(config)

    async def run() -> None:
        crowd = await shuffled(engine, tasks)
        assert [tokenizer.decode(tokens).strip() for tokens, _ in crowd] == expected
        assert await shuffled(TransformersEngine(config), tasks) == crowd
        assert await shuffled(engine, tasks) == crowd, "what is cached by now changes nothing"
        assert [await answer(engine, task) for task in tasks] == crowd, "nor does company"
        assert len(set(expected)) > 10

        endless = Task(tasks[0].tokens, tasks[0].images, Sampling(200, temperature=2.0, seed=1))
        generation = engine.generate(endless)
        await anext(generation)
        await generation.aclose()
        await asyncio.sleep(0.2)
        assert engine._engine.output_processor.get_num_unfinished_requests() == 0

        wrong = Task(tasks[0].tokens, (tasks[0].images[0][:-1],), Sampling(4))
        with pytest.raises(ValueError, match="an embedding of shape"):
            await answer(engine, wrong)

    try:
        asyncio.run(run())
    finally:
        engine._engine.shutdown()
