"""Small published checkpoints for the tests of conversion, from the recorded state dicts."""

import numpy as np

import golden_files
from detailflow_jax.convert import write_pytorch
from detailflow_jax.convert.registry import NETWORKS

TOKENIZER_HEADS = {"encoder_num_heads": 4, "decoder_num_heads": 4}


def recorded(name):
    """(state dict, configuration as published) of a recorded small network."""
    _, settings, state = golden_files.read(name)
    return state, settings["tokenizer" if name.startswith("tokenizer") else "gpt"]


def published(root, name, change=(), config=None, **options):
    """Writes a recorded network as a published folder; `change` replaces tensors, None drops."""
    state, settings = recorded(name)
    state |= dict(change)
    state = {key: x for key, x in state.items() if x is not None}
    file_name = str(settings.get("num_latent_tokens") or settings["block_size"])
    return write_pytorch(
        state, root, settings if config is None else config, name=file_name, **options
    )


def random_params(kind, config, *, scan, seed=0):
    """Parameters of a network of random bits, none of them alike."""
    import jax

    rng = np.random.default_rng(seed)
    abstract = NETWORKS[kind].abstract(config, scan=scan)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), abstract)
