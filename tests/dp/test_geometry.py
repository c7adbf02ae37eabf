"""Spectra against numpy and random matrices of known law; the projection; the geometric median by brute force."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oral4.dp.audit import gaussian_mu
from oral4.dp.geometry import (
    SubspaceProjection,
    decay_exponent,
    flat_gradient,
    gradient_pca,
    hessian_operator,
    lanczos,
    lanczos_density,
    marchenko_pastur,
    median_gradient,
    median_loss,
    median_weights,
    orthogonal_iteration,
    private_median,
    random_directions,
    second_moment_operator,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def with_spectrum(values, seed=0):
    """A symmetric matrix with these eigenvalues and random directions."""
    basis = random_directions(len(values), len(values), generator=seeded(seed))
    return basis.T @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ basis


def stack_with_decay(n, p, exponent, seed=0, dtype=torch.float64):
    """Gradients whose second moment has eigenvalues k ** -exponent, exactly."""
    left = random_directions(min(n, p), n, generator=seeded(seed))
    right = random_directions(min(n, p), p, generator=seeded(seed + 1))
    scale = torch.arange(1, min(n, p) + 1, dtype=torch.float64) ** (-exponent / 2)
    return (math.sqrt(n) * (left.T * scale) @ right).to(dtype)


def reference(gradients):
    """Eigenvalues and directions of G^T G / n by numpy, largest first."""
    wide = gradients.double().numpy()
    values, vectors = np.linalg.eigh(wide.T @ wide / len(wide))
    return values[::-1], vectors[:, ::-1].T


def angle(found, expected):
    """Sine of the largest angle between two subspaces given by orthonormal rows."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected.copy())
    return float(torch.linalg.matrix_norm(expected - (expected @ found.T) @ found, ord=2))


# -------------------------------------------------------------------------------------------------------- operators


def test_second_moment_is_the_product_whatever_the_chunk():
    gradients = torch.randn(37, 11, generator=seeded(), dtype=torch.float64)
    vectors = torch.randn(11, 3, generator=seeded(1), dtype=torch.float64)
    expected = gradients.T @ gradients @ vectors / 37
    for chunk in (1, 10, 64):
        found = second_moment_operator(gradients, chunk=chunk)(vectors)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # float64, 37 terms
    half = second_moment_operator(gradients.bfloat16())(vectors)
    torch.testing.assert_close(half, (gradients.bfloat16().double().T @ gradients.bfloat16().double()) @ vectors / 37)


def test_hessian_operator_is_the_hessian():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3, generator=seeded(), dtype=torch.float64), torch.arange(6) % 2
    weights = list(model.parameters())
    sizes = [w.numel() for w in weights]

    def value(flat):
        named = dict(
            zip(
                dict(model.named_parameters()),
                (p.view_as(w) for p, w in zip(flat.split(sizes), weights, strict=True)),
                strict=True,
            )
        )
        return torch.nn.functional.cross_entropy(torch.func.functional_call(model, named, (x,)), y)

    flat = torch.cat([w.detach().flatten() for w in weights])
    expected = torch.autograd.functional.hessian(value, flat)
    found = hessian_operator(lambda: torch.nn.functional.cross_entropy(model(x), y), weights)(
        torch.eye(len(flat)).double()
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    wider = hessian_operator(lambda: torch.nn.functional.cross_entropy(model(x), y), [*weights, unused])
    assert not wider(torch.eye(len(flat) + 2).double())[-2:].any()  # a weight without influence
    with pytest.raises(ValueError, match=r"require gradients"):
        hessian_operator(lambda: torch.zeros(()), [torch.ones(2)])


# --------------------------------------------------------------------------------------------------- eigenvalues


@pytest.mark.parametrize("method", ["lanczos", "orthogonal", "gram"])
@pytest.mark.parametrize("shape", [(30, 80), (80, 30), (40, 40)], ids=str)
def test_gradient_pca_against_numpy(method, shape):
    gradients = stack_with_decay(*shape, 2.0)
    found = gradient_pca(
        gradients, 5, method=method, iterations=400 if method == "orthogonal" else None, generator=seeded()
    )
    values, directions = reference(gradients)
    np.testing.assert_allclose(found.values, values[:5], rtol=0, atol=1e-10)  # the stated residual, and rounding
    # 400 iterations shrink the error of direction 5 by (5 / 6) ** 800; Lanczos stops at residuals of 1e-10
    assert angle(found.directions, directions[:5]) < 1e-8
    torch.testing.assert_close(found.directions @ found.directions.T, torch.eye(5).double(), rtol=0, atol=1e-10)
    assert found.total == pytest.approx(float(gradients.square().sum()) / shape[0], rel=1e-12)
    assert float(found.explained()[-1]) == pytest.approx(values[:5].sum() / values.sum(), rel=1e-9)
    assert float(found.outside()[-1]) == pytest.approx(math.sqrt(values[5:].sum()), rel=1e-9)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000), st.data())
