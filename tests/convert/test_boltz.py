"""Boltz checkpoints: every tensor is used once, and outputs are upstream's."""

import pathlib
import pickle
import re
from typing import Any

import jax
import numpy as np
import pytest
import torch_archive

from structattn_jax import checkpoint, convert
from structattn_jax.convert import boltz, state_dicts, torch_file
from structattn_jax.network.boltz import atom_attention as boltz_encoders
from structattn_jax.network.boltz import conditioning as boltz_conditioning
from structattn_jax.network.boltz import diffusion as boltz_diffusion
from structattn_jax.network.boltz import parameters as boltz_parameters
from structattn_jax.verification import boltz_diffusion as replay_diffusion
from structattn_jax.verification import golden as golden_lib

FOLDER = pathlib.Path(__file__).parents[1] / 'goldens/boltz_atom_encoder'
BOLTZ1 = FOLDER / 'boltz1_sample.ckpt'
BOLTZ2 = FOLDER / 'boltz2_sample.ckpt'
OMEGACONF = FOLDER / 'boltz2_sample_omegaconf.ckpt'
SCORE = 'structure_module.score_model.'
ENCODER = f'{SCORE}atom_attention_encoder.'
LAYER = f'{ENCODER}atom_encoder.diffusion_transformer.layers.0.'
ENCODERS = ('score_model', 'input_embedder', 'confidence_input_embedder')

# Part and where its tensors are.
PREFIXES = {
  (BOLTZ1, 'score_model'): (ENCODER, f'{SCORE}atom_attention_decoder.'),
  (BOLTZ1, 'input_embedder'): ('input_embedder.atom_attention_encoder.',),
  (BOLTZ1, 'confidence_input_embedder'): (
    'confidence_module.input_embedder.atom_attention_encoder.',
  ),
  (BOLTZ1, 'single_conditioner'): (f'{SCORE}single_conditioner.',),
  (BOLTZ1, 'pairwise_conditioner'): (f'{SCORE}pairwise_conditioner.',),
  (BOLTZ1, 'rel_pos'): ('rel_pos.',),
  (BOLTZ1, 'confidence_rel_pos'): ('confidence_module.rel_pos.',),
  (BOLTZ2, 'score_model'): (
    ENCODER,
    f'{SCORE}atom_attention_decoder.',
    'diffusion_conditioning.',
  ),
  (BOLTZ2, 'input_embedder'): ('input_embedder.',),
  (BOLTZ2, 'single_conditioner'): (f'{SCORE}single_conditioner.',),
  (BOLTZ2, 'pairwise_conditioner'): (
    'diffusion_conditioning.pairwise_conditioner.',
  ),
  (BOLTZ2, 'rel_pos'): ('rel_pos.',),
  (BOLTZ2, 'confidence_rel_pos'): ('confidence_module.rel_pos.',),
}


def state_of(path: pathlib.Path) -> dict[str, np.ndarray]:
  content = torch_file.load(path)['state_dict']
  return {name: np.array(tensor.array()) for name, tensor in content.items()}


def settings_of(path: pathlib.Path) -> dict[str, Any]:
  return state_dicts.plain(torch_file.load(path)['hyper_parameters'])


@pytest.fixture
def state1() -> dict[str, np.ndarray]:
  return state_of(BOLTZ1)


@pytest.fixture
def state2() -> dict[str, np.ndarray]:
  return state_of(BOLTZ2)


def written(
  tmp_path: pathlib.Path, state: Any, settings: Any = None, **more: Any
) -> pathlib.Path:
  content = {'state_dict': state, 'hyper_parameters': settings or {}, **more}
  return torch_archive.write(tmp_path / 'model.ckpt', content)


def refusal(path, part='score_model', **options) -> str:
  with pytest.raises(convert.CheckpointError) as caught:
    convert.load_boltz(path, part, **options)
  message = str(caught.value)
  assert message.startswith(f'{path}: ')
  assert '\n' not in message
  return message


