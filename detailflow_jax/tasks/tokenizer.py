"""Training of the tokenizer: coarse-to-fine reconstruction, self-correction, alignment.

What is drawn for a step is in `tasks/tokenizer_plan.py`, the losses in `tasks/tokenizer_losses.py`,
perceptual and adversarial terms in `tasks/adversarial.py`.

Shapes: B batch, N tokens (fewer where the input is smaller), R image side, S decoded side.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from detailflow_jax.models import lpips, siglip
from detailflow_jax.models.tokenizer import Tokenizer, TokenizerConfig
from detailflow_jax.ops import images as pixels
from detailflow_jax.ops import interpolation, quantization
from detailflow_jax.ops.input_sizes import InputSizes, input_sizes
from detailflow_jax.tasks import Task, TrainState, adversarial, optim, tokenizer_figures
from detailflow_jax.tasks.tokenizer_figures import group_counts
from detailflow_jax.tasks.tokenizer_losses import all_losses
from detailflow_jax.tasks.tokenizer_plan import draw_noise, tokens_by_size

USAGE_WINDOW = 65_536

TRAIN_ONLY = {"all": None, "decoder": ("decoder", "post_quant_conv")}
"""`config.train_only` -> the parts of the network that are trained; None: all of them."""


def model_config(model) -> TokenizerConfig:
    """The `model` part of a config as the network's own dataclass."""
    fields = model.to_dict()
    for part in ("encoder", "decoder"):
        fields[part] = siglip.ViTConfig(**fields[part])
    return TokenizerConfig(**fields)


def _teacher(config, c: TokenizerConfig) -> siglip.VisionTransformer | None:
    """The frozen network that codes or decoder tokens are aligned with, if any are to be."""
    names = [name for name in ("align", "repa") if config.loss.get(name)]
    if not names:
        return None
    if not c.teacher_width or "teacher" not in config:
        raise ValueError(
            f"config.loss.{names[0]} > 0 needs config.teacher and config.model.teacher_width"
        )
    if "repa" in names and not c.repa_layer:
        raise ValueError(
            "config.loss.repa > 0 needs config.model.repa_layer, the block of the decoder whose "
            f"tokens are aligned, 1 to {c.decoder.depth}"
        )
    fields = config.teacher.to_dict()
    path, random = fields.pop("path", None), fields.pop("random", False)
    if not (path or random):
        raise ValueError(
            "config.teacher.path is not set: the alignment loss needs the weights of its teacher. "
            "Name those of google/siglip2-so400m-patch16-naflex (a folder or model.safetensors, or "
            "hf:google/siglip2-so400m-patch16-naflex to download them), or switch alignment off "
            f"with config.loss.{names[0]}=0; config.teacher.random=True takes a random teacher, to "
            "try the code only; `python -m detailflow_jax.weights tokenizer` lists what a run needs"
        )
    teacher = siglip.ViTConfig(**fields)
    if teacher.width != c.teacher_width:
        raise ValueError(
            f"config.model.teacher_width={c.teacher_width} is not the teacher's {teacher.width}"
        )
    return siglip.VisionTransformer(teacher, jnp.dtype(c.dtype), c.scan, c.remat)


def _trained_parts(config, params: Any) -> Any:
    """The part of the parameters that is trained.

    Raises:
      ValueError: `config.train_only` names none.
    """
    if config.train_only not in TRAIN_ONLY:
        raise ValueError(
            f"config.train_only={config.train_only!r} is not one of {', '.join(TRAIN_ONLY)}"
        )
    return {name: params[name] for name in TRAIN_ONLY[config.train_only] or params}


