"""Tokens to text, without a server."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sae_ray.serve.conversation import TextStream


class Bytes(SimpleNamespace):
    """A tokenizer whose tokens are bytes, so that characters may need several."""

    def decode(self, tokens) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


class Words(SimpleNamespace):
    """A tokenizer that puts spaces between its tokens."""

    def decode(self, tokens) -> str:
        return " ".join("abcdefgh"[token % 8] for token in tokens)


def streamed(tokenizer, tokens, stops=(), sizes=(1,)) -> tuple[str, list[str], bool]:
    stream, pieces, place, turn = TextStream(tokenizer, stops), [], 0, 0
    while place < len(tokens) and not stream.stopped:
        size = sizes[turn % len(sizes)]
        pieces.append(stream.push(tokens[place : place + size]))
        place, turn = place + size, turn + 1
    pieces.append(stream.end())
    return "".join(pieces), pieces, stream.stopped


@given(st.text(), st.lists(st.integers(1, 5), min_size=1))
def test_the_pieces_are_the_stripped_whole(text, sizes):
    assert streamed(Bytes(), list(text.encode()), sizes=sizes)[0] == text.strip()


@given(st.lists(st.integers(0, 7)))
def test_spaces_between_tokens_stay(tokens):
    assert streamed(Words(), tokens)[0] == Words().decode(tokens)


@given(st.text("ab c", max_size=30), st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_first_stop_string_ends_it_and_nothing_of_it_is_said(text, stops):
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    said, pieces, stopped = streamed(Bytes(), list(text.encode()), stops)
    ends = [min(place + len(stop) for stop in stops if (place := text.find(stop)) >= 0)] if places else []
    # A stop string counts as soon as it is complete.
    expected = text[: min(place for stop in stops if (place := text[: ends[0]].find(stop)) >= 0)] if places else text
    assert said == expected.strip()
    assert stopped == bool(places)
    assert all(said.startswith("".join(pieces[:n])) for n in range(len(pieces)))


def test_half_a_character_waits_for_the_other():
    stream = TextStream(Bytes())
    assert stream.push([0xE2, 0x98]) == ""
    assert stream.push([0x85]) == "★"


@pytest.mark.parametrize("text", ["", " ", "\n\n"])
def test_nothing_is_nothing(text):
    assert streamed(Bytes(), list(text.encode()))[0] == ""
