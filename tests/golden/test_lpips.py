"""LPIPS at full size against recorded numbers, and the forms in which its weights are published."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import full_weights
import golden_files
from detailflow_jax.convert import CheckpointError, mapping, published
from detailflow_jax.convert.registry import NETWORKS
from detailflow_jax.convert.tables import lpips as names
from detailflow_jax.models import lpips
from detailflow_jax.models.lpips import LPIPS, VGG16, unit_channels

TOLERANCE = 5 * 2e-6
LINEAR = tuple(f"lin{i}.model.1.weight" for i in range(5))


def adjust(key, w):
    """ "conv weights by the rule times sqrt(2); lin weights absolute value of the rule"."""
    if key.startswith("lin"):
        return np.abs(w)
    return w * np.float32(2**0.5) if w.ndim == 4 else w


@pytest.fixture(scope="module")
def state():
    """The recorded model's state dict, in DetailFlow's names."""
    return full_weights.state_dict(
        "lpips_full", ("scaling_layer.shift", "scaling_layer.scale"), adjust
    )


def from_tensors(tensors):
    abstract = NETWORKS["lpips"].abstract(None, scan=False)
    table, skipped = names.layout(tensors, abstract, "here")
    return mapping.from_published(table, tensors, abstract, skip=skipped, allow_unused=False)


@pytest.fixture(scope="module")
def params(state):
    params, report = from_tensors(state)
    assert not report.missing and not report.unused
    assert set(report.skipped) == {"scaling_layer.shift", "scaling_layer.scale"}
    return params


def assert_near(got, want):
    assert golden_files.error(got, want) <= TOLERANCE


@pytest.mark.full
def test_distance_and_features(params):
    arrays, _, _ = golden_files.read("lpips_full")
    a, b = golden_files.nhwc(arrays["a"]), golden_files.nhwc(arrays["b"])

    @jax.jit
    def both(params, a, b):
        features = LPIPS().apply({"params": params}, a, method="features")
        return LPIPS().apply({"params": params}, a, b), features

    distance, features = both(params, a, b)
    assert_near(distance, arrays["distance"])
    for i, feature in enumerate(features):
        assert_near(jnp.mean(feature, axis=(1, 2)), arrays[f"feat{i}_mean"])


@pytest.mark.parametrize("shape", [(32, 48), (16, 32)])
def test_small_images_by_another_implementation(params, shape):
    """The last features have two pixels a side, or one: a case of its own here."""
    x = np.random.default_rng(0).uniform(-1, 1, (1, *shape, 3)).astype(np.float32)
    vgg = params["vgg"]
    got = jax.jit(VGG16().apply)({"params": vgg}, x)[-1]
    y = torch.from_numpy(np.moveaxis(x, -1, 1))
    for i in range(13):
        y = torch.nn.functional.max_pool2d(y, 2) if i in (2, 4, 7, 10) else y
        kernel, bias = (np.array(vgg[f"conv_{i}"][name]) for name in ("kernel", "bias"))
        kernel = torch.from_numpy(kernel.transpose(3, 2, 0, 1))
        y = torch.nn.functional.conv2d(y, kernel, torch.from_numpy(bias), padding=1).relu()
    assert got.shape == (1, shape[0] // 16, shape[1] // 16, 512)
    assert_near(got, np.moveaxis(y.numpy(), 1, -1))


@pytest.mark.parametrize("shape", [(2, 2), (1, 2), (2, 5)])
def test_a_convolution_of_few_pixels_and_its_gradients(shape):
    rng = np.random.default_rng(1)
    x, cotangent = rng.normal(size=(2, 3, *shape, 8)).astype(np.float32)
    convolution = nn.Conv(8, (3, 3), padding=1)
    variables = convolution.init(jax.random.key(0), x)

    def pulled(run):
        found, pull = jax.vjp(lambda v, x: run(convolution.bind(v), x), variables, x)
        return jax.tree.leaves((found, pull(cotangent)))

    plain = pulled(lambda bound, x: bound(x))
    for a, b in zip(pulled(lpips._in_three), plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_gradient_is_finite_where_features_vanish():
    feature = jnp.zeros((1, 2, 2, 3)).at[0, 0, 0].set(jnp.array([3e-4, 0.0, 4e-4]))
    unit, gradient = jax.value_and_grad(lambda x: unit_channels(x).sum())(feature)
    assert float(unit) == pytest.approx(1.4, rel=1e-5)  # eps is small even against this
    assert np.isfinite(gradient).all() and not gradient[0, 1].any()


def test_too_small_images_are_refused():
    images = jnp.zeros((1, 8, 32, 3))
    with pytest.raises(ValueError, match=r"images of \(8, 32\); expected sides of 16 at least"):
        jax.eval_shape(LPIPS().init, jax.random.key(0), images, images)


# ---------------------------------------------------------------------------------- published forms


def in_form(state, form):
    """The same tensors in another of the published forms."""
    params, _ = from_tensors(state)
    return mapping.to_published(names.table(form), params)


def save(path, tensors):
    torch.save({k: torch.from_numpy(np.ascontiguousarray(x)) for k, x in tensors.items()}, path)
    return path


def test_every_published_form_is_read(tmp_path, state, params):
    torchvision = in_form(state, "torchvision")
    linear = {name: torchvision.pop(name) for name in LINEAR}
    numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # as torchvision counts its layers
    want = {f"features.{i}.{part}" for i in numbers for part in ("weight", "bias")}
    assert torchvision.keys() == want
    torchvision["classifier.0.bias"] = np.zeros(3, np.float32)
    package = in_form(state, "lpips")
    slices = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}
    want = {
        f"net.slice{k}.{i}.{part}" for k, at in slices.items() for i in at
        for part in ("weight", "bias")
    }  # fmt: skip
    assert package.keys() == want | set(LINEAR)
    package |= {f"lins.{i}.model.1.weight": package[name] for i, name in enumerate(LINEAR)}
    files = [
        (save(tmp_path / "vgg16.pth", torchvision), save(tmp_path / "vgg.pth", linear)),
        (tmp_path / "vgg.pth", tmp_path / "vgg16.pth"),
        (save(tmp_path / "lpips.pth", package),),
        (save(tmp_path / "state.pth", state),),
    ]
    for paths in files:
        found = published.read("lpips", *paths)
        read = found.params
        assert found.notices == []
        for path, x in mapping.flatten(params).items():
            np.testing.assert_array_equal(mapping.flatten(read)[path], x)


def test_a_part_alone_says_what_is_missing(tmp_path, state):
    torchvision = in_form(state, "torchvision")
    linear = {name: torchvision.pop(name) for name in LINEAR}
    with pytest.raises(CheckpointError, match=r"VGG16 is not in it.*vgg16-397923af"):
        published.read("lpips", save(tmp_path / "vgg.pth", linear))
    with pytest.raises(CheckpointError, match=r"expected lin0\.model\.1\.weight"):
        published.read("lpips", save(tmp_path / "vgg16.pth", torchvision))
