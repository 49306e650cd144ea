"""Feature batches: tokens, atoms, backbone frames, reference conformers.

Tokens and reference features follow Abramson et al. (2024), Suppl. 2.6 and
2.8: one token per amino acid or nucleotide, one per heavy atom of ligands and
of modified residues. Frames follow Jumper et al. (2021), Suppl. Alg. 21, with
CA as origin and C on the x axis, as AF2's `rigids_from_3_points(N, CA, C)`.

Differs from AF3, whose own rules are in `alphafold3.py`:
  * Only atoms in the file are listed; AF3 lists those of the sequence.
  * `ref_pos` is the CCD's ideal conformer, centred on the listed heavy atoms
    of the residue, without random rotation and translation: deterministic.

Shapes: n_token tokens; n_atom heavy atoms; n_res protein tokens.
Units: positions in angstrom, charges in elementary charges.
"""

from __future__ import annotations

import collections
from typing import Any

import numpy as np

from structattn_jax.data import chemical_components, structures, tokenizers
from structattn_jax.data.feature_types import (
  AtomFeatures,
  ComplexFeatures,
  ComplexMetadata,
  LigandEntry,
  ProteinFeatures,
  ProteinSequence,
  TokenFeatures,
)

_MIN_NORM = 1e-3  # Angstrom; below it three atoms span no plane.
_N_NAME_CHARS = 4


def featurise(
  structure: structures.Structure, *, require_protein: bool = True
) -> ComplexFeatures:
  """Turns a structure into features, unpadded.

  Atoms of a residue follow the order of the CCD's component, atoms that the
  component lacks come last. Residues without a component keep the order,
  names, elements and charges of the file with `ref_mask` False.

  Args:
    structure: a loaded structure.
    require_protein: whether a structure without protein is an error.

  Returns:
    NumPy features; `pad_features` brings them to a bucket.

  Raises:
    StructureFileError: if there is no protein residue and one is required.
    ImportError: if biotite is not installed, naming the extra.
  """
  kind = structure.residue_kind
  if require_protein and not (kind == structures.PROTEIN).any():
    raise structures.StructureFileError(
      f'{structure.name}: no protein residues among {structure.n_residue} '
      'residue(s); give a file with a protein, or pass require_protein=False'
    )
  reference = _reference_rows(structure)
  order = reference.pop('order')
  atom_residue = structure.atom_residue[order]
  reference['ref_pos'] = _centred(
    reference['ref_pos'],
    reference['ref_mask'],
    atom_residue,
    structure.n_residue,
  )
  return assemble(structure, order, atom_residue, **reference)


