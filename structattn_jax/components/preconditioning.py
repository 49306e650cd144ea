"""Preconditioning of a denoiser: what all noise levels have in common.

Karras et al. (2022) table 1, which AlphaFold 3 (Suppl. Alg. 20 lines 2 and 8),
Boltz and Pallatom share. A network F is given c_in x and c_noise, and the
denoised positions are c_skip x + c_out F.

  c_in = 1 / sqrt(sigma² + s²)       c_skip = s² / (sigma² + s²)
  c_out = sigma s / sqrt(sigma² + s²)    c_noise = log(sigma / s) / 4

with s = sigma_data. It is here, below the networks, because they apply it;
`structattn_jax.diffusion` exports it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from structattn_jax.common import numerics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Preconditioning:
  """Factors of a noise level; all have its shape, at least float32.

  Attributes:
    c_in: of the noised positions that enter the network, 1 / angstrom.
    c_skip: of the noised positions in the result, without unit.
    c_out: of the network's output in the result, angstrom.
    c_noise: what the network is told of the noise level, without unit.
  """

  c_in: jax.Array
  c_skip: jax.Array
  c_out: jax.Array
  c_noise: jax.Array


def preconditioning(
  sigma: jax.typing.ArrayLike, sigma_data: float = 16.0
) -> Preconditioning:
  """Factors of a noise level, see above.

    >>> factors = preconditioning(16.0)
    >>> print(factors.c_skip, factors.c_noise)
    0.5 0.0

  Args:
    sigma: float, any shape, noise level in angstrom, at least 0.
    sigma_data: standard deviation of the data in angstrom.

  Returns:
    The factors. Values and gradients are finite at sigma = 0 too.
  """
  sigma = numerics.at_least_float32(sigma)
  variance = jnp.square(sigma) + sigma_data**2
  root = jnp.sqrt(variance)
  return Preconditioning(
    c_in=1 / root,
    c_skip=sigma_data**2 / variance,
    c_out=sigma * sigma_data / root,
    c_noise=noise_time(sigma, sigma_data),
  )


def noise_time(
  sigma: jax.typing.ArrayLike, sigma_data: float = 16.0
) -> jax.Array:
  """log(max(sigma / sigma_data, 1e-20)) / 4, what Fourier embeddings take.

  Args:
    sigma: noise level in angstrom, any shape.
    sigma_data: standard deviation of the data in angstrom.

  Returns:
    The shape of `sigma`, at least float32.
  """
  sigma = numerics.at_least_float32(sigma)
  return 0.25 * jnp.log(jnp.maximum(sigma / sigma_data, 1e-20))


def denoised_positions(
  positions: jax.Array,
  update: jax.Array,
  sigma: jax.typing.ArrayLike,
  sigma_data: float = 16.0,
) -> jax.Array:
  """c_skip x + c_out F; AF3 Suppl. Alg. 20 line 8.

  Args:
    positions: [..., 3] float, noised, in angstrom.
    update: [..., 3] float, output F of the network, without unit.
    sigma: noise level in angstrom: [] or the leading axes of `positions`.
    sigma_data: standard deviation of the data in angstrom.

  Returns:
    [..., 3] in angstrom, at least float32.
  """
  positions = numerics.at_least_float32(positions)
  factors = preconditioning(sigma, sigma_data)

  def spread(factor: jax.Array) -> jax.Array:
    return factor.reshape(factor.shape + (1,) * (positions.ndim - factor.ndim))

  return spread(factors.c_skip) * positions + spread(
    factors.c_out
  ) * numerics.at_least_float32(update)
