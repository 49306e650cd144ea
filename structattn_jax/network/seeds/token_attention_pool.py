"""Self-attention among the atoms of a token, pooled to the token.

The seed document's simplification of Boltz's `AtomAttentionEncoder` (the seed
calls it "Algorithm 2"): attention within each token, then the mean.

Shapes: n_atom atoms; num_tokens tokens; n_head heads of d_head channels; c_atom
channels; max_atoms_per_token = s slots. No units: inputs are activations.

Differs from the seed: weights are parameters; the number of tokens is a static
argument, not the largest id; an optional atom mask; no loop over tokens.
Differs from released Boltz, which attends through windows of 32 x 128 atoms
with pair bias, conditioning and gates, and pools with relu(linear(q)).
"""

import dataclasses

import haiku as hk
import jax
import jax.numpy as jnp

from structattn_jax.common import base_config, checks, numerics
from structattn_jax.components import haiku_modules as hm
from structattn_jax.components import parameters as pm
from structattn_jax.components import segment


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenAttentionPoolConfig(base_config.BaseConfig):
  """Sizes of the within-token attention.

  Attributes:
    num_head: number of heads.
    d_head: channels of queries, keys and values per head.
    max_atoms_per_token: static number of atom slots per token. None finds it
      from concrete ids; under jit it must be given
      (`components.segment.max_segment_size` computes it on the host).
  """

  num_head: int = 4
  d_head: int = 32
  max_atoms_per_token: int | None = None


class TokenAttentionPool(hk.Module):
  """Atoms attend to the atoms of their token; tokens get the mean.

  Seed document 001, `atom_attention_encoder`.

    x_i = LN(atom_i),  q = x W_q,  k = x W_k,  v = x W_v
    A_ijh = softmax over the atoms j of i's token of q_ih . k_jh / sqrt(d_head)
    token_t = mean over its atoms i of sum_j A_ij v_j

  The mean commutes with the value projection: with w_jh = mean_i A_ijh,
  token_th = (sum_j w_jh x_j) W_v, so values are projected once per token
  instead of once per atom. This form is used; it is exact.

  Parameters: `w_q`, `w_k`, `w_v` [c_atom, n_head, d_head].
  """

  def __init__(
    self,
    config: TokenAttentionPoolConfig,
    *,
    name: str = 'token_attention_pool',
  ):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    atom_features: jax.Array,
    atom_to_token: jax.Array,
    num_tokens: int,
    atom_mask: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the token features.

    Args:
      atom_features: [n_atom, c_atom] float.
      atom_to_token: [n_atom] integer in [0, num_tokens), any order.
      num_tokens: static Python int.
      atom_mask: [n_atom] bool, True = keep; None keeps all.

    Returns:
      [num_tokens, n_head * d_head] in the dtype of `atom_features`, head-major;
      zero for tokens without kept atoms.

    Raises:
      ValueError: on a wrong shape, a concrete id out of range, or a
        `max_atoms_per_token` that is missing under jit or too small. A too
        small one that only a traced run could reveal gives NaN for the tokens
        that do not fit.
      TypeError: on a wrong dtype.
    """
    checks.check_shapes(
      atom_features=(atom_features, 'n_atom c_atom'),
      atom_to_token=(atom_to_token, 'n_atom'),
      atom_mask=(atom_mask, 'n_atom'),
    )
    checks.check_dtypes('floating', atom_features=atom_features)
    checks.check_dtypes('integer', atom_to_token=atom_to_token)
    checks.check_dtypes('bool', atom_mask=atom_mask)
    if checks.is_concrete(atom_to_token):
      checks.validate_segment_ids(
        atom_to_token, num_tokens, name='atom_to_token'
      )
    slots = segment.segment_slots(
      atom_to_token,
      num_tokens,
      mask=atom_mask,
      max_per_segment=self.config.max_atoms_per_token,
    )
    x = numerics.layer_norm(atom_features)
    query = segment.take_slots(self._project('w_q', x), slots)  # [t, s, h, d]
    key = segment.take_slots(self._project('w_k', x), slots)
    logits = jnp.einsum(
      'tihd,tjhd->thij',
      numerics.at_least_float32(query),
      numerics.at_least_float32(key),
    )
    attention = numerics.masked_softmax(
      logits * self.config.d_head**-0.5,
      slots.mask[:, None, :, None] & slots.mask[:, None, None, :],
    )
    count = jnp.maximum(jnp.sum(slots.mask, -1), 1)[:, None, None]
    weights = jnp.sum(attention, -2) / count  # [t, h, j], mean over queries
    pooled = jnp.einsum(
      'thj,tjc->thc', weights.astype(x.dtype), segment.take_slots(x, slots)
    )
    w_v = self._weights('w_v', x)
    tokens = jnp.einsum('thc,chd->thd', pooled, w_v)
    tokens = jnp.where(slots.overflow[:, None, None], jnp.nan, tokens)
    return tokens.reshape(num_tokens, -1)

  def _weights(self, name: str, x: jax.Array) -> jax.Array:
    shape = (x.shape[-1], self.config.num_head, self.config.d_head)
    init = hm.initializer('normal', x.shape[-1])
    weights = hk.get_parameter(name, shape, hm.parameter_dtype(x), init)
    return weights.astype(x.dtype)

  def _project(self, name: str, x: jax.Array) -> jax.Array:
    return jnp.einsum('nc,chd->nhd', x, self._weights(name, x))


def transform_token_attention_pool(
  config: TokenAttentionPoolConfig | None = None, *, num_tokens: int
) -> hk.Transformed:
  """Pure functions of the within-token attention.

    >>> config = TokenAttentionPoolConfig(max_atoms_per_token=3)
    >>> init, apply = transform_token_attention_pool(config, num_tokens=2)
    >>> atoms, atom_to_token = jnp.ones((5, 8)), jnp.array([0, 0, 1, 1, 1])
    >>> params = init(jax.random.key(0), atoms, atom_to_token)
    >>> jax.jit(apply)(params, atoms, atom_to_token).shape
    (2, 128)

  Args:
    config: sizes; None takes the seed's (4 heads of 32 channels).
    num_tokens: static number of tokens.

  Returns:
    `init(key, atom_features, atom_to_token, atom_mask=None)` and
    `apply(params, atom_features, atom_to_token, atom_mask=None)`; shapes as in
    `TokenAttentionPool`.
  """
  config = config or TokenAttentionPoolConfig()

  def forward(atom_features, atom_to_token, atom_mask=None):
    return TokenAttentionPool(config)(
      atom_features, atom_to_token, num_tokens, atom_mask
    )

  return pm.transform(forward)
