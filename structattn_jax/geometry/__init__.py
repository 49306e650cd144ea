"""Rotations, quaternions and rigid frames as pure functions of arrays."""

from structattn_jax.geometry.alignment import weighted_rigid_align
from structattn_jax.geometry.quat_affine import QuatAffine, rigid_from_update
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
  'QuatAffine',
  'Rigid',
  'compose_rotations',
  'multiply_quaternions',
  'normalise_quaternion',
  'quaternion_to_rotation',
  'random_rotation',
  'rigid_from_update',
  'rotate',
  'rotate_inverse',
  'rotation_from_axis_angle',
  'rotation_from_two_vectors',
  'rotation_to_quaternion',
  'weighted_rigid_align',
]
