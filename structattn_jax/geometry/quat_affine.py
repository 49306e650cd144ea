"""Backbone frames of AF2's structure module and how one iteration moves them.

Jumper et al. (2021) Suppl. Alg. 23. Mirrors alphafold model/quat_affine.py
(monomer) and `QuatRigid` of model/folding_multimer.py @ c77e5d2.

The monomer carries quaternions, rebuilds the rotation from them and normalises
them after each update; the multimer carries rotation matrices and multiplies
them, without ever making them orthonormal again. Both updates come from a
vector (b, c, d, tx, ty, tz) in the local frame and turn by the quaternion
(1, b, c, d), which is at most 180 degrees and never zero, so that gradients are
finite everywhere.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import numerics
from structattn_jax.geometry import rotation as rotation_lib
from structattn_jax.geometry.rigid import Rigid


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuatAffine:
  """Frames x -> R(q) x + t that remember the quaternion they came from.

  A pytree. Nothing is normalised on construction (AF2's `from_tensor`); use
  `geometry.normalise_quaternion` where the norm is not known to be one.

    >>> frames = QuatAffine.identity((2,)).pre_compose(np.ones((2, 6)))
    >>> print(frames.to_tensor()[0])
    [0.5 0.5 0.5 0.5 1.  1.  1. ]

  Attributes:
    quaternion: [..., 4] float, (w, x, y, z).
    translation: [..., 3] float, any unit, same leading axes.
  """

  quaternion: jax.Array
  translation: jax.Array

  @property
  def rotation(self) -> jax.Array:
    """[..., 3, 3] matrices; a quaternion of norm s gives s² R."""
    return rotation_lib.quaternion_to_rotation(self.quaternion)

  @classmethod
  def identity(
    cls,
    shape: Sequence[int] = (),
    dtype: jax.typing.DTypeLike = jnp.float32,
  ) -> 'QuatAffine':
    """Frames that change nothing.

    Args:
      shape: leading axes.
      dtype: float32 or float64.

    Returns:
      Frames with leading axes `shape`.
    """
    unit = jnp.asarray([1, 0, 0, 0], dtype)
    return cls(
      jnp.broadcast_to(unit, (*shape, 4)), jnp.zeros((*shape, 3), dtype)
    )

  @classmethod
  def from_tensor(cls, tensor: jax.typing.ArrayLike) -> 'QuatAffine':
    """Frames from AF2's `traj` layout; quaternions are kept as they are.

    Args:
      tensor: [..., 7] float, (w, x, y, z, tx, ty, tz).

    Returns:
      Frames with leading axes [...].

    Raises:
      ValueError: if the last axis is not 7.
    """
    rotation_lib.check_trailing(tensor=(tensor, '7'))
    tensor = numerics.at_least_float32(tensor)
    return cls(tensor[..., :4], tensor[..., 4:])

  def to_tensor(self) -> jax.Array:
    """Returns [..., 7] (w, x, y, z, tx, ty, tz)."""
    return jnp.concatenate([self.quaternion, self.translation], -1)

  def to_rigid(self) -> Rigid:
    """Returns the frames as rotation matrices and translations."""
    return Rigid(self.rotation, self.translation)

  def pre_compose(self, update: jax.typing.ArrayLike) -> 'QuatAffine':
    """Moves each frame by an update given in that frame, Alg. 23.

    q' = normalise(q (1, b, c, d)),  t' = t + R(q) (tx, ty, tz)

    Args:
      update: [..., 6] float, (b, c, d, tx, ty, tz): the vector part of a
        quaternion, then a translation in the unit of `translation`.

    Returns:
      Frames of the same shape.

    Raises:
      ValueError: if `update` is not [..., 6] with the axes of the frames.
    """
    rotation_lib.check_trailing(
      translation=(self.translation, '3'), update=(update, '6')
    )
    update = numerics.at_least_float32(update)
    imaginary = jnp.concatenate(
      [jnp.zeros_like(update[..., :1]), update[..., :3]], -1
    )
    quaternion = self.quaternion + rotation_lib.multiply_quaternions(
      self.quaternion, imaginary
    )
    shift = rotation_lib.rotate(self.rotation, update[..., 3:])
    return QuatAffine(
      rotation_lib.normalise_quaternion(quaternion), self.translation + shift
    )

  def stop_rotation_gradient(self) -> 'QuatAffine':
    """Returns the same frames; gradients flow through `translation` only."""
    return QuatAffine(jax.lax.stop_gradient(self.quaternion), self.translation)

  def scale_translation(self, scale: float) -> 'QuatAffine':
    """Returns frames with `translation` in another unit."""
    return QuatAffine(self.quaternion, self.translation * scale)


def rigid_from_update(update: jax.typing.ArrayLike) -> Rigid:
  """The rigid transformation of an update vector, AF2-multimer's `QuatRigid`.

  R from (1, b, c, d) rsqrt(max(1e-6, 1 + b² + c² + d²)),  t = (tx, ty, tz).
  Frames are moved by `frames @ rigid_from_update(update)`.

  Args:
    update: [..., 6] float, (b, c, d, tx, ty, tz).

  Returns:
    Frames of shape [...].

  Raises:
    ValueError: if the last axis is not 6.
  """
  rotation_lib.check_trailing(update=(update, '6'))
  update = numerics.at_least_float32(update)
  quaternion = jnp.concatenate(
    [jnp.ones_like(update[..., :1]), update[..., :3]], -1
  )
  squared = jnp.sum(jnp.square(quaternion), -1, keepdims=True)
  quaternion *= jax.lax.rsqrt(jnp.maximum(squared, np.float32(1e-6)))
  return Rigid(rotation_lib.quaternion_to_rotation(quaternion), update[..., 3:])
