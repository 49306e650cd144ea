"""AlphaFold 3's files: every record is used once, or the error says what."""

import collections
import hashlib
import itertools
import json
import pathlib
import random
import shutil
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax import checkpoint, cli, convert
from structattn_jax.components import parameters as pm
from structattn_jax.convert import alphafold3, record_file
from structattn_jax.convert.record_file import Record
from structattn_jax.network.alphafold3 import atom_cross_attention as af3
from structattn_jax.network.alphafold3 import transformer_parameters as tp
from structattn_jax.verification import verify

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens/af3_atom_cross_attention'
CHECKPOINT = GOLDENS / 'checkpoint'
SINGLE = CHECKPOINT / 'single/af3_sample.bin.zst'
PLAIN = CHECKPOINT / 'plain/af3_tiny.bin'
COPIES = {
  'diffusion': ('diffusion_mixed', 78),
  'evoformer_conditioning': ('evoformer_conditioning', 44),
}
each_copy = pytest.mark.parametrize('copy', COPIES)


@pytest.fixture(scope='module')
def sample() -> list[Record]:
  return list(record_file.read_records(SINGLE))


def golden_params(case: str) -> dict[tuple[str, str], np.ndarray]:
  with np.load(GOLDENS / f'{case}.npz') as file:
    return {
      tuple(name.removeprefix('params/').rsplit('/', 1)): file[name]
      for name in file.files
      if name.startswith('params/')
    }


def refusal(path, read=record_file.read_records, **options) -> str:
  with pytest.raises(convert.CheckpointError) as caught:
    collections.deque(read(path, **options), maxlen=0)
  message = str(caught.value)
  assert message.startswith(str(path))
  assert '\n' not in message
  return message


def content_of(path) -> bytes:
  records = record_file.read_records(path)
  return b''.join(map(record_file.encode_record, records))


def changed(tmp_path, sample, **changes) -> pathlib.Path:
  """The sample with arrays of the diffusion copy changed or removed."""
  prefix = f'{alphafold3.SCOPES["diffusion"]}/diffusion_'
  new = []
  for record in sample:
    leaf = record.scope.removeprefix(prefix)
    if leaf not in changes:
      new.append(record)
    elif changes[leaf] is not None:
      new.append(record._replace(array=changes[leaf](record.array)))
  path = tmp_path / 'changed.bin'
  record_file.write_records(path, new)
  return path


# The format.


@pytest.mark.parametrize('layout', ['single', 'plain', 'split'])
def test_records_are_those_of_the_list_and_the_goldens(layout, tmp_path):
  folder = CHECKPOINT / layout
  if layout == 'split':
    folder = tmp_path
    data = SINGLE.read_bytes()
    (folder / 'af3_sample.bin.zst.0').write_bytes(data[:52600])
    (folder / 'af3_sample.bin.zst.1').write_bytes(data[52600:])
  records = list(record_file.read_records(folder))
  listed = json.loads((CHECKPOINT / 'records.json').read_text())
  got = [
    [r.scope, r.name, r.array.dtype.name, [*r.array.shape]] for r in records
  ]
  if layout == 'plain':
    assert len(got) == 6
    assert all(entry in listed for entry in got)
  else:
    assert got == listed
  known = golden_params('diffusion_mixed')
  known |= golden_params('evoformer_conditioning')
  compared = 0
  for record in records:
    want = known.get(record[:2])
    if want is not None:
      np.testing.assert_array_equal(record.array, want, strict=True)
      compared += 1
  assert compared == (3 if layout == 'plain' else 122)


def test_written_bytes_are_those_of_the_published_code():
  assert content_of(PLAIN) == PLAIN.read_bytes()


def test_example_record_has_the_documented_bytes():
  record = Record('a/b', 'w', np.array([0, 1], np.float32))
  want = (
    '03000000 01000000 07000000 01000000 08000000'
    + b'a/bwfloat32'.hex()
    + '02000000 00000000 0000803f'
  )
  assert record_file.encode_record(record) == bytes.fromhex(want)


