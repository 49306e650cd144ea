"""Boltz's conditioning: noise level, single, pair and relative positions.

Abramson et al. (2024) Suppl. Algs. 3 (relative positions), 21 (conditioning)
and 22 (Fourier embedding). Mirrors boltz `model/modules/encoders.py`,
`encodersv2.py`, `diffusion_conditioning.py` and `model/layers/transition.py`
@ 832486d. Parameter names as in `network.boltz.transformers`.

Shapes: n_token tokens; c_s trunk single and c_z pair channels; the conditioned
single has 2 c_s.

Differs from the released code: relative positions are sums of table rows, not a
product with one-hot vectors; the period of a cyclic chain follows Boltz-1 in
both versions, as Boltz-2's own rule is wrong for batches.
"""

import dataclasses
from typing import Literal

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import base_config, checks, numerics
from structattn_jax.components import functional
from structattn_jax.components import haiku_modules as hm
from structattn_jax.components import parameters as pm
from structattn_jax.components.parameters import Params
from structattn_jax.network.boltz import transformers as bt

# Upstream's period of chains that are not cyclic, once any chain is.
_LONG_PERIOD = 10000


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelativePositionConfig(base_config.BaseConfig):
  """Relative position encoding; the defaults are Boltz-1's.

  Attributes:
    token_z: output channels.
    r_max: largest distance of residues and tokens.
    s_max: largest distance of copies of a chain.
    same_chain_rule: which pairs have no distance of copies: those of the same
      chain ('chain', Boltz-1 and Boltz-2 without `fix_sym_check`) or those of
      different entities ('entity', Boltz-2 with it).
    cyclic: whether periods are used: always in Boltz-1, with
      `cyclic_pos_enc` in Boltz-2.
  """

  token_z: int = 128
  r_max: int = 32
  s_max: int = 2
  same_chain_rule: Literal['chain', 'entity'] = 'chain'
  cyclic: bool = True


# Tables of parameters.


def fourier_parameters(dim_fourier: int) -> pm.Table:
  """Of `fourier_embedding`: fixed, random, not trained."""
  normal = hk.initializers.RandomNormal()
  return {
    'proj': {
      'weights': pm.Parameter((1, dim_fourier), normal),
      'bias': pm.Parameter((dim_fourier,), normal),
    }
  }


def transition_parameters(channels: int, expansion_factor: int = 2) -> pm.Table:
  """Of `transition`."""
  hidden = expansion_factor * channels
  return {
    'norm': bt.layer_norm_parameters(channels),
    'fc1': pm.linear(channels, hidden),
    'fc2': pm.linear(channels, hidden),
    'fc3': pm.linear(hidden, channels, initializer='zeros'),
  }


def single_conditioning_parameters(
  token_s: int,
  num_input: int,
  dim_fourier: int | None = 256,
  num_transitions: int = 2,
  expansion_factor: int = 2,
) -> pm.Table:
  """Of `single_conditioning`.

  Args:
    token_s: c_s.
    num_input: channels of the trunk single and the inputs together: 2 c_s + 71
      in Boltz-1, 2 c_s in Boltz-2.
    dim_fourier: channels of the Fourier embedding; None: without times.
    num_transitions: number of transitions.
    expansion_factor: hidden channels of transitions per channel.
  """
  channels = 2 * token_s
  table = {
    'norm_single': bt.layer_norm_parameters(num_input),
    'single_embed': bt.linear_parameters(num_input, channels, use_bias=True),
  }
  if dim_fourier is not None:
    table |= pm.nest(fourier_parameters(dim_fourier), 'fourier_embed/')
    table['norm_fourier'] = bt.layer_norm_parameters(dim_fourier)
    table['fourier_to_single'] = bt.linear_parameters(dim_fourier, channels)
  return table | _transitions(channels, num_transitions, expansion_factor)


def pairwise_conditioning_parameters(
  token_z: int,
  num_input: int,
  num_transitions: int = 2,
  expansion_factor: int = 2,
) -> pm.Table:
  """Of `pairwise_conditioning`; `num_input` is 2 c_z as released."""
  return {
    'dim_pairwise_init_proj_0': bt.layer_norm_parameters(num_input),
    'dim_pairwise_init_proj_1': bt.linear_parameters(num_input, token_z),
    **_transitions(token_z, num_transitions, expansion_factor),
  }


