"""
test_sae.py: the properties that the three scripts promise, against independent oracles.

    make test        or        pytest -q test_sae.py
    make bench       or        python test_sae.py --bench; the bench is its last section

Oracles: plain autograd in float64 for gradients, torch.topk for selection, loops in numpy for
GPT-2, formulas written out here for OpenAI's conversion, planted truths for metrics. Nothing is
downloaded; every file goes into a temporary directory.
"""

import argparse
import ast
import base64
import contextlib
import dataclasses
import datetime
import functools
import gzip
import html
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the kernels are tested
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evals
import harvest
import sae as S

HERE = Path(__file__).parent
settings.register_profile("project", deadline=None, max_examples=40, derandomize=True,
                          suppress_health_check=list(HealthCheck))
settings.load_profile("project")
seeds = st.integers(0, 2**31 - 1)
F32 = torch.float32
SITE = 1, "resid_post_mlp"  # a layer, and where in it
CPU = ["--device", "cpu"]


def gen(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=gen(seed), dtype=dtype)


def make_sae(d, n, k, seed=0, dtype=torch.float64):
    """An SAE away from its special initial point: untied, biased, unit decoder rows."""
    torch.manual_seed(seed)
    m = S.Sparse(d, n, k).to(dtype)
    with torch.no_grad():
        m.W_enc += 0.1 * torch.randn_like(m.W_enc)
        m.b_enc += 0.05 * torch.randn_like(m.b_enc)
        m.b_pre += 0.05 * torch.randn_like(m.b_pre)
    return m


def dense_code(pre, k):
    """ReLU(TopK) as a dense matrix, the textbook way."""
    values, indices = pre.topk(k)
    return torch.zeros_like(pre).scatter(-1, indices, values.relu())


def plain(m):
    """The same autoencoder as section 1 has it."""
    other = S.SAE(m.d_model, m.n_latents, m.k).to(m.W_dec)
    other.theta = m.theta
    other.load_state_dict(m.state_dict())
    return other


def to_dense(values, indices, n):
    return torch.zeros(*values.shape[:-1], n, dtype=values.dtype).scatter_add(-1, indices, values)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def python(*argv, **kw):
    """The result of Python run with these arguments."""
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, **kw)


def read_json(path):
    return json.loads(path.read_text())


def read_log(run):
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


@st.composite
def sizes(draw):
    """(d, n, k, B) with the corners: one latent, k = n, odd widths, one token."""
    d, n = draw(st.integers(2, 19)), draw(st.integers(1, 70))
    return d, n, draw(st.sampled_from(sorted({1, min(3, n), n}))), draw(st.integers(1, 33))


# ---------------------------------------------------------------------------------- what one pastes

SECTION_1 = (HERE / "sae.py").read_text().split("# 1. The method\n", 1)[1].split("\n# ------", 1)[0]


def test_the_first_section_alone_learns():
    """Its text, in an empty namespace under torch's imports, with plain autograd and plain Adam."""
    names = {}
    exec("import torch\nfrom torch import nn\nimport torch.nn.functional as F\n" + SECTION_1, names)
    torch.manual_seed(0)
    m, x, dead = names["SAE"](16, 64, 4), planted(4096), torch.arange(0, 64, 16)
    u = names["normalize"](x)[0]
    names["init_from_data"](m, u)
    adam, c = torch.optim.Adam(m.parameters(), 3e-3), (u - u.mean(0)).square().mean()
    before = names["nmse"](m, x)
    for batch in u.split(32):
        adam.zero_grad()
        names["objective"](m, batch, c, dead, 2, 1 / 32).backward()
        adam.step()
        m.normalize_decoder()
    assert names["nmse"](m, x) < 0.5 * before
    assert torch.allclose(m(x[None]), m(x)[None], atol=1e-6) and m(x[0]).shape == (16,)  # (..., d)


@pytest.mark.parametrize("name, most", [("SAE", 60), ("objective", 110)])
def test_what_one_pastes_is_short(name, most):
    """The lines of a definition and of all that it names; of `objective`, the autoencoder too."""
    kinds = ast.FunctionDef, ast.ClassDef
    body = {n.name: n for n in ast.parse(SECTION_1).body if isinstance(n, kinds)}
    wanted, found = [name, "SAE"], set()
    while wanted:
        if (one := wanted.pop()) in body and one not in found:
            found.add(one)
            wanted += [n.id for n in ast.walk(body[one]) if isinstance(n, ast.Name)]
    assert "normalize" in found
    assert sum(body[n].end_lineno - body[n].lineno + 1 for n in found) <= most


def test_no_process_is_mentioned_above_section_4():
    text = (HERE / "sae.py").read_text().split("# 1. The method\n")[1]
    titles = re.findall(r"^# -{98}\n# (.*)\n", text, re.M)
    assert titles == ["2. A step", "3. Fast", "4. Large", "5. A run",
                      "6. Other activation functions", "7. Files of other libraries",
                      "8. The command"]
    processes = r"(?i)mesh|shard|replica|process|\brank|\bworld|\bdist\."
    assert not re.findall(processes, text.split("# 4. Large")[0])


# ---------------------------------------------------------------------------------- normalisation


@given(seeds, st.integers(2, 65), st.floats(-1e4, 1e4), st.sampled_from([1e-6, 1e-2, 1, 1e3, 1e12]))
def test_normalize_round_trip_and_invariance(seed, d, shift, scale):
    x = randn(5, d, seed=seed)
    u, mean, norm = S.normalize(x)
    assert torch.allclose(u * norm + mean, x, atol=1e-12)
    assert torch.allclose(u.sum(-1), torch.zeros(5, dtype=u.dtype), atol=1e-12)
    assert torch.allclose(u.norm(dim=-1), torch.ones(5, dtype=u.dtype))
    assert torch.allclose(S.normalize(x * scale + shift * scale)[0], u, atol=1e-7)


@pytest.mark.parametrize("make", [S.SAE, S.Sparse])
def test_any_leading_shape_and_no_other_width(make):
    torch.manual_seed(0)
    m = make(6, 20, 3).double()
    x = randn(4, 5, 6)
    flat, whole = m.encode(x.flatten(0, 1)), m.encode(x)
    for one, all_ in zip(flat, whole):
        assert torch.equal(one.view(4, 5, 3), all_)
    assert torch.allclose(m(x), m(x.flatten(0, 1)).view(4, 5, 6))
    grads = []
    for u in (x, x.flatten(0, 1)):
        m.zero_grad()
        m.decode(*m.encode(u)).square().sum().backward()
        grads.append([p.grad.clone() for p in m.parameters()])
    assert all(torch.allclose(a, b) for a, b in zip(*grads))
    for wrong in (x[..., :5], x[..., :3], torch.cat([x, x], -1), x.flatten()):
        for call in (m, m.encode, m.pre_acts):
            with pytest.raises(ValueError, match="where the autoencoder has 6"):
                call(wrong)
    assert m.encode(x, k=0)[0].shape == (4, 5, 0)
    assert m.encode(torch.arange(6))[0].is_floating_point()
    assert m(torch.arange(6)).dtype != torch.long
    assert S.nmse(m, x) == pytest.approx(S.nmse(m, x.flatten(0, 1)))
    assert evals.density(m, x)["densest"] == evals.density(m, x.flatten(0, 1))["densest"]
    with pytest.raises(ValueError, match="where the autoencoder has 6"):
        evals.reconstruction(m, x[..., :3])
    with pytest.raises(ValueError, match="of one shape"):
        S.Sparse(6, 20, 3).decode(torch.ones(4, 3), torch.ones(2, 6, dtype=torch.long))
    with pytest.raises(ValueError if make is S.Sparse else RuntimeError, match="k"):
        m.encode(x, k=21)
    assert m.encode(x[:0])[0].shape == (0, 5, 3)
    relu = make(6, 20, 20).double()
    assert len(relu.encode(x[0, :0])[0]) == 0


def test_gradients_at_zero_and_constant_rows_are_zero():
    x = torch.stack([torch.zeros(5), torch.full((5,), 3.0), torch.tensor([1.0, 2, 0, 1, 7])])
    x = x.double().requires_grad_()
    S.normalize(x)[0].square().mul(torch.arange(5.0)).sum().backward()
    assert (x.grad[:2] == 0).all() and x.grad.isfinite().all() and (x.grad[2] != 0).any()
    assert torch.autograd.gradcheck(lambda v: S.normalize(v)[0], randn(2, 5).requires_grad_())


def test_constant_vectors_are_harmless():
    for value in (0.0, 0.1, 7.7, 1e6):
        u, mean, norm = S.normalize(torch.full((1, 768), value))
        assert (u == 0).all() and norm == 0 and mean.item() == pytest.approx(value)
    assert S.normalize(torch.tensor([[1.0, math.nan, 2.0]]))[0].isnan().all()
    x = torch.tensor([[0.0, 0, 0], [5, 5, 5], [1, 2, 3]])
    m = make_sae(3, 4, 2, dtype=F32)
    assert torch.equal(m(x)[:2], x[:2])  # norm 0: the mean is all there is to reconstruct


# ---------------------------------------------------------------------------------- selection


@st.composite
def rows_to_select(draw):
    n = draw(st.one_of(st.integers(1, 300), st.sampled_from([512, 1024, 4096, 8192])))
    k = draw(st.integers(1, min(n, 40)) if n > 1 else st.just(1))
    kinds = ["normal", "ties", "negative", "mostly_negative", "-inf", "one_group", "constant"]
    kind = draw(st.sampled_from(kinds))
    x = randn(draw(st.integers(1, 5)), n, seed=draw(seeds), dtype=F32)
    if kind == "ties":
        x = x.mul(1.5).round()
    elif kind == "negative":
        x = -x.abs() - 0.5
    elif kind == "mostly_negative":
        x = torch.where(x > 2.5, x, -x.abs() - 1)
    elif kind == "-inf":
        x[:, 1::2] = -math.inf
    elif kind == "one_group":
        x[:, : min(n, 64)] += 100
    elif kind == "constant":
        x = torch.zeros_like(x)
    return x.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))), k


@settings(max_examples=200)
@given(rows_to_select())
def test_topk_is_exact(case):
    x, k = case
    values, indices = S.topk(x, k)
    assert values.shape == indices.shape == (len(x), k)
    assert torch.equal(x.gather(-1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())
    assert torch.equal(values.sort(-1, descending=True).values, x.topk(k).values)


def test_topk_takes_the_fast_path_and_any_leading_shape():
    x = randn(2, 3, 16384, seed=1, dtype=torch.bfloat16)
    values, indices = S.topk(x, 5)
    assert values.shape == (2, 3, 5)
    assert torch.equal(values.sort(-1, descending=True).values, x.topk(5).values)
    x[0, 0] = -x[0, 0].abs()  # this row alone must leave the integer shortcut
    assert torch.equal(S.topk(x, 5)[0].sort(-1, descending=True).values, x.topk(5).values)


# ---------------------------------------------------------------------------------- gradients


@given(sizes(), seeds)
def test_sparse_operations_equal_dense_ones(size, seed):
    d, n, k, B = size
    indices = torch.randint(n, (B, k), generator=gen(seed))  # repeats within a row are allowed
    values, W, G = randn(B, k, seed=seed), randn(n, d, seed=seed + 1), randn(B, d, seed=seed + 2)
    code = to_dense(values, indices, n)
    support = S.Support(indices, n)
    assert torch.allclose(support.gather_sum(values, W), code @ W)
    assert torch.allclose(support.gather_dot(G, W), (G @ W.T).gather(1, indices))
    assert torch.allclose(support.scatter_sum(values, G), code.T @ G)


# The Triton kernels against their twins: compiled on a GPU, else in Triton's interpreter.

needs_triton = pytest.mark.skipif(S.triton is None, reason="Triton is not installed")
CORNERS = [(1, 1, 1, 1), (3, 7, 2, 5), (5, 70, 9, 19), (2, 33, 33, 3), (3, 40, 5, 260)]


@needs_triton
@pytest.mark.parametrize("B, n, k, d", CORNERS)
def test_sparse_kernels_equal_their_twins(B, n, k, d):
    values, W, G = (randn(*shape, dtype=F32).to(DEVICE) for shape in ((B, k), (n, d), (B, d)))
    some, same = torch.randint(0, n, (B, k), generator=gen(1)), torch.full((B, k), n - 1)
    for indices in (some, same):
        indices = indices.to(DEVICE)
        close = lambda a, b: torch.allclose(a, b, atol=1e-5 * (1 + b.abs().max().item()))
        assert close(S.gather_sum_kernel(values, indices, W), S.gather_sum_twin(values, indices, W))
        assert close(S.gather_dot_kernel(G, W, indices), S.gather_dot_twin(G, W, indices))
        pairs = values.flatten(), *S.Support(indices, n).by_latent, G, k
        assert close(S.scatter_sum_kernel(*pairs), S.scatter_sum_twin(*pairs))
        in_pieces = S.scatter_sum_kernel(*pairs, piece=3)  # every latent in several
        assert close(in_pieces, S.scatter_sum_twin(*pairs))


@needs_triton
@given(st.integers(1, 3), st.integers(1, 150), st.integers(1, 20),
       st.sampled_from([torch.float32, torch.bfloat16]), seeds,
       st.sampled_from(["plain", "ties", "negative", "huge", "-inf", "zero"]))
@settings(max_examples=15)
def test_topk_kernel_is_exact(B, n, k, dtype, seed, kind):
    k, x = min(k, n), randn(B, n, seed=seed, dtype=F32)
    x = {"plain": x, "ties": x.round(), "negative": -x.abs() - 1, "huge": x * 1e38,
         "-inf": torch.where(x > 0, x, -math.inf), "zero": x * 0}[kind]
    x = x.to(dtype).to(DEVICE)
    values, indices = S.topk_kernel(x, k)
    assert torch.equal(values.sort(1).values, x.topk(k).values.sort(1).values)
    assert torch.equal(x.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


@needs_triton
def test_topk_kernel_over_many_groups():
    x = randn(2, 5000, dtype=F32).to(DEVICE)
    for k in (1, 40, 300):
        assert torch.equal(S.topk_kernel(x, k)[0].sort(1).values, x.topk(k).values.sort(1).values)


COMPILE = """
import sae as S, triton
from triton.backends.compiler import GPUTarget
def compiled(fn, const, **kinds):
    kind = {name: "constexpr" if name in const else kinds.get(name, "i32") for name in fn.arg_names}
    values = {(fn.arg_names.index(name),): v for name, v in const.items()}
    source = triton.compiler.ASTSource(fn=fn, signature=kind, constexprs=values)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
f, i = "*fp32", "*i64"
for x, bits in (("*bf16", 16), (f, 32)):
    compiled(S._topk, dict(BITS=bits, GROUP=32, STEP=32, M=64, K=8), x=x, out_values=x,
             out_indices=i, maxima="*i32", chosen="*i32")
compiled(S._gather_sum, dict(J=8, D=256), values=f, indices=i, W=f, out=f)
compiled(S._gather_dot, dict(J=8, D=256), G=f, W=f, indices=i, out=f)
compiled(S._scatter_sum, dict(PIECE=128, J=8, D=256), values=f, order=i, starts=i, pieces=i,
         latent_of=i, G=f, out=f, parts=f)
compiled(S._sum_parts, dict(D=256), pieces=i, out=f, parts=f)
"""


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="they are run here anyway")
def test_kernels_compile_for_a_gpu_that_is_not_here():
    """To machine code for compute capability 9.0 (H100, H200). Nothing is run."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    r = python("-c", COMPILE, cwd=HERE, env=env)
    if re.search("(Import|Attribute|Type)Error.*(GPUTarget|ASTSource)", r.stderr):
        pytest.skip("this Triton has another interface to its compiler")
    assert r.returncode == 0, r.stderr


@needs_triton
def test_loss_and_gradients_on_the_kernels(monkeypatch):
    """Both passes with kernels in place of twins: selection, decode, AuxK, all four gradients."""
    m = make_sae(7, 40, 3, dtype=F32).to(DEVICE)
    u = S.normalize(randn(5, 7, dtype=F32))[0].to(DEVICE)

    def gradients(use):
        monkeypatch.setattr(S, "fused", lambda x: use)
        m.zero_grad()
        return fast(m, u, 0.1, torch.tensor([3, 9, 20], device=DEVICE), 2, 1 / 32)

    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients(True), gradients(False)))


@given(sizes(), seeds)
def test_sparse_decode_gradients(size, seed):
    d, n, k, B = size
    indices = torch.randint(n, (B, k), generator=gen(seed))
    values, W = randn(B, k, seed=seed).requires_grad_(), randn(n, d, seed=seed + 1).requires_grad_()
    g = randn(B, d, seed=seed + 2)
    ours = torch.autograd.grad(S.sparse_decode(values, indices, W), (values, W), g)
    twin = torch.autograd.grad((values[..., None] * W[indices]).sum(1), (values, W), g)
    assert all(torch.allclose(a, b) for a, b in zip(ours, twin))


@given(sizes(), seeds)
def test_sparse_encode_values_and_gradients(size, seed):
    d, n, k, B = size
    m = make_sae(d, n, k, seed)
    u = S.normalize(randn(B, d, seed=seed + 1))[0].requires_grad_()
    values, indices = m.encode(u)
    dense = dense_code(m.pre_acts(u), k)
    assert (values >= 0).all() and ((values > 0).sum(1) <= k).all()
    assert torch.allclose(to_dense(values, indices, n), dense)
    g = randn(B, n, seed=seed + 2)
    wanted = [u, m.W_enc, m.b_enc, m.b_pre]
    ours = torch.autograd.grad((values * g.gather(1, indices)).sum(), wanted)
    twin = torch.autograd.grad((dense * g).sum(), wanted)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, twin))


def step_of(m, dead, k_aux, alpha):
    """AuxK of a step in which `dead` are known to be dead."""
    n_dead = len(dead)
    silent = torch.zeros(m.n_latents, dtype=torch.long, device=dead.device).index_fill_(0, dead, 9)
    cfg = SimpleNamespace(k_aux=k_aux, aux_coef=alpha, dead_tokens=8)
    return S.AuxK(SimpleNamespace(cfg=cfg, sae=m, silent=silent, n_dead=n_dead, own_dead=n_dead))


def fast(m, u, c, dead, k_aux, alpha, multi=False):
    """[NMSE, then the gradients of the whole objective], as a step of training finds them."""
    m.zero_grad()
    aux = step_of(m, dead, k_aux, alpha)
    loss, nmse, e, *_ = S.losses(m, u, c, aux, multi)
    loss.backward()
    variance, square = (e - e.mean(0)).square().mean(), e.square().mean()
    aux.add(alpha * S.one_over(variance, square, e), lambda rows: rows)
    return [nmse, *(p.grad.clone() for p in m.parameters())]


def oracle(m, u, c, dead, k_aux, alpha, multi=False):
    """The same from `objective`, by plain autograd."""
    p = plain(m)
    loss = S.objective(p, u, c, dead, k_aux, alpha)
    if multi:
        p.k = min(4 * p.k, p.n_latents)
        loss = loss + S.objective(p, u, c, [], 1, 0.0) / 8
    loss.backward()
    return [S.objective(plain(m), u, c, [], 1, 0.0).detach(), *(w.grad for w in p.parameters())]


@given(sizes(), seeds, st.integers(1, 6), st.sampled_from([0.0, 1 / 32, 3.0]))
def test_the_objective_written_out(size, seed, k_aux, alpha):
    """In loops over tokens and latents, as the paper writes it."""
    d, n, k, B = size
    m = plain(make_sae(d, n, k, seed))
    u, c, dead = S.normalize(randn(B, d, seed=seed + 1))[0], 0.3, list(range(0, n, 3))[seed % 2 :]
    w = {name: p.detach().numpy() for name, p in m.named_parameters()}

    def code(row, latents, k):  # -> sum of z_i W_dec[i] over the k largest of `latents`
        pre = {i: float(w["W_enc"][i] @ (row - w["b_pre"]) + w["b_enc"][i]) for i in latents}
        best = sorted(pre, key=pre.get)[-k:]
        return sum((max(pre[i], 0.0) * w["W_dec"][i] for i in best), np.zeros(d))

    rows = u.numpy()
    e = np.stack([row - code(row, range(n), k) - w["b_pre"] for row in rows])
    loss, variance = (e**2).mean() / c, ((e - e.mean(0)) ** 2).mean()
    if dead and variance > 1e-13 * (e**2).mean():
        e_hat = np.stack([code(row, dead, min(k_aux, len(dead))) for row in rows])
        loss += alpha * ((e - e_hat) ** 2).mean() / variance
    dead = torch.tensor(dead, dtype=torch.long)
    assert S.objective(m, u, c, dead, k_aux, alpha).item() == pytest.approx(loss)


@given(sizes(), seeds, st.booleans(), st.integers(1, 6))
def test_loss_and_every_gradient(size, seed, multi, k_aux):
    d, n, k, B = size
    m = make_sae(d, n, k, seed)
    u = S.normalize(randn(B, d, seed=seed + 1))[0]
    case = m, u, 0.3, torch.arange(0, n, 3), k_aux, 1 / 32, multi
    for a, b in zip(fast(*case), oracle(*case)):
        assert torch.allclose(a, b, atol=1e-12)


@given(sizes(), seeds, st.floats(1e-3, 10))
def test_relu_baseline_loss_and_gradients(size, seed, l1):
    d, n, _, B = size
    m, u, scale = make_sae(d, n, n, seed), randn(B, d, seed=seed), 0.3
    loss, nmse, _, values, indices = S.dense_losses(m, u, scale, "relu", l1)
    loss.backward()
    ours = [p.grad.clone() for p in m.parameters()]
    m.zero_grad()
    z = torch.relu((u - m.b_pre) @ m.W_enc.T + m.b_enc)
    error = ((u - z @ m.W_dec - m.b_pre) ** 2).mean() / scale
    (error + l1 * z.sum(1).mean()).backward()
    assert torch.allclose(to_dense(values, indices, n), z) and torch.allclose(nmse, error)
    for a, p in zip(ours, m.parameters()):
        assert torch.allclose(a, p.grad, atol=1e-10 * (1 + p.grad.abs().max().item()))


def test_chunked_encoding_changes_nothing(monkeypatch):
    m, u = make_sae(8, 64, 4), S.normalize(randn(50, 8))[0]
    whole = to_dense(*m.encode(u), 64)
    for tokens in (1, 7, 49):
        monkeypatch.setitem(S.DENSE, "cpu", 64 * tokens)
        assert torch.allclose(to_dense(*m.encode(u), 64), whole)


def test_bf16_product_selects_almost_the_same():
    m, u = make_sae(64, 1024, 8, dtype=F32), S.normalize(randn(200, 64, dtype=F32))[0]
    exact = S.nmse(m, u)
    m.product_dtype = torch.bfloat16
    assert m.encode(u)[0].dtype == torch.float32 and S.nmse(m, u) == pytest.approx(exact, rel=3e-3)


# ---------------------------------------------------------------------------------- initialisation


@given(st.integers(2, 40), st.integers(2, 90), seeds)
def test_initialisation(d, n, seed):
    torch.manual_seed(seed)
    m = S.Sparse(d, n, min(4, n))
    assert torch.equal(m.W_enc, m.W_dec) and torch.allclose(m.W_dec.norm(dim=1), torch.ones(n))
    assert (m.b_enc == 0).all()
    u = S.normalize(randn(64, d, seed=seed, dtype=F32) + 1)[0]
    S.init_from_data(m, u)
    assert torch.allclose(F.normalize(m.W_enc, dim=1), m.W_dec, atol=1e-5)  # tied up to one scale
    assert torch.allclose(m.b_pre, S.geometric_median(u))


def test_initial_scale_reconstructs_norms():
    torch.manual_seed(0)
    m = S.SAE(64, 512, 16)
    S.init_from_data(m, torch.zeros(4, 64) + 0.01)
    fresh = F.normalize(randn(2000, 64, seed=9, dtype=F32), dim=1) + m.b_pre
    norms = (m.decode(*m.encode(fresh)) - m.b_pre).norm(dim=1)
    assert norms.mean().item() == pytest.approx(1, abs=0.03)


@given(st.integers(1, 4), st.integers(1, 12), seeds, st.booleans())
def test_geometric_median_minimises_the_distances(d, n, seed, repeated):
    x = randn(n, d, seed=seed)
    if repeated:  # the median may be a data point, where Weiszfeld's iteration divides by zero
        x = torch.cat([x, x[:1].repeat(n + 1, 1)])
    y = S.geometric_median(x, steps=2000, tol=1e-12)
    cost = lambda p: (x - p).norm(dim=1).sum()
    nearby = y + randn(60, d, seed=seed + 1) * torch.logspace(-4, 0, 60, dtype=x.dtype)[:, None]
    assert all(cost(y) <= cost(p) + 1e-6 for p in [*nearby, *x])


def test_geometric_median_resists_outliers():
    x = randn(200, 5)
    x[:80] += 1e6
    assert S.geometric_median(x).norm() < 20 < x.mean(0).norm()


# ---------------------------------------------------------------------------------- AuxK


def aux_setup():
    m = make_sae(6, 20, 3)
    return m, S.normalize(randn(40, 6))[0]


def test_auxk_is_nothing_without_dead_latents():
    m, u = aux_setup()
    none = torch.empty(0, dtype=torch.long)
    for how in (fast, oracle):
        without, with_ = (how(m, u, 0.3, none, 4, alpha) for alpha in (0.0, 1 / 32))
        assert all(torch.equal(a, b) for a, b in zip(without, with_))
    assert S.auxk(m, u, u, none, 4).item() == 0


@pytest.mark.parametrize("n_dead", [1, 3, 5])
def test_auxk_touches_dead_rows_only_and_reaches_the_encoder(n_dead):
    m, u = aux_setup()
    dead = torch.tensor([2, 7, 11, 13, 19])[:n_dead]
    values, support = m.select(u, 3, dead, min(3, n_dead))[1]
    expected = dense_code(m.pre_acts(u)[:, dead], min(3, n_dead))
    assert torch.allclose(to_dense(values, support.indices, n_dead), expected)
    for how in (fast, oracle):
        with_, without = (how(m, u, 0.3, dead, 3, alpha)[1:] for alpha in (1 / 32, 0.0))
        live = torch.ones(20, dtype=torch.bool)
        live[dead] = False
        for (name, _), a, b in zip(m.named_parameters(), with_, without):
            assert torch.equal(a, b) if name == "b_pre" else (
                torch.equal(a[live], b[live]) and (a - b)[dead].abs().sum() > 0), name


def test_auxk_of_a_constant_residual_is_zero_not_nan():
    m, u = aux_setup()
    for dtype in (torch.float32, torch.float64):
        residual = torch.full_like(u, 0.3, dtype=dtype)
        loss = S.auxk(m.to(dtype), u.to(dtype), residual, torch.arange(5), 3)
        loss.backward()
        gradients = [p.grad for p in m.parameters() if p.grad is not None]
        assert loss.item() == 0 and all(g.isfinite().all() for g in gradients)
        m.zero_grad()


def test_a_residual_of_rounding_is_no_signal():
    """Where the live latents reconstruct all of u, the dead ones get no gradient."""
    m = S.Sparse(8, 40, 1).double()
    with torch.no_grad():
        rows = randn(8, 8)
        m.W_dec[:8] = F.normalize(rows - rows.mean(1, keepdim=True), dim=1)
        m.W_enc.copy_(m.W_dec)
        m.W_enc[8:] *= 0.6
    u, dead = m.W_dec[:8].detach().repeat(3, 1), torch.arange(8, 40)
    grads, plain_grads = (how(m, u, 0.1, dead, 4, 1 / 32) for how in (fast, oracle))
    assert 0 < grads[0] < 1e-25 and all(g[8:].abs().max() == 0 for g in grads[1:3])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(grads, plain_grads, strict=True))


# ----------------------------------------------------------------------------- the model as a whole


@given(sizes(), seeds)
def test_latents_can_be_permuted(size, seed):
    d, n, k, B = size
    m, x = make_sae(d, n, k, seed), randn(B, d, seed=seed)
    other, order = make_sae(d, n, k, seed), torch.randperm(n, generator=gen(seed))
    with torch.no_grad():
        for p in (other.W_enc, other.W_dec, other.b_enc):
            p.copy_(p[order])
    assert torch.allclose(m(x), other(x), atol=1e-10)


@given(st.floats(0.01, 100), st.floats(-50, 50))
def test_reconstruction_follows_scale_and_shift_of_the_input(scale, shift):
    m, x = make_sae(9, 30, 4), randn(7, 9)
    assert torch.allclose(m(x * scale + shift), m(x) * scale + shift, rtol=1e-6, atol=1e-6)


def test_k_equal_n_is_a_relu_autoencoder():
    m, u = make_sae(6, 25, 25), S.normalize(randn(10, 6))[0]
    values, indices = m.encode(u)
    assert values.shape[1] == (m.pre_acts(u) > 0).sum(1).max()
    assert torch.allclose(m.decode(values, indices), m.pre_acts(u).relu() @ m.W_dec + m.b_pre)


def test_only_data_is_saved_and_all_of_it_can_be_loaded(tmp_path):
    """What torch.load would refuse is made plain, or refused before anything is trained."""
    meta = {"path": tmp_path, "n": np.int64(3), "loss": np.float32(0.5),
            "list": (1, torch.ones(())), "unknown": math.nan, 7: "number"}
    cfg = dataclasses.replace(tiny_config(tmp_path), out=tmp_path / "run", lr=np.float32(2**-9))
    S.train(cfg, planted_batches, meta=meta)
    saved = S.SAE.load(tmp_path / "run/sae.pt").meta
    assert [saved[name] for name in [*meta][:4]] == [str(tmp_path), 3, 0.5, [1, 1.0]]
    assert math.isnan(saved["unknown"]) and saved["7"] == "number"
    S.train(dataclasses.replace(cfg, resume=True), planted_batches, meta=meta)
    for bad in (datetime.date.today(), torch.ones(3), S, {(1, 2): 3}):
        with pytest.raises(ValueError, match="only numbers, texts, lists and dicts can be saved"):
            S.train(tiny_config(tmp_path / "bad"), planted_batches, meta={"x": bad})
    assert not (tmp_path / "bad").exists()
    sae = S.SAE(4, 8, 2)
    sae.meta = {"x": {1, 2}}
    with pytest.raises(ValueError, match="can be saved: {1, 2} is none of them"):
        sae.save(tmp_path / "x.pt")
    S.SAE(4, 8, 2).double().save(tmp_path / "x.pt")
    assert S.SAE.load(tmp_path / "x.pt").W_dec.dtype == torch.float64
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    for change, said in (({"sae": None}, "neither|is not whole"), ({"sae": {}}, "is not whole"),
                         ({"state": {}}, "is not whole")):
        torch.save(saved | change, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=said):
            S.SAE.load(tmp_path / "other.pt")
    torch.save({"state": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="neither an autoencoder"):
        S.SAE.load(tmp_path / "other.pt")


def test_save_and_load(tmp_path):
    m, x = make_sae(6, 25, 3, dtype=F32), randn(10, 6, dtype=F32)
    m.meta = {"layer": 2}
    m.save(tmp_path / "sae.pt")
    again = S.SAE.load(tmp_path / "sae.pt")
    assert torch.equal(again(x), m(x)) and again.meta == m.meta and again.k == 3
    for junk in (b"", b"not a zip", (tmp_path / "sae.pt").read_bytes()[:500]):
        (tmp_path / "junk.pt").write_bytes(junk)
        with pytest.raises(ValueError, match="not a readable file"):
            S.SAE.load(tmp_path / "junk.pt")
    torch.save({"something": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="neither"):
        S.SAE.load(tmp_path / "other.pt")


@pytest.mark.parametrize("kind", ["TopK", "ReLU"])
def test_openai_conversion(kind, tmp_path):
    d, n, k = 24, 96, 5
    shapes = (n, d), (d, n), (n,), (d,)
    W_enc, W_dec, b, pre = (randn(*s, seed=i, dtype=F32) for i, s in enumerate(shapes))
    state = {"pre_bias": pre, "encoder.weight": W_enc, "latent_bias": b, "decoder.weight": W_dec,
             "stats_last_nonzero": torch.zeros(n), "activation": kind}
    if kind == "TopK":
        state["activation_state_dict"] = {"k": k, "postact_fn": "ReLU"}
    torch.save(state, tmp_path / "8.pt")
    x = 30 * randn(50, d, seed=9, dtype=F32) + 3
    # model.py of openai/sparse_autoencoder, written out
    if kind == "TopK":
        mu = x.mean(-1, keepdim=True)
        std = (x - mu).std(-1, keepdim=True)
        z = dense_code(((x - mu) / (std + 1e-5) - pre) @ W_enc.T + b, k)
        theirs = (z @ W_dec.T + pre) * std + mu
    else:
        theirs = ((x - pre) @ W_enc.T + b).relu() @ W_dec.T + pre
    assert torch.allclose(S.SAE.load(tmp_path / "8.pt")(x), theirs, rtol=1e-4, atol=1e-3)


# ---------------------------------------------------------------------------------- training


def tiny_config(tmp_path, **kw):
    base = dict(n_latents=64, k=4, batch=64, tokens=64 * 40, lr=3e-3, dead_tokens=300,
                out=str(tmp_path / "run"), device="cpu", precision="fp32")
    return S.resolve(S.Config(**base | kw), 16, 64 * 40)


def planted(n, d=16, n_true=40, seed=0):
    """Activations made of a few sparse directions each."""
    D = F.normalize(randn(n_true, d, seed=99, dtype=F32), dim=1)
    on = torch.rand(n, n_true, generator=gen(seed + 1)) < 0.08
    z = torch.rand(n, n_true, generator=gen(seed)) * on
    return z @ D + 0.01 * randn(n, d, seed=seed, dtype=F32)


def newest(out):
    return sorted(Path(out).glob("checkpoint-*[0-9]"))[-1]


def planted_batches(step):
    while True:
        yield planted(64, seed=step)
        step += 1


def make_trainer(tmp_path, **kw):
    cfg = tiny_config(tmp_path, **kw)
    torch.manual_seed(0)
    m = S.Sparse(16, cfg.n_latents, cfg.k)
    u = S.normalize(planted(512))[0]
    S.init_from_data(m, u)
    return S.Trainer(cfg, m, (u - u.mean(0)).square().mean().item())


@pytest.mark.parametrize("kw", [{}, {"clip": 0.01}, {"multi_topk": True}, {"dead_tokens": 64},
                                {"l1": 0.1}])
def test_invariants_hold_after_every_step(tmp_path, kw):
    t = make_trainer(tmp_path, **kw)
    for _, x in zip(range(12), planted_batches(0)):
        before = t.sae.W_dec.detach().clone()
        info = t.step(x)
        assert torch.allclose(t.sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-6)
        radial = torch.linalg.vecdot(t.sae.W_dec.grad, before).abs()
        assert (radial <= 1e-6 * (1 + t.sae.W_dec.grad.norm(dim=1))).all()
        assert info["l0"] <= (64 if kw.get("l1") else 4)
        if "clip" in kw:
            assert math.sqrt(sum(p.grad.norm() ** 2 for p in t.params)) <= 0.01 * (1 + 1e-5)


def test_a_step_is_adam_on_the_projected_gradient(tmp_path):
    t = make_trainer(tmp_path)
    t = S.Trainer(t.cfg, t.sae.double(), t.c)
    p = {name: w.detach().clone() for name, w in t.sae.named_parameters()}
    ref, x = plain(t.sae), planted(64, seed=5).double()
    S.objective(ref, S.normalize(x)[0], t.c, [], 1, 0.0).backward()
    t.step(x)
    for name, w in ref.named_parameters():
        g = w.grad
        if name == "W_dec":
            g = g - (g * p[name]).sum(1, keepdim=True) * p[name]
        new = p[name] - t.cfg.lr * g / (g.abs() + 6.25e-10)  # Adam's first step, bias-corrected
        if name == "W_dec":
            new = new / new.norm(dim=1, keepdim=True)
        # Where a gradient is nothing but rounding its sign is not determined.
        settled = (g == 0) | (g.abs() > 1e-15)
        ours = dict(t.sae.named_parameters())[name]
        assert torch.allclose(ours[settled], new[settled], rtol=0, atol=1e-8), name
        assert settled.double().mean() > 0.9


@pytest.mark.parametrize("parts", [1, 4])
def test_a_step_has_the_gradient_of_the_objective(tmp_path, parts):
    """All of it, AuxK's weight included, whatever the parts of the batch."""
    t = make_trainer(tmp_path, accumulate=parts, k_aux=4)
    t = S.Trainer(t.cfg, t.sae.double(), t.c)
    dead, x = torch.arange(0, 64, 5), planted(64, seed=5).double()
    t.silent[dead] = 10**6
    t.n_dead = t.own_dead = len(dead)
    before = plain(t.sae)
    S.objective(before, S.normalize(x)[0], t.c, dead, 4, 1 / 32).backward()
    t.step(x)
    for (name, p), w in zip(t.sae.named_parameters(), before.parameters(), strict=True):
        g = w.grad
        if name == "W_dec":
            g = g - (g * w).sum(1, keepdim=True) * w
        assert torch.allclose(p.grad, g, rtol=0, atol=1e-14), name


@pytest.mark.parametrize("dense, expected", [(True, 1), (False, 2)])  # AuxK's too, if not dense
def test_both_weight_gradients_share_one_order(monkeypatch, dense, expected):
    m, u, sorts = make_sae(5, 60, 3), S.normalize(randn(9, 5))[0], []
    monkeypatch.setattr(S.Support, "dense", property(lambda self: dense and self.n == 2))
    counted = lambda *a, _sort=torch.Tensor.sort, **k: sorts.append(1) or _sort(*a, **k)
    monkeypatch.setattr(S.torch.Tensor, "sort", counted)
    fast(m, u, 0.1, torch.tensor([1, 2]), 2, 1 / 32)
    assert len(sorts) == expected


@given(sizes(), seeds)
def test_dense_products_where_the_code_is_not_sparse(size, seed):
    d, n, k, B = size
    values, W, G = randn(B, k), randn(n, d, seed=1), randn(B, d, seed=2)
    indices = torch.randint(0, n, (B, k), generator=gen(seed))
    results = []
    for dense in (False, True):
        with pytest.MonkeyPatch.context() as mp:
            mp.setattr(S.Support, "dense", dense)
            support = S.Support(indices, n)
            results.append((support.gather_sum(values, W), support.gather_dot(G, W),
                            support.scatter_sum(values, G)))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*results))


