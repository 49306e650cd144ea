"""Random rigid moves: both kinds of rotation, both centres, far away."""

import jax
import numpy as np
import pytest

from structattn_jax import diffusion
from structattn_jax.reference import diffusion as reference

KINDS = ['gram_schmidt', 'quaternion']


def quaternion_matrix(q):
  """R v = q v q*, written out with the Hamilton product."""

  def times(a, b):
    return np.array(
      [
        a[0] * b[0] - a[1:] @ b[1:],
        *(a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:])),
      ]
    )

  conjugate = q * [1, -1, -1, -1]
  columns = [
    times(times(q, np.array([0, *v])), conjugate)[1:] for v in np.eye(3)
  ]
  return np.stack(columns, 1)


def test_gram_schmidt_rows_equal_the_oracle():
  normal = np.random.default_rng(0).normal(size=(2, 3))
  with jax.enable_x64(True):
    got = diffusion.rotation_from_normal(normal)
  np.testing.assert_allclose(got, reference.gram_schmidt(*normal), atol=1e-14)


def test_quaternion_and_its_sign_rule():
  q = np.random.default_rng(0).normal(size=4)
  with jax.enable_x64(True):
    got, opposite = (
      diffusion.rotation_from_normal(sign * q, 'quaternion') for sign in (1, -1)
    )
  # Boltz divides by a norm of the sign of the first entry.
  unit = q / np.copysign(np.linalg.norm(q), q[0])
  assert unit[0] > 0
  np.testing.assert_allclose(got, quaternion_matrix(unit), atol=1e-14)
  np.testing.assert_array_equal(got, opposite)


@pytest.mark.parametrize('kind', KINDS)
def test_moves_are_uniform_rotations_and_normal_translations(kind):
  moves = jax.jit(jax.vmap(lambda key: diffusion.random_move(key, kind)))(
    jax.random.split(jax.random.key(0), 20000)
  )
  rotation = np.asarray(moves.rotation)
  product = rotation @ np.swapaxes(rotation, 1, 2)
  # Gram-Schmidt loses digits when the two vectors are nearly parallel.
  error = np.abs(product - np.eye(3)).max((1, 2))
  assert np.quantile(error, 0.99) < 2e-6
  assert error.max() < (2e-4 if kind == 'gram_schmidt' else 2e-6)
  np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=2e-5)
  # Haar measure: entries have mean 0 and variance 1/3, the trace variance 1.
  np.testing.assert_allclose(rotation.mean(0), 0, atol=0.02)
  np.testing.assert_allclose((rotation**2).mean(0), 1 / 3, atol=0.01)
  np.testing.assert_allclose(np.trace(rotation, 0, 1, 2).var(), 1, atol=0.05)
  np.testing.assert_allclose(moves.translation.mean(0), 0, atol=0.03)
  np.testing.assert_allclose(moves.translation.std(0), 1, atol=0.03)


def some_move(seed=0):
  rng = np.random.default_rng(seed)
  return diffusion.RigidMove(
    reference.gram_schmidt(*rng.normal(size=(2, 3))), rng.normal(size=3)
  )


def test_centres_of_both_kinds_equal_their_formulas():
  rng = np.random.default_rng(1)
  x, mask = 5 * rng.normal(size=(9, 3)), rng.random(9) < 0.6
  move = some_move()
  with jax.enable_x64(True):
    masked, padded = (
      diffusion.centre_random_augmentation(x, mask, move, centre=centre)
      for centre in ('masked', 'padded')
    )
  want = (x - x[mask].mean(0)) @ move.rotation + move.translation
  np.testing.assert_allclose(masked, want * mask[:, None], atol=1e-13)
  want = (x - x.mean(0)) @ move.rotation + move.translation
  np.testing.assert_allclose(padded, want, atol=1e-13)


def test_dense_layout_is_one_structure():
  rng = np.random.default_rng(1)
  x, mask = rng.normal(size=(4, 3, 3)), rng.random((4, 3)) < 0.6
  move = some_move()
  dense = diffusion.centre_random_augmentation(x, mask, move)
  flat = diffusion.centre_random_augmentation(
    x.reshape(12, 3), mask.reshape(12), move
  )
  np.testing.assert_allclose(dense.reshape(12, 3), flat, atol=1e-6)


def test_far_from_the_origin_the_move_is_accurate():
  rng = np.random.default_rng(2)
  x = (1e4 + 20 * rng.normal(size=(3000, 3))).astype(np.float32)
  mask, move = np.ones(3000, bool), some_move()
  exact = x.astype(np.float64)
  want = (exact - exact.mean(0)) @ move.rotation + move.translation
  for centre in ('masked', 'padded'):
    got = diffusion.centre_random_augmentation(x, mask, move, centre=centre)
    assert np.abs(got - want).max() < 5e-5


def test_garbage_in_padding_reaches_nothing_and_no_atom_gives_zeros():
  x = np.ones((4, 3), np.float32)
  mask = np.array([True, True, False, False])
  dirty = np.where(mask[:, None], x, np.nan).astype(np.float32)
  move = some_move()
  np.testing.assert_array_equal(
    diffusion.centre_random_augmentation(dirty, mask, move),
    diffusion.centre_random_augmentation(x, mask, move),
  )
  none = np.zeros(4, bool)
  got, pull = jax.vjp(
    lambda x: diffusion.centre_random_augmentation(x, none, move), x
  )
  np.testing.assert_array_equal(got, 0)
  np.testing.assert_array_equal(pull(np.ones_like(x))[0], 0)


@pytest.mark.parametrize(
  ('call', 'error', 'message'),
  [
    (
      lambda: diffusion.rotation_from_normal(np.zeros((2, 3)), 'euler'),
      ValueError,
      "rotation: expected 'gram_schmidt' or 'quaternion', got 'euler'",
    ),
    (
      lambda: diffusion.rotation_from_normal(np.zeros(4)),
      ValueError,
      r'normal: expected shape \[2, 3\]',
    ),
    (
      lambda: diffusion.centre_random_augmentation(
        np.zeros((4, 3)), np.ones(5, bool), some_move()
      ),
      ValueError,
      r"mask: expected shape \(4,\) from 'positions', got \(5,\)",
    ),
    (
      lambda: diffusion.centre_random_augmentation(
        np.zeros((4, 3)), np.ones(4), some_move()
      ),
      TypeError,
      'mask: expected bool',
    ),
    (
      lambda: diffusion.centre_random_augmentation(
        np.zeros((4, 3)), np.ones(4, bool), some_move(), centre='mean'
      ),
      ValueError,
      "centre: expected 'masked' or 'padded', got 'mean'",
    ),
  ],
)
def test_mistakes_are_named(call, error, message):
  with pytest.raises(error, match=message):
    call()
