"""The fused products of attention: their arithmetic in Triton's interpreter on any machine, and on a GPU where there is
one. What the compiler makes of the kernels is looked at on any machine.

As in ``test_fused``, functions that run a kernel do so in a process of their own for the interpreter.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lowrank
from lowrank import _fused_attention, attention

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="torch was installed without Triton, as for CPUs alone"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

EPS = 2.0**-23
NAMES = ("s", "out", "q_bar", "z_bar", "v_bar")
OF_LANDMARKS = ("s", "z_bar")
# Tokens, landmarks, features and values, on either side of the kernels' blocks.
SHAPES = ((1, 1, 3, 32), (37, 7, 32, 3), (300, 49, 32, 32), (37, 128, 3, 64), (70, 49, 64, 17), (33, 20, 128, 100))


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=needs_cuda)])
def run(request: pytest.FixtureRequest) -> Iterator[Callable]:
    """run(function, *args) is function(device, *args), in the process where the kernels run."""
    if request.param == "cuda":
        yield lambda function, *args: function("cuda", *args)
        return
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            assert pool.submit(os.getpid).result() != os.getpid()
        yield lambda function, *args: pool.submit(function, "cpu", *args).result()


def problem(
    n: int, m: int, d: int, e: int, *, batch: tuple[int, ...] = (1,), dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """q, z, v, g, w, s̄; distances are about 1, so that no entry of C is negligible."""
    draw = torch.Generator().manual_seed(n + m + d + e)
    q, z, v, g, w, s_bar = (
        torch.randn(*batch, rows, columns, generator=draw)
        for rows, columns in ((n, d), (m, d), (n, e), (n, e), (m, e), (m, e))
    )
    return [(q / d**0.5).to(dtype), (z / d**0.5).to(dtype), v.to(dtype), g.to(dtype), w, s_bar]


def plain(tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The five results in float64 by the formulas as written, and what rounding errors are to be measured by.

    The latter are the same formulas of absolute values. An entry of C is off by the rounding of its exponent, which
    is of the order of ‖q‖² + ‖z‖²; everything else is off by a few roundings.
    """
    q, z, v, g, w, s_bar = (x.double() for x in tensors)
    c = torch.exp(-0.5 * (q[..., :, None, :] - z[..., None, :, :]).square().sum(-1))

    def formulas(c, p, q, z, v, w, s_bar, sign):
        of_q = p @ z + sign * q * p.sum(-1, keepdim=True)
        return [c.mT @ v, c @ w, of_q, p.mT @ q + sign * z * p.sum(-2)[..., None], c @ s_bar]

    exact = formulas(c, c * (g @ w.mT + v @ s_bar.mT), q, z, v, w, s_bar, -1)
    q, z, v, g, w, s_bar = (x.abs() for x in (q, z, v, g, w, s_bar))
    scale = formulas(c, c * (g @ w.mT + v @ s_bar.mT), q, z, v, w, s_bar, +1)
    reach = q.square().sum(-1).max() + z.square().sum(-1).max()
    return exact, [(8 + reach) * x for x in scale]


def results(device: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    q, z, v, g, w, s_bar = given = [x.to(device) for x in tensors]
    before = [x.clone() for x in given]
    out = [
        _fused_attention.transposed_product(q, z, v),
        _fused_attention.product(q, z, w),
        *_fused_attention.cotangents(q, z, v, g, w, s_bar),
    ]
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(given, before, strict=True))
    assert all(x.device == q.device for x in out)
    return [x.cpu() for x in out]


