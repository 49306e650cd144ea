"""What must hold for every system, checked in one place for all of them."""

import json
import pathlib

import haiku as hk
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry
from hypothesis import strategies as st

from structattn_jax import testing

PARAM_TREES = (
  pathlib.Path(__file__).parent.parent / 'goldens' / 'param_trees.json'
)

each_case = pytest.mark.parametrize(
  'case', list(registry.CASES.values()), ids=list(registry.CASES)
)


def to_float64(tree):
  return jax.tree.map(
    lambda x: x.astype(np.float64) if x.dtype == np.float32 else x,
    jax.tree.map(np.asarray, tree),
  )


def worst_error(got, want) -> float:
  """Largest difference over the largest value, worst output leaf."""
  errors = jax.tree.map(
    lambda g, w: (
      np.abs(np.asarray(g, np.float64) - w).max() / max(np.abs(w).max(), 1e-30)
    ),
    got,
    want,
  )
  return max(jax.tree.leaves(errors))


@each_case
def test_float32_matches_oracle(case):
  got = case.jitted(case.params, dict(case.inputs))
  assert worst_error(got, case.system.oracle(case.params, case.inputs)) < 1e-5


@each_case
def test_float64_matches_oracle(case):
  params, inputs = to_float64((case.params, dict(case.inputs)))
  with jax.enable_x64(True):
    got = case.jitted(params, inputs)
    assert all(y.dtype == np.float64 for y in jax.tree.leaves(got))
  assert worst_error(got, case.system.oracle(params, inputs)) < 1e-12


@each_case
def test_float32_inputs_stay_float32_with_x64_enabled(case):
  with jax.enable_x64(True):
    shapes = jax.eval_shape(case.apply, case.params, dict(case.inputs))
  assert all(y.dtype == np.float32 for y in jax.tree.leaves(shapes))


def derivative(fn):
  """Derivatives of fn(step) at 0 by sixth-order differences, several steps.

  Large steps are off by truncation and short ones by rounding; which one is
  good to ten digits depends on the formula.
  """
  for h in (8e-3, 4e-3, 2e-3, 5e-4, 3e-4, 2e-4, 1e-4, 5e-5, 2e-5):
    slopes = [fn(k * h) - fn(-k * h) for k in (1, 2, 3)]
    yield (45 * slopes[0] - 9 * slopes[1] + slopes[2]) / (60 * h)


@each_case
def test_float64_gradient_matches_differences_of_the_oracle(case):
  """One random direction for every parameter and every float input."""
  params, inputs = to_float64((case.params, dict(case.inputs)))
  floats = {name: inputs[name] for name in case.float_inputs()}
  rng = np.random.default_rng(11)
  with jax.enable_x64(True):
    gradient = case.jitted_gradient(params, floats, inputs)
  params, constants = dict(params), {}
  for module in case.constants:
    # What a difference of the oracle would see, an optimiser must not.
    for x in gradient[0].pop(module).values():
      assert not x.any()
    constants[module] = params.pop(module)
  leaves, tree = jax.tree.flatten((params, floats))
  gradients = [np.asarray(g) for g in jax.tree.leaves(gradient)]
  largest = max(np.linalg.norm(g) for g in gradients)
  for i, (leaf, own) in enumerate(zip(leaves, gradients, strict=True)):
    direction = rng.standard_normal(leaf.shape)

    def at(step, i=i, leaf=leaf, direction=direction):
      moved = list(leaves)
      moved[i] = leaf + step * direction
      params, floats = jax.tree.unflatten(tree, moved)
      params = {**params, **constants}
      outputs = case.system.oracle(params, {**inputs, **floats})
      return registry.weighted_sum(outputs)

    slope = np.sum(own * direction)
    # Some gradients vanish exactly (biases before a softmax).
    scale = max(np.linalg.norm(own), 1e-3 * largest)
    errors = (abs(slope - d) / scale for d in derivative(at))
    assert any(error < 1e-10 for error in errors), (i, leaf.shape)


