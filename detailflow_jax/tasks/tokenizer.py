"""Training of the tokenizer: coarse-to-fine reconstruction, self-correction, alignment.

Perceptual and adversarial terms are in `tasks/adversarial.py`.

Shapes: B batch, N tokens, R image side, S decoded side.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from detailflow_jax.models import siglip
from detailflow_jax.models.tokenizer import Pair, Tokenizer, TokenizerConfig
from detailflow_jax.ops import correction, interpolation, quantization
from detailflow_jax.ops import images as pixels
from detailflow_jax.ops.adversarial import ramp
from detailflow_jax.tasks import Task, TrainState, adversarial, optim

USAGE_WINDOW = 65_536

TRAIN_ONLY = {"all": None, "decoder": ("decoder", "post_quant_conv")}
"""`config.train_only` -> the parts of the network that are trained; None: all of them."""


def model_config(model) -> TokenizerConfig:
    """The `model` part of a config as the network's own dataclass."""
    fields = model.to_dict()
    for part in ("encoder", "decoder"):
        fields[part] = siglip.ViTConfig(**fields[part])
    return TokenizerConfig(**fields)


def draw_noise(key: jax.Array, config: TokenizerConfig, loss, batch: int, token_count: jax.Array):
    """Noise spans [B] and ranks [B, N] among the nearest codes for self-correction."""
    position_key, choice_key = jax.random.split(key)
    if not loss.correction:
        span = correction.no_span(batch, config.num_tokens)
    else:
        span = correction.draw_span(
            position_key,
            batch,
            token_count,
            num_tokens=config.num_tokens,
            group_size=config.group_size,
            causal_num=config.causal,
            per_sample=loss.noise_per_sample,
        )
    top = min(loss.noise_top, config.codebook_size)
    return span, jax.random.randint(choice_key, (batch, config.num_tokens), 0, top)


def latents_to_decode(model, pair: Pair, span: correction.Span) -> jax.Array:
    """Clean and corrected sequences along the batch, straight-through: float32 [2B, N, d].

    In the corrected half only the tokens after the noise pass a gradient to the encoder: what was
    shown to it is taken as given (published behaviour).
    """
    clean = quantization.straight_through(model.lookup(pair.triplet[..., 0]), pair.z)
    corrected = model.lookup(pair.triplet[..., 2])
    corrected = quantization.straight_through(corrected, pair.corrected_z)
    shown = jax.lax.stop_gradient(pair.shown)
    return jnp.concatenate([clean, correction.splice(span, shown, shown, corrected)])


def quantizer_losses(model, pair: Pair, span: correction.Span, loss) -> dict[str, jax.Array]:
    """`vq`, `commit` and `entropy`, their factors included, over both passes."""
    codebook, commitment = quantization.vq_errors(pair.z, model.lookup(pair.triplet[..., 0]))
    codebook2, commitment2 = quantization.vq_errors(
        pair.corrected_z, model.lookup(pair.triplet[..., 2])
    )
    losses = {
        "vq": correction.weighted_vq(codebook, codebook2, span),
        "commit": loss.commitment * correction.weighted_vq(commitment, commitment2, span),
    }
    if loss.entropy:
        clean, noisy = correction.pass_weights(span, pair.z.shape[1])
        entropy = clean * quantization.entropy_loss(pair.distances)
        entropy += noisy * quantization.entropy_loss(pair.corrected_distances)
        losses["entropy"] = loss.entropy * entropy
    return losses


def alignment_loss(model, first_code: jax.Array, target: jax.Array) -> jax.Array:
    """-cos(projection of the first code [B, d], mean teacher feature [B, D]), batch mean."""
    predicted = quantization.normalize(model.align(first_code), 1e-8)
    return -jnp.mean(jnp.sum(predicted * quantization.normalize(target, 1e-8), axis=-1))


