"""How to sample: options, the grid of times, and what all loops share.

Lou, Meng, Ermon 2024, Algs. 2 and 3; SEDD `sampling.py` @ 0605786d. On a grid
t_0 = 1 > ... > t_steps = eps each step calls the network once and draws every
token; a last call at eps removes what noise is left (denoiser).
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import base_config
from structattn_jax.discrete_diffusion import noise as noise_lib

Predictor = Literal['analytic', 'euler']


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig(base_config.BaseConfig):
  """How to sample.

  Attributes:
    steps: number of steps before the denoiser.
    predictor: 'analytic' or 'euler'.
    denoise: whether a last network call removes the noise left at `eps`.
    eps: time of the last step.
    temperature: of the choice among new tokens; not of whether to change one.
    top_p: the smallest set of most likely new tokens with at least this
      probability is kept; 1 keeps all.
  """

  steps: int = 64
  predictor: Predictor = 'analytic'
  denoise: bool = True
  eps: float = 1e-5
  temperature: float = 1.0
  top_p: float = 1.0

  def __post_init__(self) -> None:
    super().__post_init__()
    for name, ok, wanted in (
      ('steps', self.steps >= 1, 'at least 1'),
      ('eps', 0 < self.eps < 1, 'a time in (0, 1)'),
      ('temperature', self.temperature > 0, 'a number above 0'),
      ('top_p', 0 < self.top_p <= 1, 'a probability in (0, 1]'),
    ):
      if not ok:
        raise ValueError(
          f'SamplerConfig.{name}: expected {wanted}, got {getattr(self, name)}'
        )


# Immutable, so that it can be a default argument.
DEFAULT = SamplerConfig()


class Schedule(NamedTuple):
  """Numbers of all steps, float32 in NumPy, computed in float64.

  Attributes:
    sigma: [steps + 1] at t_i.
    dsigma: [steps] sigma(t_i) - sigma(t_i - dt).
    rate: [steps] dt rate(t_i).
  """

  sigma: np.ndarray
  dsigma: np.ndarray
  rate: np.ndarray


def make_schedule(noise: noise_lib.Noise, sampler: SamplerConfig) -> Schedule:
  """The grid of a sampler: t from 1 to eps."""
  t = np.linspace(1, sampler.eps, sampler.steps + 1)
  dt = (1 - sampler.eps) / sampler.steps
  sigma = noise.total(t)
  return Schedule(
    *(
      x.astype(np.float32)
      for x in (
        sigma,
        sigma[:-1] - noise.total(t[:-1] - dt),
        dt * noise.rate(t[:-1]),
      )
    )
  )


def sharpened(logits: jax.Array, temperature: float, top_p: float) -> jax.Array:
  """Logits after temperature and nucleus; -inf for what is cut off.

  Args:
    logits: [..., V] float; -inf is allowed.
    temperature: above 0; the logits are divided by it.
    top_p: in (0, 1]; then the most likely tokens are kept until their
      probability reaches this.

  Returns:
    [..., V] in the dtype of `logits`.
  """
  logits = logits / temperature
  if top_p == 1:
    return logits
  ordered = jnp.sort(logits, -1, descending=True)
  # The mass in front of each token: the first one is always kept.
  weights = jax.nn.softmax(ordered)
  before = jnp.cumsum(weights, -1) - weights
  count = jnp.sum(before < top_p, -1, keepdims=True)
  smallest = jnp.take_along_axis(ordered, count - 1, -1)
  return jnp.where(logits < smallest, -jnp.inf, logits)


def put_back(
  tokens: jax.Array, fixed: tuple[jax.Array, jax.Array] | None
) -> jax.Array:
  """Tokens with the given ones, `fixed` = (tokens, mask), put back."""
  if fixed is None:
    return tokens
  values, mask = fixed
  return jnp.where(mask, values, tokens).astype(tokens.dtype)
