"""Guided SAEs: against the reference of G-SAE (tests/golden/README.md), known answers, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sae_ray.concepts import Labels, balanced_rows, fms
from sae_ray.errors import UsageError
from sae_ray.sae import (
    BundleJob,
    Cell,
    CellJob,
    CellTrainer,
    TrainingConfig,
    evaluate,
    evaluate_store,
    load_sae,
    save_sae,
    train_cells,
)
from sae_ray.sae.architectures import ARCHITECTURES
from sae_ray.sae.architectures.guided_topk import GuidanceSettings
from sae_ray.sae.guidance import ConceptSums, concept_loss
from sae_ray.sae.ranks import ALONE
from sae_ray.sae.targets import Targets
from sae_ray.store.activations import ActivationStore
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step

GOLDEN = Path(__file__).parents[1] / "golden"
FACTS = json.loads((GOLDEN / "gsae.json").read_text())
NAMES = {"W_enc_t": "encoder_weight", "W_dec": "decoder_weight", "b_enc": "latent_bias", "b_dec": "pre_bias"}
RUNS = {"vanilla": GuidanceSettings(concept_weight=0), "guided": GuidanceSettings(),
        "guided_scaling_3": GuidanceSettings(positive_weight=3)}  # fmt: skip


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "gsae.safetensors")


def close(left: torch.Tensor, right: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


def of_reference(golden: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    found = {name: golden[f"{prefix}.{theirs}"] for name, theirs in NAMES.items()}
    return found | {"W_dec": found["W_dec"].T}


def trainer_of(golden: dict[str, torch.Tensor], run: str) -> CellTrainer:
    training = TrainingConfig(
        batch_size=FACTS["batch"], steps=FACTS["steps"], learning_rate=FACTS["lr"], warmup_steps=0,
        gradient_clip=FACTS["grad_clip"],
    )  # fmt: skip
    cell = Cell("guided_topk", FACTS["d_sae"] / FACTS["d_in"], k=FACTS["k"], training=training, settings=RUNS[run])
    trainer = CellTrainer(cell, FACTS["d_in"], concepts=("a", "b", "c") if cell.guided else ())
    for name, value in of_reference(golden, "init").items():
        trainer.weights.named()[name].data.copy_(value)
    return trainer


@pytest.mark.parametrize("run", RUNS)
def test_the_first_step_is_that_of_the_reference(golden: dict[str, torch.Tensor], run: str, monkeypatch):
    """Loss, both of its terms, and every gradient."""
    trainer, seen = trainer_of(golden, run), {}
    plain = trainer._gradients

    def noting(loss):
        gradients, norm = plain(loss)
        for name, (rows, values) in gradients.items():
            seen[name] = torch.zeros_like(trainer.weights.named()[name].detach()).index_copy_(0, rows, values)
        return gradients, norm

    monkeypatch.setattr(trainer, "_gradients", noting)
    targets = golden["labels"][:8] if trainer.concepts else None
    metrics = trainer.step(golden["x"][:8], targets)
    theirs = f"{run}.step0"
    assert metrics.loss == pytest.approx(golden[f"{theirs}.loss_per_sample"].mean().item(), abs=1e-6)
    assert metrics.reconstruction_loss == pytest.approx(golden[f"{theirs}.nmse_per_sample"].mean().item(), abs=1e-6)
    if trainer.concepts:
        assert metrics.concept_loss == pytest.approx(golden[f"{theirs}.bce"].sum(1).mean().item(), abs=1e-6)
    assert (metrics.l0, metrics.n_dead) == (FACTS["k"], 0)
    for name, value in of_reference(golden, f"{theirs}.grad").items():
        close(seen[name], value, 1e-6)


@pytest.mark.parametrize("run", ["vanilla", "guided"])
def test_twenty_steps_are_those_of_the_reference(golden: dict[str, torch.Tensor], run: str):
    trainer, losses = trainer_of(golden, run), []
    for x, targets in zip(golden["x"].split(8), golden["labels"].split(8), strict=True):
        losses.append(trainer.step(x, targets if trainer.concepts else None).loss)
    close(torch.tensor(losses), golden[f"{run}.losses"], 1e-5)
    for name, value in of_reference(golden, f"{run}.final").items():
        close(trainer.weights.named()[name].detach(), value, 1e-5)


def test_codes_are_those_of_the_reference(golden: dict[str, torch.Tensor], tmp_path: Path):
    trained = trainer_of(golden, "guided").export(1.0)
    save_sae(trained, Folder(tmp_path))
    sae, x = load_sae(tmp_path), golden["x"][:8]
    assert sae.concepts == trained.concepts == ("a", "b", "c")
    close(sae.pre_of_first(x, 32), golden["step0.pre"], 1e-6)
    for codes in (sae.encode(x), sae.encode_sparse(x).to_dense()):
        close(codes, golden["step0.codes"], 1e-6)
        assert ((codes > 0).sum(1) == FACTS["k"]).all()
    close(sae.decode(sae.encode(x), x), golden["step0.reconstruction"], 1e-6)
    close(sae.decode(sae.encode_sparse(x), x), golden["step0.reconstruction"], 1e-6)
    with pytest.raises(UsageError, match="a guided_topk SAE decodes to rows of mean 0; give what was encoded, too"):
        sae.decode(sae.encode(x))
    written = json.loads((tmp_path / "cfg.json").read_text())
    written["metadata"]["sae_ray"]["concepts"] = "abc"
    (tmp_path / "cfg.json").write_text(json.dumps(written))
    with pytest.raises(UsageError, match=r"metadata\.sae_ray\.concepts = 'abc': not a list of names"):
        load_sae(tmp_path)


def test_sae_lens_refuses_what_it_would_give_other_codes_of(tmp_path: Path):
    import sae_lens

    save_sae(CellTrainer(Cell("guided_topk", 2, k=3), 8).export(1.0), Folder(tmp_path))
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == "sae_ray_guided_topk"
    with pytest.raises((KeyError, ValueError), match="sae_ray_guided_topk"):
        sae_lens.SAE.load_from_disk(tmp_path)


def test_with_all_latents_and_no_concept_it_is_a_dense_autoencoder_of_sigmoids():
    d_in, training = 12, TrainingConfig(batch_size=16, steps=8, learning_rate=1e-2, warmup_steps=0)
    trainer = CellTrainer(Cell("guided_topk", 2, k=2 * d_in, training=training), d_in)
    W_enc, b_enc, W_dec, b_dec = (
        torch.nn.Parameter(trainer.weights.named()[name].detach().clone())
        for name in ("W_enc_t", "b_enc", "W_dec", "b_dec")
    )
    adam = torch.optim.Adam([W_enc, b_enc, W_dec, b_dec], lr=1e-2)
    for seed in range(8):
        x = torch.randn(16, d_in, generator=torch.Generator().manual_seed(seed)) + 2
        mean, spread = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        codes = (((x - mean) / (spread + 1e-5) - b_dec) @ W_enc.T + b_enc).sigmoid()
        x_hat = (codes @ W_dec + b_dec) * spread + mean
        loss = ((x - x_hat).square().mean(1) / x.square().mean(1)).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([W_enc, b_enc, W_dec, b_dec], 1.0)
        adam.step()
        assert trainer.step(x).loss == pytest.approx(loss.item(), rel=1e-4)
    close(trainer.weights.W_dec.detach(), W_dec.detach(), 1e-4)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", ["guided_topk", "guided_batch_topk", "guided_matryoshka_batch_topk"])
def test_the_loss_of_concepts_has_the_dense_gradients(name: str, reduction: Literal["sum", "mean"]):
    """Of soft targets, some of them unknown; and positives count three times in the gradient alone."""
    d_in, generator = 12, torch.Generator().manual_seed(4)
    settings = ARCHITECTURES[name].Settings(concept_reduction=reduction, positive_weight=3)
    trainer = CellTrainer(Cell(name, 4, k=3, settings=settings), d_in, concepts=tuple("abcd"))
    x = torch.randn(20, d_in, generator=generator) + 1
    targets = torch.rand(20, 4, generator=generator).round(decimals=1)
    targets[:7] = (targets[:7] > 0.5).float()
    targets[3:9, 1:3] = torch.nan
    weights, named = trainer.weights, trainer.weights.named()
    weights.b_enc.data.normal_(generator=generator)
    weights.b_dec.data.normal_(generator=generator)

    inputs = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5) if name == "guided_topk" else x
    pre = ((inputs - weights.b_dec) @ weights.W_enc_t.T + weights.b_enc)[:, :4]
    pre = pre if name == "guided_topk" else 12**0.5 * pre
    pre.register_hook(lambda grad: torch.where(targets == 1, 3 * grad, grad))
    given = targets.nan_to_num()
    entropy = -(given * F.logsigmoid(pre) + (1 - given) * F.logsigmoid(-pre)) * ~targets.isnan()
    expected = entropy.sum(1).mean() / (4 if reduction == "mean" else 1)
    scale = trainer.architecture.logit_scale(d_in)
    ours = concept_loss(weights, trainer.architecture.inputs(x), targets, settings, scale, ALONE)
    torch.testing.assert_close(ours, expected)
    of_encoder = [named[one] for one in ("W_enc_t", "b_enc", "b_dec")]
    found, wanted = (torch.autograd.grad(loss, of_encoder) for loss in (ours, expected))
    for left, right in zip(found, wanted, strict=True):
        close(left.to_dense(), right, 1e-6)


def test_guided_topk_has_the_dense_gradients():
    d_in, generator = 12, torch.Generator().manual_seed(5)
    trainer = CellTrainer(Cell("guided_topk", 4, k=3), d_in)
    weights, x = trainer.weights, torch.randn(20, d_in, generator=generator) * 3 - 1
    weights.b_dec.data.normal_(generator=generator)
    weights.b_enc.data.fill_(-1.0)
    mean, spread = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    pre = ((x - mean) / (spread + 1e-5) - weights.b_dec) @ weights.W_enc_t.T + weights.b_enc
    kept = torch.zeros_like(pre).scatter(1, pre.topk(3, dim=1).indices, 1.0)
    assert (pre[kept > 0] < 0).any(), "negative ones are selected, too"
    x_hat = ((pre.sigmoid() * kept) @ weights.W_dec + weights.b_dec) * spread + mean
    expected = ((x - x_hat).square().mean(1) / x.square().mean(1)).mean()
    forward = trainer.architecture.forward(weights, x)
    torch.testing.assert_close(forward.reconstruction_loss, expected)
    assert torch.equal(forward.fired, kept.any(0))
    named = list(weights.named().values())
    for left, right in zip(
        torch.autograd.grad(forward.reconstruction_loss, named), torch.autograd.grad(expected, named), strict=True
    ):
        close(left.to_dense(), right, 1e-6)


def labelled_mixtures(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of 64 directions in 32 dimensions: three of 60 in each row, and each of the first four in three rows of ten."""
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(64, 32, generator=torch.Generator().manual_seed(99)), dim=1)
    shown = torch.rand(rows, 4, generator=generator) < 0.3
    others = torch.rand(rows, 60, generator=generator).topk(3, dim=1).indices
    active = torch.cat([shown.float(), torch.zeros(rows, 60).scatter(1, others, 1.0)], dim=1)
    amounts = active * (1 + torch.rand(rows, 64, generator=generator))
    return amounts @ directions + 0.05 * torch.randn(rows, 32, generator=generator), shown.float()


