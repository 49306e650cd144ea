"""Tests of symmetry and padding for any model, not only those in this library.

Each tool calls a function on original and changed inputs, raises
`AssertionError` if the outputs disagree, and returns the measured error, so
that a report can print it:

    >>> def mean_distance(rotation, translation):
    ...   del rotation
    ...   offsets = translation[:, None] - translation[None]
    ...   return jnp.mean(jnp.sqrt(jnp.sum(offsets**2, -1) + 1e-8))
    >>> frames = geometry.random_rotation(jax.random.key(0), (5,))
    >>> error = assert_se3_invariant(
    ...   mean_distance, frames, jnp.ones((5, 3)), key=jax.random.key(1)
    ... )
    >>> error < 1e-5
    True

What changes is drawn on the host in float64 from `key`, so a failure repeats.
Outputs are any pytree of arrays. A test passes trivially when everything is
zero, as with freshly initialised models whose last layer starts at zero; the
tools refuse that and ask for random parameters. Wrap `fn` in `jax.jit` when it
is slow: the tools call it with a few shapes only.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax import geometry
from structattn_jax.geometry import rotation as rotation_lib

Axes = int | tuple[int, ...]


def assert_se3_invariant(
  fn: Callable[[jax.Array, jax.Array], Any],
  rotation: jax.typing.ArrayLike,
  translation: jax.typing.ArrayLike,
  *,
  key: jax.Array,
  shift: float = 100.0,
  num_samples: int = 2,
  tolerance: float = 1e-5,
) -> float:
  """Asserts that moving all frames together does not change the output.

  Compares fn(R_i, t_i) with fn(R R_i, R t_i + t) for uniform random R and t of
  length `shift` in a random direction. Moved frames are computed in float64
  and rounded to the dtype of the input. That rounding alone moves coordinates
  by up to 4e-6 at 100 in float32; it is part of the measured error.

  Args:
    fn: maps ([..., n, 3, 3], [..., n, 3]) to a pytree of arrays.
    rotation: [..., n, 3, 3] float, orthonormal.
    translation: [..., n, 3] float, any unit.
    key: PRNG key.
    shift: length of the global translation, in the unit of `translation`.
    num_samples: number of random moves.
    tolerance: largest allowed error.

  Returns:
    Largest absolute difference divided by the largest absolute value of the
    same output array; of the worst array and sample.

  Raises:
    AssertionError: if the error is larger than `tolerance`, naming the output.
    ValueError: if the inputs are not frames.
  """
  moves = _random_moves(key, rotation, translation, shift, num_samples)
  expected = fn(jnp.asarray(rotation), jnp.asarray(translation))
  pairs = [(expected, fn(*moved)) for _, _, moved in moves]
  return _compare('assert_se3_invariant', 'random move', pairs, tolerance)


def assert_se3_equivariant(
  fn: Callable[[jax.Array, jax.Array], Any],
  rotation: jax.typing.ArrayLike,
  translation: jax.typing.ArrayLike,
  *,
  key: jax.Array,
  shift: float = 100.0,
  num_samples: int = 2,
  tolerance: float = 1e-5,
) -> float:
  """Asserts that the output moves together with the frames.

  Compares fn(T frames) with T fn(frames) for random rigid moves T, drawn as in
  `assert_se3_invariant`. Arrays in the output are points and move as R x + t;
  `geometry.Rigid` objects are frames and move as T @ frame. Displacements,
  which turn but do not shift, can be returned as points added to a centroid.

    >>> def midpoints(rotation, translation):
    ...   del rotation
    ...   return (translation[1:] + translation[:-1]) / 2
    >>> frames = geometry.random_rotation(jax.random.key(0), (5,))
    >>> points = jax.random.normal(jax.random.key(1), (5, 3))
    >>> error = assert_se3_equivariant(
    ...   midpoints, frames, points, key=jax.random.key(2), tolerance=1e-4
    ... )

  Args:
    fn: maps ([..., n, 3, 3], [..., n, 3]) to a pytree of points [..., 3] and
      `Rigid` objects, in the unit of `translation`.
    rotation: [..., n, 3, 3] float, orthonormal.
    translation: [..., n, 3] float, any unit.
    key: PRNG key.
    shift: length of the global translation, in the unit of `translation`.
    num_samples: number of random moves.
    tolerance: largest allowed error.

  Returns:
    Largest absolute difference, of the worst array and sample. For points and
    translations it is divided by their size: the largest distance of the
    unmoved output points from their centroid (of the input translations where
    that is zero, as for a single point), so that it does not depend on `shift`
    or on where the complex lies. Rotation matrices are not scaled.

  Raises:
    AssertionError: if the error is larger than `tolerance`, naming the output.
    ValueError: if the inputs are not frames, or an output is not points.
  """
  moves = _random_moves(key, rotation, translation, shift, num_samples)
  original = fn(jnp.asarray(rotation), jnp.asarray(translation))
  input_size = _size(translation) or 1.0
  scales = {}
  for path, leaf in jax.tree.leaves_with_path(original, is_leaf=_is_rigid):
    name = _name(path)
    if _is_rigid(leaf):
      scales[f'{name}.rotation'] = 1.0
      name, leaf = f'{name}.translation', leaf.translation
    rotation_lib.check_trailing(**{name: (leaf, '3')})
    scales[name] = _size(leaf) or input_size
  pairs = []
  for turn, offset, moved in moves:
    move = functools.partial(_move, turn=turn, offset=offset)
    expected = jax.tree.map(move, original, is_leaf=_is_rigid)
    pairs.append((expected, fn(*moved)))
  return _compare(
    'assert_se3_equivariant', 'random move', pairs, tolerance, scales
  )


def assert_permutation_equivariant(
  fn: Callable[..., Any],
  inputs: Mapping[str, Any],
  *,
  axes: Mapping[str, Axes],
  output_axes: Any,
  key: jax.Array,
  index_of: Collection[str] = (),
  num_samples: int = 2,
  tolerance: float = 1e-5,
) -> float:
  """Asserts that reordering the rows of the inputs reorders the outputs.

  One random permutation per sample is applied to all named axes. For a pair
  representation name both axes. Inputs that are not named stay as they are.
  Integer inputs whose VALUES are row numbers of the permuted axis are listed
  in `index_of`: permuting tokens changes the values of atom_to_token, and
  permuting atoms the rows and the values of a neighbour list.

    >>> error = assert_permutation_equivariant(
    ...   lambda x, pair: {'row': pair @ x, 'sum': x.sum(0)},
    ...   {'x': np.arange(8.0).reshape(4, 2), 'pair': np.eye(4) + 1},
    ...   axes={'x': 0, 'pair': (0, 1)},
    ...   output_axes={'row': 0, 'sum': None},
    ...   key=jax.random.key(0),
    ... )

  Args:
    fn: called as fn(**inputs); returns a pytree of arrays.
    inputs: name -> argument; arrays for the names in `axes` and `index_of`.
    axes: input name -> axis or axes to permute, all of the same size n.
    output_axes: which axes of the outputs are permuted with the inputs: an int
      or a tuple of ints, None for an invariant output, or a pytree of these
      that is a prefix of the output.
    key: PRNG key.
    index_of: names of integer inputs with values in [0, n) that point to rows
      of the permuted axis; values outside, such as -1, are left alone.
    num_samples: number of random permutations.
    tolerance: largest allowed error.

  Returns:
    Largest absolute difference divided by the largest absolute value of the
    same output array; of the worst array and sample.

  Raises:
    AssertionError: if the error is larger than `tolerance`, naming the output.
    ValueError: if a name is unknown, the sizes differ or are less than two.
  """
  rng = _host_generator(key)
  size = _common_size(inputs, axes, index_of=(index_of, inputs))
  if size < 2:
    raise ValueError(f'axes: need at least 2 rows to permute, got {size}')
  output = fn(**inputs)
  spread = _spread_axes(output_axes, output)
  pairs = []
  for _ in range(num_samples):
    order = rng.permutation(size)
    while np.array_equal(order, np.arange(size)):
      order = rng.permutation(size)
    new_index = np.argsort(order)
    changed = dict(inputs)
    for name in index_of:
      values = np.asarray(inputs[name])
      valid = (values >= 0) & (values < size)
      mapped = np.where(valid, new_index[np.where(valid, values, 0)], values)
      changed[name] = jnp.asarray(mapped.astype(values.dtype))
    for name in axes:
      changed[name] = jnp.asarray(_take(changed[name], order, axes[name]))
    pairs.append((_take_rows(output, order, spread), fn(**changed)))
  return _compare(
    'assert_permutation_equivariant', 'random permutation', pairs, tolerance
  )


def assert_padding_invariant(
  fn: Callable[..., Any],
  inputs: Mapping[str, Any],
  *,
  axes: Mapping[str, Axes],
  masks: Collection[str],
  output_axes: Any,
  key: jax.Array,
  padding: int = 3,
  garbage: float = 1e3,
  fill: Mapping[str, Any] | None = None,
  tolerance: float = 1e-5,
) -> float:
  """Asserts that padded rows change nothing in the real rows.

  Appends `padding` rows to all named axes: False in masks, values of `fill`
  where given, else garbage: Gaussian numbers times `garbage`, and integers and
  booleans drawn from the range of the real ones, so that indices stay valid.
  Two checks: other garbage must not change a single bit of the real outputs,
  and the padded and the unpadded outputs must agree within `tolerance` (a
  different size may change the order of sums).

    >>> def masked_mean(x, mask):
    ...   kept = jnp.where(mask[:, None], x, 0)
    ...   return kept.sum(0) / mask.sum()
    >>> error = assert_padding_invariant(
    ...   masked_mean,
    ...   {'x': np.arange(8.0).reshape(4, 2), 'mask': np.ones(4, bool)},
    ...   axes={'x': 0, 'mask': 0},
    ...   masks=['mask'],
    ...   output_axes=None,
    ...   key=jax.random.key(0),
    ... )

  Args:
    fn: called as fn(**inputs); returns a pytree of arrays.
    inputs: name -> argument; arrays for the names in `axes`.
    axes: input name -> axis or axes to pad, all of the same size n.
    masks: names of boolean inputs that become False in the padding; each must
      be in `axes`.
    output_axes: axes of the outputs that grow with the inputs and of which the
      first n rows are compared: an int or a tuple of ints, None where the
      whole output is compared, or a pytree prefix of the output.
    key: PRNG key.
    padding: number of rows to append.
    garbage: size of random numbers in the padding.
    fill: name -> value for the padding of one input, broadcast against the
      padded array: identity matrices for rotations, the last id for sorted ids.
    tolerance: largest allowed error of padded against unpadded.

  Returns:
    Largest absolute difference between padded and unpadded, divided by the
    largest absolute value of the same output array; of the worst array.

  Raises:
    AssertionError: if garbage changes an output or the error is larger than
      `tolerance`, naming the output.
    ValueError: if a name is unknown, the sizes differ or a mask is not bool.
  """
  rng = _host_generator(key)
  fill = dict(fill or {})
  size = _common_size(inputs, axes, masks=(masks, axes), fill=(fill, axes))
  for name in masks:
    if np.asarray(inputs[name]).dtype != np.bool_:
      raise ValueError(f'{name}: expected a bool mask, True = keep')
    fill[name] = False
  output = fn(**inputs)
  spread = _spread_axes(output_axes, output)
  real = []
  for _ in range(2):
    padded = dict(inputs)
    for name in axes:
      padded[name] = jnp.asarray(
        _pad(inputs[name], axes[name], padding, garbage, fill.get(name), rng)
      )
    real.append(_take_rows(fn(**padded), np.arange(size), spread))
  first, second = map(_host_leaves, real)
  for name, value in first.items():
    if not np.array_equal(value, second[name], equal_nan=True):
      raise AssertionError(
        f'assert_padding_invariant: {name} depends on the content of masked '
        'rows: other garbage there changes it by '
        f'{np.abs(value - second[name]).max():.2g}'
      )
  what = f'padding by {padding} rows, case'
  pairs = [(output, real[0])]
  return _compare('assert_padding_invariant', what, pairs, tolerance)


def _host_generator(key: jax.Array) -> np.random.Generator:
  return np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))


def _is_rigid(node: Any) -> bool:
  return isinstance(node, geometry.Rigid)


def _name(path: tuple[Any, ...]) -> str:
  return 'output' + jax.tree_util.keystr(path)


def _host_leaves(tree: Any) -> dict[str, np.ndarray]:
  return {
    _name(path): np.asarray(leaf, np.float64)
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


def _random_moves(key, rotation, translation, shift, num_samples):
  """Returns [(R, t, (moved rotation, moved translation))]."""
  rotation_lib.check_trailing(
    rotation=(rotation, '3 3'), translation=(translation, '3')
  )
  rng = _host_generator(key)
  frames = geometry.Rigid(jnp.asarray(rotation), jnp.asarray(translation))
  moves = []
  for _ in range(num_samples):
    # The orthogonal factor of a Gaussian matrix, made unique, is uniform.
    orthogonal, triangle = np.linalg.qr(rng.normal(size=(3, 3)))
    turn = orthogonal * np.sign(np.diag(triangle))
    turn *= np.linalg.det(turn)
    offset = rng.normal(size=3)
    offset *= shift / np.linalg.norm(offset)
    moved = _move(frames, turn, offset)
    rounded = (
      jnp.asarray(moved.rotation.astype(frames.rotation.dtype)),
      jnp.asarray(moved.translation.astype(frames.translation.dtype)),
    )
    moves.append((turn, offset, rounded))
  return moves


def _move(leaf: Any, turn: np.ndarray, offset: np.ndarray) -> Any:
  """Moves points or frames in float64 on the host."""
  if _is_rigid(leaf):
    return geometry.Rigid(
      turn @ np.asarray(leaf.rotation, np.float64),
      _move(leaf.translation, turn, offset),
    )
  return np.asarray(leaf, np.float64) @ turn.T + offset


def _size(points: Any) -> float:
  """Largest distance of points [..., 3] from their centroid."""
  flat = np.asarray(points, np.float64).reshape(-1, 3)
  centroid = flat.mean(0) if len(flat) else 0
  return float(np.linalg.norm(flat - centroid, axis=-1).max(initial=0))


def _common_size(
  inputs: Mapping[str, Any],
  axes: Mapping[str, Axes],
  **names: tuple[Collection[str], Collection[str]],
) -> int:
  """Checks the names, (given, known), and returns the size of the axes."""
  for argument, (given, known) in {'axes': (axes, inputs), **names}.items():
    unknown = sorted(set(given) - set(known))
    if unknown:
      raise ValueError(
        f'{argument}: expected names among {sorted(known)}, got {unknown}'
      )
  sizes = {
    f'{name} axis {axis}': np.shape(inputs[name])[axis]
    for name, several in axes.items()
    for axis in _as_tuple(several)
  }
  if len(set(sizes.values())) != 1:
    raise ValueError(
      f'axes: expected axes of one and the same size, got {sizes}'
    )
  return next(iter(sizes.values()))


def _as_tuple(axes: Axes | None) -> tuple[int, ...]:
  if axes is None:
    return ()
  return (axes,) if isinstance(axes, int) else tuple(axes)


def _spread_axes(axes: Any, output: Any) -> list[tuple[int, ...]]:
  """Extends a prefix of axes to one tuple of axes per leaf of the output.

  `jax.tree.map` cannot do this: None is a legal entry here, and a tuple means
  several axes of one array unless the output is a tuple at that place.
  """
  num_leaves = len(jax.tree.leaves(output))
  if axes is None or isinstance(axes, int):
    return [_as_tuple(axes)] * num_leaves
  if not jax.tree_util.all_leaves([output]):
    # Goes down one level of both trees together where they have one form.
    children, treedef = jax.tree.flatten(
      output, is_leaf=lambda node: node is not output
    )
    entries = []
    with contextlib.suppress(ValueError):
      entries = treedef.flatten_up_to(axes)
    if entries:
      spread = map(_spread_axes, entries, children)
      return list(itertools.chain.from_iterable(spread))
  if isinstance(axes, tuple) and all(isinstance(axis, int) for axis in axes):
    return [axes] * num_leaves
  raise ValueError(
    'output_axes: expected ints, tuples of ints, None or a prefix of '
    f'{jax.tree.structure(output)}, got {axes!r}'
  )


def _take(array: Any, rows: np.ndarray, axes: Axes) -> np.ndarray:
  array = np.asarray(array)  # NumPy raises where JAX would fill.
  for axis in _as_tuple(axes):
    array = np.take(array, rows, axis)
  return array


def _take_rows(
  output: Any, rows: np.ndarray, spread: Sequence[tuple[int, ...]]
) -> Any:
  leaves, treedef = jax.tree.flatten_with_path(output)
  taken = []
  for (path, leaf), axes in zip(leaves, spread, strict=True):
    try:
      taken.append(_take(leaf, rows, axes))
    except (IndexError, ValueError):
      raise ValueError(
        f'output_axes: expected {len(rows)} rows or more on axes {axes} of '
        f'{_name(path)}, got shape {np.shape(leaf)}'
      ) from None
  return treedef.unflatten(taken)


def _pad(
  array: Any,
  axes: Axes,
  padding: int,
  garbage: float,
  fill: Any,
  rng: np.random.Generator,
) -> np.ndarray:
  """Returns the array with `padding` more rows of garbage along the axes."""
  array = np.asarray(array)
  shape = list(array.shape)
  for axis in _as_tuple(axes):
    shape[axis] += padding
  if fill is not None:
    new = np.broadcast_to(fill, shape).astype(array.dtype)  # A copy.
  elif jnp.issubdtype(array.dtype, jnp.floating):
    new = (garbage * rng.normal(size=shape)).astype(array.dtype)
  elif array.dtype == np.bool_:
    new = rng.integers(0, 2, shape).astype(bool)
  else:
    new = rng.integers(array.min(), array.max() + 1, shape).astype(array.dtype)
  new[tuple(map(slice, array.shape))] = array
  return new


def _compare(
  tool: str,
  what: str,
  pairs: Sequence[tuple[Any, Any]],
  tolerance: float,
  scales: Mapping[str, float] | None = None,
) -> float:
  """Returns the worst error of (expected, actual) outputs, or raises."""
  errors = []
  for sample, pair in enumerate(pairs):
    expected, actual = map(_host_leaves, pair)
    if not any(np.any(value) for value in expected.values()):
      raise AssertionError(
        f'{tool}: all outputs are zero or there are none, so nothing is tested;'
        ' use random parameters instead of a zero initialisation'
      )
    wanted, given = (
      {name: value.shape for name, value in leaves.items()}
      for leaves in (expected, actual)
    )
    if wanted != given:
      raise AssertionError(
        f'{tool}: expected outputs {wanted}, got {given} after {what} {sample}'
      )
    for name, reference in expected.items():
      # Equal infinities agree; any NaN does not.
      with np.errstate(invalid='ignore'):
        difference = np.abs(actual[name] - reference)
      difference = np.where(actual[name] == reference, 0, difference)
      largest = float(np.nan_to_num(difference, nan=np.inf).max(initial=0))
      if scales is None:
        finite = np.abs(reference[np.isfinite(reference)])
        scale = float(finite.max(initial=0)) or 1.0
      else:
        scale = scales[name]
      errors.append((largest / scale, scale, name, sample))
  error, scale, name, sample = max(errors)
  if not error <= tolerance:
    problem = 'is not finite' if np.isinf(error) else f'is off by {error:.2g}'
    raise AssertionError(
      f'{tool}: {name} {problem} relative to its scale {scale:.2g} (tolerance '
      f'{tolerance:.2g}) after {what} {sample}, the worst of {len(pairs)}'
    )
  return error
