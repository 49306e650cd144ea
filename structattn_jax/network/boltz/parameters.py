"""Where the parameters of Boltz's atom attention are, and their tables.

Names and scopes as `atom_attention` says; initial values are upstream's.
"""

from structattn_jax.components import parameters as pm
from structattn_jax.components.parameters import Params
from structattn_jax.network.boltz import conditioning
from structattn_jax.network.boltz import features as bf
from structattn_jax.network.boltz import transformers as bt
from structattn_jax.network.boltz.features import (
  Boltz2AtomAttentionConfig,
  Config,
)

# Where parameters are.


def embedding_parameters(config: Config, params: Params) -> Params:
  """Those of `atom_conditioning` and `atom_pair`."""
  return pm.below(params, _embedding_scope(config))


def _embedding_scope(config: Config) -> str:
  if not isinstance(config, Boltz2AtomAttentionConfig):
    return 'atom_attention_encoder/'
  if config.structure_prediction:
    return 'diffusion_conditioning/atom_encoder/'
  return 'atom_encoder/'


def stacks(config: Config) -> list[tuple[str, int, int]]:
  """Scope, depth and heads of the transformers."""
  found = [
    (
      f'atom_attention_{part}/atom_{part}/diffusion_transformer/',
      getattr(config, f'atom_{part}_depth'),
      getattr(config, f'atom_{part}_heads'),
    )
    for part in ('encoder', 'decoder')
  ]
  return found if config.has_decoder else found[:1]


def bias_projections(config: Config) -> list[str]:
  """Names of the projections of the atom pair, in the order of layers."""
  if isinstance(config, Boltz2AtomAttentionConfig):
    if not config.structure_prediction:
      return ['atom_enc_proj_z']
    return [
      f'diffusion_conditioning/atom_{part}_proj_z_{i}'
      for part, (_, depth, _) in zip(
        ('enc', 'dec'), stacks(config), strict=True
      )
      for i in range(depth)
    ]
  return [
    f'{scope}layers_{i}/pair_bias_attn/proj_z'
    for scope, depth, _ in stacks(config)
    for i in range(depth)
  ]


# Tables of parameters.


def atom_attention_parameters(config: Config) -> pm.Table:
  """Of `atom_attention_outputs`."""
  table = pm.nest(
    attention_encoder_parameters(config), 'atom_attention_encoder/'
  )
  if config.has_decoder:
    table |= pm.nest(
      attention_decoder_parameters(config), 'atom_attention_decoder/'
    )
  if not isinstance(config, Boltz2AtomAttentionConfig):
    return table
  if config.structure_prediction:
    return table | pm.nest(
      diffusion_conditioning_parameters(config), 'diffusion_conditioning/'
    )
  num_bias = config.atom_encoder_depth * config.atom_encoder_heads
  return {
    **pm.nest(atom_encoder_parameters(config), 'atom_encoder/'),
    **bt.pair_bias_parameters(config.atom_z, num_bias, 'atom_enc_proj_z'),
    **table,
  }


def atom_encoder_parameters(config: Config) -> pm.Table:
  """Of `atom_conditioning` and `atom_pair`."""
  s, z = config.atom_s, config.atom_z
  is_first = not isinstance(config, Boltz2AtomAttentionConfig)
  table = {
    'embed_atom_features': bt.linear_parameters(
      _num_features(config), s, use_bias=not is_first
    ),
    'embed_atompair_ref_pos': bt.linear_parameters(3, z),
    'embed_atompair_ref_dist': bt.linear_parameters(1, z),
    'embed_atompair_mask': bt.linear_parameters(1, z),
    'c_to_p_trans_k_1': bt.linear_parameters(s, z, initializer='zeros'),
    'c_to_p_trans_q_1': bt.linear_parameters(s, z, initializer='zeros'),
    'p_mlp_1': bt.linear_parameters(z, z),
    'p_mlp_3': bt.linear_parameters(z, z),
    'p_mlp_5': bt.linear_parameters(z, z, initializer='zeros'),
  }
  if config.structure_prediction:
    for name, size, out in (
      ('s_to_c_trans', config.token_s, s),
      ('z_to_p_trans', config.token_z, z),
    ):
      table[f'{name}_0'] = bt.layer_norm_parameters(size)
      table[f'{name}_1'] = bt.linear_parameters(size, out, initializer='zeros')
  return table


