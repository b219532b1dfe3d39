"""The contrastive modules beside open_clip's and sentence-transformers' definitions, alone and on several processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import pyrepr


def test_clip_loss_is_clips_definition():
    image, text = (functional.normalize(torch.randn(20, 16)).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(14.3, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    loss = pyrepr.nn.ClipLoss()(image, text, scale, bias)
    logits = scale * image @ text.T + bias
    at = torch.arange(20)
    truth = (functional.cross_entropy(logits, at) + functional.cross_entropy(logits.T, at)) / 2
    assert torch.allclose(loss, truth, rtol=1e-5)
    ours = torch.autograd.grad(loss, (image, text, scale, bias))
    theirs = torch.autograd.grad(truth, (image, text, scale, bias))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert ours[3] == 0
    assert list(pyrepr.nn.ClipLoss()(image, text, 14.3, output_dict=True)) == ["contrastive_loss"]


def test_aligns_loss_is_transformers(monkeypatch):
    """AlignModel's loss has a label smoothing of 0.1 and a temperature (transformers)."""
    text, image = (functional.normalize(torch.randn(12, 8)) for _ in range(2))
    logits = text @ image.T / 0.3
    at = torch.arange(12)
    truth = sum(functional.cross_entropy(s, at, label_smoothing=0.1) for s in (logits, logits.T)) / 2
    assert torch.allclose(pyrepr.functional.info_nce(text, image, 1 / 0.3, label_smoothing=0.1), truth, rtol=1e-5)


def test_matryoshka_weights_follow_their_dims():
    x, y = torch.randn(10, 8), torch.randn(14, 8)
    loss = pyrepr.nn.MatryoshkaLoss([8, 2], [1.0, 3.0])(x, y)
    at = torch.arange(10)
    truth = sum(
        w * functional.cross_entropy(20 * functional.normalize(x[:, :p]) @ functional.normalize(y[:, :p]).T, at)
        for p, w in ((8, 1.0), (2, 3.0))
    )
    assert torch.allclose(loss, truth, rtol=1e-5)


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_compute_the_loss_of_the_whole(world, tmp_path):
    script = Path(__file__).with_name("contrastive_process.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world), str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, "\n".join(errors)


def test_several_processes_need_a_process_group():
    with pytest.raises(RuntimeError, match="needs an initialised"):
        pyrepr.nn.ClipLoss(world_size=2)(torch.randn(3, 4), torch.randn(3, 4), 1.0)
