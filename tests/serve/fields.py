"""Which fields of OpenAI's chat completions the server takes: tested value by value, and listed in docs/api.md.

`python -m tests.serve.fields` writes the tables of that page anew.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


class Values(NamedTuple):
    """Examples of what a field takes, and of what is refused."""

    taken: list[Any]
    refused: list[Any]


TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
ANYTHING = [{"a": [1]}, "x", 3, True, []]

EFFECTIVE = {
    "model": Values(["llava"], [3]),
    "messages": Values([[{"role": "user", "content": "hello"}]], [[], "hello", {"role": "user", "content": "hello"}]),
    "steering": Values([{"features": []}], [{"feature": []}, []]),
    "max_tokens": Values([1, 100], [0, -1, "100"]),
    "max_completion_tokens": Values([1, 100], [0, -1]),
    "temperature": Values([0, 0.7, 2], [-1, 2.1, "hot"]),
    "top_p": Values([0, 0.5, 1], [-0.1, 1.1]),
    "top_k": Values([-1, 0, 1, 40], [-2, 0.5]),
    "min_p": Values([0, 0.05, 1], [-0.1, 1.1]),
    "frequency_penalty": Values([-2, 0, 1.5], [2.5, "a"]),
    "presence_penalty": Values([-2, 0, 1.5], [2.5, "a"]),
    "repetition_penalty": Values([0.5, 1, 1.2], [0, -1]),
    "seed": Values([-1, 0, 2**63 - 1], [2**63, 0.5]),
    "n": Values([1, 2], [0]),
    "stop": Values(["END", ["a", "b"], []], ["", ["a", ""], ["a"] * 17]),
    "stream": Values([False, True], ["yes"]),
    "stream_options": Values(
        [{"include_usage": True}, {"include_usage": None, "include_obfuscation": False}],
        [{"continuous_usage_stats": True}, {"usage": True}],
    ),
    "logprobs": Values([False, True], [5]),
    "top_logprobs": Values([0], [-1, 21, True]),
}
"""Fields that do what OpenAI's and vLLM's documentation says."""

IGNORED = [
    *("user", "safety_identifier", "store", "metadata", "service_tier", "prediction", "reasoning_effort"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "parallel_tool_calls"),
    *("request_id", "session_id", "priority", "cache_salt", "include_reasoning", "truncation_side"),
    *("add_generation_prompt", "continue_final_message", "cache_prompt", "id_slot", "keep_alive", "repeat_last_n"),
    *("mirostat_tau", "mirostat_eta", "provider", "reasoning", "usage", "rid", "kv_transfer_params"),
    *("guided_decoding_backend", "guided_whitespace_pattern", "separate_reasoning", "stream_reasoning"),
    *("thinking_token_budget", "thinking", "enable_thinking", "thinking_budget", "think", "reasoning_format"),
    *("reasoning_split", "ttl", "draft_model", "timings_per_token", "return_progress", "tool_stream", "cache_control"),
    *("route", "trace", "stream_interval", "return_token_offsets", "return_mm_kwargs", "routed_experts_prompt_start"),
    "ec_transfer_params",
]
"""Fields of which no value changes the answer."""

NEUTRAL = {
    "tools": Values([[]], [[TOOL]]),
    "tool_choice": Values(["none", "auto"], ["required", {"type": "function", "function": {"name": "look"}}]),
    "functions": Values([[]], [[{"name": "look"}]]),
    "function_call": Values(["none", "auto"], [{"name": "look"}]),
    "response_format": Values(
        [{"type": "text"}], [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}]
    ),
    "modalities": Values([["text"]], [["text", "audio"]]),
    "audio": Values([], [{"voice": "alloy", "format": "wav"}]),
    "verbosity": Values(["medium"], ["low", "high"]),
    "logit_bias": Values([{}], [{"50256": -100}]),
    "web_search_options": Values([], [{}]),
    "moderation": Values([], [{}]),
    "best_of": Values([1], [2, True]),
    "use_beam_search": Values([False], [True]),
    "length_penalty": Values([1, 1.0], [0.5]),
    "early_stopping": Values([False], [True]),
    "min_tokens": Values([0], [5]),
    "ignore_eos": Values([False], [True]),
    "stop_token_ids": Values([[]], [[2]]),
    "bad_words": Values([[]], [["cat"]]),
    "allowed_token_ids": Values([], [[1, 2]]),
    "guided_json": Values([], [{"type": "object"}]),
    "guided_regex": Values([], ["a+"]),
    "guided_choice": Values([], [["yes", "no"]]),
    "guided_grammar": Values([], ["root ::= 'a'"]),
    "structured_outputs": Values([], [{"choice": ["yes"]}]),
    "watermarking": Values([False], [True]),
    "repetition_detection": Values([], [{"max_pattern_size": 3}]),
    "top_p_min": Values([0, 0.0], [0.1]),
    "prompt_ignore_length": Values([0], [3]),
    "logprob_token_ids": Values([], [[1, 2]]),
    "return_prompt_text": Values([False], [True]),
    "structural_tag": Values([], ["{}"]),
    "regex": Values([], ["a+"]),
    "ebnf": Values([], ["root ::= 'a'"]),
    "logits_processors": Values([[]], [["x"]]),
    "vllm_xargs": Values([{}], [{"a": 1}]),
    "lora_path": Values([], ["x"]),
    "documents": Values([[]], [[{"text": "x"}]]),
    "return_hidden_states": Values([False], [True]),
    "no_stop_trim": Values([False], [True]),
    "include_stop_str_in_output": Values([False], [True]),
    "skip_special_tokens": Values([True], [False]),
    "spaces_between_special_tokens": Values([True], [False]),
    "return_tokens_as_token_ids": Values([False], [True]),
    "return_token_ids": Values([False], [True]),
    "echo": Values([False], [True]),
    "prompt_logprobs": Values([], [0]),
    "truncate_prompt_tokens": Values([], [100]),
    "add_special_tokens": Values([False], [True]),
    "chat_template": Values([], ["{{ messages }}"]),
    "chat_template_kwargs": Values([{}], [{"enable_thinking": True}]),
    "mm_processor_kwargs": Values([{}], [{"num_crops": 4}]),
    "media_io_kwargs": Values([{}], [{"image": {}}]),
    "repeat_penalty": Values([1, 1.0], [1.1]),
    "typical_p": Values([1], [0.9]),
    "tfs_z": Values([1], [0.9]),
    "top_a": Values([0], [0.1]),
    "mirostat": Values([0], [2]),
    "grammar": Values([""], ["root ::= 'a'"]),
    "json_schema": Values([], [{"type": "object"}]),
    "format": Values([""], ["json"]),
    "options": Values([{}], [{"temperature": 0}]),
    "n_predict": Values([-1], [64]),
    "n_probs": Values([0], [3]),
    "dry_multiplier": Values([0, 0.0], [0.8]),
    "xtc_probability": Values([0, 0.0], [0.5]),
    "dynatemp_range": Values([0, 0.0], [0.5]),
    "safe_prompt": Values([False], [True]),
    "random_seed": Values([], [3]),
    "enable_search": Values([False], [True]),
    "search_parameters": Values([{"mode": "off"}], [{"mode": "auto"}]),
    "models": Values([[]], [["other"]]),
    "plugins": Values([[]], [[{"id": "web"}]]),
    "transforms": Values([[]], [["middle-out"]]),
    "extra_body": Values([{}], [{"steering": {}}]),
}
"""Fields that could change the answer and are not supported: what has no effect passes, the rest is refused."""

MESSAGE_IGNORED = [
    *("name", "id", "opts", "annotations", "prefix", "partial", "metadata", "timestamp", "thinking", "reasoning"),
    *("reasoning_content", "reasoning_details", "thinking_blocks", "provider_specific_fields", "cache_control"),
]
MESSAGE_NEUTRAL = {
    "refusal": Values([], ["I cannot"]),
    "tool_calls": Values([[]], [[CALL]]),
    "function_call": Values([], [{"name": "look", "arguments": "{}"}]),
    "tool_call_id": Values([], ["1"]),
    "audio": Values([], [{"id": "1"}]),
    "images": Values([[]], [[{"type": "image_url"}]]),
}
PART_IGNORED = [
    *("cache_control", "annotations", "uuid", "prompt_cache_breakpoint", "detail", "min_pixels", "max_pixels"),
]


def tables() -> dict[str, str]:
    """The tables of the page, by the name of their place."""
    return {
        "effective": _shown(EFFECTIVE),
        "ignored": _shown(IGNORED),
        "neutral": _table(NEUTRAL),
        "messages": _table(MESSAGE_NEUTRAL),
        "messages-ignored": _shown(MESSAGE_IGNORED),
        "parts-ignored": _shown(PART_IGNORED),
    }


def _table(fields: dict[str, Values]) -> str:
    lines = ["| field | passes | refused, for example |", "|---|---|---|"]
    for name, values in fields.items():
        taken, refused = (_shown(map(json.dumps, some)) for some in ([None, *values.taken], values.refused))
        lines.append(f"| `{name}` | {taken} | {refused} |")
    return "\n".join(lines)


def _shown(values: Any) -> str:
    return ", ".join(f"`{value}`" for value in dict.fromkeys(values))


def filled(page: str) -> str:
    """The page with these tables in their places."""
    for name, table in tables().items():
        place = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
        page, n = re.subn(place, lambda found, table=table: found[1] + table + found[2], page, flags=re.DOTALL)
        assert n == 1, f"the page has {n} places for the table {name}"
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
