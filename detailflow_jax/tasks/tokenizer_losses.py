"""The tokenizer's losses but the adversarial one: of the quantizer, of decoded images, alignments.

Shapes: B batch, N tokens (fewer where the input is smaller), R image side, S decoded side, d code
dimension. n is B, or 2B with self-correction: what is decoded from clean codes, then from
corrected ones.
"""

import jax
import jax.numpy as jnp

from detailflow_jax.models.tokenizer import Pair
from detailflow_jax.ops import correction, interpolation, quantization


def one_pass(model, images: jax.Array, num_tokens: int, loss):
    """Encoding without self-correction.

    Args:
      model: the bound Tokenizer.
      images: float32 [B, R, R, 3] in [-1, 1].
      num_tokens: N, how many tokens encode an image.
      loss: the `loss` part of the config.

    Returns:
      codes int32 [B, N]; what is decoded, straight-through, float32 [B, N, d]; {name: scalar},
      the losses `vq`, `commit` and `entropy`, their factors included.
    """
    z = model.first_pass(model.encode_patches(images), num_tokens)
    distances = model.distances(z)
    codes = quantization.nearest_codes(distances)
    entries = model.lookup(codes)
    codebook, commitment = quantization.vq_errors(z, entries)
    entropy = quantization.entropy_loss(distances)
    losses = _with_factors(loss, jnp.mean(codebook), jnp.mean(commitment), entropy)
    return codes, quantization.straight_through(entries, z), losses


def two_passes(model, images: jax.Array, span: correction.Span, choice: jax.Array, loss):
    """Encoding with the paper's self-correction training.

    Args:
      model, images, loss: as of `one_pass`.
      span, choice: where noise strikes; int32 [B, N] ranks among the nearest codes.

    Returns:
      as of `one_pass`: of the clean codes; of both sequences along the batch, [2B, N, d]; over
      both passes.
    """
    pair = model.encode_pair(images, span, choice)
    losses = quantizer_losses(model, pair, span, loss)
    return pair.triplet[..., 0], latents_to_decode(model, pair, span), losses


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
    clean, noisy = correction.pass_weights(span, pair.z.shape[1])
    entropy = clean * quantization.entropy_loss(pair.distances)
    entropy += noisy * quantization.entropy_loss(pair.corrected_distances)
    return _with_factors(
        loss,
        correction.weighted_vq(codebook, codebook2, span),
        correction.weighted_vq(commitment, commitment2, span),
        entropy,
    )


def _with_factors(loss, vq, commitment, entropy) -> dict[str, jax.Array]:
    losses = {"vq": vq, "commit": loss.commitment * commitment}
    return losses | ({"entropy": loss.entropy * entropy} if loss.entropy else {})


def alignment_loss(model, first_code: jax.Array, target: jax.Array) -> jax.Array:
    """-cos(projection of the first code [B, d], mean teacher feature [B, D]), batch mean."""
    predicted = quantization.normalize(model.align(first_code), 1e-8)
    return -jnp.mean(jnp.sum(predicted * quantization.normalize(target, 1e-8), axis=-1))


def repa_loss(predicted: jax.Array, patches: jax.Array) -> jax.Array:
    """-mean cosine of projected decoder tokens and the teacher's patch features, over patches.

    Args:
      predicted: [nB, p * p, D] of B images, n times.
      patches: [B, P * P, D]; brought to the p x p grid by antialiased bilinear interpolation.
    """
    batch, length, width = patches.shape
    have, want = (round(n**0.5) for n in (length, predicted.shape[1]))
    if have != want:
        matrix = interpolation.antialiased_bilinear_matrix(have, want)
        grid = patches.reshape(batch, have, have, width)
        patches = interpolation.apply_matrices(grid, matrix, matrix).reshape(batch, -1, width)
    predicted = predicted.reshape(-1, *patches.shape)  # so that the features need no copies
    cosine = quantization.normalize(predicted, 1e-8) * quantization.normalize(patches, 1e-8)
    return -jnp.mean(jnp.sum(cosine, axis=-1))


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
    patch_features=None,
    perceptual=None,
):
    """Every loss term of one batch but the adversarial one, inside `Tokenizer.apply`.

    Args:
      model: the bound Tokenizer.
      images: float32 [B, R, R, 3] in [-1, 1].
      target: float32 [B, S, S, 3], the image as `token_count` tokens should give it.
      span: where noise strikes; None: no self-correction, one pass of the encoder.
      choice: int32 [B, N], ranks of the noise among the nearest codes.
      loss: the `loss` part of the config.
      size, token_count: S, static; how many tokens are decoded (data).
      teacher_mean: float32 [B, D] or None: the teacher's, for alignment.
      patch_features: float32 [B, P, D] or None: the teacher's, for REPA.
      perceptual: (reconstruction, target) -> scalar, factor included, or None.

    Returns:
      {name: scalar}, factors included, and (clean codes int32 [B, N], reconstruction
      [n, S, S, 3]).
    """
    if span is None:
        codes, latents, terms = one_pass(model, images, choice.shape[1], loss)
    else:
        codes, latents, terms = two_passes(model, images, span, choice, loss)
    decode = model.decode if patch_features is None else model.decode_tapped
    reconstruction = decode(latents, size, token_count)
    if patch_features is not None:
        reconstruction, tapped = reconstruction
        terms["repa"] = loss.repa * repa_loss(tapped, patch_features)
    if perceptual is not None:
        terms["perceptual"] = perceptual(reconstruction, target)
    wanted = jnp.concatenate([target] * (len(reconstruction) // len(target)))
    terms["mse"] = loss.mse * jnp.mean(jnp.square(reconstruction - wanted))
    if teacher_mean is not None:
        terms["align"] = loss.align * alignment_loss(model, latents[: len(images), 0], teacher_mean)
    return terms, (codes, reconstruction)
