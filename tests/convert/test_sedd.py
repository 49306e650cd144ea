"""SEDD checkpoints: converted models give upstream's scores, or an error."""

import json
import pathlib
import shutil
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_archive

import structattn_jax as sa
from structattn_jax import checkpoint, convert
from structattn_jax.convert import sedd, state_dicts, torch_file
from structattn_jax.discrete_diffusion import graph
from structattn_jax.network.sedd import dual_track as network
from structattn_jax.network.sedd import single_track

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens/sedd_protein_ligand'
FOLDER = GOLDENS / 'checkpoints'
SINGLE = FOLDER / 'sedd_checkpoint.pth'
HUB = FOLDER / 'hf_sedd/model.safetensors'
DUAL = FOLDER / 'protlig_checkpoint.pth'
V100 = GOLDENS / 'single_v100.npz'

ignore_dead = pytest.mark.filterwarnings(
  'ignore::structattn_jax.convert.DeadParametersWarning'
)


def arrays(tree: Any) -> Any:
  """The content of a file with arrays in the place of tensors."""
  match tree:
    case torch_file.Tensor():
      return np.array(tree.array())
    case dict():
      return {key: arrays(value) for key, value in tree.items()}
    case list():
      return [arrays(value) for value in tree]
  return tree


@pytest.fixture
def single() -> dict[str, Any]:
  return arrays(torch_file.load(SINGLE))


@pytest.fixture
def dual() -> dict[str, Any]:
  return arrays(torch_file.load(DUAL))


def refusal(path, load=convert.load_sedd, **options) -> str:
  with pytest.raises(convert.CheckpointError) as caught:
    load(path, **options)
  message = str(caught.value)
  assert message.startswith(f'{path}: ')
  assert '\n' not in message
  return message


def assert_scores(got: Any, want: np.ndarray) -> None:
  """The tolerance of the README beside the goldens."""
  assert got.shape == want.shape
  assert np.abs(got - want).max() <= 5e-6 * max(1, np.abs(want).max())


def single_scores(
  config: single_track.SeddConfig, params: Any, inputs: Any
) -> jax.Array:
  apply = single_track.transform_sedd(config).apply

  @jax.jit
  @jax.vmap
  def scores(tokens, sigma):
    return graph.log_score(apply(params, tokens, sigma), tokens, sigma)

  return scores(inputs['inputs/indices'], inputs['inputs/sigma'])


def dual_scores(
  config: network.DualTrackConfig, params: Any, inputs: Any
) -> dict[str, jax.Array]:
  apply = network.transform_sedd_dual_track(config).apply

  @jax.jit
  @jax.vmap
  def scores(protein, ligand, sigma):
    logits = apply(params, protein, ligand, sigma)
    return {
      'protein': graph.log_score(logits.protein, protein, sigma),
      'ligand': graph.log_score(logits.ligand, ligand, sigma),
    }

  return scores(
    *(inputs[f'inputs/{name}_indices'] for name in ('protein', 'ligand')),
    inputs['inputs/sigma'],
  )


@pytest.mark.parametrize(
  ('path', 'weights', 'output'),
  [
    (SINGLE, 'model', 'log_score'),
    (SINGLE, 'ema', 'log_score_ema'),
    (SINGLE, None, 'log_score_ema'),
    (HUB, None, 'log_score'),
    (HUB, 'model', 'log_score'),
  ],
)
def test_single_track_gives_upstreams_scores(path, weights, output):
  config, params = convert.load_sedd(path, weights=weights)
  with np.load(FOLDER / 'sedd_checkpoint_expected.npz') as golden:
    got = single_scores(config, params, golden)
    assert_scores(got, golden[f'outputs/{output}'])
  assert config == single_track.SeddConfig(
    hidden_size=16, num_head=2, num_block=2, cond_dim=8, vocab=21
  )


@ignore_dead
@pytest.mark.parametrize('weights', ['model', None])
def test_dual_track_gives_upstreams_scores(weights):
  config, params = convert.load_sedd_dual_track(DUAL, weights=weights)
  with np.load(FOLDER / 'protlig_checkpoint_expected.npz') as golden:
    for track, got in dual_scores(config, params, golden).items():
      assert_scores(got, golden[f'outputs/{track}_log_score'])
  assert config == network.DualTrackConfig(
    hidden_size=16,
    num_head=2,
    num_block=2,
    cond_dim=8,
    dropout=0.0,  # Of the settings in the file.
    ligand_vocab=21,
  )


