"""`Linear` and `LayerNorm`: names, shapes, initial values, dtypes."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax.components import haiku_modules as hm

FAN_IN, FAN_OUT = 1024, 512
TORCH_BOUND = FAN_IN**-0.5
XAVIER_BOUND = (6 / (FAN_IN + FAN_OUT)) ** 0.5
# A truncated normal reaches two of its own standard deviations.
CUT = 2 / hm.TRUNCATED_NORMAL_STDDEV


def transform(make):
  """Pure init and apply of one module called on its input."""
  return hk.without_apply_rng(hk.transform(lambda x: make()(x)))


def shapes(params):
  return {
    f'{module}/{name}': (value.shape, str(value.dtype))
    for module, values in params.items()
    for name, value in values.items()
  }


def normal(*shape):
  return np.random.default_rng(0).standard_normal(shape, np.float32)


@pytest.mark.parametrize(
  ('num_output', 'use_bias', 'want'),
  [
    (5, True, {'weights': (4, 5), 'bias': (5,)}),
    (5, False, {'weights': (4, 5)}),
    ((2, 3), True, {'weights': (4, 2, 3), 'bias': (2, 3)}),
  ],
)
def test_linear_parameters_have_alphafold_names(num_output, use_bias, want):
  init, apply = transform(
    lambda: hm.Linear(num_output, use_bias=use_bias, name='q_data')
  )
  x = normal(7, 6, 4)
  params = init(jax.random.key(0), x)
  assert shapes(params) == {
    f'q_data/{name}': (shape, 'float32') for name, shape in want.items()
  }
  params = jax.tree.map(lambda p: normal(*p.shape), params)
  own = {name: np.float64(value) for name, value in params['q_data'].items()}
  expected = np.tensordot(x, own['weights'], 1) + own.get('bias', 0)
  np.testing.assert_allclose(apply(params, x), expected, atol=1e-5)


def test_linear_bias_starts_at_zero():
  params = transform(lambda: hm.Linear(5)).init(jax.random.key(0), normal(2, 4))
  assert not np.any(params['linear']['bias'])
  assert np.all(params['linear']['weights'])


@pytest.mark.parametrize(
  ('name', 'std', 'bound'),
  [
    ('linear', FAN_IN**-0.5, CUT * FAN_IN**-0.5),
    ('relu', (2 / FAN_IN) ** 0.5, CUT * (2 / FAN_IN) ** 0.5),
    ('normal', FAN_IN**-0.5, None),
    ('torch', TORCH_BOUND / 3**0.5, TORCH_BOUND),
    ('xavier', XAVIER_BOUND / 3**0.5, XAVIER_BOUND),
    ('embedding', 0.02, None),
  ],
)
def test_initializer_named_has_its_spread(name, std, bound):
  module = transform(lambda: hm.Linear((16, FAN_OUT // 16), initializer=name))
  params = module.init(jax.random.key(1), jnp.ones((1, FAN_IN)))
  weights = np.asarray(params['linear']['weights'], np.float64)
  # Half a million draws: the spread is known to 0.1 %, the mean to 0.14 %.
  assert abs(weights.std() / std - 1) < 0.01
  assert abs(weights.mean()) < 0.01 * std
  largest = np.abs(weights).max()
  if bound is None:  # Normal: draws beyond four deviations are sure.
    assert largest > 4 * std
  else:
    assert 0.99 * bound < largest <= bound * (1 + 1e-6)


def test_initializer_zeros_is_zero():
  params = transform(lambda: hm.Linear(5, initializer='zeros')).init(
    jax.random.key(0), normal(2, 4)
  )
  assert not np.any(params['linear']['weights'])


def test_initializer_unknown_name_raises():
  with pytest.raises(ValueError, match=r"initializer: unknown name 'glorot'"):
    hm.initializer('glorot', 4)  # ty: ignore
  with pytest.raises(ValueError, match="unknown name 'glorot'"):
    transform(lambda: hm.Linear(5, initializer='glorot')).init(
      jax.random.key(0), normal(2, 4)
    )


@pytest.mark.parametrize(
  ('scale', 'offset'), [(True, True), (True, False), (False, True)]
)
def test_layer_norm_parameters_have_alphafold_names(scale, offset):
  init, apply = transform(
    lambda: hm.LayerNorm(create_scale=scale, create_offset=offset, name='ln')
  )
  x = normal(3, 8)
  params = init(jax.random.key(0), x)
  names = ['scale'] * scale + ['offset'] * offset
  assert shapes(params) == {f'ln/{n}': ((8,), 'float32') for n in names}
  want = (x - x.mean(-1, keepdims=True)) / np.sqrt(
    x.var(-1, keepdims=True) + 1e-5
  )
  np.testing.assert_allclose(apply(params, x), want, atol=1e-5)
  params = jax.tree.map(lambda p: normal(*p.shape), params)
  own = params['ln']
  want = want * own.get('scale', 1) + own.get('offset', 0)
  np.testing.assert_allclose(apply(params, x), want, atol=1e-5)


def test_layer_norm_without_parameters_has_none():
  init, apply = transform(
    lambda: hm.LayerNorm(create_scale=False, create_offset=False)
  )
  params = init(jax.random.key(0), normal(3, 8))
  assert not params
  assert apply(params, normal(3, 8)).shape == (3, 8)


@pytest.mark.parametrize('make', [lambda: hm.Linear(8), hm.LayerNorm])
def test_module_bfloat16_activations_keep_float32_parameters(make):
  init, apply = transform(make)
  x = jnp.asarray(normal(3, 8), jnp.bfloat16)
  params = init(jax.random.key(0), x)
  assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype('float32')}
  got = apply(params, x)
  assert got.dtype == jnp.bfloat16
  want = apply(params, x.astype(jnp.float32))
  error = np.abs(np.asarray(got, np.float32) - want)
  assert error.max() < 2**-7 * np.abs(want).max()


@pytest.mark.parametrize('make', [lambda: hm.Linear(8), hm.LayerNorm])
def test_module_float64_activations_have_float64_parameters(make):
  with jax.enable_x64(True):
    init, apply = transform(make)
    x = jnp.asarray(normal(3, 8), jnp.float64)
    params = init(jax.random.key(0), x)
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype('float64')}
    assert apply(params, x).dtype == jnp.float64
