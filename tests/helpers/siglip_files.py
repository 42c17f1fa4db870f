"""A small SigLIP2 of Hugging Face's own, and the files that it is saved in."""

import torch

from detailflow_jax.models import siglip

SIZE = siglip.ViTConfig(width=48, depth=3, num_heads=4, mlp_dim=80, patch_size=4, table_side=6)


def vision_settings(size):
    return {
        "hidden_size": size.width,
        "intermediate_size": size.mlp_dim,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.num_heads,
        "patch_size": size.patch_size,
        "num_patches": size.table_side**2,
    }


def randomize(model):
    """Every parameter, biases and norms too, so that each of them shows in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            noise = torch.randn(x.shape, generator=generator)
            scale = 0.3 if "position_embedding" in name else 0.15
            x.copy_(noise * scale + ("norm" in name and name.endswith("weight")))
    return model.eval()


def vision_model(size=SIZE):
    """Their vision model, with random weights."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    torch.manual_seed(0)
    return randomize(Siglip2VisionModel(Siglip2VisionConfig(**vision_settings(size))))


def write(root):
    """(their vision model, {name: what it was saved in under `root`})."""
    from transformers import Siglip2Config, Siglip2Model

    vision = vision_model()
    vision.save_pretrained(root / "vision")
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 20, "projection_size": 16}  # fmt: skip
    both = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision_settings(SIZE)))
    both.vision_model.load_state_dict(vision.state_dict())
    both.save_pretrained(root / "both", max_shard_size="40KB")  # several files and an index
    inside = {f"repa_model.visual_model.{k}": x for k, x in vision.state_dict().items()}
    tokenizer = {"encoder.latent_tokens": torch.zeros(1, 8, 48), "quant_conv.weight": torch.ones(2)}
    torch.save({"model": inside | tokenizer}, root / "training.pt")
    return vision, {name: root / name for name in ("vision", "both", "training.pt")}
