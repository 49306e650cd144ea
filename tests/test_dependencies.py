"""What is imported of dependencies is public, and still there in newer ones."""

import ast
import importlib
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'structattn_jax'
FILES = sorted(
  path
  for folder in (PACKAGE, ROOT / 'tests', ROOT / 'notebooks')
  for path in folder.rglob('*.py')
)
# Public by name, but gone from a release that the declared ranges allow.
_GONE = (
  'biotite.structure.io.pdb.hybrid36',  # biotite 2.0
  'biotite.structure.bonds',  # Compiled; its names are in biotite.structure.
  'jax.core.Primitive',
  'jax.experimental.maps',
  'jax.interpreters.xla',
  'jax.linear_util',
  'jax.lib.xla_bridge',
  'jax.tree_map',
  'numpy.core',
)


def _names(path):
  """Line and dotted name of all that a file imports, or reaches by a dot."""
  tree = ast.parse(path.read_text())
  modules = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, alias.name
        root = alias.name.partition('.')[0]
        modules[alias.asname or root] = alias.name if alias.asname else root
    elif isinstance(node, ast.ImportFrom) and not node.level:
      for alias in node.names:
        yield node.lineno, f'{node.module}.{alias.name}'
        name = f'{node.module}.{alias.name}'
        modules[alias.asname or alias.name] = name
  for node in ast.walk(tree):
    attributes, base = [], node
    while isinstance(base, ast.Attribute):
      attributes.append(base.attr)
      base = base.value
    if attributes and isinstance(base, ast.Name) and base.id in modules:
      yield node.lineno, '.'.join([modules[base.id], *reversed(attributes)])


def _is_private(name):
  return any(
    part.startswith('_') and not (part.startswith('__') and part.endswith('__'))
    for part in name.split('.')
  )


def _is_of_dependency(name):
  root = name.partition('.')[0]
  own = {'structattn_jax', '__future__', 'tests', 'conftest'}
  return root not in own and root not in sys.stdlib_module_names


@pytest.mark.parametrize(
  'source', FILES, ids=lambda p: str(p.relative_to(ROOT))
)
def test_nothing_private_or_gone_of_a_dependency_is_used(source):
  used = [x for x in _names(source) if _is_of_dependency(x[1])]
  private = [x for x in used if _is_private(x[1])]
  assert not private, private
  gone = [
    x for x in used if f'{x[1]}.'.startswith(tuple(f'{g}.' for g in _GONE))
  ]
  assert not gone, gone


def test_private_names_are_recognised(tmp_path):
  path = tmp_path / 'x.py'
  path.write_text(
    'import jax\nimport numpy as np\nfrom jax._src import core\n'
    'from biotite.structure.io.pdb.hybrid36 import decode_hybrid36\n'
    'jax._src.core\nnp.linalg._umath_linalg\nnp.__version__\n'
  )
  names = [name for _, name in _names(path)]
  assert {name for name in names if _is_private(name)} == {
    'jax._src',
    'jax._src.core',
    'numpy.linalg._umath_linalg',
  }
  assert any(n.startswith(_GONE[0]) for n in names)
  assert not _is_private('numpy.__version__')


def test_what_the_package_imports_exists():
  """From whatever version is installed, extras that are absent left out."""
  for source in sorted(PACKAGE.rglob('*.py')):
    for node in ast.walk(ast.parse(source.read_text())):
      if not isinstance(node, ast.ImportFrom) or not node.module:
        continue
      if node.level or not _is_of_dependency(node.module):
        continue
      try:
        importlib.import_module(node.module.partition('.')[0])
      except ImportError:
        continue
      module = importlib.import_module(node.module)
      for alias in node.names:
        if not hasattr(module, alias.name):
          importlib.import_module(f'{node.module}.{alias.name}')
