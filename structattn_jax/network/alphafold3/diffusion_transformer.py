"""AlphaFold 3's diffusion transformers: over windows of atoms, over tokens.

Abramson et al. (2024) Suppl. Algs. 7 (atom transformer), 23 (diffusion
transformer), 24 (attention with pair bias), 25 (conditioned transition) and 26
(adaptive layer norm). Mirrors alphafold3
`model/network/diffusion_transformer.py` @ c0f97ed.

Everything is a pure function of a parameter tree with upstream's names
(`{prefix}q_projection`, ...) and stacked blocks, see `transformer_parameters`;
sizes are read off them. `Transformer` and `CrossAttTransformer` are the Haiku
modules.

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

import typing
from typing import Any, Literal

import haiku as hk
import jax
import jax.numpy as jnp

from structattn_jax.common import checks, numerics
from structattn_jax.components import functional
from structattn_jax.components import haiku_modules as hm
from structattn_jax.components import parameters as pm
from structattn_jax.components.parameters import Params
from structattn_jax.network.alphafold3 import atom_layout
from structattn_jax.network.alphafold3.atom_layout import Arranged, GatherInfo
from structattn_jax.network.alphafold3.transformer_parameters import (
  STACK,
  CrossAttTransformerConfig,
  TransformerConfig,
  cross_att_transformer_parameters,
  transformer_parameters,
)

PaddedKeys = Literal['official', 'masked']

# Upstream's logit of a masked key.
MASKED = -1e9


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


def transform_transformer(
  config: TransformerConfig | None = None, *, name: str = 'transformer'
) -> hk.Transformed:
  """Pure functions of the transformer over tokens.

    >>> config = TransformerConfig(num_blocks=4)
    >>> init, apply = transform_transformer(config)
    >>> act, single, pair = jnp.ones((3, 32)), jnp.ones((3, 8)), None
    >>> mask = jnp.ones(3, bool)
    >>> params = init(jax.random.key(0), act, mask, single, pair)
    >>> apply(params, act, mask, single, pair).shape
    (3, 32)

  Args:
    config: sizes; None takes AF3's diffusion head.
    name: of the module, in the names of the parameters.

  Returns:
    `init(key, act, mask, single_cond, pair_cond=None)` and `apply(params, ...)`
    with the same arguments; shapes as in `transformer`.
  """
  config = config or TransformerConfig()

  def forward(act, mask, single_cond, pair_cond=None):
    module = Transformer(config, name=name)
    return module(act, mask, single_cond, pair_cond)

  return pm.transform(forward)


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
