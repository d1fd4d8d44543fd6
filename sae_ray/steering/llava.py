"""A LLaVA whose vision tower can be edited: image, edits at the layer that the language model reads, answer."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from sae_ray.encoders.base import placement
from sae_ray.encoders.hub import Source, check_tokenizer, find, load_weights, refusing
from sae_ray.encoders.info import EncoderInfo
from sae_ray.encoders.resizing import WHOLE
from sae_ray.encoders.transformers_models import blocks_of, describe_found, resizing, scale_of
from sae_ray.errors import UsageError
from sae_ray.steering.config import MAX_NEW_TOKENS
from sae_ray.steering.decoding import Decoder, greedily, rounded
from sae_ray.steering.info import LlavaInfo
from sae_ray.steering.interventions import Intervention, TowerEdit, edit_each

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float, Int, UInt8
    from PIL import Image
    from torch import Tensor

    Picture = Image.Image | UInt8[np.ndarray, "3 height width"]
    """RGB, of any size; or as the tower's own `preprocess` resizes and crops it. A region is one of what is given."""

FORMS = (
    "a LLaVA is named by a directory in the transformers format (a path, or a URI such as s3://bucket/folder) or a "
    "model id on the Hugging Face hub"
)


def load_llava(model: str | Path, revision: str | None = None, device: str = "cpu", dtype: str = "float32") -> Llava:
    """Loads a `LlavaForConditionalGeneration` with a CLIP, SigLIP, DINOv2 or ViT tower.

    Args:
        model: A directory in the transformers format (a path, or a URI such as `s3://bucket/folder`), or a model id on
            the Hugging Face hub.
        revision: Pins the weights: a commit, or the digest of a directory (`Llava.info.revision`).
        device: A torch device. `meta` checks all files as loading does, but of the weights reads the headers alone.
        dtype: What it computes in: `float32`, `bfloat16` or `float16`.

    Raises:
        UsageError: There is no such model, it is not a LLaVA of this kind, or it has no processor; its weights are
            missing, do not fit its configuration or are not safetensors; its language model reads several layers at
            once; or the device or dtype is not available.
    """
    target, kind = placement(device, dtype)
    model = str(model)
    source = find(model, revision, FORMS)
    info = _describe(model, source)
    from transformers import AutoProcessor

    with refusing(source.model, FORMS, of_hub=source.commit is not None):
        processor: Any = AutoProcessor.from_pretrained(source.path, revision=source.commit, backend="pil")
    if not hasattr(processor, "image_processor"):
        # transformers returns the tokenizer alone.
        raise UsageError(f"{source.model} has no processor of images and texts; add processor_config.json ({FORMS})")
    check_tokenizer(source.model, processor.tokenizer, FORMS)
    network = load_weights(source, "LlavaForConditionalGeneration", target, kind, FORMS)
    return Llava(info.tower, info.layer, network, processor)


def describe_llava(model: str, revision: str | None = None) -> LlavaInfo:
    """What a LLaVA is, from its configuration alone.

    Raises:
        UsageError: There is no such model, it is not a LLaVA of this kind, or its language model reads several
            layers.
    """
    return _describe(model, find(model, revision, FORMS))


def _describe(model: str, source: Source) -> LlavaInfo:
    if source.config.model_type != "llava":
        raise UsageError(f"{source.model} is of the model type {source.config.model_type}, not llava; {FORMS}")
    tower = describe_found(model, source)
    layer = _block_read(source.model, source.config.vision_feature_layer, tower.n_layers)
    # transformers drops token 0, whether or not it is a CLS token.
    drops_first = source.config.vision_feature_select_strategy == "default"
    return LlavaInfo(tower, layer, tower.n_tokens - drops_first)


def _block_read(model: str, feature_layer: int | list[int], n_layers: int) -> int:
    """The block named by `vision_feature_layer`, which indexes hidden states: the first of those is block 0's input."""
    layers = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    if len(layers) != 1:
        raise UsageError(
            f"vision_feature_layer of {model} is {layers}: its language model reads "
            f"{'several layers' if layers else 'no layer'}; steering takes a LLaVA that reads one"
        )
    [layer] = layers
    block = layer - 1 if layer >= 0 else n_layers + layer
    if not 0 <= block < n_layers:
        raise UsageError(
            f"vision_feature_layer of {model} is {layer}, which is not the output of a block; its tower has "
            f"{n_layers}, named 1 to {n_layers} or -{n_layers} to -1"
        )
    return block


