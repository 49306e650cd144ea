"""Golden files, and how far a replay may be from them.

A golden is an npz file with `inputs/...`, `params/...`, `outputs/...` (the
source's float32 run), where there is one `outputs64/...` (the same code in
float64), and `meta`, JSON with at least `system` and `kind`.

Tolerances are derived from the file. The truth is the float64 run; upstream's
own error is the largest difference between its two runs, taken over the rows
that are compared. A replay passes if its largest error is at most

  max(factor * upstream's error, floor * largest value)

FACTOR = 1.5 asks for results about as good as upstream's. The structure module
has 6: it amplifies rounding from iteration to iteration, and two compilations
of one program differ by half of that. The floor is for arrays in which
upstream's error is small by chance:

  FLOOR 2e-6 for values, which is 17 roundings of float32
  GEOMETRY_FLOOR 9e-7 for coordinates that are computed in a few steps
  GRADIENT_FLOOR 1e-5 for gradients

For all recorded files this is at or below what the READMEs of the goldens
accept. Where there is no float64 run (gradients of torch code), the float32 run
is the truth and the floor alone counts.

A wrong number in one of the two runs must not make the tolerance large: the
first term is cut at 3e-6 of the largest value, 1.5e-5 for gradients, or what
the replay says for its kind (coordinates far away, iterations).

Some gradients are exactly zero in theory: a bias that adds the same to all
logits. Nothing can be said relative to their size. Below 1e-8 of the largest
gradient in the file they are compared with 1e-6 of that instead (without a
float64 run: below 1e-4 with 1e-4).

Replayed in float64, what has a float64 run must be within 1e-9 of it, relative
to the largest value, or absolutely where that is below one. The rest keeps its
tolerance.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from structattn_jax import checkpoint
from structattn_jax.common import files

FACTOR = 1.5
FLOOR = 2e-6
GEOMETRY_FLOOR = 9e-7
GRADIENT_FLOOR = 1e-5
MOST, MOST_GRADIENT = 3e-6, 1.5e-5
_ZERO, _ZERO_TOLERANCE = 1e-8, 1e-6
_ZERO_FLOAT32 = 1e-4
_FLOAT64 = 1e-9

Take = Callable[[np.ndarray], np.ndarray]


class GoldenError(files.FileError):
  """A golden that cannot be replayed."""


class NotAGoldenError(GoldenError):
  """A file without the `meta` of a golden, or one of an unknown kind."""


@dataclasses.dataclass(frozen=True)
class Row:
  """One compared array.

  Attributes:
    case: name of the file without its suffix.
    output: name of the array.
    max_error: largest absolute difference over the compared rows; infinite if
      a value is not finite or the shapes differ.
    scale: largest absolute value of the reference over the same rows.
    tolerance: what the error may be.
    ok: whether it is.
  """

  case: str
  output: str
  max_error: float
  scale: float
  tolerance: float
  ok: bool


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A compared array before its tolerance is known.

  Attributes:
    output: name of the array.
    max_error: as in `Row`.
    scale: as in `Row`.
    upstream_error: largest difference between upstream's two runs; None if
      there is only one.
    floor: smallest tolerance relative to the scale.
    most: where upstream's term is cut, relative to the scale.
    factor: of upstream's error.
    is_gradient: whether values may be zero in theory.
  """

  output: str
  max_error: float
  scale: float
  upstream_error: float | None
  floor: float
  most: float = MOST
  factor: float = FACTOR
  is_gradient: bool = False


