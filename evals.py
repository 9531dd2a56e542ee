"""
evals.py: an autoencoder -> every metric of the paper, as a table and as JSON.

    python evals.py runs/n32768_k32                     # a run of sae.py, on what it was trained on
    python evals.py runs/n32768_k32 --all               # the slow ones too; or --only probes
    python evals.py 8.pt --model gpt2 --layer 8 --all   # one of OpenAI's released autoencoders
    python evals.py --fit runs/*                        # scaling laws through many runs
    python evals.py runs/n32768_k32 --report            # report.html: all latents, in a browser

One function a metric, with its call and its rows of the table in `@metric` above it. Each takes an
SAE and plain tensors or a place in a language model, always in the order sae, site, tokens, and
returns a dict of numbers; a key ending in `_se` is the standard error of the number before it.
Losses are in nats per token. Results are kept as they come: a second call computes only what is
missing. Sections are those of the paper; reconstruction to downstream are quick, the others not.
"""

import argparse
import base64
import json
import math
import sys
import time
from array import array
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import harvest
from harvest import SITES, Progress, UserError
from sae import Sparse, keep_heap, load_file

CHUNK = 8192  # tokens encoded at a time
METRICS = {}  # name -> what `@metric` says, in the order in which they run
PLACE = ("model", "layer", "site", "text")  # what tells activations from others


@dataclass
class metric:
    """Above a function: makes it a metric of table, JSON and page. It stays a plain function."""

    compute: Callable  # Case -> the function's result, a dict
    rows: list = ()  # of the table: key in the result, label, unit, key of the sample's size
    quick: bool = False  # computed without --all
    depends: tuple = ()  # what of the Case, beside its sizes, the result depends on
    notes: Callable = lambda result: []  # -> further lines of the table
    page: Callable = lambda result: {}  # -> further parts of the report

    def __call__(self, function):
        METRICS[function.__name__] = self
        return function


class Site:
    """A place in a language model: the activation `name`, one of SITES, of block `layer`."""

    def __init__(self, model, layer, name):
        self.model, self.layer, self.name = model, layer, name
        self.n_vocab, self.device = model.config.n_vocab, model.device

    def acts(self, tokens, batch=256):
        """tokens (C, T) -> activations (C, T, d) float32, `batch` contexts at a time."""
        return harvest.activations(self.model, tokens, self.layer, self.name, batch)

    def logits(self, tokens, edit=None):
        """tokens (B, T) -> logits (B, T, V), where given with the activation edit(it) (B, T, d)."""
        place = () if edit is None else (self.layer, self.name, edit)
        return self.model(tokens, *place)


@torch.no_grad()
def codes(sae, x, code=None):
    """Raw x (..., d) -> yields (u (B, d), values, indices), B <= CHUNK. code: for sae.encode."""
    for chunk in x.flatten(0, -2).split(CHUNK):
        u = sae.unit(chunk)[0]
        yield u, *(code or sae.encode)(u)


def reconstructed(sae, x, code):
    """Raw x (..., d) -> its reconstruction (..., d) from another code than sae.encode."""
    u, mean, norm = sae.unit(x.reshape(-1, sae.d_model))
    return (sae.decode(*code(u)) * norm + mean).view(x.shape).to(x.dtype)


def chunks(n, size, label, unit):
    """The slices of n things, `size` at a time, with a line of progress."""
    progress = Progress(n, label, unit)
    for start in range(0, n, size):
        end = min(start + size, n)
        yield slice(start, end)
        progress(end)
    progress.finish()


def standard_error(samples):
    """Of the mean of samples (N); nan for one sample."""
    return (samples.std() / math.sqrt(len(samples))).item() if len(samples) > 1 else math.nan


def means(**samples):
    """{name: samples (N)} -> {name: their mean, name_se: its standard error}."""
    out = {}
    for name, v in samples.items():
        v = torch.as_tensor(v, dtype=torch.float64)
        out |= {name: v.mean().item(), name + "_se": standard_error(v)}
    return out


def pick(result, *keys):
    """Those entries of a dict."""
    return {key: result[key] for key in keys}


# --------------------------------------------------------------------------------------------------
# Reconstruction, section 2.1; memorisation, density and positions, appendix.


@torch.no_grad()
def squared_errors(sae, x, code=None):
    """Raw x (..., d) -> (...) each: squared error, norm of û over that of u, active latents."""
    parts = []
    for u, values, indices in codes(sae, x, code):
        u_hat = sae.decode(values, indices)
        error = (u - u_hat).square().sum(1)
        ratio = u_hat.norm(dim=1) / u.norm(dim=1).clamp_min(1e-30)
        parts.append((error, ratio, (values > 0).sum(1)))
    return [torch.cat(part).double().view(x.shape[:-1]) for part in zip(*parts)]


@torch.no_grad()
def variance(sae, x):
    """Of raw x (..., d), normalised: the squared error of always predicting the mean."""
    x = x.flatten(0, -2)
    total, square = 0.0, 0.0
    for chunk in x.split(CHUNK):
        u = sae.unit(chunk)[0]
        total = total + u.sum(0).double()
        square = square + u.square().sum().double()
    return (square / len(x) - (total / len(x)).square().sum()).clamp_min(1e-30)


@metric(lambda c: reconstruction(c.sae, c.val), quick=True, rows=[
    ("nmse", "NMSE, held-out", "", "tokens"),
    ("l0", "L0", "latents/token", "tokens"),
    ("norm_ratio", "norm of reconstruction / input", "", "tokens")])  # fmt: skip
def reconstruction(sae, x, code=None):
    """Raw activations x (N, d) or (contexts, T, d) -> nmse (squared error over that of always
    predicting the mean, both normalised), l0 (mean count of active latents), norm_ratio (mean norm
    of the reconstruction over the input's). Standard errors are over the first dimension: tokens of
    one context are not independent. code: a function u -> (values, indices) in place of
    sae.encode."""
    x = x.reshape(len(x), -1, sae.d_model)
    errors, ratios, active = squared_errors(sae, x, code)
    nmse = errors / variance(sae, x)
    out = means(nmse=nmse.mean(1), l0=active.mean(1), norm_ratio=ratios.mean(1))
    return out | {"tokens": errors.numel()}


@metric(lambda c: memorization(c.sae, c.trained_on, c.val), quick=True, rows=[
    ("nmse_train", "NMSE, training text", "", "tokens"),
    ("gap", "held-out less training NMSE", "", "tokens")])  # fmt: skip
def memorization(sae, train, held_out):
    """NMSE on training against held-out x, (contexts, T, d) each: a gap that grows with n."""
    a, b = reconstruction(sae, train), reconstruction(sae, held_out)
    out = {"nmse_train": a["nmse"], "nmse_train_se": a["nmse_se"], "tokens": a["tokens"]}
    error = math.hypot(a["nmse_se"], b["nmse_se"])
    return out | {"gap": b["nmse"] - a["nmse"], "gap_se": error}


def latent_sums(sae, x):
    """Raw x (..., d) -> (n) each: how many tokens a latent fires on, the sum of its z^2 there."""
    counts = torch.zeros(sae.n_latents, dtype=torch.double, device=sae.W_dec.device)
    squares = torch.zeros_like(counts)
    for _, values, indices in codes(sae, x):
        counts.index_add_(0, indices.flatten(), (values > 0).flatten().double())
        squares.index_add_(0, indices.flatten(), values.square().flatten().double())
    return counts, squares


@metric(lambda c: density(c.sae, c.val.flatten(0, 1)), quick=True,
    page=lambda r: {"plots": pick(r, "log10_density", "log10_mean_square")}, rows=[
    ("silent", "latents silent on held-out text", "of n", "tokens"),
    ("rare", "latents firing on < 1e-4 of tokens", "of n", "tokens"),
    ("densest", "densest latent", "of tokens", "tokens")])  # fmt: skip
def density(sae, x, rare=1e-4):
    """Fractions of latents that never fire on x (N, d), and on fewer than `rare` of its tokens (the
    silent ones included). log10_density, log10_mean_square: histograms over the latents that fire,
    of E[1(z > 0)] and E[z^2], in bins of a quarter decade."""
    share, mean_square = (sums / len(x) for sums in latent_sums(sae, x))
    edges = np.arange(-12, 4.01, 0.25)
    out = {"silent": share == 0, "rare": share < rare}
    out = {name: which.double().mean().item() for name, which in out.items()}
    for name, v in (("log10_density", share), ("log10_mean_square", mean_square)):
        counts = np.histogram(v[share > 0].log10().clamp(-12, 4).cpu(), edges)[0]
        out[name] = {"edges": edges.tolist(), "counts": counts.tolist()}
    return out | {"densest": share.max().item(), "tokens": len(x)}


@metric(lambda c: dense_latents(c.sae, c.val, c.val_tokens), quick=True,
    notes=lambda r: ["    latent {latent}: fires on {density:.1%}; correlation with position"
                     " {position:+.2f}, first token {first_token:+.2f}, repetition"
                     " {repetition:+.2f}".format(**row) for row in r["densest"][:5]],
    page=lambda r: {"dense": [[*row.values()] for row in r["densest"]]})  # fmt: skip
def dense_latents(sae, x, tokens, top=10):
    """The `top` densest latents on x (contexts, T, d), tokens (contexts, T), and the correlation of
    their activation with position, being first in the context, and repetition (the same token
    earlier in the context), which dense latents are known to follow."""
    C, T = tokens.shape
    share = latent_sums(sae, x)[0] / tokens.numel()
    latents = share.topk(min(top, sae.n_latents)).indices
    of = lambda values, indices: [(values * (indices == i)).sum(1) for i in latents]
    z = [torch.stack(of(*code), 1) for _, *code in codes(sae, x)]
    z = torch.cat(z).double().cpu()  # (C T, top)
    at = torch.arange(T).expand(C, T)
    repeated = (tokens[:, :, None] == tokens[:, None, :]).tril(-1).any(2).cpu()
    facts = torch.stack([at, at == 0, repeated], -1).flatten(0, 1).double()  # (C T, 3)
    z, facts = ((v - v.mean(0)) / v.std(0).clamp_min(1e-12) for v in (z, facts))
    correlation = z.T @ facts / (len(z) - 1)  # (top, 3)
    names = ("latent", "density", "position", "first_token", "repetition")
    rows = zip(latents.tolist(), share[latents].tolist(), *correlation.T.tolist())
    return {"densest": [dict(zip(names, row)) for row in rows], "tokens": len(z)}


@metric(lambda c: positions(c.sae, c.val), quick=True,
    page=lambda r: {"plots": {"positions": pick(r, "nmse", "norm")}}, rows=[
    ("nmse_first", "NMSE, first position", "", "contexts"),
    ("nmse_later", "NMSE, later positions", "", "contexts"),
    ("norm_first", "norm of the input, first position", "", "contexts"),
    ("norm_later", "norm of the input, later positions", "", "contexts")])  # fmt: skip
def positions(sae, x):
    """x (contexts, T, d) -> nmse and norm, lists over the T positions, and their means at the first
    position and after it. The mean of the list is the NMSE of `reconstruction`."""
    nmse = squared_errors(sae, x)[0] / variance(sae, x)
    norm = x.to(nmse.device).float().norm(dim=2).double()
    out = {}
    for name, v in (("nmse", nmse), ("norm", norm)):
        out[name] = v.mean(0).tolist()
        out |= means(**{name + "_first": v[:, 0], name + "_later": v[:, 1:].mean(1)})
    return out | {"contexts": len(x)}


# --------------------------------------------------------------------------------------------------
# Downstream loss, section 4.1: what the model loses when it goes on with the reconstruction.


def compute_equivalent(curve, delta_ce):
    """The share of the model's training compute at which its own loss was `delta_ce` nats above its
    final one (section 4.1): (share, how); None and the reason where the curve does not reach.
    curve: list of {"flops", "loss"}; interpolated in log-compute. Reads too high where it is of one
    run whose learning rate decays, as `stdlib`'s is: its loss falls fastest at the end."""
    if not curve:
        return None, "no loss-against-compute curve for this model"
    flops = np.array([p["flops"] for p in curve], dtype=float)
    loss = np.minimum.accumulate([p["loss"] for p in curve])
    target = loss[-1] + delta_ce
    if delta_ce <= 0:
        return 1.0, "loss not increased"
    if target > loss[0]:
        return None, "worse than the model at the first point of its curve"
    reached = np.exp(np.interp(-target, -loss, np.log(flops)))
    return float(reached / flops[-1]), f"{len(curve)} points"


