"""The next tokens of many answers at a time, with keys and values in memory of fixed size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

GRAIN = 256
"""Rows are as long as a multiple of this, so that they seldom have to be made longer."""
READ_TOKENS = 4096
"""Of prompts that are read at a time, unless one alone has more. A GPU is busy with fewer."""


def rounded(n_tokens: int) -> int:
    """Tokens that a row has for an answer of `n_tokens`, prompt included."""
    return -(-n_tokens // GRAIN) * GRAIN


def bytes_per_token(text_config: Any, dtype: torch.dtype) -> int:
    """Of keys and values in all layers of a language model, by transformers' configuration of it."""
    heads, dim = _heads(text_config)
    return 2 * text_config.num_hidden_layers * heads * dim * dtype.itemsize


def _heads(text_config: Any) -> tuple[int, int]:
    """How many heads keys and values have, and how wide one is."""
    n_heads = text_config.num_attention_heads
    dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // n_heads
    return getattr(text_config, "num_key_value_heads", None) or n_heads, dim


class Decoder:
    """A LLaVA's language model that generates several answers at once, one in each row of its cache.

    Args:
        model: transformers' `LlavaForConditionalGeneration`; its tower is not used.
        n_tokens: For how many tokens there is memory.
        most_rows: How many answers there may be.
    """

    def __init__(self, model: Any, n_tokens: int, most_rows: int):
        self._network, self._head = model.model.language_model, model.lm_head
        weight = model.get_input_embeddings().weight
        self._embed = model.get_input_embeddings()
        self._device, self._dtype = weight.device, weight.dtype
        self._text = model.config.text_config
        self.n_tokens, self.most_rows = n_tokens, most_rows
        self.lengths: list[int] = []
        """Tokens in each row."""
        self._row_length = 0
        heads, dim = _heads(self._text)
        layers = 2 * self._text.num_hidden_layers
        self._memory = torch.empty(layers, n_tokens * heads * dim, dtype=self._dtype, device=self._device)
        self._places = torch.zeros(most_rows, dtype=torch.int64, device=self._device)
        """Of the next token in each row."""

    def holds(self, n_tokens: int) -> bool:
        """Whether there is memory for an answer that has `n_tokens` in the end, prompt included."""
        return rounded(n_tokens) <= self.n_tokens

    def room(self, n_tokens: Sequence[int]) -> int:
        """How many of the first of these answers could join, each with as many tokens, prompt included."""
        length = self._row_length if self.lengths else GRAIN
        for joined, n in enumerate(n_tokens):
            length = max(length, rounded(n))
            rows = len(self.lengths) + joined + 1
            if rows > self.most_rows or rows * length > self.n_tokens:
                return joined
        return len(n_tokens)

    @torch.no_grad()
    def join(
        self, prompts: Sequence[Float[Tensor, "tokens hidden"]], n_new: Sequence[int]
    ) -> Float[Tensor, "prompts vocabulary"]:
        """Puts embedded prompts, each of which may grow by as many tokens, into new rows behind the others.

        Returns the logits of what follows each, in float32. Raises ValueError if they do not fit.
        """
        needed = rounded(max(len(prompt) + n for prompt, n in zip(prompts, n_new, strict=True)))
        length = max(needed, self._row_length if self.lengths else 0)
        rows = len(self.lengths) + len(prompts)
        if rows > self.most_rows or rows * length > self.n_tokens:
            raise ValueError(
                f"{rows} rows of {length} tokens do not fit into {self.n_tokens} and {self.most_rows} rows"
            )
        self._lengthen(length)
        found, start = [], 0
        while start < len(prompts):
            end = start + 1
            while end < len(prompts) and (end + 1 - start) * max(map(len, prompts[start : end + 1])) <= READ_TOKENS:
                end += 1
            found.append(self._read(prompts[start:end]))
            start = end
        return torch.cat(found)

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocabulary"]:
        """Adds a token to each row. Returns the logits of what follows, in float32."""
        n, seen = len(self.lengths), max(self.lengths) + 1
        places = self._places[:n]
        output = self._network(
            inputs_embeds=self._embed(tokens)[:, None],
            attention_mask=self._masks(places, seen),
            position_ids=places[:, None],
            past_key_values=_Written(self._rows(self._row_length)[:, :n, :, :seen], places),
            use_cache=True,
        )
        places += 1
        self.lengths = [length + 1 for length in self.lengths]
        return self._head(output.last_hidden_state[:, -1]).float()

    @torch.no_grad()
    def drop(self, row: int) -> None:
        """Drops an answer; the last row, if it is another one, takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            cache, length = self._rows(self._row_length), self.lengths[last]
            cache[:, row, :, :length] = cache[:, last, :, :length]
            cache[:, row, :, length:] = 0
            self._places[row] = self._places[last]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self._places[last] = 0

    def clear(self) -> None:
        """Drops all answers."""
        self.lengths = []
        self._places.zero_()

    def _rows(self, length: int) -> Float[Tensor, "keys_and_values rows heads length dim"]:
        """The memory as rows: of layer i keys at 2i and values at 2i + 1."""
        heads, dim = _heads(self._text)
        rows = self.n_tokens // length
        return self._memory[:, : rows * heads * length * dim].view(len(self._memory), rows, heads, length, dim)

    def _lengthen(self, length: int) -> None:
        """Makes the rows that long; keeps what is in them."""
        n, before = len(self.lengths), self._row_length
        self._row_length = length
        if n and length > before:
            for old, new in zip(self._rows(before), self._rows(length), strict=True):
                kept = old[:n].clone()
                new[:n, :, :before] = kept
                new[:n, :, before:] = 0

    def _read(self, prompts: Sequence[Float[Tensor, "tokens hidden"]]) -> Float[Tensor, "prompts vocabulary"]:
        from transformers import DynamicCache

        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        # Padding behind a prompt is never looked at, as no token sees a later one.
        output = self._network(
            inputs_embeds=pad_sequence(list(prompts), batch_first=True), past_key_values=DynamicCache(), use_cache=True
        )
        first = len(self.lengths)
        rows = slice(first, first + len(prompts))
        cache = self._rows(self._row_length)
        # What a mask hides counts with weight 0, so it must be finite: whatever was there before goes.
        cache[:, rows] = 0
        for number, layer in enumerate(output.past_key_values.layers):
            for place, new in enumerate((layer.keys, layer.values)):
                cache[2 * number + place, rows, :, : new.shape[2]] = new
        self._places[rows] = lengths
        self.lengths += [len(prompt) for prompt in prompts]
        last = output.last_hidden_state[torch.arange(len(prompts), device=self._device), lengths - 1]
        return self._head(last).float()

    def _masks(self, places: Int[Tensor, " rows"], seen: int) -> Any:
        """Added to the attention of the new token to every place, in the form that its kind of model takes."""
        ages = places[:, None] - torch.arange(seen, device=self._device)

        def mask(visible: Tensor) -> Float[Tensor, "rows 1 1 seen"]:
            hidden = torch.full(visible.shape, torch.finfo(self._dtype).min, dtype=self._dtype, device=self._device)
            return hidden.masked_fill(visible, 0)[:, None, None]

        window = getattr(self._text, "sliding_window", None)
        full = mask(ages >= 0)
        near = full if window is None else mask((ages >= 0) & (ages < window))
        if getattr(self._text, "layer_types", None):
            return {"full_attention": full, "sliding_attention": near}
        return near


class _Written:
    """What a model takes for its cache: a new token goes to its place in each row, where all before it are."""

    def __init__(self, cache: Float[Tensor, "keys_and_values rows heads seen dim"], places: Int[Tensor, " rows"]):
        self._cache, self._places = cache, places
        self._every = torch.arange(len(places), device=places.device)

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        both = self._cache[2 * layer], self._cache[2 * layer + 1]
        for whole, new in zip(both, (keys, values), strict=True):
            whole[self._every, :, self._places] = new[:, :, 0]
        return both


def greedily(
    model: Any,
    input_ids: Int[Tensor, "answers none"],
    logits_processor: Any,
    stopping_criteria: Any,
    *,
    decoder: Decoder,
    prompts: Sequence[Float[Tensor, "tokens hidden"]],
    **rest: Any,
) -> Int[Tensor, "answers new"]:
    """What transformers' `generate` runs in place of its own loop, given as `custom_generate`: it has prepared all that
    the model's generation configuration wants done to logits, and when it wants an answer to end.

    An answer that has ended is filled with the padding token until all have, if the model has one.
    """
    padding = rest["generation_config"].pad_token_id
    tokens, ended = input_ids, torch.zeros(len(prompts), dtype=torch.bool, device=input_ids.device)
    logits = decoder.join(prompts, [stopping_criteria.max_length - input_ids.shape[1]] * len(prompts))
    while True:
        new = logits_processor(tokens, logits).argmax(-1)
        if tokens.shape[1]:
            new = new.where(~ended, tokens[:, -1] if padding is None else padding)
        tokens = torch.cat([tokens, new[:, None]], dim=1)
        ended = ended | stopping_criteria(tokens, None)
        if ended.all():
            return tokens
        logits = decoder.step(new)
