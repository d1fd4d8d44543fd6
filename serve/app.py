"""The application builder, shared by `sae-ray serve`, `serve run` and `serve deploy`.

serve run sae_ray.serve.app:build root=runs/demo without_key=true
"""

# Ray reads the builder's annotation as it stands, so it must not be a string: no `from __future__ import annotations`.

import asyncio
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from .api import create_api
from .config import Replicas, ServeConfig, with_llava
from .language import Language
from .manners import api_key
from .service import Service
from .tower import Tower

SHUTDOWN_GRACE_S = 5.0


@serve.deployment
@serve.ingress()
class Api:
    """HTTP in front of tower and language. `user_config` names the SAEs, and may name others while it runs."""

    def __init__(self, config: ServeConfig, tower: Any, language: Any):
        api_key(config)
        self.service = Service(config, tower, language)

    def __serve_build_asgi_app__(self):
        return create_api(self.service)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Takes up the SAEs of a study. Requests that are on their way keep those they began with."""
        service = self.service
        known = service.config.root, service.config.saes
        wanted = user_config.get("root", known[0]), user_config.get("saes", known[1])
        service.saes = await asyncio.to_thread(service.read, *wanted)


def build(config: ServeConfig) -> Application:
    """The application of a configuration."""
    config = with_llava(config)
    limits = config.limits
    logs = LoggingConfig(encoding="JSON")
    grace = limits.timeout_s + SHUTDOWN_GRACE_S

    def replicas(of: Replicas | ServeConfig) -> dict[str, Any]:
        resources = {"num_cpus": of.cpus, "num_gpus": of.gpus} if isinstance(of, Replicas) else {"num_cpus": 0.5}
        return {
            "num_replicas": of.replicas,
            "ray_actor_options": resources,
            "graceful_shutdown_timeout_s": grace,
            "logging_config": logs,
        }

    # The API bounds what is there at once; behind it nothing is refused.
    present = limits.max_running * limits.choices * config.replicas
    tower = Tower.options(**replicas(config.tower), max_ongoing_requests=4 * config.tower.batch_size)
    language = Language.options(
        **replicas(config.language), max_ongoing_requests=config.language.max_running, max_queued_requests=-1
    )
    api = Api.options(
        **replicas(config),
        max_ongoing_requests=2 * (limits.max_running + limits.max_waiting) + present,
        user_config={"root": config.root, "saes": config.saes},
    )
    return api.bind(config, tower.bind(config), language.bind(config))
