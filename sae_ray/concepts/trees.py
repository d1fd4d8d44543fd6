"""Decision trees, and how often they are right when they are cut at each depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sae_ray.concepts.inputs import SparseMatrix

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class Tree(NamedTuple):
    """The rows in each node of a tree; node 0 is the root."""

    counts: Int[np.ndarray, "nodes 2"]
    """Number of rows with label 0 and 1."""
    depth: Int[np.ndarray, " nodes"]
    """0 for the root."""
    is_leaf: Bool[np.ndarray, " nodes"]

    @property
    def says(self) -> Bool[np.ndarray, " nodes"]:
        """What a tree that ends in the node says; 0 in a tie."""
        return self.counts[:, 1] > self.counts[:, 0]

    def accuracies(self) -> Float[np.ndarray, " depths"]:
        """Share of its own rows that the tree gets right when it is cut at depth 0, 1, … its own depth."""
        ends = [(self.depth == d) | (self.is_leaf & (self.depth < d)) for d in range(self.depth.max() + 1)]
        right = self.counts.max(axis=1)
        return np.array([right[nodes].sum() for nodes in ends]) / self.counts[0].sum()

    def reference_accuracies(self) -> Float[np.ndarray, " depths"]:
        """As `accuracies`, as the reference counts them (ml-research/measuring-and-guiding-monosemanticity at 5d73415,
        `utils/tree_loader.py`): leaves above the cut count as right, also those that hold rows of both labels; and
        numbers of rows are products with shares, whose fractions are cut off.
        """
        n = self.counts.sum(axis=1, keepdims=True)
        rows = n * (self.counts / n)  # which may be a little less than `counts`
        found = []
        for d in range(self.depth.max() + 1):
            cut = rows[self.depth == d]
            true, false = rows[0] - cut.sum(axis=0), np.zeros(2)
            for negative, positive in cut:
                winner = int(positive > negative)
                true[winner] += (negative, positive)[winner]
                false[winner] += (negative, positive)[1 - winner]
            right, wrong = true.astype(np.int64).sum(), false.astype(np.int64).sum()
            found.append(right / (right + wrong))
        return np.array(found)


def full_tree(codes: Float[SparseMatrix, "rows latents"], labels: Bool[np.ndarray, " rows"]) -> tuple[Tree, Any]:
    """A tree that is grown until no leaf can be split (scikit-learn, Gini impurity, `random_state` 0), and the fitted
    `DecisionTreeClassifier`.

    The tree is that of the dense matrix, but the sparse one costs what is not 0: noise makes trees hundreds deep, of
    which each level would look at every row and latent.
    """
    from sklearn.tree import DecisionTreeClassifier

    columns = _as_scikit_learn_takes_it(codes.tocsc())
    fitted = DecisionTreeClassifier(criterion="gini", random_state=0).fit(columns, labels)
    nodes = fitted.tree_
    counts = np.rint(nodes.value[:, 0, :] * nodes.weighted_n_node_samples[:, None]).astype(np.int64)
    depth = nodes.compute_node_depths().astype(np.int64) - 1
    return Tree(counts, depth, nodes.children_left == -1), fitted


def judged_accuracies(
    tree: Tree, fitted: Any, codes: Float[SparseMatrix, "rows latents"], labels: Bool[np.ndarray, " rows"]
) -> Float[np.ndarray, " depths"]:
    """Share of other rows that a `full_tree` gets right when it is cut at depth 0, 1, … its own depth."""
    paths = fitted.decision_path(_as_scikit_learn_takes_it(codes))
    # Nodes are numbered parents first, so the path of each row is in order.
    length = np.diff(paths.indptr)
    places = (paths.indptr[:-1] + np.minimum(d, length - 1) for d in range(tree.depth.max() + 1))
    return np.array([(tree.says[paths.indices[place]] == labels).mean() for place in places])


def _as_scikit_learn_takes_it(codes: SparseMatrix) -> SparseMatrix:
    parts = codes.data.astype(np.float32), codes.indices.astype(np.int32), codes.indptr.astype(np.int32)
    return type(codes)(parts, shape=codes.shape)