def test_the_dead_are_known_without_waiting(tmp_path):
    t = make_trainer(tmp_path, dead_tokens=64)
    for _, x in zip(range(12), planted_batches(0)):
        dead = t.step(x)["dead"]
        assert dead == t.n_dead == int((t.silent > 64).sum())


def test_ema_is_bias_corrected(tmp_path):
    t = make_trainer(tmp_path, ema=0.9)
    seen = []
    for _, x in zip(range(5), planted_batches(0)):
        t.step(x)
        seen.append(t.sae.W_enc.detach().clone())
    weights = torch.tensor([0.9 ** (4 - i) for i in range(5)])
    expected = sum(w * s for w, s in zip(weights / weights.sum(), seen))
    average = t.averaged()
    assert torch.allclose(average.W_enc, expected, atol=1e-6)
    assert torch.allclose(average.W_dec.norm(dim=1), torch.ones(64), atol=1e-6)


def test_dead_counters_count_tokens_of_training_only(tmp_path):
    t = make_trainer(tmp_path)
    x = planted(64)
    t.step(x)
    values, indices = make_trainer(tmp_path).sae.encode(S.normalize(x)[0])
    fired = torch.zeros(64, dtype=torch.bool)
    fired[indices[values > 0]] = True
    assert torch.equal(t.silent, torch.where(fired, 0, 64))
    before = t.silent.clone()
    S.nmse(t.sae, x)
    t.sae(x)
    assert torch.equal(t.silent, before)


def test_auxk_revives_dead_latents(tmp_path):
    def dead_after(aux_coef):
        t = make_trainer(tmp_path, aux_coef=aux_coef, dead_tokens=256, k_aux=8)
        with torch.no_grad():
            t.sae.b_enc[:32] = -0.5
        for _, x in zip(range(150), planted_batches(0)):
            info = t.step(x)
        return int(info["dead"])

    assert dead_after(0.0) >= 30 and dead_after(1 / 32) < 16


def test_training_learns(tmp_path):
    cfg = tiny_config(tmp_path, tokens=64 * 300)
    val = planted(1000, seed=10**6)
    m = S.train(cfg, planted_batches, val, {"layer": 1})
    untrained = make_trainer(tmp_path).sae
    assert S.nmse(m, val) < 0.5 * S.nmse(untrained, val)
    weights, nmse = m.meta["weights"], m.meta["nmse"]
    assert weights in ("raw", "ema") and nmse[weights] == min(nmse.values())
    assert S.nmse(m, val) == pytest.approx(min(nmse.values()), rel=1e-5)
    log = read_log(cfg.out)
    assert log[-1]["step"] == 300 and log[-1]["val_nmse"] < log[0]["nmse"]
    with pytest.raises(ValueError, match="already holds a run"):
        S.train(cfg, planted_batches, val)


def test_a_program_can_have_the_log(tmp_path, capsys):
    lines = []
    cfg = tiny_config(tmp_path)
    S.train(cfg, planted_batches, planted(100), log=lines.append)
    assert [line["step"] for line in lines] == list(range(1, 41)) and lines[-1]["seconds_left"] == 0
    assert {"nmse", "l0", "dead", "val_nmse", "tokens_per_s"} < set(lines[-1])
    assert "step |" not in capsys.readouterr().err
    S.train(dataclasses.replace(cfg, out=cfg.out + "2"), planted_batches, planted(100))
    assert "step |" in capsys.readouterr().err


@given(seeds, st.integers(1, 39), st.booleans())
@settings(max_examples=8)
def test_stop_and_resume_gives_the_same_bits(tmp_path_factory, seed, stop_after, multi_topk):
    tmp = tmp_path_factory.mktemp("resume")
    options = dict(seed=seed, dead_tokens=200, multi_topk=multi_topk)
    whole = S.train(tiny_config(tmp / "a", **options), planted_batches, planted(100))
    cfg, step = tiny_config(tmp / "b", **options), S.Trainer.step

    def step_then_stop(trainer, x, **wishes):
        info = step(trainer, x, **wishes)
        if trainer.steps == stop_after:
            signal.raise_signal(signal.SIGTERM)
        return info

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(S.Trainer, "step", step_then_stop)
        S.train(cfg, planted_batches, planted(100))
    again = S.train(dataclasses.replace(cfg, resume=True), planted_batches, planted(100))
    assert same_weights(whole, again)
    steps = [[line["nmse"] for line in read_log(tmp / r / "run")] for r in "ab"]
    assert steps[0] == steps[1]


def test_resume_refuses_another_configuration(tmp_path):
    cfg = tiny_config(tmp_path)
    S.train(cfg, planted_batches, planted(100))
    with pytest.raises(ValueError, match="lr: 0.003 there, 0.1 now"):
        S.train(dataclasses.replace(cfg, resume=True, lr=0.1), planted_batches)
    elsewhere = dataclasses.replace(cfg, resume=True, out=str(tmp_path / "none"))
    m = S.train(elsewhere, planted_batches)  # nothing there: it begins
    assert m.meta["tokens"] == 64 * 40
    for folder in Path(cfg.out).glob("checkpoint*"):
        shutil.rmtree(folder)
    nothing = "nothing to resume: there is no checkpoint in .*; choose another --out"
    with pytest.raises(ValueError, match=nothing):
        S.train(dataclasses.replace(cfg, resume=True), planted_batches)


def test_resume_refuses_other_data_and_damaged_checkpoints(tmp_path):
    cfg = tiny_config(tmp_path, tokens=64 * 600)

    def ends(step):
        yield from [planted(64)] * 550

    with pytest.raises(ValueError, match="ended after step 550 of 600"):
        S.train(cfg, ends)
    assert newest(cfg.out).name == "checkpoint-000000550"
    cfg = tiny_config(tmp_path / "b")
    S.train(cfg, planted_batches, planted(100), {"layer": 1})
    cfg = dataclasses.replace(cfg, resume=True)
    with pytest.raises(ValueError, match="other activations .layer: 1 there, 2 now.; give those"):
        S.train(cfg, planted_batches, planted(100), {"layer": 2})
    for file in Path(cfg.out).glob("checkpoint*/*.pt"):  # of a build that knew neither
        saved = torch.load(file, weights_only=True)
        saved["config"] = {n: v for n, v in saved["config"].items()
                           if n not in ("activation", "prefixes")}
        torch.save(saved, file)
    S.train(cfg, planted_batches, planted(100), {"layer": 1})
    t = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="width 17, the autoencoder 16"):
        t.step(torch.zeros(3, 17))
    for checkpoint in Path(cfg.out).glob("checkpoint*/*.pt"):
        checkpoint.write_bytes(checkpoint.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="nothing to resume: .*0000.pt is not a readable file"):
        S.train(cfg, planted_batches, planted(100))


def test_data_of_the_wrong_shape_or_none_are_refused(tmp_path):
    x = planted(64)
    same = lambda batch: lambda step: itertools.repeat(batch)
    cfg = tiny_config(tmp_path)
    for batch, said in ((x[:40], r"shape \(64, d\), not \(40, 16\)"), (x[0], "not .16,"),
                        (x.numpy(), "not ndarray"), (torch.zeros_like(x), "are alike"),
                        (torch.ones_like(x), "are alike"), (x * math.nan, "NaN or Inf")):
        with pytest.raises(ValueError, match=said):
            S.train(cfg, same(batch))
    with pytest.raises(ValueError, match="have widths .8, 16."):
        S.train(cfg, [x, x[:, :8]])
    for val in (x[:, :3], x[:0], x[0], x * math.nan):
        with pytest.raises(ValueError, match="val must be|are tensors of|not enough"):
            S.train(cfg, planted_batches, val)
    with pytest.raises(ValueError, match="give what `resolve` returns"):
        S.train(S.Config(), planted_batches)


def test_training_leaves_the_global_random_numbers_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    S.train(tiny_config(tmp_path), planted_batches)
    assert torch.equal(torch.rand(3), expected)


def test_a_finished_run_goes_on_to_more_tokens(tmp_path):
    long = tiny_config(tmp_path / "long", tokens=64 * 60)
    short = dataclasses.replace(long, tokens=64 * 20, out=str(tmp_path / "short"))
    whole = S.train(long, planted_batches, meta={"tokens_sha256": "a"})
    S.train(short, planted_batches, meta={"tokens_sha256": "a"})
    more = dataclasses.replace(long, out=short.out, resume=True)
    again, other = dataclasses.replace(short, resume=True), {"tokens_sha256": "b"}
    with pytest.raises(ValueError, match="tokens_sha256: a there, b now"):
        S.train(again, planted_batches, meta=other)
    assert same_weights(whole, S.train(more, planted_batches, meta=other))
    with pytest.raises(ValueError, match="has seen more than these 1,280 tokens"):
        S.train(again, planted_batches)


def test_the_default_name_holds_what_differs_from_the_defaults():
    name = lambda *argv: Path(S.parse_config([*map(str, argv)])[1].out).name
    assert name() == name("--device", "cpu", "--minutes", 1) == "n32768_k32"
    assert name("--k", 4, "--lr", 1e-3, "--multi_topk") == "n32768_k4_lr_0.001_multi_topk"
    assert name("--tokens", 5000) == "n32768_k32"  # to which a run may go on
    assert name("--l1", 0.125) == "n32768_l1_0.125" and name("--aux_coef", 0).endswith("aux_coef_0")
    assert name("--acts", "../a b/c") == "n32768_k32_acts_..-a-b-c"
    fields = [f for f in dataclasses.fields(S.Config) if f.name not in S.UNNAMED]
    every = {name("--" + f.name, *[] if f.type is bool else [7]) for f in fields}
    assert len(every | {"n32768_k32"}) == len(fields) + 1


def test_a_bad_batch_stops_training_with_its_step(tmp_path):
    def bad(step):
        yield from [planted(64)] * 512
        yield torch.full((64, 16), math.nan)

    with pytest.raises(ValueError, match="loss is nan at step 513"):
        S.train(tiny_config(tmp_path, tokens=64 * 600), bad)
    assert not (tmp_path / "run/sae.pt").exists()


@given(st.integers(1000, 10**9), st.sampled_from([2**10, 2**15, 2**20]))
def test_defaults_reach_the_papers_at_its_scale(tokens, n):
    c = S.resolve(S.Config(n_latents=n), 768, tokens) if tokens >= 1024 else None
    if c is None:
        return
    assert 1024 <= c.batch <= 2**17 and c.ema <= 0.999 and c.dead_tokens <= 10**7
    assert c.dead_tokens >= min(10**7, 40 * n // 32)  # a latent's turn comes every n / k tokens
    assert c.k_aux == (256 if c.dead_tokens == 10**7 else 32)
    assert c.lr >= 1e-4 * math.sqrt(32768 / n) * 0.999
    paper = S.resolve(S.Config(), 768, 40_000 * 131_072)
    chosen = paper.batch, paper.lr, paper.ema, paper.dead_tokens, paper.k_aux
    assert chosen == (131072, 1e-4, 0.999, 10_000_000, 256)


# ---------------------------------------------------------------------------------- many processes


def torchrun(tmp_path, processes, code, *flags, env=(), timeout=180):
    """Run `code` in so many processes, as torchrun does, with T (this file), S (sae.py) and out."""
    script = tmp_path / "worker.py"
    script.write_text("import os, signal, sys, torch\ntorch.set_num_threads(1)\n"
                      f"import sae as S, test_sae as T\nout = {str(tmp_path)!r}\n{code}\n")
    env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1",
           "CUDA_VISIBLE_DEVICES": "", **dict(env)}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return python(*launch, *flags, script, cwd=tmp_path, env=env, timeout=timeout)


DYING = {"dead_tokens": 200, "k_aux": 4, "clip": 0.05}
MESH_CASES = [
    (torch.float64, {}, False, 1e-9),
    (torch.float64, DYING, True, 1e-9),  # the dead are all on the first shard, or on some
    (torch.float64, {"dead_tokens": 200, "k_aux": 32, "multi_topk": True, "accumulate": 2},
     True, 1e-9),
    (torch.float64, {"multi_topk": True, "k": 16}, False, 1e-9),  # 4 k = n
    (torch.float32, DYING, True, 1e-5),
]


def some_steps(mesh, dtype, options, silence):
    cfg = tiny_config(Path("nowhere"), shards=mesh.shards, **options)
    torch.manual_seed(0)
    m, own = mesh.sae(16, 64, cfg.k).to(dtype), mesh.part(64)
    u = S.normalize(planted(512).to(dtype))[0]
    S.init_from_data(m, u)
    if silence:
        with torch.no_grad():
            m.b_enc[[i - own.start for i in own if i < 20]] = -0.5  # silent, but at times above 0
    t = mesh.trainer(cfg, m, (u - u.mean(0)).square().mean().item())
    for step in range(12):
        info = t.step(planted(64, seed=step).to(dtype).chunk(mesh.replicas)[mesh.replica])
    said = torch.tensor([float(info[name]) for name in ("nmse", "l0", "dead")])
    return t.state()["tensors"] | {"info": said}


@pytest.mark.parametrize("processes, shards", [(2, (1, 2)), (4, (1, 2, 4))])
def test_every_mesh_gives_the_weights_of_one_process(tmp_path, processes, shards):
    code = f"""
for shards in {shards}:
    mesh = S.Mesh.join(shards)
    for i, case in enumerate(T.MESH_CASES):
        tensors = T.some_steps(mesh, *case[:3])
        torch.save(tensors, f"{{out}}/{{i}}.{{shards}}.{{mesh.replica}}.{{mesh.shard}}")
mesh.leave()"""
    result = torchrun(tmp_path, processes, code)
    assert result.returncode == 0, result.stderr
    for i, (dtype, options, silence, tolerance) in enumerate(MESH_CASES):
        options = options | {"accumulate": 1}
        alone, without = (some_steps(S.ALONE, dtype, options | {"aux_coef": a}, silence)
                          for a in (1 / 32, 0.0))
        assert alone["info"][2] >= 20 * silence
        assert not silence or (alone["W_enc"] - without["W_enc"]).abs().max() > 1e-3  # AuxK is felt
        for n_shards in shards:
            for replica in range(processes // n_shards):
                files = [f"{i}.{n_shards}.{replica}.{shard}" for shard in range(n_shards)]
                parts = [torch.load(tmp_path / file) for file in files]
                for name, whole in alone.items():
                    each = [part[name] for part in parts]
                    joined = each[0] if name.startswith(("b_pre", "info")) else torch.cat(each)
                    atol = tolerance if name != "info" else 1e-4
                    assert torch.allclose(joined, whole, rtol=0, atol=atol), (n_shards, i, name)
                assert all(torch.equal(part["b_pre"], parts[0]["b_pre"]) for part in parts)


@given(sizes(), seeds, st.integers(2, 4))
def test_shards_keep_exactly_the_global_top_k(size, seed, shards):
    """Ties included: k survive, the same on every shard."""
    _, n, k, B = size
    values = torch.randint(0, 4, (shards, B, min(k, n)), generator=gen(seed)).float()
    padded = [F.pad(v, (0, k - v.shape[1]), value=-math.inf) for v in values]
    kept = []
    for shard in range(shards):
        mesh = S.Mesh()
        mesh.shards, mesh.shard = shards, shard
        mesh.all_gather = lambda x, over, dim: torch.cat(padded, dim)
        kept.append(S.Shard(2, shards * n, k, mesh).keep(values[shard], k))
    kept, everyone = torch.cat(kept, 1), torch.cat(list(values), 1)
    largest = lambda x: x.sort(1, descending=True).values[:, :k]
    assert torch.equal(largest(kept), largest(everyone))
    assert ((kept > 0).sum(1) <= k).all()


def shares(mesh):
    """Each process reads its own share of every planted batch."""
    return lambda step: (x.chunk(mesh.world)[mesh.rank] for x in planted_batches(step))


KILLED_RUN = """
mesh, restarts = S.Mesh.join(2), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
step = S.Trainer.step
def step_or_die(trainer, x, **wishes):
    mine = mesh.shard == restarts % 2
    if mine and restarts < len(kill_at) and trainer.steps == kill_at[restarts]:
        T.Path(out, f"shard {{mesh.shard}} died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer, x, **wishes)
S.Trainer.step = step_or_die
for name, kill_at in {!r}:
    cfg = T.tiny_config(T.Path(out), out=out + "/" + name, tokens=64 * 40, minutes=0.0, shards=2)
    S.train(cfg, T.shares(mesh), T.planted(100), mesh=mesh)
mesh.leave()
"""


def test_a_killed_process_costs_nothing_but_time(tmp_path):
    """A kill of either shard in 40 steps, restarted each time: an undisturbed run's bits."""
    again = "--max-restarts", "3", "--monitor-interval", "0.1"
    runs = ("killed", [1, 25]), ("calm", [])  # the second in the processes that end the first
    result = torchrun(tmp_path, 2, KILLED_RUN.format(runs), *again)
    assert result.returncode == 0, result.stderr
    assert all((tmp_path / f"shard {shard} died").exists() for shard in (0, 1))
    a, b = (S.SAE.load(tmp_path / name / "sae.pt") for name, _ in runs)
    assert same_weights(a, b)
    logs = [[line["nmse"] for line in read_log(tmp_path / name)] for name, _ in runs]
    assert logs[0] == logs[1] and len(logs[0]) == 40

    # the checkpoint of two shards, on one process and on four
    saved = S.read_checkpoint(newest(tmp_path / "calm"))
    cfg = tiny_config(tmp_path, out=str(tmp_path / "calm"), tokens=64 * 40)
    assert [f.name for f in sorted(newest(tmp_path / "calm").iterdir())] == ["0000.pt", "0001.pt"]
    whole = S.restore(saved, cfg)
    for shard in range(4):
        mesh = S.Mesh()
        mesh.shards, mesh.shard = 4, shard
        part, own = S.restore(saved, cfg, mesh), mesh.part(64)
        for name, tensor in whole.state()["tensors"].items():
            expected = tensor if name.startswith("b_pre") else tensor[own.start : own.stop]
            assert torch.equal(part.state()["tensors"][name], expected)
    (newest(tmp_path / "calm") / "0001.pt").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="000040 lacks the file of a shard"):
        S.read_checkpoint(newest(tmp_path / "calm"))
    kept = whole.averaged() if a.meta["weights"] == "ema" else whole.sae
    x = planted(50, seed=3)
    assert torch.equal(kept(x), a(x))


def test_without_a_restart_a_killed_process_ends_the_run_with_a_message(tmp_path):
    code = KILLED_RUN.format([("run", [20])]).replace("=mesh)\nmesh", "=mesh))\nmesh")
    code = code.replace("S.train(", "T.harvest.run_main(lambda: S.train(")
    result = torchrun(tmp_path, 2, code, timeout=60)
    assert result.returncode != 0 and "SIGKILL" in result.stderr
    assert "error: lost contact with another process" in result.stderr
    assert len(S.read_checkpoint(newest(tmp_path / "run"))) == 2


def test_a_checkpoint_has_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    """Death between two shards' files leaves the last whole checkpoint: the run goes on from it."""
    cfg = tiny_config(tmp_path, minutes=0.0)

    def dies(part, *_):
        if "000000030" in str(part):
            (part / "0000.pt").unlink()
            raise KeyboardInterrupt
        return rename(part, part.with_suffix(""))

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        S.train(cfg, planted_batches)
    assert newest(cfg.out).name == "checkpoint-000000029" and list(Path(cfg.out).glob("*.part"))
    monkeypatch.undo()
    again = S.train(dataclasses.replace(cfg, resume=True), planted_batches)
    whole = S.train(tiny_config(tmp_path / "whole"), planted_batches)
    assert same_weights(whole, again)
    assert [line["step"] for line in read_log(cfg.out)] == list(range(1, 41))
    left = sorted(f.name for f in Path(cfg.out).glob("checkpoint*"))
    assert left == ["checkpoint-000000039", "checkpoint-000000040"]


def test_what_cannot_be_read_is_kept_and_what_is_not_its_own_is_left(tmp_path):
    """A damaged checkpoint is put aside, not deleted; settings and log may be damaged too; copies
    that somebody made beside the checkpoints are never taken for one, nor touched."""
    cfg = tiny_config(tmp_path, minutes=0.0)
    whole, out = S.train(cfg, planted_batches, planted(100)), Path(cfg.out)
    shutil.copytree(newest(out), out / "checkpoint-keep")
    shutil.copytree(newest(out), out / "checkpoints_of_mine" / "x")
    (newest(out) / "0000.pt").write_bytes(b"torn")
    (out / "config.json").write_text("")
    log = (out / "log.jsonl").read_text()
    (out / "log.jsonl").write_text(log[: len(log) // 2] + "\n" + log)
    (out / "sae.pt").unlink()
    again = S.train(dataclasses.replace(cfg, resume=True), planted_batches, planted(100))
    assert same_weights(whole, again)
    kept = [p for p in out.iterdir() if p.name.startswith("damaged")]
    assert len(kept) == 1 and (kept[0] / "0000.pt").read_bytes() == b"torn"
    assert (out / "checkpoint-keep/0000.pt").exists() and (out / "checkpoints_of_mine/x").exists()
    assert read_log(out)[-1]["step"] == 40 and read_json(out / "config.json")["n_latents"] == 64


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    S.train(tiny_config(tmp_path), planted_batches)


def test_one_process_at_a_time_writes_a_run(tmp_path):
    cfg = tiny_config(tmp_path)
    other = S.hold(Path(cfg.out))
    who = f"process {os.getpid()} on .*pytest.* is writing to .*; choose another --out"
    with pytest.raises(ValueError, match=who):
        S.train(cfg, planted_batches)
    with pytest.raises(harvest.UserError, match=who.replace("choose another --out", "wait for it")):
        with harvest.hold(cfg.out):
            pass
    other.close()
    with harvest.hold(cfg.out), harvest.hold(cfg.out):  # once more by the same process
        with pytest.raises(ValueError, match="is writing to"):
            S.train(cfg, planted_batches)
    S.train(cfg, planted_batches)
    with pytest.raises(ValueError, match="already holds a run"):
        S.train(cfg, planted_batches)


def test_a_restart_by_torchrun_is_no_licence_to_overwrite(tmp_path):
    """A launch that was refused is refused again when torchrun tries once more."""
    S.train(tiny_config(tmp_path / "0"), planted_batches)
    for folder in (tmp_path / "0/run").glob("checkpoint*"):
        shutil.rmtree(folder)
    before = (tmp_path / "0/run/sae.pt").read_bytes()
    config = f"T.tiny_config(T.Path({str(tmp_path / '0')!r}))"
    code = f"mesh = S.Mesh.join(1)\nS.train({config}, T.planted_batches, mesh=mesh)"
    result = torchrun(tmp_path, 1, code, "--max-restarts", "1", "--monitor-interval", "0.1")
    said = f"ValueError: {tmp_path / '0/run'} already holds a run"
    assert result.returncode != 0 and result.stderr.count(said) == 2
    assert (tmp_path / "0/run/sae.pt").read_bytes() == before


def test_the_checkpoint_before_a_torn_one_is_used(tmp_path, capsys):
    cfg = tiny_config(tmp_path, minutes=0.0)
    whole = S.train(cfg, planted_batches, planted(100))
    before, last = sorted(Path(cfg.out).glob("checkpoint-*"))
    assert (before.name, last.name) == ("checkpoint-000000039", "checkpoint-000000040")
    (last / "0000.pt").write_bytes((last / "0000.pt").read_bytes()[:-3000])
    again = S.train(dataclasses.replace(cfg, resume=True), planted_batches, planted(100))
    assert "checkpoint-000000040/0000.pt is not a readable file" in capsys.readouterr().err
    assert same_weights(whole, again)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    cfg, save = tiny_config(tmp_path, minutes=0.0), torch.save

    def until_full(obj, f):
        if obj.get("steps", 0) == 30:
            f.write(b"x" * 100)
            raise OSError(28, "No space left on device")
        save(obj, f)

    monkeypatch.setattr(torch, "save", until_full)
    with pytest.raises(OSError, match="No space left"):
        S.train(cfg, planted_batches)
    assert newest(cfg.out).name == "checkpoint-000000029" and not list(Path(cfg.out).glob("*.part"))


@pytest.mark.parametrize("kw", [{}, {"dead_tokens": 64, "k_aux": 8},
                                {"multi_topk": True, "dead_tokens": 64, "k_aux": 32}])
def test_accumulation_equals_the_big_batch(tmp_path, kw):
    ends = []
    for parts in (1, 4):
        t = make_trainer(tmp_path, accumulate=parts, **kw)
        with torch.no_grad():
            t.sae.double().b_enc[:20] = -0.5  # never selected, so dead soon
        t = S.Trainer(t.cfg, t.sae, t.c)
        for _, x in zip(range(12), planted_batches(0)):
            info = t.step(x.double())
        said = torch.tensor([float(info["nmse"]), float(info["l0"]), info["dead"]])
        ends.append(t.state()["tensors"] | {"info": said})
    assert not kw or ends[0]["info"][2] > 0
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*(end.values() for end in ends)))


PLANNED = [
    dict(n=4096, d=256, batch=2048),
    dict(n=4096, d=256, batch=2048, precision="fp32"),
    dict(n=4096, d=256, batch=8192),
    dict(n=32768, d=128, batch=1024),
    dict(n=32768, d=128, batch=1024, own_dead=1638),
    dict(n=4096, d=256, batch=4096, own_dead=204),
    dict(n=4096, d=256, batch=4096, accumulate=4),
    dict(n=8192, d=256, batch=2048, shards=2),
]


@pytest.mark.parametrize("case", PLANNED)
def test_planned_memory_is_the_measured_one(case):
    """Peak of the tensors of one step, by PyTorch's profiler, to 10 %."""
    n, d, batch, own_dead = (case.get(name, 0) for name in ("n", "d", "batch", "own_dead"))
    options = {name: case[name] for name in ("precision", "accumulate", "shards") if name in case}
    options = {"n_latents": n, "k": 32, "batch": batch, "precision": "bf16"} | options
    cfg = S.resolve(S.Config(**options, tokens=10**9, device="cpu"), d, 0)
    mesh = S.Mesh()
    mesh.shards, mesh.all_gather = cfg.shards, lambda x, over, dim: torch.cat([x] * cfg.shards, dim)
    t, x = S.Trainer(cfg, mesh.sae(d, n, 32), 1 / d), torch.randn(batch, d).half()

    def step():
        t.silent.zero_()
        t.silent[:own_dead] = 2 * cfg.dead_tokens
        t.own_dead = t.n_dead = own_dead
        t.step(x)

    step()
    t.adam.zero_grad()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = np.cumsum([size for _, size in changes]).max()
    lasting = 4 * sum(p.nbytes for p in t.params) + x.nbytes + t.silent.nbytes  # weights, Adam, EMA
    planned = S.plan(cfg, d, cfg.shards, dead=own_dead / n)["peak"][0]
    assert 1e9 * planned == pytest.approx(peak + lasting, rel=0.1)


def test_the_plan_on_the_command_line(capsys):
    S.main("--plan --n_latents 16777216 --k 256 --d_model 12288 --world 512 --shards 64".split())
    text = capsys.readouterr().out
    assert "8 replicas x 64 shards" in text
    assert re.search(r"Adam +51\.542 GB", text)  # 2 * 4 bytes * (2 d + 1) n / 64
    with pytest.raises(ValueError, match="must divide"):
        S.main(["--plan", "--n_latents", "1000", "--world", "6", "--shards", "4"])
    with pytest.raises(ValueError, match="three positive numbers"):
        S.main(["--plan", "--speeds", "fast"])


def test_meshes_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="cannot be cut into 4 shards"):
        S.main([*map(str, TINY), "--shards", "4", "--out", str(tmp_path / "x")])
    with pytest.raises(ValueError, match="must be below 1"):
        S.resolve(S.Config(ema=1.0), 16, 10**6)
    with pytest.raises(ValueError, match="at least 1"):
        S.resolve(S.Config(accumulate=0), 16, 10**6)
    with pytest.raises(ValueError, match="TopK only"):
        S.resolve(S.Config(shards=2, l1=0.1), 16, 10**6)
    with pytest.raises(ValueError, match="cannot be cut into 1 processes times 3 parts"):
        S.train(tiny_config(tmp_path, accumulate=3), planted_batches)


