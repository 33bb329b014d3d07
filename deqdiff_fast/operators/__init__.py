"""Linear measurement operators for restoration: what a measurement is of an image, its adjoint and pseudo-inverse."""

from .base import Operator
from .bicubic import Bicubic
from .blur import Blur
from .colorize import Colorize
from .compose import Compose
from .conjugate import least_squares
from .downsample import Downsample
from .identities import check
from .inpaint import Inpaint
from .noise_level import estimate_sigma
from .physics import take
from .separable import Separable
from .walsh_hadamard import WalshHadamard

__all__ = [
    "Bicubic",
    "Blur",
    "Colorize",
    "Compose",
    "Downsample",
    "Inpaint",
    "Operator",
    "Separable",
    "WalshHadamard",
    "check",
    "estimate_sigma",
    "least_squares",
    "take",
]
