"""Atom cross attention: tokens <-> atoms through sequence-local windows.

Abramson et al. (2024) Suppl. Algs. 5 (AtomAttentionEncoder) and 6
(AtomAttentionDecoder); Alg. 7 (AtomTransformer) is in `diffusion_transformer`.
Mirrors alphafold3 `model/network/atom_cross_attention.py` @ c0f97ed. This is
the published form, on upstream's layouts and gathers, to be read beside the
paper. `cached_atom_attention` computes the same for less, and is tested and
measured against it.

Shapes: n_token tokens; n_slot = 24 atom slots per token; n_window windows of
num_queries = 32 query atoms and num_keys = 128 key atoms; c_atom, c_pair,
c_token channels.
Units: positions in angstrom, charges in elementary charges.

Differs from the paper as the released code does:
  * windows at the ends are shifted inward, not cut off: see `window_plan`;
  * charges enter through arcsinh;
  * line 7 follows line 9: the queries start with the trunk's conditioning, too;
  * the `ref_space_uid` of keys is gathered from the wrong layout (public issue
    730): config `uid_rule`;
  * keys that are padding are masked for queries only that are padding, too:
    config `padded_keys`.
Differs from the released code: pair terms are added in the paper's order.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from structattn_jax.common import base_config, checks
from structattn_jax.components import functional
from structattn_jax.components import parameters as pm
from structattn_jax.components.parameters import Params
from structattn_jax.network.alphafold3 import atom_layout
from structattn_jax.network.alphafold3 import diffusion_transformer as dt
from structattn_jax.network.alphafold3 import transformer_parameters as tp
from structattn_jax.network.alphafold3.atom_layout import Arranged

# Classes of elements and of each character of an atom's name.
NUM_ELEMENTS, NUM_CHARS = 128, 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtomCrossAttConfig(base_config.BaseConfig):
  """Sizes, quirks and execution of AF3's atom encoder and decoder.

  Attributes:
    per_token_channels: of the token activations; 384 in the trunk.
    per_atom_channels: of the atom activations.
    per_atom_pair_channels: of the atom pairs.
    atom_transformer: sizes of the encoder's transformer.
    decoder_transformer: sizes of the decoder's; None: the same.
    final_init: initialiser of projections that start at zero upstream.
    uid_rule: which keys share the conformer of a query. 'official': as the
      released code reads their uid, from the wrong layout (public issue 730);
      the released weights were trained so. 'corrected': those that do.
    padded_keys: 'official': with fewer atoms than keys per window, queries
      attend to padding; 'masked': they do not.
    implementation: 'blocked': flat atoms, some windows at a time; 'published':
      upstream's layouts and operations, the reference, for
      `dense_atom_cross_att` only; None takes 'blocked'.
    window_chunk: windows at a time; None chooses for the device. This and the
      following two are of 'blocked'.
    remat: whether to recompute blocks in the backward pass; less memory, and
      reverse mode only.
    bfloat16: whether transformer blocks compute in bfloat16; decided in
      `precompute`.
  """

  per_token_channels: int = 768
  per_atom_channels: int = 128
  per_atom_pair_channels: int = 16
  atom_transformer: tp.CrossAttTransformerConfig = dataclasses.field(
    default_factory=tp.CrossAttTransformerConfig
  )
  decoder_transformer: tp.CrossAttTransformerConfig | None = None
  final_init: tp.FinalInit = 'zeros'
  uid_rule: Literal['official', 'corrected'] = 'official'
  padded_keys: dt.PaddedKeys = 'official'
  implementation: Literal['published', 'blocked'] | None = None
  window_chunk: int | None = None
  remat: bool = True
  bfloat16: bool = False

  def __post_init__(self) -> None:
    super().__post_init__()
    self.check_at_least(
      1,
      *('per_token_channels', 'per_atom_channels', 'per_atom_pair_channels'),
      'window_chunk',
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AtomCrossAttEncoderOutput:
  """Result of the encoder in upstream's layouts.

  The number of windows is that of the implementation: 'published' pads to the
  gathers, 'blocked' to its plan. Only real atoms are defined. With fewer atoms
  than keys per window, the keys of the two have another order.

  Attributes:
    token_act: [n_token, c_token].
    skip_connection: [n_window, num_queries, c_atom].
    queries_mask: [n_window, num_queries] bool.
    queries_single_cond: [n_window, num_queries, c_atom].
    keys_mask: [n_window, num_keys] bool.
    keys_single_cond: [n_window, num_keys, c_atom].
    pair_cond: [n_window, num_queries, num_keys, c_pair]; 'blocked': on request.
    conditioning: what 'blocked' keeps for its decoder, an `AtomConditioning`;
      None for 'published'.
  """

  token_act: jax.Array
  skip_connection: jax.Array
  queries_mask: jax.Array
  queries_single_cond: jax.Array
  keys_mask: jax.Array
  keys_single_cond: jax.Array
  pair_cond: jax.Array | None
  conditioning: Any = None


def atom_cross_att_encoder(
  params: Params,
  batch: atom_layout.DenseBatch,
  token_atoms_act: jax.Array | None = None,
  trunk_single_cond: jax.Array | None = None,
  trunk_pair_cond: jax.Array | None = None,
  *,
  config: AtomCrossAttConfig,
  prefix: str = 'diffusion',
) -> AtomCrossAttEncoderOutput:
  """AtomAttentionEncoder as published, Alg. 5.

  Args:
    params: parameters with upstream's names, such as
      `diffusion_embed_ref_pos`; see `atom_cross_att_parameters`.
    batch: upstream's features.
    token_atoms_act: [n_token, n_slot, 3] float, scaled noisy positions, or
      None.
    trunk_single_cond: [n_token, c_s] float, or None.
    trunk_pair_cond: [n_token, n_token, c_z] float, query first, or None.
    config: quirks; sizes are read off the parameters.
    prefix: of the parameters: 'diffusion' or 'evoformer_conditioning'.

  Returns:
    Everything upstream's encoder returns.

  Raises:
    ValueError: on a wrong shape or a parameter that is missing.
    TypeError: on a wrong dtype.
  """
  check_dense(
    batch,
    token_atoms_act=(token_atoms_act, 'n_token n_slot 3'),
    trunk_single_cond=(trunk_single_cond, 'n_token c_s'),
    trunk_pair_cond=(trunk_pair_cond, 'n_token n_token c_z'),
  )
  gathers = batch.atom_cross_att
  ref = batch.ref
  mask = jnp.asarray(batch.pred_dense_atom_mask)
  dtype = ref.ref_pos.dtype

  def linear(leaf: str, x: jax.Array, precision: Any = None) -> jax.Array:
    return functional.linear(params, f'{prefix}_{leaf}', x, precision)

  def embed_trunk(kind: str, x: jax.Array) -> jax.Array:
    x = functional.layer_norm(params, f'{prefix}_lnorm_trunk_{kind}_cond', x)
    return linear(f'embed_trunk_{kind}_cond', x, 'highest')

  def to_queries(x: Any) -> jax.Array:
    dense = Arranged(jnp.asarray(x), 'token_atoms')
    return atom_layout.convert(gathers.token_atoms_to_queries, dense).values

  def to_keys(x: jax.Array) -> jax.Array:
    queries = Arranged(x, 'queries')
    return atom_layout.convert(gathers.queries_to_keys, queries).values

  queries_mask = to_queries(mask)
  keys_mask = to_keys(queries_mask)
  keep = queries_mask[..., None].astype(dtype)

  # Line 1: c_l, the features of the conformer, projected one by one.
  elements = jax.nn.one_hot(ref.ref_element, NUM_ELEMENTS, dtype=dtype)
  chars = jax.nn.one_hot(ref.ref_atom_name_chars, NUM_CHARS, dtype=dtype)
  single = linear('embed_ref_pos', ref.ref_pos, 'highest')
  single += linear('embed_ref_mask', ref.ref_mask[..., None].astype(dtype))
  single += linear('embed_ref_element', elements)
  single += linear('embed_ref_charge', jnp.arcsinh(ref.ref_charge)[..., None])
  single += linear('embed_ref_atom_name', chars.reshape(*mask.shape, -1))
  single = to_queries(single * ref.ref_mask[..., None].astype(dtype))

  # Line 2: offsets d_lm.
  queries_pos = to_queries(ref.ref_pos)
  offset = queries_pos[:, :, None] - to_keys(queries_pos)[:, None]
  # Line 3: v_lm, whether both atoms are of one conformer.
  queries_uid = to_queries(batch.ref_space_uid)
  keys_uid = _keys_uid(batch, queries_uid, to_keys, config)
  valid = queries_uid[:, :, None] == keys_uid[:, None]
  valid = valid[..., None].astype(dtype)
  # Lines 4-6: p_lm from offsets, inverse squared distances and v_lm.
  squared = jnp.sum(jnp.square(offset), -1, keepdims=True)
  pair = linear('embed_pair_offsets_1', offset, 'highest') * valid
  pair += linear('embed_pair_distances_1', 1 / (1 + squared)) * valid
  pair += linear('embed_pair_offsets_valid', valid)

  # Lines 8-10: the trunk's single (9) and pair (10) representation.
  if trunk_single_cond is not None:
    tokens = Arranged(embed_trunk('single', trunk_single_cond), 'tokens')
    single += atom_layout.convert(gathers.tokens_to_queries, tokens).values
  if trunk_pair_cond is not None:
    query, key = gathers.tokens_to_queries, gathers.tokens_to_keys
    both = query.gather_mask[:, :, None] & key.gather_mask[:, None]
    index = query.gather_idxs[:, :, None], key.gather_idxs[:, None]
    by_atom = embed_trunk('pair', trunk_pair_cond)[index]
    pair += by_atom * both[..., None].astype(dtype)
  # Line 7: q_l = c_l.
  act = single
  # Line 11: noisy positions.
  if token_atoms_act is not None:
    noisy = to_queries(token_atoms_act)
    act = linear('atom_positions_to_features', noisy, 'highest') * keep + act

  # Line 13: p_lm from c_l and c_m.
  keys_single = to_keys(single)
  row = linear('single_to_pair_cond_row_1', jax.nn.relu(single))
  column = linear('single_to_pair_cond_col_1', jax.nn.relu(keys_single))
  pair += row[:, :, None] + column[:, None]
  # Line 14: a small MLP.
  hidden = linear('pair_mlp_1', jax.nn.relu(pair))
  hidden = linear('pair_mlp_2', jax.nn.relu(hidden))
  pair += linear('pair_mlp_3', jax.nn.relu(hidden))

  # Line 15: AtomTransformer.
  conditioning = (queries_mask, single, keys_mask, keys_single, pair)
  act = _transform(params, batch, act, conditioning, config, prefix, 'encoder')
  act *= keep
  # Line 16: the mean over the atoms of each token.
  by_query = Arranged(linear('project_atom_features_for_aggr', act), 'queries')
  by_slot = atom_layout.convert(gathers.queries_to_token_atoms, by_query).values
  slots = mask[..., None].astype(dtype)
  total = jnp.sum(slots * jax.nn.relu(by_slot), 1)
  token_act = total / jnp.maximum(jnp.sum(slots, 1), 1e-10)
  # Line 17: the skip connections q_l, c_l and p_lm.
  return AtomCrossAttEncoderOutput(
    token_act=token_act,
    skip_connection=act,
    queries_mask=queries_mask,
    queries_single_cond=single,
    keys_mask=keys_mask,
    keys_single_cond=keys_single,
    pair_cond=pair,
  )


def atom_cross_att_decoder(
  params: Params,
  batch: atom_layout.DenseBatch,
  token_act: jax.Array,
  encoded: AtomCrossAttEncoderOutput,
  *,
  config: AtomCrossAttConfig,
  prefix: str = 'diffusion',
) -> jax.Array:
  """AtomAttentionDecoder as published, Alg. 6.

  Args:
    params: as for the encoder.
    batch: upstream's features.
    token_act: [n_token, c_token] float.
    encoded: from `atom_cross_att_encoder`.
    config: quirks.
    prefix: of the parameters.

  Returns:
    [n_token, n_slot, 3] position update, zero in empty slots.

  Raises:
    ValueError: on a wrong shape, or `encoded` of the other implementation.
    TypeError: on a wrong dtype.
  """
  check_dense(batch, token_act=(token_act, 'n_token c_token'))
  if encoded.pair_cond is None or encoded.conditioning is not None:
    raise ValueError(
      "encoded: is of the 'blocked' encoder; use the same implementation"
    )
  gathers = batch.atom_cross_att
  # Line 1: broadcast to the atoms, added to the skip connection.
  by_token = functional.linear(
    params, f'{prefix}_project_token_features_for_broadcast', token_act
  )
  shape = (*batch.pred_dense_atom_mask.shape, by_token.shape[-1])
  dense = Arranged(jnp.broadcast_to(by_token[:, None], shape), 'token_atoms')
  act = atom_layout.convert(gathers.token_atoms_to_queries, dense).values
  keep = encoded.queries_mask[..., None].astype(act.dtype)
  act = (act + encoded.skip_connection) * keep
  # Line 2: AtomTransformer.
  conditioning = (
    encoded.queries_mask,
    encoded.queries_single_cond,
    encoded.keys_mask,
    encoded.keys_single_cond,
    encoded.pair_cond,
  )
  act = _transform(params, batch, act, conditioning, config, prefix, 'decoder')
  # Line 3: the update of the positions.
  act = functional.layer_norm(
    params, f'{prefix}_atom_features_layer_norm', act * keep
  )
  update = functional.linear(
    params, f'{prefix}_atom_features_to_position_update', act, 'highest'
  )
  return atom_layout.convert(
    gathers.queries_to_token_atoms, Arranged(update, 'queries')
  ).values


def atom_cross_att_parameters(
  config: AtomCrossAttConfig,
  prefix: str = 'diffusion',
  *,
  positions: bool = True,
  single_channels: int | None = 384,
  pair_channels: int | None = 128,
  decoder: bool = True,
) -> pm.Table:
  """All parameters of encoder and decoder, with upstream's names.

  The defaults are AF3's diffusion head; its trunk has `positions=False`, no
  single or pair channels and no decoder. Four modules, the ones without `_1`
  of those that exist with it, are in every checkpoint, but without effect.

  Args:
    config: sizes.
    prefix: of the names.
    positions: whether noisy positions are embedded.
    single_channels: of the trunk's single conditioning; None: there is none.
    pair_channels: of the trunk's pair conditioning; None: there is none.
    decoder: whether to include the decoder.

  Returns:
    The table, for `components.parameters`.
  """
  c_atom, c_pair = config.per_atom_channels, config.per_atom_pair_channels
  c_token = config.per_token_channels
  table: pm.Table = {
    'embed_ref_pos': pm.linear(3, c_atom),
    'embed_ref_mask': pm.linear(1, c_atom),
    'embed_ref_element': pm.linear(NUM_ELEMENTS, c_atom),
    'embed_ref_charge': pm.linear(1, c_atom),
    'embed_ref_atom_name': pm.linear(4 * NUM_CHARS, c_atom),
    'embed_pair_offsets_valid': pm.linear(1, c_pair),
    'pair_mlp_1': pm.linear(c_pair, c_pair, initializer='relu'),
    'pair_mlp_2': pm.linear(c_pair, c_pair, initializer='relu'),
    'pair_mlp_3': pm.linear(c_pair, c_pair, initializer=config.final_init),
    'project_atom_features_for_aggr': pm.linear(c_atom, c_token),
  }
  for suffix in ('', '_1'):
    table |= {
      f'single_to_pair_cond_row{suffix}': pm.linear(c_atom, c_pair),
      f'single_to_pair_cond_col{suffix}': pm.linear(c_atom, c_pair),
      f'embed_pair_offsets{suffix}': pm.linear(3, c_pair),
      f'embed_pair_distances{suffix}': pm.linear(1, c_pair),
    }
  if positions:
    table['atom_positions_to_features'] = pm.linear(3, c_atom)
  for kind, channels, size in (
    ('single', single_channels, c_atom),
    ('pair', pair_channels, c_pair),
  ):
    if channels is not None:
      table[f'lnorm_trunk_{kind}_cond'] = pm.layer_norm(channels)
      table[f'embed_trunk_{kind}_cond'] = pm.linear(
        channels, size, initializer=config.final_init
      )
  transformers = {'encoder': config.atom_transformer}
  if decoder:
    transformers['decoder'] = (
      config.decoder_transformer or config.atom_transformer
    )
    table |= {
      'project_token_features_for_broadcast': pm.linear(c_token, c_atom),
      'atom_features_layer_norm': pm.layer_norm(c_atom),
      'atom_features_to_position_update': pm.linear(
        c_atom, 3, initializer=config.final_init
      ),
    }
  table = {f'{prefix}_{leaf}': arrays for leaf, arrays in table.items()}
  for part, own in transformers.items():
    scope = transformer_scope(prefix, part)
    blocks = tp.cross_att_transformer_parameters(
      own, c_atom, c_atom, c_pair, name=scope
    )
    table |= {f'{scope}/{leaf}': arrays for leaf, arrays in blocks.items()}
  return table


def transformer_scope(prefix: str, part: str) -> str:
  """Module of the atom transformer of a part, 'encoder' or 'decoder'."""
  return f'{prefix}_atom_transformer_{part}'


def check_dense(
  batch: atom_layout.DenseBatch, **arguments: tuple[Any, str]
) -> None:
  """Checks what both implementations take, on the dense layout."""
  if not isinstance(batch, atom_layout.DenseBatch):
    raise TypeError(
      f'batch: expected a DenseBatch, got {type(batch).__name__}; '
      "DenseBatch.from_batch reads upstream's dictionary"
    )
  n_token, n_slot = batch.pred_dense_atom_mask.shape
  lead = {'n_token': (n_token, 'the batch'), 'n_slot': (n_slot, 'the batch')}
  checks.check_shapes(lead, **arguments)
  checks.check_dtypes('floating', **{k: x for k, (x, _) in arguments.items()})


def _keys_uid(
  batch: atom_layout.DenseBatch,
  queries_uid: jax.Array,
  to_keys: Any,
  config: AtomCrossAttConfig,
) -> jax.Array:
  """Which conformer keys are of: [n_window, num_keys]."""
  if config.uid_rule == 'corrected':
    return to_keys(queries_uid)
  # Positions in the layout of queries, used as those of another layout.
  dense = jnp.asarray(batch.ref_space_uid).reshape(-1)
  wrong = batch.atom_cross_att.queries_to_keys
  uid = dense[jnp.minimum(wrong.gather_idxs, dense.size - 1)]
  return uid * wrong.gather_mask


def _transform(
  params: Params,
  batch: atom_layout.DenseBatch,
  act: jax.Array,
  conditioning: tuple[jax.Array, ...],
  config: AtomCrossAttConfig,
  prefix: str,
  part: str,
) -> jax.Array:
  scope = transformer_scope(prefix, part)
  queries_mask, single, keys_mask, keys_single, pair = conditioning
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
    padded_keys=config.padded_keys,
  ).values