def v100_state() -> dict[str, np.ndarray]:
  with np.load(V100) as golden:
    return {
      name.removeprefix('params/'): golden[name]
      for name in golden
      if name.startswith('params/')
    }


def test_v100_gives_upstreams_scores(tmp_path):
  state = v100_state()
  shadow = [
    2 * value for name, value in state.items() if 'inv_freq' not in name
  ]
  path = torch_archive.write(
    tmp_path / 'v100.pth',
    {
      'step': 3,
      'model_state_dict': state,
      'ema_state_dict': {'decay': 0.9, 'shadow_params': shadow},
      'config': {'model': {'n_heads': 3, 'dropout': 0.25}},
    },
  )
  config, params = convert.load_sedd(path, weights='model')
  assert (config.variant, config.num_head, config.dropout) == ('v100', 3, 0.25)
  with np.load(V100) as golden:
    got = single_scores(config, params, golden)
    assert_scores(got, golden['outputs/log_score'])
  _, doubled = convert.load_sedd(path)
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(2 * x, y), params, doubled
  )


@ignore_dead
@pytest.mark.parametrize(
  ('path', 'part', 'output'),
  [
    (SINGLE, 'sedd', 'log_score_ema'),
    (HUB, None, 'log_score'),
    (DUAL, 'dual_track', 'protein_log_score'),
  ],
)
def test_converted_file_gives_the_same_scores(path, part, output, tmp_path):
  target = tmp_path / 'converted.npz'
  written = convert.convert_file(path, target, part)
  content = checkpoint.load(target)
  assert content.config == written.config
  jax.tree.map(np.testing.assert_array_equal, content.params, written.params)
  scores: Any
  if part == 'dual_track':
    with np.load(FOLDER / 'protlig_checkpoint_expected.npz') as golden:
      scores = dual_scores(content.config, content.params, golden)['protein']
      assert_scores(scores, golden[f'outputs/{output}'])
  else:
    with np.load(FOLDER / 'sedd_checkpoint_expected.npz') as golden:
      scores = single_scores(content.config, content.params, golden)
      assert_scores(scores, golden[f'outputs/{output}'])
  provenance = content.provenance
  assert provenance['weights'] == ('model' if path == HUB else 'ema')
  assert provenance['converter'] == f'structattn_jax {sa.__version__}'
  if path == HUB:
    assert json.loads(provenance['noise'])['type'] == 'loglinear'
    assert provenance['scale_by_sigma'] == 'true'


@ignore_dead
def test_parameters_are_those_of_our_modules():
  token, sigma = jnp.zeros(3, jnp.int32), jnp.ones(())
  key = jax.random.key(0)
  config, params = convert.load_sedd(SINGLE)
  want = jax.eval_shape(
    single_track.transform_sedd(config).init, key, token, sigma
  )
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, want)
  config, params = convert.load_sedd_dual_track(DUAL)
  init = network.transform_sedd_dual_track(config).init
  want = jax.eval_shape(init, key, token, token, sigma)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, want)


def test_dead_parameters_are_named_in_one_warning():
  with np.load(FOLDER / 'protlig_checkpoint_expected.npz') as golden:
    dead = json.loads(golden['meta'].item())['dead_keys']
  with pytest.warns(convert.DeadParametersWarning) as caught:
    convert.load_sedd_dual_track(DUAL)
  (warning,) = caught
  listed = str(warning.message).rpartition(': ')[2].split(', ')
  assert sorted(listed) == sorted(dead)


def test_cleaned_state_dict_gives_no_warning(dual, tmp_path):
  state = {
    name.removeprefix('transformer.'): value
    for name, value in dual['model'].items()
    if '.norm3.' not in name and '.attn.' not in name
  }
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    _, params = convert.load_sedd_dual_track(
      torch_archive.write(tmp_path / 'bare.pt', state)
    )
  with pytest.warns(convert.DeadParametersWarning):
    _, want = convert.load_sedd_dual_track(DUAL, weights='model')
  jax.tree.map(np.testing.assert_array_equal, params, want)


