# SPDX-License-Identifier: Apache-2.0
"""SIGTERM, by which systemd, Slurm and ``docker stop`` end a process.

Lightning 2.6 only notes it and looks at the note between two batches of a test or a training: a pool would be scored to
the end and a prediction go on, and where it does stop, the status is 0.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

STATUS = 128 + signal.SIGTERM


def stop_if_terminated(trainer: Trainer) -> None:
    """End the run where a SIGTERM has been noted; call it where no file is half written."""
    if trainer.received_sigterm:
        raise SIGTERMException(STATUS)


@contextmanager
def stopped_at_once(trainer: Trainer) -> Iterator[None]:
    """Let a SIGTERM end the work within where it stands, as nothing is being written there.

    Args:
        trainer: The running trainer, whose own handler is called before, and with it any that was there before it.
    """
    stop_if_terminated(trainer)
    noting = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(noting):
        yield  # Lightning has no handler either
        return

    def stop(number: int, frame: FrameType | None) -> None:
        noting(number, frame)
        raise SIGTERMException(STATUS)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, noting)
    stop_if_terminated(trainer)  # where the exception was raised in a destructor, which swallows it


class TerminationStatus(Callback):
    """Gives a run that a SIGTERM has ended the usual status, 143."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Set the status of Lightning's own exception, too."""
        del trainer, pl_module
        if isinstance(exception, SIGTERMException):
            exception.code = STATUS
