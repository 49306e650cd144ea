"""Rigid alignment of weighted points without a singular value decomposition.

Abramson et al. (2024) Suppl. Alg. 28; boltz model/loss/diffusion.py @ 832486d
takes the SVD of a 3 x 3 matrix on the device. Horn (1987) instead: the best
rotation is the quaternion q with the largest qᵀ K q, where the symmetric 4 x 4
matrix K is linear in the same 3 x 3 matrix. A few sweeps of Jacobi rotations
find it with elementwise arithmetic alone, which vectorises under `jax.vmap` and
needs no solver library on GPU or TPU. Reflections never appear: K knows only
proper rotations.

The gradient is first order perturbation of the eigenvector,

  dq = sum_j v_j (v_jᵀ dK q) / (λ - λ_j)

where terms with λ = λ_j up to rounding are left out: points on a line, a single
point, or no point do not determine the rotation about them. It is exact to
first order; second derivatives of the rotation are not.
"""

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import checks, numerics
from structattn_jax.geometry import rotation as rotation_lib

# Jacobi sweeps converge quadratically: four do for float32, five for float64;
# one more for matrices that are far from random.
_SWEEPS = 6


def weighted_rigid_align(
  moving: jax.typing.ArrayLike,
  target: jax.typing.ArrayLike,
  weights: jax.typing.ArrayLike | None = None,
  mask: jax.typing.ArrayLike | None = None,
  *,
  differentiate: bool = False,
) -> jax.Array:
  """Moves one cloud of points rigidly onto another, weighted least squares.

  Minimises sum_i w_i m_i |R x_i + t - y_i|² over rotations R and translations
  t; AF3 Suppl. Alg. 28 (weights, no reflection), boltz `weighted_rigid_align`.
  If no weight is left, `moving` is returned as it is. What the points do not
  determine (a turn about the line on which they lie, any turn of one point) is
  some finite choice.

    >>> cloud = jax.random.normal(jax.random.key(0), (5, 3))
    >>> turn = rotation_lib.random_rotation(jax.random.key(1))
    >>> moved = rotation_lib.rotate(turn, cloud) + 100
    >>> bool(jnp.abs(weighted_rigid_align(cloud, moved) - moved).max() < 1e-4)
    True

  Args:
    moving: [..., 3] float, any unit; all leading axes are points of one cloud.
    target: [..., 3] float, the same shape and unit.
    weights: [...] float, at least 0, per point; None = all 1.
    mask: [...] bool, True = real point; None = all real. Padding is moved
      along, but what it holds does not matter to the rest.
    differentiate: False detaches the result, as published; True lets gradients
      through to all arguments.

  Returns:
    [..., 3] `moving` moved, at least float32.

  Raises:
    ValueError: on a shape mismatch, naming the argument.
    TypeError: if `mask` is not bool.
  """
  rotation_lib.check_trailing(moving=(moving, '3'), target=(target, '3'))
  moving, target = map(numerics.at_least_float32, (moving, target))
  dtype = jnp.promote_types(moving.dtype, target.dtype)
  moving, target = moving.astype(dtype), target.astype(dtype)
  shape = moving.shape
  for name, x in (('weights', weights), ('mask', mask)):
    if x is not None and np.shape(x) != shape[:-1]:
      raise ValueError(
        f"{name}: expected shape {shape[:-1]} from 'moving', got {np.shape(x)}"
      )
  checks.check_dtypes('bool', mask=mask)
  if weights is None:
    weights = jnp.ones(shape[:-1], dtype)
  weights = jnp.asarray(weights, dtype).reshape(-1)
  x, y = moving.reshape(-1, 3), target.reshape(-1, 3)
  x_real, y_real = x, y
  if mask is not None:
    keep = jnp.asarray(mask).reshape(-1)
    weights = jnp.where(keep, weights, 0)
    x_real, y_real = (jnp.where(keep[:, None], p, 0) for p in (x, y))
  x_near, x_rest = centroid(x_real, weights)
  y_near, y_rest = centroid(y_real, weights)
  x_centred = x_real - x_near - x_rest
  y_centred = y_real - y_near - y_rest
  covariance = jnp.einsum(
    'ni,nj->ij',
    weights[:, None] * x_centred,
    y_centred,
    precision='highest',
  )
  rotation = rotation_lib.quaternion_to_rotation(
    _best_quaternion(_horn_matrix(covariance))
  )
  # Adding what is small first keeps its digits far from the origin.
  moved = rotation_lib.rotate(rotation, x - x_near - x_rest) + y_rest + y_near
  moved = jnp.where(jnp.sum(weights) > 0, moved, x).reshape(shape)
  return moved if differentiate else jax.lax.stop_gradient(moved)


