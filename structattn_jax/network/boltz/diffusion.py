"""Boltz's diffusion module, versions 1 and 2: noisy positions to denoised ones.

Abramson et al. (2024) Suppl. Algs. 20 (diffusion module) and 21 (conditioning).
Mirrors `DiffusionModule` and the preconditioning of boltz
`model/modules/diffusion.py` (version 1) and `diffusionv2.py` (version 2)
@ 832486d, with `diffusion_conditioning.py`.

`diffusion_outputs` is the published form, one sample and one noise level at a
time. `cached_diffusion` gives the same from the same parameters in three
parts:

  once per complex     conditioned pair, pair biases of all layers, adaptive
                       terms of the atom transformers, embedded single
  once per noise level conditioned single, adaptive terms of the token
                       transformer, the same for all samples
  once per sample      atoms and tokens

  context  = precompute(params, features, token_mask, single_inputs, single,
                        pair, relative_position)
  denoised = denoise(params, context, positions, sigma)

Parameters: those of `atom_attention` and `single_conditioner/...`,
`s_to_a_linear_0`, `s_to_a_linear_1`, `token_transformer/layers_<i>/...`,
`a_norm`, and in Boltz-1 `pairwise_conditioner/...`, which Boltz-2 has below
`diffusion_conditioning`.

Shapes: n_atom atoms, a multiple of n_query; n_token tokens; n_sample samples;
token_s, token_z channels of the trunk; inside, tokens have 2 token_s.
Units: positions and sigma in angstrom.

Differs from the released code: a token attends to nothing where all tokens are
masked.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from structattn_jax.common import checks, numerics
from structattn_jax.components import functional
from structattn_jax.components import haiku_modules as hm
from structattn_jax.components import parameters as pm
from structattn_jax.components import preconditioning as pc
from structattn_jax.components.parameters import Params
from structattn_jax.network.boltz import atom_attention, conditioning, modules
from structattn_jax.network.boltz import features as bf
from structattn_jax.network.boltz import parameters as bp
from structattn_jax.network.boltz import transformers as bt
from structattn_jax.network.boltz.features import BoltzAtomFeatures

# Not trained: frequencies and phases that were drawn once.
_FIXED_MODULES = ('fourier_embed/proj',)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boltz1DiffusionConfig(bf.Boltz1AtomAttentionConfig):
  """Diffusion module of Boltz-1; names are those of upstream's configuration.

  Attributes:
    token_s_inputs: channels of the input embedder's single.
    token_transformer_depth: layers of the token transformer.
    token_transformer_heads: heads of the token transformer.
    conditioning_transition_layers: transitions of either conditioning.
    dim_fourier: features of the noise level.
    sigma_data: standard deviation of the data in angstrom.
  """

  token_s_inputs: int = 455
  token_transformer_depth: int = 24
  token_transformer_heads: int = 16
  conditioning_transition_layers: int = 2
  dim_fourier: int = 256
  sigma_data: float = 16.0

  def __post_init__(self) -> None:
    super().__post_init__()
    _check_config(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boltz2DiffusionConfig(bf.Boltz2AtomAttentionConfig):
  """As `Boltz1DiffusionConfig`, for Boltz-2.

  Attributes:
    token_s_inputs: channels of the input embedder's single.
    dim_fourier: features of the noise level.
    sigma_data: standard deviation of the data in angstrom.
  """

  token_s_inputs: int = 384
  dim_fourier: int = 256
  sigma_data: float = 16.0

  def __post_init__(self) -> None:
    super().__post_init__()
    _check_config(self)


DiffusionConfig = Boltz1DiffusionConfig | Boltz2DiffusionConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BoltzDiffusionOutput:
  """Result of the diffusion module.

  Attributes:
    denoised: [n_atom, 3] float32, angstrom; that of padding atoms means
      nothing.
    token_act: [n_token, 2 token_s], what the decoder takes; Boltz-1's
      confidence module reads it as `token_a`.
  """

  denoised: jax.Array
  token_act: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BoltzDiffusionContext:
  """Everything that neither the noise level nor the positions change.

  Attributes:
    atoms: of the atom encoder and decoder.
    single: [n_token, 2 token_s], embedded, before the noise level comes in.
    token_biases: of each layer, [1, n_head, n_token, n_token], masked: as
      released 1.6 GB for 1,024 tokens, as much as upstream's cache.
    token_mask: [n_token] bool.
  """

  atoms: atom_attention.BoltzAtomContext
  single: jax.Array
  token_biases: tuple[jax.Array, ...]
  token_mask: jax.Array


class CachedDiffusion(NamedTuple):
  """Pure functions of the diffusion module.

  Attributes:
    init: `init(key)` makes all parameters.
    precompute: `precompute(params, features, token_mask, single_inputs, single,
      pair, relative_position)`.
    denoise: `denoise(params, context, positions, sigma)`.
  """

  init: Callable[[jax.Array], hk.Params]
  precompute: Callable[..., BoltzDiffusionContext]
  denoise: Callable[..., jax.Array]


# The published form.


def transform_diffusion(config: DiffusionConfig) -> hk.Transformed:
  """`diffusion_outputs` as pure functions.

    >>> config = Boltz1DiffusionConfig(
    ...   token_transformer_depth=1, atom_encoder_depth=1, atom_decoder_depth=1
    ... )
    >>> init, apply = transform_diffusion(config)

  Args:
    config: of either version.

  Returns:
    `init(key, ...)` and `apply(params, ...)` with the arguments of
    `diffusion_outputs` after its configuration, by name or in its order.
  """

  def run(*arguments: Any, **named: Any) -> BoltzDiffusionOutput:
    return diffusion_outputs(config, *arguments, **named)

  return pm.transform(run)


def diffusion_outputs(
  config: DiffusionConfig,
  features: BoltzAtomFeatures,
  token_mask: jax.Array,
  single_inputs: jax.Array,
  single: jax.Array,
  pair: jax.Array,
  relative_position: jax.Array,
  positions: jax.Array,
  sigma: jax.Array,
) -> BoltzDiffusionOutput:
  """Denoises one sample, Alg. 20; inside of a Haiku transform.

  Args:
    config: of either version.
    features: of the complex.
    token_mask: [n_token] bool, True for real tokens.
    single_inputs: [n_token, token_s_inputs] float, of the input embedder.
    single: [n_token, token_s] float, of the trunk.
    pair: [n_token, n_token, token_z] float, of the trunk.
    relative_position: [n_token, n_token, token_z] float, of the trunk's
      `rel_pos` (see `RelativePositionEncoder`).
    positions: [n_atom, 3] float, noisy, in angstrom.
    sigma: [] float, their noise level in angstrom.

  Returns:
    The denoised positions and the tokens behind them.

  Raises:
    ValueError: on a wrong shape or a number of atoms that is not a multiple of
      n_query.
    TypeError: on a wrong dtype.
  """
  _check_embeddings(
    config, features, token_mask, single_inputs, single, pair, relative_position
  )
  _check_noisy(features.atom_mask, positions[None], sigma)
  features = bf.without_padding(features)
  positions = numerics.at_least_float32(positions)
  factors = pc.preconditioning(sigma, config.sigma_data)
  # Lines 1 and 2.
  conditioner = conditioning.SingleConditioning(
    dim_fourier=config.dim_fourier,
    num_transitions=config.conditioning_transition_layers,
  )
  s, _ = conditioner(single, single_inputs, factors.c_noise)
  scaled = factors.c_in * positions
  # Line 3, and what line 5 takes.
  decoder: Callable[[jax.Array], jax.Array]
  bias: Sequence[jax.Array] = ()
  z: jax.Array | None = None
  if isinstance(config, Boltz2DiffusionConfig):
    given = modules.Boltz2DiffusionConditioning(config)(
      features, single, pair, relative_position
    )
    encoded = modules.Boltz2AtomAttentionEncoder(config)(
      features, given.embedding, given.encoder_bias, scaled
    )
    bias = jnp.split(given.token_bias, config.token_transformer_depth, -1)

    def decoder(a: jax.Array) -> jax.Array:
      return modules.Boltz2AtomAttentionDecoder(config)(
        a, encoded.atoms, given.embedding, given.decoder_bias, features
      )

  else:
    z = conditioning.PairwiseConditioning(
      num_transitions=config.conditioning_transition_layers
    )(pair, relative_position)
    encoded, embedding = modules.Boltz1AtomAttentionEncoder(config)(
      features, single, z, scaled
    )

    def decoder(a: jax.Array) -> jax.Array:
      return modules.Boltz1AtomAttentionDecoder(config)(
        a, encoded.atoms, embedding, features
      )

  own = pm.haiku_parameters(_token_parameters(config), hm.parameter_dtype(s))
  if z is not None:
    bias = [
      bt.pair_bias(own, f'token_transformer/{layer}/pair_bias_attn/proj_z', z)
      for layer in _layers(config)
    ]
  # Line 4.
  a = encoded.tokens + _tokens_from_single(own, s)
  # Line 5.
  a = bt.diffusion_transformer(
    pm.below(own, 'token_transformer/'),
    a,
    s,
    [bt.masked_bias(jnp.moveaxis(x, -1, 0)[None], token_mask) for x in bias],
    token_mask,
  )
  # Lines 6 to 8.
  a = functional.layer_norm(own, 'a_norm', a)
  denoised = factors.c_skip * positions + factors.c_out * decoder(a)
  return BoltzDiffusionOutput(denoised, a)


# The same, each part as often as it changes.


def cached_diffusion(config: DiffusionConfig) -> CachedDiffusion:
  """The diffusion module for many noise levels and samples of one complex.

    >>> config = Boltz2DiffusionConfig(
    ...   token_transformer_depth=1, atom_encoder_depth=1, atom_decoder_depth=1
    ... )
    >>> init, precompute, denoise = cached_diffusion(config)

  `precompute` takes the arguments of `diffusion_outputs` up to
  relative_position and returns a `BoltzDiffusionContext`. `denoise` takes

    positions: [n_sample, n_atom, 3] float, noisy, in angstrom,
    sigma: [] float, the noise level of all of them, as a sampler has it, or
      [n_sample], that of each, as training has it,

  and returns [n_sample, n_atom, 3], at least float32. All of it is
  differentiable in reverse mode, embeddings included.

  Args:
    config: of either version.

  Returns:
    The functions. They raise ValueError on a wrong shape or a number of atoms
    that is not a multiple of n_query, TypeError on a wrong dtype.
  """
  atoms = atom_attention.cached_atom_attention(config)

  def init(key: jax.Array) -> hk.Params:
    return pm.init_parameters(diffusion_parameters(config), key)

  def precompute(
    params: Params,
    features: BoltzAtomFeatures,
    token_mask: jax.Array,
    single_inputs: jax.Array,
    single: jax.Array,
    pair: jax.Array,
    relative_position: jax.Array,
  ) -> BoltzDiffusionContext:
    embeddings = (single_inputs, single, pair, relative_position)
    _check_embeddings(config, features, token_mask, *embeddings)
    z = conditioning.pairwise_conditioning(
      pm.below(params, f'{_pair_scope(config)}pairwise_conditioner/'),
      pair,
      relative_position,
    )
    own = pm.below(params, 'single_conditioner/')
    return BoltzDiffusionContext(
      atoms.precompute(params, features, single, z),
      conditioning.embed_single(own, single, single_inputs),
      _token_biases(config, params, z, token_mask),
      jnp.asarray(token_mask),
    )

  def denoise(
    params: Params,
    context: BoltzDiffusionContext,
    positions: jax.Array,
    sigma: jax.Array,
  ) -> jax.Array:
    _check_noisy(context.atoms.atom_mask, positions, sigma)
    if jnp.ndim(sigma):
      one = jax.vmap(lambda x, t: denoise(params, context, x[None], t)[0])
      return one(positions, sigma)
    positions = numerics.at_least_float32(positions)
    factors = pc.preconditioning(sigma, config.sigma_data)
    encoded = _map_samples(
      lambda x: atoms.encode(params, context.atoms, x),
      factors.c_in * positions,
    )
    a = encoded.tokens
    own = pm.below(params, 'single_conditioner/')
    s, _ = conditioning.condition_single(own, context.single, factors.c_noise)
    s = s.astype(a.dtype)
    a = a + _tokens_from_single(params, s)
    # Not over s: what depends on it alone is computed once.
    a = jax.vmap(
      lambda a: bt.diffusion_transformer(
        pm.below(params, 'token_transformer/'),
        a,
        s,
        context.token_biases,
        context.token_mask,
      )
    )(a)
    a = functional.layer_norm(params, 'a_norm', a)
    update = _map_samples(
      lambda x: atoms.decode(params, context.atoms, *x), (a, encoded.atoms)
    )
    return factors.c_skip * positions + factors.c_out * update

  return CachedDiffusion(
    init, *map(pm.with_cast_parameters, (precompute, denoise))
  )


def _map_samples(fn: Callable[[Any], Any], arrays: Any) -> Any:
  """Over samples: at once, or on CPU, where cache counts, one by one."""
  if jax.default_backend() == 'cpu':
    return jax.lax.map(fn, arrays)
  return jax.vmap(fn)(arrays)


def _tokens_from_single(params: Params, s: jax.Array) -> jax.Array:
  """Alg. 20, line 4."""
  s = functional.layer_norm(params, 's_to_a_linear_0', s)
  return functional.linear(params, 's_to_a_linear_1', s)


def _token_biases(
  config: DiffusionConfig, params: Params, z: jax.Array, mask: jax.Array
) -> tuple[jax.Array, ...]:
  """Of each layer of the token transformer, [1, n_head, n_token, n_token]."""
  normalised = numerics.layer_norm(numerics.at_least_float32(z))

  def layer(name: str) -> jax.Array:
    # The scale and offset of the layer norm go into the projection behind it.
    norm, weights = params[f'{name}_0'], params[f'{name}_1']['weights']
    bias = jnp.einsum(
      'ijc,ch->hij', normalised, norm['scale'][:, None] * weights
    )
    bias += (norm['offset'] @ weights)[:, None, None]
    return bt.masked_bias(bias[None], mask)

  return tuple(layer(name) for name in _token_bias_projections(config))


def _token_bias_projections(config: DiffusionConfig) -> list[str]:
  if isinstance(config, Boltz2DiffusionConfig):
    depth = range(config.token_transformer_depth)
    return [f'diffusion_conditioning/token_trans_proj_z_{i}' for i in depth]
  return [
    f'token_transformer/{layer}/pair_bias_attn/proj_z'
    for layer in _layers(config)
  ]


def _layers(config: DiffusionConfig) -> list[str]:
  return [f'layers_{i}' for i in range(config.token_transformer_depth)]


def _pair_scope(config: DiffusionConfig) -> str:
  is_second = isinstance(config, Boltz2DiffusionConfig)
  return 'diffusion_conditioning/' if is_second else ''


# Parameters.


def diffusion_parameters(config: DiffusionConfig) -> pm.Table:
  """Of both forms."""
  single = conditioning.single_conditioning_parameters(
    config.token_s,
    config.token_s + config.token_s_inputs,
    config.dim_fourier,
    config.conditioning_transition_layers,
  )
  table = {
    **bp.atom_attention_parameters(config),
    **pm.nest(single, 'single_conditioner/'),
    **_token_parameters(config),
  }
  if isinstance(config, Boltz1DiffusionConfig):
    pairwise = conditioning.pairwise_conditioning_parameters(
      config.token_z, 2 * config.token_z, config.conditioning_transition_layers
    )
    table |= pm.nest(pairwise, 'pairwise_conditioner/')
  return table


def _token_parameters(config: DiffusionConfig) -> pm.Table:
  """Of lines 4 to 6; in Boltz-1 each layer projects the pair itself."""
  channels = 2 * config.token_s
  is_first = isinstance(config, Boltz1DiffusionConfig)
  transformer = bt.diffusion_transformer_parameters(
    config.token_transformer_depth,
    config.token_transformer_heads,
    channels,
    channels,
    config.token_z if is_first else None,
  )
  return {
    's_to_a_linear_0': bt.layer_norm_parameters(channels),
    's_to_a_linear_1': bt.linear_parameters(
      channels, channels, initializer='zeros'
    ),
    **pm.nest(transformer, 'token_transformer/'),
    'a_norm': bt.layer_norm_parameters(channels),
  }


def parameter_labels(params: Params) -> dict[str, dict[str, str]]:
  """Which parameters are trained, as labels for an optimiser.

  The frequencies and phases of the noise level's Fourier features are constants
  that upstream saves among the parameters. Their gradients are zero, but decay
  of weights would change them:

    optimizer = optax.multi_transform(
      {'trained': optax.adamw(1e-4), 'fixed': optax.set_to_zero()},
      parameter_labels,
    )

  Args:
    params: of `diffusion_parameters`, or of a model that contains it.

  Returns:
    A tree like `params` of 'trained' and 'fixed'.
  """
  return {
    module: dict.fromkeys(
      arrays, 'fixed' if module.endswith(_FIXED_MODULES) else 'trained'
    )
    for module, arrays in params.items()
  }


# Checks.


def _check_config(config: DiffusionConfig) -> None:
  name = type(config).__name__
  if not config.structure_prediction or config.atom_decoder_depth < 1:
    raise ValueError(
      f'{name}: expected structure_prediction=True and atom_decoder_depth of '
      f'at least 1, got {config.structure_prediction} and '
      f'{config.atom_decoder_depth}'
    )
  if (2 * config.token_s) % config.token_transformer_heads:
    raise ValueError(
      f'{name}: 2 * token_s={2 * config.token_s} must be divisible by '
      f'token_transformer_heads={config.token_transformer_heads}'
    )
  if not 0 < config.sigma_data < float('inf'):
    raise ValueError(
      f'{name}.sigma_data: expected a positive number, got {config.sigma_data}'
    )


def _check_embeddings(
  config: DiffusionConfig,
  features: BoltzAtomFeatures,
  token_mask: jax.Array,
  single_inputs: jax.Array,
  single: jax.Array,
  pair: jax.Array,
  relative_position: jax.Array,
) -> None:
  """Shapes and dtypes of what does not depend on samples."""
  bf.check_inputs(config, features, single, pair)
  checks.check_shapes(
    {
      'n_token': features.num_tokens,
      'token_s_inputs': config.token_s_inputs,
      'token_z': config.token_z,
    },
    token_mask=(token_mask, 'n_token'),
    single_inputs=(single_inputs, 'n_token token_s_inputs'),
    relative_position=(relative_position, 'n_token n_token token_z'),
  )
  checks.check_dtypes('bool', token_mask=token_mask)
  checks.check_dtypes(
    'floating', single_inputs=single_inputs, relative_position=relative_position
  )


def _check_noisy(
  atom_mask: jax.Array, positions: jax.Array, sigma: jax.Array
) -> None:
  checks.check_shapes(
    {'n_atom': atom_mask.shape[0]},
    positions=(positions, 'n_sample n_atom 3'),
    sigma=(sigma, 'n_sample' if jnp.ndim(sigma) else ''),
  )
  checks.check_dtypes('floating', positions=positions, sigma=sigma)
