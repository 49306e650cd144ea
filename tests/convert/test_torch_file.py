"""PyTorch files: equal to `torch.load`; bad ones are errors and run nothing."""

import contextlib
import hashlib
import json
import mmap
import os
import pathlib
import pickle
import pickletools
import time
import zipfile
from collections.abc import Iterator
from typing import Any

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
import torch_archive
from hypothesis import strategies as st

from structattn_jax import checkpoint
from structattn_jax.convert import torch_file
from structattn_jax.convert.torch_file import Global, Record, Tensor

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens'
SAMPLE = GOLDENS / 'torch_file/views_and_dtypes.pt'
DIGESTS = json.loads((GOLDENS / 'torch_file/digests.json').read_text())
OMEGACONF = 'boltz_atom_encoder/boltz2_sample_omegaconf.ckpt'

FLOATS = bytes(range(24))  # Six elements.


def leaves(tree: Any, path: str = '') -> Iterator[tuple[str, Any]]:
  match tree:
    case dict():
      for key, value in tree.items():
        yield from leaves(value, f'{path}/{key!r}')
    case list() | tuple():
      for i, value in enumerate(tree):
        yield from leaves(value, f'{path}/{i}')
    case _:
      yield path, tree


def digest(tree: Any) -> dict[str, Any]:
  """As the recorded ones were made from what `torch.load` returned."""
  result, tensors = hashlib.sha256(), 0
  for path, value in leaves(tree):
    result.update(path.encode())
    if isinstance(value, Tensor):
      tensors += 1
      array = value.array()
      result.update(f'{value.dtype}{list(value.shape)}'.encode())
      result.update(array.tobytes())
    else:
      result.update(repr(value).encode())
  return {'tensors': tensors, 'sha256': result.hexdigest()}


def read_all(path: pathlib.Path) -> None:
  """Reads every tensor, also those in nested and in endless structures."""
  todo, seen = [torch_file.load(path)], set()
  while todo:
    tree = todo.pop()
    if id(tree) in seen:
      continue
    seen.add(id(tree))
    match tree:
      case Tensor():
        tree.array()
      case dict():
        todo.extend(tree.values())
      case list() | tuple():
        todo.extend(tree)
      case Record():
        todo.extend((tree.args, tree.state, tree.items, tree.elements))


def refusal(path: pathlib.Path) -> str:
  with pytest.raises(checkpoint.CheckpointError) as caught:
    read_all(path)
  message = str(caught.value)
  assert message.startswith(f'{path}: ')
  assert '\n' not in message
  assert len(message) < 400 + len(str(path))
  return message


def loaded(tmp_path: pathlib.Path, *parts: bytes, **members: bytes) -> Any:
  path = torch_archive.write_members(
    tmp_path / 'file.pt',
    torch_archive.program(*parts),
    {name.replace('_', '/'): data for name, data in members.items()},
  )
  return torch_file.load(path)


@pytest.mark.parametrize('name', DIGESTS['files'])
def test_sample_checkpoint_equals_torch_bit_for_bit(name):
  content = torch_file.load(GOLDENS / name)
  if name == OMEGACONF:
    content = content['state_dict']
  assert digest(content) == DIGESTS['files'][name]


@pytest.mark.parametrize('name', [*DIGESTS['files'], str(SAMPLE)])
def test_peer_torch_reads_the_same(name):
  torch = pytest.importorskip('torch')
  if name == OMEGACONF:
    pytest.importorskip('omegaconf')
  got = torch_file.load(GOLDENS / name)
  # Our own sample files; torch refuses some of their classes otherwise.
  want = torch.load(GOLDENS / name, weights_only=False, map_location='cpu')
  if name == OMEGACONF:
    got, want = got['state_dict'], want['state_dict']
  if name == str(SAMPLE):
    got, want = got['tensors'], want['tensors']
  want = dict(leaves(want))
  for path, value in leaves(got):
    if isinstance(value, Tensor):
      theirs = want[path].detach().contiguous()
      assert str(theirs.dtype).removeprefix('torch.') == value.dtype.name
      assert tuple(theirs.shape) == value.shape
      raw = theirs.view(-1).view(torch.uint8).numpy().tobytes()
      assert value.array().tobytes() == raw
    else:
      assert value == want[path]


