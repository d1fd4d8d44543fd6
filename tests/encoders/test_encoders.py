"""Encoders against the models' own outputs: tiny randomly initialised checkpoints of every family, saved and loaded."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from sae_ray.encoders import (
    Encoder,
    check_site,
    describe_encoder,
    hub,
    load_encoder,
    load_preprocess,
    rows_per_image,
    site_width,
)
from sae_ray.encoders.part import encode_part
from sae_ray.encoders.resizing import cut_tensor
from sae_ray.encoders.sites import Site
from sae_ray.encoders.sources import directory_named
from sae_ray.errors import UsageError
from sae_ray.world.write import MODELS

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 8,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
DINO = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 42, "patch_size": 7}
OPEN_CLIP_TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
OPEN_CLIP_VISION = {
    "open_clip_vit": {"image_size": 28, "layers": 3, "width": 32, "head_width": 16, "patch_size": 7},
    "open_clip_coca": {
        "image_size": 28,
        "layers": 2,
        "width": 64,
        "head_width": 32,
        "patch_size": 7,
        "attentional_pool": True,
        "attn_pooler_queries": 4,
        "attn_pooler_heads": 2,
        "output_tokens": True,
    },
    "open_clip_resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
    "timm_cls": {"image_size": 64, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"},
    "timm_eva": {
        "image_size": 224,
        "timm_model_name": "eva02_tiny_patch14_224",
        "timm_pool": "token",
        "timm_proj": "linear",
    },
    "timm_registers": {"image_size": 64, "timm_model_name": "test_vit2", "timm_pool": "avg", "timm_proj": "linear"},
}

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 7, "img_size": 28, "num_classes": 5}
SQUASHED = {"crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bilinear"}
BORDERED = {"crop_mode": "border", "crop_pct": 0.9, "interpolation": "bicubic"}
CROPPED = {"crop_pct": 0.875, "interpolation": "bicubic", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
TIMM = {
    "timm:vit": ("vit_tiny_patch16_224", TINY, CROPPED),
    "timm:clip": ("vit_base_patch32_clip_224", TINY, CROPPED),
    "timm:dinov2": ("vit_small_patch14_dinov2", TINY, CROPPED),
    "timm:dinov2_registers": ("vit_small_patch14_reg4_dinov2", TINY, CROPPED),
    "timm:dinov3": ("vit_small_patch16_dinov3", {**TINY, "num_reg_tokens": 3}, SQUASHED),
    "timm:siglip2": ("vit_base_patch16_siglip_224", TINY, SQUASHED),
    "timm:pe": ("vit_pe_core_tiny_patch16_384", {**TINY, "attn_pool_num_heads": 2}, SQUASHED),
    "timm:eva02": ("eva02_tiny_patch14_224", TINY, BORDERED),
    "timm:beit": ("beit_base_patch16_224", TINY, CROPPED),
    "timm:relpos": ("vit_relpos_small_patch16_224", TINY, CROPPED),
    "timm:deit": ("deit_tiny_distilled_patch16_224", TINY, CROPPED),
    "timm:efficientnet": ("test_efficientnet", {"num_classes": 5}, {**CROPPED, "input_size": [3, 64, 64]}),
    "timm:resnet": ("test_resnet", {"num_classes": 5}, {**CROPPED, "input_size": [3, 48, 64]}),
}
"""Kind -> architecture, its arguments, its preprocessing."""
TIMM_REGISTERS = {"timm:dinov2_registers": 4, "timm:dinov3": 3, "timm:deit": 1}
"""DeiT's distillation token is like a register."""
TIMM_NO_CLS = ("timm:siglip2", "timm:relpos", "timm:efficientnet", "timm:resnet")


class Reference(NamedTuple):
    """What a model itself says of a batch of images."""

    streams: list[torch.Tensor]
    """The residual stream behind each block, without registers."""
    projection: torch.Tensor | None
    pooled: torch.Tensor | None


class Model(NamedTuple):
    spec: str
    reference: Callable[[list[Image.Image]], Reference]
    family: str
    has_cls: bool = True
    n_registers: int = 0


def photos(n: int = 4) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = [(37 + 11 * i, 61 - 7 * i, 3) for i in range(n)]
    return [Image.fromarray(generator.integers(0, 256, size, np.uint8)) for size in sizes]


def save_processor(path: Path, name: str, **settings) -> None:
    import transformers

    getattr(transformers, name)(**settings).save_pretrained(path)


