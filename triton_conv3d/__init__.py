"""Autotuned Triton kernels for 3-D convolution in torch: forward, both gradients, a lazy module, a plan cache."""

from . import settings
from .convert import Conversion, convert_conv3d
from .decompositions import decompositions
from .explain import Explanation, ModelExplanation, explain
from .functional import conv3d, conv_transpose3d
from .modules import Conv3d, LazyConv3d, materialize
from .settings import configure
from .transposed import ConvTranspose3d, LazyConvTranspose3d
from .tuning.ranks import broadcast_plans

__version__ = "0.1.0"
__all__ = [
    "Conv3d",
    "ConvTranspose3d",
    "Conversion",
    "Explanation",
    "LazyConv3d",
    "LazyConvTranspose3d",
    "ModelExplanation",
    "broadcast_plans",
    "configure",
    "conv3d",
    "conv_transpose3d",
    "convert_conv3d",
    "decompositions",
    "explain",
    "inductor_pass",
    "materialize",
    "settings",
]


def __getattr__(name: str):
    if name == "inductor_pass":  # torch's compiler takes long to import
        from .compile_backend import inductor_pass

        return inductor_pass
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
