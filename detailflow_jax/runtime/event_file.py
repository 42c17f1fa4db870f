"""Event files for TensorBoard, written without TensorFlow."""

import os
import pathlib
import socket
import time
from collections.abc import Mapping

import numpy as np

from detailflow_jax.runtime.pictures import png


class EventFile:
    """Writes scalars and images to a new event file of a folder.

    TensorBoard's package brings the record format and the messages. Importing its own file writer
    would load TensorFlow wherever it is installed, which takes seconds and accelerator memory.
    """

    def __init__(self, folder: str | os.PathLike, step: int = 0):
        """Begins a file of a run that has done `step` updates.

        Readers drop what earlier files of the folder hold of later steps. A run that was killed
        after its last checkpoint computes these again.
        """
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((pathlib.Path(folder) / name).open("xb"))
        self._write(self._event(wall_time=time.time(), file_version="brain.Event:2"))
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(self._event(wall_time=time.time(), step=step + 1, session_log=restart))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one point for each name."""
        self._add(
            step, [self._summary.Value(tag=k, simple_value=float(v)) for k, v in values.items()]
        )

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes one picture uint8 [H, W, 3] for each name."""
        self._add(step, [self._image(name, image) for name, image in images.items()])

    def close(self, failed: bool = False) -> None:
        """Closes the file; every call before has reached it, whether the run failed or not."""
        self._records.close()

    def _image(self, name: str, image: np.ndarray):
        height, width, channels = image.shape
        encoded = self._summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=png(image)
        )
        return self._summary.Value(tag=name, image=encoded)

    def _add(self, step: int, values: list) -> None:
        summary = self._summary(value=values)
        self._write(self._event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()
