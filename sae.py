"""
sae.py: train a TopK sparse autoencoder, after Gao et al. 2024, "Scaling and evaluating sparse autoencoders".

    python sae.py --n_latents 32768 --k 32             # uses acts/ if there, else harvests or streams by itself
    python sae.py --n_latents 32768 --k 32 --resume    # continue where the last run of this name stopped

The method, with x an activation of width d:

    u  = (x - mean(x)) / |x - mean(x)|                      normalize
    z  = ReLU(TopK_k(W_enc (u - b_pre) + b_enc))            SAE.encode       section 2.3
    û  = sum_i z_i W_dec[i] + b_pre                         SAE.decode
    e  = u - û                                              the residual, detached in AuxK
    L  = |e|^2 / c  +  alpha |e - ê|^2 / var(e)             losses           sections 2.3, 2.4
    ê  = sum_i z'_i W_dec[i], z' = ReLU(TopK_{k_aux}) over the dead latents only

    d = d_model    n = n_latents    k = active latents a token    B = tokens in a batch    c = error of predicting the mean
    values, indices (B, k): the code z, sparse. The dense (B, n) matrix exists only a few tokens at a time and never in autograd.

Copied alone into another project, this file needs torch and nothing else.
"""

import argparse
import copy
import ctypes
import dataclasses
import datetime
import functools
import itertools
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels are for CUDA; without Triton their PyTorch twins do the work
    triton = None

# --------------------------------------------------------------------------------------------------
# The autoencoder.


def normalize(x):
    """x (..., d) -> u (..., d) with zero mean and unit norm, and the mean and norm (..., 1) that undo it: x = u * norm + mean.

    A vector with all coordinates equal gives u = 0, norm = 0.
    """
    mean = x.mean(-1, keepdim=True)
    centered = x - mean
    norm = centered.norm(dim=-1, keepdim=True)
    rounding = 4 * torch.finfo(x.dtype).eps * math.sqrt(x.shape[-1]) * mean.abs()  # what is left of a constant vector
    norm = torch.where(norm <= rounding, 0.0, norm)
    return torch.where(norm == 0, 0.0, centered / norm), mean, norm  # NaN stays NaN


class SAE(nn.Module):
    """TopK sparse autoencoder (section 2.3; the ReLU after TopK and the trained b_enc follow the authors' released code).

    Parameters: W_enc (n, d), b_enc (n), W_dec (n, d) with unit rows, b_pre (d). With k = n it is a plain ReLU autoencoder.
    `meta` (dict) says what it was trained on; `normalized` is False only for released autoencoders that take raw inputs.
    In a mesh with several shards each holds n / shards consecutive rows, and `indices` are numbers of its own rows.
    """

    def __init__(self, d_model, n_latents, k, mesh=None):
        super().__init__()
        if not 1 <= k <= n_latents:
            raise ValueError(f"k = {k} must be between 1 and n_latents = {n_latents}")
        self.d_model, self.n_latents, self.k, self.mesh = d_model, n_latents, k, mesh or ALONE
        own = self.mesh.part(n_latents)
        self.W_dec = nn.Parameter(random_directions(own, n_latents, d_model))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())  # tied at initialisation only
        self.b_enc = nn.Parameter(torch.zeros(len(own)))
        self.b_pre = nn.Parameter(torch.zeros(d_model))
        self.normalized, self.product_dtype, self.meta = True, None, {}

    def pre_acts(self, u):
        """u (..., d) -> pre-activations (..., n), dense."""
        return F.linear(u - self.b_pre, self.W_enc, self.b_enc)

    def encode(self, u, k=None):
        """u (B, d) -> values (B, k) >= 0 and indices (B, k) of the k largest pre-activations, unsorted. Differentiable in values.

        `k` at test time may differ from the one trained with. With k = n only as many columns come back as the batch needs.
        """
        return sparse_encode(u, self.W_enc, self.b_enc, self.b_pre, k or self.k, self.product_dtype, self.mesh)

    def decode(self, values, indices):
        """values, indices (B, k) -> û (B, d)."""
        return sum_shards(sparse_decode(values, indices, self.W_dec), self.mesh) + self.b_pre

    def forward(self, x, code=None):
        """x (..., d) in the model's own space -> its reconstruction there. `code`: another function than `encode`, u -> (values, indices)."""
        flat = x.reshape(-1, self.d_model).to(self.W_dec.dtype)
        u, mean, norm = normalize(flat) if self.normalized else (flat, 0.0, 1.0)
        return (self.decode(*(code or self.encode)(u)) * norm + mean).view(x.shape).to(x.dtype)

    @torch.no_grad()
    def init_from_data(self, u):
        """b_pre and the encoder's scale from normalised activations u (N, d), appendix A.

        b_pre is their geometric median; W_enc is scaled so that reconstructions of random unit vectors have unit norm.
        """
        self.b_pre.copy_(geometric_median(u))
        probe = F.normalize(torch.randn(256, self.d_model), dim=1).to(u) + self.b_pre
        self.W_enc /= (self.decode(*self.encode(probe)) - self.b_pre).norm(dim=1).mean()

    @torch.no_grad()
    def normalize_decoder(self):
        """Make every decoder row a unit vector."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    def save(self, path):
        """Write weights, k and meta to `path`, atomically."""
        own = {"d_model": self.d_model, "n_latents": self.n_latents, "k": self.k, "normalized": self.normalized, "meta": self.meta}
        save_atomic(path, {"sae": own, "state": {name: p.detach().cpu() for name, p in self.state_dict().items()}})

    @classmethod
    def load(cls, path, device="cpu"):
        """Read what `save` wrote, or a file of OpenAI's released autoencoders. Raises ValueError for anything else."""
        if not Path(path).exists():
            raise ValueError(f"no autoencoder at {path}; train one with: python sae.py --n_latents 32768 --k 32")
        saved = load_file(path)
        if "pre_bias" in saved:
            return cls.from_openai(saved).to(device)
        if "state" not in saved:
            raise ValueError(f"{path} is neither an autoencoder written by sae.py nor one of OpenAI's")
        own = saved["sae"]
        sae = cls(own["d_model"], own["n_latents"], own["k"])
        sae.load_state_dict(saved["state"])
        sae.normalized, sae.meta = own["normalized"], own["meta"]
        return sae.to(device)

    @classmethod
    def from_openai(cls, state):
        """OpenAI's released TopK or ReLU autoencoder (openai/sparse_autoencoder, model.py) as an SAE.

        Theirs divides by the unbiased standard deviation (+ 1e-5), so its inputs have norm s = sqrt(d - 1), ours norm 1:
        z is positively homogeneous in (u, biases), so biases are divided by s. The ReLU ones take raw inputs.
        """
        n, d = state["encoder.weight"].shape
        kind = state.get("activation", "ReLU")
        details = state.get("activation_state_dict", {})
        if kind not in ("TopK", "ReLU") or details.get("postact_fn", "ReLU") != "ReLU":
            raise ValueError(f"unknown activation {kind} {details}; TopK and ReLU are supported")
        sae = cls(d, n, details["k"] if kind == "TopK" else n)
        sae.normalized, s = kind == "TopK", math.sqrt(d - 1) if kind == "TopK" else 1.0
        weights = {"W_enc": state["encoder.weight"], "W_dec": state["decoder.weight"].T, "b_enc": state["latent_bias"] / s, "b_pre": state["pre_bias"] / s}
        sae.load_state_dict({name: w.float() for name, w in weights.items()})
        sae.meta = {"source": "openai"}
        return sae


