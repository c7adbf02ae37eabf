"""The audit: bounds against scipy, linear programs and simulation; mechanisms with known faults, and without any."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, sparse, stats

from oral4.dp.accountant import gaussian_delta, gaussian_epsilon
from oral4.dp.audit import (
    attack_auc,
    canary_rank,
    clopper_pearson,
    dirac_gradients,
    engine_sum,
    epsilon_from_errors,
    exposure,
    exposure_lower_bound,
    extrapolated_exposure,
    gaussian_mu,
    guess_coins,
    hardest_example,
    make_canaries,
    make_secrets,
    mechanism_audit,
    mu_from_errors,
    one_run_audit,
    one_run_lower_bound,
    one_run_p_value,
    optimizer_step,
    sensitivity_audit,
    toss_coins,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------- one run, pure privacy


@pytest.mark.parametrize("guesses", [1, 7, 100, 3000])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 2.0, 9.0])
def test_pure_p_value_is_the_binomial_tail(guesses, epsilon):
    for correct in {0, 1, guesses // 2, guesses - 1, guesses}:
        expected = stats.binom.sf(correct - 1, guesses, 1 / (1 + math.exp(-epsilon)))
        # float64: log-gamma of 3,000 has 5 digits before the point, which leaves 11 for the exponent
        assert one_run_p_value(correct, guesses, epsilon) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_all_right_has_a_closed_form():
    for guesses, beta in [(1, 0.05), (100, 0.05), (100, 0.01), (1000, 0.2)]:
        rate = beta ** (1 / guesses)
        expected = math.log(rate / (1 - rate))
        assert one_run_lower_bound(guesses, guesses, beta=beta) == pytest.approx(max(0, expected), abs=1e-8)
        assert one_run_lower_bound(guesses, guesses, beta=beta) <= math.log(guesses / beta)


def test_a_coin_flipper_is_not_accused():
    assert one_run_lower_bound(50, 100) == 0
    assert one_run_lower_bound(58, 100) == 0  # P[Binomial(100, 1/2) >= 58] = 0.067
    assert one_run_lower_bound(59, 100) > 0  # ... >= 59] = 0.044
    assert one_run_lower_bound(0, 0) == 0


@given(st.integers(1, 400), st.floats(0.001, 0.4), st.data())
@settings(max_examples=60, deadline=None)
def test_the_bound_is_the_edge_of_what_is_refuted(guesses, beta, data):
    correct = data.draw(st.integers(0, guesses))
    bound = one_run_lower_bound(correct, guesses, beta=beta)
    assert one_run_p_value(correct, guesses, bound + 1e-6) >= beta
    if bound > 0:
        assert one_run_p_value(correct, guesses, bound) <= beta * (1 + 1e-9)


# --------------------------------------------------------------------------------- one run, approximate privacy


@given(st.integers(1, 300), st.floats(0, 6), st.floats(0, 0.5), st.floats(0, 0.01), st.data())
@settings(max_examples=100, deadline=None)
def test_a_larger_epsilon_explains_more(guesses, epsilon, more, delta, data):
    """So that what is refuted is an interval from 0, and its end the bound."""
    correct = data.draw(st.integers(0, guesses))
    near, far = (one_run_p_value(correct, guesses, e, delta, canaries=guesses) for e in (epsilon, epsilon + more))
    if near < 0.5:
        assert far >= near * (1 - 1e-9)


def theorem(canaries, guesses, correct, epsilon, delta):
    """The p-value in the code printed with Steinke, Nasr and Jagielski, from scipy's binomial."""
    law = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
    tail = law.sf(correct - 1)
    gains = [(law.sf(correct - i - 1) - tail) / i for i in range(1, correct + 1)]
    return min(1, tail + 2 * canaries * delta * max(gains, default=0))


@given(st.integers(1, 120), st.integers(0, 300), st.floats(0, 5), st.floats(1e-9, 0.3), st.data())
@settings(max_examples=80, deadline=None)
def test_published_formula_is_the_theorem(guesses, silent, epsilon, delta, data):
    correct = data.draw(st.integers(0, guesses))
    expected = theorem(guesses + silent, guesses, correct, epsilon, delta)
    found = one_run_p_value(correct, guesses, epsilon, delta, canaries=guesses + silent, formula="published")
    assert found == pytest.approx(expected, rel=1e-7, abs=1e-13)  # the tails of scipy are subtracted: 1e-16 / 120 each


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "printed"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_numbers_printed_in_the_paper(canaries, guesses, correct, delta, printed):
    # of the code's example and of a figure; the second is cut off, not rounded: one unit of the last digit
    found = one_run_lower_bound(correct, guesses, delta, canaries=canaries, formula="published")
    assert found == pytest.approx(printed, abs=1e-3)
    assert one_run_lower_bound(correct, guesses, delta, canaries=guesses, formula="published") > found + 1e-3
    ours = one_run_lower_bound(correct, guesses, delta, canaries=canaries)
    assert found + 1e-3 < ours < one_run_lower_bound(correct, guesses)  # delta costs less than published, not nothing


