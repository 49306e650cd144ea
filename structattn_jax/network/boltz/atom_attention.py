"""Boltz's atom attention encoder and decoder, versions 1 and 2.

Abramson et al. (2024) Suppl. Algs. 5 (encoder) and 6 (decoder) as in Boltz:
mirrors boltz `model/modules/encoders.py` (version 1), `encodersv2.py`,
`diffusion_conditioning.py` and `InputEmbedder` of `trunkv2.py` (version 2)
@ 832486d. The lines of Alg. 5, and the functions that compute them:

     1  c = embedded features            7  q = c       `atom_conditioning`
   2-6  p from reference positions      13  p += c_i, c_j       `pair_bias`
  8-10  trunk: c += single (9), p += pair (10)
    11  q += noisy positions            14  p += MLP(p)         `pair_bias`
    15  q = AtomTransformer(q, c, p)    16  pool to tokens         `encode`
    17  skips: q, c, p

Both are used twice: to embed the input (`structure_prediction=False`) and, with
the trunk and noisy positions, in the diffusion module. There, everything but
the positions is the same for all samples and steps. `transform_atom_attention`
computes it all in one call; `cached_atom_attention` what is shared only once,

  init, precompute, encode, decode = cached_atom_attention(config)
  context = precompute(params, features, single, pair)
  encoded = encode(params, context, positions)
  update  = decode(params, context, token_act, encoded.atoms)

and samples are `jax.vmap(encode, (None, None, 0))`; on CPU `jax.lax.map` over
samples is a fifth faster and needs the memory of one. Inside of Haiku, call
`atom_attention_outputs`, or upstream's modules one by one (`modules`).

Parameters have upstream's names (`transformers` says how) below the
modules of a checkpoint without their prefix:

  Boltz-1: `atom_attention_encoder/...`, `atom_attention_decoder/...`
  Boltz-2: the same and `diffusion_conditioning/atom_encoder/...`,
    `diffusion_conditioning/atom_enc_proj_z_<layer>_0` and `..._1`, likewise
    `atom_dec_proj_z`, `token_trans_proj_z`, `pairwise_conditioner/...`
  Boltz-2, input: `atom_encoder/...`, `atom_enc_proj_z_0`, `atom_enc_proj_z_1`,
    `atom_attention_encoder/...`

except that `r_to_q_trans` has the 3 rows that are used, not Boltz-1's 10.

Shapes: n_atom atoms, a multiple of n_query = 32; n_token tokens; n_window =
n_atom / n_query windows of n_query and n_key = 128 atoms; atom_s and atom_z
channels of atoms and of their pairs, token_s and token_z of tokens.
Units: reference positions in angstrom; positions scaled by 1 / sqrt(sigma^2 +
sigma_data^2), and so their update.

Differs from the paper as the released code does: windows are filled with
zeros at the ends; differences of positions are key minus query.
Differs from the released code: indices instead of one-hot vectors; ids never
pass through floats; see `transformers` for windows without atoms.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import numerics
from structattn_jax.components import functional, segment
from structattn_jax.components import haiku_modules as hm
from structattn_jax.components import parameters as pm
from structattn_jax.components.parameters import Params
from structattn_jax.network.boltz import features as bf
from structattn_jax.network.boltz import pair_bias
from structattn_jax.network.boltz import parameters as bp
from structattn_jax.network.boltz import transformers as bt
from structattn_jax.network.boltz.features import (
  Boltz1AtomAttentionConfig,
  Boltz2AtomAttentionConfig,
  BoltzAtomFeatures,
  Config,
)

# Added to the number of a token's atoms before dividing by it.
_POOL_EPSILON = 1e-6


class Transformer(NamedTuple):
  """What a transformer takes from the complex.

  Attributes:
    terms: of each layer, what depends on the conditioning.
    biases: of each layer, [n_window, n_head, n_query, n_key], masked.
  """

  terms: tuple[bt.LayerTerms, ...]
  biases: tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BoltzAtomContext:
  """Everything that does not depend on the noisy positions.

  Attributes:
    queries: [n_atom, atom_s], q before positions are added.
    conditioning: [n_atom, atom_s], c.
    encoder: of the encoder's transformer.
    decoder: of the decoder's, None if there is none.
    atom_mask: [n_atom] bool.
    atom_to_token: [n_atom] integer; negative: none.
    num_tokens: static.
  """

  queries: jax.Array
  conditioning: jax.Array
  encoder: Transformer
  decoder: Transformer | None
  atom_mask: jax.Array
  atom_to_token: jax.Array
  num_tokens: int = dataclasses.field(metadata={'static': True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoltzAtomEncoderOutput:
  """Result of the encoder.

  Attributes:
    tokens: [n_token, 2 token_s], or token_s without structure prediction.
    atoms: [n_atom, atom_s], the skip connection to the decoder.
  """

  tokens: jax.Array
  atoms: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoltzAtomAttentionOutput:
  """Result of encoder and decoder.

  Attributes:
    tokens: as in `BoltzAtomEncoderOutput`.
    atoms: likewise.
    update: [n_atom, 3] at least float32, of the positions, scaled as they are;
      that of padding atoms means nothing. None unless something was decoded.
  """

  tokens: jax.Array
  atoms: jax.Array
  update: jax.Array | None


def atom_attention_outputs(
  config: Config,
  features: BoltzAtomFeatures,
  single: jax.Array | None = None,
  pair: jax.Array | None = None,
  positions: jax.Array | None = None,
  token_act: jax.Array | None = None,
) -> BoltzAtomAttentionOutput:
  """Encoder and, given what to decode, decoder, as a Haiku function.

  Args:
    config: of either version.
    features: of one complex.
    single: [n_token, token_s] float, of the trunk; this and the next two are
      given with structure prediction and only then.
    pair: [n_token, n_token, token_z] float, conditioned: the result of
      `PairwiseConditioning`.
    positions: [n_atom, 3] float, scaled by 1 / sqrt(sigma^2 + sigma_data^2).
    token_act: [n_token, 2 token_s] float, the result of the token transformer,
      to be decoded; None: nothing is.

  Returns:
    Tokens, atoms and the update of the positions.

  Raises:
    ValueError: on a wrong shape, something missing, or a number of atoms that
      is not a multiple of n_query.
    TypeError: on a wrong dtype.
  """
  cached = cached_atom_attention(config)
  params = pm.haiku_parameters(
    bp.atom_attention_parameters(config),
    hm.parameter_dtype(jnp.asarray(features.ref_pos)),
  )
  context = cached.precompute(params, features, single, pair)
  encoded = cached.encode(params, context, positions)
  update = None
  if token_act is not None:
    update = cached.decode(params, context, token_act, encoded.atoms)
  return BoltzAtomAttentionOutput(encoded.tokens, encoded.atoms, update)


def transform_atom_attention(config: Config | None = None) -> hk.Transformed:
  """Pure functions of Boltz's atom encoder and decoder, all in one call.

    >>> config = Boltz1AtomAttentionConfig(
    ...   atom_s=8, atom_encoder_heads=2, structure_prediction=False
    ... )
    >>> init, apply = transform_atom_attention(config)
    >>> one = jnp.zeros(64, int)
    >>> features = BoltzAtomFeatures(
    ...   ref_pos=jnp.ones((64, 3)),
    ...   ref_charge=jnp.zeros(64),
    ...   ref_element=one + 6,
    ...   ref_atom_name_chars=jnp.zeros((64, 4), int),
    ...   ref_space_uid=jnp.arange(64) // 8,
    ...   atom_mask=jnp.ones(64, bool),
    ...   atom_to_token=jnp.arange(64) // 8,
    ...   num_tokens=8,
    ... )
    >>> params = jax.jit(init)(jax.random.key(0), features)
    >>> jax.jit(apply)(params, features).tokens.shape
    (8, 384)

  Args:
    config: of either version; None takes Boltz-1's structure module.

  Returns:
    `init(key, ...)` and `apply(params, ...)` with the arguments of
    `atom_attention_outputs` after the configuration.
  """
  config = config or Boltz1AtomAttentionConfig()
  forward = functools.partial(atom_attention_outputs, config)
  return pm.transform(forward)


class CachedAtomAttention(NamedTuple):
  """Pure functions of encoder and decoder, in parts.

  Arguments are those of `atom_attention_outputs`.

  Attributes:
    init: `init(key)` makes all parameters.
    precompute: `precompute(params, features, single=None, pair=None)`.
    encode: `encode(params, context, positions=None)`.
    decode: `decode(params, context, token_act, atoms)`, atoms those of the
      encoder; returns the update of the positions.
  """

  init: Callable[..., hk.Params]
  precompute: Callable[..., BoltzAtomContext]
  encode: Callable[..., BoltzAtomEncoderOutput]
  decode: Callable[..., jax.Array]


def cached_atom_attention(config: Config | None = None) -> CachedAtomAttention:
  """The same in parts: what samples and steps share is computed once.

  Args:
    config: of either version; None takes Boltz-1's structure module.

  Returns:
    The functions, with the parameters of `transform_atom_attention`. They raise
    as `atom_attention_outputs`.
  """
  config = config or Boltz1AtomAttentionConfig()

  def init(key: jax.Array) -> hk.Params:
    return pm.init_parameters(bp.atom_attention_parameters(config), key)

  def precompute(
    params: Params,
    features: BoltzAtomFeatures,
    single: jax.Array | None = None,
    pair: jax.Array | None = None,
  ) -> BoltzAtomContext:
    return _precompute(config, params, features, single, pair)

  def encode_(
    params: Params,
    context: BoltzAtomContext,
    positions: jax.Array | None = None,
  ) -> BoltzAtomEncoderOutput:
    bf.check_positions(config, positions, context.queries)
    own = pm.below(params, 'atom_attention_encoder/')
    return encode(own, context, positions)

  def decode_(
    params: Params,
    context: BoltzAtomContext,
    token_act: jax.Array,
    atoms: jax.Array,
  ) -> jax.Array:
    bf.check_decoder_inputs(config, token_act, atoms, context.num_tokens)
    own = pm.below(params, 'atom_attention_decoder/')
    return decode(own, context, token_act, atoms)

  return CachedAtomAttention(
    init, *map(pm.with_cast_parameters, (precompute, encode_, decode_))
  )


# The algorithm.


def _precompute(
  config: Config,
  params: Params,
  features: BoltzAtomFeatures,
  single: jax.Array | None,
  pair: jax.Array | None,
) -> BoltzAtomContext:
  """All that no sample changes, for encoder and decoder at once."""
  bf.check_inputs(config, features, single, pair)
  features = bf.without_padding(features)
  embedding = bp.embedding_parameters(config, params)
  queries, c = atom_conditioning(embedding, config, features, single)
  biases = _biases(config, params, embedding, features, c, pair)
  if config.bfloat16:
    queries, c = queries.astype(jnp.bfloat16), c.astype(jnp.bfloat16)
  parts, first = [], 0
  for scope, depth, _ in bp.stacks(config):
    terms = bt.transformer_terms(pm.below(params, scope), c)
    parts.append(Transformer(terms, biases[first : first + depth]))
    first += depth
  return BoltzAtomContext(
    queries,
    c,
    parts[0],
    parts[1] if config.has_decoder else None,
    jnp.asarray(features.atom_mask),
    jnp.asarray(features.atom_to_token),
    features.num_tokens,
  )


def atom_conditioning(
  params: Params,
  config: Config,
  features: BoltzAtomFeatures,
  single: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Alg. 5, lines 1, 7 and 9: q and c, [n_atom, atom_s].

  Args:
    params: those of `atom_encoder_parameters`.
    config: of either version.
    features: of one complex.
    single: [n_token, token_s] float, None without structure prediction.
  """
  q = c = _embed_atoms(params, config, features)
  if single is not None:
    s = functional.layer_norm(params, 's_to_c_trans_0', single)
    c = c + _to_atoms(
      functional.linear(params, 's_to_c_trans_1', s), features.atom_to_token
    ).astype(c.dtype)
  return q, c


