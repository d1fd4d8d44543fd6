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
from .config import Replicas, Selection, ServeConfig, with_llava
from .language import Language
from .middleware import api_key
from .service import Service
from .tower import Tower

SHUTDOWN_GRACE_S = 5.0


@serve.deployment
@serve.ingress()
class Api:
    """The HTTP API in front of tower and language. `user_config`, a `Selection`, can change the SAEs at run time."""

    def __init__(self, config: ServeConfig, tower: Any, language: Any):
        api_key(config)
        self.service = Service(config, tower, language)

    def __serve_build_asgi_app__(self):
        return create_api(self.service)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Loads the SAEs of a study; Serve calls it at the start too. Running requests keep the SAEs they started with.

        Raises ValidationError for unknown fields, and whatever `read_catalogue` raises.
        """
        config = self.service.config
        wanted = Selection.model_validate({"root": config.root, "saes": config.saes} | user_config)
        await asyncio.to_thread(self.service.load_saes, wanted)


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

    # The API's limiter bounds the load on tower and language. Twice its size leaves room to answer 429 and to browse
    # features meanwhile; further requests wait in Serve's proxy or are rejected there.
    tower = Tower.options(**replicas(config.tower), max_ongoing_requests=4 * config.tower.batch_size)
    language = Language.options(**replicas(config.language), max_ongoing_requests=config.language.max_running)
    present = 2 * (limits.max_running + limits.max_waiting)
    api = Api.options(
        **replicas(config),
        max_ongoing_requests=present,
        max_queued_requests=present,
        user_config={"root": config.root, "saes": config.saes},
    )
    return api.bind(config, tower.bind(config), language.bind(config))
