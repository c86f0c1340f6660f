"""How fast, and how accurate, is each way to invert a batch of matrices or one large one?

``pinv_newton`` beside what else there is: the 20 textbook Newton steps of the SOFT paper; textbook Newton to
convergence, in the number of steps after which exact arithmetic leaves a residual below eps (60 at the most; each row
has its number); the six steps of Nyströmformer's polynomial; and the array library's own pinv, pinv(hermitian), inv,
Cholesky inverse, eigh and lstsq. All run in one process, in turn, in an order that moves on by one each round.

Three kinds of matrices, their factors and points drawn from a fixed seed:

ridge      Gaussian Gram matrices of points in 32 dimensions. pinv_newton and the textbook iterations are given the
           Gram matrix and the ridge; the others get the sum, for which they are not charged. The ridge is 0.01 or,
           where 1 + size/0.01 is less than κ and no points could reach it, size/2κ. The spread of the points makes
           the condition about κ, at most 0.98 of what the ridge allows; the row has the condition measured.
general    Random orthogonal factors and singular values from 1 to 1/κ, evenly spaced in the logarithm.
half rank  The same, with the smaller half of the singular values zero and the others from 1 to 1/κ.

κ = 1e6 is always run in float64: in float32 it is past the cutoffs that products can resolve. Every method that takes a
cutoff gets the same one, pinv_newton's default (1e-5 in float32, 1e-11 in float64), below all singular values but zero.
Errors are relative, in the Frobenius norm, against the inverse from the prescribed factors in float64; for ``ridge``
against float64's own inverse, so that in float64 they say how far two methods agree. A method that cannot be used is
left out and the reason is in the JSON. JAX programs are compiled beforehand, at its highest product precision, with
its 64-bit mode on. Times are in milliseconds for the whole batch: the least, the median and the quartiles; the first
call of each method counts only where the time allowed for a case leaves no second. On a CPU the 3000 × 3000 matrix is
run at κ = 4900 alone, unless --sizes names it. Threads are what the environment sets (OMP_NUM_THREADS).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import array_api_compat
import matplotlib
import numpy as np
import scipy
from scipy.optimize import brentq

from lowrank import pinv_newton, squared_distances

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Array = Any

BATCHED, SINGLE = (16, 49, 64, 128), (512, 1024, 3000)
KAPPAS = (10.0, 4.9e3, 1e6)
SHOWN = 4.9e3  # the condition of the core in SOFT, and of the figure
KINDS = ("ridge", "general", "half rank")
FEATURES, RIDGE = 32, 0.01
CUTOFF = {"float32": 1e-5, "float64": 1e-11}
LONGEST = 60
ROUNDS, SECONDS = 25, 5.0  # calls of each method after the first, and what they may take for all of one case
BASE = "pinv_newton"


# The matrices, on the host in float64.


def spectral_norm(p: np.ndarray) -> np.ndarray:
    """‖P‖₂ of symmetric positive matrices by 50 power iterations, a few per cent low at the worst."""
    x = np.random.default_rng(1).standard_normal((*p.shape[:-1], 1))
    for _ in range(50):
        x = p @ (x / np.linalg.norm(x, axis=-2, keepdims=True))
    return np.linalg.norm(x, axis=(-2, -1))


def gram_and_ridge(distances: np.ndarray, kappa: float) -> tuple[np.ndarray, float]:
    """exp(−s²D/2) of the squared distances D, and δ, with s such that exp(−s²D/2) + δI has about the condition κ."""
    size = distances.shape[-1]
    ridge = RIDGE if size / RIDGE >= kappa else size / (2 * kappa)
    target = min(kappa, 0.98 * (1 + size / ridge))
    one = distances.reshape(-1, size, size)[0]

    def gram(d: np.ndarray, log_spread: float) -> np.ndarray:
        return np.exp(-0.5 * math.exp(2 * log_spread) * d)

    def excess(log_spread: float) -> float:
        core = gram(one, log_spread) + ridge * np.eye(size)
        return math.log(spectral_norm(core) * spectral_norm(np.linalg.inv(core)) / target)

    return gram(distances, brentq(excess, math.log(1e-5), math.log(10.0), xtol=0.02)), ridge


def orthogonal(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal(shape))[0]


def textbook_steps(core: np.ndarray, smallest: np.ndarray, eps: float) -> int:
    """K with (1 − ασ²)^(2^K) ≤ eps, σ the smallest singular value and α = 1.8/(‖A‖₁‖A‖_∞), for all of the batch."""
    alpha = 1.8 / (np.abs(core).sum(-1).max(-1) * np.abs(core).sum(-2).max(-1))
    return min(LONGEST, math.ceil(np.max(np.log2(math.log(eps) / np.log1p(-alpha * smallest**2)))))


def cases(size: int, shape: tuple[int, ...], kappas: tuple[float, ...], dtype: str) -> Iterator[dict]:
    """What is given, what the others are given (the core), the exact inverse, and the figures that go into a row."""
    rng = np.random.default_rng(size)
    points = rng.standard_normal((*shape[:-1], FEATURES))
    distances = squared_distances(points, points)
    u, v = orthogonal(shape, rng), orthogonal(shape, rng)
    for kappa in kappas:
        used = "float64" if kappa > 1e5 else dtype
        for kind in KINDS:
            ridge = 0.0
            if kind == "ridge":
                given, ridge = gram_and_ridge(distances, kappa)
                # The float32 Gram matrix is what is to be inverted, so that its own rounding is no error.
                given = given.astype(used)
                core = given + ridge * np.eye(size)
                exact = np.linalg.inv(core)
                smallest = 1 / spectral_norm(exact)
                condition = float(np.median(spectral_norm(core) / smallest))
            else:
                rank = size if kind == "general" else size // 2
                sigma = np.geomspace(1.0, 1 / kappa, rank)
                core = given = (u[..., :rank] * sigma) @ v[..., :rank].mT
                exact = (v[..., :rank] / sigma) @ u[..., :rank].mT
                smallest, condition = np.full(shape[:-2], 1 / kappa), kappa
            steps = textbook_steps(core, smallest, float(np.finfo(used).eps))
            about = {"kind": kind, "size": size, "batch": math.prod(shape[:-2]), "kappa": kappa}
            about |= {"condition": condition, "dtype": used, "ridge": ridge}
            yield {"given": given, "core": core, "exact": exact, "steps": steps, "about": about}


# The methods.


def nystromformer(p: Array, xp: Any) -> Array:
    """Z ← Z(13I − PZ(15I − PZ(7I − PZ)))/4, six times (Xiong et al., AAAI 2021, eq. 11), from Pᵀ/(‖P‖₁‖P‖_∞).

    The norms are the largest of the whole batch, as Nyströmformer takes them.
    """
    z = p.mT / (xp.max(xp.sum(xp.abs(p), axis=-2)) * xp.max(xp.sum(xp.abs(p), axis=-1)))
    eye = xp.eye(p.shape[-1], dtype=p.dtype, device=array_api_compat.device(z))
    for _ in range(6):
        pz = p @ z
        z = 0.25 * (z @ (13 * eye - pz @ (15 * eye - pz @ (7 * eye - pz))))
    return z


def eigh_inverse(p: Array, rtol: float, xp: Any) -> Array:
    values, vectors = xp.linalg.eigh(p)
    magnitude = xp.abs(values)
    kept = magnitude > rtol * xp.max(magnitude, axis=-1, keepdims=True)
    inverse = xp.where(kept, 1 / xp.where(kept, values, xp.ones_like(values)), xp.zeros_like(values))
    return (vectors * inverse[..., None, :]) @ vectors.mT


def methods(case: dict, backend: dict, xp: Any) -> dict[str, tuple[Callable[[Array], Array], str]]:
    """Each method's name, its function of one array, and which array of the case that is."""
    about = case["about"]
    rtol = CUTOFF[about["dtype"]]
    declared = {"hermitian": True, "ridge": about["ridge"]} if about["ridge"] else {}
    cutoff = {} if about["ridge"] else {"rtol": rtol}
    return {
        BASE: (partial(pinv_newton, **declared, **cutoff), "given"),
        "SOFT, 20 steps": (partial(pinv_newton, **declared, steps=20), "given"),
        "textbook, converged": (partial(pinv_newton, **declared, steps=case["steps"]), "given"),
        "Nyströmformer, 6": (partial(nystromformer, xp=xp), "core"),
        "pinv": (partial(xp.linalg.pinv, rtol=rtol), "core"),
        "pinv(hermitian)": (partial(xp.linalg.pinv, rtol=rtol, hermitian=True), "core"),
        "eigh": (partial(eigh_inverse, rtol=rtol, xp=xp), "core"),
        "inv": (xp.linalg.inv, "core"),
        "cholesky": (backend["cholesky"], "core"),
        "lstsq": (partial(backend["lstsq"], rtol=rtol), "core"),
    }


