"""AlphaFold 2 parameters: the structure module or its attention alone.

Reads the official `params_model_*.npz` (monomer, ptm and multimer): flat npz
files with float32 arrays called `scope//name`. Our modules have upstream's
names and shapes, so nothing is renamed below the scope and nothing is
transposed. The monomer's and ptm's structure modules are the same.

Sizes and the parameterisation are read off the names and shapes. A file cannot
say, because no parameter depends on it: how often the fold iteration runs (8
as published), dropout, and the length unit (10 A for the monomer, 20 A for the
multimer); these keep the defaults of the published models.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import haiku as hk
import numpy as np

from structattn_jax import checkpoint
from structattn_jax.checkpoint import CheckpointError
from structattn_jax.common import files
from structattn_jax.network.alphafold2 import invariant_point_attention as ipa
from structattn_jax.network.alphafold2 import structure_module

STRUCTURE_MODULE_SCOPE = 'alphafold/alphafold_iteration/structure_module'
IPA_SCOPE = f'{STRUCTURE_MODULE_SCOPE}/fold_iteration/invariant_point_attention'

Variant = Literal['monomer', 'multimer']
Sizes = Mapping[str, int | None]

# The order in which sizes are found: each needs only those before it.
_SIZES = (
  'num_head',
  'c',
  'c_s',
  'c_z',
  'c_sidechain',
  'num_scalar_qk',
  'num_point_qk',
  'num_point_v',
  'num_scalar_v',
  'num_channel',
)


@dataclasses.dataclass(frozen=True)
class Dim:
  """One axis: factor * (number of heads, if per head) * sum of sizes.

  Attributes:
    terms: how often each size occurs in the sum.
    factor: constant factor.
    per_head: whether there is one such block for each head.
    constant: added; the whole length of an axis of fixed length.
  """

  terms: Mapping[str, int]
  factor: int = 1
  per_head: bool = False
  constant: int = 0

  def unknown(self, sizes: Sizes) -> int:
    """How many of the sizes in it are not known."""
    names = [*self.terms, *['num_head'] * self.per_head]
    return sum(sizes.get(name) is None for name in names)

  def value(self, sizes: Sizes) -> int | None:
    """The length, or None if a size is not known."""
    if self.unknown(sizes):
      return None
    terms = [count * (sizes[name] or 0) for name, count in self.terms.items()]
    return self._multiple(sizes) * sum(terms) + self.constant

  def solve(self, name: str, length: int, sizes: Sizes) -> int | None:
    """The size `name` that gives this length, if there is one above 0."""
    if name not in self.terms or self.unknown({**sizes, name: 1}):
      return None
    # Linear in the size: from its values at 0 and 1.
    offset = self.value({**sizes, name: 0}) or 0
    slope = (self.value({**sizes, name: 1}) or 0) - offset
    size, rest = divmod(length - offset, slope)
    return size if size > 0 and not rest else None

  def _multiple(self, sizes: Sizes) -> int:
    return self.factor * ((sizes['num_head'] or 0) if self.per_head else 1)

  def __str__(self) -> str:
    terms = [
      name if count == 1 else f'{count} {name}'
      for name, count in self.terms.items()
    ]
    if not terms:
      return str(self.constant)
    text = ' + '.join(terms)
    if len(terms) > 1 and (self.per_head or self.factor > 1):
      text = f'({text})'
    factors = [str(self.factor)] * (self.factor > 1)
    factors += ['num_head'] * self.per_head
    return ' * '.join([*factors, text])


Table = dict[str, tuple[Dim, ...]]


def _dim(*names: str, factor: int = 1, per_head: bool = False) -> Dim:
  return Dim(dict(collections.Counter(names)), factor, per_head)


def _fixed(length: int) -> Dim:
  return Dim({}, constant=length)


def _linear(
  name: str, inputs: Dim, *outputs: Dim, bias: bool = True
) -> Iterator[tuple[str, tuple[Dim, ...]]]:
  # The bias first: it has one axis, so it cannot be mistaken for another.
  if bias:
    yield f'{name}//bias', outputs
  yield f'{name}//weights', (inputs, *outputs)


def _layer_norm(
  name: str, channels: Dim
) -> Iterator[tuple[str, tuple[Dim, ...]]]:
  yield f'{name}//scale', (channels,)
  yield f'{name}//offset', (channels,)


def ipa_table(variant: Variant) -> Table:
  """Every parameter of the attention with its axes."""
  head, single, pair = _dim('num_head'), _dim('c'), _dim('c_z')
  qk, v = 'num_scalar_qk', 'num_scalar_v'
  p_qk, p_v = 'num_point_qk', 'num_point_v'
  table: Table = {'//trainable_point_weights': (head,)}
  if variant == 'monomer':
    for name, factor, sizes in (
      ('q_scalar', 1, (qk,)),
      ('kv_scalar', 1, (qk, v)),
      ('q_point_local', 3, (p_qk,)),
      ('kv_point_local', 3, (p_qk, p_v)),
    ):
      output = _dim(*sizes, factor=factor, per_head=True)
      table.update(_linear(name, single, output))
  else:
    for name, size in (('q', qk), ('k', qk), ('v', v)):
      table.update(
        _linear(
          f'{name}_scalar_projection', single, head, _dim(size), bias=False
        )
      )
    for name, size in (('q', p_qk), ('k', p_qk), ('v', p_v)):
      table.update(
        _linear(
          f'{name}_point_projection/point_projection',
          single,
          head,
          _dim(size, factor=3),
        )
      )
  table.update(_linear('attention_2d', pair, head))
  # [sum a v, x, y, z and norm of the points, sum a z] of each head.
  features = _dim(v, *[p_v] * 4, 'c_z', per_head=True)
  table.update(_linear('output_projection', features, _dim('num_channel')))
  return table


def structure_module_table(variant: Variant) -> Table:
  """Every parameter of the structure module with its axes."""
  outer, single, pair = _dim('c_s'), _dim('c'), _dim('c_z')
  side = _dim('c_sidechain')
  fold = 'fold_iteration'
  table: Table = {}
  table.update(_layer_norm('single_layer_norm', outer))
  table.update(_linear('initial_projection', outer, single))
  table.update(_layer_norm('pair_layer_norm', pair))
  for name, dims in ipa_table(variant).items():
    # The attention adds to its own input.
    dims = tuple(single if dim == _dim('num_channel') else dim for dim in dims)
    separator = '' if name.startswith('//') else '/'
    table[f'{fold}/invariant_point_attention{separator}{name}'] = dims
  for name in ('attention_layer_norm', 'transition_layer_norm'):
    table.update(_layer_norm(f'{fold}/{name}', single))
  for name in ('transition', 'transition_1', 'transition_2'):
    table.update(_linear(f'{fold}/{name}', single, single))
  update = 'affine_update' if variant == 'monomer' else 'quat_rigid/rigid'
  table.update(_linear(f'{fold}/{update}', single, _fixed(6)))
  rigid = f'{fold}/rigid_sidechain'
  table.update(_linear(f'{rigid}/input_projection', single, side))
  table.update(_linear(f'{rigid}/input_projection_1', outer, side))
  for name in ('resblock1', 'resblock2', 'resblock1_1', 'resblock2_1'):
    table.update(_linear(f'{rigid}/{name}', side, side))
  table.update(_linear(f'{rigid}/unnormalized_angles', side, _fixed(14)))
  return table


@files.guarded(CheckpointError)
def load_ipa(
  path: checkpoint.Path, *, scope: str = IPA_SCOPE, allow_nan: bool = False
) -> tuple[ipa.InvariantPointAttentionConfig, hk.Params]:
  """Reads invariant point attention from an AlphaFold 2 checkpoint.

  Args:
    path: `params_model_*.npz` or a file like it.
    scope: module path of the attention in the file.
    allow_nan: whether values may be infinite or no numbers.

  Returns:
    The configuration, and parameters as float32 NumPy arrays for
    `transform_ipa(config)`.

  Raises:
    CheckpointError: if the file is damaged or foreign; if entries are missing,
      unknown or of a wrong shape or dtype, listing them; or if values are not
      finite.
  """
  variant, arrays, sizes = _read(path, scope, ipa_table, allow_nan)
  config = ipa.InvariantPointAttentionConfig(
    parameterisation=variant,
    num_channel=sizes['num_channel'],
    **_ipa_sizes(sizes),
  )
  return config, _params(arrays, 'invariant_point_attention')


@files.guarded(CheckpointError)
def load_structure_module(
  path: checkpoint.Path,
  *,
  scope: str = STRUCTURE_MODULE_SCOPE,
  allow_nan: bool = False,
) -> tuple[structure_module.StructureModuleConfig, hk.Params]:
  """Reads the structure module from an AlphaFold 2 checkpoint.

  Args:
    path: `params_model_*.npz` or a file like it.
    scope: module path of the structure module in the file.
    allow_nan: whether values may be infinite or no numbers.

  Returns:
    The configuration, with the published number of iterations, dropout and
    position scale of the variant found; and parameters as float32 NumPy arrays
    for `transform_structure_module(config)`.

  Raises:
    CheckpointError: as `load_ipa`.
  """
  variant, arrays, sizes = _read(path, scope, structure_module_table, allow_nan)
  make = {
    'monomer': structure_module.StructureModuleConfig,
    'multimer': structure_module.StructureModuleConfig.multimer,
  }[variant]
  side = structure_module.SideChainConfig(num_channel=sizes['c_sidechain'])
  config = make(num_channel=sizes['c'], sidechain=side, **_ipa_sizes(sizes))
  return config, _params(arrays, 'structure_module')


def _ipa_sizes(sizes: Mapping[str, int]) -> dict[str, Any]:
  names = ('head', 'scalar_qk', 'scalar_v', 'point_qk', 'point_v')
  return {f'num_{name}': sizes[f'num_{name}'] for name in names}


def _params(arrays: Mapping[str, np.ndarray], module: str) -> hk.Params:
  params: dict[str, Any] = {}
  for key, array in arrays.items():
    path, _, name = key.rpartition('//')
    params.setdefault(f'{module}/{path}' if path else module, {})[name] = array
  return params


def _read(
  path: checkpoint.Path,
  scope: str,
  make_table: Callable[[Variant], Table],
  allow_nan: bool,
) -> tuple[Variant, dict[str, np.ndarray], dict[str, int]]:
  """Reads everything below `scope` and checks it against the table."""
  scope = scope.strip('/')
  names = checkpoint.npz_names(path)
  # Names as in the table to names in the file.
  local = {_local(name, scope): name for name in names if _below(name, scope)}
  if not local:
    raise CheckpointError(
      f'{path}: not an AlphaFold 2 checkpoint: nothing is called {scope}/...; '
      f'{_examples(names)}'
    )
  tables: dict[Variant, Table] = {
    'monomer': make_table('monomer'),
    'multimer': make_table('multimer'),
  }
  shared = tables['monomer'].keys() & tables['multimer'].keys()
  marks = {
    variant: len(local.keys() & (table.keys() - shared))
    for variant, table in tables.items()
  }
  variant = max(tables, key=lambda variant: marks[variant])
  if not marks[variant]:
    raise CheckpointError(
      f'{path}: below {scope or "the root"} are neither the parameters of the '
      f'monomer nor those of the multimer; {_examples(local)}'
    )
  arrays = checkpoint.read_npz(path, set(local.values()))
  arrays = {name: arrays[full] for name, full in local.items()}
  problems, sizes = _check(tables[variant], arrays)
  if problems:
    listed = [
      f'{what} {_full(name, scope)}{detail}' for what, name, detail in problems
    ]
    raise CheckpointError(
      f'{path}: does not fit the {variant} parameters: {files.listed(listed)}'
    )
  if not allow_nan:
    checkpoint.check_finite(
      path, {_full(name, scope): array for name, array in arrays.items()}
    )
  return variant, arrays, sizes


def _below(name: str, scope: str) -> bool:
  return not scope or name.startswith(f'{scope}/')


def _local(name: str, scope: str) -> str:
  """Relative to the scope; its own parameters start with '//'."""
  name = name[len(scope) :]
  return name if name.startswith('//') else name.removeprefix('/')


def _full(name: str, scope: str) -> str:
  return f'{scope}{"" if name.startswith("//") or not scope else "/"}{name}'


def _examples(names: Iterable[str]) -> str:
  names = list(names)
  if not names:
    return 'the file is empty'
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return f'the file holds {", ".join(names[:3])}{more}'


def _check(
  table: Table, arrays: Mapping[str, np.ndarray]
) -> tuple[list[tuple[str, str, str]], dict[str, int]]:
  """All that is wrong, and the sizes, which are complete if nothing is."""
  problems = [('missing', name, '') for name in table if name not in arrays]
  problems += [('unknown', name, '') for name in arrays if name not in table]
  known = {name: array for name, array in arrays.items() if name in table}
  shapes = {name: array.shape for name, array in known.items()}
  sizes = _solve(table, shapes, {}, [s for s in _SIZES if _occurs(s, table)])
  for name, array in known.items():
    if not _fits(table[name], array.shape, sizes):
      expected = _expected(table[name], sizes)
      detail = f' has shape {_shape(array.shape)}, expected {expected}'
      problems.append(('wrong', name, detail))
    if array.dtype != np.float32:
      detail = f' has dtype {array.dtype}, expected float32'
      problems.append(('wrong', name, detail))
  return problems, {name: size for name, size in sizes.items() if size}


def _solve(
  table: Table,
  shapes: Mapping[str, tuple[int, ...]],
  sizes: Sizes,
  wanted: Sequence[str],
) -> Sizes:
  """The sizes with which most entries agree.

  In a good file every entry says the same. In a bad one each size has at most
  two candidates, the most frequent ones, and all combinations are tried, so
  that the wrong entry is blamed and not those that agree with each other.
  """
  if not wanted:
    return sizes
  name, *rest = wanted
  votes: collections.Counter[int] = collections.Counter()
  for entry, shape in shapes.items():
    if len(shape) == len(table[entry]):
      for dim, length in zip(table[entry], shape, strict=True):
        size = dim.solve(name, length, sizes)
        if size is not None:
          votes[size] += 1
  candidates: list[int | None] = [size for size, _ in votes.most_common(2)]
  solutions = [
    _solve(table, shapes, {**sizes, name: candidate}, rest)
    for candidate in candidates or [None]
  ]
  return min(
    solutions,
    key=lambda found: sum(
      not _fits(table[entry], shape, found) for entry, shape in shapes.items()
    ),
  )


def _fits(dims: Sequence[Dim], shape: Sequence[int], sizes: Sizes) -> bool:
  if len(shape) != len(dims):
    return False
  for dim, length in zip(dims, shape, strict=True):
    # No positive size solves for this axis, else it would be known.
    unsolvable = dim.value(sizes) is None and dim.unknown(sizes) == 1
    if unsolvable or dim.value(sizes) not in (None, length):
      return False
  return True


def _occurs(name: str, table: Table) -> bool:
  return any(name in dim.terms for dims in table.values() for dim in dims)


def _shape(shape: Iterable[object]) -> str:
  return f'[{", ".join(map(str, shape))}]'


def _expected(dims: Sequence[Dim], sizes: Sizes) -> str:
  names = _shape(dims)
  lengths = [dim.value(sizes) for dim in dims]
  if None in lengths:
    return names
  numbers = _shape(lengths)
  return numbers if numbers == names else f'{numbers} = {names}'
