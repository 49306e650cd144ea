"""Metrics of a run: one CSV file, and TensorBoard events where installed."""

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from structattn_jax import checkpoint


class MetricsWriter:
  """Appends rows to `metrics.csv` and scalars to TensorBoard event files.

  A resumed run first drops the rows behind its checkpoint, which it will write
  again: the file of an interrupted run is that of an uninterrupted one, apart
  from the column of seconds.
  """

  def __init__(
    self, folder: pathlib.Path, columns: Sequence[str], *, step: int = 0
  ):
    """Opens the files.

    Args:
      folder: of the run.
      columns: names of the metrics, after the column `step`.
      step: rows behind it are dropped.
    """
    self.path = folder / 'metrics.csv'
    self._columns = ('step', *columns)
    rows = [r for r in read_metrics(self.path) if r['step'] <= step]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(self._columns)
    for row in rows:
      writer.writerow([_text(row.get(name)) for name in self._columns])
    checkpoint.write_atomically(self.path, text.getvalue().encode())
    self._file = self.path.open('a', encoding='utf-8', newline='')
    self._csv = csv.writer(self._file, lineterminator='\n')
    self._events = _event_writer(folder, step)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes one row; metrics without a value stay empty.

    Args:
      step: number of optimiser steps made.
      values: numbers or text by column name.

    Raises:
      ValueError: on a name that is not a column.
    """
    unknown = values.keys() - set(self._columns)
    if unknown:
      raise ValueError(f'values: no such columns: {sorted(unknown)}')
    row = {'step': step, **values}
    self._csv.writerow([_text(row.get(name)) for name in self._columns])
    self._file.flush()
    if self._events is not None:
      for name, value in values.items():
        if not isinstance(value, str):
          self._events.add_scalar(name, value, step)

  def close(self) -> None:
    """Closes the files."""
    self._file.close()
    if self._events is not None:
      self._events.close()


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """Rows of a `metrics.csv`: numbers where they are numbers, no empty cells.

  Args:
    path: the file; a missing one has no rows.

  Returns:
    One {column: value} per whole row.
  """
  if not path.exists():
    return []
  with path.open(encoding='utf-8', newline='') as file:
    reader = csv.reader(file)
    header = next(reader, [])
    rows = []
    for cells in reader:
      # A killed process may have left half a row.
      if len(cells) == len(header):
        rows.append(
          {n: _number(c) for n, c in zip(header, cells, strict=True) if c}
        )
  return [row for row in rows if isinstance(row.get('step'), int)]


def _event_writer(folder: pathlib.Path, step: int) -> Any:
  try:
    import tensorboardX
  except ImportError:
    return None
  # Hides the events of the steps that are made again.
  return tensorboardX.SummaryWriter(str(folder / 'events'), purge_step=step + 1)


def _number(text: str) -> int | float | str:
  for kind in (int, float):
    try:
      return kind(text)
    except ValueError:
      pass
  return text


def _text(value: Any) -> str:
  if value is None:
    return ''
  if isinstance(value, (str, int)):
    return str(value)
  return repr(float(value))