def upstream_name(module: str, name: str) -> str:
  """The torch name of a parameter, below the scope of its part."""
  module = re.sub(r'(?<=[a-z])_(\d+)(?=/|_|$)', r'.\1', module)
  module = re.sub(r'\.(\d+)_(\d+)', r'.\1.\2', module).replace('/', '.')
  kind = 'bias' if name in ('bias', 'offset') else 'weight'
  return f'{module}.{kind}'


@pytest.mark.parametrize(('path', 'part'), PREFIXES)
def test_every_tensor_of_a_part_is_taken_unchanged(path, part):
  _, params = convert.load_boltz(path, part)
  prefixes = PREFIXES[path, part]
  # What our names lack of upstream's.
  outer = {
    'score_model': SCORE,
    'input_embedder': 'input_embedder.',
    'confidence_input_embedder': 'confidence_module.input_embedder.',
    'confidence_rel_pos': 'confidence_module.',
    'rel_pos': '',
  }.get(part, prefixes[0].removesuffix(f'{part}.'))
  want = {
    name: value
    for name, value in state_of(path).items()
    if name.startswith(prefixes) and '.output_projection.0.' not in name
  }
  # The gate of the transition has that name, too, but no other.
  want |= {
    name: value
    for name, value in state_of(path).items()
    if name.startswith(prefixes) and '.transition.output_proj' in name
  }
  assert sum(map(len, params.values())) == len(want)
  for module, values in params.items():
    is_conditioning = module.startswith('diffusion_conditioning/')
    for name, value in values.items():
      local = upstream_name(module, name)
      original = want.pop(local if is_conditioning else f'{outer}{local}')
      if 'r_to_q_trans' in module:
        original = original[:, :3]
      if name == 'weights':
        original = original.T
      np.testing.assert_array_equal(value, original, strict=True)
  assert not want


@pytest.mark.parametrize(
  ('path', 'part'), [key for key in PREFIXES if key[1] in ENCODERS]
)
def test_parameters_are_those_of_our_module(path, part):
  config, params = convert.load_boltz(path, part)
  assert isinstance(config, boltz_encoders.Config)
  want = boltz_parameters.atom_attention_parameters(config)
  assert {
    module: {name: value.shape for name, value in values.items()}
    for module, values in params.items()
  } == {
    module: {name: parameter.shape for name, parameter in values.items()}
    for module, values in want.items()
  }


def test_configurations_say_what_shapes_and_settings_say():
  assert convert.load_boltz(BOLTZ1)[0] == (
    boltz_encoders.Boltz1AtomAttentionConfig(
      atom_s=16,
      atom_z=4,
      token_s=8,
      token_z=6,
      atoms_per_window_queries=8,
      atoms_per_window_keys=32,
      atom_encoder_depth=2,
      atom_encoder_heads=2,
      atom_decoder_depth=1,
      atom_decoder_heads=2,
    )
  )
  config, _ = convert.load_boltz(BOLTZ2)
  assert isinstance(config, boltz_encoders.Boltz2AtomAttentionConfig)
  assert config.token_transformer_depth == 1
  assert config.token_transformer_heads == 2
  assert not config.use_no_atom_char
  config, _ = convert.load_boltz(BOLTZ1, 'input_embedder')
  assert isinstance(config, boltz_encoders.Boltz1AtomAttentionConfig)
  assert not config.structure_prediction
  assert (config.atom_encoder_depth, config.atom_encoder_heads) == (1, 2)
  assert convert.load_boltz(BOLTZ1, 'single_conditioner')[0] == (
    boltz.SingleConditioningConfig(token_s=8, num_input=87, dim_fourier=8)
  )
  assert convert.load_boltz(BOLTZ2, 'pairwise_conditioner')[0] == (
    boltz.PairwiseConditioningConfig(token_z=6, num_input=12)
  )
  relative = boltz_conditioning.RelativePositionConfig
  assert convert.load_boltz(BOLTZ1, 'rel_pos')[0] == relative(token_z=6)
  assert convert.load_boltz(BOLTZ2, 'rel_pos')[0] == relative(
    token_z=6, same_chain_rule='entity', cyclic=True
  )


