"""The presets in configs/: complete, documented, and what they claim to be."""

import dataclasses
import pathlib
import re
import tomllib

import pytest

import structattn_jax as sa
from structattn_jax import training

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'

# The numbers of the sources, written out: neither a changed preset nor a
# changed default may pass unnoticed.
IPA_SIZES = {
  'num_head': 12,
  'num_scalar_qk': 16,
  'num_scalar_v': 16,
  'num_point_qk': 4,
  'num_point_v': 8,
}
BOLTZ_SIZES = {
  'atom_s': 128,
  'atom_z': 16,
  'token_s': 384,
  'token_z': 128,
  'atoms_per_window_queries': 32,
  'atoms_per_window_keys': 128,
  'atom_encoder_depth': 3,
  'atom_encoder_heads': 4,
  'atom_decoder_depth': 3,
  'atom_decoder_heads': 4,
}
BOLTZ2_CHOICES = {
  'use_no_atom_char': False,
  'use_atom_backbone_feat': False,
  'use_residue_feats_atoms': False,
  'transformer_post_layer_norm': False,
}
BOLTZ_DIFFUSION_SIZES = {
  **BOLTZ_SIZES,
  'structure_prediction': True,
  'token_transformer_depth': 24,
  'token_transformer_heads': 16,
  'conditioning_transition_layers': 2,
  'dim_fourier': 256,
  'sigma_data': 16.0,
}
AF3_ATOM_SIZES = {
  'per_atom_channels': 128,
  'per_atom_pair_channels': 16,
  'uid_rule': 'official',
  'padded_keys': 'official',
  'atom_transformer': {
    'num_intermediate_factor': 2,
    'num_blocks': 3,
    'attention': {'num_head': 4, 'key_dim': 128, 'value_dim': 128},
  },
}
SAMPLER = {
  'steps': 200,
  'gamma_0': 0.8,
  'gamma_min': 1.0,
  'noise_scale': 1.003,
  'step_scale': 1.5,
  'alignment': True,
  'centre': 'padded',
  'rotation': 'quaternion',
}
SCHEDULE = {
  'sigma_data': 16.0,
  'sigma_min': 4e-4,
  'sigma_max': 160.0,
  'rho': 7.0,
  'last': 'zero',
}
STRUCTURE_SIZES = {
  'num_layer': 8,
  'num_layer_in_transition': 3,
  'num_channel': 384,
  'dropout': 0.1,
  'sidechain': {'num_channel': 128, 'num_residual_block': 2},
}
PRESETS = {
  **{
    f'af2_{form}_structure_module': (
      sa.alphafold2.StructureModuleConfig,
      {
        'parameterisation': form,
        'position_scale': scale,
        **STRUCTURE_SIZES,
        **IPA_SIZES,
      },
    )
    for form, scale in (('monomer', 10.0), ('multimer', 20.0))
  },
  'seed_af2_ipa': (
    sa.alphafold2.InvariantPointAttentionConfig,
    {
      'parameterisation': 'seed',
      **IPA_SIZES,
      'head_weights': 'unit',
      'zero_init': False,
    },
  ),
  'af2_monomer_ipa': (
    sa.alphafold2.InvariantPointAttentionConfig,
    {'parameterisation': 'monomer', **IPA_SIZES, 'num_channel': 384},
  ),
  'af2_multimer_ipa': (
    sa.alphafold2.InvariantPointAttentionConfig,
    {'parameterisation': 'multimer', **IPA_SIZES, 'num_channel': 384},
  ),
  'af3_diffusion_atom_cross_attention': (
    sa.alphafold3.AtomCrossAttConfig,
    {'per_token_channels': 768, **AF3_ATOM_SIZES},
  ),
  'af3_trunk_atom_cross_attention': (
    sa.alphafold3.AtomCrossAttConfig,
    {'per_token_channels': 384, **AF3_ATOM_SIZES},
  ),
  'af3_token_transformer': (
    sa.alphafold3.TransformerConfig,
    {
      'num_blocks': 24,
      'super_block_size': 4,
      'num_intermediate_factor': 2,
      'attention': {'num_head': 16},
    },
  ),
  'af3_sampler': (
    sa.diffusion.SamplerConfig,
    {
      **SAMPLER,
      'alignment': False,
      'centre': 'masked',
      'rotation': 'gram_schmidt',
      'schedule': {**SCHEDULE, 'last': 'sigma_min'},
    },
  ),
  'boltz1_sampler': (
    sa.diffusion.SamplerConfig,
    {
      **SAMPLER,
      'gamma_0': 0.605,
      'gamma_min': 1.107,
      'noise_scale': 0.901,
      'step_scale': 1.638,
      'schedule': {**SCHEDULE, 'rho': 8.0},
    },
  ),
  'boltz2_sampler': (
    sa.diffusion.SamplerConfig,
    {**SAMPLER, 'schedule': {**SCHEDULE, 'sigma_min': 1e-4}},
  ),
  'af3_diffusion_head': (
    sa.alphafold3.DiffusionHeadConfig,
    {
      'seq_channel': 384,
      'pair_channel': 128,
      'atoms': {'per_token_channels': 768, **AF3_ATOM_SIZES},
      'transformer': {
        'num_blocks': 24,
        'super_block_size': 4,
        'num_intermediate_factor': 2,
        'block_remat': True,
        'attention': {'num_head': 16},
      },
      'bfloat16': False,
    },
  ),
  'seed_af3_atom_cross_attention': (
    sa.seeds.TokenAtomAttentionConfig,
    {'num_head': 4, 'd_head': 32, 'normalise': 'heads'},
  ),
  'seed_boltz_token_attention': (
    sa.seeds.TokenAttentionPoolConfig,
    {'num_head': 4, 'd_head': 32},
  ),
  'boltz1_structure': (
    sa.boltz.Boltz1AtomAttentionConfig,
    {**BOLTZ_SIZES, 'structure_prediction': True},
  ),
  'boltz1_input_embedder': (
    sa.boltz.Boltz1AtomAttentionConfig,
    {**BOLTZ_SIZES, 'structure_prediction': False},
  ),
  'boltz2_structure': (
    sa.boltz.Boltz2AtomAttentionConfig,
    {**BOLTZ_SIZES, 'structure_prediction': True, **BOLTZ2_CHOICES},
  ),
  'boltz2_input_embedder': (
    sa.boltz.Boltz2AtomAttentionConfig,
    {**BOLTZ_SIZES, 'structure_prediction': False, **BOLTZ2_CHOICES},
  ),
  'boltz1_diffusion': (
    sa.boltz.Boltz1DiffusionConfig,
    {**BOLTZ_DIFFUSION_SIZES, 'token_s_inputs': 455},
  ),
  'boltz2_diffusion': (
    sa.boltz.Boltz2DiffusionConfig,
    {**BOLTZ_DIFFUSION_SIZES, **BOLTZ2_CHOICES, 'token_s_inputs': 384},
  ),
  'pallatom_atom_transformer': (
    sa.pallatom.AtomTransformerConfig,
    {'num_block': 3, 'num_head': 4},
  ),
  'pallatom_atom_feature_encoder': (
    sa.pallatom.AtomFeatureEncoderConfig,
    {
      'c_atom': 128,
      'c_pair': 16,
      'c_out': 256,
      'num_block': 2,
      'num_head': 4,
      'window_size': 32,
    },
  ),
  'pallatom_atom_attention_decoder': (
    sa.pallatom.AtomAttentionDecoderConfig,
    {'num_block': 3, 'num_head': 4, 'window_size': 32},
  ),
  'sedd_dual_track': (
    sa.sedd.DualTrackConfig,
    {
      'hidden_size': 768,
      'num_head': 12,
      'num_block': 8,
      'cond_dim': 256,
      'mlp_ratio': 4,
      'protein_vocab': 37,
      'ligand_vocab': 2365,
      'variant': 'published',
      'bfloat16': False,
    },
  ),
  'sedd_v100_protein': (
    sa.sedd.SeddConfig,
    {
      'hidden_size': 768,
      'num_head': 12,
      'num_block': 8,
      'cond_dim': 256,
      'mlp_ratio': 4,
      'vocab': 37,
      'variant': 'v100',
    },
  ),
  'sedd_small': (
    sa.sedd.SeddConfig,
    {
      'hidden_size': 768,
      'num_head': 12,
      'num_block': 12,
      'cond_dim': 128,
      'mlp_ratio': 4,
      'vocab': 50258,
      'variant': 'sedd',
    },
  ),
  'sedd_medium': (
    sa.sedd.SeddConfig,
    {
      'hidden_size': 1024,
      'num_head': 16,
      'num_block': 24,
      'cond_dim': 128,
      'mlp_ratio': 4,
      'vocab': 50258,
      'variant': 'sedd',
    },
  ),
  'sedd_protein_ligand_small': (
    training.TrainConfig,
    {
      'modes': [
        *('ligand_given_protein', 'ligand_only') * 2,
        'joint',
      ],
      'noise': 'loglinear',
      'steps': 1600,
      'batch_size': 8,
      'seed': 0,
      'log_every': 10,
      'evaluate_every': 400,
      'checkpoint_every': 200,
      'data': {
        'path': 'bundled',
        'protein_buckets': [256],
        'ligand_buckets': [64],
        'learn_ligand_length': True,
        'keep_ends': True,
      },
      'model': {
        'hidden_size': 128,
        'num_head': 4,
        'num_block': 4,
        'cond_dim': 64,
        'protein_vocab': 37,
        'ligand_vocab': 43,
        'dropout': 0.0,
      },
      'optimizer': {
        'learning_rate': 6e-4,
        'warmup': 50,
        'clip': 1.0,
        'ema_decay': 0.995,
      },
    },
  ),
}

