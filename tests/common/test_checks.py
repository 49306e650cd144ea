"""Shape, dtype and value checks: what they accept and what they say."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax.common import checks


def test_check_shapes_agreeing_returns_all_sizes():
  dims = checks.check_shapes(
    {'n_head': 4},
    q=(jnp.zeros((5, 4, 8)), 'n n_head d_head'),
    pair=(np.zeros((5, 5)), 'n n'),
    rotation=(np.zeros((5, 3, 3)), 'n 3 3'),
    sigma=(0.5, ''),
    mask=(None, 'n other'),
  )
  assert dims == {'n_head': 4, 'n': 5, 'd_head': 8}


@pytest.mark.parametrize(
  ('sizes', 'arguments', 'message'),
  [
    (
      None,
      {'a': ((37, 8), 'n_atom c'), 'ids': ((36,), 'n_atom')},
      "ids: expected shape [n_atom] with n_atom=37 from 'a', got (36,)",
    ),
    (
      {'c': 6},
      {'a': ((2, 5), 'n c')},
      'a: expected shape [n, c] with c=6 from the config, got (2, 5)',
    ),
    (
      {'c': 6},
      {'a': ((2, 6), 'n c'), 'b': ((3, 6), 'n c')},
      "b: expected shape [n, c] with n=2 from 'a' and c=6 from the config, "
      'got (3, 6)',
    ),
    (None, {'a': ((2, 3), 'n n')}, 'a: expected shape [n, n], got (2, 3)'),
    (None, {'a': ((2, 3), 'n')}, 'a: expected shape [n], got (2, 3)'),
    (None, {'a': ((2, 4), 'n 3')}, 'a: expected shape [n, 3], got (2, 4)'),
    (None, {'a': ((1,), '')}, 'a: expected shape [], got (1,)'),
    (
      None,
      {'a': ((2,), 'n'), 'b': ((3, 1), 'n ...')},
      "b: expected shape [n, ...] with n=2 from 'a', got (3, 1)",
    ),
    (None, {'a': ((2,), 'n c ...')}, 'a: expected shape [n, c, ...], got (2,)'),
  ],
)
def test_check_shapes_mismatch_says_what_and_where_from(
  sizes, arguments, message
):
  arrays = {
    name: (np.zeros(shape), spec) for name, (shape, spec) in arguments.items()
  }
  with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
    checks.check_shapes(sizes, **arrays)


@pytest.mark.parametrize('shape', [(2,), (2, 3), (2, 3, 4)])
def test_check_shapes_trailing_dots_accept_further_axes(shape):
  assert checks.check_shapes(a=(np.zeros(shape), 'n ...')) == {'n': 2}
  assert checks.check_shapes(a=(np.zeros(shape), '...')) == {}


def test_check_shapes_given_sizes_are_not_changed():
  sizes = {'c': 2}
  checks.check_shapes(sizes, a=(np.zeros((3, 2)), 'n c'))
  assert sizes == {'c': 2}


@pytest.mark.parametrize('array', [[1.0, 2.0], (1.0, 2.0)])
def test_check_shapes_list_asks_for_an_array(array):
  with pytest.raises(TypeError, match=r'^a: expected an array, got a (li|tu)'):
    checks.check_shapes(a=(array, 'n'))


def test_check_shapes_under_jit_raises_at_trace_time():
  @jax.jit
  def fn(a, b):
    checks.check_shapes(a=(a, 'n'), b=(b, 'n'))
    return a

  assert fn(np.zeros(2), np.zeros(2)).shape == (2,)
  with pytest.raises(ValueError, match="n=2 from 'a', got"):
    fn(np.zeros(2), np.zeros(3))


@pytest.mark.parametrize(
  ('kind', 'good', 'bad'),
  [
    ('bool', np.zeros(2, bool), np.zeros(2, np.int32)),
    ('integer', np.zeros(2, np.uint8), np.zeros(2, bool)),
    ('integer', 3, np.zeros(2, np.float32)),
    ('floating', jnp.zeros(2, jnp.bfloat16), np.zeros(2, np.int32)),
    ('floating', 0.5, np.zeros(2, np.complex64)),
  ],
)
def test_check_dtypes_other_kind_names_argument_and_dtype(kind, good, bad):
  checks.check_dtypes(kind, good=good, absent=None)
  with pytest.raises(TypeError, match=rf'^x: expected {kind} .*{bad.dtype}$'):
    checks.check_dtypes(kind, good=good, x=bad)


def test_is_concrete_tracer_is_not():
  seen = []
  jax.jit(lambda x: seen.append(checks.is_concrete(x)))(1.0)
  assert seen == [False]
  assert checks.is_concrete(jnp.ones(2))
  assert checks.is_concrete(np.ones(2))


@pytest.mark.parametrize(('at', 'value'), [(0, -1), (2, 4), (3, 99)])
def test_validate_segment_ids_outside_names_the_position(at, value):
  ids = np.array([0, 3, 3, 1])
  checks.validate_segment_ids(ids, 4)
  checks.validate_segment_ids(np.zeros(0, int), 0)
  ids[at] = value
  with pytest.raises(
    ValueError,
    match=rf'^owner: expected ids in \[0, 4\), got {value} at position {at};',
  ):
    checks.validate_segment_ids(ids, 4, name='owner')


def test_validate_sorted_decrease_names_the_position():
  checks.validate_sorted([0, 0, 2, 5])
  checks.validate_sorted([])
  with pytest.raises(
    ValueError, match=r'^ids: .* 5 at position 2 is followed by 4;'
  ):
    checks.validate_sorted([0, 2, 5, 4, 3], name='ids')


def test_validate_rotations_proper_within_tolerance_pass():
  angle = np.linspace(0, 3, 6).reshape(2, 3)
  zero, one = np.zeros_like(angle), np.ones_like(angle)
  rows = [np.cos(angle), -np.sin(angle), zero]
  rows += [np.sin(angle), np.cos(angle), zero, zero, zero, one]
  rotation = np.stack(rows, -1).reshape(2, 3, 3, 3)
  checks.validate_rotations(rotation)
  checks.validate_rotations(rotation[0, 0] * 1.0004)
  checks.validate_rotations(np.zeros((0, 3, 3)))


@pytest.mark.parametrize('bad', [2.0, 1.001, np.nan, 0.0])
def test_validate_rotations_not_orthonormal_names_the_worst(bad):
  rotation = np.tile(np.eye(3), (2, 3, 1, 1))
  rotation[1, 2] *= bad
  with pytest.raises(ValueError, match=r'frames\[1, 2\] is off by'):
    checks.validate_rotations(rotation, name='frames')
  with pytest.raises(ValueError, match=r'but rotation is off by'):
    checks.validate_rotations(rotation[1, 2])


def test_validate_rotations_reflection_raises():
  with pytest.raises(ValueError, match='got a reflection'):
    checks.validate_rotations(np.diag([1, 1, -1]))