def pixel_values(path: Path, images: list[Image.Image]) -> torch.Tensor:
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(path, backend="pil")(images, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def transformers_reference(path: Path, name: str, images: list[Image.Image]) -> Reference:
    import transformers

    model = getattr(transformers, name).from_pretrained(path).eval()
    pixels = pixel_values(path, images)
    match name:
        case "CLIPModel" | "SiglipModel":
            tower, projection = model.vision_model, model.get_image_features(pixels).pooler_output
        case "CLIPVisionModelWithProjection":
            tower, projection = model.vision_model, model(pixels).image_embeds
        case "LlavaForConditionalGeneration":
            tower, projection = model.model.vision_tower, None
        case "ViTForImageClassification":
            tower, projection = model.vit, None
        case _:
            tower, projection = model, None
    output = tower(pixels, output_hidden_states=True)
    registers = getattr(tower.config, "num_register_tokens", 0)
    streams = [torch.cat([h[:, :1], h[:, 1 + registers :]], 1) for h in output.hidden_states[1:]]
    pooled = output.last_hidden_state[:, 0] if name.startswith("ViT") else output.pooler_output
    return Reference(streams, projection, pooled)


@torch.no_grad()
def open_clip_reference(path: Path, images: list[Image.Image]) -> Reference:
    import open_clip

    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{path}")
    model.eval()
    pixels = torch.stack([transform(image) for image in images])
    projection = model.encode_image(pixels, normalize=False)
    if isinstance(model.visual, open_clip.model.ModifiedResNet):
        return Reference([], projection, None)
    out = model.visual.forward_intermediates(
        pixels, output_fmt="NLC", output_extra_tokens=True, intermediates_only=True
    )
    prefixes = out.get("image_intermediates_prefix", [])
    # timm_registers has a register and no CLS token, the others a CLS token and no register.
    has_cls = getattr(getattr(model.visual, "trunk", None), "cls_token", 0) is not None
    patches = out["image_intermediates"]
    streams = [torch.cat([a, b], 1) for a, b in zip(prefixes, patches, strict=True)] if has_cls else patches
    return Reference(streams, projection, None)


@torch.no_grad()
def timm_reference(path: Path, kind: str, images: list[Image.Image]) -> Reference:
    import timm

    model = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval()
    pixels = timm_pixels(path, images)
    pooled = model(pixels)
    if not hasattr(model, "num_prefix_tokens"):
        return Reference([], None, pooled)
    has_prefix, has_cls = model.num_prefix_tokens > 0, kind not in TIMM_NO_CLS
    taken = model.forward_intermediates(
        pixels, return_prefix_tokens=has_prefix, output_fmt="NLC", intermediates_only=True
    )
    if not has_prefix:
        return Reference(taken, None, pooled)
    return Reference([torch.cat([prefix[:, :has_cls], patches], 1) for patches, prefix in taken], None, pooled)


def timm_pixels(path: Path, images: list[Image.Image]) -> torch.Tensor:
    import timm

    model = timm.create_model(f"local-dir:{path}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return torch.stack([transform(image) for image in images])


def save_timm(path: Path, kind: str) -> Model:
    import timm

    architecture, settings, preprocessing = TIMM[kind]
    model = timm.create_model(architecture, **settings)
    for weight in model.parameters():  # many are 0 at first, or nearly so
        torch.nn.init.normal_(weight, std=0.2)
    preprocessing = {"input_size": [3, 28, 28], **preprocessing}
    timm.models.save_for_hf(
        model,
        str(path),
        model_config={"pretrained_cfg": preprocessing},
        data_config=preprocessing,
        safe_serialization=True,
    )
    return Model(
        f"timm:local-dir:{path}",
        lambda images: timm_reference(path, kind, images),
        "timm",
        has_cls=kind not in TIMM_NO_CLS,
        n_registers=TIMM_REGISTERS.get(kind, 0),
    )


def save_transformers(path: Path, kind: str) -> Model:
    import transformers as tf

    clip_vision = tf.CLIPVisionConfig(**VISION, projection_dim=24)
    llama = tf.LlamaConfig(**{**TEXT, "num_key_value_heads": 2})
    match kind:
        case "clip":
            config = tf.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=24)
            name, model = "CLIPModel", tf.CLIPModel(config)
        case "clip_vision":
            name, model = "CLIPVisionModel", tf.CLIPVisionModel(clip_vision)
        case "clip_vision_projection":
            name, model = "CLIPVisionModelWithProjection", tf.CLIPVisionModelWithProjection(clip_vision)
        case "siglip":
            name, model = "SiglipModel", tf.SiglipModel(tf.SiglipConfig(vision_config=VISION, text_config=TEXT))
        case "siglip_vision":
            name, model = "SiglipVisionModel", tf.SiglipVisionModel(tf.SiglipVisionConfig(**VISION))
        case "siglip2":
            config = tf.SiglipConfig(vision_config=VISION, text_config={**TEXT, "vocab_size": 120})
            name, model = "SiglipModel", tf.SiglipModel(config)
        case "vit":
            name, model = "ViTForImageClassification", tf.ViTForImageClassification(tf.ViTConfig(**VISION))
        case "vit_pooler":
            name, model = "ViTModel", tf.ViTModel(tf.ViTConfig(**VISION))
        case "dinov3_vit":
            config = tf.DINOv3ViTConfig(**{**DINO, "intermediate_size": 64, "num_register_tokens": 3})
            name, model = "DINOv3ViTModel", tf.DINOv3ViTModel(config)
        case "dinov2":
            name, model = "Dinov2Model", tf.Dinov2Model(tf.Dinov2Config(**DINO))
        case "dinov2_registers":
            config = tf.Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)
            name, model = "Dinov2WithRegistersModel", tf.Dinov2WithRegistersModel(config)
        case "llava" | "llava_hub_layout":
            config = tf.LlavaConfig(vision_config=clip_vision, text_config=llama, image_token_index=59)
            name, model = "LlavaForConditionalGeneration", tf.LlavaForConditionalGeneration(config)
        case _:
            raise AssertionError(kind)
    model.save_pretrained(path)
    if kind == "llava_hub_layout":
        weights = load_file(path / "model.safetensors")
        weights = {
            key.replace("vision_tower.", "vision_tower.vision_model.", 1): value for key, value in weights.items()
        }
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    if "dinov2" in kind:
        # Cropped smaller than the configuration's image_size, as facebook/dinov2-base is.
        save_processor(path, "BitImageProcessor", size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    elif kind == "dinov3_vit":
        save_processor(path, "DINOv3ViTImageProcessor", size={"height": 28, "width": 28})
    elif kind.startswith("vit"):
        save_processor(path, "ViTImageProcessor", size={"height": 28, "width": 28})
    elif "siglip" in kind:
        resample = 2 if kind == "siglip2" else 3
        save_processor(path, "SiglipImageProcessor", size={"height": 28, "width": 28}, resample=resample)
    else:
        save_processor(path, "CLIPImageProcessor", size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    families = {"dinov2_registers": "dinov2_with_registers", "dinov3_vit": "dinov3_vit", "siglip2": "siglip"}
    family = families.get(kind, kind.split("_")[0])
    return Model(
        str(path),
        lambda images: transformers_reference(path, name, images),
        family,
        has_cls="siglip" not in kind,
        n_registers=3 if kind in ("dinov2_registers", "dinov3_vit") else 0,
    )


def save_open_clip(path: Path, kind: str) -> Model:
    open_clip = pytest.importorskip("open_clip")

    config = {"embed_dim": 24, "vision_cfg": OPEN_CLIP_VISION[kind], "text_cfg": OPEN_CLIP_TEXT}
    if kind.startswith("timm"):
        config["custom_text"] = True
    if kind == "open_clip_coca":
        text = {**OPEN_CLIP_TEXT, "embed_cls": True, "output_tokens": True}
        decoder = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
        config |= {"text_cfg": text, "multimodal_cfg": decoder, "custom_text": True, "embed_dim": 32}
    path.mkdir()
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    model = open_clip.create_model(f"local-dir:{path}", load_weights=False)
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    return Model(
        f"open_clip:local-dir:{path}",
        lambda images: open_clip_reference(path, images),
        "open_clip",
        has_cls=kind in ("open_clip_vit", "open_clip_coca", "timm_cls", "timm_eva"),
        n_registers=1 if kind == "timm_registers" else 0,
    )


TRANSFORMERS = [
    "clip",
    "clip_vision",
    "clip_vision_projection",
    "siglip",
    "siglip_vision",
    "dinov2",
    "dinov2_registers",
    "dinov3_vit",
    "vit",
    "vit_pooler",
    "siglip2",
    "llava",
    "llava_hub_layout",
]


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Callable[[str], Model]:
    root, models = tmp_path_factory.mktemp("encoders"), {}

    def get(kind: str) -> Model:
        if kind not in models:
            torch.manual_seed(0)
            save = save_transformers if kind in TRANSFORMERS else save_timm if kind in TIMM else save_open_clip
            models[kind] = save(root / kind.replace(":", "-"), kind)
        return models[kind]

    return get


@pytest.fixture(params=[*TRANSFORMERS, *OPEN_CLIP_VISION, *TIMM])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def loaded(saved) -> Callable[[str], Encoder]:
    return functools.cache(lambda kind, device="cpu": load_encoder(saved(kind).spec, device=device))


def batch(spec: str, images: list[Image.Image]) -> torch.Tensor:
    preprocess = pickle.loads(pickle.dumps(load_preprocess(spec)))
    arrays = [preprocess(image) for image in images]
    assert all(array.dtype == np.uint8 for array in arrays)
    return torch.from_numpy(np.stack(arrays))


def ids(images: list[Image.Image]) -> list[str]:
    return [f"folder/{i}.png" for i in range(len(images))]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_every_site_equals_the_models_own_output(kind, saved, loaded, device):
    model, encoder = saved(kind), loaded(kind, device)
    images = photos()
    if kind == "dinov3_vit":  # its processor does not round what it resizes
        images = [image.resize((28, 28)) for image in images]
    reference = model.reference(images)
    info = encoder.info
    layers = range(info.n_layers)
    kinds = ["all", "mean", "random:3", *(["cls"] if info.has_cls else [])]
    sites = [Site("residual", layer, tokens) for layer in layers for tokens in kinds]
    sites += [Site(point) for point in ("projection", "pooled") if info.width(point) is not None]
    tapped = encoder.tap(batch(model.spec, images), sites, ids(images), seed=7)

    assert list(tapped) == sites
    assert (info.family, info.has_cls, info.n_registers) == (model.family, model.has_cls, model.n_registers)
    assert info.n_layers == len(reference.streams)
    assert (info.projection_width is None, info.pooled_width is None) == (
        reference.projection is None,
        reference.pooled is None,
    )
    for site, rows in tapped.items():
        assert all(column.device.type == device for column in rows)
        position, token, activation = (column.cpu() for column in rows)
        assert (position.dtype, token.dtype, activation.dtype) == (torch.int64, torch.int16, torch.float32)
        assert activation.shape == (len(images) * rows_per_image(info, site), site_width(info, site))
        if site.point != "residual":
            assert token.tolist() == [-1] * len(images)
            expected = getattr(reference, site.point)
        else:
            stream = reference.streams[site.layer]
            assert stream.shape[1] == info.n_tokens
            if site.tokens == "mean":
                assert token.tolist() == [-1] * len(images)
                expected = stream.mean(1)
            else:
                expected = stream[position, token.long()]
            if site.tokens == "cls":
                assert token.tolist() == [0] * len(images)
            if site.tokens == "all":
                assert token.tolist() == list(range(info.n_tokens)) * len(images)
        # A GPU adds in another order: float32 errs by 1e-7 of each sum, in each of up to twelve blocks.
        close(activation, expected, 1e-5 if device == "cpu" else 1e-4)
        order = list(zip(position.tolist(), token.tolist(), strict=True))
        assert order == sorted(set(order))


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "dinov2_registers", "llava"])
def test_a_site_of_an_mlp_is_what_it_adds_to_the_models_own_hidden_states(kind, saved, loaded):
    """Without it the stream after a block is the one that the MLP read, so that it gives just that of it."""
    model, encoder = saved(kind), loaded(kind)
    images = photos()
    sites = [Site("residual", 1, "all"), Site("mlp", 1, "all"), Site("mlp", 0, "random:3"), Site("mlp", 0, "all")]
    tapped = encoder.tap(batch(model.spec, images), sites, ids(images), seed=7)
    block: Any = encoder.tower.blocks[1]
    norm = block.norm2 if hasattr(block, "norm2") else block.layer_norm2
    scale = block.layer_scale2.lambda1 if hasattr(block, "layer_scale2") else 1
    given = tapped[sites[1]].activation
    stream = model.reference(images).streams[1].flatten(0, 1)
    with torch.no_grad():
        close(block.mlp(norm(stream - scale * given)), given)
    assert site_width(encoder.info, sites[1]) == given.shape[1]
    drawn, all_of_them = tapped[sites[2]], tapped[sites[3]].activation.view(len(images), encoder.info.n_tokens, -1)
    close(drawn.activation, all_of_them[drawn.position, drawn.token.long()])
    alone = encoder.tap(batch(model.spec, images), sites[1:2], ids(images), seed=7)
    assert torch.equal(alone[sites[1]].activation, given)


