"""What every public function refuses, and that its docstring says so.

``TABLE`` has the clauses of each "Raises" and "Warns", word for word, and under each of them calls that it speaks of,
with what their message must name. One test makes the calls. Another takes the clauses out of the docstrings, which must
leave nothing but a few connecting words: what is promised is tested, and what is tested is promised. Where a docstring
says "As :func:`other`", the rows of the other function are run with this one, all of them, or those about the arguments
that it lists.
"""

import builtins
import dataclasses
import functools
import inspect
import linecache
import math
import re
import sys
from collections import namedtuple
from pathlib import Path
from unittest import mock

import dask
import dask.array as da
import jax
import numpy as np
import pytest
import safetensors.numpy
import scipy.sparse
import torch
from sklearn.exceptions import NotFittedError
from sklearn.utils._param_validation import InvalidParameterError

import lowrank
import lowrank.dask
import lowrank.nn
import lowrank.sklearn
from lowrank import _saved, gaussian_kernel, nystrom, segment_means, squared_distances
from lowrank.nn import SoftmaxFreeAttention
from lowrank.sklearn import Nystroem, NystroemRidge

# What may be left of a section without its clauses and references.
CONNECTING = {"if", "or", "and", "also"}
# Public, and without arguments that could be refused: values that others make, and what is asked of them.
NOTHING_TO_REFUSE = {
    "lowrank.Certificate",
    "lowrank.KernelRidge",
    "lowrank.LowRank",
    "lowrank.LowRank.diagonal",
    "lowrank.LowRank.eigh",
    "lowrank.LowRank.to_dense",
    "lowrank.NewtonSchedule",
    "lowrank.PinvInfo",
    "lowrank.dask.ChunkedLowRank",
    "lowrank.dask.RidgeFit",
    "lowrank.nn.SoftmaxFreeAttention.extra_repr",
    "lowrank.sklearn.Nystroem",
    "lowrank.sklearn.NystroemRidge",
}

RANDOM = np.random.default_rng(0)
X, Z, V, Y = (RANDOM.standard_normal(shape) for shape in ((6, 2), (3, 2), (3, 4), 6))
K = gaussian_kernel(X, X)
BAD = np.where(np.arange(6)[:, None] == 4, np.nan, X)
T = torch.asarray(X)
META = T.to("meta")
F, FT = nystrom(X, rank=3, rng=0), nystrom(T, rank=3, rng=0)
FK, FB = nystrom(K, kernel=None, rank=3, rng=0), nystrom(np.stack([X, X]), rank=3, rng=0)
TOKENS = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))


# A call's arguments. Without positional ones it has good ones, and good options where none are named.
Given = namedtuple("Given", "args options")


def given(*args, **options):
    return Given(args, options)


def lazy(x):
    return da.from_array(x, chunks=(3, *x.shape[1:]))


# Rows that many functions have


def no_arrays(name, put):
    """An argument that is no dense array of values."""
    kinds = ([[1.0, 2.0]], 3, "x", None, scipy.sparse.csr_array(X), np.ma.array(X), np.ndarray)
    return [
        *((f"{name} must be an array, not {type(x).__name__}", put(x)) for x in kinds),
        (f"{name} is a Dask array (shape (6, 2))", put(lazy(X))),
        (f"{name} is a sparse tensor, torch.sparse_coo", put(T.to_sparse())),
    ]


def no_floats(name, put):
    dtypes = (int, bool, object, "<U1", np.longdouble)
    return [(f"{name} has dtype {np.dtype(t)} (shape (6, 2)); a floating", put(np.ones((6, 2), t))) for t in dtypes]


def refused(name, *values, **others):
    """Values of a keyword whose message names it and them."""
    return [((name, named(value)), given(**others, **{name: value})) for value in values]


def named(value):
    shape = tuple(getattr(value, "shape", ()))
    return f"an array of shape {shape}" if shape else f"not {repr(value)[:20]}"


NO_INTS = 2.0, "2", None, True, 1j, np.ones((2, 2)), np.float64(3)
NO_FLAGS = "yes", None, 1, np.ones((2, 2)), torch.ones(2)
NO_POSITIVE = 0.0, -1, math.nan, math.inf, -math.inf, 10**400
NO_NUMBERS = "1", None, 1j, [1.0], np.ones((2, 2)), np.complex128(1)
NO_SHARES = -0.1, 1.0, math.nan, 10**400, "a", 1j, np.ones((2, 2))  # no numbers from 0 to below 1
NO_KERNELS = refused("kernel", "gaussian", 3, [gaussian_kernel], X)
NO_RANDOM = [
    (f"rng must be None, an int or a numpy.random.Generator, not {type(rng).__name__}", given(rng=rng))
    for rng in ("seed", 1.5, [1, 2], np.random.RandomState(0), torch.Generator())
]
NEGATIVE_RANDOM = refused("rng", -1)


def returning(change):
    """A kernel that returns something else than the Gaussian block."""
    return lambda a, b: change(gaussian_kernel(a, b))


def skewed(a, b):
    return gaussian_kernel(a, b) * (9 + a[..., :1])


NO_BLOCKS = [
    ("what the kernel returned must be an array, not list", given(kernel=returning(lambda k: k.tolist()))),
    ("what the kernel returned must be an array, not float", given(kernel=lambda a, b: 1.0)),
    ("what the kernel returned must be an array, not NoneType", given(kernel=lambda a, b: None)),
    ("what the kernel returned has dtype float32", given(kernel=returning(lambda k: k.astype(np.float32)))),
    ("what the kernel returned a torch array", given(kernel=returning(torch.asarray))),
]
OTHER_BLOCKS = [
    (("the kernel returned a block of shape", "it should be"), given(kernel=returning(lambda k: k[..., 0]))),
    (("the kernel returned a block of shape ()", "it should be"), given(kernel=returning(lambda k: np.asarray(1.0)))),
]


def traced(call):
    """call(f, x) with x in a traced program."""
    return lambda f: jax.jit(lambda x: call(f, x))(X)


def missing(*modules, **options):
    def call(f):
        with mock.patch.dict(sys.modules, dict.fromkeys(modules)):
            f(**options)

    return call


# What is called, and with what where a row does not say


def filled(function, *args, **options):
    return lambda *a, **o: function(*(a or args), **({} if "landmarks" in o else options) | o)


def of(method, *args, **options):
    """A method of a factorisation, F unless another is named."""
    return lambda *a, of=F, **o: getattr(of, method)(*(a or args), **options | o)


def save(path="new", *, of=F):
    Path("folder").mkdir(exist_ok=True)
    of.save(path)


def load(path="saved", *, kernel=gaussian_kernel, **options):
    F.save("saved")
    FK.save("matrix")
    Path("junk").write_bytes(b"junk")
    Path("half").write_bytes(Path("saved").read_bytes()[:-8])
    safetensors.numpy.save_file({"factor": X}, "other")
    safetensors.numpy.save_file({"factor": X}, "changed", {"lowrank": "{}"})
    _saved.write("format", {"factor": X}, {"format": "another"})
    _saved.write("part", {"factor": X}, {"format": "LowRank 1"})
    return lowrank.LowRank.load(path, kernel=kernel, **options)


def computed(x=lazy(X), **options):  # noqa: B008
    result = lowrank.dask.nystrom(x, **({} if "landmarks" in options else {"rank": 3}) | options)
    return dask.compute(result.factor, result.trace_error)


def ridge(x=lazy(X), y=lazy(Y), **options):  # noqa: B008
    return lowrank.dask.ridge(x, y, **{"ridge": 0.1} | ({} if "landmarks" in options else {"rank": 3}) | options)


def layer(**options):
    return SoftmaxFreeAttention(**{"dim": 4, "num_heads": 2, "grid": 2} | options)


def forward(x=TOKENS, size=(3, 4), *, of=None, **options):
    return (of or layer())(x, size, **options)


def landmark_attention(x=TOKENS, size=(3, 4), *, of=None):
    return (of or layer()).landmark_attention(x, size)


def overflowing():
    module = layer().half()
    torch.nn.init.constant_(module.query.weight, 3e4)
    return module


def fit(x=X, **options):
    return Nystroem(**{"n_components": 3, "random_state": 0} | options).fit(x)


def transform(x=X, *, fitted=True, elsewhere=False, **options):
    model = fit(**options) if fitted else Nystroem()
    if elsewhere:
        model.normalization_ = torch.asarray(model.normalization_)
    return model.transform(x)


def fit_ridge(x=X, y=Y, sample_weight=None, **options):
    return NystroemRidge(**{"n_components": 3, "random_state": 0} | options).fit(x, y, sample_weight)


def partial_fit(x=X, y=Y, sample_weight=None, *, after=False, **options):
    model = NystroemRidge(**{"n_components": 3, "random_state": 0} | options)
    return (model.partial_fit(X, Y) if after else model).partial_fit(x, y, sample_weight)


def predict(x=X, *, fitted=True, elsewhere=False, std=False, **options):
    data = {"precomputed": K, "additive_chi2": np.abs(X)}.get(str(options.get("kernel")), X)
    model = fit_ridge(data, **options) if fitted else NystroemRidge()
    if elsewhere:
        model.normalization_ = torch.asarray(model.normalization_)
    return model.predict(x, return_std=std)


