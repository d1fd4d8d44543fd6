"""Word-level tokenizers in the format of transformers, and the words of the captions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_ray.world.render import BACKGROUNDS, COLOURS, SHAPES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
"""Ids 0 to 3. The end must not have id 2: transformers' CLIP then pools the text tower at the largest id of the
sequence, as the first release of CLIP did, instead of at the end token."""

CAPTION_WORDS = (
    *(*SHAPES, *COLOURS, *BACKGROUNDS),
    *("a", "an", "photo", "of", "on", "background", "blank", "nothing", "object", "noisy"),
)


def word_tokenizer(
    words: tuple[str, ...], max_length: int, extra: tuple[str, ...] = (), ends: bool = True
) -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark, ignoring case. Texts start with <bos> and, if `ends`, end with <eos>.

    `extra` are special tokens in addition to the usual four.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pad, unknown, begin, end = SPECIAL
    ids = {word: i for i, word in enumerate((*SPECIAL, *words, *extra))}
    backend = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    backend.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{begin} $A {end}" if ends else f"{begin} $A", special_tokens=[(begin, ids[begin]), (end, ids[end])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        additional_special_tokens=list(extra),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
