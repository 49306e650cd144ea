"""Noise levels of sampling and of training.

Sampling, Karras et al. (2022) eq. 5 as AlphaFold 3 (Suppl. 3.7.1) and Boltz
scale it: for u from 0 to 1

  sigma(u) = sigma_data (smax^(1/rho) + u (smin^(1/rho) - smax^(1/rho)))^rho

n steps pass n + 1 levels. They differ in where the last step ends:

  AlphaFold 3   u = 0, 1/n, ..., 1; the last level is sigma_data smin
  Boltz         u = 0, 1/(n-1), ..., 1, and then zero

Training: sigma = sigma_data exp(p_mean + p_std normal), both alike. AF3 hides
the trunk's embeddings in one of five examples.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import base_config, numerics


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig(base_config.BaseConfig):
  """Noise levels of a sampler.

  Attributes:
    sigma_data: standard deviation of the data in angstrom, the unit of the
      next two.
    sigma_min: smallest level of the formula, in units of `sigma_data`.
    sigma_max: level of the start, in units of `sigma_data`.
    rho: exponent; larger values spend more steps at low noise.
    last: 'sigma_min' (AlphaFold 3) or 'zero' (Boltz), where the last step
      ends.
  """

  sigma_data: float = 16.0
  sigma_min: float = 4e-4
  sigma_max: float = 160.0
  rho: float = 7.0
  last: Literal['sigma_min', 'zero'] = 'sigma_min'

  def __post_init__(self) -> None:
    super().__post_init__()
    for name in ('sigma_data', 'sigma_min', 'rho'):
      if not 0 < getattr(self, name) < np.inf:
        raise ValueError(
          f'ScheduleConfig.{name}: expected a finite number above 0, got '
          f'{getattr(self, name)}'
        )
    if not self.sigma_min < self.sigma_max < np.inf:
      raise ValueError(
        'ScheduleConfig.sigma_max: expected a finite number above '
        f'sigma_min={self.sigma_min}, got {self.sigma_max}'
      )


DEFAULT = ScheduleConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingNoiseConfig(base_config.BaseConfig):
  """Noise levels of training.

  Attributes:
    sigma_data: standard deviation of the data in angstrom.
    p_mean: mean of log(sigma / sigma_data).
    p_std: its standard deviation.
  """

  sigma_data: float = 16.0
  p_mean: float = -1.2
  p_std: float = 1.5

  def __post_init__(self) -> None:
    super().__post_init__()
    for name in ('sigma_data', 'p_std'):
      if not 0 < getattr(self, name) < np.inf:
        raise ValueError(
          f'TrainingNoiseConfig.{name}: expected a finite number above 0, got '
          f'{getattr(self, name)}'
        )


def noise_levels(config: ScheduleConfig, steps: int) -> np.ndarray:
  """Levels that `steps` steps pass, from the start to the end.

    >>> print(noise_levels(ScheduleConfig(), 3).round(3))
    [2.560e+03 2.081e+02 4.132e+00 6.000e-03]
    >>> print(noise_levels(ScheduleConfig(last='zero'), 3).round(3))
    [2.56e+03 3.97e+01 6.00e-03 0.00e+00]

  Args:
    config: the schedule.
    steps: number of steps, at least 1.

  Returns:
    [steps + 1] float64, decreasing, in angstrom; computed on the host.

  Raises:
    ValueError: if `steps` is not a positive number.
  """
  if steps < 1:
    raise ValueError(f'steps: expected at least 1, got {steps}')
  largest, smallest = (
    sigma ** (1 / config.rho) for sigma in (config.sigma_max, config.sigma_min)
  )
  ends_at_zero = config.last == 'zero'
  u = np.linspace(0, 1, steps if ends_at_zero else steps + 1)
  levels = (
    config.sigma_data * (largest + u * (smallest - largest)) ** config.rho
  )
  return np.append(levels, 0.0) if ends_at_zero else levels


def training_noise_levels(
  config: TrainingNoiseConfig,
  *,
  key: jax.Array | None = None,
  shape: Sequence[int] = (),
  normal: jax.Array | None = None,
) -> jax.Array:
  """sigma_data exp(p_mean + p_std normal); AF3 Suppl. 3.7.1.

  Args:
    config: the distribution.
    key: PRNG key; None if `normal` is given.
    shape: of the levels drawn from `key`.
    normal: float of any shape, recorded normal draws.

  Returns:
    Levels in angstrom, [*shape] float32 or in the shape of `normal`.

  Raises:
    ValueError: unless exactly one of `key` and `normal` is given.
  """
  if (key is None) == (normal is None):
    raise ValueError('key, normal: expected exactly one of the two')
  if key is not None:
    normal = jax.random.normal(key, tuple(shape))
  normal = numerics.at_least_float32(normal)
  return config.sigma_data * jnp.exp(config.p_mean + config.p_std * normal)


def draw_use_conditioning(
  key: jax.Array, shape: Sequence[int] = (), *, probability: float = 0.8
) -> jax.Array:
  """Whether a training example sees the trunk's embeddings; AF3 Suppl. 3.7.1.

  Args:
    key: PRNG key.
    shape: of the result.
    probability: of True.

  Returns:
    [*shape] bool.

  Raises:
    ValueError: if `probability` is none.
  """
  if not 0 <= probability <= 1:
    raise ValueError(
      f'probability: expected a number in [0, 1], got {probability}'
    )
  return jax.random.bernoulli(key, probability, tuple(shape))
