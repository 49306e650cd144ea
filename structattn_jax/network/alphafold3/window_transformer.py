"""AlphaFold 3's atom transformer on flat atoms, in few large products.

Abramson et al. (2024) Suppl. Algs. 7, 24, 25, 26. The same computation and
parameters as `diffusion_transformer.cross_att_transformer`, which has it as
published on upstream's layouts; here all projections are done once per atom
instead of once per window, scales of layer norms are folded into the weights
behind them, and what depends on the conditioning alone can be kept.

Shapes: n_atom flat atoms; n_window windows of num_queries and num_keys atoms;
n_head heads of d_key and d_value channels; c channels of activations, c_cond
of the conditioning.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from structattn_jax.common import numerics
from structattn_jax.components import functional, mapping, windowed_attention
from structattn_jax.components import parameters as pm
from structattn_jax.components.parameters import Params
from structattn_jax.network.alphafold3.transformer_parameters import STACK


class BlockWeights(NamedTuple):
  """Parameters of one block, put together for few large products."""

  key_condition: jax.Array  # [c_cond, 2 c] scale, shift
  key_condition_bias: jax.Array  # [c]
  condition: jax.Array  # [c_cond, 4 c] scale, shift of queries and transition
  condition_bias: jax.Array  # [2 c]
  gate: jax.Array  # [c_cond, 2 c]
  gate_bias: jax.Array  # [2 c]
  query: jax.Array  # [c, n_head d_key + n_head d_value], with the gate
  query_bias: jax.Array  # [n_head d_key]
  key_value: jax.Array  # [c, n_head d_key + n_head d_value]
  output: jax.Array  # [n_head d_value, c]
  transition1: jax.Array  # [c, 2 c_hidden]
  transition2: jax.Array  # [c_hidden, c]


class AdaptiveTerms(NamedTuple):
  """What a block needs of the conditioning, each [n_atom, c]."""

  key_scale: jax.Array
  key_shift: jax.Array
  query_scale: jax.Array
  transition_scale: jax.Array
  query_shift: jax.Array
  transition_shift: jax.Array
  attention_gate: jax.Array
  transition_gate: jax.Array


class Conditioning(NamedTuple):
  """The conditioning of the atoms, and its layer norm, without scale."""

  single: jax.Array  # [n_atom, c_cond]
  normalised: jax.Array  # [n_atom, c_cond]


def block_weights(params: Params, name: str) -> list[BlockWeights]:
  """The blocks of `cross_att_transformer_parameters`, folded.

  Scales of layer norms go into the weights behind them, the factor of the
  logits into those of the queries.

  Args:
    params: those of the atom transformer.
    name: name of the module, which its blocks' parameters repeat.

  Returns:
    One per block.
  """
  own = pm.below(params, f'{STACK}{name}')

  def flat(module: str) -> jax.Array:
    weights = own[module]['weights']
    return weights.reshape(*weights.shape[:2], -1)

  def join(*arrays: jax.Array) -> jax.Array:
    return jnp.concatenate(arrays, -1)

  def condition(prefix: str, kind: str) -> jax.Array:
    scale = own[f'{prefix}single_cond_layer_norm']['scale']
    return scale[..., None] * own[f'{prefix}single_cond_{kind}']['weights']

  def bias(module: str) -> jax.Array:
    return own[module]['bias']

  n_block, _, n_head, d_key = own['q_projection']['weights'].shape
  factor = d_key**-0.5
  stacked = BlockWeights(
    key_condition=join(*(condition('k', x) for x in ('scale', 'bias'))),
    key_condition_bias=bias('ksingle_cond_scale'),
    condition=join(
      *(condition(x, kind) for kind in ('scale', 'bias') for x in ('q', 'ffw_'))
    ),
    condition_bias=join(
      *(bias(f'{x}single_cond_scale') for x in ('q', 'ffw_'))
    ),
    gate=join(*(flat(f'{x}adaptive_zero_cond') for x in ('', 'ffw_'))),
    gate_bias=join(*(bias(f'{x}adaptive_zero_cond') for x in ('', 'ffw_'))),
    query=join(factor * flat('q_projection'), flat('gating_query')),
    query_bias=factor * bias('q_projection').reshape(n_block, n_head * d_key),
    key_value=join(flat('k_projection'), flat('v_projection')),
    output=flat('transition2'),
    transition1=flat('ffw_transition1'),
    transition2=flat('ffw_transition2'),
  )
  return [jax.tree.map(operator.itemgetter(i), stacked) for i in range(n_block)]


def adaptive_terms(
  weights: BlockWeights, conditioning: Conditioning
) -> AdaptiveTerms:
  """All of a block that depends on the conditioning alone.

  Args:
    weights: of the block.
    conditioning: of the atoms.

  Returns:
    The terms; 8 of the 21 units of work of a block.
  """
  return AdaptiveTerms(
    *_key_terms(weights, conditioning), *_query_terms(weights, conditioning)
  )


def window_block(
  weights: BlockWeights,
  act: jax.Array,
  conditioning: AdaptiveTerms | Conditioning,
  bias: jax.Array,
  key_start: jax.Array,
  mask: jax.Array,
  *,
  chunk: int | None = None,
  remat: bool = True,
) -> jax.Array:
  """One block of the atom transformer on flat atoms.

  Keys and values of all atoms first, then everything else for a few windows at
  a time, so that intermediates stay in cache.

  Args:
    weights: of the block.
    act: [n_atom, c] float.
    conditioning: of the atoms, or its terms.
    bias: [n_window, n_head, num_queries, num_keys] pair logits.
    key_start: [n_window] int32, first key of each window.
    mask: [n_atom] bool, True for real atoms. Padding has zero keys and values,
      as upstream's padding when it is seen.
    chunk: windows at a time; see `components.windowed_attention`.
    remat: whether to keep nothing but `act` for the backward pass.

  Returns:
    New activations, [n_atom, c]; meaningless for padding.
  """
  n_window, n_head, n_query, n_key = bias.shape
  own_chunk = functional.chunk_size(
    n_window, chunk, on_cpu=windowed_attention.CPU_WINDOWS
  )

  def run(fn: Any, window: int | None, *arguments: Any) -> Any:
    if not remat:
      return mapping.whole_map(fn, window, *arguments)
    return mapping.chunked_map(fn, own_chunk, window, *arguments)

  def by_window(x: jax.Array) -> jax.Array:
    return x.reshape(n_window, n_query, *x.shape[1:])

  if isinstance(conditioning, AdaptiveTerms):
    for_keys, for_queries = conditioning[:2], conditioning[2:]
  else:
    for_keys = for_queries = conditioning
  act = by_window(act)
  rows = (act, *map(by_window, for_keys))
  fn = _KEYS_AND_VALUES[isinstance(conditioning, AdaptiveTerms)]
  keys, values = run(fn, None, weights, None, None, rows, by_window(mask))
  table = tuple(
    x.reshape(n_window * n_query, n_head, -1) for x in (keys, values)
  )
  rows = (act, bias, *map(by_window, for_queries))
  fn = _QUERIES[isinstance(conditioning, AdaptiveTerms)]
  act = run(fn, n_key, weights, table, key_start, rows, None)
  return act.reshape(n_window * n_query, -1)


def window_transformer(
  weights: Sequence[BlockWeights],
  act: jax.Array,
  biases: Sequence[jax.Array],
  key_start: jax.Array,
  mask: jax.Array,
  single_cond: jax.Array,
  terms: Sequence[AdaptiveTerms] | None = None,
  *,
  chunk: int | None = None,
  remat: bool = True,
) -> jax.Array:
  """The atom transformer on flat atoms (Alg. 7).

  Args:
    weights: of each block.
    act: [n_atom, c] float.
    biases: pair logits of each block; see `window_block`.
    key_start: [n_window] int32, first key of each window.
    mask: [n_atom] bool, True for real atoms.
    single_cond: [n_atom, c_cond] float.
    terms: of each block; None computes them here.
    chunk: windows at a time.
    remat: whether to recompute each block in the backward pass.

  Returns:
    [n_atom, c]; meaningless for padding.
  """
  if terms is None:
    shared = Conditioning(single_cond, numerics.layer_norm(single_cond))
    conditioning: Sequence[Any] = [shared] * len(weights)
  else:
    conditioning = terms
  for i, own in enumerate(weights):
    act = window_block(
      own,
      act,
      conditioning[i],
      biases[i],
      key_start,
      mask,
      chunk=chunk,
      remat=remat,
    )
  return act


def _key_terms(
  weights: BlockWeights, conditioning: Conditioning
) -> tuple[jax.Array, jax.Array]:
  """Scale and shift of the keys' layer norm."""
  x = conditioning.normalised
  y = x @ weights.key_condition.astype(x.dtype)
  scale, shift = jnp.split(y, 2, -1)
  return jax.nn.sigmoid(
    scale + weights.key_condition_bias.astype(x.dtype)
  ), shift


