"""Concepts: found by the labels of top images and by texts, against computations by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModel, AutoTokenizer

from sae_ray.concepts.labelling import (
    Concept,
    best_of_each,
    image_classes,
    label_concepts,
    mean_embeddings,
    search,
)
from sae_ray.concepts.naming import class_names, class_of, first_synonym, label_title, names
from sae_ray.encoders import load_encoder, load_preprocess
from sae_ray.encoders.sites import Site
from sae_ray.encoders.text import load_text_encoder
from sae_ray.errors import UsageError
from sae_ray.scores.tables import Scores
from sae_ray.world.write import MODELS

CLIP, JUDGE = str(MODELS / "clip"), f"open_clip:local-dir:{MODELS / 'judge'}"


# Names


@pytest.mark.parametrize(
    ("answer", "name", "expected"),
    [
        ("star", "star", True),
        ("Star.", "star", True),
        ("a star", "star", False),
        ("stars", "star", False),
        ("star on a plain background", "star", True),
        ("", "star", False),
        ("Tinca", "tench, Tinca tinca", False),
        ("tinca Tinca!", "tench, Tinca tinca", True),
        ("tench", "tench, Tinca tinca", True),
        ("great white shark", "great white shark, white shark", True),
        ("great", "great white shark, white shark", False),
        ("sports car", "sports_car", True),
        ("lion's mane", "Lion's mane", True),
        ("anything", "", False),
        ("", " , ", False),
    ],
)
def test_an_answer_names_a_class_by_its_first_words(answer: str, name: str, expected: bool):
    assert names(answer, name) == expected


def test_a_synset_is_the_class_whether_it_has_a_name_or_not():
    assert class_of("n02012849 crane") == class_of("n02012849") == "n02012849"
    assert class_of("n02012849x") == "n02012849x"
    assert class_of("crane") == "crane"
    found = class_names(["n02012849", "n02012849 crane", "n03126707 crane", "n99999999", "star", "..."])
    assert found == {"n02012849": "crane", "n03126707": "crane", "star": "star"}
    assert first_synonym("tench, Tinca tinca") == "tench"


def test_a_synset_without_words_has_those_of_imagenet():
    found = class_names(["n01440764", "n01443537/images", "n02012849 wading bird", "n02012849"])
    assert found["n01440764"] == "tench, Tinca tinca"
    assert first_synonym(found["n01443537/images"]) == "goldfish"
    assert found["n02012849"] == "wading bird", "the study's own words come first"


@pytest.mark.parametrize(
    ("label_name", "title"),
    [
        ("n01440764", "tench, Tinca tinca (n01440764)"),
        ("n02012849 crane", "crane (n02012849)"),
        ("n99999999", "n99999999"),
        ("n014407641", "n014407641"),
        ("a/abbey", "a/abbey"),
    ],
)
def test_a_label_is_shown_with_its_words_first(label_name: str, title: str):
    assert label_title(label_name) == title


# By labels


def tables(top: dict[int, list[int]], n_neurons: int, n_images: int) -> tuple[Scores, np.ndarray]:
    """Scores and top images of neurons, given the images that they fire on, strongest first."""
    n_firing = np.array([len(top.get(neuron, [])) for neuron in range(n_neurons)])
    unused = dict.fromkeys(Scores._fields, np.full(n_neurons, np.nan))
    top_image = np.full((n_neurons, 16), -1)
    for neuron, images in top.items():
        top_image[neuron, : len(images)] = images[:16]
    return Scores(**(unused | {"n_firing": n_firing, "frequency": n_firing / n_images})), top_image


def test_a_latent_stands_for_what_its_top_images_share():
    manifest = pa.table({"label_name": ["cat", "cat", "dog", "blank", None, "dog"]})
    classes = image_classes(manifest, ignored=["blank"])
    assert classes == ["cat", "cat", "dog", None, None, "dog"]
    top = {0: [1, 0, 3], 1: [3, 4], 2: [0, 2], 3: [2, 5, 0, 4], 5: [0]}
    found = label_concepts(*tables(top, 6, 6), classes, np.array([3.0, 1, 1, 2, 0, 0]))
    assert found == [
        Concept(0, "cat", 2 / 3, 3, 0.5, 3.0),
        Concept(1, None, 0.0, 2, 1 / 3, 1.0),
        Concept(2, "cat", 0.5, 2, 1 / 3, 1.0),  # of two as frequent the first by name
        Concept(3, "dog", 0.5, 4, 2 / 3, 2.0),
    ]  # 4 never fired; 5 has no max_token
    assert [one.stands_for_its_class(3, 0.5) for one in found] == [True, False, False, True]
    assert not found[3].stands_for_its_class(3, 0.51)


def test_nothing_is_labelled():
    found = label_concepts(*tables({0: [0, 1]}, 2, 3), [None] * 3, np.ones(2))
    assert found == [Concept(0, None, 0.0, 2, 2 / 3, 1.0)]


@given(st.data())
def test_purity_is_what_counting_says(data):
    n_images = data.draw(st.integers(1, 30))
    classes = data.draw(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=n_images, max_size=n_images))
    images = st.lists(st.integers(0, n_images - 1), unique=True, max_size=20)
    top = {neuron: data.draw(images) for neuron in range(4)}
    found = {one.latent: one for one in label_concepts(*tables(top, 4, n_images), classes, np.ones(4))}
    assert found.keys() == {neuron for neuron, images in top.items() if images}
    for neuron, one in found.items():
        counted = Counter(classes[image] for image in top[neuron][:16] if classes[image] is not None)
        most = max(counted.values(), default=0)
        assert one.purity == pytest.approx(most / min(16, len(top[neuron])))
        assert one.label == min((label for label in counted if counted[label] == most), default=None)


def test_the_best_of_a_class_has_the_highest_maximum_times_frequency():
    def concept(latent: int, label: str, frequency: float, max_token: float) -> Concept:
        return Concept(latent, label, 1.0, 20, frequency, max_token)

    some = [
        concept(0, "cat", 0.1, 2.0),
        concept(1, "cat", 0.4, 1.0),
        concept(2, "dog", 0.5, 3.0),
        concept(3, "dog", 1.0, 1.5),
    ]
    assert [one.latent for one in best_of_each(some)] == [2, 1]
    assert best_of_each(some[::-1]) == best_of_each(some)
    assert sorted(some, key=lambda one: one.support) == some


# By text


def test_mean_embeddings_and_search_against_a_dense_computation(write_store, tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(12, 5)).astype(np.float32)
    kept = np.array([0, 1, 3, 4, 5, 7, 8, 10, 11])  # the others could not be read
    parts = [kept[kept < 6], kept[kept >= 6]]
    store = write_store(tmp_path, [(part, np.full(len(part), -1), vectors[part]) for part in parts])
    top = {0: [0, 11], 2: [3, 4, 5, 10], 7: [8]}
    _, top_image = tables(top, 9, 12)
    means = mean_embeddings(top_image, store, [7, 0, 2])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for mean, neuron in zip(means, (7, 0, 2), strict=True):
        expected = unit[top[neuron]].mean(axis=0)
        np.testing.assert_allclose(mean, expected / np.linalg.norm(expected), rtol=1e-6)

    concepts = [Concept(neuron, None, 0.0, 1, 0.1, 1.0) for neuron in (7, 0, 2)]
    text = unit[8]
    found = search(text, means, concepts)
    assert found[0].concept.latent == 7
    assert found[0].similarity == pytest.approx(1)
    assert [one.similarity for one in found] == sorted((means @ text).tolist(), reverse=True)


def test_texts_of_transformers_are_embedded_as_transformers_does(device: str):
    texts = ["star", "a photo of a red star on a striped background", "a blue key"]
    embedded = load_text_encoder(CLIP, device=device).embed_texts(texts)
    model, tokenizer = AutoModel.from_pretrained(CLIP, dtype="float32"), AutoTokenizer.from_pretrained(CLIP)
    with torch.no_grad():
        for text, vector in zip(texts, embedded, strict=True):
            alone = model.get_text_features(**tokenizer([text], return_tensors="pt")).pooler_output[0]
            torch.testing.assert_close(vector, alone / alone.norm(), rtol=1e-4, atol=1e-5)


def test_texts_of_open_clip_are_embedded_as_open_clip_does(device: str):
    open_clip = pytest.importorskip("open_clip")
    texts = ["star", "a photo of a red star"]
    embedded = load_text_encoder(JUDGE, device=device).embed_texts(texts)
    name = JUDGE.removeprefix("open_clip:")
    model = open_clip.create_model(name).eval()
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer(name)(texts), normalize=True)
    torch.testing.assert_close(embedded, expected, rtol=1e-4, atol=1e-5)


def test_texts_and_images_share_a_space():
    """Images as the encoder projects them are most like the texts that say what they show."""
    from sae_ray.world.render import attributes, render

    shown = {attributes(index).shape: index for index in range(40_000, 40_400) if attributes(index).shape}
    shapes = ["star", "heart", "key", "moon"]
    preprocess = load_preprocess(CLIP)
    images: list[Image.Image] = [render(shown[shape]) for shape in shapes]
    pixels = torch.from_numpy(np.stack([preprocess(image) for image in images]))
    site = Site.parse("projection")
    tapped = load_encoder(CLIP).tap(pixels, [site], shapes, 0)[site].activation
    texts = load_text_encoder(CLIP).embed_texts([f"a photo of a {shape}" for shape in shapes])
    similarity = torch.nn.functional.normalize(tapped, dim=1) @ texts.T
    assert similarity.argmax(1).tolist() == [0, 1, 2, 3]


def test_an_encoder_of_images_alone_has_no_texts(tiny_llava):
    with pytest.raises(UsageError, match="model type llava, which does not embed texts; name a CLIP, SigLIP or open_"):
        load_text_encoder(tiny_llava)
    with pytest.raises(UsageError, match="there is no directory /nowhere"):
        load_text_encoder("/nowhere")


def test_siglip_reads_texts_padded_to_full_length(tmp_path):
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = shape | {"vocab_size": 128, "max_position_embeddings": 12, "projection_size": 16}
    torch.manual_seed(0)
    model = SiglipModel(
        SiglipConfig(text_config=text, vision_config=shape | {"image_size": 28, "patch_size": 14})
    ).eval()
    model.save_pretrained(tmp_path)
    SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(CLIP)
    tokenizer.save_pretrained(tmp_path)
    tokens = tokenizer(["a red star"], padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        expected = model.get_text_features(**tokens).pooler_output
    found = load_text_encoder(str(tmp_path)).embed_texts(["a red star"])
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=1), rtol=1e-4, atol=1e-5)
