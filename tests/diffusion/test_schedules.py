"""Noise levels, preconditioning and training noise."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax import diffusion
from structattn_jax.reference import diffusion as reference

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens/boltz_diffusion'
NUMBERS = {'s_min': 4e-4, 's_max': 160.0, 'rho': 7.0, 'sigma_data': 16.0}


@pytest.mark.parametrize('steps', [1, 2, 5, 200])
def test_levels_equal_the_oracle(steps):
  for last, levels in (
    ('sigma_min', reference.alphafold3_levels),
    ('zero', reference.boltz_levels),
  ):
    config = diffusion.ScheduleConfig(last=last)
    got = diffusion.noise_levels(config, steps)
    assert got.shape == (steps + 1,)
    np.testing.assert_allclose(got, levels(steps, **NUMBERS), rtol=1e-12)
    assert (np.diff(got) < 0).all()


def test_levels_end_where_they_should():
  first, *_, last = diffusion.noise_levels(diffusion.ScheduleConfig(), 200)
  np.testing.assert_allclose([first, last], [2560, 6.4e-3], rtol=1e-12)
  boltz = diffusion.SamplerConfig.boltz2().schedule
  *_, before, last = diffusion.noise_levels(boltz, 200)
  assert (round(before, 10), last) == (1.6e-3, 0)


@pytest.mark.parametrize('name', ['alphafold3', 'boltz1', 'boltz2'])
def test_sampler_presets_are_those_of_the_class(name):
  stem = name.replace('alphafold', 'af')
  loaded = diffusion.SamplerConfig.from_toml(CONFIGS / f'{stem}_sampler.toml')
  assert loaded == getattr(diffusion.SamplerConfig, name)()


def test_added_noise_depends_on_the_level_stepped_to():
  config = diffusion.SamplerConfig(steps=40)
  levels = diffusion.noise_levels(config.schedule, 40)
  steps = diffusion.sampler_steps(config)
  grows = steps.sigma > levels[:-1] * 1.5
  np.testing.assert_array_equal(grows, levels[1:] > 1)
  assert 0 < grows.sum() < 40
  # One level is above 1 and the next is not.
  assert levels[:-1][~grows][0] > 1
  np.testing.assert_allclose(
    steps.noise[grows], 1.003 * np.sqrt(1.8**2 - 1) * levels[:-1][grows]
  )
  np.testing.assert_array_equal(steps.noise[~grows], 0)


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_training_noise_levels_are_those_recorded(dtype):
  for case in ('v1_small', 'v2_small'):
    with np.load(GOLDENS / f'{case}.npz') as file:
      normal = file['draws/train/normal/0'].astype(dtype)
      suffix = '64' if dtype == 'float64' else ''
      want = file[f'outputs{suffix}/train/sigmas']
    with jax.enable_x64(dtype == 'float64'):
      got = diffusion.training_noise_levels(
        diffusion.TrainingNoiseConfig(), normal=normal
      )
    assert got.dtype == dtype
    rtol = 1e-12 if dtype == 'float64' else 5e-7
    np.testing.assert_allclose(got, want, rtol=rtol)


def test_training_noise_has_its_mean_and_deviation():
  config = diffusion.TrainingNoiseConfig(p_mean=-0.5, p_std=0.7)
  sigma = diffusion.training_noise_levels(
    config, key=jax.random.key(0), shape=(20000,)
  )
  logs = np.log(np.asarray(sigma) / 16)
  assert abs(logs.mean() + 0.5) < 0.02
  assert abs(logs.std() - 0.7) < 0.02


def test_conditioning_is_used_as_often_as_it_should():
  used = diffusion.draw_use_conditioning(jax.random.key(0), (20000,))
  assert used.dtype == bool
  assert abs(np.mean(used) - 0.8) < 0.01
  always = diffusion.draw_use_conditioning(
    jax.random.key(0), (100,), probability=1
  )
  assert np.all(always)
  with pytest.raises(ValueError, match=r'probability: expected .* got 2'):
    diffusion.draw_use_conditioning(jax.random.key(0), probability=2)


@pytest.mark.parametrize('sigma', [1e-3, 6.4e-3, 16.0, 4608.0])
def test_preconditioning_equals_the_oracle(sigma):
  x = np.random.default_rng(0).normal(size=(3, 5, 3)) * sigma
  with jax.enable_x64(True):
    factors = diffusion.preconditioning(sigma)
    update = np.tanh(factors.c_in * x) * factors.c_noise
    got = diffusion.denoised_positions(x, update, sigma)
  want = reference.precondition(
    lambda scaled, time: np.tanh(scaled) * time, x, sigma, 16.0
  )
  np.testing.assert_allclose(got, want, rtol=1e-12)


def test_preconditioning_of_one_level_per_sample():
  sigma = np.array([0.1, 30.0], np.float32)
  x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
  got = diffusion.denoised_positions(x, 2 * x, sigma)
  for i in range(2):
    want = diffusion.denoised_positions(x[i], 2 * x[i], sigma[i])
    np.testing.assert_allclose(got[i], want, rtol=1e-6)


@pytest.mark.parametrize('sigma', [0.0, 1e-3, 2560.0])
def test_preconditioning_is_finite_with_finite_gradients(sigma):
  values = diffusion.preconditioning(sigma)
  slopes = jax.jacfwd(diffusion.preconditioning)(jnp.float32(sigma))
  backward = jax.jacrev(diffusion.preconditioning)(jnp.float32(sigma))
  for tree in (values, slopes, backward):
    assert np.isfinite(jax.tree.leaves(tree)).all()
  # Scaled inputs and targets have variance one: sigma² + 16², and what is left.
  np.testing.assert_allclose(values.c_in**2 * (sigma**2 + 256), 1, rtol=1e-6)
  left = (1 - values.c_skip) ** 2 * 256 + values.c_skip**2 * sigma**2
  np.testing.assert_allclose(values.c_out**2, left, rtol=1e-5)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: diffusion.ScheduleConfig(sigma_min=0.0), 'sigma_min: expected'),
    (lambda: diffusion.ScheduleConfig(sigma_max=1e-5), 'sigma_max: expected'),
    (lambda: diffusion.ScheduleConfig(rho=float('inf')), 'rho: expected'),
    (lambda: diffusion.TrainingNoiseConfig(p_std=0.0), 'p_std: expected'),
    (
      lambda: diffusion.noise_levels(diffusion.ScheduleConfig(), 0),
      'steps: expected at least 1, got 0',
    ),
    (
      functools.partial(
        diffusion.training_noise_levels, diffusion.TrainingNoiseConfig()
      ),
      'key, normal: expected exactly one',
    ),
  ],
)
def test_mistakes_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()
