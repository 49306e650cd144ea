"""Boltz-1's atom attention encoder and decoder at their released sizes.

128 channels of atoms, 16 of their pairs, windows of 32 x 128, 3 layers of 4
heads each; 8 atoms per token. Candidates:
  cached: `network.boltz.cached_atom_attention`.
  published: the released computation written out: one-hot matrices for windows
    and tokens, projections of keys after windows are formed, the pair of all
    windows.
  boltz: the torch modules themselves, with the same weights, where the packages
    `boltz`, `fairscale`, `einops`, `scipy` and `torch` can be imported (pip
    --no-deps is enough). The baseline, else 'published' is. Its gradients are
    timed, not compared. As many threads as torch chooses.

'forward' is the encoder from features to tokens; 'forward+backward' returns the
value of a scalar and its gradient with respect to parameters, single, pair and
positions; a 'step' is encoder and decoder of one denoising step, with all that
samples share computed before ('boltz': its own cache); on CPU 'cached' takes
one sample after the other; 'input embedding' is the encoder without trunk and
positions. Where a float64 reference would not fit, nothing is checked.
"""

import functools
import importlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.benchmark import harness
from structattn_jax.components import functional
from structattn_jax.components import parameters as pm
from structattn_jax.network.boltz import atom_attention as be
from structattn_jax.network.boltz import parameters as bp
from structattn_jax.network.boltz import transformers as bt

Mode = Literal[
  'forward',
  'forward+backward',
  'step, 1 sample',
  'step, 5 samples',
  'input embedding',
]
MODES: tuple[Mode, ...] = (
  'forward',
  'forward+backward',
  'step, 1 sample',
  'step, 5 samples',
  'input embedding',
)
SIZES = (1024, 4096, 8192, 20000)
QUICK_SIZES = (256,)

_ATOMS_PER_TOKEN = 8
# The published formulations grow with the square of the atoms; what takes
# minutes or most of the memory is left out.
_LARGEST_PUBLISHED = {'forward+backward': 8192, 'step, 5 samples': 8192}
_LARGEST_CHECKED = 1024
# The published formulation's own gradients in float32 are off by 2e-5.
_TOLERANCE = {'forward+backward': 5e-5}


def candidates() -> tuple[str, ...]:
  """Names of what can run here; the last is the baseline."""
  packages = ('torch', 'boltz', 'fairscale', 'einops', 'scipy')
  if all(importlib.util.find_spec(name) is not None for name in packages):
    return ('cached', 'published', 'boltz')
  return ('cached', 'published')


def run(
  *,
  quick: bool = False,
  rss: bool = True,
  report: Callable[[harness.Table], None] = lambda table: None,
) -> list[harness.Table]:
  """Measures all modes; arguments as `segment.run`.

  Args:
    quick: one small size, few repeats.
    rss: also measure the peak resident set, a new process for each row.
      Skipped off CPU, where arrays are not in host memory.
    report: called with each table as soon as it is there.

  Returns:
    One table per mode.
  """
  rss = rss and jax.default_backend() == 'cpu'
  names = candidates()
  tables = []
  for mode in MODES:
    rows: list[harness.Measurement] = []
    for n_atom in QUICK_SIZES if quick else SIZES:
      chosen = names
      if n_atom > _LARGEST_PUBLISHED.get(mode, n_atom):
        chosen = names[:1]
      args = inputs(mode, n_atom)
      checked = n_atom <= _LARGEST_CHECKED
      measured = harness.compare(
        {name: _candidate(mode, name) for name in chosen},
        args,
        case=f'{n_atom} atoms',
        want=expected(mode, args) if checked else None,
        repeats=3 if quick else 20,
        budget_seconds=6.0,
        tolerance=_TOLERANCE.get(mode, harness.TOLERANCE),
      )
      del args
      if rss:
        measured = [
          harness.with_peak_rss(row, build, mode, n_atom, row.candidate)
          for row in measured
        ]
      rows += measured
    title = f'Boltz-1 atom attention, {mode}'
    tables.append(
      harness.Table(title=title, baseline=names[-1], rows=tuple(rows))
    )
    report(tables[-1])
  return tables


def build(
  mode: Mode, n_atom: int, candidate: str
) -> tuple[Callable[..., Any] | harness.External, Sequence[Any]]:
  """The function of a candidate and its arguments, for a new process."""
  return _candidate(mode, candidate), inputs(mode, n_atom)


