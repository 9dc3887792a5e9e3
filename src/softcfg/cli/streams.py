"""Output streams that outlive what reads them: `softcfg sample ... | head -n 1` draws all images."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class Patient:
    """A text stream on which writing never fails: after the first failure everything is dropped.

    Attributes:
        lost: why something that should have been printed was not; None if all was printed, or the reader (head, less)
            had enough of it.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`, or drop it."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if not isinstance(error, (BrokenPipeError, ConnectionResetError)):
            self.lost = self.lost or error
        # What is still buffered, and what libraries print past Python, goes nowhere from now on.
        with contextlib.suppress(OSError):
            descriptor = os.open(os.devnull, os.O_WRONLY)
            os.dup2(descriptor, self._stream.fileno())
            os.close(descriptor)


@contextlib.contextmanager
def patient_streams() -> Iterator[Patient]:
    """Context in which printing never fails, even if a stream is full, closed or was never open; gives `sys.stdout`."""
    for descriptor in (0, 1, 2):  # no file that is opened later may take the number of a closed stream
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        out, err = (nowhere if stream is None or getattr(stream, "closed", False) else stream for stream in before)
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="backslashreplace")  # names of files need not be text
        patient = Patient(out)
        sys.stdout, sys.stderr = patient, Patient(err)
        try:
            yield patient
        finally:
            patient.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before
