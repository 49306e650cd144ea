"""Files of other people: one error that names the file, in bounded work.

Whatever a parser comes up with, and there are those that raise RecursionError,
OverflowError or TokenError, becomes the error of the format, which begins with
the name of the file. Its text has a bounded length, whatever the file holds.
What a file may unfold to is bounded by its own size.
"""

import contextlib
import functools
import os
import reprlib
from collections.abc import Callable, Generator, Iterable
from typing import ParamSpec, TypeVar

Path = str | os.PathLike[str]

# A file may unfold to this and so many times its own size. Trained parameters
# shrink by a tenth; those of a fresh model, mostly zeros, are small.
_UNFOLDED, _UNFOLDED_TIMES = 2**28, 32
_MESSAGE = 10_000
_REASON = 300
_LISTED = 100

_P = ParamSpec('_P')
_R = TypeVar('_R')


class FileError(ValueError):
  """A file is missing, damaged, foreign, or not what is expected."""

  def __init__(self, message: str = ''):
    super().__init__(short(message))


@contextlib.contextmanager
def guard(
  path: Path,
  error: type[FileError] = FileError,
  what: str = 'damaged',
  passes: tuple[type[Exception], ...] = (),
) -> Generator[None]:
  """Turns whatever is raised within into one error that names the file.

    >>> with guard('a.json', what='not JSON'):
    ...   {}['key']
    Traceback (most recent call last):
    ...
    structattn_jax.common.files.FileError: a.json: not JSON: KeyError: 'key'

  Args:
    path: the file.
    error: class of the error.
    what: what is wrong with the file, before the reason.
    passes: errors that go on as they are, as do errors about files, missing
      packages and warnings that are errors.
  """
  try:
    yield
  except (FileError, ImportError, Warning, *passes):
    raise
  except Exception as cause:
    reason = ' '.join(short(str(cause), _REASON).split())
    if isinstance(cause, OSError) and cause.strerror:
      what, reason = 'cannot be read', cause.strerror
    elif not isinstance(cause, ValueError) or not reason:
      reason = f'{type(cause).__name__}: {reason}'.removesuffix(': ')
    raise error(f'{os.fspath(path)}: {what}: {reason}') from cause


def guarded(
  error: type[FileError], what: str = 'damaged'
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
  """`guard` around a function whose first argument is the file."""

  def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
    @functools.wraps(function)
    def reader(*args: _P.args, **kwargs: _P.kwargs) -> _R:
      path = args[0] if args else kwargs['path']
      with guard(path, error, what):  # ty: ignore[invalid-argument-type]
        return function(*args, **kwargs)

    return reader

  return decorate


def read_text(path: Path, most: int) -> str:
  """The text of a small UTF-8 file; to be called within `guard`.

  Args:
    path: file to read.
    most: bytes that it may have.

  Raises:
    ValueError: if it is larger, or not UTF-8.
    OSError: if it cannot be read.
  """
  with open(path, 'rb') as file:
    content = file.read(most + 1)
  if len(content) > most:
    raise ValueError(f'larger than {most:,} bytes')
  return content.decode('utf-8')


def check_unfolded(
  path: Path, size: int, unfolded: int, error: type[FileError] = FileError
) -> None:
  """Raises before a small file takes much memory.

  Args:
    path: file, for the message.
    size: its bytes, or those read so far.
    unfolded: bytes that these become.
    error: class of the error.
  """
  if unfolded > _UNFOLDED + _UNFOLDED_TIMES * size:
    raise error(
      f'{os.fspath(path)}: {size:,} bytes would become {unfolded:,}, which no '
      'file of this kind does'
    )


def short(text: str, most: int = _MESSAGE) -> str:
  """The text, cut where it is longer than a message may be."""
  if len(text) <= most:
    return text
  return f'{text[:most]}... and {len(text) - most:,} more characters'


def listed(items: Iterable[str], separator: str = '; ') -> str:
  """Items of a list that a file can make long."""
  items = list(items)
  more = f'{separator}and {len(items) - _LISTED:,} more'
  return separator.join(short(item, 500) for item in items[:_LISTED]) + (
    more if len(items) > _LISTED else ''
  )


def shown(value: object) -> str:
  """`repr` of a value of a file, in bounded time."""
  return _REPR.repr(value)


class _Repr(reprlib.Repr):
  """Lists in lists, and integers of many digits, can take forever."""

  def __init__(self):
    super().__init__()
    self.maxlevel = 2
    self.maxstring = self.maxother = self.maxlong = 100

  def repr_int(self, x: int, level: int) -> str:
    if x.bit_length() > 256:
      return f'an integer of {x.bit_length():,} bits'
    return repr(x)

  def repr_bytes(self, x: bytes, level: int) -> str:
    return repr(x[: self.maxother])


_REPR = _Repr()
