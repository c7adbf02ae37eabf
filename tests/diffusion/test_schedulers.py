"""The adaptor to diffusers: same numbers as its schedulers, predictions of every kind, tables without diffusers."""

import math
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm

from oral4.diffusion.schedulers import (
    clipped,
    from_diffusers,
    scheduler_times,
    score_from_denoised,
    score_from_noise,
    score_from_velocity,
)
from oral4.diffusion.sde import VE, VP, DiscreteVP, GaussianMixture, SubVP
from oral4.diffusion.solvers import ddim, sample

SPACINGS = ["leading", "trailing", "linspace"]
PREDICTIONS = {"epsilon": score_from_noise, "v_prediction": score_from_velocity, "sample": score_from_denoised}
KINDS = {
    "ml": (DDPMScheduler, "ml", {"variance_type": "fixed_small", "clip_sample": False}),
    "ddim": (DDIMScheduler, "ddim", {"clip_sample": False}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, "dpmpp_2m", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc_2": (UniPCMultistepScheduler, "unipc_2", {"solver_order": 2, "solver_type": "bh2"}),
}


def network(x, index):
    """Some smooth function of state and time, with values of size 1."""
    mix = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(6, 6).sin().to(x.dtype)
    return torch.tanh(0.5 * x @ mix + (index.to(x.dtype) / 700)[:, None])


def theirs(scheduler, count, x, noise, monkeypatch, **options):
    """Step through a scheduler of diffusers with given noise."""
    scheduler.set_timesteps(count)
    for i, t in enumerate(scheduler.timesteps):
        for module in (scheduling_ddpm, scheduling_ddim):
            monkeypatch.setattr(module, "randn_tensor", lambda *_, i=i, **__: noise[i])
        x = scheduler.step(network(x, t.expand(len(x))), t, x, **options).prev_sample
    return x


def in_double(scheduler):
    """Give a scheduler its table in float64, so that the comparison is of formulas, not of rounding."""
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    one = torch.ones((), dtype=torch.float64)
    if isinstance(scheduler, DDPMScheduler):
        scheduler.one = one
    if isinstance(scheduler, DDIMScheduler):
        scheduler.final_alpha_cumprod = one if scheduler.config.set_alpha_to_one else scheduler.alphas_cumprod[0]
    return scheduler


def draws(count, dtype):
    generator = torch.Generator().manual_seed(count)
    drawn = torch.randn(count + 1, 4, 6, generator=generator, dtype=torch.float64).to(dtype)
    return drawn[0], drawn[1:]


def assert_same_walk(kind, count, config, monkeypatch, *, dtype=torch.float64, rtol, prediction="epsilon", **options):
    make, solver, fixed = KINDS[kind]
    scheduler = make(prediction_type=prediction, **fixed, **config)
    if dtype == torch.float64:
        scheduler = in_double(scheduler)
    x, noise = draws(count, dtype)
    expected = theirs(scheduler, count, x, noise, monkeypatch, **options)
    sde = from_diffusers(scheduler)
    times = scheduler_times(make(**fixed, **config), count)
    solver = partial(ddim, **options) if options else solver
    found = sample(PREDICTIONS[prediction](network, sde), x, sde, times, solver=solver, noise=noise[: len(times) - 1])
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=rtol)


# ----------------------------------------------------------------------------- the same walk as diffusers


@pytest.mark.parametrize("count", [200, 50, 10, 7])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.filterwarnings("ignore:the step from")
def test_ml_is_ddpm_with_the_small_variance(spacing, count, monkeypatch):
    # float64: diffusers keeps a variance of 1e-20 in its last step, 1e-10 of noise
    assert_same_walk("ml", count, {"timestep_spacing": spacing}, monkeypatch, rtol=1e-9)


def test_ml_is_ddpm_on_the_full_grid_in_float32(monkeypatch):
    # a thousand steps in float32; 1 - alpha_bar of diffusers' float32 table loses four digits at the last steps
    assert_same_walk("ml", 1000, {}, monkeypatch, dtype=torch.float32, rtol=1e-5)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.filterwarnings("ignore:the step from")
