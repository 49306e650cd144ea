"""Segment operations: pooling atoms into tokens and broadcasting back.

The ragged map "which token does atom i belong to" is a vector of segment ids.
Everything here works on it directly: nothing of size atoms x tokens is ever
allocated, atoms may come in any order, tokens may be empty.

Shapes: n rows (atoms), n_segment segments (tokens), any trailing axes.
Batches come from `jax.vmap`.

Options common to all operations (keyword arguments, `SegmentOptions`):
  mask: [n] bool, True = keep; masked rows contribute nothing, whatever they
    hold. None keeps all rows.
  indices_are_sorted: the caller's promise that ids never decrease, which saves
    a sort or a slower scatter. Checked on the host whenever the ids are
    concrete. False, the default, is right for any order.
  implementation: how sums over segments are formed. All give the same numbers
    up to the rounding of the order of summation.
      'segment': XLA scatter-add, `jax.ops.segment_sum` with the checks and
        masks of this module. The fastest on CPU.
      'dense': rows are gathered into [n_segment, max_per_segment] slots and
        summed there; neither the operation nor its gradient scatters. For GPUs
        whose float32 scatter-add is a compare-and-swap loop.
      'matmul': products with one-hot blocks of at most 2^21 entries; neither
        sorts nor scatters. For few segments on matrix units.
      None: 'segment', or 'dense' on GPU when `max_per_segment` is given.
  max_per_segment: static size of the slots of 'dense', at least the largest
    number of kept rows of any segment (`max_segment_size` computes it on the
    host). Found automatically from concrete ids; required under `jit`. If it
    is too small, concrete ids raise an error that says the number needed;
    under `jit` the segments that do not fit become NaN rather than wrong.

'dense' and 'matmul' define their own transposes and so support reverse-mode
differentiation only; 'segment' supports both modes.
"""

import functools
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import checks, numerics

Implementation = Literal['segment', 'dense', 'matmul']
IMPLEMENTATIONS: tuple[Implementation, ...] = ('segment', 'dense', 'matmul')

# Entries of the largest one-hot block of 'matmul': 8 MB in float32.
_ONE_HOT_ENTRIES = 2**21


class SegmentOptions(TypedDict, total=False):
  """Keyword arguments common to all segment operations (module docstring)."""

  mask: jax.Array | np.ndarray | None
  indices_are_sorted: bool
  implementation: Implementation | None
  max_per_segment: int | None


def segment_sum(
  values: jax.Array,
  segment_ids: jax.Array,
  num_segments: int,
  **options: Unpack[SegmentOptions],
) -> jax.Array:
  """Sum of the kept rows of each segment; empty segments give zeros.

  s_t = sum_{i: id_i = t} mask_i v_i

    >>> values = jnp.array([[1.0], [2.0], [4.0]])
    >>> segment_sum(values, jnp.array([0, 2, 0]), 3)[:, 0].tolist()
    [5.0, 0.0, 2.0]

  Args:
    values: [n, ...] float, any unit; the unit is kept.
    segment_ids: [n] integer in [0, num_segments), any order.
    num_segments: static Python int, the (padded) number of segments.
    **options: see the module docstring.

  Returns:
    [num_segments, ...] in the dtype of `values`, accumulated in float32.

  Raises:
    ValueError: on a wrong shape, on concrete ids that are out of range or
      not sorted as promised, or on a too small `max_per_segment`.
    TypeError: on a wrong dtype.
  """
  wide, segments = _rows('values', values, segment_ids, num_segments, options)
  return _sum(wide, segments).astype(jnp.result_type(values))


def segment_mean(
  values: jax.Array,
  segment_ids: jax.Array,
  num_segments: int,
  **options: Unpack[SegmentOptions],
) -> jax.Array:
  """Mean of the kept rows of each segment; empty segments give zeros.

  m_t = sum_{i: id_i = t} mask_i v_i / max(sum_{i: id_i = t} mask_i, 1)

  Arguments, result and errors as `segment_sum`.
  """
  wide, segments = _rows('values', values, segment_ids, num_segments, options)
  total = _sum(wide, segments)
  ones = jnp.ones(wide.shape[:1], wide.dtype)
  count = _sum(ones, segments)
  count = _expand(jnp.maximum(count, 1), wide.ndim)
  return (total / count).astype(jnp.result_type(values))


