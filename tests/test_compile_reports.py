"""The backend's options, and what it says: notices, the log, reports."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from compiled import Inductor, by_aten, compare, compiled  # noqa: F401
from tolerances import COMPILED
from torch import nn

from triton_conv3d import compile_backend, settings
from triton_conv3d.compile_backend import backend, norms, passes, report, reports


def lines(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name == "triton_conv3d"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"inner": "inductr"}, "'inductr'.*'inductor', 'aot_eager', 'eager'"),
        ({"layouts": True}, "layouts.*inner, layout, fuse, autotune"),
        ({"fuse": "yes"}, "'fuse': 'yes'.*True, False"),
        ({"autotune": "fast"}, "'autotune': 'fast'.*'off', 'quick', 'full'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        torch.compile(nn.Conv3d(1, 1, 1), backend=backend, options=options)(torch.randn(1, 1, 2, 2, 2))


def test_a_mode_is_inductors():
    with pytest.raises(Exception, match="mode='max-autotune' is Inductor's.*'eager'"):
        backend(nn.Module(), [], options={"inner": "eager"}, mode="max-autotune")


def test_autotune_is_a_setting():
    with settings.configure(autotune="quick"):
        compiled(nn.Conv3d(1, 1, 1), autotune="off")(torch.randn(1, 1, 2, 2, 2))
        assert settings.current().autotune == "off"


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_without_a_convolution_one_notice(inner, caplog, monkeypatch):
    monkeypatch.setattr(report, "_noticed", set())
    before = len(reports())
    for model in (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Linear(4, 3)):
        function = compiled(model, inner)
        for size in (3, 4):  # the second size compiles again
            x = torch.randn(2, 3, size, 4)
            assert torch.equal(function(x), model(x))
    assert lines(caplog) == [
        f"no 3-D convolution in a graph of 6 nodes: compiled by {inner}, unchanged, as others will be"
    ]
    assert len(reports()) == before


@pytest.mark.parametrize("broken", ["convolutions.replace", "fusion.fuse", "layout.channels_last", "Rewriter.finish"])
def test_a_pass_that_fails_leaves_the_graph(broken, monkeypatch, caplog):
    module, name = broken.split(".")

    def fail(rewriter, *_, **options):
        rewriter.graph.erase_node(rewriter.graph.output_node())
        raise RuntimeError("planted")

    monkeypatch.setattr(getattr(passes, module), name, fail)
    for _ in range(2 if broken == "fusion.fuse" else 1):  # compiled again, it does not warn again
        off, made = compare(nn.Sequential(nn.Conv3d(2, 3, 3), nn.ReLU()), torch.randn(1, 2, 4, 4, 4), True)
        assert off == 0 and made == []
    assert lines(caplog) == [
        f"{kind} graph left as it is: RuntimeError: planted" for kind in ("forward", "backward")
    ]


def test_a_norm_that_cannot_be_read_stays(monkeypatch, caplog):
    monkeypatch.setattr(norms, "_is_3d", lambda node: 1 / 0)
    off, made = compare(nn.Sequential(nn.Conv3d(2, 3, 3), nn.InstanceNorm3d(3)), torch.randn(1, 2, 4, 4, 4), False)
    assert off <= COMPILED and len(made) == 1
    assert lines(caplog) == ["instance normalisation left as it is: ZeroDivisionError: division by zero"]


def test_the_log_shows_what_was_done(caplog):
    with settings.configure(log="plan"), caplog.at_level(logging.INFO, "triton_conv3d"):
        compiled(nn.Sequential(nn.Conv3d(2, 3, 3), nn.ReLU()))(torch.randn(1, 2, 4, 4, 4))
    (line,) = (text for text in lines(caplog) if text.startswith("forward:"))
    assert line == (
        "forward: replaced conv3d 1; fused bias + relu 1; conversions removed 0, inserted entering 1, weight 1, leaving 1"
    )
    assert "conv3d_fused" in reports()[-1].nodes


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_what_inductor_packs_before_is_told(monkeypatch):
    monkeypatch.setattr(torch._inductor.compile_fx, "_compile_fx_inner", Inductor())
    with torch._inductor.config.patch(freezing=True):
        off, (made,) = compare(nn.Conv3d(2, 3, 3).eval(), torch.randn(1, 2, 4, 4, 4), False, "inductor")
    assert off <= COMPILED and made.replaced == {} and "packed for oneDNN" in made.left[0]


def test_the_entry_point_names_the_backend():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    name, target = text.split("[project.entry-points.torch_dynamo_backends]")[1].strip().splitlines()[0].split(" = ")
    module, attribute = target.strip('"').split(":")
    assert name == "triton_conv3d" and module == compile_backend.__name__ and getattr(compile_backend, attribute) is backend
