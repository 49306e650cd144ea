"""Group laws, conversions, gradients and accuracy of rotations."""

import doctest

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from structattn_jax import geometry
from structattn_jax.geometry import rotation as rotation_lib

SETTINGS = hypothesis.settings(derandomize=True, deadline=None, max_examples=20)
SEEDS = st.integers(0, 2**31 - 1)

# Compiled as a whole: op by op, compilation would dominate the tests.
expm = jax.jit(jax.scipy.linalg.expm)
compose_rotations = jax.jit(geometry.compose_rotations)
multiply_quaternions = jax.jit(geometry.multiply_quaternions)
quaternion_to_rotation = jax.jit(geometry.quaternion_to_rotation)
rotation_from_axis_angle = jax.jit(geometry.rotation_from_axis_angle)
rotation_to_quaternion = jax.jit(geometry.rotation_to_quaternion)


def random_quaternions(seed, shape=()):
  gaussian = np.random.default_rng(seed).normal(size=(*shape, 4))
  return gaussian / np.linalg.norm(gaussian, axis=-1, keepdims=True)


def half_turns():
  """Rotations by exactly and by nearly 180 degrees about various axes."""
  axes = np.array(
    [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, -1, 1], [1, 2, 3]], float
  )
  axes /= np.linalg.norm(axes, axis=-1, keepdims=True)
  return 2 * axes[:, :, None] * axes[:, None, :] - np.eye(3)


def test_random_rotation_many_is_orthonormal_and_uniform():
  rotations = np.asarray(geometry.random_rotation(jax.random.key(0), (20000,)))
  assert rotations.shape == (20000, 3, 3)
  assert rotations.dtype == np.float32
  products = np.swapaxes(rotations, -1, -2) @ rotations
  np.testing.assert_allclose(products - np.eye(3), 0, atol=2e-6)
  np.testing.assert_allclose(np.linalg.det(rotations), 1, atol=2e-6)
  # Haar: every entry has mean 0 and variance 1/3; the trace has variance 1.
  np.testing.assert_allclose(rotations.mean(0), 0, atol=0.02)
  np.testing.assert_allclose((rotations**2).mean(0), 1 / 3, atol=0.01)
  trace = np.trace(rotations, axis1=-2, axis2=-1)
  assert abs((trace**2).mean() - 1) < 0.03


@SETTINGS
@hypothesis.given(SEEDS)
def test_quaternion_product_random_is_homomorphism(seed):
  with jax.enable_x64(True):
    p, q = random_quaternions(seed, (2, 5))
    np.testing.assert_allclose(
      quaternion_to_rotation(multiply_quaternions(p, q)),
      compose_rotations(quaternion_to_rotation(p), quaternion_to_rotation(q)),
      atol=1e-14,
    )


@SETTINGS
@hypothesis.given(SEEDS)
def test_quaternion_product_random_is_associative(seed):
  with jax.enable_x64(True):
    p, q, r = random_quaternions(seed, (3, 5))
    multiply = geometry.multiply_quaternions
    np.testing.assert_allclose(
      multiply(multiply(p, q), r), multiply(p, multiply(q, r)), atol=1e-14
    )


@SETTINGS
@hypothesis.given(SEEDS)
def test_rotation_to_quaternion_random_inverts_up_to_sign(seed):
  with jax.enable_x64(True):
    q = random_quaternions(seed, (7,))
    rotation = quaternion_to_rotation(q)
    # Double cover: q and -q are the same rotation.
    np.testing.assert_array_equal(rotation, quaternion_to_rotation(-q))
    back = rotation_to_quaternion(rotation)
    np.testing.assert_allclose(back, np.where(q[:, :1] < 0, -q, q), atol=1e-14)


def test_rotation_to_quaternion_half_turns_is_accurate():
  with jax.enable_x64(True):
    rotation = half_turns()
    quaternion = rotation_to_quaternion(rotation)
    np.testing.assert_allclose(
      quaternion_to_rotation(quaternion), rotation, atol=1e-15
    )
    np.testing.assert_array_equal(quaternion[:3], np.eye(4)[1:])
    assert np.all(np.abs(quaternion[:, 0]) < 1e-15)


def test_rotation_to_quaternion_near_half_turn_keeps_float32_accuracy():
  angles = np.pi - 10.0 ** -np.arange(1, 9)
  axis = np.array([2.0, -3.0, 6.0]) / 7
  rotation = rotation_from_axis_angle(angles[:, None] * axis)
  assert rotation.dtype == np.float32
  expected = np.concatenate(
    [np.cos(angles / 2)[:, None], np.sin(angles / 2)[:, None] * axis], -1
  )
  actual = np.asarray(rotation_to_quaternion(rotation))
  actual = actual * np.sign(np.sum(actual * expected, -1, keepdims=True))
  np.testing.assert_allclose(actual, expected, atol=3e-7)


