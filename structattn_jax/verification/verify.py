"""Golden files found, replayed on the present device and judged.

  report = verify.verify(['goldens/'])
  assert report.status == 0, report.rows

`structattn_jax.verification` runs the files; its `golden.py` says how
tolerances are derived. `structattn verify` prints what this returns.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from structattn_jax import verification as replay
from structattn_jax.common import files
from structattn_jax.verification import Row, torch_checkpoint
from structattn_jax.verification import alphafold3_checkpoint as af3_checkpoint

Path = str | os.PathLike[str]

HOLDS, FAILS, CANNOT_RUN = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Report:
  """What was compared, and what could not be.

  Attributes:
    rows: one per compared array.
    notes: what was left out, which is no failure: files in folders that are
      not goldens or of a kind that is not implemented, and outputs that have
      no public function.
    errors: what could not be run: files that cannot be read, or named files of
      an unknown kind.
  """

  rows: Sequence[Row]
  notes: Sequence[str]
  errors: Sequence[str]

  @property
  def status(self) -> int:
    """0 if all rows hold, 1 if one fails, 2 if something could not be run."""
    if self.errors or not self.rows:
      return CANNOT_RUN
    return HOLDS if all(row.ok for row in self.rows) else FAILS


def verify(
  paths: Iterable[Path],
  *,
  float64: bool = False,
  progress: Callable[[str], None] | None = None,
) -> Report:
  """Replays golden files through the public API and compares every array.

  Args:
    paths: npz files, AlphaFold 3 parameter files (see
      `replay.af3_checkpoint`), checkpoints of PyTorch models (see
      `replay.torch_checkpoint`), or folders, which are searched for all.
    float64: whether to replay npz files in float64, where what has a float64
      run must be within 1e-9 of it.
    progress: called with the name of each file before it is replayed.

  Returns:
    The report. Nothing is raised for bad files.
  """
  rows: list[Row] = []
  notes: list[str] = []
  errors: list[str] = []
  for path in map(pathlib.Path, paths):
    found, wrong = _find(path)
    errors += wrong
    for file in found:
      try:
        with files.guard(file, replay.GoldenError, 'cannot be replayed'):
          compared, left = _replay(
            file, progress or (lambda message: None), float64
          )
      except replay.NotAGoldenError as error:
        noted = notes if path.is_dir() else errors
        noted.append(f'not replayed: {_named(file, error)}')
      except (files.FileError, ImportError) as error:
        errors.append(_named(file, error))
      else:
        rows += compared
        if left:
          notes.append(f'not replayed: {file}: {", ".join(sorted(left))}')
  if not rows and not errors:
    errors.append('no golden file could be replayed')
  return Report(tuple(rows), tuple(notes), tuple(errors))


def _named(file: pathlib.Path, error: Exception) -> str:
  text = str(error)
  return text if str(file) in text else f'{file}: {text}'


def _find(path: pathlib.Path) -> tuple[list[pathlib.Path], list[str]]:
  """The files to replay, and what is wrong if there are none."""
  found = [path]
  try:
    with files.guard(path, replay.GoldenError, 'cannot be searched'):
      if path.is_dir():
        found = [
          *(
            file
            for file in sorted(path.rglob('*.npz'))
            # The outputs of a checkpoint that is found itself.
            if torch_checkpoint.described(file) is None
          ),
          *af3_checkpoint.find(path),
          *torch_checkpoint.find(path),
        ]
  except files.FileError as error:
    return [], [str(error)]
  return found, [] if found else [f'{path}: no npz files in this folder']


def _replay(
  file: pathlib.Path, progress: Callable[[str], None], float64: bool
) -> tuple[list[Row], set[str]]:
  """The compared arrays of one file, and outputs that are left."""
  if af3_checkpoint.is_model(file):
    progress(f'{file.name} (AlphaFold 3 parameters)')
    return af3_checkpoint.run(file), set()
  file = torch_checkpoint.described(file) or file
  if torch_checkpoint.is_checkpoint(file):
    progress(f'{file.name} (PyTorch parameters)')
    return torch_checkpoint.run(file), set()
  golden = replay.Golden.read(file, file.stem, is_float64=float64)
  if replay.is_known(golden):
    progress(f'{golden.case} ({golden.meta["kind"]})')
  found = replay.run(golden)
  return found, set(golden.outputs()) - {row.output for row in found}


def to_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
  """Rows as plain values; null for an infinite error, which JSON lacks."""

  def plain(value: Any) -> Any:
    is_infinite = isinstance(value, float) and not math.isfinite(value)
    return None if is_infinite else value

  return [
    {name: plain(value) for name, value in dataclasses.asdict(row).items()}
    for row in rows
  ]


def table(rows: Sequence[Row]) -> Iterator[str]:
  """Rows as lines of text, each with the part of its tolerance used."""
  header = ('case', 'output', 'max error', 'scale', 'tolerance', 'used', '')
  lines = [header]
  for row in rows:
    used = row.max_error / row.tolerance if row.tolerance else row.max_error
    lines.append(
      (
        row.case,
        row.output,
        f'{row.max_error:.1e}',
        f'{row.scale:.1e}',
        f'{row.tolerance:.1e}',
        f'{used:.2f}',
        'ok' if row.ok else 'FAILS',
      )
    )
  widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
  for line in lines:
    cells = [
      f'{cell:{"<" if i in (0, 1, 6) else ">"}{width}}'
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
    yield '  '.join(cells).rstrip()
