"""Metrics of generated ligands and proteins."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from structattn_jax.data import chemical_components

_LETTERS = chemical_components.AMINO_ACID_LETTERS


@dataclasses.dataclass(frozen=True)
class LigandMetrics:
  """Shares of generated SMILES, each in [0, 1].

  Attributes:
    validity: share of all that RDKit reads and finds chemically possible.
    uniqueness: share of distinct molecules among the valid ones.
    novelty: share of the distinct ones that are not in the training set; None
      without one.
    canonical: canonical SMILES of each, None where invalid.
  """

  validity: float
  uniqueness: float
  novelty: float | None
  canonical: tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class ProteinMetrics:
  """Shares of generated sequences, each in [0, 1].

  Attributes:
    validity: share of all that are not empty and hold the 20 amino acids only.
    uniqueness: share of distinct sequences among the valid ones.
    novelty: share of the distinct ones that are not in the training set; None
      without one.
    composition: share of each of the 20 amino acids among all of them.
    mean_length: mean number of characters.
  """

  validity: float
  uniqueness: float
  novelty: float | None
  composition: Mapping[str, float]
  mean_length: float


def ligand_metrics(
  smiles: Sequence[str], training: Iterable[str] | None = None
) -> LigandMetrics:
  """Validity, uniqueness and novelty of molecules.

  Args:
    smiles: generated SMILES.
    training: SMILES of the training set; None gives no novelty.

  Returns:
    The metrics; a share of nothing is 0.

  Raises:
    ImportError: if RDKit is not installed, naming the extra.
  """
  canonical = tuple(canonical_smiles(text) for text in smiles)
  valid = [text for text in canonical if text is not None]
  known = None
  if training is not None:
    known = {canonical_smiles(text) for text in training}
  return LigandMetrics(
    validity=_share(len(valid), len(smiles)),
    uniqueness=_share(len(set(valid)), len(valid)),
    novelty=_novelty(set(valid), known),
    canonical=canonical,
  )


def protein_metrics(
  sequences: Sequence[str], training: Iterable[str] | None = None
) -> ProteinMetrics:
  """Validity, uniqueness, novelty and composition of sequences.

  Args:
    sequences: generated sequences in one-letter code.
    training: sequences of the training set; None gives no novelty.

  Returns:
    The metrics; a share of nothing is 0.
  """
  valid = [text for text in sequences if text and set(text) <= {*_LETTERS}]
  counts = collections.Counter(''.join(sequences))
  total = sum(counts[letter] for letter in _LETTERS)
  return ProteinMetrics(
    validity=_share(len(valid), len(sequences)),
    uniqueness=_share(len(set(valid)), len(valid)),
    novelty=_novelty(set(valid), None if training is None else {*training}),
    composition={letter: _share(counts[letter], total) for letter in _LETTERS},
    mean_length=_share(sum(map(len, sequences)), len(sequences)),
  )


def canonical_smiles(smiles: str) -> str | None:
  """Canonical SMILES, or None if the text is no molecule.

  Raises:
    ImportError: if RDKit is not installed, naming the extra.
  """
  chem = chemical_components.require_rdkit()
  from rdkit import rdBase

  with rdBase.BlockLogs():
    molecule = chem.MolFromSmiles(smiles) if smiles else None
  return chem.MolToSmiles(molecule) if molecule is not None else None


def _share(part: float, whole: int) -> float:
  return part / whole if whole else 0.0


def _novelty(distinct: set[str], known: set | None) -> float | None:
  if known is None:
    return None
  return _share(len(distinct - known), len(distinct))
