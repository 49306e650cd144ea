"""AlphaFold 2 checkpoints: everything is used once, or the error says what."""

import io
import pathlib
import random
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structattn_jax as sa
from structattn_jax import convert
from structattn_jax.convert import alphafold2
from structattn_jax.network.alphafold2 import structure_module

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens/af2_ipa'
VARIANTS = ('monomer', 'multimer')
each_variant = pytest.mark.parametrize('variant', VARIANTS)


def sample(variant: str) -> pathlib.Path:
  return GOLDENS / f'params_sample_{variant}.npz'


def entries(variant: str = 'monomer') -> dict[str, np.ndarray]:
  with np.load(sample(variant), allow_pickle=False) as file:
    return dict(file)


def key(name: str) -> str:
  """Full name of an entry of the attention."""
  separator = '' if name.startswith('//') else '/'
  return f'{alphafold2.IPA_SCOPE}{separator}{name}'


def refusal(path, load=convert.load_structure_module) -> str:
  with pytest.raises(convert.CheckpointError) as caught:
    load(path)
  message = str(caught.value)
  assert message.startswith(f'{path}: ')
  assert '\n' not in message
  return message


def written(tmp_path, **changes) -> pathlib.Path:
  """The monomer sample with entries of the attention changed or removed."""
  content = entries()
  for name, change in changes.items():
    full = key(name)
    if change is None:
      del content[full]
    else:
      content[full] = change(content.get(full))
  path = tmp_path / 'changed.npz'
  np.savez(path, **content)
  return path


@each_variant
def test_structure_module_takes_every_entry_unchanged(variant):
  config, params = convert.load_structure_module(sample(variant))
  prefix = 'alphafold/alphafold_iteration/'
  found = {
    f'{prefix}{module}//{name}': array
    for module, values in params.items()
    for name, array in values.items()
  }
  want = entries(variant)
  assert found.keys() == want.keys()
  for name, array in want.items():
    np.testing.assert_array_equal(found[name], array, strict=True)
  assert config == structure_module.StructureModuleConfig(
    parameterisation=variant,
    num_channel=24,
    position_scale={'monomer': 10.0, 'multimer': 20.0}[variant],
    sidechain=structure_module.SideChainConfig(num_channel=16),
    num_head=3,
    num_scalar_qk=4,
    num_scalar_v=5,
    num_point_qk=2,
    num_point_v=3,
  )


@each_variant
def test_sample_is_what_the_golden_was_recorded_with(variant):
  """So `structattn verify` of it runs with what is converted here."""
  kind = {'monomer': 'mono', 'multimer': 'multi'}[variant]
  with np.load(GOLDENS / f'structure_module_{kind}.npz') as golden:
    for name, array in entries(variant).items():
      np.testing.assert_array_equal(golden[f'params/{name}'], array)


@each_variant
def test_structure_module_parameters_are_those_of_our_module(variant):
  config, params = convert.load_structure_module(sample(variant))
  init, _ = structure_module.transform_structure_module(config)
  single, pair = jnp.zeros((4, 20)), jnp.zeros((4, 4, 14))
  want = jax.eval_shape(
    init, jax.random.key(0), single, pair, jnp.zeros(4, int)
  )
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, want)


@each_variant
def test_ipa_parameters_are_those_of_our_module(variant):
  config, params = convert.load_ipa(sample(variant))
  assert config.parameterisation == variant
  assert config.num_channel == 24
  init, apply = sa.alphafold2.transform_ipa(config)
  arguments = (
    jnp.ones((4, 24)),
    jnp.ones((4, 4, 14)),
    jnp.broadcast_to(jnp.eye(3), (4, 3, 3)),
    jnp.zeros((4, 3)),
  )
  want = jax.eval_shape(init, jax.random.key(0), *arguments)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, want)
  out = jax.jit(apply)(params, *arguments)
  assert out.shape == (4, 24)
  assert np.all(np.isfinite(out))


