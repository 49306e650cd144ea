"""Golden files run again through the public API, one file per system.

`structattn_jax.verify` finds the files and asks this registry.
"""

import contextlib

import jax

from structattn_jax.verification import alphafold2 as af2_ipa
from structattn_jax.verification import alphafold2_geometry as af2_geometry
from structattn_jax.verification import alphafold3 as af3_atom_cross_attention
from structattn_jax.verification import (
  alphafold3_diffusion_head as af3_diffusion_head,
)
from structattn_jax.verification import boltz as boltz_atom_encoder
from structattn_jax.verification import (
  boltz_diffusion,
  pallatom,
  sedd,
  sedd_diffusion,
  seeds,
)
from structattn_jax.verification.golden import (
  Golden,
  GoldenError,
  NotAGoldenError,
  Replay,
  Row,
  judge,
)

__all__ = [
  'REPLAYS',
  'Golden',
  'GoldenError',
  'NotAGoldenError',
  'Replay',
  'Row',
  'is_known',
  'run',
]

# (system, kind), as `meta` names them.
REPLAYS: dict[tuple[str, str], Replay] = {
  ('af2_ipa', 'ipa_mono'): af2_ipa.attention,
  ('af2_ipa', 'ipa_multi'): af2_ipa.attention,
  ('af2_ipa', 'structure_module_mono'): af2_ipa.structure,
  ('af2_ipa', 'structure_module_multi'): af2_ipa.structure,
  ('af2_ipa', 'residue_tables'): af2_geometry.residue_tables,
  ('af2_ipa', 'geometry'): af2_geometry.geometry_and_fape,
  (
    'af3_atom_cross_attention',
    'seed_token_atom_attention',
  ): seeds.token_atom_attention,
  **{
    ('af3_atom_cross_attention', kind): replay
    for kind, replay in (
      ('blocks', af3_atom_cross_attention.blocks),
      ('encoder', af3_atom_cross_attention.encoder_decoder),
      ('encoder_decoder', af3_atom_cross_attention.encoder_decoder),
      ('token_transformer', af3_atom_cross_attention.token_transformer),
      ('windows', af3_atom_cross_attention.windows),
    )
  },
  ('af3_diffusion_head', 'head'): af3_diffusion_head.head,
  ('af3_diffusion_head', 'sampler'): af3_diffusion_head.sampler,
  ('boltz_atom_encoder', 'seed_token_attention'): seeds.token_attention,
  **{
    ('boltz_atom_encoder', kind): boltz_atom_encoder.encoder_decoder
    for kind in (
      'boltz1_encoder',
      'boltz1_encoder_decoder',
      'boltz2_encoder',
      'boltz2_encoder_decoder',
    )
  },
  ('boltz_atom_encoder', 'conditioning'): boltz_atom_encoder.blocks,
  ('boltz_diffusion', 'boltz1'): boltz_diffusion.module,
  ('boltz_diffusion', 'boltz2'): boltz_diffusion.module,
  ('pallatom_atom_transformers', 'build_sparse_pairs'): pallatom.sparse_pairs,
  ('pallatom_atom_transformers', 'AtomTransformer'): pallatom.atom_transformer,
  (
    'pallatom_atom_transformers',
    'AtomFeatureEncoder',
  ): pallatom.feature_encoder,
  (
    'pallatom_atom_transformers',
    'AtomAttentionDecoder',
  ): pallatom.attention_decoder,
  (
    'pallatom_atom_transformers',
    'encoder+decoders',
  ): pallatom.encoder_and_decoders,
  ('sedd_protein_ligand', 'dual_components'): sedd.dual_components,
  ('sedd_protein_ligand', 'dual_full_width'): sedd.dual_modes,
  ('sedd_protein_ligand', 'dual_modes'): sedd.dual_modes,
  ('sedd_protein_ligand', 'dual_sampler'): sedd_diffusion.dual_sampler,
  ('sedd_protein_ligand', 'graph_noise'): sedd_diffusion.graph_noise,
  ('sedd_protein_ligand', 'sampler'): sedd_diffusion.sampler,
  ('sedd_protein_ligand', 'single'): sedd.single,
  ('sedd_protein_ligand', 'single_v100'): sedd.single_v100,
}


def is_known(golden: Golden) -> bool:
  """Whether there is a replay of this kind."""
  return (golden.meta['system'], golden.meta['kind']) in REPLAYS


def run(golden: Golden) -> list[Row]:
  """Runs one golden on the present device and compares every array.

  Raises:
    NotAGoldenError: if there is no replay of this kind.
    GoldenError: if the file lacks something that its kind needs.
  """
  system, kind = golden.meta['system'], golden.meta['kind']
  if not is_known(golden):
    raise NotAGoldenError(f'no replay of {system} {kind!r}')
  try:
    # Parity is about the algorithm, not about TF32 or bfloat16 units.
    with (
      jax.default_matmul_precision('highest'),
      jax.enable_x64(True) if golden.is_float64 else contextlib.nullcontext(),
    ):
      compared = list(REPLAYS[system, kind](golden))
  except GoldenError:
    raise
  except Exception as error:
    # Whatever it is: that a golden cannot be run must not look like a crash,
    # whose exit status is that of a difference.
    raise GoldenError(
      f'{golden.case}: cannot be replayed as {system} {kind!r}: '
      f'{type(error).__name__}: {error}'
    ) from error
  return judge(golden.case, compared, is_float64=golden.is_float64)
