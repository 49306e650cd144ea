"""Small files made to cost much: refused in little time and memory, by name.

What these files hold is what an attacker, or a very unlucky disk, can write:
checksums are right. Random damage is the business of `test_fuzz.py`.
"""

import io
import json
import pathlib
import resource
import shutil
import struct
import time
import zipfile

import numpy as np
import pytest
import torch_archive

from structattn_jax import checkpoint, convert, verification
from structattn_jax.apps import generate
from structattn_jax.convert import record_file, state_dicts, torch_file
from structattn_jax.network.sedd import dual_track
from structattn_jax.verification import verify

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens'
BOLTZ = GOLDENS / 'boltz_atom_encoder/boltz1_sample.ckpt'
SEDD = GOLDENS / 'sedd_protein_ligand/checkpoints'
HUGE = b'\x8b' + struct.pack('<i', 2100) + (10**5000).to_bytes(2100, 'little')


def text(value: str) -> bytes:
  return b'X' + struct.pack('<I', len(value)) + value.encode()


def refused(read, path, match: str) -> str:
  """The message of the error that a file gives, within bounds."""
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  start = time.process_time()
  with pytest.raises(checkpoint.CheckpointError, match=match) as error:
    read(path)
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert time.process_time() - start < 10
  assert (after - before) * 1024 < 2**30
  assert str(path.parent) in str(error.value)
  assert len(str(error.value)) < 11_000
  return str(error.value)


# Programs of PyTorch files. A memo holds something large, which is used often.

MANY = b'](' + b'N' * 10**6 + b'eq\0'
LONG = text('a' * 10**6) + b'q\0'
PROGRAMS = {
  'sizes': MANY + b'0ctorch\nSize\nq\1' + b'0h\0\x85q\2'
  b'0(' + b'h\1h\2R' * 2000 + b't',
  'sets': b'('
  + b''.join(b'J' + struct.pack('<i', i) for i in range(10**5))
  + b'tq\0'
  + b'0c__builtin__\nset\nq\1'
  + b'0h\0\x85q\2'
  b'0(' + b'h\1h\2R' * 2000 + b't',
  'bytes': b'(' + text('a' * 10**6) + text('latin1') + b'tq\0'
  b'0c_codecs\nencode\nq\1' + b'0(' + b'h\1h\0R' * 5000 + b't',
  'globals': LONG + b'0(' + b'h\0h\0\x93' * 5000 + b't',
  'keys': b'(' + b'N' * 10**6 + b'tq\0' + b'0}(' + b'h\0N' * 5000 + b'u',
  'opcodes': b'N0' * (4 << 20) + b'N',
  'nested calls': b'ctorch._tensor\n_rebuild_from_type_v2\nq\0'
  + b'0(h\0N)Ntq\2'
  + b'0(h\0Nh\2Ntq\2' * 300
  + b'0('
  + b'h\0h\2R' * 100_000
  + b't',
}


@pytest.mark.parametrize('name', PROGRAMS)
def test_program_that_multiplies_is_stopped(name, tmp_path):
  program = torch_archive.program(PROGRAMS[name])
  path = torch_archive.write_members(tmp_path / 'x.pt', program, {})
  refused(torch_file.load, path, 'more than it has reason to|does not end')


def with_entry(source, folder, key: str, opcodes: bytes) -> pathlib.Path:
  """A copy of a checkpoint with one more entry."""
  path = folder / source.name
  with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, 'w') as new:
    for name in old.namelist():
      content = old.read(name)
      if name.endswith('/data.pkl'):
        content = content[:-1] + text(key) + opcodes + b's.'
      new.writestr(name, content)
  return path


def doubled(times: int) -> bytes:
  """A list of two lists of two lists, and so on, each one object."""
  memo = [b'r' + struct.pack('<I', 2**16 + i) for i in range(times + 1)]
  get = [b'j' + number[1:] for number in memo]
  parts = [b'](' + get[i] + get[i] + b'e' + memo[i + 1] for i in range(times)]
  return b']' + memo[0] + b'0' + b'0'.join(parts)


@pytest.mark.parametrize(
  'value',
  [doubled(40), HUGE, b']' * 5000 + b'a' * 4999],
  ids=['doubled', 'large', 'deep'],
)
def test_setting_is_shown_in_bounded_time(value, tmp_path):
  opcodes = b'}' + text('atom_s') + value + b's'
  path = with_entry(BOLTZ, tmp_path, 'hyper_parameters', opcodes)
  message = refused(convert.load_boltz, path, 'hyper-parameter atom_s is')
  assert len(message) < 500