def segment_max(
  values: jax.Array,
  segment_ids: jax.Array,
  num_segments: int,
  **options: Unpack[SegmentOptions],
) -> jax.Array:
  """Largest kept value of each segment; empty segments give zeros.

  Where several rows share the largest value, they share the gradient equally.

  Arguments, result and errors as `segment_sum`.
  """
  wide, segments = _rows('values', values, segment_ids, num_segments, options)
  largest = _max(jax.lax.stop_gradient(wide), *segments)
  # The maximum is linear in the rows that attain it; the sum below carries the
  # gradient, and the correction (zero up to rounding) makes the value exact.
  attained = wide == largest[segments.ids]
  attained &= _expand(segments.keep, wide.ndim)
  share = attained.astype(wide.dtype)
  ties = _sum(share, segments)
  share /= jnp.maximum(ties, 1)[segments.ids]
  linear = _sum(wide * share, segments)
  linear += jax.lax.stop_gradient(largest - linear)
  return linear.astype(jnp.result_type(values))


def segment_softmax(
  logits: jax.Array,
  segment_ids: jax.Array,
  num_segments: int,
  **options: Unpack[SegmentOptions],
) -> jax.Array:
  """Softmax over the kept rows of each segment; masked rows get zero.

  w_i = mask_i exp(l_i) / sum_{j: id_j = id_i} mask_j exp(l_j)

  Args:
    logits: [n, ...] float; each trailing entry is normalised by itself.
    segment_ids: [n] integer in [0, num_segments), any order.
    num_segments: static Python int, the number of segments.
    **options: see the module docstring.

  Returns:
    [n, ...] weights, float32 (float64 for float64 logits).

  Raises:
    ValueError: as `segment_sum`.
    TypeError: as `segment_sum`.
  """
  return _softmax(*_rows('logits', logits, segment_ids, num_segments, options))


def segment_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array,
  **options: Unpack[SegmentOptions],
) -> tuple[jax.Array, jax.Array]:
  """Attention of each segment's query over the rows of that segment.

  w_ih = softmax over {i: id_i = t} of q_th . k_ih / sqrt(d_head)
  o_th = sum_{i: id_i = t} w_ih v_ih

  Args:
    query: [n_segment, n_head, d_head] float.
    key: [n, n_head, d_head] float.
    value: [n, n_head, d_value] float.
    segment_ids: [n] integer in [0, n_segment), any order.
    **options: see the module docstring.

  Returns:
    The output [n_segment, n_head, d_value] in the dtype of `value`, zero for
    empty segments, and the weights [n, n_head], float32.

  Raises:
    ValueError: as `segment_sum`.
    TypeError: as `segment_sum`.
  """
  checks.check_shapes(
    query=(query, 'n_segment n_head d_head'),
    key=(key, 'n n_head d_head'),
    value=(value, 'n n_head d_value'),
    segment_ids=(segment_ids, 'n'),
  )
  checks.check_dtypes('floating', query=query, key=key, value=value)
  segments = _prepare(segment_ids, query.shape[0], **options)
  wide = numerics.at_least_float32
  own_query = _gather(wide(query), segments)
  logits = jnp.sum(own_query * wide(key), -1) * query.shape[-1] ** -0.5
  weights = _softmax(logits, segments)
  output = _sum(weights[..., None] * wide(value), segments)
  return output.astype(value.dtype), weights


def segment_broadcast(
  tokens: jax.Array,
  segment_ids: jax.Array,
  **options: Unpack[SegmentOptions],
) -> jax.Array:
  """Gives each row the value of its segment; masked rows get zeros.

  y_i = mask_i x_{id_i}

  The transpose of `segment_sum`: its gradient is that sum, formed by the same
  implementation.

  Args:
    tokens: [n_segment, ...] float, any unit; the unit is kept.
    segment_ids: [n] integer in [0, n_segment), any order.
    **options: see the module docstring.

  Returns:
    [n, ...] in the dtype of `tokens`.

  Raises:
    ValueError: as `segment_sum`.
    TypeError: as `segment_sum`.
  """
  checks.check_shapes(
    tokens=(tokens, 'n_segment ...'), segment_ids=(segment_ids, 'n')
  )
  checks.check_dtypes('floating', tokens=tokens)
  segments = _prepare(segment_ids, tokens.shape[0], **options)
  return _gather(tokens, segments)


def max_segment_size(
  segment_ids: Any, num_segments: int, *, mask: Any = None
) -> int:
  """Largest number of kept rows in any segment, computed on the host.

  Args:
    segment_ids: [n] integer in [0, num_segments), concrete.
    num_segments: number of segments.
    mask: [n] bool, True = keep, concrete; None keeps all rows.

  Returns:
    The number that `max_per_segment` must not fall below (at least 1).
  """
  ids = np.asarray(segment_ids)
  if mask is not None:
    ids = ids[np.asarray(mask)]
  counts = np.bincount(ids, minlength=num_segments)
  return max(int(counts.max(initial=0)), 1)


