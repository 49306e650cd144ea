"""Damaged files of every format: equal numbers, or an error that names them.

Each mutant has a number, which is its seed. Formats without checksums may give
other numbers. Archives and compressed files are damaged as they lie there, or
inside, with checksums that fit.
"""

import contextlib
import dataclasses
import gzip
import io
import pathlib
import random
import resource
import shutil
import signal
import warnings
import zipfile
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest

import structattn_jax as sa
from structattn_jax import checkpoint, convert, data, training, verification
from structattn_jax.common import files
from structattn_jax.convert import record_file

zstandard = pytest.importorskip('zstandard')
pytest.importorskip('safetensors')
pytest.importorskip('pyarrow')

GOLDENS = pathlib.Path(__file__).parent / 'goldens'
CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
AF3 = GOLDENS / 'af3_atom_cross_attention/checkpoint/plain/af3_tiny.bin'
SEDD = GOLDENS / 'sedd_protein_ligand/checkpoints'
STRUCTURES = pathlib.Path(__file__).parent / 'data/files'
LIGAND = data.example('1s3v').ligand

# A type error is that of a config, whose message names the file, too.
ERRORS = (files.FileError, data.StructureFileError, TypeError)
SECONDS, BYTES, CHARACTERS = 10, 2**31, 11_000
NUMBERS = [b'\0', b'\xff', b'\x7f\xff', b'\xff\xff\xff\x7f', b'\0' * 8]
WORDS = [b'[', b'{', b'"', b'\n', b'-1', b'nan', b'9' * 400, b'1e999', b'.a']


class TookTooLongError(BaseException):
  """No reader may catch it."""


class Format(NamedTuple):
  """How a good file is made and read; `make` returns the file to damage."""

  make: Callable[[pathlib.Path], pathlib.Path]
  read: Callable[[pathlib.Path], Any]
  has_checksum: bool = False


def copy_of(path: pathlib.Path) -> Callable[[pathlib.Path], pathlib.Path]:
  return lambda folder: pathlib.Path(shutil.copy(path, folder))


def compressed(path: pathlib.Path) -> Callable[[pathlib.Path], pathlib.Path]:
  def make(folder):
    target = folder / f'{path.name}.gz'
    target.write_bytes(gzip.compress(path.read_bytes()))
    return target

  return make


def with_ligand(path: pathlib.Path) -> Any:
  return data.load_structure(STRUCTURES / 'aladip.pdb', ligand=path)


def saved(suffix: str) -> Callable[[pathlib.Path], pathlib.Path]:
  def make(folder):
    params = {'a': {'w': np.arange(6, dtype='f4').reshape(2, 3)}}
    path = folder / f'own{suffix}'
    config = sa.seeds.TokenAttentionPoolConfig(num_head=2)
    checkpoint.save(path, params, config, provenance={'seed': '0'})
    return path

  return make


def records(name: str, num_shards: int = 1):
  def make(folder):
    found = list(record_file.read_records(AF3))
    path = folder / name
    return record_file.write_records(path, found, num_shards=num_shards)[-1]

  return make


def hugging_face(name: str) -> Callable[[pathlib.Path], pathlib.Path]:
  def make(folder):
    for file in (SEDD / 'hf_sedd').iterdir():
      shutil.copy(file, folder)
    return folder / name

  return make


def table(name: str) -> Callable[[pathlib.Path], pathlib.Path]:
  def make(folder):
    rows = [{'sequence': 'MKTAY', 'smiles': 'c1ccccc1O', 'name': 'a'}] * 3
    path = folder / name
    if path.suffix == '.parquet':
      import pyarrow
      import pyarrow.parquet

      pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
      mark = '\t' if path.suffix == '.tsv' else ','
      lines = [rows[0], *(row.values() for row in rows)]
      path.write_text('\n'.join(map(mark.join, lines)) + '\n')
    return path

  return make


