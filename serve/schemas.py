"""Requests and responses of the HTTP API: OpenAI's chat completions with a `steering` object.

Here a latent is called a feature, as in other steering APIs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from sae_ray.steering.interventions import ALIASES, Condition, LatentEdit, Mode

from .neutral import Ignored, MessageOfOthers, Only, PartOfOthers, RequestOfOthers, Schema, check_whole, wrong

SteeringType = Literal["STEERED", "DEFAULT"]
Finish = Literal["stop", "length"]
MAX_INDEX = 2**31 - 1
MAX_STRENGTH = 1e6
"""Limit of strengths and of their multiplier. Within it, image embeddings stay finite in the language model."""


class Feature(Schema):
    """An edit of one feature, applied to every token of every image, or to those that `region` and `when` choose."""

    index: int = Field(ge=0, le=MAX_INDEX, examples=[39])
    """The index of the feature in its SAE."""
    strength: float | None = Field(default=None, ge=-MAX_STRENGTH, le=MAX_STRENGTH, examples=[4.0])
    """Negative values suppress the feature. Must be left out for `ablate`."""
    unit: Literal["absolute", "max"] = "absolute"
    """`max`: strength is a multiple of the feature's largest value on a token. For `set` and `add` only."""
    mode: Mode | Literal["clamp", "pin", "nudge", "mul", "suppress"] = "set"
    """`set`, `add`, `scale`, `ablate` or `balanced` (which needs `error` `keep`). Aliases: `clamp` and `pin` for `set`,
    `nudge` for `add`, `mul` for `scale`, `suppress` for `ablate`."""

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


Fraction = Annotated[float, Field(ge=0, le=1)]
Rectangle = Annotated[list[Fraction], Field(min_length=4, max_length=4, examples=[[0.0, 0.0, 0.5, 0.5]])]


class Region(Schema):
    """The part of an image to edit: the patches of which at least half lies in one of the rectangles or under the mask.

    The image counts as browsers show it: upright. Of several images, it is the same part of each.
    """

    rectangles: list[Rectangle] = Field(default_factory=list, max_length=100)
    """Left, top, right and bottom of each, in fractions of the image's width and height. They must not lie outside of
    what the model sees of the image, which is cropped if it is not square."""
    mask: str | None = None
    """A data URL, as in `image_url`. It is stretched over the image. What is white in it is edited; what is black or
    transparent is not."""

    @model_validator(mode="after")
    def _something_inside(self) -> Region:
        if not self.rectangles and self.mask is None:
            raise ValueError("must have rectangles or a mask; leave region out to edit the whole image")
        for place, (left, top, right, bottom) in enumerate(self.rectangles):
            if not (left < right and top < bottom):
                raise wrong(
                    f"rectangles.{place}", "must be left, top, right, bottom, with left < right and top < bottom"
                )
        return self


class When(Schema):
    """Edits only tokens on which a feature is above some value."""

    index: int = Field(ge=0, le=MAX_INDEX, examples=[39])
    """The index of the feature in the same SAE."""
    above: float = Field(default=0.0, ge=0, le=MAX_STRENGTH, examples=[0.0])
    """With 0, tokens on which the feature fires."""
    unit: Literal["absolute", "max"] = "absolute"
    """`max`: `above` is a multiple of the feature's largest value on a token."""

    def condition(self) -> Condition:
        return Condition(self.index, self.above, self.unit)


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
    region: Region | None = None
    """Default: the whole image."""
    when: When | None = None
    """Default: on all tokens of the region."""

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


class TextPart(PartOfOthers):
    type: Literal["text"]
    text: str


class ImageUrl(Schema):
    url: str
    """A data URL, `data:image/png;base64,…`. Its bytes decide what it is, not its media type."""
    detail: Ignored = None
    format: Ignored = None


def _as_image_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class ImagePart(PartOfOthers):
    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_as_image_url, json_schema_input_type=ImageUrl | str)]


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
PART_TYPES = ("text", "image_url")