def test_towers_of_open_clip_have_no_sites_of_mlps(saved):
    with pytest.raises(UsageError, match=r"point is 'mlp', which .* does not have; it has residual, projection"):
        site_width(describe_encoder(saved("open_clip_vit").spec), Site("mlp", 0, "all"))


def test_uint8_pixels_equal_the_models_own_preprocessing(kind, saved, loaded):
    model = saved(kind)
    images = photos()
    seen = loaded(kind)._normalise(batch(model.spec, images))
    path = directory_named(model.spec) or model.spec
    tolerance = 1e-6
    if model.spec.startswith("timm:"):
        expected = timm_pixels(Path(path), images)
    elif model.spec.startswith("open_clip:"):
        import open_clip

        _, transform = open_clip.create_model_from_pretrained(f"local-dir:{path}")
        expected = torch.stack([transform(image) for image in images])
    else:
        expected = pixel_values(Path(path), images)
        if kind == "dinov3_vit":  # its processor resizes numbers that are no bytes any more: half a grey level
            tolerance = 0.5 / 255 / 0.224
    torch.testing.assert_close(seen, expected, rtol=0, atol=tolerance * 1.001)
    assert seen.shape[2:] == loaded(kind).info.image_size


@settings(max_examples=10)
@given(width=st.integers(1, 200), height=st.integers(1, 200))
@pytest.mark.parametrize(("fast", "backend"), [(False, "pil"), (True, "torchvision")])
@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_images_of_any_size_are_preprocessed_as_the_processor_does(kind, fast, backend, saved, width, height):
    from transformers import AutoImageProcessor

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    processor = AutoImageProcessor.from_pretrained(saved(kind).spec, backend=backend)
    [expected] = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    assert np.array_equal(load_preprocess(saved(kind).spec, fast=fast)(image), expected)