@given(st.integers(1, 300), st.floats(0, 5), st.floats(1e-9, 0.01), st.data())
@settings(max_examples=80, deadline=None)
def test_the_published_term_is_the_larger_one_where_it_matters(guesses, epsilon, delta, data):
    correct = data.draw(st.integers(0, guesses))
    pure = one_run_p_value(correct, guesses, epsilon)
    ours, published = (
        one_run_p_value(correct, guesses, epsilon, delta, canaries=guesses, formula=name) - pure
        for name in ("tight", "published")
    )
    assert ours >= 0
    if pure < 0.5 and pure + ours < 1:
        assert ours <= 0.5 * published + 1e-12


def worst_symmetric(guesses, correct, epsilon, share):
    """Largest P[at least `correct` right] of any mechanism on `guesses` coins, all guessed, by a linear program.

    Flipping signs and permuting coins at random changes neither the privacy of a mechanism nor its law of the count,
    so the mechanism may be taken symmetric: all that matters is the law w of the count.
    """
    r, grow = guesses, math.exp(epsilon)
    up, down = sparse.lil_matrix((r, 3 * r + 1)), sparse.lil_matrix((r, 3 * r + 1))
    for c in range(1, r + 1):  # the coin was guessed right; on the neighbour the same guess is wrong
        up[c - 1, c], up[c - 1, c - 1], up[c - 1, r + c] = c / r, -grow * (r - c + 1) / r, -1
    for c in range(r):
        down[c, c], down[c, c + 1], down[c, 2 * r + 1 + c] = (r - c) / r, -grow * (c + 1) / r, -1
    budget = np.r_[np.zeros(r + 1), np.ones(2 * r)]
    gain = np.r_[np.arange(r + 1) >= correct, np.zeros(2 * r)]
    solved = optimize.linprog(
        -gain.astype(float),
        A_ub=sparse.vstack([up, down, budget[None]]).tocsr(),
        b_ub=np.r_[np.zeros(2 * r), share],
        A_eq=np.r_[np.ones(r + 1), np.zeros(2 * r)][None],
        b_eq=[1.0],
        bounds=(0, None),
        method="highs",
    )
    assert solved.status == 0
    return -solved.fun


