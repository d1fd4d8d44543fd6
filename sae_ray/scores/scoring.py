"""Scores an SAE, or the raw activations, on one image set, in fixed blocks of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.scores.statistics import (
    IMAGES_PER_BLOCK,
    BlockImages,
    Entries,
    NeuronStats,
    neuron_blocks,
    pool_codes,
    pool_dense,
    pool_tokens,
)
from sae_ray.store.activations import PIECE_BYTES, ActivationStore

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from sae_ray.sae import SAE


class Piece(NamedTuple):
    """Some images of one part, as `ActivationStore.read` takes them."""

    part: int
    images: range


def image_blocks(store: ActivationStore) -> list[list[Piece]]:
    """The blocks, the same on any cluster: whole parts with about `IMAGES_PER_BLOCK` images, or fewer where their
    vectors would take more than `PIECE_BYTES`; a part that takes more is several blocks."""
    pieces = [Piece(number, images) for number in store.parts for images in store.pieces(number)]
    largest = max((part.rows for part in store.parts.values()), default=0) * store.row_bytes
    by_images, by_bytes = IMAGES_PER_BLOCK // store.config["images_per_part"], PIECE_BYTES // max(1, largest)
    per_block = max(1, min(by_images, by_bytes))
    return [pieces[start : start + per_block] for start in range(0, len(pieces), per_block)]


def n_neurons(sae: SAE | None, store: ActivationStore) -> int:
    """Number of latents of the SAE, or of coordinates of the activation if there is no SAE.

    Raises UsageError if the SAE takes activations of another width.
    """
    if sae is None:
        return store.d
    if sae.d_in != store.d:
        raise UsageError(
            f"the SAE takes activations of width {sae.d_in}, but {store.folder} has width {store.d}; "
            "choose the site it was trained on"
        )
    return sae.d_sae


def read_block(
    saes: Sequence[SAE | None],
    store: ActivationStore,
    embeddings: ActivationStore | None,
    block: Sequence[Piece],
    after_sae: Callable[[int], None] = lambda done: None,
) -> tuple[BlockImages, list[list[Entries]]]:
    """One block of images, which is read once, and for every SAE its entries for each range of `neuron_blocks`.

    Args:
        saes: on one device; None stands for the raw coordinates of the activation.
        embeddings: the judge's, of the same images; None collects everything except the score.
        block: one of `image_blocks`.
        after_sae: called with the number of images done, each counted for every SAE.

    Raises:
        UsageError: an SAE takes activations of another width.
        SaeRayError: the embeddings are of other images, or one has length zero.
    """
    ranges = [list(neuron_blocks(n_neurons(sae, store), _width(embeddings))) for sae in saes]
    if embeddings is not None and embeddings.parts.keys() != store.parts.keys():
        raise _other_images(store, embeddings)
    found: list[list[Entries]] = [[] for _ in saes]
    image_index, judged = [], []
    n_seen = 0
    for number, places in block:
        row_index, _, activation = store.read(number, places)
        images, row_image = np.unique(row_index, return_inverse=True)
        for place, entries in enumerate(_encoded(saes, activation, row_image)):
            found[place].append(entries._replace(image=entries.image + n_seen))
            after_sae(n_seen * len(saes) + (place + 1) * len(images))
        image_index.append(images)
        n_seen += len(images)
        if embeddings is not None:
            judged_index, _, judged_part = embeddings.read(number)
            chosen = slice(places.start, places.stop)
            if not np.array_equal(judged_index[chosen], images):
                raise _other_images(store, embeddings)
            judged.append(judged_part[chosen])

    if embeddings is None:
        images = BlockImages.unjudged(np.concatenate(image_index))
    else:
        judge = f"the judge (embeddings in {embeddings.folder})"
        images = BlockImages.of(np.concatenate(image_index), np.concatenate(judged), judge)
    joined_entries = (joined(own) for own in found)
    return images, [
        [entries.of_range(neurons) for neurons in own] for entries, own in zip(joined_entries, ranges, strict=True)
    ]


def joined(parts: Sequence[Entries]) -> Entries:
    """Entries of consecutive images, sorted again."""
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    order = np.argsort(columns[1], kind="stable")  # the images are in order
    return Entries(*(column[order] for column in columns))


def score_store(
    sae: SAE | None, store: ActivationStore, embeddings: ActivationStore | None, n_top: int
) -> list[NeuronStats]:
    """Statistics over all images, the same as the scoring stage computes. Arguments and errors as in `read_block`.

    `n_top`: number of top images per neuron.
    """
    width = _width(embeddings)
    stats = [NeuronStats(len(neurons), width, n_top) for neurons in neuron_blocks(n_neurons(sae, store), width)]
    for block in image_blocks(store):
        images, [entries] = read_block([sae], store, embeddings, block)
        for one, of_range in zip(stats, entries, strict=True):
            one.add(of_range, images)
    return stats


def _width(embeddings: ActivationStore | None) -> int:
    return 0 if embeddings is None else embeddings.d


def _other_images(store: ActivationStore, embeddings: ActivationStore) -> SaeRayError:
    return SaeRayError(
        f"{store.folder} and {embeddings.folder} do not contain the same images in each part; "
        "extract both from the same manifest"
    )


def _encoded(saes: Sequence[SAE | None], activation: np.ndarray, row_image: np.ndarray) -> Iterator[Entries]:
    """The entries of each SAE in turn; the activations reach the device once, in the stored dtype."""
    on_device = None
    for sae in saes:
        if sae is None:
            yield pool_dense(row_image, activation)
            continue
        if on_device is None:
            import torch

            on_device = torch.tensor(activation).to(sae.device).float()
        codes = sae.encode_sparse(on_device)
        if codes.values.is_cuda:
            yield pool_codes(row_image, codes)
        else:
            yield pool_tokens(row_image, codes.rows.numpy(), codes.latents.numpy(), codes.values.numpy())


def majority(
    neuron: Int[np.ndarray, " entries"], label: Int[np.ndarray, " entries"], n_neurons: int
) -> tuple[Int[np.ndarray, " neurons"], Float[np.ndarray, " neurons"]]:
    """The most common label of each neuron's images (the lower one in a tie), and its share of the images.

    Args:
        neuron: the neuron of each pair of a neuron and one of its top images.
        label: the label of that image; -1 for none.

    Returns:
        Label and share per neuron; -1 and 0 if no image has a label.
    """
    n_images = np.bincount(neuron, minlength=n_neurons)
    neuron, label = neuron[label >= 0], label[label >= 0]
    n_labels = int(label.max(initial=0)) + 1
    pairs, counts = np.unique(neuron * n_labels + label, return_counts=True)
    neuron, label = pairs // n_labels, pairs % n_labels
    best = np.lexsort((label, -counts, neuron))
    _, first = np.unique(neuron[best], return_index=True)
    found, share = np.full(n_neurons, -1), np.zeros(n_neurons)
    chosen = best[first]
    found[neuron[chosen]] = label[chosen]
    share[neuron[chosen]] = counts[chosen] / n_images[neuron[chosen]]
    return found, share
