"""The API with a real LLaVA, all in this process: what needs no cluster is tested without one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sae_ray.serve.coalescing import coalesced
from sae_ray.serve.config import Language, ServeConfig
from sae_ray.serve.engine import Engine, Task
from sae_ray.serve.language import HANDFUL_S
from sae_ray.serve.service import Service

from sae_ray.steering import Llava, load_llava

WORLD_LLAVA = Path(__file__).parents[2] / "sae_ray" / "world" / "models" / "llava"


FEW = Language(max_running=6)
"""So that a crowd has to wait."""


class Answer:
    """An answer as a handle of Ray Serve returns it."""

    def __init__(self, steps: AsyncIterator):
        self._steps = steps

    def __aiter__(self) -> AsyncIterator:
        return self._steps

    def cancel(self) -> None:
        asyncio.get_running_loop().create_task(self._steps.aclose())


class Tower:
    """Embeds images without steering."""

    def __init__(self, llava: Llava):
        self._llava = llava
        self.embed = SimpleNamespace(remote=self._embed)

    async def _embed(self, pixels: Any, changes: list[None]) -> list[Any]:
        assert changes == [None], "there is no SAE here"
        return [one.numpy() for one in self._llava.image_embeddings([pixels], [()])]


class Generator:
    """Calls an engine as the handle of its deployment would."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.generate = SimpleNamespace(remote=self._generate)

    def options(self, stream: bool) -> Generator:
        assert stream
        return self

    def _generate(self, task: Task) -> Answer:
        return Answer(coalesced(self._engine.generate(task), HANDFUL_S))


def direct_service(**options: Any) -> Service:
    from sae_ray.serve.transformers_engine import TransformersEngine

    config = ServeConfig(root="none", llava=str(WORLD_LLAVA), without_key=True, language=FEW, **options)
    return Service(config, Tower(load_llava(config.model)), Generator(TransformersEngine(config)))
