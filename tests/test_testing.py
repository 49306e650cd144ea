"""The testing tools accept what is symmetric and refuse what is not."""

import dataclasses
import doctest
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax import geometry, testing

KEY = jax.random.key(0)
ROTATION = geometry.random_rotation(jax.random.key(1), (6,))
TRANSLATION = 5 * jax.random.normal(jax.random.key(2), (6, 3))
FEATURES = np.random.default_rng(3).normal(size=(6, 4)).astype(np.float32)
PAIR = np.random.default_rng(4).normal(size=(6, 6)).astype(np.float32)


@jax.jit
def local_points(rotation, translation):
  """Every position in every frame: invariant under SE(3)."""
  frames = geometry.Rigid(rotation, translation)
  local = frames[:, None].apply_inverse(translation[None])
  return {'local': local, 'distance': jnp.sum(local**2, -1)}


@jax.jit
def moved_frames(rotation, translation):
  """A step in the own frame and the C beta: equivariant under SE(3)."""
  frames = geometry.Rigid(rotation, translation)
  step = geometry.Rigid(
    geometry.rotation_from_axis_angle(jnp.array([0.1, 0.2, 0.3])),
    jnp.array([1.0, 2.0, 3.0]),
  )
  return {
    'frames': frames @ step[None],
    'beta': frames.apply(jnp.ones((6, 5, 3))),
    'centroid': translation.mean(0),
  }


def attend(x, pair, mask=None):
  """Softmax over rows with a pair bias, the model of the tests below."""
  logits = x @ x.T + pair
  if mask is not None:
    logits = jnp.where(mask[None], logits, -1e9)
  return {'row': jax.nn.softmax(logits) @ x, 'logits': logits}


def test_se3_invariant_local_points_returns_small_error():
  error = testing.assert_se3_invariant(
    local_points, ROTATION, TRANSLATION, key=KEY
  )
  assert isinstance(error, float)
  assert 0 < error < 1e-5


def test_se3_invariant_float64_error_is_rounding():
  with jax.enable_x64(True):
    error = testing.assert_se3_invariant(
      local_points,
      np.linalg.qr(np.random.default_rng(0).normal(size=(6, 3, 3)))[0],
      np.asarray(TRANSLATION, np.float64),
      key=KEY,
      tolerance=1e-13,
    )
  assert error < 1e-13


def test_se3_invariant_translation_only_model_raises_with_message():
  def norms(rotation, translation):
    return {'good': jnp.trace(rotation.sum(0)) * 0 + 1, 'bad': translation**2}

  with pytest.raises(AssertionError) as error:
    testing.assert_se3_invariant(
      norms, ROTATION, TRANSLATION, key=KEY, num_samples=3
    )
  assert re.fullmatch(
    r"assert_se3_invariant: output\['bad'\] is off by [\d.e+]+ relative to its "
    r'scale [\d.e+]+ \(tolerance 1e-05\) after random move \d, the worst of 3',
    str(error.value),
  )


@pytest.mark.parametrize('part', ['rotation', 'shift'])
def test_se3_invariant_breaks_only_rotation_or_shift_raises(part):
  def model(rotation, translation):
    del rotation
    if part == 'rotation':
      return translation - translation.mean(0)
    return jnp.linalg.norm(translation, axis=-1)

  with pytest.raises(AssertionError, match='output is off by'):
    testing.assert_se3_invariant(model, ROTATION, TRANSLATION, key=KEY)


def test_se3_invariant_perturbed_frame_raises():
  """A frame that does not move with the others is noticed."""

  def model(rotation, translation):
    return local_points(rotation.at[0].set(jnp.eye(3)), translation)

  with pytest.raises(AssertionError, match='is off by'):
    testing.assert_se3_invariant(model, ROTATION, TRANSLATION, key=KEY)


def test_se3_invariant_nan_or_zero_output_raises():
  with pytest.raises(AssertionError, match='output is not finite'):
    testing.assert_se3_invariant(
      lambda rotation, translation: jnp.full(3, jnp.nan),
      ROTATION,
      TRANSLATION,
      key=KEY,
    )
  with pytest.raises(AssertionError, match='all outputs are zero'):
    testing.assert_se3_invariant(
      lambda rotation, translation: jnp.zeros(3),
      ROTATION,
      TRANSLATION,
      key=KEY,
    )