@pytest.fixture
def one_thread():
    """Threads that share such small products cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_known_answer_each_concept_has_its_latent(one_thread):
    """By stumps on balanced held-out rows, at no loss of the reconstruction."""
    training = TrainingConfig(batch_size=256, steps=1200, learning_rate=2e-3, warmup_steps=0)
    data, (x, shown) = labelled_mixtures(256 * training.steps, seed=0), labelled_mixtures(4096, seed=1)
    error = {}
    for weight in (1.0, 0.0):
        cell = Cell("guided_topk", 4, k=16, training=training, settings=GuidanceSettings(concept_weight=weight))
        trainer = CellTrainer(cell, 32, concepts=tuple("abcd") if weight else ())
        for batch, targets in zip(*(rows.split(256) for rows in data), strict=True):
            trainer.step(batch, targets if weight else None)
        sae = trainer.export(1.0)
        error[weight] = evaluate(sae, [x]).summary().nmse
        if not weight:
            continue
        codes = sae.encode(x)
        for concept in range(4):
            labels = Labels.of(shown.numpy())
            rows = balanced_rows(labels, concept, 0)
            assert rows is not None
            found = fms(codes[rows], shown[rows, concept].int(), evaluation="heldout")
            assert found.root == concept
            assert found.accs[0] >= 0.92
    assert error[1.0] <= error[0.0] + 0.01


def guided_store(write_store, folder: Path, seed: int) -> tuple[ActivationStore, torch.Tensor]:
    """Two tokens of each of 120 images, and which concept each of the images shows."""
    rng = np.random.default_rng(seed)
    index = np.repeat(np.arange(120), 2)
    concepts = torch.from_numpy(rng.integers(-1, 3, 120))  # in part unknown
    vectors = rng.normal(size=(240, 16)).astype("f4")
    vectors[:, :3] += 8 * np.eye(3)[concepts[index]] * (concepts[index] >= 0).numpy()[:, None]
    parts = [(index[part], np.tile([0, 1], 60), vectors[part]) for part in (slice(0, 120), slice(120, 240))]
    return write_store(folder, parts), concepts


def test_targets_travel_with_the_stream_and_are_measured(write_store, tmp_path: Path):
    """By classes as by a matrix; beside a cell that is not guided, which is what it is alone."""
    store, concepts = guided_store(write_store, tmp_path / "train", 0)
    names = ("cat", "dog", "fish")
    by_class = Targets(names, concepts)
    by_matrix = Targets(names, by_class.rows(torch.arange(120)))
    training = TrainingConfig(batch_size=48, steps=150, learning_rate=1e-2)
    cells = [
        (Cell("guided_topk", 2, k=4, training=training), by_class),
        (Cell("guided_topk", 2, k=4, training=training), by_matrix),
        (Cell("guided_batch_topk", 2, k=4, training=training), by_class),
        (Cell("batch_topk", 2, k=4, training=training), None),
    ]

    def trained(some: list, root: str) -> list[CellJob]:
        steps = [Step(Folder(tmp_path / root), "train", f"sae-{number}", {}) for number in range(len(some))]
        jobs = tuple(CellJob(step, *one) for step, one in zip(steps, some, strict=True))
        train_cells(BundleJob(store.folder, jobs, stream_seed=5, shuffle_rows=100, checkpoint_every=50))
        return list(jobs)

    first, same, added, plain = trained(cells, "together")
    [alone] = trained(cells[3:], "alone")
    assert torch.equal(load_sae(plain.step.folder).W_enc, load_sae(alone.step.folder).W_enc)
    assert torch.equal(load_sae(first.step.folder).W_enc, load_sae(same.step.folder).W_enc)
    assert "concept" not in plain.step.folder.read_parquet("latents.parquet").column_names

    heldout, shown = guided_store(write_store, tmp_path / "heldout", 1)
    x = torch.from_numpy(np.concatenate([heldout.read(number)[2] for number in range(2)]))
    for job in (first, added):
        sae = load_sae(job.step.folder)
        assert sae.concepts == names
        assert job.step.folder.read_parquet("latents.parquet")["concept"].to_pylist() == [*names, *[None] * 29]
        # Held-out images have a class that was not learnt, and lack one.
        others = Targets(("cat", "cow", "dog"), shown)
        sums = ConceptSums(sae, others)
        evaluate_store(sae, heldout, also=sums.update)
        found = sums.summary()
        of_rows, codes = shown.repeat_interleave(2), sae.encode(x)
        for latent, place in ((0, 0), (1, 2)):
            known = of_rows >= 0
            positive = of_rows == place
            pre = sae.pre_of_first(x, 3)[:, latent]
            one = found["concepts"][names[latent]]
            assert (one["rows"], one["positive"]) == (known.sum(), positive.sum())
            assert one["accuracy"] == pytest.approx(((pre > 0) == positive)[known].double().mean().item())
            assert one["selected"] == pytest.approx((codes[positive, latent] > 0).double().mean().item())
        assert found["concepts"]["cat"]["accuracy"] > 0.9
        assert found["concepts"]["fish"] == {"rows": 240 - 2 * (shown < 0).sum(), "positive": 0, "selected": None,
                                             "accuracy": found["concepts"]["fish"]["accuracy"]}  # fmt: skip
    scale = load_sae(added.step.folder).metadata["norm_scale"]
    assert scale == pytest.approx(store.root_mean_square_norm)
    assert load_sae(first.step.folder).metadata["norm_scale"] == 1.0


def test_targets_of_other_concepts():
    by_class = Targets.of_classes(["dog", None, "cat"])
    assert by_class.concepts == ("cat", "dog")
    images = torch.tensor([2, 1, 0, 2])
    expected = torch.tensor([[1.0, 0.0], [math.nan, math.nan], [0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(by_class.rows(images), expected, equal_nan=True)
    matrix = Targets.of_matrix(["cat", "dog"], by_class.rows(torch.arange(3)).double().numpy())
    torch.testing.assert_close(matrix.rows(images), expected, equal_nan=True)
    wanted = ("dog", "fish")
    of_matrix = torch.stack([expected[:, 1], torch.full((4,), math.nan)], dim=1)
    torch.testing.assert_close(matrix.of(wanted).rows(images), of_matrix, equal_nan=True)
    # A class that is none of them shows none of them.
    of_classes = torch.tensor([[0.0, 0.0], [math.nan, math.nan], [1.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(by_class.of(wanted).rows(images), of_classes, equal_nan=True)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match=r"cell\.expansion = 0\.25: make it at least 3/8: each of 3 concepts"):
        CellTrainer(Cell("guided_topk", 0.25, k=1), 8, concepts=tuple("abc"))
    trainer = CellTrainer(Cell("guided_topk", 2, k=3), 8, concepts=tuple("abc"))
    for targets in (None, torch.zeros(4, 2), torch.zeros(3, 3)):
        with pytest.raises(UsageError, match=r"4 rows with 3 concepts need \[4, 3\]"):
            trainer.step(torch.ones(4, 8), targets)