@pytest.mark.parametrize('container', ['pt', 'npz', 'safetensors', 'ddp'])
def test_bare_state_dict_is_read_from_every_container(
  container, single, tmp_path
):
  state = single['model']
  if container == 'npz':
    path = tmp_path / 'state.npz'
    np.savez(path, **state)
  elif container == 'safetensors':
    path = tmp_path / 'model.safetensors'
    shutil.copy(HUB, path)  # Without its config.json.
  else:
    if container == 'ddp':
      state = {f'module._orig_mod.{name}': x for name, x in state.items()}
    path = torch_archive.write(tmp_path / 'pytorch_model.bin', state)
  config, params = convert.load_sedd(path)
  want_config, want = convert.load_sedd(SINGLE, weights='model')
  assert config == want_config
  jax.tree.map(np.testing.assert_array_equal, params, want)
  assert convert.detect_format(path) == 'sedd'
  assert 'no moving averages' in refusal(path, weights='ema')


def test_half_precision_is_widened(single, tmp_path):
  state = {
    name: value.astype(np.float16) for name, value in single['model'].items()
  }
  state['rotary_emb.inv_freq'] = single['model']['rotary_emb.inv_freq']
  _, params = convert.load_sedd(torch_archive.write(tmp_path / 'a.pt', state))
  table = params['vocab_embed']['embedding']
  assert table.dtype == np.float32
  np.testing.assert_array_equal(table, state['vocab_embed.embedding'])


def test_averages_of_frozen_tasks_are_matched_by_shape(dual, tmp_path):
  """A task that does not train the ligand track has no averages for it."""
  state = dual['model']
  names = [name for name in state if 'inv_freq' not in name]
  shadow = dual['ema']['shadow_params']
  assert len(shadow) == len(names)
  changed = [3 * value for value in shadow]
  for frozen in ((), ('lig',), ('prot',), ('lig', 'cross_attn')):
    kept = [
      value
      for name, value in zip(names, changed, strict=True)
      if not any(part in name for part in frozen)
    ]
    path = torch_archive.write(
      tmp_path / 'frozen.pth', {**dual, 'ema': {'shadow_params': kept}}
    )
    with pytest.warns(convert.DeadParametersWarning):
      loaded = sedd.read_dual_track(path)
    with pytest.warns(convert.DeadParametersWarning):
      raw = sedd.read_dual_track(DUAL, weights='model')
    for module, values in loaded.params.items():
      is_frozen = any(part in module for part in frozen)
      for name, value in values.items():
        np.testing.assert_array_equal(
          value, raw.params[module][name] * (1 if is_frozen else 3)
        )


@pytest.mark.parametrize(
  'averages',
  [[], [np.ones(3, np.float32)], None, {'a': 1}, 'text', [1, 2]],
)
def test_averages_that_do_not_fit_are_refused(averages, single, tmp_path):
  single['ema']['shadow_params'] = averages
  path = torch_archive.write(tmp_path / 'file.pth', single)
  assert 'moving averages' in refusal(path)
  convert.load_sedd(path, weights='model')
  single['ema'] = {}
  path = torch_archive.write(tmp_path / 'file.pth', single)
  assert 'no moving averages' in refusal(path)


def test_all_that_is_wrong_is_in_one_error(single, tmp_path):
  state = single['model']
  del state['blocks.1.norm2.weight'], state['output_layer.linear.bias']
  state['blocks.0.extra.weight'] = np.ones(3, np.float32)
  state['blocks.0.attn_out.weight'] = np.ones((16, 8), np.float32)
  state['blocks.1.mlp.0.weight'] = state['blocks.1.mlp.0.weight'].astype('f8')
  path = torch_archive.write(tmp_path / 'bad.pt', state)
  message = refusal(path)
  for expected in (
    'does not fit the sedd parameters: ',
    'missing blocks.1.norm2.weight;',
    'missing output_layer.linear.bias;',
    'unknown blocks.0.extra.weight;',
    'wrong blocks.0.attn_out.weight has shape [16, 8], expected [16, 16] = '
    '[c, c]',
    'wrong blocks.1.mlp.0.weight has dtype float64, expected float32',
  ):
    assert expected in message
  assert message.count('; ') == 4


@pytest.mark.parametrize(
  ('name', 'shape'),
  [
    ('vocab_embed.embedding', (16, 21)),
    ('sigma_map.mlp.0.weight', (256, 8)),
    ('blocks.0.norm1.weight', (8,)),
    ('blocks.1.attn_qkv.weight', (16, 48)),
    ('blocks.0.adaLN_modulation.bias', (97,)),
    ('output_layer.linear.weight', (21, 16, 1)),
  ],
)
def test_the_wrong_entry_is_blamed_and_no_other(name, shape, single, tmp_path):
  state = single['model']
  state[name] = np.zeros(shape, np.float32)
  message = refusal(torch_archive.write(tmp_path / 'bad.pt', state))
  assert f'wrong {name} has shape' in message
  assert message.count('wrong ') == 1


