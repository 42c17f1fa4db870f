"""Training of the generator on extracted codes.

Variants:
  detailflow_16, detailflow_32, detailflow_64   the published recipe on ImageNet codes
  small                                         codes of the small tokenizer, on one machine
  mnist, digits                                 codes of these tokenizers, minutes on a CPU

Options, after a second colon: `size=GPT-L` (GPT-B, GPT-L, GPT-XL, GPT-XLPlus, GPT-XXL, GPT-XXLPlus,
GPT-XXXL, GPT-1B, GPT-3B, GPT-7B), `codes=DIR` (of `detailflow extract`), `runlocal`,
`batch_size=N`, `epochs=N`, `head=flow` (the tokens of a group are drawn jointly, by a flow head).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from config_parts import IMAGENET_IMAGES, schedule, small, watch
from detailflow_jax.models.generator import HEADS, SIZES
from detailflow_jax.runtime.config import choose, decode_variant

TOKENS = {"detailflow_16": 128, "detailflow_32": 256, "detailflow_64": 512}


def get_config(arg: str = "digits") -> ConfigDict:
    """The configuration of a variant; see the module's docstring for `arg`."""
    variant, options = decode_variant(
        arg,
        [*TOKENS, "small", "mnist", "digits"],
        size="GPT-L",
        codes="",
        runlocal=False,
        batch_size=0,
        epochs=0.0,
        head="categorical",
    )
    choose(options.size, SIZES, "generator size")
    choose(options.head, HEADS, "head")
    makers = {"small": _small, "mnist": _mnist, "digits": _digits}
    config = makers[variant](options) if variant in makers else _published(variant, options)
    if options.head == "flow":
        _flow_head(config, variant)
    if options.runlocal:
        _shrink(config)
    return config


def _published(variant: str, options: ConfigDict) -> ConfigDict:
    num_tokens = TOKENS[variant]
    batch_size = options.batch_size or (512 if num_tokens <= 256 else 256)
    config = ConfigDict({"task": "generator", "seed": 0, "batch_size": batch_size})
    config.total_steps = int((options.epochs or 300) * (IMAGENET_IMAGES // batch_size))
    config.schedule = schedule(options.epochs)
    config.data = {
        "source": f"codes:{options.codes or f'runs/{variant}/codes'}",
        "num_workers": 4,
        "prefetch": 4,
    }
    config.model = {
        "size": options.size,
        "num_kv_heads": placeholder(int),  # None: as many as heads
        "multiple_of": 256,
        "num_tokens": num_tokens,
        "group_size": 8,
        "causal_num": placeholder(int),  # None: one group; 0: the first group in parallel as well
        "codebook_size": 8192,
        "num_classes": placeholder(int),  # None: as many as the codes have
        "class_dropout": 0.1,
        "token_dropout": 0.1,
        "residual_dropout": 0.1,
        "dtype": "bfloat16",
        "attention": "auto",  # "plain", "splash" (TPU), "cudnn" (GPU): `ops.attention`
        "scan": True,
        "remat": "none",
    }
    # Where a new run takes weights from, a workdir or a published checkpoint; None: from scratch.
    config.init_from = {
        "model": placeholder(str),
        "classes": placeholder(str),  # of that model, one for each class here, as 285,207,new
    }
    config.loss = {"correction": 0.3}  # share of examples that train on a correction pair
    config.optim = {
        "kind": "adamw",  # or "muon"
        "lr": 1e-4,  # not scaled with the batch
        "warmup_steps": config.total_steps // 20,
        "warmup_start": 0.005,
        "final": 0.01,
        "b1": 0.9,
        "b2": 0.95,
        "weight_decay": 0.05,
        "clip": 1.0,
    }
    config.ema = {"decay": 0.9999, "warmup": False}
    watch(config, log_every=100, figures_every=5000, checkpoint_every=5000)
    return config


def _small(options: ConfigDict) -> ConfigDict:
    """A generator for the codes of the small tokenizer; it takes its sizes from them."""
    config = _published("detailflow_16", options)
    config.data.update(source=f"codes:{options.codes or 'runs/codes'}", num_workers=0)
    for name in ("num_tokens", "group_size", "codebook_size"):
        config.model[name] = placeholder(int)
    config.model.size = None
    config.model.update(width=256, depth=6, num_heads=4, multiple_of=64)
    config.model.update(dtype="float32", scan=False)
    config.optim.update(lr=6e-4, final=0.05)
    small(config, options, batch_size=64, steps=8000)
    return config


def _digits(options: ConfigDict) -> ConfigDict:
    """A small generator for the codes of the digits tokenizer."""
    config = _published("detailflow_16", options)
    batch_size = options.batch_size or 64
    config.batch_size = batch_size
    config.schedule.images = None
    config.total_steps = int((options.epochs or 27) * 1437 // batch_size)
    config.data.update(source=f"codes:{options.codes or 'runs/codes'}", num_workers=0)
    config.model.update(size=None, num_tokens=16, group_size=4, codebook_size=256, dtype="float32")
    # Few layers compile and run faster without a scan.
    config.model.update(width=128, depth=3, num_heads=4, multiple_of=64, scan=False)
    config.optim.update(lr=1e-3, warmup_steps=50, final=0.05)
    config.ema.update(decay=0.99, warmup=True)
    watch(config, log_every=50, figures_every=500, checkpoint_every=500)
    return config


def _mnist(options: ConfigDict) -> ConfigDict:
    """A small generator for the codes of the MNIST tokenizer."""
    config = _digits(options)
    config.total_steps = int((options.epochs or 11) * 4000 // config.batch_size)
    config.model.update(codebook_size=512, width=160, depth=4)
    config.optim.update(kind="muon", lr=2e-3, final=0.0)
    config.loss.correction = 0.0  # Its tokenizer has no self-correction.
    watch(config, log_every=50, figures_every=0, checkpoint_every=500)
    return config


def _flow_head(config: ConfigDict, variant: str) -> None:
    """A flow head, as wide as the small networks, or that of FlowAR-S."""
    config.model.head = "flow"
    config.model.code_dim = placeholder(int)  # None: that of the codes
    config.model.injection = "spatial"  # how the semantics enter (models/flow_head.py)
    config.model.update(flow_depth=2, flow_width=1024, flow_head_dim=64)
    if variant in ("small", "mnist", "digits"):
        config.model.update(flow_width=config.model.width, flow_head_dim=32)


def _shrink(config: ConfigDict) -> None:
    """Two layers, a small batch and a short run; every other field keeps its meaning."""
    config.batch_size = min(config.batch_size, 8)
    config.total_steps = 20
    config.model.size = None
    config.model.update(width=64, depth=2, num_heads=4)
    if "head" in config.model:
        config.model.update(flow_width=64, flow_depth=1, flow_head_dim=32)
    config.optim.warmup_steps = 5
    config.data.update(num_workers=0)
    watch(config, log_every=5, figures_every=10, checkpoint_every=10)
    config.schedule.images, config.try_out = None, True