def worst_of_all(canaries, guesses, correct, epsilon, delta):
    """The same over every mechanism there is, with abstentions: one variable for each input and output."""
    inputs = list(itertools.product((-1, 1), repeat=canaries))
    outputs = [t for t in itertools.product((-1, 0, 1), repeat=canaries) if sum(map(abs, t)) == guesses]
    place = {(s, t): i for i, (s, t) in enumerate(itertools.product(inputs, outputs))}
    pairs = [(s, (*s[:i], -s[i], *s[i + 1 :])) for s in inputs for i in range(canaries)]
    total = len(place) + len(pairs) * len(outputs)
    rows, columns, values, limits = [], [], [], []
    for number, (s, other) in enumerate(pairs):
        slack = len(place) + number * len(outputs)
        for j, t in enumerate(outputs):
            rows += [len(limits)] * 3
            columns += [place[s, t], place[other, t], slack + j]
            values += [1, -math.exp(epsilon), -1]
            limits.append(0.0)
        rows += [len(limits)] * len(outputs)
        columns += range(slack, slack + len(outputs))
        values += [1] * len(outputs)
        limits.append(delta)
    gain = np.zeros(total)
    for (s, t), i in place.items():
        gain[i] = (sum(a == b for a, b in zip(s, t, strict=True)) >= correct) / len(inputs)
    ones = sparse.csr_matrix(
        (np.ones(len(place)), ([i // len(outputs) for i in range(len(place))], range(len(place)))),
        shape=(len(inputs), total),
    )
    solved = optimize.linprog(
        -gain,
        A_ub=sparse.csr_matrix((values, (rows, columns)), shape=(len(limits), total)),
        b_ub=limits,
        A_eq=ones,
        b_eq=np.ones(len(inputs)),
        bounds=(0, None),
        method="highs",
    )
    assert solved.status == 0
    return -solved.fun


@pytest.mark.parametrize(("canaries", "guesses"), [(1, 1), (2, 2), (3, 2), (3, 3), (4, 1)])
def test_the_worst_mechanism_is_symmetric_and_delta_is_spent_on_the_guessed_coins(canaries, guesses):
    for correct, (epsilon, delta) in itertools.product(range(1, guesses + 1), [(0.0, 0.1), (1.0, 0.02)]):
        everything = worst_of_all(canaries, guesses, correct, epsilon, delta)
        symmetric = worst_symmetric(guesses, correct, epsilon, delta * canaries / guesses)
        assert everything == pytest.approx(symmetric, abs=1e-7)  # the solver's own tolerance


@given(st.integers(1, 40), st.floats(0, 4), st.floats(0, 0.05), st.data())
@settings(max_examples=40, deadline=None)
def test_no_mechanism_beats_the_p_value(guesses, epsilon, delta, data):
    correct = data.draw(st.integers(1, guesses))
    silent = data.draw(st.integers(0, 40))
    worst = worst_symmetric(guesses, correct, epsilon, delta * (guesses + silent) / guesses)
    assert worst <= one_run_p_value(correct, guesses, epsilon, delta, canaries=guesses + silent) + 1e-7


@pytest.mark.parametrize("guesses", [1, 2, 7, 30])
@pytest.mark.parametrize("epsilon", [0.0, 1.0, 2.5])
def test_some_mechanism_reaches_the_p_value(guesses, epsilon):
    for correct in {1, guesses // 2 + 1, guesses - guesses // 4, guesses}:
        for delta in (0.0, 1e-5):  # small: the worst mechanism takes from low counts what it adds, and they suffice
            found = one_run_p_value(correct, guesses, epsilon, delta, canaries=3 * guesses)
            if 1e-3 < found < 0.98:
                assert worst_symmetric(guesses, correct, epsilon, 3 * delta) == pytest.approx(found, abs=1e-7)


def test_the_published_formula_is_exceeded_where_nearly_all_counts_are_above():
    """Ten coins, at least two right: a (0, delta)-DP mechanism goes beyond the theorem's bound, and not beyond ours."""
    delta = 0.002
    worst = worst_symmetric(10, 2, 0.0, delta)
    assert worst > one_run_p_value(2, 10, 0.0, delta, canaries=10, formula="published") + 1e-4
    assert worst == pytest.approx(one_run_p_value(2, 10, 0.0, delta, canaries=10), abs=1e-7)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("beta", [0.05, 0.2])
def test_randomised_response_is_accused_as_often_as_promised_and_not_more(epsilon, beta):
    for guesses in (20, 100, 400):
        law = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
        accused = [v for v in range(guesses + 1) if one_run_lower_bound(v, guesses, beta=beta) > epsilon + 1e-7]
        rate = law.pmf(accused).sum()
        assert rate <= beta
        if guesses == 400:  # counts are whole, so the level is not used up, but nearly
            assert rate >= beta / 3


def test_simulated_randomised_response_is_covered_through_the_whole_audit():
    truth, runs, accused = 1.0, 300, 0
    generator = seeded()
    for _ in range(runs):
        coins = toss_coins(60, generator=generator)
        keep = torch.rand(60, generator=generator) < 1 / (1 + math.exp(-truth))
        said = torch.where(keep, coins, ~coins).double()
        audit = one_run_audit(said + 1e-3 * torch.rand(60, generator=generator), coins, guesses=(20, 20))
        accused += audit.epsilon > truth
    assert accused <= stats.binom(runs, 0.05).ppf(0.9999)
    assert accused >= 1  # a bound that never reaches the truth would be idle


def test_a_mechanism_that_leaks_with_probability_delta_is_not_accused():
    # with probability delta everything is told, else nothing: (0, delta)-DP and not (0, 0)-DP
    delta, guesses = 0.04, 50
    accused = [v for v in range(guesses + 1) if one_run_lower_bound(v, guesses, delta, canaries=guesses) > 0]
    rate = (1 - delta) * stats.binom(guesses, 0.5).pmf(accused).sum() + delta * (guesses in accused)
    assert rate <= 0.05


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(correct=5, guesses=4), "correct=5.*0 to 4"),
        (dict(correct=1.5, guesses=4), "correct=1.5.*whole"),
        (dict(correct=True, guesses=4), "correct=True.*whole"),
        (dict(correct=1, guesses=-1), "guesses=-1.*>= 0"),
        (dict(correct=1, guesses=2, beta=0.0), "beta=0.0.*0 < beta < 1"),
        (dict(correct=1, guesses=2, delta=1.0), "delta=1.0.*0 <= delta < 1"),
        (dict(correct=1, guesses=2, delta=0.1), "needs canaries"),
        (dict(correct=1, guesses=5, delta=0.1, canaries=4), "canaries=4.*>= 5"),
        (dict(correct=1, guesses=2, formula="loose"), "formula='loose'.*'tight'"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_one_run_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        one_run_lower_bound(**arguments)
    assert one_run_lower_bound(np.int64(9), np.int64(9)) > 0  # numpy's integers are numbers too


# ------------------------------------------------------------------------------------------- canaries and guesses


def test_canaries_are_different_uniform_and_free_of_excluded_tokens():
    drawn = make_canaries(4000, 5, 12, exclude=[0, 3], generator=seeded())
    assert drawn.shape == (4000, 5) and drawn.dtype == torch.int64
    assert len({tuple(row) for row in drawn.tolist()}) == 4000
    counts = np.bincount(drawn.flatten(), minlength=12)
    assert counts[0] == counts[3] == 0
    assert stats.chisquare(counts[counts > 0]).pvalue > 1e-4
    assert torch.equal(drawn, make_canaries(4000, 5, 12, exclude=[0, 3], generator=seeded()))
    assert len(make_canaries(8, 3, 2)) == 8  # every sequence there is
    with pytest.raises(ValueError, match=r"2 tokens make 8 sequences of length 3, fewer than count=9"):
        make_canaries(9, 3, 2)
    with pytest.raises(ValueError, match=r"fewer than count=1"):
        make_canaries(1, 3, 2, exclude=[0, 1])


def test_secrets_are_among_the_candidates():
    secrets, candidates = make_secrets(5, digits=3, template="pin {} end", generator=seeded())
    assert len(candidates) == 1000 == len(set(candidates)) and candidates[42] == "pin 0 4 2 end"
    assert len(set(secrets)) == 5 and set(secrets) <= set(candidates)
    with pytest.raises(ValueError, match=r"needs one"):
        make_secrets(1, template="no place")
    with pytest.raises(ValueError, match=r"count=11.*1 to 10"):
        make_secrets(11, digits=1)


def test_coins_are_fair_and_independent():
    coins = toss_coins(20_000, generator=seeded())
    assert stats.binomtest(int(coins.sum()), 20_000).pvalue > 1e-4
    assert stats.binomtest(int((coins[1:] ^ coins[:-1]).sum()), 19_999).pvalue > 1e-4
    assert len({int(toss_coins(100, generator=seeded(i)).sum()) for i in range(20)}) > 5  # not exactly half


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.data())
@settings(max_examples=60, deadline=None)
def test_guesses_take_the_extremes(values, data):
    positive = data.draw(st.integers(0, len(values)))
    negative = data.draw(st.integers(0, len(values) - positive))
    guess = guess_coins(np.array(values, dtype=float), positive, negative)
    assert (guess == 1).sum() == positive and (guess == -1).sum() == negative
    ordered = np.array(values)
    for high, low in itertools.product((1, 0), (0, -1)):
        if high != low and (guess == high).any() and (guess == low).any():
            assert ordered[guess == high].min() >= ordered[guess == low].max()


@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=40))
@settings(max_examples=80, deadline=None)
def test_auc_counts_pairs(rows):
    scores, coins = np.array([s for s, _ in rows], dtype=float), np.array([c for _, c in rows])
    if coins.all() or not coins.any():
        with pytest.raises(ValueError, match=r"one of each"):
            attack_auc(scores, coins)
        return
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[coins] for b in scores[~coins]]
    assert attack_auc(scores, coins) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_choosing_the_best_of_many_needs_the_correction():
    """A blind attack, ten ways to guess: reporting the best as if it had been the plan accuses far too often."""
    ways = [(k, k) for k in range(5, 55, 5)]
    naive = honest = 0
    runs, generator = 400, seeded(1)
    for _ in range(runs):
        coins = toss_coins(120, generator=generator)
        guess = [guess_coins(torch.rand(120, generator=generator), *way) for way in ways[:1]]
        scores = torch.rand(120, generator=generator)
        truth = np.where(coins, 1, -1)
        guess = [guess_coins(scores, *way) for way in ways]
        smallest = min(one_run_p_value(int((g == truth).sum()), int(abs(g).sum()), 0.0) for g in guess)
        naive += smallest < 0.05
        honest += smallest < 0.05 / len(ways)
    assert naive > stats.binom(runs, 0.05).ppf(0.9999)  # measurably above the promise
    assert honest <= stats.binom(runs, 0.05).ppf(0.9999)


