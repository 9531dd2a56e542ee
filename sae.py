"""
sae.py: train a TopK autoencoder (Gao et al. 2024, "Scaling and evaluating sparse autoencoders").

    python sae.py --n_latents 32768 --k 32           # from acts/ if there, else harvests or streams
    python sae.py --n_latents 32768 --k 32 --resume  # continue the run of that name, or begin it
    python sae.py --acts mine.npy --n_latents 8192   # activations (N, d) of any model
    python sae.py --export runs/NAME FOLDER          # for SAELens and what reads its files

The method, with x an activation of width d:

    u  = (x - mean(x)) / |x - mean(x)|                      normalize
    z  = ReLU(TopK_k(W_enc (u - b_pre) + b_enc))            SAE.encode     section 2.3
    û  = sum_i z_i W_dec[i] + b_pre                         SAE.decode
    e  = u - û                                              the residual, detached in AuxK
    L  = |e|^2 / c  +  alpha |e - ê|^2 / var(e)             objective      sections 2.3, 2.4
    ê  = sum_i z'_i W_dec[i], z' = ReLU(TopK_{k_aux}) over the dead latents only

    d = d_model    n = n_latents    k = active latents a token    B = tokens in a batch
    c = MSE of predicting the mean    values, indices (B, k): the code z, sparse

Section 1 is the whole method, plainly: paste it under the import lines of torch, and it trains.
Sections 2 to 4 are the same numbers: in steps, fast, on many processes. 5 and 8 are the program,
6 has other activation functions, 7 other libraries' files.
Copied alone into another project, this file needs torch and nothing else.
"""

import argparse
import copy
import ctypes
import dataclasses
import datetime
import functools
import gc
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
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
# 1. The method

def normalize(x):
    """x (..., d) -> (u, mean, norm): x = u * norm + mean, u of mean 0, norm 1; or 0: constant x."""
    mean = x.mean(-1, keepdim=True)
    centered = x - mean
    norm = centered.norm(dim=-1, keepdim=True)
    constant = norm <= 4 * torch.finfo(x.dtype).eps * x.shape[-1] ** 0.5 * mean.abs()  # rounding
    return centered / norm.masked_fill(constant, torch.inf), mean, norm.masked_fill(constant, 0.0)

def random_directions(rows, n, d, block=65536):
    """Rows `rows` (a range) of n random unit vectors (n, d), the same whichever are asked for."""
    seed = torch.randint(2**40, ()).item()
    blocks = range(rows.start // block, -(-rows.stop // block))
    gens = [torch.Generator().manual_seed(seed + b) for b in blocks]
    drawn = [torch.randn(min(block, n - b * block), d, generator=g) for b, g in zip(blocks, gens)]
    return F.normalize(torch.cat(drawn)[rows.start % block :][: len(rows)], dim=1)

class SAE(nn.Module):
    """TopK autoencoder, section 2.3: W_enc (n, d), b_enc (n), W_dec (n, d) of unit rows, b_pre (d).
    With k = n it is a plain ReLU autoencoder. `rows`: which latents it holds (a range); all."""
    def __init__(self, d_model, n_latents, k, rows=None):
        super().__init__()
        if not 1 <= k <= n_latents:
            raise ValueError(f"k = {k} must be between 1 and n_latents = {n_latents}")
        self.d_model, self.n_latents, self.k = d_model, n_latents, k
        self.normalized, self.meta = True, {}  # else it takes raw inputs; what it was trained on
        self.register_buffer("theta", None)  # or (n): z = a 1(a > theta); b_enc is less by it
        self.W_dec = nn.Parameter(random_directions(rows or range(n_latents), n_latents, d_model))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())  # tied at initialisation only
        self.b_enc = nn.Parameter(torch.zeros(len(self.W_dec)))
        self.b_pre = nn.Parameter(torch.zeros(d_model))

    def unit(self, x):
        """Raw x (..., d) -> (u, mean, norm) as the autoencoder sees it; x = u * norm + mean."""
        x = x.to(self.W_dec)
        return normalize(x) if self.normalized else (x, 0.0, 1.0)

    def pre_acts(self, u):
        if u.shape[-1] != self.d_model:
            raise ValueError(f"width {u.shape[-1]}, where the autoencoder has {self.d_model}")
        a = F.linear(u - self.b_pre, self.W_enc, self.b_enc)  # (..., d) @ (d, n) -> (..., n)
        return a if self.theta is None else a + self.theta * (a > 0)

    def encode(self, u, k=None):
        """u (..., d) -> z as values >= 0 and indices, (..., k) each, unsorted; any k <= n."""
        values, indices = self.pre_acts(u).topk(self.k if k is None else k, sorted=False)
        return values.relu(), indices

    def decode(self, values, indices):
        """z as values, indices (..., k) -> û (..., d)."""
        z, i = (t.reshape(-1, t.shape[-1]) for t in (values, indices))
        u_hat = F.embedding_bag(i, self.W_dec, per_sample_weights=z, mode="sum")  # (B, k) -> (B, d)
        return u_hat.view(*values.shape[:-1], self.d_model) + self.b_pre

    def forward(self, x):
        """x (..., d) in the model's own space -> its reconstruction there."""
        u, mean, norm = self.unit(x)
        x_hat = self.decode(*self.encode(u)) * norm + mean
        return x_hat.to(x.dtype) if x.is_floating_point() else x_hat

    @torch.no_grad()
    def normalize_decoder(self):
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

def objective(sae, u, c, dead, k_aux, alpha):
    """What a step minimises, |u - û|^2 / c + alpha |e - ê|^2 / var(e); sections 2.3, 2.4, A.2.
    u (B, d): normalised activations. c: MSE of predicting their mean, one constant a run. dead:
    numbers of the dead latents. k_aux: how many AuxK uses a token. alpha: its weight, 1/32."""
    u_hat = sae.decode(*sae.encode(u))
    aux = auxk(sae, u, (u - u_hat).detach(), dead, k_aux)
    return (u - u_hat).square().mean() / c + alpha * aux

def auxk(sae, u, e, dead, k_aux):
    """|e - ê|^2 / var(e): the dead latents learn to reconstruct the residual e (B, d). Only their
    rows of W_enc, b_enc and W_dec get a gradient. Exactly 0 without any."""
    if not len(dead):
        return e.new_zeros(())
    pre_acts = F.linear(u - sae.b_pre.detach(), sae.W_enc[dead], sae.b_enc[dead])  # -> (B, n_dead)
    values, j = pre_acts.topk(min(k_aux, len(dead)), sorted=False)
    e_hat = F.embedding_bag(j, sae.W_dec[dead], per_sample_weights=values.relu(), mode="sum")
    variance = (e - e.mean(0)).square().mean()
    return (e - e_hat).square().mean() * one_over(variance, e.square().mean(), e)

def one_over(variance, square, like):
    """1 / var(e), in the precision of `like` (..., d); 0 where e, of that mean square, is constant
    or nothing but rounding: the mean square of u is 1 / d."""
    eps = 100 * torch.finfo(like.dtype).eps
    rounding = eps * square.clamp_min(eps / like.shape[-1])
    return torch.where(variance > rounding, 1 / variance, 0.0).to(like.dtype)

@torch.no_grad()
def init_from_data(sae, u):
    """Appendix A, from normalised activations u (N, d): b_pre is their geometric median; W_enc is
    scaled so that reconstructions of random unit vectors have unit norm."""
    sae.b_pre.copy_(geometric_median(u))
    probe = F.normalize(torch.randn(256, sae.d_model), dim=1).to(u) + sae.b_pre
    sae.W_enc /= (sae.decode(*sae.encode(probe)) - sae.b_pre).norm(dim=1).mean()

@torch.no_grad()
def geometric_median(x, steps=100, tol=1e-6):
    """x (N, d) -> the point (d) with the least sum of distances: Weiszfeld's iteration, with Vardi
    and Zhang's (2000) correction, so that it does not stall where it meets a data point."""
    y = x.mean(0)
    for _ in range(steps):
        distance = (x - y).norm(dim=1)
        away = distance > 1e-12 * (1 + y.norm())
        if not away.any():
            break
        w = torch.where(away, 1 / distance.clamp_min(1e-30), 0.0)
        pull = (w @ (x - y)).norm()  # of the other points, against that of those at y
        stay = ((~away).sum() / pull.clamp_min(1e-30)).clamp(max=1.0)
        new = (1 - stay) * (w @ x / w.sum()) + stay * y
        moved, y = (new - y).norm(), new
        if moved <= tol * (distance.mean() + 1e-30):
            break
    return y

@torch.no_grad()
def nmse(sae, x, chunk=8192):
    """Of raw activations x (..., d): MSE over that of predicting their mean, normalised (2.1)."""
    u = [sae.unit(part)[0] for part in x.flatten(0, -2).split(chunk)]
    mean = sum(part.sum(0) for part in u) / sum(map(len, u))
    error = sum((part - sae.decode(*sae.encode(part))).square().sum() for part in u)
    return (error / sum((part - mean).square().sum() for part in u)).item()

def save(sae, path):
    """Write weights, k and meta to `path`, atomically."""
    own = {name: getattr(sae, name) for name in ("d_model", "n_latents", "k", "normalized", "meta")}
    own |= {"lam": sae.lam} if isinstance(sae, Pivotal) else {}
    weights = {name: p.detach().cpu() for name, p in sae.state_dict().items()}
    save_atomic(path, {"sae": plain(own), "state": weights})

def load(cls, path, device="cpu"):
    """Read what `save` wrote, a run's folder, one of OpenAI's files, or a folder of SAELens,
    sparsify, dictionary_learning or Gemma Scope. Raises ValueError for what is none of them."""
    path, names = Path(path), ("sae.pt", *FOREIGN)
    path = next((path / name for name in names if (path / name).exists()), path)
    if not path.is_file():
        raise ValueError(f"no autoencoder at {path} (of {', '.join(names)}); train one with: "
                         "python sae.py --n_latents 32768 --k 32")
    if path.name in FOREIGN:
        return from_foreign(cls, path).to(device)
    saved = load_file(path)
    if "pre_bias" in saved:
        return cls.from_openai(saved).to(device)
    if not {"sae", "state"} <= saved.keys():
        raise ValueError(f"{path} is neither an autoencoder written by sae.py nor one of OpenAI's")
    try:
        own = saved["sae"]
        sae = cls(own["d_model"], own["n_latents"], own["k"]).to(saved["state"]["W_dec"].dtype)
        sae.theta = torch.zeros_like(sae.b_enc).detach() if "theta" in saved["state"] else None
        sae.load_state_dict(saved["state"])
        sae.normalized, sae.meta = own["normalized"], dict(own["meta"])
        sae = pivotal(sae, own["lam"]) if "lam" in own else sae
    except (KeyError, TypeError, RuntimeError, AttributeError) as e:
        why = " ".join(f"{type(e).__name__}: {e}".split())
        raise ValueError(f"{path} is not whole ({why:.120})") from None
    return sae.to(device)

def activation_name(sae):
    """The name of its activation function."""
    if sae.k < sae.n_latents:
        return f"TopK k = {sae.k}"
    plain = "NeLU" if isinstance(sae, Pivotal) else "ReLU"
    return plain if sae.theta is None else "JumpReLU"

def about(sae):
    """What an autoencoder is, in a line."""
    said = [f"{name} {sae.meta[name]}" for name in ("model", "layer", "site") if name in sae.meta]
    told = [activation_name(sae), "normalised inputs" if sae.normalized else "raw inputs", *said]
    return f"d_model {sae.d_model}, n_latents {sae.n_latents}, {', '.join(told)}"

def require(holds, message):
    if not holds:
        raise ValueError(message)

def plain(x):
    """x as JSON has it, which any reader can load. Raises ValueError for what is not data."""
    def as_data(v):
        if isinstance(v, os.PathLike):
            return os.fspath(v)
        if getattr(v, "size", None) == 1 or getattr(v, "shape", None) == ():
            return v.item()  # a number of numpy or torch
        raise TypeError(f"{v!r:.60} is none of them")

    try:
        return json.loads(json.dumps(x, default=as_data))
    except TypeError as e:
        raise ValueError(f"only numbers, texts, lists and dicts can be saved: {e}") from None

