"""Models in the transformers format, on the Hugging Face hub or in a directory: finding, loading and refusing them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae_ray.encoders.sources import check_revision, directory_digest, local_directory
from sae_ray.errors import UsageError

_SILENT = 100


class Source(NamedTuple):
    """Where `from_pretrained` finds everything of a model."""

    model: str
    """What it was asked for by."""
    path: str
    revision: str | None
    """What pins the files, for the record."""
    commit: str | None
    """What `from_pretrained` takes as its revision; None for a directory."""
    config: Any


def find(model: str, revision: str | None, forms: str) -> Source:
    """Finds a model and reads its configuration.

    Args:
        model: A directory or a hub id.
        revision: Pins it; what is there must be that revision.
        forms: Closes every refusal: how such a model is named.

    Raises:
        UsageError: It is not there, not readable, or not of the given revision.
    """
    from transformers import AutoConfig
    from transformers.utils.hub import cached_file

    directory = local_directory(model)
    if directory is not None:
        digest = directory_digest(directory)
        check_revision(model, revision, digest)
        with refusing(model, forms):
            return Source(model, str(directory), digest, None, AutoConfig.from_pretrained(directory))
    if model.startswith(("/", "./", "../", "~")):
        raise UsageError(f"there is no directory {model}; {forms}")
    with refusing(model, forms):
        # The cache keeps each commit's files in a folder named by it.
        commit = Path(str(cached_file(model, "config.json", revision=revision))).parent.name
        return Source(model, model, commit, commit, AutoConfig.from_pretrained(model, revision=commit))


def load_weights(source: Source, loader: str, dtype: torch.dtype, forms: str, **settings: Any) -> Any:
    """The model as the transformers class `loader`, in eval mode on the CPU.

    Raises:
        UsageError: Weights are missing, do not fit the configuration or are not safetensors.
    """
    import transformers

    with refusing(source.model, forms):
        module, loading = getattr(transformers, loader).from_pretrained(
            source.path,
            revision=source.commit,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **settings,
        )
    # transformers fills in what a checkpoint lacks at random.
    if loading["missing_keys"]:
        raise UsageError(f"{source.model} lacks weights, {min(loading['missing_keys'])} first; {forms}")
    return module.eval()


@contextlib.contextmanager
def refusing(model: str, forms: str) -> Iterator[None]:
    """Turns what transformers raises on bad files into a UsageError, and keeps its reports of unused weights quiet."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(_SILENT)
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"{model} cannot be loaded: {str(error).splitlines()[0]} ({forms})") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