def test_every_process_reads_its_own_share(tmp_path, acts_dir):
    """The command under torchrun, with two shards: each asks for its half of every batch."""
    code = f"""
batches = T.harvest.Acts.batches
def record(acts, batch, seed, step, device, part, parts):
    T.Path(out, os.environ["RANK"]).write_text(f"{{batch}} {{part}} {{parts}}")
    return batches(acts, batch, seed, step, device, part, parts)
T.harvest.Acts.batches = record
run = ["--acts", {str(acts_dir)!r}, "--out", out + "/r", "--shards", "2"]
S.main([*map(str, T.TINY), *run])"""
    result = torchrun(tmp_path, 2, code)
    assert result.returncode == 0, result.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["64 0 2", "64 1 2"]
    assert len(S.SAE.load(tmp_path / "r/sae.pt").W_dec) == 64  # whole, though each had a half


def test_replicas_read_disjoint_halves(acts_dir):
    acts = harvest.Acts(acts_dir)
    half = len(acts) // 2 * acts.tokens.shape[1]
    parts = [next(acts.batches(half, part=part, parts=2)) for part in (0, 1)]  # an epoch of each
    rows = [{tuple(row.tolist()) for row in part} for part in parts]
    everything = {tuple(row.tolist()) for row in acts[:][1].flatten(0, 1)}
    assert rows[0] | rows[1] <= everything
    assert len(rows[0] & rows[1]) < 0.1 * len(rows[0])  # equal tokens at one place: equal rows
    encoding = harvest.bpe_encoding([])
    texts = [list(harvest.split_contexts(DOCS, encoding, "train", 8, part, 2)) for part in (0, 1)]
    assert texts[0] != texts[1]


# ---------------------------------------------------------------------------------- GPT-2


def tiny_gpt2(seed=0, dtype=torch.float64, **kw):
    torch.manual_seed(seed)
    sizes = dict(n_vocab=31, n_ctx=12, d_model=12, n_layer=3, n_head=3)
    config = harvest.GPT2Config(**sizes | kw)
    m = harvest.GPT2(config).to(dtype).requires_grad_(False)
    for p in m.parameters():
        p.add_(0.2 * torch.randn_like(p))
    return m


def tanh_gelu(a):
    return 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))


NUMPY = {"gelu": lambda a: 0.5 * a * (1 + np.vectorize(math.erf)(a / math.sqrt(2))),
         "gelu_new": tanh_gelu, "relu": lambda a: np.maximum(a, 0),
         "silu": lambda a: a / (1 + np.exp(-a))}


def numpy_gpt2(state, tokens, config):
    """GPT-2 in loops over heads and positions. Returns the logits and every site of every layer."""
    n_layer, n_head = config.n_layer, config.n_head
    w = {k: v.double().numpy() for k, v in state.items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.eps)
        return x * w[name + ".weight"] + w[name + ".bias"]

    def affine(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    sites = {}
    x = np.stack([w["wte.weight"][t] + w["wpe.weight"][i] for i, t in enumerate(tokens)])
    for layer in range(n_layer):
        h = f"h.{layer}."
        q, k, v = np.split(affine(norm(x, h + "ln_1"), h + "attn.c_attn"), 3, axis=1)
        size = x.shape[1] // n_head
        mixed = np.zeros_like(x)
        for head in range(n_head):
            cols = slice(head * size, (head + 1) * size)
            for i in range(len(tokens)):
                score = np.array([q[i, cols] @ k[j, cols] for j in range(i + 1)])
                score /= math.sqrt(size) if config.scaled else 1
                score /= layer + 1 if config.scaled_by_layer else 1
                p = np.exp(score - score.max())
                mixed[i, cols] = (p / p.sum()) @ v[: i + 1, cols]
        sites[layer, "resid_delta_attn"] = affine(mixed, h + "attn.c_proj")
        x = sites[layer, "resid_post_attn"] = x + sites[layer, "resid_delta_attn"]
        a = affine(norm(x, h + "ln_2"), h + "mlp.c_fc")
        sites[layer, "mlp_post_act"] = NUMPY[config.activation](a)
        sites[layer, "resid_delta_mlp"] = affine(sites[layer, "mlp_post_act"], h + "mlp.c_proj")
        x = sites[layer, "resid_post_mlp"] = x + sites[layer, "resid_delta_mlp"]
    return norm(x, "ln_f") @ w["wte.weight"].T, sites


@given(seeds, st.sampled_from([*NUMPY]), st.sampled_from([1e-5, 0.3]), st.booleans(), st.booleans())
@settings(max_examples=8)
def test_gpt2_against_loops(seed, activation, eps, scaled, by_layer):
    kw = dict(activation=activation, eps=eps, scaled=scaled, scaled_by_layer=by_layer)
    m = tiny_gpt2(seed % 100, **kw)
    tokens = torch.randint(31, (2, 12), generator=gen(seed))
    for row in range(2):
        logits, sites = numpy_gpt2(m.state_dict(), tokens[row].tolist(), m.config)
        assert np.allclose(m(tokens)[row].numpy(), logits)
        for (layer, site), expected in sites.items():
            assert np.allclose(m.acts(tokens, layer, site)[row].numpy(), expected), (layer, site)


def test_edits():
    m, tokens = tiny_gpt2(), torch.randint(31, (3, 12), generator=gen(0))
    clean = m(tokens)
    noisy = lambda a: a + 1e-2 * torch.randn_like(a)
    for site in harvest.SITES:
        assert torch.equal(m(tokens, 1, site, lambda a: a), clean)
        assert not torch.allclose(m(tokens, 1, site, noisy), clean)
    # an edit that carries another run's activation at the last residual site carries its logits
    other = torch.randint(31, (3, 12), generator=gen(1))
    carried = m(tokens, 2, "resid_post_mlp", lambda a: m.acts(other, 2, "resid_post_mlp"))
    assert torch.allclose(carried, m(other))


def test_acts_compute_nothing_above():
    m, tokens = tiny_gpt2(), torch.randint(31, (1, 12), generator=gen(0))
    m.h[2].forward = m.ln_f.forward = lambda *a: pytest.fail("computed above the layer asked for")
    m.acts(tokens, *SITE)
    m.h[1].mlp.c_proj.forward = lambda *a: pytest.fail("computed beyond the site")
    m.acts(tokens, 1, "mlp_post_act")


def test_causality():
    m, tokens = tiny_gpt2(), torch.randint(31, (1, 12), generator=gen(0))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 31
    a, b = m(tokens), m(changed)
    assert torch.equal(a[:, :7], b[:, :7]) and not torch.allclose(a[:, 7:], b[:, 7:])


def write_safetensors(file, state):
    header, raw = {"__metadata__": {"format": "pt"}}, b""
    for name, t in state.items():
        data = t.contiguous().numpy().tobytes()
        place = [len(raw), len(raw) + len(data)]
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": place}
        raw += data
    head = json.dumps(header).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + raw)


@pytest.fixture
def huggingface(tmp_path, monkeypatch):
    """-> a function that writes a folder as of a GPT-2 on Hugging Face, and gives its model. The
    vocabulary of GPT-2 is replaced by one that needs no download."""
    encoding = harvest.bpe_encoding(["ab", "abc"])
    monkeypatch.setattr(harvest, "gpt2_encoding", lambda: encoding)
    monkeypatch.setattr(harvest, "GPT2_TOKENS", encoding.n_vocab)

    def write(kw={}, config={}, more={}, **sizes):
        m = tiny_gpt2(dtype=F32, n_vocab=259, **sizes, **kw)
        state = {f"transformer.{k}": v for k, v in m.state_dict().items()}
        write_safetensors(tmp_path / "model.safetensors", state | more)
        known = {"n_head": 3, "vocab_size": 259, "n_embd": 12, "n_layer": 3, "model_type": "gpt2"}
        (tmp_path / "config.json").write_text(json.dumps(known | config))
        return m

    return write


HONOURED = [("activation", "activation_function", "gelu"),
            ("activation", "activation_function", "relu"), ("eps", "layer_norm_epsilon", 0.3),
            ("scaled", "scale_attn_weights", False),
            ("scaled_by_layer", "scale_attn_by_inverse_layer_idx", True)]


@pytest.mark.parametrize("ours, theirs, value", HONOURED)
def test_what_a_config_changes_is_honoured(huggingface, tmp_path, ours, theirs, value):
    m = huggingface({ours: value}, {theirs: value})
    tokens = torch.randint(259, (2, 12), generator=gen(0))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        loaded, encoding = harvest.load_model(path)
        assert encoding.n_vocab == 259 and torch.allclose(loaded(tokens), m(tokens), atol=1e-5)
        assert loaded.sha256 == m.sha256
    huggingface({ours: value})  # the same, unsaid
    plain_one = harvest.load_model(tmp_path)[0]
    assert not torch.allclose(plain_one(tokens), m(tokens), atol=1e-5)
    assert plain_one.sha256 != m.sha256


@pytest.mark.parametrize("config, said", [
    ({"activation_function": "gelu_fancy"}, "activation_function is gelu_fancy"),
    ({"add_cross_attention": True}, "add_cross_attention is True"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    ({"model_type": "gpt_neo"}, "model_type is gpt_neo"), ({"n_inner": 24}, "n_inner is 24"),
    ({"vocab_size": 31}, "vocab_size is 31"), ({"n_positions": 24}, "n_positions is 24"),
    ({"n_layer": 2}, "n_layer is 2"), ({"n_embd": 24}, "n_embd is 24"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"), ({"n_head": 5}, "5 heads"),
    ({"auto_map": {"AutoModel": "x.py"}}, "auto_map"), ({"n_head": None}, "must give n_head"),
    ({"n_head": True}, "n_head is True"), ({"layer_norm_epsilon": -1.0}, "epsilon is -1.0"),
    ({"layer_norm_epsilon": "1e-5"}, "epsilon is '1e-5'"), ({"hidden_size": 24}, "n_embd is 24"),
    ({"num_hidden_layers": 2}, "n_layer is 2"), ({"scale_attn_weights": "false"}, "is 'false'"),
    ({"n_head": None, "num_attention_heads": 5}, "5 heads")])
def test_what_a_config_changes_is_refused_where_it_cannot_be_honoured(
        huggingface, tmp_path, config, said):
    huggingface(config=config)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(harvest.UserError, match=said):
            harvest.load_model(path)


def test_other_heads_vocabularies_and_tokenizers_are_seen(huggingface, tmp_path):
    huggingface(more={"lm_head.weight": torch.ones(259, 12)})
    with pytest.raises(harvest.UserError, match="lm_head is not its embedding"):
        harvest.load_model(tmp_path)
    huggingface()
    ranks = harvest.gpt2_encoding()._mergeable_ranks
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in letters} | {
        b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letters)}
    vocab = {"".join(letters[b] for b in token): i for token, i in ranks.items()}
    vocab["<|endoftext|>"] = len(ranks)
    for name, content in (("vocab.json", vocab), ("tokenizer.json", {"model": {"vocab": vocab}})):
        (tmp_path / name).write_text(json.dumps(content))
        harvest.load_model(tmp_path)
        swapped = vocab | {"ab": vocab["abc"], "abc": vocab["ab"]}
        for other in (swapped, dict(list(vocab.items())[:200]), {"x": 0}):
            other = other if name == "vocab.json" else {"model": {"vocab": other}}
            (tmp_path / name).write_text(json.dumps(other))
            for path in (tmp_path, tmp_path / "model.safetensors"):
                with pytest.raises(harvest.UserError, match="tokenizer .* is not GPT-2's"):
                    harvest.load_model(path)
        (tmp_path / name).unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(harvest.UserError, match="is not GPT-2's"):
        harvest.load_model(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "spiece.model").write_bytes(b"other")
    with pytest.raises(harvest.UserError, match="is not GPT-2's"):
        harvest.load_model(tmp_path)
    (tmp_path / "spiece.model").unlink()
    harvest.GPT2_TOKENS += 1
    with pytest.raises(harvest.UserError, match="vocabulary has 259 tokens, its tokenizer 260"):
        harvest.load_model(tmp_path)


def test_shards_of_weights_prefixes_and_nanogpt_load(huggingface, tmp_path):
    m, tokens = huggingface(), torch.randint(259, (2, 12), generator=gen(0))
    same = lambda path: torch.allclose(harvest.load_model(path)[0](tokens), m(tokens), atol=1e-5)
    state = {f"_orig_mod.module.transformer.{k}": v for k, v in m.state_dict().items()}
    names, where = list(state), {}
    for number, part in enumerate((names[:9], names[9:])):
        file = f"model-0000{number}-of-00002.safetensors"
        write_safetensors(tmp_path / file, {name: state[name] for name in part})
        where |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert same(tmp_path) and same(index)
    (tmp_path / file).unlink()
    with pytest.raises(harvest.UserError, match=f"no weights at .*{file}"):
        harvest.load_model(tmp_path)
    # nanoGPT: nn.Linear's way round, exact GELU, maybe no biases, its own names around the state
    m = huggingface({"activation": "gelu"})
    for name, p in m.named_parameters():
        p.data.mul_(not name.endswith("bias"))
    sides = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {f"_orig_mod.transformer.{name}": w.T if name.endswith(sides) else w
             for name, w in m.state_dict().items() if not name.endswith("bias")}
    state["_orig_mod.lm_head.weight"] = m.wte.weight
    (tmp_path / "nano").mkdir()
    ckpt = {"model": state, "model_args": {"n_head": 3, "bias": False}, "iter_num": 5}
    torch.save(ckpt, tmp_path / "nano/ckpt.pt")
    assert same(tmp_path / "nano/ckpt.pt") and same(tmp_path / "nano")


def test_published_state_dicts_load(tmp_path):
    m, tokens = tiny_gpt2(dtype=F32), torch.randint(31, (1, 12), generator=gen(0))
    state = m.state_dict()
    published = {f"transformer.{k}": v for k, v in state.items()}
    published |= {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 12, 12) for i in range(3)}
    published["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    published["lm_head.weight"] = state["wte.weight"]
    fresh = tiny_gpt2(1, torch.float32)
    fresh.load_state_dict(published)
    assert torch.equal(fresh(tokens), m(tokens))
    # the same as safetensors, in a folder with a config.json
    file = tmp_path / "model.safetensors"
    write_safetensors(file, state | {"empty": torch.zeros(0, 3)})
    (tmp_path / "config.json").write_text('{"n_head": 3}')
    read = harvest.read_weights(tmp_path)
    assert read["config"] == {"n_head": 3}
    assert all(torch.equal(read["state"][k], v) for k, v in state.items())
    file.write_bytes(file.read_bytes() + b"trailing")
    assert torch.equal(harvest.read_weights(tmp_path)["state"]["wte.weight"], state["wte.weight"])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(harvest.UserError, match="not a readable weight file"):
        harvest.read_weights(tmp_path)


def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch):
    class Answer(io.BytesIO):
        headers = {"Content-Length": "100"}

    monkeypatch.setattr(harvest.urllib.request, "urlopen", lambda *a, **k: Answer(b"half"))
    with pytest.raises(harvest.UserError, match="got 4 of 100 bytes.*by hand"):
        harvest.download("https://example.org/x", tmp_path / "x")
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


# ---------------------------------------------------------------------- text and the embedded model

DOCS = [f"def f{i}(x):\n    return x + {i}  # number {i % 7}\n\n\nprint(f{i}({i}))\n" * 3
        for i in range(60)]
TOY = dict(n_vocab=300, n_layer=3, d_model=16, n_head=2, steps=12, batch=4, length=16)


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    """The embedded model at toy size, trained for a few steps by the same code as the real one."""
    path = tmp_path_factory.mktemp("model") / "toy.pt"
    harvest.train_stdlib(path, **TOY, text=DOCS)
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCS))
    return path


@pytest.fixture(scope="session")
def acts_dir(tmp_path_factory, model_file, text_file):
    out = tmp_path_factory.mktemp("acts") / "acts"
    argv = ["--model", str(model_file), "--text", str(text_file), "--ctx", "16", "--tokens", "0"]
    harvest.main([*argv, "--out", str(out), *CPU])
    return out


def test_no_document_dominates_the_embedded_text():
    docs = list(harvest.documents("stdlib"))
    held_out = [doc for i, doc in enumerate(docs) if harvest.is_val(i)]
    sizes = np.array([len(doc) for doc in held_out])
    assert len(docs) > 1000 and sizes.max() < 0.03 * sizes.sum()
    assert sizes.sum() ** 2 / (sizes**2).sum() > 60  # so many equal ones would be as good
    assert not {*held_out} & {doc for i, doc in enumerate(docs) if not harvest.is_val(i)}


def test_embedded_model(model_file):
    saved = torch.load(model_file, weights_only=True)
    assert [p["flops"] for p in saved["curve"]] == sorted({p["flops"] for p in saved["curve"]})
    assert saved["curve"][-1]["loss"] < saved["curve"][0]["loss"]
    torch.manual_seed(0)
    untrained = harvest.GPT2(harvest.GPT2Config(**saved["config"])).wpe.weight
    assert (saved["state"]["wpe.weight"] != untrained).any(1).all()  # every position was an input
    model, encoding = harvest.load_model(str(model_file))
    assert model.config.n_head == 2 and model.config.n_vocab == encoding.n_vocab == 300
    assert model.curve == saved["curve"] and not any(p.requires_grad for p in model.parameters())
    # the model is the average that the curve is of, not the weights of the last step
    rows = torch.tensor(list(harvest.split_contexts(DOCS, encoding, "val", 17)))
    rows = rows[torch.randperm(len(rows), generator=gen(0))[:256], :16]
    assert harvest.lm_loss(model, rows).item() == pytest.approx(saved["curve"][-1]["loss"])
    again = model_file.with_name("again.pt")
    harvest.train_stdlib(again, **TOY, text=DOCS)
    repeated = torch.load(again, weights_only=True)["state"].values()
    assert all(torch.equal(a, b) for a, b in zip(saved["state"].values(), repeated))


@given(st.lists(st.text(min_size=1), min_size=1, max_size=8), st.integers(0, 30))
def test_bpe_is_lossless_and_distinct(docs, n):
    merges = harvest.learn_bpe(docs, n)
    assert len(merges) <= n and len(set(merges)) == len(merges)
    encoding = harvest.bpe_encoding(merges)
    for doc in docs:
        assert encoding.decode(encoding.encode_ordinary(doc)) == doc
    assert merges == harvest.learn_bpe(docs, n)


def test_bpe_by_hand():
    # "aab" x 4: pairs (a,a) 4, (a,b) 4: the tie goes to the smaller pair; then (aa,b) 4
    assert harvest.learn_bpe(["aab " * 4], 2) == ["aa", "aab"]


def test_ngram_losses_by_hand():
    train, val = np.array([[0, 1] * 5] * 10), np.array([[0, 1, 0, 1]])
    unigram, bigram = harvest.ngram_losses(train, val, 2)
    assert unigram == pytest.approx(math.log(2)) and bigram < 0.02


@given(st.lists(st.text(max_size=30), max_size=12), st.integers(1, 9))
def test_contexts_keep_every_token_in_order(docs, length):
    encoding = harvest.bpe_encoding([])
    rows = list(harvest.contexts(docs, encoding, length))
    flat = [t for d in docs for t in [*encoding.encode_ordinary(d), encoding.eot_token]]
    assert [t for row in rows for t in row] == flat[: len(flat) - len(flat) % length]
    assert all(len(row) == length for row in rows)


def stdin(text):
    return io.TextIOWrapper(io.BytesIO(text.encode()))


def test_text_sources(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": "four"}\n')
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as f:
        f.write('{"text": "five"}\n')
    assert list(harvest.documents(tmp_path)) == ["one", "two", "three", "four", "five"]
    monkeypatch.setattr(sys, "stdin", stdin("six"))
    assert list(harvest.documents("-")) == ["six"]
    monkeypatch.setattr(sys, "stdin", stdin('{"text": "six"}\n\n{"text": "seven"}\n'))
    assert list(harvest.documents("-")) == ["six", "seven"]
    for odd in ('[{"text": "six"}]', '{\n"text":\n"six"\n}', '{ "txt": 1}'):
        monkeypatch.setattr(sys, "stdin", stdin(odd))
        with pytest.raises(harvest.UserError, match="standard input, line 1: not a JSON object"):
            list(harvest.documents("-"))
    monkeypatch.setattr(sys, "stdin", stdin("{ is no JSON"))
    assert list(harvest.documents("-")) == ["{ is no JSON"]
    (tmp_path / "b.jsonl").write_text('\ufeff{"text": "three"}\n \n{"text": "four"}\n')
    assert list(harvest.documents(tmp_path / "b.jsonl")) == ["three", "four"]
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"txt": "four"}\n')
    with pytest.raises(harvest.UserError, match="b.jsonl, line 2"):
        list(harvest.documents(tmp_path))
    with pytest.raises(harvest.UserError, match="no text at"):
        list(harvest.documents(tmp_path / "none"))


@pytest.mark.parametrize("name, raw, said", [
    ("utf16.txt", "what is written here".encode("utf-16"), "utf16.txt is not text in UTF-8"),
    ("latin.txt", ("déjà vu, très cher " * 20).encode("latin-1"), "latin.txt is not text"),
    ("zip.txt", gzip.compress(b"what is written here" * 50), "zip.txt is not text"),
    ("zip.jsonl", gzip.compress(b'{"text": "x"}' * 50), "zip.jsonl is not text"),
    ("zeros.jsonl", b'{"text": "x"}\n{"text": "' + bytes(50) + b'"}', "zeros.jsonl is not text"),
    ("short.jsonl", '{"text": "café noël"}\n'.encode("latin-1") * 30, "short.jsonl is not text"),
    ("a.csv", b"text\nx", "a.csv is no .txt, .jsonl or .jsonl.gz file"),
    ("a.txt.gz", gzip.compress(b"x" * 50), "a.txt.gz is no .txt")])
def test_what_is_no_text_is_refused(tmp_path, name, raw, said):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(harvest.UserError, match=said):
        list(harvest.documents(tmp_path / name))


def test_a_folder_says_what_it_leaves_out_and_a_text_is_a_string(tmp_path, capsys):
    for name in ("a.txt", "b.md", "c.pdf"):
        (tmp_path / name).write_text("a short text, with one bad byte \ufffd in it")
    assert len(list(harvest.documents(tmp_path))) == 1
    assert "2 of 3 files are no .txt" in capsys.readouterr().err
    with pytest.raises(harvest.UserError, match="a text is a string, this one is of type bytes"):
        list(harvest.documents([b"x"]))


@given(st.text(alphabet="ab \n", max_size=300), st.integers(1, 50))
def test_split_text_loses_nothing(text, size):
    assert "".join(harvest.split_text(text, size)) == text


def test_auto_says_why_it_takes_the_embedded_model(model_file, monkeypatch, capsys):
    def no_network(url, path):
        raise harvest.UserError("cannot download: no network")

    cache = model_file.parent / "cache"
    cache.mkdir(exist_ok=True)
    monkeypatch.setattr(harvest, "CACHE", cache)
    monkeypatch.setattr(harvest, "download", no_network)
    name = f"stdlib-{harvest.platform.python_version()}-v{harvest.FORMAT}.pt"
    (cache / name).write_bytes(model_file.read_bytes())
    model, _ = harvest.load_model("auto")
    assert model.name == "stdlib" and "no network" in capsys.readouterr().err
    made = []
    monkeypatch.setattr(harvest, "train_stdlib", lambda path, device, **kw: (made.append(kw),
                        Path(path).write_bytes(model_file.read_bytes())))
    for name, why in (("stdlib-48", "multiple of 32"), ("stdlib-0", "multiple of 32"),
                      ("stdlib-2048", "at most 1024"), ("stdlib-x", "no weights at")):
        with pytest.raises(harvest.UserError, match=why):
            harvest.load_model(name)
    model, _ = harvest.load_model("stdlib-64")
    assert made == [{"d_model": 64, "n_head": 2}] and model.name == "stdlib-64"
    assert harvest.default_text(model) == "stdlib"


# ---------------------------------------------------------------------------------- shards


def test_shards_hold_the_models_activations(acts_dir, model_file):
    model, _ = harvest.load_model(str(model_file))
    for split in ("train", "val"):
        acts = harvest.Acts(acts_dir, split)
        tokens, values = acts[np.arange(len(acts))]
        assert len(acts) > 3 and values.shape == (len(acts), 16, 16)
        expected = model.acts(tokens, 2, "resid_post_mlp")
        assert torch.allclose(values.float(), expected, atol=1e-2, rtol=1e-3)
    assert harvest.Acts(acts_dir).meta["layer"] == 2  # two thirds of 3


def test_splits_share_no_document(acts_dir, model_file):
    _, encoding = harvest.load_model(str(model_file))
    ids = {s: harvest.Acts(acts_dir, s).tokens.flatten().tolist() for s in ("train", "val")}
    texts = {s: encoding.decode(ids[s]) for s in ids}
    assert "def f10(x)" in texts["val"] and "def f10(x)" not in texts["train"]
    assert "def f11(x)" in texts["train"] and "def f11(x)" not in texts["val"]


def test_interrupted_harvest_continues(tmp_path, model_file, monkeypatch):
    model, encoding = harvest.load_model(str(model_file))
    monkeypatch.setattr(harvest, "SHARD", 8)
    whole = harvest.harvest(model, encoding, DOCS, tmp_path / "whole", length=16)
    calls, real = [], harvest.activations

    def fail_later(*a):
        calls.append(a)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*a)

    monkeypatch.setattr(harvest, "activations", fail_later)
    with pytest.raises(KeyboardInterrupt):
        harvest.harvest(model, encoding, DOCS, tmp_path / "broken", length=16)
    with pytest.raises(harvest.UserError, match="not finished"):
        harvest.Acts(tmp_path / "broken")
    meta = harvest.harvest(model, encoding, DOCS, tmp_path / "broken", length=16)
    assert meta == whole
    files = sorted(f.relative_to(tmp_path / "whole") for f in (tmp_path / "whole").rglob("*.npy"))
    assert len(calls) == 4 + len(files) // 2 - 3  # three shards were kept
    for f in files:
        assert (tmp_path / "whole" / f).read_bytes() == (tmp_path / "broken" / f).read_bytes()