def omitted(kind: str, batch: int, backend: dict) -> dict[str, str]:
    """Why a method is left out."""
    reasons = backend["lacks"](kind, batch)
    if kind != "ridge":
        reasons |= dict.fromkeys(("pinv(hermitian)", "eigh"), "needs a Hermitian matrix")
        reasons["cholesky"] = "needs a positive definite matrix"
    if kind == "half rank":
        reasons["inv"] = "needs an invertible matrix"
    return reasons


# The libraries: arrays to and from the host, waiting for the device, and what the array API does not have.


def eye_like(p: Array) -> Array:
    xp = array_api_compat.array_namespace(p)
    return xp.broadcast_to(xp.eye(p.shape[-1], dtype=p.dtype), p.shape)


def one_matrix(kind: str, batch: int) -> dict[str, str]:
    return {"lstsq": "takes one matrix, not a batch"} if batch > 1 else {}


def numpy_backend(device: str) -> dict:
    import scipy.linalg
    import threadpoolctl

    if device != "cpu":
        raise ValueError(f"numpy runs on the cpu, not on {device}; choose torch, cupy or jax")
    blas = [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    return {
        "asarray": np.asarray,
        "host": np.asarray,
        "wait": lambda x: None,
        "prepare": lambda call, a: call,
        # The triangular solves of a batch are SciPy's, a loop over its matrices.
        "cholesky": lambda p: scipy.linalg.cho_solve((np.linalg.cholesky(p), True), eye_like(p)),
        "lstsq": lambda p, rtol: np.linalg.lstsq(p, eye_like(p), rcond=rtol)[0],
        "lacks": one_matrix,
        "name": f"{platform.machine()} CPU",
        "threads": max(blas),
        "version": np.__version__,
    }


def torch_backend(device: str) -> dict:
    import torch

    cuda = device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device")

    def lacks(kind: str, batch: int) -> dict[str, str]:
        return {"lstsq": "needs full rank on CUDA"} if cuda and kind == "half rank" else {}

    def lstsq(p: Array, rtol: float) -> Array:
        eye = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device).expand(p.shape)
        return torch.linalg.lstsq(p, eye, rcond=None if cuda else rtol).solution

    return {
        "asarray": lambda a: torch.asarray(a, device=device),
        "host": lambda x: x.cpu().numpy(),
        "wait": lambda x: torch.cuda.synchronize(device) if cuda else None,
        "prepare": lambda call, a: call,
        "cholesky": lambda p: torch.cholesky_inverse(torch.linalg.cholesky(p)),
        "lstsq": lstsq,
        "lacks": lacks,
        "name": torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "version": torch.__version__,
    }


