"""Rigid alignment: goldens, singular values, degenerate clouds, gradients."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax import geometry
from structattn_jax.geometry import alignment
from structattn_jax.reference import diffusion as reference

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens/boltz_diffusion'
align = jax.jit(geometry.weighted_rigid_align)
differentiated = functools.partial(
  geometry.weighted_rigid_align, differentiate=True
)


def random_rotation(rng):
  q = np.linalg.qr(rng.normal(size=(3, 3)))[0]
  return q * np.sign(np.linalg.det(q))


def clouds(kind, seed, n=40):
  """A cloud, a moved and disturbed copy, weights and mask."""
  rng = np.random.default_rng(seed)
  x = 10 * rng.normal(size=(n, 3))
  if kind == 'planar':
    x[:, 2] = 0
  if kind == 'thin':
    x[:, 1:] /= 30
  x = x @ random_rotation(rng)
  y = x @ random_rotation(rng)
  if kind == 'mirrored':
    y = y * [-1, 1, 1]
  if kind == 'inverted':
    y = -y
  y = y + 0.1 * rng.normal(size=(n, 3)) + 20 * rng.normal(size=3)
  if kind == 'half_turn':
    y = x * [-1, -1, 1]
  if kind == 'unrelated':
    y = 10 * rng.normal(size=(n, 3))
  if kind == 'far':
    x, y = x + 1e4, y - [1e4, 0, 2e4]
  weights = rng.choice([1.0, 6.0, 11.0], n)
  mask = rng.random(n) < 0.8
  return x.astype(np.float32), y.astype(np.float32), weights, mask


def by_singular_values(x, y, weights, mask):
  """What upstream does, in float32 and with the same sums as the oracle."""
  w = np.where(mask, weights, 0).astype(np.float32)[:, None]
  mean_x, mean_y = ((w * p).sum(0) / w.sum() for p in (x, y))
  u, _, vt = np.linalg.svd((w * (y - mean_y)).T @ (x - mean_x))
  turn = np.diag([1, 1, np.linalg.det(u @ vt)]).astype(np.float32)
  return (x - mean_x) @ (u @ turn @ vt).T + mean_y


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('case', ['v1_small', 'v2_small'])
def test_boltz_clouds_are_aligned_as_recorded(case, dtype):
  # A general cloud, a mirrored, an inverted and a planar one.
  with np.load(GOLDENS / f'{case}.npz') as file:
    names = ('true', 'pred', 'weights', 'mask')
    *arrays, mask = (file[f'inputs/align/{name}'] for name in names)
    want = file[f'outputs{"64" * (dtype == "float64")}/align/aligned']
  with jax.enable_x64(dtype == 'float64'):
    got = jax.jit(jax.vmap(geometry.weighted_rigid_align))(
      *(x.astype(dtype) for x in arrays), mask.astype(bool)
    )
  assert got.dtype == dtype
  bound = 1e-12 if dtype == 'float64' else 2e-6
  error = np.abs(np.asarray(got) - want)
  assert error.max() < bound * np.abs(want).max()


@pytest.mark.parametrize(
  'kind',
  ['general', 'unrelated', 'mirrored', 'inverted', 'planar', 'half_turn'],
)
def test_float32_is_as_accurate_as_singular_values(kind):
  ours, theirs = [], []
  for seed in range(20):
    x, y, weights, mask = clouds(kind, seed)
    truth = reference.rigid_align(
      x.astype(np.float64), y.astype(np.float64), weights, mask
    )
    for errors, fn in ((ours, align), (theirs, by_singular_values)):
      errors.append(np.abs(fn(x, y, weights, mask) - truth).max())
  # Means over clouds: of single ones sometimes this is better, sometimes that.
  # Both are a few roundings of 40, more where reflections make the rotation
  # less certain.
  assert np.mean(ours) < 3 * np.mean(theirs)
  assert np.mean(ours) < (3e-5 if kind in ('mirrored', 'inverted') else 1e-5)


def test_thin_clouds_keep_their_axis():
  x, y, weights, mask = clouds('thin', 0)
  truth = reference.rigid_align(*np.float64((x, y)), weights, mask)
  assert np.abs(align(x, y, weights, mask) - truth).max() < 1e-4


def test_float64_equals_the_oracle():
  kinds = ('general', 'unrelated', 'mirrored', 'planar', 'thin', 'half_turn')
  with jax.enable_x64(True):
    for kind in kinds:
      x, y, weights, mask = clouds(kind, 7)
      x, y = x.astype(np.float64), y.astype(np.float64)
      want = reference.rigid_align(x, y, weights, mask)
      got = align(x, y, weights, mask)
      assert np.abs(got - want).max() < 1e-11, kind


def test_result_is_accurate_far_from_the_origin():
  x, y, weights, mask = clouds('far', 3)
  truth = reference.rigid_align(
    x.astype(np.float64), y.astype(np.float64), weights, mask
  )
  # Two roundings of 2e4 in float32.
  assert np.abs(align(x, y, weights, mask) - truth).max() < 2e-3
  assert np.abs(by_singular_values(x, y, weights, mask) - truth).max() > 2e-3


def degenerate(kind):
  """Clouds whose rotation is not determined, and what must come out."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(6, 3)).astype(np.float32)
  y = rng.normal(size=(6, 3)).astype(np.float32)
  mask = np.ones(6, bool)
  want = None
  if kind == 'fully masked':
    mask[:] = False
    want = x
  if kind == 'single atom':
    mask[:] = False
    mask[2] = True
    want = x + y[2] - x[2]
  if kind == 'one place':
    x[:], y[:] = x[:1], y[:1]
    want = y
  if kind == 'collinear':
    along = np.arange(6, dtype=np.float32)[:, None]
    x, y = along * [1, 2, 2], along * [0, 3, 0] + 1
    x, y = x.astype(np.float32), y.astype(np.float32)
    want = y
  if kind == 'two atoms':
    mask[2:] = False
  if kind == 'planar square':
    x = np.zeros((6, 3), np.float32)
    x[:4, :2] = [[1, 0], [0, 1], [-1, 0], [0, -1]]
    y = x * np.array([1, 1, -1], np.float32)
    want = y
  if kind == 'mirrored octahedron':
    # The point-inverted copy of what has three equal axes.
    x = np.concatenate([np.eye(3), -np.eye(3)]).astype(np.float32)
    y = -x
  return x, y, mask, want


