"""Training of FlowAR.

Variants:
  flowar_s, flowar_b, flowar_l, flowar_h   the published recipe on ImageNet at 256 px
  small                                    latents of the small autoencoder, on one machine
  mnist, digits                            latents of these autoencoders, minutes on a CPU

They train on latents that `detailflow extract` wrote, or on images with a frozen autoencoder:
`--config.data.source=tfds:imagenet2012 --config.vae.path=kl16.ckpt`.
The huge model is that of the published weights, with 12 blocks in its head; the paper's has 18:
`--config.model.head_depth=18`.

Options, after a second colon: `latents=DIR` (of `detailflow extract`), `vae=PATH` (a run or
a published file; needed for images, and with latents for drawing samples), `runlocal`,
`batch_size=N`, `epochs=N`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from config_parts import IMAGENET_IMAGES, imagenet, schedule, small, watch
from detailflow_jax.runtime.config import decode_variant

SIZES = {
    "flowar_s": "FlowAR-S",
    "flowar_b": "FlowAR-B",
    "flowar_l": "FlowAR-L",
    "flowar_h": "FlowAR-H",
}


def get_config(arg: str = "digits") -> ConfigDict:
    """The configuration of a variant; see the module's docstring for `arg`."""
    variant, options = decode_variant(
        arg,
        [*SIZES, "small", "mnist", "digits"],
        latents="",
        vae="",
        runlocal=False,
        batch_size=0,
        epochs=0.0,
    )
    makers = {"small": _small, "mnist": _mnist, "digits": _digits}
    config = makers[variant](options) if variant in makers else _published(variant, options)
    if options.vae:
        config.vae.path = options.vae
    if options.runlocal:
        _shrink(config)
    return config


def _published(variant: str, options: ConfigDict) -> ConfigDict:
    batch_size = options.batch_size or 2048
    steps_per_epoch = IMAGENET_IMAGES // batch_size
    config = ConfigDict({"task": "flowar", "seed": 0, "batch_size": batch_size})
    config.total_steps = int((options.epochs or 400) * steps_per_epoch)
    config.schedule = schedule(options.epochs)
    # All but the source is for images: short side to 288, then a random crop of 256.
    config.data = imagenet(min_scale=256 / 288, max_scale=256 / 288)
    config.data.source = f"latents:{options.latents or f'runs/{variant}/latents'}"
    config.model = {
        "size": SIZES[variant],
        # None: those of the size
        "width": placeholder(int),
        "first_depth": placeholder(int),
        "second_depth": placeholder(int),
        "num_heads": placeholder(int),
        "head_width": placeholder(int),
        "head_depth": placeholder(int),
        "injection": placeholder(str),
        "head_dim": 64,
        "objective": "flow",  # "diffusion": noise prediction, of the paper's ablation
        # None: those of the latents, or of the images and the autoencoder
        "scales": placeholder(tuple),  # any increasing sides, the last one that of the latent
        "channels": placeholder(int),
        "num_classes": placeholder(int),
        "buffer_size": 0,
        "class_dropout": 0.1,
        "attention_dropout": 0.1,
        "projection_dropout": 0.1,
        "dtype": "float32",  # "bfloat16" computes in it; the loss stays float32
        "attention": "auto",  # "plain", "splash" (TPU), "cudnn" (GPU): `ops.attention`
        "scan": True,
        "remat": "none",
    }
    config.vae = {  # frozen
        "path": placeholder(str),
        "random": False,  # True: random weights, to try the code only
        # None: those of the autoencoder at `path`
        "channels": placeholder(int),
        "multipliers": placeholder(tuple),
        "res_blocks": placeholder(int),
        "latent_channels": placeholder(int),
        "scale_factor": placeholder(float),
        "shift_factor": placeholder(float),
        "norm_groups": placeholder(int),
    }
    # Where a new run takes weights from, a workdir or a published checkpoint; None: from scratch.
    config.init_from = {
        "model": placeholder(str),
        "classes": placeholder(str),  # of that model, one for each class here, as 285,207,new
    }
    # "image": the autoencoder encodes the image reduced to every scale (the paper's ablation)
    config.scales_from = "latent"
    config.loss = {"scale_weights": placeholder(tuple)}  # one per scale; None: side^2 / last^2
    lr = 5e-5 * batch_size / 256
    config.optim = {
        "kind": "adamw",  # or "muon"
        "lr": lr,
        "warmup_steps": 100 * steps_per_epoch,
        "warmup_start": 0.0,
        "final": 1e-5 / lr,
        "b1": 0.9,
        "b2": 0.95,
        "weight_decay": 0.02,
        "clip": 3.0,
    }
    config.ema = {"decay": 0.9999, "warmup": False}
    watch(config, log_every=100, figures_every=5000, checkpoint_every=5000)
    return config


def _small(options: ConfigDict) -> ConfigDict:
    """A FlowAR for the latents of the small autoencoder, of any side."""
    config = _published("flowar_s", options)
    source = f"latents:{options.latents or 'runs/latents'}"
    config.data.update(source=source, num_workers=0)
    config.model.update(size=None, width=256, first_depth=2, second_depth=4, num_heads=4)
    config.model.update(head_width=256, head_depth=3, injection="spatial", scan=False)
    config.optim.update(lr=6e-4, final=0.05)
    small(config, options, batch_size=32, steps=10_000)
    return config


def _digits(options: ConfigDict) -> ConfigDict:
    """A small FlowAR for the 8 x 8 x 4 latents of the digits autoencoder."""
    config = _published("flowar_s", options)
    batch_size = options.batch_size or 32
    config.batch_size = batch_size
    config.schedule.images = None
    config.total_steps = int((options.epochs or 16) * 1437 // batch_size)
    source = f"latents:{options.latents or 'runs/latents'}"
    config.data.update(source=source, image_size=32, num_workers=0, prefetch=2, flip=False)
    config.model.update(size=None, width=96, first_depth=1, second_depth=2, num_heads=4)
    config.model.update(head_width=96, head_depth=2, injection="spatial", scan=False)
    config.model.update(head_dim=32)
    config.optim.update(lr=2e-3, warmup_steps=50, final=0.05)
    config.ema.update(decay=0.99, warmup=True)
    watch(config, log_every=50, figures_every=500, checkpoint_every=500)
    return config


def _mnist(options: ConfigDict) -> ConfigDict:
    """A small FlowAR for the 7 x 7 x 4 latents of the MNIST autoencoder."""
    config = _digits(options)
    config.total_steps = int((options.epochs or 6) * 4000 // config.batch_size)
    config.data.image_size = 28
    config.model.update(attention_dropout=0.0, projection_dropout=0.0)  # Too short to overfit.
    config.optim.update(kind="muon", lr=3e-3, final=0.0)
    watch(config, log_every=50, figures_every=0, checkpoint_every=100)
    return config


def _shrink(config: ConfigDict) -> None:
    """Narrow and shallow, a small batch and a short run; every other field keeps its meaning."""
    config.batch_size = min(config.batch_size, 8)
    config.total_steps = 20
    config.model.update(width=64, first_depth=1, second_depth=1, num_heads=4)
    config.model.update(head_width=64, head_depth=1, head_dim=32)
    config.optim.warmup_steps = 5
    config.data.update(num_workers=0)
    watch(config, log_every=5, figures_every=20, checkpoint_every=10)
    config.schedule.images, config.try_out = None, True