def test_other_entries_of_the_checkpoint_are_left_alone(tmp_path):
  content = entries()
  content['alphafold/alphafold_iteration/evoformer/x//weights'] = np.ones(3)
  # Begins like the module, but is another one.
  content['alphafold/alphafold_iteration/structure_module_2/x//weights'] = (
    np.ones(3)
  )
  path = tmp_path / 'whole.npz'
  np.savez(path, **content)
  _, params = convert.load_structure_module(path)
  assert all(module.startswith('structure_module') for module in params)
  assert sum(map(len, params.values())) == len(entries())


@each_variant
def test_another_scope_is_found(variant, tmp_path):
  path = tmp_path / 'short.npz'
  np.savez(
    path,
    **{
      name.removeprefix(alphafold2.IPA_SCOPE).lstrip('/')
      if not name.startswith(f'{alphafold2.IPA_SCOPE}//')
      else name.removeprefix(alphafold2.IPA_SCOPE): array
      for name, array in entries(variant).items()
      if name.startswith(f'{alphafold2.IPA_SCOPE}/')
    },
  )
  config, params = convert.load_ipa(path, scope='')
  want_config, want = convert.load_ipa(sample(variant))
  assert config == want_config
  jax.tree.map(np.testing.assert_array_equal, params, want)


def test_all_that_is_wrong_is_in_one_error(tmp_path):
  path = written(
    tmp_path,
    **{
      'attention_2d//bias': None,
      'kv_scalar//weights': None,
      'gate//weights': lambda _: np.ones(3, np.float32),
      'q_scalar//bias': lambda x: x[:-1],
      'output_projection//weights': lambda x: x.T.astype(np.float16),
    },
  )
  message = refusal(path)
  for expected in (
    f'missing {key("attention_2d//bias")};',
    f'missing {key("kv_scalar//weights")};',
    f'unknown {key("gate//weights")};',
    f'wrong {key("q_scalar//bias")} has shape [11], expected [12]',
    f'wrong {key("output_projection//weights")} has shape [24, 93], expected '
    '[93, 24]',
    f'wrong {key("output_projection//weights")} has dtype float16, expected '
    'float32',
  ):
    assert expected in message
    assert expected in refusal(path, convert.load_ipa)
  assert message.count('; ') == 5


@pytest.mark.parametrize(
  ('name', 'change', 'expected'),
  [
    ('q_scalar//weights', np.transpose, '[24, 12]'),
    ('kv_point_local//weights', np.transpose, '[24, 45]'),
    ('//trainable_point_weights', lambda x: x[:-1], '[3]'),
    ('//trainable_point_weights', lambda x: np.append(x, x), '[3]'),
    ('attention_2d//weights', lambda x: x[:, :1], '[14, 3]'),
    ('q_point_local//bias', lambda x: x[:6], '[18]'),
    ('output_projection//bias', lambda x: x[None], '[24]'),
    ('output_projection//bias', lambda x: x[:0], '[24]'),
  ],
)
def test_the_wrong_entry_is_blamed_and_no_other(
  name, change, expected, tmp_path
):
  path = written(tmp_path, **{name: lambda x: change(x).astype(np.float32)})
  message = refusal(path)
  assert f'wrong {key(name)} has shape ' in message
  assert f'expected {expected} = ' in message
  assert message.count('wrong ') == 1


def test_heads_that_do_not_divide_are_an_error(tmp_path):
  def cut(x):
    return x[..., :-1]

  path = written(tmp_path, **{'q_scalar//weights': cut, 'q_scalar//bias': cut})
  message = refusal(path)
  assert 'q_scalar//weights has shape [24, 11]' in message
  assert 'num_head * num_scalar_qk' in message


def test_missing_transition_layer_is_an_error(tmp_path):
  content = entries()
  fold = f'{alphafold2.STRUCTURE_MODULE_SCOPE}/fold_iteration'
  for name in ('weights', 'bias'):
    del content[f'{fold}/transition_2//{name}']
  np.savez(tmp_path / 'short.npz', **content)
  assert f'missing {fold}/transition_2//bias' in refusal(tmp_path / 'short.npz')