@each_case
def test_float32_gradient_matches_float64(case):
  arguments = (case.params, case.float_inputs(), dict(case.inputs))
  got = case.jitted_gradient(*arguments)
  with jax.enable_x64(True):
    want = case.jitted_gradient(*to_float64(arguments))
  want = jax.tree.map(np.asarray, want)
  largest = max(np.abs(w).max() for w in jax.tree.leaves(want))
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    scale = max(np.abs(w).max(), 1e-3 * largest)
    assert np.abs(g - w).max() / scale < 1e-4


@each_case
def test_jit_equals_eager(case):
  got = case.jitted(case.params, dict(case.inputs))
  want = case.apply(case.params, dict(case.inputs))
  assert worst_error(got, jax.tree.map(np.asarray, want)) < 2e-6


def batch_of(case, size=3):
  """Different float inputs per example; integers and masks rolled along."""
  rng = np.random.default_rng(0)

  def stack(x):
    if x.dtype != np.float32:
      return np.stack([np.roll(x, i, axis=0) for i in range(size)])
    return x + 0.1 * rng.standard_normal((size, *x.shape), np.float32)

  return jax.tree.map(stack, jax.tree.map(np.asarray, dict(case.inputs)))


@each_case
def test_vmap_and_scan_equal_loop_with_one_trace(case):
  params, batch = case.params, batch_of(case)
  traces = []

  @jax.jit
  def one(params, inputs):
    traces.append(1)
    return case.apply(params, inputs)

  examples = [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(3)]
  want = [one(params, example) for example in examples]
  assert len(traces) == 1
  want = jax.tree.map(lambda *y: np.stack(y), *want)

  @jax.jit
  def mapped_and_scanned(params, batch):
    mapped = jax.vmap(case.apply, in_axes=(None, 0))(params, batch)
    _, scanned = jax.lax.scan(
      lambda _, x: (None, case.apply(params, x)), None, batch
    )
    return mapped, scanned

  mapped, scanned = mapped_and_scanned(params, batch)
  assert worst_error(mapped, want) < 3e-6
  assert worst_error(scanned, want) < 3e-6


@each_case
def test_haiku_function_under_remat_keeps_parameters_and_gradients(case):
  inputs = dict(case.inputs)
  remat = hk.without_apply_rng(
    hk.transform(
      lambda inputs: hk.remat(lambda x: case.haiku_function(**x))(inputs)
    )
  )
  made = jax.eval_shape(remat.init, jax.random.key(0), inputs)
  assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, case.params)

  def loss(params, inputs):
    return registry.weighted_sum(remat.apply(params, inputs))

  got = jax.jit(jax.grad(loss))(case.params, inputs)
  want, _ = case.jitted_gradient(case.params, case.float_inputs(), inputs)
  largest = max(np.abs(w).max() for w in jax.tree.leaves(want))
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    # One unit in the last place of the largest, for what is zero in theory.
    bound = max(1e-5 * np.abs(w).max(), 1.2e-7 * largest)
    assert np.abs(g - w).max() < bound


@each_case
def test_degenerate_inputs_give_finite_values_and_gradients(case):
  for name, change in case.degenerate.items():
    inputs = {**case.inputs, **change}
    got = case.jitted(case.params, inputs)
    want = case.system.oracle(case.params, inputs)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      assert np.isfinite(g).all(), name
      assert np.abs(g - w).max() < 1e-5 * max(np.abs(w).max(), 1), name
    floats = {key: inputs[key] for key in case.float_inputs()}
    gradient = case.jitted_gradient(case.params, floats, inputs)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient)), name


@pytest.mark.parametrize(
  'name',
  ['af2_ipa', 'af3_atom_cross_attention', 'boltz_token_attention'],
)
def test_all_masked_gives_exact_zeros(name):
  case = registry.CASES[name]
  inputs = {**case.inputs, **case.degenerate['all_masked']}
  outputs = case.jitted(case.params, inputs)
  assert not any(np.any(y) for y in jax.tree.leaves(outputs))


