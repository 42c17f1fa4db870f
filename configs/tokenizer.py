"""Training of the tokenizer.

Variants:
  detailflow_16, detailflow_32, detailflow_64   the published recipe on ImageNet at 256 px: 128, 256
                                                and 512 tokens, that is 16, 32 and 64 groups
  small                                         own images at 64 px (or `image_size=128`) on one
                                                machine, without weights of other networks
  mnist                                         5,000 digits of MNIST, the demo, minutes on a CPU
  digits                                        scikit-learn's smaller digits, minutes on a CPU
  photos                                        patches of ten photographs, minutes on a CPU

The published runs start their encoder from SigLIP2 and align with it, so they need its weights:
`--config.init_from.encoder` and `--config.teacher.path` (docs/checkpoints.md). Their perceptual and
adversarial terms need VGG16, LPIPS and DINO. `detailflow weights tokenizer` lists all
of these.

Options, after a second colon: `plain` leaves alignment, perceptual and adversarial terms off, so
that no other network's weights are needed, with lower quality; `runlocal` shrinks the networks,
batch and run so that a variant can be tried anywhere, with random weights and without perceptual
and adversarial terms unless they are switched on; `batch_size=N` and `epochs=N` scale the schedule
along; `image_size=N` of `small`.
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

TOKENS = {"detailflow_16": 128, "detailflow_32": 256, "detailflow_64": 512}


def get_config(arg: str = "digits") -> ConfigDict:
    """The configuration of a variant; see the module's docstring for `arg`."""
    variant, options = decode_variant(
        arg,
        [*TOKENS, "small", "mnist", "digits", "photos"],
        runlocal=False,
        plain=False,
        batch_size=0,
        epochs=0.0,
        image_size=0,
    )
    only_small(variant, options)
    makers = {"small": _small, "mnist": _mnist, "digits": _digits, "photos": _photos}
    config = makers[variant](options) if variant in makers else _published(variant, options)
    if options.plain:
        for name in ("align", "perceptual", "adversarial"):
            config.losses[name].weight = 0.0
    if options.runlocal:
        _shrink(config)
    return config


def _published(variant: str, options: ConfigDict) -> ConfigDict:
    batch_size = options.batch_size or 256
    steps_per_epoch = IMAGENET_IMAGES // batch_size
    config = ConfigDict({"task": "tokenizer", "seed": 0, "batch_size": batch_size})
    config.total_steps = int((options.epochs or 250) * steps_per_epoch)
    config.schedule = schedule(options.epochs)
    config.data = imagenet(min_scale=0.8)  # the crop's share of the resized short side: U[0.8, 1]
    config.data.dynamic = {  # input resolution; sizes up to model.image_size
        "probability": 0.0,  # of a batch of another size, with as many tokens as decode to it
        "sizes": (128, 192),  # one of them, uniformly
        "multiple": 8,  # of images, in batches of larger sizes; of the devices that split one
    }
    config.model = _model(TOKENS[variant])
    config.init_from = {  # where a new run takes weights from; None: from scratch
        "model": placeholder(str),  # a whole tokenizer: a workdir or a published checkpoint
        "encoder": placeholder(str),  # SigLIP2, for the encoder's first layers, as published
        "discriminator": placeholder(str),  # the trained part of one, of a published checkpoint
    }
    config.train_only = "all"  # "decoder": fine-tune it, with a frozen encoder and codebook
    config.teacher = {  # frozen; the whole of SigLIP2-so400m
        "path": placeholder(str),  # such as hf:google/siglip2-so400m-patch16-naflex
        "random": False,  # True: random weights, to try the code only
        "width": 1152,
        "depth": 27,
        "num_heads": 16,
        "mlp_dim": 4304,
        "patch_size": 16,
        "table_side": 16,
    }
    config.full_probability = 0.8  # share of batches that reconstruct from all tokens
    config.decode_buckets = 0  # programs that the sizes of such images share; 0: one for each size
    config.correction = {  # the self-correcting second pass
        "enabled": True,
        "noise_per_sample": True,  # False: one noise position for the whole batch, as published
        "noise_top": 50,  # a perturbed token becomes one of its nearest codes, this many
    }
    config.losses = _losses()
    config.discriminator = discriminator("dino")
    config.optim = adam(1e-4 * batch_size / 256, steps_per_epoch)
    # Its schedule begins with its first update; it has none of its own as published.
    config.discriminator.optim = config.optim.copy_and_resolve_references()
    config.discriminator.optim.warmup_steps = 0
    config.ema = {"decay": 0.0, "warmup": False}  # decay 0: no average, as published
    watch(config, log_every=100, figures_every=5000, checkpoint_every=5000)
    return config


