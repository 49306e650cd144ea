"""AlphaFold 3: files in its own format against what is known to be in them.

Beside such a file, or in one of the two folders above, may lie

  records.json  [scope, name, dtype, shape] of every record, in order; all of
                them in the folder of the file, at least its own further up
  *.npz         goldens recorded with the same parameters

Reading must give these names and values, and writing it again the same bytes.
"""

import json
import math
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from structattn_jax import checkpoint
from structattn_jax.convert import record_file
from structattn_jax.verification.golden import GoldenError, NotAGoldenError, Row

_LIST = 'records.json'


def find(folder: pathlib.Path) -> list[pathlib.Path]:
  """One file of each model below a folder."""
  models: dict[tuple[pathlib.Path, ...], pathlib.Path] = {}
  for path in sorted(folder.rglob('*.bin*')):
    if path.is_file() and is_model(path):
      try:
        models.setdefault(record_file.find_model_files(path).files, path)
      except checkpoint.CheckpointError:
        models[(path,)] = path  # Running it says what is wrong.
  return list(models.values())


def is_model(path: pathlib.Path) -> bool:
  """Whether a file, by its name or content, is of this format."""
  if not path.is_file() or checkpoint.is_zip(path):
    return False
  return '.bin.zst' in path.name or record_file.is_model(path)


def run(path: pathlib.Path) -> list[Row]:
  """Reads one model and compares it with what is known.

  Raises:
    CheckpointError: if the files are damaged.
    NotAGoldenError: if nothing is known about it.
    GoldenError: if the list of records is not one.
  """
  found = record_file.find_model_files(path)
  records = list(record_file.read_records(path))
  folder = found.path.parent
  rows = [
    *_names(records, folder),
    *_values(records, folder),
  ]
  if not rows:
    raise NotAGoldenError(
      f'there is neither a {_LIST} nor a golden with these parameters beside it'
    )
  if not found.is_compressed:
    content = b''.join(file.read_bytes() for file in found.files)
    written = b''.join(map(record_file.encode_record, records))
    rows.append(('bytes when written again', float(content != written), 1.0))
  case = f'{folder.resolve().name}/{found.model}'
  return [
    Row(case, output, error, scale, 0.0, ok=error == 0.0)
    for output, error, scale in rows
  ]


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
  return [folder, *folder.resolve().parents[:2]]


def _names(
  records: Sequence[record_file.Record], folder: pathlib.Path
) -> Iterator[tuple[str, float, float]]:
  """How many records differ from the list."""
  path = next(
    (p / _LIST for p in _folders(folder) if (p / _LIST).is_file()), None
  )
  if path is None:
    return
  try:
    listed = json.loads(path.read_text(encoding='utf-8'))
    want = [(s, n, d, tuple(shape)) for s, n, d, shape in listed]
  except (OSError, ValueError, TypeError) as error:
    raise GoldenError(f'{path}: not a list of records: {error}') from None
  got = [(r.scope, r.name, r.array.dtype.name, r.array.shape) for r in records]
  # A part of the list, in its order: each is found behind the one before.
  rest = iter(want)
  wrong = sum(all(entry != other for other in rest) for entry in got)
  if path.parent == folder:
    wrong += abs(len(want) - len(got))
  yield f'{len(got)} of {len(want)} records', float(wrong), float(len(want))


def _values(
  records: Sequence[record_file.Record], folder: pathlib.Path
) -> Iterator[tuple[str, float, float]]:
  """Largest difference from each golden with the same parameters."""
  arrays = {f'params/{r.scope}/{r.name}': r.array for r in records}
  for path in sorted(
    path for place in _folders(folder) for path in place.glob('*.npz')
  ):
    try:
      common = arrays.keys() & set(checkpoint.npz_names(path))
      golden = checkpoint.read_npz(path, common)
    except checkpoint.CheckpointError:
      continue
    errors = [_difference(arrays[name], golden[name]) for name in common]
    # Goldens with other parameters have the same names.
    if 2 * errors.count(0.0) > len(errors):
      scale = max(float(np.abs(golden[name]).max()) for name in common)
      yield f'{len(common)} arrays of {path.stem}', max(errors), scale


def _difference(x: np.ndarray, y: np.ndarray) -> float:
  if x.shape != y.shape or x.dtype != y.dtype:
    return math.inf
  error = np.abs(x.astype(np.float64) - y).max(initial=0.0)
  return float(error) if math.isfinite(error) else math.inf
