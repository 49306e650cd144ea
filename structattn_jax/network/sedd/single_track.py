"""SEDD on one track: the published network of text and sequences.

Lou, Meng, Ermon 2024 (`variant='sedd'`), and the network whose parameters the
seed document 004 counts (`variant='v100'`); see `blocks` for both.

Parameters, below the scope of a model; STACK and blocks as in `blocks`:

  vocab_embed//embedding    sigma_map/{mlp_0,mlp_2}//{weights,bias}
  sedd/STACK/blocks/...     output_layer/{norm_final,linear,adaLN_modulation}
"""

import dataclasses
from typing import Literal

import haiku as hk
import jax
import jax.numpy as jnp

from structattn_jax.common import checks
from structattn_jax.components import parameters as pm
from structattn_jax.network.sedd import blocks
from structattn_jax.network.sedd.embeddings import TokenEmbedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeddConfig(blocks.DDiTConfig):
  """Sizes of the single-track transformer; defaults are `sedd-small`'s.

  Attributes:
    num_block: transformer blocks.
    cond_dim: channels of the embedded noise.
    vocab: tokens, including the absorbing state if the graph has one.
    variant: 'sedd' or 'v100', see `blocks`. 'v100' applies no SiLU
      to the condition, exact GELU, and no bias to the logits.
  """

  num_block: int = 12
  cond_dim: int = 128
  vocab: int = 50258
  variant: Literal['sedd', 'v100'] = 'sedd'


def transform_sedd(config: SeddConfig | None = None) -> hk.Transformed:
  """Pure functions of the single-track network.

    >>> config = SeddConfig(hidden_size=16, num_head=2, num_block=2, vocab=21)
    >>> init, apply = transform_sedd(config)
    >>> params = init(jax.random.key(0), jnp.array([3, 20]), jnp.array(0.5))
    >>> apply(params, jnp.array([3, 20]), jnp.array(0.5)).shape
    (2, 21)

  Args:
    config: sizes; None takes those of `sedd-small`.

  Returns:
    `init(key, tokens, sigma, mask=None, *, dropout_key=None)` and
    `apply(params, ...)` with the same arguments, as `sedd`.
  """
  config = config or SeddConfig()

  def forward(tokens, sigma, mask=None, *, dropout_key=None):
    return sedd(config, tokens, sigma, mask, dropout_key=dropout_key)

  return pm.transform(forward)


def sedd(
  config: SeddConfig,
  tokens: jax.Array,
  sigma: jax.Array,
  mask: jax.Array | None = None,
  *,
  dropout_key: jax.Array | None = None,
) -> jax.Array:
  """Logits of the single-track network; a Haiku function.

  Lou, Meng, Ermon 2024, with the sigma scaling left to
  `discrete_diffusion.log_score`.

  Args:
    config: sizes and variant.
    tokens: [n] integer in [0, vocab).
    sigma: [] float, total noise.
    mask: [n] bool, True = real token; None = all real.
    dropout_key: PRNG key; None means no dropout.

  Returns:
    [n, n_vocab] logits, float32.

  Raises:
    ValueError: on a wrong shape, or a concrete token outside the vocabulary.
    TypeError: on a wrong dtype.
  """
  checks.check_shapes(tokens=(tokens, 'n'), sigma=(sigma, ''), mask=(mask, 'n'))
  checks.check_dtypes('integer', tokens=tokens)
  checks.check_dtypes('bool', mask=mask)
  x = TokenEmbedding(
    config.vocab, config.hidden_size, normalise=False, name='vocab_embed'
  )(tokens)
  condition = blocks.condition(config, sigma)
  if config.bfloat16:
    x, condition = x.astype(jnp.bfloat16), condition.astype(jnp.bfloat16)
  x = Track(config, name='sedd')(x, condition, mask, dropout_key=dropout_key)
  return blocks.FinalLayer(config, config.vocab, name='output_layer')(
    x, condition
  )


class Track(hk.Module):
  """A stack of blocks without cross-attention, under the name `blocks`."""

  def __init__(self, config: SeddConfig, *, name: str = 'sedd'):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    x: jax.Array,
    condition: jax.Array,
    mask: jax.Array | None = None,
    *,
    dropout_key: jax.Array | None = None,
  ) -> jax.Array:
    """Maps [n, c_hidden] to the states after the last layer; see `sedd`."""
    return blocks.one_track(
      self.config, 'blocks', x, condition, mask, dropout_key=dropout_key
    )
