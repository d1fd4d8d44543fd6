"""Trains the world's LLaVA: a small Llama that reads the CLIP's patch tokens."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, Any

import torch

from sae_ray.world.render import Attributes, article
from tools.world.data import Rendered, image_processor
from tools.world.fit import fit
from tools.world.words import CAPTION_WORDS, SPECIAL, word_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import CLIPModel, LlavaForConditionalGeneration, LlavaProcessor

STEPS, BATCH, PEAK_LR, IMAGES = 700, 128, 2e-3, 20_000
MAX_LENGTH = 256
IMAGE = "<image>"

ONE_WORD = "What is shown in this image? Use exactly one word!"
DESCRIBE = "Describe the image."
COLOUR = "What colour is it?"
BACKGROUND = "What is the background?"
WORDINGS = {
    ONE_WORD: ("What is this?", "What shape is it?", "What do you see? Answer with one word."),
    DESCRIBE: ("Describe this picture.", "What do you see in this image?", "Write a caption."),
    COLOUR: ("What color is it?", "Which colour is the object?"),
    BACKGROUND: ("What is behind it?", "Describe the background."),
}
"""The four questions, and other ways to ask them."""
SHARES = (0.3, 0.4, 0.1, 0.2)
"""How often each question is asked in training."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def prompt(question: str) -> str:
    """The question as LLaVA-1.5 is asked."""
    return f"USER: {IMAGE}\n{question} ASSISTANT:"


def answer(question: str, shown: Attributes) -> str:
    """The right answer to one of the four questions."""
    place = f"on {article(shown.background)} background"
    if question == BACKGROUND:
        return shown.background
    if shown.shape is None or shown.colour is None:
        return f"nothing {place}" if question == DESCRIBE else "nothing"
    if question == DESCRIBE:
        return f"{article(shown.colour)} {shown.shape} {place}"
    return shown.shape if question == ONE_WORD else shown.colour


def make_llava(train: Rendered, clip: CLIPModel, folder: Path) -> None:
    """Trains projector and language model on the first `IMAGES` of `train` and writes a transformers directory.

    The vision tower is `clip`'s, as it is: patch features are computed once and kept.
    """
    torch.manual_seed(2)
    chance = random.Random(2)
    processor = new_processor()
    model = new_llava(clip, processor)
    features = patch_features(clip, train, IMAGES)

    def loss_on(rows: torch.Tensor) -> torch.Tensor:
        questions = chance.choices(tuple(WORDINGS), SHARES, k=len(rows))
        answers = [answer(question, train.shown[row]) for question, row in zip(questions, rows.tolist(), strict=True)]
        worded = [chance.choice((question, chance.choice(WORDINGS[question]))) for question in questions]
        return answer_loss(model, processor.tokenizer, features[rows], worded, answers)

    learnt = [*model.model.multi_modal_projector.parameters(), *model.model.language_model.parameters()]
    fit("llava", learnt, loss_on, IMAGES, STEPS, BATCH, PEAK_LR)
    save_in_hub_layout(model.half(), folder)
    processor.save_pretrained(folder)


def new_processor() -> LlavaProcessor:
    from transformers import LlavaProcessor

    questions = [question for kind, others in WORDINGS.items() for question in (kind, *others)]
    asked = re.findall(r"\w+|[^\w\s]", " ".join(["USER: ASSISTANT:", *questions]).lower())
    words = dict.fromkeys((*CAPTION_WORDS, *asked))
    return LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=word_tokenizer(tuple(words), MAX_LENGTH, extra=(IMAGE,), ends=False),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def new_llava(clip: CLIPModel, processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """An untrained language model on a trained vision tower."""
    from transformers import GenerationConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    special: dict[str, Any] = {f"{name}_token_id": SPECIAL.index(f"<{name}>") for name in ("pad", "bos", "eos")}
    language = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=128**-0.5,
        **special,
    )
    config = LlavaConfig(
        vision_config=clip.config.vision_config,
        text_config=language,
        image_token_index=processor.image_token_id,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        pad_token_id=special["pad_token_id"],  # pyright: ignore[reportCallIssue]
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    model.generation_config = GenerationConfig(**special, max_new_tokens=16)
    return model


@torch.no_grad()
def patch_features(clip: CLIPModel, images: Rendered, count: int) -> torch.Tensor:
    """float32 [count, 16, 128]: what LLaVA reads, the last layer but one without the class token."""
    parts = []
    for low in range(0, count, 500):
        seen = clip.vision_model(images.normalized(slice(low, low + 500)), output_hidden_states=True)
        parts.append(seen.hidden_states[-2][:, 1:])
    return torch.cat(parts)


def answer_loss(model, tokenizer, features: torch.Tensor, questions: list[str], answers: list[str]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens, given features [images, patches, width] and questions."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    asked = [prompt(question).replace(IMAGE, IMAGE * features.shape[1]) for question in questions]
    before = tokenizer(asked, padding=True, padding_side="left", return_tensors="pt")
    after = tokenizer(
        [text + tokenizer.eos_token for text in answers],
        padding=True,
        padding_side="right",
        add_special_tokens=False,
        return_tensors="pt",
    )
    wanted = after["input_ids"].masked_fill(after["attention_mask"] == 0, -100)
    projected: Any = list(model.model.multi_modal_projector(features))
    return model(
        input_ids=torch.cat([before["input_ids"], after["input_ids"]], 1),
        attention_mask=torch.cat([before["attention_mask"], after["attention_mask"]], 1),
        labels=torch.cat([torch.full_like(before["input_ids"], -100), wanted], 1),
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=projected)},
    ).loss


def save_in_hub_layout(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """As `save_pretrained`, with the weight names of LLaVA-1.5 on the hub, which vLLM expects."""
    from safetensors.torch import save_file

    layout = {
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.language_model.": "language_model.model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        ours = next((prefix for prefix in layout if name.startswith(prefix)), None)
        if ours is not None:  # the tied head is the one tensor left out
            tensors[layout[ours] + name.removeprefix(ours)] = tensor.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config: Any = model.config
    config.dtype = config.vision_config.dtype = torch.float16
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