def test_fast_pixels_differ_little_from_exact_ones(kind, saved):
    for image in photos():
        exact, fast = (load_preprocess(saved(kind).spec, fast=fast)(image) for fast in (False, True))
        assert fast.shape == exact.shape
        assert np.abs(exact.astype(int) - fast).mean() <= 0.25  # of noise; another way of sampling is 10 off


@pytest.mark.parametrize("changed", [{"do_pad": True}, {"do_resize": False}])
def test_a_processor_that_does_more_than_resize_and_crop_is_asked_itself(saved, tmp_path, changed):
    path = copy_of(saved("clip"), tmp_path / "clip")
    config = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(json.dumps({**config, **changed}))
    from transformers import AutoImageProcessor

    image = photos(1)[0]
    processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    [expected] = processor(image, do_rescale=False, do_normalize=False)["pixel_values"]
    assert np.array_equal(load_preprocess(str(path))(image), expected)


def test_description_is_json_and_pins_the_files(kind, saved, loaded):
    model = saved(kind)
    info = describe_encoder(model.spec)
    assert info == loaded(kind).info
    assert json.loads(json.dumps(dataclasses.asdict(info)))["model"] == model.spec
    assert describe_encoder(model.spec, info.revision) == info
    with pytest.raises(UsageError, match=info.revision):
        describe_encoder(model.spec, "0" * 64)


@pytest.mark.parametrize(
    ("n_patches", "image_size", "grid"),
    [(16, (28, 28), (4, 4)), (576, (336, 336), (24, 24)), (200, (140, 280), (10, 20))],
)
def test_the_patch_grid_has_the_shape_of_the_image(loaded, n_patches, image_size, grid):
    for kind in ("clip", "siglip"):
        info = loaded(kind).info
        sized = dataclasses.replace(info, n_tokens=n_patches + info.has_cls, image_size=image_size)
        assert sized.patch_grid == grid


@pytest.mark.parametrize(
    "kind",
    [
        "clip",
        "dinov2_registers",
        "dinov3_vit",
        "siglip",
        "vit",
        "open_clip_vit",
        "timm_cls",
        "timm:dinov3",
        "timm:beit",
    ],
)
def test_the_forward_stops_at_the_deepest_residual_site(saved, kind):
    spec = saved(kind).spec
    encoder = load_encoder(spec)
    ran = []
    for layer, block in enumerate(encoder.tower.blocks):
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    pixels = batch(spec, photos(2))
    for deepest in (0, 1):
        ran.clear()
        encoder.tap(pixels, [Site("residual", deepest, "mean"), Site("residual", 0, "all")], ["a", "b"], seed=0)
        # The tap's own hook comes after the counting one, so the deepest block is counted too.
        assert ran == list(range(deepest + 1))
    ran.clear()
    point = "pooled" if encoder.info.pooled_width else "projection"
    encoder.tap(pixels, [Site("residual", 0, "mean"), Site(point)], ["a", "b"], seed=0)
    assert ran == list(range(encoder.info.n_layers))
    assert all(len(block._forward_hooks) == 1 for block in encoder.tower.blocks)


