"""Boltz's atom attention encoder and decoder, versions 1 and 2.

Abramson et al. (2024) Suppl. Algs. 5 (encoder) and 6 (decoder) as in Boltz:
mirrors boltz `model/modules/encoders.py` (version 1), `encodersv2.py`,
`diffusion_conditioning.py` and `InputEmbedder` of `trunkv2.py` (version 2)
@ 832486d.

Both are used twice: to embed the input (`structure_prediction=False`) and, with
the trunk and noisy positions, in the diffusion module. There, everything but
the positions is the same for all samples and steps: `precompute` does that
once, `encode` and `decode` the rest,

  context = precompute(params, features, single, pair)
  encoded = encode(params, context, positions)
  update  = decode(params, context, token_act, encoded.atoms)

and samples are `jax.vmap(encode, (None, None, 0))`. The Haiku modules are the
published form, which does all at once and hands on the atom pair.

Parameters have upstream's names (`boltz_transformers` says how) below the
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
pass through floats; see `boltz_transformers` for windows without atoms.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import base_config, checks, numerics
from structattn_jax.components import haiku_modules as hm
from structattn_jax.components import parameters as pm
from structattn_jax.components.parameters import Params
from structattn_jax.kernels import boltz_pair_bias as kernel
from structattn_jax.network import boltz_conditioning as conditioning
from structattn_jax.network import boltz_transformers as bt

Implementation = Literal['dense', 'blocked']

NUM_ELEMENTS, NUM_NAME_CHARS, NUM_BACKBONE = 128, 64, 17
NUM_RES_TYPES, NUM_MOL_TYPES = 33, 4
# Added to the number of a token's atoms before dividing by it.
_POOL_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class _AtomAttentionConfig(base_config.BaseConfig):
  """What both versions have; names are those of upstream's configuration.

  Attributes:
    atom_s: channels of atoms.
    atom_z: channels of pairs of atoms.
    token_s: channels of the trunk's single.
    token_z: channels of the trunk's pair.
    atoms_per_window_queries: n_query, even.
    atoms_per_window_keys: n_key, a multiple of n_query.
    atom_encoder_depth: layers of the encoder.
    atom_encoder_heads: heads of the encoder.
    atom_decoder_depth: layers of the decoder; 0: no decoder.
    atom_decoder_heads: heads of the decoder.
    structure_prediction: whether the trunk and noisy positions come in and
      there may be a decoder; False is the input embedder.
    implementation: how pair biases are computed: 'dense' holds the pair of all
      windows, 'blocked' that of one and recomputes it in the backward pass
      (reverse mode only). None: 'blocked' on CPU, else 'dense'. The choice
      changes rounding only.
  """

  atom_s: int = 128
  atom_z: int = 16
  token_s: int = 384
  token_z: int = 128
  atoms_per_window_queries: int = 32
  atoms_per_window_keys: int = 128
  atom_encoder_depth: int = 3
  atom_encoder_heads: int = 4
  atom_decoder_depth: int = 3
  atom_decoder_heads: int = 4
  structure_prediction: bool = True
  implementation: Implementation | None = None

  def __post_init__(self) -> None:
    super().__post_init__()
    name = type(self).__name__
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      least = 0 if field.name == 'atom_decoder_depth' else 1
      if type(value) is int and value < least:
        raise ValueError(
          f'{name}.{field.name}: expected at least {least}, got {value}'
        )
    n_query, n_key = self.atoms_per_window_queries, self.atoms_per_window_keys
    if n_query % 2 or n_key % n_query:
      raise ValueError(
        f'{name}.atoms_per_window_keys: expected a multiple of an even '
        f'atoms_per_window_queries={n_query}, got {n_key}'
      )
    for part in ('encoder', 'decoder'):
      heads = getattr(self, f'atom_{part}_heads')
      if self.atom_s % heads:
        raise ValueError(
          f'{name}.atom_s={self.atom_s} must be divisible by '
          f'atom_{part}_heads={heads}'
        )

  @property
  def has_decoder(self) -> bool:
    """Whether there is a decoder."""
    return self.structure_prediction and self.atom_decoder_depth > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boltz1AtomAttentionConfig(_AtomAttentionConfig):
  __doc__ = _AtomAttentionConfig.__doc__


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boltz2AtomAttentionConfig(_AtomAttentionConfig):
  """As `Boltz1AtomAttentionConfig`, and what Boltz-2 adds.

  Attributes:
    use_no_atom_char: whether atom names are left out.
    use_atom_backbone_feat: whether the kind of backbone atom is embedded.
    use_residue_feats_atoms: whether features of the token are embedded.
    transformer_post_layer_norm: whether layers of the encoder end with a layer
      norm.
    decoder_post_layer_norm: the same for the decoder, which then has none
      before its output; upstream never sets it.
    token_transformer_depth: layers of the token transformer, for its biases.
    token_transformer_heads: heads of the token transformer.
    conditioning_transition_layers: transitions of the pair conditioning.
  """

  use_no_atom_char: bool = False
  use_atom_backbone_feat: bool = False
  use_residue_feats_atoms: bool = False
  transformer_post_layer_norm: bool = False
  decoder_post_layer_norm: bool = False
  token_transformer_depth: int = 24
  token_transformer_heads: int = 16
  conditioning_transition_layers: int = 2


Config = Boltz1AtomAttentionConfig | Boltz2AtomAttentionConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BoltzAtomFeatures:
  """Atoms of one complex as Boltz's featuriser describes them.

  Attributes:
    ref_pos: [n_atom, 3] float, reference conformers in angstrom.
    ref_charge: [n_atom] float, formal charge.
    ref_element: [n_atom] integer, atomic number below 128; negative: none.
    ref_atom_name_chars: [n_atom, 4] integer, ord(c) - 32 below 64, 0 for
      missing characters; negative: none.
    ref_space_uid: [n_atom] integer, which atoms share a reference conformer.
    atom_mask: [n_atom] bool, True for real atoms.
    atom_to_token: [n_atom] integer below num_tokens, in any order, though
      atoms of a token should stand together; negative: none.
    atom_backbone_feat: [n_atom] integer below 17, or None; Boltz-2's
      `use_atom_backbone_feat`; negative: none.
    res_type: [n_token] integer below 33, or None; Boltz-2's
      `use_residue_feats_atoms`, as the next two.
    modified: [n_token] bool, whether the residue is modified, or None.
    mol_type: [n_token] integer below 4, or None.
    num_tokens: static, n_token.
  """

  ref_pos: jax.Array
  ref_charge: jax.Array
  ref_element: jax.Array
  ref_atom_name_chars: jax.Array
  ref_space_uid: jax.Array
  atom_mask: jax.Array
  atom_to_token: jax.Array
  atom_backbone_feat: jax.Array | None = None
  res_type: jax.Array | None = None
  modified: jax.Array | None = None
  mol_type: jax.Array | None = None
  num_tokens: int = dataclasses.field(
    default=0, kw_only=True, metadata={'static': True}
  )

  @classmethod
  def from_upstream(cls, feats: Mapping[str, Any]) -> 'BoltzAtomFeatures':
    """Converts upstream's features of one complex on the host.

    Args:
      feats: upstream's names, without the batch axis; one-hot arrays become
        indices, all-zero rows -1.

    Returns:
      The features, as NumPy arrays.

    Raises:
      ValueError: on a missing name or a row that is not one-hot.
    """
    names = ('ref_pos', 'ref_charge', 'ref_space_uid', 'atom_pad_mask')
    one_hot = ('ref_element', 'ref_atom_name_chars', 'atom_to_token')
    for name in (*names, *one_hot):
      if name not in feats:
        raise ValueError(f'feats: expected {name!r}, got {sorted(feats)}')
    arrays: dict[str, Any] = {
      name: _index_of_one_hot(name, feats[name])
      for name in (*one_hot, 'atom_backbone_feat', 'res_type')
      if feats.get(name) is not None
    }
    for name, dtype in (('modified', bool), ('mol_type', np.int32)):
      if feats.get(name) is not None:
        arrays[name] = np.asarray(feats[name]).astype(dtype)
    return cls(
      ref_pos=_floating(feats['ref_pos']),
      ref_charge=_floating(feats['ref_charge']),
      ref_space_uid=np.asarray(feats['ref_space_uid']).astype(np.int32),
      atom_mask=np.asarray(feats['atom_pad_mask']) > 0,
      **arrays,
      num_tokens=np.shape(feats['atom_to_token'])[-1],
    )

  def pad(self, n_atom: int) -> 'BoltzAtomFeatures':
    """Adds padding atoms on the host, to make n_atom a multiple of n_query.

    Raises:
      ValueError: if there are more atoms than that.
    """
    rest = n_atom - self.atom_mask.shape[0]
    if rest < 0:
      raise ValueError(
        f'n_atom: expected at least {self.atom_mask.shape[0]}, got {n_atom}'
      )
    fill = {
      'ref_element': -1,
      'ref_atom_name_chars': -1,
      'atom_to_token': -1,
      'atom_backbone_feat': -1,
    }
    padded = {}
    for name in _ATOM_SHAPES:
      x = getattr(self, name)
      if x is not None:
        pad = ((0, rest), *[(0, 0)] * (np.ndim(x) - 1))
        padded[name] = np.pad(x, pad, constant_values=fill.get(name, 0))
    return dataclasses.replace(self, **padded)


_ATOM_SHAPES = {
  'ref_pos': 'n_atom 3',
  'ref_charge': 'n_atom',
  'ref_element': 'n_atom',
  'ref_atom_name_chars': 'n_atom 4',
  'ref_space_uid': 'n_atom',
  'atom_mask': 'n_atom',
  'atom_to_token': 'n_atom',
  'atom_backbone_feat': 'n_atom',
}
_TOKEN_SHAPES = {'res_type': 'n_token', 'modified': 'n_token'}
_TOKEN_SHAPES['mol_type'] = 'n_token'


class Transformer(NamedTuple):
  """What a transformer takes from the complex.

  Attributes:
    terms: of each layer, what depends on the conditioning.
    biases: of each layer, [n_window, n_head, n_query, n_key].
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


