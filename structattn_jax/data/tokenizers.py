"""Text tokenisers of the protein-ligand SEDD model, without dependencies.

Protein: the 33 tokens of ESM-2 (`facebook/esm2_t30_150M_UR50D`). Ligand: the
atom-wise SMILES split of MoLFormer (`ibm/MoLFormer-XL-both-10pct`); its 2362
token vocabulary is not distributed with this package, so it is read from the
user's file or built from the user's SMILES.
"""

from __future__ import annotations

import abc
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from structattn_jax.common import files

# Of a file of a vocabulary; that of MoLFormer has 44 kB.
_MAX_VOCABULARY = 2**24

_PROTEIN_TABLE = (
  '<cls> <pad> <eos> <unk> L A G V S E R T I D P K Q N F Y M H W C X B U Z '
  'O . - <null_1> <mask>'
)
PROTEIN_ALPHABET: tuple[str, ...] = tuple(_PROTEIN_TABLE.split())
_SPECIAL = re.compile(r'<[a-z_0-9]+>')
_SMILES_TOKEN = re.compile(
  r'<(?:bos|eos|pad|mask|unk)>'
  r'|\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p'
  r'|->|<-|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>|\*|\$|%[0-9]{2}|[0-9]'
)
_SMILES_SPECIALS = ('<bos>', '<eos>', '<pad>', '<mask>')


class _Vocabulary(abc.ABC):
  """Maps tokens to ids and back; the two tokenisers differ in the split."""

  def __init__(self, ids: Mapping[str, int], start: str):
    self._ids = dict(ids)
    self._tokens = {i: token for token, i in self._ids.items()}
    self._start = start

  @property
  def vocabulary(self) -> dict[str, int]:
    """A copy of token -> id."""
    return dict(self._ids)

  @property
  def vocabulary_size(self) -> int:
    """One more than the largest id."""
    return max(self._tokens) + 1

  @property
  def pad_id(self) -> int:
    """Id of <pad>."""
    return self._ids['<pad>']

  @property
  def eos_id(self) -> int:
    """Id of <eos>."""
    return self._ids['<eos>']

  @property
  def unk_id(self) -> int:
    """Id of <unk>."""
    return self._ids['<unk>']

  @abc.abstractmethod
  def split(self, text: str) -> list[str]:
    """Splits text into tokens, known or not."""

  def unknown(self, text: str) -> list[str]:
    """Tokens of `text` which become <unk>: each once, in order."""
    return [t for t in dict.fromkeys(self.split(text)) if t not in self._ids]

  def encode(
    self, text: str, *, add_special: bool = True, length: int | None = None
  ) -> np.ndarray:
    """Text -> ids; tokens outside the vocabulary become <unk>.

    Args:
      text: the sequence.
      add_special: whether to put the start token before and <eos> after.
      length: pad with <pad> to this many ids; None leaves the length.

    Returns:
      [length] int32.

    Raises:
      ValueError: if the ids do not fit into `length`.
    """
    tokens = self.split(text)
    if add_special:
      tokens = [self._start, *tokens, '<eos>']
    ids = [self._ids.get(token, self.unk_id) for token in tokens]
    if length is not None:
      if len(ids) > length:
        raise ValueError(
          f'length={length}: the text has {len(ids)} tokens; give length >= '
          f'{len(ids)}'
        )
      ids += [self.pad_id] * (length - len(ids))
    return np.array(ids, dtype=np.int32)

  def decode(
    self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = True
  ) -> str:
    """Ids -> text.

    Args:
      ids: [length] ints.
      skip_special: whether to leave out start, <eos> and <pad> tokens.

    Returns:
      The tokens joined; <unk> and <mask> appear as such.

    Raises:
      ValueError: if an id is not in the vocabulary.
    """
    values = np.asarray(ids).reshape(-1).tolist()
    bad = sorted({i for i in values if i not in self._tokens})
    if bad:
      raise ValueError(
        f'ids: not in the vocabulary of {len(self._ids)} tokens: {bad[:5]}; '
        'replace absorbing and out-of-range ids first'
      )
    skipped = {self._start, '<eos>', '<pad>'} if skip_special else set()
    tokens = [self._tokens[i] for i in values]
    return ''.join(token for token in tokens if token not in skipped)


