"""Attention over windows and its own gradient, against loops in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax.components import windowed_attention as wa

N_WINDOW, N_QUERY, N_KEYS, N_HEAD, N_ATOM = 6, 3, 5, 2, 18
# They overlap, and some atoms are in none.
KEY_START = np.array([0, 0, 4, 7, 12, 13], np.int32)


def inputs(dtype='float64'):
  rng = np.random.default_rng(0)
  q, k = (rng.standard_normal((N_ATOM, N_HEAD, 4)) for _ in range(2))
  v = rng.standard_normal((N_ATOM, N_HEAD, 3))
  bias = rng.standard_normal((N_WINDOW, N_HEAD, N_QUERY, N_KEYS))
  return tuple(x.astype(dtype) for x in (q, k, v, bias))


def expected(q, k, v, bias):
  """Query by query and head by head."""
  out = np.zeros((N_ATOM, N_HEAD, v.shape[-1]))
  for i in range(N_ATOM):
    window, row = divmod(i, N_QUERY)
    own = slice(KEY_START[window], KEY_START[window] + N_KEYS)
    for h in range(N_HEAD):
      logits = k[own, h] @ q[i, h] + bias[window, h, row]
      weights = np.exp(logits - logits.max())
      out[i, h] = weights @ v[own, h] / weights.sum()
  return out


@pytest.mark.parametrize('chunk', [1, 2, 6])
def test_values_equal_those_of_loops(chunk):
  arrays = inputs()
  with jax.enable_x64(True):
    got = wa.windowed_attention(chunk, *arrays, KEY_START)
    assert got.dtype == jnp.float64
    got = np.asarray(got)
  np.testing.assert_allclose(got, expected(*arrays), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize('chunk', [1, 3])
@pytest.mark.parametrize('name', ['q', 'k', 'v', 'bias'])
def test_gradient_is_that_of_differences_of_loops(chunk, name):
  arrays, rng = inputs(), np.random.default_rng(1)
  at = ['q', 'k', 'v', 'bias'].index(name)
  cotangent = rng.standard_normal((N_ATOM, N_HEAD, 3))
  direction = rng.standard_normal(arrays[at].shape)

  def moved(step):
    own = [*arrays]
    own[at] = own[at] + step * direction
    return np.sum(expected(*own) * cotangent)

  with jax.enable_x64(True):
    gradient = jax.grad(
      lambda *x: jnp.sum(
        wa.windowed_attention(chunk, *x, KEY_START) * cotangent
      ),
      at,
    )(*arrays)
    got = float(np.sum(np.asarray(gradient) * direction))
  h = 1e-3
  slope = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / 12 / h
  assert abs(got - slope) < 1e-9 * max(abs(slope), 1)


def test_atoms_outside_all_windows_have_no_gradient():
  arrays = inputs('float32')
  d_k, d_v = jax.grad(
    lambda q, k, v, bias: jnp.sum(
      wa.windowed_attention(2, q, k, v, bias, KEY_START) ** 2
    ),
    (1, 2),
  )(*arrays)
  seen = np.zeros(N_ATOM, bool)
  for start in KEY_START:
    seen[start : start + N_KEYS] = True
  assert 0 < seen.sum() <= N_ATOM
  for gradient in (d_k, d_v):
    np.testing.assert_array_equal(np.any(gradient, (1, 2)), seen)


def test_masked_keys_have_neither_weight_nor_gradient():
  q, k, v, bias = inputs('float32')
  bias[:, :, :, -1] = -1e9

  def loss(v):
    return jnp.sum(jnp.sin(wa.windowed_attention(2, q, k, v, bias, KEY_START)))

  last = 17  # Only ever the last key of a window.
  assert (last == KEY_START + N_KEYS - 1).any()
  gradient = jax.grad(loss)(v)
  assert not np.any(gradient[last])
  moved = v.copy()
  moved[last] += 100
  assert loss(moved) == loss(v)


def test_attention_of_taken_windows_is_the_same():
  q, k, v, bias = inputs('float32')
  index = KEY_START[:, None] + np.arange(N_KEYS)
  by_window = q.reshape(N_WINDOW, N_QUERY, *q.shape[1:])
  got = wa.attend(by_window, k[index], v[index], bias)
  want = wa.windowed_attention(3, q, k, v, bias, KEY_START)
  np.testing.assert_allclose(
    np.reshape(got, want.shape), want, rtol=1e-6, atol=1e-6
  )


def test_bfloat16_keeps_its_dtype_and_a_float32_softmax():
  arrays = inputs('float32')
  low = [jnp.asarray(x, jnp.bfloat16) for x in arrays[:3]]

  def run(q, k, v):
    return wa.windowed_attention(2, q, k, v, arrays[3], KEY_START)

  out, pull = jax.vjp(run, *low)
  assert out.dtype == jnp.bfloat16
  assert {x.dtype for x in pull(out)} == {jnp.dtype(jnp.bfloat16)}
  wide = [np.asarray(x, np.float64) for x in low]
  want = expected(*wide, arrays[3].astype(np.float64))
  error = np.abs(np.asarray(out, np.float64) - want).max()
  assert 0 < error < 2e-2 * np.abs(want).max()


def test_jit_vmap_and_one_sample_agree():
  arrays = [jnp.asarray(x) for x in inputs('float32')]
  samples = jnp.stack([arrays[0], -arrays[0]])

  def run(q):
    return wa.windowed_attention(2, q, *arrays[1:], jnp.asarray(KEY_START))

  got = jax.jit(jax.vmap(run))(samples)
  chex.assert_trees_all_close(
    got, jnp.stack([run(x) for x in samples]), rtol=1e-5, atol=1e-6
  )