def random_directions(rows, n, d, block=65536):
    """These rows (a range) of an (n, d) matrix of random unit vectors from torch's seed, the same however many processes share it."""
    seed, out = torch.randint(2**40, ()).item(), []
    for b in range(rows.start // block, math.ceil(rows.stop / block)):
        first = b * block
        drawn = torch.randn(min(block, n - first), d, generator=torch.Generator().manual_seed(seed + b))
        out.append(drawn[max(0, rows.start - first) : rows.stop - first])
    return F.normalize(torch.cat(out), dim=1)


@torch.no_grad()
def geometric_median(x, steps=100, tol=1e-6):
    """x (N, d) -> the point (d) that minimises the sum of Euclidean distances: Weiszfeld's iteration.

    Vardi and Zhang's (2000) correction keeps it from stalling when the estimate coincides with a data point.
    """
    y = x.mean(0)
    for _ in range(steps):
        distance = (x - y).norm(dim=1)
        away = distance > 1e-12 * (1 + y.norm())
        w = torch.where(away, 1 / distance.clamp_min(1e-30), 0.0)
        if not away.any():
            break
        target = w @ x / w.sum()
        pull = (w @ (x - y)).norm()  # the force of the other points, against that of the (~away).sum() points at y
        stay = ((~away).sum() / pull.clamp_min(1e-30)).clamp(max=1.0)
        new = (1 - stay) * target + stay * y
        moved, y = (new - y).norm(), new
        if moved <= tol * (distance.mean() + 1e-30):
            break
    return y


# --------------------------------------------------------------------------------------------------
# Loss.


def losses(sae, u, scale, dead=None, k_aux=0, dead_rows=None, multi_topk=False, l1=0.0):
    """u (B, d) -> (NMSE to minimise, AuxK's error |e - ê|^2, NMSE of the batch, values, indices, residual e, detached).

    The objective of section 2.4 is the first + alpha / var(e) times the second. var(e), a constant, is left to the caller, because
    it is over the whole batch, of which u may be a part (see `auxk_weight`).

    scale: MSE of predicting the mean activation, one constant per run. dead (n_dead): numbers of dead latents, k_aux: how many of them
    AuxK uses, dead_rows: W_enc[dead], b_enc[dead], W_dec[dead], which alone get its gradient. Multi-TopK (section 5.3): L(k) + L(4k) / 8.
    l1: the ReLU baseline (section 2.2) instead, NMSE + l1 |z|_1, computed densely since any number of latents may be active.
    """
    if l1:
        values = F.relu(sae.pre_acts(u))  # (B, n)
        e = u - values @ sae.W_dec - sae.b_pre
        nmse = e.square().mean() / scale
        indices = torch.arange(sae.n_latents, device=u.device).expand_as(values)
        return nmse + l1 * values.sum(1).mean(), u.new_zeros(()), nmse.detach(), values.detach(), indices, e.detach()
    weights, mesh = (sae.W_enc, sae.b_enc, sae.b_pre), sae.mesh
    k = min(4 * sae.k, sae.n_latents) if multi_topk else sae.k
    code, dead_code = select(u, *weights, k, sae.product_dtype, mesh, dead, k_aux)
    values, indices = encode_selected(u, *weights, *code, mesh)
    loss = 0.0
    if multi_topk:
        loss = (u - sae.decode(values, indices)).square().mean() / scale / 8
        best = topk(values.detach(), min(sae.k, values.shape[1]))[1]
        values, indices = values.gather(1, best), indices.gather(1, best)
        values = values * (keep_global(values.detach(), sae.k, mesh) > 0)
    e = u - sae.decode(values, indices)
    nmse = e.square().mean() / scale
    aux, e = u.new_zeros(()), e.detach()
    if k_aux:
        e_hat = torch.zeros_like(u)
        if len(dead):  # another shard may have some
            e_hat = sparse_decode(*encode_selected(u, *dead_rows[:2], sae.b_pre.detach(), *dead_code, mesh), dead_rows[2])
        aux = (e - sum_shards(e_hat, mesh)).square().mean()
    return loss + nmse, aux, nmse.detach(), values.detach(), indices, e


def moments(e):
    """e (B, d) -> (d + 2): means of the columns, their squared norm, mean square about them. Averaged over the equal parts of a batch, they
    give its variance, without the cancellation of a mean of squares less a square of means."""
    mean = e.mean(0)
    return torch.cat([mean.double(), mean.double().square().sum()[None], (e - mean).square().mean().double()[None]])


def auxk_weight(moments, dtype):
    """1 / var(e) of appendix A, from averaged `moments`; exactly 0 for a residual that is constant up to the rounding of `dtype`."""
    mean, squared_means, within = moments[:-2], moments[-2], moments[-1]
    variance = within + (squared_means - mean.square().sum()) / len(mean)
    rounding = (100 * torch.finfo(dtype).eps) ** 2 / len(mean)  # the mean square of u is 1 / d
    return torch.where(variance > rounding, 1 / variance.clamp_min(1e-300), 0.0).to(dtype)


# --------------------------------------------------------------------------------------------------
# Selection.


def fused(x):
    """Whether the Triton kernels take x: floats on CUDA, short of double precision."""
    return triton is not None and x.is_cuda and x.dtype != torch.float64


def topk(x, k):
    """x (..., n) -> values and indices (..., k) of the k largest entries of each row: exact, unsorted, like torch.topk but faster."""
    n = x.shape[-1]
    if fused(x) and k < n and k * n <= 2**28:  # about sqrt(k n) numbers are searched at once
        values, indices = topk_kernel(x.reshape(-1, n), k)
    else:
        values, indices = topk_twin(x.reshape(-1, n), k)
    return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)