def relative_position_parameters(config: RelativePositionConfig) -> pm.Table:
  """Of `relative_position_encoding`."""
  num_input = 4 * (config.r_max + 1) + 2 * (config.s_max + 1) + 1
  return {'linear_layer': bt.linear_parameters(num_input, config.token_z)}


def _transitions(channels: int, number: int, expansion_factor: int) -> pm.Table:
  table = transition_parameters(channels, expansion_factor)
  return pm.numbered(table, 'transitions', number)


# Functions of parameters.


def fourier_embedding(params: Params, times: jax.Array) -> jax.Array:
  """cos(2 pi (t w + b)), Alg. 22: [...] to [..., dim_fourier]."""
  weights, bias = params['proj']['weights'], params['proj']['bias']
  times = numerics.at_least_float32(times)[..., None]
  phase = times * jax.lax.stop_gradient(weights[0])
  return jnp.cos(2 * np.pi * (phase + jax.lax.stop_gradient(bias)))


def transition(params: Params, x: jax.Array) -> jax.Array:
  """fc3(silu(fc1 y) fc2 y), y = LN(x)."""
  y = functional.layer_norm(params, 'norm', x)
  hidden = jax.nn.silu(functional.linear(params, 'fc1', y)) * functional.linear(
    params, 'fc2', y
  )
  return functional.linear(params, 'fc3', hidden)