def _model(num_tokens: int) -> dict:
    return {
        "image_size": 256,
        "num_tokens": num_tokens,
        "group_size": 8,
        "causal_num": placeholder(int),  # None: one group; 0: none, the first group is parallel too
        "codebook_size": 8192,
        "codebook_dim": 8,
        "resolution_power": 1.5,
        "encoder": {  # the first 12 layers of SigLIP2-so400m
            "width": 1152,
            "depth": 12,
            "num_heads": 16,
            "mlp_dim": 4304,
            "patch_size": 16,
            "table_side": 16,
        },
        "decoder": {
            "width": 768,
            "depth": 12,
            "num_heads": 12,
            "mlp_dim": 3072,
            "patch_size": 16,
            "table_side": 16,
        },
        "table_std": 0.02,  # of position tables and queries at the start; more from scratch
        "causal_encoder": True,  # False: its queries see each other (without correction)
        "teacher_width": 1152,
        "overlap": False,  # True: the decoder's patches overlap by half, and no seams show
        "repa_layer": 0,  # for losses.repa: the decoder block whose tokens are aligned
        "dtype": "bfloat16",
        "attention": "auto",  # "plain", "splash" (TPU), "cudnn" (GPU): `ops.attention`
        "scan": True,
        "remat": "none",
    }


def _losses() -> dict:
    """One section per term; a term of weight 0 needs no weights of other networks."""
    return {
        "mse": {"weight": 1.0},
        "vq": {"weight": 1.0},  # codebook entries to latents
        "commit": {"weight": 0.25},  # latents to codebook entries
        "entropy": {"weight": 0.0},
        "align": {"weight": 1.0},
        "repa": {"weight": 0.0},  # of a decoder layer with the teacher; published switch 0.5
        "perceptual": {"weight": 1.0, "ramp": 10_000, **lpips()},
        "adversarial": {"weight": 0.2},  # of the generator; 0: no discriminator
    }