def inputs(mode: Mode, n_atom: int) -> tuple[Any, ...]:
  """params, features and what the mode takes; the same for all candidates.

  A step takes positions and what is decoded, with a leading axis of samples;
  what samples share is the last argument, that of 'cached' in its context.
  """
  rng = np.random.default_rng(0)
  config = _config(mode)
  n_token = n_atom // _ATOMS_PER_TOKEN

  def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32))

  params = {
    module: {
      name: (
        normal(*p.shape) * p.shape[0] ** -0.5
        if len(p.shape) > 1
        else normal(*p.shape) * 0.1 + (name == 'scale')
      )
      for name, p in arrays.items()
    }
    for module, arrays in bp.atom_attention_parameters(config).items()
  }
  token = np.arange(n_atom) // _ATOMS_PER_TOKEN
  features = be.BoltzAtomFeatures(
    ref_pos=3 * normal(n_atom, 3),
    ref_charge=jnp.zeros(n_atom),
    ref_element=jnp.asarray(rng.integers(1, 20, n_atom)),
    ref_atom_name_chars=jnp.asarray(rng.integers(0, 64, (n_atom, 4))),
    ref_space_uid=jnp.asarray(token),
    atom_mask=jnp.ones(n_atom, bool),
    atom_to_token=jnp.asarray(token),
    num_tokens=n_token,
  )
  if mode == 'input embedding':
    return params, features
  single = normal(n_token, config.token_s)
  pair = normal(n_token, n_token, config.token_z)
  if mode in ('forward', 'forward+backward'):
    return params, features, single, pair, normal(n_atom, 3)
  samples = 5 if mode == 'step, 5 samples' else 1
  precompute = be.cached_atom_attention(config).precompute
  context = jax.jit(precompute)(params, features, single, pair)
  positions = normal(samples, n_atom, 3)
  token_act = normal(samples, n_token, 2 * config.token_s)
  return params, features, single, pair, positions, token_act, context


def expected(mode: Mode, args: Sequence[Any]) -> Any:
  """The result of 'published' in float64, of the float32 arguments."""
  return harness.in_float64(function(mode, 'published'), args)


def _config(mode: Mode) -> be.Boltz1AtomAttentionConfig:
  is_step = mode in ('step, 1 sample', 'step, 5 samples')
  return be.Boltz1AtomAttentionConfig(
    structure_prediction=mode != 'input embedding',
    atom_decoder_depth=3 if is_step else 0,
  )


def _candidate(mode: Mode, name: str) -> Callable[..., Any] | harness.External:
  if name == 'boltz':
    return harness.External(functools.partial(_boltz, mode))
  return function(mode, name)


def function(mode: Mode, candidate: str) -> Callable[..., Any]:
  """A JAX candidate as a function of `inputs`."""
  config = _config(mode)
  _, precompute, encode, decode = be.cached_atom_attention(config)

  def forward(params, features, single=None, pair=None, positions=None):
    if candidate == 'published':
      shared = _published_shared(params, features, single, pair)
      return published_encode(params, features, shared, positions)
    context = precompute(params, features, single, pair)
    encoded = encode(params, context, positions)
    return encoded.tokens, encoded.atoms

  if mode in ('forward', 'input embedding'):
    return forward

  if mode == 'forward+backward':

    def forward_backward(params, features, *floats):
      def loss(params, *floats):
        found = forward(params, features, *floats)
        return sum(jnp.mean(jnp.sin(x)) for x in found)

      value, (by_params, *by_floats) = jax.value_and_grad(
        loss, argnums=(0, 1, 2, 3)
      )(params, *floats)
      # The softmax cancels these offsets: their gradient is rounding alone.
      by_params = {
        module: {
          name: x
          for name, x in arrays.items()
          if not (name == 'offset' and module.endswith('proj_z_0'))
        }
        for module, arrays in by_params.items()
      }
      return value, by_params, *by_floats

    return forward_backward

  def step(params, features, single, pair, positions, token_act, context):
    del single, pair  # In the context.

    def one(positions, token_act):
      if candidate == 'cached':
        encoded = encode(params, context, positions)
        return encoded.tokens, decode(params, context, token_act, encoded.atoms)
      shared = (context.queries, context.conditioning, context.encoder.biases)
      tokens, atoms = published_encode(params, features, shared, positions)
      shared = (atoms, context.conditioning, context.decoder.biases)
      return tokens, published_decode(params, features, shared, token_act)

    if candidate == 'cached' and jax.default_backend() == 'cpu':
      return jax.lax.map(lambda x: one(*x), (positions, token_act))
    return jax.vmap(one)(positions, token_act)

  return step


# The released computation, written out.


def _one_hot_keys(n_window: int) -> jax.Array:
  """Half windows to keys: [2 n_window, 8 n_window]."""
  first = 2 * np.arange(n_window)[:, None] - 3 + np.arange(8)
  return jax.nn.one_hot(first.reshape(-1), 2 * n_window).T