def test_se3_invariant_moves_are_proper_and_of_given_length():
  seen = []

  def spy(rotation, translation):
    seen.append((np.asarray(rotation), np.asarray(translation)))
    return jnp.ones(1)

  testing.assert_se3_invariant(
    spy, np.eye(3)[None], np.zeros((1, 3)), key=KEY, shift=7.0, num_samples=4
  )
  assert len(seen) == 5
  for rotation, translation in seen[1:]:
    np.testing.assert_allclose(np.linalg.det(rotation), 1, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(translation), 7, rtol=1e-6)
  assert not np.allclose(seen[1][0], seen[2][0])


def test_se3_invariant_wrong_shape_names_argument():
  with pytest.raises(ValueError, match='translation: expected shape'):
    testing.assert_se3_invariant(
      local_points, ROTATION, TRANSLATION[:5], key=KEY
    )


def test_se3_equivariant_frames_and_points_pass():
  error = testing.assert_se3_equivariant(
    moved_frames, ROTATION, TRANSLATION, key=KEY
  )
  assert 0 < error < 1e-5


def test_se3_equivariant_error_does_not_depend_on_shift():
  """A defect of 1 in 10 is reported as such wherever the complex lies."""

  def model(rotation, translation):
    del rotation
    return translation + jnp.array([1.0, 0.0, 0.0])

  errors = [
    testing.assert_se3_equivariant(
      model, ROTATION, TRANSLATION, key=KEY, shift=shift, tolerance=np.inf
    )
    for shift in (1.0, 1000.0)
  ]
  np.testing.assert_allclose(errors[0], errors[1], rtol=1e-2)
  assert errors[0] > 0.05


@pytest.mark.parametrize(
  ('model', 'leaf'),
  [
    (lambda r, t: {'points': t * 1.1}, r"output\['points'\]"),
    (
      lambda r, t: geometry.Rigid(jnp.swapaxes(r, -1, -2), t),
      r'output\.rotation',
    ),
    (lambda r, t: geometry.Rigid(r, t + 0.1), r'output\.translation'),
    (lambda r, t: (t, jnp.abs(t - t.mean(0)) + t.mean(0)), r'output\[1\]'),
  ],
)
def test_se3_equivariant_broken_model_raises_naming_leaf(model, leaf):
  with pytest.raises(AssertionError, match=leaf):
    testing.assert_se3_equivariant(model, ROTATION, TRANSLATION, key=KEY)


def test_se3_equivariant_output_without_xyz_is_value_error():
  with pytest.raises(ValueError, match=r"output\['x'\]: expected shape"):
    testing.assert_se3_equivariant(
      lambda r, t: {'x': t[:, :2]}, ROTATION, TRANSLATION, key=KEY
    )


def test_permutation_equivariant_attention_passes():
  error = testing.assert_permutation_equivariant(
    attend,
    {'x': FEATURES, 'pair': PAIR},
    axes={'x': 0, 'pair': (0, 1)},
    output_axes={'row': 0, 'logits': (0, 1)},
    key=KEY,
  )
  assert error < 1e-5


def test_permutation_equivariant_positional_model_raises():
  def model(x, pair):
    return attend(x + jnp.arange(6)[:, None], pair)

  with pytest.raises(
    AssertionError, match=r"output\['row'\] .* after random permutation"
  ):
    testing.assert_permutation_equivariant(
      model,
      {'x': FEATURES, 'pair': PAIR},
      axes={'x': 0, 'pair': (0, 1)},
      output_axes={'row': 0, 'logits': (0, 1)},
      key=KEY,
    )


def test_permutation_equivariant_forgotten_axis_raises():
  with pytest.raises(AssertionError, match='is off by'):
    testing.assert_permutation_equivariant(
      attend,
      {'x': FEATURES, 'pair': PAIR},
      axes={'x': 0, 'pair': 0},
      output_axes={'row': 0, 'logits': (0, 1)},
      key=KEY,
    )


