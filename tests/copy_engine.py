"""What the copy engine reads through a descriptor, for gluon_emulator.py."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np


class Descriptor:
    """What the copy engine reads; zeros lie outside."""

    def __init__(self, described):
        self.shape, self.block, self.dtype = described.shape, tuple(described.block_shape), described.base.dtype
        self.block_type = SimpleNamespace(nbytes=math.prod(self.block) * described.base.element_size())
        assert described.layout.rank == len(self.block) and described.base.data_ptr() % 16 == 0
        assert all(stride * described.base.element_size() % 16 == 0 for stride in described.strides[:-1])
        self.elements = described.base.as_strided(described.shape, described.strides)

    def read(self, at: tuple[int, ...]) -> np.ndarray:
        found = np.zeros(self.block, np.float32)
        ranges = [
            (max(0, start), max(0, min(size, start + extent)))
            for start, size, extent in zip(at, self.shape, self.block, strict=True)
        ]
        if all(low < high for low, high in ranges):
            inside = tuple(slice(low - start, high - start) for (low, high), start in zip(ranges, at, strict=True))
            found[inside] = self.elements[tuple(slice(*r) for r in ranges)].float().numpy()
        return found.reshape(-1, self.block[-1])


class Im2colDescriptor(Descriptor):
    """One of (n, d, h, w, channel) in im2col mode, by the words and limits of the PTX ISA, 5.5.4, for five dimensions.

    From a place within the box between the corners on, pixels are visited along w, then h, d, n: along n one after the
    other, along the others in steps of the traversal stride, from the lower corner of the box to the upper one. Each
    is read at the offsets from where it is.
    """

    def __init__(self, described):
        super().__init__(described)
        self.steps = described.element_strides[1:4]
        lower, upper = described.pixel_box_lower_corner, described.pixel_box_upper_corner
        assert len(self.shape) == 5 and self.block[0] <= 1024 and self.block[1] <= 256
        assert all(-16 <= corner < 16 for corner in (*lower, *upper)), "a corner that the descriptor does not hold"
        assert all(1 <= step <= 8 for step in self.steps) and described.element_strides[::4] == [1, 1]
        sides = zip(lower, upper, self.shape[1:4], strict=True)
        self.box = [(low, size - 1 + high) for low, high, size in sides]
        assert all(low <= high for low, high in self.box), "no pixel between the corners"

    def read(self, at: tuple[int, ...], offsets: tuple[int, ...]) -> np.ndarray:
        n, *place, channel = at
        within = (low <= x <= high for x, (low, high) in zip(place, self.box, strict=True))
        assert all(within), "a start outside of the box"
        assert all(0 <= offset < 32 for offset in offsets), "an offset that the instruction does not hold"
        found = np.zeros(self.block, np.float32)
        last = min(channel + self.block[1], self.shape[4])
        for pixel in range(self.block[0]):
            where = (n, *(x + offset for x, offset in zip(place, offsets, strict=True)))
            if all(0 <= x < size for x, size in zip(where, self.shape, strict=False)):
                found[pixel, : last - channel] = self.elements[where][channel:last].float().numpy()
            for axis in (2, 1, 0):
                place[axis] += self.steps[axis]
                if place[axis] <= self.box[axis][1]:
                    break
                place[axis] = self.box[axis][0]
            else:
                n += 1
        return found
