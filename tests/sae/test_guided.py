"""Guided SAEs: against the reference of G-SAE (tests/golden/README.md), known answers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_ray.errors import UsageError
from sae_ray.sae import Cell, CellTrainer, TrainingConfig, load_sae, save_sae
from sae_ray.sae.architectures.guided_topk import GuidanceSettings
from sae_ray.store.files import Folder

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
