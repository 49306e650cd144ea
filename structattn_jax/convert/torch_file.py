"""PyTorch's zip checkpoints without PyTorch, and without executing anything.

  content = torch_file.load('boltz1_conf.ckpt')
  content['state_dict']['rel_pos.linear_layer.weight'].array()

`torch.save` writes a zip archive with a pickle, `<folder>/data.pkl`, and the
bytes of each storage, `<folder>/data/<key>`. A pickle is a program. Here it is
run by an interpreter that can only build containers, numbers, text, tensors and
records: whatever else it names becomes an inert `Global` or `Record`, and
nothing is ever imported or called. It stops a program that works more than
descriptions of tensors need.

A tensor is a description until its `array()` is asked for, which is then a view
of the memory-mapped file: nothing is read that is not used. The checksum of a
storage is compared when it is first used, that of the pickle always.
"""

import collections
import dataclasses
import itertools
import math
import mmap
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterable
from typing import Any, Never

import jax.numpy as jnp
import numpy as np

from structattn_jax import checkpoint
from structattn_jax.checkpoint import CheckpointError
from structattn_jax.common import files

# Little-endian; files from big-endian machines are swapped.
_DTYPES: dict[str, np.dtype] = {
  'torch.bool': np.dtype(bool),
  'torch.uint8': np.dtype(np.uint8),
  'torch.uint16': np.dtype(np.uint16),
  'torch.uint32': np.dtype(np.uint32),
  'torch.uint64': np.dtype(np.uint64),
  'torch.int8': np.dtype(np.int8),
  'torch.int16': np.dtype(np.int16),
  'torch.int32': np.dtype(np.int32),
  'torch.int64': np.dtype(np.int64),
  'torch.float16': np.dtype(np.float16),
  'torch.bfloat16': np.dtype(jnp.bfloat16),
  'torch.float32': np.dtype(np.float32),
  'torch.float64': np.dtype(np.float64),
  'torch.complex64': np.dtype(np.complex64),
  'torch.complex128': np.dtype(np.complex128),
  'torch.float8_e4m3fn': np.dtype(jnp.float8_e4m3fn),
  'torch.float8_e5m2': np.dtype(jnp.float8_e5m2),
}
_STORAGES = {
  'torch.BoolStorage': 'torch.bool',
  'torch.ByteStorage': 'torch.uint8',
  'torch.CharStorage': 'torch.int8',
  'torch.ShortStorage': 'torch.int16',
  'torch.IntStorage': 'torch.int32',
  'torch.LongStorage': 'torch.int64',
  'torch.HalfStorage': 'torch.float16',
  'torch.BFloat16Storage': 'torch.bfloat16',
  'torch.FloatStorage': 'torch.float32',
  'torch.DoubleStorage': 'torch.float64',
  'torch.ComplexFloatStorage': 'torch.complex64',
  'torch.ComplexDoubleStorage': 'torch.complex128',
  # Bytes; the dtype is that of the tensor.
  'torch.UntypedStorage': 'torch.uint8',
  'torch.storage.UntypedStorage': 'torch.uint8',
}
# Released checkpoints have some megabytes. Objects are up to a hundred times
# larger than their opcodes, so these bound time and memory: bytes, opcodes, and
# elements that opcodes copy, join or look at without being as long themselves.
_MAX_PICKLE = 64 * 2**20
_MAX_OPCODES = 2**22
_MAX_WORK = 2**22
_CHARACTERS = 16  # Are one element.
_MAX_SIZE = 2**63
_MAX_KEY = 2**60
_MAX_DIMS = 64  # NumPy's.

_LOCAL_HEADER = struct.Struct('<4s22xHH')
_SCALARS = (str, bytes, int, float, bool, type(None))


@dataclasses.dataclass(frozen=True)
class Global:
  """A class or function that a file names; it is never imported.

  Attributes:
    name: 'module.name'.
  """

  name: str


