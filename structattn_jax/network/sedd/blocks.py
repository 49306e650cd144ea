"""SEDD's transformer block, its variants, and stacks of it.

Which code each variant follows:
  published  protein_lig_sedd `model/transformers_protlig_cross_improved.py`
             @ b2af3812 with the repairs that make it run (attention along the
             sequence, one projection, rotary on queries and keys), the file
             that the seed document 004 describes
  seed       the seed's own lines, which leave out what that file has: norm and
             modulation before self-attention, norm before the MLP, and all
             projections inside cross-attention
  sedd       Lou, Meng, Ermon 2024, Score-Entropy-Discrete-Diffusion
             `model/transformer.py` @ 0605786d
  v100       protein_lig_sedd `model/transformer_v100.py` @ d8c4806, whose
             parameters the seed document counts

All layers of a stack share one entry of parameters with a leading axis of
`num_block`, below the scope STACK = `__layer_stack_no_per_layer`, and linear
weights are [in, out]: torch's `mlp.0.weight` of block i is `mlp_0//weights`[i]
transposed, and so on. Of a block:

  norm1, norm2//{scale,offset}; attn_qkv, attn_out, mlp_0, mlp_3 (mlp_2 of
  'sedd' and 'v100'), adaLN_modulation//{weights,bias}; cross_attn/{norm_q,
  norm_kv, q_proj, k_proj, v_proj, out_proj}

Shapes: n tokens of a track, m of the one it reads; c_hidden channels; n_head
heads of d_head channels; c_cond channels of the condition; n_vocab tokens
including the absorbing state, which is the last one. sigma is the total noise
(no unit), not the time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import base_config, checks, numerics
from structattn_jax.components import functional
from structattn_jax.components import haiku_modules as hm
from structattn_jax.network.sedd import embeddings
from structattn_jax.network.sedd.embeddings import Variant

Remat = Literal['none', 'dots', 'full']
# One name for all stacks, whether or not layers get inputs of their own.
LAYER_STACK = '__layer_stack_no_per_layer'


@dataclasses.dataclass(frozen=True)
class Style:
  """What the published blocks do differently.

  Attributes:
    gates: whether attention and MLP are multiplied by a modulated gate.
    offset: whether norms have an offset besides the scale.
    attention_bias: whether the output projection of attention has a bias.
    approximate_gelu: whether GELU is the tanh approximation.
    inner_dropout: whether attention weights and the inside of the MLP are
      dropped, too.
    mlp_out: name of the second linear layer.
  """

  gates: bool
  offset: bool
  attention_bias: bool
  approximate_gelu: bool
  inner_dropout: bool
  mlp_out: str


_DUAL = Style(
  gates=False,
  offset=True,
  attention_bias=True,
  approximate_gelu=False,
  inner_dropout=True,
  mlp_out='mlp_3',
)
_SEDD = Style(
  gates=True,
  offset=False,
  attention_bias=False,
  approximate_gelu=True,
  inner_dropout=False,
  mlp_out='mlp_2',
)
STYLES: dict[Variant, Style] = {
  'published': _DUAL,
  'seed': _DUAL,
  'sedd': _SEDD,
  'v100': dataclasses.replace(_SEDD, approximate_gelu=False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDiTConfig(base_config.BaseConfig):
  """Sizes of a stack of blocks.

  Attributes:
    hidden_size: channels; divisible by `num_head`, and the head size must be
      even for the rotary embedding.
    num_head: number of heads.
    num_block: number of layers.
    cond_dim: channels of the noise condition.
    mlp_ratio: hidden channels of the MLP over `hidden_size`.
    dropout: rate of all dropouts, if a key is given.
    time_conditioning: False replaces sigma by 0 at the input of the network,
      so that it depends on the tokens alone; samplers then call it only after
      a token has changed.
    variant: what the blocks are, see the module docstring.
    remat: what the backward pass computes again in each layer: 'none';
      'dots', all but products with weights; 'full', the layer.
    bfloat16: whether activations are bfloat16. Softmax, norms, parameters and
      output logits stay float32.
  """

  hidden_size: int = 768
  num_head: int = 12
  num_block: int = 8
  cond_dim: int = 256
  mlp_ratio: int = 4
  dropout: float = 0.1
  time_conditioning: bool = True
  variant: Variant = 'published'
  remat: Remat = 'none'
  bfloat16: bool = False

  def __post_init__(self) -> None:
    super().__post_init__()
    self.check_at_least(1, 'hidden_size', 'num_head', 'cond_dim', 'mlp_ratio')
    if self.hidden_size % (2 * self.num_head):
      raise ValueError(
        f'{type(self).__name__}.hidden_size: {self.hidden_size} must be '
        f'divisible by 2 * num_head = {2 * self.num_head}'
      )
    if not 0 <= self.dropout < 1:
      raise ValueError(
        f'{type(self).__name__}.dropout: expected a rate in [0, 1), got '
        f'{self.dropout}'
      )


class DDiTBlock(hk.Module):
  """Self-attention, optional cross-attention and MLP of one track.

  'published' (norms with scale and offset, no gates):

    shift1, scale1, shift2, scale2 = chunks of W c + b
    h  = LN_1(x) (1 + scale1) + shift1
    x += softmax(rot(q) . rot(k) / sqrt(d_head)) v W_o,   q, k, v = h W_qkv
    x += CrossAttention(x, context)                       if there is one
    x += MLP(LN_2(x) (1 + scale2) + shift2),              GELU, hidden 4x

  'seed': h = x, and the MLP's input is x (1 + scale) + shift without a norm.
  'sedd' and 'v100' multiply both updates by gates, which are two more chunks;
  see `Style` for the rest.
  """

  def __init__(self, config: DDiTConfig, *, name: str = 'ddit_block'):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    x: jax.Array,
    condition: jax.Array,
    mask: jax.Array | None = None,
    context: jax.Array | None = None,
    context_mask: jax.Array | None = None,
    *,
    dropout_key: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the updated track.

    Args:
      x: [n, c_hidden] float, this track.
      condition: [c_cond] float.
      mask: [n] bool, True = real token (as a key); None = all real.
      context: [m, c_hidden] float, the other track; None = no
        cross-attention.
      context_mask: [m] bool, True = real token; None = all real.
      dropout_key: PRNG key; None means no dropout.

    Returns:
      [n, c_hidden] in the dtype of `x`.

    Raises:
      ValueError: on a wrong shape.
    """
    config = self.config
    dims = checks.check_shapes(
      {'c_hidden': config.hidden_size, 'c_cond': config.cond_dim},
      x=(x, 'n c_hidden'),
      condition=(condition, 'c_cond'),
      mask=(mask, 'n'),
      context=(context, 'm c_hidden'),
      context_mask=(context_mask, 'm'),
    )
    n, c_hidden = dims['n'], dims['c_hidden']
    style = STYLES[config.variant]
    normed = config.variant != 'seed'
    keys = split_keys(dropout_key, 5)

    def drop(index: int, x: jax.Array) -> jax.Array:
      return functional.dropout(keys[index], config.dropout, x)

    gate1, gate2 = 1, 1
    num_chunk = 6 if style.gates else 4 if normed else 2
    chunks = jnp.split(
      hm.Linear(
        num_chunk * c_hidden, initializer='zeros', name='adaLN_modulation'
      )(condition.astype(x.dtype)),
      num_chunk,
    )
    if style.gates:
      shift1, scale1, gate1, shift2, scale2, gate2 = chunks
    elif normed:
      shift1, scale1, shift2, scale2 = chunks
    else:
      shift2, scale2 = chunks

    h = x
    if normed:
      norm1 = hm.LayerNorm(create_offset=style.offset, name='norm1')
      h = norm1(x) * (1 + scale1) + shift1
    # Xavier's bound is that of the fused matrix, as published.
    qkv = hm.Linear(
      3 * c_hidden,
      initializer='torch' if style.gates else 'xavier',
      use_bias=False,
      name='attn_qkv',
    )(h).reshape(n, 3, config.num_head, -1)
    attended = _attend(
      embeddings.rotate_half(qkv[:, 0]),
      embeddings.rotate_half(qkv[:, 1]),
      qkv[:, 2],
      mask,
      rate=config.dropout if style.inner_dropout else 0.0,
      dropout_key=keys[0],
    )
    update = hm.Linear(
      c_hidden,
      initializer='torch' if style.gates else 'xavier',
      use_bias=style.attention_bias,
      name='attn_out',
    )(attended.reshape(n, c_hidden))
    if not style.inner_dropout:
      update = drop(0, update)
    x = x + gate1 * _if_any(mask, update)

    if context is not None:
      x = x + CrossAttention(config, name='cross_attn')(
        x, context, context_mask, dropout_key=keys[1]
      )

    h = x
    if normed:
      h = hm.LayerNorm(create_offset=style.offset, name='norm2')(x)
    h = hm.Linear(
      config.mlp_ratio * c_hidden, initializer='torch', name='mlp_0'
    )(h * (1 + scale2) + shift2)
    h = gelu(h, approximate=style.approximate_gelu)
    if style.inner_dropout:
      h = drop(2, h)
    h = hm.Linear(c_hidden, initializer='torch', name=style.mlp_out)(h)
    return x + gate2 * drop(3, h)