def _as_parts(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of parts")
    return value


class Message(MessageOfOthers):
    role: Literal["system", "developer", "user", "assistant"]
    """`developer` means `system`."""
    content: Annotated[list[Part], BeforeValidator(_as_parts, json_schema_input_type=list[Part] | str)] = Field(
        default_factory=list
    )
    """A string, or a list of parts. Only `user` messages may contain images; an `assistant` message may have no
    content."""

    @model_validator(mode="after")
    def _content_of_its_role(self) -> Message:
        if "content" not in self.model_fields_set and self.role != "assistant":
            raise wrong("content", "is missing")
        for place, part in enumerate(self.content):
            if isinstance(part, ImagePart) and self.role != "user":
                raise wrong(f"content.{place}", f"only user messages may contain images, not {self.role} messages")
        return self

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def n_images(self) -> int:
        return sum(isinstance(part, ImagePart) for part in self.content)


class StreamOptions(Schema):
    include_usage: bool = False
    """Whether a last event tells the number of tokens."""
    include_obfuscation: Ignored = None
    continuous_usage_stats: Annotated[Any, Only(False, because="the usage comes at the end")] = None


class ChatRequest(RequestOfOthers):
    """A chat completion request of OpenAI's API, with `steering`. Fields that could change the answer and are not
    supported are refused, unless their value has no effect; `null` counts as left out."""

    model: str | None = None
    """The id listed by `/v1/models`."""
    messages: list[Message] = Field(min_length=1, max_length=1000)
    """Neighbouring messages of one role are merged. If the last one is of the role `assistant`, the answer goes on
    where it ends."""
    steering: Steering | None = None
    """Default: no steering."""
    max_tokens: int | None = Field(default=None, ge=1)
    """The maximum number of tokens per answer."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """OpenAI's newer name for `max_tokens`."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """0 always picks the most likely token."""
    top_p: float = Field(default=1.0, ge=0, le=1)
    """Samples from the most likely tokens whose probabilities sum to this."""
    top_k: int = Field(default=0, ge=-1, le=MAX_INDEX)
    """Samples from this many of the most likely tokens; 0 and -1 mean all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Samples from tokens whose probability is at least this share of the most likely one's."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Is subtracted from a token's logit for each time it was generated."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Is subtracted from a token's logit if it was generated."""
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    """Divides the logit of tokens that the messages or the answer contain; multiplies it if it is negative."""
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    """The same seed gives the same answer."""
    n: int = Field(default=1, ge=1)
    """The number of answers, per steering type."""
    stop: str | list[str] | None = None
    """Up to 16 strings. An answer ends before the first of them."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    """Whether to return the log probability of each token: the model's own, before temperature and penalties."""
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    """How many of the most likely tokens to return at each place of the answer. Needs `logprobs`."""

    @field_validator("stop", mode="after")
    @classmethod
    def _some_strings(cls, stop: str | list[str] | None) -> str | list[str] | None:
        strings = [stop] if isinstance(stop, str) else stop or []
        for one in strings:
            check_whole(one)
        if len(strings) > 16 or not all(strings):
            raise ValueError("must be up to 16 strings, none of them empty")
        return stop

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.steering is not None and not self.image_names:
            raise wrong("steering", "the messages contain no image, and only images are steered; leave steering out")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise wrong("max_tokens", "differs from max_completion_tokens, which means the same; remove one of them")
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs", "needs logprobs to be true")
        return self

    @property
    def image_urls(self) -> list[str]:
        return [part.image_url.url for _, part in self._images]

    @property
    def image_names(self) -> list[str]:
        """Where in the request each image is, such as `messages.0.content.1.image_url.url`."""
        return [f"{place}.image_url.url" for place, _ in self._images]

    @property
    def _images(self) -> list[tuple[str, ImagePart]]:
        return [
            (f"messages.{number}.content.{place}", part)
            for number, message in enumerate(self.messages)
            for place, part in enumerate(message.content)
            if isinstance(part, ImagePart)
        ]

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def length(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens

    @property
    def n_top_logprobs(self) -> int | None:
        """None without `logprobs`."""
        return self.top_logprobs or 0 if self.logprobs else None


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
    refusal: None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None
    """None for a part of a character."""


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class Choice(BaseModel):
    index: int
    message: Reply
    finish_reason: Finish
    logprobs: Logprobs | None = None
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


class ModelEdit(BaseModel):
    """What was taken out of the model's weights."""

    sae: str
    feature: int
    mode: str
    scope: str


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sae-ray"
    edit: ModelEdit | None = None
    """If the server was started with a patch of the weights."""


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
    """Its name, if the study has named its features; otherwise the label."""
    name_method: str | None
    """How the name was found: `vlm`, `steering`, `soft_wpmi`, or `label`."""
    name_score: float | None
    """How good the name is: for `vlm` and `steering` how well it tells held-out images (1 always, 0.5 by chance), for
    `soft_wpmi` in nats, for `label` the purity."""
    label: str | None
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
