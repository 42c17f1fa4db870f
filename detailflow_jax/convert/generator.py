"""The DetailFlow generator in its published names."""

from detailflow_jax.convert.mapping import Entry

_LAYER, _OURS = "layers.{}", "blocks/layers"

TABLE = (
    Entry("cls_embedding.embedding_table.weight", ("class_embedding/embedding",)),
    Entry("tok_embeddings.weight", ("token_embedding/embedding",)),
    Entry(
        f"{_LAYER}.attention.wqkv.weight",
        tuple(f"{_OURS}/attention/{part}_proj/kernel" for part in "qkv"),
        transpose=True,
    ),
    Entry(f"{_LAYER}.attention.wo.weight", (f"{_OURS}/attention/out_proj/kernel",), transpose=True),
    *(
        Entry(f"{_LAYER}.feed_forward.{w}.weight", (f"{_OURS}/{w}/kernel",), transpose=True)
        for w in ("w1", "w3", "w2")
    ),
    Entry(f"{_LAYER}.attention_norm.weight", (f"{_OURS}/attention_norm/scale",)),
    Entry(f"{_LAYER}.ffn_norm.weight", (f"{_OURS}/ffn_norm/scale",)),
    Entry("norm.weight", ("final_norm/scale",)),
    Entry("output.weight", ("output/kernel",), transpose=True),
    Entry("spe_tok_embeddings.special_embeddings.weight", ("special_embedding/embedding",)),
)

SKIPPED = ("freqs_cis", "mask")
"""Derived buffers."""