def test_ml_is_ddpm_in_float32(spacing, monkeypatch):
    assert_same_walk("ml", 25, {"timestep_spacing": spacing}, monkeypatch, dtype=torch.float32, rtol=1e-5)


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.filterwarnings("ignore:the step from")
def test_ml_is_ddpm_for_other_schedules(beta_schedule, monkeypatch):
    # the cosine table ends at 2e-9, so 1 / a multiplies rounding by 2e4 in the first step
    assert_same_walk("ml", 20, {"beta_schedule": beta_schedule, "timestep_spacing": "trailing"}, monkeypatch, rtol=1e-8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", ["ml", "ddim"])
@pytest.mark.filterwarnings("ignore:the step from")
def test_every_kind_of_prediction(kind, prediction, monkeypatch):
    assert_same_walk(kind, 20, {"timestep_spacing": "trailing"}, monkeypatch, prediction=prediction, rtol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("spacing", "count"), [("leading", 50), ("leading", 7), ("trailing", 50), ("trailing", 10)])
@pytest.mark.filterwarnings("ignore:the step from")
def test_ddim_is_ddim(spacing, count, eta, monkeypatch):
    assert_same_walk("ddim", count, {"timestep_spacing": spacing}, monkeypatch, eta=eta, rtol=1e-9)


def test_ddim_is_ddim_on_the_full_grid(monkeypatch):
    assert_same_walk("ddim", 1000, {"timestep_spacing": "linspace"}, monkeypatch, eta=0.0, rtol=1e-9)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.filterwarnings("ignore:the step from")
def test_ddim_that_stops_at_the_first_entry(spacing, monkeypatch):
    """The setting of Stable Diffusion: the last step goes to the first entry of the table, not to clean data."""
    config = {"set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": spacing}
    assert scheduler_times(DDIMScheduler(**config), 10)[-1] == 1 / 1000
    assert_same_walk("ddim", 10, config, monkeypatch, eta=0.5, rtol=1e-9)


@pytest.mark.parametrize("count", [20, 7])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", ["dpmpp_2m", "unipc_2"])
@pytest.mark.filterwarnings("ignore:the step from")
def test_multistep_solvers_are_those_of_diffusers(kind, spacing, count, monkeypatch):
    # diffusers keeps its noise levels in float32, which is 6e-8, and sums a few of them
    assert_same_walk(kind, count, {"timestep_spacing": spacing}, monkeypatch, rtol=3e-6)


@pytest.mark.parametrize("kind", ["dpmpp_2m", "unipc_2"])
def test_multistep_solvers_that_stop_at_the_first_entry(kind):
    make, _, fixed = KINDS[kind]
    times = scheduler_times(make(final_sigmas_type="sigma_min", timestep_spacing="trailing", **fixed), 10)
    assert times[-1] == 1 / 1000 and len(times) == 11


def test_clipped_is_clip_sample(monkeypatch):
    scheduler = in_double(DDPMScheduler(clip_sample=True, clip_sample_range=0.8, timestep_spacing="trailing"))
    x, noise = draws(20, torch.float64)
    expected = theirs(scheduler, 20, x, noise, monkeypatch)
    sde = from_diffusers(scheduler)
    score = score_from_noise(network, sde)
    times = scheduler_times(scheduler, 20)
    free = sample(score, x, sde, times, noise=noise)
    found = sample(clipped(score, sde, 0.8), x, sde, times, noise=noise)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)  # as without clipping
    assert (found - free).abs().max() > 0.1  # the limit was reached


def test_ddim_of_diffusers_drifts_where_n_does_not_divide_the_table(monkeypatch):
    """Known difference, kept visible: DDIMScheduler steps by K // n, whatever times it visits."""
    with pytest.raises(AssertionError, match="Mismatched"):
        assert_same_walk("ddim", 10, {"timestep_spacing": "linspace"}, monkeypatch, rtol=1e-3)


# ------------------------------------------------------------------------------------ process and times