def test_audit_reports_the_best_candidate_at_the_corrected_level():
    coins = toss_coins(200, generator=seeded())
    scores = coins.double() + 0.5 * torch.randn(200, generator=seeded(1), dtype=torch.float64)
    single = one_run_audit(scores, coins, guesses=(30, 30))
    assert (single.candidates, single.guesses, single.canaries, single.delta) == (1, 60, 200, 0.0)
    assert single.epsilon == one_run_lower_bound(single.correct, 60)
    several = one_run_audit(scores, coins, guesses=[(10, 10), (30, 30)], delta=1e-6)
    alone = [
        one_run_lower_bound(
            int((guess_coins(scores, k, k) == np.where(coins, 1, -1)).sum()), 2 * k, 1e-6, 0.025, canaries=200
        )
        for k in (10, 30)
    ]
    assert several.epsilon == max(alone) and several.candidates == 2
    assert "corrected for 2 ways" in str(several) and f"{several.correct} of {several.guesses}" in str(several)
    assert one_run_audit(scores, coins, guesses=(0, 0)).epsilon == 0  # no guess, no accusation


def test_audit_refuses():
    coins = toss_coins(10, generator=seeded())
    with pytest.raises(ValueError, match=r"one score and one truth value"):
        one_run_audit(torch.zeros(9), coins, guesses=(1, 1))
    with pytest.raises(ValueError, match=r"one score and one truth value"):
        one_run_audit(torch.zeros(10), coins.long(), guesses=(1, 1))
    with pytest.raises(ValueError, match=r"1 of 10 scores are not finite"):
        one_run_audit(torch.tensor([math.nan] + [0.0] * 9), coins, guesses=(1, 1))
    with pytest.raises(ValueError, match=r"negative=6.*0 to 5"):
        one_run_audit(torch.zeros(10), coins, guesses=(5, 6))
    with pytest.raises(ValueError, match=r"guessed as in"):
        one_run_audit(torch.zeros(10), coins, guesses=[])


# ------------------------------------------------------------------------------------------------------- exposure


@given(st.lists(st.integers(0, 6), min_size=1, max_size=50))
@settings(max_examples=60, deadline=None)
def test_at_most_k_candidates_have_a_rank_up_to_k(losses):
    """What makes the rank of an unseen canary harmless, with and without ties."""
    ranks = np.array([canary_rank(np.array(losses, dtype=float), i) for i in range(len(losses))])
    for k in range(1, len(losses) + 1):
        assert (ranks <= k).sum() <= k
    assert sorted(ranks)[0] >= 1 and max(ranks) == len(losses)


def test_exposure_is_bits_gained():
    assert exposure(1, 10_000) == pytest.approx(math.log2(10_000))
    assert exposure(5000, 10_000) == pytest.approx(1)
    for rank, total, words in [(0, 5, "rank=0"), (6, 5, "rank=6"), (1, 0, "total=0")]:
        with pytest.raises(ValueError, match=words):
            exposure(rank, total)
    with pytest.raises(ValueError, match=r"finite loss"):
        canary_rank([1.0, math.inf], 0)


