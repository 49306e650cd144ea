"""Oracle of the seed document's within-token atom attention and pooling."""

import numpy as np

from structattn_jax.reference import numerics


def token_attention_pool(
  atom_features: np.ndarray,
  atom_to_token: np.ndarray,
  num_tokens: int,
  w_q: np.ndarray,
  w_k: np.ndarray,
  w_v: np.ndarray,
  *,
  atom_mask: np.ndarray | None = None,
) -> np.ndarray:
  """Self-attention among the atoms of a token, then their mean."""
  x = numerics.layer_norm(atom_features)
  q = np.einsum('ac,chd->ahd', x, w_q)
  k = np.einsum('ac,chd->ahd', x, w_k)
  v = np.einsum('ac,chd->ahd', x, w_v)
  n_head, d_head = w_q.shape[1:]
  out = np.zeros((num_tokens, n_head, d_head), np.float64)
  for t in range(num_tokens):
    own = atom_to_token == t
    if atom_mask is not None:
      own = own & atom_mask
    if not own.any():
      continue
    logits = np.einsum('ahd,bhd->abh', q[own], k[own]) / np.sqrt(d_head)
    weights = numerics.softmax(logits, axis=1)
    out[t] = np.einsum('abh,bhd->ahd', weights, v[own]).mean(0)
  return out.reshape(num_tokens, n_head * d_head)
