"""The DetailFlow tokenizer in its published names and its published configuration."""

from typing import Any

import numpy as np

from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.mapping import Entry, linear
from detailflow_jax.convert.settings import Settings
from detailflow_jax.convert.tables import siglip
from detailflow_jax.models.siglip import ViTConfig
from detailflow_jax.models.tokenizer import TokenizerConfig

ALIGNMENT = "global_token_proj."
REPA = "projection."
_USAGE = "quantize.codebook_used"
_USAGE_LENGTH = 65_536

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
    *linear(f"{ALIGNMENT}0", "align_layers_0"),
    *linear(f"{ALIGNMENT}2", "align_layers_1"),
    *linear(f"{ALIGNMENT}4", "align_layers_2"),
    *linear(f"{REPA}0", "repa_layers_0"),
    *linear(f"{REPA}2", "repa_layers_1"),
    *linear(f"{REPA}4", "repa_layers_2"),
    Entry("quantize.embedding.weight", ("codebook",)),
)

SKIPPED = ("repa_model.", ALIGNMENT, REPA, _USAGE)
"""The frozen teacher, the projections for alignment where they are not asked for (of the first code
and of the decoder's tokens), a usage counter."""

TEACHER = siglip.trunk("repa_model.visual_model", "")
"""The frozen alignment teacher inside a training checkpoint."""

SIGNS = ("encoder.latent_tokens", "quantize.embedding.weight", "decoder.mask_token")
"""Names by which such a checkpoint is known."""

_LAYERS = {"siglip2_base": 12, "siglip2_large": 16, "siglip2": 27}
_PRETRAINED = ViTConfig()
_FROM_SCRATCH = ViTConfig(width=768, depth=12, num_heads=12, mlp_dim=3072)


def buffers(config: TokenizerConfig) -> dict[str, np.ndarray]:
    """The buffers that strict loading asks for besides: zeros."""
    del config
    return {_USAGE: np.zeros(_USAGE_LENGTH, np.float32)}


def infer_config(s: Settings) -> TokenizerConfig:
    """The network that these tensors are of.

    Overrides are its fields, `encoder_num_heads` and `decoder_num_heads`.
    """
    s.fields["causal_encoder"] = _causal_encoder(s)
    s.only("causal_decoder", False, "so its decoder is causal")
    s.only("codebook_l2_norm", True, "so its codes are not normalised")
    heads = {part: s.overrides.pop(f"{part}_num_heads", None) for part in ("encoder", "decoder")}
    trunks = {part: _trunk(part, s, heads[part]) for part in heads}
    table = "quantize.embedding.weight"
    s.by_shape("codebook_size", s.size(table, 0), ["codebook_size"])
    s.by_shape("codebook_dim", s.size(table, 1), ["codebook_embed_dim"])
    s.by_shape("num_tokens", s.size("encoder.latent_tokens", 1, 3), ["num_latent_tokens"])
    s.told("group_size", int, default=8, why="as in every published model")
    s.told("causal_num", int, signed=True)  # 0 is allowed; the network checks the rest
    s.told(
        "image_size",
        int,
        ["max_image_size", "image_size"],
        default=trunks["encoder"].table_side * trunks["encoder"].patch_size,
        why="the size that the position table was made for",
    )
    s.told("resolution_power", float, ["degradation_power"], default=1.5)
    s.fields |= trunks
    return s.build(TokenizerConfig, ["teacher_width", "repa_layer", "dtype", "scan", "remat"])


def _causal_encoder(s: Settings) -> bool:
    """The override, the published field, or True."""
    value = s.overrides.pop("causal_encoder", s.published.get("causal_encoder", True))
    if not isinstance(value, bool):
        raise CheckpointError(f"{s.source}: causal_encoder={value!r}", expected="true or false")
    return value


def _trunk(part: str, s: Settings, num_heads: int | None) -> ViTConfig:
    """Sizes of the encoder's or decoder's trunk; heads by override, ours beside it, or width."""
    name = f"{part}.visual_model"
    patches, axis = f"{name}.embeddings.patch_embedding.weight", 1
    if part == "decoder":
        patches, axis = "decoder.to_pixel.model.weight", 0
    config = siglip.infer_trunk(
        s,
        name,
        num_heads or s.published.get(f"{part}_num_heads"),
        override=f"{part}_num_heads",
        pixels=s.size(patches, axis),
    )
    s.check(config.patch_size, [f"{part[:3]}_patch_size"])
    model, pretrained = (s.published.get(k) for k in (f"{part}_model", f"{part[:3]}_pretrained"))
    if model in _LAYERS and _LAYERS[model] != config.depth:
        s.contradict(f"{part}_model", f"{model!r}, {_LAYERS[model]} layers", config.depth)
    if model == "siglip2_base" and isinstance(pretrained, bool):
        width = (_PRETRAINED if pretrained else _FROM_SCRATCH).width
        if config.width != width:
            s.contradict(f"{part[:3]}_pretrained", f"{pretrained}, width {width}", config.width)
    return config


def describe(config: TokenizerConfig) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The published configuration of a network.

    Returns:
      `config.json`, exactly fields that the published code knows; what `config.yaml` holds beside
      them (what it evaluates with, and what no published field can say); notices.
    """
    both: dict[str, Any] = {
        "image_size": config.image_size,
        "max_image_size": config.image_size,
        "codebook_size": config.codebook_size,
        "codebook_embed_dim": config.codebook_dim,
        # Not of this network; the published loader drops these two, and fails without them.
        "encoder_ch_mult": [1, 1, 2, 2, 4],
        "decoder_ch_mult": [1, 1, 2, 2, 4],
        "num_latent_tokens": config.num_tokens,
        "group_size": config.group_size,
        "causal_num": config.causal_num,
        "causal_encoder": config.causal_encoder,
        "causal_decoder": False,
        "correction_training": True,  # Else the published network lacks `refine_conv`.
        "global_token_loss_weight": 0.0,  # Else it builds, and asks the file for, the teacher.
    }
    extra = {
        "vq_model": "VQ-16",
        "content_degradation": "resolution_power",
        "degradation_power": config.resolution_power,
        "min_image_size": config.image_size,
    }
    notices = []
    for part in ("encoder", "decoder"):
        trunk, short = getattr(config, part), part[:3]
        both |= {f"{short}_type": "siglip2", f"{short}_patch_size": trunk.patch_size}
        named = _published_name(trunk)
        if named:
            both |= {f"{part}_model": named[0], f"{short}_pretrained": named[1]}
        else:
            notices.append(
                f"the {part} ({trunk.depth} layers of width {trunk.width}) is none of the published"
                f" sizes, so {part}_model is left out and the published code cannot build it"
            )
        extra[f"{part}_num_heads"] = trunk.num_heads
    return both, extra, notices


def _published_name(trunk: ViTConfig) -> tuple[str, bool] | None:
    """What the published configuration calls a trunk: (model, whether pretrained)."""
    for name, depth in _LAYERS.items():
        if _same_block(trunk, _PRETRAINED) and trunk.depth == depth:
            return name, True
    if _same_block(trunk, _FROM_SCRATCH) and trunk.depth == _FROM_SCRATCH.depth:
        return "siglip2_base", False
    return None


def _same_block(a: ViTConfig, b: ViTConfig) -> bool:
    return (a.width, a.num_heads, a.mlp_dim, a.table_side) == (
        b.width, b.num_heads, b.mlp_dim, b.table_side,
    )  # fmt: skip
