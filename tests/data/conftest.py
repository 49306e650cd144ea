"""Small synthetic PDB files for the data tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

# A backbone whose C lies 1.2 angstrom before the N of the next residue.
BACKBONE = {
  'N': (0.0, 0.0, 0.0),
  'CA': (1.2, 0.8, 0.0),
  'C': (2.4, 0.0, 0.0),
  'O': (2.4, -1.2, 0.0),
  'CB': (1.2, 1.9, 1.0),
}


class PdbText:
  """Collects PDB lines."""

  def __init__(self):
    self.lines: list[str] = []

  def atom(
    self,
    name: str,
    residue: str,
    number: int,
    xyz=(0.0, 0.0, 0.0),
    *,
    chain: str = 'A',
    element: str | None = None,
    hetero: bool = False,
    alt: str = '',
    icode: str = '',
    occupancy: float = 1.0,
  ) -> 'PdbText':
    element = name[0] if element is None else element
    padded = name if len(name) == 4 or len(element) == 2 else f' {name}'
    x, y, z = xyz
    self.lines.append(
      f'{"HETATM" if hetero else "ATOM":6s}{len(self.lines) + 1:5d} '
      f'{padded:4s}{alt:1s}{residue:>3s} {chain:1s}{number:4d}{icode:1s}   '
      f'{x:8.3f}{y:8.3f}{z:8.3f}{occupancy:6.2f}{0.0:6.2f}          '
      f'{element:>2s}'
    )
    return self

  def residue(
    self,
    residue: str,
    number: int,
    *,
    index: int | None = None,
    names=('N', 'CA', 'C', 'O', 'CB'),
    shift: float = 0.0,
    **options,
  ) -> 'PdbText':
    """Backbone atoms at slot `index` of a straight chain."""
    slot = number if index is None else index
    for name in names:
      x, y, z = BACKBONE[name]
      self.atom(
        name, residue, number, (x + 3.6 * slot, y, z + shift), **options
      )
    return self

  def record(self, line: str) -> 'PdbText':
    self.lines.append(line)
    return self

  def text(self) -> str:
    return '\n'.join([*self.lines, 'END', ''])


@pytest.fixture
def pdb() -> PdbText:
  return PdbText()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
  def write_text(content: PdbText | str, name: str = 'input.pdb') -> Path:
    path = tmp_path / name
    text = content.text() if isinstance(content, PdbText) else content
    path.write_text(text)
    return path

  return write_text