def _query_terms(
  weights: BlockWeights, conditioning: Conditioning
) -> tuple[jax.Array, ...]:
  """Scales and shifts of queries and transition, both output gates."""
  x, single = conditioning.normalised, conditioning.single
  y = x @ weights.condition.astype(x.dtype)
  scales, shifts = jnp.split(y, 2, -1)
  scales = jax.nn.sigmoid(scales + weights.condition_bias.astype(x.dtype))
  gates = single @ weights.gate.astype(x.dtype)
  gates = jax.nn.sigmoid(gates + weights.gate_bias.astype(x.dtype))
  return tuple(x for y in (scales, shifts, gates) for x in jnp.split(y, 2, -1))


def _keys_and_values(
  weights: BlockWeights, taken: None, floats: Any, mask: jax.Array
) -> list[jax.Array]:
  """Keys and values of some windows' own atoms, all heads together."""
  del taken
  act, scale, shift = floats
  x = scale * numerics.layer_norm(act) + shift
  x = jnp.where(mask[..., None], x, 0)
  y = _product(x, weights.key_value)
  return jnp.split(y, [weights.query_bias.shape[0]], -1)


def _keys_and_values_uncached(
  weights: BlockWeights, taken: None, floats: Any, mask: jax.Array
) -> list[jax.Array]:
  act, *conditioning = floats
  terms = _key_terms(weights, Conditioning(*conditioning))
  return _keys_and_values(weights, taken, (act, *terms), mask)


