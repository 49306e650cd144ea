"""What enters SEDD's blocks: noise level, tokens and positions.

Lou, Meng, Ermon 2024, SEDD `model/transformer.py` @ 0605786d; token embeddings
of the dual track are normed, as in protein_lig_sedd
`model/transformers_protlig_cross_improved.py` @ b2af3812.
"""

from typing import Any, Literal

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import checks, numerics
from structattn_jax.components import haiku_modules as hm

# What the variants follow is said in `blocks`.
Variant = Literal['published', 'seed', 'sedd', 'v100']


class TimestepEmbedder(hk.Module):
  """Condition vector of a noise level: c = SiLU(W_2 SiLU(W_0 e + b_0) + b_2).

  e = [cos(sigma f), sin(sigma f)], f_i = 10000^(-i/128), i < 128. 'v100' leaves
  the last SiLU out.
  """

  def __init__(
    self,
    cond_dim: int,
    *,
    variant: Variant = 'published',
    name: str = 'sigma_map',
  ):
    super().__init__(name=name)
    self.cond_dim = cond_dim
    self.variant: Variant = variant

  def __call__(self, sigma: jax.Array) -> jax.Array:
    """Maps sigma [] float (total noise, not time) to [c_cond]."""
    checks.check_shapes(sigma=(sigma, ''))
    checks.check_dtypes('floating', sigma=sigma)
    is_dual = self.variant in ('published', 'seed')
    kind = 'xavier' if is_dual else 'torch'
    embedding = timestep_embedding(sigma)
    for name in ('mlp_0', 'mlp_2'):
      embedding = hm.Linear(self.cond_dim, initializer=kind, name=name)(
        embedding
      )
      if name == 'mlp_0' or self.variant != 'v100':
        embedding = jax.nn.silu(embedding)
    return embedding


def timestep_embedding(sigma: jax.Array, size: int = 256) -> jax.Array:
  """Cosines then sines of sigma at geometric frequencies.

  Args:
    sigma: [] float.
    size: static, even.

  Returns:
    [size], at least float32.
  """
  sigma = numerics.at_least_float32(sigma)
  half = size // 2
  frequency = np.exp(-np.log(10000.0) * np.arange(half) / half)
  angle = sigma * jnp.asarray(frequency, sigma.dtype)
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)])


class TokenEmbedding(hk.Module):
  """Embedded tokens: h = LN(E[token] sqrt(c_hidden)), or E[token] alone."""

  def __init__(
    self,
    vocab_size: int,
    hidden_size: int,
    *,
    normalise: bool = True,
    name: str,
  ):
    super().__init__(name=name)
    self.shape = (vocab_size, hidden_size)
    self.normalise = normalise

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps [n] integer tokens to [n, c_hidden].

    Ids outside the vocabulary raise a ValueError if they are concrete, and
    give NaN under jit.
    """
    checks.check_shapes(tokens=(tokens, 'n'))
    checks.check_dtypes('integer', tokens=tokens)
    if checks.is_concrete(tokens):
      ids = np.asarray(tokens)
      if ids.size and not (ids.min() >= 0 and ids.max() < self.shape[0]):
        raise ValueError(
          f'{self.name}: expected tokens in [0, {self.shape[0]}), got '
          f'{ids.min()} to {ids.max()}'
        )
    table = hk.get_parameter(
      'embedding',
      self.shape,
      jnp.float32,
      hm.initializer('embedding' if self.normalise else 'torch', self.shape[1]),
    )
    rows = (
      jnp.asarray(table)
      .at[tokens]
      .get(mode='fill', fill_value=jnp.nan, wrap_negative_indices=False)
    )
    if not self.normalise:
      return rows
    return hm.LayerNorm(name='norm')(rows * self.shape[1] ** 0.5)


def rotate_half(x: jax.Array) -> jax.Array:
  """Rotary position embedding, half-split convention, positions 0 .. n-1.

  With x = [x1, x2] split in halves and theta_j = 10000^(-2j/d_head):
  x' = [x1 cos(n theta) - x2 sin(n theta), x2 cos(n theta) + x1 sin(n theta)].

  Args:
    x: [n, n_head, d_head] float, d_head even.

  Returns:
    [n, n_head, d_head] in the dtype of `x`; angles are at least float32.
  """
  n, _, d_head = x.shape
  cos, sin = rotary_tables(n, d_head)
  return rotate(x, cos[:, None], sin[:, None])


def rotary_tables(n: int, d_head: int) -> tuple[np.ndarray, np.ndarray]:
  """Cosines and sines, [n, d_head / 2] float64 NumPy, of `rotate_half`."""
  # In NumPy float64: a float32 product n * theta would cost accuracy at long
  # sequences, and both factors are static.
  frequency = 10000.0 ** (-np.arange(0, d_head, 2) / d_head)
  angle = np.arange(n)[:, None] * frequency
  return np.cos(angle), np.sin(angle)


def rotate(x: jax.Array, cos: Any, sin: Any) -> jax.Array:
  """Rotates [..., d_head] by tables that broadcast to [..., d_head / 2]."""
  wide = numerics.at_least_float32(x)
  cos, sin = jnp.asarray(cos, wide.dtype), jnp.asarray(sin, wide.dtype)
  first, second = jnp.split(wide, 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], -1
  )
  return rotated.astype(x.dtype)