def test_rotation_to_quaternion_zero_matrix_gives_identity():
  np.testing.assert_array_equal(
    rotation_to_quaternion(np.zeros((2, 3, 3))),
    [[1, 0, 0, 0]] * 2,
  )


def test_rotation_to_quaternion_gradient_matches_finite_differences():
  with jax.enable_x64(True):
    # Rotations whose largest component is each of w, x, y, z in turn.
    q = np.full((4, 4), 0.3) + 0.7 * np.eye(4)
    q /= np.linalg.norm(q, axis=-1, keepdims=True)
    tangent = np.random.default_rng(0).normal(size=(4, 3))

    @jax.jit
    def along(t):
      turned = compose_rotations(
        quaternion_to_rotation(q),
        rotation_from_axis_angle(t * tangent),
      )
      return rotation_to_quaternion(turned)

    step = 1e-5
    numerical = (along(step) - along(-step)) / (2 * step)
    exact = jax.jvp(along, (0.0,), (1.0,))[1]
    np.testing.assert_allclose(exact, numerical, atol=1e-9)


def test_rotation_to_quaternion_degenerate_has_finite_gradient():
  rotation = np.stack([np.eye(3), np.zeros((3, 3)), *half_turns()])
  jacobian = jax.jit(jax.vmap(jax.jacobian(geometry.rotation_to_quaternion)))(
    rotation.astype(np.float32)
  )
  assert np.all(np.isfinite(jacobian))
  assert np.abs(jacobian).max() < 10


def test_quaternion_functions_zero_parts_have_finite_gradients():
  def round_trip(q):
    q = geometry.normalise_quaternion(q)
    return rotation_to_quaternion(quaternion_to_rotation(q)), q

  one_part = np.concatenate([np.eye(4), np.zeros((1, 4))]).astype(np.float32)
  for jacobian in jax.jit(jax.vmap(jax.jacobian(round_trip)))(one_part):
    assert np.all(np.isfinite(jacobian))
  np.testing.assert_array_equal(
    geometry.normalise_quaternion(one_part), one_part
  )


def test_quaternion_to_rotation_scaled_is_not_normalised():
  q = random_quaternions(0)
  np.testing.assert_allclose(
    quaternion_to_rotation(3 * q),
    9 * quaternion_to_rotation(q),
    rtol=1e-6,
    atol=1e-6,
  )


@SETTINGS
@hypothesis.given(SEEDS)
def test_rotation_from_axis_angle_random_matches_matrix_exponential(seed):
  with jax.enable_x64(True):
    vector = 2 * np.random.default_rng(seed).normal(size=3)
    # K u = v x u, column by column.
    generator = np.stack([np.cross(vector, u) for u in np.eye(3)], -1)
    np.testing.assert_allclose(
      rotation_from_axis_angle(vector),
      expm(generator),
      atol=1e-13,
    )


@pytest.mark.parametrize('angle', [0.0, 1e-20, 1e-6, 9.9e-3, 1.01e-2, 1.0])
def test_rotation_from_axis_angle_small_angle_is_exact(angle):
  with jax.enable_x64(True):
    rotation = rotation_from_axis_angle(np.array([0, angle, 0]))
    sine, cosine = np.sin(angle), np.cos(angle)
    expected = [[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]]
    np.testing.assert_allclose(rotation, expected, rtol=1e-15, atol=1e-16)


def test_rotation_from_axis_angle_zero_gradient_is_generator():
  jacobian = jax.jit(jax.jacobian(geometry.rotation_from_axis_angle))(
    jnp.zeros(3)
  )
  for axis in range(3):
    for unit in range(3):
      np.testing.assert_array_equal(
        jacobian[:, unit, axis], np.cross(np.eye(3)[axis], np.eye(3)[unit])
      )


def test_rotation_from_axis_angle_threshold_gradient_is_continuous():
  with jax.enable_x64(True):
    jacobian = jax.jit(jax.jacobian(geometry.rotation_from_axis_angle))
    below, above = (
      jacobian(np.array([0.6, 0.0, 0.8]) * angle) for angle in (9.9999e-3, 1e-2)
    )
    np.testing.assert_allclose(below, above, atol=2e-6)
    second = jax.jit(jax.jacobian(jacobian))(jnp.zeros(3))
    assert np.all(np.isfinite(second))


def test_rotation_from_two_vectors_hand_numbers():
  rotation = geometry.rotation_from_two_vectors(
    np.array([0.0, 2.0, 0.0]), np.array([-3.0, 5.0, 0.0])
  )
  np.testing.assert_allclose(
    rotation, [[0, -1, 0], [1, 0, 0], [0, 0, 1]], atol=1e-6
  )


@pytest.mark.parametrize('parameterisation', ['monomer', 'multimer'])
@pytest.mark.parametrize(
  ('e0', 'e1'),
  [([0.0, 0, 0], [0.0, 0, 0]), ([1.0, 0, 0], [2.0, 0, 0])],
  ids=['zero', 'parallel'],
)
def test_rotation_from_two_vectors_degenerate_has_finite_gradient(
  e0, e1, parameterisation
):
  def rotation(e0, e1):
    return geometry.rotation_from_two_vectors(
      e0, e1, parameterisation=parameterisation
    )

  jacobians = jax.jit(jax.jacobian(rotation, (0, 1)))(
    jnp.array(e0), jnp.array(e1)
  )
  for jacobian in jacobians:
    assert np.all(np.isfinite(jacobian))


