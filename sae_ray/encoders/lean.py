"""What transformers need not import for us."""

from __future__ import annotations


def skip_scikit_learn() -> None:
    """Keeps transformers from importing scikit-learn, which takes a fifth of the time to import a model's class.

    Where scikit-learn is installed, generation imports it for assisted decoding alone, which nothing of ours uses
    (seen in transformers 5.19). Call it before the first class of transformers is imported.
    """
    from transformers import utils

    utils.is_sklearn_available = lambda: False  # pyright: ignore[reportPrivateImportUsage]
