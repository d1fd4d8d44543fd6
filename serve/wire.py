"""What goes over the wire: OpenAI's chat completions with a `steering` object. A latent is called a feature here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sae_ray.steering.interventions import ALIASES, LatentEdit, Mode

SteeringType = Literal["STEERED", "DEFAULT"]
Finish = Literal["stop", "length"]
MAX_INDEX = 2**31 - 1
LARGEST = 1e6
"""Of strengths and their multiplier: what they make of an image stays a number in the language model."""


class Wire(BaseModel):
    """Values are taken as they are written, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Feature(Wire):
    """What happens to one feature on every token of every image."""

    index: int = Field(ge=0, le=MAX_INDEX, examples=[39])
    """Its number in the SAE."""
    strength: float | None = Field(default=None, ge=-LARGEST, le=LARGEST, examples=[4.0])
    """Negative ones suppress. Left out for `ablate`."""
    unit: Literal["absolute", "max"] = "absolute"
    """`max`: in multiples of the feature's largest value on a token; for `set` and `add`."""
    mode: Mode | Literal["clamp", "pin", "nudge", "mul", "suppress"] = "set"
    """`set` (clamp, pin), `add` (nudge), `scale` (mul) or `ablate` (suppress)."""

    @model_validator(mode="after")
    def _strength_where_it_belongs(self) -> Feature:
        if (self.strength is None) != (self.edit_mode == "ablate"):
            raise ValueError("strength belongs to every mode but ablate")
        if self.unit == "max" and self.edit_mode not in ("set", "add"):
            raise ValueError(f"unit max has no meaning for {self.mode}; it goes with set and add")
        return self

    @property
    def edit_mode(self) -> Mode:
        return ALIASES.get(self.mode, self.mode)  # type: ignore[return-value]


class Edits(Wire):
    """Which features of which SAE are edited, and how."""

    sae: str | None = None
    """Its id, as in `/v1/saes`; the first of them by default."""
    features: list[Feature] = Field(default_factory=list)
    """At most one edit per feature. Without any, what the SAE reconstructs of the image is shown."""
    strength_multiplier: float = Field(default=1.0, ge=-LARGEST, le=LARGEST, examples=[1.0])
    """Multiplies every strength."""
    error: Literal["drop", "keep"] = "drop"
    """What becomes of the part of the image's activations that the SAE does not reconstruct."""
    isolate: bool = False
    """Zeroes all other features."""

    @model_validator(mode="after")
    def _one_edit_per_feature(self) -> Edits:
        indices = [feature.index for feature in self.features]
        if len(set(indices)) < len(indices):
            raise ValueError("a feature is edited twice; leave one of the edits out")
        return self

    def latent_edits(self) -> tuple[LatentEdit, ...]:
        """As the science knows them; UsageError for what has no meaning."""
        return tuple(
            LatentEdit(one.index, one.edit_mode, (one.strength or 0.0) * self.strength_multiplier, one.unit)
            for one in self.features
        )


class Steering(Edits):
    """The steering of a chat completion."""

    types: list[SteeringType] = Field(default=["STEERED"], min_length=1, max_length=2)
    """With both, every choice is there steered and as the model is by default, in this order."""

    @model_validator(mode="after")
    def _each_type_once(self) -> Steering:
        if len(set(self.types)) < len(self.types):
            raise ValueError("types names one twice")
        return self


class TextPart(Wire):
    type: Literal["text"]
    text: str


class ImageUrl(Wire):
    url: str
    """`data:image/png;base64,…` (PNG, JPEG or WebP)."""
    detail: Literal["auto"] = "auto"


class ImagePart(Wire):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Wire):
    role: Literal["system", "user", "assistant"]
    content: str | list[Part]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def image_urls(self) -> list[str]:
        if isinstance(self.content, str):
            return []
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


class StreamOptions(Wire):
    include_usage: bool = False


