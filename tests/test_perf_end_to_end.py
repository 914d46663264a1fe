"""End to end: rows for every provider, parity with torch, and nothing that one provider does that stops the others."""

from __future__ import annotations

import collections
import dataclasses
import math
import threading

import pytest
import torch
from fake_clock import Clock
from perf_cases import STAMP, FakeTimer, machine

from perf import __main__ as cli
from perf import end_to_end, networks, results, timing
from perf.end_to_end import PROVIDERS, Candidate, EndToEnd, allowed, deviation, measure, pending
from perf.networks import INFER, MODES, TRAIN
from perf.results import FAILED, LOST, MEMORY, OK, WRONG
from perf.threads import MAIN
from triton_conv3d import Conv3d, convert_conv3d

NETWORK = networks.networks()["qwen2_vl"].shrunk()
OURS = [name for name, provider in PROVIDERS.items() if provider.ours]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few calls, and nothing is really compiled."""
    monkeypatch.setattr(timing, "SAMPLES", 2)
    monkeypatch.setattr(torch, "compile", lambda module, **how: module)


TIMER = FakeTimer((512, 1536), seconds=1e-3)


def run(path, modes=MODES, names=tuple(PROVIDERS), commit=STAMP.commit, **options):
    return measure([NETWORK], modes, names, path, machine=machine(TIMER, commit=commit), **options)


def rows(path) -> dict[tuple[str, str], EndToEnd]:
    return {(row.mode, row.provider): row for row, _ in results.read(path, EndToEnd)}


def begin_as(monkeypatch, raising: dict[str, Exception]):
    """Providers of these names raise at the beginning."""
    init = Candidate.__init__

    def patched(self, network, mode, provider, device):
        init(self, network, mode, provider, device)
        error = next((error for name, error in raising.items() if PROVIDERS[name] == provider), None)
        if error is not None:
            raise error

    monkeypatch.setattr(Candidate, "__init__", patched)


def test_every_provider_has_a_row(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    assert run(path) == {OK: 2 * len(PROVIDERS)}
    found = rows(path)
    assert set(found) == {(mode, name) for mode in MODES for name in PROVIDERS}
    for (mode, name), row in found.items():
        assert (row.network, row.shape, row.dtype, row.status) == ("qwen2_vl", "5x3x2x14x14", "bf16", OK)
        assert (row.time_us, row.low_us, row.high_us, row.samples) == (1000.0, 1000.0, 1000.0, 2)
        assert row.peak_bytes == 1024 and row.measured
        assert row.deviation <= row.allowed and (row.deviation == 0 or name != "torch")
        losses = (row.first_loss, row.last_loss)
        assert losses == (None, None) if mode == INFER else losses[1] < 0.5 * losses[0]
    assert "Qwen2-VL patch embedding, train, bf16, ours: 1.00 ms, 0.00 GiB" in capsys.readouterr().out


def test_what_is_there_is_not_measured_again(tmp_path):
    path = tmp_path / "rows.csv"
    run(path, [TRAIN], ["torch", "torch_cl"])
    assert pending(path, NETWORK, TRAIN, list(PROVIDERS), STAMP) == list(PROVIDERS)[2:]
    assert run(path, [TRAIN]) == {OK: len(PROVIDERS) - 2}
    assert run(path, [TRAIN]) == {}
    assert len(results.read(path, EndToEnd)) == len(PROVIDERS)
    assert run(path, [TRAIN], commit="def") == {OK: len(PROVIDERS)}


def test_the_budget_leaves_the_rest_to_the_next_call(tmp_path, monkeypatch):
    path, clock = tmp_path / "rows.csv", Clock()
    begin = Candidate.begin
    monkeypatch.setattr(Candidate, "begin", lambda self: (clock.wait(10.0), begin(self))[1])
    assert run(path, [INFER], budget=25.0, clock=clock) == {OK: 2}
    assert run(path, [INFER], budget=25.0, clock=clock) == {OK: 1}  # torch contiguous is run again, to compare with
    assert run(path, budget=1000.0, clock=clock).total() == 2 * len(PROVIDERS) - 3
    assert run(path, budget=1000.0, clock=clock) == {}


def converted(module, ours):
    """In place of the backend, which would find the convolutions itself."""
    if ours:
        convert_conv3d(module)
    return module


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_convolution_is_seen(tmp_path, monkeypatch, mode):
    forward = Conv3d.forward
    monkeypatch.setattr(Conv3d, "forward", lambda self, x: 1.1 * forward(self, x))
    monkeypatch.setattr(end_to_end, "_compiled", converted)
    assert run(tmp_path / "rows.csv", [mode]) == {OK: len(PROVIDERS) - len(OURS), WRONG: len(OURS)}
    for name in OURS:
        row = rows(tmp_path / "rows.csv")[mode, name]
        assert row.deviation > row.allowed and "deviates by" in row.reason and row.time_us


def test_a_wrong_gradient_is_seen(tmp_path, monkeypatch):
    """Only the losses of later steps show it."""
    call = Candidate.call

    def patched(self):
        if self.provider.ours:
            for parameter in self.parameters:
                parameter.register_hook(lambda grad: 0.9 * grad) if not parameter._backward_hooks else None
        return call(self)

    monkeypatch.setattr(Candidate, "call", patched)
    assert run(tmp_path / "rows.csv", [TRAIN], ["torch", "ours"]) == {OK: 1, WRONG: 1}


@pytest.mark.parametrize(
    "error, status",
    [(torch.OutOfMemoryError("no room"), MEMORY), (RuntimeError("no such algorithm"), FAILED)],
    ids=["memory", "failed"],
)
def test_one_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, error, status):
    path = tmp_path / "rows.csv"
    begin_as(monkeypatch, {"torch_bench": error})
    assert run(path, [INFER]) == {OK: len(PROVIDERS) - 1, status: 1}
    row = rows(path)[INFER, "torch_bench"]
    assert row.status == status and str(error) in row.reason and row.time_us is None
    assert run(path, [INFER]) == {}


def test_without_a_result_of_torch_nothing_is_compared(tmp_path, monkeypatch):
    begin_as(monkeypatch, {"torch": torch.OutOfMemoryError("no room")})
    assert run(tmp_path / "rows.csv", [INFER], ["torch", "ours"]) == {MEMORY: 1, OK: 1}
    row = rows(tmp_path / "rows.csv")[INFER, "ours"]
    assert row.deviation is None and row.reason == "not compared: torch has no result" and row.time_us


@pytest.mark.parametrize("calls", [0, end_to_end.WARM_UP], ids=["at_the_beginning", "while_timed"])
def test_a_lost_device_leaves_the_others_to_the_next_process(tmp_path, monkeypatch, calls):
    """Whatever the others do from then on says nothing about them."""
    path, call, done = tmp_path / "rows.csv", Candidate.call, collections.Counter()

    def patched(self):
        done[self.provider.ours] += 1
        if done[True] > calls:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return call(self)

    with monkeypatch.context() as patch:
        patch.setattr(Candidate, "call", patched)
        assert run(path, [INFER, TRAIN], ["torch", "torch_cl", "ours"]) == {FAILED: 1, LOST: 1}
    assert set(rows(path)) == {(INFER, "ours")}
    assert run(path) == {OK: 2 * len(PROVIDERS) - 1}


def test_a_scaled_loss_gives_the_same_steps(monkeypatch):
    half = dataclasses.replace(NETWORK, dtype="fp16")
    losses = []
    for scale in (end_to_end.LOSS_SCALE, 1.0):
        monkeypatch.setattr(end_to_end, "LOSS_SCALE", scale)
        losses.append(Candidate(half, TRAIN, PROVIDERS["torch_cl"], torch.device("cpu")).begin())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=0)
    assert len(losses[0]) == end_to_end.STEPS


def test_providers_differ_in_what_they_are_named_for():
    network = dataclasses.replace(networks.networks()["r3d18"].shrunk(), dtype="fp32")
    for provider in PROVIDERS.values():
        candidate = Candidate(network, INFER, provider, torch.device("cpu"))
        layers = [m for m in candidate.module.modules() if isinstance(m, torch.nn.Conv3d)]
        eager = provider.ours and not provider.compiled
        assert all(isinstance(m, Conv3d) == eager for m in layers)
        for tensor in (candidate.input, layers[3].weight):
            assert tensor.is_contiguous(memory_format=provider.layout)
        with candidate.context():
            assert torch.backends.cudnn.benchmark == provider.benchmark
    threads = {name: provider.thread for name, provider in PROVIDERS.items()}
    searching = {"torch_bench": "bench", "torch_cl_bench": "bench", "ours": "ours", "ours_compile": "ours"}
    assert threads == {**dict.fromkeys(PROVIDERS, MAIN), **searching}


def test_all_of_a_provider_happens_in_its_thread(tmp_path, monkeypatch):
    """Backward passes too: torch keeps cuDNN's plans for each thread."""
    seen: dict[str, set[str]] = {}
    call = Candidate.call

    def patched(self):
        names = seen.setdefault(next(n for n, p in PROVIDERS.items() if p is self.provider), set())
        names.add(threading.current_thread().name)
        for parameter in self.parameters:
            parameter.register_hook(lambda grad: names.add(threading.current_thread().name))
        return call(self)

    monkeypatch.setattr(Candidate, "call", patched)
    run(tmp_path / "rows.csv", [TRAIN])
    main = threading.current_thread().name
    for name, provider in PROVIDERS.items():
        expected = main if provider.thread == MAIN else f"perf-{provider.thread}_0"
        assert seen[name] == {expected}