each_preset = pytest.mark.parametrize('name', PRESETS)


def test_presets_directory_holds_exactly_the_tested_ones():
  assert {path.stem for path in CONFIGS.glob('*')} == set(PRESETS)
  assert {path.suffix for path in CONFIGS.glob('*')} == {'.toml'}


@each_preset
def test_preset_loads_and_differs_from_defaults_only_where_it_says(name):
  cls, values = PRESETS[name]
  loaded = cls.from_toml(CONFIGS / f'{name}.toml')
  assert loaded == dataclasses.replace(cls(), **values)


def test_seed_preset_of_ipa_equals_the_seed_constructor():
  cls = sa.alphafold2.InvariantPointAttentionConfig
  assert cls.from_toml(CONFIGS / 'seed_af2_ipa.toml') == cls.seed()


@each_preset
def test_preset_spells_out_the_numbers_of_its_source(name):
  _, values = PRESETS[name]
  text = (CONFIGS / f'{name}.toml').read_text(encoding='utf-8')
  assert tomllib.loads(text) == values


@each_preset
def test_preset_header_says_source_and_class(name):
  cls, _ = PRESETS[name]
  text = (CONFIGS / f'{name}.toml').read_text(encoding='utf-8')
  header = text.split('\n\n')[0]
  assert all(line.startswith('#') for line in header.splitlines())
  words = ' '.join(header.replace('#', '').split())
  assert re.search(r'seed document 00\d|as released', words)
  assert re.search(rf'structattn_jax\.\w+\.{cls.__name__}\.from_toml\(', header)
