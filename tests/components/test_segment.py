"""Every implementation of the segment operations against float64 NumPy."""

import functools

import haiku as hk
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from structattn_jax.components import segment
from structattn_jax.reference import segment as reference

IMPLEMENTATIONS = segment.IMPLEMENTATIONS
OPERATIONS = {
  'sum': (segment.segment_sum, reference.segment_sum),
  'mean': (segment.segment_mean, reference.segment_mean),
  'max': (segment.segment_max, reference.segment_max),
  'softmax': (segment.segment_softmax, reference.segment_softmax),
}
each_implementation = pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
each_operation = pytest.mark.parametrize('operation', OPERATIONS)


def relative_error(got, want) -> float:
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  scale = max(np.abs(want).max(initial=0), 1e-30)
  return float(np.abs(got - want).max(initial=0) / scale)


@st.composite
def cases(draw):
  """Ragged segments: any order, empty segments, masks that empty others."""
  n = draw(st.sampled_from([0, 1, 17]))
  num_segments = draw(st.sampled_from([1, 6]))
  rng = np.random.default_rng(draw(st.integers(0, 2**16)))
  ids = rng.integers(0, num_segments, n).astype(np.int32)
  is_sorted = draw(st.booleans())
  mask = rng.random(n) < 0.7 if draw(st.booleans()) else None
  shape = draw(st.sampled_from([(), (3,), (2, 3)]))
  values = rng.normal(size=(n, *shape))
  return (
    values,
    np.sort(ids) if is_sorted else ids,
    num_segments,
    mask,
    {'indices_are_sorted': is_sorted},
  )


@each_operation
@each_implementation
@hypothesis.given(case=cases())
def test_operation_any_ids_matches_oracle(operation, implementation, case):
  fn, oracle = OPERATIONS[operation]
  values, ids, num_segments, mask, options = case
  got = fn(
    jnp.asarray(values, jnp.float32),
    ids,
    num_segments,
    mask=mask,
    implementation=implementation,
    **options,
  )
  want = oracle(values.astype(np.float32), ids, num_segments, mask)
  assert relative_error(got, want) < 2e-6


@pytest.fixture
def ragged():
  """Unsorted ids with an empty segment (4) and a fully masked one (2)."""
  rng = np.random.default_rng(3)
  ids = rng.permutation([0] * 5 + [1] + [2] * 3 + [3] * 7 + [5] * 2)
  mask = (rng.random(len(ids)) < 0.8) & (ids != 2)
  values = rng.normal(size=(len(ids), 2, 3))
  return values, ids.astype(np.int32), 6, mask


@each_operation
@each_implementation
def test_operation_float64_and_gradient_match_oracle(
  operation, implementation, ragged
):
  values, ids, num_segments, mask = ragged
  fn, oracle = OPERATIONS[operation]
  with jax.enable_x64(True):
    fn = functools.partial(
      fn,
      segment_ids=ids,
      num_segments=num_segments,
      mask=mask,
      implementation=implementation,
    )
    want = oracle(values, ids, num_segments, mask)
    got, pullback = jax.vjp(fn, jnp.asarray(values))
    assert relative_error(got, want) < 1e-12
    weights = np.random.default_rng(0).normal(size=want.shape)
    (gradient,) = pullback(jnp.asarray(weights))
    # Central differences of the oracle; every entry of `values` in turn.
    step, numeric = 1e-6, np.zeros_like(values)
    for at in np.ndindex(values.shape):
      shift = np.zeros_like(values)
      shift[at] = step
      up = oracle(values + shift, ids, num_segments, mask)
      down = oracle(values - shift, ids, num_segments, mask)
      numeric[at] = np.sum(weights * (up - down)) / (2 * step)
    assert relative_error(gradient, numeric) < 1e-8


