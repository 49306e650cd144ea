"""Configs: strict keys, strict types, and TOML that reads back equal."""

import contextlib
import dataclasses
import importlib
import math
import pkgutil
import re
import time
import types
import typing
from typing import Literal

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import structattn_jax
from structattn_jax.common import base_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(base_config.BaseConfig):
  size: int = 3
  label: str = 'inner'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Titled(base_config.BaseConfig):
  title: str | None = 'x'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(base_config.BaseConfig):
  flag: bool = False
  count: int = 1
  rate: float = 0.5
  text: str = 'text'
  mode: Literal['fast', 'exact'] = 'fast'
  level: Literal[0, 1] = 0
  pair: tuple[int, float] = (1, 2.0)
  words: tuple[str, ...] = ()
  table: tuple[tuple[int, ...], ...] = ((1, 2), ())
  limit: int | None = None
  cap: int | None = 8
  gaps: tuple[int | None, ...] = ()
  inner: Inner = Inner()
  extra: Inner | None = None


def library_configs() -> list[type[base_config.BaseConfig]]:
  """Every config class that some module of the library defines."""
  found = {}
  for info in pkgutil.walk_packages(
    structattn_jax.__path__, f'{structattn_jax.__name__}.'
  ):
    if info.name.endswith('__main__'):
      continue
    module = importlib.import_module(info.name)
    for value in vars(module).values():
      if (
        isinstance(value, type)
        and issubclass(value, base_config.BaseConfig)
        and value.__module__ == info.name
      ):
        found[f'{value.__module__}.{value.__qualname__}'] = value
  return [found[name] for name in sorted(found)]


def values_of(hint) -> st.SearchStrategy:
  """Values of a field's type."""
  options = typing.get_args(hint)
  origin = typing.get_origin(hint)
  if origin in (typing.Union, types.UnionType):
    return st.one_of(map(values_of, options))
  if origin is Literal:
    return st.sampled_from(options)
  if origin is tuple and options[-1] is Ellipsis:
    return st.lists(values_of(options[0]), max_size=3).map(tuple)
  if origin is tuple:
    return st.tuples(*map(values_of, options))
  if isinstance(hint, type) and issubclass(hint, base_config.BaseConfig):
    return instances_of(hint)
  return {
    type(None): st.none(),
    bool: st.booleans(),
    # Powers of two satisfy most rules of the kind "a must divide b".
    int: st.integers(0, 20).map(lambda exponent: 2**exponent),
    # Rates and the like, mostly: these satisfy most rules on numbers.
    float: st.one_of(
      *[st.floats(0, 1, exclude_min=True, exclude_max=True)] * 3,
      st.floats(allow_nan=False),
    ),
    str: st.text(),
  }[hint]


@st.composite
def instances_of(draw, cls):
  hints = typing.get_type_hints(cls)
  drawn = {
    field.name: draw(values_of(hints[field.name]))
    for field in dataclasses.fields(cls)
  }
  with contextlib.suppress(ValueError):
    return cls(**drawn)
  # A rule between fields: change one after the other, where that is allowed.
  config = cls()
  for name, value in drawn.items():
    with contextlib.suppress(ValueError):
      config = dataclasses.replace(config, **{name: value})
  return config


def assert_round_trips(config, tmp_path) -> None:
  path = tmp_path / 'config.toml'
  path.write_text(config.to_toml(), encoding='utf-8')
  assert type(config).from_toml(path) == config
  assert type(config).from_dict(config.to_dict()) == config


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('configs')


def test_library_configs_search_finds_the_systems():
  assert set(library_configs()) >= {
    structattn_jax.seeds.TokenAtomAttentionConfig,
    structattn_jax.pallatom.AtomTransformerConfig,
    structattn_jax.sedd.DualTrackConfig,
    structattn_jax.alphafold2.InvariantPointAttentionConfig,
    structattn_jax.seeds.TokenAttentionPoolConfig,
    base_config.BaseConfig,
  }


@pytest.mark.parametrize(
  'cls', library_configs(), ids=lambda cls: cls.__qualname__
)
@hypothesis.given(data=st.data())
def test_toml_of_library_config_any_values_reads_back_equal(cls, folder, data):
  assert_round_trips(cls(), folder)
  assert_round_trips(data.draw(instances_of(cls)), folder)


@hypothesis.settings(max_examples=40)
@hypothesis.given(data=st.data())
def test_toml_of_every_field_type_reads_back_equal(folder, data):
  drawn = data.draw(instances_of(Outer))
  # No None inside a tuple.
  gaps = tuple(gap or 0 for gap in drawn.gaps)
  assert_round_trips(dataclasses.replace(drawn, gaps=gaps), folder)