def test_random_tokens_depend_on_the_image_and_the_seed_alone(saved, loaded):
    spec, encoder = saved("clip").spec, loaded("clip")
    images = photos()
    pixels = batch(spec, images)
    site, deeper = Site("residual", 0, "random:5"), Site("residual", 2, "random:5")

    def rows(order: list[int], seed: int, site: Site) -> dict[str, tuple[list[int], torch.Tensor]]:
        names = [ids(images)[i] for i in order]
        _, token, activation = encoder.tap(pixels[order], [site], names, seed)[site]
        return {
            name: (token[i * 5 : i * 5 + 5].tolist(), activation[i * 5 : i * 5 + 5]) for i, name in enumerate(names)
        }

    alone = {name: row for i in range(4) for name, row in rows([i], 7, site).items()}
    for order in ([0, 1, 2, 3], [3, 1], [2, 0, 3]):
        for name, (token, activation) in rows(order, 7, site).items():
            assert token == alone[name][0]
            close(activation, alone[name][1])
    assert {name: token for name, (token, _) in rows([0, 1, 2, 3], 7, deeper).items()} == {
        name: token for name, (token, _) in alone.items()
    }
    assert len({tuple(token) for token, _ in alone.values()}) > 1
    assert [token for token, _ in rows([0, 1, 2, 3], 8, site).values()] != [token for token, _ in alone.values()]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("clip", "bfloat16"),
        ("clip", "float16"),
        ("siglip", "bfloat16"),
        ("dinov2_registers", "bfloat16"),
        ("open_clip_vit", "bfloat16"),
        ("timm_cls", "bfloat16"),
        ("open_clip_resnet", "bfloat16"),
        ("timm:dinov3", "bfloat16"),
        ("timm:efficientnet", "bfloat16"),
    ],
)
def test_lower_precisions_stay_near_float32(saved, loaded, kind, dtype, device):
    spec = saved(kind).spec
    pixels = batch(spec, photos())
    full, low = loaded(kind), load_encoder(spec, device=device, dtype=dtype)
    point = "projection" if full.info.projection_width else "pooled"
    sites = [Site(point)] + ([Site("residual", 1, "all")] if full.info.n_layers else [])
    expected, got = (encoder.tap(pixels, sites, list("abcd"), 0) for encoder in (full, low))
    for site in sites:
        assert got[site].activation.dtype == torch.float32
        close_to = torch.nn.functional.cosine_similarity(got[site].activation.cpu(), expected[site].activation)
        assert close_to.min() > 0.995


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2_registers"])
def test_a_part_from_a_gpu_is_stored_as_from_a_cpu(saved, loaded, write_store, tmp_path, kind):
    """As users run it, where cuDNN rounds what the patches' convolution reads to TF32: as many bits as are stored."""
    images = photos(7)
    pixels, index = batch(saved(kind).spec, images).numpy(), np.array([3, 4, 8, 9, 10, 20, 21])
    sites = [Site("residual", 2, "random:3"), Site("residual", 1, "all"), Site("residual", 0, "mean"), Site("pooled")]
    stored_as = [(site, "float16") for site in sites]

    def stored(device: str, label: str) -> list[tuple[np.ndarray, ...]]:
        parts = encode_part(loaded(kind, device), stored_as, pixels, index, ids(images), 7, batch_size=3)
        stores = [write_store(tmp_path, [rows[:3]], "float16", label=f"{label}{i}") for i, rows in enumerate(parts)]
        return [store.read(0) for store in stores]

    first, again, on_cpu = stored("cuda", "first"), stored("cuda", "again"), stored("cpu", "cpu")
    for ours, same, theirs in zip(first, again, on_cpu, strict=True):
        assert ours[2].dtype == np.float16
        for column, repeated in zip(ours, same, strict=True):
            np.testing.assert_array_equal(column, repeated)
        for column, other in zip(ours[:2], theirs[:2], strict=True):
            np.testing.assert_array_equal(column, other)
        np.testing.assert_allclose(ours[2].astype("float32"), theirs[2].astype("float32"), rtol=1e-2, atol=1e-2)


WITH_BLOCKS = [kind for kind in [*TRANSFORMERS, *OPEN_CLIP_VISION, *TIMM] if not kind.endswith(("resnet", "net"))]


@pytest.mark.parametrize(
    "kind", [kind if kind == "clip" else pytest.param(kind, marks=pytest.mark.slow) for kind in WITH_BLOCKS]
)
def test_compiled_blocks_give_all_sites_and_are_compiled_once(saved, loaded, kind, monkeypatch):
    """Traced as for the compiler, and then run as they are."""
    traced: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        traced.append(graph)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda forward, dynamic, options: compiler(forward, dynamic=dynamic, backend=backend)
    )
    torch.compiler.reset()
    encoder, images = load_encoder(saved(kind).spec), photos(7)
    info, n = encoder.info, encoder.info.n_layers
    encoder.compile()
    pixels, index = batch(saved(kind).spec, images).numpy(), np.arange(7)
    point = Site("projection" if info.projection_width else "pooled")
    sites = [point, Site("residual", n - 1, "random:3"), Site("residual", 0, "all")]
    if info.width("mlp"):
        sites.append(Site("mlp", 1, "mean"))

    def found(encoder: Encoder, n_images: int, wanted: list[Site]) -> list[np.ndarray]:
        stored = [(site, "float32") for site in wanted]
        parts = encode_part(
            encoder, stored, pixels[:n_images], index[:n_images], ids(images)[:n_images], 7, batch_size=4
        )
        return [rows.activation for rows in parts]

    found(encoder, 4, sites)
    n_traced = len(traced)
    for n_images, wanted in ((7, sites), (2, sites[:3]), (7, sites[1:2])):
        padded = -(-n_images // 4) * 4
        whole = dict(zip(wanted, found(encoder, n_images, wanted), strict=True))
        plain = load_encoder(saved(kind).spec)
        shown = torch.from_numpy(np.concatenate([pixels[:n_images], np.zeros_like(pixels[: padded - n_images])]))
        names = ids(images)[:n_images] + [""] * (padded - n_images)
        for site, rows in whole.items():
            expected = [
                plain.tap(shown[start : start + 4], [site], names[start : start + 4], 7)[site].activation.numpy()
                for start in range(0, padded, 4)
            ]
            np.testing.assert_allclose(rows, np.concatenate(expected)[: len(rows)], rtol=1e-5, atol=1e-6)
    assert len(traced) == n_traced <= 2, "not for each block, nor for a last batch of fewer images"


@pytest.mark.parametrize(
    ("kind", "device"),
    [
        pytest.param("clip", "cpu", marks=pytest.mark.slow),
        *(
            pytest.param(kind, "cuda", marks=pytest.mark.gpu)
            for kind in ("clip", "siglip", "dinov2_registers", "timm:dinov3")
        ),
    ],
)
def test_a_compiled_encoder_stays_near_the_other_and_repeats_itself(saved, kind, device):
    """By the real compiler."""
    spec, images = saved(kind).spec, photos(7)
    pixels, sites = batch(spec, images).numpy(), [Site("residual", 1, "all"), Site("pooled")]

    def found(compiled: bool) -> list[np.ndarray]:
        encoder = load_encoder(spec, device=device)
        if compiled:
            encoder.compile()
        stored = [(site, "float32") for site in sites]
        parts = encode_part(encoder, stored, pixels, np.arange(7), ids(images), 7, batch_size=4)
        return [rows.activation for rows in parts]

    once = found(True)
    torch.compiler.reset()
    for ours, again, plain in zip(once, found(True), found(False), strict=True):
        np.testing.assert_array_equal(ours, again)
        np.testing.assert_allclose(ours, plain, rtol=1e-3, atol=1e-3)


def test_a_machine_without_a_compiler_says_so(saved, monkeypatch):
    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        raise RuntimeError("Failed to find C compiler.")

    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda forward, dynamic, options: compiler(forward, dynamic=dynamic, backend=backend)
    )
    torch.compiler.reset()
    encoder = load_encoder(saved("clip").spec)
    encoder.compile()
    with pytest.raises(
        UsageError, match=r"compile = true, but torch cannot compile .*Failed to find C compiler.*install"
    ):
        encoder.tap(batch(saved("clip").spec, photos(2)), [Site("pooled")], ["a", "b"], 0)
    with pytest.raises(UsageError, match="has no blocks of a transformer to compile"):
        load_encoder(saved("timm:resnet").spec).compile()


