"""Training and inference against what the reference implementation computed (tests/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_ray.sae import Cell, CellTrainer, TrainingConfig, load_sae
from sae_ray.sae.selection import largest_positive

GOLDEN = Path(__file__).parents[1] / "golden"
SNAPSHOTS = {0: "step0", 9: "step9", 99: "step99", 299: "final"}
ARCHITECTURES = {"batch_top_k": "batch_topk", "matryoshka": "matryoshka_batch_topk"}


def snapshot(data: dict, name: str) -> dict[str, torch.Tensor]:
    """Weights of a snapshot, as the trainer stores them."""
    if f"{name}.W_enc" in data:
        return {
            "W_enc_t": data[f"{name}.W_enc"].T,
            "W_dec": data[f"{name}.W_dec"],
            "b_enc": data[f"{name}.b_enc"],
            "b_dec": data[f"{name}.b_dec"],
        }
    return {
        "W_enc_t": data[f"{name}.encoder.weight"],
        "W_dec": data[f"{name}.decoder.weight"].T,
        "b_enc": data[f"{name}.encoder.bias"],
        "b_dec": data[f"{name}.b_dec"],
    }


def close(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_snapshot_from_init_to_final(kind: str):
    settings = json.loads((GOLDEN / f"{kind}.json").read_text())
    data = load_file(GOLDEN / f"{kind}.safetensors")
    x = load_file(GOLDEN / "train_x.safetensors")["x"] / settings["norm_factor"]
    training = TrainingConfig(
        batch_size=settings["batch"],
        steps=settings["steps"],
        learning_rate=settings["lr"],
        warmup_steps=settings["warmup_steps"],
        decay_start=settings["decay_start"],
        auxk_weight=settings["auxk_alpha"],
        threshold_beta=settings["threshold_beta"],
        threshold_start_step=settings["threshold_start_step"],
        dead_after_samples=settings["dead_after_samples"],
    )
    cell = Cell(ARCHITECTURES[kind], settings["d_sae"] / settings["d_in"], k=settings["k"], training=training)
    assert cell.group_sizes(settings["d_in"]) == (settings["group_sizes"] or [settings["d_sae"]])
    assert settings["top_k_aux"] == settings["d_in"] // 2
    trainer = CellTrainer(cell, settings["d_in"])
    for name, value in snapshot(data, "init").items():
        trainer.weights.named()[name].data.copy_(value)

    seen = []
    for step in range(settings["steps"]):
        seen.append(trainer.step(x.view(40, 64, -1)[step % 40]))
        if step in SNAPSHOTS:
            for name, value in snapshot(data, SNAPSHOTS[step]).items():
                close(trainer.weights.named()[name].detach(), value)
            # The reference writes -1 where there is no threshold yet.
            close(trainer.threshold.nan_to_num(-1), data[f"{SNAPSHOTS[step]}.threshold"])
    assert [metrics.n_dead for metrics in seen] == data["dead"].tolist()
    assert max(metrics.n_dead for metrics in seen) > 0
    close(torch.tensor([metrics.loss for metrics in seen]), data["losses"])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_reference_checkpoint_gives_the_reference_codes(kind: str):
    data = load_file(GOLDEN / f"{kind}.safetensors")
    sae = load_sae(GOLDEN / f"{kind}.ae.pt")
    x = data["test.x"]
    assert (sae.architecture, sae.k, sae.d_in, sae.d_sae) == (ARCHITECTURES[kind], 4, 32, 128)

    codes = sae.encode(x)
    assert torch.equal(codes > 0, data["test.codes_threshold"] > 0)
    close(codes, data["test.codes_threshold"])
    close(sae.encode_sparse(x).to_dense(), data["test.codes_threshold"])
    close(sae.decode(codes), data["test.reconstruction_threshold"])
    close(sae.decode(sae.encode_sparse(x)), data["test.reconstruction_threshold"])

    values = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    chosen = largest_positive(values, sae.k * len(x))
    kept = torch.zeros(values.numel()).index_copy_(0, chosen, values.flatten()[chosen]).view_as(values)
    close(kept, data["test.codes_batch_topk"])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_export_scales_biases_and_threshold_alone(kind: str):
    settings = json.loads((GOLDEN / f"{kind}.json").read_text())
    data = load_file(GOLDEN / f"{kind}.safetensors")
    expected = load_sae(GOLDEN / f"{kind}.ae.pt")
    trainer = CellTrainer(Cell(ARCHITECTURES[kind], 4, k=4), 32)
    for name, value in snapshot(data, "final").items():
        trainer.weights.named()[name].data.copy_(value)
    trainer.threshold = data["final.threshold"]
    sae = trainer.export(settings["norm_factor"])
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        close(getattr(sae, name), getattr(expected, name))
    close(trainer.weights.b_dec.detach(), data["final.b_dec"])
