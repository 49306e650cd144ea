"""Attention systems of structural biology for JAX and Haiku.

  import structattn_jax as sa

  init, apply = sa.alphafold2.transform_ipa()

One namespace per system: `alphafold2`, `alphafold3`, `boltz`, `pallatom`,
`sedd`, and `seeds` for the simplified algorithms of the seed documents. What
belongs to no system is here: segment operations, geometry, norms, checks.
`sa.data` (structure files, extra `data`), `sa.diffusion`,
`sa.discrete_diffusion`, `sa.training`, `sa.convert`, `sa.verification` and
`sa.reference` (float64 oracles) are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from structattn_jax import geometry, testing
from structattn_jax.common.base_config import BaseConfig
from structattn_jax.common.checks import (
  check_dtypes,
  check_shapes,
  validate_rotations,
  validate_segment_ids,
  validate_sorted,
)
from structattn_jax.common.numerics import (
  layer_norm,
  masked_softmax,
  safe_norm,
)
from structattn_jax.components.haiku_modules import LayerNorm, Linear
from structattn_jax.components.segment import (
  max_segment_size,
  segment_attention,
  segment_broadcast,
  segment_max,
  segment_mean,
  segment_softmax,
  segment_sum,
)
from structattn_jax.geometry import Rigid
from structattn_jax.network import (
  alphafold2,
  alphafold3,
  boltz,
  pallatom,
  sedd,
  seeds,
)

if TYPE_CHECKING:
  from structattn_jax import (
    convert,
    data,
    diffusion,
    discrete_diffusion,
    reference,
    training,
    verification,
  )

__version__ = '0.1.0'

_LAZY = (
  'convert',
  'data',
  'diffusion',
  'discrete_diffusion',
  'reference',
  'training',
  'verification',
)

__all__ = [
  'BaseConfig',
  'LayerNorm',
  'Linear',
  'Rigid',
  'alphafold2',
  'alphafold3',
  'boltz',
  'check_dtypes',
  'check_shapes',
  'convert',
  'data',
  'diffusion',
  'discrete_diffusion',
  'geometry',
  'layer_norm',
  'masked_softmax',
  'max_segment_size',
  'pallatom',
  'reference',
  'safe_norm',
  'sedd',
  'seeds',
  'segment_attention',
  'segment_broadcast',
  'segment_max',
  'segment_mean',
  'segment_softmax',
  'segment_sum',
  'testing',
  'training',
  'validate_rotations',
  'validate_segment_ids',
  'validate_sorted',
  'verification',
]


def __getattr__(name: str) -> Any:
  if name in _LAZY:
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