def test_a_harvest_is_known_by_the_content_of_its_model_and_text(tmp_path, model_file, monkeypatch):
    monkeypatch.setattr(harvest, "SHARD", 8)
    model, encoding = harvest.load_model(str(model_file))
    again = lambda **kw: harvest.harvest(kw.get("model", model), encoding, kw.get("text", DOCS),
                                         tmp_path / "acts", length=16)
    whole = again()
    assert again() == whole  # already complete
    changed = harvest.load_model(str(model_file))[0]
    changed.wte.weight[7] += 1
    meta = tmp_path / "acts/meta.json"
    for state in (True, False):  # complete, then interrupted
        meta.write_text(json.dumps(whole | {"complete": state}))
        with pytest.raises(harvest.UserError, match="another harvest .model_sha256: "):
            again(model=changed)
        with pytest.raises(harvest.UserError, match="another harvest .text_sha256: "):
            again(text=DOCS[1:])
        assert harvest.read_meta(tmp_path / "acts")["complete"] == state
    changed.name = "moved"
    changed.wte.weight[7] -= 1
    changed.load_state_dict(model.state_dict())  # the same again, elsewhere
    assert again(model=changed)["complete"]
    other = harvest.load_model(str(model_file))[0]
    other.vocabulary = "merged otherwise"
    with pytest.raises(harvest.UserError, match="another harvest .model_sha256: "):
        again(model=other)
    with pytest.raises(harvest.UserError, match="another harvest .text_sha256: "):
        again(text=(doc for doc in DOCS[1:]))  # which can be read but once
    texts = {"a.txt": "one", "b.txt": "one", "c.txt": "two", "d.jsonl": "one"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    a, b, c, d = (harvest.text_sha256(str(tmp_path / name)) for name in texts)
    assert a == b and len({a, c, d}) == 3
    for name, pieces in (("one", ["ab", "c"]), ("two", ["a", "bc"])):
        (tmp_path / name).mkdir()
        for i, piece in enumerate(pieces):
            (tmp_path / name / f"{i}.txt").write_text(piece)
    assert harvest.text_sha256(tmp_path / "one") != harvest.text_sha256(tmp_path / "two")
    assert harvest.text_sha256(["ab", "c"]) != harvest.text_sha256(["a", "bc"])


@pytest.mark.parametrize("few", [16 * 40, 16 * 45])  # full shards; a shorter last one
def test_a_finished_harvest_goes_on_to_more_tokens(tmp_path, model_file, monkeypatch, few):
    monkeypatch.setattr(harvest, "SHARD", 8)
    model, encoding = harvest.load_model(str(model_file))
    make = lambda name, tokens: harvest.harvest(model, encoding, DOCS, tmp_path / name, length=16,
                                                tokens=tokens)
    whole = make("whole", 16 * 70)
    make("more", few)
    kept = (tmp_path / "more/train/acts-00000.npy").stat().st_mtime_ns
    assert make("more", 16 * 70) == whole
    assert (tmp_path / "more/train/acts-00000.npy").stat().st_mtime_ns == kept
    for file in (tmp_path / "whole").rglob("*.npy"):
        there = tmp_path / "more" / file.relative_to(tmp_path / "whole")
        assert there.read_bytes() == file.read_bytes()
    assert harvest.more(0, 5) and not harvest.more(5, 0)
    with pytest.raises(harvest.UserError, match="asked: 1120 there, 320 wanted"):
        make("more", 320)


def test_more_shards_than_a_process_may_open_files(tmp_path, acts_dir):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    acts = damaged(acts_dir, tmp_path)
    tokens, x = (np.load(acts / f"train/{name}-00000.npy") for name in ("tokens", "acts"))
    for i in range(100):
        np.save(acts / f"train/tokens-{i:05d}.npy", tokens[i : i + 1])
        np.save(acts / f"train/acts-{i:05d}.npy", x[i : i + 1])
    meta = read_json(acts / "meta.json") | {"tokens": 100 * 16}
    (acts / "meta.json").write_text(json.dumps(meta))
    here = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 60
    resource.setrlimit(resource.RLIMIT_NOFILE, (here + 20, before[1]))
    try:
        many = harvest.Acts(acts)
        assert torch.equal(many[np.arange(100)][1], torch.from_numpy(x[:100]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@given(st.integers(60, 300))
@settings(max_examples=6)
def test_asked_number_of_tokens(tmp_path_factory, model_file, contexts):
    model, encoding = harvest.load_model(str(model_file))
    out = tmp_path_factory.mktemp("asked") / "acts"
    meta = harvest.harvest(model, encoding, DOCS * 3, out, length=16, tokens=16 * contexts - 5)
    assert meta["tokens"] == 16 * contexts == harvest.Acts(out).n_tokens


@pytest.mark.parametrize("shuffled", [3, 4096])
def test_batches_are_honest_and_resumable(acts_dir, monkeypatch, shuffled):
    monkeypatch.setattr(harvest, "BLOCK", (16 * shuffled, 2**30))
    monkeypatch.setattr(harvest, "KEEP", 5)
    acts = harvest.Acts(acts_dir)
    assert acts.kept.tolist() == list(range(4, len(acts), 5))
    trained = np.setdiff1d(np.arange(len(acts)), acts.kept)
    everything = acts[trained][1].flatten(0, 1)
    per_epoch, B = acts.n_train, 32
    assert per_epoch == trained.size * 16 < acts.n_tokens
    stream = acts.batches(B, seed=3)
    first = [next(stream) for _ in range(3 * per_epoch // B)]
    flat = torch.cat(first)
    rows = lambda t: sorted(map(tuple, t.tolist()))
    one, two = flat[:per_epoch], flat[per_epoch : 2 * per_epoch]
    assert rows(one) == rows(everything) == rows(two)  # each token once an epoch
    assert not torch.equal(one, everything) and not torch.equal(one, two)
    for step in (1, 5, per_epoch // B, per_epoch // B + 1, len(first) - 1):
        assert torch.equal(next(acts.batches(B, seed=3, step=step)), first[step]), step
    assert not torch.equal(next(acts.batches(B, seed=4)), first[0])


def test_reading_ahead_changes_nothing():
    assert list(harvest.ahead(iter("abc"))) == ["a", "b", "c"] and not list(harvest.ahead(iter(())))

    def fails():
        yield 1
        raise harvest.UserError("row 7")

    items = harvest.ahead(fails())
    assert next(items) == 1
    with pytest.raises(harvest.UserError, match="row 7"):
        next(items)


def test_streamed_batches(acts_dir, model_file, text_file):
    model, encoding = harvest.load_model(str(model_file))
    stream = harvest.Stream(model, encoding, text_file, length=16, block=8)
    batches = stream.batches(48, seed=1)
    first = [next(batches) for _ in range(40)]
    for step in (1, 3, 17, 39):
        assert torch.equal(next(stream.batches(48, seed=1, step=step)), first[step])
    disk = harvest.Acts(acts_dir)[np.arange(8)][1].flatten(0, 1)  # the first block, ordered
    rows = lambda t: sorted(map(tuple, t.float().tolist()))
    assert np.allclose(rows(torch.cat(first)[:128]), rows(disk), atol=2e-2)
    held_out = harvest.Acts(acts_dir, "val")
    for skip in (0, 3):
        tokens, acts, document = stream.sample(64, skip)
        rows = np.arange(skip, skip + 4)
        assert torch.equal(tokens, held_out[rows][0]) and acts.shape == (4, 16, 16)
        assert document.tolist() == held_out.document[rows].tolist()


# ---------------------------------------------------------------------------------- metrics


class Everything(torch.nn.Module):
    """With n = 2d, k = d it reconstructs exactly: one latent for each direction of each axis."""

    @staticmethod
    def make(d):
        m = S.SAE(d, 2 * d, d)
        with torch.no_grad():
            m.W_dec.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
            m.W_enc.copy_(m.W_dec)
        return m


def test_reconstruction_at_both_ends():
    x = randn(400, 6, dtype=F32)
    perfect = evals.reconstruction(Everything.make(6), x)
    assert perfect["nmse"] < 1e-10 and perfect["l0"] == pytest.approx(6, abs=0.01)
    assert perfect["norm_ratio"] == pytest.approx(1)
    mean_only = S.SAE(6, 4, 2)
    with torch.no_grad():
        mean_only.b_enc.fill_(-100)
        mean_only.b_pre.copy_(S.normalize(x)[0].mean(0))
    nothing = evals.reconstruction(mean_only, x)
    assert nothing["nmse"] == pytest.approx(1, rel=1e-5) and nothing["l0"] == 0
    m = make_sae(6, 40, 3, dtype=F32)
    assert evals.reconstruction(m, x)["nmse"] == pytest.approx(S.nmse(m, x), rel=1e-5)


def test_reconstruction_by_hand():
    # u = (±1, ∓1)/sqrt(2); one latent catches the first kind and half of it: errors 1/4, 1; mean 0
    m = S.SAE(2, 1, 1)
    with torch.no_grad():
        m.W_dec.copy_(torch.tensor([[1.0, -1.0]]) / math.sqrt(2))
        m.W_enc.copy_(m.W_dec / 2)
    r = evals.reconstruction(m, torch.tensor([[3.0, 1.0], [1.0, 5.0]]))
    assert r["nmse"] == pytest.approx(0.625) and r["nmse_se"] == pytest.approx(0.375)
    assert r["l0"] == 0.5 and r["norm_ratio"] == pytest.approx(0.25)
    r = evals.reconstruction(m, torch.tensor([[3.0, 1.0], [1.0, 5.0], [2.0, 2.0]]))
    assert r["norm_ratio"] == pytest.approx(0.25)  # where there is nothing, there is no ratio


@given(seeds, st.integers(2, 9))
def test_errors_are_over_documents(seed, G):
    """A jackknife written out; and contexts that say the same thing do not make it smaller."""
    C = 12
    document = torch.cat([torch.arange(G), torch.randint(G, (C,), generator=gen(seed))])
    top, bottom = randn(2, C + G, seed=seed).abs() + 0.5
    out = evals.estimates(ratio=evals.leave_one_out(document, top, bottom))
    assert out["ratio"] == pytest.approx((top.sum() / bottom.sum()).item())
    without = [(top[document != g].sum() / bottom[document != g].sum()).item() for g in range(G)]
    assert out["replicates"]["ratio"] == pytest.approx(without)
    variance = (G - 1) / G * sum((v - np.mean(without)) ** 2 for v in without)
    assert out["ratio_se"] == pytest.approx(math.sqrt(variance))
    again = lambda v: v.repeat_interleave(5)
    many = evals.estimates(ratio=evals.leave_one_out(again(document), again(top), again(bottom)))
    assert many["ratio_se"] == pytest.approx(out["ratio_se"])
    # each context its own document: the usual error of a mean
    alone = evals.estimates(mean=evals.leave_one_out(None, top))
    assert alone["mean_se"] == pytest.approx((top.std() / math.sqrt(len(top))).item())
    assert math.isnan(evals.estimates(x=evals.leave_one_out(torch.zeros(5), top[:5]))["x_se"])


def test_documents_are_told_apart_by_their_ends():
    tokens = np.array([[1, 2, 9, 3], [4, 5, 6, 7], [9, 1, 9, 9], [8, 8, 8, 8]])
    assert harvest.starts_in(tokens, 9).tolist() == [0, 1, 1, 4]


def test_every_error_of_a_metric_is_over_documents(model_file, acts_dir):
    """What is said of the same contexts thrice is no surer."""
    model, _ = harvest.load_model(str(model_file))
    acts = harvest.Acts(acts_dir, "val")
    tokens, x, document = (torch.as_tensor(v) for v in (*acts[np.arange(8)], acts.document[:8] % 4))
    m, site, x = make_sae(16, 40, 3, dtype=F32), evals.Site(model, *SITE), x.float()
    of = {"reconstruction": lambda t, x, d: evals.reconstruction(m, x, document=d),
          "positions": lambda t, x, d: evals.positions(m, x, d),
          "downstream": lambda t, x, d: evals.downstream(m, site, t, document=d),
          "refinement": lambda t, x, d: evals.refinement(m, x, document=d),
          "fixed_threshold": lambda t, x, d: evals.fixed_threshold(m, site, t, x[:8], x, d),
          "test_time_k": lambda t, x, d: evals.test_time_k(m, site, t, x, document=d),
          "memorization": lambda t, x, d: evals.memorization(m, x[::2], x[1::2], d.roll(1)),
          "explanation_reconstruction": lambda t, x, d: evals.explanation_reconstruction(
              m, site, t, {}, t[:8], x[:8], document=d)}
    for name, compute in of.items():
        once = compute(tokens, x, document)
        thrice = compute(tokens.repeat(3, 1), x.repeat(3, 1, 1), document.repeat(3))
        errors = [key for key in once if key.endswith("_se") and not key.startswith("compute")]
        assert errors or name == "compute", name
        for key in errors if name != "memorization" else ():
            assert thrice[key] == pytest.approx(once[key], rel=1e-3, abs=1e-9, nan_ok=True), key
        counts = {np.shape(v)[-1] for v in once["replicates"].values()}
        assert counts == {len(document.unique())}, name
    sampled = evals.ablation_sparsity(m, site, tokens, T=4, samples=20, document=document)
    assert len(sampled["replicates"]["channels"]) <= 4


def test_density_by_hand():
    m = Everything.make(3)
    with torch.no_grad():
        m.b_enc[4] = -10  # one latent that never fires
    d = evals.density(m, torch.tensor([[1.0, 2, 3]] * 9 + [[1.0, 0, 2]]), rare=0.2)
    # mean-free: (-1, 0, 1) x 9, (0, -1, 1): latents: +x 0, +y 0, +z 1, -x .9, -y off, -z 0
    assert [d["silent"], d["rare"]] == pytest.approx([4 / 6, 4 / 6]) and d["densest"] == 1.0


def test_downstream_at_both_ends(model_file, acts_dir):
    model, _ = harvest.load_model(str(model_file))
    tokens = harvest.Acts(acts_dir, "val")[np.arange(6)][0]
    perfect = evals.downstream(Everything.make(16), evals.Site(model, *SITE), tokens)
    assert abs(perfect["delta_ce"]) < 1e-5 and abs(perfect["kl"]) < 1e-5
    assert [perfect["recovered_mean"], perfect["recovered_zero"]] == pytest.approx([1, 1], abs=1e-3)
    assert perfect["ce"] == pytest.approx(harvest.lm_loss(model, tokens).item(), rel=1e-5)
    identity = evals.downstream(lambda a: a, evals.Site(model, *SITE), tokens)
    assert identity["delta_ce"] == 0 and identity["kl"] == 0 and identity["compute_equivalent"] == 1
    zero = evals.downstream(torch.zeros_like, evals.Site(model, *SITE), tokens)
    assert zero["recovered_zero"] == 0 and zero["ce_sae"] == zero["ce_zero"] and zero["kl"] > 0


def test_compute_equivalent_by_hand():
    curve = [{"flops": 100.0**i, "loss": 4.0 - i} for i in range(3)]
    assert evals.compute_equivalent(curve, 1.0)[0] == pytest.approx(0.01)
    assert evals.compute_equivalent(curve, 0.5)[0] == pytest.approx(0.1)  # half-way in logarithms
    assert evals.compute_equivalent(curve, 0.0)[0] == 1.0
    assert evals.compute_equivalent(curve, 2.5)[0] is None
    assert "no loss" in evals.compute_equivalent([], 0.1)[1]


def test_positions_and_dense_latents_by_hand():
    m = Everything.make(3)
    x = torch.tensor([[[9.0, 0, 0], [0, 1.0, 0]], [[7.0, 0, 0], [0, 0, 1.0]]])
    with torch.no_grad():
        m.W_dec[1:3] = 0  # later positions lose their largest coordinate, 2/3 of the squared norm
    p = evals.positions(m, x)
    assert p["nmse_first"] < 1e-6 and p["nmse_later"] > 0.5 and p["norm"] == [8.0, 1.0]
    assert np.mean(p["nmse"]) == pytest.approx(evals.reconstruction(m, x)["nmse"])
    # latents that follow the position, mark the first token, fire on what was there before
    T, C = 8, 40
    tokens = torch.randint(0, 6, (C, T), generator=gen(0))
    again = torch.tensor([[t in row[:i] for i, t in enumerate(row)] for row in tokens.tolist()])
    at = torch.arange(T).expand(C, T)
    features = torch.stack([at / T, (at == 0).double(), again.double()], -1).float()
    m = S.SAE(4, 3, 3)
    m.normalized = False
    with torch.no_grad():
        m.W_enc.copy_(torch.eye(4)[:3])
    found = evals.dense_latents(m, F.pad(features, (0, 1)), tokens)["densest"]
    found = {r["latent"]: r for r in found}
    assert found[0]["position"] == pytest.approx(1) and found[1]["first_token"] == pytest.approx(1)
    assert found[2]["repetition"] == pytest.approx(1)
    assert found[0]["density"] == pytest.approx(7 / 8) and found[1]["position"] < 0
    # a rank does not see how fast something grows; of a pair of opposites the product is 1
    grows = torch.zeros(C, T, 4)
    grows[..., 0] = torch.exp(at.double())
    with torch.no_grad():
        m.W_enc[1], m.W_dec[1] = -m.W_enc[0], -m.W_dec[0]
    found = evals.dense_latents(m, grows, top=1)["densest"][0]
    assert found["rank_position"] == pytest.approx(1) and found["position"] < 0.8
    assert found["antipodality"] == pytest.approx(1)
    found = {r["latent"]: r for r in evals.dense_latents(m, grows, top=3)["densest"]}
    assert found[2]["antipodality"] == pytest.approx(0, abs=1e-6)  # it has no opposite
    assert evals.ranks(torch.tensor([[3.0], [1], [3], [2]]))[:, 0].tolist() == [3.5, 1, 3.5, 2]


def test_denoising_by_hand():
    x = randn(40, 8, 6, seed=7, dtype=F32) + 2
    m = Everything.make(6)  # it keeps all the noise
    r = evals.denoise(m, x, at=(0.0, 0.1, 1.0))
    assert r["nmse"][0] < 1e-9 and r["agreement"][0] == pytest.approx(1)
    m.normalized = False  # then exactly: noise of 0.1 of the norm is 0.01 of the squared distances
    raw = evals.denoise(m, x, at=(0.1, 1.0))
    centered = S.normalize(x)[2].square().sum()
    ratio = (centered / evals.spread(x).sum()).item()
    assert raw["nmse"] == pytest.approx([0.01 * ratio, ratio], rel=0.1)
    assert r["agreement"][0] > r["agreement"][1] > r["agreement"][2]
    m = make_sae(6, 40, 3, dtype=F32)
    flat = torch.cat([x, torch.full((1, 8, 6), 3.0)])  # a constant input has no norm to speak of
    assert math.isfinite(evals.denoise(m, flat, at=(0.5,))["nmse"][0])
    clean, r = evals.reconstruction(m, x), evals.denoise(m, x, at=(0.0, 0.5))
    assert r["nmse"][0] == pytest.approx(clean["nmse"]) and r["agreement"][0] == pytest.approx(1)
    # Jaccard's: of three active latents in each, two in common are 2 of 4
    u = S.normalize(x.flatten(0, 1))[0]
    noise = torch.randn(u.shape, generator=gen(0)) * 6**-0.5 * S.normalize(x.flatten(0, 1))[2]
    v = S.normalize(x.flatten(0, 1) + 0.5 * noise)[0]
    a, b = (to_dense(*m.encode(w), 40) > 0 for w in (u, v))
    jaccard = ((a & b).sum(1) / (a | b).sum(1)).mean().item()
    assert r["agreement"][1] == pytest.approx(jaccard) and 0.1 < jaccard < 0.9


def test_memorization_sees_overfitting():
    train, held_out = randn(1, 30, 6, dtype=F32), randn(20, 30, 6, seed=1, dtype=F32)
    m = S.SAE(6, 30, 1)
    with torch.no_grad():  # one latent for each training vector
        m.W_dec.copy_(S.normalize(train[0])[0])
        m.W_enc.copy_(m.W_dec)
    r = evals.memorization(m, train.repeat(20, 1, 1), held_out)
    both = evals.reconstruction(m, torch.cat([train.repeat(20, 1, 1), held_out]))["nmse"]
    assert r["nmse_train"] < 1e-6 and r["gap"] == r["nmse_kept"] - r["nmse_train"]
    assert r["gap"] == pytest.approx(2 * both, rel=0.05)


def test_histograms_count_the_latents_that_fire():
    m, x = make_sae(6, 40, 3, dtype=F32), randn(300, 6, dtype=F32)
    d = evals.density(m, x)
    live = round((1 - d["silent"]) * 40)
    assert sum(d["log10_density"]["counts"]) == live == sum(d["log10_mean_square"]["counts"])
    counts, squares = evals.latent_sums(m, x)
    z = to_dense(*m.encode(S.normalize(x)[0]), 40)
    assert torch.equal(counts.long(), (z > 0).sum(0))
    assert torch.allclose(squares.float(), z.square().sum(0), rtol=1e-4)


def test_replacements_may_be_tensors(model_file, acts_dir):
    model, _ = harvest.load_model(str(model_file))
    tokens = harvest.Acts(acts_dir, "val")[np.arange(6)][0]
    acts = harvest.activations(model, tokens, *SITE)
    replaced = {"same": acts, "half": acts / 2, "function": lambda a: a / 2}
    per = evals.patched_losses(evals.Site(model, *SITE), tokens, replaced)
    assert per["delta_same"].abs().max() < 1e-5 and per["kl_same"].abs().max() < 1e-5
    assert torch.allclose(per["ce_half"], per["ce_function"]) and per["ce"].shape == (6,)


# Test-time k and threshold.


def test_time_k_at_both_ends(model_file, acts_dir):
    model, _ = harvest.load_model(str(model_file))
    tokens, x = harvest.Acts(acts_dir, "val")[np.arange(6)]
    r = evals.test_time_k(Everything.make(16), evals.Site(model, *SITE), tokens, x.float())
    assert r["at"] == [1, 2, 4, 8, 16, 32] and sorted(r["nmse"], reverse=True) == r["nmse"]
    assert r["nmse"][-2] < 1e-6 and abs(r["delta_ce"][-2]) < 1e-4 and r["nmse"][0] > 0.1
    m = make_sae(16, 50, 3, dtype=F32)
    r = evals.test_time_k(m, evals.Site(model, *SITE), tokens, x.float())
    assert r["at"] == [1, 2, 3, 4, 8, 12]
    assert r["nmse"][2] == pytest.approx(evals.reconstruction(m, x.float())["nmse"])


@given(st.integers(3, 9), st.integers(2, 80), st.integers(1, 5), seeds)
def test_threshold_keeps_k_on_average(d, n, k, seed):
    k = min(k, n - 1)
    m = make_sae(d, n, k, seed)
    u = S.normalize(randn(50, d, seed=seed + 1))[0]
    u[0] *= 100  # a busy token must not be cut short
    dense = to_dense(*(c.detach() for c in m.encode(u, n)), n)
    m.normalized = False  # u is what it sees
    theta = evals.calibrate_threshold(m, u)
    wanted = min(k * len(u), int((dense > 0).sum()))
    assert (dense > theta).sum() == wanted
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(evals, "CHUNK", 16)
        assert evals.calibrate_threshold(m, u) == pytest.approx(theta, abs=1e-12)
    above = torch.where(dense > theta, dense, 0.0)
    found = to_dense(*S.thresholded(m, m.W_enc, m.b_enc, theta).encode(u), n)
    assert torch.allclose(found, above, atol=1e-12) and m.theta is None and m.k == k


# Probes.


def best_logistic_loss(z, y):
    """Independent optimum, in numpy: bisection for b in a ternary search for w (a convex loss)."""
    sign = 2 * y - 1

    def best_b(w):
        low, high = -1e3 - abs(w) * np.abs(z).max(), 1e3 + abs(w) * np.abs(z).max()
        for _ in range(60):
            b = (low + high) / 2
            g = -(sign * np.exp(-np.logaddexp(0, sign * (w * z + b)))).sum()
            low, high = (low, b) if g > 0 else (b, high)
        return np.logaddexp(0, -sign * (w * z + b)).mean()

    spread = np.abs(z - np.median(z)).max() + 1e-30
    low, high = -1e4 / spread, 1e4 / spread
    for _ in range(80):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if best_b(a) < best_b(b) else (a, high)
    return best_b((low + high) / 2)


@given(st.integers(2, 25), seeds,
       st.sampled_from(["plain", "ties", "outlier", "shifted", "tiny", "skewed"]))
@settings(max_examples=15)
def test_newton_finds_the_optimum(N, seed, kind):
    rng = np.random.default_rng(seed)
    z, y = rng.standard_normal((N, 3)), rng.integers(0, 2, N)
    y[:2] = 0, 1
    z[:, 1] += y  # one informative column
    z = {"plain": z, "ties": np.round(z), "outlier": z + 1e3 * (np.arange(N) == 1)[:, None],
         "shifted": z + 1e4, "tiny": z * 1e-6, "skewed": np.exp(3 * z)}[kind]
    loss, w, b = evals.newton_logistic(torch.tensor(z), torch.tensor(y))
    for j in range(3):
        again = np.logaddexp(0, -(2 * y - 1) * (w[j].item() * z[:, j] + b[j].item())).mean()
        assert loss[j].item() == pytest.approx(again, abs=1e-7)
        assert loss[j].item() <= best_logistic_loss(z[:, j], y) + 1e-6


def test_newton_on_separable_and_constant_columns():
    y = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    z = torch.stack([y - 5.0, 1e-3 * torch.arange(7), torch.full((7,), 2.5), torch.zeros(7),
                     -y.float()], 1)
    loss, w, b = evals.newton_logistic(z, y)
    entropy = -(3 / 7 * math.log(3 / 7) + 4 / 7 * math.log(4 / 7))
    assert (loss[[0, 1, 4]] < 1e-6).all() and w[4] < 0 < w[0]
    assert w.isfinite().all() and b.isfinite().all() and w[2] == w[3] == 0
    assert loss[2:4].tolist() == pytest.approx([entropy, entropy])
    with pytest.raises(ValueError, match="both classes"):
        evals.newton_logistic(z, torch.ones(7))


def test_newton_in_single_precision_at_size():
    z = torch.randn(2000, 50, generator=gen(0))
    y = (z[:, 0] + torch.randn(2000, generator=gen(1)) > 0.3).long()
    single, double = evals.newton_logistic(z, y)[0], evals.newton_logistic(z.double(), y)[0]
    assert (single - double).abs().max() < 1e-6 and single.argmin() == 0


def test_probes_find_a_planted_latent():
    d, N = 8, 400
    y = (torch.arange(N) % 2).long()
    u = randn(N, d, dtype=F32)
    direction = F.normalize(torch.ones(d), dim=0)
    u += 6 * (y[:, None] - 0.5) * direction  # a direction that no channel holds alone
    m = make_sae(d, 30, 2, dtype=F32)
    with torch.no_grad():
        m.W_enc[17] = direction
    r = evals.probes(m, [("planted", u, u, y), ("nothing", u, u, (randn(N, seed=3) > 0).long())])
    t = r["per_task"]["planted"]
    assert t["latent"]["held_out"] < 0.1 < t["channel"]["held_out"] < t["majority"]
    assert t["latent"]["index"] == 17 and t["majority"] == pytest.approx(math.log(2), abs=1e-3)
    nothing = r["per_task"]["nothing"]["latent"]
    assert nothing["loss"] + 0.005 < nothing["held_out"]
    mean = np.mean([t["latent"]["held_out"] for t in r["per_task"].values()])
    assert r["held_out"] == pytest.approx(mean) and r["tasks"] == 2
    with pytest.raises(harvest.UserError, match="tokens"):
        evals.probes(m, [])


def test_a_probe_is_scored_on_examples_that_it_has_not_seen():
    """Labels that are noise: whatever is found in one half, the other half knows nothing of it."""
    d, N = 16, 128
    u, m = randn(N, d, dtype=F32), make_sae(16, 512, 2, dtype=F32)
    tasks = [(str(s), u, u, torch.randperm(N, generator=gen(s)) % 2) for s in range(6)]
    r = evals.probes(m, tasks)
    assert r["loss"] < math.log(2) - 0.04 and r["held_out"] > math.log(2)
    name, x, u, y = tasks[0]
    order = torch.randperm(N, generator=gen(0))
    order = order[y[order].sort(stable=True).indices]
    fit, rest = order[::2], order[1::2]
    z = m.pre_acts(u)[:, r["per_task"][name]["latent"]["index"]].detach()
    _, w, b = evals.newton_logistic(z[fit, None], y[fit])
    p = torch.sigmoid(w * z[rest] + b)
    loss = -torch.where(y[rest] == 1, p, 1 - p).log().mean()
    assert r["per_task"][name]["latent"]["held_out"] == pytest.approx(loss.item(), rel=1e-4)


def test_token_labels_by_hand():
    encoding = harvest.bpe_encoding([" a", "12", "No", "ok", " ok", "AB"])  # ids 256 ...
    space_a, digits, no, ok, space_ok, capitals = range(256, 262)
    newline, x = 10, ord("x")
    tokens = torch.tensor([[space_a, digits, no, newline, ok, capitals, x, no]] * 2)
    labels = evals.token_labels(tokens, encoding)
    assert labels["leading space"][0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert labels["contains a digit"][0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert "all digits" not in labels  # the same here
    assert labels["leading capital"][0].tolist() == [0, 0, 1, 0, 0, 1, 0, 1]
    assert labels["all capitals"][0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    assert labels["no alphanumeric"][0].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert labels["follows a newline"][0].tolist() == [-1, 0, 0, 0, 1, 0, 0, 0]
    assert labels["first half of the context"][0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    # "No ok" is a phrase; "ok" is also met after others
    tokens = torch.tensor([[x, no, ok, digits, ok, x, no, ok]])
    phrase = evals.token_labels(tokens, encoding)["phrase No ok"][0]
    assert phrase.tolist() == [-1, -1, 1, -1, 0, -1, -1, 1]
    # what follows the first word alone counts too, no more often than the second word alone
    tokens = torch.tensor([[x, no, ok, digits, ok, x, no, digits, no, digits, no, ok]])
    phrase = evals.token_labels(tokens, encoding)["phrase No ok"][0]
    assert phrase.tolist() == [-1, -1, 1, -1, 0, -1, -1, 0, -1, -1, -1, 1]


def test_text_features_are_means_over_tokens(model_file):
    model, encoding = harvest.load_model(str(model_file))
    m, site = make_sae(16, 20, 2, dtype=F32), evals.Site(model, *SITE)
    texts = ["def f(x):\n    return x " * 9, "x", "print(3)"]
    asked = {name: (texts, [0, 1, 1]) for name in ("t", "phrase_of x")}
    tasks = list(evals.text_tasks(m, site, encoding, asked, length=16, batch=2))
    for text, last in zip(texts, tasks[1][1]):
        ids = torch.tensor([encoding.encode_ordinary(text)[-16:]])
        assert torch.allclose(last, model.acts(ids, *SITE)[0, -1], atol=1e-5)
    (name, x, u, y) = tasks[0]
    assert name == "t" and y.tolist() == [0, 1, 1]
    for i, text in enumerate(texts):
        ids = encoding.encode_ordinary(text)
        pieces = [torch.tensor([ids[j : j + 16]]) for j in range(0, len(ids), 16)]
        acts = torch.cat([model.acts(piece, *SITE)[0] for piece in pieces])
        normal = S.normalize(acts)[0]
        assert torch.allclose(x[i], acts.mean(0), atol=1e-5)
        assert torch.allclose(u[i], normal.mean(0), atol=1e-5)
        assert torch.allclose(m.pre_acts(u[i]), m.pre_acts(normal).mean(0), atol=1e-5)


# Neuron2Graph. Each case is a function on tokens that plays the latent.

PAD = 0


def latent_acts(fires):
    """A latent given as a function (tokens up to here) -> activation, as N2G.build wants it."""
    along = lambda s: [float(fires(list(s[: i + 1]))) for i in range(len(s))]
    return lambda sequences: [along(s) for s in sequences]


def explain_cases(fires, sequences):
    examples = [(s, i) for s in sequences for i in range(len(s)) if fires(s[: i + 1]) > 0]
    return evals.N2G.build(latent_acts(fires), examples, PAD)


def test_n2g_one_token():
    e = explain_cases(lambda s: 2.0 * (s[-1] == 7), [[3, 7, 4], [7, 7, 1]])
    assert e.patterns == [((7,), 2.0)] and e.predict([7, 3, 7, 8]) == [2.0, 0, 2.0, 0]
    # also when that token is the padding itself
    e = explain_cases(lambda s: 1.0 * (s[-1] == PAD), [[3, PAD, 4]])
    assert e.predict([3, PAD, 4]) == [0, 1.0, 0]


def test_n2g_bigram():
    e = explain_cases(lambda s: 1.0 * (s[-2:] == [5, 6]), [[1, 5, 6, 2], [9, 9, 5, 6]])
    assert e.patterns == [((5, 6), 1.0)] and e.predict([6, 5, 6, 6]) == [0, 0, 1.0, 0]


def test_n2g_wildcard():
    fires = lambda s: 1.0 * (len(s) > 2 and s[-3] == 5 and s[-1] == 6)
    e = explain_cases(fires, [[1, 5, 8, 6], [5, 9, 6]])
    assert e.patterns == [((5, evals.WILDCARD, 6), 1.0)]
    assert e.predict([5, 1, 6, 6]) == [0, 0, 1.0, 0]


def test_n2g_anchored_start():
    e = explain_cases(lambda s: 1.0 * (s == [4]), [[4, 1]])
    assert e.patterns == [((evals.START, 4), 1.0)] and e.predict([4, 4]) == [1.0, 0]


def test_patterns_can_be_read():
    """Tokens that are parts of a character are joined where they make up one; else their bytes."""
    encoding = harvest.bpe_encoding([" ab"])
    e_acute, dash = list("é".encode()), list("—".encode())
    assert evals.spell([256, *e_acute, *dash, 10], encoding) == [" ab", "é", "—", "\n"]
    assert evals.spell([*dash[:2], 256, e_acute[1]], encoding) == ["\\xe2\\x80 ab", "\\xa9"]
    patterns = [([evals.START, *e_acute, evals.WILDCARD, dash[0], evals.WILDCARD, 34], 2.0)]
    assert evals.N2G(patterns).readable(encoding) == ['^ "é" * "\\xe2" * "\\""  (2.000)']


def test_n2g_half_the_activation_is_enough():
    # 3.0 after a 5, 1.8 without: the suffix is the token alone; 1.2 would be too little
    for alone, pattern in ((1.8, (6,)), (1.2, (5, 6))):
        e = explain_cases(lambda s: (3.0 if s[-2:-1] == [5] else alone) * (s[-1] == 6), [[5, 6]])
        assert e.patterns == [(pattern, alone if pattern == (6,) else 3.0)]


def test_n2g_backtracks():
    # after the last 3, the exact 2 leads to patterns with 1; "9 * 3" must be found behind it
    e = evals.N2G([((1, 2, 3), 1.0), ((9, evals.WILDCARD, 3), 2.0)])
    assert e.predict([9, 2, 3]) == [0, 0, 2.0]
    assert e.predict([1, 2, 3])[2] == 1.0 and e.predict([8, 2, 3])[2] == 0
    # the longest match speaks, exact before wildcard, else the shorter one
    e = evals.N2G([((3,), 5.0), ((2, 3), 7.0), ((evals.WILDCARD, 3), 6.0), ((3,), 4.0)])
    assert e.predict([3, 3, 2, 3]) == [4.5, 6.0, 0, 7.0]


def test_n2g_of_silent_and_empty_examples():
    assert evals.N2G.build(latent_acts(lambda s: 0.0), [([1, 2], 1)], PAD).predict([1, 2]) == [0, 0]
    assert evals.N2G([]).predict([1]) == [0]


@given(st.lists(st.lists(st.integers(-1, 3), min_size=1, max_size=4), max_size=8),
       st.lists(st.integers(0, 3), min_size=1, max_size=9), st.booleans())
def test_n2g_prediction_is_positive_where_any_pattern_fits(patterns, tokens, anchored):
    patterns = [([evals.START] if anchored and i % 2 else []) + p for i, p in enumerate(patterns)]
    e = evals.N2G([(p, 1.0) for p in patterns])

    def fits(pattern, t):
        start = pattern[0] == evals.START
        body = pattern[start:]
        first = t - len(body) + 1
        return (first >= 0 and (first == 0 or not start)
                and all(p in (evals.WILDCARD, tokens[first + i]) for i, p in enumerate(body)))

    expected = [any(fits(p, t) for p in patterns) for t in range(len(tokens))]
    assert [v > 0 for v in e.predict(tokens)] == expected


@given(seeds, st.integers(1, 5))
@settings(max_examples=20)
def test_simulating_many_explanations_at_once_is_predicting_each(seed, latents):
    rng = np.random.default_rng(seed)
    start = lambda: [evals.START] if rng.random() < 0.2 else []
    pattern = lambda: start() + rng.integers(-1, 3, rng.integers(1, 4)).tolist()
    pairs = lambda: [(pattern(), float(rng.integers(0, 3))) for _ in range(rng.integers(0, 6))]
    found = {7 * i: evals.N2G(pairs()) for i in range(latents)}
    tokens = torch.from_numpy(rng.integers(0, 3, (3, 6)))
    latent, at, value = evals.simulate(found, tokens)
    dense = torch.zeros(7 * latents, 18)
    dense[latent, at] = value.float()
    for i, e in found.items():
        assert dense[i].tolist() == [v for row in tokens for v in e.predict(row)]


def token_world(V=12, d=16, T=8):
    """A model whose activation is the token and nothing else; a latent for each token."""
    model = harvest.GPT2(harvest.GPT2Config(V, T, d, 1, 1)).eval().requires_grad_(False)
    basis = torch.linalg.qr(torch.eye(d) - 1 / d)[0][:, : d - 1].T  # orthonormal, zero mean
    for p in model.h.parameters():
        p.zero_()
    model.wpe.weight.zero_()
    model.wte.weight.copy_(3 * basis[:V])
    sae = S.SAE(d, V, 1)
    with torch.no_grad():
        sae.W_dec.copy_(basis[:V]), sae.W_enc.copy_(basis[:V]), sae.b_enc.fill_(-0.25)
        sae.W_enc *= 1.25
    tokens = torch.randint(0, V, (60, T), generator=gen(0))
    tokens[:, 1] = 3
    return model, sae, tokens


def test_a_latent_for_one_token_is_explained_perfectly():
    model, sae, tokens = token_world()
    site = evals.Site(model, 0, "resid_post_mlp")
    x = site.acts(tokens)
    fit = tokens[:40], x[:40]
    found = evals.explain(sae, site, *fit, PAD)
    expected = {i: [((i,), pytest.approx(1.0, rel=1e-4))] for i in range(12)}
    assert {i: e.patterns for i, e in found.items()} == expected
    r = evals.n2g(sae, found, tokens[20:], x[20:], examples=8)
    assert r["precision"] == r["recall"] == 1 and r["latents"] == 12 and r["skipped"] == 0
    assert evals.n2g(sae, found, tokens[:2], x[:2], examples=2)["skipped"] > 0
    full = evals.explanation_reconstruction(sae, site, tokens[40:], found, *fit, bigram=2.0)
    assert abs(full["delta_ce"]) < 1e-4 and abs(full["ce_without_latents"] - full["ce"]) > 1
    assert full["explained"] == 12 and full["bigram"] == 2.0
    none = evals.explanation_reconstruction(sae, site, tokens[40:], {}, *fit)
    assert none["ce"] == none["ce_without_latents"] and none["explained"] == 0
    # predictions of any size are scaled back to the activations by E[s a] / E[s^2]
    wrong = {i: evals.N2G([(p, 7.0) for p, _ in e.patterns]) for i, e in found.items()}
    scaled = evals.explanation_reconstruction(sae, site, tokens[40:], wrong, *fit)
    assert scaled["ce"] == pytest.approx(full["ce"], abs=1e-5)
    few = evals.explain(sae, site, *fit, PAD, most=5)
    assert len(few) == 5 and few.keys() == evals.explain(sae, site, *fit, PAD, most=5).keys()
    e = evals.N2G([((evals.START, ord("a"), evals.WILDCARD, 10), 2.0)])
    assert e.readable(harvest.bpe_encoding([])) == ['^ "a" * "\\n"  (2.000)']


def test_last_token_acts_are_the_codes_own(model_file, acts_dir):
    model, _ = harvest.load_model(str(model_file))
    m = make_sae(16, 30, 4, dtype=F32)
    rows = harvest.Acts(acts_dir, "val")[np.arange(5)][0].tolist()
    asked = [((i, 0), row[: 1 + (3 * i + j) % 15]) for i in range(30) for j, row in enumerate(rows)]
    for budget in (16, 10**6):
        answers = evals.last_token_acts(m, evals.Site(model, *SITE), asked, budget)
        for ((i, _), ids), a in zip(asked, answers):
            act = model.acts(torch.tensor([ids]), *SITE)[0, -1:]
            z = to_dense(*m.encode(S.normalize(act)[0]), 30)
            assert a == pytest.approx(z[0, i].item(), abs=1e-5)


# Sparsity of ablation effects.


def test_effect_sparsity_of_known_vectors():
    V, T = 101, 4
    one = torch.zeros(T, V)
    one[2, 7] = -3.0
    assert evals.effect_sparsity(one) == pytest.approx(1 / (V * T))
    shifted = one + 5 * torch.arange(T)[:, None]  # a shift of all logits is no effect
    assert evals.effect_sparsity(shifted) == pytest.approx(1 / (V * T))
    half = torch.zeros(T, V)
    half[:, :50] = 1.0  # the median is 0
    assert evals.effect_sparsity(half) == pytest.approx(50 / V)
    normal = torch.randn(16, 20000, generator=gen(0))
    assert evals.effect_sparsity(normal) == pytest.approx(2 / math.pi, rel=0.01)
    both = evals.effect_sparsity(torch.stack([one, half]))
    assert both.tolist() == [pytest.approx(1 / (V * T)), pytest.approx(50 / V)]


def test_ablation_sparsity_against_a_loop(model_file, acts_dir):
    model, _ = harvest.load_model(str(model_file))
    m = make_sae(16, 30, 4, dtype=F32)
    row = harvest.Acts(acts_dir, "val")[np.arange(1)][0][:, :6]  # one context: the position is 0
    r = evals.ablation_sparsity(m, evals.Site(model, *SITE), row, T=6, samples=1, directions=16)
    act = model.acts(row, *SITE)[0, 0]
    u, _, norm = S.normalize(act)
    values, indices = m.encode(u[None])

    def share(minus, T, at=0):
        def edit(a):
            a = a.clone()
            a[0, at] -= minus
            return a

        delta = (model(row, *SITE, edit) - model(row))[0, at : at + T].detach().double().numpy()
        delta -= np.sort(delta, 1)[:, (delta.shape[1] - 1) // 2][:, None]
        return np.abs(delta).sum() ** 2 / (delta**2).sum() / delta.size

    latents = [v * norm * m.W_dec[i].detach() for v, i in zip(values[0], indices[0]) if v > 0]
    channels = [act * (torch.arange(16) == i) for i in range(16)]
    mean = lambda effects, T: pytest.approx(np.mean([share(c, T) for c in effects]), rel=1e-3)
    assert r["latents"] == mean(latents, 6) and r["ablations"] == 3 * len(latents)
    assert r["latents_first"] == r["latents_middle"] == r["latents"]  # there is but one place
    r2 = evals.ablation_sparsity(m, evals.Site(model, *SITE), row, T=2, samples=1, directions=16)
    for at, name in ((0, "channels_first"), (2, "channels_middle")):
        act = model.acts(row, *SITE)[0, at]
        shares = [share(act * (torch.arange(16) == i), 2, at) for i in range(16)]
        assert r2[name] == pytest.approx(np.mean(shares), rel=1e-3)
    assert r["channels"] == mean(channels, 6) and r["channels_here"] == mean(channels, 1)


def test_ablation_of_a_token_without_active_latents(model_file, acts_dir):
    model, _ = harvest.load_model(str(model_file))
    m = make_sae(16, 30, 4, dtype=F32)
    with torch.no_grad():
        m.b_enc.fill_(-100)
    tokens = harvest.Acts(acts_dir, "val")[np.arange(2)][0]
    r = evals.ablation_sparsity(m, evals.Site(model, *SITE), tokens, samples=2)
    assert math.isnan(r["latents"]) and r["ablations"] == 0 and r["channels"] > 0


# Shrinkage.


@given(st.integers(1, 6), st.integers(1, 4), seeds, st.booleans())
@settings(max_examples=60)
def test_nnls_against_every_support(k, B, seed, correlated):
    W = randn(B, k, k + 2, seed=seed)
    W = W + 3 * W[:, :1] if correlated else W
    v = randn(B, k + 2, seed=seed + 1) + W.sum(1) * 0.5
    G, h = W @ W.mT + 1e-9 * torch.eye(k, dtype=W.dtype), (W @ v[:, :, None])[:, :, 0]
    z = evals.nnls(G, h, torch.zeros_like(h))
    value = lambda z, b: (z @ G[b] @ z / 2 - h[b] @ z).item()
    assert (z >= 0).all()
    for b in range(B):
        best = 0.0
        for support in range(1, 2**k):
            s = [i for i in range(k) if support >> i & 1]
            on = torch.zeros(k, dtype=W.dtype)
            on[s] = torch.linalg.solve(G[b][s][:, s], h[b][s])
            best = min(best, value(on, b)) if (on >= 0).all() else best
        assert value(z[b], b) <= best + 1e-8 * (1 + abs(best))


def test_a_probe_is_no_surer_than_its_examples():
    """One that separates the half it was fitted on, and errs once on the other."""
    y = torch.tensor([0, 1] * 100)
    z = (2.0 * y - 1)[:, None] + 0.1 * randn(200, 1, dtype=F32)
    z[199] = -1.0
    fit, rest = torch.arange(100), torch.arange(100, 200)
    found = evals.best_probe(lambda part: z[:, part], 1, y, fit, rest)
    assert found["loss"] < 1e-6
    assert found["held_out"] == pytest.approx(math.log(201) / 100 + math.log1p(1 / 200), rel=0.1)


@pytest.mark.parametrize("scale", [1, 1e-3])
def test_nnls_is_exact_above_the_rank(scale):
    # slope >= 0 and slope'z = 0 make z optimal; what is missing from that bounds the excess
    B, k, d = 8, 120, 64
    W, v = F.normalize(randn(B, k, d), dim=2), scale * randn(B, d, seed=1)
    h = (W @ v[:, :, None])[:, :, 0]
    z0 = h.clamp_min(1e-3 * scale)
    G, h = W @ W.mT + 1e-9 * torch.eye(k, dtype=W.dtype), h + 1e-9 * z0
    z = evals.nnls(G, h, z0)
    slope = (G @ z[:, :, None])[:, :, 0] - h
    gap = (slope * z).sum(1).abs() + (-slope).amax(1).clamp_min(0) * 2 * z.sum(1)
    assert (z >= 0).all() and (gap < 1e-7 * v.square().sum(1)).all()


@pytest.mark.parametrize("d, n, k", [(8, 60, 20), (16, 64, 32), (6, 30, 6)])
def test_refinement_never_makes_it_worse(d, n, k):
    # more active latents than dimensions: many supports are as good, and pivoting alone may not end
    r = evals.refinement(make_sae(d, n, k, dtype=F32), randn(4, 16, d, dtype=F32))
    assert 0 <= r["nmse_refined"] <= r["nmse"] and r["gain"] >= 0


def test_refinement_finds_a_planted_shrinkage():
    x = randn(5, 40, 6, dtype=F32)
    fair = evals.refinement(Everything.make(6), x)
    assert fair["ratio"] == pytest.approx(1, abs=1e-5) and fair["nmse"] < 1e-10
    m = Everything.make(6)
    with torch.no_grad():
        m.W_enc *= 0.8
    shrunk = evals.refinement(m, x)
    assert [shrunk["ratio"], shrunk["ratio_median"]] == pytest.approx([1.25, 1.25], rel=1e-4)
    assert shrunk["nmse"] == pytest.approx(evals.reconstruction(m, x)["nmse"], rel=1e-4)
    assert shrunk["nmse_refined"] < 1e-8 and shrunk["gain"] > 0.999
    # two active latents of one direction: any split is as good, the least change is taken
    m = S.SAE(6, 12, 12)
    with torch.no_grad():
        m.W_dec[1] = m.W_dec[0]
        m.W_enc.copy_(m.W_dec)
    found = evals.refinement(m, x)
    assert all(math.isfinite(v) for v in found.values() if not isinstance(v, dict))


# Scaling laws.

GPT4 = dict(alpha=-0.50, beta_k=0.26, beta_n=-0.017, gamma=-0.042, zeta=-1.32, eta=-0.085)
STEEP = dict(alpha=1.0, beta_k=-0.5, beta_n=-0.3, gamma=0.01, zeta=-3.0, eta=-0.1)


def law(p, n, k):
    ln_k, ln_n = math.log(k), math.log(n)
    power = p["alpha"] + p["beta_k"] * ln_k + p["beta_n"] * ln_n + p["gamma"] * ln_k * ln_n
    return math.exp(power) + math.exp(p["zeta"] + p["eta"] * ln_k)


@pytest.mark.parametrize("planted", [GPT4, STEEP])
@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_scaling_law_recovers_planted_constants(planted, noise):
    rng = np.random.default_rng(0)
    runs = [{"n_latents": 2**i, "k": 2**j,
             "nmse": law(planted, 2**i, 2**j) * math.exp(noise * rng.standard_normal())}
            for i in range(10, 25) for j in range(3, 10)]
    fit = evals.fit_scaling_law(runs)
    for name, value in planted.items():
        assert fit[name] == pytest.approx(value, abs=1e-5 if not noise else 4 * fit[name + "_se"])
        assert not noise or fit[name + "_se"] < 0.5 * abs(value) + 0.05
    assert fit["r2"] > 0.999 and fit["r2_without"] < fit["r2"]
    assert fit["delta_aic"] > 10 and fit["runs"] == 105


def test_standard_errors_of_the_scaling_law_cover_the_truth():
    rng, covered = np.random.default_rng(1), []
    for _ in range(12):
        runs = [{"n_latents": 2**i, "k": 2**j,
                 "nmse": law(STEEP, 2**i, 2**j) * math.exp(0.03 * rng.standard_normal())}
                for i in range(9, 14) for j in range(2, 6)]
        fit = evals.fit_scaling_law(runs)
        covered += [abs(fit[name] - STEEP[name]) <= fit[name + "_se"] for name in STEEP
                    if math.isfinite(fit[name + "_se"])]
    assert 0.6 < np.mean(covered) < 0.9 and len(covered) > 50


def test_standard_errors_of_a_power_law_take_a_curve_as_one():
    rng, covered = np.random.default_rng(0), {True: [], False: []}
    x, curve = np.logspace(0, 3, 30), np.repeat(np.arange(5), 6)
    for _ in range(25):
        loss = (0.04 + 0.5 * x**-0.5) * np.exp(0.01 * rng.standard_normal(5))[curve]
        for together in covered:
            fit = evals.fit_power_law(x, loss, curve if together else None)
            covered[together] += [abs(fit["b"] + 0.5) <= fit["b_se"],
                                  abs(fit["floor"] - 0.04) <= fit["floor_se"]]
    assert 0.5 <= np.mean(covered[True]) <= 0.8 and np.mean(covered[False]) < 0.4


def test_no_standard_error_of_what_the_runs_do_not_determine():
    # what is special at one k alone leaves only zeta + eta ln k of the second term
    rng, runs = np.random.default_rng(1), []
    for n, k in itertools.product((256, 512, 1024, 2048), (4, 8, 16)):
        nmse = (n * k) ** -0.2 * math.exp(0.002 * rng.standard_normal()) + 0.02 * (k == 16)
        runs.append({"n_latents": n, "k": k, "nmse": nmse})
    fit = evals.fit_scaling_law(runs)
    assert all(math.isnan(fit[name + "_se"]) for name in evals.LAW)


def test_scaling_law_does_not_need_what_is_not_there():
    nmse = lambda n, k: math.exp(0.3 - 0.2 * math.log(n) - 0.1 * math.log(k))
    runs = [{"n_latents": n, "k": k, "nmse": nmse(n, k)}
            for n in (256, 512, 1024, 4096) for k in (8, 16, 32)]
    rng = np.random.default_rng(0)
    for r in runs:
        r["nmse"] *= math.exp(0.01 * rng.standard_normal())
    for some in (runs, runs[:9], runs[:7]):
        fit = evals.fit_scaling_law(some)
        assert not fit["delta_aic"] > 10 and fit["r2_without"] > 0.9


def test_scaling_law_refuses_too_few_runs():
    runs = [{"n_latents": 2**i, "k": 8 if i % 2 else 16, "nmse": 0.1} for i in range(5)]
    with pytest.raises(harvest.UserError, match="6 parameters, and there are 5 runs"):
        evals.fit_scaling_law(runs)
    with pytest.raises(harvest.UserError, match=r"two k .* k \[8\] and n \[1, 2, .* 256\];"):
        evals.fit_scaling_law([{"n_latents": 2**i, "k": 8, "nmse": 1 / (i + 1)} for i in range(9)])
    with pytest.raises(harvest.UserError, match="3 parameters"):
        evals.fit_power_law([1, 2], [0.5, 0.4])


def test_power_law_recovers_planted_constants():
    x = np.logspace(-6, 0, 20)
    fit = evals.fit_power_law(x, 0.09 + 0.056 * x**-0.084)  # GPT-4's L(C)
    found = [fit["b"], fit["floor"], math.exp(fit["a"])]
    assert found == pytest.approx([-0.084, 0.09, 0.056], rel=1e-3)


# All of them together.


@given(seeds)
@settings(max_examples=2)
def test_metrics_do_not_depend_on_the_order_of_latents(model_file, acts_dir, seed):
    model, encoding = harvest.load_model(str(model_file))
    tokens, x = harvest.Acts(acts_dir)[np.arange(30)]
    x, site = x.float(), evals.Site(model, *SITE)
    m, p = (make_sae(16, 40, 3, dtype=F32) for _ in range(2))
    order = torch.randperm(40, generator=gen(seed))
    fit, rest = (tokens[:15], x[:15]), (tokens[15:], x[15:])
    with torch.no_grad():
        for w in (p.W_enc, p.W_dec, p.b_enc):
            w.copy_(w[order])

    def explained(sae):
        found = evals.explain(sae, site, *fit, PAD, examples=4)
        measured = scalars(evals.n2g(sae, found, *rest, examples=4))
        return measured | evals.explanation_reconstruction(sae, site, rest[0], found, *fit)

    scalars = lambda r: {name: v for name, v in r.items() if not isinstance(v, dict)}
    densest = lambda sae: evals.dense_latents(sae, x, tokens, top=1)["densest"][0]
    tasks = lambda sae: evals.token_tasks(sae, x, tokens, encoding, least=8)
    metrics = {
        "reconstruction": lambda sae: evals.reconstruction(sae, x),
        "memorization": lambda sae: evals.memorization(sae, x[:15], x[15:]),
        "density": lambda sae: scalars(evals.density(sae, x.flatten(0, 1))),
        "densest": lambda sae: densest(sae) | {"latent": 0},
        "positions": lambda sae: evals.positions(sae, x),
        "downstream": lambda sae: evals.downstream(sae, site, tokens),
        "test_time_k": lambda sae: evals.test_time_k(sae, site, tokens, x),
        "fixed_threshold": lambda sae: evals.fixed_threshold(sae, site, tokens, x[:15], x[15:]),
        "probes": lambda sae: scalars(evals.probes(sae, tasks(sae))),
        "n2g": explained,
        "ablation_sparsity": lambda sae: evals.ablation_sparsity(sae, site, tokens, T=4, samples=3),
        "refinement": lambda sae: evals.refinement(sae, x),
        "denoise": lambda sae: evals.denoise(sae, x),
    }
    names = {"densest" if name == "dense_latents" else name for name in evals.METRICS}
    assert names - {"explanation_reconstruction"} == metrics.keys()
    for name, metric in metrics.items():
        a, b = metric(m), metric(p)
        for key in a.keys() - {"replicates"}:
            exact = a[key] is None or isinstance(a[key], str)
            expected = b[key] if exact else pytest.approx(b[key], rel=1e-3, abs=1e-6, nan_ok=True)
            assert a[key] == expected, (name, key)


# --------------------------------------------------------------------------------- the command line


def run(main, argv, capsys):
    """Run a main() as the shell would: (exit status, stderr)."""
    capsys.readouterr()
    try:
        harvest.run_main(lambda: main([str(a) for a in argv]))
        code = 0
    except SystemExit as e:
        code = e.code
    return code, capsys.readouterr().err


def refuses(main, argv, capsys, *said):
    code, err = run(main, argv, capsys)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: "), err
    assert all(s in last for s in said), last


TINY = ["--n_latents", 64, "--k", 4, "--batch", 128, *CPU]


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory, acts_dir):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    S.main([str(a) for a in [*TINY, "--acts", acts_dir, "--out", out]])
    return out


def test_end_to_end_in_subprocesses(tmp_path, model_file, text_file):
    env = os.environ | {"SAE_CACHE": str(tmp_path / "cache")}
    env |= {"PYTHONIOENCODING": "ascii"}  # a terminal that lacks Δ
    (tmp_path / "toy.pt").write_bytes(model_file.read_bytes())
    (tmp_path / "elsewhere").mkdir()
    given = ["--model", "toy.pt", "--text", text_file]
    r = python(HERE / "sae.py", *TINY, *given, "--out", "runs/x", cwd=tmp_path, env=env)
    assert r.returncode == 0, r.stderr  # it harvests by itself
    r = python(HERE / "evals.py", "../runs/x", *CPU, cwd=tmp_path / "elsewhere", env=env)
    assert r.returncode == 0, r.stderr
    assert "NMSE, held-out" in r.stdout and "\\u0394CE" in r.stdout
    assert f"{tmp_path}/toy.pt" in r.stdout
    out = tmp_path / "runs/x"
    results = read_json(out / "evals.json")
    assert 0 < results["reconstruction"]["nmse"] < 1.5 and results["reconstruction"]["l0"] <= 4
    written = {"config.json", "log.jsonl", "sae.pt", "evals.json", newest(out).name}
    assert written <= {f.name for f in out.iterdir()}


def test_sigint_saves_and_resume_gives_the_same_bits(tmp_path, acts_dir):
    argv = [*TINY, "--acts", acts_dir, "--tokens", 128 * 700, "--lr", 1e-3]
    script = [sys.executable, str(HERE / "sae.py"), *map(str, argv)]
    p = subprocess.Popen([*script, "--out", "b"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "b/log.jsonl"
    while not log.exists() or len(log.read_text()) < 300:
        assert p.poll() is None, p.stderr.read()
        time.sleep(0.01)
    p.send_signal(signal.SIGINT)
    assert p.wait(60) == 130 and "--resume" in p.stderr.read()
    assert not (tmp_path / "b/sae.pt").exists()
    S.main([*map(str, argv), "--out", str(tmp_path / "a")])
    S.main([*map(str, argv), "--out", str(tmp_path / "b"), "--resume"])
    a, b = (S.SAE.load(tmp_path / r / "sae.pt") for r in "ab")
    assert same_weights(a, b)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_every_signal_that_asks_to_stop_saves(tmp_path, name):
    if not hasattr(signal, name):
        pytest.skip("not on this system")
    cfg = tiny_config(tmp_path)
    ask = lambda line: line["step"] == 7 and os.kill(os.getpid(), getattr(signal, name))
    with pytest.raises(KeyboardInterrupt, match="stopped at step 8; saved a checkpoint"):
        S.train(cfg, planted_batches, log=ask)
    assert newest(cfg.out).name == "checkpoint-000000008"


def test_evaluating_an_openai_autoencoder(tmp_path, model_file, text_file, run_dir, capsys):
    ours, s = S.SAE.load(run_dir / "sae.pt"), math.sqrt(15)
    theirs = {"pre_bias": ours.b_pre * s, "encoder.weight": ours.W_enc,
              "latent_bias": ours.b_enc * s, "decoder.weight": ours.W_dec.T}
    topk = {"activation": "TopK", "activation_state_dict": {"k": 4, "postact_fn": "ReLU"}}
    file, results = tmp_path / "8.pt", tmp_path / "8.evals.json"
    argv = [str(file), "--model", str(model_file), "--layer", "2", *CPU, "--text"]
    torch.save({k: v.detach() for k, v in theirs.items()} | topk, file)
    code, err = run(evals.main, [*argv, text_file], capsys)
    assert code == 0, err
    evals.main([str(run_dir), *CPU])
    a, b = (read_json(f)["reconstruction"]["nmse"] for f in (results, run_dir / "evals.json"))
    assert a == pytest.approx(b, rel=0.15)  # other contexts of the same documents
    # results are kept for a second call, but never taken for those of another file
    before = results.read_text()
    evals.main([*argv, str(text_file)])
    assert results.read_text() == before
    few = tmp_path / "few.jsonl"  # so little text that nothing is left beside what is measured
    few.write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCS[:12]))
    code, err = run(evals.main, [*argv, few, "--all"], capsys)
    assert code == 0 and "n2g: the held-out text is too short" in err
    assert "memorization: the activations it was trained on" in err
    evals.main([*argv, str(text_file)])
    theirs["encoder.weight"] = torch.zeros_like(ours.W_enc)
    torch.save({k: v.detach() for k, v in theirs.items()} | topk, file)
    evals.main([*argv, str(text_file)])
    assert read_json(results)["reconstruction"]["nmse"] > 2 * a


def test_all_metrics_from_the_command_line_and_only_what_is_missing(run_dir, capsys, monkeypatch):
    file, n2g = run_dir / "evals.json", run_dir / "n2g.json"
    evals.main([str(run_dir), *CPU, "--only", "density,refinement"])
    assert set(read_json(file)) >= {"density", "refinement"}
    assert "refined / original" in capsys.readouterr().out
    # an interruption in the middle loses nothing of what was finished
    monkeypatch.setattr(evals, "probes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert run(evals.main, [run_dir, *CPU, "--all"], capsys)[0] == 130
    assert {"downstream", "test_time_k", "fixed_threshold"} <= read_json(file).keys()
    monkeypatch.undo()
    before = read_json(file)
    for name in ("downstream", "fixed_threshold"):  # neither is computed again
        monkeypatch.setattr(evals, name, None)
    evals.main([str(run_dir), *CPU, "--all"])
    out, results = capsys.readouterr().out, read_json(file)
    assert evals.METRICS.keys() <= results.keys()
    assert all(results[name] == before[name] for name in before)
    for text in ("N2G recall", "ΔCE at k' = 16", "probe loss, channel", "± ", " documents",
                 "at its own position alone", "CE of a bigram model", "latents explained"):
        assert text in out
    patterns = {int(i): e["patterns"] for i, e in read_json(n2g)["latents"].items()}
    assert len(patterns) == results["n2g"]["explained"] > 0
    monkeypatch.undo()
    # other settings: only what depends on them
    one = {i: evals.N2G(p) for i, p in list(patterns.items())[:1]}
    monkeypatch.setattr(evals, "explain", lambda *a: one)
    monkeypatch.setattr(evals, "ablation_sparsity", None)
    evals.main([str(run_dir), *CPU, "--only", "n2g,ablation_sparsity", "--latents", "1"])
    assert read_json(file)["n2g"]["explained"] == 1
    capsys.readouterr()
    monkeypatch.undo()
    evals.main([str(run_dir), *CPU, "--only", "density", "--json"])
    assert json.loads(capsys.readouterr().out)["density"] == results["density"]
    refuses(evals.main, [run_dir, "--only", "densty", *CPU], capsys, "no metric densty", "density")


def test_two_runs_are_compared_document_by_document(tmp_path, run_dir, acts_dir, capsys):
    for name in "ab":
        shutil.copytree(run_dir, tmp_path / name)
    sae = S.SAE.load(tmp_path / "b/sae.pt")
    with torch.no_grad():
        sae.W_enc += 0.02 * randn(*sae.W_enc.shape, dtype=F32)
    sae.save(tmp_path / "b/sae.pt")
    (tmp_path / "c").mkdir()
    argv = [*CPU, "--only", "reconstruction,downstream,positions"]
    code, err = run(evals.main, [tmp_path / "c", tmp_path / "a", *argv], capsys)
    assert code == 2 and "no autoencoder at" in err and "1 of 2 could not be evaluated" in err
    assert (tmp_path / "a/evals.json").exists()
    evals.main([str(tmp_path / "a"), str(tmp_path / "b"), *argv])
    out = capsys.readouterr().out
    assert f"{tmp_path}/b less {tmp_path}/a, paired by document" in out
    line = [line for line in out.splitlines() if line.startswith("  NMSE, held-out")][-1].split()
    difference, error = float(line[2]), float(line[4])
    a, b = (read_json(tmp_path / name / "evals.json")["reconstruction"] for name in "ab")
    assert difference == pytest.approx(b["nmse"] - a["nmse"], abs=1e-4)
    rest = np.subtract(b["replicates"]["nmse"], a["replicates"]["nmse"])
    assert error == pytest.approx(math.sqrt((len(rest) - 1) * np.var(rest)), abs=1e-4)
    assert error < a["nmse_se"]  # what both find hard is no difference


def test_results_are_printed_where_they_cannot_be_kept(run_dir, tmp_path, capsys, monkeypatch):
    shutil.copytree(run_dir, tmp_path / "a")
    (tmp_path / "a/evals.json").unlink(missing_ok=True)

    def not_allowed(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(harvest, "write_json", not_allowed)
    evals.main([str(tmp_path / "a"), *CPU, "--only", "reconstruction"])
    out, err = capsys.readouterr()
    assert "NMSE, held-out" in out and "is not written: Permission denied" in err
    monkeypatch.undo()
    # what another process has written meanwhile stays
    evals.main([str(tmp_path / "a"), *CPU, "--only", "reconstruction"])
    case = evals.Case(str(tmp_path / "a"), SimpleNamespace(
        **dict.fromkeys([o[0] for o in evals.OPTIONS]) | {"device": "cpu"}))
    assert evals.known(case).keys() == {"about", "settings", "reconstruction"}
    for name in ("evals.json", "n2g.json"):
        (tmp_path / "a" / name).write_text('{"settings": ')
    refuses(evals.main, [tmp_path / "a", *CPU], capsys, "a/evals.json is damaged", "move it away")


def test_an_autoencoder_that_says_not_of_what_is_not_guessed(tmp_path, run_dir, acts_dir, capsys):
    own = S.SAE.load(run_dir / "sae.pt")
    own.meta = {}
    own.save(tmp_path / "own.pt")
    argv = [tmp_path / "own.pt", *CPU, "--only", "reconstruction"]
    for given in ([], ["--model", "stdlib"], ["--layer", 2]):
        refuses(evals.main, [*argv, *given], capsys, "does not say whose activations", "--acts")
    assert run(evals.main, [*argv, "--acts", acts_dir], capsys)[0] == 0


def test_a_model_or_text_that_has_changed_is_not_evaluated(
        tmp_path, model_file, text_file, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(model_file, "toy.pt")
    shutil.copy(text_file, "docs.jsonl")
    given = ["--model", "toy.pt", "--text", "docs.jsonl", "--out", "r"]
    code, err = run(S.main, [*TINY, *given], capsys)
    assert code == 0, err
    argv = ["r", *CPU, "--only", "reconstruction"]
    for change, said in (("docs.jsonl", "text_sha256"), ("toy.pt", "model toy.pt has changed")):
        file = tmp_path / change
        before = file.read_bytes()
        if change == "toy.pt":
            saved = torch.load(file, weights_only=True)
            saved["state"]["wte.weight"][3] += 1
            torch.save(saved, file)
            said = "toy.pt has changed since its activations"
        else:
            shutil.move("acts", "gone")  # so that text is run
            file.write_bytes(before + b'{"text": "more"}\n')
        refuses(evals.main, argv, capsys, said)
        if change == "toy.pt":  # nor are its activations taken for those of the new one
            given = [*TINY, "--model", "toy.pt", "--out", "r2"]
            refuses(S.main, given, capsys, "acts holds other activations (model: ")
        file.write_bytes(before)
        if change != "toy.pt":
            assert run(evals.main, argv, capsys)[0] == 0  # the text again
            shutil.move("gone", "acts")


def test_relu_baseline_from_the_command_line(tmp_path, acts_dir, capsys):
    argv = [a for a in TINY if a not in ("--k", 4)]
    argv += ["--l1", 0.05, "--acts", acts_dir, "--out", tmp_path / "relu"]
    assert run(S.main, argv, capsys)[0] == 0
    sae = S.SAE.load(tmp_path / "relu/sae.pt")
    assert sae.k == sae.n_latents == 64
    wanted = "reconstruction,refinement,test_time_k,fixed_threshold,n2g"
    evals.main([str(tmp_path / "relu"), *CPU, "--only", wanted])
    out, err = capsys.readouterr()
    assert "n = 64, ReLU" in out and "fixed_threshold: a ReLU autoencoder" in err
    r = read_json(tmp_path / "relu/evals.json")
    assert 0 < r["reconstruction"]["l0"] < 64
    assert max(r["test_time_k"]["at"]) >= 4 and "fixed_threshold" not in r
    refuses(S.main, [*TINY, "--l1", -1, "--acts", acts_dir], capsys, "--l1")
    refuses(S.main, [*TINY, "--l1", 1, "--multi_topk", "--acts", acts_dir], capsys, "--multi_topk")


def test_probe_files(tmp_path, run_dir, capsys):
    good = [{"text": f"def f{i}(x)", "label": 0} for i in range(8)]
    good += [{"text": f"{i} {i} {i}", "label": 1} for i in range(8)]
    lines = [json.dumps(r) for r in good]
    base, file = [run_dir, "--only", "probes", *CPU, "--probes", tmp_path], tmp_path / "task.jsonl"
    refuses(evals.main, base, capsys, "holds no NAME.jsonl")
    for bad, *said in (("{", "task.jsonl, line 3"), ('{"text": "x"}', "line 3"), ("[1]", "line 3"),
                       ('{"text": 3, "label": 1}', "line 3"),
                       ('{"text": " ", "label": 1}', "line 3", "empty"),
                       ('{"text": "x", "label": 2}', "line 3", "label is 2")):
        file.write_text("\n".join([*lines[:2], bad, *lines[2:]]))
        refuses(evals.main, base, capsys, *said)
    file.write_text("\n".join(lines[:8]))
    refuses(evals.main, base, capsys, "task.jsonl: 8 examples of class 0 and 0 of class 1")
    file.write_text("\n".join(lines) + "\n\n")
    assert run(evals.main, base, capsys)[0] == 0
    r = read_json(run_dir / "evals.json")["probes"]
    assert list(r["per_task"]) == ["task"] and r["per_task"]["task"]["examples"] == 16
    file.write_text("\n".join(lines[1:]))  # an edited file is read again
    assert run(evals.main, base, capsys)[0] == 0
    assert read_json(run_dir / "evals.json")["probes"]["per_task"]["task"]["examples"] == 15


def test_fit_from_the_command_line(tmp_path, run_dir, capsys):
    def fake(n, k, nmse, **where):
        out = tmp_path / f"n{n}_k{k}"
        m = S.SAE(4, n, k)
        m.meta = {"nmse": {"ema": nmse}, "tokens": 1000, "config": {}, "model": "toy", **where}
        m.save(out / "sae.pt")
        log = [{"tokens": t, "val_nmse": nmse * (1 + 10 / t)} for t in (100, 300, 1000)]
        (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        return out

    runs = [fake(n, k, law(STEEP, n, k)) for n in (64, 128, 256, 512) for k in (4, 8, 16)]
    evals.main(["--fit", "--json", *map(str, runs), str(tmp_path)])
    out, err = capsys.readouterr()
    fit = json.loads(out[out.index("\n{") :])["L(n, k)"]
    assert all(fit[name] == pytest.approx(value, abs=1e-3) for name, value in STEEP.items())
    assert "no finished run" in err
    assert "L(N) at k = 16" in out and "L(C) at k = 16" in out and "R²" in out
    evals.main(["--fit", "--json", *map(str, runs[:9])])  # three curves of three points
    out = capsys.readouterr().out
    assert math.isnan(json.loads(out[out.index("\n{") :])["L(C), k = 16"]["b_se"])
    evals.main(["--fit", *map(str, runs[:4])])
    assert "6 parameters, and there are 4 runs; nothing is fitted" in capsys.readouterr().out
    refuses(evals.main, ["--fit", *runs, fake(32, 4, 0.5, model="new")], capsys, "different models")


@pytest.mark.parametrize("script", ["harvest", "sae", "evals"])
def test_help_teaches(script, capsys):
    with pytest.raises(SystemExit) as e:
        {"harvest": harvest, "sae": S, "evals": evals}[script].main(["--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0 and f"python {script}.py" in text
    if script == "sae":  # what is left out says what it becomes
        assert re.search(r"--lr LR\s+Adam's, constant \(auto: 1e-4 sqrt", text)
        assert not re.search(r"--(lr|ema|tokens|batch) [^-]*default", text)


def test_importing_runs_nothing():
    r = python("-c", "import sae, harvest, evals", cwd=HERE)
    assert (r.returncode, r.stdout, r.stderr) == (0, "", "")


# ---------------------------------------------------------------------------------- the report


NASTY = [b"</script>", b"<img src=x onerror=alert(1)>", b"\xed\xa0\x80", b"\xff\xfe",
         "\u202e\u2028".encode(), b"&amp;<b>", b"\\u003c", b"*/ --> ]]>"]


def page_of(path):
    """The data of a report, its arrays unpacked."""
    text = path.read_text(encoding="utf-8")
    data = r'<script type="application/json" id="data">(.*?)</script>'
    block = re.search(data, text, re.S).group(1)

    def unpack(v):
        if isinstance(v, dict) and set(v) == {"type", "data"}:
            return np.frombuffer(base64.b64decode(v["data"]), dtype="<" + v["type"])
        return {k: unpack(x) for k, x in v.items()} if isinstance(v, dict) else v

    return unpack(json.loads(block))


@pytest.fixture(scope="module")
def planted_page(tmp_path_factory):
    """Latent 7 fires on token 256 alone, whose text is </script>; 9 never; others as they like."""
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)} | {t: 256 + i for i, t in enumerate(NASTY)}
    encoding = tiktoken.Encoding("nasty", pat_str=".", mergeable_ranks=ranks,
                                 special_tokens={harvest.EOT: 264})
    torch.manual_seed(0)
    config = harvest.GPT2Config(n_vocab=265, n_ctx=16, d_model=16, n_layer=2, n_head=2)
    model = harvest.GPT2(config).eval()
    tokens = torch.randint(0, 265, (40, 16), generator=gen(1))
    m = make_sae(16, 32, 4, dtype=F32)
    with torch.no_grad():
        m.b_enc[9] = -100
        model.wte.weight.normal_()
        model.wte.weight[256] = 40 * m.W_dec[7] - 40 * m.W_dec[7].mean()
        x = model.acts(tokens, *SITE)
        m.W_enc[7] = F.normalize(m.W_dec[7], dim=0)
        u = S.normalize(x.flatten(0, 1))[0]
        z = (u - m.b_pre) @ m.W_enc[7]
        here = tokens.flatten() == 256
        assert z[here].min() > z[~here].max()
        m.b_enc[7] = -(z[here].min() + z[~here].max()) / 2
        m.W_enc[7] *= 50
        m.b_enc[7] *= 50
    page = evals.report(m, evals.Site(model, *SITE), tokens, x, encoding)
    path = tmp_path_factory.mktemp("report") / "report.html"
    extra = {"about": "<b>about</b>", "metrics": [["NMSE", 0.5, math.nan, "", "1 token"]],
             "tasks": [["digits", 0.1, 0.2, 0.7]], "dense": [[7, 0.1, *[0.0] * 5]], "plots": {},
             "curves": {n: [] for n in "tokens nmse val_nmse dead l0 tokens_per_s".split()},
             "runs": [], "n2g": {"7": [1.0, 0.5]}, "compared": [*evals.COMPARED],
             "frontier": [dict.fromkeys(evals.COMPARED, 0.5) | {"activation": "topk", "L0": k}
                          for k in (8, 16)], "patterns": {"7": ['"</script>"  (1.000)']}}
    evals.write_report(path, page | extra)
    return m, model, tokens, x, path


def test_a_latent_planted_on_one_token_shows_exactly_that(planted_page):
    m, _, tokens, _, path = planted_page
    page = page_of(path)
    r = page["latents"].tolist().index(7)
    assert 9 not in page["latents"]
    main, share = (page[name].reshape(-1, 5)[r] for name in ("main", "main share"))
    assert page["vocabulary"][main[0]] == "</script>" and share.tolist() == [255, 0, 0, 0, 0]
    assert page["stats"]["density"][r] == pytest.approx((tokens == 256).float().mean().item())
    shown = page["shown"]
    examples = np.repeat(np.arange(page["n_live"]), shown["per latent"])
    which = np.repeat(np.arange(len(shown["pairs"])), shown["pairs"])
    mine = examples[which] == r
    context, position = shown["context"][which[mine]], shown["position"][mine]
    assert mine.any() and (tokens[context.astype(int), position.astype(int)] == 256).all()


def test_every_number_of_the_report(planted_page):
    m, model, tokens, x, path = planted_page
    page, z = page_of(path), torch.zeros(640, 32)
    with torch.no_grad():
        values, indices = m.encode(S.normalize(x.flatten(0, 1))[0])
        z.scatter_(1, indices, values)
    shown, numbers = page["shown"], page["numbers"]
    starts, first = (np.cumsum([0, *shown[name]]) for name in ("pairs", "per latent"))
    for r, i in enumerate(page["latents"].tolist()):
        a = z[:, i][z[:, i] > 0].double().numpy()
        s = {name: page["stats"][name][r] for name in page["stats"]}
        assert s["density"] == pytest.approx(len(a) / 640)
        assert s["mean"] == pytest.approx(a.mean()) and s["max"] == pytest.approx(a.max())
        assert s["mean square"] == pytest.approx((z[:, i].double() ** 2).mean().item(), rel=1e-5)
        c = a - a.mean()
        if len(a) > 2:
            second, third, fourth = ((c**power).mean() for power in (2, 3, 4))
            assert s["kurtosis"] == pytest.approx(fourth / second**2, rel=1e-4)
            assert s["skew"] == pytest.approx(third / second**1.5, rel=1e-3, abs=1e-4)
        assert page["histogram"].reshape(-1, page["bins"])[r].sum() == len(a)
        peaks = []
        for e in range(first[r], first[r + 1]):
            row = z.view(40, 16, 32)[shown["context"][e], :, i]
            got = np.zeros(16)
            mine = slice(starts[e], starts[e + 1])
            got[shown["position"][mine]] = shown["value"][mine] / 65535 * s["max"]
            assert np.allclose(got, row, atol=s["max"] / 65000)
            peaks.append(row.max().item())
        every = z.view(40, 16, 32)[:, :, i].amax(1)
        assert peaks == sorted(peaks, reverse=True) and len(peaks) == min(12, (every > 0).sum())
        assert len(set(shown["context"][first[r] : first[r + 1]])) == len(peaks)
        fired = every[every > 0].sort(descending=True).values.tolist()
        assert peaks[:6] == fired[: len(peaks)][:6] and peaks[-1] == fired[-1]
        if len(fired) > 12:  # the first after the highest, the last, and evenly spaced between
            assert peaks[6:] == [fired[6 + math.ceil(j * (len(fired) - 7) / 5)] for j in range(6)]
        width = page["near"]
        near, cosine = (numbers[name].reshape(-1, width)[r] for name in ("near", "near cosine"))
        expected = (m.W_dec @ m.W_dec[i]).sort(descending=True)
        assert near.tolist() == expected.indices[:width].tolist()
        assert np.allclose(cosine / 32767, expected.values[:width].detach(), atol=1e-4)
    # the measured effect of one latent by hand: where it is highest, take its contribution away
    r, i = 3, int(page["latents"][3])
    at = int(z[:, i].argmax())
    context, position = divmod(at, 16)
    _, _, norm = S.normalize(x[context, position])

    def edit(a):
        a = a.clone()
        a[0, position] -= z[at, i] * norm * m.W_dec[i]
        return a

    with torch.no_grad():
        clean = model(tokens[context][None])[0, position].log_softmax(0)
        without = model(tokens[context][None], *SITE, edit)[0, position].log_softmax(0)
    change = clean - without - (clean - without).mean()
    extremes = np.r_[change.topk(8).values, change.topk(8, largest=False).values]
    assert numbers["effect value"].reshape(-1, 16)[r] == pytest.approx(extremes, abs=1e-4)
    loss, kl = numbers["effect size"].reshape(-1, 2)[r]
    assert kl == pytest.approx((clean.exp() * (clean - without)).sum().item(), abs=1e-5)
    assert np.isnan(loss) if position == 15 else loss == pytest.approx(
        (clean - without)[tokens[context, position + 1]].item(), abs=1e-4)
    direct = model.wte.weight @ ((m.W_dec[i] - m.W_dec[i].mean()) * model.ln_f.weight)
    assert numbers["direct"].reshape(-1, 16)[r][0] == direct.argmax()


def test_nasty_tokens_are_text_in_the_report(planted_page):
    text = planted_page[-1].read_text(encoding="utf-8")
    assert text.count("</script>") == 2 and "<img" not in text
    assert "\u202e" not in text and "<b>" not in text
    shown = {"</script>", "<img src=x onerror=alert(1)>", "\\xed\\xa0\\x80", "\\xff\\xfe"}
    assert shown <= set(page_of(planted_page[-1])["vocabulary"])


DRIVER = """<script>
const log = [], errors = [], wait = () => new Promise(done => setTimeout(done, 60));
addEventListener('error', e => errors.push(String(e.message)));
addEventListener('securitypolicyviolation', e => errors.push(e.blockedURI));
(async () => {
  const see = what => log.push(document.querySelector(what).textContent);
  const count = what => document.querySelectorAll(what).length;
  const go = hash => { location.hash = hash; return wait(); };
  const press = key => {
    document.body.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
    return wait();
  };
  see('h1'); await go('latent/7'); see('h1'); see('.token.peak'); log.push(count('.context') > 0);
  await press('ArrowRight'); see('h1'); await press('ArrowLeft'); see('h1');
  document.getElementById('query').value = '</scr';
  document.getElementById('search').requestSubmit(); await wait(); see('td a');
  await go('latents');
  [...document.querySelectorAll('th button')].find(b => b.textContent === 'max').click();
  see('td a'); log.push(count('img, b')); await go(''); see('main p');
  document.documentElement.dataset.log = JSON.stringify([log, errors]);
})();
</script></body>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no Chromium here")
def test_the_report_in_a_browser(planted_page, tmp_path):
    path = tmp_path / "driven.html"
    text = planted_page[-1].read_text(encoding="utf-8")
    path.write_text(text.replace("</body>", DRIVER), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--no-first-run", "--dump-dom",
             f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000",
             "--enable-logging=stderr"]
    command = ["chromium", *flags, path.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    log, errors = json.loads(html.unescape(re.search('data-log="(.*?)"', result.stdout).group(1)))
    assert not errors and "CONSOLE" not in result.stderr
    page = page_of(planted_page[-1])
    live, highest = page["latents"].tolist(), page["latents"][page["stats"]["max"].argmax()]
    following = live[live.index(7) + 1]
    assert log == ["Sparse autoencoder", "Latent 7", "</script>", True, f"Latent {following}",
                   "Latent 7", "latent 7", str(highest), 0, "<b>about</b>"]


def test_the_report_on_the_command_line(run_dir, tmp_path, acts_dir):
    shutil.copytree(run_dir, tmp_path / "a")
    wanted = "reconstruction,density,positions"
    argv = [str(tmp_path / "a"), "--acts", str(acts_dir), *CPU, "--only", wanted, "--report"]
    evals.main([*argv, "--latents", "5"])
    page = page_of(tmp_path / "a/report.html")
    assert page["n_live"] == 5 and page["curves"]["nmse"] and not page["runs"]
    assert {row[0] for row in page["metrics"]} >= {"NMSE, held-out", "L0"}
    shutil.copytree(run_dir, tmp_path / "b")
    evals.main([str(tmp_path / "b"), *argv])
    page = page_of(tmp_path / "b/report.html")
    assert [r["n_latents"] for r in page["runs"]] == [page["runs"][0]["n_latents"]] * 2
    assert page["n_live"] > 5 and page["plots"]["positions"]["nmse"]


# ---------------------------------------------------------------------- activations of any model


def given_files(folder):
    """Every kind of file that holds these (5000, 8) rows, and what it makes of them."""
    x = randn(5000, 8, seed=4, dtype=F32)
    npy = lambda name, a: np.save(folder / name, a)
    npy("a.npy", x.numpy()), npy("half.npy", x.half().numpy())
    npy("double.npy", x.double().numpy())
    npy("fortran.npy", np.asfortranarray(x.numpy()))
    np.savez(folder / "beside.npz", x=x.numpy(), tokens=np.arange(7))
    np.savez_compressed(folder / "small.npz", x=x.numpy())
    np.savez(folder / "fortran.npz", x=np.asfortranarray(x.numpy()), model="gpt2")
    torch.save(x.clone().requires_grad_(), folder / "grad.pt")
    (folder / "._a.npy").write_bytes(b"of another system")
    header = np.lib.format.header_data_from_array_1_0(x.numpy())
    with open(folder / "odd.npy", "wb") as f:  # its numbers begin where no float would
        text = str(header).encode() + b" " * 7 + b"\n"
        f.write(b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + x.numpy().tobytes())
    torch.save(x, folder / "t.pt"), torch.save({"acts": x.bfloat16()}, folder / "dict.pt")
    torch.save([x], folder / "list.pt")
    torch.save(x, folder / "old.pt", _use_new_zipfile_serialization=False)
    S.save_atomic(folder / "s.safetensors", S.safetensors({"x": x}))
    return x


def test_any_kind_of_array_is_read(tmp_path):
    x = given_files(tmp_path)
    files = harvest.array_files(tmp_path)
    assert len(files) == 14
    for file in files:
        train, held_out = harvest.open_acts(file)
        rows = x[: 78 * 64].view(78, 64, 8).to(train.acts[0].dtype)
        for part in (train, held_out):
            tokens, acts = part[:]
            assert torch.equal(acts, rows[part.rows]), file
            assert torch.equal(tokens, torch.arange(78 * 64).view(78, 64)[part.rows])
        assert next(train.batches(100)).shape == (100, 8) and len(train.meta["acts_sha256"]) == 16
    alike = {harvest.Given(tmp_path / f).meta["acts_sha256"] for f in ("a.npy", "t.pt", "old.pt")}
    assert len(alike) == 1


@given(st.integers(40, 900), st.sampled_from([1, 2, 30, 64, 1500]), st.booleans())
@settings(max_examples=20)
def test_given_activations_are_split_honestly(tmp_path_factory, n, T, flat):
    file = tmp_path_factory.mktemp("given") / "x.npy"
    T = 64 if flat else T
    x = np.arange(n * T, dtype=np.float32)[:, None] + np.zeros(2, np.float32)
    np.save(file, x if flat else x.reshape(n, T, 2))
    train, held_out = harvest.open_acts(file)
    seen = [set(part[:][1][:, :, 0].flatten().tolist()) for part in (train, held_out)]
    assert not seen[0] & seen[1] and len(seen[0]) == train.n_tokens
    assert 0.02 * n * T <= len(seen[1]) <= 0.15 * n * T
    if flat:  # a context of 64 rows that lies across a border has no part on the other side
        gap = np.abs(train.rows[:, None] - held_out.rows[None]).min()
        assert gap >= 2
    first = next(train.batches(train.n_train))  # an epoch: each once
    kept = set(train[train.kept][1][:, :, 0].flatten().tolist())
    assert sorted(first[:, 0].tolist()) == sorted(seen[0] - kept)
    held = held_out.document
    assert len(set(held)) >= 1 and (np.diff(held_out.rows[held == held[0]]) == 1).all()


def test_a_folder_of_arrays(tmp_path):
    x = randn(12, 64 * 10, 4, dtype=F32)
    for i in range(12):
        np.save(tmp_path / f"part-{i}.npy", x[i].numpy())
    (tmp_path / "notes.txt").write_text("mine")
    whole = harvest.Given(tmp_path)
    flat = torch.cat([a.flatten(0, 1) for a in whole.acts])
    assert torch.equal(flat, x.flatten(0, 1))  # part-10 after part-9
    before = whole.meta["acts_sha256"]
    np.save(tmp_path / "part-3.npy", x[4].numpy())
    assert harvest.Given(tmp_path).meta["acts_sha256"] != before
    for i in range(12):
        np.save(tmp_path / f"part-{i}.npy", x[i, : 100 + 20 * (i % 2)].numpy())
    short = harvest.Given(tmp_path)
    assert short.meta["context"] == 20 and sum(map(len, short.acts)) * 20 == 12 * 110
    gap = np.abs(short.rows[:, None] - short.other("val").rows[None]).min()
    assert gap * 20 > 64  # what may be of one context
    with pytest.raises(harvest.UserError, match="too few for 99 processes"):
        next(short.batches(8, part=3, parts=99))
    np.save(tmp_path / "part-3.npy", x[4, :, :3].numpy())
    with pytest.raises(harvest.UserError, match=r"part-3.npy holds \(640, 3\).*must be alike"):
        harvest.Given(tmp_path)


def test_what_is_no_array_of_activations_is_refused(tmp_path, capsys):
    rows = np.zeros((900, 4), np.float32)
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "ints.npy", np.arange(900)), np.save(tmp_path / "line.npy", rows[:, 0])
    np.save(tmp_path / "swapped.npy", rows.astype(">f4"))
    np.savez(tmp_path / "two.npz", a=rows, b=rows)
    np.save(tmp_path / "few.npy", rows[:600]), (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY\1\0")
    np.save(tmp_path / "objects.npy", np.array([{}, 1]), allow_pickle=True)
    np.save(tmp_path / "none.npy", rows[:0])
    torch.save(torch.from_numpy(rows).to_sparse(), tmp_path / "sparse.pt")
    torch.save(torch.from_numpy(rows).to(torch.float8_e4m3fn), tmp_path / "eight.pt")
    bad = np.random.default_rng(0).normal(size=(9000, 4)).astype(np.float32)
    bad[64 * 70 + 5, 2] = np.nan
    np.save(tmp_path / "nan.npy", bad), (tmp_path / "x.csv").write_text("1,2\n")
    for name, why in (("empty", "neither a harvest"), ("x.csv", "neither a harvest"),
                      ("ints.npy", "one array of floats"), ("line.npy", "holds (900,)"),
                      ("swapped.npy", ">f4"), ("two.npz", "a (900, 4) torch.float32, b (900, 4)"),
                      ("few.npy", "too few to hold some out"), ("torn.npy", "be read"),
                      ("objects.npy", "cannot be read"), ("none.npy", "holds (0, 4)"),
                      ("nan.npy", "nan.npy, rows 4480 to 4543"),
                      ("gone.npy", "gone.npy: neither a harvest"),
                      ("sparse.pt", "one array of floats"), ("eight.pt", "float8_e4m3fn")):
        refuses(S.main, [*TINY, "--acts", tmp_path / name, "--out", tmp_path / "r"], capsys, why)
        assert not list(tmp_path.glob("r/*.pt"))
    np.save(tmp_path / "good.npy", bad[: 64 * 60])
    argv = [*TINY, "--acts", tmp_path / "good.npy", "--out", tmp_path / "r"]
    refuses(S.main, [*argv, "--model", "gpt2"], capsys, "model: None there, gpt2 asked for")
    refuses(S.main, [*argv, "--ctx", 16], capsys, "ctx: 64 there, 16 asked for")


def test_one_own_array_goes_all_the_way(tmp_path, capsys, monkeypatch, acts_dir):
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", planted(6000).numpy())
    np.save("contexts.npy", planted(6000).view(300, 20, 16).numpy())
    lacks = "there is no language model behind these activations"
    for name in ("rows", "contexts"):
        S.main([*map(str, TINY), "--acts", f"{name}.npy", "--out", f"runs/{name}"])
        code, err = run(evals.main, [f"runs/{name}", "--all", "--report", *CPU], capsys)
        assert code == 0, err
        r = read_json(Path(f"runs/{name}/evals.json"))
        assert {"reconstruction", "density", "memorization", "dense_latents", "refinement",
                "test_time_k", "fixed_threshold"} <= r.keys()
        assert f"downstream: {lacks}" in err and f"n2g: {lacks}" in err
        assert r["reconstruction"]["nmse"] < 0.6 and "delta_ce" not in r["test_time_k"]
        assert len(r["test_time_k"]["nmse"]) == len(r["test_time_k"]["at"])
        assert ("positions" in r) == (name == "contexts")
        assert ("positions: these activations are rows" in err) == (name == "rows")
        data = page_of(Path(f"runs/{name}/report.html"))
        assert data["n_live"] > 30 and len(data["rows"]) and len(data["vocabulary"]) == data["T"]
    # another file's activations are evaluated when they are named, not when they took the place
    np.save("rows.npy", planted(7000, seed=5).numpy())
    refuses(evals.main, ["runs/rows", *CPU], capsys, "no longer at", "rows.npy", "give --acts")
    evals.main(["runs/rows", "--acts", "rows.npy", "--only", "reconstruction", *CPU])
    r = read_json(Path("runs/rows/evals.json"))["reconstruction"]
    assert r["tokens"] == 7000 // 64 * 64  # all of it is held out
    refuses(S.main, [*TINY, "--resume", "--tokens", "9000", "--out", "runs/rows"], capsys,
            "acts_sha256")
    Path("rows.npy").unlink()
    refuses(evals.main, ["runs/rows", *CPU], capsys, "no longer at")
    # those of a model, of that width, are evaluated with the model
    argv = ["runs/rows", "--acts", acts_dir, "--only", "reconstruction,downstream", *CPU]
    evals.main(list(map(str, argv)))
    assert {"kl"} <= read_json(Path("runs/rows/evals.json"))["downstream"].keys()


def test_a_wrong_scale_is_not_passed_over(tmp_path, capsys):
    np.save(tmp_path / "x.npy", 30 + 7 * planted(6000).numpy())
    S.main([*map(str, TINY), "--acts", str(tmp_path / "x.npy"), "--out", str(tmp_path / "r")])
    m = S.SAE.load(tmp_path / "r")
    m.normalized, m.meta = False, {}
    m.save(tmp_path / "raw.pt")
    argv = ["--acts", str(tmp_path / "x.npy"), "--only", "reconstruction", *CPU]
    evals.main([str(tmp_path / "r"), *argv])
    assert "less than half" not in capsys.readouterr().out
    evals.main([str(tmp_path / "raw.pt"), *argv])
    out = capsys.readouterr().out
    assert "explains less than half of the variance: on activations normalised to norm 1" in out
    x = torch.from_numpy(np.load(tmp_path / "x.npy"))[:999]
    m, s = S.SAE.load(tmp_path / "r"), math.sqrt(15)
    right = evals.reconstruction(m, x)["nmse"]
    with torch.no_grad():
        m.b_enc *= s
        m.b_pre *= s
    found = evals.otherwise(m, x)
    worse = {"nmse": 0.7, "otherwise": {"as they are": 0.3, "raw activations": 0.29}}
    assert "is it of these" in evals.half_explained(worse)[0]  # the first contexts are better
    assert "trained on such" in evals.half_explained({"nmse": 0.7, "otherwise": found})[0]
    assert min(found, key=found.get) == "activations normalised to norm sqrt(d - 1)"
    assert found[min(found, key=found.get)] == pytest.approx(right, rel=1e-3)
    noise = S.SAE(16, 64, 4)
    noise.save(tmp_path / "noise.pt")
    evals.main([str(tmp_path / "noise.pt"), *argv])
    assert "is it of these activations (model, layer, site)" in capsys.readouterr().out


def test_both_spaces_of_the_error():
    m, x = make_sae(6, 20, 3), 5 * randn(40, 6) + 2
    r, x_hat = evals.reconstruction(m, x), m(x)
    variance = (x - x.mean(0)).square().sum()
    assert r["nmse_raw"] == pytest.approx(((x - x_hat).square().sum() / variance).item())
    m.normalized = False
    r = evals.reconstruction(m, x)
    assert "nmse_raw" not in r
    assert r["nmse"] == pytest.approx(((x - m(x)).square().sum() / variance).item())


# ---------------------------------------------------------------------- other libraries' files
# Each layout made by hand, with the formula that its library computes; d = n once, so that names
# and not shapes say what is what.


def foreign(kind, d=6, n=20, k=3, norm="none", b_dec_in=True):
    """(files of a folder {name: what is in it}, x -> (its dense code, its reconstruction))."""
    r = lambda *shape, seed: randn(*shape, seed=seed, dtype=F32)
    W, D, b, c = r(n, d, seed=1), r(n, d, seed=2) / d**0.5, r(n, seed=3) / 4, r(d, seed=4)
    files, z = layouts(W, D, b, c, k, norm, b_dec_in)[kind]
    size = D.norm(dim=1) if kind == "saelens topk, rescaled" else 1.0
    form = lambda x: (z(x), z(x) / size @ D + c)
    if norm != "layer_norm":
        return files, form

    def normalized(x):
        mu, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        code, x_hat = form((x - mu) / (std + 1e-5))
        return code, x_hat * std + mu

    return files, normalized


def layouts(W, D, b, c, k, norm, b_dec_in):
    """{kind: (files, x -> its dense code)} of W, D (n, d), b (n), c (d)."""
    n, d = W.shape
    theta, r_mag, b_mag = (randn(n, seed=seed, dtype=F32) / 3 for seed in (5, 6, 7))
    theta, tensor = theta.abs(), torch.tensor
    top, jump = lambda a: dense_code(a, k), lambda a, t: a.relu() * (a > t)
    away, h = (lambda x: x @ W.T + b), (lambda x: (x - c * b_dec_in) @ W.T + b)
    gate = lambda x: (r_mag.exp() * (h(x) - b) + b_mag).relu() * (h(x) > 0)
    lens = {"W_enc": W.T, "b_enc": b, "W_dec": D, "b_dec": c}
    linear = {"encoder.weight": W, "encoder.bias": b, "decoder.weight": D.T}
    gates = {"r_mag": r_mag, "b_mag": b_mag, "b_gate": b}

    def saelens(more=(), **settings_):
        cfg = {"d_in": d, "d_sae": n, "normalize_activations": norm, "reshape_activations": "none",
               "apply_b_dec_to_input": b_dec_in, "metadata": {"sae_lens_version": "6.0.0"}}
        weights = {name: t for name, t in (lens | dict(more)).items() if t is not None}
        return {"cfg.json": cfg | settings_, "sae_weights.safetensors": weights}

    def trained(name, weights):  # by dictionary_learning
        trainer = {"dict_class": name, "k": k}
        return {"config.json": {"trainer": trainer, "buffer": {}}, "ae.pt": weights}

    def sparsify(**settings_):
        weights = {"encoder.weight": W, "encoder.bias": b, "W_dec": D, "b_dec": c}
        return {"cfg.json": settings_ | {"d_in": d, "k": k}, "sae.safetensors": weights}

    before = {"cfg.json": {
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": k}, "d_sae": n, "d_in": d,
        "hook_point": "blocks.1.hook_resid_pre", "model_name": "gpt2-small", "context_size": 128,
        "normalize_activations": norm},
        "sae_weights.safetensors": lens | {"scaling_factor": torch.ones(n)}}
    old = {"decoder_bias": c, "r_mag": r_mag, "mag_bias": b_mag, "gate_bias": b}
    cut, jumps = {"k": tensor(k), "threshold": tensor(0.7)}, lens | {"threshold": theta}
    lower = {name.lower() if name[0] == "W" else name: t for name, t in jumps.items()}
    relu, fixed = (lambda x: h(x).relu()), (lambda x: jump(h(x), 0.7))
    return {
        "saelens topk": (saelens(architecture="topk", k=k), lambda x: top(h(x))),
        "saelens topk, rescaled": (
            saelens(architecture="topk", k=k, rescale_acts_by_decoder_norm=True),
            lambda x: top(h(x) * D.norm(dim=1))),
        "saelens before 6": (before, lambda x: top(h(x))),
        "saelens standard": (saelens(architecture="standard"), relu),
        "saelens jumprelu": (saelens(jumps, architecture="jumprelu"), lambda x: jump(h(x), theta)),
        "saelens gated": (saelens(gates | {"b_enc": None}, architecture="gated"), gate),
        "sparsify": (sparsify(activation="topk", transcode=False, num_latents=n),
                     lambda x: top(h(x))),
        "sae-llama": (sparsify(expansion_factor=4, signed=False), lambda x: top(h(x))),
        **{kind: (trained(kind, weights), z) for kind, weights, z in (
            ("AutoEncoderTopK", linear | {"b_dec": c} | cut, lambda x: top(h(x))),
            ("BatchTopKSAE", linear | {"b_dec": c} | cut, fixed),
            ("MatryoshkaBatchTopKSAE", lens | cut | {"group_sizes": torch.ones(2)}, fixed),
            ("AutoEncoder", linear | {"bias": c}, relu),
            ("AutoEncoderNew", linear | {"decoder.bias": c}, lambda x: away(x).relu()),
            ("GatedAutoEncoder", {"encoder.weight": W, "decoder.weight": D.T} | old, gate),
            ("JumpReluAutoEncoder", jumps, lambda x: jump(away(x), theta)))},
        "gemma scope": ({"params.npz": jumps}, lambda x: jump(away(x), theta)),
        "gemma scope 2": ({"params.safetensors": lower}, lambda x: jump(away(x), theta))}


def write_foreign(folder, files):
    folder.mkdir(exist_ok=True)
    for name, what in files.items():
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(what))
        elif name.endswith(".pt"):
            torch.save(what, folder / name)
        elif name.endswith(".npz"):
            np.savez(folder / name, **{key: t.numpy() for key, t in what.items()})
        else:
            S.save_atomic(folder / name, S.safetensors(what))
    return folder


KINDS = ["saelens topk", "saelens topk, rescaled", "saelens before 6", "saelens standard",
         "saelens jumprelu", "saelens gated", "sparsify", "sae-llama", "AutoEncoderTopK",
         "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "AutoEncoder", "AutoEncoderNew",
         "GatedAutoEncoder", "JumpReluAutoEncoder", "gemma scope", "gemma scope 2"]
CASES = [(kind, "none", True) for kind in KINDS]
CASES += [(kind, norm, b_dec_in) for kind in KINDS[:1] + KINDS[3:6]
          for norm, b_dec_in in (("none", False), ("layer_norm", True), ("layer_norm", False))]
CASES += [("saelens before 6", "layer_norm", True)]
CASES += [("saelens topk", "expected_average_only_in", True)]


@pytest.mark.parametrize("kind, norm, b_dec_in", CASES)
@pytest.mark.parametrize("d, n", [(6, 20), (8, 8)])
def test_other_libraries_autoencoders(tmp_path, kind, norm, b_dec_in, d, n):
    files, form = foreign(kind, d, n, norm=norm, b_dec_in=b_dec_in)
    folder = write_foreign(tmp_path / "theirs", files)
    x = 2 * randn(30, d, seed=9, dtype=F32) + 0.5
    code, x_hat = form(x)
    s = math.sqrt(d - 1) if norm == "layer_norm" else 1.0
    weights = next(name for name in files if not name.endswith(".json"))
    for make, path in ((S.SAE, folder), (S.Sparse, folder / weights)):
        m = make.load(path)
        assert m.normalized == (norm == "layer_norm")
        tol = 1e-4 if norm == "layer_norm" else 1e-5  # its epsilon
        assert torch.allclose(m(x), x_hat, rtol=tol, atol=tol)
        assert torch.allclose(s * to_dense(*m.encode(m.unit(x)[0]), n), code, rtol=tol, atol=tol)
    m.save(tmp_path / "ours.pt")
    m.to_saelens(tmp_path / "exported")
    for again in ("ours.pt", "exported"):
        assert torch.allclose(S.SAE.load(tmp_path / again)(x), m(x), rtol=1e-4, atol=1e-5)
    if kind == "saelens before 6":
        found = [m.meta[name] for name in ("model", "layer", "site", "context")]
        assert found == ["gpt2", 0, "resid_post_mlp", 128]


def test_every_metric_takes_thresholds():
    """A JumpReLU autoencoder: `encode` at k' keeps its largest activations, not the surest ones."""
    m = make_sae(6, 30, 30)
    u = S.normalize(randn(50, 6))[0]
    a = (u - m.b_pre) @ m.W_enc.T + m.b_enc
    m.theta = randn(30, seed=3).abs() / 3
    with torch.no_grad():
        m.b_enc -= m.theta
    z = a.relu() * (a > m.theta)
    for make in (m, plain(m)):
        assert torch.allclose(to_dense(*make.encode(u), 30), z)
        assert torch.allclose(to_dense(*make.encode(u, 3), 30), dense_code(z, 3))
    assert "JumpReLU" in repr(m) and (m.device.type, m.dtype) == ("cpu", torch.float64)


REFUSED = [
    ("saelens topk", {"normalize_activations": "constant_norm_rescale"}, {}, "constant_norm"),
    ("saelens topk", {"architecture": "transcoder"}, {}, "transcoder"),
    ("saelens topk", {"architecture": "matching_pursuit"}, {}, "matching_pursuit"),
    ("saelens topk", {"reshape_activations": "hook_z"}, {}, "hook_z"),
    ("saelens topk", {}, {"W_skip": torch.zeros(6, 6)}, "W_skip"),
    ("saelens topk", {"k": None}, {}, "not as another"),
    ("saelens before 6", {"activation_fn_str": "tanh-relu"}, {}, "tanh-relu"),
    ("saelens before 6", {}, {"scaling_factor": torch.arange(20.0)}, "scaling_factor"),
    ("saelens topk", {"k": math.inf}, {}, "not as another"),
    ("saelens standard", {}, {"threshold": torch.ones(20)}, "is it a ReLU"),
    ("sparsify", {"activation": "groupmax"}, {}, "groupmax"),
    ("sparsify", {"transcode": True}, {}, "transcode"),
    ("sparsify", {"skip_connection": True}, {}, "skip_connection"),
    ("sparsify", {"signed": True}, {}, "signed"),
    ("BatchTopKSAE", {}, {"threshold": torch.tensor(-1.0)}, "never calibrated"),
    ("AutoEncoderTopK", {"trainer": {"dict_class": "CrossCoder"}}, {}, "CrossCoder"),
    ("AutoEncoderTopK", {"trainer": {}}, {}, "of no known kind"),
    ("AutoEncoderTopK", {"trainer": 7}, {}, "not as another"),
]


@pytest.mark.parametrize("kind, settings_, weights, why", REFUSED)
def test_what_has_no_such_form_is_refused_by_name(tmp_path, capsys, kind, settings_, weights, why):
    files, _ = foreign(kind)
    for name in files:
        files[name] = files[name] | (settings_ if name.endswith(".json") else weights)
    write_foreign(tmp_path / "theirs", files)
    refuses(evals.main, [tmp_path / "theirs"], capsys, why)
    refuses(S.main, ["--export", tmp_path / "theirs", tmp_path / "out"], capsys, why)
    assert not (tmp_path / "out").exists()


def test_results_are_of_the_files_as_they_are(tmp_path, capsys, run_dir):
    """A configuration that is edited, weights that change beside others: nothing old is shown."""
    np.save(tmp_path / "x.npy", planted(4000).numpy())
    argv = ["--acts", str(tmp_path / "x.npy"), "--only", "reconstruction", "--json", *CPU]
    of = lambda path: (evals.main([str(path), *argv]), json.loads(capsys.readouterr().out))[1]
    S.SAE.load(run_dir).to_saelens(tmp_path / "theirs")
    assert of(tmp_path / "theirs")["reconstruction"]["l0"] == 4
    cfg = read_json(tmp_path / "theirs/cfg.json")
    (tmp_path / "theirs/cfg.json").write_text(json.dumps(cfg | {"k": 8}))
    assert of(tmp_path / "theirs")["reconstruction"]["l0"] == 8
    S.SAE.load(run_dir).save(tmp_path / "theirs/sae.pt")  # which goes before the others
    assert of(tmp_path / "theirs")["reconstruction"]["l0"] == 4
    other = S.SAE(16, 64, 2)
    other.save(tmp_path / "theirs/sae.pt")
    assert of(tmp_path / "theirs")["reconstruction"]["l0"] == 2
    with torch.no_grad():
        other.W_enc.neg_()
    worse = of(tmp_path / "theirs")["reconstruction"]["nmse"]
    other.save(tmp_path / "theirs/sae.pt")
    assert of(tmp_path / "theirs")["reconstruction"]["nmse"] > worse
    rows = planted(4000).numpy()
    before = of(tmp_path / "theirs")["reconstruction"]["nmse"]
    rows[2000:] = planted(2000, seed=8).numpy()
    np.save(tmp_path / "x.npy", rows)
    assert of(tmp_path / "theirs")["reconstruction"]["nmse"] != before
    other.theta = torch.ones(64)
    other.k = 64
    other.save(tmp_path / "theirs/sae.pt")
    saved = torch.load(tmp_path / "theirs/sae.pt")
    saved["state"]["theta"] = torch.ones(9)
    torch.save(saved, tmp_path / "theirs/sae.pt")
    refuses(evals.main, [tmp_path / "theirs", *argv], capsys, "is not whole")


def test_folders_that_hold_no_autoencoder(tmp_path, capsys):
    refuses(evals.main, [tmp_path], capsys, "no autoencoder at", "sae_weights.safetensors")
    for name in ("sae.safetensors", "ae.pt", "params.npz"):
        (tmp_path / name).write_bytes(b"torn")
        (tmp_path / "cfg.json").write_text('{"k": 3}')
        code, err = run(evals.main, [tmp_path], capsys)
        assert code == 2 and len(err.strip().splitlines()) == 1 and name in err, err
        (tmp_path / name).unlink()
    files, _ = foreign("saelens topk")
    write_foreign(tmp_path, {"sae_weights.safetensors": files["sae_weights.safetensors"]})
    (tmp_path / "cfg.json").unlink()
    refuses(evals.main, [tmp_path], capsys, "needs its cfg.json or config.json beside it")
    (tmp_path / "cfg.json").write_text("{torn")
    refuses(evals.main, [tmp_path], capsys, "not as another")


def test_export_is_what_saelens_reads(tmp_path, run_dir, capsys):
    """Its formula, written out, on its names and shapes; nothing else is overwritten."""
    folder = tmp_path / "export"
    S.main(["--export", str(run_dir), str(folder)])
    out = capsys.readouterr().out
    assert "d_model 16, n_latents 64, TopK k = 4, normalised inputs" in out and "sqrt(d - 1)" in out
    cfg, m = read_json(folder / "cfg.json"), S.SAE.load(run_dir)
    w = S.read_safetensors(folder / "sae_weights.safetensors")
    assert {name: tuple(t.shape) for name, t in w.items()} == {
        "W_enc": (16, 64), "W_dec": (64, 16), "b_enc": (64,), "b_dec": (16,)}
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"], cfg["k"]) == ("topk", 16, 64, 4)
    assert cfg["normalize_activations"] == "layer_norm" and cfg["apply_b_dec_to_input"] is True
    assert cfg["metadata"]["hook_name"] == "blocks.2.hook_resid_post"
    x = 3 * randn(50, 16, dtype=F32) + 1
    mu, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    code = dense_code(((x - mu) / (std + 1e-5) - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 4)
    assert torch.allclose((code @ w["W_dec"] + w["b_dec"]) * std + mu, m(x), atol=1e-4)
    again = S.SAE.load(folder)
    assert again.meta["layer"] == 2 and again.meta["site"] == "resid_post_mlp"
    refuses(S.main, ["--export", run_dir, folder], capsys, "is not empty")
    refuses(S.main, ["--export", tmp_path / "none", folder], capsys, "no autoencoder at")


def random_weights(module, seed=0):
    """The same module with every float parameter and buffer drawn at random, decoder rows too."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in [*module.named_parameters(), *module.named_buffers()]:
            if p.is_floating_point():
                p.copy_(torch.randn_like(p) / (2 if p.ndim < 2 else p.shape[-1] ** 0.5))
                p.abs_() if "threshold" in name else None
    return module


def theirs():
    """(name, their module, what writes it, whether its code is s times ours), of each library."""
    d, n, k = 96, 512, 16
    import dictionary_learning.dictionary as D
    import sae_lens
    import sparsify
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    for norm in ("none", "layer_norm", "expected_average_only_in"):
        for b_dec in (True, False):
            more = dict(d_in=d, d_sae=n, normalize_activations=norm, apply_b_dec_to_input=b_dec)
            for kind in ("TopK", "Standard", "JumpReLU", "Gated"):
                own = {"k": k} if kind == "TopK" else {}
                cfg = getattr(sae_lens, f"{kind}SAEConfig")(**more, **own)
                sae = random_weights(getattr(sae_lens, f"{kind}SAE")(cfg))
                yield f"SAELens {kind} {norm} {b_dec}", sae, sae.save_model, norm == "layer_norm"
    cfg = sae_lens.TopKSAEConfig(d_in=d, d_sae=n, k=k, rescale_acts_by_decoder_norm=True)
    sae = random_weights(sae_lens.TopKSAE(cfg))
    yield "SAELens TopK rescaled", sae, sae.save_model, False
    for normal in (True, False):
        cfg = sparsify.SparseCoderConfig(num_latents=n, k=k, normalize_decoder=normal)
        sae = random_weights(sparsify.SparseCoder(d, cfg))
        yield f"sparsify {normal}", sae, sae.save_to_disk, False
    some = [top_k.AutoEncoderTopK(d, n, k), batch_top_k.BatchTopKSAE(d, n, k), D.AutoEncoder(d, n),
            matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(d, n, k, [128, 384]),
            D.AutoEncoderNew(d, n), D.GatedAutoEncoder(d, n), D.JumpReluAutoEncoder(d, n)]
    for ae in map(random_weights, some):
        def write(folder, ae=ae):
            folder.mkdir()
            torch.save(ae.state_dict(), folder / "ae.pt")
            trainer = {"dict_class": type(ae).__name__, "k": k}
            (folder / "config.json").write_text(json.dumps({"trainer": trainer}))

        yield f"dictionary_learning {type(ae).__name__}", ae, write, False


@pytest.mark.skipif(not importlib.util.find_spec("sae_lens"), reason="make peers, then there")
def test_against_the_libraries_themselves(tmp_path):
    """Their own code writes and computes; we read, compute, export; SAELens reads that. Shown by
    .venv-peers/bin/python -m pytest -s test_sae.py -k libraries_themselves"""
    import sae_lens

    x = randn(200, 96, dtype=F32) * torch.linspace(0.3, 3, 96) + randn(96, seed=1, dtype=F32)
    off = lambda a, b: ((a - b).abs().max() / b.abs().max()).item()
    for i, (name, sae, write, scaled) in enumerate(theirs()):
        write(tmp_path / str(i))
        ours = S.Sparse.load(tmp_path / str(i))
        with torch.no_grad():
            if name.startswith("sparsify"):
                values, indices, _ = sae.encode(x)
                code = to_dense(values, indices, 512)
                x_hat = sae.decode(values, indices)
            else:
                code = sae.encode(x)
                x_hat = sae.decode(code)
            code = code.to_dense() if code.is_sparse else code
            mine = to_dense(*ours.encode(ours.unit(x)[0]), 512) * (95**0.5 if scaled else 1)
            ours.to_saelens(tmp_path / f"{i}-exported")
            back = sae_lens.SAE.load_from_disk(tmp_path / f"{i}-exported")(x)
        found = off(mine, code), off(ours(x), x_hat), off(back, x_hat)
        print(f"{name:<46} code {found[0]:.1e}  reconstruction {found[1]:.1e}  exported, read by "
              f"SAELens {found[2]:.1e}")
        assert max(found) < (1e-4 if scaled else 1e-5), (name, found)


@given(seeds)
@settings(max_examples=10)
def test_safetensors_are_mapped_and_whole(tmp_path_factory, seed):
    file = tmp_path_factory.mktemp("st") / "x.safetensors"
    g = gen(seed)
    draw = lambda: int(torch.randint(0, 5, (), generator=g))
    tensors = {f"t{i}": torch.randn(draw(), draw(), generator=g) for i in range(4)}
    S.save_atomic(file, S.safetensors(tensors))
    found = S.read_safetensors(file)
    assert all(torch.equal(found[name], t) for name, t in tensors.items())
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert size % 8 == 0 and all(h["dtype"] == "F32" for h in header.values())
    odd = data[8 : 8 + size] + b" " * (seed % 8)  # others need not align what they write
    file.write_bytes(len(odd).to_bytes(8, "little") + odd + data[8 + size :] + b"more")
    found = S.read_safetensors(file)
    assert all(torch.equal(found[name], t) for name, t in tensors.items())
    if len(data) > 8 + size:
        file.write_bytes(data[:-1])
        with pytest.raises(ValueError, match="cut short"):
            S.read_safetensors(file)


def test_every_recipe_of_the_readme_runs(tmp_path, monkeypatch):
    """One after the other in one namespace, as it says there; those that need more are left out."""
    monkeypatch.chdir(tmp_path)
    text = (HERE / "README.md").read_text().split("## Recipes\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) >= 7
    names = {}
    torch.manual_seed(0)
    for block in blocks:
        wanted = re.findall(r"^(?:import|from) (\w+)", block, re.M)
        if all(importlib.util.find_spec(name) for name in wanted):
            exec(block, names)
    sae, x = names["sae"], names["x"]
    assert names["lines"][-1]["nmse"] < 0.5 and names["lines"][-1]["step"] == 4 * len(x) // 512
    assert read_log("runs/recipe")[-1]["step"] == 4 * len(x) // 512 + 50  # went on
    assert harvest.Given("recipe.npy").meta["context"] == 40
    cov, own = np.cov(np.load("gaussian.npy").T), np.cov(np.load("recipe.npy").reshape(-1, 32).T)
    assert np.abs(cov - own).max() < 0.1 * np.abs(own).max()
    model, tokens, i = names["model"], names["tokens"], names["i"]
    clean = model(tokens[:4])
    # by hand: with the error kept an ablation takes z_i W_dec[i] away, and no more
    acts = names["activations"](names["layer"], tokens[:4])
    values, indices = sae.encode(sae.unit(acts)[0])
    z = (values * (indices == i)).sum(-1, keepdim=True)
    less = acts - z * sae.unit(acts)[2] * sae.W_dec[i]
    assert (z > 0).any() and torch.allclose(names["ablated"], model[3](less), atol=1e-4)
    assert torch.allclose(names["replaced"], model[3](sae(acts)), atol=1e-4)
    highest = names["z"].amax(1)
    assert torch.equal(highest[names["top"]], highest.sort(descending=True).values[:5])
    moved = (names["steered"] - clean).detach()
    norm = sae.unit(acts)[2]
    assert torch.allclose(moved, 3 * norm * (sae.W_dec[i] @ model[3].weight.T), atol=1e-2)
    both = names["wrapped"](acts), names["wrapped"].decode(names["wrapped"].encode(acts))
    assert torch.allclose(both[0], sae(acts), atol=1e-5) and torch.equal(*both)
    effect, at = names["effect"][0, -1], names["kept"]["indices"][0, -1]
    first = names["activations"](names["layer"], tokens[:1])
    direct = sae.unit(first)[2][0, -1] * (sae.W_dec[at] @ model[3].weight[3])
    assert torch.allclose(effect, names["kept"]["values"][0, -1] * direct, atol=1e-5)
    assert names["neighbours"][0] == i


# ---------------------------------------------------------------------- other activation functions


def activated(kind, d=6, n=20, B=30, seed=0):
    """An autoencoder of that kind with nothing at zero, and inputs."""
    m = make_sae(d, n, n, seed)
    S.extended(m, S.Config(activation=kind, l1=0.3))
    with torch.no_grad():
        for name in S.EXTRA.get(kind, ()):
            getattr(m, name).copy_(0.3 * randn(n, seed=seed + 1))
        m.b_enc.copy_(0.2 * randn(n, seed=seed + 2))
    return m, S.normalize(randn(B, d, seed=seed + 3))[0]


@pytest.mark.parametrize("kind", S.DENSE_ACTIVATIONS)
@given(seeds)
@settings(max_examples=10)
def test_folding_changes_no_code(kind, seed):
    m, u = activated(kind, seed=seed)
    values = S.DENSE_ACTIVATIONS[kind](m, F.linear(u - m.b_pre, m.W_enc), 0.3)[0]
    own = S.folded(m, kind, u, 0.3)
    assert torch.allclose(to_dense(*own.encode(u), 20), values, atol=1e-12)
    plain = kind in ("relu", "nelu")
    assert plain or (own.theta >= 0).all()
    assert (own.theta is None) == plain and {*own.state_dict()} <= {
        "W_enc", "b_enc", "W_dec", "b_pre", "theta"}


def test_gradients_of_the_activation_functions():
    """By their papers' formulas: neither ProLU's nor JumpReLU's is the true one."""
    m, u = activated("gated")
    a = F.linear(u - m.b_pre, m.W_enc)
    z, _, gate = S.gated(m, a, 0.0)
    on = a + m.b_enc > 0
    assert torch.equal(z, on * (a * m.r_mag.exp() + m.b_mag).relu())
    loss = S.dense_losses(m, u, 1.0, "gated", 0.0)[0]
    grad = torch.autograd.grad(loss, m.b_enc)[0]  # of the gate: through its own reconstruction
    error = (u - m.b_pre - gate @ m.W_dec).detach()
    assert torch.allclose(grad, (-2 * (error @ m.W_dec.T) * on).sum(0) / u.numel())
    for straight in (False, True):
        a, b = (randn(*shape, seed=4).requires_grad_() for shape in ((9, 5), (5,)))
        g = randn(9, 5, seed=2)
        z = S._ProLU.apply(a, b, straight)
        on = (a > 0) & (a + b > 0)
        assert torch.equal(z, a * on) and torch.equal(S._ProLU.apply(3 * a, b.abs(), False),
                                                      (3 * a).relu())
        to_a, to_b = torch.autograd.grad(z, (a, b), g)
        assert torch.allclose(to_b, (on * g * (a if straight else 1)).sum(0))
        assert torch.allclose(to_a, on * g * (1 + a) if straight else on * g)


def test_the_gradient_of_a_threshold_is_that_of_the_expected_loss(monkeypatch):
    """a of N(0, 1): d/dt E[(a - z)^2 + l 1(a > t)] = (t^2 - l) phi(t); the step is taken of a."""
    monkeypatch.setattr(S._Jump, "WIDTH", 0.05)
    a = randn(4_000_000, 1, dtype=F32)
    for t, l1 in ((0.5, 0.0), (0.5, 0.7), (1.0, 0.2), (1.5, 1.0)):
        cut = torch.tensor([t], requires_grad=True)
        z, on = (S._Jump.apply(a, cut, alone) for alone in (False, True))
        ((a - z).square() + l1 * on).mean().backward()
        exact = (t**2 - l1) * math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        assert cut.grad.item() == pytest.approx(exact, abs=6e-3)


@given(seeds, st.integers(1, 40), st.floats(0.1, 1.3), st.floats(1e-3, 1e3))
def test_nelu_is_the_minimum_it_is_defined_by(seed, n, lam, scale):
    """The square-root lasso: |z - v| + lam |z|_1, z >= 0; whatever the scale of v."""
    v = randn(20, n, seed=seed) * randn(20, 1, seed=seed + 1).abs()
    v[:3], v[3] = v[:3].abs(), 0
    z = S.nelu(v, lam)
    of = lambda z: (z - v).norm(dim=-1) + lam * z.sum(-1)
    for size in (1e-3, 1e-1, 1.0):
        for i in range(5):
            moved = (z + size * randn(20, n, seed=seed + i)).relu()
            assert (of(moved) >= of(z) - 1e-9).all() and (of(z * i / 3) >= of(z) - 1e-9).all()
    assert torch.allclose(S.nelu(scale * v, lam), scale * z, atol=1e-9 * scale)
    assert torch.allclose(S.nelu(v.float(), lam).double(), z, atol=1e-4)
    most = math.ceil(1 / lam**2) - 1
    assert (z > 0).sum(-1).max() <= (n if lam * n**0.5 <= 1 else most) and (z[3] == 0).all()
    silent = v.amax(-1) <= lam * v.norm(dim=-1)
    assert torch.equal(silent, (z == 0).all(-1))


def test_nelu_is_differentiated_exactly_and_does_not_mind_noise():
    v = randn(9, 12, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: S.nelu(v, 0.4), v)
    zero = torch.zeros(2, 5, requires_grad=True)
    S.nelu(zero, 0.4).sum().backward()
    assert zero.grad.isfinite().all()
    # 64 orthonormal atoms, four active: one lambda and one bias, alike at 0.1, at other noise
    on = torch.rand(1000, 64, generator=gen(0)).argsort(1) < 4
    clean, noise = (torch.rand(1000, 64, generator=gen(1)) + 1) * on, randn(1000, 64, seed=2)
    f1 = lambda z: (2 * ((z > 0) & on).sum() / ((z > 0).sum() + on.sum())).item()
    nmse = lambda z: ((z - clean).square().sum() / (clean - clean.mean(0)).square().sum()).item()
    found = {s: [(f1(z), nmse(z)) for y in [clean + s * noise]
                 for z in (S.nelu(y, 0.15), F.relu(y - 0.11))] for s in (0.01, 0.1, 0.2, 0.4)}
    scores = list(zip(*([one[0] for one in pair] for pair in found.values())))
    assert max(scores[0]) - min(scores[0]) < 0.03 and max(scores[1]) - min(scores[1]) > 0.5
    assert found[0.4][0][1] < 0.6 * found[0.4][1][1]
    assert found[0.1][0][1] == pytest.approx(found[0.1][1][1], rel=0.1)


@given(st.integers(3, 9), st.integers(2, 80), st.integers(1, 5), st.integers(1, 40), seeds)
def test_batchtopk_is_exact_over_the_batch(d, n, k, B, seed):
    k = min(k, n - 1)
    m, u = make_sae(d, n, k, seed), S.normalize(randn(B, d, seed=seed + 1))[0]
    u[0] *= 50  # a busy token must not be cut short
    dense = m.pre_acts(u).relu()
    (code, *_), cut = S.batch_code(m, u)
    kept = to_dense(*(code[0] * (code[0] >= cut), code[1].indices), n)
    wanted = dense.flatten().topk(k * B).values
    assert torch.allclose(kept, torch.where(dense >= wanted[-1], dense, 0.0))
    if wanted[-1] > 0:
        assert (kept > 0).sum() == k * B
    # as a step has it: loss and gradients of that code, and what `folded` leaves active
    aux = argparse.Namespace(dead=torch.arange(0), k=0, error=lambda *a: 0.0)
    loss, nmse, e, values, _ = S.losses(m, u, 1.0, aux, batch=True)
    assert torch.allclose(e, u - kept @ m.W_dec - m.b_pre)
    mask = (kept > 0).double()
    ours = torch.autograd.grad(loss, [*m.parameters()])
    again = (u - (m.pre_acts(u).relu() * mask) @ m.W_dec - m.b_pre).square().mean()
    for one, other in zip(ours, torch.autograd.grad(again, [*m.parameters()])):
        assert torch.allclose(one, other, atol=1e-10)
    active = (S.folded(m, "batchtopk", u).encode(u)[0] > 0).sum()
    assert abs(int(active) - int(mask.sum())) <= 1


@given(st.integers(1, 5), seeds, st.booleans())
def test_prefixes_reconstruct_by_themselves(k, seed, batch):
    m, u = make_sae(6, 30, k, seed), S.normalize(randn(9, 6, seed=seed + 1))[0]
    aux = argparse.Namespace(dead=torch.arange(0), k=0, error=lambda *a: 0.0)
    loss, nmse, e, values, indices = S.losses(m, u, 2.0, aux, False, batch, [4, 12])
    z = m.pre_acts(u).relu() * (to_dense(values, indices, 30) > 0)
    errors = [(u - z[:, :n] @ m.W_dec[:n] - m.b_pre).square().mean() / 2 for n in (4, 12, 30)]
    assert torch.allclose(loss, sum(errors) / 3) and torch.allclose(nmse, errors[-1])
    ours = torch.autograd.grad(loss, [*m.parameters()])
    for one, other in zip(ours, torch.autograd.grad(sum(errors) / 3, [*m.parameters()])):
        assert torch.allclose(one, other, atol=1e-10)


def test_prefixes_keep_parents_from_being_absorbed():
    """Eight parents, each with four children of which at most one is on, and only with it."""
    def make(B, g, where=False):
        parents = torch.rand(B, 8, generator=g) < 0.15
        child = torch.randint(8, (B, 8), generator=g)  # 0 to 3: that one, else none
        children = (F.one_hot(child, 8)[..., :4] * parents[..., None]).flatten(1)
        x = parents.float() @ ATOMS[:8] + children.float() @ ATOMS[8:40]
        return (x, parents, children > 0) if where else x

    absorbed = []
    for prefixes in ("", "8"):
        m = planted_run("batchtopk", 0.0, make, 400, n=40, k=2, prefixes=prefixes)
        x, parents, children = make(2048, gen(5), True)
        on = to_dense(*m.encode(S.normalize(x)[0]), 40) > 0
        nearest = (F.normalize(m.W_dec, dim=1) @ ATOMS[:8].T).argmax(0)
        with_child = parents & children.view(-1, 8, 4).any(2)
        absorbed.append((~on[:, nearest])[with_child].double().mean().item())
    assert absorbed[1] < 0.6 * absorbed[0], absorbed


def planted_run(activation, l1, make, steps=500, B=256, n=64, k=4, **more):
    """A dictionary of atoms in 32 dimensions, learned -> what it reconstructs with."""
    tokens = steps * B
    cfg = S.Config(n_latents=n, k=k, batch=B, tokens=tokens, lr=3e-3, l1=l1, device="cpu",
                   activation=activation, dead_tokens=10**8, precision="fp32", **more)
    cfg = S.resolve(cfg, 32, tokens)
    g = gen(1)
    u = S.normalize(make(4096, g))[0]
    torch.manual_seed(0)
    m = S.extended(S.Sparse(32, n, cfg.k), cfg)
    S.init_from_data(m, u)
    t = S.Trainer(cfg, m, (u - u.mean(0)).square().mean().item())
    for _ in range(steps):
        t.step(make(B, g))
    return t.inference()


ATOMS = F.normalize(randn(64, 32, seed=99, dtype=F32), dim=1)


def test_only_relu_shrinks_what_it_finds():
    """A planted dictionary: at a like L0, the others' values are nearer to the best ones."""
    def make(B, g):
        on = torch.rand(B, 64, generator=g) < 4 / 64
        return (torch.rand(B, 64, generator=g) + 0.5) * on @ ATOMS

    x, found = make(2048, gen(5))[:, None], {}
    for kind, l1 in (("relu", 0.4), ("gated", 0.5), ("jumprelu", 0.03)):
        m = planted_run(kind, l1, make, 350)
        r = evals.reconstruction(m, x)
        assert 3 < r["l0"] < 8 and r["nmse"] < 0.35, (kind, r["l0"], r["nmse"])
        found[kind] = evals.refinement(m, x)["ratio"]
    assert found["relu"] > 1.6 and max(found["gated"], found["jumprelu"]) < 1.1


def test_batchtopk_gives_each_token_what_it_needs():
    """Half of the tokens are made of two atoms, half of six: so many latents are active."""
    def make(B, g):
        few = torch.arange(B)[:, None] % 2 * 4 + 2
        on = torch.rand(B, 64, generator=g).argsort(1) < few
        return (torch.rand(B, 64, generator=g) + 0.5) * on @ ATOMS

    x = make(2048, gen(5))
    active = lambda m: (m.encode(S.normalize(x)[0])[0] > 0).double().sum(1).view(-1, 2).mean(0)
    found = active(planted_run("batchtopk", 0.0, make))
    assert found[0] < 3 and found[1] > 5 and found.mean() == pytest.approx(4, rel=0.04)
    assert (active(planted_run("topk", 0.0, make, 50)) - 4).abs().max() < 0.2


def test_every_activation_from_the_command_line(tmp_path, capsys, acts_dir):
    for kind in ("batchtopk", *S.DENSE_ACTIVATIONS):
        l1 = {"batchtopk": [], "nelu": ["--l1", "0.1"]}.get(kind, ["--l1", "0.02"])
        given_, out = ["--activation", kind, *l1], tmp_path / kind
        argv = [str(a) for a in [*TINY, *given_, "--acts", acts_dir, "--out", out]]
        S.main(argv)
        assert read_json(out / "config.json")["activation"] == kind
        evals.main([str(out), "--only", "reconstruction,refinement,downstream", *CPU])
        r = read_json(out / "evals.json")
        assert r["reconstruction"]["nmse"] < 0.9 and r["reconstruction"]["l0"] > 1
        m = S.SAE.load(out)
        if kind == "nelu":
            assert "NeLU" in repr(m) and m.lam == 0.1
            refuses(S.main, ["--export", out, tmp_path / "x"], capsys, "SAELens has no NeLU")
            continue
        m.to_saelens(tmp_path / f"{kind}-out")
        x = randn(20, 16, dtype=F32)
        assert torch.allclose(S.SAE.load(tmp_path / f"{kind}-out")(x), m(x), atol=1e-4)
    no = [*TINY, "--acts", acts_dir, "--out", tmp_path / "no"]
    for given_, why in ((["--activation", "swish"], "choose of topk"),
                        (["--activation", "gated"], "goes with a positive --l1"),
                        (["--activation", "topk", "--l1", "0.1"], "goes without --l1"),
                        (["--activation", "batchtopk", "--multi_topk"], "is of TopK alone"),
                        (["--prefixes", "8", "--multi_topk"], "is of TopK alone"),
                        (["--prefixes", "8", "--l1", "0.1"], "of topk or batchtopk"),
                        (["--prefixes", "8,8"], "rising numbers of latents below"),
                        (["--prefixes", "8,x"], "rising"), (["--prefixes", "99999"], "rising")):
        refuses(S.main, [*no, *given_], capsys, why)
    runs = [str(tmp_path / kind) for kind in ("batchtopk", "relu")]
    evals.main([*runs, "--compare", "--report", *CPU, "--latents", "8"])
    out = capsys.readouterr().out
    rows = [line.split() for line in out[out.index("activation ") :].splitlines()[1:]]
    assert [row[0] for row in rows] == ["batchtopk", "relu"] and rows[0][-1] == runs[0]
    evals.main([runs[0], "--compare", "--json", *CPU, "--latents", "8"])
    assert json.loads(capsys.readouterr().out)["n2g"]  # and no table after it
    for run in runs:
        page, r = page_of(Path(run) / "report.html"), read_json(Path(run) / "evals.json")
        assert [row["activation"] for row in page["frontier"]] == ["batchtopk", "relu"]
        row = page["frontier"][runs.index(run)]
        found = {label: r[name][key] for label, (name, key) in evals.COMPARED.items()}
        assert {label: row[label] for label in evals.COMPARED} == found and found["NMSE"] > 0
    nested = tmp_path / "nested"
    S.main([str(x) for x in [*TINY, "--prefixes", "8", "--acts", acts_dir, "--out", nested]])
    with pytest.raises(harvest.UserError, match="no finished TopK run"):  # of another loss
        evals.read_runs((str(nested),))


def test_nelu_begins_where_some_latent_is_active(tmp_path):
    """With its lambda from the start no latent of a random dictionary would be."""
    m = S.train(tiny_config(tmp_path, activation="nelu", l1=0.35), planted_batches, planted(200))
    assert all(p.isfinite().all() for p in m.parameters()) and m.lam == 0.35
    assert S.nmse(m, planted(200)) < 1 and (m.encode(m.unit(planted(200))[0])[0] > 0).any()


def test_runs_of_several_seeds_are_a_line_of_the_comparison(capsys):
    row = lambda x, name: dict.fromkeys(evals.COMPARED, x) | {
        "run": name, "activation": "gated", "settings": name[0]}
    config = {"activation": "gated", "l1": 0.1, "seed": 0, "resume": False, "out": "a"}
    known = {name: {"activation": "JumpReLU", "settings": {
        "text": "t", "trained": {"config": config | more}}} for name, more in (
        ("a", {}), ("b", {"seed": 1, "resume": True, "out": "b"}), ("c", {"l1": 0.2}))}
    known["d"] = {"activation": "TopK k = 3", "settings": {"text": "t", "trained": {}}}
    a, b, c, d = evals.frontier(known)
    assert a["settings"] == b["settings"] != c["settings"] and a["activation"] == "gated"
    assert d["activation"] == "TopK" and d["NMSE"] is None
    known["d"]["settings"]["text"] = "another"
    with pytest.raises(harvest.UserError, match="different texts"):
        evals.frontier(known)
    evals.show_frontier([row(1.0, "a0"), row(3.0, "a1"), row(5.0, "b0"), row(None, "c0")])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 3 and lines[0].count("2.0000 ± 1.0000") == len(evals.COMPARED)
    assert lines[0].endswith("a0, 2 seeds") and "±" not in lines[1] and lines[1].endswith("b0")
    assert "nan" in lines[2]


@pytest.mark.parametrize("kind", ["relu", "gated"])
def test_the_penalty_is_warmed_up(tmp_path, kind, monkeypatch):
    """At first all latents are active: but for ReLU, it rises over a tenth of the steps."""
    seen, own = [], S.dense_losses
    monkeypatch.setattr(S, "dense_losses", lambda *a: seen.append(a[-1]) or own(*a))
    S.train(tiny_config(tmp_path, activation=kind, l1=0.02), planted_batches)
    rises = [0.02 * min(1, i / 4) for i in range(1, 41)]
    assert seen == pytest.approx([0.02] * 40 if kind == "relu" else rises)


@pytest.mark.parametrize("kind", ["batchtopk", "gated", "jumprelu"])
def test_what_an_activation_has_learned_is_resumed(tmp_path, kind):
    more = {"activation": kind, "l1": 0.0 if kind == "batchtopk" else 0.02}
    whole = S.train(tiny_config(tmp_path / "a", **more), planted_batches, planted(200))

    def stops(line):
        if line["step"] == 20:
            raise KeyboardInterrupt

    cfg = tiny_config(tmp_path / "b", minutes=0.0, **more)
    with pytest.raises(KeyboardInterrupt):
        S.train(cfg, planted_batches, planted(200), log=stops)
    again = S.train(dataclasses.replace(cfg, resume=True), planted_batches, planted(200))
    assert same_weights(whole, again) and torch.equal(whole.theta, again.theta)
    done = S.train(dataclasses.replace(cfg, resume=True), planted_batches, planted(200))
    assert (done.theta - whole.theta).abs().max() < 0.2  # calibrated on other tokens, if at all


# ----------------------------------------------------- bad input: one line, status 2, nothing lost


def damaged(acts_dir, tmp_path):
    import shutil

    shutil.copytree(acts_dir, tmp_path / "acts")
    return tmp_path / "acts"


def test_missing_or_foreign_activations(tmp_path, capsys, acts_dir):
    refuses(evals.main, ["none.pt"], capsys, "no autoencoder at none.pt")
    with pytest.raises(harvest.UserError, match="no activations at"):
        harvest.Acts(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x/meta.json").write_text('{"something": "else"}')
    refuses(S.main, [*TINY, "--acts", tmp_path / "x", "--out", tmp_path / "r"], capsys,
            "not written by harvest.py")
    y, z = ["--out", tmp_path / "y"], ["--out", tmp_path / "z"]
    (tmp_path / "y").mkdir()
    (tmp_path / "y/notes.txt").write_text("mine")
    refuses(S.main, [*TINY, "--acts", acts_dir, *y], capsys, "y is not empty and holds no run")
    refuses(harvest.main, ["--model", "none.pt", *z], capsys, "no weights at none.pt")
    for model in ("none.pt", "stdlib"):  # before a model is looked for, or trained
        refuses(harvest.main, ["--model", model, *y], capsys, "y is not empty and holds no harvest")


def test_harvest_keeps_what_is_not_its_own(tmp_path, capsys, model_file, text_file, acts_dir):
    base = ["--model", model_file, "--text", text_file, "--ctx", 16, "--tokens", 0, *CPU]
    z = ["--out", tmp_path / "z"]
    (tmp_path / "y").mkdir()
    (tmp_path / "y/notes.txt").write_text("mine")
    refuses(harvest.main, [*base, "--out", tmp_path / "y"], capsys, "is not empty")
    refuses(harvest.main, [*base, "--layer", 1, "--out", acts_dir], capsys,
            "another harvest", "layer: 2 there, 1 wanted")
    refuses(harvest.main, [*base, "--layer", 7, *z], capsys, "has no layer 7", "0 to 2")
    refuses(harvest.main, [*base, "--site", "nose", *z], capsys,
            "unknown site 'nose'", "resid_post_mlp")
    refuses(harvest.main, [*base[:4], "--ctx", 64, *z, *CPU], capsys, "contexts of 2 to 16 tokens")
    short = ["--text", tmp_path / "y/notes.txt", "--ctx", 16]
    refuses(harvest.main, [*base[:2], *short, *z, *CPU], capsys, "too short")


def test_damaged_shards(tmp_path, capsys, acts_dir):
    acts = damaged(acts_dir, tmp_path)
    shard = acts / "train/acts-00000.npy"
    argv = [*TINY, "--acts", acts, "--out", tmp_path / "r"]
    good = shard.read_bytes()
    shard.write_bytes(good[:-1000])
    refuses(S.main, argv, capsys, "acts-00000.npy is damaged")
    np.save(shard, np.zeros((3, 16, 16), np.float16))
    refuses(S.main, argv, capsys, "acts-00000.npy has shape (3, 16, 16)")
    shard.write_bytes(good)
    bad = np.load(shard)
    bad[5, 3, 2] = np.nan
    np.save(shard, bad)
    refuses(S.main, argv, capsys, "NaN or Inf", "acts-00000.npy, row 5")
    shard.unlink()
    refuses(S.main, argv, capsys, "acts-00000.npy")
    assert not (tmp_path / "r/sae.pt").exists()


def test_activations_too_large_for_float16(tmp_path, model_file):
    model, encoding = harvest.load_model(str(model_file))
    model.h[2].mlp.c_proj.bias.data[3] = 1e6
    place = "acts-00000.npy, context 0, position 0.*does not fit float16"
    with pytest.raises(harvest.UserError, match=place):
        harvest.harvest(model, encoding, DOCS, tmp_path / "acts", length=16)


def test_impossible_options(tmp_path, capsys, acts_dir, run_dir):
    out = ["--acts", acts_dir, "--out", tmp_path / "r"]
    refuses(S.main, ["--n_latents", 8, "--k", 9, *out], capsys,
            "k = 9 must be between 1 and n_latents = 8")
    refuses(S.main, [*TINY, "--tokens", 100, *out], capsys, "less than one batch")
    refuses(S.main, [*TINY, "--precision", "fp8", *out], capsys, "choose bf16 or fp32")
    taken = [*TINY, "--acts", acts_dir, "--out", run_dir]
    refuses(S.main, taken, capsys, "already holds a run", "--resume")
    refuses(S.main, [*TINY, *out, "--model", "gpt2"], capsys,
            "holds other activations (model: ", "another --acts")
    refuses(S.main, [*taken, "--resume", "--lr", 0.5], capsys, "another configuration", "lr")


def test_width_and_site_must_match(tmp_path, capsys, acts_dir, run_dir, model_file, text_file):
    narrow, other = tmp_path / "narrow.pt", tmp_path / "acts1"
    S.SAE(10, 20, 2).save(narrow)
    refuses(evals.main, [narrow, "--acts", acts_dir, *CPU], capsys, "width 10", "16")
    argv = ["--model", str(model_file), "--text", str(text_file), "--ctx", "16", "--layer", "1"]
    harvest.main([*argv, "--out", str(other), *CPU])
    refuses(evals.main, [run_dir, "--acts", other, *CPU], capsys,
            "layer: 1 there, 2 trained on")


def test_streams_of_short_texts_end_with_a_reason(capsys, model_file, tmp_path, monkeypatch):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCS[:8]))
    base = [*TINY, "--stream", "--tokens", 1280, "--model", model_file, "--out", tmp_path / "r"]
    refuses(S.main, [*base, "--text", few], capsys, "too short", "no val context")
    # read once, used for both splits, again and again
    monkeypatch.setattr(sys, "stdin", stdin("<|endoftext|>".join(DOCS)))
    code, err = run(S.main, [*base, "--text", "-"], capsys)
    assert code == 0 and read_json(tmp_path / "r/config.json")["acts"] == "", err


def test_a_small_harvest_waits_for_held_out_text(tmp_path, model_file):
    model, encoding = harvest.load_model(str(model_file))
    meta = harvest.harvest(model, encoding, DOCS, tmp_path / "acts", length=16, tokens=16)
    assert meta["tokens"] == 16 and meta["val_tokens"] > 0


def test_arguments_are_looked_at_before_anything_is_loaded(tmp_path, capsys, monkeypatch, acts_dir):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harvest, "load_model", lambda *a, **k: pytest.fail("loaded a model"))
    np.save("mine.npy", np.zeros((9, 4)))
    Path("notes.md").write_text("mine")
    Path("other.txt").write_text("other")
    no = "no activations at"
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(harvest, "pick_device", lambda name: device)
        for acts, said in (("typo", no), ("mine.npy", "too few"), ("notes.md", no)):
            refuses(S.main, [*TINY[:6], "--acts", acts], capsys, said)
        refuses(S.main, [*TINY[:6], "--stream", "--acts", acts_dir], capsys, "leave out --acts")
        for given, said in ((["--text", "none.txt"], "no text at none.txt"),
                            (["--site", "nose"], "unknown site 'nose'")):
            refuses(S.main, [*TINY[:6], "--stream", *given], capsys, said)
    monkeypatch.setattr(harvest, "pick_device", lambda name: "cpu")
    S.SAE(16, 32, 2).save("x.pt")
    refuses(evals.main, ["x.pt", "--acts", "typo"], capsys, no)
    given = ["--model", "stdlib", "--layer", 1, "--text", "nowhere"]
    refuses(evals.main, ["x.pt", *given], capsys, "no text at nowhere")
    for given, said in ((["--text", "none.txt"], "no text at none.txt"),
                        (["--text", "notes.md"], "notes.md is no .txt"),
                        (["--site", "nose"], "unknown site 'nose'"),
                        (["--batch", -1], "--batch -1"), (["--tokens", -5], "--tokens -5")):
        refuses(harvest.main, [*given, "--model", "stdlib"], capsys, said)
        if given[0] in ("--text", "--site"):
            refuses(S.main, [*TINY, *given], capsys, said)
    for given, said in ((["--layer", 1], "layer: 2 there, 1 asked"),
                        (["--ctx", 32], "ctx: 16 there"),
                        (["--site", "mlp_post_act"], "site: resid_post_mlp there"),
                        (["--text", "other.txt"], "text: ")):
        refuses(S.main, [*TINY, "--acts", acts_dir, *given], capsys, said, "leave out")
    for name in ("tokens", "contexts", "latents"):
        refuses(evals.main, ["r", f"--{name}", 0], capsys, f"--{name} 0 must be at least 1")


def test_streams_take_layer_site_and_context_and_resuming_needs_no_other_word(
        tmp_path, model_file, text_file, capsys, monkeypatch):
    argv = [*TINY, "--stream", "--tokens", 1280, "--model", model_file, "--text", text_file,
            "--layer", 0, "--site", "mlp_post_act", "--ctx", 12, "--out", tmp_path / "r"]
    code, err = run(S.main, argv, capsys)
    assert code == 0, err
    sae = S.SAE.load(tmp_path / "r/sae.pt")
    where = {"layer": 0, "site": "mlp_post_act", "context": 12}
    assert sae.d_model == 64 and {name: sae.meta[name] for name in where} == where
    monkeypatch.chdir(tmp_path)
    before = read_json(Path("r/config.json"))
    assert run(S.main, ["--resume", "--out", "r", "--tokens", 2560], capsys)[0] == 0
    assert read_log("r")[-1]["tokens"] == 2560
    after = read_json(Path("r/config.json"))
    assert {name for name in after if after[name] != before[name]} == {"out", "tokens", "resume"}
    refuses(S.main, ["--resume", "--out", "r", "--k", 5], capsys, "k: 4 there, 5 now")
    refuses(S.main, ["--resume", "--out", "r", "--layer", 1], capsys, "layer: 0 there, 1 now")


def test_a_harvest_that_training_starts_has_its_options(tmp_path, model_file, text_file, capsys,
                                                        monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [*TINY, "--tokens", 640, "--model", model_file, "--text", text_file, "--layer", 0,
            "--ctx", 8, "--out", "r"]
    code, err = run(S.main, argv, capsys)
    assert code == 0, err
    meta = harvest.read_meta("acts")
    assert [meta[name] for name in ("layer", "context", "asked")] == [0, 8, 640]


def test_training_completes_an_unfinished_harvest(
        tmp_path, model_file, text_file, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [*TINY, "--model", model_file, "--text", text_file, "--out", tmp_path / "r"]
    with monkeypatch.context() as patch:
        patch.setattr(harvest, "write_npy", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(S.main, argv, capsys)[0] == 130
    assert not harvest.is_harvested(tmp_path / "acts")
    code, err = run(S.main, argv, capsys)
    assert code == 0, err


def test_unusable_texts_weights_and_devices(tmp_path, capsys, model_file, run_dir):
    base = ["--model", model_file, "--out", tmp_path / "z", *CPU]
    reading = lambda name: [*base, "--text", tmp_path / name]
    (tmp_path / "null.jsonl").write_text('{"text": "fine"}\n{"text": null}\n')
    refuses(harvest.main, reading("null.jsonl"), capsys, "null.jsonl, line 2")
    whole = gzip.compress(b'{"text": "one"}\n' * 5000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    refuses(harvest.main, reading("cut.jsonl.gz"), capsys, "cut.jsonl.gz is damaged")
    (tmp_path / "no.jsonl.gz").write_bytes(b"plain")
    refuses(harvest.main, reading("no.jsonl.gz"), capsys, "no.jsonl.gz is damaged")
    checkpoint = newest(run_dir) / "0000.pt"
    refuses(harvest.main, ["--model", checkpoint, *base[2:]], capsys, "holds no GPT-2")
    refuses(evals.main, [checkpoint, *CPU], capsys, "neither an autoencoder")
    for main, argv in ((S.main, TINY[:4]), (evals.main, [run_dir]), (harvest.main, base[:4])):
        refuses(main, [*argv, "--device", "abacus"], capsys, "no device abacus", "--device")
    refuses(S.main, [*TINY, "--tokens", -500], capsys, "--tokens -500")
    (tmp_path / "file").write_text("")
    refuses(S.main, [*TINY, "--acts", run_dir, "--out", tmp_path / "file"], capsys, "error")


def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path, capsys, acts_dir, monkeypatch):
    def full(*a, **k):
        raise OSError(28, "No space left on device")

    def as_torch_has_it(*a, **k):
        try:
            full()
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672]")

    for number, save in enumerate((full, as_torch_has_it)):
        monkeypatch.setattr(torch, "save", save)
        out = tmp_path / str(number)
        refuses(S.main, [*TINY, "--acts", acts_dir, "--out", out], capsys, "no space left")
        assert not list(out.glob("*.pt*"))
        with pytest.raises(OSError, match="No space left"), harvest.atomic(tmp_path / "x") as f:
            torch.save({}, f)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_disk_that_is_really_full_is_recognised_wherever_it_shows(tmp_path, run_dir):
    """torch raises a RuntimeError then, and numpy an OSError that does not say why."""
    x = np.zeros((99, 999), np.float16)
    writers = {"a": lambda p: S.save_atomic(p, {"x": torch.zeros(10**6)}),
               "b": lambda p: S.save_atomic(p, [b"text"] * 10**5),
               "c": lambda p: harvest.write_npy(p, x),
               "d": lambda p: harvest.write_json(p, {"x": 1}),
               "e": lambda p: S.SAE(9, 99, 2).save(p),
               "f": lambda p: evals.write_report(p, {"x": "y" * 10**6})}
    for name, write in writers.items():
        own = "" if name in "abe" else f".{os.getpid()}"  # of harvest.atomic
        part = tmp_path / f"{name}{own}.part"
        part.symlink_to("/dev/full")
        with pytest.raises(OSError) as e:
            write(tmp_path / name)
        assert e.value.errno == 28 and "no space left" in harvest.told(e.value)
        assert not os.path.lexists(part) and not (tmp_path / name).exists()
        write(tmp_path / name)
    assert np.array_equal(np.load(tmp_path / "c"), x)
    with open("/dev/full", "w") as full:
        argv = [sys.executable, HERE / "evals.py", run_dir, *CPU, "--only", "reconstruction"]
        r = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True)
    assert r.returncode == 2 and r.stderr.splitlines()[-1].startswith("error: no space left")


def test_a_small_disk_fills_in_the_middle_of_a_run_and_of_a_harvest(
        tmp_path, model_file, text_file, acts_dir, capsys):
    """On a file system of 1 MB, where this machine lets a test mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        base = ["--model", model_file, "--text", text_file, "--ctx", 16, "--tokens", 0, *CPU]
        (disk / "filler").write_bytes(bytes(940_000))
        refuses(harvest.main, [*base, "--out", disk / "acts"], capsys, "no space left", "is kept")
        wide = [*TINY, "--n_latents", 128, "--acts", acts_dir, "--minutes", 0, "--out", disk / "r"]
        refuses(S.main, wide, capsys, "no space left", "is kept")
        assert not list(disk.rglob("*.part"))
        (disk / "filler").unlink()
        again = (harvest.main, [*base, "--out", disk / "acts"]), (S.main, [*wide, "--resume"])
        for main, argv in again:
            code, err = run(main, argv, capsys)
            assert code == 0, err
    finally:
        subprocess.run(["umount", "-l", str(disk)], capture_output=True)


def test_what_is_the_programs_own_fault_is_no_line_for_its_user():
    assert harvest.told(RuntimeError("shapes do not match")) is None
    assert "not enough memory" in harvest.told(RuntimeError("can't allocate memory: 4 TB"))
    assert harvest.told(FileNotFoundError(2, "No such file", "x")) == "error: x: No such file"


@pytest.mark.skipif(not os.environ.get("SAE_LONG"),
                    reason="set SAE_LONG=1: trains the real embedded model, four minutes")
def test_the_real_embedded_model_beats_its_baselines(tmp_path):
    harvest.train_stdlib(tmp_path / "m.pt")
    losses = torch.load(tmp_path / "m.pt", weights_only=True)["losses"]
    assert losses["model"] < losses["bigram"] - 0.5 < losses["unigram"]


# ---------------------------------------------------------------------------------- the bench
#
#     python test_sae.py --bench                      tokens/s of a step and its parts: make bench
#     python test_sae.py --bench --peers              beside other implementations: make peers
#     python test_sae.py --bench --peers --quality    what all of them learn from the same batches
#
# A peer is a function (cfg, d) -> (step, sae): step(x (B, d), bf16) -> loss is one training step by
# its own model, loss and update, with Adam; sae has its own encode and decode.


def autocast(device, bf16):
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16)


def sparsify(cfg, d):
    """Its coder and loss; the step of its Trainer.fit, which wants a whole language model."""
    from sparsify import SparseCoder, SparseCoderConfig

    sizes = SparseCoderConfig(num_latents=cfg.n_latents, k=cfg.k)
    sae = SparseCoder(d, sizes, cfg.device, torch.float32)
    adam = torch.optim.Adam(sae.parameters(), cfg.lr)
    silent = torch.zeros(cfg.n_latents, dtype=torch.long, device=cfg.device)

    def step(x, bf16=False):
        if not adam.state:  # the first step
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        with autocast(cfg.device, bf16):
            out = sae(x, dead_mask=silent > cfg.dead_tokens)
            loss = out.fvu + cfg.aux_coef * out.auxk_loss
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        silent.add_(len(x))[out.latent_indices.flatten()] = 0
        return loss.item()

    return step, sae


def sae_lens(cfg, d):
    """Its trainer, with the defaults of its autoencoder."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sizes = TopKTrainingSAEConfig(d_in=d, d_sae=cfg.n_latents, k=cfg.k, device=cfg.device)
    run = SAETrainerConfig(cfg.tokens, cfg.batch, cfg.lr, lr_end=cfg.lr, device=cfg.device)
    run.dead_feature_window = cfg.dead_tokens // cfg.batch
    trainer = SAETrainer(run, TopKTrainingSAE(sizes), iter(()))

    def step(x, bf16=False):
        trainer.autocast_if_enabled = autocast(cfg.device, bf16)
        trainer.n_training_steps += 1
        return trainer.step(x).loss.item()

    return step, trainer.sae


def dictionary_learning(cfg, d):
    """Its trainer, at a constant learning rate as the others."""
    from dictionary_learning.trainers import TopKTrainer

    sizes = cfg.tokens // cfg.batch, d, cfg.n_latents, cfg.k
    rate = {"lr": cfg.lr, "warmup_steps": 0}
    trainer = TopKTrainer(*sizes, layer=0, lm_name="", device=cfg.device, **rate)
    trainer.dead_feature_threshold = cfg.dead_tokens
    steps = itertools.count()

    def step(x, bf16=False):
        with autocast(cfg.device, bf16):  # around the whole update, as in its trainSAE
            return trainer.update(next(steps), x)

    return step, trainer.ae


PEERS = {"sparsify": sparsify, "sae_lens": sae_lens, "dictionary_learning": dictionary_learning}


def installed(device):
    """The PEERS that can be imported; a line on stderr for each other. UserError without any."""
    if not device.startswith("cuda"):
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # without a GPU it would be interpreted
    found = {}
    for name, peer in PEERS.items():
        try:
            with contextlib.redirect_stdout(sys.stderr):
                importlib.import_module(name)
            found[name] = peer
        except Exception as e:  # each imports half the world, which fails in many ways
            print(f"{name} is left out: {e}".splitlines()[0], file=sys.stderr)
    if not found:
        raise harvest.UserError("no peer can be imported; install and time them with: make peers")
    return found


def our_turns(cfg, x, fp32):
    """{name: (tokens, function)}: the encoder's product, our step (fp32: also so), its parts."""
    B, d = x.shape
    n, k = cfg.n_latents, cfg.k
    sae = S.Sparse(d, n, k).to(cfg.device)
    trainer = S.Trainer(cfg, sae, 1 / d)
    dtype = sae.product_dtype
    dead = torch.randperm(n, device=cfg.device)[: n // 20]
    u = S.normalize(x)[0]
    values, support = sae.select(u, k)[0]
    W_dec = sae.W_dec.detach()
    W_enc = sae.W_enc.detach().to(dtype or u.dtype)
    chunks = u.to(W_enc.dtype).split(max(1, S.DENSE[u.device.type] // n))
    pre_acts = F.linear(chunks[0], W_enc)

    def product():
        for chunk in chunks:
            F.linear(chunk, W_enc)

    def step(n_dead=0, dtype=dtype):
        sae.product_dtype = dtype
        trainer.silent.zero_()
        trainer.silent[dead[:n_dead]] = 2 * cfg.dead_tokens
        trainer.n_dead = trainer.own_dead = n_dead
        trainer.step(x)

    def gradients():
        unsorted = S.Support(support.indices, n)
        unsorted.gather_dot(u, W_dec)
        unsorted.scatter_sum(values, u)
        unsorted.scatter_sum(values, u)

    turns = {
        "encoder product alone": (B, product),
        "step, nothing dead": (B, step),
        "step, 5 % dead (AuxK)": (B, lambda: step(len(dead))),
        "part: topk": (len(pre_acts), lambda: S.topk(pre_acts, k)),
        "part: decode": (B, lambda: support.gather_sum(values, W_dec)),
        "part: sparse gradients": (B, gradients),
        "part: optimizer": (B, trainer.update),
    }
    if fp32:
        turns["step, nothing dead, fp32"] = B, lambda: step(0, None)
    return turns


class Plain(S.SAE):
    """With the encoder as one would first have it in bf16."""

    def encode(self, u):
        with autocast(u.device, True):
            values, indices = super().encode(u)
        return values.float(), indices


def plain_step(cfg, x):
    """The step as one would first write it: `objective`, autograd, Adam."""
    kind = Plain if cfg.precision == "bf16" else S.SAE
    sae = kind(x.shape[1], cfg.n_latents, cfg.k).to(cfg.device)
    adam = torch.optim.Adam(sae.parameters(), 1e-4, fused=True)

    def step():
        adam.zero_grad()
        S.objective(sae, S.normalize(x)[0], 1 / x.shape[1], dead=[], k_aux=0, alpha=0).backward()
        with torch.no_grad():
            sae.W_dec.grad -= (sae.W_dec.grad * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
        adam.step()
        sae.normalize_decoder()

    return step


def their_turns(cfg, x):
    """The steps of the peers, in fp32 and, where that is our precision, under bf16 autocast."""
    turns = {}
    for name, peer in installed(cfg.device).items():
        step, _ = peer(cfg, x.shape[1])
        if name != "sparsify" or not x.is_cuda:  # there it is in bf16 anyway
            turns[f"{name}, fp32"] = len(x), functools.partial(step, x)
        if cfg.precision == "bf16":
            turns[f"{name}, bf16"] = len(x), functools.partial(step, x, bf16=True)
    return turns


def memory(cuda):
    """Bytes: the peak so far, of the device on CUDA, else of the process; and what is free."""
    if cuda:
        return torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[0]
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    known = "SC_AVPHYS_PAGES" in os.sysconf_names  # not on macOS
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else math.inf
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, free


def processor(cuda):
    if cuda:
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return f"{[*names, 'CPU'][0]}, {torch.get_num_threads()} threads"


def bench(a, cfg):
    """Print tokens/s on random data: medians of rounds in which all take turns. The peak of memory
    is that of our own turns."""
    from torch.utils.benchmark import timer  # it waits for the GPU

    n, cuda = cfg.n_latents, cfg.device.startswith("cuda")
    batch = cfg.batch or (S.PAPER_BATCH if cuda else max(512, 2**27 // n))
    cfg = S.resolve(dataclasses.replace(cfg, batch=batch, tokens=10**10), a.d, 0)
    dense = 2**30 if cuda else 2**27  # pre-activations of the baseline at once
    wanted = 4 * 22 * a.d * n + 10 * batch * (cfg.k + a.d) * 4 + 12 * dense
    if a.peers:  # each has weights, gradients and Adam's moments; in turn they have dense codes
        wanted += len(PEERS) * 32 * a.d * n + 24 * batch * n
    free = memory(cuda)[1]
    if wanted > free:
        sizes = f"about {wanted / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
        return print(f"n {n}: needs {sizes}; left out")
    torch.manual_seed(cfg.seed)
    x = torch.randn(batch, a.d, device=cfg.device)
    plain = x[: max(1, dense // n)]
    turns = our_turns(cfg, x, fp32=a.peers and cfg.precision == "bf16")
    for _, f in turns.values():
        f()
    known = {"device": processor(cuda), "torch": torch.__version__, "n_latents": n, "k": cfg.k}
    known |= {"d": a.d, "batch": batch, "precision": cfg.precision}
    known["peak_gb"] = memory(cuda)[0] / 1e9
    turns["plain objective + autograd"] = len(plain), plain_step(cfg, plain)
    if a.peers:
        turns |= their_turns(cfg, x)
    seconds = {name: [] for name in turns}
    for _ in range(a.rounds + 1):  # the first warms up
        for name, (tokens, f) in turns.items():
            start = timer()
            f()
            seconds[name].append((timer() - start) / tokens)
    show_rates(known, {name: 1 / float(np.median(t[1:])) for name, t in seconds.items()}, a.json)


def show_rates(known, rates, as_json):
    """rates: {name: tokens/s}. A peer is compared with our step in its own precision."""
    floor, whole = rates["encoder product alone"], rates["step, nothing dead"]
    ours = {"fp32": rates.get("step, nothing dead, fp32", whole), "bf16": whole}
    theirs = [name for name in rates if name.startswith(tuple(PEERS))]
    ratio = {name: ours[name.rpartition(", ")[2]] / rates[name] for name in theirs}
    if as_json:
        return print(json.dumps(known | {"tokens_per_s": rates, "ours_over_theirs": ratio}))
    sizes = "n {n_latents}, k {k}, d {d}, batch {batch}, {precision}, {device}, torch {torch}"
    print(sizes.format(**known) + f"; peak memory {known['peak_gb']:.1f} GB")
    for name, rate in rates.items():
        share = f"{rate / floor:6.1%} of the product's rate"
        if name.startswith("part") or rate == floor:
            share = f"{whole / rate:6.1%} of the step"
        if name in ratio:
            share = f"{ratio[name]:5.2f} x  ours / theirs"
        print(f"  {name:<28} {rate:>13,.0f} tokens/s   {share}")


def learned(name, cfg, train, val):
    """sae.py or a peer, trained on the same batches -> its autoencoder, the norm of its inputs."""
    batches = lambda step: train.batches(cfg.batch, cfg.seed, step, cfg.device)
    if name == "sae.py":
        with tempfile.TemporaryDirectory() as folder:
            return S.train(dataclasses.replace(cfg, out=f"{folder}/run"), batches, val), 1.0
    torch.manual_seed(cfg.seed)
    norm = train.d_model**0.5
    steps = cfg.tokens // cfg.batch
    step, sae = PEERS[name](dataclasses.replace(cfg, dead_tokens=cfg.tokens // 20), train.d_model)
    progress = harvest.Progress(steps, name)
    for i, x in enumerate(itertools.islice(batches(0), steps), 1):
        progress(i, f"loss {step(S.normalize(x.float())[0] * norm):.4f}")
    progress.finish()
    return sae, norm


@torch.no_grad()
def judge(sae, norm, u, n):
    """-> NMSE of normalised u (N, d), given with that norm; how many latents fire on none of it."""
    error, fires = 0.0, 0
    for part in u.split(2048):
        code = sae.encode(part * norm)
        if torch.is_tensor(code):  # (B, n)
            code, fired = (code,), (code > 0).sum(0)
        else:  # values and indices (B, k); sparsify adds the pre-activations
            code, fired = code[:2], code[1][code[0] > 0].bincount(minlength=n)
        error += (part - sae.decode(*code) / norm).square().sum().item()
        fires += fired
    return error / (u - u.mean(0)).square().sum().item(), int((fires == 0).sum())


def quality(a, cfg):
    """Print what sae.py, with its defaults, and the peers learn in one pass over cfg.acts."""
    train, val = harvest.Acts(cfg.acts), harvest.Acts(cfg.acts, "val")
    tokens = min(cfg.tokens or train.n_tokens, train.n_tokens)
    cfg = S.resolve(dataclasses.replace(cfg, tokens=tokens), train.d_model, 0)
    held_out = val.sample(8192 + 65536)[1].flatten(0, 1).to(cfg.device)
    size = len(held_out) // 9  # on which the weights of sae.py are chosen
    few, u = held_out[:size], S.normalize(held_out[size:].float())[0]
    rates = [float(rate) for rate in a.lr.split(",")]
    known = {"acts": cfg.acts, "tokens": tokens, "held_out": len(u), "n_latents": cfg.n_latents}
    known |= {"k": cfg.k, "batch": cfg.batch, "lr": cfg.lr, "lr_of_peers": rates}
    if not a.json:
        print(", ".join(f"{name} {value}" for name, value in known.items()), flush=True)
    peers = installed(cfg.device) if a.peers else ()
    for name in ("sae.py", *peers):
        run = lambda lr, i: judge(*learned(name, dataclasses.replace(cfg, lr=lr, seed=cfg.seed + i),
                                           train, few), u, cfg.n_latents)
        tried = {lr: run(lr, 0) for lr in ([cfg.lr] if name == "sae.py" else rates)}
        lr = min(tried, key=tried.get)  # the best for this one, by what is compared
        nmse, silent = zip(tried[lr], *(run(lr, i) for i in range(1, a.seeds)))
        known[name] = {"lr": lr, "nmse": nmse, "silent": silent}
        known[name]["tried"] = {lr: score for lr, (score, _) in tried.items()}
        if not a.json:
            print(f"  {name:<20} lr {lr:g}  NMSE", *(f"{x:.4f}" for x in nmse), "  silent", *silent,
                  "  tried", *(f"{lr:g}: {score:.4f}" for lr, (score, _) in tried.items()),
                  flush=True)
    if a.json:
        print(json.dumps(known))


def bench_main(argv=None):
    about = "Speed and quality of sae.py, alone and beside others. Takes the options of sae.py too."
    p = argparse.ArgumentParser(description=about, allow_abbrev=False)
    flag = functools.partial(p.add_argument, action="store_true")
    flag("--bench", required=True, help="time a step and its parts on random data")
    flag("--peers", help="and the steps of sparsify, SAELens and dictionary_learning: make peers")
    flag("--quality", help="train on --acts instead (default: n 8192, batch 1024, all tokens once)")
    flag("--json", help="one line of JSON")
    p.add_argument("--d", type=int, default=768, help="width of the random data (default: 768)")
    p.add_argument("--rounds", type=int, default=5, help="of which medians are taken (default: 5)")
    p.add_argument("--seeds", type=int, default=1, help="runs with --quality (default: 1)")
    p.add_argument("--lr", default="1e-3,2e-3,4e-3,6e-3", help="of peers with --quality, each of "
                   "which takes its best (default: 1e-3,2e-3,4e-3,6e-3)")
    a, rest = p.parse_known_args(argv)
    if min(a.d - 1, a.rounds, a.seeds) < 1:
        raise harvest.UserError("--d must be at least 2, --rounds and --seeds at least 1")
    sizes = ["--n_latents", "8192", "--batch", "1024"] if a.quality else []
    cfg = S.parse_config([*sizes, *rest])[1]
    cfg.device = harvest.pick_device(cfg.device)
    if ":" in cfg.device:
        torch.cuda.set_device(cfg.device)
    S.keep_heap()
    return quality(a, cfg) if a.quality else bench(a, cfg)


TINY_BENCH = ["--bench", "--n_latents", "256", "--k", "4", "--d", "16", "--batch", "64"]
TINY_BENCH += ["--rounds", "1", *CPU]


def test_the_bench_prints_every_part(capsys, monkeypatch):
    bench_main(TINY_BENCH)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("n 256, k 4, d 16, batch 64, ")
    assert len(lines) == 9 and all("tokens/s" in line and "%" in line for line in lines[1:])
    bench_main([*TINY_BENCH, "--precision", "bf16", "--json"])
    assert min(json.loads(capsys.readouterr().out)["tokens_per_s"].values()) > 0
    monkeypatch.setitem(globals(), "memory", lambda cuda: (0, 0))
    bench_main(TINY_BENCH)
    assert "left out" in capsys.readouterr().out


def test_the_bench_compares_with_peers_that_are_there(acts_dir, capsys, monkeypatch):
    for name in PEERS:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(harvest.UserError, match="make peers"):
        bench_main([*TINY_BENCH, "--peers"])
    idle = lambda cfg, d: (lambda x, bf16=False: 0.0, S.SAE(d, cfg.n_latents, cfg.k))
    monkeypatch.setitem(PEERS, "numpy", idle)
    bench_main([*TINY_BENCH, "--peers", "--json"])
    assert json.loads(capsys.readouterr().out)["ours_over_theirs"]["numpy, fp32"] > 0
    def better_by_rate(cfg, d):
        m = S.SAE(d, cfg.n_latents, cfg.k)
        m.b_pre.data += 1 - 100 * cfg.lr
        return lambda x, bf16=False: 0.0, m

    monkeypatch.setitem(PEERS, "numpy", better_by_rate)
    quality = ["--quality", "--acts", str(acts_dir), "--tokens", "640", "--json"]
    bench_main([*TINY_BENCH, "--peers", *quality, "--seeds", "2"])
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["sae.py"]["nmse"][0] < found["numpy"]["nmse"][0]
    assert found["numpy"]["lr"] == 6e-3 and len(found["numpy"]["nmse"]) == 2
    tried = list(found["numpy"]["tried"].values())
    assert len(tried) == 4 and min(tried) == tried[-1] == found["numpy"]["nmse"][0]
    assert len(found["sae.py"]["tried"]) == 1


if __name__ == "__main__":
    harvest.run_main(bench_main)
