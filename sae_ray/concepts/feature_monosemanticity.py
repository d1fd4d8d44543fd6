"""FMS, the Feature Monosemanticity Score: whether one latent, and no other, tells whether a concept is there.

Härle et al., "Measuring and Guiding Monosemanticity" (arXiv 2506.19382).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from sae_ray.concepts.inputs import SparseMatrix, as_numpy, sparse_codes
from sae_ray.concepts.stumps import Stumps, best_stumps
from sae_ray.concepts.trees import Tree, full_tree, judged_accuracies
from sae_ray.errors import UsageError, check

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

Convention = Literal["paper", "code"]
Evaluation = Literal["fitted", "heldout"]
N_CUTS = 10
"""Trees of depth 1: with all latents, without the root, without the two roots before, … as in the reference."""


class FMS(NamedTuple):
    """The score of one concept, and what it is made of."""

    n_rows: int
    """Rows that the accuracies are of."""
    root: int
    """The latent that splits the rows best; -1 if none can."""
    n_tied_roots: int
    """How many latents split them as well. `root` is the lowest of them."""
    accs: Float[np.ndarray, " 10"]
    """Accuracy of the best tree of depth 1 without the 0, 1, … 9 best latents."""
    accuracy_by_depth: Float[np.ndarray, " depths"]
    """Accuracy of the full tree cut at depth 0 (the commonest label), 1, … its depth."""
    local: Float[np.ndarray, " 9"]
    """`local[p - 1]` is local@p, twice what is lost without the p best latents: 1 if nothing is known without them."""
    global_: float
    """1 if deeper trees, which use more latents, are no better than one latent."""

    @property
    def depth(self) -> int:
        """Of the full tree."""
        return len(self.accuracy_by_depth) - 1

    @property
    def fms(self) -> Float[np.ndarray, " 9"]:
        """`fms[p - 1]` is FMS@p."""
        return self.accs[0] * (self.local + self.global_) / 2


def fms(
    codes: Any, labels: Any, *, convention: Convention = "paper", evaluation: Evaluation = "fitted", seed: int = 0
) -> FMS:
    """Feature Monosemanticity Score of one concept, from decision trees that tell its rows from others.

    `FMS@p = accs_0 · (local@p + global) / 2`, where `local@p = 2 (accs_0 − accs_p)`, `accs_p` is the accuracy of the
    best tree of depth 1 without the p best latents, `global = 1 − mean (acc_d − acc_1)` over the depths d from 2 to
    that of the full tree, and `acc_d` is the accuracy of the full tree cut at depth d.

    The score of an SAE is the mean over concepts; concepts are independent, so work can be split by them. Draw as many
    rows of either label (`balanced_rows`), and compare with raw coordinates and with shuffled labels: noise scores
    about .2, not 0, and fitted accuracies favour wide SAEs.

    Args:
        codes: `[rows, latents]`: torch, numpy or scipy.sparse.
        labels: `[rows]` of 0 and 1: whether the row shows the concept.
        convention: `paper` as above. `code` as the reference computes it (ml-research/measuring-and-guiding-
            monosemanticity at 5d73415): the mean of `global` is over depth 0 too, which raises it up to 1.5 and the
            score up to 1.25; accuracies of fitted rows are those of `Tree.reference_accuracies`.
        evaluation: `fitted`: on the rows that the trees were fitted on, as in the reference. `heldout`: on one half,
            with trees fitted on the other.
        seed: Of the split in halves, which have as many rows of either label.

    Raises:
        UsageError: the two have different numbers of rows, codes are not finite, labels are not 0 and 1, there are too
            few rows of a label, or there is no such convention or evaluation.
    """
    check(convention in get_args(Convention), "convention", convention, "it must be paper or code")
    check(evaluation in get_args(Evaluation), "evaluation", evaluation, "it must be fitted or heldout")
    matrix, shown = sparse_codes(codes), as_numpy(labels)
    if shown.shape != matrix.shape[:1]:
        raise UsageError(f"labels has the shape {shown.shape} for {matrix.shape[0]} rows of codes; give one per row")
    if not np.isin(shown, (0, 1)).all():
        raise UsageError("labels must be 0 and 1; choose the rows for which it is known whether they show the concept")
    shown = shown.astype(bool)
    least = 1 if evaluation == "fitted" else 2
    if min(shown.sum(), (~shown).sum()) < least:
        raise UsageError(f"labels has fewer than {least} rows of 0 or of 1; a tree needs rows of both")

    rows = np.arange(len(shown))
    fitted, judged = (rows, rows) if evaluation == "fitted" else _halves(shown, seed)
    known, known_shown = matrix[fitted], shown[fitted]
    latents = np.unique(known.indices)  # others cannot split
    known = known[:, latents]
    stumps = best_stumps(known, known_shown)
    tree, classifier = full_tree(known, known_shown) if len(latents) else (_root(known_shown), None)
    if evaluation == "heldout":
        new, new_shown = matrix[judged][:, latents], shown[judged]
        accs = _judged_accs(stumps, tree, new, new_shown)
        by_depth = judged_accuracies(tree, classifier, new, new_shown) if classifier else accs[:1]
    else:
        counted = Tree.reference_accuracies if convention == "code" else Tree.accuracies
        accs = np.array([counted(one)[-1] for one in _as_trees(stumps, tree)])
        by_depth = counted(tree)
    return FMS(
        n_rows=len(judged),
        root=int(latents[stumps.latent[0]]) if len(stumps.latent) else -1,
        n_tied_roots=stumps.n_tied,
        accs=accs,
        accuracy_by_depth=by_depth,
        local=2 * (accs[0] - accs[1:]),
        global_=_global(by_depth, convention),
    )


def _global(by_depth: Float[np.ndarray, " depths"], convention: Convention) -> float:
    deeper = by_depth[2:] if convention == "paper" else np.delete(by_depth, slice(1, 2))
    return float(1 - (deeper - by_depth[1]).mean()) if len(deeper) and len(by_depth) > 1 else 1.0


def _halves(shown: Bool[np.ndarray, " rows"], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the rows of either label one half each, or one more in the first."""
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(np.flatnonzero(shown == label)) for label in (False, True)]
    first = [rows[: (len(rows) + 1) // 2] for rows in shuffled]
    second = [rows[(len(rows) + 1) // 2 :] for rows in shuffled]
    return np.sort(np.concatenate(first)), np.sort(np.concatenate(second))


def _root(shown: Bool[np.ndarray, " rows"]) -> Tree:
    """A tree that splits nothing."""
    counts = np.array([[(~shown).sum(), shown.sum()]])
    return Tree(counts, np.zeros(1, np.int64), np.ones(1, bool))


def _as_trees(stumps: Stumps, tree: Tree) -> list[Tree]:
    """The best stump, the best one without its latent, … and where none is left, a tree that splits nothing."""
    root = tree.counts[:1]
    found = [
        Tree(np.concatenate([root, [left], [right]]), np.array([0, 1, 1]), np.array([False, True, True]))
        for left, right in zip(stumps.left[:N_CUTS], stumps.right[:N_CUTS], strict=True)
    ]
    return found + [Tree(root, np.zeros(1, np.int64), np.ones(1, bool))] * (N_CUTS - len(found))


def _judged_accs(
    stumps: Stumps, tree: Tree, codes: Float[SparseMatrix, "rows latents"], shown: Bool[np.ndarray, " rows"]
) -> Float[np.ndarray, " 10"]:
    chosen = stumps.latent[:N_CUTS]
    goes_left = codes[:, chosen].toarray() <= stumps.threshold[:N_CUTS]
    left_says, right_says = (side[:N_CUTS, 1] > side[:N_CUTS, 0] for side in (stumps.left, stumps.right))
    says = np.where(goes_left, left_says, right_says)
    accs = np.full(N_CUTS, (shown == tree.says[0]).mean())
    accs[: len(chosen)] = (says == shown[:, None]).mean(axis=0)
    return accs
