"""Readers of PDB, mmCIF, BinaryCIF and SDF files into one atom table.

Nothing is selected here except the model: alternate locations, waters and
hydrogens are the business of `structures.py`. Every failure is reported as a
`StructureFileError` that names the file and says what to do.

PDB columns are read directly: biotite's reader, used for all other formats,
stops at blank occupancies and at the sequence numbers that files of the 1990s
keep in the columns of the charge.

Units: positions in angstrom, charges in elementary charges.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import os
import pathlib
import warnings
import zlib
from collections.abc import Iterator

import numpy as np

from structattn_jax.data import chemical_components

_PDB_SUFFIXES = ('.pdb', '.ent', '.pdb1')
_CIF_SUFFIXES = ('.cif', '.mmcif', '.pdbx')
_BINARY_CIF_SUFFIXES = ('.bcif',)
_SDF_SUFFIXES = ('.sdf', '.mol', '.sd')
_NO_VALUE = ('', '.', '?')


class StructureFileError(ValueError):
  """A structure file is missing, unreadable or holds nothing usable."""


@dataclasses.dataclass(frozen=True, eq=False)
class AtomTable:
  """All atoms of one model of a file, in file order.

  Attributes:
    chain_id: [n_atom] str, the author's chain name.
    entity_chain: [n_atom] str, mmCIF's `label_asym_id`; '' for PDB.
    residue_id: [n_atom] int32, the author's residue number.
    insertion_code: [n_atom] str, '' if none.
    residue_name: [n_atom] str, upper case.
    atom_name: [n_atom] str.
    alternate: [n_atom] str, label of the alternate location, '' if none.
    element: [n_atom] str, upper-case symbol.
    charge: [n_atom] int32, formal charge.
    occupancy: [n_atom] float64.
    b_factor: [n_atom] float64, square angstrom; 0 where the file has none.
    hetero: [n_atom] bool, True for HETATM records.
    position: [n_atom, 3] float64, angstrom; NaN where the file has none.
  """

  chain_id: np.ndarray
  entity_chain: np.ndarray
  residue_id: np.ndarray
  insertion_code: np.ndarray
  residue_name: np.ndarray
  atom_name: np.ndarray
  alternate: np.ndarray
  element: np.ndarray
  charge: np.ndarray
  occupancy: np.ndarray
  b_factor: np.ndarray
  hetero: np.ndarray
  position: np.ndarray

  def take(self, rows: np.ndarray) -> AtomTable:
    """The table of some rows: indices or a bool mask over n_atom."""
    return AtomTable(
      **{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)}
    )

  @property
  def n_atom(self) -> int:
    """Number of atoms."""
    return len(self.atom_name)


@dataclasses.dataclass(frozen=True, eq=False)
class Molecule:
  """The heavy atoms of one SDF record.

  Attributes:
    title: first line of the record, stripped.
    mol_block: the record's text up to 'M  END', hydrogens included.
    elements: n_atom upper-case symbols.
    charges: [n_atom] int32 formal charges.
    position: [n_atom, 3] float64, angstrom.
    bonds: (atom, atom, order) with the CCD's names of the orders.
  """

  title: str
  mol_block: str
  elements: list[str]
  charges: np.ndarray
  position: np.ndarray
  bonds: list[tuple[int, int, str]]


def read_structure_file(
  path: str | os.PathLike[str], model: int = 1
) -> tuple[AtomTable, int]:
  """Reads one model of a PDB, mmCIF or BinaryCIF file.

  Args:
    path: a file ending in .pdb, .ent, .cif, .mmcif or .bcif, possibly .gz.
    model: 1-based position of the model in the file.

  Returns:
    The atoms of that model and the number of models in the file.

  Raises:
    StructureFileError: if the file is missing, of another kind or broken.
    ValueError: if the file has fewer than `model` models.
  """
  path = pathlib.Path(path)
  suffix = _suffix(path)
  if suffix in _PDB_SUFFIXES:
    columns, model_of_atom = _read_pdb(path, _read_text(path))
  elif suffix in _CIF_SUFFIXES or suffix in _BINARY_CIF_SUFFIXES:
    columns, model_of_atom = _read_cif(path, suffix in _BINARY_CIF_SUFFIXES)
  else:
    if suffix in _SDF_SUFFIXES:
      advice = 'give the protein here and pass this file as `ligand`'
    else:
      advice = (
        'use .pdb, .ent, .cif, .mmcif or .bcif, each also with .gz appended'
      )
    raise StructureFileError(
      f'{path}: cannot read {suffix or "files without a suffix"} as a '
      f'structure; {advice}'
    )
  _, first = np.unique(model_of_atom, return_index=True)
  numbers = model_of_atom[np.sort(first)]  # In file order.
  if not isinstance(model, int) or not 1 <= model <= len(numbers):
    raise ValueError(
      f'model: {path} has {len(numbers)} model(s), got model={model!r}; give '
      f'a number from 1 to {len(numbers)}'
    )
  # BinaryCIF holds single precision. Rounding the text formats alike gives the
  # same frames for every format of one structure.
  columns['position'] = (
    columns['position'].astype(np.float32).astype(np.float64)
  )
  table = AtomTable(**columns)
  return table.take(model_of_atom == numbers[model - 1]), len(numbers)


def read_sdf_file(path: str | os.PathLike[str]) -> list[Molecule]:
  """Reads every record of an SDF or MOL file, possibly gzip-compressed.

  Args:
    path: a file ending in .sdf, .sd or .mol, possibly followed by .gz.

  Returns:
    One molecule per record, without hydrogens.

  Raises:
    StructureFileError: if the file is missing, of another kind, broken, has
      no atoms or only a flat drawing.
  """
  path = pathlib.Path(path)
  if _suffix(path) not in _SDF_SUFFIXES:
    raise StructureFileError(
      f'{path}: a ligand must be an SDF or MOL file (.sdf, .mol, also .gz); '
      'convert it first, for example with RDKit or Open Babel'
    )
  molecules = []
  blocks = list(_mol_blocks(_read_text(path)))
  for number, block in enumerate(blocks, start=1):
    place = f'{path}: record {number}' if len(blocks) > 1 else f'{path}'
    molecules.append(_read_mol_block(place, block))
  if not molecules:
    raise StructureFileError(
      f"{path}: no molecule in the file; an SDF record ends with 'M  END'"
    )
  return molecules


def _suffix(path: pathlib.Path) -> str:
  suffixes = [suffix.lower() for suffix in path.suffixes]
  if suffixes and suffixes[-1] == '.gz':
    suffixes.pop()
  return suffixes[-1] if suffixes else ''


def _read_bytes(path: pathlib.Path) -> bytes:
  if not path.exists():
    raise StructureFileError(f'{path}: no such file; check the path')
  if path.is_dir():
    raise StructureFileError(f'{path}: is a folder; give a structure file')
  try:
    data = path.read_bytes()
    if data[:2] == b'\x1f\x8b':  # By content: .gz is often lost in renaming.
      data = gzip.decompress(data)
  except (OSError, EOFError, zlib.error) as error:
    raise StructureFileError(
      f'{path}: cannot be read ({error}); check that the file is complete'
    ) from error
  if not data.strip():
    raise StructureFileError(f'{path}: the file is empty; download it again')
  return data


def _read_text(path: pathlib.Path) -> str:
  return _read_bytes(path).decode('utf-8', errors='replace')


def _read_pdb(
  path: pathlib.Path, text: str
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Fixed columns of the PDB format, version 3.3, leniently."""
  chemical_components.require_biotite()
  # A compiled module, which type checkers do not see.
  from biotite.structure.io.pdb.hybrid36 import (  # ty: ignore[import-not-found]
    decode_hybrid36,
  )

  rows: list[tuple] = []
  model, closed = 0, True
  for number, line in enumerate(text.splitlines(), start=1):
    record = line[:6]
    if record.startswith('MODEL'):
      model, closed = model + 1, False
    elif record.startswith('ENDMDL'):
      closed = True
    if record not in ('ATOM  ', 'HETATM'):
      continue
    if closed:  # Atoms before, between or without MODEL records.
      model, closed = model + 1, False
    line = line.ljust(80)
    try:
      position = tuple(float(line[i : i + 8]) for i in (30, 38, 46))
      residue_id = decode_hybrid36(line[22:26])
    except ValueError as error:
      raise StructureFileError(
        f'{path}: line {number} is not a PDB atom record ({error}); the '
        'columns of the residue number or the coordinates are broken'
      ) from error
    hetero = record == 'HETATM'
    residue_name = line[17:21].strip().upper()
    element = line[76:78].strip().upper()
    if (
      element not in chemical_components.ATOMIC_NUMBERS
      and element not in chemical_components.HYDROGENS
    ):
      element = chemical_components.infer_element(
        residue_name, line[12:16], hetero
      )
    rows.append(
      (
        line[21].strip(),
        residue_id,
        line[26].strip(),
        residue_name,
        line[12:16].strip(),
        line[16].strip(),
        element,
        _pdb_charge(line[78:80]),
        _float_or(line[54:60], 1.0),
        _float_or(line[60:66], 0.0),
        hetero,
        position,
        model,
      )
    )
  if not rows:
    hint = 'it is not a PDB file'
    if text.lstrip().startswith('data_'):
      hint = 'it looks like mmCIF, so rename it to .cif'
    raise StructureFileError(f'{path}: no ATOM or HETATM records; {hint}')
  (
    chain_id,
    residue_id,
    insertion_code,
    residue_name,
    atom_name,
    alternate,
    element,
    charge,
    occupancy,
    b_factor,
    hetero,
    position,
    model_of_atom,
  ) = zip(*rows, strict=True)
  columns = {
    'chain_id': np.array(chain_id, dtype=str),
    'entity_chain': np.full(len(rows), '', dtype=str),
    'residue_id': np.array(residue_id, dtype=np.int32),
    'insertion_code': np.array(insertion_code, dtype=str),
    'residue_name': np.array(residue_name, dtype=str),
    'atom_name': np.array(atom_name, dtype=str),
    'alternate': np.array(alternate, dtype=str),
    'element': np.array(element, dtype=str),
    'charge': np.array(charge, dtype=np.int32),
    'occupancy': np.array(occupancy, dtype=np.float64),
    'b_factor': np.nan_to_num(np.array(b_factor), posinf=0, neginf=0),
    'hetero': np.array(hetero, dtype=bool),
    'position': np.array(position, dtype=np.float64),
  }
  return columns, np.array(model_of_atom)


