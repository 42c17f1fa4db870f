"""Scores generated images: FID, sFID, inception score, precision and recall, over a sweep.

A setting is a guidance scale and a seed. Its samples are made chunk by chunk, so that a killed run
resumes; its features are kept, so that another reference needs no new samples.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
import scipy.special

from detailflow_jax.evaluate import report
from detailflow_jax.evaluate.chunks import UNREADABLE, ChunkFolder, of_images, unreadable_in
from detailflow_jax.evaluate.distances import (
    NEIGHBOUR,
    frechet_distance,
    gaussian,
    inception_score,
    mixed,
    precision_recall,
)
from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.evaluate.features import FeatureExtractor
from detailflow_jax.evaluate.models import Sampler
from detailflow_jax.evaluate.references import Reference
from detailflow_jax.evaluate.samples import Images, write_samples
from detailflow_jax.runtime import pictures, sharding
from detailflow_jax.runtime.files import write_atomically

LABELS = ("balanced", "random")
METRICS = ("fid", "sfid", "inception_score", "precision", "recall")
"""Of Inception's features. Those of others are named after them, see `metrics_of`."""
Parts = Callable[[str], Iterable[np.ndarray]]
"""Name of a feature ("pool", "spatial", "logits") -> its rows, in parts, in order."""
_PREVIEW = 64  # images of each setting, at most, that are drawn as a grid


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What to sample: every guidance scale with every seed 0 .. seeds - 1.

    `labels`: "balanced", image i is of class i mod K, so that every stretch holds all classes
    evenly; or "random", drawn uniformly by the seed. Their FID differ, so results name them.
    """

    num_samples: int = 50_000
    cfg_scales: Sequence[float] = (1.5,)
    labels: str = "balanced"
    seeds: int = 1
    keep_images: bool = False

    def __post_init__(self):
        if self.labels not in LABELS:
            raise EvaluationError(f"labels={self.labels!r}: expected one of {', '.join(LABELS)}")
        if self.num_samples <= NEIGHBOUR or self.seeds < 1 or not self.cfg_scales:
            raise EvaluationError(
                f"num_samples={self.num_samples}, seeds={self.seeds}, cfg_scales="
                f"{list(self.cfg_scales)}: expected more than {NEIGHBOUR} samples, a seed, a scale"
            )


def class_labels(kind: str, count: int, num_classes: int, seed: int) -> np.ndarray:
    """Labels of `count` samples, int32 [count]; see `Sweep`."""
    if kind == "balanced":
        return np.arange(count, dtype=np.int32) % num_classes
    return np.random.default_rng(seed).integers(0, num_classes, count, dtype=np.int32)


def metrics_of(name: str) -> tuple[str, ...]:
    """Names of the figures by the features called `name`; the first one is the distance.

    METRICS of Inception, which has no name. Of others the Fréchet distance, never called FID, and
    precision and recall: "fd_pixels", "precision_pixels", "recall_pixels".
    """
    return tuple(f"{kind}_{name}" for kind in ("fd", "precision", "recall")) if name else METRICS


def score(
    parts: Parts, reference: Reference, mesh: jax.sharding.Mesh, name: str = ""
) -> dict[str, Any]:
    """The figures of features, by `metrics_of(name)`; None for what the reference does not allow.

    Raises:
      EvaluationError: features of another network, or too few images.
    """
    values = dict.fromkeys(metrics_of(name))
    distance, *_, precision, recall = values
    values[distance] = frechet_distance(*reference.pool, *gaussian(parts("pool")))
    if not name:
        if reference.spatial:
            values["sfid"] = frechet_distance(*reference.spatial, *gaussian(parts("spatial")))
        probabilities = [scipy.special.softmax(x, axis=1) for x in parts("logits")]
        values["inception_score"] = inception_score(mixed(np.concatenate(probabilities)))
    if reference.features is not None:
        features = np.concatenate(list(parts("pool")))
        pair = precision_recall(reference.features, features, mesh=mesh)
        values[precision], values[recall] = pair
    return values


def evaluate_images(
    images: Images,
    reference: Reference,
    extractor: FeatureExtractor,
    out: pathlib.Path,
    num_samples: int | None = None,
) -> dict[str, Any]:
    """Scores a set of images, such as an `.npz`, without any model.

    Args:
      images: the set.
      reference: what it is compared with.
      extractor: the features.
      out: folder for partial results.
      num_samples: only the first ones; default all.

    Returns:
      one row: `name`, `num_samples` (as many as can be read) and METRICS.

    Raises:
      EvaluationError: fewer images than asked for, or images that cannot be scored.
    """
    total = len(images) if num_samples is None else num_samples
    if not NEIGHBOUR < total <= len(images):
        raise EvaluationError(
            f"{images.name} holds {len(images)} images, {total} are asked for: expected more than "
            f"{NEIGHBOUR}" + (f", at most {len(images)}" if len(images) > NEIGHBOUR else "")
        )
    definition = {"images": images.fingerprint, "network": extractor.fingerprint}
    folder = ChunkFolder(out / "samples", total, definition)

    make = of_images(images, lambda part: {"features": extractor(part.images)})
    folder.fill(make, ["features", UNREADABLE], "features", extractor.step)
    read = total - len(unreadable_in(folder.path))
    if read <= NEIGHBOUR:
        raise EvaluationError(
            f"{images.name}: only {read} of {total} images can be read, expected more than "
            f"{NEIGHBOUR}"
        )
    row = {"name": images.name, "num_samples": read}
    parts = lambda name: folder.parts("features", name)  # noqa: E731
    return row | score(parts, reference, extractor.mesh, extractor.name)


def evaluate_sweep(
    sampler: Sampler,
    sweep: Sweep,
    reference: Reference,
    extractor: FeatureExtractor,
    out: pathlib.Path,
) -> list[dict[str, Any]]:
    """Samples and scores every setting of a sweep; resumable.

    With `keep_images`, the images of a setting are left as `samples-SETTING.npz`.

    Returns:
      one row per setting: `cfg_scale`, `seed`, `labels`, `num_samples`, METRICS and `seconds` (of
      this run, sampling included).
    """
    rows = []
    for cfg_scale in sweep.cfg_scales:
        for seed in range(sweep.seeds):
            start = time.perf_counter()
            setting = {"cfg_scale": cfg_scale, "seed": seed, "labels": sweep.labels}
            folder = sample_setting(sampler, sweep, setting, extractor, out)
            row = setting | {"num_samples": sweep.num_samples}
            row |= score(
                lambda name, folder=folder: folder.parts("features", name),
                reference,
                extractor.mesh,
                extractor.name,
            )
            rows.append(row | {"seconds": round(time.perf_counter() - start, 1)})
    return rows


def sample_setting(
    sampler: Sampler,
    sweep: Sweep,
    setting: dict[str, Any],
    extractor: FeatureExtractor,
    out: pathlib.Path,
) -> ChunkFolder:
    """The features of one setting's samples, its preview, and on request its `.npz`."""
    cfg_scale, seed = setting["cfg_scale"], setting["seed"]
    name = f"cfg{cfg_scale:g}-seed{seed}"
    definition = {
        "model": sampler.fingerprint,
        "network": extractor.fingerprint,
        "options": dict(sampler.options),
        **setting,
    }
    folder = ChunkFolder(out / name, sweep.num_samples, definition)
    labels = class_labels(sweep.labels, sweep.num_samples, sampler.num_classes, seed)

    def make(start: int, stop: int) -> dict:
        part = labels[start:stop]
        images = sampler(part, first_index=start, seed=seed, cfg_scale=cfg_scale)
        if start == 0:
            preview = pictures.grid(images[:_PREVIEW], scale=max(1, 64 // images.shape[1]))
            pictures.save_png(out / f"{name}.png", preview)
        return {"features": extractor(images), "images": {"arr_0": images, "labels": part}}

    archive = out / f"samples-{name}.npz"
    wanted = sweep.keep_images and not archive.exists()
    kinds = ["features", *(["images"] if wanted else [])]
    folder.fill(make, kinds, f"sample {name}", sampler.batch_size)
    if wanted:
        if jax.process_index() == 0:
            side = sampler.image_size
            shape = (sweep.num_samples, side, side, 3)
            write_samples(archive, shape, folder.parts("images", "arr_0"))
            folder.remove("images")
        sharding.sync_processes(archive.name)
    return folder


# ------------------------------------------------------------------------------------- the summary


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds for each scale, and the scale of the least distance.

    Returns:
      {"by_cfg_scale": [{"cfg_scale", "seeds", METRIC, METRIC_std}, ...], "best_cfg_scale": s,
      "distance": the METRIC that it is best by}; a deviation (divided by n - 1) is None with one
      seed.
    """
    summary = []
    name = next((key.removeprefix("fd_") for key in rows[0] if key.startswith("fd_")), "")
    metrics = metrics_of(name)
    for scale in sorted({row["cfg_scale"] for row in rows}):
        group = [row for row in rows if row["cfg_scale"] == scale]
        line: dict[str, Any] = {"cfg_scale": scale, "seeds": len(group)}
        for metric in metrics:
            values = [row[metric] for row in group if row[metric] is not None]
            line[metric] = float(np.mean(values)) if values else None
            line[f"{metric}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        summary.append(line)
    best = min(summary, key=lambda line: line[metrics[0]])
    return {"by_cfg_scale": summary, "best_cfg_scale": best["cfg_scale"], "distance": metrics[0]}


def curve(summary: dict[str, Any]) -> bytes:
    """Distance and inception score over the guidance scale, seeds as error bars: PNG bytes."""
    lines = summary["by_cfg_scale"]
    scales = [line["cfg_scale"] for line in lines]

    def draw(axes, metric: str) -> None:
        spread = [line[f"{metric}_std"] or 0.0 for line in lines]
        axes.errorbar(scales, [line[metric] for line in lines], spread, marker="o", capsize=3)
        axes.axvline(summary["best_cfg_scale"], color="grey", linestyle=":", label="lowest")
        axes.legend()

    titles = {"FID": "fid", "Inception score": "inception_score"}
    if summary["distance"] != "fid":
        titles = {f"Fréchet distance ({summary['distance']})": summary["distance"]}
    return report.panels(
        list(titles), lambda axes, title: draw(axes, titles[title]), "guidance scale"
    )


def write_results(out: pathlib.Path, results: dict[str, Any]) -> None:
    """`results.json`, and of a sweep over several scales `curve.png`; atomically."""
    if len(results.get("summary", {}).get("by_cfg_scale", ())) > 1:
        write_atomically(out / "curve.png", curve(results["summary"]))
    write_atomically(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
