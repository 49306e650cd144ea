"""AlphaFold 3's parameter files: records, plain or zstandard, in any shards.

  for scope, name, array in record_file.read_records('models/af3.bin.zst'):
    ...
  record_file.write_records('copy/af3.bin.zst', records, num_shards=4)

The format of alphafold3 `model/params.py`: records until the end of the file,
each

  int32[5]     length of scope, of name, of dtype, number of axes, bytes of data
  scope, name  UTF-8
  dtype        its name: float32, bfloat16, ...
  int32[ndim]  shape
  data         in C order

all little-endian, without alignment, checksum or count. Files are cut into
shards anywhere; shards are joined first and decompressed then.

Differs from the published reader:
  * Damage is an error that says in which record and at which byte it is.
  * Lengths are checked before anything is allocated; dtypes are a fixed list.
  * Uncompressed shards `X.bin.0` are found, arrays without values are read.
  * Shards that have no meaning in the order of their names as text (10 before
    2) are joined in numeric order.
"""

import dataclasses
import math
import pathlib
import re
import struct
import types
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from structattn_jax import checkpoint
from structattn_jax.checkpoint import CheckpointError
from structattn_jax.common import files

ZSTANDARD_MAGIC = b'\x28\xb5\x2f\xfd'

# In the order in which they are tried. The fourth is broken as published.
_FILE_NAMES = tuple(
  re.compile(pattern)
  for pattern in (
    r'(?P<model>.*)\.(?P<shard>[0-9]+)\.bin\.zst',
    r'(?P<model>.*)\.bin\.zst\.(?P<shard>[0-9]+)',
    r'(?P<model>.*)\.(?P<shard>[0-9]+)\.bin',
    r'(?P<model>.*)\.bin\.(?P<shard>[0-9]+)',
    r'(?P<model>.*)\.bin\.zst',
    r'(?P<model>.*)\.bin',
  )
)
_HEADER = struct.Struct('<5i')
# Small: a damaged or malicious frame can grow by a factor of 30,000.
_CHUNK = 1 << 12
# More than any real name or array has: a damaged length must not be obeyed.
_MOST_TEXT, _MOST_AXES, _MOST_RECORDS = 4096, 32, 10**5
_DTYPES: dict[str, np.dtype] = {
  np.dtype(dtype).name: np.dtype(dtype).newbyteorder('<')
  for dtype in (
    *(bool, np.int8, np.int16, np.int32, np.int64),
    *(np.uint8, np.uint16, np.uint32, np.uint64),
    *(np.float16, np.float32, np.float64, jnp.bfloat16),
  )
}


class Record(NamedTuple):
  """One array of a file.

  Attributes:
    scope: Haiku module path.
    name: parameter name.
    array: the values.
  """

  scope: str
  name: str
  array: np.ndarray


@dataclasses.dataclass(frozen=True)
class ModelFiles:
  """The files that together are one model.

  Attributes:
    model: name without shard number and suffixes.
    files: in the order in which they are joined.
  """

  model: str
  files: tuple[pathlib.Path, ...]

  @property
  def path(self) -> pathlib.Path:
    """For messages: the only file, or the first of several."""
    return self.files[0]

  @property
  def is_compressed(self) -> bool:
    """Whether the first file starts as zstandard data do."""
    return checkpoint.first_bytes(self.path, 4) == ZSTANDARD_MAGIC


