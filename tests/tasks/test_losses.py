"""Loss terms as sections of a configuration: switched off, added from outside, renamed."""

import functools
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import small_tasks
from detailflow_jax import tasks
from detailflow_jax.models import siglip
from detailflow_jax.runtime import upgrade
from detailflow_jax.runtime.config import load_config
from detailflow_jax.runtime.errors import ConfigError, UserError
from detailflow_jax.tasks import vae
from detailflow_jax.tasks.losses import Frozen, Loss
from detailflow_jax.train import train

MY_LOSSES = """
import dataclasses
import jax.numpy as jnp
from detailflow_jax.tasks.losses import Loss


@dataclasses.dataclass(frozen=True, eq=False)
class TotalVariation(Loss):
    power: float = 1.0

    def __call__(self, step):
        x = step.reconstruction
        steps = jnp.abs(x[:, 1:] - x[:, :-1])
        return jnp.mean(steps**self.power) + 0.25
"""

MY_CONFIG = """
from ml_collections import ConfigDict
import config_parts
from detailflow_jax.runtime.config import load_config

def get_config():
    config = load_config("{configs}/vae.py:digits:runlocal")
    with config.unlocked():
        config.losses.tv = {{"module": "my_losses:TotalVariation", "weight": 0.5, "power": 2.0}}
        config.losses.mse.weight = 0.0
    return config
"""


def test_a_term_from_outside_trains(tmp_path, monkeypatch):
    """One file and one section: its value is in the metrics and in the gradient."""
    (tmp_path / "my_losses.py").write_text(textwrap.dedent(MY_LOSSES))
    (tmp_path / "my_config.py").write_text(MY_CONFIG.format(configs=small_tasks.CONFIGS))
    monkeypatch.syspath_prepend(tmp_path)
    config = load_config(str(tmp_path / "my_config.py"), ["--config.losses.kl.weight=0.0"])
    config.model.update(channels=4, multipliers=(1, 2), norm_groups=2)
    config.data.image_size = 16
    task = tasks.make_task(config)
    image = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    state, step = small_tasks.start(task), small_tasks.step_function(task)
    before, found = jax.device_get(state.params), []
    for _ in range(2):
        state, metrics = step(state, {"image": image}, {}, variant=None)
        found.append({name: float(x) for name, x in metrics.items()})
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    made = task.train_step.__self__.model.apply(
        {"params": before}, np.float32(image) / 127.5 - 1, key, method=vae.forward
    )
    x = np.asarray(made.reconstruction, np.float64)
    want = 0.5 * (np.mean(np.abs(x[:, 1:] - x[:, :-1]) ** 2.0) + 0.25)
    assert found[0]["loss/tv"] == pytest.approx(want, rel=1e-5)
    # mse and kl have weight 0: this term alone is the loss.
    assert {name for name in found[0] if name.startswith("loss/")} == {"loss/tv"}
    assert found[0]["loss"] == found[0]["loss/tv"]
    assert found[0]["gradient_norm"] > 0 and int(state.step) == 2
    kernel = lambda params: params["decoder"]["conv_out"]["kernel"]  # noqa: E731
    assert not np.array_equal(kernel(before), kernel(state.params))


def section(**fields):
    config = small_tasks.tokenizer_config()
    with config.unlocked():
        config.losses.tv = fields
    return config


WRONG = {
    "no class": (section(weight=1.0), r"losses\.tv: there is no such term.*module"),
    "no weight": (section(module="a:B"), r"losses\.tv has no field `weight`"),
    "no module": (section(weight=1.0, module="not_there:B"), "not_there.*PYTHONPATH"),
    "no loss": (section(weight=1.0, module="json:loads"), "a subclass of"),
    "no field": (
        section(weight=1.0, module="detailflow_jax.tasks.losses.mse:MSE", wieght=1.0),
        r"losses\.tv\.wieght is no field of MSE; expected weight",
    ),
    "posterior": (section(weight=1.0, module="detailflow_jax.tasks.losses.kl:KL"), None),
}


@pytest.mark.parametrize("case", WRONG)
def test_sections_that_are_no_term(case):
    config, message = WRONG[case]
    if message:
        with pytest.raises(ConfigError, match=message):
            tasks.make_task(config)
        return
    task = tasks.make_task(config)
    variant, plan = small_tasks.plan_with(task, 8)
    state = jax.eval_shape(task.init, jax.random.key(0))
    with pytest.raises(ConfigError, match=r"losses\.tv needs 'posterior', which this task"):
        jax.eval_shape(
            lambda state, image: task.train_step(state, {"image": image}, plan, variant=variant),
            jax.tree.map(lambda x: x, small_tasks.nn.unbox(state)),
            np.zeros((2, 16, 16, 3), np.uint8),
        )