def test_setting_that_cannot_be_a_note_is_none(tmp_path):
  opcodes = b'}' + text('graph') + b'}' + text('a') + HUGE + b'ss'
  source = SEDD / 'sedd_checkpoint.pth'
  path = with_entry(source, tmp_path, 'config', opcodes)
  config, _ = convert.load_sedd(path)
  assert config == convert.load_sedd(source)[0]


def tensor(numel: int, shape, stride) -> bytes:
  memory = torch_archive.storage(numel=numel)
  return torch_archive.tensor(memory, shape, stride)


def torch_file_of(path, entries, numel: int = 1) -> pathlib.Path:
  """A state dict of descriptions that share one storage."""
  items = [text(name) + opcodes for name, opcodes in entries.items()]
  program = torch_archive.program(b'}(', *items, b'u')
  data = {'data/0': bytes(4 * numel)}
  return torch_archive.write_members(path, program, data)


def test_names_of_a_large_list_are_counted(tmp_path):
  one = tensor(1, (1,), (1,))
  names = ['vocab_embed.embedding', *(f'blocks.{i}.x' for i in range(20_000))]
  path = torch_file_of(tmp_path / 'x.pth', dict.fromkeys(names, one))
  message = refused(
    lambda path: convert.load_sedd(path, num_head=1), path, 'does not fit'
  )
  assert 'missing sigma_map.mlp.0.weight' in message
  assert message.endswith('more')


def test_tensor_larger_than_its_storage_is_not_made(tmp_path):
  frequencies = tensor(1, (2**40,), (0,))
  source = torch_file_of(
    tmp_path / 'x.pth',
    {
      'vocab_embed.embedding': tensor(1, (1, 1), (1, 1)),
      'rotary_emb.inv_freq': frequencies,
    },
  )
  refused(convert.load_sedd, source, 'storage 0: repeats its elements')
  expanded = torch_file.load(source)['rotary_emb.inv_freq']
  with pytest.raises(checkpoint.CheckpointError, match='repeats its elements'):
    state_dicts.array(expanded)


def test_many_views_of_one_storage_are_not_made(tmp_path):
  numel = 2**18
  view = tensor(numel, (2**9, 2**9), (2**9, 1))
  table = {f'x{i}.weight': view for i in range(1000)}
  path = torch_file_of(tmp_path / 'x.pth', table, numel)
  state = state_dicts.state_of(path, torch_file.load(path))
  entries = {
    name: state_dicts.Entry('c c', f'm//{name[:-7]}') for name in table
  }
  refused(
    lambda path: state_dicts.convert(path, 'toy', state, entries),
    path,
    'would become 1,048,576,000',
  )


# NumPy's archives.


def member(descr: str, shape: str, content: bytes = b'') -> bytes:
  header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}"
  header = header.encode() + (b'' if shape.endswith(',') else b'}')
  start = b'\x93NUMPY\1\0' + struct.pack('<H', len(header))
  return start + header + content


MEMBERS = {
  'bracket': (member("'<f4'", '(1,', bytes(4)), 'TokenError|EOF'),
  'shape': (member("'<f4'", '(1152921504606846976,)'), 'needs'),
  'negative': (member("'<f4'", '(-1, -1)', bytes(4)), 'not an npz file'),
  'axes': (member("'<f4'", f'({"1," * 70})', bytes(4)), 'not an npz file'),
  'no size': (member("'V0'", '(1152921504606846976,)'), 'needs'),
  'deep': (member('[' * 3000, '(1,)'), 'not an npz file'),
  'objects': (member("'|O'", '(1,)', bytes(8)), 'never read'),
}


@pytest.mark.parametrize('name', MEMBERS)
def test_header_of_an_array_is_checked_first(name, tmp_path):
  content, match = MEMBERS[name]
  path = tmp_path / 'x.npz'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a.npy', content)
  refused(checkpoint.read_npz, path, match)


def test_archive_that_inflates_is_refused(tmp_path):
  path = tmp_path / 'x.npz'
  name = 'alphafold/alphafold_iteration/structure_module//bias.npy'
  header = {'descr': '<f4', 'fortran_order': False, 'shape': (2**27,)}
  with (
    zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive,
    archive.open(name, 'w', force_zip64=True) as stream,
  ):
    np.lib.format.write_array_header_1_0(stream, header)
    for _ in range(2**9):
      stream.write(bytes(2**20))
  refused(checkpoint.read_npz, path, 'bytes would become 536,8')


def test_compression_that_numpy_does_not_write_is_refused(tmp_path):
  path = tmp_path / 'x.npz'
  stream = io.BytesIO()
  np.save(stream, np.ones(3))
  for method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
    with zipfile.ZipFile(path, 'w', method) as archive:
      archive.writestr('a.npy', stream.getvalue())
    refused(checkpoint.read_npz, path, 'as NumPy never does')


