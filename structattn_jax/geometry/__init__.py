"""Rotations, quaternions and rigid frames as pure functions of arrays."""

from structattn_jax.geometry.rigid import Rigid
from structattn_jax.geometry.rotation import (
  compose_rotations,
  multiply_quaternions,
  normalise_quaternion,
  quaternion_to_rotation,
  random_rotation,
  rotate,
  rotate_inverse,
  rotation_from_axis_angle,
  rotation_from_two_vectors,
  rotation_to_quaternion,
)

__all__ = [
  'Rigid',
  'compose_rotations',
  'multiply_quaternions',
  'normalise_quaternion',
  'quaternion_to_rotation',
  'random_rotation',
  'rotate',
  'rotate_inverse',
  'rotation_from_axis_angle',
  'rotation_from_two_vectors',
  'rotation_to_quaternion',
]
