"""Requests and responses of the HTTP API: OpenAI's chat completions with a `steering` object.

Here a latent is called a feature, as in other steering APIs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sae_ray.steering.interventions import ALIASES, LatentEdit, Mode

SteeringType = Literal["STEERED", "DEFAULT"]
Finish = Literal["stop", "length"]
MAX_INDEX = 2**31 - 1
MAX_STRENGTH = 1e6
"""Limit of strengths and of their multiplier. Within it, image embeddings stay finite in the language model."""


class Schema(BaseModel):
    """Values are not converted, and unknown fields are an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Feature(Schema):
    """An edit of one feature, applied to every token of every image."""

    index: int = Field(ge=0, le=MAX_INDEX, examples=[39])
    """The index of the feature in its SAE."""
    strength: float | None = Field(default=None, ge=-MAX_STRENGTH, le=MAX_STRENGTH, examples=[4.0])
    """Negative values suppress the feature. Must be left out for `ablate`."""
    unit: Literal["absolute", "max"] = "absolute"
    """`max`: strength is a multiple of the feature's largest value on a token. For `set` and `add` only."""
    mode: Mode | Literal["clamp", "pin", "nudge", "mul", "suppress"] = "set"
    """`set`, `add`, `scale` or `ablate`. Aliases: `clamp` and `pin` for `set`, `nudge` for `add`, `mul` for `scale`,
    `suppress` for `ablate`."""

    @model_validator(mode="after")
    def _strength_where_it_belongs(self) -> Feature:
        if (self.strength is None) != (self.edit_mode == "ablate"):
            raise ValueError("strength is required, except for the mode ablate, which takes none")
        if self.unit == "max" and self.edit_mode not in ("set", "add"):
            raise ValueError(f"the unit max cannot be used with the mode {self.mode}; use set or add")
        return self

    @property
    def edit_mode(self) -> Mode:
        return ALIASES.get(self.mode, self.mode)  # type: ignore[return-value]


class Edits(Schema):
    """Edits of the features of one SAE."""

    sae: str | None = None
    """The id of an SAE, as listed by `/v1/saes`. Default: the first one."""
    features: list[Feature] = Field(default_factory=list)
    """The edits, at most one per feature. Without edits the SAE's reconstruction of the image is used."""
    strength_multiplier: float = Field(default=1.0, ge=-MAX_STRENGTH, le=MAX_STRENGTH, examples=[1.0])
    """Multiplies all strengths."""
    error: Literal["drop", "keep"] = "drop"
    """Whether to drop or keep the part of the image's activations that the SAE does not reconstruct."""
    isolate: bool = False
    """Set all other features to zero."""

    @model_validator(mode="after")
    def _one_edit_per_feature(self) -> Edits:
        indices = [feature.index for feature in self.features]
        if len(set(indices)) < len(indices):
            raise ValueError("a feature is edited twice; remove one of the edits")
        return self

    def latent_edits(self) -> tuple[LatentEdit, ...]:
        """The edits of latents. Raises UsageError if one is invalid."""
        return tuple(
            LatentEdit(one.index, one.edit_mode, (one.strength or 0.0) * self.strength_multiplier, one.unit)
            for one in self.features
        )


class Steering(Edits):
    """The steering of a chat completion."""

    types: list[SteeringType] = Field(default=["STEERED"], min_length=1, max_length=2)
    """Which answers to return: steered, unsteered (`DEFAULT`), or both, in this order."""

    @model_validator(mode="after")
    def _each_type_once(self) -> Steering:
        if len(set(self.types)) < len(self.types):
            raise ValueError("types contains a duplicate; remove it")
        return self


class TextPart(Schema):
    type: Literal["text"]
    text: str


class ImageUrl(Schema):
    url: str
    """A data URL, `data:image/png;base64,…` (PNG, JPEG or WebP)."""
    detail: Literal["auto"] = "auto"


class ImagePart(Schema):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Schema):
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


class StreamOptions(Schema):
    include_usage: bool = False


