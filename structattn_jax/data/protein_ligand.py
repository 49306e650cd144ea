"""Pairs of a protein sequence and a ligand SMILES: files, tokens, reports.

  pairs = read_pairs('pairs.parquet', split='train')
  encoded, report = encode_pairs(pairs, ProteinTokenizer(), tokenizer)

Sequences are upper-cased; of a SMILES with a name behind it the name is left
out. What is no sequence or no SMILES then is an error that names file, row and
column, or a row that is skipped and counted. A ligand without protein serves
the mode `ligand_only`, a protein without ligand `protein_only`.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import functools
import importlib.resources
import os
import pathlib
import re
import warnings
from collections.abc import (
  Callable,
  Generator,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)

import numpy as np

from structattn_jax.common import files
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

_DELIMITERS = ',\t;'
# Of the alphabet, without gaps.
_RESIDUES = frozenset('LAGVSERTIDPKQNFYMHWCXBUZO')
# Titin has 35,991 residues, the longest SMILES of the CCD 600 characters.
_MAX_SEQUENCE, _MAX_SMILES = 2**17, 4000
_BATCH = 64  # Rows of a Parquet file: each can be as long as the file.


class PairFileError(files.FileError):
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
    pathlib.Path(str(folder / 'protein_ligand_pairs.csv')), lone_ligands=True
  )


def read_pairs(
  path: str | os.PathLike[str],
  *,
  sequence_column: str | None = None,
  smiles_column: str | None = None,
  name_column: str | None = None,
  split: str | None = None,
  lone_proteins: bool = False,
  lone_ligands: bool = False,
  skip_bad_rows: bool = False,
  report: Callable[[str], None] = warnings.warn,
) -> tuple[ProteinLigandPair, ...]:
  """Reads a CSV or Parquet table.

  Args:
    path: a `.parquet` file (needs the extra `parquet`); anything else is read
      as text with a header, whose cells are separated by commas, tabs or
      semicolons.
    sequence_column: None takes the first of `SEQUENCE_COLUMNS`.
    smiles_column: None takes the first of `SMILES_COLUMNS`.
    name_column: None takes the first of `NAME_COLUMNS`, else the row number.
    split: keep the rows with this value in the column `split`; None keeps all.
    lone_proteins: whether a cell of the column of SMILES may be empty.
    lone_ligands: whether a cell of the column of sequences may be empty.
    skip_bad_rows: whether bad rows are left out instead of an error.
    report: gets one sentence with their number.

  Returns:
    The rows in file order, sequences in upper case. SMILES are what RDKit
    accepts, where it is installed, else what has the form of SMILES.

  Raises:
    PairFileError: if the file cannot be read, a column is missing, nothing is
      left, or, naming row and column, a sequence has letters that are no
      residues, a SMILES is invalid, or a cell is empty.
    ImportError: on Parquet without pyarrow, naming the extra.
  """
  path = pathlib.Path(path)
  is_parquet = path.suffix.lower() in ('.parquet', '.pq')
  what = 'not a Parquet file' if is_parquet else 'not a table'
  pairs: list[ProteinLigandPair] = []
  skipped: list[str] = []
  with files.guard(path, PairFileError, what), _quiet_rdkit():
    header = _parquet_header(path) if is_parquet else _csv_header(path)
    column = functools.partial(_column, path, header)
    sequence = column('sequence', sequence_column, SEQUENCE_COLUMNS)
    smiles = column('SMILES', smiles_column, SMILES_COLUMNS)
    if sequence is None and smiles is None:
      raise PairFileError(
        f'{path}: no column of sequences ({", ".join(SEQUENCE_COLUMNS)}) and '
        f'none of SMILES ({", ".join(SMILES_COLUMNS)}); the columns are '
        f'{files.listed(header, ", ")}'
      )
    name = column('names', name_column, NAME_COLUMNS)
    wanted = [c for c in (name, sequence, smiles) if c is not None]
    if split is not None:
      wanted.append(column('splits', SPLIT_COLUMN, ()) or '')
    # Each text once: a table can say the same in very many rows.
    as_sequence = functools.cache(_as_sequence)
    as_smiles = functools.cache(_as_smiles)
    rows = _parquet_rows(path, wanted) if is_parquet else _csv_rows(path)
    for number, row in enumerate(rows, start=1):
      if split is not None and row[SPLIT_COLUMN] != split:
        continue
      texts = {'sequence': '', 'smiles': ''}
      bad = []
      for track, header_name, convert, may_be_empty in (
        ('sequence', sequence, as_sequence, lone_ligands),
        ('smiles', smiles, as_smiles, lone_proteins),
      ):
        if header_name is not None:
          try:
            texts[track] = convert(row[header_name])
            if not texts[track] and not may_be_empty:
              raise ValueError('the cell is empty')
          except ValueError as error:
            bad.append(f'row {number}, column {header_name!r}: {error}')
      if not bad and not any(texts.values()):
        bad.append(f'row {number} has neither a sequence nor SMILES')
      if not bad:
        label = (row[name] or '').strip() if name else ''
        pairs.append(ProteinLigandPair(label or f'row {number}', **texts))
      elif skip_bad_rows:
        skipped += bad[:1]
      else:
        raise PairFileError(
          f'{path}: {"; ".join(bad)}; correct it, or set skip_bad_rows'
        )
  if skipped:
    report(f'{path}: {len(skipped)} bad rows left out: {_some(skipped)}')
  if not pairs:
    what = '' if split is None else f' of the split {split!r}'
    raise PairFileError(f'{path}: no rows{what}')
  return tuple(pairs)


def _as_sequence(cell: str | None) -> str:
  """A sequence of residues, or a ValueError."""
  text = (cell or '').strip()
  if len(text) > _MAX_SEQUENCE:
    raise ValueError(f'{len(text):,} residues, of {_MAX_SEQUENCE:,} at most')
  for position, letter in enumerate(text, start=1):
    # Foreign letters can have these as their upper case.
    if letter.upper() not in _RESIDUES or not letter.isascii():
      chains = '; give one chain a row' if letter == ':' else ''
      raise ValueError(
        f'{letter!r} at position {position} is no residue{chains}'
      )
  return text.upper()


def _as_smiles(cell: str | None) -> str:
  """SMILES without the name that may follow, or a ValueError."""
  text = re.split('[ \t]', (cell or '').strip(), maxsplit=1)[0]
  if len(text) > _MAX_SMILES:
    raise ValueError(f'{len(text):,} characters, of {_MAX_SMILES:,} at most')
  try:
    tokenizers.split_smiles(text)
  except ValueError as error:
    raise ValueError(str(error).splitlines()[0]) from None
  with contextlib.suppress(ImportError):
    from rdkit import Chem

    if Chem.MolFromSmiles(text) is None:
      raise ValueError(f'RDKit rejects the SMILES {files.shown(text)}')
  return text


@contextlib.contextmanager
def _quiet_rdkit() -> Generator[None]:
  """Without what RDKit writes to the standard error."""
  try:
    from rdkit import rdBase
  except ImportError:
    yield
    return
  with rdBase.BlockLogs():
    yield


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
    given = next((name for name in known if name in header), None)
  if given is None:
    return None
  count = header.count(given)
  if count != 1:
    found = f'{count} columns' if count else 'no column'
    raise PairFileError(
      f'{path}: {found} {given!r} for {what}; the columns are '
      f'{files.listed(header, ", ")}'
    )
  return given


def _csv_header(path: pathlib.Path) -> list[str]:
  return next(_csv_cells(path), [])


def _csv_rows(path: pathlib.Path) -> Iterator[dict[str, str]]:
  lines = _csv_cells(path)
  header = next(lines)
  for number, cells in enumerate(lines, start=1):
    if len(cells) != len(header):
      raise PairFileError(
        f'{path}: row {number} has {len(cells)} cells, the header {len(header)}'
      )
    yield dict(zip(header, cells, strict=True))


def _csv_cells(path: pathlib.Path) -> Iterator[list[str]]:
  """Header and rows; what makes most columns of the header separates."""
  with path.open(newline='', encoding='utf-8-sig') as file:
    first = file.readline()
    delimiter = max(
      _DELIMITERS,
      key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])),
    )
    file.seek(0)
    reader = csv.reader(file, delimiter=delimiter)
    yield [name.strip() for name in next(reader, [])]
    yield from filter(None, reader)


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
  return list(_parquet().read_schema(path).names)


def _parquet_rows(
  path: pathlib.Path, columns: Sequence[str]
) -> Iterator[dict[str, str]]:
  table = _parquet().ParquetFile(path)
  size = path.stat().st_size
  # A row takes a byte; columns of one value take none.
  files.check_unfolded(path, size, 32 * table.metadata.num_rows, PairFileError)
  for batch in table.iter_batches(_BATCH, columns=list(dict.fromkeys(columns))):
    for row in batch.to_pylist():
      yield {k: '' if v is None else str(v) for k, v in row.items()}


def _some(names: Sequence[str], count: int = 3) -> str:
  more = f' and {len(names) - count} more' if len(names) > count else ''
  return ', '.join(names[:count]) + more
