"""The one configuration of the application: the `args` of `serve run` and `serve deploy`, and of `sae-ray serve`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sae_ray.errors import UsageError
from sae_ray.study.root import recalled_plan

Engine = Literal["transformers", "vllm"]
API_KEY = "SAE_RAY_API_KEY"
"""The environment variable that holds the key which clients must send."""


class Strict(BaseModel):
    """Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Replicas(Strict):
    """How often a deployment runs, and what each replica takes."""

    replicas: int = Field(default=1, ge=1)
    """Copies that share the load."""
    cpus: float = Field(default=0.5, ge=0)
    """CPUs that Ray reserves for a replica."""
    gpus: float = Field(default=0, ge=0)
    """GPUs of a replica; a fraction shares one."""


class Tower(Replicas):
    """Vision tower, interventions and projector."""

    batch_size: int = Field(default=16, ge=1)
    """Images, each with its own intervention, in one forward pass at most."""
    batch_wait_s: float = Field(default=0.004, ge=0)
    """How long an image waits for others to join its pass."""
    saes_in_memory: int = Field(default=4, ge=1)
    """SAEs that a replica keeps; the one that was not used for longest makes room."""


class Language(Replicas):
    """The language model."""

    engine: Engine = "transformers"
    """`transformers` needs nothing else; `vllm` has continuous batching and is an extra installation."""
    max_running: int = Field(default=64, ge=1)
    """Answers that a replica generates at the same time."""
    kv_cache_mb: int | None = Field(default=None, ge=1)
    """Memory of vLLM's key-value cache; by default most of a GPU, as vLLM has it, and 1024 without a GPU."""


class Limits(Strict):
    """What a request may ask for, and how many may be there at once, per replica of the API."""

    max_running: int = Field(default=32, ge=1)
    """Requests that are worked on at the same time."""
    max_waiting: int = Field(default=128, ge=0)
    """Requests that wait for that; one more is refused with 429."""
    timeout_s: float = Field(default=120, gt=0)
    """Time that a request may take, waiting included."""
    body_mb: float = Field(default=20, gt=0)
    """Size of a request."""
    image_megapixels: float = Field(default=40, gt=0)
    """Size of the images of a request together, looked up in their headers before they are decoded."""
    images: int = Field(default=8, ge=1)
    """Images of a request."""
    features: int = Field(default=64, ge=1)
    """Features that a request edits."""
    choices: int = Field(default=16, ge=1)
    """Answers of a request: `n` times the number of steering types."""
    max_tokens: int = Field(default=1024, ge=1)
    """Length of an answer in tokens; also what is generated at most when a request names no length."""


class Selection(Strict):
    """The SAEs that steer."""

    root: str
    """The study they are of: its directory or URI."""
    saes: tuple[str, ...] | None = None
    """Names of its SAEs; all that were trained where the LLaVA reads its vision tower by default."""


class ServeConfig(Selection):
    """Everything that the application is told."""

    llava: str | None = None
    """The LLaVA, a directory or a model id on the Hugging Face hub; the study's by default."""
    revision: str | None = None
    """Pins the weights of the LLaVA."""
    device: str = "cpu"
    """A torch device."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the LLaVA computes in."""
    replicas: int = Field(default=1, ge=1)
    """Copies of the HTTP API."""
    tower: Tower = Tower()
    language: Language = Language()
    limits: Limits = Limits()
    image_hosts: tuple[str, ...] = ()
    """Hosts that `image_url` may name; by default images come with the request."""
    without_key: bool = False
    """Serve this machine without a key when the environment holds none: only localhost and 127.0.0.1 are answered."""

    @property
    def model(self) -> str:
        """The LLaVA, once `with_llava` has seen to it."""
        assert self.llava is not None, "see with_llava"
        return self.llava


def with_llava(config: ServeConfig) -> ServeConfig:
    """The configuration with the study's LLaVA, where it names none.

    Raises UsageError when the study is not there or has none.
    """
    if config.llava is not None:
        return config
    steering = recalled_plan(config.root).study.steering
    if steering is None:
        raise UsageError(f"the study in {config.root} steers no LLaVA; name one: llava = DIR_OR_ID")
    return config.model_copy(update={"llava": steering.llava, "revision": steering.revision})
