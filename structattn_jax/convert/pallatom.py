"""Pallatom checkpoints: the sparse atom encoder and the atom decoders.

Reads what `pallatom/train/train_loop.py` of github.com/tmatteso/diffusion
writes by `torch.save`: the bare state dict of the trunk, {model: state dict},
or {model, optimizer, scheduler, epoch, ...}; and the same state dict in a
safetensors or npz file. The trunk's other modules are left alone.

Sizes are read off the shapes, except the window, which no parameter depends
on: 32 residues as published. Versions from commit 2a0278f7 on have another
transformer (AF3's diffusion transformer) and are refused.
"""

import re

import haiku as hk

from structattn_jax import checkpoint
from structattn_jax.checkpoint import CheckpointError
from structattn_jax.common import files
from structattn_jax.convert import state_dicts
from structattn_jax.convert.state_dicts import Loaded, State, Table, Weights
from structattn_jax.network.pallatom import atom_transformers as network

ENCODER = 'atom_encoder.'
DECODERS = 'atom_decoders.'


@files.guarded(CheckpointError)
def load_atom_encoder(
  path: checkpoint.Path,
  *,
  window_size: int = network.WINDOW_SIZE,
  allow_nan: bool = False,
) -> tuple[network.AtomFeatureEncoderConfig, hk.Params]:
  """Reads the `AtomFeatureEncoder` of a Pallatom checkpoint.

  Args:
    path: one of the files that the module lists.
    window_size: span of the window in residues that the model was trained with.
    allow_nan: whether values may be infinite or no numbers.

  Returns:
    The configuration, and parameters as float32 NumPy arrays for
    `transform_atom_feature_encoder(config)`.

  Raises:
    CheckpointError: if the file is damaged, unsafe, of another kind or of a
      later architecture; if entries are missing, unknown or of a wrong shape,
      listing them; or if values are not finite.
    ImportError: if safetensors is needed and not installed.
  """
  state = _below(path, _open(path), ENCODER)
  blocks = state_dicts.num_layers(state, 'transformer.blocks')
  sizes, params = state_dicts.convert(
    path,
    'encoder',
    state,
    _encoder_table(blocks),
    prefix=ENCODER,
    allow_nan=allow_nan,
  )
  config = network.AtomFeatureEncoderConfig(
    c_atom=sizes['c'],
    c_pair=sizes['c_pair'],
    c_out=sizes['c_out'],
    num_block=blocks,
    num_head=_heads(path, sizes),
    window_size=window_size,
  )
  return config, params


@files.guarded(CheckpointError)
def load_atom_decoder(
  path: checkpoint.Path,
  unit: int = 0,
  *,
  window_size: int = network.WINDOW_SIZE,
  allow_nan: bool = False,
) -> tuple[network.AtomAttentionDecoderConfig, hk.Params]:
  """Reads one `AtomAttentionDecoder` of a Pallatom checkpoint.

  Args:
    path: one of the files that the module lists.
    unit: which of the trunk's decoders, from 0.
    window_size: as in `load_atom_encoder`.
    allow_nan: likewise.

  Returns:
    The configuration, and parameters as float32 NumPy arrays for
    `transform_atom_attention_decoder(config)`.

  Raises:
    CheckpointError: as `load_atom_encoder`, and if there is no such decoder.
    ImportError: likewise.
  """
  whole = _open(path)
  prefix = f'{DECODERS}{unit}.'
  count = state_dicts.num_layers(whole, DECODERS.removesuffix('.'))
  if count and not any(name.startswith(prefix) for name in whole):
    raise CheckpointError(
      f'{path}: there is no decoder {unit}, only {count} from 0'
    )
  state = _below(path, whole, prefix)
  blocks = state_dicts.num_layers(state, 'transformer.blocks')
  sizes, params = state_dicts.convert(
    path,
    'decoder',
    state,
    _decoder_table(blocks),
    prefix=prefix,
    allow_nan=allow_nan,
  )
  config = network.AtomAttentionDecoderConfig(
    num_block=blocks, num_head=_heads(path, sizes), window_size=window_size
  )
  return config, params


def read(
  path: checkpoint.Path,
  part: str,
  weights: Weights | None = None,
  allow_nan: bool = False,
) -> Loaded:
  """Reads 'atom_encoder' or 'atom_decoders.N'; there are no averages."""
  if weights == 'ema':
    raise CheckpointError(f'{path}: has no moving averages')
  notes = {'window_size': f'{network.WINDOW_SIZE}, which the file cannot say'}
  if part == 'atom_encoder':
    return Loaded(*load_atom_encoder(path, allow_nan=allow_nan), notes)
  unit = int(part.split('.')[1])
  return Loaded(*load_atom_decoder(path, unit, allow_nan=allow_nan), notes)


