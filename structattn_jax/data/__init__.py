"""Structure files to feature batches, tokenisers, padding, example files.

Importing this package needs NumPy and JAX alone. Reading structures imports
biotite (extra `data`), SMILES import RDKit (extra `chem`), each on first use.
"""

from __future__ import annotations

import importlib.resources
import pathlib
from typing import NamedTuple

from structattn_jax.data.alphafold3 import (
  alphafold3_batch,
  alphafold3_head_batch,
  alphafold3_windows,
  featurise_alphafold3,
)
from structattn_jax.data.boltz import boltz_atom_features
from structattn_jax.data.buckets import (
  DEFAULT_ATOM_BUCKETS,
  DEFAULT_TOKEN_BUCKETS,
  choose_bucket,
  pad_features,
)
from structattn_jax.data.chemical_components import (
  AMINO_ACID_LETTERS,
  RESIDUE_TYPES,
)
from structattn_jax.data.feature_types import (
  AtomFeatures,
  ComplexFeatures,
  ComplexMetadata,
  LigandEntry,
  ProteinFeatures,
  ProteinSequence,
  TokenFeatures,
)
from structattn_jax.data.features import (
  atom_order,
  featurise,
  protein_only,
)
from structattn_jax.data.protein_ligand import (
  EncodedPairs,
  EncodingReport,
  PairFileError,
  ProteinLigandPair,
  bundled_pairs,
  encode_pairs,
  read_pairs,
)
from structattn_jax.data.sedd import (
  PairBatches,
  cover_pairs,
  pad_tokens,
)
from structattn_jax.data.structure_writer import mmcif_text, write_mmcif
from structattn_jax.data.structures import (
  LigandSmiles,
  Structure,
  StructureFileError,
  ligand_smiles,
  load_structure,
)
from structattn_jax.data.tokenizers import (
  PROTEIN_ALPHABET,
  ProteinTokenizer,
  SmilesTokenizer,
)

__all__ = (
  'AMINO_ACID_LETTERS',
  'DEFAULT_ATOM_BUCKETS',
  'DEFAULT_TOKEN_BUCKETS',
  'PROTEIN_ALPHABET',
  'RESIDUE_TYPES',
  'AtomFeatures',
  'ComplexFeatures',
  'ComplexMetadata',
  'EncodedPairs',
  'EncodingReport',
  'ExampleFiles',
  'LigandEntry',
  'LigandSmiles',
  'PairBatches',
  'PairFileError',
  'ProteinFeatures',
  'ProteinLigandPair',
  'ProteinSequence',
  'ProteinTokenizer',
  'SmilesTokenizer',
  'Structure',
  'StructureFileError',
  'TokenFeatures',
  'alphafold3_batch',
  'alphafold3_head_batch',
  'alphafold3_windows',
  'atom_order',
  'boltz_atom_features',
  'bundled_pairs',
  'choose_bucket',
  'cover_pairs',
  'encode_pairs',
  'example',
  'featurise',
  'featurise_alphafold3',
  'ligand_smiles',
  'load_structure',
  'mmcif_text',
  'pad_features',
  'pad_tokens',
  'protein_only',
  'read_pairs',
  'write_mmcif',
)

_EXAMPLES = {
  '1s3v': ('1s3v.pdb', '1s3v_TQD.sdf'),
  '1tqh': ('1tqh.cif.gz', None),
}


class ExampleFiles(NamedTuple):
  """Paths of a bundled structure.

  Attributes:
    structure: a PDB or mmCIF file.
    ligand: an SDF file, or None if the structure file holds the ligand.
  """

  structure: pathlib.Path
  ligand: pathlib.Path | None


def example(name: str) -> ExampleFiles:
  """Paths of a structure that comes with the package.

  Args:
    name: '1s3v' (human DHFR with the inhibitor TQD) or '1tqh' (esterase with
      propyl acetate and sulfates).

  Returns:
    The paths, for `load_structure(files.structure, ligand=files.ligand)`.

  Raises:
    ValueError: if there is no such example, listing the names.
  """
  if name.lower() not in _EXAMPLES:
    raise ValueError(
      f'name: no example {name!r}; there are {", ".join(sorted(_EXAMPLES))}'
    )
  folder = importlib.resources.files('structattn_jax.data') / 'examples'
  folder = pathlib.Path(str(folder))
  structure, ligand = _EXAMPLES[name.lower()]
  return ExampleFiles(
    folder / structure, None if ligand is None else folder / ligand
  )
