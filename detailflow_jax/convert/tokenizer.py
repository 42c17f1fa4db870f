"""The DetailFlow tokenizer in its published names."""

from detailflow_jax.convert import siglip
from detailflow_jax.convert.mapping import Entry, linear

TABLE = (
    Entry("encoder.latent_pos_embed", ("encoder/latent_positions",), lead=1),
    Entry("encoder.latent_tokens", ("encoder/latent_tokens",), lead=1),
    Entry("encoder.refined_tokens", ("encoder/refined_tokens",), lead=1),
    *siglip.trunk("encoder.visual_model", "encoder/trunk"),
    Entry("decoder.latent_pos_embed", ("decoder/latent_positions",), lead=1),
    Entry("decoder.mask_token", ("decoder/mask_token",), lead=1),
    *siglip.trunk("decoder.visual_model", "decoder/trunk", patches=False),
    *linear("decoder.to_pixel.model", "decoder/to_pixels"),
    *linear("quant_conv", "quant_conv"),
    *linear("post_quant_conv", "post_quant_conv"),
    *linear("refine_conv", "refine_conv"),
    *linear("global_token_proj.0", "align_layers_0"),
    *linear("global_token_proj.2", "align_layers_1"),
    *linear("global_token_proj.4", "align_layers_2"),
    Entry("quantize.embedding.weight", ("codebook",)),
)

SKIPPED = ("repa_model.", "global_token_proj.", "quantize.codebook_used")
"""The frozen teacher, the alignment projection where it is not asked for, a usage counter."""

TEACHER = siglip.trunk("repa_model.visual_model", "")
"""The frozen alignment teacher inside a training checkpoint."""
