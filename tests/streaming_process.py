"""One of the processes that test_streaming.py starts: RANK WORLD FOLDER MODE."""

import sys

import torch

import pyrepr


def layers(n=200, dtype=torch.float64):
    xs = [5 + torch.randn(n, d, dtype=dtype) for d in (4, 30)]
    ys = [xs[0] @ torch.randn(4, d, dtype=dtype) + torch.randn(n, d, dtype=dtype) for d in (7, 3, 12)]
    return xs, ys


def main(rank, world, folder, mode):
    """Streams this process's share, adds up, and checks the gathered loss against the whole."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(0)
    xs, ys = layers(90)
    stream = pyrepr.StreamingCKA(mode=mode)
    if rank > 0:  # the first process has no data
        part = slice(0, 40) if rank == 1 else slice(40, 90)
        stream.update([x[part] for x in xs], [y[part] for y in ys])
    stream.all_reduce()
    torch.save(stream.compute(), f"{folder}/{rank}.pt")
    student = torch.randn(12, 5, dtype=torch.float64).requires_grad_()
    guide = torch.randn(12, 6, dtype=torch.float64)
    local = slice(4 * rank, 4 * rank + 4)
    part = student.detach()[local].clone().requires_grad_()
    loss = pyrepr.nn.CKALoss(gather=True)(part, guide[local])
    loss.backward()
    whole = pyrepr.nn.CKALoss()(student, guide)
    whole.backward()
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(part.grad, world * student.grad[local])  # every process's loss pulls on every row
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
