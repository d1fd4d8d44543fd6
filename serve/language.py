"""The language deployment: generates answers from prompts and image embeddings, with one of two engines."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import assert_never

from ray import serve

from .coalescing import coalesced
from .config import ServeConfig
from .engine import Engine, Step, Task

logger = logging.getLogger("ray.serve")

HANDFUL_S = 0.03
"""Seconds between two messages of tokens of an answer. What streams faster is not read faster."""


@serve.deployment
class Language:
    """Generates answers. The language model itself is never modified: steering only changes the image embeddings."""

    def __init__(self, config: ServeConfig):
        self.engine = make_engine(config)
        logger.info("memory: %s", self.engine.memory)
        self._running = 0

    async def generate(self, task: Task) -> AsyncGenerator[Step, None]:
        self._running += 1
        try:
            async with aclosing(coalesced(self.engine.generate(task), HANDFUL_S)) as steps:
                async for step in steps:
                    yield step
        finally:
            self._running -= 1

    async def memory(self) -> str:
        """What was reserved for what, and how many requests of the longest length fit at once."""
        return str(self.engine.memory)

    async def running(self) -> int:
        """Number of answers that this replica is generating.

        Raises if its engine has failed: Ray Serve takes half a minute to see that and to replace the replica.
        """
        self.engine.check()
        return self._running

    async def check_health(self) -> None:
        self.engine.check()


def make_engine(config: ServeConfig) -> Engine:
    match config.language.engine:
        case "transformers":
            from .transformers_engine import TransformersEngine

            return TransformersEngine(config)
        case "vllm":
            from .vllm_engine import VllmEngine

            return VllmEngine(config)
        case never:
            assert_never(never)