def cupy_backend(device: str) -> dict:
    import cupy
    from cupyx.scipy.linalg import solve_triangular

    if device != "cuda":
        raise ValueError(f"cupy runs on cuda, not on {device}; choose numpy, torch or jax")

    def cholesky(p: Array) -> Array:
        lower = cupy.linalg.cholesky(p)
        return solve_triangular(lower, solve_triangular(lower, eye_like(p), lower=True), trans="T", lower=True)

    return {
        "asarray": cupy.asarray,
        "host": cupy.asnumpy,
        "wait": lambda x: cupy.cuda.get_current_stream().synchronize(),
        "prepare": lambda call, a: call,
        "cholesky": cholesky,
        "lstsq": lambda p, rtol: cupy.linalg.lstsq(p, eye_like(p), rcond=rtol)[0],
        "lacks": lambda kind, batch: one_matrix(kind, batch) | {"pinv(hermitian)": "CuPy has none"},
        "name": cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode(),
        "threads": os.cpu_count(),
        "version": cupy.__version__,
    }


def jax_backend(device: str) -> dict:
    import jax

    where = jax.devices(device)[0]

    def prepare(call: Callable[[Array], Array], a: Array) -> Callable[[Array], Array]:
        with jax.default_matmul_precision("highest"):
            return jax.jit(call).lower(a).compile()

    return {
        "asarray": lambda a: jax.device_put(a, where),
        "host": np.asarray,
        "wait": jax.block_until_ready,
        "prepare": prepare,
        "cholesky": lambda p: jax.scipy.linalg.cho_solve((jax.numpy.linalg.cholesky(p), True), eye_like(p)),
        "lstsq": lambda p, rtol: jax.numpy.linalg.lstsq(p, eye_like(p), rcond=rtol)[0],
        "lacks": one_matrix,
        "name": f"{platform.machine()} CPU" if device == "cpu" else where.device_kind,
        "threads": os.cpu_count(),
        "version": jax.__version__,
        "scope": jax.enable_x64(True),
    }


