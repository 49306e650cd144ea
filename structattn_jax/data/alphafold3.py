"""Inputs of AlphaFold 3's atom attention encoder and decoder.

  features = data.featurise_alphafold3(structure, seed=0)
  plan, ref = data.alphafold3_windows(features)   # flat atoms in windows
  batch = data.alphafold3_batch(features)         # upstream's dense layout
  batch = data.alphafold3_head_batch(path, seed=0)  # for the diffusion head

Mirrors alphafold3 `model/features.py` (`tokenizer`, `get_reference`,
`RefStructure`) and `model/atom_layout/atom_layout.py`
(`make_flat_atom_layout`) @ c0f97ed; Abramson et al. (2024), Suppl. 2.6, 2.8:

  * One token per amino acid and nucleotide, one per atom of anything else:
    ligands, ions, glycans, modified residues.
  * The atoms of a residue are those of its component, whether the file has
    them or not. OXT belongs to the last residue of a protein chain alone, OP3
    to the first of a nucleic acid chain. UNK is listed as GLY. O1 leaves a
    glycan, unless another residue is bonded there.
  * Each residue has a conformer of its own, centred on all its atoms, hydrogens
    included, turned at random and moved by a normal deviate of 1 angstrom.

Differs from AF3, which knows the sequence:
  * Only residues in the file are there. The first and the last of a chain count
    as its ends, and so do those for which the file has an OP3 or OXT.
  * Chains keep the order of the file; bonds are judged by distance.
  * Selenomethionine is methionine, as where AF3 reads structure files.
  * Random numbers come from NumPy's present generator.
  * Ligands outside the CCD are listed as in the file, with a conformer if they
    came from an SDF file, else with zeros. AF3 takes a SMILES string instead.

Shapes: n_token tokens; n_atom atoms; n_slot = 24 slots per token.
Units: positions in angstrom, charges in elementary charges.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from structattn_jax.data import (
  buckets,
  chemical_components,
  conformers,
  features,
  structures,
)
from structattn_jax.data.feature_types import ComplexFeatures
from structattn_jax.network.alphafold3 import (
  atom_layout,
  diffusion_head,
  window_plan,
)

_N_NAME_CHARS = 4
# Angstrom; glycosidic bonds are shorter, contacts longer.
_MAX_BOND = 1.9
_TOKEN_IDS = (
  'token_index',
  'residue_index',
  'asym_id',
  'entity_id',
  'sym_id',
)
_REFERENCE = (
  'ref_pos',
  'ref_mask',
  'ref_element',
  'ref_charge',
  'ref_atom_name_chars',
)


class _Atom(NamedTuple):
  name: str
  element: str
  charge: int
  # Atom of the structure, -1 if it is not there.
  source: int
  ref_pos: np.ndarray


def featurise_alphafold3(
  structure: structures.Structure,
  *,
  seed: int,
  conformer: Literal['generated', 'ideal'] = 'generated',
  augment: bool = True,
  standalone_glycans: Literal['released', 'whole'] = 'released',
) -> ComplexFeatures:
  """Turns a structure into AF3's tokens, atoms and reference features.

    files = data.example('1s3v')
    structure = data.load_structure(files.structure, ligand=files.ligand)
    features = data.featurise_alphafold3(structure, seed=0)

  Args:
    structure: a loaded structure.
    seed: of conformers, rotations and translations, not negative.
    conformer: 'generated' by RDKit as in AF3, with the CCD's coordinates where
      that fails; or the CCD's 'ideal' coordinates for all, without RDKit.
    augment: whether the centred conformers are turned and moved at random, as
      in AF3. With 'ideal' and False nothing depends on `seed`.
    standalone_glycans: 'released', the published default: O1 also leaves a
      sugar that is bonded to nothing; 'whole' keeps it there.

  Returns:
    NumPy features, unpadded. Atoms that the file lacks have `position_mask`
    False and positions of zero.

  Raises:
    ValueError: if `seed` is negative or an option unknown.
    StructureFileError: if the name of an atom is longer than the 4 characters
      which AF3 encodes.
    ImportError: if biotite is not installed, or RDKit and it is needed, naming
      the extra.
  """
  for name, value, known in (
    ('conformer', conformer, ('generated', 'ideal')),
    ('standalone_glycans', standalone_glycans, ('released', 'whole')),
  ):
    if value not in known:
      raise ValueError(f'{name}: expected one of {known}, got {value!r}')
  if not isinstance(seed, int | np.integer) or seed < 0:
    raise ValueError(f'seed: expected a non-negative integer, got {seed!r}')
  random = np.random.default_rng(seed)
  bounds = np.searchsorted(
    structure.atom_residue, np.arange(structure.n_residue + 1)
  ).tolist()
  is_residue = features.is_residue_token(structure)
  chain_ends = _chain_ends(structure)
  atoms: list[_Atom] = []
  atom_residue: list[int] = []
  dense_slot: list[int] = []
  for residue in range(structure.n_residue):
    in_file = range(bounds[residue], bounds[residue + 1])
    leaving = _leaving_atoms(
      structure, residue, in_file, chain_ends, standalone_glycans
    )
    conformer_seed = int(random.integers(1, 2**31))
    listed = _list_atoms(
      structure,
      residue,
      in_file,
      conformer_seed if conformer == 'generated' else None,
    )
    if augment:
      rotation, translation = _random_motion(random)
      listed = [
        atom._replace(ref_pos=rotation @ atom.ref_pos + translation)
        for atom in listed
      ]
    for slot, atom in enumerate(listed):
      if atom.name not in leaving:
        atoms.append(atom)
        atom_residue.append(residue)
        dense_slot.append(slot if is_residue[residue] else 0)
  numbers = chemical_components.ATOMIC_NUMBERS
  return features.assemble(
    structure,
    np.array([atom.source for atom in atoms], np.int64),
    np.array(atom_residue, np.int64),
    dense_slot=np.array(dense_slot, np.int32),
    ref_pos=_array([atom.ref_pos for atom in atoms], 3, np.float32),
    ref_mask=np.ones(len(atoms), bool),
    ref_element=np.array(
      [numbers.get(atom.element, 0) for atom in atoms], np.int32
    ),
    ref_charge=np.array([atom.charge for atom in atoms], np.float32),
    ref_atom_name_chars=_array(
      [
        _encode(structure, residue, atom.name)
        for residue, atom in zip(atom_residue, atoms, strict=True)
      ],
      _N_NAME_CHARS,
      np.int32,
    ),
  )


def alphafold3_windows(
  complex_features: ComplexFeatures, **options: Any
) -> tuple[window_plan.WindowPlan, window_plan.RefStructure]:
  """The flat layout for `precompute`, `encode` and `decode`.

  Args:
    complex_features: of `featurise_alphafold3`. Atoms that `pad_features`
      padded keep their number, rounded up to whole windows.
    **options: of `build_window_plan`, for instance `n_atom`.

  Returns:
    The windows over the atoms, and their reference conformers; NumPy arrays.

  Raises:
    ValueError: as `build_window_plan`.
  """
  atoms, tokens = complex_features.atoms, complex_features.tokens
  if not np.asarray(atoms.mask).all() and options.get('n_atom') is None:
    num_queries = options.get('num_queries', window_plan.NUM_QUERIES)
    least = max(len(atoms.mask), options.get('num_keys', window_plan.NUM_KEYS))
    options['n_atom'] = -(-least // num_queries) * num_queries
  plan = window_plan.build_window_plan(
    atoms.token_index,
    tokens.residue_uid,
    atoms.mask,
    dense_slot=atoms.dense_slot,
    **options,
  )
  n_real = int(plan.num_atoms)
  ref: dict[str, Any] = {
    name: window_plan.pad_atoms(plan, np.asarray(getattr(atoms, name))[:n_real])
    for name in _REFERENCE
  }
  return plan, window_plan.RefStructure(**ref)


def alphafold3_batch(
  complex_features: ComplexFeatures,
) -> dict[str, np.ndarray]:
  """Upstream's dense batch dictionary for the atom encoder and decoder.

  Args:
    complex_features: of `featurise_alphafold3`; `pad_features` pads the tokens
      as AF3 does.

  Returns:
    Reference conformers `ref_...` [n_token, n_slot, ...], `ref_space_uid` and
    `pred_dense_atom_mask` [n_token, n_slot], and the five gathers
    `token_atoms_to_queries:gather_idxs` and so on.
  """
  atoms, tokens = complex_features.atoms, complex_features.tokens
  n_token, real = complex_features.n_token, np.asarray(atoms.mask)
  index = (
    np.asarray(atoms.token_index)[real],
    np.asarray(atoms.dense_slot)[real],
  )

  def dense(values: Any) -> np.ndarray:
    values = np.asarray(values)[real]
    shape = (n_token, window_plan.NUM_SLOTS, *values.shape[1:])
    result = np.zeros(shape, values.dtype)
    result[index] = values
    return result

  mask = dense(atoms.mask)
  gathers = atom_layout.AtomCrossAtt.build(
    mask, num_real_tokens=int(np.sum(tokens.mask))
  )
  uid = np.asarray(tokens.residue_uid)[:, None]
  return {
    **{name: dense(getattr(atoms, name)) for name in _REFERENCE},
    'ref_space_uid': np.repeat(uid, window_plan.NUM_SLOTS, axis=1),
    'pred_dense_atom_mask': mask,
    **gathers.to_batch(),
  }


def alphafold3_head_batch(
  structure: structures.Structure | str | os.PathLike[str],
  *,
  seed: int,
  ligand: str | os.PathLike[str] | None = None,
  n_token: int | None = None,
  **options: Any,
) -> diffusion_head.DiffusionHeadBatch:
  """From a structure file to the batch of AF3's diffusion head.

    batch = data.alphafold3_head_batch(data.example('1s3v').structure, seed=0)

  Args:
    structure: a loaded structure, or the path of a file for `load_structure`.
    seed: of the conformers; see `featurise_alphafold3`.
    ligand: path of an SDF file, for `load_structure`; only with a path.
    n_token: padded number of tokens; None: no padding.
    **options: of `featurise_alphafold3`.

  Returns:
    The batch, NumPy arrays.

  Raises:
    ValueError: as `featurise_alphafold3`, if `n_token` is too small, or on a
      ligand with a loaded structure.
    StructureFileError: as `load_structure` and `featurise_alphafold3`.
    ImportError: as `featurise_alphafold3`.
  """
  if not isinstance(structure, structures.Structure):
    structure = structures.load_structure(structure, ligand=ligand)
  elif ligand is not None:
    raise ValueError('ligand: expected None with a loaded structure')
  complex_features = featurise_alphafold3(structure, seed=seed, **options)
  if n_token is not None:
    complex_features = buckets.pad_features(complex_features, n_token=n_token)
  tokens = complex_features.tokens
  return diffusion_head.DiffusionHeadBatch.from_batch(
    {
      **alphafold3_batch(complex_features),
      'seq_mask': np.asarray(tokens.mask),
      # Padding is zero everywhere.
      **{
        name: np.where(tokens.mask, getattr(tokens, name), 0).astype(np.int32)
        for name in _TOKEN_IDS
      },
    }
  )


def _list_atoms(
  structure: structures.Structure,
  residue: int,
  in_file: range,
  conformer_seed: int | None,
) -> list[_Atom]:
  """All atoms of the component, leaving atoms included."""
  name = str(structure.component_name[residue])
  # The CCD's UNK has side chain atoms.
  layout = 'GLY' if name == 'UNK' else name
  component = chemical_components.find_component(layout)
  if component is None:
    return _list_file_atoms(structure, residue, in_file, conformer_seed)
  found = None
  if conformer_seed is not None:
    found = conformers.generated_conformer(name, conformer_seed)
  found = found or conformers.ideal_conformer(name)
  assert found is not None  # The component is in the CCD.
  centred = found.positions - found.positions.mean(axis=0)
  position = dict(zip(found.atom_names, centred, strict=True))
  source: dict[int, int] = {}
  for i in in_file:
    atom = component.match(str(structure.atom_name[i]))
    if atom is not None:
      source.setdefault(atom, i)
  return [
    _Atom(
      atom_name, element, int(charge), source.get(i, -1), position[atom_name]
    )
    for i, (atom_name, element, charge) in enumerate(
      zip(
        component.atom_names,
        component.elements,
        component.charges,
        strict=True,
      )
    )
  ]


def _list_file_atoms(
  structure: structures.Structure,
  residue: int,
  in_file: range,
  conformer_seed: int | None,
) -> list[_Atom]:
  """The atoms of a residue that the CCD does not have."""
  ref_pos = np.zeros((len(in_file), 3))
  if residue in structure.mol_blocks and conformer_seed is not None:
    found = conformers.generated_from_mol_block(
      structure.mol_blocks[residue],
      structure.position[in_file.start : in_file.stop],
      conformer_seed,
    )
    if found is not None:
      centred = found.positions - found.positions.mean(axis=0)
      ref_pos = centred[: len(in_file)]
  return [
    _Atom(
      str(structure.atom_name[i]),
      str(structure.element[i]),
      int(structure.charge[i]),
      i,
      position,
    )
    for i, position in zip(in_file, ref_pos, strict=True)
  ]


def _leaving_atoms(
  structure: structures.Structure,
  residue: int,
  in_file: range,
  chain_ends: Mapping[int, tuple[int, str]],
  standalone_glycans: str,
) -> set[str]:
  """Atoms of the component that this residue does not have."""
  kind = structure.residue_kind
  names = {str(structure.atom_name[i]) for i in in_file}
  if kind[residue] != structures.LIGAND:
    end, atom = chain_ends[int(structure.residue_chain[residue])]
    return set() if residue == end or atom in names else {atom}
  component = chemical_components.find_component(
    str(structure.component_name[residue])
  )
  if component is None or 'SACCHARIDE' not in component.kind:
    return set()
  bonded = _bonded_atoms(structure, in_file)
  if 'O1' in bonded or (standalone_glycans == 'whole' and not bonded):
    return set()
  return {'O1'}


def _chain_ends(
  structure: structures.Structure,
) -> dict[int, tuple[int, str]]:
  """Per polymer, the residue that keeps an atom all others have lost."""
  ends = {}
  polymer = structure.residue_kind != structures.LIGAND
  for chain in np.unique(structure.residue_chain[polymer]).tolist():
    rows = np.flatnonzero(polymer & (structure.residue_chain == chain)).tolist()
    nucleic = any(_is_nucleotide(structure, row) for row in rows)
    ends[chain] = (rows[0], 'OP3') if nucleic else (rows[-1], 'OXT')
  return ends


def _is_nucleotide(structure: structures.Structure, residue: int) -> bool:
  """Whether a residue of a polymer, modified or not, is one of DNA or RNA."""
  if structure.residue_kind[residue] != structures.MODIFIED:
    return bool(structure.residue_kind[residue] == structures.NUCLEIC)
  component = chemical_components.find_component(
    str(structure.component_name[residue])
  )
  return component is not None and any(
    part in component.kind for part in ('DNA LINKING', 'RNA LINKING')
  )


def _bonded_atoms(structure: structures.Structure, in_file: range) -> set[str]:
  """Names of a residue's atoms with bonds to other residues."""
  own = structure.position[in_file.start : in_file.stop]
  other = np.ones(structure.n_atom, bool)
  other[in_file.start : in_file.stop] = False
  offset = own[:, None] - structure.position[other][None]
  bonded = (np.linalg.norm(offset, axis=-1) < _MAX_BOND).any(axis=1)
  return {str(structure.atom_name[in_file[i]]) for i in np.flatnonzero(bonded)}


def _random_motion(
  random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
  """A uniform rotation and a normal translation of 1 angstrom."""
  v0, v1 = random.normal(size=(2, 3))
  e0 = v0 / np.linalg.norm(v0)
  v1 -= e0 * (e0 @ v1)
  e1 = v1 / np.linalg.norm(v1)
  return np.stack([e0, e1, np.cross(e0, e1)]), random.normal(size=3)


def _encode(
  structure: structures.Structure, residue: int, name: str
) -> list[int]:
  codes = [ord(c) - 32 for c in name]
  if len(codes) > _N_NAME_CHARS or min(codes, default=0) < 0:
    raise structures.StructureFileError(
      f'{structure.name}: atom {name!r} of {structure.residue_label(residue)}: '
      f'AlphaFold 3 encodes names of up to {_N_NAME_CHARS} characters; rename '
      'it'
    )
  return codes + [0] * (_N_NAME_CHARS - len(codes))


def _array(rows: list[Any], width: int, dtype: Any) -> np.ndarray:
  """[len(rows), width], also without rows."""
  return np.array(rows, dtype).reshape(-1, width)