@pytest.mark.parametrize("shape", [-4.0, 0.0, 1.5, 6.0])
def test_extrapolated_exposure_against_the_true_law(shape):
    law = stats.skewnorm(shape, loc=3.0, scale=0.5)
    sample = law.rvs(20_000, random_state=np.random.default_rng(0))
    loss = float(law.ppf(2.0**-9))
    found = extrapolated_exposure(loss, sample)
    # the moments of 20,000 values are known to a percent, and a tail of 2^-9 feels each of them: half a bit
    assert found.exposure == pytest.approx(9, abs=0.5)
    assert found.distance < 1.63 / math.sqrt(20_000)


def test_extrapolation_is_exact_in_the_far_tail_and_honest_about_a_bad_fit():
    grid = (np.arange(4_000) + 0.5) / 4_000
    normal = stats.norm.ppf(grid)
    for z in (-3.0, -12.0):  # the tail of a normal law, 1.8e-33, where 1 - (1 - x) has nothing left
        expected = -stats.norm.logcdf(z / normal.std()) / math.log(2)
        assert extrapolated_exposure(z, normal).exposure == pytest.approx(expected, rel=1e-6)
    two_humps = np.concatenate([normal, normal + 12])
    assert extrapolated_exposure(0.0, two_humps).distance > 0.1
    with pytest.raises(ValueError, match=r"20 candidates"):
        extrapolated_exposure(0.0, np.zeros(19))
    with pytest.raises(ValueError, match=r"all equal"):
        extrapolated_exposure(0.0, np.ones(50))


def test_skew_normal_tail_against_quadrature():
    from oral4.dp.audit import _skew_normal_log_cdf

    for shape, z in itertools.product([-5.0, -0.5, 0.0, 2.0, 20.0], [-6.0, -1.0, 0.0, 0.7, 4.0]):
        expected = integrate.quad(
            lambda u, a=shape: 2 * stats.norm.pdf(u) * stats.norm.cdf(a * u),
            -40,
            z,
            epsabs=0,
            epsrel=1e-10,
            points=[-5, min(z, 0)],
            limit=400,
        )[0]
        assert math.exp(_skew_normal_log_cdf(z, shape)) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_rank_bound_covers_and_copies_divide():
    beta, total = 0.05, 400
    accused = [rank for rank in range(1, total + 1) if exposure_lower_bound(rank, total, beta=beta) > 0]
    assert len(accused) / total <= beta  # a model that never saw the canary: its rank is uniform
    assert len(accused) == 19  # rank / total < beta
    assert exposure_lower_bound(1, total) == pytest.approx(math.log(beta * total), abs=1e-6)
    assert exposure_lower_bound(1, total, copies=5) == pytest.approx(math.log(beta * total) / 5, abs=1e-6)
    found = exposure_lower_bound(1, 10_000, delta=1e-3, copies=3)
    assert math.exp(3 * found) / 10_000 + 1e-3 * (1 + math.exp(found) + math.exp(2 * found)) == pytest.approx(0.05)
    assert found < exposure_lower_bound(1, 10_000, copies=3)


# -------------------------------------------------------------------------------------------------- repeated runs


@given(st.integers(1, 3000), st.floats(1e-4, 0.5), st.data())
@settings(max_examples=60, deadline=None)
def test_clopper_pearson_is_the_beta_quantile(trials, beta, data):
    errors = data.draw(st.integers(0, trials))
    expected = 1.0 if errors == trials else stats.beta.ppf(1 - beta, errors + 1, trials - errors)
    assert clopper_pearson(errors, trials, beta) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_counted_errors_cover_randomised_response(epsilon):
    runs, trials, wrong = 300, 200, 1 / (1 + math.exp(epsilon))
    drawn = np.random.default_rng(0).binomial(trials, wrong, size=(runs, 2))
    bounds = np.array([epsilon_from_errors(int(a), trials, int(b), trials) for a, b in drawn])
    assert (bounds > epsilon).sum() <= stats.binom(runs, 0.05).ppf(0.9999)
    assert np.median(bounds) > 0.4 * epsilon


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.5])
def test_mu_covers_a_gaussian_mechanism_and_beats_the_count(mu):
    runs, trials = 200, 500
    rate = stats.norm.sf(mu / 2)
    drawn = np.random.default_rng(1).binomial(trials, rate, size=(runs, 2))
    bounds = np.array([mu_from_errors(int(a), trials, int(b), trials) for a, b in drawn])
    assert (bounds > mu).sum() <= stats.binom(runs, 0.05).ppf(0.9999)
    # 500 trials know each rate to 0.02, the bounds lie 2.5 times that above, and the slope of Phi^-1 is 3 to 6
    assert np.median(bounds) > mu - 0.35
    errors = (round(rate * trials), trials) * 2
    assert gaussian_epsilon(1e-5, mu_from_errors(*errors)) > epsilon_from_errors(*errors, delta=1e-5)


def test_errors_that_say_nothing():
    assert epsilon_from_errors(50, 100, 50, 100) == 0
    assert epsilon_from_errors(100, 100, 0, 100) == 0  # always "yes"
    assert mu_from_errors(100, 100, 0, 100) == 0
    with pytest.raises(ValueError, match=r"errors=3"):
        clopper_pearson(3, 2)


