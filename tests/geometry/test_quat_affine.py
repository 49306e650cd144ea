"""Backbone frames: AF2's two updates, gradients, layouts."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax import geometry
from structattn_jax.geometry import QuatAffine, rigid_from_update

GOLDEN = pathlib.Path(__file__).parents[1] / 'goldens/af2_ipa/geometry_fape.npz'


@pytest.fixture(scope='module')
def golden():
  with np.load(GOLDEN, allow_pickle=False) as file:
    return dict(file)


@pytest.fixture
def updates():
  rng = np.random.default_rng(0)
  return rng.standard_normal((4, 5, 6), np.float32)


@pytest.mark.parametrize(
  ('dtype', 'bound'), [(np.float32, 2e-5), (np.float64, 1e-12)]
)
def test_updates_golden_match_af2(golden, dtype, bound):
  """AF2's own float32 error is 4e-6; the README of the goldens allows 2e-5."""
  with jax.enable_x64(dtype == np.float64):
    quat, translation, update, points = (
      jnp.asarray(golden[f'inputs/{name}'].astype(dtype))
      for name in ('quat', 'translation', 'update', 'points')
    )
    frames = QuatAffine(geometry.normalise_quaternion(quat), translation)
    moved = frames.pre_compose(update)
    rigid = frames.to_rigid()
    got = {
      'rotation': frames.rotation,
      'pre_compose_tensor': moved.to_tensor(),
      'pre_compose_rotation': moved.rotation,
      'multimer_update_3x4': (rigid @ rigid_from_update(update)).to_3x4(),
      'apply_points': rigid.apply(points),
      'invert_points': rigid.apply_inverse(points),
    }
    for name, value in got.items():
      assert value.dtype == dtype
      want = golden[f'outputs64/{name}']
      assert np.abs(np.asarray(value) - want).max() < bound, name


def test_updates_agree_as_rotations(updates):
  """Both parameterisations are the same algorithm while norms are one."""
  affine, rigid = QuatAffine.identity((5,)), geometry.Rigid.identity((5,))
  for update in updates:
    affine = affine.pre_compose(update)
    rigid = rigid @ rigid_from_update(update)
  np.testing.assert_allclose(affine.rotation, rigid.rotation, atol=1e-5)
  np.testing.assert_allclose(affine.translation, rigid.translation, atol=1e-5)


def test_zero_update_changes_nothing(updates):
  frames = QuatAffine.identity((5,)).pre_compose(updates[0])
  same = frames.pre_compose(np.zeros((5, 6), np.float32))
  np.testing.assert_allclose(same.to_tensor(), frames.to_tensor(), atol=1e-7)
  identity = rigid_from_update(np.zeros((5, 6), np.float32))
  np.testing.assert_array_equal(
    identity.to_3x4(), geometry.Rigid.identity((5,)).to_3x4()
  )


def test_tensor_round_trips_without_normalisation():
  tensor = np.arange(14.0, dtype=np.float32).reshape(2, 7)
  frames = QuatAffine.from_tensor(tensor)
  np.testing.assert_array_equal(frames.to_tensor(), tensor)
  np.testing.assert_allclose(
    np.linalg.det(frames.rotation),
    np.sum(tensor[:, :4] ** 2, -1) ** 3,
    rtol=1e-4,
  )


@pytest.mark.parametrize('scale', [0.0, 1e-20, 1.0, 1e6])
def test_gradients_are_finite_at_any_size(updates, scale):
  def loss(update):
    affine = QuatAffine.identity((5,)).pre_compose(update)
    rigid = geometry.Rigid.identity((5,)) @ rigid_from_update(update)
    return affine.to_tensor().sum() + rigid.to_3x4().sum()

  assert np.isfinite(jax.grad(loss)(scale * updates[0])).all()


def test_stop_rotation_gradient_keeps_that_of_the_translation(updates):
  def loss(update):
    first = QuatAffine.identity((5,)).pre_compose(update)
    return first.stop_rotation_gradient().pre_compose(updates[1]).to_tensor()

  gradient = jax.jacobian(loss)(updates[0])
  np.testing.assert_array_equal(gradient[..., :3], 0)
  assert np.abs(gradient[..., 3:]).max() == 1


def test_frames_are_pytrees_under_jit_and_vmap(updates):
  frames = QuatAffine.identity((4, 5))
  want = frames.pre_compose(updates).scale_translation(3.0)
  move = jax.jit(jax.vmap(lambda x, u: x.pre_compose(u).scale_translation(3.0)))
  got = move(frames, updates)
  np.testing.assert_allclose(got.to_tensor(), want.to_tensor(), atol=1e-6)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: QuatAffine.from_tensor(np.ones((2, 6))), 'tensor: expected'),
    (lambda: rigid_from_update(np.ones((2, 7))), 'update: expected'),
    (
      lambda: QuatAffine.identity((2,)).pre_compose(np.ones((3, 6))),
      'update: expected',
    ),
  ],
)
def test_wrong_shape_names_argument(call, message):
  with pytest.raises(ValueError, match=message):
    call()
