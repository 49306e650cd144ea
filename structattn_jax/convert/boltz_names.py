"""Names and axes of Boltz's tensors, versions 1 and 2.

Our modules follow from upstream's names: a dot before a number becomes an
underscore, other dots slashes. `convert/boltz.py` says what is done with them.

Two kinds of tensors are dead. `output_projection.0` of a layer (not that of its
transition) is a second name of `output_projection_linear`; both are in the
tables, as they must be equal. Seven of the ten columns of Boltz-1's
`r_to_q_trans` only ever meet zeros, and are left out.
"""

import dataclasses
import re
from typing import Any, NamedTuple

from structattn_jax.convert import state_dicts
from structattn_jax.convert.state_dicts import Table


class Layers(NamedTuple):
  """What the names of a transformer's layers say."""

  depth: int
  post_norm: bool


def _module(name: str) -> str:
  return re.sub(r'\.(\d+)', r'_\1', name).replace('.', '/')


def linear(
  name: str,
  num_out: str,
  num_in: str,
  *,
  bias: bool = False,
  columns: int | None = None,
) -> Table:
  """A linear layer, under the name that follows from upstream's."""
  return state_dicts.linear(
    name, _module(name), num_out, num_in, bias=bias, columns=columns
  )


def norm(name: str, channels: str, *, offset: bool = True) -> Table:
  """A layer norm, likewise."""
  return state_dicts.norm(name, _module(name), channels, offset=offset)


def below(prefix: str, scope: str, table: Table) -> Table:
  """The table of a module inside another one."""
  scope = f'{scope}/' if scope else ''
  return {
    f'{prefix}{name}': dataclasses.replace(
      entry,
      target=None if entry.target is None else f'{scope}{entry.target}',
      copy_of=None if entry.copy_of is None else f'{prefix}{entry.copy_of}',
    )
    for name, entry in table.items()
  }


def encoder(layers: Layers, *, version2: bool, structure: bool) -> Table:
  """`AtomAttentionEncoder`, in Boltz-1 with the embedding of atoms."""
  width = '2*token_s' if structure else 'token_s'
  table = transformer('atom_encoder', layers, version2=version2)
  table |= linear('atom_to_token_trans.0', width, 'atom_s')
  if structure:
    # Only three of Boltz-1's columns ever meet anything but zeros.
    num_in = '3' if version2 else '10'
    table |= linear('r_to_q_trans', 'atom_s', num_in, columns=3)
  if not version2:
    table |= embedding('389', structure=structure)
  return table


def decoder(layers: Layers, *, version2: bool) -> Table:
  """`AtomAttentionDecoder`."""
  update = 'atom_feat_to_atom_pos_update'
  table = transformer('atom_decoder', layers, version2=version2)
  table |= linear('a_to_q_trans', 'atom_s', '2*token_s')
  if layers.post_norm:
    return table | linear(update, '3', 'atom_s')
  table |= norm(f'{update}.0', 'atom_s')
  return table | linear(f'{update}.1', '3', 'atom_s')


def diffusion_conditioning(
  *,
  atom_encoder_depth: int,
  atom_decoder_depth: int,
  token_transformer_depth: int,
  conditioning_transition_layers: int,
  **_: Any,
) -> Table:
  """Boltz-2's `DiffusionConditioning`."""
  atoms = embedding('features', structure=True, bias=True)
  pairwise = pairwise_conditioner(
    conditioning_transition_layers, '2*token_z', '2*token_z'
  )
  table = {
    **below('atom_encoder.', 'atom_encoder', atoms),
    **below('pairwise_conditioner.', 'pairwise_conditioner', pairwise),
  }
  for name, depth, heads, channels in (
    ('atom_enc', atom_encoder_depth, 'atom_encoder_heads', 'atom_z'),
    ('atom_dec', atom_decoder_depth, 'atom_decoder_heads', 'atom_z'),
    (
      'token_trans',
      token_transformer_depth,
      'token_transformer_heads',
      'token_z',
    ),
  ):
    for i in range(depth):
      table |= norm(f'{name}_proj_z.{i}.0', channels)
      table |= linear(f'{name}_proj_z.{i}.1', heads, channels)
  return table


def embedding(features: str, *, structure: bool, bias: bool = False) -> Table:
  """Steps 1 to 6 of the encoder."""
  table = {
    **linear('embed_atom_features', 'atom_s', features, bias=bias),
    **linear('embed_atompair_ref_pos', 'atom_z', '3'),
    **linear('embed_atompair_ref_dist', 'atom_z', '1'),
    **linear('embed_atompair_mask', 'atom_z', '1'),
    **linear('c_to_p_trans_k.1', 'atom_z', 'atom_s'),
    **linear('c_to_p_trans_q.1', 'atom_z', 'atom_s'),
  }
  for i in (1, 3, 5):
    table |= linear(f'p_mlp.{i}', 'atom_z', 'atom_z')
  if structure:
    table |= {
      **norm('s_to_c_trans.0', 'token_s'),
      **linear('s_to_c_trans.1', 'atom_s', 'token_s'),
      **norm('z_to_p_trans.0', 'token_z'),
      **linear('z_to_p_trans.1', 'atom_z', 'token_z'),
    }
  return table


