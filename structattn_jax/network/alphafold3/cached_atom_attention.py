"""AF3's atom encoder and decoder with the work done once that can be.

Abramson et al. (2024) Suppl. Algs. 5 (encoder), 6 (decoder), 7 (transformer):
the numbers of `atom_cross_attention`, which is the published form, on flat
atoms instead of slots of tokens. Line 7 of Alg. 5 splits it: `precompute` does
what depends on the conformers and the trunk alone, once for all diffusion steps
and samples; `encode` and `decode` do the rest. Of the pair p_lm only the logits
that the transformers' blocks make of it are kept (`window_pairs`), of the
conditioning c_l the adaptive terms (`window_transformer`).

Shapes and units: see `window_plan`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from structattn_jax.common import checks, numerics
from structattn_jax.components import functional
from structattn_jax.components import haiku_modules as hm
from structattn_jax.components import parameters as pm
from structattn_jax.components.parameters import Params
from structattn_jax.network.alphafold3 import atom_cross_attention as published
from structattn_jax.network.alphafold3 import (
  atom_embedding,
  window_pairs,
  window_plan,
)
from structattn_jax.network.alphafold3 import window_transformer as wt
from structattn_jax.network.alphafold3.atom_cross_attention import (
  AtomCrossAttConfig,
)


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
  """

  token_act: jax.Array
  skip_connection: jax.Array
  position_update: jax.Array | None


class CachedAtomCrossAtt(NamedTuple):
  """Functions of one config and prefix; arguments as those of this module.

  Attributes:
    init: `init(key, *, positions=True, single_channels=384, pair_channels=128,
      decoder=True)` -> parameters; see `atom_cross_att_parameters`.
    precompute: `precompute(params, plan, ref, trunk_single_cond=None,
      trunk_pair_cond=None, *, decoder=None, cache_terms=True,
      return_pair=False)` -> `AtomConditioning`.
    encode: `encode(params, conditioning, positions=None)` -> `AtomEncoding`.
    decode: `decode(params, conditioning, token_act, skip_connection)` ->
      [n_atom, 3].
  """

  init: Callable[..., Any]
  precompute: Callable[..., AtomConditioning]
  encode: Callable[..., AtomEncoding]
  decode: Callable[..., jax.Array]