class AtomEmbedding(NamedTuple):
  """Result of steps 1 to 6 of the encoder.

  Attributes:
    queries: [n_atom, atom_s], q without positions.
    conditioning: [n_atom, atom_s], c with the trunk's single.
    pair: [n_window, n_query, n_key, atom_z].
  """

  queries: jax.Array
  conditioning: jax.Array
  pair: jax.Array


class BoltzAtomAttention(NamedTuple):
  """Pure functions of encoder and decoder; see `transform_boltz_atom_attention`.

  Attributes:
    init: `init(key)` makes all parameters.
    precompute: `precompute(params, features, single=None, pair=None)`.
    encode: `encode(params, context, positions=None)`.
    decode: `decode(params, context, token_act, atoms)`.
  """

  init: Callable[..., hk.Params]
  precompute: Callable[..., BoltzAtomContext]
  encode: Callable[..., BoltzAtomEncoderOutput]
  decode: Callable[..., jax.Array]


def transform_boltz_atom_attention(
  config: Config | None = None,
) -> BoltzAtomAttention:
  """Pure functions of Boltz's atom encoder and decoder.

    >>> config = Boltz1AtomAttentionConfig(
    ...   atom_s=8, atom_encoder_heads=2, structure_prediction=False
    ... )
    >>> init, precompute, encode, _ = transform_boltz_atom_attention(config)
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
    >>> params = init(jax.random.key(0))
    >>> context = precompute(params, features)
    >>> encode(params, context).tokens.shape
    (8, 384)

  With structure prediction `precompute` takes

    single: [n_token, token_s] float, of the trunk,
    pair: [n_token, n_token, token_z] float, conditioned: the result of
      `PairwiseConditioning`,

  `encode` takes positions, [n_atom, 3] float32 scaled by 1 / sqrt(sigma^2 +
  sigma_data^2), and `decode` takes token_act, [n_token, 2 token_s] float, the
  result of the token transformer, and the encoder's `atoms`. It returns
  [n_atom, 3], the update of the positions in the same scale; that of padding
  atoms means nothing.

  Args:
    config: of either version; None takes Boltz-1's structure module.

  Returns:
    The functions. They raise ValueError on a wrong shape or a number of atoms
    that is not a multiple of n_query, TypeError on a wrong dtype.
  """
  config = config or Boltz1AtomAttentionConfig()

  def init(key: jax.Array) -> hk.Params:
    return pm.init_parameters(atom_attention_parameters(config), key)

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
    _check_positions(config, positions, context.queries)
    own = pm.below(params, 'atom_attention_encoder/')
    return encode(own, context, positions)

  def decode_(
    params: Params,
    context: BoltzAtomContext,
    token_act: jax.Array,
    atoms: jax.Array,
  ) -> jax.Array:
    if context.decoder is None:
      raise ValueError('decode: this configuration has no decoder')
    _check_decoder_inputs(config, token_act, atoms, context.num_tokens)
    own = pm.below(params, 'atom_attention_decoder/')
    return decode(own, context, token_act, atoms)

  return BoltzAtomAttention(init, precompute, encode_, decode_)


