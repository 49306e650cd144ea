"""Noise schedules: total noise sigma(t) and its rate dsigma/dt, t in [0, 1].

SEDD `noise_lib.py` @ 0605786d (log-linear, geometric) and protein_lig_sedd
`noise_lib.py` @ b2af3812 (cosine). Sampling starts from the limit of the graph,
so sigma(1) should be large: e^-sigma(1) is the part of the tokens that a
network never sees changed there (0.001 for the log-linear default, 2e-9 for the
geometric one, but 0.37 for the cosine one).

Schedules take NumPy or JAX arrays, and return what they took.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from structattn_jax.common import base_config, numerics


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogLinearNoise(base_config.BaseConfig):
  """sigma = -log(1 - (1 - eps) t): the masked part grows linearly.

  Attributes:
    eps: part of the tokens that is still there at t = 1.
  """

  eps: float = 1e-3

  def __post_init__(self) -> None:
    super().__post_init__()
    if not 0 < self.eps < 1:
      raise ValueError(
        f'LogLinearNoise.eps: expected a number in (0, 1), got {self.eps}'
      )

  def total(self, t: Any) -> Any:
    """Total noise sigma at times t, float of any shape."""
    xp, t = _array(t)
    # Each form is accurate on its side.
    early = -xp.log1p(-(1 - self.eps) * xp.minimum(t, 0.5))
    return xp.where(t < 0.5, early, -xp.log(self._kept(t)))

  def rate(self, t: Any) -> Any:
    """The derivative of `total`: (1 - eps) / (1 - (1 - eps) t)."""
    _, t = _array(t)
    return (1 - self.eps) / self._kept(t)

  def _kept(self, t: Any) -> Any:
    return (1 - t) + self.eps * t


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeometricNoise(base_config.BaseConfig):
  """sigma = sigma_min^(1-t) sigma_max^t.

  Attributes:
    sigma_min: noise at t = 0.
    sigma_max: noise at t = 1.
  """

  sigma_min: float = 1e-4
  sigma_max: float = 20.0

  def __post_init__(self) -> None:
    super().__post_init__()
    _check_range(self, smallest=0.0)

  def total(self, t: Any) -> Any:
    """Total noise sigma at times t, float of any shape."""
    _, t = _array(t)
    return self.sigma_min ** (1 - t) * self.sigma_max**t

  def rate(self, t: Any) -> Any:
    """The derivative of `total`: sigma log(sigma_max / sigma_min)."""
    return self.total(t) * float(np.log(self.sigma_max / self.sigma_min))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineNoise(base_config.BaseConfig):
  """sigma = sigma_max + (sigma_min - sigma_max) (1 + cos(pi t)) / 2.

  Attributes:
    sigma_min: noise at t = 0.
    sigma_max: noise at t = 1.
  """

  sigma_min: float = 1e-3
  sigma_max: float = 1.0

  def __post_init__(self) -> None:
    super().__post_init__()
    _check_range(self, smallest=-1.0)

  def total(self, t: Any) -> Any:
    """Total noise sigma at times t, float of any shape."""
    xp, t = _array(t)
    # 1 - cos without cancellation.
    grown = xp.sin(np.pi / 2 * t) ** 2
    return self.sigma_min + (self.sigma_max - self.sigma_min) * grown

  def rate(self, t: Any) -> Any:
    """The derivative of `total`; 0 at t = 0 and t = 1, and never below."""
    xp, t = _array(t)
    span = np.pi / 2 * (self.sigma_max - self.sigma_min)
    # sin(pi t) of the rounded pi is negative at t = 1.
    return span * xp.maximum(xp.sin(np.pi * xp.minimum(t, 1 - t)), 0)


Noise = LogLinearNoise | GeometricNoise | CosineNoise
# Immutable, so that it can be a default argument.
DEFAULT = LogLinearNoise()
KINDS: dict[str, type[Noise]] = {
  'loglinear': LogLinearNoise,
  'geometric': GeometricNoise,
  'cosine': CosineNoise,
}


def make_noise(kind: str, **options: float) -> Noise:
  """The schedule called `kind`: 'loglinear', 'geometric' or 'cosine'.

  Raises:
    ValueError: on an unknown name or option.
  """
  if kind not in KINDS:
    raise ValueError(f'kind: expected one of {", ".join(KINDS)}, got {kind!r}')
  return KINDS[kind].from_dict(options)


def _array(t: Any) -> tuple[Any, Any]:
  """The library to compute with, and t in at least float32."""
  if isinstance(t, (float, np.ndarray, np.floating)):
    t = np.asarray(t)
    return np, t.astype(np.promote_types(t.dtype, np.float32))
  return jnp, numerics.at_least_float32(t)


def _check_range(noise: Any, *, smallest: float) -> None:
  if not smallest < noise.sigma_min < noise.sigma_max:
    raise ValueError(
      f'{type(noise).__name__}: expected {max(smallest, 0.0):g} '
      f'{"<" if smallest >= 0 else "<="} sigma_min < sigma_max, got '
      f'{noise.sigma_min} and {noise.sigma_max}'
    )
