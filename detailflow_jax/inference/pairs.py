"""Which models belong together: codes or latents, and what decodes them."""

from detailflow_jax.inference.errors import InputError, as_input_error
from detailflow_jax.inference.models import VAE, FlowAR, Generator, Model, Tokenizer
from detailflow_jax.models.flowar import check_vae


def check_pair(decoder: Model, model: Model) -> None:
    """Raises InputError unless the model makes codes, or latents, that the decoder reads.

    Sizes have to agree. Where it is known on whose codes or latents the model was trained, the
    decoder has to be of that tokenizer or autoencoder. Its decoder may have been trained further.
    """
    if isinstance(decoder, VAE) and isinstance(model, FlowAR):
        with as_input_error():
            check_vae(model.config, decoder.config.latent_channels, decoder.source)
        _check_encoder(decoder, model)
        return
    if not (isinstance(decoder, Tokenizer) and isinstance(model, Generator)):
        raise InputError(
            f"a {decoder.kind} and a {model.kind} do not belong together; expected a tokenizer "
            "and a generator, or a vae and a flowar"
        )
    for field in ("codebook_size", "num_tokens", "group_size", "causal"):
        theirs, ours = getattr(model.config, field), getattr(decoder.config, field)
        if theirs != ours:
            raise InputError(
                f"{model.source} and {decoder.source} do not belong together: {field} is "
                f"{theirs} in the generator and {ours} in the tokenizer; expected a generator "
                "trained on the codes of this tokenizer"
            )
    _check_encoder(decoder, model)


def _check_encoder(decoder: Tokenizer | VAE, model: Generator | FlowAR) -> None:
    if model.encoded_by and model.encoded_by != decoder.encoder_fingerprint:
        made = "codes" if isinstance(decoder, Tokenizer) else "latents"
        raise InputError(
            f"{model.source} and {decoder.source} do not belong together: the {model.kind} was "
            f"trained on the {made} of an encoder with the fingerprint {model.encoded_by}, this "
            f"{decoder.kind}'s is {decoder.encoder_fingerprint}; expected the {decoder.kind}, its "
            f"step and its weights (raw or averaged) that the {made} were extracted with"
        )
