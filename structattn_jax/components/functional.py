"""Layers as pure functions of a parameter tree, and rules about chunks.

For systems whose forms share one tree (see `parameters`): what Haiku's modules
of the same name compute, in float32 where it matters, with the parameters
passed in. `params` is {module: {name: array}}.
"""

from typing import Any

import jax
import jax.numpy as jnp

from structattn_jax.common import numerics
from structattn_jax.components import parameters as pm
from structattn_jax.components.parameters import Params


def linear(
  params: Params,
  name: str,
  x: jax.Array,
  precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
  """X @ weights and, where there is one, + bias, in the dtype of `x`.

  Args:
    params: holds `name` with `weights` [c, o...] and perhaps `bias` [o...].
    name: of the module.
    x: [..., c] float.
    precision: of the product.

  Returns:
    [..., o...] in the dtype of `x`.

  Raises:
    ValueError: if the module is missing or for other channels.
  """
  own = pm.module(params, name)
  _check_channels(x, own['weights'].shape[0], name)
  y = jnp.tensordot(
    x, own['weights'].astype(x.dtype), axes=1, precision=precision
  )
  return y + own['bias'].astype(x.dtype) if 'bias' in own else y


def layer_norm(params: Params, name: str, x: jax.Array) -> jax.Array:
  """Layer norm with `scale` [c] and, where there is one, `offset` [c].

  Args:
    params: holds `name`.
    name: of the module.
    x: [..., c] float.

  Returns:
    [..., c] in the dtype of `x`, computed in at least float32.

  Raises:
    ValueError: if the module is missing or for other channels.
  """
  own = pm.module(params, name)
  _check_channels(x, own['scale'].shape[0], name)
  y = numerics.layer_norm(numerics.at_least_float32(x)) * own['scale']
  return (y + own['offset'] if 'offset' in own else y).astype(x.dtype)


@jax.custom_vjp
def normalise(x: jax.Array) -> jax.Array:
  """`numerics.layer_norm` that keeps less for its backward pass.

  Its result and one number per row, instead of what JAX would keep; reverse
  mode only.

  Args:
    x: [..., c] float.

  Returns:
    [..., c] in the dtype of `x`.
  """
  return _normalise_forward(x)[0]


def _normalise_forward(x: jax.Array) -> tuple[jax.Array, Any]:
  wide = numerics.at_least_float32(x)
  wide = wide - jnp.mean(wide, -1, keepdims=True)
  variance = jnp.mean(jnp.square(wide), -1, keepdims=True)
  scale = jax.lax.rsqrt(variance + numerics.LAYER_NORM_EPSILON)
  y = (wide * scale).astype(x.dtype)
  return y, (y, scale)


@numerics.standard_promotion()
def _normalise_backward(kept: Any, gradient: jax.Array) -> tuple[jax.Array]:
  y, scale = kept
  wide, d = numerics.at_least_float32(y), numerics.at_least_float32(gradient)
  d = d - jnp.mean(d, -1, keepdims=True)
  d = scale * (d - wide * jnp.mean(wide * d, -1, keepdims=True))
  return (d.astype(gradient.dtype),)


normalise.defvjp(_normalise_forward, _normalise_backward)


def swish_gate(x: jax.Array) -> jax.Array:
  """swish(a) * b of the two halves [..., c] of `x` [..., 2 c]."""
  a, b = jnp.split(x, 2, -1)
  return jax.nn.swish(a) * b


def dropout(key: jax.Array | None, rate: float, x: jax.Array) -> jax.Array:
  """Sets each number to 0 with probability `rate` and scales the others.

  Args:
    key: random key; None: no dropout.
    rate: static, in [0, 1); 0: no dropout.
    x: float, any shape.

  Returns:
    Like `x`.
  """
  if key is None or not rate:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), 0)


def chunk_size(size: int, at_most: int | None = None, *, on_cpu: int) -> int:
  """How many of `size` things to work on at a time.

  >>> chunk_size(12, 5, on_cpu=8)
  4

  Args:
    size: how many there are.
    at_most: the most at a time; None: `on_cpu` on CPU, else all of them.
    on_cpu: what stays in cache there.

  Returns:
    The largest divisor of `size` that is allowed, at least 1.
  """
  if at_most is None:
    at_most = on_cpu if jax.default_backend() == 'cpu' else size
  return largest_divisor(size, at_most)


def largest_divisor(size: int, at_most: int) -> int:
  """The largest divisor of `size` that is at most `at_most`, at least 1."""
  for divisor in range(max(1, min(size, at_most)), 0, -1):
    if size % divisor == 0:
      return divisor
  return 1


def _check_channels(x: jax.Array, channels: int, name: str) -> None:
  if x.shape[-1] != channels:
    raise ValueError(
      f'params: {name!r} is for {channels} channels, its input has shape '
      f'{x.shape}'
    )
