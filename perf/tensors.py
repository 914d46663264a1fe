"""The tensors that a case is measured on: random, the same values in every memory format."""

from __future__ import annotations

import zlib

import torch

from triton_conv3d.problem import Operands, Problem, device_name
from triton_conv3d.workload import DTYPES, LAYOUTS

from .workloads import Case

_SHAPES = {"input": "input_shape", "weight": "weight_shape", "grad": "output_shape"}
_READ = {"forward": ("input", "weight", "bias"), "dgrad": ("weight", "grad"), "wgrad": ("input", "grad")}


class Tensors:
    """Made when first asked for, and kept as long as this object.

    Attributes:
        problems: of the case on this device; see :meth:`perf.workloads.Case.problems`.
    """

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device
        self.problems = case.problems(*device_name(device))
        self._made: dict[tuple[str, str], torch.Tensor] = {}

    def get(self, name: str, layout: str) -> torch.Tensor | None:
        """One tensor, uniform in (-1, 1), which is what :mod:`triton_conv3d.tuning.verify` judges results on.

        Args:
            name: ``input``, ``weight``, ``grad`` (of the output) or ``bias``, all of the convolution that the layer
                is written as. A layer without bias has None for it.
            layout: a key of :data:`triton_conv3d.workload.LAYOUTS`.
        """
        layer = self.case.workload.layer
        if name == "bias":
            if not layer.bias:
                return None
            layout = "contiguous"
        if (name, layout) not in self._made:
            self._made[name, layout] = self._make(name, layout)
        return self._made[name, layout]

    def operands(self, problem: Problem) -> Operands:
        """What this problem reads, in the case's layout."""
        return Operands(**{name: self.get(name, self.case.layout) for name in _READ[problem.pass_]})

    @property
    def bytes_read(self) -> int:
        """Of everything that the problems read, each tensor once."""
        names = {name for problem in self.problems for name in _READ[problem.pass_]}
        tensors = (self.get(name, self.case.layout) for name in names)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def _make(self, name: str, layout: str) -> torch.Tensor:
        layer = self.case.workload.layer
        shape = (layer.out_channels,) if name == "bias" else getattr(layer, _SHAPES[name])
        format_ = LAYOUTS[layout] if len(shape) == 5 else torch.contiguous_format
        tensor = torch.empty(shape, dtype=DTYPES[self.case.dtype], device=self.device, memory_format=format_)
        twin = next((t for (other, _), t in self._made.items() if other == name), None)
        if twin is not None:
            return tensor.copy_(twin)
        seed = zlib.crc32(f"{self.case.workload.id} {name}".encode())
        return tensor.uniform_(-1, 1, generator=torch.Generator(self.device).manual_seed(seed))
