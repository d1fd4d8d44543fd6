"""The vLLM engine says what the transformers engine says, which is what the LLaVA itself says.

Two engines add in different orders, so an answer may differ where the two likeliest tokens are as good as equal.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
import uuid
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sae_ray.serve import transformers_engine
from sae_ray.serve.config import ServeConfig, with_llava
from sae_ray.serve.conversation import Tokenizer
from sae_ray.serve.engine import Engine, Sampling, Scored, Task
from sae_ray.serve.language import Language
from sae_ray.serve.schemas import ImagePart, ImageUrl, Message, TextPart
from sae_ray.serve.transformers_engine import TransformersEngine
from sae_ray.serve.vllm_engine import VllmEngine, _parameters

from sae_ray.sae import load_sae
from sae_ray.steering import Intervention, LatentEdit, load_llava, load_max_token
from sae_ray.store.files import Folder
from sae_ray.study.root import recalled_plan
from tests.machine import PATIENCE_S

from .conftest import ONE_WORD, STEERS

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

N = 100
CLEAR = 1e-3
"""Logits this far apart are told apart by every engine."""
ONE_TOKEN = ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6})
"""What leaves but one token to choose, at any temperature."""
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
    files = sorted(Path(recalled_plan(config.root).study.images.heldout.path).rglob("*.png"))
    dice = random.Random(0)
    prompts, shown, tasks = [dice.choice(PROMPTS) for _ in range(N)], [], []
    for number, prompt in enumerate(prompts):
        images = [Image.open(dice.choice(files)).convert("RGB") for _ in range(2 if number % 10 == 0 else 1)]
        chain = ()
        if number % 3:
            chain = (Intervention(sae, (LatentEdit(dice.choice(live), "set", 4.0, "max"),), max_token=max_token),)
        seen = llava.image_embeddings(images, [chain] * len(images))
        parts = [ImagePart(type="image_url", image_url=ImageUrl(url="…")) for _ in images]
        message = Message(role="user", content=[*parts, TextPart(type="text", text=prompt)])
        tokens = tokenizer.prompt([message]).tokens
        shown.append(seen)
        tasks.append(Task(tokens, tuple(one.numpy() for one in seen), Sampling(16)))
    return tasks, llava.generate(shown, prompts, 16)


async def answer(engine: Engine, task: Task) -> tuple[list[int], str | None]:
    tokens, finish = [], None
    async for step in engine.generate(task):
        tokens += step.tokens
        finish = step.finish
    return tokens, finish


async def scored(engine: Engine, task: Task) -> list[Scored]:
    return [one async for step in engine.generate(task) for one in step.scored]


def asked_in_text() -> list[Message]:
    return [Message(role="user", content=f"{one} (The star is red.)") for one in PROMPTS]


async def same_meaning(
    engine: Engine, other: TransformersEngine, tokenizer: Tokenizer, tasks: list[Task], patch
) -> None:
    """Both engines take every field of `Sampling` alike, with images and without."""
    penalties = ({"repetition_penalty": 1.5}, {"frequency_penalty": 0.7}, {"presence_penalty": -1.5})
    every = {"repetition_penalty": 0.8, "frequency_penalty": -0.5, "presence_penalty": 1.0}
    in_text = [Task(tokenizer.prompt([one]).tokens, (), Sampling(16)) for one in asked_in_text()]
    asked = [*in_text, *tasks[:8]]
    varied = [
        *asked,
        *(replace(task, sampling=Sampling(16, **one)) for task in asked for one in (*penalties, every)),
        *(replace(task, sampling=Sampling(16, 2.0, seed=2**63 - 1, **one)) for task in asked for one in ONE_TOKEN),
    ]
    clear = [await smallest_gap(other, task, patch) > CLEAR for task in varied]
    mine = await asyncio.gather(*(answer(engine, task) for task in varied))
    theirs = await asyncio.gather(*(answer(other, task) for task in varied))
    assert [n for n in range(len(varied)) if clear[n] and mine[n] != theirs[n]] == []
    assert sum(clear) > 0.9 * len(varied)
    for task in asked:
        sampling = Sampling(6, n_top_logprobs=3, repetition_penalty=1.5)
        ours, its = [await scored(each, replace(task, sampling=sampling)) for each in (other, engine)]
        assert [one.token for one in ours] == [one.token for one in its]
        for one, two in zip(ours, its, strict=True):
            assert two.logprob == pytest.approx(one.logprob, abs=1e-3)
            assert [value for _, value in two.top] == pytest.approx([value for _, value in one.top], abs=1e-3)
        only = await scored(engine, replace(task, sampling=replace(sampling, n_top_logprobs=0)))
        assert [(one.token, one.top) for one in only] == [(one.token, []) for one in its]

    seeded = replace(in_text[0], sampling=Sampling(16, 2.0, seed=2**63 - 1))
    assert await answer(engine, seeded) == await answer(engine, seeded)


async def smallest_gap(engine: TransformersEngine, task: Task, patch: pytest.MonkeyPatch) -> float:
    """Between the logits of the two likeliest tokens, over the steps of the answer."""
    gaps, choose = [], transformers_engine.choose

    def noting(logits: torch.Tensor, *rest: Any) -> list[int]:
        first, second = logits[0].topk(2).values.tolist()
        gaps.append(first - second)
        return choose(logits, *rest)

    with patch.context() as patched:
        patched.setattr(transformers_engine, "choose", noting)
        await answer(engine, task)
    return min(gaps)


async def shuffled(engine: Engine, tasks: list[Task]) -> list[tuple[list[int], str | None]]:
    """All at once, in random order."""
    order = random.sample(range(N), N)
    answers = dict(zip(order, await asyncio.gather(*(answer(engine, tasks[place]) for place in order)), strict=True))
    return [answers[place] for place in range(N)]


async def found_again(engine: VllmEngine, task: Task) -> int:
    """Tokens of the prompt that the engine need not read, since it has them."""
    from vllm.inputs import TokensPrompt

    embeddings = {"image": [engine._checked(one) for one in task.images]}
    prompt = TokensPrompt(prompt_token_ids=list(task.tokens), multi_modal_data=embeddings)
    outputs = [one async for one in engine._engine.generate(prompt, _parameters(task.sampling), uuid.uuid4().hex)]
    return outputs[-1].num_cached_tokens


async def caches_hit_where_they_can(engine: VllmEngine, tasks: list[Task], image_token: int) -> None:
    """An image that comes again is found in the cache of prefixes, and no other takes its place."""
    assert engine._engine.vllm_config.model_config.multimodal_config.mm_processor_cache_gb == 0
    block = engine._engine.vllm_config.cache_config.block_size
    images = [task.images[0] for task in tasks if len(task.images) == 1 and task.images[0].shape == engine.shape]
    n = block // engine.shape[0] + 1
    one = Task((1, *[image_token] * n, *tasks[1].tokens[-3:]), tuple(images[:n]), Sampling(1))
    assert await found_again(engine, one) == 0
    assert await found_again(engine, one) >= block
    assert await found_again(engine, replace(one, images=(images[-1], *one.images[1:]))) == 0


def test_engines_agree_token_for_token(config, asked, monkeypatch):
    tasks, expected = asked
    tokenizer = Tokenizer(config.model, None)
    engine, other = VllmEngine(config), TransformersEngine(config)

    async def run() -> None:
        clear = [await smallest_gap(other, task, monkeypatch) > CLEAR for task in tasks]

        def check(answers: list, wanted: list) -> None:
            same = [one == two for one, two in zip(answers, wanted, strict=True)]
            assert [number for number in range(N) if clear[number] and not same[number]] == []
            assert sum(same) >= 0.95 * N

        crowd = await shuffled(engine, tasks)
        check([tokenizer.decode(tokens).strip() for tokens, _ in crowd], expected)
        check(await shuffled(other, tasks), crowd)
        check(await shuffled(engine, tasks), crowd)  # what is cached by now changes nothing
        check([await answer(engine, task) for task in tasks], crowd)  # nor does company
        assert sum(clear) > 0.9 * N
        assert len(set(expected)) > 10

        await same_meaning(engine, other, tokenizer, tasks, monkeypatch)
        await caches_hit_where_they_can(engine, tasks, other._image_token)

        endless = Task(tasks[0].tokens, tasks[0].images, Sampling(200, temperature=2.0, seed=1))
        generation = engine.generate(endless)
        await anext(generation)
        await generation.aclose()
        deadline = time.monotonic() + PATIENCE_S
        while engine._engine.output_processor.get_num_unfinished_requests():
            assert time.monotonic() < deadline, "the engine goes on for nobody"
            await asyncio.sleep(0.01)

        one = tasks[0]
        [image, *_] = one.images
        with np.errstate(over="ignore"):
            infinite = image * 1e300
        for wrong in (image[:-1], image[:, :-1], image[None], image * np.nan, image.astype(int), infinite):
            with pytest.raises(ValueError, match="an embedding of shape"):
                await answer(engine, replace(one, images=(wrong,) * len(one.images)))
        assert await answer(engine, one) == crowd[0], "none of them ended the engine"

        replica: Any = object.__new__(Language.func_or_class)
        replica.engine, replica._running = engine, 0
        assert await replica.running() == 0
        [core] = engine._engine.engine_core.resources.engine_manager.processes
        os.kill(core.pid, signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE_S
        while not engine._engine.errored:
            assert time.monotonic() < deadline, "the engine is dead, but is said to run"
            await asyncio.sleep(0.01)
        from vllm.v1.engine.exceptions import EngineDeadError  # not in every process that collects tests

        with pytest.raises(EngineDeadError):
            await replica.running()  # what /ready asks

    try:
        asyncio.run(run())
    finally:
        engine._engine.shutdown()
        # vLLM keeps an exception, and so the frames that made the engine, until the interpreter ends: too late for it.
        del engine._engine
