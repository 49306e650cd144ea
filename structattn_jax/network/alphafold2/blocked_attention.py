"""Attention of IPA over precomputed features: all rows at once, or in blocks.

The core of `network/invariant_point_attention.py`: softmax over whole rows of
keys of logits that have a scalar and point part (one product), a direct frame
distance, and a pair part, applied to scalar and point values and to the pair.

`attend` is the reference; `blocked_attend` gives the same numbers from a block
of query rows at a time, with its own backward pass, in memory proportional to
n_res x block. On CPU it is also faster from 256 residues on (1.4 to 1.8 times
forward, 1.7 to 1.9 with gradient; `make bench`), since a block's logits stay in
cache and every pair row is read from memory once.

Shapes: n_res residues as keys; n query rows; n_head heads; d features of
queries and keys; d_v of values; c channels of the pair.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import numerics

# As `numerics.layer_norm` has it.
_EPSILON = 1e-5


class PairGradientSlots(NamedTuple):
  """Zeros whose cotangents are the factors of the pair's gradient.

  A call of `blocked_attend` sends its attention weights and the gradient of its
  pair result here, see `share_pair`.
  """

  weights: jax.Array  # [n, n_head, n_res]
  gradient: jax.Array  # [n, n_head, c]


class Blocks(NamedTuple):
  """How many query rows to work on at a time."""

  forward: int
  backward: int


class Rows(NamedTuple):
  """What one query row needs; n rows are all residues or a block of them."""

  queries: jax.Array  # [n, n_head, d]
  translation: jax.Array  # [n, 3]
  mask: jax.Array  # [n] bool
  bias: jax.Array | None = None  # [n, n_head, n_res] precomputed pair logits
  # [n, n_head, c]: their products with the pair are logits too.
  pair_queries: jax.Array | None = None
  pair: jax.Array | None = None  # [n, n_res, c]
  # [n, n_res]: values are of the layer norm of the pair, and this is its
  # 1 / sqrt(variance + epsilon). Only with `pair_gradient`, as it has none.
  pair_inverse_deviation: jax.Array | None = None
  # Where the gradient of pair values goes instead of to the pair.
  pair_gradient: PairGradientSlots | None = None


class Context(NamedTuple):
  """What all query rows share."""

  keys: jax.Array  # [n_head, d, n_res]
  values: jax.Array  # [n_head, n_res, d_v]
  translation: jax.Array  # [n_res, 3]
  mask: jax.Array  # [n_res] bool
  distance_weight: jax.Array  # [n_head], factor of -|t_i - t_j|^2
  # [n_res, c], a pair that is the same for all rows.
  shared_pair: jax.Array | None = None
  # [n_head, c], pair queries that are the same for all rows.
  shared_pair_queries: jax.Array | None = None


class Result(NamedTuple):
  """What each query row collected."""

  values: jax.Array  # [n, n_head, d_v]
  pair: jax.Array | None  # [n, n_head, c]


def pair_logits(queries: jax.Array, pair: jax.Array) -> jax.Array:
  """[n, n_head, c] or [n_head, c] with [n, m, c] or [m, c].

  Returns [n, n_head, m] in float32. On CPU shared queries are three times
  faster than broadcast ones on a whole pair, and slower on a block of it.
  """
  of_rows = 'ihc' if queries.ndim == 3 else 'hc'
  keys = 'jc' if pair.ndim == 2 else 'ijc'
  return _einsum(f'{of_rows},{keys}->ihj', queries.astype(pair.dtype), pair)


def _pair_values(weights: jax.Array, pair: jax.Array) -> jax.Array:
  """[n, n_head, m] x [n, m, c] or [m, c] -> [n, n_head, c] in float32."""
  keys = 'jc' if pair.ndim == 2 else 'ijc'
  return _einsum(f'ihj,{keys}->ihc', weights.astype(pair.dtype), pair)


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Sums in float32 even where the factors are bfloat16."""
  accumulator = jnp.promote_types(b.dtype, jnp.float32)
  return jnp.einsum(spec, a, b, preferred_element_type=accumulator)


# Products with coordinates must not pass through TF32 or bfloat16 units.
_exact_einsum = functools.partial(jnp.einsum, precision='highest')


def _pair_of(rows: Rows, context: Context) -> jax.Array | None:
  return rows.pair if context.shared_pair is None else context.shared_pair


def _differences(a: jax.Array, b: jax.Array) -> list[jax.Array]:
  """a_i - b_j per coordinate, [n, m]: vectorises, unlike a last axis of 3."""
  return [a[:, None, x] - b[:, x] for x in range(3)]


