"""The bucket that a benchmark uses: one that is named, or a server on this machine.

A server on this machine takes its share of the processor, which a bucket elsewhere does not.
"""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Iterator

HELPERS = pathlib.Path(__file__).parents[1] / "tests" / "helpers"


def add_arguments(parser: argparse.ArgumentParser, use: str) -> None:
    """Adds the options that `opened` reads; `use` begins their help."""
    parser.add_argument("--bucket", metavar="gs://BUCKET/PATH", help=f"{use} there")
    help_text = f"{use} to a bucket server on this machine (extra test)"
    parser.add_argument("--serve", action="store_true", help=help_text)


@contextlib.contextmanager
def opened(args: argparse.Namespace) -> Iterator[str | None]:
    """The path in the bucket, also for the processes started within; None if none is asked for."""
    if not args.serve:
        yield args.bucket
        return
    sys.path.insert(0, str(HELPERS))
    import bucket_server

    with bucket_server.serve() as bucket, bucket_server.environment(bucket.variables):
        yield bucket.path("benchmark")
