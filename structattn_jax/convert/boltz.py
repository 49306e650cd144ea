"""Boltz checkpoints, versions 1 and 2: atom attention and conditioning.

Reads the Lightning files `boltz1_conf.ckpt`, `boltz2_conf.ckpt` and their like
(a state dict with hyper-parameters, which the released files hold as omegaconf
objects), and bare state dicts in PyTorch, safetensors or npz files. Parts:

  score_model           atom encoder and decoder of the diffusion module, with
                        Boltz-2's `diffusion_conditioning`
  diffusion             the whole diffusion module, with the same
  diffusion_conditioning  that of Boltz-2 alone
  input_embedder        atom encoder of the input
  single_conditioner    the module of that name
  pairwise_conditioner  likewise; that of Boltz-2 is in score_model, too
  rel_pos               relative positions of tokens
  confidence_...        Boltz-1's second input_embedder; rel_pos of both

Every tensor of a part is used exactly once; `boltz_names` lists them, and what
is dead. Tensors of other modules are left alone; the note `not_converted` says
of each module how many there are.

Sizes, depths and heads are read off the shapes, windows and Boltz-2's choices
off the hyper-parameters; where both say something they must agree.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import haiku as hk

from structattn_jax import checkpoint
from structattn_jax.checkpoint import CheckpointError
from structattn_jax.common import base_config, files
from structattn_jax.convert import boltz_names as names
from structattn_jax.convert import state_dicts
from structattn_jax.convert.state_dicts import Loaded, State, Table, Weights
from structattn_jax.network.boltz import atom_attention as boltz_encoders
from structattn_jax.network.boltz import conditioning as boltz_conditioning
from structattn_jax.network.boltz import diffusion as boltz_diffusion

_SCORE = 'structure_module.score_model.'
_CONDITIONING = 'diffusion_conditioning.'
_EMBEDDER = 'input_embedder.'
_CONFIDENCE = 'confidence_module.'
# Not trained, so not among the moving averages.
_FIXED = re.compile(r'(fourier_embed\.proj\.(weight|bias)|boundaries|offset)$')
# Boltz-2's atom features: position, charge, element and name; then choices.
_FEATURES = 3 + 1 + 128 + 256
_OPTIONAL_FEATURES = {
  'use_no_atom_char': -256,
  'use_atom_backbone_feat': 17,
  'use_residue_feats_atoms': 38,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleConditioningConfig(base_config.BaseConfig):
  """Sizes of a `boltz_conditioning.SingleConditioning`.

  Attributes:
    token_s: channels of the trunk's single.
    num_input: channels of the trunk's single and the inputs together.
    dim_fourier: features of the noise level; None: without.
    num_transitions: number of transitions.
    expansion_factor: their hidden channels per channel.
  """

  token_s: int = 384
  num_input: int = 839
  dim_fourier: int | None = 256
  num_transitions: int = 2
  expansion_factor: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairwiseConditioningConfig(base_config.BaseConfig):
  """Sizes of a `boltz_conditioning.PairwiseConditioning`.

  Attributes:
    token_z: channels of the trunk's pair.
    num_input: channels of the pair and the relative positions together.
    num_transitions: number of transitions.
    expansion_factor: their hidden channels per channel.
  """

  token_z: int = 128
  num_input: int = 256
  num_transitions: int = 2
  expansion_factor: int = 2


class _Source(NamedTuple):
  """A file with the weights asked for."""

  path: checkpoint.Path
  state: State
  settings: Mapping[str, Any]
  is_boltz2: bool
  allow_nan: bool
  taken: set[str]  # Names of tensors that a part has used.


def load_boltz(
  path: checkpoint.Path,
  part: str = 'score_model',
  *,
  weights: Weights | None = None,
  hyper_parameters: Mapping[str, Any] | None = None,
  allow_nan: bool = False,
) -> tuple[base_config.BaseConfig, hk.Params]:
  """Reads one part of a Boltz-1 or Boltz-2 checkpoint.

    >>> config, params = load_boltz('boltz1_conf.ckpt')  # doctest: +SKIP
    >>> model = cached_atom_attention(config)  # doctest: +SKIP
    >>> context = model.precompute(params, features, s, z)  # doctest: +SKIP

  Args:
    path: one of the files that the module lists.
    part: one of the parts that the module lists.
    weights: 'model' for the state dict, with which upstream predicts; 'ema' for
      the moving averages of a training run. None takes 'model'.
    hyper_parameters: upstream's, for files that have none, such as
      `{'atoms_per_window_queries': 32, 'fix_sym_check': True}`.
    allow_nan: whether values may be infinite or no numbers.

  Returns:
    The configuration, and parameters as float32 NumPy arrays:
    `Boltz1AtomAttentionConfig` or `Boltz2AtomAttentionConfig` for score_model
    and input_embedder, to be used with `cached_atom_attention`;
    `Boltz1DiffusionConfig` or `Boltz2DiffusionConfig` for diffusion, to be used
    with `cached_diffusion`; `Boltz2AtomAttentionConfig` for
    diffusion_conditioning; `SingleConditioningConfig`,
    `PairwiseConditioningConfig` or
    `RelativePositionConfig` for the others.

  Raises:
    CheckpointError: if the file is damaged, unsafe or of another kind, or has
      no such part; if entries are missing, unknown or of a wrong shape, listing
      them; if hyper-parameters contradict the shapes, or are needed and not
      there; or if values are not finite.
    ImportError: if safetensors is needed and not installed.
  """
  loaded = read(
    path,
    part,
    weights,
    hyper_parameters=hyper_parameters,
    allow_nan=allow_nan,
  )
  return loaded.config, loaded.params


@files.guarded(CheckpointError)
def read(
  path: checkpoint.Path,
  part: str,
  weights: Weights | None = None,
  allow_nan: bool = False,
  *,
  hyper_parameters: Mapping[str, Any] | None = None,
) -> Loaded:
  """As `load_boltz`, with what else is known."""
  weights = weights or 'model'
  source = _open(path, weights, hyper_parameters, allow_nan)
  parts = BOLTZ2_PARTS if source.is_boltz2 else BOLTZ1_PARTS
  if part not in parts:
    raise CheckpointError(
      f'{path}: Boltz-{1 + source.is_boltz2} has no part {part!r}, only '
      f'{", ".join(parts)}'
    )
  config, params = parts[part](source)
  notes = {'weights': weights}
  if rest := _rest(source):
    notes['not_converted'] = rest
  return Loaded(config, params, notes)


def _rest(source: _Source) -> str:
  """What else there is, by module: number of tensors and of parameters."""
  found: dict[str, list[int]] = {}
  for name, value in source.state.items():
    if name in source.taken:
      continue
    # What is inside of the score model has parts of its own.
    depth = 3 if name.startswith(_SCORE) else 1
    module = '.'.join(name.split('.')[:depth])
    found.setdefault(module, []).append(math.prod(value.shape))
  return files.listed(
    f'{module}: {len(sizes)} tensors with {sum(sizes):,} numbers'
    for module, sizes in sorted(found.items())
  )


def _open(
  path: checkpoint.Path,
  weights: Weights,
  hyper_parameters: Mapping[str, Any] | None,
  allow_nan: bool,
) -> _Source:
  tree = state_dicts.read(path)
  model = state_dicts.model_of(tree)
  state = state_dicts.state_of(path, model, 'state_dict')
  settings: Any = hyper_parameters
  if settings is None and model is not tree:
    settings = state_dicts.plain(tree.get('hyper_parameters'))
  if weights == 'ema':
    averages = None if model is tree else tree.get('ema')
    state = _averaged(path, state, averages)
  is_boltz2 = any(
    name.startswith((_CONDITIONING, f'{_EMBEDDER}atom_enc')) for name in state
  )
  if not isinstance(settings, Mapping):
    settings = {}
  return _Source(path, state, settings, is_boltz2, allow_nan, set())


def _averaged(path: checkpoint.Path, state: State, averages: Any) -> State:
  """Boltz-2 names its averages, Boltz-1 has a list."""
  if isinstance(averages, dict) and 'ema_weights' in averages:
    return state_dicts.state_of(path, averages['ema_weights'], 'ema_weights')
  if isinstance(averages, dict) and 'shadow_params' in averages:
    trained = {k: v for k, v in state.items() if not _FIXED.search(k)}
    found = state_dicts.shadow(path, trained, averages['shadow_params'])
    return {**state, **found}
  raise CheckpointError(f'{path}: has no moving averages')


# Parts.


def _score_model(source: _Source) -> tuple[Any, hk.Params]:
  """Encoder and decoder of the diffusion module."""
  encoder, decoder = (
    f'{_SCORE}atom_attention_{part}.' for part in ('encoder', 'decoder')
  )
  table, values = _atom_table(source)
  prefixes = [encoder, decoder, *([_CONDITIONING] * source.is_boltz2)]
  sizes, params = _convert(source, 'score_model', prefixes, table)
  return _config(source, values, sizes, 'score_model_args'), params


def _diffusion(source: _Source) -> tuple[Any, hk.Params]:
  """The whole diffusion module."""
  version2 = source.is_boltz2
  table, values = _atom_table(source)
  name = f'{_SCORE}token_transformer.layers'
  depth = state_dicts.num_layers(source.state, name)
  if not depth:
    raise state_dicts.MissingPartError(
      f'{source.path}: nothing is called {name}..., so there is no diffusion'
    )
  prefix = f'{_SCORE}single_conditioner.transitions'
  transitions = state_dicts.num_layers(source.state, prefix)
  own = {
    **names.tokens(names.Layers(depth, False), version2=version2),
    **names.below(
      'single_conditioner.',
      'single_conditioner',
      names.single_conditioner(transitions, has_times=True, hidden='4*token_s'),
    ),
  }
  if version2:
    _agree(
      source,
      values,
      {
        'token_transformer_depth': depth,
        'conditioning_transition_layers': transitions,
      },
      ('token_transformer_depth', 'conditioning_transition_layers'),
    )
  else:
    own |= names.below(
      'pairwise_conditioner.',
      'pairwise_conditioner',
      names.pairwise_conditioner(transitions, '2*token_z', '2*token_z'),
    )
  values |= {
    'token_transformer_depth': depth,
    'conditioning_transition_layers': transitions,
  }
  table |= names.below(_SCORE, '', own)
  prefixes = [_SCORE, *([_CONDITIONING] * version2)]
  sizes, params = _convert(source, 'diffusion', prefixes, table)
  values['token_s_inputs'] = sizes.pop('num_input') - sizes['token_s']
  process = source.settings.get('diffusion_process_args')
  if isinstance(process, dict) and 'sigma_data' in process:
    values['sigma_data'] = process['sigma_data']
  classes: dict[bool, Any] = {
    False: boltz_diffusion.Boltz1DiffusionConfig,
    True: boltz_diffusion.Boltz2DiffusionConfig,
  }
  return _config(
    source, values, sizes, 'score_model_args', classes[version2]
  ), params


def _diffusion_conditioning(source: _Source) -> tuple[Any, hk.Params]:
  """Boltz-2's, which the score model takes from outside."""
  values: dict[str, Any] = {}
  for key, module in (
    ('atom_encoder_depth', 'atom_enc_proj_z'),
    ('atom_decoder_depth', 'atom_dec_proj_z'),
    ('token_transformer_depth', 'token_trans_proj_z'),
    ('conditioning_transition_layers', 'pairwise_conditioner.transitions'),
  ):
    prefix = f'{_CONDITIONING}{module}'
    values[key] = state_dicts.num_layers(source.state, prefix)
  table = names.below(
    _CONDITIONING,
    'diffusion_conditioning',
    names.diffusion_conditioning(**values),
  )
  sizes, params = _convert(
    source, 'diffusion_conditioning', [_CONDITIONING], table
  )
  return _config(source, values, sizes, 'score_model_args'), params