# The algorithm.


def embedding_parameters(config: Config, params: Params) -> Params:
  """Those of `atom_conditioning` and `atom_pair`."""
  return pm.below(params, _embedding_scope(config))


def _precompute(
  config: Config,
  params: Params,
  features: BoltzAtomFeatures,
  single: jax.Array | None,
  pair: jax.Array | None,
) -> BoltzAtomContext:
  """All that no sample changes, for encoder and decoder at once."""
  check_inputs(config, features, single, pair)
  embedding = embedding_parameters(config, params)
  queries, c = atom_conditioning(embedding, config, features, single)
  biases = _biases(config, params, embedding, features, c, pair)
  parts, first = [], 0
  for scope, depth, _ in _stacks(config):
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
  """Steps 1 and 4 of the encoder: q and c, [n_atom, atom_s].

  Args:
    params: those of `atom_encoder_parameters`.
    config: of either version.
    features: of one complex.
    single: [n_token, token_s] float, None without structure prediction.
  """
  q = c = _embed_atoms(params, config, features)
  if single is not None:
    s = bt.layer_norm(params, 's_to_c_trans_0', single)
    c = c + _to_atoms(
      bt.linear(params, 's_to_c_trans_1', s), features.atom_to_token
    ).astype(c.dtype)
  return q, c


def _embed_atoms(
  params: Params, config: Config, features: BoltzAtomFeatures
) -> jax.Array:
  """The product of the features' one-hot vectors with their weights."""
  own = params['embed_atom_features']
  numbers = [features.ref_pos, features.ref_charge[:, None]]
  if isinstance(config, Boltz1AtomAttentionConfig):
    numbers.append(features.atom_mask[:, None])
  numbers = jnp.concatenate(numbers, -1, dtype=features.ref_pos.dtype)
  ids = [(features.ref_element, NUM_ELEMENTS)]
  by_token = []
  if (
    isinstance(config, Boltz1AtomAttentionConfig) or not config.use_no_atom_char
  ):
    ids += [(x, NUM_NAME_CHARS) for x in features.ref_atom_name_chars.T]
  if isinstance(config, Boltz2AtomAttentionConfig):
    if config.use_atom_backbone_feat:
      ids.append((features.atom_backbone_feat, NUM_BACKBONE))
    if config.use_residue_feats_atoms:
      by_token = [
        (features.res_type, NUM_RES_TYPES),
        (jnp.where(features.modified, 0, -1), 1),
        (features.mol_type, NUM_MOL_TYPES),
      ]
  sizes = [numbers.shape[1], *(size for _, size in [*ids, *by_token])]
  weights = own['weights'].astype(numbers.dtype)
  tables = jnp.split(weights, np.cumsum(sizes)[:-1].tolist())
  # Coordinates must not pass through TF32 or bfloat16 matrix units.
  c = jnp.matmul(numbers, tables[0], precision='highest')
  for (index, _), table in zip(ids, tables[1:], strict=False):
    c += _rows(table, index)
  if by_token:
    tokens = sum(
      _rows(table, index)
      for (index, _), table in zip(
        by_token, tables[1 + len(ids) :], strict=True
      )
    )
    c += _to_atoms(tokens, features.atom_to_token)
  return c + own['bias'].astype(c.dtype) if 'bias' in own else c


