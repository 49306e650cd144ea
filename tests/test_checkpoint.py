"""Our own files: what is loaded is what was saved, bit for bit, or an error."""

import dataclasses
import json
import os
import random
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structattn_jax as sa
from structattn_jax import checkpoint
from structattn_jax.checkpoint import CheckpointError
from structattn_jax.common import base_config

CONFIG = sa.alphafold2.InvariantPointAttentionConfig(num_head=3, num_channel=7)
PROVENANCE = {'source_file': 'params_µ.npz', 'note': 'a\nb "c"'}
each_suffix = pytest.mark.parametrize('suffix', checkpoint.SUFFIXES)


def tree(bfloat16: bool = False):
  rng = np.random.default_rng(0)
  params = {
    'ipa': {'trainable_point_weights': np.array([0.1, -0.0, 1e-42], 'f4')},
    'ipa/q~scalar': {
      'weights': np.asfortranarray(rng.normal(size=(3, 4)).astype('f4')),
      'bias': np.float32(1.5),
      'empty': np.zeros((0, 3), 'f4'),
      'wide': rng.normal(size=2),
      'index': np.arange(3, dtype='i4'),
      'big_endian': np.arange(3, dtype='>f4'),
      'flags': np.array([True, False]),
    },
  }
  if bfloat16:
    params['ipa']['half'] = jnp.arange(5, dtype=jnp.bfloat16) / 3
  return params


def assert_same(got, want):
  assert got.keys() == want.keys()
  for module in want:
    assert got[module].keys() == want[module].keys()
    for name, value in want[module].items():
      value = np.asarray(value)
      value = value.astype(value.dtype.newbyteorder('<'))
      assert got[module][name].dtype == value.dtype
      assert got[module][name].shape == value.shape
      assert got[module][name].tobytes() == value.tobytes()
      assert got[module][name].flags.writeable


@each_suffix
def test_round_trip_is_exact(suffix, tmp_path):
  path = tmp_path / f'file{suffix}'
  params = tree(bfloat16=suffix == '.safetensors')
  checkpoint.save(path, params, CONFIG, provenance=PROVENANCE)
  loaded = checkpoint.load(path)
  assert_same(loaded.params, params)
  assert loaded.config == CONFIG
  assert loaded.provenance == PROVENANCE
  # The content decides, not the name.
  path.rename(tmp_path / 'other')
  assert_same(checkpoint.load(tmp_path / 'other').params, params)
  given = checkpoint.load(tmp_path / 'other', type(CONFIG))
  assert given.config == CONFIG


@each_suffix
def test_equal_content_gives_equal_bytes(suffix, tmp_path):
  paths = [tmp_path / f'{name}{suffix}' for name in 'ab']
  params = tree()
  turned = {
    module: dict(reversed(params[module].items()))
    for module in reversed(params)
  }
  for path, one in zip(paths, (params, turned), strict=True):
    checkpoint.save(path, one, CONFIG, provenance=PROVENANCE)
  assert paths[0].read_bytes() == paths[1].read_bytes()


def test_parameters_of_haiku_survive(tmp_path):
  init, apply = sa.alphafold2.transform_ipa(
    sa.alphafold2.InvariantPointAttentionConfig(num_head=2, zero_init=False)
  )
  arguments = (
    jnp.ones((3, 8)),
    jnp.ones((3, 3, 4)),
    jnp.broadcast_to(jnp.eye(3), (3, 3, 3)),
    jnp.zeros((3, 3)),
  )
  params = jax.jit(init)(jax.random.key(0), *arguments)
  checkpoint.save(tmp_path / 'x.npz', params, CONFIG)
  loaded = checkpoint.load(tmp_path / 'x.npz').params
  np.testing.assert_array_equal(
    jax.jit(apply)(loaded, *arguments), jax.jit(apply)(params, *arguments)
  )