def save_atomic(path, obj):
    """Save a list of bytes, or else by torch.save: `path` is whole in the end, or as it was."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as f:
            f.writelines(obj) if isinstance(obj, list) else torch.save(obj, f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except RuntimeError as e:
        raise e.__context__ if isinstance(e.__context__, OSError) else e  # torch's, of a full disk
    finally:
        part.unlink(missing_ok=True)

def read(path):
    """The text of a file; "" if there is none."""
    return path.read_text(errors="replace") if path.exists() else ""

def load_file(path, mmap=False):
    """A .pt, .npz or .safetensors as a dict, executing nothing. Raises ValueError for others."""
    try:
        if str(path).endswith(".safetensors"):
            return read_safetensors(path)
        if str(path).endswith(".npz"):
            import numpy as np
            return {name: torch.from_numpy(a) for name, a in np.load(path).items()}
        return dict(torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap))
    except Exception as e:  # zip, pickle and storage errors come in many types
        why = f"({type(e).__name__}); it may be cut short or of another kind"
        raise ValueError(f"{path} is not a readable file of weights {why}") from e

# Methods that a pasted SAE can do without.
SAE.save, SAE.load, SAE.extra_repr = save, classmethod(load), about
SAE.device, SAE.dtype = (property(lambda s, a=a: getattr(s.W_dec, a)) for a in ("device", "dtype"))


# --------------------------------------------------------------------------------------------------
# 2. A step
# `objective` and its gradients, made from what a `Sparse` (section 3) selects.

def losses(sae, u, c, aux, multi_topk=False, batch=False, prefixes=()):
    """u (B, d) -> (loss, NMSE, residual e (B, d), values, indices (B, k)), all but loss detached.
    loss: NMSE, or L(k) + L(4k) / 8 (Multi-TopK, section 5.3), or the mean with those of codes cut
    to the first latents (Matryoshka, Bussmann et al. 2025), plus aux.error, yet unweighted."""
    k = min(4 * sae.k, sae.n_latents) if multi_topk else sae.k
    dead = aux.dead, aux.k
    (code, *dead_code), cut = batch_code(sae, u, *dead) if batch else (sae.select(u, k, *dead), 0)
    values, support = sae.activate(u, *code)
    values = values * (values.detach() >= cut) if batch else values
    error = lambda z: (u - sae.decode(z, support)).square().mean() / c
    others = [error(values * (support.indices < n)) for n in prefixes]
    if multi_topk:
        others = [error(values) / 8]
        values, support = sae.narrower(values, support, sae.k)
    e = u - sae.decode(values, support)
    nmse, e = e.square().mean() / c, e.detach()
    loss = (nmse + sum(others)) / (1 + len(prefixes)) + aux.error(u, e, *dead_code)
    return loss, nmse.detach(), e, values.detach(), support.indices

class AuxK:
    """alpha times `auxk`, in a step. var(e) is of the whole batch, known at its end: until then the
    gradient is collected without that weight, on copies of the dead rows: no (n, d) matrix."""
    def __init__(self, trainer):
        cfg, self.sae = trainer.cfg, trainer.sae
        self.k = min(cfg.k_aux, trainer.n_dead) if cfg.aux_coef else 0
        silent = (trainer.silent > cfg.dead_tokens).int().argsort(descending=True, stable=True)
        self.dead = silent[: trainer.own_dead if self.k else 0]  # their number is known: no wait
        self.params = self.sae.W_enc, self.sae.b_enc, self.sae.W_dec
        self.rows = [p.detach()[self.dead].requires_grad_() for p in self.params]

    def error(self, u, e, code=None):
        """|e - ê|^2 with ê from `code`, the (values, Support) over the dead latents."""
        return (e - self.sae.decode_rows(u, *self.rows, *code)).square().mean() if self.k else 0.0

    def add(self, weight, everywhere):
        """Add `weight` times the gradient, summed by `everywhere` over the whole batch."""
        for p, rows in zip(self.params, self.rows if len(self.dead) else ()):
            p.grad.index_add_(0, self.dead, everywhere(rows.grad) * weight)

def peek(numbers):
    """Named scalars on a device -> a function that waits for these alone: they, as floats."""
    x = torch.stack(list(numbers.values()))
    if not x.is_cuda:
        return lambda: dict(zip(numbers, x.tolist()))
    host = x.to("cpu", non_blocking=True)  # pinned
    copied = torch.cuda.current_stream(x.device).record_event()
    return lambda: copied.synchronize() or dict(zip(numbers, host.tolist()))

class Trainer:
    """All that a step reads and writes: weights, Adam, EMA, dead counters. `state()`: a checkpoint.
    cfg: a Config from `resolve`. sae: an initialised Sparse on its device. c: as in `objective`."""
    def __init__(self, cfg, sae, c):
        self.cfg, self.sae, self.c, self.steps = cfg, sae, c, 0
        sae.product_dtype = torch.bfloat16 if cfg.precision == "bf16" else None
        if cfg.precision == "bf16" and sae.W_dec.is_cuda:
            torch.set_float32_matmul_precision("high")  # TF32 for AuxK's dense products
        self.params = list(sae.parameters())
        self.adam = torch.optim.Adam(self.params, cfg.lr, (0.9, 0.999), eps=6.25e-10, fused=True)
        self.ema = [torch.zeros_like(p) for p in self.params]
        self.silent = torch.zeros_like(sae.b_enc, dtype=torch.long)  # tokens since each fired
        self.n_dead = self.own_dead = 0  # of all latents, of those that are here
        self.warmup = max(1, cfg.tokens // cfg.batch // 10)  # steps in which the penalty rises
        self.prefixes = [int(n) for n in cfg.prefixes.split(",") if n]
        self.recent = None  # some activations u of the last batch, to calibrate on

    def step(self, x, **wishes):
        """One optimizer step on raw activations x (B, d) -> nmse, l0, dead, and whether anyone has
        each wish (name=bool). Raises ValueError for a wrong width or batch, or no finite loss."""
        parts, d = self.cfg.accumulate, self.sae.d_model
        require(x.shape[1] == d, f"these activations have width {x.shape[1]}, the autoencoder {d}")
        require(len(x) % parts == 0, f"--accumulate {parts} does not divide a batch of {len(x)}")
        aux, fired, tally, share = AuxK(self), torch.zeros_like(self.silent), {}, self.share / parts
        self.adam.zero_grad()
        for i, part in enumerate(x.chunk(parts), 1):
            loss = self.forward(part, share, aux, fired, tally)
            if i == parts:  # what the host asks about is on its way during the last backward pass
                known, over_variance = self.tell(tally, fired, len(x), wishes)
            self.backward(loss * share, i == parts)
        known = known()
        require(math.isfinite(known["loss"]), f"the loss is {known['loss']} at step "
                f"{self.steps + 1}; lower --lr (now {self.cfg.lr:g}) or look for bad activations")
        aux.add(self.cfg.aux_coef * over_variance, self.everywhere)
        self.own_dead, self.n_dead = int(known["own_dead"]), round(known["dead"])
        self.update()
        return {name: known[name] for name in ("nmse", "l0", *wishes)} | {"dead": self.n_dead}

    def forward(self, x, share, aux, fired, tally):
        """Raw x (b, d), a part of the batch -> its loss; counts in `tally`, marks who `fired`."""
        cfg, u = self.cfg, normalize(x.to(self.sae.W_dec))[0]
        self.recent = u[:8192].clone() if cfg.activation == "batchtopk" else None
        if (kind := cfg.activation) in DENSE_ACTIVATIONS:
            found = dense_losses(self.sae, u, self.c, kind, self.penalty(self.steps + 1))
        else:
            wide = cfg.multi_topk, kind == "batchtopk", self.prefixes
            found = losses(self.sae, u, self.c, aux, *wide)
        loss, nmse, e, values, indices = found
        fires, mean = values > 0, e.mean(0)
        fired.scatter_reduce_(0, indices.flatten(), fires.flatten().long(), "amax")
        square = mean.double().square().mean() + (e - mean).square().mean()
        counted = {"loss": loss.detach(), "nmse": nmse, "l0": fires.sum(1).double().mean(),
                   "mean": mean, "square": square}
        for name, number in counted.items():
            tally[name] = tally.get(name, 0.0) + share * number.double()
        return loss

    def tell(self, tally, fired, tokens, wishes):
        """Count the dead and sum up the tally -> (function that gives it as floats, 1 / var(e))."""
        since = self.silent + round(tokens / self.share)
        self.silent = torch.where(self.everywhere(fired) > 0, 0, since)
        own_dead = (self.silent > self.cfg.dead_tokens).sum().double()
        tally["dead"] = own_dead * self.share
        tally |= {name: own_dead.new_full((), float(wish)) for name, wish in wishes.items()}
        tally = self.total(tally)
        mean, square = tally.pop("mean"), tally["square"]
        over_variance = one_over(square - mean.square().mean(), square, self.sae.W_dec)
        return peek(tally | {"own_dead": own_dead}), over_variance

    @torch.no_grad()
    def update(self):
        """From gradients to weights and their average; decoder rows keep their unit norm (A.1)."""
        decay = self.cfg.ema
        self.project()
        if self.cfg.clip:
            nn.utils.clip_grads_with_norm_(self.params, self.cfg.clip, self.gradient_norm())
        self.adam.step()
        self.sae.normalize_decoder()
        self.steps += 1
        weight = (1 - decay) / (1 - decay**self.steps)  # bias-corrected, as Adam's moments
        torch._foreach_lerp_(self.ema, self.params, weight)

    def project(self):
        """Drop the radial part of the decoder's gradient, which Adam would turn into another."""
        W_dec = self.sae.W_dec
        for g, W in zip(W_dec.grad.split(4096), W_dec.split(4096)):  # a few at a time
            g.addcmul_(torch.linalg.vecdot(g, W)[:, None], W, value=-1)

    # What differs where a trainer is one of several (section 4).
    share = 1.0  # of every batch that this trainer works on
    everywhere = lambda self, x: x  # x, summed over the whole batch
    total = lambda self, tally: tally  # named numbers, summed over the whole batch and all latents
    backward = lambda self, loss, last: loss.backward()
    gradient_norm = lambda self: nn.utils.get_total_norm([p.grad for p in self.params])

    @torch.no_grad()
    def averaged(self):
        """The EMA weights (appendix A) as an SAE with unit decoder rows."""
        sae = copy.deepcopy(self.sae)
        torch._foreach_copy_(list(sae.parameters()), self.ema)
        sae.normalize_decoder()
        return sae

    def inference(self, sae=None):
        """What is evaluated and saved of these weights, or of such as `averaged` gives."""
        lam = self.penalty(max(1, self.steps))
        return folded(sae or self.sae, self.cfg.activation, self.recent, lam)

    def penalty(self, steps):
        """`--l1` in that step: it rises over a tenth of them, but for ReLU."""
        return self.cfg.l1 * (1 if self.cfg.activation == "relu" else min(1, steps / self.warmup))

    def state(self):
        """A checkpoint, for `restore`: of the latents that are here."""
        tensors = {"silent": self.silent.cpu()}
        for (name, p), average in zip(self.sae.named_parameters(), self.ema):
            adam = self.adam.state[p]
            tensors |= {name: p.detach().cpu(), f"{name}.ema": average.cpu()}
            tensors |= {f"{name}.m": adam["exp_avg"].cpu(), f"{name}.v": adam["exp_avg_sq"].cpu()}
        known = {"config": dataclasses.asdict(self.cfg), "meta": self.sae.meta}
        return known | {"steps": self.steps, "c": self.c, "tensors": tensors}


# --------------------------------------------------------------------------------------------------
# 3. Fast
# The same numbers with no (B, n) matrix in autograd, and nothing of size (B, k, d) ever.

DENSE = {"cpu": 2**24, "cuda": 2**29}  # pre-activations at once: 32 MB and 1 GB in bf16
NARROW = {"cpu": 3, "cuda": 16}  # a dense product is faster if n is at most so many times k

def fused(x):
    """Whether the Triton kernels take x: floats on CUDA, short of double precision."""
    return triton is not None and x.is_cuda and x.dtype != torch.float64

def topk(x, k):
    """x (..., n) -> values, indices (..., k) of each row's k largest: exact, unsorted; k <= n."""
    n = x.shape[-1]
    rows = x.reshape(math.prod(x.shape[:-1]), n)
    kernel = fused(x) and k < n and k * n <= 2**28  # it searches about sqrt(k n) numbers at once
    return tuple(t.view(*x.shape[:-1], k) for t in (topk_kernel if kernel else topk_twin)(rows, k))