def _to_keys(x: jax.Array) -> jax.Array:
  """[n_atom, c] to [n_window, 128, c]."""
  n_atom, channels = x.shape
  n_window = n_atom // 32
  halves = x.reshape(2 * n_window, 16, channels)
  keys = jnp.einsum('jid,jk->kid', halves, _one_hot_keys(n_window))
  return keys.reshape(n_window, 128, channels)


def _one_hot_tokens(features: be.BoltzAtomFeatures) -> jax.Array:
  return jax.nn.one_hot(features.atom_to_token, features.num_tokens)


def _published_shared(params, features, single, pair):
  """q, c and the biases of the encoder's layers."""
  own = pm.below(params, 'atom_attention_encoder/')
  n_atom = len(features.ref_pos)
  n_window = n_atom // 32
  tokens = _one_hot_tokens(features)
  mask = features.atom_mask[:, None].astype(features.ref_pos.dtype)
  c = jnp.concatenate(
    [
      features.ref_pos,
      features.ref_charge[:, None],
      mask,
      jax.nn.one_hot(features.ref_element, 128),
      jax.nn.one_hot(features.ref_atom_name_chars, 64).reshape(n_atom, 256),
    ],
    -1,
  )
  q = c = functional.linear(own, 'embed_atom_features', c)

  def pairs(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x.reshape(n_window, 32, 1, -1), _to_keys(x)[:, None]

  a, b = pairs(features.ref_pos)
  d = b - a
  closeness = 1 / (1 + jnp.sum(d * d, -1, keepdims=True))
  a, b = pairs(mask)
  c_uid, d_uid = pairs(features.ref_space_uid[:, None].astype(mask.dtype))
  v = a * b * (c_uid == d_uid)
  p = functional.linear(own, 'embed_atompair_ref_pos', d) * v
  p = p + functional.linear(own, 'embed_atompair_ref_dist', closeness) * v
  p = p + functional.linear(own, 'embed_atompair_mask', v) * v
  if single is not None:
    s = functional.layer_norm(own, 's_to_c_trans_0', single)
    c = c + tokens @ functional.linear(own, 's_to_c_trans_1', s)
    z = bt.pair_bias(own, 'z_to_p_trans', pair)
    p = p + jnp.einsum(
      'ijd,wki,wlj->wkld',
      z,
      tokens.reshape(n_window, 32, -1),
      _to_keys(tokens),
    )
  a, b = pairs(c)
  p = p + functional.linear(own, 'c_to_p_trans_q_1', jax.nn.relu(a))
  p = p + functional.linear(own, 'c_to_p_trans_k_1', jax.nn.relu(b))
  hidden = p
  for i in (1, 3, 5):
    hidden = functional.linear(own, f'p_mlp_{i}', jax.nn.relu(hidden))
  p = p + hidden
  biases = [
    jnp.moveaxis(bt.pair_bias(layer, 'pair_bias_attn/proj_z', p), -1, 1)
    for layer in bt.layers(pm.below(own, 'atom_encoder/diffusion_transformer/'))
  ]
  return q, c, biases


def _published_transformer(params, q, c, biases, mask):
  """Projections of keys after windows are formed."""
  n_window, n_head, _, _ = biases[0].shape
  is_key = _to_keys(mask[:, None].astype(q.dtype))[..., 0]

  def windows(x: jax.Array) -> jax.Array:
    return x.reshape(n_window, 32, -1)

  for own, bias in zip(bt.layers(params), biases, strict=True):
    b = bt.ada_ln(pm.below(own, 'adaln/'), q, c)
    attention = pm.below(own, 'pair_bias_attn/')
    keys = _to_keys(b)

    def heads(x: jax.Array) -> jax.Array:
      return x.reshape(n_window, x.shape[1], n_head, -1)

    query = heads(functional.linear(attention, 'proj_q', windows(b)))
    key = heads(functional.linear(attention, 'proj_k', keys))
    value = heads(functional.linear(attention, 'proj_v', keys))
    logits = jnp.einsum('wihd,wjhd->whij', query, key)
    logits = logits / query.shape[-1] ** 0.5 + bias
    logits = logits + (1 - is_key[:, None, None]) * -1e6
    out = jnp.einsum('whij,wjhd->wihd', jax.nn.softmax(logits), value)
    gate = jax.nn.sigmoid(functional.linear(attention, 'proj_g', b))
    out = functional.linear(attention, 'proj_o', gate * out.reshape(b.shape))
    scale = jax.nn.sigmoid(
      functional.linear(own, 'output_projection_linear', c)
    )
    q = q + scale * out
    q = q + bt.conditioned_transition(pm.below(own, 'transition/'), q, c)
  return q


def published_encode(params, features, shared, positions):
  """Tokens and atoms from q, c and the biases of the encoder's layers."""
  own = pm.below(params, 'atom_attention_encoder/')
  q, c, biases = shared
  if positions is not None:
    q = q + functional.linear(own, 'r_to_q_trans', positions)
  stack = pm.below(own, 'atom_encoder/diffusion_transformer/')
  q = _published_transformer(stack, q, c, biases, features.atom_mask)
  act = jax.nn.relu(functional.linear(own, 'atom_to_token_trans_0', q))
  tokens = _one_hot_tokens(features)
  mean = tokens / (jnp.sum(tokens, 0) + 1e-6)
  return mean.T @ act, q


def published_decode(params, features, shared, token_act):
  """The update from q, c and the biases of the decoder's layers."""
  own = pm.below(params, 'atom_attention_decoder/')
  q, c, biases = shared
  act = functional.linear(own, 'a_to_q_trans', token_act)
  q = q + _one_hot_tokens(features) @ act
  stack = pm.below(own, 'atom_decoder/diffusion_transformer/')
  q = _published_transformer(stack, q, c, biases, features.atom_mask)
  q = functional.layer_norm(own, 'atom_feat_to_atom_pos_update_0', q)
  return functional.linear(own, 'atom_feat_to_atom_pos_update_1', q)


# The published torch modules.


def _boltz(mode: Mode, *args: Any) -> Callable[[], Any]:
  """The modules of the package, with our parameters and inputs."""
  torch: Any = importlib.import_module('torch')
  encoders: Any = importlib.import_module('boltz.model.modules.encoders')
  params, features, *rest = args
  config = _config(mode)
  structure = config.structure_prediction
  encoder = encoders.AtomAttentionEncoder(
    *(128, 16, 384, 128, 32, 128, 389), structure_prediction=structure
  )
  decoder = encoders.AtomAttentionDecoder(128, 16, 384, 32, 128)

  def tensor(x: Any) -> Any:
    return torch.from_numpy(np.array(x))

  load_torch(torch, encoder, pm.below(params, 'atom_attention_encoder/'))
  if config.has_decoder:
    load_torch(torch, decoder, pm.below(params, 'atom_attention_decoder/'))
  one_hot = torch.nn.functional.one_hot
  feats = {
    'ref_pos': tensor(features.ref_pos)[None],
    'ref_charge': tensor(features.ref_charge)[None],
    'atom_pad_mask': tensor(features.atom_mask)[None].float(),
    'ref_element': one_hot(tensor(features.ref_element).long(), 128)[None],
    'ref_atom_name_chars': one_hot(
      tensor(features.ref_atom_name_chars).long(), 64
    )[None],
    'ref_space_uid': tensor(features.ref_space_uid)[None].long(),
    'atom_to_token': one_hot(
      tensor(features.atom_to_token).long(), features.num_tokens
    )[None],
  }
  floats = [tensor(x) for x in rest[:4]]
  if mode in ('forward', 'input embedding'):

    def forward() -> Any:
      with torch.no_grad():
        tokens, atoms, *_ = encoder(feats, *(x[None] for x in floats))
        return tokens[0].numpy(), atoms[0].numpy()

    return forward

  if mode == 'forward+backward':
    leaves = [x[None].requires_grad_() for x in floats]

    def forward_backward() -> None:
      encoder.zero_grad()
      for x in leaves:
        x.grad = None
      tokens, atoms, *_ = encoder(feats, *leaves)
      (torch.sin(tokens).mean() + torch.sin(atoms).mean()).backward()

    return forward_backward

  single, pair, positions, token_act = floats
  samples, cache = len(positions), {}

  def step() -> Any:
    with torch.no_grad():
      tokens, q, c, p, to_keys = encoder(
        feats, single[None], pair[None], positions, samples, cache
      )
      update = decoder(token_act, q, c, p, feats, to_keys, samples, cache)
      return tokens.numpy(), update.numpy()

  step()  # Fills the cache.
  return step


def load_torch(torch: Any, module: Any, params: pm.Params) -> None:
  """Our parameters into a torch module, by name."""
  own = {
    f'{scope}/{name}': x for scope, y in params.items() for name, x in y.items()
  }
  with torch.no_grad():
    for name, target in module.named_parameters():
      path, _, kind = name.rpartition('.')
      path = re.sub(r'\.(\d+)', r'_\1', path).replace('.', '/')
      is_norm = f'{path}/scale' in own
      ours = {'weight': 'weights', 'bias': 'bias'}[kind]
      if is_norm:
        ours = {'weight': 'scale', 'bias': 'offset'}[kind]
      value = np.array(own[f'{path}/{ours}']).T
      if path.endswith('r_to_q_trans'):
        # Boltz-1's other columns only ever meet zeros.
        value = np.pad(value, ((0, 0), (0, target.shape[1] - 3)))
      target.copy_(torch.from_numpy(np.ascontiguousarray(value)))
