"""Windows of keys around blocks of queries, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax.components import windows


def expected(x: np.ndarray, num_queries: int, num_keys: int) -> np.ndarray:
  """Key k of window r is atom r num_queries + k + (queries - keys) / 2."""
  n_window = len(x) // num_queries
  out = np.zeros((n_window, num_keys, *x.shape[1:]), x.dtype)
  for r in range(n_window):
    for k in range(num_keys):
      atom = r * num_queries + k + (num_queries - num_keys) // 2
      if 0 <= atom < len(x):
        out[r, k] = x[atom]
  return out


SIZES = [(4, 8), (4, 4), (4, 6), (4, 20), (4, 2), (3, 8), (1, 3), (12, 12)]


@pytest.mark.parametrize(('num_queries', 'num_keys'), SIZES)
def test_windows_hold_the_atoms_around_their_centre(num_queries, num_keys):
  x = np.random.default_rng(0).standard_normal((12, 2))
  got = windows.key_windows(jnp.asarray(x, jnp.float32), num_queries, num_keys)
  want = expected(x.astype(np.float32), num_queries, num_keys)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('axis', [1, -2])
def test_axis_of_the_atoms_may_be_any(axis):
  x = np.random.default_rng(0).integers(0, 99, (3, 12, 2))
  got = windows.key_windows(jnp.asarray(x), 4, 8, axis=axis)
  assert got.shape == (3, 3, 8, 2)
  for i in range(3):
    np.testing.assert_array_equal(got[i], expected(x[i], 4, 8))


def test_masks_are_false_outside():
  mask = np.ones(8, bool)
  got = windows.key_windows(jnp.asarray(mask), 4, 12)
  assert got.dtype == bool
  np.testing.assert_array_equal(got, expected(mask, 4, 12))


@pytest.mark.parametrize(('num_queries', 'num_keys'), SIZES)
def test_gradient_counts_the_windows_of_each_atom(num_queries, num_keys):
  ones = jnp.ones(12)
  got = jax.grad(lambda x: windows.key_windows(x, num_queries, num_keys).sum())(
    ones
  )
  atoms = expected(np.arange(1, 13), num_queries, num_keys)
  counts = [(atoms == i).sum() for i in range(1, 13)]
  np.testing.assert_array_equal(got, counts)


def test_windows_are_slices_without_an_index():
  text = str(jax.make_jaxpr(lambda x: windows.key_windows(x, 4, 8))(np.ones(8)))
  assert 'gather' not in text


def test_number_of_atoms_must_be_a_multiple():
  with pytest.raises(ValueError, match='x: expected a multiple of num_queries'):
    windows.key_windows(jnp.ones(10), 4, 8)
