"""One of the processes that test_loss.py starts: RANK WORLD FOLDER. Their batches differ in size."""

import os
import sys

import torch

import pyrepr

SIZES = {2: (9, 5), 3: (6, 0, 7)}


def same(loss, whole_loss, parts, wholes, own, world):
    torch.testing.assert_close(loss, whole_loss, rtol=1e-10, atol=1e-12)
    loss.sum().backward()
    whole_loss.sum().backward()
    for part, whole in zip(parts, wholes, strict=True):  # every process's loss pulls on every row
        torch.testing.assert_close(part.grad, world * whole.grad[own], rtol=1e-9, atol=1e-12)


def gradients(kernel, reduction, masked, rank, world):
    sizes = SIZES[world]
    n, start = sum(sizes), sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    generator = torch.Generator().manual_seed(1)
    students = [torch.randn(n, *s, generator=generator, dtype=torch.float64) for s in ((5,), (3, 2))]
    guides = [torch.randn(n, *s, generator=generator, dtype=torch.float64) for s in ((4, 1, 2), (6,))]
    mask = torch.arange(n) % 4 != 1 if masked else None
    wholes = [x.clone().requires_grad_() for x in students]
    parts = [x[own].clone().requires_grad_() for x in students]
    options = {"kernel": kernel, "reduction": reduction}
    same(
        pyrepr.nn.CKALoss(gather=True, **options)(parts, [y[own] for y in guides], mask if mask is None else mask[own]),
        pyrepr.nn.CKALoss(**options)(wholes, guides, mask),
        parts,
        wholes,
        own,
        world,
    )


def refusals(rank, world):
    x = torch.randn(8, 3)
    cases = (
        (
            x if rank else x[:, :2],
            x,
            None,
            "process 0: widths and dtypes ['2 float32 and 3 float32'], no mask; process 1",
        ),
        (x if rank else x.double(), x if rank else x.double(), None, "process 0: widths and dtypes ['3 float64"),
        (x, x, torch.ones(8, dtype=torch.bool) if rank else None, "no mask; process 1: "),
        (x, x[: 8 - rank], None, "process 1: ValueError: guide must have the n of student"),
        (x, x if rank else "x", None, "process 0: TypeError: guide must be a torch.Tensor, got str"),
    )
    for student, guide, mask, words in cases:
        try:
            pyrepr.nn.CKALoss(gather=True)(student, guide, mask)
        except ValueError as error:
            assert words in str(error) and "\n" not in str(error), error
        else:
            raise AssertionError(f"accepted: {words}")


def main(rank, world, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for kernel, reduction, masked in (("linear", "mean", False), ("linear", "none", True), ("rbf", "sum", False)):
        gradients(kernel, reduction, masked, rank, world)
    refusals(rank, world)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # threads of gloo that are still ending would otherwise abort a process now and then


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
