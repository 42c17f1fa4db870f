"""Errors that every data source raises, and reports, in the same way."""

from absl import logging


class UnreadableImage(Exception):
    """A record whose image cannot be decoded. `name` says which, `reason` says why.

    Training counts and skips such a record, extraction also lists it in the manifest; both name it
    by `report_skipped`.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


_reported: set[str] = set()


def report_skipped(image: UnreadableImage | str) -> None:
    """Logs that an image is skipped, with its name and the reason, once per process."""
    if str(image) not in _reported:
        _reported.add(str(image))
        logging.warning("skipping an unreadable image: %s", printable(str(image)))


def printable(name: str) -> str:
    """Returns a file name on one line: line ends and bytes that are no UTF-8 become escapes."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)
