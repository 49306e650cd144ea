"""Command line: `python -m structattn_jax.benchmark [section ...]`."""

import argparse
import sys
from collections.abc import Sequence

from structattn_jax.benchmark import alphafold3 as atom_cross_attention
from structattn_jax.benchmark import alphafold3_diffusion_head as diffusion_head
from structattn_jax.benchmark import (
  boltz,
  boltz_diffusion,
  harness,
  segment,
)
from structattn_jax.benchmark.alphafold2 import invariant_point_attention as ipa
from structattn_jax.benchmark.alphafold2 import structure_module
from structattn_jax.benchmark.pallatom import atom_transformers as pallatom
from structattn_jax.benchmark.sedd import dual_track as sedd

SECTIONS = {
  'segment': segment,
  'ipa': ipa,
  'structure_module': structure_module,
  'atom_cross_attention': atom_cross_attention,
  'diffusion_head': diffusion_head,
  'boltz': boltz,
  'boltz_diffusion': boltz_diffusion,
  'sedd': sedd,
  'pallatom': pallatom,
}


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the sections and prints their tables."""
  parser = argparse.ArgumentParser(
    prog='python -m structattn_jax.benchmark',
    description='Time and memory against published formulations.',
  )
  parser.add_argument(
    'sections',
    nargs='*',
    metavar='section',
    help=f'{", ".join(SECTIONS)}; default: all',
  )
  parser.add_argument('--quick', action='store_true', help='smaller sizes')
  parser.add_argument('--json', metavar='FILE', help='also write the numbers')
  parser.add_argument(
    '--no-rss',
    action='store_true',
    help='skip the resident memory, which takes a process per row',
  )
  options = parser.parse_args(arguments)
  for name in options.sections:
    if name not in SECTIONS:
      parser.error(f'section: expected one of {", ".join(SECTIONS)}; {name!r}')

  print(harness.format_environment(harness.environment()), flush=True)
  print(
    f'Programs with more than {harness.TEMP_LIMIT_BYTES / 1e9:g} GB of '
    'temporaries are not run.'
  )
  tables = {}
  for name in dict.fromkeys(options.sections or SECTIONS):
    print(f'\n== {name} ==\n{SECTIONS[name].__doc__}', flush=True)
    tables[name] = SECTIONS[name].run(
      quick=options.quick,
      rss=not options.no_rss,
      report=lambda table: print(
        harness.format_table(table) + '\n', flush=True
      ),
    )
  if options.json:
    harness.write_json(options.json, tables)
  return 0


if __name__ == '__main__':
  sys.exit(main())