def test_missing_layer_is_asked_for(single, tmp_path):
  state = {
    name.replace('blocks.1.', 'blocks.2.'): value
    for name, value in single['model'].items()
  }
  message = refusal(torch_archive.write(tmp_path / 'bad.pt', state))
  assert 'missing blocks.1.norm1.weight' in message
  assert 'unknown blocks.2.norm1.weight' in message


def test_heads_come_from_the_rotary_frequencies(single, tmp_path):
  state = single['model']
  path = tmp_path / 'heads.pt'

  def half(count: int) -> np.ndarray:
    return (10000.0 ** (-np.arange(count) / count)).astype(np.float32)

  state['rotary_emb.inv_freq'] = half(2)
  torch_archive.write(path, state)
  assert convert.load_sedd(path)[0].num_head == 4
  assert '2 heads of 4 channels in 16' in refusal(path, num_head=2)
  state['rotary_emb.inv_freq'] = half(4) * 2
  torch_archive.write(path, state)
  assert 'other rotary frequencies' in refusal(path)
  del state['rotary_emb.inv_freq']
  torch_archive.write(path, state)
  assert 'give num_head' in refusal(path)
  assert convert.load_sedd(path, num_head=2)[0].num_head == 2
  assert '3 heads' in refusal(path, num_head=3)
  (tmp_path / 'config.json').write_text('{"model": {"n_heads": 4}}')
  assert convert.load_sedd(path)[0].num_head == 4
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(convert.CheckpointError, match=r'config\.json: not JSON'):
    convert.load_sedd(path)


def test_dual_track_that_attends_across_the_batch_is_refused(dual, tmp_path):
  dual['model']['transformer.blocks_prot.0.attn_qkv.bias'] = np.zeros(
    48, np.float32
  )
  path = torch_archive.write(tmp_path / 'cross.pth', dual)
  message = refusal(path, convert.load_sedd_dual_track)
  assert 'across the batch' in message


@ignore_dead
def test_the_other_kind_is_refused():
  assert 'not a single-track SEDD' in refusal(DUAL)
  assert 'not a dual-track SEDD' in refusal(
    SINGLE, convert.load_sedd_dual_track
  )
  for load in (convert.load_sedd, convert.load_sedd_dual_track):
    refusal(GOLDENS / 'dual_components.npz', load)
    refusal(FOLDER / 'hf_sedd/config.json', load)


@pytest.mark.parametrize(
  'content',
  [
    {'model': {'vocab_embed.embedding': 'text'}},
    {'model': {3: np.ones(3)}},
    {'model': []},
    [1, 2],
    7,
    {},
  ],
)
def test_files_without_a_model_are_refused(content, tmp_path):
  path = torch_archive.write(tmp_path / 'file.pth', content)
  refusal(path)
  refusal(path, convert.load_sedd_dual_track)
  with pytest.raises(convert.CheckpointError):
    convert.convert_file(path, tmp_path / 'out.npz')


def test_tensors_that_repeat_their_elements_are_refused(tmp_path):
  """A small file cannot ask for a large model."""
  state = b'}('
  for name in ('vocab_embed.embedding', 'blocks.0.attn_out.weight'):
    memory = torch_archive.storage('0', 1)
    state += torch_archive.value(name)
    state += torch_archive.tensor(memory, (2**20, 2**20), (0, 0))
  path = torch_archive.write_members(
    tmp_path / 'huge.pt',
    torch_archive.program(state, b'u'),
    {'data/0': bytes(4)},
  )
  message = refusal(path, num_head=2)
  assert 'wrong vocab_embed.embedding repeats its elements' in message


def test_names_that_are_equal_without_wrappers_are_refused(single, tmp_path):
  state = single['model']
  state['_orig_mod.blocks.0.norm1.weight'] = np.ones(16, np.float32)
  path = torch_archive.write(tmp_path / 'twice.pt', state)
  assert 'names twice: blocks.0.norm1.weight' in refusal(path)


def test_axes_of_tables_are_checked():
  with pytest.raises(ValueError, match=r'factor\*size\+offset'):
    state_dicts.convert(
      'file', 'no', {'a': np.ones(1)}, {'a': state_dicts.Entry('c*2', 'b//w')}
    )