@given(st.floats(0.01, 50), st.floats(1e-12, 0.4))
@settings(max_examples=60, deadline=None)
def test_gaussian_mu_inverts_the_profile(mu, delta):
    epsilon = gaussian_epsilon(delta, mu)
    found = gaussian_mu(epsilon, delta)
    assert gaussian_delta(epsilon, found) <= delta  # on the safe side
    if epsilon > 1e-6:
        assert found == pytest.approx(mu, rel=1e-6)
    else:  # delta alone is enough for this mu, and for larger ones
        assert found >= mu * (1 - 1e-6)


def test_gaussian_mu_refuses():
    with pytest.raises(ValueError, match=r"delta=0"):
        gaussian_mu(1.0, 0)
    with pytest.raises(ValueError, match=r"epsilon=-1"):
        gaussian_mu(-1, 1e-5)


# ------------------------------------------------------------------------------------------------------ mechanisms

CLIP, SIGMA, EXPECTED, SIZE = 0.5, 1.3, 16, 60


class Mechanism:
    """A few lines of DP-SGD on gradients, right or with one fault."""

    def __init__(self, fault=None, seed=0):
        self.fault, self.generator = fault, seeded(seed)

    def draw(self, size=SIZE):
        return torch.randn(size, generator=self.generator, dtype=torch.float64)

    def clipped_sum(self, gradients):
        total = torch.zeros(SIZE, dtype=torch.float64)
        for gradient in gradients:
            norm = gradient.norm() / (1.65 if self.fault == "norm" else 1)
            total += gradient * min(1.0, CLIP / float(norm))
        if self.fault == "coupled":  # clipped by the mean norm of the batch, as batch normalisation would couple them
            norm = torch.stack([g.norm() for g in gradients]).mean()
            total = sum(gradients) * min(1.0, CLIP / float(norm))
        return total

    def noise(self):
        fault, std = self.fault, SIGMA * CLIP
        noise = std * self.draw()
        if fault == "twice":
            noise = noise + std * self.draw()
        elif fault == "never":
            noise = torch.zeros(SIZE, dtype=torch.float64)
        elif fault == "five percent low":
            noise = 0.95 * noise
        elif fault == "without C":
            noise = noise / CLIP
        elif fault == "same seed":
            noise = std * torch.randn(SIZE, generator=seeded(), dtype=torch.float64)
        elif fault == "one number":
            noise = noise[:1].expand(SIZE)
        elif fault == "repeated":
            noise = noise[: SIZE // 4].repeat(4)
        elif fault == "not normal":
            noise = std * math.sqrt(3) * (2 * torch.rand(SIZE, generator=self.generator, dtype=torch.float64) - 1)
        elif fault == "bfloat16":
            noise = (noise * 0 + std * self.draw()).bfloat16().double()
        elif fault == "tied skipped":
            noise[-7:] = 0
        return noise

    def __call__(self, gradients):
        released = (self.clipped_sum(gradients) + self.noise()) / (
            len(gradients) if self.fault == "realised" else EXPECTED
        )
        return {"body": released[:-7], "head": released[-7:]}


def batches():
    rest = [torch.randn(SIZE, generator=seeded(i), dtype=torch.float64) for i in range(3)]
    for gradient in rest:
        gradient[5] = 0
    return rest, dirac_gradients(SIZE, [5], norm=100.0)[0]


def audit(mechanism, **change):
    rest, canary = batches()
    settings_ = dict(clip_norm=CLIP, noise_multiplier=SIGMA, expected_batch_size=EXPECTED, direction=canary, runs=150)
    return mechanism_audit(mechanism, rest, [*rest, canary], **(settings_ | change))


def test_a_right_mechanism_passes_as_often_as_promised():
    found = [audit(Mechanism(seed=seed), runs=40, beta=0.05) for seed in range(40)]
    failed = sum(not one.passed for one in found)
    assert failed <= stats.binom(40, 0.05).ppf(0.9999)
    assert all(set(one.noise) == {"body", "head"} for one in found)
    covered = sum(one.shift.low <= 1 <= one.shift.high for one in found)
    assert covered >= 38
    assert "nothing found" in str(next(one for one in found if one.passed))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("norm", "sensitivity: the canary moves the sum by 1.[5-8]"),
        ("twice", "noise of body: 1.4"),
        ("never", "noise of body: none"),
        ("five percent low", "noise of body: 0.9"),
        ("without C", "noise of body: 2.0|noise of body: 1.9"),
        ("same seed", "noise of body: none"),
        ("one number", "noise along"),
        ("repeated", "noise along"),
        ("not normal", "noise is not normal"),
        ("tied skipped", "noise of head: none"),
        ("realised", "noise of body: 4.|noise of body: 5."),
    ],
    ids=lambda value: value.split(":")[0],
)
def test_every_fault_is_found_and_named(fault, words):
    import re

    found = audit(Mechanism(fault), runs=400)
    assert not found.passed
    assert any(re.search(words, problem) for problem in found.problems), found.problems
    assert f"{len(found.problems)} found" in str(found)
    if fault == "tied skipped":
        assert not any("body" in problem for problem in found.problems)
    if fault in ("never", "same seed"):
        assert found.epsilon > found.promised_epsilon


def test_the_bound_approaches_the_promise_from_below():
    found = audit(Mechanism(seed=3), runs=1500)
    assert found.passed and found.promised_epsilon == pytest.approx(gaussian_epsilon(1e-5, 1 / SIGMA))
    assert 0.5 / SIGMA < found.mu <= 1 / SIGMA
    assert found.epsilon_counted < found.epsilon  # knowing that the noise is normal is worth something
    assert found.shift.value == pytest.approx(1, abs=4 * SIGMA * math.sqrt(2 / 1500))


