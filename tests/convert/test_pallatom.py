"""Pallatom checkpoints: the converted chain gives upstream's outputs."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import torch_archive

from structattn_jax import checkpoint, convert
from structattn_jax.convert import torch_file
from structattn_jax.network.pallatom import atom_transformers as network

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens'
FOLDER = GOLDENS / 'pallatom_atom_transformers'
CONTAINERS = ('bare_state_dict', 'wrapped', 'resume')
WINDOW = 6  # Of the recorded chain.
LOADERS = (convert.load_atom_encoder, convert.load_atom_decoder)


def sample(container: str = 'wrapped') -> pathlib.Path:
  return FOLDER / f'checkpoint_run_config_{container}.pt'


@pytest.fixture
def state() -> dict[str, np.ndarray]:
  content = torch_file.load(sample('bare_state_dict'))
  return {name: np.array(value.array()) for name, value in content.items()}


@pytest.fixture(scope='module')
def chain() -> dict[str, np.ndarray]:
  with np.load(FOLDER / 'chain_run_config.npz') as golden:
    return dict(golden)


def refusal(path, load=convert.load_atom_encoder, *arguments) -> str:
  with pytest.raises(convert.CheckpointError) as caught:
    load(path, *arguments)
  message = str(caught.value)
  assert message.startswith(f'{path}: ')
  assert '\n' not in message
  return message


def run_chain(encoder, decoders, inputs) -> dict[str, Any]:
  """The encoder and its decoders, as `meta` of the golden says."""
  tok_idx = inputs['tok_idx'].astype(np.int32)
  names = ('ref_pos', 'ref_element', 'ref_space_uid')
  names += ('s_input', 'z_input', 'r_scaled')
  values = {name: inputs[name] for name in names}
  values['ref_space_uid'] = values['ref_space_uid'].astype(np.int32)

  @jax.jit
  def run(encoder_params, decoder_params, values):
    config, apply = encoder[0], network.transform_atom_feature_encoder
    out = apply(config).apply(encoder_params, **values, tok_idx=tok_idx)
    c, r_sum, q = out.c_l, 0.0, None
    for (config, _), params in zip(decoders, decoder_params, strict=True):
      q, _, r_update, c = network.transform_atom_attention_decoder(
        config
      ).apply(
        params,
        out.q_skip,
        out.p_skip,
        out.c_skip,
        c,
        out.s_i,
        values['z_input'],
        tok_idx,
      )
      r_sum += r_update
    return {
      's_i': out.s_i,
      'q_skip': out.q_skip,
      'q': q,
      'r_sum': r_sum,
      'c_out': c,
    }

  return run(encoder[1], [params for _, params in decoders], values)


def assert_chain(found: dict[str, Any], chain: dict[str, np.ndarray]) -> None:
  """The tolerance of the README beside the goldens."""
  for name, got in found.items():
    want = chain[f'outputs64/{name}']
    assert np.abs(got - want).max() <= 5e-6 * np.abs(want).max()


def test_converted_chain_gives_upstreams_outputs(chain):
  encoder = convert.load_atom_encoder(sample(), window_size=WINDOW)
  decoders = [
    convert.load_atom_decoder(sample(), unit, window_size=WINDOW)
    for unit in range(3)
  ]
  inputs = {
    name.removeprefix('inputs/'): value
    for name, value in chain.items()
    if name.startswith('inputs/')
  }
  assert_chain(run_chain(encoder, decoders, inputs), chain)
  assert encoder[0] == network.AtomFeatureEncoderConfig(
    c_atom=16,
    c_pair=2,
    c_out=32,
    num_block=2,
    num_head=4,
    window_size=WINDOW,
  )
  assert decoders[0][0] == network.AtomAttentionDecoderConfig(
    num_block=3, num_head=4, window_size=WINDOW
  )


@pytest.mark.parametrize('load', LOADERS)
@pytest.mark.parametrize('container', CONTAINERS)
def test_every_container_gives_the_parameters_of_the_golden(
  container, load, chain
):
  config, params = load(sample(container))
  assert config.window_size == network.WINDOW_SIZE
  prefix = {
    convert.load_atom_encoder: 'params/atom_encoder.',
    convert.load_atom_decoder: 'params/atom_decoders.0.',
  }[load]
  want = {
    name.removeprefix(prefix): value
    for name, value in chain.items()
    if name.startswith(prefix)
  }
  assert sum(map(len, params.values())) == len(want)
  for module, values in params.items():
    path = module.partition('/')[2].replace('mlp_p_', 'mlp_p.')
    path = path.replace('blocks_', 'blocks.').replace('/', '.')
    for name, value in values.items():
      kind = 'bias' if name == 'offset' else 'weight'
      original = want[f'{path}.{kind}']
      np.testing.assert_array_equal(
        value, original.T if name == 'weights' else original
      )


def test_parameters_are_those_of_our_modules(chain):
  encoder = convert.load_atom_encoder(sample(), window_size=WINDOW)
  decoder = convert.load_atom_decoder(sample(), 2, window_size=WINDOW)
  inputs = {
    name.removeprefix('inputs/'): value[0]
    for name, value in chain.items()
    if name.startswith('inputs/')
  }
  tok_idx = inputs.pop('tok_idx')
  init, apply = network.transform_atom_feature_encoder(encoder[0])
  key = jax.random.key(0)
  want = jax.eval_shape(lambda: init(key, **inputs, tok_idx=tok_idx))
  assert jax.tree.map(np.shape, encoder[1]) == jax.tree.map(np.shape, want)
  out = jax.eval_shape(lambda: apply(encoder[1], **inputs, tok_idx=tok_idx))
  init = network.transform_atom_attention_decoder(decoder[0]).init
  want = jax.eval_shape(
    lambda out: init(
      key,
      out.q_skip,
      out.p_skip,
      out.c_skip,
      out.c_l,
      out.s_i,
      inputs['z_input'],
      tok_idx,
    ),
    out,
  )
  assert jax.tree.map(np.shape, decoder[1]) == jax.tree.map(np.shape, want)


@pytest.mark.parametrize(
  'part', [None, 'atom_encoder', 'atom_decoders.0', 'atom_decoders.2']
)
def test_converted_file_holds_the_same(part, tmp_path):
  target = tmp_path / 'converted.npz'
  convert.convert_file(sample(), target, part)
  content = checkpoint.load(target)
  if part is None or part == 'atom_encoder':
    config, params = convert.load_atom_encoder(sample())
  else:
    config, params = convert.load_atom_decoder(sample(), int(part[-1]))
  assert content.config == config
  jax.tree.map(np.testing.assert_array_equal, dict(content.params), params)
  assert content.provenance['source_format'] == 'pallatom'
  assert '32' in content.provenance['window_size']


def test_parts_that_are_not_there_are_refused(tmp_path):
  target = tmp_path / 'out.npz'
  for part, message in (
    ('atom_decoders.3', 'no decoder 3, only 3 from 0'),
    ('atom_decoders.x', 'only atom_encoder, atom_decoders.N'),
    ('ipa', 'only atom_encoder, atom_decoders.N'),
  ):
    with pytest.raises(convert.CheckpointError, match=message):
      convert.convert_file(sample(), target, part)
  with pytest.raises(convert.CheckpointError, match='no moving averages'):
    convert.convert_file(sample(), target, weights='ema')
  assert not target.exists()


@pytest.mark.parametrize('container', ['npz', 'safetensors', 'ddp'])
def test_state_dict_is_read_from_every_container(container, state, tmp_path):
  path = tmp_path / f'state.{container}'
  if container == 'npz':
    np.savez(path, **state)
  elif container == 'safetensors':
    save = pytest.importorskip('safetensors.numpy').save_file
    save(state, path)
  else:
    wrapped = {f'module.{name}': value for name, value in state.items()}
    torch_archive.write(path, {'model': wrapped})
  for load in LOADERS:
    config, params = load(path)
    want_config, want = load(sample())
    assert config == want_config
    jax.tree.map(np.testing.assert_array_equal, params, want)
  assert convert.detect_format(path) == 'pallatom'


def later(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Names like those of the architecture from commit 2a0278f7 on."""
  found = {}
  for name, value in state.items():
    outer, inside, local = name.partition('.transformer.blocks.')
    if inside:
      index, _, local = local.partition('.')
      local = local.replace('norm_c', 'adaln.norm').replace('to_', 'attn.to_')
      name = f'{outer}.transformer.blocks.{index}.{local}'
      name = name.replace('.ff', '.transition.ff')
    found[name] = value
  return found