def _num_features(config: Config) -> int:
  if not isinstance(config, Boltz2AtomAttentionConfig):
    return 5 + bf.NUM_ELEMENTS + 4 * bf.NUM_NAME_CHARS
  number = 4 + bf.NUM_ELEMENTS
  if not config.use_no_atom_char:
    number += 4 * bf.NUM_NAME_CHARS
  if config.use_atom_backbone_feat:
    number += bf.NUM_BACKBONE
  if config.use_residue_feats_atoms:
    number += bf.NUM_RES_TYPES + 1 + bf.NUM_MOL_TYPES
  return number


def _atom_transformer_parameters(
  config: Config, depth: int, num_head: int, *, post_layer_norm: bool
) -> pm.Table:
  """Of the transformer over atoms; only in Boltz-1 it projects the pair."""
  is_first = not isinstance(config, Boltz2AtomAttentionConfig)
  return bt.diffusion_transformer_parameters(
    depth,
    num_head,
    config.atom_s,
    config.atom_s,
    config.atom_z if is_first else None,
    post_layer_norm=post_layer_norm,
  )


def attention_encoder_parameters(config: Config) -> pm.Table:
  """Of `encode`; in Boltz-1 with those of `atom_encoder_parameters`."""
  is_first = not isinstance(config, Boltz2AtomAttentionConfig)
  transformer = _atom_transformer_parameters(
    config,
    config.atom_encoder_depth,
    config.atom_encoder_heads,
    post_layer_norm=not is_first and config.transformer_post_layer_norm,
  )
  width = (2 if config.structure_prediction else 1) * config.token_s
  table = {
    **pm.nest(transformer, 'atom_encoder/diffusion_transformer/'),
    'atom_to_token_trans_0': bt.linear_parameters(config.atom_s, width),
  }
  if config.structure_prediction:
    table['r_to_q_trans'] = bt.linear_parameters(
      3, config.atom_s, initializer='zeros'
    )
  return {**atom_encoder_parameters(config), **table} if is_first else table


def attention_decoder_parameters(config: Config) -> pm.Table:
  """Of `decode`."""
  is_first = not isinstance(config, Boltz2AtomAttentionConfig)
  post_layer_norm = not is_first and config.decoder_post_layer_norm
  transformer = _atom_transformer_parameters(
    config,
    config.atom_decoder_depth,
    config.atom_decoder_heads,
    post_layer_norm=post_layer_norm,
  )
  s, name = config.atom_s, 'atom_feat_to_atom_pos_update'
  out = bt.linear_parameters(s, 3, initializer='zeros')
  update = {name: out}
  if not post_layer_norm:
    update = {f'{name}_0': bt.layer_norm_parameters(s), f'{name}_1': out}
  return {
    'a_to_q_trans': bt.linear_parameters(
      2 * config.token_s, s, initializer='zeros'
    ),
    **pm.nest(transformer, 'atom_decoder/diffusion_transformer/'),
    **update,
  }


def diffusion_conditioning_parameters(
  config: Boltz2AtomAttentionConfig,
) -> pm.Table:
  """Of Boltz-2's `DiffusionConditioning`."""
  pairwise = conditioning.pairwise_conditioning_parameters(
    config.token_z, 2 * config.token_z, config.conditioning_transition_layers
  )
  table = {
    **pm.nest(pairwise, 'pairwise_conditioner/'),
    **pm.nest(atom_encoder_parameters(config), 'atom_encoder/'),
  }
  for name, part, channels in (
    ('atom_enc_proj_z', 'atom_encoder', config.atom_z),
    ('atom_dec_proj_z', 'atom_decoder', config.atom_z),
    ('token_trans_proj_z', 'token_transformer', config.token_z),
  ):
    heads = getattr(config, f'{part}_heads')
    for i in range(getattr(config, f'{part}_depth')):
      table |= bt.pair_bias_parameters(channels, heads, f'{name}_{i}')
  return table