def test_the_direction_is_found_when_it_is_not_given():
    found = audit(Mechanism("norm", seed=5), direction=None, runs=1200)
    assert any("sensitivity" in problem for problem in found.problems)
    assert audit(Mechanism(seed=6), direction=None, runs=300).passed


def test_mechanism_audit_refuses():
    rest, canary = batches()
    for change, words in [
        (dict(clip_norm=0), "clip_norm=0"),
        (dict(noise_multiplier=0.0), "noise_multiplier=0.0"),
        (dict(expected_batch_size=4), "a batch of 3 is too near expected_batch_size=4|a batch of 4 is too near"),
        (dict(runs=19), "runs=19.*>= 20"),
        (dict(beta=1.0), "beta=1.0"),
        (dict(delta=0.0), "delta=0.0"),
        (dict(direction=torch.ones(3)), "direction has 3 numbers, the step returns 60"),
        (dict(direction=torch.zeros(SIZE)), "the direction is zero"),
    ]:
        with pytest.raises(ValueError, match=words):
            audit(Mechanism(), **change)
    with pytest.raises(TypeError, match=r"returned NoneType"):
        audit(lambda examples: None)
    with pytest.raises(ValueError, match=r"not finite"):
        audit(lambda examples: torch.full((SIZE,), math.nan))
    sizes = itertools.cycle([SIZE, SIZE + 1])
    with pytest.raises(ValueError, match=r"must return the same tensors"):
        audit(lambda examples: torch.randn(next(sizes)))
    assert len(rest) == 3 and canary.shape == (SIZE,)


def test_sensitivity_of_right_and_coupled_clipping():
    rest, canary = batches()
    pool = [canary, 1e-3 * canary, rest[0], 50 * rest[1], torch.zeros(SIZE, dtype=torch.float64)]
    pool[-1][0] = 1e-9
    right = sensitivity_audit(Mechanism().clipped_sum, pool, clip_norm=CLIP, background=rest, tolerance=1e-12)
    assert right.passed and right.largest == pytest.approx(1, abs=1e-12)  # float64, a sum of four vectors
    assert right.ratios[1] == pytest.approx(1e-3 * 100 / CLIP, abs=1e-12)  # below the norm: not clipped
    assert "kept" in str(right)
    alone = sensitivity_audit(Mechanism("coupled").clipped_sum, pool, clip_norm=CLIP)
    assert alone.passed  # a batch of one hides it
    beside = sensitivity_audit(Mechanism("coupled").clipped_sum, pool, clip_norm=CLIP, background=rest)
    assert not beside.passed and beside.largest > 1.5 and "BROKEN" in str(beside)


def test_sensitivity_audit_refuses():
    with pytest.raises(ValueError, match=r"no candidates"):
        sensitivity_audit(Mechanism().clipped_sum, [], clip_norm=1.0)
    with pytest.raises(ValueError, match=r"clip_norm=-1"):
        sensitivity_audit(Mechanism().clipped_sum, [torch.ones(SIZE)], clip_norm=-1)
    with pytest.raises(ValueError, match=r"candidate 0: the sum is not finite"):
        sensitivity_audit(lambda examples: torch.tensor([math.inf]), [1], clip_norm=1.0)
    with pytest.raises(ValueError, match=r"place=4"):
        dirac_gradients(4, [4])


class TiedModel(torch.nn.Module):
    """Embedding and output layer share their weight: two uses of one parameter."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.mix = torch.nn.Linear(6, 6)
        torch.nn.init.normal_(self.embed.weight, std=0.3, generator=seeded(1))
        torch.nn.init.normal_(self.mix.weight, std=0.4, generator=seeded(2))


def tied_sum(model, norm_of_tied, clip_norm=0.05):
    """Clipped sum of the gradients, one example at a time, with a choice of the tied weight's norm."""

    def gradients(ids):
        looked_up = model.embed(ids).detach().requires_grad_()  # cut: tells the two uses of the weight apart
        logits = (looked_up + torch.tanh(model.mix(looked_up))) @ model.embed.weight.T
        loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
        through, head, *rest = torch.autograd.grad(loss, [looked_up, model.embed.weight, *model.mix.parameters()])
        return torch.zeros_like(head).index_add(0, ids, through), head, rest

    def clipped(examples):
        total = [torch.zeros_like(p) for p in model.parameters()]
        for ids in examples:
            lookup, head, rest = gradients(ids)
            norm = (sum(g.square().sum() for g in rest) + norm_of_tied(lookup, head)).sqrt()
            factor = min(1.0, clip_norm / float(norm))
            total = [t + factor * g for t, g in zip(total, [lookup + head, *rest], strict=True)]
        return dict(zip(("tied", "weight", "bias"), total, strict=True))

    return clipped