def test_every_dtype_and_view_equals_torch():
  tensors = torch_file.load(SAMPLE)['tensors']
  with np.load(GOLDENS / 'torch_file/views_and_dtypes.npz') as want:
    assert set(tensors) == set(want)
    for name, tensor in tensors.items():
      array = tensor.array()
      assert array.dtype == tensor.dtype
      assert array.shape == tensor.shape == want[name].shape
      assert tensor.size == array.size
      if name.startswith('dtype_'):
        assert array.dtype.name == name.removeprefix('dtype_')
      # NumPy's files have no bfloat16 and float8: their bits are stored.
      assert array.tobytes() == want[name].tobytes()
  assert tensors['dtype_bfloat16'].dtype == jnp.bfloat16


def test_containers_and_scalars_come_back():
  content = torch_file.load(SAMPLE)
  assert content['numbers'] == [1, -5, 2**40, -(2**70), 1.5, True, None]
  assert content['text'] == 'ä→'
  assert content['nested'] == ({'a': (1,)}, [], {2, 3}, frozenset([4]))
  assert content['size'] == (4, 6)
  assert content['dtype'] == Global('torch.bfloat16')
  assert content['bytes'] == b'\x00\xff'
  assert content[3] == 'int key'
  assert content[1, 'a'] == 'tuple key'
  assert content['itself'][0] is content['itself']
  device = content['device']
  assert isinstance(device, Record)
  assert (device.name, device.args) == ('torch.device', ('cpu',))


def test_arrays_are_read_only_views_of_the_mapped_file():
  tensors = torch_file.load(SAMPLE)['tensors']
  arrays = {name: tensor.array() for name, tensor in tensors.items()}
  for array in arrays.values():
    assert not array.flags.writeable
    base = array
    while isinstance(base, np.ndarray):
      base = base.base
    assert isinstance(base, mmap.mmap)
  views = ('transposed', 'column', 'strided', 'expanded', 'shared')
  for name in views:
    assert np.shares_memory(arrays[name], arrays['whole'])
    assert tensors[name].storage == tensors['whole'].storage
  assert not np.shares_memory(arrays['parameter'], arrays['whole'])


def test_nothing_is_read_that_is_not_used(tmp_path):
  """A damaged storage is an error for its own tensors only."""
  path = torch_archive.write(
    tmp_path / 'file.pt', {'a': np.ones(3), 'b': np.full(4, 7.0)}
  )
  content = path.read_bytes()
  at = content.index(np.float64(7).tobytes())
  path.write_bytes(content[:at] + b'\x01' + content[at + 1 :])
  tensors = torch_file.load(path)
  np.testing.assert_array_equal(tensors['a'].array(), np.ones(3))
  with pytest.raises(checkpoint.CheckpointError, match='data/1 has another'):
    tensors['b'].array()


def test_file_from_a_big_endian_machine_is_swapped(tmp_path):
  values = {'a': np.arange(6.0).reshape(2, 3), 'b': np.arange(3, dtype='i4')}
  swapped = {name: value.byteswap() for name, value in values.items()}
  path = torch_archive.write(tmp_path / 'big.pt', swapped, byteorder=b'big')
  for name, tensor in torch_file.load(path).items():
    np.testing.assert_array_equal(tensor.array(), values[name])
  parts = torch_archive.tensor(
    torch_archive.storage('0', 2, 'ComplexFloatStorage'), (2,), (1,)
  )
  value = np.array([1 + 2j, 3 - 4j], np.complex64)
  tensor = loaded(
    tmp_path, parts, byteorder=b'big', data_0=value.byteswap().tobytes()
  )
  np.testing.assert_array_equal(tensor.array(), value)


def test_file_without_checksums_is_read(tmp_path):
  """As written after `torch.serialization.set_crc32_options(False)`."""
  path = torch_archive.write(tmp_path / 'file.pt', {'a': np.ones(3)})
  content = path.read_bytes()
  with zipfile.ZipFile(path) as archive:
    for info in archive.infolist():
      content = content.replace(info.CRC.to_bytes(4, 'little'), bytes(4))
  path.write_bytes(content)
  np.testing.assert_array_equal(torch_file.load(path)['a'].array(), np.ones(3))