def assemble(
  structure: structures.Structure,
  source: np.ndarray,
  atom_residue: np.ndarray,
  **atom_features: np.ndarray,
) -> ComplexFeatures:
  """Makes tokens of atoms that are listed already.

  Args:
    structure: where they are from.
    source: [n_atom] integer, atom of the structure; -1 if it is not there.
    atom_residue: [n_atom] integer, its residue, non-decreasing.
    **atom_features: `dense_slot` and all `ref_...` of `AtomFeatures` except
      `ref_space_uid`.

  Returns:
    NumPy features.
  """
  kind = structure.residue_kind
  # Residue tokens start at the first atom of the residue, atom tokens at
  # every atom; the running sum of the starts is the token index.
  whole = is_residue_token(structure)
  new_residue = np.diff(atom_residue, prepend=-1) != 0
  starts = new_residue | ~whole[atom_residue]
  token_residue = atom_residue[starts]

  known = source >= 0
  position = np.zeros((len(source), 3))
  position[known] = structure.position[source[known]]
  atoms = AtomFeatures(
    token_index=(np.cumsum(starts) - 1).astype(np.int32),
    mask=np.ones(len(source), dtype=bool),
    position=position.astype(np.float32),
    position_mask=known,
    ref_space_uid=atom_residue.astype(np.int32),
    **atom_features,
  )
  rotation, translation, frame_mask = _backbone_frames(structure)
  token_kind = kind[token_residue]
  is_atom = ~whole[token_residue]
  token_translation = translation[token_residue]
  token_translation[is_atom] = position[starts][is_atom]
  type_index = {
    name: i for i, name in enumerate(chemical_components.RESIDUE_TYPES)
  }
  type_index['DN'] = type_index['N']
  unknown = chemical_components.UNKNOWN_RESIDUE_TYPE
  residue_type = np.array(
    [
      type_index[name] if is_whole else unknown
      for name, is_whole in zip(
        structure.component_name.tolist(), whole.tolist(), strict=True
      )
    ],
    dtype=np.int32,
  )
  asym_id, entity_id, sym_id = _chain_ids(structure)
  tokens = TokenFeatures(
    residue_index=structure.sequence_index[token_residue].astype(np.int32),
    author_index=structure.residue_id[token_residue].astype(np.int32),
    asym_id=asym_id[token_residue],
    entity_id=entity_id[token_residue],
    sym_id=sym_id[token_residue],
    residue_uid=token_residue.astype(np.int32),
    chain_index=structure.residue_chain[token_residue].astype(np.int32),
    residue_type=residue_type[token_residue],
    mask=np.ones(len(token_residue), dtype=bool),
    is_protein=token_kind == structures.PROTEIN,
    is_nucleic=token_kind == structures.NUCLEIC,
    is_ligand=token_kind == structures.LIGAND,
    is_modified=token_kind == structures.MODIFIED,
    rotation=rotation[token_residue].astype(np.float32),
    translation=token_translation.astype(np.float32),
    frame_mask=frame_mask[token_residue],
  )
  return ComplexFeatures(
    tokens=tokens,
    atoms=atoms,
    metadata=_metadata(structure, token_residue),
  )