CALLED = {
    "lowrank.squared_distances": filled(squared_distances, X, Z),
    "lowrank.gaussian_kernel": filled(gaussian_kernel, X, Z),
    "lowrank.laplacian_kernel": filled(lowrank.laplacian_kernel, X, Z),
    "lowrank.matern32_kernel": filled(lowrank.matern32_kernel, X, Z),
    "lowrank.matern52_kernel": filled(lowrank.matern52_kernel, X, Z),
    "lowrank.gaussian_matmul": filled(lowrank.gaussian_matmul, X, Z, V),
    "lowrank.median_lengthscale": filled(lowrank.median_lengthscale, X),
    "lowrank.uniform": filled(lowrank.uniform, X, rank=2),
    "lowrank.segment_means": filled(segment_means, X, rank=2, kernel=gaussian_kernel),
    "lowrank.rpcholesky": filled(lowrank.rpcholesky, X, rank=2, kernel=gaussian_kernel),
    "lowrank.nystrom": filled(nystrom, X, rank=3),
    "lowrank.LowRank.__matmul__": of("__matmul__", X),
    "lowrank.LowRank.solve": of("solve", X, ridge=0.1),
    "lowrank.LowRank.preconditioner": lambda v=X, *, ridge=0.1, of=F: of.preconditioner(ridge=ridge)(v),
    "lowrank.LowRank.logdet": of("logdet", ridge=0.1),
    "lowrank.LowRank.features": of("features", X),
    "lowrank.LowRank.truncate": of("truncate"),
    "lowrank.LowRank.certificate": of("certificate", X),
    "lowrank.LowRank.aslinearoperator": of("aslinearoperator"),
    "lowrank.LowRank.save": save,
    "lowrank.LowRank.load": load,
    "lowrank.Certificate.cg_bound": lambda *, ridge=0.1, tol=1e-6: F.certificate(X).cg_bound(ridge=ridge, tol=tol),
    "lowrank.kernel_ridge": lambda *a, **o: filled(lowrank.kernel_ridge, X, Y, rank=3)(*a, **{"ridge": 0.1} | o),
    "lowrank.KernelRidge.predict": lambda x=X, y=Y, new=X: lowrank.kernel_ridge(x, y, ridge=0.1, rank=3).predict(new),
    "lowrank.newton_schedule": filled(lowrank.newton_schedule, 10.0),
    "lowrank.pinv_newton": filled(lowrank.pinv_newton, K),
    "lowrank.softmax_free_attention": filled(lowrank.softmax_free_attention, X, Y[:, None], Z),
    "lowrank.dask.nystrom": computed,
    "lowrank.dask.ridge": ridge,
    "lowrank.dask.rpcholesky": filled(lowrank.dask.rpcholesky, lazy(X), rank=3, kernel=gaussian_kernel),
    "lowrank.dask.ChunkedLowRank.features": lambda x: dask.compute(
        lowrank.dask.nystrom(lazy(X), rank=3, rng=0).features(x)
    ),
    "lowrank.dask.RidgeFit.predict": lambda x: dask.compute(ridge(rng=0).predict(x)),
    "lowrank.nn.SoftmaxFreeAttention": layer,
    "lowrank.nn.SoftmaxFreeAttention.forward": forward,
    "lowrank.nn.SoftmaxFreeAttention.landmark_attention": landmark_attention,
    "lowrank.nn.gaussian_attention": filled(lowrank.nn.gaussian_attention, T, T),
    "lowrank.sklearn.Nystroem.fit": fit,
    "lowrank.sklearn.Nystroem.transform": transform,
    "lowrank.sklearn.NystroemRidge.fit": fit_ridge,
    "lowrank.sklearn.NystroemRidge.partial_fit": partial_fit,
    "lowrank.sklearn.NystroemRidge.predict": predict,
}

OTHER_LIBRARY = [("x is a numpy array and y a torch array", given(X, T))]
OTHER_DTYPES = [
    ("x has dtype float64 and y has dtype float32", given(X, Z.astype(np.float32))),
    *no_floats("x", lambda x: given(x, x)),
    ("x has dtype complex128 (shape (6, 2)); distances need a real", given(X + 0j, X + 0j)),
]
OTHER_DEVICE = [("x (shape (6, 2)) is on device cpu and y (shape (6, 2)) on meta", given(T, META))]
LENGTHSCALES = [
    *((("lengthscale must be an array, not", type(v).__name__), given(lengthscale=v)) for v in ("1", None, 1j, [1.0])),
    ("lengthscale has dtype int64", given(lengthscale=np.asarray([1, 2]))),
    ("lengthscale has dtype complex128", given(lengthscale=np.asarray([1, 2j]))),
    ("lengthscale is a torch array", given(lengthscale=torch.ones(2))),
]
BAD_LENGTHSCALES = [
    *refused("lengthscale", *NO_POSITIVE),
    ("not -1.0 (entry 1 of the shape (2,))", given(lengthscale=np.asarray([1.0, -1.0]))),
]
LENGTHSCALE_SHAPES = [
    ("lengthscale has shape (3,)", given(lengthscale=np.ones(3))),
    ("lengthscale has shape (6, 2)", given(lengthscale=np.ones((6, 2)))),
]
A_LENGTHSCALE = "``lengthscale`` is neither a number nor a real floating array of"

