"""Writes structures as mmCIF files.

One `atom_site` category with the names, numbers and chains that the input had;
`label_asym_id` repeats the author's chain, `label_seq_id` is the position in
its sequence. What the input has no value for is '.' or '?'.

Units: positions in angstrom, B-factors in square angstrom.
"""

from __future__ import annotations

import io
import pathlib

import numpy as np

from structattn_jax import checkpoint
from structattn_jax.data import chemical_components, structures


def write_mmcif(
  path: structures.PathLike,
  structure: structures.Structure,
  position: np.ndarray,
) -> pathlib.Path:
  """Writes the atoms of a structure at other positions.

  Args:
    path: file to write; it is written whole or not at all.
    structure: as `mmcif_text`.
    position: likewise.

  Returns:
    The path.

  Raises:
    ValueError: as `mmcif_text`.
    OSError: if the file cannot be written.
    ImportError: if biotite is not installed, naming the extra.
  """
  text = mmcif_text(structure, position)
  checkpoint.write_atomically(path, text.encode('utf-8'))
  return pathlib.Path(path)


def mmcif_text(structure: structures.Structure, position: np.ndarray) -> str:
  """The mmCIF file of a structure's atoms at other positions.

  Args:
    structure: chains, residues, names, elements, charges, occupancies and
      B-factors.
    position: [n_atom, 3] float, angstrom, in the order of the structure.

  Returns:
    The content of the file.

  Raises:
    ValueError: if the positions are not [n_atom, 3] or not finite.
    ImportError: if biotite is not installed, naming the extra.
  """
  position = np.asarray(position, np.float64)
  if position.shape != (structure.n_atom, 3):
    raise ValueError(
      f'position: expected shape ({structure.n_atom}, 3) from the structure, '
      f'got {position.shape}'
    )
  if not np.isfinite(position).all():
    raise ValueError('position: expected finite numbers')
  chemical_components.require_biotite()
  from biotite.structure.io import pdbx

  residue = structure.atom_residue
  is_polymer = structure.residue_kind != structures.LIGAND
  chains = np.array(structure.chain_ids, dtype=str)
  chain = chains[structure.residue_chain][residue]
  number = structure.residue_id[residue].astype(str)
  in_sequence = structure.sequence_index[residue].astype(str)
  name = structure.residue_name[residue]
  insertion = structure.insertion_code[residue]
  columns = {
    'group_PDB': np.where(is_polymer[residue], 'ATOM', 'HETATM'),
    'id': np.arange(1, structure.n_atom + 1).astype(str),
    'type_symbol': _filled(structure.element),
    'label_atom_id': structure.atom_name,
    'label_alt_id': np.full(structure.n_atom, '.'),
    'label_comp_id': name,
    'label_asym_id': chain,
    'label_entity_id': (structure.residue_chain[residue] + 1).astype(str),
    'label_seq_id': np.where(is_polymer[residue], in_sequence, '.'),
    'pdbx_PDB_ins_code': np.where(insertion == '', '?', insertion),
    'Cartn_x': _decimals(position[:, 0], 3),
    'Cartn_y': _decimals(position[:, 1], 3),
    'Cartn_z': _decimals(position[:, 2], 3),
    'occupancy': _decimals(structure.occupancy, 2),
    'B_iso_or_equiv': _decimals(structure.b_factor, 2),
    'pdbx_formal_charge': structure.charge.astype(str),
    'auth_seq_id': number,
    'auth_comp_id': name,
    'auth_asym_id': chain,
    'auth_atom_id': structure.atom_name,
    'pdbx_PDB_model_num': np.full(structure.n_atom, '1'),
  }
  file = pdbx.CIFFile()
  block = pdbx.CIFBlock()
  block['atom_site'] = pdbx.CIFCategory(columns)
  file[_block_name(structure.name)] = block
  text = io.StringIO()
  file.write(text)
  return text.getvalue()


def _filled(values: np.ndarray) -> np.ndarray:
  return np.where(values == '', 'X', values)


def _decimals(values: np.ndarray, digits: int) -> np.ndarray:
  return np.array([f'{value:.{digits}f}' for value in values.tolist()])


def _block_name(name: str) -> str:
  """Names of data blocks have no blanks."""
  return ''.join(c if c.isalnum() or c in '-_.' else '_' for c in name) or 'x'