def cached_atom_cross_att(
  config: AtomCrossAttConfig | None = None, *, prefix: str = 'diffusion'
) -> CachedAtomCrossAtt:
  """Pure functions that share one conditioning over steps and samples.

    init, precompute, encode, decode = cached_atom_cross_att(config)
    conditioning = precompute(params, plan, ref, single, pair)
    per_sample = jax.vmap(lambda x: encode(params, conditioning, x))

  Args:
    config: sizes, quirks and execution; None takes AF3's diffusion head.
    prefix: of the parameters: 'diffusion' or 'evoformer_conditioning'.

  Returns:
    The functions, all of this config.
  """
  config = config or AtomCrossAttConfig()
  _check_implementation(config)

  def init(key: jax.Array, **options: Any) -> Any:
    table = published.atom_cross_att_parameters(config, prefix, **options)
    return pm.init_parameters(table, key)

  own: Any = {'config': config, 'prefix': prefix}
  return CachedAtomCrossAtt(
    init,
    pm.with_cast_parameters(functools.partial(precompute, **own)),
    pm.with_cast_parameters(functools.partial(encode, **own)),
    pm.with_cast_parameters(functools.partial(decode, **own)),
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

  Under `jax.vmap` over positions and token activations what is the same for all
  samples is computed once. For many steps: `cached_atom_cross_att`, which takes
  the same parameters.

  Args:
    config: sizes; None takes AF3's diffusion head.
    prefix: of the parameters: 'diffusion' or 'evoformer_conditioning'.

  Returns:
    `init(key, plan, ref, positions=None, trunk_single_cond=None,
    trunk_pair_cond=None, token_act=None)` and `apply(params, ...)` with the
    same arguments, which returns an `AtomCrossAttHeadOutput`; see
    `atom_cross_att`.
  """
  config = config or AtomCrossAttConfig()
  _check_implementation(config)
  forward = functools.partial(atom_cross_att, config, prefix)
  return pm.transform(forward)


def precompute(
  params: Params,
  plan: window_plan.WindowPlan,
  ref: window_plan.RefStructure,
  trunk_single_cond: jax.Array | None = None,
  trunk_pair_cond: jax.Array | None = None,
  *,
  config: AtomCrossAttConfig,
  prefix: str = 'diffusion',
  decoder: bool | None = None,
  cache_terms: bool = True,
  return_pair: bool = False,
) -> AtomConditioning:
  """All that does not depend on noisy positions (Alg. 5, lines 1-10, 13, 14).

  Args:
    params: parameters with upstream's names, such as
      `diffusion_embed_ref_pos`; see `atom_cross_att_parameters`.
    plan: the atoms and their windows.
    ref: reference conformer of the plan's atoms.
    trunk_single_cond: [n_token, c_s] float, or None.
    trunk_pair_cond: [n_token, n_token, c_z] float, query first, or None.
    config: quirks and execution; sizes are read off the parameters.
    prefix: of the parameters: 'diffusion' or 'evoformer_conditioning'.
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
  _check_precompute(plan, ref, trunk_single_cond, trunk_pair_cond)
  pm.module(params, f'{prefix}_embed_ref_pos')
  for argument, given, spec in (
    ('trunk_single_cond', trunk_single_cond, 'n_token c'),
    ('trunk_pair_cond', trunk_pair_cond, 'n_token n_token c'),
  ):
    if given is not None:
      module = f'{prefix}_lnorm_{argument}'
      size = pm.module(params, module, argument)['scale'].shape[0]
      sizes = {'c': (size, f'the parameters {module}')}
      checks.check_shapes(sizes, **{argument: (given, spec)})
  has_decoder = any(
    f'{prefix}_atom_transformer_decoder/' in key for key in params
  )
  if decoder is None:
    decoder = has_decoder
  elif decoder and not has_decoder:
    raise ValueError(
      f'decoder: expected False, as the parameters have none named {prefix!r}'
    )
  # Line 1: atoms of the conformer. Line 9: the trunk's single representation.
  single = atom_embedding.embed_atoms(
    params, plan, ref, prefix, config.window_chunk
  )
  if trunk_single_cond is not None:
    normalised = functional.layer_norm(
      params, f'{prefix}_lnorm_trunk_single_cond', trunk_single_cond
    )
    by_token = functional.linear(
      params, f'{prefix}_embed_trunk_single_cond', normalised, 'highest'
    )
    single += by_token[plan.token_index]
  single = jnp.where(plan.atom_mask[:, None], single, 0)

  # Lines 2-6, 10, 13, 14: the pair embedding, then the logits of all blocks.
  scopes = [published.transformer_scope(prefix, 'encoder')]
  if decoder:
    scopes.append(published.transformer_scope(prefix, 'decoder'))
  own = [pm.below(params, f'{scope}/') for scope in scopes]
  biases, pair = window_pairs.pair_biases(
    params,
    own,
    plan,
    ref.ref_pos,
    single,
    trunk_pair_cond,
    prefix=prefix,
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
  config: AtomCrossAttConfig,
  prefix: str = 'diffusion',
) -> AtomEncoding:
  """Atoms to tokens (Alg. 5, lines 11 and 15-17).

  Args:
    params: as in `precompute`.
    conditioning: from `precompute`.
    positions: [n_atom, 3] float, noisy positions, scaled by the caller (AF3:
      x / sqrt(t^2 + 16^2)); None: no noisy positions, as in the trunk.
    config: as in `precompute`.
    prefix: as in `precompute`.

  Returns:
    Token activations and the skip connection for `decode`.

  Raises:
    ValueError: on a wrong shape.
    TypeError: on a wrong dtype.
  """
  plan, act = conditioning.plan, conditioning.single
  checks.check_shapes(
    {'n_atom': (plan.n_atom, 'the plan')}, positions=(positions, 'n_atom 3')
  )
  checks.check_dtypes('floating', positions=positions)
  keep = plan.atom_mask[:, None]
  # Line 7 is q_l = c_l. Line 11: noisy positions.
  if positions is not None:
    pm.module(params, f'{prefix}_atom_positions_to_features', 'positions')
    positions = jnp.where(keep, positions, 0)
    noisy = functional.linear(
      params, f'{prefix}_atom_positions_to_features', positions, 'highest'
    )
    act += noisy.astype(act.dtype)
  # Line 15.
  act = _transform(params, conditioning, act, config, prefix, 'encoder')
  act = jnp.where(keep, act, 0)
  # Lines 16 and 17.
  weights = params[f'{prefix}_project_atom_features_for_aggr']['weights']
  return AtomEncoding(atom_embedding.token_mean(plan, act, weights), act)


def decode(
  params: Params,
  conditioning: AtomConditioning,
  token_act: jax.Array,
  skip_connection: jax.Array,
  *,
  config: AtomCrossAttConfig,
  prefix: str = 'diffusion',
) -> jax.Array:
  """Tokens to position updates of their atoms (Alg. 6).

  Args:
    params: as in `precompute`.
    conditioning: from `precompute`, with a decoder.
    token_act: [n_token, c_token] float.
    skip_connection: [n_atom, c_atom] float, from `encode`.
    config: as in `precompute`.
    prefix: as in `precompute`.

  Returns:
    [n_atom, 3] float, the update in units of the noise (AF3 scales it); zero
    for padding.

  Raises:
    ValueError: on a wrong shape, or a conditioning without a decoder.
    TypeError: on a wrong dtype.
  """
  plan = conditioning.plan
  if conditioning.decoder is None:
    raise ValueError(
      'conditioning: has no decoder; call precompute with decoder=True'
    )
  leaf = f'{prefix}_project_token_features_for_broadcast'
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
  # Line 1 of Alg. 6: broadcast to the atoms, added to the skip connection.
  by_token = functional.linear(
    params, f'{prefix}_project_token_features_for_broadcast', token_act
  )
  by_atom = by_token[plan.token_index].astype(skip_connection.dtype)
  act = jnp.where(keep, by_atom + skip_connection, 0)
  # Line 2.
  act = _transform(params, conditioning, act, config, prefix, 'decoder')
  # Line 3.
  act = numerics.at_least_float32(jnp.where(keep, act, 0))
  act = functional.layer_norm(params, f'{prefix}_atom_features_layer_norm', act)
  update = functional.linear(
    params, f'{prefix}_atom_features_to_position_update', act, 'highest'
  )
  return jnp.where(keep, update, 0)


class AtomCrossAttHead(hk.Module):
  """`atom_cross_att` as a Haiku module.

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

  def __call__(self, *arguments: Any, **named: Any) -> AtomCrossAttHeadOutput:
    """Encodes atoms and, given token activations, decodes them.

    Arguments, from `plan` on, and result are those of `atom_cross_att`.
    """
    return atom_cross_att(self.config, self.prefix, *arguments, **named)


def atom_cross_att(
  config: AtomCrossAttConfig,
  prefix: str,
  plan: window_plan.WindowPlan,
  ref: window_plan.RefStructure,
  positions: jax.Array | None = None,
  trunk_single_cond: jax.Array | None = None,
  trunk_pair_cond: jax.Array | None = None,
  token_act: jax.Array | None = None,
) -> AtomCrossAttHeadOutput:
  """Encoder and decoder, with parameters in the current Haiku module.

  A Haiku function: call it inside `hk.transform`, or use
  `transform_atom_cross_att`.

  Args:
    config: sizes, quirks and execution.
    prefix: of the parameters.
    plan: the atoms and their windows.
    ref: reference conformer of the plan's atoms.
    positions: [n_atom, 3] float, scaled noisy positions, or None.
    trunk_single_cond: [n_token, c_s] float, or None.
    trunk_pair_cond: [n_token, n_token, c_z] float, or None.
    token_act: [n_token, c_token] float, for the decoder; None: no decoder.

  Returns:
    Encoding and position update.
  """
  _check_implementation(config)

  def channels(x: jax.Array | None) -> int | None:
    return None if x is None else x.shape[-1]

  table = published.atom_cross_att_parameters(
    config,
    prefix,
    positions=positions is not None,
    single_channels=channels(trunk_single_cond),
    pair_channels=channels(trunk_pair_cond),
    decoder=token_act is not None,
  )
  params = pm.haiku_parameters(table, hm.parameter_dtype(ref.ref_pos))
  own: Any = {'config': config, 'prefix': prefix}
  conditioning = precompute(
    params,
    plan,
    ref,
    trunk_single_cond,
    trunk_pair_cond,
    cache_terms=False,
    **own,
  )
  encoding = encode(params, conditioning, positions, **own)
  skip, update = encoding.skip_connection, None
  if token_act is not None:
    update = decode(params, conditioning, token_act, skip, **own)
  return AtomCrossAttHeadOutput(encoding.token_act, skip, update)


def _check_implementation(config: AtomCrossAttConfig) -> None:
  if config.implementation == 'published':
    raise ValueError(
      "implementation: expected None or 'blocked' for flat atoms, got "
      "'published', which dense_atom_cross_att offers on upstream's layouts"
    )


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


def _transform(
  params: Params,
  conditioning: AtomConditioning,
  act: jax.Array,
  config: AtomCrossAttConfig,
  prefix: str,
  part: Literal['encoder', 'decoder'],
) -> jax.Array:
  """The atom transformer of the encoder or decoder."""
  scope = published.transformer_scope(prefix, part)
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