def _biases(
  config: Config,
  params: Params,
  embedding: Params,
  features: BoltzAtomFeatures,
  c: jax.Array,
  pair: jax.Array | None,
) -> tuple[jax.Array, ...]:
  """Steps 2 to 6 of the encoder and the biases of all layers."""
  weights = _pair_weights(embedding)
  projections = [
    (params[f'{name}_0'], params[f'{name}_1']['weights'])
    for name in _bias_projections(config)
  ]
  # The scales of the layer norms go into the projections behind them.
  weights = weights._replace(
    bias=jnp.concatenate([n['scale'][:, None] * w for n, w in projections], 1),
    bias_offset=jnp.concatenate([n['offset'] @ w for n, w in projections]),
  )
  heads = [h for _, depth, h in _stacks(config) for _ in range(depth)]
  chosen = config.implementation
  if chosen is None:
    chosen = 'blocked' if jax.default_backend() == 'cpu' else 'dense'
  compute = {
    'blocked': kernel.blocked_biases,
    'dense': jax.checkpoint(kernel.dense_biases, static_argnums=0),
  }[chosen]
  return compute(
    _sizes(config, tuple(heads)),
    weights,
    _pair_atoms(embedding, features, c),
    _pair_tokens(embedding, features, pair),
  )


def _sizes(config: Config, heads: tuple[int, ...] = ()) -> kernel.Sizes:
  return kernel.Sizes(
    config.atoms_per_window_queries, config.atoms_per_window_keys, heads
  )


def _pair_weights(params: Params) -> kernel.Weights:
  """All but the projections to biases."""
  geometry = [
    params[f'embed_atompair_{x}']['weights']
    for x in ('ref_pos', 'ref_dist', 'mask')
  ]
  mlp = tuple(params[f'p_mlp_{i}']['weights'] for i in (1, 3, 5))
  nothing = jnp.zeros((len(mlp[0]), 0), mlp[0].dtype)
  return kernel.Weights(jnp.concatenate(geometry), mlp, nothing, nothing[0])


def _pair_atoms(
  params: Params, features: BoltzAtomFeatures, c: jax.Array
) -> kernel.Atoms:
  hidden = numerics.at_least_float32(jax.nn.relu(c))
  return kernel.Atoms(
    bt.linear(params, 'c_to_p_trans_q_1', hidden),
    bt.linear(params, 'c_to_p_trans_k_1', hidden),
    numerics.at_least_float32(features.ref_pos),
    jnp.asarray(features.ref_space_uid),
    jnp.asarray(features.atom_mask),
  )


