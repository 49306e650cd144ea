"""The functions of the seed documents: AF3's token-atom pair, Boltz's pool."""

from collections.abc import Iterator

import jax

from structattn_jax.components import segment
from structattn_jax.network.seeds import token_atom_attention as taa
from structattn_jax.network.seeds import (
  token_attention_pool as boltz_token_attention,
)
from structattn_jax.verification import golden as golden_lib
from structattn_jax.verification.golden import Comparison, Golden


def token_atom_attention(golden: Golden) -> Iterator[Comparison]:
  """Tokens to atoms and back."""
  inputs = golden.part('inputs')
  params = golden_lib.haiku_params(golden.part('params'))
  num_head, d_head = params['to_atoms']['W_q'].shape[1:]
  tokens, ids = inputs['s'], inputs['atom_to_token']
  config = taa.TokenAtomAttentionConfig(
    num_head=num_head,
    d_head=d_head,
    max_atoms_per_token=segment.max_segment_size(ids, len(tokens)),
  )
  apply = jax.jit(taa.transform_token_atom_attention(config).apply)
  found = apply(params, inputs['q'], tokens, ids)
  yield golden.value('to_atoms', found.atoms)
  yield golden.value('to_tokens', found.tokens)


def token_attention(golden: Golden) -> Iterator[Comparison]:
  """Attention within tokens; several cases in one file."""
  for output in golden.outputs():
    case = output.removesuffix('/token_features')
    inputs = golden.part(f'inputs/{case}')
    ids = inputs['atom_to_token']
    num_tokens = len(golden.arrays[f'outputs/{output}'])
    num_head, d_head = inputs['w_q'].shape[1:]
    config = boltz_token_attention.TokenAttentionPoolConfig(
      num_head=num_head,
      d_head=d_head,
      max_atoms_per_token=segment.max_segment_size(ids, num_tokens),
    )
    apply = boltz_token_attention.transform_token_attention_pool(
      config, num_tokens=num_tokens
    ).apply
    weights = {name: inputs[name] for name in ('w_q', 'w_k', 'w_v')}
    got = jax.jit(apply)(
      {'token_attention_pool': weights}, inputs['atom_features'], ids
    )
    yield golden.value(output, got)