def all_losses(
    model,
    images,
    target,
    span,
    choice,
    *,
    loss,
    size,
    token_count,
    teacher_mean,
    perceptual=None,
):
    """Every loss term of one batch, inside `Tokenizer.apply`.

    Args:
      model: the bound Tokenizer.
      images: float32 [B, R, R, 3] in [-1, 1].
      target: float32 [B, S, S, 3], the image as `token_count` tokens should give it.
      span: noise spans.
      choice: int32 [B, N] ranks among the nearest codes.
      loss: the `loss` part of the config.
      size: S, static.
      token_count: how many tokens are decoded (data).
      teacher_mean: float32 [B, D] or None.
      perceptual: (reconstruction, target) -> scalar, factor included, or None.

    Returns:
      {name: scalar}, factors included, and (triplet, reconstruction [2B, S, S, 3]).
    """
    pair = model.encode_pair(images, span, choice)
    latents = latents_to_decode(model, pair, span)
    reconstruction = model.decode(latents, size, token_count)
    terms = quantizer_losses(model, pair, span, loss)
    if perceptual is not None:
        terms["perceptual"] = perceptual(reconstruction, target)
    target = jnp.concatenate([target, target])
    terms["mse"] = loss.mse * jnp.mean(jnp.square(reconstruction - target))
    if teacher_mean is not None:
        terms["align"] = loss.align * alignment_loss(model, latents[: len(images), 0], teacher_mean)
    return terms, (pair.triplet, reconstruction)


def _teacher(config, c: TokenizerConfig) -> siglip.VisionTransformer | None:
    """The frozen network that the first code is aligned with, if the config asks for one."""
    if not config.loss.align:
        return None
    if not c.teacher_width or "teacher" not in config:
        raise ValueError(
            "config.loss.align > 0 needs config.teacher and config.model.teacher_width"
        )
    fields = config.teacher.to_dict()
    path, random = fields.pop("path", None), fields.pop("random", False)
    if not (path or random):
        raise ValueError(
            "config.teacher.path is not set: the alignment loss needs the weights of its teacher. "
            "Name those of google/siglip2-so400m-patch16-naflex (a folder or model.safetensors, or "
            "hf:google/siglip2-so400m-patch16-naflex to download them), or switch alignment off "
            "with config.loss.align=0; config.teacher.random=True takes a random teacher, to try "
            "the code only (`python -m detailflow_jax.weights tokenizer` lists what a run needs)"
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
    model, teacher = Tokenizer(c), _teacher(config, c)
    smallest = c.resolutions.decoded_size(1)
    vgg = adversarial.perceptual_network(config, smallest, jnp.dtype(c.dtype))
    adversary = adversarial.make(config, c, smallest)
    optimizer = optim.optimizer(config.optim, config.total_steps)
    example = jnp.zeros((1, c.image_size, c.image_size, 3))
    _trained_parts(config, dict.fromkeys(TRAIN_ONLY["decoder"]))

    def init(key: jax.Array) -> TrainState:
        params = model.init(key, example)["params"]
        extra, frozen = {"window": jnp.full((USAGE_WINDOW,), -1, jnp.int32)}, {}
        if teacher is not None:
            frozen["teacher"] = teacher.init(jax.random.fold_in(key, 1), example)["params"]
        if vgg is not None:
            frozen["lpips"] = adversarial.perceptual_init(vgg, jax.random.fold_in(key, 2))
        if adversary is not None:
            extra["discriminator"], frozen["dino"] = adversary.init(jax.random.fold_in(key, 3))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(_trained_parts(config, params)),
            ema=optim.start_average(params, config.ema),
            extra=extra,
            frozen=frozen,
        )

    def plan(step: int) -> tuple[int, dict[str, np.ndarray]]:
        rng = np.random.default_rng((config.seed, step))
        count = c.resolutions.draw_count(rng, config.loss.full_probability)
        size, low = c.resolutions.decoded_size(count), c.resolutions.resolution(count)
        matrix = interpolation.degradation_matrix(c.image_size, low, size)
        return size, {"token_count": np.int32(count), "degrade": matrix}

    def perceptual(state: TrainState):
        """The perceptual term of `all_losses`, at its weight for this step."""
        if vgg is None:
            return None
        weight = config.loss.perceptual * ramp(state.step, 0, config.loss.perceptual_ramp)
        params = state.frozen["lpips"]
        return lambda x, y: weight * adversarial.perceptual_loss(vgg, params, x, y)

    def train_step(state: TrainState, batch, plan, *, variant: int):
        images = pixels.to_float(batch["image"])
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        span, choice = draw_noise(key, c, config.loss, len(images), plan["token_count"])
        target = interpolation.apply_matrices(images, plan["degrade"], plan["degrade"])
        rows = images, target, span, choice

        def forward(params, rows):
            images, target, span, choice = rows
            teacher_mean = None
            if teacher is not None:
                features = siglip.teacher_features(teacher, state.frozen["teacher"], images)
                teacher_mean = jnp.mean(features, axis=1)
            losses = functools.partial(
                all_losses,
                images=images,
                target=target,
                span=span,
                choice=choice,
                loss=config.loss,
                size=variant,
                token_count=plan["token_count"],
                teacher_mean=teacher_mean,
                perceptual=perceptual(state),
            )
            # What is not trained is taken as it is: no gradient is computed for it.
            params = state.params | params
            return model.apply({"params": params}, method=losses)

        trained = _trained_parts(config, state.params)
        if adversary is not None:
            loss = functools.partial(forward, rows=rows)
            return _adversarial_step(state, trained, loss, target, key)

        def total(params, rows, key):
            del key  # nothing else is random
            terms, (triplet, _) = forward(params, rows)
            return sum(terms.values()), terms | {"triplet": triplet}

        (_, terms), grads = optim.gradients(total, trained, rows, key, config.accumulate)
        triplet = terms.pop("triplet")
        return _update(state, trained, grads, terms, triplet)

    def _adversarial_step(state: TrainState, trained: Any, forward: Callable, target, key):
        def loss(params):
            terms, (triplet, reconstruction) = forward(params)
            return (sum(terms.values()), reconstruction), (terms, triplet)

        grads, (terms, triplet), term, held, metrics = adversary.gradients(
            loss,
            trained,
            held=state.extra["discriminator"],
            frozen=state.frozen["dino"],
            target=target,
            step=state.step,
            key=jax.random.fold_in(key, 1),
            last_kernel=lambda grads: grads["decoder"]["to_pixels"]["kernel"],
        )
        new, common = _update(state, trained, grads, terms | term, triplet)
        return new.replace(extra=new.extra | {"discriminator": held}), common | metrics

    def _update(state: TrainState, trained: Any, grads: Any, terms: dict, triplet: jax.Array):
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        params = state.params | optax.apply_updates(trained, updates)
        window = quantization.remember_codes(state.extra["window"], triplet[..., 0])
        metrics = {f"loss/{name}": value for name, value in terms.items()}
        metrics["loss"] = sum(terms.values())
        metrics["gradient_norm"] = optax.global_norm(grads)
        metrics["codebook_usage"] = quantization.codebook_usage(window, c.codebook_size)
        new = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=optim.average(state.ema, params, state.step, config.ema),
            extra=state.extra | {"window": window},
        )
        return new, metrics

    return Task(init, plan, train_step, functools.partial(figures, model))


