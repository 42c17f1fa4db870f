"""The paper's ablation of DetailFlow on digits: arms that each add one thing to the last."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import digit_figures
import numpy as np
from ml_collections import ConfigDict

from detailflow_jax import data
from detailflow_jax.evaluate import reconstruction
from detailflow_jax.inference import api, extract_codes, generate
from detailflow_jax.models.generator import GeneratorConfig
from detailflow_jax.ops import images as pixels
from detailflow_jax.train import train

# ---------------------------------------------------------------------------------------- the arms

Fields = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One row: fields of both configurations that differ from `digits`.

    Attributes:
      name: of its folder.
      title: of its row.
      tokenizer: full name of a field of the configuration -> value.
      generator: the same for the generator.
    """

    name: str
    title: str
    tokenizer: Fields
    generator: Fields

    def config(self, part: str, seed: int, steps: int, extra: Fields | None = None) -> ConfigDict:
        """The configuration of "tokenizer" or "generator"."""
        fields = {"tokenizer": self.tokenizer, "generator": self.generator}[part]
        return digit_figures.config(part, seed, steps, {**fields, **(extra or {})})


def cumulative_arms() -> tuple[Arm, ...]:
    """The paper's arms but for alignment, whose teacher has no business with digits."""
    tokenizer: dict[str, Any] = {
        "model.causal_encoder": False,
        "model.group_size": 1,
        "full_probability": 1.0,
        "correction.enabled": False,
    }
    generator: dict[str, Any] = {"model.group_size": 1, "loss.correction": 0.0}
    arms = [Arm("baseline", "baseline", dict(tokenizer), dict(generator))]

    def add(name: str, title: str, to_tokenizer: Fields, to_generator: Fields) -> None:
        tokenizer.update(to_tokenizer)
        generator.update(to_generator)
        arms.append(Arm(name, f"+ {title}", dict(tokenizer), dict(generator)))

    parallel = {"model.group_size": 4, "model.causal_num": 0}
    causal_first = {"model.causal_num": 4}
    add("causal_encoder", "causal encoder", {"model.causal_encoder": True}, {})
    add("coarse_to_fine", "coarse-to-fine training", {"full_probability": 0.8}, {})
    add("parallel", "parallel groups of 4", parallel, parallel)
    add("correction", "self-correction", {"correction.enabled": True}, {"loss.correction": 0.3})
    add("causal_first_group", "first group causal", causal_first, causal_first)
    return tuple(arms)


ARMS = cumulative_arms()

# ---------------------------------------------------------------------------------------- one run


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all arms share.

    Attributes:
      tokenizer_steps: updates of 32 digits.
      generator_steps: updates of 64 sequences of codes.
      crops: views of each training digit whose codes the generator learns.
      samples: sampled digits, equally many of each.
      cfg_scale: guidance.
    """

    tokenizer_steps: int = 500
    generator_steps: int = 550
    crops: str = "five"
    samples: int = 1000
    cfg_scale: float = 1.5

    def scaled(self, scale: float) -> "Settings":
        """The same with longer or shorter training."""
        lengths = {name: getattr(self, name) for name in ("tokenizer_steps", "generator_steps")}
        longer = {name: max(10, round(scale * count)) for name, count in lengths.items()}
        return dataclasses.replace(self, **longer)


def run(arm: Arm, seed: int, settings: Settings, out: pathlib.Path) -> dict[str, float]:
    """Trains, samples and measures one arm with one seed in the folder `out`; resumes."""
    train(arm.config("tokenizer", seed, settings.tokenizer_steps), str(out / "tokenizer"))
    tokenizer = api.load_tokenizer(str(out / "tokenizer"))
    source = data.make_source("digits:train")
    extract_codes.extract(tokenizer, source, str(out / "codes"), crops=settings.crops, seed=seed)
    codes = {"data.source": f"codes:{out / 'codes'}"}
    train(arm.config("generator", seed, settings.generator_steps, codes), str(out / "generator"))
    generator = api.load_generator(str(out / "generator"))
    return measure(tokenizer, generator, seed, settings)


def measure(
    tokenizer: api.Tokenizer, generator: api.Generator, seed: int, settings: Settings
) -> dict[str, float]:
    """The figures of a trained pair, by name."""
    labels = np.arange(settings.samples) % 10
    codes = generate.sample(
        generator, labels, batch_size=100, seed=seed, cfg_scale=settings.cfg_scale
    )
    images = np.asarray(pixels.to_uint8(tokenizer.decode(codes, batch_size=100)))
    held_out, num_tokens = digit_figures.pictures("test"), generator.config.num_tokens
    psnr = reconstruction.psnr_by_tokens(tokenizer, held_out, [num_tokens])
    figures = {"psnr": psnr[num_tokens], "steps": steps(generator.config)}
    return digit_figures.of_samples(images, labels) | figures


def steps(config: GeneratorConfig) -> int:
    """Steps of the sampler for all tokens: the causal ones singly, then whole groups."""
    return config.causal + (config.num_tokens - config.causal) // config.group_size


COLUMNS = {
    # figure: its heading and format
    "steps": ("steps", "{:.0f}"),
    "classifier": ("classifier", "{:.1%}"),
    "distance": ("distance", "{:.2f}"),
    "psnr": ("PSNR (dB)", "{:.2f}"),
}


def describe(settings: Settings) -> str:
    """How long the arms train, and how they are sampled."""
    return (
        f"{settings.tokenizer_steps} steps of the tokenizer, {settings.generator_steps} of the "
        f"generator, {settings.samples} samples with guidance {settings.cfg_scale:g}"
    )