def _pair_tokens(
  params: Params, features: BoltzAtomFeatures, pair: jax.Array | None
) -> kernel.Tokens | None:
  if pair is None:
    return None
  norm, weights = params['z_to_p_trans_0'], params['z_to_p_trans_1']['weights']
  return kernel.Tokens(
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
  """Steps 2 to 6 of the encoder: p, [n_window, n_query, n_key, atom_z]."""
  return kernel.pair_act(
    _sizes(config),
    _pair_weights(params),
    _pair_atoms(params, features, c),
    _pair_tokens(params, features, pair),
  )


def encode(
  params: Params, context: BoltzAtomContext, positions: jax.Array | None
) -> BoltzAtomEncoderOutput:
  """Steps 7 to 10 of the encoder, Alg. 5 from line 11 on.

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
  act = jax.nn.relu(bt.linear(params, 'atom_to_token_trans_0', q))
  return BoltzAtomEncoderOutput(_to_tokens(act, context), q)


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
  """
  assert context.decoder is not None
  act = bt.linear(params, 'a_to_q_trans', token_act)
  q = atoms + _to_atoms(act, context.atom_to_token).astype(atoms.dtype)
  q = _transform(pm.below(params, 'atom_decoder/'), q, context, context.decoder)
  q, name = numerics.at_least_float32(q), 'atom_feat_to_atom_pos_update'
  if name in params:
    return bt.linear(params, name, q)
  return bt.linear(params, f'{name}_1', bt.layer_norm(params, f'{name}_0', q))


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
  return table.at[index].get(mode='fill', fill_value=0)


def _to_atoms(tokens: jax.Array, atom_to_token: jax.Array) -> jax.Array:
  """[n_token, c] -> [n_atom, c]; zeros for atoms without a token."""
  return _rows(tokens, atom_to_token)


def _to_tokens(atoms: jax.Array, context: BoltzAtomContext) -> jax.Array:
  """Sum over a token's atoms, divided by their number + 1e-6."""
  index, n_token = context.atom_to_token, context.num_tokens
  index = jnp.where(index < 0, n_token, index)
  wide = numerics.at_least_float32(atoms)

  def total(x: jax.Array) -> jax.Array:
    return jax.ops.segment_sum(x, index, n_token + 1)[:n_token]

  count = total(jnp.ones(len(wide), wide.dtype))
  return (total(wide) / (count + _POOL_EPSILON)[:, None]).astype(atoms.dtype)


# Where parameters are.


def _embedding_scope(config: Config) -> str:
  if isinstance(config, Boltz1AtomAttentionConfig):
    return 'atom_attention_encoder/'
  if config.structure_prediction:
    return 'diffusion_conditioning/atom_encoder/'
  return 'atom_encoder/'


def _stacks(config: Config) -> list[tuple[str, int, int]]:
  """Scope, depth and heads of the transformers."""
  stacks = [
    (
      f'atom_attention_{part}/atom_{part}/diffusion_transformer/',
      getattr(config, f'atom_{part}_depth'),
      getattr(config, f'atom_{part}_heads'),
    )
    for part in ('encoder', 'decoder')
  ]
  return stacks if config.has_decoder else stacks[:1]


def _bias_projections(config: Config) -> list[str]:
  """Names of the projections of the atom pair, in the order of layers."""
  if isinstance(config, Boltz2AtomAttentionConfig):
    if not config.structure_prediction:
      return ['atom_enc_proj_z']
    return [
      f'diffusion_conditioning/atom_{part}_proj_z_{i}'
      for part, (_, depth, _) in zip(
        ('enc', 'dec'), _stacks(config), strict=True
      )
      for i in range(depth)
    ]
  return [
    f'{scope}layers_{i}/pair_bias_attn/proj_z'
    for scope, depth, _ in _stacks(config)
    for i in range(depth)
  ]


# Tables of parameters.


def atom_attention_parameters(config: Config) -> pm.Table:
  """Of `transform_boltz_atom_attention`."""
  table = bt.below(
    'atom_attention_encoder', attention_encoder_parameters(config)
  )
  if config.has_decoder:
    table |= bt.below(
      'atom_attention_decoder', attention_decoder_parameters(config)
    )
  if isinstance(config, Boltz1AtomAttentionConfig):
    return table
  if config.structure_prediction:
    return table | bt.below(
      'diffusion_conditioning', diffusion_conditioning_parameters(config)
    )
  num_bias = config.atom_encoder_depth * config.atom_encoder_heads
  return {
    **bt.below('atom_encoder', atom_encoder_parameters(config)),
    **bt.pair_bias_parameters(config.atom_z, num_bias, 'atom_enc_proj_z'),
    **table,
  }


def atom_encoder_parameters(config: Config) -> pm.Table:
  """Of `atom_conditioning` and `atom_pair`."""
  s, z = config.atom_s, config.atom_z
  is_first = isinstance(config, Boltz1AtomAttentionConfig)
  table = {
    'embed_atom_features': bt.linear_parameters(
      _num_features(config), s, use_bias=not is_first
    ),
    'embed_atompair_ref_pos': bt.linear_parameters(3, z),
    'embed_atompair_ref_dist': bt.linear_parameters(1, z),
    'embed_atompair_mask': bt.linear_parameters(1, z),
    'c_to_p_trans_k_1': bt.linear_parameters(s, z, initializer='zeros'),
    'c_to_p_trans_q_1': bt.linear_parameters(s, z, initializer='zeros'),
    'p_mlp_1': bt.linear_parameters(z, z),
    'p_mlp_3': bt.linear_parameters(z, z),
    'p_mlp_5': bt.linear_parameters(z, z, initializer='zeros'),
  }
  if config.structure_prediction:
    for name, size, out in (
      ('s_to_c_trans', config.token_s, s),
      ('z_to_p_trans', config.token_z, z),
    ):
      table[f'{name}_0'] = bt.layer_norm_parameters(size)
      table[f'{name}_1'] = bt.linear_parameters(size, out, initializer='zeros')
  return table


def _num_features(config: Config) -> int:
  if isinstance(config, Boltz1AtomAttentionConfig):
    return 5 + NUM_ELEMENTS + 4 * NUM_NAME_CHARS
  number = 4 + NUM_ELEMENTS
  if not config.use_no_atom_char:
    number += 4 * NUM_NAME_CHARS
  if config.use_atom_backbone_feat:
    number += NUM_BACKBONE
  if config.use_residue_feats_atoms:
    number += NUM_RES_TYPES + 1 + NUM_MOL_TYPES
  return number


def attention_encoder_parameters(config: Config) -> pm.Table:
  """Of `encode`; in Boltz-1 with those of `atom_encoder_parameters`."""
  is_first = isinstance(config, Boltz1AtomAttentionConfig)
  transformer = bt.diffusion_transformer_parameters(
    config.atom_encoder_depth,
    config.atom_encoder_heads,
    config.atom_s,
    config.atom_s,
    config.atom_z if is_first else None,
    post_layer_norm=not is_first and config.transformer_post_layer_norm,
  )
  width = (2 if config.structure_prediction else 1) * config.token_s
  table = {
    **bt.below('atom_encoder/diffusion_transformer', transformer),
    'atom_to_token_trans_0': bt.linear_parameters(config.atom_s, width),
  }
  if config.structure_prediction:
    table['r_to_q_trans'] = bt.linear_parameters(
      3, config.atom_s, initializer='zeros'
    )
  return {**atom_encoder_parameters(config), **table} if is_first else table


def attention_decoder_parameters(config: Config) -> pm.Table:
  """Of `decode`."""
  is_first = isinstance(config, Boltz1AtomAttentionConfig)
  post_layer_norm = not is_first and config.decoder_post_layer_norm
  transformer = bt.diffusion_transformer_parameters(
    config.atom_decoder_depth,
    config.atom_decoder_heads,
    config.atom_s,
    config.atom_s,
    config.atom_z if is_first else None,
    post_layer_norm=post_layer_norm,
  )
  s, name = config.atom_s, 'atom_feat_to_atom_pos_update'
  out = bt.linear_parameters(s, 3, initializer='zeros')
  update = {name: out}
  if not post_layer_norm:
    update = {f'{name}_0': bt.layer_norm_parameters(s), f'{name}_1': out}
  return {
    'a_to_q_trans': bt.linear_parameters(
      2 * config.token_s, s, initializer='zeros'
    ),
    **bt.below('atom_decoder/diffusion_transformer', transformer),
    **update,
  }


def diffusion_conditioning_parameters(
  config: Boltz2AtomAttentionConfig,
) -> pm.Table:
  """Of Boltz-2's `DiffusionConditioning`."""
  pairwise = conditioning.pairwise_conditioning_parameters(
    config.token_z, 2 * config.token_z, config.conditioning_transition_layers
  )
  table = {
    **bt.below('pairwise_conditioner', pairwise),
    **bt.below('atom_encoder', atom_encoder_parameters(config)),
  }
  for name, depth, heads, channels in (
    (
      'atom_enc_proj_z',
      config.atom_encoder_depth,
      config.atom_encoder_heads,
      config.atom_z,
    ),
    (
      'atom_dec_proj_z',
      config.atom_decoder_depth,
      config.atom_decoder_heads,
      config.atom_z,
    ),
    (
      'token_trans_proj_z',
      config.token_transformer_depth,
      config.token_transformer_heads,
      config.token_z,
    ),
  ):
    for i in range(depth):
      table |= bt.pair_bias_parameters(channels, heads, f'{name}_{i}')
  return table


# Haiku modules: the published form.


class Boltz1AtomAttentionEncoder(hk.Module):
  """Boltz-1's `AtomAttentionEncoder`, Alg. 5, all at once.

  Hands on the atom pair as upstream does; `transform_boltz_atom_attention` is
  the lean form of the same with the same parameters.
  """

  def __init__(
    self,
    config: Boltz1AtomAttentionConfig,
    *,
    name: str = 'atom_attention_encoder',
  ):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    features: BoltzAtomFeatures,
    single: jax.Array | None = None,
    pair: jax.Array | None = None,
    positions: jax.Array | None = None,
  ) -> tuple[BoltzAtomEncoderOutput, AtomEmbedding]:
    """Returns tokens and atoms, and q, c and p before the transformer.

    Args:
      features: of one complex.
      single: [n_token, token_s] float; this and the next two are given with
        structure prediction and only then.
      pair: [n_token, n_token, token_z] float, conditioned.
      positions: [n_atom, 3] float, scaled.

    Raises:
      ValueError: on a wrong shape.
      TypeError: on a wrong dtype.
    """
    config = self.config
    check_inputs(config, features, single, pair)
    dtype = hm.parameter_dtype(jnp.asarray(features.ref_pos))
    params = pm.haiku_parameters(attention_encoder_parameters(config), dtype)
    queries, c = atom_conditioning(params, config, features, single)
    _check_positions(config, positions, queries)
    embedding = AtomEmbedding(
      queries, c, atom_pair(params, config, features, c, pair)
    )
    stack = pm.below(params, 'atom_encoder/diffusion_transformer/')
    context = _context(
      features, embedding, stack, _projected(stack, embedding.pair)
    )
    return encode(params, context, positions), embedding


