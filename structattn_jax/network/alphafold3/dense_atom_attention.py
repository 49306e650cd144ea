"""AF3's atom encoder and decoder in upstream's signature, by either form.

Abramson et al. (2024) Suppl. Algs. 5 and 6, on upstream's dense layout of
n_slot = 24 atom slots per token: as published (`atom_cross_attention`), or on
flat atoms in between (`cached_atom_attention`).

Shapes and units: see `window_plan`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from structattn_jax.components.parameters import Params
from structattn_jax.network.alphafold3 import atom_cross_attention as published
from structattn_jax.network.alphafold3 import atom_layout, window_plan
from structattn_jax.network.alphafold3 import cached_atom_attention as aca
from structattn_jax.network.alphafold3.atom_cross_attention import (
  AtomCrossAttConfig,
  AtomCrossAttEncoderOutput,
)


class DenseAtomCrossAtt(NamedTuple):
  """Functions of one config and prefix.

  Attributes:
    encode: `encode(params, batch, token_atoms_act=None, trunk_single_cond=None,
      trunk_pair_cond=None)`, as `atom_cross_att_encoder`.
    decode: `decode(params, batch, token_act, encoded)`, as
      `atom_cross_att_decoder`.
  """

  encode: Callable[..., AtomCrossAttEncoderOutput]
  decode: Callable[..., jax.Array]


def dense_atom_cross_att(
  config: AtomCrossAttConfig | None = None,
  *,
  prefix: str = 'diffusion',
  return_pair: bool = False,
) -> DenseAtomCrossAtt:
  """Pure functions of upstream's encoder and decoder, on its dense layout.

  Args:
    config: sizes, quirks, and the implementation; None takes AF3's diffusion
      head.
    prefix: of the parameters: 'diffusion' or 'evoformer_conditioning'.
    return_pair: whether 'blocked' returns the pair embedding, too.

  Returns:
    The functions, all of this config.
  """
  config = config or AtomCrossAttConfig()
  own: Any = {'config': config, 'prefix': prefix}

  def encode(
    params: Params,
    batch: atom_layout.DenseBatch,
    token_atoms_act: jax.Array | None = None,
    trunk_single_cond: jax.Array | None = None,
    trunk_pair_cond: jax.Array | None = None,
  ) -> AtomCrossAttEncoderOutput:
    arguments = (token_atoms_act, trunk_single_cond, trunk_pair_cond)
    if config.implementation == 'published':
      return published.atom_cross_att_encoder(params, batch, *arguments, **own)
    published.check_dense(
      batch,
      token_atoms_act=(token_atoms_act, 'n_token n_slot 3'),
      trunk_single_cond=(trunk_single_cond, 'n_token c_s'),
      trunk_pair_cond=(trunk_pair_cond, 'n_token n_token c_z'),
    )
    plan = batch.plan
    positions, ref = jax.tree.map(
      lambda x: atom_layout.atoms_from_dense(plan, x),
      (token_atoms_act, batch.ref),
    )
    conditioning = aca.precompute(
      params,
      plan,
      ref,
      trunk_single_cond,
      trunk_pair_cond,
      cache_terms=False,
      return_pair=return_pair,
      **own,
    )
    found = aca.encode(params, conditioning, positions, **own)

    def queries(x: jax.Array) -> jax.Array:
      return window_plan.query_blocks(plan, jnp.asarray(x))

    mask = jnp.asarray(plan.atom_mask)
    return AtomCrossAttEncoderOutput(
      token_act=found.token_act,
      skip_connection=queries(found.skip_connection),
      queries_mask=queries(mask),
      queries_single_cond=queries(conditioning.single),
      keys_mask=window_plan.atom_windows(plan, mask),
      keys_single_cond=window_plan.atom_windows(plan, conditioning.single),
      pair_cond=conditioning.pair,
      conditioning=conditioning,
    )

  def decode(
    params: Params,
    batch: atom_layout.DenseBatch,
    token_act: jax.Array,
    encoded: AtomCrossAttEncoderOutput,
  ) -> jax.Array:
    if config.implementation == 'published':
      return published.atom_cross_att_decoder(
        params, batch, token_act, encoded, **own
      )
    published.check_dense(batch, token_act=(token_act, 'n_token c_token'))
    if encoded.conditioning is None:
      raise ValueError(
        "encoded: is of the 'published' encoder; use the same implementation"
      )
    plan = batch.plan
    skip = encoded.skip_connection.reshape(plan.n_atom, -1)
    update = aca.decode(params, encoded.conditioning, token_act, skip, **own)
    return atom_layout.atoms_to_dense(plan, update)

  return DenseAtomCrossAtt(encode, decode)