class Command:
  def __init__(self, command: str):
    self.command = command

  def __reduce__(self):
    return os.system, (self.command,)


class Evaluated:
  def __reduce__(self):
    return eval, ("__import__('os').abort()",)


def test_hostile_objects_become_records_and_run_nothing(tmp_path):
  command = f'touch {tmp_path / "ran"}'
  content = {'a': Command(command), 'b': [Evaluated(), np.dtype('f4')], 'c': 1}
  for protocol in (2, 4, 5):
    path = torch_archive.write_members(
      tmp_path / 'file.pt', pickle.dumps(content, protocol), {}
    )
    found = torch_file.load(path)
    assert found['a'].name in ('posix.system', 'nt.system')
    assert found['a'].args == (command,)
    assert found['b'][0].name.endswith('.eval')
    assert found['b'][1].args[0] == 'f4'
    assert found['b'][1].state[:2] == (3, '<')
    assert found['c'] == 1
    assert 'touch' not in repr(found)
  assert not (tmp_path / 'ran').exists()


class Box(dict):
  """Like omegaconf's containers: items, elements or a state."""


class Row(list):
  pass


def test_unknown_objects_keep_what_they_were_made_from(tmp_path):
  box, row = Box(a=1), Row([2, 3])
  box.extra = row
  for protocol in (2, 4, 5):
    path = torch_archive.write_members(
      tmp_path / 'file.pt', pickle.dumps([box, row], protocol), {}
    )
    found_box, found_row = torch_file.load(path)
    assert found_box.name.endswith('.Box')
    assert found_box.items == [('a', 1)]
    assert found_box.state == {'extra': found_row}
    assert found_row.elements == [2, 3]


tensor, storage = torch_archive.tensor, torch_archive.storage
value, call = torch_archive.value, torch_archive.call


