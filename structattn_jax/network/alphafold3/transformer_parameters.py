"""Sizes and parameters of AlphaFold 3's diffusion transformers.

Tables of parameters with upstream's names for `diffusion_transformer`; blocks
are stacked as Haiku's layer stack has them.
"""

import dataclasses
from typing import Literal

from structattn_jax.common import base_config
from structattn_jax.components import parameters as pm

FinalInit = Literal['zeros', 'linear']

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
    self.check_at_least(1, 'num_head', 'key_dim', 'value_dim')
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
    self.check_at_least(1, 'num_head', 'key_dim', 'value_dim')
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
) -> pm.Table:
  """Of `self_attention`."""
  return {
    **adaptive_layernorm_parameters(channels, cond_channels, prefix),
    **_attention_parameters(config, channels, cond_channels, prefix),
  }


def cross_attention_parameters(
  config: CrossAttentionConfig,
  channels: int,
  cond_channels: int | None,
  prefix: str = '',
) -> pm.Table:
  """Of `cross_attention`."""
  return {
    **adaptive_layernorm_parameters(channels, cond_channels, f'{prefix}q'),
    **adaptive_layernorm_parameters(channels, cond_channels, f'{prefix}k'),
    **_attention_parameters(config, channels, cond_channels, prefix),
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


def _attention_parameters(
  config: SelfAttentionConfig | CrossAttentionConfig,
  channels: int,
  cond_channels: int | None,
  prefix: str,
) -> pm.Table:
  n_head = config.num_head
  key_dim = channels if config.key_dim is None else config.key_dim
  value_dim = channels if config.value_dim is None else config.value_dim
  _check_heads(n_head, key_dim=key_dim, value_dim=value_dim)
  key, value = (n_head, key_dim // n_head), (n_head, value_dim // n_head)
  return {
    f'{prefix}q_projection': pm.linear(channels, *key, bias=0.0),
    f'{prefix}k_projection': pm.linear(channels, *key),
    f'{prefix}v_projection': pm.linear(channels, *value),
    f'{prefix}gating_query': pm.linear(
      channels, value_dim, initializer='zeros'
    ),
    **adaptive_zero_init_parameters(value_dim, channels, cond_channels, prefix),
  }


def _check_heads(num_head: int, **sizes: int | None) -> None:
  for name, size in sizes.items():
    if size is not None and size % num_head:
      raise ValueError(
        f'{name}={size} must be divisible by num_head={num_head}'
      )