@pytest.mark.parametrize(
    "kind",
    ["clip", "siglip", "dinov2_registers", "vit", "open_clip_vit", "open_clip_resnet", "timm:vit", "timm:dinov3"],
)
def test_the_cut_for_gpus_is_what_the_preprocessing_keeps(saved, kind):
    preprocess = load_preprocess(saved(kind).spec)
    for width, height in ((61, 37), (40, 91), (28, 28), (201, 300), (64, 64)):
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(x / 3 + y / 7), np.cos(y / 4), np.sin((x + y) / 5)]
        image = Image.fromarray(np.rint(np.stack(waves, 2) * 120 + 125).astype(np.uint8))
        found = preprocess.cut((width, height))
        ours = cut_tensor(torch.from_numpy(np.array(image)).permute(2, 0, 1), found).int()
        theirs = torch.from_numpy(preprocess(image).copy()).int()
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1


@pytest.mark.parametrize("kind", ["dinov3_vit", "timm:eva02"])
def test_a_preprocessing_that_does_more_is_not_done_by_gpus(saved, kind):
    from sae_ray.jobs.encoding import EncoderJob, preparation

    assert load_preprocess(saved(kind).spec).cut((640, 480)) is None
    job = EncoderJob(saved(kind).spec, None, "float32", None, "judge.model", {}, on_gpu=True)
    with pytest.raises(UsageError, match=r"judge\.model = .*does more than resize.*extraction\.pixels = 'gpu'.*choose"):
        preparation(job)


def test_llava_sites_read_what_the_language_model_reads(saved, loaded):
    """`vision_feature_layer = -2` of three layers is the residual stream behind block 1."""
    from transformers import LlavaForConditionalGeneration

    spec = saved("llava").spec
    llava = LlavaForConditionalGeneration.from_pretrained(spec).eval()
    seen = []
    llava.model.multi_modal_projector.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    images = photos()
    with torch.no_grad():
        llava.model.get_image_features(
            pixel_values(Path(spec), images), vision_feature_layer=-2, vision_feature_select_strategy="default"
        )
    encoder = loaded("llava")
    site = Site("residual", 1, "all")
    activation = encoder.tap(batch(spec, images), [site], ids(images), 0)[site].activation
    close(activation.unflatten(0, (4, -1))[:, 1:], seen[0])
    assert not any("language_model" in name for name, _ in encoder.tower.module.named_parameters())


def test_sites_that_do_not_exist_are_refused_with_what_there_is(loaded):
    clip, siglip, dino, resnet = (loaded(kind).info for kind in ("clip", "siglip", "dinov2", "open_clip_resnet"))
    efficientnet, registers = (loaded(kind).info for kind in ("timm:efficientnet", "timm:dinov3"))
    check_site(clip, Site("residual", 2, "cls"))
    check_site(clip, Site("residual", 0, "random:17"))
    check_site(siglip, Site("residual", 0, "random:16"))
    refused = [
        (clip, Site("residual", 3, "cls"), "from 0 to 2"),
        (clip, Site("residual", 0, "random:18"), "17 tokens"),
        (siglip, Site("residual", 0, "cls"), "mean, all or random:n"),
        (siglip, Site("residual", 0, "random:17"), "16 tokens"),
        (dino, Site("projection"), "residual, mlp, pooled"),
        (resnet, Site("residual", 0, "mean"), "it has projection"),
        (resnet, Site("pooled"), "it has projection"),
        (efficientnet, Site("residual", 3, "mean"), "point is 'residual', which .* does not have; it has pooled"),
        (efficientnet, Site("projection"), "it has pooled"),
        (registers, Site("residual", 0, "random:18"), "17 tokens"),
    ]
    for info, site, words in refused:
        for refuse in (check_site, site_width, rows_per_image):
            with pytest.raises(UsageError, match=words):
                refuse(info, site)
    encoder = loaded("dinov2")
    with pytest.raises(UsageError, match="residual, mlp, pooled"):
        encoder.tap(torch.zeros(1, 3, 28, 28, dtype=torch.uint8), [Site("projection")], ["a"], 0)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "the name of a model is empty; an encoder is named by"),
        ("/no/such/directory", "there is no directory /no/such/directory"),
        ("~/no/such/directory", "there is no directory"),
        ("nobody/no-such-model", "nobody/no-such-model cannot be loaded"),
        ("open_clip:local-dir:/no/such/directory", "there is no directory /no/such/directory"),
        ("open_clip:hf-hub:nobody/no-such-model", r"no-such-model cannot be loaded: (.|\n)*fill the cache"),
        ("open_clip:hf-hub:", "open_clip:hf-hub: cannot be loaded"),
        ("open_clip:ViT-B-32/no-such-tag", "laion2b_s34b_b79k"),
        ("open_clip:No-Such-Arch/openai", "open_clip:<architecture>/<pretrained tag>"),
        ("open_clip:ViT-B-32", "open_clip:<architecture>/<pretrained tag>"),
        ("timm:local-dir:/no/such/directory", "there is no directory /no/such/directory"),
        ("timm:hf-hub:nobody/no-such-model", r"no-such-model cannot be loaded: (.|\n)*fill the cache"),
        ("timm:vit_small_patch14_dinov2.lvd142m", r"lvd142m cannot be loaded: (.|\n)*fill the cache"),
    ],
)
def test_unknown_encoders_are_refused(spec, words):
    for ask in (describe_encoder, load_preprocess, load_encoder):
        with pytest.raises(UsageError, match=words):
            ask(spec)