def test_toml_none_where_the_default_is_a_number_reads_back(tmp_path):
  assert "cap = 'none'" in Outer(cap=None).to_toml()
  assert_round_trips(Outer(cap=None), tmp_path)


@pytest.mark.parametrize(
  'text',
  [
    '"quoted" and \'single\'',
    'back\\slash \\u0041',
    'line\nfeed\r\nreturn\ttab',
    ''.join(map(chr, range(0x20))),
    'del \x7f, c1 \x80\x85\x9f',
    'é, 蛋白质 and 🧬',
    '\u2028\u2029\ufeff',
    '# [no table]',
  ],
)
def test_toml_awkward_string_reads_back_equal(text, tmp_path):
  config = Outer(text=text, words=(text, ''), inner=Inner(label=text))
  assert_round_trips(config, tmp_path)


def test_toml_infinite_and_nan_read_back(tmp_path):
  path = tmp_path / 'config.toml'
  for value in (math.inf, -math.inf, math.nan):
    path.write_text(Outer(rate=value).to_toml(), encoding='utf-8')
    np.testing.assert_equal(Outer.from_toml(path).rate, value)


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    (Titled(title=None), r"Titled\.title: None cannot .* default is 'x'"),
    (Outer(gaps=(1, None)), r'Outer\.gaps: None cannot be written'),
  ],
  ids=['field', 'item'],
)
def test_to_toml_none_without_representation_raises(config, message):
  with pytest.raises(ValueError, match=message):
    config.to_toml()


def test_from_dict_unknown_key_proposes_the_closest():
  with pytest.raises(
    ValueError, match=r"^Outer: unknown key 'cuont'; did you mean 'count'\?"
  ):
    Outer.from_dict({'cuont': 2})
  with pytest.raises(ValueError, match=r"^Inner: unknown key 'sise'.*'size'"):
    Outer.from_dict({'inner': {'sise': 2}})
  with pytest.raises(ValueError, match=r"unknown key 'zzz' \(known keys: size"):
    Inner.from_dict({'zzz': 2})
  with pytest.raises(ValueError, match=r'known keys: none'):
    base_config.BaseConfig.from_dict({'a': 1})


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'count': True}, r'Outer\.count: expected int, got bool \(True\)'),
    ({'count': 2.0}, r'Outer\.count: expected int, got float \(2\.0\)'),
    ({'count': None}, r'Outer\.count: expected int, got NoneType'),
    ({'rate': False}, r'Outer\.rate: expected float, got bool'),
    ({'rate': '1'}, r'Outer\.rate: expected float, got str'),
    ({'flag': 1}, r'Outer\.flag: expected bool, got int'),
    ({'text': b'a'}, r'Outer\.text: expected str, got bytes'),
    ({'pair': 3}, r'Outer\.pair: expected a list of values, got 3'),
    ({'pair': [1]}, r'Outer\.pair: expected 2 values, got 1'),
    ({'pair': [1, 'a']}, r'Outer\.pair\[1\]: expected float, got str'),
    ({'words': 'ab'}, r"Outer\.words: expected a list of values, got 'ab'"),
    ({'table': [[1], [True]]}, r'Outer\.table\[1\]\[0\]: expected int'),
    ({'limit': 'no'}, r'Outer\.limit: expected int, got str'),
    ({'inner': 3}, r'Outer\.inner: expected Inner, got int'),
    ({'inner': {'size': 'a'}}, r'Inner\.size: expected int, got str'),
  ],
)
def test_from_dict_wrong_type_names_field_and_types(values, message):
  with pytest.raises(TypeError, match=f'^{message}'):
    Outer.from_dict(values)


@pytest.mark.parametrize(
  'values', [{'mode': 'slow'}, {'mode': ['fast']}, {'level': 2}]
)
def test_literal_other_value_lists_the_options(values):
  ((name, _),) = values.items()
  options = {'mode': "'fast', 'exact'", 'level': '0, 1'}[name]
  with pytest.raises(ValueError, match=rf'Outer\.{name}: expected.* {options}'):
    Outer(**values)


@pytest.mark.parametrize('value', [True, 1.0])
def test_literal_equal_value_of_another_type_raises(value):
  with pytest.raises(ValueError, match=r'Outer\.level: expected one of 0, 1'):
    Outer(level=value)


def test_union_of_two_types_raises():
  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Mixed(base_config.BaseConfig):
    value: int | str = 1

  with pytest.raises(TypeError, match=r'Mixed\.value: unions other than'):
    Mixed()