TABLE = {
    "lowrank.squared_distances": {
        TypeError: {
            "``x`` and ``y`` are not arrays": [
                *no_arrays("x", lambda x: given(x, Z)),
                *no_arrays("y", lambda y: given(X, y)),
                ("x (shape (6, 2)) is on the device meta, where tensors hold no values", given(META, META)),
            ],
            "of one library": OTHER_LIBRARY,
            "one real floating dtype": OTHER_DTYPES,
        },
        ValueError: {
            "they have fewer than two axes": [
                ("x must have at least two axes, (..., points, features), not the shape (6,)", given(X[:, 0], Z)),
                ("y must have at least two axes, (..., points, features), not the shape ()", given(X, Z[0, 0])),
            ],
            "different features": [("x has shape (6, 2) and y (3, 1)", given(X, Z[:, :1]))],
            "leading axes that do not broadcast": [
                ("x (2, 6, 2), y (3, 3, 2)", given(np.stack([X] * 2), np.stack([Z] * 3)))
            ],
            "different devices": OTHER_DEVICE,
        },
    },
    "lowrank.gaussian_kernel": {
        TypeError: {
            "``x`` and ``y`` are not arrays": [
                *no_arrays("x", lambda x: given(x, Z)),
                *no_arrays("y", lambda y: given(X, y)),
            ],
            "of one library": OTHER_LIBRARY,
            "one real floating dtype": OTHER_DTYPES,
            f"{A_LENGTHSCALE} that library": LENGTHSCALES,
        },
        ValueError: {
            "the shapes do not fit": [
                ("x must have at least two axes, (..., points, features), not the shape (6,)", given(X[:, 0], Z)),
                ("x has shape (6, 2) and y (3, 1)", given(X, Z[:, :1])),
                ("x (2, 6, 2), y (3, 3, 2)", given(np.stack([X] * 2), np.stack([Z] * 3))),
                *LENGTHSCALE_SHAPES,
            ],
            "a lengthscale is not positive and finite (checked where its value is known, not in a traced program)": (
                BAD_LENGTHSCALES
            ),
            "the devices differ": OTHER_DEVICE,
        },
    },
    "lowrank.laplacian_kernel": {},
    "lowrank.matern32_kernel": {},
    "lowrank.matern52_kernel": {},
    "lowrank.gaussian_matmul": {
        TypeError: {
            "``x``, ``y`` and ``v`` are not arrays": [
                *no_arrays("x", lambda x: given(x, Z, V)),
                *no_arrays("v", lambda v: given(X, Z, v)),
            ],
            "of one library": [("x is a numpy array and v a torch array", given(X, Z, torch.asarray(V)))],
            "one real floating dtype": [
                ("x has dtype float64 and v has dtype float32", given(X, Z, V.astype(np.float32))),
                ("x has dtype complex128 (shape (6, 2)); distances need a real", given(X + 0j, Z + 0j, V + 0j)),
            ],
            f"{A_LENGTHSCALE} that library": LENGTHSCALES,
        },
        ValueError: {
            "the shapes do not fit": [
                ("v must have at least two axes, (..., points, features), not the shape (3,)", given(X, Z, V[:, 0])),
                ("v has shape (2, 4) and y (3, 2); v needs one row", given(X, Z, V[:2])),
                ("x has shape (6, 2) and y (3, 1)", given(X, Z[:, :1], V)),
                (
                    "the shapes are x (2, 6, 2), y (3, 2), v (3, 3, 4)",
                    given(np.stack([X] * 2), Z, np.stack([V] * 3)),
                ),
                *LENGTHSCALE_SHAPES,
            ],
            "a lengthscale is not positive and finite": BAD_LENGTHSCALES,
            "the devices differ": [("v (shape (6, 2)) on meta", given(T, T, META))],
        },
    },
    "lowrank.median_lengthscale": {
        TypeError: {
            "``x`` is not an array of a real floating dtype": [
                *no_arrays("x", given),
                *no_floats("x", given),
                ("x has dtype complex128", given(X + 0j)),
            ],
            "belongs to a traced program": [
                ("x belongs to a traced program", traced(lambda f, x: f(x))),
                ("x belongs to a traced program", lambda f: torch.func.vmap(f)(torch.stack([T, T]))),
            ],
            "``rng`` is none of the above": NO_RANDOM,
        },
        ValueError: {
            "``x`` does not have two axes and two rows": [
                ("x must hold at least two points, (n, d), not the shape (6,)", given(X[:, 0])),
                ("x must hold at least two points, (n, d), not the shape (1, 2)", given(X[:1])),
                ("x must hold at least two points, (n, d), not the shape (1, 6, 2)", given(X[None])),
            ],
            "``rng`` is negative": NEGATIVE_RANDOM,
            "the median is not finite, as with NaN in ``x``": [
                ("the median distance in x (shape (6, 2)) is nan", given(np.full((6, 2), math.nan)))
            ],
            "zero, as it is where most points coincide": [
                ("the median distance in x (shape (6, 2)) is 0.0", given(np.ones((6, 2))))
            ],
        },
    },
    "lowrank.uniform": {
        TypeError: {
            "``rank`` is not an int": refused("rank", *NO_INTS),
            "``x`` not an array of floating dtype": [*no_arrays("x", given), *no_floats("x", given)],
            "``rng`` none of the above": NO_RANDOM,
        },
        ValueError: {
            "``x`` has fewer than two axes": [("x must have at least two axes, (..., points, features)", given(Y))],
            "``rank`` is not in 1 … n": refused("rank", 0, -1, 7, 10**30, 10**400),
            "``rng`` is negative": NEGATIVE_RANDOM,
        },
    },
    "lowrank.segment_means": {
        TypeError: {
            "``rank`` is not an int": refused("rank", *NO_INTS, kernel=gaussian_kernel),
            "``x`` not an array of floating dtype": [*no_arrays("x", given), *no_floats("x", given)],
        },
        ValueError: {
            "``x`` has fewer than two axes": [("x must have at least two axes, (..., points, features)", given(Y))],
            "``rank`` is not in 1 … n": refused("rank", 0, -1, 7, 10**30),
            "``kernel`` is None, which means that ``x`` is the matrix K itself and has no points to average": [
                ("kernel=None x (shape (6, 6)) is the matrix K itself", given(K, kernel=None))
            ],
        },
    },
    "lowrank.rpcholesky": {
        TypeError: {
            "``rank`` is not an int": refused("rank", *NO_INTS),
            "``x`` not an array of float32 or float64 (it may carry derivatives, but not belong to a traced program)": [
                *no_arrays("x", given),
                *no_floats("x", given),
                ("outside of a traced program, not float16", given(X.astype(np.float16))),
                ("outside of a traced program, not complex128", given(X + 0j)),
                ("x must be an array of float32 or float64 outside of a traced program", traced(lambda f, x: f(x))),
            ],
            "``rng`` none of the above": NO_RANDOM,
            "``kernel`` neither callable nor None": NO_KERNELS,
            "one that returns no array of the library and dtype of its points": NO_BLOCKS,
        },
        ValueError: {
            "``x`` has not two axes": [
                ("one set of points, (n, d); x has shape (1, 6, 2)", given(X[None])),
                ("not the shape (6,)", given(Y)),
            ],
            "is not square where it is K": [("x has shape (6, 2)", given(kernel=None))],
            "``rank`` is not in 1 … n": refused("rank", 0, -1, 7, 10**30),
            "``rtol`` not in [0, 1)": refused("rtol", *NO_SHARES, None),
            "``rng`` is negative": NEGATIVE_RANDOM,
            "the kernel returns a block of another shape": OTHER_BLOCKS,
            "a diagonal that is negative": [
                ("k(x, x) of row 0 is -1.0", given(kernel=returning(lambda k: -k))),
                ("k(x, x) of row 0 is -1.0", given(-K, kernel=None)),
            ],
            "not finite anywhere": [
                ("k(x, x) of row 4 is nan", given(BAD)),
                ("k(x, x) of row 0 is inf", given(kernel=returning(lambda k: k + math.inf))),
            ],
        },
    },
    "lowrank.nystrom": {
        TypeError: {
            "``x`` is not an array of float32 or float64": [
                *no_arrays("x", given),
                *no_floats("x", given),
                ("x has dtype float16 (shape (6, 2)); convert it to float32", given(X.astype(np.float16))),
                ("x has dtype complex128 (shape (6, 2)); convert it to float32", given(X + 0j)),
            ],
            "``landmarks``, ``rank`` or ``rng`` is of another type": [
                *refused("rank", *(rank for rank in NO_INTS if rank is not None)),
                *NO_RANDOM,
                *(
                    (
                        f"landmarks must be a name, a callable, indices or points, not {type(z).__name__}",
                        given(landmarks=z),
                    )
                    for z in (None, 3, 3.5, {1, 2}, range(3))
                ),
                ("landmarks must be a name, a callable, indices", given(landmarks=lambda x, /, **_: None, rank=3)),
                ("landmarks of shape (2,) are indices and must be integers, not float64", given(landmarks=[0.0, 1.0])),
                ("landmarks of shape (2,) are indices and must be integers, not bool", given(landmarks=[True, False])),
                ("landmarks of shape (2,) are indices and must be integers, not <U1", given(landmarks=["a", "b"])),
                ("landmarks of shape (1,) are indices and must be integers, not object", given(landmarks=[2**70])),
            ],
            "points are not of the library and dtype of ``x``": [
                ("x is a numpy array and landmarks a torch array", given(landmarks=torch.asarray(Z))),
                ("x has dtype float64 and landmarks has dtype float32", given(landmarks=Z.astype(np.float32))),
                ("x has dtype float64 and landmarks has dtype int64", given(landmarks=[[0, 1], [1, 0]])),
            ],
            "``kernel`` is neither callable nor None": NO_KERNELS,
            "returns no array of the library and dtype of its points": NO_BLOCKS,
            "the function that chooses landmarks does not take ``rtol``": [
                ("uniform has no keyword rtol", given(landmarks="uniform", rtol=0.1)),
                ("int has no keyword rtol", given(landmarks=int, rtol=0.1)),
            ],
            'is "rpcholesky" in a traced program': [
                ("outside of a traced program", traced(lambda f, x: f(x, landmarks="rpcholesky", rank=2).factor))
            ],
        },
        ValueError: {
            "``x`` or the landmarks hold NaN or infinite values (the first row of them is named)": [
                ("x (shape (6, 2)) has NaN or infinite values in 1 rows, the first of them row 4", given(BAD)),
                ("landmarks (shape (6, 2)) has NaN or infinite values in 1 rows", given(landmarks=BAD)),
            ],
            "an index, ``rank``, ``rtol`` or ``rng`` is out of range": [
                ("landmarks holds indices from 0 to 6", given(landmarks=[0, 6])),
                ("landmarks holds indices from -1 to -1", given(landmarks=[-1])),
                *refused("rank", 0, -1, 7, 10**30),
                *refused("rtol", *NO_SHARES, landmarks="rpcholesky"),
                *NEGATIVE_RANDOM,
            ],
            "shapes or devices do not fit": [
                ("x must have at least two axes, (..., points, features), not the shape (6,)", given(Y)),
                ("x is the matrix K and must be square, not of shape (6, 2)", given(X, kernel=None)),
                ("landmarks have shape (3, 4); for x of shape (6, 2)", given(landmarks=V)),
                ("landmarks have shape (); for x of shape (6, 2)", given(landmarks=np.asarray(1.0))),
                ("landmarks is a list of 2 rows of different lengths", given(landmarks=[[1, 2], [3]])),
                ("there are 7 landmarks for 6 points", given(landmarks=[0] * 7)),
                ("landmarks (shape (6, 2)) on meta", given(T, landmarks=META)),
            ],
            "``landmarks`` is an unknown name": refused("landmarks", "kmeans", rank=2),
            "empty": [
                ("landmarks is empty", given(landmarks=[])),
                ("landmarks have shape (0, 2)", given(landmarks=X[:0])),
            ],
            "``rank`` is missing where they are chosen": [
                ("rank, the number of landmarks, is needed", given(rank=None)),
                ("rank, the number of landmarks, is needed", given(landmarks="rpcholesky")),
            ],
            "not their number": [
                ("rank is 3 and there are 2 landmarks", given(landmarks=[0, 1], rank=3)),
                ("rank is 1 and there are 2 landmarks", given(landmarks=lambda x, /, **_: [0, 1], rank=1)),
            ],
            "``rtol`` comes with landmarks that are given": [
                ("rtol (0.1) decides how many landmarks are chosen", given(landmarks=[0, 1], rtol=0.1))
            ],
            "they are points or means and ``kernel`` is None": [
                ("landmarks are points (shape (6, 2))", given(K, landmarks=X, kernel=None)),
                ("segment_means averages points", given(K, landmarks="segment_means", rank=2, kernel=None)),
            ],
            "the kernel returns a block of another shape": [
                ("the kernel returned a block of shape (3, 6)", given(kernel=lambda a, b: gaussian_kernel(b, a))),
                *OTHER_BLOCKS,
            ],
            "values that are not finite": [
                ("the kernel returned NaN or infinite values", given(kernel=returning(lambda k: k + math.nan)))
            ],
            "a negative diagonal": [("k(x, x) of row 0 is -1", given(kernel=returning(lambda k: -k)))],
            "a k(z, z) that is not symmetric": [
                ("the kernel is not symmetric: for the landmarks", given(kernel=skewed))
            ],
            "not positive semidefinite": [("has the eigenvalue -", given(kernel=squared_distances))],
        },
    },
    "lowrank.LowRank.__matmul__": {
        TypeError: {
            "``v`` is not an array of the library and dtype of F": [
                *no_arrays("v", given),
                ("factor is a numpy array and v a torch array", given(T)),
                ("factor has dtype float64 and v has dtype float32", given(X.astype(np.float32))),
                ("factor has dtype float64 and v has dtype complex128", given(X + 0j)),
            ]
        },
        ValueError: {
            "``v`` does not have n rows": [
                ("v has shape (3, 2); a matrix of shape (6, 6) needs (6,) or (..., 6, p)", given(Z)),
                ("v has shape (); a matrix", given(np.asarray(1.0))),
            ],
            "leading axes that broadcast with those of F": [
                ("v has shape (3, 6, 2), whose leading axes do not", given(np.stack([X] * 3), of=FB))
            ],
            "is on another device": [("v (shape (6, 2)) on meta", given(META, of=FT))],
        },
    },
    "lowrank.LowRank.solve": {
        TypeError: {
            "``b`` is not an array of the library and dtype of F": [
                ("must be an array, not list", given([1.0] * 6)),
                ("factor is a numpy array and ", given(T)),
                ("has dtype float32 (shapes (6, 3), (6, 2))", given(X.astype(np.float32))),
            ],
            "``ridge`` an array but not of a real floating dtype": [
                ("ridge has dtype int64", given(ridge=np.asarray(1))),
                ("ridge has dtype complex128", given(ridge=np.asarray(1j))),
            ],
        },
        ValueError: {
            "``b`` does not have n rows": [("has shape (3, 2); a matrix of shape (6, 6) needs (6,)", given(Z))],
            "leading axes that broadcast with those of F": [
                ("has shape (3, 6, 2), whose leading axes do not", given(np.stack([X] * 3), of=FB))
            ],
            "is on another device": [("(shape (6, 2)) on meta", given(META, of=FT))],
            "``ridge`` is not positive and finite": [
                *refused("ridge", *NO_POSITIVE, "1", None, 1j, [1.0], np.ones((2, 2)), np.ones((40, 40))),
                ("ridge must be a positive finite number, not array(0.)", given(ridge=np.asarray(0.0))),
                ("rank 1, is singular", given(ridge=0.0, of=nystrom(np.ones((6, 2)), rank=3))),
            ],
            "of another library": [("ridge must be a positive finite number", given(ridge=torch.asarray(1.0)))],
        },
    },
    "lowrank.LowRank.preconditioner": {
        TypeError: {"the function for its argument": [("v must be an array, not list", given([1.0] * 6))]},
        ValueError: {"the function for its argument": [("v has shape (3, 2); a matrix of shape (6, 6)", given(Z))]},
    },
    "lowrank.LowRank.logdet": {
        TypeError: {
            "``ridge`` is an array but not of a real floating dtype": [
                ("ridge has dtype int64", given(ridge=np.asarray(1))),
                ("ridge has dtype complex128", given(ridge=np.asarray(1j))),
            ]
        },
        ValueError: {
            "``ridge`` is not positive and finite": refused("ridge", *NO_POSITIVE, "1", None, np.ones((2, 2))),
            "of another library": [("ridge must be a positive finite number", given(ridge=torch.asarray(1.0)))],
        },
    },
    "lowrank.LowRank.features": {
        TypeError: {
            "``x_new`` or what the kernel returns is not an array of the library and dtype of F": [
                *no_arrays("x_new", given),
                ("factor is a numpy array and x_new a torch array", given(T)),
                ("factor has dtype float64 and x_new has dtype float32", given(X.astype(np.float32))),
                *((text, given(X, of=dataclasses.replace(F, **how.options))) for text, how in NO_BLOCKS),
            ]
        },
        ValueError: {
            "its last axis is not that of the landmarks": [
                ("x_new has shape (6, 1); points have the shape (..., m, 2)", given(X[:, :1])),
                ("x_new has shape (6,); points", given(Y)),
                ("x_new has shape (6, 2); kernel values with the 3 landmarks", given(X, of=FK)),
            ],
            "its leading axes do not broadcast with those of F": [
                ("x_new has shape (3, 6, 2), whose leading axes do not", given(np.stack([X] * 3), of=FB))
            ],
            "it holds NaN or infinite values": [("x_new (shape (6, 2)) has NaN or infinite values", given(BAD))],
            "is on another device": [("x_new (shape (6, 2)) on meta", given(META, of=FT))],
            "the kernel's values are not finite": [
                (
                    "the kernel returned NaN or infinite values",
                    given(X, of=dataclasses.replace(F, kernel=returning(lambda k: k * math.nan))),
                )
            ],
            "not one for each pair": [
                (text, given(X, of=dataclasses.replace(F, **how.options))) for text, how in OTHER_BLOCKS
            ],
        },
    },
    "lowrank.LowRank.truncate": {
        TypeError: {
            "``rank`` is not an int": refused("rank", *(rank for rank in NO_INTS if rank is not None)),
            "F belongs to a traced program and its rank was to be found by ``rtol``": [
                (
                    "a rank found by rtol depends on values",
                    traced(lambda f, x: f(rtol=0.1, of=nystrom(x, rank=2)).factor),
                )
            ],
        },
        ValueError: {
            "neither is given": [("truncate needs rank, rtol or both", given())],
            "``rank`` is below 1": refused("rank", 0, -1),
            "``rtol`` not in [0, 1)": refused("rtol", *NO_SHARES),
        },
    },
    "lowrank.LowRank.certificate": {
        TypeError: {
            "``x`` is not an array of the library and dtype of F": [
                *no_arrays("x", given),
                ("factor is a numpy array and x a torch array", given(T)),
                ("factor has dtype float64 and x has dtype float32", given(X.astype(np.float32))),
            ],
            "belongs to a traced program": [
                ("made of values, which a traced program", traced(lambda f, x: f(x, of=nystrom(x, rank=2)).trace))
            ],
            "``columns`` is not an int": refused("columns", *NO_INTS),
            "``rng`` none of the above": NO_RANDOM,
        },
        ValueError: {
            "``x`` does not have the shape": [
                ("x must be the points that were factored, (6, d); it has shape (3, 2)", given(Z)),
                ("x must be K, (6, 6); it has shape (6, 2)", given(X, of=FK)),
            ],
            "the values of what was factored": [
                ("x (shape (6, 2)) is not what was factored", given(X[::-1].copy(), of=nystrom(X, rank=5, rng=0))),
                ("x (shape (6, 2)) has NaN or infinite values in 1 rows", given(BAD)),
            ],
            "is on another device": [("x (shape (6, 2)) on meta", given(META, of=FT))],
            "F has batch axes": [("the factor has shape (2, 6, 3)", given(np.stack([X, X]), of=FB))],
            "``columns`` is below 20": refused("columns", 19, 0, -3),
            "``rng`` is negative": NEGATIVE_RANDOM,
        },
    },
    "lowrank.LowRank.aslinearoperator": {
        TypeError: {
            "F belongs to a traced program": [
                ("F (shape (6, 2)) belongs to a traced program", traced(lambda f, x: f(of=nystrom(x, rank=2))))
            ]
        },
        ValueError: {"F has batch axes": [("a batch of shape (2, 6, 6)", given(of=FB))]},
    },
    "lowrank.LowRank.save": {
        TypeError: {
            "``path`` is neither a str nor a path": [
                (f"path must be a str or a pathlib.Path, not {type(path).__name__}", given(path))
                for path in (None, 3, b"new", ["new"])
            ],
            "F belongs to a traced program": [
                ("F (shape (6, 2)) belongs to a traced program", traced(lambda f, x: f(of=nystrom(x, rank=2))))
            ],
        },
        IsADirectoryError: {
            "``path`` is a folder": [
                ("path names a folder, 'folder'", given("folder")),
                ("path names a folder, '.'", given("")),
            ]
        },
        FileNotFoundError: {
            "the folder that the file is to be in does not exist": [
                ("path is 'nowhere/new'", given("nowhere/new")),
                ("path is 'a\\x00b'", given("a\0b")),
            ]
        },
        OSError: {
            "the system does not let it be written, as with too long a name": [("File name too long", given("a" * 300))]
        },
        ImportError: {
            "the package ``safetensors`` is not installed": [
                ("safetensors, which is not installed: pip install", missing("safetensors", "safetensors.numpy"))
            ]
        },
    },
    "lowrank.LowRank.load": {
        TypeError: {
            "``path`` is neither a str nor a path": [
                (f"path must be a str or a pathlib.Path, not {type(path).__name__}", given(path))
                for path in (None, 3, b"saved", ["saved"])
            ],
            "``like`` is not an array of floating dtype": [
                *no_arrays("like", lambda like: given(like=like))[:3],
                *no_floats("like", lambda like: given(like=like)),
            ],
            "``kernel`` is neither callable nor None": NO_KERNELS,
            "returns no array of the library and dtype of its points": NO_BLOCKS,
        },
        FileNotFoundError: {
            "there is no such file": [
                ("there is no file nowhere", given("nowhere")),
                ("there is no file .", given(Path())),
            ]
        },
        ValueError: {
            "it is not a whole file of a factorisation": [
                ("junk is not a safetensors file", given("junk")),
                ("half is not a safetensors file, or is truncated", given("half")),
                ("other is a safetensors file of something else; it holds ['factor']", given("other")),
                ("changed is damaged: its SHA-256", given("changed")),
                ("format holds {'format': 'another'}, not a factorisation", given("format")),
                ("part is no whole factorisation: it holds ['factor']", given("part")),
            ],
            "``kernel`` is not the one that it was made with": [
                ("saved was made from points, with a kernel: name it", given(kernel=None)),
                ("matrix was made from K itself: give kernel=None", given("matrix")),
                ("k(z, z) of its landmarks is off by", given(kernel=lowrank.laplacian_kernel)),
            ],
        },
        ImportError: {
            "the package ``safetensors`` is not installed": [
                (
                    "safetensors, which is not installed: pip install",
                    lambda f: missing("safetensors", "safetensors.numpy")(
                        lambda: lowrank.LowRank.load("a", kernel=None)
                    ),
                )
            ]
        },
    },
    "lowrank.Certificate.cg_bound": {
        ValueError: {
            "``ridge`` is not positive and finite": refused("ridge", *NO_POSITIVE, *NO_NUMBERS, torch.ones(2)),
            "``tol`` not in (0, 1)": refused("tol", 0.0, 1.0, -1, math.nan, 10**400, *NO_NUMBERS, torch.ones(2)),
        }
    },
    "lowrank.kernel_ridge": {
        TypeError: {
            "``x`` and ``y`` are not arrays": [
                *no_arrays("x", lambda x: given(x, Y)),
                *no_arrays("y", lambda y: given(X, y)),
            ],
            "of one library": [("x is a numpy array and y a torch array", given(X, T))],
            "of one dtype, float32 or float64": [
                ("x has dtype float64 and y has dtype float32", given(X, Y.astype(np.float32))),
                ("x has dtype float16", given(X.astype(np.float16), Y.astype(np.float16))),
                ("x has dtype complex128", given(X + 0j, Y + 0j)),
            ],
            "carry derivatives": [
                ("x carries derivatives", lambda f: f(T.clone().requires_grad_(), torch.asarray(Y))),
                ("y carries derivatives", lambda f: f(T, torch.asarray(Y).requires_grad_())),
            ],
            "belong to a traced program": [
                ("x carries derivatives or belongs to a traced program", traced(lambda f, x: f(x, x[:, 0]).residual))
            ],
            "``kernel`` is not callable": [*NO_KERNELS, *refused("kernel", None)],
            "returns no array of the library and dtype of its points": NO_BLOCKS,
            "has parameters that carry derivatives": [
                (
                    "the kernel's parameters carry derivatives",
                    lambda f: f(
                        T,
                        torch.asarray(Y),
                        landmarks=[0, 1],
                        kernel=functools.partial(gaussian_kernel, lengthscale=torch.ones(2).double().requires_grad_()),
                    ),
                )
            ],
            "``progress`` is neither True nor False": refused("progress", *NO_FLAGS),
        },
        ValueError: {
            "shapes or devices do not fit": [
                ("x has shape (6, 2) and y (3, 4)", given(X, V)),
                ("x has shape (6,) and y (6,)", given(Y, Y)),
                ("x has shape (0, 2) and y (0,)", given(X[:0], Y[:0])),
                ("x has shape (6, 2) and y (6, 1, 1)", given(X, Y[:, None, None])),
                ("the factor has the shape (2, 6, 3); give one set", given(landmarks=np.stack([Z, Z]))),
                ("y (shape (6, 2)) on meta", given(T, META)),
            ],
            "values are NaN or infinite": [
                ("x (shape (6, 2)) has NaN or infinite values in 1 rows", given(BAD, Y)),
                ("y (shape (6,)) has NaN or infinite values", given(X, BAD[:, 0])),
            ],
            "``ridge`` or ``tol`` is out of range": [
                *refused("ridge", *NO_POSITIVE, *NO_NUMBERS),
                *refused("tol", 0.0, 1.0, -1, math.nan, 10**400, "1", 1j, np.ones((2, 2))),
            ],
            "the ridge is too small for the tolerance and the precision": [
                ("ridge=1e-20 is out of the reach of rounding", given(ridge=1e-20))
            ],
            "the kernel turns out not to be positive semidefinite": [
                (
                    "the kernel is not symmetric positive semidefinite",
                    given(
                        landmarks=[0],
                        ridge=1e-3,
                        kernel=lambda a, b: gaussian_kernel(a, b) - 0.5 * (len(a) * len(b) > 6),
                    ),
                )
            ],
        },
        ImportError: {
            "``progress`` is asked for and tqdm is not installed": [
                ("progress=True draws by tqdm, which is not installed", missing("tqdm", progress=True))
            ]
        },
        RuntimeWarning: {
            "a column does not get to ``tol``: rounding is in the way": [
                ("1 of 1 columns of y did not reach the relative residual 1e-06", lambda f: too_fine(f))
            ]
        },
    },
    "lowrank.KernelRidge.predict": {
        TypeError: {
            "``x_new`` is not an array of the library and dtype of ``x``": [
                *no_arrays("x_new", lambda x: given(new=x)),
                ("x is a numpy array and x_new a torch array", given(new=T)),
                ("x has dtype float64 and x_new has dtype float32", given(new=X.astype(np.float32))),
            ]
        },
        ValueError: {
            "it does not have two axes and d features": [
                ("x_new has shape (6, 1)", given(new=X[:, :1])),
                ("x_new has shape (6,)", given(new=Y)),
                ("x_new has shape (1, 6, 2)", given(new=X[None])),
            ],
            "is on another device": [("x_new (shape (6, 2)) on meta", given(T, torch.asarray(Y), new=META))],
        },
    },
    "lowrank.newton_schedule": {
        TypeError: {
            "``definite`` is neither True nor False": [
                ("definite must be True or False, not ", given(definite=flag)) for flag in NO_FLAGS
            ]
        },
        ValueError: {
            "``condition`` is no number from 1 to 1e100": [
                (("condition must be a number from 1 to 1e+100, not", text), given(value))
                for value, text in (
                    (0.5, "0.5"),
                    (-3, "-3"),
                    (math.nan, "nan"),
                    (math.inf, "inf"),
                    (10**400, "1000000"),
                    ("10", "'10'"),
                    (None, "NoneType"),
                    (1j, "complex"),
                    (np.ones((2, 2)), "ndarray"),
                )
            ],
            "``tolerance`` none from 1e-15 to 1": [
                (("tolerance must be a number from 1e-15 to 1, not", text), given(tolerance=value))
                for value, text in ((1.0, "1.0"), (0.0, "0.0"), (math.nan, "nan"), ("1", "'1'"), ([1.0], "list"))
            ],
        },
    },
    "lowrank.pinv_newton": {
        TypeError: {
            "``a`` is not an array of floating dtype": [*no_arrays("a", given), *no_floats("a", given)],
            "``alpha`` is neither a number nor a real floating array of its library": [
                *(
                    (("alpha must be an array, not", type(v).__name__), given(alpha=v, steps=1))
                    for v in ("1", 1j, [1.0])
                ),
                ("alpha has dtype int64", given(alpha=np.asarray(1), steps=1)),
                ("alpha has dtype complex128", given(alpha=np.complex128(1), steps=1)),
                ("alpha is a torch array", given(alpha=torch.asarray(1.0), steps=1)),
            ],
            "``hermitian`` or ``return_info`` is neither True nor False": [
                *refused("hermitian", *NO_FLAGS),
                *refused("return_info", *NO_FLAGS),
            ],
        },
        ValueError: {
            "``a`` has fewer than two axes": [("a must have shape (..., m, n), not (6,)", given(Y))],
            "is not square where ``hermitian`` says so": [("a has shape (6, 2)", given(X, hermitian=True))],
            "an option is out of range": [
                *refused("rtol", *NO_SHARES),
                *refused("ridge", -1.0, math.nan, math.inf, 10**400, *NO_NUMBERS, hermitian=True),
                *refused("upper", *NO_POSITIVE, "1", 1j, np.complex128(1), hermitian=True, ridge=0.1),
                *refused("tol", 0.0, 1.0, math.nan, "1", np.ones((2, 2)), hermitian=True, ridge=0.1, upper=6.0),
                *refused("steps", -1, 2.5, True, "2", np.ones((2, 2))),
                *refused("method", "svd", None, np.ones((2, 2))),
                *refused("alpha", math.nan, math.inf, 10**400, steps=1),
                (
                    "alpha has shape (3,), which does not broadcast to the batch (2,)",
                    given(np.stack([K, K]), alpha=np.ones(3), steps=1),
                ),
            ],
            "contradicts another": [
                ("ridge=0.1 declares a positive semidefinite; pass hermitian=True", given(ridge=0.1)),
                ("rtol=0.1 has no meaning with steps", given(rtol=0.1, steps=2)),
                ("rtol=0.1 has no meaning with ridge > 0", given(rtol=0.1, ridge=0.1, hermitian=True)),
                ("alpha=0.1 scales the start of the textbook iteration; pass steps", given(alpha=0.1)),
                ("steps belongs to method='newton' (steps=2)", given(steps=2, method="direct")),
                ("upper=1.0 belongs to method='newton' with ridge > 0", given(upper=1.0)),
                ("tol=0.1 needs upper", given(tol=0.1, ridge=0.1, hermitian=True)),
            ],
        },
        RuntimeWarning: {
            "``a`` carries derivatives (torch) and a singular value lies at the cutoff: the rank is undecided": [
                (
                    "a singular value lies at the cutoff of pinv_newton",
                    lambda f: f(torch.diag(torch.tensor([1.0, 0.5, 1e-3]).double()).requires_grad_(), rtol=1e-3),
                )
            ]
        },
    },
    "lowrank.softmax_free_attention": {
        TypeError: {
            "the arguments are not arrays": [
                *no_arrays("q", lambda q: given(q, X, Z)),
                *no_arrays("v", lambda v: given(X, v, Z)),
                *(bad for bad in no_arrays("landmarks", lambda z: given(X, X, z)) if "not int" not in bad[0]),
                *(("landmarks must be an array", given(X, X, z)) for z in (3.0, True)),
                *no_arrays("queries", lambda q: given(queries=q))[:3],
            ],
            "of one library": [("q is a numpy array and landmarks a torch array", given(X, X, torch.asarray(Z)))],
            "one real floating dtype": [
                ("q has dtype float64 and v has dtype float32", given(X, X.astype(np.float32), Z)),
                *no_floats("q", lambda q: given(q, X, Z)),
                ("q has dtype complex128", given(X + 0j, X + 0j, Z + 0j)),
            ],
            "a mask is not a bool array of that library": [
                (("mask must be a bool array of the library of q", kind), given(mask=mask))
                for mask, kind in (
                    ([True] * 6, "list"),
                    (Y, "float64"),
                    (torch.ones(6).bool(), "bool"),
                    (np.ndarray, ""),
                )
            ]
            + [("landmark_mask must be a bool array of the library of landmarks", given(landmark_mask=V[:, 0]))],
            f"{A_LENGTHSCALE} it": LENGTHSCALES[:1] + LENGTHSCALES[2:],
            "``normalize`` is neither True nor False": refused("normalize", *NO_FLAGS),
            "``inverse`` is not callable": refused("inverse", 3, "newton", np.ones((2, 2))),
            "returns no array of the library and dtype of its argument": [
                ("what inverse returned must be an array, not tuple", given(inverse=lambda a, **_: (a, a))),
                ("what inverse returned must be an array, not NoneType", given(inverse=lambda a, **_: None)),
                ("what inverse returned has dtype float32", given(inverse=lambda a, **_: a.astype(np.float32))),
                ("what inverse returned a torch array", given(inverse=lambda a, **_: torch.asarray(a))),
            ],
        },
        ValueError: {
            "their shapes do not fit": [
                ("q must have at least two axes, tokens and features, not the shape (6,)", given(Y, X, Z)),
                ("q has shape (6, 2) and landmarks (3, 4)", given(X, X, V)),
                ("q has shape (6, 2) and queries (3, 4)", given(queries=V)),
                ("q has shape (6, 2) and v (3, 4)", given(X, V, Z)),
                ("q (2, 6, 2), v (6, 2), landmarks (3, 3, 2)", given(np.stack([X] * 2), X, np.stack([Z] * 3))),
                ("mask has shape (3,) and q (6, 2)", given(mask=np.ones(3, bool))),
                ("landmark_mask has shape (3, 3) and landmarks (3, 2)", given(landmark_mask=np.ones((3, 3), bool))),
                *LENGTHSCALE_SHAPES,
            ],
            "they are on different devices": [
                ("landmarks (shape (6, 2)) on meta", given(T, T, META)),
                ("mask is on device meta and q on cpu", given(T, T, T, mask=torch.ones(6, dtype=bool, device="meta"))),
            ],
            "``landmarks`` is an int below 1": [
                (("landmarks must be at least 1", f"not {k}"), given(X, X, k)) for k in (0, -1)
            ],
            "an int beside a mask": [
                ("landmarks=2 are means over all tokens", given(X, X, 2, mask=np.ones(6, bool))),
                ("which landmark_mask makes a question", given(X, X, 2, landmark_mask=np.ones(2, bool))),
            ],
            "``lengthscale`` is not positive and finite": BAD_LENGTHSCALES,
            "``ridge`` is negative": refused("ridge", -0.1, -math.inf),
            "not finite": refused("ridge", math.nan, math.inf, 10**400, *NO_NUMBERS),
            "``method`` is neither of the two": refused("method", "lu", 3, np.ones(2)),
            'is "direct" beside an ``inverse``': [
                ("method='direct' has no meaning with inverse", given(method="direct", inverse=lambda a, **_: a))
            ],
            "that returns an array of another shape": [
                ("inverse returned the shape (2, 3) for matrices of shape (3, 3)", given(inverse=lambda a, **_: a[:2]))
            ],
        },
    },
    "lowrank.dask.nystrom": {
        TypeError: {
            "``x`` is not a Dask array of float32 or float64": [
                *(
                    (f"x must be a Dask array, not {type(x).__name__}", given(x))
                    for x in ([[1.0]], X, T, 3, "x", scipy.sparse.csr_array(X))
                ),
                *((f"x has dtype {np.dtype(t)}", given(lazy(X.astype(t)))) for t in (int, np.float16, complex)),
            ],
            "an argument is of another type": [
                *refused("rank", *(rank for rank in NO_INTS if rank is not None)),
                *NO_RANDOM,
                *NO_KERNELS,
                *(
                    (
                        f"landmarks must be a name, a callable, indices or points, not {type(z).__name__}",
                        given(landmarks=z),
                    )
                    for z in (None, 3, {1, 2})
                ),
                ("landmarks of shape (2,) are indices and must be integers, not float64", given(landmarks=[0.0, 1.0])),
                ("x has dtype float64 and landmarks has dtype float32", given(landmarks=Z.astype(np.float32))),
            ],
            "the kernel returns no array of the library and dtype of its points": NO_BLOCKS,
        },
        ValueError: {
            "``x`` does not have two axes and one row": [
                ("x must have two axes, (points, features), not the shape (6,)", given(lazy(Y))),
                ("x has no rows (shape (0, 2))", given(lazy(X)[:0])),
            ],
            "chunk sizes are unknown": [("x has chunks of unknown size", lambda f: f(lazy(X)[lazy(Y) > 0]))],
            "``x`` is chunked along the features": [
                ("x has 2 chunks along its second axis", given(da.ones((6, 2), chunks=1)))
            ],
            "an index, the rank or ``rng`` is out of range": [
                ("landmarks holds indices from 0 to 6", given(landmarks=[0, 6])),
                *refused("rank", 0, -1, 7, 10**30),
                *NEGATIVE_RANDOM,
            ],
            "shapes do not fit": [
                ("landmarks have shape (3, 4); for x of shape (6, 2)", given(landmarks=V)),
                ("landmarks is a list of 2 rows of different lengths", given(landmarks=[[1, 2], [3]])),
                ("there are 7 landmarks for 6 points", given(landmarks=[0] * 7)),
            ],
            "``landmarks`` is an unknown name": refused("landmarks", "kmeans", "segment_means", rank=2),
            "empty": [("landmarks is empty", given(landmarks=[]))],
            "``rank`` is missing where they are chosen": [
                ("rank, the number of landmarks, is needed", given(rank=None))
            ],
            "not their number": [("rank is 3 and there are 2 landmarks", given(landmarks=[0, 1], rank=3))],
            "``kernel`` is None": [("kernel is None, and a Dask array holds points", given(kernel=None))],
            "the kernel returns a block of another shape": OTHER_BLOCKS,
            "values that are not finite": [
                ("the kernel returned NaN or infinite values", given(kernel=returning(lambda k: k + math.nan)))
            ],
            "a negative diagonal": [
                (
                    "the kernel has a negative diagonal, k(x, x) = -1",
                    given(landmarks=Z, kernel=lambda a, b: gaussian_kernel(a, b) * (-1 if a.ndim > 2 else 1)),
                )
            ],
            "a k(z, z) that is not symmetric": [
                ("the kernel is not symmetric: for the landmarks", given(kernel=skewed))
            ],
            "not positive semidefinite": [("has the eigenvalue -", given(kernel=squared_distances))],
            "While chunks are being computed: if one holds NaN or infinite values, naming its first such row by its "
            "number in ``x``": [("row 4 of x holds NaN or infinite values", given(lazy(BAD), landmarks=Z))],
        },
    },
    "lowrank.dask.ridge": {
        TypeError: {
            "``y`` is not a Dask array of the dtype and library of ``x``": [
                ("y must be a Dask array, not ndarray", given(lazy(X), Y)),
                ("y must be a Dask array, not list", given(lazy(X), [1.0] * 6)),
                ("x has dtype float64 and y has dtype float32", given(lazy(X), lazy(Y.astype(np.float32)))),
                ("x is a numpy array and y a jax", lambda f: f(lazy(X), of_jax(Y))),
            ]
        },
        ValueError: {
            "``y`` does not have n rows": [
                ("y has shape (3, 4); for x of shape (6, 2)", given(lazy(X), lazy(V))),
                ("y has shape (); for x of shape (6, 2)", given(lazy(X), da.ones(()))),
            ],
            "is of unknown chunk sizes": [
                ("y has chunks of unknown size", lambda f: f(lazy(X), lazy(Y)[lazy(Y) > -9]))
            ],
            "``ridge`` is no finite number": refused("ridge", math.nan, math.inf, 10**400, *NO_NUMBERS, True),
            "negative": refused("ridge", -1.0),
            "a row of ``y`` holds NaN or infinite values, naming the first one": [
                ("row 4 of y holds NaN or infinite values", given(lazy(X), lazy(BAD[:, 0])))
            ],
            "FᵀF + ridge·I is singular in float64, naming the rank of F": [
                ("F has 3 columns, the rank 1", given(lazy(np.ones((6, 2))), lazy(Y), ridge=0.0))
            ],
        },
    },
    "lowrank.dask.rpcholesky": {
        TypeError: {
            "``x`` is not a Dask array of float32 or float64": [
                ("x must be a Dask array, not ndarray", given(X)),
                ("x has dtype int64", given(lazy(X.astype(int)))),
            ],
            "an argument is of another type": [*refused("rank", *NO_INTS), *NO_RANDOM, *NO_KERNELS],
            "the kernel returns no array of the library and dtype of its points": NO_BLOCKS,
        },
        ValueError: {
            "``x`` does not have two axes and one row": [
                ("x must have two axes, (points, features), not the shape (6,)", given(lazy(Y))),
                ("x has no rows (shape (0, 2))", given(lazy(X)[:0])),
            ],
            "chunk sizes are unknown": [("x has chunks of unknown size", lambda f: f(lazy(X)[lazy(Y) > 0]))],
            "``x`` is chunked along the features": [
                ("x has 2 chunks along its second axis", given(da.ones((6, 2), chunks=1)))
            ],
            "``rank``, ``rtol`` or ``rng`` is out of range": [
                *refused("rank", 0, -1, 7, 10**30),
                *refused("rtol", *NO_SHARES, True),
                *NEGATIVE_RANDOM,
            ],
            "a row holds NaN or infinite values, naming the first one": [("row 4 of x holds NaN", given(lazy(BAD)))],
            "``kernel`` is None": [("kernel is None, and a Dask array holds points", given(kernel=None))],
            "the kernel returns a block of another shape": OTHER_BLOCKS,
            "values that are not finite": [
                ("the kernel returned NaN or infinite values", given(kernel=returning(lambda k: k + math.nan)))
            ],
            "a negative diagonal": [
                ("the kernel has a negative diagonal, k(x, x) = -1", given(kernel=returning(lambda k: -k)))
            ],
        },
    },
    "lowrank.dask.ChunkedLowRank.features": {
        TypeError: {
            "``x_new`` is not an array": [row for row in no_arrays("x_new", given) if "Dask" not in row[0]],
            "not of the dtype of the landmarks": [
                ("x_new has dtype float32 and the landmarks have float64", given(X.astype(np.float32))),
                ("x_new has dtype float32 and the landmarks have float64", given(lazy(X.astype(np.float32)))),
                ("x_new has dtype int64", given(X.astype(int))),
            ],
        },
        ValueError: {
            "it does not have two axes and their features": [
                ("x_new has shape (6, 1); the landmarks need (n_new, 2)", given(X[:, :1])),
                ("x_new has shape (6, 1); the landmarks need (n_new, 2)", given(lazy(X[:, :1]))),
                ("x_new has shape (6,)", given(Y)),
            ],
            "is a Dask array of no rows": [("x_new has no rows (shape (0, 2))", given(lazy(X)[:0]))],
            "of unknown chunk sizes": [("x_new has chunks of unknown size", lambda f: f(lazy(X)[lazy(Y) > 0]))],
            "chunked along the features": [
                ("x_new has 2 chunks along its second axis", given(da.ones((6, 2), chunks=1)))
            ],
            "While chunks are being computed: if one holds NaN or infinite values, naming its first such row by its "
            "number": [
                ("row 4 of x_new holds NaN or infinite values", given(BAD)),
                ("row 4 of x_new holds NaN or infinite values", given(lazy(BAD))),
            ],
        },
    },
    "lowrank.dask.RidgeFit.predict": {},
    "lowrank.nn.SoftmaxFreeAttention": {
        TypeError: {
            "``dim``, ``num_heads``, ``spatial_dims``, ``stride`` or ``value_kernel`` is not an int": [
                row
                for name in ("dim", "num_heads", "spatial_dims", "stride", "value_kernel")
                for row in refused(name, *(v for v in NO_INTS if v is not None))
            ],
            "``normalize`` is neither True nor False": refused("normalize", *NO_FLAGS),
            "``inverse`` is not callable": refused("inverse", 3, "newton"),
        },
        ValueError: {
            "``num_heads`` does not divide ``dim``": refused("num_heads", 3, 10**30),
            "``spatial_dims`` is neither 1 nor 2": refused("spatial_dims", 0, 3),
            "neither ``stride`` nor ``grid`` is given": [("neither is given", given(grid=None))],
            "a size is not positive": [
                ("with dim=-4", given(dim=-4)),
                *refused("num_heads", 0, -2),
                *refused("stride", 0, -1),
                *refused("grid", 0, (2, 0)),
                *refused("value_kernel", 0, -3),
            ],
            "``grid`` has another number of axes": refused("grid", (2, 2, 2), ()),
            "is not of ints": refused("grid", 2.0, (2, 2.0), "22", {2}, np.ones((2, 2))),
            "``value_kernel`` is even": refused("value_kernel", 4),
            "``ridge`` is negative": refused("ridge", -0.1),
            "not finite": refused("ridge", math.nan, math.inf, 10**400, *NO_NUMBERS),
            '``method`` is neither "newton" nor "direct"': refused("method", "lu", 3),
            'is "direct" beside an ``inverse``': [
                ("method='direct' has no meaning with inverse", given(method="direct", inverse=lambda a, **_: a))
            ],
        },
    },
    "lowrank.nn.SoftmaxFreeAttention.forward": {
        TypeError: {
            "``x`` or ``queries`` is no tensor of floating dtype": [
                ("x must be a tensor of floating dtype, not ndarray", given(TOKENS.numpy())),
                ("x must be a tensor of floating dtype, not list", given([[[1.0] * 4] * 12])),
                ("x must be a tensor of floating dtype, not torch.int64", given(TOKENS.long())),
                ("x is a sparse tensor", given(TOKENS.to_sparse())),
                ("x (shape (2, 12, 4)) is on the device meta", given(TOKENS.to("meta"))),
                ("queries must be a tensor of floating dtype, not ndarray", given(queries=TOKENS.numpy())),
                ("queries must be a tensor of floating dtype, not int", given(queries=3)),
                ("queries must be a tensor of floating dtype, not torch.complex64", given(queries=TOKENS + 0j)),
                ("queries is a sparse tensor", given(queries=TOKENS.to_sparse())),
            ],
            "not of the layer's dtype outside of autocast": [
                ("x has dtype torch.float64 and the layer torch.float32", given(TOKENS.double())),
                ("x has dtype torch.float32 and queries torch.float16", given(queries=TOKENS.half())),
            ],
            "``mask`` is none of bool": [
                ("not of dtype torch.float32", given(mask=torch.ones(2, 12))),
                ("not of type list", given(mask=[[True] * 12] * 2)),
            ],
        },
        ValueError: {
            "``size`` is not of ints": [
                (("size must be (H, W) of an image", named(size)), given(TOKENS, size))
                for size in ((3.0, 4.0), ("3", "4"), (None, 4), "34", ([3], [4]), (3j, 4), {3, 4})
            ],
            "shapes, ``size`` and devices do not fit": [
                ("x must have shape (B, N, 4), not (12, 4)", given(TOKENS[0])),
                ("x has 12 tokens (shape (2, 12, 4)), not the 3 × 5 of size", given(TOKENS, (3, 5))),
                ("size must be (H, W) of an image of N = H·W tokens, not 12", given(TOKENS, 12)),
                ("size must be (H, W) of an image of N = H·W tokens, not None", given(TOKENS, None)),
                (
                    "size must be N or (N,) of a sequence, not an array of shape (2,)",
                    lambda f: f(TOKENS, torch.ones(2), of=layer(spatial_dims=1)),
                ),
                ("mask must have the shape (B, N) = (2, 12)", given(mask=torch.ones(2, 11).bool())),
                ("pairwise masks are impossible here", given(mask=torch.ones(12, 12).bool())),
                ("queries must have shape (2, N', 4), not (1, 12, 4)", given(queries=TOKENS[:1])),
                ("x is on device cpu and queries on meta", given(queries=TOKENS.to("meta"))),
                ("x is on device cpu and mask on meta", given(mask=torch.ones(2, 12, dtype=bool, device="meta"))),
            ],
            "the size has no room for a landmark cell": [
                ("size 3 × 4 has no room for one landmark cell of stride 4", lambda f: f(of=layer(stride=4))),
                ("size -3 × -4 has no room", given(TOKENS, (-3, -4))),
            ],
            "``queries`` meet a layer with a value convolution (they are no image)": [
                ("queries cannot be combined with value_kernel", lambda f: f(queries=TOKENS, of=layer(value_kernel=3)))
            ],
            "float16 overflows (see the class)": [
                ("batch element 0 overflow float16, which ends at 65504", lambda f: f(TOKENS.half(), of=overflowing()))
            ],
            "an element has tokens, but no whole cell of the strided convolution": [
                (
                    "batch element 0 has tokens under the mask, but not one whole landmark cell of 2",
                    lambda f: f(mask=torch.arange(12).expand(2, 12) < 4, of=layer(stride=2)),
                )
            ],
        },
    },
    "lowrank.nn.SoftmaxFreeAttention.landmark_attention": {
        TypeError: {
            "``x`` is no tensor of floating dtype": [
                ("x must be a tensor of floating dtype, not ndarray", given(TOKENS.numpy())),
                ("x must be a tensor of floating dtype, not torch.int64", given(TOKENS.long())),
            ],
            "not of the layer's dtype outside of autocast": [
                ("x has dtype torch.float64 and the layer torch.float32", given(TOKENS.double()))
            ],
        },
        ValueError: {
            "``size`` is not of ints": [("size must be (H, W) of an image", given(TOKENS, (3.0, 4.0)))],
            "shapes and ``size`` do not fit": [
                ("x must have shape (B, N, 4), not (12, 4)", given(TOKENS[0])),
                ("x has 12 tokens (shape (2, 12, 4)), not the 3 × 5 of size", given(TOKENS, (3, 5))),
            ],
            "the size has no room for a landmark cell": [("size -3 × -4 has no room", given(TOKENS, (-3, -4)))],
        },
    },
    "lowrank.nn.gaussian_attention": {
        TypeError: {
            "``q`` and ``v`` are not tensors": [
                (("q and v must be tensors of one floating dtype, not", kind), given(q, v))
                for q, v, kind in (
                    (X, T, "ndarray"),
                    (T, X, "ndarray"),
                    ([1.0], T, "list"),
                    (None, None, "NoneType"),
                )
            ]
            + [
                ("q is a sparse tensor", given(T.to_sparse(), T)),
                ("q (shape (6, 2)) is on the device meta", given(META, META)),
            ],
            "of one floating dtype": [
                (("q and v must be tensors of one floating dtype, not", kind), given(q, v))
                for q, v, kind in (
                    (T, T.float(), "torch.float32"),
                    (T.long(), T.long(), "torch.int64"),
                    (T + 0j, T + 0j, "torch.complex128"),
                )
            ],
        },
        ValueError: {
            "``q`` and ``v`` have fewer than two axes": [("not (2,) and (2,)", given(T[0], T[0]))],
            "differ in leading axes or tokens": [
                ("not (6, 2) and (3, 2)", given(T, T[:3])),
                ("not (1, 6, 2) and (6, 2)", given(T[None], T)),
            ],
            "are on different devices": [("v (shape (6, 2)) on meta", given(T, META))],
            "``lengthscale`` is no positive, finite number": refused(
                "lengthscale", *NO_POSITIVE, "1", 1j, [1.0], torch.ones(2)
            ),
        },
    },
    "lowrank.sklearn.Nystroem.fit": {
        InvalidParameterError: {
            "A ValueError of scikit-learn's: if a parameter of the class is of another type or out of range": [
                ((f"The '{name}' parameter of Nystroem", repr(value)), given(**{name: value}))
                for name, values in {
                    "kernel": ("gaussian", None, 3),
                    "gamma": (-1.0, "a", math.nan, 1j),
                    "coef0": ("a", math.inf),
                    "degree": (0.5, "a"),
                    "kernel_params": ([], 3),
                    "n_components": (0, -1, 2.5, "3", None),
                    "random_state": (-1, "seed", 1.5),
                    "n_jobs": (1.5, "a"),
                    "landmarks": (None, 3, "kmeans"),
                    "rtol": (-0.1, 1.0, "a"),
                }.items()
                for value in values
            ]
        },
        ValueError: {
            "X is not a matrix of real numbers": [
                ("Expected 2D array, got 1D array", given(Y)),
                ("Found array with dim 3", given(X[None])),
                ("Complex data not supported", given(X + 0j)),
                ("arrays of bytes/strings", given(np.full((6, 2), "a"))),
                ("Expected 2D array, got scalar array", given(None)),
            ],
            "has no rows": [("Found array with 0 sample(s) (shape=(0, 2))", given(X[:0]))],
            "has NaN or infinite values": [
                ("Input X contains NaN", given(BAD)),
                ("Input X contains infinity", given(np.where(np.isnan(BAD), math.inf, BAD))),
            ],
            "is not square where it is the kernel matrix": [
                ("must be square, not (6, 2)", given(kernel="precomputed"))
            ],
            "the kernel returns NaN or infinite values": [
                ("the kernel returned NaN or infinite values", given(kernel=lambda a, b: math.nan))
            ],
            "is not symmetric": [
                ("the kernel is not symmetric", given(K + np.triu(K), kernel="precomputed")),
            ],
            "landmarks are neither indices nor points": [
                (("landmarks must be indices (k,) or points", f"shape {shape}"), given(landmarks=z))
                for z, shape in (({1, 2}, ()), (np.asarray(1), ()), (X[None], (1, 6, 2)), (lambda x, /, **_: None, ()))
            ]
            + [("landmarks of shape (2,) and dtype float64 are neither", given(landmarks=[0.5, 1.0]))],
            "are empty": [
                ("there are no landmarks", given(landmarks=[])),
                ("there are no landmarks", given(landmarks=X[:0])),
            ],
            "do not fit X": [
                ("landmarks are rows 0 to 6 and X has the rows 0 to 5", given(landmarks=[0, 6])),
                ("landmarks have 4 features and X (shape (6, 2)) has 2", given(landmarks=V)),
                ("Input landmarks contains NaN", given(landmarks=BAD)),
                ("landmarks of shape (6, 6) must be indices", given(K, kernel="precomputed", landmarks=K)),
            ],
            "are to be means of a sparse X": [
                (
                    "landmarks='segment_means' averages dense points and X is sparse (shape (6, 2))",
                    given(scipy.sparse.csr_array(X), landmarks="segment_means"),
                )
            ],
            '``rtol`` comes with another rule than ``"rpcholesky"``': [
                ("rtol=0.1 is reached by landmarks='rpcholesky'", given(rtol=0.1))
            ],
            "gamma, coef0 or degree with a kernel that does not take them": [
                ("got {'gamma': 1.0}", given(K, kernel="precomputed", gamma=1.0)),
                ("got {'degree': 2}", given(kernel=lambda a, b: 1.0, degree=2)),
            ],
        },
        UserWarning: {
            "n_components is more than there are samples": [
                ("n_components=50 is more than the 6 samples there are", given(n_components=50))
            ]
        },
    },
    "lowrank.sklearn.Nystroem.transform": {
        NotFittedError: {"``fit`` has not been called": [("instance is not fitted yet", given(fitted=False))]},
        ValueError: {
            "X is not a matrix of real numbers": [
                ("Expected 2D array, got 1D array", given(Y)),
                ("Complex data not supported", given(X + 0j)),
                ("arrays of bytes/strings", given(np.full((6, 2), "a"))),
            ],
            "has no rows": [("Found array with 0 sample(s) (shape=(0, 2))", given(X[:0]))],
            "has NaN or infinite values": [("Input X contains NaN", given(BAD))],
            "other features than the data that were fitted": [("X has 1 features, but Nystroem", given(X[:, :1]))],
            "where arrays are dispatched on, another library or device": [
                ("must use the same namespace and device as fit()", given(elsewhere=True))
            ],
            "the kernel returns NaN or infinite values": [
                (
                    "the kernel returned NaN or infinite values",
                    given(10 * X, kernel=lambda a, b: 1.0 if abs(a[0] - b[0]) < 5 else math.nan, landmarks=[0]),
                )
            ],
        },
    },
    "lowrank.sklearn.NystroemRidge.fit": {
        ValueError: {
            "y does not have a row of finite numbers for each sample": [
                ("inconsistent numbers of samples: [6, 3]", given(X, Y[:3])),
                ("Input y contains NaN", given(X, BAD[:, 0])),
                ("requires y to be passed", given(X, None)),
                ("Found array with dim 3", given(X, X[:, :, None])),
                ("could not convert string to float", given(X, ["a"] * 6)),
            ],
            "sample_weight does not have one for each": [
                ("sample_weight.shape == (3,), expected (6,)", given(X, Y, np.ones(3))),
                ("Sample weights must be 1D array or scalar", given(X, Y, X)),
            ],
            "a negative one": [("Negative values in data passed to `sample_weight`", given(X, Y, -np.ones(6)))],
            "one that is not finite": [
                ("Input sample_weight contains NaN", given(X, Y, np.full(6, math.nan))),
                ("sample_weight must be finite, not nan", given(X, Y, math.nan)),
                ("sample_weight must be finite, not inf", given(X, Y, math.inf)),
            ],
            "α is too small for the features to determine c: the message names their rank": [
                (
                    "alpha=0.0 leaves the coefficients undetermined: of 3 features the data have rank 1",
                    given(np.ones((6, 2)), alpha=0.0),
                )
            ],
        }
    },
    "lowrank.sklearn.NystroemRidge.partial_fit": {
        ValueError: {
            "X has other features": [("X has 1 features, but NystroemRidge", given(X[:, :1], after=True))],
            "y other targets, than the first chunk": [
                ("y has shape (6, 2); in the first chunk", given(X, X, after=True))
            ],
        }
    },
    "lowrank.sklearn.NystroemRidge.predict": {
        ValueError: {
            "``return_std`` is asked of a precomputed kernel, whose k(x, x) at new points is not known": [
                ("k(x, x) of the new points, which a precomputed kernel", given(K, kernel="precomputed", std=True))
            ],
            "of one that is not positive semidefinite, which is no covariance": [
                ("of its eigenvalues' mass was clipped", given(np.abs(X), kernel="additive_chi2", std=True))
            ],
        }
    },
}


