"""Rigid frames: group laws, broadcasting, layouts, AF2 goldens."""

import doctest
import pathlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from structattn_jax.geometry import Rigid, random_rotation
from structattn_jax.geometry import rigid as rigid_lib

SETTINGS = hypothesis.settings(derandomize=True, deadline=None, max_examples=20)
SEEDS = st.integers(0, 2**31 - 1)

# Compiled as a whole: op by op, compilation would dominate the tests.
apply = jax.jit(Rigid.apply)
apply_inverse = jax.jit(Rigid.apply_inverse)
compose = jax.jit(Rigid.compose)
from_quaternion = jax.jit(Rigid.from_quaternion)
inverse = jax.jit(Rigid.inverse)
LAYOUTS = {
  f'{way}_{layout}': jax.jit(getattr(Rigid, f'{way}_{layout}'))
  for way in ('to', 'from')
  for layout in ('4x4', '3x4', 'flat12', 'quaternion7')
}
GOLDEN = pathlib.Path(__file__).parents[1] / 'goldens/af2_ipa/geometry_fape.npz'


def random_rigid(seed, shape=(), dtype=np.float64):
  rng = np.random.default_rng(seed)
  return from_quaternion(
    rng.normal(size=(*shape, 4)).astype(dtype),
    (10 * rng.normal(size=(*shape, 3))).astype(dtype),
  )


def assert_rigid_close(actual, expected, atol):
  assert actual.shape == expected.shape
  np.testing.assert_allclose(actual.rotation, expected.rotation, atol=atol)
  np.testing.assert_allclose(
    actual.translation, expected.translation, atol=10 * atol
  )


@SETTINGS
@hypothesis.given(SEEDS)
def test_compose_random_obeys_group_laws(seed):
  with jax.enable_x64(True):
    a, b, c = (random_rigid([seed, i], (4,)) for i in range(3))
    identity = Rigid.identity((4,), jnp.float64)
    assert_rigid_close(
      compose(compose(a, b), c), compose(a, compose(b, c)), 1e-13
    )
    assert_rigid_close(compose(a, identity), a, 1e-15)
    assert_rigid_close(compose(identity, a), a, 1e-15)
    assert_rigid_close(compose(a, inverse(a)), identity, 1e-13)
    assert_rigid_close(compose(inverse(a), a), identity, 1e-13)
    assert_rigid_close(
      inverse(compose(a, b)), compose(inverse(b), inverse(a)), 1e-13
    )


@SETTINGS
@hypothesis.given(SEEDS)
def test_apply_random_is_action_of_group(seed):
  with jax.enable_x64(True):
    a, b = (random_rigid([seed, i], (4,)) for i in range(2))
    points = np.random.default_rng(seed).normal(size=(4, 7, 3))
    np.testing.assert_allclose(
      apply(compose(a, b), points), apply(a, apply(b, points)), atol=1e-12
    )
    np.testing.assert_allclose(
      apply_inverse(a, apply(a, points)), points, atol=1e-12
    )
    np.testing.assert_allclose(
      apply(inverse(a), points), apply_inverse(a, points), atol=1e-12
    )


@SETTINGS
@hypothesis.given(SEEDS)
def test_layouts_random_round_trip(seed):
  with jax.enable_x64(True):
    rigid = random_rigid(seed, (2, 3))
    for layout, shape in [
      ('4x4', (2, 3, 4, 4)),
      ('3x4', (2, 3, 3, 4)),
      ('flat12', (2, 3, 12)),
      ('quaternion7', (2, 3, 7)),
    ]:
      array = LAYOUTS[f'to_{layout}'](rigid)
      assert array.shape == shape
      assert_rigid_close(LAYOUTS[f'from_{layout}'](array), rigid, 1e-14)


def test_to_4x4_product_is_compose():
  with jax.enable_x64(True):
    a, b = random_rigid(0, (5,)), random_rigid(1, (5,))
    np.testing.assert_allclose(
      (a @ b).to_4x4(),
      np.asarray(a.to_4x4()) @ np.asarray(b.to_4x4()),
      atol=1e-13,
    )


