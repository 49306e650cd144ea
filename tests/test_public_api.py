"""The public names, their documentation, and who may import whom."""

import ast
import doctest
import importlib
import importlib.util
import inspect
import os
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import structattn_jax

PACKAGE = pathlib.Path(structattn_jax.__file__).parent
SOURCES = {
  path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text('utf-8'))
  for path in sorted(PACKAGE.rglob('*.py'))
}


NAMESPACES = (
  structattn_jax,
  structattn_jax.alphafold2,
  structattn_jax.alphafold3,
  structattn_jax.boltz,
  structattn_jax.pallatom,
  structattn_jax.sedd,
  structattn_jax.seeds,
)


def imports(source: str) -> set[str]:
  """Full names of all that a module imports, anywhere in it.

  `from a import b` counts as `a` and `a.b`, since b may be a module.
  """
  package = '.'.join(['structattn_jax', *source.split('/')[:-1]])
  names = set()
  for node in ast.walk(SOURCES[source]):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      relative = '.' * node.level + (node.module or '')
      module = importlib.util.resolve_name(relative, package)
      names |= {module, *(f'{module}.{alias.name}' for alias in node.names)}
  return names


def within(name: str, package: str) -> bool:
  return name == package or name.startswith(f'{package}.')


def modules() -> list[str]:
  found = pkgutil.walk_packages([str(PACKAGE)], 'structattn_jax.')
  # Importing __main__ would run it.
  names = [m.name for m in found if not m.name.endswith('__main__')]
  return ['structattn_jax', *names]


@pytest.mark.parametrize('package', NAMESPACES)
def test_all_is_sorted_and_exists(package):
  names = package.__all__
  assert names == sorted(set(names))
  for name in names:
    assert getattr(package, name) is not None


@pytest.mark.parametrize('package', NAMESPACES)
def test_all_names_exactly_what_is_imported(package):
  source = '/'.join([*package.__name__.split('.')[1:], '__init__.py'])
  imported = {
    alias.asname or alias.name
    for node in ast.walk(SOURCES[source])
    if isinstance(node, ast.ImportFrom)
    and within(node.module or '', 'structattn_jax')
    for alias in node.names
  }
  assert imported == set(package.__all__)


def test_unknown_attribute_raises():
  with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
    structattn_jax.no_such_name  # noqa: B018


@pytest.mark.parametrize(
  ('package', 'name'),
  [(package, name) for package in NAMESPACES for name in package.__all__],
)
def test_public_name_has_its_own_docstring(package, name):
  value = getattr(package, name)
  assert inspect.ismodule(value) or callable(value)
  # Not inherited, and not the signature that `dataclass` writes.
  doc = vars(value).get('__doc__') if inspect.isclass(value) else value.__doc__
  assert doc
  assert not doc.startswith(f'{name}(')
  assert doc.splitlines()[0].rstrip()[-1] in '.:'


def documented(doc: str, title: str) -> list[str] | None:
  """Names of the entries of a block of a docstring; None without the block."""
  lines = inspect.cleandoc(doc).split('\n')
  if title not in lines:
    return None
  names = []
  for line in lines[lines.index(title) + 1 :]:
    if line and not line.startswith(' '):
      break
    entry = re.match(r' {2}((?:\*{0,2}\w+(?:, )?)+):', line)
    names += entry[1].split(', ') if entry else []
  return names


def signature_arguments(function: ast.FunctionDef) -> list[str]:
  given = function.args
  names = [x.arg for x in (*given.posonlyargs, *given.args)]
  names += [f'*{given.vararg.arg}'] if given.vararg else []
  names += [x.arg for x in given.kwonlyargs]
  names += [f'**{given.kwarg.arg}'] if given.kwarg else []
  return [name for name in names if name not in ('self', 'cls')]


def public_functions(tree: ast.AST, prefix: str = ''):
  """Public functions, methods and classes of a module, with their names."""
  for node in ast.iter_child_nodes(tree):
    if not isinstance(node, ast.ClassDef | ast.FunctionDef):
      continue
    if not node.name.startswith('_'):
      yield f'{prefix}{node.name}', node
      if isinstance(node, ast.ClassDef):
        yield from public_functions(node, f'{prefix}{node.name}.')


def fields(classes: dict[str, ast.ClassDef], node: ast.AST) -> list[str]:
  """Public annotated names of a class, or of a base in the same module."""
  if isinstance(node, ast.Name):
    node = classes.get(node.id, node)
  names = [
    ast.unparse(x.target)
    for x in getattr(node, 'body', ())
    if isinstance(x, ast.AnnAssign)
  ]
  return [name for name in names if not name.startswith('_')]


