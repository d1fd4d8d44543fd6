"""Models in the transformers format, on the Hugging Face hub or in a directory: how they are found and loaded."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae_ray.encoders.lean import import_transformers
from sae_ray.encoders.sources import check_revision, directory_digest, local_directory
from sae_ray.errors import UsageError
from sae_ray.host import free_memory
from sae_ray.store.files import address_shown

_SILENT = 100
_PATIENCE = 4.0
"""Seconds that the hub has to answer."""


class Source(NamedTuple):
    """Where `from_pretrained` finds everything of a model."""

    model: str
    """As it was named by the user, without keys."""
    path: str
    revision: str | None
    """What pins the files; it is recorded."""
    commit: str | None
    """What `from_pretrained` takes as its revision; None for a directory."""
    config: Any


def find(model: str, revision: str | None, forms: str) -> Source:
    """Finds a model and reads its configuration.

    Args:
        model: A directory, local or in an object store, or a hub id.
        revision: Pins it; the files found must be of that revision.
        forms: How such a model is named; ends every error message.

    Raises:
        UsageError: It does not exist, cannot be read or is not of the given revision; or the hub cannot be reached and
            the model is not in the cache.
        SaeRayError: As `local_directory`.
    """
    import_transformers()
    from transformers import AutoConfig
    from transformers.utils.hub import cached_file

    directory = local_directory(model, revision, forms)
    model = address_shown(model)
    if directory is not None:
        digest = directory_digest(directory)
        check_revision(model, revision, digest)
        with refusing(model, forms):
            return Source(model, str(directory), digest, None, AutoConfig.from_pretrained(directory))
    with refusing(model, forms, of_hub=True):
        # The cache keeps each commit's files in a folder named by it.
        commit = Path(str(cached_file(model, "config.json", revision=revision))).parent.name
        return Source(model, model, commit, commit, AutoConfig.from_pretrained(model, revision=commit))


def load_weights(
    source: Source, loader: str, device: torch.device, dtype: torch.dtype, forms: str, **settings: Any
) -> Any:
    """The model as the transformers class `loader`, in eval mode.

    On the meta device its files are checked as they are for loading, names and shapes included, but only their headers
    are read.

    Raises:
        UsageError: Weights are missing, do not fit the configuration or are not safetensors; or they do not fit into
            the memory of the host or of the device.
    """
    import transformers

    if device.type == "meta":
        settings["device_map"] = "meta"
    with refusing(source.model, forms, of_hub=source.commit is not None):
        if device.type != "meta":
            _check_room(source, loader, device, dtype, **settings)
        module, loading = getattr(transformers, loader).from_pretrained(
            source.path,
            revision=source.commit,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # otherwise transformers names them only in a log message
            **settings,
        )
    # transformers initialises weights that a checkpoint lacks at random.
    problems = [f"{name} is missing" for name in sorted(loading["missing_keys"])]
    problems += [
        f"{name} has the shape {list(found)}, not {list(wanted)}"
        for name, found, wanted in sorted(loading["mismatched_keys"])
    ]
    if problems:
        raise UsageError(
            f"{source.model} cannot be loaded: its weights do not fit its configuration: "
            f"{', '.join(problems)} ({forms})"
        )
    return module.eval().to(device)


def _check_room(
    source: Source,
    loader: str,
    device: torch.device,
    dtype: torch.dtype,
    config: Any = None,
    key_mapping: Any = None,
    **arguments: Any,
) -> None:
    """Refuses weights that do not fit into memory: the system would end the process without a word, a GPU's library
    without a remedy.

    Weights in the dtype of their files are mapped: the system reads them again where memory is short. Those for a GPU
    pass through the memory of the host.
    """
    import transformers

    converted = dtype != source.config.dtype
    if device.type == "cpu" and not converted:
        return
    kind = getattr(transformers, loader)
    with torch.device("meta"):
        module = getattr(kind, "from_config", kind)(config or source.config, **arguments)  # classes of kinds have it
    wanted = dtype.itemsize * sum(weights.numel() for weights in module.parameters())
    rooms = {"memory": free_memory()} if converted else {}
    if device.type == "cuda":
        rooms[f"the memory of {device}"] = free_memory(device)
    for where, free in rooms.items():
        if wanted > free:
            kinds = "; bfloat16 or float16 takes half of that" if dtype == torch.float32 else ""
            raise UsageError(
                f"{source.model} cannot be loaded: its weights take {wanted / 1e9:.1f} GB as "
                f"{str(dtype).removeprefix('torch.')}, but {free / 1e9:.1f} GB of {where} are free{kinds}; choose "
                "another dtype, a smaller model or a larger machine, or stop other programs"
            )


@contextlib.contextmanager
def refusing(model: str, forms: str, of_hub: bool = False) -> Iterator[None]:
    """Turns what transformers raises on bad files into a UsageError, and keeps its reports of unused weights quiet.

    Args:
        of_hub: Whether files of the hub are read; only those in the cache if the hub cannot be reached.
    """
    from transformers.utils import logging

    unreachable = hub_unreachable() if of_hub else None
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(_SILENT)
    logging.disable_progress_bar()
    try:
        yield
    except bad_files() as error:
        raise refusal(model, error, unreachable or forms) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def bad_files() -> tuple[type[Exception], ...]:
    """What libraries raise on files that are missing, torn or malformed, which may be almost anything, and on
    connections that break.
    """
    from huggingface_hub.errors import StrictDataclassError
    from huggingface_hub.utils import httpx
    from safetensors import SafetensorError

    malformed = (AttributeError, EOFError, LookupError, TypeError, ValueError, StrictDataclassError)
    return (OSError, RuntimeError, SafetensorError, httpx.HTTPError, *malformed)


def check_tokenizer(model: str, tokenizer: Any, forms: str) -> None:
    """Refuses the empty tokenizer that transformers makes up where its files are missing.

    Raises:
        UsageError: It has no words.
    """
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UsageError(f"{model} has no tokenizer; add its files, such as tokenizer.json ({forms})")


def refusal(model: str, error: Exception, remedy: str) -> UsageError:
    """The whole reason why a model cannot be loaded, and what to do."""
    reason = str(error).strip() or type(error).__name__
    gap = "\n" if "\n" in reason else " "
    return UsageError(f"{model} cannot be loaded: {reason}{gap}({remedy})")


def hub_unreachable() -> str | None:
    """Why the Hugging Face hub cannot be reached, and what to do to load models; None if it can.

    If it cannot, models in its cache still load, and others are refused at once.
    """
    from huggingface_hub import constants

    problem = hub_problem()
    if problem is None:
        return None
    return (
        f"{problem}; only the cache {constants.HF_HUB_CACHE} is read. Name a local directory, or fill the cache where "
        "there is a connection and set HF_HUB_OFFLINE=1"
    )


@functools.cache
def hub_problem() -> str | None:
    """Why the Hugging Face hub cannot be reached; None if it can.

    The hub is tried once in a process. If it does not answer, huggingface_hub is switched offline, as by
    HF_HUB_OFFLINE=1. Otherwise it would retry every file for half a minute.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import httpx

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
        return None
    except httpx.HTTPError as error:
        # What huggingface_hub 2.4 sets from its environment variable; read at every use.
        constants.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} cannot be reached: {str(error) or type(error).__name__}"
