"""Overlapping key windows around consecutive blocks of query atoms.

Block r of `num_queries` atoms attends to `num_keys` consecutive atoms around
its centre:

  keys_r = x[num_queries r + offset : ... + num_keys],
  offset = (num_queries - num_keys) / 2

Positions outside of x are zero. This is Boltz's rule and that of AF3's paper;
AF3's code shifts its edge windows inward (`alphafold3/window_plan.py`).
"""

import jax
import jax.numpy as jnp


def key_offset(num_queries: int, num_keys: int) -> int:
  """First key of a window relative to its first query, rounded down."""
  return (num_queries - num_keys) // 2


def key_windows(
  x: jax.Array, num_queries: int, num_keys: int, *, axis: int = 0
) -> jax.Array:
  """Windows of keys, as overlapping slices: no index, no scatter backward.

    >>> key_windows(jnp.arange(1, 5), 2, 4).tolist()
    [[0, 1, 2, 3], [2, 3, 4, 0]]

  Args:
    x: [..., n_atom, ...], `n_atom` a multiple of `num_queries`.
    num_queries: query atoms per window.
    num_keys: key atoms per window.
    axis: the axis of the atoms.

  Returns:
    [..., n_window, num_keys, ...] with n_window = n_atom / num_queries.

  Raises:
    ValueError: if `n_atom` is not a multiple of `num_queries`.
  """
  axis %= x.ndim
  n_atom = x.shape[axis]
  if n_atom % num_queries:
    raise ValueError(
      f'x: expected a multiple of num_queries={num_queries} atoms, got {n_atom}'
    )
  n_window = n_atom // num_queries
  offset = key_offset(num_queries, num_keys)
  n_block = -(-num_keys // num_queries)
  # Block j of all windows is one slice of the padded atoms.
  pad = [(0, 0)] * x.ndim
  pad[axis] = (max(-offset, 0), max(offset, 0) + n_block * num_queries)
  padded = jnp.pad(x, pad)
  shape = (*x.shape[:axis], n_window, num_queries, *x.shape[axis + 1 :])
  first = max(offset, 0)
  blocks = [
    jax.lax.slice_in_dim(
      padded,
      first + j * num_queries,
      first + j * num_queries + n_atom,
      axis=axis,
    ).reshape(shape)
    for j in range(n_block)
  ]
  windows = jnp.concatenate(blocks, axis + 1)
  return jax.lax.slice_in_dim(windows, 0, num_keys, axis=axis + 1)
