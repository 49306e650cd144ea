"""Measures candidates for the same job, like with like.

All candidates of a case get the same arguments, in one process, and their calls
alternate in a new random order each round, so that drift of the machine hits
all alike. Results are compared with an expected one first; a wrong candidate is
timed too, and marked.

Times are in seconds and sizes in bytes here; tables show milliseconds and MB
(10^6 bytes).
"""

import concurrent.futures.process
import contextlib
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

# Programs with larger temporaries are reported, not run.
TEMP_LIMIT_BYTES = 8 * 10**9

# Largest relative error at which a float32 result counts as right.
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
  """What one candidate costs in one case; None where it is not known.

  Attributes:
    case: the inputs, such as their size; ratios are formed within a case.
    candidate: name of the formulation.
    lower_seconds: tracing and lowering to StableHLO, from cold caches.
    compile_seconds: compilation by XLA.
    median_seconds: median wall time of a call.
    min_seconds: least wall time of a call.
    cpu_seconds: mean CPU time of a call, summed over threads.
    calls: timed calls.
    temp_bytes: temporaries the compiled program allocates. XLA on CPU leaves
      out the work space of library calls; the peak RSS has it.
    output_bytes: results of the compiled program.
    peak_rss_bytes: growth of the resident set of a fresh process that compiles
      and calls the candidate once, counted from when its inputs exist.
    max_relative_error: largest error of any result, relative to the largest
      entry of that result.
    note: what is out of the ordinary, such as why it was not run.
  """

  case: str = ''
  candidate: str
  lower_seconds: float
  compile_seconds: float
  median_seconds: float | None = None
  min_seconds: float | None = None
  cpu_seconds: float | None = None
  calls: int = 0
  temp_bytes: int | None = None
  output_bytes: int | None = None
  peak_rss_bytes: int | None = None
  max_relative_error: float | None = None
  note: str = ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """Measurements of one operation; ratios are to the candidate `baseline`."""

  title: str
  baseline: str
  rows: tuple[Measurement, ...]


@dataclasses.dataclass(frozen=True)
class External:
  """A candidate that is not a JAX function, such as a published torch module.

  Attributes:
    prepare: `prepare(*args)` returns a function without arguments, which is
      what is timed; its result is a tree of what `numpy.asarray` takes, ready
      when it returns, or None, which is not checked.
  """

  prepare: Callable[..., Callable[[], Any]]


def measure(
  fn: Callable[..., Any], *args: Any, repeats: int = 20, warmup: int = 1
) -> Measurement:
  """Measures a function by itself; `compare` has the details."""
  name = getattr(fn, '__name__', 'fn')
  return compare({name: fn}, args, repeats=repeats, warmup=warmup)[0]


def compare(
  candidates: Mapping[str, Callable[..., Any] | External],
  args: Sequence[Any],
  *,
  case: str = '',
  want: Any = None,
  repeats: int = 20,
  warmup: int = 1,
  budget_seconds: float = 2.0,
  temp_limit_bytes: int = TEMP_LIMIT_BYTES,
  tolerance: float = TOLERANCE,
) -> list[Measurement]:
  """Measures candidates on the same arguments, their calls alternating.

  Args:
    candidates: functions of `*args` by name, which are jitted, or `External`.
    args: arrays, or trees of arrays.
    case: copied to the measurements.
    want: the expected result, a tree like that of the candidates.
    repeats: timed calls of each candidate.
    warmup: calls of each candidate before those, at least 1.
    budget_seconds: a candidate is not called again once its timed calls have
      taken this long. If its first call does, that is its one timed call.
    temp_limit_bytes: programs with larger temporaries are not run.
    tolerance: largest relative error at which a result counts as right.

  Returns:
    A measurement of each candidate, in the given order.
  """
  jax.jit(lambda x: x + 1)(0).block_until_ready()  # Starts the compiler.
  results, programs = {}, {}
  for name, fn in candidates.items():
    results[name], program = _compile(name, fn, args, case)
    temp_bytes = results[name].temp_bytes or 0
    if temp_bytes > temp_limit_bytes:
      note = f'not run: {temp_bytes / 1e9:.1f} GB of temporaries'
      results[name] = dataclasses.replace(results[name], note=note)
    else:
      programs[name] = program
  wall = {name: [] for name in programs}
  cpu = {name: [] for name in programs}

  def call(name) -> Any:
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    out = jax.block_until_ready(programs[name](*args))
    wall[name].append(time.perf_counter() - wall_start)
    cpu[name].append(time.process_time() - cpu_start)
    return out

  for name in programs:
    out = call(name)
    if want is not None and out is not None:
      error = max_relative_error(out, want)
      # Written so that NaN is wrong.
      note = '' if error <= tolerance else f'WRONG by more than {tolerance:g}'
      results[name] = dataclasses.replace(
        results[name], max_relative_error=error, note=note
      )
    del out
    if wall[name][0] < budget_seconds:
      for _ in range(warmup - 1):
        call(name)
      wall[name].clear()
      cpu[name].clear()

  rng = np.random.default_rng(0)
  for _ in range(repeats):
    for name in rng.permutation(list(programs)):
      if sum(wall[name]) < budget_seconds:
        call(name)
  for name in programs:
    results[name] = dataclasses.replace(
      results[name],
      median_seconds=float(np.median(wall[name])),
      min_seconds=min(wall[name]),
      cpu_seconds=float(np.mean(cpu[name])),
      calls=len(wall[name]),
    )
  return list(results.values())


