"""Tables of BinaryCIF files, decoded in bounded memory.

The encodings are those of the BinaryCIF specification, version 0.3: byte
arrays, fixed point numbers, interval quantisation, run lengths, differences,
packed integers and tables of strings. Every size that a file declares is
checked before memory is asked for.
"""

import itertools
from typing import Any

import numpy as np

_TYPES = {
  1: np.int8,
  2: np.int16,
  3: np.int32,
  4: np.uint8,
  5: np.uint16,
  6: np.uint32,
  32: np.float32,
  33: np.float64,
}


def tables(
  content: bytes, category: str, most_rows: int
) -> list[dict[str, list[str | None]]]:
  """Columns of a category in every data block that has it.

  Args:
    content: a BinaryCIF file.
    category: such as '_atom_site'.
    most_rows: rows that a table may have.

  Returns:
    Per block, column name to values as text; None where there is none.

  Raises:
    ValueError: if the file is damaged. Others by the parser of its container.
    ImportError: if msgpack is not installed, naming the extra.
  """
  try:
    import msgpack
  except ImportError:
    raise ImportError(
      'BinaryCIF needs msgpack: pip install "structattn-jax[data]"'
    ) from None
  file = msgpack.unpackb(content)
  found = []
  for block in file['dataBlocks']:
    for table in block['categories']:
      if table['name'] == category:
        rows = table['rowCount']
        if not isinstance(rows, int) or not 0 <= rows <= most_rows:
          raise ValueError(f'{category} has {rows!r} rows')
        found.append(
          {column['name']: _column(column, rows) for column in table['columns']}
        )
  return found


def _column(column: dict[str, Any], rows: int) -> list[str | None]:
  name = column['name']
  values = _decode(column['data'], rows)
  if len(values) != rows:
    raise ValueError(f'column {name} has {len(values)} of {rows} rows')
  text: list[str | None] = [str(value) for value in values.tolist()]
  if column.get('mask') is None:
    return text
  mask = _decode(column['mask'], rows)
  if len(mask) != rows:
    raise ValueError(f'mask of column {name} has {len(mask)} of {rows} rows')
  return [
    value if here == 0 else None
    for value, here in zip(text, mask.tolist(), strict=True)
  ]


def _decode(encoded: dict[str, Any], most: int) -> np.ndarray:
  """Undoes the encodings, the last one first; at most `most` values."""
  data: Any = encoded['data']
  for encoding in reversed(encoded['encoding']):
    kind = encoding['kind']
    if kind == 'ByteArray':
      kind = np.dtype(_TYPES[encoding['type']]).newbyteorder('<')
      data = np.frombuffer(data, kind)
    elif kind == 'FixedPoint':
      data = data.astype(_TYPES[encoding['srcType']]) / encoding['factor']
    elif kind == 'IntervalQuantization':
      step = (encoding['max'] - encoding['min']) / (encoding['numSteps'] - 1)
      data = encoding['min'] + step * data.astype(_TYPES[encoding['srcType']])
    elif kind == 'RunLength':
      values, lengths = data[::2], data[1::2].astype(np.int64)
      if (lengths < 0).any() or lengths.sum() > most:
        raise ValueError(f'runs of {lengths.sum()} values, {most} expected')
      data = np.repeat(values, lengths)
    elif kind == 'Delta':
      data = encoding['origin'] + np.cumsum(data, dtype=np.int64)
    elif kind == 'IntegerPacking':
      data = _unpacked(data, encoding['byteCount'], encoding['isUnsigned'])
    elif kind == 'StringArray':
      return _strings(encoding, data, most)
    else:
      raise ValueError(f'unknown encoding {kind!r}')
  return data


def _unpacked(data: np.ndarray, size: int, unsigned: bool) -> np.ndarray:
  """Sums of runs that end below the largest, or above the smallest, value."""
  kind = {(1, False): np.int8, (2, False): np.int16}.get(
    (size, unsigned), {1: np.uint8, 2: np.uint16}[size]
  )
  limits = np.iinfo(kind)
  goes_on = data == limits.max
  if not unsigned:
    goes_on |= data == limits.min
  ends = np.flatnonzero(~goes_on)
  total = np.cumsum(data, dtype=np.int64)[ends]
  return np.diff(total, prepend=0)


def _strings(encoding: dict[str, Any], data: Any, most: int) -> np.ndarray:
  text = encoding['stringData']
  offsets = _decode(
    {'data': encoding['offsets'], 'encoding': encoding['offsetEncoding']},
    len(text) + most + 2,
  ).tolist()
  known = [text[start:stop] for start, stop in itertools.pairwise(offsets)]
  index = _decode({'data': data, 'encoding': encoding['dataEncoding']}, most)
  # -1 stands for a missing value, which the mask says, too.
  return np.array([*known, ''], dtype=object)[index]
