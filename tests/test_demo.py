"""The demo: its data, its network and score, and what a run prints on each device."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import time
from statistics import fmean

import pytest
import torch

import triton_conv3d
from triton_conv3d import __main__ as cli
from triton_conv3d import demo
from triton_conv3d.demo import network

TINY = demo.Run("cpu", steps=1, width=4, patch=8, batch=1, levels=2, spacing=2, held_out_patches=2)


HERE = all(importlib.util.find_spec(name) for name in ("nilearn", "nibabel"))
needs_data = pytest.mark.skipif(not HERE, reason="the extra demo is not installed, and with it the data")


@pytest.fixture(scope="module")
def slabs():
    if not HERE:
        pytest.skip("the extra demo is not installed")
    return demo.load(16, spacing=2)


def scores_of(labels: torch.Tensor) -> torch.Tensor:
    """Scores that are certain of these labels."""
    return 20.0 * torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)


# Data


@needs_data
@pytest.mark.parametrize("patch, spacing", [(64, 1), (16, 2), (40, 2)])
def test_slabs_part_one_brain_front_from_back(patch, spacing):
    training, held_out = demo.load(patch, spacing)
    brain = [145 // spacing, 181 // spacing, 155 // spacing]
    assert training.labels.shape[1] + held_out.labels.shape[1] == brain[1]
    assert held_out.labels.shape[1] == max(patch, brain[1] // 3)
    for slab in (training, held_out):
        assert slab.image.shape == slab.labels.shape and min(slab.labels.shape) >= patch
        assert [slab.labels.shape[0], slab.labels.shape[2]] == brain[::2]
        assert slab.labels.unique().tolist() == [0, 1, 2]


def test_white_matter_is_brighter_than_grey(slabs):
    for slab in slabs:
        grey, white = (slab.image[slab.labels == label].mean() for label in (1, 2))
        assert white > grey + 0.5


def test_patches_lie_in_the_slab_and_follow_the_seed(slabs):
    draws = [slabs[1].patches(5, 16, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    for images, labels in draws:
        assert images.shape == (5, 1, 16, 16, 16) and labels.shape == (5, 16, 16, 16)
    assert torch.equal(draws[0][0], draws[1][0]) and not torch.equal(draws[0][0], draws[2][0])
    image, labels = draws[0][0][0, 0], draws[0][1][0]
    found = (slabs[1].image.unfold(0, 16, 1).unfold(1, 16, 1).unfold(2, 16, 1) == image).flatten(3).all(-1).nonzero()
    d, h, w = found[0].tolist()
    assert torch.equal(slabs[1].labels[d : d + 16, h : h + 16, w : w + 16], labels)


@needs_data
def test_a_patch_that_does_not_fit():
    with pytest.raises(ValueError, match="patch=92 .* at most 88"):
        demo.load(92)


@pytest.mark.parametrize("missing", ["nilearn", "nibabel"])
def test_without_the_extra_it_tells_how_to_install_it(missing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(["demo", "--device", "cpu"]) == 2
    assert 'pip install "triton_conv3d[demo]"' in capsys.readouterr().err


# Network, loss, score


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_network_learns_its_channels_from_the_first_call(levels):
    net = network.UNet(4, 3, levels)
    assert net(torch.zeros(1, 2, 8, 8, 8)).shape == (1, 3, 8, 8, 8)
    channels = [m.in_channels for m in net.modules() if isinstance(m, triton_conv3d.Conv3d)]
    assert channels == {1: [2, 4, 4], 2: [2, 4, 4, 8, 12, 4], 3: [2, 4, 4, 8, 8, 16, 24, 12, 4]}[levels]


def test_dice():
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    assert network.dice(labels, labels, 3) == [1.0, 1.0, 1.0]
    assert network.dice(torch.tensor([0, 1, 1, 1, 0, 0]), labels, 4) == [2 / 5, 4 / 6, 0.0, 1.0]


def test_loss_tells_right_from_wrong():
    labels = torch.randint(3, (2, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    right, wrong = (float(network.loss(scores_of(guess), labels)) for guess in (labels, (labels + 1) % 3))
    unsure = float(network.loss(torch.zeros(2, 3, 4, 4, 4), labels))
    assert 0 <= right < 0.01 < unsure < wrong


def test_the_copy_with_torch_convolution_computes_the_same():
    torch.manual_seed(0)
    net, image = network.UNet(4, 3, 2), torch.randn(1, 1, 8, 8, 8)
    with triton_conv3d.configure(engine="aten"):
        expected = net(image)
    copy = demo.with_torch_convolution(net)
    ours = [m for m in net.modules() if isinstance(m, triton_conv3d.Conv3d)]
    theirs = [m for m in copy.modules() if isinstance(m, torch.nn.Conv3d)]
    assert len(ours) == len(theirs) == 6 and {type(m) for m in theirs} == {torch.nn.Conv3d}
    torch.testing.assert_close(copy(image), expected, rtol=0, atol=0)


# Runs


@pytest.mark.parametrize("field, value", [("patch", 10), ("patch", 4), ("steps", 0), ("width", 0), ("batch", 0)])
def test_a_run_refuses_what_makes_no_sense(field, value):
    with pytest.raises(ValueError, match=f"{field}={value} "):
        dataclasses.replace(TINY, **{field: value})


def test_training_lowers_the_loss_and_follows_the_seed(slabs, capsys):
    run = dataclasses.replace(TINY, steps=16, width=8, patch=16)

    def losses(seed: int) -> list[float]:
        torch.manual_seed(seed)
        with triton_conv3d.configure(engine="aten"):
            return demo.train(run, network.UNet(8, 3, 2), slabs[0])

    first = losses(0)
    assert fmean(first[-4:]) < fmean(first[:4]) - 0.1
    printed = [float(x) for x in re.findall(r"loss (\d\.\d{4})", capsys.readouterr().out)]
    assert printed == [pytest.approx(fmean(first[i : i + 4]), abs=1e-4) for i in range(0, 16, 4)]
    assert losses(0) == first


def plan_lines(text: str) -> list[tuple[str, str]]:
    """(pass, engine) of every plan that a run printed."""
    return re.findall(r"^    (forward|dgrad|wgrad) .*\n        (\w+) \[", text, re.MULTILINE)


def check_report(text: str, engines: set[str], levels: int) -> None:
    losses, dice = re.findall(r"loss (\d\.\d{4})", text), re.findall(r"(?:background|grey|white) (\d\.\d{3})", text)
    assert losses and len(dice) == 3 and all(0 <= float(score) <= 1 for score in dice)
    plans = plan_lines(text)
    layers = 3 * levels
    counts = {pass_: sum(p == pass_ for p, _ in plans) for pass_ in ("forward", "dgrad", "wgrad")}
    assert counts == {"forward": layers, "dgrad": layers - 1, "wgrad": layers}  # the image needs no gradient
    assert {engine for _, engine in plans} == engines


@needs_data
def test_cpu_uses_torchs_convolution(capsys):
    arguments = ["--steps", "2", "--width", "2", "--patch", "16"]
    before = triton_conv3d.settings.current()
    assert cli.main(["demo", "--device", "cpu", *arguments]) == 0
    out = capsys.readouterr().out
    assert "torch's own CPU convolution" in out
    check_report(out, {"aten"}, levels=3)
    assert triton_conv3d.settings.current() == before


def program(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "triton_conv3d", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@needs_data
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU; from NumPy 2.4 on Triton 3.6 has none")
def test_the_interpreter_runs_the_kernels():
    done = program("--device", "interpreter", "--steps", "1", "--width", "2", "--patch", "8")
    assert done.returncode == 0, done.stderr
    assert "Triton's interpreter" in done.stdout
    check_report(done.stdout, {"folded", "implicit_gemm", "matmul"}, levels=2)


def test_starts_afresh_if_triton_was_imported_without_its_interpreter(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execv", lambda *arguments: calls.append(arguments))
    monkeypatch.setitem(sys.modules, "triton", sys)
    monkeypatch.setattr(sys, "argv", ["triton-conv3d", "demo"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cli._enter_interpreter()
    assert calls == []
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    cli._enter_interpreter()
    assert calls == [(sys.executable, [sys.executable, "-m", "triton_conv3d", "demo"])]
    assert os.environ["TRITON_INTERPRET"] == "1"


@needs_data
@pytest.mark.long
def test_without_a_gpu_it_ends_within_three_minutes_and_learns():
    begin = time.monotonic()
    done = program("--device", "interpreter")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 180
    losses = [float(x) for x in re.findall(r"loss (\d\.\d{4})", done.stdout)]
    assert losses[-1] < losses[0] - 0.1
    check_report(done.stdout, {"folded", "implicit_gemm", "matmul"}, levels=2)


@needs_data
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_used_and_its_step_time_stands_beside_torchs(capsys):
    assert cli.main(["demo", "--steps", "2", "--width", "4", "--patch", "16"]) == 0
    out = capsys.readouterr().out
    times = [float(x) for x in re.findall(r"(\d+\.\d\d) ms$", out, re.MULTILINE)]
    assert torch.cuda.get_device_name() in out and len(times) == 3 and min(times) > 0
    assert len(plan_lines(out)) == 26