def _pair_logits(rows: Rows, context: Context) -> jax.Array | None:
  """The term of the pair, [n, n_head, n_res]."""
  pair = _pair_of(rows, context)
  if rows.bias is not None:
    return rows.bias
  if pair is not None and rows.pair_queries is not None:
    return pair_logits(rows.pair_queries, pair)
  if pair is not None and context.shared_pair_queries is not None:
    return pair_logits(context.shared_pair_queries, pair)
  return None


def _logits(
  rows: Rows, context: Context, by_pair: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Logits [n, n_head, n_res] and squared frame distances [n, n_res]."""
  # From differences, not expanded: exact for near frames.
  dx, dy, dz = _differences(rows.translation, context.translation)
  squared = jnp.square(dx) + jnp.square(dy) + jnp.square(dz)
  logits = _exact_einsum('ihd,hdj->hij', rows.queries, context.keys)
  logits = jnp.swapaxes(logits, 0, 1)
  logits -= context.distance_weight[:, None] * squared[:, None]
  if by_pair is not None:
    logits += by_pair
  return logits, squared


def _key_mask(rows: Rows, context: Context) -> jax.Array:
  return (rows.mask[:, None] & context.mask)[:, None]


def _results(weights: jax.Array, rows: Rows, context: Context) -> Result:
  """Weighted values and pair rows; `weights` [n, n_head, n_res]."""
  by_head = jnp.swapaxes(weights, 0, 1)
  values = _exact_einsum('hij,hjd->hid', by_head, context.values)
  values = jnp.swapaxes(values, 0, 1)
  pair = _pair_of(rows, context)
  if pair is None:
    return Result(values, None)
  if rows.pair_inverse_deviation is None:
    return Result(values, _pair_values(weights, pair))
  # The mean over channels of a sum of rows is the sum of their means.
  by_pair = _pair_values(weights * rows.pair_inverse_deviation[:, None], pair)
  return Result(values, _centred(by_pair))


def _centred(x: Any) -> jax.Array:
  return x - jnp.mean(x, -1, keepdims=True)


def mask_pair(pair: jax.Array, rows: jax.Array, keys: jax.Array) -> jax.Array:
  """The pair [n, n_res, c], zero where either residue is masked.

  There it may hold anything, and zero times NaN would not be zero.
  """
  return jnp.where((rows[:, None] & keys)[..., None], pair, 0)


def attend(rows: Rows, context: Context) -> tuple[Result, jax.Array]:
  """Attention of all rows at once; also the weights [n, n_head, n_res]."""
  if rows.pair is not None:
    rows = rows._replace(pair=mask_pair(rows.pair, rows.mask, context.mask))
  logits, _ = _logits(rows, context, _pair_logits(rows, context))
  weights = numerics.masked_softmax(logits, _key_mask(rows, context))
  return _results(weights, rows, context), weights


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blocked_attend(blocks: Blocks, rows: Rows, context: Context) -> Result:
  """Attention of a block of rows at a time, over whole rows of keys.

  Needs no online softmax, reads every pair row once, and holds no array of
  size n_res x n_head x n_res. The backward pass recomputes the weights of a
  block from the log of the softmax denominator.
  """
  return _blocked_forward(blocks, rows, context)[0]


def _blocked_forward(
  blocks: Blocks, rows: Rows, context: Context
) -> tuple[Result, Any]:
  n_res, block = rows.mask.shape[0], blocks.forward
  starts, join = _schedule(n_res, block)

  def step(start: jax.Array) -> tuple[Result, jax.Array]:
    own = _block_of(rows, context, start, block)
    logits, _ = _logits(own, context, _pair_logits(own, context))
    mask = _key_mask(own, context)
    lowest = jnp.finfo(logits.dtype).min
    largest = jnp.max(logits, -1, where=mask, initial=lowest, keepdims=True)
    weights = jnp.where(mask, jnp.exp(logits - largest), 0)
    total = jnp.sum(weights, -1, keepdims=True)
    total = jnp.where(total > 0, total, 1)
    # Normalising the results costs less than normalising the weights.
    results = jax.tree.map(lambda x: x / total, _results(weights, own, context))
    return results, (largest + jnp.log(total))[..., 0]

  results, log_total = jax.tree.map(join, jax.lax.map(step, starts))
  return results, (rows, context, results, log_total)


@numerics.standard_promotion()
def _blocked_backward(
  blocks: Blocks, residuals: Any, gradient: Result
) -> tuple[Rows, Context]:
  rows, context, results, log_total = residuals
  n_res, block = rows.mask.shape[0], blocks.backward
  starts, join = _schedule(n_res, block)
  if rows.pair_inverse_deviation is not None:
    gradient = gradient._replace(pair=_centred(gradient.pair))
  # d softmax: ds = p (dp - delta) with delta = sum_j p dp = do . o.
  delta = jnp.sum(gradient.values * results.values, -1)
  if results.pair is not None:
    delta += jnp.sum(gradient.pair * results.pair, -1)
  per_row = (gradient, delta, log_total)

  def step(carry: _Carry, scheduled: jax.Array) -> tuple[_Carry, Any]:
    start, owned_from = scheduled
    own = _block_of(rows, context, start, block)
    own_gradient, own_delta, own_log = _rows_from(per_row, start, block)
    # The first block may overlap rows that a later one owns.
    is_owned = (start + jnp.arange(block) >= owned_from)[:, None]
    own_gradient = jax.tree.map(
      lambda x: jnp.where(is_owned[..., None], x, 0), own_gradient
    )
    own_delta = jnp.where(is_owned, own_delta, 0)

    pair = _pair_of(own, context)
    by_pair, d_by_pair = own.bias, None
    if pair is not None and by_pair is None and own.pair_queries is not None:
      # One product with the pair instead of two.
      queries = own.pair_queries.astype(own_gradient.pair.dtype)
      both = pair_logits(jnp.concatenate([queries, own_gradient.pair], 1), pair)
      by_pair, d_by_pair = jnp.split(both, 2, 1)
    elif pair is not None:
      d_by_pair = pair_logits(own_gradient.pair, pair)
    logits, squared = _logits(own, context, by_pair)
    weights = jnp.exp(logits - own_log[..., None])
    weights = jnp.where(_key_mask(own, context), weights, 0)
    d_weights = jnp.swapaxes(
      _exact_einsum('ihd,hjd->hij', own_gradient.values, context.values), 0, 1
    )
    if d_by_pair is not None:
      if own.pair_inverse_deviation is not None:
        d_by_pair *= own.pair_inverse_deviation[:, None]
      d_weights += d_by_pair
    d_logits = weights * (d_weights - own_delta[..., None])

    # Queries, keys and values.
    by_head = jnp.swapaxes(d_logits, 0, 1)
    d_queries = _exact_einsum('hij,hdj->ihd', by_head, context.keys)
    d_keys = carry.keys + _exact_einsum('hij,ihd->hdj', by_head, own.queries)
    d_values = carry.values + _exact_einsum(
      'ihj,ihd->hjd', weights, own_gradient.values
    )

    # Distances between frames.
    d_distance_weight = carry.distance_weight - jnp.sum(
      d_logits * squared[:, None], (0, 2)
    )
    d_squared = -jnp.sum(d_logits * context.distance_weight[:, None], 1)
    d_differences = [
      2 * d_squared * difference
      for difference in _differences(own.translation, context.translation)
    ]
    d_own_translation = jnp.stack([jnp.sum(d, 1) for d in d_differences], -1)
    d_translation = carry.translation - jnp.stack(
      [jnp.sum(d, 0) for d in d_differences], -1
    )

    # The pair: one product for what logits and values send back.
    d_pair_queries, d_shared_queries = None, carry.shared_pair_queries
    d_pair, d_shared = carry.pair, carry.shared_pair
    d_slots = None
    if own.pair_gradient is not None:
      d_slots = PairGradientSlots(weights, own_gradient.pair)
    elif pair is not None:
      sent, by = [weights], [own_gradient.pair]
      if own.bias is None and own.pair_queries is not None:
        sent, by = [d_logits, weights], [own.pair_queries, own_gradient.pair]
        d_pair_queries = _pair_values(d_logits, pair)
        if d_shared_queries is not None:
          d_shared_queries += jnp.sum(d_pair_queries, 0)
          d_pair_queries = None
      sent = jnp.swapaxes(jnp.concatenate(sent, 1), 1, 2).astype(pair.dtype)
      by = jnp.concatenate([x.astype(pair.dtype) for x in by], 1)
      if d_shared is not None:
        d_shared += _einsum('ijh,ihc->jc', sent, by)
      elif d_pair is not None:
        rows_sent = _einsum('ijh,ihc->ijc', sent, by).astype(pair.dtype)
        d_pair = jax.lax.dynamic_update_slice_in_dim(
          d_pair, rows_sent, start, 0
        )
    total = _Carry(
      d_keys,
      d_values,
      d_translation,
      d_distance_weight,
      d_shared,
      d_shared_queries,
      d_pair,
    )
    d_bias = None if rows.bias is None else d_logits
    return numerics.cast_like(total, carry), (
      d_queries,
      d_own_translation,
      d_bias,
      d_pair_queries,
      d_slots,
    )

  carry = _Carry(
    *jax.tree.map(
      jnp.zeros_like,
      (
        context.keys,
        context.values,
        context.translation,
        context.distance_weight,
        context.shared_pair,
        context.shared_pair_queries,
        None if rows.pair_gradient else rows.pair,
      ),
    )
  )
  # Sums over blocks; each block writes its own rows of the pair.
  summed = jax.tree.map(numerics.at_least_float32, carry._replace(pair=None))
  carry = summed._replace(pair=carry.pair)
  owned_from = _owned_from(starts, n_res, block)
  carry, by_row = jax.lax.scan(step, carry, jnp.stack([starts, owned_from], 1))
  d_queries, d_translation, d_bias, d_pair_queries, d_slots = jax.tree.map(
    join, by_row
  )

  def like(gradient: jax.Array | None, primal: jax.Array | None) -> Any:
    if primal is None:
      return None
    if gradient is None:
      return jnp.zeros_like(primal)
    return gradient.astype(primal.dtype)

  none: Any = np.zeros(rows.mask.shape, jax.dtypes.float0)  # Of a mask.
  gradients = (
    Rows(
      d_queries,
      d_translation,
      none,
      like(d_bias, rows.bias),
      like(d_pair_queries, rows.pair_queries),
      like(carry.pair, rows.pair),
      like(None, rows.pair_inverse_deviation),
      d_slots,
    ),
    Context(
      carry.keys,
      carry.values,
      carry.translation,
      none,
      carry.distance_weight,
      like(carry.shared_pair, context.shared_pair),
      like(carry.shared_pair_queries, context.shared_pair_queries),
    ),
  )
  return numerics.cast_like(gradients, (rows, context))


blocked_attend.defvjp(_blocked_forward, _blocked_backward)


class SharedPair(NamedTuple):
  """What calls of `blocked_attend` with one pair share, see `share_pair`."""

  bias: jax.Array  # [n_res, n_head, n_res], for the rows' `bias`
  # [n_res, n_res], for their `pair_inverse_deviation`; None: no layer norm
  inverse_deviation: jax.Array | None
  # Of each call, along a new first axis, for their `pair_gradient`.
  slots: PairGradientSlots


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def share_pair(
  blocks: Blocks,
  num_calls: int,
  normalise: bool,
  pair: jax.Array,
  weights: jax.Array,
  mask: jax.Array,
) -> SharedPair:
  """Lets calls of `blocked_attend` with one pair share its logits and gradient.

  The gradient of the weighted pair rows, sum_j w_j z_j, is an outer product per
  call, as large as the pair. Here the factors of all calls are collected, and
  their sum is one product for a block of rows at a time. A layer norm of the
  pair, too, is applied and differentiated on the way: its result is never
  stored.

  Args:
    blocks: static.
    num_calls: static; calls that share the pair.
    normalise: static; whether logits and values are of the layer norm of the
      pair, without scale and offset.
    pair: [n_res, n_res, c] float. The calls take it without a gradient, as
      `jax.lax.stop_gradient(pair)`.
    weights: [n_head, c] float, from the pair to its logits.
    mask: [n_res] bool; pairs of masked residues may hold anything.

  Returns:
    What the calls need beside the pair.
  """
  return _share_forward(blocks, num_calls, normalise, pair, weights, mask)[0]


def _share_forward(blocks, num_calls, normalise, pair, weights, mask):
  n_res, _, c = pair.shape
  block = blocks.forward
  n_head, dtype = weights.shape[0], numerics.at_least_float32(pair).dtype
  starts, join = _schedule(n_res, block)
  matrix = _centred(weights) if normalise else weights

  def step(start: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    own = mask_pair(*_rows_from((pair, mask), start, block), mask)
    by_row = jnp.broadcast_to(matrix, (block, *matrix.shape))
    logits = pair_logits(by_row, own)
    if not normalise:
      return logits, None
    _, inverse_deviation = _normalised(own)
    return logits * inverse_deviation[:, None], inverse_deviation

  bias, inverse_deviation = jax.tree.map(join, jax.lax.map(step, starts))
  slots = PairGradientSlots(
    jnp.zeros((num_calls, n_res, n_head, n_res), dtype),
    jnp.zeros((num_calls, n_res, n_head, c), dtype),
  )
  return SharedPair(bias, inverse_deviation, slots), (pair, weights, mask)


@numerics.standard_promotion()
def _share_backward(blocks, num_calls, normalise, residuals, found):
  del num_calls
  pair, weights, mask = residuals
  n_res, block = pair.shape[0], blocks.backward
  starts, _ = _schedule(n_res, block)
  matrix = _centred(weights) if normalise else weights
  by_row = jnp.broadcast_to(matrix, (1, block, *matrix.shape))

  def step(carry, scheduled):
    d_pair, d_matrix = carry
    start, owned_from = scheduled
    own = mask_pair(*_rows_from((pair, mask), start, block), mask)
    own = numerics.at_least_float32(own)
    is_owned = start + jnp.arange(block) >= owned_from
    sent, by = (
      jax.lax.dynamic_slice_in_dim(x, start, block, 1) for x in found.slots
    )
    d_bias = _rows_from(found.bias, start, block)
    d_bias = jnp.where(is_owned[:, None, None], d_bias, 0)
    sent = jnp.concatenate([d_bias[None], sent]).astype(pair.dtype)
    by = jnp.concatenate([by_row.astype(by.dtype), by]).astype(pair.dtype)
    d_own = _einsum('tihj,tihc->ijc', sent, by)
    if normalise:
      own, inverse_deviation = _normalised(own)
      along = jnp.mean(d_own * own, -1, keepdims=True)
      d_own = inverse_deviation[..., None] * (d_own - own * along)
    d_matrix += jnp.einsum('ihj,ijc->hc', d_bias, own).astype(d_matrix.dtype)
    d_pair = jax.lax.dynamic_update_slice_in_dim(
      d_pair, d_own.astype(pair.dtype), start, 0
    )
    return (d_pair, d_matrix), None

  owned_from = _owned_from(starts, n_res, block)
  carry = (
    jnp.zeros_like(pair),
    numerics.at_least_float32(jnp.zeros_like(weights)),
  )
  (d_pair, d_matrix), _ = jax.lax.scan(
    step, carry, jnp.stack([starts, owned_from], 1)
  )
  d_weights = _centred(d_matrix) if normalise else d_matrix
  none: Any = np.zeros(mask.shape, jax.dtypes.float0)
  return d_pair, d_weights.astype(weights.dtype), none


share_pair.defvjp(_share_forward, _share_backward)


def _normalised(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Layer norm of [..., c] and its 1 / sqrt(variance + epsilon), [...]."""
  x = _centred(numerics.at_least_float32(x))
  inverse_deviation = jax.lax.rsqrt(jnp.mean(jnp.square(x), -1) + _EPSILON)
  return x * inverse_deviation[..., None], inverse_deviation


class _Carry(NamedTuple):
  """Gradients that all blocks of rows add to."""

  keys: jax.Array
  values: jax.Array
  translation: jax.Array
  distance_weight: jax.Array
  shared_pair: jax.Array | None
  shared_pair_queries: jax.Array | None
  pair: jax.Array | None  # Each block writes its own rows.


def _rows_from(tree: Any, start: jax.Array, block: int) -> Any:
  return jax.tree.map(
    lambda x: jax.lax.dynamic_slice_in_dim(x, start, block), tree
  )


def _block_of(rows: Rows, context: Context, start: jax.Array, n: int) -> Rows:
  own: Rows = _rows_from(rows, start, n)
  if own.pair is not None:
    own = own._replace(pair=mask_pair(own.pair, own.mask, context.mask))
  shared = context.shared_pair_queries
  if shared is not None:
    own = own._replace(
      pair_queries=jnp.broadcast_to(shared, (n, *shared.shape))
    )
  return own


def _schedule(n_res: int, block: int) -> tuple[jax.Array, Any]:
  """First rows of all blocks, and how to join what the blocks return.

  If `block` does not divide `n_res`, a block of the last rows comes first,
  overlapping rows that a later block owns: no padding, so no copy of the pair.
  """
  rest = n_res % block
  starts = np.arange(0, n_res - rest, block)
  if not rest:
    return jnp.asarray(starts), lambda x: x.reshape(n_res, *x.shape[2:])

  def join(x: jax.Array) -> jax.Array:
    whole = x[1:].reshape(n_res - rest, *x.shape[2:])
    return jnp.concatenate([whole, x[0, block - rest :]])

  return jnp.asarray([n_res - block, *starts]), join


def _owned_from(starts: jax.Array, n_res: int, block: int) -> jax.Array:
  """First row of each block that no later block has."""
  if n_res % block == 0:
    return starts
  return starts.at[0].set(n_res // block * block)
