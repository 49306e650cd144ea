"""The presets in configs/: complete, documented, and what they claim to be."""

import dataclasses
import pathlib
import tomllib

import pytest

import structattn_jax as sa

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'

# The numbers of the sources, written out: neither a changed preset nor a
# changed default may pass unnoticed.
PRESETS = {
  'seed_af2_ipa': (
    sa.InvariantPointAttentionConfig,
    {
      'num_head': 12,
      'num_scalar_qk': 16,
      'num_scalar_v': 16,
      'num_point_qk': 4,
      'num_point_v': 8,
      'head_weights': 'unit',
    },
  ),
  'seed_af3_atom_cross_attention': (
    sa.AtomCrossAttentionConfig,
    {'num_head': 4, 'd_head': 32, 'normalise': 'heads'},
  ),
  'seed_boltz_token_attention': (
    sa.TokenAttentionPoolConfig,
    {'num_head': 4, 'd_head': 32},
  ),
  'pallatom_atom_transformer': (
    sa.AtomTransformerConfig,
    {'num_block': 3, 'num_head': 4},
  ),
  'sedd_dual_track': (
    sa.DualTrackConfig,
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
}

each_preset = pytest.mark.parametrize('name', PRESETS)


def test_presets_directory_holds_exactly_the_tested_ones():
  assert {path.stem for path in CONFIGS.glob('*')} == set(PRESETS)
  assert {path.suffix for path in CONFIGS.glob('*')} == {'.toml'}


@each_preset
def test_preset_equals_the_class_defaults(name):
  cls, _ = PRESETS[name]
  assert cls.from_toml(CONFIGS / f'{name}.toml') == cls()


@each_preset
def test_preset_spells_out_the_numbers_of_its_source(name):
  cls, values = PRESETS[name]
  text = (CONFIGS / f'{name}.toml').read_text(encoding='utf-8')
  assert tomllib.loads(text) == values
  # Only what has no number is left out.
  left_out = {field.name for field in dataclasses.fields(cls)} - set(values)
  assert all(getattr(cls(), field) is None for field in left_out)


@each_preset
def test_preset_header_says_source_and_class(name):
  cls, _ = PRESETS[name]
  text = (CONFIGS / f'{name}.toml').read_text(encoding='utf-8')
  header = text.split('\n\n')[0]
  assert all(line.startswith('#') for line in header.splitlines())
  assert 'seed document 00' in ' '.join(header.replace('#', '').split())
  assert f'structattn_jax.{cls.__name__}.from_toml(' in header
