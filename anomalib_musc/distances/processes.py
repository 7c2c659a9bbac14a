# SPDX-License-Identifier: Apache-2.0
"""Processes that hold a share of the images each, and what they tell each other; of ``torch.distributed``."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

Result = TypeVar("Result")


class ProcessFailedError(RuntimeError):
    """Another process has failed; its message is in this one's."""


@dataclass(frozen=True)
class _Failure:
    """What a process tells the others in place of a value, once it has failed."""

    message: str


@dataclass(frozen=True)
class Transfer:
    """Tensors on their way to another process and from a third one.

    Attributes:
        received: What comes, complete once it was waited for; ``None`` where nothing does.
        sent: What goes, which has to stay until then.
        works: What is to be waited for.
    """

    received: torch.Tensor | None
    sent: torch.Tensor | None
    works: tuple[Any, ...]

    def wait(self) -> torch.Tensor | None:
        """Return what has come."""
        for work in self.works:
            work.wait()
        return self.received


class Processes:
    """The processes of a group, by default all of them, as a launcher such as ``torchrun`` or Lightning starts them.

    Every process calls the same methods in the same order.

    Args:
        group: A group that this process is of.

    Raises:
        RuntimeError: If ``torch.distributed.init_process_group`` was not called.

    Attributes:
        rank: That of this process.
        size: How many there are.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        if not distributed.is_initialized():
            msg = "Processes need torch.distributed.init_process_group, which launchers such as Lightning's call."
            raise RuntimeError(msg)
        self._group = group
        self.rank = distributed.get_rank(group)
        self.size = distributed.get_world_size(group)

    @classmethod
    def of(cls, number: int) -> "Processes | None":
        """Return all processes, ``None`` where this one is alone."""
        return cls() if number > 1 else None

    @property
    def device(self) -> torch.device:
        """Where tensors lie that travel: NCCL sends from GPUs, Gloo from the host."""
        is_nccl = distributed.get_backend(self._group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")

    def gather(self, value: Result) -> list[Result]:
        """Return what each process gives, by rank, in all of them; tensors are to lie on the host.

        Raises:
            ProcessFailedError: If another one has failed meanwhile, see :meth:`together`.
        """
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, self._group)
        for rank, other in enumerate(values):
            if isinstance(other, _Failure) and rank != self.rank:
                msg = f"Process {rank} of {self.size} failed: {other.message}"
                raise ProcessFailedError(msg)
        return values

    def together(self, function: Callable[[], Result]) -> Result:
        """Call a function that may fail; where it does in one process, every one raises an error.

        The function may gather, but not exchange: who waits for a tensor does not hear of an error.

        Raises:
            Exception: That of the function; a :class:`ProcessFailedError` where it was another process's.
        """
        try:
            result = function()
        except ProcessFailedError:
            raise
        except Exception as error:  # whatever it is, the others wait
            with suppress(ProcessFailedError):
                self.gather(_Failure(f"{type(error).__name__}: {error}"))
            raise
        self.gather(None)
        return result

    def exchange(
        self, sent: torch.Tensor | None, target: int, shape: tuple[int, ...] | None, source: int, like: torch.Tensor
    ) -> Transfer:
        """Begin to send a tensor to one process and to receive one from another.

        Args:
            sent: What goes; ``None`` or an empty one for nothing.
            target: The rank of who receives it.
            shape: The shape of what comes; ``None`` or an empty one for nothing.
            source: The rank of who sends it.
            like: A tensor of its type.
        """
        received = None if shape is None else torch.empty(shape, dtype=like.dtype, device=self.device)
        outgoing = None if sent is None else sent.to(self.device).contiguous()
        operations = []
        for function, tensor, rank in (
            (distributed.isend, outgoing, target),
            (distributed.irecv, received, source),
        ):
            if tensor is not None and tensor.numel():
                peer = rank if self._group is None else distributed.get_global_rank(self._group, rank)
                operations.append(distributed.P2POp(function, tensor, peer, self._group))
        works = distributed.batch_isend_irecv(operations) if operations else []
        return Transfer(received, outgoing, tuple(works))


def gathered(processes: Processes | None, value: Result) -> list[Result]:
    """Return what each process gives, see :meth:`Processes.gather`; alone this one's."""
    return [value] if processes is None else processes.gather(value)


def together(processes: Processes | None, function: Callable[[], Result]) -> Result:
    """Call a function whose error ends all processes, see :meth:`Processes.together`."""
    return function() if processes is None else processes.together(function)
