"""AlphaFold 3 parameters: the diffusion head, whole or in parts, and more.

Reads the released format (see `record_file`). Users bring their own parameters
under the terms of AlphaFold 3. Our modules have upstream's names and shapes, so
only the scope in front of them is cut off.

Two copies of the atom attention are in a model, told apart by the prefix of
their names: 'evoformer_conditioning', an encoder in the trunk without noisy
positions and trunk inputs, and 'diffusion', encoder and decoder of the
diffusion head. Sizes are read off the shapes. The pair embedding is built
twice upstream and the first result never used; its parameters, the ones without
`_1`, are taken over all the same, as a Haiku module with these names has them.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import haiku as hk
import numpy as np

from structattn_jax import checkpoint
from structattn_jax.checkpoint import CheckpointError
from structattn_jax.common import files
from structattn_jax.convert import record_file
from structattn_jax.network.alphafold3 import atom_cross_attention as published
from structattn_jax.network.alphafold3 import diffusion_head as dh
from structattn_jax.network.alphafold3 import transformer_parameters as tp

Copy = Literal['diffusion', 'evoformer_conditioning']

_DIFFUSION_HEAD = 'diffuser/~/diffusion_head'
SCOPES: Mapping[Copy, str] = {
  'diffusion': _DIFFUSION_HEAD,
  'evoformer_conditioning': 'diffuser',
}
TRANSFORMER_SCOPE = f'{_DIFFUSION_HEAD}/transformer'

# Name, array, axes. C atom, D token, P atom pair, S trunk single and Z trunk
# pair channels; L blocks of H heads with K key and V value channels each; F
# hidden channels per channel; N super blocks of B blocks.
_ENCODER = """
embed_ref_pos weights 3 C
embed_ref_mask weights 1 C
embed_ref_element weights 128 C
embed_ref_charge weights 1 C
embed_ref_atom_name weights 256 C
single_to_pair_cond_row_1 weights C P
single_to_pair_cond_col_1 weights C P
embed_pair_offsets_1 weights 3 P
embed_pair_distances_1 weights 1 P
embed_pair_offsets_valid weights 1 P
single_to_pair_cond_row weights C P
single_to_pair_cond_col weights C P
embed_pair_offsets weights 3 P
embed_pair_distances weights 1 P
pair_mlp_1 weights P P
pair_mlp_2 weights P P
pair_mlp_3 weights P P
project_atom_features_for_aggr weights C D
"""
_DIFFUSION = """
lnorm_trunk_single_cond scale S
embed_trunk_single_cond weights S C
lnorm_trunk_pair_cond scale Z
embed_trunk_pair_cond weights Z P
atom_positions_to_features weights 3 C
project_token_features_for_broadcast weights D C
atom_features_layer_norm scale C
atom_features_to_position_update weights C 3
"""
# Of a block with C channels and S channels of conditioning. The first two
# lines once for each adaptive layer norm.
_NORM = """
single_cond_layer_norm scale S
single_cond_scale weights S C
single_cond_scale bias C
single_cond_bias weights S C
"""
_BLOCK = """
q_projection weights C H K
q_projection bias H K
k_projection weights C H K
v_projection weights C H V
gating_query weights C H*V
transition2 weights H*V C
adaptive_zero_cond weights S C
adaptive_zero_cond bias C
ffw_transition1 weights C 2*F*C
ffw_transition2 weights F*C C
ffw_adaptive_zero_cond weights S C
ffw_adaptive_zero_cond bias C
"""
# Of the conditioning: Q single channels; X and Y channels of what pair and
# single are projected from. And of a transition of it with C channels.
_CONDITIONING = """
pair_cond_initial_norm scale X
pair_cond_initial_projection weights X Z
single_cond_initial_norm scale Y
single_cond_initial_projection weights Y Q
noise_embedding_initial_norm scale 256
noise_embedding_initial_projection weights 256 Q
single_cond_embedding_norm scale Q
single_cond_embedding_projection weights Q D
output_norm scale D
"""
_TRANSITION = """
ffw_layer_norm scale C
ffw_layer_norm offset C
ffw_transition1 weights C 4*C
ffw_transition2 weights 2*C C
"""

Axes = tuple[str, ...]
Table = dict[tuple[str, str], Axes]


def atom_cross_att_table(copy: Copy) -> Table:
  """Axes of every parameter of one copy, by module and array.

  Args:
    copy: prefix of the names.
  """
  table = _parse(_ENCODER, f'{copy}_')
  parts = ['encoder']
  if copy == 'diffusion':
    table.update(_parse(_DIFFUSION, f'{copy}_'))
    parts.append('decoder')
  for part in parts:
    name = f'{copy}_atom_transformer_{part}'
    # The decoder has sizes of its own.
    own = '' if part == 'encoder' else "'"
    sizes = {x: x + own for x in 'LHKVF'}
    table[f'{name}/pair_input_layer_norm', 'scale'] = ('P',)
    table[f'{name}/pair_logits_projection', 'weights'] = tuple(
      _axes('P L H', sizes)
    )
    block = {**sizes, 'S': 'C'}
    prefix = f'{name}/__layer_stack_with_per_layer/{name}'
    for norm in ('q', 'k', 'ffw_'):
      table.update(_parse(_NORM, f'{prefix}{norm}', 'L', block))
    table.update(_parse(_BLOCK, prefix, 'L', block))
  return table


def transformer_table() -> Table:
  """Axes of every parameter of the token transformer."""
  stack = '__layer_stack_with_per_layer/'
  table: Table = {
    ('pair_input_layer_norm', 'scale'): ('Z',),
    (f'{stack}pair_logits_projection', 'weights'): ('N', 'Z', 'B', 'H'),
  }
  prefix = f'{stack}{stack}transformer'
  for norm in ('', 'ffw_'):
    table.update(_parse(_NORM, f'{prefix}{norm}', 'N B'))
  table.update(_parse(_BLOCK, prefix, 'N B'))
  return table


def diffusion_head_table() -> Table:
  """Axes of every parameter of the diffusion head.

  Sizes as in its two parts; those of the token transformer have two primes.
  """
  table = atom_cross_att_table('diffusion') | _parse(_CONDITIONING, '')
  for name, channels in (('pair', 'Z'), ('single', 'Q')):
    for i in range(2):
      prefix = f'{name}_transition_{i}'
      table.update(_parse(_TRANSITION, prefix, '', {'C': channels}))
  own = {x: f"{x}''" for x in 'HKVF'} | {'C': 'D', 'S': 'Q'}
  for (module, name), axes in transformer_table().items():
    table[f'transformer/{module}', name] = tuple(_axes(' '.join(axes), own))
  return table


def load_atom_cross_att(
  path: checkpoint.Path,
  copy: Copy = 'diffusion',
  *,
  scope: str | None = None,
  model: str | None = None,
  allow_nan: bool = False,
) -> tuple[published.AtomCrossAttConfig, hk.Params]:
  """Reads one copy of the atom encoder, with its decoder if it has one.

  Args:
    path: a folder, the file of a model, or any of its shards.
    copy: 'diffusion' or 'evoformer_conditioning'.
    scope: module path in front of the names; None takes the published one.
    model: which model of a folder with several.
    allow_nan: whether values may be infinite or no numbers.

  Returns:
    The configuration, and parameters as float32 NumPy arrays for the functions
    of `network.alphafold3` with `prefix=copy`.

  Raises:
    CheckpointError: if files are missing or damaged; if entries are missing,
      unknown, twice with other values, or of a wrong shape or dtype, listing
      them; or if values are not finite.
    ImportError: if the file is compressed and zstandard is not installed.
  """
  if copy not in SCOPES:
    raise ValueError(f'copy: expected one of {[*SCOPES]}, got {copy!r}')
  with files.guard(path, CheckpointError):
    scope = SCOPES[copy] if scope is None else scope.strip('/')
    outer = f'{scope}/' if scope else ''
    params, sizes = _load(
      path,
      model,
      outer,
      f'{outer}{copy}_',
      atom_cross_att_table(copy),
      allow_nan,
    )
    return _atom_config(sizes, has_decoder=copy == 'diffusion'), params


@files.guarded(CheckpointError)
def load_transformer(
  path: checkpoint.Path,
  *,
  scope: str = TRANSFORMER_SCOPE,
  model: str | None = None,
  allow_nan: bool = False,
) -> tuple[tp.TransformerConfig, hk.Params]:
  """Reads the token transformer of the diffusion head.

  Args:
    path: a folder, the file of a model, or any of its shards.
    scope: its module path.
    model: which model of a folder with several.
    allow_nan: whether values may be infinite or no numbers.

  Returns:
    The configuration, and parameters as float32 NumPy arrays for
    `network.alphafold3.diffusion_transformer.transformer`.

  Raises:
    CheckpointError: as `load_atom_cross_att`.
    ImportError: as `load_atom_cross_att`.
  """
  outer = f'{scope.strip("/")}/'
  params, sizes = _load(
    path, model, outer, outer, transformer_table(), allow_nan
  )
  return _transformer_config(sizes, ''), params


@files.guarded(CheckpointError)
def load_diffusion_head(
  path: checkpoint.Path,
  *,
  scope: str = _DIFFUSION_HEAD,
  model: str | None = None,
  allow_nan: bool = False,
) -> tuple[dh.DiffusionHeadConfig, hk.Params]:
  """Reads the whole diffusion head.

  Args:
    path: a folder, the file of a model, or any of its shards.
    scope: its module path.
    model: which model of a folder with several.
    allow_nan: whether values may be infinite or no numbers.

  Returns:
    The configuration, and parameters as float32 NumPy arrays for
    `transform_diffusion_head` and `cached_diffusion_head`.

  Raises:
    CheckpointError: as `load_atom_cross_att`.
    ImportError: as `load_atom_cross_att`.
  """
  outer = f'{scope.strip("/")}/'
  params, sizes = _load(
    path, model, outer, outer, diffusion_head_table(), allow_nan
  )
  transformer = _transformer_config(sizes, "''")
  config = dh.DiffusionHeadConfig(
    seq_channel=sizes['Q'],
    pair_channel=sizes['Z'],
    atoms=_atom_config(sizes, has_decoder=True),
    transformer=dataclasses.replace(transformer, block_remat=True),
  )
  return config, params


def save_params(
  path: checkpoint.Path,
  params: Mapping[str, Mapping[str, Any]],
  *,
  scope: str = '',
  num_shards: int = 1,
) -> None:
  """Writes Haiku parameters in the released format.

    config, params = load_atom_cross_att('af3.bin.zst')
    save_params('mine.bin.zst', params, scope=SCOPES['diffusion'])

  Args:
    path: `X.bin.zst`, which is compressed, or `X.bin`.
    params: {module: {name: array}}.
    scope: module path to put in front.
    num_shards: number of shards; see `record_file.write_records`.

  Raises:
    ValueError: as `record_file.write_records`.
    ImportError: likewise.
    OSError: likewise.
  """
  outer = f'{scope.strip("/")}/' if scope else ''
  record_file.write_records(
    path,
    [
      record_file.Record(
        f'{outer}{module}', name, np.asarray(params[module][name])
      )
      for module in sorted(params)
      for name in sorted(params[module])
    ],
    num_shards=num_shards,
  )


def _atom_config(
  sizes: Mapping[str, int], *, has_decoder: bool
) -> published.AtomCrossAttConfig:
  encoder = _cross_att_config(sizes, '')
  decoder = _cross_att_config(sizes, "'") if has_decoder else encoder
  return published.AtomCrossAttConfig(
    per_token_channels=sizes['D'],
    per_atom_channels=sizes['C'],
    per_atom_pair_channels=sizes['P'],
    atom_transformer=encoder,
    decoder_transformer=None if decoder == encoder else decoder,
  )


def _transformer_config(
  sizes: Mapping[str, int], own: str
) -> tp.TransformerConfig:
  head, key, value, factor = (sizes[x + own] for x in 'HKVF')
  return tp.TransformerConfig(
    attention=tp.SelfAttentionConfig(
      num_head=head, key_dim=head * key, value_dim=head * value
    ),
    num_blocks=sizes['N'] * sizes['B'],
    super_block_size=sizes['B'],
    num_intermediate_factor=factor,
  )


def _cross_att_config(
  sizes: Mapping[str, int], own: str
) -> tp.CrossAttTransformerConfig:
  blocks, head, key, value, factor = (sizes[x + own] for x in 'LHKVF')
  return tp.CrossAttTransformerConfig(
    num_intermediate_factor=factor,
    num_blocks=blocks,
    attention=tp.CrossAttentionConfig(
      num_head=head, key_dim=head * key, value_dim=head * value
    ),
  )


def _parse(
  text: str,
  prefix: str,
  leading: str = '',
  sizes: Mapping[str, str] | None = None,
) -> Table:
  table: Table = {}
  for line in text.split('\n'):
    if line:
      name, array, axes = line.split(' ', 2)
      table[f'{prefix}{name}', array] = tuple(
        _axes(f'{leading} {axes}', sizes or {})
      )
  return table


def _axes(text: str, sizes: Mapping[str, str]) -> Iterator[str]:
  """Axes with sizes renamed."""
  for axis in text.split():
    yield '*'.join(sizes.get(factor, factor) for factor in axis.split('*'))


def _load(
  path: checkpoint.Path,
  model: str | None,
  outer: str,
  prefix: str,
  table: Table,
  allow_nan: bool,
) -> tuple[hk.Params, dict[str, int]]:
  """Reads all below `prefix`, without `outer`, and checks it."""
  arrays: dict[tuple[str, str], np.ndarray] = {}
  others: dict[str, None] = {}

  def keep(scope: str) -> bool:
    if not scope.startswith(prefix):
      others[scope] = None
    return scope.startswith(prefix)

  last = ''
  for record in record_file.read_records(path, keep=keep, model=model):
    last = f'{record.scope}//{record.name}'
    key = (record.scope.removeprefix(outer), record.name)
    # The published reader takes the last one.
    known = arrays.setdefault(key, record.array)
    if known.dtype != record.array.dtype or not np.array_equal(
      known, record.array, equal_nan=True
    ):
      raise CheckpointError(f'{path}: {last} occurs twice, with other values')
  if not arrays:
    found = ', '.join(list(others)[:3])
    raise CheckpointError(
      f'{path}: nothing is called {prefix}...; the file holds {found} and '
      f'{max(len(others) - 3, 0)} more'
    )
  known = {name: array for name, array in arrays.items() if name in table}
  sizes = _sizes(table, known)
  problems = [
    f'missing {outer}{module}//{name}'
    for module, name in table
    if (module, name) not in arrays
  ]
  problems += [
    f'unknown {outer}{module}//{name}'
    for module, name in arrays
    if (module, name) not in table
  ]
  for (module, name), array in known.items():
    lengths = [_length(axis, sizes) for axis in table[module, name]]
    if list(array.shape) != lengths:
      symbols = ', '.join(table[module, name])
      problems.append(
        f'wrong {outer}{module}//{name} has shape {list(array.shape)}, '
        f'expected {lengths} = [{symbols}]'
      )
    elif array.dtype != np.float32:
      problems.append(
        f'wrong {outer}{module}//{name} has dtype {array.dtype}, expected '
        'float32'
      )
  if problems:
    cut = ''
    if len(arrays) < len(table):
      cut = f' (the last record of them is {last}; is the file cut after it?)'
    raise CheckpointError(
      f'{path}: does not fit the AlphaFold 3 parameters {prefix}...{cut}: '
      f'{files.listed(problems)}'
    )
  if not allow_nan:
    checkpoint.check_finite(
      path,
      {
        f'{outer}{module}//{name}': array
        for (module, name), array in known.items()
      },
    )
  params: dict[str, Any] = {}
  for module, name in table:
    params.setdefault(module, {})[name] = arrays[module, name]
  return params, {size: length for size, length in sizes.items() if length}


def _sizes(
  table: Table, arrays: Mapping[tuple[str, str], np.ndarray]
) -> dict[str, int | None]:
  """The sizes that most axes have; so one wrong array is blamed alone."""
  symbols = {
    factor
    for axes in table.values()
    for axis in axes
    for factor in axis.split('*')
    if not factor.isdigit()
  }
  sizes: dict[str, int | None] = dict.fromkeys(sorted(symbols))
  # Products of several sizes second.
  for most in (1, math.inf):
    votes: dict[str, collections.Counter[int]] = collections.defaultdict(
      collections.Counter
    )
    for key, array in arrays.items():
      if array.ndim == len(table[key]):
        for axis, length in zip(table[key], array.shape, strict=True):
          unknown = [
            x for x in axis.split('*') if x in sizes and sizes[x] is None
          ]
          if len(unknown) == 1 and len(axis.split('*')) <= most:
            known = _length(axis, {**sizes, unknown[0]: 1})
            if known and length and length % known == 0:
              votes[unknown[0]][length // known] += 1
    for symbol, counted in votes.items():
      sizes[symbol] = counted.most_common(1)[0][0]
  return sizes


def _length(axis: str, sizes: Mapping[str, int | None]) -> int | None:
  """The length of an axis, None if a size in it is unknown."""
  factors = [int(x) if x.isdigit() else sizes[x] for x in axis.split('*')]
  known = [factor for factor in factors if factor is not None]
  return math.prod(known) if len(known) == len(factors) else None
