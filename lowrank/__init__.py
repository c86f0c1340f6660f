"""Low-rank kernel linear algebra, written once against the Python array API standard.

``pinv_newton`` inverts by matrix products alone, ``nystrom`` factors kernel matrices from a few landmarks,
``kernel_ridge`` solves with them to full accuracy, ``softmax_free_attention`` attends in time linear in the tokens;
each takes and returns NumPy, CuPy, torch or JAX arrays. ``lowrank.nn`` holds the torch module and is imported by
itself.
"""

from lowrank._certificate import Certificate
from lowrank._schedule import NewtonSchedule, newton_schedule
from lowrank.attention import softmax_free_attention
from lowrank.factor import LowRank, nystrom
from lowrank.kernels import (
    gaussian_kernel,
    gaussian_matmul,
    laplacian_kernel,
    matern32_kernel,
    matern52_kernel,
    median_lengthscale,
    squared_distances,
)
from lowrank.landmarks import rpcholesky, segment_means, uniform
from lowrank.pinv import PinvInfo, pinv_newton
from lowrank.solve import KernelRidge, kernel_ridge

__all__ = [
    "Certificate",
    "KernelRidge",
    "LowRank",
    "NewtonSchedule",
    "PinvInfo",
    "gaussian_kernel",
    "gaussian_matmul",
    "kernel_ridge",
    "laplacian_kernel",
    "matern32_kernel",
    "matern52_kernel",
    "median_lengthscale",
    "newton_schedule",
    "nystrom",
    "pinv_newton",
    "rpcholesky",
    "segment_means",
    "softmax_free_attention",
    "squared_distances",
    "uniform",
]
__version__ = "0.1.0"
