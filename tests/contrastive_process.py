"""One of the processes that test_contrastive.py starts: RANK WORLD FOLDER."""

import os
import sys

import torch

import pyrepr


def second_derivatives(image, text, own, rank, world):
    """A penalty on gradients: every process has the gradient of the sum over processes of |world · ∂loss/∂own|²."""
    penalties = []
    for rows, loss in (
        (slice(None), pyrepr.nn.ClipLoss()),
        (own, pyrepr.nn.ClipLoss(gather_with_grad=True, rank=rank, world_size=world)),
    ):
        parts = [x[rows].clone().requires_grad_() for x in (image, text)]
        grads = torch.autograd.grad(loss(*parts, 3.0), parts, create_graph=True)
        penalties.append(torch.autograd.grad(sum(g.square().sum() for g in grads), parts))
    for whole, part in zip(*penalties, strict=True):
        torch.testing.assert_close(part, world**2 * whole[own], rtol=1e-9, atol=1e-12)


def main(rank, world, folder):
    """The loss of the whole batch and the gradients of the own part, in every way of gathering."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(world * 6, 8, generator=generator) / 3 for _ in range(2))
    own = slice(6 * rank, 6 * rank + 6)
    whole = [x.clone().requires_grad_() for x in (image, text)]
    expected = pyrepr.nn.ClipLoss()(*whole, 3.0)
    expected.backward()
    for local in (False, True):
        for grad in (False, True):
            parts = [x[own].clone().requires_grad_() for x in (image, text)]
            loss = pyrepr.nn.ClipLoss(local, grad, rank=rank, world_size=world)(*parts, 3.0)
            loss.backward()
            total = loss.detach().clone()
            torch.distributed.all_reduce(total)
            assert torch.allclose(total / world, expected, rtol=1e-5), (local, grad)
            if not local:
                assert torch.allclose(loss, expected, rtol=1e-5)
            for part, all_rows in zip(parts, whole, strict=True):
                # Gathered gradients come from every process: `world` times what the whole's loss gives.
                times = world if grad else 1
                if grad or not local:
                    assert torch.allclose(part.grad, times * all_rows.grad[own], rtol=1e-4, atol=1e-6), (local, grad)
    second_derivatives(image.double(), text.double(), own, rank, world)
    uneven = [x[: 5 + (rank == 0)] for x in (image, text)]
    try:
        pyrepr.nn.ClipLoss(rank=rank, world_size=world)(*uneven, 3.0)
    except ValueError as error:
        assert f"the same n on all processes, got {[6] + [5] * (world - 1)}" in str(error)
    else:
        raise AssertionError("unequal batches were accepted")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # threads of gloo that are still ending would otherwise abort a process now and then


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
