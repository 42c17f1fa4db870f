"""The classes behind `df.load_*`: trained parameters with their methods on arrays.

Shapes: B images or samples, H x W pixels, N tokens, n <= N tokens asked for, V codes, h x w latent
positions, C latent channels, S side of the latent.
"""

from detailflow_jax.inference.models.base import Model as Model
from detailflow_jax.inference.models.base import scans as scans
from detailflow_jax.inference.models.flowar import FlowAR as FlowAR
from detailflow_jax.inference.models.generator import Generator as Generator
from detailflow_jax.inference.models.tokenizer import Tokenizer as Tokenizer
from detailflow_jax.inference.models.vae import VAE as VAE
from detailflow_jax.inference.models.vae import LatentPosterior as LatentPosterior