def test_rotation_from_two_vectors_multimer_bounds_the_length():
  with jax.enable_x64(True):
    e0, e1 = jnp.array([3e-7, 4e-7, 0.0]), jnp.array([0.0, 0.0, 2.0])
    added, bounded = (
      geometry.rotation_from_two_vectors(e0, e1, parameterisation=x)[:, 0]
      for x in ('monomer', 'multimer')
    )
    np.testing.assert_allclose(added, e0 / np.sqrt(25e-14 + 1e-8), rtol=1e-12)
    np.testing.assert_allclose(bounded, e0 / 1e-6, rtol=1e-12)


def test_rotation_from_two_vectors_unknown_form_raises():
  with pytest.raises(ValueError, match=r"parameterisation.*got 'dimer'"):
    geometry.rotation_from_two_vectors(
      jnp.ones(3), jnp.ones(3), parameterisation='dimer'
    )


def test_rotate_inverse_undoes_rotate_and_matches_einsum():
  with jax.enable_x64(True):
    rotation = geometry.random_rotation(jax.random.key(1), (4,), jnp.float64)
    points = np.random.default_rng(1).normal(size=(6, 4, 3))
    turned = geometry.rotate(rotation, points)
    np.testing.assert_allclose(
      turned, np.einsum('nij,mnj->mni', rotation, points), atol=1e-14
    )
    np.testing.assert_allclose(
      geometry.rotate_inverse(rotation, turned), points, atol=1e-14
    )


@pytest.mark.parametrize(
  ('dtype', 'expected'),
  [('bfloat16', 'float32'), ('float32', 'float32'), ('float64', 'float64')],
)
def test_rotation_functions_keep_at_least_float32(dtype, expected):
  def call_all(vector, quaternion, rotation):
    return [
      geometry.rotate(rotation, vector),
      geometry.rotate_inverse(rotation, vector),
      geometry.compose_rotations(rotation, rotation),
      geometry.quaternion_to_rotation(quaternion),
      geometry.normalise_quaternion(quaternion),
      geometry.multiply_quaternions(quaternion, quaternion),
      geometry.rotation_to_quaternion(rotation),
      geometry.rotation_from_axis_angle(vector),
      geometry.rotation_from_two_vectors(vector, vector),
    ]

  with jax.enable_x64(True):
    results = jax.eval_shape(
      call_all, *(jnp.zeros(shape, dtype) for shape in [3, 4, (3, 3)])
    )
  assert {result.dtype.name for result in results} == {expected}


def test_rotation_functions_jit_and_vmap_match_eager():
  vectors = np.random.default_rng(2).normal(size=(5, 3)).astype(np.float32)

  def chain(vector):
    rotation = rotation_from_axis_angle(vector)
    return geometry.rotate(
      quaternion_to_rotation(rotation_to_quaternion(rotation)),
      vector,
    )

  eager = chain(vectors)
  np.testing.assert_allclose(eager, vectors, atol=1e-6)  # the axis stays
  np.testing.assert_allclose(jax.jit(chain)(vectors), eager, atol=1e-6)
  np.testing.assert_allclose(jax.vmap(chain)(vectors), eager, atol=1e-6)


def test_rotation_products_use_no_matrix_unit():
  def products(rotation, points):
    return geometry.rotate(compose_rotations(rotation, rotation), points)

  rotation, points = jnp.zeros((5, 3, 3)), jnp.zeros((5, 3))
  assert 'dot_general' not in str(jax.make_jaxpr(products)(rotation, points))


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (
      lambda: geometry.rotate(np.zeros((5, 3, 2)), np.zeros(3)),
      r'rotation: expected shape \[axis_0, 3, 3\], got \(5, 3, 2\)',
    ),
    (
      lambda: geometry.rotate(np.zeros((5, 3, 3)), np.zeros((4, 3))),
      r'rotation, points: expected leading axes that broadcast, got '
      r'rotation \(5,\) and points \(4,\)',
    ),
    (
      lambda: quaternion_to_rotation(np.zeros(3)),
      r'quaternion: expected shape \[4\], got \(3,\)',
    ),
    (
      lambda: geometry.rotation_from_two_vectors(
        np.zeros((5, 3)), np.zeros((4, 3))
      ),
      r"e1: expected shape \[axis_0, 3\] with axis_0=5 from 'e0', got \(4, 3\)",
    ),
  ],
)
def test_rotation_functions_wrong_shape_name_argument(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_rotation_docstring_examples_run():
  result = doctest.testmod(rotation_lib)
  assert result.attempted > 0
  assert result.failed == 0
