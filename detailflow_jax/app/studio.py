"""What the app does with its models, within its limits; nothing here knows of a page.

Shapes: B samples or results, R side of the models' images, H x W pixels of an upload, N tokens.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from detailflow_jax.data.errors import UnreadableImage
from detailflow_jax.data.images import Picture, decode_picture, read_file
from detailflow_jax.data.transforms import center_crop
from detailflow_jax.inference import api
from detailflow_jax.inference.checks import check_whole
from detailflow_jax.inference.enlarge import decode_enlarged
from detailflow_jax.inference.errors import InputError
from detailflow_jax.inference.upscale import start_side

MOST_IMAGES, MOST_STEPS = 16, 50
UPLOAD_MB = 20
Images = UInt8[np.ndarray, "B R R 3"]


@dataclasses.dataclass
class Studio:
    """Loaded models. Either pair may be missing.

    Attributes:
      tokenizer, generator: DetailFlow.
      vae, flowar: FlowAR.
      names: of the classes, by the kind of model; empty where they are not known.
    """

    tokenizer: api.Tokenizer | None = None
    generator: api.Generator | None = None
    vae: api.VAE | None = None
    flowar: api.FlowAR | None = None
    names: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    _compiled: set[Any] = dataclasses.field(default_factory=set)

    def __post_init__(self):
        if self.generator:
            api.check_pair(self.tokenizer, self.generator)
        if self.flowar:
            api.check_pair(self.vae, self.flowar)

    def classes(self, kind: str) -> list[tuple[str, int]]:
        """(name, label) of the classes of "generator" or "flowar"."""
        count = getattr(self, kind).config.num_classes
        names = self.names.get(kind) or [str(label) for label in range(count)]
        return [(name, label) for label, name in enumerate(names[:count])]

    @property
    def counts(self) -> list[int]:
        """Token counts at which an image is shown: the ends of the groups."""
        c = self.tokenizer.config
        return list(range(c.group_size, c.num_tokens + 1, c.group_size))

    @property
    def flows(self) -> bool:
        """Whether the generator has a flow head: it has flow steps then, and no temperature."""
        return self.generator.config.head == "flow"

    def first_time(self, *program: Any) -> bool:
        """Whether a program is called for the first time, and so will be compiled."""
        known = program in self._compiled
        self._compiled.add(program)
        return not known

    def settings(self, temperature: float, num_steps: int) -> dict[str, Any]:
        """The generator's own settings of these two."""
        if self.flows:
            return {"num_steps": flow_steps(num_steps)}
        return {"temperature": float(temperature)}

    def grow(
        self, label: int, count: int, cfg_scale: float, seed: int, **settings: Any
    ) -> Iterator[tuple[int, Images]]:
        """(n, the images of the first n tokens) for more and more tokens, group by group."""
        labels = np.full(check_whole("images", count, 1, MOST_IMAGES), label)
        for codes in self.generator.stream(labels, seed, cfg_scale, **settings):
            n = codes.shape[1]
            yield n, api.to_uint8(decode_enlarged(self.tokenizer, codes, n))

    def vary(
        self, image: Picture, keep: int, label: int | None, count: int, cfg_scale: float,
        seed: int, **settings: Any,
    ) -> Images:  # fmt: skip
        """Images that share their first `keep` tokens with an upload."""
        side = self.tokenizer.config.image_size
        rows, labels = repeated(center_crop(image, side), label, count)
        settings |= {"cfg_scale": cfg_scale}
        made = api.vary(self.tokenizer, self.generator, rows, labels, keep, seed, **settings)
        return api.to_uint8(made)

    def upscale(
        self, image: Picture, label: int | None, count: int, cfg_scale: float, seed: int,
        **settings: Any,
    ) -> tuple[int, Images]:  # fmt: skip
        """The side that an upload is reduced to, and its enlargements.

        Raises:
          InputError: the upload is too small for one token, or as large as the results.
        """
        side = start_side(self.tokenizer, min(image.size))
        rows, labels = repeated(center_crop(image, side), label, count)
        settings |= {"cfg_scale": cfg_scale}
        made = api.upscale(self.tokenizer, self.generator, rows, labels, seed, **settings)
        return side, api.to_uint8(made)

    def sample_flowar(
        self, label: int, count: int, cfg_scale: float, num_steps: int, seed: int
    ) -> Images:
        """Images of a class by FlowAR."""
        count, steps = check_whole("images", count, 1, MOST_IMAGES), flow_steps(num_steps)
        latents = self.flowar.sample(np.full(count, label), seed, cfg_scale, steps)
        return api.to_uint8(self.vae.decode(latents))

    def inpaint(
        self, image: Picture, brushed: np.ndarray, label: int | None, count: int,
        cfg_scale: float, num_steps: int, seed: int,
    ) -> Images:  # fmt: skip
        """Images whose brushed part is sampled anew.

        Args:
          image: an upload.
          brushed: bool [H, W], of the upload's size, true where it was brushed.
          label: class of the new part; None for no class.
          count, cfg_scale, num_steps, seed: see `FlowAR.sample`.

        Raises:
          InputError: nothing was brushed, or a mask of another size.
        """
        if brushed.shape != image.size[::-1]:
            found = " x ".join(map(str, brushed.shape))
            wanted = "{1} x {0}".format(*image.size)
            raise InputError(f"the brushed mask is {found}, expected {wanted} as the image")
        if not brushed.any():
            raise InputError("nothing is brushed: paint over the part that is to be new")
        side = self.flowar.config.latent_side * self.vae.config.stride
        shown = center_crop(np.repeat(np.uint8(255) * brushed[..., None], 3, axis=-1), side)
        mask = shown[..., 0] > 63
        if not mask.any():
            raise InputError("what is brushed lies outside of the middle square, which is used")
        rows, labels = repeated(center_crop(image, side), label, count)
        made = api.edit(
            self.vae, self.flowar, rows, mask, labels, seed,
            cfg_scale=cfg_scale, num_steps=flow_steps(num_steps),
        )  # fmt: skip
        return api.to_uint8(made)


def repeated(
    image: UInt8[np.ndarray, "R R 3"], label: int | None, count: int
) -> tuple[Images, np.ndarray | None]:
    """An image `count` times, and the label of each."""
    count = check_whole("images", count, 1, MOST_IMAGES)
    return image[None].repeat(count, axis=0), None if label is None else np.full(count, label)


def flow_steps(count: int) -> int:
    """The count of flow steps, within the limit."""
    return check_whole("flow steps", count, 2, MOST_STEPS)


def read_upload(path: str | None) -> Picture:
    """The image in an uploaded file.

    Raises:
      InputError: there is none, or it is no image.
    """
    if not path:
        raise InputError("no image: upload one first")
    try:
        return decode_picture(read_file(path), "the upload")
    except UnreadableImage as error:
        raise InputError(f"{error}: expected an image file") from error