def _pdb_charge(field: str) -> int:
  """Reads '2+' or '+2'; anything else counts as neutral."""
  field = field.strip()
  if len(field) == 2 and field[0] in '+-':
    field = field[::-1]
  if len(field) == 2 and field[0].isdigit() and field[1] in '+-':
    return int(field[1] + field[0])
  return 0


def _float_or(field: str, default: float) -> float:
  try:
    return float(field)
  except ValueError:
    return default


def _read_cif(
  path: pathlib.Path, binary: bool
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  chemical_components.require_biotite()
  from biotite.structure.io import pdbx

  data = _read_bytes(path)
  try:
    if binary:
      file = pdbx.BinaryCIFFile.read(io.BytesIO(data))
    else:
      text = data.decode('utf-8', errors='replace')
      file = pdbx.CIFFile.read(io.StringIO(text))
    block = next((b for b in file.values() if 'atom_site' in b), None)
    site = None if block is None else block['atom_site']
    if site is None or not site.row_count:
      raise StructureFileError(
        f'{path}: no atoms: the file has no atom_site category; give the '
        'coordinate file, not structure factors or a component definition'
      )
    return _cif_columns(path, site)
  except (StructureFileError, MemoryError):
    raise
  except Exception as error:  # The parser's errors are of many kinds.
    kind = 'BinaryCIF' if binary else 'mmCIF'
    raise StructureFileError(
      f'{path}: not a readable {kind} file ({type(error).__name__}: {error}); '
      'check that it is complete and has the right suffix'
    ) from error


def _cif_columns(
  path: pathlib.Path, site
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  n_atom = site.row_count

  def text(*names: str, default: str = '') -> np.ndarray:
    """The first column that exists, missing values filled by the next."""
    result = np.full(n_atom, default, dtype='U1').astype(object)
    for name in reversed(names):
      if name in site:
        values = site[name].as_array(str)
        known = ~np.isin(values, _NO_VALUE)
        result[known] = values[known]
    return result.astype(str)

  def number(values: np.ndarray, kind: type, default: float) -> np.ndarray:
    missing = np.isin(values, _NO_VALUE)
    result = np.full(n_atom, default, dtype=kind)
    result[~missing] = values[~missing].astype(np.float64).astype(kind)
    return result

  def coordinate(name: str) -> np.ndarray:
    if name not in site:
      raise StructureFileError(
        f'{path}: atom_site has no {name} column; the file has no coordinates'
      )
    return site[name].as_array(np.float64, np.nan)

  names = text('label_atom_id', 'auth_atom_id')
  residue_name = np.char.upper(text('label_comp_id', 'auth_comp_id'))
  hetero = text('group_PDB', default='ATOM') == 'HETATM'
  element = np.char.upper(text('type_symbol'))
  for i in np.flatnonzero(np.isin(element, ('', 'X'))):
    element[i] = chemical_components.infer_element(
      str(residue_name[i]), f' {names[i]}', bool(hetero[i])
    )
  occupancy = np.ones(n_atom)
  if 'occupancy' in site:
    occupancy = site['occupancy'].as_array(np.float64, 1.0)
  b_factor = np.zeros(n_atom)
  if 'B_iso_or_equiv' in site:
    b_factor = site['B_iso_or_equiv'].as_array(np.float64, 0.0)
  columns = {
    'chain_id': text('auth_asym_id', 'label_asym_id'),
    'entity_chain': text('label_asym_id'),
    'residue_id': number(text('auth_seq_id', 'label_seq_id'), np.int32, -1),
    'insertion_code': text('pdbx_PDB_ins_code'),
    'residue_name': residue_name,
    'atom_name': names,
    'alternate': text('label_alt_id'),
    'element': element,
    'charge': number(text('pdbx_formal_charge'), np.int32, 0),
    'occupancy': occupancy,
    'b_factor': np.nan_to_num(b_factor, posinf=0, neginf=0),
    'hetero': hetero,
    'position': np.stack([coordinate(f'Cartn_{x}') for x in 'xyz'], axis=-1),
  }
  return columns, text('pdbx_PDB_model_num', default='1')


def _mol_blocks(text: str) -> Iterator[str]:
  lines: list[str] = []
  inside = True
  for line in text.splitlines():
    if line.startswith('$$$$'):
      lines, inside = [], True
    elif inside:
      lines.append(line)
      if line.startswith('M  END'):
        yield '\n'.join(lines) + '\n'
        inside = False


def _read_mol_block(place: str, block: str) -> Molecule:
  chemical_components.require_biotite()
  from biotite.structure.bonds import (  # ty: ignore[import-not-found]
    BondType,
  )
  from biotite.structure.io.mol import MOLFile

  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      atoms = MOLFile.read(io.StringIO(block)).get_structure()
    all_bonds = atoms.bonds.as_array().tolist()
  except Exception as error:  # The parser's errors are of many kinds.
    raise StructureFileError(
      f'{place}: not a readable SDF record ({type(error).__name__}: {error}); '
      'check that the file is complete'
    ) from error
  symbols = np.char.upper(atoms.element.astype(str))
  heavy = ~np.isin(symbols, list(chemical_components.HYDROGENS))
  position = np.asarray(atoms.coord, dtype=np.float64)
  if not heavy.any() or not np.isfinite(position).all():
    raise StructureFileError(f'{place}: no atoms with coordinates')
  if block.splitlines()[1][20:22] == '2D':
    raise StructureFileError(
      f'{place}: holds a 2D drawing; give the ligand with 3D coordinates'
    )
  names = {
    int(BondType.SINGLE): 'SING',
    int(BondType.DOUBLE): 'DOUB',
    int(BondType.TRIPLE): 'TRIP',
  }
  new_index = np.cumsum(heavy) - 1
  bonds = [
    (int(new_index[i]), int(new_index[j]), names.get(order, 'AROM'))
    for i, j, order in all_bonds
    if heavy[i] and heavy[j]
  ]
  return Molecule(
    title=block.splitlines()[0].strip(),
    mol_block=block,
    elements=symbols[heavy].tolist(),
    charges=atoms.charge[heavy].astype(np.int32),
    position=position[heavy],
    bonds=bonds,
  )
