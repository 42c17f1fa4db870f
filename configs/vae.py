"""Training of the KL autoencoder, whose latents FlowAR generates.

Variants:
  kl16     ImageNet at 256 px: 16 x 16 latents of 16 channels
  small    own images at 64 px (or `image_size=128`) on one machine, without weights of other
           networks: 8 x 8 (16 x 16) latents of 8 channels
  mnist    5,000 digits of MNIST, minutes on a CPU: 7 x 7 latents of 4 channels
  digits   scikit-learn's smaller digits, minutes on a CPU: 8 x 8 latents of 4 channels
  photos   patches of ten photographs, minutes on a CPU: 8 x 8 latents of 4 channels

The published KL-16 loads as it is (`df.load_vae`, docs/checkpoints.md). Of `kl16` below, the
network (`config.model`) is the published one, its scale factor included; the weights of KL,
perceptual and adversarial terms, and PatchGAN with its adaptive weight, are the LDM family's;
optimizer, length and average are choices of this project. The perceptual term needs VGG16 and
LPIPS (`detailflow weights vae`).

Options, after a second colon: `plain` leaves the perceptual and adversarial terms off, so that no
other network's weights are needed, with softer reconstructions; `runlocal` shrinks the network,
batch and run so that a variant can be tried anywhere, without these terms unless they are switched
on; `batch_size=N` and `epochs=N` scale the schedule along; `image_size=N` of `small`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from config_parts import (
    IMAGENET_IMAGES,
    adam,
    discriminator,
    imagenet,
    lpips,
    only_small,
    schedule,
    small,
    small_side,
    watch,
)
from detailflow_jax.runtime.config import decode_variant


def get_config(arg: str = "digits") -> ConfigDict:
    """The configuration of a variant; see the module's docstring for `arg`."""
    variant, options = decode_variant(
        arg,
        ["kl16", "small", "mnist", "digits", "photos"],
        runlocal=False,
        plain=False,
        batch_size=0,
        epochs=0.0,
        image_size=0,
    )
    only_small(variant, options)
    embedded = {"mnist": _mnist, "digits": _digits, "photos": _photos}
    config = ({"kl16": _kl16, "small": _small} | embedded)[variant](options)
    if options.plain:
        config.losses.perceptual.weight = config.losses.adversarial.weight = 0.0
    if options.runlocal:
        _shrink(config)
    return config


def _kl16(options: ConfigDict) -> ConfigDict:
    batch_size = options.batch_size or 256
    steps_per_epoch = IMAGENET_IMAGES // batch_size
    config = ConfigDict({"task": "vae", "seed": 0, "batch_size": batch_size})
    config.total_steps = int((options.epochs or 50) * steps_per_epoch)
    config.schedule = schedule(options.epochs)
    config.data = imagenet(min_scale=0.8)  # the crop's share of the resized short side: U[0.8, 1]
    config.model = {  # as published
        "channels": 128,
        "multipliers": (1, 1, 2, 2, 4),  # each level but the last halves the sides
        "res_blocks": 2,
        "latent_channels": 16,
        "scale_factor": 0.2325,  # of the published weights; see `latent_std` in the metrics
        "shift_factor": 0.0,
        "quant_conv": True,
        "encoder_attention": placeholder(tuple),  # levels with attention; None: the last
        "decoder_attention": placeholder(tuple),  # None: no level
        "norm_groups": 32,
        "image_channels": 3,
        "dtype": "bfloat16",
    }
    config.init_from = {  # where a new run takes weights from; None: from scratch
        "model": placeholder(str),  # a whole autoencoder: a workdir or a published checkpoint
        "discriminator": placeholder(str),  # the trained part of one, of a published checkpoint
    }
    config.losses = {
        "mse": {"weight": 1.0},
        "kl": {"weight": 1e-6},  # of sums over an image, as is the reconstruction
        "perceptual": {"weight": 1.0, "ramp": 0, **lpips()},
        "adversarial": {"weight": 0.5},  # times the adaptive weight; 0: no discriminator
    }
    config.discriminator = discriminator(
        "patchgan",
        start_step=50_000,
        weight=1.0,
        lecam=0.0,
        consistency=0.0,
        augment=False,
        adaptive=True,
        patchgan={"channels": 64, "num_layers": 3},
    )
    config.optim = adam(1e-4 * batch_size / 256, steps_per_epoch)
    # Its schedule begins with its first update.
    config.discriminator.optim = config.optim.copy_and_resolve_references()
    config.discriminator.optim.warmup_steps = 0
    config.ema = {"decay": 0.9999, "warmup": False}
    watch(config, log_every=100, figures_every=5000, checkpoint_every=5000)
    return config


