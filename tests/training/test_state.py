"""Optimiser, warm-up, clipping and moving average against NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from structattn_jax import training


def oracle(config, params, gradients):
  """SEDD's step function, in float64; returns parameters and average."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  m = {k: np.zeros_like(v) for k, v in p.items()}
  v = {k: np.zeros_like(x) for k, x in p.items()}
  average = {k: x.copy() for k, x in p.items()}
  for k, step_gradients in enumerate(gradients, start=1):
    g = {n: np.asarray(x, np.float64) for n, x in step_gradients.items()}
    norm = np.sqrt(sum((x**2).sum() for x in g.values()))
    factor = min(1, config.clip / (norm + 1e-6))
    lr = config.learning_rate * min(k / config.warmup, 1)
    decay = min(config.ema_decay, (1 + k) / (10 + k))
    for n in p:
      m[n] = config.b1 * m[n] + (1 - config.b1) * factor * g[n]
      v[n] = config.b2 * v[n] + (1 - config.b2) * (factor * g[n]) ** 2
      m_hat = m[n] / (1 - config.b1**k)
      v_hat = v[n] / (1 - config.b2**k)
      p[n] *= 1 - lr * config.weight_decay
      p[n] -= lr * m_hat / (np.sqrt(v_hat) + config.eps)
      average[n] -= (1 - decay) * (average[n] - p[n])
  return p, average


@pytest.mark.parametrize('scale', [0.1, 100.0], ids=['small', 'clipped'])
def test_steps_follow_the_published_step_function(scale):
  config = training.OptimizerConfig(
    learning_rate=1e-2, warmup=3, weight_decay=0.1, ema_decay=0.3
  )
  rng = np.random.default_rng(0)
  shapes = {'w': (3, 2), 'b': (2,)}

  def draw(scale):
    return {
      k: (scale * rng.normal(size=s)).astype(np.float32)
      for k, s in shapes.items()
    }

  params = draw(1.0)
  gradients = [draw(scale) for _ in range(6)]
  optimizer = training.make_optimizer(config)
  state = training.init_state(jax.tree.map(jnp.asarray, params), optimizer)
  for g in gradients:
    state = training.apply_gradients(state, g, optimizer, config.ema_decay)
  expected, average = oracle(config, params, gradients)
  assert state.step == 6
  for name in shapes:
    np.testing.assert_allclose(state.params[name], expected[name], rtol=1e-5)
    np.testing.assert_allclose(state.ema[name], average[name], rtol=1e-5)


def test_clipping_scales_to_the_norm_and_leaves_small_gradients():
  config = training.OptimizerConfig(clip=1.0)
  clip = training.make_optimizer(config)
  params = {'w': jnp.zeros(2)}
  state = clip.init(params)
  # The first moment shows what arrived: (1 - b1) g.
  for gradient, arrived in (([3.0, 4.0], [0.6, 0.8]), ([0.3, 0.4], [0.3, 0.4])):
    _, after = clip.update({'w': jnp.array(gradient)}, state, params)
    mu = optax.tree_utils.tree_get(after, 'mu')['w']
    np.testing.assert_allclose(mu / 0.1, arrived, rtol=2e-6)


def test_warmup_rises_linearly_from_the_first_step():
  config = training.OptimizerConfig(warmup=4)
  steps = jnp.arange(1, 7)
  np.testing.assert_allclose(
    training.warmup_factor(config, steps), [0.25, 0.5, 0.75, 1, 1, 1]
  )
  assert training.warmup_factor(training.OptimizerConfig(warmup=0), 1) == 1


def test_average_starts_as_a_copy_of_its_own():
  optimizer = training.make_optimizer(training.OptimizerConfig())
  params = {'w': jnp.ones(3)}
  state = training.init_state(params, optimizer)
  assert state.ema['w'] is not state.params['w']
  np.testing.assert_array_equal(state.ema['w'], params['w'])
