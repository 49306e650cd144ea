"""Parameters with their configuration and origin in one file.

  checkpoint.save('ipa.safetensors', params, config, provenance={'seed': '0'})
  restored = checkpoint.load('ipa.safetensors')
  apply(restored.params, ...)

Two containers with the same content, told apart by their first bytes:

  safetensors: tensors `module//name`; everything else as JSON in the metadata.
    Needs the package safetensors (extra `io`). Every dtype is kept.
  npz: arrays `module//name`, and `__metadata__`, a unicode array with JSON.
    NumPy alone reads it; bfloat16 is refused, as NumPy has no such type.

Nothing is ever unpickled. A file is written under another name and renamed, so
a crash leaves the old file or the new one. A digest of the whole content makes
a damaged file an error.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import secrets
import types
import zipfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import haiku as hk
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import base_config, files

FORMAT = 'structattn_jax parameters'
VERSION = 1
SUFFIXES = ('.safetensors', '.npz')

Path = files.Path

METADATA = '__metadata__'
_SAFETENSORS_KEY = 'structattn_jax'
_KEYS = frozenset(
  ('format', 'version', 'config_class', 'config', 'provenance', 'digest')
)
# Names of safetensors' dtypes; the package's own NumPy reader has no BF16.
_SAFETENSORS_DTYPES: dict[str, np.dtype] = {
  'BOOL': np.dtype(bool),
  'U8': np.dtype('<u1'),
  'I8': np.dtype('<i1'),
  'I16': np.dtype('<i2'),
  'I32': np.dtype('<i4'),
  'I64': np.dtype('<i8'),
  'F16': np.dtype('<f2'),
  'BF16': np.dtype(jnp.bfloat16),
  'F32': np.dtype('<f4'),
  'F64': np.dtype('<f8'),
}
# More than any real file has: each of them takes time.
_MAX_MEMBERS = 2**15
_MAX_HEADER = 2**24


class CheckpointError(files.FileError):
  """A checkpoint is missing, damaged, foreign, or not what is expected."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What a file holds.

  Attributes:
    params: Haiku parameters as NumPy arrays, {module: {name: array}}.
    config: the configuration of the module that they belong to.
    provenance: where they came from, text by name.
  """

  params: hk.Params
  config: base_config.BaseConfig
  provenance: Mapping[str, str]


def save(
  path: Path,
  params: Mapping[str, Mapping[str, Any]],
  config: base_config.BaseConfig,
  *,
  provenance: Mapping[str, str] | None = None,
) -> None:
  """Writes parameters, configuration and provenance atomically.

  Args:
    path: file to write, ending in `.safetensors` or `.npz`; an old file is
      replaced.
    params: Haiku parameters, {module: {name: array}}.
    config: configuration of the module.
    provenance: anything that says where the parameters came from.

  Raises:
    ValueError: on another suffix, a dtype that the container cannot hold, or
      names that cannot be told apart.
    ImportError: if safetensors is asked for and not installed.
  """
  path = check_suffix(path)
  arrays = _flatten(params)
  metadata = {
    'format': FORMAT,
    'version': str(VERSION),
    'config_class': type(config).__name__,
    'config': json.dumps(config.to_dict(), sort_keys=True),
    'provenance': json.dumps(_text(provenance or {}), sort_keys=True),
  }
  metadata['digest'] = _digest(arrays, metadata)
  if path.suffix == '.npz':
    content = _npz_bytes(arrays, metadata)
  else:
    # One entry: with several, safetensors writes them in random order.
    entry = {_SAFETENSORS_KEY: json.dumps(metadata)}
    content = _safetensors().save(arrays, metadata=entry)
  write_atomically(path, content)


def check_suffix(path: Path) -> pathlib.Path:
  """Returns the path; raises ValueError unless its suffix is one of ours."""
  path = pathlib.Path(path)
  if path.suffix not in SUFFIXES:
    raise ValueError(
      f'{path}: the suffix says how to write: expected '
      f'{" or ".join(SUFFIXES)}, got {path.suffix!r}'
    )
  return path


@files.guarded(CheckpointError)
def load(
  path: Path,
  config_class: type[base_config.BaseConfig] | None = None,
  *,
  allow_nan: bool = False,
) -> Checkpoint:
  """Reads a file that `save` wrote, whatever its suffix.

  Args:
    path: file to read.
    config_class: class of the configuration; None finds the class by its name
      among those that are defined. Given, the file must agree.
    allow_nan: whether parameters may be infinite or no numbers.

  Returns:
    The content, with every dtype as saved.

  Raises:
    CheckpointError: if the file is missing, damaged, of another origin, of a
      later version, if its configuration is not valid any more, or if
      parameters are not finite.
    ImportError: if it is a safetensors file and the package is not installed.
  """
  path = pathlib.Path(path)
  if is_zip(path):
    arrays = read_npz(path)
    stored = arrays.pop(METADATA, None)
    is_text = stored is not None and stored.dtype.kind == 'U'
    text = stored.item() if is_text and not stored.shape else None
  else:
    arrays, text = read_safetensors(path)
  if text is None:
    raise CheckpointError(
      f'{path}: not written by structattn_jax; use `structattn convert` for '
      'published checkpoints'
    )
  metadata = _json_object(path, 'the metadata', text)
  if metadata.get('format') != FORMAT:
    raise CheckpointError(
      f'{path}: not written by structattn_jax (format: '
      f'{metadata.get("format")!r})'
    )
  if metadata.get('version') != str(VERSION):
    raise CheckpointError(
      f'{path}: version {metadata.get("version")!r} of the format; this '
      f'release reads version {VERSION}'
    )
  if metadata.keys() != _KEYS:
    wrong = ', '.join(sorted(metadata.keys() ^ _KEYS))
    raise CheckpointError(f'{path}: missing or unknown metadata: {wrong}')
  digest = metadata.pop('digest')
  if digest != _digest(arrays, metadata):
    raise CheckpointError(f'{path}: damaged: the content has another digest')
  found = _config_class(path, metadata['config_class'], config_class)
  values = _json_object(path, 'the configuration', metadata['config'])
  try:
    config = found.from_dict(values)
  except (TypeError, ValueError) as error:
    raise CheckpointError(f'{path}: {error}') from None
  provenance = _json_object(path, 'the provenance', metadata['provenance'])
  if not all(isinstance(text, str) for text in provenance.values()):
    raise CheckpointError(f'{path}: the provenance is not text by name')
  if not allow_nan:
    check_finite(path, arrays)
  return Checkpoint(
    _unflatten(arrays), config, types.MappingProxyType(provenance)
  )


def check_finite(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Raises a CheckpointError naming the arrays with a NaN or an infinity."""
  bad = [
    name
    for name, array in arrays.items()
    if jnp.issubdtype(array.dtype, jnp.inexact) and not np.isfinite(array).all()
  ]
  if bad:
    raise CheckpointError(
      f'{path}: not finite numbers (NaN or infinite) in {files.listed(bad)}; '
      '`allow_nan` takes them as they are'
    )


