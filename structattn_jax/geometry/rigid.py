"""Rigid frames: a rotation and a translation per residue, as one pytree.

Jumper et al. (2021) Suppl. 1.8 and Alg. 21; mirrors alphafold model/r3.py,
model/quat_affine.py and geometry/rigid_matrix_vector.py @ c77e5d2.

A frame (R, t) maps local to global coordinates: x_global = R x_local + t.
Units: translations and points share any one unit (angstrom at the ends of a
model, `position_scale` inside AF2). Products avoid matrix units, see
`rotation.py`; results are at least float32.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import numerics
from structattn_jax.geometry import rotation as rotation_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rigid:
  """Rigid transformations x -> R x + t with any leading axes.

  A pytree: `jit`, `vmap`, `grad` and `jax.tree.map` work on it. Indexing acts
  on the leading axes, `rigid[3]`, `rigid[:, None]`, `rigid[mask]`.

  One rule of broadcasting holds for `apply`, `apply_inverse` and `compose`:
  the axes of the frames are the FIRST axes of the argument, and the argument
  may have extra axes after them. So frames [n_res] act on points [n_res, 3]
  and [n_res, n_point, 3] alike, and one frame [] acts on anything. Axes of
  size one broadcast: all pairs are `rigid[:, None].apply(points[None])`.

    >>> frames = Rigid.from_n_ca_c(
    ...   n=np.array([[0.0, 1.46, 0.0]]),
    ...   ca=np.array([[0.0, 0.0, 0.0]]),
    ...   c=np.array([[1.52, 0.0, 0.0]]),
    ... )
    >>> frames.shape
    (1,)
    >>> (frames @ frames.inverse()).apply(np.ones((1, 14, 3))).shape
    (1, 14, 3)

  Attributes:
    rotation: [..., 3, 3] float, orthonormal, acting on column vectors.
    translation: [..., 3] float, same leading axes.
  """

  rotation: jax.Array
  translation: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    """Leading axes.

    Raises:
      ValueError: if the fields are not [..., 3, 3] and [..., 3] with the same
        leading axes. The constructor cannot check this because JAX builds
        pytrees with placeholders for arrays.
    """
    rotation_lib.check_trailing(
      rotation=(self.rotation, '3 3'), translation=(self.translation, '3')
    )
    return np.shape(self.translation)[:-1]

  def __getitem__(self, index: Any) -> 'Rigid':
    index = index if isinstance(index, tuple) else (index,)
    rest = slice(None)
    return Rigid(
      self.rotation[(*index, rest, rest)], self.translation[(*index, rest)]
    )

  def __len__(self) -> int:
    if not self.shape:
      raise TypeError('a single frame has no length')
    return self.shape[0]

  def __iter__(self) -> Iterator['Rigid']:
    return (self[i] for i in range(len(self)))

  def __matmul__(self, other: 'Rigid') -> 'Rigid':
    if not isinstance(other, Rigid):
      return NotImplemented
    return self.compose(other)

  @classmethod
  def identity(
    cls,
    shape: Sequence[int] = (),
    dtype: jax.typing.DTypeLike = jnp.float32,
  ) -> 'Rigid':
    """Frames that change nothing.

    Args:
      shape: leading axes.
      dtype: float32 or float64.

    Returns:
      Frames of shape `shape`.
    """
    return cls(
      jnp.broadcast_to(jnp.eye(3, dtype=dtype), (*shape, 3, 3)),
      jnp.zeros((*shape, 3), dtype),
    )

  def compose(self, other: 'Rigid') -> 'Rigid':
    """The transformation `other` followed by `self`; also `self @ other`.

    (R, t) (R', t') = (R R', R t' + t)

    Args:
      other: frames of shape [*self.shape, ...], aligned as in `apply`.

    Returns:
      Frames of the shape of `other` (broadcast with `self`).

    Raises:
      ValueError: if the first axes of `other` are not those of the frames.
    """
    frames = self._with_extra_axes('other', other.shape)
    return Rigid(
      rotation_lib.compose_rotations(frames.rotation, other.rotation),
      rotation_lib.rotate(frames.rotation, other.translation)
      + frames.translation,
    )

  def inverse(self) -> 'Rigid':
    """Returns the inverse transformations (R^T, -R^T t)."""
    _ = self.shape
    rotation = numerics.at_least_float32(self.rotation)
    return Rigid(
      jnp.swapaxes(rotation, -1, -2),
      -rotation_lib.rotate_inverse(rotation, self.translation),
    )

  def apply(self, points: jax.typing.ArrayLike) -> jax.Array:
    """Maps local to global points: R x + t.

    Args:
      points: [*self.shape, ..., 3] float: the axes of the frames first, then
        any extra axes, then xyz, in the unit of `translation`.

    Returns:
      Points of the same shape (broadcast with the frames).

    Raises:
      ValueError: if the first axes of `points` are not those of the frames.
    """
    rotation_lib.check_trailing(points=(points, '3'))
    frames = self._with_extra_axes('points', np.shape(points)[:-1], '3')
    return rotation_lib.rotate(frames.rotation, points) + frames.translation

  def apply_inverse(self, points: jax.typing.ArrayLike) -> jax.Array:
    """Maps global to local points: R^T (x - t).

    Args:
      points: [*self.shape, ..., 3] float, as in `apply`.

    Returns:
      Points of the same shape (broadcast with the frames).

    Raises:
      ValueError: if the first axes of `points` are not those of the frames.
    """
    rotation_lib.check_trailing(points=(points, '3'))
    frames = self._with_extra_axes('points', np.shape(points)[:-1], '3')
    return rotation_lib.rotate_inverse(
      frames.rotation, numerics.at_least_float32(points) - frames.translation
    )

  @classmethod
  def from_quaternion(
    cls,
    quaternion: jax.typing.ArrayLike,
    translation: jax.typing.ArrayLike,
    *,
    normalise: bool = True,
  ) -> 'Rigid':
    """Frames from quaternions, as AF2's `QuatAffine(quaternion, translation)`.

    Args:
      quaternion: [..., 4] float, (w, x, y, z).
      translation: [..., 3] float, same leading axes.
      normalise: whether to divide by the norm; without, a quaternion of norm s
        gives s² R.

    Returns:
      Frames of shape [...].

    Raises:
      ValueError: on a shape mismatch, naming the argument.
    """
    rotation_lib.check_trailing(
      quaternion=(quaternion, '4'), translation=(translation, '3')
    )
    if normalise:
      quaternion = rotation_lib.normalise_quaternion(quaternion)
    return cls(
      rotation_lib.quaternion_to_rotation(quaternion),
      numerics.at_least_float32(translation),
    )

  @classmethod
  def from_quaternion7(
    cls, tensor: jax.typing.ArrayLike, *, normalise: bool = False
  ) -> 'Rigid':
    """Frames from AF2's `traj` layout, as `QuatAffine.from_tensor`.

    Args:
      tensor: [..., 7] float, (w, x, y, z, tx, ty, tz).
      normalise: whether to normalise the quaternions; AF2 does not here.

    Returns:
      Frames of shape [...].

    Raises:
      ValueError: if the last axis is not 7.
    """
    rotation_lib.check_trailing(tensor=(tensor, '7'))
    tensor = numerics.at_least_float32(tensor)
    return cls.from_quaternion(
      tensor[..., :4], tensor[..., 4:], normalise=normalise
    )

  def to_quaternion7(self) -> jax.Array:
    """Returns [..., 7] (w, x, y, z, tx, ty, tz), norm one, w >= 0."""
    _ = self.shape
    quaternion = rotation_lib.rotation_to_quaternion(self.rotation)
    translation = numerics.at_least_float32(self.translation)
    return jnp.concatenate([quaternion, translation], -1)

  @classmethod
  def from_4x4(cls, matrix: jax.typing.ArrayLike) -> 'Rigid':
    """Frames from homogeneous matrices [[R, t], [0, 1]].

    Args:
      matrix: [..., 4, 4] float; the last row is not read.

    Returns:
      Frames of shape [...].

    Raises:
      ValueError: if `matrix` is not [..., 4, 4].
    """
    rotation_lib.check_trailing(matrix=(matrix, '4 4'))
    return cls.from_3x4(jnp.asarray(matrix)[..., :3, :])

  def to_4x4(self) -> jax.Array:
    """Returns [..., 4, 4] homogeneous matrices [[R, t], [0, 1]]."""
    top = self.to_3x4()
    bottom = jnp.asarray([0, 0, 0, 1], top.dtype)
    bottom = jnp.broadcast_to(bottom, (*self.shape, 1, 4))
    return jnp.concatenate([top, bottom], -2)

  @classmethod
  def from_3x4(cls, matrix: jax.typing.ArrayLike) -> 'Rigid':
    """Frames from [R | t], the layout of AF2-multimer.

    Args:
      matrix: [..., 3, 4] float.

    Returns:
      Frames of shape [...].

    Raises:
      ValueError: if `matrix` is not [..., 3, 4].
    """
    rotation_lib.check_trailing(matrix=(matrix, '3 4'))
    matrix = numerics.at_least_float32(matrix)
    return cls(matrix[..., :3], matrix[..., 3])

  def to_3x4(self) -> jax.Array:
    """Returns [..., 3, 4] matrices [R | t]."""
    _ = self.shape
    return jnp.concatenate(
      [
        numerics.at_least_float32(self.rotation),
        numerics.at_least_float32(self.translation)[..., None],
      ],
      -1,
    )

  @classmethod
  def from_flat12(cls, tensor: jax.typing.ArrayLike) -> 'Rigid':
    """Frames from AF2's flat12: R row by row, then t.

    Args:
      tensor: [..., 12] float.

    Returns:
      Frames of shape [...].

    Raises:
      ValueError: if the last axis is not 12.
    """
    rotation_lib.check_trailing(tensor=(tensor, '12'))
    tensor = numerics.at_least_float32(tensor)
    rotation = tensor[..., :9].reshape(*tensor.shape[:-1], 3, 3)
    return cls(rotation, tensor[..., 9:])

  def to_flat12(self) -> jax.Array:
    """Returns [..., 12]: R row by row, then t."""
    rotation = numerics.at_least_float32(self.rotation)
    return jnp.concatenate(
      [
        rotation.reshape(*self.shape, 9),
        numerics.at_least_float32(self.translation),
      ],
      -1,
    )

  @classmethod
  def from_n_ca_c(
    cls,
    n: jax.typing.ArrayLike,
    ca: jax.typing.ArrayLike,
    c: jax.typing.ArrayLike,
    *,
    epsilon: float | None = None,
    parameterisation: rotation_lib.Parameterisation = 'monomer',
  ) -> 'Rigid':
    """Backbone frames of AF2: origin CA, x axis to C, N in the xy plane.

    e0 = C - CA, e1 = N - CA made perpendicular to e0, e2 = e0 x e1; columns of
    R. This is Alg. 21 called as `atom37_to_frames` does (which flips x and z
    after calling it with C and N exchanged), and the multimer's
    `make_transform_from_reference`.

    Args:
      n: [..., 3] float, positions of N.
      ca: [..., 3] float, positions of CA.
      c: [..., 3] float, positions of C.
      epsilon: see `rotation_from_two_vectors`; None means upstream's.
      parameterisation: 'monomer' or 'multimer', whose lengths differ.

    Returns:
      Frames of shape [...].

    Raises:
      ValueError: on a shape mismatch, naming the argument, or an unknown
        parameterisation.
    """
    rotation_lib.check_trailing(n=(n, '3'), ca=(ca, '3'), c=(c, '3'))
    n, ca, c = map(numerics.at_least_float32, (n, ca, c))
    rotation = rotation_lib.rotation_from_two_vectors(
      c - ca, n - ca, epsilon=epsilon, parameterisation=parameterisation
    )
    return cls(rotation, ca)

  @classmethod
  def from_three_points(
    cls,
    a: jax.typing.ArrayLike,
    b: jax.typing.ArrayLike,
    c: jax.typing.ArrayLike,
    *,
    epsilon: float = 1e-8,
  ) -> 'Rigid':
    """Frames from three points, AF2-monomer's `rigids_from_3_points`.

    Alg. 21 with e0 = b - a, e1 = c - b made perpendicular to e0, origin b: `a`
    lies on the negative x axis, `c` in the upper half of the xy plane. Note
    that `from_n_ca_c` has another orientation.

    Args:
      a: [..., 3] float, point on the negative x axis.
      b: [..., 3] float, origin.
      c: [..., 3] float, point in the xy plane.
      epsilon: added to squared lengths, in the squared unit of the points.

    Returns:
      Frames of shape [...].

    Raises:
      ValueError: on a shape mismatch, naming the argument.
    """
    rotation_lib.check_trailing(a=(a, '3'), b=(b, '3'), c=(c, '3'))
    a, b, c = map(numerics.at_least_float32, (a, b, c))
    return cls(
      rotation_lib.rotation_from_two_vectors(b - a, c - b, epsilon=epsilon), b
    )

  def _with_extra_axes(
    self, argument: str, shape: tuple[int, ...], trailing: str = ''
  ) -> 'Rigid':
    """Appends axes of size one to the frames so that they align left."""
    frames = self.shape
    fits = len(shape) >= len(frames) and all(
      ours == theirs or 1 in (ours, theirs)
      for ours, theirs in zip(frames, shape, strict=False)
    )
    if not fits:
      expected = ', '.join([*map(str, frames), '...', *trailing])
      raise ValueError(
        f'{argument}: expected shape [{expected}], first the axes of the '
        f'frames {frames}, got {(*shape, *map(int, trailing))}; add axes with '
        'rigid[:, None] or x[None] to pair all frames with all points'
      )
    return self[(..., *(None,) * (len(shape) - len(frames)))]
