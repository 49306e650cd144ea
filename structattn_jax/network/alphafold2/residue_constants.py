"""Ideal geometry and atom layouts of the 20 amino acids.

The values are those of alphafold common/residue_constants.py @ c77e5d2
(Apache-2.0), stored as numbers in `residue_tables.npz` beside this file and
read once, when first asked for.

Shapes: 21 residue types, `ARNDCQEGHILKMFPSTWYV` and unknown; 8 rigid groups
(backbone, pre-omega, phi, psi, chi1 to chi4; 1 and 2 hold no heavy atom);
14 slots hold the heavy atoms of any one type, in an order of its own; 37
slots give each atom name its own place, the same for all types.
Units: angstrom.
"""

import dataclasses
import functools
import importlib.resources

import numpy as np

RESTYPES = 'ARNDCQEGHILKMFPSTWYV'
RESTYPE_INDEX = {letter: index for index, letter in enumerate(RESTYPES)}
UNKNOWN = len(RESTYPES)


@dataclasses.dataclass(frozen=True, eq=False)
class ResidueTables:
  """Constant arrays by residue type (first axis); treat them as read-only.

  Attributes:
    default_frame: [21, 8, 4, 4] float32, homogeneous transformation of a
      group to the one before it in its chain at torsion angle zero. Groups a
      type lacks are zero, all of them for unknown residues.
    atom14_group: [21, 14] int32, rigid group that an atom moves with.
    atom14_position: [21, 14, 3] float32, its position in that group's frame.
    atom14_mask: [21, 14] bool, slots that hold an atom.
    atom37_mask: [21, 37] bool, likewise.
    atom37_to_atom14: [21, 37] int32, slot among 14; 0 where there is no atom.
    atom14_to_atom37: [21, 14] int32, slot among 37; 0 where there is no atom.
    chi_mask: [21, 4] bool, chi angles that a type has.
    chi_pi_periodic: [21, 4] bool, chi angles whose half turn only exchanges
      atoms with interchangeable names.
    atom14_is_ambiguous: [21, 14] bool, atoms with interchangeable names.
    atom14_renamed: [21, 14] int32, slot of the atom after that exchange; an
      involution, `positions[i, atom14_renamed[aatype[i]]]` renames residue i.
    atom_types: 37 atom names.
  """

  default_frame: np.ndarray
  atom14_group: np.ndarray
  atom14_position: np.ndarray
  atom14_mask: np.ndarray
  atom37_mask: np.ndarray
  atom37_to_atom14: np.ndarray
  atom14_to_atom37: np.ndarray
  chi_mask: np.ndarray
  chi_pi_periodic: np.ndarray
  atom14_is_ambiguous: np.ndarray
  atom14_renamed: np.ndarray
  atom_types: tuple[str, ...]


@functools.cache
def residue_tables() -> ResidueTables:
  """Returns the tables; every call returns the same object.

  >>> tables = residue_tables()
  >>> serine = RESTYPE_INDEX['S']
  >>> slots = tables.atom14_to_atom37[serine][tables.atom14_mask[serine]]
  >>> [tables.atom_types[slot] for slot in slots]
  ['N', 'CA', 'C', 'O', 'CB', 'OG']
  """
  path = (
    importlib.resources.files('structattn_jax.network.alphafold2')
    / 'residue_tables.npz'
  )
  with path.open('rb') as file, np.load(file, allow_pickle=False) as values:
    return ResidueTables(
      default_frame=values['restype_rigid_group_default_frame'],
      atom14_group=values['restype_atom14_to_rigid_group'],
      atom14_position=values['restype_atom14_rigid_group_positions'],
      atom14_mask=values['restype_atom14_mask'] > 0,
      atom37_mask=values['restype_atom37_mask'] > 0,
      atom37_to_atom14=values['restype_atom37_to_atom14'],
      atom14_to_atom37=values['restype_atom14_to_atom37'],
      chi_mask=values['chi_angles_mask'] > 0,
      chi_pi_periodic=values['chi_pi_periodic'] > 0,
      atom14_is_ambiguous=values['restype_atom14_is_ambiguous'] > 0,
      atom14_renamed=np.argmax(values['renaming_matrices'], -1).astype(
        np.int32
      ),
      atom_types=tuple(map(str, values['atom_types37'])),
    )


def sequence_to_aatype(sequence: str) -> np.ndarray:
  """Residue types of a sequence of one-letter codes.

    >>> print(sequence_to_aatype('MSX'))
    [12 15 20]

  Args:
    sequence: n_res capital letters; those other than the 20 are unknown.

  Returns:
    [n_res] int32 in [0, 20].
  """
  return np.array(
    [RESTYPE_INDEX.get(letter, UNKNOWN) for letter in sequence], np.int32
  )