@pytest.mark.parametrize(
  'kind',
  [
    'fully masked',
    'single atom',
    'one place',
    'collinear',
    'two atoms',
    'planar square',
    'mirrored octahedron',
  ],
)
def test_undetermined_clouds_are_finite_in_value_and_gradient(kind):
  x, y, mask, want = degenerate(kind)
  weights = np.ones(6, np.float32)

  def loss(x, y, weights):
    moved = differentiated(x, y, weights, mask)
    return jnp.sum(jnp.where(mask[:, None], moved, 0) ** 3), moved

  (_, moved), gradients = jax.jit(
    jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
  )(x, y, weights)
  assert np.isfinite(moved).all()
  for gradient in gradients:
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() < 1e4
  if want is not None:
    np.testing.assert_allclose(moved, want, atol=3e-6)
  # Always a rigid motion.
  apart, before = (
    np.linalg.norm(p[:, None] - p[None], axis=-1) for p in (moved, x)
  )
  np.testing.assert_allclose(apart, before, atol=5e-6)


def test_nothing_to_keep_leaves_zero_gradient_of_the_target():
  x, y, mask, _ = degenerate('fully masked')
  d_x, d_y = jax.jit(
    jax.grad(lambda x, y: jnp.sum(differentiated(x, y, mask=mask) ** 2), (0, 1))
  )(x, y)
  np.testing.assert_array_equal(d_x, 2 * x)
  np.testing.assert_array_equal(d_y, 0)


@pytest.mark.parametrize('kind', ['general', 'mirrored', 'planar', 'unrelated'])
def test_gradient_equals_finite_differences(kind):
  x, y, weights, mask = clouds(kind, 5, n=8)
  mask[:4] = True
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    inputs = [jnp.asarray(p, jnp.float64) for p in (x, y, weights)]
    factors = rng.normal(size=x.shape)

    def loss(inputs):
      return jnp.sum(jnp.sin(differentiated(*inputs, mask) / 10) * factors)

    value = jax.jit(loss)
    gradients = jax.jit(jax.grad(loss))(inputs)
    for i, gradient in enumerate(gradients):
      for _ in range(2):
        along = rng.normal(size=gradient.shape)
        step = 1e-5

        def moved(sign, i=i, along=along, step=step):
          changed = [*inputs]
          changed[i] = changed[i] + sign * step * along
          return value(changed)

        found = (moved(1) - moved(-1)) / (2 * step)
        want = jnp.sum(gradient * along)
        assert abs(found - want) < 1e-7 * (1 + abs(want))


