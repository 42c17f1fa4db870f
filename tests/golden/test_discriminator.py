"""The DINO discriminator against recorded numbers."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

import golden_files
from detailflow_jax.convert import mapping
from detailflow_jax.convert.registry import NETWORKS
from detailflow_jax.convert.tables import discriminator as names
from detailflow_jax.models import discriminator

TOLERANCE = 5 * 2e-6


class Golden:
    """The recorded arrays, and the networks with the recorded weights."""

    def __init__(self):
        self.arrays, settings, state = golden_files.read("discriminator")
        dino = {k[5:]: v for k, v in self.arrays.items() if k.startswith("dino/")}
        told = {
            "num_heads": settings["num_heads"],
            "read_blocks": tuple(settings["key_depths"]),
            "kernel_size": settings["kernel_size"],
        }
        self.config, _ = NETWORKS["dino"].infer(dino, {}, told, "discriminator.npz")
        self.disc = discriminator.make(self.config)
        init = functools.partial(self.disc.init, image_size=settings["image"])
        params, extra, frozen = jax.eval_shape(init, jax.random.key(0))
        self.frozen, self.dino_report = mapping.from_published(
            names.DINO, dino, nn.unbox(frozen), skip=names.DINO_SKIPPED
        )
        self.table = names.heads(self.config.read_points, names.heads_prefix(state))
        variables, self.report = mapping.from_published(
            self.table, state, {"params": params, **extra}, skip=names.counters(self.table)
        )
        self.params = variables.pop("params")
        self.state = variables
        self.images = golden_files.nhwc(self.arrays["x"])

    @functools.cached_property
    def training_forward(self):
        def mean(images, params, state, frozen):  # Weights that are constants would be folded.
            logits, state = self.disc.logits(
                params, state, frozen, images, train=True, key=jax.random.key(0)
            )
            return logits.mean(), (logits, state)

        compiled = jax.jit(jax.value_and_grad(mean, has_aux=True))
        (_, aux), grad = compiled(self.images, self.params, self.state, self.frozen)
        return *aux, grad


@pytest.fixture(scope="module")
def golden():
    return Golden()


def assert_near(got, want):
    assert golden_files.error(got, want) <= TOLERANCE


def test_every_recorded_weight_is_used(golden):
    for report in (golden.dino_report, golden.report):
        assert not report.missing and not report.unused


def test_features(golden):
    features = jax.jit(golden.disc.trunk.apply)({"params": golden.frozen}, golden.images)
    assert len(features) == golden.config.read_points == 3
    for i, x in enumerate(features):
        assert_near(np.swapaxes(x, 1, 2), golden.arrays[f"act{i}"])


def test_training_logits(golden):
    assert_near(golden.training_forward[0], golden.arrays["logits_train"])


def test_gradient_with_respect_to_the_image(golden):
    want = golden_files.nhwc(golden.arrays["grad_x_of_mean"])
    assert_near(golden.training_forward[2], want)


def test_state_after_a_training_forward(golden):
    got = mapping.to_published(
        golden.table, {"params": golden.params, **golden.training_forward[1]}
    )
    counters = names.counters(golden.table)
    want = {k[6:]: v for k, v in golden.arrays.items() if k.startswith("after/")}
    assert got.keys() | set(counters) == want.keys()
    for name in got:
        assert_near(got[name], want[name])
    moved = [k for k in got if np.any(got[k] != golden.arrays[f"sd/{k}"])]
    # Mean and variance of two norms, u and v of three convolutions, but for u = +-1 of one output.
    assert len(moved) == (2 * 2 + 2 * 3 - 1) * golden.config.read_points


def test_evaluation_logits_after_it(golden):
    state = golden.training_forward[1]
    logits, same = golden.disc.logits(
        golden.params, state, golden.frozen, golden.images, train=False
    )
    assert_near(logits, golden.arrays["logits_eval_after"])
    assert same is state