def read_records(path: pathlib.Path) -> list[record_file.Record]:
  return list(record_file.read_records(path))


def golden(path: pathlib.Path) -> Any:
  return verification.Golden.read(path, 'case')


def settings(path: pathlib.Path) -> Any:
  return training.TrainConfig.from_toml(path)


def vocabulary(folder: pathlib.Path) -> pathlib.Path:
  path = folder / 'vocabulary.json'
  data.SmilesTokenizer.from_smiles(['CCO', 'c1ccccc1']).save(path)
  return path


FORMATS = {
  'own npz': Format(saved('.npz'), checkpoint.load, True),
  'own safetensors': Format(saved('.safetensors'), checkpoint.load, True),
  'af2 npz': Format(
    copy_of(GOLDENS / 'af2_ipa/params_sample_monomer.npz'),
    convert.load_structure_module,
    True,
  ),
  'golden npz': Format(
    copy_of(GOLDENS / 'af3_atom_cross_attention/seed_unsorted.npz'),
    golden,
    True,
  ),
  'af3 bin': Format(records('x.bin'), read_records),
  'af3 zstd': Format(records('x.bin.zst'), read_records, True),
  'af3 shards': Format(records('x.bin.zst', 3), read_records, True),
  'torch ckpt': Format(
    copy_of(GOLDENS / 'boltz_atom_encoder/boltz2_sample_omegaconf.ckpt'),
    lambda path: convert.load_boltz(path, 'rel_pos'),
    True,
  ),
  'torch pt': Format(
    copy_of(
      GOLDENS / 'pallatom_atom_transformers/'
      'checkpoint_run_config_bare_state_dict.pt'
    ),
    convert.load_atom_encoder,
    True,
  ),
  'torch pth': Format(
    copy_of(SEDD / 'sedd_checkpoint.pth'), convert.load_sedd, True
  ),
  'hf safetensors': Format(
    hugging_face('model.safetensors'), convert.load_sedd
  ),
  'hf config': Format(
    hugging_face('config.json'),
    lambda path: convert.load_sedd(path.with_name('model.safetensors')),
  ),
  'toml': Format(copy_of(CONFIGS / 'sedd_protein_ligand_small.toml'), settings),
  'vocabulary': Format(
    vocabulary, lambda path: data.SmilesTokenizer.from_file(path).vocabulary
  ),
  'csv': Format(table('pairs.csv'), data.read_pairs),
  'tsv': Format(table('pairs.tsv'), data.read_pairs),
  'parquet': Format(table('pairs.parquet'), data.read_pairs),
  'pdb': Format(copy_of(STRUCTURES / 'aladip.pdb'), data.load_structure),
  'cif': Format(copy_of(STRUCTURES / 'small.cif'), data.load_structure),
  'cif gz': Format(compressed(STRUCTURES / 'small.cif'), data.load_structure),
  'bcif': Format(copy_of(STRUCTURES / 'small.bcif'), data.load_structure),
  'bcif gz': Format(compressed(STRUCTURES / 'small.bcif'), data.load_structure),
  'sdf': Format(copy_of(LIGAND), with_ligand),
}


def mutated(rng: random.Random, content: bytes) -> bytes:
  """One to three changes of bytes, lengths or words."""
  broken = bytearray(content)
  for _ in range(rng.randint(1, 3)):
    start = rng.randrange(len(broken) + 1)
    # Most of what steers a reader lies at one of the ends.
    if rng.random() < 0.5:
      near = min(start, rng.randrange(256))
      start = near if rng.random() < 0.5 else len(broken) - near
    stop = min(len(broken), start + rng.choice((1, 4, 8, 100)))
    part = bytes(broken[start:stop])
    match rng.randrange(8):
      case 0 | 1 if part:
        broken[start] ^= 1 << rng.randrange(8)
      case 2:
        number = rng.choice(NUMBERS)
        broken[start : start + len(number)] = number
      case 3:
        broken[start:start] = rng.choice(WORDS) * rng.choice((1, 1, 3000))
      case 4:
        broken[start:start] = part * rng.choice((1, 2, 50))
      case 5:
        del broken[start:stop]
      case 6:
        broken[start:stop] = rng.randbytes(len(part))
      case 7 if rng.random() < 0.3:
        del broken[start:]
  return bytes(broken)


