"""Oracle of the seed document's token <-> atom cross attention."""

import numpy as np

from structattn_jax.reference import numerics


def token_to_atom(
  atoms: np.ndarray,
  tokens: np.ndarray,
  atom_to_token: np.ndarray,
  w_q: np.ndarray,
  w_k: np.ndarray,
  w_v: np.ndarray,
  w_o: np.ndarray,
  *,
  normalise: str = 'heads',
  atom_mask: np.ndarray | None = None,
) -> np.ndarray:
  """Each atom queries its token; [n_atom, c_atom]."""
  queries = np.einsum('ac,chd->ahd', numerics.layer_norm(atoms), w_q)
  keys = np.einsum('tc,chd->thd', numerics.layer_norm(tokens), w_k)
  values = np.einsum('tc,chd->thd', numerics.layer_norm(tokens), w_v)
  out = np.zeros(atoms.shape, np.float64)
  for a, t in enumerate(atom_to_token):
    if atom_mask is not None and not atom_mask[a]:
      continue
    logits = np.einsum('hd,hd->h', queries[a], keys[t]) / np.sqrt(w_q.shape[-1])
    if normalise == 'heads':
      weights = numerics.softmax(logits, axis=0)
    else:  # One key per atom: its weight is 1 in every head.
      weights = np.ones_like(logits)
    out[a] = np.einsum('h,hd,hdc->c', weights, values[t], w_o)
  return out


def atom_to_token(
  atoms: np.ndarray,
  tokens: np.ndarray,
  atom_to_token: np.ndarray,
  w_q: np.ndarray,
  w_k: np.ndarray,
  w_v: np.ndarray,
  w_o: np.ndarray,
  *,
  atom_mask: np.ndarray | None = None,
) -> np.ndarray:
  """Each token queries its atoms; [n_token, c_token], 0 without atoms."""
  queries = np.einsum('tc,chd->thd', numerics.layer_norm(tokens), w_q)
  keys = np.einsum('ac,chd->ahd', numerics.layer_norm(atoms), w_k)
  values = np.einsum('ac,chd->ahd', numerics.layer_norm(atoms), w_v)
  out = np.zeros(tokens.shape, np.float64)
  for t in range(len(tokens)):
    own = atom_to_token == t
    if atom_mask is not None:
      own = own & atom_mask
    if not own.any():
      continue
    logits = np.einsum('hd,ahd->ah', queries[t], keys[own])
    weights = numerics.softmax(logits / np.sqrt(w_q.shape[-1]), axis=0)
    pooled = np.einsum('ah,ahd->hd', weights, values[own])
    out[t] = np.einsum('hd,hdc->c', pooled, w_o)
  return out