def too_fine(kernel_ridge):
    """A tolerance that coefficients in float32 cannot reach."""
    x = np.random.default_rng(0).uniform(-1, 1, (300, 2)).astype(np.float32)
    y = np.random.default_rng(1).standard_normal(300).astype(np.float32)
    kernel = functools.partial(gaussian_kernel, lengthscale=0.5)
    kernel_ridge(x, y, kernel=kernel, ridge=1e-3, rank=60, landmarks="uniform", rng=0, tol=1e-6)


def of_jax(y):
    return lazy(y).map_blocks(jax.numpy.asarray, dtype=y.dtype, meta=jax.numpy.zeros(0))


# The docstrings


def public():
    """Functions, classes, and methods of classes, by their full names."""
    found = {}
    for module in (lowrank, lowrank.dask, lowrank.sklearn, lowrank.nn):
        own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__]
        for name in getattr(module, "__all__", [name for name in own if not name.startswith("_")]):
            thing, full = getattr(module, name), f"{module.__name__}.{name}"
            methods = vars(thing) if inspect.isclass(thing) else {}
            named = [m for m in methods if not m.startswith("_") or m == "__matmul__"]
            found[full] = thing
            found |= {f"{full}.{m}": methods[m] for m in named if isinstance(methods[m], (classmethod, type(public)))}
    return found