def test_too_many_arrays_are_refused(tmp_path):
  path = tmp_path / 'x.npz'
  with zipfile.ZipFile(path, 'w') as archive:
    for i in range(33_000):
      archive.writestr(f'{i}.npy', b'')
  refused(checkpoint.read_npz, path, '33,000 arrays')


# Safetensors.


@pytest.mark.parametrize(
  ('header', 'match'),
  [
    ('{"__metadata__":null,"a":{"dtype":"F32","shape":[1],'
     '"data_offsets":[0,4]}}', 'not written by structattn_jax'),
    (json.dumps({'a': {'dtype': 'F32', 'shape': [1] * 100,
                       'data_offsets': [0, 4]}}), 'maximum supported dim'),
    (json.dumps({'a': {'dtype': 'F32', 'shape': [0, 2**62, 2**62],
                       'data_offsets': [0, 0]}}), 'x.safetensors'),
    ('{"a":' + '[' * 10**5, 'not a safetensors file'),
  ],
  ids=['null', 'axes', 'product', 'deep'],
)  # fmt: skip
def test_header_of_safetensors_is_checked(header, match, tmp_path):
  path = tmp_path / 'x.safetensors'
  start = struct.pack('<Q', len(header)) + header.encode()
  path.write_bytes(start + bytes(4 if '4]' in header else 0))
  refused(checkpoint.load, path, match)
  path.write_bytes(struct.pack('<Q', 2**40) + b'{}')
  refused(checkpoint.load, path, 'a header of 1,099,511,627,776 bytes')


@pytest.mark.parametrize(
  ('settings', 'match'),
  [
    ('[' * 10**5, r'config\.json: not JSON: RecursionError'),
    ('{"model": {"dropout": 1%s}}' % ('0' * 400), r'dropout: expected float'),
    ('"' + 'x' * 2**21 + '"', r'config\.json: not JSON: larger than'),
  ],
  ids=['deep', 'float', 'large'],
)
def test_settings_beside_a_file_are_checked(settings, match, tmp_path):
  path = tmp_path / 'model.safetensors'
  shutil.copy(SEDD / 'hf_sedd/model.safetensors', path)
  (tmp_path / 'config.json').write_text(settings)
  refused(convert.load_sedd, path, match)


# AlphaFold 3's records.


def record(name: bytes, dtype: bytes, shape, nbytes: int) -> bytes:
  head = struct.pack('<5i', 0, len(name), len(dtype), len(shape), nbytes)
  return head + name + dtype + struct.pack(f'<{len(shape)}i', *shape)


def read_records(path):
  return list(record_file.read_records(path))


def test_shape_without_values_can_be_too_large(tmp_path):
  path = tmp_path / 'x.bin'
  path.write_bytes(record(b'w', b'float32', (0, *[2**31 - 1] * 3), 0))
  refused(read_records, path, 'too big|maximum')


@pytest.mark.parametrize('kind', ['large', 'many'])
def test_frame_that_inflates_is_refused(kind, tmp_path):
  zstandard = pytest.importorskip('zstandard')
  compressor = zstandard.ZstdCompressor(level=1).compressobj()
  path = tmp_path / 'x.bin.zst'
  if kind == 'large':
    parts = [record(b'w', b'float32', (2**28,), 2**30), *[bytes(2**20)] * 2**10]
  else:
    parts = [record(b'w', b'bool', (), 1) + b'\1'] * 120_000
  content = b''.join(map(compressor.compress, parts)) + compressor.flush()
  path.write_bytes(content)
  refused(read_records, path, 'would become|more than 100,000 records')


# Ours, whose digests are right.


def own(path, provenance) -> pathlib.Path:
  config = dual_track.DualTrackConfig(hidden_size=4, num_head=1)
  params = {'a': {'b': np.ones(2, 'f4')}}
  checkpoint.save(path, params, config, provenance=provenance)
  return path


@pytest.mark.parametrize(
  'provenance',
  [
    {'protein_lengths': '[]'},
    {'protein_lengths': '{"3": "x"}'},
    {'protein_lengths': '{"3": -1}'},
    {'ligand_lengths': '{"99999999999": 1}'},
    {'train_config': '[1]'},
    {'train_config': '{"steps": -1}'},
    {'smiles_vocabulary': '[' * 10**5},
    {'smiles_vocabulary': '3'},
  ],
  ids=str,
)
def test_model_with_other_provenance_is_refused(provenance, tmp_path):
  path = own(tmp_path / 'x.npz', provenance)
  checkpoint.load(path)
  with pytest.raises(
    (checkpoint.CheckpointError, generate.GenerateError), match=r'x\.npz|voc'
  ):
    generate.load_model(path)