@each_implementation
def test_attention_matches_oracle(implementation, ragged):
  _, ids, num_segments, mask = ragged
  rng = np.random.default_rng(1)
  query = rng.normal(size=(num_segments, 2, 4))
  key, value = rng.normal(size=(2, len(ids), 2, 4))
  with jax.enable_x64(True):
    got, weights = segment.segment_attention(
      query, key, value, ids, mask=mask, implementation=implementation
    )
  want = reference.segment_attention(query, key, value, ids, mask)
  assert relative_error(got, want) < 1e-12
  total = reference.segment_sum(np.asarray(weights), ids, num_segments, mask)
  filled = np.isin(np.arange(num_segments), ids[mask])
  np.testing.assert_allclose(total, filled[:, None] * np.ones(2), atol=1e-12)
  assert not np.any(np.asarray(weights)[~mask])


@each_implementation
def test_broadcast_is_the_transpose_of_sum(implementation, ragged):
  values, ids, num_segments, mask = ragged
  options = {'mask': mask, 'implementation': implementation}
  tokens = np.random.default_rng(2).normal(size=(num_segments, 2, 3))
  with jax.enable_x64(True):
    rows = segment.segment_broadcast(jnp.asarray(tokens), ids, **options)
    total = segment.segment_sum(
      jnp.asarray(values), ids, num_segments, **options
    )
    (gradient,) = jax.vjp(
      lambda x: segment.segment_broadcast(x, ids, **options),
      jnp.asarray(tokens),
    )[1](jnp.asarray(values))
  want = np.where(mask[:, None, None], tokens[ids], 0)
  np.testing.assert_array_equal(rows, want)
  np.testing.assert_allclose(
    np.vdot(rows, values), np.vdot(tokens, total), rtol=1e-12
  )
  np.testing.assert_allclose(gradient, total, rtol=1e-12, atol=1e-12)


@each_operation
@each_implementation
def test_operation_vmap_matches_loop(operation, implementation):
  fn, _ = OPERATIONS[operation]
  rng = np.random.default_rng(4)
  values = jnp.asarray(rng.normal(size=(3, 11, 2)), jnp.float32)
  ids = jnp.asarray(rng.integers(0, 5, (3, 11)))

  def one(values, ids):
    return fn(values, ids, 5, implementation=implementation, max_per_segment=11)

  got = jax.vmap(one)(values, ids)
  want = [one(v, i) for v, i in zip(values, ids, strict=True)]
  np.testing.assert_allclose(got, np.stack(want), rtol=1e-6, atol=1e-6)


@each_operation
@each_implementation
def test_operation_jit_scan_remat_grad_agree_with_eager(
  operation, implementation, ragged
):
  values, ids, num_segments, mask = ragged
  fn, _ = OPERATIONS[operation]
  values = jnp.asarray(values, jnp.float32)
  largest = segment.max_segment_size(ids, num_segments, mask=mask)

  def loss(x, ids, mask):
    return jnp.sum(
      jnp.sin(
        fn(
          x,
          ids,
          num_segments,
          mask=mask,
          implementation=implementation,
          max_per_segment=largest,
        )
      )
    )

  want = jax.grad(loss)(values, ids, mask)
  got = jax.jit(jax.grad(jax.checkpoint(loss)))(values, ids, mask)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

  def step(x, _):
    return x - 0.1 * jax.grad(loss)(x, ids, mask), None

  scanned, _ = jax.lax.scan(step, values, None, length=2)
  by_hand = step(step(values, None)[0], None)[0]
  np.testing.assert_allclose(scanned, by_hand, rtol=1e-5, atol=1e-6)


@each_implementation
def test_operation_inside_haiku_transform(implementation, ragged):
  values, ids, num_segments, mask = ragged
  pooled = hk.without_apply_rng(
    hk.transform(
      lambda x: hk.Linear(4)(
        segment.segment_mean(
          x, ids, num_segments, mask=mask, implementation=implementation
        )
      )
    )
  )
  x = jnp.asarray(values[:, 0], jnp.float32)
  params = pooled.init(jax.random.key(0), x)
  assert pooled.apply(params, x).shape == (num_segments, 4)