@settings(max_examples=40, deadline=None)
def test_lanczos_agrees_with_the_reference_for_any_stack(n, p, seed, data):
    rank = data.draw(st.integers(1, min(n, p)))
    gradients = torch.randint(-2, 3, (n, p), generator=seeded(seed)).double()  # often of low rank, with equal values
    if not gradients.any():
        with pytest.raises(ValueError, match=r"all zero"):
            gradient_pca(gradients, rank)
        return
    values, _ = reference(gradients)
    for method in ("lanczos", "gram"):
        found = gradient_pca(gradients, rank, method=method, generator=seeded(1))
        np.testing.assert_allclose(found.values, values[:rank].clip(min=0), rtol=0, atol=1e-9 * values[0])
        torch.testing.assert_close(found.directions @ found.directions.T, torch.eye(rank).double(), rtol=0, atol=1e-8)


def test_float32_gradients_lose_nothing_to_the_square():
    """In float32 the small eigenvalues of G^T G drown; the products are taken in float64."""
    gradients = stack_with_decay(60, 200, 6.0, dtype=torch.float32)
    exact = np.linalg.svd(gradients.double().numpy(), compute_uv=False) ** 2 / 60
    for method in ("lanczos", "gram"):
        found = gradient_pca(gradients, 20, method=method, generator=seeded()).values
        np.testing.assert_allclose(found, exact[:20], rtol=1e-5)  # values fall to 20^-6 = 1.6e-8
    naive = torch.linalg.eigvalsh(gradients @ gradients.T / 60).flip(0)[:20].double()
    assert abs(naive[-1] / exact[19] - 1) > 0.1