class Boltz1AtomAttentionDecoder(hk.Module):
  """Boltz-1's `AtomAttentionDecoder`, Alg. 6."""

  def __init__(
    self,
    config: Boltz1AtomAttentionConfig,
    *,
    name: str = 'atom_attention_decoder',
  ):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    token_act: jax.Array,
    atoms: jax.Array,
    embedding: AtomEmbedding,
    features: BoltzAtomFeatures,
  ) -> jax.Array:
    """Returns the update of the positions, [n_atom, 3].

    Args:
      token_act: [n_token, 2 token_s] float.
      atoms: [n_atom, atom_s] float, of the encoder.
      embedding: of the encoder.
      features: of the complex.

    Raises:
      ValueError: on a wrong shape.
      TypeError: on a wrong dtype.
    """
    _check_decoder_inputs(self.config, token_act, atoms, features.num_tokens)
    params = pm.haiku_parameters(
      attention_decoder_parameters(self.config), hm.parameter_dtype(atoms)
    )
    stack = pm.below(params, 'atom_decoder/diffusion_transformer/')
    context = _context(
      features, embedding, stack, _projected(stack, embedding.pair)
    )
    return decode(params, context, token_act, atoms)


class Boltz2AtomEncoder(hk.Module):
  """Boltz-2's `AtomEncoder`: lines 1 to 14 of Alg. 5."""

  def __init__(
    self, config: Boltz2AtomAttentionConfig, *, name: str = 'atom_encoder'
  ):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    features: BoltzAtomFeatures,
    single: jax.Array | None = None,
    pair: jax.Array | None = None,
  ) -> AtomEmbedding:
    """Returns q, c and p; arguments as `Boltz1AtomAttentionEncoder`."""
    check_inputs(self.config, features, single, pair)
    dtype = hm.parameter_dtype(jnp.asarray(features.ref_pos))
    params = pm.haiku_parameters(atom_encoder_parameters(self.config), dtype)
    queries, c = atom_conditioning(params, self.config, features, single)
    return AtomEmbedding(
      queries, c, atom_pair(params, self.config, features, c, pair)
    )