def test_conditioners_run_with_the_converted_parameters():
  rng = np.random.default_rng(0)
  n, token_s = 5, 8
  single = rng.standard_normal((n, token_s), np.float32)
  pair = rng.standard_normal((n, n, 6), np.float32)
  for path in (BOLTZ1, BOLTZ2):
    config, params = convert.load_boltz(path, 'single_conditioner')
    assert isinstance(config, boltz.SingleConditioningConfig)
    inputs = rng.standard_normal((n, config.num_input - token_s), np.float32)
    own = {name.partition('/')[2]: value for name, value in params.items()}
    s, fourier = boltz_conditioning.single_conditioning(
      own, single, inputs, np.float32(0.3)
    )
    assert s.shape == (n, 2 * token_s)
    assert fourier is not None
    assert fourier.shape == (config.dim_fourier,)
    _, params = convert.load_boltz(path, 'pairwise_conditioner')
    own = {name.partition('/')[2]: value for name, value in params.items()}
    z = boltz_conditioning.pairwise_conditioning(own, pair, pair)
    assert z.shape == pair.shape
    assert np.all(np.isfinite(s))
    assert np.all(np.isfinite(z))


def test_omegaconf_objects_are_unwrapped():
  assert settings_of(OMEGACONF) == settings_of(BOLTZ2)
  for part in boltz.BOLTZ2_PARTS:
    if part == 'diffusion':  # These files have no token transformer.
      assert 'there is no diffusion' in refusal(OMEGACONF, part)
      continue
    config, params = convert.load_boltz(OMEGACONF, part)
    want_config, want = convert.load_boltz(BOLTZ2, part)
    assert config == want_config
    jax.tree.map(np.testing.assert_array_equal, params, want)


def golden_checkpoint(
  name: str, tmp_path: pathlib.Path
) -> tuple[pathlib.Path, dict[str, np.ndarray], dict[str, Any]]:
  """The parameters of a golden as a checkpoint, with its arrays."""
  import json

  with np.load(FOLDER / f'{name}.npz') as file:
    golden = dict(file)
  recorded = json.loads(golden.pop('meta').item())['config']
  settings = {
    'atoms_per_window_queries': recorded['W'],
    'atoms_per_window_keys': recorded['H'],
  }
  names = ('use_atom_backbone_feat', 'use_residue_feats_atoms', 'token_z')
  settings |= {name: recorded[name] for name in names if name in recorded}
  state = {
    name.removeprefix('params/'): value
    for name, value in golden.items()
    if name.startswith('params/')
  }
  return written(tmp_path, state, settings), golden, recorded


def features(golden: dict[str, np.ndarray], item: int) -> Any:
  feats = {
    name.removeprefix('inputs/'): value[item]
    for name, value in golden.items()
    if name.startswith('inputs/') and len(value) > item
  }
  return boltz_encoders.BoltzAtomFeatures.from_upstream(feats)


def assert_close(got: Any, want: np.ndarray, mask: Any = None) -> None:
  """The tolerance of the README beside the goldens."""
  got, want = np.asarray(got), np.asarray(want)
  if mask is not None:
    got, want = got[mask], want[mask]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


def test_converted_input_embedder_gives_upstreams_outputs(tmp_path):
  path, golden, _ = golden_checkpoint('v1_input_embedder', tmp_path)
  config, params = convert.load_boltz(path, 'input_embedder')
  model = boltz_encoders.cached_atom_attention(config)

  @jax.jit
  def run(params, features):
    return model.encode(params, model.precompute(params, features))

  inputs = features(golden, 1)
  out = run(params, inputs)
  assert_close(out.tokens, golden['outputs64/a'][1])
  assert_close(out.atoms, golden['outputs64/q'][1], inputs.atom_mask)