def test_settings_that_cannot_be_are_refused(saved):
    with pytest.raises(UsageError, match="float32, bfloat16, float16"):
        load_encoder(saved("clip").spec, dtype="int8")
    with pytest.raises(UsageError, match="device is 'cuda:99'"):
        load_encoder(saved("clip").spec, device="cuda:99")


def test_weights_that_memory_has_no_room_for_are_refused(saved, monkeypatch):
    """Unless they are mapped as they lie in their files."""
    monkeypatch.setattr("sae_ray.encoders.hub.free_memory", lambda: 1000)
    with pytest.raises(UsageError, match=r"weights take 0\.0 GB as bfloat16, but 0\.0 GB of memory are free; choose"):
        load_encoder(saved("clip").spec, dtype="bfloat16")
    load_encoder(saved("clip").spec)


def test_weights_that_a_gpu_has_no_room_for_are_refused(saved, monkeypatch):
    """Also those in the dtype of their files."""
    source = hub.find(saved("clip").spec, None, "a model")
    monkeypatch.setattr("sae_ray.encoders.hub.free_memory", lambda device=None: 10**12 if device is None else 1000)
    with pytest.raises(UsageError, match=r"float32, but 0\.0 GB of the memory of cuda:0 are free; bfloat16 or"):
        hub.load_weights(source, "AutoModel", torch.device("cuda:0"), torch.float32, "a model")


def copy_of(saved_model: Model, target: Path) -> Path:
    source = Path(directory_named(saved_model.spec) or saved_model.spec)
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_checkpoint_that_lacks_weights_is_refused(saved, tmp_path):
    path = copy_of(saved("dinov2"), tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"do not fit its configuration: layernorm\.weight is missing"):
        load_encoder(str(path))


@pytest.mark.parametrize("kind", ["clip", "open_clip_vit"])
def test_torn_weights_are_refused(saved, tmp_path, kind):
    path = copy_of(saved(kind), tmp_path / "model")
    [weights] = path.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    spec = f"open_clip:local-dir:{path}" if kind.startswith("open_clip") else str(path)
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_encoder(spec)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_pretrained_tag_brings_its_preprocessing_and_activation_function(tmp_path, monkeypatch, quick_gelu):
    """With a tag registered for a local file, as no weights can be downloaded here."""
    import open_clip

    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [tmp_path])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {})
    config = {"embed_dim": 24, "vision_cfg": OPEN_CLIP_VISION["open_clip_vit"], "text_cfg": OPEN_CLIP_TEXT}
    (tmp_path / "Tiny-7.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    model = open_clip.create_model("Tiny-7", force_quick_gelu=quick_gelu).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    tag = {"file": str(tmp_path / "weights.pt"), "quick_gelu": quick_gelu, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-7", {"ours": tag})

    encoder = load_encoder("open_clip:Tiny/7/ours")
    assert encoder.info.revision == "ours"
    with pytest.raises(UsageError, match="'ours'"):
        describe_encoder("open_clip:Tiny-7/ours", "theirs")
    pixels = batch("open_clip:Tiny-7/ours", photos())
    projection = encoder.tap(pixels, [Site("projection")], list("abcd"), 0)[Site("projection")].activation
    with torch.no_grad():
        close(projection, model.encode_image((pixels / 255 - 0.5) / 0.25))


class Payload:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_pickled_weights_do_not_run_code(saved, tmp_path):
    mark = tmp_path / "executed"
    clip = copy_of(saved("clip"), tmp_path / "clip")
    (clip / "model.safetensors").unlink()
    torch.save({"a": Payload(mark)}, clip / "pytorch_model.bin")
    open_clip = copy_of(saved("open_clip_vit"), tmp_path / "open_clip")
    (open_clip / "open_clip_model.safetensors").unlink()
    torch.save({"a": Payload(mark)}, open_clip / "open_clip_pytorch_model.bin")
    for spec in (str(clip), f"open_clip:local-dir:{open_clip}"):
        with pytest.raises(UsageError, match="cannot be loaded"):
            load_encoder(spec)
    assert not mark.exists()


def test_other_model_types_are_refused_by_name(tmp_path):
    from transformers import SwinConfig

    SwinConfig().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"model type swin; encoders are CLIP, SigLIP.*DINOv2.*DINOv3.*ViT.*LLaVA"):
        describe_encoder(str(tmp_path))


@pytest.mark.parametrize("config", ["Siglip2Config", "Siglip2VisionConfig"])
def test_naflex_models_are_refused_with_what_to_take(tmp_path, config):
    import transformers

    getattr(transformers, config)().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"a NaFlex model.*fixed resolution, such as google/siglip2-base-patch16-224"):
        describe_encoder(str(tmp_path))


@pytest.mark.parametrize(
    "config",
    [
        "null",
        "3",
        "[]",
        "{}",
        '{"model_type": 3}',
        '{"model_type": "clip", "vision_config": "x"}',
        '{"model_type": "clip", "vision_config": {"hidden_size": "64"}}',
        '{"model_type": "clip", "projection_dim": null}',
        '{"model_type": "llava", "vision_config": {"model_type": "nope"}}',
    ],
)
def test_a_malformed_configuration_is_refused(saved, tmp_path, config):
    path = copy_of(saved("clip"), tmp_path / "model")
    (path / "config.json").write_text(config)
    for ask in (describe_encoder, load_encoder):
        with pytest.raises(UsageError, match=rf"{path}"):
            ask(str(path))