def make(config) -> Task:
    """The tokenizer task of a config (see `configs/tokenizer.py` for its fields)."""
    c = model_config(config.model)
    if config.loss.correction and not c.causal_encoder:
        raise ValueError(
            "config.model.causal_encoder=False: the second pass of self-correction shows codes to "
            "queries that come later, and here every query sees all; set "
            "config.loss.correction=False or config.model.causal_encoder=True"
        )
    _trained_parts(config, dict.fromkeys(TRAIN_ONLY["decoder"]))
    smallest = c.resolutions.decoded_size(c.resolutions.token_counts[0])
    sizes = input_sizes(config.data, config.batch_size, config.seed)
    trainer = Trainer(
        config=config,
        model=Tokenizer(c),
        teacher=_teacher(config, c),
        vgg=adversarial.perceptual_network(config, smallest, jnp.dtype(c.dtype)),
        adversary=adversarial.make(config, c, smallest),
        optimizer=optim.optimizer(config.optim, config.total_steps),
        sizes=sizes,
        tokens=tokens_by_size(config, c, sizes),
    )
    return Task(trainer.init, trainer.plan, trainer.train_step, trainer.figures)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trainer:
    """The functions of a `Task` over what a config makes of the tokenizer.

    Attributes:
      config: of the task.
      model: the network.
      teacher: frozen, of alignment, or None.
      vgg: frozen, of the perceptual term, or None.
      adversary: None where there is no adversarial term.
      optimizer: of the trained parts of the network.
      sizes: dynamic input resolution, or None.
      tokens: input side -> how many tokens encode it.
    """

    config: Any
    model: Tokenizer
    teacher: siglip.VisionTransformer | None
    vgg: lpips.LPIPS | None
    adversary: adversarial.Adversary | None
    optimizer: optax.GradientTransformation
    sizes: InputSizes | None
    tokens: dict[int, int]

    def init(self, key: jax.Array) -> TrainState:
        """See `Task`."""
        c, config = self.model.config, self.config
        example = jnp.zeros((1, c.image_size, c.image_size, 3))
        params = self.model.init(key, example)["params"]
        extra, frozen = {"window": jnp.full((USAGE_WINDOW,), -1, jnp.int32)}, {}
        if self.teacher is not None:
            frozen["teacher"] = self.teacher.init(jax.random.fold_in(key, 1), example)["params"]
        if self.vgg is not None:
            frozen["lpips"] = adversarial.perceptual_init(self.vgg, jax.random.fold_in(key, 2))
        if self.adversary is not None:
            held = self.adversary.init(jax.random.fold_in(key, 3))
            extra["discriminator"], frozen["dino"] = held
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.init(_trained_parts(config, params)),
            ema=optim.start_average(params, config.ema),
            extra=extra,
            frozen=frozen,
        )

    def plan(self, step: int) -> tuple[Hashable, dict[str, np.ndarray]]:
        """See `Task`. The variant is the decoded side; (input side, decoded side) if both vary."""
        resolutions = self.model.config.resolutions
        side = self.sizes.size(step) if self.sizes else resolutions.image_size
        rng = np.random.default_rng((self.config.seed, step))
        most = self.tokens[side]
        count = resolutions.draw_count(rng, self.config.loss.full_probability, most)
        size = resolutions.decoded_size(count)
        low = side if count == most else resolutions.resolution(count)
        matrix = interpolation.degradation_matrix(side, low, size)
        variant = (side, size) if self.sizes else size
        return variant, {"token_count": np.int32(count), "degrade": matrix}

    def train_step(self, state: TrainState, batch, plan, *, variant: Hashable):
        """See `Task`.

        Raises:
          ValueError: images of another size than the variant's.
        """
        config, c = self.config, self.model.config
        side, size = variant if self.sizes else (c.image_size, variant)
        images = pixels.to_float(batch["image"])
        if images.shape[1:3] != (side, side):
            raise ValueError(
                f"the step expects images of {side} x {side} px, the batch has "
                f"{images.shape[1]} x {images.shape[2]}; see config.data.image_size"
            )
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        count = plan["token_count"]
        span, choice = draw_noise(key, c, config.loss, len(images), count, self.tokens[side])
        target = interpolation.apply_matrices(images, plan["degrade"], plan["degrade"])
        rows = images, target, span, choice
        forward = functools.partial(self._forward, state, size, count)
        trained = _trained_parts(config, state.params)
        if self.adversary is not None:
            loss = functools.partial(forward, rows=rows)
            return self._adversarial_step(state, trained, loss, target, key)

        def total(params, rows, key):
            del key  # nothing else is random
            terms, (codes, _) = forward(params, rows)
            return sum(terms.values()), terms | {"codes": codes}

        (_, terms), grads = optim.gradients(total, trained, rows, key, config.accumulate)
        codes = terms.pop("codes")
        return self._update(state, trained, grads, terms, codes)

    def _forward(self, state: TrainState, size: int, token_count: jax.Array, params: Any, rows):
        """`all_losses` of some rows with other values for the trained parameters."""
        loss = self.config.loss
        images, target, span, choice = rows
        features = teacher_mean = None
        if self.teacher is not None:
            features = siglip.teacher_features(self.teacher, state.frozen["teacher"], images)
            teacher_mean = jnp.mean(features, axis=1) if loss.align else None
        losses = functools.partial(
            all_losses,
            images=images,
            target=target,
            span=span,
            choice=choice,
            loss=loss,
            size=size,
            token_count=token_count,
            teacher_mean=teacher_mean,
            patch_features=features if loss.get("repa") else None,
            perceptual=adversarial.perceptual_term(loss, self.vgg, state),
        )
        # What is not trained is taken as it is: no gradient is computed for it.
        return self.model.apply({"params": state.params | params}, method=losses)

    def _adversarial_step(self, state: TrainState, trained: Any, forward: Callable, target, key):
        def loss(params):
            terms, (codes, reconstruction) = forward(params)
            return (sum(terms.values()), reconstruction), (terms, codes)

        grads, (terms, codes), term, held, metrics = self.adversary.gradients(
            loss,
            trained,
            held=state.extra["discriminator"],
            frozen=state.frozen["dino"],
            target=target,
            step=state.step,
            key=jax.random.fold_in(key, 1),
            last_kernel=lambda grads: grads["decoder"]["to_pixels"]["kernel"],
        )
        new, common = self._update(state, trained, grads, terms | term, codes)
        return new.replace(extra=new.extra | {"discriminator": held}), common | metrics

    def _update(self, state: TrainState, trained: Any, grads: Any, terms: dict, codes: jax.Array):
        updates, opt_state = self.optimizer.update(grads, state.opt_state, trained)
        params = state.params | optax.apply_updates(trained, updates)
        window = quantization.remember_codes(state.extra["window"], codes)
        metrics = {f"loss/{name}": value for name, value in terms.items()}
        metrics["loss"] = sum(terms.values())
        metrics["gradient_norm"] = optax.global_norm(grads)
        metrics["codebook_usage"] = quantization.codebook_usage(
            window, self.model.config.codebook_size
        )
        new = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=optim.average(state.ema, params, state.step, self.config.ema),
            extra=state.extra | {"window": window},
        )
        return new, metrics

    def figures(self, state: TrainState, batch) -> dict[str, jax.Array]:
        """Pictures of the first 8 images of a batch; see `tokenizer_figures.draw`."""
        images = jnp.asarray(batch["image"][:8])
        counts = group_counts(self.model.config, tokens=self.tokens[images.shape[1]])
        return tokenizer_figures.draw(self.model, state.params, images, counts)
