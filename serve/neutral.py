"""What clients send that changes nothing here: `null`, fields that are ignored, and values that have no effect.

Every field of OpenAI's chat completions is known, and those that other servers of this API have added. A field that
could change the answer and is not supported takes only its neutral values; all others are refused, with the reason.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class Schema(BaseModel):
    """`null` counts as left out. Otherwise values are not converted, and unknown fields are an error, as is half of a
    character."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, value in values.items():
            if isinstance(value, str):
                check_whole(value, name)
        return {name: value for name, value in values.items() if value is not None}


def check_whole(text: str, field: str | None = None) -> None:
    """Refuses a text with half of a character, which clients send that cut texts between two units of UTF-16.

    Args:
        field: it, if the validator sees several.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise wrong(field, f"contains half of a character ({half}); cut texts between characters") from error


def wrong(field: str | None, message: str) -> PydanticCustomError:
    """An error about one field, for validators that see several."""
    return PydanticCustomError("wrong", "{message}", {"message": message} | ({"field": field} if field else {}))


@dataclass(frozen=True, init=False, eq=False)  # else `Annotated` would take Only(0) for Only(False)
class Only:
    """Marks a field that takes only values without effect, besides `null`.

    Args:
        values: these.
        because: why others are refused, to be read after "since".
    """

    values: tuple[Any, ...]
    because: str

    def __init__(self, *values: Any, because: str):
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "because", because)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {"enum": [*self.values, None], "description": f"Others are refused, since {self.because}."}

    def _checked(self, value: Any) -> Any:
        # Compared as JSON, where 1 is 1.0 but not true.
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.values):
            instead = "".join(f" or send {json.dumps(one)}" for one in self.values)
            raise ValueError(f"not supported, since {self.because}; leave it out{instead}")
        return value


Ignored = Annotated[Any, Field(description="Has no effect.")]

_TOOLS = "the model calls no tools"
_FORMAT = "the model answers in plain text"
_CONSTRAINED = "answers cannot be constrained"
_AUDIO = "the model reads text and images and writes text"
_SAMPLER = "the engines do not have this sampler"
_TEMPLATE = "the chat template is the model's own"
_TOKENS = "tokens are decoded in one way"
_ONE_SIZE = "images are read as the model was trained"


class RequestOfOthers(Schema):
    """Fields of a request that change nothing here."""

    user: Ignored = None
    safety_identifier: Ignored = None
    store: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    prediction: Ignored = None
    parallel_tool_calls: Ignored = None
    reasoning_effort: Ignored = None
    tools: Annotated[Any, Only([], because=_TOOLS)] = None
    tool_choice: Annotated[Any, Only("none", "auto", because=_TOOLS)] = None
    functions: Annotated[Any, Only([], because=_TOOLS)] = None
    function_call: Annotated[Any, Only("none", "auto", because=_TOOLS)] = None
    response_format: Annotated[Any, Only({"type": "text"}, because=_FORMAT)] = None
    modalities: Annotated[Any, Only(["text"], because=_AUDIO)] = None
    audio: Annotated[Any, Only(because=_AUDIO)] = None
    verbosity: Annotated[Any, Only("medium", because="the model has one style")] = None
    logit_bias: Annotated[Any, Only({}, because="no token can be made likelier")] = None
    web_search_options: Annotated[Any, Only(because="the model searches nothing")] = None
    moderation: Annotated[Any, Only(because="answers are not moderated")] = None

    # vLLM, SGLang, TGI, TensorRT-LLM
    stream_interval: Ignored = None
    return_token_offsets: Ignored = None
    return_mm_kwargs: Ignored = None
    routed_experts_prompt_start: Ignored = None
    ec_transfer_params: Ignored = None
    rid: Ignored = None
    kv_transfer_params: Ignored = None
    guided_decoding_backend: Ignored = None
    guided_whitespace_pattern: Ignored = None
    separate_reasoning: Ignored = None
    stream_reasoning: Ignored = None
    thinking_token_budget: Ignored = None
    request_id: Ignored = None
    session_id: Ignored = None
    priority: Ignored = None
    cache_salt: Ignored = None
    include_reasoning: Ignored = None
    truncation_side: Ignored = None
    add_generation_prompt: Ignored = None
    continue_final_message: Ignored = None
    best_of: Annotated[Any, Only(1, because=_SAMPLER)] = None
    use_beam_search: Annotated[Any, Only(False, because=_SAMPLER)] = None
    length_penalty: Annotated[Any, Only(1, because=_SAMPLER)] = None
    early_stopping: Annotated[Any, Only(False, because=_SAMPLER)] = None
    min_tokens: Annotated[Any, Only(0, because="answers have no minimum length")] = None
    ignore_eos: Annotated[Any, Only(False, because="the model ends its answers")] = None
    stop_token_ids: Annotated[Any, Only([], because="answers end at strings, given in stop")] = None
    bad_words: Annotated[Any, Only([], because=_CONSTRAINED)] = None
    allowed_token_ids: Annotated[Any, Only(because=_CONSTRAINED)] = None
    guided_json: Annotated[Any, Only(because=_CONSTRAINED)] = None
    guided_regex: Annotated[Any, Only(because=_CONSTRAINED)] = None
    guided_choice: Annotated[Any, Only(because=_CONSTRAINED)] = None
    guided_grammar: Annotated[Any, Only(because=_CONSTRAINED)] = None
    structured_outputs: Annotated[Any, Only(because=_CONSTRAINED)] = None
    watermarking: Annotated[Any, Only(False, because=_SAMPLER)] = None
    repetition_detection: Annotated[Any, Only(because=_SAMPLER)] = None
    top_p_min: Annotated[Any, Only(0, because=_SAMPLER)] = None
    prompt_ignore_length: Annotated[Any, Only(0, because="penalties are vLLM's")] = None
    logprob_token_ids: Annotated[Any, Only(because="top_logprobs tells of the likeliest tokens")] = None
    return_prompt_text: Annotated[Any, Only(False, because="the messages are not repeated")] = None
    structural_tag: Annotated[Any, Only(because=_CONSTRAINED)] = None
    regex: Annotated[Any, Only(because=_CONSTRAINED)] = None
    ebnf: Annotated[Any, Only(because=_CONSTRAINED)] = None
    logits_processors: Annotated[Any, Only([], because=_SAMPLER)] = None
    vllm_xargs: Annotated[Any, Only({}, because=_SAMPLER)] = None
    lora_path: Annotated[Any, Only(because="there is one model")] = None
    documents: Annotated[Any, Only([], because=_TEMPLATE)] = None
    return_hidden_states: Annotated[Any, Only(False, because="answers are text")] = None
    no_stop_trim: Annotated[Any, Only(False, because="answers end before a stop string")] = None
    include_stop_str_in_output: Annotated[Any, Only(False, because="answers end before a stop string")] = None
    skip_special_tokens: Annotated[Any, Only(True, because=_TOKENS)] = None
    spaces_between_special_tokens: Annotated[Any, Only(True, because=_TOKENS)] = None
    return_tokens_as_token_ids: Annotated[Any, Only(False, because=_TOKENS)] = None
    return_token_ids: Annotated[Any, Only(False, because=_TOKENS)] = None
    echo: Annotated[Any, Only(False, because="the messages are not repeated")] = None
    prompt_logprobs: Annotated[Any, Only(because="only answers are scored")] = None
    truncate_prompt_tokens: Annotated[Any, Only(because="prompts are not cut")] = None
    add_special_tokens: Annotated[Any, Only(False, because=_TEMPLATE)] = None
    chat_template: Annotated[Any, Only(because=_TEMPLATE)] = None
    chat_template_kwargs: Annotated[Any, Only({}, because=_TEMPLATE)] = None
    mm_processor_kwargs: Annotated[Any, Only({}, because=_ONE_SIZE)] = None
    media_io_kwargs: Annotated[Any, Only({}, because=_ONE_SIZE)] = None

    # llama.cpp, Ollama, LM Studio, OpenRouter, and the models of others behind this API
    thinking: Ignored = None
    enable_thinking: Ignored = None
    thinking_budget: Ignored = None
    think: Ignored = None
    reasoning_format: Ignored = None
    reasoning_split: Ignored = None
    ttl: Ignored = None
    draft_model: Ignored = None
    timings_per_token: Ignored = None
    return_progress: Ignored = None
    tool_stream: Ignored = None
    cache_control: Ignored = None
    route: Ignored = None
    trace: Ignored = None
    cache_prompt: Ignored = None
    id_slot: Ignored = None
    keep_alive: Ignored = None
    repeat_last_n: Ignored = None
    mirostat_tau: Ignored = None
    mirostat_eta: Ignored = None
    repeat_penalty: Annotated[Any, Only(1, because="its name here is repetition_penalty")] = None
    typical_p: Annotated[Any, Only(1, because=_SAMPLER)] = None
    tfs_z: Annotated[Any, Only(1, because=_SAMPLER)] = None
    top_a: Annotated[Any, Only(0, because=_SAMPLER)] = None
    mirostat: Annotated[Any, Only(0, because=_SAMPLER)] = None
    grammar: Annotated[Any, Only("", because=_CONSTRAINED)] = None
    json_schema: Annotated[Any, Only(because=_CONSTRAINED)] = None
    format: Annotated[Any, Only("", because=_FORMAT)] = None
    options: Annotated[Any, Only({}, because="what it contains must be sent as fields of the request")] = None
    n_predict: Annotated[Any, Only(-1, because="its name here is max_tokens")] = None
    n_probs: Annotated[Any, Only(0, because="its name here is top_logprobs")] = None
    dry_multiplier: Annotated[Any, Only(0, because=_SAMPLER)] = None
    xtc_probability: Annotated[Any, Only(0, because=_SAMPLER)] = None
    dynatemp_range: Annotated[Any, Only(0, because=_SAMPLER)] = None
    safe_prompt: Annotated[Any, Only(False, because="no prompt is added")] = None
    random_seed: Annotated[Any, Only(because="its name here is seed")] = None
    enable_search: Annotated[Any, Only(False, because="the model searches nothing")] = None
    search_parameters: Annotated[Any, Only({"mode": "off"}, because="the model searches nothing")] = None
    models: Annotated[Any, Only([], because="there is one model")] = None
    plugins: Annotated[Any, Only([], because=_TOOLS)] = None
    transforms: Annotated[Any, Only([], because="prompts are not cut")] = None
    provider: Ignored = None
    reasoning: Ignored = None
    usage: Ignored = None
    extra_body: Annotated[Any, Only({}, because="what it contains must be sent as fields of the request")] = None


class MessageOfOthers(Schema):
    """Fields of a message that change nothing here."""

    name: Ignored = None
    id: Ignored = None
    opts: Ignored = None
    annotations: Ignored = None
    prefix: Ignored = None
    partial: Ignored = None
    metadata: Ignored = None
    timestamp: Ignored = None
    thinking: Ignored = None
    reasoning: Ignored = None
    reasoning_content: Ignored = None
    reasoning_details: Ignored = None
    thinking_blocks: Ignored = None
    provider_specific_fields: Ignored = None
    cache_control: Ignored = None
    refusal: Annotated[Any, Only(because="what is said stands in content")] = None
    tool_calls: Annotated[Any, Only([], because=_TOOLS)] = None
    function_call: Annotated[Any, Only(because=_TOOLS)] = None
    tool_call_id: Annotated[Any, Only(because=_TOOLS)] = None
    audio: Annotated[Any, Only(because=_AUDIO)] = None
    images: Annotated[Any, Only([], because="images are parts of the content")] = None


class PartOfOthers(Schema):
    """Fields of a message's part that change nothing here."""

    cache_control: Ignored = None
    annotations: Ignored = None
    uuid: Ignored = None
    prompt_cache_breakpoint: Ignored = None
    detail: Ignored = None
    min_pixels: Ignored = None
    max_pixels: Ignored = None
