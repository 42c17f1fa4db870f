"""SigLIP2 vision model in Hugging Face names."""

from detailflow_jax.convert.mapping import Entry, linear, norm


def blocks(name: str, path: str) -> tuple[Entry, ...]:
    """The transformer layers under published `name` and parameter `path`."""
    layer, ours = f"{name}.encoder.layers.{{}}", f"{path}/blocks/layers"
    return (
        *linear(f"{layer}.self_attn.k_proj", f"{ours}/attention/k_proj"),
        *linear(f"{layer}.self_attn.v_proj", f"{ours}/attention/v_proj"),
        *linear(f"{layer}.self_attn.q_proj", f"{ours}/attention/q_proj"),
        *linear(f"{layer}.self_attn.out_proj", f"{ours}/attention/out_proj"),
        *norm(f"{layer}.layer_norm1", f"{ours}/norm1"),
        *linear(f"{layer}.mlp.fc1", f"{ours}/fc1"),
        *linear(f"{layer}.mlp.fc2", f"{ours}/fc2"),
        *norm(f"{layer}.layer_norm2", f"{ours}/norm2"),
    )


def trunk(name: str, path: str, *, patches: bool = True) -> tuple[Entry, ...]:
    """A whole vision transformer; `patches=False` has no patch embedding (the decoder's)."""
    prefix = f"{path}/" if path else ""
    embedding = linear(f"{name}.embeddings.patch_embedding", f"{prefix}patch_embed")
    table = Entry(f"{name}.embeddings.position_embedding.weight", (f"{prefix}position_table",))
    return (
        *(embedding if patches else ()),
        table,
        *(
            Entry(e.name, tuple(p.lstrip("/") for p in e.paths), e.transpose, e.lead)
            for e in blocks(name, path)
        ),
        *norm(f"{name}.post_layernorm", f"{prefix}final_norm"),
    )


TABLE = trunk("vision_model", "")
"""Hugging Face `Siglip2VisionModel`; its pooling head (`vision_model.head.`) is not used."""

SKIPPED = ("vision_model.head.", "text_model.", "logit_scale", "logit_bias")
