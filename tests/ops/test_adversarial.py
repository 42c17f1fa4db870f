"""Adversarial losses, LeCAM, and the weights of the adversarial term."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from detailflow_jax.ops import adversarial

RNG = np.random.default_rng(0)
REAL, FAKE = RNG.normal(0.5, 2, (2, 4, 30)).astype(np.float32)


def test_losses_are_what_their_names_say():
    real, fake = torch.from_numpy(REAL), torch.from_numpy(FAKE)
    cross_entropy = F.binary_cross_entropy_with_logits
    logistic = 0.5 * (
        cross_entropy(real, torch.ones_like(real)) + cross_entropy(fake, torch.zeros_like(fake))
    )
    hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    for kind, want in {"hinge": hinge, "vanilla": logistic, "non_saturating": logistic}.items():
        got = adversarial.discriminator_loss(kind, REAL, FAKE)
        assert float(got) == pytest.approx(float(want), rel=1e-5)
    want = {
        "hinge": -fake.mean(),
        "vanilla": -fake.mean(),
        "non_saturating": cross_entropy(fake, torch.ones_like(fake)),
    }
    for kind, value in want.items():
        got = adversarial.generator_loss(kind, FAKE)
        assert float(got) == pytest.approx(float(value), rel=1e-5)
    with pytest.raises(ValueError, match=r"loss 'lsgan'; expected one of hinge, vanilla"):
        adversarial.generator_loss("lsgan", FAKE)


def test_lecam_in_the_published_order():
    """The averages are updated first, and no gradient passes through them."""

    def loss(real, fake):
        lecam = adversarial.LeCAM.start().update(real, fake, decay=0.9)
        return lecam.penalty(real, fake), lecam

    (got, lecam), gradient = jax.value_and_grad(loss, has_aux=True)(REAL, FAKE)
    real = torch.from_numpy(REAL).requires_grad_()
    fake = torch.from_numpy(FAKE)
    averages = 0.1 * REAL.mean(), 0.1 * FAKE.mean()
    np.testing.assert_allclose(lecam, averages, rtol=1e-5)
    want = F.relu(real - averages[1]).pow(2).mean() + F.relu(averages[0] - fake).pow(2).mean()
    want.backward()
    assert float(got) == pytest.approx(float(want.detach()), rel=1e-5)
    np.testing.assert_allclose(gradient, real.grad, rtol=1e-4, atol=1e-8)


def test_consistency_is_the_mean_over_both():
    weak, strong = (REAL, FAKE[:2]), (REAL + 1, FAKE[:2] - 2)
    assert float(adversarial.consistency_loss(weak, strong)) == pytest.approx((4 * 1 + 2 * 4) / 6)


def test_adaptive_weight():
    a, b = jnp.full((4, 4), 3.0), jnp.full((4, 4), 0.5)
    weight = float(adversarial.adaptive_weight(a, b))
    assert weight == pytest.approx(12 / (2 + 1e-4))
    assert float(adversarial.adaptive_weight(a, 0 * b)) == 1e4  # 12 / 1e-4 is clipped
    gradient = jax.grad(lambda a: adversarial.adaptive_weight(a, b))(a)
    assert not gradient.any()


def test_ramp():
    step = jax.jit(adversarial.ramp, static_argnums=(1, 2))
    got = [float(step(i, 10, 4)) for i in (0, 10, 11, 13, 14, 99)]
    assert got == [0, 0, 0.25, 0.75, 1, 1]
    assert [float(step(i, 10, 0)) for i in (0, 9, 10, 11)] == [0, 0, 1, 1]
    assert float(step(5000, 0, 10_000)) == 0.5