BACKENDS = {"numpy": numpy_backend, "torch": torch_backend, "cupy": cupy_backend, "jax": jax_backend}


# The measurement.


def interleaved(
    calls: dict[str, Callable[[], Array]], wait: Callable[[Any], None], rounds: int, seconds: float
) -> tuple[dict[str, Array], dict[str, np.ndarray]]:
    """Results, and the seconds of up to ``rounds`` calls of each after the first: as many as the time allowed holds."""
    names, results = list(calls), {}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(1 + rounds):
        if turn == 1:
            deadline = time.perf_counter() + seconds
        # A round is taken to last as long as the fastest calls so far.
        if turn > 0 and time.perf_counter() + sum(map(min, times.values())) > deadline:
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wait(None)
            before = time.perf_counter()
            results[name] = calls[name]()
            wait(results[name])
            times[name].append(time.perf_counter() - before)
    return results, {name: np.asarray(taken[1:] or taken) for name, taken in times.items()}


def measure(case: dict, backend: dict, rounds: int, seconds: float) -> tuple[list[dict], list[dict]]:
    """A row per method of one case, and those left out."""
    about, exact = case["about"], case["exact"]
    arrays = {name: backend["asarray"](case[name].astype(about["dtype"])) for name in ("given", "core")}
    reasons = omitted(about["kind"], about["batch"], backend)
    calls = {}
    for name, (call, which) in methods(case, backend, array_api_compat.array_namespace(arrays["core"])).items():
        if name not in reasons:
            calls[name] = partial(backend["prepare"](call, arrays[which]), arrays[which])
    results, times = interleaved(calls, backend["wait"], rounds, seconds)

    rows = []
    for name, taken in times.items():
        difference = backend["host"](results[name]).astype(np.float64) - exact
        error = np.linalg.norm(difference, axis=(-2, -1)) / np.linalg.norm(exact, axis=(-2, -1))
        row = about | {"method": name, "rounds": len(taken)}
        if name == "textbook, converged":
            row["steps"] = case["steps"]
        quartiles = np.quantile(taken, [0, 0.25, 0.5, 0.75])
        row |= dict(zip(("min", "lower quartile", "median", "upper quartile"), (1e3 * quartiles).tolist(), strict=True))
        row["min ratio"] = float(taken.min() / times[BASE].min())
        row["median ratio"] = float(np.median(taken) / np.median(times[BASE]))
        row |= {"error": float(np.median(error)), "worst error": float(np.max(error))}
        rows.append(row)
    return rows, [about | {"method": name, "reason": reason} for name, reason in reasons.items()]


HEADER = (
    f"{'kind':>9} {'size':>5} {'batch':>5} {'kappa':>7} {'measured':>8} {'dtype':>8}  {'method':<20}{'rounds':>6}"
    f"{'min':>10}{'quartile':>10}{'median':>10}{'quartile':>10} {'min ratio':>10} {'med ratio':>10}"
    f" {'error':>8} {'worst':>8}"
)


def line(row: dict) -> str:
    times = "".join(f"{row[key]:10.3f}" for key in ("min", "lower quartile", "median", "upper quartile"))
    return (
        f"{row['kind']:>9} {row['size']:5d} {row['batch']:5d} {row['kappa']:7.1e} {row['condition']:8.1e} "
        f"{row['dtype']:>8}  {row['method']:<20}{row['rounds']:6d}{times} {row['min ratio']:10.2f} "
        f"{row['median ratio']:10.2f} {row['error']:8.1e} {row['worst error']:8.1e}"
    )


