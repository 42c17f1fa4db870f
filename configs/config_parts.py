"""Groups of fields that several configuration files share."""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from detailflow_jax.runtime.errors import ConfigError

IMAGENET_IMAGES = 1_281_167
"""Images in the training split of ImageNet."""


def imagenet(**crop: Any) -> dict[str, Any]:
    """`data`: the training split at 256 px, random crops and flips; `crop` adds to its fields."""
    return {
        "source": "tfds:imagenet2012",
        "split": "train",
        "data_dir": "",  # folder of TFDS data; empty: $TFDS_DATA_DIR, then TFDS's default
        "image_size": 256,
        "crop": "random",
        **crop,
        "flip": True,
        "num_workers": 8,
        "prefetch": 4,
        "num_threads": 0,  # threads per worker that prepare batches; 0: one per batch
        "worker_buffer": 1,  # finished batches that each worker keeps ready
        "scaled_decode": False,  # decode large JPEGs at a reduced size
    }


def lpips() -> dict[str, Any]:
    """Fields of `losses.perceptual`; None: where `detailflow weights` says."""
    return {
        "path": placeholder(str),  # a whole LPIPS, or VGG16 of torchvision
        "linear": placeholder(str),  # beside VGG16, LPIPS's weights over it
        "random": False,  # True: random weights, to try the code only
    }


def discriminator(kind: str, **fields: Any) -> dict[str, Any]:
    """`discriminator`; the defaults are those of the published tokenizer.

    Args:
      kind: "dino", or "patchgan", which needs no weights.
      **fields: other values than below.
    """
    return {
        "kind": kind,
        "path": placeholder(str),  # DINO; None: where `detailflow weights` says
        "random": False,  # True: a random DINO, to try the code only
        "loss": "hinge",  # or "vanilla", "non_saturating"
        "start_step": 40_000,
        "weight": 0.2,  # of its own loss and LeCAM
        "lecam": 0.001,
        "lecam_decay": 0.999,
        "consistency": 4.0,  # of weak and strong augmentation
        "augment": True,
        "adaptive": False,  # adversarial term as large as the reconstruction's, by gradients
        "dino": {
            "width": 384,
            "depth": 12,
            "num_heads": 6,
            "patch_size": 16,
            "image_size": 224,
            "read_blocks": (2, 5, 8, 11),
            "kernel_size": 9,
        },
        "patchgan": {"channels": 64, "num_layers": 2},
    } | fields


def adam(lr: float, warmup_steps: int) -> dict[str, Any]:
    """`optim` of tokenizer and autoencoder: Adam, linear warm-up, cosine decay to a tenth."""
    return {
        "kind": "adamw",  # or "muon": far fewer steps for a small network from scratch
        "lr": lr,
        "warmup_steps": warmup_steps,
        "warmup_start": 0.0,
        "final": 0.1,
        "b1": 0.9,
        "b2": 0.95,
        "weight_decay": 0.0,
        "clip": 1.0,
    }


def schedule(epochs: float) -> dict[str, Any]:
    """`schedule` of a published recipe: its lengths are for ImageNet, and follow other data.

    Args:
      epochs: as the user gave them; 0 for those of the recipe.
    """
    return {
        "images": IMAGENET_IMAGES,  # what the numbers of steps are for; None: for any data
        "power": 1.0,  # numbers of steps are times (images / these images)^power
        "least": 0 if epochs else 2000,  # steps that even few images need
    }


def small(config: ConfigDict, options: ConfigDict, *, batch_size: int, steps: int) -> None:
    """The run of a `small` variant, in place: `steps` for 1,000 images.

    More images need more steps, but not as many more: with the square root of their number.
    """
    config.batch_size = options.batch_size or batch_size
    config.schedule.update(images=1000, power=0.5, least=min(steps, 1000))
    if options.epochs:
        steps = max(1, int(options.epochs * 1000 // config.batch_size))
        config.schedule.update(power=1.0, least=1)
    config.total_steps = steps
    config.optim.warmup_steps = steps // 20
    config.ema.update(decay=0.999, warmup=True)
    if "discriminator" in config:  # For who switches these terms on.
        config.discriminator.start_step = steps // 2
    often = max(1, steps // 20)
    watch(config, log_every=50, figures_every=often, checkpoint_every=often)


def small_side(options: ConfigDict) -> int:
    """Side of the images of a `small` variant, by default 64."""
    side = options.image_size or 64
    if side % 16 or not 32 <= side <= 256:
        raise ConfigError(f"image_size={side}: expected a multiple of 16 from 32 to 256")
    return side


def only_small(variant: str, options: ConfigDict) -> None:
    """Raises ConfigError if an option of `small` is given with another variant."""
    if options.image_size and variant != "small":
        raise ConfigError(
            f"image_size={options.image_size} is an option of the variant small, not of {variant}"
        )


def watch(config: ConfigDict, *, log_every: int, figures_every: int, checkpoint_every: int) -> None:
    """Adds the fields that every training configuration needs: intervals in steps, and the mesh."""
    config.log_every = log_every
    config.figures_every = figures_every
    config.checkpoint_every = checkpoint_every
    config.keep_checkpoints = 3
    config.accumulate = 1  # compute a batch in this many parts, to save memory
    config.try_out = False  # True: networks and run are too small for useful weights
    config.stall_seconds = 600  # warn if no step ends within this time; 0: never
    config.tensorboard = True
    config.wandb = {"project": ""}  # on Weights & Biases; empty: nothing goes there
    config.profile = {  # xprof files in WORKDIR/profile
        "start": 0,  # after this step, or after the first one of a part that begins later
        "steps": 0,  # how many steps; 0: none
        "port": 0,  # where `jax.profiler` answers, one port per process; 0: nowhere
    }
    config.score = {  # of a few images, with raw and averaged weights (evaluate/training.py)
        "every": 0,  # steps; 0: never
        "reference": "",  # an .npz, a folder of pictures, tfds:NAME:SPLIT, digits:test
        "num_samples": 1024,  # 0: as many as the reference; FID of few compares only with as many
        "batch_size": 64,
        # The tokenizer or VAE that decodes samples, for scores and pictures of a generator or
        # FlowAR; pictures are also drawn with the one that the codes or latents name.
        "decoder": "",
        "cfg_scale": 1.5,
        "features": True,  # distances between features; False: PSNR and SSIM alone
        # What gives the features: "inception", for FID; without a download "pixels", or of samples
        # "encoder", that of the decoder. Their figures have names of their own.
        "network": "inception",
        "inception": placeholder(str),  # None: where `detailflow weights` says
    }
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1, "slices": 1}
