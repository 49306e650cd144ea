"""AlphaFold 3's diffusion transformers: over windows of atoms, over tokens.

Abramson et al. (2024) Suppl. Algs. 7 (atom transformer), 23 (diffusion
transformer), 24 (attention with pair bias), 25 (conditioned transition) and 26
(adaptive layer norm). Mirrors alphafold3
`model/network/diffusion_transformer.py` @ c0f97ed.

Everything is a pure function of a parameter tree with upstream's names
(`{name}q_projection`, ...) and stacked blocks; sizes are read off the
parameters. `Transformer` and `CrossAttTransformer` are the Haiku modules.

The atom transformer is here as published, on upstream's layouts;
`window_transformer.py` has the same on flat atoms, which is faster.

Shapes: n_token tokens; n_window windows of num_queries and num_keys atoms;
n_block blocks; n_head heads of d_key and d_value channels.

Differs from the paper as the released code does: queries and keys have their
own adaptive layer norm; one layer norm of the pair serves all blocks; the
transition follows the attention instead of running beside it; the gate has no
bias; a key is masked only for masked queries (`padded_keys`).
Differs from the released code: a row of `self_attention` without any key gives
zeros.
"""

import dataclasses
import typing
from typing import Any, Literal

import haiku as hk
import jax
import jax.numpy as jnp

from structattn_jax.common import base_config, checks, numerics
from structattn_jax.components import functional
from structattn_jax.components import haiku_modules as hm
from structattn_jax.components import parameters as pm
from structattn_jax.components.parameters import Params
from structattn_jax.network.alphafold3 import atom_layout
from structattn_jax.network.alphafold3.atom_layout import Arranged, GatherInfo

PaddedKeys = Literal['official', 'masked']
FinalInit = Literal['zeros', 'linear']