class CrossAttention(hk.Module):
  """What one track reads from the other; the caller adds the residual.

  'published' (`ImprovedCrossAttentionLayer`): queries from the normed track,
  keys from the normed context, values from the raw context, each projected,
  and an output projection. 'seed': the same without any projection.
  """

  def __init__(self, config: DDiTConfig, *, name: str = 'cross_attn'):
    super().__init__(name=name)
    self.config = config

  def __call__(
    self,
    x: jax.Array,
    context: jax.Array,
    context_mask: jax.Array | None = None,
    *,
    dropout_key: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the update of `x`.

    Args:
      x: [n, c_hidden] float, the reading track.
      context: [m, c_hidden] float, the track being read.
      context_mask: [m] bool, True = real token; None = all real.
      dropout_key: PRNG key; None means no dropout.

    Returns:
      [n, c_hidden] in the dtype of `x`; zero if the context is fully masked.
    """
    checks.check_shapes(
      x=(x, 'n c_hidden'),
      context=(context, 'm c_hidden'),
      context_mask=(context_mask, 'm'),
    )
    config = self.config
    keys = split_keys(dropout_key, 2)

    def heads(name: str, y: jax.Array) -> jax.Array:
      if config.variant == 'published':
        y = hm.Linear(
          y.shape[-1], initializer='xavier', use_bias=False, name=name
        )(y)
      return y.reshape(y.shape[0], config.num_head, -1)

    attended = _attend(
      heads('q_proj', hm.LayerNorm(name='norm_q')(x)),
      heads('k_proj', hm.LayerNorm(name='norm_kv')(context)),
      heads('v_proj', context),
      context_mask,
      rate=config.dropout,
      dropout_key=keys[0],
    ).reshape(x.shape)
    if config.variant == 'seed':
      return functional.dropout(keys[1], config.dropout, attended)
    update = hm.Linear(x.shape[-1], initializer='xavier', name='out_proj')(
      attended
    )
    return _if_any(
      context_mask, functional.dropout(keys[1], config.dropout, update)
    )


class FinalLayer(hk.Module):
  """Logits: W (LN(x) (1 + scale) + shift) + b, modulated by the condition."""

  def __init__(self, config: DDiTConfig, vocab_size: int, *, name: str):
    super().__init__(name=name)
    self.config = config
    self.vocab_size = vocab_size

  def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
    """Maps [n, c_hidden], [c_cond] to [n, vocab_size], at least float32."""
    style = STYLES[self.config.variant]
    shift, scale = jnp.split(
      hm.Linear(2 * x.shape[-1], initializer='zeros', name='adaLN_modulation')(
        condition.astype(x.dtype)
      ),
      2,
    )
    norm = hm.LayerNorm(create_offset=style.offset, name='norm_final')
    h = norm(x) * (1 + scale) + shift
    # Differences of logits matter at 1e-3: float32 from here on.
    return hm.Linear(
      self.vocab_size,
      initializer='zeros',
      use_bias=self.config.variant != 'v100',
      name='linear',
    )(numerics.at_least_float32(h))


def condition(config: DDiTConfig, sigma: jax.Array) -> jax.Array:
  """The condition [c_cond] of a noise level sigma [], a Haiku function."""
  if not config.time_conditioning:
    sigma = jnp.zeros_like(sigma)
  return embeddings.TimestepEmbedder(config.cond_dim, variant=config.variant)(
    sigma
  )


def one_track(
  config: DDiTConfig,
  name: str,
  x: Any,
  condition: jax.Array,
  mask: jax.Array | None,
  context: jax.Array | None = None,
  context_mask: jax.Array | None = None,
  *,
  num_layer: int | None = None,
  dropout_key: jax.Array | None = None,
) -> jax.Array:
  """One track through the first `num_layer` of its blocks; None = all."""

  def layer(x, keys):
    return DDiTBlock(config, name=name)(
      x, condition, mask, context, context_mask, dropout_key=keys[0]
    )

  return run_stack(config, layer, x, (dropout_key,), num_layer)


def run_stack(
  config: DDiTConfig,
  layer: Callable[..., Any],
  states: Any,
  keys: tuple[jax.Array | None, ...],
  num_layer: int | None = None,
) -> Any:
  """Runs `layer(states, keys)` over stacked parameters of all layers."""
  if config.remat != 'none':
    policies = jax.checkpoint_policies
    layer = hk.remat(
      layer,
      # Without a policy nothing is kept.
      policy=policies.dots_with_no_batch_dims_saveable
      if config.remat == 'dots'
      else None,
      # The loop over layers already keeps XLA from merging the two passes.
      prevent_cse=False,
    )

  def step(states, index, keys):
    if num_layer is None or num_layer == config.num_block:
      return layer(states, keys), None
    # The parameters of the layers beyond are there, but not used.
    return hk.cond(
      index < num_layer, layer, lambda states, keys: states, states, keys
    ), None

  keys = tuple(
    None if key is None else jax.random.split(key, config.num_block)
    for key in keys
  )
  stack = hk.layer_stack(
    config.num_block, with_per_layer_inputs=True, name=LAYER_STACK
  )
  states, _ = stack(step)(states, jnp.arange(config.num_block), keys)
  return states


def gelu(x: jax.Array, *, approximate: bool) -> jax.Array:
  """GELU; x (1 + erf(x / sqrt 2)) / 2, or the tanh approximation.

  `jax.nn.gelu` has the complementary error function instead, which keeps small
  results at large negative x accurate relative to themselves, and takes three
  times as long on CPU.
  """
  if approximate:
    return jax.nn.gelu(x, approximate=True)
  return 0.5 * x * (1 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


# From so many logits per head on, one head at a time is faster on CPU, where
# they then stay in cache, and its backward pass computes them again.
_LARGE = 2**14


def _attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array | None,
  *,
  rate: float = 0.0,
  dropout_key: jax.Array | None = None,
) -> jax.Array:
  """[n, n_head, d] queries over [m, n_head, d] keys; 0 if all are masked."""
  keys = None
  if dropout_key is not None:
    keys = jax.random.split(dropout_key, q.shape[1])
  # Heads in front.
  heads = *(jnp.moveaxis(x, 1, 0) for x in (q, k, v)), keys

  def one(head):
    q, k, v, key = head
    logits = numerics.at_least_float32(q) @ numerics.at_least_float32(k).T
    weights = numerics.masked_softmax(logits * q.shape[-1] ** -0.5, mask)
    return functional.dropout(key, rate, weights).astype(v.dtype) @ v

  is_large = len(q) * len(k) >= _LARGE and jax.default_backend() == 'cpu'
  if is_large:
    attended = jax.lax.map(jax.checkpoint(one, prevent_cse=False), heads)
  else:
    attended = jax.vmap(one)(heads)
  return jnp.moveaxis(attended, 0, 1)


def _if_any(mask: jax.Array | None, update: jax.Array) -> jax.Array:
  """No key to attend to means no update, not even the projection's bias."""
  return update if mask is None else jnp.where(jnp.any(mask), update, 0)


def split_keys(
  key: jax.Array | None, count: int
) -> tuple[jax.Array | None, ...]:
  """Independent keys, or as many None."""
  return (None,) * count if key is None else tuple(jax.random.split(key, count))
