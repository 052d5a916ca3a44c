"""Low-rank chains: exact at full rank, never worse than plain truncation, errors as predicted."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.numerics.low_rank import Form, Kernel, Metric, Spectrum

Array = npt.NDArray[np.float64]
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=25, deadline=None)
kernels = st.builds(
    Kernel,
    outputs=st.integers(1, 6),
    channels=st.integers(1, 5),
    taps=st.sampled_from([(), (1, 1), (3,), (2, 3), (3, 1), (2, 2, 2)]),
)


def problem(kernel: Kernel, seed: int) -> tuple[Array, Array]:
    """A weight and a second moment whose variances differ by orders of magnitude."""
    random = np.random.default_rng(seed)
    weight = random.normal(size=(kernel.outputs, kernel.width))
    rows = random.normal(size=(kernel.width + 3, kernel.width))
    rows *= 10 ** random.uniform(-1.5, 0, kernel.width)
    return weight, rows.T @ rows / len(rows)


def error(difference: Array, moment: Array) -> float:
    return float(np.einsum("od,de,oe->", difference, moment, difference))


def all_ranks(kernel: Kernel, form: Form) -> list[tuple[int, ...]]:
    firsts = range(1, kernel.most(form) + 1)
    if form is not Form.TUCKER:
        return [(r,) for r in firsts]
    lasts = range(1, kernel.outputs + 1)
    return [(a, b) for a, b in itertools.product(firsts, lasts) if b <= a * kernel.size]


@few
@given(kernel=kernels, seed=seeds, whiten=st.booleans())
def test_full_rank_reproduces_the_weight(kernel: Kernel, seed: int, whiten: bool) -> None:
    weight, moment = problem(kernel, seed)
    spectrum = Spectrum(weight, kernel, moment if whiten else None)
    for form in kernel.forms:
        ranks: tuple[int, ...] = (kernel.most(form),)
        if form is Form.TUCKER:
            ranks = (*ranks, min(kernel.outputs, ranks[0] * kernel.size))
        chain = spectrum.chain(form, ranks)
        assert chain.ranks == ranks
        np.testing.assert_allclose(chain.dense(), weight, atol=1e-7)
        assert spectrum.loss(form, ranks) == pytest.approx(0, abs=1e-9)


@few
@given(kernel=kernels, seed=seeds)
def test_the_predicted_loss_is_the_loss_and_falls_with_the_rank(kernel: Kernel, seed: int) -> None:
    weight, moment = problem(kernel, seed)
    damped = moment + 1e-6 * np.trace(moment) / len(moment) * np.eye(len(moment))
    spectrum = Spectrum(weight, kernel, moment)
    for form in kernel.forms:
        losses = {}
        for ranks in all_ranks(kernel, form):
            chain = spectrum.chain(form, ranks)
            missed = error(weight - chain.dense(), damped) / error(weight, damped)
            losses[ranks] = spectrum.loss(form, ranks)
            assert losses[ranks] == pytest.approx(missed, abs=1e-7)
            assert sum(f.size for f in chain.factors) == kernel.parameters(form, ranks)
        for ranks, loss in losses.items():
            if (ranks[0] + 1, *ranks[1:]) in losses:
                assert losses[ranks[0] + 1, *ranks[1:]] <= loss + 1e-9


@few
@given(kernel=kernels, seed=seeds)
def test_whitened_truncation_is_never_worse_than_plain_in_the_norm_that_counts(
    kernel: Kernel, seed: int
) -> None:
    weight, moment = problem(kernel, seed)
    whitened, plain = Spectrum(weight, kernel, moment), Spectrum(weight, kernel)
    for rank in range(1, kernel.most(Form.OUTPUT) + 1):
        ours, theirs = (
            error(weight - s.chain(Form.OUTPUT, (rank,)).dense(), moment) for s in (whitened, plain)
        )
        assert ours <= theirs * (1 + 1e-6) + 1e-5 * error(weight, moment)


@few
@given(kernel=kernels, seed=seeds)
def test_plain_truncation_is_the_singular_value_decomposition(kernel: Kernel, seed: int) -> None:
    weight, _ = problem(kernel, seed)
    spectrum = Spectrum(weight, kernel)
    singular = np.linalg.svd(weight, compute_uv=False)
    for rank in range(1, kernel.most(Form.OUTPUT) + 1):
        missed = float(np.sum((weight - spectrum.chain(Form.OUTPUT, (rank,)).dense()) ** 2))
        assert missed == pytest.approx(float(np.sum(singular[rank:] ** 2)), abs=1e-8)


def test_moments_of_the_outputs_serve_as_well_as_those_of_the_inputs() -> None:
    kernel = Kernel(5, 7)
    weight, moment = problem(kernel, 1)
    by_input = Spectrum(weight, kernel, moment)
    by_output = Spectrum(weight, kernel, outputs=weight @ moment @ weight.T)
    assert by_output.forms == (Form.OUTPUT,)
    for rank in range(1, 6):
        ours, theirs = (s.chain(Form.OUTPUT, (rank,)).dense() for s in (by_output, by_input))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_spatial_chain_is_exact_for_separable_kernels_of_low_rank() -> None:
    random = np.random.default_rng(3)
    columns, rows = random.normal(size=(2, 4, 3)), random.normal(size=(6, 2, 3))
    weight = np.einsum("rci,orj->ocij", columns, rows).reshape(6, -1)
    kernel = Kernel(6, 4, (3, 3))
    spectrum = Spectrum(weight, kernel, problem(kernel, 4)[1])
    assert spectrum.loss(Form.SPATIAL, (2,)) < 1e-9
    assert spectrum.loss(Form.SPATIAL, (1,)) > 1e-3
    assert spectrum.loss(Form.OUTPUT, (2,)) > 1e-3


def test_nothing_is_lost_where_there_is_no_signal() -> None:
    kernel = Kernel(4, 3, (3, 3))
    for spectrum in (
        Spectrum(np.zeros((4, 27)), kernel, np.eye(27)),
        Spectrum(np.ones((4, 27)), kernel, np.zeros((27, 27))),
    ):
        for form in kernel.forms:
            ranks = (2, 2) if form is Form.TUCKER else (2,)
            assert np.isfinite(spectrum.loss(form, ranks))
            assert all(np.isfinite(f).all() for f in spectrum.chain(form, ranks).factors)


def test_outputs_of_the_factors_are_of_similar_size() -> None:
    """Neither factor holds all of the scale: later rounding to 8 bits needs that."""
    kernel = Kernel(8, 8)
    weight, moment = problem(kernel, 5)
    first, last = Spectrum(weight, kernel, moment).chain(Form.OUTPUT, (8,)).factors
    inner = np.sqrt(np.einsum("rd,de,re->r", first, moment, first))
    outer = np.linalg.norm(last, axis=0)
    np.testing.assert_allclose(inner, outer, rtol=0.05)


@few
@given(kernel=kernels, seed=seeds)
def test_a_metric_of_the_outputs_decides_what_is_kept(kernel: Kernel, seed: int) -> None:
    """In the metric no rank is worse than without it, and the full rank is still exact."""
    weight, moment = problem(kernel, seed)
    root = np.random.default_rng(seed).normal(size=(kernel.outputs, kernel.outputs))
    metric = Metric.of(root @ root.T + 0.1 * np.eye(kernel.outputs))
    np.testing.assert_allclose(metric.root @ metric.inverse, np.eye(kernel.outputs), atol=1e-6)
    aware, blind = Spectrum(weight, kernel, moment, metric=metric), Spectrum(weight, kernel, moment)
    most = kernel.most(Form.OUTPUT)
    np.testing.assert_allclose(aware.chain(Form.OUTPUT, (most,)).dense(), weight, atol=1e-6)
    for rank in range(1, most):
        ours, theirs = (
            error(metric.root @ (weight - s.chain(Form.OUTPUT, (rank,)).dense()), moment)
            for s in (aware, blind)
        )
        whole = error(metric.root @ weight, moment)
        assert ours <= theirs * (1 + 1e-6) + 1e-5 * whole
        assert aware.loss(Form.OUTPUT, (rank,)) == pytest.approx(ours / whole, abs=1e-4)
