"""Choosing launch configurations, with a clock that is not a GPU's."""

from __future__ import annotations

import pytest
import torch

_launch = pytest.importorskip("pyrepr.kernels._launch", reason="triton is not installed: no launch to configure")
Config, Table = _launch.Config, _launch.Table

SMALL, LARGE, BROKEN = Config({"BLOCK": 32}), Config({"BLOCK": 128}, 8, 3), Config({"BLOCK": 999})


def run(config):
    if config == BROKEN:
        raise RuntimeError("out of shared memory")
    return config.blocks["BLOCK"]


def table():
    def clock(function):
        return 100.0 / function()  # the larger the block the faster

    return Table("SOME", dict.fromkeys(_launch.ARCHITECTURES, SMALL), [LARGE, BROKEN, SMALL], clock)


def test_the_table_decides_without_a_search():
    assert table().run(torch.device("cpu"), run) == 32


def test_search_takes_the_fastest_that_works_once_and_prints_the_row(monkeypatch, capsys):
    monkeypatch.setenv("PYREPR_AUTOTUNE", "1")
    searched = table()
    assert searched.run(torch.device("cpu"), run, (2,)) == 128
    out = capsys.readouterr().out
    assert "Config({'BLOCK': 999}, 4, 2) fails: RuntimeError: out of shared memory" in out
    assert "SOME (2,): best of its table's row 90: Config({'BLOCK': 128}, 8, 3), 0.7812 ms" in out
    assert searched.run(torch.device("cpu"), run, (2,)) == 128
    assert capsys.readouterr().out == ""


def test_registers_are_asked_of_the_compiler():
    config = Config({"BLOCK": 32}, 4, 1, 128)
    assert str(config) == "Config({'BLOCK': 32}, 4, 1, 128)" and config != Config({"BLOCK": 32}, 4, 1)
    free, held = (_launch.Variant("v", None, {}, {}, registers=registers) for registers in (None, 128))
    assert _launch.options(held) == {**_launch.options(free), "maxnreg": 128}


@pytest.mark.parametrize(
    ("capability", "row"), [(80, 80), (86, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 80)]
)
def test_every_gpu_has_a_row(capability, row):
    assert _launch.architecture(capability) == row


def test_arguments_that_do_not_fit_the_signature_are_refused():
    variant = _launch.Variant("v", None, {"x": "*fp32", "n": "i32"}, {}, aligned=("n",))
    x = torch.zeros(4)
    _launch._check(variant, {"x": x, "n": 16})
    for arguments, message in (
        ({"x": x}, "are not its signature's"),
        ({"x": x.half(), "n": 16}, r"x must be \*fp32, got \*fp16"),
        ({"x": x, "n": 2**31}, "n must be i32, got i64"),
        ({"x": x, "n": 9}, "n must be divisible by 16, got 9"),
    ):
        with pytest.raises(TypeError, match=message):
            _launch._check(variant, arguments)
