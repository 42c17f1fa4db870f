"""Autoencoders at their published sizes against diffusers, at random weights.

    python benchmarks/autoencoders.py --network sd flux sana imagenet

The largest difference over the largest magnitude, of latents and of decoded images, in float32 on a
CPU. Images are not square. Needs diffusers and PyTorch (`pip install -e '.[test]'`).
"""

import argparse
import tempfile

import numpy as np

RES, VIT = "ResBlock", "EfficientViTBlock"
KL = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
DC = {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in (
        ("block_types", (RES, RES, RES, VIT, VIT, VIT)),
        ("block_out_channels", (128, 256, 512, 512, 1024, 1024)),
    )
}
NETWORKS = {
    "sd": ("AutoencoderKL", KL),
    "flux": (
        "AutoencoderKL",
        KL
        | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
        | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    ),
    "sana": (
        "AutoencoderDC",
        DC
        | {"downsample_block_type": "Conv", "upsample_block_type": "interpolate"}
        | {"scaling_factor": 0.41407},
    ),
    "imagenet": (
        "AutoencoderDC",
        DC
        | {"encoder_layers_per_block": (0, 4, 8, 2, 2, 2)}
        | {"decoder_layers_per_block": (0, 5, 10, 2, 2, 2)}
        | {"encoder_qkv_multiscales": ((),) * 6, "decoder_qkv_multiscales": ((),) * 6}
        | {"decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * 3}
        | {"decoder_act_fns": ("relu",) * 3 + ("silu",) * 3, "scaling_factor": 0.3189},
    ),
}
"""Name -> class and sizes: Stable Diffusion, FLUX, DC-AE f32c32 of SANA and for ImageNet."""


def difference(got: np.ndarray, want) -> float:
    """The largest difference of NHWC and NCHW images over the largest magnitude."""
    want = np.moveaxis(want.numpy(), 1, -1)
    return float(np.abs(got - want).max() / np.abs(want).max())


def compare(name: str, height: int, width: int) -> str:
    """One line of the table."""
    import diffusers
    import torch

    import detailflow_jax as df

    kind, sizes = NETWORKS[name]
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**sizes).eval()
    images = np.random.default_rng(0).uniform(-1, 1, (1, height, width, 3)).astype(np.float32)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        vae = df.load_vae(folder)
        encoded = model.encode(torch.from_numpy(np.moveaxis(images, -1, 1).copy()))
        latents = encoded.latent_dist.mean if kind == "AutoencoderKL" else encoded.latent
        decoded = model.decode(latents).sample
    mean, _ = vae.encode(images)
    got = vae.decode(np.asarray(vae.network.scale(np.moveaxis(latents.numpy(), 1, -1))))
    count = sum(x.numel() for x in model.parameters()) / 1e6
    errors = difference(mean, latents), difference(got, decoded)
    return f"| {name} | {kind} | {count:.1f}M | {errors[0]:.1e} | {errors[1]:.1e} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--network", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--size", type=int, nargs=2, default=(64, 96), metavar=("H", "W"))
    args = parser.parse_args()
    print("| network | class | parameters | latents | images |\n|-|-|-|-|-|")
    for name in args.network:
        print(compare(name, *args.size), flush=True)


if __name__ == "__main__":
    main()