class ProteinTokenizer(_Vocabulary):
  """The 33-token alphabet of ESM-2: `<cls>` residues `<eos>`, pad id 1.

  Letters are upper case; anything else becomes `<unk>`, see `unknown`.
  Special tokens such as `<mask>` may be written in the text.
  """

  def __init__(self):
    super().__init__({t: i for i, t in enumerate(PROTEIN_ALPHABET)}, '<cls>')

  @property
  def cls_id(self) -> int:
    """Id of <cls>."""
    return self._ids['<cls>']

  @property
  def mask_id(self) -> int:
    """Id of <mask>."""
    return self._ids['<mask>']

  def split(self, text: str) -> list[str]:
    """One token per character, special tokens of the alphabet kept whole."""
    tokens = []
    position = 0
    while position < len(text):
      special = _SPECIAL.match(text, position)
      if special and special.group() in self._ids:
        token = special.group()
      else:
        token = text[position]
      tokens.append(token)
      position += len(token)
    return tokens


class SmilesTokenizer(_Vocabulary):
  """Atom-wise SMILES tokens: `<bos>` tokens `<eos>`.

  Build it with `from_file` for a published vocabulary, with `from_smiles`
  otherwise.
  """

  def __init__(self, vocabulary: Mapping[str, int]):
    """Checks and takes a vocabulary.

    Args:
      vocabulary: token -> id; needs <bos>, <eos>, <pad> and <unk>.

    Raises:
      ValueError: if one of these is missing or ids are negative or repeated.
    """
    needed = ('<bos>', '<eos>', '<pad>', '<unk>')
    missing = [token for token in needed if token not in vocabulary]
    if missing:
      raise ValueError(
        f'vocabulary: has no {", ".join(missing)}; add them with their ids'
      )
    ids = list(vocabulary.values())
    if not all(isinstance(i, int) and 0 <= i < 2**31 for i in ids):
      raise ValueError('vocabulary: ids must be non-negative integers of int32')
    if len(set(ids)) != len(ids):
      raise ValueError('vocabulary: two tokens share one id')
    super().__init__(vocabulary, '<bos>')

  @classmethod
  def from_smiles(cls, smiles: Iterable[str]) -> SmilesTokenizer:
    """Builds a vocabulary: 4 special tokens, the sorted tokens, <unk> last.

    Args:
      smiles: the SMILES of the data set.

    Returns:
      A tokeniser that knows every token of `smiles`.
    """
    found = {token for text in smiles for token in split_smiles(text)}
    tokens = sorted(found - {*_SMILES_SPECIALS, '<unk>'})
    ordered = (*_SMILES_SPECIALS, *tokens, '<unk>')
    return cls({token: i for i, token in enumerate(ordered)})

  @classmethod
  def from_file(cls, path: str | os.PathLike[str]) -> SmilesTokenizer:
    """Reads a vocabulary.

    Args:
      path: JSON `{token: id}` (MoLFormer's vocab.json), or text with one
        token per line, whose id is the line number from 0.

    Returns:
      The tokeniser.

    Raises:
      ValueError: if the file is missing or not a vocabulary.
    """
    path = pathlib.Path(path)
    with files.guard(path, what='not a vocabulary'):
      text = files.read_text(path, _MAX_VOCABULARY)
      if text.lstrip().startswith('{'):
        vocabulary = json.loads(text)
      else:
        lines = text.rstrip().splitlines()
        vocabulary = {line.strip(): i for i, line in enumerate(lines)}
      return cls(vocabulary)

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the vocabulary as JSON, which `from_file` reads."""
    text = json.dumps(self._ids, ensure_ascii=False, indent=0)
    pathlib.Path(path).write_text(text, encoding='utf-8')

  @property
  def bos_id(self) -> int:
    """Id of <bos>."""
    return self._ids['<bos>']

  def split(self, text: str) -> list[str]:
    """Splits SMILES into atoms, bonds, branches and ring closures.

    Raises:
      ValueError: if a character cannot start a token, showing its position.
    """
    return split_smiles(text)


def split_smiles(text: str) -> list[str]:
  """Splits SMILES as `SmilesTokenizer.split` does."""
  tokens = []
  position = 0
  while position < len(text):
    match = _SMILES_TOKEN.match(text, position)
    if match is None:
      raise ValueError(
        f'smiles: no token at position {position} ({text[position]!r}):\n'
        f'  {text}\n  {" " * position}^'
      )
    tokens.append(match.group())
    position = match.end()
  return tokens
