"""Softmax, norms and layer norm that stay finite and at least float32."""

import contextlib
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp

Axis = int | tuple[int, ...]

# Of all layer norms: AlphaFold's, Boltz's, torch's and Haiku's own.
LAYER_NORM_EPSILON = 1e-5


def at_least_float32(x: Any) -> jax.Array:
  """Returns `x` as float32, or float64 if it is float64 already."""
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def cast_like(tree: Any, like: Any) -> Any:
  """Casts arrays to the dtypes of others, as cotangents to their primals'.

  Args:
    tree: tree of float arrays; those of dtype float0 are left alone.
    like: tree of the same structure, whose dtypes are taken.

  Returns:
    A tree like `tree`.
  """
  return jax.tree.map(
    lambda x, y: x if x.dtype == jax.dtypes.float0 else x.astype(y.dtype),
    tree,
    like,
  )


@contextlib.contextmanager
def standard_promotion() -> Generator[None]:
  """JAX's standard promotion of ranks and dtypes, whatever the caller's."""
  with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
    yield


def masked_softmax(
  logits: jax.Array, mask: jax.Array | None = None, axis: Axis = -1
) -> jax.Array:
  """Softmax over the kept entries; zeros where nothing is kept.

  w_j = mask_j exp(l_j) / sum_k mask_k exp(l_k)

  Masked logits may hold anything finite or not: they reach neither the result
  nor the gradient. A fully masked row gives zeros with zero gradients.

  Args:
    logits: float, any shape.
    mask: bool, broadcastable to `logits`, True = keep; None keeps all.
    axis: axis or axes to normalise over.

  Returns:
    Weights of the shape of `logits`, float32 (float64 for float64 logits).
  """
  logits = at_least_float32(logits)
  if mask is None:
    return jax.nn.softmax(logits, axis)
  mask = jnp.broadcast_to(mask, logits.shape)
  # A finite filler keeps `filler - max` finite in rows without any real entry.
  logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
  largest = jax.lax.stop_gradient(jnp.max(logits, axis, keepdims=True))
  weights = jnp.where(mask, jnp.exp(logits - largest), 0)
  total = jnp.sum(weights, axis, keepdims=True)
  return weights / jnp.where(total > 0, total, 1)


def safe_norm(
  x: jax.Array, axis: int = -1, *, epsilon: float = 1e-8
) -> jax.Array:
  """Euclidean norm with a finite gradient at zero.

  |x| = sqrt(sum_i x_i^2 + epsilon), as AF2's `dist_epsilon`.

  Args:
    x: float, any shape.
    axis: axis to sum over; it is removed.
    epsilon: added to the squared norm, in units of x squared.

  Returns:
    Norms, at least float32.
  """
  return jnp.sqrt(jnp.sum(jnp.square(at_least_float32(x)), axis) + epsilon)


def layer_norm(
  x: jax.Array, *, epsilon: float = LAYER_NORM_EPSILON
) -> jax.Array:
  """Layer norm over the last axis without scale or offset.

  y = (x - mean) / sqrt(var + epsilon), biased variance, two passes.

  Args:
    x: [..., c] float.
    epsilon: added to the variance.

  Returns:
    [..., c] in the dtype of `x`; statistics are at least float32.
  """
  wide = at_least_float32(x)
  centred = wide - jnp.mean(wide, -1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), -1, keepdims=True)
  return (centred * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype)