def single_conditioning(
  params: Params,
  single: jax.Array,
  single_inputs: jax.Array,
  time: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
  """Conditioned single and normalised embedding of the time, Alg. 21.

  Args:
    params: those of `single_conditioning_parameters`.
    single: [n_token, c_s] float.
    single_inputs: [n_token, ...] float.
    time: [] float, see `noise_time`; None if there are no parameters for it.

  Returns:
    [n_token, 2 c_s] and [dim_fourier] or None.
  """
  return condition_single(
    params, embed_single(params, single, single_inputs), time
  )


def embed_single(
  params: Params, single: jax.Array, single_inputs: jax.Array
) -> jax.Array:
  """Linear(LN([single, inputs])): [n_token, 2 c_s], for all noise levels."""
  s = jnp.concatenate([single, single_inputs], -1)
  return functional.linear(
    params, 'single_embed', functional.layer_norm(params, 'norm_single', s)
  )


def condition_single(
  params: Params, s: jax.Array, time: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """The rest of `single_conditioning`, which depends on the noise level."""
  fourier = None
  if time is not None:
    embedded = fourier_embedding(pm.below(params, 'fourier_embed/'), time)
    fourier = functional.layer_norm(params, 'norm_fourier', embedded).astype(
      s.dtype
    )
    s = s + functional.linear(params, 'fourier_to_single', fourier)
  return _apply_transitions(params, s), fourier


def pairwise_conditioning(
  params: Params, pair: jax.Array, relative_position: jax.Array
) -> jax.Array:
  """Conditioned pair, Alg. 21: both [n_token, n_token, c_z]."""
  z = jnp.concatenate([pair, relative_position], -1)
  z = functional.layer_norm(params, 'dim_pairwise_init_proj_0', z)
  z = functional.linear(params, 'dim_pairwise_init_proj_1', z)
  return _apply_transitions(params, z)


def _apply_transitions(params: Params, x: jax.Array) -> jax.Array:
  number = 0
  while f'transitions_{number}/norm' in params:
    x = x + transition(pm.below(params, f'transitions_{number}/'), x)
    number += 1
  return x


def relative_position_encoding(
  params: Params,
  config: RelativePositionConfig,
  asym_id: jax.Array,
  residue_index: jax.Array,
  entity_id: jax.Array,
  token_index: jax.Array,
  sym_id: jax.Array,
  cyclic_period: jax.Array | None = None,
) -> jax.Array:
  """Relative positions of tokens, Alg. 3: [n_token, n_token, c_z].

  Arguments as `RelativePositionEncoder`.
  """
  r_max, s_max = config.r_max, config.s_max

  def difference(x: jax.Array) -> jax.Array:
    return x[:, None] - x[None, :]

  def same(x: jax.Array) -> jax.Array:
    return x[:, None] == x[None, :]

  def clipped(d: jax.Array, largest: int, defined: jax.Array) -> jax.Array:
    """0 to 2 * largest, and one more for pairs without a distance."""
    d = jnp.clip(d + largest, 0, 2 * largest)
    return jnp.where(defined, d, 2 * largest + 1)

  residues = difference(residue_index)
  if config.cyclic and cyclic_period is not None:
    period = jnp.where(cyclic_period > 0, cyclic_period, _LONG_PERIOD)
    period = period.astype(jnp.float32)
    turns = jnp.round(residues.astype(jnp.float32) / period)
    wrapped = residues - (period * turns).astype(residues.dtype)
    residues = jnp.where(jnp.any(cyclic_period != 0), wrapped, residues)
  same_chain, same_entity = same(asym_id), same(entity_id)
  by_residue = clipped(residues, r_max, same_chain)
  same_residue = same_chain & same(residue_index)
  by_token = clipped(difference(token_index), r_max, same_residue)
  has_copies = (
    same_entity if config.same_chain_rule == 'entity' else ~same_chain
  )
  by_chain = clipped(difference(sym_id), s_max, has_copies)

  weights = jnp.asarray(params['linear_layer']['weights'])
  n_bin = 2 * r_max + 2
  residue_rows, token_rows, entity_row, chain_rows = jnp.split(
    weights, [n_bin, 2 * n_bin, 2 * n_bin + 1]
  )
  # Chains and entities share a table: one look-up less for every pair.
  chain_rows = jnp.concatenate([chain_rows, chain_rows + entity_row])
  by_chain += (2 * s_max + 2) * same_entity
  return (
    jnp.take(residue_rows, by_residue, 0, mode='clip')
    + jnp.take(token_rows, by_token, 0, mode='clip')
    + jnp.take(chain_rows, by_chain, 0, mode='clip')
  )


# Haiku modules.


class FourierEmbedding(hk.Module):
  """Random Fourier features of the noise level, Alg. 22, not trained.

  Args of the constructor:
    dim: number of features.
    name: module name.
  """

  def __init__(self, dim: int = 256, *, name: str = 'fourier_embed'):
    super().__init__(name=name)
    self.dim = dim

  def __call__(self, times: jax.Array) -> jax.Array:
    """Maps [...] times (see `noise_time`) to [..., dim]."""
    checks.check_dtypes('floating', times=times)
    params = pm.haiku_parameters(
      fourier_parameters(self.dim), hm.parameter_dtype(times)
    )
    return fourier_embedding(params, times)


class SingleConditioning(hk.Module):
  """Single conditioning, Alg. 21.

    s = Linear(LN([single, inputs])) + Linear(LN(fourier(t)))
    twice s += fc3(silu(fc1 LN(s)) fc2 LN(s))

  Args of the constructor:
    dim_fourier: features of the noise level.
    num_transitions: number of transitions.
    expansion_factor: their hidden channels per channel.
    name: module name.
  """

  def __init__(
    self,
    *,
    dim_fourier: int = 256,
    num_transitions: int = 2,
    expansion_factor: int = 2,
    name: str = 'single_conditioner',
  ):
    super().__init__(name=name)
    self.dim_fourier = dim_fourier
    self.num_transitions = num_transitions
    self.expansion_factor = expansion_factor

  def __call__(
    self,
    single: jax.Array,
    single_inputs: jax.Array,
    time: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array | None]:
    """Returns the conditioned single and the normalised Fourier features.

    Args:
      single: [n_token, c_s] float, of the trunk.
      single_inputs: [n_token, c_inputs] float, of the input embedder.
      time: [] float, see `noise_time`; None leaves it out (`disable_times`).

    Returns:
      [n_token, 2 c_s] and [dim_fourier], or None without a time.

    Raises:
      ValueError: on a wrong shape.
      TypeError: on a wrong dtype.
    """
    checks.check_shapes(
      single=(single, 'n_token c_s'),
      single_inputs=(single_inputs, 'n_token c_inputs'),
      time=(time, ''),
    )
    checks.check_dtypes(
      'floating', single=single, single_inputs=single_inputs, time=time
    )
    table = single_conditioning_parameters(
      single.shape[1],
      single.shape[1] + single_inputs.shape[1],
      None if time is None else self.dim_fourier,
      self.num_transitions,
      self.expansion_factor,
    )
    params = pm.haiku_parameters(table, hm.parameter_dtype(single))
    return single_conditioning(params, single, single_inputs, time)


class PairwiseConditioning(hk.Module):
  """Pair conditioning, Alg. 21.

    z = Linear(LN([pair, relative positions])), twice z += transition(z)

  Args of the constructor: as `SingleConditioning`.
  """

  def __init__(
    self,
    *,
    num_transitions: int = 2,
    expansion_factor: int = 2,
    name: str = 'pairwise_conditioner',
  ):
    super().__init__(name=name)
    self.num_transitions = num_transitions
    self.expansion_factor = expansion_factor

  def __call__(
    self, pair: jax.Array, relative_position: jax.Array
  ) -> jax.Array:
    """Returns the conditioned pair.

    Args:
      pair: [n_token, n_token, c_z] float, of the trunk.
      relative_position: [n_token, n_token, c_relative] float.

    Returns:
      [n_token, n_token, c_z].

    Raises:
      ValueError: on a wrong shape.
      TypeError: on a wrong dtype.
    """
    checks.check_shapes(
      pair=(pair, 'n_token n_token c_z'),
      relative_position=(relative_position, 'n_token n_token c_relative'),
    )
    checks.check_dtypes(
      'floating', pair=pair, relative_position=relative_position
    )
    table = pairwise_conditioning_parameters(
      pair.shape[-1],
      pair.shape[-1] + relative_position.shape[-1],
      self.num_transitions,
      self.expansion_factor,
    )
    params = pm.haiku_parameters(table, hm.parameter_dtype(pair))
    return pairwise_conditioning(params, pair, relative_position)


class RelativePositionEncoder(hk.Module):
  """Relative positions of tokens, Alg. 3.

  The product of one-hot vectors of four features with `linear_layer`, whose
  rows are, in order: 2 r_max + 2 distances of residues, as many of tokens of
  one residue, 1 for pairs of one entity, 2 s_max + 2 distances of copies of a
  chain; the last of each kind is for pairs without a distance.
  """

  def __init__(
    self,
    config: RelativePositionConfig | None = None,
    *,
    name: str = 'rel_pos',
  ):
    super().__init__(name=name)
    self.config = config or RelativePositionConfig()

  def __call__(
    self,
    asym_id: jax.Array,
    residue_index: jax.Array,
    entity_id: jax.Array,
    token_index: jax.Array,
    sym_id: jax.Array,
    cyclic_period: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the encoding.

    Args:
      asym_id: [n_token] integer, the chain.
      residue_index: [n_token] integer.
      entity_id: [n_token] integer, the same for copies of a chain.
      token_index: [n_token] integer.
      sym_id: [n_token] integer, which copy of its entity the chain is.
      cyclic_period: [n_token] integer, residues of a cyclic chain, 0 for
        others; None: no cyclic chain. As upstream, residues of all chains
        wrap at 10000 once one chain is cyclic.

    Returns:
      [n_token, n_token, token_z] float32.

    Raises:
      ValueError: on a wrong shape.
      TypeError: on a wrong dtype.
    """
    arrays = {
      'asym_id': asym_id,
      'residue_index': residue_index,
      'entity_id': entity_id,
      'token_index': token_index,
      'sym_id': sym_id,
      'cyclic_period': cyclic_period,
    }
    checks.check_shapes(**{k: (x, 'n_token') for k, x in arrays.items()})
    checks.check_dtypes('integer', **arrays)
    table = relative_position_parameters(self.config)
    params = pm.haiku_parameters(table)
    return relative_position_encoding(params, self.config, **arrays)
