"""The tokenizer against recorded numbers: encoding, decoding, training losses and gradients."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_files
from detailflow_jax.convert import mapping
from detailflow_jax.convert.tables import tokenizer as names
from detailflow_jax.models import siglip
from detailflow_jax.models.tokenizer import Tokenizer, TokenizerConfig
from detailflow_jax.ops import correction, quantization
from detailflow_jax.tasks import tokenizer as tokenizer_task
from detailflow_jax.tasks.losses import align, compute, mse, quantizer

NOISE = (0, 2, 8, 24)
DECODED = ((32, 64), (16, 48), (4, 24), (1, 8))  # tokens, pixels
TOLERANCE = golden_files.TOKENIZER
LOSSES = {
    "vq": quantizer.VQ(1.0),
    "commit": quantizer.Commitment(0.25),
    "entropy": quantizer.Entropy(0.1),
    "mse": mse.MSE(1.0),
    "align": align.Align(1.0),
}


def trunk(width, depth, heads, mlp):
    return siglip.ViTConfig(width, depth, heads, mlp, patch_size=8, table_side=8)


class Golden:
    """The recorded arrays, and the network with the recorded weights."""

    def __init__(self):
        self.arrays, settings, self.state_dict = golden_files.read("tokenizer_a")
        sizes, encoder, decoder = (settings[k] for k in ("tokenizer", "encoder", "decoder"))
        self.encoder = trunk(
            encoder["hidden_size"],
            encoder["num_hidden_layers"],
            encoder["num_attention_heads"],
            encoder["intermediate_size"],
        )
        width = decoder["embed_dim"]
        self.config = TokenizerConfig(
            image_size=sizes["image_size"],
            num_tokens=sizes["num_latent_tokens"],
            group_size=sizes["group_size"],
            codebook_size=sizes["codebook_size"],
            codebook_dim=sizes["codebook_embed_dim"],
            encoder=self.encoder,
            decoder=trunk(width, decoder["layer_num"], decoder["num_heads"], 4 * width),
            teacher_width=self.encoder.width,
        )
        self.model = Tokenizer(self.config)
        self.images = jnp.asarray(golden_files.nhwc(self.arrays["x"]))
        self.params, self.report = self.load(names.TABLE, self.model)
        self.teacher = siglip.VisionTransformer(self.encoder)
        self.teacher_params, _ = self.load(names.TEACHER, self.teacher)

    def load(self, table, model):
        init = jax.eval_shape(model.init, jax.random.key(0), self.images)
        return mapping.from_published(
            table, self.state_dict, nn.unbox(init)["params"], skip=names.SKIPPED
        )

    def run(self, function, *args):
        """`function(bound model, *args)`, compiled."""
        apply = jax.jit(
            lambda params, *a: self.model.apply({"params": params}, *a, method=function)
        )
        return apply(self.params, *args)


@pytest.fixture(scope="module")
def golden():
    return Golden()


def assert_near(got, want, tolerance=TOLERANCE):
    assert golden_files.error(got, want) <= tolerance


def test_every_recorded_weight_is_used(golden):
    assert not golden.report.missing and not golden.report.unused
    assert all(name.startswith("repa_model.") for name in golden.report.skipped)


# ---------------------------------------------------------------------------- encode and decode


@pytest.fixture(scope="module")
def encoded(golden):
    def everything(model, images):
        tokens, patch_kv = model.encoder.encode_patches(images)
        hidden = model.encoder.read(patch_kv, model.encoder.first_queries(len(images)))
        return {
            "patch_hidden": model.encoder.trunk.final_norm(tokens),
            "hidden": hidden,
            "z": model.quant_conv(hidden),
            "normalized": model.first_pass(patch_kv),
            "codes": model.encode(images),
            "latents": model.lookup(model.encode(images)),
        }

    return golden.run(everything, golden.images)


def test_encoder_hidden_states(golden, encoded):
    assert_near(encoded["patch_hidden"], golden.arrays["enc_patch_hidden"])
    assert_near(encoded["hidden"], golden.arrays["enc_hidden"])
    assert_near(encoded["z"], golden.arrays["z"])
    assert_near(encoded["normalized"], quantization.normalize(golden.arrays["z"]))


def test_codes_are_exact(golden, encoded):
    np.testing.assert_array_equal(encoded["codes"], golden.arrays["indices"])
    assert encoded["codes"].dtype == jnp.int32
    assert_near(encoded["latents"], golden.arrays["quant"])


@pytest.mark.parametrize(("tokens", "size"), DECODED)
def test_decode(golden, tokens, size):
    """Codes cut off, and codes hidden by a count that is data, give the recorded image."""
    latents, want = golden.arrays["quant"], f"dec_t{tokens}_r{size}"
    want = golden_files.nhwc(golden.arrays[want])
    cut = golden.run(lambda m, x: m.decode(x, size), latents[:, :tokens])
    assert_near(cut, want)
    hidden = golden.run(lambda m, x, n: m.decode(x, size, n), latents, jnp.int32(tokens))
    assert_near(hidden, want)


def test_decode_from_codes(golden):
    codes = golden.arrays["indices"].astype(np.int32)
    decoded = golden.run(lambda m, x: m.decode_codes(x, 64), codes)
    assert_near(decoded, golden_files.nhwc(golden.arrays["dec_code"]))


# --------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def teacher_mean(golden):
    features = siglip.teacher_features(golden.teacher, golden.teacher_params, golden.images)
    assert_near(features, golden.arrays["clean/repa_feat"])
    return jnp.mean(features, axis=1)


def losses(model, images, teacher_mean, span, choice):
    """The real training forward, at full resolution from all tokens: terms and the record."""
    rows = images, images, span, choice
    step = tokenizer_task.forward(model, rows, None, size=64, token_count=jnp.int32(32))
    step = dataclasses.replace(step, features={"teacher": teacher_mean[:, None]})
    return compute(LOSSES, step), step


@pytest.fixture(scope="module")
def forward(golden, teacher_mean):
    """(span, choice) -> the loss terms and what they were made of, in one program."""

    def everything(model, images, teacher_mean, span, choice):
        terms, step = losses(model, images, teacher_mean, span, choice)
        index = model.encode_pair(images, span, choice).triplet
        return terms, {"index": index, "recon": step.reconstruction, "quant": step.latents}

    compiled = jax.jit(functools.partial(golden.model.apply, method=everything))
    return functools.partial(compiled, {"params": golden.params}, golden.images, teacher_mean)


def noise(golden, position):
    positions = jnp.full((2,), position, jnp.int32)
    return correction.span_of(positions, golden.config.group_size, golden.config.causal)


@pytest.mark.parametrize("position", NOISE)
def test_training_forward_with_noise(golden, forward, position):
    want = {
        name.partition("/")[2]: value
        for name, value in golden.arrays.items()
        if name.startswith(f"noise{position}/")
    }
    choice = want.pop("choice").astype(np.int32)
    terms, results = forward(noise(golden, position), choice)
    np.testing.assert_array_equal(results["index"], want.pop("index"))
    results["recon"] = np.moveaxis(results["recon"], -1, 1)
    assert set(want) == {"quant", "vq", "commit", "entropy", "recon"}
    for name, value in want.items():
        assert_near((terms | results)[name], value)


def test_training_forward_without_noise(golden, forward):
    choice = golden.arrays["noise0/choice"].astype(np.int32)  # no position is perturbed by it
    terms, results = forward(correction.no_span(2, 32), choice)
    for name in ("vq", "commit", "entropy", "align"):
        assert_near(terms[name], golden.arrays[f"clean/{name}"])
    for column in range(3):
        np.testing.assert_array_equal(results["index"][..., column], golden.arrays["indices"])


def test_training_forward_without_correction(golden, teacher_mean):
    """One pass gives what two give where no noise is."""
    choice = jnp.zeros((2, 32), jnp.int32)

    def run(model, images, mean):
        terms, step = losses(model, images, mean, None, choice)
        return terms, (step.codes, step.reconstruction)

    terms, (codes, reconstruction) = golden.run(run, golden.images, teacher_mean)
    assert terms.keys() == {"vq", "commit", "entropy", "align", "mse"}
    for name in ("vq", "commit", "entropy", "align"):
        assert_near(terms[name], golden.arrays[f"clean/{name}"])
    np.testing.assert_array_equal(codes, golden.arrays["indices"])
    assert_near(reconstruction, golden_files.nhwc(golden.arrays["dec_code"]))


@pytest.fixture(scope="module")
def gradients(golden, teacher_mean):
    """(loss terms, gradients under their published names) of the recorded whole loss."""
    span = noise(golden, int(golden.arrays["grad_case/noise_idx"]))
    choice = golden.arrays["grad_case/choice"].astype(np.int32)

    def total(params, *args):
        terms, _ = golden.model.apply({"params": params}, *args, method=losses)
        return sum(terms.values()), terms

    compiled = jax.jit(jax.grad(total, has_aux=True))
    grads, terms = compiled(golden.params, golden.images, teacher_mean, span, choice)
    return terms, mapping.to_published(names.TABLE, grads)


def recorded(golden, prefix):
    arrays = golden.arrays.items()
    return {k.removeprefix(prefix): v for k, v in arrays if k.startswith(prefix)}


def test_whole_loss(golden, gradients):
    terms, _ = gradients
    for name in ("mse", "vq", "commit", "entropy", "align"):
        assert_near(terms[name], golden.arrays[f"grad_case/{name}"])
    assert_near(sum(terms.values()), golden.arrays["grad_case/loss"])


def test_gradient_of_every_parameter(golden, gradients):
    """Against the largest entry of the whole gradient: one scale for all tensors."""
    want, got = recorded(golden, "grad/"), gradients[1]
    assert set(got) == set(want) | set(recorded(golden, "grad_norm/"))
    scale = max(np.max(np.abs(value)) for value in want.values())
    for name, value in want.items():
        assert np.max(np.abs(got[name] - value)) <= TOLERANCE * scale, name


def test_gradient_of_every_parameter_on_its_own_scale(golden, gradients):
    """Against each tensor's own largest entry.

    The entropy term divides distances by 0.01 before a softmax, so the 1e-7 to which float32 holds
    a distance becomes 1e-5 in the gradient that reaches the encoder. Against the same loss in
    float64 the recorded gradients are off by up to 1.2e-5 of a tensor's largest entry and ours by
    1.1e-5; each rounds its own way. What lies before the quantizer is held to both together.
    """
    for name, value in recorded(golden, "grad/").items():
        got = gradients[1][name]
        if name.endswith("k_proj.bias"):
            # A key's bias adds the same score to every key, which the softmax removes: the exact
            # gradient is 0, and what was recorded is rounding noise.
            assert np.max(np.abs(value)) <= 1e-7, name
            assert np.max(np.abs(got)) <= 1e-8, name
            continue
        before_quantizer = name.startswith(("encoder.", "quant_conv.", "refine_conv."))
        assert_near(got, value, 3e-5 if before_quantizer else TOLERANCE)


def test_gradient_norms_of_large_parameters(golden, gradients):
    """1e-4: the recorded norm is a sequential float32 sum over a million squares."""
    want = recorded(golden, "grad_norm/")
    assert want
    for name, value in want.items():
        norm = np.linalg.norm(gradients[1][name].astype(np.float64))
        assert norm == pytest.approx(float(value), rel=1e-4), name
