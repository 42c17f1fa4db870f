"""Published PyTorch checkpoints in, PyTorch checkpoints out."""

from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.readers import Checkpoint, check_finite, read_checkpoint
from detailflow_jax.convert.writers import write_pytorch

__all__ = ["Checkpoint", "CheckpointError", "check_finite", "read_checkpoint", "write_pytorch"]
