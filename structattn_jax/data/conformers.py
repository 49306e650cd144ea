"""Reference conformers of whole components, hydrogens included.

AF3 (alphafold3 `model/features.py`, `get_reference`) generates a conformer
with RDKit's distance geometry (ETKDG version 3) from the component's bonds and
stereochemistry. Where that fails it takes the coordinates of the chemical
component dictionary (CCD).

Units: angstrom.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import numpy as np

from structattn_jax.data import chemical_components

_MAX_ATTEMPTS = 64


class Conformer(NamedTuple):
  """Positions of one component or molecule.

  Attributes:
    atom_names: one per atom, hydrogens included; '' for molecules without.
    positions: [n_atom, 3] float64.
  """

  atom_names: tuple[str, ...]
  positions: np.ndarray


@functools.cache
def ideal_conformer(name: str) -> Conformer | None:
  """The CCD's ideal coordinates.

  Args:
    name: the CCD code.

  Returns:
    The conformer; deposited coordinates stand in for incomplete ideal ones,
    zeros for unknown coordinates. None if the CCD has no such component.
  """
  chemical_components.require_biotite()
  from biotite.structure import info

  atoms = info.get_from_ccd('chem_comp_atom', name)
  if atoms is None:
    return None

  def positions(columns: str) -> np.ndarray:
    found = [atoms[columns.format(x)].as_array(float, np.nan) for x in 'xyz']
    return np.stack(found, axis=-1)

  ideal = positions('pdbx_model_Cartn_{}_ideal')
  if not np.isfinite(ideal).all():
    model = positions('model_Cartn_{}')
    ideal = model if np.isfinite(model).all() else ideal
  names = tuple(atoms['atom_id'].as_array(str).tolist())
  return Conformer(names, np.nan_to_num(ideal))


def generated_conformer(name: str, seed: int) -> Conformer | None:
  """A conformer of a CCD component from RDKit.

  Args:
    name: the CCD code.
    seed: non-negative seed of the search.

  Returns:
    The conformer; None if the CCD has no such component, or RDKit cannot
    represent or embed it (ions of unusual valence, clusters, ...).

  Raises:
    ImportError: if RDKit or biotite is not installed, naming the extra.
  """
  molecule = _component_molecule(name)
  if molecule is None or not _can_be_embedded(name):
    return None
  return _embed(*molecule, seed)


@functools.cache
def _can_be_embedded(name: str) -> bool:
  """Whether one search succeeds: if not, others would take as long, and fail.

  The seed is fixed, so that no result depends on what was asked before.
  """
  molecule = _component_molecule(name)
  return molecule is not None and _embed(*molecule, seed=0) is not None


def generated_from_mol_block(
  mol_block: str, positions: np.ndarray, seed: int
) -> Conformer | None:
  """A conformer of an MDL mol block, hydrogens added.

  Args:
    mol_block: text up to 'M  END'; its coordinates set the stereochemistry.
    positions: [n_atom, 3] float, the same coordinates of the heavy atoms in
      any order.
    seed: non-negative seed of the search.

  Returns:
    The conformer without names, the heavy atoms first and in the order of
    `positions`; None if RDKit cannot represent or embed the molecule.

  Raises:
    ImportError: if RDKit is not installed, naming the extra.
  """
  chem = chemical_components.require_rdkit()
  from rdkit import rdBase

  with rdBase.BlockLogs():
    molecule = chem.MolFromMolBlock(mol_block, sanitize=False, removeHs=False)
    if molecule is None:
      return None
    try:
      chem.SanitizeMol(molecule)
      chem.AssignStereochemistryFrom3D(molecule)
      molecule = chem.RemoveAllHs(molecule)
    except (ValueError, RuntimeError):  # RDKit's sanitisation errors.
      return None
    known = molecule.GetConformer().GetPositions()
    distance = np.linalg.norm(positions[:, None] - known[None], axis=-1)
    order = distance.argmin(axis=1).tolist()
    if sorted(order) != list(range(molecule.GetNumAtoms())):
      return None
    molecule = chem.AddHs(chem.RenumberAtoms(molecule, order))
  return _embed(molecule, ('',) * molecule.GetNumAtoms(), seed)


@functools.cache
def _component_molecule(name: str) -> tuple[Any, tuple[str, ...]] | None:
  """RDKit molecule with hydrogens and stereochemistry, and atom names."""
  chem = chemical_components.require_rdkit()
  from rdkit import rdBase

  component = chemical_components.find_component(name)
  known = chemical_components.ATOMIC_NUMBERS.keys()
  if component is None or not known >= {*component.elements}:
    return None
  from biotite.interface.rdkit import to_mol
  from biotite.structure import info

  try:
    with rdBase.BlockLogs(), warnings.catch_warnings():
      warnings.simplefilter('ignore')  # Missing coordinates or hydrogens.
      atoms = info.residue(name, allow_missing_coord=True)
      molecule = to_mol(atoms, explicit_hydrogen=True)
      chem.SanitizeMol(molecule)
      if np.isfinite(atoms.coord).all():
        chem.AssignStereochemistryFrom3D(molecule)
  except (ValueError, RuntimeError):  # RDKit's sanitisation errors.
    return None
  return molecule, tuple(atoms.atom_name.tolist())


def _embed(
  molecule: Any, atom_names: tuple[str, ...], seed: int
) -> Conformer | None:
  chem = chemical_components.require_rdkit()
  from rdkit import rdBase
  from rdkit.Chem import rdDistGeom

  options = rdDistGeom.ETKDGv3()
  options.randomSeed = seed
  # RDKit's own limit, ten per atom, takes half a minute for a chlorophyll.
  options.maxIterations = _MAX_ATTEMPTS
  molecule = chem.Mol(molecule)
  with rdBase.BlockLogs():
    if rdDistGeom.EmbedMolecule(molecule, options) < 0:
      return None
  return Conformer(atom_names, molecule.GetConformer().GetPositions())