class Slots(NamedTuple):
  """Rows arranged by segment, for the dense forms.

  Attributes:
    index: [n_segment, max_per_segment] int32, the row in each slot; empty slots
      hold n, which a gather with mode 'fill' reads as zero.
    mask: [n_segment, max_per_segment] bool, True for used slots.
    overflow: [n_segment] bool, True where the rows do not fit the slots.
  """

  index: jax.Array
  mask: jax.Array
  overflow: jax.Array


def segment_slots(
  segment_ids: jax.Array,
  num_segments: int,
  **options: Unpack[SegmentOptions],
) -> Slots:
  """Arranges the kept rows of each segment in slots, in their given order.

  Args:
    segment_ids: [n] integer in [0, num_segments), any order.
    num_segments: static Python int, the number of segments.
    **options: see the module docstring; the implementation is 'dense'.

  Returns:
    The slots.

  Raises:
    ValueError: as `segment_sum`; without `max_per_segment` under `jit`.
  """
  checks.check_shapes(segment_ids=(segment_ids, 'n'))
  options['implementation'] = 'dense'
  segments = _prepare(segment_ids, num_segments, **options)
  return _slots(*segments)


def take_slots(rows: jax.Array, slots: Slots) -> jax.Array:
  """Gathers rows [n, ...] into [n_segment, max_per_segment, ...], 0 if empty.

  Every row is in at most one slot, so the gradient is a scatter without
  collisions.
  """
  if not rows.shape[0]:  # XLA cannot gather from nothing.
    return jnp.zeros((*slots.index.shape, *rows.shape[1:]), rows.dtype)
  return rows.at[slots.index].get(mode='fill', fill_value=0)


class _Plan(NamedTuple):
  """The static part of an operation; hashable, so that jit can key on it."""

  implementation: Implementation
  num_segments: int
  max_per_segment: int
  is_sorted: bool
  # Sorted even after dropped rows have been sent out of range.
  stays_sorted: bool


class _Segments(NamedTuple):
  ids: jax.Array  # [n] int32 in range
  keep: jax.Array  # [n] bool
  plan: _Plan


def _rows(
  name: str,
  rows: jax.Array,
  segment_ids: jax.Array,
  num_segments: int,
  options: SegmentOptions,
) -> tuple[jax.Array, _Segments]:
  """Checks rows [n, ...] called `name` and their ids; rows as float32."""
  checks.check_shapes(
    **{name: (rows, 'n ...'), 'segment_ids': (segment_ids, 'n')}
  )
  checks.check_dtypes('floating', **{name: rows})
  segments = _prepare(segment_ids, num_segments, **options)
  return numerics.at_least_float32(rows), segments


def _prepare(
  segment_ids: jax.Array,
  num_segments: int,
  *,
  mask: jax.Array | np.ndarray | None = None,
  indices_are_sorted: bool = False,
  implementation: Implementation | None = None,
  max_per_segment: int | None = None,
) -> _Segments:
  """Checks the options, on the host where values are concrete."""
  checks.check_shapes(segment_ids=(segment_ids, 'n'), mask=(mask, 'n'))
  checks.check_dtypes('integer', segment_ids=segment_ids)
  checks.check_dtypes('bool', mask=mask)
  if implementation is None:
    on_gpu = jax.default_backend() == 'gpu'
    implementation = 'dense' if on_gpu and max_per_segment else 'segment'
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'implementation: expected one of {", ".join(IMPLEMENTATIONS)} or '
      f'None, got {implementation!r}'
    )
  known = checks.is_concrete(segment_ids)
  if known:
    checks.validate_segment_ids(segment_ids, num_segments)
    if indices_are_sorted:
      checks.validate_sorted(segment_ids)
  if implementation == 'dense':
    if known and checks.is_concrete(mask):
      needed = max_segment_size(segment_ids, num_segments, mask=mask)
      if max_per_segment is None:
        max_per_segment = needed
      elif max_per_segment < needed:
        raise ValueError(
          f'max_per_segment: {max_per_segment} is too small, the largest '
          f'segment has {needed} rows; give max_per_segment={needed}'
        )
    elif max_per_segment is None:
      raise ValueError(
        "max_per_segment: required by 'dense' under jit; compute it on the "
        'host with max_segment_size(segment_ids, num_segments)'
      )
  ids = jnp.asarray(segment_ids, jnp.int32)
  # Ids out of range can only come in traced; they are dropped.
  keep = (ids >= 0) & (ids < num_segments)
  if mask is not None:
    keep &= jnp.asarray(mask)
  ids = jnp.clip(ids, 0, max(num_segments - 1, 0))
  plan = _Plan(
    implementation,
    num_segments,
    max_per_segment or 1,
    indices_are_sorted,
    indices_are_sorted and mask is None,
  )
  return _Segments(ids, keep, plan)


