"""Steered LLaVAs against transformers' own and against the paper's replacement written out by hand."""

from __future__ import annotations

import functools
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

import sae_ray
from sae_ray.encoders.transformers_models import blocks_of
from sae_ray.errors import UsageError
from sae_ray.sae import SAE
from sae_ray.steering import ONE_WORD, Box, Condition, Intervention, LatentEdit, Llava, Region, load_llava
from sae_ray.steering.llava import describe_llava
from sae_ray.world.write import MODELS

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }} : {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} w1 {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} w2 ASSISTANT :{% endif %}"
)
QUESTIONS = ["w3 w4?", "w5", "w6 w7 w8 w9 w10 w11 w12 ?", "w13 w14"]


class Variant(NamedTuple):
    tower: str = "clip"
    strategy: str = "default"
    layer: int = -2
    template: str | None = None


VARIANTS = {
    "clip": Variant(),
    "clip_full_last": Variant(strategy="full", layer=-1),
    "clip_template_positive": Variant(layer=1, template=TEMPLATE),
    "dinov2": Variant("dinov2"),
    "dinov2_full": Variant("dinov2", "full", template=TEMPLATE),
    "vit": Variant("vit"),
    "siglip_full": Variant("siglip", "full"),
    "siglip_default": Variant("siglip", template=TEMPLATE),
}


@pytest.fixture(scope="session")
def saved(make_llava, tiny_llava, tmp_path_factory) -> Callable[[str], str]:
    root = tmp_path_factory.mktemp("llavas")
    return functools.cache(lambda name: tiny_llava if name == "clip" else make_llava(root / name, *VARIANTS[name]))


@pytest.fixture(scope="session")
def loaded(saved) -> Callable[..., Llava]:
    return functools.cache(
        lambda name="clip", dtype="float32", device="cpu": load_llava(saved(name), device=device, dtype=dtype)
    )


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param


def photos(n: int = 4) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = [(37 + 11 * i, 61 - 7 * i, 3) for i in range(n)]
    return [Image.fromarray(generator.integers(0, 256, size, np.uint8)) for size in sizes]


def sae_for(llava: Llava, architecture: str = "batch_topk", seed: int = 0) -> SAE:
    """A random SAE whose latents are as large as the tower's activations want them, on its device."""
    generator = torch.Generator().manual_seed(seed)
    d_in, d_sae = llava.width, 64
    W_enc = torch.randn(d_in, d_sae, generator=generator) / d_in**0.5
    threshold = None if architecture in ("topk", "relu") else torch.rand(d_sae, generator=generator)
    return SAE(
        architecture,
        W_enc,
        W_enc.T.contiguous(),
        torch.randn(d_sae, generator=generator),
        torch.randn(d_in, generator=generator),
        threshold=threshold,
        k=6 if architecture == "topk" else None,
    ).to(llava.device)


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def inputs_of(llava: Llava, images: list[Image.Image], prompts: list[str]):
    """What the model's own processor makes of whole prompts and images."""
    batch = llava.processor(images=images, text=prompts, padding=True, padding_side="left", return_tensors="pt")
    batch["pixel_values"] = batch["pixel_values"].to(llava.dtype)
    return batch


def plain_embeddings(llava: Llava, images: list[Image.Image]) -> list[torch.Tensor]:
    pixels = llava.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    config = llava.model.config
    with torch.no_grad():
        return llava.model.get_image_features(
            pixels.to(llava.device, llava.dtype),
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        ).pooler_output


@torch.no_grad()
def logits(llava: Llava, embeddings: Sequence[torch.Tensor], questions: Sequence[str]) -> list[torch.Tensor]:
    """After each prompt, by the model's own forward pass given the embeddings of the image."""
    found = []
    for embedding, question in zip(embeddings, questions, strict=True):
        text = llava.prompt(question).replace("<image>", "<image>" * len(embedding))
        ids = llava.processor.tokenizer(text, return_tensors="pt")["input_ids"].to(llava.device)
        outputs = {"image": BaseModelOutputWithPooling(pooler_output=[embedding])}
        found.append(llava.model(input_ids=ids, mm_encoder_outputs=outputs).logits[0, -1])
    return found