def test_variants_mixed_are_an_error(tmp_path):
  both = entries('multimer') | {
    key('q_scalar//bias'): entries()[key('q_scalar//bias')]
  }
  np.savez(tmp_path / 'both.npz', **both)
  message = refusal(tmp_path / 'both.npz')
  assert 'does not fit the multimer' in message
  assert message.endswith(f'unknown {key("q_scalar//bias")}')


@pytest.mark.parametrize(
  ('content', 'expected'),
  [
    ({'weights': np.ones(3)}, 'not an AlphaFold 2 checkpoint'),
    ({}, 'the file is empty'),
    ({key('//trainable_point_weights'): np.ones(3)}, 'neither'),
  ],
)
def test_foreign_npz_is_refused(content, expected, tmp_path):
  np.savez(tmp_path / 'foreign.npz', **content)
  assert expected in refusal(tmp_path / 'foreign.npz')
  assert expected in refusal(tmp_path / 'foreign.npz', convert.load_ipa)


class Bomb:
  """Would raise if it were unpickled."""

  def __reduce__(self):
    return exec, ("raise SystemExit('unpickled')",)


def test_pickled_entries_are_refused_and_not_run(tmp_path):
  path = written(tmp_path)
  content = entries()
  content[key('q_scalar//bias')] = np.array([Bomb()], dtype=object)
  np.savez(path, **content)
  assert 'pickled Python objects' in refusal(path)


def test_torch_checkpoint_is_refused(tmp_path):
  path = tmp_path / 'model.pt'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('model/data.pkl', b'\x80\x02.')
  assert 'PyTorch' in refusal(path)


@pytest.mark.parametrize('content', [b'', b'PK', b'PK\x03\x04', b'text' * 99])
def test_files_that_are_no_archives_are_refused(content, tmp_path):
  path = tmp_path / 'broken.npz'
  path.write_bytes(content)
  assert 'not an npz file' in refusal(path)


def test_missing_file_and_folder_are_refused(tmp_path):
  assert 'No such file' in refusal(tmp_path / 'gone.npz')
  refusal(tmp_path)


def test_entry_that_occurs_twice_is_refused(tmp_path):
  path = tmp_path / 'twice.npz'
  buffer = io.BytesIO()
  np.save(buffer, np.ones(3, np.float32))
  member = f'{key("q_scalar//bias")}.npy'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr(member, buffer.getvalue())
    with pytest.warns(UserWarning, match='Duplicate name'):
      archive.writestr(member, buffer.getvalue())
  assert 'occur twice' in refusal(path)


@pytest.mark.parametrize('damage', ['flip', 'cut'])
def test_damaged_file_is_refused_or_reads_equal(damage, tmp_path):
  content = sample('monomer').read_bytes()
  _, want = convert.load_structure_module(sample('monomer'))
  rng = random.Random(0)
  path = tmp_path / 'damaged.npz'
  refused = 0
  for trial in range(400 if damage == 'flip' else 100):
    broken = bytearray(content)
    if damage == 'cut':
      del broken[rng.randrange(len(content)) :]
    else:
      # Half of the flips hit the directory at the end of the archive.
      start = len(content) - 8000 if trial % 2 else 0
      broken[rng.randrange(start, len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(broken)
    try:
      _, params = convert.load_structure_module(path)
    except convert.CheckpointError:
      refused += 1
    else:
      assert params.keys() == want.keys()
      jax.tree.map(np.testing.assert_array_equal, params, want)
  assert refused >= (100 if damage == 'cut' else 250)


def test_no_combination_of_wrong_shapes_takes_long(tmp_path):
  """The search for the wrong entries is bounded."""
  rng = np.random.default_rng(0)
  path = tmp_path / 'noise.npz'
  np.savez(
    path,
    **{
      name: np.zeros(rng.integers(1, 40, array.ndim), np.float32)
      for name, array in entries().items()
    },
  )
  assert refusal(path).count('wrong ') > 20
