"""The configuration of the application: the `args` of `serve run`, `serve deploy` and `sae-ray serve`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from sae_ray.errors import UsageError
from sae_ray.store.files import address_shown
from sae_ray.study.root import recalled_plan

Engine = Literal["transformers", "vllm"]
API_KEY = "SAE_RAY_API_KEY"
"""The environment variable that holds the key clients must send."""


Origin = Annotated[str, StringConstraints(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s]+)$")]
"""As browsers send it: without a path, and without a slash at the end."""


class Strict(BaseModel):
    """Unknown fields are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Replicas(Strict):
    """The number of replicas of a deployment, and the resources of each."""

    replicas: int = Field(default=1, ge=1)
    """Number of replicas."""
    cpus: float = Field(default=0.5, ge=0)
    """CPUs that Ray reserves per replica."""
    gpus: float = Field(default=0, ge=0)
    """GPUs per replica; a fraction shares one GPU."""


class Tower(Replicas):
    """Vision tower, interventions and projector."""

    batch_size: int = Field(default=16, ge=1)
    """Maximum number of images per forward pass. Each has its own intervention."""
    batch_wait_s: float = Field(default=0.004, ge=0)
    """Seconds to wait for more images before a forward pass."""
    saes_in_memory: int = Field(default=4, ge=1)
    """SAEs that a replica keeps loaded; the least recently used one is dropped."""


class Language(Replicas):
    """The language model."""

    engine: Engine = "transformers"
    """`transformers` is always installed; `vllm` has continuous batching and is an optional extra."""
    max_running: int = Field(default=64, ge=1)
    """Answers that a replica generates at the same time."""
    context: int | None = Field(default=None, ge=1)
    """Tokens of the longest request, with its images and answer. Default: as many as the language model takes. Fewer
    need less memory."""
    kv_cache_mb: int | None = Field(default=None, ge=1)
    """MiB for the keys and values of the answers that run; others wait. Default: on a GPU 80 % of what is free after
    weights and work, on a CPU 1024, but enough for one request of the longest length."""


class Limits(Strict):
    """Limits on requests, per replica of the API."""

    max_running: int = Field(default=32, ge=1)
    """Requests processed at the same time."""
    max_waiting: int = Field(default=128, ge=0)
    """Requests that may wait. Further requests are rejected with status 429."""
    timeout_s: float = Field(default=120, gt=0)
    """Maximum seconds per request, including the time it waits."""
    body_mb: float = Field(default=20, gt=0)
    """Maximum size of a request body in MB."""
    image_megapixels: float = Field(default=40, gt=0)
    """Maximum total size of a request's images, and size of its mask: by their headers, before they are decoded."""
    images: int = Field(default=8, ge=1)
    """Maximum number of images per request."""
    features: int = Field(default=64, ge=1)
    """Maximum number of edited features per request."""
    choices: int = Field(default=16, ge=1)
    """Maximum number of answers per request: `n` times the number of steering types."""
    max_tokens: int = Field(default=1024, ge=1)
    """Maximum tokens per answer, and the default when a request sets no maximum."""


class Selection(Strict):
    """The SAEs available for steering."""

    root: str
    """Directory or URI of the study that trained the SAEs."""
    saes: tuple[str, ...] | None = None
    """Names of SAEs of the study. Default: all that were trained on the layer that the LLaVA reads."""


class ServeConfig(Selection):
    """The whole configuration of the application."""

    llava: str | None = None
    """The LLaVA: a directory (a path or a URI) or a Hugging Face model id. Default: the study's."""
    revision: str | None = None
    """Revision of the LLaVA on the hub."""
    edit: str | None = None
    """A patch of `sae-ray edit make` (a path or a URI): the LLaVA is served with its weights edited. Default: none."""
    device: str = "cpu"
    """The torch device of the LLaVA."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The dtype of the LLaVA."""
    replicas: int = Field(default=1, ge=1)
    """Number of replicas of the HTTP API."""
    tower: Tower = Tower()
    language: Language = Language()
    limits: Limits = Limits()
    image_hosts: tuple[str, ...] = ()
    """Hosts that images may be fetched from. Default: none, so that images must be sent as data URLs."""
    allowed_origins: tuple[Origin, ...] = ()
    """Origins of web pages that may call the API from a browser, such as `https://chat.example.org`; `*` means all.
    Default: none but the playground."""
    without_key: bool = False
    """Serve without a key if the environment sets none. Then only requests to localhost or 127.0.0.1 are accepted."""

    @property
    def model(self) -> str:
        """The LLaVA, set by `with_llava`."""
        assert self.llava is not None, "call with_llava first"
        return self.llava


def with_llava(config: ServeConfig) -> ServeConfig:
    """The configuration, with the study's LLaVA if it names none.

    Raises UsageError when there is no study, or the study has no LLaVA.
    """
    if config.llava is not None:
        return config
    steering = recalled_plan(config.root).study.steering
    if steering is None:
        raise UsageError(
            f"the study in {address_shown(config.root)} has no LLaVA; set `llava` to a directory or a model id"
        )
    return config.model_copy(update={"llava": steering.llava, "revision": steering.revision})
