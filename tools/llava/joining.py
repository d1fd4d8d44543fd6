"""A vision tower and a language model, as they are, joined to a LLaVA by a projector that knows nothing yet."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_ray.encoders.hub import check_tokenizer, find, refusing
from sae_ray.encoders.info import EncoderInfo
from sae_ray.encoders.sources import local_directory
from sae_ray.encoders.transformers_models import describe
from sae_ray.errors import UsageError
from sae_ray.steering.llava import load_llava

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

IMAGE = "<image>"
TOWER_FORMS = (
    "a vision tower is a transformer of the transformers library, named by a directory or a model id on the Hugging "
    "Face hub: CLIP, SigLIP, DINOv2 or ViT"
)
LANGUAGE_FORMS = (
    "a language model is a directory in the transformers format, a model id on the Hugging Face hub, or either one "
    "followed by /FILE.gguf"
)

FLATTEN = """\
{%- set ns = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}{%- set ns.messages = ns.messages + [message] -%}
{%- else -%}
{%- set text = namespace(value='') -%}
{%- for part in message['content'] -%}
{%- set text.value = text.value + ('IMAGE_TOKEN\\n' if part['type'] == 'image' else part['text']) -%}
{%- endfor -%}
{%- set ns.messages = ns.messages + [dict(message, content=text.value)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = ns.messages -%}
"""
"""Before the chat template of a language model, whose messages are texts: LLaVA's are lists of images and texts."""


class Parts(NamedTuple):
    """What a LLaVA is joined from."""

    tower: str
    """The vision tower: a directory or a model id."""
    language: str
    """The language model: a directory or a model id, perhaps followed by `/FILE.gguf`."""
    layer: int = -2
    """Which hidden state of the tower the language model reads: -1 is the output of its last block."""
    image_size: int | None = None
    """Side of the images in pixels, for towers that read any size; None for the tower's own."""
    with_cls: bool = False
    """Whether the language model reads the CLS token, too."""
    tower_revision: str | None = None
    language_revision: str | None = None


def join(parts: Parts, folder: Path) -> None:
    """Writes the LLaVA to a directory that transformers and `load_llava` open. Each part keeps its precision.

    The projector is random. The `<image>` token gets a place in the vocabulary if it has none.

    Raises:
        UsageError: A part is missing or cannot be joined: it is no tower of a known family, cannot read images of this
            size, has no such layer; the language model has no chat template, or does more than LLaVA to its outputs.
    """
    source = find(parts.tower, parts.tower_revision, TOWER_FORMS)
    info = describe(parts.tower, parts.tower_revision)
    if info.n_registers:
        raise UsageError(
            f"{info.name} has {info.n_registers} register tokens, which a LLaVA would read as parts of the image; "
            f"choose one without ({TOWER_FORMS})"
        )
    tokenizer, language = _language_model(parts.language, parts.language_revision)
    processor = _processor(source, info, tokenizer, parts)
    language = _with_image_token(language, processor.image_token_id)
    with refusing(parts.tower, TOWER_FORMS, of_hub=source.commit is not None):
        from transformers import AutoModel

        whole: Any = AutoModel.from_pretrained(source.path, revision=source.commit, dtype="auto", use_safetensors=True)
    model = _joined(getattr(whole, "vision_model", whole), language, processor, parts)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    load_llava(str(folder), device="meta")  # refuses what would not open later


def _language_model(language: str, revision: str | None) -> tuple[Any, Any]:
    """Tokenizer and model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, _, file = language.rpartition("/") if language.endswith(".gguf") else (language, "", None)
    settings: dict[str, Any] = {"revision": revision, "gguf_file": file}
    if file and find_spec("gguf") is None:
        raise UsageError(f"{language} needs the package gguf, which is not installed; pip install 'sae-ray[gguf]'")
    directory = local_directory(place, None, LANGUAGE_FORMS)
    if file and directory and not (directory / file).is_file():
        raise UsageError(f"there is no file {language}; {LANGUAGE_FORMS}")
    with refusing(language, LANGUAGE_FORMS, of_hub=directory is None):
        tokenizer = AutoTokenizer.from_pretrained(directory or place, **settings)
        # Of a GGUF file four or eight bits per weight, which float16 holds.
        dtype = torch.float16 if file else "auto"
        safe = None if file else True  # pickles are never read
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory or place, dtype=dtype, use_safetensors=safe, **settings
        )
    check_tokenizer(language, tokenizer, LANGUAGE_FORMS)
    if not tokenizer.chat_template:
        raise UsageError(
            f"{language} has no chat template, so it cannot be asked questions; take its variant that follows "
            "instructions, or put a chat_template.jinja beside its tokenizer"
        )
    return tokenizer, model


def _processor(source: Any, info: EncoderInfo, tokenizer: Any, parts: Parts) -> LlavaProcessor:
    from transformers import AutoImageProcessor, LlavaProcessor

    with refusing(parts.tower, TOWER_FORMS, of_hub=source.commit is not None):
        images: Any = AutoImageProcessor.from_pretrained(source.path, revision=source.commit, backend="pil")
    vision = getattr(source.config, "vision_config", source.config)
    if parts.image_size is not None:
        if parts.image_size < 1 or parts.image_size % vision.patch_size:
            raise UsageError(
                f"image_size = {parts.image_size}: the patches of {info.name} are {vision.patch_size} pixels wide; "
                f"choose a multiple, such as {max(1, round(parts.image_size / vision.patch_size)) * vision.patch_size}"
            )
        _resize(images, parts.image_size / info.image_size[0], parts.image_size)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    template = FLATTEN.replace("IMAGE_TOKEN", IMAGE) + tokenizer.get_chat_template()
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=_strategy(info, parts),
        num_additional_image_tokens=int(info.has_cls),
        image_token=IMAGE,
        chat_template=template,
    )


def _strategy(info: EncoderInfo, parts: Parts) -> str:
    """`default` drops the first token."""
    return "default" if info.has_cls and not parts.with_cls else "full"


def _resize(images: Any, ratio: float, side: int) -> None:
    """Makes an image processor yield squares of another size, cut from the same part of an image."""
    if images.size.shortest_edge:
        images.size = {"shortest_edge": round(images.size.shortest_edge * ratio)}
    else:
        images.size = {"height": side, "width": side}
    if images.do_center_crop:
        images.crop_size = {"height": side, "width": side}


def _with_image_token(language: Any, image_token_id: int) -> Any:
    """The language model with a row for the image token, which it neither reads nor writes."""
    embeddings = language.get_input_embeddings().weight
    before = len(embeddings)
    if image_token_id >= before:
        means = [one.weight.float().mean(0) for one in _tables(language)]
        language.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
        with torch.no_grad():
            # Words that no text has: their logits are the mean of all, which is never the largest.
            for table, mean in zip(_tables(language), means, strict=True):
                table.weight[before:] = mean.to(table.weight)
    return language


def _tables(language: Any) -> list[Any]:
    return [language.get_input_embeddings(), language.get_output_embeddings()]


def _joined(tower: Any, language: Any, processor: LlavaProcessor, parts: Parts) -> LlavaForConditionalGeneration:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = type(language.config).from_dict(language.config.to_dict())
    for name in ("quantization_config", "_pre_quantization_dtype"):  # the weights of a GGUF file are whole by now
        if hasattr(text, name):
            delattr(text, name)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=processor.image_token_id,
        vision_feature_layer=parts.layer,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    head, decoder = language.get_output_embeddings(), language.base_model
    if type(decoder) is not type(model.model.language_model) or type(tower) is not type(model.model.vision_tower):
        raise UsageError(
            f"{parts.tower} and {parts.language} cannot be joined: LLaVA wants a "
            f"{type(model.model.vision_tower).__name__} and a {type(model.model.language_model).__name__}, these are "
            f"a {type(tower).__name__} and a {type(decoder).__name__}"
        )
    model.model.vision_tower, model.model.language_model, model.lm_head = tower, decoder, head
    projector = model.model.multi_modal_projector.to_empty(device="cpu").to(head.weight.dtype)
    for one in (projector.linear_1, projector.linear_2):
        one.reset_parameters()
    model.generation_config = language.generation_config
    _check_head(model, language, parts.language)
    return model.eval()


@torch.no_grad()
def _check_head(model: Any, language: Any, name: str) -> None:
    """Refuses a language model that makes its logits otherwise than LLaVA: scaled, capped or with a bias."""
    ids = torch.arange(1, 5)[None]
    theirs = language(input_ids=ids).logits.float()
    ours = model.lm_head(model.model.language_model(input_ids=ids).last_hidden_state).float()
    if getattr(model.lm_head, "bias", None) is not None or not torch.allclose(theirs, ours, rtol=1e-3, atol=1e-3):
        raise UsageError(
            f"{name} does more to its last hidden state than LLaVA's head, which multiplies it with a matrix; choose a "
            "language model without a bias, scaling or capping of logits, such as a Llama, Mistral or Qwen"
        )