def _small(options: ConfigDict) -> ConfigDict:
    """Stride 8: hours on a CPU at 64 px, minutes on a GPU."""
    side, config = small_side(options), _kl16(options)
    config.data.update(source="folder:photos", image_size=side, num_workers=2, scaled_decode=True)
    config.model.update(
        channels=32,
        multipliers=(1, 2, 4, 4),
        res_blocks=1,
        latent_channels=8,
        scale_factor=1.0,  # about 1 / the standard deviation that these settings end with
        norm_groups=8,
        dtype="float32",
    )
    config.losses.kl.weight = 5e-3  # for a smooth latent space, as `digits`
    config.losses.perceptual.weight = config.losses.adversarial.weight = 0.0
    config.discriminator.patchgan.update(channels=32, num_layers=2)
    config.optim.update(lr=1e-3, final=0.05)
    small(config, options, batch_size=16, steps=10_000)
    return config


def _digits(options: ConfigDict) -> ConfigDict:
    """32x32 digits, stride 4: the same code path, small enough for two CPU cores."""
    config = _kl16(options)
    batch_size = options.batch_size or 32
    config.batch_size = batch_size
    config.schedule.images = None
    config.total_steps = int((options.epochs or 9) * 1437 // batch_size)
    config.data.update(
        source="digits", image_size=32, min_scale=0.9, flip=False, num_workers=0, prefetch=2
    )
    config.model.update(
        channels=16,
        multipliers=(1, 2, 4),
        res_blocks=1,
        latent_channels=4,
        scale_factor=0.95,  # 1 / the standard deviation that these settings end with
        norm_groups=8,
        dtype="float32",
    )
    # Strong enough for a smooth latent space: what a generator gets slightly wrong stays a digit.
    config.losses.kl.weight = 5e-3
    config.losses.perceptual.weight = config.losses.adversarial.weight = 0.0
    config.discriminator.update(start_step=200)
    config.discriminator.patchgan.update(channels=16, num_layers=2)
    config.optim.update(lr=2e-3, warmup_steps=50, final=0.05)
    config.discriminator.optim.update(lr=2e-4, final=0.05)
    config.ema.update(decay=0.99, warmup=True)
    watch(config, log_every=50, figures_every=500, checkpoint_every=500)
    config.score.update(every=200, reference="digits:test", num_samples=0, features=False)
    return config


def _mnist(options: ConfigDict) -> ConfigDict:
    """Digits of 28 x 28 px as they are."""
    config = _digits(options)
    config.total_steps = int((options.epochs or 2.8) * 4000 // config.batch_size)
    config.data.update(source="mnist", image_size=28)
    config.losses.kl.weight = 1e-2
    config.optim.final = 0.0
    watch(config, log_every=50, figures_every=0, checkpoint_every=500)
    return config


def _photos(options: ConfigDict) -> ConfigDict:
    """Colour patches of 32 px."""
    config = _mnist(options)
    config.total_steps = int((options.epochs or 2.5) * 4066 // config.batch_size)
    config.data.update(source="photos", image_size=32, flip=True)
    config.losses.kl.weight = 5e-3
    return config


def _shrink(config: ConfigDict) -> None:
    """Narrow levels, a small batch and a short run; every other field keeps its meaning."""
    config.batch_size = min(config.batch_size, 8)
    config.total_steps = 20
    config.model.update(channels=8, res_blocks=1, norm_groups=8)
    config.losses.perceptual.update(weight=0.0, random=True)
    config.losses.adversarial.weight = 0.0
    config.discriminator.random = True
    config.discriminator.start_step = 5
    config.discriminator.patchgan.channels = 8
    config.optim.warmup_steps = 5
    config.data.update(num_workers=0)
    watch(config, log_every=5, figures_every=20, checkpoint_every=10)
    config.schedule.images, config.try_out = None, True
