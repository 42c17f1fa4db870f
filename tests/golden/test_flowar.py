"""FlowAR against recorded numbers: training pass, velocity field, sampling scale by scale."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_files
from detailflow_jax.convert import mapping
from detailflow_jax.convert.tables import flowar as names
from detailflow_jax.models import flow_sampler, layers
from detailflow_jax.models.flowar import FlowAR, FlowARConfig, example
from detailflow_jax.ops import logits as filters
from detailflow_jax.ops import scales as grids
from detailflow_jax.tasks import flowar as task

SCALES = (1, 2, 4, 8, 16)


class Golden:
    """The recorded arrays, and the network with the recorded weights."""

    def __init__(self, name):
        self.arrays, self.settings, self.state_dict = golden_files.read(name)
        sizes, head = self.settings["model"], self.settings["args"]
        self.config = FlowARConfig(
            width=sizes["encoder_embed_dim"],
            first_depth=sizes["encoder_depth"],
            second_depth=sizes["decoder_depth"],
            num_heads=sizes["encoder_num_heads"],
            scales=tuple(head["scale"]),
            head_width=head["diffloss_w"],
            head_depth=head["diffloss_d"],
            injection="spatial_cross" if head["cross"] else "spatial",
        )
        self.model = FlowAR(self.config)
        init = jax.eval_shape(self.model.init, jax.random.key(0), *example(self.config))
        self.params, self.report = mapping.from_published(
            names.TABLE, self.state_dict, nn.unbox(init)["params"], skip=names.SKIPPED
        )
        self.labels = self.arrays["y"].astype(np.int32)

    def train_arrays(self):
        """(latents, labels after dropping, times [B, K], noise [B, T, C])."""
        a, count = self.arrays, len(self.config.scales)
        labels = np.where(a["train/label_drop_u"] < 0.1, self.config.num_classes, self.labels)
        times = np.stack([a[f"train/t{k}"] for k in range(count)], axis=1)
        noise = np.concatenate([a[f"train/noise{k}"] for k in range(count)], axis=1)
        return golden_files.nhwc(a["x"]), labels, times, noise


@functools.cache
def load(name):
    return Golden(name)


@pytest.fixture(params=["flowar_attn_mlp", "flowar_cross_attn"])
def golden(request):
    return load(request.param)


def test_every_recorded_weight_is_used(golden):
    assert not golden.report.missing and not golden.report.unused


def test_training_semantics_and_loss(golden):
    latents, labels, times, noise = golden.train_arrays()
    losses, semantics = jax.jit(functools.partial(task.flow_losses, golden.model))(
        golden.params, grids.pyramid(latents, SCALES), labels, times, noise
    )
    loss = np.sum(task.scale_weights(golden.config) * losses)
    assert golden_files.error(semantics, golden.arrays["train/semantics"]) <= golden_files.FLOWAR
    assert golden_files.error(loss, golden.arrays["train/loss"]) <= golden_files.FLOWAR


def test_velocity(golden):
    velocity = jax.jit(functools.partial(golden.model.apply, method="velocity", scale=4))
    a = golden.arrays
    got = velocity({"params": golden.params}, a["vel/x"], a["vel/t"], a["vel/cond"])
    assert golden_files.error(got, a["vel/out"]) <= golden_files.VELOCITY


def options(arrays, case, **changes):
    fields = {"guidance_high": float(arrays[f"{case}/guidance_high"])} | changes
    times = flow_sampler.flow_times(len(SCALES), int(arrays[f"{case}/num_steps"]))
    return flow_sampler.FlowSamplingOptions(times, **fields)


SAMPLES = [("flowar_attn_mlp", "sample_a")]
SAMPLES += [
    pytest.param(*names, marks=pytest.mark.full)
    for names in (
        ("flowar_attn_mlp", "sample_b"),
        ("flowar_cross_attn", "sample_a"),
        ("flowar_cross_attn", "sample_b"),
    )
]


@pytest.mark.parametrize(("golden", "case"), SAMPLES, indirect=["golden"])
def test_sampling_scale_by_scale(golden, case):
    a, unrolled = golden.arrays, case == "sample_b"  # one case in each layout
    model, params = golden.model, golden.params
    if unrolled:
        model = FlowAR(dataclasses.replace(golden.config, scan=False))
        params = layers.unstack_layers(params)

    def run(params, labels, noise):
        keys = jax.random.split(jax.random.key(0), len(labels))
        factors = flow_sampler.guidance_factors(float(a[f"{case}/cfg"]), len(SCALES))
        scales = flow_sampler.sample_scales(
            model, params, labels, keys, factors, noise, options=options(a, case)
        )
        return list(scales)

    batch = len(golden.labels)
    noise = [a[f"{case}/noise{k}"][:batch] for k in range(len(SCALES))]
    found = jax.jit(run)(params, golden.labels, noise)
    for k, (semantics, _) in enumerate(found):
        want = a[f"{case}/semantics{k}"]
        semantics = np.concatenate(filters.unpair(semantics))
        assert golden_files.error(semantics, want) <= golden_files.SAMPLED, f"scale {k}"
    latent = found[-1][1].reshape(batch, 16, 16, -1)
    want = golden_files.nhwc(a[f"{case}/latent"])
    assert golden_files.error(latent, want) <= golden_files.SAMPLED


def test_cached_semantics_are_those_of_one_masked_pass(golden):
    c = golden.config

    def both(params, latents, labels):
        targets, inputs = grids.pyramid(latents, SCALES)
        full = golden.model.apply({"params": params}, inputs, labels, method="semantics")
        cache, parts = None, []
        plain = flow_sampler.FlowSamplingOptions((), guided=False)
        program = flow_sampler.Sampling(golden.model, params, plain, None, None)
        for scale in range(len(SCALES)):
            earlier = targets[:, slice(*c.offsets[scale - 1 : scale + 1])] if scale else None
            part, cache = program.semantics(scale, labels, earlier, cache)
            parts.append(part)
        return full, jnp.concatenate(parts, axis=1)

    latents = golden_files.nhwc(golden.arrays["x"])
    full, cached = jax.jit(both)(golden.params, latents, golden.labels)
    assert golden_files.error(cached, full) <= golden_files.FLOWAR


def test_the_mask_is_the_published_one(golden):
    want = golden.state_dict["mask"][0, 0] == 0
    np.testing.assert_array_equal(golden.config.mask(), want)
