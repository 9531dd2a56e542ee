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
    """

    def __init__(self, d_model, n_latents, k):
        super().__init__()
        if not 1 <= k <= n_latents:
            raise ValueError(f"k = {k} must be between 1 and n_latents = {n_latents}")
        self.d_model, self.n_latents, self.k = d_model, n_latents, k
        self.W_dec = nn.Parameter(F.normalize(torch.randn(n_latents, d_model), dim=1))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())  # tied at initialisation only
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.b_pre = nn.Parameter(torch.zeros(d_model))
        self.normalized, self.product_dtype, self.meta = True, None, {}

    def pre_acts(self, u):
        """u (..., d) -> pre-activations (..., n), dense."""
        return F.linear(u - self.b_pre, self.W_enc, self.b_enc)

    def encode(self, u, k=None):
        """u (B, d) -> values (B, k) >= 0 and indices (B, k) of the k largest pre-activations, unsorted. Differentiable in values.

        `k` at test time may differ from the one trained with. With k = n only as many columns come back as the batch needs.
        """
        return sparse_encode(u, self.W_enc, self.b_enc, self.b_pre, k or self.k, self.product_dtype)

    def decode(self, values, indices):
        """values, indices (B, k) -> û (B, d)."""
        return sparse_decode(values, indices, self.W_dec) + self.b_pre

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


def auxk_loss(u, e, e_hat):
    """AuxK (section 2.4, appendix A): how well the dead latents reconstruct the residual that the live ones leave.

    u (B, d) normalised inputs, e (B, d) residual u - û (detached here), e_hat (B, d) its reconstruction, without b_pre.
    Returns |e - ê|^2 over the batch's own variance of e; exactly 0 for a residual that is constant up to rounding.
    """
    e = e.detach()
    variance = (e - e.mean(0)).square().mean()
    rounding = (100 * torch.finfo(u.dtype).eps) ** 2 * u.square().mean()
    return torch.where(variance > rounding, (e - e_hat).square().mean() / variance.clamp_min(1e-30), 0.0)


def losses(sae, u, scale, dead, k_aux, aux_coef, multi_topk=False, l1=0.0):
    """u (B, d) -> (loss to minimise, NMSE of the batch, values, indices).

    scale: MSE of predicting the mean activation, one constant per run. dead (n_dead): indices of dead latents; the gradient of
    AuxK reaches only their rows of W_enc, b_enc, W_dec, and without any it is absent. Multi-TopK (section 5.3): L(k) + L(4k) / 8.
    l1: the ReLU baseline (section 2.2) instead, NMSE + l1 |z|_1, computed densely since any number of latents may be active.
    """
    if l1:
        values = F.relu(sae.pre_acts(u))  # (B, n)
        nmse = (u - values @ sae.W_dec - sae.b_pre).square().mean() / scale
        indices = torch.arange(sae.n_latents, device=u.device).expand_as(values)
        return nmse + l1 * values.sum(1).mean(), nmse.detach(), values.detach(), indices
    k = min(4 * sae.k, sae.n_latents) if multi_topk else sae.k
    values, indices, *dead_code = sparse_encode(u, sae.W_enc, sae.b_enc, sae.b_pre, k, sae.product_dtype, dead, k_aux)
    extra = 0.0
    if multi_topk:
        extra = (u - sae.decode(values, indices)).square().mean() / scale / 8
        best = topk(values.detach(), min(sae.k, values.shape[1]))[1]
        values, indices = values.gather(1, best), indices.gather(1, best)
    e = u - sae.decode(values, indices)
    nmse = e.square().mean() / scale
    if len(dead):
        extra = extra + aux_coef * auxk_loss(u, e, sparse_decode(*dead_code, sae.W_dec[dead]))
    return nmse + extra, nmse.detach(), values.detach(), indices


# --------------------------------------------------------------------------------------------------
# Selection.


def fused(x):
    """Whether the Triton kernels take x: floats on CUDA, short of double precision."""
    return triton is not None and x.is_cuda and x.dtype != torch.float64


def topk(x, k):
    """x (..., n) -> values and indices (..., k) of the k largest entries of each row: exact, unsorted, like torch.topk but faster."""
    n = x.shape[-1]
    if fused(x) and k < n and max(n // 32, 32 * k) <= 2**15:
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

NARROW = {"cpu": 3, "cuda": 8}  # dense if n is at most so many times k


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


class _SparseEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, W_enc, b_enc, b_pre, k, dtype, dead, k_aux):
        dtype, n = dtype or W_enc.dtype, len(W_enc)
        # Rows that are never selected make the number of columns a multiple of 64, as topk likes it.
        W, b = W_enc.to(dtype), b_enc.to(dtype)
        if n % 64:
            W, b = F.pad(W, (0, 0, 0, -n % 64)), F.pad(b, (0, -n % 64), value=-math.inf)
        only_dead = torch.full_like(b, -math.inf).index_fill_(0, dead, 0.0)
        place = torch.zeros(len(b), dtype=torch.long, device=u.device).index_copy_(0, dead, torch.arange(len(dead), device=u.device))  # of each among the dead
        codes, dead_codes = [], []
        for v in (u - b_pre).to(dtype).split(max(1, DENSE[u.device.type] // n)):
            pre_acts = F.linear(v, W, b)  # (chunk, d) @ (d, n) -> (chunk, n): the one dense product
            active = k if k < n else max(1, int((pre_acts > 0).sum(1).max()))  # k = n: ReLU, as wide as it needs to be
            codes.append(topk(pre_acts, active))
            if 8 * len(dead) > n:
                values, j = topk(pre_acts.add_(only_dead), min(k_aux, len(dead)))
                dead_codes.append((values, place[j]))
            elif len(dead):
                dead_codes.append(topk(pre_acts.index_select(1, dead), min(k_aux, len(dead))))
        values, indices = _join(codes, u, n)
        dead_values, dead_indices = _join(dead_codes, u, len(dead)) if len(dead) else (u.new_empty(len(u), 0), dead.new_empty(len(u), 0))
        ctx.save_for_backward(u, W_enc, b_pre, values, dead_values, dead)
        ctx.indices = indices, dead_indices  # no gradient flows through them; as they are, because they keep their order by latent
        ctx.mark_non_differentiable(indices, dead_indices)
        return values, indices, dead_values, dead_indices

    @staticmethod
    def backward(ctx, g, _, g_dead, __):
        u, W_enc, b_pre, values, dead_values, dead = ctx.saved_tensors
        indices, dead_indices = ctx.indices
        v, ones, n = u - b_pre, torch.ones_like(u[:, :1]), len(W_enc)
        g, g_dead = g * (values > 0), g_dead * (dead_values > 0)  # ReLU
        d_b_enc = scatter_sum(g, indices, ones, n)[:, 0]
        d_b_pre = -(d_b_enc @ W_enc) if ctx.needs_input_grad[3] else None  # summed over the batch first, then one product; not from the dead
        d_W_enc = scatter_sum(g, indices, v, n) if ctx.needs_input_grad[1] else None
        d_u = gather_sum(g, indices, W_enc) if ctx.needs_input_grad[0] else None
        if len(dead):
            d_b_enc.index_add_(0, dead, scatter_sum(g_dead, dead_indices, ones, len(dead))[:, 0])
            if d_W_enc is not None:
                d_W_enc.index_add_(0, dead, scatter_sum(g_dead, dead_indices, v, len(dead)))
            if d_u is not None:
                d_u += gather_sum(g_dead, dead_indices, W_enc[dead])
        return d_u, d_W_enc, d_b_enc, d_b_pre, None, None, None, None


def _join(codes, u, n):
    """Codes of consecutive chunks, which may differ in width -> values (B, k), ReLU'd, in the precision of u, and indices (B, k)."""
    width = max(values.shape[1] for values, _ in codes)
    values, indices = (torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts]) for parts in zip(*codes))
    return values.relu().to(u.dtype), indices.clamp(max=n - 1)  # only a row of NaN selects a column beyond n