def test_config_numpy_numbers_and_lists_become_plain():
  config = Outer(
    count=np.int64(4), rate=np.float32(0.25), pair=[np.int32(1), 3]
  )
  assert type(config.count) is int
  assert type(config.rate) is float
  assert config.pair == (1, 3.0)
  assert type(config.pair[1]) is float
  hash(config)


def test_config_nested_accepts_mapping_and_instance():
  assert Outer(inner={'size': 4}).inner == Inner(size=4)
  assert Outer.from_dict({'extra': {}}).extra == Inner()
  assert Outer().to_dict()['inner'] == {'size': 3, 'label': 'inner'}


def test_replace_checks_again():
  with pytest.raises(TypeError, match=r'Inner\.size'):
    dataclasses.replace(Inner(), size='large')
  with pytest.raises(dataclasses.FrozenInstanceError):
    Inner().size = 4  # ty: ignore


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'size = [1', 'not a TOML file'),
    (b'label = "\xff"', 'not a TOML file'),
    (b'\x89PNG\r\n', 'not a TOML file'),
    (b'sizes = 1', "unknown key 'sizes'; did you mean 'size'"),
  ],
  ids=['syntax', 'encoding', 'binary', 'key'],
)
def test_from_toml_bad_file_names_the_file(content, message, tmp_path):
  path = tmp_path / 'bad.toml'
  path.write_bytes(content)
  with pytest.raises(ValueError, match=rf'bad\.toml: .*{message}'):
    Inner.from_toml(path)


def test_from_toml_wrong_type_names_the_file(tmp_path):
  path = tmp_path / 'bad.toml'
  path.write_text('size = true')
  with pytest.raises(TypeError, match=r'bad\.toml: Inner\.size: expected int'):
    Inner.from_toml(str(path))


def test_from_toml_missing_file_raises(tmp_path):
  with pytest.raises(FileNotFoundError):
    Inner.from_toml(tmp_path / 'none.toml')


def integer_fields() -> list:
  return [
    (cls, field.name)
    for cls in library_configs()
    for field in dataclasses.fields(cls)
    if re.search(r'\bint\b', str(typing.get_type_hints(cls)[field.name]))
  ]


@pytest.mark.parametrize(
  ('cls', 'name'), integer_fields(), ids=lambda x: getattr(x, '__name__', x)
)
def test_integers_have_bounds(cls, name, tmp_path):
  path = tmp_path / 'x.toml'
  value = getattr(cls(), name)
  for bad in (-1, 2**63 - 1, int('9' * 400)):
    given, row = bad, str(bad)
    if isinstance(value, tuple):
      hint = typing.get_type_hints(cls)[name]
      nested = typing.get_args(typing.get_args(hint)[0])
      given = [[bad] * len(nested)] if nested else [bad]
      row = str(given)
    with pytest.raises(ValueError, match=rf'^{cls.__name__}\.{name}.* from 0'):
      cls(**{name: given})
    path.write_text(f'{name} = {row}')
    with pytest.raises(ValueError, match=rf'x\.toml: {cls.__name__}\.{name}'):
      cls.from_toml(path)
  if not isinstance(value, tuple):
    with contextlib.suppress(ValueError):  # Not a division by zero.
      assert getattr(cls(**{name: 0}), name) == 0


def test_number_that_is_no_float_names_the_field():
  with pytest.raises(ValueError, match=r'Outer\.rate: .* of 1,329 bits'):
    Outer(rate=10**400)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('size = ' + '[' * 5000 + ']' * 5000, 'RecursionError'),
    ('size = ' + '9' * 5000, '4300 digits'),
    ('a' + '.a' * 30_000 + ' = 1', 'a line with 30,000 dots'),
    ('x = {a' + '.a' * 30_000 + ' = 1}', 'a line with 30,000 dots'),
    ('label = "' + 'x' * 10**6 + '"', 'larger than 262,144 bytes'),
    ('x' * 60_000 + ' = 1', 'unknown key'),
    ('label = [' + '1, ' * 60_000 + ']', 'expected str, got list'),
  ],
  ids=['deep', 'digits', 'key', 'inline key', 'large', 'long', 'list'],
)
def test_from_toml_work_and_message_are_bounded(text, message, tmp_path):
  path = tmp_path / 'x.toml'
  path.write_text(text)
  start = time.process_time()
  with pytest.raises((TypeError, ValueError), match=message) as error:
    Inner.from_toml(path)
  assert time.process_time() - start < 5
  assert str(error.value).startswith(f'{path}: ')
  assert len(str(error.value)) < 500


def test_dual_track_config_indivisible_size_names_the_numbers():
  with pytest.raises(ValueError, match=r'10 must be divisible .* = 6'):
    structattn_jax.sedd.DualTrackConfig(hidden_size=10, num_head=3)
