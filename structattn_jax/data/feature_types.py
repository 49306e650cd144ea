"""Typed feature batches of one complex.

Shapes: n_token tokens; n_atom heavy atoms; n_res protein tokens; all of them
with padding where a batch is padded. `features.py` fills the batches.
Units: positions in angstrom, charges in elementary charges.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from structattn_jax.data import chemical_components


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TokenFeatures:
  """One row per token, residues in the order of the file.

  Attributes:
    residue_index: [n_token] int32, position along the chain's sequence, from
      1: see `Structure.sequence_index`; 1 in ligands.
    author_index: [n_token] int32, the author's residue number: may be negative
      and may repeat; the insertion code is in the metadata's labels.
    asym_id: [n_token] int32, number of the chain, from 1. Every ligand is a
      chain of its own here, as in AF3.
    entity_id: [n_token] int32, from 1, the same for chains of equal sequences
      and for equal ligands.
    sym_id: [n_token] int32, number of the copy of its entity, from 1.
    residue_uid: [n_token] int32, running number of (chain, residue) from 0.
    chain_index: [n_token] int32 from 0, index into `metadata.chain_ids`.
    residue_type: [n_token] int32, index into `RESIDUE_TYPES`; ligands and
      modified residues are 'UNK', as in AF3.
    mask: [n_token] bool, True for real tokens, False for padding.
    is_protein: [n_token] bool, one of the 20 amino acids, MSE or UNK.
    is_nucleic: [n_token] bool, a nucleotide.
    is_ligand: [n_token] bool, an atom of a ligand, ion or glycan.
    is_modified: [n_token] bool, an atom of a modified polymer residue. Every
      real token has exactly one of the four flags.
    rotation: [n_token, 3, 3] float32, columns are the axes of the backbone
      frame; identity where `frame_mask` is False.
    translation: [n_token, 3] float32, angstrom: CA where `frame_mask` is
      True; the atom's position for ligand and modified tokens; else zero.
    frame_mask: [n_token] bool, True for protein tokens with N, CA and C.
  """

  residue_index: np.ndarray
  author_index: np.ndarray
  asym_id: np.ndarray
  entity_id: np.ndarray
  sym_id: np.ndarray
  residue_uid: np.ndarray
  chain_index: np.ndarray
  residue_type: np.ndarray
  mask: np.ndarray
  is_protein: np.ndarray
  is_nucleic: np.ndarray
  is_ligand: np.ndarray
  is_modified: np.ndarray
  rotation: np.ndarray
  translation: np.ndarray
  frame_mask: np.ndarray

  @property
  def token_index(self) -> np.ndarray:
    """[n_token] int32, from 1 over all real tokens; 0 in padding."""
    number = np.cumsum(self.mask, dtype=np.int32)
    return np.where(self.mask, number, 0).astype(np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AtomFeatures:
  """One row per heavy atom, sorted by token.

  Attributes:
    token_index: [n_atom] int32, non-decreasing.
    dense_slot: [n_atom] int32, place in AF3's dense layout of 24 slots per
      token: that of the atom in the component, 0 for atom tokens.
    mask: [n_atom] bool, True for real atoms, False for padding.
    position: [n_atom, 3] float32, angstrom, as in the file.
    position_mask: [n_atom] bool, True where the file has a position.
    ref_pos: [n_atom, 3] float32, angstrom, the CCD's ideal coordinates with
      mean zero over the atoms of the residue that have `ref_mask`.
    ref_mask: [n_atom] bool, True where the CCD has the atom.
    ref_element: [n_atom] int32, atomic number, 0 if unknown.
    ref_charge: [n_atom] float32, formal charge of the CCD; of the file for
      atoms which the CCD does not have.
    ref_atom_name_chars: [n_atom, 4] int32, ord(c) - 32 in upper case,
      right-padded with 0; longer names are cut (AF3 raises).
    ref_space_uid: [n_atom] int32, the token's `residue_uid`.
  """

  token_index: np.ndarray
  dense_slot: np.ndarray
  mask: np.ndarray
  position: np.ndarray
  position_mask: np.ndarray
  ref_pos: np.ndarray
  ref_mask: np.ndarray
  ref_element: np.ndarray
  ref_charge: np.ndarray
  ref_atom_name_chars: np.ndarray
  ref_space_uid: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class ProteinSequence:
  """The resolved residues of one protein chain.

  Attributes:
    chain_id: name of the chain.
    sequence: one letter per residue; a modified residue has the letter of its
      parent, 'X' if unknown. Residues missing in the file are left out.
    token_ids: [n_res + 2] int32, the sequence between <cls> and <eos> in the
      alphabet of `ProteinTokenizer`.
    token_index: [n_res] int32, first token of each residue.
    residue_id: [n_res] int32, the author's residue numbers.
  """

  chain_id: str
  sequence: str
  token_ids: np.ndarray
  token_index: np.ndarray
  residue_id: np.ndarray


@dataclasses.dataclass(frozen=True)
class LigandEntry:
  """One ligand, ion or sugar; its tokens are token_start + range(n_token).

  Attributes:
    chain_id: name of the chain.
    residue_name: the code in the file.
    residue_id: the author's residue number.
    token_start: index of the first token.
    n_token: number of tokens, which is the number of heavy atoms.
  """

  chain_id: str
  residue_name: str
  residue_id: int
  token_start: int
  n_token: int


@dataclasses.dataclass(frozen=True, eq=False)
class ComplexMetadata:
  """Text about a complex; lives on the host only.

  Attributes:
    name: name of the structure.
    chain_ids: one name per chain, `tokens.chain_index` points here.
    residue_labels: one text such as 'A:SER52A' per residue,
      `tokens.residue_uid` points here.
    sequences: one per chain with protein residues.
    ligands: one per ligand residue, in the order of `ligand_smiles`.
  """

  name: str
  chain_ids: tuple[str, ...]
  residue_labels: tuple[str, ...]
  sequences: tuple[ProteinSequence, ...]
  ligands: tuple[LigandEntry, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class ComplexFeatures:
  """All features of one complex; a JAX pytree of its arrays.

  Attributes:
    tokens: one row per token.
    atoms: one row per heavy atom.
    metadata: text. Not part of the pytree, so that complexes of one padded
      size share one compilation: JAX transformations return None here.
  """

  tokens: TokenFeatures
  atoms: AtomFeatures
  metadata: ComplexMetadata | None = None

  @property
  def n_token(self) -> int:
    """Number of tokens, padding included."""
    return self.tokens.mask.shape[0]

  @property
  def n_atom(self) -> int:
    """Number of atoms, padding included."""
    return self.atoms.mask.shape[0]


jax.tree_util.register_dataclass(
  ComplexFeatures,
  data_fields=['tokens', 'atoms'],
  meta_fields=[],
  drop_fields=['metadata'],
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ProteinFeatures:
  """The protein tokens alone: what invariant point attention needs.

  Attributes:
    residue_type: [n_res] int32 in [0, 20], `RESIDUE_TYPES` and AF2's order.
    residue_index: [n_res] int32, position along the chain's sequence, from 1.
    author_index: [n_res] int32, the author's residue number.
    chain_index: [n_res] int32 from 0.
    mask: [n_res] bool, all True.
    rotation: [n_res, 3, 3] float32, columns are the axes of the frame.
    translation: [n_res, 3] float32, angstrom.
    frame_mask: [n_res] bool, False where a backbone atom is missing.
    token_index: [n_res] int32, row in the complex's tokens.
  """

  residue_type: np.ndarray
  residue_index: np.ndarray
  author_index: np.ndarray
  chain_index: np.ndarray
  mask: np.ndarray
  rotation: np.ndarray
  translation: np.ndarray
  frame_mask: np.ndarray
  token_index: np.ndarray

  @property
  def sequence(self) -> str:
    """One letter per protein token, 'X' for unknown; chains joined."""
    letters = chemical_components.AMINO_ACID_LETTERS + 'X'
    return ''.join(letters[i] for i in np.asarray(self.residue_type).tolist())