def test_to_flat12_layout_is_rotation_by_rows_then_translation():
  rigid = Rigid(jnp.arange(9.0).reshape(3, 3), jnp.array([9.0, 10.0, 11.0]))
  np.testing.assert_array_equal(rigid.to_flat12(), np.arange(12))
  np.testing.assert_array_equal(
    rigid.to_3x4(), [[0, 1, 2, 9], [3, 4, 5, 10], [6, 7, 8, 11]]
  )


@pytest.mark.parametrize(
  ('frames', 'points'),
  [
    ((), (3,)),
    ((), (5, 7, 3)),
    ((5,), (5, 3)),
    ((5,), (5, 7, 3)),
    ((5,), (5, 7, 2, 3)),
    ((5, 1), (1, 7, 3)),
    ((5, 1), (5, 7, 2, 3)),
  ],
)
def test_apply_extra_axes_match_loop(frames, points):
  with jax.enable_x64(True):
    rigid = random_rigid(0, frames)
    x = np.random.default_rng(1).normal(size=points)
    result = np.asarray(apply(rigid, x))
    lead = np.broadcast_shapes(frames, points[: len(frames)])
    extra = points[len(frames) :]
    assert result.shape == lead + extra
    rotation = np.broadcast_to(rigid.rotation, (*lead, 3, 3))
    translation = np.broadcast_to(rigid.translation, (*lead, 3))
    x = np.broadcast_to(x, lead + extra)
    for index in np.ndindex(*lead):
      flat = x[index].reshape(-1, 3)
      expected = flat @ rotation[index].T + translation[index]
      np.testing.assert_allclose(
        result[index].reshape(-1, 3), expected, atol=1e-13
      )


def test_compose_extra_axes_match_loop():
  backbone, groups = random_rigid(0, (5,)), random_rigid(1, (5, 8))
  composed = np.asarray((backbone @ groups).to_4x4())
  assert composed.shape == (5, 8, 4, 4)
  backbone, groups = (np.asarray(r.to_4x4()) for r in (backbone, groups))
  for residue in range(5):
    for group in range(8):
      np.testing.assert_allclose(
        composed[residue, group],
        backbone[residue] @ groups[residue, group],
        atol=2e-5,
      )


def test_indexing_acts_on_leading_axes():
  rigid = random_rigid(0, (5, 4))
  assert rigid[2].shape == (4,)
  assert rigid[:, 1:3].shape == (5, 2)
  assert rigid[..., 0].shape == (5,)
  assert rigid[:, None].shape == (5, 1, 4)
  assert rigid[np.array([0, 2])].shape == (2, 4)
  assert rigid[np.array([True, False, True, True, False])].shape == (3, 4)
  np.testing.assert_array_equal(
    rigid[..., 0].translation, rigid.translation[:, 0]
  )
  assert len(rigid) == 5
  assert [frame.shape for frame in rigid] == [(4,)] * 5
  with pytest.raises(IndexError):
    rigid[0, 0, 0]
  with pytest.raises(TypeError, match='no length'):
    len(rigid[0, 0])


def test_rigid_is_pytree_under_jit_vmap_and_grad():
  rigid = random_rigid(0, (5,), np.float32)
  points = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
  eager = rigid.apply(points)
  np.testing.assert_allclose(
    jax.jit(Rigid.apply)(rigid, points), eager, atol=1e-5
  )
  np.testing.assert_allclose(
    jax.vmap(Rigid.apply)(rigid, points), eager, atol=1e-5
  )
  gradient = jax.grad(lambda r: r.apply(points).sum())(rigid)
  np.testing.assert_array_equal(gradient.translation, np.ones((5, 3)))
  assert isinstance(jax.tree.map(lambda _: None, rigid), Rigid)
  assert_rigid_close(jax.jit(Rigid.inverse)(rigid), rigid.inverse(), 1e-6)


def test_from_n_ca_c_hand_numbers():
  rigid = Rigid.from_n_ca_c(
    n=np.array([1.0, 2.0 - 0.5, 3.0 + 1.4]),
    ca=np.array([1.0, 2.0, 3.0]),
    c=np.array([1.0, 2.0 + 1.5, 3.0]),
  )
  # x along global y (to C), y along global z (N side), z = x cross y.
  np.testing.assert_allclose(
    rigid.rotation, [[0, 0, 1], [1, 0, 0], [0, 1, 0]], atol=1e-6
  )
  np.testing.assert_array_equal(rigid.translation, [1, 2, 3])
  np.testing.assert_allclose(
    rigid.apply_inverse(np.array([1.0, 1.5, 4.4])), [-0.5, 1.4, 0], atol=1e-6
  )