def _atom_table(source: _Source) -> tuple[Table, dict[str, Any]]:
  """Of atom encoder, decoder and Boltz-2's conditioning; depths, choices."""
  version2 = source.is_boltz2
  encoder = f'{_SCORE}atom_attention_encoder.'
  decoder = f'{_SCORE}atom_attention_decoder.'
  layers = _layers(source, f'{encoder}atom_encoder')
  last = _layers(source, f'{decoder}atom_decoder')
  values: dict[str, Any] = {
    'atom_encoder_depth': layers.depth,
    'atom_decoder_depth': last.depth,
  }
  table = {
    **names.below(
      encoder,
      'atom_attention_encoder',
      names.encoder(layers, version2=version2, structure=True),
    ),
    **names.below(
      decoder, 'atom_attention_decoder', names.decoder(last, version2=version2)
    ),
  }
  if version2:
    values |= {
      'token_transformer_depth': state_dicts.num_layers(
        source.state, f'{_CONDITIONING}token_trans_proj_z'
      ),
      'conditioning_transition_layers': state_dicts.num_layers(
        source.state, f'{_CONDITIONING}pairwise_conditioner.transitions'
      ),
      'transformer_post_layer_norm': layers.post_norm,
      'decoder_post_layer_norm': last.post_norm,
    }
    inner = names.diffusion_conditioning(**values)
    table |= names.below(_CONDITIONING, 'diffusion_conditioning', inner)
  return table, values


