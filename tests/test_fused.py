"""The fused kernel: its arithmetic in Triton's interpreter on any machine, and on a GPU where there is one.

Functions that call the kernel run in a process of their own for the interpreter, which has to be asked for before
Triton is imported. What the interpreter cannot show (barriers, layouts) is left to the runs on a GPU; what the
compiler makes of the kernel is looked at on any machine.
"""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import array_api_compat.numpy
import array_api_compat.torch
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import gaussian_gram
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank import _definite, _fused
from lowrank._newton import Work

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="torch was installed without Triton, as for CPUs alone"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

EPS = 2.0**-23
SIZES = (1, 2, 15, 16, 17, 31, 33, 49, 64, 100, 128)
CONDITIONS = (1.0, 1e2, 1e4, 1e5)


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=needs_cuda)])
def run(request: pytest.FixtureRequest) -> Iterator[Callable]:
    """run(function, *args) is function(device, *args), in the process where the kernel runs."""
    if request.param == "cuda":
        yield lambda function, *args: function("cuda", *args)
        return
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            assert pool.submit(os.getpid).result() != os.getpid()
        yield lambda function, *args: pool.submit(function, "cpu", *args).result()


def solve(device: str, a: np.ndarray, ridge: float = 1.0) -> tuple[np.ndarray, Work]:
    given = torch.asarray(a, device=device)
    x, work = _fused.scaled_newton(given, ridge=ridge, xp=array_api_compat.torch)
    assert x.dtype == torch.float32
    assert x.device == given.device
    assert work.valid.dtype == torch.bool
    assert all(w.shape == a.shape[:-2] and w.device == given.device for w in work)
    assert np.array_equal(given.cpu().numpy(), a, equal_nan=True)
    return x.cpu().numpy(), Work(*(w.cpu().numpy() for w in work))


def symmetric(spectrum: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """A symmetric float32 matrix A for which A + I has about the given eigenvalues."""
    n = len(spectrum)
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]
    a = (q * (spectrum - 1)) @ q.T
    return (0.5 * (a + a.T)).astype(np.float32)


def shifted(a: np.ndarray, ridge: float = 1.0) -> np.ndarray:
    """A + ridge·I, rounded to float32, in float64."""
    return (a + np.float32(ridge) * np.eye(a.shape[-1], dtype=np.float32)).astype(np.float64)


