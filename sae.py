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
        extra = extra + aux_coef * auxk_loss(u, e, sparse_decode(*dead_code, sae.W_dec))
    return nmse + extra, nmse.detach(), values.detach(), indices


# --------------------------------------------------------------------------------------------------
# Selection.


def topk(x, k, group=64):
    """x (..., n) -> values and indices (..., k) of the k largest entries of each row: exact, unsorted, like torch.topk but faster.

    The k largest entries lie in the k groups with the largest maxima. One streaming pass finds the maxima; what is left is
    small, and is searched the same way with smaller groups.
    """
    n = x.shape[-1]
    while group > 4 and (n % group or n < 4 * k * group):
        group //= 2
    if group <= 4:
        return x.topk(k, dim=-1, sorted=False)
    rows = x.reshape(-1, n // group, group)
    # bf16 orders like its bits, read as an integer, as long as it is not negative. Integer maxima are seven times faster on CPU.
    as_bits = x.dtype == torch.bfloat16 and not x.is_cuda
    maxima = rows.view(torch.int16).amax(-1).view(x.dtype) if as_bits else rows.amax(-1)  # (rows, n / group)
    best, groups = maxima.topk(k, sorted=False)
    start = torch.arange(len(rows), device=x.device)[:, None] * (n // group)
    candidates = rows.view(-1, group).index_select(0, (groups + start).flatten()).view(len(rows), k * group)
    values, j = topk(candidates, k, group // 8)
    indices = groups.gather(1, j // group) * group + j % group
    if as_bits and (unsure := (best < 0).any(1)).any():  # fewer than k groups with a maximum of at least zero
        values[unsure], indices[unsure] = x.reshape(-1, n)[unsure].topk(k, sorted=False)
    return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)


# --------------------------------------------------------------------------------------------------
# Sparse linear algebra: three operations, one function each. Nothing of size (B, k, d) is ever made.


def gather_sum(values, indices, W):
    """out[b] = sum_j values[b, j] W[indices[b, j]]: (B, k), (B, k), (n, d) -> (B, d)."""
    return F.embedding_bag(indices, W, per_sample_weights=values, mode="sum")


def gather_dot(G, W, indices):
    """out[b, j] = G[b] . W[indices[b, j]]: (B, d), (n, d), (B, k) -> (B, k)."""
    B, k = indices.shape
    starts = torch.arange(0, B * k, k, device=G.device)
    bag = torch.arange(B, device=G.device).repeat_interleave(k)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(G.contiguous(), W, indices.flatten(), starts, bag, 0).view(B, k)


def scatter_sum(values, indices, G, n):
    """out[i] = sum of values[b, j] G[b] over all indices[b, j] = i: (B, k), (B, k), (B, d) -> (n, d).

    Pairs are sorted by latent, so that each output row is one bag: no atomics, the same bits every time.
    """
    latents, order = indices.flatten().sort(stable=True)
    starts = torch.searchsorted(latents, torch.arange(n, device=G.device))
    return F.embedding_bag(order // indices.shape[1], G.contiguous(), starts, per_sample_weights=values.flatten()[order], mode="sum")


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, W_dec):
        ctx.save_for_backward(values, indices, W_dec)
        return gather_sum(values, indices, W_dec)

    @staticmethod
    def backward(ctx, g):
        values, indices, W_dec = ctx.saved_tensors
        d_values = gather_dot(g, W_dec, indices) if ctx.needs_input_grad[0] else None
        d_W_dec = scatter_sum(values, indices, g, len(W_dec)) if ctx.needs_input_grad[2] else None
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
        W, b = F.pad(W_enc.to(dtype), (0, 0, 0, -n % 64)), F.pad(b_enc.to(dtype), (0, -n % 64), value=-math.inf)
        only_dead = torch.full_like(b, -math.inf).index_fill_(0, dead, 0.0)
        codes, dead_codes = [], []
        for v in (u - b_pre).to(dtype).split(max(1, DENSE[u.device.type] // n)):
            pre_acts = F.linear(v, W, b)  # (chunk, d) @ (d, n) -> (chunk, n): the one dense product
            active = k if k < n else max(1, int((pre_acts > 0).sum(1).max()))  # k = n: ReLU, as wide as it needs to be
            codes.append(topk(pre_acts, active))
            if 8 * len(dead) > n:
                dead_codes.append(topk(pre_acts.add_(only_dead), min(k_aux, len(dead))))
            elif len(dead):
                values, j = topk(pre_acts.index_select(1, dead), min(k_aux, len(dead)))
                dead_codes.append((values, dead[j]))
        values, indices = _join(codes, u, n)
        dead_values, dead_indices = _join(dead_codes, u, n) if len(dead) else (u.new_empty(len(u), 0), dead.new_empty(len(u), 0))
        ctx.save_for_backward(u, W_enc, b_pre, values, indices, dead_values, dead_indices)
        ctx.mark_non_differentiable(indices, dead_indices)
        return values, indices, dead_values, dead_indices

    @staticmethod
    def backward(ctx, g, _, g_dead, __):
        u, W_enc, b_pre, values, indices, dead_values, dead_indices = ctx.saved_tensors
        g, g_dead = g * (values > 0), g_dead * (dead_values > 0)  # ReLU
        d_b_enc = g.new_zeros(len(W_enc)).index_add_(0, indices.flatten(), g.flatten())
        d_b_pre = -(d_b_enc @ W_enc) if ctx.needs_input_grad[3] else None  # summed over the batch first, then one product; not from the dead
        d_b_enc.index_add_(0, dead_indices.flatten(), g_dead.flatten())
        g, indices = torch.cat([g, g_dead], 1), torch.cat([indices, dead_indices], 1)
        d_W_enc = scatter_sum(g, indices, u - b_pre, len(W_enc)) if ctx.needs_input_grad[1] else None
        d_u = gather_sum(g, indices, W_enc) if ctx.needs_input_grad[0] else None
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
    tensors (B, min(k_aux, n_dead)), whose gradient does not reach b_pre.
    """
    none = torch.empty(0, dtype=torch.long, device=u.device)
    code = _SparseEncode.apply(u, W_enc, b_enc, b_pre, k, dtype, none if dead is None else dead, k_aux)
    return code[:2] if dead is None else code


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
        self.params = list(sae.parameters())
        self.adam = torch.optim.Adam(self.params, lr=cfg.lr, betas=(0.9, 0.999), eps=6.25e-10, fused=True)
        self.ema = [torch.zeros_like(p) for p in self.params]
        self.silent = torch.zeros(sae.n_latents, dtype=torch.long, device=sae.W_dec.device)  # tokens since each latent fired

    def step(self, x):
        """One optimizer step on raw activations x (B, d). Returns dict of tensors: nmse, l0, dead."""
        cfg, sae = self.cfg, self.sae
        if x.shape[1] != sae.d_model:
            raise ValueError(f"these activations have width {x.shape[1]}, the autoencoder {sae.d_model}")
        u = normalize(x.to(sae.W_dec.device, sae.W_dec.dtype))[0]
        dead = (self.silent > cfg.dead_tokens).nonzero().flatten() if cfg.aux_coef else self.silent[:0]
        loss, nmse, values, indices = losses(sae, u, self.scale, dead, cfg.k_aux, cfg.aux_coef, cfg.multi_topk, cfg.l1)
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} at step {self.steps + 1}; lower --lr (now {cfg.lr:g}) or look for bad activations")
        self.adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            # Decoder rows stay on the unit sphere: drop the radial part of their gradient, step, renormalise.
            W, g = sae.W_dec, sae.W_dec.grad
            g.addcmul_(torch.linalg.vecdot(g, W)[:, None], W, value=-1)
            if cfg.clip:
                nn.utils.clip_grad_norm_(self.params, cfg.clip)
            self.adam.step()
            sae.normalize_decoder()
            torch._foreach_lerp_(self.ema, self.params, 1 - cfg.ema)
            self.silent += len(u)
            self.silent[indices[values > 0]] = 0
        self.steps += 1
        return {"nmse": nmse, "l0": (values > 0).sum(1).float().mean(), "dead": (self.silent > cfg.dead_tokens).sum()}

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
        return trainer


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
    p.add_argument("--bench", action="store_true", help="time the training step on random data (d = 768) and exit")
    options = vars(p.parse_args(argv))
    return options.pop("bench"), Config(**options)


def bench(cfg, d=768, repeats=7):
    """Print tokens/s of a whole optimizer step (no dead latents; 5 % dead, so that AuxK works) and of its encoder product alone.

    Random data; the three are timed in turn, medians are reported. Peak memory is the process's on CPU, the device's on CUDA.
    """
    cuda = cfg.device.startswith("cuda")
    cfg = resolve(dataclasses.replace(cfg, batch=cfg.batch or (PAPER_BATCH if cuda else 4096), tokens=10**10), d, 0)
    torch.manual_seed(cfg.seed)
    x = torch.randn(cfg.batch, d, device=cfg.device)
    sae = SAE(d, cfg.n_latents, cfg.k).to(cfg.device)
    trainer = Trainer(cfg, sae, 1 / d)
    dead = torch.randperm(cfg.n_latents, device=cfg.device)[: cfg.n_latents // 20]
    W, u = (t.to(sae.product_dtype or t.dtype) for t in (sae.W_enc.detach(), x))

    def product():
        for chunk in u.split(max(1, DENSE[u.device.type] // cfg.n_latents)):
            F.linear(chunk, W)

    def step(silent):
        trainer.silent.zero_()
        trainer.silent[dead] = silent
        trainer.step(x)

    work = {"encoder product alone": product, "step, nothing dead": lambda: step(0), "step, 5 % dead (AuxK)": lambda: step(2 * cfg.dead_tokens)}
    times = {name: [] for name in work}
    for i in range(repeats + 1):
        for name, f in work.items():
            start = time.perf_counter()
            f()
            if cuda:
                torch.cuda.synchronize()
            times[name] += [time.perf_counter() - start] if i else []  # the first round warms up
    median = {name: sorted(t)[len(t) // 2] for name, t in times.items()}
    print(f"n {cfg.n_latents}, k {cfg.k}, d {d}, batch {cfg.batch}, {cfg.precision} on {torch.cuda.get_device_name() if cuda else f'CPU, {torch.get_num_threads()} threads'}, torch {torch.__version__}")
    for name, t in median.items():
        print(f"  {name:<24} {cfg.batch / t:>12,.0f} tokens/s   {median['encoder product alone'] / t:6.1%} of the product's rate")
    if cuda:
        peak = torch.cuda.max_memory_allocated()
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"  peak memory              {peak / 1e9:12.2f} GB")


def main(argv=None):
    import harvest

    timing, cfg = parse_config(argv)
    keep_heap()
    cfg.device = harvest.pick_device(cfg.device)
    if timing:
        return bench(cfg)
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