@pytest.mark.parametrize('suffix', ['.bin', '.bin.zst'])
@pytest.mark.parametrize('num_shards', [1, 2, 12])
def test_written_files_read_as_they_were(suffix, num_shards, tmp_path, sample):
  records = [
    *sample[:20],
    Record('empty', 'w', np.zeros((0, 3), np.float32)),
    Record('scalar', 'w', np.float64(2.5)),
    Record('', 'é', np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::-1]),
    Record('big', 'w', np.array([1, 2], '>f4')),
    Record('half', 'w', jnp.ones((2, 2), jnp.bfloat16)),
  ]
  files = record_file.write_records(
    tmp_path / f'x{suffix}', records, num_shards=num_shards
  )
  assert len(files) == num_shards
  for path in (tmp_path, files[-1]):
    found = list(record_file.read_records(path))
    assert [r[:2] for r in found] == [r[:2] for r in records]
    for got, want in zip(found, records, strict=True):
      want = np.asarray(want.array)
      assert got.array.dtype == want.dtype.newbyteorder('=')
      np.testing.assert_array_equal(got.array, want)
      assert got.array.flags.writeable
  # The published reader sorts names as text.
  assert sorted(files) == list(files)


def test_several_zstandard_frames_are_one_stream(tmp_path, sample):
  import zstandard

  parts = [record_file.encode_record(record) for record in sample[:9]]
  path = tmp_path / 'x.bin.zst'
  frames = [zstandard.ZstdCompressor().compress(part) for part in parts]
  path.write_bytes(b''.join(frames))
  assert content_of(path) == b''.join(parts)


def test_shards_without_leading_zeros_are_read_in_numeric_order(
  tmp_path, sample
):
  files = record_file.write_records(
    tmp_path / 'x.bin.zst', sample[:40], num_shards=12
  )
  for i, file in enumerate(files):
    file.rename(tmp_path / f'y.bin.zst.{i}')
  assert content_of(tmp_path) == b''.join(
    map(record_file.encode_record, sample[:40])
  )


def test_order_of_shards_as_text_counts_where_it_is_good(tmp_path, sample):
  numbers = sorted(range(12), key=str)
  for number, record in zip(numbers, sample, strict=False):
    content = record_file.encode_record(record)
    (tmp_path / f'y.bin.{number}').write_bytes(content)
  found = record_file.read_records(tmp_path)
  assert [r[:2] for r in found] == [r[:2] for r in sample[:12]]


def test_files_are_found_in_the_published_order(tmp_path, sample):
  names = [
    ('m.0.bin.zst', 'm.1.bin.zst'),
    ('m.bin.zst.0', 'm.bin.zst.1'),
    ('m.0.bin', 'm.1.bin'),
    ('m.bin.0', 'm.bin.1'),
    ('m.bin.zst',),
    ('m.bin',),
  ]
  for number, files in enumerate(names):
    record = Record('s', str(number), np.zeros(300))
    content = record_file.encode_record(record)
    for i, file in enumerate(files):
      half = [content[:90], content[90:]] if len(files) > 1 else [content]
      (tmp_path / file).write_bytes(half[i])
  (tmp_path / 'notes.txt').write_text('no model')
  for number, files in enumerate(names):
    (record,) = record_file.read_records(tmp_path)
    assert record.name == str(number)
    for file in files:
      (record,) = record_file.read_records(tmp_path / file)
      assert record.name == str(number)
    for file in files:
      (tmp_path / file).unlink()
  assert 'no AlphaFold 3 model in this folder' in refusal(tmp_path)


def test_several_models_need_a_name(tmp_path):
  for name in 'ab':
    record = Record(name, 'w', np.zeros(1))
    record_file.write_records(tmp_path / f'{name}.bin', [record])
  assert 'several models: a, b' in refusal(tmp_path)
  (record,) = record_file.read_records(tmp_path, model='b')
  assert record.scope == 'b'
  assert "no model 'c'" in refusal(tmp_path, model='c')


def test_shards_are_written_all_or_none(tmp_path, sample, monkeypatch):
  old = record_file.write_records(tmp_path / 'x.bin', sample, num_shards=3)
  before = [file.read_bytes() for file in old]
  opened = []

  def fails_at_the_second(file, mode):
    opened.append(file)
    if len(opened) == 2:
      raise OSError('no space left')
    return open(file, mode)

  monkeypatch.setattr(checkpoint, 'open', fails_at_the_second, raising=False)
  doubled = [record._replace(array=2 * record.array) for record in sample]
  with pytest.raises(OSError, match='no space left'):
    record_file.write_records(tmp_path / 'x.bin', doubled, num_shards=3)
  monkeypatch.undo()
  assert [file.read_bytes() for file in old] == before
  assert len(list(tmp_path.iterdir())) == 3


