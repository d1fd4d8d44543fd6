"""What a language deployment reserves: it adds up, and what cannot be is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from sae_ray.serve.config import Language, ServeConfig
from sae_ray.serve.memory import Memory, divided
from transformers import LlamaConfig, LlavaConfig

from sae_ray.errors import UsageError
from sae_ray.steering.decoding import READ_TOKENS, rounded

GB = 10**9
CARD = 80 * GB
CONFIGURATIONS = Path(__file__).parents[2] / "cluster" / "serve"
ANSWER = 768
"""Tokens of a usual request to LLaVA-1.5 with its answer; its image alone has 576."""


def llava(**sizes: int) -> Any:
    return LlavaConfig(text_config=LlamaConfig(**sizes))


@pytest.fixture(scope="module")
def of_7b() -> Any:
    return llava(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064,
        max_position_embeddings=4096,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> Any:
    return llava(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, max_position_embeddings=300,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["gpu", "cluster"])
def test_the_configurations_for_gpus_add_up(name, of_7b):
    [application] = yaml.safe_load((CONFIGURATIONS / f"{name}.yaml").read_text())["applications"]
    config = ServeConfig.model_validate(application["args"])
    language = config.language
    memory = divided(language, of_7b, torch.bfloat16, True, CARD, "a GPU")
    assert memory.weights == pytest.approx(13.5 * GB, rel=0.01)
    assert memory.per_token == 2**19
    shared = config.tower.gpus + language.gpus <= 1
    assert memory.weights + memory.work + memory.cache <= CARD - (10 * GB if shared else 0)
    assert language.max_running * ANSWER <= memory.tokens
    assert config.limits.max_running * config.replicas <= language.max_running * language.replicas
    told = (CONFIGURATIONS / f"{name}.yaml").read_text().replace("\n# ", " ")
    assert f"{language.max_running} answers of {ANSWER} tokens" in told
    assert f"or {memory.at_once} of the longest" in told


def test_a_line_tells_what_was_reserved(of_7b):
    memory = divided(Language(kv_cache_mb=16384), of_7b, torch.bfloat16, True, CARD, "a GPU")
    assert str(memory) == (
        "13.5 GB of weights, 17.2 GB for keys and values, 2.6 GB for reading prompts: room for 32,768 tokens, which is "
        "8 at once of the longest requests (4,096 tokens)"
    )


@given(there=st.integers(1, 10**8), most=st.integers(1, 80), mb=st.none() | st.integers(1, 100), gpu=st.booleans())
def test_whatever_is_reserved_is_there_and_enough_for_one(tiny, there, most, mb, gpu):
    language = Language(max_running=most, kv_cache_mb=mb)
    try:
        memory = divided(language, tiny, torch.float32, gpu, there, "it")
    except UsageError:
        memory = None
    per_token = 2 * 2 * 8 * 4
    weights = 4 * (2 * 64 * 16 + 16 + 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32 + 2 * 16))
    work = READ_TOKENS * (per_token + 4 * (4 * 16 + 3 * 32))
    least = 512 * per_token
    if weights + work + (least if mb is None else max(least, mb * 2**20)) > there:
        assert memory is None
        return
    if mb is not None and mb * 2**20 < least:
        assert memory is None
        return
    assert isinstance(memory, Memory)
    assert (memory.weights, memory.work, memory.per_token) == (weights, work, per_token)
    assert memory.weights + memory.work + memory.cache <= there
    assert memory.at_once >= 1
    if mb is None:
        assert memory.at_once <= most
    else:
        assert memory.cache == mb * 2**20


@pytest.mark.parametrize(
    ("mb", "there", "words"),
    [
        (
            None,
            16 * GB,
            r"does not fit a GPU: .* 13\.5 GB, .* 2\.6 GB, .* 4,096 tokens 2\.1 GB, of 16\.0 GB; choose a smaller lan",
        ),
        (1024, CARD, r"kv_cache_mb is 1024; it must be at least 2048, .* at most 61\d\d\d"),
        (70_000, CARD, r"kv_cache_mb is 70000; .* leave of a GPU \(80\.0 GB\)"),
    ],
)
def test_what_cannot_be_is_refused(of_7b, mb, there, words):
    with pytest.raises(UsageError, match=words):
        divided(Language(kv_cache_mb=mb), of_7b, torch.bfloat16, True, there, "a GPU")
    assert rounded(of_7b.text_config.max_position_embeddings) == 4096


def test_shorter_requests_need_less():
    long = llava(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, max_position_embeddings=131_072)
    with pytest.raises(UsageError, match=r"one request of 131,072 tokens 68\.7 GB"):
        divided(Language(), long, torch.bfloat16, True, CARD, "a GPU")
    memory = divided(Language(context=4096), long, torch.bfloat16, True, CARD, "a GPU")
    assert memory.context == 4096
    assert memory.at_once > 20