@pytest.mark.parametrize(
  ('parts', 'message'),
  [
    # Tensors outside of their storage.
    ([tensor(storage(), (2, 4), (4, 1))], 'reaches to element 7'),
    ([tensor(storage(), offset=1)], 'reaches to element 6'),
    ([tensor(storage(), (), (), 6)], 'reaches to element 6'),
    ([tensor(storage(), (2**40, 2**40), (2**40, 1))], 'reaches to element'),
    ([tensor(storage(), (2,), (-1,), 1)], 'without a proper shape'),
    ([tensor(storage(), (-2, 3))], 'without a proper shape'),
    ([tensor(storage(), offset=-1)], 'without a proper shape'),
    ([tensor(storage(), (2, 3), (3,))], 'without a proper shape'),
    ([tensor(storage(), (2.0, 3), (3, 1))], 'without a proper shape'),
    ([tensor(storage(), (True, 3), (3, 1))], 'without a proper shape'),
    ([tensor(storage(), [2, 3], [3, 1])], 'without a proper shape'),
    ([tensor(storage(), (10**30,), (0,))], 'without a proper shape'),
    ([tensor(storage(), (1,) * 99, (1,) * 99)], 'without a proper shape'),
    ([tensor(storage(), (2**62, 2**62), (0, 0))], 'damaged or unsafe'),
    # Storages that are not there, or have another size.
    ([storage('1')], "no storage '1'"),
    ([storage('../data.pkl')], 'no storage'),
    ([storage('/etc/passwd')], "no storage '/etc/passwd'"),
    ([storage(7)], 'does not name a storage'),
    ([storage(numel=5)], '24 bytes for 5 elements of float32'),
    ([storage(numel=2**62)], '24 bytes for'),
    ([storage(numel=10**30)], 'does not name a storage'),
    ([storage(numel=-1)], 'does not name a storage'),
    ([storage(kind='DoubleStorage')], 'elements of float64'),
    ([value(5), b'Q'], 'does not name a storage'),
    ([value(('module', 1)), b'Q'], 'does not name a storage'),
    ([value(('storage', 1, '0', 'cpu', 6)), b'Q'], 'does not name a storage'),
    # Programs that do what data need not do.
    ([b'(', value('ls'), b'ios\nsystem\n'], 'uses INST'),
    ([b'(cos\nsystem\n', value('ls'), b'o'], 'uses OBJ'),
    ([b'\x82\x01'], 'uses EXT1'),
    ([b'\x97'], 'uses NEXT_BUFFER'),
    ([b'Pstorage\n'], 'uses PERSID'),
    ([value(1), b')R'], 'not a function'),
    ([b'cos\nsystem\n', value('ls'), b'R'], 'not a function'),
    ([b'cos\nsystem\n', value({'x': 1}), b'b'], 'sets attributes of a Global'),
    ([b'ccollections\nOrderedDict\n', value({}), b'b'], 'sets attributes'),
    ([storage(), value({}), b'b'], 'sets attributes of a Storage'),
    ([value('text'), value(1), b'a'], 'appends to a str'),
    ([value([]), value('k'), value(1), b's'], 'sets items of a list'),
    ([b'}]K\x01s'], 'a key of a dictionary is a list'),
    ([value({}), b')\x85\x85K\x01s'], 'a key of a dictionary is a tuple'),
    ([b'}', value(2**61 - 1), b'Ns'], 'a very large number'),
    ([b'}', value((1, 2**62)), b'Ns'], 'a very large number'),
    ([value(1), value(2), b'\x93'], 'not named by text'),
    # Programs with a hole.
    ([b''], 'stack of the wrong depth'),
    ([b'N('], 'stack of the wrong depth'),
    ([b'NN'], 'stack of the wrong depth'),
    ([b'\x85'], 'more values than there are'),
    ([b't'], 'damaged'),
    ([b'h\x05'], 'damaged'),
    ([b'q\x05'], 'damaged'),
    ([b'}(K\x01u'], 'damaged'),
    ([b'\x8b\xff\xff\xff\x7f'], 'damaged'),
    ([b'\x8d' + b'\xff' * 8], 'damaged'),
    ([b'\x80\xffcos\n'], 'damaged'),
  ],
)
def test_unsafe_program_is_refused(parts, message, tmp_path):
  path = torch_archive.write_members(
    tmp_path / 'file.pt', torch_archive.program(*parts), {'data/0': FLOATS}
  )
  start = time.process_time()
  assert message in refusal(path)
  assert time.process_time() - start < 1


def test_program_without_end_is_refused(tmp_path):
  path = torch_archive.write_members(tmp_path / 'a.pt', b'\x80\x02N', {})
  assert 'damaged' in refusal(path)
  path = torch_archive.write_members(tmp_path / 'b.pt', b'', {})
  assert 'damaged' in refusal(path)


def test_small_program_for_a_large_object_takes_no_memory(tmp_path):
  start = time.process_time()
  # A memo number that a table would have to be as long as.
  content = loaded(tmp_path, value([1]), b'r\xff\xff\xff\xff')
  assert content == [1]
  # [[...], [...]] nested 60 times: 2^60 paths.
  twice = b''.join(b'q%c0h%ch%c\x86' % (i, i, i) for i in range(60))
  content = loaded(tmp_path, b'N', twice)
  for _ in range(60):
    assert content[0] is content[1]
    content = content[0]
  # Nested 200,000 times.
  loaded(tmp_path, b']' * 200_000, b'a' * 199_999)
  # Zero strides: one element seen 2^40 times.
  view = loaded(
    tmp_path, tensor(storage(), (2**20, 2**20), (0, 0)), data_0=FLOATS
  )
  assert view.size == 2**40
  assert view.array()[-1, -1] == view.array()[0, 0]
  assert time.process_time() - start < 5


def test_tensors_of_other_kinds_are_records(tmp_path):
  for memory in (storage(kind='QInt8Storage'), value('x')):
    content = loaded(tmp_path, tensor(memory), data_0=FLOATS)
    assert isinstance(content, Record)
    assert content.name == 'torch._utils._rebuild_tensor_v2'
  sparse = call('torch._utils _rebuild_sparse_tensor', value(1))
  assert isinstance(loaded(tmp_path, sparse), Record)
  conjugate = call(
    'torch._utils _rebuild_tensor_v2',
    storage(numel=3, kind='ComplexFloatStorage'),
    *map(value, (0, (3,), (1,), False, {}, {'conj': True})),
  )
  assert isinstance(loaded(tmp_path, conjugate, data_0=FLOATS), Record)


