"""Which lines of a structure file form one residue, and which of them stay.

A residue is usually one run of lines, but alternate names (microheterogeneity)
may interleave, and one file may hold several copies of a chain under one name.
"""

from __future__ import annotations

import numpy as np

from structattn_jax.data import chemical_components, structure_files


def group_residues(
  table: structure_files.AtomTable,
) -> tuple[np.ndarray, np.ndarray]:
  """Assigns atoms to residues, and residues to copies of their chain.

  A chain that starts again, with atoms that it has already, is another copy
  from there on; a ligand that does is another ligand of the same chain.

  Returns:
    [n_atom] index of the residue, numbered by first appearance, and
    [n_residue] number of earlier chains of the same name.
  """
  columns = (
    table.chain_id,
    table.chain_piece,
    table.entity_chain,
    table.residue_id,
    table.insertion_code,
    table.sequence_id,
    table.residue_name,
  )
  codes = np.stack(
    [np.unique(column, return_inverse=True)[1] for column in columns], axis=-1
  )
  new_run = np.ones(table.n_atom, dtype=bool)
  new_run[1:] = np.any(codes[1:] != codes[:-1], axis=-1)
  new_run |= _repeats(table, new_run)
  starts = np.flatnonzero(new_run)
  stops = np.append(starts[1:], table.n_atom)
  atoms = list(
    zip(table.atom_name.tolist(), table.alternate.tolist(), strict=True)
  )
  chains: dict[str, _Chain] = {}
  run_residue, copies = np.zeros(len(starts), np.int64), []
  for run, (start, stop) in enumerate(zip(starts, stops, strict=True)):
    own = set(atoms[start:stop])
    *key, name = codes[start].tolist()
    chain = chains.setdefault(str(table.chain_id[start]), _Chain())
    piece = int(table.chain_piece[start])
    if piece != chain.piece:
      chain.piece, chain.copy, chain.residues = piece, chain.copy + 1, {}
    group = chain.residues.setdefault(tuple(key), [])
    found = next((r for r in group if r.takes(name, own)), None)
    if found is None:
      again = any(name in residue.names for residue in group)
      if again and not table.hetero[start]:
        chain.copy, chain.residues = chain.copy + 1, {}
        group = chain.residues.setdefault(tuple(key), [])
      if again:  # Pieces of the earlier one cannot follow any more.
        group[:] = [r for r in group if name not in r.names]
      found = _Residue(len(copies))
      group.append(found)
      copies.append(chain.copy)
    found.names.add(name)
    found.atoms |= own
    run_residue[run] = found.index
  return run_residue[np.cumsum(new_run) - 1], np.array(copies, np.int64)


def _repeats(
  table: structure_files.AtomTable, new_run: np.ndarray
) -> np.ndarray:
  """Where a ligand without a number of its own follows another of its kind.

  Only ligands of which the CCD knows all atoms: docking programs may give all
  of them one name.
  """
  starts = np.flatnonzero(new_run)
  stops = np.append(starts[1:], table.n_atom)
  found = np.zeros(table.n_atom, dtype=bool)
  for start, stop in zip(starts, stops, strict=True):
    if not table.hetero[start] or stop - start < 2:
      continue
    names = table.atom_name[start:stop].tolist()
    labels = table.alternate[start:stop].tolist()
    if len(set(zip(names, labels, strict=True))) == stop - start:
      continue
    component = chemical_components.find_component(
      str(table.residue_name[start])
    )
    if component is None or any(component.match(n) is None for n in names):
      continue
    seen: set[tuple[str, str]] = set()
    for i, atom in enumerate(zip(names, labels, strict=True), start=start):
      if atom in seen:
        found[i], seen = True, set()
      seen.add(atom)
  return found


def select_alternates(
  table: structure_files.AtomTable, atom_residue: np.ndarray
) -> np.ndarray:
  """Mask of the atoms kept: one residue name, one set of locations each."""
  keep = np.ones(table.n_atom, dtype=bool)
  for residue in np.unique(atom_residue[table.alternate != '']).tolist():
    rows = np.arange(*np.searchsorted(atom_residue, [residue, residue + 1]))
    names = table.residue_name[rows]
    best = _by_occupancy(names, table.occupancy[rows])[0]
    keep[rows[names != best]] = False
    rows = rows[(names == best) & (table.alternate[rows] != '')]
    labels = table.alternate[rows]
    taken: set[str] = set()
    for label in _by_occupancy(labels, table.occupancy[rows]):
      atoms = set(table.atom_name[rows[labels == label]].tolist())
      if atoms & taken:
        keep[rows[labels == label]] = False
      else:
        taken |= atoms
  return keep


def _by_occupancy(labels: np.ndarray, occupancy: np.ndarray) -> list[str]:
  """Labels by falling mean occupancy, ties in order of appearance."""
  unique = list(dict.fromkeys(labels.tolist()))
  # Rounded, so that equal occupancies tie whatever the number of atoms.
  return sorted(
    unique,
    key=lambda label: -round(float(occupancy[labels == label].mean()), 4),
  )


class _Chain:
  """What is known so far of the last chain of a name."""

  def __init__(self):
    self.piece = self.copy = 0
    self.residues: dict[tuple[int, ...], list[_Residue]] = {}


class _Residue:
  """Runs of consecutive lines that belong to one residue."""

  def __init__(self, index: int):
    self.index = index
    self.names: set[int] = set()
    self.atoms: set[tuple[str, str]] = set()

  def takes(self, name: int, atoms: set[tuple[str, str]]) -> bool:
    """Whether a run with this name and these atoms is a part of it."""
    if name in self.names:
      # A second copy repeats atoms; a residue in pieces does not.
      return not atoms & self.atoms
    # Two names in one place are alternatives only if both are marked so;
    # otherwise a ligand shares its number with a residue of the chain.
    return all(alt for _, alt in atoms) and any(alt for _, alt in self.atoms)
