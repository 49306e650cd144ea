"""Frozen configs with strict keys, strict types and TOML in and out.

A config is a frozen, keyword-only dataclass beside the code it configures:

  >>> @dataclasses.dataclass(frozen=True, kw_only=True)
  ... class AttentionConfig(BaseConfig):
  ...   num_head: int = 4
  ...   gate: Literal['sigmoid', 'none'] = 'sigmoid'
  >>> AttentionConfig.from_dict({'num_head': 8}).num_head
  8

Fields may be bool, int, float, str, Literal, tuples of these, nested configs,
and any of them `| None`. Nothing else is needed to describe a model, and
nothing else can be written to TOML without surprises.
"""

import dataclasses
import difflib
import json
import numbers
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, Union

from structattn_jax.common import files

# Of a TOML file. A key with many dots takes its square in time.
_MAX_TOML = 2**18
_MAX_DOTS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig:
  """Base of all configs; subclasses add fields with defaults.

  Types are checked whenever a config is made, whether by the constructor, by
  `dataclasses.replace` or from a file. Integers are sizes and counts: none is
  negative, nor larger than anything that could be computed.

  Raises:
    TypeError: if a field has the wrong type; the message names
      `Class.field`, the expected type and the value given.
    ValueError: if a `Literal` field has another value than those listed, or an
      integer is negative or above `largest`.
  """

  # Of the integers of a config; classes that count steps have more.
  largest: ClassVar[int] = 2**20

  def __post_init__(self) -> None:
    hints = typing.get_type_hints(type(self))
    for field in dataclasses.fields(self):
      where = f'{type(self).__name__}.{field.name}'
      value = getattr(self, field.name)
      checked = _check_type(where, value, hints[field.name], self.largest)
      if checked is not value:
        object.__setattr__(self, field.name, checked)

  def check_at_least(self, least: int, *fields: str) -> None:
    """Raises a ValueError if a field is smaller; None is passed over."""
    for field in fields:
      value = getattr(self, field)
      if value is not None and value < least:
        raise ValueError(
          f'{type(self).__name__}.{field}: expected at least {least}, got '
          f'{value}'
        )

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> Self:
    """Makes a config from a plain mapping; nested mappings make sub-configs.

    Args:
      values: field names to values; missing fields keep their defaults.

    Returns:
      The config.

    Raises:
      ValueError: on a key that is not a field; the closest name is proposed.
      TypeError: on a value of the wrong type.
    """
    names = [field.name for field in dataclasses.fields(cls)]
    for key in values:
      if key not in names:
        close = difflib.get_close_matches(str(key), names, n=1)
        hint = f'; did you mean {close[0]!r}?' if close else ''
        raise ValueError(
          f'{cls.__name__}: unknown key {files.shown(key)}{hint} '
          f'(known keys: {", ".join(names) or "none"})'
        )
    return cls(**values)

  @classmethod
  def from_toml(cls, path: str | os.PathLike[str]) -> Self:
    """Reads a config from a TOML file.

    Args:
      path: file to read.

    Returns:
      The config.

    Raises:
      ValueError: if the file is not TOML, has an unknown key, or a value that
        cannot be.
      TypeError: on a value of the wrong type.
      FileNotFoundError: if there is no such file.
    """
    with files.guard(path, what='not a TOML file', passes=(OSError,)):
      text = files.read_text(path, _MAX_TOML)
      dots = max(line.count('.') for line in text.split('\n'))
      if dots > _MAX_DOTS:
        raise ValueError(f'a line with {dots:,} dots')
      values = tomllib.loads(text)
    try:
      return cls.from_dict(values)
    except TypeError as error:
      raise TypeError(files.short(f'{os.fspath(path)}: {error}')) from None
    except ValueError as error:
      raise files.FileError(f'{os.fspath(path)}: {error}') from None

  def to_dict(self) -> dict[str, Any]:
    """Returns the config as nested plain dictionaries."""
    return dataclasses.asdict(self)

  def to_toml(self) -> str:
    """Returns the config as TOML text that `from_toml` reads back equal.

    TOML has no null: fields that are None are left out or, where the default is
    something else, written as the string 'none'.

    Raises:
      ValueError: if a None cannot be represented: where strings are allowed.
    """
    return '\n'.join(_toml_lines(self)) + '\n'


