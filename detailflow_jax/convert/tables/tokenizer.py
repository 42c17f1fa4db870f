"""The DetailFlow tokenizer in its published names and its published configuration."""

import dataclasses

import numpy as np

from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.mapping import Entry, linear
from detailflow_jax.convert.network import Description, Network, any_of, image
from detailflow_jax.convert.settings import Settings, published_fields
from detailflow_jax.convert.tables import siglip
from detailflow_jax.models.siglip import ViTConfig
from detailflow_jax.models.tokenizer import Tokenizer, TokenizerConfig
from detailflow_jax.tasks import tokenizer as task

ALIGNMENT, REPA = "global_token_proj.", "projection."
"""Projections for alignment with the teacher, of the first code and of the decoder's tokens."""

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
    *(
        entry
        for name, path in ((ALIGNMENT, "align_layers"), (REPA, "repa_layers"))
        for i in range(3)  # a SiLU after the first and after the second
        for entry in linear(f"{name}{2 * i}", f"{path}_{i}")
    ),
    Entry("quantize.embedding.weight", ("codebook",)),
)

SKIPPED = ("repa_model.", ALIGNMENT, REPA, _USAGE)
"""The frozen teacher, the projections where they are not asked for, a usage counter."""

TEACHER = siglip.trunk("repa_model.visual_model", "")
"""The frozen alignment teacher inside a training checkpoint."""

_NAMES = {
    "codebook_size": "codebook_size",
    "codebook_dim": "codebook_embed_dim",
    "num_tokens": "num_latent_tokens",
    "group_size": "group_size",
    "causal_num": "causal_num",
    "causal_encoder": "causal_encoder",
    "image_size": ("max_image_size", "image_size"),
}
_LAYERS = {"siglip2_base": 12, "siglip2_large": 16, "siglip2": 27}
_PRETRAINED = ViTConfig()
_FROM_SCRATCH = ViTConfig(width=768, depth=12, num_heads=12, mlp_dim=3072)


def infer_config(s: Settings) -> TokenizerConfig:
    """The network that these tensors are of.

    Overrides are its fields, `encoder_num_heads` and `decoder_num_heads`.
    """
    s.fields["causal_encoder"] = _flag(s, "causal_encoder", True)
    s.only("causal_decoder", False, "so its decoder is causal")
    s.only("codebook_l2_norm", True, "so its codes are not normalised")
    s.fields["overlap"] = _flag(s, "overlap", False)
    trunks = {part: _trunk(part, s) for part in ("encoder", "decoder")}
    table = "quantize.embedding.weight"
    s.by_shape("codebook_size", s.size(table, 0))
    s.by_shape("codebook_dim", s.size(table, 1))
    s.by_shape("num_tokens", s.size("encoder.latent_tokens", 1, 3))
    s.told("group_size", int, default=8, why="as in every published model")
    s.told("causal_num", int, signed=True)  # 0 is allowed; the network checks the rest
    side = trunks["encoder"].table_side * trunks["encoder"].patch_size
    s.told("image_size", int, default=side, why="the size that the position table was made for")
    s.told("resolution_power", float, default=1.5)
    s.fields |= trunks
    return s.build(TokenizerConfig)


def _flag(s: Settings, name: str, default: bool) -> bool:
    """The override, the field beside the weights, or the default."""
    value = s.overrides.pop(name, s.published.get(name, default))
    if not isinstance(value, bool):
        raise CheckpointError(f"{s.source}: {name}={value!r:.99}", expected="true or false")
    return value


