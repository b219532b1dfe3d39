"""Faults from outside: signals at every write, a full disk, no memory, an interrupt at any line, a process that dies.

Nothing is left half written, no state is left wrong, nobody waits for ever.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyrepr

HERE = Path(__file__).parent
PACKAGE = str(Path(pyrepr.__file__).parent)
WRITERS = ("npz", "json", "html", "page", "plot", "command")


def injected(script, *arguments, **environment):
    result = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=os.environ | environment,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["trouble"] == []
    return found


@pytest.mark.parametrize("fault", ["SIGINT", "SIGTERM", "SIGKILL", "disk"])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_is_the_old_or_the_new_one(kind, fault, tmp_path, record_property):
    found = injected("faults_process.py", kind, fault, tmp_path)
    assert found["stopped"] >= 3
    record_property("faults", found["faults"])


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
def test_without_memory_an_error_then_right_again(record_property):
    found = injected("faults_memory.py", MALLOC_MMAP_THRESHOLD_=str(1 << 16))
    record_property("faults", found["faults"])


def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path, record_property):
    command = [sys.executable, str(HERE / "faults_ranks.py")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    out, err = processes[0].communicate(timeout=120)
    processes[1].communicate(timeout=120)
    assert processes[1].returncode == 9
    assert processes[0].returncode == 0, err[-2000:]
    assert "the stream is as it was" in out
    record_property("faults", 1)


class Interrupting:
    """Raises KeyboardInterrupt at the n-th line of the package that is run; keeps when each line was."""

    def __init__(self, number):
        self.number, self.count, self.times = number, 0, {}

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.count += 1
            self.times.setdefault((frame.f_code, frame.f_lineno), []).append(self.count)
            if self.count == self.number:
                raise KeyboardInterrupt
        return self

    def run(self, call):
        """Whether the call was interrupted."""
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False


def net():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3))
    model[0].eval()
    model[2].bias.requires_grad_(False)
    return model


def everything(model):
    """What an interrupted call must leave alone: weights, kinds of layers, flags, hooks, gradients."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [
            (name, type(m), m.training, len(m._forward_hooks) + len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        ],
        [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
    )


def assert_same(now, before, values=True):
    assert now[1:] == before[1:]
    for name, value in before[0].items():
        assert not values or torch.equal(now[0][name], value), f"{name} was changed"


def actions():
    batches = [torch.randn(24, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]

    def compare(model, _):
        pyrepr.compare(model, model, batches, progress=False)

    def convert(model, _):
        pyrepr.convert(model, batches, bits=2, batch_sizes=(), progress=False)

    def distill(model, teacher):
        pyrepr.distill(model, teacher, batches, epochs=(1, 1), progress=False)

    return {"compare": compare, "convert": convert, "distill": distill}


@pytest.mark.parametrize("name", ["compare", "convert", "distill"])
@pytest.mark.filterwarnings("ignore")
def test_an_interrupt_at_any_line_leaves_the_model(name, record_property):
    call = actions()[name]
    teacher, model = net(), net()
    if name == "distill":
        pyrepr.convert(model, [torch.randn(64, 4)], bits=2, batch_sizes=(), progress=False)
    call(copy.deepcopy(model), teacher)  # the first call imports, and so has lines of its own
    whole = Interrupting(0)
    assert not whole.run(lambda: call(copy.deepcopy(model), teacher))
    # A `with` or a `finally` is run again when it is left: of each line the first two times and the last.
    numbers = {number for times in whole.times.values() for number in times[:2] + times[-1:]}
    faults = 0
    for number in sorted(numbers):
        own, before, guide = copy.deepcopy(model), everything(model), everything(teacher)
        if Interrupting(number).run(lambda own=own: call(own, teacher)):
            faults += 1
            # What was learnt before an interrupt is kept, and what was replaced is put back.
            assert_same(everything(own), before, values=name != "distill")
        assert_same(everything(teacher), guide)
    assert faults > 700
    record_property("faults", faults)
