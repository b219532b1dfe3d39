"""CKALoss as a training loss."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyrepr

PROCESS = Path(__file__).with_name("loss_process.py")


def test_value_and_reductions():
    students = [torch.randn(16, 4, 3, 2), torch.randn(16, 7)]
    guides = [torch.randn(16, 9), torch.randn(16, 5, 5)]
    each = torch.stack([1 - pyrepr.cka(s.flatten(1), g.flatten(1)) for s, g in zip(students, guides, strict=True)])
    assert torch.equal(pyrepr.nn.CKALoss(reduction="none")(students, guides), each)
    assert torch.equal(pyrepr.nn.CKALoss(reduction="sum")(students, guides), each.sum())
    assert torch.equal(pyrepr.nn.CKALoss()(students, guides), each.mean())
    assert torch.equal(pyrepr.nn.CKALoss()(students[1], guides[0]), 1 - pyrepr.cka(students[1], guides[0]))


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_training_moves_a_student_to_its_guide(kernel):
    inputs = torch.randn(128, 10)
    guide = torch.tanh(inputs @ torch.randn(10, 20))
    student = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8))
    loss = pyrepr.nn.CKALoss(kernel=kernel)
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    values = []
    for _ in range(150):
        value = loss(student(inputs), guide)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.15 < values[0]


def test_padding_has_no_influence():
    student, guide = torch.randn(20, 6, requires_grad=True), torch.randn(20, 4)
    mask = torch.arange(20) < 15
    loss = pyrepr.nn.CKALoss()(student, guide, mask)
    loss.backward()
    assert torch.equal(student.grad[15:], torch.zeros(5, 6)) and student.grad[:15].abs().sum() > 0
    torch.testing.assert_close(loss, pyrepr.nn.CKALoss()(student[:15], guide[:15]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_come_back_in_their_dtype(dtype):
    student = torch.randn(32, 8).to(dtype).requires_grad_()
    guide = torch.randn(32, 8).to(dtype)
    pyrepr.nn.CKALoss()(student, guide).backward()
    wide = student.detach().float().requires_grad_()
    pyrepr.nn.CKALoss()(wide, guide.float()).backward()
    assert student.grad.dtype == dtype
    torch.testing.assert_close(student.grad.float(), wide.grad, rtol=1e-2, atol=1e-2 * float(wide.grad.abs().max()))


def test_under_autocast_mixed_dtypes_are_widened():
    linear = torch.nn.Linear(6, 4)
    x = torch.randn(12, 6)
    with torch.autocast("cpu", torch.bfloat16):
        student = linear(x)
        loss = pyrepr.nn.CKALoss()(student, x)
    assert student.dtype == torch.bfloat16
    loss.backward()
    assert torch.isfinite(linear.weight.grad).all() and linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("world", [2, 3])
def test_gathered_from_unequal_batches(tmp_path, world):
    """Values and gradients of the whole batch, one process without a row; refusals that all processes hear of."""
    command = [sys.executable, str(PROCESS)]
    processes = [subprocess.Popen([*command, str(rank), str(world), str(tmp_path)]) for rank in range(world)]
    assert [process.wait(timeout=120) for process in processes] == [0] * world


@pytest.mark.parametrize("given", [{"bandwidth": 1.0}, {"bandwidth": 2.0}, {"sigma": 1.0}])
def test_options_beside_a_kernel_are_refused_whatever_their_value(given):
    x = torch.randn(8, 3)
    kernel = pyrepr.Kernel("rbf", sigma=2.0)
    calls = (
        lambda: pyrepr.gram(x, kernel=kernel, **given),
        lambda: pyrepr.hsic(x, x, kernel=kernel, **given),
        lambda: pyrepr.cka(x, x, kernel=kernel, **given),
        lambda: pyrepr.cka_matrix([x], kernel=kernel, **given),
        lambda: pyrepr.nn.CKALoss(kernel=kernel, **given),
        lambda: pyrepr.StreamingCKA(mode="minibatch", kernel=kernel, **given),
    )
    for call in calls:
        with pytest.raises(ValueError, match=rf"{next(iter(given))} belongs into the Kernel\(\.\.\.\) .* beside it"):
            call()


def test_bad_input():
    x = torch.randn(8, 2)
    with pytest.raises(ValueError, match="guide must hold one tensor per tensor of student, 2, got 1"):
        pyrepr.nn.CKALoss()([x, x], [x])
    with pytest.raises(ValueError, match="student must hold at least one tensor"):
        pyrepr.nn.CKALoss()([], [])
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, got 'max'"):
        pyrepr.nn.CKALoss(reduction="max")
    with pytest.raises(RuntimeError, match=r"needs an initialised torch\.distributed"):
        pyrepr.nn.CKALoss(gather=True)(x, x)