def is_zip(path: Path) -> bool:
  """Whether a file starts as zip archives do, as npz files are.

  Raises:
    CheckpointError: if the file cannot be read.
  """
  return first_bytes(path, 4) in (b'PK\x03\x04', b'PK\x05\x06')


def first_bytes(path: Path, count: int) -> bytes:
  """The first `count` bytes of a file, fewer if it is shorter.

  Raises:
    CheckpointError: if the file cannot be read.
  """
  with (
    files.guard(path, CheckpointError, 'cannot be read'),
    open(path, 'rb') as file,
  ):
    return file.read(count)


@files.guarded(CheckpointError, 'damaged or not an npz file')
def npz_names(path: Path) -> list[str]:
  """Names of the arrays of an npz file, in file order.

  Raises:
    CheckpointError: if the file cannot be read or is not an npz file.
  """
  if not is_zip(path):
    raise CheckpointError(f'{path}: not an npz file')
  with zipfile.ZipFile(path) as archive:
    names = archive.namelist()
  if any(name.endswith('/data.pkl') for name in names):
    raise CheckpointError(f'{path}: a PyTorch checkpoint, not an npz file')
  foreign = [name for name in names if not name.endswith('.npy')]
  if foreign:
    raise CheckpointError(
      f'{path}: not an npz file: it holds {foreign[0]!r}, which is not an array'
    )
  counted = collections.Counter(names)
  twice = sorted(name for name, count in counted.items() if count > 1)
  if twice:
    raise CheckpointError(
      f'{path}: entries that occur twice: {files.listed(twice)}'
    )
  if len(names) > _MAX_MEMBERS:
    raise CheckpointError(
      f'{path}: {len(names):,} arrays, which is more than {_MAX_MEMBERS:,}'
    )
  return [name.removesuffix('.npy') for name in names]


