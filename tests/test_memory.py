"""The memory of freed gradients waits for the next ones, but not too much of it, and not where it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pyrepr.backend import native

module, _ = native()
pytestmark = pytest.mark.skipif(not hasattr(module, "Block"), reason="blocks are kept on Linux only")


@pytest.fixture(autouse=True)
def empty_pool():
    module.Block.release()
    yield
    module.Block.release()


def test_the_pool_is_bounded_and_returned():
    limit = module.Block.limit()
    blocks = [module.Block(limit // 4) for _ in range(10)]
    assert module.Block.waiting() == 0
    blocks.clear()
    assert limit // 2 < module.Block.waiting() <= limit
    again = module.Block(limit // 4)
    assert module.Block.waiting() <= limit - limit // 4
    del again
    module.Block.release()
    assert module.Block.waiting() == 0
    module.Block(2 * limit)
    assert module.Block.waiting() == 0, "a block that is larger than the pool does not wait"


def test_blocks_that_wait_give_way_to_one_that_cannot_be_had():
    code = (
        "import resource\nfrom pyrepr.backend import native\nBlock = native()[0].Block\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "size = Block.limit() // 3 >> 21 << 21\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2 * size + (64 << 20),) * 2)\n"
        "a = Block(size); del a\nassert Block.waiting() == size\n"
        "b = Block(2 * size)\nassert Block.waiting() == 0\n"
        "try:\n    Block(4 * size)\nexcept MemoryError:\n    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "refused", done.stderr
