"""The best words of each neuron, from scores of any method in blocks of words, and the table of names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from jaxtyping import Float, Int

N_BEST = 5
"""Names that the table lists for each neuron."""
NAMES_SCHEMA = pa.schema(
    {
        "neuron": pa.int32(),
        "method": pa.string(),
        "rank": pa.int8(),
        "name": pa.string(),
        "score": pa.float64(),
        "margin": pa.float64(),
        "n_images": pa.int32(),
    }
)


class BestWords(NamedTuple):
    """The `N_BEST` words of each neuron and one more, which the last margin needs. Blocks of words merge."""

    word: Int[np.ndarray, "neurons words"]
    """Numbers of words, best first, the lower number first in ties; -1 in unused places."""
    score: Float[np.ndarray, "neurons words"]
    """-inf in unused places."""

    @classmethod
    def of(cls, scores: Float[np.ndarray, "neurons words"], first_word: int = 0) -> Self:
        """From the scores of a block of words, NaN where a neuron has none for a word.

        Args:
            first_word: number of the block's first word.
        """
        word = np.broadcast_to(np.arange(first_word, first_word + scores.shape[1]), scores.shape)
        known = ~np.isnan(scores)
        return cls._best(np.where(known, word, -1), np.where(known, scores, -np.inf))

    @classmethod
    def merged(cls, parts: Iterable[Self]) -> Self:
        """Over all words, from parts of the same neurons in any order of the words."""
        words, scores = zip(*parts, strict=True)
        return cls._best(np.concatenate(words, axis=1), np.concatenate(scores, axis=1))

    @classmethod
    def _best(cls, word: Int[np.ndarray, "neurons some"], score: Float[np.ndarray, "neurons some"]) -> Self:
        if score.shape[1] > N_BEST + 1:
            # All that are at least as good as the last one kept, so that its ties can be told apart.
            least = -np.partition(-score, N_BEST, axis=1)[:, N_BEST]
            width = max(N_BEST + 1, int((score >= least[:, None]).sum(axis=1).max(initial=0)))
            if width < score.shape[1]:
                chosen = np.argpartition(-score, width - 1, axis=1)[:, :width]
                word, score = np.take_along_axis(word, chosen, axis=1), np.take_along_axis(score, chosen, axis=1)
        order = np.lexsort((word, -score), axis=1)[:, : N_BEST + 1]
        return cls(np.take_along_axis(word, order, axis=1), np.take_along_axis(score, order, axis=1))

    @property
    def first(self) -> Int[np.ndarray, " neurons"]:
        """The best word of each neuron; -1 where it has none."""
        return self.word[:, 0]

    @property
    def n_distinct(self) -> int:
        """How many different words are the best of a neuron. One word for many neurons says little about any."""
        return len(np.unique(self.first[self.first >= 0]))

    def table(
        self, method: str, vocabulary: Sequence[str], n_images: Int[np.ndarray, " neurons"], first_neuron: int = 0
    ) -> pa.Table:
        """Up to `N_BEST` rows per neuron that has names, in `NAMES_SCHEMA`.

        Args:
            method: `soft_wpmi`, say.
            vocabulary: all words.
            n_images: how many images each neuron's names rest on.
            first_neuron: number of the first neuron.

        `margin` is the score less that of the next word; null if there is none.
        """
        row, rank = np.nonzero(self.word[:, :N_BEST] >= 0)
        following = np.full(self.score.shape, -np.inf)
        following[:, :-1] = self.score[:, 1:]
        score = self.score[row, rank]
        margin = score - following[row, rank]
        columns = {
            "neuron": row + first_neuron,
            "method": [method] * len(row),
            "rank": rank,
            "name": [vocabulary[word] for word in self.word[row, rank].tolist()],
            "score": score,
            "margin": pa.array(margin, mask=np.isinf(margin)),
            "n_images": n_images[row],
        }
        arrays = [pa.array(columns[field.name]).cast(field.type) for field in NAMES_SCHEMA]
        return pa.table(arrays, schema=NAMES_SCHEMA)