def figures(model: Tokenizer, state: TrainState, batch) -> dict[str, np.ndarray]:
    """Pictures of the first 8 images of a batch, uint8 [H, W, 3].

    `reconstructions`: originals above reconstructions. `coarse_to_fine`: a row an image, decoded
    from 1 group, 2 groups, ... all tokens, and the original.
    """
    images = pixels.to_float(jnp.asarray(batch["image"][:8]))
    codes = _encode(model, state.params, images)
    strip = decode_progressively(model, state.params, codes, group_counts(model.config))
    show = pixels.to_uint8(jnp.concatenate([strip, images[None]]))
    pair = jnp.stack([show[-1], show[-2]])
    return {
        "reconstructions": pixels.tile(pair),
        "coarse_to_fine": pixels.tile(jnp.swapaxes(show, 0, 1)),
    }


@functools.partial(jax.jit, static_argnums=0)
def _encode(model: Tokenizer, params: Any, images: jax.Array) -> jax.Array:
    return model.apply({"params": params}, images, method="encode")


@functools.partial(jax.jit, static_argnums=(0, 3))
def _decode(model: Tokenizer, params: Any, codes: jax.Array, size: int, num_tokens: jax.Array):
    return model.apply({"params": params}, codes, size, num_tokens, method="decode_codes")


def group_counts(config: TokenizerConfig, most: int = 16) -> list[int]:
    """At most `most` token counts of whole groups, evenly spread, the last one N."""
    groups = config.num_tokens // config.group_size
    picked = np.unique(np.linspace(1, groups, min(groups, most)).round().astype(int))
    return [int(n) * config.group_size for n in picked]


def decode_progressively(model: Tokenizer, params: Any, codes, counts) -> jax.Array:
    """The first n codes for every n in `counts`, enlarged to full size: [counts, B, R, R, 3]."""
    resolutions, full = model.config.resolutions, model.config.image_size
    return jnp.stack(
        [
            interpolation.enlarge(
                _decode(model, params, codes, resolutions.decoded_size(n), jnp.int32(n)), full
            )
            for n in counts
        ]
    )
