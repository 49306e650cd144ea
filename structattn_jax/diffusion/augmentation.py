"""Random rigid moves of structures, AlphaFold 3's and Boltz'.

AF3 Suppl. Alg. 19 (CentreRandomAugmentation): centre, rotate at random, shift
by a normal vector of 1 angstrom per axis. alphafold3
model/network/diffusion_head.py @ c0f97ed and boltz model/modules/utils.py @
832486d differ:

                 AlphaFold 3                     Boltz
  rotation       Gram-Schmidt of two normal      unit quaternion of four normal
                 vectors                         numbers
  sampler's      the mask, and padding is set    all rows, padding included
  centre         to zero ('masked')              ('padded', a quirk)

Boltz divides the quaternion by a number of the sign of its first entry, which
only makes its real part positive: q and -q are the same rotation, and the sign
rule changes nothing. In training Boltz centres over the mask as AF3 does.

Rotations here are applied to row vectors, x R, as both upstreams record them.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from structattn_jax.common import checks, numerics
from structattn_jax.geometry import alignment
from structattn_jax.geometry import rotation as rotation_lib

RotationKind = Literal['gram_schmidt', 'quaternion']
Centre = Literal['masked', 'padded']


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RigidMove:
  """A move x R + t of row vectors.

  Attributes:
    rotation: [3, 3] float, R.
    translation: [3] float, t in angstrom.
  """

  rotation: jax.Array
  translation: jax.Array


def random_move(
  key: jax.Array, rotation: RotationKind = 'gram_schmidt'
) -> RigidMove:
  """Draws a uniform rotation and a normal translation of 1 angstrom per axis.

  The key rule is AF3's, for both kinds: rotation_key, translation_key =
  split(key).

  Args:
    key: PRNG key.
    rotation: 'gram_schmidt' (AF3) or 'quaternion' (Boltz).

  Returns:
    The move, float32.

  Raises:
    ValueError: on an unknown kind.
  """
  rotation_key, translation_key = jax.random.split(key)
  shape = (4,) if rotation == 'quaternion' else (2, 3)
  normal = jax.random.normal(rotation_key, shape, jnp.float32)
  return RigidMove(
    rotation=rotation_from_normal(normal, rotation),
    translation=jax.random.normal(translation_key, (3,), jnp.float32),
  )


def rotation_from_normal(
  normal: jax.typing.ArrayLike, rotation: RotationKind = 'gram_schmidt'
) -> jax.Array:
  """Rotation for row vectors from normal numbers.

  Args:
    normal: [2, 3] float for 'gram_schmidt', whose rows become the first two
      rows of R; [4] for 'quaternion', (w, x, y, z) of any length.
    rotation: which of the two.

  Returns:
    [3, 3] R for x R, at least float32.

  Raises:
    ValueError: on an unknown kind or a wrong shape.
  """
  if rotation == 'gram_schmidt':
    checks.check_shapes(normal=(normal, '2 3'))
    normal = numerics.at_least_float32(normal)
    columns = rotation_lib.rotation_from_two_vectors(
      normal[0], normal[1], epsilon=1e-20, parameterisation='multimer'
    )
    return columns.T
  if rotation != 'quaternion':
    raise ValueError(
      f"rotation: expected 'gram_schmidt' or 'quaternion', got {rotation!r}"
    )
  checks.check_shapes(normal=(normal, '4'))
  return rotation_lib.quaternion_to_rotation(
    rotation_lib.normalise_quaternion(normal)
  )


def centre_random_augmentation(
  positions: jax.Array,
  mask: jax.Array,
  move: RigidMove,
  *,
  centre: Centre = 'masked',
) -> jax.Array:
  """(x - centre) R + t; AF3 Suppl. Alg. 19.

    >>> mask = jnp.array([True, True, False])
    >>> move = RigidMove(jnp.eye(3), jnp.ones(3))
    >>> positions = jnp.array([[0.0] * 3, [2.0] * 3, [7.0] * 3])
    >>> centre_random_augmentation(positions, mask, move)[:, 0]
    Array([0., 2., 0.], dtype=float32)
    >>> centre_random_augmentation(positions, mask, move, centre='padded')[:, 0]
    Array([-2.,  0.,  5.], dtype=float32)

  Args:
    positions: [..., 3] float, in angstrom; leading axes are the atoms of one
      structure: [n_token, n_dense, 3] or [n_atom, 3].
    mask: [...] bool, True = real atom.
    move: recorded, or from `random_move`.
    centre: 'masked' (AF3) takes the mean of the real atoms and sets padding to
      zero; 'padded' (Boltz) takes that of all rows and moves all of them.

  Returns:
    [..., 3] moved, at least float32. Accurate far from the origin.

  Raises:
    ValueError: on a wrong shape or an unknown `centre`.
    TypeError: if `mask` is not bool.
  """
  rotation_lib.check_trailing(positions=(positions, '3'))
  positions = numerics.at_least_float32(positions)
  if mask.shape != positions.shape[:-1]:
    raise ValueError(
      f"mask: expected shape {positions.shape[:-1]} from 'positions', got "
      f'{mask.shape}'
    )
  checks.check_dtypes('bool', mask=mask)
  checks.check_shapes(
    rotation=(move.rotation, '3 3'), translation=(move.translation, '3')
  )
  if centre == 'masked':
    positions = jnp.where(mask[..., None], positions, 0)
    weights = mask
  elif centre == 'padded':
    weights = jnp.ones_like(mask)
  else:
    raise ValueError(f"centre: expected 'masked' or 'padded', got {centre!r}")
  near, rest = alignment.centroid(
    positions.reshape(-1, 3), weights.reshape(-1).astype(positions.dtype)
  )
  moved = rotation_lib.rotate_inverse(move.rotation, positions - near - rest)
  moved = moved + move.translation
  return jnp.where(mask[..., None], moved, 0) if centre == 'masked' else moved