@pytest.mark.parametrize("make", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_process_of_a_scheduler(make):
    scheduler = make()
    sde = from_diffusers(scheduler)
    assert isinstance(sde, DiscreteVP) and sde.num_steps == 1000
    for index in (0, 499, 999):
        assert sde.a((index + 1) / 1000) ** 2 == pytest.approx(float(scheduler.alphas_cumprod[index]), rel=1e-12)
    assert sde.a(0.0) == 1 and sde.v(0.0) == 0


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_any_object_with_the_table_will_do(kind):
    sde = from_diffusers(SimpleNamespace(alphas_cumprod=kind([0.9, 0.5, 0.1])))
    assert sde.v(1.0) == pytest.approx(0.9, rel=1e-6)  # float32 in the last case
    result = sample(score_from_noise(network, sde), torch.zeros(2, 6), sde, 3, solver="ddim")
    assert result.isfinite().all()


def test_no_table_is_an_error():
    for thing in (FlowMatchEulerDiscreteScheduler(), SimpleNamespace()):
        for function in (from_diffusers, partial(scheduler_times, n=5)):
            with pytest.raises(TypeError, match="has no alphas_cumprod; give a scheduler of a variance pres"):
                function(thing)


def test_a_table_that_ends_at_zero_is_an_error():
    with pytest.raises(ValueError, match=r"alphas_bar\[999\] = 0.0"):
        from_diffusers(DDIMScheduler(rescale_betas_zero_snr=True))


def test_times_are_those_the_scheduler_visits_and_it_is_left_alone():
    scheduler = DDPMScheduler(timestep_spacing="leading")
    scheduler.set_timesteps(4)
    before = scheduler.timesteps.clone()
    assert scheduler_times(scheduler, 5) == [0.801, 0.601, 0.401, 0.201, 0.001, 0.0]
    assert torch.equal(scheduler.timesteps, before) and scheduler.num_inference_steps == 4
    assert scheduler_times(scheduler) == [0.751, 0.501, 0.251, 0.001, 0.0]  # what is set now
    assert scheduler_times(DDPMScheduler(timestep_spacing="trailing"), 5) == [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    assert scheduler_times(DDPMScheduler(timestep_spacing="linspace"), 3) == [1.0, 0.501, 0.001, 0.0]
    # from the first entry to the first entry is no step
    assert scheduler_times(DDIMScheduler(timestep_spacing="linspace", set_alpha_to_one=False), 3) == [1.0, 0.501, 0.001]


def test_own_timesteps():
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(timesteps=[900, 500, 100, 20])
    assert scheduler_times(scheduler) == [0.901, 0.501, 0.101, 0.021, 0.0]


@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_times_between_the_entries_are_an_error(option):
    with pytest.raises(ValueError, match="visits times between the points of its table of 1000"):
        scheduler_times(DPMSolverMultistepScheduler(**{option: True}), 10)


def test_timesteps_that_are_no_whole_numbers_are_an_error():
    scheduler = EulerDiscreteScheduler(timestep_spacing="linspace")
    with pytest.raises(ValueError, match="visits times between"):
        scheduler_times(scheduler, 7)
    assert len(scheduler_times(EulerDiscreteScheduler(timestep_spacing="leading"), 7)) == 8


def test_objects_without_timesteps_say_what_to_do():
    bare = SimpleNamespace(alphas_cumprod=[0.9, 0.1])
    with pytest.raises(TypeError, match="has no set_timesteps; give sample the number of steps"):
        scheduler_times(bare, 2)
    with pytest.raises(TypeError, match="has no timesteps; give n"):
        scheduler_times(bare)
    for bad in (1001, 2000):
        with pytest.raises(ValueError, match="1000"):
            scheduler_times(DDPMScheduler(), bad)


def test_the_module_needs_no_diffusers(monkeypatch):
    import importlib

    import oral4.diffusion.schedulers as module

    for name in [n for n in sys.modules if n.split(".")[0] == "diffusers"]:
        monkeypatch.setitem(sys.modules, name, None)  # import of it now fails
    fresh = importlib.util.module_from_spec(module.__spec__)
    module.__spec__.loader.exec_module(fresh)
    assert fresh.from_diffusers(SimpleNamespace(alphas_cumprod=[0.9, 0.1])).num_steps == 2


# --------------------------------------------------------------------------------------- predictions


MIXTURE = GaussianMixture(torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=torch.float64), 0.3)


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(0.01, 10.0), DiscreteVP(torch.linspace(0.99, 0.01, 10))])
@pytest.mark.parametrize("xbar", [0.0, 0.7])
def test_exact_predictions_give_the_exact_score(sde, xbar):
    """The best predictions of noise, velocity and data follow from the posterior mean; the score has to come back."""
    times = []

    def parts(x, given):
        times.append(given)
        t = (given + 1) / 10 if isinstance(sde, DiscreteVP) else given
        t = t.double()
        guess = MIXTURE.posterior(x, t, sde, xbar=xbar)[0]
        a, std = sde.a(t)[:, None], sde.v(t).sqrt()[:, None]
        return guess, (x - xbar - a * (guess - xbar)) / std, a, std

    networks = {
        score_from_noise: lambda x, t: parts(x, t)[1],
        score_from_denoised: lambda x, t: parts(x, t)[0],
        score_from_velocity: lambda x, t: (lambda g, e, a, std: a * e - std * (g - xbar))(*parts(x, t)),
    }
    x = torch.randn(3, 2, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)  # every item its own
    for make, net in networks.items():
        options = {} if make is score_from_noise else {"xbar": xbar}
        found = make(net, sde, **options)(x, t)
        torch.testing.assert_close(found, MIXTURE.score(x, t, sde, xbar=xbar), rtol=1e-9, atol=1e-9)
    expected = torch.tensor([0, 4, 9]) if isinstance(sde, DiscreteVP) else t
    assert all(torch.equal(given, expected) for given in times)