def _queries(
  weights: BlockWeights, taken: Any, floats: Any, constants: None
) -> jax.Array:
  """Attention and transition of the atoms of some windows."""
  del constants
  act, bias, q_scale, t_scale, q_shift, t_shift, a_gate, t_gate = floats
  n_head = bias.shape[1]
  x = q_scale * numerics.layer_norm(act) + q_shift
  width = weights.query_bias.shape[0]
  q, gate = jnp.split(_product(x, weights.query), [width], -1)
  q += weights.query_bias.astype(q.dtype)
  q = q.reshape(*q.shape[:2], n_head, -1)
  out = windowed_attention.attend(q, *taken, bias)
  out = out.reshape(gate.shape) * jax.nn.sigmoid(gate)
  act += a_gate * _product(out, weights.output)

  x = t_scale * numerics.layer_norm(act) + t_shift
  hidden = functional.swish_gate(_product(x, weights.transition1))
  return act + t_gate * _product(hidden, weights.transition2)


def _queries_uncached(
  weights: BlockWeights, taken: Any, floats: Any, constants: None
) -> jax.Array:
  act, bias, *conditioning = floats
  terms = _query_terms(weights, Conditioning(*conditioning))
  return _queries(weights, taken, (act, bias, *terms), constants)


# By whether the terms of the conditioning are given.
_KEYS_AND_VALUES = (_keys_and_values_uncached, _keys_and_values)
_QUERIES = (_queries_uncached, _queries)


def _product(x: jax.Array, weights: jax.Array) -> jax.Array:
  return x @ weights.astype(x.dtype)