def test_npz_is_readable_without_us_and_refuses_bfloat16(tmp_path):
  path = tmp_path / 'x.npz'
  checkpoint.save(path, tree(), CONFIG)
  with np.load(path, allow_pickle=False) as file:
    metadata = json.loads(file['__metadata__'].item())
    assert json.loads(metadata['config'])['num_head'] == 3
    assert file['ipa//trainable_point_weights'].dtype == np.float32
  before = path.read_bytes()
  with pytest.raises(ValueError, match=r'ipa//half: .*bfloat16.*\.safetensors'):
    checkpoint.save(path, tree(bfloat16=True), CONFIG)
  assert path.read_bytes() == before
  assert os.listdir(tmp_path) == ['x.npz']


@each_suffix
def test_failed_write_leaves_the_old_file_and_nothing_else(
  suffix, tmp_path, monkeypatch
):
  path = tmp_path / f'x{suffix}'
  checkpoint.save(path, tree(), CONFIG)
  before = path.read_bytes()

  def fail(*_):
    raise OSError('disk full')

  for name in ('fsync', 'replace'):
    with monkeypatch.context() as patch:
      patch.setattr(os, name, fail)
      with pytest.raises(OSError, match='disk full'):
        checkpoint.save(path, {'a': {'b': np.ones(3)}}, CONFIG)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
  ('params', 'message'),
  [
    ({'a': {}}, 'at least one array'),
    ({'a': np.ones(3)}, 'at least one array'),
    ({'a//b': {'c': np.ones(3)}}, "contains '//'"),
    ({'a/': {'c': np.ones(3)}}, 'ends in /'),
    ({'a': {'b/c': np.ones(3)}}, 'cannot be a name'),
    ({'a': {'b': np.array([None])}}, 'dtype object'),
    ({'a': {'b': np.array(['x'])}}, 'dtype <U1'),
    ({'a': {'b': np.ones(3, complex)}}, 'dtype complex128'),
  ],
)
@each_suffix
def test_what_cannot_be_stored_is_refused(params, message, suffix, tmp_path):
  with pytest.raises(ValueError, match=message):
    checkpoint.save(tmp_path / f'x{suffix}', params, CONFIG)
  assert not os.listdir(tmp_path)


def test_other_suffix_and_other_provenance_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"\.safetensors or \.npz, got '\.txt'"):
    checkpoint.save(tmp_path / 'x.txt', tree(), CONFIG)
  with pytest.raises(ValueError, match='expected text, got 3'):
    checkpoint.save(
      tmp_path / 'x.npz',
      tree(),
      CONFIG,
      provenance={'seed': 3},  # ty: ignore[invalid-argument-type]
    )
  with pytest.raises(FileNotFoundError, match='there is no folder'):
    checkpoint.save(tmp_path / 'no' / 'x.npz', tree(), CONFIG)


@each_suffix
def test_damaged_file_is_refused_or_reads_equal(suffix, tmp_path):
  path = tmp_path / f'x{suffix}'
  checkpoint.save(path, tree(), CONFIG, provenance=PROVENANCE)
  content = path.read_bytes()
  rng = random.Random(0)
  refused = 0
  for trial in range(400):
    broken = bytearray(content)
    position = rng.randrange(len(content))
    if trial % 4:
      broken[position] ^= 1 << rng.randrange(8)
    else:
      del broken[position:]
    path.write_bytes(broken)
    try:
      loaded = checkpoint.load(path)
    except CheckpointError:
      refused += 1
    else:
      assert_same(loaded.params, tree())
      assert loaded.config == CONFIG
      assert loaded.provenance == PROVENANCE
  assert refused > 250


@pytest.mark.parametrize(
  'content',
  [b'', b'PK\x03\x04', b'{}', b'\x02' + b'\x00' * 7 + b'{}', b'x' * 50],
)
def test_foreign_files_are_refused(content, tmp_path):
  path = tmp_path / 'x'
  path.write_bytes(content)
  with pytest.raises(CheckpointError, match='^' + str(path)):
    checkpoint.load(path)
  with pytest.raises(CheckpointError, match='No such file'):
    checkpoint.load(tmp_path / 'gone')


