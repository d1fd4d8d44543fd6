"""Prometheus metrics of one replica of the API."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .limiter import Limiter

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Requests, their durations, tokens, and the requests in the limiter."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, limiter: Limiter):
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "sae_ray_requests", "Requests by route and status.", ("route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "sae_ray_request_seconds",
            "Duration of requests, including streams to their end.",
            ("route",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self._tokens = Counter("sae_ray_tokens", "Prompt and completion tokens.", ("kind",), registry=self._registry)
        present = Gauge("sae_ray_requests_present", "Requests that are running or waiting.", registry=self._registry)
        present.set_function(lambda: limiter.present)

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def tokens(self, prompt: int, completion: int) -> None:
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("completion").inc(completion)

    def text(self) -> bytes:
        return generate_latest(self._registry)