class Boltz2AtomAttentionEncoder(hk.Module):
  """Boltz-2's `AtomAttentionEncoder`: Alg. 5 from line 15 on."""

  def __init__(
    self,
    config: Boltz2AtomAttentionConfig,
    *,
    name: str = 'atom_attention_encoder',
  ):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    features: BoltzAtomFeatures,
    embedding: AtomEmbedding,
    bias: jax.Array,
    positions: jax.Array | None = None,
  ) -> BoltzAtomEncoderOutput:
    """Returns tokens and atoms.

    Args:
      features: of one complex.
      embedding: of `Boltz2AtomEncoder`.
      bias: [n_window, n_query, n_key, depth * n_head] float, layer after layer.
      positions: [n_atom, 3] float, scaled; with structure prediction only.

    Raises:
      ValueError: on a wrong shape.
      TypeError: on a wrong dtype.
    """
    _check_positions(self.config, positions, embedding.queries)
    params = pm.haiku_parameters(
      attention_encoder_parameters(self.config),
      hm.parameter_dtype(embedding.queries),
    )
    stack = pm.below(params, 'atom_encoder/diffusion_transformer/')
    biases = _given(bias, self.config.atom_encoder_depth)
    return encode(
      params, _context(features, embedding, stack, biases), positions
    )


class Boltz2AtomAttentionDecoder(hk.Module):
  """Boltz-2's `AtomAttentionDecoder`, Alg. 6."""

  def __init__(
    self,
    config: Boltz2AtomAttentionConfig,
    *,
    name: str = 'atom_attention_decoder',
  ):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    token_act: jax.Array,
    atoms: jax.Array,
    embedding: AtomEmbedding,
    bias: jax.Array,
    features: BoltzAtomFeatures,
  ) -> jax.Array:
    """Returns the update of the positions, [n_atom, 3].

    Args:
      token_act: [n_token, 2 token_s] float.
      atoms: [n_atom, atom_s] float, of the encoder.
      embedding: of `Boltz2AtomEncoder`.
      bias: [n_window, n_query, n_key, depth * n_head] float, layer after layer.
      features: of the complex.

    Raises:
      ValueError: on a wrong shape.
      TypeError: on a wrong dtype.
    """
    _check_decoder_inputs(self.config, token_act, atoms, features.num_tokens)
    params = pm.haiku_parameters(
      attention_decoder_parameters(self.config), hm.parameter_dtype(atoms)
    )
    stack = pm.below(params, 'atom_decoder/diffusion_transformer/')
    biases = _given(bias, self.config.atom_decoder_depth)
    context = _context(features, embedding, stack, biases)
    return decode(params, context, token_act, atoms)


class Boltz2Conditioning(NamedTuple):
  """Result of `Boltz2DiffusionConditioning`.

  Attributes:
    pair: [n_token, n_token, token_z], conditioned.
    embedding: q, c and p of the atoms.
    encoder_bias: [n_window, n_query, n_key, depth * n_head], layer after layer.
    decoder_bias: likewise.
    token_bias: [n_token, n_token, depth * n_head] of the token transformer.
  """

  pair: jax.Array
  embedding: AtomEmbedding
  encoder_bias: jax.Array
  decoder_bias: jax.Array
  token_bias: jax.Array


class Boltz2DiffusionConditioning(hk.Module):
  """Boltz-2's `DiffusionConditioning`: what the diffusion module shares."""

  def __init__(
    self,
    config: Boltz2AtomAttentionConfig,
    *,
    name: str = 'diffusion_conditioning',
  ):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    features: BoltzAtomFeatures,
    single: jax.Array,
    pair: jax.Array,
    relative_position: jax.Array,
  ) -> Boltz2Conditioning:
    """Returns the conditioning of samples.

    Args:
      features: of one complex.
      single: [n_token, token_s] float, of the trunk.
      pair: [n_token, n_token, token_z] float, of the trunk.
      relative_position: [n_token, n_token, token_z] float.

    Raises:
      ValueError: on a wrong shape.
      TypeError: on a wrong dtype.
    """
    config = self.config
    check_inputs(config, features, single, pair)
    checks.check_shapes(
      pair=(pair, 'n_token n_token token_z'),
      relative_position=(relative_position, 'n_token n_token token_z'),
    )
    params = pm.haiku_parameters(
      diffusion_conditioning_parameters(config), hm.parameter_dtype(pair)
    )
    z = conditioning.pairwise_conditioning(
      pm.below(params, 'pairwise_conditioner/'), pair, relative_position
    )
    own = pm.below(params, 'atom_encoder/')
    queries, c = atom_conditioning(own, config, features, single)
    p = atom_pair(own, config, features, c, z)

    def biases(name: str, depth: int, x: jax.Array) -> jax.Array:
      layers = [bt.pair_bias(params, f'{name}_{i}', x) for i in range(depth)]
      return jnp.concatenate(layers, -1)

    return Boltz2Conditioning(
      z,
      AtomEmbedding(queries, c, p),
      biases('atom_enc_proj_z', config.atom_encoder_depth, p),
      biases('atom_dec_proj_z', config.atom_decoder_depth, p),
      biases('token_trans_proj_z', config.token_transformer_depth, z),
    )


