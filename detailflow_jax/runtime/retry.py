"""Faults of disks and networks that pass: what to do again, and what to tell apart from damage."""

import errno
import os
import time
from collections.abc import Callable
from typing import TypeVar

from absl import logging

from detailflow_jax.runtime.errors import UserError

PAUSES = (0.5, 2.0, 8.0)
"""Seconds before each further try."""

_PASSING = {
    *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY),
    *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENOTCONN, errno.EPIPE),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS),
}
_TEXTS = tuple(map(os.strerror, sorted(_PASSING)))

T = TypeVar("T")


def is_passing(error: BaseException) -> bool:
    """Returns whether an error may pass by itself; a file that is missing or broken does not."""
    if isinstance(error, UserError):
        return error.exit_code == 1
    if isinstance(error, ConnectionError | TimeoutError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING
    return any(text in str(error) for text in _TEXTS)  # As libraries in C++ pass it on.


def read_again(read: Callable[[], T], name: str) -> T:
    """Returns `read()`, which is tried again after each of `PAUSES` where a fault may pass.

    Args:
        read: reads and nothing else, for it is done again.
        name: what is read, for the log.

    Raises:
        Exception: what `read` raises, at its last try or if it does not pass.
    """
    for pause in PAUSES:
        try:
            return read()
        except Exception as error:
            if not is_passing(error):
                raise
            logging.warning("cannot read %s: %s; again in %g s", name, error, pause)
        time.sleep(pause)
    return read()
