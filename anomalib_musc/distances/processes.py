# SPDX-License-Identifier: Apache-2.0
"""Processes that hold a share of the images each, and what they tell each other; of ``torch.distributed``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

Result = TypeVar("Result")


class ProcessFailedError(RuntimeError):
    """Another process has failed; its message is in this one's."""


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

    @property
    def device(self) -> torch.device:
        """Where tensors lie that travel: NCCL sends from GPUs, Gloo from the host."""
        is_nccl = distributed.get_backend(self._group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")

    def gather(self, value: Result) -> list[Result]:
        """Return what each process gives, by rank, in all of them; tensors are to lie on the host."""
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, self._group)
        return values

    def together(self, function: Callable[[], Result]) -> Result:
        """Call a function that may fail; where it does in one process, every one raises an error.

        Raises:
            Exception: That of the function; a :class:`ProcessFailedError` where it was another process's.
        """
        result, error = None, None
        try:
            result = function()
        except Exception as raised:  # whatever it is, the others wait
            error = raised
        messages = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                msg = f"Process {rank} of {self.size} failed: {message}"
                raise ProcessFailedError(msg)
        return result  # type: ignore[return-value]  # which is set where nothing was raised

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