def transformer(name: str, layers: Layers, *, version2: bool) -> Table:
  """`AtomTransformer`; that of Boltz-1 projects the pair itself."""
  pair = None if version2 else ('atom_z', f'{name}_heads')
  table = diffusion_transformer(layers, 'atom_s', pair)
  own = f'{name}.diffusion_transformer'
  return below(f'{own}.', own.replace('.', '/'), table)


def diffusion_transformer(
  layers: Layers, channels: str, pair: tuple[str, str] | None
) -> Table:
  """`DiffusionTransformer`, over atoms or tokens.

  Args:
    layers: of the transformer.
    channels: size of activations and conditioning.
    pair: sizes of the pair and of heads where layers project it (Boltz-1).
  """
  table: Table = {}
  twice = _multiple(2, channels)
  for i in range(layers.depth):
    layer = f'layers.{i}'
    attention, transition = f'{layer}.pair_bias_attn', f'{layer}.transition'
    for inner in (layer, transition):
      table |= {
        **norm(f'{inner}.adaln.s_norm', channels, offset=False),
        **linear(f'{inner}.adaln.s_scale', channels, channels, bias=True),
        **linear(f'{inner}.adaln.s_bias', channels, channels),
      }
    table |= linear(f'{attention}.proj_q', channels, channels, bias=True)
    for x in ('k', 'v', 'g', 'o'):
      table |= linear(f'{attention}.proj_{x}', channels, channels)
    if pair is not None:
      table |= norm(f'{attention}.proj_z.0', pair[0])
      table |= linear(f'{attention}.proj_z.1', pair[1], pair[0])
    gate, second = f'{layer}.output_projection_linear', 'output_projection.0'
    table |= linear(gate, channels, channels, bias=True)
    # The same tensors a second time.
    for own, axes in (
      ('weight', f'{channels} {channels}'),
      ('bias', channels),
    ):
      table[f'{layer}.{second}.{own}'] = state_dicts.Entry(
        axes, None, copy_of=f'{gate}.{own}'
      )
    table |= {
      **linear(f'{transition}.swish_gate.0', _multiple(4, channels), channels),
      **linear(f'{transition}.a_to_b', twice, channels),
      **linear(f'{transition}.b_to_a', channels, twice),
      **linear(f'{transition}.{second}', channels, channels, bias=True),
    }
    if layers.post_norm:
      table |= norm(f'{layer}.post_lnorm', channels)
  return table


def _multiple(factor: int, size: str) -> str:
  """'4*c' of 4 and 'c', or of 2 and '2*c'."""
  own, _, name = size.rpartition('*')
  return f'{factor * int(own or 1)}*{name}'


def tokens(layers: Layers, *, version2: bool) -> Table:
  """What a diffusion module does with tokens."""
  pair = None if version2 else ('token_z', 'token_transformer_heads')
  table = diffusion_transformer(layers, '2*token_s', pair)
  return {
    **norm('s_to_a_linear.0', '2*token_s'),
    **linear('s_to_a_linear.1', '2*token_s', '2*token_s'),
    **below('token_transformer.', 'token_transformer', table),
    **norm('a_norm', '2*token_s'),
  }


def pairwise_conditioner(
  num_transitions: int, num_input: str = 'num_input', hidden: str = 'hidden'
) -> Table:
  """`PairwiseConditioning`."""
  return {
    **norm('dim_pairwise_init_proj.0', num_input),
    **linear('dim_pairwise_init_proj.1', 'token_z', num_input),
    **transitions(num_transitions, 'token_z', hidden),
  }


def single_conditioner(
  num_transitions: int, *, has_times: bool, hidden: str = 'hidden'
) -> Table:
  """`SingleConditioning`."""
  table = {
    **norm('norm_single', 'num_input'),
    **linear('single_embed', '2*token_s', 'num_input', bias=True),
    **transitions(num_transitions, '2*token_s', hidden),
  }
  if has_times:
    table |= {
      **linear('fourier_embed.proj', 'dim_fourier', '1', bias=True),
      **norm('norm_fourier', 'dim_fourier'),
      **linear('fourier_to_single', '2*token_s', 'dim_fourier'),
    }
  return table


def transitions(number: int, channels: str, hidden: str = 'hidden') -> Table:
  """`Transition`s of a conditioner."""
  table: Table = {}
  for i in range(number):
    table |= {
      **norm(f'transitions.{i}.norm', channels),
      **linear(f'transitions.{i}.fc1', hidden, channels),
      **linear(f'transitions.{i}.fc2', hidden, channels),
      **linear(f'transitions.{i}.fc3', channels, hidden),
    }
  return table