@pytest.mark.parametrize('source', SOURCES)
def test_documented_names_are_those_of_the_signature(source):
  wrong = []
  classes = {
    x.name: x for x in ast.walk(SOURCES[source]) if isinstance(x, ast.ClassDef)
  }
  for name, node in public_functions(SOURCES[source]):
    doc = ast.get_docstring(node) or ''
    if isinstance(node, ast.FunctionDef):
      named, taken = documented(doc, 'Args:'), signature_arguments(node)
    elif 'Attributes:' in doc:
      # Another default of an inherited field needs no words.
      inherited = {x for base in node.bases for x in fields(classes, base)}
      named = sorted(documented(doc, 'Attributes:') or ())
      taken = sorted(x for x in fields(classes, node) if x not in inherited)
    else:
      named, taken = documented(doc, 'Args of the constructor:'), None
      for own in node.body:
        if isinstance(own, ast.FunctionDef) and own.name == '__init__':
          taken = signature_arguments(own)
    # A constructor may be inherited.
    if named is not None and taken is not None and named != taken:
      wrong.append(f'{name}: documents {named}, takes {taken}')
  assert not wrong


def test_import_leaves_optional_packages_alone():
  code = (
    'import sys, structattn_jax as sa; print(*sys.modules, sep="\\n"); '
    'sa.reference; assert "structattn_jax.reference" in sys.modules'
  )
  result = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=True,
    cwd=PACKAGE.parent,
  )
  loaded = set(result.stdout.split())
  assert 'structattn_jax.network.sedd.dual_track' in loaded
  optional = ('biotite', 'rdkit', 'matplotlib', 'torch', 'safetensors')
  lazy = ('structattn_jax.data', 'structattn_jax.reference')
  assert not loaded & {*optional, *lazy}


def run_docstring_examples() -> None:
  """Runs all examples, writes their number, and fails if one of them does."""
  finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(verbose=False)
  for name in modules():
    # Examples use the names of their module, as its reader does.
    for test in finder.find(importlib.import_module(name)):
      runner.run(test)
  sys.stdout.write(f'{runner.tries}\n')
  sys.exit(runner.failures > 0)


def test_docstring_examples_of_all_modules_run():
  # In a process of its own, where quick compilation cannot leak into others.
  result = subprocess.run(
    [sys.executable, __file__],
    capture_output=True,
    text=True,
    cwd=PACKAGE.parent,
    env={
      **os.environ,
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'PYTHONPATH': str(PACKAGE.parent),
    },
  )
  assert result.returncode == 0, result.stdout + result.stderr
  assert int(result.stdout.split()[-1]) >= 40


def test_docstring_examples_cover_every_transform():
  for package in NAMESPACES:
    for name in package.__all__:
      if name.startswith('transform_'):
        assert '>>> ' in getattr(package, name).__doc__, name


def test_library_does_not_print():
  allowed = ('cli.py', 'benchmark/')
  calls = [
    f'{source}:{node.lineno}'
    for source, tree in SOURCES.items()
    if not source.startswith(allowed)
    for node in ast.walk(tree)
    if isinstance(node, ast.Call)
    and isinstance(node.func, ast.Name)
    and node.func.id == 'print'
  ]
  assert not calls


def test_reference_imports_only_numpy_and_itself():
  sources = [name for name in SOURCES if name.startswith('reference/')]
  assert len(sources) > 5
  foreign = {
    name
    for source in sources
    for name in imports(source)
    if name.partition('.')[0] not in {*sys.stdlib_module_names, 'numpy'}
    and not within(name, 'structattn_jax.reference')
  }
  # `from structattn_jax import x` would show up as structattn_jax.x.
  assert foreign <= {'structattn_jax'}


# From the bottom up; what shares a line may import each other.
LAYERS = (
  ('common', 'geometry'),
  ('components',),
  ('network',),
  ('diffusion', 'discrete_diffusion'),
  ('checkpoint', 'testing'),
  ('convert', 'data', 'reference'),
  ('benchmark', 'training', 'verification'),
  ('apps',),
  ('cli',),
)
SYSTEMS = ('alphafold2', 'alphafold3', 'boltz', 'pallatom', 'sedd', 'seeds')


def layer_of(name: str) -> int:
  return next(i for i, layer in enumerate(LAYERS) if name in layer)


def test_layers_are_all_there_is():
  found = {name.split('/')[0].removesuffix('.py') for name in SOURCES}
  named = {name for layer in LAYERS for name in layer}
  assert found - {'__init__'} <= named


def test_lower_layers_do_not_import_upper_ones():
  found = []
  for source in SOURCES:
    own = source.split('/')[0].removesuffix('.py')
    for name in imports(source):
      parts = name.split('.')
      if own == '__init__' or parts[0] != 'structattn_jax' or len(parts) == 1:
        continue
      # `from structattn_jax import __version__` names no layer.
      if not parts[1].startswith('__') and layer_of(parts[1]) > layer_of(own):
        found.append(f'{source} imports {name}')
  assert not found


def test_no_system_imports_another():
  found = [
    f'{source} imports {name}'
    for source in SOURCES
    for system in SYSTEMS
    if source.startswith(f'network/{system}/')
    for name in imports(source)
    for other in SYSTEMS
    if other != system and within(name, f'structattn_jax.network.{other}')
  ]
  assert not found
  assert all(f'network/{system}/__init__.py' in SOURCES for system in SYSTEMS)


def test_package_is_marked_as_typed():
  assert (PACKAGE / 'py.typed').is_file()


if __name__ == '__main__':
  run_docstring_examples()