def _input_embedder(source: _Source, outer: str = '') -> tuple[Any, hk.Params]:
  """The encoder without structure."""
  version2 = source.is_boltz2
  outer = f'{outer}{_EMBEDDER}'
  prefix = f'{outer}atom_attention_encoder.'
  layers = _layers(source, f'{prefix}atom_encoder')
  table = names.encoder(layers, version2=version2, structure=False)
  table = names.below(prefix, 'atom_attention_encoder', table)
  prefixes = [prefix]
  values: dict[str, Any] = {
    'structure_prediction': False,
    'atom_encoder_depth': layers.depth,
  }
  if version2:
    prefixes += [f'{outer}atom_encoder.', f'{outer}atom_enc_proj_z.']
    embedding = names.embedding('features', structure=False, bias=True)
    table |= names.below(f'{outer}atom_encoder.', 'atom_encoder', embedding)
    # The biases of all layers at once.
    biases = f'{max(layers.depth, 1)}*atom_encoder_heads'
    table |= names.below(outer, '', names.norm('atom_enc_proj_z.0', 'atom_z'))
    table |= names.below(
      outer, '', names.linear('atom_enc_proj_z.1', biases, 'atom_z')
    )
    values['transformer_post_layer_norm'] = layers.post_norm
  sizes, params = _convert(source, outer, prefixes, table)
  return _config(source, values, sizes, 'embedder_args'), params


