"""Softmax, norm and layer norm against float64, at the edges too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax.common import numerics


def normal(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).standard_normal(shape, np.float32)


def test_at_least_float32_only_widens():
  assert numerics.at_least_float32(jnp.ones(2, jnp.bfloat16)).dtype == 'float32'
  assert numerics.at_least_float32([1, 2]).dtype == 'float32'
  with jax.enable_x64(True):
    assert numerics.at_least_float32(np.ones(2)).dtype == 'float64'


@pytest.mark.parametrize('axis', [-1, 0, (0, 2), (-1, -2)])
@pytest.mark.parametrize('full_mask', [False, True])
def test_masked_softmax_nothing_masked_equals_softmax(axis, full_mask):
  logits = 5 * normal(3, 4, 5)
  mask = np.ones(logits.shape, bool) if full_mask else None
  got = numerics.masked_softmax(logits, mask, axis)
  np.testing.assert_allclose(got, jax.nn.softmax(logits, axis), rtol=1e-6)


@pytest.mark.parametrize('axis', [-1, 0, (0, 2)])
def test_masked_softmax_partly_masked_matches_float64(axis):
  logits = 5 * normal(3, 4, 5)
  mask = np.arange(60).reshape(3, 4, 5) % 3 > 0
  assert mask.any(axis).all()
  wide = np.exp(logits.astype(np.float64)) * mask
  want = wide / wide.sum(axis, keepdims=True)
  got = numerics.masked_softmax(logits, mask, axis)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert not np.any(np.asarray(got)[~mask])


def test_masked_softmax_narrow_mask_broadcasts():
  logits, mask = normal(2, 3, 4), np.array([True, False, True, True])
  np.testing.assert_array_equal(
    numerics.masked_softmax(logits, mask),
    numerics.masked_softmax(logits, np.broadcast_to(mask, logits.shape)),
  )


@pytest.mark.parametrize('garbage', [np.inf, -np.inf, np.nan, 3e38, -3e38])
def test_masked_softmax_garbage_behind_the_mask_is_harmless(garbage):
  mask = np.array([[True, False, True], [False, False, False]])
  logits, cotangent = normal(2, 3), normal(2, 3)[::-1]

  def value_and_gradient(logits):
    value, pullback = jax.vjp(
      lambda x: numerics.masked_softmax(x, mask), jnp.asarray(logits)
    )
    return value, pullback(jnp.asarray(cotangent))[0]

  clean = value_and_gradient(logits)
  dirty = value_and_gradient(np.where(mask, logits, garbage))
  for got, want in zip(dirty, clean, strict=True):
    np.testing.assert_array_equal(got, want)
    assert not np.any(np.asarray(got)[~mask])
  assert np.all(np.asarray(clean[1])[mask])


def test_masked_softmax_fully_masked_row_is_zero_with_zero_gradient():
  mask = np.zeros((2, 3), bool)
  logits = jnp.asarray(normal(2, 3))
  assert not np.any(numerics.masked_softmax(logits, mask))
  gradient = jax.grad(
    lambda x: jnp.sum(numerics.masked_softmax(x, mask) * normal(2, 3))
  )(logits)
  np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


@pytest.mark.parametrize('masked', [False, True])
def test_masked_softmax_gradient_matches_float64_formula(masked):
  mask = np.array([True, True, False, True]) if masked else np.ones(4, bool)
  logits, cotangent = normal(5, 4), normal(5, 4)[::-1]
  gradient = jax.grad(
    lambda x: jnp.sum(numerics.masked_softmax(x, mask) * cotangent)
  )(jnp.asarray(logits))
  weights = np.exp(logits.astype(np.float64)) * mask
  weights /= weights.sum(-1, keepdims=True)
  centred = cotangent - (weights * cotangent).sum(-1, keepdims=True)
  np.testing.assert_allclose(gradient, weights * centred, atol=1e-6)


def test_masked_softmax_large_logits_do_not_overflow():
  got = numerics.masked_softmax(
    np.float32([3e4, 3e4, -3e4, 0]), np.array([True, True, True, False])
  )
  np.testing.assert_array_equal(got, [0.5, 0.5, 0, 0])


@pytest.mark.parametrize('mask', [None, np.arange(64) % 3 > 0])
def test_masked_softmax_bfloat16_is_computed_in_float32(mask):
  logits = jnp.asarray(normal(64), jnp.bfloat16)
  got = numerics.masked_softmax(logits, mask)
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(
    got, numerics.masked_softmax(logits.astype(jnp.float32), mask)
  )
  np.testing.assert_allclose(jnp.sum(got), 1, rtol=1e-6)


def test_masked_softmax_float64_stays_float64():
  with jax.enable_x64(True):
    logits = jnp.asarray(normal(4), jnp.float64)
    got = numerics.masked_softmax(logits, np.arange(4) < 3)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(jnp.sum(got), 1, rtol=1e-15)


def test_safe_norm_matches_float64_formula():
  x = normal(4, 3)
  want = np.sqrt(np.sum(x.astype(np.float64) ** 2, 0) + 1e-2)
  got = numerics.safe_norm(x, 0, epsilon=1e-2)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  narrow = numerics.safe_norm(jnp.asarray(x, jnp.bfloat16))
  assert narrow.dtype == jnp.float32


def test_safe_norm_at_zero_has_zero_gradient():
  zero = jnp.zeros((2, 3))
  np.testing.assert_allclose(numerics.safe_norm(zero), 1e-4, rtol=1e-6)
  gradient = jax.grad(lambda x: jnp.sum(numerics.safe_norm(x)))(zero)
  np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


@pytest.mark.parametrize(
  ('mean', 'scale', 'atol'),
  # A mean m costs m eps32 of input resolution; a variance computed as
  # E[x^2] - E[x]^2 would be off by m^2 eps32 instead: 0.06 and everything.
  [(0, 1, 2e-6), (0, 1e-4, 2e-6), (1e3, 1, 3e-4), (1e5, 1, 3e-2)],
)
def test_layer_norm_any_mean_matches_float64(mean, scale, atol):
  x = (mean + scale * normal(6, 64)).astype(np.float32)
  wide = x.astype(np.float64)
  want = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(
    wide.var(-1, keepdims=True) + 1e-5
  )
  np.testing.assert_allclose(numerics.layer_norm(x), want, rtol=0, atol=atol)


def test_layer_norm_constant_row_is_zero_with_finite_gradient():
  x = jnp.full((2, 8), 3.0)
  np.testing.assert_array_equal(numerics.layer_norm(x), np.zeros((2, 8)))
  gradient = jax.grad(lambda x: jnp.sum(numerics.layer_norm(x) * normal(2, 8)))(
    x
  )
  assert np.all(np.isfinite(gradient))
  assert np.any(gradient)


def test_layer_norm_bfloat16_returns_bfloat16_of_float32_statistics():
  x = jnp.asarray(100 + normal(4, 256), jnp.bfloat16)
  got = numerics.layer_norm(x)
  assert got.dtype == jnp.bfloat16
  want = numerics.layer_norm(x.astype(jnp.float32)).astype(jnp.bfloat16)
  np.testing.assert_array_equal(got, want)


def test_layer_norm_epsilon_is_added_to_the_variance():
  x = np.float32([[1, -1]])
  got = numerics.layer_norm(x, epsilon=3.0)
  np.testing.assert_allclose(got, x / 2, rtol=1e-6)