def test_converted_score_model_gives_upstreams_outputs(tmp_path):
  path, golden, recorded = golden_checkpoint('v2_structure', tmp_path)
  target = tmp_path / 'converted.npz'
  convert.convert_file(path, target)
  content = checkpoint.load(target)
  config = content.config
  assert config == boltz_encoders.Boltz2AtomAttentionConfig(
    atom_s=24,
    atom_z=6,
    token_s=10,
    token_z=8,
    atoms_per_window_queries=16,
    atoms_per_window_keys=64,
    atom_encoder_depth=2,
    atom_encoder_heads=3,
    atom_decoder_depth=3,
    atom_decoder_heads=3,
    use_atom_backbone_feat=True,
    use_residue_feats_atoms=True,
    token_transformer_depth=2,
    token_transformer_heads=3,
  )
  model = boltz_encoders.cached_atom_attention(config)
  conditioner = {
    name.removeprefix('diffusion_conditioning/pairwise_conditioner/'): values
    for name, values in content.params.items()
    if 'pairwise_conditioner' in name
  }

  @jax.jit
  def run(params, features, single, pair, relative, positions, token_act):
    z = boltz_conditioning.pairwise_conditioning(conditioner, pair, relative)
    context = model.precompute(params, features, single, z)
    out = model.encode(params, context, positions)
    return z, out, model.decode(params, context, token_act, out.atoms)

  item, sample = 1, 3  # The second sample of the second complex.
  inputs = features(golden, item)
  z, out, update = run(
    content.params,
    inputs,
    *(
      golden[f'inputs/{name}'][item]
      for name in ('s_trunk', 'z_trunk', 'relative_position_encoding')
    ),
    *(golden[f'inputs/{name}'][sample] for name in ('r', 'a_dec')),
  )
  mask = inputs.atom_mask
  assert_close(z, golden['outputs64/z_cond'][item])
  assert_close(out.tokens, golden['outputs64/a'][sample])
  assert_close(out.atoms, golden['outputs64/q'][sample], mask)
  assert_close(update, golden['outputs64/r_update'][sample], mask)
  assert recorded['heads'] == 3


@pytest.mark.parametrize('container', ['pt', 'npz', 'safetensors', 'compiled'])
@pytest.mark.parametrize('path', [BOLTZ1, BOLTZ2])
def test_bare_state_dict_is_read_from_every_container(
  path, container, tmp_path
):
  state = state_of(path)
  file = tmp_path / f'state.{container}'
  if container == 'npz':
    np.savez(file, **state)
  elif container == 'safetensors':
    save = pytest.importorskip('safetensors.numpy').save_file
    save(state, file)
  else:
    if container == 'compiled':
      state = {
        name.replace('score_model.', 'score_model._orig_mod.'): value
        for name, value in state.items()
      }
    torch_archive.write(file, state)
  settings = settings_of(path)
  for part in ('score_model', 'input_embedder', 'rel_pos'):
    config, params = convert.load_boltz(file, part, hyper_parameters=settings)
    want_config, want = convert.load_boltz(path, part)
    assert config == want_config
    jax.tree.map(np.testing.assert_array_equal, params, want)
  # Windows are those of the released models.
  config, _ = convert.load_boltz(file)
  assert isinstance(config, boltz_encoders.Config)
  assert config.atoms_per_window_queries == 32
  assert config.atoms_per_window_keys == 128
  assert convert.detect_format(file) == (
    'boltz1' if path == BOLTZ1 else 'boltz2'
  )
  if path == BOLTZ2:
    message = refusal(file, 'rel_pos')
    assert 'fix_sym_check is needed' in message
    assert '`hyper_parameters`' in message


