"""How well a tokenizer or VAE reconstructs: by the number of tokens, and with noise injected."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from detailflow_jax.evaluate import image_quality
from detailflow_jax.evaluate.chunks import UNREADABLE, ChunkFolder, of_images, unreadable_in
from detailflow_jax.evaluate.distances import frechet_distance, gaussian
from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.evaluate.features import FeatureExtractor
from detailflow_jax.evaluate.models import Reconstructor
from detailflow_jax.evaluate.samples import Images, Part
from detailflow_jax.inference.batching import in_batches
from detailflow_jax.inference.enlarge import decode_enlarged
from detailflow_jax.ops import images as pixels
from detailflow_jax.runtime.errors import raised_as


@dataclasses.dataclass(frozen=True)
class Perceptual:
    """LPIPS, compiled.

    Attributes:
      distance: images and originals, float32 [B, R, R, 3] in [-1, 1] -> [B].
      fingerprint: of its weights; partial results made with other weights are not used.
    """

    distance: Callable[[jax.Array, jax.Array], jax.Array]
    fingerprint: str


def psnr_by_tokens(tokenizer, images: np.ndarray, counts: Sequence[int]) -> dict[int, float]:
    """Mean PSNR in dB of images uint8 [B, R, R, 3] decoded from the first n tokens, for each n.

    The decoded image is enlarged to full size by bicubic interpolation and compared with the
    original, so a count is judged by what a viewer sees.
    """
    codes = tokenizer.encode(images)
    return {n: mean_psnr(decode_enlarged(tokenizer, codes, n), images) for n in counts}


def mean_psnr(made: np.ndarray, images: np.ndarray) -> float:
    """Mean PSNR in dB of reconstructions of images; both [B, R, R, 3], uint8 or in [-1, 1]."""
    return float(np.mean(pixels.psnr(_in_range(made), _in_range(images))))


def _in_range(images: np.ndarray) -> Any:
    """Images in [-1, 1]."""
    return pixels.to_float(np.asarray(images)) if images.dtype == np.uint8 else images


def evaluate(
    reconstructor: Reconstructor,
    images: Images,
    out: pathlib.Path,
    *,
    counts: Sequence[int] = (),
    groups: Sequence[int] = (),
    num_images: int | None = None,
    extractor: FeatureExtractor | None = None,
    perceptual: Perceptual | None = None,
) -> list[dict[str, Any]]:
    """Scores reconstructions against their originals; resumable.

    Args:
      reconstructor: the model.
      images: a set of images (`samples.py`) of the model's size.
      out: folder for the partial results.
      counts: token counts; default all tokens. A VAE has none.
      groups: which groups to perturb, for the self-correction test.
      num_images: only the first ones.
      extractor: for rFID, or a distance of other features; None leaves it out.
      perceptual: LPIPS; None leaves it out.

    Returns:
      one row per kind of reconstruction of `Reconstructor`: `name`, `images` (as many as can be
      read), means of `psnr` (dB, peak 1 on [0, 1]), `ssim` (data range 1), `ssim_range_2` (the
      constants of published tokenizer tables), and where asked for `lpips` and `rfid`, which with
      features of another network is called after them, such as `fd_pixels`.

    Raises:
      EvaluationError: images of another size, too few, or NaN from the model; token counts or
        groups that the model does not have.
    """
    total = _check_images(images, num_images, reconstructor.image_size)
    counts, groups = _check_parts(reconstructor, counts, groups)
    definition = {
        "model": reconstructor.model.fingerprint,
        "images": images.fingerprint,
        "noise": [reconstructor.seed, reconstructor.noise_top],
        "network": extractor and extractor.fingerprint,
        "lpips": perceptual and perceptual.fingerprint,
    }
    folder = ChunkFolder(out / "reconstruction", total, definition)

    def make(part: Part) -> dict[str, dict[str, np.ndarray]]:
        originals = part.images
        made = reconstructor(originals, counts, groups, indices=part.positions)
        size = reconstructor.batch_size
        arrays = {kind: _compare(x, originals, size, perceptual) for kind, x in made.items()}
        if extractor:
            for kind, x in made.items():
                arrays[kind]["pool"] = extractor(x)["pool"]
            arrays["originals"] = {"pool": extractor(originals)["pool"]}
        return arrays

    names = reconstructor.names(counts, groups)
    kinds = [*names, *(["originals"] if extractor else []), UNREADABLE]
    folder.fill(of_images(images, make), kinds, "reconstruct", reconstructor.batch_size)
    total -= len(unreadable_in(folder.path))
    metrics = ["psnr", "ssim", "ssim_range_2", *(["lpips"] if perceptual else [])]
    originals = gaussian(folder.parts("originals", "pool")) if extractor else None
    distance = f"fd_{extractor.name}" if extractor and extractor.name else "rfid"
    rows = []
    for name in names:
        row: dict[str, Any] = {"name": name, "images": total}
        if originals:
            row[distance] = frechet_distance(*originals, *gaussian(folder.parts(name, "pool")))
        for metric in metrics:
            row[metric] = float(np.mean(folder.read(name, metric), dtype=np.float64))
        rows.append(row)
    return rows


def _compare(images, originals, size: int, perceptual: Perceptual | None) -> dict[str, np.ndarray]:
    """Each image against its original, in batches of one size: {metric: float32 [n]}."""

    def compare(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
        values = {
            "psnr": image_quality.psnr(x, y),
            "ssim": image_quality.ssim(x, y),
            "ssim_range_2": image_quality.ssim(x, y, 2.0),
        }
        if perceptual:
            values["lpips"] = perceptual.distance(pixels.to_float(x), pixels.to_float(y))
        return values

    return in_batches(compare, size, images, originals, whole=True)


def _check_images(images: Images, num_images: int | None, size: int) -> int:
    """How many images to take; they must be of the model's size."""
    if images.shape[:2] != (size, size):
        raise EvaluationError(
            f"{images.name} holds images of {images.shape[1]}x{images.shape[0]} px, the model "
            f"takes {size}x{size}"
        )
    total = len(images) if num_images is None else num_images
    if not 2 <= total <= len(images):
        raise EvaluationError(
            f"{images.name} holds {len(images)} images, {total} are asked for: expected 2 to "
            f"{len(images)}"
        )
    return total


def _check_parts(reconstructor: Reconstructor, counts, groups) -> tuple[list[int], list[int]]:
    """Valid token counts and groups of the model; all tokens by default."""
    config = reconstructor.model.config
    if reconstructor.model.kind == "vae":
        if counts or groups:
            raise EvaluationError("a VAE has no tokens: leave token counts and noise groups out")
        return [], []
    with raised_as(EvaluationError, f"token counts {counts}: "):
        for count in counts:
            config.resolutions.check(count)
    number = config.num_tokens // config.group_size
    wrong = [group for group in groups if not 0 <= group < number]
    if wrong:
        raise EvaluationError(f"noise groups {wrong}: expected 0 to {number - 1}")
    return sorted(set(counts)) or [config.num_tokens], sorted(set(groups))