@files.guarded(CheckpointError, 'damaged or not an npz file')
def read_npz(
  path: Path, names: Collection[str] | None = None
) -> dict[str, np.ndarray]:
  """Reads arrays of an npz file without unpickling anything.

  Unlike `numpy.load` this reads members to their end, so that the checksum of
  each is always compared. Sizes are compared before anything is inflated.

  Args:
    path: file to read.
    names: arrays to read; None reads all.

  Returns:
    {name: array}, in file order.

  Raises:
    CheckpointError: if the file cannot be read, is damaged, would inflate out
      of all proportion, or if an array holds Python objects.
  """
  wanted = npz_names(path)
  if names is not None:
    wanted = [name for name in wanted if name in names]
  with zipfile.ZipFile(path) as archive:
    members = {name: archive.getinfo(f'{name}.npy') for name in wanted}
    inflated = sum(member.file_size for member in members.values())
    size = os.path.getsize(path)
    files.check_unfolded(path, size, inflated, CheckpointError)
    return {
      name: _read_array(path, archive, member)
      for name, member in members.items()
    }


def write_atomically(path: Path, content: bytes) -> None:
  """Writes a file under another name in the same folder and renames it."""
  write_all_atomically({pathlib.Path(path): content})


def write_all_atomically(files: Mapping[pathlib.Path, bytes]) -> None:
  """Writes files under other names, and renames them when all are written."""
  with contextlib.ExitStack() as stack:
    written = []
    for path, content in files.items():
      temporary = _temporary(path)
      stack.callback(temporary.unlink, missing_ok=True)
      with open(temporary, 'xb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
      written.append((temporary, path))
    for temporary, path in written:
      os.replace(temporary, path)


def _temporary(path: pathlib.Path) -> pathlib.Path:
  """Another name in the same folder, where `path` can be written."""
  if not path.parent.is_dir():
    raise FileNotFoundError(f'{path}: there is no folder {path.parent}')
  if path.is_dir():
    raise IsADirectoryError(f'{path}: is a folder; give the name of a file')
  return path.with_name(f'.{path.name}.{secrets.token_hex(4)}.tmp')


def _read_array(
  path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> np.ndarray:
  name = member.filename.removesuffix('.npy')
  if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    raise CheckpointError(f'{path}: {name} is compressed as NumPy never does')
  with archive.open(member) as stream:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
      shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
      shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    if dtype.hasobject:
      raise CheckpointError(
        f'{path}: {name} holds pickled Python objects, which can run code; '
        'they are never read'
      )
    size = stream.tell() + math.prod(shape) * dtype.itemsize
    if size != member.file_size or not dtype.itemsize:
      raise CheckpointError(
        f'{path}: damaged: {name} has {member.file_size:,} bytes, but '
        f'{dtype} {files.shown(shape)} needs {size:,}'
      )
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)


def _flatten(params: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
  """{'module//name': array}, sorted, contiguous and little-endian."""
  arrays = {}
  for module in sorted(params):
    values = params[module]
    if not isinstance(values, Mapping) or not values:
      raise ValueError(
        f'params[{module!r}]: expected {{name: array}} with at least one '
        f'array, got {files.shown(values)}'
      )
    if '//' in f'{module}/':
      raise ValueError(f"params: module {module!r} contains '//' or ends in /")
    for name in sorted(values):
      if '/' in name or not name:
        raise ValueError(f'params[{module!r}]: {name!r} cannot be a name')
      array = np.asarray(values[name])
      if array.dtype.newbyteorder('<') not in _SAFETENSORS_DTYPES.values():
        raise ValueError(
          f'params[{module!r}][{name!r}]: dtype {array.dtype} cannot be stored'
        )
      # Keeps scalars, which `ascontiguousarray` does not.
      arrays[f'{module}//{name}'] = np.asarray(
        array, array.dtype.newbyteorder('<'), order='C'
      )
  return arrays


def _unflatten(arrays: Mapping[str, np.ndarray]) -> hk.Params:
  params: dict[str, Any] = {}
  for key, array in arrays.items():
    module, _, name = key.rpartition('//')
    params.setdefault(module, {})[name] = array
  return params


def _digest(
  arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> str:
  """SHA-256 of all names, types, shapes, values and metadata."""
  digest = hashlib.sha256()
  for key in sorted(metadata):
    digest.update(json.dumps([key, metadata[key]]).encode())
  for key in sorted(arrays):
    array = arrays[key]
    header = [key, array.dtype.name, list(array.shape)]
    digest.update(json.dumps(header).encode())
    digest.update(array.tobytes())
  return digest.hexdigest()


def _npz_bytes(
  arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> bytes:
  for key, array in arrays.items():
    if array.dtype == jnp.bfloat16:
      raise ValueError(
        f'{key}: npz files cannot hold bfloat16; write a .safetensors file or '
        'convert to float32, which keeps every value'
      )
  buffer = io.BytesIO()
  stored = {METADATA: np.array(json.dumps(dict(metadata))), **arrays}
  with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_STORED) as archive:
    for key, array in stored.items():
      # A fixed date: equal content gives equal bytes.
      member = zipfile.ZipInfo(f'{key}.npy', (1980, 1, 1, 0, 0, 0))
      with archive.open(member, 'w', force_zip64=True) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)
  return buffer.getvalue()


@files.guarded(CheckpointError, 'damaged or not a safetensors file')
def read_safetensors(
  path: Path,
) -> tuple[dict[str, np.ndarray], str | None]:
  """Reads a safetensors file.

  Args:
    path: file to read.

  Returns:
    {name: array}, sorted by name, and our metadata if `save` wrote the file.

  Raises:
    CheckpointError: if the file cannot be read or is damaged.
    ImportError: if the package safetensors is not installed.
  """
  start = first_bytes(path, 9)
  if len(start) < 9 or start[8:] != b'{':
    raise CheckpointError(
      f'{path}: neither a safetensors nor an npz file; use `structattn '
      'convert` for published checkpoints'
    )
  _safetensors()
  import safetensors

  size = int.from_bytes(start[:8], 'little')
  if size > _MAX_HEADER:
    raise CheckpointError(f'{path}: damaged: a header of {size:,} bytes')
  content = pathlib.Path(path).read_bytes()
  tensors = dict(safetensors.deserialize(content))
  metadata = json.loads(content[8 : 8 + size]).get(METADATA) or {}
  arrays = {}
  for key in sorted(tensors):
    entry = tensors[key]
    dtype = _SAFETENSORS_DTYPES.get(entry['dtype'])
    if dtype is None:
      raise CheckpointError(f'{path}: {key} has dtype {entry["dtype"]}')
    # A copy, since arrays on the bytes of a file could not be written to.
    array = np.frombuffer(entry['data'], dtype).reshape(entry['shape'])
    arrays[key] = array.copy()
  return arrays, metadata.get(_SAFETENSORS_KEY)


def _safetensors() -> types.ModuleType:
  try:
    import safetensors.numpy as package
  except ImportError:
    raise ImportError(
      'safetensors files need the package safetensors: '
      "pip install 'structattn-jax[io]'; or use an .npz file"
    ) from None
  return package


def _text(provenance: Mapping[str, Any]) -> dict[str, str]:
  for key, value in provenance.items():
    if not isinstance(key, str) or not isinstance(value, str):
      raise ValueError(f'provenance[{key!r}]: expected text, got {value!r}')
  return dict(provenance)


def _json_object(path: Path, what: str, text: Any) -> dict[str, Any]:
  with files.guard(path, CheckpointError, f'{what} is not JSON'):
    values = json.loads(text)
  if not isinstance(values, dict):
    raise CheckpointError(f'{path}: {what} is not a JSON object')
  return values


def _config_class(
  path: Path, name: str, given: type[base_config.BaseConfig] | None
) -> type[base_config.BaseConfig]:
  """The class called `name`; a file can never cause an import."""
  if given is not None:
    if given.__name__ != name:
      raise CheckpointError(
        f'{path}: holds a {name}, expected a {given.__name__}'
      )
    return given
  found = {c for c in _subclasses(base_config.BaseConfig) if c.__name__ == name}
  if len(found) != 1:
    raise CheckpointError(
      f'{path}: {len(found)} configuration classes are called {name!r}; import '
      'its module, or give `config_class`'
    )
  return found.pop()


def _subclasses(
  parent: type[base_config.BaseConfig],
) -> Iterator[type[base_config.BaseConfig]]:
  for child in parent.__subclasses__():
    yield child
    yield from _subclasses(child)