def check(computed: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
    """float32 errors, and one rounding more for results in half precision (the interpreter truncates)."""
    dtype = tensors[0].dtype
    for name, x, exact, scale in zip(NAMES, computed, *plain(tensors), strict=True):
        assert x.shape == exact.shape, name
        assert x.dtype == (torch.float32 if name in OF_LANDMARKS else dtype), name
        allowed = EPS * scale
        if x.dtype != torch.float32:
            allowed += torch.finfo(dtype).eps * (exact.abs() + torch.finfo(dtype).tiny)
        assert ((x.double() - exact).abs() <= allowed).all(), name


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_against_float64(run, shape):
    tensors = problem(*shape)
    check(run(results, tensors), tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("landmarks_too", [True, False])
def test_half_precision_against_float64(run, dtype, landmarks_too):
    tensors = problem(37, 20, 32, 17, dtype=dtype)
    if not landmarks_too:
        tensors[1] = tensors[1].float() + 1e-4
    check(run(results, tensors), tensors)


def test_sums_of_many_stretches(run):
    """Four partial sums, the last of fewer tokens; a batch element is the same, bit for bit, in any company."""
    assert _fused_attention._stretches(1000, 32) == (4, 256)
    tensors = problem(1000, 7, 3, 5, batch=(2,))
    computed = run(results, tensors)
    check(computed, tensors)
    alone = run(results, [x[1:] for x in tensors])
    assert all(torch.equal(x[1:], y) for x, y in zip(computed, alone, strict=True))


@pytest.mark.parametrize("block", [32, 64])
def test_stretches_cover_the_tokens(block):
    for n in (0, 1, 31, 256, 257, 3136, 131_072, 131_073, 1_000_003, 1 << 31):
        parts, stretch = _fused_attention._stretches(n, block)
        assert stretch % block == 0
        assert parts * stretch >= n > (parts - 1) * stretch or n == parts == 0
        assert parts <= 512
        assert n <= 512 * 256 or stretch < n / 512 + block


def layouts(device: str, tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The results for (batch, heads, n, ·) tensors that lie in memory in different ways."""
    q, z, v, g, w, s_bar = (x.to(device) for x in tensors)
    heads = torch.cat([q, v], dim=-1).transpose(1, 2).contiguous()  # (batch, n, heads, d + e), of one projection
    of_heads = heads[..., : q.shape[-1]].transpose(1, 2), z, heads[..., q.shape[-1] :].transpose(1, 2)
    features_first = [x.mT.contiguous().mT for x in (q, z, v, g, w, s_bar)]
    wide = torch.full((*g.shape[:-1], 2 * g.shape[-1]), math.nan, device=device, dtype=g.dtype)
    wide[..., ::2] = g
    assert not any(x.is_contiguous() for x in (of_heads[0], of_heads[2], *features_first))
    return [
        results(device, [q, z, v, g, w, s_bar]),
        results(device, [*of_heads, wide[..., ::2], w, s_bar]),
        results(device, features_first),
        [x.unflatten(0, q.shape[:2]) for x in results(device, [x.flatten(0, 1) for x in tensors])],
    ]


def test_layouts(run):
    tensors = problem(37, 5, 16, 6, batch=(2, 3))
    first, *others = run(layouts, tensors)
    check(first, tensors)
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


def shared_values(device: str, tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[bool]]:
    """With landmarks, values and a cotangent that all heads share, by a stride of 0, and which results join heads."""
    q, *others = (x.to(device) for x in tensors)
    computed = results(device, [q, *(x.expand(*q.shape[:2], *x.shape[2:]) for x in others)])
    out = _fused_attention.product(q, *(others[k].expand(*q.shape[:2], *others[k].shape[2:]) for k in (0, 3)))
    return computed, [out.transpose(1, 2).is_contiguous()]


def test_expanded_batch_and_layout_of_the_result(run):
    q = problem(20, 5, 4, 6, batch=(2, 3))[0]
    others = problem(20, 5, 4, 6, batch=(1, 1))[1:]
    computed, joined = run(shared_values, [q, *others])
    check(computed, [q, *(x.expand(2, 3, *x.shape[2:]) for x in others)])
    assert all(joined)


def test_far_points_have_no_kernel(run):
    q, *others = problem(40, 7, 3, 5)
    computed = run(results, [q + 100, *others])
    assert all(torch.equal(x, torch.zeros_like(x)) for x in computed)


def test_equal_points_have_kernel_one(run):
    """The clamp: rounding would make some exponents positive, of which none is left."""
    q, _, _, g, _, s_bar = problem(64, 64, 24, 64)
    eye = torch.eye(64)[None]
    c = run(results, [30 * q, 30 * q, eye, g, eye, s_bar])[1]
    assert (c <= 1).all()
    # Exponents are off by d·eps·‖q‖² at the most.
    assert (torch.diagonal(c[0]) >= 1 - 24 * EPS * (30 * q).square().sum(-1).max()).all()


def test_nan_stays_where_it_belongs(run):
    tensors = problem(40, 7, 3, 5)
    tensors[0][0, 11] = math.nan
    s, out, q_bar, z_bar, v_bar = run(results, tensors)
    for x in (out, q_bar, v_bar):
        assert torch.equal(x.isnan().all(-1)[0], torch.arange(40) == 11)
        assert torch.equal(x.isnan().any(-1)[0], torch.arange(40) == 11)
    assert s.isnan().all()
    assert z_bar.isnan().all()


def test_nothing_to_do(run):
    q, z, v, g, w, s_bar = problem(5, 7, 3, 4)
    s, out, q_bar, z_bar, v_bar = run(results, [q[:, :0], z, v[:, :0], g[:, :0], w, s_bar])
    assert torch.equal(s, torch.zeros(1, 7, 4))
    assert torch.equal(z_bar, torch.zeros(1, 7, 3))
    assert (out.shape, q_bar.shape, v_bar.shape) == ((1, 0, 4), (1, 0, 3), (1, 0, 4))
    assert all(x.shape[0] == 0 for x in run(results, [x[:0] for x in (q, z, v, g, w, s_bar)]))


class _Attention(torch.autograd.Function):
    """C M Cᵀv, composed as the module says."""

    @staticmethod
    def forward(ctx, q, z, v, core):
        s = _fused_attention.transposed_product(q, z, v)
        w = core @ s
        ctx.save_for_backward(q, z, v, core, s, w)
        return _fused_attention.product(q, z, w)

    @staticmethod
    def backward(ctx, g):
        q, z, v, core, s, w = ctx.saved_tensors
        w_bar = _fused_attention.transposed_product(q, z, g)
        q_bar, z_bar, v_bar = _fused_attention.cotangents(q, z, v, g, w, core.mT @ w_bar)
        return q_bar, z_bar, v_bar, w_bar @ s.mT


def gradients(device: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    *given, g = (x.to(device) for x in tensors)
    given = [x.requires_grad_() for x in given]
    return [x.cpu() for x in torch.autograd.grad(_Attention.apply(*given), given, g)]


@pytest.mark.parametrize("near", [False, True])
def test_gradients_against_autograd_of_the_formula(run, near):
    """Also with landmarks in pairs, 1e-3 apart, that leave A nearly singular and its inverse 1/ridge = 100 large."""
    q, z, v, g, *_ = problem(50, 8, 5, 6, batch=(2,))
    if near:
        z[:, 4:] = z[:, :4] + 1e-3 * z[:, 4:]
    exact = [x.double().requires_grad_() for x in (q, z, v)]

    def gaussian(x, y):
        return torch.exp(-0.5 * (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1))

    core = torch.linalg.inv(gaussian(exact[1], exact[1]) + 0.01 * torch.eye(8)).detach().float()
    exact.append(core.double().requires_grad_())
    c = gaussian(exact[0], exact[1])
    expected = torch.autograd.grad(c @ (exact[3] @ (c.mT @ exact[2])), exact, g.double())
    computed = run(gradients, [q, z, v, core, g])
    size = torch.linalg.matrix_norm(core, 2).max()
    for x, y in zip(computed, expected, strict=True):
        # s is off by about eps·‖s‖, and so is w = M s by ‖M‖ as much where M cancels, whatever w is.
        assert (x.double() - y).norm() <= 4 * EPS * max(1, size) * y.norm()


def outcomes(device: str, tensors: list[torch.Tensor]) -> list[dict[str, str]]:
    q, z, v, g, w, s_bar = (x.to(device) for x in tensors)
    return [
        torch.library.opcheck(_fused_attention.transposed_product, (q, z, v)),
        torch.library.opcheck(_fused_attention.product, (q, z, w)),
        torch.library.opcheck(_fused_attention.cotangents, (q, z, v, g, w, s_bar)),
    ]


def through_the_kernels(device: str, solves: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Attention and its gradients by the kernels, whatever the device, and by the formula in float64."""
    tensors = [x.to(device) for x in problem(37, 7, 8, 5, batch=(2, 3))[:3]]
    weight = torch.ones(5, device=device)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fused_attention, "applies", lambda *_: True)
        inverse = None if solves else functools.partial(lowrank.pinv_newton, method="direct")
        for dtype in (torch.float32, torch.float64):
            if dtype == torch.float64:
                patch.setattr(attention, "_is_in_blocks", lambda *_: False)
            q, z, v = leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
            out = lowrank.softmax_free_attention(q, v, z, ridge=0.1, lengthscale=1.3, inverse=inverse)
            (out @ weight.to(dtype)).sum().backward()
            results.append([out.detach().cpu(), *(x.grad.cpu() for x in leaves)])
    return list(zip(*results, strict=True))


@pytest.mark.parametrize("solves", [True, False])
def test_attention_takes_them(run, solves):
    for ours, expected in run(through_the_kernels, solves):
        # κ·eps with κ ≤ 1 + 7/0.1, and in the landmarks' cotangent the inverse twice.
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=71 * 10 * EPS * expected.abs().max().item())


def at_near_landmarks(device: str, kind: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gradients by the kernels and in float64: one image's landmarks are near others, or in a plane, and the other's
    are not."""
    q, z, v, g, step, _ = (x.to(device) for x in problem(150, 49, 32, 32, batch=(2,)))
    q, z = 5 * q, 5 * z
    if kind == "pairs":
        z[0, 25:] = z[0, :24] + 1e-3 * step[0, 25:]
    else:
        sides = torch.linalg.qr(step[0, :2].mT)[0].mT
        places = torch.arange(49.0, device=device)
        z[0] = z[0, :1] + torch.stack([places % 7 - 3, places // 7 - 3], -1) @ sides
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fused_attention, "applies", lambda q, *_: q.dtype == torch.float32)
        for dtype in (torch.float32, torch.float64):
            leaves = [x.detach().to(dtype).requires_grad_() for x in (q, v, z)]
            out = lowrank.softmax_free_attention(*leaves)
            results.append([x.cpu() for x in torch.autograd.grad(out, leaves, g.to(dtype))])
    return list(zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["pairs", "plane"])
def test_gradients_at_near_singular_landmarks(run, kind):
    for ours, expected in run(at_near_landmarks, kind):
        for x, y in zip(ours, expected, strict=True):
            assert torch.linalg.norm(x - y) < 16 * EPS * torch.linalg.norm(y)


@pytest.mark.parametrize("batch", [(2,), (2, 3)])
def test_operators_keep_their_contract(run, batch):
    """Schema, fake results, autograd registration and tracing with symbolic shapes, by torch's own checks."""
    for outcome in run(outcomes, problem(9, 3, 4, 5, batch=batch, dtype=torch.float16)):
        assert set(outcome.values()) == {"SUCCESS"}
        assert len(outcome) == 4


def compiled(device: str, tensors: list[torch.Tensor]) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """The operators in the graphs of compiled attention and its backward pass, its gradient, and the eager one."""
    from torch._dynamo.backends.common import aot_autograd

    operators = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        operators.extend(str(node.target) for node in graph.graph.nodes if "lowrank" in str(node.target))
        return graph.forward

    *given, g = (x.to(device) for x in tensors)
    given = [x.requires_grad_() for x in given]
    function = torch.compile(_Attention.apply, fullgraph=True, backend=aot_autograd(fw_compiler=backend))
    result = torch.autograd.grad(function(*given), given, g)
    return operators, result[0].cpu(), torch.autograd.grad(_Attention.apply(*given), given, g)[0].cpu()


def test_compiler_sees_the_operators(run):
    q, z, v, g, *_ = problem(9, 3, 4, 5)
    operators, result, expected = run(compiled, [q, z, v, torch.eye(3)[None], g])
    assert [name.split(".")[1] for name in operators] == [
        "transposed_product",
        "product",
        "transposed_product",
        "cotangents",
    ]
    assert torch.equal(result, expected)


def test_chooser():
    def applies(
        q: tuple[int, ...], m: int, e: int, *, dtype=torch.float32, of_z=None, of_v=None, device: str = "cuda"
    ) -> bool:
        *batch, n, d = q
        with FakeTensorMode():
            return _fused_attention.applies(
                torch.empty(q, dtype=dtype, device=device),
                torch.empty((*batch, m, d), dtype=of_z or dtype, device=device),
                torch.empty((*batch, n, e), dtype=of_v or dtype, device=device),
            )

    assert applies((4, 100, 32), 49, 32)
    assert applies((2, 4, 100, 128), 128, 128, dtype=torch.bfloat16)
    assert applies((2, 1, 1), 1, 1, dtype=torch.float16, of_z=torch.float32)
    assert not applies((100, 32), 49, 32)
    assert not applies((2, 2, 2, 100, 32), 49, 32)
    assert not applies((4, 100, 129), 49, 32)
    assert not applies((4, 100, 32), 129, 32)
    assert not applies((4, 100, 32), 49, 129)
    assert not applies((4, 100, 32), 0, 32)
    assert not applies((4, 100, 32), 49, 32, device="cpu")
    assert not applies((4, 100, 32), 49, 32, dtype=torch.float64)
    assert not applies((4, 100, 32), 49, 32, of_z=torch.float16)
    assert not applies((4, 100, 32), 49, 32, of_v=torch.bfloat16)


def test_nothing_applies_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None; import torch; from lowrank import _fused_attention\n"
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "with FakeTensorMode(): x = torch.empty(2, 3, 4, device='cuda')\n"
        "print(_fused_attention.applies(x, x, x))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_does_not_fit_is_named():
    q, z, v, g, w, s_bar = problem(10, 3, 4, 5)
    with pytest.raises(ValueError, match=r"v does not fit .* q \(1, 10, 4\), z \(1, 3, 4\), v \(1, 9, 5\)"):
        _fused_attention.transposed_product(q, z, v[:, 1:])
    with pytest.raises(ValueError, match="q does not fit"):
        _fused_attention.transposed_product(q[..., 1:], z, v)
    with pytest.raises(ValueError, match="z does not fit"):
        _fused_attention.product(q.expand(2, -1, -1), z, w)
    with pytest.raises(ValueError, match="s_bar does not fit"):
        _fused_attention.cotangents(q, z, v, g, w, s_bar[:, 1:])
    with pytest.raises(ValueError, match=r"1 to 128 landmarks, features and values: .* z \(1, 0, 4\)"):
        _fused_attention.product(q, z[:, :0], w[:, :0])
    with pytest.raises(TypeError, match=r"g has dtype torch.float64"):
        _fused_attention.cotangents(q, z, v, g.double(), w, s_bar)


KERNELS = ("_transposed_product", "_product", "_cotangent_of_landmarks", "_cotangents_of_tokens")


@pytest.mark.parametrize(
    ("width", "dtype", "capability"),
    [(32, torch.float32, 80), (64, torch.bfloat16, 90), (128, torch.float32, 90), (128, torch.float16, 80)],
)
def test_compiles_for_a_gpu(width, dtype, capability, tmp_path, monkeypatch):
    """Triton's compiler, which needs no GPU, keeps the sums in registers and to products of the promised precision."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    along, across = _fused_attention._blocks(torch.empty((), dtype=dtype), width, width)
    short = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    for name, blocks in zip(KERNELS, (along, across, along, across), strict=True):
        kernel = getattr(_fused_attention, name)
        constants = {key: value for key, value in blocks.items() if key != "num_warps"}
        constants |= {key: 1 for key in kernel.arg_names if key.endswith("_column")}
        pointers = dict.fromkeys(("q", "z", "v", "g", "q_bar", "v_bar", "out"), f"*{short}")
        pointers |= dict.fromkeys(("w", "s_bar", "partial"), "*fp32")
        kinds = {key: "constexpr" if key in constants else pointers.get(key, "i32") for key in kernel.arg_names}
        # Pointers, widths and strides are multiples of 16, as in a model.
        even = [k for k, (key, kind) in enumerate(kinds.items()) if kind != "constexpr" and key not in "nm"]
        hints = {(k,): [["tt.divisibility", 16]] for k in even}
        source = ASTSource(kernel, signature=kinds, constexprs=constants, attrs=hints)
        options = {"num_warps": blocks["num_warps"], "num_stages": 1, "enable_fp_fusion": True}
        done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        products = re.findall(r"mma(?:\.sync|_async)\S*", done.asm["ptx"])
        assert bool(products) == (dtype != torch.float32), name
        assert all(".tf32.tf32" in product for product in products), name
        assert done.metadata.shared <= 32 << 10, name
        assert spilled(done.asm["cubin"], tmp_path) <= 64, name


def spilled(cubin: bytes, folder: Path) -> int:
    """Bytes of a thread that found no register."""
    import triton.backends.nvidia

    (folder / "kernel.cubin").write_bytes(cubin)
    tool = Path(triton.backends.nvidia.__path__[0], "bin", "cuobjdump")
    command = [tool, "--dump-resource-usage", folder / "kernel.cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])