PUBLIC = public()
ERRORS = {"InvalidParameterError": InvalidParameterError, "NotFittedError": NotFittedError}
REFERENCE = re.compile(r"[Aa]s :\w+:`([\w.]+)`( for (?:``\w+``(?:, | and )?)+)?")


def promised(name):
    """What a docstring says of each exception and warning."""
    found = {}
    lines = (inspect.getdoc(PUBLIC[name]) or "").splitlines()
    titles = [i - 1 for i, line in enumerate(lines) if line and set(line) == {"-"}]
    for start, stop in zip(titles, [*titles[1:], len(lines)], strict=False):
        if lines[start] in ("Raises", "Warns"):
            for line in lines[start + 2 : stop]:
                if line and not line.startswith(" "):
                    heads = [ERRORS.get(head) or getattr(builtins, head) for head in line.split(", ")]
                    found |= dict.fromkeys(heads, "")
                else:
                    found |= {head: f"{found[head]} {line.strip()}".strip() for head in heads}
    return found


def resolved(reference, name):
    """The full name of what the docstring of ``name`` refers to."""
    place = name
    while "." in place:
        place = place.rpartition(".")[0]
        if f"{place}.{reference}" in PUBLIC:
            return f"{place}.{reference}"
    raise AssertionError(f"{name} refers to {reference}")


