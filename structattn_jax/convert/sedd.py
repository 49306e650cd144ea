"""SEDD checkpoints: the single track, and the protein-ligand dual track.

Reads what these programs write (`network/sedd/blocks.py` names them):

  SEDD               {model, ema, optimizer, step} by `torch.save`
  Hugging Face       model.safetensors or pytorch_model.bin, with config.json
  protein_lig_sedd   {model, ema, config, ...}; of its branch sedd-v100xlian
                     {model_state_dict, ema_state_dict, config, ...}
  a bare state dict  PyTorch, safetensors or npz

Moving averages are a list without names, in the order of the parameters. That
of the dual track has the parameters that upstream never uses, too: names are
given first and dead parameters dropped then, with a `DeadParametersWarning`.

Sizes are read off the shapes and heads off the rotary frequencies, which a file
has as a buffer; dropout off the settings, if there are any.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, cast

import haiku as hk
import numpy as np

from structattn_jax import checkpoint
from structattn_jax.checkpoint import CheckpointError
from structattn_jax.common import files
from structattn_jax.convert import state_dicts
from structattn_jax.convert.state_dicts import Table, Weights
from structattn_jax.network.sedd import blocks, dual_track, single_track

# Upstream has them and never uses them: a norm, and a second projection around
# attention that the repaired network does not have.
_DEAD = re.compile(
  r'blocks_(prot|lig)\.\d+\.(norm3|attn)\.'
  r'(weight|bias|in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)'
)
_MAX_SETTINGS = 2**20
_TRACKS = {'prot': 'protein', 'lig': 'ligand'}
# Parts of the names that the tasks of protein_lig_sedd do not train.
_FROZEN = (
  (),
  ('lig',),
  ('prot',),
  ('lig', 'cross_attn'),
  ('prot', 'cross_attn'),
)


def load_sedd(
  path: checkpoint.Path,
  *,
  weights: Weights | None = None,
  num_head: int | None = None,
  allow_nan: bool = False,
) -> tuple[single_track.SeddConfig, hk.Params]:
  """Reads a single-track SEDD, the original or the one of sedd-v100xlian.

    >>> config, params = load_sedd('model.safetensors')  # doctest: +SKIP
    >>> apply = transform_sedd(config).apply  # doctest: +SKIP

  Args:
    path: one of the files that the module lists.
    weights: 'ema' for the moving averages, with which upstream samples; 'model'
      for the trained values. None takes the averages if there are any.
    num_head: number of heads, needed only for files without rotary frequencies
      and settings.
    allow_nan: whether values may be infinite or no numbers.

  Returns:
    The configuration, and parameters as float32 NumPy arrays for
    `transform_sedd(config)`.

  Raises:
    CheckpointError: if the file is damaged, unsafe or of another kind; if
      entries are missing, unknown or of a wrong shape, listing them; or if
      values are not finite.
    ImportError: if safetensors is needed and not installed.
  """
  loaded = read_sedd(
    path, weights=weights, num_head=num_head, allow_nan=allow_nan
  )
  return cast(single_track.SeddConfig, loaded.config), loaded.params


def load_sedd_dual_track(
  path: checkpoint.Path,
  *,
  weights: Weights | None = None,
  num_head: int | None = None,
  allow_nan: bool = False,
) -> tuple[dual_track.DualTrackConfig, hk.Params]:
  """Reads the dual track of protein_lig_sedd.

  Args:
    path: one of the files that the module lists.
    weights: as in `load_sedd`.
    num_head: likewise.
    allow_nan: likewise.

  Returns:
    The configuration, and parameters as float32 NumPy arrays for
    `transform_sedd_dual_track(config)`.

  Raises:
    CheckpointError: as `load_sedd`.
    ImportError: likewise.

  Warns:
    DeadParametersWarning: naming the parameters that upstream never uses.
  """
  loaded = read_dual_track(
    path, weights=weights, num_head=num_head, allow_nan=allow_nan
  )
  return cast(dual_track.DualTrackConfig, loaded.config), loaded.params


@files.guarded(CheckpointError)
def read_sedd(
  path: checkpoint.Path,
  *,
  weights: Weights | None = None,
  num_head: int | None = None,
  allow_nan: bool = False,
) -> state_dicts.Loaded:
  """As `load_sedd`, with what else the file says."""
  source = _open(path)
  is_v100 = 'vocab_embed.weight' in source.state
  if not is_v100 and 'vocab_embed.embedding' not in source.state:
    raise CheckpointError(
      f'{path}: not a single-track SEDD: there is no vocab_embed'
    )
  state, notes = _take(path, source, weights)
  heads = _pop_heads(path, state, ('rotary_emb',), source.settings, num_head)
  blocks = state_dicts.num_layers(state, 'blocks')
  table = _single_table(blocks, v100=is_v100)
  variant = 'v100' if is_v100 else 'sedd'
  sizes, params = state_dicts.convert(
    path, variant, state, table, allow_nan=allow_nan
  )
  return _loaded(
    path,
    single_track.SeddConfig,
    {'variant': variant, 'vocab': sizes['vocab'], 'num_block': blocks},
    (sizes, heads, source.settings),
    params,
    notes,
  )


@files.guarded(CheckpointError)
def read_dual_track(
  path: checkpoint.Path,
  *,
  weights: Weights | None = None,
  num_head: int | None = None,
  allow_nan: bool = False,
) -> state_dicts.Loaded:
  """As `load_sedd_dual_track`, with what else the file says."""
  source = _open(path)
  prefix = 'transformer.'
  if not all(name.startswith(prefix) for name in source.state):
    prefix = ''
  if f'{prefix}protein_embed.embedding.weight' not in source.state:
    raise CheckpointError(
      f'{path}: not a dual-track SEDD: there is no protein_embed.embedding'
    )
  if f'{prefix}blocks_prot.0.attn_qkv.bias' in source.state:
    raise CheckpointError(
      f'{path}: a dual track of transformers_protlig_cross.py, whose attention '
      'runs across the batch, so that there is nothing to convert it to; only '
      'that of transformers_protlig_cross_improved.py is known'
    )
  state, notes = _take(path, source, weights)
  state = state_dicts.below(state, prefix)
  buffers = [f'rotary_emb_{track}' for track in _TRACKS]
  heads = _pop_heads(path, state, buffers, source.settings, num_head)
  dead = sorted(name for name in state if _DEAD.fullmatch(name))
  state_dicts.warn_dead(
    path, [prefix + name for name in dead], 'as upstream never uses them'
  )
  for name in dead:
    del state[name]
  blocks = state_dicts.num_layers(state, 'blocks_prot')
  sizes, params = state_dicts.convert(
    path,
    'dual-track',
    state,
    _dual_table(blocks),
    prefix=prefix,
    allow_nan=allow_nan,
  )
  return _loaded(
    path,
    dual_track.DualTrackConfig,
    {
      'num_block': blocks,
      'protein_vocab': sizes['protein_vocab'],
      'ligand_vocab': sizes['ligand_vocab'],
    },
    (sizes, heads, source.settings),
    params,
    notes,
  )


@dataclasses.dataclass
class _Source:
  """The parts of a file; `averages` is None if there are none."""

  state: dict[str, Any]
  averages: Any
  settings: dict[str, Any]


def _open(path: checkpoint.Path) -> _Source:
  tree = state_dicts.read(path)
  model = state_dicts.model_of(tree)
  state = dict(state_dicts.state_of(path, model, 'model'))
  if model is tree:
    averages, settings = None, _config_beside(path)
  else:
    averages = tree.get('ema', tree.get('ema_state_dict'))
    settings = state_dicts.plain(tree.get('config'))
  if not isinstance(settings, dict):
    settings = {}
  return _Source(state, averages, settings)


def _take(
  path: checkpoint.Path, source: _Source, weights: Weights | None
) -> tuple[dict[str, Any], dict[str, str]]:
  """The state dict with the weights asked for, and notes."""
  state, averages = source.state, source.averages
  if weights is None:
    weights = 'model' if averages is None else 'ema'
  if weights == 'ema':
    if not isinstance(averages, dict) or 'shadow_params' not in averages:
      raise CheckpointError(f'{path}: has no moving averages')
    parameters = {
      name: value
      for name, value in state.items()
      if not name.endswith('.inv_freq')
    }
    state = state | state_dicts.shadow(
      path, parameters, averages['shadow_params'], _FROZEN
    )
  return state, {'weights': weights, **_notes(source.settings)}


def _config_beside(path: checkpoint.Path) -> Any:
  """`config.json` of the Hugging Face layout, if it is there."""
  file = pathlib.Path(path).with_name('config.json')
  if not file.is_file():
    return {}
  with files.guard(file, CheckpointError, 'not JSON'):
    return json.loads(files.read_text(file, _MAX_SETTINGS))


def _notes(settings: Mapping[str, Any]) -> dict[str, str]:
  """Settings of the process, which no parameter depends on."""
  notes = {}
  for part in ('graph', 'noise'):
    values = settings.get(part)
    if isinstance(values, dict) and all(
      isinstance(key, str) and _is_simple(x) for key, x in values.items()
    ):
      notes[part] = json.dumps(values, sort_keys=True)
  model = settings.get('model')
  if isinstance(model, dict) and _is_simple(model.get('scale_by_sigma')):
    notes['scale_by_sigma'] = json.dumps(model['scale_by_sigma'])
  return notes


def _is_simple(value: Any) -> bool:
  if isinstance(value, int):
    return value.bit_length() < 64
  return isinstance(value, float) or (
    isinstance(value, str) and len(value) < 100
  )


def _pop_heads(
  path: checkpoint.Path,
  state: dict[str, Any],
  buffers: Any,
  settings: Mapping[str, Any],
  given: int | None,
) -> dict[str, int]:
  """Takes the rotary frequencies out; what they and others say about heads.

  Returns:
    {'d_head': ...} or {'num_head': ...}.
  """
  model = settings.get('model')
  claimed = model.get('n_heads') if isinstance(model, dict) else None
  if given is None and type(claimed) is int and claimed > 0:
    given = claimed
  found = [state.pop(f'{buffer}.inv_freq', None) for buffer in buffers]
  lengths = set()
  for value in found:
    if value is not None:
      if len(value.shape) != 1 or not value.shape[0]:
        raise CheckpointError(f'{path}: rotary frequencies are not a vector')
      value = state_dicts.array(value)
      half = value.shape[0]
      want = 10000.0 ** (-np.arange(half) / half)
      if not np.allclose(value, want, rtol=1e-5, atol=0):
        raise CheckpointError(f'{path}: other rotary frequencies than 10000^-x')
      lengths.add(2 * half)
  if len(lengths) > 1:
    raise CheckpointError(f'{path}: tracks with different rotary frequencies')
  heads = dict.fromkeys(['d_head'] * len(lengths), *lengths)
  if given is not None:
    heads['num_head'] = given
  if not heads:
    raise CheckpointError(
      f'{path}: nothing says how many heads there are; give num_head'
    )
  return heads


def _loaded(
  path: checkpoint.Path,
  config_class: Any,
  values: dict[str, Any],
  found: tuple[Mapping[str, int], Mapping[str, int], Mapping[str, Any]],
  params: hk.Params,
  notes: Mapping[str, str],
) -> state_dicts.Loaded:
  sizes, heads, settings = found
  hidden = sizes['c']
  num_head = heads.get('num_head', hidden // heads.get('d_head', hidden))
  if hidden != num_head * heads.get('d_head', hidden // num_head):
    raise CheckpointError(
      f'{path}: {num_head} heads of {heads.get("d_head")} channels in '
      f'{hidden} channels'
    )
  ratio, rest = divmod(sizes['mlp'], hidden)
  if rest:
    raise CheckpointError(
      f'{path}: {sizes["mlp"]} hidden channels of the MLP are no multiple of '
      f'{hidden}'
    )
  values |= {
    'hidden_size': hidden,
    'num_head': num_head,
    'cond_dim': sizes['c_cond'],
    'mlp_ratio': ratio,
  }
  model = settings.get('model')
  if isinstance(model, dict) and 'dropout' in model:
    values['dropout'] = model['dropout']
  try:
    config = config_class(**values)
  except (TypeError, ValueError) as error:
    raise CheckpointError(f'{path}: {error}') from None
  return state_dicts.Loaded(config, params, notes)


def _timestep_table() -> Table:
  return {
    **state_dicts.linear(
      'sigma_map.mlp.0', 'sigma_map/mlp_0', 'c_cond', '256', bias=True
    ),
    **state_dicts.linear(
      'sigma_map.mlp.2', 'sigma_map/mlp_2', 'c_cond', 'c_cond', bias=True
    ),
  }


def _single_table(num_block: int, *, v100: bool) -> Table:
  """SEDD, or the network of sedd-v100xlian."""
  linear, norm = state_dicts.linear, state_dicts.norm
  embedding = 'vocab_embed.weight' if v100 else 'vocab_embed.embedding'
  table: Table = {
    embedding: state_dicts.Entry('vocab c', 'vocab_embed//embedding'),
    **_timestep_table(),
  }
  mlp = ('fc1', 'fc2') if v100 else ('0', '2')
  for i in range(num_block):
    block = f'blocks.{i}'
    ours = f'sedd/{blocks.LAYER_STACK}/blocks'
    for name in ('norm1', 'norm2'):
      table |= norm(
        f'{block}.{name}', f'{ours}/{name}', 'c', offset=False, layer=i
      )
    for name, target, num_out, num_in, bias in (
      ('attn_qkv', 'attn_qkv', '3*c', 'c', False),
      ('attn_out', 'attn_out', 'c', 'c', False),
      (f'mlp.{mlp[0]}', 'mlp_0', 'mlp', 'c', True),
      (f'mlp.{mlp[1]}', 'mlp_2', 'c', 'mlp', True),
      ('adaLN_modulation', 'adaLN_modulation', '6*c', 'c_cond', True),
    ):
      table |= linear(
        f'{block}.{name}',
        f'{ours}/{target}',
        num_out,
        num_in,
        bias=bias,
        layer=i,
      )
  return table | _output_table(
    'output_layer',
    'vocab',
    norm_name='norm' if v100 else 'norm_final',
    offset=False,
    bias=not v100,
  )


def _dual_table(num_block: int) -> Table:
  """The repaired dual track, without upstream's dead parameters."""
  linear, norm = state_dicts.linear, state_dicts.norm
  table = _timestep_table()
  for track, name in _TRACKS.items():
    vocab = f'{name}_vocab'
    table[f'{name}_embed.embedding.weight'] = state_dicts.Entry(
      f'{vocab} c', f'{name}_embed//embedding'
    )
    table |= norm(f'{name}_embed.norm', f'{name}_embed/norm', 'c')
    for i in range(num_block):
      block = f'blocks_{track}.{i}'
      ours = f'dual_track/{blocks.LAYER_STACK}/blocks_{track}'
      for local in (
        'norm1',
        'norm2',
        'cross_attn.norm_q',
        'cross_attn.norm_kv',
      ):
        target = f'{ours}/{local.replace(".", "/")}'
        table |= norm(f'{block}.{local}', target, 'c', layer=i)
      for local, num_out, num_in, bias in (
        ('attn_qkv', '3*c', 'c', False),
        ('attn_out', 'c', 'c', True),
        ('cross_attn.q_proj', 'c', 'c', False),
        ('cross_attn.k_proj', 'c', 'c', False),
        ('cross_attn.v_proj', 'c', 'c', False),
        ('cross_attn.out_proj', 'c', 'c', True),
        ('mlp.0', 'mlp', 'c', True),
        ('mlp.3', 'c', 'mlp', True),
        ('adaLN_modulation', '4*c', 'c_cond', True),
      ):
        target = local.replace('mlp.', 'mlp_').replace('.', '/')
        table |= linear(
          f'{block}.{local}',
          f'{ours}/{target}',
          num_out,
          num_in,
          bias=bias,
          layer=i,
        )
    table |= _output_table(f'{name}_output', vocab)
  return table


def _output_table(
  name: str,
  vocab: str,
  *,
  norm_name: str = 'norm_final',
  offset: bool = True,
  bias: bool = True,
) -> Table:
  linear, norm = state_dicts.linear, state_dicts.norm
  return {
    **norm(f'{name}.{norm_name}', f'{name}/norm_final', 'c', offset=offset),
    **linear(f'{name}.linear', f'{name}/linear', vocab, 'c', bias=bias),
    **linear(
      f'{name}.adaLN_modulation',
      f'{name}/adaLN_modulation',
      '2*c',
      'c_cond',
      bias=True,
    ),
  }