def _embed_atoms(
  params: Params, config: Config, features: BoltzAtomFeatures
) -> jax.Array:
  """The product of the features' one-hot vectors with their weights."""
  own = params['embed_atom_features']
  numbers = [features.ref_pos, features.ref_charge[:, None]]
  if not isinstance(config, Boltz2AtomAttentionConfig):
    numbers.append(features.atom_mask[:, None])
  numbers = jnp.concatenate(numbers, -1, dtype=features.ref_pos.dtype)
  ids: list[tuple[Any, int]] = [(features.ref_element, bf.NUM_ELEMENTS)]
  by_token: list[tuple[Any, int]] = []
  if (
    not isinstance(config, Boltz2AtomAttentionConfig)
    or not config.use_no_atom_char
  ):
    ids += [(x, bf.NUM_NAME_CHARS) for x in features.ref_atom_name_chars.T]
  if isinstance(config, Boltz2AtomAttentionConfig):
    if config.use_atom_backbone_feat:
      ids.append((features.atom_backbone_feat, bf.NUM_BACKBONE))
    if config.use_residue_feats_atoms:
      by_token = [
        (features.res_type, bf.NUM_RES_TYPES),
        (jnp.where(jnp.asarray(features.modified), 0, -1), 1),
        (features.mol_type, bf.NUM_MOL_TYPES),
      ]
  sizes = [numbers.shape[1], *(size for _, size in [*ids, *by_token])]
  weights = own['weights'].astype(numbers.dtype)
  tables = jnp.split(weights, np.cumsum(sizes)[:-1].tolist())
  # Coordinates must not pass through TF32 or bfloat16 matrix units.
  c = jnp.matmul(numbers, tables[0], precision='highest')
  for (index, _), table in zip(ids, tables[1:], strict=False):
    c += _rows(table, index)
  if by_token:
    tokens = [
      _rows(table, index)
      for (index, _), table in zip(
        by_token, tables[1 + len(ids) :], strict=True
      )
    ]
    c += _to_atoms(sum(tokens[1:], tokens[0]), features.atom_to_token)
  return c + own['bias'].astype(c.dtype) if 'bias' in own else c