@each_case
def test_padding_garbage_changes_no_real_output(case):
  for padding in case.paddings:
    testing.assert_padding_invariant(
      lambda **inputs: case.jitted(case.params, inputs),
      case.inputs,
      key=jax.random.key(0),
      tolerance=2e-6,
      **padding,
    )


@each_case
def test_permutation_is_followed(case):
  for permutation in case.permutations:
    testing.assert_permutation_equivariant(
      lambda **inputs: case.jitted(case.params, inputs),
      case.inputs,
      key=jax.random.key(1),
      tolerance=5e-6,
      **permutation,
    )


@each_case
def test_bfloat16_activations_stay_close(case):
  want = case.system.oracle(case.params, case.inputs)
  if case.bfloat16_system:
    apply = jax.jit(case.bfloat16_system.apply)
    got = apply(case.params, dict(case.inputs))
  else:
    # Coordinates stay float32, as everywhere in the library.
    low = set(case.float_inputs()) - {'rotation', 'translation'}
    inputs = {
      name: jnp.asarray(x, jnp.bfloat16) if name in low else x
      for name, x in case.inputs.items()
    }
    got = case.jitted(case.params, inputs)
  for path, y in jax.tree.leaves_with_path(got):
    wide = jax.tree_util.keystr(path).lstrip('.') in case.coordinates
    assert y.dtype == (jnp.float32 if wide else jnp.bfloat16), path
  error = worst_error(
    jax.tree.map(lambda y: np.asarray(y, np.float64), got), want
  )
  # bfloat16 keeps 8 bits: 4e-3 per rounding. Zero would mean it was not used.
  assert 1e-4 < error < 5e-2


@st.composite
def wrong_shapes(draw, case):
  """One argument with one axis of the wrong size, or of the wrong rank."""
  shapes = {
    name: spec
    for name, spec in case.system.shapes.items()
    if case.inputs[name] is not None
  }
  name = draw(st.sampled_from(sorted(shapes)))
  value = np.asarray(case.inputs[name])
  # Channel sizes are free: parameters, not other arguments, decide them.
  fixed = [
    axis
    for axis, dim in enumerate(shapes[name].split())
    if not dim.startswith('c_')
    and (dim.isdigit() or sum(dim in s.split() for s in shapes.values()) > 1)
  ]
  change = draw(st.sampled_from([*fixed, 'rank']))
  if change == 'rank':
    return name, value[None]
  grown = np.concatenate([value, np.take(value, [0], change)], change)
  return name, grown


@each_case
@hypothesis.given(data=st.data())
def test_wrong_shape_raises_and_names_the_argument(case, data):
  name, value = data.draw(wrong_shapes(case))
  with pytest.raises(ValueError, match=rf"\b{name}\b.*got|'{name}'.*got"):
    jax.eval_shape(
      lambda inputs: case.system.init(jax.random.key(0), inputs),
      {**case.inputs, name: value},
    )


@each_case
def test_wrong_dtype_raises_and_names_the_argument(case):
  for name, value in case.inputs.items():
    if value is None or name == 'sigma':
      continue
    value = np.asarray(value)
    wrong = value.astype(np.float32 if value.dtype.kind in 'ib' else np.int32)
    with pytest.raises(TypeError, match=f'^{name}: expected'):
      jax.eval_shape(
        lambda inputs: case.system.init(jax.random.key(0), inputs),
        {**case.inputs, name: wrong},
      )


@each_case
def test_parameter_tree_is_frozen(case):
  """A change here breaks stored checkpoints: it must be on purpose."""
  tree = {
    f'{path}//{name}': [list(value.shape), str(value.dtype)]
    for path, values in case.params.items()
    for name, value in values.items()
  }
  assert tree == json.loads(PARAM_TREES.read_text())[case.name]