def test_metadata_that_are_deep_are_refused(tmp_path):
  path = tmp_path / 'x.npz'
  np.savez(path, __metadata__=np.array('[' * 10**5))
  refused(checkpoint.load, path, 'not JSON: RecursionError')


# What `verify` finds in a folder.


def test_verify_raises_nothing(tmp_path):
  deep = np.array('{"system": ' + '[' * 10**5)
  np.savez(tmp_path / 'deep.npz', meta=deep)
  np.savez(tmp_path / 'number.npz', meta=np.array(3))
  np.savez(tmp_path / 'two.npz', meta=np.array(['{}', '{}']))
  meta = {'system': 'af2_ipa', 'kind': 'ipa_mono', 'config': {'n': 2**63}}
  np.savez(tmp_path / 'config.npz', meta=np.array(json.dumps(meta)))
  (tmp_path / 'broken.npz').write_bytes(b'PK\3\4' + bytes(50))
  (tmp_path / 'x.bin.zst').write_bytes(b'\x28\xb5\x2f\xfd' + b'\xff' * 50)
  (tmp_path / 'x.ckpt').write_bytes(b'PK\3\4' + bytes(50))
  (tmp_path / 'folder.npz').mkdir()
  report = verify.verify([tmp_path, *tmp_path.iterdir(), tmp_path / 'gone'])
  assert report.status == 2
  assert not report.rows
  for name in ('deep', 'number', 'two', 'config', 'broken', 'x.bin', 'x.ckpt'):
    found = [m for m in (*report.errors, *report.notes) if f'{name}' in m]
    # Once in the folder, once by name.
    assert len(found) >= 2, name
  with pytest.raises(verification.NotAGoldenError, match=r'two\.npz: not a'):
    verification.Golden.read(tmp_path / 'two.npz', 'two')


# Numbers that are none.


def test_weights_that_are_no_numbers_are_named(tmp_path):
  path = tmp_path / 'model.safetensors'
  shutil.copy(SEDD / 'hf_sedd/config.json', tmp_path)
  content = bytearray((SEDD / 'hf_sedd/model.safetensors').read_bytes())
  for value in (np.nan, np.inf):
    content[-4:] = np.float32(value).tobytes()
    path.write_bytes(content)
    refused(convert.load_sedd, path, 'NaN or infinite.* vocab_embed.embedding')
    _, params = convert.load_sedd(path, allow_nan=True)
    assert params['vocab_embed']['embedding'].flat[-1] == pytest.approx(
      value, nan_ok=True
    )
    target = tmp_path / 'x.npz'
    with pytest.raises(checkpoint.CheckpointError, match='NaN or infinite'):
      convert.convert_file(path, target)
    assert not target.exists()
    convert.convert_file(path, target, allow_nan=True)
    refused(checkpoint.load, target, 'NaN or infinite.* vocab_embed//embedding')
    checkpoint.load(target, allow_nan=True)
    target.unlink()


@pytest.mark.parametrize(
  ('load', 'source'),
  [
    (
      convert.load_structure_module,
      GOLDENS / 'af2_ipa/params_sample_monomer.npz',
    ),
    (convert.load_ipa, GOLDENS / 'af2_ipa/params_sample_multimer.npz'),
  ],
)
def test_weights_of_an_npz_file_that_are_no_numbers_are_named(
  load, source, tmp_path
):
  arrays = checkpoint.read_npz(source)
  name = next(x for x in arrays if x.endswith('attention_2d//weights'))
  arrays[name] = np.where(
    np.arange(arrays[name].shape[-1]), arrays[name], np.inf
  )
  path = tmp_path / 'x.npz'
  np.savez(path, **{**arrays, name: arrays[name].astype(np.float32)})
  message = refused(load, path, 'NaN or infinite')
  assert name in message
  load(path, allow_nan=True)


def test_records_that_are_no_numbers_are_named(tmp_path):
  source = GOLDENS / 'af3_atom_cross_attention/checkpoint/single'
  found = read_records(source)
  at = next(
    i
    for i, x in enumerate(found)
    if x.scope.endswith('diffusion_embed_ref_pos')
  )
  bad = found[at].array.copy()
  bad.flat[0] = np.nan
  found[at] = found[at]._replace(array=bad)
  path = tmp_path / 'x.bin'
  record_file.write_records(path, found)
  message = refused(convert.load_atom_cross_att, path, 'NaN or infinite')
  assert f'{found[at].scope}//weights' in message
  convert.load_atom_cross_att(path, allow_nan=True)
