"""Shape and dtype checks at trace time that name the argument.

`chex.assert_shape` reports 'input 0 has shape ...'; users need to know which
argument is wrong, what it should have been, and where that number came from.
All checks look at shapes and dtypes only, so they cost nothing after tracing.
"""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def check_shapes(
  sizes: Mapping[str, int | tuple[int, str]] | None = None,
  /,
  **arguments: tuple[Any, str],
) -> dict[str, int]:
  """Checks arrays against named dimensions and returns the sizes bound.

  Dimensions are names or numbers, separated by blanks. A name is bound by its
  first use, left to right, and must agree everywhere after; a trailing '...'
  accepts any further axes. Arguments that are None are passed over.

    >>> import numpy as np
    >>> dims = check_shapes(
    ...   atom_act=(np.zeros((37, 8)), 'n_atom c_atom'),
    ...   atom_to_token=(np.zeros(37, int), 'n_atom'),
    ... )
    >>> dims
    {'n_atom': 37, 'c_atom': 8}

  Args:
    sizes: sizes known before, e.g. from a config: {'n_head': 4}; a pair says
      where else a size comes from: {'n_atom': (128, 'the plan')}.
    **arguments: `name=(array, 'dim dim ...')`.

  Returns:
    {dimension name: size}, including `sizes`.

  Raises:
    ValueError: naming the argument, the expected shape, where each size came
      from, and the shape given.
    TypeError: on a list or tuple, which has no shape of its own.
  """
  bound: dict[str, int] = {}
  origin: dict[str, str] = {}
  for name, size in (sizes or {}).items():
    given = size if isinstance(size, tuple) else (size, 'the config')
    bound[name], origin[name] = given
  for argument, (array, spec) in arguments.items():
    if array is None:
      continue
    if isinstance(array, (list, tuple)):
      raise TypeError(
        f'{argument}: expected an array, got a {type(array).__name__}; '
        'convert with `jnp.asarray`'
      )
    shape = np.shape(array)
    names = spec.split()
    open_ended = bool(names) and names[-1] == '...'
    if open_ended:
      names = names[:-1]
    if len(shape) == len(names) or (open_ended and len(shape) > len(names)):
      for name, size in zip(names, shape, strict=False):
        if not name.isdigit() and name not in bound:
          bound[name] = size
          origin[name] = f'{argument!r}'
    expected = [
      int(name) if name.isdigit() else bound.get(name) for name in names
    ]
    try:
      chex.assert_shape(array, [*expected, ...] if open_ended else expected)
    except AssertionError:
      known = [
        f'{name}={bound[name]} from {origin[name]}'
        for name in dict.fromkeys(names)
        if name in bound and origin[name] != f'{argument!r}'
      ]
      raise ValueError(
        f'{argument}: expected shape [{", ".join(spec.split())}]'
        + (f' with {" and ".join(known)}' if known else '')
        + f', got {tuple(shape)}'
      ) from None
  return bound


def check_dtypes(kind: str, /, **arguments: Any) -> None:
  """Checks that arrays are 'bool', 'integer' or 'floating'.

  Args:
    kind: the kind of dtype that every array must have.
    **arguments: `name=array`; None is passed over.

  Raises:
    TypeError: naming the argument, the kind expected and the dtype given.
  """
  kinds = {
    'bool': (np.bool_, 'True = keep; convert with `mask.astype(bool)`'),
    'integer': (np.integer, 'convert with `.astype(np.int32)`'),
    'floating': (np.floating, 'convert with `.astype(np.float32)`'),
  }
  parent, advice = kinds[kind]
  for argument, array in arguments.items():
    if array is None:
      continue
    dtype = jnp.result_type(array)
    if not jnp.issubdtype(dtype, parent):
      raise TypeError(
        f'{argument}: expected {kind} values ({advice}), got {dtype}'
      )


def is_concrete(array: Any) -> bool:
  """Whether values can be read on the host now (not a tracer)."""
  return not isinstance(array, jax.core.Tracer)


def validate_segment_ids(
  segment_ids: Any,
  num_segments: int,
  *,
  name: str = 'segment_ids',
  advice: str | None = None,
) -> None:
  """Checks on the host that ids lie in [0, num_segments).

  Args:
    segment_ids: [n] integers, concrete.
    num_segments: number of segments (tokens).
    name: argument name for the message.
    advice: what to do; None means that of the segment operations.

  Raises:
    ValueError: naming the first offending position.
  """
  ids = np.asarray(segment_ids)
  bad = np.flatnonzero((ids < 0) | (ids >= num_segments))
  if bad.size:
    advice = advice or (
      f'give num_segments >= {ids.max() + 1} or mask the row with an id in '
      'range'
    )
    raise ValueError(
      f'{name}: expected ids in [0, {num_segments}), got {ids[bad[0]]} at '
      f'position {bad[0]}; {advice}'
    )


def validate_sorted(
  ids: Any,
  *,
  name: str = 'segment_ids',
  advice: str = 'sort the rows or pass indices_are_sorted=False',
) -> None:
  """Checks on the host that ids never decrease.

  Args:
    ids: [n] integers, concrete.
    name: argument name for the message.
    advice: what to do.

  Raises:
    ValueError: naming the first position where they decrease.
  """
  ids = np.asarray(ids)
  drops = np.flatnonzero(ids[1:] < ids[:-1])
  if drops.size:
    at = int(drops[0])
    raise ValueError(
      f'{name}: promised sorted, but {ids[at]} at position {at} is followed '
      f'by {ids[at + 1]}; {advice}'
    )


def validate_rotations(
  rotation: Any, *, name: str = 'rotation', tolerance: float = 1e-3
) -> None:
  """Checks on the host that matrices are proper rotations.

  Args:
    rotation: [..., 3, 3], concrete.
    name: argument name for the message.
    tolerance: largest allowed entry of |R^T R - 1|.

  Raises:
    ValueError: naming the worst matrix and its error.
  """
  matrices = np.asarray(rotation, np.float64)
  error = np.abs(np.swapaxes(matrices, -1, -2) @ matrices - np.eye(3)).max(
    (-1, -2), initial=0.0
  )
  if error.size and not error.max() <= tolerance:
    at = list(map(int, np.unravel_index(np.argmax(error), error.shape)))
    raise ValueError(
      f'{name}: expected orthonormal matrices, but '
      f'{name}{at or ""} is off by {error.max():.2g}'
    )
  if np.any(np.linalg.det(matrices) < 0):
    raise ValueError(f'{name}: expected rotations, got a reflection (det < 0)')