BROKEN = """
from detailflow_jax.tasks.losses.mse import MSE

class Broken(MSE):
    @classmethod
    def make(cls, name, section, setting):
        return int("a bug")
"""


def test_a_bug_in_a_term_keeps_its_traceback(tmp_path, monkeypatch):
    """A ValueError is the user's only where a section of the configuration becomes a dataclass."""
    (tmp_path / "broken_loss.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    config = section(module="broken_loss:Broken", weight=1.0)
    with pytest.raises(ValueError, match="a bug") as caught:
        train(config, str(tmp_path / "run"))
    assert not isinstance(caught.value, UserError)


def test_a_term_without_a_value_is_none():
    class Empty(Loss):
        pass

    with pytest.raises(TypeError, match="__call__"):
        Empty(weight=1.0)


def test_an_unknown_field_of_a_network_names_the_closest():
    config = small_tasks.generator_config()
    with config.unlocked():
        config.model.num_clases = 3
    with pytest.raises(ConfigError, match=r"config\.model\.num_clases .* num_classes"):
        tasks.make_task(config)


def test_a_term_of_weight_0_needs_no_weights():
    config = load_config("configs/tokenizer.py:detailflow_16", OFF)
    assert tasks.make_task(config).frozen == ()
    config = load_config("configs/tokenizer.py:detailflow_16:plain")
    assert tasks.make_task(config).frozen == ()


OFF = [f"--config.losses.{name}.weight=0" for name in ("align", "perceptual", "adversarial")]


@pytest.mark.parametrize("kind", ["tokenizer", "vae"])
def test_old_names_name_the_new_ones(kind):
    fields = load_config(f"configs/{kind}.py:digits")
    for old, new in upgrade.RENAMED[kind].items():
        with pytest.raises(ConfigError, match=rf"config\.{old} is now --config\.{new}$"):
            load_config(f"configs/{kind}.py:digits", [f"--config.{old}=1"])
        assert upgrade._at(fields, new) is not upgrade._ABSENT, new


def test_a_config_with_old_names_is_refused(tmp_path):
    text = "from ml_collections import ConfigDict\n"
    text += "def get_config():\n    return ConfigDict({'task': 'vae', 'loss': {'kl': 1.0}})\n"
    (tmp_path / "old.py").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.loss\.kl is now config\.losses\.kl\.weight"):
        load_config(str(tmp_path / "old.py"))


def test_fields_as_written_before_are_those_of_today():
    loss = {"mse": 2.0, "kl": 3.0, "perceptual": 0.0, "perceptual_ramp": 4, "adversarial": 0.5}
    perceptual = {"path": None, "linear": None, "random": True}
    old = {"task": "vae", "loss": loss, "perceptual": perceptual, "seed": 1}
    assert upgrade.upgraded(old) == {
        "task": "vae",
        "seed": 1,
        "losses": {
            "mse": {"weight": 2.0},
            "kl": {"weight": 3.0},
            "perceptual": {"weight": 0.0, "ramp": 4, **perceptual},
            "adversarial": {"weight": 0.5},
        },
    }
    assert upgrade.upgraded({"task": "generator", "loss": {"correction": 0.3}}) == {
        "task": "generator",
        "loss": {"correction": 0.3},
    }


def test_frozen_kernels_are_held_as_they_are_used():
    vit = siglip.ViTConfig(width=32, depth=2, num_heads=2, mlp_dim=64)
    network = siglip.VisionTransformer(vit, jnp.bfloat16)
    images = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3))
    make = lambda key: nn.unbox(network.init(key, images)["params"])  # noqa: E731
    full, half = (
        Frozen("teacher", "siglip2", make, dtype=dtype).start(jax.random.key(0))
        for dtype in ("float32", "bfloat16")
    )
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(half)}
    assert dtypes == {"float32", "bfloat16"}  # norms, biases and positions stay as they are
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert size(half) < 0.6 * size(full)
    features = jax.jit(functools.partial(siglip.teacher_features, network))
    np.testing.assert_array_equal(features(half, images), features(full, images))