def test_missing_shard_is_an_error(tmp_path, sample):
  files = record_file.write_records(tmp_path / 'x.bin', sample, num_shards=4)
  files[2].unlink()
  message = refusal(tmp_path)
  assert 'shards of' in message
  assert 'x.3.bin' in message
  files[3].unlink()  # The last ones: nothing in the names says so.
  message = refusal(files[0])
  assert 'the file ends in' in message
  assert 'x.1.bin, is one damaged or missing?' in message


@pytest.mark.parametrize(
  ('path', 'records', 'options', 'message'),
  [
    ('x.npz', [], {}, 'expected .bin.zst or .bin'),
    ('x.0.bin', [], {}, 'expected .bin.zst or .bin'),
    ('x.bin', [], {'num_shards': 0}, 'give at least 1'),
    ('x.bin', [Record('s', 'w', np.array(['a']))], {}, 'dtype <U1'),
    ('x.bin', [Record('s' * 5000, 'w', np.zeros(1))], {}, '4096 bytes'),
    ('old.bin.zst', [], {}, 'other files of this model.*old.bin'),
  ],
)
def test_what_cannot_be_written_is_an_error(
  path, records, options, message, tmp_path
):
  (tmp_path / 'old.bin').write_bytes(b'')
  with pytest.raises(ValueError, match=message):
    record_file.write_records(tmp_path / path, records, **options)
  assert [file.name for file in tmp_path.iterdir()] == ['old.bin']


# Damage.


def test_truncated_file_names_the_record_where_it_breaks(tmp_path):
  data = PLAIN.read_bytes()
  records = list(record_file.read_records(PLAIN))
  lengths = [len(record_file.encode_record(record)) for record in records]
  starts = [0, *itertools.accumulate(lengths)]
  path = tmp_path / 'cut.bin'
  for size in range(0, len(data), 13):
    path.write_bytes(data[:size])
    number = sum(start <= size for start in starts) - 1
    if size in starts and size:
      assert len(list(record_file.read_records(path))) == number
      continue
    message = refusal(path)
    if not size:
      assert 'is empty' in message
      continue
    assert f'record {number} at byte {starts[number]:,}' in message
    assert 'the file ends in' in message
    if number:
      last = records[number - 1]
      assert f'after {last.scope}//{last.name}' in message


def test_truncated_compressed_file_is_an_error(tmp_path):
  data = SINGLE.read_bytes()
  path = tmp_path / 'cut.bin.zst'
  for size in (4, 10, 1000, 50_000, len(data) - 5, len(data) - 1):
    path.write_bytes(data[:size])
    assert 'ends within its zstandard data' in refusal(path)
  path.write_bytes(data + b'more')
  assert 'not good zstandard data' in refusal(path)


@pytest.mark.parametrize('source', [PLAIN, SINGLE], ids=['plain', 'zstandard'])
def test_flipped_bits_are_errors_or_other_values(source, tmp_path):
  data = source.read_bytes()
  rng = random.Random(0)
  path = tmp_path / source.name
  refused = 0
  for i in range(300):
    flipped = bytearray(data)
    # Every other one in the first header; values are never checked.
    flipped[rng.randrange(60 if i % 2 else len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(flipped)
    try:
      found = list(record_file.read_records(path))
    except convert.CheckpointError:
      refused += 1
    else:
      assert all(isinstance(record.array, np.ndarray) for record in found)
  assert refused > 50


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({0: -1}, 'no record'),
    ({1: 2**31 - 1}, 'no record'),
    ({3: 1000}, 'no record'),
    ({4: -8}, 'no record'),
    ({4: 12}, 'has 12 bytes, which is not float32'),
    ({2: 6}, "unknown dtype 'float3'"),
    ({1: 0}, "unknown dtype 'wfloat3'"),
  ],
)
def test_damaged_header_is_an_error(change, message, tmp_path):
  good = record_file.encode_record(Record('a', 'w', np.zeros(2, np.float32)))
  header = [*struct.unpack('<5i', good[:20])]
  for i, value in change.items():
    header[i] = value
  path = tmp_path / 'x.bin'
  path.write_bytes(good + struct.pack('<5i', *header) + good[20:])
  found = refusal(path)
  assert message in found
  assert f'record 1 at byte {len(good)}, after a//w' in found


@pytest.mark.parametrize('dtype', ['object', 'V8', 'datetime64', '|O', 'O'])
def test_dtype_outside_of_the_list_is_refused(dtype, tmp_path):
  data = b'\0' * 8
  head = struct.pack('<5i', 1, 1, len(dtype), 1, len(data))
  path = tmp_path / 'x.bin'
  path.write_bytes(head + b'aw' + dtype.encode() + b'\1\0\0\0' + data)
  assert f'unknown dtype {dtype!r}' in refusal(path)


