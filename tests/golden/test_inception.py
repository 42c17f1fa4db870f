"""The Inception of FID at full size against recorded numbers; its resize against TensorFlow's."""

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch

import full_weights
import golden_files
from detailflow_jax.convert import CheckpointError, mapping, published
from detailflow_jax.convert.registry import NETWORKS
from detailflow_jax.convert.tables import inception as names
from detailflow_jax.models import inception

TOLERANCE = 5 * 2e-6


def adjust(key, w):
    """ "4-d weights by the rule times sqrt(2), the rest by the rule"."""
    return w * np.float32(2**0.5) if w.ndim == 4 else w


def test_names_and_shapes_are_the_published_ones():
    shapes = mapping.published_shapes(names.TABLE, NETWORKS["inception"].abstract(None, scan=False))
    assert shapes | dict.fromkeys(names.COUNTERS, ()) == full_weights.shapes("inception_full")


@pytest.mark.full
def test_recorded_numbers(tmp_path):
    state = full_weights.state_dict("inception_full", ("num_batches_tracked",), adjust)
    path = tmp_path / "inception.pth"
    torch.save({name: torch.from_numpy(np.array(x)) for name, x in state.items()}, path)
    read = published.read("inception", path)
    params = read.params
    assert read.notices == []
    arrays, _, _ = golden_files.read("inception_full")

    @jax.jit
    def run(params, images):
        network = inception.Inception()
        return network.apply({"params": params}, images, capture_intermediates=True)

    features, inside = run(params, arrays["image"])
    inside = inside["intermediates"]
    reduced = {
        name: nn.max_pool(inside[layer]["__call__"][0], (3, 3), (2, 2)).mean((1, 2))
        for name, layer in (("f64", "Conv2d_2b_3x3"), ("f192", "Conv2d_4a_3x3"))
    }
    middle = inside["Mixed_6e"]["__call__"][0][0].mean((1, 2))
    got = reduced | {"f768": middle, "f2048": features.pool, "logits_unbiased": features.logits}
    got["logits"] = features.logits + params["logits"]["bias"]
    for name, value in got.items():
        assert golden_files.error(value, arrays[name]) <= TOLERANCE, name
    branch = np.asarray(inside["Mixed_6d"]["branch1x1"]["__call__"][0])
    np.testing.assert_array_equal(features.spatial, branch[..., :7].reshape(2, -1))
    assert features.spatial.shape == (2, 2023)
    want = torch.softmax(torch.from_numpy(arrays["logits_unbiased"]), -1)
    np.testing.assert_allclose(features.probabilities, want, rtol=0, atol=1e-5 * want.max().item())


def test_resize_is_that_of_tensorflow_1():
    import tensorflow as tf

    images = np.random.default_rng(0).integers(0, 256, (1, 64, 50, 3), np.uint8)
    resize = tf.compat.v1.image.resize_bilinear
    want = (resize(images, (299, 299), align_corners=False).numpy() - 128) / 128
    got = jax.jit(inception.preprocess)(images)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_another_network_is_refused(tmp_path):
    path = tmp_path / "inception_v3_google.pth"
    torch.save({"AuxLogits.conv0.conv.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"no network known.*Inception.*6726825d\.pth"):
        published.read("inception", path)