@files.guarded(CheckpointError, 'cannot be read')
def find_model_files(
  path: checkpoint.Path, model: str | None = None
) -> ModelFiles:
  """Finds the files of one model, as the published code does.

  Args:
    path: a folder, the file of a model, or any of its shards.
    model: which model of a folder with several.

  Returns:
    The files, shards in the order of their names as text.

  Raises:
    CheckpointError: if there is none, there are several models, or a shard is
      missing.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    checkpoint.first_bytes(path, 1)  # Readable, or the error says why not.
    pattern, match = _match(path)
    if pattern is None or match is None:
      return ModelFiles(path.name, (path,))
    if 'shard' not in match.groupdict():
      return ModelFiles(match['model'], (path,))
    return _checked(match['model'], _models(path.parent, pattern))
  for pattern in _FILE_NAMES:
    models = _models(path, pattern)
    if model is not None:
      models = {name: models[name] for name in models if name == model}
    if len(models) > 1:
      raise CheckpointError(
        f'{path}: several models: {", ".join(sorted(models))}; give the path '
        'of a file instead of the folder'
      )
    if models:
      return _checked(next(iter(models)), models)
  what = 'no AlphaFold 3 model' if model is None else f'no model {model!r}'
  raise CheckpointError(
    f'{path}: {what} in this folder; expected *.bin.zst, *.bin, or shards of '
    'one of them'
  )


@files.guarded(CheckpointError, 'cannot be read')
def is_model(path: checkpoint.Path) -> bool:
  """Whether a folder holds a model, or a file is one or a shard of one.

  Files are recognised by their beginning, shards after the first by name.

  Raises:
    CheckpointError: if it cannot be read.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    return any(_models(path, pattern) for pattern in _FILE_NAMES)
  start = checkpoint.first_bytes(path, _HEADER.size + 3 * _MOST_TEXT)
  if not start:
    return False
  _, match = _match(path)
  if start.startswith(ZSTANDARD_MAGIC) or (match and _shard_number(path)):
    return True
  try:
    _read_head(_Stream(iter([start])))
  except _DamageError:
    return False
  return True


def read_records(
  path: checkpoint.Path,
  *,
  keep: Callable[[str], bool] | None = None,
  model: str | None = None,
) -> Iterator[Record]:
  """Reads records one after the other.

  Args:
    path: a folder, the file of a model, or any of its shards.
    keep: says of a scope whether its records are wanted; None takes all.
    model: which model of a folder with several.

  Yields:
    The records, in the order of the file.

  Raises:
    CheckpointError: if files are missing or damaged; the message names the
      record and where it starts in the uncompressed data.
    ImportError: if the file is compressed and zstandard is not installed.
  """
  found = find_model_files(path, model)
  numeric = tuple(sorted(found.files, key=_shard_number))
  if numeric != found.files and not _is_intact(found):
    found = dataclasses.replace(found, files=numeric)
  with files.guard(found.path, CheckpointError):
    try:
      yield from _records(
        _Stream(_content(found)), keep or (lambda scope: True)
      )
    except _DamageError as error:
      shards = ''
      if len(found.files) > 1 or _shard_number(found.path):
        names = files.listed((file.name for file in found.files), ', ')
        shards = f'; of the shards {names}, is one damaged or missing?'
      raise CheckpointError(f'{found.path}: damaged: {error}{shards}') from None