@dataclasses.dataclass(eq=False)
class Record:
  """An object of a class that is not known: what it was made from.

  Attributes:
    name: 'module.name' of its class, or of the function that made it.
    args: positional arguments of the constructor.
    state: what `__setstate__` would get, mostly a dictionary of attributes.
    items: keys and values, of subclasses of dictionaries.
    elements: elements, of subclasses of lists and sets.
  """

  name: str
  # Not in `repr`: a small file can describe objects of exponential length.
  args: tuple[Any, ...] = dataclasses.field(default=(), repr=False)
  state: Any = dataclasses.field(default=None, repr=False)
  items: list[tuple[Any, Any]] = dataclasses.field(
    default_factory=list, repr=False
  )
  elements: list[Any] = dataclasses.field(default_factory=list, repr=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
  """A tensor in a file.

  Attributes:
    shape: lengths of its axes.
    dtype: NumPy's; bfloat16 and float8 are those of `ml_dtypes`.
    stride: steps along the axes, in elements of the storage.
    offset: first element in the storage.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  stride: tuple[int, ...]
  offset: int
  _storage: 'Storage' = dataclasses.field(repr=False)

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.shape)

  @property
  def is_expanded(self) -> bool:
    """Whether there are more elements than the storage has."""
    return self.size * self.dtype.itemsize > self._storage.nbytes

  @property
  def storage(self) -> str:
    """Name of the storage; tensors with the same one share their memory."""
    return self._storage.key

  def array(self) -> np.ndarray:
    """The values, read-only: a view of the mapped file.

    Raises:
      CheckpointError: if the storage is damaged, or if the tensor has more
        elements than an array can hold.
    """
    step = self.dtype.itemsize
    try:
      # Checks by itself that no element lies outside of the buffer.
      return np.ndarray(
        self.shape,
        self.dtype,
        self._storage.buffer(self.dtype),
        self.offset * step,
        [length * step for length in self.stride],
      )
    except (ValueError, TypeError, OverflowError) as error:
      self.fail(str(error))

  def fail(self, message: str) -> Never:
    """Raises a CheckpointError that names file and storage."""
    self._storage.archive.fail(f'storage {self.storage}: {message}')


@files.guarded(CheckpointError, 'damaged or not a PyTorch file')
def load(path: checkpoint.Path) -> Any:
  """Reads a file that `torch.save` wrote.

  Args:
    path: file in PyTorch's zip format (PyTorch 1.6 and later).

  Returns:
    What was saved: dictionaries (also for ordered ones), lists, tuples, sets,
    numbers, text, bytes and None as such; tensors as `Tensor`, bare storages as
    `Storage`; classes and functions as `Global`; every other object as
    `Record`.

  Raises:
    CheckpointError: if the file is missing, damaged, of another format, or
      asks for anything that such a file has no reason to ask for.
  """
  start = checkpoint.first_bytes(path, 16)
  if not checkpoint.is_zip(path):
    if is_legacy(start):
      raise CheckpointError(
        f'{path}: written in the format of PyTorch before 1.6, which is not '
        'read; save it again with a later PyTorch'
      )
    raise CheckpointError(f'{path}: not a PyTorch file: not a zip archive')
  archive = _Archive(path)
  return _Interpreter(archive).run(archive.pickle())


@files.guarded(CheckpointError, 'damaged zip archive')
def is_torch_file(path: checkpoint.Path) -> bool:
  """Whether a zip archive has the pickle that `torch.save` writes.

  Raises:
    CheckpointError: if the file cannot be read.
  """
  if not checkpoint.is_zip(path):
    return False
  with zipfile.ZipFile(path) as archive:
    return any(name.endswith('/data.pkl') for name in archive.namelist())


def is_legacy(start: bytes) -> bool:
  """Whether these are the first bytes of PyTorch's format before 1.6."""
  magic = 0x1950A86A20F9469CFC6C.to_bytes(10, 'little')
  return start[:1] == b'\x80' and start[2:14] == b'\x8a\x0a' + magic


@dataclasses.dataclass(frozen=True)
class _Member:
  """A stored member of the archive: where its bytes are."""

  start: int
  size: int
  crc: int


class _Archive:
  """The mapped file and the places of its members."""

  def __init__(self, path: checkpoint.Path):
    self.path = path
    with open(path, 'rb') as file, zipfile.ZipFile(file) as archive:
      infos = archive.infolist()
      end = archive.start_dir
      self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    counted = collections.Counter(info.filename for info in infos)
    name, count = max(counted.items(), key=lambda item: item[1])
    if count > 1:
      self.fail(f'{name!r} occurs twice')
    pickles = [name for name in counted if name.endswith('/data.pkl')]
    if len(pickles) != 1:
      self.fail(f'expected one data.pkl, got {len(pickles)}')
    self.folder = pickles[0].removesuffix('data.pkl')
    if f'{self.folder}constants.pkl' in counted:
      self.fail(
        'a TorchScript archive, which holds a program; save the state '
        'dict instead'
      )
    self._members = {}
    # Backwards: a member must end where the next one begins, or before.
    for info in sorted(infos, key=lambda info: -info.header_offset):
      member = self._member(info, end)
      end = info.header_offset
      if info.filename.startswith(self.folder):
        local = info.filename.removeprefix(self.folder)
        self._members[local] = member
    self._checked: set[str] = set()
    # PyTorch can be told to write none.
    self._has_checksums = self._members['data.pkl'].crc != 0
    order = (
      self.read('byteorder') if 'byteorder' in self._members else b'little'
    )
    if order not in (b'little', b'big'):
      self.fail(f'unknown byte order {order[:20]!r}')
    self.is_big = order == b'big'

  def _member(self, info: zipfile.ZipInfo, end: int) -> _Member:
    """Finds the bytes of a member that may use the file up to `end`."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
      self.fail(
        f'{info.filename!r} is compressed or encrypted; PyTorch stores plainly'
      )
    begin = info.header_offset
    if begin < 0 or begin + _LOCAL_HEADER.size > end:
      self.fail(f'{info.filename!r} lies outside or overlaps another')
    signature, name, extra = _LOCAL_HEADER.unpack_from(self.map, begin)
    start = begin + _LOCAL_HEADER.size + name + extra
    if signature != b'PK\x03\x04':
      self.fail(f'{info.filename!r} has no header')
    if info.file_size != info.compress_size or start + info.file_size > end:
      self.fail(f'{info.filename!r} lies outside or overlaps another')
    return _Member(start, info.file_size, info.CRC)

  def size(self, name: str) -> int | None:
    """Bytes of a member; None if there is none."""
    member = self._members.get(name)
    return None if member is None else member.size

  def view(self, name: str) -> memoryview:
    """Bytes of a member, mapped; its checksum is compared once."""
    member = self._members[name]
    content = memoryview(self.map)[member.start : member.start + member.size]
    if name not in self._checked:
      if self._has_checksums and zlib.crc32(content) != member.crc:
        self.fail(f'{self.folder}{name} has another checksum')
      self._checked.add(name)
    return content

  def read(self, name: str) -> bytes:
    """Bytes of a small member."""
    if self._members[name].size > _MAX_PICKLE:
      self.fail(f'{name} is larger than {_MAX_PICKLE} bytes')
    return bytes(self.view(name))

  def pickle(self) -> bytes:
    """The program that describes the content."""
    return self.read('data.pkl')

  def fail(self, message: str) -> Never:
    raise CheckpointError(f'{self.path}: damaged or unsafe: {message}')


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
  """Memory that tensors view.

  Attributes:
    archive: the file.
    key: name in the file.
    dtype: of its elements; bytes if it has none.
    nbytes: its size.
  """

  archive: '_Archive' = dataclasses.field(repr=False)
  key: str
  dtype: np.dtype
  nbytes: int

  def buffer(self, dtype: np.dtype) -> memoryview:
    """The bytes of little-endian elements."""
    content = self.archive.view(f'data/{self.key}')
    if self.archive.is_big:
      number = dtype.itemsize // (2 if dtype.kind == 'c' else 1)
      swapped = np.frombuffer(content, np.uint8).reshape(-1, number)[:, ::-1]
      content = memoryview(swapped.tobytes())
    return content


class _Interpreter:
  """The part of the pickle language that data needs.

  Opcodes of protocols 2 to 5, without the registry of extensions and without
  out-of-band buffers. Names are never looked up: a GLOBAL is a text.
  """

  def __init__(self, archive: _Archive):
    self._archive = archive
    self._fail = archive.fail
    self._stack: list[Any] = []
    self._outer: list[list[Any]] = []  # Stacks below the marks.
    self._memo: dict[int, Any] = {}
    self._work = 0

  def run(self, program: bytes) -> Any:
    """Returns the object that a pickle describes."""
    opcodes = pickletools.genops(program)
    for opcode, argument, _ in itertools.islice(opcodes, _MAX_OPCODES):
      if opcode.name == 'STOP':
        if self._outer or len(self._stack) != 1:
          self._fail('the pickle ends with a stack of the wrong depth')
        return self._stack.pop()
      self._step(opcode.name, argument)
    self._fail(f'the pickle does not end within {_MAX_OPCODES:,} steps')

  def _step(self, name: str, argument: Any) -> None:
    stack = self._stack
    match name:
      case 'LONG_BINPUT' | 'BINPUT':
        self._memo[argument] = stack[-1]
      case 'MEMOIZE':
        self._memo[len(self._memo)] = stack[-1]
      case 'LONG_BINGET' | 'BINGET':
        stack.append(self._memo[argument])
      case (
        'BININT'
        | 'BININT1'
        | 'BININT2'
        | 'LONG1'
        | 'LONG4'
        | 'BINFLOAT'
        | 'BINUNICODE'
        | 'SHORT_BINUNICODE'
        | 'BINUNICODE8'
        | 'BINBYTES'
        | 'SHORT_BINBYTES'
        | 'BINBYTES8'
        | 'BYTEARRAY8'
      ):
        stack.append(argument)
      case 'NONE' | 'NEWTRUE' | 'NEWFALSE':
        stack.append({'NONE': None, 'NEWTRUE': True}.get(name, False))
      case 'EMPTY_TUPLE' | 'EMPTY_LIST' | 'EMPTY_DICT' | 'EMPTY_SET':
        kinds = {'EMPTY_TUPLE': tuple, 'EMPTY_LIST': list, 'EMPTY_DICT': dict}
        stack.append(kinds.get(name, set)())
      case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
        stack.append(tuple(self._pop(int(name[-1]))))
      case 'MARK':
        self._outer.append(stack)
        self._stack = []
      case 'TUPLE':
        values = self._above_mark()
        self._stack.append(tuple(values))
      case 'FROZENSET':
        values = self._above_mark()
        self._stack.append(frozenset(map(self._key, values)))
      case 'APPEND' | 'APPENDS' | 'ADDITEMS':
        values = self._pop(1) if name == 'APPEND' else self._above_mark()
        self._extend(self._stack[-1], values)
      case 'SETITEM' | 'SETITEMS':
        values = self._pop(2) if name == 'SETITEM' else self._above_mark()
        self._update(self._stack[-1], values)
      case 'GLOBAL':
        stack.append(Global(argument.replace(' ', '.')))
      case 'STACK_GLOBAL':
        module, attribute = self._pop(2)
        if not isinstance(module, str) or not isinstance(attribute, str):
          self._fail('a global is not named by text')
        self._spend((len(module) + len(attribute)) // _CHARACTERS)
        stack.append(Global(f'{module}.{attribute}'))
      case 'REDUCE' | 'NEWOBJ':
        stack.append(self._make(*self._pop(2)))
      case 'NEWOBJ_EX':
        function, args, _ = self._pop(3)
        stack.append(self._make(function, args))
      case 'BUILD':
        (state,) = self._pop(1)
        self._build(stack[-1], state)
      case 'BINPERSID':
        stack.append(self._persistent(*self._pop(1)))
      case 'POP':
        self._pop(1)
      case 'POP_MARK':
        self._above_mark()
      case 'PROTO' | 'FRAME':
        pass
      case _:
        self._fail(f'the pickle uses {name}, which data do not need')

  def _pop(self, count: int) -> list[Any]:
    if len(self._stack) < count:
      self._fail('the pickle takes more values than there are')
    values = self._stack[-count:]
    del self._stack[-count:]
    return values

  def _above_mark(self) -> list[Any]:
    values, self._stack = self._stack, self._outer.pop()
    return values

  def _spend(self, count: int) -> None:
    """Counts work that is not in proportion to the opcodes."""
    self._work += count
    if self._work > _MAX_WORK:
      self._fail('the pickle builds more than it has reason to')

  def _key(self, value: Any) -> Any:
    """A value that can be hashed in little time; nested tuples cannot."""
    values = value if type(value) is tuple else (value,)
    self._spend(len(values))
    if not all(type(v) in (*_SCALARS, Global, Record, Tensor) for v in values):
      self._fail(f'a key of a dictionary is a {type(value).__name__}')
    # Larger numbers can be chosen so that all have the same hash.
    if not all(-_MAX_KEY < v < _MAX_KEY for v in values if type(v) is int):
      self._fail('a key of a dictionary is a very large number')
    return value

  def _extend(self, target: Any, values: Iterable[Any]) -> None:
    if type(target) is list:
      target.extend(values)
    elif type(target) is set:
      target.update(map(self._key, values))
    elif type(target) is Record:
      target.elements.extend(values)
    else:
      self._fail(f'the pickle appends to a {type(target).__name__}')

  def _update(self, target: Any, values: list[Any]) -> None:
    items = list(zip(values[::2], values[1::2], strict=True))
    if type(target) is dict:
      target.update((self._key(key), value) for key, value in items)
    elif type(target) is Record:
      target.items.extend(items)
    else:
      self._fail(f'the pickle sets items of a {type(target).__name__}')

  def _build(self, target: Any, state: Any) -> None:
    if type(target) is Record:
      target.state = state
    # State dicts carry versions of modules as an attribute.
    elif type(target) is not dict:
      self._fail(f'the pickle sets attributes of a {type(target).__name__}')

  def _make(self, function: Any, args: Any) -> Any:
    """What calling `function` would give, for the few that are known."""
    self._spend(4)
    if type(function) is not Global or type(args) is not tuple:
      self._fail('the pickle calls something that is not a function')
    match function.name:
      case 'torch._utils._rebuild_tensor_v2':
        # [6] holds unresolved conjugation or negation.
        if 6 <= len(args) <= 7 and _is_storage(args[0]) and not any(args[6:]):
          return self._tensor(*args[:4], args[0].dtype)
      case 'torch._utils._rebuild_tensor_v3':
        if 7 <= len(args) <= 8 and _is_storage(args[0]) and not any(args[7:]):
          dtype = _DTYPES.get(getattr(args[6], 'name', ''))
          if dtype is not None:
            return self._tensor(*args[:4], dtype)
      case (
        'torch._utils._rebuild_parameter'
        | 'torch._utils._rebuild_parameter_with_state'
      ):
        if args and type(args[0]) is Tensor:
          return args[0]
      # Of subclasses, and of tensors with attributes.
      case 'torch._tensor._rebuild_from_type_v2':
        if len(args) == 4:
          made = self._make(args[0], args[2])
          if type(made) is Tensor:
            return made
      # Protocol 2 has no opcodes for these.
      case '__builtin__.set' | '__builtin__.frozenset' | 'torch.Size':
        if len(args) == 1 and type(args[0]) in (list, tuple):
          self._spend(len(args[0]))
          if function.name == 'torch.Size':
            return tuple(args[0])
          made = set(map(self._key, args[0]))
          return made if function.name.endswith('.set') else frozenset(made)
      case '_codecs.encode':
        if len(args) == 2 and type(args[0]) is str and args[1] == 'latin1':
          self._spend(len(args[0]) // _CHARACTERS)
          return args[0].encode('latin1')
      case '__builtin__.complex' | 'builtins.complex':
        if len(args) == 2 and all(type(x) is float for x in args):
          return complex(*args)
      case 'collections.OrderedDict':
        if not args:
          return {}
    return Record(function.name, args)

  def _persistent(self, pid: Any) -> Any:
    """The storage that a persistent id stands for."""
    if type(pid) is not tuple or len(pid) != 5 or pid[0] != 'storage':
      self._fail('a persistent id does not name a storage')
    _, kind, key, _, count = pid
    if type(kind) is not Global or type(key) is not str or not _is_size(count):
      self._fail('a persistent id does not name a storage')
    self._spend(len(key) // _CHARACTERS)
    size = self._archive.size(f'data/{key}')
    if size is None:
      self._fail(f'there is no storage {key[:40]!r}')
    if kind.name not in _STORAGES:
      return Record(kind.name, (key,))
    dtype = _DTYPES[_STORAGES[kind.name]]
    if size != count * dtype.itemsize:
      self._fail(f'storage {key}: {size} bytes for {count} elements of {dtype}')
    return Storage(self._archive, key, dtype, size)

  def _tensor(
    self,
    storage: Storage,
    offset: Any,
    shape: Any,
    stride: Any,
    dtype: np.dtype,
  ) -> Tensor:
    lists = (shape, stride)
    if (
      not all(type(x) is tuple and len(x) <= _MAX_DIMS for x in lists)
      or not all(map(_is_size, (*shape, *stride, offset)))
      or len(shape) != len(stride)
    ):
      self._fail(f'storage {storage.key}: a tensor without a proper shape')
    length, rest = divmod(storage.nbytes, dtype.itemsize)
    last = offset - 1
    if 0 not in shape:
      last = offset + sum(
        (n - 1) * step for n, step in zip(shape, stride, strict=True)
      )
    if rest or last >= length:
      self._fail(
        f'storage {storage.key}: {length} elements, but a tensor reaches to '
        f'element {last}'
      )
    return Tensor(shape, dtype, stride, offset, storage)


def _is_storage(value: Any) -> bool:
  return type(value) is Storage


def _is_size(value: Any) -> bool:
  return type(value) is int and 0 <= value < _MAX_SIZE
