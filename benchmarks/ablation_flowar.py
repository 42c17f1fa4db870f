"""The paper's ablations of FlowAR on digits: the whole, and arms that change one thing of it.

All arms of a seed share one autoencoder and its latents, 8 x 8 positions in scales 1, 2, 4, 8.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import digit_figures
import numpy as np

from detailflow_jax import data
from detailflow_jax.inference import api, extract_latents, generate
from detailflow_jax.ops import images as pixels
from detailflow_jax.train import train


@dataclasses.dataclass(frozen=True)
class Arm:
    """One row.

    Attributes:
      name: of its folder.
      title: of its row.
      paper: the FID of the paper's FlowAR-S on ImageNet.
      fields: of the configuration `digits` that differ, by their full names.
    """

    name: str
    title: str
    paper: float
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _injected(name: str, title: str, paper: float) -> Arm:
    return Arm(name, f"semantics by {title}", paper, {"model.injection": name})


ARMS = (
    Arm("whole", "FlowAR: Spatial-adaLN, flow matching, reduced latents, all scales", 3.61),
    _injected("adaln", "adaLN, their mean alone", 14.28),
    _injected("sequence", "concatenation along the sequence", 9.22),
    _injected("add", "addition", 6.22),
    _injected("cross", "cross-attention", 5.37),
    _injected("channel", "concatenation along the channels", 4.85),
    Arm("scales_4", "without the scale of 2 x 2", 4.88, {"model.scales": (1, 4, 8)}),
    Arm("scales_8", "without those of 2 x 2 and 4 x 4", 6.10, {"model.scales": (1, 8)}),
    Arm("image", "scales of reduced images", 12.19, {"scales_from": "image"}),
    Arm("diffusion", "noise prediction at every scale", 3.93, {"model.objective": "diffusion"}),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all arms share.

    Attributes:
      vae_steps: updates of 32 digits.
      flowar_steps: updates of 32 latents.
      samples: sampled digits, equally many of each.
      cfg_scale: guidance at the last scale.
      num_steps: of the flow, or of the diffusion, at every scale.
    """

    vae_steps: int = 450
    flowar_steps: int = 718
    samples: int = 1000
    cfg_scale: float = 2.4
    num_steps: int = 25

    def scaled(self, scale: float) -> "Settings":
        """The same with longer or shorter training of FlowAR."""
        return dataclasses.replace(self, flowar_steps=max(10, round(scale * self.flowar_steps)))


def run(arm: Arm, seed: int, settings: Settings, out: pathlib.Path) -> dict[str, float]:
    """Trains, samples and measures one arm with one seed in the folder `out`; resumes."""
    vae, latents = (str(out.parent / name) for name in ("vae", "latents"))
    train(digit_figures.config("vae", seed, settings.vae_steps, {}), vae)
    autoencoder = api.load_vae(vae)
    extract_latents.extract(autoencoder, data.make_source("digits:train"), latents)
    train(config(arm, seed, settings.flowar_steps, vae, latents), str(out / "flowar"))
    labels = np.arange(settings.samples) % 10
    samples = generate.sample(
        api.load_flowar(str(out / "flowar")),
        labels,
        batch_size=100,
        seed=seed,
        cfg_scale=settings.cfg_scale,
        num_steps=settings.num_steps,
    )
    images = np.asarray(pixels.to_uint8(autoencoder.decode(samples, batch_size=100)))
    return digit_figures.of_samples(images, labels) | {"paper": arm.paper}


def config(arm: Arm, seed: int, steps: int, vae: str, latents: str) -> Any:
    """FlowAR's configuration in an arm; one of reduced images encodes while it trains."""
    images = arm.fields.get("scales_from") == "image"
    source = "digits:train" if images else f"latents:{latents}"
    fields = {"optim.kind": "muon", "optim.lr": 3e-3, "optim.final": 0.0}  # for short runs
    fields |= {**arm.fields, "data.source": source, "vae.path": vae}
    return digit_figures.config("flowar", seed, steps, fields)


COLUMNS = {
    # figure: its heading and format
    "classifier": ("classifier", "{:.1%}"),
    "distance": ("distance", "{:.2f}"),
    "paper": ("paper's FID", "{:.2f}"),
}


def describe(settings: Settings) -> str:
    """How long the arms train, and how they are sampled."""
    return (
        f"{settings.vae_steps} steps of the autoencoder, {settings.flowar_steps} of FlowAR, "
        f"{settings.samples} samples with guidance {settings.cfg_scale:g} and "
        f"{settings.num_steps} steps a scale"
    )