def test_from_three_points_hand_numbers():
  rigid = Rigid.from_three_points(
    np.array([-2.0, 0, 0]), np.zeros(3), np.array([1.0, 3.0, 0])
  )
  np.testing.assert_allclose(rigid.rotation, np.eye(3), atol=1e-6)
  np.testing.assert_array_equal(rigid.translation, np.zeros(3))


def test_from_three_points_flipped_gives_backbone_frame():
  # AF2 `atom37_to_frames`: points (C, CA, N), then x and z are flipped.
  n, ca, c = np.random.default_rng(0).normal(size=(3, 6, 3))
  flipped = Rigid.from_three_points(c, ca, n)
  np.testing.assert_allclose(
    flipped.rotation * np.array([-1, 1, -1]),
    Rigid.from_n_ca_c(n, ca, c).rotation,
    atol=1e-6,
  )


@pytest.mark.parametrize('make', [Rigid.from_n_ca_c, Rigid.from_three_points])
@pytest.mark.parametrize('spread', [0.0, 1.0], ids=['coincident', 'collinear'])
def test_frames_from_degenerate_points_have_finite_gradients(make, spread):
  points = spread * jnp.arange(3.0)[:, None] * jnp.ones(3)
  jacobian = jax.jit(jax.jacobian(lambda p: make(*p).to_flat12()))(points)
  assert np.all(np.isfinite(jacobian))


def test_from_n_ca_c_moved_atoms_is_equivariant():
  with jax.enable_x64(True):
    atoms = np.random.default_rng(0).normal(size=(3, 6, 3))
    move = random_rigid(1)
    assert_rigid_close(
      Rigid.from_n_ca_c(*(move.apply(atom) for atom in atoms)),
      move @ Rigid.from_n_ca_c(*atoms),
      1e-13,
    )


def test_rigid_bfloat16_computes_in_float32():
  def call_all(rigid, points):
    return [
      rigid.apply(points),
      rigid.apply_inverse(points),
      rigid @ rigid,
      rigid.inverse(),
      rigid.to_quaternion7(),
      rigid.to_flat12(),
      rigid.to_4x4(),
    ]

  rigid = Rigid.identity((3,), jnp.bfloat16)
  results = jax.eval_shape(call_all, rigid, jnp.ones((3, 3), jnp.bfloat16))
  assert {leaf.dtype.name for leaf in jax.tree.leaves(results)} == {'float32'}


def test_random_rigid_float32_error_is_rounding():
  rotation = random_rotation(jax.random.key(0), (50,))
  rigid = Rigid(rotation, 10 * random_rotation(jax.random.key(1), (50,))[:, 0])
  error = jax.jit(lambda r: (r @ r.inverse()).to_4x4())(rigid) - np.eye(4)
  assert np.abs(error).max() < 1e-5


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (
      lambda rigid: rigid.apply(np.zeros((4, 3))),
      r'points: expected shape \[5, \.\.\., 3\], first the axes of the frames '
      r'\(5,\), got \(4, 3\)',
    ),
    (
      lambda rigid: rigid.apply(np.zeros(3)),
      r'points: expected shape \[5, \.\.\., 3\]',
    ),
    (
      lambda rigid: rigid.apply_inverse(np.zeros((5, 4))),
      r'points: expected shape \[axis_0, 3\], got \(5, 4\)',
    ),
    (
      lambda rigid: rigid @ Rigid.identity((4,)),
      r'other: expected shape \[5, \.\.\.\], .* got \(4,\)',
    ),
    (
      lambda rigid: Rigid(rigid.rotation, np.zeros((4, 3))).inverse(),
      r"translation: expected shape \[axis_0, 3\] with axis_0=5 from 'rotation'"
      r', got \(4, 3\)',
    ),
    (
      lambda rigid: Rigid.from_quaternion(np.zeros((5, 4)), np.zeros((4, 3))),
      r"translation: .* with axis_0=5 from 'quaternion', got \(4, 3\)",
    ),
    (
      lambda rigid: Rigid.from_n_ca_c(
        np.zeros((5, 3)), np.zeros((4, 3)), np.zeros((5, 3))
      ),
      r"ca: .* with axis_0=5 from 'n', got \(4, 3\)",
    ),
    (
      lambda rigid: Rigid.from_flat12(np.zeros((5, 11))),
      r'tensor: expected shape \[axis_0, 12\], got \(5, 11\)',
    ),
  ],
)
def test_rigid_wrong_shape_names_argument(call, message):
  with pytest.raises(ValueError, match=message):
    call(random_rigid(0, (5,)))