def plot(rows: list[dict], path: Path, title: str) -> None:
    """Median time over that of pinv_newton, at κ = 4900."""
    rows = [row for row in rows if row["kappa"] == SHOWN]
    sizes = sorted({row["size"] for row in rows})
    names = list(dict.fromkeys(row["method"] for row in rows if row["method"] != BASE))
    figure, panels = plt.subplots(1, len(KINDS), figsize=(11, 4.4), sharey=True, layout="constrained")
    for panel, kind in zip(panels, KINDS, strict=True):
        panel.axhline(1.0, color="black", linewidth=1.2, label=BASE)
        for name, marker, colour in zip(names, "osx^vD*P+", plt.cm.tab10.colors, strict=False):
            ratio = {r["size"]: r["median ratio"] for r in rows if (r["kind"], r["method"]) == (kind, name)}
            places = [sizes.index(size) for size in ratio]
            panel.plot(places, list(ratio.values()), marker=marker, color=colour, linewidth=0.8, label=name)
        panel.set(title=kind, yscale="log", xlabel="size (batch)", xticks=range(len(sizes)))
        batches = {row["size"]: row["batch"] for row in rows}
        panel.set_xticklabels([f"{size}\n({batches[size]})" for size in sizes])
        panel.grid(axis="y", which="both", linewidth=0.3)
    panels[0].set_ylabel("time / time of pinv_newton")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def written(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def sizes_from(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="batches of 8 matrices of 16 and 49, no kappa = 10, three rounds"
    )
    parser.add_argument("--output", type=Path, help="folder for pinv.json and pinv.png")
    parser.add_argument("--backend", choices=BACKENDS, default="torch")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cpu (the default, except for cupy) or cuda")
    parser.add_argument("--dtype", choices=CUTOFF, default="float32", help="of all but kappa = 1e6, which is float64")
    parser.add_argument("--sizes", type=sizes_from, help="comma-separated; those above 128 are single matrices")
    parser.add_argument("--batch", type=positive, help="matrices in a batch; 256 unless given")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if options.backend == "cupy" else "cpu")
    return options


def command(options: argparse.Namespace) -> str:
    words = [f"--{name} {getattr(options, name)}" for name in ("backend", "device", "dtype")]
    words += ["--quick"] if options.quick else []
    words += [f"--sizes {','.join(map(str, options.sizes))}"] if options.sizes else []
    words += [f"--batch {options.batch}"] if options.batch else []
    return " ".join(["python examples/benchmarks/pinv.py", *words])


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        backend = BACKENDS[options.backend](options.device)
    except (ImportError, RuntimeError, ValueError) as reason:
        why = str(reason).splitlines()[0]
        raise SystemExit(f"pinv.py: no --backend {options.backend} --device {options.device} here: {why}") from None
    sizes = options.sizes or ((16, 49) if options.quick else BATCHED + SINGLE)
    batch = options.batch or (8 if options.quick else 256)
    kappas = (SHOWN, 1e6) if options.quick else KAPPAS
    rounds, seconds = (3, 0.3) if options.quick else (ROUNDS, SECONDS)
    about = {"command": command(options), "date": time.strftime("%Y-%m-%d"), "machine": backend["name"]}
    about |= {"threads": backend["threads"]}
    about |= {"numpy": np.__version__, "scipy": scipy.__version__, options.backend: backend["version"]}
    print(", ".join(f"{key} {value}" for key, value in about.items()), file=sys.stderr)

    print(HEADER, flush=True)
    rows, left_out = [], []
    with backend.get("scope", contextlib.nullcontext()):
        # Libraries load and start their pools of threads at the first call of a function, which is not to be timed.
        measure(next(cases(8, (2, 8, 8), KAPPAS[:1], options.dtype)), backend, 0, 0.0)
        for size in sizes:
            few = size >= 3000 and options.device == "cpu" and not options.sizes
            shape = (batch, size, size) if size <= BATCHED[-1] else (size, size)
            for case in cases(size, shape, (SHOWN,) if few else kappas, options.dtype):
                measured, reasons = measure(case, backend, rounds, seconds)
                print("\n".join(map(line, measured)), flush=True)
                rows += measured
                left_out += reasons
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        about["rows"] = [{key: written(value) for key, value in row.items()} for row in rows]
        about["omitted"] = left_out
        (options.output / "pinv.json").write_text(json.dumps(about, indent=1, allow_nan=False) + "\n")
        title = f"κ = 4900, {options.dtype}, {options.backend} on {backend['name']}"
        plot(rows, options.output / "pinv.png", title)


if __name__ == "__main__":
    main()