# Upstream's logit of a masked key.
MASKED = -1e9
# Haiku's scope of stacked blocks.
STACK = '__layer_stack_with_per_layer/'


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossAttentionConfig(base_config.BaseConfig):
  """Sizes of the attention over windows.

  Attributes:
    num_head: number of heads.
    key_dim: channels of queries and keys, all heads together.
    value_dim: channels of values, all heads together.
  """

  num_head: int = 4
  key_dim: int = 128
  value_dim: int = 128

  def __post_init__(self) -> None:
    super().__post_init__()
    _check_heads(self.num_head, key_dim=self.key_dim, value_dim=self.value_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfAttentionConfig(base_config.BaseConfig):
  """Sizes of the attention over tokens.

  Attributes:
    num_head: number of heads.
    key_dim: channels of queries and keys, all heads together; None takes the
      channels of the activations.
    value_dim: likewise for values.
  """

  num_head: int = 16
  key_dim: int | None = None
  value_dim: int | None = None

  def __post_init__(self) -> None:
    super().__post_init__()
    _check_heads(self.num_head, key_dim=self.key_dim, value_dim=self.value_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossAttTransformerConfig(base_config.BaseConfig):
  """Sizes of the atom transformer.

  Attributes:
    num_intermediate_factor: hidden channels of the transition per channel.
    num_blocks: number of blocks.
    attention: sizes of the attention.
  """

  num_intermediate_factor: int = 2
  num_blocks: int = 3
  attention: CrossAttentionConfig = dataclasses.field(
    default_factory=CrossAttentionConfig
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(base_config.BaseConfig):
  """Sizes of the token transformer.

  Attributes:
    attention: sizes of the attention.
    num_blocks: number of blocks, a multiple of `super_block_size`.
    super_block_size: blocks whose pair logits are computed together.
    num_intermediate_factor: hidden channels of the transition per channel.
    block_remat: whether to recompute each block in the backward pass.
  """

  attention: SelfAttentionConfig = dataclasses.field(
    default_factory=SelfAttentionConfig
  )
  num_blocks: int = 24
  super_block_size: int = 4
  num_intermediate_factor: int = 2
  block_remat: bool = False

  def __post_init__(self) -> None:
    super().__post_init__()
    self.check_at_least(1, 'num_blocks', 'super_block_size')
    if self.num_blocks % self.super_block_size:
      raise ValueError(
        f'TransformerConfig: num_blocks={self.num_blocks} must be divisible by '
        f'super_block_size={self.super_block_size}'
      )


# The published functions.


def adaptive_layernorm(
  params: Params, x: jax.Array, single_cond: jax.Array | None, prefix: str = ''
) -> jax.Array:
  """Layer norm whose scale and shift depend on the conditioning (Alg. 26).

  s = LN(c) * scale,  y = sigmoid(s W_s + b_s) * LN(x) + s W_b

  Without conditioning: an ordinary layer norm with scale and offset.

  Args:
    params: `{prefix}single_cond_layer_norm`, `{prefix}single_cond_scale` and
      `{prefix}single_cond_bias`, or `{prefix}layer_norm`.
    x: [..., c] float.
    single_cond: [..., c_cond] float, or None.
    prefix: of the parameters.

  Returns:
    [..., c] in the dtype of `x`.
  """
  if single_cond is None:
    return functional.layer_norm(params, f'{prefix}layer_norm', x)
  single_cond = functional.layer_norm(
    params, f'{prefix}single_cond_layer_norm', single_cond
  )
  scale = functional.linear(params, f'{prefix}single_cond_scale', single_cond)
  bias = functional.linear(params, f'{prefix}single_cond_bias', single_cond)
  return jax.nn.sigmoid(scale) * numerics.layer_norm(x) + bias


def adaptive_zero_init(
  params: Params, x: jax.Array, single_cond: jax.Array | None, prefix: str = ''
) -> jax.Array:
  """Output projection with a gate that depends on the conditioning.

  y = sigmoid(c W + b) * (x W_o), with b = -2 and W = 0 initially.

  Args:
    params: `{prefix}transition2` and, with conditioning,
      `{prefix}adaptive_zero_cond`.
    x: [..., c_in] float.
    single_cond: [..., c_cond] float, or None: no gate.
    prefix: of the parameters.

  Returns:
    [..., c] in the dtype of `x`.
  """
  output = functional.linear(params, f'{prefix}transition2', x)
  if single_cond is None:
    return output
  gate = functional.linear(params, f'{prefix}adaptive_zero_cond', single_cond)
  return jax.nn.sigmoid(gate) * output


def transition_block(
  params: Params,
  x: jax.Array,
  single_cond: jax.Array | None = None,
  prefix: str = '',
) -> jax.Array:
  """Gated transition (Alg. 25): AdaLN, swish(a) * b, gated projection.

  Args:
    params: `{prefix}ffw_transition1` and those of `adaptive_layernorm` and
      `adaptive_zero_init` with the prefix `{prefix}ffw_`.
    x: [..., c] float.
    single_cond: [..., c_cond] float, or None.
    prefix: of the parameters.

  Returns:
    The update, [..., c].
  """
  x = adaptive_layernorm(params, x, single_cond, f'{prefix}ffw_')
  hidden = functional.swish_gate(
    functional.linear(params, f'{prefix}ffw_transition1', x)
  )
  return adaptive_zero_init(params, hidden, single_cond, f'{prefix}ffw_')


def self_attention(
  params: Params,
  x: jax.Array,
  mask: jax.Array,
  pair_logits: jax.Array | None = None,
  single_cond: jax.Array | None = None,
  prefix: str = '',
) -> jax.Array:
  """Attention of all tokens over all tokens (Alg. 24).

  Args:
    params: see `self_attention_parameters`.
    x: [n_token, c] float.
    mask: [n_token] bool, True = keep as key.
    pair_logits: [n_head, n_token, n_token] float, query first.
    single_cond: [n_token, c_cond] float, or None.
    prefix: of the parameters.

  Returns:
    The update, [n_token, c]; without any kept key, that of zero values.
  """
  checks.check_shapes(x=(x, 'n_token c'), mask=(mask, 'n_token'))
  checks.check_dtypes('bool', mask=mask)
  x = adaptive_layernorm(params, x, single_cond, prefix)
  logits = _logits(params, x, x, prefix)
  if pair_logits is not None:
    logits += pair_logits
  weights = numerics.masked_softmax(logits, mask)
  return _attention_output(params, weights, x, x, single_cond, prefix)


def cross_attention(
  params: Params,
  x_q: jax.Array,
  x_k: jax.Array,
  mask_q: jax.Array,
  mask_k: jax.Array,
  pair_logits: jax.Array | None = None,
  single_cond_q: jax.Array | None = None,
  single_cond_k: jax.Array | None = None,
  prefix: str = '',
  *,
  padded_keys: PaddedKeys = 'official',
) -> jax.Array:
  """Attention of queries over keys, each side with its own norm (Alg. 24).

  Args:
    params: see `cross_attention_parameters`.
    x_q: [..., num_queries, c] float.
    x_k: [..., num_keys, c] float.
    mask_q: [..., num_queries] bool.
    mask_k: [..., num_keys] bool.
    pair_logits: [..., n_head, num_queries, num_keys] float.
    single_cond_q: [..., num_queries, c_cond] float, or None.
    single_cond_k: [..., num_keys, c_cond] float, or None.
    prefix: of the parameters.
    padded_keys: 'official': real queries attend to masked keys too, and masked
      queries to nothing else; 'masked': no query attends to masked keys.

  Returns:
    The update, [..., num_queries, c]; meaningless for masked queries.
  """
  checks.check_dtypes('bool', mask_q=mask_q, mask_k=mask_k)
  if padded_keys not in typing.get_args(PaddedKeys):
    raise ValueError(
      f"padded_keys: expected 'official' or 'masked', got {padded_keys!r}"
    )
  x_q = adaptive_layernorm(params, x_q, single_cond_q, f'{prefix}q')
  x_k = adaptive_layernorm(params, x_k, single_cond_k, f'{prefix}k')
  logits = _logits(params, x_q, x_k, prefix)
  masked_key = ~mask_k[..., None, None, :]
  if padded_keys == 'official':
    both = masked_key & ~mask_q[..., None, :, None]
    logits += jnp.where(both, -MASKED, 0)
  else:
    logits += jnp.where(masked_key, MASKED, 0)
  if pair_logits is not None:
    logits += pair_logits
  weights = jax.nn.softmax(logits)
  return _attention_output(params, weights, x_q, x_k, single_cond_q, prefix)


def cross_att_transformer(
  params: Params,
  queries_act: Arranged,
  queries_mask: jax.Array,
  queries_to_keys: GatherInfo,
  keys_mask: jax.Array,
  queries_single_cond: jax.Array,
  keys_single_cond: jax.Array,
  pair_cond: jax.Array,
  *,
  name: str = 'transformer',
  padded_keys: PaddedKeys = 'official',
) -> Arranged:
  """The atom transformer as published (Alg. 7).

  Args:
    params: those of `cross_att_transformer_parameters`.
    queries_act: [n_window, num_queries, c] float, layout 'queries'.
    queries_mask: [n_window, num_queries] bool.
    queries_to_keys: gather from queries to keys.
    keys_mask: [n_window, num_keys] bool.
    queries_single_cond: [n_window, num_queries, c_cond] float.
    keys_single_cond: [n_window, num_keys, c_cond] float.
    pair_cond: [n_window, num_queries, num_keys, c_pair] float.
    name: name of the module, which its blocks' parameters repeat.
    padded_keys: see `cross_attention`.

  Returns:
    New activations of the queries.
  """
  pair_act = functional.layer_norm(params, 'pair_input_layer_norm', pair_cond)
  logits = functional.linear(params, 'pair_logits_projection', pair_act)
  # [n_block, n_window, n_head, num_queries, num_keys].
  logits = jnp.transpose(logits, (3, 0, 4, 1, 2))

  def block(act: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
    own, pair_logits = inputs
    keys_act = atom_layout.convert(queries_to_keys, Arranged(act, 'queries'))
    act += cross_attention(
      own,
      act,
      keys_act.values,
      queries_mask,
      keys_mask,
      pair_logits,
      queries_single_cond,
      keys_single_cond,
      padded_keys=padded_keys,
    )
    act += transition_block(own, act, queries_single_cond)
    return act, None

  blocks = pm.below(params, f'{STACK}{name}')
  act, _ = jax.lax.scan(block, queries_act.values, (blocks, logits))
  return Arranged(act, queries_act.layout)


def transformer(
  params: Params,
  act: jax.Array,
  mask: jax.Array,
  single_cond: jax.Array,
  pair_cond: jax.Array | None = None,
  *,
  name: str = 'transformer',
  block_remat: bool = False,
) -> jax.Array:
  """The transformer over tokens (Alg. 23).

  Args:
    params: those of `transformer_parameters`.
    act: [n_token, c] float.
    mask: [n_token] bool, True = keep as key.
    single_cond: [n_token, c_cond] float.
    pair_cond: [n_token, n_token, c_pair] float, query token first, or None.
    name: name of the module, which its blocks' parameters repeat.
    block_remat: whether to recompute each block in the backward pass.

  Returns:
    [n_token, c].

  Raises:
    ValueError: on a wrong shape.
    TypeError: on a wrong dtype.
  """
  checks.check_shapes(
    act=(act, 'n_token c'),
    mask=(mask, 'n_token'),
    single_cond=(single_cond, 'n_token c_cond'),
    pair_cond=(pair_cond, 'n_token n_token c_pair'),
  )
  checks.check_dtypes(
    'floating', act=act, single_cond=single_cond, pair_cond=pair_cond
  )
  checks.check_dtypes('bool', mask=mask)
  if single_cond.dtype != act.dtype:
    raise TypeError(
      f'single_cond: expected the dtype of act, {act.dtype}, got '
      f'{single_cond.dtype}'
    )
  pair_act = None
  if pair_cond is not None:
    pair_act = functional.layer_norm(params, 'pair_input_layer_norm', pair_cond)

  def block(act: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
    own, pair_logits = inputs
    act += self_attention(own, act, mask, pair_logits, single_cond)
    act += transition_block(own, act, single_cond)
    return act, None

  run: Any = block
  if block_remat:
    run = jax.checkpoint(block, prevent_cse=False)

  def super_block(act: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
    own, projection = inputs
    pair_logits = None
    if pair_act is not None:
      pair_logits = functional.linear(
        projection, 'pair_logits_projection', pair_act
      )
      pair_logits = jnp.transpose(pair_logits, (2, 3, 0, 1))
    return jax.lax.scan(run, act, (own, pair_logits))

  blocks = pm.below(params, f'{STACK}{STACK}{name}')
  projection = 'pair_logits_projection'
  projections = (
    {} if pair_act is None else {projection: params[f'{STACK}{projection}']}
  )
  return jax.lax.scan(super_block, act, (blocks, projections))[0]


class Transformer(hk.Module):
  """`transformer` as a Haiku module, with upstream's parameters.

  Args of the constructor:
    config: sizes.
    name: name of the module; upstream's is 'transformer'.
  """

  def __init__(self, config: TransformerConfig, *, name: str = 'transformer'):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    act: jax.Array,
    mask: jax.Array,
    single_cond: jax.Array,
    pair_cond: jax.Array | None = None,
  ) -> jax.Array:
    """Arguments and result as `transformer`."""
    table = transformer_parameters(
      self.config,
      act.shape[-1],
      single_cond.shape[-1],
      None if pair_cond is None else pair_cond.shape[-1],
      name=self.name,
    )
    params = pm.haiku_parameters(table, hm.parameter_dtype(act))
    return transformer(
      params,
      act,
      mask,
      single_cond,
      pair_cond,
      name=self.name,
      block_remat=self.config.block_remat,
    )


class CrossAttTransformer(hk.Module):
  """`cross_att_transformer` as a Haiku module, with upstream's parameters.

  Args of the constructor:
    config: sizes.
    padded_keys: see `cross_attention`.
    name: name of the module.
  """

  def __init__(
    self,
    config: CrossAttTransformerConfig,
    *,
    padded_keys: PaddedKeys = 'official',
    name: str = 'transformer',
  ):
    super().__init__(name=name)
    self.config = config
    self.padded_keys: PaddedKeys = padded_keys

  def __call__(
    self,
    queries_act: Arranged,
    queries_mask: jax.Array,
    queries_to_keys: GatherInfo,
    keys_mask: jax.Array,
    queries_single_cond: jax.Array,
    keys_single_cond: jax.Array,
    pair_cond: jax.Array,
  ) -> Arranged:
    """Arguments and result as `cross_att_transformer`."""
    table = cross_att_transformer_parameters(
      self.config,
      queries_act.values.shape[-1],
      queries_single_cond.shape[-1],
      pair_cond.shape[-1],
      name=self.name,
    )
    dtype = hm.parameter_dtype(queries_act.values)
    return cross_att_transformer(
      pm.haiku_parameters(table, dtype),
      queries_act,
      queries_mask,
      queries_to_keys,
      keys_mask,
      queries_single_cond,
      keys_single_cond,
      pair_cond,
      name=self.name,
      padded_keys=self.padded_keys,
    )


# Tables of parameters.


def adaptive_layernorm_parameters(
  channels: int, cond_channels: int | None, prefix: str = ''
) -> pm.Table:
  """Of `adaptive_layernorm`; `cond_channels` None: without conditioning."""
  if cond_channels is None:
    return {f'{prefix}layer_norm': pm.layer_norm(channels, offset=True)}
  shape = (cond_channels, channels)
  return {
    f'{prefix}single_cond_layer_norm': pm.layer_norm(cond_channels),
    f'{prefix}single_cond_scale': pm.linear(
      *shape, initializer='zeros', bias=0.0
    ),
    f'{prefix}single_cond_bias': pm.linear(*shape, initializer='zeros'),
  }


def adaptive_zero_init_parameters(
  num_input: int,
  channels: int,
  cond_channels: int | None,
  prefix: str = '',
  *,
  final_init: FinalInit = 'zeros',
) -> pm.Table:
  """Of `adaptive_zero_init`; `final_init` is for the unconditioned one."""
  out = f'{prefix}transition2'
  if cond_channels is None:
    return {out: pm.linear(num_input, channels, initializer=final_init)}
  return {
    out: pm.linear(num_input, channels),
    f'{prefix}adaptive_zero_cond': pm.linear(
      cond_channels, channels, initializer='zeros', bias=-2.0
    ),
  }


def transition_block_parameters(
  channels: int,
  cond_channels: int | None,
  num_intermediate_factor: int = 2,
  prefix: str = '',
  *,
  final_init: FinalInit = 'zeros',
) -> pm.Table:
  """Of `transition_block`."""
  hidden = num_intermediate_factor * channels
  prefix = f'{prefix}ffw_'
  return {
    **adaptive_layernorm_parameters(channels, cond_channels, prefix),
    f'{prefix}transition1': pm.linear(channels, 2 * hidden, initializer='relu'),
    **adaptive_zero_init_parameters(
      hidden, channels, cond_channels, prefix, final_init=final_init
    ),
  }


def self_attention_parameters(
  config: SelfAttentionConfig,
  channels: int,
  cond_channels: int | None,
  prefix: str = '',
  *,
  final_init: FinalInit = 'zeros',
) -> pm.Table:
  """Of `self_attention`."""
  return {
    **adaptive_layernorm_parameters(channels, cond_channels, prefix),
    **_attention_parameters(
      config.num_head,
      channels if config.key_dim is None else config.key_dim,
      channels if config.value_dim is None else config.value_dim,
      channels,
      cond_channels,
      prefix,
      final_init,
    ),
  }


def cross_attention_parameters(
  config: CrossAttentionConfig,
  channels: int,
  cond_channels: int | None,
  prefix: str = '',
  *,
  final_init: FinalInit = 'zeros',
) -> pm.Table:
  """Of `cross_attention`."""
  return {
    **adaptive_layernorm_parameters(channels, cond_channels, f'{prefix}q'),
    **adaptive_layernorm_parameters(channels, cond_channels, f'{prefix}k'),
    **_attention_parameters(
      config.num_head,
      config.key_dim,
      config.value_dim,
      channels,
      cond_channels,
      prefix,
      final_init,
    ),
  }


def cross_att_transformer_parameters(
  config: CrossAttTransformerConfig,
  channels: int,
  cond_channels: int,
  pair_channels: int,
  *,
  name: str = 'transformer',
) -> pm.Table:
  """Of `cross_att_transformer`, below the module."""
  block = {
    **cross_attention_parameters(config.attention, channels, cond_channels),
    **transition_block_parameters(
      channels, cond_channels, config.num_intermediate_factor
    ),
  }
  logits = (config.num_blocks, config.attention.num_head)
  return {
    'pair_input_layer_norm': pm.layer_norm(pair_channels),
    'pair_logits_projection': pm.linear(pair_channels, *logits),
    **pm.stack(block, config.num_blocks, prefix=f'{STACK}{name}'),
  }


def transformer_parameters(
  config: TransformerConfig,
  channels: int,
  cond_channels: int,
  pair_channels: int | None,
  *,
  name: str = 'transformer',
) -> pm.Table:
  """Of `transformer`, below the module; without a pair: two fewer modules."""
  block = {
    **self_attention_parameters(config.attention, channels, cond_channels),
    **transition_block_parameters(
      channels, cond_channels, config.num_intermediate_factor
    ),
  }
  size = config.super_block_size
  n_super = config.num_blocks // size
  table = pm.stack(block, n_super, size, prefix=f'{STACK}{STACK}{name}')
  if pair_channels is None:
    return table
  logits = pm.linear(pair_channels, size, config.attention.num_head)
  return {
    'pair_input_layer_norm': pm.layer_norm(pair_channels),
    **pm.stack({'pair_logits_projection': logits}, n_super, prefix=STACK),
    **table,
  }


# Parts.


def _logits(
  params: Params, x_q: jax.Array, x_k: jax.Array, prefix: str
) -> jax.Array:
  """[..., n_head, num_queries, num_keys], at least float32."""
  q = numerics.at_least_float32(
    functional.linear(params, f'{prefix}q_projection', x_q)
  )
  k = numerics.at_least_float32(
    functional.linear(params, f'{prefix}k_projection', x_k)
  )
  return jnp.einsum('...qhc,...khc->...hqk', q * q.shape[-1] ** -0.5, k)


def _attention_output(
  params: Params,
  weights: jax.Array,
  x_q: jax.Array,
  x_k: jax.Array,
  single_cond: jax.Array | None,
  prefix: str,
) -> jax.Array:
  """Weighted values, gated and projected."""
  v = functional.linear(params, f'{prefix}v_projection', x_k)
  out = jnp.einsum('...hqk,...khc->...qhc', weights.astype(v.dtype), v)
  out = out.reshape(*out.shape[:-2], -1)
  out *= jax.nn.sigmoid(functional.linear(params, f'{prefix}gating_query', x_q))
  return adaptive_zero_init(params, out, single_cond, prefix)


def _attention_parameters(
  n_head: int,
  key_dim: int,
  value_dim: int,
  channels: int,
  cond_channels: int | None,
  prefix: str,
  final_init: FinalInit,
) -> pm.Table:
  _check_heads(n_head, key_dim=key_dim, value_dim=value_dim)
  key, value = (n_head, key_dim // n_head), (n_head, value_dim // n_head)
  return {
    f'{prefix}q_projection': pm.linear(channels, *key, bias=0.0),
    f'{prefix}k_projection': pm.linear(channels, *key),
    f'{prefix}v_projection': pm.linear(channels, *value),
    f'{prefix}gating_query': pm.linear(
      channels, value_dim, initializer='zeros'
    ),
    **adaptive_zero_init_parameters(
      value_dim, channels, cond_channels, prefix, final_init=final_init
    ),
  }


def _check_heads(num_head: int, **sizes: int | None) -> None:
  for name, size in sizes.items():
    if size is not None and size % num_head:
      raise ValueError(
        f'{name}={size} must be divisible by num_head={num_head}'
      )