def test_name_that_is_no_text_is_an_error(tmp_path):
  good = record_file.encode_record(Record('a', 'w', np.zeros(2, np.float32)))
  path = tmp_path / 'x.bin'
  path.write_bytes(good[:20] + b'\xff' + good[21:])
  assert 'its scope is not UTF-8' in refusal(path)


def test_missing_zstandard_is_one_line_that_names_the_extra(
  monkeypatch, capsys, tmp_path
):
  monkeypatch.setitem(sys.modules, 'zstandard', None)
  assert len(list(record_file.read_records(PLAIN))) == 6
  assert cli.main(['convert', str(SINGLE), str(tmp_path / 'x.npz')]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "pip install 'structattn-jax[convert]'" in line
  report = verify.verify([CHECKPOINT])
  assert report.status == 2
  assert any('structattn-jax[convert]' in error for error in report.errors)
  assert {row.case for row in report.rows} == {'plain/af3_tiny'}


# The parameters.


@each_copy
def test_copy_is_taken_whole_and_unchanged(copy):
  case, count = COPIES[copy]
  config, params = convert.load_atom_cross_att(SINGLE, copy)
  want = golden_params(case)
  found = {
    (f'{alphafold3.SCOPES[copy]}/{module}', name): array
    for module, values in params.items()
    for name, array in values.items()
  }
  assert len(found) == count
  assert found.keys() == want.keys()
  for key, array in found.items():
    np.testing.assert_array_equal(array, want[key], strict=True)
  with np.load(GOLDENS / f'{case}.npz') as file:
    recorded = json.loads(file['meta'].item())['config']
  sizes = {
    name: getattr(part, name)
    for part in (
      config,
      config.atom_transformer,
      config.atom_transformer.attention,
    )
    for name in recorded
    if hasattr(part, name)
  }
  assert sizes == recorded
  assert config.decoder_transformer is None


def test_tables_of_the_released_sizes_have_the_released_parameters():
  """Counted on upstream's model: 122 arrays with 3,228,816 values."""
  sizes = {'C': 128, 'P': 16, 'S': 384, 'Z': 128}
  sizes |= dict(zip('LHKVF', (3, 4, 32, 32, 2), strict=True))
  sizes |= {f"{x}'": sizes[x] for x in 'LHKVF'}
  arrays = values = 0
  for copy, per_token in (('diffusion', 768), ('evoformer_conditioning', 384)):
    table = alphafold3.atom_cross_att_table(copy)
    arrays += len(table)
    for axes in table.values():
      lengths = [alphafold3._length(x, {**sizes, 'D': per_token}) for x in axes]
      values += np.prod(lengths)
  assert (arrays, values) == (122, 3_228_816)


def test_decoder_may_have_sizes_of_its_own(tmp_path, sample):
  prefix = 'diffuser/~/diffusion_head/diffusion_atom_transformer_decoder'
  halved = []
  for record in sample:
    array = record.array
    if record.scope.startswith(f'{prefix}/__layer_stack'):
      array = array[:1]
    elif record.scope == f'{prefix}/pair_logits_projection':
      array = array[:, :1]
    halved.append(record._replace(array=array))
  record_file.write_records(tmp_path / 'x.bin', halved)
  config, _ = convert.load_atom_cross_att(tmp_path)
  assert config.atom_transformer.num_blocks == 2
  assert config.decoder_transformer.num_blocks == 1
  assert (
    config.decoder_transformer.attention == config.atom_transformer.attention
  )


def test_problems_are_listed_all_and_alone(tmp_path, sample):
  path = changed(
    tmp_path,
    sample,
    embed_ref_pos=lambda x: x[:, 1:],
    lnorm_trunk_pair_cond=lambda x: x.astype(np.float64),
    embed_trunk_single_cond=None,
  )
  extra = Record(
    'diffuser/~/diffusion_head/diffusion_surprise', 'w', np.zeros(1)
  )
  records = [*record_file.read_records(path), extra]
  record_file.write_records(path, records)
  message = refusal(path, lambda p: convert.load_atom_cross_att(p))
  listed = message.partition('...: ')[2].split('; ')
  prefix = 'diffuser/~/diffusion_head/diffusion_'
  assert sorted(listed) == sorted(
    [
      f'missing {prefix}embed_trunk_single_cond//weights',
      f'unknown {prefix}surprise//w',
      f'wrong {prefix}embed_ref_pos//weights has shape [3, 23], expected '
      '[3, 24] = [3, C]',
      f'wrong {prefix}lnorm_trunk_pair_cond//scale has dtype float64, expected '
      'float32',
    ]
  )
  # The other copy is not concerned.
  convert.load_atom_cross_att(path, 'evoformer_conditioning')


@each_copy
def test_parameters_are_those_of_our_module(copy):
  config, params = convert.load_atom_cross_att(SINGLE, copy)
  has_trunk = copy == 'diffusion'
  table = af3.atom_cross_att_parameters(
    config,
    copy,
    positions=has_trunk,
    single_channels=20 if has_trunk else None,
    pair_channels=6 if has_trunk else None,
    decoder=has_trunk,
  )
  want = {
    module: {name: parameter.shape for name, parameter in arrays.items()}
    for module, arrays in table.items()
  }
  assert jax.tree.map(np.shape, params) == want


def test_second_record_must_be_identical(tmp_path, sample):
  scope = 'diffuser/~/diffusion_head/diffusion_embed_ref_pos'
  (old,) = [record for record in sample if record.scope == scope]
  path = tmp_path / 'x.bin'
  record_file.write_records(path, [*sample, old])
  _, params = convert.load_atom_cross_att(path)
  np.testing.assert_array_equal(
    params['diffusion_embed_ref_pos']['weights'], old.array
  )
  for other in (-old.array, old.array[None], old.array.astype(np.float64)):
    record_file.write_records(path, [*sample, old._replace(array=other)])
    message = refusal(path, convert.load_atom_cross_att)
    assert f'{scope}//weights occurs twice, with other values' in message


def test_foreign_and_incomplete_files_are_refused(tmp_path):
  message = refusal(PLAIN, lambda p: convert.load_atom_cross_att(p))
  assert 'nothing is called diffuser/~/diffusion_head/diffusion_' in message
  message = refusal(
    PLAIN, lambda p: convert.load_atom_cross_att(p, 'evoformer_conditioning')
  )
  assert 'missing diffuser/evoformer_conditioning_embed_ref_pos//we' in message
  assert 'is the file cut after it?' in message
  assert 'no such file' in refusal(tmp_path / 'gone.bin').lower()
  with pytest.raises(ValueError, match=r"copy: expected one of.*'trunk'"):
    convert.load_atom_cross_att(PLAIN, 'trunk')


@each_copy
def test_saved_parameters_load_again(copy, tmp_path):
  config, params = convert.load_atom_cross_att(SINGLE, copy)
  path = tmp_path / 'mine.bin.zst'
  scope = alphafold3.SCOPES[copy]
  convert.save_params(path, params, scope=scope, num_shards=3)
  again, found = convert.load_atom_cross_att(tmp_path, copy)
  assert again == config
  jax.tree.map(np.testing.assert_array_equal, found, params)


def test_token_transformer_round_trip(tmp_path):
  config = tp.TransformerConfig(
    attention=tp.SelfAttentionConfig(num_head=2, key_dim=8, value_dim=4),
    num_blocks=6,
    super_block_size=3,
    num_intermediate_factor=2,
  )
  table = tp.transformer_parameters(config, 12, 10, 6)
  params = pm.init_parameters(table, jax.random.key(0))
  params = jax.tree.map(np.asarray, params)
  path = tmp_path / 'x.bin'
  convert.save_params(path, params, scope=alphafold3.TRANSFORMER_SCOPE)
  again, found = convert.load_transformer(path)
  assert again == config
  jax.tree.map(np.testing.assert_array_equal, found, params)


# The commands.


def test_convert_of_a_folder_writes_config_and_provenance(tmp_path, capsys):
  output = tmp_path / 'out.npz'
  folder = CHECKPOINT / 'single'
  assert convert.detect_format(folder) == 'alphafold3'
  assert cli.main(['convert', str(folder), str(output)]) == 0
  loaded = checkpoint.load(output)
  config, params = convert.load_atom_cross_att(SINGLE)
  assert loaded.config == config
  jax.tree.map(np.testing.assert_array_equal, dict(loaded.params), params)
  assert loaded.provenance['source_format'] == 'alphafold3'
  assert loaded.provenance['part'] == 'atom_diffusion'
  assert loaded.provenance['source_file'] == SINGLE.name
  assert loaded.provenance['source_sha256'] == (
    hashlib.sha256(SINGLE.read_bytes()).hexdigest()
  )
  capsys.readouterr()
  assert cli.main(['info', str(output)]) == 0
  assert 'per_atom_channels=24' in capsys.readouterr().out
  part = ['--part', 'atom_conditioning']
  assert cli.main(['convert', str(SINGLE), str(output), *part]) == 0
  assert checkpoint.load(output).config.per_atom_channels == 32


def test_convert_of_a_folder_without_a_model_is_one_line(tmp_path, capsys):
  output = str(tmp_path / 'out.npz')
  assert cli.main(['convert', str(tmp_path), output]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert str(tmp_path) in line


def test_verify_replays_all_layouts():
  report = verify.verify([CHECKPOINT])
  assert report.status == 0, report.errors
  outputs = collections.defaultdict(list)
  for row in report.rows:
    outputs[row.case].append(row.output)
  assert outputs == {
    'plain/af3_tiny': [
      '6 of 125 records',
      '3 arrays of evoformer_conditioning',
      'bytes when written again',
    ],
    'single/af3_sample': [
      '125 of 125 records',
      '78 arrays of diffusion_mixed',
      '44 arrays of evoformer_conditioning',
    ],
  }


def test_verify_notices_wrong_values_names_and_damage(tmp_path, sample):
  shutil.copy(CHECKPOINT / 'records.json', tmp_path)
  shutil.copy(GOLDENS / 'evoformer_conditioning.npz', tmp_path)
  folder = tmp_path / 'single'
  folder.mkdir()

  def failures(records) -> list[str]:
    record_file.write_records(folder / 'x.bin.zst', records)
    report = verify.verify([folder])
    assert report.status == (0 if all(r.ok for r in report.rows) else 1)
    return [row.output for row in report.rows if not row.ok]

  assert failures(sample) == []
  wrong = [*sample]
  wrong[5] = wrong[5]._replace(array=wrong[5].array * (1 + 1e-6))
  assert failures(wrong) == ['44 arrays of evoformer_conditioning']
  wrong = [*sample]
  wrong[7] = wrong[7]._replace(name='other')
  assert failures(wrong) == ['125 of 125 records']
  shutil.move(tmp_path / 'records.json', folder)
  assert failures(sample[:-1]) == ['124 of 125 records']
  (folder / 'x.bin.zst').write_bytes(SINGLE.read_bytes()[:60_000])
  report = verify.verify([folder])
  assert report.status == 2
  assert 'ends within its zstandard data' in report.errors[0]


def test_verify_of_a_model_about_which_nothing_is_known(tmp_path, sample):
  record_file.write_records(tmp_path / 'x.bin', sample[:2])
  report = verify.verify([tmp_path / 'x.bin'])
  assert report.status == 2
  assert 'neither a records.json nor a golden' in report.errors[0]


def test_whole_diffusion_head_is_converted(tmp_path):
  """Parameters of the golden, written as a released file and read again."""
  path = GOLDENS.parent / 'af3_diffusion_head/head_small.npz'
  scope = 'diffuser/~/diffusion_head/'
  params: dict = {}
  with np.load(path) as file:
    sizes = json.loads(file['meta'].item())['config']
    for key in file.files:
      if key.startswith(f'params/{scope}'):
        module, name = key.removeprefix(f'params/{scope}').rsplit('/', 1)
        params.setdefault(module, {})[name] = file[key]
  source, target = tmp_path / 'model.bin', tmp_path / 'head.npz'
  convert.save_params(source, params, scope=scope)
  config, loaded = convert.load_diffusion_head(source)
  assert loaded.keys() == params.keys()
  for module, arrays in params.items():
    assert loaded[module].keys() == arrays.keys()
    for name, array in arrays.items():
      np.testing.assert_array_equal(loaded[module][name], array)
  transformer = config.transformer
  assert (config.seq_channel, config.pair_channel) == (20, 12)
  assert transformer.num_blocks == sizes['tblocks']
  assert transformer.super_block_size == sizes['sb']
  assert transformer.attention.num_head == sizes['theads']
  assert config.atoms.per_token_channels == sizes['token']
  arguments = [str(source), str(target), '--part', 'diffusion_head']
  assert cli.main(['convert', *arguments]) == 0
  assert target.exists()

  del params['output_norm']
  params['pair_transition_1ffw_transition2']['weights'] = np.zeros((5, 12))
  convert.save_params(source, params, scope=scope)
  message = refusal(source, alphafold3.load_diffusion_head)
  assert f'missing {scope}output_norm//scale' in message
  assert (
    'pair_transition_1ffw_transition2//weights has shape [5, 12]' in message
  )
