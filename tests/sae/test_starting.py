"""SAEs that start from another one, or with the second moment of the activations taken out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.sae import SAE, BundleJob, Cell, CellJob, CellTrainer, TrainingConfig, load_sae, save_sae, train_cells
from sae_ray.sae.architectures import ARCHITECTURES
from sae_ray.sae.architectures.jumprelu import JumpReLUSettings
from sae_ray.sae.second_moment import RIDGE, SecondMoment
from sae_ray.sae.starting import start_from, start_whitened, weights_digest
from sae_ray.store.activations import ActivationStore
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step

D_IN, BATCH, SCALE = 12, 24, 2.0
TRAINING = TrainingConfig(steps=40, batch_size=BATCH, learning_rate=3e-3, warmup_steps=5, threshold_start_step=3)
OWN = {"jumprelu": JumpReLUSettings(bandwidth=0.1, initial_threshold=0.05)}
AIP = JumpReLUSettings(init="aip")


def make_cell(name: str, training: TrainingConfig = TRAINING, **settings) -> Cell:
    by = ARCHITECTURES[name].tuned_by
    amount = {by: {"k": 3, "sparsity": 0.02}[by]}
    return Cell(name, **{"expansion": 4, "training": training, "settings": OWN.get(name)} | amount | settings)


def make_batches(n: int) -> torch.Tensor:
    return torch.randn(n, BATCH, D_IN, generator=torch.Generator().manual_seed(1)) / 4 + 0.1


def scale_of(name: str, scale: float) -> float:
    """Of the inputs of an architecture; some need none."""
    return 1.0 if ARCHITECTURES[name].standardises_rows else scale


def trained(name: str) -> SAE:
    trainer = CellTrainer(make_cell(name), D_IN)
    for batch in make_batches(30):
        trainer.step(batch)
    sae = trainer.export(scale_of(name, SCALE))
    assert sae is not None
    return sae


@pytest.mark.parametrize("offset", [None, 0.7])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_sae_goes_on_where_it_was(name: str, offset: float | None):
    """Also for activations of another scale, from which something is subtracted; the first step of a warm-up changes
    nothing."""
    sae, scale = trained(name), scale_of(name, 3.0)
    trainer = CellTrainer(make_cell(name), D_IN)
    centre = None if offset is None or ARCHITECTURES[name].standardises_rows else torch.full((D_IN,), offset)
    start_from(trainer, sae, scale, centre)
    before = {key: value.detach().clone() for key, value in trainer.weights.named().items()}
    trainer.step(make_batches(1)[0])
    for key, value in trainer.weights.named().items():
        torch.testing.assert_close(value.detach(), before[key], msg=key)  # `b_dec` is no median
    x = SCALE * make_batches(1)[0]
    scaled = (x if centre is None else x - centre) / scale
    ours = trainer.architecture.forward(trainer.weights, scaled)
    reconstruction = x - scale * ours.residual
    if not sae.kind.estimates_threshold:
        torch.testing.assert_close(reconstruction, sae.decode(sae.encode(x), x), rtol=1e-4, atol=1e-5)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    if sae.kind.tuned_by == "sparsity":
        torch.testing.assert_close(scale * ours.pre, pre, rtol=1e-4, atol=1e-5)


def test_decoder_rows_of_any_length_get_the_length_one():
    sae = trained("relu")
    factors = torch.linspace(0.5, 2, sae.d_sae)
    scaled = replace(sae, W_dec=sae.W_dec * factors[:, None], W_enc=sae.W_enc / factors, b_enc=sae.b_enc / factors)
    assert weights_digest(scaled) != weights_digest(sae)
    starts = [CellTrainer(make_cell("relu"), D_IN) for _ in range(2)]
    for trainer, one in zip(starts, (sae, scaled), strict=True):
        start_from(trainer, one, SCALE)
    for one, other in zip(*(trainer.weights.named().values() for trainer in starts), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("after", [0, 3])
def test_a_resumed_warm_start_equals_the_uninterrupted_run(after: int):
    sae, batches = trained("batch_topk"), make_batches(8)
    whole, stopped, resumed = (CellTrainer(make_cell("batch_topk"), D_IN) for _ in range(3))
    for trainer in (whole, stopped):
        start_from(trainer, sae, SCALE)
    for batch in batches:
        whole.step(batch)
    for batch in batches[:after]:
        stopped.step(batch)
    resumed.restore(*stopped.state())
    for batch in batches[after:]:
        resumed.step(batch)
    for one, other in zip(whole.weights.named().values(), resumed.weights.named().values(), strict=True):
        assert torch.equal(one, other)


def test_the_digest_is_of_the_weights_wherever_they_lie(tmp_path: Path):
    sae = trained("jumprelu")
    for place in ("here", "there"):
        save_sae(replace(sae, metadata={"of": place}), Folder(tmp_path / place))
    digests = {weights_digest(load_sae(tmp_path / place)) for place in ("here", "there")}
    assert digests == {weights_digest(sae)}
    assert sae.threshold is not None
    assert weights_digest(replace(sae, threshold=sae.threshold + 1)) not in digests


@pytest.fixture
def store(write_store, tmp_path: Path) -> ActivationStore:
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(D_IN, D_IN))
    parts = [
        (np.arange(150) + 150 * n, np.zeros(150), (rng.normal(size=(150, D_IN)) @ mixed).astype("f4") + 1)
        for n in range(2)
    ]
    return write_store(tmp_path / "activations", parts)


def train(store: ActivationStore, root: Path, cell: Cell, digest: str | None = None) -> CellJob:
    job = CellJob(Step(Folder(root), "train", "sae", {}), cell, init_digest=digest)
    train_cells(BundleJob(store.folder, (job,), stream_seed=5, shuffle_rows=500, checkpoint_every=20))
    return job


@pytest.mark.parametrize("centre", [False, True])
def test_a_bundle_starts_from_an_sae_on_disk(store: ActivationStore, tmp_path: Path, centre: bool):
    """With learning rates of almost 0 it stays the same one; another one in its place is refused."""
    first = train(store, tmp_path / "first", make_cell("topk"))
    init = str(Path(first.step.folder.path))
    sae = load_sae(init)
    still = replace(TRAINING, learning_rate=1e-12, init=init, centre=centre)
    again = load_sae(
        train(store, tmp_path / "again", make_cell("topk", still, seed=7), weights_digest(sae)).step.folder
    )
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        torch.testing.assert_close(getattr(again, name), getattr(sae, name), rtol=1e-4, atol=1e-5)
    with pytest.raises(SaeRayError, match=r"training\.init = .* has changed since the study was planned"):
        train(store, tmp_path / "other", make_cell("topk", still), "0" * 64)


def test_a_start_is_given_once():
    with pytest.raises(UsageError, match=r"architectures\.jumprelu\.init = 'aip': training\.init names an SAE"):
        make_cell("jumprelu", replace(TRAINING, init="/somewhere"), settings=AIP)


# With the second moment taken out


def test_a_whitened_start_finds_the_support_of_a_coherent_dictionary():
    """Identity and Hadamard matrix in 256 dimensions: cosines of at most 1/16, three atoms a sample. The threshold is
    in the interval of arXiv 2509.20784's theorem on a single pass; without one the support is wrong."""
    d = 256
    atoms = torch.cat([torch.eye(d), torch.from_numpy(hadamard(d)).float() / 16])
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(2000, 2 * d, generator=generator).topk(3, dim=1).indices
    amounts = torch.zeros(2000, 2 * d).scatter(1, chosen, 1 + torch.rand(2000, 3, generator=generator) / 2)
    moment = SecondMoment(d)
    signs = torch.randint(0, 2, (20_000, 3), generator=generator) * 2.0 - 1
    for part in torch.rand(20_000, 2 * d, generator=generator).topk(3, dim=1).indices.split(5000):
        moment.add(torch.zeros(len(part), 2 * d).scatter(1, part, signs[: len(part)]) @ atoms)
    trainer = CellTrainer(Cell("jumprelu", 2, sparsity=0.1, settings=AIP), d)
    trainer.weights.W_dec.data.copy_(atoms)
    start_whitened(trainer, moment)
    sae = SAE(
        "jumprelu", trainer.weights.W_enc_t.detach().T, atoms, torch.zeros(2 * d), torch.zeros(d),
        torch.full((2 * d,), 0.547),
    )  # fmt: skip
    codes = sae.encode(amounts @ atoms)
    assert ((codes > 0) == (amounts > 0)).all(1).sum() == 2000
    relu = SAE("relu", sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)
    assert ((relu.encode(amounts @ atoms) > 0) == (amounts > 0)).all(1).sum() < 100


