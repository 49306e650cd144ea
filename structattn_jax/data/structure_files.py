"""Readers of PDB, mmCIF, BinaryCIF and SDF files into one atom table.

Nothing is selected here except the model: alternate locations, waters and
hydrogens are the business of `structures.py`. Every failure is reported as a
`StructureFileError` that names the file and says what to do.

gemmi reads PDB and mmCIF. What it would pass over or read as something else is
mended or refused beforehand, line by line: a file's frames that END records
part, numbers that are none, charges that files of the 1990s do not have.

Units: positions in angstrom, charges in elementary charges.
"""

from __future__ import annotations

import codecs
import collections
import dataclasses
import gzip
import io
import os
import pathlib
import re
import types
import warnings
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from structattn_jax.common import files
from structattn_jax.data import binary_cif, chemical_components

_PDB_SUFFIXES = ('.pdb', '.ent', '.pdb1')
_CIF_SUFFIXES = ('.cif', '.mmcif', '.pdbx')
_BINARY_CIF_SUFFIXES = ('.bcif',)
_SDF_SUFFIXES = ('.sdf', '.mol', '.sd')
_ATOM_RECORDS = ('ATOM', 'HETATM')
# Digits, or hybrid-36 beyond what fits into four of them.
_RESIDUE_NUMBER = r'-?[0-9]+|[A-Za-z][0-9A-Za-z]{3}'
_SOME_NUMBER = r'[-+]?(nan|inf(inity)?|[0-9.]+(e[-+]?[0-9]*)?)'
# Angstrom: capsids and ribosomes reach a few thousand.
_FURTHEST = 1e5
_MAX_OCCUPANCY, _MAX_B_FACTOR = 1e3, 1e6
_MAX_ATOMS, _LONGEST_NAME = 10_000_000, 64
# Zipped structures grow tenfold, waters a little more.
_UNZIPPED, _UNZIPPED_TIMES = 2**24, 40


class StructureFileError(files.FileError):
  """A structure file is missing, unreadable or holds nothing usable."""