def _chain_ids(
  structure: structures.Structure,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """asym_id, entity_id and sym_id of all residues, see `TokenFeatures`."""
  ligand = structure.residue_kind == structures.LIGAND
  chains: dict[tuple[int, int], list[int]] = {}
  for residue, chain in enumerate(structure.residue_chain.tolist()):
    own = residue if ligand[residue] else -1
    chains.setdefault((chain, own), []).append(residue)
  ids = np.zeros((3, structure.n_residue), np.int32)
  entities: dict[tuple[str, ...], int] = {}
  copies: collections.Counter[int] = collections.Counter()
  for asym, residues in enumerate(chains.values(), start=1):
    # The code of the file where the CCD has no such molecule.
    names = np.where(
      structure.component_name[residues] == '',
      structure.residue_name[residues],
      structure.component_name[residues],
    )
    kind = structures.LIGAND if ligand[residues[0]] else 'polymer'
    entity = entities.setdefault((kind, *names.tolist()), len(entities) + 1)
    copies[entity] += 1
    ids[:, residues] = [[asym], [entity], [copies[entity]]]
  return ids[0], ids[1], ids[2]


def is_residue_token(structure: structures.Structure) -> np.ndarray:
  """[n_residue] bool: one token for the residue, not one for each atom."""
  return np.isin(
    structure.residue_kind, (structures.PROTEIN, structures.NUCLEIC)
  )


def protein_only(features: ComplexFeatures) -> ProteinFeatures:
  """The protein tokens of a complex, in their order; padding is dropped.

  Args:
    features: features of a complex, padded or not, with concrete arrays.

  Returns:
    Frames and residue types; modified residues are not included, they have
    no frame.
  """
  tokens = features.tokens
  rows = np.flatnonzero(np.asarray(tokens.is_protein))
  return ProteinFeatures(
    residue_type=np.asarray(tokens.residue_type)[rows],
    residue_index=np.asarray(tokens.residue_index)[rows],
    author_index=np.asarray(tokens.author_index)[rows],
    chain_index=np.asarray(tokens.chain_index)[rows],
    mask=np.asarray(tokens.mask)[rows],
    rotation=np.asarray(tokens.rotation)[rows],
    translation=np.asarray(tokens.translation)[rows],
    frame_mask=np.asarray(tokens.frame_mask)[rows],
    token_index=rows.astype(np.int32),
  )


def _reference_rows(structure: structures.Structure) -> dict[str, Any]:
  """Reference features per atom, and the order of the atoms."""
  n_atom = structure.n_atom
  bounds = np.searchsorted(
    structure.atom_residue, np.arange(structure.n_residue + 1)
  ).tolist()
  names = structure.atom_name.tolist()
  elements = structure.element.tolist()
  file_charge = structure.charge.tolist()
  order = np.arange(n_atom)
  ref_pos = np.zeros((n_atom, 3))
  ref_mask = np.zeros(n_atom, dtype=bool)
  ref_element = np.zeros(n_atom, dtype=np.int32)
  ref_charge = np.zeros(n_atom, dtype=np.float32)
  name_chars = np.zeros((n_atom, _N_NAME_CHARS), dtype=np.int32)
  dense_slot = np.zeros(n_atom, dtype=np.int32)
  whole = is_residue_token(structure)
  for residue, component_name in enumerate(structure.component_name.tolist()):
    component = chemical_components.find_component(component_name)
    start, stop = bounds[residue], bounds[residue + 1]
    matched = _match_atoms(component, names[start:stop])
    # Stable, so atoms which the component lacks keep the file's order.
    local = sorted(range(stop - start), key=lambda i, m=matched: m[i])
    for row, i in enumerate(local, start=start):
      source, atom = start + i, matched[i]
      order[row] = source
      if component is not None and atom < len(component.atom_names):
        name = component.atom_names[atom]
        element = component.elements[atom]
        ref_charge[row] = component.charges[atom]
        ref_pos[row] = component.positions[atom]
        ref_mask[row] = np.isfinite(component.positions[atom]).all()
      else:
        name, element = names[source], elements[source]
        ref_charge[row] = file_charge[source]
      ref_element[row] = chemical_components.ATOMIC_NUMBERS.get(element, 0)
      name_chars[row] = _encode_name(name)
      if whole[residue]:  # Atoms that the component lacks come behind it.
        before = dense_slot[row - 1] + 1 if row > start else 0
        dense_slot[row] = max(atom, before)
  return {
    'order': order,
    'dense_slot': dense_slot,
    'ref_pos': ref_pos,
    'ref_mask': ref_mask,
    'ref_element': ref_element,
    'ref_charge': ref_charge,
    'ref_atom_name_chars': name_chars,
  }


def _match_atoms(
  component: chemical_components.Component | None, names: list[str]
) -> list[int]:
  """Index in the component per atom; past its end if it lacks the atom."""
  if component is None:
    return [0] * len(names)
  missing = len(component.atom_names)
  result, used = [], set()
  for name in names:
    atom = component.match(name)
    if atom is None or atom in used:
      result.append(missing)
    else:
      used.add(atom)
      result.append(atom)
  return result


def _encode_name(name: str) -> list[int]:
  chars = name.upper()[:_N_NAME_CHARS].ljust(_N_NAME_CHARS)
  return [ord(c) - 32 if ' ' <= c <= '_' else ord('?') - 32 for c in chars]


def _centred(
  ref_pos: np.ndarray,
  ref_mask: np.ndarray,
  atom_residue: np.ndarray,
  n_residue: int,
) -> np.ndarray:
  """Subtracts each residue's mean; zeros where there is no reference."""
  known = np.where(ref_mask[:, None], ref_pos, 0.0)
  count = np.bincount(atom_residue, weights=ref_mask, minlength=n_residue)
  total = np.stack(
    [
      np.bincount(atom_residue, weights=known[:, axis], minlength=n_residue)
      for axis in range(3)
    ],
    axis=-1,
  )
  mean = total / np.maximum(count, 1.0)[:, None]
  centred = known - mean[atom_residue]
  return np.where(ref_mask[:, None], centred, 0.0).astype(np.float32)


def _backbone_frames(
  structure: structures.Structure,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Frames of all residues in float64; identity where there is none.

  Returns:
    rotation [n_residue, 3, 3], translation [n_residue, 3], mask [n_residue].
  """
  n_residue = structure.n_residue

  def locate(atom_name: str) -> np.ndarray:
    result = np.full((n_residue, 3), np.nan)
    rows = np.flatnonzero(structure.atom_name == atom_name)
    result[structure.atom_residue[rows]] = structure.position[rows]
    return result

  n, ca, c = locate('N'), locate('CA'), locate('C')
  with np.errstate(invalid='ignore', divide='ignore'):
    to_c, to_n = c - ca, n - ca
    length_c = np.linalg.norm(to_c, axis=-1, keepdims=True)
    e0 = to_c / length_c
    normal = to_n - np.sum(e0 * to_n, axis=-1, keepdims=True) * e0
    length_n = np.linalg.norm(normal, axis=-1, keepdims=True)
    e1 = normal / length_n
    # NaN, a missing atom, compares as False.
    spans_plane = (length_c > _MIN_NORM) & (length_n > _MIN_NORM)
  mask = (structure.residue_kind == structures.PROTEIN) & spans_plane[:, 0]
  rotation = np.stack([e0, e1, np.cross(e0, e1)], axis=-1)
  rotation = np.where(mask[:, None, None], rotation, np.eye(3))
  translation = np.where(mask[:, None], ca, 0.0)
  return rotation, translation, mask


def _metadata(
  structure: structures.Structure, token_residue: np.ndarray
) -> ComplexMetadata:
  n_residue = structure.n_residue
  kinds = structure.residue_kind.tolist()
  first = np.searchsorted(token_residue, np.arange(n_residue + 1))
  letters: dict[int, list[str]] = {}
  residues: dict[int, list[int]] = {}
  for residue, component_name in enumerate(structure.component_name.tolist()):
    letter = _protein_letter(kinds[residue], component_name)
    if letter:
      chain = int(structure.residue_chain[residue])
      letters.setdefault(chain, []).append(letter)
      residues.setdefault(chain, []).append(residue)
  sequences = []
  tokenizer = tokenizers.ProteinTokenizer()
  for chain in sorted(letters):
    # Modified residues alone, a bound peptide aldehyde say, are no protein.
    if not any(kinds[r] == structures.PROTEIN for r in residues[chain]):
      continue
    sequence = ''.join(letters[chain])
    sequences.append(
      ProteinSequence(
        chain_id=structure.chain_ids[chain],
        sequence=sequence,
        token_ids=tokenizer.encode(sequence),
        token_index=first[residues[chain]].astype(np.int32),
        residue_id=structure.residue_id[residues[chain]],
      )
    )
  ligands = tuple(
    LigandEntry(
      chain_id=structure.chain_ids[structure.residue_chain[residue]],
      residue_name=str(structure.residue_name[residue]),
      residue_id=int(structure.residue_id[residue]),
      token_start=int(first[residue]),
      n_token=int(first[residue + 1] - first[residue]),
    )
    for residue in range(n_residue)
    if kinds[residue] == structures.LIGAND
  )
  return ComplexMetadata(
    name=structure.name,
    chain_ids=structure.chain_ids,
    residue_labels=tuple(structure.residue_label(r) for r in range(n_residue)),
    sequences=tuple(sequences),
    ligands=ligands,
  )


def _protein_letter(kind: str, component_name: str) -> str:
  """Letter of a protein residue, '' for anything else."""
  if kind == structures.PROTEIN:
    if component_name == 'UNK':
      return 'X'
    index = chemical_components.AMINO_ACIDS.index(component_name)
    return chemical_components.AMINO_ACID_LETTERS[index]
  if kind == structures.MODIFIED:
    component = chemical_components.find_component(component_name)
    if component is None:
      return 'X'
    if 'PEPTIDE LINKING' in component.kind:
      return component.letter or 'X'
  return ''
