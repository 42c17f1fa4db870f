"""DetailFlow and FlowAR in JAX.

import detailflow_jax as df
tok, gen = df.load_tokenizer("runs/tok"), df.load_generator("runs/gen")
images = df.to_uint8(tok.decode(gen.sample([3, 1, 4], seed=0, cfg_scale=1.5)))
"""

import importlib

__all__ = [
    "VAE",
    "FlowAR",
    "Generator",
    "HubError",
    "InputError",
    "LatentPosterior",
    "Tokenizer",
    "check_pair",
    "edit",
    "load",
    "load_flowar",
    "load_generator",
    "load_tokenizer",
    "load_vae",
    "rules",
    "save_diffusers",
    "save_pytorch",
    "to_uint8",
    "upscale",
    "vary",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    # Lazily, so that a part (`detailflow_jax.ops`, the checkpoint readers) costs only itself.
    if name in __all__:
        importlib.import_module("detailflow_jax.runtime.platforms").choose()
        return getattr(importlib.import_module("detailflow_jax.inference.api"), name)
    raise AttributeError(f"module 'detailflow_jax' has no attribute {name!r}")