@pytest.mark.parametrize('load', LOADERS)
def test_later_architecture_is_recognised_and_refused(load, state, tmp_path):
  path = torch_archive.write(tmp_path / 'later.pt', {'model': later(state)})
  message = refusal(path, load)
  assert 'a later Pallatom (from commit 2a0278f7 on)' in message
  assert 'no atom_' in message
  assert 'transformer.blocks.0.to_q.weight' in message
  assert 'self-attention over the queries' in message


def test_all_that_is_wrong_is_in_one_error(state, tmp_path):
  del state['atom_encoder.proj_agg.weight']
  del state['atom_encoder.transformer.blocks.0.norm_q.bias']
  state['atom_encoder.gate.weight'] = np.ones(3, np.float32)
  state['atom_encoder.mlp_p.6.weight'] = np.ones((3, 2), np.float32)
  state['atom_encoder.proj_v.weight'] = np.ones((2, 1))
  # Of other modules, which must not matter.
  state['atom_decoders.1.proj_r.weight'] = np.ones((9, 9), np.float32)
  path = torch_archive.write(tmp_path / 'bad.pt', state)
  message = refusal(path)
  for expected in (
    'missing atom_encoder.proj_agg.weight;',
    'missing atom_encoder.transformer.blocks.0.norm_q.bias;',
    'unknown atom_encoder.gate.weight;',
    'wrong atom_encoder.mlp_p.6.weight has shape [3, 2], expected [2, 2] = '
    '[c_pair, c_pair]',
    'wrong atom_encoder.proj_v.weight has dtype float64, expected float32',
  ):
    assert expected in message
  assert message.count('; ') == 4
  convert.load_atom_decoder(path, 0)
  assert 'wrong atom_decoders.1.proj_r.weight' in refusal(
    path, convert.load_atom_decoder, 1
  )


def test_heads_that_do_not_divide_are_refused(state, tmp_path):
  for name in state:
    if name.endswith('pair_bias.weight'):
      state[name] = np.ones((3, 2), np.float32)
  path = torch_archive.write(tmp_path / 'heads.pt', state)
  for load in LOADERS:
    assert '3 heads do not divide 16 channels' in refusal(path, load)


def test_checkpoint_of_another_model_is_refused(tmp_path):
  path = torch_archive.write(
    tmp_path / 'other.pt', {'layer.weight': np.ones(3, np.float32)}
  )
  for load in LOADERS:
    assert 'not a Pallatom checkpoint' in refusal(path, load)
  with pytest.raises(convert.CheckpointError, match='of a known model'):
    convert.detect_format(path)
