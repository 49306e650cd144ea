"""Published checkpoints as configurations and Haiku parameters.

One strict name table per upstream: every entry is used exactly once, else a
`CheckpointError` lists all that do not fit. Nothing is ever unpickled.
"""

from structattn_jax.checkpoint import CheckpointError
from structattn_jax.convert.alphafold2 import (
  load_ipa,
  load_structure_module,
)
from structattn_jax.convert.files import (
  PARTS,
  convert_file,
  describe,
  detect_format,
)

__all__ = [
  'PARTS',
  'CheckpointError',
  'convert_file',
  'describe',
  'detect_format',
  'load_ipa',
  'load_structure_module',
]
