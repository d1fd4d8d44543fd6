"""Converts messages to tokens, and tokens to text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

from jinja2 import TemplateError

from sae_ray.encoders.hub import find
from sae_ray.steering.llava import FORMS, describe_llava

from .errors import invalid
from .schemas import Message

LONGEST_TOKEN = 16
"""Characters per token that no normal text reaches on average. Longer texts are rejected before they are tokenized."""


class Prompt(NamedTuple):
    """A conversation as input of a language engine."""

    tokens: tuple[int, ...]
    """With one image token per image."""
    length: int
    """Number of tokens once each image token is replaced by the image's patches."""
    goes_on: bool = False
    """Whether the answer goes on where the last message ends."""


class Turn(NamedTuple):
    """What one side says before the other one does."""

    role: str
    text: str
    n_images: int


def turns(messages: Sequence[Message]) -> list[Turn]:
    """The turns of a conversation: neighbouring messages of one role are one. Developers speak as the system does."""
    found = []
    for role, of_role in groupby(messages, lambda one: "system" if one.role == "developer" else one.role):
        said = list(of_role)
        text = "\n".join(one.text for one in said if one.text)
        found.append(Turn(role, text, sum(one.n_images for one in said)))
    return found


class Tokenizer:
    """A LLaVA's tokenizer and chat template, without its weights."""

    def __init__(self, model: str, revision: str | None, context: int | None = None):
        """`context`: tokens of the longest request, at most those that the language model takes."""
        from transformers import AutoProcessor

        info = describe_llava(model, revision)
        source = find(model, info.tower.revision, FORMS)
        processor: Any = AutoProcessor.from_pretrained(source.path, revision=source.commit, backend="pil")
        self.processor, self.tokenizer = processor, processor.tokenizer
        text: Any = source.config.text_config
        self.context: int = min(context or text.max_position_embeddings, text.max_position_embeddings)
        self.n_image_tokens = info.n_image_tokens

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """The conversation as a prompt. In each turn the images come first, as LLaVA was trained. If the last turn is
        the assistant's and says something, the prompt ends with it, so that the answer goes on there.

        Raises ApiError for a text that contains the image token or is far too long for the model, and for a
        conversation that the model's chat template refuses.
        """
        n_characters, most = sum(len(message.text) for message in messages), LONGEST_TOKEN * self.context
        if n_characters > most:
            raise invalid(f"the messages have {n_characters:,} characters; send at most {most:,}", "messages")
        image = self.processor.image_token
        for place, message in enumerate(messages):
            if image in message.text:
                raise invalid(
                    f"the text contains {image}, which the server inserts for each image; remove it",
                    f"messages.{place}.content",
                )
        shown = turns(messages)
        if len(shown) > 1 and shown[-1].role == "assistant" and not shown[-1].text:
            shown.pop()
        goes_on = shown[-1].role == "assistant" and bool(shown[-1].text)
        text = self._text(shown, goes_on)
        starts_itself = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        tokens = tuple(self.tokenizer(text, add_special_tokens=not starts_itself)["input_ids"])
        n_images = sum(turn.n_images for turn in shown)
        return Prompt(tokens, len(tokens) + n_images * (self.n_image_tokens - 1), goes_on)

    def _text(self, shown: Sequence[Turn], goes_on: bool) -> str:
        if self.processor.chat_template is None:
            return " ".join([*(self._plain(turn) for turn in shown), *([] if goes_on else ["ASSISTANT:"])])
        chat = [
            {
                "role": turn.role,
                "content": [*[{"type": "image"}] * turn.n_images, {"type": "text", "text": turn.text}],
            }
            for turn in shown
        ]
        try:
            return self.processor.apply_chat_template(
                chat, add_generation_prompt=not goes_on, continue_final_message=goes_on, tokenize=False
            )
        except TemplateError as error:
            raise invalid(f"the model's chat template refuses this conversation: {error}", "messages") from error
        except ValueError as error:
            if not goes_on:
                raise
            message = "the model's chat template cannot go on after a message of the assistant; end with the user's"
            raise invalid(message, "messages") from error

    def _plain(self, turn: Turn) -> str:
        """LLaVA-1.5's format."""
        if turn.role == "system":
            return turn.text
        places = f"{self.processor.image_token}\n" * turn.n_images
        return f"{turn.role.upper()}: {places}{turn.text}"

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    @lru_cache(maxsize=4096)  # noqa: B019  # a replica has one tokenizer, as long as it lives
    def piece(self, token: int) -> str:
        """What a token adds to a text. For a part of a character it contains U+FFFD."""
        if token in self.tokenizer.all_special_ids:
            return self.tokenizer.convert_ids_to_tokens(token)
        # Decoded behind itself, since a tokenizer may decode a token differently at the start of a text.
        return self.decode([token, token])[len(self.decode([token])) :]


class TextStream:
    """Decodes the tokens of an answer as they arrive. The pieces add up to the decoded answer, stripped of white space
    at both ends and cut before the first stop string. Text that a later token may still change is held back.

    An answer that goes on after other tokens keeps the white space that separates it from them.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), after: Sequence[int] = ()):
        self._decode = tokenizer.decode
        self._stops = stops
        self._tokens = list(after)
        self._window, self._read = 0, len(after)
        self._n_before = len(after)
        self._text = ""
        self._given = 0
        self.stopped = False
        """Whether a stop string was found."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the answer, to the one that completes a stop string."""
        return len(self._tokens) - self._n_before

    def push(self, tokens: Sequence[int]) -> str:
        """Adds tokens; returns the new text that is final."""
        for token in tokens:
            if not self.stopped:
                self._tokens.append(token)
                self._decode_more(final=False)
        return self._give(len(self._text) if self.stopped else len(self._text) - self._uncertain())

    def end(self) -> str:
        """Returns the rest of the text."""
        if not self.stopped:
            self._decode_more(final=True)
        return self._give(len(self._text))

    def _decode_more(self, final: bool) -> None:
        # Decoded together with earlier tokens, since a tokenizer may decode a token differently at the start of a text.
        known = self._decode(self._tokens[self._window : self._read])
        text = self._decode(self._tokens[self._window :])
        if len(text) <= len(known) or (text.endswith("\ufffd") and not final):
            return
        searched = max(0, len(self._text) - max(map(len, self._stops), default=0))
        self._text += text[len(known) :]
        self._window, self._read = self._read, len(self._tokens)
        found = [place for stop in self._stops if (place := self._text.find(stop, searched)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True

    def _uncertain(self) -> int:
        """Number of characters at the end that may start a stop string."""
        return max(
            (
                n
                for stop in self._stops
                for n in range(1, min(len(stop), len(self._text) + 1))
                if self._text.endswith(stop[:n])
            ),
            default=0,
        )

    def _give(self, end: int) -> str:
        end = len(self._text[:end].rstrip())
        start = self._given or (0 if self._n_before else len(self._text) - len(self._text.lstrip()))
        if end <= start:
            return ""
        self._given = end
        return self._text[start:end]