def centroid(
  points: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Weighted mean in two parts, to be subtracted one after the other.

  The sum of many coordinates far from the origin has lost digits that their
  differences still have. The first part is near the mean; the second is the
  mean of what is left, which is small, so nothing is lost.

  Args:
    points: [n, 3] float.
    weights: [n] float, at least 0.

  Returns:
    Two [3], whose sum is the mean; zeros if all weights are zero. The gradient
    is in the second.
  """
  total = jnp.sum(weights)
  share = weights / jnp.where(total > 0, total, 1)
  near = jax.lax.stop_gradient(jnp.sum(share[:, None] * points, 0))
  return near, jnp.sum(share[:, None] * (points - near), 0)


def _horn_matrix(s: jax.Array) -> jax.Array:
  """K of Horn (1987) section 4A from s = sum_i w_i x_i y_iᵀ."""
  xx, yy, zz = s[0, 0], s[1, 1], s[2, 2]
  wx, wy, wz = s[1, 2] - s[2, 1], s[2, 0] - s[0, 2], s[0, 1] - s[1, 0]
  xy, xz, yz = s[0, 1] + s[1, 0], s[0, 2] + s[2, 0], s[1, 2] + s[2, 1]
  rows = [
    [xx + yy + zz, wx, wy, wz],
    [wx, xx - yy - zz, xy, xz],
    [wy, xy, yy - xx - zz, yz],
    [wz, xz, yz, zz - xx - yy],
  ]
  return jnp.stack([jnp.stack(row) for row in rows])


@jax.custom_jvp
def _best_quaternion(matrix: jax.Array) -> jax.Array:
  """[4] unit eigenvector of the largest eigenvalue of a symmetric [4, 4]."""
  return _decompose(matrix)[0]


@_best_quaternion.defjvp
def _best_quaternion_jvp(primals, tangents):
  (matrix,), (change,) = primals, tangents
  best, others, inverse_gaps = _decompose(matrix)
  turn = jnp.sum(change * best, -1)
  amounts = inverse_gaps * jnp.sum(others * turn[:, None], 0)
  return best, jnp.sum(others * amounts, -1)


def _decompose(
  matrix: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Best eigenvector [4], all of them [4, 4], 1 / (λ - λ_j) or 0 [4]."""
  scale = jnp.max(jnp.abs(matrix))
  scale = jnp.where(scale > 0, scale, 1)
  normalised = matrix / scale
  values, vectors = jacobi_eigh(normalised)
  first = jnp.argmax(values)
  tiny = 8 * jnp.finfo(matrix.dtype).eps
  gaps = values[first] - values
  is_clear = gaps > tiny
  inverse = jnp.where(is_clear, 1 / jnp.where(is_clear, gaps, 1), 0)
  best = vectors[:, first]
  # One step of perturbation theory with the matrix itself takes away what
  # rounding has added up over the sweeps.
  residual = jnp.sum(normalised * best, -1)
  amounts = inverse * jnp.sum(vectors * residual[:, None], 0)
  best = best + jnp.sum(vectors * amounts, -1)
  best = rotation_lib.normalise_quaternion(best)
  return best, vectors, inverse / scale


def jacobi_eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Eigenvalues and eigenvectors of a symmetric 4 x 4 matrix, elementwise.

  Golub and Van Loan (2013) section 8.5, the parallel ordering: a round turns
  the axes 0, 1 and the axes 2, 3 so that their elements become zero, and then
  renames three axes, so that three rounds, a sweep, meet all pairs.

  Args:
    matrix: [4, 4] float32 or float64, symmetric, of the order of one.

  Returns:
    [4] eigenvalues in no order, and [4, 4] with the eigenvectors as columns.
  """
  dtype = matrix.dtype
  identity, next_axes = np.eye(4, dtype=dtype), np.array([0, 2, 3, 1])
  crossed = np.zeros((4, 4), dtype)
  crossed[[0, 2], [1, 3]], crossed[[1, 3], [0, 2]] = 1, -1

  def product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a[:, :, None] * b[None], 1)

  def turn(_, state: tuple[jax.Array, jax.Array]):
    matrix, vectors = state
    # Of both pairs: elements [0, 0], [1, 1] and [0, 1] of their blocks.
    first, second, off = (
      jnp.stack([matrix[i, j], matrix[i + 2, j + 2]])
      for i, j in ((0, 0), (1, 1), (0, 1))
    )
    is_zero = off == 0
    tau = (second - first) / (2 * jnp.where(is_zero, 1, off))
    # Where tau is too large for its square, the angle is nothing.
    tan = jnp.where(tau < 0, -1, 1) / (
      jnp.abs(tau) + jnp.sqrt(1 + jnp.square(tau))
    )
    tan = jnp.where(is_zero, 0, tan)
    cos = jax.lax.rsqrt(1 + jnp.square(tan))
    cos, sin = jnp.repeat(cos, 2), jnp.repeat(tan * cos, 2)
    rotation = (cos[:, None] * identity + sin[:, None] * crossed)[:, next_axes]
    matrix = product(rotation.T, product(matrix, rotation))
    return (matrix + matrix.T) / 2, product(vectors, rotation)

  start = matrix, jnp.asarray(identity)
  matrix, vectors = jax.lax.fori_loop(0, 3 * _SWEEPS, turn, start)
  return jnp.diagonal(matrix), vectors