def _small(options: ConfigDict) -> ConfigDict:
    """8 groups of tokens and patches of 8 px: hours on a CPU at 64 px, minutes on a GPU."""
    side, config = small_side(options), _published("detailflow_16", options)
    group_size = side // 16
    config.data.update(source="folder:photos", image_size=side, num_workers=2, scaled_decode=True)
    config.data.dynamic.sizes = (side // 2,)
    config.model.update(
        image_size=side,
        num_tokens=8 * group_size,
        group_size=group_size,
        codebook_size=1024,
        teacher_width=0,
        dtype="float32",
        scan=False,
    )
    size = {"width": 256, "depth": 4, "num_heads": 4, "mlp_dim": 1024}
    for part in ("encoder", "decoder"):
        config.model[part].update(**size, patch_size=8, table_side=side // 8)
    del config.teacher
    config.correction.noise_top = 16
    for name in ("align", "perceptual", "adversarial"):
        config.losses[name].weight = 0.0
    config.losses.entropy.weight = 0.02
    config.discriminator.update(kind="patchgan", consistency=0.0, augment=False)
    config.optim.update(lr=6e-4, final=0.05)
    small(config, options, batch_size=32, steps=10_000)
    return config


def _digits(options: ConfigDict) -> ConfigDict:
    """32x32 digits, 16 tokens in 4 groups: the same code path, small enough for two CPU cores."""
    config = _published("detailflow_16", options)
    batch_size = options.batch_size or 32
    config.batch_size = batch_size
    config.schedule.images = None
    config.total_steps = int((options.epochs or 15) * 1437 // batch_size)
    config.data.update(
        source="digits", image_size=32, min_scale=0.9, flip=False, num_workers=0, prefetch=2
    )
    config.data.dynamic.sizes = (16,)
    config.model.update(
        image_size=32,
        num_tokens=16,
        group_size=4,
        codebook_size=256,
        codebook_dim=4,
        teacher_width=0,
        dtype="float32",
        scan=False,  # few layers compile and run faster without a scan
    )
    size = {"width": 128, "depth": 2, "num_heads": 4, "mlp_dim": 256}
    for part in ("encoder", "decoder"):
        config.model[part].update(**size, patch_size=16, table_side=2)
    del config.teacher
    config.correction.noise_top = 8
    config.losses.align.weight = config.losses.adversarial.weight = 0.0
    config.losses.entropy.weight = 0.02
    config.losses.perceptual.update(weight=0.0, ramp=100)
    config.discriminator.update(kind="patchgan", start_step=300, consistency=0.0, augment=False)
    config.discriminator.patchgan.channels = 32
    config.optim.update(lr=1e-3, warmup_steps=100, final=0.05)
    config.discriminator.optim.update(lr=2e-4, final=0.05)
    config.ema.update(decay=0.99, warmup=True)
    watch(config, log_every=50, figures_every=1000, checkpoint_every=500)
    config.score.update(every=200, reference="digits:test", num_samples=0, features=False)
    return config


def _mnist(options: ConfigDict) -> ConfigDict:
    """Digits of 28 x 28 px at 32 px, in patches of 8 px, as 16 tokens in 4 groups."""
    config = _digits(options)
    config.total_steps = int((options.epochs or 5) * 4000 // config.batch_size)
    config.data.source = "mnist"
    # Only three sizes to decode, 8, 16 and 32 px: each is a program of its own to compile.
    config.model.update(resolution_power=2.5, codebook_size=512, codebook_dim=8, table_std=0.5)
    config.model.overlap = True
    for part in ("encoder", "decoder"):
        config.model[part].update(depth=3, num_heads=2, patch_size=8, table_side=4)
    config.full_probability = 0.7
    config.correction.enabled = False  # Its second pass would take half of the few minutes.
    config.losses.mse.weight = 5.0
    config.optim.update(kind="muon", lr=4e-3, warmup_steps=50, final=0.0)
    watch(config, log_every=50, figures_every=0, checkpoint_every=500)
    return config


def _photos(options: ConfigDict) -> ConfigDict:
    """Colour patches of 32 px, of which there is more to say: 32 tokens in 8 groups."""
    config = _mnist(options)
    config.total_steps = int((options.epochs or 4) * 4066 // config.batch_size)
    config.data.update(source="photos", flip=True)
    config.model.update(num_tokens=32, codebook_size=1024, overlap=False)
    return config


def _shrink(config: ConfigDict) -> None:
    """Two layers, a small batch and a short run; every other field keeps its meaning."""
    config.batch_size = min(config.batch_size, 8)
    config.total_steps = 20
    for part in (config.model.encoder, config.model.decoder):
        part.update(depth=2, width=96, num_heads=4, mlp_dim=192)
    config.losses.perceptual.update(weight=0.0, ramp=10, random=True)
    config.losses.adversarial.weight = 0.0
    config.discriminator.random = True
    config.discriminator.update(start_step=5)
    config.discriminator.dino.update(depth=2, width=96, num_heads=4, read_blocks=(0, 1))
    config.discriminator.patchgan.channels = 8
    if "teacher" in config:
        config.teacher.update(depth=2, width=96, num_heads=4, mlp_dim=192, random=True)
        config.model.teacher_width = 96
    config.optim.warmup_steps = 5
    config.data.update(num_workers=0)
    watch(config, log_every=5, figures_every=20, checkpoint_every=10)
    config.schedule.images, config.try_out = None, True