def _open(path: checkpoint.Path) -> State:
  tree = state_dicts.read(path)
  return state_dicts.state_of(path, state_dicts.model_of(tree), 'model')


def _below(
  path: checkpoint.Path, state: State, prefix: str
) -> dict[str, state_dicts.Value]:
  """One module's entries, unless they are of a later architecture."""
  found = state_dicts.below(state, prefix)
  if not found:
    raise state_dicts.MissingPartError(
      f'{path}: not a Pallatom checkpoint: nothing is called {prefix}...'
    )
  transformer = [name for name in found if name.startswith('transformer.')]
  block = re.compile(r'transformer\.blocks\.\d+\.(to_q|norm_c|ff1)\.')
  if transformer and not any(block.match(name) for name in transformer):
    raise CheckpointError(
      f'{path}: a later Pallatom (from commit 2a0278f7 on): its transformer, '
      f'with {prefix}{transformer[0]} and no '
      f'{prefix}transformer.blocks.0.to_q.weight, has self-attention over the '
      'queries, adaptive norms and gates, so it is another network than the '
      'one of commit 39c8d25a'
    )
  return found


def _heads(path: checkpoint.Path, sizes: dict[str, int]) -> int:
  if sizes['c'] % sizes['n_head']:
    raise CheckpointError(
      f'{path}: {sizes["n_head"]} heads do not divide {sizes["c"]} channels'
    )
  return sizes['n_head']


def _encoder_table(num_block: int) -> Table:
  linear, norm = state_dicts.linear, state_dicts.norm
  ours = 'atom_feature_encoder'
  table: Table = {}
  for name, num_out, num_in in (
    ('proj_fref_c', 'c', 'f_ref'),
    ('proj_d_vec', 'c_pair', '3'),
    ('proj_inv_sq', 'c_pair', '1'),
    ('proj_v', 'c_pair', '1'),
    ('proj_cl_pair', 'c_pair', 'c'),
    ('proj_cm_pair', 'c_pair', 'c'),
    ('proj_r_scaled', 'c', '3'),
    ('proj_s_init', 'c', 'c_token'),
    ('proj_z_init', 'c_pair', 'c_z'),
    ('proj_agg', 'c_out', 'c'),
  ):
    table |= linear(name, f'{ours}/{name}', num_out, num_in)
  table |= norm('norm_s_init', f'{ours}/norm_s_init', 'c_token')
  table |= norm('norm_z_init', f'{ours}/norm_z_init', 'c_z')
  return table | _shared_table(ours, num_block)


def _decoder_table(num_block: int) -> Table:
  linear, norm = state_dicts.linear, state_dicts.norm
  ours = 'atom_attention_decoder'
  table: Table = {}
  for name, num_out, num_in in (
    ('proj_s_q', 'c', 'c_token'),
    ('proj_z', 'c_pair', 'c_z'),
    ('proj_r', '3', 'c'),
    ('proj_s_c', 'c', 'c_token'),
  ):
    table |= linear(name, f'{ours}/{name}', num_out, num_in)
  for name, channels in (
    ('norm_s_q', 'c_token'),
    ('norm_z', 'c_z'),
    ('norm_q_out', 'c'),
    ('norm_s_c', 'c_token'),
  ):
    table |= norm(name, f'{ours}/{name}', channels)
  return table | _shared_table(ours, num_block)


def _shared_table(ours: str, num_block: int) -> Table:
  """The pair MLP and the transformer, which both modules have."""
  linear, norm = state_dicts.linear, state_dicts.norm
  table: Table = {}
  for i in (0, 2, 4, 6):
    table |= linear(f'mlp_p.{i}', f'{ours}/mlp_p_{i}', 'c_pair', 'c_pair')
  for i in range(num_block):
    block = f'transformer.blocks.{i}'
    target = f'{ours}/transformer/blocks_{i}'
    for name, channels in (
      ('norm_q', 'c'),
      ('norm_c', 'c'),
      ('norm_pair', 'c_pair'),
      ('norm_ff', 'c'),
    ):
      table |= norm(f'{block}.{name}', f'{target}/{name}', channels)
    for name, num_out, num_in in (
      ('to_q', 'c', 'c'),
      ('to_k', 'c', 'c'),
      ('to_v', 'c', 'c'),
      ('to_out', 'c', 'c'),
      ('pair_bias', 'n_head', 'c_pair'),
      ('ff1', '4*c', 'c'),
      ('ff2', 'c', '4*c'),
    ):
      table |= linear(f'{block}.{name}', f'{target}/{name}', num_out, num_in)
  return table
