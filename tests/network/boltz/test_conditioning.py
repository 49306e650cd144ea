"""Boltz's conditioning blocks where the goldens do not look."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structattn_jax as sa
from structattn_jax.reference import boltz as reference


def tokens(**changes):
  """Two copies of a chain of six, and another chain; several per residue."""
  values = {
    'asym_id': [0] * 6 + [1] * 6 + [2] * 3,
    'residue_index': [0, 1, 2, 3, 4, 5] * 2 + [0, 0, 7000],
    'entity_id': [0] * 12 + [1] * 3,
    'token_index': list(range(15)),
    'sym_id': [0] * 6 + [5] * 6 + [0] * 3,
    'cyclic_period': [6] * 6 + [0] * 9,
  }
  values |= changes
  return {name: np.array(x, np.int32) for name, x in values.items()}


@pytest.mark.parametrize('rule', ['chain', 'entity'])
@pytest.mark.parametrize(
  'change',
  [{}, {'cyclic_period': [0] * 15}, {'cyclic_period': [5] * 12 + [0] * 3}],
  ids=['cyclic', 'no_cycle', 'other_period'],
)
def test_relative_positions_match_the_one_hot_oracle(rule, change):
  config = sa.boltz.RelativePositionConfig(
    token_z=3, r_max=3, s_max=2, same_chain_rule=rule
  )
  apply = hk.without_apply_rng(
    hk.transform(lambda **x: sa.boltz.RelativePositionEncoder(config)(**x))
  )
  inputs = tokens(**change)
  params = apply.init(jax.random.key(0), **inputs)
  weights = np.asarray(params['rel_pos/linear_layer']['weights'], np.float64)
  want = reference.relative_position(
    weights, **inputs, r_max=3, s_max=2, same_chain_rule=rule
  )
  got = jax.jit(apply.apply)(params, **inputs)
  assert np.abs(got - want).max() < 1e-6


def encoded(**inputs):
  config = sa.boltz.RelativePositionConfig(token_z=3)
  run = hk.without_apply_rng(
    hk.transform(lambda **x: sa.boltz.RelativePositionEncoder(config)(**x))
  )
  return run.apply(run.init(jax.random.key(0), **inputs), **inputs)


def test_a_cyclic_chain_wraps_and_so_do_long_gaps_of_others():
  linear = encoded(**tokens(cyclic_period=[0] * 15))
  cyclic = encoded(**tokens())
  assert np.abs(cyclic[0, 5] - linear[0, 5]).max() > 1e-2  # -5 becomes 1.
  np.testing.assert_array_equal(cyclic[6, 11], linear[6, 11])
  # 7000 becomes -3000 once any chain is cyclic.
  assert np.abs(cyclic[14, 12] - linear[14, 12]).max() > 1e-2
  inputs = tokens(cyclic_period=[0] * 15)
  del inputs['cyclic_period']
  np.testing.assert_array_equal(encoded(**inputs), linear)


def test_relative_positions_refuse_floats_and_wrong_lengths():
  with pytest.raises(TypeError, match=r'^sym_id: expected integer'):
    encoded(**{**tokens(), 'sym_id': np.zeros(15)})
  with pytest.raises(ValueError, match='sym_id: expected shape'):
    encoded(**{**tokens(), 'sym_id': np.zeros(14, int)})


def test_fourier_embedding_is_fixed():
  run = hk.without_apply_rng(
    hk.transform(lambda t: sa.boltz.FourierEmbedding(5)(t))
  )
  times = jnp.array([-1.0, 0.25])
  params = run.init(jax.random.key(0), times)
  assert run.apply(params, times).shape == (2, 5)
  gradient = jax.grad(lambda p, t: run.apply(p, t).sum(), (0, 1))(params, times)
  assert not any(np.any(x) for x in jax.tree.leaves(gradient[0]))
  assert np.all(gradient[1] != 0)


def test_noise_time_follows_its_formula_and_stays_finite():
  got = sa.boltz.noise_time(jnp.array([16.0, 160.0, 0.0]))
  want = [0.0, 0.25 * np.log(10), 0.25 * np.log(1e-20)]
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_single_conditioning_without_time_has_no_fourier_parameters():
  single, inputs = jnp.ones((4, 3)), jnp.ones((4, 7))

  def run(time):
    return sa.boltz.SingleConditioning(dim_fourier=6)(single, inputs, time)

  timed = hk.without_apply_rng(hk.transform(lambda: run(jnp.array(0.5))))
  params = timed.init(jax.random.key(0))
  s, fourier = timed.apply(params)
  assert s.shape == (4, 6)
  assert fourier.shape == (6,)
  plain = hk.without_apply_rng(hk.transform(lambda: run(None)))
  own = plain.init(jax.random.key(0))
  assert own.keys() == {k for k in params if 'fourier' not in k}
  s, fourier = plain.apply(own)
  assert s.shape == (4, 6)
  assert fourier is None


def test_fresh_pairwise_conditioning_is_its_projection():
  """The last layer of each transition starts at zero."""
  pair, relative = jnp.ones((4, 4, 3)), jnp.zeros((4, 4, 3))
  run = hk.without_apply_rng(
    hk.transform(lambda: sa.boltz.PairwiseConditioning()(pair, relative))
  )
  params = run.init(jax.random.key(0))
  x = np.concatenate([pair, relative], -1)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  weights = params['pairwise_conditioner/dim_pairwise_init_proj_1']['weights']
  np.testing.assert_allclose(
    run.apply(params), x @ np.asarray(weights), atol=1e-5
  )
  with pytest.raises(ValueError, match='relative_position: expected shape'):
    hk.transform(
      lambda: sa.boltz.PairwiseConditioning()(pair, relative[:3])
    ).init(jax.random.key(0))