@each_operation
@each_implementation
def test_masked_rows_hold_nan_result_and_gradient_finite(
  operation, implementation, ragged
):
  values, ids, num_segments, mask = ragged
  fn, _ = OPERATIONS[operation]
  values = jnp.asarray(values, jnp.float32)
  poisoned = jnp.where(mask[:, None, None], values, jnp.nan)

  def total(x):
    y = fn(x, ids, num_segments, mask=mask, implementation=implementation)
    return jnp.sum(y**2), y

  (_, want), clean = jax.value_and_grad(total, has_aux=True)(values)
  (_, got), gradient = jax.value_and_grad(total, has_aux=True)(poisoned)
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(gradient[mask], clean[mask])
  np.testing.assert_array_equal(np.asarray(gradient)[~mask], 0)


@each_operation
@each_implementation
def test_all_rows_masked_gives_zeros(operation, implementation, ragged):
  values, ids, num_segments, _ = ragged
  fn, _ = OPERATIONS[operation]
  none = np.zeros(len(ids), bool)

  def apply(x):
    return fn(x, ids, num_segments, mask=none, implementation=implementation)

  x = jnp.asarray(values, jnp.float32)
  assert not np.any(apply(x))
  assert not np.any(jax.grad(lambda x: jnp.sum(apply(x)))(x))


@each_implementation
def test_max_ties_share_the_gradient(implementation):
  values = jnp.array([2.0, 2.0, 1.0, 2.0, -5.0])
  ids = jnp.array([0, 0, 0, 0, 1])
  gradient = jax.grad(
    lambda x: jnp.sum(
      segment.segment_max(x, ids, 2, implementation=implementation)
    )
  )(values)
  np.testing.assert_allclose(gradient, [1 / 3, 1 / 3, 0, 1 / 3, 1], rtol=1e-6)


@each_implementation
def test_bfloat16_values_accumulate_in_float32(implementation):
  # 1 + 4096 * 2^-9 in bfloat16 steps would stay at 1.
  values = jnp.concatenate([jnp.ones(1), jnp.full(4096, 2.0**-9)])
  total = segment.segment_sum(
    values.astype(jnp.bfloat16),
    jnp.zeros(4097, jnp.int32),
    1,
    implementation=implementation,
  )
  assert total.dtype == jnp.bfloat16
  assert float(total[0]) == 9.0


def test_segment_implementation_supports_forward_mode(ragged):
  values, ids, num_segments, mask = ragged
  _, tangent = jax.jvp(
    lambda x: segment.segment_mean(x, ids, num_segments, mask=mask),
    (jnp.asarray(values, jnp.float32),),
    (jnp.ones(values.shape, jnp.float32),),
  )
  filled = np.isin(np.arange(num_segments), ids[mask])
  np.testing.assert_allclose(tangent[:, 0, 0], filled, rtol=1e-6)


@each_operation
@each_implementation
def test_one_trace_serves_all_ids_of_a_shape(operation, implementation):
  fn, _ = OPERATIONS[operation]
  traces = []

  @jax.jit
  def apply(values, ids):
    traces.append(1)
    return fn(values, ids, 4, implementation=implementation, max_per_segment=9)

  for seed in range(3):
    apply(jnp.ones((9, 2)), np.random.default_rng(seed).integers(0, 4, 9))
  assert len(traces) == 1


@pytest.mark.parametrize('implementation', ['dense', 'matmul'])
def test_gradients_do_not_scatter(implementation):
  ids = jnp.array([0, 2, 2, 1])

  def loss(x):
    mean = segment.segment_mean(x, ids, 3, implementation=implementation)
    rows = segment.segment_broadcast(mean, ids, implementation=implementation)
    return jnp.sum(rows**2)

  jaxpr = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((4, 2))))
  assert 'scatter' not in jaxpr
  # The check itself can fail: plain XLA scatters.
  plain = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(x[ids] ** 2)))
  assert 'scatter' in str(plain(jnp.ones((3, 2))))


