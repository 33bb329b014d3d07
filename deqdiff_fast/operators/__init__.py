"""Linear measurement operators for restoration: what a measurement is of an image, its adjoint and pseudo-inverse."""

from .base import Operator
from .downsample import Downsample
from .inpaint import Inpaint
from .separable import Separable

__all__ = ["Downsample", "Inpaint", "Operator", "Separable"]