def test_moving_averages_are_taken_if_asked_for(state1, state2, tmp_path):
  named = {name: 2 * value for name, value in state2.items()}
  path = written(
    tmp_path, state2, settings_of(BOLTZ2), ema={'ema_weights': named}
  )
  double = jax.tree.map(lambda x: 2 * x, convert.load_boltz(BOLTZ2)[1])
  _, params = convert.load_boltz(path, weights='ema')
  jax.tree.map(np.testing.assert_array_equal, params, double)
  # Boltz-1's are a list: no copies, and not what is not trained.
  parameters = {
    name: value
    for name, value in state1.items()
    if 'fourier_embed' not in name
    and not ('.output_projection.0.' in name and '.transition.' not in name)
  }
  listed = [2 * value for value in parameters.values()]
  shared = _shared(state1)
  path = tmp_path / 'boltz1.ckpt'
  torch_archive.write(
    path, {'state_dict': shared, 'ema': {'shadow_params': listed}}
  )
  for part in ('score_model', 'single_conditioner'):
    _, params = convert.load_boltz(path, part, weights='ema')
    _, plain = convert.load_boltz(path, part)
    for module, values in params.items():
      factor = 1 if 'fourier_embed/' in module else 2
      for name, value in values.items():
        np.testing.assert_array_equal(value, factor * plain[module][name])
  for file in (BOLTZ1, BOLTZ2):
    assert 'no moving averages' in refusal(file, weights='ema')


