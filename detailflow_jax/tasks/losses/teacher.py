"""The frozen vision transformer that `align` and `repa` align the tokenizer with."""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from detailflow_jax.models import siglip
from detailflow_jax.runtime import weights
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.tasks import from_section
from detailflow_jax.tasks.losses import Frozen, Setting


def make(name: str, setting: Setting) -> Frozen:
    """The teacher of `config.teacher` for the term `name`.

    Raises:
      ConfigError: there is none, it has no weights, or it does not fit the tokenizer.
    """
    config, c, need = setting.config, setting.network, weights.TEACHER
    if not getattr(c, "teacher_width", 0) or "teacher" not in config:
        raise ConfigError(
            f"config.losses.{name}.weight > 0 needs config.teacher and config.model.teacher_width"
        )
    fields = config.teacher.to_dict()
    path, random = fields.pop("path", None), fields.pop("random", False)
    if not (path or random):
        raise ConfigError(
            f"{need.field} is not set: the alignment loss needs the weights of its teacher. "
            "Name those of google/siglip2-so400m-patch16-naflex (a folder or model.safetensors, or "
            "hf:google/siglip2-so400m-patch16-naflex to download them), or switch alignment off "
            f"with config.losses.{name}.weight=0; config.teacher.random=True takes a random "
            f"teacher, to try the code only; `{weights.COMMAND} tokenizer` lists what a run needs"
        )
    vit = from_section(siglip.ViTConfig, fields, "config.teacher")
    if vit.width != c.teacher_width:
        raise ConfigError(
            f"config.model.teacher_width={c.teacher_width} is not the teacher's {vit.width}"
        )
    network = siglip.VisionTransformer(vit, jnp.dtype(c.dtype), c.scan, c.remat)
    return Frozen(
        name="teacher",
        network="siglip2",
        init=functools.partial(_init, network, c.image_size),
        files=((need, path),),
        random=not path,
        features=functools.partial(siglip.teacher_features, network),
        dtype=c.dtype,
    )


def _init(network: siglip.VisionTransformer, size: int, key: Any) -> Mapping[str, Any]:
    return network.init(key, jnp.zeros((1, size, size, 3)))["params"]
