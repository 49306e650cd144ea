"""Published checkpoints as configurations and Haiku parameters.

One strict name table per upstream: every entry is used exactly once, else a
`CheckpointError` lists all that do not fit. Nothing in a file is ever executed.
"""

from structattn_jax.checkpoint import CheckpointError
from structattn_jax.convert.alphafold2 import (
  load_ipa,
  load_structure_module,
)
from structattn_jax.convert.alphafold3 import (
  load_atom_cross_att,
  load_diffusion_head,
  load_transformer,
  save_params,
)
from structattn_jax.convert.boltz import load_boltz
from structattn_jax.convert.files import (
  FORMATS,
  convert_file,
  describe,
  detect_format,
)
from structattn_jax.convert.pallatom import (
  load_atom_decoder,
  load_atom_encoder,
)
from structattn_jax.convert.sedd import load_sedd, load_sedd_dual_track
from structattn_jax.convert.state_dicts import DeadParametersWarning

__all__ = [
  'FORMATS',
  'CheckpointError',
  'DeadParametersWarning',
  'convert_file',
  'describe',
  'detect_format',
  'load_atom_cross_att',
  'load_atom_decoder',
  'load_atom_encoder',
  'load_boltz',
  'load_diffusion_head',
  'load_ipa',
  'load_sedd',
  'load_sedd_dual_track',
  'load_structure_module',
  'load_transformer',
  'save_params',
]
