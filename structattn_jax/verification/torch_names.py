"""Parameters of torch code as Haiku parameters.

The inverse of `systems.torch_names`.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np


def haiku_params(
  state: Mapping[str, np.ndarray], scope: str
) -> dict[str, dict[str, Any]]:
  """A state dict below `scope`, with our names and orientation.

  'blocks.0.to_q.weight' [out, in] becomes 'blocks_0/to_q' `weights` [in, out].
  """
  params: dict[str, dict[str, Any]] = {}
  for name, value in state.items():
    local = re.sub(r'(blocks|mlp|mlp_p)\.(\d+)', r'\1_\2', name)
    *path, kind = local.split('.')
    if path and path[-1] == 'embedding':
      kind, path = 'embedding', path[:-1]
    elif path and path[-1].startswith('norm'):
      kind = {'weight': 'scale', 'bias': 'offset'}[kind]
    elif kind == 'weight':
      kind, value = 'weights', value.T
    params.setdefault('/'.join([scope, *path]), {})[kind] = value
  return params