def _trunk(part: str, s: Settings) -> ViTConfig:
    """Sizes of the encoder's or decoder's trunk; heads by override, ours beside it, or width."""
    name, heads = f"{part}.visual_model", f"{part}_num_heads"
    if part == "encoder":
        pixels = s.size(f"{name}.embeddings.patch_embedding.weight", 1)
    else:
        pixels = s.size("decoder.to_pixel.model.weight", 0) // (4 if s.fields["overlap"] else 1)
    config = siglip.infer_trunk(
        s,
        name,
        s.overrides.pop(heads, None) or s.published.get(heads),
        override=heads,
        pixels=pixels,
    )
    s.check(f"{part[:3]}_patch_size", config.patch_size)
    model, pretrained = (s.published.get(k) for k in (f"{part}_model", f"{part[:3]}_pretrained"))
    if isinstance(model, str) and _LAYERS.get(model, config.depth) != config.depth:
        s.contradict(f"{part}_model", f"{model!r}, {_LAYERS[model]} layers", config.depth)
    if model == "siglip2_base" and isinstance(pretrained, bool):
        width = (_PRETRAINED if pretrained else _FROM_SCRATCH).width
        if config.width != width:
            s.contradict(f"{part[:3]}_pretrained", f"{pretrained}, width {width}", config.width)
    return config


def describe(config: TokenizerConfig) -> Description:
    """See `Network.describe`."""
    both = published_fields(config, _NAMES) | {
        "image_size": config.image_size,
        # Not of this network; the published loader drops these two, and fails without them.
        "encoder_ch_mult": [1, 1, 2, 2, 4],
        "decoder_ch_mult": [1, 1, 2, 2, 4],
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
    notices, unnamed = [], []
    if config.overlap:
        extra["overlap"] = True
        notices.append("the decoder's patches overlap: the published code has no such decoder")
    for part in ("encoder", "decoder"):
        trunk, short = getattr(config, part), part[:3]
        both |= {f"{short}_type": "siglip2", f"{short}_patch_size": trunk.patch_size}
        extra[f"{part}_num_heads"] = trunk.num_heads
        if named := _published_name(trunk):
            both |= {f"{part}_model": named[0], f"{short}_pretrained": named[1]}
            continue
        unnamed.append(dataclasses.replace(trunk, patch_size=0))
        notices.append(
            f"the {part} ({trunk.depth} layers of width {trunk.width}) is none of the published "
            f"sizes, so {part}_model is left out. The published code builds it with "
            f'{part}_model="siglip2", {short}_pretrained=true and a SigLIP2 of that size in '
            "$CACHE_DATA_PATH/siglip2-so400m-patch16-naflex"
        )
    if len(set(unnamed)) > 1:
        notices.append(
            "encoder and decoder are of two sizes, and the published code takes both from one "
            "SigLIP2: it cannot build this pair without a change"
        )
    return both, extra, notices


def _published_name(trunk: ViTConfig) -> tuple[str, bool] | None:
    """What the published configuration calls a trunk: (model, whether pretrained)."""
    sizes = {(name, True): (_PRETRAINED, depth) for name, depth in _LAYERS.items()}
    sizes["siglip2_base", False] = (_FROM_SCRATCH, _FROM_SCRATCH.depth)
    for name, (size, depth) in sizes.items():
        if trunk == dataclasses.replace(size, depth=depth, patch_size=trunk.patch_size):
            return name
    return None


NETWORK = Network(
    name="tokenizer",
    title="DetailFlow tokenizer",
    recognise=any_of(("encoder.latent_tokens", "quantize.embedding.weight", "decoder.mask_token")),
    module=Tokenizer,
    # A single patch: the parameters' shapes do not depend on the grid.
    example=lambda config: (image(config.encoder.patch_size),),
    table=TABLE,
    skipped=SKIPPED,
    optional=(ALIGNMENT, REPA),
    infer_config=infer_config,
    from_run=task.model_config,
    describe=describe,
    names=_NAMES | {"resolution_power": "degradation_power"},
    options={
        "encoder_num_heads": (int, "attention heads of the encoder"),
        "decoder_num_heads": (int, "attention heads of the decoder"),
        "group_size": (int, "g, tokens of a group"),
        "causal_num": (int, "c, tokens generated one by one"),
        "image_size": (int, "side of the full resolution in pixels"),
    },
    buffers=lambda config: {_USAGE: np.zeros(_USAGE_LENGTH, np.float32)},
    file_name=lambda config: str(config.num_tokens),
    encoder=("encoder", "quant_conv", "codebook"),
    wants={
        "ema": "load_vq_model(ema=True), the default of extraction and sampling,",
        "discriminator": "--vq-ckpt of tokenizer training",
    },
)