def test_result_is_detached_unless_asked_for():
  x, y, weights, mask = clouds('general', 0)
  for differentiate, is_zero in ((False, True), (True, False)):
    move = functools.partial(
      geometry.weighted_rigid_align, differentiate=differentiate
    )
    gradient = jax.jit(
      jax.grad(lambda x, move=move: jnp.sum(move(x, y, weights, mask) ** 2))
    )(x)
    assert (np.abs(gradient).max() == 0) == is_zero


def test_padding_may_hold_anything_but_is_moved_along():
  x, y, weights, mask = clouds('general', 1)
  want = align(x, y, weights, mask)
  dirty = x.copy(), y.copy(), weights.copy()
  for array in dirty:
    array[~mask] = 1e30
  got = align(*dirty, mask)
  np.testing.assert_array_equal(got[mask], want[mask])
  np.testing.assert_allclose(
    np.linalg.norm(want - want[0], axis=-1),
    np.linalg.norm(x - x[0], axis=-1),
    atol=2e-5,
  )


def test_vmap_and_dense_layouts_equal_single_clouds():
  many = [clouds('general', seed, n=12) for seed in range(3)]
  stacked = [np.stack(arrays) for arrays in zip(*many, strict=True)]
  together = jax.jit(jax.vmap(geometry.weighted_rigid_align))(*stacked)
  dense = [p.reshape(3, 4, *p.shape[1:]) for p in many[0]]
  shaped = geometry.weighted_rigid_align(*dense)
  for i, cloud in enumerate(many):
    np.testing.assert_allclose(together[i], align(*cloud), atol=2e-5)
  np.testing.assert_allclose(shaped.reshape(12, 3), together[0], atol=2e-5)


def test_eigenvectors_of_all_kinds_of_matrices():
  rng = np.random.default_rng(0)
  matrices = rng.normal(size=(60, 4, 4)) ** 3
  matrices[10] = 0
  matrices[11] = np.eye(4)
  matrices[12] = np.diag([1, 1, -1, -1])
  matrices[13] = np.ones((4, 4))
  matrices[14:24] *= np.logspace(-8, 0, 10)[:, None, None]
  spread = np.logspace(0, -9, 4)
  matrices[24:40] *= spread[:, None] * spread
  matrices = matrices + np.swapaxes(matrices, 1, 2)
  matrices /= np.maximum(np.abs(matrices).max((1, 2), keepdims=True), 1e-30)
  for dtype, bound in (('float32', 2e-6), ('float64', 3e-15)):
    with jax.enable_x64(dtype == 'float64'):
      values, vectors = jax.jit(jax.vmap(alignment.jacobi_eigh))(
        matrices.astype(dtype)
      )
    values, vectors = np.float64(values), np.float64(vectors)
    exact = matrices.astype(dtype).astype(np.float64)
    assert np.abs(np.sort(values) - np.linalg.eigvalsh(exact)).max() < bound
    residual = exact @ vectors - vectors * values[:, None]
    assert np.abs(residual).max() < bound
    products = np.swapaxes(vectors, 1, 2) @ vectors
    assert np.abs(products - np.eye(4)).max() < 2 * bound


def test_no_solver_is_called():
  x, y, weights, mask = clouds('general', 0)
  text = (
    jax.jit(jax.grad(lambda x: jnp.sum(differentiated(x, y, weights, mask))))
    .lower(x)
    .as_text()
  )
  assert 'custom_call' not in text
  assert 'lapack' not in text


@pytest.mark.parametrize(
  ('changes', 'error', 'message'),
  [
    ({'target': np.zeros((5, 3))}, ValueError, r'target: expected shape'),
    ({'moving': np.zeros((6, 2))}, ValueError, r'moving: expected shape'),
    (
      {'weights': np.ones(5)},
      ValueError,
      r"weights: expected shape \(6,\) from 'moving', got \(5,\)",
    ),
    ({'mask': np.ones((6, 1), bool)}, ValueError, r'mask: expected shape'),
    ({'mask': np.ones(6)}, TypeError, r'mask: expected bool values'),
  ],
)
def test_wrong_arguments_are_named(changes, error, message):
  arguments = {'moving': np.zeros((6, 3)), 'target': np.zeros((6, 3))}
  with pytest.raises(error, match=message):
    geometry.weighted_rigid_align(**(arguments | changes))