def test_the_official_ten_iterations_underestimate_the_last_directions():
    values = torch.arange(1, 301, dtype=torch.float64) ** -1.0
    matrix = with_spectrum(values)
    found = orthogonal_iteration(lambda v: matrix @ v, 300, 40, iterations=10, generator=seeded())
    assert float(found.values[0]) == pytest.approx(1, abs=1e-12)  # (1 / 41) ** 20
    assert float(found.values[-1]) < 0.99 * float(values[39])  # (40 / 41) ** 20 has hardly begun
    more = orthogonal_iteration(lambda v: matrix @ v, 300, 40, iterations=10, oversample=40, generator=seeded())
    assert abs(float(more.values[-1] / values[39]) - 1) < 1e-4
    assert float(found.residuals[-1]) > 10 * float(more.residuals[-1])


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=15), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_residuals_bound_the_errors(values, seed):
    matrix = with_spectrum(values, seed)
    exact = torch.linalg.eigvalsh(matrix)
    steps = max(1, len(values) // 2)
    part = lanczos(lambda v: matrix @ v, len(values), steps, generator=seeded(seed)).eigen()
    for value, residual in zip(part.values, part.residuals, strict=True):
        assert float((exact - value).abs().min()) <= float(residual) + 1e-10
    torch.testing.assert_close(
        (matrix @ part.vectors - part.vectors * part.values).norm(dim=0), part.residuals, rtol=0, atol=1e-8
    )
    rank = max(1, len(values) // 3)
    iterated = orthogonal_iteration(lambda v: matrix @ v, len(values), rank, iterations=3, generator=seeded(seed))
    for value, residual in zip(iterated.values, iterated.residuals, strict=True):
        assert float((exact - value).abs().min()) <= float(residual) + 1e-10
    assert bool((iterated.values.diff() <= 0).all())


def test_lanczos_finds_repeated_eigenvalues_and_stays_orthogonal():
    repeated = [4.0, 4.0, 4.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    matrix = with_spectrum(repeated)
    whole = lanczos(lambda v: matrix @ v, 8, 8, generator=seeded())
    np.testing.assert_allclose(whole.eigen().values, repeated, atol=1e-10)
    wide = with_spectrum(2.0 ** -torch.arange(200))  # where plain Lanczos loses orthogonality at once
    long = lanczos(lambda v: wide @ v, 200, 120, generator=seeded())
    gram = long.vectors.T @ long.vectors
    torch.testing.assert_close(gram, torch.eye(120).double(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(long.eigen().values[:20], 2.0 ** -np.arange(20), atol=1e-12)
    assert lanczos(lambda v: 0 * v, 3, 3, generator=seeded()).eigen().values.tolist() == [0, 0, 0]


def test_eigen_solvers_refuse():
    identity = lambda v: v
    with pytest.raises(ValueError, match=r"rank=4.*1 to 3"):
        orthogonal_iteration(identity, 3, 4)
    with pytest.raises(ValueError, match=r"iterations=-1"):
        orthogonal_iteration(identity, 3, 1, iterations=-1)
    with pytest.raises(ValueError, match=r"rank=True"):
        lanczos(identity, 3, True)
    with pytest.raises(ValueError, match=r"the start is zero"):
        lanczos(identity, 3, 2, start=torch.zeros(3))
    with pytest.raises(ValueError, match=r"not finite in step 0"):
        lanczos(lambda v: v / 0, 3, 2)
    stack = torch.randn(4, 5)
    with pytest.raises(ValueError, match=r"method='svd'"):
        gradient_pca(stack, 1, method="svd")
    with pytest.raises(ValueError, match=r"rank=5.*1 to 4"):
        gradient_pca(stack, 5)
    with pytest.raises(ValueError, match=r"cannot give rank=3"):
        gradient_pca(stack, 3, iterations=2)
    with pytest.raises(ValueError, match=r"one gradient a row"):
        gradient_pca(stack[0], 1)
    stack[2, 1] = math.nan
    with pytest.raises(ValueError, match=r"1 gradients are not finite, the first in row 2"):
        gradient_pca(stack, 1)


def test_decay_of_a_known_power_law():
    spectrum = gradient_pca(stack_with_decay(100, 300, 1.4), 60, generator=seeded())
    slope, low, high = spectrum.decay()
    assert slope == pytest.approx(-1.4, abs=1e-6) and low <= slope <= high
    values = torch.arange(1, 101, dtype=torch.float64) ** -2.0
    values[:10] = values[10]
    assert decay_exponent(values, 11).estimate == pytest.approx(-2, abs=1e-9)
    assert decay_exponent(values).estimate > -2  # the plateau is not a part of the law
    for arguments, words in [((0, 5), "first=0"), ((1, 200), "last=200"), ((4, 5), "first=4, last=5")]:
        with pytest.raises(ValueError, match=words):
            decay_exponent(values, *arguments)
    with pytest.raises(ValueError, match=r"eigenvalue 3 is 0.0e\+00"):
        decay_exponent(torch.tensor([2.0, 1.0, 0.0]))


# ------------------------------------------------------------------------------------------------- spectral density


def blurred(grid, values, weights, width):
    kernel = torch.exp(-(((grid[:, None] - values) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi))
    return kernel @ weights


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_density_of_noise_is_marchenko_and_pasturs(ratio):
    n, width = 400, 0.3
    p = round(ratio * n)
    gradients = 1.5 * torch.randn(n, p, generator=seeded(), dtype=torch.float64)
    grid = torch.linspace(-1.5, 11, 300, dtype=torch.float64)
    found = lanczos_density(
        second_moment_operator(gradients), p, grid, steps=100, probes=30, width=width, generator=seeded(9)
    )  # not the rows of G again
    assert float(torch.trapezoid(found.density, grid)) == pytest.approx(1, abs=1e-3)
    exact = blurred(grid, torch.linalg.eigvalsh(gradients.T @ gradients / n), torch.full((p,), 1 / p).double(), width)
    # the reported error is honest: for normal errors the mean of |difference| is 0.8 standard errors
    ratio_of_errors = torch.trapezoid((found.density - exact).abs(), grid) / torch.trapezoid(found.error, grid)
    assert 0.3 < float(ratio_of_errors) < 2
    fine = torch.linspace(0, 12, 20_001, dtype=torch.float64)
    law = blurred(grid, fine, marchenko_pastur(fine, ratio, 1.5**2) * (fine[1] - fine[0]), width)
    # 30 probes of p numbers: about sqrt(2 / 30 p) in each of some ten resolved pieces, and the pole at 0 for p = n
    assert float(torch.trapezoid((found.density - law).abs(), grid)) < 0.1
    assert float(torch.trapezoid((exact - law).abs(), grid)) < 0.05


@given(st.floats(0.05, 1), st.floats(0.2, 4))
@settings(max_examples=20, deadline=None)
def test_marchenko_pastur_has_mass_one_and_the_right_mean(ratio, variance):
    root = torch.linspace(0, math.sqrt(variance) * (1 + math.sqrt(ratio)), 100_001, dtype=torch.float64)  # x = root^2
    density = marchenko_pastur(root**2, ratio, variance) * 2 * root
    # the substitution takes the pole at 0 away; what is left is the square root at the edges
    assert float(torch.trapezoid(density, root)) == pytest.approx(1, abs=2e-4)
    assert float(torch.trapezoid(density * root**2, root)) == pytest.approx(variance, rel=2e-4)


def test_density_of_a_matrix_with_two_values():
    matrix = with_spectrum([1.0] * 30 + [3.0] * 10)
    grid = torch.linspace(0, 4, 401, dtype=torch.float64)
    found = lanczos_density(lambda v: matrix @ v, 40, grid, steps=2, probes=200, width=0.05, generator=seeded())
    left = torch.trapezoid(found.density[:200], grid[:200])
    assert float(left) == pytest.approx(0.75, abs=0.02)  # 200 probes of 40 numbers: a standard error of 0.007
    assert bool(torch.isnan(lanczos_density(lambda v: matrix @ v, 40, grid, probes=1).error).all())
    for arguments, words in [(dict(width=0.0), "width=0.0"), (dict(probes=0), "probes=0")]:
        with pytest.raises(ValueError, match=words):
            lanczos_density(lambda v: matrix @ v, 40, grid, **arguments)
    with pytest.raises(ValueError, match=r"grid of shape"):
        lanczos_density(lambda v: v, 40, torch.zeros(5))
    with pytest.raises(ValueError, match=r"ratio=1.5"):
        marchenko_pastur(grid, 1.5)


# ------------------------------------------------------------------------------------------------------ projection


def test_projection_from_private_gradients_needs_the_admission():
    directions = random_directions(2, 6, generator=seeded())
    with pytest.raises(ValueError, match=r"not accounted for.*i_know_this_is_not_private=True"):
        SubspaceProjection(directions)
    assert not SubspaceProjection(directions, i_know_this_is_not_private=True).is_private
    assert SubspaceProjection(directions, public=True).is_private
    with pytest.raises(ValueError, match=r"not orthonormal"):
        SubspaceProjection(2 * directions, public=True)
    with pytest.raises(ValueError, match=r"r <= p"):
        SubspaceProjection(torch.eye(3)[:, :2], public=True)
    with pytest.raises(ValueError, match=r"5 numbers, the directions 6"):
        SubspaceProjection(directions, public=True)(torch.zeros(5))


@given(st.integers(1, 8), st.integers(0, 500))
@settings(max_examples=40, deadline=None)
def test_projection_is_a_projection_and_makes_nothing_longer(rank, seed):
    project = SubspaceProjection(random_directions(rank, 8, generator=seeded(seed)), public=True)
    gradient = torch.randn(3, 8, generator=seeded(seed + 1), dtype=torch.float64)
    once = project(gradient)
    torch.testing.assert_close(project(once), once, rtol=0, atol=1e-12)
    assert bool((once.norm(dim=1) <= gradient.norm(dim=1) * (1 + 1e-12)).all())  # so the sensitivity stays
    torch.testing.assert_close(((gradient - once) * once).sum(1), torch.zeros(3).double(), rtol=0, atol=1e-12)


def test_projection_in_place_between_clip_and_noise():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    weights = list(model.parameters())
    size = sum(w.numel() for w in weights)
    model[1].bias.requires_grad_(True)
    (model[0](torch.ones(4, 3)).sum()).backward()  # the second layer gets no gradient
    before = flat_gradient(weights)
    assert before[-3:].tolist() == [0, 0, 0] and before.shape == (size,)
    directions = random_directions(3, size, generator=seeded()).float()
    SubspaceProjection(directions, public=True).apply_(weights)
    torch.testing.assert_close(flat_gradient(weights), (before @ directions.T) @ directions, rtol=0, atol=1e-5)
    assert all(w.grad is not None and w.grad.shape == w.shape for w in weights)


def test_random_directions_are_uniform():
    drawn = torch.stack([random_directions(1, 3, generator=seeded(i))[0] for i in range(600)])
    # of a uniform direction in space each coordinate is uniform on [-1, 1]: mean 0, mean square 1/3
    np.testing.assert_allclose(drawn.square().mean(0), [1 / 3] * 3, atol=4 * 0.3 / math.sqrt(600))
    np.testing.assert_allclose(drawn.mean(0), [0] * 3, atol=4 / math.sqrt(3 * 600))


# ------------------------------------------------------------------------------------------------ geometric median


@given(st.integers(1, 6), st.floats(-1, 2), st.integers(0, 300))
@settings(max_examples=40, deadline=None)
def test_median_loss_and_gradient_by_brute_force(dimension, decay, seed):
    weights = median_weights(dimension, decay)
    points = 0.2 + 0.1 * torch.randn(7, generator=seeded(seed), dtype=torch.float64)
    beta = torch.randn(dimension, generator=seeded(seed + 1), dtype=torch.float64).requires_grad_()
    full = torch.zeros(7, dimension, dtype=torch.float64)
    full[:, 0] = points
    loss = (weights * (beta - full)).norm(dim=1).mean()
    (expected,) = torch.autograd.grad(loss, beta)
    torch.testing.assert_close(median_loss(beta.detach(), points, weights), loss.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(median_gradient(beta.detach(), points, weights), expected, rtol=0, atol=1e-10)
    assert float(expected.norm()) <= float(weights.max()) * (1 + 1e-12)


def test_median_gradient_at_a_point_is_finite():
    points = torch.tensor([0.5, 0.5], dtype=torch.float64)
    at = torch.tensor([0.5, 0.0], dtype=torch.float64)
    assert median_gradient(at, points, median_weights(2, 1.0)).tolist() == [0.0, 0.0]


def test_private_median_without_noise_finds_the_median():
    points = 0.2 + 0.1 * torch.randn(501, generator=seeded(), dtype=torch.float64)
    excess = private_median(
        points, median_weights(50, 0.5), epsilon=math.inf, delta=1e-6, steps=300, learning_rates=[0.05], repeats=1
    )
    assert excess.shape == (1, 1)
    assert 0 <= float(excess) < 5e-3
    for dimension in (1, 10, 1000):  # without noise the dimension does nothing at all
        again = private_median(
            points,
            median_weights(dimension, 0.0),
            epsilon=math.inf,
            delta=1e-6,
            steps=50,
            learning_rates=[0.05],
            repeats=1,
        )
        first = private_median(
            points, median_weights(1, 0.0), epsilon=math.inf, delta=1e-6, steps=50, learning_rates=[0.05], repeats=1
        )
        assert float(again) == pytest.approx(float(first), abs=1e-12)


def test_noise_of_private_median_is_calibrated():
    """With weights that vanish beyond the first coordinate nothing pulls back: the mean iterate is a known Gaussian."""
    points = torch.zeros(10, dtype=torch.float64)
    weights = torch.tensor([1.0] + [1e-9] * 4000, dtype=torch.float64)
    steps, rate, epsilon, delta = 30, 0.1, 2.0, 1e-5
    sensitivity = 2 / 10
    noise = sensitivity * math.sqrt(steps) / gaussian_mu(epsilon, delta)
    excess = private_median(
        points, weights, epsilon=epsilon, delta=delta, steps=steps, learning_rates=[rate], repeats=1, generator=seeded()
    )
    # the mean of a random walk of t steps has the variance sum (t - k)^2 / t^2
    spread = rate * noise * math.sqrt(sum((steps - k) ** 2 for k in range(steps)) / steps**2)
    generator = seeded()
    beta = torch.zeros(4001, dtype=torch.float64)
    mean = torch.zeros_like(beta)
    for step in range(steps):  # the same draws, step by step
        beta = beta - rate * (
            median_gradient(beta, points, weights)
            + noise * torch.randn(1, 1, 4001, generator=generator, dtype=torch.float64)[0, 0]
        )
        mean += (beta - mean) / (step + 1)
    assert float(excess) == pytest.approx(float(median_loss(mean, points, weights)), rel=1e-12)
    assert float(mean[1:].std()) == pytest.approx(spread, rel=4 / math.sqrt(2 * 4000))


def test_fast_decay_frees_the_loss_of_the_dimension():
    points = 0.2 + 0.1 * torch.randn(200, generator=seeded(), dtype=torch.float64)

    def excess(dimension, decay):
        tried = private_median(
            points, median_weights(dimension, decay), epsilon=2.0, delta=1e-6, steps=40,
            learning_rates=(0.003, 0.01, 0.03, 0.1, 0.3), repeats=3, generator=seeded(),
        )  # fmt: skip
        return float(tried.mean(1).min())

    small, large = 20, 2000
    assert excess(large, 0.0) > 1.5 * excess(small, 0.0)
    assert excess(large, 2.0) == pytest.approx(excess(small, 2.0), rel=0.5)
    assert excess(large, 0.0) > 1.5 * excess(large, 2.0)


def test_the_official_const_weights_grow_and_break_the_promised_sensitivity():
    """The official "const" takes 1, 2, ..., d for weights: gradients are up to d times as long as its noise assumes."""
    dimension = 50
    weights = median_weights(dimension, -1.0)
    beta = torch.zeros(dimension, dtype=torch.float64)
    beta[-1] = 1.0
    points = torch.zeros(1, dtype=torch.float64)
    assert float(median_gradient(beta, points, weights).norm()) == pytest.approx(dimension)
    assert float(median_gradient(beta, points, median_weights(dimension, 0.0)).norm()) == pytest.approx(1)


def test_median_refuses():
    with pytest.raises(ValueError, match=r"dimension=0"):
        median_weights(0, 1.0)
    points, weights = torch.zeros(3, dtype=torch.float64), median_weights(2, 1.0)
    for change, words in [
        (dict(steps=0), "steps=0"),
        (dict(repeats=0), "repeats=0"),
        (dict(epsilon=-1.0), "epsilon=-1"),
    ]:
        with pytest.raises(ValueError, match=words):
            private_median(points, weights, **(dict(epsilon=1.0, delta=1e-5) | change))
    with pytest.raises(ValueError, match=r"two vectors"):
        private_median(points[None], weights, epsilon=1.0, delta=1e-5)
