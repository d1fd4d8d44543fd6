"""Importing transformers in less time than it takes on its own."""

from __future__ import annotations

import gc


def import_transformers() -> None:
    """Imports what all models of transformers need; call it before its first class is named.

    Two things halve the time. No garbage is collected meanwhile: what an import makes stays. And scikit-learn is left
    out, which generation imports where it is installed, for assisted decoding alone; nothing of ours uses that (seen
    in transformers 5.19).
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        from transformers import utils

        utils.is_sklearn_available = lambda: False  # pyright: ignore[reportPrivateImportUsage]
        from transformers.models.auto import modeling_auto  # noqa: F401
    finally:
        if collecting:
            gc.enable()