def mutated_inside(rng: random.Random, content: bytes) -> bytes:
  """The same of what an archive or compressed file holds."""
  if content.startswith(record_file.ZSTANDARD_MAGIC):
    inner = zstandard.ZstdDecompressor().decompressobj().decompress(content)
    return zstandard.ZstdCompressor().compress(mutated(rng, inner))
  if content.startswith(b'\x1f\x8b'):
    return gzip.compress(mutated(rng, gzip.decompress(content)), 1)
  if not zipfile.is_zipfile(io.BytesIO(content)):
    return mutated(rng, content)
  target = io.BytesIO()
  with (
    zipfile.ZipFile(io.BytesIO(content)) as archive,
    zipfile.ZipFile(target, 'w') as changed,
  ):
    names = archive.namelist()
    pickles = [name for name in names if name.endswith('data.pkl')]
    chosen = rng.choice(pickles if pickles and rng.random() < 0.7 else names)
    for name in names:
      inner = archive.read(name)
      changed.writestr(name, mutated(rng, inner) if name == chosen else inner)
  return target.getvalue()


def same(x: Any, y: Any) -> bool:
  """Whether two results are equal to the last bit."""
  if dataclasses.is_dataclass(x) and type(x) is type(y):
    names = [field.name for field in dataclasses.fields(x)]
    return all(same(getattr(x, name), getattr(y, name)) for name in names)
  if isinstance(x, Mapping) and isinstance(y, Mapping):
    return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
  if isinstance(x, list | tuple) and isinstance(y, list | tuple):
    return len(x) == len(y) and all(map(same, x, y))
  if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
    plain = (x.dtype, x.shape, x.tolist() if x.dtype.hasobject else x.tobytes())
    return plain == (
      y.dtype,
      y.shape,
      y.tolist() if y.dtype.hasobject else y.tobytes(),
    )
  return type(x) is type(y) and bool(x == y)


@contextlib.contextmanager
def time_limit() -> Generator[None]:
  """Processor time, which neighbours do not take away."""

  def stop(*_: object) -> None:
    raise TookTooLongError

  old = signal.signal(signal.SIGPROF, stop)
  signal.setitimer(signal.ITIMER_PROF, SECONDS)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, old)


def check(name: str, folder: pathlib.Path, numbers: range) -> None:
  """Reads mutants; asserts that each has one of the outcomes allowed."""
  known = FORMATS[name]
  path = known.make(folder)
  content = path.read_bytes()
  refused = 0
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    want = known.read(path)
    for number in numbers:
      rng = random.Random(f'{name} {number}')
      inside = number % 2
      change = mutated_inside if inside else mutated
      path.write_bytes(change(rng, content))
      got = message = None
      try:
        with time_limit():
          got = known.read(path)
      except ERRORS as error:
        message = str(error)
      except (Exception, TookTooLongError) as error:
        raise AssertionError(f'mutant {number} of {name}') from error
      if message is not None:
        refused += 1
        assert str(folder) in message, number
        assert len(message) < CHARACTERS, number
      elif known.has_checksum and not inside:
        assert same(got, want), number
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert (after - before) * 1024 < BYTES
  assert refused > len(numbers) // 10


@pytest.mark.parametrize('name', FORMATS)
def test_mutant_reads_equal_or_is_refused(name, tmp_path):
  check(name, tmp_path, range(100))


@pytest.mark.slow
@pytest.mark.parametrize('name', FORMATS)
def test_many_mutants_read_equal_or_are_refused(name, tmp_path):
  check(name, tmp_path, range(100, 2100))
