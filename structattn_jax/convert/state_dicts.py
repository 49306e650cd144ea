"""State dicts of PyTorch models as Haiku parameters, by strict name tables.

A table has one `Entry` for every name that a model has: the axes of the tensor
in PyTorch's order, and where it goes. Sizes are not given but found: each axis
that has a size in it votes for that size, so that one wrong tensor is blamed
and not all the others. Everything that does not fit is in one error.
"""

import collections
import dataclasses
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import haiku as hk
import jax.numpy as jnp
import numpy as np

from structattn_jax import checkpoint
from structattn_jax.checkpoint import CheckpointError
from structattn_jax.common import base_config, files
from structattn_jax.convert import torch_file

Weights = Literal['model', 'ema']
# Arrays of safetensors and npz files are in memory, tensors of PyTorch's not.
Value = torch_file.Tensor | np.ndarray
State = Mapping[str, Value]

_MAX_DEPTH = 50  # Of settings.
_MAX_LAYERS = 1000  # Of a model; a table has some entries for each.
_FLOATS = (np.float16, jnp.bfloat16, np.float32)


class MissingPartError(CheckpointError):
  """A file has nothing of the part that is asked for."""


class DeadParametersWarning(UserWarning):
  """Parameters were left out that upstream has but never uses."""


@dataclasses.dataclass(frozen=True)
class Loaded:
  """What a converter takes from a file.

  Attributes:
    config: configuration of the module.
    params: Haiku parameters as float32 NumPy arrays.
    notes: what else the file says about them, text by name.
  """

  config: base_config.BaseConfig
  params: hk.Params
  notes: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of a state dict.

  Attributes:
    axes: lengths in PyTorch's order, separated by blanks: numbers, names of
      sizes, or '4*c', '2*c+71'.
    target: 'module//name' of ours. None for a copy.
    transpose: whether ours is [in, out].
    columns: how many of the last axis are kept; None keeps all.
    layer: index along the leading axis of a stack of layers; None if ours is
      not stacked.
    copy_of: name of the tensor that this one must be equal to.
  """

  axes: str
  target: str | None
  transpose: bool = False
  columns: int | None = None
  layer: int | None = None
  copy_of: str | None = None


Table = dict[str, Entry]


def linear(
  name: str,
  target: str,
  num_out: str,
  num_in: str,
  *,
  bias: bool = False,
  layer: int | None = None,
  columns: int | None = None,
) -> Table:
  """A linear layer; ours has `weights` [in, out] and perhaps `bias`."""
  table = {
    f'{name}.weight': Entry(
      f'{num_out} {num_in}', f'{target}//weights', True, columns, layer
    )
  }
  if bias:
    table[f'{name}.bias'] = Entry(num_out, f'{target}//bias', layer=layer)
  return table


def norm(
  name: str,
  target: str,
  channels: str,
  *,
  offset: bool = True,
  layer: int | None = None,
) -> Table:
  """A layer norm; ours has `scale` and perhaps `offset`."""
  table = {f'{name}.weight': Entry(channels, f'{target}//scale', layer=layer)}
  if offset:
    table[f'{name}.bias'] = Entry(channels, f'{target}//offset', layer=layer)
  return table


def read(path: checkpoint.Path) -> Any:
  """The content of a PyTorch, safetensors or npz file; nothing is executed.

  Raises:
    CheckpointError: if the file cannot be read, is damaged or of another kind.
    ImportError: if it is a safetensors file and the package is not installed.
  """
  if not checkpoint.is_zip(path):
    start = checkpoint.first_bytes(path, 16)
    if start[8:9] == b'{':
      arrays, _ = checkpoint.read_safetensors(path)
      return arrays
    return torch_file.load(path)  # Says what is wrong.
  if torch_file.is_torch_file(path):
    return torch_file.load(path)
  return checkpoint.read_npz(path)


def model_of(tree: Any) -> Any:
  """The state dict in what training wrote; the tree itself if it is bare."""
  if isinstance(tree, dict):
    for key in ('state_dict', 'model', 'model_state_dict'):
      if isinstance(tree.get(key), dict):
        return tree[key]
  return tree


def state_of(path: checkpoint.Path, tree: Any, where: str = '') -> State:
  """Checks that a part of a file is a state dict.

  Names are freed from what training wraps around modules: 'module.' in front
  (parallel training) and '_orig_mod.' anywhere (compiled modules).

  Args:
    path: file, for messages.
    tree: the part.
    where: its name, for messages.

  Returns:
    Tensors by name; entries that are none are left out.

  Raises:
    CheckpointError: if it is not a dictionary, or has names twice.
  """
  text = f'{where!r} ' if where else ''
  if not isinstance(tree, dict) or not all(isinstance(k, str) for k in tree):
    raise CheckpointError(f'{path}: {text}is not a state dict')
  tensors = {
    name.replace('_orig_mod.', ''): (name, value)
    for name, value in tree.items()
    if isinstance(value, Value)
  }
  names = collections.Counter(name.replace('_orig_mod.', '') for name in tree)
  twice = sorted(name for name, count in names.items() if count > 1)
  if twice:
    raise CheckpointError(
      f'{path}: {text}has names twice: {files.listed(twice)}'
    )
  wrapped = all(name.startswith('module.') for name in tensors)
  return {
    name.removeprefix('module.') if wrapped else name: value
    for name, (_, value) in tensors.items()
  }


def below(state: State, prefix: str) -> dict[str, Value]:
  """The entries below a prefix, which ends in a dot, without it."""
  return {
    name.removeprefix(prefix): value
    for name, value in state.items()
    if name.startswith(prefix)
  }


def num_layers(names: Iterable[str], prefix: str) -> int:
  """How many layers 'prefix.0', 'prefix.1', ... there are.

  If some in between are missing, or there are more than any model has, the
  table will not have the same names.
  """
  pattern = re.compile(rf'{re.escape(prefix)}\.(\d+)\.')
  found = {match[1] for name in names if (match := pattern.match(name))}
  return min(len(found), _MAX_LAYERS)


def shadow(
  path: checkpoint.Path,
  state: State,
  averages: Any,
  frozen: Sequence[Sequence[str]] = ((),),
) -> dict[str, Value]:
  """A state dict with its moving averages, which are a list without names.

  The list has the parameters in the order of the state dict: no buffers, each
  shared tensor once, nothing that was frozen.

  Args:
    path: file, for messages.
    state: the model, without buffers.
    averages: `shadow_params` of the file.
    frozen: alternatives for what was frozen, each as parts of names; the first
      with which number and shapes agree is taken.

  Returns:
    The state dict; frozen parameters have their own values.

  Raises:
    CheckpointError: if there is no alternative that fits, or several.
  """
  if not isinstance(averages, list) or not all(
    isinstance(value, Value) for value in averages
  ):
    raise CheckpointError(f'{path}: the moving averages are no list of tensors')
  owners: dict[Any, str] = {}
  for name, value in state.items():
    owners.setdefault(_identity(value), name)
  shapes = [tuple(value.shape) for value in averages]
  fits = []
  for parts in frozen:
    names = [
      name
      for name in owners.values()
      if not any(part in name for part in parts)
    ]
    if [tuple(state[name].shape) for name in names] == shapes:
      fits.append(names)
      if not parts:
        break
  if len(fits) != 1:
    raise CheckpointError(
      f'{path}: {len(averages)} moving averages, which fit the {len(owners)} '
      f'parameters in {len(fits)} ways; take weights="model"'
    )
  (names,) = fits
  found = dict(zip(names, averages, strict=True))
  return {
    name: found.get(owners[_identity(value)], value)
    for name, value in state.items()
  }


def convert(
  path: checkpoint.Path,
  what: str,
  state: State,
  table: Table,
  *,
  prefix: str = '',
  allow_nan: bool = False,
) -> tuple[dict[str, int], hk.Params]:
  """Takes every tensor of a state dict, by a table.

  Args:
    path: file, for messages.
    what: what the table describes, for messages.
    state: the tensors, all of which must be in the table.
    table: the names, all of which must be in the state.
    prefix: of the names in the file, for messages.
    allow_nan: whether values may be infinite or no numbers.

  Returns:
    The sizes that occur in the table, and the parameters in float32.

  Raises:
    CheckpointError: listing all that does not fit.
  """
  known = {name: value for name, value in state.items() if name in table}
  sizes = _sizes(table, known)
  problems = [f'missing {prefix}{name}' for name in table if name not in state]
  problems += [f'unknown {prefix}{name}' for name in state if name not in table]
  for name, value in known.items():
    axes = [_Axis.parse(text) for text in table[name].axes.split()]
    if not _fits(axes, value.shape, sizes):
      lengths = [axis.length(sizes) for axis in axes]
      expected = f'[{", ".join(table[name].axes.split())}]'
      if None not in lengths and _shape(lengths) != expected:
        expected = f'{_shape(lengths)} = {expected}'
      problems.append(
        f'wrong {prefix}{name} has shape {_shape(value.shape)}, expected '
        f'{expected}'
      )
    if value.dtype not in _FLOATS:
      problems.append(
        f'wrong {prefix}{name} has dtype {value.dtype}, expected float32'
      )
    if isinstance(value, torch_file.Tensor) and value.is_expanded:
      problems.append(f'wrong {prefix}{name} repeats its elements')
  if problems:
    raise CheckpointError(
      f'{path}: does not fit the {what} parameters: {files.listed(problems)}'
    )
  # Many small tensors can be views of one large storage.
  memory = sum(4 * math.prod(value.shape) for value in known.values())
  files.check_unfolded(path, os.path.getsize(path), memory, CheckpointError)
  values = {name: array(value) for name, value in known.items()}
  for name, entry in table.items():
    if entry.copy_of and not np.array_equal(
      values[name], values[entry.copy_of]
    ):
      problems.append(f'{prefix}{name} differs from {prefix}{entry.copy_of}')
  if problems:
    raise CheckpointError(
      f'{path}: tensors that are one in the model: {files.listed(problems)}'
    )
  if not allow_nan:
    checkpoint.check_finite(
      path, {f'{prefix}{name}': value for name, value in values.items()}
    )
  return sizes, _params(table, values)


def array(value: Value) -> np.ndarray:
  """The values, float32 if they are floats of at most 32 bits.

  Raises:
    CheckpointError: if a tensor of a file has more elements than its storage.
  """
  if isinstance(value, torch_file.Tensor) and value.is_expanded:
    value.fail('repeats its elements')
  values = value.array() if isinstance(value, torch_file.Tensor) else value
  return values.astype(np.float32) if values.dtype in _FLOATS else values


def plain(value: Any) -> Any:
  """Settings with omegaconf's containers unwrapped.

  Its objects keep the content in `_content`, leaves in `_val`. What contains
  itself, or lies deeper than settings do, is left as it is.
  """
  return _plain(value, {}, _MAX_DEPTH)


def _plain(value: Any, done: dict[int, Any], depth: int) -> Any:
  # Each object once: a small file can have very many paths.
  if id(value) in done or not depth:
    return done.get(id(value), value)
  done[id(value)] = result = value
  if isinstance(value, torch_file.Record) and isinstance(value.state, dict):
    for key in ('_content', '_val'):
      if key in value.state:
        result = _plain(value.state[key], done, depth - 1)
        break
  elif isinstance(value, dict):
    result = {key: _plain(x, done, depth - 1) for key, x in value.items()}
  elif isinstance(value, list | tuple):
    result = [_plain(x, done, depth - 1) for x in value]
  done[id(value)] = result
  return result


def warn_dead(path: checkpoint.Path, names: Sequence[str], why: str) -> None:
  """Warns that parameters are left out, naming them."""
  if names:
    warnings.warn(
      f'{path}: left out, {why}: {files.listed(names, ", ")}',
      DeadParametersWarning,
      stacklevel=3,
    )


class _Axis(NamedTuple):
  """factor * size + offset, or a number."""

  factor: int
  size: str | None
  offset: int

  @classmethod
  def parse(cls, text: str) -> '_Axis':
    if text.isdigit():
      return cls(0, None, int(text))
    match = re.fullmatch(r'(?:(\d+)\*)?([a-z_]+)(?:\+(\d+))?', text)
    if match is None:
      raise ValueError(f'axes: {text!r} is not factor*size+offset')
    return cls(int(match[1] or 1), match[2], int(match[3] or 0))

  def length(self, sizes: Mapping[str, int]) -> int | None:
    """The length, or None if the size is not known."""
    if self.size is None:
      return self.offset
    size = sizes.get(self.size)
    return None if size is None else self.factor * size + self.offset

  def solve(self, length: int) -> int | None:
    """The size that gives this length, if there is one above 0."""
    if self.size is None:
      return None
    size, rest = divmod(length - self.offset, self.factor)
    return size if size > 0 and not rest else None


def _sizes(table: Table, state: State) -> dict[str, int]:
  """For each size the value that most axes agree on."""
  votes: dict[str, collections.Counter[int]] = collections.defaultdict(
    collections.Counter
  )
  for name, value in state.items():
    axes = [_Axis.parse(text) for text in table[name].axes.split()]
    if len(axes) == len(value.shape):
      for axis, length in zip(axes, value.shape, strict=True):
        size = axis.solve(length)
        if axis.size is not None and size is not None:
          votes[axis.size][size] += 1
  return {name: count.most_common(1)[0][0] for name, count in votes.items()}


def _fits(
  axes: Sequence[_Axis], shape: Sequence[int], sizes: Mapping[str, int]
) -> bool:
  return len(axes) == len(shape) and all(
    axis.length(sizes) == length
    for axis, length in zip(axes, shape, strict=True)
  )


def _params(table: Table, values: Mapping[str, np.ndarray]) -> hk.Params:
  stacks: dict[str, dict[int, np.ndarray]] = {}
  arrays: dict[str, np.ndarray] = {}
  for name, entry in table.items():
    if entry.target is not None:
      value = values[name][..., : entry.columns]
      value = np.ascontiguousarray(value.T if entry.transpose else value)
      if entry.layer is None:
        arrays[entry.target] = value
      else:
        stacks.setdefault(entry.target, {})[entry.layer] = value
  for target, layers in stacks.items():
    arrays[target] = np.stack([layers[i] for i in sorted(layers)])
  params: dict[str, Any] = {}
  for target, value in arrays.items():
    module, _, name = target.rpartition('//')
    params.setdefault(module, {})[name] = value
  return params


def _identity(value: Value) -> Any:
  """Equal for tensors that are one."""
  if isinstance(value, torch_file.Tensor):
    return (value.storage, value.offset, value.shape, value.stride)
  return id(value)


def _shape(shape: Iterable[object]) -> str:
  return f'[{", ".join(map(str, shape))}]'
