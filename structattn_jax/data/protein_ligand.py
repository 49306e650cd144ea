"""Pairs of a protein sequence and a ligand SMILES: files, tokens, reports.

  pairs = read_pairs('pairs.parquet', split='train')
  encoded, report = encode_pairs(pairs, ProteinTokenizer(), tokenizer)

A row may lack one of the two: a ligand without protein serves the mode
`ligand_only`, a protein without ligand `protein_only`.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import importlib.resources
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from structattn_jax.data import tokenizers

# The first of these that a file has is taken: ours, those of the fork's data
# loader, those of PLINDER's tables.
NAME_COLUMNS = ('system_id', 'name', 'entry_pdb_id', 'pdb_id')
SEQUENCE_COLUMNS = (
  'protein_sequence',
  'protein_seq',
  'sequence',
  'target_sequence',
)
SMILES_COLUMNS = (
  'ligand_smiles',
  'ligand_rdkit_canonical_smiles',
  'smiles',
  'canonical_smiles',
)
SPLIT_COLUMN = 'split'


class PairFileError(ValueError):
  """A table of pairs is missing, unreadable, or lacks what is needed."""


@dataclasses.dataclass(frozen=True)
class ProteinLigandPair:
  """One row of a table.

  Attributes:
    name: what messages call it.
    sequence: one-letter amino acids; '' if there is no protein.
    smiles: the ligand; '' if there is none.
  """

  name: str
  sequence: str
  smiles: str


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedPairs:
  """Token ids of pairs, with start and end tokens, unpadded.

  Attributes:
    names: n_pair names.
    protein: n_pair arrays [n_token] int32; empty where there is no protein.
    ligand: n_pair arrays [n_token] int32; empty where there is no ligand.
    protein_pad: id that pads proteins.
    ligand_pad: id that pads ligands.
  """

  names: tuple[str, ...]
  protein: tuple[np.ndarray, ...]
  ligand: tuple[np.ndarray, ...]
  protein_pad: int
  ligand_pad: int

  def __len__(self) -> int:
    """Number of pairs."""
    return len(self.names)

  def select(self, rows: Sequence[int]) -> EncodedPairs:
    """The pairs with these indices."""
    return dataclasses.replace(
      self,
      names=tuple(self.names[i] for i in rows),
      protein=tuple(self.protein[i] for i in rows),
      ligand=tuple(self.ligand[i] for i in rows),
    )


@dataclasses.dataclass(frozen=True)
class EncodingReport:
  """What `encode_pairs` could not keep as it was.

  Attributes:
    n_pair: number of pairs kept.
    unknown_protein: letters that became <unk>, with their counts.
    unknown_ligand: SMILES tokens that became <unk>, with their counts.
    too_long: names of the pairs dropped for their length.
    unreadable: names of the pairs dropped because their SMILES cannot be
      split, with the reason.
  """

  n_pair: int
  unknown_protein: Mapping[str, int]
  unknown_ligand: Mapping[str, int]
  too_long: tuple[str, ...]
  unreadable: Mapping[str, str]

  def lines(self) -> list[str]:
    """One sentence per finding; empty if everything was kept."""
    found = []
    for track, counts in (
      ('protein', self.unknown_protein),
      ('ligand', self.unknown_ligand),
    ):
      if counts:
        listed = ', '.join(f'{t!r} ({n})' for t, n in counts.items())
        found.append(f'unknown {track} tokens became <unk>: {listed}')
    if self.too_long:
      found.append(f'{len(self.too_long)} too long: {_some(self.too_long)}')
    if self.unreadable:
      first, reason = next(iter(self.unreadable.items()))
      found.append(
        f'{len(self.unreadable)} with unreadable SMILES, for instance {first}: '
        f'{reason}'
      )
    return found


def bundled_pairs() -> tuple[ProteinLigandPair, ...]:
  """The small real set that comes with the package.

  10 complexes of the Protein Data Bank and 246 ligands without protein from
  the chemical component dictionary; `data/examples/PROVENANCE.md` says how
  they were chosen.

  Returns:
    The pairs, those with a protein first.
  """
  folder = importlib.resources.files('structattn_jax.data') / 'examples'
  return read_pairs(
    pathlib.Path(str(folder / 'protein_ligand_pairs.csv')),
  )


def read_pairs(
  path: str | os.PathLike[str],
  *,
  sequence_column: str | None = None,
  smiles_column: str | None = None,
  name_column: str | None = None,
  split: str | None = None,
) -> tuple[ProteinLigandPair, ...]:
  """Reads a CSV or Parquet table.

  Args:
    path: a `.parquet` file (needs the extra `parquet`); anything else is read
      as CSV with a header.
    sequence_column: None takes the first of `SEQUENCE_COLUMNS`.
    smiles_column: None takes the first of `SMILES_COLUMNS`.
    name_column: None takes the first of `NAME_COLUMNS`, else the row number.
    split: keep the rows with this value in the column `split`; None keeps all.

  Returns:
    The rows in file order, surrounding blanks removed.

  Raises:
    PairFileError: if the file cannot be read, a column is missing, a row has
      neither sequence nor SMILES, or nothing is left.
    ImportError: on Parquet without pyarrow, naming the extra.
  """
  path = pathlib.Path(path)
  is_parquet = path.suffix.lower() in ('.parquet', '.pq')
  try:
    header = _parquet_header(path) if is_parquet else _csv_header(path)
    column = functools.partial(_column, path, header)
    sequence = column('sequence', sequence_column, SEQUENCE_COLUMNS)
    smiles = column('SMILES', smiles_column, SMILES_COLUMNS)
    if sequence is None and smiles is None:
      raise PairFileError(
        f'{path}: no column of sequences ({", ".join(SEQUENCE_COLUMNS)}) and '
        f'none of SMILES ({", ".join(SMILES_COLUMNS)}); the columns are '
        f'{", ".join(header)}'
      )
    name = column('names', name_column, NAME_COLUMNS)
    wanted = [c for c in (name, sequence, smiles) if c is not None]
    if split is not None:
      if SPLIT_COLUMN not in header:
        raise PairFileError(
          f'{path}: split={split!r} needs a column {SPLIT_COLUMN!r}; the '
          f'columns are {", ".join(header)}'
        )
      wanted.append(SPLIT_COLUMN)
    rows = _parquet_rows(path, wanted) if is_parquet else _csv_rows(path)
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise PairFileError(f'{path}: cannot be read: {error}') from None
  pairs = []
  for number, row in enumerate(rows, start=1):
    if split is not None and row[SPLIT_COLUMN] != split:
      continue
    cell = {c: (row[c] or '').strip() for c in wanted}
    pair = ProteinLigandPair(
      name=(cell[name] if name else '') or f'row {number}',
      sequence=cell[sequence] if sequence else '',
      smiles=cell[smiles] if smiles else '',
    )
    if not pair.sequence and not pair.smiles:
      raise PairFileError(
        f'{path}: row {number} has neither a sequence nor SMILES'
      )
    pairs.append(pair)
  if not pairs:
    what = '' if split is None else f' of the split {split!r}'
    raise PairFileError(f'{path}: no rows{what}')
  return tuple(pairs)


def encode_pairs(
  pairs: Iterable[ProteinLigandPair],
  protein_tokenizer: tokenizers.ProteinTokenizer,
  smiles_tokenizer: tokenizers.SmilesTokenizer,
  *,
  max_protein: int,
  max_ligand: int,
) -> tuple[EncodedPairs, EncodingReport]:
  """Turns pairs into token ids and reports what was lost.

  Args:
    pairs: rows of a table.
    protein_tokenizer: splits and numbers sequences.
    smiles_tokenizer: splits and numbers SMILES.
    max_protein: longest protein to keep, in tokens with <cls> and <eos>.
    max_ligand: longest ligand to keep, in tokens with <bos> and <eos>.

  Returns:
    The pairs that fit, in order, and the report.

  Raises:
    ValueError: if nothing is left.
  """
  names: list[str] = []
  proteins: list[np.ndarray] = []
  ligands: list[np.ndarray] = []
  unknown_protein: collections.Counter[str] = collections.Counter()
  unknown_ligand: collections.Counter[str] = collections.Counter()
  too_long: list[str] = []
  unreadable: dict[str, str] = {}
  empty = np.zeros(0, np.int32)
  for pair in pairs:
    try:
      ligand_tokens = smiles_tokenizer.split(pair.smiles)
    except ValueError as error:
      unreadable[pair.name] = str(error).splitlines()[0]
      continue
    protein_tokens = protein_tokenizer.split(pair.sequence)
    if (
      len(protein_tokens) + 2 > max_protein
      or len(ligand_tokens) + 2 > max_ligand
    ):
      too_long.append(pair.name)
      continue
    _count_unknown(unknown_protein, protein_tokens, protein_tokenizer)
    _count_unknown(unknown_ligand, ligand_tokens, smiles_tokenizer)
    names.append(pair.name)
    proteins.append(
      protein_tokenizer.encode(pair.sequence) if pair.sequence else empty
    )
    ligands.append(
      smiles_tokenizer.encode(pair.smiles) if pair.smiles else empty
    )
  report = EncodingReport(
    n_pair=len(names),
    unknown_protein=dict(unknown_protein.most_common()),
    unknown_ligand=dict(unknown_ligand.most_common()),
    too_long=tuple(too_long),
    unreadable=unreadable,
  )
  if not names:
    raise ValueError(
      'pairs: none is left; ' + ('; '.join(report.lines()) or 'none was given')
    )
  encoded = EncodedPairs(
    names=tuple(names),
    protein=tuple(proteins),
    ligand=tuple(ligands),
    protein_pad=protein_tokenizer.pad_id,
    ligand_pad=smiles_tokenizer.pad_id,
  )
  return encoded, report


def _count_unknown(
  counter: collections.Counter[str],
  tokens: Sequence[str],
  tokenizer: tokenizers.ProteinTokenizer | tokenizers.SmilesTokenizer,
) -> None:
  known = tokenizer.vocabulary
  counter.update(token for token in tokens if token not in known)


def _column(
  path: pathlib.Path,
  header: Sequence[str],
  what: str,
  given: str | None,
  known: Sequence[str],
) -> str | None:
  if given is None:
    return next((name for name in known if name in header), None)
  if given not in header:
    raise PairFileError(
      f'{path}: no column {given!r} for {what}; the columns are '
      f'{", ".join(header)}'
    )
  return given


def _csv_header(path: pathlib.Path) -> list[str]:
  with path.open(newline='', encoding='utf-8-sig') as file:
    return [name.strip() for name in next(csv.reader(file), [])]


def _csv_rows(path: pathlib.Path) -> list[dict[str, str]]:
  rows = []
  with path.open(newline='', encoding='utf-8-sig') as file:
    reader = csv.reader(file)
    header = [name.strip() for name in next(reader)]
    for cells in reader:
      if not cells:
        continue
      if len(cells) != len(header):
        raise PairFileError(
          f'{path}: line {reader.line_num} has {len(cells)} cells, the header '
          f'{len(header)}'
        )
      rows.append(dict(zip(header, cells, strict=True)))
  return rows


def _parquet():
  try:
    import pyarrow.parquet
  except ImportError:
    raise ImportError(
      'Parquet tables need the package pyarrow: pip install '
      "'structattn-jax[parquet]'; or give a CSV file"
    ) from None
  return pyarrow.parquet


def _parquet_header(path: pathlib.Path) -> list[str]:
  parquet = _parquet()
  try:
    return list(parquet.read_schema(path).names)
  except ValueError as error:  # pyarrow.ArrowInvalid
    raise PairFileError(f'{path}: not a Parquet file: {error}') from None


def _parquet_rows(
  path: pathlib.Path, columns: Sequence[str]
) -> list[dict[str, str]]:
  try:
    table = _parquet().read_table(path, columns=list(columns))
  except ValueError as error:
    raise PairFileError(f'{path}: not a Parquet file: {error}') from None
  return [
    {key: '' if value is None else str(value) for key, value in row.items()}
    for row in table.to_pylist()
  ]


def _some(names: Sequence[str], count: int = 3) -> str:
  more = f' and {len(names) - count} more' if len(names) > count else ''
  return ', '.join(names[:count]) + more
