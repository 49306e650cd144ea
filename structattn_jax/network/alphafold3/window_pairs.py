"""The pair logits of AlphaFold 3's atom transformers, window by window.

Abramson et al. (2024) Suppl. Alg. 5, lines 2-6, 10, 13 and 14, and the pair
side of Alg. 24. Part of `cached_atom_attention.precompute`.

The embedding of an atom pair has few channels and there are 128 pairs per
atom. Everything that can be is projected per atom or pair of tokens first;
then a few windows at a time go from embedding to the logits of all blocks,
channels before pairs. The embedding itself is not kept.

Shapes: see `window_plan`; c_pair channels of atom pairs.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import numerics
from structattn_jax.components import functional, mapping, windowed_attention
from structattn_jax.components.parameters import Params
from structattn_jax.network.alphafold3 import diffusion_transformer as dt
from structattn_jax.network.alphafold3 import window_plan

# Token pairs that are normalised and projected at a time.
_PAIR_CHUNK = 4096


def pair_biases(
  params: Params,
  transformers: Sequence[Params],
  plan: window_plan.WindowPlan,
  ref_pos: jax.Array,
  single: jax.Array,
  trunk_pair_cond: jax.Array | None,
  *,
  prefix: str,
  uid_rule: Literal['official', 'corrected'] = 'official',
  padded_keys: dt.PaddedKeys = 'official',
  chunk: int | None = None,
  return_pair: bool = False,
) -> tuple[list[tuple[jax.Array, ...]], jax.Array | None]:
  """Pair logits of every block of the given transformers.

  Args:
    params: with upstream's names.
    transformers: parameters of each atom transformer, of which
      `pair_input_layer_norm` and `pair_logits_projection` are used.
    plan: the atoms and their windows.
    ref_pos: [n_atom, 3] float, angstrom.
    single: [n_atom, c_atom] float, conditioning, zero for padding.
    trunk_pair_cond: [n_token, n_token, c_z] float, or None.
    prefix: of the parameters.
    uid_rule: see `AtomCrossAttConfig`.
    padded_keys: see `AtomCrossAttConfig`.
    chunk: windows at a time; see `components.windowed_attention`.
    return_pair: whether to return the embedding, too.

  Returns:
    Per transformer and block [n_window, n_head, num_queries, num_keys], and
    the embedding [n_window, num_queries, num_keys, c_pair] or None.
  """

  def weights(leaf: str) -> jax.Array:
    return params[f'{prefix}_{leaf}']['weights'].astype(single.dtype)

  def queries(x: jax.Array) -> jax.Array:
    return window_plan.query_blocks(plan, jnp.asarray(x))

  def keys(x: jax.Array) -> jax.Array:
    return window_plan.atom_windows(plan, jnp.asarray(x))

  relu = jax.nn.relu(single)
  row = relu @ weights('single_to_pair_cond_row_1')
  column = relu @ weights('single_to_pair_cond_col_1')
  position = jnp.where(plan.atom_mask[:, None], ref_pos, 0)
  key_uid = plan.official_key_space_uid
  if uid_rule == 'corrected':
    key_uid = plan.space_uid
  # The scale of the layer norm before the logits goes into their weights.
  heads = []
  for own in transformers:
    scale = own['pair_input_layer_norm']['scale']
    projection = own['pair_logits_projection']['weights']
    heads.append((scale[:, None, None] * projection).astype(single.dtype))
  geometry = ('embed_pair_offsets_1', 'embed_pair_distances_1')
  folded = {
    'geometry': jnp.concatenate(
      [weights(x) for x in (*geometry, 'embed_pair_offsets_valid')]
    ),
    'mlp': [weights(f'pair_mlp_{i}') for i in (1, 2, 3)],
    'heads': heads,
  }
  table, index = None, None
  if trunk_pair_cond is not None:
    table = _token_pairs(params, plan, trunk_pair_cond, prefix)
    table = table.astype(single.dtype)
    first = jnp.asarray(plan.pair_offset)[:, None]
    first += plan.pair_stride[:, None] * queries(plan.token_index)
    # Pairs of padding may lie anywhere.
    index = (first, keys(plan.token_index))
  key_mask = keys(plan.atom_mask)
  logits, pair = mapping.chunked_map(
    _logits_and_embedding if return_pair else _logits,
    functional.chunk_size(
      plan.n_window, chunk, on_cpu=windowed_attention.CPU_WINDOWS
    ),
    None,
    folded,
    table,
    index,
    (queries(row), keys(column), queries(position), keys(position)),
    (
      queries(plan.space_uid),
      keys(key_uid),
      key_mask,
      key_mask if padded_keys == 'masked' else None,
    ),
  )
  by_block = iter(logits)
  biases = [tuple(next(by_block) for _ in range(own.shape[1])) for own in heads]
  return biases, pair


def _logits_and_embedding(
  weights: dict[str, Any],
  trunk: jax.Array | None,
  floats: tuple[jax.Array, ...],
  constants: tuple[Any, ...],
) -> tuple[list[jax.Array], jax.Array]:
  """Pair logits of some windows, block by block, and the pair embedding.

  Channels come before pairs: sums over 16 channels then run over long rows.
  """
  row, column, query_pos, key_pos = floats
  query_uid, key_uid, key_mask, masked = constants
  n, n_query, c_pair = row.shape
  n_key = column.shape[1]

  def product(w: jax.Array, x: jax.Array, precision: Any = None) -> jax.Array:
    # One product per window: faster on CPU than one for all.
    w = jnp.broadcast_to(w, (n, *w.shape))
    return jnp.einsum('wcd,wcp->wdp', w, x, precision=precision)

  # Lines 2-6: conformer geometry where both atoms are of one.
  query_pos = jnp.swapaxes(query_pos, 1, 2)[..., None]
  offset = query_pos - jnp.swapaxes(key_pos, 1, 2)[:, :, None]
  nearness = 1 / (1 + jnp.sum(jnp.square(offset), 1, keepdims=True))
  geometry = [offset, nearness, jnp.ones_like(nearness)]
  valid = query_uid[:, None, :, None] == key_uid[:, None, None]
  geometry = jnp.where(valid, jnp.concatenate(geometry, 1), 0)
  geometry = geometry.reshape(n, -1, n_query * n_key)
  pair = product(weights['geometry'], geometry, 'highest')
  # Line 13.
  by_atom = jnp.swapaxes(row, 1, 2)[..., None]
  by_atom += jnp.swapaxes(column, 1, 2)[:, :, None]
  pair += by_atom.reshape(pair.shape)
  # Line 10.
  if trunk is not None:
    trunk = jnp.where(key_mask[:, None, :, None], trunk, 0)
    pair += jnp.moveaxis(trunk, -1, 1).reshape(pair.shape)
  # Line 14.
  mlp = weights['mlp']
  hidden = product(mlp[0], jax.nn.relu(pair))
  hidden = product(mlp[1], jax.nn.relu(hidden))
  pair += product(mlp[2], jax.nn.relu(hidden))

  # The mean of the layer norm is taken out of the weights, its factor goes
  # behind them.
  shapes = [x.shape for x in weights['heads']]
  heads = jnp.concatenate([x.reshape(c_pair, -1) for x in weights['heads']], 1)
  heads -= jnp.mean(heads, 0)
  mean = jnp.mean(pair, 1, keepdims=True)
  variance = jnp.mean(jnp.square(pair - mean), 1, keepdims=True)
  logits = product(heads, pair) * jax.lax.rsqrt(variance + 1e-5)
  if masked is not None:
    hidden_keys = jnp.where(masked, 0, dt.MASKED)[:, None, None]
    logits = logits.reshape(n, -1, n_query, n_key) + hidden_keys
  logits = logits.reshape(n, -1, n_query, n_key)
  ends = np.cumsum(
    [n_head for _, n_block, n_head in shapes for _ in range(n_block)]
  )
  by_block = jnp.split(logits, ends[:-1], 1)
  embedding = jnp.swapaxes(pair, 1, 2).reshape(n, n_query, n_key, c_pair)
  return by_block, embedding


def _logits(*arguments: Any) -> tuple[list[jax.Array], None]:
  return _logits_and_embedding(*arguments)[0], None


def _token_pairs(
  params: Params,
  plan: window_plan.WindowPlan,
  trunk_pair_cond: jax.Array,
  prefix: str,
) -> jax.Array:
  """The trunk's pair embedding of the token pairs in windows: [n_pair, c].

  Only those pairs are normalised and projected; all of them if the windows
  hold more.
  """
  scale = params[f'{prefix}_lnorm_trunk_pair_cond']['scale']
  projection = params[f'{prefix}_embed_trunk_pair_cond']['weights']
  weights = (scale[:, None] * projection).astype(trunk_pair_cond.dtype)
  table = trunk_pair_cond.reshape(-1, trunk_pair_cond.shape[-1])
  if plan.pair_index is None:
    return _embed_token_pair(weights, table, None, None)
  size = plan.pair_index.shape[0]
  chunk = functional.largest_divisor(size, _PAIR_CHUNK)
  return mapping.chunked_map(
    _embed_token_pair,
    chunk,
    None,
    weights,
    table,
    jnp.asarray(plan.pair_index),
    None,
    None,
  )


def _embed_token_pair(
  weights: jax.Array, rows: jax.Array, floats: None, constants: None
) -> jax.Array:
  del floats, constants
  return jnp.dot(numerics.layer_norm(rows), weights, precision='highest')