def test_permutation_equivariant_atoms_leave_tokens_unchanged():
  def mean_by_token(atoms, atom_to_token):
    return jax.ops.segment_sum(atoms, atom_to_token, 3)

  inputs = {'atoms': FEATURES, 'atom_to_token': np.array([0, 0, 1, 2, 2, 2])}
  axes = {'atoms': 0, 'atom_to_token': 0}
  testing.assert_permutation_equivariant(
    mean_by_token, inputs, axes=axes, output_axes=None, key=KEY
  )
  with pytest.raises(AssertionError, match='output is off by'):
    testing.assert_permutation_equivariant(
      mean_by_token, inputs, axes={'atoms': 0}, output_axes=None, key=KEY
    )


def test_permutation_equivariant_tokens_map_index_values():
  def broadcast(tokens, atom_to_token):
    kept = atom_to_token >= 0
    atoms = jnp.where(kept[:, None], tokens[atom_to_token], 0)
    return atoms, tokens * 2

  inputs = {'tokens': FEATURES, 'atom_to_token': np.array([0, 5, 5, 1, 3, -1])}
  arguments = {'axes': {'tokens': 0}, 'output_axes': (None, 0), 'key': KEY}
  testing.assert_permutation_equivariant(
    broadcast, inputs, index_of=['atom_to_token'], **arguments
  )
  with pytest.raises(AssertionError, match=r'output\[0\]'):
    testing.assert_permutation_equivariant(broadcast, inputs, **arguments)


def test_permutation_equivariant_neighbours_permute_rows_and_values():
  neighbours = np.array([[1, 2], [0, 3], [4, 5], [5, 1], [3, 0], [2, 4]])
  testing.assert_permutation_equivariant(
    lambda x, neighbours: x + x[neighbours].sum(1),
    {'x': FEATURES, 'neighbours': neighbours},
    axes={'x': 0, 'neighbours': 0},
    index_of=['neighbours'],
    output_axes=0,
    key=KEY,
  )


