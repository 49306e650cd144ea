"""Tables of parameters, for code that computes with a parameter tree.

A system whose upstream stacks the parameters of its blocks, or whose fast path
folds some of them into others, is written as pure functions of a Haiku
parameter tree {module: {name: array}}. Its table says which parameters there
are; Haiku modules and `init_parameters` make them from it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from structattn_jax.common import numerics
from structattn_jax.components import haiku_modules as hm

Params = Mapping[str, Mapping[str, jax.Array]]


class Parameter(NamedTuple):
  """Shape and initialiser of one array."""

  shape: tuple[int, ...]
  initializer: hk.initializers.Initializer


Table = dict[str, dict[str, Parameter]]


def module(
  params: Params, name: str, argument: str | None = None
) -> Mapping[str, jax.Array]:
  """The parameters of a module.

  Args:
    params: of a model.
    name: of the module.
    argument: what was given that needs them, for the message.

  Raises:
    ValueError: if there is no such module.
  """
  if name not in params:
    some = ', '.join(sorted(params)[:3])
    given = f'which {argument} needs, ' if argument else ''
    raise ValueError(
      f'params: expected the module {name!r}, {given}got {some}, ...'
    )
  return params[name]


def linear(
  num_input: int,
  *num_output: int,
  initializer: hm.Initializer = 'linear',
  bias: float | None = None,
) -> dict[str, Parameter]:
  """Of y[o...] = sum_c x[c] weights[c, o...] + bias[o...].

  Args:
    num_input: input channels.
    *num_output: output channels, such as n_head, d_head.
    initializer: of the weights; see `haiku_modules.initializer`.
    bias: initial value of the bias; None: no bias.
  """
  weights = hm.initializer(initializer, num_input)
  table = {'weights': Parameter((num_input, *num_output), weights)}
  if bias is not None:
    constant = hk.initializers.Constant(bias)
    table['bias'] = Parameter(tuple(num_output), constant)
  return table


def layer_norm(channels: int, *, offset: bool = False) -> dict[str, Parameter]:
  """Of a layer norm with a scale and, if asked for, an offset."""
  table = {'scale': Parameter((channels,), hk.initializers.Constant(1.0))}
  if offset:
    zero = hk.initializers.Constant(0.0)
    table['offset'] = Parameter((channels,), zero)
  return table


def stack(table: Table, *sizes: int, prefix: str = '') -> Table:
  """The table of blocks whose parameters are stacked on leading axes."""
  return {
    f'{prefix}{module}': {
      name: Parameter((*sizes, *parameter.shape), parameter.initializer)
      for name, parameter in arrays.items()
    }
    for module, arrays in table.items()
  }


def nest(table: Table, scope: str) -> Table:
  """The table of a module whose path is `scope`; `below` is the inverse.

  >>> sorted(nest({'b/c': {}, 'd': {}}, 'a/'))
  ['a/b/c', 'a/d']
  """
  return {f'{scope}{module}': arrays for module, arrays in table.items()}


def numbered(table: Table, name: str, number: int) -> Table:
  """The table of `number` modules of one kind, `name`_0, `name`_1, ..."""
  return {
    module: arrays
    for i in range(number)
    for module, arrays in nest(table, f'{name}_{i}/').items()
  }


def haiku_parameters(
  table: Table, dtype: Any = jnp.float32
) -> dict[str, dict[str, jax.Array]]:
  """Makes or gets all parameters of a table, below the current module.

  Call it once per module method: a second call would make new ones.
  """
  # Haiku numbers scopes that are entered twice: modules below a common one
  # must be made together.
  nested: dict[str, Table] = {}
  for module, arrays in table.items():
    first, _, rest = module.partition('/')
    nested.setdefault(first, {})[rest] = arrays
  params = {}
  for first, modules in nested.items():
    with hk.name_scope(first):
      for name, p in modules.pop('', {}).items():
        array = hk.get_parameter(name, p.shape, dtype, p.initializer)
        params.setdefault(first, {})[name] = array
      for rest, arrays in haiku_parameters(modules, dtype).items():
        params[f'{first}/{rest}'] = arrays
  return params


def init_parameters(
  table: Table, key: jax.Array, dtype: Any = jnp.float32
) -> dict[str, dict[str, jax.Array]]:
  """Initial values of all parameters of a table."""
  params: Any = hk.transform(lambda: haiku_parameters(table, dtype)).init(key)
  return params


def transform(forward: Callable[..., Any]) -> hk.Transformed:
  """`init` and `apply` of a Haiku function without random numbers.

  One rule for dtypes: the result has the dtype of the activations. Parameters
  of any floating dtype are cast to what the computation is in, float64 if an
  input is, else float32, and their gradients come back in their own.

  Args:
    forward: called below `hk.transform`.

  Returns:
    `init(key, ...)` and `apply(params, ...)`; the latter raises a TypeError for
    parameters or inputs in float16, whose range norms and logits leave.
  """
  inner = hk.without_apply_rng(hk.transform(forward))
  return hk.Transformed(
    numerics.standard_promotion()(inner.init), with_cast_parameters(inner.apply)
  )


def with_cast_parameters(function: Callable[..., Any]) -> Callable[..., Any]:
  """`function(params, ...)` under the rule of `transform`."""

  @functools.wraps(function)
  def wrapped(params: Params, /, *args: Any, **kwargs: Any) -> Any:
    with numerics.standard_promotion():
      inputs = [
        x.dtype for x in jax.tree.leaves((args, kwargs)) if _is_float(x)
      ]
      if any(dtype == jnp.float16 for dtype in inputs):
        raise TypeError('inputs: expected float32 or bfloat16, got float16')
      wide = jnp.float64 if jnp.float64 in inputs else jnp.float32
      return function(
        jax.tree_util.tree_map_with_path(
          lambda path, x: _cast(path, x, wide), params
        ),
        *args,
        **kwargs,
      )

  return wrapped


def _cast(path: Any, x: Any, dtype: Any) -> Any:
  if not _is_float(x):
    return x
  if x.dtype == jnp.float16:
    name = '//'.join(str(getattr(key, 'key', key)) for key in path)
    raise TypeError(
      f'params: expected float32, float64 or bfloat16, got float16 in {name}'
    )
  return x if x.dtype == dtype else jnp.asarray(x).astype(dtype)


def _is_float(x: Any) -> bool:
  return hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.floating)


def below(params: Params, scope: str) -> dict[str, Mapping[str, jax.Array]]:
  """The modules whose path starts with `scope`, without it.

  >>> sorted(below({'a/b/c': {}, 'a/d': {}}, 'a/b/'))
  ['c']
  """
  return {
    module.removeprefix(scope): arrays
    for module, arrays in params.items()
    if module.startswith(scope)
  }
