"""The registry: what holds for every architecture, and that a new one needs no other place."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from sae_ray.sae import SAE, Cell, CellTrainer, TrainingConfig, evaluate, load_sae, save_sae
from sae_ray.sae.architectures import ARCHITECTURES
from sae_ray.sae.architectures.base import OwnSettings, PenalisedArchitecture
from sae_ray.store.files import Folder
from sae_ray.study.config import Study

D_IN, D_SAE, BATCH = 8, 32, 64
TRAINING = TrainingConfig(batch_size=BATCH, steps=40, learning_rate=1e-2)


@dataclass(frozen=True)
class PowerSettings(OwnSettings):
    """Settings of the architecture below."""

    power: float = 2.0
    """Exponent of the penalty."""


class PowerReLU(PenalisedArchitecture):
    """A ReLU whose penalty is a power of its codes: all that a new architecture has to say."""

    name = "power_relu"
    Settings = PowerSettings
    sae_lens = "standard"

    def activate(self, pre, weights):
        codes = pre.relu()
        return codes, codes.pow(self.cell.settings.power).sum(-1).mean()


NEW = PowerReLU.name
OURS_ALONE = {name for name, kind in ARCHITECTURES.items() if kind.sae_lens.startswith("sae_ray_")}
"""Those that SAELens has no form for; that it refuses them is tested with them."""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry with one more line."""
    monkeypatch.setitem(ARCHITECTURES, NEW, PowerReLU)


def batches() -> list[torch.Tensor]:
    """Sparse mixtures of fixed directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(16, D_IN, generator=generator)
    amounts = torch.rand(TRAINING.steps, BATCH, 16, generator=generator)
    return list(amounts * (amounts > 0.8) @ directions)


def rows() -> torch.Tensor:
    """Inputs that are not normalised: the SAEs below are exported for a scale of 2."""
    return 2 * torch.cat(batches()[:4])


def trained(name: str, settings: OwnSettings | None = None) -> CellTrainer:
    by = ARCHITECTURES[name].tuned_by
    amount = {by: {"k": 3, "sparsity": 0.05}[by]}
    trainer = CellTrainer(Cell(name, D_SAE / D_IN, training=TRAINING, settings=settings, **amount), D_IN)
    for batch in batches():
        trainer.step(batch)
    return trainer


@pytest.fixture(scope="module")
def saes() -> dict[str, SAE]:
    """One of every architecture."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(ARCHITECTURES, NEW, PowerReLU)
        return {name: trained(name).export(2.0) for name in ARCHITECTURES}


def test_plans_read_the_registry_without_torch():
    code = "import sys, sae_ray.sae.architectures, sae_ray.study.config; assert 'torch' not in sys.modules; print('ok')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n", done.stderr


def test_the_registry_goes_by_the_names_of_the_classes():
    assert {name: kind.name for name, kind in ARCHITECTURES.items()} == {name: name for name in ARCHITECTURES}


@pytest.mark.parametrize("name", [*ARCHITECTURES, NEW])
def test_a_trained_sae_survives_the_disk_and_sae_lens(saes: dict[str, SAE], name: str, tmp_path):
    import sae_lens

    sae, x = saes[name], rows()
    save_sae(sae, Folder(tmp_path))
    opened = load_sae(tmp_path)
    assert (opened.architecture, opened.k, opened.metadata) == (name, sae.k, sae.metadata)
    assert torch.equal(opened.encode(x), sae.encode(x))
    if name not in OURS_ALONE:
        with torch.no_grad():
            torch.testing.assert_close(sae.encode(x), sae_lens.SAE.load_from_disk(tmp_path).encode(x))
    summary = evaluate(opened, [x]).summary()
    assert summary.l0 == pytest.approx((sae.encode(x) > 0).sum(1).double().mean().item())
    assert summary.r2 > 0.1 or name == "random"


@pytest.mark.parametrize("name", [*ARCHITECTURES, NEW])
def test_sparse_codes_are_the_dense_ones(saes: dict[str, SAE], name: str):
    sae, x = saes[name], rows()
    codes = sae.encode(x)
    assert 0 < (codes > 0).sum() < codes.numel()
    assert torch.equal(sae.encode_sparse(x).to_dense(), codes)


@pytest.mark.parametrize("name", [*ARCHITECTURES, NEW])
def test_latents_that_do_not_compete_have_the_same_codes_by_themselves(saes: dict[str, SAE], name: str):
    sae, x, part = saes[name], rows(), slice(3, 9)
    threshold = None if sae.threshold is None else sae.threshold[part]
    few = replace(sae, W_enc=sae.W_enc[:, part], W_dec=sae.W_dec[part], b_enc=sae.b_enc[part], threshold=threshold)
    alone, together = few.encode(x), sae.encode(x)[:, part]
    assert torch.allclose(alone, together, atol=1e-6) != sae.kind.latents_compete


def test_a_new_architecture_is_its_class_and_a_line_in_the_registry():
    before, after = trained(NEW), trained(NEW, PowerSettings(1.0))
    relu = trained("relu")
    assert torch.equal(after.weights.W_enc_t, relu.weights.W_enc_t), "to the power of 1 it is the L1 penalty"
    assert not torch.equal(before.weights.W_enc_t, relu.weights.W_enc_t)
    assert before.cell.identity()["settings"] == {}
    assert after.cell.identity()["settings"] == {"power": 1.0}
    values = {
        "name": "s",
        "images": {"train": {"path": "/images"}},
        "encoder": {"model": "/clip"},
        "grid": [{"sites": ["projection"], "architectures": [NEW, "topk"], "sparsity": [0.1], "k": [3]}],
    }
    names = [cell.name for cell in Study.from_dict(values).cells()]
    assert names == ["projection-power_relu-x8-s0.1", "projection-topk-x8-k3"]
