"""Attention of blocks of query atoms over windows of key atoms, with a bias.

The core of AF3's and Boltz's atom transformers (Abramson et al. 2024, Suppl.
Algs. 7 and 24): window r holds `num_queries` consecutive query atoms and
`num_keys` consecutive key atoms from `key_start[r]` on.

`windowed_attention` works on a few windows at a time and has its own backward
pass, which recomputes the softmax: neither keys and values per window nor
weights are ever stored for all atoms. Logits and softmax are at least float32.

Shapes: n_atom query atoms; n_key key atoms (the same ones, maybe padded);
n_window windows of num_queries x num_keys; n_head heads.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import numerics

# On CPU the logits of so many windows stay in cache.
CPU_WINDOWS = 8


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array
) -> jax.Array:
  """Attention of windows whose keys and values have been taken.

  Args:
    q: [n_window, num_queries, n_head, d_key] float, with the factor of the
      logits in it.
    k: [n_window, num_keys, n_head, d_key] float.
    v: [n_window, num_keys, n_head, d_value] float.
    bias: [n_window, n_head, num_queries, num_keys] float.

  Returns:
    [n_window, num_queries, n_head, d_value] in the dtype of `v`.
  """
  weights, _ = _weights(q, jnp.swapaxes(k, 1, 2), bias)
  return _combine(weights, jnp.swapaxes(v, 1, 2)).astype(v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def windowed_attention(
  chunk: int,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  bias: jax.Array,
  key_start: jax.Array,
) -> jax.Array:
  """o_i = sum_j softmax_j(q_i . k_j + bias_ij) v_j over the window of i.

  Args:
    chunk: static; windows at a time, a divisor of n_window.
    q: [n_atom, n_head, d_key] float, with the factor of the logits in it.
    k: [n_key, n_head, d_key] float.
    v: [n_key, n_head, d_value] float.
    bias: [n_window, n_head, num_queries, num_keys] float; masked keys have a
      large negative one.
    key_start: [n_window] int32, in [0, n_key - num_keys].

  Returns:
    [n_atom, n_head, d_value] in the dtype of `v`.
  """
  return _forward(chunk, q, k, v, bias, key_start)[0]


def _forward(chunk, q, k, v, bias, key_start) -> tuple[jax.Array, Any]:
  n_window, _, n_query, _ = bias.shape

  def step(window: jax.Array) -> jax.Array:
    own_q, own_bias, start = _chunk(chunk, window, q, bias, key_start)
    weights, _ = _weights(own_q, _windows(k, start, bias), own_bias)
    return _combine(weights, _windows(v, start, bias)).astype(v.dtype)

  out = jax.lax.map(step, jnp.arange(0, n_window, chunk))
  out = out.reshape(n_window * n_query, *out.shape[3:])
  return out, (q, k, v, bias, key_start)


@numerics.standard_promotion()
def _backward(chunk, residuals, gradient) -> tuple[Any, ...]:
  q, k, v, bias, key_start = residuals
  n_window = bias.shape[0]

  def step(carry, window: jax.Array) -> tuple[Any, Any]:
    d_k, d_v = carry
    own_q, own_bias, start = _chunk(chunk, window, q, bias, key_start)
    own_d, _, _ = _chunk(chunk, window, gradient, bias, key_start)
    keys, values = _windows(k, start, bias), _windows(v, start, bias)
    weights, queries = _weights(own_q, keys, own_bias)
    own_d = jnp.swapaxes(numerics.at_least_float32(own_d), 1, 2)
    # d softmax: ds = p (dp - sum_j p dp).
    d_weights = jnp.einsum('whqd,whkd->whqk', own_d, values)
    total = jnp.sum(weights * d_weights, -1, keepdims=True)
    d_logits = weights * (d_weights - total)
    d_q = jnp.einsum('whqk,whkd->whqd', d_logits, keys)
    d_keys = jnp.einsum('whqk,whqd->whkd', d_logits, queries)
    d_values = jnp.einsum('whqk,whqd->whkd', weights, own_d)
    d_k = _add_windows(d_k, start, d_keys)
    d_v = _add_windows(d_v, start, d_values)
    d_q = jnp.swapaxes(d_q, 1, 2).astype(q.dtype)
    return (d_k, d_v), (d_q, d_logits.astype(bias.dtype))

  zeros = [
    jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)) for x in (k, v)
  ]
  (d_k, d_v), (d_q, d_bias) = jax.lax.scan(
    step, tuple(zeros), jnp.arange(0, n_window, chunk)
  )
  none = np.zeros(key_start.shape, jax.dtypes.float0)
  return (
    d_q.reshape(q.shape),
    d_k.astype(k.dtype),
    d_v.astype(v.dtype),
    d_bias.reshape(bias.shape),
    none,
  )


windowed_attention.defvjp(_forward, _backward)


def _chunk(
  chunk: int,
  window: jax.Array,
  q: jax.Array,
  bias: jax.Array,
  key_start: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Queries [chunk, num_queries, ...], bias and starts from `window` on."""
  n_query = bias.shape[2]
  rows = jax.lax.dynamic_slice_in_dim(q, window * n_query, chunk * n_query)
  own_bias = jax.lax.dynamic_slice_in_dim(bias, window, chunk)
  start = jax.lax.dynamic_slice_in_dim(key_start, window, chunk)
  return rows.reshape(chunk, n_query, *q.shape[1:]), own_bias, start


def _windows(x: jax.Array, start: jax.Array, bias: jax.Array) -> jax.Array:
  """[n_key, n_head, d] -> [chunk, n_head, num_keys, d]."""
  n_key = bias.shape[3]
  slices = jax.vmap(lambda s: jax.lax.dynamic_slice_in_dim(x, s, n_key))(start)
  return jnp.swapaxes(slices, 1, 2)


def _add_windows(
  total: jax.Array, start: jax.Array, windows: jax.Array
) -> jax.Array:
  """Adds [chunk, n_head, num_keys, d] to the atoms they come from."""
  windows = jnp.swapaxes(windows, 1, 2).astype(total.dtype)
  for i in range(windows.shape[0]):
    old = jax.lax.dynamic_slice_in_dim(total, start[i], windows.shape[1])
    total = jax.lax.dynamic_update_slice_in_dim(
      total, old + windows[i], start[i], 0
    )
  return total


def _weights(
  q: jax.Array, keys: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Softmax weights [chunk, n_head, num_queries, num_keys]; q by head."""
  q = jnp.swapaxes(numerics.at_least_float32(q), 1, 2)
  logits = jnp.einsum('whqd,whkd->whqk', q, numerics.at_least_float32(keys))
  return jax.nn.softmax(logits + bias), q


def _combine(weights: jax.Array, values: jax.Array) -> jax.Array:
  """[chunk, num_queries, n_head, d_value], float32."""
  out = jnp.einsum('whqk,whkd->whqd', weights.astype(values.dtype), values)
  return jnp.swapaxes(out, 1, 2)
