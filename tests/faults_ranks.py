"""One of two processes of test_faults.py: RANK FOLDER. The second dies in the middle of what the first waits for."""

from __future__ import annotations

import datetime
import os
import sys

import torch
from torch import distributed

import pyrepr


def main(rank: int, folder: str) -> None:
    torch.manual_seed(rank)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=15)
    )
    stream = pyrepr.StreamingCKA()
    stream.update([torch.randn(20, 3), torch.randn(20, 4)])
    before = stream.compute()
    calls = 0
    wait = distributed.all_reduce

    def dying(*args, **kwargs):
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 2:
            os._exit(9)
        return wait(*args, **kwargs)

    distributed.all_reduce = dying
    distributed.barrier()
    try:
        stream.all_reduce()
    except RuntimeError as error:
        assert str(error), "an error without a word"
        assert torch.equal(stream.compute(), before) and stream.samples == 20, "the stream was changed"
        print("the stream is as it was")
        sys.stdout.flush()
        os._exit(0)  # the group cannot be taken down any more
    raise AssertionError("nobody noticed that a process had died")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
