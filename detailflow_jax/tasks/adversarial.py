"""Perceptual and adversarial terms of a reconstruction: what a task adds to its own losses.

The generator's and the discriminator's update are one program. Before the discriminator's start
both are skipped, on the step as data: nothing is compiled anew when they begin.

Shapes: B batch, n rows of reconstructions, a multiple of B; S decoded side. Images are float32
[-1, 1].
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from detailflow_jax.models import discriminator, lpips
from detailflow_jax.ops import adversarial, augment
from detailflow_jax.tasks import TrainState, optim

KINDS = ("dino", "patchgan")
_SPLIT_FROM = 2**16


def named(params: Any) -> Any:
    """Large kernels in boxes that let the mesh split their last axis; all else as it is."""
    is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731

    def box(x):
        if is_box(x) or x.ndim < 3 or x.size < _SPLIT_FROM:
            return x
        return nn.LogicallyPartitioned(x, (*(None,) * (x.ndim - 1), "embed"))

    return jax.tree.map(box, params, is_leaf=is_box)


def _gathered(params: Any) -> Any:
    """Whole on every device, so that a convolution splits its batch and not its channels."""
    return jax.tree.map(lambda x: nn.with_logical_constraint(x, (None,) * x.ndim), params)


def _either(started: jax.Array, active: Callable[[], Any], idle: Callable[[], Any]) -> Any:
    """`active()` once `started`, before that `idle()`; the same arrays from both.

    XLA runs a convolution inside of a conditional some ten times slower on a CPU. So there both
    are computed, from the first step on, and one is taken.
    """

    def both():
        return jax.tree.map(functools.partial(jnp.where, started), active(), idle())

    def one():
        return jax.lax.cond(started, active, idle)

    return jax.lax.platform_dependent(cpu=both, default=one)


def _by_batch(images: jax.Array) -> jax.Array:
    return nn.with_logical_constraint(images, ("batch", None, None, None))


# -------------------------------------------------------------------------------------- perceptual


def perceptual_network(config, smallest: int, dtype: Any) -> lpips.LPIPS | None:
    """The frozen LPIPS of `config.loss.perceptual`, None where that is 0.

    Args:
      config: of the task.
      smallest: the smallest side of an image that it will be given.
      dtype: of its convolutions.

    Raises:
      ValueError: images too small for VGG16.
    """
    if not config.loss.perceptual:
        return None
    if smallest < lpips.SMALLEST:
        raise ValueError(
            f"config.loss.perceptual={config.loss.perceptual}: the smallest images are of "
            f"{smallest} px, LPIPS needs {lpips.SMALLEST} at least; set config.loss.perceptual=0"
        )
    return lpips.LPIPS(dtype)


def perceptual_init(network: lpips.LPIPS, key: jax.Array) -> Any:
    """Random parameters of LPIPS, to be replaced by the published ones."""
    example = jnp.zeros((1, lpips.SMALLEST, lpips.SMALLEST, 3))
    return named(network.init(key, example, example)["params"])


def perceptual_loss(
    network: lpips.LPIPS, params: Any, reconstruction: jax.Array, target: jax.Array
) -> jax.Array:
    """Mean LPIPS of reconstructions [n, S, S, 3] and their targets [B, S, S, 3], repeated."""
    variables = {"params": _gathered(params)}
    features = network.apply(variables, _by_batch(reconstruction), method="features")
    # A target stands for several reconstructions: its features are computed once.
    wanted = network.apply(variables, target, method="features")
    times = len(reconstruction) // len(target)
    wanted = tuple(jnp.concatenate([x] * times) for x in wanted)
    return jnp.mean(network.apply(variables, features, wanted, method="compare"))


def perceptual_term(
    loss: Any, network: lpips.LPIPS | None, state: TrainState
) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """`perceptual_loss` at its weight for this step, of (reconstruction, target); or None.

    Args:
      loss: the `loss` part of the config.
      network: of `perceptual_network`.
      state: of the training step; `frozen["lpips"]` is the network's.
    """
    if network is None:
        return None
    weight = loss.perceptual * adversarial.ramp(state.step, 0, loss.perceptual_ramp)
    return lambda x, y: weight * perceptual_loss(network, state.frozen["lpips"], x, y)


# ------------------------------------------------------------------------------------- adversarial


def network_config(config, c: Any) -> discriminator.DinoConfig | discriminator.PatchGANConfig:
    """The network of `config.discriminator`.

    `c` has the dtype of the task's own network, and its scan and remat where it knows of them.

    Raises:
      ValueError: no such kind.
    """
    d = config.discriminator
    if d.kind == "patchgan":
        return discriminator.PatchGANConfig(**d.patchgan.to_dict(), dtype=c.dtype)
    if d.kind == "dino":
        stack = {name: getattr(c, name) for name in ("scan", "remat") if hasattr(c, name)}
        return discriminator.DinoConfig(**d.dino.to_dict(), dtype=c.dtype, **stack)
    raise ValueError(f"config.discriminator.kind={d.kind!r} is not one of {', '.join(KINDS)}")


def make(config, c: Any, smallest: int) -> "Adversary | None":
    """The adversary of `config.loss.adversarial`, None where that is 0.

    Args:
      config: of the task.
      c: of the task's network; see `network_config`.
      smallest: the smallest side of an image that it will be given.

    Raises:
      ValueError: fields that contradict each other; the text names them.
    """
    if not config.loss.adversarial:
        return None
    d = config.discriminator
    network = network_config(config, c)
    if d.loss not in adversarial.GENERATOR_LOSSES:
        raise ValueError(
            f"config.discriminator.loss={d.loss!r} is not one of "
            f"{', '.join(adversarial.GENERATOR_LOSSES)}"
        )
    if config.accumulate > 1:
        raise ValueError(
            f"config.accumulate={config.accumulate}: the discriminator normalises over the whole "
            "batch, which comes in parts here; set config.accumulate=1 or config.loss.adversarial=0"
        )
    if d.consistency and not d.augment:
        raise ValueError(
            f"config.discriminator.consistency={d.consistency} compares weak and strong "
            "augmentation: set config.discriminator.augment=True or consistency=0"
        )
    if d.kind == "patchgan" and smallest < 3 * 2**network.num_layers:
        raise ValueError(
            f"the smallest images are of {smallest} px: PatchGAN with "
            f"config.discriminator.patchgan.num_layers={network.num_layers} needs "
            f"{3 * 2**network.num_layers} at least; take fewer layers"
        )
    return Adversary(
        config=d,
        weight=config.loss.adversarial,
        network=discriminator.make(network),
        optimizer=optim.optimizer(d.optim, max(config.total_steps - d.start_step, 1)),
        smallest=smallest,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Adversary:
    """A discriminator in training. What it holds is a plain pytree in `TrainState.extra`:

        params, opt_state, state (batch statistics and singular vectors), lecam

    Attributes:
      config: `config.discriminator`.
      weight: of the generator's adversarial loss.
      network: the discriminator's pure functions.
      optimizer: of the discriminator; its schedule begins when the discriminator does.
      smallest: the smallest side of an image that it is given.
    """

    config: Any
    weight: float
    network: discriminator.Discriminator
    optimizer: optax.GradientTransformation
    smallest: int

    def init(self, key: jax.Array) -> tuple[dict[str, Any], Any]:
        """(what it holds, the frozen parameters), random; in boxes that name axes."""
        params, state, frozen = self.network.init(key, self.smallest)
        params = named(params)
        held = {
            "params": params,
            "opt_state": self.optimizer.init(params),
            "state": state,
            "lecam": adversarial.LeCAM.start(),
        }
        return held, named(frozen)

    def gradients(
        self,
        loss: Callable[[Any], tuple[tuple[jax.Array, jax.Array], Any]],
        params: Any,
        *,
        held: dict[str, Any],
        frozen: Any,
        target: jax.Array,
        step: jax.Array,
        key: jax.Array,
        last_kernel: Callable[[Any], jax.Array],
    ):
        """The generator's gradient, adversarial term included, and the discriminator's update.

        Args:
          loss: params -> ((the other losses' sum, reconstruction [n, S, S, 3]), auxiliary values).
          params: of the generator.
          held, frozen: as `init` made them, without boxes.
          target: [B, S, S, 3], B divides n.
          step: int32 scalar.
          key: of augmentation and views.
          last_kernel: gradient -> the part of the generator's last layer (adaptive weight).

        Returns:
          (gradient, auxiliary values, {"adversarial": loss term, weight included}, held, metrics).
        """
        (value, fakes), pull, aux = jax.vjp(loss, params, has_aux=True)
        fakes = _by_batch(fakes)
        generator_key, discriminator_key = jax.random.split(key)
        judged, nudge, state = self._judge(held, frozen, fakes, step, generator_key)
        weight, metrics = jnp.float32(self.weight), {}
        if self.config.adaptive:
            # Only the last kernel's gradient is used: the compiler drops the rest of these two.
            (others,) = pull((jnp.ones_like(value), jnp.zeros_like(nudge)))
            (ours,) = pull((jnp.zeros_like(value), nudge))
            factor = adversarial.adaptive_weight(last_kernel(others), last_kernel(ours))
            weight *= jnp.where(step >= self.config.start_step, factor, 1.0)
            metrics["adversarial_weight"] = weight
        (gradient,) = pull((jnp.ones_like(value), weight * nudge))
        reals = _by_batch(jnp.concatenate([target] * (len(fakes) // len(target))))
        held, judgement = self._update(
            held | {"state": state}, frozen, (reals, fakes), step, discriminator_key
        )
        return gradient, aux, {"adversarial": weight * judged}, held, metrics | judgement

    def _view(self, images, key, policy=augment.WEAK):
        augment_key, view_key = jax.random.split(key)
        if self.config.augment:
            images = augment.diff_augment(augment_key, images, policy)
        return self.network.view(view_key, images)

    def _read(self, frozen, views):
        if "patch_embed" in frozen:
            frozen = frozen | {"patch_embed": _gathered(frozen["patch_embed"])}
        return self.network.read(frozen, views)

    def _judge(self, held, frozen, fakes, step, key):
        """(generator's loss, its gradient with respect to `fakes`, state after the forward)."""

        def loss(fakes):
            features = self._read(frozen, self._view(fakes, key))
            params = _gathered(held["params"])
            logits, state = self.network.judge(params, held["state"], features, train=True)
            return adversarial.generator_loss(self.config.loss, logits), state

        def active():
            (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(fakes)
            return value, gradient, state

        def idle():
            return jnp.zeros(()), jnp.zeros_like(fakes), held["state"]

        return _either(step >= self.config.start_step, active, idle)

    def _losses(self, params, held, frozen, pair, key):
        """(sum, (metrics, state, LeCAM averages)) for a pair of real and fake images."""
        c, state, logits = self.config, held["state"], []
        policies = [augment.WEAK] * 2 + [augment.STRONG] * 2 * bool(c.consistency)
        keys = jax.random.split(key, len(policies))
        views = [self._view(pair[i % 2], keys[i], policy) for i, policy in enumerate(policies)]
        # One pass of the frozen part for all. An image's views lie side by side, so that no row
        # moves to another device; batch statistics are of one set of views at a time.
        together = _by_batch(jnp.stack(views, axis=1).reshape(-1, *views[0].shape[1:]))
        features = jax.tree.map(
            lambda x: x.reshape(len(views[0]), len(views), *x.shape[1:]),
            self._read(frozen, together),
        )
        for i in range(len(views)):
            one = jax.tree.map(lambda x, i=i: x[:, i], features)
            out, state = self.network.judge(_gathered(params), state, one, train=True)
            logits.append(out)
        weak, strong = logits[:2], logits[2:]
        terms = {"loss": c.weight * adversarial.discriminator_loss(c.loss, *weak)}
        averages = held["lecam"].update(*weak, c.lecam_decay)
        if c.lecam:
            terms["lecam"] = c.weight * c.lecam * averages.penalty(*weak)
        if c.consistency:
            terms["consistency"] = c.consistency * adversarial.consistency_loss(weak, strong)
        watched = {"real": jnp.mean(weak[0]), "fake": jnp.mean(weak[1])}
        return sum(terms.values()), (terms | watched, state, averages)

    def _update(self, held, frozen, pair, step, key):
        """What the discriminator holds after its update, and metrics; idle before the start."""

        def active():
            grads, (metrics, state, averages) = jax.grad(self._losses, has_aux=True)(
                held["params"], held, frozen, pair, key
            )
            updates, opt_state = self.optimizer.update(grads, held["opt_state"], held["params"])
            params = optax.apply_updates(held["params"], updates)
            metrics["gradient_norm"] = optax.global_norm(grads)
            new = {"params": params, "opt_state": opt_state, "state": state, "lecam": averages}
            return new, metrics

        def idle():
            shapes = jax.eval_shape(active)[1]
            return held, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        held, metrics = _either(step >= self.config.start_step, active, idle)
        return held, {f"discriminator/{name}": value for name, value in metrics.items()}
