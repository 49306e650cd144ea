"""Structures as typed records: what is kept of a file, and how.

`load_structure` removes waters, hydrogens and deuterium, and atoms without
coordinates. It keeps everything else, in the order of the file:

  * Alternate locations: per residue the label with the highest mean occupancy
    (ties: the first in the file); labels that share no atom with it are not
    alternatives to it and stay. Residues with two names (microheterogeneity)
    keep the name with the highest mean occupancy.
  * Chains carry the author's names. A name that returns behind a TER record,
    or with the same residues (symmetric copies in one model), is a chain of
    its own: 'A', 'A:2', 'A:3'. Ligands behind the TER of their chain stay in
    it.
  * MSE is MET, and names that simulation packages give to amino acids and
    nucleotides (HIE, CYX, NGLY, DA5, ADE, ...) are the standard residue, if the
    atoms are those of it.
  * A ligand SDF adds one chain per record: 'L1', 'L2', ... A record that lies
    on a ligand already in the structure file only adds its bonds.

Units: positions in angstrom, charges in elementary charges.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import types
from collections.abc import Mapping, Sequence

import numpy as np

from structattn_jax.data import (
  chemical_components,
  residue_grouping,
  structure_files,
)

StructureFileError = structure_files.StructureFileError
PathLike = str | os.PathLike[str]

PROTEIN = 'protein'
NUCLEIC = 'nucleic'
MODIFIED = 'modified'
LIGAND = 'ligand'

_MAX_PEPTIDE_BOND = 2.0
_MAX_PHOSPHODIESTER_BOND = 2.2
_SAME_ATOM_DISTANCE = 0.1
# Residues: a longer jump of the numbers is another numbering, not a gap.
_LONGEST_GAP = 200


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
  """One model of a structure file: residues and their heavy atoms.

  Attributes:
    name: the file's name without folders and suffixes.
    chain_ids: one name per chain, in order of first appearance.
    residue_name: [n_residue] str, the code in the file.
    component_name: [n_residue] str, the code to look up in the CCD (MSE is
      'MET' here, CYX is 'CYS'); '' for a ligand whose atoms are not those of
      the CCD's component of that name.
    residue_id: [n_residue] int32, the author's residue number; may be
      negative and may repeat.
    insertion_code: [n_residue] str, '' if none.
    residue_chain: [n_residue] int32, index into `chain_ids`.
    residue_kind: [n_residue] str: 'protein' (the 20 amino acids, MSE, UNK),
      'nucleic' (A, C, G, U, DA, DC, DG, DT, N, DN), 'modified' (other members
      of a polymer) or 'ligand' (all else: ligands, ions, glycans).
    atom_residue: [n_atom] int32, non-decreasing index of the residue.
    atom_name: [n_atom] str, the name in the file; the CCD's for ligands with
      renamed atoms that were recognised by their bonds.
    element: [n_atom] str, upper-case symbol.
    charge: [n_atom] int32, the file's formal charges.
    occupancy: [n_atom] float32.
    position: [n_atom, 3] float64, angstrom.
    mol_blocks: residue index -> MDL mol block, for ligands from an SDF.
    sequence_index: [n_residue] int32, position along the chain's sequence,
      from 1: mmCIF's `label_seq_id`, else counted, with gaps where residues
      are missing. Ligands count from 1 each. None: counted.
    b_factor: [n_atom] float32, square angstrom; 0 where the file has none, and
      None is zeros.
    model: 1-based position of the model in the file.
    n_models: number of models in the file.
  """

  name: str
  chain_ids: tuple[str, ...]
  residue_name: np.ndarray
  component_name: np.ndarray
  residue_id: np.ndarray
  insertion_code: np.ndarray
  residue_chain: np.ndarray
  residue_kind: np.ndarray
  atom_residue: np.ndarray
  atom_name: np.ndarray
  element: np.ndarray
  charge: np.ndarray
  occupancy: np.ndarray
  position: np.ndarray
  mol_blocks: Mapping[int, str]
  sequence_index: np.ndarray = None  # ty: ignore[invalid-assignment]
  b_factor: np.ndarray = None  # ty: ignore[invalid-assignment]
  model: int = 1
  n_models: int = 1

  def __post_init__(self) -> None:
    # Structures that are made by hand need not say these two.
    if self.sequence_index is None:
      index = _sequence_index(
        np.zeros(self.n_residue, np.int32),
        self.residue_id,
        self.residue_chain,
        self.residue_kind,
      )
      object.__setattr__(self, 'sequence_index', index)
    if self.b_factor is None:
      zeros = np.zeros(self.n_atom, np.float32)
      object.__setattr__(self, 'b_factor', zeros)

  @property
  def n_residue(self) -> int:
    """Number of residues, ligands included."""
    return len(self.residue_name)

  @property
  def n_atom(self) -> int:
    """Number of heavy atoms."""
    return len(self.atom_name)

  def residue_label(self, residue: int) -> str:
    """Text such as 'A:SER52A' for messages and plots."""
    chain = self.chain_ids[self.residue_chain[residue]]
    return (
      f'{chain}:{self.residue_name[residue]}{self.residue_id[residue]}'
      f'{self.insertion_code[residue]}'
    )


@dataclasses.dataclass(frozen=True)
class LigandSmiles:
  """One ligand of a structure as SMILES.

  Attributes:
    chain_id: name of the chain.
    residue_name: the code in the file.
    residue_id: the author's residue number.
    smiles: canonical isomeric SMILES, or None where the CCD has no such code
      and no SDF was given, or RDKit rejects the molecule.
  """

  chain_id: str
  residue_name: str
  residue_id: int
  smiles: str | None


def load_structure(
  path: PathLike,
  *,
  ligand: PathLike | Sequence[PathLike] | None = None,
  ligand_names: Sequence[str] | None = None,
  model: int = 1,
) -> Structure:
  """Reads a structure file and, if given, separate ligand files.

  Args:
    path: PDB (.pdb, .ent), mmCIF (.cif, .mmcif) or BinaryCIF (.bcif), each
      also gzip-compressed.
    ligand: SDF or MOL file(s) with 3D coordinates in the same frame. Every
      record is a molecule of the complex, so give one pose per ligand.
    ligand_names: CCD codes of the SDF records, in order, so that the atoms
      get reference conformers; None takes the title line of each record.
    model: 1-based position of the model in the file.

  Returns:
    The structure; the module's docstring says what is kept.

  Raises:
    StructureFileError: if a file is missing, broken, of an unknown kind or
      has no atoms left; the message names the file and what to do.
    ValueError: if the file has fewer than `model` models.
    ImportError: if biotite is not installed, naming the extra.
  """
  chemical_components.require_biotite()
  path = pathlib.Path(path)
  table, n_models = structure_files.read_structure_file(path, model)
  table = table.take(_keep_atoms(table))
  if not table.n_atom:
    raise StructureFileError(
      f'{path}: no atoms left after removing waters and hydrogens; give a '
      'file with a macromolecule or a ligand'
    )
  atom_residue, residue_copy = residue_grouping.group_residues(table)
  order = np.argsort(atom_residue, kind='stable')
  table, atom_residue = table.take(order), atom_residue[order]
  keep = residue_grouping.select_alternates(table, atom_residue)
  table, atom_residue = table.take(keep), atom_residue[keep]
  structure = _build(path, table, atom_residue, residue_copy, model, n_models)
  if ligand is None:
    return structure
  paths = [ligand] if isinstance(ligand, str | os.PathLike) else list(ligand)
  molecules = [m for p in paths for m in structure_files.read_sdf_file(p)]
  if ligand_names is not None and len(ligand_names) != len(molecules):
    raise ValueError(
      f'ligand_names: the ligand files have {len(molecules)} record(s), got '
      f'{len(ligand_names)} name(s); give one per record'
    )
  for i, molecule in enumerate(molecules):
    name = molecule.title if ligand_names is None else ligand_names[i]
    structure = _add_molecule(structure, molecule, name.strip().upper())
  return structure


def ligand_smiles(structure: Structure) -> tuple[LigandSmiles, ...]:
  """SMILES of every ligand, in the order of the structure.

  Ligands from an SDF take its bonds and the stereochemistry of its
  coordinates. All others are the whole component of the CCD: leaving atoms
  and atoms that the file lacks are included, glycans come one by one.

  Args:
    structure: a loaded structure.

  Returns:
    One entry per ligand residue; ions included, modified residues not.

  Raises:
    ImportError: if RDKit is not installed, naming the extra.
  """
  chemical_components.require_rdkit()
  result = []
  for residue in np.flatnonzero(structure.residue_kind == LIGAND).tolist():
    if residue in structure.mol_blocks:
      smiles = chemical_components.mol_block_smiles(
        structure.mol_blocks[residue]
      )
    else:
      smiles = chemical_components.component_smiles(
        str(structure.component_name[residue])
      )
    result.append(
      LigandSmiles(
        chain_id=structure.chain_ids[structure.residue_chain[residue]],
        residue_name=str(structure.residue_name[residue]),
        residue_id=int(structure.residue_id[residue]),
        smiles=smiles,
      )
    )
  return tuple(result)


def _keep_atoms(table: structure_files.AtomTable) -> np.ndarray:
  water = np.isin(table.residue_name, list(chemical_components.WATERS))
  model = np.isin(table.residue_name, list(chemical_components.WATER_MODELS))
  water |= model & np.isin(
    table.atom_name, ('OW', 'OH2', 'HW1', 'HW2', 'MW', 'H1', 'H2')
  )
  hydrogen = np.isin(table.element, list(chemical_components.HYDROGENS))
  return ~water & ~hydrogen & np.isfinite(table.position).all(axis=-1)


def _build(
  path: pathlib.Path,
  table: structure_files.AtomTable,
  atom_residue: np.ndarray,
  residue_copy: np.ndarray,
  model: int,
  n_models: int,
) -> Structure:
  """Orders chains, names components, classifies residues."""
  n_residue = len(residue_copy)
  first = np.searchsorted(atom_residue, np.arange(n_residue))
  chain_of_residue = [
    chain if not copy else f'{chain}:{copy + 1}'
    for chain, copy in zip(
      table.chain_id[first].tolist(), residue_copy.tolist(), strict=True
    )
  ]
  chain_ids = tuple(dict.fromkeys(chain_of_residue))
  chain_index = {chain: i for i, chain in enumerate(chain_ids)}
  residue_chain = np.array(
    [chain_index[chain] for chain in chain_of_residue], dtype=np.int32
  )
  bounds = np.append(first, table.n_atom).tolist()
  component_name = np.array(
    [
      chemical_components.resolve_component_name(
        name, set(table.atom_name[start:stop].tolist())
      )
      for name, start, stop in zip(
        table.residue_name[first].tolist(), bounds[:-1], bounds[1:], strict=True
      )
    ]
  )
  residue_kind = _classify(
    table, atom_residue, first, residue_chain, component_name
  )
  # Docking programs call everything 'LIG' or 'UNK', codes of other molecules,
  # and other tools keep the code but number the atoms anew.
  atom_name = table.atom_name.astype(object)
  for residue in np.flatnonzero(residue_kind == LIGAND).tolist():
    rows = slice(bounds[residue], bounds[residue + 1])
    names = chemical_components.component_atom_names(
      str(component_name[residue]),
      table.atom_name[rows].tolist(),
      table.element[rows].tolist(),
      table.position[rows],
    )
    if names is None:
      component_name[residue] = ''
    else:
      atom_name[rows] = names
  # A standard residue has each atom once; further ones are an error in the
  # file. Ligands of docking programs may have every atom named 'C'.
  polymer = np.isin(residue_kind, (PROTEIN, NUCLEIC))[atom_residue]
  _, name_code = np.unique(table.atom_name, return_inverse=True)
  pairs = atom_residue * (name_code.max() + 1) + name_code
  keep = ~polymer
  keep[np.unique(pairs, return_index=True)[1]] = True
  return Structure(
    name=path.name.split('.')[0],
    chain_ids=chain_ids,
    residue_name=table.residue_name[first],
    component_name=component_name,
    residue_id=table.residue_id[first],
    insertion_code=table.insertion_code[first],
    sequence_index=_sequence_index(
      table.sequence_id[first],
      table.residue_id[first],
      residue_chain,
      residue_kind,
    ),
    residue_chain=residue_chain,
    residue_kind=residue_kind,
    atom_residue=atom_residue[keep].astype(np.int32),
    atom_name=atom_name[keep].astype(str),
    element=table.element[keep],
    charge=table.charge[keep],
    occupancy=table.occupancy[keep].astype(np.float32),
    b_factor=table.b_factor[keep].astype(np.float32),
    position=table.position[keep],
    mol_blocks=types.MappingProxyType({}),
    model=model,
    n_models=n_models,
  )


def _sequence_index(
  sequence_id: np.ndarray,
  residue_id: np.ndarray,
  residue_chain: np.ndarray,
  residue_kind: np.ndarray,
) -> np.ndarray:
  """[n_residue] position along the sequence; see `Structure`."""
  index = np.ones(len(sequence_id), np.int32)
  polymer = residue_kind != LIGAND
  for chain in np.unique(residue_chain[polymer]).tolist():
    rows = np.flatnonzero(polymer & (residue_chain == chain))
    if (sequence_id[rows] > 0).all():
      index[rows] = sequence_id[rows]
      continue
    # Numbers that jump forward leave out residues; those that repeat (with
    # insertion codes) or go back do not.
    jumps = np.diff(residue_id[rows])
    steps = np.where((jumps > 1) & (jumps <= _LONGEST_GAP), jumps, 1)
    index[rows[1:]] = 1 + np.cumsum(steps)
  return index


def _classify(
  table: structure_files.AtomTable,
  atom_residue: np.ndarray,
  first: np.ndarray,
  residue_chain: np.ndarray,
  component_name: np.ndarray,
) -> np.ndarray:
  """[n_residue] kind of each residue, see `Structure.residue_kind`."""
  n_residue = len(first)

  def locate(atom_name: str) -> np.ndarray:
    result = np.full((n_residue, 3), np.nan)
    rows = np.flatnonzero(table.atom_name == atom_name)[::-1]
    result[atom_residue[rows]] = table.position[rows]
    return result

  # PDB files do not say which residues form the polymer, so bonds do: a free
  # amino acid is a ligand, the same code inside the chain is a residue.
  linked = np.zeros(n_residue, dtype=bool)
  order = np.argsort(residue_chain, kind='stable')
  before, after = order[:-1], order[1:]
  same_chain = residue_chain[before] == residue_chain[after]
  for end, start, cutoff in (
    ('C', 'N', _MAX_PEPTIDE_BOND),
    ("O3'", 'P', _MAX_PHOSPHODIESTER_BOND),
  ):
    distance = np.linalg.norm(
      locate(end)[before] - locate(start)[after], axis=-1
    )
    bonded = same_chain & (distance < cutoff)  # NaN compares as False.
    linked[before[bonded]] = True
    linked[after[bonded]] = True

  # In mmCIF and SEQRES the file itself says what belongs to a sequence. Some
  # programs number ligands there, too, which no component of a polymer is.
  listed = table.in_sequence[first]
  # A modified residue between gaps has no bonds, but residues of its chain
  # before and behind it.
  is_standard = ~table.hetero[first]
  inside = np.zeros(n_residue, dtype=bool)
  for chain in np.unique(residue_chain).tolist():
    rows = np.flatnonzero(residue_chain == chain)
    standard = np.flatnonzero(is_standard[rows])
    if standard.size:
      inside[rows[standard[0] : standard[-1] + 1]] = True
  backbone = np.isfinite(locate('CA')[:, 0]) | np.isfinite(locate("C1'")[:, 0])

  kinds = []
  amino_acids = {*chemical_components.AMINO_ACIDS, 'UNK'}
  nucleotides = set(chemical_components.NUCLEOTIDES)
  for i, name in enumerate(component_name.tolist()):
    hetero = not is_standard[i]
    linking = chemical_components.is_linking(name)
    in_polymer = (
      linked[i]
      or not hetero
      or (
        (listed[i] or (inside[i] and backbone[i]))
        and (linking or name == 'UNK')
      )
    )
    if name in amino_acids and (
      in_polymer or table.residue_name[first[i]] == 'MSE'
    ):
      kinds.append(PROTEIN)
    elif name in nucleotides and in_polymer:
      kinds.append(NUCLEIC)
    elif linked[i] or (in_polymer and linking):
      kinds.append(MODIFIED)
    else:
      kinds.append(LIGAND)
  return np.array(kinds)


def _add_molecule(
  structure: Structure, molecule: structure_files.Molecule, name: str
) -> Structure:
  """Adds one SDF record, or only its bonds if its atoms are there already."""
  n_atom = len(molecule.elements)
  counts = np.bincount(structure.atom_residue, minlength=structure.n_residue)
  same_size = (counts == n_atom) & (structure.residue_kind == LIGAND)
  for residue in np.flatnonzero(same_size).tolist():
    position = structure.position[structure.atom_residue == residue]
    distance = np.linalg.norm(
      position[:, None] - molecule.position[None], axis=-1
    )
    if distance.min(axis=1).max() < _SAME_ATOM_DISTANCE:
      blocks = {**structure.mol_blocks, residue: molecule.mol_block}
      return dataclasses.replace(
        structure, mol_blocks=types.MappingProxyType(blocks)
      )

  component = chemical_components.find_component(name) if name else None
  atom_names = None
  if component is not None:
    atom_names = chemical_components.match_by_bonds(
      component, molecule.elements, molecule.bonds
    )
  if atom_names is None:
    component = None
    seen: dict[str, int] = {}
    atom_names = []
    for element in molecule.elements:
      seen[element] = seen.get(element, 0) + 1
      atom_names.append(f'{element}{seen[element]}')
  number = 1
  while f'L{number}' in structure.chain_ids:
    number += 1

  def append(values: np.ndarray, new) -> np.ndarray:
    return np.concatenate([values, np.asarray(new)])

  residue = structure.n_residue
  residue_name = name if name.isalnum() and len(name) <= 5 else 'LIG'
  # A code whose component is another molecule must not lend its atoms.
  component_name = '' if component is None else name
  blocks = {**structure.mol_blocks, residue: molecule.mol_block}
  return dataclasses.replace(
    structure,
    chain_ids=(*structure.chain_ids, f'L{number}'),
    residue_name=append(structure.residue_name, [residue_name]),
    component_name=append(structure.component_name, [component_name]),
    residue_id=append(structure.residue_id, np.array([1], np.int32)),
    insertion_code=append(structure.insertion_code, ['']),
    sequence_index=append(structure.sequence_index, np.array([1], np.int32)),
    residue_chain=append(
      structure.residue_chain, np.array([len(structure.chain_ids)], np.int32)
    ),
    residue_kind=append(structure.residue_kind, [LIGAND]),
    atom_residue=append(
      structure.atom_residue, np.full(n_atom, residue, np.int32)
    ),
    atom_name=append(structure.atom_name, atom_names),
    element=append(structure.element, molecule.elements),
    charge=append(structure.charge, molecule.charges),
    occupancy=append(structure.occupancy, np.ones(n_atom, np.float32)),
    b_factor=append(structure.b_factor, np.zeros(n_atom, np.float32)),
    position=append(structure.position, molecule.position),
    mol_blocks=types.MappingProxyType(blocks),
  )
