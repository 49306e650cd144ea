"""The README's examples run and print what their comments say."""

import contextlib
import io
import operator
import pathlib
import re

import pytest

import structattn_jax as sa

README = pathlib.Path(__file__).parent.parent / 'README.md'
# Blocks that print say what; the one that needs AF2's parameters does not.
BLOCKS = [
  block
  for block in re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)
  if 'print(' in block
]


@pytest.mark.parametrize('block', BLOCKS, ids=range(len(BLOCKS)))
def test_example_prints_what_it_says(block):
  said = re.findall(r'print\(.*\)  # (.*)', block)
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    exec(block, {})
  assert said
  assert printed.getvalue().splitlines() == said


def test_every_function_in_the_table_exists():
  table = README.read_text().split('## What works today')[1].split('\n## ')[0]
  rows = [
    line.split('|')[2]
    for line in table.splitlines()
    if line[:1] == '|' and '`' in line
  ]
  names = re.findall(r'`sa\.([\w.]+)`', ' '.join(rows))
  assert len(names) >= 5
  for name in names:
    assert callable(operator.attrgetter(name)(sa))
