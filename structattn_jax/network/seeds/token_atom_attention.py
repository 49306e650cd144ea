"""Attention between tokens and their own atoms, in both directions.

The seed document's simplification of AF3's atom cross attention (Abramson et
al. 2024, Suppl. Algs. 5 and 6; the seed calls it "Algorithm 18"). Every atom
belongs to one token; a token has any number of atoms, none included; atoms
come in any order.

Shapes: n_token tokens; n_atom atoms; n_head heads of d_head channels; c_atom
and c_token channels. No units: all inputs are activations.

Differs from the seed: weights are parameters, not drawn inside; no loop over
tokens; an optional atom mask. Differs from released AF3, which has no
attention between a token and its own atoms at all (it broadcasts and pools)
and attends through windows of 32 x 128 atoms instead.
"""

import dataclasses
from typing import Literal

import haiku as hk
import jax
import jax.numpy as jnp

from structattn_jax.common import base_config, checks, numerics
from structattn_jax.components import haiku_modules as hm
from structattn_jax.components import parameters as pm
from structattn_jax.components import segment


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenAtomAttentionConfig(base_config.BaseConfig):
  """Sizes and choices of the token <-> atom attention.

  Attributes:
    num_head: number of heads.
    d_head: channels of queries, keys and values per head.
    normalise: over what the weights of token -> atom attention sum to one. An
      atom has a single key, its token. 'heads' is the seed as it stands: the
      softmax runs over the heads, which thereby compete. 'keys' is the
      ordinary softmax over keys, where the single key's weight is 1 (and the
      queries and keys cancel out, so no parameters are made for them).
    implementation: of the segment operations; see `components.segment`.
    max_atoms_per_token: static size for `implementation='dense'` under jit.
  """

  num_head: int = 4
  d_head: int = 32
  normalise: Literal['heads', 'keys'] = 'heads'
  implementation: segment.Implementation | None = None
  max_atoms_per_token: int | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenAtomAttentionOutput:
  """Updates of both representations; the caller adds residuals.

  Attributes:
    atoms: [n_atom, c_atom], zero for masked atoms.
    tokens: [n_token, c_token], zero for tokens without (kept) atoms.
  """

  atoms: jax.Array
  tokens: jax.Array