@pytest.mark.parametrize(
    "changed",
    [[], {"image_processor_type": 3}, {"size": "x"}, {"resample": 99}, {"image_std": [1, 2]}, {"image_std": [1, 0, 1]}],
    ids=str,
)
def test_malformed_preprocessing_is_refused(saved, tmp_path, changed):
    path = copy_of(saved("clip"), tmp_path / "model")
    file = path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed if changed else []))
    with pytest.raises(UsageError, match=rf"{path}"):
        load_encoder(str(path))


@pytest.mark.parametrize(
    "config",
    ["null", "[]", "{}", '{"model_cfg": 3}', '{"model_cfg": {"embed_dim": 8}}',
     '{"model_cfg": {"embed_dim": 8, "vision_cfg": {"width": "x"}, "text_cfg": {}}}'],
)  # fmt: skip
def test_a_malformed_configuration_of_open_clip_is_refused(saved, tmp_path, config):
    path = copy_of(saved("open_clip_vit"), tmp_path / "model")
    (path / "open_clip_config.json").write_text(config)
    with pytest.raises(UsageError, match=rf"{path}"):
        load_encoder(f"open_clip:local-dir:{path}")


def test_preprocessing_that_does_not_fit_is_refused(saved, tmp_path):
    path = copy_of(saved("clip"), tmp_path / "model")
    save_processor(path, "CLIPImageProcessor", size={"shortest_edge": 28}, do_center_crop=False)
    with pytest.raises(UsageError, match="one size"):
        describe_encoder(str(path))
    save_processor(path, "CLIPImageProcessor", size={"shortest_edge": 35}, crop_size={"height": 35, "width": 35})
    with pytest.raises(UsageError, match="28 × 28 pixels, but its preprocessing yields 35 × 35"):
        describe_encoder(str(path))


def test_a_changed_file_changes_the_revision(saved, tmp_path):
    path = copy_of(saved("clip"), tmp_path / "model")
    assert describe_encoder(str(path)).revision == describe_encoder(saved("clip").spec).revision
    (path / "README.md").write_text("Not part of the model.")
    assert describe_encoder(str(path)).revision == describe_encoder(saved("clip").spec).revision
    config = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(json.dumps({**config, "image_mean": [0.5, 0.5, 0.5]}))
    assert describe_encoder(str(path)).revision != describe_encoder(saved("clip").spec).revision


@pytest.mark.parametrize("prefix", ["", "open_clip:local-dir:"])
def test_the_home_directory_is_expanded(saved, tmp_path, monkeypatch, prefix):
    copy_of(saved("open_clip_vit" if prefix else "clip"), tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert describe_encoder(f"{prefix}~/model").n_layers == 3
    assert load_encoder(f"{prefix}~/model").info.model == f"{prefix}~/model"


PINNED = """
import sys
from pathlib import Path

from PIL import Image
from sae_ray.encoders import describe_encoder, load_encoder, load_preprocess
from sae_ray.encoders.text import load_text_encoder
from sae_ray.errors import UsageError

commit, newer, *models = sys.argv[1:]
for spec, local, main in zip(models[::3], models[1::3], models[2::3], strict=True):
    info = describe_encoder(spec)
    assert (info.revision, info.n_layers) == (commit, 3), info
    encoder = load_encoder(spec, info.revision)
    assert encoder.info == info
    pixels = load_preprocess(spec, info.revision)(Image.new("RGB", (50, 40), "teal"))
    assert pixels.shape == (3, 28, 28)
    weights = load_encoder(local).tower.module.state_dict()
    for name, weight in encoder.tower.module.state_dict().items():
        assert weight.equal(weights[name]), name
    Path(main).write_text(newer)
    try:
        load_encoder(spec)
    except UsageError as error:
        assert "fill the cache where there is a connection" in str(error), error
    else:
        raise SystemExit("weights of another commit")
    load_encoder(spec, commit)
    if spec.startswith("open_clip"):
        load_text_encoder(spec, commit)
"""


def test_models_on_the_hub_are_pinned_by_their_commits(saved, tmp_path):
    """In a process of its own, as the hub's cache folder is read at import."""
    commit, newer = "1f" * 20, "2e" * 20
    models = []
    for kind, prefix in (("clip", ""), ("open_clip_vit", "open_clip:hf-hub:"), ("timm:vit", "timm:hf-hub:")):
        repository = tmp_path / f"models--someone--tiny{len(models)}"
        (repository / "snapshots").mkdir(parents=True)
        files = copy_of(saved(kind), repository / "snapshots" / commit)
        (repository / "snapshots" / newer).mkdir()
        for file in files.glob("*.json"):  # a newer commit, of which the weights are not in the cache
            (repository / "snapshots" / newer / file.name).write_bytes(file.read_bytes())
        main = repository / "refs" / "main"
        main.parent.mkdir()
        main.write_text(commit)
        models += [f"{prefix}someone/tiny{len(models)}", saved(kind).spec, str(main)]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PINNED, commit, newer, *models]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_models_load_without_scikit_learn():
    program = (
        "import sys\n"
        "from sae_ray.encoders import load_encoder, load_preprocess\n"
        "from sae_ray.encoders.text import load_text_encoder\n"
        "from sae_ray.steering import load_llava\n"
        "for load, model in (\n"
        f"    (load_encoder, {f'{MODELS}/clip'!r}),\n"
        f"    (load_preprocess, {f'{MODELS}/clip'!r}),\n"
        f"    (load_text_encoder, {f'{MODELS}/clip'!r}),\n"
        f"    (load_encoder, {f'open_clip:local-dir:{MODELS}/judge'!r}),\n"
        f"    (load_llava, {f'{MODELS}/llava'!r}),\n"
        "):\n"
        "    load(model)\n"
        "    print(load.__name__, 'sklearn' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaders = ("load_encoder", "load_preprocess", "load_text_encoder", "load_encoder", "load_llava")
    assert done.stdout.splitlines() == [f"{name} False" for name in loaders]