def _single_conditioner(source: _Source) -> tuple[Any, hk.Params]:
  """Embedding of the noise level and the single."""
  prefix = f'{_SCORE}single_conditioner.'
  has_times = any(
    name.startswith((f'{prefix}fourier', f'{prefix}norm_fourier'))
    for name in source.state
  )
  transitions = state_dicts.num_layers(source.state, f'{prefix}transitions')
  table = names.single_conditioner(transitions, has_times=has_times)
  table = names.below(prefix, 'single_conditioner', table)
  sizes, params = _convert(source, 'single_conditioner', [prefix], table)
  _agree(source, source.settings, sizes, ('token_s',))
  return SingleConditioningConfig(
    token_s=sizes['token_s'],
    num_input=sizes['num_input'],
    dim_fourier=sizes.get('dim_fourier'),
    num_transitions=transitions,
    expansion_factor=_expansion(source, sizes, 2 * sizes['token_s']),
  ), params


def _pairwise_conditioner(source: _Source) -> tuple[Any, hk.Params]:
  """Embedding of the pair."""
  prefix = f'{_CONDITIONING if source.is_boltz2 else _SCORE}'
  prefix += 'pairwise_conditioner.'
  transitions = state_dicts.num_layers(source.state, f'{prefix}transitions')
  table = names.below(
    prefix, 'pairwise_conditioner', names.pairwise_conditioner(transitions)
  )
  sizes, params = _convert(source, 'pairwise_conditioner', [prefix], table)
  _agree(source, source.settings, sizes, ('token_z',))
  return PairwiseConditioningConfig(
    token_z=sizes['token_z'],
    num_input=sizes['num_input'],
    num_transitions=transitions,
    expansion_factor=_expansion(source, sizes, sizes['token_z']),
  ), params


def _rel_pos(source: _Source, outer: str = '') -> tuple[Any, hk.Params]:
  """Relative positions."""
  prefix = f'{outer}rel_pos.'
  # 2 * 66 distances, 1 entity, 6 copies.
  table = names.below(
    prefix, 'rel_pos', names.linear('linear_layer', 'token_z', '139')
  )
  sizes, params = _convert(source, 'rel_pos', [prefix], table)
  _agree(source, source.settings, sizes, ('token_z',))
  choices: dict[str, Any] = {}
  if source.is_boltz2:
    rule = _flag(source, 'fix_sym_check')
    choices = {
      'same_chain_rule': 'entity' if rule else 'chain',
      'cyclic': _flag(source, 'cyclic_pos_enc'),
    }
  return boltz_conditioning.RelativePositionConfig(
    token_z=sizes['token_z'], **choices
  ), params


_Part = Callable[[_Source], tuple[Any, hk.Params]]
_BOTH: dict[str, _Part] = {
  'score_model': _score_model,
  'diffusion': _diffusion,
  'input_embedder': _input_embedder,
  'single_conditioner': _single_conditioner,
  'pairwise_conditioner': _pairwise_conditioner,
  'rel_pos': _rel_pos,
  'confidence_rel_pos': lambda source: _rel_pos(source, _CONFIDENCE),
}
BOLTZ1_PARTS: dict[str, _Part] = {
  **_BOTH,
  'confidence_input_embedder': lambda source: _input_embedder(
    source, _CONFIDENCE
  ),
}
BOLTZ2_PARTS: dict[str, _Part] = {
  **_BOTH,
  'diffusion_conditioning': _diffusion_conditioning,
}