def test_deviation():
    losses = torch.tensor([2.0, 1.0, 0.5])
    assert deviation(losses * torch.tensor([1.0, 1.25, 1.0]), losses, TRAIN) == 0.25
    assert deviation(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]), INFER) == pytest.approx(0.1)
    assert deviation(torch.tensor([3.0, math.nan]), torch.tensor([3.0, 4.0]), INFER) == math.inf
    assert deviation(torch.tensor([math.nan, 1.0]), torch.tensor([3.0, 4.0]), TRAIN) == math.inf


def test_allowed_follows_the_peers_and_has_a_floor():
    assert allowed("bf16", []) == allowed("bf16", [1e-9, math.inf]) == 2 * 4 * 2.0**-7
    assert allowed("fp16", [0.5, 0.1]) == 1.0


@pytest.mark.parametrize("arguments, told", [
    (["--network", "vgg"], "'vgg': the networks are nnunet3d"),
    (["--provider", "torch,onnx"], "'onnx': the providers are torch, torch_cl"),
    (["--budget", "0"], "--budget 0.0: expected seconds"),
])  # fmt: skip
def test_bad_input_is_told_what_exists(arguments, told, capsys):
    assert cli.main(["end-to-end", *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("fault", [None, WRONG])
def test_the_command(tmp_path, monkeypatch, capsys, fault):
    monkeypatch.setattr(end_to_end.machines, "here", machine)
    monkeypatch.setattr(end_to_end.networks, "get", lambda names: [NETWORK])
    if fault:
        forward = Conv3d.forward
        monkeypatch.setattr(Conv3d, "forward", lambda self, x: 1.1 * forward(self, x))
    path = tmp_path / "rows.csv"
    arguments = ["end-to-end", "--mode", INFER, "--provider", "torch,ours", "--out", str(path)]
    assert cli.main(arguments) == (1 if fault else 0)
    assert f"2 rows added to {path}\n" in capsys.readouterr().out
