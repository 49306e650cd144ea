"""Maps over rows in chunks, with rows or windows taken from a table.

`chunked_map` keeps the intermediates of its function for one chunk at a time,
also in the backward pass, which computes them again. Its gradient of the table
is added up in one buffer; JAX's own, of a loop over a closure, would add a
whole table for every chunk.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import numerics

# fn(weights, taken, floats, constants) of one chunk.
ChunkFunction = Callable[[Any, Any, Any, Any], Any]


def whole_map(
  fn: ChunkFunction,
  window: int | None,
  weights: Any,
  table: Any,
  index: jax.Array | tuple[jax.Array, jax.Array] | None,
  floats: Any,
  constants: Any,
) -> Any:
  """`chunked_map` of all rows at once, differentiated by JAX."""
  return fn(weights, _take(window, table, index), floats, constants)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def chunked_map(
  fn: ChunkFunction,
  chunk: int,
  window: int | None,
  weights: Any,
  table: Any,
  index: jax.Array | tuple[jax.Array, jax.Array] | None,
  floats: Any,
  constants: Any,
) -> Any:
  """y_i = fn(weights, taken_i, floats_i, constants_i), chunk by chunk.

  What is taken of the table is its rows `index_i`, or the `window` consecutive
  rows from `index_i` on.

  Args:
    fn: static; maps `weights` and chunks [chunk, ...] of everything else to a
      tree of [chunk, ...]. It must not close over traced arrays.
    chunk: static; rows at a time, a divisor of n.
    window: static; None, or the length of the windows.
    weights: tree of float arrays, the same for all rows.
    table: tree of [m, ...] float arrays, or None: `fn` gets None.
    index: [n, ...] integer rows of the table, or a pair [n, a], [n, b], whose
      sums [n, a, b] they are, clipped to [0, m); [n] starts of the windows, in
      [0, m - window]; None without a table.
    floats: tree of [n, ...] float arrays.
    constants: tree of [n, ...] arrays without gradient: integers, masks.

  Returns:
    A tree of [n, ...].
  """
  return _forward(fn, chunk, window, weights, table, index, floats, constants)[
    0
  ]


def _forward(fn, chunk, window, weights, table, index, floats, constants):
  def step(own: Any) -> Any:
    own_index, own_floats, own_constants = own
    taken = _take(window, table, own_index)
    return fn(weights, taken, own_floats, own_constants)

  rows = _chunks((index, floats, constants), chunk)
  after = jax.tree.leaves((floats, table))[0]
  _, out = _scan(lambda carry, own: (carry, step(own)), None, rows, after)
  return _join(out), (weights, table, index, floats, constants)


@numerics.standard_promotion()
def _backward(fn, chunk, window, residuals, gradient):
  weights, table, index, floats, constants = residuals

  def step(carry: Any, own: Any) -> tuple[Any, Any]:
    d_weights, d_table = carry
    own_index, own_floats, own_constants, own_gradient = own
    _, pull = jax.vjp(
      lambda *x: fn(*x, own_constants),
      weights,
      _take(window, table, own_index),
      own_floats,
    )
    d_own_weights, d_taken, d_floats = pull(own_gradient)
    d_weights = jax.tree.map(
      lambda total, d: total + d.astype(total.dtype), d_weights, d_own_weights
    )
    d_table = _put(window, d_table, own_index, d_taken)
    return (d_weights, d_table), d_floats

  rows = _chunks((index, floats, constants, gradient), chunk)
  after = jax.tree.leaves(gradient)[0]
  # Zeros that are not made before they are needed; see `_scan`.
  zero = jnp.where(after.reshape(-1)[0] > 0, 0.0, -0.0)
  start = jax.tree.map(
    lambda x: jnp.broadcast_to(
      zero.astype(jnp.promote_types(x.dtype, jnp.float32)), x.shape
    ),
    (weights, table),
  )
  sums, d_floats = _scan(step, start, rows, after)
  d_weights, d_table = jax.tree.map(
    lambda d, x: d.astype(x.dtype), sums, (weights, table)
  )
  d_index, d_constants = jax.tree.map(
    lambda x: np.zeros(x.shape, jax.dtypes.float0), (index, constants)
  )
  return d_weights, d_table, d_index, _join(d_floats), d_constants


chunked_map.defvjp(_forward, _backward)


def _scan(
  step: Callable[[Any, Any], tuple[Any, Any]],
  carry: Any,
  rows: Any,
  after: jax.Array,
) -> tuple[Any, Any]:
  """`jax.lax.scan`, with buffers that are not made before they are needed.

  Loops start from zeros. XLA on CPU makes those of all loops of a program
  first, and they all take memory at once. What these loops start from depends
  on `after`; its value is not used.
  """
  n_chunk = jax.tree.leaves(rows)[0].shape[0]
  anything = after.reshape(-1)[0]

  def own(i: jax.Array) -> Any:
    return jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), rows
    )

  def body(i: jax.Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
    carry, out = state
    carry, found = step(carry, own(i))
    out = jax.tree.map(
      lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), out, found
    )
    return carry, out

  _, shapes = jax.eval_shape(lambda i: step(carry, own(i)), jnp.int32(0))
  start = jax.tree.map(
    lambda x: jnp.broadcast_to(anything.astype(x.dtype), (n_chunk, *x.shape)),
    shapes,
  )
  return jax.lax.fori_loop(0, n_chunk, body, (carry, start))


def _take(window: int | None, table: Any, index: Any) -> Any:
  if window is None:
    return jax.tree.map(lambda x: jnp.asarray(x)[_rows(x, index)], table)
  return jax.tree.map(
    lambda x: jax.vmap(
      lambda start: jax.lax.dynamic_slice_in_dim(x, start, window)
    )(index),
    table,
  )


def _rows(table: jax.Array, index: Any) -> jax.Array:
  if isinstance(index, tuple):
    index = index[0][:, :, None] + index[1][:, None]
  return jnp.clip(index, 0, table.shape[0] - 1)


def _put(window: int | None, table: Any, index: Any, rows: Any) -> Any:
  """Adds rows to where `_take` has them from."""
  if window is None:
    return jax.tree.map(
      lambda x, y: x.at[_rows(x, index)].add(y.astype(x.dtype)), table, rows
    )

  def put(x: jax.Array, y: jax.Array) -> jax.Array:
    # One after the other: windows overlap.
    for i in range(y.shape[0]):
      old = jax.lax.dynamic_slice_in_dim(x, index[i], window)
      new = old + y[i].astype(x.dtype)
      x = jax.lax.dynamic_update_slice_in_dim(x, new, index[i], 0)
    return x

  return jax.tree.map(put, table, rows)


def _chunks(tree: Any, chunk: int) -> Any:
  return jax.tree.map(
    lambda x: x.reshape(x.shape[0] // chunk, chunk, *x.shape[1:]), tree
  )


def _join(tree: Any) -> Any:
  return jax.tree.map(
    lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree
  )