def test_compose_with_array_is_type_error():
  with pytest.raises(TypeError):
    random_rigid(0) @ 3.0


@pytest.fixture(scope='module')
def golden():
  with np.load(GOLDEN, allow_pickle=False) as arrays:
    return dict(arrays)


@jax.jit
def outputs_of_golden(quat, translation, update, points, three_points):
  rigid = Rigid.from_quaternion(quat, translation)
  # Both backbone updates of AF2 compose with the quaternion (1, b, c, d).
  quaternion = jnp.insert(update[:, :3], 0, 1, axis=-1)
  updated = rigid @ Rigid.from_quaternion(quaternion, update[:, 3:])
  from_points = Rigid.from_three_points(*jnp.moveaxis(three_points, 1, 0))
  return {
    'rotation': rigid.rotation,
    'apply_points': rigid.apply(points),
    'invert_points': rigid.apply_inverse(points),
    'rot_to_quat': rigid.to_quaternion7()[:, :4],
    'pre_compose_tensor': updated.to_quaternion7(),
    'pre_compose_rotation': updated.rotation,
    'multimer_update_3x4': updated.to_3x4(),
    'rigid_from_3_points_flat12': from_points.to_flat12(),
  }


@pytest.mark.parametrize(
  ('dtype', 'atol'), [(np.float32, 2e-5), (np.float64, 1e-12)]
)
def test_rigid_golden_matches_af2(golden, dtype, atol):
  """AF2's own float32 error is 4e-6; the README of the goldens allows 2e-5."""
  names = ['quat', 'translation', 'update', 'points', 'three_points']
  with jax.enable_x64(True):
    actual = outputs_of_golden(
      *(golden[f'inputs/{name}'].astype(dtype) for name in names)
    )
  for name, value in actual.items():
    assert value.dtype == dtype
    value = np.array(value)
    expected = golden[f'outputs64/{name}']
    if name in ('rot_to_quat', 'pre_compose_tensor'):
      # The sign of a quaternion is free.
      product = np.sum(value[:, :4] * expected[:, :4], -1, keepdims=True)
      value[:, :4] *= np.sign(product)
    np.testing.assert_allclose(value, expected, atol=atol, err_msg=name)


def test_from_n_ca_c_golden_matches_multimer(golden):
  """The multimer takes max(|v|^2, 1e-12), the monomer adds 1e-8 to |v|^2."""
  with jax.enable_x64(True):
    points = golden['inputs/three_points'].astype(np.float64)
    expected = golden['outputs64/multimer_make_transform_from_reference']
    n, ca, c = np.moveaxis(points, 1, 0)
    np.testing.assert_allclose(
      Rigid.from_n_ca_c(n, ca, c).to_3x4(), expected, atol=2e-7
    )
    frames = Rigid.from_n_ca_c(n, ca, c, parameterisation='multimer')
    np.testing.assert_allclose(frames.to_3x4(), expected, atol=1e-12)


def test_from_flat12_golden_round_trips(golden):
  flat = golden['outputs/frames_flat12']
  np.testing.assert_array_equal(Rigid.from_flat12(flat).to_flat12(), flat)


def test_from_quaternion7_golden_is_not_normalised(golden):
  quaternion = golden['inputs/pred_quat']
  tensor = np.concatenate(
    [quaternion, golden['inputs/pred_translation']], axis=-1
  )
  scale = np.sum(quaternion**2, -1)
  np.testing.assert_allclose(
    np.linalg.det(Rigid.from_quaternion7(tensor).rotation), scale**3, rtol=1e-5
  )
  np.testing.assert_allclose(
    np.linalg.det(Rigid.from_quaternion7(tensor, normalise=True).rotation),
    1,
    rtol=1e-5,
  )


def test_rigid_docstring_examples_run():
  result = doctest.testmod(rigid_lib)
  assert result.attempted > 0
  assert result.failed == 0
