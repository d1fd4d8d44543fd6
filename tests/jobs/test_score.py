import shutil

import numpy as np
import pytest
import torch
from sae_ray.jobs import score

from sae_ray import monosemanticity
from sae_ray.errors import SaeRayError
from sae_ray.sae import load_sae
from sae_ray.store.activations import ActivationStore


def dense(folder) -> tuple[np.ndarray, torch.Tensor]:
    store = ActivationStore(folder)
    parts = [store.read(number) for number in range(len(store.parts))]
    return np.concatenate([p[0] for p in parts]), torch.from_numpy(np.concatenate([p[2] for p in parts])).float()


def test_scores_equal_a_dense_computation(finished, make_plan):
    for one in make_plan(finished).scores:
        index, x = dense(one.activations.step.folder)
        _, embeddings = dense(one.embeddings.step.folder)
        codes = load_sae(one.sae.step.folder).encode(x) if one.sae else x
        table = one.step.folder.read_parquet("scores.parquet").to_pydict()
        np.testing.assert_allclose(table["ms"], monosemanticity(codes, embeddings).numpy(), rtol=1e-6, atol=1e-8)
        assert table["n_firing"] == (codes > 0).sum(0).tolist()
        np.testing.assert_allclose(table["max_image"], codes.max(0).values.numpy(), rtol=1e-6)
        top = one.step.folder.read_parquet("top_images.parquet").to_pandas()
        for neuron in (0, codes.shape[1] - 1):
            mine = top[top.neuron == neuron].sort_values("rank")
            order = sorted(range(len(index)), key=lambda row: (-codes[row, neuron].item(), index[row]))[:16]
            expected = [int(index[row]) for row in order if codes[row, neuron] != 0]
            assert mine.image_index.tolist() == expected


def test_bits_do_not_depend_on_the_workers(ray_cluster, finished, make_plan, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sae_ray.scores.scoring.IMAGES_PER_BLOCK", 50
    )  # three blocks, so that there is something to fold
    monkeypatch.setattr(score, "BLOCKS_PER_FOLD", 2)  # twice
    found = []
    for workers in (1, 4):
        root = tmp_path / str(workers)
        shutil.copytree(finished, root)
        for path in root.glob("scores-*"):
            shutil.rmtree(path)
        plan = make_plan(root, **{"resources.score.workers": workers})
        score.run(plan)
        tables = ("scores", "top_images", "histogram")
        found.append([one.step.folder.read_bytes(f"{name}.parquet") for one in plan.scores for name in tables])
    assert found[0] == found[1]


def test_pictures_may_come_from_the_training_images(ray_cluster, finished, make_plan, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(finished, root)
    plan = make_plan(root, **{"scoring.pictures": "train"})
    done_before = [one for one in plan.scores if one.step.finished]
    assert {one.activations.images.name for one in done_before} == {"heldout"}
    score.run(plan)
    pictures = [one for one in plan.scores if one.activations.images.name == "train"]
    assert len(pictures) == len(done_before)
    for one in pictures:
        scores = one.step.folder.read_parquet("scores.parquet").to_pydict()
        assert np.isnan(scores["ms"]).all(), "MS is for unseen images"
        assert one.step.folder.read_parquet("top_images.parquet").num_rows > 0


def test_what_is_missing_is_named(ray_cluster, extracted, make_plan):
    with pytest.raises(SaeRayError, match=r"sae-projection-batch_topk-x2-k4 does not exist yet; run the train stage"):
        score.run(make_plan(extracted))


def test_saes_share_a_read_where_no_slot_idles_for_it(finished, make_plan):
    plan = make_plan(finished, **{"grid.expansions": [1, 2, 4], "grid.k": [2, 4]})
    todo = plan.scores
    assert len(todo) == 1 + 2 * 3 * 2

    def sizes(slots: int, limit: float = 1e12) -> list[int]:
        found = list(score.groups(todo, ActivationStore, slots, limit))
        assert [one for group in found for one in group] == todo
        return [len(group) for group in found]

    assert sizes(slots=1) == [13]  # one block
    assert sizes(slots=4) == [4, 4, 4, 1]
    assert sizes(slots=100) == [1] * 13
    store = ActivationStore(todo[0].activations.step.folder)
    limit = 3 * max(score.held_bytes(one, store) for one in todo)
    for group in score.groups(todo, ActivationStore, 1, limit):
        assert sum(score.held_bytes(one, store) for one in group) <= limit
    assert sizes(slots=1, limit=1) == [1] * 13  # one at least