def test_answers_of_diffusers_models_are_understood():
    sde, x, t = VP(), torch.randn(2, 3), torch.full((2,), 0.5)
    expected = score_from_noise(lambda x, t: x, sde)(x, t)
    for wrap in (lambda out: SimpleNamespace(sample=out), lambda out: (out,)):
        assert torch.equal(score_from_noise(lambda x, t, wrap=wrap: wrap(x), sde)(x, t), expected)


def test_a_small_network_of_diffusers_runs():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    sde = from_diffusers(DDPMScheduler())
    times = scheduler_times(DDPMScheduler(timestep_spacing="trailing"), 5)
    with torch.no_grad():
        images = sample(
            clipped(score_from_noise(unet, sde), sde),
            torch.randn(2, 1, 8, 8),
            sde,
            times,
            solver="unipc_2",
        )
    assert images.shape == (2, 1, 8, 8) and images.abs().max() <= 1 + 1e-5  # the last step is the guess of the data


@pytest.mark.parametrize("make", PREDICTIONS.values())
def test_half_networks_are_widened(make):
    sde, asked = VP(), []
    score = make(lambda x, t: (asked.append((x.dtype, t.dtype)), x)[1], sde)
    out = score(torch.ones(2, 3, dtype=torch.bfloat16), torch.full((2,), 0.3))
    assert out.dtype == torch.float32 and asked == [(torch.bfloat16, torch.float32)]
    torch.testing.assert_close(out, make(lambda x, t: x, sde)(torch.ones(2, 3), torch.full((2,), 0.3)))


@pytest.mark.parametrize("make", PREDICTIONS.values())
def test_bad_answers_and_times(make):
    chain = DiscreteVP([0.9, 0.5])
    with pytest.raises(ValueError, match=r"returned shape \(2, 6\) for x of shape \(2, 3\); .*first half"):
        make(lambda x, t: torch.cat([x, x], 1), chain)(torch.zeros(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match=r"t=0: .*for t > 0 only"):
        make(lambda x, t: x, chain)(torch.zeros(2, 3), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="lies between two"):
        make(lambda x, t: x, chain)(torch.zeros(2, 3), torch.tensor([1.0, 0.7]))


def test_clipped_leaves_a_score_alone_inside_the_limit():
    sde, x, t = VP(), 0.3 * torch.randn(50, 2), torch.full((50,), 0.2)
    score = lambda x, t: MIXTURE.score(x, t, sde)
    assert torch.equal(clipped(score, sde, 100.0)(x, t), score(x, t))
    limited = clipped(score, sde, 0.5, xbar=0.0)(x, t)
    a, v = sde.a(0.2), sde.v(0.2)
    guess, free = (x + v * limited) / a, (x + v * score(x, t)) / a
    torch.testing.assert_close(guess, free.clamp(-0.5, 0.5), rtol=0, atol=1e-5)  # float32
    assert (free.abs() > 0.5).any() and (free.abs() < 0.5).any()
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"limit=.*over 0"):
            clipped(score, sde, bad)