def _compile(
  name: str, fn: Callable[..., Any] | External, args: Sequence[Any], case: str
) -> tuple[Measurement, Any]:
  if isinstance(fn, External):
    run = fn.prepare(*args)
    row = Measurement(
      case=case, candidate=name, lower_seconds=0.0, compile_seconds=0.0
    )
    return row, lambda *_: run()
  # Candidates share inner functions; the later ones must not gain from that.
  jax.clear_caches()
  start = time.perf_counter()
  lowered = jax.jit(fn).lower(*args)
  lowered_at = time.perf_counter()
  program = lowered.compile()
  compiled_at = time.perf_counter()
  memory = program.memory_analysis()
  return Measurement(
    case=case,
    candidate=name,
    lower_seconds=lowered_at - start,
    compile_seconds=compiled_at - lowered_at,
    temp_bytes=getattr(memory, 'temp_size_in_bytes', None),
    output_bytes=getattr(memory, 'output_size_in_bytes', None),
  ), program


def in_float64(fn: Callable[..., Any], args: Sequence[Any]) -> Any:
  """The result of `fn`, jitted, in float64 of float32 arguments."""
  with jax.enable_x64(True):
    wide = jax.tree.map(
      lambda x: (
        np.asarray(x, np.float64) if x.dtype == np.float32 else np.asarray(x)
      ),
      tuple(args),
    )
    return jax.tree.map(np.asarray, jax.jit(fn)(*wide))


def max_relative_error(got: Any, want: Any) -> float:
  """Largest error over the leaves, each relative to its largest entry."""

  def error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
      raise ValueError(f'got: expected shape {want.shape}, got {got.shape}')
    scale = np.abs(want).max(initial=0)
    return np.abs(got - want).max(initial=0) / (scale or 1.0)

  # `np.max`, unlike `max`, keeps NaN.
  return float(np.max(jax.tree.leaves(jax.tree.map(error, got, want))))


def peak_rss(
  build: Callable[..., tuple[Callable[..., Any], Sequence[Any]]],
  *build_args: Any,
) -> int:
  """Growth of the resident set in a fresh process that runs a candidate once.

  Compilation is part of it, a floor of some ten MB.

  Args:
    build: `build(*build_args)` returns the function and its arguments; defined
      at the top level of a module, because the new process imports it.
    *build_args: picklable.

  Returns:
    Bytes of peak resident memory above those in use before compilation.

  Raises:
    concurrent.futures.process.BrokenProcessPool: if the process was killed,
      most likely for want of memory.
  """
  spawn = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
    return pool.submit(_grow, build, build_args).result()


def with_peak_rss(
  row: Measurement, build: Callable[..., Any], *build_args: Any
) -> Measurement:
  """Adds the peak of `peak_rss` to the measurement of a candidate that ran."""
  if not row.calls:
    return row
  try:
    peak = peak_rss(build, *build_args)
  except concurrent.futures.process.BrokenProcessPool:
    return dataclasses.replace(row, note='RSS: process killed')
  return dataclasses.replace(row, peak_rss_bytes=peak)