def spectra(n: int) -> np.ndarray:
    """Eigenvalues from 1 to each of CONDITIONS, evenly spread on a logarithmic scale, or at both ends."""
    spread = [np.geomspace(1, c, n) for c in CONDITIONS]
    return np.array(spread + [np.where(np.arange(n) < n // 2, 1, c) for c in CONDITIONS])


def is_inverse(x: np.ndarray, exact: np.ndarray) -> bool:
    """Whether x is as near to the inverse as the kernel promises, relatively and in the Frobenius norm.

    The result is rounded, half an eps, and so is its last change. Of the product XP, whose error the inverse takes κ
    times as large, all but 8 leading bits of the factors are multiplied in working precision: √n sums of random
    signs, 2⁻⁸ as large. In one piece the product would leave ten times as much in these matrices.
    """
    error = np.linalg.norm(x - exact, axis=(-2, -1)) / np.linalg.norm(exact, axis=(-2, -1))
    return bool((error <= EPS * (1 + np.linalg.cond(exact) * math.sqrt(x.shape[-1]) / 256)).all())


@pytest.mark.parametrize("n", SIZES)
def test_inverse_of_prescribed_spectrum(run, n):
    a = np.stack([symmetric(s, seed=k) for k, s in enumerate(spectra(n))])
    x, work = run(solve, a)
    exact = np.linalg.inv(shifted(a))
    assert work.valid.all()
    assert (work.cutoff == 0).all()
    assert is_inverse(x, exact)
    assert (work.bound <= EPS / 4).all()
    assert np.array_equal(x, np.swapaxes(x, -2, -1))


@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_plain_path(run, n):
    points = np.random.default_rng(n).uniform(size=(n, 2))
    for ridge in (0.01, 1e-4):
        a = gaussian_gram(points, 0.5).astype(np.float32)[None]
        x, work = run(solve, a, ridge)
        # In float64 the plain path is the inverse of the same matrix to all digits of float32.
        plain, judged = _definite.scaled_newton(
            shifted(a, ridge) - ridge * np.eye(n), ridge=ridge, xp=array_api_compat.numpy
        )
        assert work.valid.all()
        assert judged.valid.all()
        assert is_inverse(x, plain)


def test_takes_the_steps_of_the_theory(run):
    n = 24
    a = np.stack([symmetric(s) for s in spectra(n)])
    _, work = run(solve, a)
    upper = 1.02 * np.abs(shifted(a)).sum(-1).max(-1)
    # K steps leave 1/cosh(2ᴷ acosh(1/ε)), ε = (u − 1)/(u + 1); those of the finish are counted by their products.
    needed = np.ceil(np.log2(math.acosh(2**12.5) / np.arccosh((upper + 1) / (upper - 1))))
    finish = work.products / 2 - work.steps + 1
    assert np.array_equal(work.steps - finish, needed)
    assert np.isin(finish, (1, 2, 3)).all()
    assert len(set(work.steps.tolist())) >= 4


def test_invalid_elements_are_nan_and_named(run):
    n = 20
    good = np.stack([symmetric(np.geomspace(1, 50, n), seed=k) for k in range(9)])
    broken = good.copy()
    broken[0, 3, 5] = broken[0, 5, 3] = np.nan
    broken[2, 0, 0] = np.inf
    broken[4] = symmetric(np.linspace(-0.3, 5, n))
    broken[5, n - 1, 0] = broken[5, 0, n - 1] = -np.inf
    # A ridge of 1 leaves these singular, though none should be below 1.
    broken[6] = symmetric(np.where(np.arange(n) == 0, 0.0, 3.0))
    broken[8] = -np.eye(n)
    x, _ = run(solve, good)
    y, work = run(solve, broken)
    assert work.valid.tolist() == [False, True, False, True, False, False, False, True, False]
    assert np.isnan(y[~work.valid]).all()
    assert np.array_equal(y[work.valid], x[work.valid])


def test_at_the_limit_of_the_precision(run):
    """κ = 1e6 takes more than one pass to be as accurate as ever; κ = 1e8 is beyond float32, and named."""
    a = np.stack([symmetric(np.where(np.arange(64) < 32, 1, c)) for c in (1e2, 1e6, 1e8)])
    x, work = run(solve, a)
    assert work.valid.tolist() == [True, True, False]
    assert is_inverse(x[:2], np.linalg.inv(shifted(a[:2])))
    assert (work.products / 2 - work.steps + 1).tolist()[:2] == [1, 2]
    assert np.isnan(x[2]).all()


def test_neighbours_do_not_matter(run):
    a = np.stack([symmetric(s, seed=k) for k, s in enumerate(spectra(33))])
    x, _ = run(solve, a)
    for k in (0, 3, 7):
        assert np.array_equal(run(solve, a[k : k + 1])[0][0], x[k])


@pytest.mark.parametrize("exponent", [-90, 90])
def test_scaling_by_powers_of_two_is_exact(run, exponent):
    a = symmetric(np.geomspace(1, 1e3, 17))[None]
    x, work = run(solve, a)
    y, scaled = run(solve, np.ldexp(a, exponent), 2.0**exponent)
    assert np.array_equal(np.ldexp(y, exponent), x)
    assert work.steps == scaled.steps


def strided(device: str, p: np.ndarray) -> list[np.ndarray]:
    """The inverses of the same batch (2, 3, n, n) in four layouts of memory."""
    given = torch.asarray(p, device=device)
    wide = torch.full((*p.shape[:-1], 2 * p.shape[-1]), math.nan, device=device)
    wide[..., ::2] = given
    layouts = (given, given.mT.contiguous().mT, wide[..., ::2], given.transpose(0, 1).contiguous().transpose(0, 1))
    assert [t.is_contiguous() for t in layouts] == [True, False, False, False]
    return [_fused.scaled_newton(t, ridge=1.0, xp=array_api_compat.torch)[0].cpu().numpy() for t in layouts]


def test_batch_axes_and_layouts(run):
    p = np.stack([symmetric(np.geomspace(1, 30, 18), seed=k) for k in range(6)])
    x, _ = run(solve, p)
    y, work = run(solve, p.reshape(2, 3, 18, 18))
    assert np.array_equal(y, x.reshape(2, 3, 18, 18))
    assert work.steps.shape == (2, 3)
    for layout in run(strided, p.reshape(2, 3, 18, 18)):
        assert np.array_equal(layout, y)


def test_empty_batch(run):
    x, work = run(solve, np.empty((0, 3, 3), dtype=np.float32))
    assert x.shape == (0, 3, 3)
    assert work.valid.shape == (0,)


def check_operator(device: str, p: np.ndarray) -> dict[str, str]:
    from lowrank import _fused_kernels

    given = torch.asarray(p, device=device)
    return torch.library.opcheck(_fused_kernels.scaled_newton, (given, 1.0))


def test_operator_keeps_its_contract(run):
    """Schema, fake results, autograd registration and tracing with symbolic shapes, by torch's own checks."""
    outcome = run(check_operator, symmetric(np.geomspace(1, 10, 5))[None].repeat(3, axis=0))
    assert set(outcome.values()) == {"SUCCESS"}
    assert len(outcome) == 4


def compiled(device: str, p: np.ndarray) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The operators in the graph of a compiled function, its result, and that of the function itself."""
    operators = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def function(p: torch.Tensor) -> torch.Tensor:
        return 2 * _fused.scaled_newton(p, ridge=1.0, xp=array_api_compat.torch)[0]

    given = torch.asarray(p, device=device)
    result = torch.compile(function, fullgraph=True, backend=backend)(given)
    return operators, result.cpu().numpy(), function(given).cpu().numpy()


def test_compiler_sees_one_operator(run):
    operators, result, expected = run(compiled, symmetric(np.geomspace(1, 10, 6))[None])
    assert sum("scaled_newton" in name for name in operators) == 1
    assert np.array_equal(result, expected)


class _Choice(torch.nn.Module):
    def forward(self, p: torch.Tensor) -> torch.Tensor:
        if _fused.applies(p, ridge=0.1, xp=array_api_compat.torch):
            return _fused.scaled_newton(p, ridge=0.1, xp=array_api_compat.torch)[0]
        return torch.linalg.inv(p)


@pytest.mark.parametrize(("order", "chosen"), [(128, True), (129, False)])
def test_export_sees_the_operator(order, chosen):
    # A fake tensor has a device and no memory, so that no GPU is needed to export for one.
    with FakeTensorMode():
        given = torch.empty(2, 4, order, order, device="cuda")
        graph = torch.export.export(_Choice(), (given,)).graph
    calls = [node for node in graph.nodes if "scaled_newton" in str(node.target)]
    assert len(calls) == chosen
    for x, figures in (call.meta["val"] for call in calls):
        assert (x.shape, x.dtype, x.device) == (given.shape, given.dtype, given.device)
        assert (figures.shape, figures.dtype, figures.device) == ((2, 4, 4), given.dtype, given.device)


def test_chooser():
    def applies(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cuda", ridge: float = 0.1) -> bool:
        with FakeTensorMode():
            p = torch.empty(shape, dtype=dtype, device=device)
        return _fused.applies(p, ridge=ridge, xp=array_api_compat.torch)

    assert applies(8, 1, 1)
    assert applies(2, 4, 128, 128)
    assert not applies(7, 49, 49)
    assert not applies(49, 49)
    assert not applies(8, 129, 129)
    assert not applies(8, 0, 0)
    assert not applies(8, 49, 48)
    assert not applies(8, 49, 49, ridge=0.0)
    assert not applies(8, 49, 49, device="cpu")
    for dtype in (torch.float64, torch.complex64, torch.float16, torch.bfloat16):
        assert not applies(8, 49, 49, dtype=dtype)
    assert not _fused.applies(np.ones((8, 4, 4), dtype=np.float32), ridge=0.1, xp=np)
    assert not _fused.applies(jnp.ones((8, 4, 4), dtype=jnp.float32), ridge=0.1, xp=jnp)


def test_choosing_for_numpy_imports_nothing():
    program = (
        "import sys, numpy; from lowrank import _fused;"
        "chosen = _fused.applies(numpy.ones((8, 4, 4), dtype='float32'), ridge=0.1, xp=numpy);"
        "print(chosen, sorted({'torch', 'triton', 'cupy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False []"


@pytest.mark.parametrize(("size", "capability"), [(16, 90), (32, 90), (64, 80), (64, 90), (128, 90)])
def test_compiles_for_a_gpu(size, capability, tmp_path, monkeypatch):
    """Triton's compiler, which needs no GPU, keeps to exact products and to the shared memory that every GPU has."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lowrank import _fused_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = _fused_kernels._invert
    kinds = dict.fromkeys(("a", "p", "x", "e", "figures"), "*fp32") | {"ridge": "fp32", "n": "i32"}
    constants = {"SIZE": size, "BITS": 8}
    source = ASTSource(kernel, signature=kinds | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    options = {"num_warps": _fused_kernels._WARPS[size], "num_stages": 1, "enable_fp_fusion": False}
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    # Products on tensor cores would be rounded first; a read-only or an asynchronous load could miss what was stored.
    assert re.search(r"mma|tf32|ld\.global\.nc|cp\.async", done.asm["ptx"]) is None
    # All threads wait before and after P, X or E is written, and nothing is read or written in between.
    lines = re.findall(r".*(?:barrier|tt\.load|tt\.store .*: tensor<).*", done.asm["ttgir"])
    stores = [k for k, line in enumerate(lines) if "tt.store" in line]
    assert len(stores) == 7
    assert all("barrier" in lines[k - 1] and "barrier" in lines[k + 1] for k in stores)
    assert done.metadata.shared <= 64 << 10


@needs_cuda
def test_cupy_takes_the_same_way():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    import array_api_compat.cupy

    p = np.stack([symmetric(np.geomspace(1, 1e3, 49), seed=k) for k in range(8)])
    given = cupy.asarray(p)
    assert _fused.applies(given, ridge=1.0, xp=array_api_compat.cupy)
    x, work = _fused.scaled_newton(given, ridge=1.0, xp=array_api_compat.cupy)
    expected, figures = solve("cuda", p)
    assert isinstance(x, cupy.ndarray)
    assert np.array_equal(x.get(), expected)
    assert all(np.array_equal(w.get(), f) for w, f in zip(work, figures, strict=True))
