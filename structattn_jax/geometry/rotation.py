"""Rotation matrices and quaternions with finite gradients everywhere.

Jumper et al. (2021) Suppl. 1.8; mirrors alphafold model/quat_affine.py and
model/r3.py @ c77e5d2.

Conventions: rotation matrices [..., 3, 3] act on column vectors, x' = R x;
quaternions [..., 4] are (w, x, y, z); points and vectors are [..., 3]. float32
and float64 inputs keep their dtype. Lower precision is raised to float32 and
stays there, because coordinates do not survive rounding to bfloat16.

All products are written as elementwise multiply-adds. As matrix products they
could run in TF32 (GPU) or bfloat16 (TPU) by default, which moves an atom 100
angstrom from the origin by 0.05 angstrom (TF32), and 3 x 3 products do not
fill matrix units anyway. AF2's r3.py does the same for the same reason.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import checks, numerics

Parameterisation = Literal['monomer', 'multimer']

# Of squared lengths: added by AF2's monomer, a lower bound in its multimer.
_EPSILON = {'monomer': 1e-8, 'multimer': 1e-12}


def rotate(
  rotation: jax.typing.ArrayLike, points: jax.typing.ArrayLike
) -> jax.Array:
  """Rotates points: x' = R x.

  Args:
    rotation: [..., 3, 3] float.
    points: [..., 3] float, any unit; leading axes broadcast with those of
      `rotation` as in NumPy.

  Returns:
    [..., 3] rotated points, at least float32.

  Raises:
    ValueError: if a trailing axis is not 3, or leading axes do not broadcast.
  """
  check_trailing(rotation=(rotation, '3 3'))
  check_trailing(points=(points, '3'))
  check_broadcast(rotation=(rotation, 2), points=(points, 1))
  rotation = numerics.at_least_float32(rotation)
  points = numerics.at_least_float32(points)
  return (
    rotation[..., :, 0] * points[..., 0:1]
    + rotation[..., :, 1] * points[..., 1:2]
    + rotation[..., :, 2] * points[..., 2:3]
  )


def rotate_inverse(
  rotation: jax.typing.ArrayLike, points: jax.typing.ArrayLike
) -> jax.Array:
  """Rotates points back: x = R^T x'.

  Args:
    rotation: [..., 3, 3] float.
    points: [..., 3] float, any unit; leading axes broadcast with those of
      `rotation` as in NumPy.

  Returns:
    [..., 3] rotated points, at least float32.

  Raises:
    ValueError: if a trailing axis is not 3, or leading axes do not broadcast.
  """
  check_trailing(rotation=(rotation, '3 3'))
  return rotate(jnp.swapaxes(jnp.asarray(rotation), -1, -2), points)


def compose_rotations(
  first: jax.typing.ArrayLike, second: jax.typing.ArrayLike
) -> jax.Array:
  """Product of rotations, `first` applied after `second`: R = A B.

  Args:
    first: [..., 3, 3] float, A.
    second: [..., 3, 3] float, B; leading axes broadcast as in NumPy.

  Returns:
    [..., 3, 3] A B, at least float32.

  Raises:
    ValueError: if an argument is not [..., 3, 3], or they do not broadcast.
  """
  check_trailing(first=(first, '3 3'))
  check_trailing(second=(second, '3 3'))
  check_broadcast(first=(first, 2), second=(second, 2))
  first = numerics.at_least_float32(first)
  second = numerics.at_least_float32(second)
  return (
    first[..., :, 0:1] * second[..., 0:1, :]
    + first[..., :, 1:2] * second[..., 1:2, :]
    + first[..., :, 2:3] * second[..., 2:3, :]
  )


def quaternion_to_rotation(quaternion: jax.typing.ArrayLike) -> jax.Array:
  """Rotation matrix of a quaternion, homogeneous quadratic form.

  R = [[w²+x²-y²-z², 2(xy-wz), 2(xz+wy)],
       [2(xy+wz), w²-x²+y²-z², 2(yz-wx)],
       [2(xz-wy), 2(yz+wx), w²-x²-y²+z²]]

  As in AF2, nothing is normalised: a quaternion of norm s gives s² R. Use
  `normalise_quaternion` first unless the norm is known to be one.

  Args:
    quaternion: [..., 4] float, (w, x, y, z).

  Returns:
    [..., 3, 3], at least float32.

  Raises:
    ValueError: if the last axis is not 4.
  """
  check_trailing(quaternion=(quaternion, '4'))
  w, x, y, z = _unstack(numerics.at_least_float32(quaternion))
  return _stack_matrix(
    [
      [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
      [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
      [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
    ]
  )


def normalise_quaternion(quaternion: jax.typing.ArrayLike) -> jax.Array:
  """Scales quaternions to norm one: q / |q|.

  Plain division without an epsilon, as AF2's `QuatAffine(normalize=True)`. A
  zero quaternion, as in padding, stays zero and has a finite gradient.

  Args:
    quaternion: [..., 4] float, (w, x, y, z).

  Returns:
    [..., 4], at least float32.

  Raises:
    ValueError: if the last axis is not 4.
  """
  check_trailing(quaternion=(quaternion, '4'))
  quaternion = numerics.at_least_float32(quaternion)
  squared = jnp.sum(jnp.square(quaternion), -1, keepdims=True)
  return quaternion / jnp.sqrt(jnp.where(squared > 0, squared, 1))


def multiply_quaternions(
  first: jax.typing.ArrayLike, second: jax.typing.ArrayLike
) -> jax.Array:
  """Hamilton product; its rotation applies `first` after `second`.

  Args:
    first: [..., 4] float, (w, x, y, z).
    second: [..., 4] float; leading axes broadcast as in NumPy.

  Returns:
    [..., 4] product, at least float32.

  Raises:
    ValueError: if a last axis is not 4, or leading axes do not broadcast.
  """
  check_trailing(first=(first, '4'))
  check_trailing(second=(second, '4'))
  check_broadcast(first=(first, 1), second=(second, 1))
  w1, x1, y1, z1 = _unstack(numerics.at_least_float32(first))
  w2, x2, y2, z2 = _unstack(numerics.at_least_float32(second))
  return jnp.stack(
    [
      w1 * w2 - x1 * x2 - y1 * y2 - z1 * z2,
      w1 * x2 + x1 * w2 + y1 * z2 - z1 * y2,
      w1 * y2 - x1 * z2 + y1 * w2 + z1 * x2,
      w1 * z2 + x1 * y2 - y1 * x2 + z1 * w2,
    ],
    -1,
  )


def rotation_to_quaternion(rotation: jax.typing.ArrayLike) -> jax.Array:
  """Unit quaternion of a rotation, stable and differentiable everywhere.

  The entries of R give the matrix 4 q qᵀ linearly. Its row i is 4 q_i q, so
  the row with the largest diagonal entry 4 q_i² >= 1, normalised, is q without
  cancellation, also at 180 degrees. (AF2 takes an eigenvector of a
  matrix whose other three eigenvalues coincide; JAX's gradient of that is NaN
  at the identity and at half turns about an axis.) The zero matrix, which AF2
  uses for missing groups, gives the identity.

  The sign is chosen so that w >= 0. At exactly 180 degrees w is zero and the
  largest of x, y, z is positive. Quaternions jump between q and -q there, as
  any choice of sign must.

  Args:
    rotation: [..., 3, 3] float, orthonormal up to rounding.

  Returns:
    [..., 4] (w, x, y, z), norm one, w >= 0, at least float32.

  Raises:
    ValueError: if `rotation` is not [..., 3, 3].
  """
  check_trailing(rotation=(rotation, '3 3'))
  r = numerics.at_least_float32(rotation)
  xx, yy, zz = r[..., 0, 0], r[..., 1, 1], r[..., 2, 2]
  wx = r[..., 2, 1] - r[..., 1, 2]
  wy = r[..., 0, 2] - r[..., 2, 0]
  wz = r[..., 1, 0] - r[..., 0, 1]
  xy = r[..., 0, 1] + r[..., 1, 0]
  xz = r[..., 0, 2] + r[..., 2, 0]
  yz = r[..., 1, 2] + r[..., 2, 1]
  outer = _stack_matrix(
    [
      [1 + xx + yy + zz, wx, wy, wz],
      [wx, 1 + xx - yy - zz, xy, xz],
      [wy, xy, 1 - xx + yy - zz, yz],
      [wz, xz, yz, 1 - xx - yy + zz],
    ]
  )
  largest = jnp.argmax(jnp.diagonal(outer, axis1=-2, axis2=-1), -1)
  row = jnp.take_along_axis(outer, largest[..., None, None], -2)[..., 0, :]
  return normalise_quaternion(jnp.where(row[..., 0:1] < 0, -row, row))


def rotation_from_axis_angle(axis_angle: jax.typing.ArrayLike) -> jax.Array:
  """Rotation about an axis by an angle, Rodrigues' formula.

  R = 1 + sin(θ)/θ K + (1 - cos(θ))/θ² K²,  θ = |v|,  K u = v x u

  The coefficients are smooth in θ²; a series is used near zero so that the
  gradient at v = 0 is that of 1 + K rather than NaN.

    >>> quarter_turn = rotation_from_axis_angle([0.0, 0.0, np.pi / 2])
    >>> print(rotate(quarter_turn, [1.0, 0.0, 0.0]).round(4) + 0.0)
    [0. 1. 0.]

  Args:
    axis_angle: [..., 3] float, v: direction = axis, length = angle in radians.

  Returns:
    [..., 3, 3], at least float32.

  Raises:
    ValueError: if the last axis is not 3.
  """
  check_trailing(axis_angle=(axis_angle, '3'))
  vector = numerics.at_least_float32(axis_angle)
  square = jnp.sum(jnp.square(vector), -1)
  small = square < 1e-4
  # `where` alone would let NaN through the gradient of the unused branch.
  angle = jnp.sqrt(jnp.where(small, 1, square))
  # Three corrections are exact to 1e-18 below the threshold.
  sine = jnp.where(
    small,
    1 - square / 6 * (1 - square / 20 * (1 - square / 42)),
    jnp.sin(angle) / angle,
  )
  # (1 - cos θ)/θ² = 2 (sin(θ/2)/θ)², without the cancellation.
  half = jnp.where(
    small,
    0.5 - square / 48 * (1 - square / 80 * (1 - square / 168)),
    jnp.sin(angle / 2) / angle,
  )
  cosine = 2 * jnp.square(half)
  x, y, z = _unstack(vector)
  zero = jnp.zeros_like(x)
  cross = _stack_matrix([[zero, -z, y], [z, zero, -x], [-y, x, zero]])
  identity = jnp.eye(3, dtype=vector.dtype)
  # K² = v vᵀ - θ² 1
  cross_squared = (
    vector[..., :, None] * vector[..., None, :]
    - square[..., None, None] * identity
  )
  return (
    identity
    + sine[..., None, None] * cross
    + cosine[..., None, None] * cross_squared
  )


def rotation_from_two_vectors(
  e0: jax.typing.ArrayLike,
  e1: jax.typing.ArrayLike,
  *,
  epsilon: float | None = None,
  parameterisation: Parameterisation = 'monomer',
) -> jax.Array:
  """Gram-Schmidt: x axis along `e0`, `e1` in the upper half of the xy plane.

  u0 = e0 / |e0|,  u1 = (e1 - (e1·u0) u0) / |...|,  u2 = u0 x u1
  with |v| = sqrt(v·v + epsilon) as AF2's monomer (`rots_from_two_vecs`, Alg.
  21) or sqrt(max(v·v, epsilon)) as its multimer (`Rot3Array.from_two_vectors`).
  Degenerate input has finite gradients (but then gives no rotation).

  Args:
    e0: [..., 3] float, any length.
    e1: [..., 3] float, any length, not parallel to `e0`; same leading axes.
    epsilon: added to squared lengths, or their lower bound, in their unit; None
      means upstream's: 1e-8 added (monomer), at least 1e-12 (multimer).
    parameterisation: 'monomer' or 'multimer', the two forms above.

  Returns:
    [..., 3, 3] with columns u0, u1, u2, at least float32.

  Raises:
    ValueError: if a last axis is not 3, the shapes differ, or the
      parameterisation is unknown.
  """
  check_trailing(e0=(e0, '3'), e1=(e1, '3'))
  if parameterisation not in _EPSILON:
    raise ValueError(
      "parameterisation: expected 'monomer' or 'multimer', got "
      f'{parameterisation!r}'
    )
  least = _EPSILON[parameterisation] if epsilon is None else epsilon

  def unit(v: jax.Array) -> jax.Array:
    if parameterisation == 'monomer':
      return v / numerics.safe_norm(v, epsilon=least)[..., None]
    squared = jnp.sum(jnp.square(v), -1, keepdims=True)
    return v / jnp.sqrt(jnp.maximum(squared, least))

  e0, e1 = numerics.at_least_float32(e0), numerics.at_least_float32(e1)
  u0 = unit(e0)
  u1 = unit(e1 - jnp.sum(e1 * u0, -1, keepdims=True) * u0)
  return jnp.stack([u0, u1, jnp.cross(u0, u1)], -1)


def random_rotation(
  key: jax.Array,
  shape: Sequence[int] = (),
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  """Draws rotations uniformly (Haar measure).

  A normalised Gaussian quaternion is uniform on the unit sphere in four
  dimensions, whose image is the uniform measure on rotations.

  Args:
    key: PRNG key.
    shape: leading axes.
    dtype: float32 or float64.

  Returns:
    [*shape, 3, 3] in `dtype`.
  """
  gaussian = jax.random.normal(key, (*shape, 4), dtype)
  return quaternion_to_rotation(normalise_quaternion(gaussian))


def check_trailing(**arguments: tuple[Any, str]) -> None:
  """Checks trailing axes; leading axes are free but equal among arguments.

  Args:
    **arguments: `name=(array, 'trailing dims')` as in `checks.check_shapes`.

  Raises:
    ValueError: naming the argument, the expected and the given shape.
  """
  # Lists have no shape attribute, which chex asks for.
  arguments = {
    name: (array if hasattr(array, 'shape') else np.asarray(array), spec)
    for name, (array, spec) in arguments.items()
  }
  array, spec = next(iter(arguments.values()))
  num_leading = max(np.ndim(array) - len(spec.split()), 0)
  leading = [f'axis_{axis}' for axis in range(num_leading)]
  checks.check_shapes(
    **{
      name: (array, ' '.join([*leading, spec]))
      for name, (array, spec) in arguments.items()
    }
  )


def check_broadcast(**arguments: tuple[Any, int]) -> None:
  """Checks that leading axes broadcast as in NumPy.

  Args:
    **arguments: `name=(array, number of trailing axes to leave out)`.

  Raises:
    ValueError: naming the arguments and their shapes.
  """
  shapes = {
    name: np.shape(array)[: np.ndim(array) - num_trailing]
    for name, (array, num_trailing) in arguments.items()
  }
  try:
    np.broadcast_shapes(*shapes.values())
  except ValueError:
    given = ' and '.join(f'{name} {shape}' for name, shape in shapes.items())
    raise ValueError(
      f'{", ".join(shapes)}: expected leading axes that broadcast, got {given}'
    ) from None


def _unstack(x: jax.Array) -> list[jax.Array]:
  return [x[..., i] for i in range(x.shape[-1])]


def _stack_matrix(rows: list[list[jax.Array]]) -> jax.Array:
  return jnp.stack([jnp.stack(row, -1) for row in rows], -2)