def topk_twin(x, k, group=64):
    """x (B, n) -> values, indices (B, k). The k largest lie in the k groups of the largest maxima:
    one streaming pass finds those; what is left is small, and is searched the same way."""
    n = x.shape[1]
    while group > 4 and (n % group or n < 4 * k * group or not k):
        group //= 2
    if group <= 4:
        return x.topk(k, dim=-1, sorted=False)
    rows = x.reshape(-1, n // group, group)
    # bf16 above 0 orders like its bits as an integer, whose maxima are 7 x faster on CPU
    as_bits = x.dtype == torch.bfloat16 and not x.is_cuda
    maxima = rows.view(torch.int16).amax(-1).view(x.dtype) if as_bits else rows.amax(-1)
    best, groups = maxima.topk(k, sorted=False)  # of (B, n / group)
    start = torch.arange(len(rows), device=x.device)[:, None] * (n // group)
    candidates = rows.view(-1, group).index_select(0, (groups + start).flatten())
    values, j = topk_twin(candidates.view(len(rows), k * group), k, group // 8)
    indices = groups.gather(1, j // group) * group + j % group
    if as_bits and (unsure := (best < 0).any(1)).any():  # fewer than k maxima of at least zero
        values[unsure], indices[unsure] = x[unsure].topk(k, sorted=False)
    return values, indices

class Support:
    """Where a code's values are, indices (B, k) among n latents, and what is done with them: by a
    kernel on CUDA or its twin; as a dense matrix where it is not so sparse (AuxK's of few dead)."""
    def __init__(self, indices, n):
        self.indices, self.n, self.k = indices, n, indices.shape[1]

    dense = property(lambda self: self.n <= NARROW[self.indices.device.type] * self.k)

    @functools.cached_property
    def by_latent(self):
        """All pairs by latent, for sums without atomics: their order (B k), starts (n + 1)."""
        latents, order = self.indices.flatten().sort(stable=True)
        every = torch.arange(self.n + 1, device=order.device)
        return order, torch.searchsorted(latents, every)

    def matrix(self, values):
        """(B, k) -> (B, n), the code as a dense matrix."""
        return values.new_zeros(len(values), self.n).scatter_add_(1, self.indices, values)

    def gather_sum(self, values, W):
        """out[b] = sum_j values[b, j] W[indices[b, j]]: (B, k), (n, d) -> (B, d)."""
        if self.dense:
            return self.matrix(values) @ W
        return (gather_sum_kernel if fused(W) else gather_sum_twin)(values, self.indices, W)

    def gather_dot(self, G, W):
        """out[b, j] = G[b] . W[indices[b, j]]: (B, d), (n, d) -> (B, k)."""
        if self.dense:
            return (G @ W.T).gather(1, self.indices)
        return (gather_dot_kernel if fused(W) else gather_dot_twin)(G.contiguous(), W, self.indices)

    def scatter_sum(self, values, G):
        """out[i] = sum of values[b, j] G[b] where indices[b, j] = i: (B, k), (B, d) -> (n, d)."""
        if self.dense:
            return self.matrix(values).T @ G
        run = scatter_sum_kernel if fused(G) else scatter_sum_twin
        return run(values.flatten(), *self.by_latent, G.contiguous(), self.k)

def gather_sum_twin(values, indices, W):
    return F.embedding_bag(indices, W, per_sample_weights=values, mode="sum")

def gather_dot_twin(G, W, indices):
    B, k = indices.shape
    starts = torch.arange(0, B * k, k, device=G.device)
    bag = torch.arange(B, device=G.device).repeat_interleave(k)
    backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return backward(G, W, indices.flatten(), starts, bag, 0).view(B, k)

def scatter_sum_twin(values, order, starts, G, k):
    z = values[order]
    return F.embedding_bag(order // k, G, starts[:-1], per_sample_weights=z, mode="sum")

class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, support, W_dec):
        ctx.save_for_backward(values, W_dec)
        ctx.support = support
        return support.gather_sum(values, W_dec)

    @staticmethod
    def backward(ctx, g):
        values, W_dec = ctx.saved_tensors
        d_values = ctx.support.gather_dot(g, W_dec) if ctx.needs_input_grad[0] else None
        d_W_dec = ctx.support.scatter_sum(values, g) if ctx.needs_input_grad[2] else None
        return d_values, None, d_W_dec

def sparse_decode(values, indices, W_dec):
    """sum_j values[j] W_dec[indices[j]]: (..., k), (..., k) or their Support, (n, d) -> (..., d).
    Differentiable in values and W_dec."""
    flat = values.reshape(-1, values.shape[-1])
    if not isinstance(indices, Support):
        both = tuple(values.shape), tuple(indices.shape)
        require(both[0] == both[1], f"values {both[0]} and indices {both[1]} must be of one shape")
        indices = Support(indices.reshape(flat.shape), len(W_dec))
    return _Decode.apply(flat, indices, W_dec).view(*values.shape[:-1], W_dec.shape[1])

class _Activate(torch.autograd.Function):
    """What `select` found, values (B, k), with the gradient of ReLU(W_enc (u - b_pre) + b_enc)."""
    @staticmethod
    def forward(ctx, u, W_enc, b_enc, b_pre, values, support):
        ctx.save_for_backward(u, W_enc, b_pre, values)
        ctx.support = support
        return values.view_as(values)

    @staticmethod
    def backward(ctx, g):
        u, W_enc, b_pre, values = ctx.saved_tensors
        for_u, for_W, _, for_b_pre, *_ = ctx.needs_input_grad
        g, support = g * (values > 0), ctx.support  # ReLU
        d_b_enc = support.scatter_sum(g, torch.ones_like(u[:, :1]))[:, 0]
        d_b_pre = -(d_b_enc @ W_enc) if for_b_pre else None  # summed before the product
        d_W_enc = support.scatter_sum(g, u - b_pre) if for_W else None
        d_u = support.gather_sum(g, W_enc) if for_u else None
        return d_u, d_W_enc, d_b_enc, d_b_pre, None, None

class Sparse(SAE):
    """An SAE that encodes some tokens at a time, by one dense product, and differentiates only what
    that selects. `product_dtype`: the product's precision; default: the weights'."""
    product_dtype = None

    @torch.no_grad()
    def select(self, u, k, dead=None, k_aux=0):
        """u (B, d) -> [(values, Support)] of the k largest pre-activations, after a ReLU; with
        k_aux also of the k_aux largest among `dead` (n_dead), by their places there."""
        W, b = (p.to(self.product_dtype or p.dtype) for p in (self.W_enc, self.b_enc))
        codes, dead_codes = [], []
        for v in (u - self.b_pre).to(W.dtype).split(max(1, DENSE[u.device.type] // len(W))):
            pre_acts, width = F.linear(v, W, b), min(k, len(W))  # (chunk, d) @ (d, n) -> (chunk, n)
            if k == self.n_latents:  # a ReLU: as wide as it needs to be
                width = max(1, int((pre_acts > 0).sum(1).max())) if len(v) else 1
            codes.append(topk(pre_acts, width))
            if k_aux:  # the ReLU first: most are negative, which `topk` likes less
                values = pre_acts.index_select(1, dead).relu_()
                dead_codes.append(topk(values, min(k_aux, len(dead))))
            del pre_acts  # before the next ones are made
        code = self.selected(u, codes, k, len(W))
        return [code, self.selected(u, dead_codes, k_aux, len(dead))] if k_aux else [code]

    def selected(self, u, codes, k, n):
        """Codes of chunks, which may differ in width -> (values (B, k), their Support)."""
        width = max(values.shape[1] for values, _ in codes)
        pad = lambda part: F.pad(part, (0, width - part.shape[1]))
        values, indices = (torch.cat([pad(part) for part in parts]) for parts in zip(*codes))
        return self.keep(values, k).relu().to(u.dtype), Support(indices, n)

    def activate(self, u, values, support):
        """What `select` found -> (values with a gradient, Support)."""
        u, b_pre = self.apart(u), self.apart(self.b_pre)
        return _Activate.apply(u, self.W_enc, self.b_enc, b_pre, values, support), support

    def encode(self, u, k=None):
        """As SAE.encode; with k = n only as many columns come back as the batch needs."""
        d, k = self.d_model, self.k if k is None else k
        require(u.shape[-1] == d, f"width {u.shape[-1]}, where the autoencoder has {d}")
        require(0 <= k <= self.n_latents, f"k = {k} of {self.n_latents} latents")
        flat = u.reshape(-1, d).to(u.dtype if u.is_floating_point() else self.W_dec.dtype)
        wide = k if self.theta is None else self.n_latents
        values, support = self.activate(flat, *self.select(flat, wide)[0])
        if self.theta is not None:
            jumped = torch.where(values > 0, values + self.theta[support.indices], 0.0)
            values, support = self.narrower(jumped, support, k)
        return tuple(t.view(*u.shape[:-1], t.shape[1]) for t in (values, support.indices))

    def decode(self, values, indices):
        """As SAE.decode; in place of indices (..., k) also a Support."""
        return self.together(sparse_decode(values, indices, self.W_dec)) + self.b_pre

    def decode_rows(self, u, W_enc, b_enc, W_dec, values, support):
        """ê (B, d) from rows of the dead latents alone; no gradient reaches b_pre."""
        e_hat = torch.zeros_like(u)
        if support.n:
            values = _Activate.apply(u, W_enc, b_enc, self.b_pre.detach(), values, support)
            e_hat = sparse_decode(values, support, W_dec)
        return self.together(e_hat)

    def narrower(self, values, support, k):
        """A code wider than k -> (values, Support) of its k largest."""
        best = topk(values.detach(), min(k, values.shape[1]))[1]
        values, indices = values.gather(1, best), support.indices.gather(1, best)
        return values * (self.keep(values.detach(), k) > 0), Support(indices, support.n)

    # What differs where only some of the latents are here (section 4).
    keep = lambda self, values, k: values  # the own largest (B, <= k), those beyond the k of all 0
    together = lambda self, x: x  # x, summed over all latents
    apart = lambda self, x: x  # x, the same for all latents: so is the sum of its gradients

def keep_heap():
    """Have glibc reuse freed memory: page faults of large temporaries are a quarter of a step."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD

# The Triton kernels, each equal to its twin above. TRITON_INTERPRET=1 runs them on CPU.

if triton:
    @triton.jit
    def _topk(x, out_values, out_indices, maxima, chosen, n, k, m, BITS: tl.constexpr,
              GROUP: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr, K: tl.constexpr):
        """One program a row: maxima of groups; the k groups of the largest; the k largest there."""
        row = tl.program_id(0).to(tl.int64)
        x, maxima, chosen = x + row * n, maxima + row * m, chosen + row * k
        for start in range(0, m, STEP):
            g = start + tl.arange(0, STEP)
            at = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            keys = _sortable(tl.load(x + at, mask=at < n, other=float("-inf")), BITS)
            tl.store(maxima + g, tl.max(keys, axis=1), mask=g < m)
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
        """Floats -> integers of the same order, NaN highest. BITS: 16 for bf16, else 32."""
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - BITS)

    @triton.jit
    def _largest(keys, real, k, BITS: tl.constexpr):
        """Which k of the real keys are the largest (ties: the first), and their places there."""
        least = tl.full([], -(1 << (BITS - 1)), tl.int64)  # becomes the k-th largest, bit by bit
        for i in tl.static_range(BITS):
            higher = least + (1 << (BITS - 1 - i))
            count = tl.sum((real & (keys >= higher.to(tl.int32))).to(tl.int32))
            least = tl.where(count >= k, higher, least)
        above, tied = real & (keys > least.to(tl.int32)), real & (keys == least.to(tl.int32))
        spare = k - tl.sum(above.to(tl.int32))
        take = above | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= spare))
        return take, tl.cumsum(take.to(tl.int32), axis=0) - 1

    @triton.jit
    def _gather_sum(values, indices, W, out, d, k, J: tl.constexpr, D: tl.constexpr):
        b, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * D + tl.arange(0, D)
        total = tl.zeros([D], tl.float32)
        for start in range(0, k, J):
            j = start + tl.arange(0, J)
            v = tl.load(values + b * k + j, mask=j < k, other=0.0)
            i = tl.load(indices + b * k + j, mask=j < k, other=0)
            used = (v != 0)[:, None] & (col < d)[None, :]
            w = tl.load(W + i[:, None] * d + col[None, :], mask=used, other=0.0)  # (J, D)
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
            used = (j < k)[:, None] & (col < d)[None, :]
            w = tl.load(W + i[:, None] * d + col[None, :], mask=used, other=0.0)  # (J, D)
            total += tl.sum(w * g[None, :], axis=1)
        tl.store(out + b * k + j, total, mask=j < k)

    @triton.jit
    def _scatter_sum(values, order, starts, pieces, latent_of, G, out, parts, n, d, k,
                     PIECE: tl.constexpr, J: tl.constexpr, D: tl.constexpr):
        """One program a piece, PIECE pairs of a latent: its first into `out`, more into `parts`."""
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
                used = (v != 0)[:, None] & (col < d)[None, :]
                g = tl.load(G + (pair // k)[:, None] * d + col[None, :], mask=used, other=0.0)
                total += tl.sum(v[:, None] * g, axis=0)  # of (J, D)
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

def launch(kernel, grid, x, *args, **kw):
    with torch.cuda.device_of(x):  # Triton takes the current one
        kernel[grid](x, *args, **kw)

def topk_kernel(x, k):
    B, n = x.shape
    group = 2 ** int(math.log2(n / k) / 2)  # as many groups as numbers in k groups
    m = triton.cdiv(n, group)
    M, K = triton.next_power_of_2(m), triton.next_power_of_2(k)
    values, indices = x.new_empty(B, k), x.new_empty(B, k, dtype=torch.long)
    maxima, chosen = (x.new_empty(B, size, dtype=torch.int32) for size in (m, k))
    sizes = {"BITS": 16 if x.dtype == torch.bfloat16 else 32, "GROUP": group, "M": M, "K": K}
    sizes["num_warps"] = min(16, max(4, max(M, K * group) // 512))  # else they spill
    args = x.contiguous(), values, indices, maxima, chosen, n, k, m
    launch(_topk, (B,), *args, STEP=min(M, 4096 // group), **sizes)
    return values, indices

def gather_sum_kernel(values, indices, W):
    (B, k), d = indices.shape, W.shape[1]
    out, grid = W.new_empty(B, d), (B, triton.cdiv(d, 256))
    args = values.contiguous(), indices.contiguous(), W.contiguous()
    launch(_gather_sum, grid, *args, out, d, k, J=8, D=256)
    return out

def gather_dot_kernel(G, W, indices):
    (B, k), d = indices.shape, W.shape[1]
    out, grid = W.new_empty(B, k), (B, triton.cdiv(k, 8))
    launch(_gather_dot, grid, G, W.contiguous(), indices.contiguous(), out, d, k, J=8, D=256)
    return out

def scatter_sum_kernel(values, order, starts, G, k, piece=128):
    n, d = len(starts) - 1, G.shape[1]
    # A latent's pairs, thousands or none, in a piece or more: `pieces` (n + 1), each one's first.
    pieces = F.pad(((starts.diff() + piece - 1) // piece).clamp_min(1).cumsum(0), (1, 0))
    spare = len(order) // piece  # as many more at most: the true number need not be waited for
    numbers = torch.arange(n + spare, device=G.device)
    latent_of = torch.searchsorted(pieces, numbers, right=True) - 1
    out, parts = G.new_empty(n, d), G.new_empty(spare, d)
    J, D = (8, 256) if d > 1 else (128, 1)  # one column: the gradient of b_enc
    columns, args = triton.cdiv(d, D), (order, starts, pieces, latent_of, G, out, parts, n, d, k)
    launch(_scatter_sum, (n + spare, columns), values.contiguous(), *args, PIECE=piece, J=J, D=D)
    launch(_sum_parts, (n, columns), pieces, out, parts, d, D=D)
    return out


# --------------------------------------------------------------------------------------------------
# 4. Large
# Replicas, each with a part of the batch, times shards of the latents (section 8): same numbers.

class Mesh:
    """This process among replicas x shards, and how they talk; alone, it gives back what it got."""
    replicas, shards, replica, shard, world, rank, groups = 1, 1, 0, 0, 1, 0, {}

    @classmethod
    def join(cls, shards=1, device="cpu"):
        """That of torchrun's processes, or alone. Raises ValueError if `shards` don't divide it."""
        mesh, world = cls(), int(os.environ.get("WORLD_SIZE", 1))
        require(world % shards == 0, f"processes: {world} cannot be cut into {shards} shards; "
                f"start a multiple: torchrun --nproc_per_node {shards} sae.py ...")
        if "WORLD_SIZE" in os.environ:
            kind, backend = ("cuda", "nccl") if device.startswith("cuda") else ("cpu", "gloo")
            if kind == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            if not dist.is_initialized():
                limit = datetime.timedelta(minutes=10)
                store, rank, world = next(dist.rendezvous("env://", timeout=limit))
                if os.environ.get("GROUP_WORLD_SIZE") == "1":  # restarts reuse it: pytorch#135712
                    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
                who = {"store": store, "rank": rank, "world_size": world, "timeout": limit}
                dist.init_process_group(backend, **who)
            shape, names = (world // shards, shards), ("replica", "shard")
            grid = dist.device_mesh.init_device_mesh(kind, shape, mesh_dim_names=names)
            mesh.groups = dict(zip(names, grid.get_all_groups()), world=dist.group.WORLD)
            mesh.world, mesh.rank = world, dist.get_rank()
            (mesh.replicas, mesh.shards), (mesh.replica, mesh.shard) = shape, grid.get_coordinate()
        return mesh

    def part(self, n):
        """The range of this shard's latents among n. Raises ValueError if n does not divide."""
        require(n % self.shards == 0, f"n_latents = {n} is no multiple of --shards {self.shards}")
        return range(self.shard * n // self.shards, (self.shard + 1) * n // self.shards)

    def all_reduce(self, x, over):
        """x, summed in place over "shard", "replica" or "world"."""
        if self.groups:
            dist.all_reduce(x, group=self.groups[over])
        return x

    def all_gather(self, x, over, dim=0):
        """The x of all, of one shape, joined along `dim`."""
        if not self.groups:
            return x
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(self.groups[over]))]
        dist.all_gather(parts, x.contiguous(), group=self.groups[over])
        return torch.cat(parts, dim)

    def broadcast(self, x):
        """Any small object of rank 0, on all."""
        box = [x]
        if self.groups:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    barrier = lambda self: dist.barrier() if self.groups else None
    sae = lambda self, *args: Shard(*args, self) if self.shards > 1 else Sparse(*args)
    trainer = lambda self, *args: ParallelTrainer(*args, self) if self.groups else Trainer(*args)
    __deepcopy__ = lambda self, memo: self

    def leave(self):
        """A group that lives until the interpreter ends aborts it: gloo's threads, torch 2.13."""
        if self.groups:
            dist.barrier()
            self.groups.clear()
            dist.destroy_process_group()
            gc.collect()

    @contextmanager
    def watch(self, trainer):
        """A lost process is a ValueError, in one line."""
        try:
            yield
        except RuntimeError as e:
            if not self.groups or isinstance(e, torch.OutOfMemoryError):
                raise
            why = f"at step {trainer.steps + 1} ({str(e).splitlines()[0][:90]})"
            raise ValueError(f"lost contact with another process of this run {why}; "
                             "continue from the last checkpoint with --resume") from e

ALONE = Mesh()

class Shard(Sparse):
    """The latents that one of several processes holds. `indices` are numbers of its own rows."""
    def __init__(self, d_model, n_latents, k, mesh):
        super().__init__(d_model, n_latents, k, mesh.part(n_latents))
        self.mesh = mesh

    def keep(self, values, k):
        """All shards choose from the same numbers: ties break alike, and exactly k survive."""
        mine = F.pad(values, (0, k - values.shape[1]), value=-math.inf)  # as wide everywhere
        everyone = self.mesh.all_gather(mine, "shard", dim=1)  # (B, shards k)
        kept = torch.zeros_like(everyone, dtype=torch.bool).scatter_(1, topk(everyone, k)[1], True)
        own = kept.chunk(self.mesh.shards, 1)[self.mesh.shard][:, : values.shape[1]]
        return torch.where(own, values, 0.0)

    def together(self, x):
        """The sum over shards. All go on alike with it: its gradient is whole, and passes as is."""
        x = x.clone()
        self.mesh.all_reduce(x.detach(), "shard")
        return x

    def apart(self, x):
        """x, the same for all shards; each has the gradient of its own latents, which is summed."""
        x = x.view_as(x)
        if x.requires_grad:
            x.register_hook(lambda g: self.mesh.all_reduce(g.clone(), "shard"))
        return x

class ParallelTrainer(Trainer):
    """A Trainer with its shard's latents, and its replica's part of every batch."""
    def __init__(self, cfg, sae, c, mesh):
        super().__init__(cfg, sae, c)
        self.mesh, self.share = mesh, 1 / mesh.replicas

    def everywhere(self, x):
        return self.mesh.all_reduce(x, "replica")

    def backward(self, loss, last):
        """Gradients are summed while the last backward pass goes on."""
        works, group = [], self.mesh.groups["replica"]
        add = lambda p: works.append(dist.all_reduce(p.grad, group=group, async_op=True))
        hooks = [p.register_post_accumulate_grad_hook(add) for p in self.params if last]
        loss.backward()
        for work, hook in zip(works, hooks):
            work.wait()
            hook.remove()

    def total(self, tally):
        own = {"l0": 1, "dead": 1}  # of each shard's latents; all else is the same on all shards
        parts = [v.flatten() / own.get(name, self.mesh.shards) for name, v in tally.items()]
        total = self.mesh.all_reduce(torch.cat(parts), "world").split([len(v) for v in parts])
        return {name: new.view_as(v) for (name, v), new in zip(tally.items(), total)}

    def gradient_norm(self):
        own = nn.utils.get_total_norm([p.grad for p in self.params if p is not self.sae.b_pre])
        squares = self.mesh.all_reduce(own.square(), "shard")
        return (squares + self.sae.b_pre.grad.norm().square()).sqrt()


# --------------------------------------------------------------------------------------------------
# 5. A run

class Run:
    """A run directory: config.json, log.jsonl, the last two checkpoint-STEP/, in the end sae.pt.
    A checkpoint is a folder with a file a shard, which gets its name when it is whole."""
    def __init__(self, cfg, mesh=ALONE):
        self.cfg, self.mesh, self.path = cfg, mesh, Path(cfg.out)
        self.steps, self.paces = cfg.tokens // cfg.batch, []
        self.begun = self.saved_at = time.time()
        self.launch = os.getppid() if mesh.groups else 0  # torchrun, the same when it restarts us
        restarted = mesh.groups and f'"launch": {self.launch}\n' in read(self.path / "config.json")
        found = [*sorted(self.path.glob("checkpoint*.pt")), *self.checkpoints()][::-1]
        seen = found, (self.path / "sae.pt").exists(), restarted
        self.found, self.finished, restarted = mesh.broadcast(seen)
        require(cfg.resume or restarted or not (self.found or self.finished),
                f"{cfg.out} already holds a run; continue it with --resume or choose another --out")

    def checkpoints(self):
        """Those that are whole, oldest first."""
        return sorted(self.path.glob("checkpoint-" + 9 * "[0-9]"))

    def begin(self, first, meta):
        """A Trainer at step 0, from the first batches [(b, d)] of the run."""
        cfg, mesh = self.cfg, self.mesh
        widths = sorted({x.shape[1] for x in first})
        require(len(widths) == 1, f"the first batches have widths {widths}")
        x = torch.cat([mesh.all_gather(x.to(cfg.device), "world") for x in first])
        u = normalize(x[:32768].float())[0]
        c = (u - u.mean(0)).square().mean().item()
        require(math.isfinite(c), "NaN or Inf in the first activations")
        alike = c <= 1e-10 / u.shape[1]  # but for rounding: the mean square of u is 1 / d
        require(not alike, "all these activations are alike; there is nothing to reconstruct")
        torch.empty(len(mesh.part(cfg.n_latents)), u.shape[1])  # if there is no room, now
        with torch.random.fork_rng([]):
            torch.manual_seed(cfg.seed)
            sae = extended(mesh.sae(u.shape[1], cfg.n_latents, cfg.k), cfg).to(cfg.device)
            init_from_data(sae, u)
        sae.meta = dict(meta or {})
        return mesh.trainer(cfg, sae, c)

    def resume(self, meta):
        """The Trainer of the newest readable checkpoint, or None where the run is to begin.
        Raises ValueError if it is of other settings or data, or if none is readable."""
        folder, self.damaged = self.mesh.broadcast(self.newest())
        if folder:
            saved = read_checkpoint(folder)
            trainer = restore(saved, self.cfg, self.mesh, folder)
            said, remedy = "was trained on other activations", "give those that it was trained on"
            longer = self.cfg.tokens > saved[0]["config"]["tokens"]
            agree(trainer.sae.meta, identity(meta or {}, longer), f"{folder} {said}", remedy)
            require(trainer.steps <= self.steps, f"{folder} has seen more than these "
                    f"{self.cfg.tokens:,} tokens; give more --tokens, or another --out")
            trainer.sae.meta = dict(meta or {})
            return trainer
        why = [*self.damaged.values(), f"there is no checkpoint in {self.path}"][0]
        require(not (self.damaged or self.finished),
                f"nothing to resume: {why}; choose another --out")

    def newest(self):
        """-> (the newest readable checkpoint or None, {newer ones: what is wrong with them})."""
        damaged = {}
        for folder in self.found if self.mesh.rank == 0 else ():
            try:
                read_checkpoint(folder)
                return folder, damaged
            except ValueError as e:
                damaged[folder] = f"{e}"
        return None, damaged

    def settle(self, step):
        """Make the directory what it was at `step`, without what cannot be read."""
        self.mesh.barrier()  # all have read
        self.saved, self.mark = step, (step, time.time())
        if self.mesh.rank:
            return
        for folder, why in self.damaged.items():
            print(f"{why}; using the checkpoint before it", file=sys.stderr)
            folder.rename(folder.with_name(f"damaged-{time.time():.0f}-{folder.name}"))
        for torn in self.path.glob("checkpoint-*.part"):
            shutil.rmtree(torn)
        config = dataclasses.asdict(self.cfg) | {"launch": self.launch}
        save_atomic(self.path / "config.json", [json.dumps(config, indent=1).encode()])
        until = re.compile(r'{"step": (\d+), .*}\n')  # a crash may have cut a line short
        lines = map(until.fullmatch, read(self.path / "log.jsonl").splitlines(True))
        kept = (line[0] for line in lines if line and int(line[1]) <= step)
        save_atomic(self.path / "log.jsonl", [line.encode() for line in kept])

    def save(self, trainer):
        """Each shard writes what it owns; the checkpoint before stays."""
        if trainer.steps == self.saved:
            return
        part = self.path / f"checkpoint-{trainer.steps:09d}.part"
        try:
            if self.mesh.replica == 0:
                save_atomic(part / f"{self.mesh.shard:04d}.pt", trainer.state())
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        self.mesh.barrier()  # all have written
        if self.mesh.rank == 0:
            part.rename(part.with_suffix(""))
            for old in self.checkpoints()[:-2]:
                shutil.rmtree(old)
        self.saved, self.saved_at = trainer.steps, time.time()

    def log(self, trainer, info, val, tell):
        """A line of log.jsonl for each 200th of the run, with the NMSE of `val` for each tenth."""
        done, left, batch = trainer.steps, self.steps - trainer.steps, self.cfg.batch
        evaluate = val is not None and (not left or done % max(1, self.steps // 10) == 0)
        if not evaluate and left and done % max(1, self.steps // 200):
            return
        self.paces = [*self.paces[-19:], (time.time() - self.mark[1]) / (done - self.mark[0])]
        pace = sorted(self.paces)[len(self.paces) // 2]  # seconds a step, the median of late
        line = {"step": done, "tokens": done * batch, "nmse": info["nmse"],
                "l0": info["l0"], "dead": float(info["dead"]), "tokens_per_s": batch / pace}
        line |= {"val_nmse": nmse(trainer.inference(), val)} if evaluate else {}
        self.mark = done, time.time()
        if self.mesh.rank == 0:
            with open(self.path / "log.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
            tell(line | {"lr": self.cfg.lr, "seconds_left": left * pace})

    def finish(self, trainer, val, stream):
        """EMA or raw weights, by the NMSE of `val` in full precision; rank 0 writes sae.pt."""
        if trainer.recent is None and self.cfg.activation == "batchtopk":  # no step was left
            trainer.recent = normalize(next_batch(self, trainer, stream).float())[0]
        trainer.sae.product_dtype = None
        torch.set_float32_matmul_precision("highest")
        saes = {"raw": trainer.inference(), "ema": trainer.inference(trainer.averaged())}
        scores = {"ema": math.nan} if val is None else {s: nmse(saes[s], val) for s in saes}
        kept = min(scores, key=scores.get)
        self.save(trainer)
        sae, config = saes[kept], dataclasses.asdict(self.cfg)
        sae.meta |= {"weights": kept, "nmse": scores, "tokens": self.steps * self.cfg.batch,
                     "config": config, "seconds": time.time() - self.begun, "dead": trainer.n_dead}
        if self.mesh.rank == 0:
            whole, path = sae, self.path / "sae.pt"
            if self.mesh.shards > 1:
                saved = read_checkpoint(self.path / f"checkpoint-{trainer.steps:09d}")
                both = restore(saved, dataclasses.replace(self.cfg, device="cpu"))
                whole = both.averaged() if kept == "ema" else both.sae
                whole.meta = sae.meta
            whole.save(path)
            scores = ", ".join(f"{name} {score:.4f}" for name, score in scores.items())
            print(f"held-out nmse: {scores}; kept the {kept} weights in {path}", file=sys.stderr)
        return sae

def hold(path):
    """A lock on the directory, which ends with the process. Raises ValueError, naming the holder,
    if another has it."""
    path.mkdir(parents=True, exist_ok=True)
    lock = open(path / ".lock", "a+")
    try:
        import fcntl  # which Windows does not have
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        who = lock.read().strip() or "another process"
        raise ValueError(f"{who} is writing to {path}; choose another --out") from None
    except (ImportError, OSError):  # nor every file system
        pass
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()} ({' '.join(sys.argv)[:200]})")
    lock.flush()
    return lock

def read_checkpoint(folder):
    """-> what each shard wrote. Raises ValueError if a file is damaged, or of another version."""
    saved = [load_file(file, mmap=True) for file in sorted(folder.glob("*.pt"))]
    whole = saved and all({"c", "config", "meta", "steps", "tensors"} <= s.keys() for s in saved)
    require(whole and {"tokens", "n_latents"} <= saved[0]["config"].keys()
            and all({"silent", "b_enc"} <= s["tensors"].keys() for s in saved),
            f"{folder} was written by another version of sae.py")
    rows = sum(len(shard["tensors"]["b_enc"]) for shard in saved)
    require(rows == saved[0]["config"]["n_latents"], f"{folder} lacks the file of a shard")
    return saved

def restore(saved, cfg, mesh=ALONE, source="the checkpoint"):
    """The Trainer of a checkpoint, of any shards. Raises ValueError where settings differ, but for
    those that change no weight, or only how the text is divided among processes."""
    free = ("resume", "minutes", "out", "device", "shards", "accumulate", "tokens",
            "acts", "model", "text", "layer", "site", "ctx")  # which `identity` looks at
    mine = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in free}
    said, remedy = "was made with another configuration", "use those values or another --out"
    there = {"activation": "relu" if saved[0]["config"]["l1"] else "topk", "prefixes": ""}
    there |= saved[0]["config"]
    agree(there, mine, f"{source} {said}", remedy)
    own = mesh.part(cfg.n_latents)
    def rows(name):  # of what the shards, equally large, hold between them
        parts = [s["tensors"][name] for s in saved]
        starts = range(0, cfg.n_latents, len(parts[0]))
        cut = [p[max(0, own.start - i) : max(0, own.stop - i)] for i, p in zip(starts, parts)]
        return parts[0].clone() if name.startswith("b_pre") else torch.cat(cut)

    sae = extended(mesh.sae(len(rows("b_pre")), cfg.n_latents, cfg.k), cfg)
    sae.load_state_dict({name: rows(name) for name in sae.state_dict()})
    sae.meta = saved[0]["meta"]
    trainer = mesh.trainer(cfg, sae.to(cfg.device), saved[0]["c"])
    trainer.steps = saved[0]["steps"]
    for i, (name, p) in enumerate(sae.named_parameters()):
        m, v, trainer.ema[i] = (rows(f"{name}.{what}").to(p) for what in ("m", "v", "ema"))
        step = torch.tensor(float(trainer.steps), device=p.device)
        trainer.adam.state[p] = {"step": step, "exp_avg": m, "exp_avg_sq": v}
    trainer.silent = rows("silent").to(cfg.device)
    own_dead = (trainer.silent > cfg.dead_tokens).sum()
    trainer.own_dead = int(own_dead)
    trainer.n_dead = int(mesh.all_reduce(own_dead, "shard"))
    return trainer

def identity(meta, longer):
    """What of a run's meta must stay as it was: the content, not the name, of what has a hash. A
    run that goes on for longer may do so on more of the same activations."""
    free = [name.removesuffix("_sha256") for name in meta if name.endswith("_sha256")]
    free += ["chosen_on", "tokens_sha256"] if longer else ["chosen_on"]
    return {name: value for name, value in meta.items() if name not in free}

def agree(there, here, message, remedy):
    """Raises ValueError, with what differs, if `here` has anything otherwise than `there`."""
    pairs = ((name, there.get(name), value) for name, value in here.items())
    differs = "; ".join(f"{name}: {a} there, {b} now" for name, a, b in pairs
                        if json.dumps(a) != json.dumps(b))  # NaN is itself there
    require(not differs, f"{message} ({differs}); {remedy}")

def show(line):
    """One fixed-width progress line on stderr; on a terminal rewritten in place."""
    val = f"{line['val_nmse']:.4f}" if "val_nmse" in line else "      "
    text = ("{step:>9,} | {nmse:.4f} {val} | {l0:5.1f} | {dead:>6.0f} | {lr:.1e} | "
            "{tokens_per_s:>7,.0f} | {seconds_left:>4.0f} s").format(val=val, **line)
    start, end = ("\r", "\n" if val.strip() else "") if sys.stderr.isatty() else ("", "\n")
    if start or val.strip():
        print(start + text, end=end, file=sys.stderr, flush=True)

@contextmanager
def asked_to_stop():
    """A list that Ctrl-C, SIGTERM and a terminal that closes fill, interrupting nothing."""
    stop, main = [], threading.current_thread() is threading.main_thread()
    names = ("SIGINT", "SIGTERM", "SIGHUP") if main else ()
    signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {s: signal.signal(s, lambda *_: stop.append(1)) for s in signals}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)

def as_batch(x, size):
    """x. Raises ValueError where it is no batch of so many activations."""
    found = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
    right = isinstance(x, torch.Tensor) and x.ndim == 2 and len(x) == size
    require(right, f"batches are tensors of shape ({size}, d), not {found}")
    return x

def next_batch(run, trainer, stream):
    """The next batch of this replica (B, d), of which each of its shards has read a share."""
    try:
        return run.mesh.all_gather(next(stream).to(run.cfg.device), "shard")
    except (StopIteration, ValueError) as e:  # the data is at fault, not the training so far
        if trainer.steps and not run.mesh.groups:  # the others know nothing of it
            run.save(trainer)
        ended = f"the activations ended after step {trainer.steps} of {run.steps}; give more"
        raise e if isinstance(e, ValueError) else ValueError(f"{ended} and --resume") from None

def train(cfg, batches, val=None, meta=None, log=None, mesh=ALONE):
    """Train for cfg.tokens tokens. Returns the SAE: EMA or raw weights, whichever has the lower
    NMSE on `val` (without val: EMA).

    cfg: a Config from `resolve`. batches: a function `step -> iterator of (B, d) activations from
    that step on`, or any iterable of them. val: held-out activations (N, d). meta: dict kept in the
    SAE. log: is given each line of log.jsonl, in place of stderr. mesh: from `Mesh.join`; then
    `batches` gives this process's share (B / world, d), a Shard comes back. Writes into cfg.out.
    Ctrl-C, SIGTERM and SIGHUP save a checkpoint, then raise KeyboardInterrupt. Raises ValueError
    for what cannot be trained on or saved, and if a process is lost."""
    cfg, meta = dataclasses.replace(cfg, **plain(dataclasses.asdict(cfg))), plain(meta or {})
    require(cfg.batch > 0 and cfg.out, "this Config is not complete: give what `resolve` returns")
    require(cfg.batch % (mesh.world * cfg.accumulate) == 0, f"a batch of {cfg.batch} cannot be cut "
            f"into {mesh.world} processes times {cfg.accumulate} parts; choose another --batch")
    start = batches if callable(batches) else lambda step: itertools.islice(batches, step, None)
    out = Path(cfg.out)
    own = [*out.glob("config.json"), *out.glob("checkpoint*"), *out.glob("sae.pt")]
    require(mesh.rank or own or all(file.name == ".lock" for file in out.glob("*")),
            f"{cfg.out} is not empty and holds no run; choose another --out")
    with hold(out) if mesh.rank == 0 else nullcontext():
        run = Run(cfg, mesh)
        trainer = run.resume(meta)
        size = cfg.batch // mesh.world
        stream = (as_batch(x, size) for x in start(trainer.steps if trainer else 0))
        if not trainer:
            first = list(itertools.islice(stream, math.ceil(32768 / cfg.batch)))
            trainer = run.begin(first, meta)
            stream = itertools.chain((first.pop(0) for _ in range(len(first))), stream)
        d = trainer.sae.d_model
        require(val is None or as_batch(val, len(val) or 1).shape[1] == d and val.isfinite().all(),
                f"val must be finite activations (N, {d})")
        run.settle(trainer.steps)
        if mesh.rank == 0 and not log:
            print("     step |   nmse    val |    l0 |   dead |      lr |   tok/s |    eta",
                  file=sys.stderr)
        with asked_to_stop() as stop, mesh.watch(trainer):
            while trainer.steps < run.steps:
                due = mesh.rank == 0 and time.time() - run.saved_at > 60 * cfg.minutes
                x = next_batch(run, trainer, stream)
                info = trainer.step(x, stop=bool(stop), save=due)
                run.log(trainer, info, val, log or show)
                if info["stop"] or info["save"]:
                    run.save(trainer)
                if info["stop"]:
                    raise KeyboardInterrupt(f"stopped at step {trainer.steps}; saved a checkpoint "
                                            f"in {cfg.out}; continue with --resume")
            return run.finish(trainer, val, stream)


# --------------------------------------------------------------------------------------------------
# 6. Other activation functions
# Trained as their papers do; used, all of them, as z = a 1(a > theta).

def batch_code(sae, u, *dead):
    """BatchTopK (Bussmann et al. 2024), the k B largest of a batch u (B, d) -> what `Sparse.select`
    found, as wide as any token needs; the smallest of them."""
    width = min(4 * sae.k, sae.n_latents)
    while True:
        codes = sae.select(u, width, *dead)
        values = codes[0][0]
        cut = values.flatten().kthvalue(values.numel() - sae.k * len(u) + 1).values
        if width == sae.n_latents or values.amin(1).max() <= cut:  # no token was cut short
            return codes, cut
        width = min(2 * width, sae.n_latents)

# Dense ones: of a = W_enc (u - b_pre) and `--l1`, z; what that counts; and of `gated` a code that
# must reconstruct u by itself, with the decoder as it is. All are (B, n).

def gated(sae, a, l1):
    """Rajamanoharan et al. 2024a: b_enc opens the gate, which learns by reconstructing alone."""
    gate = F.relu(a + sae.b_enc)
    return (gate > 0) * F.relu(a * sae.r_mag.exp() + sae.b_mag), gate, gate

def jumprelu(sae, a, l1):
    """Rajamanoharan et al. 2024b: z = a 1(a > cut), cut (n) learned; `--l1` counts L0."""
    sae.cut.data.clamp_(min=0)  # not in the graph: it must come back from 0
    a = a + sae.b_enc
    return _Jump.apply(a, sae.cut, False), _Jump.apply(a, sae.cut, True), None

def nelu(v, lam):
    """argmin over z >= 0 of |z - v| + lam |z|_1, v (..., n): ReLU(v - lam r), r = |v - z|, so that
    noise raises the threshold (Goldenstein et al. 2024). At most ceil(1 / lam^2) - 1 are active."""
    n = v.shape[-1]
    s = v.detach().double().topk(min(n, math.ceil(1 / lam**2))).values.relu()
    rest = v.detach().double().square().sum(-1, keepdim=True) - s.square().cumsum(-1) + s.square()
    left = (rest.clamp_min(0) / (1 - torch.arange(s.shape[-1]).to(s) * lam**2)).sqrt()
    least = s.where(s > lam * left, torch.inf).amin(-1, keepdim=True)  # of the active ones
    on = v.detach().double() >= least
    slack = 1 - on.sum(-1, keepdim=True) * lam**2
    r = ((v * ~on).square().sum(-1, keepdim=True) / slack).clamp_min(1e-30).sqrt()
    return F.relu(v - lam * r) * on

class Pivotal(Sparse):
    """z = NeLU(W_enc (u - b_pre)), its threshold each input's own: no theta stands for it."""
    def pre_acts(self, u):
        return nelu(F.linear(u - self.b_pre, self.W_enc), self.lam)

    def encode(self, u, k=None):
        most = math.ceil(1 / self.lam**2)
        return SAE.encode(self, u, min(self.n_latents if k is None else k, most))

def pivotal(sae, lam):
    """The autoencoder, its weights shared, with NeLU in place of ReLU."""
    own = copy.copy(sae)
    own.__class__, own.lam = Pivotal, lam
    return own

class _ProLU(torch.autograd.Function):
    """Taggart 2024: z = a where a > 0 and a + b > 0. Neither gradient is the true one."""
    @staticmethod
    def forward(ctx, a, b, straight):
        on = (a > 0) & (a + b > 0)
        ctx.save_for_backward(a, on)
        ctx.straight = straight
        return a * on

    @staticmethod
    def backward(ctx, g):
        (a, on), straight = ctx.saved_tensors, ctx.straight
        g = g * on
        to_b = g * a if straight else g
        return g + to_b * straight, to_b.sum(0), None

class _Jump(torch.autograd.Function):
    """a 1(a > cut), or 1(a > cut) alone; the step's gradient is that of a rectangle, WIDTH wide."""
    WIDTH = 0.001  # for inputs of norm 1

    @staticmethod
    def forward(ctx, a, cut, alone):
        ctx.save_for_backward(a, cut)
        ctx.alone = alone
        return (a > cut).to(a) if alone else a * (a > cut)

    @staticmethod
    def backward(ctx, g):
        (a, cut), alone = ctx.saved_tensors, ctx.alone
        near = g * ((a - cut).abs() < _Jump.WIDTH / 2) / _Jump.WIDTH
        return None if alone else g * (a > cut), -(near if alone else near * cut).sum(0), None

alike = lambda z: (z, z, None)
DENSE_ACTIVATIONS = {
    "relu": lambda sae, a, l1: alike(F.relu(a + sae.b_enc)),  # section 2.2
    "gated": gated, "jumprelu": jumprelu,
    "prolu_relu": lambda sae, a, l1: alike(_ProLU.apply(a, sae.b_enc, False)),
    "prolu_ste": lambda sae, a, l1: alike(_ProLU.apply(a, sae.b_enc, True)),
    "nelu": lambda sae, a, l1: (nelu(a + 0 * sae.b_enc, l1), a[:, :0], None)}  # without a bias
EXTRA = {"gated": {"r_mag": 0.0, "b_mag": 0.0}, "jumprelu": {"cut": 0.001}}  # parameters (n)

def extended(sae, cfg):
    """The autoencoder with the parameters that its activation function has beside the usual."""
    for name, value in EXTRA.get(cfg.activation, {}).items():
        sae.register_parameter(name, nn.Parameter(torch.full_like(sae.b_enc, value)))
    return sae

def dense_losses(sae, u, c, activation, l1):
    """As `losses`, of another activation function: NMSE + l1 times what that counts."""
    a = F.linear(u - sae.b_pre, sae.W_enc)  # (B, d) @ (d, n) -> (B, n)
    values, counted, alone = DENSE_ACTIVATIONS[activation](sae, a, l1)
    e = u - values @ sae.W_dec - sae.b_pre
    nmse, loss = e.square().mean() / c, l1 * counted.sum(1).mean()
    if alone is not None:
        left = u - alone @ sae.W_dec.detach() - sae.b_pre.detach()
        loss = loss + left.square().mean() / c
    indices = torch.arange(sae.n_latents, device=u.device).expand_as(values)
    return nmse + loss, nmse.detach(), e.detach(), values.detach(), indices

def ungated(W, r_mag, b_mag, b_gate):
    """A gate that opens where W x + b_gate > 0, on a magnitude e^r W x + b_mag, is a threshold on
    that: (n, d), (n), (n), (n) -> W_enc (n, d), b_enc (n), theta (n)."""
    r = r_mag.exp()
    return W * r[:, None], b_mag, b_mag - r * b_gate

FOLDS = {  # what was trained -> W_enc, b_enc, theta
    "gated": lambda s, u: ungated(s.W_enc, s.r_mag, s.b_mag, s.b_enc),
    "jumprelu": lambda s, u: (s.W_enc, s.b_enc, s.cut),
    "batchtopk": lambda s, u: (s.W_enc, s.b_enc, batch_code(s, u)[1]),
    "prolu_relu": lambda s, u: (s.W_enc, torch.zeros_like(s.b_enc), -s.b_enc)}
FOLDS["prolu_ste"] = FOLDS["prolu_relu"]

@torch.no_grad()
def folded(sae, activation, u, lam=0.0):
    """What was trained as it is used: TopK or ReLU unchanged, NeLU with its lambda, the others with
    thresholds theta (n). u (N, d): on these, BatchTopK's lets k latents a token through on
    average."""
    if activation == "nelu":
        return pivotal(sae, lam)
    return thresholded(sae, *FOLDS[activation](sae, u)) if activation in FOLDS else sae

@torch.no_grad()
def thresholded(sae, W_enc, b_enc, theta):
    """The autoencoder, its decoder shared, with z = a 1(a > theta): W_enc (n, d), b_enc (n), theta
    (n) or a number for all."""
    own = copy.copy(sae)
    own._parameters = {name: sae._parameters[name] for name in ("W_dec", "b_pre")}
    own._buffers = dict(sae._buffers)
    own.k, own.theta = sae.n_latents, torch.zeros_like(b_enc).add_(theta).clamp_(min=0)
    own.W_enc, own.b_enc = nn.Parameter(W_enc), nn.Parameter(b_enc - own.theta)
    return own


# --------------------------------------------------------------------------------------------------
# 7. Files of other libraries
# Theirs: a = W_enc (x - b_pre) + b_enc, or W_enc x + b_enc; then TopK, a ReLU, or thresholds.

FOREIGN = "sae_weights.safetensors", "sae.safetensors", "ae.pt", "params.npz", "params.safetensors"
FORMS = {kind: form for form, kinds in {
    "topk": "topk AutoEncoderTopK", "relu": "relu AutoEncoder AutoEncoderNew",
    "theta": "gated jumprelu params GatedAutoEncoder JumpReluAutoEncoder BatchTopKSAE "
    "MatryoshkaBatchTopKSAE"}.items() for kind in kinds.split()}
UNCENTERED = "JumpReluAutoEncoder", "AutoEncoderNew", "params"  # of W_enc x + b_enc
NAMES = {"encoder.weight": "W_enc", "w_enc": "W_enc", "decoder.weight": "W_dec", "w_dec": "W_dec",
         "mag_bias": "b_mag", "gate_bias": "b_gate"}
NAMES |= dict.fromkeys(("encoder.bias", "latent_bias"), "b_enc")
NAMES |= dict.fromkeys(("decoder.bias", "decoder_bias", "b_dec", "bias", "pre_bias"), "b_pre")
TURNED = "W_enc", "w_enc", "decoder.weight"  # stored (d, n), (d, n), (d, n)
NORMS = None, False, "none", "layer_norm", True, "expected_average_only_in"  # last two: in weights
HOOKS = {"resid_post_mlp": "hook_resid_post", "resid_post_attn": "hook_resid_mid",
         "resid_delta_attn": "hook_attn_out", "resid_delta_mlp": "hook_mlp_out",
         "mlp_post_act": "mlp.hook_post"}  # harvest.SITES, as TransformerLens names them

def from_openai(cls, state):
    """One of OpenAI's released TopK or ReLU autoencoders (openai/sparse_autoencoder, model.py). The
    TopK ones take normalised inputs, as SAELens' layer_norm, the ReLU ones raw ones."""
    kind, details = state.get("activation", "ReLU"), state.get("activation_state_dict", {})
    if kind not in ("TopK", "ReLU") or details.get("postact_fn", "ReLU") != "ReLU":
        raise ValueError(f"unknown activation {kind} {details}; TopK and ReLU are supported")
    norm = {"normalize_activations": "layer_norm"} if kind == "TopK" else {}
    weights = {name: state[name] for name in NAMES if name in state}
    return assemble(cls, weights, "topk" if norm else "relu", details | norm, "openai")

def from_foreign(cls, file):
    """An autoencoder of another library, from its file of weights and the configuration beside it.
    Raises ValueError, naming it, for what has no form here."""
    try:
        texts = (read(file.with_name(name)) for name in ("cfg.json", "config.json"))
        cfg = json.loads(next(filter(None, texts), "{}"))
        cfg = {**cfg, **cfg.get("trainer", {}), **(cfg.get("metadata") or {})}
        hook = str(cfg.get("hook_name") or cfg.get("hook_point"))
        function = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"
        named = cfg.get("architecture") or cfg.get("dict_class") or cfg.get("activation")
        usual = {"sae": "topk", "sae_weights": function} if cfg else {}  # their first said less
        kind = usual.get(file.stem) if named in (None, "standard") else named
        kind = "params" if file.stem == "params" else kind
        require(cfg or kind, f"{file} needs its cfg.json or config.json beside it")
        odd = [] if kind in FORMS else [kind or "of no known kind"]
        odd += ["hook_z"] if hook.endswith("hook_z") else []  # heads, reshaped
        more = ("transcode", "skip_connection", "signed", "finetuning_scaling_factor",
                "reshape_activations", "normalize_activations")
        odd += [f"{x} {cfg[x]}" for x in more if cfg.get(x) not in NORMS[: 6 if "norm" in x else 3]]
        require(not odd, f"{file}: {', '.join(odd)}; there is no such form here")
        sae = assemble(cls, load_file(file), kind, cfg, str(file.resolve()))
        sites = {theirs: site for site, theirs in HOOKS.items()}
        site = sites.get(hook.split(".", 2)[-1].replace("resid_pre", "resid_post"))
        model = (cfg.get("model_name") or "").removeprefix("openai-community/")
        if site and model and (layer := int(hook.split(".")[1]) - ("resid_pre" in hook)) >= 0:
            sae.meta |= {"model": model.replace("gpt2-small", "gpt2"), "layer": layer, "site": site}
            sae.meta |= {"context": cfg["context_size"]} if cfg.get("context_size") else {}
        return sae
    except (LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError,
            json.JSONDecodeError) as e:
        raise ValueError(f"{file} and its configuration are not as another library writes them "
                         f"({e!r:.90})") from None

def assemble(cls, tensors, kind, cfg, source):
    """An autoencoder from another library's tensors. Codes are as there, but for normalised inputs:
    theirs have norm s = sqrt(d - 1), ours 1, and codes with them."""
    w = {NAMES.get(name, name): (x.T if name in TURNED else x).float()
         for name, x in tensors.items()}
    W, W_dec, b_pre = w.pop("W_enc"), w.pop("W_dec"), w.pop("b_pre")
    (n, d), normalized = W.shape, cfg.get("normalize_activations") == "layer_norm"
    b, theta = w.pop("b_enc", torch.zeros(n)), w.pop("threshold", None)
    if "r_mag" in w:
        W, b, theta = ungated(W, *map(w.pop, ("r_mag", "b_mag", "b_gate")))
    if not cfg.get("apply_b_dec_to_input", kind not in UNCENTERED):
        b = b + W @ b_pre
    size = W_dec.norm(dim=1) if cfg.get("rescale_acts_by_decoder_norm") else torch.ones(n)
    W, b, W_dec = W * size[:, None], b * size, W_dec / size[:, None]
    k = w.pop("k", None) or cfg.get("k") or (cfg.get("activation_fn_kwargs") or {}).get("k")
    sae = cls(d, n, int(k) if FORMS[kind] == "topk" else n)
    sae.normalized, sae.meta = normalized, {"source": source}
    idle = lambda name, x: name == "group_sizes" or name == "scaling_factor" and (x == 1).all()
    odd = ", ".join(name for name, x in w.items() if not idle(name, x))
    require(not odd, f"{source} holds {odd}; there is no such form here")
    s = math.sqrt(d - 1) if normalized else 1.0
    state = {"W_enc": W, "W_dec": W_dec, "b_enc": b / s, "b_pre": b_pre / s}
    require(theta is None or FORMS[kind] != "relu", f"{source} holds thresholds; is it a ReLU?")
    if FORMS[kind] == "theta":
        require(theta.ndim or theta >= 0, f"{source}: its threshold was never calibrated")
        sae.theta = state["theta"] = theta.expand(n).clamp(min=0) / s
        state["b_enc"] = state["b_enc"] - sae.theta
    sae.load_state_dict(state)
    return sae

def to_saelens(sae, folder):
    """Write cfg.json and sae_weights.safetensors as SAELens 6 reads them (so TransformerLens,
    SAEBench, SAEDashboard). Its `layer_norm` is our normalisation but for an epsilon of 1e-5 and
    its norm, s = sqrt(d - 1), as of its codes. Raises ValueError for a folder that is not empty,
    and for NeLU."""
    weights, config = Path(folder) / FOREIGN[0], Path(folder) / "cfg.json"
    require(not isinstance(sae, Pivotal), "SAELens has no NeLU")
    require(not any(Path(folder).glob("*")), f"{folder} is not empty; choose another folder")
    s, theta = math.sqrt(sae.d_model - 1) if sae.normalized else 1.0, sae.theta
    w = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_enc": sae.b_enc * s, "b_dec": sae.b_pre * s}
    w |= {} if theta is None else {"b_enc": (sae.b_enc + theta) * s, "threshold": theta * s}
    told = {"sae_lens_version": "6.0.0", "model_name": sae.meta.get("model"), "prepend_bos": False}
    if sae.meta.get("site") in HOOKS:
        told["hook_name"] = f"blocks.{sae.meta['layer']}.{HOOKS[sae.meta['site']]}"
        told["context_size"] = sae.meta.get("context")
    kind = "topk" if sae.k < sae.n_latents else "standard" if theta is None else "jumprelu"
    cfg = {"architecture": kind, "d_in": sae.d_model, "d_sae": sae.n_latents, "device": "cpu",
           "normalize_activations": "layer_norm" if sae.normalized else "none", "metadata": told,
           "apply_b_dec_to_input": True, "dtype": "float32"}
    cfg |= {"k": sae.k} if kind == "topk" else {}
    save_atomic(weights, safetensors(w))
    save_atomic(config, [json.dumps(cfg, indent=1).encode()])

def safetensors(tensors):
    """Tensors by name -> the parts of a file, float32: length of a JSON header, that, the data."""
    data = [t.detach().cpu().float().contiguous().numpy().tobytes() for t in tensors.values()]
    ends = [0, *itertools.accumulate(map(len, data))]
    header = {name: {"dtype": "F32", "shape": list(t.shape), "data_offsets": ends[i : i + 2]}
              for i, (name, t) in enumerate(tensors.items())}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return [len(head).to_bytes(8, "little"), head, *data]

def read_safetensors(path):
    """-> dict of tensors, memory-mapped. Raises ValueError for a damaged file."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "U8": torch.uint8,
             "I64": torch.int64, "I32": torch.int32, "BF16": torch.bfloat16, "BOOL": torch.bool}
    raw, tensors = torch.from_file(str(path), size=os.path.getsize(path), dtype=torch.uint8), {}
    start = 8 + int.from_bytes(bytes(raw[:8].tolist()), "little")
    header = json.loads(raw[8:start].numpy().tobytes())
    header.pop("__metadata__", None)
    for name, t in header.items():
        kind, (a, b) = kinds[t["dtype"]], t["data_offsets"]
        require(start + b <= len(raw), f"{path} is cut short")
        own = raw[start + a : start + b]
        own = own.clone() if (start + a) % kind.itemsize else own  # to begin where its type may
        tensors[name] = own.view(kind).view(t["shape"])
    return tensors

SAE.from_openai, SAE.to_saelens = classmethod(from_openai), to_saelens


# --------------------------------------------------------------------------------------------------
# 8. The command
# The fields of Config are its options; one left at `auto` is chosen by `resolve`.

PAPER_BATCH = 131_072

def option(default, text, auto=""):
    return dataclasses.field(default=default, metadata={"help": text, "auto": auto})

@dataclasses.dataclass
class Config:
    n_latents: int = option(32768, "latents n")
    k: int = option(32, "active latents a token")
    acts: str = option("", "a harvest; or .npy, .npz, .pt, .safetensors, a folder of such: (N, d), "
                       "(contexts, T, d)", "acts/; if not there made, on CUDA streamed")
    out: str = option("", "run directory", "runs/n{n_latents}_k{k}, and all else that is given")
    model: str = option("auto", "model when activations must be made: gpt2, ..., stdlib, or a path")
    text: str = option("", "text when activations must be made", "what the model was trained on")
    layer: int = option(None, "0-based block of the model", "two thirds up: 8 of 12, 2 of 4")
    site: str = option("", "activation in that block: see harvest.py", "resid_post_mlp")
    ctx: int = option(None, "tokens in a context", "64, as in the paper")
    stream: bool = option(False, "run the model while training; on CUDA so where there are no acts")
    tokens: int = option(0, "training tokens, over epochs; a finished run goes on to more",
                         "all of --acts once; 400 M streamed")
    batch: int = option(0, "tokens a step", "tokens / 2000, a power of 2 in 1024 ... 131,072")
    lr: float = option(0.0, "Adam's, constant", "1e-4 sqrt(32768 / n), more in short runs: "
                       "4e-3 (2048 / n)^(1/4) (1000 / steps)^(1/2)")
    k_aux: int = option(0, "dead latents used by AuxK", "d/2, in short runs k if that is less, as "
                        "a power of two")
    aux_coef: float = option(1 / 32, "weight of AuxK; 0 turns it off")
    dead_tokens: int = option(0, "silence after which a latent is dead", "40 n / k, or tokens / "
                              "100 if that is more, up to 10 M")
    ema: float = option(0.0, "decay of the weights' average", "0.999, less in short runs")
    clip: float = option(0.0, "clip the gradient norm; 0: not, as the paper on GPT-2 small")
    accumulate: int = option(1, "parts in which a batch is worked through, to save memory")
    shards: int = option(1, "under torchrun: processes that share the latents, not the batch")
    multi_topk: bool = option(False, "loss L(k) + L(4k)/8: a code that is good at many test-time k")
    prefixes: str = option("", "Matryoshka: such first latents reconstruct by themselves: 512,2048")
    activation: str = option("", "topk, batchtopk (k on average); with --l1, without --k and AuxK: "
                             "relu, gated, prolu_relu, prolu_ste, jumprelu, nelu", "topk; relu "
                             "for --l1")
    l1: float = option(0.0, "coefficient of the penalty: |z|_1, of jumprelu L0; warmed up over a "
                       "tenth of the steps but for relu; of nelu the lambda in it")
    precision: str = option("", "encoder product: bf16 or fp32", "bf16 if the hardware has it")
    seed: int = option(0, "of initialisation and data order")
    device: str = option("", "cuda or cpu", "cuda if there")
    minutes: float = option(5.0, "between checkpoints")
    resume: bool = option(False, "continue the run in --out, bit-exactly on CPU, or begin it; what "
                          "is left out is as it was")

UNNAMED = ("n_latents", "k", "out", "tokens", "device", "minutes", "resume", "shards", "accumulate")

def default_out(c):
    """runs/n32768_k32 for the defaults; what is given differently is in the name too."""
    kind = "" if c.l1 else f"_k{c.k}"
    for f in dataclasses.fields(c):
        if f.name not in UNNAMED and (value := getattr(c, f.name)) != f.default:
            told = f"_{value:g}" if f.type is float else "" if f.type is bool else f"_{value}"
            kind += f"_{f.name}" + re.sub(r"[^\w.+-]+", "-", told)
    return f"runs/n{c.n_latents}{kind}"

def resolve(cfg, d_model, tokens):
    """The Config with what was left out chosen (README, "Defaults") for so many tokens of
    activations of width d_model. Raises ValueError for impossible ones."""
    c = dataclasses.replace(cfg)
    c.out = str(c.out or default_out(c))
    for name in ("tokens", "batch", "lr", "k_aux", "aux_coef", "dead_tokens", "clip", "l1", "ema",
                 "minutes", "seed"):
        require(0 <= getattr(c, name) < math.inf, f"--{name} {getattr(c, name)} is no such number")
    c.activation = c.activation or ("relu" if c.l1 else "topk")
    dense, kinds = c.activation in DENSE_ACTIVATIONS, ("topk", "batchtopk", *DENSE_ACTIVATIONS)
    require(c.activation in kinds, f"--activation {c.activation}: choose of {', '.join(kinds)}")
    require(dense == (c.l1 > 0), f"--activation {c.activation} goes "
            f"{'with a positive' if dense else 'without'} --l1")
    require(not c.multi_topk or c.activation == "topk" and not c.prefixes,
            "--multi_topk is of TopK alone")
    cuts = [0, *(int(n) if n.isdecimal() else 0 for n in c.prefixes.split(",") if c.prefixes)]
    rising = all(a < b for a, b in zip(cuts, [*cuts[1:], c.n_latents]))
    require(not c.prefixes or rising and not dense, f"--prefixes {c.prefixes}: rising numbers of "
            f"latents below {c.n_latents}, such as 512,2048, of topk or batchtopk")
    if dense:
        c.k, c.aux_coef = c.n_latents, 0.0
    require(c.accumulate >= 1, f"--accumulate {c.accumulate} must be at least 1")
    require(c.shards >= 1, f"--shards {c.shards} must be at least 1")
    require(c.shards == 1 or c.k != c.n_latents and c.activation == "topk" and not c.prefixes,
            f"--shards {c.shards} goes with TopK only (k < n_latents, no --prefixes)")
    require(1 <= c.k <= c.n_latents, f"k = {c.k} must be between 1 and n_latents = {c.n_latents}")
    c.device = c.device or ("cuda" if torch.cuda.is_available() else "cpu")
    c.tokens = c.tokens or tokens
    most = min(PAPER_BATCH, max(1024, 2**29 // c.n_latents)) if dense else PAPER_BATCH
    c.batch = c.batch or min(most, max(1024, 2 ** round(math.log2(max(c.tokens, 1) / 2000))))
    steps = c.tokens // c.batch if c.batch > 0 else 0
    require(steps > 0, f"{c.tokens:,} tokens are less than one batch of {c.batch:,}; "
            "lower --batch or give more activations")
    paper_lr = 1e-4 * math.sqrt(32768 / c.n_latents)
    short = 4e-3 * (2048 / c.n_latents) ** 0.25 * (1000 / steps) ** 0.5
    c.lr = c.lr or max(paper_lr, min(short, paper_lr * 40_000 / steps))
    due = max(c.tokens // 100, 40 * c.n_latents // c.k, c.batch)  # 40 times a latent's mean wait
    c.dead_tokens = c.dead_tokens or min(10_000_000, due)
    most = max(2, d_model // 2 if c.dead_tokens >= 10_000_000 else min(c.k, d_model // 2))
    c.k_aux = c.k_aux or 2 ** int(math.log2(most))
    c.ema = c.ema or min(0.999, 1 - 1 / max(2, 0.07 * steps))
    require(0 <= c.ema < 1, f"--ema {c.ema} must be below 1")
    fast = c.device.startswith("cuda") or getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    c.precision = c.precision or ("bf16" if fast else "fp32")
    require(c.precision in ("bf16", "fp32"), f"--precision {c.precision}: choose bf16 or fp32")
    return c

def parse_config(argv=None):
    """argv -> (all options, Config)."""
    head, rest = __doc__.split("\n\n", 1)
    kind = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=head, epilog=rest, formatter_class=kind)
    for f in dataclasses.fields(Config):
        text, auto = f.metadata["help"], f.metadata["auto"]
        if f.type is bool:
            p.add_argument(f"--{f.name}", action="store_true", help=text)
        else:
            text += f" (auto: {auto})" if auto else f" (default: {f.default!r})"
            p.add_argument(f"--{f.name}", type=f.type, help=text)
    add = p.add_argument
    add("--plan", action="store_true", help="print what such a run takes on --world devices")
    add("--export", nargs=2, metavar=("RUN", "FOLDER"), help="write a run, or any autoencoder that "
        "evals.py reads, as SAELens has them, and do nothing else")
    add("--d_model", type=int, default=768, help="with --plan: width of activations (default: 768)")
    add("--world", type=int, default=1, help="with --plan: devices (default: 1)")
    add("--speeds", default="790,4300,50", help="with --plan: a device's TFLOP/s, GB/s of memory, "
        "GB/s to others (default: 790,4300,50)")
    a = p.parse_args(argv)
    names = [f.name for f in dataclasses.fields(Config)]
    given = {name: v for name in names if (v := getattr(a, name)) is not None and v is not False}
    cfg = Config(**given)
    cfg.out = cfg.out or default_out(cfg)
    if cfg.resume and (before := read(file := Path(cfg.out) / "config.json")):
        try:
            kept = {name: v for name, v in dict(json.loads(before)).items() if name in names}
            resolve(Config(**kept), 2, 10**9)
        except (ValueError, TypeError) as e:
            raise ValueError(f"{file} is damaged ({e}); move it away and give the options that the "
                             "run was started with") from None
        cfg = Config(**kept | {"device": "", "resume": True} | given)
    return a, cfg

def plan(cfg, d, world=1, speeds=(790, 4300, 50), dead=0.05):
    """What a run takes, before renting it: {row: (amount, unit)}, counted, not measured; bytes a
    device, at a step's peaks; times added up. d: d_model. world: devices. speeds of one: TFLOP/s,
    GB/s of memory, GB/s to others. dead: share of latents. ValueError where sizes do not divide."""
    S, R, n = cfg.shards, world // cfg.shards, cfg.n_latents
    rest = world % S, n % S, cfg.batch % (world * cfg.accumulate)
    require(not any(rest), f"{world} devices, {S} shards, n = {n} and batches of {cfg.batch} in "
            f"{cfg.accumulate} parts must divide without rest")
    kind, size = cfg.device.split(":")[0], 2 if cfg.precision == "bf16" else 4
    own, tokens = n // S, cfg.batch // R
    own_dead, k_aux = int(own * dead), min(cfg.k_aux, int(n * dead)) if cfg.aux_coef else 0
    k, b = min(4 * cfg.k if cfg.multi_topk else cfg.k, own), tokens // cfg.accumulate
    aux = k_aux > 0
    dense = aux and own_dead <= NARROW[kind] * k_aux  # AuxK as dense products
    W, vectors, chunk = 4 * (own * (2 * d + 1) + d), 4 * b * d, min(b, max(1, DENSE[kind] // own))
    rows, code, aux_code = 4 * own_dead * (2 * d + 1) * aux, 12 * b * k, 12 * b * k_aux
    cast = vectors + (own + b) * d * size * (size < 4)  # operands in the product's precision
    search = max(k * (56 + size * (min(64, own / k / 4) + 8)), own_dead * size * aux)
    gather = b * S * max(k, k_aux) * (2 * size + 1) * (S > 1)
    made = aux_code + rows + 4 * b * own_dead * dense
    part = max(cast + rows + chunk * (own * size + search),  # the peaks: selection, gathering,
               cast + rows + 2 * code + aux_code + gather,
               made + code + (6 + aux) * vectors,  # losses, backward
               made + rows + 11 / 3 * code + (4 + aux) * vectors + W * (cfg.accumulate == 1))
    memory = {"weights": W, "Adam": 2 * W, "EMA": W, "batch and counters": tokens * d * 2 + 8 * own,
              "gradients, temporaries": part + W * (cfg.accumulate > 1)}
    sent = (S - 1) * ((k + k_aux) * size + 8 * d / S * (1 + aux)) + 4 * d * (S > 1)
    sent += 2 * (R - 1) / R * W / tokens
    moved = tokens * (2 * own * size + 16 * d * (k + k_aux * (not dense)) / S + 80 * d) + 13 * W
    flops = 2 * d * n + 8 * d * (k + (own_dead * S if dense else k_aux))
    product = 2 * d * (own + 8 * own_dead * dense)  # AuxK's at half the speed
    seconds = {"products": product * tokens / speeds[0] / 1e12, "memory": moved / speeds[1] / 1e9,
               "communication": tokens * sent / speeds[2] / 1e9}
    out = {name: (x / 1e9, "GB") for name, x in memory.items()}
    out |= {"peak": (sum(memory.values()) / 1e9, "GB"), "FLOPs a token": (flops / 1e9, "GFLOP")}
    out["sent a token"] = sent / 1e3, "kB"
    out |= {f"{name} a step": (t, "s") for name, t in seconds.items()}
    return out | {"a billion tokens": (sum(seconds.values()) / cfg.batch / 3.6e-6, "hours")}

def show_plan(cfg, a):
    speeds = []
    with suppress(ValueError):
        speeds = [float(x) for x in a.speeds.split(",")]
    require(len(speeds) == 3 and min(*speeds, a.world, a.d_model - 1) > 0,
            f"--speeds {a.speeds} --world {a.world} --d_model {a.d_model}: give three positive "
            "numbers, such as 790,4300,50, and positive sizes")
    cfg = resolve(dataclasses.replace(cfg, device=cfg.device or "cuda"), a.d_model, 10**9)
    kind = cfg.device.split(":")[0]
    require(kind in DENSE, f"no device {kind} here; --plan knows {' and '.join(DENSE)}")
    rows = plan(cfg, a.d_model, a.world, speeds)
    print(f"n {cfg.n_latents:,}, k {cfg.k}, d {a.d_model}, batch {cfg.batch:,}, {cfg.precision}, "
          f"5 % dead; {a.world // cfg.shards} replicas x {cfg.shards} shards; speeds {a.speeds}")
    print("\n".join(f"  {name:<24} {x:>12.3f} {unit}" for name, (x, unit) in rows.items()))

def main(argv=None):
    a, cfg = parse_config(argv)
    if a.export:
        (sae := SAE.load(a.export[0])).to_saelens(a.export[1])
        return print(f"{a.export[1]}: {sae.extra_repr()}; read it by sae_lens.SAE.load_from_disk"
                     + ", whose codes are sqrt(d - 1) times ours" * sae.normalized)
    if a.plan:
        return show_plan(cfg, a)
    try:
        import harvest
    except ImportError as e:
        raise ValueError(f"the command needs harvest.py beside sae.py, and its packages ({e}); in "
                         "a program of your own, call `train`") from None
    keep_heap()
    cfg.device = harvest.pick_device(cfg.device)
    if ":" in cfg.device:
        torch.cuda.set_device(cfg.device)
    resolve(cfg, 2, 10**9)  # complain about impossible values before any work
    mesh = Mesh.join(cfg.shards, cfg.device)
    for turn in (mesh.rank == 0, mesh.rank > 0):  # the first downloads what all read
        if turn:
            data, held_out, tokens = harvest.source(cfg, alone=mesh.world == 1)
        mesh.barrier()
    meta, known = data.meta, mesh.broadcast((data.meta, tokens))
    require(known == (meta, tokens), f"this process has {meta}, the first one {known[0]}; "
            "give all machines the same --model, --text and --acts")
    cfg = resolve(cfg, meta["d_model"], tokens)
    most = 65536 if cfg.device.startswith("cuda") else 8192
    val = held_out.sample(4 * most)[1]
    val = val[: max(1, len(val) // 4)].clone()
    where = {"chosen_on": len(val)}  # contexts, the first, which evals.py leaves out
    for name in ("acts", "model", "layer", "site", "context", "text"):
        hashes = name + "_sha256", "tokens_sha256"
        where |= {key: meta[key] for key in (name, *hashes) if key in meta}
    if mesh.rank == 0:
        print(f"{harvest.called(meta)}: {cfg.tokens:,} tokens, "
              f"d {meta['d_model']}, n {cfg.n_latents}, k {cfg.k}, batch {cfg.batch}, lr "
              f"{cfg.lr:.2g}, ema {cfg.ema:.4g}, dead after {cfg.dead_tokens:,} tokens, "
              f"{cfg.precision} on {cfg.device}, {mesh.replicas} x {mesh.shards} processes, into "
              f"{cfg.out}", file=sys.stderr)
    share, place = cfg.batch // mesh.world, (cfg.device, mesh.rank, mesh.world)
    batches = lambda step: data.batches(share, cfg.seed, step, *place)
    train(cfg, batches, val.flatten(0, 1), where, mesh=mesh)
    mesh.leave()

if __name__ == "__main__":
    try:
        from harvest import run_main
    except ImportError:  # --help and --plan can do without
        main()
    else:
        run_main(main)