class Llava:
    """A LLaVA that answers questions about images, each of which may be edited inside the vision tower."""

    def __init__(self, info: EncoderInfo, layer: int, model: Any, processor: Any):
        self.info = info
        """Of the vision tower."""
        self.layer = layer
        """The tower's block, from 0, whose output the language model reads and interventions edit."""
        self.model = model
        self.processor = processor
        self.device, self.dtype = model.device, model.dtype
        self._block: nn.Module = blocks_of(model.model.vision_tower)[layer]
        self._resize = resizing(processor.image_processor)
        self._rescale, *scale = scale_of(info.model, processor.image_processor)
        self._mean, self._std = (torch.tensor(of, device=self.device).view(3, 1, 1) for of in scale)
        self._tower_in_use = threading.Lock()
        self._speaking = threading.Lock()
        self._decoder: Decoder | None = None

    @property
    def width(self) -> int:
        """Of the tower's residual stream; the `d_in` that an SAE must have."""
        assert self.info.residual_width is not None, "a LLaVA's tower is a transformer"
        return self.info.residual_width

    @property
    def n_tokens(self) -> int:
        """Tokens per image that an edit sees, CLS included where there is one."""
        return self.info.n_tokens

    def white(self) -> Image.Image:
        """The image of which nothing can be said, as large as the tower reads it."""
        from PIL import Image

        height, width = self.info.image_size
        return Image.new("RGB", (width, height), "white")

    def answer(
        self,
        image: Image.Image,
        prompt: str,
        interventions: Sequence[TowerEdit] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> str:
        """The greedy answer to a question about one image.

        Args:
            image: RGB, of any size.
            prompt: A plain question; the model's chat template goes around it.
            interventions: Applied in this order; none leaves the model as it is.

        Raises:
            UsageError: An intervention does not fit the tower, or the prompt does not fit the language model.
        """
        return self.answers([image], [prompt], [interventions], max_new_tokens)[0]

    def answers(
        self,
        images: Sequence[Picture],
        prompts: Sequence[str],
        interventions: Sequence[Sequence[TowerEdit]],
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> list[str]:
        """As `answer`, for a batch: one image, prompt and list of interventions per answer."""
        return self.generate(self.image_embeddings(images, interventions), prompts, max_new_tokens)

    @torch.no_grad()
    def image_embeddings(
        self, images: Sequence[Picture], edits: Sequence[Sequence[TowerEdit]]
    ) -> list[Float[Tensor, "patches hidden"]]:
        """What the language model gets to see of each image: vision tower, edits of that image, projector.

        Args:
            images: One may come several times, each time with other edits: what lies below the edited block is then
                computed once.
            edits: Per image.

        Raises:
            UsageError: An edit does not fit the tower, or its result is not finite.
        """
        if len(images) != len(edits):
            raise ValueError(f"{len(images)} images came with edits for {len(edits)}")
        if not images:
            return []
        for edit in (edit for chain in edits for edit in chain if isinstance(edit, Intervention)):
            self._check(edit)
        edits = [[self._at(image, edit) for edit in chain] for image, chain in zip(images, edits, strict=True)]
        unlike = {id(image): image for image in images}
        places = [list(unlike).index(id(image)) for image in images]
        config = self.model.config
        with self._edited_by(edits, places):
            features = self.model.get_image_features(
                pixel_values=self._pixels(list(unlike.values())),
                vision_feature_layer=config.vision_feature_layer,
                vision_feature_select_strategy=config.vision_feature_select_strategy,
            )
        return list(features.pooler_output)

    @torch.no_grad()
    def generate(
        self,
        embeddings: Sequence[Tensor | Sequence[Tensor]],
        prompts: Sequence[str],
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> list[str]:
        """Greedy answers of the language model alone.

        Args:
            embeddings: Per prompt, those of its image ([patches, hidden], from `image_embeddings`) or of several.
            prompts: Plain questions.

        Raises:
            UsageError: A prompt does not fit the language model.
        """
        if len(embeddings) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts came with the embeddings of {len(embeddings)}")
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        if not prompts:
            return []
        asked = functools.cache(self._asked)  # often the same question about many images
        shown = [[one] if isinstance(one, torch.Tensor) else one for one in embeddings]
        inputs = [
            self._embedded(asked(prompt, *map(len, images)), images)
            for prompt, images in zip(prompts, shown, strict=True)
        ]
        longest = max(len(row) for row in inputs) + max_new_tokens
        context = self.model.config.text_config.max_position_embeddings
        if longest > context:
            raise UsageError(
                f"the longest prompt with its images and max_new_tokens = {max_new_tokens} takes {longest} tokens, but "
                f"the language model has {context}; shorten the prompt or ask for fewer"
            )
        from transformers import GenerationConfig

        with self._speaking:
            decoder = self._decoder_for(len(inputs), longest)
            tokens = self.model.generate(
                inputs_embeds=pad_sequence(inputs, batch_first=True),
                # As an object: with arguments, transformers would make a model's default configuration at each call.
                generation_config=GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False),
                custom_generate=functools.partial(greedily, decoder=decoder, prompts=inputs),
            )
        return [text.strip() for text in self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def _decoder_for(self, n: int, longest: int) -> Decoder:
        decoder, needed = self._decoder, n * rounded(longest)
        if decoder is None or decoder.most_rows < n or decoder.n_tokens < needed:
            decoder = self._decoder = None  # its memory is free before there is another
            decoder = self._decoder = Decoder(self.model, needed, n)
        decoder.clear()
        return decoder

    def prompt(self, question: str, n_images: int = 1) -> str:
        """The question as the model is asked: in its chat template, or in LLaVA-1.5's form where it has none.

        Raises UsageError when the question contains the image token, which stands for an image.
        """
        token = self.processor.image_token
        if token in question:
            raise UsageError(
                f"the prompt contains {token}, which stands for the image and is put there for you; drop it"
            )
        if self.processor.chat_template is None:
            places = f"{token}\n" * n_images
            return f"USER: {places}{question} ASSISTANT:"
        content = [*[{"type": "image"}] * n_images, {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )

    def token_ids(self, prompt: str) -> Int[Tensor, " ids"]:
        """The tokens of a whole prompt: with the tokenizer's own beginning, unless the prompt begins with it."""
        tokenizer = self.processor.tokenizer
        starts_itself = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        ids = tokenizer(prompt, add_special_tokens=not starts_itself, return_tensors="pt")["input_ids"][0]
        return ids.to(self.device)

    def _embedded(self, ids: Int[Tensor, " ids"], images: Sequence[Tensor]) -> Float[Tensor, "tokens hidden"]:
        """A prompt as the language model reads it, the images in their places."""
        embedded = self.model.get_input_embeddings()(ids)
        embedded[ids == self.processor.image_token_id] = torch.cat(list(images)).to(embedded)
        return embedded

    def _asked(self, question: str, *patches: int) -> Int[Tensor, " ids"]:
        """Of the question about images of so many patches, an image token for each patch."""
        token = self.processor.image_token
        before, *between = self.prompt(question, len(patches)).split(token)
        return self.token_ids(before + "".join(token * n + part for n, part in zip(patches, between, strict=True)))

    def _pixels(self, images: Sequence[Picture]) -> Float[Tensor, "n 3 height width"]:
        """The same bits that the model's own processor makes of them; scaled on the device."""
        resized = np.stack([one if isinstance(one, np.ndarray) else self._resize(one) for one in images])
        scaled = torch.from_numpy(resized).to(self.device).contiguous().double().mul_(self._rescale).float()
        return scaled.sub_(self._mean).div_(self._std).to(self.dtype)

    def _at(self, image: Picture, edit: TowerEdit) -> TowerEdit:
        """The edit with the tokens of its region in this image."""
        if not isinstance(edit, Intervention) or edit.region is None:
            return edit
        return edit.at(WHOLE if isinstance(image, np.ndarray) else self._resize.view(image.size), self.info)

    def _check(self, edit: Intervention) -> None:
        if edit.sae.d_in != self.width:
            raise UsageError(
                f"the SAE has d_in = {edit.sae.d_in}, but the vision tower of {self.info.name} is {self.width} wide; "
                f"take one that was trained there, at site layer{self.layer}:all or layer{self.layer}:random:2"
            )
        if edit.tokens is not None and max(edit.tokens) >= self.n_tokens:
            raise UsageError(
                f"tokens has {max(edit.tokens)}, but {self.info.name} has tokens 0 to {self.n_tokens - 1} per image"
            )

    @contextlib.contextmanager
    def _edited_by(self, edits: Sequence[Sequence[TowerEdit]], places: Sequence[int]) -> Iterator[None]:
        """While it lasts, the block gives for each of `edits` the image at its place, edited; other threads wait.

        Without any edit, and with each image once, nothing is hooked.
        """

        def hook(module: nn.Module, args: object, stream: Float[Tensor, "n tokens d_in"]) -> Tensor:
            edited = _edited(edits, [stream[place] for place in places])
            if len(edited) > len(stream):
                return torch.stack(edited)
            # The same layout in memory: without an edit, the same bits.
            return torch.stack(edited, out=torch.empty_like(stream))

        with self._tower_in_use, contextlib.ExitStack() as hooks:
            if any(edits) or len(set(places)) < len(places):
                # Hooks that transformers has put on the block hand its output to LLaVA; this one must come before them.
                hooks.callback(self._block.register_forward_hook(hook, prepend=True).remove)
            yield


def _edited(
    chains: Sequence[Sequence[TowerEdit]], images: list[Float[Tensor, "tokens d_in"]]
) -> list[Float[Tensor, "tokens d_in"]]:
    """Each image after its own edits: the first ones of all, then the second ones."""
    for turn in range(max(map(len, chains))):
        places = [place for place, chain in enumerate(chains) if turn < len(chain)]
        results = _applied([chains[place][turn] for place in places], [images[place] for place in places])
        if not torch.stack(results).isfinite().all():
            dtype = str(results[0].dtype)[6:]
            raise UsageError(f"the edited activations are not finite in {dtype}; lower the strength")
        for place, result in zip(places, results, strict=True):
            images[place] = result
    return images


def _applied(edits: Sequence[TowerEdit], images: Sequence[Float[Tensor, "tokens d_in"]]) -> list[Tensor]:
    interventions = {place: edit for place, edit in enumerate(edits) if isinstance(edit, Intervention)}
    together = edit_each(list(interventions.values()), [images[place] for place in interventions])
    edited = dict(zip(interventions, together, strict=True))
    results = []
    for place, (edit, x) in enumerate(zip(edits, images, strict=True)):
        result = edited[place] if place in edited else edit(x).to(x)
        if result.shape != x.shape:
            raise ValueError(f"an edit made {list(result.shape)} of tokens {list(x.shape)}; it must keep their shape")
        results.append(result)
    return results
