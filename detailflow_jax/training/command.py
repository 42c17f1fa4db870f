"""The command line of training."""

import re
from collections.abc import Sequence

from ml_collections import ConfigDict

from detailflow_jax.runtime import distributed
from detailflow_jax.runtime.command import make_parser
from detailflow_jax.runtime.config import load_config


def parse_command_line(argv: Sequence[str] | None = None) -> tuple[ConfigDict, str]:
    """(configuration, workdir) from the arguments; leaves with UNUSABLE on an unknown option.

    Joins the other processes of the run, where there are any.
    """
    parser = make_parser(
        "train",
        description="Train a tokenizer, generator, autoencoder or FlowAR. The same command again "
        "resumes the run.",
        epilog="""\
any field of the configuration can be set from here, with a value of its own type:
  --config.batch_size=64 --config.optim.lr=3e-4 --config.data.source=folder:photos

exit codes: 0 finished; 1 diverged or failed, such as by a full disk; 2 unusable command line,
configuration, workdir or data; 143 asked to leave by SIGTERM or Ctrl-C, state saved, run again to
resume.""",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.py[:VARIANT]",
        help="the configuration, such as configs/tokenizer.py:digits",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="where the run keeps its configuration, log, metrics, figures and checkpoints; a "
        "folder or gs://BUCKET/...",
    )
    distributed.add_arguments(parser)
    args, overrides = parser.parse_known_args(argv)
    for override in overrides:
        if not re.match(r"--config\.[^=]+=", override):
            parser.error(
                f"unknown option {override!r}: expected --config, --workdir or --config.NAME=VALUE"
            )
    config = load_config(args.config, overrides)
    distributed.start(args.coordinator_address, args.num_processes, args.process_id)
    return config, args.workdir