def test_tensors_with_attributes_and_bare_storages_are_read(tmp_path):
  own = torch_archive.value((0, (2, 3), (3, 1), False, {}))
  inner = b'(' + storage() + own[own.index(b'(') + 1 :]
  with_attributes = call(
    'torch._tensor _rebuild_from_type_v2',
    b'ctorch._utils\n_rebuild_tensor_v2\n',
    b'ctorch\nTensor\n',
    inner,
    value({'name': 'x'}),
  )
  found = loaded(tmp_path, with_attributes, data_0=FLOATS)
  assert isinstance(found, Tensor)
  np.testing.assert_array_equal(
    found.array(), np.frombuffer(FLOATS, 'f4').reshape(2, 3)
  )
  found = loaded(tmp_path, storage(), data_0=FLOATS)
  assert isinstance(found, torch_file.Storage)
  assert (found.key, found.nbytes) == ('0', 24)


def test_other_numbers_and_bytes_come_back(tmp_path):
  content = [1 - 2j, bytearray(b'ab'), {b'k': None}, -(2**59)]
  for protocol in (2, 4, 5):
    if protocol < 5:  # They have no opcode of their own there.
      content[1] = b'ab'
    path = torch_archive.write_members(
      tmp_path / 'file.pt', pickle.dumps(content, protocol), {}
    )
    assert torch_file.load(path) == content


def test_large_archives_are_read(tmp_path):
  """Members in the format for more than 4 GB."""
  path = tmp_path / 'large.pt'
  members = {
    'archive/data.pkl': torch_archive.program(tensor(storage())),
    'archive/data/0': FLOATS,
  }
  with zipfile.ZipFile(path, 'w') as archive:
    for name, content in members.items():
      with archive.open(name, 'w', force_zip64=True) as file:
        file.write(content)
  assert torch_file.load(path).array().tobytes() == FLOATS


def test_ordered_dictionary_keeps_its_order(tmp_path):
  made = b'ccollections\nOrderedDict\n)R(' + value('b') + value(1)
  made += value('a') + value(2) + b'u' + value({'_metadata': {}}) + b'b'
  assert list(loaded(tmp_path, made).items()) == [('b', 1), ('a', 2)]


def test_plain_archives_are_refused(tmp_path):
  path = tmp_path / 'file.pt'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('readme', b'text')
  assert 'expected one data.pkl, got 0' in refusal(path)
  assert not torch_file.is_torch_file(path)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a/data.pkl', b'N.')
    archive.writestr('b/data.pkl', b'N.')
  assert 'expected one data.pkl, got 2' in refusal(path)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a/data.pkl', b'N.')
    with pytest.warns(UserWarning, match='Duplicate name'):
      archive.writestr('a/data.pkl', b'N.')
  assert 'occurs twice' in refusal(path)
  with zipfile.ZipFile(path, 'w'):
    pass
  assert 'damaged' in refusal(path)
  torch_archive.write_members(path, b'N.', {'constants.pkl': b'N.'})
  assert 'TorchScript' in refusal(path)
  torch_archive.write_members(path, b'N.', {'byteorder': b'middle'})
  assert 'unknown byte order' in refusal(path)
  assert torch_file.is_torch_file(path)


def test_compressed_members_are_refused(tmp_path):
  """So a file cannot ask for more memory than it has."""
  path = tmp_path / 'bomb.pt'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('a/data.pkl', torch_archive.program(storage(numel=2**22)))
    archive.writestr('a/data/0', bytes(2**24))
  assert 'compressed' in refusal(path)


def test_members_that_overlap_are_refused(tmp_path):
  path = torch_archive.write(
    tmp_path / 'file.pt', {'a': np.ones(3), 'b': np.ones(3)}
  )
  content = bytearray(path.read_bytes())
  with zipfile.ZipFile(path) as archive:
    first, second = (
      archive.getinfo(f'archive/data/{i}').header_offset for i in range(2)
    )
  directory = content.rindex(b'archive/data/1') - 46
  offset = slice(directory + 42, directory + 46)
  assert content[offset] == second.to_bytes(4, 'little')
  for place in (first, first + 8, len(content), 2**32 - 2):
    content[offset] = place.to_bytes(4, 'little')
    path.write_bytes(content)
    refusal(path)


