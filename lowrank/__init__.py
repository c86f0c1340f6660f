"""Low-rank kernel linear algebra, written once against the Python array API standard."""

from lowrank.pinv import PinvInfo, pinv_newton

__all__ = ["PinvInfo", "pinv_newton"]
__version__ = "0.1.0"