def _expand(x: jax.Array, ndim: int) -> jax.Array:
  """Adds trailing axes until there are `ndim`, for broadcasting."""
  return x.reshape(*x.shape, *(1,) * (ndim - x.ndim))


def _softmax(logits: jax.Array, segments: _Segments) -> jax.Array:
  ids, keep = segments.ids, _expand(segments.keep, logits.ndim)
  logits = jnp.where(keep, logits, 0)
  # A constant per segment leaves the softmax unchanged, so no gradient.
  largest = _max(jax.lax.stop_gradient(logits), *segments)
  unnormalised = jnp.where(keep, jnp.exp(logits - largest[ids]), 0)
  total = _sum(unnormalised, segments)
  total = _gather(jnp.where(total > 0, total, 1), segments)
  return unnormalised / jnp.where(keep, total, 1)


def _sum(values: jax.Array, segments: _Segments) -> jax.Array:
  if segments.plan.implementation == 'segment':
    return _scatter_sum(values, *segments)
  return _transposable_sum(values, *segments)


def _gather(tokens: jax.Array, segments: _Segments) -> jax.Array:
  if segments.plan.implementation == 'segment':
    return _plain_gather(tokens, *segments)
  return _transposable_gather(tokens, *segments)


# Dropped rows are sent out of range, where a scatter drops them and a gather
# fills with zeros: masking the values instead would copy all of them.
def _in_range(ids: jax.Array, keep: jax.Array, plan: _Plan) -> jax.Array:
  return jnp.where(keep, ids, plan.num_segments)


@functools.partial(jax.jit, static_argnames='plan')
def _scatter_sum(
  values: jax.Array, ids: jax.Array, keep: jax.Array, plan: _Plan
) -> jax.Array:
  return jax.ops.segment_sum(
    values,
    _in_range(ids, keep, plan),
    plan.num_segments,
    indices_are_sorted=plan.stays_sorted,
  )


@functools.partial(jax.jit, static_argnames='plan')
def _plain_gather(
  tokens: jax.Array, ids: jax.Array, keep: jax.Array, plan: _Plan
) -> jax.Array:
  return tokens.at[_in_range(ids, keep, plan)].get(
    indices_are_sorted=plan.stays_sorted, mode='fill', fill_value=0
  )