@torch.no_grad()
def patched_losses(site, tokens, edits, label="downstream"):
    """Cross-entropy of the model on tokens (C, T), as it is and with each of `edits` in place.
    edits: name -> a function on activations (B, T, d), or a tensor (C, T, d) of replacements.
    Returns "ce", and for each edit "ce_NAME", "delta_NAME" and "kl_NAME" (original || patched), as
    (C): nats per token, one mean a context."""
    losses = defaultdict(list)
    size = max(1, 2**24 // (site.n_vocab * tokens.shape[1]))
    for part in chunks(len(tokens), size, label, " contexts"):
        some = tokens[part].to(site.device)
        following = some[:, 1:, None]
        clean = F.log_softmax(site.logits(some)[:, :-1], dim=-1)
        losses["ce"].append(-clean.gather(2, following).mean((1, 2)))
        for name, edit in edits.items():
            act = edit if callable(edit) else lambda a, edit=edit: edit[part].to(a)
            patched = F.log_softmax(site.logits(some, act)[:, :-1], dim=-1)
            losses["ce_" + name].append(-patched.gather(2, following).mean((1, 2)))
            losses["kl_" + name].append((clean.exp() * (clean - patched)).sum(-1).mean(1))
    per = {name: torch.cat(parts).double().cpu() for name, parts in losses.items()}
    return per | {"delta_" + name: per["ce_" + name] - per["ce"] for name in edits}


@metric(lambda c: downstream(c.sae, c.site, c.chosen, c.val.mean((0, 1))), quick=True, rows=[
    ("ce", "CE of the model itself", "nats/token", "tokens"),
    ("ce_sae", "CE with the reconstruction", "nats/token", "tokens"),
    ("delta_ce", "ΔCE", "nats/token", "tokens"),
    ("kl", "KL(original || patched)", "nats/token", "tokens"),
    ("ce_mean", "CE, mean ablation", "nats/token", "tokens"),
    ("ce_zero", "CE, zero ablation", "nats/token", "tokens"),
    ("recovered_mean", "loss recovered against mean ablation", "", "tokens"),
    ("recovered_zero", "loss recovered against zero ablation", "", "tokens"),
    ("compute_equivalent", "compute-equivalent", "of training", "tokens")])  # fmt: skip
def downstream(sae, site, tokens, mean=None):
    """Replace the activation by its reconstruction at every position of tokens (C, T), run the rest
    of the model, and compare.

    sae: an SAE, or any function from activations (B, T, d) to their replacement. mean (d): the
    activation for mean ablation (default: the mean over `tokens`). Returns ce, ce_sae, delta_ce, kl
    (original || patched), ce_zero, ce_mean, recovered_zero and recovered_mean ((CE_ablated -
    CE_sae) / (CE_ablated - CE); zero ablation flatters it), compute_equivalent (or None, with
    compute_equivalent_why), in nats per token. Standard errors are over contexts.
    """
    if mean is None:
        mean = site.acts(tokens).flatten(0, 1).mean(0)
    edits = {"sae": sae, "zero": torch.zeros_like, "mean": lambda a: mean.to(a).expand_as(a)}
    per = patched_losses(site, tokens, edits)
    lost = per["delta_sae"]
    shown = {name: per[name] for name in ("ce", "ce_sae", "ce_zero", "ce_mean")}
    out = means(**shown, delta_ce=lost, kl=per["kl_sae"])
    for name in ("zero", "mean"):
        gap = per["delta_" + name]
        share, error = math.nan, math.nan
        if gap.any():
            share = (lost.mean() / gap.mean()).item()
            # of a ratio of means
            error = standard_error(lost - share * gap) / abs(gap.mean().item())
        out |= {f"recovered_{name}": 1 - share, f"recovered_{name}_se": error}
    delta, error = out["delta_ce"], out["delta_ce_se"]
    shares = [compute_equivalent(site.model.curve, delta + s * error) for s in (0, -1, 1)]
    (share, why), (low, _), (high, _) = shares
    error = math.nan if None in (low, high) else abs(low - high) / 2
    out |= {"compute_equivalent": share, "compute_equivalent_se": error}
    out["compute_equivalent_why"] = why
    return out | {"contexts": len(tokens), "tokens": len(tokens) * (tokens.shape[1] - 1)}


# --------------------------------------------------------------------------------------------------
# Shrinkage, section 5.1: with decoder and support fixed, are the encoder's activations the best?


def nnls(G, h, z0, sweeps=100):
    """Batched non-negative least squares: argmin over z >= 0 of z'Gz / 2 - h'z, G (B, k, k)
    positive definite, h, z0 (B, k) -> z (B, k). Block principal pivoting (Kim and Park 2011): all
    coordinates of the wrong sign change sides at once; where that stops helping, only the last of
    them. Rows that are not done after so many sweeps (k near or above the rank of G) go downhill
    from z0 one coordinate at a time instead, which never ends higher than it began."""
    B, k = h.shape
    eye = torch.eye(k).to(h)
    tol = 1e-10 * (1 + h.abs().amax(1, keepdim=True))
    z = z0.clone()
    free = h > 0
    left = torch.arange(B, device=h.device)
    fewest = torch.full((B,), k + 1, device=h.device)
    patience = torch.full((B,), 3, device=h.device)
    for _ in range(sweeps):
        on, G_, h_ = free[left], G[left], h[left]
        inside = torch.where(on[:, :, None] & on[:, None, :], G_, eye)
        z_ = torch.linalg.solve(inside, (h_ * on)[:, :, None])[:, :, 0]
        slope = (G_ @ z_[:, :, None])[:, :, 0] - h_
        wrong = torch.where(on, z_, slope) < -tol[left]
        count = wrong.sum(1)
        z[left[count == 0]] = z_[count == 0].clamp_min(0)
        patience[left] = torch.where(count < fewest[left], 3, patience[left] - 1)
        fewest[left] = torch.minimum(count, fewest[left])
        last = wrong & (wrong.flip(1).cumsum(1).flip(1) == 1)
        free[left] = on ^ torch.where((patience[left] > 0)[:, None], wrong, last)
        left = left[count > 0]
        if not len(left):
            return z
    for _ in range(500):
        for j in range(k):
            slope = (G[left, j] * z[left]).sum(1) - h[left, j]
            z[left, j] = (z[left, j] - slope / G[left, j, j]).clamp_min(0)
    return z


def refit(W, v, z, ridge):
    """The z (B, k) >= 0 that explain v (B, d) best by rows W (B, k, d), where z > 0 before."""
    on = z > 0
    G = (W @ W.mT) * (on[:, :, None] & on[:, None, :]) + torch.diag_embed(ridge + (~on).double())
    h = ((W @ v[:, :, None])[:, :, 0] + ridge * z) * on
    return nnls(G, h, z)


@metric(lambda c: refinement(c.sae, c.val[: c.few]), rows=[
    ("ratio", "refined / original activations", "", "tokens"),
    ("ratio_median", "the same, median of single ones", "", "tokens"),
    ("nmse_refined", "NMSE after refinement", "", "tokens"),
    ("gain", "share of the error that it removes", "", "tokens")])  # fmt: skip
@torch.no_grad()
def refinement(sae, x, ridge=1e-9):
    """Refit the active values of each token of x (contexts, T, d), z >= 0, decoder and support
    fixed, exactly. ratio: sum of the refined activations over the sum of the original ones, per
    context (1: no shrinkage; above: shrunk); ratio_median: the median over activations of refined /
    original; nmse and nmse_refined. The tiny ridge, towards the original values, only decides where
    the active decoder rows are linearly dependent."""
    parts = []
    for some in chunks(len(x), max(1, 1024 // x.shape[1]), "refinement", " contexts"):
        for u, values, indices in codes(sae, x[some]):
            v = (u - sae.b_pre).double()
            rows = max(1, 2**22 // (values.shape[1] * (values.shape[1] + sae.d_model)))
            for v_, z, i in zip(v.split(rows), values.double().split(rows), indices.split(rows)):
                W = sae.W_dec[i].double()  # (rows, k, d)
                best = refit(W, v_, z, ridge)
                error, least = ((v_ - (c[:, None] @ W)[:, 0]).square().sum(1) for c in (z, best))
                parts.append((error, least, z.sum(1), best.sum(1), (best / z)[z > 0]))
    *sums, ratios = (torch.cat(part) for part in zip(*parts))
    before, after, original, refined = (v.view(x.shape[:2]).mean(1) for v in sums)
    of_mean = variance(sae, x)
    out = means(ratio=refined / original, nmse=before / of_mean, nmse_refined=after / of_mean)
    out |= means(gain=(before - after) / before)
    out |= {"ratio_median": ratios.median().item(), "ratio_mean": ratios.mean().item()}
    return out | {"tokens": x.shape[0] * x.shape[1]}


# --------------------------------------------------------------------------------------------------
# Other codes of the same autoencoder, section 5.3: another k, a threshold.


def other_codes(sae, site, tokens, x, encoders, label):
    """{name: function u -> (values, indices)} -> {name: its NMSE and L0 on x, ΔCE on tokens}."""
    edits = {str(name): partial(reconstructed, sae, code=f) for name, f in encoders.items()}
    per = patched_losses(site, tokens, edits, label)
    delta = lambda name: means(delta_ce=per[f"delta_{name}"]) | {"contexts": len(tokens)}
    return {name: reconstruction(sae, x, f) | delta(name) for name, f in encoders.items()}


@metric(lambda c: test_time_k(c.sae, c.site, c.chosen[:256], c.val[: c.few], c.k),
    page=lambda r: {"plots": {"test_time_k": pick(r, "at", "nmse", "delta_ce")}}, rows=[
    ("nmse", "NMSE at k' = {}", "", "tokens"),
    ("delta_ce", "ΔCE at k' = {}", "nats/token", "contexts")])  # fmt: skip
def test_time_k(sae, site, tokens, x, k=None):
    """NMSE on x (contexts, T, d) and ΔCE on tokens (C, T) at k' = 1, 2, 4, ... 4k active latents:
    lists, beside `at`, the k'. k: default sae.k; for a ReLU autoencoder give its mean L0."""
    k = k or sae.k
    powers = [2**i for i in range(int(math.log2(4 * k)) + 1)]
    at = sorted({min(k_, sae.n_latents) for k_ in (*powers, k, 4 * k)})
    encoders = {k_: partial(sae.encode, k=k_) for k_ in at}
    found = other_codes(sae, site, tokens, x, encoders, "test-time k")
    keys = ("nmse", "nmse_se", "delta_ce", "delta_ce_se")
    out = {"at": at} | {key: [f[key] for f in found.values()] for key in keys}
    return out | pick(found[at[0]], "tokens", "contexts")


def encode_above(sae, u, theta):
    """J_θ(z) = z 1(z > θ) of u (N, d), θ >= 0: values, indices as wide as any row needs."""
    width = min(4 * sae.k, sae.n_latents)
    while True:
        values, indices = sae.encode(u, width)
        if width == sae.n_latents or values.amin(1).max() <= theta:
            return values * (values > theta), indices
        width = min(2 * width, sae.n_latents)


def calibrate_threshold(sae, x):
    """θ at which the mean L0 of J_θ on raw x (..., d) is k. Exact."""
    width = min(4 * sae.k, sae.n_latents)
    while True:
        parts = [values for _, values, _ in codes(sae, x, partial(sae.encode, k=width))]
        widest = max(v.shape[1] for v in parts)  # with width = n they may differ
        values = torch.cat([F.pad(v, (0, widest - v.shape[1])) for v in parts])
        rank = values.numel() - sae.k * len(values)
        theta = values.flatten().kthvalue(rank).values.item() if rank > 0 else 0.0
        if width == sae.n_latents or theta >= values.amin(1).max():  # no row was cut short
            return theta
        width = min(2 * width, sae.n_latents)


@metric(lambda c: fixed_threshold(c.sae, c.site, c.chosen, c.seen[: c.few], c.val), rows=[
    ("l0", "L0 at a fixed threshold", "latents/token", "tokens"),
    ("nmse", "NMSE at a fixed threshold", "", "tokens"),
    ("delta_ce", "ΔCE at a fixed threshold", "nats/token", "contexts")])  # fmt: skip
def fixed_threshold(sae, site, tokens, train, x):
    """One threshold for all tokens in place of TopK, calibrated on `train`: realised L0 and NMSE on
    the held-out x (both (contexts, T, d)), ΔCE on tokens (C, T). Raises UserError where k = n."""
    if sae.k == sae.n_latents:
        raise UserError("a ReLU autoencoder has no k to calibrate a threshold for")
    theta = calibrate_threshold(sae, train)
    code = partial(encode_above, sae, theta=theta)
    found = other_codes(sae, site, tokens, x, {"theta": code}, "fixed threshold")
    return {"theta": theta} | found["theta"]


# --------------------------------------------------------------------------------------------------
# Probe loss, section 4.2: how well does the best single latent tell a known feature?


def logistic_loss(t, sign):
    """-log σ of the margins sign * t, averaged over the first dimension."""
    return F.softplus(-sign * t).mean(0)


@torch.no_grad()
def newton_logistic(z, y, steps=100, tol=1e-9):
    """The m one-dimensional logistic regressions of y (N) in {0, 1} on the columns of z (N, m), all
    at once, by Newton's method. Returns (loss (m), w (m), b (m)): mean nats, and the probe σ(w z +
    b) in the units of z. Within 1e-6 of the optimum; on separable columns, where that is 0 at
    infinity, w and b are finite. Constant columns give w = 0. Raises ValueError unless y has both
    classes."""
    z = z if z.dtype == torch.float64 else z.float()
    y = y.to(z)
    if not 0 < y.mean() < 1:
        raise ValueError("a probe needs examples of both classes")
    sign = (2 * y - 1)[:, None]
    center = z.median(0).values  # not the mean: one huge value must not swallow the others' digits
    x = z - center
    scale = x.square().mean(0).sqrt()
    constant = scale == 0
    scale = torch.where(constant, 1.0, scale)
    x = x / scale
    w = torch.zeros_like(scale)
    b = torch.logit(y.mean()).expand_as(scale).clone()
    loss = logistic_loss(x * w + b, sign)
    for _ in range(steps):
        p = torch.sigmoid(-sign * (x * w + b))  # (N, m), the probability of being wrong
        g = -sign * p
        h = p * (1 - p)
        # In coordinates centred by the weights h the 2 x 2 Hessian is diagonal.
        h_b = h.mean(0).clamp_min(1e-30)
        c = (h * x).mean(0) / h_b
        x_c = x - c
        h_w = (h * x_c.square()).mean(0).clamp_min(1e-30)
        g_w, g_b = (g * x_c).mean(0), g.mean(0)
        d_w, d_b = torch.where(constant, 0.0, g_w / h_w), g_b / h_b
        decrement = g_w * d_w + g_b * d_b  # twice the gain a quadratic would promise
        active = decrement > tol
        if not active.any():
            break
        step = active.to(z)  # halved where the loss does not fall enough
        for _ in range(40):
            new_w = w - step * d_w
            new_b = b - step * (d_b - c * d_w)
            new = logistic_loss(x * new_w + new_b, sign)
            worse = active & ~(new <= loss - 0.1 * step * decrement)
            if not worse.any():
                break
            step = torch.where(worse, step / 2, step)
        better = new < loss
        w = torch.where(better, new_w, w)
        b = torch.where(better, new_b, b)
        loss = torch.where(better, new, loss)
        if not better.any():  # down to rounding
            break
    w = w / scale
    return loss, w, b - w * center


def best_probe(features, width, y, fit, rest):
    """The best probe of y on `width` features (slice -> (N, m)), chosen on examples `fit`."""
    best = {"loss": math.inf}
    m = max(1, 2**21 // len(fit))
    for start in range(0, width, m):
        z = features(slice(start, start + m)).float()
        loss, i = newton_logistic(z[fit], y[fit])[0].min(0)
        if loss < best["loss"]:
            held_out = newton_logistic(z[rest, i : i + 1], y[rest])[0].item()
            best = {"loss": loss.item(), "held_out": held_out, "index": start + int(i)}
    return best


def probe_rows(result):
    """Of each task: its name, held-out loss of the best latent and channel, and of the majority."""
    held_out = lambda t: (t["latent"]["held_out"], t["channel"]["held_out"], t["majority"])
    return [[name, *held_out(t)] for name, t in result["per_task"].items()]


@metric(lambda c: probes(c.sae, c.tasks()), depends=("probes",),
    notes=lambda r: ["    {:<28} latent {:.4f}  channel {:.4f}  majority {:.4f}".format(*row)
                     for row in probe_rows(r)],
    page=lambda r: {"tasks": probe_rows(r)}, rows=[
    ("held_out", "probe loss, best latent, held-out half", "nats", "tasks"),
    ("loss", "probe loss, best latent, selection half", "nats", "tasks"),
    ("channel_held_out", "probe loss, best channel, held-out half", "nats", "tasks"),
    ("majority", "probe loss, majority", "nats", "tasks")])  # fmt: skip
@torch.no_grad()
def probes(sae, tasks, seed=0):
    """tasks: yields (name, x (N, d) raw activations, u (N, d) the same as the autoencoder sees
    them, y (N) in {0, 1}). For each task the latent with the best probe (on pre-activations) is
    chosen on one half of the examples. Its probe loss there ("loss", the paper's, optimistic as a
    minimum over n) and on the other half ("held_out") is reported; channels of x likewise, and
    always predicting the share of positives ("majority"). Means over tasks, with standard errors
    over tasks; `per_task` has each. Raises UserError where there is no task."""
    per_task = {}
    for name, x, u, y in tasks:
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        # shuffled within each class
        order = order[y.cpu()[order].sort(stable=True).indices].to(u.device)
        fit, rest = order[::2], order[1::2]
        v = u - sae.b_pre
        latents = lambda s: F.linear(v, sae.W_enc[s], sae.b_enc[s])
        majority = logistic_loss(torch.logit(y[fit].float().mean()), 2 * y[rest] - 1.0)
        result = {"examples": len(y), "positive": y.float().mean().item()}
        result["latent"] = best_probe(latents, sae.n_latents, y, fit, rest)
        result["channel"] = best_probe(lambda s: x[:, s], x.shape[1], y, fit, rest)
        per_task[name] = result | {"majority": majority.item()}
    if not per_task:
        raise UserError("no probe task has enough examples here; evaluate on more --tokens")
    out = {"tasks": len(per_task), "per_task": per_task}
    for kind, prefix in (("latent", ""), ("channel", "channel_")):
        for key in ("loss", "held_out"):
            out |= means(**{prefix + key: [t[kind][key] for t in per_task.values()]})
    return out | means(majority=[t["majority"] for t in per_task.values()])


def token_labels(tokens, encoding, phrases=4):
    """Built-in tasks on tokens (C, T): name -> labels (C, T), 1 or 0, or -1 where the task does not
    ask. They need no download. Spelling of the token, its place, and `phrases` of the form "is this
    the second word of a frequent two-word phrase?", asked at all occurrences of that word."""
    bytes_of = encoding.decode_single_token_bytes
    words = [bytes_of(i).decode("utf-8", "replace") for i in range(encoding.n_vocab)]
    bare = [w.strip() for w in words]
    spelling = {
        "leading space": [w.startswith(" ") for w in words],
        "contains a digit": [any(c.isdigit() for c in w) for w in words],
        "all digits": [w.isdigit() for w in bare],
        "leading capital": [w[:1].isupper() for w in bare],
        "all capitals": [len(w) > 1 and w.isalpha() and w.isupper() for w in bare],
        "no alphanumeric": [not any(c.isalnum() for c in w) for w in words],
    }
    C, T = tokens.shape
    labels = {name: torch.tensor(of)[tokens].long() for name, of in spelling.items()}
    if labels["all digits"].equal(labels["contains a digit"]):  # digits are never mixed with others
        del labels["all digits"]
    labels["first half of the context"] = (torch.arange(T) < T // 2).long().expand(C, T)
    before = torch.cat([torch.full((C, 1), -1), tokens[:, :-1]], 1)
    newline = torch.tensor(["\n" in w for w in words])[before].long()
    labels["follows a newline"] = torch.where(before >= 0, newline, -1)

    alphabetic = torch.tensor([w.isalpha() and len(w) > 1 for w in bare])
    both = alphabetic[tokens] & alphabetic[before] & (before >= 0)
    pairs, counts = (before * len(words) + tokens)[both].unique(return_counts=True)
    uses = torch.bincount(tokens[:, 1:].flatten(), minlength=len(words))
    found = set()
    for i in counts.argsort(descending=True, stable=True).tolist():
        first, second = divmod(pairs[i].item(), len(words))
        if len(found) == phrases or counts[i] * 2000 < counts.sum():
            break
        if second not in found and counts[i] <= 0.8 * uses[second]:  # also met elsewhere
            found.add(second)
            here = (tokens == second) & (before >= 0)
            name = f"phrase {words[first].strip()} {bare[second]}"
            labels[name] = torch.where(here, (before == first).long(), -1)
    return labels


def token_tasks(sae, x, tokens, encoding, most=2048, least=64, seed=0):
    """Yield for `probes` the built-in tasks on activations x (C, T, d) of tokens (C, T): as many
    positive as negative examples, at most `most` of each; tasks with fewer than `least` of each are
    left out."""
    flat = x.flatten(0, 1)
    for name, y in token_labels(tokens.cpu(), encoding).items():
        y = y.flatten()
        gen = torch.Generator().manual_seed(seed)
        sides = [(y == value).nonzero().flatten() for value in (0, 1)]
        size = min(most, *map(len, sides))
        if size >= least:
            picked = [side[torch.randperm(len(side), generator=gen)[:size]] for side in sides]
            picked = torch.cat(picked)
            some = flat[picked.to(flat.device)].to(sae.W_dec)
            yield name, some, sae.unit(some)[0], y[picked].to(some.device)


def read_tasks(folder):
    """Folder of NAME.jsonl -> {NAME: (texts, labels)}. Raises UserError naming file and line."""
    form = '{"text": "...", "label": 0 or 1}'
    files = sorted(Path(folder).glob("*.jsonl"))
    if not files:
        raise UserError(f"{folder} holds no NAME.jsonl; each line of one is {form}")
    tasks = {}
    for file in files:
        rows = []
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            at = f"{file}, line {number}:"
            try:
                row = json.loads(line)
                text, label, empty = row["text"], row["label"], not row["text"].strip()
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{at} not {form}") from None
            if empty or label not in (0, 1):
                why = "the text is empty" if empty else f"the label is {label!r}, not 0 or 1"
                raise UserError(f"{at} {why}")
            rows.append((text, int(label)))
        texts, labels = zip(*rows) if rows else ((), ())
        no, yes = labels.count(0), labels.count(1)
        if min(no, yes) < 2:
            have = f"{no} examples of class 0 and {yes} of class 1"
            raise UserError(f"{file}: {have}; a probe needs at least two of each")
        tasks[file.stem] = texts, labels
    return tasks


@torch.no_grad()
def text_tasks(sae, site, encoding, tasks, length=64, batch=256):
    """Yield for `probes` tasks {name: (texts, labels)}: a text's features are means over its
    tokens, read in contexts of `length`. The mean pre-activation is the pre-activation of the mean
    input."""
    for name, (texts, labels) in tasks.items():
        rows = []
        for i, ids in enumerate(encoding.encode_ordinary_batch(texts)):
            rows += [(i, ids[j : j + length]) for j in range(0, len(ids), length)]
        rows.sort(key=lambda row: len(row[1]))
        x = torch.zeros(len(texts), sae.d_model, device=site.device, dtype=sae.W_dec.dtype)
        u = torch.zeros_like(x)
        count = torch.zeros_like(x[:, :1])
        for part in chunks(len(rows), batch, f"probes {name}", " contexts"):
            owners, ids = zip(*rows[part])
            tokens, lengths = pad_right(ids)
            here = torch.arange(tokens.shape[1])[None] < lengths[:, None]
            acts = site.acts(tokens).to(x)[here.to(x.device)]
            owner = torch.tensor(owners).repeat_interleave(lengths).to(x.device)
            x.index_add_(0, owner, acts)
            u.index_add_(0, owner, sae.unit(acts)[0])
            count.index_add_(0, owner, torch.ones_like(acts[:, :1]))
        yield name, x / count, u / count, torch.tensor(labels, device=x.device)


def pad_right(sequences):
    """Lists of ids -> (tokens (B, longest), lengths (B)). A causal model sees no padding."""
    lengths = torch.tensor([len(s) for s in sequences])
    tokens = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
    here = torch.arange(tokens.shape[1])[None] < lengths[:, None]
    tokens[here] = torch.tensor([t for s in sequences for t in s])
    return tokens, lengths


# --------------------------------------------------------------------------------------------------
# Explanations by Neuron2Graph (Foote et al. 2023), section 4.3.

WILDCARD, START, END = -1, -2, -3  # any token; nothing before; the activation of a whole pattern


class N2G:
    """An explanation of one latent: n-gram patterns with wildcards, in a trie read backwards.
    patterns: list of (token ids, activation); an id may be WILDCARD, and the first one START."""

    def __init__(self, patterns):
        acts = defaultdict(list)
        for pattern, act in patterns:
            acts[tuple(pattern)].append(act)
        self.patterns = [(pattern, float(np.mean(a))) for pattern, a in acts.items()]
        self.trie = {}
        for pattern, act in self.patterns:
            insert(self.trie, pattern)[END] = act

    @classmethod
    def build(cls, acts_fn, examples, pad):
        """acts_fn: lists of ids -> lists of activations; examples: (ids, index of activation)."""
        work = {i: find_pattern(list(ids[: at + 1]), pad) for i, (ids, at) in enumerate(examples)}
        last = lambda asked: [acts[-1] for acts in acts_fn([ids for _, ids in asked])]
        return cls([pattern for pattern in run_together(work, last).values() if pattern])

    def at(self, tokens, t):
        """Activation predicted at position t: of the longest, most exact pattern there; else 0."""
        return next(matches(self.trie, tokens, t), 0.0)

    def predict(self, tokens):
        """token ids -> predicted activations, one per position."""
        tokens = [int(t) for t in tokens]
        return [self.at(tokens, t) for t in range(len(tokens))]

    def readable(self, encoding):
        """Patterns as text, strongest first: ^ for the start of the context, * for any token."""
        text = lambda t: json.dumps(encoding.decode([t]), ensure_ascii=False)
        show = lambda t: {WILDCARD: "*", START: "^"}.get(t) or text(t)
        strongest = sorted(self.patterns, key=lambda p: -p[1])
        return [f"{' '.join(map(show, pattern))}  ({act:.3f})" for pattern, act in strongest]


def insert(trie, pattern):
    """The node of a trie that `pattern` leads to, made if it is not there."""
    for token in reversed(pattern):
        trie = trie.setdefault(token, {})
    return trie


def matches(trie, tokens, t):
    """What stands at END of every pattern in the trie that ends at position t: the exact token
    before the wildcard, longer before shorter. Unlike the released code this backtracks: where an
    exact token leads to a dead end, a wildcard beside it is still tried."""
    stack = [(trie, t)]
    while stack:
        node, t = stack.pop()
        if t is None:
            yield node
            continue
        if END in node:
            stack.append((node[END], None))
        for key in (WILDCARD, tokens[t]) if t >= 0 else (START,):  # the last one is tried first
            if key in node:
                stack.append((node[key], t - 1))


def find_pattern(tokens, pad):
    """One example, cut after the token it fires on, as a generator: yields lists of token-id lists,
    is sent the latent's activation on the last token of each, and returns (pattern, activation), or
    None where the latent turns out not to fire."""
    (full,) = yield [tokens]
    if full <= 0:
        return None
    # The shortest suffix with half the activation; lengths are asked for in groups: 1, 2-3, 4-7 ...
    length, act, n = len(tokens), full, 1
    while n < len(tokens):
        group = range(n, min(2 * n, len(tokens)))
        acts = yield [tokens[-m:] for m in group]
        if strong := [(m, a) for m, a in zip(group, acts) if a >= 0.5 * full]:
            length, act = strong[0]
            break
        n *= 2
    suffix = tokens[-length:]
    # With padding before it: is it bound to the start? In place of a token: does that one matter?
    others = [[*suffix[:j], pad, *suffix[j + 1 :]] for j in range(length)]
    before, *without = yield [[pad, *suffix], *others]
    # The padding token itself cannot be tested this way, so it stays.
    pattern = [WILDCARD if t != pad and 1 - a / act < 0.5 else t for t, a in zip(suffix, without)]
    return ([START] if before < 0.5 * full else []) + pattern, act


def run_together(generators, ask):
    """Run many generators at once, so that their questions reach the model in full batches. ->
    {key: what each returned} generators: {key: generator that yields lists of questions}; ask: list
    of (key, question) -> list of answers."""
    results, waiting = {}, {key: next(g) for key, g in generators.items()}
    while waiting:
        answers = iter(ask([(key, q) for key, questions in waiting.items() for q in questions]))
        for key, questions in list(waiting.items()):
            try:
                waiting[key] = generators[key].send([next(answers) for _ in questions])
            except StopIteration as done:
                results[key] = done.value
                del waiting[key]
    return results


@torch.no_grad()
def last_token_acts(sae, site, asked, batch_tokens):
    """asked: list of ((latent, example), ids) -> the latent's activation on each one's last token,
    as a list. Equal questions of different latents are run through the model once."""
    order = sorted({tuple(tokens) for _, tokens in asked}, key=len)
    place = {tokens: i for i, tokens in enumerate(order)}
    latent = torch.tensor([key[0] for key, _ in asked])
    row, by_row = torch.tensor([place[tuple(tokens)] for _, tokens in asked]).sort(stable=True)
    answers = torch.zeros(len(asked))
    start = 0
    while start < len(order):
        most = batch_tokens // len(order[start])
        longest = len(order[min(start + most, len(order)) - 1])
        count = max(1, batch_tokens // longest)
        tokens, lengths = pad_right(order[start : start + count])
        acts = site.acts(tokens, len(tokens))[torch.arange(len(tokens)), lengths - 1]
        values, indices = (c.cpu() for c in sae.encode(sae.unit(acts)[0]))
        some = slice(*torch.searchsorted(row, torch.tensor([start, start + count])).tolist())
        for r, which in zip(row[some].split(2**16), by_row[some].split(2**16)):
            hits = indices[r - start] == latent[which][:, None]
            answers[which] = (values[r - start] * hits).sum(1).float()
        start += count
    return answers.tolist()


def active_pairs(sae, x):
    """Raw x (..., d) -> all active (latent, token, value), (P) each, sorted by latent, token."""
    parts, start = [], 0
    for _, values, indices in codes(sae, x):
        token, j = (values > 0).nonzero(as_tuple=True)
        parts.append((indices[token, j], token + start, values[token, j]))
        start += len(values)
    latent, token, value = (torch.cat(part).cpu() for part in zip(*parts))
    order = latent.sort(stable=True).indices
    return latent[order], token[order], value[order]


def positives(sae, x):
    """Raw activations x (C, T, d) -> {latent: (P) the tokens, of C T, where it is active}."""
    latent, token, _ = active_pairs(sae, x)
    found, counts = latent.unique_consecutive(return_counts=True)
    return dict(zip(found.tolist(), token.split(counts.tolist())))


def some_of(tokens, many, seed):
    """A seeded choice of `many` of the tokens (P), as a list."""
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    return tokens[order[:many]].tolist()


def explain(sae, site, tokens, x, pad, most=2048, examples=16, seed=0):
    """N2G explanations {latent: N2G} from tokens (C, T), activations x (C, T, d): of at most `most`
    latents (a seeded sample), each from `examples` random tokens of those it fires on."""
    T = tokens.shape[1]
    rows = tokens.tolist()
    where = positives(sae, x)
    latents = [i for i, p in where.items() if len(p) >= examples]
    if len(latents) > most:
        latents = np.random.default_rng(seed).choice(latents, most, replace=False).tolist()
    reach = site.model.config.n_ctx - 1  # one place is left for the padding
    until = lambda p: rows[p // T][: p % T + 1][-reach:]
    jobs = [(i, p) for i in sorted(latents) for p in some_of(where[i], examples, seed)]
    batch_tokens = 2**18 if site.device.type == "cuda" else 2**13
    ask = lambda asked: last_token_acts(sae, site, asked, batch_tokens)
    patterns = {i: [] for i, _ in jobs}
    # `size` bounds the questions in flight
    for part in chunks(len(jobs), max(16, 2**24 // T**2), "n2g", " examples"):
        found = run_together({(i, p): find_pattern(until(p), pad) for i, p in jobs[part]}, ask)
        for (i, _), pattern in found.items():
            patterns[i] += [pattern] if pattern else []
    return {i: N2G(p) for i, p in patterns.items()}


def simulate(explanations, tokens):
    """What explanations predict on tokens (C, T) -> (latent, token of C T, value), (P) each."""
    trie = {}  # one for all: END holds {latent: activation}
    for i, e in explanations.items():
        for pattern, act in e.patterns:
            insert(trie, pattern).setdefault(END, {})[i] = act
    found, rows, T = (array("q"), array("q"), array("f")), tokens.tolist(), tokens.shape[1]
    for part in chunks(len(rows), 1, "simulate", " contexts"):
        c = part.start
        for t in range(T):
            first = {}  # the first match of each latent counts
            for leaf in matches(trie, rows[c], t):
                for i, act in leaf.items():
                    first.setdefault(i, act)
            for column, more in zip(found, (first, [c * T + t] * len(first), first.values())):
                column.extend(more)
    latent, at, value = (torch.from_numpy(np.array(column)) for column in found)
    return latent[value > 0], at[value > 0], value[value > 0]


def n2g_and_samples(c):
    """Case -> what `n2g` finds, how many latents are explained, and some explanations to read."""
    found = c.explanations
    result = n2g(c.sae, found, c.val_tokens, c.val, c.n_contexts)
    some = np.random.default_rng(0).permutation(sorted(result["per_latent"]))[:5].tolist()
    samples = {i: found[i].readable(c.encoding)[:6] for i in some}
    unexplained = c.sae.n_latents - len(found)
    return result | {"explained": len(found), "unexplained": unexplained, "samples": samples}


@metric(n2g_and_samples, depends=("latents",),
    notes=lambda r: ["    skipped, too few positives: {skipped} of {explained} explained; too few"
                     " to explain: {unexplained} latents".format(**r)] + [
                     f"    latent {i}: {'  '.join(text)}" for i, text in r["samples"].items()],
    page=lambda r: {"n2g": {i: [*pick(v, "precision", "recall").values()]
                            for i, v in r["per_latent"].items()}}, rows=[
    ("recall", "N2G recall", "", "latents"),
    ("precision", "N2G precision", "", "latents_with_precision")])  # fmt: skip
def n2g(sae, explanations, tokens, x, contexts=512, examples=16, seed=0):
    """Precision and recall of explanations on text they were not made from: tokens (C, T) with
    activations x (C, T, d). recall: of `examples` random tokens on which the latent fires, the
    share where its explanation predicts it. precision: of all predictions in the first `contexts`
    contexts, the share where the latent fires. Means over latents with standard errors over
    latents; latents that fire on too few tokens here are skipped and counted, and latents without
    any prediction have no precision."""
    T, rows = tokens.shape[1], tokens.tolist()
    where = positives(sae, x)
    recall = {}
    for i, e in explanations.items():
        if len(where.get(i, ())) >= examples:
            chosen = some_of(where[i], examples, seed)
            recall[i] = float(np.mean([e.at(rows[p // T], p % T) > 0 for p in chosen]))
    latent, token, _ = simulate({i: explanations[i] for i in recall}, tokens[:contexts])
    truth = [p + i * tokens.numel() for i, p in where.items()]
    truth = torch.cat(truth or [torch.empty(0, dtype=torch.long)])
    right = torch.isin(latent * tokens.numel() + token, truth).double()
    said = torch.bincount(latent, minlength=sae.n_latents)
    hits = torch.bincount(latent, right, minlength=sae.n_latents)
    precision = {i: (hits[i] / said[i]).item() for i in recall if said[i]}
    out = means(precision=list(precision.values()), recall=list(recall.values()))
    out |= {"latents": len(recall), "latents_with_precision": len(precision)}
    per_latent = {i: {"recall": r, "precision": precision.get(i)} for i, r in recall.items()}
    return out | {"skipped": len(explanations) - len(recall), "per_latent": per_latent}


# --------------------------------------------------------------------------------------------------
# Explanation reconstruction, section 4.4: the model goes on with what explanations predict.


def prediction_scales(sae, explanations, tokens, x):
    """E[s a] / E[s^2] (n) of predictions s and activations a on tokens (C, T), x (C, T, d)."""
    latent, token, s = simulate(explanations, tokens)
    active_latent, active_token, a = active_pairs(sae, x)
    active = active_latent * tokens.numel() + active_token  # sorted
    key = latent * tokens.numel() + token
    at = torch.searchsorted(active, key).clamp_max(max(len(active) - 1, 0))
    a = torch.where(active[at] == key, a[at], 0.0) if len(active) else torch.zeros_like(s)
    sums = torch.zeros(2, sae.n_latents).index_add_(1, latent, torch.stack([s * a, s * s]))
    return sums[0] / sums[1].clamp_min(1e-30)


@metric(lambda c: explanation_reconstruction(c.sae, c.site, c.chosen, c.explanations,
    c.more_tokens[: c.n_contexts], c.seen[: c.n_contexts],
    c.train and harvest.ngram_losses(c.train.tokens, c.chosen.numpy(), c.site.n_vocab)[1]),
    depends=("latents",),
    notes=lambda r: ["    {explained} of {of_latents} latents explained, the others are zero"
                     .format(**r)], rows=[
    ("ce", "CE of the explanations", "nats/token", "tokens"),
    ("delta_ce", "ΔCE of the explanations", "nats/token", "tokens"),
    ("ce_without_latents", "CE with no latent at all", "nats/token", "tokens"),
    ("bigram", "CE of a bigram model", "nats/token", "tokens")])  # fmt: skip
@torch.no_grad()
def explanation_reconstruction(sae, site, tokens, explanations, train_tokens, train, bigram=None):
    """ΔCE on tokens (C', T) when each latent is replaced by its explanation's prediction s, scaled
    by E[s a] / E[s^2] from training text (train_tokens (C, T) and activations train (C, T, d));
    latents without explanation are zero. bigram: the loss of a bigram model of the same tokens, the
    baseline to beat."""
    scale = prediction_scales(sae, explanations, train_tokens, train).to(sae.W_dec.device)
    latent, token, s = (v.to(scale.device) for v in simulate(explanations, tokens))
    u_hat = sae.b_pre.expand(tokens.numel(), -1).clone()
    z = (s * scale[latent]).to(u_hat)
    for i, t, v in zip(*(c.split(2**16) for c in (latent, token, z))):
        u_hat.index_add_(0, t, sae.W_dec[i] * v[:, None])
    x = site.acts(tokens).to(u_hat)
    _, mean, norm = sae.unit(x)
    nothing = (sae.b_pre * norm + mean).expand_as(x)
    edits = {"explained": u_hat.view(x.shape) * norm + mean, "b_pre": nothing}
    per = patched_losses(site, tokens, edits, "explanations")
    out = means(ce=per["ce_explained"], delta_ce=per["delta_explained"])
    out |= means(ce_without_latents=per["ce_b_pre"])
    out |= {"bigram": bigram} if bigram else {}
    count = {"explained": len(explanations), "of_latents": sae.n_latents}
    return out | count | {"tokens": len(tokens) * (tokens.shape[1] - 1)}


# --------------------------------------------------------------------------------------------------
# Sparsity of ablation effects, section 4.5.


def effect_sparsity(delta):
    """Differences of logits delta (T, V) -> (L1 / L2)^2 / (V T) after subtracting the median over V
    at each position: the share of logits that are moved. 1/(V T) for a single one, 2/π for Gaussian
    noise, 1 for equal sizes. Also (..., T, V) -> (...)."""
    delta = (delta - delta.median(-1, keepdim=True).values).flatten(-2)
    share = delta.abs().sum(-1).square() / delta.square().sum(-1) / delta.shape[-1]
    return share if share.ndim else share.item()


def take_away(place, part):
    """An edit of (B, T, d): at position place[b], part(activations there (B, d)) is taken away."""

    def edit(a):
        at = torch.arange(len(a), device=a.device)
        taken = part(a[at, place]).to(a)
        a = a.clone()
        a[at, place] -= taken
        return a

    return edit


def ablation_shares(site, row, at, parts):
    """Take each of parts (P, d) away at position `at` of the context row (T): sparsity of the
    effects from there on and there alone (P', 2), of those with any effect."""
    clean = site.logits(row[None])[0, at:]
    shares = [parts.new_empty(0, 2)]
    size = max(1, 2**25 // (site.n_vocab * len(row)))
    for some in parts.split(size) if len(parts) else ():
        place = torch.full((len(some),), at, device=row.device)
        edit = take_away(place, lambda a, some=some: some)
        delta = site.logits(row.expand(len(some), -1), edit)[:, at:] - clean
        shares.append(torch.stack([effect_sparsity(delta), effect_sparsity(delta[:, :1])], 1))
    shares = torch.cat(shares)
    return shares[shares.isfinite().all(1)].double()


@metric(lambda c: ablation_sparsity(c.sae, c.site, c.chosen), rows=[
    ("latents", "logits moved by ablating a latent", "of V T", "samples"),
    ("channels", "the same, a channel", "of V T", "samples"),
    ("random", "the same, a random direction", "of V T", "samples"),
    ("latents_here", "at its own position alone, a latent", "of V", "samples"),
    ("channels_here", "the same, a channel", "of V", "samples"),
    ("random_here", "the same, a random direction", "of V", "samples")])  # fmt: skip
@torch.no_grad()
def ablation_sparsity(sae, site, tokens, T=16, samples=64, directions=32, seed=0):
    """How many of the next T positions' logits does ablating one thing at one position move? Means
    with standard errors over `samples` random (context, position) of tokens (C, length). latents:
    each active latent's decoded contribution is taken from the original activation, so the
    reconstruction error stays. channels: `directions` random coordinates are set to zero. random:
    the projections on so many random directions are taken away. `_here`: the same of the first of
    the T positions alone, which tells sparsity over the vocabulary from sparsity over time."""
    T = min(T, tokens.shape[1])
    rng, gen = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    found, effects = defaultdict(list), 0
    for _ in chunks(samples, 1, "ablation", " positions"):
        row = tokens[int(rng.integers(len(tokens)))].to(site.device)
        at = int(rng.integers(len(row) - T + 1))
        row = row[: at + T]
        act = site.model.acts(row[None], site.layer, site.name)[0, at].to(sae.W_dec)
        u, _, norm = sae.unit(act[None])
        values, indices = (c[0] for c in sae.encode(u))
        some = torch.randperm(len(act), generator=gen)[:directions].to(act.device)
        lines = F.normalize(torch.randn(directions, len(act), generator=gen), dim=1).to(act)
        parts = {
            "latents": (sae.W_dec[indices] * values[:, None] * norm)[values > 0],
            "channels": F.one_hot(some, len(act)).to(act) * act[some, None],
            "random": lines * (lines @ act)[:, None],
        }
        for name, part in parts.items():
            shares = ablation_shares(site, row, at, part)
            effects += len(shares) if name == "latents" else 0
            if len(shares):
                found[name].append(shares[:, 0].mean().item())
                found[name + "_here"].append(shares[:, 1].mean().item())
    names = [name + where for name in parts for where in ("", "_here")]
    out = means(**{name: found[name] for name in names})
    return out | {"samples": samples, "ablations": effects}


# --------------------------------------------------------------------------------------------------
# Scaling laws, section 3.

LAW = ("alpha", "beta_k", "beta_n", "gamma", "zeta", "eta")  # the parameters of L(n, k)
BRIEF = ("path", "n_latents", "k", "tokens", "nmse")  # what is shown of a run


def levenberg_marquardt(model, theta):
    """Least squares from one start. model: θ (p) -> r (R), Jacobian (R, p). -> θ, r, J."""
    damping = 1e-3
    r, J = model(theta)
    for _ in range(500):
        A = J.T @ J
        damped = A + damping * np.diag(np.diag(A) + 1e-12)
        new = theta + np.linalg.lstsq(damped, -J.T @ r, rcond=None)[0]
        with np.errstate(over="ignore", invalid="ignore"):
            r_new, J_new = model(new)
        if r_new @ r_new < r @ r:
            gained = 1 - r_new @ r_new / (r @ r)
            theta, r, J = new, r_new, J_new
            damping = max(damping / 5, 1e-15)
            if gained < 1e-12 or r @ r < 1e-28:
                break
        elif (damping := damping * 4) > 1e12:
            break
    return theta, r, J


def fit_exponentials(terms, loss, seed=0):
    """Least squares of ln loss (R) by ln Σ_j exp(terms[j] @ θ_j), terms[j] (R, p_j), best of many
    starts. Returns (θ concatenated, standard errors, R² of ln loss, residual sum of squares).
    Standard errors are nan without spare runs."""
    y, rng = np.log(loss), np.random.default_rng(seed)
    cuts = np.cumsum([X.shape[1] for X in terms])[:-1]

    def model(theta):
        parts = np.stack([X @ t for X, t in zip(terms, np.split(theta, cuts))])  # (terms, R)
        top = parts.max(0)
        total = top + np.log(np.exp(parts - top).sum(0))
        slopes = [X * np.exp(p - total)[:, None] for X, p in zip(terms, parts)]
        return total - y, np.concatenate(slopes, 1)

    solve = lambda X, target: np.linalg.lstsq(X, target, rcond=None)[0]
    fits = []
    for share in np.repeat([0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98], 8) if len(terms) > 1 else [0.0]:
        # A start: the second term is a constant floor, the first explains what is left above it.
        floor = share * loss.min()
        start = [solve(terms[0], np.log(loss - floor))]
        start += [solve(X, np.full(len(y), math.log(floor))) for X in terms[1:]]
        start = np.concatenate(start)
        if share:
            start = start + 0.1 * rng.standard_normal(len(start)) * np.abs(start)
        fits.append(levenberg_marquardt(model, start))
    theta, r, J = min(fits, key=lambda fit: fit[1] @ fit[1])
    rss, spare = float(r @ r), len(y) - len(theta)
    errors = np.full(len(theta), np.nan)
    if spare > 0:
        with np.errstate(invalid="ignore"):  # nan for a parameter that the runs do not determine
            errors = np.sqrt(np.diag(np.linalg.pinv(J.T @ J)) * rss / spare)
    size = np.sqrt((J * J).sum(0))
    errors[size < 1e-9 * size.max()] = np.nan  # a vanished term: the loss says nothing about it
    return theta, errors, 1 - rss / max(float(((y - y.mean()) ** 2).sum()), 1e-300), rss


def fit_law(names, terms, loss):
    """A sum of exponentials fitted to loss (R): its parameters by `names`, their standard errors
    (`_se`), `fitted`, r2 and rmse of ln loss, the same with the first term alone (`_without`), and
    delta_aic (AICc, small-sample), the evidence for the others (positive: needed)."""
    R = len(loss)
    theta, errors, r2, rss = fit_exponentials(terms, loss)
    _, _, r2_without, rss_without = fit_exponentials(terms[:1], loss)

    def aicc(rss, p):
        spare = R - p - 1
        return R * math.log(max(rss, 1e-300)) + 2 * p * R / spare if spare > 0 else math.nan

    cuts = np.cumsum([X.shape[1] for X in terms])
    parts = [np.exp(X @ t) for X, t in zip(terms, np.split(theta, cuts))]
    out = dict(zip(names, theta.tolist()))
    out |= {name + "_se": error for name, error in zip(names, errors.tolist())}
    out |= {"fitted": sum(parts).tolist(), "r2": r2, "rmse": math.sqrt(rss / R)}
    out |= {"r2_without": r2_without, "rmse_without": math.sqrt(rss_without / R)}
    # the variance is a parameter too
    delta_aic = aicc(rss_without, cuts[0] + 1) - aicc(rss, cuts[-1] + 1)
    return out | {"delta_aic": delta_aic, "runs": R}


def fit_scaling_law(runs):
    """L(n, k) = exp(α + β_k ln k + β_n ln n + γ ln k ln n) + exp(ζ + η ln k) through runs: dicts
    with n_latents, k, nmse. Returns what `fit_law` does, by the names in LAW; delta_aic is nan with
    fewer than 9 runs. Raises UserError for fewer runs than parameters, or where n or k do not vary
    enough."""
    n, k, loss = (np.array([r[key] for r in runs], float) for key in ("n_latents", "k", "nmse"))
    why = ""
    if len(runs) < len(LAW):
        why = f"has {len(LAW)} parameters, and there are {len(runs)} runs"
    elif len(set(k)) < 2 or len(set(n)) < 3:
        here = f"k {sorted(set(k))} and n {sorted(set(n))}"
        why = f"needs at least two k and three n; here are {here}"
    if why:
        raise UserError(f"L(n, k) {why}; nothing is fitted")
    one, lk, ln = np.ones(len(k)), np.log(k), np.log(n)
    terms = [np.stack([one, lk, ln, lk * ln], 1), np.stack([one, lk], 1)]
    return fit_law(LAW, terms, loss)


def fit_power_law(x, loss):
    """L = exp(a + b ln x) + exp(c): L(N) with x = n, L(C) with x = compute in FLOPs. -> a, b,
    floor = exp(c), errors, r2, r2_without. Raises UserError for fewer points than parameters."""
    if (points := len(set(x))) < 3:
        there = f"3 parameters, and there are {points} points"
        raise UserError(f"a power law with a floor has {there}; nothing is fitted")
    one = np.ones(len(x))
    terms = [np.stack([one, np.log(np.array(x, float))], 1), one[:, None]]
    fit = fit_law(("a", "b", "c"), terms, np.array(loss, float))
    floor = math.exp(fit["c"])
    out = pick(fit, "a", "a_se", "b", "b_se") | {"floor": floor, "floor_se": floor * fit["c_se"]}
    return out | pick(fit, "r2", "r2_without", "runs")


def read_lines(path):
    """A log of JSON lines as a list of dicts; empty where there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_runs(paths):
    """Run directories -> dicts: n_latents, k, nmse, where, curve [(FLOPs, held-out NMSE)]."""
    runs = []
    for path in map(Path, paths):
        if not (path / "sae.pt").exists():
            print(f"  {path}: no finished run, left out", file=sys.stderr)
            continue
        own = load_file(path / "sae.pt").get("sae", {})
        meta = own.get("meta", {})
        config = meta.get("config", {})
        score = min(meta.get("nmse", {}).values(), default=math.nan)
        if config.get("l1") or config.get("multi_topk") or not math.isfinite(score):
            why = "not a plain TopK run" if math.isfinite(score) else "has no held-out NMSE"
            print(f"  {path}: {why}, left out", file=sys.stderr)
            continue
        flops = 6 * own["d_model"] * own["n_latents"]  # a token, dense, as the appendix counts
        lines = [line for line in read_lines(path / "log.jsonl") if "val_nmse" in line]
        curve = [(flops * line["tokens"], line["val_nmse"]) for line in lines]
        run = {"path": str(path), "tokens": meta["tokens"], "nmse": score, "curve": curve}
        where = {name: meta.get(name) for name in PLACE}
        runs.append(run | pick(own, "n_latents", "k") | {"where": where})
    if len(kinds := sorted({str(run["where"]) for run in runs})) > 1:
        what = "models, layers, sites or texts; fit one kind at a time"
        raise UserError(f"these runs are of different {what}: {'; '.join(kinds)}")
    return runs


def fit_main(paths):
    """`--fit`: L(n, k) through all runs, then L(N) and L(C) at the k with the most n."""
    runs = read_runs(paths)
    out = {"runs": [pick(run, *BRIEF) for run in runs]}
    pm = lambda fit, name: f"{fit[name]:.4g} ± {fit[name + '_se']:.2g}"
    row = "  n {n_latents:>8}  k {k:>4}  {tokens:>13,} tokens  NMSE {nmse:.4f}"
    for run in sorted(runs, key=lambda r: (r["k"], r["n_latents"])):
        print(row.format(**run))
    try:
        fit = out["L(n, k)"] = fit_scaling_law(runs)
        law = "exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)"
        print(f"L(n, k) = {law}\n  {', '.join(f'{name} {pm(fit, name)}' for name in LAW)}")
        without = "without the irreducible term {r2_without:.5f}, {rmse_without:.3%}"
        aic = "ΔAIC {delta_aic:.1f} in its favour; {runs} runs"
        print(f"  R² of ln L {{r2:.5f}}, rms error {{rmse:.3%}}; {without}; {aic}".format(**fit))
    except UserError as e:
        print(f"L(n, k): {e}")
    sizes = lambda k: len({run["n_latents"] for run in runs if run["k"] == k})
    k = max((run["k"] for run in runs), key=lambda k: (sizes(k), k), default=0)
    same = [run for run in runs if run["k"] == k]
    frontier = []
    for flops, nmse in sorted(point for run in same for point in run["curve"]):
        if not frontier or nmse < frontier[-1][1]:
            frontier.append((flops, nmse))
    of_n = [(run["n_latents"], run["nmse"]) for run in same]
    for name, points in (("L(N)", of_n), ("L(C)", frontier)):
        try:
            fit = fit_power_law([x for x, _ in points], [y for _, y in points])
            out[f"{name}, k = {k}"] = fit
            law = f"exp({pm(fit, 'a')}) x^({pm(fit, 'b')}) + {pm(fit, 'floor')}"
            r2 = f"R² {fit['r2']:.5f}, without the floor {fit['r2_without']:.5f}"
            print(f"{name} at k = {k}: {law}; {r2}; {fit['runs']} points")
        except UserError as e:
            print(f"{name} at k = {k}: {e}")
    return out


# --------------------------------------------------------------------------------------------------
# The report: one page that opens from disk, with everything known about an autoencoder's latents.


def pack(array):
    """An array as JSON: type, base64 bytes. int64, never negative here, is cut to its need."""
    if array.dtype == np.int64:
        array = array.astype(np.min_scalar_type(array.max(initial=0)))
    raw = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    return {"type": array.dtype.str[1:], "data": base64.b64encode(raw).decode()}


def top_two_ways(scores, k):
    """scores (L, V), less their mean -> indices, values (L, 2 k): the k largest, the k smallest."""
    scores = scores - scores.mean(1, keepdim=True)
    ways = [scores.topk(k, dim=1), scores.topk(k, dim=1, largest=False)]
    return torch.cat([w.indices for w in ways], 1), torch.cat([w.values for w in ways], 1)


def ranked(group, score):
    """Order by group, then falling score -> (order, place of each in its group), (P) each."""
    order = np.lexsort((-score, group))
    of = group[order]
    return order, np.arange(len(of)) - np.searchsorted(of, of)


def live_pairs(sae, x, most=0, seed=0):
    """Latents that fire on x (C, T, d), at most `most` -> their numbers (L); and of all pairs (P)
    where they do, in order: row of the latent among them, token, activation."""
    latent, token, value = (v.numpy() for v in active_pairs(sae, x))
    live = np.unique(latent)
    if not len(live):
        raise UserError("no latent fires on this text; there is nothing to show")
    if most and len(live) > most:
        live = np.sort(np.random.default_rng(seed).permutation(live)[:most])
    kept = np.isin(latent, live)
    return live, np.searchsorted(live, latent[kept]), token[kept], value[kept].astype(np.float64)


def moments(row, value, n_tokens):
    """Statistics (L) of each latent's activations where it fires (mean square: over all tokens)."""
    counts = np.bincount(row)
    starts = np.cumsum(counts) - counts
    mean = np.add.reduceat(value, starts) / counts
    moment = lambda p: np.add.reduceat((value - mean[row]) ** p, starts) / counts
    spread = np.sqrt(moment(2))
    square = np.add.reduceat(value**2, starts)
    out = {"density": counts / n_tokens, "mean": mean, "mean square": square / n_tokens}
    for name, p in (("skew", 3), ("kurtosis", 4)):
        with np.errstate(all="ignore"):
            out[name] = np.where(spread > 1e-9 * mean, moment(p) / spread**p, np.nan)
    return out | {"max": np.maximum.reduceat(value, starts)}


def main_tokens(row, ids, value, n_vocab, top=5):
    """The tokens, of ids (P), that carry most of a latent's activation; what share: (L, top)."""
    pairs, where = np.unique(row * n_vocab + ids, return_inverse=True)
    of, token = np.divmod(pairs, n_vocab)
    share = np.bincount(where, value) / np.bincount(row, value)[of]
    order, place = ranked(of, share)
    best, place = order[place < top], place[place < top]
    main = np.zeros((2, row[-1] + 1, top))
    main[:, of[best], place] = token[best], share[best]
    return main[0].astype(int), main[1]


def example_contexts(row, token, value, peak, T, n):
    """For each latent the contexts of its n highest peaks, then n evenly spaced to the lowest:
    number, how many activations; how many contexts a latent; position and value (65535: the peak)
    of all."""
    context = token // T
    new = (np.diff(row, prepend=-1) != 0) | (np.diff(context, prepend=-1) != 0)
    group = np.flatnonzero(new)
    size = np.diff(group, append=len(row))
    order, place = ranked(row[group], np.maximum.reduceat(value, group))
    of = row[group][order]
    later = place - n
    last = np.maximum(np.bincount(of)[of] - n - 1, 1)
    step = lambda i: i * (n - 1) // last
    some = order[(place < n) | (later >= 0) & (step(later) != step(later - 1))]
    first, size = group[some], size[some]
    pairs = np.repeat(first - np.cumsum(size) + size, size) + np.arange(size.sum())
    shown = np.maximum(1, np.round(value[pairs] / peak[row[pairs]] * 65535))
    out = {"context": context[first], "pairs": size, "per latent": np.bincount(row[first])}
    return out | {"position": token[pairs] % T, "value": shown.astype(np.uint16)}


def decoder_rows(sae, site, live, k, near):
    """Of latents live (L): direct effect on the logits over its largest, and nearest rows."""
    parts = defaultdict(list)
    every = F.normalize(sae.W_dec.float(), dim=1)
    unembedding = site.model.wte.weight.float()
    for w in sae.W_dec[torch.from_numpy(live).to(every.device)].float().split(1024):
        if w.shape[1] == unembedding.shape[1] and site.name != "mlp_post_act":
            out = (w - w.mean(1, keepdim=True)) * site.model.ln_f.weight.float()
            tokens, values = top_two_ways(out @ unembedding.T, k)
            parts["direct"].append(tokens)
            largest = values.abs().amax(1, keepdim=True).clamp_min(1e-30)
            parts["direct value"].append(values / largest)
        cosine, latents = (F.normalize(w, dim=1) @ every.T).topk(near, dim=1)
        parts["near"].append(latents)
        parts["near cosine"].append(cosine.clamp(-1, 1))
    out = {name: torch.cat(part).cpu().numpy() for name, part in parts.items()}
    for name in {"direct value", "near cosine"} & out.keys():  # between -1 and 1
        out[name] = np.round(32767 * out[name]).astype(np.int16)
    return out


@torch.no_grad()
def measured_effects(sae, site, tokens, latents, at, values, k):
    """Take each latent's contribution away where it is highest: `at` (L), a place in the flat
    tokens (C, T), `values` (L) there. -> tokens (L, 2 k) whose logits, against their mean, it
    raises and lowers most; by how much, in nats; and (L, 2): the loss of the next token without it
    (nan at the end of a context), less that with it, and KL(with || without)."""
    T = tokens.shape[1]
    found = []
    batch = max(1, min(256, 2**28 // (site.n_vocab * T)))  # 1 GB of logits
    order = np.argsort(at % T, kind="stable")  # contexts are cut after the place: alike in length
    for part in chunks(len(order), batch, "ablation", " latents"):
        some = order[part]
        place = torch.from_numpy(at[some] % T).to(site.device)
        every = torch.arange(len(some), device=site.device)
        rows = tokens[at[some] // T].to(site.device)
        following = rows[every, (place + 1).clamp(max=T - 1)]
        rows = rows[:, : int(place.max()) + 1]
        row = sae.W_dec[torch.from_numpy(latents[some]).to(site.device)]
        taken = torch.from_numpy(values[some, None]).to(row) * row
        edit = take_away(place, lambda a, taken=taken: taken * sae.unit(a)[2])
        logits = (site.logits(rows, e)[every, place].float() for e in (None, edit))
        clean, without = (v.log_softmax(1) for v in logits)
        change = clean - without
        loss = torch.where(place < T - 1, change[every, following], math.nan)
        kl = (clean.exp() * change).sum(1).clamp_min(0)
        found.append((*top_two_ways(change, k), torch.stack([loss, kl], 1)))
    back = torch.from_numpy(np.argsort(order))
    names = ("effect", "effect value", "effect size")
    return {n: torch.cat(v).cpu()[back].numpy() for n, v in zip(names, zip(*found))}


def vocabulary(encoding, n):
    """The text of ids below n; empty where the encoding has a gap."""
    known = {encoding.encode_single_token(b) for b in encoding.token_byte_values()}
    known.add(encoding.eot_token)
    text = lambda i: encoding.decode_single_token_bytes(i).decode("utf-8", "backslashreplace")
    return [text(i) if i in known else "" for i in range(n)]


@torch.no_grad()
def report(sae, site, tokens, x, encoding, most=0, held_out=None, examples=6, bins=12, seed=0):
    """What the page shows of single latents, from tokens (C, T) with raw activations x (C, T, d),
    as a dict ready for JSON: density, moments and histogram of its activations; `examples` contexts
    with the highest peaks and as many evenly spaced to the lowest; the tokens that carry its
    activation; its direct effect on the logits (decoder row through the final norm and the
    unembedding) and the measured one where it is highest; the nearest decoder rows. most: at most
    so many latents, a seeded sample; 0: all that fire. held_out: so many contexts, the first, are
    held-out text, the others training text (default: all are)."""
    C, T = tokens.shape
    ids = tokens.flatten().numpy()
    live, row, token, value = live_pairs(sae, x, most, seed)
    stats = moments(row, value, C * T)
    peak = stats["max"]
    counts, edges = np.histogram(value, 40)
    bin_of = np.minimum(bins - 1, (value / peak[row] * bins).astype(int))
    main, share = main_tokens(row, ids[token], value, site.n_vocab)
    order, place = ranked(row, value)
    highest = token[order[place == 0]]
    k, near = min(8, site.n_vocab // 2), min(6, sae.n_latents)
    numbers = decoder_rows(sae, site, live, k, near)
    numbers |= measured_effects(sae, site, tokens, live, highest, peak, k)
    page = {"T": T, "n_live": len(live), "held_out": C if held_out is None else held_out}
    page |= {"normalized": sae.normalized, "bins": bins, "top": k, "near": near}
    page |= {"examples": examples, "tokens": pack(ids)}
    page |= {"vocabulary": vocabulary(encoding, site.n_vocab)}
    page |= {"latents": pack(live.astype(np.uint32))}
    page |= {"activations": {"edges": edges.tolist(), "counts": counts.tolist()}}
    page |= {"histogram": pack(np.bincount(row * bins + bin_of, minlength=len(live) * bins))}
    page |= {"stats": {name: pack(v.astype(np.float32)) for name, v in stats.items()}}
    page |= {"main": pack(main), "main share": pack(np.round(255 * share).astype(np.uint8))}
    shown = example_contexts(row, token, value, peak, T, examples)
    page |= {"shown": {name: pack(v) for name, v in shown.items()}}
    return page | {"numbers": {name: pack(v) for name, v in numbers.items()}}


def finite(v):
    """The same JSON with null for what it cannot say."""
    if isinstance(v, dict):
        return {key: finite(x) for key, x in v.items()}
    if isinstance(v, (list, tuple)):
        return [finite(x) for x in v]
    return None if isinstance(v, float) and not math.isfinite(v) else v


def write_report(path, page):
    """The page as a file, its data a JSON block with no `<` that could be taken for a tag."""
    data = json.dumps(finite(page), allow_nan=False).replace("<", "\\u003c")
    text = PAGE.replace("/*STYLE*/", STYLE).replace("/*SCRIPT*/", SCRIPT)
    with harvest.atomic(path) as f:
        f.write(text.replace("/*DATA*/", data).encode())


def make_report(case, results, runs):
    """Everything known: results, curves, latents, the law through several runs. -> its path"""
    tokens = torch.cat([case.val_tokens, case.more_tokens])
    held_out = len(case.val) if case.train else None
    x = torch.cat([case.val, case.more])
    page = report(case.sae, case.site, tokens, x, case.encoding, case.a.latents, held_out)
    page |= {"about": results["about"], "metrics": [], "tasks": [], "dense": [], "plots": {}}
    lines = read_lines(Path(case.run) / "log.jsonl")
    curves = ("tokens", "nmse", "val_nmse", "dead", "l0", "tokens_per_s")
    page["curves"] = {name: [line.get(name) for line in lines] for name in curves}
    page |= {"runs": [], "n2g": {}, "patterns": {}}
    for name in [name for name in METRICS if name in results]:
        for key, value in METRICS[name].page(results[name]).items():
            page[key] = page[key] | value if key == "plots" else value
    for name, result in results.items():
        for label, value, error, unit, size, why in cells(name, result):
            page["metrics"].append([label, value, error, why if value is None else unit, size])
    if len(runs) > 1:
        try:
            page["runs"] = [pick(run, *BRIEF) for run in read_runs(runs)]
            law = fit_scaling_law(page["runs"])["fitted"]
            page["runs"] = [run | {"law": loss} for run, loss in zip(page["runs"], law)]
        except UserError as e:
            print(f"  no law through these runs: {e}", file=sys.stderr)
    kept = case.beside("n2g.json")
    if page["n2g"] and kept.exists():
        latents = json.loads(kept.read_text())["latents"]
        page["patterns"] = {i: e["readable"][:8] for i, e in latents.items()}
    write_report(case.beside("report.html"), page)
    return case.beside("report.html")


# --------------------------------------------------------------------------------------------------
# The command line.


def load(path, device):
    """A run directory or a file -> (SAE, its file, the JSON file for its results)."""
    path = Path(path)
    if path.is_file():
        return Sparse.load(path, device), path, path.with_suffix(".evals.json")
    file = path / "sae.pt"
    if not file.exists() and any(path.glob("checkpoint*")):
        how = f"python sae.py --resume --out {path} and the options it was started with"
        raise UserError(f"{path} is not finished; continue it with: {how}")
    return Sparse.load(file if path.is_dir() else path, device), file, path / "evals.json"


def stamp(path):
    """A path as something that changes with the file; names such as `stdlib` stay themselves."""
    path = Path(path)
    return [str(path), *([path.stat().st_size, path.stat().st_mtime] if path.exists() else [])]


class Case:
    """One autoencoder with what its metrics need; a: the command line. What cannot be had in the
    constructor ends the evaluation; what only some metrics need is made, or missed, by them
    alone."""

    def __init__(self, run, a):
        self.run, self.a = run, a
        self.device = harvest.pick_device(a.device or "")
        cuda = self.device.startswith("cuda")
        self.latents = a.latents or 2048
        self.n_tokens = a.tokens or (2**18 if cuda else 2**16)
        self.n_contexts = a.contexts or (2048 if cuda else 512)
        self.sizes = {"tokens": self.n_tokens, "contexts": self.n_contexts}
        self.texts = read_tasks(a.probes) if a.probes else None
        self.sae, self.file, self.out = load(run, self.device)
        self.config = self.sae.meta.get("config", {})
        held_out, self.train, model, self.encoding = self.source()
        self.where = held_out.meta
        layer, site = self.where["layer"], self.where["site"]
        d, n, k = self.sae.d_model, self.sae.n_latents, self.sae.k
        if self.where["d_model"] != d:
            widths = f"activations of width {d}, these have {self.where['d_model']}"
            raise UserError(f"{run} is for {widths}; give its own --model, --layer and --site")
        self.site = Site(model, layer, site)
        kind = f"TopK k = {k}" if k < n else "ReLU"
        self.about = (
            f"{run}: {self.where['model']}, layer {layer}, {site}, d = {d}, n = {n}, {kind};"
            f" text: {self.where['text']}"
        )
        stamps = [stamp(path) for path in (self.file, self.where["model"], self.where["text"])]
        settings = {"where": self.where, "trained": self.sae.meta, "files": stamps}
        self.settings = json.loads(json.dumps(settings))  # as it will be read back
        self.sample(held_out)

    def source(self):
        """Held-out and training activations: of --acts, or of the harvest it was trained on if
        still there; else of held-out text, and None. And model and encoding."""
        a, meta = self.a, self.sae.meta
        asked = {name: value for name in PLACE if (value := getattr(a, name)) is not None}
        place = {name: meta[name] for name in PLACE if name in meta} | asked
        differs = lambda where: [name for name in place if where[name] != place[name]]
        acts = a.acts or self.config.get("acts")
        if a.acts or (acts and harvest.is_harvested(acts) and not differs(harvest.read_meta(acts))):
            held_out, train = harvest.Acts(acts, "val"), harvest.Acts(acts, "train")
            for name in differs(train.meta):
                how = "is asked about" if name in asked else "was trained on"
                but = f"but {self.run} {how} {name} {place[name]}"
                raise UserError(f"{acts} holds {name} {train.meta[name]}, {but}; give other --acts")
            return held_out, train, *harvest.load_model(train.meta["model"], self.device)
        name, site = place.get("model", "auto"), place.get("site", "resid_post_mlp")
        model, encoding = harvest.load_model(name, self.device, needs_text="text" not in place)
        text = place.get("text") or harvest.default_text(model)
        where = (text, place.get("layer"), site, meta.get("context"))
        return harvest.Stream(model, encoding, *where), None, model, encoding

    def sample(self, held_out):
        """Take val, held-out activations (contexts, T, d), chosen, tokens for losses, and `more`:
        of training text in the order in which training saw it, else held-out."""
        T = self.where["context"]
        n = max(1, self.n_tokens // T)
        first = max(n, self.n_contexts)
        tokens, acts = held_out.sample((first if self.train else first + n) * T)
        if self.train:
            seed, size = self.config.get("seed", 0), len(self.train)
            order = next(harvest.shuffled_blocks(size, size, seed, 0))[0]
            self.more_tokens, more = self.train[order[:n]]
        else:
            self.more_tokens, more = tokens[first:], acts[first:]
        self.val_tokens, self.val, self.more = tokens[:n], acts[:n].float(), more.float()
        self.chosen = tokens[: self.n_contexts]
        self.few = max(1, 2**14 // T)  # contexts for what is slow

    def beside(self, name):
        """The path of another file about this autoencoder."""
        return self.out.with_name(self.out.name.replace("evals.json", name))

    @property
    def seen(self):
        """`more`, which must be there."""
        if not len(self.more):
            raise UserError("the held-out text is too short; give more --text")
        return self.more

    @property
    def trained_on(self):
        """`more`, which must be of what it was trained on."""
        if not self.train or self.train.path != Path(self.config.get("acts") or ""):
            raise UserError("the activations it was trained on are not at hand")
        return self.more

    @cached_property
    def k(self):
        """Active latents a token, of ReLU ones as measured."""
        if self.sae.k < self.sae.n_latents:
            return self.sae.k
        return max(1, round(reconstruction(self.sae, self.val[:64])["l0"]))

    @cached_property
    def explanations(self):
        """{latent: N2G}, made once and kept in n2g.json."""
        path = self.beside("n2g.json")
        key = self.settings | self.sizes | {"latents": self.latents}
        saved = json.loads(path.read_text()) if path.exists() and not self.a.again else {}
        if saved.get("settings") == key:
            return {int(i): N2G(e["patterns"]) for i, e in saved["latents"].items()}
        pad = self.encoding.encode_ordinary(" _")[-1]
        found = explain(self.sae, self.site, self.more_tokens, self.seen, pad, self.latents)
        shown = lambda e: {"patterns": e.patterns, "readable": e.readable(self.encoding)}
        latents = {i: shown(e) for i, e in found.items()}
        harvest.write_json(path, {"settings": key, "latents": latents})
        return found

    @property
    def probes(self):
        """--probes and its files."""
        folder = self.a.probes
        return folder and [folder, *map(stamp, sorted(Path(folder).glob("*.jsonl")))]

    def tasks(self):
        """For `probes`: those of --probes, or the built-in ones."""
        if self.texts:
            T = self.where["context"]
            return text_tasks(self.sae, self.site, self.encoding, self.texts, T)
        return token_tasks(self.sae, self.val, self.val_tokens, self.encoding)


def cells(name, result):
    """A result -> (label, value, standard error, unit, sample, why no value) of each line."""
    rows = METRICS[name].rows if name in METRICS else ()
    for key, label, unit, of in rows:
        if key not in result:
            continue
        values, errors = result[key], result.get(key + "_se")
        if not isinstance(values, list):
            values, errors = [values], [errors]
        size = f"{result[of]:,} {of.replace('_', ' ')}"
        for at, value, error in zip(result.get("at", [""]), values, errors):
            error = error if error is not None and math.isfinite(error) else None
            yield label.format(at), value, error, unit, size, result.get(key + "_why")


def table(name, result):
    """One metric's result -> lines of the table: value, standard error, unit, sample size."""
    lines = []
    for label, value, error, unit, size, why in cells(name, result):
        value = f"{value:10.4f}" if value is not None else f"         -  ({why})"
        error = f" ± {error:.4f}" if error is not None else ""
        count, of = size.split(" ", 1)
        lines.append(f"  {label:<40}{value}{error:<10} {unit:<14} {count:>9} {of}".rstrip())
    return lines + METRICS[name].notes(result)


def evaluate(run, wanted, a):
    """Compute, print and keep the metrics `wanted` of one autoencoder. a: the command line."""
    began = time.time()
    case = Case(run, a)
    out = case.out
    # What an earlier call found for the same file and place is kept: what was interrupted goes on.
    results = json.loads(out.read_text()) if out.exists() else {}
    if results.get("settings") != case.settings:
        results = {"about": case.about, "settings": case.settings}
    if not a.json:
        print(case.about)
    for name in wanted:
        this = METRICS[name]
        asked = case.sizes | {key: getattr(case, key) for key in this.depends}
        if a.again or results.get(name, {}).get("asked") != asked:
            try:
                results[name] = {"asked": asked} | this.compute(case)
            except UserError as e:  # too little data for this one: the others go on
                print(f"  {name}: {e}", file=sys.stderr)
                continue
            harvest.write_json(out, results)
        if not a.json:
            print("\n".join(table(name, results[name])), flush=True)
    if a.json:
        print(json.dumps(results, indent=1))
    if a.report:
        out = make_report(case, results, a.runs)
    print(f"{time.time() - began:.0f} s; written to {out}", file=sys.stderr)


# fmt: off
OPTIONS = {  # name: type and help
    "all": (bool, "every metric, not only the quick ones"),
    "only": (str, f"just these, separated by commas: {','.join(METRICS)}"),
    "fit": (bool, "fit the scaling laws through the runs, and nothing else"),
    "probes": (str, 'folder of NAME.jsonl with {"text": ..., "label": 0|1}: probe these instead of'
               " the built-in token tasks"),
    "acts": (str, "harvested activations; default: those it was trained on, else text is run"
             " through --model"),
    "model": (str, "subject model where there are no harvested activations (default: the one it was"
              " trained on)"),
    "layer": (int, "default: the one it was trained on, else two thirds of the depth"),
    "site": (str, "default: the one it was trained on, else resid_post_mlp; one of"
             f" {', '.join(SITES)}"),
    "text": (str, "text where there are no harvested activations (default: what the model was"
             " trained on)"),
    "tokens": (int, "tokens for NMSE, density, probes, N2G; 0: 2^18 on CUDA, 2^16 on CPU"),
    "contexts": (int, "held-out contexts for downstream losses; 0: 2048 on CUDA, 512 on CPU"),
    "report": (bool, "write report.html beside the results, a page to open in a browser; several"
               " runs are overlaid"),
    "latents": (int, "most latents that N2G explains (default: 2048) and that --report shows"
                " (default: all that fire)"),
    "device": (str, "cuda or cpu; default: cuda if there"),
    "again": (bool, "compute anew what is asked for"),
    "json": (bool, "print JSON instead of the table"),
}
# fmt: on


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    files = "directories under runs/, or files: sae.pt or one of OpenAI's autoencoders"
    p.add_argument("runs", nargs="+", help=files)
    for name, (kind, text) in OPTIONS.items():
        how = {"action": "store_true"} if kind is bool else {"type": kind}
        p.add_argument("--" + name, help=text, **how)
    a = p.parse_args(argv)
    keep_heap()
    if a.fit:
        out = fit_main(a.runs)
        if a.json:
            print(json.dumps(out, indent=1))
        return
    wanted = (a.only or "").split(",")
    if not a.only:
        asked = lambda name: a.all or METRICS[name].quick or (name == "probes" and a.probes)
        wanted = [name for name in METRICS if asked(name)]
    if unknown := [name for name in wanted if name not in METRICS]:
        raise UserError(f"no metric {', '.join(unknown)}; choose among {', '.join(METRICS)}")
    for run in a.runs:
        evaluate(run, wanted, a)


# --------------------------------------------------------------------------------------------------
# The page of the report: template, style and script.

PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,"><title>Sparse autoencoder</title><style>/*STYLE*/</style></head>
<body><header><nav aria-label="Pages"><a href="#overview">Overview</a> <a href="#latents">Latents</a> <button id="random" type="button">Random latent (r)</button></nav>
<form id="search" role="search"><label for="query">Find latents by word or token</label> <input id="query" type="search" autocomplete="off" placeholder="a word  ( / )"></form> <span id="status" role="status"></span></header>
<main id="main" tabindex="-1"></main><noscript>This page needs JavaScript, its own; it loads nothing.</noscript>
<script type="application/json" id="data">/*DATA*/</script><script>/*SCRIPT*/</script></body></html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fdfdfb; --faint: #6a6a66; --line: #d8d8d2; --mark: 214, 106, 0; --shade: 214, 106, 0; --blue: #1f5fa8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e6e1; --paper: #17181a; --faint: #a3a19b; --line: #3a3b3e; --mark: 255, 160, 60; --shade: 180, 85, 0; --blue: #8ab8f0; } }
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
header { display: flex; flex-wrap: wrap; gap: .5em 2em; padding: .6em 1em; border-bottom: 1px solid var(--line); align-items: center; }
main { padding: 0 1em 3em; max-width: 75em; margin: auto; outline: none; }
nav a, nav button { margin-right: .8em; } a { color: var(--blue); }
button, input, select { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--faint); border-radius: 4px; padding: .15em .5em; }
:focus-visible { outline: 3px solid var(--blue); outline-offset: 1px; }
h1 { font-size: 1.35em; margin: 1em 0 .3em; } h2 { font-size: 1.05em; margin: 1.6em 0 .3em; } p, ul { max-width: 60em; }
h1, p, li { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .1em .7em .1em 0; text-align: left; border-bottom: 1px solid var(--line); } td { white-space: nowrap; }
td.number, th.number { text-align: right; } th button { border: 0; padding: 0; font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21em), 1fr)); gap: 1em; } figure { margin: 0; }
figcaption { font-weight: 600; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--ink); font-size: 11px; } .axis { stroke: var(--line); }
details { color: var(--faint); font-size: .9em; }
.context { font: 13px/1.9 ui-monospace, monospace; overflow-wrap: anywhere; border-left: 3px solid var(--line); padding-left: .7em; margin: .4em 0; }
.token { unicode-bidi: isolate; border-bottom: 0 solid rgb(var(--mark)); }
.token.peak { font-weight: 700; text-decoration: underline dotted; text-underline-offset: 4px; }
.word { font-family: ui-monospace, monospace; border: 1px solid var(--line); border-radius: 3px; padding: 0 .25em; unicode-bidi: isolate; white-space: pre-wrap; overflow-wrap: anywhere; }
td .word { white-space: pre; } .faint { color: var(--faint); }
.key { white-space: nowrap; margin-right: 1em; font-size: .85em; } .key svg { width: 30px; height: 8px; display: inline-block; margin-right: .4em; }
.columns { display: flex; flex-wrap: wrap; gap: 0 2.5em; } .columns > * { min-width: 0; } section { flex: 1 1 19em; }
li { white-space: pre-wrap; font: 13px/1.6 ui-monospace, monospace; }
"""

SCRIPT = r"""
'use strict';
const D = JSON.parse(document.getElementById('data').textContent), main = document.getElementById('main');
const kinds = {u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i2: Int16Array, f4: Float32Array};
const unpack = p => p && new kinds[p.type](Uint8Array.from(atob(p.data), c => c.charCodeAt(0)).buffer);
const once = make => { let made; return () => made ??= make(); };
const lazily = (packed, names = Object.keys(packed)) => Object.fromEntries(names.map(n => [n, once(() => unpack(packed[n]))]));  // unpacked when first needed
const part = lazily(D, ['tokens', 'latents', 'histogram', 'main', 'main share']), stat = lazily(D.stats), shown = lazily(D.shown), number = lazily(D.numbers);
const sums = a => { const s = new Uint32Array(a.length + 1); a.forEach((v, i) => s[i + 1] = s[i] + v); return s; };
const firstExample = once(() => sums(shown['per latent']())), firstPair = once(() => sums(shown.pairs()));
const upTo = n => Array.from({length: n}, (_, i) => i), zip = (a, b) => a.map((v, i) => [v, b[i] ?? NaN]);

// Small makers of elements; text only ever goes in as text.
function el(tag, attributes = {}, ...children) {
  const svg = ['svg', 'g', 'line', 'rect', 'path', 'circle', 'text'].includes(tag) || attributes.svg;
  const e = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
  for (const [k, v] of Object.entries(attributes))
    if (k.startsWith('on')) e.addEventListener(k.slice(2), v);
    else if (k !== 'svg' && v != null) e.setAttribute(k, v);
  e.append(...children.flat().filter(c => c != null));
  return e;
}
const sign = {' ': '·', '\n': '↵', '\t': '⇥', '\r': '␍'};
const visible = t => t.replace(/[ \p{C}\u2028\u2029\ufffd]/gu, c => sign[c] ?? '\\u{' + c.codePointAt(0).toString(16) + '}') || '∅';
const figure = v => v == null || Number.isNaN(v) ? '–' : Number.isInteger(v) ? v.toLocaleString('en')
  : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3 ? v.toExponential(2) : String(+v.toPrecision(4));
const word = id => el('span', {class: 'word'}, visible(D.vocabulary[id]));
const link = (id, text = 'latent ' + id) => el('a', {href: '#latent/' + id}, text), say = text => document.getElementById('status').textContent = text;
const count = (n, of) => `${figure(n * D.T)} ${of} tokens`, others = part.tokens().length / D.T - D.held_out;
const texts = count(D.held_out, 'held-out') + (others ? ` and ${count(others, 'training')}` : '');
const faint = text => el('p', {class: 'faint'}, text);
const scroll = (name, inside) => el('div', {class: 'scroll', tabindex: 0, role: 'region', 'aria-label': name}, inside);
function table(head, rows, caption = head.join(', ')) {
  const th = (h, j) => el('th', typeof rows[0]?.[j] === 'number' ? {class: 'number'} : {}, h);
  const td = v => v == null || typeof v === 'number' ? el('td', {class: 'number'}, figure(v)) : el('td', {}, v);
  return scroll(caption, el('table', {}, el('thead', {}, el('tr', {}, head.map(th))), el('tbody', {}, rows.map(r => el('tr', {}, r.map(td))))));
}

// Plots. An axis is a function from values to places, and about five round values with theirs.
function axis(values, log, from, to, zero) {
  const f = log ? Math.log10 : v => v;
  let lo = Math.min(...values.map(f)), hi = Math.max(...values.map(f));
  if (zero && !log) lo = Math.min(lo, 0);
  if (hi - lo < 1e-9) { lo -= .5; hi += .5; }
  const at = v => from + (f(v) - lo) / (hi - lo) * (to - from), inside = v => f(v) >= lo - 1e-9 && f(v) <= hi + 1e-9;
  const even = (lo, hi) => {
    const raw = (hi - lo) / 4, power = 10 ** Math.floor(Math.log10(raw)), step = power * [1, 2, 5, 10].find(m => m * power >= raw), first = Math.ceil(lo / step);
    return upTo(Math.floor(hi / step + 1e-9) - first + 1).map(i => (first + i) * step);
  };
  const powers = upTo(40).flatMap(p => (hi - lo < 1.5 ? [1, 2, 5] : [1]).map(m => m * 10 ** (p - 20))).filter(inside);
  const ticks = !log ? even(lo, hi) : powers.length > 1 ? powers : even(10 ** lo, 10 ** hi);
  const short = v => Math.abs(v) < 1e4 ? figure(v) : v.toLocaleString('en', {notation: 'compact', maximumSignificantDigits: 6});
  return {at, ticks: ticks.map(v => +v.toPrecision(12)).map(v => [at(v), Number.isInteger(v) ? short(v) : Math.abs(v) < 1e-3 ? v.toExponential() : String(v)])};
}
// series: {name, points: [[x, y], ...], bars: width of each, which begins at x, law: dotted}. Each point has a tooltip; below are the same numbers.
function plot(title, xLabel, yLabel, series, {logX, logY} = {}) {
  series = series.map(s => ({...s, all: s.points.filter(p => p.every(Number.isFinite))}));
  series = series.map(s => ({...s, points: s.all.filter(p => (!logX || p[0] > 0) && (!logY || p[1] > 0))})).filter(s => s.points.length);
  if (!series.length) return null;
  const W = 380, H = 230, L = 56, R = 10, T = 8, B = 40, points = series.flatMap(s => s.points), many = series.length > 1, bars = series[0].bars || 0;
  const x = axis(points.flatMap(p => [p[0], p[0] + bars]), logX, L, W - R), y = axis(points.map(p => p[1]), logY, H - B, T, bars);
  const svg = el('svg', {viewBox: `0 0 ${W} ${H}`, role: 'img', 'aria-label': `${title}: ${yLabel} against ${xLabel}; the numbers are in the table below`});
  const write = (x, y, text, anchor = 'middle', more = {}) => svg.append(el('text', {x, y, 'text-anchor': anchor, ...more}, text));
  for (const [p, t] of x.ticks) { svg.append(el('line', {class: 'axis', x1: p, x2: p, y1: T, y2: H - B})); write(p, H - B + 14, t); }
  for (const [p, t] of y.ticks) { svg.append(el('line', {class: 'axis', x1: L, x2: W - R, y1: p, y2: p})); write(L - 4, p + 4, t, 'end'); }
  write((L + W) / 2, H - 8, xLabel);
  write(12, (H - B) / 2, yLabel, 'middle', {transform: `rotate(-90 12 ${(H - B) / 2})`});
  const xOf = p => bars ? `${figure(p[0])} to ${figure(p[0] + bars)}` : p[0];
  series.forEach((s, i) => {
    const style = s.law ? series.findIndex(t => t.name === s.of) : i;
    s.colour = ['var(--blue)', 'rgb(var(--mark))', 'var(--ink)', 'var(--faint)'][style % 4];
    s.dash = s.law ? '1 4' : ['', '6 3', '2 2', '8 2 2 2', '12 3'][style % 5];
    const tip = p => el('title', {svg: 1}, `${s.name ? s.name + ': ' : ''}${xLabel} ${bars ? xOf(p) : figure(p[0])}, ${yLabel} ${figure(p[1])}`);
    if (bars) for (const p of s.points) {
      const size = {width: Math.max(1, x.at(p[0] + bars) - x.at(p[0]) - 1), height: Math.max(0, H - B - y.at(p[1]))};
      svg.append(el('rect', {x: x.at(p[0]), y: y.at(p[1]), ...size, fill: s.colour}, tip(p)));
    } else {
      const path = 'M' + s.points.map(p => x.at(p[0]) + ',' + y.at(p[1])).join('L');
      svg.append(el('path', {d: path, fill: 'none', stroke: s.colour, 'stroke-width': 1.6, 'stroke-dasharray': s.dash}, s.law ? el('title', {svg: 1}, s.name) : null));
      if (!s.law) svg.append(...s.points.map(p => el('circle', {cx: x.at(p[0]), cy: y.at(p[1]), r: s.points.length > 60 ? 1.6 : 3, fill: s.colour}, tip(p))));
    }
  });
  const sample = s => el('svg', {viewBox: '0 0 30 8', 'aria-hidden': 'true'},
    el('line', {x1: 0, x2: 30, y1: 4, y2: 4, stroke: s.colour, 'stroke-width': 2, 'stroke-dasharray': s.dash}),
    s.law ? null : el('circle', {cx: 15, cy: 4, r: 3, fill: s.colour}));
  const keys = series.filter(s => many && !s.law).map(s => el('span', {class: 'key'}, sample(s), s.name));
  const dotted = series.some(s => s.law) ? [el('span', {class: 'key'}, 'dotted: the fitted law')] : [];
  const rows = series.flatMap(s => s.all.map(p => [...(many ? [s.name] : []), xOf(p), p[1]]));
  return el('figure', {}, el('figcaption', {}, title), svg, el('div', {}, keys, dotted),
    el('details', {}, el('summary', {}, 'as a table'), table([...(many ? ['series'] : []), xLabel, yLabel], rows, title)));
}
function histogram(title, xLabel, {counts, edges}, yLabel = 'latents') {
  const used = upTo(counts.length).filter(i => counts[i]), from = used[0], to = used[used.length - 1] + 1;
  return plot(title, xLabel, yLabel, [{bars: edges[1] - edges[0], points: zip(edges.slice(from, to), counts.slice(from, to))}]);
}

function overview() {
  const c = D.curves, {log10_density, log10_mean_square, positions, test_time_k} = D.plots, logs = {logX: true, logY: true};
  const plots = [
    plot('Training: NMSE', 'tokens', 'NMSE',
      [{name: 'training batches', points: zip(c.tokens, c.nmse)}, {name: 'held-out', points: zip(c.tokens, c.val_nmse)}], {logY: true}),
    plot('Training: dead latents', 'tokens', 'latents', [{points: zip(c.tokens, c.dead)}]),
    plot('Training: L0', 'tokens', 'latents a token', [{points: zip(c.tokens, c.l0)}]),
    plot('Training: speed', 'tokens', 'tokens a second', [{points: zip(c.tokens, c.tokens_per_s)}]),
    log10_density && histogram('How often latents fire, held-out', 'log10 of the share of tokens', log10_density),
    log10_mean_square && histogram('Mean square activation, held-out', 'log10 E[z²]', log10_mean_square),
    histogram('Activations of the latents shown', 'activation', D.activations, 'tokens'),
    positions && plot('NMSE by position', 'position in the context', 'NMSE', [{points: positions.nmse.map((v, i) => [i, v])}]),
    positions && plot('Norm of the input by position', 'position in the context', 'norm', [{points: positions.norm.map((v, i) => [i, v])}]),
    test_time_k && plot('NMSE at other k', "k'", 'NMSE', [{points: zip(test_time_k.at, test_time_k.nmse)}], logs),
    test_time_k && plot('ΔCE at other k', "k'", 'nats a token', [{points: zip(test_time_k.at, test_time_k.delta_ce)}], logs)];
  const values = key => [...new Set(D.runs.map(r => r[key]))].sort((a, b) => a - b);
  const along = (name, key, x) => ['nmse', 'law'].flatMap(what => values(key).map(v => {
    const runs = D.runs.filter(r => r[key] === v).sort((a, b) => a[x] - b[x]), of = `${name} = ${v}`, law = what === 'law';
    return {name: law ? `law, ${of}` : of, of, law, points: runs.map(r => [r[x], r[what] ?? NaN])};
  }));
  plots.push(plot('All runs: NMSE against n', 'latents n', 'NMSE', along('k', 'k', 'n_latents'), logs));
  plots.push(plot('All runs: NMSE against k', 'k', 'NMSE', along('n', 'n_latents', 'k'), logs));
  const more = (title, head, rows) => rows.length ? [el('h2', {}, title), table(head, rows, title)] : [];
  main.replaceChildren(el('h1', {}, 'Sparse autoencoder'), el('p', {}, D.about),
    el('p', {}, `${figure(D.n_live)} latents are shown, on ${texts}; `, el('a', {href: '#latents'}, 'the table of all of them'), '.'),
    el('h2', {}, 'Plots'), el('div', {class: 'plots'}, plots), ...more('Metrics', ['metric', 'value', '± standard error', 'unit', 'sample'], D.metrics),
    ...more('Probe tasks: loss on the held-out half, nats', ['task', 'best latent', 'best channel', 'majority'], D.tasks),
    ...more('Densest latents, and correlations', ['latent', 'share of tokens', 'position', 'first token', 'repetition'], D.dense.map(([id, ...v]) => [link(id), ...v])),
    ...more('Runs given together', ['run', 'n', 'k', 'tokens', 'NMSE'], D.runs.map(r => [r.path, r.n_latents, r.k, r.tokens, r.nmse])));
}

// The table of latents. Its order is the order in which the arrow keys step.
const fires = r => Math.round(stat.density()[r] * part.tokens().length), n2g = (r, j) => D.n2g[part.latents()[r]]?.[j] ?? NaN;
const ofStats = Object.fromEntries(Object.keys(stat).map(n => [n, r => stat[n]()[r]]));
const columns = {latent: r => part.latents()[r], ...ofStats, 'N2G precision': r => n2g(r, 0), 'N2G recall': r => n2g(r, 1)};
const numbers = r => Object.values(columns).slice(1).map(f => f(r));
const mainOf = (r, many) => upTo(many).map(j => [part.main()[5 * r + j], part['main share']()[5 * r + j] / 255]).filter(([, share]) => share);
const mainTokens = (r, many) => mainOf(r, many).map(([id, share]) => el('span', {}, word(id), ` ${Math.round(100 * share)} % `));
// Whether a text contains a query, as it is or as it is shown; spaces around the query count only if there is nothing else.
const plain = query => (query.trim() || query).toLowerCase();
const matches = query => text => [text, visible(text)].some(t => t.toLowerCase().includes(plain(query)));
let sorted = {by: 'latent', up: true}, wanted = '', fewest = 0, rows = 100, order = [];
function arrange() {
  const value = columns[sorted.by], direction = sorted.up ? 1 : -1, like = matches(wanted);
  order = upTo(D.n_live).filter(r => fires(r) >= fewest && (!wanted || mainOf(r, 3).some(([id]) => like(D.vocabulary[id]))));
  order.sort((a, b) => { const x = value(a), y = value(b); return Number.isNaN(x) - Number.isNaN(y) || direction * (x - y) || a - b; });
}
const cell = v => el('td', {class: 'number'}, v);
const row = r => el('tr', {}, cell(link(part.latents()[r], String(part.latents()[r]))), numbers(r).map(v => cell(figure(v))), el('td', {}, mainTokens(r, 3)));
function fill() {  // the rows and what says how they are sorted, so that the fields and buttons keep the focus
  arrange();
  main.querySelector('tbody').replaceChildren(...order.slice(0, rows).map(row));
  main.querySelectorAll('th[data-by]').forEach(th => {
    const here = th.dataset.by === sorted.by;
    th.setAttribute('aria-sort', !here ? 'none' : sorted.up ? 'ascending' : 'descending');
    th.firstChild.textContent = th.dataset.by + (!here ? '' : sorted.up ? ' ▲' : ' ▼');
  });
  document.getElementById('more').hidden = rows >= order.length;
  say(`${figure(order.length)} of ${figure(D.n_live)} latents`);
}
function latents() {
  const sortBy = name => { sorted = {by: name, up: sorted.by === name ? !sorted.up : name === 'latent'}; fill(); };
  const head = Object.keys(columns).map(name => el('th', {class: 'number', 'data-by': name}, el('button', {type: 'button', onclick: () => sortBy(name)})));
  const field = (label, type, value, set) => el('label', {}, label + ' ', el('input', {type, value, size: 10, onchange: e => { set(e.target.value); rows = 100; fill(); }}));
  main.replaceChildren(el('h1', {}, 'Latents'),
    el('p', {class: 'columns'}, field('fires on', 'search', wanted, v => wanted = v), field('on at least this many tokens', 'number', fewest, v => fewest = +v)),
    faint(`On ${texts}. density: share of tokens it fires on; mean, skew, kurtosis, max: of its activations where it fires; mean square: over all tokens.`),
    D.normalized ? faint('The inputs have norm 1.') : '',
    scroll('all latents', el('table', {}, el('thead', {}, el('tr', {}, head, el('th', {}, 'fires on'))), el('tbody'))),
    el('p', {}, el('button', {type: 'button', id: 'more', onclick: () => { rows += 500; fill(); }}, 'More rows')));
  fill();
}

// One latent.
function exampleOf(r, e) {  // -> its context, activations by position, and the position of the highest
  const acts = new Map(upTo(shown.pairs()[e]).map(i => firstPair()[e] + i).map(p => [shown.position()[p], shown.value()[p] / 65535 * stat.max()[r]]));
  return {context: shown.context()[e], acts, peak: [...acts].reduce((a, b) => b[1] > a[1] ? b : a)[0]};
}
const tokenAt = (context, t) => D.vocabulary[part.tokens()[context * D.T + t]];
function contextView(r, e) {
  const {context, acts, peak} = exampleOf(r, e), max = stat.max()[r], share = Math.round(100 * acts.get(peak) / max);
  const shade = a => a ? `background: rgba(var(--shade), ${.12 + .6 * a / max}); border-bottom-width: ${1 + 3 * a / max}px` : null;
  const token = (text, t) => el('span', {class: 'token' + (t === peak ? ' peak' : ''), title: `${text}  ${figure(acts.get(t) || 0)}`, style: shade(acts.get(t))}, text);
  return el('div', {}, el('div', {class: 'context'}, upTo(D.T).map(t => token(visible(tokenAt(context, t)), t))),
    el('details', {}, el('summary', {}, `peak ${figure(acts.get(peak))}, ${share} % of its maximum, ${context < D.held_out ? 'held-out' : 'training'} text; values`),
      table(['position', 'token', 'activation'], [...acts].map(([t, a]) => [t, visible(tokenAt(context, t)), a]))));
}
function effects(r, name, unit, scale) {
  const tokens = number[name]?.(), values = number[name + ' value']?.(), k = D.top;
  if (!tokens) return faint('not defined at this site');
  const rows = from => upTo(k).map(j => 2 * k * r + from + j).map(i => [word(tokens[i]), values[i] * scale]);
  const list = (title, from) => el('div', {}, title, table(['token', unit], rows(from), title));
  return el('div', {class: 'columns'}, list('raises', 0), list('lowers', k));
}
function latent(id) {
  const r = rankOf(id);
  if (r < 0) return main.replaceChildren(el('h1', {}, 'Latent ' + id), el('p', {}, 'It does not fire on this text, or is not part of this report.'));
  if (!order.includes(r)) { wanted = ''; fewest = 0; arrange(); }
  const examples = upTo(shown['per latent']()[r]).map(i => contextView(r, firstExample()[r] + i)), patterns = D.patterns[id];
  const [loss, kl] = number['effect size']().slice(2 * r), change = Number.isNaN(loss) ? 'no next token is there to lose on' : `the loss changes by ${figure(loss)}`;
  const near = upTo(D.near).map(j => D.near * r + j).map(i => [number.near()[i], number['near cosine']()[i] / 32767]);
  const bins = upTo(D.bins).map(i => [i / D.bins * stat.max()[r], part.histogram()[D.bins * r + i]]);
  const neighbour = ([o, cosine]) => rankOf(o) < 0 ? [`latent ${o}`, cosine, '–'] : [link(o), cosine, el('span', {}, mainTokens(rankOf(o), 2))];
  const step = (name, text, by) => el('button', {type: 'button', id: name, onclick: () => stepBy(by)}, text), title = text => el('h2', {}, text);
  main.replaceChildren(el('h1', {}, 'Latent ' + id),
    el('p', {}, step('previous', '← previous', -1), ' ', step('next', 'next →', 1),
      el('span', {class: 'faint'}, ` ${order.indexOf(r) + 1} of ${order.length}, in the order of the table`)),
    el('p', {}, 'Fires on ', mainTokens(r, 5), el('span', {class: 'faint'}, '(share of its activation)')),
    table(Object.keys(columns).slice(1), [numbers(r)], 'statistics'),
    title('Highest contexts'), ...examples.slice(0, D.examples),
    ...(examples.length > D.examples ? [title('Contexts from the highest to the lowest'), ...examples.slice(D.examples)] : []),
    ...(patterns ? [title('N2G patterns'), faint('^ start of the context, * any token; the activation predicted'),
      el('ul', {}, patterns.map(t => el('li', {}, t)))] : []),
    el('div', {class: 'columns'},
      el('section', {}, title('Next tokens: direct effect'), faint('decoder row through the final norm and the unembedding, relative to the largest'),
        effects(r, 'direct', 'relative', 1 / 32767)),
      el('section', {}, title('Next tokens: measured effect'), faint(`at its highest activation; without it ${change}, KL is ${figure(kl)} nats`),
        effects(r, 'effect', 'nats', 1)),
      el('section', {}, plot('Activations where it fires', 'activation', 'tokens', [{bars: stat.max()[r] / D.bins, points: bins}]),
        title('Nearest decoder rows'),
        table(['latent', 'cosine', 'fires on'], near.filter(([o]) => o !== +id).map(neighbour)))));
}
const ranks = once(() => new Map(Array.from(part.latents(), (id, r) => [id, r]))), rankOf = id => ranks().get(+id) ?? -1;
function stepBy(by) {
  const at = order.indexOf(rankOf(location.hash.split('/')[1]));
  if (order.length) location.hash = 'latent/' + part.latents()[order[(at + by + order.length) % order.length]];
}

// A latent is found by the tokens that carry its activation, and by the text that ends at its highest one.
function search(query) {
  const like = matches(query), found = [], score = D.vocabulary.map(t => plain(t) === plain(query) || visible(t) === query ? 4 : like(t) ? 1 : 0);
  for (let r = 0; r < D.n_live && query; r++) {
    let best = Math.max(0, ...mainOf(r, 5).map(([id, share]) => score[id] * share));
    const {context, peak} = exampleOf(r, firstExample()[r]);
    if (like(upTo(Math.min(4, peak + 1)).map(i => tokenAt(context, peak - i)).reverse().join(''))) best += .3;
    best *= 1 - Math.exp(-fires(r) / 10);  // what fires once proves little
    if (best > 0) found.push([best, r]);
  }
  found.sort((a, b) => b[0] - a[0] || a[1] - b[1]);
  const many = found.length ? `${figure(found.length)} found${found.length > 100 ? '; the first 100' : ''}` : 'none found';
  const results = found.slice(0, 100).map(([, r]) => [link(part.latents()[r]), stat.density()[r], stat.max()[r], el('span', {}, mainTokens(r, 4))]);
  say(many);
  main.replaceChildren(el('h1', {}, `Latents for “${query}”`), table(['latent', 'density', 'max', 'fires on'], results));
}

// The address says what is shown: #overview, #latents, #latent/NUMBER or #search/WORD.
let started = false;
function route() {
  let hash = location.hash.slice(1);
  try { hash = decodeURIComponent(hash); } catch { /* a lone %: taken as it is */ }
  const [page, ...rest] = hash.split('/'), focused = document.activeElement?.id;
  say('');
  document.title = page === 'latent' ? `Latent ${rest[0]}` : 'Sparse autoencoder';
  ({latents, latent: () => latent(rest[0]), search: () => search(rest.join('/'))}[page] || overview)();
  for (const a of document.querySelectorAll('nav a')) a.setAttribute('aria-current', a.hash === '#' + (page || 'overview') ? 'page' : 'false');
  scrollTo(0, 0);
  if (started) (document.getElementById(focused) || main).focus({preventScroll: true});  // keyboards go on where they were
  started = true;
}
const random = () => location.hash = 'latent/' + part.latents()[Math.floor(Math.random() * D.n_live)];
document.getElementById('random').addEventListener('click', random);
document.getElementById('search').addEventListener('submit', e => {
  e.preventDefault();
  location.hash = 'search/' + encodeURIComponent(document.getElementById('query').value);
});
addEventListener('keydown', e => {
  if (e.target.matches('input, select') || e.ctrlKey || e.metaKey || e.altKey) return;
  const by = {ArrowLeft: -1, ArrowRight: 1}[e.key];
  if (e.key === '/') { e.preventDefault(); document.getElementById('query').focus(); }
  else if (e.key === 'r') random();
  else if (by && location.hash.startsWith('#latent/') && !e.target.closest?.('.scroll')) { e.preventDefault(); stepBy(by); }
});
addEventListener('hashchange', route);
arrange();
route();
"""

if __name__ == "__main__":
    harvest.run_main(main)
