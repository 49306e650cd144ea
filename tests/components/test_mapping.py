"""`chunked_map` against the same function on all rows at once."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax.components import mapping

N, M, CHANNELS, WINDOW = 12, 10, 3, 4


def by_row(weights, taken, floats, constants):
  """Uses all of its arguments, none of them linearly."""
  out = jnp.tanh(floats @ weights['w']) * constants[:, None]
  if taken is not None:
    out += jnp.sin(taken.reshape(len(floats), -1, CHANNELS)).sum(1)
  return {'y': out, 'norm': jnp.sum(out**2, -1)}


def arguments(kind: str):
  """Weights, table, index, floats and constants; and the length of windows."""
  rng = np.random.default_rng(0)
  table = rng.standard_normal((M, CHANNELS))
  index, window = None, None
  if kind == 'rows':  # Some of them twice, some outside.
    index = rng.integers(-3, M + 3, N)
  elif kind == 'pairs':
    index = (rng.integers(0, 6, (N, 2)), rng.integers(0, 6, (N, 3)))
  elif kind == 'windows':  # They overlap.
    index, window = rng.integers(0, M - WINDOW + 1, N), WINDOW
  else:
    table = None
  weights = {'w': rng.standard_normal((CHANNELS, CHANNELS))}
  floats = rng.standard_normal((N, CHANNELS))
  return window, (weights, table, index, floats, rng.integers(0, 2, N))


def expected(window, weights, table, index, floats, constants):
  """Row by row in NumPy."""
  rows = []
  for i in range(N):
    if table is None:
      taken = np.zeros((0, CHANNELS))
    elif window is not None:
      taken = table[index[i] : index[i] + window]
    else:
      if isinstance(index, tuple):
        at = np.add.outer(index[0][i], index[1][i])
      else:
        at = index[i]
      taken = table[np.clip(at, 0, M - 1)].reshape(-1, CHANNELS)
    row = np.tanh(floats[i] @ weights['w']) * constants[i]
    rows.append(row + np.sin(taken).sum(0))
  rows = np.stack(rows)
  return {'y': rows, 'norm': (rows**2).sum(-1)}


each_kind = pytest.mark.parametrize(
  'kind', ['rows', 'pairs', 'windows', 'no_table']
)


@each_kind
@pytest.mark.parametrize('chunk', [1, 4, N])
def test_chunks_give_what_rows_give(kind, chunk):
  window, args = arguments(kind)
  with jax.enable_x64(True):
    got = mapping.chunked_map(by_row, chunk, window, *args)
    got = jax.tree.map(np.asarray, got)
  chex.assert_trees_all_close(got, expected(window, *args), rtol=1e-13)


@each_kind
def test_gradients_are_those_of_differences(kind):
  """Along random directions of weights, table and floats at once."""
  window, (weights, table, index, floats, constants) = arguments(kind)
  rng = np.random.default_rng(1)
  leaves = (weights, table, floats)
  direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), leaves)

  def loss(weights, table, floats):
    found = mapping.chunked_map(
      by_row, 4, window, weights, table, index, floats, constants
    )
    return jnp.sum(jnp.cos(found['y'])) + jnp.sum(found['norm'])

  def at(step):
    moved = jax.tree.map(lambda x, d: x + step * d, leaves, direction)
    found = expected(window, moved[0], moved[1], index, moved[2], constants)
    return np.cos(found['y']).sum() + found['norm'].sum()

  with jax.enable_x64(True):
    gradient = jax.grad(loss, (0, 1, 2) if table is not None else (0, 2))(
      *leaves
    )
  if table is None:
    gradient = (gradient[0], None, gradient[1])
  products = jax.tree.map(
    lambda g, d: np.sum(np.asarray(g) * d), gradient, direction
  )
  h = 1e-3
  slope = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
  assert abs(sum(jax.tree.leaves(products)) - slope) < 1e-8 * abs(slope)


@each_kind
def test_gradients_equal_those_of_all_rows_at_once(kind):
  window, (weights, table, index, floats, constants) = arguments(kind)

  def gradient(apply):
    def loss(weights, floats, table):
      found = apply(weights, table, index, floats, constants)
      return jnp.sum(jnp.cos(found['y'])) + jnp.sum(found['norm'])

    return jax.grad(loss, (0, 1) if table is None else (0, 1, 2))(
      weights, floats, table
    )

  with jax.enable_x64(True):
    got = gradient(lambda *a: mapping.chunked_map(by_row, 4, window, *a))
    want = gradient(lambda *a: mapping.whole_map(by_row, window, *a))
    chex.assert_trees_all_close(got, want, rtol=1e-12, atol=1e-12)


def test_map_works_under_jit_and_vmap():
  window, args = arguments('windows')
  args = jax.tree.map(jnp.asarray, args)

  def run(floats):
    own = (*args[:3], floats, args[4])
    return mapping.chunked_map(by_row, 4, window, *own)['y']

  floats = jnp.stack([args[3], 2 * args[3]])
  got = jax.jit(jax.vmap(run))(floats)
  for x, y in zip(got, floats, strict=True):
    np.testing.assert_allclose(x, run(y), rtol=1e-5, atol=1e-6)


def test_low_precision_gradients_are_added_in_float32():
  """All rows take the same entry, whose gradient is their number."""
  table = jnp.zeros((1, 1), jnp.bfloat16)
  n = 1024

  def loss(table):
    return mapping.chunked_map(
      lambda weights, taken, floats, constants: taken.astype(jnp.float32),
      1,
      None,
      None,
      table,
      jnp.zeros(n, jnp.int32),
      jnp.zeros(n),
      None,
    ).sum()

  gradient = jax.grad(loss)(table)
  assert gradient.dtype == jnp.bfloat16
  # Added one by one in bfloat16 the sum would stop at 256.
  assert float(gradient[0, 0]) == n