# Sum and gather are each other's transpose. Saying so keeps the scatter that
# autodiff would make of a gather out of the gradients of 'dense' and 'matmul'.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _transposable_sum(
  values: jax.Array, ids: jax.Array, keep: jax.Array, plan: _Plan
) -> jax.Array:
  form = {'dense': _dense_sum, 'matmul': _matmul_sum}[plan.implementation]
  return form(values, ids, keep, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _transposable_gather(
  tokens: jax.Array, ids: jax.Array, keep: jax.Array, plan: _Plan
) -> jax.Array:
  return _plain_gather(tokens, ids, keep, plan)


_transposable_sum.defvjp(
  lambda values, ids, keep, plan: (
    _transposable_sum(values, ids, keep, plan),
    (ids, keep),
  ),
  lambda plan, residuals, g: (
    _transposable_gather(g, *residuals, plan),
    None,
    None,
  ),
)
_transposable_gather.defvjp(
  lambda tokens, ids, keep, plan: (
    _transposable_gather(tokens, ids, keep, plan),
    (ids, keep),
  ),
  lambda plan, residuals, g: (
    _transposable_sum(numerics.at_least_float32(g), *residuals, plan).astype(
      g.dtype
    ),
    None,
    None,
  ),
)


def _slots(ids: jax.Array, keep: jax.Array, plan: _Plan) -> Slots:
  n = ids.shape[0]
  shape = (plan.num_segments, plan.max_per_segment)
  if not n:
    empty = jnp.zeros(shape, bool)
    return Slots(empty.astype(jnp.int32), empty, empty[:, 0])
  order = jnp.arange(n, dtype=jnp.int32)
  # Dropped rows sort behind the last segment and take no slot.
  ids = _in_range(ids, keep, plan)
  if not plan.stays_sorted:
    ids, order = jax.lax.sort_key_val(ids, order, is_stable=True)
  segments = jnp.arange(plan.num_segments, dtype=jnp.int32)
  start = jnp.searchsorted(ids, segments, side='left')
  size = jnp.searchsorted(ids, segments, side='right') - start
  slot = jnp.arange(plan.max_per_segment, dtype=jnp.int32)
  mask = slot[None] < size[:, None]
  index = order.at[start[:, None] + slot[None]].get(mode='fill', fill_value=n)
  return Slots(jnp.where(mask, index, n), mask, size > plan.max_per_segment)


@functools.partial(jax.jit, static_argnames='plan')
def _dense_sum(
  values: jax.Array, ids: jax.Array, keep: jax.Array, plan: _Plan
) -> jax.Array:
  slots = _slots(ids, keep, plan)
  total = jnp.sum(take_slots(values, slots), 1)
  return jnp.where(_expand(slots.overflow, total.ndim), jnp.nan, total)


@functools.partial(jax.jit, static_argnames='plan')
def _matmul_sum(
  values: jax.Array, ids: jax.Array, keep: jax.Array, plan: _Plan
) -> jax.Array:
  n, num_segments = values.shape[0], plan.num_segments
  if not n:
    return jnp.zeros((num_segments, *values.shape[1:]), values.dtype)
  flat = jnp.where(_expand(keep, values.ndim), values, 0).reshape(n, -1)
  size = min(max(_ONE_HOT_ENTRIES // max(num_segments, 1), 1), n)
  chunks = -(-n // size)
  padding = chunks * size - n
  flat = jnp.pad(flat, ((0, padding), (0, 0))).reshape(chunks, size, -1)
  ids = jnp.pad(ids, (0, padding)).reshape(chunks, size)

  def add(total, chunk):
    chunk_ids, rows = chunk
    one_hot = jax.nn.one_hot(chunk_ids, num_segments, dtype=rows.dtype)
    return total + jnp.einsum(
      'nt,nc->tc', one_hot, rows, precision='highest'
    ), None

  zero = jnp.zeros((num_segments, flat.shape[-1]), flat.dtype)
  total, _ = jax.lax.scan(add, zero, (ids, flat))
  return total.reshape(num_segments, *values.shape[1:])


@functools.partial(jax.jit, static_argnames='plan')
def _max(
  values: jax.Array, ids: jax.Array, keep: jax.Array, plan: _Plan
) -> jax.Array:
  """Segment maximum without gradient; zeros for empty segments."""
  lowest = -jnp.inf
  if plan.implementation == 'segment':
    largest = jax.ops.segment_max(
      values,
      _in_range(ids, keep, plan),
      plan.num_segments,
      indices_are_sorted=plan.stays_sorted,
    )
    return jnp.where(largest == lowest, 0, largest)
  kept = jnp.where(_expand(keep, values.ndim), values, lowest)
  if plan.implementation == 'dense':
    slots = _slots(ids, keep, plan)
    rows = jnp.where(
      _expand(slots.mask, kept.ndim + 1), take_slots(kept, slots), lowest
    )
    largest = jnp.max(rows, 1)
    largest = jnp.where(_expand(slots.overflow, kept.ndim), jnp.nan, largest)
  else:
    largest = _sorted_max(kept, ids, plan)
  return jnp.where(largest == lowest, 0, largest)


def _sorted_max(kept: jax.Array, ids: jax.Array, plan: _Plan) -> jax.Array:
  """Running maximum that restarts at each segment: no scatter, no slots."""
  if not plan.is_sorted:
    order = jnp.argsort(ids, stable=True)
    ids, kept = ids[order], kept[order]

  def combine(left, right):
    left_id, left_max = left
    right_id, right_max = right
    same = _expand(left_id == right_id, left_max.ndim)
    return right_id, jnp.where(
      same, jnp.maximum(left_max, right_max), right_max
    )

  if not ids.size:
    return jnp.full((plan.num_segments, *kept.shape[1:]), -jnp.inf, kept.dtype)
  _, running = jax.lax.associative_scan(combine, (ids, kept))
  segments = jnp.arange(plan.num_segments, dtype=ids.dtype)
  last = jnp.searchsorted(ids, segments, side='right') - 1
  found = (last >= 0) & (ids[last] == segments)
  return jnp.where(_expand(found, kept.ndim), running[last], -jnp.inf)
