"""Which lines of a structure file form one residue, and which of them stay.

A residue is usually one run of lines, but alternate names (microheterogeneity)
may interleave, and one file may hold several copies of a chain under one name.
"""

from __future__ import annotations

import numpy as np

from structattn_jax.data import structure_files


def group_residues(
  table: structure_files.AtomTable,
) -> tuple[np.ndarray, np.ndarray]:
  """Assigns atoms to residues.

  Returns:
    [n_atom] index of the residue, numbered by first appearance, and
    [n_residue] number of earlier copies of the same residue.
  """
  columns = (
    table.chain_id,
    table.entity_chain,
    table.residue_id,
    table.insertion_code,
    table.residue_name,
  )
  codes = np.stack(
    [np.unique(column, return_inverse=True)[1] for column in columns], axis=-1
  )
  new_run = np.ones(table.n_atom, dtype=bool)
  new_run[1:] = np.any(codes[1:] != codes[:-1], axis=-1)
  starts = np.flatnonzero(new_run)
  stops = np.append(starts[1:], table.n_atom)
  run_codes = codes[starts].tolist()

  def atoms(run: int) -> set[tuple[str, str]]:
    rows = slice(starts[run], stops[run])
    return set(
      zip(
        table.atom_name[rows].tolist(),
        table.alternate[rows].tolist(),
        strict=True,
      )
    )

  def belongs(run: int, name: int, residue: _Residue) -> bool:
    if name in residue.names:
      # A second copy repeats atoms; a residue in pieces does not.
      return all(not (atoms(run) & atoms(other)) for other in residue.runs)
    # Two names in one place are alternatives only if both are marked so;
    # otherwise a ligand shares its number with a residue of the chain.
    return all(alt for _, alt in atoms(run)) and all(
      any(alt for _, alt in atoms(other)) for other in residue.runs
    )

  residues: list[_Residue] = []
  by_key: dict[tuple[int, ...], list[_Residue]] = {}
  run_residue = np.zeros(len(starts), dtype=np.int64)
  position = {}
  for run, (*key, name) in enumerate(run_codes):
    group = by_key.setdefault(tuple(key), [])
    found = next((r for r in reversed(group) if belongs(run, name, r)), None)
    if found is None:
      copy = sum(name in r.names for r in group)
      found = _Residue(name, copy)
      group.append(found)
      position[id(found)] = len(residues)
      residues.append(found)
    found.names.add(name)
    found.runs.append(run)
    run_residue[run] = position[id(found)]
  copies = np.array([r.copy for r in residues], dtype=np.int64)
  return run_residue[np.cumsum(new_run) - 1], copies


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


class _Residue:
  """Runs of consecutive lines that belong to one residue."""

  def __init__(self, name: int, copy: int):
    self.names = {name}
    self.copy = copy
    self.runs: list[int] = []