def cases_of(name):
    """Exceptions, clauses and cases: of the table, and of what the docstring refers to."""
    for error, text in promised(name).items():
        for clause, cases in TABLE[name].get(error, {}).items():
            yield error, clause, cases
        for reference, only in REFERENCE.findall(text):
            arguments = set(re.findall(r"``(\w+)``", only))

            def about(how, arguments=arguments):
                """Whether a case has nothing but these arguments, or none are named."""
                return not arguments or (isinstance(how, Given) and not how.args and how.options.keys() <= arguments)

            for other, clause, cases in cases_of(resolved(reference, name)):
                chosen = [(texts, how) for texts, how in cases if about(how)]
                if other is error and chosen:
                    yield error, clause, chosen


CASES = [(name, *case) for name in TABLE for case in cases_of(name)]


@pytest.mark.parametrize(
    ("name", "error", "clause", "cases"),
    CASES,
    ids=[f"{name}: {e.__name__}: {clause}"[:80] for name, e, clause, _ in CASES],
)
@pytest.mark.filterwarnings("ignore:n_components:UserWarning")
def test_refused(name, error, clause, cases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for texts, how in cases:
        expected = (pytest.warns if issubclass(error, Warning) else pytest.raises)(error)
        with expected as caught, dask.config.set(scheduler="synchronous"):
            CALLED[name](*how.args, **how.options) if isinstance(how, Given) else how(CALLED[name])
        if issubclass(error, Warning):
            assert [w.category for w in caught] == [error]
            message = str(caught[0].message)
        else:
            assert type(caught.value) is error, (clause, texts)
            message = str(caught.value)
            check_raised_here(name, caught)
        assert len(message) > 15
        for text in (texts,) if isinstance(texts, str) else texts:
            assert text.replace("of Nystroem", f"of {name.split('.')[-2]}") in message


def check_raised_here(name, caught):
    """That a line of ours raises, in one line; scikit-learn and the system explain what they refuse themselves."""
    frame = caught.traceback[-1]
    line = linecache.getline(str(frame.path), frame.lineno + 1).strip()
    if Path(lowrank.__file__).parent in Path(frame.path).parents and line.startswith("raise "):
        assert "\n" not in str(caught.value)
    else:
        assert "sklearn" in name or caught.type is OSError, (frame.path, line)


def test_every_public_function_is_here():
    assert set(PUBLIC) == set(TABLE) | NOTHING_TO_REFUSE
    assert set(TABLE) == set(CALLED)
    assert not [name for name in NOTHING_TO_REFUSE if promised(name)]


@pytest.mark.parametrize("name", TABLE)
def test_docstrings_promise_what_is_tested(name):
    for error, text in promised(name).items():
        text = REFERENCE.sub("", text)
        clauses = TABLE[name].get(error, {})
        for clause in sorted(clauses, key=len, reverse=True):
            assert clause in text, (error, clause)
            text = text.replace(clause, " ")
            assert clauses[clause], clause
        assert {word.lower() for word in re.findall(r"\w+", text)} <= CONNECTING, (error, text)
    assert promised(name), name
    assert set(TABLE[name]) <= set(promised(name))
