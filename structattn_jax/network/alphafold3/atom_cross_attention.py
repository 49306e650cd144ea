"""AlphaFold 3's atom encoder and decoder as published: the reference.

Abramson et al. (2024) Suppl. Algs. 5 and 6. Mirrors alphafold3
`model/network/atom_cross_attention.py` @ c0f97ed: its layouts and gathers, its
operations in its order. `atom_cross_attention.py` computes the same for less;
this is what it is tested and measured against.

Shapes and units: see `window_plan`.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from structattn_jax.components import functional
from structattn_jax.components import parameters as pm
from structattn_jax.components.parameters import Params
from structattn_jax.network.alphafold3 import atom_layout
from structattn_jax.network.alphafold3 import diffusion_transformer as dt
from structattn_jax.network.alphafold3.atom_layout import Arranged

UidRule = Literal['official', 'corrected']

# Classes of elements and of each character of an atom's name.
NUM_ELEMENTS, NUM_CHARS = 128, 64


class Encoding(NamedTuple):
  """What upstream's encoder returns."""

  token_act: jax.Array  # [n_token, c_token]
  skip_connection: jax.Array  # [n_window, num_queries, c_atom]
  queries_mask: jax.Array  # [n_window, num_queries] bool
  queries_single_cond: jax.Array  # [n_window, num_queries, c_atom]
  keys_mask: jax.Array  # [n_window, num_keys] bool
  keys_single_cond: jax.Array  # [n_window, num_keys, c_atom]
  pair_cond: jax.Array  # [n_window, num_queries, num_keys, c_pair]


def encoder(
  params: Params,
  batch: atom_layout.DenseBatch,
  token_atoms_act: jax.Array | None,
  trunk_single_cond: jax.Array | None,
  trunk_pair_cond: jax.Array | None,
  *,
  name: str,
  uid_rule: UidRule = 'official',
  padded_keys: dt.PaddedKeys = 'official',
) -> Encoding:
  """Alg. 5 as published; arguments as `atom_cross_att_encoder`.

  Keys and pairs are gathered from queries, projections are done per window, on
  24 slots per token; all pairs of tokens are projected.
  """
  gathers = batch.atom_cross_att
  ref = batch.ref
  mask = jnp.asarray(batch.pred_dense_atom_mask)

  def linear(leaf: str, x: jax.Array, precision: Any = None) -> jax.Array:
    return functional.linear(params, f'{name}_{leaf}', x, precision)

  def from_dense(x: jax.Array) -> jax.Array:
    dense = Arranged(jnp.asarray(x), 'token_atoms')
    return atom_layout.convert(gathers.token_atoms_to_queries, dense).values

  def to_keys(x: jax.Array) -> jax.Array:
    queries = Arranged(x, 'queries')
    return atom_layout.convert(gathers.queries_to_keys, queries).values

  dtype = ref.ref_pos.dtype
  act = linear('embed_ref_pos', ref.ref_pos, 'highest')
  act += linear('embed_ref_mask', ref.ref_mask[..., None].astype(dtype))
  act += linear(
    'embed_ref_element',
    jax.nn.one_hot(ref.ref_element, NUM_ELEMENTS, dtype=dtype),
  )
  act += linear('embed_ref_charge', jnp.arcsinh(ref.ref_charge)[..., None])
  chars = jax.nn.one_hot(ref.ref_atom_name_chars, NUM_CHARS, dtype=dtype)
  act += linear('embed_ref_atom_name', chars.reshape(*mask.shape, -1))
  act *= ref.ref_mask[..., None].astype(dtype)
  single = from_dense(act)
  queries_mask = from_dense(mask)
  keep = queries_mask[..., None].astype(dtype)
  if trunk_single_cond is not None:
    by_token = linear(
      'embed_trunk_single_cond',
      functional.layer_norm(
        params, f'{name}_lnorm_trunk_single_cond', trunk_single_cond
      ),
      'highest',
    )
    tokens = Arranged(by_token, 'tokens')
    single += atom_layout.convert(gathers.tokens_to_queries, tokens).values
  act = single
  if token_atoms_act is not None:
    noisy = from_dense(token_atoms_act)
    act = linear('atom_positions_to_features', noisy, 'highest') * keep + single
  keys_single = to_keys(single)
  keys_mask = to_keys(queries_mask)

  row = linear('single_to_pair_cond_row_1', jax.nn.relu(single))
  column = linear('single_to_pair_cond_col_1', jax.nn.relu(keys_single))
  pair = row[:, :, None] + column[:, None]
  if trunk_pair_cond is not None:
    embedded = linear(
      'embed_trunk_pair_cond',
      functional.layer_norm(
        params, f'{name}_lnorm_trunk_pair_cond', trunk_pair_cond
      ),
      'highest',
    )
    query, key = gathers.tokens_to_queries, gathers.tokens_to_keys
    both = query.gather_mask[:, :, None] & key.gather_mask[:, None]
    by_atom = embedded[query.gather_idxs[:, :, None], key.gather_idxs[:, None]]
    pair += by_atom * both[..., None].astype(dtype)
  query_pos = from_dense(ref.ref_pos)
  key_pos = to_keys(query_pos)
  query_uid = from_dense(batch.ref_space_uid)
  if uid_rule == 'corrected':
    key_uid = to_keys(query_uid)
  else:
    # Positions in the layout of queries, used as those of another layout.
    dense = jnp.asarray(batch.ref_space_uid).reshape(-1)
    wrong = gathers.queries_to_keys
    key_uid = dense[jnp.minimum(wrong.gather_idxs, dense.size - 1)]
    key_uid *= wrong.gather_mask
  valid = query_uid[:, :, None] == key_uid[:, None]
  valid = valid[..., None].astype(dtype)
  offset = query_pos[:, :, None] - key_pos[:, None]
  squared = jnp.sum(jnp.square(offset), -1, keepdims=True)
  pair += linear('embed_pair_offsets_1', offset, 'highest') * valid
  pair += linear('embed_pair_distances_1', 1 / (1 + squared)) * valid
  pair += linear('embed_pair_offsets_valid', valid)
  hidden = linear('pair_mlp_1', jax.nn.relu(pair))
  hidden = linear('pair_mlp_2', jax.nn.relu(hidden))
  pair += linear('pair_mlp_3', jax.nn.relu(hidden))

  act = _transform(
    params,
    batch,
    (act, queries_mask, single, keys_mask, keys_single, pair),
    f'{name}_atom_transformer_encoder',
    padded_keys,
  )
  act *= keep
  by_query = linear('project_atom_features_for_aggr', act)
  by_slot = atom_layout.convert(
    gathers.queries_to_token_atoms, Arranged(by_query, 'queries')
  ).values
  slots = mask[..., None].astype(dtype)
  total = jnp.sum(slots * jax.nn.relu(by_slot), 1)
  token_act = total / jnp.maximum(jnp.sum(slots, 1), 1e-10)
  return Encoding(
    token_act=token_act,
    skip_connection=act,
    queries_mask=queries_mask,
    queries_single_cond=single,
    keys_mask=keys_mask,
    keys_single_cond=keys_single,
    pair_cond=pair,
  )


