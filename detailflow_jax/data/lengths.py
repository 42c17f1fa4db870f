"""The lengths of a run follow the number of its images.

A recipe says how many steps it takes for how many images (`config.schedule`). For other data, what
is counted in steps changes along: the run, its warm-up, when terms begin, how often pictures are
drawn and checkpoints saved. What the user has set stays.
"""

import os
from collections.abc import Collection

from ml_collections import ConfigDict

from detailflow_jax.data.codes import CodeSource
from detailflow_jax.data.latents import LatentSource
from detailflow_jax.data.sources import SOURCE_KINDS, make_source
from detailflow_jax.runtime import files
from detailflow_jax.runtime.config import flatten, read_config
from detailflow_jax.runtime.errors import NotFoundError

# In the middle of a run, at the same share of it.
_SHARES = (
    *("optim.warmup_steps", "discriminator.optim.warmup_steps", "discriminator.start_step"),
    "losses.perceptual.ramp",
)
# So often at least in a whole run.
_TIMES = {"log_every": 200, "figures_every": 20, "checkpoint_every": 20}
_AVERAGED = 0.1  # The share of a run that its average looks back on, at most.


def count_images(data: ConfigDict) -> int | None:
    """The number of images, or of records made of images; None of an unknown kind of data.

    Raises:
      ConfigError, NotFoundError: the data are not there.
    """
    kind, _, folder = data.source.partition(":")
    if kind in ("codes", "latents"):
        source = CodeSource if kind == "codes" else LatentSource
        return source.read_manifest(folder)["num_records"]
    if kind not in SOURCE_KINDS:
        return None
    return len(make_source(data.source, data.get("split"), data.get("data_dir")))


def follow_images(config: ConfigDict, workdir: str | os.PathLike) -> tuple[ConfigDict, str]:
    """The configuration with lengths for its own number of images, and what the log says of it.

    Args:
      config: of `load_config`, which remembers the values of the file and what was given on the
        command line. What was set there, or has another value than in the file, stays.
      workdir: of the run. One that has begun keeps its lengths, whatever the data are now.

    Raises:
      ConfigError: the data are named in a form that cannot be read.
    """
    defaults = getattr(config, "_defaults", None)
    planned = (config.get("schedule") or {}).get("images")
    try:
        images = count_images(config.data) if planned and defaults else None
    except NotFoundError:  # Raised again when they are opened, after what else is missing.
        images = None
    if not images or images == planned:
        return config, ""
    fields = flatten(config)
    chosen = {k for k, x in fields.items() if x != defaults.get(k)} | config._given
    lengths = _lengths(config, chosen, defaults, images)
    if files.exists(files.path(workdir) / "config.json"):
        lengths |= {k: x for k, x in flatten(read_config(workdir)).items() if k in lengths}
    changed = {k: x for k, x in lengths.items() if k not in chosen and x != fields[k]}
    new = config.copy_and_resolve_references()
    object.__setattr__(new, "_defaults", defaults)
    for name, value in changed.items():
        *groups, field = name.split(".")
        section = new
        for group in groups:
            section = section[group]
        section[field] = value
    shown = ", ".join(f"{name}={value:.6g}" for name, value in changed.items())
    return new, f"for {images:,} images: {shown}" if changed else ""


def _lengths(
    config: ConfigDict, chosen: Collection[str], defaults: dict, images: int
) -> dict[str, float]:
    """Every length for this number of images; the total as it was set, if it was `chosen`."""
    schedule, planned = config.schedule, defaults["total_steps"]
    total = config.total_steps
    if "total_steps" not in chosen:
        total = round(planned * (images / schedule.images) ** schedule.power)
        total = max(total, min(planned, schedule.least), 1)
    lengths: dict[str, float] = {"total_steps": total}
    for name in _SHARES:
        if defaults.get(name):
            least = min(defaults[name], total // 20)
            lengths[name] = max(round(defaults[name] * total / planned), least)
    for name, times in _TIMES.items():
        lengths[name] = min(defaults[name], max(1, total // times))
    if decay := defaults.get("ema.decay"):
        lengths["ema.decay"] = min(decay, max(0.0, 1 - 1 / max(1.0, _AVERAGED * total)))
    return lengths
