"""One of the processes that test_streaming.py starts: RANK WORLD FOLDER MODE."""

import os
import sys

import torch

import pyrepr


def layers(n=200, dtype=torch.float64):
    xs = [5 + torch.randn(n, d, dtype=dtype) for d in (4, 30)]
    ys = [xs[0] @ torch.randn(4, d, dtype=dtype) + torch.randn(n, d, dtype=dtype) for d in (7, 3, 12)]
    return xs, ys


def disagreements(rank, mode, xs):
    """Streams that do not belong together are refused in every process, in the same words, and stay as they were."""
    other = "minibatch" if mode == "exact" else "exact"
    cases = [
        (pyrepr.StreamingCKA(mode=mode if rank else other), "mode must be the same in all processes, got "),
        (pyrepr.StreamingCKA(mode=mode, estimator="biased" if rank == 2 else "unbiased"), "estimator must be the same"),
        (
            pyrepr.StreamingCKA(mode="minibatch", kernel=pyrepr.Kernel("rbf", bandwidth=1.0 + rank)),
            "kernel must be the same in all processes, got Kernel(name='rbf', bandwidth=1.0, ",
        ),
        (pyrepr.StreamingCKA(mode="minibatch", kernel="rbf"), "all processes must have one σ a layer, got "),
        (pyrepr.stats.Moments(classes=2 if rank else None), "classes must be the same in all processes, got None in "),
    ]
    for stream, words in cases:
        if isinstance(stream, pyrepr.stats.Moments):
            stream.update(xs[0], torch.arange(len(xs[0])) % 2 if rank else None)
        else:
            stream.update([x[10 * rank : 10 * rank + 20] for x in xs])
        before = stream.samples
        try:
            stream.all_reduce()
        except ValueError as error:
            told = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(told, str(error))
            assert words in told[0] and len(set(told)) == 1, told
            assert stream.samples == before
        else:
            raise AssertionError(f"accepted: {words}")


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
    disagreements(rank, mode, xs)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # threads of gloo that are still ending would otherwise abort a process now and then


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