def test_files_that_are_no_archives_are_refused(tmp_path):
  path = tmp_path / 'file.pt'
  for content in (b'', b'PK', b'PK\x03\x04', b'PK\x05\x06', b'text' * 99):
    path.write_bytes(content)
    refusal(path)
  magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
  path.write_bytes(magic + pickle.dumps(1001, 2))
  assert 'before 1.6' in refusal(path)
  path.write_bytes(pickle.dumps({'a': 1}, 2))
  assert 'not a zip archive' in refusal(path)
  assert 'No such file' in refusal(tmp_path / 'gone.pt')
  refusal(tmp_path)


@pytest.fixture(scope='module')
def sample_arrays() -> dict[str, bytes]:
  return _arrays(SAMPLE)


def _arrays(path: pathlib.Path) -> dict[str, bytes]:
  return {
    place: value.array().tobytes() if isinstance(value, Tensor) else repr(value)
    for place, value in leaves({**torch_file.load(path), 'itself': None})
  }


def _read_or_refused(path: pathlib.Path, want: dict[str, bytes]) -> bool:
  """Whether the file is refused; else it must read equal."""
  start = time.process_time()
  try:
    got = _arrays(path)
  except checkpoint.CheckpointError:
    return True
  finally:
    assert time.process_time() - start < 2
  assert got == want
  return False


def test_truncated_file_is_refused(sample_arrays, tmp_path):
  content = SAMPLE.read_bytes()
  path = tmp_path / 'cut.pt'
  for length in [*range(0, len(content), 97), len(content) - 1]:
    path.write_bytes(content[:length])
    assert _read_or_refused(path, sample_arrays)


def test_file_with_a_flipped_bit_is_refused_or_reads_equal(
  sample_arrays, tmp_path
):
  content = SAMPLE.read_bytes()
  path = tmp_path / 'flipped.pt'
  rng = np.random.default_rng(0)
  refused = 0
  for place in rng.choice(len(content), 1500, replace=False).tolist():
    broken = bytearray(content)
    broken[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(broken)
    refused += _read_or_refused(path, sample_arrays)
  # The rest are padding, dates and the second copies in local headers.
  assert refused > 600


def _try(tmp_path_factory, program: bytes) -> None:
  path = torch_archive.write_members(
    tmp_path_factory.getbasetemp() / 'fuzzed.pt', program, {'data/0': FLOATS}
  )
  start = time.process_time()
  with contextlib.suppress(checkpoint.CheckpointError):
    read_all(path)
  assert time.process_time() - start < 2


OPCODES = sorted(opcode.code.encode('latin1') for opcode in pickletools.opcodes)


@hypothesis.settings(max_examples=300)
@hypothesis.given(
  st.lists(
    st.one_of(
      st.sampled_from(OPCODES),
      st.binary(max_size=9),
      st.sampled_from(
        [
          tensor(storage()),
          storage(),
          call('torch.Size', value((1, 2))).replace(
            b'torch.Size', b'torch\nSize'
          ),
          call('collections OrderedDict'),
          value({'a': [1]}),
        ]
      ),
    ),
    max_size=40,
  ).map(b''.join)
)
def test_random_program_is_read_or_refused(tmp_path_factory, program):
  _try(tmp_path_factory, b'\x80\x02' + program + b'.')


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.data())
def test_altered_program_is_read_or_refused(tmp_path_factory, data):
  with zipfile.ZipFile(SAMPLE) as archive:
    program = archive.read('views_and_dtypes/data.pkl')
  changes = data.draw(
    st.lists(
      st.tuples(
        st.integers(0, len(program) - 1),
        st.integers(0, 4),
        st.one_of(st.binary(max_size=4), st.sampled_from(OPCODES)),
      ),
      min_size=1,
      max_size=4,
    )
  )
  for place, removed, added in changes:
    program = program[:place] + added + program[place + removed :]
  _try(tmp_path_factory, program)