def _check_type(where: str, value: Any, hint: Any, largest: int) -> Any:
  """Returns `value`, made plain where harmless, or raises naming `where`."""
  origin, options = typing.get_origin(hint), typing.get_args(hint)
  if origin in (Union, types.UnionType):
    if value is None and type(None) in options:
      return None
    options = [option for option in options if option is not type(None)]
    if value == 'none' and str not in options:  # TOML has no null.
      return None
    if len(options) == 1:
      return _check_type(where, value, options[0], largest)
    raise TypeError(f'{where}: unions other than `X | None` are not supported')
  if origin is Literal:
    for option in options:
      # True == 1 and 1.0 == 1: the type must agree, too.
      if type(value) is type(option) and value == option:
        return option
    raise ValueError(
      f'{where}: expected one of {", ".join(map(repr, options))}, got '
      f'{files.shown(value)}'
    )
  if origin is tuple:
    if not isinstance(value, (tuple, list)):
      raise TypeError(
        f'{where}: expected a list of values, got {files.shown(value)}'
      )
    if len(options) == 2 and options[1] is Ellipsis:
      options = (options[0],) * len(value)
    if len(value) != len(options):
      raise TypeError(
        f'{where}: expected {len(options)} values, got {len(value)}'
      )
    return tuple(
      _check_type(f'{where}[{i}]', item, option, largest)
      for i, (item, option) in enumerate(zip(value, options, strict=True))
    )
  if isinstance(hint, type) and issubclass(hint, BaseConfig):
    if isinstance(value, Mapping):
      return hint.from_dict(value)
    if isinstance(value, hint):
      return value
  elif hint is bool and isinstance(value, bool):
    return value
  # bool is an int in Python; a flag given for a size is a mistake.
  elif hint is int and isinstance(value, numbers.Integral):
    if not isinstance(value, bool):
      if not 0 <= value <= largest:
        raise ValueError(
          f'{where}: expected an integer from 0 to {largest:,}, got '
          f'{files.shown(int(value))}'
        )
      return value if type(value) is int else int(value)
  elif hint is float and isinstance(value, numbers.Real):
    if not isinstance(value, bool):
      try:
        return value if type(value) is float else float(value)
      except OverflowError:
        raise ValueError(
          f'{where}: expected float, got {files.shown(value)}'
        ) from None
  elif hint is str and isinstance(value, str):
    return value
  name = getattr(hint, '__name__', str(hint))
  raise TypeError(
    f'{where}: expected {name}, got {type(value).__name__} '
    f'({files.shown(value)})'
  )


def _toml_lines(config: BaseConfig, prefix: str = '') -> list[str]:
  lines: list[str] = []
  tables: list[str] = []
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if isinstance(value, BaseConfig):
      name = f'{prefix}{field.name}'
      tables += ['', f'[{name}]', *_toml_lines(value, f'{name}.')]
    elif value is not None:
      where = f'{type(config).__name__}.{field.name}'
      lines.append(f'{field.name} = {_toml_value(where, value)}')
    elif field.default is None:
      continue
    elif not isinstance(field.default, str):
      lines.append(f"{field.name} = 'none'")
    else:
      raise ValueError(
        f'{type(config).__name__}.{field.name}: None cannot be written to '
        f'TOML because the default is {field.default!r}'
      )
  return lines + tables


def _toml_value(where: str, value: Any) -> str:
  if isinstance(value, bool):
    return 'true' if value else 'false'
  if isinstance(value, str):
    # JSON's escapes are TOML's, but TOML knows no surrogate pairs and wants
    # DEL escaped.
    return json.dumps(value, ensure_ascii=False).replace('\x7f', '\\u007f')
  if isinstance(value, float):
    return repr(value)  # 'inf' and 'nan' are TOML floats too.
  if isinstance(value, int):
    return str(value)
  if isinstance(value, tuple):
    return f'[{", ".join(_toml_value(where, item) for item in value)}]'
  raise ValueError(f'{where}: {value!r} cannot be written to TOML')