def _context(
  features: BoltzAtomFeatures,
  embedding: AtomEmbedding,
  stack: Params,
  biases: Sequence[jax.Array],
) -> BoltzAtomContext:
  """A context whose encoder and decoder are the same transformer."""
  own = Transformer(
    bt.transformer_terms(stack, embedding.conditioning), tuple(biases)
  )
  return BoltzAtomContext(
    embedding.queries,
    embedding.conditioning,
    own,
    own,
    jnp.asarray(features.atom_mask),
    jnp.asarray(features.atom_to_token),
    features.num_tokens,
  )


def _projected(stack: Params, pair: jax.Array) -> list[jax.Array]:
  """Boltz-1's biases of each layer, heads first."""
  return [
    jnp.moveaxis(bt.pair_bias(own, 'pair_bias_attn/proj_z', pair), -1, 1)
    for own in bt.layers(stack)
  ]


def _given(bias: jax.Array, depth: int) -> list[jax.Array]:
  """Boltz-2's biases of each layer, heads first."""
  return [jnp.moveaxis(x, -1, 1) for x in jnp.split(bias, depth, -1)]


# Checks.


def check_inputs(
  config: Config,
  features: BoltzAtomFeatures,
  single: jax.Array | None,
  pair: jax.Array | None,
) -> None:
  """Shapes and dtypes of what does not depend on samples.

  Raises:
    ValueError: on a wrong shape, something missing, or a number of atoms that
      is not a multiple of n_query.
    TypeError: on a wrong dtype.
  """
  arrays = {
    f'features.{name}': (getattr(features, name), shape)
    for name, shape in (_ATOM_SHAPES | _TOKEN_SHAPES).items()
  }
  sizes = checks.check_shapes(
    {
      'n_token': features.num_tokens,
      'token_s': config.token_s,
      'token_z': config.token_z,
    },
    **arrays,
    single=(single, 'n_token token_s'),
    pair=(pair, 'n_token n_token token_z'),
  )
  kinds = dict.fromkeys(arrays, 'integer')
  for name in ('ref_pos', 'ref_charge'):
    kinds[f'features.{name}'] = 'floating'
  for name in ('atom_mask', 'modified'):
    kinds[f'features.{name}'] = 'bool'
  for name, kind in kinds.items():
    checks.check_dtypes(kind, **{name: arrays[name][0]})
  checks.check_dtypes('floating', single=single, pair=pair)
  for name, x in (('single', single), ('pair', pair)):
    if (x is None) == config.structure_prediction:
      raise ValueError(
        f'{name}: expected {"an array" if x is None else "None"} with '
        f'structure_prediction={config.structure_prediction}'
      )
  n_atom, n_query = sizes['n_atom'], config.atoms_per_window_queries
  if n_atom % n_query:
    raise ValueError(
      f'features: expected a multiple of atoms_per_window_queries={n_query} '
      f'atoms, got {n_atom}; use features.pad({-(-n_atom // n_query) * n_query})'
    )
  needed = []
  if isinstance(config, Boltz2AtomAttentionConfig):
    needed += ['atom_backbone_feat'] * config.use_atom_backbone_feat
    needed += [*_TOKEN_SHAPES] * config.use_residue_feats_atoms
  for name in needed:
    if getattr(features, name) is None:
      raise ValueError(f'features.{name}: expected an array, got None')


def _check_positions(
  config: Config, positions: jax.Array | None, queries: jax.Array
) -> None:
  if (positions is None) == config.structure_prediction:
    raise ValueError(
      f'positions: expected {"an array" if positions is None else "None"} with '
      f'structure_prediction={config.structure_prediction}'
    )
  checks.check_shapes(
    {'n_atom': queries.shape[0]}, positions=(positions, 'n_atom 3')
  )
  checks.check_dtypes('floating', positions=positions)


def _check_decoder_inputs(
  config: Config, token_act: jax.Array, atoms: jax.Array, num_tokens: int
) -> None:
  checks.check_shapes(
    {
      'n_token': num_tokens,
      'c_token': 2 * config.token_s,
      'atom_s': config.atom_s,
    },
    token_act=(token_act, 'n_token c_token'),
    atoms=(atoms, 'n_atom atom_s'),
  )
  checks.check_dtypes('floating', token_act=token_act, atoms=atoms)


def _index_of_one_hot(name: str, x: Any) -> np.ndarray:
  """Index of the one in each row; -1 for rows of zeros."""
  x = np.asarray(x)
  if not np.isin(x, (0, 1)).all() or (x.sum(-1, dtype=np.int64) > 1).any():
    raise ValueError(f'{name}: expected one-hot rows or rows of zeros')
  return np.where(x.any(-1), x.argmax(-1), -1).astype(np.int32)


def _floating(x: Any) -> np.ndarray:
  x = np.asarray(x)
  return x if x.dtype.kind == 'f' else x.astype(np.float32)
