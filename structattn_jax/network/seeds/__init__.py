"""The simplified algorithms of the seed documents."""

from structattn_jax.network.seeds.token_atom_attention import (
  AtomToTokenAttention,
  TokenAtomAttentionConfig,
  TokenAtomAttentionOutput,
  TokenToAtomAttention,
  token_atom_update,
  transform_token_atom_attention,
)
from structattn_jax.network.seeds.token_attention_pool import (
  TokenAttentionPool,
  TokenAttentionPoolConfig,
  transform_token_attention_pool,
)

__all__ = [
  'AtomToTokenAttention',
  'TokenAtomAttentionConfig',
  'TokenAtomAttentionOutput',
  'TokenAttentionPool',
  'TokenAttentionPoolConfig',
  'TokenToAtomAttention',
  'token_atom_update',
  'transform_token_atom_attention',
  'transform_token_attention_pool',
]