@torch.no_grad()
def replaced_by_hand(llava: Llava, images: list[Image.Image], edit: Callable) -> list[torch.Tensor]:
    """The paper's replacement without any hook: tower, edit of the hidden state that LLaVA reads, projector."""
    config = llava.model.config
    pixels = llava.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    hidden = llava.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    read = hidden[config.vision_feature_layer].clone()
    edited = torch.stack([edit(x) for x in read])
    if config.vision_feature_select_strategy == "default":
        edited = edited[:, 1:]
    return list(llava.model.model.multi_modal_projector(edited))


def dense_edit(sae: SAE, latents: list[int], mode: str, strength: float, error: str, tokens: list[int] | None):
    def edit(x: torch.Tensor) -> torch.Tensor:
        codes = sae.encode(x)
        edited = codes.clone()
        for latent in latents:
            a = codes[:, latent]
            values = {"set": 0 * a + strength, "add": a + strength, "scale": a * strength, "ablate": 0 * a}
            edited[:, latent] = values[mode]
        new = sae.decode(edited) if error == "drop" else x + (edited - codes) @ sae.W_dec
        if tokens is not None:
            others = [token for token in range(len(x)) if token not in tokens]
            new[others] = x[others]
        return new

    return edit


def test_what_the_language_model_reads_is_resolved(loaded):
    facts = {name: (llava.layer, llava.width, llava.n_tokens) for name in VARIANTS for llava in [loaded(name)]}
    assert facts == {
        "clip": (1, 32, 17),
        "clip_full_last": (2, 32, 17),
        "clip_template_positive": (0, 32, 17),
        "dinov2": (1, 32, 17),
        "dinov2_full": (1, 32, 17),
        "vit": (1, 32, 17),
        "siglip_full": (1, 32, 16),
        "siglip_default": (1, 32, 16),
    }


def test_without_edits_answers_are_those_of_transformers_token_for_token(variant, saved, loaded, device):
    llava, images = loaded(variant, device=device), photos()
    model = LlavaForConditionalGeneration.from_pretrained(saved(variant)).eval()
    processor = AutoProcessor.from_pretrained(saved(variant), backend="pil")
    expected = []
    for image, question in zip(images, QUESTIONS, strict=True):
        inputs = processor(images=image, text=llava.prompt(question), return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.decode(tokens, skip_special_tokens=True).strip())
    assert len(set(expected)) == len(expected)
    assert [
        llava.answer(image, question, max_new_tokens=12) for image, question in zip(images, QUESTIONS, strict=True)
    ] == (expected)
    assert llava.answers(images, QUESTIONS, [()] * 4, max_new_tokens=12) == expected


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize(("layer", "block"), [(-3, 0), (-1, 2), (1, 0), (2, 1), (3, 2), ([-2], 1), ([2], 1)])
def test_an_image_takes_as_many_places_as_the_model_makes_embeddings(
    make_llava, tmp_path, tower, strategy, layer, block
):
    path = make_llava(tmp_path, tower, strategy, layer)
    info, llava, images = describe_llava(path), load_llava(path), photos(2)
    embeddings = llava.image_embeddings(images, [(), ()])
    assert [len(one) for one in embeddings] == [info.n_image_tokens] * 2
    assert info.layer == llava.layer == block
    assert same(embeddings, plain_embeddings(llava, images))
    # Nothing but this block reaches the language model.
    wiped = llava.image_embeddings(images, [[torch.zeros_like]] * 2)
    assert all(torch.equal(one, one[:1].expand_as(one)) for one in wiped)
    batch = inputs_of(llava, images[:1], ["USER: <image> w3 ASSISTANT:"])
    assert (batch["input_ids"] == llava.processor.image_token_id).sum() in (info.n_image_tokens, llava.n_tokens)


