"""From backbone frames and torsion angles to atoms.

Jumper et al. (2021) Suppl. Alg. 24 (computeAllAtomCoordinates). Mirrors
alphafold model/all_atom.py and model/all_atom_multimer.py @ c77e5d2.

Shapes: n_res residues with any leading axes (iterations, samples); 8 rigid
groups, 7 torsion angles (omega, phi, psi, chi1 to chi4); 14 atom slots of a
residue's own type, 37 atom names.
Units: angstrom.
"""

import jax
import jax.numpy as jnp

from structattn_jax import geometry
from structattn_jax.common import checks, numerics
from structattn_jax.network.alphafold2 import residue_constants

# Angles of length zero have no direction; AF2 divides by 1e-6 at least.
_ANGLE_EPSILON = 1e-12


def normalise_torsion_angles(angles_sin_cos: jax.Array) -> jax.Array:
  """Angles of norm one, Alg. 24 line 1: u rsqrt(max(u·u, 1e-12)).

  Args:
    angles_sin_cos: [..., 2] float, (sin, cos) of any length.

  Returns:
    [..., 2], at least float32.

  Raises:
    ValueError: if the last axis is not 2.
  """
  geometry.rotation.check_trailing(angles_sin_cos=(angles_sin_cos, '2'))
  angles = numerics.at_least_float32(angles_sin_cos)
  squared = jnp.sum(jnp.square(angles), -1, keepdims=True)
  return angles * jax.lax.rsqrt(jnp.maximum(squared, _ANGLE_EPSILON))


def torsion_angles_to_frames(
  backbone: geometry.Rigid, angles_sin_cos: jax.Array, aatype: jax.Array
) -> geometry.Rigid:
  """Frames of all rigid groups, Alg. 24 lines 2 to 10.

  The default frame of each group is turned about its x axis by the torsion
  angle; chi2 to chi4 continue the group before them; all others start at the
  backbone.

  Args:
    backbone: frames [..., n_res], angstrom.
    angles_sin_cos: [..., n_res, 7, 2] float, (sin, cos) of norm one.
    aatype: [n_res] int in [0, 20].

  Returns:
    Frames [..., n_res, 8], angstrom. Groups that a type lacks, all groups of
    unknown residues, have the zero matrix for a rotation.

  Raises:
    ValueError: on a wrong shape, naming the argument.
  """
  checks.check_shapes(aatype=(aatype, 'n_res'))
  lead = (*backbone.shape[:-1], aatype.shape[0])
  axes = ' '.join(map(str, lead))
  checks.check_shapes(
    **{'backbone.translation': (backbone.translation, f'{axes} 3')},
    angles_sin_cos=(angles_sin_cos, f'{axes} 7 2'),
  )
  angles = numerics.at_least_float32(angles_sin_cos)
  tables = residue_constants.residue_tables()
  default = jnp.asarray(tables.default_frame, angles.dtype)[aatype]
  # The backbone group does not turn.
  still = jnp.zeros((*lead, 1), angles.dtype)
  sin = jnp.concatenate([still, angles[..., 0]], -1)[..., None]
  cos = jnp.concatenate([still + 1, angles[..., 1]], -1)[..., None]
  x, y, z, origin = (default[..., :3, column] for column in range(4))
  x = jnp.broadcast_to(x, (*lead, 8, 3))
  turned = geometry.Rigid(
    jnp.stack([x, cos * y + sin * z, cos * z - sin * y], -1),
    jnp.broadcast_to(origin, (*lead, 8, 3)),
  )
  groups = [turned[..., group] for group in range(8)]
  for group in (5, 6, 7):
    groups[group] = groups[group - 1] @ groups[group]
  axis = len(lead)
  return backbone @ jax.tree.map(lambda *g: jnp.stack(g, axis), *groups)


def frames_to_atom14(frames: geometry.Rigid, aatype: jax.Array) -> jax.Array:
  """Atom positions of rigid groups, Alg. 24 line 11.

  Args:
    frames: frames [..., n_res, 8], angstrom.
    aatype: [n_res] int in [0, 20].

  Returns:
    [..., n_res, 14, 3] angstrom, zero in slots without an atom.
  """
  checks.check_shapes(aatype=(aatype, 'n_res'))
  tables = residue_constants.residue_tables()
  dtype = frames.translation.dtype
  group = jnp.asarray(tables.atom14_group)[aatype]
  position = jnp.asarray(tables.atom14_position, dtype)[aatype]
  present = jnp.asarray(tables.atom14_mask)[aatype]
  # A sum over 8 groups with one term that is not zero: exact, and unlike a
  # gather its gradient needs no scatter.
  choice = jax.nn.one_hot(group, 8, dtype=dtype)
  of_atom = jax.tree.map(
    lambda x: jnp.einsum(
      'nag,...ngc->...nac',
      choice,
      x.reshape(*frames.shape, -1),
      precision='highest',
    ),
    frames,
  )
  rotation = of_atom.rotation.reshape(*of_atom.rotation.shape[:-1], 3, 3)
  moved = geometry.rotate(rotation, position) + of_atom.translation
  return jnp.where(present[..., None], moved, 0)


def atom14_to_atom37(positions: jax.Array, aatype: jax.Array) -> jax.Array:
  """Atoms in slots that do not depend on the residue type.

  Args:
    positions: [n_res, 14, 3] float, any unit.
    aatype: [n_res] int in [0, 20].

  Returns:
    [n_res, 37, 3] in the dtype of `positions`, zero where a type has no atom.
  """
  checks.check_shapes(
    positions=(positions, 'n_res 14 3'), aatype=(aatype, 'n_res')
  )
  tables = residue_constants.residue_tables()
  index = jnp.asarray(tables.atom37_to_atom14)[aatype]
  present = jnp.asarray(tables.atom37_mask)[aatype]
  gathered = jnp.take_along_axis(positions, index[..., None], axis=1)
  return jnp.where(present[..., None], gathered, 0)
