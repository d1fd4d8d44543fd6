"""Answers that come and go in the rows of a decoder, against the language model that reads each whole again."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from sae_ray.steering import decoding
from sae_ray.steering.decoding import Decoder, bytes_per_token

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8,
}  # fmt: skip
MODELS = {
    "llama": {},
    "mistral": {"sliding_window": 11},
    "qwen2": {"use_sliding_window": True, "sliding_window": 11, "layer_types": ["full_attention", "sliding_attention"]},
    "gemma2": {"sliding_window": 11},
}


def make_model(kind: str, device: str) -> Any:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    text = AutoConfig.for_model(kind, **SIZES, **MODELS[kind])
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval().to(device)


@torch.no_grad()
def read_again(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The logits after embedded tokens, without any cache."""
    return model.lm_head(model.model.language_model(inputs_embeds=tokens[None]).last_hidden_state[0, -1])


def come_and_go(model: Any, decoder: Decoder, seed: int, n_steps: int = 25) -> int:
    """Checks every row after every step; returns how often somebody had to wait."""
    dice, answers, waited = random.Random(seed), [], 0
    device = model.device
    for _ in range(n_steps):
        for row in reversed(range(len(answers))):
            answers[row].left -= 1
            if answers[row].left <= 0 or dice.random() < 0.1:
                decoder.drop(row)
                answers[row] = answers[-1]
                answers.pop()
        if answers:
            tokens = torch.tensor([dice.randrange(64) for _ in answers], device=device)
            found = decoder.step(tokens).clone()
            for answer, token in zip(answers, model.get_input_embeddings()(tokens).detach(), strict=True):
                answer.tokens = torch.cat([answer.tokens, token[None]])
            compare(model, answers, found)
        arriving = [(dice.randint(1, 30), dice.randint(1, 20)) for _ in range(dice.choice([0, 0, 1, 3]))]
        n = decoder.room([prompt + new for prompt, new in arriving])
        waited += n < len(arriving)
        new = [SimpleNamespace(tokens=torch.randn(prompt, 32, device=device), left=left) for prompt, left in arriving]
        if n:
            found = decoder.join([one.tokens for one in new[:n]], [one.left for one in new[:n]])
            compare(model, new[:n], found)
            answers += new[:n]
    return waited


def compare(model: Any, answers: list[Any], found: torch.Tensor) -> None:
    expected = torch.stack([read_again(model, answer.tokens) for answer in answers])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_rows_do_not_disturb_one_another(kind, device, monkeypatch):
    """What was in their memory before, here numbers that are none, reaches nobody."""
    monkeypatch.setattr(decoding, "GRAIN", 8)
    monkeypatch.setattr(decoding, "READ_TOKENS", 40)
    model = make_model(kind, device)
    decoder = Decoder(model, n_tokens=250, most_rows=6)
    decoder._memory.fill_(float("nan"))
    assert come_and_go(model, decoder, seed=1), "there should be too little room at times"
    assert decoder._memory.numel() * decoder._memory.element_size() == 250 * bytes_per_token(
        model.config.text_config, model.dtype
    )


def test_too_many_are_refused():
    decoder = Decoder(make_model("llama", "cpu"), n_tokens=512, most_rows=3)
    prompts = [torch.randn(4, 32)] * 3
    assert decoder.room([10, 10, 10]) == 2
    with pytest.raises(ValueError, match="3 rows of 256 tokens"):
        decoder.join(prompts, [6] * 3)
    decoder.join(prompts[:1], [6])
    assert decoder.room([300]) == 0
    assert decoder.room([200]) == 1


def test_an_answer_that_ends_early_leaves_the_others_as_they_are():
    """As transformers' own loop: also what the generation configuration asks for."""
    model = make_model("llama", "cpu")
    config = model.generation_config
    config.eos_token_id, config.pad_token_id, config.repetition_penalty = list(range(0, 64, 7)), 0, 1.3
    prompts = [torch.randn(n, 32) for n in (3, 9, 5, 7)]
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
    mask = torch.nn.utils.rnn.pad_sequence([one[:, 0] * 0 + 1 for one in prompts], True, 0.0, "left").long()
    expected = model.generate(inputs_embeds=padded, attention_mask=mask, max_new_tokens=24, do_sample=False)
    found = model.generate(
        inputs_embeds=padded, max_new_tokens=24, do_sample=False, decoder=Decoder(model, 4 * 256, 4), prompts=prompts,
        custom_generate=decoding.greedily,
    )  # fmt: skip
    lengths = [next((n for n, t in enumerate(row.tolist()) if t % 7 == 0), 24) for row in expected]
    assert len(set(lengths)) > 1
    assert torch.equal(found, expected)