@dataclasses.dataclass(frozen=True, eq=False)
class AtomTable:
  """All atoms of one model of a file, in file order.

  Attributes:
    chain_id: [n_atom] str, the author's chain name.
    chain_piece: [n_atom] int32, number of earlier chains of this name that a
      TER record has ended; 0 in mmCIF.
    entity_chain: [n_atom] str, mmCIF's `label_asym_id`; '' for PDB.
    residue_id: [n_atom] int32, the author's residue number.
    insertion_code: [n_atom] str, '' if none.
    sequence_id: [n_atom] int32, mmCIF's `label_seq_id`, from 1; 0 if none.
    in_sequence: [n_atom] bool, whether the file lists the residue in the
      sequence of its chain: by `label_seq_id`, or by SEQRES.
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
  chain_piece: np.ndarray
  entity_chain: np.ndarray
  residue_id: np.ndarray
  insertion_code: np.ndarray
  sequence_id: np.ndarray
  in_sequence: np.ndarray
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
    ImportError: if gemmi is not installed, naming the extra.
  """
  path = pathlib.Path(path)
  suffix = _suffix(path)
  if suffix in _PDB_SUFFIXES:
    read, kind = _read_pdb, 'PDB'
  elif suffix in _CIF_SUFFIXES:
    read, kind = _read_cif, 'mmCIF'
  elif suffix in _BINARY_CIF_SUFFIXES:
    read, kind = _read_binary_cif, 'BinaryCIF'
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
  content = _read_bytes(path)
  what = (
    f'not a readable {kind} file; check that it is complete and has the right '
    'suffix'
  )
  with files.guard(path, StructureFileError, what):
    table, model_of_atom = read(path, content)
  _, first = np.unique(model_of_atom, return_index=True)
  numbers = model_of_atom[np.sort(first)]  # In file order.
  if not isinstance(model, int) or not 1 <= model <= len(numbers):
    raise ValueError(
      f'model: {path} has {len(numbers)} model(s), got model={model!r}; give '
      f'a number from 1 to {len(numbers)}'
    )
  # BinaryCIF holds single precision. Rounding the text formats alike gives the
  # same frames for every format of one structure.
  rounded = table.position.astype(np.float32).astype(np.float64)
  table = dataclasses.replace(table, position=rounded)
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
  blocks = list(_mol_blocks(_text(_read_bytes(path))))
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
      most = _UNZIPPED + _UNZIPPED_TIMES * len(data)
      with gzip.open(io.BytesIO(data)) as file:
        unzipped = file.read(most + 1)
      if len(unzipped) > most:
        raise StructureFileError(
          f'{path}: {len(data):,} bytes unfold to more than {most:,}, which no '
          'structure does'
        )
      data = unzipped
  except (OSError, EOFError, zlib.error) as error:
    raise StructureFileError(
      f'{path}: cannot be read ({error}); check that the file is complete'
    ) from error
  wide = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
  # Every other byte of ASCII text in UTF-16 is 0, of UTF-32 three in four.
  text = _suffix(path) not in _BINARY_CIF_SUFFIXES
  if text and (wide or data[:1000].count(0) > len(data[:1000]) // 3):
    raise StructureFileError(
      f'{path}: the text is UTF-16 or UTF-32; save it as UTF-8 or plain ASCII'
    )
  while data.startswith(codecs.BOM_UTF8):  # Joined files have several.
    data = data.removeprefix(codecs.BOM_UTF8)
  if not data.strip():
    raise StructureFileError(f'{path}: the file is empty; download it again')
  return data


def _text(data: bytes) -> str:
  return data.decode('utf-8', errors='replace')


def _require_gemmi() -> types.ModuleType:
  try:
    import gemmi
  except ImportError:
    raise ImportError(
      'structure files need gemmi: pip install "structattn-jax[data]"'
    ) from None
  return gemmi


def _read_pdb(path: pathlib.Path, data: bytes) -> tuple[AtomTable, np.ndarray]:
  """Fixed columns of the PDB format, version 3.3, leniently."""
  gemmi = _require_gemmi()
  text = _text(data)
  hint = 'it is not a PDB file'
  if re.search(r'^\s*(data_|loop_|_atom_site\.)', text, re.MULTILINE):
    hint = 'it looks like mmCIF, so rename it to .cif'
    text = ''
  sequences = _sequences_of_pdb(text)
  rows: list[tuple] = []
  models = 0
  for first, lines in _pdb_frames(text.splitlines()):
    lines = [
      _checked_pdb_line(path, number, line)
      for number, line in enumerate(lines, start=first)
    ]
    marked = '\n'.join(_with_ter_before_copies(lines))
    structure = gemmi.read_pdb_string(marked, split_chain_on_ter=True)
    num_read = 0
    for model in structure:
      models += 1
      # A chain that a TER has ended: another of that name is another chain,
      # but ligands of the chain come behind its TER.
      pieces: collections.Counter[str] = collections.Counter()
      for chain in model:
        # All of it may be modified; one residue alone is a ligand.
        polymer = any(residue.het_flag != 'H' for residue in chain) or (
          sum(chemical_components.is_linking(r.name) for r in chain) > 1
        )
        if polymer or not pieces[chain.name]:
          pieces[chain.name] += 1
        piece = pieces[chain.name] - 1
        for residue in chain:
          name = residue.name.upper()
          listed = name in sequences.get(chain.name, ())
          for atom in residue:
            num_read += 1
            rows.append(
              (
                chain.name,
                piece,
                residue.seqid.num,
                residue.seqid.icode.strip(),
                name,
                atom.name.upper(),
                atom.altloc.replace('\0', ''),
                atom.element.name.upper(),
                atom.padded_name(),
                atom.charge,
                atom.occ,
                atom.b_iso,
                residue.het_flag == 'H',
                listed,
                atom.pos.tolist(),
                models,
              )
            )
    expected = sum(line.startswith(_ATOM_RECORDS) for line in lines)
    if num_read != expected:
      raise ValueError(f'{num_read} of {expected} atom records were understood')
  if not rows:
    raise StructureFileError(f'{path}: no ATOM or HETATM records; {hint}')
  (
    chain_id,
    chain_piece,
    residue_id,
    insertion_code,
    residue_name,
    atom_name,
    alternate,
    element,
    padded_name,
    charge,
    occupancy,
    b_factor,
    hetero,
    listed,
    position,
    model_of_atom,
  ) = zip(*rows, strict=True)
  n_atom = len(rows)
  table = AtomTable(
    chain_id=np.array(chain_id, dtype=str),
    chain_piece=np.array(chain_piece, dtype=np.int32),
    entity_chain=np.full(n_atom, '', dtype=str),
    residue_id=np.array(residue_id, dtype=np.int32),
    insertion_code=np.array(insertion_code, dtype=str),
    sequence_id=np.zeros(n_atom, dtype=np.int32),
    in_sequence=np.array(listed, dtype=bool),
    residue_name=np.array(residue_name, dtype=str),
    atom_name=np.array(atom_name, dtype=str),
    alternate=np.array(alternate, dtype=str),
    element=_elements(element, residue_name, padded_name, hetero),
    charge=np.array(charge, dtype=np.int32),
    occupancy=np.array(occupancy, dtype=np.float64),
    b_factor=np.array(b_factor, dtype=np.float64),
    hetero=np.array(hetero, dtype=bool),
    position=np.array(position, dtype=np.float64),
  )
  return table, np.array(model_of_atom)


def _pdb_frames(lines: list[str]) -> Iterator[tuple[int, list[str]]]:
  """First line number and lines of what END records part."""
  start = 0
  for i, line in enumerate(lines):
    if line.strip().upper() == 'END':
      yield start + 1, lines[start:i]
      start = i + 1
  yield start + 1, lines[start:]


def _with_ter_before_copies(lines: Sequence[str]) -> Iterator[str]:
  """The lines, and TER where a chain starts again without one.

  gemmi takes the second of two equal residues for more of the first.
  """
  seen: dict[str, set[str]] = {}
  last = ''
  for line in lines:
    if line.startswith('ATOM'):
      chain, residue = line[20:22], line[17:27]
      atoms = seen.setdefault(chain, set())
      if line[12:27] in atoms and residue != last:
        yield 'TER'
        atoms.clear()
      atoms.add(line[12:27])
      last = residue
    elif line.startswith(('TER', 'MODEL', 'ENDMDL')):
      seen.clear()
    yield line


def _sequences_of_pdb(text: str) -> dict[str, set[str]]:
  """Chain name to the names of the residues in its SEQRES records."""
  found: dict[str, set[str]] = {}
  for line in re.findall(r'^SEQRES.*', text, re.MULTILINE):
    found.setdefault(line[11:12].strip(), set()).update(line[19:70].split())
  return found


def _checked_pdb_line(path: pathlib.Path, number: int, line: str) -> str:
  """An atom record as gemmi reads it right; other records as they are."""
  record = line[:6].upper()
  if not record.startswith(_ATOM_RECORDS):
    return line
  line = record + line[6:].ljust(74)
  alias = chemical_components.long_residue_alias(line[17:21])
  if alias is not None:  # Four letters, of which the last is no chain name.
    line = f'{line[:17]}{alias:>3} {line[21:]}'
  name = line[17:20].strip().upper()
  for axis, begin in zip('xyz', (30, 38, 46), strict=True):
    _number(path, f'line {number} ({axis})', line[begin : begin + 8], _FURTHEST)
  for what, begin, most, default in (
    ('occupancy', 54, _MAX_OCCUPANCY, '  1.00'),
    ('B-factor', 60, _MAX_B_FACTOR, '  0.00'),
  ):
    field = line[begin : begin + 6].strip()
    # What is no number at all is some program's note; nan and 1e9 are numbers
    # gone wrong.
    if re.fullmatch(_SOME_NUMBER, field, re.IGNORECASE):
      _number(path, f'line {number} ({what})', field, most)
    else:
      line = line[:begin] + default + line[begin + 6 :]
  if not re.fullmatch(_RESIDUE_NUMBER, line[22:26].strip()):
    if not chemical_components.is_water(name):
      raise StructureFileError(
        f'{path}: line {number}: residue number {line[22:26]!r} of {name}; '
        'expected digits or hybrid-36'
      )
    line = f'{line[:22]}   0{line[26:]}'
  charge = line[78:80]
  if charge.strip() and not re.fullmatch(r'\d[+-]|[+-]\d', charge):
    line = line[:78]  # A sequence number in files of the 1990s.
  return line


def _read_cif(path: pathlib.Path, data: bytes) -> tuple[AtomTable, np.ndarray]:
  gemmi = _require_gemmi()
  found = []
  for block in gemmi.cif.read_string(_text(data)):
    table = block.find_mmcif_category('_atom_site.')
    if table.width():
      found.append(
        {
          tag.rpartition('.')[2].lower(): [
            None if gemmi.cif.is_null(value) else gemmi.cif.as_string(value)
            for value in table.column(i)
          ]
          for i, tag in enumerate(table.tags)
        }
      )
  return _from_columns(path, found)


def _read_binary_cif(
  path: pathlib.Path, data: bytes
) -> tuple[AtomTable, np.ndarray]:
  found = binary_cif.tables(data, '_atom_site', _MAX_ATOMS)
  return _from_columns(
    path, [{k.lower(): v for k, v in table.items()} for table in found]
  )


def _from_columns(
  path: pathlib.Path, found: list[dict[str, list[str | None]]]
) -> tuple[AtomTable, np.ndarray]:
  """The first table with rows, from columns of text."""
  site = next((table for table in found if any(table.values())), {})
  if not site:
    raise StructureFileError(
      f'{path}: no atoms: the file has no atom_site category; give the '
      'coordinate file, not structure factors or a component definition'
    )
  n_atom = max(map(len, site.values()))
  nothing: list[str | None] = [None] * n_atom

  def texts(*names: str, default: str = '') -> list[str]:
    """The first column that exists, missing values filled by the next."""
    columns = [site.get(name, nothing) for name in names]
    values = [
      next((v for v in row if v), default) for row in zip(*columns, strict=True)
    ]
    longest = max(values, key=len)
    if len(longest) > _LONGEST_NAME:
      raise StructureFileError(
        f'{path}: column {names[0]}: expected at most {_LONGEST_NAME} '
        f'characters, got {len(longest):,} ({longest[:40]!r}...)'
      )
    return values

  def numbers(*names: str, most: float, default: float) -> np.ndarray:
    columns = [site.get(name, nothing) for name in names]
    result = np.full(n_atom, default, np.float64)
    for i, row in enumerate(zip(*columns, strict=True)):
      value = next((v for v in row if v is not None), None)
      if value is not None:
        result[i] = _number(path, f'row {i + 1}, {names[0]}', value, most)
    return result

  def integers(*names: str, default: int) -> np.ndarray:
    values = numbers(*names, most=2**31 - 1, default=default)
    broken = np.flatnonzero(values != np.rint(values))
    if broken.size:
      raise StructureFileError(
        f'{path}: row {broken[0] + 1}, {names[0]}: expected an integer, got '
        f'{values[broken[0]]}'
      )
    return values.astype(np.int32)

  for names in (
    ('label_atom_id', 'auth_atom_id'),
    ('label_comp_id', 'auth_comp_id'),
  ):
    if not any(name in site for name in names):
      raise StructureFileError(
        f'{path}: atom_site has no {names[0]} column; atoms and residues need '
        'names'
      )
  for axis in 'xyz':
    if f'cartn_{axis}' not in site:
      raise StructureFileError(
        f'{path}: atom_site has no Cartn_{axis} column; the file has no '
        'coordinates'
      )
  atom_name = [name.upper() for name in texts('label_atom_id', 'auth_atom_id')]
  residue_name = [
    name.upper() for name in texts('label_comp_id', 'auth_comp_id')
  ]
  hetero = [
    group.upper() == 'HETATM' for group in texts('group_pdb', default='ATOM')
  ]
  padded = [f' {name}' for name in atom_name]
  sequence_id = integers('label_seq_id', default=0)
  table = AtomTable(
    chain_id=np.array(texts('auth_asym_id', 'label_asym_id')),
    chain_piece=np.zeros(n_atom, np.int32),
    entity_chain=np.array(texts('label_asym_id')),
    residue_id=integers('auth_seq_id', 'label_seq_id', default=-1),
    insertion_code=np.array(texts('pdbx_pdb_ins_code')),
    sequence_id=sequence_id,
    in_sequence=sequence_id > 0,
    residue_name=np.array(residue_name),
    atom_name=np.array(atom_name),
    alternate=np.array(texts('label_alt_id')),
    element=_elements(
      [e.upper() for e in texts('type_symbol')], residue_name, padded, hetero
    ),
    charge=integers('pdbx_formal_charge', default=0),
    occupancy=numbers('occupancy', most=_MAX_OCCUPANCY, default=1.0),
    b_factor=numbers('b_iso_or_equiv', most=_MAX_B_FACTOR, default=0.0),
    hetero=np.array(hetero),
    position=np.stack(
      [
        numbers(f'cartn_{axis}', most=_FURTHEST, default=np.nan)
        for axis in 'xyz'
      ],
      axis=-1,
    ),
  )
  return table, integers('pdbx_pdb_model_num', default=1)


def _elements(
  elements: Sequence[str],
  residue_names: Sequence[str],
  padded_names: Sequence[str],
  hetero: Sequence[bool],
) -> np.ndarray:
  """Upper-case symbols, inferred from the atom's name where there is none."""
  known = {*chemical_components.ATOMIC_NUMBERS, *chemical_components.HYDROGENS}
  return np.array(
    [
      element
      if element in known
      else chemical_components.infer_element(residue, name, het)
      for element, residue, name, het in zip(
        elements, residue_names, padded_names, hetero, strict=True
      )
    ]
  )


def _number(path: pathlib.Path, where: str, text: str, most: float) -> float:
  """A finite number of at most `most`, perhaps with an error in brackets."""
  try:
    value = float(re.sub(r'\(\d+\)$', '', text.strip()))
  except ValueError:
    value = float('nan')
  if not abs(value) <= most:
    raise StructureFileError(
      f'{path}: {where}: expected a number of at most {most:g}, got '
      f'{text.strip()[:40]!r}'
    )
  return value


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
  from biotite.structure import BondType  # ty: ignore[missing-module-member]
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