def _shared(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The state with copies as one array, which is written once."""
  return {
    name: state[name.replace('.output_projection.0.', _LINEAR)]
    if '.output_projection.0.' in name and '.transition.' not in name
    else value
    for name, value in state.items()
  }


_LINEAR = '.output_projection_linear.'


def test_all_that_is_wrong_is_in_one_error(state1, tmp_path):
  del state1[f'{ENCODER}p_mlp.3.weight']
  del state1[f'{LAYER}adaln.s_scale.bias']
  state1[f'{LAYER}gate.weight'] = np.ones(3, np.float32)
  state1[f'{LAYER}transition.a_to_b.weight'] = np.ones((16, 32), np.float32)
  state1[f'{ENCODER}r_to_q_trans.weight'] = np.ones((16, 3), np.float32)
  state1[f'{ENCODER}s_to_c_trans.0.bias'] = np.ones(8)
  # Of other modules, which must not matter.
  state1[f'{SCORE}token_transformer.x.weight'] = np.ones((9, 9), np.float32)
  path = written(tmp_path, state1, settings_of(BOLTZ1))
  message = refusal(path)
  for expected in (
    'does not fit the Boltz-1 score_model parameters: ',
    f'missing {ENCODER}p_mlp.3.weight;',
    f'missing {LAYER}adaln.s_scale.bias;',
    f'unknown {LAYER}gate.weight;',
    f'wrong {LAYER}transition.a_to_b.weight has shape [16, 32], expected '
    '[32, 16] = [2*atom_s, atom_s]',
    f'wrong {ENCODER}r_to_q_trans.weight has shape [16, 3], expected [16, 10]',
    f'wrong {ENCODER}s_to_c_trans.0.bias has dtype float64, expected float32',
  ):
    assert expected in message
  assert message.count('; ') == 5
  convert.load_boltz(path, 'input_embedder')


def test_copies_must_be_there_and_equal(state1, tmp_path):
  copy = f'{LAYER}output_projection.0.weight'
  state1[copy] = state1[copy] + 1
  message = refusal(written(tmp_path, state1))
  assert 'tensors that are one in the model: ' in message
  assert (
    f'{copy} differs from {LAYER}output_projection_linear.weight' in message
  )
  del state1[copy]
  assert f'missing {copy}' in refusal(written(tmp_path, state1))


@pytest.mark.parametrize(
  ('path', 'change', 'message'),
  [
    (BOLTZ1, {'atom_s': 32}, 'atom_s is 32, but the tensors have 16'),
    (BOLTZ1, {'token_z': 7}, 'token_z is 7, but the tensors have 6'),
    (
      BOLTZ1,
      {'score_model_args': {'atom_encoder_heads': 4}},
      'atom_encoder_heads is 4, but the tensors have 2',
    ),
    (
      BOLTZ2,
      {'score_model_args': {'atom_decoder_depth': 2}},
      'atom_decoder_depth is 2, but the tensors have 1',
    ),
    (
      BOLTZ2,
      {'score_model_args': {'transformer_post_ln': True}},
      'transformer_post_ln is True, but the tensors have False',
    ),
    (
      BOLTZ2,
      {'use_no_atom_char': True},
      'use_no_atom_char is True, but the tensors have False',
    ),
    (BOLTZ1, {'atoms_per_window_keys': 33}, 'expected a multiple'),
    (BOLTZ1, {'atoms_per_window_keys': 'many'}, 'expected int'),
  ],
)
def test_settings_that_contradict_the_tensors_are_refused(
  path, change, message, tmp_path
):
  settings = {**settings_of(path), **change}
  assert message in refusal(written(tmp_path, state_of(path), settings))


def test_missing_setting_is_asked_for(state2, tmp_path):
  settings = settings_of(BOLTZ2)
  settings['cyclic_pos_enc'] = 'yes'
  message = refusal(written(tmp_path, state2, settings), 'rel_pos')
  assert 'cyclic_pos_enc is needed' in message


def test_widths_that_no_choice_of_features_has_are_refused(state2, tmp_path):
  name = 'diffusion_conditioning.atom_encoder.embed_atom_features.weight'
  state2[name] = np.ones((16, 400), np.float32)
  assert '400 wide' in refusal(written(tmp_path, state2))


def test_numbers_of_layers_must_agree(state2, tmp_path):
  for local, shape in (('0.weight', 4), ('0.bias', 4), ('1.weight', (2, 4))):
    state2[f'diffusion_conditioning.atom_enc_proj_z.2.{local}'] = np.ones(
      shape, np.float32
    )
  message = refusal(written(tmp_path, state2))
  assert 'unknown diffusion_conditioning.atom_enc_proj_z.2.0.weight' in message
  state = state_of(BOLTZ2)
  name = 'input_embedder.atom_enc_proj_z.1.weight'
  path = written(tmp_path, {**state, name: np.ones((0, 4), np.float32)})
  assert f'wrong {name}' in refusal(path, 'input_embedder')


@pytest.mark.parametrize('part', ['score_model', 'rel_pos', 'input_embedder'])
def test_converted_file_holds_the_same(part, tmp_path):
  for path in (BOLTZ1, OMEGACONF):
    target = tmp_path / 'converted.npz'
    convert.convert_file(path, target, part)
    content = checkpoint.load(target)
    config, params = convert.load_boltz(path, part)
    assert content.config == config
    jax.tree.map(np.testing.assert_array_equal, dict(content.params), params)
    assert content.provenance['weights'] == 'model'


def test_parts_that_are_not_there_are_refused(state1, tmp_path):
  message = refusal(BOLTZ2, 'confidence_input_embedder')
  assert "Boltz-2 has no part 'confidence_input_embedder'" in message
  state = {
    name: value
    for name, value in state1.items()
    if not name.startswith('confidence_module.')
  }
  path = written(tmp_path, state)
  message = refusal(path, 'confidence_input_embedder')
  assert 'nothing is called confidence_module.input_embedder.' in message
  assert 'no part' in refusal(BOLTZ1, 'trunk')


class Config(dict):
  """Stands for a class that is not known."""


def test_settings_of_unknown_classes_are_not_used(state1, tmp_path):
  settings = pickle.dumps(Config(atom_s=3), 2)
  path = written(tmp_path, state1, {'callbacks': settings, 'atom_s': 16})
  config, _ = convert.load_boltz(path)
  assert isinstance(config, boltz_encoders.Config)
  assert config.atom_s == 16


def test_nested_settings_without_end_are_cut():
  record: Any = torch_file.Record('omegaconf.dictconfig.DictConfig')
  record.state = {'_content': {'a': record, 'b': [record] * 9}}
  assert set(state_dicts.plain(record)) == {'a', 'b'}
  leaf = torch_file.Record('omegaconf.nodes.AnyNode')
  leaf.state = {'_val': leaf}
  assert state_dicts.plain(leaf) is leaf
  # 2^200 paths, deeper than Python recurses.
  deep: Any = {}
  for _ in range(2000):
    deep = {'a': deep, 'b': deep}
  assert set(state_dicts.plain(deep)) == {'a', 'b'}


# The whole diffusion module, from the parameters of its goldens.


def diffusion_golden(version: int) -> golden_lib.Golden:
  case = f'v{version}_small'
  path = FOLDER.parent / 'boltz_diffusion' / f'{case}.npz'
  return golden_lib.Golden.read(path, case)


def diffusion_checkpoint(tmp_path, version, **changes):
  """A checkpoint of a golden's model; `changes` are of its state."""
  golden = diffusion_golden(version)
  sizes = golden.meta['config']
  windows = ('atoms_per_window_queries', 'atoms_per_window_keys')
  settings = {
    **{name: sizes[name] for name in windows},
    'atom_s': sizes['atom_s'],
    'token_s': sizes['token_s'],
    'score_model_args': {
      'token_transformer_depth': sizes['token_transformer_depth'],
      'token_transformer_heads': sizes['token_transformer_heads'],
    },
    'diffusion_process_args': {'sigma_data': 16.0},
  }
  state = {**golden.part('params'), **changes}
  state = {name: value for name, value in state.items() if value is not None}
  if version == 2:  # No shape has it in Boltz-2's score model.
    settings['score_model_args']['atom_encoder_heads'] = 2
  return written(tmp_path, state, settings)


@pytest.mark.parametrize('version', [1, 2])
def test_whole_diffusion_module_is_converted(tmp_path, version):
  path = diffusion_checkpoint(
    tmp_path,
    version,
    **{
      'msa_module.a.weight': np.zeros((2, 3), np.float32),
      'msa_module.b.weight': np.zeros(4, np.float32),
    },
  )
  loaded = boltz.read(path, 'diffusion')
  case = replay_diffusion.case_of(diffusion_golden(version))
  assert loaded.config == case.config
  jax.tree.map(np.testing.assert_array_equal, loaded.params, case.params)
  want = boltz_diffusion.diffusion_parameters(case.config)
  assert {k: set(v) for k, v in loaded.params.items()} == {
    k: set(v) for k, v in want.items()
  }
  assert loaded.notes['not_converted'] == (
    'msa_module: 2 tensors with 10 numbers'
  )
  out = convert.convert_file(path, tmp_path / 'out.npz', 'diffusion')
  stored = checkpoint.load(tmp_path / 'out.npz')
  assert stored.config == case.config
  assert 'msa_module' in convert.describe(out)


def test_diffusion_conditioning_is_a_part_of_boltz2(tmp_path):
  loaded = boltz.read(
    diffusion_checkpoint(tmp_path, 2), 'diffusion_conditioning'
  )
  case = replay_diffusion.case_of(diffusion_golden(2))
  want = boltz_parameters.diffusion_conditioning_parameters(case.config)
  assert {f'diffusion_conditioning/{name}' for name in want} == set(
    loaded.params
  )
  rest = loaded.notes['not_converted']
  assert 'structure_module.score_model.token_transformer: ' in rest
  path = diffusion_checkpoint(tmp_path, 1)
  assert 'has no part' in refusal(path, 'diffusion_conditioning')


@pytest.mark.parametrize('version', [1, 2])
def test_diffusion_module_with_a_defect_is_refused(tmp_path, version):
  layer = f'{SCORE}token_transformer.layers.1.'
  name = f'{layer}pair_bias_attn.proj_g.weight'
  gate = f'{layer}output_projection.0.weight'
  changes = {f'{SCORE}a_norm.bias': None, f'{SCORE}new.weight': np.ones(3, 'f')}
  changes[name] = np.ones((24, 23), np.float32)
  message = refusal(
    diffusion_checkpoint(tmp_path, version, **changes), 'diffusion'
  )
  for text in (
    f'missing {SCORE}a_norm.bias',
    f'unknown {SCORE}new.weight',
    f'wrong {name} has shape [24, 23], expected [24, 24]',
  ):
    assert text in message
  changes = {gate: np.ones((24, 24), np.float32)}
  message = refusal(
    diffusion_checkpoint(tmp_path, version, **changes), 'diffusion'
  )
  assert f'{gate} differs from {layer}output_projection_linear' in message
