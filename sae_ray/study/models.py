"""The models of a study, checked before long work begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, assert_never

from sae_ray.encoders.sources import named_by
from sae_ray.study.step_plans import ConceptsPlan, ExtractPlan, NamingPlan, SteeringPlan


class ModelUse(NamedTuple):
    """What a study needs a model for."""

    field: str
    """Of the study, such as `judge.model`."""
    kind: Literal["images", "texts", "llava"]
    """Embeds images, embeds texts, or answers questions about images."""
    model: str
    revision: str | None
    dtype: str


def models_needed(
    extracts: Sequence[ExtractPlan],
    concepts: Sequence[ConceptsPlan] = (),
    steerings: Sequence[SteeringPlan] = (),
    namings: Sequence[NamingPlan] = (),
) -> Iterator[ModelUse]:
    """The models that unfinished steps need."""
    for extract in extracts:
        if not extract.step.finished:
            info = extract.info
            yield ModelUse(extract.field, "images", info.model, info.revision, extract.encoder.dtype)
    for one in concepts:
        if one.embeddings is not None and not one.step.finished:
            space = one.embeddings
            yield ModelUse(space.field, "texts", space.info.model, space.info.revision, "float32")
        if one.readout is not None and not one.step.finished:
            field, info, dtype = one.activations.field, one.activations.info, one.activations.encoder.dtype
            if one.is_zero_shot:
                yield ModelUse(field, "texts", info.model, info.revision, "float32")
            if one.activations.site.layer is not None:
                yield ModelUse(field, "images", info.model, info.revision, dtype)
    for one in (*steerings, *namings):
        if not one.step.finished:
            steering = one.steering
            yield ModelUse("steering.llava", "llava", steering.llava, steering.revision, steering.dtype)
    for one in steerings:
        if not one.step.finished:
            steering = one.steering
            yield ModelUse("steering.scorer", "texts", steering.scorer, steering.scorer_revision, "float32")


def check_models(uses: Iterable[ModelUse]) -> None:
    """Loads each model onto the meta device: as for the work itself, but without reading the weights' values.

    This covers missing and torn files, tensors that the configuration does not expect or whose shapes differ, the
    preprocessing, the tokenizer, the processor and the connection to the hub. Weights on the hub are downloaded.

    Raises:
        UsageError: A model cannot be loaded. The message begins with the field.
    """
    for use in dict.fromkeys(uses):
        with named_by(use.field, use.model):
            _check(use)


def _check(use: ModelUse) -> None:
    match use.kind:
        case "images":
            from sae_ray.encoders.loading import load_encoder

            load_encoder(use.model, use.revision, "meta", use.dtype)
        case "texts":
            from sae_ray.encoders.text import load_text_encoder

            load_text_encoder(use.model, use.revision, "meta")
        case "llava":
            from sae_ray.steering.llava import load_llava

            load_llava(use.model, use.revision, "meta", use.dtype)
        case never:
            assert_never(never)
