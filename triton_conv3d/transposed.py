"""ConvTranspose3d and LazyConvTranspose3d: torch's own modules with this package's convolution behind them."""

from __future__ import annotations

from torch import Tensor, nn

from .functional import conv_transpose3d


class ConvTranspose3d(nn.ConvTranspose3d):
    """:class:`torch.nn.ConvTranspose3d`, computed by :func:`triton_conv3d.conv_transpose3d`: same arguments, state and
    initial values. As torch's it pads with zeros alone."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        geometry = (self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation)
        extra = self._output_padding(input, output_size, *geometry)
        return conv_transpose3d(
            input, self.weight, self.bias, self.stride, self.padding, extra, self.groups, self.dilation
        )


class LazyConvTranspose3d(nn.LazyConvTranspose3d, ConvTranspose3d):
    """:class:`torch.nn.LazyConvTranspose3d` that becomes a :class:`ConvTranspose3d` at the first call."""

    cls_to_become = ConvTranspose3d