def test_a_whitened_encoder_reads_each_atom_as_one(store: ActivationStore, tmp_path: Path):
    """And another atom as the atomic inner product of the two does. A common offset is taken out with the rest."""
    moment = SecondMoment.of_store(store)
    trainer = CellTrainer(make_cell("jumprelu", settings=AIP), D_IN)
    start_whitened(trainer, moment)
    W_enc, W_dec = (trainer.weights.named()[name].detach().double() for name in ("W_enc_t", "W_dec"))
    S = torch.linalg.inv(torch.from_numpy(moment.matrix()))
    products = W_dec @ S @ W_dec.T
    torch.testing.assert_close(W_dec @ W_enc.T, products / products.diag(), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(W_enc, W_dec, atol=0.1)
    found = load_sae(train(store, tmp_path / "root", make_cell("jumprelu", settings=AIP)).step.folder)
    tied = load_sae(train(store, tmp_path / "tied", make_cell("jumprelu")).step.folder)
    assert not torch.allclose(found.W_enc, tied.W_enc, atol=0.1)


@pytest.mark.parametrize("centre", [False, True])
def test_a_whitened_start_is_that_of_the_activations_as_they_are_trained_on(
    store: ActivationStore, tmp_path: Path, centre: bool
):
    still = replace(TRAINING, learning_rate=1e-12, centre=centre)
    found = load_sae(train(store, tmp_path / "root", make_cell("jumprelu", still, settings=AIP)).step.folder)
    rows = np.concatenate([store.read(number)[2] for number in store.parts]).astype("f8")
    rows -= centre * rows.mean(0)
    moment = torch.from_numpy(rows.T @ rows / len(rows))
    metric = torch.linalg.inv(moment + RIDGE * moment.trace() / D_IN * torch.eye(D_IN))
    W_enc, W_dec = found.W_enc.double(), found.W_dec.double()
    products = W_dec @ metric @ W_dec.T
    torch.testing.assert_close(W_dec @ W_enc, products / products.diag(), rtol=1e-3, atol=1e-3)


def test_the_moment_of_a_store_is_that_of_its_rows(store: ActivationStore, monkeypatch: pytest.MonkeyPatch):
    rows = np.concatenate([store.read(number)[2] for number in store.parts]).astype("f8")
    whole = SecondMoment.of_store(store)
    np.testing.assert_allclose(whole.matrix(), rows.T @ rows / len(rows))
    np.testing.assert_allclose(whole.variances, rows.var(0))
    monkeypatch.setattr("sae_ray.sae.second_moment.MOMENT_ROWS", 100)
    some = SecondMoment.of_store(store)
    assert some.n_rows == 100
    np.testing.assert_allclose(some.products, rows[::3].T @ rows[::3])