@each_operation
@each_implementation
def test_nothing_of_size_atoms_times_tokens(operation, implementation):
  """100,000 atoms x 128 channels -> 12,500 tokens, by the largest array."""
  n_atom, n_token, c_atom, slots = 100_000, 12_500, 128, 14
  fn, _ = OPERATIONS[operation]

  def loss(values, ids):
    out = fn(
      values,
      ids,
      n_token,
      implementation=implementation,
      max_per_segment=slots,
      indices_are_sorted=True,
    )
    return jnp.sum(out**2)

  jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(
    jax.ShapeDtypeStruct((n_atom, c_atom), jnp.float32),
    jax.ShapeDtypeStruct((n_atom,), jnp.int32),
  )
  largest = max(array_sizes(jaxpr.jaxpr))
  assert largest <= n_token * slots * c_atom
  assert largest < n_atom * n_token / 50


def array_sizes(jaxpr):
  """Sizes of all arrays of a jaxpr, those of nested jaxprs included."""
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield int(np.prod(variable.aval.shape))
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else [value]:
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from array_sizes(inner)


def test_slots_too_few_concrete_ids_names_the_number():
  with pytest.raises(ValueError, match='give max_per_segment=3'):
    segment.segment_sum(
      jnp.ones((4, 1)),
      np.array([0, 0, 0, 1]),
      2,
      implementation='dense',
      max_per_segment=2,
    )


def test_slots_too_few_traced_ids_give_nan_for_that_segment_only():
  total = jax.jit(
    lambda ids: segment.segment_sum(
      jnp.ones((4, 1)), ids, 2, implementation='dense', max_per_segment=2
    )
  )(np.array([0, 0, 0, 1]))
  np.testing.assert_array_equal(total[:, 0], [np.nan, 1])


def test_dense_under_jit_without_size_says_what_to_give():
  with pytest.raises(ValueError, match='max_per_segment: required'):
    jax.jit(
      lambda ids: segment.segment_sum(
        jnp.ones((4, 1)), ids, 2, implementation='dense'
      )
    )(np.array([0, 0, 0, 1]))


def test_unsorted_ids_promised_sorted_raises():
  with pytest.raises(ValueError, match='segment_ids: promised sorted, but 3'):
    segment.segment_sum(
      jnp.ones((3, 1)), np.array([0, 3, 1]), 4, indices_are_sorted=True
    )


@pytest.mark.parametrize('bad', [-1, 4])
def test_ids_out_of_range_raise_on_host_and_drop_under_jit(bad):
  ids = np.array([0, bad, 1])
  with pytest.raises(ValueError, match=rf'got {bad} at position 1'):
    segment.segment_sum(jnp.ones((3, 1)), ids, 4)
  for implementation in IMPLEMENTATIONS:
    total = jax.jit(
      functools.partial(
        segment.segment_sum,
        num_segments=4,
        implementation=implementation,
        max_per_segment=3,
      )
    )(jnp.ones((3, 1)), ids)
    np.testing.assert_array_equal(total[:, 0], [1, 1, 0, 0])


def test_wrong_inputs_name_the_argument():
  ids = np.array([0, 1])
  with pytest.raises(ValueError, match='segment_ids: expected shape'):
    segment.segment_sum(jnp.ones((3, 1)), ids, 2)
  with pytest.raises(ValueError, match='mask: expected shape'):
    segment.segment_sum(jnp.ones((2, 1)), ids, 2, mask=np.ones(3, bool))
  with pytest.raises(TypeError, match='mask: expected bool'):
    segment.segment_sum(jnp.ones((2, 1)), ids, 2, mask=np.ones(2))
  with pytest.raises(TypeError, match='segment_ids: expected integer'):
    segment.segment_sum(jnp.ones((2, 1)), ids.astype(float), 2)
  with pytest.raises(TypeError, match='values: expected floating'):
    segment.segment_sum(jnp.ones((2, 1), int), ids, 2)
  with pytest.raises(ValueError, match='implementation: expected one of'):
    segment.segment_sum(jnp.ones((2, 1)), ids, 2, implementation='fast')


def test_no_rows_at_all():
  empty = np.zeros(0, np.int32)
  for implementation in IMPLEMENTATIONS:
    total = segment.segment_sum(
      jnp.ones((0, 2)), empty, 3, implementation=implementation
    )
    np.testing.assert_array_equal(total, np.zeros((3, 2)))
  assert segment.max_segment_size(empty, 3) == 1