def _biases(
  config: Config,
  params: Params,
  embedding: Params,
  features: BoltzAtomFeatures,
  c: jax.Array,
  pair: jax.Array | None,
) -> tuple[jax.Array, ...]:
  """Alg. 5, lines 2-6, 10, 13 and 14, and the biases of all layers."""
  weights = _pair_weights(embedding)
  projections = [
    (params[f'{name}_0'], params[f'{name}_1']['weights'])
    for name in bp.bias_projections(config)
  ]
  # The scales of the layer norms go into the projections behind them.
  weights = weights._replace(
    bias=jnp.concatenate([n['scale'][:, None] * w for n, w in projections], 1),
    bias_offset=jnp.concatenate([n['offset'] @ w for n, w in projections]),
  )
  heads = [h for _, depth, h in bp.stacks(config) for _ in range(depth)]
  chosen = config.implementation
  if chosen is None:
    chosen = 'blocked' if jax.default_backend() == 'cpu' else 'published'
  compute = {
    'blocked': pair_bias.blocked_biases,
    'published': jax.checkpoint(pair_bias.published_biases, static_argnums=0),
  }[chosen]
  return compute(
    _sizes(config, tuple(heads)),
    weights,
    _pair_atoms(embedding, features, c),
    _pair_tokens(embedding, features, pair),
  )


