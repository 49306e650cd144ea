"""Chemical components: reference atoms, residue classes and SMILES.

The tables come from the chemical component dictionary (CCD) inside biotite:
the first look-up reads it (about a second), later ones are cached.

Units: positions in angstrom, charges in elementary charges.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import warnings

import numpy as np

_ELEMENT_TABLE = (
  'H HE LI BE B C N O F NE NA MG AL SI P S CL AR K CA SC TI V CR MN FE CO NI '
  'CU ZN GA GE AS SE BR KR RB SR Y ZR NB MO TC RU RH PD AG CD IN SN SB TE I '
  'XE CS BA LA CE PR ND PM SM EU GD TB DY HO ER TM YB LU HF TA W RE OS IR PT '
  'AU HG TL PB BI PO AT RN FR RA AC TH PA U NP PU AM CM BK CF ES FM MD NO LR '
  'RF DB SG BH HS MT DS RG CN NH FL MC LV TS OG'
)
ELEMENTS = tuple(_ELEMENT_TABLE.split())
ATOMIC_NUMBERS = {symbol: i for i, symbol in enumerate(ELEMENTS, start=1)}
HYDROGENS = frozenset({'H', 'D'})

_AMINO_ACID_TABLE = (
  'ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE '
  'LEU LYS MET PHE PRO SER THR TRP TYR VAL'
)
AMINO_ACIDS: tuple[str, ...] = tuple(_AMINO_ACID_TABLE.split())
AMINO_ACID_LETTERS = 'ARNDCQEGHILKMFPSTWYV'
NUCLEOTIDES = ('A', 'G', 'C', 'U', 'DA', 'DG', 'DC', 'DT', 'N', 'DN')

# The order of AF3's POLYMER_TYPES_ORDER_WITH_UNKNOWN_AND_GAP: amino acids,
# unknown amino acid, gap, RNA, DNA, unknown nucleotide.
RESIDUE_TYPES: tuple[str, ...] = (
  *AMINO_ACIDS,
  'UNK',
  '-',
  *NUCLEOTIDES[:8],
  'N',
)
UNKNOWN_RESIDUE_TYPE = RESIDUE_TYPES.index('UNK')

# Names which simulation packages write for protonation states. The CCD uses
# most of these codes for unrelated ligands, so an alias only counts when the
# residue's atoms are those of the amino acid (see `resolve_component_name`).
_RESIDUE_ALIASES = {
  'MSE': 'MET',
  **dict.fromkeys(('HID', 'HIE', 'HIP', 'HSD', 'HSE', 'HSP'), 'HIS'),
  **dict.fromkeys(('CYX', 'CYM'), 'CYS'),
  'ASH': 'ASP',
  'GLH': 'GLU',
  'LYN': 'LYS',
  # Nucleotides of AMBER, whose ends are numbered, and CHARMM.
  **{f'R{base}{end}': base for base in 'ACGU' for end in ('', '3', '5', 'N')},
  **{f'D{base}{end}': f'D{base}' for base in 'ACGT' for end in '35N'},
  **{f'{base}{end}': base for base in 'ACGU' for end in '35'},
  **{'ADE': 'A', 'CYT': 'C', 'GUA': 'G', 'URA': 'U', 'THY': 'DT'},
}
# Names of four letters: ends of AMBER's chains, protonation in GROMACS, waters.
_LONG_ALIASES = {
  **{
    f'{end}{name}': name for end in 'NC' for name in _AMINO_ACID_TABLE.split()
  },
  **{f'{end}{name}': 'HIS' for end in 'NC' for name in ('HID', 'HIE', 'HIP')},
  **{f'{end}CYX': 'CYS' for end in 'NC'},
  **dict.fromkeys(('LYSH', 'LYSN'), 'LYS'),
  **dict.fromkeys(
    ('HISA', 'HISB', 'HISD', 'HISE', 'HISH', 'HIS1', 'HIS2'), 'HIS'
  ),
  **dict.fromkeys(('CYSH', 'CYS1', 'CYS2'), 'CYS'),
  **dict.fromkeys(('ASPH', 'ASPP'), 'ASP'),
  **dict.fromkeys(('GLUH', 'GLUP'), 'GLU'),
  'ARGN': 'ARG',
  **{'RADE': 'A', 'RCYT': 'C', 'RGUA': 'G', 'RURA': 'U'},
  **{'DADE': 'DA', 'DCYT': 'DC', 'DGUA': 'DG', 'DTHY': 'DT'},
  **dict.fromkeys(('TIP3', 'TIP4', 'TIP5', 'TP3M', 'SPCE'), 'HOH'),
}
# SOL, SPC and TP3 are other components in the CCD; water models of simulation
# packages are recognised by the name of their oxygen.
WATERS = frozenset(('HOH', 'DOD', 'H2O', 'WAT', 'TIP', 'TIP3', 'TIP4', 'TIP5'))
WATER_MODELS = frozenset(('SOL', 'SPC', 'TP3'))
# Atom names of legacy and simulation files -> names of the CCD.
_ATOM_ALIASES = {
  'O1P': 'OP1',
  'O2P': 'OP2',
  'OT1': 'O',
  'OT2': 'OXT',
  'OC1': 'O',
  'OC2': 'OXT',
}
# Angstrom: longer than any covalent bond; longest bonds with and without an
# element beyond neon.
_MAX_BOND = 3.0
_BOND_CUTOFFS = (2.4, 1.9)


@dataclasses.dataclass(frozen=True, eq=False)
class Component:
  """The heavy atoms of one chemical component, in the order of the CCD.

  Attributes:
    name: the CCD code, for example 'ALA' or 'TQD'.
    kind: the CCD's type in upper case, for example 'L-PEPTIDE LINKING'.
    letter: one-letter code of the component or its parent; '' if none.
    atom_names: n_atom names.
    elements: n_atom upper-case element symbols.
    charges: [n_atom] int32 formal charges.
    positions: [n_atom, 3] float32 ideal coordinates in angstrom; NaN where
      the CCD has none.
    bonds: (atom, atom, order) with 0-based indices of heavy atoms; the order
      is the CCD's ('SING', 'DOUB', 'TRIP', ...).
    index: atom name -> position in `atom_names`.
  """

  name: str
  kind: str
  letter: str
  atom_names: tuple[str, ...]
  elements: tuple[str, ...]
  charges: np.ndarray
  positions: np.ndarray
  bonds: tuple[tuple[int, int, str], ...]
  index: dict[str, int]

  def match(self, atom_name: str) -> int | None:
    """Index of an atom, known aliases included; None if there is none."""
    candidates = [
      atom_name,
      _ATOM_ALIASES.get(atom_name, atom_name),
      atom_name.replace('*', "'"),
    ]
    if self.name == 'MET' and atom_name == 'SE':
      candidates.append('SD')
    if self.name == 'ILE' and atom_name == 'CD':
      candidates.append('CD1')
    for candidate in candidates:
      if candidate in self.index:
        return self.index[candidate]
    return None


def require_biotite() -> None:
  """Raises an ImportError that names the extra when biotite is missing."""
  try:
    import biotite.structure  # noqa: F401
  except ImportError as error:
    raise ImportError(
      'reading structures needs biotite, which is not installed: run '
      'pip install "structattn-jax[data]"'
    ) from error


def require_rdkit() -> types.ModuleType:
  """Returns `rdkit.Chem`, or raises an ImportError that names the extra."""
  try:
    from rdkit import Chem
  except ImportError as error:
    raise ImportError(
      'SMILES need RDKit, which is not installed: run '
      'pip install "structattn-jax[chem]"'
    ) from error
  return Chem


@functools.cache
def find_component(name: str) -> Component | None:
  """Looks a component up in the CCD.

  Args:
    name: the code, upper case.

  Returns:
    The component without hydrogens, or None if the CCD has no such code or
    lists no atoms for it (for example 'UNL').
  """
  require_biotite()
  from biotite.structure import info

  atoms = info.get_from_ccd('chem_comp_atom', name)
  if atoms is None:
    return None
  symbols = np.char.upper(atoms['type_symbol'].as_array(str))
  heavy = ~np.isin(symbols, list(HYDROGENS))
  if not heavy.any():
    return None
  names = tuple(atoms['atom_id'].as_array(str)[heavy].tolist())
  index = {atom_name: i for i, atom_name in enumerate(names)}

  def positions(pattern: str) -> np.ndarray:
    columns = [
      atoms[pattern.format(axis)].as_array(np.float32, np.nan) for axis in 'xyz'
    ]
    return np.stack(columns, axis=-1)[heavy]

  ideal = positions('pdbx_model_Cartn_{}_ideal')
  if not np.isfinite(ideal).all():
    # As AF3: the deposited model stands in for an incomplete ideal conformer.
    model = positions('model_Cartn_{}')
    ideal = model if np.isfinite(model).all() else ideal

  bonds = []
  table = info.get_from_ccd('chem_comp_bond', name)
  if table is not None:
    for first, second, order in zip(
      table['atom_id_1'].as_array(str).tolist(),
      table['atom_id_2'].as_array(str).tolist(),
      table['value_order'].as_array(str).tolist(),
      strict=True,
    ):
      if first in index and second in index:
        bonds.append((index[first], index[second], order.upper()))

  def text(column: str) -> str:
    values = info.get_from_ccd('chem_comp', name, column)
    return '' if values is None else str(values.as_array(str, '')[0])

  letter = text('one_letter_code')
  return Component(
    name=name,
    kind=text('type').upper(),
    letter=letter if len(letter) == 1 and letter.isalpha() else '',
    atom_names=names,
    elements=tuple(symbols[heavy].tolist()),
    charges=atoms['charge'].as_array(np.int32, 0)[heavy],
    positions=ideal,
    bonds=tuple(bonds),
    index=index,
  )


def is_linking(residue_name: str) -> bool:
  """Whether a residue of this name can be one of a chain, by the CCD."""
  component = find_component(residue_name.upper())
  return component is not None and any(
    part in component.kind
    for part in ('PEPTIDE LINKING', 'DNA LINKING', 'RNA LINKING')
  )


def is_water(residue_name: str) -> bool:
  """Whether a residue of this name is, or may be, water."""
  return residue_name in WATERS | WATER_MODELS


def long_residue_alias(name: str) -> str | None:
  """The three letters of a name of four that simulation packages write."""
  return _LONG_ALIASES.get(name.strip().upper())


def resolve_component_name(residue_name: str, atom_names: set[str]) -> str:
  """Maps names of simulation packages, and MSE, to the standard residue.

  Args:
    residue_name: the code in the file.
    atom_names: the heavy atoms that the file has for the residue.

  Returns:
    The standard code if `residue_name` is an alias, the backbone (N, CA and C,
    or C1', C3' and C4') is there and every atom belongs to the residue;
    otherwise `residue_name`. MSE needs only a CA.
  """
  parent = _RESIDUE_ALIASES.get(residue_name)
  if parent is None:
    return residue_name
  atom_names = {name.replace('*', "'") for name in atom_names}
  if parent in NUCLEOTIDES:
    needed = {"C1'", "C3'", "C4'"}
    # CHARMM has one name for both; the sugar tells.
    if parent in 'ACG' and "O2'" not in atom_names:
      parent = f'D{parent}'
  else:
    needed = {'CA'} if residue_name == 'MSE' else {'N', 'CA', 'C'}
  component = find_component(parent)
  assert component is not None  # The standard residues are in every CCD.
  if not needed <= atom_names or any(
    component.match(name) is None for name in atom_names
  ):
    return residue_name
  return parent


def component_atom_names(
  name: str, atom_names: list[str], elements: list[str], position: np.ndarray
) -> list[str] | None:
  """Checks that a ligand in a file is the CCD component of its code.

  Args:
    name: the CCD code.
    atom_names: n_atom names in the file.
    elements: n_atom upper-case symbols in the file.
    position: [n_atom, 3] float, angstrom.

  Returns:
    `atom_names` if at least half of the atoms are in the component, all of
    those with the same element, and the component's bonds are short in the
    file. Otherwise the CCD's names if the molecule has the bonds of the
    whole component, judged by distance. None if it is another molecule.
  """
  component = find_component(name)
  if component is None:
    return None
  if _describes(component, atom_names, elements, position):
    return atom_names
  if len(elements) != len(component.elements):
    return None
  heavy = np.array([ATOMIC_NUMBERS.get(e, 0) > 10 for e in elements])
  cutoff = np.where(heavy[:, None] | heavy[None], *_BOND_CUTOFFS)
  distance = np.linalg.norm(position[:, None] - position[None], axis=-1)
  first, second = np.nonzero(np.triu(distance < cutoff, k=1))
  bonds = [(int(i), int(j), '') for i, j in zip(first, second, strict=True)]
  return match_by_bonds(component, elements, bonds)


def _describes(
  component: Component,
  atom_names: list[str],
  elements: list[str],
  position: np.ndarray,
) -> bool:
  row: dict[int, int] = {}
  for i, (atom_name, element) in enumerate(
    zip(atom_names, elements, strict=True)
  ):
    atom = component.match(atom_name)
    if atom is not None:
      if component.elements[atom] != element:
        return False
      row.setdefault(atom, i)
  bonds = np.array(
    [(row[i], row[j]) for i, j, _ in component.bonds if i in row and j in row],
    dtype=np.int64,
  ).reshape(-1, 2)
  ends = position[bonds]
  long = np.linalg.norm(ends[:, 0] - ends[:, 1], axis=-1) > _MAX_BOND
  # A few long bonds are poor coordinates, many are another molecule.
  return 2 * len(row) >= len(atom_names) and long.sum() <= 0.1 * len(bonds)


def infer_element(residue_name: str, padded_name: str, hetero: bool) -> str:
  """Element of an atom whose file does not say it.

  Args:
    residue_name: the residue's code.
    padded_name: the four columns of the PDB atom name, blanks kept: the
      element is right-aligned in the first two.
    hetero: True for HETATM records, where two-letter elements are likely.

  Returns:
    The upper-case symbol; 'X' if the name holds no letter.
  """
  name = padded_name.strip()
  component = find_component(residue_name)
  if component is not None:
    matched = component.match(name)
    if matched is not None:
      return component.elements[matched]
  letters = ''.join(c for c in name if c.isalpha()).upper()
  if not letters:
    return 'X'
  aligned = padded_name[:2].strip().upper()
  # Four-character names such as 'HG11' start in the element's columns.
  hydrogen = len(name) == 4 and letters[0] in HYDROGENS
  if hetero and len(aligned) == 2 and not hydrogen and aligned in ELEMENTS:
    return aligned
  first = letters[0]
  return first if first in ATOMIC_NUMBERS or first in HYDROGENS else 'X'


@functools.cache
def component_smiles(name: str) -> str | None:
  """Canonical isomeric SMILES of a whole CCD component.

  Args:
    name: the CCD code.

  Returns:
    The SMILES with the stereochemistry of the ideal coordinates, leaving
    atoms included; None if the CCD has no such code or RDKit rejects it.

  Raises:
    ImportError: if RDKit or biotite is not installed, naming the extra.
  """
  chem = require_rdkit()
  component = find_component(name)
  if component is None or not ATOMIC_NUMBERS.keys() >= {*component.elements}:
    return None  # 'UNX' has an atom of unknown element.
  from biotite.interface.rdkit import to_mol
  from biotite.structure import info

  with warnings.catch_warnings():  # About missing coordinates, allowed here.
    warnings.simplefilter('ignore')
    molecule = to_mol(info.residue(name, allow_missing_coord=True))
  return _canonical_smiles(chem, molecule)


def mol_block_smiles(mol_block: str) -> str | None:
  """Canonical isomeric SMILES of one MDL mol block.

  Args:
    mol_block: the text up to 'M  END', with 3D coordinates.

  Returns:
    The SMILES with the stereochemistry of the coordinates; None if RDKit
    cannot read the block.

  Raises:
    ImportError: if RDKit is not installed, naming the extra.
  """
  chem = require_rdkit()
  from rdkit import rdBase

  with rdBase.BlockLogs():
    molecule = chem.MolFromMolBlock(mol_block, sanitize=False, removeHs=False)
  return None if molecule is None else _canonical_smiles(chem, molecule)


def _canonical_smiles(chem: types.ModuleType, molecule) -> str | None:
  from rdkit import rdBase

  try:
    with rdBase.BlockLogs():
      chem.SanitizeMol(molecule)
      if molecule.GetNumConformers():
        chem.AssignStereochemistryFrom3D(molecule)
      smiles = chem.MolToSmiles(chem.RemoveHs(molecule))
  except (ValueError, RuntimeError):  # RDKit's sanitisation errors.
    return None
  return smiles or None


def match_by_bonds(
  component: Component,
  elements: list[str],
  bonds: list[tuple[int, int, str]],
) -> list[str] | None:
  """Names the atoms of an unnamed molecule after a CCD component.

  Args:
    component: the component that the molecule should be.
    elements: n_atom upper-case symbols of the molecule's heavy atoms.
    bonds: (atom, atom, order) of the molecule, orders as in the CCD.

  Returns:
    One CCD atom name per atom, or None if the molecules differ. Atoms that
    are equivalent by symmetry may be exchanged.
  """
  if sorted(elements) != sorted(component.elements):
    return None
  import networkx
  from networkx.algorithms import isomorphism

  def graph(symbols, edges):
    result = networkx.Graph()
    result.add_nodes_from(
      (i, {'element': symbol}) for i, symbol in enumerate(symbols)
    )
    result.add_edges_from((i, j, {'order': order}) for i, j, order in edges)
    return result

  molecule = graph(elements, bonds)
  reference = graph(component.elements, component.bonds)
  same_element = isomorphism.categorical_node_match('element', '')
  same_order = isomorphism.categorical_edge_match('order', '')
  # Bond orders first: they tell a carbonyl from a hydroxyl. Without them for
  # molecules drawn in another Kekulé form.
  for edge_match in (same_order, None):
    matcher = isomorphism.GraphMatcher(
      molecule, reference, node_match=same_element, edge_match=edge_match
    )
    if matcher.is_isomorphic():
      return [component.atom_names[matcher.mapping[i]] for i in molecule]
  return None