# Sizes and settings.


def _convert(
  source: _Source, what: str, prefixes: Iterable[str], table: Table
) -> tuple[dict[str, int], hk.Params]:
  prefixes = tuple(prefixes)
  own = {
    name: value
    for name, value in source.state.items()
    if name.startswith(prefixes)
  }
  if not own:
    raise state_dicts.MissingPartError(
      f'{source.path}: nothing is called {prefixes[0]}..., so there is no '
      f'{what.strip(".")}'
    )
  source.taken.update(own)
  version = f'Boltz-{1 + source.is_boltz2} {what.strip(".")}'
  return state_dicts.convert(
    source.path, version, own, table, allow_nan=source.allow_nan
  )


def _config(
  source: _Source,
  values: dict[str, Any],
  sizes: dict[str, int],
  arguments: str,
  config_class: Any = None,
) -> boltz_encoders.Config:
  """Config of an encoder, from sizes, settings and what is known already."""
  settings = source.settings
  _agree(source, settings, sizes, ('atom_s', 'atom_z', 'token_s', 'token_z'))
  nested = settings.get(arguments)
  if isinstance(nested, dict):
    keys = [
      f'{module}_{size}'
      for module in ('atom_encoder', 'atom_decoder', 'token_transformer')
      for size in ('depth', 'heads')
    ]
    found = {**sizes, **values}
    if 'transformer_post_layer_norm' in found:
      found['transformer_post_ln'] = found['transformer_post_layer_norm']
    _agree(source, nested, found, [*keys, 'transformer_post_ln'])
  features = sizes.pop('features', None)
  if features is not None:
    values |= _optional_features(source, features)
  for key in ('atoms_per_window_queries', 'atoms_per_window_keys', 'token_z'):
    if key in settings:
      values.setdefault(key, settings[key])
  config_classes: dict[bool, Any] = {
    False: boltz_encoders.Boltz1AtomAttentionConfig,
    True: boltz_encoders.Boltz2AtomAttentionConfig,
  }
  config_class = config_class or config_classes[source.is_boltz2]
  try:
    return config_class(**{**values, **sizes})
  except (TypeError, ValueError) as error:
    raise CheckpointError(f'{source.path}: {error}') from None


def _agree(
  source: _Source,
  settings: Mapping[str, Any],
  found: Mapping[str, Any],
  keys: Iterable[str],
) -> None:
  """Raises if hyper-parameters are not what the shapes say."""
  for name in keys:
    if name in settings and name in found and settings[name] != found[name]:
      raise CheckpointError(
        f'{source.path}: hyper-parameter {name} is '
        f'{files.shown(settings[name])}, but the tensors have {found[name]}'
      )


def _flag(source: _Source, name: str) -> bool:
  value = source.settings.get(name)
  if not isinstance(value, bool):
    raise CheckpointError(
      f'{source.path}: the hyper-parameter {name} is needed, which no tensor '
      f'depends on, and is {files.shown(value)}; give `hyper_parameters`'
    )
  return value


def _optional_features(source: _Source, width: int) -> dict[str, bool]:
  """Which atom features there are: each choice has a width of its own."""
  keys = list(_OPTIONAL_FEATURES)
  for choice in range(2 ** len(keys)):
    flags = {name: bool(choice >> i & 1) for i, name in enumerate(keys)}
    if width == _FEATURES + sum(
      _OPTIONAL_FEATURES[k] for k in keys if flags[k]
    ):
      _agree(source, source.settings, flags, keys)
      return flags
  raise CheckpointError(
    f'{source.path}: no choice of atom features is {width} wide'
  )


def _expansion(source: _Source, sizes: Mapping[str, int], channels: int) -> int:
  factor, rest = divmod(sizes.get('hidden', 2 * channels), channels)
  if rest:
    raise CheckpointError(
      f'{source.path}: transitions with {sizes["hidden"]} hidden channels for '
      f'{channels}'
    )
  return factor


def _layers(source: _Source, transformer: str) -> names.Layers:
  name = f'{transformer}.diffusion_transformer.layers'
  return names.Layers(
    state_dicts.num_layers(source.state, name),
    any(
      key.startswith(f'{name}.') and '.post_lnorm.' in key
      for key in source.state
    ),
  )