class TokenToAtomAttention(hk.Module):
  """Every atom queries the token it belongs to.

  Seed document 000, `atom_cross_attention_to_atoms`.

    q_ah = LN(atom_a) W_q,  k_th = LN(token_t) W_k,  v_th = LN(token_t) W_v
    w_ah = softmax_h(q_ah . k_t(a)h / sqrt(d_head))     ('heads')
    o_a  = sum_h w_ah v_t(a)h W_o

  Parameters: `W_q` [c_atom, n_head, d_head], `W_k` and `W_v` [c_token, n_head,
  d_head], `W_o` [n_head, d_head, c_atom].
  """

  def __init__(
    self, config: TokenAtomAttentionConfig, *, name: str = 'to_atoms'
  ):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    atoms: jax.Array,
    tokens: jax.Array,
    atom_to_token: jax.Array,
    atom_mask: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the update of the atoms.

    Args:
      atoms: [n_atom, c_atom] float.
      tokens: [n_token, c_token] float.
      atom_to_token: [n_atom] integer in [0, n_token), any order.
      atom_mask: [n_atom] bool, True = keep; None keeps all.

    Returns:
      [n_atom, c_atom] in the dtype of `atoms`; zero for masked atoms.

    Raises:
      ValueError: on a wrong shape or, for concrete ids, an id out of range.
      TypeError: on a wrong dtype.
    """
    _check_inputs(atoms, tokens, atom_to_token, atom_mask)
    config = self.config
    heads = (config.num_head, config.d_head)
    tokens = numerics.layer_norm(tokens)
    value = _project('W_v', tokens, heads)

    def to_atoms(x: jax.Array) -> jax.Array:
      return segment.segment_broadcast(
        x, atom_to_token, **_segment_options(config, atom_mask)
      )

    if config.normalise == 'heads':
      query = _project('W_q', numerics.layer_norm(atoms), heads)
      key = to_atoms(_project('W_k', tokens, heads))
      logits = jnp.sum(
        numerics.at_least_float32(query) * numerics.at_least_float32(key), -1
      )
      weights = numerics.masked_softmax(logits * config.d_head**-0.5)
      value = weights.astype(atoms.dtype)[..., None] * to_atoms(value)
      return _combine('W_o', value, atoms.shape[-1])
    # With a weight of 1 the output projection commutes with the broadcast:
    # it runs over tokens, which are fewer.
    return to_atoms(_combine('W_o', value, atoms.shape[-1]))


class AtomToTokenAttention(hk.Module):
  """Every token queries its own atoms.

  Seed document 000, `atom_cross_attention_to_tokens`.

    q_th = LN(token_t) W_q,  k_ah = LN(atom_a) W_k,  v_ah = LN(atom_a) W_v
    w_ah = softmax over the atoms a of t of q_th . k_ah / sqrt(d_head)
    o_t  = sum_h (sum_{a in t} w_ah v_ah) W_o

  Parameters: `W_q` [c_token, n_head, d_head], `W_k` and `W_v` [c_atom, n_head,
  d_head], `W_o` [n_head, d_head, c_token].
  """

  def __init__(
    self, config: TokenAtomAttentionConfig, *, name: str = 'to_tokens'
  ):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    atoms: jax.Array,
    tokens: jax.Array,
    atom_to_token: jax.Array,
    atom_mask: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the update of the tokens; arguments as `TokenToAtomAttention`.

    Returns:
      [n_token, c_token] in the dtype of `tokens`; zero for tokens without
      kept atoms.
    """
    _, weighted = self.attend(atoms, tokens, atom_to_token, atom_mask)
    return _combine('W_o', weighted.astype(tokens.dtype), tokens.shape[-1])

  def attend(
    self,
    atoms: jax.Array,
    tokens: jax.Array,
    atom_to_token: jax.Array,
    atom_mask: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the weights [n_atom, n_head] and the pooled values.

    The weights of the atoms of one token sum to 1 in each head. The pooled
    values are [n_token, n_head, d_head]. Arguments as `__call__`.
    """
    _check_inputs(atoms, tokens, atom_to_token, atom_mask)
    heads = (self.config.num_head, self.config.d_head)
    atoms = numerics.layer_norm(atoms)
    pooled, weights = segment.segment_attention(
      _project('W_q', numerics.layer_norm(tokens), heads),
      _project('W_k', atoms, heads),
      _project('W_v', atoms, heads),
      atom_to_token,
      **_segment_options(self.config, atom_mask),
    )
    return weights, pooled


def token_atom_update(
  config: TokenAtomAttentionConfig,
  atoms: jax.Array,
  tokens: jax.Array,
  atom_to_token: jax.Array,
  atom_mask: jax.Array | None = None,
) -> TokenAtomAttentionOutput:
  """Both directions at once, each from the same inputs.

  A Haiku function: call it inside `hk.transform`, or use
  `transform_token_atom_attention`. Arguments as `TokenToAtomAttention`.

  Returns:
    The updates of atoms and tokens.
  """
  inputs = (atoms, tokens, atom_to_token, atom_mask)
  return TokenAtomAttentionOutput(
    atoms=TokenToAtomAttention(config)(*inputs),
    tokens=AtomToTokenAttention(config)(*inputs),
  )


def transform_token_atom_attention(
  config: TokenAtomAttentionConfig | None = None,
) -> hk.Transformed:
  """Pure functions of the token <-> atom attention.

    >>> init, apply = transform_token_atom_attention()
    >>> atoms, tokens = jnp.ones((5, 8)), jnp.ones((2, 16))
    >>> atom_to_token = jnp.array([0, 0, 1, 1, 1])
    >>> params = init(jax.random.key(0), atoms, tokens, atom_to_token)
    >>> update = jax.jit(apply)(params, atoms, tokens, atom_to_token)
    >>> update.atoms.shape, update.tokens.shape
    ((5, 8), (2, 16))

  Args:
    config: sizes; None takes the seed's (4 heads of 32 channels).

  Returns:
    `init(key, atoms, tokens, atom_to_token, atom_mask=None)` and
    `apply(params, atoms, tokens, atom_to_token, atom_mask=None)`, which returns
    an `TokenAtomAttentionOutput`. Shapes as in `TokenToAtomAttention`.
  """
  config = config or TokenAtomAttentionConfig()

  def forward(atoms, tokens, atom_to_token, atom_mask=None):
    return token_atom_update(config, atoms, tokens, atom_to_token, atom_mask)

  return pm.transform(forward)


def _check_inputs(
  atoms: jax.Array,
  tokens: jax.Array,
  atom_to_token: jax.Array,
  atom_mask: jax.Array | None,
) -> None:
  checks.check_shapes(
    atoms=(atoms, 'n_atom c_atom'),
    tokens=(tokens, 'n_token c_token'),
    atom_to_token=(atom_to_token, 'n_atom'),
    atom_mask=(atom_mask, 'n_atom'),
  )
  checks.check_dtypes('floating', atoms=atoms, tokens=tokens)
  checks.check_dtypes('integer', atom_to_token=atom_to_token)
  checks.check_dtypes('bool', atom_mask=atom_mask)
  if checks.is_concrete(atom_to_token):
    checks.validate_segment_ids(
      atom_to_token, tokens.shape[0], name='atom_to_token'
    )


def _segment_options(
  config: TokenAtomAttentionConfig, mask: jax.Array | None
) -> segment.SegmentOptions:
  return {
    'mask': mask,
    'implementation': config.implementation,
    'max_per_segment': config.max_atoms_per_token,
  }


def _project(name: str, x: jax.Array, heads: tuple[int, int]) -> jax.Array:
  """[n, c] -> [n, n_head, d_head] with the parameter `name`."""
  weights = hk.get_parameter(
    name,
    (x.shape[-1], *heads),
    hm.parameter_dtype(x),
    hm.initializer('normal', x.shape[-1]),
  )
  return jnp.einsum('nc,chd->nhd', x, weights.astype(x.dtype))


def _combine(name: str, x: jax.Array, num_output: int) -> jax.Array:
  """[n, n_head, d_head] -> [n, num_output] with the parameter `name`."""
  n_head, d_head = x.shape[-2:]
  weights = hk.get_parameter(
    name,
    (n_head, d_head, num_output),
    hm.parameter_dtype(x),
    hm.initializer('normal', n_head * d_head),
  )
  return jnp.einsum('nhd,hdc->nc', x, weights.astype(x.dtype))
