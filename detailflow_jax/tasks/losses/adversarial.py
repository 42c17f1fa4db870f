"""The adversarial term, and the training of its discriminator.

The generator's and the discriminator's update are one program. Before the discriminator's start
both are skipped, on the step as data: nothing is compiled anew when they begin.

Shapes: B batch, n rows of reconstructions, a multiple of B; S decoded side. Images are float32
[-1, 1].
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Int, PRNGKeyArray, Shaped

from detailflow_jax.models import discriminator
from detailflow_jax.ops import Array, adversarial, augment
from detailflow_jax.runtime import weights
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.tasks import TrainState, from_section, optim
from detailflow_jax.tasks.losses import Frozen, Loss, Scalar, Setting, Step
from detailflow_jax.tasks.losses.placement import by_batch, gathered, named

KINDS = ("dino", "patchgan")


def _either(started: Bool[Array, ""], active: Callable[[], Any], idle: Callable[[], Any]) -> Any:
    """`active()` once `started`, before that `idle()`; both give arrays of the same shapes.

    On a CPU, XLA runs a convolution inside of a conditional about ten times slower. So there both
    are computed, from the first step on, and one is taken.
    """

    def both():
        return jax.tree.map(functools.partial(jnp.where, started), active(), idle())

    def one():
        return jax.lax.cond(started, active, idle)

    return jax.lax.platform_dependent(cpu=both, default=one)


@jax.custom_vjp
def with_gradient(value: Scalar, x: Shaped[Array, "*x"], gradient: Shaped[Array, "*x"]) -> Scalar:
    """`value`, whose gradient with respect to `x` is taken to be `gradient`."""
    del x, gradient
    return value


def _with_gradient_backward(gradient, cotangent):
    return jnp.zeros_like(cotangent), cotangent * gradient, jnp.zeros_like(gradient)


with_gradient.defvjp(lambda value, x, gradient: (value, gradient), _with_gradient_backward)


def network_config(config: Any, c: Any) -> discriminator.DinoConfig | discriminator.PatchGANConfig:
    """The network of `config.discriminator`.

    `c` has the dtype of the task's own network, and its scan and remat if it has them.

    Raises:
      ConfigError: there is no such kind.
    """
    d = config.discriminator
    if d.kind == "patchgan":
        fields = d.patchgan.to_dict() | {"dtype": c.dtype}
        return from_section(discriminator.PatchGANConfig, fields, "config.discriminator.patchgan")
    if d.kind == "dino":
        stack = {name: getattr(c, name) for name in ("scan", "remat") if hasattr(c, name)}
        fields = d.dino.to_dict() | {"dtype": c.dtype} | stack
        return from_section(discriminator.DinoConfig, fields, "config.discriminator.dino")
    raise ConfigError(f"config.discriminator.kind={d.kind!r} is not one of {', '.join(KINDS)}")


def check(name: str, setting: Setting, network: Any) -> None:
    """Raises ConfigError if fields contradict each other; the text names them."""
    config, d = setting.config, setting.config.discriminator
    if d.loss not in adversarial.GENERATOR_LOSSES:
        raise ConfigError(
            f"config.discriminator.loss={d.loss!r} is not one of "
            f"{', '.join(adversarial.GENERATOR_LOSSES)}"
        )
    if config.accumulate > 1:
        raise ConfigError(
            f"config.accumulate={config.accumulate}: the discriminator normalises over the whole "
            "batch, which comes in parts here; set config.accumulate=1 or "
            f"config.losses.{name}.weight=0"
        )
    if d.consistency and not d.augment:
        raise ConfigError(
            f"config.discriminator.consistency={d.consistency} compares weak and strong "
            "augmentation: set config.discriminator.augment=True or consistency=0"
        )
    if d.kind == "patchgan" and config.get("decode_buckets"):
        raise ConfigError(
            f"config.decode_buckets={config.decode_buckets}: the norms of PatchGAN are over all "
            "positions, also those outside of the image; set config.decode_buckets=0 or "
            "config.discriminator.kind=dino"
        )
    if d.kind == "patchgan" and setting.smallest < 3 * 2**network.num_layers:
        raise ConfigError(
            f"the smallest images are of {setting.smallest} px: PatchGAN with "
            f"config.discriminator.patchgan.num_layers={network.num_layers} needs "
            f"{3 * 2**network.num_layers} at least; take fewer layers"
        )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Adversarial(Loss):
    """The generator's loss against a discriminator, which is trained beside it.

    The discriminator's state is a plain pytree, `disc_state`, in
    `TrainState.extra["discriminator"]`:

        params, opt_state, state (batch statistics and singular vectors), lecam

    Attributes:
      config: `config.discriminator`.
      network: the discriminator's pure functions.
      optimizer: of the discriminator; its schedule begins when the discriminator does.
      smallest: the smallest side of an image that it is given.
      frozen: DINO, or None for PatchGAN.
    """

    config: Any
    network: discriminator.Discriminator
    optimizer: optax.GradientTransformation
    smallest: int
    frozen: Frozen | None = None

    padded = True

    @classmethod
    def make(cls, name, section, setting):
        """See `Loss`."""
        d = setting.config.discriminator
        config = network_config(setting.config, setting.network)
        check(name, setting, config)
        network = discriminator.make(config)
        frozen = None
        if d.kind == "dino":
            frozen = Frozen(
                name="dino",
                network="dino",
                init=lambda key: named(network.init(key, setting.smallest)[2]),
                files=((weights.DINO, d.path),),
                random=d.random,
                config=config,
                untold=("num_heads", "read_blocks", "kernel_size", "dtype", "scan", "remat"),
                described="config.discriminator.dino",
            )
        steps = max(setting.config.total_steps - d.start_step, 1)
        made = {
            "config": d,
            "network": network,
            "optimizer": optim.optimizer(d.optim, steps),
            "smallest": setting.smallest,
            "frozen": frozen,
        }
        return super().make(name, section | made, setting)

    @property
    def balanced(self) -> bool:
        """See `Loss`."""
        return self.config.adaptive

    def init(self, key: PRNGKeyArray) -> dict[str, Any]:
        """See `Loss`; random, in boxes that name axes."""
        params, state, _ = self.network.init(key, self.smallest)
        params = named(params)
        disc_state = {
            "params": params,
            "opt_state": self.optimizer.init(params),
            "state": state,
            "lecam": adversarial.LeCAM.start(),
        }
        return {"discriminator": disc_state}

    def __call__(self, step: Step) -> Scalar:
        """See `Loss`; 0 before the discriminator's start."""
        fakes, state = by_batch(step.reconstruction), step.state
        key, _ = jax.random.split(jax.random.fold_in(step.key, 1))
        disc_state, frozen = state.extra["discriminator"], state.frozen.get("dino", {})
        value, fake_grad, new = self._judge(
            disc_state, frozen, jax.lax.stop_gradient(fakes), state.step, key, step.part
        )
        kept = {"fakes": fakes, "target": step.target, "part": step.part, "state": new}
        step.kept["discriminator"] = kept
        return with_gradient(value, fakes, fake_grad)

    def balance(self, others: Array, ours: Array, number: Int[Array, ""]) -> Scalar:
        """The factor that makes this gradient as large as the others; 1 before the start."""
        factor = adversarial.adaptive_weight(others, ours / self.weight)
        return jnp.where(number >= self.config.start_step, factor, 1.0)

    def update(
        self, state: TrainState, kept: dict[str, Any], key: PRNGKeyArray
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """See `Loss`: a step of the discriminator."""
        kept = kept["discriminator"]
        fakes, target = kept["fakes"], kept["target"]
        _, key = jax.random.split(jax.random.fold_in(key, 1))
        reals = by_batch(jnp.concatenate([target] * (len(fakes) // len(target))))
        disc_state = state.extra["discriminator"] | {"state": kept["state"]}
        frozen = state.frozen.get("dino", {})
        pair, part = (reals, fakes), kept["part"]
        new, metrics = self._update(disc_state, frozen, pair, state.step, key, part)
        return {"discriminator": new}, metrics

    def _view(self, images, key, part, policy=augment.WEAK):
        augment_key, view_key = jax.random.split(key)
        if self.config.augment:
            images = augment.diff_augment(augment_key, images, policy, part)
        return self.network.view(view_key, images, part)

    def _read(self, frozen, views):
        if "patch_embed" in frozen:
            frozen = frozen | {"patch_embed": gathered(frozen["patch_embed"])}
        return self.network.read(frozen, views)

    def _judge(self, disc_state, frozen, fakes, step, key, part):
        """(generator's loss, its gradient with respect to `fakes`, state after the forward)."""

        def loss(fakes):
            features = self._read(frozen, self._view(fakes, key, part))
            params = gathered(disc_state["params"])
            logits, state = self.network.judge(params, disc_state["state"], features, train=True)
            return adversarial.generator_loss(self.config.loss, logits), state

        def active():
            (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(fakes)
            return value, gradient, state

        def idle():
            return jnp.zeros(()), jnp.zeros_like(fakes), disc_state["state"]

        return _either(step >= self.config.start_step, active, idle)

    def _losses(self, params, disc_state, frozen, pair, key, part):
        """(sum, (metrics, state, LeCAM averages)) for a pair of real and fake images."""
        c, state, logits = self.config, disc_state["state"], []
        policies = [augment.WEAK] * 2 + [augment.STRONG] * 2 * bool(c.consistency)
        keys = jax.random.split(key, len(policies))
        views = [self._view(pair[i % 2], keys[i], part, one) for i, one in enumerate(policies)]
        # One pass of the frozen part for all. An image's views lie side by side, so that no row
        # moves to another device; batch statistics are of one set of views at a time.
        together = by_batch(jnp.stack(views, axis=1).reshape(-1, *views[0].shape[1:]))
        features = jax.tree.map(
            lambda x: x.reshape(len(views[0]), len(views), *x.shape[1:]),
            self._read(frozen, together),
        )
        for i in range(len(views)):
            one = jax.tree.map(lambda x, i=i: x[:, i], features)
            out, state = self.network.judge(gathered(params), state, one, train=True)
            logits.append(out)
        weak, strong = logits[:2], logits[2:]
        terms = {"loss": c.weight * adversarial.discriminator_loss(c.loss, *weak)}
        averages = disc_state["lecam"].update(*weak, c.lecam_decay)
        if c.lecam:
            terms["lecam"] = c.weight * c.lecam * averages.penalty(*weak)
        if c.consistency:
            terms["consistency"] = c.consistency * adversarial.consistency_loss(weak, strong)
        watched = {"real": jnp.mean(weak[0]), "fake": jnp.mean(weak[1])}
        return sum(terms.values()), (terms | watched, state, averages)

    def _update(self, disc_state, frozen, pair, step, key, part):
        """`disc_state` after an update, and metrics; before the start nothing changes."""

        def active():
            grads, (metrics, state, averages) = jax.grad(self._losses, has_aux=True)(
                disc_state["params"], disc_state, frozen, pair, key, part
            )
            updates, opt_state = self.optimizer.update(
                grads, disc_state["opt_state"], disc_state["params"]
            )
            params = optax.apply_updates(disc_state["params"], updates)
            metrics["gradient_norm"] = optax.global_norm(grads)
            new = {"params": params, "opt_state": opt_state, "state": state, "lecam": averages}
            return new, metrics

        def idle():
            shapes = jax.eval_shape(active)[1]
            return disc_state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        disc_state, metrics = _either(step >= self.config.start_step, active, idle)
        return disc_state, {f"discriminator/{name}": value for name, value in metrics.items()}