def _grow(build: Callable[..., Any], build_args: Sequence[Any]) -> int:
  fn, args = build(*build_args)
  jax.block_until_ready(args)
  jax.jit(lambda x: x + 1)(0).block_until_ready()  # Starts the compiler.
  is_external = isinstance(fn, External)
  program = fn.prepare(*args) if is_external else lambda: jax.jit(fn)(*args)
  _forget_peak()
  baseline = _peak_bytes()
  jax.block_until_ready(program())
  return _peak_bytes() - baseline


def _forget_peak() -> None:
  """Lowers the peak to the present where the system can; Linux can."""
  # Elsewhere copies made on the way to the inputs can hide as much growth.
  with contextlib.suppress(OSError):
    pathlib.Path('/proc/self/clear_refs').write_text('5')


def _peak_bytes() -> int:
  """Peak resident set of this process."""
  # Linux carries ru_maxrss over from the process that started this one; VmHWM
  # starts anew.
  with contextlib.suppress(OSError):
    status = pathlib.Path('/proc/self/status').read_text()
    found = re.search(r'VmHWM:\s*(\d+) kB', status)
    if found:
      return int(found[1]) * 1024
  import resource  # Not on Windows.

  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else peak * 1024


def environment() -> dict[str, Any]:
  """What the numbers depend on besides the code."""
  device = jax.devices()[0]
  return {
    'device': device.device_kind,
    'backend': device.platform,
    'machine': platform.machine(),
    'cpu_count': os.cpu_count(),
    'python': platform.python_version(),
    **{
      name: importlib.metadata.version(name)
      for name in ('jax', 'jaxlib', 'dm-haiku')
    },
  }


def format_environment(values: Mapping[str, Any]) -> str:
  """One line of `environment()`."""
  return ', '.join(f'{key} {value}' for key, value in values.items())


def format_table(table: Table) -> str:
  """Plain text, one line per case and candidate; unknown numbers are '-'."""
  header = (
    'case',
    'candidate',
    'compile ms',
    'run ms',
    f'/ {table.baseline}',
    'CPU ms',
    f'CPU / {table.baseline}',
    'temp MB',
    'RSS MB',
    'rel error',
    'note',
  )
  baselines = {
    row.case: row for row in table.rows if row.candidate == table.baseline
  }
  lines: list[tuple[str, ...]] = [header]
  for row in table.rows:
    ratio = cpu_ratio = None
    baseline = baselines.get(row.case)
    if baseline is not None:
      ratio = _ratio(row.median_seconds, baseline.median_seconds)
      cpu_ratio = _ratio(row.cpu_seconds, baseline.cpu_seconds)
    notes = [row.note] if row.note else []
    if 0 < row.calls < 5:
      notes.append(f'{row.calls} call{"s" if row.calls > 1 else ""}')
    lines.append(
      (
        row.case,
        row.candidate,
        _number(row.lower_seconds + row.compile_seconds, 1e3, 0),
        _number(row.median_seconds, 1e3, 3),
        _number(ratio, 1, 2),
        _number(row.cpu_seconds, 1e3, 3),
        _number(cpu_ratio, 1, 2),
        _number(row.temp_bytes, 1e-6, 1),
        _number(row.peak_rss_bytes, 1e-6, 0),
        '-'
        if row.max_relative_error is None
        else f'{row.max_relative_error:.0e}',
        '; '.join(notes),
      )
    )
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  text = [table.title]
  previous = ''
  for case, candidate, *numbers, note in lines:
    cells = [
      (case if case != previous else '').ljust(widths[0]),
      candidate.ljust(widths[1]),
      *(n.rjust(width) for n, width in zip(numbers, widths[2:-1], strict=True)),
      note,
    ]
    previous = case
    text.append('  '.join(cells).rstrip())
  return '\n'.join(text)


def _ratio(value: float | None, reference: float | None) -> float | None:
  return value / reference if value is not None and reference else None


def _number(value: float | None, factor: float, digits: int) -> str:
  return '-' if value is None else f'{value * factor:.{digits}f}'


def write_json(
  path: str | os.PathLike[str], sections: Mapping[str, Sequence[Table]]
) -> None:
  """Writes the environment and all measurements, in seconds and bytes."""
  content = {
    'environment': environment(),
    'sections': {
      name: [dataclasses.asdict(table) for table in tables]
      for name, tables in sections.items()
    },
  }
  pathlib.Path(path).write_text(json.dumps(content, indent=2) + '\n')
