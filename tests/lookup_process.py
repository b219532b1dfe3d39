"""One of the processes that test_lookup_elsewhere.py starts: RANK WORLD FOLDER. Lookup layers under DDP, each process
with half of a batch: gradients are the mean of theirs, of a memory's values also as sparse tensors."""

import copy
import sys

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pyrepr


def main(rank, world, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(0)
    fitted = pyrepr.nn.LookupLinear.from_linear(nn.Linear(16, 8), torch.randn(200, 16), bits=4, rank=2)
    whole, x = nn.Sequential(fitted, pyrepr.nn.ProductKeyMemory(8, keys=6, k=3, heads=2)), torch.randn(8 * world, 16)
    whole(x).square().mean().backward()
    for sparse in (False, True):
        part = copy.deepcopy(whole)
        part.zero_grad()
        part[1].values.sparse = sparse
        part = DistributedDataParallel(part)
        part(x[8 * rank :][:8]).square().mean().backward()
        for (name, p), q in zip(whole.named_parameters(), part.parameters(), strict=True):
            assert q.grad.is_sparse == (sparse and name == "1.values.weight"), name
            found = q.grad.to_dense() if q.grad.is_sparse else q.grad
            torch.testing.assert_close(
                found, p.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