class ChatRequest(Wire):
    """A chat completion as OpenAI's API has it. Of its further fields, those that are listed may have their neutral
    value; others are refused rather than ignored."""

    model: str | None = None
    """An id of `/v1/models`; there is one."""
    messages: list[Message] = Field(min_length=1, max_length=64)
    """An optional `system`, then `user` and `assistant` in turns, a `user` last. Images belong to users."""
    steering: Steering | None = None
    """Without it the plain LLaVA answers."""
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """The same by its newer name."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """0 takes the likeliest token every time."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    n: int = Field(default=1, ge=1)
    stop: str | list[str] | None = None
    """At most four strings that end an answer and are not part of it."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    logprobs: Literal[False] = False
    user: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        roles = [message.role for message in self.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        if turns != [("user", "assistant")[place % 2] for place in range(len(turns))] or len(turns) % 2 == 0:
            raise ValueError("messages must be an optional system, then user and assistant in turns, a user last")
        if any(message.image_urls and message.role != "user" for message in self.messages):
            raise ValueError("images belong to messages of the user")
        if not self.image_urls:
            raise ValueError("messages hold no image; add a part of the type image_url")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens mean the same; leave one out")
        if len(self.stops) > 4 or not all(self.stops):
            raise ValueError("stop takes one to four strings that are not empty")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options belong to streams; set stream to true")
        return self

    @property
    def image_urls(self) -> list[str]:
        return [url for message in self.messages for url in message.image_urls]

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def length(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens


class SteerRequest(Steering):
    """The short form: one image, one prompt, the likeliest answer."""

    image: str
    """A data URL, as in `image_url`."""
    prompt: str
    max_tokens: int = Field(default=64, ge=1)

    def chat(self) -> ChatRequest:
        """The long form."""
        steering = {name: getattr(self, name) for name in Steering.model_fields}
        image = ImagePart(type="image_url", image_url=ImageUrl(url=self.image))
        return ChatRequest(
            messages=[Message(role="user", content=[image, TextPart(type="text", text=self.prompt)])],
            steering=Steering(**steering),
            max_tokens=self.max_tokens,
            temperature=0.0,
        )


class InspectRequest(Wire):
    """Which features an image has."""

    image: str
    """A data URL, as in `image_url`."""
    sae: str | None = None
    limit: int = Field(default=16, ge=1, le=100)
    """Features, at most."""


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Reply(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    index: int
    message: Reply
    finish_reason: Finish
    logprobs: None = None
    steering_type: SteeringType


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Answer(BaseModel):
    steering_type: SteeringType
    text: str


class SteerResponse(BaseModel):
    answers: list[Answer]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sae-ray"


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Sae(BaseModel):
    id: str
    architecture: str
    d_in: int
    n_features: int
    layer: int
    """Of the vision tower, from 0."""
    site: str
    """Where and on which tokens it was trained."""


class Saes(BaseModel):
    object: Literal["list"] = "list"
    data: list[Sae]


class FeatureSummary(BaseModel):
    index: int
    name: str | None
    """The class that most of its top images belong to."""
    purity: float
    """The share of the top images that do."""
    ms: float | None
    """MonoSemanticity score."""
    frequency: float
    """Share of the images it fires on."""
    max_token: float
    """Its largest value on a token: the unit `max`."""
    n_images: int
    """Top images."""
    similarity: float | None = None
    """Cosine of the text that was searched for and the mean embedding of the top images."""


class Features(BaseModel):
    object: Literal["list"] = "list"
    data: list[FeatureSummary]
    total: int
    """Features that ever fired."""


class Bin(BaseModel):
    low: float
    high: float
    n_images: int


class TopImage(BaseModel):
    rank: int
    image_id: str
    label: str | None
    activation: float
    url: str


class FeatureDetail(FeatureSummary):
    histogram: list[Bin]
    """Held-out images by the feature's mean value, above 0."""
    images: list[TopImage]


class ActiveFeature(FeatureSummary):
    strongest: float
    """Largest value on a patch of this image."""
    heat: list[list[float]]
    """Value on every patch, row by row."""


class Inspection(BaseModel):
    sae: str
    data: list[ActiveFeature]


class ErrorFacts(BaseModel):
    message: str
    type: str
    param: str | None
    code: str
    request_id: str


class ErrorBody(BaseModel):
    """Every refusal and failure."""

    error: ErrorFacts


def chunk(base: dict[str, Any], choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
    """One event of a stream."""
    end = {} if usage is None else {"usage": usage.model_dump()}
    return base | {"object": "chat.completion.chunk", "choices": choices} | end
