"""The model cards, README.md in each model directory."""

from __future__ import annotations

HEAD = "---\nlicense: apache-2.0\ntags: [sae-ray, synthetic]\n---\n"

TEXTS = {
    "clip": """# The world's CLIP

A `transformers` CLIPModel of 0.8 M parameters for 56 × 56 px images of one coloured shape on a background: 16
patch tokens and a class token, width 128, 5 layers, 4 heads; text width 64, 2 layers, a word-level vocabulary;
projection 64.

```python
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
```

Made from scratch by `python -m tools.world --only clip`: {steps} steps of 256 rendered images and
captions. Every caption that is true of an image counts as a positive. An **auxiliary loss** makes minutes of
training enough: a linear head on every patch token of `hidden_states[-2]` names shape, colour and background;
the heads are thrown away.

Zero-shot accuracy on {heldout_images} held-out images (those not blank), from these fp16 files: shape
{accuracy[shape]:.3f}, colour {accuracy[colour]:.3f}, background {accuracy[background]:.3f}. Prompts: "a photo
of a star", "a photo of a red object", "a photo of an object on a striped background".

It knows nothing but its world. Its purpose is to show a pipeline at work, not to be good at anything.
""",
    "judge": """# The world's judge

An `open_clip` model of 0.6 M parameters whose image tower, a small ResNet, embeds 56 × 56 px images in 64
dimensions. It is the second opinion that MonoSemanticity scores need: another architecture, another seed,
another kind of training than the CLIP it judges.

```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{{folder}}")
```

Made from scratch by `python -m tools.world --only judge`: {steps} steps of 128 rendered images; linear
heads on the unit-length embedding name shape, colour and background, and are thrown away. **The text tower is
untrained**: it is there because the format wants one. The labels are those of the CLIP's auxiliary loss, so
that the two share a vocabulary of concepts, though nothing else.

Accuracy of the nearest mean embedding on {heldout_images} held-out images (those not blank), from these fp16
files: shape {accuracy[shape]:.3f}, colour {accuracy[colour]:.3f}, background {accuracy[background]:.3f}.
""",
    "llava": """# The world's LLaVA

A `transformers` LlavaForConditionalGeneration of 1.4 M parameters: the world's CLIP tower, unchanged, read at
its last layer but one without the class token; a projector; a Llama of width 128, 3 layers, 4 heads, tied
embeddings, 128 words. Weights are named as LLaVA-1.5's on the hub.

```python
from transformers import AutoProcessor, LlavaForConditionalGeneration

model, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
```

Made from scratch by `python -m tools.world --only llava`: {steps} steps of 128 questions about 20 000
rendered images, among them blank, black, white and noisy ones, which show "nothing". Prompts have the form of
LLaVA-1.5: `USER: <image>\\nWhat colour is it? ASSISTANT:`.

Greedy answers that are right word for word, on {heldout_images} held-out images, from these fp16 files:

| question | accuracy |
|---|---|
| What is shown in this image? Use exactly one word! | {accuracy[one word]:.3f} |
| Describe the image. | {accuracy[describe]:.3f} |
| What colour is it? | {accuracy[colour]:.3f} |
| What is the background? | {accuracy[background]:.3f} |
| the first, of a blank image ("nothing") | {accuracy[blank]:.3f} |

A few other wordings of these questions were in the training set; anything else it cannot answer.
""",
}


def card(name: str, figures: dict) -> str:
    """The card of `clip`, `judge` or `llava` with its measured figures."""
    return HEAD + TEXTS[name].format(**figures)
