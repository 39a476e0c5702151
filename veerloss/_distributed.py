"""One loss of the batches of all ranks: what the ranks of a process group tell each other.

A rank that fails must not leave the others waiting. So what goes wrong with its arguments and targets is reported in the next
exchange, in which all ranks take part anyhow, and raised on every rank: its own error where it happened, a RuntimeError that
names the rank elsewhere. A rank that does not come to the exchange (it never calls the loss, runs out of memory, dies) is for
the process group to notice: gloo sees a connection break at once, and both gloo and NCCL give up after their timeout.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def join(process_group: object, logits: object, check: Callable[[], tuple[torch.Size, int | None, object]]) -> Ranks:
    """The ranks of the argument ``process_group`` of a loss; ``check`` as for ``Ranks``."""
    if torch.compiler.is_compiling():
        raise RuntimeError("process_group cannot be used inside torch.compile: the loss waits for other processes")
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup or None, got {type(process_group).__name__}")
    return Ranks(process_group, logits.device if isinstance(logits, Tensor) else torch.device("cpu"), check)


class Ranks:
    """The ranks of a process group, each with a batch of [N, C, P] logits on `device`.

    All ranks create one, even those whose arguments are bad: `check` is called, and what it raises is reported. It returns the
    shape, the number of pixels that are not ignored, if it is known, and what must be the same on all ranks, anything with a
    repr.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, check: Callable[[], tuple[torch.Size, int | None, object]]
    ) -> None:
        self.group, self.device = group, device
        self.size = dist.get_world_size(group)
        problem, header = None, [0] * 5
        try:
            (n, c, p), valid_pixels, options = check()
            pixels = n * p if valid_pixels is None else valid_pixels
            header = [0, c, pixels, p if n else 2**62, zlib.crc32(repr(options).encode())]
        except Exception as e:
            problem, header[0] = e, 1
        mine = torch.tensor(header, dtype=torch.int64, device=device)
        headers = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(headers, mine, group=group)
        failed, classes, pixels, image, options = torch.stack(headers).t().tolist()
        self._raise(problem, failed)
        if len(set(classes)) > 1 or len(set(options)) > 1:
            raise ValueError(
                "process_group: all ranks must have the same number of classes, options and type of logits, got "
                f"{classes} classes and options that {'differ' if len(set(options)) > 1 else 'agree'}"
            )
        #: pixels of a segment, on all ranks together, and of the smallest image
        self.pixels, self.image = sum(pixels), min(image)

    def sum(self, count: Callable[[], tuple[Tensor, Tensor]], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(counts, largest) of all ranks from those that `count` gives on this one: counts of `shape` [rows, C, 2, bins], added
        up as int64; and the keys of the largest errors [rows, C], int32 that hold unsigned integers."""
        largest = torch.zeros(shape[:2], dtype=torch.int32, device=self.device)

        def counts():
            nonlocal largest
            found, largest = count()
            return found

        total = self.sum_of(counts, shape)
        keys = largest.long() & 0xFFFFFFFF
        dist.all_reduce(keys, dist.ReduceOp.MAX, group=self.group)
        return total, torch.where(keys < 1 << 31, keys, keys - (1 << 32)).int()

    def sum_of(self, count: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        """int64 sums over all ranks of the integers of `shape` that `count` gives on this one."""
        problem, counts = None, torch.zeros(shape, dtype=torch.int64, device=self.device)
        try:
            counts = count()
        except Exception as e:
            problem = e
        failed = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        failed[dist.get_rank(self.group)] = problem is not None
        total = torch.cat([counts.flatten().long(), failed])
        dist.all_reduce(total, group=self.group)
        self._raise(problem, total[-self.size :].tolist())
        return total[: -self.size].view(shape)

    def all_reduce(self, values: Tensor, op: str) -> Tensor:
        """The "sum" or "max" of all ranks; the maximum is NaN if any is."""
        if op == "sum":
            values = values.contiguous().clone()
            dist.all_reduce(values, group=self.group)
            return values
        values = values.nan_to_num(nan=torch.inf).contiguous()  # NaN has no maximum
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return torch.where(values == torch.inf, torch.nan, values)

    def _raise(self, problem: Exception | None, failed: list[int]) -> None:
        if problem is not None:
            raise problem
        if any(failed):
            ranks = [rank for rank, bad in enumerate(failed) if bad]
            raise RuntimeError(f"process_group: the loss failed on rank {', '.join(map(str, ranks))}; its error is there")