def test_published_checkpoints_are_pointed_to_convert(tmp_path):
  import safetensors.numpy

  np.savez(tmp_path / 'x.npz', a=np.ones(3))
  with pytest.raises(CheckpointError, match='structattn convert'):
    checkpoint.load(tmp_path / 'x.npz')
  safetensors.numpy.save_file({'a': np.ones(3)}, tmp_path / 'x.safetensors')
  with pytest.raises(CheckpointError, match='structattn convert'):
    checkpoint.load(tmp_path / 'x.safetensors')


def rewritten(path, **changes):
  """The npz file with other metadata and a digest that fits it."""
  with np.load(path) as file:
    arrays = dict(file)
  metadata = json.loads(arrays.pop('__metadata__').item()) | changes
  metadata.pop('digest')
  metadata = {k: v for k, v in metadata.items() if v is not None}
  metadata['digest'] = checkpoint._digest(arrays, metadata)
  np.savez(path, __metadata__=json.dumps(metadata), **arrays)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'format': 'other'}, "format: 'other'"),
    ({'version': '2'}, "version '2' .* reads version 1"),
    ({'provenance': None}, 'missing or unknown metadata: provenance'),
    ({'more': 'x'}, 'missing or unknown metadata: more'),
    ({'config': '{"num_heads": 3}'}, "unknown key 'num_heads'.*'num_head'"),
    ({'config': '{"num_head": "3"}'}, 'num_head: expected int'),
    ({'config': '[]'}, 'the configuration is not a JSON object'),
    ({'config': '{'}, 'the configuration is not JSON'),
    ({'config_class': 'os.system'}, "0 configuration classes .* 'os.system'"),
  ],
)
def test_metadata_that_do_not_fit_are_refused(changes, message, tmp_path):
  path = tmp_path / 'x.npz'
  checkpoint.save(path, tree(), CONFIG)
  rewritten(path)
  checkpoint.load(path)
  rewritten(path, **changes)
  with pytest.raises(CheckpointError, match=message):
    checkpoint.load(path)


def test_config_of_another_class_is_refused(tmp_path):
  path = tmp_path / 'x.npz'
  checkpoint.save(path, tree(), CONFIG)
  with pytest.raises(CheckpointError, match='expected a AtomTransformerConfig'):
    checkpoint.load(path, sa.pallatom.AtomTransformerConfig)


def test_nested_config_of_a_user_survives(tmp_path):
  @dataclasses.dataclass(frozen=True, kw_only=True)
  class InnerOfTest(base_config.BaseConfig):
    rate: float = 0.1
    names: tuple[str, ...] = ('a',)

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class OuterOfTest(base_config.BaseConfig):
    inner: InnerOfTest = InnerOfTest()
    size: int | None = None

  config = OuterOfTest(inner=InnerOfTest(rate=1 / 3, names=('x', 'y')))
  for suffix in checkpoint.SUFFIXES:
    path = tmp_path / f'x{suffix}'
    checkpoint.save(path, {'a': {'b': np.ones(2, 'f4')}}, config)
    assert checkpoint.load(path).config == config


def test_missing_safetensors_is_one_clear_error(tmp_path, monkeypatch):
  checkpoint.save(tmp_path / 'x.safetensors', tree(), CONFIG)
  monkeypatch.setitem(sys.modules, 'safetensors.numpy', None)
  for call in (
    lambda: checkpoint.load(tmp_path / 'x.safetensors'),
    lambda: checkpoint.save(tmp_path / 'y.safetensors', tree(), CONFIG),
  ):
    with pytest.raises(ImportError, match=r'structattn-jax\[io\]'):
      call()
  assert os.listdir(tmp_path) == ['x.safetensors']


def test_every_stored_dtype_is_known():
  assert np.dtype(jnp.bfloat16) in checkpoint._SAFETENSORS_DTYPES.values()