@pytest.mark.parametrize(
    ("norm_of_tied", "at_least"),
    [
        (lambda lookup, head: (lookup + head).square().sum(), None),
        (lambda lookup, head: lookup.square().sum() + head.square().sum(), 1.1),  # at most sqrt(2): the parts are equal
        (lambda lookup, head: lookup.square().sum(), 1.3),  # the second use is ignored
        (
            lambda lookup, head: head.square().sum(),
            1.3,
        ),  # the second use overwrites the first: 1.65 was seen in the wild
    ],
    ids=["right", "no cross term", "first use only", "second use only"],
)
def test_the_tied_weight_bug_is_caught(norm_of_tied, at_least):
    model = TiedModel().double()
    clipped_sum = tied_sum(model, norm_of_tied)
    pool = [torch.randint(11, (8,), generator=seeded(i)) for i in range(40)]
    found = sensitivity_audit(clipped_sum, pool, clip_norm=0.05, background=pool[:3], tolerance=1e-9)
    text, ratio = hardest_example(clipped_sum, pool[0], 11, clip_norm=0.05, rounds=80, generator=seeded(1))
    assert ratio == sensitivity_audit(clipped_sum, [text], clip_norm=0.05).largest  # as reported, and no other text
    if at_least is None:
        assert found.passed and ratio <= 1 + 1e-12
        assert found.largest > 1 - 1e-6 and ratio > 1 - 1e-6
    else:
        assert not found.passed
        assert ratio > max(found.ratios[0], at_least)  # a search finds more than chance does


# ---------------------------------------------------------------------------------------------- engine and optimizer


def tiny_gpt2(dtype=torch.float64):
    import transformers

    config = transformers.GPT2Config(
        n_layer=1, n_embd=12, n_head=2, vocab_size=19, n_positions=10, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).to(dtype)
    assert model.lm_head.weight is model.transformer.wte.weight  # tied, as by default
    return model.train()


def losses_of(model):
    def losses(examples):
        ids = torch.stack(examples)
        places = torch.arange(ids.shape[1]).expand_as(ids)
        logits = model(input_ids=ids, position_ids=places, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)

    return losses


def texts():
    pool = [torch.randint(19, (8,), generator=seeded(i)) for i in range(12)]
    return pool + [torch.full((8,), token) for token in (0, 7)]


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
def test_the_engine_keeps_its_promise_on_a_tied_model(clipping):
    from oral4.dp.engine import ClipEngine

    model = tiny_gpt2()
    model.transformer.wte.weight.grad = torch.ones_like(model.transformer.wte.weight)
    engine = ClipEngine(model, 0.3, clipping=clipping)
    clipped_sum = engine_sum(engine, losses_of(model))
    pool = texts()
    found = sensitivity_audit(clipped_sum, pool, clip_norm=engine.sensitivity, background=pool[:3], tolerance=1e-9)
    assert found.passed, str(found)
    assert found.largest > 0.5  # the promise is used: these examples are clipped
    assert bool((model.transformer.wte.weight.grad == 1).all())  # what stood in .grad stands there still
    assert not any(part.any() for part in clipped_sum([]).values())
    assert set(clipped_sum(pool[:1])) == {name for name, _ in model.named_parameters()}


def private_step(claimed_clip=0.3, **deeds):
    from oral4.dp.engine import ClipEngine
    from oral4.dp.private import DPOptimizer

    model = tiny_gpt2(torch.float32)
    engine = ClipEngine(model, deeds.get("clip", 0.3))
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), engine, deeds.get("sigma", 0.8),
        deeds.get("batch", 12), generator=seeded(4), i_know_this_is_not_private=True,
    )  # fmt: skip
    losses, pool = losses_of(model), texts()
    before = [p.detach().clone() for p in model.parameters()]
    step = optimizer_step(optimizer, losses)
    found = mechanism_audit(
        step, pool[:2], [*pool[:2], pool[5]], clip_norm=claimed_clip, noise_multiplier=0.8, expected_batch_size=12,
        direction=engine_sum(engine, losses)([pool[5]]), runs=60,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return found


def test_the_private_optimizer_passes():
    found = private_step()
    assert found.passed, str(found)
    assert "transformer.wte.weight" in found.noise and len(found.noise) > 10
    assert found.shift.low < 1


@pytest.mark.parametrize(
    ("deeds", "words"),
    [
        (dict(sigma=0.7), "noise of transformer.wte.weight: 0.8"),
        (dict(sigma=0.0), "two runs on one batch are equal"),
        (dict(batch=6), "noise of transformer.wte.weight: 2.0|noise of transformer.wte.weight: 1.99"),
        (dict(clip=0.9), "noise of transformer.wte.weight: [23]"),
    ],
    ids=["less noise", "no noise", "other batch size", "other norm"],
)
def test_an_optimizer_that_does_other_than_claimed_is_caught(deeds, words):
    import re

    found = private_step(**deeds)
    assert any(re.search(words, problem) for problem in found.problems), str(found)


def test_optimizer_step_refuses():
    from oral4.dp.accountant import Accountant
    from oral4.dp.engine import ClipEngine
    from oral4.dp.private import DPOptimizer

    model = torch.nn.Linear(2, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    charged = DPOptimizer(sgd, ClipEngine(model, 1.0), 1.0, 4, Accountant(), sampling_rate=0.1)
    with pytest.raises(ValueError, match=r"charged to the accountant"):
        optimizer_step(charged, lambda examples: examples)
    moving = DPOptimizer(sgd, ClipEngine(model, 1.0, clipping="adaptive"), 1.0, 4)
    with pytest.raises(ValueError, match=r"adaptive clipping"):
        optimizer_step(moving, lambda examples: examples)