def topk_twin(x, k, group=64):
    """x (B, n) -> values, indices (B, k). The k largest entries lie in the k groups with the largest maxima. One streaming pass
    finds the maxima; what is left is small, and is searched the same way with smaller groups."""
    n = x.shape[1]
    while group > 4 and (n % group or n < 4 * k * group):
        group //= 2
    if group <= 4:
        return x.topk(k, dim=-1, sorted=False)
    rows = x.reshape(-1, n // group, group)
    # bf16 orders like its bits, read as an integer, as long as it is not negative. Integer maxima are seven times faster on CPU.
    as_bits = x.dtype == torch.bfloat16 and not x.is_cuda
    maxima = rows.view(torch.int16).amax(-1).view(x.dtype) if as_bits else rows.amax(-1)  # (B, n / group)
    best, groups = maxima.topk(k, sorted=False)
    start = torch.arange(len(rows), device=x.device)[:, None] * (n // group)
    candidates = rows.view(-1, group).index_select(0, (groups + start).flatten()).view(len(rows), k * group)
    values, j = topk_twin(candidates, k, group // 8)
    indices = groups.gather(1, j // group) * group + j % group
    if as_bits and (unsure := (best < 0).any(1)).any():  # fewer than k groups with a maximum of at least zero
        values[unsure], indices[unsure] = x[unsure].topk(k, sorted=False)
    return values, indices


# --------------------------------------------------------------------------------------------------
# Sparse linear algebra: three operations. Nothing of size (B, k, d) is ever made. Each has a Triton kernel for CUDA and a twin in
# plain PyTorch with the same signature for everything else. Where the code is not so sparse (AuxK with few dead latents), a
# dense product is faster than moving k rows a token.

NARROW = {"cpu": 3, "cuda": 16}  # dense if n is at most so many times k


def narrow(indices, n):
    return n <= NARROW[indices.device.type] * indices.shape[1]


def densify(values, indices, n):
    """The code as a dense matrix: (B, k), (B, k) -> (B, n)."""
    return values.new_zeros(len(values), n).scatter_add_(1, indices, values)


def gather_sum(values, indices, W):
    """out[b] = sum_j values[b, j] W[indices[b, j]]: (B, k), (B, k), (n, d) -> (B, d)."""
    if narrow(indices, len(W)):
        return densify(values, indices, len(W)) @ W
    return (gather_sum_kernel if fused(W) else gather_sum_twin)(values, indices, W)


def gather_dot(G, W, indices):
    """out[b, j] = G[b] . W[indices[b, j]]: (B, d), (n, d), (B, k) -> (B, k)."""
    if narrow(indices, len(W)):
        return (G @ W.T).gather(1, indices)
    return (gather_dot_kernel if fused(W) else gather_dot_twin)(G.contiguous(), W, indices)


def scatter_sum(values, indices, G, n):
    """out[i] = sum of values[b, j] G[b] over all indices[b, j] = i: (B, k), (B, k), (B, d) -> (n, d).

    Pairs are sorted by latent, so that each output row is one run of them: no atomics, the same bits every time.
    """
    if narrow(indices, n):
        return densify(values, indices, n).T @ G
    return (scatter_sum_kernel if fused(G) else scatter_sum_twin)(values.flatten(), *by_latent(indices, n), G.contiguous(), indices.shape[1])


def by_latent(indices, n):
    """indices (B, k) -> the B k pairs sorted by latent: order (B k), their numbers, and starts (n + 1), where each latent's begin.

    Kept on the tensor, because a step needs the same order for both weight gradients.
    """
    if getattr(indices, "by_latent", (None,))[0] != n:
        latents, order = indices.flatten().sort(stable=True)
        indices.by_latent = n, order, torch.searchsorted(latents, torch.arange(n + 1, device=indices.device))
    return indices.by_latent[1:]


def gather_sum_twin(values, indices, W):
    return F.embedding_bag(indices, W, per_sample_weights=values, mode="sum")


def gather_dot_twin(G, W, indices):
    B, k = indices.shape
    starts = torch.arange(0, B * k, k, device=G.device)
    bag = torch.arange(B, device=G.device).repeat_interleave(k)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(G, W, indices.flatten(), starts, bag, 0).view(B, k)


def scatter_sum_twin(values, order, starts, G, k):
    return F.embedding_bag(order // k, G, starts[:-1], per_sample_weights=values[order], mode="sum")


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, W_dec):
        ctx.save_for_backward(values, W_dec)
        ctx.indices = indices
        return gather_sum(values, indices, W_dec)

    @staticmethod
    def backward(ctx, g):
        values, W_dec = ctx.saved_tensors
        d_values = gather_dot(g, W_dec, ctx.indices) if ctx.needs_input_grad[0] else None
        d_W_dec = scatter_sum(values, ctx.indices, g, len(W_dec)) if ctx.needs_input_grad[2] else None
        return d_values, None, d_W_dec


def sparse_decode(values, indices, W_dec):
    """sum_j values[b, j] W_dec[indices[b, j]]: (B, k), (B, k), (n, d) -> (B, d). Differentiable in values and W_dec."""
    return _SparseDecode.apply(values, indices, W_dec)


DENSE = {"cpu": 2**24, "cuda": 2**29}  # dense pre-activations that may exist at once: 32 MB and 1 GB in bf16


@torch.no_grad()
def select(u, W_enc, b_enc, b_pre, k, dtype=None, mesh=None, dead=None, k_aux=0):
    """The one dense product. Returns the code (values, indices), each (B, k), of the k largest pre-activations, and with k_aux > 0 another
    of the k_aux largest among `dead` (n_dead), numbered by their places there. dtype: precision of the product (default: the weights')."""
    dtype, n, mesh = dtype or W_enc.dtype, len(W_enc), mesh or ALONE
    # Rows that are never selected make the number of columns a multiple of 64, as topk likes it.
    W, b = W_enc.to(dtype), b_enc.to(dtype)
    if n % 64:
        W, b = F.pad(W, (0, 0, 0, -n % 64)), F.pad(b, (0, -n % 64), value=-math.inf)
    n_dead = len(dead) if k_aux else 0
    if 8 * n_dead > n:
        lowest, highest = torch.zeros_like(b), torch.zeros_like(b).index_fill_(0, dead, math.inf)
        place = torch.zeros(len(b), dtype=torch.long, device=u.device).index_copy_(0, dead, torch.arange(n_dead, device=u.device))
    codes, dead_codes = [], []
    for v in (u - b_pre).to(dtype).split(max(1, DENSE[u.device.type] // n)):
        pre_acts = F.linear(v, W, b)  # (chunk, d) @ (d, n) -> (chunk, n)
        active = min(k, n) if k < n or mesh.shards > 1 else max(1, int((pre_acts > 0).sum(1).max()))  # k = n: ReLU, as wide as it needs to be
        codes.append(topk(pre_acts, active))
        if 8 * n_dead > n:
            values, j = topk(pre_acts.clamp_(lowest, highest), min(k_aux, n_dead))  # ReLU first: most are negative, which topk likes less
            dead_codes.append((values, place[j]))
        elif n_dead:
            dead_codes.append(topk(pre_acts.index_select(1, dead).relu_(), min(k_aux, n_dead)))
        del pre_acts  # before the next ones are made
    values, indices = _join(codes, n)
    code = keep_global(values, k, mesh).relu().to(u.dtype), indices
    if not k_aux:
        return code, None
    values, indices = _join(dead_codes, n_dead) if n_dead else (u.new_empty(len(u), 0, dtype=dtype), indices[:, :0])
    if mesh.shards > 1:  # as wide everywhere
        values, indices = F.pad(values, (0, k_aux - values.shape[1]), value=-math.inf), F.pad(indices, (0, k_aux - indices.shape[1]))
    return code, (keep_global(values, k_aux, mesh).relu().to(u.dtype), indices)


def _join(codes, n):
    """Codes of consecutive chunks, which may differ in width -> values, indices (B, k)."""
    width = max(values.shape[1] for values, _ in codes)
    values, indices = (torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts]) for parts in zip(*codes))
    return values, indices.clamp(max=n - 1)  # only a row of NaN selects a column beyond n


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, W_enc, b_enc, b_pre, values, indices, mesh):
        ctx.save_for_backward(u, W_enc, b_pre, values)
        ctx.indices, ctx.mesh = indices, mesh  # as they are, because they keep their order by latent
        return values.view_as(values)

    @staticmethod
    def backward(ctx, g):
        u, W_enc, b_pre, values = ctx.saved_tensors
        n, indices, mesh = len(W_enc), ctx.indices, ctx.mesh
        g = g * (values > 0)  # ReLU
        d_b_enc = scatter_sum(g, indices, torch.ones_like(u[:, :1]), n)[:, 0]
        d_b_pre = mesh.sum(-(d_b_enc @ W_enc), "shard") if ctx.needs_input_grad[3] else None  # summed over the batch first, then one product
        d_W_enc = scatter_sum(g, indices, u - b_pre, n) if ctx.needs_input_grad[1] else None
        d_u = mesh.sum(gather_sum(g, indices, W_enc), "shard") if ctx.needs_input_grad[0] else None
        return d_u, d_W_enc, d_b_enc, d_b_pre, None, None, None


def encode_selected(u, W_enc, b_enc, b_pre, values, indices, mesh=None):
    """What `select` found -> the same values and indices, differentiable in values with respect to u, W_enc, b_enc and b_pre."""
    return _Encode.apply(u, W_enc, b_enc, b_pre, values, indices, mesh or ALONE), indices


def sparse_encode(u, W_enc, b_enc, b_pre, k, dtype=None, mesh=None):
    """ReLU(TopK(W_enc (u - b_pre) + b_enc)) as values, indices (B, k). Differentiable in values with respect to all four tensors.

    u (B, d), W_enc (n, d), b_enc (n), b_pre (d). dtype: precision of the product (default: the weights'); the rest stays in the weights'.
    """
    return encode_selected(u, W_enc, b_enc, b_pre, *select(u, W_enc, b_enc, b_pre, k, dtype, mesh)[0], mesh)


# --------------------------------------------------------------------------------------------------
# The Triton kernels behind topk and the three operations, each equal to its twin above. TRITON_INTERPRET=1 runs them on CPU.

if triton:

    @triton.jit
    def _topk(x, out_values, out_indices, maxima, chosen, n, k, m, BITS: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr, K: tl.constexpr):
        """One program a row: maxima of groups; the k groups with the largest; the k largest of their entries."""
        row = tl.program_id(0).to(tl.int64)
        x, maxima, chosen = x + row * n, maxima + row * m, chosen + row * k
        for start in range(0, m, STEP):
            g = start + tl.arange(0, STEP)
            at = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            tl.store(maxima + g, tl.max(_sortable(tl.load(x + at, mask=at < n, other=float("-inf")), BITS), axis=1), mask=g < m)
        tl.debug_barrier()
        g = tl.arange(0, M)
        take, place = _largest(tl.load(maxima + g, mask=g < m, other=0), g < m, k, BITS)
        tl.store(chosen + place, g, mask=take)
        tl.debug_barrier()
        j = tl.arange(0, K)
        groups = tl.load(chosen + j, mask=j < k, other=0)
        at = tl.reshape(groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :], (K * GROUP,))
        real = (tl.reshape(tl.broadcast_to(j[:, None], (K, GROUP)), (K * GROUP,)) < k) & (at < n)
        values = tl.load(x + at, mask=real, other=float("-inf"))
        take, place = _largest(_sortable(values, BITS), real, k, BITS)
        tl.store(out_values + row * k + place, values, mask=take)
        tl.store(out_indices + row * k + place, at.to(tl.int64), mask=take)

    @triton.jit
    def _sortable(x, BITS: tl.constexpr):
        """Floats -> integers in the same order, positive NaN highest: BITS = 16 for bf16, whose lower half is empty, 32 for fp32."""
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - BITS)

    @triton.jit
    def _largest(keys, real, k, BITS: tl.constexpr):
        """Which k of the keys (a block, at least k of them real) are the largest, ties to the first, and each one's place among them."""
        least = tl.full([], -(1 << (BITS - 1)), tl.int64)  # becomes the k-th largest, bit by bit
        for i in tl.static_range(BITS):
            higher = least + (1 << (BITS - 1 - i))
            least = tl.where(tl.sum((real & (keys >= higher.to(tl.int32))).to(tl.int32)) >= k, higher, least)
        above, tied = real & (keys > least.to(tl.int32)), real & (keys == least.to(tl.int32))
        take = above | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= k - tl.sum(above.to(tl.int32))))
        return take, tl.cumsum(take.to(tl.int32), axis=0) - 1

    @triton.jit
    def _gather_sum(values, indices, W, out, d, k, J: tl.constexpr, D: tl.constexpr):
        b, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * D + tl.arange(0, D)
        total = tl.zeros([D], tl.float32)
        for start in range(0, k, J):
            j = start + tl.arange(0, J)
            v = tl.load(values + b * k + j, mask=j < k, other=0.0)
            i = tl.load(indices + b * k + j, mask=j < k, other=0)
            w = tl.load(W + i[:, None] * d + col[None, :], mask=(v != 0)[:, None] & (col < d)[None, :], other=0.0)  # (J, D)
            total += tl.sum(v[:, None] * w, axis=0)
        tl.store(out + b * d + col, total, mask=col < d)

    @triton.jit
    def _gather_dot(G, W, indices, out, d, k, J: tl.constexpr, D: tl.constexpr):
        b, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * J + tl.arange(0, J)
        i = tl.load(indices + b * k + j, mask=j < k, other=0)
        total = tl.zeros([J], tl.float32)
        for start in range(0, d, D):
            col = start + tl.arange(0, D)
            g = tl.load(G + b * d + col, mask=col < d, other=0.0)
            w = tl.load(W + i[:, None] * d + col[None, :], mask=(j < k)[:, None] & (col < d)[None, :], other=0.0)  # (J, D)
            total += tl.sum(w * g[None, :], axis=1)
        tl.store(out + b * k + j, total, mask=j < k)

    @triton.jit
    def _scatter_sum(values, order, starts, pieces, latent_of, G, out, parts, n, d, k, PIECE: tl.constexpr, J: tl.constexpr, D: tl.constexpr):
        """One program a piece: at most PIECE pairs of one latent. Its first piece goes to `out`, the others to `parts`."""
        piece, col = tl.program_id(0), tl.program_id(1) * D + tl.arange(0, D)
        i = tl.load(latent_of + piece).to(tl.int64)
        if i < n:
            first = tl.load(pieces + i)
            start = tl.load(starts + i) + (piece - first) * PIECE
            stop = tl.minimum(start + PIECE, tl.load(starts + i + 1))
            total = tl.zeros([D], tl.float32)
            for p in range(start, stop, J):
                at = p + tl.arange(0, J)
                pair = tl.load(order + at, mask=at < stop, other=0)
                v = tl.load(values + pair, mask=at < stop, other=0.0)
                g = tl.load(G + (pair // k)[:, None] * d + col[None, :], mask=(v != 0)[:, None] & (col < d)[None, :], other=0.0)  # (J, D)
                total += tl.sum(v[:, None] * g, axis=0)
            if piece == first:
                tl.store(out + i * d + col, total, mask=col < d)
            else:
                tl.store(parts + (piece - i - 1) * d + col, total, mask=col < d)

    @triton.jit
    def _sum_parts(pieces, out, parts, d, D: tl.constexpr):
        """One program a latent: adds up the parts of one with several pieces."""
        i, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * D + tl.arange(0, D)
        first, end = tl.load(pieces + i), tl.load(pieces + i + 1)
        if end - first > 1:
            total = tl.load(out + i * d + col, mask=col < d, other=0.0)
            for piece in range(first + 1, end):
                total += tl.load(parts + (piece - i - 1) * d + col, mask=col < d, other=0.0)
            tl.store(out + i * d + col, total, mask=col < d)


def on_its_device(launch):
    """Triton launches on the current device: make that the first argument's."""

    @functools.wraps(launch)
    def launch_there(x, *args, **kwargs):
        with torch.cuda.device_of(x):
            return launch(x, *args, **kwargs)

    return launch_there


@on_its_device
def topk_kernel(x, k):
    B, n = x.shape
    group = 2 ** int(math.log2(n / k) / 2)  # as many groups as numbers in k groups, so that both searches are as small as can be
    m = triton.cdiv(n, group)
    x, M, K = x.contiguous(), triton.next_power_of_2(m), triton.next_power_of_2(k)
    values, indices = x.new_empty(B, k), torch.empty(B, k, dtype=torch.long, device=x.device)
    maxima, chosen = torch.empty(B, m, dtype=torch.int32, device=x.device), torch.empty(B, k, dtype=torch.int32, device=x.device)
    warps = min(16, max(4, max(M, K * group) // 512))  # more numbers a thread than 32 would spill
    bits = 16 if x.dtype == torch.bfloat16 else 32
    _topk[(B,)](x, values, indices, maxima, chosen, n, k, m, BITS=bits, GROUP=group, STEP=min(M, 4096 // group), M=M, K=K, num_warps=warps)
    return values, indices


@on_its_device
def gather_sum_kernel(values, indices, W):
    (B, k), d = indices.shape, W.shape[1]
    out = W.new_empty(B, d)
    _gather_sum[(B, triton.cdiv(d, 256))](values.contiguous(), indices.contiguous(), W.contiguous(), out, d, k, J=8, D=256)
    return out


@on_its_device
def gather_dot_kernel(G, W, indices):
    (B, k), d = indices.shape, W.shape[1]
    out = W.new_empty(B, k)
    _gather_dot[(B, triton.cdiv(k, 8))](G, W.contiguous(), indices.contiguous(), out, d, k, J=8, D=256)
    return out


@on_its_device
def scatter_sum_kernel(values, order, starts, G, k, piece=128):
    n, d = len(starts) - 1, G.shape[1]
    # A dense latent may have thousands of pairs, a rare one none: work is cut into pieces of equal size, at least one a latent.
    pieces = F.pad(((starts.diff() + piece - 1) // piece).clamp_min(1).cumsum(0), (1, 0))  # (n + 1), where each latent's begin
    spare = len(order) // piece  # at most so many more pieces than latents, so nothing waits for their true number
    latent_of = torch.searchsorted(pieces, torch.arange(n + spare, device=G.device), right=True) - 1
    out, parts = G.new_empty(n, d), G.new_empty(spare, d)
    J, D = (8, 256) if d > 1 else (128, 1)  # one column: the gradient of b_enc
    columns = triton.cdiv(d, D)
    _scatter_sum[(n + spare, columns)](values.contiguous(), order, starts, pieces, latent_of, G, out, parts, n, d, k, PIECE=piece, J=J, D=D)
    _sum_parts[(n, columns)](pieces, out, parts, d, D=D)
    return out


# --------------------------------------------------------------------------------------------------
# Many processes: replicas, each with its own part of every batch, times shards, each with its own part of the latents (the paper's
# data and latent sharding). Alone, every function below returns its argument, so that the algorithm reads the same.


class Mesh:
    """Where this process stands among replicas x shards, and how it talks to the others."""

    shards, shard, replicas, replica, groups = 1, 0, 1, 0, {}

    @classmethod
    def join(cls, shards=1, device="cpu"):
        """The mesh of the processes that torchrun started (without torchrun: just this one). Raises ValueError if they do not divide."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        if world % shards:
            raise ValueError(f"{world} process{'es' * (world > 1)} cannot be cut into {shards} shards; start a multiple: torchrun --nproc_per_node {shards} sae.py ...")
        mesh, kind = cls(), "cuda" if device.startswith("cuda") else "cpu"
        if "WORLD_SIZE" in os.environ:
            if kind == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            if not dist.is_initialized():
                timeout = datetime.timedelta(minutes=10)
                store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
                if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun restarts on one machine reuse its store: see pytorch/pytorch#135712
                    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
                dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=world, timeout=timeout)
            grid = dist.device_mesh.init_device_mesh(kind, (world // shards, shards), mesh_dim_names=("replica", "shard"))
            (mesh.replicas, mesh.shards), (mesh.replica, mesh.shard) = grid.shape, grid.get_coordinate()
            mesh.groups = {"replica": grid.get_group("replica"), "shard": grid.get_group("shard"), "world": dist.group.WORLD}
        return mesh

    @property
    def first(self):
        """Whether this is the process that writes and speaks for all."""
        return self.shard == self.replica == 0

    def part(self, n):
        """The range of this shard's latents among n. Raises ValueError if n does not divide."""
        if n % self.shards:
            raise ValueError(f"n_latents = {n} must be a multiple of --shards {self.shards}")
        return range(self.shard * n // self.shards, (self.shard + 1) * n // self.shards)

    def sum(self, x, over, wait=True):
        """x, summed in place over "shard", "replica" or "world". The same bits everywhere. wait=False: returns what to wait() for."""
        if not self.groups:
            return x
        work = dist.all_reduce(x, group=self.groups[over], async_op=not wait)
        return x if wait else work

    def least(self, x):
        """x, in place its minimum over the replicas."""
        if self.groups:
            dist.all_reduce(x, dist.ReduceOp.MIN, group=self.groups["replica"])
        return x

    def gather(self, x):
        """(B, k) of each shard -> (B, shards k), the same on all."""
        if self.shards == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.shards)]
        dist.all_gather(parts, x.contiguous(), group=self.groups["shard"])
        return torch.cat(parts, 1)

    def agree(self, x):
        """Any small object of the first process, on all."""
        if self.groups:
            dist.broadcast_object_list(box := [x], src=0)
            return box[0]
        return x

    def share(self, x, over, shape, device):
        """The tensor (float32) that the first process of "shard" or "world" holds, on all; the others may pass None."""
        if not self.groups:
            return x
        src = dist.get_global_rank(self.groups[over], 0)
        x = x.to(device, torch.float32).contiguous() if dist.get_rank() == src else torch.empty(shape, device=device)
        dist.broadcast(x, src, group=self.groups[over])
        return x

    def follow(self, stream, shape, device):
        """The stream of a replica's first shard, on all its shards."""
        if not self.groups:
            yield from stream
        for x in stream or itertools.repeat(None):
            yield self.share(x, "shard", shape, device)

    def wait(self):
        """Until all are here."""
        if self.groups:
            self.sum(torch.zeros((), device="cuda" if dist.get_backend() == "nccl" else "cpu"), "world").item()

    def leave(self):
        if self.groups:
            dist.destroy_process_group()

    def __deepcopy__(self, memo):
        return self


ALONE = Mesh()


class _SumShards(torch.autograd.Function):
    """Every shard goes on with the same sum, so the gradient of each term is the gradient of the sum."""

    @staticmethod
    def forward(ctx, x, mesh):
        ctx.mark_dirty(x)
        return mesh.sum(x, "shard")

    @staticmethod
    def backward(ctx, g):
        return g, None


def sum_shards(x, mesh):
    """x, summed over the shards; differentiable."""
    return x if mesh.shards == 1 else _SumShards.apply(x, mesh)


def keep_global(values, k, mesh):
    """Every shard's own largest values (B, width) -> those among the k largest of all shards; the others become 0.

    All shards select from the same numbers with the same code, so that ties break the same way and exactly k survive.
    """
    if mesh.shards == 1:
        return values
    everyone = mesh.gather(values)  # (B, shards * width)
    kept = torch.zeros_like(everyone, dtype=torch.bool).scatter_(1, topk(everyone, min(k, everyone.shape[1]))[1], True)
    return torch.where(kept.split(values.shape[1], 1)[mesh.shard], values, 0.0)


# --------------------------------------------------------------------------------------------------
# Configuration: the fields are the command line. 0 means: chosen for the device and the amount of data (see `resolve`).


def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    n_latents: int = option(32768, "latents n")
    k: int = option(32, "active latents a token")
    acts: str = option("acts", "harvested activations; if there are none there, they are made")
    out: str = option("", "run directory; default runs/n{n_latents}_k{k}, with _multi for --multi_topk; or _l1_{l1}")
    model: str = option("auto", "subject model when activations must be made: auto, gpt2, ..., stdlib, or a path")
    text: str = option("", "text when activations must be made; default: what the model was trained on")
    stream: bool = option(False, "run the model while training instead of reading --acts (default on CUDA when --acts is missing)")
    tokens: int = option(0, "training tokens, counted over epochs; 0: all of --acts once, or 400 M when streaming")
    batch: int = option(0, "tokens a step")
    lr: float = option(0.0, "Adam's learning rate, constant")
    k_aux: int = option(0, "dead latents used by AuxK; 0: the power of two at or below d/2")
    aux_coef: float = option(1 / 32, "weight of AuxK; 0 turns it off")
    dead_tokens: int = option(0, "a latent is dead when silent for so many tokens")
    ema: float = option(0.0, "decay of the weights' moving average")
    clip: float = option(0.0, "clip the gradient norm to this; 0: no clipping, as in the paper for GPT-2 small")
    accumulate: int = option(1, "parts in which a batch is worked through, to save memory; the result stays the same")
    shards: int = option(1, "under torchrun: processes that share the latents; the others work on their own part of the batch")
    multi_topk: bool = option(False, "Multi-TopK loss L(k) + L(4k)/8: a code that is good at many test-time k")
    l1: float = option(0.0, "train the ReLU baseline with this L1 penalty instead; --k and AuxK do not apply")
    precision: str = option("", "encoder product: bf16 or fp32; default: bf16 where the hardware has it")
    seed: int = option(0, "seed of initialisation and data order")
    device: str = option("", "cuda or cpu; default: cuda if there")
    minutes: float = option(5.0, "minutes between checkpoints")
    resume: bool = option(False, "continue the run in --out from its last checkpoint, bit-exactly on CPU; under torchrun: or begin")


PAPER_BATCH = 131_072


def resolve(cfg, d_model, tokens):
    """Fill in the fields left at 0 (see README, "Defaults"). Returns a new Config. Raises ValueError for impossible ones."""
    c = dataclasses.replace(cfg)
    c.out = c.out or f"runs/n{c.n_latents}_" + (f"l1_{c.l1:g}" if c.l1 else f"k{c.k}" + "_multi" * c.multi_topk)
    if c.l1 < 0 or c.l1 and c.multi_topk:
        raise ValueError(f"--l1 {c.l1:g} must be positive, and goes without --multi_topk")
    if c.l1:
        c.k, c.aux_coef = c.n_latents, 0.0
    if c.accumulate < 1:
        raise ValueError(f"--accumulate {c.accumulate} must be at least 1")
    if c.shards < 1 or c.shards > 1 and c.k == c.n_latents:
        raise ValueError(f"--shards {c.shards} must be positive, and goes with TopK only (k < n_latents, no --l1)")
    if not 1 <= c.k <= c.n_latents:
        raise ValueError(f"k = {c.k} must be between 1 and n_latents = {c.n_latents}")
    c.device = c.device or ("cuda" if torch.cuda.is_available() else "cpu")
    c.tokens = c.tokens or tokens
    c.batch = c.batch or min(PAPER_BATCH, max(1024, 2 ** round(math.log2(max(c.tokens, 1) / 2000))), max(1024, 2**29 // c.n_latents) if c.l1 else PAPER_BATCH)
    steps = c.tokens // c.batch if c.batch > 0 else 0
    if steps < 1:
        raise ValueError(f"{c.tokens:,} tokens are less than one batch of {c.batch:,}; lower --batch or harvest more")
    paper_lr = 1e-4 * math.sqrt(32768 / c.n_latents)
    c.lr = c.lr or max(paper_lr, min(2e-3, paper_lr * 20_000 / steps))
    c.k_aux = c.k_aux or 2 ** int(math.log2(max(2, d_model // 2)))
    c.dead_tokens = c.dead_tokens or min(10_000_000, max(c.tokens // 100, c.batch))
    c.ema = c.ema or min(0.999, 1 - 1 / max(2, 0.07 * steps))
    fast = c.device.startswith("cuda") or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    c.precision = c.precision or ("bf16" if fast else "fp32")
    if c.precision not in ("bf16", "fp32"):
        raise ValueError(f"--precision {c.precision}: choose bf16 or fp32")
    return c


# --------------------------------------------------------------------------------------------------
# Training.


class Trainer:
    """Everything that a training step reads and writes: weights, Adam, EMA, dead counters. `state()` is the checkpoint.

    sae: an initialised SAE on its device. scale: MSE of predicting the mean (normalised) activation.
    """

    def __init__(self, cfg, sae, scale):
        self.cfg, self.sae, self.scale, self.steps = cfg, sae, scale, 0
        sae.product_dtype = torch.bfloat16 if cfg.precision == "bf16" else None
        if cfg.precision == "bf16" and sae.W_dec.is_cuda:
            torch.set_float32_matmul_precision("high")  # TF32 for AuxK's dense products
        self.params = list(sae.parameters())
        self.adam = torch.optim.Adam(self.params, lr=cfg.lr, betas=(0.9, 0.999), eps=6.25e-10, fused=True)
        self.ema = [torch.zeros_like(p) for p in self.params]
        self.silent = torch.zeros(len(sae.W_dec), dtype=torch.long, device=sae.W_dec.device)  # tokens since each latent fired
        self.n_dead = self.own_dead = 0  # in all shards, in this one
        self.last, self.sums = False, []  # gradients are summed over the replicas while the backward pass goes on
        if sae.mesh.groups:
            for p in self.params:
                p.register_post_accumulate_grad_hook(self.sum_gradient)

    def sum_gradient(self, p):
        if self.last:
            self.sums.append(self.sae.mesh.sum(p.grad, "replica", wait=False))

    def step(self, x, stop=False, save=False):
        """One optimizer step on this replica's part of the batch: raw activations x (B / replicas, d).

        Returns a dict: nmse, l0, dead, and whether any process wants to stop or save, which all learn at the same step.
        """
        cfg, sae, mesh = self.cfg, self.sae, self.sae.mesh
        if x.shape[1] != sae.d_model:
            raise ValueError(f"these activations have width {x.shape[1]}, the autoencoder {sae.d_model}")
        if len(x) % cfg.accumulate:
            raise ValueError(f"--accumulate {cfg.accumulate} does not divide the {len(x)} tokens of a process")
        k_aux = min(cfg.k_aux, self.n_dead) if cfg.aux_coef else 0
        dead = (self.silent > cfg.dead_tokens).int().argsort(descending=True, stable=True)[: self.own_dead * bool(k_aux)]
        dead_rows = [p.detach()[dead].requires_grad_() for p in (sae.W_enc, sae.b_enc, sae.W_dec)]  # AuxK's gradient waits here for var(e)
        share, silent, total = 1 / (cfg.accumulate * mesh.replicas), self.silent + len(x) * mesh.replicas, 0.0
        self.adam.zero_grad()
        for i, piece in enumerate(x.chunk(cfg.accumulate), 1):
            u = normalize(piece.to(sae.W_dec.device, sae.W_dec.dtype))[0]
            loss, aux, nmse, values, indices, e = losses(sae, u, self.scale, dead, k_aux, dead_rows, cfg.multi_topk, cfg.l1)
            silent = silent.scatter_reduce(0, indices.flatten(), torch.where(values > 0, 0, torch.iinfo(torch.long).max).flatten(), "amin")
            l0 = (values > 0).sum(1).float().mean() * mesh.shards
            total = total + share / mesh.shards * torch.cat([torch.stack([(loss + aux).detach(), nmse, l0]).double(), moments(e)])
            self.last = i == cfg.accumulate
            if self.last:
                mesh.least(silent)
                own_dead = (silent > cfg.dead_tokens).sum().double()[None]
                flags = [total.new_full((1,), float(flag)) for flag in (stop, save)]
                total = mesh.sum(torch.cat([own_dead / mesh.replicas, *flags, total]), "world")
                known = peek(torch.cat([own_dead, total[:4]]))
            ((loss + aux) * share).backward()
        own_dead, n_dead, stop, save, value = known()  # of the forward pass, while a GPU is still busy with the backward one
        for work in self.sums:
            work.wait()
        self.sums.clear()
        if not math.isfinite(value):
            raise ValueError(f"the loss is {value} at step {self.steps + 1}; lower --lr (now {cfg.lr:g}) or look for bad activations")
        if len(dead):
            weight = cfg.aux_coef * auxk_weight(total[6:], sae.W_dec.dtype)
            for p, rows in zip((sae.W_enc, sae.b_enc, sae.W_dec), dead_rows):
                p.grad.index_add_(0, dead, mesh.sum(rows.grad, "replica") * weight)
        self.silent, self.own_dead, self.n_dead = silent, int(own_dead), round(n_dead)
        self.update()
        self.steps += 1
        return {"nmse": total[4], "l0": total[5], "dead": self.n_dead, "stop": stop > 0, "save": save > 0}

    @torch.no_grad()
    def update(self):
        """From gradients to weights and their average. Decoder rows stay on the unit sphere: drop the radial part of their gradient,
        step, renormalise."""
        for g, W in zip(self.sae.W_dec.grad.split(4096), self.sae.W_dec.split(4096)):  # in pieces: no temporary as large as the decoder
            g.addcmul_(torch.linalg.vecdot(g, W)[:, None], W, value=-1)
        if self.cfg.clip:
            own = nn.utils.get_total_norm([p.grad for p in self.params if p is not self.sae.b_pre])
            norm = (self.sae.mesh.sum(own.square(), "shard") + self.sae.b_pre.grad.norm().square()).sqrt()
            nn.utils.clip_grads_with_norm_(self.params, self.cfg.clip, norm)
        self.adam.step()
        self.sae.normalize_decoder()
        torch._foreach_lerp_(self.ema, self.params, 1 - self.cfg.ema)

    @torch.no_grad()
    def averaged(self):
        """The EMA weights, bias-corrected as Adam corrects its moments (appendix A), as an SAE with unit decoder rows."""
        sae = copy.deepcopy(self.sae)
        for p, average in zip(sae.parameters(), self.ema):
            p.copy_(average / (1 - self.cfg.ema**self.steps))
        sae.normalize_decoder()
        return sae

    def state(self):
        """What this shard owns, for a checkpoint."""
        tensors, mesh = {"silent": self.silent.cpu()}, self.sae.mesh
        for (name, p), average in zip(self.sae.named_parameters(), self.ema):
            adam = self.adam.state[p]
            tensors |= {name: p.detach().cpu(), f"{name}.ema": average.cpu(), f"{name}.m": adam["exp_avg"].cpu(), f"{name}.v": adam["exp_avg_sq"].cpu()}
        return {"config": dataclasses.asdict(self.cfg), "steps": self.steps, "scale": self.scale, "meta": self.sae.meta,
                "shard": mesh.shard, "shards": mesh.shards, "tensors": tensors}  # fmt: skip

    @classmethod
    def load(cls, files, cfg, mesh=None):
        """Read a checkpoint, a file a shard, whatever the number of shards here. Raises ValueError if it was made with another configuration."""
        saved, mesh = [load_file(file, mmap=True) for file in files], mesh or ALONE
        mine, free = dataclasses.asdict(cfg), ("resume", "minutes", "out", "acts", "device", "shards", "accumulate")
        theirs = saved[0]["config"]
        differs = [f"{k}: {theirs[k]} there, {mine[k]} now" for k in mine if k not in free and theirs[k] != mine[k]]
        if differs:
            raise ValueError(f"{files[0]} was made with another configuration ({'; '.join(differs)}); use those values or another --out")
        sae = SAE(saved[0]["tensors"]["b_pre"].numel(), cfg.n_latents, cfg.k, mesh)
        sae.meta, own = saved[0]["meta"], mesh.part(cfg.n_latents)
        sae.load_state_dict({name: rows_of(saved, name, own) for name in sae.state_dict()})
        trainer = cls(cfg, sae.to(cfg.device), saved[0]["scale"])
        trainer.steps = saved[0]["steps"]
        for i, (name, p) in enumerate(sae.named_parameters()):
            m, v, trainer.ema[i] = (rows_of(saved, f"{name}.{what}", own).to(p) for what in ("m", "v", "ema"))
            trainer.adam.state[p] = {"step": torch.tensor(float(trainer.steps), device=p.device), "exp_avg": m, "exp_avg_sq": v}
        trainer.silent = rows_of(saved, "silent", own).to(cfg.device)
        trainer.own_dead = int((trainer.silent > cfg.dead_tokens).sum())
        trainer.n_dead = int(mesh.sum(torch.tensor(trainer.own_dead, device=cfg.device), "shard"))
        return trainer


def rows_of(saved, name, own):
    """Rows `own` (a range) of a tensor that the shards of a checkpoint hold between them; b_pre's are whole in each."""
    parts, first = [s["tensors"][name] for s in saved], 0
    if name.startswith("b_pre"):
        return parts[0].clone()
    out = []
    for part in parts:
        out.append(part[max(0, own.start - first) : max(0, own.stop - first)])
        first += len(part)
    return torch.cat(out)


def checkpoints(out):
    """The checkpoints in a run directory: those that are whole, newest first, each a list with a file a shard; what is wrong with damaged
    files; and the files that a crash tore or left without their fellows since the newest whole one."""
    found, damaged, torn = {}, [], []
    for file in sorted(Path(out).glob("checkpoint*.pt")):
        try:
            head = load_file(file, mmap=True)
            found.setdefault((head["steps"], head["shards"]), {})[head["shard"]] = file
        except KeyError:
            damaged.append(f"{file} was written by another version of sae.py")
        except ValueError as e:
            damaged.append(str(e))
            torn.append(file)
    whole = []
    for (_, shards), files in sorted(found.items(), reverse=True):
        if len(files) == shards:
            whole.append([files[s] for s in sorted(files)])
        elif not whole:
            torn += files.values()
    return whole, damaged, torn


def peek(x):
    """Start copying a small tensor to the CPU. The function returned waits for that, not for what is launched later, and gives a list."""
    if not x.is_cuda:
        return x.tolist
    host, done = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True), torch.cuda.Event()
    done.record(torch.cuda.current_stream(x.device))
    return lambda: (done.synchronize(), host.tolist())[1]


@torch.no_grad()
def nmse(sae, x, chunk=8192):
    """Normalised MSE (section 2.1) of raw activations x (N, d): squared error over that of always predicting their mean."""
    error, device = 0.0, sae.W_dec.device
    u = [c.to(device, sae.W_dec.dtype) for c in x.split(chunk)]
    u = [normalize(c)[0] for c in u] if sae.normalized else u
    mean = sum(c.sum(0) for c in u) / len(x)
    for c in u:
        error += (c - sae.decode(*sae.encode(c))).square().sum()
    return (error / sum((c - mean).square().sum() for c in u)).item()


def train(cfg, batches, val=None, meta=None, mesh=None):
    """Train for cfg.tokens tokens. Returns the SAE: EMA or raw weights, whichever has the lower NMSE on `val` (without val: EMA).

    cfg: a Config from `resolve`. batches: a function `step -> iterator of (B, d) activations from that step on`
    (what an exact resume needs), or any iterable of them. val: held-out activations (N, d). meta: dict kept in the SAE.
    mesh: from `Mesh.join` under torchrun. Then `batches` gives the replica's part (B / replicas, d) and is used by its first shard
    only, `val` and `meta` are those of the first process, and the SAE returned is a shard's; out/sae.pt is always whole.
    Writes log.jsonl, checkpoint.pt and sae.pt into cfg.out. Ctrl-C and SIGTERM save a checkpoint, then raise KeyboardInterrupt.
    Raises ValueError for data, configurations and losses that cannot be trained on, and when another process of the mesh is lost.
    """
    out, begun, mesh = Path(cfg.out), time.time(), mesh or ALONE
    if cfg.batch % (mesh.replicas * cfg.accumulate):
        raise ValueError(f"a batch of {cfg.batch} cannot be cut into {mesh.replicas} replicas times {cfg.accumulate} parts; choose another --batch")
    start = batches if callable(batches) else lambda step: itertools.islice(batches, step, None)
    log_file = out / "log.jsonl"
    files, damaged, torn = mesh.agree(checkpoints(out))
    settings, launch = out / "config.json", os.getppid() if mesh.groups else 0  # torchrun, which stays the same when it restarts its processes
    restarted = mesh.agree(launch and settings.exists() and json.loads(settings.read_text()).get("launch") == launch)
    if cfg.resume and not files and (damaged or (out / "sae.pt").exists() or not mesh.groups):  # under torchrun, --resume may be there from the start
        raise ValueError(f"nothing to resume: {damaged[0] if damaged else f'there is no checkpoint in {out}'}; drop --resume or choose another --out")
    if not (cfg.resume or restarted) and (files or damaged or (out / "sae.pt").exists()):
        raise ValueError(f"{out} already holds a run; continue it with --resume or choose another --out")
    meta, leads = mesh.agree(meta), mesh.shard == 0
    mesh.wait()  # all have seen what there is
    if files:
        if mesh.first:
            for message in damaged:
                print(f"{message}; using the checkpoint before it", file=sys.stderr)
            for file in torn:  # or the next save would push the whole one out
                file.unlink()
            settings.write_text(json.dumps(json.loads(settings.read_text()) | {"launch": launch}, indent=1))
        trainer = Trainer.load(files[0], cfg, mesh)
        if differs := [f"{k} {trainer.sae.meta.get(k)}, not {v}" for k, v in (meta or {}).items() if trainer.sae.meta.get(k) != v]:
            raise ValueError(f"{files[0][0]} was trained on {'; '.join(differs)}; give the activations that it was trained on")
        if mesh.first:
            cut_log(log_file, trainer.steps)
        stream = start(trainer.steps) if leads else None
    else:
        stream, sample = start(0) if leads else None, torch.empty(0)
        if leads:
            first = list(itertools.islice(stream, math.ceil(32768 * mesh.replicas / cfg.batch)))
            sample = normalize(torch.cat(first)[:32768].to(cfg.device, torch.float32))[0]
            stream = itertools.chain((first.pop(0) for _ in range(len(first))), stream)  # none is kept longer than it is needed
        sample = mesh.share(sample, "world", mesh.agree(sample.shape), cfg.device)
        torch.manual_seed(cfg.seed)
        sae = SAE(sample.shape[1], cfg.n_latents, cfg.k, mesh).to(cfg.device)
        sae.init_from_data(sample)
        sae.meta = dict(meta or {})
        trainer = Trainer(cfg, sae, (sample - sample.mean(0)).square().mean().item())
        del sample
        out.mkdir(parents=True, exist_ok=True)
        if mesh.first:
            settings.write_text(json.dumps(dataclasses.asdict(cfg) | {"launch": launch}, indent=1))
            log_file.write_text("")
    stream = mesh.follow(stream, (cfg.batch // mesh.replicas, trainer.sae.d_model), cfg.device)
    if shape := mesh.agree(val is not None and tuple(val.shape)):
        val = mesh.share(val, "world", shape, cfg.device)

    steps = cfg.tokens // cfg.batch
    every = max(1, steps // 200)
    eval_every = max(1, steps // 10)
    stop, saved_at = [], time.time()
    handlers = {s: signal.signal(s, lambda *_: stop.append(1)) for s in (signal.SIGINT, signal.SIGTERM)} if _in_main_thread() else {}
    paces, mark = [], (trainer.steps, time.time())
    if mesh.first:
        print("     step |   nmse    val |    l0 |   dead |      lr |   tok/s |    eta", file=sys.stderr)
    try:
        while trainer.steps < steps:
            try:
                x = next(stream)
            except (StopIteration, ValueError) as e:  # the data is at fault, not the training so far
                if trainer.steps and not mesh.groups:  # elsewhere the others know nothing of it
                    save_checkpoint(trainer)
                raise e if isinstance(e, ValueError) else ValueError(f"the activations ended after step {trainer.steps} of {steps}; give more and --resume") from None
            info = trainer.step(x, bool(stop), mesh.first and time.time() - saved_at > 60 * cfg.minutes)
            done = trainer.steps
            evaluate = val is not None and (done % eval_every == 0 or done == steps)
            if done % every == 0 or evaluate or done == steps:
                line = {"step": done, "tokens": done * cfg.batch} | {name: float(info[name]) for name in ("nmse", "l0", "dead")}
                paces = [*paces[-19:], (time.time() - mark[1]) / (done - mark[0])]
                pace = sorted(paces)[len(paces) // 2]  # seconds a step, the median of late
                line["tokens_per_s"] = cfg.batch / pace
                if evaluate:
                    line["val_nmse"] = nmse(trainer.sae, val)
                mark = done, time.time()
                if mesh.first:
                    with open(log_file, "a") as f:
                        f.write(json.dumps(line) + "\n")
                    show(line, cfg, steps, pace)
            if info["stop"] or info["save"] and done < steps:
                save_checkpoint(trainer)
                saved_at = time.time()
                if info["stop"]:
                    raise KeyboardInterrupt(f"stopped at step {done}; saved a checkpoint in {out}; continue with --resume")
        trainer.sae.product_dtype = None  # the final scores, and the SAE handed back, in full precision
        torch.set_float32_matmul_precision("highest")
        raw, average = trainer.sae, trainer.averaged()
        scores = {"raw": nmse(raw, val), "ema": nmse(average, val)} if val is not None else {"ema": math.nan}
        kept = min(scores, key=scores.get)
        sae = raw if kept == "raw" else average
        sae.meta |= {"weights": kept, "nmse": scores, "tokens": steps * cfg.batch, "config": dataclasses.asdict(cfg)}
        sae.meta |= {"seconds": time.time() - begun, "dead": trainer.n_dead}
        save_checkpoint(trainer)
        mesh.wait()  # for the others' files
        if mesh.first:
            whole = sae
            if mesh.shards > 1:
                whole = Trainer.load(checkpoints(out)[0][0], dataclasses.replace(cfg, device="cpu"))
                whole = whole.sae if kept == "raw" else whole.averaged()
                whole.meta = sae.meta
            whole.save(out / "sae.pt")
    except RuntimeError as e:
        if not mesh.groups or isinstance(e, torch.OutOfMemoryError):
            raise
        raise ValueError(f"lost contact with another process of this run at step {trainer.steps + 1} ({str(e).splitlines()[0][:90]}); continue from the last checkpoint with --resume") from e
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    if mesh.first:
        scores = ", ".join(f"{name} {score:.4f}" for name, score in scores.items())
        print(f"held-out nmse: {scores}; kept the {kept} weights in {out / 'sae.pt'}", file=sys.stderr)
    return sae


def save_checkpoint(trainer):
    """Each shard writes what it owns, and keeps the checkpoint before this one in case a crash tears this one."""
    mesh = trainer.sae.mesh
    if mesh.replica == 0:
        of = f".{mesh.shard}of{mesh.shards}" if mesh.shards > 1 else ""
        save_atomic(Path(trainer.cfg.out) / f"checkpoint{of}.pt", trainer.state(), Path(trainer.cfg.out) / f"checkpoint{of}.old.pt")


def cut_log(path, step):
    """Drop the lines of log.jsonl after `step`, and any that a crash left incomplete."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            kept += [line] if json.loads(line)["step"] <= step else []
        except ValueError:
            pass
    path.write_text("".join(line + "\n" for line in kept))


def show(line, cfg, steps, pace):
    """One fixed-width progress line; rewritten in place on a terminal."""
    left = (steps - line["step"]) * pace
    val = f"{line['val_nmse']:.4f}" if "val_nmse" in line else "      "
    text = f"{line['step']:>9,} | {line['nmse']:.4f} {val} | {line['l0']:5.1f} | {line['dead']:>6.0f} | {cfg.lr:.1e} | {line['tokens_per_s']:>7,.0f} | {left:>4.0f} s"
    tty = sys.stderr.isatty()
    if tty or "val_nmse" in line:
        print(("\r" if tty else "") + text, end="\n" if "val_nmse" in line or not tty else "", file=sys.stderr, flush=True)


def save_atomic(path, obj, old=None):
    """torch.save through a temporary file that is synced and renamed: `path` is either whole or as it was. `old`: where that goes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            torch.save(obj, f)
            f.flush()
            os.fsync(f.fileno())
        if old and path.exists():
            path.replace(old)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_file(path, mmap=False):
    """torch.load onto the CPU that executes nothing. Raises ValueError for a file that is damaged or of another kind."""
    try:
        return dict(torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap))
    except Exception as e:  # zip, pickle and storage errors come in many types
        raise ValueError(f"{path} is not a readable file of weights ({type(e).__name__}); it may be cut short or of another kind") from e


def _in_main_thread():
    import threading

    return threading.current_thread() is threading.main_thread()


def keep_heap():
    """Tell glibc to reuse freed memory instead of returning it to the system: a step's large temporaries then cost no page faults.

    Worth a quarter of a CPU step; elsewhere than on Linux with glibc it does nothing.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass


# --------------------------------------------------------------------------------------------------
# The command line.


def parse_config(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n", 1)[1], formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Config):
        if f.type is bool or f.type == "bool":
            p.add_argument(f"--{f.name}", action="store_true", help=f.metadata["help"])
        else:
            p.add_argument(f"--{f.name}", type=type(f.default), default=f.default, help=f"{f.metadata['help']} (default: {f.default!r})")
    p.add_argument("--bench", action="store_true", help="time the training step and its parts on random data (d = 768) and exit")
    p.add_argument("--json", action="store_true", help="with --bench: one line of JSON")
    p.add_argument("--plan", action="store_true", help="print what a run of this size needs on --world devices, and exit: bytes, FLOPs, communication, time")
    p.add_argument("--d_model", type=int, default=768, help="with --plan: width of the activations (default: 768)")
    p.add_argument("--world", type=int, default=1, help="with --plan: devices (default: 1)")
    p.add_argument("--speeds", default="790,4300,50", help="with --plan: a device's TFLOP/s, GB/s of memory, GB/s to others (default: 790,4300,50)")
    a = p.parse_args(argv)
    return a, Config(**{f.name: getattr(a, f.name) for f in dataclasses.fields(Config)})


def plan(cfg, d, world=1, speeds=(790, 4300, 50), dead=0.05):
    """What a run would take, before renting it: a dict of bytes a device, FLOPs and bytes sent a token, and seconds a step.

    cfg: a Config from `resolve`; d: d_model; world: devices; speeds of one: TFLOP/s of the product, GB/s of its memory, GB/s to others;
    dead: the share of latents that are dead, for AuxK. Bytes are counted at the peaks of `Trainer.step`; times are added, not overlapped.
    """
    S, n, k, kind = cfg.shards, cfg.n_latents, cfg.k * (4 if cfg.multi_topk else 1), "cuda" if cfg.device.startswith("cuda") else "cpu"
    R, own, e = world // S, n // S, 2 if cfg.precision == "bf16" else 4
    if world % S or n % S or cfg.batch % (R * cfg.accumulate):
        raise ValueError(f"{world} devices, {S} shards, n = {n} and a batch of {cfg.batch} in {cfg.accumulate} parts must divide without rest")
    tokens, k_own, own_dead = cfg.batch // R, min(k, own), int(own * dead)
    b, k_aux = tokens // cfg.accumulate, min(cfg.k_aux, int(n * dead)) if cfg.aux_coef else 0
    weights, bd = 4 * (own * (2 * d + 1) + d), 4 * b * d
    chunk = min(b, max(1, DENSE[kind] // own))

    def searching(n, k):  # what topk needs beside the pre-activations of a chunk
        if kind == "cuda":
            return chunk * (4 * math.ceil(n / 2 ** int(math.log2(max(1, n / k)) / 2)) + 16 * k)
        group = 64
        while group > 4 and (n % group or n < 4 * k * group):
            group //= 2
        return chunk * k * (8 * 7 + (group + 8) * e) if group > 4 else 12 * chunk * k

    gathering = lambda k: b * S * k * (2 * e + 1) + 16 * b * k if S > 1 else 0
    encoder = own * d * e * (e < 4) + bd * e // 4  # the weights and inputs of the product, in its precision
    aux_rows = 2 * 4 * own_dead * (2 * d + 1) * bool(k_aux)
    aux_codes = 12 * b * k_aux
    is_dense = k_aux and own_dead <= NARROW[kind] * k_aux
    dense = 4 * b * own_dead * is_dense
    select = bd + encoder + chunk * own * e + max(searching(own, k_own), chunk * own_dead * e * bool(k_aux)) + aux_rows // 2
    gather = bd + encoder + 2 * 12 * b * k_own + max(gathering(k_own), gathering(k_aux) + aux_codes)
    losses = (6 + bool(k_aux)) * bd + 12 * b * k_own + aux_codes + aux_rows // 2 + dense
    backward = (4 + bool(k_aux)) * bd + 44 * b * k_own + aux_codes + aux_rows + dense + (weights if cfg.accumulate == 1 else 0)
    again = weights if cfg.accumulate > 1 else 0  # gradients of the parts before
    step = max(select, gather, losses, backward) + again
    per_device = {"weights": weights, "gradients and temporaries": step, "Adam": 2 * weights, "EMA": weights, "batch and counters": tokens * d * 2 + 8 * own}
    per_device["peak"] = sum(per_device.values())
    aux_columns = own_dead * S if is_dense else k_aux  # that its four sparse products touch
    flops = 2 * d * n + 8 * d * k + 8 * d * aux_columns
    sent = (S - 1) * (k_own + k_aux) * e + (2 * (S - 1) / S * 4 * d) * (1 + bool(k_aux)) + 4 * d * (S > 1) + 2 * (R - 1) / R * weights / tokens
    gathered = 4 * 4 * d * (k + k_aux * (not is_dense)) / S  # in decode, d_values, two weight gradients
    memory = tokens * (2 * own * e + gathered + 20 * 4 * d) + 13 * weights
    products = 2 * d * own + 2 * 8 * d * own_dead * is_dense  # TF32 has half the speed
    seconds = {"products": products * tokens / speeds[0] / 1e12, "memory": memory / speeds[1] / 1e9, "communication": tokens * sent / speeds[2] / 1e9}
    return {"bytes": per_device, "flops_per_token": flops, "bytes_sent_per_token": sent, "seconds": seconds, "replicas": R,
            "seconds_per_billion": sum(seconds.values()) / cfg.batch * 1e9}  # fmt: skip


def show_plan(cfg, d, world, speeds):
    p = plan(cfg, d, world, speeds)
    print(f"n {cfg.n_latents:,}, k {cfg.k}, d {d}, batch {cfg.batch:,} in {cfg.accumulate} part{'s' * (cfg.accumulate > 1)}, {cfg.precision}, AuxK on 5 % dead; "
          f"{world} devices: {p['replicas']} replicas x {cfg.shards} shards")  # fmt: skip
    print("bytes a device")
    for name, size in p["bytes"].items():
        print(f"  {name:<28} {size / 1e9:>10.3f} GB")
    print(f"FLOPs a token, all shards      {p['flops_per_token'] / 1e9:>10.3f} GFLOP\nbytes sent a token and device   {p['bytes_sent_per_token'] / 1e3:>9.1f} kB")
    print(f"seconds a step at {speeds[0]:g} TFLOP/s, {speeds[1]:g} GB/s memory, {speeds[2]:g} GB/s links, nothing overlapped (counted, not measured)")
    for name, t in p["seconds"].items():
        print(f"  {name:<28} {t:>10.4f} s")
    print(f"a billion tokens               {p['seconds_per_billion'] / 3600:>10.2f} hours")


def bench(cfg, as_json, d=768, repeats=5):
    """Print tokens/s of a whole optimizer step and of its parts, on random data; medians of rounds in which all take turns.

    The floor is the encoder's product alone. "torch.topk + dense autograd" is the same step written without anything of this file
    but the model: the plain baseline. Peak memory is of our step: the process's on CPU, the device's on CUDA.
    """
    cuda, n, k = cfg.device.startswith("cuda"), cfg.n_latents, cfg.k
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    cfg = resolve(dataclasses.replace(cfg, batch=cfg.batch or (PAPER_BATCH if cuda else max(512, 2**27 // n)), tokens=10**10), d, 0)
    dense = 2**30 if cuda else 2**27  # pre-activations of the baseline at once
    wanted = 4 * 22 * d * n + 10 * cfg.batch * (k + d) * 4 + 12 * dense  # weights, gradients, Adam, EMA, the baseline's own, temporaries
    free = torch.cuda.mem_get_info()[0] if cuda else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if wanted > free:
        return print(f"n {n}: needs about {wanted / 1e9:.0f} GB, {free / 1e9:.0f} GB are free; left out")
    torch.manual_seed(cfg.seed)
    x = torch.randn(cfg.batch, d, device=cfg.device)
    trainer = Trainer(cfg, SAE(d, n, k).to(cfg.device), 1 / d)
    sae, dead = trainer.sae, torch.randperm(n, device=cfg.device)[: n // 20]
    W, u = (t.to(sae.product_dtype or t.dtype) for t in (sae.W_enc.detach(), normalize(x)[0]))
    chunks = u.split(max(1, DENSE[u.device.type] // n))
    pre_acts, plain = F.linear(chunks[0], W), x[: max(1, dense // n)]
    values, indices = (c.detach() for c in sae.encode(u.float()))
    dense_sae = copy.deepcopy(sae)
    dense_adam = torch.optim.Adam(dense_sae.parameters(), lr=1e-4, fused=True)

    def step(n_dead):
        trainer.silent.zero_()
        trainer.silent[dead[:n_dead]] = 2 * cfg.dead_tokens
        trainer.n_dead = trainer.own_dead = n_dead
        trainer.step(x)

    def gradients():
        del indices.by_latent
        with torch.no_grad():
            gather_dot(u.float(), sae.W_dec, indices), scatter_sum(values, indices, u.float(), n), scatter_sum(values, indices, u.float(), n)

    def dense_step():
        v = normalize(plain)[0]
        with torch.autocast(v.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            best, j = dense_sae.pre_acts(v).topk(k, sorted=False)
            z = torch.zeros(len(v), n, device=v.device, dtype=best.dtype).scatter(1, j, best.relu())
            loss = (v - z @ dense_sae.W_dec - dense_sae.b_pre).square().mean()
        dense_adam.zero_grad()
        loss.backward()
        dense_adam.step()
        dense_sae.normalize_decoder()

    by_latent(indices, n)
    B = cfg.batch
    work = {  # name -> (tokens, function)
        "encoder product alone": (B, lambda: any(F.linear(chunk, W) is None for chunk in chunks)),
        "step, nothing dead": (B, lambda: step(0)),
        "step, 5 % dead (AuxK)": (B, lambda: step(len(dead))),
        "part: topk": (len(pre_acts), lambda: topk(pre_acts, k)),
        "part: decode": (B, lambda: gather_sum(values, indices, sae.W_dec.detach())),
        "part: sparse gradients": (B, gradients),
        "part: optimizer": (B, trainer.update),
        "torch.topk + dense autograd": (len(plain), dense_step),
    }
    seconds, peak = {name: [] for name in work}, 0
    for i in range(repeats + 1):
        for part, (tokens, f) in work.items():
            if cuda:
                torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            f()
            if cuda:
                torch.cuda.synchronize()
                peak = max(peak, torch.cuda.max_memory_allocated()) if part.startswith("step") else peak
            seconds[part] += [(time.perf_counter() - start) / tokens] if i else []  # the first round warms up
        if not cuda and i == 0:
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    median = {part: sorted(t)[len(t) // 2] for part, t in seconds.items()}
    floor, whole = median["encoder product alone"], median["step, nothing dead"]
    out = {"device": name, "torch": torch.__version__, "n_latents": n, "k": k, "d": d, "batch": B, "precision": cfg.precision, "peak_gb": peak / 1e9}
    out["tokens_per_s"] = {part: 1 / t for part, t in median.items()}
    if as_json:
        return print(json.dumps(out))
    print(f"n {n}, k {k}, d {d}, batch {B}, {cfg.precision}, {name}, torch {torch.__version__}; peak memory {peak / 1e9:.1f} GB")
    for part, t in median.items():
        share = f"{t / whole:6.1%} of the step" if part.startswith("part") or t == floor else f"{floor / t:6.1%} of the product's rate"
        print(f"  {part:<28} {1 / t:>13,.0f} tokens/s   {share}")


def main(argv=None):
    import harvest

    a, cfg = parse_config(argv)
    if a.plan:
        cfg.device = cfg.device or "cuda"
        try:
            speeds = [float(x) for x in a.speeds.split(",")]
            assert len(speeds) == 3 and min(speeds) > 0 and a.world > 0 and a.d_model > 1
        except (ValueError, AssertionError):
            raise ValueError(f"--speeds {a.speeds} --world {a.world} --d_model {a.d_model}: give three positive numbers, such as 790,4300,50, and positive sizes") from None
        return show_plan(resolve(cfg, a.d_model, 10**9), a.d_model, a.world, speeds)
    keep_heap()
    cfg.device = harvest.pick_device(cfg.device)
    if ":" in cfg.device:
        torch.cuda.set_device(cfg.device)
    if a.bench:
        return bench(cfg, a.json)
    resolve(cfg, 2, 10**9)  # complain about impossible values before any work
    mesh = Mesh.join(cfg.shards, cfg.device)
    acts, device, data, facts = Path(cfg.acts), cfg.device, None, None
    if cfg.stream or (device.startswith("cuda") and not harvest.is_harvested(acts)):
        cfg.acts = ""
        for turn in (mesh.first, mesh.shard == 0 and not mesh.first):  # the first downloads what all read
            if turn:
                model, encoding = harvest.load_model(cfg.model, device, needs_text=not cfg.text)
                data = held_out = harvest.Stream(model, encoding, cfg.text or harvest.default_text(model))
                facts = data.meta, 400_000_000
            mesh.wait()
    else:
        if not harvest.is_harvested(acts):
            if mesh.groups:
                raise ValueError(f"no complete activations at {acts}; make them first: python harvest.py --model {cfg.model} --out {acts}, or give --stream")
            print(f"no complete activations at {acts}: harvesting", file=sys.stderr)
            harvest.main(["--model", cfg.model, "--out", cfg.acts, "--device", device] + (["--text", cfg.text] if cfg.text else []))
        data, held_out = harvest.Acts(acts), harvest.Acts(acts, "val")
        if cfg.model not in ("auto", data.meta["model"]) or cfg.text not in ("", data.meta["text"]):
            raise ValueError(f"{acts} holds activations of {data.meta['model']} on {data.meta['text']}; name another --acts, or leave out --model and --text")
        facts = data.meta, data.n_tokens
    meta, available = mesh.agree(facts)
    if facts not in (None, (meta, available)):
        raise ValueError(f"this process has {facts[0]}, the first one {meta}; give all machines the same --model, --text and --acts")
    cfg = resolve(cfg, meta["d_model"], available)
    val = held_out.sample(65536 if device.startswith("cuda") else 8192)[1].flatten(0, 1) if mesh.first else None
    where = {name: meta[name] for name in ("model", "layer", "site", "context", "text")}
    if mesh.first:
        print(f"{where['model']}, layer {where['layer']}, {where['site']}: {cfg.tokens:,} tokens, d {meta['d_model']}, n {cfg.n_latents}, k {cfg.k}, batch {cfg.batch}, lr {cfg.lr:.2g}, "
              f"ema {cfg.ema:.4g}, dead after {cfg.dead_tokens:,} tokens, {cfg.precision} on {device}, {mesh.replicas} x {mesh.shards} processes, into {cfg.out}", file=sys.stderr)  # fmt: skip
    train(cfg, lambda step: data.batches(cfg.batch // mesh.replicas, cfg.seed, step, device, mesh.replica, mesh.replicas), val, where, mesh)
    mesh.leave()


if __name__ == "__main__":
    import harvest

    harvest.run_main(main)
