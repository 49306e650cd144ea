"""PyTorch's zip files from NumPy arrays, good and bad ones, without PyTorch."""

import io
import pathlib
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

STORAGES = {
  'float16': 'HalfStorage',
  'float32': 'FloatStorage',
  'float64': 'DoubleStorage',
  'int32': 'IntStorage',
  'int64': 'LongStorage',
  'uint8': 'ByteStorage',
}


def write(path: pathlib.Path, content: Any, **extra: bytes) -> pathlib.Path:
  """Writes what `torch.save(content)` would, arrays being tensors."""
  storages: dict[str, bytes] = {}
  program = io.BytesIO()
  _Pickler(program, storages).dump(content)
  members = {f'data/{key}': data for key, data in storages.items()}
  return write_members(path, program.getvalue(), {**members, **extra})


def write_members(
  path: pathlib.Path,
  program: bytes,
  members: Mapping[str, bytes],
  folder: str = 'archive',
) -> pathlib.Path:
  """Writes an archive with this pickle and further members."""
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr(f'{folder}/data.pkl', program)
    for name, data in members.items():
      archive.writestr(f'{folder}/{name}', data)
  return path


def value(content: Any) -> bytes:
  """Opcodes that push a plain value."""
  # Without memo numbers, which would clash with those of other parts.
  return pickletools.optimize(pickle.dumps(content, 2))[2:-1]


def call(function: str, *args: bytes) -> bytes:
  """Opcodes that call 'module name' with pushed arguments."""
  name = function.replace(' ', '\n').encode()
  return b'c' + name + b'\n(' + b''.join(args) + b'tR'


def storage(
  key: Any = '0', numel: Any = 6, kind: str = 'FloatStorage'
) -> bytes:
  """Opcodes that push a storage."""
  name = f'ctorch\n{kind}\n'.encode()
  parts = [value('storage'), name, value(key), value('cpu'), value(numel)]
  return b'(' + b''.join(parts) + b'tQ'


def tensor(
  memory: bytes,
  shape: Any = (2, 3),
  stride: Any = (3, 1),
  offset: Any = 0,
) -> bytes:
  """Opcodes that push a tensor of a storage."""
  return call(
    'torch._utils _rebuild_tensor_v2',
    memory,
    *map(value, (offset, shape, stride, False, {})),
  )


def program(*parts: bytes) -> bytes:
  """A pickle of protocol 2."""
  return b'\x80\x02' + b''.join(parts) + b'.'


class _Pickler(pickle._Pickler):  # The one in C cannot be told to do this.
  """Writes arrays as tensors and collects their bytes."""

  def __init__(self, file: io.BytesIO, storages: dict[str, bytes]):
    super().__init__(file, protocol=2)
    self._storages = storages
    self._keys: dict[int, str] = {}

  def save(self, obj: Any, save_persistent_id: bool = True) -> None:
    if not isinstance(obj, np.ndarray):
      super().save(obj, save_persistent_id)
      return
    # An array that occurs twice is one storage.
    key = self._keys.setdefault(id(obj), str(len(self._keys)))
    self._storages[key] = obj.tobytes()
    steps = np.array(np.empty(obj.shape, np.int8).strides).tolist()
    memory = storage(key, obj.size, STORAGES[obj.dtype.name])
    self.write(tensor(memory, obj.shape, tuple(steps)))