@dataclasses.dataclass(frozen=True)
class Golden:
  """The content of a golden file.

  Attributes:
    case: name of the file without its suffix.
    meta: configuration, seed and origin.
    arrays: everything else.
    is_float64: whether to replay in float64.
  """

  case: str
  meta: Mapping[str, Any]
  arrays: Mapping[str, np.ndarray]
  is_float64: bool = False

  @classmethod
  def read(
    cls, path: checkpoint.Path, case: str, *, is_float64: bool = False
  ) -> 'Golden':
    """Reads a file; nothing is unpickled.

    Raises:
      CheckpointError: if the file cannot be read.
      NotAGoldenError: if it is another kind of file.
    """
    if 'meta' not in checkpoint.npz_names(path):
      raise NotAGoldenError(f'{path}: not a golden file: it has no `meta`')
    arrays = checkpoint.read_npz(path)
    text = arrays.pop('meta')
    try:
      meta = json.loads(text.item()) if text.dtype.kind == 'U' else None
    except (ValueError, RecursionError):
      meta = None
    if not isinstance(meta, dict):
      raise NotAGoldenError(f'{path}: not a golden file: `meta` is not JSON')
    for key in ('system', 'kind'):
      if not isinstance(meta.get(key), str):
        raise NotAGoldenError(
          f'{path}: not a golden file: `meta` names no {key}'
        )
    return cls(case, meta, arrays, is_float64)

  def part(self, prefix: str) -> dict[str, np.ndarray]:
    """Entries below `prefix/`, integers as int32, floats as replayed."""
    return {
      name.removeprefix(f'{prefix}/'): self.cast(array)
      for name, array in self.arrays.items()
      if name.startswith(f'{prefix}/')
    }

  def cast(self, array: np.ndarray) -> np.ndarray:
    """Floats as they are replayed, integers as int32."""
    if array.dtype.kind == 'f':
      return array.astype(np.float64 if self.is_float64 else np.float32)
    return array.astype(np.int32) if array.dtype.kind in 'iu' else array

  def outputs(self, prefix: str = '') -> list[str]:
    """Names of the recorded outputs that start with `prefix`."""
    names = dict.fromkeys(
      name.partition('/')[2]
      for name in self.arrays
      if name.startswith(('outputs/', 'outputs64/'))
    )
    return [name for name in names if name.startswith(prefix)]

  def value(
    self,
    output: str,
    got: Any,
    *,
    rows: Take | None = None,
    floor: float = FLOOR,
    most: float = MOST,
    factor: float = FACTOR,
    convert: Take | None = None,
  ) -> Comparison:
    """Compares an output with the recorded one.

    Args:
      output: name below `outputs/`.
      got: the replayed value, as the file has it.
      rows: takes the defined part of an array; None compares everything.
      floor: smallest tolerance relative to the largest value.
      most: where upstream's term is cut, relative to the largest value.
      factor: of upstream's error.
      convert: applied to the recorded values, where ours go on further.
    """
    truth, upstream = self._recorded(output)
    if convert is not None:
      truth = convert(truth)
      upstream = None if upstream is None else convert(upstream)
    got = np.asarray(got).astype(np.float64)
    max_error = math.inf
    if got.shape == truth.shape:
      max_error = _largest_difference(got, truth, rows)
    return Comparison(
      output,
      max_error,
      _largest_difference(truth, np.zeros_like(truth), rows),
      None if upstream is None else _largest_difference(upstream, truth, rows),
      floor,
      most,
      factor,
    )

  def has_float64(self) -> bool:
    """Whether there is a float64 run."""
    return any(name.startswith('outputs64/') for name in self.arrays)

  def truth(self, output: str) -> np.ndarray:
    """The float64 run of an output, or the only one there is."""
    return self._recorded(output)[0]

  def exact(
    self, output: str, got: Any, *, rows: Take | None = None
  ) -> Comparison:
    """Compares indices, masks or constants, which must be equal."""
    compared = self.value(output, got, rows=rows, floor=0.0)
    return dataclasses.replace(compared, upstream_error=None)

  def gradient(
    self,
    output: str,
    got: Any,
    *,
    most: float = MOST_GRADIENT,
    factor: float = FACTOR,
  ) -> Comparison:
    """Compares a gradient with the recorded one; arguments as `value`."""
    compared = self.value(
      output, got, floor=GRADIENT_FLOOR, most=most, factor=factor
    )
    return dataclasses.replace(compared, is_gradient=True)

  def _recorded(self, output: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The truth, and upstream's float32 run if that is another one."""
    single = self.arrays.get(f'outputs/{output}', self.arrays.get(output))
    double = self.arrays.get(f'outputs64/{output}')
    truth = single if double is None else double
    if truth is None:
      raise GoldenError(f'{self.case}: the golden has no output {output!r}')
    if double is None or single is None:
      return truth.astype(np.float64), None
    if single.shape != double.shape:
      raise GoldenError(
        f'{self.case}: the runs of {output!r} have different shapes'
      )
    return double.astype(np.float64), single.astype(np.float64)


def judge(
  case: str, compared: Sequence[Comparison], *, is_float64: bool = False
) -> list[Row]:
  """Gives every array of one file its tolerance."""
  largest = max((c.scale for c in compared if c.is_gradient), default=0.0)
  rows = []
  for one in compared:
    tolerance = one.floor * one.scale
    if one.upstream_error is not None:
      upstream = min(one.factor * one.upstream_error, one.most * one.scale)
      tolerance = max(tolerance, upstream)
    if one.is_gradient:
      if one.upstream_error is None and one.scale < _ZERO_FLOAT32:
        tolerance = _ZERO_FLOAT32
      elif one.upstream_error is not None and one.scale < _ZERO * largest:
        tolerance = _ZERO_TOLERANCE * largest
    if is_float64 and one.upstream_error is not None:
      tolerance = _FLOAT64 * max(one.scale, 1.0)
    ok = one.max_error <= tolerance < math.inf
    rows.append(Row(case, one.output, one.max_error, one.scale, tolerance, ok))
  return rows


Replay = Callable[[Golden], Iterator[Comparison]]


def haiku_params(flat: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
  """{'module//name': array} or {'module/name': array} as Haiku parameters."""
  params: dict[str, dict[str, Any]] = {}
  for key, array in flat.items():
    module, _, name = key.rpartition('/')
    params.setdefault(module.removesuffix('/'), {})[name] = array
  return params


def _largest_difference(
  x: np.ndarray, y: np.ndarray, rows: Take | None
) -> float:
  """Largest absolute difference; infinite if one is not finite."""
  if rows is not None:
    x, y = rows(x), rows(y)
  if not x.size:
    return 0.0
  with np.errstate(invalid='ignore'):
    largest = float(np.abs(x - y).max())
  return largest if math.isfinite(largest) else math.inf