def decoder(
  params: Params,
  batch: atom_layout.DenseBatch,
  token_act: jax.Array,
  encoded: Encoding,
  *,
  name: str,
  padded_keys: dt.PaddedKeys = 'official',
) -> jax.Array:
  """Alg. 6 as published; arguments as `atom_cross_att_decoder`."""
  gathers = batch.atom_cross_att
  by_token = functional.linear(
    params, f'{name}_project_token_features_for_broadcast', token_act
  )
  shape = (*batch.pred_dense_atom_mask.shape, by_token.shape[-1])
  dense = Arranged(jnp.broadcast_to(by_token[:, None], shape), 'token_atoms')
  act = atom_layout.convert(gathers.token_atoms_to_queries, dense).values
  keep = encoded.queries_mask[..., None].astype(act.dtype)
  act = (act + encoded.skip_connection) * keep
  act = _transform(
    params,
    batch,
    (
      act,
      encoded.queries_mask,
      encoded.queries_single_cond,
      encoded.keys_mask,
      encoded.keys_single_cond,
      encoded.pair_cond,
    ),
    f'{name}_atom_transformer_decoder',
    padded_keys,
  )
  act = functional.layer_norm(
    params, f'{name}_atom_features_layer_norm', act * keep
  )
  update = functional.linear(
    params, f'{name}_atom_features_to_position_update', act, 'highest'
  )
  return atom_layout.convert(
    gathers.queries_to_token_atoms, Arranged(update, 'queries')
  ).values


def _transform(
  params: Params,
  batch: atom_layout.DenseBatch,
  inputs: tuple[jax.Array, ...],
  scope: str,
  padded_keys: dt.PaddedKeys,
) -> jax.Array:
  act, queries_mask, single, keys_mask, keys_single, pair = inputs
  return dt.cross_att_transformer(
    pm.below(params, f'{scope}/'),
    Arranged(act, 'queries'),
    queries_mask,
    batch.atom_cross_att.queries_to_keys,
    keys_mask,
    single,
    keys_single,
    pair,
    name=scope,
    padded_keys=padded_keys,
  ).values