@pytest.mark.parametrize("variant", ["clip", "siglip_default"])
def test_what_the_processor_says_of_patches_is_not_needed(variant, saved, loaded, tmp_path):
    bare = Path(changed_copy(saved(variant), tmp_path / "bare"))
    config = json.loads((bare / "processor_config.json").read_text())
    told = {"patch_size", "num_additional_image_tokens", "vision_feature_select_strategy"}
    assert told <= set(config)
    (bare / "processor_config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in told}))
    llava, images = load_llava(str(bare)), photos()
    assert llava.processor.patch_size is None
    assert describe_llava(str(bare)).n_image_tokens == describe_llava(saved(variant)).n_image_tokens
    expected = loaded(variant).answers(images, QUESTIONS, [()] * 4, max_new_tokens=8)
    assert llava.answers(images, QUESTIONS, [()] * 4, max_new_tokens=8) == expected


def test_the_prompt_has_the_form_that_the_model_knows(loaded):
    assert loaded("clip").prompt("w1?") == "USER: <image>\nw1? ASSISTANT:"
    assert loaded("clip").prompt("w1?", 2) == "USER: <image>\n<image>\nw1? ASSISTANT:"
    assert loaded("siglip_default").prompt("w3") == "USER : <image> w1 w3 w2 ASSISTANT :"


def test_several_images_in_one_prompt(loaded):
    llava, images = loaded(), photos(3)
    text = "USER: <image>\n<image>\nw3 w4? ASSISTANT:"
    inputs = inputs_of(llava, images[:2], [text])
    tokens = llava.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = llava.processor.decode(tokens, skip_special_tokens=True).strip()
    first, second, third = llava.image_embeddings(images, [()] * 3)
    assert llava.generate([[first, second], third], ["w3 w4?", "w5"], max_new_tokens=8) == [
        expected,
        llava.answer(images[2], "w5", max_new_tokens=8),
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_edit_leaves_every_bit(variant, dtype, loaded, device):
    llava, images = loaded(variant, dtype, device), photos()
    keep = Intervention(sae_for(llava), error="keep")
    plain = plain_embeddings(llava, images)
    assert same(llava.image_embeddings(images, [()] * 4), plain)
    assert same(llava.image_embeddings(images, [[keep]] * 4), plain)
    add_nothing = Intervention(keep.sae, (LatentEdit(3, "add", 0.0), LatentEdit(5, "scale", 1.0)), error="keep")
    steered = llava.image_embeddings(images, [[keep, add_nothing]] * 4)
    assert same(steered, plain)
    assert same(logits(llava, steered, QUESTIONS), logits(llava, plain, QUESTIONS))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_intervention_reaches_the_language_model(variant, dtype, loaded):
    llava, images = loaded(variant, dtype), photos()
    plain = llava.image_embeddings(images, [()] * 4)  # transformers' own hooks are there from now on
    edit = Intervention(sae_for(llava), (LatentEdit(3, "set", 25.0),), error="keep")
    steered = llava.image_embeddings(images, [[edit]] * 4)
    assert [one.dtype for one in steered] == [llava.dtype] * 4
    for before, after in zip(logits(llava, plain, QUESTIONS), logits(llava, steered, QUESTIONS), strict=True):
        assert (before - after).abs().max() > 0.05 * before.abs().max()
    assert same(llava.image_embeddings(images, [()] * 4), plain)


def test_an_intervention_reaches_the_language_model_in_the_first_pass_too(saved):
    images = photos(1)
    fresh = load_llava(saved("clip"))
    edit = Intervention(sae_for(fresh), (LatentEdit(3, "set", 25.0),))
    first = fresh.image_embeddings(images, [[edit]])
    plain = fresh.image_embeddings(images, [()])
    assert same(first, fresh.image_embeddings(images, [[edit]]))
    assert not same(first, plain)


@given(
    st.sampled_from(list(VARIANTS)),
    st.sampled_from(["batch_topk", "matryoshka_batch_topk", "topk", "relu", "jumprelu"]),
    st.integers(0, 99),
    st.sampled_from(["set", "add", "scale", "ablate"]),
    st.floats(-10, 30, width=32),
    st.sampled_from(["drop", "keep"]),
    st.lists(st.integers(0, 63), min_size=1, max_size=3, unique=True),
    st.none() | st.lists(st.integers(0, 15), min_size=1, max_size=6, unique=True),
)
def test_steered_logits_are_those_of_the_replacement_by_hand(
    loaded, name, architecture, seed, mode, strength, error, latents, tokens
):
    llava, images = loaded(name), photos(2)
    sae = sae_for(llava, architecture, seed)
    value = 0.0 if mode == "ablate" else strength
    edits = tuple(LatentEdit(latent, mode, value) for latent in latents)
    intervention = Intervention(sae, edits, error, tokens=None if tokens is None else tuple(tokens))
    steered = llava.image_embeddings(images, [[intervention]] * 2)
    by_hand = replaced_by_hand(llava, images, dense_edit(sae, latents, mode, strength, error, tokens))
    for one, other in zip(logits(llava, steered, QUESTIONS[:2]), logits(llava, by_hand, QUESTIONS[:2]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_each_image_of_a_batch_has_its_own_interventions(variant, loaded):
    llava, images = loaded(variant), photos()
    sae = sae_for(llava)
    several = Intervention(sae, (LatentEdit(1, "set", 9.0), LatentEdit(2, "add", -4.0), LatentEdit(60, "scale", 3.0)))
    chains = [
        [Intervention(sae, (LatentEdit(3, "set", 25.0),))],
        [],
        [several, Intervention(sae_for(llava, "topk", 1), (LatentEdit(7, "ablate"),), "keep", isolate=True)],
        [lambda x: x + 0.5],
    ]
    together = llava.image_embeddings(images, chains)
    alone = [llava.image_embeddings([image], [chain])[0] for image, chain in zip(images, chains, strict=True)]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    plain = llava.image_embeddings(images, [()] * 4)
    changed = [not torch.allclose(one, other, rtol=1e-3, atol=1e-3) for one, other in zip(together, plain, strict=True)]
    assert changed == [True, False, True, True]
    answers = llava.answers(images, QUESTIONS, chains, max_new_tokens=8)
    assert answers == [
        llava.answer(image, question, chain, max_new_tokens=8)
        for image, question, chain in zip(images, QUESTIONS, chains, strict=True)
    ]


def test_an_image_that_comes_several_times_passes_the_blocks_below_once(variant, loaded, device):
    llava, (one, other) = loaded(variant, device=device), photos(2)
    sae = sae_for(llava)
    chains = [(), (Intervention(sae, (LatentEdit(3, "set", 25.0),)),), (lambda x: x + 0.5,), ()]
    images = [one, one, other, one]
    blocks, sizes = blocks_of(llava.model.model.vision_tower), []
    hooks = [block.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0]))) for block in blocks]
    shared = llava.image_embeddings(images, chains)
    for hook in hooks:
        hook.remove()
    assert sizes == [2] * (llava.layer + 1) + [4] * (len(blocks) - llava.layer - 1)
    apart = llava.image_embeddings([image.copy() for image in images], chains)
    for found, expected in zip(shared, apart, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    plain = llava.image_embeddings([one, one], [(), ()])
    assert torch.equal(plain[0], plain[1])
    torch.testing.assert_close(plain[0], shared[0], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("error", ["drop", "keep"])
def test_a_llava_is_steered_as_on_a_cpu(variant, error, loaded, device):
    """Each image of the batch in its own way; the edits run between the tower's blocks, on its device."""
    images, found = photos(), []
    for llava in (loaded(variant, device=device), loaded(variant)):
        sae, topk = sae_for(llava), sae_for(llava, "topk", 1)
        top = torch.linspace(1, 5, 64, dtype=torch.float64)
        chains = [
            [Intervention(sae, (LatentEdit(3, "set", 5.0, "max"), LatentEdit(5, "scale", 3.0)), error, max_token=top)],
            [],
            [Intervention(sae, error=error), Intervention(topk, (LatentEdit(7, "add", 4.0),), error, isolate=True)],
            [Intervention(sae, (LatentEdit(9, "set", 25.0),), error, tokens=(2, 8))],
        ]
        embeddings = llava.image_embeddings(images, chains)
        assert all(one.device.type == llava.device.type for one in embeddings)
        after = [one.cpu() for one in logits(llava, embeddings, QUESTIONS)]
        found.append([[one.cpu() for one in embeddings], after, llava.answers(images, QUESTIONS, chains, 8)])
    (ours, our_logits, our_answers), (theirs, their_logits, their_answers) = found
    # Float32 errs by 1e-7 of the terms of a sum; here large ones of both signs cancel out, block after block.
    for one, other in zip([*ours, *our_logits], [*theirs, *their_logits], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-4 * other.abs().max().item())
    assert our_answers == their_answers


def test_only_the_chosen_tokens_are_edited(loaded):
    """Token 0 is CLS, which "default" cuts off: editing it alone changes nothing that the language model reads."""
    llava, images = loaded(), photos(1)
    sae = sae_for(llava)

    def embedding(tokens):
        edit = Intervention(sae, (LatentEdit(3, "set", 25.0),), tokens=tokens)
        return llava.image_embeddings(images, [[edit]])[0]

    plain, everything = llava.image_embeddings(images, [()])[0], embedding(None)
    assert torch.equal(embedding((0,)), plain)
    mixed = embedding((2, 16))
    torch.testing.assert_close(mixed[[1, 15]], everything[[1, 15]])
    others = [patch for patch in range(16) if patch not in (1, 15)]
    torch.testing.assert_close(mixed[others], plain[others])


@torch.no_grad()
def edited_layer(llava: Llava, images: Sequence, chains) -> torch.Tensor:
    """What the edited block hands on, [images, tokens, d_in]."""
    kept = []
    keep = blocks_of(llava.model.model.vision_tower)[llava.layer].register_forward_hook(
        lambda module, args, output: kept.append(output.clone())
    )
    try:
        llava.image_embeddings(images, chains)
    finally:
        keep.remove()
    return kept[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("error", ["drop", "keep"])
def test_outside_of_the_region_every_bit_stays_at_the_edited_layer(variant, dtype, error, loaded, device):
    """In images of four shapes at once, each with the patches that the rectangle has in it."""
    llava, images = loaded(variant, dtype, device), photos()
    edit = Intervention(sae_for(llava), (LatentEdit(3, "set", 25.0),), error, region=Region((Box(0.3, 0.4, 0.6, 1),)))
    before = edited_layer(llava, images, [[]] * 4)
    after = edited_layer(llava, images, [[edit]] * 4)
    n_cls = int(llava.info.has_cls)
    for image, old, new in zip(images, before, after, strict=True):
        side = min(image.size)
        left, top = ((length - side) / 2 for length in image.size)
        centres = (np.arange(4) + 0.5) * side / 4
        across, down = (left + centres) / image.width, (top + centres) / image.height
        near = [np.abs(at - edge).min() < 1 / 20 for at, edge in ((across, 0.3), (across, 0.6), (down, 0.4))]
        inside = np.outer((down > 0.4) & (down < 1), (across > 0.3) & (across < 0.6)).ravel()
        changed = (old != new).any(1).cpu().numpy()
        assert not changed[:n_cls].any()
        assert changed.any()
        if not any(near):
            assert np.array_equal(changed[n_cls:], inside)
    outside = Intervention(edit.sae, edit.edits, error, region=edit.region, when=Condition(5, 1e30))
    assert torch.equal(edited_layer(llava, images, [[outside]] * 4), before)


def test_a_region_of_the_whole_image_is_every_patch(loaded):
    llava, images = loaded(), photos()
    sae = sae_for(llava)
    everywhere, patches = (
        Intervention(sae, (LatentEdit(3, "set", 25.0),), **where)
        for where in ({"region": Region((Box(0, 0, 1, 1),))}, {"tokens": tuple(range(1, 17))})
    )
    assert same(llava.image_embeddings(images, [[everywhere]] * 4), llava.image_embeddings(images, [[patches]] * 4))


def test_of_pixels_that_are_cropped_already_a_region_is_one_of_these(loaded):
    llava, [photo] = loaded(), photos(1)
    wide = photo.resize((112, 56))
    edits = (LatentEdit(3, "set", 25.0),)
    seen, whole = Region((Box(0, 0, 0.5, 1),)), Region((Box(0.25, 0, 0.5, 1),))
    of_seen, of_whole = (Intervention(sae_for(llava), edits, region=one) for one in (seen, whole))
    pixels = llava._resize(wide)
    assert same(llava.image_embeddings([pixels], [[of_seen]]), llava.image_embeddings([wide], [[of_whole]]))
    with pytest.raises(UsageError, match=r"outside of what .* crops images"):
        llava.answer(wide, "w1", [Intervention(of_seen.sae, edits, region=Region((Box(0, 0, 0.25, 1),)))])


def hooks_during(llava: Llava, chains) -> int:
    block = blocks_of(llava.model.model.vision_tower)[llava.layer]
    counted = []
    counter = block.register_forward_hook(lambda module, args, output: counted.append(len(module._forward_hooks)))
    try:
        llava.image_embeddings(photos(1), chains)
    finally:
        counter.remove()
    return counted[0] - 1


def test_hooks_come_with_edits_and_go_with_them(loaded):
    llava = loaded()
    plain = llava.image_embeddings(photos(1), [()])
    own = hooks_during(llava, [()])
    edit = Intervention(sae_for(llava), (LatentEdit(3, "set", 25.0),))
    assert hooks_during(llava, [[edit]]) == own + 1
    assert hooks_during(llava, [()]) == own

    def broken(x):
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        llava.image_embeddings(photos(1), [[broken]])
    with pytest.raises(ValueError, match="must keep their shape"):
        llava.image_embeddings(photos(1), [[lambda x: x[1:]]])
    assert hooks_during(llava, [()]) == own
    assert same(llava.image_embeddings(photos(1), [()]), plain)


def test_threads_do_not_see_the_edits_of_others(loaded):
    llava, images = loaded(), photos(1)
    sae = sae_for(llava)
    chains = [
        [],
        [Intervention(sae, (LatentEdit(3, "set", 25.0),))],
        [Intervention(sae, (LatentEdit(4, "set", 25.0),))],
    ]
    expected = [llava.image_embeddings(images, [chain]) for chain in chains]
    wrong = []

    def work(chain, want):
        for _ in range(30):
            if not same(llava.image_embeddings(images, [chain]), want):
                wrong.append(chain)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(chains, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_does_not_fit_is_refused(loaded):
    llava, images = loaded(), photos(1)
    narrow = SAE("relu", torch.zeros(31, 8), torch.zeros(8, 31), torch.zeros(8), torch.zeros(31))
    with pytest.raises(UsageError, match=r"d_in = 31, but the vision tower of .* is 32 wide; .* layer1:"):
        llava.answer(images[0], "w1", [Intervention(narrow)])
    with pytest.raises(UsageError, match=r"tokens has 17, but .* has tokens 0 to 16"):
        llava.answer(images[0], "w1", [Intervention(sae_for(llava), tokens=(17,))])
    with pytest.raises(UsageError, match="not finite in float32"):
        llava.answer(images[0], "w1", [lambda x: x * float("inf")])
    half = loaded("clip", "float16")
    with pytest.raises(UsageError, match="not finite in float16; lower the strength"):
        half.answer(images[0], "w1", [Intervention(sae_for(half), (LatentEdit(3, "set", 1e6),))])
    with pytest.raises(UsageError, match="the prompt contains <image>"):
        llava.answer(images[0], "what is <image>?")
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        llava.answer(images[0], "w1", max_new_tokens=0)
    with pytest.raises(UsageError, match="language model has 128"):
        llava.answer(images[0], "w1 " * 90, max_new_tokens=32)
    with pytest.raises(ValueError, match="2 images came with edits for 1"):
        llava.answers(images * 2, ["w1", "w2"], [()])
    with pytest.raises(ValueError, match="1 prompts came with the embeddings of 2"):
        llava.answers(images * 2, ["w1"], [(), ()])
    assert llava.answers([], [], []) == []


def changed_copy(source: str, target: Path, **config) -> str:
    shutil.copytree(source, target)
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(values | config))
    return str(target)


def test_what_is_no_llava_is_refused(saved, tiny_clip, tmp_path):
    def refused(words: str, path: str, **settings) -> None:
        with pytest.raises(UsageError, match=words):
            load_llava(path, **settings)

    llava = saved("clip")
    (tmp_path / "empty").mkdir()
    refused("empty cannot be loaded: .*a LLaVA is named by", str(tmp_path / "empty"))
    refused("there is no directory /no/such/llava on .*; a LLaVA is named by", "/no/such/llava")
    refused("someone/llava cannot be loaded", "someone/llava")
    refused("of the model type clip, not llava", tiny_clip)
    refused("revision is 'main'", llava, revision="main")
    refused("dtype is 'int8'", llava, dtype="int8")
    refused("device is 'cuda:99'", llava, device="cuda:99")
    refused("several layers", changed_copy(llava, tmp_path / "layers", vision_feature_layer=[-2, -1]))
    refused(
        "is 4, which is not the output of a block; its tower has 3, named 1 to 3 or -3 to -1",
        changed_copy(llava, tmp_path / "deep", vision_feature_layer=4),
    )
    refused("is 0, which is not", changed_copy(llava, tmp_path / "input", vision_feature_layer=0))
    refused(
        "null cannot be loaded: .*vision_feature_layer",
        changed_copy(llava, tmp_path / "null", vision_feature_layer=None),
    )
    refused("(?s)cannot be loaded: .*cls", changed_copy(llava, tmp_path / "cls", vision_feature_select_strategy="cls"))
    refused(
        "is -4, which is not the output of a block",
        changed_copy(llava, tmp_path / "embeddings", vision_feature_layer=-4),
    )

    bare = changed_copy(llava, tmp_path / "bare")
    (Path(bare) / "model.safetensors").unlink()
    refused("bare cannot be loaded", bare)
    wordless = changed_copy(llava, tmp_path / "wordless")
    (Path(wordless) / "tokenizer.json").unlink()
    refused("wordless cannot be loaded", wordless)
    lacking = Path(changed_copy(llava, tmp_path / "lacking"))
    weights = load_file(lacking / "model.safetensors")
    gone = next(name for name in weights if "multi_modal_projector.linear_2.weight" in name)
    del weights[gone]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    refused("lacking cannot be loaded: .*multi_modal_projector.linear_2.weight is missing", str(lacking))


def test_the_worlds_llava_answers_as_in_transformers(device):
    path = str(MODELS / "llava")
    llava = sae_ray.load_llava(path, device=device)
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype="float32").eval()
    white = Image.new("RGB", llava.info.image_size, "white")
    questions = [ONE_WORD, "Describe the image.", "What colour is it?", "What is the background?"]
    images = [white, white, *photos(2)]
    expected = []
    for image, question in zip(images, questions, strict=True):
        text = f"USER: <image>\n{question} ASSISTANT:"
        inputs = llava.processor(images=image, text=text, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        expected.append(llava.processor.batch_decode(tokens, skip_special_tokens=True)[0].strip())
    assert expected[0] == "nothing"
    assert llava.answers(images, questions, [()] * 4) == expected
