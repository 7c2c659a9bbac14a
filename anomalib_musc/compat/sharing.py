# SPDX-License-Identifier: Apache-2.0
"""Runs in two threads at once.

Lightning 2.6 gives a module the trainer of whoever came last, and the other run goes on with that one's data. Its
``RichProgressBar`` draws on one console, where two bars of two threads clear each other ("pop from empty list").
"""

import threading

from lightning.pytorch import Callback, LightningModule, Trainer

_LOCK = threading.Lock()
_THREADS: dict[int, threading.Thread] = {}  # which run a model, by their numbers


class OneThread(Callback):
    """Refuses a second thread while a run of the same model goes on; one of another model shows no progress bar.

    It is one of the trainer's callbacks, so that it notices the end of a run in any way.
    """

    def __init__(self) -> None:
        self._run: tuple[int, Trainer] | None = None

    def enter(self, module: LightningModule, trainer: Trainer) -> None:
        """Begin a run.

        Raises:
            RuntimeError: If another thread's has not ended; that one goes on.
        """
        with _LOCK:
            if self._run is not None and self._run[0] != threading.get_ident():
                module.trainer = self._run[1]
                msg = (
                    f"This {type(module).__name__} is running in another thread, and scores one pool at a time. Give "
                    "each thread a model and an Engine of its own, or let one wait for the other."
                )
                raise RuntimeError(msg)
            self._run = threading.get_ident(), trainer
            others = [thread for number, thread in _THREADS.items() if number != self._run[0] and thread.is_alive()]
            _THREADS[self._run[0]] = threading.current_thread()
        if others and trainer.progress_bar_callback is not None:
            trainer.progress_bar_callback.disable()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the run."""
        del trainer, pl_module, stage
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the run."""
        del trainer, pl_module, exception
        self._end()

    def _end(self) -> None:
        with _LOCK:
            if self._run is not None:
                _THREADS.pop(self._run[0], None)
            self._run = None

    def __reduce__(self) -> tuple[type["OneThread"], tuple[()]]:
        """Copies and files know of no run."""
        return OneThread, ()