def write_records(
  path: checkpoint.Path, records: Iterable[Record], *, num_shards: int = 1
) -> tuple[pathlib.Path, ...]:
  """Writes a file of records, or shards of one.

  Args:
    path: `X.bin.zst`, which is compressed, or `X.bin`.
    records: what to write, in this order.
    num_shards: number of shards. More than one gives `X.bin.zst.0` and so on,
      or `X.0.bin`, which the published code reads.

  Returns:
    The files written; none takes its name before all are written.

  Raises:
    ValueError: on another suffix, no shards, a name or dtype that cannot be
      stored, or another file of the same model beside it, which readers would
      take instead.
    ImportError: if compression is asked for and zstandard is not installed.
    OSError: if a file cannot be written.
  """
  path = pathlib.Path(path)
  pattern, match = _match(path)
  if pattern not in _FILE_NAMES[-2:] or match is None:
    raise ValueError(
      f'{path}: the suffix says how to write: expected .bin.zst or .bin'
    )
  if num_shards < 1:
    raise ValueError(f'num_shards={num_shards}: give at least 1')
  content = b''.join(map(encode_record, records))
  is_compressed = path.suffix == '.zst'
  if is_compressed:
    compressor = _zstandard().ZstdCompressor(level=10, write_checksum=True)
    content = compressor.compress(content)
  targets = [path]
  if num_shards > 1:
    # Equal numbers of digits: text and numbers have the same order.
    numbers = [
      str(i).zfill(len(str(num_shards - 1))) for i in range(num_shards)
    ]
    names = '{0}.bin.zst.{1}' if is_compressed else '{0}.{1}.bin'
    targets = [path.with_name(names.format(match['model'], i)) for i in numbers]
  others = [
    other.name
    for name_pattern in _FILE_NAMES
    for other in _models(path.parent, name_pattern).get(match['model'], [])
    if other not in targets
  ]
  if others:
    raise ValueError(
      f'{path}: the folder holds other files of this model, which could be '
      f'read instead: {", ".join(others)}; remove them or choose another name'
    )
  bounds = [len(content) * i // num_shards for i in range(num_shards + 1)]
  checkpoint.write_all_atomically(
    {file: content[bounds[i] : bounds[i + 1]] for i, file in enumerate(targets)}
  )
  return tuple(targets)


def encode_record(record: Record) -> bytes:
  """The bytes of one record, the same as the published code's.

  Raises:
    ValueError: if a name or the array cannot be stored.
  """
  scope, name = record.scope.encode(), record.name.encode()
  array = np.asarray(record.array)
  dtype = _DTYPES.get(array.dtype.name)
  if dtype is None:
    raise ValueError(
      f'{record.scope}//{record.name}: dtype {array.dtype} cannot be stored'
    )
  if max(len(scope), len(name)) > _MOST_TEXT or array.nbytes >= 2**31:
    raise ValueError(
      f'{record.scope[:80]}//{record.name[:80]}: names have at most '
      f'{_MOST_TEXT} bytes and arrays fewer than 2 GiB, got {array.nbytes:,} '
      'bytes'
    )
  data = array.astype(dtype).tobytes()
  text = array.dtype.name.encode()
  head = _HEADER.pack(len(scope), len(name), len(text), array.ndim, len(data))
  shape = struct.pack(f'<{array.ndim}i', *array.shape)
  return b''.join((head, scope, name, text, shape, data))


class _DamageError(Exception):
  """What is wrong, without the name of the file."""


class _Stream:
  """Reads an iterator of pieces in other pieces."""

  def __init__(self, pieces: Iterator[bytes]):
    self._pieces = pieces
    self._buffer = bytearray()
    self.position = 0

  def read(self, count: int) -> bytearray:
    """The next bytes, fewer only at the end."""
    while len(self._buffer) < count:
      piece = next(self._pieces, None)
      if piece is None:
        break
      self._buffer += piece
    if len(self._buffer) <= count:
      taken, self._buffer = self._buffer, bytearray()  # Not copied.
    else:
      taken = self._buffer[:count]
      del self._buffer[:count]
    self.position += len(taken)
    return taken

  def skip(self, count: int) -> int:
    """Passes over bytes; returns how many there were."""
    left = count
    while left and (taken := len(self.read(min(left, 1 << 20)))):
      left -= taken
    return count - left


class _Head(NamedTuple):
  scope: str
  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  nbytes: int


def _records(stream: _Stream, keep: Callable[[str], bool]) -> Iterator[Record]:
  number, last = 0, ''
  while True:
    start = stream.position
    try:
      head = _read_head(stream)
      if not keep(head.scope):
        _expect('data', head.nbytes, stream.skip(head.nbytes))
      else:
        data = stream.read(head.nbytes)
        _expect('data', head.nbytes, len(data))
        array = np.frombuffer(data, head.dtype).reshape(head.shape)
        native = array.astype(head.dtype.newbyteorder('='), copy=False)
        yield Record(head.scope, head.name, native)
    except EOFError:
      if not number:
        raise _DamageError('it is empty') from None
      return
    except _DamageError as error:
      after = f', after {last}' if last else ''
      raise _DamageError(
        f'record {number} at byte {start:,}{after}: {error}'
      ) from None
    number, last = number + 1, f'{head.scope}//{head.name}'
    if number > _MOST_RECORDS:
      raise _DamageError(f'more than {_MOST_RECORDS:,} records')


def _read_head(stream: _Stream) -> _Head:
  """Everything before the data, checked; EOFError if there is nothing."""
  header = stream.read(_HEADER.size)
  if not header:
    raise EOFError
  _expect('its header', _HEADER.size, len(header))
  *lengths, ndim, nbytes = _HEADER.unpack(header)
  if (
    not all(0 <= length <= _MOST_TEXT for length in lengths)
    or not 0 <= ndim <= _MOST_AXES
    or nbytes < 0
  ):
    raise _DamageError(
      f'no record: its header says scope, name and dtype of {lengths} bytes, '
      f'{ndim} axes and {nbytes} bytes of data'
    )
  size = sum(lengths) + 4 * ndim
  rest = stream.read(size)
  _expect('its names and shape', size, len(rest))
  texts, position = [], 0
  for what, length in zip(('scope', 'name', 'dtype'), lengths, strict=True):
    try:
      texts.append(rest[position : position + length].decode())
    except UnicodeDecodeError:
      raise _DamageError(f'its {what} is not UTF-8') from None
    position += length
  scope, name, text = texts
  shape = struct.unpack(f'<{ndim}i', rest[position:])
  dtype = _DTYPES.get(text)
  if dtype is None:
    raise _DamageError(f'{scope}//{name} has the unknown dtype {text!r}')
  if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != nbytes:
    raise _DamageError(
      f'{scope}//{name} has {nbytes} bytes, which is not {text} {list(shape)}'
    )
  return _Head(scope, name, dtype, shape, nbytes)


def _expect(what: str, expected: int, got: int) -> None:
  if got != expected:
    raise _DamageError(
      f'the file ends in {what}: expected {expected:,} bytes, got {got:,}'
    )


def _content(found: ModelFiles) -> Iterator[bytes]:
  """The uncompressed bytes of all files, in pieces."""
  if not found.is_compressed:
    yield from _joined(found.files)
    return
  zstandard = _zstandard()
  frame = None
  size = unfolded = 0
  try:
    for piece in _joined(found.files):
      size += len(piece)
      while piece:
        if frame is None:
          frame = zstandard.ZstdDecompressor().decompressobj()
        content = frame.decompress(piece)
        unfolded += len(content)
        files.check_unfolded(found.path, size, unfolded, CheckpointError)
        yield content
        piece = frame.unused_data
        if frame.eof:
          frame = None
  except zstandard.ZstdError as error:
    raise _DamageError(f'not good zstandard data: {error}') from None
  if frame is not None:
    raise _DamageError('the file ends within its zstandard data')


def _joined(paths: Iterable[pathlib.Path]) -> Iterator[bytes]:
  for file in paths:
    with open(file, 'rb') as stream:
      while piece := stream.read(_CHUNK):
        yield piece


def _is_intact(found: ModelFiles) -> bool:
  try:
    for _ in _records(_Stream(_content(found)), lambda scope: False):
      pass
  except _DamageError:
    return False
  return True


def _match(
  path: pathlib.Path,
) -> tuple[re.Pattern[str] | None, re.Match[str] | None]:
  for pattern in _FILE_NAMES:
    if match := pattern.fullmatch(path.name):
      return pattern, match
  return None, None


def _models(
  folder: pathlib.Path, pattern: re.Pattern[str]
) -> dict[str, list[pathlib.Path]]:
  """Files whose names have this form, by model."""
  models: dict[str, list[pathlib.Path]] = {}
  for path in sorted(folder.iterdir()) if folder.is_dir() else ():
    match = pattern.fullmatch(path.name)
    if match and path.is_file():
      models.setdefault(match['model'], []).append(path)
  return models


def _checked(model: str, models: dict[str, list[pathlib.Path]]) -> ModelFiles:
  found = models[model]
  numbers = [_shard_number(file) for file in found]
  first = min(numbers)
  if sorted(numbers) != list(range(first, first + len(numbers))):
    raise CheckpointError(
      f'{found[0].parent}: shards of {model!r} are missing or occur twice: '
      f'there are {files.listed((file.name for file in found), ", ")}'
    )
  return ModelFiles(model, tuple(found))


def _shard_number(path: pathlib.Path) -> int:
  _, match = _match(path)
  return int(match.groupdict().get('shard') or 0) if match else 0


def _zstandard() -> types.ModuleType:
  try:
    import zstandard
  except ImportError:
    raise ImportError(
      'AlphaFold 3 parameters compressed with zstandard need the package '
      "zstandard: pip install 'structattn-jax[convert]'"
    ) from None
  return zstandard
