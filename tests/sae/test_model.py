"""Encoding and decoding of a trained SAE."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sae_ray.errors import UsageError
from sae_ray.sae import SAE, model
from sae_ray.sae.architectures import ARCHITECTURES
from sae_ray.sae.few_latents import codes_of

D_IN, D_SAE = 6, 20


def make_sae(name: str, d_in: int = D_IN, d_sae: int = D_SAE) -> SAE:
    generator = torch.Generator().manual_seed(0)
    return SAE(
        architecture=name,
        W_enc=torch.randn(d_in, d_sae, generator=generator),
        W_dec=torch.randn(d_sae, d_in, generator=generator),
        b_enc=torch.randn(d_sae, generator=generator),
        b_dec=torch.randn(d_in, generator=generator),
        threshold=torch.rand(d_sae, generator=generator) if ARCHITECTURES[name].has_threshold else None,
        k=3,
    )


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sparse_codes_are_the_dense_ones_whatever_the_chunks(monkeypatch, name, device):
    sae, x = make_sae(name), inputs(50)
    dense = sae.encode(x)
    decoded = sae.decode(dense, x)
    sae = sae.to(device)
    whole = sae.encode_sparse(x)
    for name, size in (("_PRE_ENTRIES", 7 * D_SAE + 3), ("_PRE_ENTRIES_ON_GPU", 7 * D_SAE + 3), ("_ROWS_ON_GPU", 3)):
        monkeypatch.setattr(model, name, size)
    chunked = sae.encode_sparse(x)
    for codes in (whole, chunked):
        assert codes.values.device.type == device
        torch.testing.assert_close(codes.to_dense().cpu(), dense)
        flat = codes.rows * D_SAE + codes.latents
        assert torch.equal(flat, flat.unique())
        assert (codes.values > 0).all()
        torch.testing.assert_close(sae.decode(codes, x).cpu(), decoded)
    torch.testing.assert_close(sae.encode(x).cpu(), dense)
    torch.testing.assert_close(sae.decode(dense.to(device), x).cpu(), decoded)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_codes_of_a_few_latents_are_those_of_all(name, device):
    sae, x, latents = make_sae(name), inputs(40), [7, 0, 19]
    found = codes_of(sae.to(device), latents)(x.to(device))
    assert found.device.type == device
    torch.testing.assert_close(found.cpu(), sae.encode(x)[:, latents])
    assert codes_of(sae.to(device), [])(x).shape == (40, 0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_by_products_of_one_shape_a_row_has_the_same_bits_whatever_the_rows_beside_it(name, device):
    sae = make_sae(name, 96, 1500).to(device)
    x = torch.randn(700, 96, generator=torch.Generator().manual_seed(1))
    centred = sae._centred(x)
    whole = sae._pre_of_one_shape(centred)
    for some in (slice(0, 1), slice(256, 700), slice(3, 600), slice(699, 700)):
        assert torch.equal(sae._pre_of_one_shape(centred[some]), whole[some])
    torch.testing.assert_close(whole, sae._pre(x), rtol=1e-4, atol=1e-4)
    if device == "cuda":
        codes, some = sae.encode_sparse(x), sae.encode_sparse(x[300:400])
        kept = (codes.rows >= 300) & (codes.rows < 400)
        assert torch.equal(codes.rows[kept] - 300, some.rows)
        assert torch.equal(codes.latents[kept], some.latents)
        assert torch.equal(codes.values[kept], some.values)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_leading_axes_are_samples_like_any_other(name):
    sae, x = make_sae(name), inputs(4, 5)
    torch.testing.assert_close(sae.encode(x), sae.encode(x.view(20, D_IN)).view(4, 5, D_SAE))
    torch.testing.assert_close(sae.encode(x[0, 0]), sae.encode(x)[0, 0])
    assert sae.decode(sae.encode(x), x).shape == x.shape


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_sample_gives_no_codes(name, device):
    sae = make_sae(name).to(device)
    codes = sae.encode_sparse(inputs(0))
    assert codes.values.numel() == 0
    assert sae.decode(codes, inputs(0)).shape == (0, D_IN)


def test_the_threshold_is_strict_and_never_lets_negative_values_pass():
    sae = SAE(
        architecture="jumprelu",
        W_enc=torch.eye(4),
        W_dec=torch.eye(4),
        b_enc=torch.zeros(4),
        b_dec=torch.zeros(4),
        threshold=torch.tensor([0.5, 0.5, -2.0, 0.0]),
    )
    x = torch.tensor([[0.5, 0.75, -1.0, 0.25]])
    expected = torch.tensor([[0.0, 0.75, 0.0, 0.25]])
    assert torch.equal(sae.encode(x), expected)
    assert torch.equal(sae.encode_sparse(x).to_dense(), expected)


def test_topk_keeps_fewer_than_k_where_fewer_are_positive():
    sae = make_sae("topk")
    sae.b_enc[2:] = -1e3
    codes = sae.encode(inputs(30))
    assert (codes >= 0).all()
    assert (codes[:, 2:] == 0).all()
    assert torch.equal(sae.encode_sparse(inputs(30)).to_dense(), codes)


def test_bfloat16_weights_keep_a_float32_threshold_and_float32_codes(device):
    exact = make_sae("batch_topk").to(device)
    sae = exact.to(torch.bfloat16)
    assert sae.W_enc.dtype == sae.b_dec.dtype == torch.bfloat16
    assert torch.equal(sae.threshold, exact.threshold)
    codes = sae.encode(inputs(9).bfloat16())
    assert codes.dtype == sae.decode(codes).dtype == torch.float32
    assert sae.encode_sparse(inputs(9)).values.dtype == torch.float32
    rounded = exact.to(dtype=torch.bfloat16).to(dtype=torch.float32)
    assert torch.equal(rounded.encode(inputs(9)), sae.encode(inputs(9)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_arrays_are_taken_like_tensors(name):
    sae, x = make_sae(name), torch.randn(5, D_IN)
    codes = sae.encode(x)
    array = x.numpy()
    array.flags.writeable = False
    assert torch.equal(sae.encode(array), codes)
    assert torch.equal(sae.encode_sparse(array).values, sae.encode_sparse(x).values)
    assert torch.equal(sae.decode(codes.numpy(), array), sae.decode(codes, x))


def test_what_is_no_matrix_of_numbers_is_named():
    sae = make_sae("batch_topk")
    with pytest.raises(UsageError, match="the input is a single number; give"):
        sae.encode(torch.tensor(1.0))
    with pytest.raises(UsageError, match="str is no tensor and no array of numbers"):
        sae.encode("x.npy")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match=rf"the codes have shape \[5, 3\]; give \[..., {D_SAE}\]"):
        sae.decode(torch.zeros(5, 3))


def test_inputs_of_another_width_are_refused_with_both_widths():
    sae = make_sae("relu")
    for encode in (sae.encode, sae.encode_sparse):
        with pytest.raises(UsageError, match="7 wide, this SAE takes 6"):
            encode(torch.zeros(3, 7))
    with pytest.raises(UsageError, match="flatten"):
        sae.encode_sparse(inputs(2, 3))


@pytest.mark.parametrize(
    "change",
    [
        {"W_dec": torch.zeros(D_IN, D_SAE)},
        {"b_enc": torch.zeros(D_IN)},
        {"threshold": None},
        {"threshold": torch.zeros(1)},
    ],
)
def test_tensors_that_do_not_fit_are_refused(change):
    sae = make_sae("batch_topk")
    with pytest.raises(UsageError, match=next(iter(change))):
        replace(sae, **change)


@pytest.mark.parametrize("k", [None, 0, D_SAE + 1])
def test_a_topk_sae_needs_a_k_that_fits(k: int | None):
    with pytest.raises(UsageError, match="needs a k from 1 to 20"):
        replace(make_sae("topk"), k=k)


@pytest.mark.parametrize(
    ("name", "said"), [("batchtopk", "did you mean 'batch_topk'"), ("gated", "known here: batch_")]
)
def test_an_unknown_architecture_is_refused(name: str, said: str):
    with pytest.raises(UsageError, match=f"architecture = '{name}': unknown architecture; {said}"):
        replace(make_sae("relu"), architecture=name)