class ChatRequest(Schema):
    """A chat completion request of OpenAI's API, with `steering`. Penalties, `logprobs` and `user` are accepted for
    compatibility, but only with values that have no effect. Unknown fields are an error."""

    model: str | None = None
    """The id listed by `/v1/models`."""
    messages: list[Message] = Field(min_length=1, max_length=64)
    """An optional `system` message, then `user` and `assistant` messages in turn, ending with a `user` message. Only
    `user` messages may contain images."""
    steering: Steering | None = None
    """Default: no steering."""
    max_tokens: int | None = Field(default=None, ge=1)
    """The maximum number of tokens per answer."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """OpenAI's newer name for `max_tokens`."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """0 always picks the most likely token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    n: int = Field(default=1, ge=1)
    stop: str | list[str] | None = None
    """Up to four strings. An answer ends before the first of them."""
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
            raise ValueError(
                "messages must be an optional system message, then user and assistant messages in turn, "
                "ending with a user message"
            )
        if any(message.image_urls and message.role != "user" for message in self.messages):
            raise ValueError("only user messages may contain images")
        if not self.image_urls:
            raise ValueError("messages contain no image; add a part of the type image_url")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens mean the same; remove one of them")
        if len(self.stops) > 4 or not all(self.stops):
            raise ValueError("stop must be one to four non-empty strings")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options require stream to be true")
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
    """The short form: one image and one prompt, answered with greedy decoding."""

    image: str
    """A data URL, as in `image_url`."""
    prompt: str
    max_tokens: int = Field(default=64, ge=1)

    def chat(self) -> ChatRequest:
        """The same request as a chat completion."""
        steering = {name: getattr(self, name) for name in Steering.model_fields}
        image = ImagePart(type="image_url", image_url=ImageUrl(url=self.image))
        return ChatRequest(
            messages=[Message(role="user", content=[image, TextPart(type="text", text=self.prompt)])],
            steering=Steering(**steering),
            max_tokens=self.max_tokens,
            temperature=0.0,
        )


class InspectRequest(Schema):
    """Asks which features are active on an image."""

    image: str
    """A data URL, as in `image_url`."""
    sae: str | None = None
    limit: int = Field(default=16, ge=1, le=100)
    """Maximum number of features to return."""


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
    """The layer of the vision tower, counted from 0."""
    site: str
    """The layer and the tokens that the SAE was trained on."""


class Saes(BaseModel):
    object: Literal["list"] = "list"
    data: list[Sae]


class FeatureSummary(BaseModel):
    index: int
    name: str | None
    """The most common class of its top images."""
    purity: float
    """The share of its top images that belong to this class."""
    ms: float | None
    """MonoSemanticity score."""
    frequency: float
    """The share of images that it fires on."""
    max_token: float
    """Its largest value on a token: 1 in the unit `max`."""
    n_images: int
    """Number of top images."""
    similarity: float | None = None
    """Cosine similarity of the search text and the mean embedding of the top images."""


class Features(BaseModel):
    object: Literal["list"] = "list"
    data: list[FeatureSummary]
    total: int
    """Number of features found; `data` contains one page of them."""


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
    """Number of held-out images by the feature's mean value on the image, where above 0."""
    images: list[TopImage]


class ActiveFeature(FeatureSummary):
    strongest: float
    """The largest value on a patch of this image."""
    heat: list[list[float]]
    """The value on every patch, as rows of the patch grid."""


class Inspection(BaseModel):
    sae: str
    image: str
    """The image as the encoder sees it, upright, resized and cropped, as a data URL. The patch grids cover it."""
    data: list[ActiveFeature]


class ErrorFacts(BaseModel):
    message: str
    type: str
    param: str | None
    code: str
    request_id: str


class ErrorBody(BaseModel):
    """An error, in the format of OpenAI's API."""

    error: ErrorFacts


def chunk(base: dict[str, Any], choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
    """One event of a stream."""
    end = {} if usage is None else {"usage": usage.model_dump()}
    return base | {"object": "chat.completion.chunk", "choices": choices} | end