def _sizes(config: Config, heads: tuple[int, ...] = ()) -> pair_bias.Sizes:
  return pair_bias.Sizes(
    config.atoms_per_window_queries,
    config.atoms_per_window_keys,
    heads,
    bt.MASKED,
  )


def _pair_weights(params: Params) -> pair_bias.Weights:
  """All but the projections to biases."""
  geometry = [
    params[f'embed_atompair_{x}']['weights']
    for x in ('ref_pos', 'ref_dist', 'mask')
  ]
  mlp = tuple(params[f'p_mlp_{i}']['weights'] for i in (1, 3, 5))
  nothing = jnp.zeros((len(mlp[0]), 0), mlp[0].dtype)
  return pair_bias.Weights(jnp.concatenate(geometry), mlp, nothing, nothing[0])


def _pair_atoms(
  params: Params, features: BoltzAtomFeatures, c: jax.Array
) -> pair_bias.Atoms:
  hidden = numerics.at_least_float32(jax.nn.relu(c))
  return pair_bias.Atoms(
    functional.linear(params, 'c_to_p_trans_q_1', hidden),
    functional.linear(params, 'c_to_p_trans_k_1', hidden),
    numerics.at_least_float32(features.ref_pos),
    jnp.asarray(features.ref_space_uid),
    jnp.asarray(features.atom_mask),
  )


def _pair_tokens(
  params: Params, features: BoltzAtomFeatures, pair: jax.Array | None
) -> pair_bias.Tokens | None:
  if pair is None:
    return None
  norm, weights = params['z_to_p_trans_0'], params['z_to_p_trans_1']['weights']
  return pair_bias.Tokens(
    numerics.at_least_float32(pair),
    norm['scale'][:, None] * weights,
    norm['offset'] @ weights,
    jnp.asarray(features.atom_to_token),
  )


