"""AF3's atom encoder and decoder with the work done once that can be.

Abramson et al. (2024) Suppl. Algs. 5 (encoder), 6 (decoder), 7 (transformer):
the numbers of `atom_cross_attention`, which is the published form. Atoms are
flat instead of in slots of tokens; what depends on the conformers and the trunk
alone is computed by `precompute`, once for all diffusion steps and samples.
"""

import dataclasses
from typing import Any, Literal

import haiku as hk
import jax
import jax.numpy as jnp

from structattn_jax.common import base_config, checks, numerics
from structattn_jax.components import (
  functional,
  mapping,
  segment,
  windowed_attention,
)
from structattn_jax.components import haiku_modules as hm
from structattn_jax.components import parameters as pm
from structattn_jax.components.parameters import Params
from structattn_jax.network.alphafold3 import atom_cross_attention as published
from structattn_jax.network.alphafold3 import (
  atom_layout,
  window_pairs,
  window_plan,
)
from structattn_jax.network.alphafold3 import diffusion_transformer as dt
from structattn_jax.network.alphafold3 import window_transformer as wt


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
    implementation: 'lean', or 'published': upstream's layouts and operations,
      the reference. For the one-call functions on dense batches.
    window_chunk: windows at a time; None chooses for the device. This and the
      following two are of 'lean'.
    remat: whether to recompute blocks in the backward pass; less memory, and
      reverse mode only.
    bfloat16: whether transformer blocks compute in bfloat16; decided in
      `precompute`.
  """

  per_token_channels: int = 768
  per_atom_channels: int = 128
  per_atom_pair_channels: int = 16
  atom_transformer: dt.CrossAttTransformerConfig = dataclasses.field(
    default_factory=dt.CrossAttTransformerConfig
  )
  decoder_transformer: dt.CrossAttTransformerConfig | None = None
  final_init: dt.FinalInit = 'zeros'
  uid_rule: published.UidRule = 'official'
  padded_keys: dt.PaddedKeys = 'official'
  implementation: Literal['lean', 'published'] = 'lean'
  window_chunk: int | None = None
  remat: bool = True
  bfloat16: bool = False

  def __post_init__(self) -> None:
    super().__post_init__()
    self.check_at_least(1, 'window_chunk')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TransformerConditioning:
  """What one atom transformer needs, constant over steps and samples.

  Attributes:
    biases: per block [n_window, n_head, num_queries, num_keys] pair logits.
    terms: per block the adaptive terms of the conditioning, each [n_atom, c];
      None if they are to be computed in each call.
  """

  biases: tuple[jax.Array, ...]
  terms: tuple[wt.AdaptiveTerms, ...] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AtomConditioning:
  """Result of `precompute`: constant over diffusion steps and samples.

  Attributes:
    plan: the atoms and their windows.
    single: [n_atom, c_atom], conditioning of the atoms, zero for padding.
    encoder: of the encoder's transformer.
    decoder: of the decoder's transformer, None without a decoder.
    pair: [n_window, num_queries, num_keys, c_pair], on request.
  """

  plan: window_plan.WindowPlan
  single: jax.Array
  encoder: TransformerConditioning
  decoder: TransformerConditioning | None
  pair: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AtomEncoding:
  """Result of `encode`.

  Attributes:
    token_act: [n_token, c_token], zero for tokens without atoms.
    skip_connection: [n_atom, c_atom] for the decoder, zero for padding.
  """

  token_act: jax.Array
  skip_connection: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AtomCrossAttHeadOutput:
  """Result of `AtomCrossAttHead`.

  Attributes:
    token_act: [n_token, c_token], from the encoder.
    skip_connection: [n_atom, c_atom], from the encoder.
    position_update: [n_atom, 3], from the decoder; None without it.
    conditioning: what both used.
  """

  token_act: jax.Array
  skip_connection: jax.Array
  position_update: jax.Array | None
  conditioning: AtomConditioning


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AtomCrossAttEncoderOutput:
  """Result of `atom_cross_att_encoder`, in upstream's layouts.

  The number of windows is that of the implementation: 'published' pads to the
  gathers, 'lean' to its plan. Only real atoms are defined. With fewer atoms
  than keys per window, the keys of the two have another order.

  Attributes:
    token_act: [n_token, c_token].
    skip_connection: [n_window, num_queries, c_atom].
    queries_mask: [n_window, num_queries] bool.
    queries_single_cond: [n_window, num_queries, c_atom].
    keys_mask: [n_window, num_keys] bool.
    keys_single_cond: [n_window, num_keys, c_atom].
    pair_cond: [n_window, num_queries, num_keys, c_pair]; 'lean': on request.
    conditioning: for the decoder; None for 'published'.
  """

  token_act: jax.Array
  skip_connection: jax.Array
  queries_mask: jax.Array
  queries_single_cond: jax.Array
  keys_mask: jax.Array
  keys_single_cond: jax.Array
  pair_cond: jax.Array | None
  conditioning: AtomConditioning | None


def precompute(
  params: Params,
  plan: window_plan.WindowPlan,
  ref: window_plan.RefStructure,
  trunk_single_cond: jax.Array | None = None,
  trunk_pair_cond: jax.Array | None = None,
  *,
  config: AtomCrossAttConfig | None = None,
  name: str = 'diffusion',
  decoder: bool | None = None,
  cache_terms: bool = True,
  return_pair: bool = False,
) -> AtomConditioning:
  """All that does not depend on noisy positions (Alg. 5, lines 1-6, 9-14).

  Args:
    params: parameters with upstream's names, such as
      `diffusion_embed_ref_pos`; see `atom_cross_att_parameters`.
    plan: the atoms and their windows.
    ref: reference conformer of the plan's atoms.
    trunk_single_cond: [n_token, c_s] float, or None.
    trunk_pair_cond: [n_token, n_token, c_z] float, query first, or None.
    config: quirks and execution; sizes are read off the parameters.
    name: prefix of the parameters: 'diffusion' or 'evoformer_conditioning'.
    decoder: whether `decode` will be called; None: if it has parameters.
    cache_terms: whether to keep the adaptive terms, 8 arrays [n_atom, c_atom]
      per block, which spares 8 of 21 units of work in each call.
    return_pair: whether to return the embedding of atom pairs, too.

  Returns:
    The conditioning for `encode` and `decode`.

  Raises:
    ValueError: on a wrong shape, a trunk pair without token pairs in the
      plan, or parameters that lack what the arguments need.
    TypeError: on a wrong dtype.
  """
  config = config or AtomCrossAttConfig()
  _check_precompute(plan, ref, trunk_single_cond, trunk_pair_cond)
  pm.module(params, f'{name}_embed_ref_pos')
  for argument, given, spec in (
    ('trunk_single_cond', trunk_single_cond, 'n_token c'),
    ('trunk_pair_cond', trunk_pair_cond, 'n_token n_token c'),
  ):
    if given is not None:
      module = f'{name}_lnorm_{argument}'
      size = pm.module(params, module, argument)['scale'].shape[0]
      sizes = {'c': (size, f'the parameters {module}')}
      checks.check_shapes(sizes, **{argument: (given, spec)})
  has_decoder = any(
    f'{name}_atom_transformer_decoder/' in key for key in params
  )
  if decoder is None:
    decoder = has_decoder
  elif decoder and not has_decoder:
    raise ValueError(
      f'decoder: expected False, as the parameters have none named {name!r}'
    )
  # Lines 1 and 2: atoms from the conformer, tokens from the trunk.
  single = _atom_features(params, plan, ref, name, config.window_chunk)
  if trunk_single_cond is not None:
    normalised = functional.layer_norm(
      params, f'{name}_lnorm_trunk_single_cond', trunk_single_cond
    )
    by_token = functional.linear(
      params, f'{name}_embed_trunk_single_cond', normalised, 'highest'
    )
    single += by_token[plan.token_index]
  single = jnp.where(plan.atom_mask[:, None], single, 0)

  # Lines 3-6, 9-14: pair embedding, then the logits of all blocks.
  scopes = [_transformer_scope(name, 'encoder')]
  if decoder:
    scopes.append(_transformer_scope(name, 'decoder'))
  own = [pm.below(params, f'{scope}/') for scope in scopes]
  biases, pair = window_pairs.pair_biases(
    params,
    own,
    plan,
    ref.ref_pos,
    single,
    trunk_pair_cond,
    name=name,
    uid_rule=config.uid_rule,
    padded_keys=config.padded_keys,
    chunk=config.window_chunk,
    return_pair=return_pair,
  )
  if config.bfloat16:
    single = single.astype(jnp.bfloat16)
  terms = [None] * len(scopes)
  if cache_terms:
    shared = wt.Conditioning(single, numerics.layer_norm(single))
    terms = [
      tuple(
        wt.adaptive_terms(weights, shared)
        for weights in wt.block_weights(*scoped)
      )
      for scoped in zip(own, scopes, strict=True)
    ]
  conditioning = [
    TransformerConditioning(*x) for x in zip(biases, terms, strict=True)
  ]
  return AtomConditioning(
    plan=plan,
    single=single,
    encoder=conditioning[0],
    decoder=conditioning[1] if decoder else None,
    pair=pair,
  )


def encode(
  params: Params,
  conditioning: AtomConditioning,
  positions: jax.Array | None = None,
  *,
  config: AtomCrossAttConfig | None = None,
  name: str = 'diffusion',
) -> AtomEncoding:
  """Atoms to tokens (Alg. 5, lines 7, 8, 15-17).

  Args:
    params: as in `precompute`.
    conditioning: from `precompute`.
    positions: [n_atom, 3] float, noisy positions, scaled by the caller (AF3:
      x / sqrt(t^2 + 16^2)); None: no noisy positions, as in the trunk.
    config: as in `precompute`.
    name: as in `precompute`.

  Returns:
    Token activations and the skip connection for `decode`.

  Raises:
    ValueError: on a wrong shape.
    TypeError: on a wrong dtype.
  """
  config = config or AtomCrossAttConfig()
  plan, act = conditioning.plan, conditioning.single
  checks.check_shapes(
    {'n_atom': (plan.n_atom, 'the plan')}, positions=(positions, 'n_atom 3')
  )
  checks.check_dtypes('floating', positions=positions)
  keep = plan.atom_mask[:, None]
  if positions is not None:
    pm.module(params, f'{name}_atom_positions_to_features', 'positions')
    positions = jnp.where(keep, positions, 0)
    noisy = functional.linear(
      params, f'{name}_atom_positions_to_features', positions, 'highest'
    )
    act += noisy.astype(act.dtype)
  act = _transform(params, conditioning, act, config, name, 'encoder')
  act = jnp.where(keep, act, 0)
  weights = params[f'{name}_project_atom_features_for_aggr']['weights']
  return AtomEncoding(_token_mean(plan, act, weights), act)


def decode(
  params: Params,
  conditioning: AtomConditioning,
  token_act: jax.Array,
  skip_connection: jax.Array,
  *,
  config: AtomCrossAttConfig | None = None,
  name: str = 'diffusion',
) -> jax.Array:
  """Tokens to position updates of their atoms (Alg. 6).

  Args:
    params: as in `precompute`.
    conditioning: from `precompute`, with a decoder.
    token_act: [n_token, c_token] float.
    skip_connection: [n_atom, c_atom] float, from `encode`.
    config: as in `precompute`.
    name: as in `precompute`.

  Returns:
    [n_atom, 3] float, the update in units of the noise (AF3 scales it); zero
    for padding.

  Raises:
    ValueError: on a wrong shape, or a conditioning without a decoder.
    TypeError: on a wrong dtype.
  """
  config = config or AtomCrossAttConfig()
  plan = conditioning.plan
  if conditioning.decoder is None:
    raise ValueError(
      'conditioning: has no decoder; call precompute with decoder=True'
    )
  leaf = f'{name}_project_token_features_for_broadcast'
  c_token, c_atom = pm.module(params, leaf, 'token_act')['weights'].shape
  checks.check_shapes(
    {
      'n_atom': (plan.n_atom, 'the plan'),
      'n_token': (plan.num_tokens, 'the plan'),
      'c_token': (c_token, f'the parameters {leaf}'),
      'c_atom': (c_atom, f'the parameters {leaf}'),
    },
    token_act=(token_act, 'n_token c_token'),
    skip_connection=(skip_connection, 'n_atom c_atom'),
  )
  checks.check_dtypes(
    'floating', token_act=token_act, skip_connection=skip_connection
  )
  keep = plan.atom_mask[:, None]
  by_token = functional.linear(
    params, f'{name}_project_token_features_for_broadcast', token_act
  )
  by_atom = by_token[plan.token_index].astype(skip_connection.dtype)
  act = jnp.where(keep, by_atom + skip_connection, 0)
  act = _transform(params, conditioning, act, config, name, 'decoder')
  act = numerics.at_least_float32(jnp.where(keep, act, 0))
  act = functional.layer_norm(params, f'{name}_atom_features_layer_norm', act)
  update = functional.linear(
    params, f'{name}_atom_features_to_position_update', act, 'highest'
  )
  return jnp.where(keep, update, 0)


def atom_cross_att_encoder(
  params: Params,
  batch: atom_layout.DenseBatch,
  token_atoms_act: jax.Array | None = None,
  trunk_single_cond: jax.Array | None = None,
  trunk_pair_cond: jax.Array | None = None,
  *,
  config: AtomCrossAttConfig | None = None,
  name: str = 'diffusion',
  return_pair: bool = False,
) -> AtomCrossAttEncoderOutput:
  """Upstream's encoder in one call, on its dense layout (Alg. 5).

  Args:
    params: as in `precompute`.
    batch: upstream's features.
    token_atoms_act: [n_token, n_slot, 3] float, scaled noisy positions, or
      None.
    trunk_single_cond: [n_token, c_s] float, or None.
    trunk_pair_cond: [n_token, n_token, c_z] float, or None.
    config: quirks and execution.
    name: prefix of the parameters.
    return_pair: whether 'lean' returns the pair embedding, too.

  Returns:
    Everything upstream's encoder returns.

  Raises:
    ValueError: on a wrong shape.
    TypeError: on a wrong dtype.
  """
  config = config or AtomCrossAttConfig()
  _check_dense(
    batch,
    token_atoms_act=(token_atoms_act, 'n_token n_slot 3'),
    trunk_single_cond=(trunk_single_cond, 'n_token c_s'),
    trunk_pair_cond=(trunk_pair_cond, 'n_token n_token c_z'),
  )
  plan = batch.plan
  if config.implementation == 'published':
    found = published.encoder(
      params,
      batch,
      token_atoms_act,
      trunk_single_cond,
      trunk_pair_cond,
      name=name,
      uid_rule=config.uid_rule,
      padded_keys=config.padded_keys,
    )
    return AtomCrossAttEncoderOutput(*found, conditioning=None)
  conditioning = precompute(
    params,
    plan,
    jax.tree.map(lambda x: atom_layout.atoms_from_dense(plan, x), batch.ref),
    trunk_single_cond,
    trunk_pair_cond,
    config=config,
    name=name,
    cache_terms=False,
    return_pair=return_pair,
  )
  positions = None
  if token_atoms_act is not None:
    positions = atom_layout.atoms_from_dense(plan, token_atoms_act)
  found = encode(params, conditioning, positions, config=config, name=name)

  def blocks(x: jax.Array) -> jax.Array:
    return window_plan.query_blocks(plan, jnp.asarray(x))

  mask = jnp.asarray(plan.atom_mask)
  return AtomCrossAttEncoderOutput(
    token_act=found.token_act,
    skip_connection=blocks(found.skip_connection),
    queries_mask=blocks(mask),
    queries_single_cond=blocks(conditioning.single),
    keys_mask=window_plan.atom_windows(plan, mask),
    keys_single_cond=window_plan.atom_windows(plan, conditioning.single),
    pair_cond=conditioning.pair,
    conditioning=conditioning,
  )


def atom_cross_att_decoder(
  params: Params,
  batch: atom_layout.DenseBatch,
  token_act: jax.Array,
  encoded: AtomCrossAttEncoderOutput,
  *,
  config: AtomCrossAttConfig | None = None,
  name: str = 'diffusion',
) -> jax.Array:
  """Upstream's decoder in one call, on its dense layout (Alg. 6).

  Args:
    params: as in `precompute`.
    batch: upstream's features.
    token_act: [n_token, c_token] float.
    encoded: from `atom_cross_att_encoder` with the same implementation.
    config: quirks and execution.
    name: prefix of the parameters.

  Returns:
    [n_token, n_slot, 3] position update, zero in empty slots.

  Raises:
    ValueError: on a wrong shape, or `encoded` of the other implementation.
    TypeError: on a wrong dtype.
  """
  config = config or AtomCrossAttConfig()
  _check_dense(batch, token_act=(token_act, 'n_token c_token'))
  if config.implementation == 'published':
    if encoded.pair_cond is None or encoded.conditioning is not None:
      raise ValueError(
        "encoded: is of the 'lean' encoder; use the same implementation"
      )
    return published.decoder(
      params,
      batch,
      token_act,
      published.Encoding(
        *(getattr(encoded, x) for x in published.Encoding._fields)
      ),
      name=name,
      padded_keys=config.padded_keys,
    )
  if encoded.conditioning is None:
    raise ValueError(
      "encoded: is of the 'published' encoder; use the same implementation"
    )
  plan = batch.plan
  skip = encoded.skip_connection
  update = decode(
    params,
    encoded.conditioning,
    token_act,
    skip.reshape(plan.n_atom, -1),
    config=config,
    name=name,
  )
  return atom_layout.atoms_to_dense(plan, update)


class AtomCrossAttHead(hk.Module):
  """`precompute`, `encode` and `decode` as a Haiku module.

  Its parameters have upstream's names below the name of the module: a module
  'diffusion_head' with the prefix 'diffusion' has those of AF3 below
  `diffuser/~/`.

  Args of the constructor:
    config: sizes, quirks and execution.
    prefix: of the parameters: 'diffusion' or 'evoformer_conditioning'.
    name: name of the module.
  """

  def __init__(
    self,
    config: AtomCrossAttConfig | None = None,
    *,
    prefix: str = 'diffusion',
    name: str = 'diffusion_head',
  ):
    super().__init__(name=name)
    self.config = config or AtomCrossAttConfig()
    self.prefix = prefix

  def __call__(
    self,
    plan: window_plan.WindowPlan,
    ref: window_plan.RefStructure,
    positions: jax.Array | None = None,
    trunk_single_cond: jax.Array | None = None,
    trunk_pair_cond: jax.Array | None = None,
    token_act: jax.Array | None = None,
  ) -> AtomCrossAttHeadOutput:
    """Encodes atoms and, given token activations, decodes them.

    Args:
      plan: the atoms and their windows.
      ref: reference conformer of the plan's atoms.
      positions: [n_atom, 3] float, scaled noisy positions, or None.
      trunk_single_cond: [n_token, c_s] float, or None.
      trunk_pair_cond: [n_token, n_token, c_z] float, or None.
      token_act: [n_token, c_token] float, for the decoder; None: no decoder.

    Returns:
      Encoding, position update and the conditioning that both used.
    """
    return _head(
      self.config,
      self.prefix,
      plan,
      ref,
      positions,
      trunk_single_cond,
      trunk_pair_cond,
      token_act,
    )


def transform_atom_cross_att(
  config: AtomCrossAttConfig | None = None, *, prefix: str = 'diffusion'
) -> hk.Transformed:
  """Pure functions of AF3's atom encoder and decoder.

    >>> import numpy as np
    >>> plan = window_plan.build_window_plan([0, 0, 1], [0, 1])
    >>> zeros = lambda *shape: window_plan.pad_atoms(
    ...   plan, np.zeros((3, *shape))
    ... )
    >>> ref = window_plan.RefStructure(
    ...   ref_pos=zeros(3).astype(np.float32),
    ...   ref_mask=np.asarray(plan.atom_mask),
    ...   ref_element=zeros().astype(np.int32),
    ...   ref_charge=zeros().astype(np.float32),
    ...   ref_atom_name_chars=zeros(4).astype(np.int32),
    ... )
    >>> init, apply = transform_atom_cross_att(prefix='evoformer_conditioning')
    >>> params = init(jax.random.key(0), plan, ref)
    >>> apply(params, plan, ref).token_act.shape
    (2, 768)

  The parameters are also those of `precompute`, `encode` and `decode`, which
  serve many diffusion steps and samples with one conditioning:

    conditioning = precompute(params, plan, ref, single, pair)
    per_sample = jax.vmap(lambda x: encode(params, conditioning, x))

  Under `jax.vmap` of `apply` itself the conditioning is computed once, too, but
  returned once per sample: take `token_act` and `update` of the result inside.

  Args:
    config: sizes; None takes AF3's diffusion head.
    prefix: of the parameters: 'diffusion' or 'evoformer_conditioning'.

  Returns:
    `init(key, plan, ref, positions=None, trunk_single_cond=None,
    trunk_pair_cond=None, token_act=None)` and `apply(params, ...)` with the
    same arguments, which returns an `AtomCrossAttHeadOutput`; see
    `AtomCrossAttHead`.
  """

  def forward(*arguments, **named):
    return _head(config or AtomCrossAttConfig(), prefix, *arguments, **named)

  return hk.without_apply_rng(hk.transform(forward))


def atom_cross_att_parameters(
  config: AtomCrossAttConfig,
  name: str = 'diffusion',
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
    name: prefix.
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
    'embed_ref_element': pm.linear(published.NUM_ELEMENTS, c_atom),
    'embed_ref_charge': pm.linear(1, c_atom),
    'embed_ref_atom_name': pm.linear(4 * published.NUM_CHARS, c_atom),
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
  table = {f'{name}_{leaf}': arrays for leaf, arrays in table.items()}
  for part, own in transformers.items():
    scope = _transformer_scope(name, part)
    blocks = dt.cross_att_transformer_parameters(
      own, c_atom, c_atom, c_pair, name=scope
    )
    table |= {f'{scope}/{leaf}': arrays for leaf, arrays in blocks.items()}
  return table


def _head(
  config: AtomCrossAttConfig,
  prefix: str,
  plan: window_plan.WindowPlan,
  ref: window_plan.RefStructure,
  positions: jax.Array | None = None,
  trunk_single_cond: jax.Array | None = None,
  trunk_pair_cond: jax.Array | None = None,
  token_act: jax.Array | None = None,
) -> AtomCrossAttHeadOutput:
  """`AtomCrossAttHead` with parameters in the current Haiku module."""

  def channels(x: jax.Array | None) -> int | None:
    return None if x is None else x.shape[-1]

  table = atom_cross_att_parameters(
    config,
    prefix,
    positions=positions is not None,
    single_channels=channels(trunk_single_cond),
    pair_channels=channels(trunk_pair_cond),
    decoder=token_act is not None,
  )
  params = pm.haiku_parameters(table, hm.parameter_dtype(ref.ref_pos))
  conditioning = precompute(
    params,
    plan,
    ref,
    trunk_single_cond,
    trunk_pair_cond,
    config=config,
    name=prefix,
    cache_terms=False,
  )
  encoding = encode(params, conditioning, positions, config=config, name=prefix)
  update = None
  if token_act is not None:
    update = decode(
      params,
      conditioning,
      token_act,
      encoding.skip_connection,
      config=config,
      name=prefix,
    )
  return AtomCrossAttHeadOutput(
    encoding.token_act, encoding.skip_connection, update, conditioning
  )


def _check_dense(
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


def _check_precompute(
  plan: window_plan.WindowPlan,
  ref: window_plan.RefStructure,
  trunk_single_cond: jax.Array | None,
  trunk_pair_cond: jax.Array | None,
) -> None:
  checks.check_shapes(
    {
      'n_atom': (plan.n_atom, 'the plan'),
      'n_token': (plan.num_tokens, 'the plan'),
    },
    ref_pos=(ref.ref_pos, 'n_atom 3'),
    ref_mask=(ref.ref_mask, 'n_atom'),
    ref_element=(ref.ref_element, 'n_atom'),
    ref_charge=(ref.ref_charge, 'n_atom'),
    ref_atom_name_chars=(ref.ref_atom_name_chars, 'n_atom 4'),
    trunk_single_cond=(trunk_single_cond, 'n_token c_s'),
    trunk_pair_cond=(trunk_pair_cond, 'n_token n_token c_z'),
  )
  checks.check_dtypes(
    'floating',
    ref_pos=ref.ref_pos,
    ref_charge=ref.ref_charge,
    trunk_single_cond=trunk_single_cond,
    trunk_pair_cond=trunk_pair_cond,
  )
  checks.check_dtypes('bool', ref_mask=ref.ref_mask)
  checks.check_dtypes(
    'integer',
    ref_element=ref.ref_element,
    ref_atom_name_chars=ref.ref_atom_name_chars,
  )
  if trunk_pair_cond is not None and not plan.has_pairs:
    raise ValueError(
      'trunk_pair_cond: the plan has no token pairs; build it with '
      'token_pairs=True'
    )


def _atom_features(
  params: Params,
  plan: window_plan.WindowPlan,
  ref: window_plan.RefStructure,
  name: str,
  chunk: int | None,
) -> jax.Array:
  """Line 1: [n_atom, c_atom], zero for atoms that the conformer lacks."""
  leaves = ('pos', 'mask', 'element', 'charge', 'atom_name')
  dtype = jnp.asarray(ref.ref_pos).dtype
  weights = {
    leaf: params[f'{name}_embed_ref_{leaf}']['weights'].astype(dtype)
    for leaf in leaves
  }
  floats = (ref.ref_pos, ref.ref_charge)
  constants = (ref.ref_mask, ref.ref_element, ref.ref_atom_name_chars)
  floats, constants = jax.tree.map(
    lambda x: window_plan.query_blocks(plan, jnp.asarray(x)),
    (floats, constants),
  )
  found = mapping.chunked_map(
    _embed_atoms,
    functional.chunk_size(
      plan.n_window, chunk, on_cpu=windowed_attention.CPU_WINDOWS
    ),
    None,
    weights,
    None,
    None,
    floats,
    constants,
  )
  return found.reshape(plan.n_atom, -1)


def _embed_atoms(
  weights: dict[str, jax.Array], taken: None, floats: Any, constants: Any
) -> jax.Array:
  """Features of the atoms of some windows.

  The products with one-hot vectors are lookups; an index outside of the table
  finds zeros.
  """
  del taken
  position, charge = floats
  mask, element, chars = constants
  # What is masked may hold anything.
  position = jnp.where(mask[..., None], position, 0)
  charge = jnp.where(mask, charge, 0)

  def lookup(table: jax.Array, index: jax.Array) -> jax.Array:
    # Negative ones would count from the end.
    index = jnp.where(index < 0, table.shape[0], index)
    return jnp.asarray(table).at[index].get(mode='fill', fill_value=0)

  act = jnp.dot(position, weights['pos'], precision='highest')
  act += weights['mask'] + jnp.arcsinh(charge)[..., None] * weights['charge']
  act += lookup(weights['element'], element)
  n_char = chars.shape[-1]
  names = weights['atom_name'].reshape(n_char, -1, act.shape[-1])
  for i in range(n_char):
    act += lookup(names[i], chars[..., i])
  return jnp.where(mask[..., None], act, 0)


def _token_mean(
  plan: window_plan.WindowPlan, act: jax.Array, weights: jax.Array
) -> jax.Array:
  """Line 17: mean of relu(act @ weights) over the atoms of each token.

  Some columns at a time: the projected atoms are several times larger than the
  activations of atoms or tokens.
  """
  channels, c_token = weights.shape
  width = functional.largest_divisor(c_token, channels)
  columns = weights.astype(act.dtype).reshape(channels, -1, width)

  @jax.checkpoint
  def mean(own: jax.Array) -> jax.Array:
    return segment.segment_mean(
      jax.nn.relu(act @ own),
      plan.token_index,
      plan.num_tokens,
      mask=plan.atom_mask,
    )

  found = jax.lax.map(mean, jnp.swapaxes(columns, 0, 1))
  return jnp.swapaxes(found, 0, 1).reshape(plan.num_tokens, c_token)


def _transform(
  params: Params,
  conditioning: AtomConditioning,
  act: jax.Array,
  config: AtomCrossAttConfig,
  name: str,
  part: Literal['encoder', 'decoder'],
) -> jax.Array:
  """The atom transformer of the encoder or decoder."""
  scope = _transformer_scope(name, part)
  own: Any = getattr(conditioning, part)
  plan = conditioning.plan
  return wt.window_transformer(
    wt.block_weights(pm.below(params, f'{scope}/'), scope),
    act,
    own.biases,
    plan.key_start,
    plan.atom_mask,
    conditioning.single,
    own.terms,
    chunk=config.window_chunk,
    remat=config.remat,
  )


def _transformer_scope(name: str, part: str) -> str:
  return f'{name}_atom_transformer_{part}'