def test_permutation_equivariant_bad_arguments_name_them():
  inputs = {'x': FEATURES, 'pair': PAIR}
  arguments = {'output_axes': 0, 'key': KEY}
  tool = testing.assert_permutation_equivariant
  with pytest.raises(ValueError, match=r"axes: .* got \['y'\]"):
    tool(attend, inputs, axes={'y': 0}, **arguments)
  with pytest.raises(ValueError, match=r'one and the same size.*pair axis 1'):
    tool(attend, inputs, axes={'x': 1, 'pair': 1}, **arguments)
  with pytest.raises(ValueError, match=r"index_of: .* got \['z'\]"):
    tool(attend, inputs, axes={'x': 0}, index_of=['z'], **arguments)
  with pytest.raises(ValueError, match='at least 2 rows'):
    tool(attend, {'x': FEATURES[:1]}, axes={'x': 0}, **arguments)
  with pytest.raises(ValueError, match=r"output_axes: .* output\['row'\]"):
    tool(
      lambda x: {'row': x.sum(0)}, {'x': FEATURES}, axes={'x': 0}, **arguments
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
  atoms: jax.Array
  token: jax.Array


@pytest.mark.parametrize(
  ('output_axes', 'expected'),
  [
    (None, [(), (), ()]),
    (0, [(0,), (0,), (0,)]),
    ((0, 1), [(0,), (1,), (1,)]),
    ((None, (0, 1)), [(), (0, 1), (0, 1)]),
    ([0, 1], None),
    ((0, {'a': 0}), None),
    ((0, Output((0, 1), None)), [(0,), (0, 1), ()]),
  ],
)
def test_output_axes_prefix_spreads_over_leaves(output_axes, expected):
  output = (jnp.ones(2), Output(jnp.ones(2), jnp.ones(2)))
  if expected is None:
    with pytest.raises(ValueError, match='output_axes: expected ints'):
      testing._spread_axes(output_axes, output)
  else:
    assert testing._spread_axes(output_axes, output) == expected


PADDED = {
  'axes': {'x': 0, 'pair': (0, 1), 'mask': 0},
  'masks': ['mask'],
  'output_axes': {'row': 0, 'logits': (0, 1)},
  'key': KEY,
}


def padded_inputs():
  return {'x': FEATURES, 'pair': PAIR, 'mask': np.ones(6, bool)}


def test_padding_invariant_masked_attention_passes():
  error = testing.assert_padding_invariant(attend, padded_inputs(), **PADDED)
  assert error < 1e-5


def test_padding_invariant_unmasked_attention_raises():
  with pytest.raises(
    AssertionError,
    match=r"assert_padding_invariant: output\['row'\] depends on the content",
  ):
    testing.assert_padding_invariant(
      lambda x, pair, mask: attend(x, pair), padded_inputs(), **PADDED
    )


def test_padding_invariant_depends_on_size_raises():
  """Garbage is harmless here, but the number of padded rows is not."""

  def mean(x, mask):
    return jnp.where(mask[:, None], x, 0).mean(0)

  with pytest.raises(
    AssertionError, match=r'output is off by .* after padding by 5 rows'
  ):
    testing.assert_padding_invariant(
      mean,
      {'x': FEATURES, 'mask': np.ones(6, bool)},
      axes={'x': 0, 'mask': 0},
      masks=['mask'],
      output_axes=None,
      key=KEY,
      padding=5,
    )


def test_padding_invariant_garbage_is_valid_and_fill_is_used():
  seen = []

  def spy(**inputs):
    seen.append(inputs)
    return inputs['x']

  inputs = {
    'x': FEATURES,
    'token': np.array([3, 4, 4, 5, 6, 6]),
    'flag': np.array([True, False] * 3),
    'rotation': np.asarray(ROTATION),
    'last': np.arange(6),
    'mask': np.ones(6, bool),
    'other': 'untouched',
  }
  testing.assert_padding_invariant(
    spy,
    inputs,
    axes=dict.fromkeys(inputs.keys() - {'other'}, 0),
    masks=['mask'],
    output_axes=0,
    fill={'rotation': np.eye(3), 'last': 5},
    key=KEY,
    padding=50,
    garbage=10.0,
  )
  assert len(seen) == 3
  for padded in seen[1:]:
    for name in inputs.keys() - {'other'}:
      assert padded[name].shape[0] == 56
      assert padded[name].dtype == seen[0][name].dtype or name != 'x'
      np.testing.assert_array_equal(padded[name][:6], inputs[name])
    assert not padded['mask'][6:].any()
    assert 5 < np.std(padded['x'][6:]) < 20
    assert set(np.asarray(padded['token'][6:])) == {3, 4, 5, 6}
    assert set(np.asarray(padded['flag'][6:])) == {True, False}
    assert (padded['last'][6:] == 5).all()
    np.testing.assert_array_equal(padded['rotation'][6:], [np.eye(3)] * 50)
    assert padded['other'] == 'untouched'
  assert not np.array_equal(seen[1]['x'], seen[2]['x'])


def test_padding_invariant_wrong_output_shape_raises():
  with pytest.raises(AssertionError, match=r'outputs .* after padding'):
    testing.assert_padding_invariant(
      lambda x, mask: jnp.where(mask, x[:, 0], 0),
      {'x': FEATURES, 'mask': np.ones(6, bool)},
      axes={'x': 0, 'mask': 0},
      masks=['mask'],
      output_axes=None,
      key=KEY,
    )


def test_padding_invariant_float_mask_is_value_error():
  with pytest.raises(ValueError, match='mask: expected a bool mask'):
    testing.assert_padding_invariant(
      attend, {**padded_inputs(), 'mask': np.ones(6)}, **PADDED
    )


def test_padding_invariant_unknown_names_are_value_errors():
  arguments = {**PADDED, 'masks': ['masq']}
  with pytest.raises(ValueError, match=r"masks: .* got \['masq'\]"):
    testing.assert_padding_invariant(attend, padded_inputs(), **arguments)
  with pytest.raises(ValueError, match=r"fill: .* got \['y'\]"):
    testing.assert_padding_invariant(
      attend, padded_inputs(), fill={'y': 0}, **PADDED
    )


def test_tools_accept_old_style_keys():
  error = testing.assert_se3_invariant(
    local_points, ROTATION, TRANSLATION, key=jax.random.PRNGKey(0)
  )
  assert error < 1e-5


def test_testing_docstring_examples_run():
  result = doctest.testmod(testing)
  assert result.attempted > 0
  assert result.failed == 0