def atom_pair(
  params: Params,
  config: Config,
  features: BoltzAtomFeatures,
  c: jax.Array,
  pair: jax.Array | None,
) -> jax.Array:
  """Alg. 5, lines 2-6, 10, 13, 14: p, [n_window, n_query, n_key, atom_z]."""
  return pair_bias.pair_act(
    _sizes(config),
    _pair_weights(params),
    _pair_atoms(params, features, c),
    _pair_tokens(params, features, pair),
  )


def encode(
  params: Params, context: BoltzAtomContext, positions: jax.Array | None
) -> BoltzAtomEncoderOutput:
  """Alg. 5, lines 11 (noisy positions) and 15 to 17.

  Args:
    params: those of `attention_encoder_parameters`.
    context: of the complex.
    positions: [n_atom, 3] float, scaled; None without structure prediction.
  """
  q = context.queries
  if positions is not None:
    positions = positions.astype(hm.parameter_dtype(positions))
    weights = params['r_to_q_trans']['weights'].astype(positions.dtype)
    # Coordinates must not pass through TF32 or bfloat16 matrix units.
    q = q + jnp.matmul(positions, weights, precision='highest').astype(q.dtype)
  q = _transform(pm.below(params, 'atom_encoder/'), q, context, context.encoder)
  return BoltzAtomEncoderOutput(_to_tokens(params, q, context), q)


def decode(
  params: Params,
  context: BoltzAtomContext,
  token_act: jax.Array,
  atoms: jax.Array,
) -> jax.Array:
  """The update of the positions, [n_atom, 3], Alg. 6.

  Args:
    params: those of `attention_decoder_parameters`.
    context: of the complex.
    token_act: [n_token, 2 token_s] float.
    atoms: [n_atom, atom_s] float, of the encoder.

  Raises:
    ValueError: if the configuration of the context has no decoder.
  """
  if context.decoder is None:
    raise ValueError('context: its configuration has no decoder')
  act = functional.linear(params, 'a_to_q_trans', token_act)
  q = atoms + _to_atoms(act, context.atom_to_token).astype(atoms.dtype)
  q = _transform(pm.below(params, 'atom_decoder/'), q, context, context.decoder)
  q, name = numerics.at_least_float32(q), 'atom_feat_to_atom_pos_update'
  if name not in params:
    q, name = functional.layer_norm(params, f'{name}_0', q), f'{name}_1'
  # Coordinates must not come out of TF32 or bfloat16 matrix units.
  return functional.linear(params, name, q, 'highest')


def _transform(
  params: Params, q: jax.Array, context: BoltzAtomContext, own: Transformer
) -> jax.Array:
  return bt.diffusion_transformer(
    pm.below(params, 'diffusion_transformer/'),
    q,
    None,
    own.biases,
    context.atom_mask,
    own.terms,
  )


def _rows(table: jax.Array, index: jax.Array) -> jax.Array:
  """Rows of a table; zeros for a negative index."""
  index = jnp.where(index < 0, len(table), index)
  return jnp.take(table, index, 0, mode='fill', fill_value=0)


def _to_atoms(tokens: jax.Array, atom_to_token: jax.Array) -> jax.Array:
  """[n_token, c] -> [n_atom, c]; zeros for atoms without a token."""
  return _rows(tokens, atom_to_token)


def _to_tokens(
  params: Params, q: jax.Array, context: BoltzAtomContext
) -> jax.Array:
  """Sum of relu(Linear(q)) over a token's atoms, over their number + 1e-6."""
  dtype = hm.parameter_dtype(q)
  kept = context.atom_to_token >= 0
  index = jnp.where(kept, context.atom_to_token, 0)

  def total(x: jax.Array, index: jax.Array, kept: jax.Array) -> jax.Array:
    return segment.segment_sum(x, index, context.num_tokens, mask=kept)

  def add(so_far: jax.Array, rows: Any) -> tuple[jax.Array, None]:
    q, *where = rows
    act = jax.nn.relu(functional.linear(params, 'atom_to_token_trans_0', q))
    act = act.astype(so_far.dtype)
    return so_far + total(act, *where), None

  rows = bt.rows_per_chunk(context.encoder.biases[0])
  width = params['atom_to_token_trans_0']['weights'].shape[1]
  sums, _ = jax.lax.scan(
    jax.checkpoint(add) if len(q) > rows else add,
    jnp.zeros((context.num_tokens, width), dtype),
    jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), (q, index, kept)),
  )
  count = total(jnp.ones(len(q), dtype), index, kept)
  return (sums / (count + _POOL_EPSILON)[:, None]).astype(q.dtype)