def sparse_encode(u, W_enc, b_enc, b_pre, k, dtype=None, dead=None, k_aux=0):
    """ReLU(TopK(W_enc (u - b_pre) + b_enc)) as values, indices (B, k). Differentiable in values with respect to all four tensors.

    u (B, d), W_enc (n, d), b_enc (n), b_pre (d). dtype: precision of the product (default: the weights'); the rest stays in the
    weights'. With `dead` (n_dead), the same product also gives the code of the top k_aux among those latents, as two more
    tensors (B, min(k_aux, n_dead)), numbered by their places in `dead`, whose gradient does not reach b_pre.
    """
    none = torch.empty(0, dtype=torch.long, device=u.device)
    code = _SparseEncode.apply(u, W_enc, b_enc, b_pre, k, dtype, none if dead is None else dead, k_aux)
    return code[:2] if dead is None else code


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
        """Floats -> integers in the same order, NaN highest: BITS = 16 for bf16, whose lower half is empty, 32 for fp32."""
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
            w = tl.load(W + i[:, None] * d + col[None, :], mask=(j < k)[:, None] & (col < d)[None, :], other=0.0)  # (J, D)
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
                g = tl.load(G + (pair // k)[:, None] * d + col[None, :], mask=(at < stop)[:, None] & (col < d)[None, :], other=0.0)  # (J, D)
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


def topk_kernel(x, k, group=32):
    B, n = x.shape
    m = triton.cdiv(n, group)
    while m < k:  # there must be k groups
        group, m = group // 2, triton.cdiv(n, group // 2)
    x, M, K = x.contiguous(), triton.next_power_of_2(m), triton.next_power_of_2(k)
    values, indices = x.new_empty(B, k), torch.empty(B, k, dtype=torch.long, device=x.device)
    maxima, chosen = torch.empty(B, m, dtype=torch.int32, device=x.device), torch.empty(B, k, dtype=torch.int32, device=x.device)
    _topk[(B,)](x, values, indices, maxima, chosen, n, k, m, BITS=16 if x.dtype == torch.bfloat16 else 32, GROUP=group, STEP=min(M, 4096 // group), M=M, K=K, num_warps=4 if M <= 2048 else 16)
    return values, indices


def gather_sum_kernel(values, indices, W):
    (B, k), d = indices.shape, W.shape[1]
    out = W.new_empty(B, d)
    _gather_sum[(B, triton.cdiv(d, 256))](values.contiguous(), indices.contiguous(), W.contiguous(), out, d, k, J=8, D=256)
    return out


def gather_dot_kernel(G, W, indices):
    (B, k), d = indices.shape, W.shape[1]
    out = W.new_empty(B, k)
    _gather_dot[(B, triton.cdiv(k, 8))](G, W.contiguous(), indices.contiguous(), out, d, k, J=8, D=256)
    return out


def scatter_sum_kernel(values, order, starts, G, k, piece=128):
    n, d = len(starts) - 1, G.shape[1]
    # A dense latent may have thousands of pairs, a rare one none: work is cut into pieces of equal size, at least one a latent.
    pieces = F.pad(((starts.diff() + piece - 1) // piece).clamp_min(1).cumsum(0), (1, 0))  # (n + 1), where each latent's begin
    spare = len(order) // piece  # at most so many more pieces than latents, so nothing waits for their true number
    latent_of = torch.searchsorted(pieces, torch.arange(n + spare, device=G.device), right=True) - 1
    out, parts = G.new_empty(n, d), G.new_empty(spare, d)
    columns = triton.cdiv(d, 256)
    _scatter_sum[(n + spare, columns)](values.contiguous(), order, starts, pieces, latent_of, G, out, parts, n, d, k, PIECE=piece, J=8, D=256)
    _sum_parts[(n, columns)](pieces, out, parts, d, D=256)
    return out


# --------------------------------------------------------------------------------------------------
# Configuration: the fields are the command line. 0 means: chosen for the device and the amount of data (see `resolve`).


def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    n_latents: int = option(32768, "latents n")
    k: int = option(32, "active latents a token")
    acts: str = option("acts", "harvested activations; if there are none there, they are made")
    out: str = option("", "run directory; default runs/n{n_latents}_k{k}, or _l1_{l1}")
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
    multi_topk: bool = option(False, "Multi-TopK loss L(k) + L(4k)/8: a code that is good at many test-time k")
    l1: float = option(0.0, "train the ReLU baseline with this L1 penalty instead; --k and AuxK do not apply")
    precision: str = option("", "encoder product: bf16 or fp32; default: bf16 where the hardware has it")
    seed: int = option(0, "seed of initialisation and data order")
    device: str = option("", "cuda or cpu; default: cuda if there")
    minutes: float = option(5.0, "minutes between checkpoints")
    resume: bool = option(False, "continue the run in --out from its last checkpoint, bit-exactly on CPU")


PAPER_BATCH = 131_072


def resolve(cfg, d_model, tokens):
    """Fill in the fields left at 0 (see README, "Defaults"). Returns a new Config. Raises ValueError for impossible ones."""
    c = dataclasses.replace(cfg)
    c.out = c.out or f"runs/n{c.n_latents}_" + (f"l1_{c.l1:g}" if c.l1 else f"k{c.k}")
    if c.l1 < 0 or c.l1 and c.multi_topk:
        raise ValueError(f"--l1 {c.l1:g} must be positive, and goes without --multi_topk")
    if c.l1:
        c.k, c.aux_coef = c.n_latents, 0.0
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
        self.silent = torch.zeros(sae.n_latents, dtype=torch.long, device=sae.W_dec.device)  # tokens since each latent fired
        self.n_dead = 0

    def step(self, x):
        """One optimizer step on raw activations x (B, d). Returns dict of tensors: nmse, l0, dead."""
        cfg, sae = self.cfg, self.sae
        if x.shape[1] != sae.d_model:
            raise ValueError(f"these activations have width {x.shape[1]}, the autoencoder {sae.d_model}")
        u = normalize(x.to(sae.W_dec.device, sae.W_dec.dtype))[0]
        dead = self.silent[:0]
        if cfg.aux_coef and self.n_dead:
            dead = (self.silent > cfg.dead_tokens).int().argsort(descending=True, stable=True)[: self.n_dead]
        loss, nmse, values, indices = losses(sae, u, self.scale, dead, cfg.k_aux, cfg.aux_coef, cfg.multi_topk, cfg.l1)
        fired = torch.where(values > 0, 0, torch.iinfo(torch.long).max)
        silent = (self.silent + len(u)).scatter_reduce(0, indices.flatten(), fired.flatten(), "amin")
        known = peek(torch.stack([loss.detach().double(), (silent > cfg.dead_tokens).sum().double()]))
        self.adam.zero_grad()
        loss.backward()
        value, n_dead = known()  # of the forward pass, while a GPU is still busy with the backward one
        if not math.isfinite(value):
            raise ValueError(f"the loss is {value} at step {self.steps + 1}; lower --lr (now {cfg.lr:g}) or look for bad activations")
        self.silent, self.n_dead = silent, int(n_dead)
        self.update()
        self.steps += 1
        return {"nmse": nmse, "l0": (values > 0).sum(1).float().mean(), "dead": self.n_dead}

    @torch.no_grad()
    def update(self):
        """From gradients to weights and their average. Decoder rows stay on the unit sphere: drop the radial part of their gradient,
        step, renormalise."""
        for g, W in zip(self.sae.W_dec.grad.split(4096), self.sae.W_dec.split(4096)):  # in pieces: no temporary as large as the decoder
            g.addcmul_(torch.linalg.vecdot(g, W)[:, None], W, value=-1)
        if self.cfg.clip:
            nn.utils.clip_grad_norm_(self.params, self.cfg.clip)
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
        return {"config": dataclasses.asdict(self.cfg), "steps": self.steps, "scale": self.scale, "sae": self.sae.state_dict(),
                "adam": self.adam.state_dict(), "ema": self.ema, "silent": self.silent, "meta": self.sae.meta}  # fmt: skip

    @classmethod
    def load(cls, path, cfg):
        """Read a checkpoint. Raises ValueError if it was made with another configuration."""
        saved = load_file(path, cfg.device)
        mine, free = dataclasses.asdict(cfg), ("resume", "minutes", "out", "acts", "device")
        differs = [f"{k}: {saved['config'][k]} there, {mine[k]} now" for k in mine if k not in free and saved["config"][k] != mine[k]]
        if differs:
            raise ValueError(f"{path} was made with another configuration ({'; '.join(differs)}); use those values or another --out")
        sae = SAE(saved["sae"]["W_dec"].shape[1], cfg.n_latents, cfg.k).to(cfg.device)
        sae.load_state_dict(saved["sae"])
        sae.meta = saved["meta"]
        trainer = cls(cfg, sae, saved["scale"])
        trainer.adam.load_state_dict(saved["adam"])
        trainer.ema, trainer.silent, trainer.steps = saved["ema"], saved["silent"], saved["steps"]
        trainer.n_dead = int((trainer.silent > cfg.dead_tokens).sum())
        return trainer


def peek(x):
    """Start copying a small tensor to the CPU. The function returned waits for that, not for what is launched later, and gives a list."""
    if not x.is_cuda:
        return x.tolist
    host, done = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True), torch.cuda.Event()
    done.record()
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


def train(cfg, batches, val=None, meta=None):
    """Train for cfg.tokens tokens. Returns the SAE: EMA or raw weights, whichever has the lower NMSE on `val` (without val: EMA).

    cfg: a Config from `resolve`. batches: a function `step -> iterator of (B, d) activations from that step on`
    (what an exact resume needs), or any iterable of them. val: held-out activations (N, d). meta: dict kept in the SAE.
    Writes log.jsonl, checkpoint.pt and sae.pt into cfg.out. Ctrl-C and SIGTERM save a checkpoint, then raise KeyboardInterrupt.
    """
    out, begun = Path(cfg.out), time.time()
    start = batches if callable(batches) else lambda step: itertools.islice(batches, step, None)
    checkpoint, log_file = out / "checkpoint.pt", out / "log.jsonl"
    if cfg.resume and not checkpoint.exists():
        raise ValueError(f"nothing to resume: there is no {checkpoint}; drop --resume")
    if not cfg.resume and (checkpoint.exists() or (out / "sae.pt").exists()):
        raise ValueError(f"{out} already holds a run; continue it with --resume or choose another --out")
    out.mkdir(parents=True, exist_ok=True)

    if cfg.resume:
        trainer = Trainer.load(checkpoint, cfg)
        if differs := [f"{k} {trainer.sae.meta.get(k)}, not {v}" for k, v in (meta or {}).items() if trainer.sae.meta.get(k) != v]:
            raise ValueError(f"{checkpoint} was trained on {'; '.join(differs)}; give the activations that it was trained on")
        cut_log(log_file, trainer.steps)
        stream = start(trainer.steps)
    else:
        stream = start(0)
        first = list(itertools.islice(stream, math.ceil(32768 / cfg.batch)))
        stream = itertools.chain(first, stream)
        sample = normalize(torch.cat(first)[:32768].to(cfg.device, torch.float32))[0]
        torch.manual_seed(cfg.seed)
        sae = SAE(sample.shape[1], cfg.n_latents, cfg.k).to(cfg.device)
        sae.init_from_data(sample)
        sae.meta = dict(meta or {})
        trainer = Trainer(cfg, sae, (sample - sample.mean(0)).square().mean().item())
        del first, sample
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
        log_file.write_text("")

    steps = cfg.tokens // cfg.batch
    every = max(1, steps // 200)
    eval_every = max(1, steps // 10)
    stop, saved_at = [], time.time()
    handlers = {s: signal.signal(s, lambda *_: stop.append(1)) for s in (signal.SIGINT, signal.SIGTERM)} if _in_main_thread() else {}
    paces, mark = [], (trainer.steps, time.time())
    print("     step |   nmse    val |    l0 |   dead |      lr |   tok/s |    eta", file=sys.stderr)
    try:
        while trainer.steps < steps:
            try:
                x = next(stream)
            except (StopIteration, ValueError) as e:  # the data is at fault, not the training so far
                if trainer.steps:
                    save_atomic(checkpoint, trainer.state())
                raise e if isinstance(e, ValueError) else ValueError(f"the activations ended after step {trainer.steps} of {steps}; give more and --resume") from None
            info = trainer.step(x)
            done = trainer.steps
            evaluate = val is not None and (done % eval_every == 0 or done == steps)
            if done % every == 0 or evaluate or done == steps:
                line = {"step": done, "tokens": done * cfg.batch} | {name: float(v) for name, v in info.items()}
                paces = [*paces[-19:], (time.time() - mark[1]) / (done - mark[0])]
                pace = sorted(paces)[len(paces) // 2]  # seconds a step, the median of late
                line["tokens_per_s"] = cfg.batch / pace
                if evaluate:
                    line["val_nmse"] = nmse(trainer.sae, val)
                mark = done, time.time()
                with open(log_file, "a") as f:
                    f.write(json.dumps(line) + "\n")
                show(line, cfg, steps, pace)
            if stop or (time.time() - saved_at > 60 * cfg.minutes and done < steps):
                save_atomic(checkpoint, trainer.state())
                saved_at = time.time()
                if stop:
                    raise KeyboardInterrupt(f"stopped at step {done}; saved {checkpoint}; continue with --resume")
        trainer.sae.product_dtype = None  # the final scores, and the SAE handed back, in full precision
        torch.set_float32_matmul_precision("highest")
        raw, average = trainer.sae, trainer.averaged()
        scores = {"raw": nmse(raw, val), "ema": nmse(average, val)} if val is not None else {"ema": math.nan}
        kept = min(scores, key=scores.get)
        sae = raw if kept == "raw" else average
        sae.meta |= {"weights": kept, "nmse": scores, "tokens": steps * cfg.batch, "config": dataclasses.asdict(cfg), "seconds": time.time() - begun}
        sae.meta["dead"] = int((trainer.silent > cfg.dead_tokens).sum())
        sae.save(out / "sae.pt")
        save_atomic(checkpoint, trainer.state())
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    scores = ", ".join(f"{name} {score:.4f}" for name, score in scores.items())
    print(f"held-out nmse: {scores}; kept the {kept} weights in {out / 'sae.pt'}", file=sys.stderr)
    return sae


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


def save_atomic(path, obj):
    """torch.save through a temporary file that is synced and renamed: `path` is either whole or as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            torch.save(obj, f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_file(path, device="cpu"):
    """torch.load that executes nothing. Raises ValueError for a file that is damaged or of another kind."""
    try:
        return dict(torch.load(path, map_location=device, weights_only=True))
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
    options = vars(p.parse_args(argv))
    return options.pop("bench"), options.pop("json"), Config(**options)


def bench(cfg, as_json, d=768, repeats=5):
    """Print tokens/s of a whole optimizer step and of its parts, on random data; medians of rounds in which all take turns.

    The floor is the encoder's product alone. "torch.topk + dense autograd" is the same step written without anything of this file
    but the model: the plain baseline. Peak memory is of our step: the process's on CPU, the device's on CUDA.
    """
    cuda, n, k = cfg.device.startswith("cuda"), cfg.n_latents, cfg.k
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    cfg = resolve(dataclasses.replace(cfg, batch=cfg.batch or (PAPER_BATCH if cuda else max(512, 2**27 // n)), tokens=10**10), d, 0)
    wanted = 4 * 22 * d * n + 10 * cfg.batch * (k + d) * 4 + 8 * DENSE["cuda" if cuda else "cpu"]  # weights, gradients, Adam, EMA, the baseline's own, temporaries
    free = torch.cuda.mem_get_info()[0] if cuda else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if wanted > free:
        return print(f"n {n}: needs about {wanted / 1e9:.0f} GB, {free / 1e9:.0f} GB are free; left out")
    torch.manual_seed(cfg.seed)
    x = torch.randn(cfg.batch, d, device=cfg.device)
    trainer = Trainer(cfg, SAE(d, n, k).to(cfg.device), 1 / d)
    sae, dead = trainer.sae, torch.randperm(n, device=cfg.device)[: n // 20]
    W, u = (t.to(sae.product_dtype or t.dtype) for t in (sae.W_enc.detach(), normalize(x)[0]))
    chunks = u.split(max(1, DENSE[u.device.type] // n))
    pre_acts, plain = F.linear(chunks[0], W), x[: max(1, 2**27 // n)]
    values, indices = (c.detach() for c in sae.encode(u.float()))
    dense_sae = copy.deepcopy(sae)
    dense_adam = torch.optim.Adam(dense_sae.parameters(), lr=1e-4, fused=True)

    def step(n_dead):
        trainer.silent.zero_()
        trainer.silent[dead[:n_dead]] = 2 * cfg.dead_tokens
        trainer.n_dead = n_dead
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
        "encoder product alone": (B, lambda: [F.linear(chunk, W) for chunk in chunks]),
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
    out = {"device": name, "torch": torch.__version__, "n_latents": n, "k": k, "d": d, "batch": B, "precision": cfg.precision, "peak_gb": peak / 1e9, "tokens_per_s": {part: 1 / t for part, t in median.items()}}  # fmt: skip
    if as_json:
        return print(json.dumps(out))
    print(f"n {n}, k {k}, d {d}, batch {B}, {cfg.precision}, {name}, torch {torch.__version__}; peak memory {peak / 1e9:.1f} GB")
    for part, t in median.items():
        share = f"{t / whole:6.1%} of the step" if part.startswith("part") or t == floor else f"{floor / t:6.1%} of the product's rate"
        print(f"  {part:<28} {1 / t:>13,.0f} tokens/s   {share}")


def main(argv=None):
    import harvest

    timing, as_json, cfg = parse_config(argv)
    keep_heap()
    cfg.device = harvest.pick_device(cfg.device)
    if timing:
        return bench(cfg, as_json)
    resolve(cfg, 2, 10**9)  # complain about impossible values before any work
    acts, device = Path(cfg.acts), cfg.device
    if cfg.stream or (device.startswith("cuda") and not harvest.is_harvested(acts)):
        cfg.acts = ""
        model, encoding = harvest.load_model(cfg.model, device, needs_text=not cfg.text)
        data = held_out = harvest.Stream(model, encoding, cfg.text or harvest.default_text(model))
        available = 400_000_000
    else:
        if not harvest.is_harvested(acts):
            print(f"no complete activations at {acts}: harvesting", file=sys.stderr)
            harvest.main(["--model", cfg.model, "--out", cfg.acts, "--device", device] + (["--text", cfg.text] if cfg.text else []))
        data, held_out = harvest.Acts(acts), harvest.Acts(acts, "val")
        if cfg.model not in ("auto", data.meta["model"]) or cfg.text not in ("", data.meta["text"]):
            raise ValueError(f"{acts} holds activations of {data.meta['model']} on {data.meta['text']}; name another --acts, or leave out --model and --text")
        available = data.n_tokens
    cfg = resolve(cfg, data.d_model, available)
    val = held_out.sample(65536 if device.startswith("cuda") else 8192)[1].flatten(0, 1)
    where = {name: data.meta[name] for name in ("model", "layer", "site", "context", "text")}
    print(f"{where['model']}, layer {where['layer']}, {where['site']}: {cfg.tokens:,} tokens, d {data.d_model}, n {cfg.n_latents}, k {cfg.k}, batch {cfg.batch}, lr {cfg.lr:.2g}, "
          f"ema {cfg.ema:.4g}, dead after {cfg.dead_tokens:,} tokens, {cfg.precision} on {cfg.device}, into {cfg.out}", file=sys.stderr)  # fmt: skip
    train(cfg, lambda step: data.batches(cfg.batch, cfg.seed, step, cfg.device), val, where)


if __name__ == "__main__":
    import harvest

    harvest.run_main(main)
