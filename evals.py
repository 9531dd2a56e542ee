"""
evals.py: an autoencoder -> every metric of the paper, as a table and as JSON.

    python evals.py runs/n32768_k32                     # a run of sae.py; reads the activations it was trained on
    python evals.py runs/n32768_k32 --all               # the slower metrics too (minutes); or --only probes,refinement
    python evals.py 8.pt --model gpt2 --layer 8 --all   # one of OpenAI's released autoencoders
    python evals.py --fit runs/*                        # scaling laws through many runs
    python evals.py runs/n32768_k32 --report            # report.html: metrics and every latent, in a browser

One function a metric. Each takes an SAE and plain tensors or a model, and returns a dict of numbers; a key ending in `_se`
is the standard error of the number before it. Losses are in nats per token. Results are kept as they come: a second call
computes only what is missing.

    reconstruction              NMSE, L0                                                  section 2.1
    memorization                the same on training text                                 appendix
    density, dense_latents      how often latents fire; what the densest ones follow      appendix
    positions                   NMSE and norm by position in the context                  appendix
    downstream                  cross-entropy, ΔCE, KL, loss recovered, compute           section 4.1
    probes                      can one latent tell a known feature?                      section 4.2
    n2g                         precision and recall of n-gram explanations               section 4.3
    explanation_reconstruction  downstream loss of the explanations themselves            section 4.4
    ablation_sparsity           how many logits does one latent move?                     section 4.5
    refinement                  are activations shrunk?                                   section 5.1
    test_time_k                 other k than the one trained with                         section 5.3
    fixed_threshold             a threshold in place of TopK                              section 5.3
    fit_scaling_law             L(n, k), L(N), L(C)                                       section 3
    report                      all of it as one page, and what each latent fires on      (the authors' visualizer)
"""

import argparse
import base64
import json
import math
import sys
import time
from array import array
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import harvest
from harvest import SITES, Progress, UserError
from sae import SAE, keep_heap, load_file, normalize

CHUNK = 8192  # tokens encoded at a time


def unit(sae, x):
    """Raw activations (N, d) as the autoencoder sees them: normalised, unless it was released for raw inputs."""
    x = x.to(sae.W_dec.device, sae.W_dec.dtype)
    return normalize(x)[0] if sae.normalized else x


def standard_error(samples):
    """Of the mean of samples (N); nan for one sample."""
    return (samples.std() / math.sqrt(len(samples))).item() if len(samples) > 1 else math.nan


def mean_and_error(name, samples):
    """{name: mean, name_se: its standard error} of samples (N)."""
    samples = torch.as_tensor(samples, dtype=torch.float64)
    return {name: samples.mean().item(), name + "_se": standard_error(samples)}


# --------------------------------------------------------------------------------------------------
# Reconstruction, section 2.1; density, positions and memorisation, appendix.


@torch.no_grad()
def squared_errors(sae, x, code=None):
    """Raw activations x (contexts, T, d) -> per token: squared error (contexts, T) and norm of the reconstruction over the
    input's, both normalised; number of active latents; and the squared error of always predicting the mean activation, averaged."""
    errors, ratios, active, total, square = [], [], [], 0.0, 0.0
    for chunk in x.flatten(0, 1).split(CHUNK):
        u = unit(sae, chunk)
        values, indices = (code or sae.encode)(u)
        u_hat = sae.decode(values, indices)
        errors.append((u - u_hat).square().sum(1).double())
        ratios.append((u_hat.norm(dim=1) / u.norm(dim=1).clamp_min(1e-30)).double())
        active.append((values > 0).sum(1).double())
        total, square = total + u.sum(0).double(), square + u.square().sum().double()
    N = x.shape[0] * x.shape[1]
    variance = (square / N - (total / N).square().sum()).clamp_min(1e-30)
    return *(torch.cat(part).view(x.shape[:2]) for part in (errors, ratios, active)), variance


def reconstruction(sae, x, code=None):
    """Raw activations x (N, d) or (contexts, T, d) -> nmse (squared error over that of always predicting their mean, both normalised),
    l0 (mean count of active latents), norm_ratio (mean norm of the reconstruction over that of the input).

    code: a function u -> (values, indices) in place of sae.encode. The standard errors are over the first dimension: tokens of
    one context are not independent.
    """
    errors, ratios, active, variance = squared_errors(sae, x if x.ndim == 3 else x[:, None], code)
    per = {"nmse": errors / variance, "l0": active, "norm_ratio": ratios}
    out = {}
    for name, v in per.items():
        out |= mean_and_error(name, v.mean(1))
    return out | {"tokens": errors.numel()}


def memorization(sae, train, held_out):
    """NMSE on training activations against held-out ones, each (contexts, T, d): a gap that grows with n is memorisation."""
    a, b = reconstruction(sae, train), reconstruction(sae, held_out)
    gap = {"gap": b["nmse"] - a["nmse"], "gap_se": math.hypot(a["nmse_se"], b["nmse_se"])}
    return {"nmse_train": a["nmse"], "nmse_train_se": a["nmse_se"]} | gap | {"tokens": a["tokens"]}


@torch.no_grad()
def latent_sums(sae, x):
    """Raw activations x (N, d) -> (n) each: the number of tokens each latent fires on, the sum of its activations' squares."""
    counts = torch.zeros(sae.n_latents, dtype=torch.double, device=sae.W_dec.device)
    squares = torch.zeros_like(counts)
    for chunk in x.split(CHUNK):
        values, indices = sae.encode(unit(sae, chunk))
        counts.index_add_(0, indices.flatten(), (values > 0).flatten().double())
        squares.index_add_(0, indices.flatten(), values.square().flatten().double())
    return counts, squares


def density(sae, x, rare=1e-4):
    """Fractions of latents that never fire on x (N, d), and that fire on fewer than `rare` of its tokens (the silent ones included).

    log10_density and log10_mean_square: histograms over the latents that fire, of E[1(z > 0)] and of E[z^2], counts in bins of a quarter decade.
    """
    counts, squares = latent_sums(sae, x)
    share, alive = counts / len(x), counts > 0
    edges = np.arange(-12, 4.01, 0.25)
    histogram = lambda v: {"edges": edges.tolist(), "counts": np.histogram((v[alive] / len(x)).log10().clamp(-12, 4).cpu(), edges)[0].tolist()}
    return {"silent": (~alive).double().mean().item(), "rare": (share < rare).double().mean().item(), "densest": share.max().item(),
            "log10_density": histogram(counts), "log10_mean_square": histogram(squares), "tokens": len(x)}  # fmt: skip


@torch.no_grad()
def dense_latents(sae, x, tokens, top=10):
    """The `top` densest latents on x (contexts, T, d), tokens (contexts, T), and the correlation of their activation with what dense
    latents are known to follow: the position, being first in the context, and repetition (the same token earlier in the context)."""
    flat = x.flatten(0, 1)
    share = latent_sums(sae, flat)[0] / len(flat)
    latents = share.topk(min(top, sae.n_latents)).indices
    z = []
    for chunk in flat.split(CHUNK):
        values, indices = sae.encode(unit(sae, chunk))
        z.append(torch.stack([(values * (indices == i)).sum(1) for i in latents], 1))
    z = torch.cat(z).double().cpu()  # (N, top)
    C, T = tokens.shape
    same = (tokens[:, :, None] == tokens[:, None, :]).tril(-1).any(2)
    at = torch.arange(T).expand(C, T)
    facts = torch.stack([at, at == 0, same.cpu()], -1).flatten(0, 1).double()  # (N, 3)
    z_, f_ = ((v - v.mean(0)) / v.std(0).clamp_min(1e-12) for v in (z, facts))
    r = z_.T @ f_ / (len(z) - 1)
    names = ("latent", "density", "position", "first_token", "repetition")
    return {"densest": [dict(zip(names, (int(i), share[i].item(), *row))) for i, row in zip(latents, r.tolist())], "tokens": len(z)}


def positions(sae, x):
    """x (contexts, T, d) -> nmse and norm, lists over the T positions, and their means at the first position and after it.

    The denominator of the NMSE is the one of all positions together, so the mean of the list is the NMSE of `reconstruction`.
    """
    errors, _, _, variance = squared_errors(sae, x)
    nmse, norm = errors / variance, x.to(errors.device).float().norm(dim=2).double()
    out = {}
    for name, v in (("nmse", nmse), ("norm", norm)):
        out |= {name: v.mean(0).tolist()} | mean_and_error(name + "_first", v[:, 0]) | mean_and_error(name + "_later", v[:, 1:].mean(1))
    return out | {"contexts": len(x)}


# --------------------------------------------------------------------------------------------------
# Downstream loss, section 4.1: what the language model loses when it must go on with the reconstruction.


def compute_equivalent(curve, delta_ce):
    """The share of the model's training compute at which its own loss was `delta_ce` nats above its final one (section 4.1).

    Reads too high where the curve is of one run whose learning rate decays, as `stdlib`'s is: its loss falls fastest at the end.

    curve: list of {"flops", "loss"}; interpolated in log-compute. Returns (share, how); None and the reason where the curve does not reach.
    """
    if not curve:
        return None, "no loss-against-compute curve for this model"
    flops = np.array([p["flops"] for p in curve], dtype=float)
    loss = np.minimum.accumulate([p["loss"] for p in curve])
    target = loss[-1] + delta_ce
    if delta_ce <= 0:
        return 1.0, "loss not increased"
    if target > loss[0]:
        return None, "worse than the model at the first point of its curve"
    return float(np.exp(np.interp(-target, -loss, np.log(flops))) / flops[-1]), f"{len(curve)} points"


@torch.no_grad()
def patched_losses(model, tokens, layer, site, edits, label="downstream"):
    """Cross-entropy of the model on tokens (C, T), as it is and with each of `edits` in place.

    edits: name -> a function on activations (B, T, d), or a tensor (C, T, d) of replacements. Returns "ce", and for each edit
    "ce_NAME", "delta_NAME" and "kl_NAME" (original || patched), as (C): nats per token, one mean a context.
    """
    losses = defaultdict(list)
    size = max(1, 2**24 // (model.config.n_vocab * tokens.shape[1]))
    progress = Progress(len(tokens), label, " contexts")
    for start in range(0, len(tokens), size):
        chunk = tokens[start : start + size].to(model.device)
        labels = chunk[:, 1:, None]
        clean = F.log_softmax(model(chunk)[:, :-1], dim=-1)
        losses["ce"].append(-clean.gather(2, labels).mean((1, 2)))
        for name, edit in edits.items():
            act = edit if callable(edit) else lambda a, edit=edit: edit[start : start + size].to(a)
            patched = F.log_softmax(model(chunk, layer, site, act)[:, :-1], dim=-1)
            losses["ce_" + name].append(-patched.gather(2, labels).mean((1, 2)))
            losses["kl_" + name].append((clean.exp() * (clean - patched)).sum(-1).mean(1))
        progress(start + len(chunk))
    progress.finish()
    per = {name: torch.cat(parts).double().cpu() for name, parts in losses.items()}
    return per | {"delta_" + name: per["ce_" + name] - per["ce"] for name in edits}


def downstream(sae, model, tokens, layer, site, mean=None):
    """Replace the activation by its reconstruction at every position of tokens (C, T), run the rest of the model, and compare.

    sae: an SAE, or any function from activations (B, T, d) to their replacement. mean (d): the activation for mean ablation
    (default: the mean over `tokens`). Returns ce, ce_sae, delta_ce, kl (original || patched), ce_zero, ce_mean, recovered_zero and
    recovered_mean ((CE_ablated - CE_sae) / (CE_ablated - CE); zero ablation flatters it), compute_equivalent (or None, with
    compute_equivalent_why), in nats per token. Standard errors are over contexts.
    """
    if mean is None:
        mean = harvest.activations(model, tokens, layer, site).flatten(0, 1).mean(0)
    edits = {"sae": sae, "zero": torch.zeros_like, "mean": lambda a: mean.to(a).expand_as(a)}
    per = patched_losses(model, tokens, layer, site, edits)
    out = {}
    for name, key in (("ce", "ce"), ("ce_sae", "ce_sae"), ("delta_ce", "delta_sae"), ("kl", "kl_sae"), ("ce_zero", "ce_zero"), ("ce_mean", "ce_mean")):
        out |= mean_and_error(name, per[key])
    for name in ("zero", "mean"):
        gap, lost = per["delta_" + name], per["delta_sae"]
        share = (lost.mean() / gap.mean()).item() if gap.any() else math.nan
        error = standard_error(lost - share * gap) / abs(gap.mean().item()) if gap.any() else math.nan  # of a ratio of means
        out |= {f"recovered_{name}": 1 - share, f"recovered_{name}_se": error}
    value, why = compute_equivalent(model.curve, out["delta_ce"])
    ends = [compute_equivalent(model.curve, out["delta_ce"] + s * out["delta_ce_se"])[0] for s in (-1, 1)]
    error = abs(ends[0] - ends[1]) / 2 if None not in ends else math.nan
    out |= {"compute_equivalent": value, "compute_equivalent_se": error, "compute_equivalent_why": why}
    return out | {"contexts": len(tokens), "tokens": len(tokens) * (tokens.shape[1] - 1)}


# --------------------------------------------------------------------------------------------------
# Other codes of the same autoencoder, section 5.3: another k, a threshold.


def with_code(sae, code):
    """The function on activations that `patched_losses` wants, with `code` in place of sae.encode."""
    return lambda a: sae(a, code)


def test_time_k(sae, x, model, tokens, layer, site, k=None):
    """NMSE on x (contexts, T, d) and ΔCE on tokens (C, T) at k' = 1, 2, 4, ... 4k active latents: lists, beside `at`, the k'.

    k: default sae.k; for a ReLU autoencoder give its mean L0.
    """
    k = k or sae.k
    ks = sorted({min(2**i, sae.n_latents) for i in range(int(math.log2(4 * k)) + 1)} | {k, min(4 * k, sae.n_latents)})
    codes = {k_: lambda u, k_=k_: sae.encode(u, k_) for k_ in ks}
    per = patched_losses(model, tokens, layer, site, {str(k_): with_code(sae, code) for k_, code in codes.items()}, "test-time k")
    out = {"at": ks} | {key: [] for key in ("nmse", "nmse_se", "delta_ce", "delta_ce_se")}
    for k_, code in codes.items():
        found = reconstruction(sae, x, code) | mean_and_error("delta_ce", per[f"delta_{k_}"])
        for key in out.keys() - {"at"}:
            out[key].append(found[key])
    return out | {"tokens": found["tokens"], "contexts": len(tokens)}


def encode_above(sae, u, theta):
    """J_θ(z) = z 1(z > θ) of u (N, d) for θ >= 0, as values, indices: as wide as the busiest row needs."""
    width = min(4 * sae.k, sae.n_latents)
    while True:
        values, indices = sae.encode(u, width)
        if width == sae.n_latents or values.amin(1).max() <= theta:
            return values * (values > theta), indices
        width = min(2 * width, sae.n_latents)


@torch.no_grad()
def calibrate_threshold(sae, u):
    """θ at which the mean L0 of J_θ on u (N, d) is k: the value that k N of the N n pre-activations exceed. Exact."""
    width = min(4 * sae.k, sae.n_latents)
    while True:
        parts = [sae.encode(chunk, width)[0] for chunk in u.split(CHUNK)]
        widest = max(v.shape[1] for v in parts)  # with width = n they may differ
        values = torch.cat([F.pad(v, (0, widest - v.shape[1])) for v in parts])
        rank = values.numel() - sae.k * len(u)
        theta = values.flatten().kthvalue(rank).values.item() if rank > 0 else 0.0
        if width == sae.n_latents or theta >= values.amin(1).max():  # no row had more above θ than it could show
            return theta
        width = min(2 * width, sae.n_latents)


def fixed_threshold(sae, train, x, model, tokens, layer, site):
    """One threshold for all tokens in place of TopK, calibrated on `train`: realised L0, NMSE, ΔCE on the held-out x (both (contexts, T, d))."""
    theta = calibrate_threshold(sae, unit(sae, train.flatten(0, 1)))
    code = lambda u: encode_above(sae, u, theta)
    per = patched_losses(model, tokens, layer, site, {"theta": with_code(sae, code)}, "fixed threshold")
    return {"theta": theta} | reconstruction(sae, x, code) | mean_and_error("delta_ce", per["delta_theta"]) | {"contexts": len(tokens)}


# --------------------------------------------------------------------------------------------------
# Probe loss, section 4.2: how well does the best single latent tell a known feature?


def logistic_loss(t, sign):
    """-log σ of the margins sign * t, averaged over the first dimension."""
    return F.softplus(-sign * t).mean(0)


@torch.no_grad()
def newton_logistic(z, y, steps=100, tol=1e-9):
    """The m one-dimensional logistic regressions of y (N) in {0, 1} on the columns of z (N, m), all at once, by Newton's method.

    Returns (loss (m), w (m), b (m)): mean nats, and the probe σ(w z + b) in the units of z. Within 1e-6 of the optimum; on separable
    columns, where that is 0 at infinity, w and b are finite. Constant columns give w = 0. Raises ValueError unless y has both classes.
    """
    z = z if z.dtype == torch.float64 else z.float()
    y = y.to(z)
    if not 0 < y.mean() < 1:
        raise ValueError("a probe needs examples of both classes")
    sign = (2 * y - 1)[:, None]
    center = z.median(0).values  # not the mean: one huge value must not swallow the others' digits
    x = z - center
    scale = x.square().mean(0).sqrt()
    constant = scale == 0
    x = x / torch.where(constant, 1.0, scale)
    w, b = torch.zeros_like(scale), torch.logit(y.mean()).expand_as(scale).clone()
    loss = logistic_loss(x * w + b, sign)
    for _ in range(steps):
        p = torch.sigmoid(-sign * (x * w + b))  # (N, m), the probability of being wrong
        g, h = -sign * p, p * (1 - p)
        # In coordinates centred by the weights h the 2 x 2 Hessian is diagonal.
        c = (h * x).mean(0) / h.mean(0).clamp_min(1e-30)
        x_c = x - c
        g_w, g_b, h_w, h_b = (g * x_c).mean(0), g.mean(0), (h * x_c.square()).mean(0), h.mean(0)
        d_w, d_b = g_w / h_w.clamp_min(1e-30), g_b / h_b.clamp_min(1e-30)
        d_w = torch.where(constant, 0.0, d_w)
        decrement = g_w * d_w + g_b * d_b  # twice the gain a quadratic would promise
        active = decrement > tol
        if not active.any():
            break
        step = active.to(z)  # halved where the loss does not fall enough
        for _ in range(40):
            new_w, new_b = w - step * d_w, b - step * (d_b - c * d_w)
            new = logistic_loss(x * new_w + new_b, sign)
            worse = active & ~(new <= loss - 0.1 * step * decrement)
            if not worse.any():
                break
            step = torch.where(worse, step / 2, step)
        better = new < loss
        w, b, loss = torch.where(better, new_w, w), torch.where(better, new_b, b), torch.where(better, new, loss)
        if not better.any():  # down to rounding
            break
    w = w / torch.where(constant, 1.0, scale)
    return loss, w, b - w * center


@torch.no_grad()
def probes(sae, tasks, seed=0):
    """tasks: yields (name, x (N, d) raw activations, u (N, d) the same as the autoencoder sees them, y (N) in {0, 1}).

    For each task the latent with the best probe (on pre-activations) is chosen on one half of the examples. Its probe loss there
    ("loss", the paper's, optimistic as a minimum over n) and on the other half ("held_out") is reported; channels of x likewise, and
    always predicting the share of positives ("majority"). Means over tasks, with standard errors over tasks; `per_task` has each.
    """
    per_task = {}
    for name, x, u, y in tasks:
        gen = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(y), generator=gen)
        order = order[y.cpu()[order].sort(stable=True).indices]  # shuffled within each class
        fit, rest = order[::2].to(u.device), order[1::2].to(u.device)
        result = {"examples": len(y), "positive": y.float().mean().item()}
        v = u - sae.b_pre
        kinds = {"latent": (sae.n_latents, lambda s: F.linear(v, sae.W_enc[s], sae.b_enc[s])), "channel": (x.shape[1], lambda s: x[:, s])}
        for kind, (width, features) in kinds.items():
            best, m = (math.inf,), max(1, 2**21 // len(fit))
            for start in range(0, width, m):
                z = features(slice(start, start + m)).float()
                loss, i = newton_logistic(z[fit], y[fit])[0].min(0)
                if loss < best[0]:
                    best = loss.item(), newton_logistic(z[rest, i : i + 1], y[rest])[0].item(), start + int(i)
            result[kind] = dict(zip(("loss", "held_out", "index"), best))
        result["majority"] = logistic_loss(torch.logit(y[fit].float().mean()), 2 * y[rest] - 1.0).item()
        per_task[name] = result
    if not per_task:
        raise UserError("no probe task has enough examples here; evaluate on more --tokens")
    out = {}
    for kind, prefix in (("latent", ""), ("channel", "channel_")):
        for key in ("loss", "held_out"):
            out |= mean_and_error(prefix + key, [t[kind][key] for t in per_task.values()])
    return out | mean_and_error("majority", [t["majority"] for t in per_task.values()]) | {"tasks": len(per_task), "per_task": per_task}


def token_labels(tokens, encoding, phrases=4):
    """Built-in tasks on tokens (C, T): name -> labels (C, T), 1 or 0, or -1 where the task does not ask. They need no download.

    Spelling of the token, its place, and `phrases` of the form "is this the second word of a frequent two-word phrase?", asked at
    all occurrences of that word.
    """
    words = [encoding.decode_single_token_bytes(i).decode("utf-8", "replace") for i in range(encoding.n_vocab)]
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
    if labels["all digits"].equal(labels["contains a digit"]):  # a vocabulary that never mixes digits with others
        del labels["all digits"]
    labels["first half of the context"] = (torch.arange(T) < T // 2).long().expand(C, T)
    before = torch.cat([torch.full((C, 1), -1), tokens[:, :-1]], 1)
    labels["follows a newline"] = torch.where(before >= 0, torch.tensor(["\n" in w for w in words])[before].long(), -1)
    alphabetic = torch.tensor([w.isalpha() and len(w) > 1 for w in bare])
    both = alphabetic[tokens] & alphabetic[before] & (before >= 0)
    pairs, counts = (before * len(words) + tokens)[both].unique(return_counts=True)
    uses, found, total = torch.bincount(tokens[:, 1:].flatten(), minlength=len(words)), set(), counts.sum()
    for i in counts.argsort(descending=True, stable=True).tolist():
        first, second = divmod(pairs[i].item(), len(words))
        if len(found) == phrases or counts[i] * 2000 < total:
            break
        if second not in found and counts[i] <= 0.8 * uses[second]:  # a word that is also met elsewhere
            found.add(second)
            here = (tokens == second) & (before >= 0)
            labels[f"phrase {words[first].strip()} {bare[second]}"] = torch.where(here, (before == first).long(), -1)
    return labels


def token_tasks(sae, x, tokens, encoding, most=2048, least=64, seed=0):
    """Yield for `probes` the built-in tasks on activations x (C, T, d) of tokens (C, T): as many positive as negative examples,
    at most `most` of each; tasks with fewer than `least` of each are left out."""
    flat = x.flatten(0, 1)
    for name, y in token_labels(tokens.cpu(), encoding).items():
        gen = torch.Generator().manual_seed(seed)
        sides = [(y.flatten() == value).nonzero().flatten() for value in (0, 1)]
        size = min(most, *map(len, sides))
        if size >= least:
            chosen = torch.cat([side[torch.randperm(len(side), generator=gen)[:size]] for side in sides])
            some = flat[chosen.to(flat.device)].to(sae.W_dec)
            yield name, some, unit(sae, some), y.flatten()[chosen].to(some.device)


def read_tasks(folder):
    """Folder of NAME.jsonl with {"text": ..., "label": 0 or 1} -> {NAME: (texts, labels)}. Raises UserError naming file and line."""
    files = sorted(Path(folder).glob("*.jsonl"))
    if not files:
        raise UserError(f'{folder} holds no NAME.jsonl; each line of one is {{"text": "...", "label": 0 or 1}}')
    tasks = {}
    for file in files:
        texts, labels = [], []
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text, label = row["text"].strip() and row["text"], row["label"]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f'{file}, line {number}: not {{"text": "...", "label": 0 or 1}}') from None
            if not text or label not in (0, 1):
                raise UserError(f"{file}, line {number}: " + ("the text is empty" if not text else f"the label is {label!r}, not 0 or 1"))
            texts.append(text)
            labels.append(int(label))
        if min(labels.count(0), labels.count(1)) < 2:
            raise UserError(f"{file}: {labels.count(0)} examples of class 0 and {labels.count(1)} of class 1; a probe needs at least two of each")
        tasks[file.stem] = texts, labels
    return tasks


@torch.no_grad()
def text_tasks(sae, model, encoding, tasks, layer, site, length=64, batch=256):
    """Yield for `probes` tasks on whole texts: each text's features are means over its tokens, read in contexts of `length`.

    Pre-activations are linear, so their mean over a text is the pre-activation of the mean input.
    """
    for name, (texts, labels) in tasks.items():
        rows = [(i, ids[j : j + length]) for i, ids in enumerate(encoding.encode_ordinary_batch(texts)) for j in range(0, len(ids), length)]
        rows.sort(key=lambda row: len(row[1]))
        x = torch.zeros(len(texts), sae.d_model, device=model.device, dtype=sae.W_dec.dtype)
        u, count = torch.zeros_like(x), torch.zeros_like(x[:, :1])
        progress = Progress(len(rows), f"probes {name}", " contexts")
        for start in range(0, len(rows), batch):
            owners, ids = zip(*rows[start : start + batch])
            tokens, lengths = pad_right(ids)
            acts = harvest.activations(model, tokens, layer, site).to(x)
            here = torch.arange(tokens.shape[1])[None] < lengths[:, None]
            owner = torch.tensor(owners).repeat_interleave(lengths).to(x.device)
            acts = acts[here.to(x.device)]
            x.index_add_(0, owner, acts)
            u.index_add_(0, owner, unit(sae, acts))
            count.index_add_(0, owner, torch.ones_like(acts[:, :1]))
            progress(start + len(ids))
        progress.finish()
        yield name, x / count, u / count, torch.tensor(labels, device=x.device)


def pad_right(sequences):
    """Token-id sequences of various lengths -> (tokens (B, longest), lengths (B)). A causal model does not see what is on the right."""
    lengths = torch.tensor([len(s) for s in sequences])
    tokens = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
    tokens[torch.arange(tokens.shape[1])[None] < lengths[:, None]] = torch.tensor([t for s in sequences for t in s])
    return tokens, lengths


# --------------------------------------------------------------------------------------------------
# Explanations by Neuron2Graph (Foote et al. 2023), section 4.3.

WILDCARD, START, END = -1, -2, -3  # any token; nothing before; not a token but the activation of a pattern that is complete


class N2G:
    """An explanation of one latent: n-gram patterns with wildcards, in a trie read from the last token backwards.

    patterns: list of (token ids, activation), where an id may be WILDCARD, and the first one START.
    """

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
        """examples: list of (token ids, index of the activation). acts_fn: list of token-id lists -> list of lists of activations."""
        work = {i: find_pattern(list(tokens[: at + 1]), pad) for i, (tokens, at) in enumerate(examples)}
        found = run_together(work, lambda asked: [acts[-1] for acts in acts_fn([tokens for _, tokens in asked])])
        return cls([pattern for pattern in found.values() if pattern])

    def at(self, tokens, t):
        """The activation predicted at position t: of the longest pattern that ends there, exact tokens before wildcards; else 0."""
        return next(matches(self.trie, tokens, t), 0.0)

    def predict(self, tokens):
        """token ids -> predicted activations, one per position."""
        tokens = [int(t) for t in tokens]
        return [self.at(tokens, t) for t in range(len(tokens))]

    def readable(self, encoding):
        """The patterns as text, strongest first: ^ for the start of the context, * for any token."""
        show = lambda t: {WILDCARD: "*", START: "^"}.get(t) or json.dumps(encoding.decode([t]), ensure_ascii=False)
        return [f"{' '.join(map(show, pattern))}  ({act:.3f})" for pattern, act in sorted(self.patterns, key=lambda p: -p[1])]


def insert(trie, pattern):
    """The node of a trie that `pattern` leads to, made if it is not there."""
    for token in reversed(pattern):
        trie = trie.setdefault(token, {})
    return trie


def matches(trie, tokens, t):
    """What stands at END of every pattern in the trie that ends at position t: the exact token before the wildcard, longer before shorter.

    Unlike the released code this backtracks: where an exact token leads to a dead end, a wildcard beside it is still tried.
    """
    stack = [(trie, t)]
    while stack:
        node, t = stack.pop()
        if t is None:
            yield node
            continue
        if END in node:
            stack.append((node[END], None))
        for key in (WILDCARD, tokens[t]) if t >= 0 else (START,):  # the last one pushed is tried first
            if key in node:
                stack.append((node[key], t - 1))


def find_pattern(tokens, pad):
    """One example, cut after the token it fires on, as a generator: yields lists of token-id lists, is sent the latent's activation
    on the last token of each, and returns (pattern, activation), or None where the latent turns out not to fire."""
    (full,) = yield [tokens]
    if full <= 0:
        return None
    # The shortest suffix with half the activation; lengths are asked for in groups: 1, 2-3, 4-7, ...
    length, act, n = len(tokens), full, 1
    while n < len(tokens):
        group = range(n, min(2 * n, len(tokens)))
        acts = yield [tokens[-m:] for m in group]
        if strong := [(m, a) for m, a in zip(group, acts) if a >= 0.5 * full]:
            length, act = strong[0]
            break
        n *= 2
    suffix = tokens[-length:]
    # With padding before it: is it bound to the start? With padding in place of each token: does that token matter?
    before, *without = yield [[pad, *suffix]] + [[*suffix[:j], pad, *suffix[j + 1 :]] for j in range(length)]
    # The padding token itself cannot be tested this way, so it stays.
    pattern = [WILDCARD if t != pad and 1 - a / act < 0.5 else t for t, a in zip(suffix, without)]
    return ([START] if before < 0.5 * full else []) + pattern, act


def run_together(generators, ask):
    """Run many generators at once, so that their questions reach the model in full batches. -> {key: what each returned}

    generators: {key: generator that yields lists of questions}; ask: list of (key, question) -> list of answers.
    """
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
def last_token_acts(sae, model, layer, site, asked, batch_tokens):
    """asked: list of ((latent, example), token ids) -> the latent's activation on each one's last token, a list of floats.

    Equal questions of different latents are run through the model once.
    """
    order = sorted({tuple(tokens) for _, tokens in asked}, key=len)
    place = {tokens: i for i, tokens in enumerate(order)}
    row, latent = torch.tensor([place[tuple(tokens)] for _, tokens in asked]), torch.tensor([key[0] for key, _ in asked])
    row, by_row = row.sort(stable=True)
    answers, start = torch.zeros(len(asked)), 0
    while start < len(order):
        count = max(1, batch_tokens // len(order[min(start + batch_tokens // len(order[start]), len(order)) - 1]))
        tokens, lengths = pad_right(order[start : start + count])
        acts = harvest.activations(model, tokens, layer, site, len(tokens))
        values, indices = (c.cpu() for c in sae.encode(unit(sae, acts[torch.arange(len(tokens)), lengths - 1])))
        some = slice(*torch.searchsorted(row, torch.tensor([start, start + count])).tolist())
        for r, which in zip(row[some].split(2**16), by_row[some].split(2**16)):
            answers[which] = (values[r - start] * (indices[r - start] == latent[which][:, None])).sum(1).float()
        start += count
    return answers.tolist()


@torch.no_grad()
def active_pairs(sae, x):
    """Raw activations x (N, d) -> (latent, token, value), each (P), of all P pairs where a latent is active; sorted by latent, then token."""
    parts = []
    for start in range(0, len(x), CHUNK):
        values, indices = sae.encode(unit(sae, x[start : start + CHUNK]))
        token, j = (values > 0).nonzero(as_tuple=True)
        parts.append((indices[token, j], token + start, values[token, j]))
    latent, token, value = (torch.cat(part).cpu() for part in zip(*parts))
    order = latent.sort(stable=True).indices
    return latent[order], token[order], value[order]


def positives(sae, x):
    """Raw activations x (C, T, d) -> {latent: (P) positions in the flattened C T tokens where it is active}."""
    latent, token, _ = active_pairs(sae, x.flatten(0, 1))
    found, counts = latent.unique_consecutive(return_counts=True)
    return dict(zip(found.tolist(), token.split(counts.tolist())))


def explain(sae, model, tokens, x, layer, site, pad, most=2048, examples=16, seed=0):
    """N2G explanations {latent: N2G} of at most `most` latents (a seeded sample), from `examples` random tokens each fires on.

    tokens (C, T) and their activations x (C, T, d). Latents that fire on fewer tokens than that are not explained.
    """
    T, where, reach = tokens.shape[1], positives(sae, x), model.config.n_ctx - 1  # one place is left for the padding
    latents = [i for i, p in where.items() if len(p) >= examples]
    if len(latents) > most:
        latents = sorted(np.random.default_rng(seed).choice(latents, most, replace=False).tolist())
    rows, jobs = tokens.tolist(), []
    for i in latents:
        chosen = where[i][torch.randperm(len(where[i]), generator=torch.Generator().manual_seed(seed))[:examples]]
        jobs += [(i, int(p)) for p in chosen]
    patterns, block = {i: [] for i in latents}, max(16, 2**24 // T**2)  # bounds the questions in flight
    progress = Progress(len(jobs), "n2g", " examples")
    ask = lambda asked: last_token_acts(sae, model, layer, site, asked, 2**18 if model.device.type == "cuda" else 2**13)
    for start in range(0, len(jobs), block):
        some = jobs[start : start + block]
        found = run_together({(i, p): find_pattern(rows[p // T][: p % T + 1][-reach:], pad) for i, p in some}, ask)
        for (i, _), pattern in found.items():
            patterns[i] += [pattern] if pattern else []
        progress(start + len(some))
    progress.finish()
    return {i: N2G(p) for i, p in patterns.items()}


def simulate(explanations, tokens):
    """What the explanations predict on tokens (C, T) -> (latent, token, value), each (P): token numbers the flattened C T."""
    trie = {}  # one for all: END holds {latent: activation}
    for i, e in explanations.items():
        for pattern, act in e.patterns:
            insert(trie, pattern).setdefault(END, {})[i] = act
    found, T = (array("q"), array("q"), array("f")), tokens.shape[1]
    progress = Progress(len(tokens), "simulate", " contexts")
    for c, row in enumerate(tokens.tolist()):
        for t in range(T):
            first = {}  # the first match of each latent counts
            for leaf in matches(trie, row, t):
                for i, act in leaf.items():
                    first.setdefault(i, act)
            for column, part in zip(found, (first.keys(), [c * T + t] * len(first), first.values())):
                column.extend(part)
        progress(c + 1)
    progress.finish()
    latent, at, value = (torch.from_numpy(np.array(column)) for column in found)
    return latent[value > 0], at[value > 0], value[value > 0]


def n2g(sae, explanations, tokens, x, contexts=512, examples=16, seed=0):
    """Precision and recall of explanations on text they were not made from: tokens (C, T) with activations x (C, T, d).

    recall: of `examples` random tokens on which the latent fires, the share where its explanation predicts it. precision: of
    all predictions in the first `contexts` contexts, the share where the latent fires. Means over latents with standard errors
    over latents; latents that fire on too few tokens here are skipped and counted, and latents without any prediction have no precision.
    """
    T, where, rows = tokens.shape[1], positives(sae, x), tokens.tolist()
    recall = {}
    for i, e in explanations.items():
        if len(p := where.get(i, ())) >= examples:
            chosen = p[torch.randperm(len(p), generator=torch.Generator().manual_seed(seed))[:examples]].tolist()
            recall[i] = float(np.mean([e.at(rows[p // T], p % T) > 0 for p in chosen]))
    latent, token, _ = simulate({i: explanations[i] for i in recall}, tokens[:contexts])
    truth = torch.cat([p + i * tokens.numel() for i, p in where.items()] or [torch.empty(0, dtype=torch.long)])
    right = torch.isin(latent * tokens.numel() + token, truth).double()
    said = torch.zeros(sae.n_latents, dtype=torch.double).index_add_(0, latent, torch.ones_like(right))
    hits = torch.zeros_like(said).index_add_(0, latent, right)
    precision = {i: (hits[i] / said[i]).item() for i in recall if said[i]}
    out = mean_and_error("precision", list(precision.values())) | mean_and_error("recall", list(recall.values()))
    per = {i: {"recall": r, "precision": precision.get(i)} for i, r in recall.items()}
    return out | {"latents": len(recall), "latents_with_precision": len(precision), "skipped": len(explanations) - len(recall), "per_latent": per}


# --------------------------------------------------------------------------------------------------
# Explanation reconstruction, section 4.4: the language model goes on with what the explanations predict.


@torch.no_grad()
def explanation_reconstruction(sae, model, explanations, train_tokens, train, tokens, layer, site, bigram=None):
    """ΔCE when each latent is replaced by its explanation's prediction s, scaled by E[s a] / E[s^2] from training text (train_tokens
    (C, T) and activations train (C, T, d)); latents without explanation are zero. tokens (C', T): where the loss is measured.

    bigram: the loss of a bigram model of the same tokens, the baseline to beat.
    """
    n, size = sae.n_latents, train_tokens.numel()
    latent, token, s = simulate(explanations, train_tokens)
    actual_latent, actual_token, a = active_pairs(sae, train.flatten(0, 1))
    keys = actual_latent * size + actual_token  # sorted
    key = latent * size + token
    at = torch.searchsorted(keys, key).clamp_max(max(len(keys) - 1, 0))
    a = torch.where(keys[at] == key, a[at], 0.0) if len(keys) else torch.zeros_like(s)
    sums = torch.zeros(2, n).index_add_(1, latent, torch.stack([s * a, s * s]))
    scale = sums[0] / sums[1].clamp_min(1e-30)

    latent, token, s = (v.to(sae.W_dec.device) for v in simulate(explanations, tokens))
    u_hat = sae.b_pre.detach().expand(tokens.numel(), -1).clone()
    for l, t, v in zip(latent.split(2**16), token.split(2**16), (s * scale.to(s.device)[latent]).to(u_hat).split(2**16)):
        u_hat.index_add_(0, t, sae.W_dec[l] * v[:, None])
    x = harvest.activations(model, tokens, layer, site).to(u_hat)
    _, mean, norm = normalize(x) if sae.normalized else (x, 0.0, 1.0)
    x_hat = u_hat.view(x.shape) * norm + mean
    nothing = (sae.b_pre * norm + mean).expand_as(x)
    per = patched_losses(model, tokens, layer, site, {"explained": x_hat, "b_pre": nothing}, "explanations")
    out = mean_and_error("ce", per["ce_explained"]) | mean_and_error("delta_ce", per["delta_explained"]) | mean_and_error("ce_without_latents", per["ce_b_pre"])
    out |= {"bigram": bigram} if bigram else {}
    return out | {"explained": len(explanations), "of_latents": n, "tokens": len(tokens) * (tokens.shape[1] - 1)}


# --------------------------------------------------------------------------------------------------
# Sparsity of ablation effects, section 4.5.


def effect_sparsity(delta):
    """Differences of logits delta (T, V) -> (L1 / L2)^2 / (V T) after subtracting the median over V at each position: the share
    of logits that are moved. 1/(V T) for a single one, 2/π for Gaussian noise, 1 for equal sizes. Also (..., T, V) -> (...)."""
    delta = (delta - delta.median(-1, keepdim=True).values).flatten(-2)
    share = delta.abs().sum(-1).square() / delta.square().sum(-1) / delta.shape[-1]
    return share if share.ndim else share.item()


@torch.no_grad()
def ablation_sparsity(sae, model, tokens, layer, site, T=16, samples=64, directions=32, seed=0):
    """How many of the next T positions' logits does ablating one thing at one position move? Means with standard errors over
    `samples` random (context, position) of tokens (C, length).

    latents: each active latent's decoded contribution is taken from the original activation, so the reconstruction error stays.
    channels: `directions` random coordinates are set to zero. random: the projections on so many random directions are taken away.
    `_here`: the same of the first of the T positions alone, which tells sparsity over the vocabulary from sparsity over time.
    """
    T = min(T, tokens.shape[1])
    rng, gen = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    found, effects = defaultdict(list), 0
    progress = Progress(samples, "ablation", " positions")
    for sample in range(samples):
        row = tokens[int(rng.integers(len(tokens)))].to(model.device)
        at = int(rng.integers(len(row) - T + 1))
        row = row[None, : at + T]
        clean = model(row)[0, at:]
        act = model.acts(row, layer, site)[0, at].to(sae.W_dec)
        u, _, norm = normalize(act[None]) if sae.normalized else (act[None], 0.0, 1.0)
        values, indices = (c[0] for c in sae.encode(u))
        values, indices = values[values > 0], indices[values > 0]
        some = torch.randperm(len(act), generator=gen)[:directions].to(act.device)
        lines = F.normalize(torch.randn(directions, len(act), generator=gen), dim=1).to(act)
        parts = {"latents": sae.W_dec[indices] * values[:, None] * norm,
                 "channels": F.one_hot(some, len(act)).to(act) * act[some, None],
                 "random": lines * (lines @ act)[:, None]}  # fmt: skip
        for name, part in parts.items():
            shares = []
            for some in part.split(max(1, 2**25 // (model.config.n_vocab * row.shape[1]))) if len(part) else ():

                def edit(a, some=some):
                    return torch.cat([a[:, :at], (a[:, at] - some.to(a))[:, None], a[:, at + 1 :]], 1)

                delta = model(row.expand(len(some), -1), layer, site, edit)[:, at:] - clean
                shares.append(torch.stack([effect_sparsity(delta), effect_sparsity(delta[:, :1])], 1))
            shares = torch.cat(shares or [part.new_empty(0, 2)])
            shares = shares[shares.isfinite().all(1)].double()  # an effect of exactly nothing has no sparsity
            if len(shares):
                found[name].append(shares[:, 0].mean().item()), found[name + "_here"].append(shares[:, 1].mean().item())
            effects += len(shares) if name == "latents" else 0
        progress(sample + 1)
    progress.finish()
    out = {}
    for name in ("latents", "channels", "random"):
        out |= mean_and_error(name, found[name]) | mean_and_error(name + "_here", found[name + "_here"])
    return out | {"samples": samples, "ablations": effects}


# --------------------------------------------------------------------------------------------------
# Shrinkage, section 5.1: with decoder and support fixed, do the best activations differ from those of the encoder?


def nnls(G, h, z0, sweeps=100):
    """Batched non-negative least squares: argmin over z >= 0 of z'Gz / 2 - h'z, G (B, k, k) positive definite, h, z0 (B, k) -> z (B, k).

    Block principal pivoting (Kim and Park 2011): all coordinates of the wrong sign change sides at once; where that stops
    helping, only the last of them. Rows that are not done after so many sweeps (k near or above the rank of G) go downhill from
    z0 one coordinate at a time instead, which never ends higher than it began.
    """
    B, k = h.shape
    eye, tol = torch.eye(k).to(h), 1e-10 * (1 + h.abs().amax(1, keepdim=True))
    z, free, left = z0.clone(), h > 0, torch.arange(B, device=h.device)
    fewest, patience = torch.full((B,), k + 1, device=h.device), torch.full((B,), 3, device=h.device)
    for _ in range(sweeps):
        on, G_, h_ = free[left], G[left], h[left]
        z_ = torch.linalg.solve(torch.where(on[:, :, None] & on[:, None, :], G_, eye), (h_ * on)[:, :, None])[:, :, 0]
        wrong = torch.where(on, z_, (G_ @ z_[:, :, None])[:, :, 0] - h_) < -tol[left]
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
            z[left, j] = (z[left, j] - ((G[left, j] * z[left]).sum(1) - h[left, j]) / G[left, j, j]).clamp_min(0)
    return z


@torch.no_grad()
def refinement(sae, x, ridge=1e-9):
    """Refit the active values of each token of x (contexts, T, d), z >= 0, decoder and support fixed, exactly.

    ratio: sum of the refined activations over the sum of the original ones, per context (1: no shrinkage; above: shrunk);
    ratio_median: the median over activations of refined / original; nmse and nmse_refined. The tiny ridge, towards the original
    values, only decides where the active decoder rows are linearly dependent.
    """
    before, after, original, refined, ratios, total, square = [], [], [], [], [], 0.0, 0.0
    progress, N = Progress(len(x), "refinement", " contexts"), x.shape[0] * x.shape[1]
    for done, context in enumerate(x.split(max(1, 1024 // x.shape[1]))):
        u = unit(sae, context.flatten(0, 1))
        values, indices = sae.encode(u)
        v, z = (u - sae.b_pre).double(), values.double()
        rows = max(1, 2**22 // (z.shape[1] * (z.shape[1] + sae.d_model)))
        new = []
        for v_, z_, i in zip(v.split(rows), z.split(rows), indices.split(rows)):
            W_, on = sae.W_dec[i].double(), z_ > 0  # (rows, k, d)
            G = (W_ @ W_.mT) * (on[:, :, None] & on[:, None, :]) + torch.diag_embed(ridge + (~on).double())
            new.append(nnls(G, ((W_ @ v_[:, :, None])[:, :, 0] + ridge * z_) * on, z_))
            for code, out in ((z_, before), (new[-1], after)):
                out.append((v_ - (code[:, None] @ W_)[:, 0]).square().sum(1))
        new = torch.cat(new)
        original.append(z.sum(1)), refined.append(new.sum(1)), ratios.append((new / z)[z > 0])
        total, square = total + u.sum(0).double(), square + u.square().sum().double()
        progress(min(len(x), (done + 1) * max(1, 1024 // x.shape[1])))
    progress.finish()
    variance = (square / N - (total / N).square().sum()).clamp_min(1e-30)
    before, after, original, refined = (torch.cat(v).view(x.shape[:2]).mean(1) for v in (before, after, original, refined))
    ratios = torch.cat(ratios)
    out = mean_and_error("ratio", refined / original) | {"ratio_median": ratios.median().item(), "ratio_mean": ratios.mean().item()}
    out |= mean_and_error("nmse", before / variance) | mean_and_error("nmse_refined", after / variance)
    return out | mean_and_error("gain", (before - after) / before) | {"tokens": N}


# --------------------------------------------------------------------------------------------------
# Scaling laws, section 3.


def fit_exponentials(terms, loss, seed=0):
    """Least squares of ln loss (R) by ln Σ_j exp(terms[j] @ θ_j), terms[j] (R, p_j): Levenberg-Marquardt from many starts, best kept.

    Returns (θ concatenated, standard errors, R² of ln loss, residual sum of squares). Standard errors are nan without spare runs.
    """
    y, rng = np.log(loss), np.random.default_rng(seed)

    def model(theta):
        parts = np.stack([X @ t for X, t in zip(terms, np.split(theta, cuts))])  # (terms, R)
        top = parts.max(0)
        total = top + np.log(np.exp(parts - top).sum(0))
        return total - y, np.concatenate([X * np.exp(p - total)[:, None] for X, p in zip(terms, parts)], 1)

    cuts = np.cumsum([X.shape[1] for X in terms])[:-1]
    best = None
    for share in np.repeat([0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98], 8) if len(terms) > 1 else [0.0]:
        # A start: the first term explains 1 - share of what is left after a constant floor, the second is that floor.
        floor = share * loss.min()
        theta = [np.linalg.lstsq(terms[0], np.log(loss - floor), rcond=None)[0]]
        theta += [np.linalg.lstsq(X, np.full(len(y), math.log(floor)), rcond=None)[0] for X in terms[1:]]
        theta = np.concatenate(theta)
        theta = theta + 0.1 * rng.standard_normal(len(theta)) * np.abs(theta) * (share > 0)
        damping, (r, J) = 1e-3, model(theta)
        for _ in range(500):
            A = J.T @ J
            step = np.linalg.lstsq(A + damping * np.diag(np.diag(A) + 1e-12), -J.T @ r, rcond=None)[0]
            with np.errstate(over="ignore", invalid="ignore"):
                r_new, J_new = model(theta + step)
            if r_new @ r_new < r @ r:
                gained = 1 - r_new @ r_new / (r @ r)
                theta, r, J, damping = theta + step, r_new, J_new, max(damping / 5, 1e-15)
                if gained < 1e-12 or r @ r < 1e-28:
                    break
            elif (damping := damping * 4) > 1e12:
                break
        if best is None or r @ r < best[1] @ best[1]:
            best = theta, r, J
    theta, r, J = best
    rss, spare = float(r @ r), len(y) - len(theta)
    with np.errstate(invalid="ignore"):  # nan for a parameter that the runs do not determine
        errors = np.sqrt(np.diag(np.linalg.pinv(J.T @ J)) * rss / spare) if spare > 0 else np.full(len(theta), np.nan)
    size = np.sqrt((J * J).sum(0))
    errors[size < 1e-9 * size.max()] = np.nan  # a term that has vanished: the loss says nothing about its parameters
    return theta, errors, 1 - rss / max(float(((y - y.mean()) ** 2).sum()), 1e-300), rss


def fit_scaling_law(runs):
    """L(n, k) = exp(α + β_k ln k + β_n ln n + γ ln k ln n) + exp(ζ + η ln k) through runs: dicts with n_latents, k, nmse.

    Returns alpha beta_k beta_n gamma zeta eta, their standard errors (`_se`), `fitted` L of the runs, r2 and rmse of ln L, the same for the fit
    without the irreducible second term (r2_without, rmse_without) and delta_aic (AICc, small-sample), the evidence for it (positive: needed; nan with fewer than 9 runs).
    Raises UserError for fewer runs than parameters, or where n or k do not vary enough.
    """
    names = ("alpha", "beta_k", "beta_n", "gamma", "zeta", "eta")
    n, k, loss = (np.array([r[key] for r in runs], dtype=float) for key in ("n_latents", "k", "nmse"))
    if len(runs) < len(names):
        raise UserError(f"L(n, k) has {len(names)} parameters, and there are {len(runs)} runs; nothing is fitted")
    if len(set(k)) < 2 or len(set(n)) < 3:
        raise UserError(f"L(n, k) needs at least two k and three n; here are k {sorted(set(k))} and n {sorted(set(n))}; nothing is fitted")
    one, lk, ln = np.ones(len(n)), np.log(k), np.log(n)
    first, second = np.stack([one, lk, ln, lk * ln], 1), np.stack([one, lk], 1)
    theta, errors, r2, rss = fit_exponentials([first, second], loss)
    _, _, r2_without, rss_without = fit_exponentials([first], loss)
    out = dict(zip(names, theta.tolist())) | {name + "_se": e for name, e in zip(names, errors.tolist())}
    out["fitted"] = (np.exp(first @ theta[:4]) + np.exp(second @ theta[4:])).tolist()
    R = len(runs)
    aicc = lambda rss, p: R * math.log(max(rss, 1e-300)) + 2 * p + 2 * p * (p + 1) / (R - p - 1) if R > p + 1 else math.nan  # p counts the variance too
    return out | {"r2": r2, "rmse": math.sqrt(rss / R), "r2_without": r2_without, "rmse_without": math.sqrt(rss_without / R),
                  "delta_aic": aicc(rss_without, 5) - aicc(rss, 7), "runs": R}  # fmt: skip


def fit_power_law(x, loss):
    """L = exp(a + b ln x) + exp(c): L(N) with x = n, L(C) with x = compute in FLOPs. -> a, b, floor = exp(c), errors, r2, r2_without.

    Raises UserError for fewer points than parameters.
    """
    if len(set(x)) < 3:
        raise UserError(f"a power law with a floor has 3 parameters, and there are {len(set(x))} points; nothing is fitted")
    one, lx, loss = np.ones(len(x)), np.log(np.array(x, dtype=float)), np.array(loss, dtype=float)
    theta, errors, r2, rss = fit_exponentials([np.stack([one, lx], 1), one[:, None]], loss)
    floor = math.exp(theta[2])
    _, _, r2_without, rss_without = fit_exponentials([np.stack([one, lx], 1)], loss)
    return {"a": theta[0], "a_se": errors[0], "b": theta[1], "b_se": errors[1], "floor": floor, "floor_se": floor * errors[2], "r2": r2, "r2_without": r2_without, "runs": len(x)}  # fmt: skip


def read_runs(paths):
    """Run directories -> list of dicts: n_latents, k, nmse, d, where, and `curve`, (FLOPs, held-out NMSE) during training."""
    runs = []
    for path in map(Path, paths):
        if not (path / "sae.pt").exists():
            print(f"  {path}: no finished run, left out", file=sys.stderr)
            continue
        own = load_file(path / "sae.pt").get("sae", {})
        meta, config = own.get("meta", {}), own.get("meta", {}).get("config", {})
        score = min(meta.get("nmse", {}).values(), default=math.nan)
        if config.get("l1") or config.get("multi_topk") or not math.isfinite(score):
            print(f"  {path}: {'has no held-out NMSE' if not math.isfinite(score) else 'not a plain TopK run'}, left out", file=sys.stderr)
            continue
        flops = 6 * own["d_model"] * own["n_latents"]  # a token, dense (section 7 of the paper's appendix counts so)
        lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()] if (path / "log.jsonl").exists() else []
        curve = [(flops * line["tokens"], line["val_nmse"]) for line in lines if "val_nmse" in line]
        where = {name: meta.get(name) for name in ("model", "layer", "site", "text")}
        runs.append({"path": str(path), "n_latents": own["n_latents"], "k": own["k"], "nmse": score, "where": where, "curve": curve, "tokens": meta["tokens"]})
    if any(run["where"] != runs[0]["where"] for run in runs):
        raise UserError("these runs are of different models, layers, sites or texts; fit one kind at a time: " + "; ".join(sorted({str(r["where"]) for r in runs})))
    return runs


def fit_main(paths):
    """`--fit`: L(n, k) through all runs, then L(N) and L(C) at the k with the most n."""
    runs = read_runs(paths)
    out = {"runs": [{key: run[key] for key in ("path", "n_latents", "k", "tokens", "nmse")} for run in runs]}
    for run in sorted(runs, key=lambda r: (r["k"], r["n_latents"])):
        print(f"  n {run['n_latents']:>8}  k {run['k']:>4}  {run['tokens']:>13,} tokens  NMSE {run['nmse']:.4f}")
    pm = lambda fit, name: f"{fit[name]:.4g} ± {fit[name + '_se']:.2g}"
    try:
        fit = out["L(n, k)"] = fit_scaling_law(runs)
        print("L(n, k) = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)")
        print("  " + ", ".join(f"{name} {pm(fit, name)}" for name in ("alpha", "beta_k", "beta_n", "gamma", "zeta", "eta")))
        print(f"  R² of ln L {fit['r2']:.5f}, rms error {fit['rmse']:.3%}; without the irreducible term {fit['r2_without']:.5f}, {fit['rmse_without']:.3%}; "
              f"ΔAIC {fit['delta_aic']:.1f} in its favour; {fit['runs']} runs")  # fmt: skip
    except UserError as e:
        print(f"L(n, k): {e}")
    k = max({r["k"] for r in runs}, key=lambda k: (len({r["n_latents"] for r in runs if r["k"] == k}), k), default=0)
    same = [r for r in runs if r["k"] == k]
    frontier, least = [], math.inf
    for flops, nmse in sorted(point for r in same for point in r["curve"]):
        if nmse < least:
            frontier, least = [*frontier, (flops, nmse)], nmse
    for name, points in (("L(N)", [(r["n_latents"], r["nmse"]) for r in same]), ("L(C)", frontier)):
        try:
            fit = out[f"{name}, k = {k}"] = fit_power_law(*zip(*points)) if points else fit_power_law((), ())
            print(f"{name} at k = {k}: exp({pm(fit, 'a')}) x^({pm(fit, 'b')}) + {pm(fit, 'floor')}; R² {fit['r2']:.5f}, without the floor {fit['r2_without']:.5f}; {fit['runs']} points")
        except UserError as e:
            print(f"{name} at k = {k}: {e}")
    return out


# --------------------------------------------------------------------------------------------------
# The report: one page that opens from disk, with everything known about an autoencoder and its latents.


def pack(array):
    """A numpy array as JSON: its type (u1, u2, u4, i2 or f4) and its bytes in base64."""
    array = np.ascontiguousarray(array)
    return {"type": array.dtype.str[1:], "data": base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()}


def smallest(array):
    """Non-negative integers in as few bytes as they need."""
    most = int(array.max()) if array.size else 0
    return np.asarray(array).astype(np.uint8 if most < 2**8 else np.uint16 if most < 2**16 else np.uint32)


def top_two_ways(scores, k):
    """scores (L, V) -> the k largest and then the k smallest of each row: indices (L, 2 k), values (L, 2 k)."""
    up, down = scores.topk(k, dim=1), scores.topk(k, dim=1, largest=False)
    return torch.cat([up.indices, down.indices], 1), torch.cat([up.values, down.values], 1)


def ranges(starts, lengths):
    """The numbers of all ranges [start, start + length), one after the other."""
    return np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())


@torch.no_grad()
def report(sae, model, encoding, tokens, x, layer, site, most=0, held_out=None, examples=6, bins=12, seed=0):
    """What the page shows of single latents, from tokens (C, T) with raw activations x (C, T, d): a dict ready for JSON.

    most: at most so many of the latents that fire, a seeded sample; 0: all. held_out: so many contexts, the first, are held-out
    text, the others training text (default: all are). For each latent: density, moments and histogram of its
    activations, the `examples` contexts with the highest peaks and as many evenly spaced ones from there to the lowest, all
    activations in them, the tokens that carry its activation, its direct effect on the logits (the decoder row through the final
    norm and the unembedding), the measured one at its highest peak (its contribution there is taken away), and the nearest
    decoder rows.
    """
    (C, T), ids = tokens.shape, tokens.flatten().numpy()
    latent, token, value = (v.numpy() for v in active_pairs(sae, x.flatten(0, 1)))
    live = np.unique(latent)
    if most and len(live) > most:
        live = np.sort(np.random.default_rng(seed).permutation(live)[:most])
    kept = np.isin(latent, live)
    rank, token, value = np.searchsorted(live, latent[kept]), token[kept], value[kept].astype(np.float64)
    if not len(live):
        raise UserError("no latent fires on this text; there is nothing to show")

    # Moments over the tokens where a latent fires, and a histogram of them between 0 and its maximum.
    starts = np.flatnonzero(np.diff(rank, prepend=-1))
    counts = np.diff(starts, append=len(rank))
    mean = np.add.reduceat(value, starts) / counts
    moment = lambda p: np.add.reduceat((value - mean[rank]) ** p, starts) / counts
    spread, peak = np.sqrt(moment(2)), np.maximum.reduceat(value, starts)
    with np.errstate(all="ignore"):
        skew, kurtosis = (np.where(spread > 1e-9 * mean, moment(p) / spread**p, np.nan) for p in (3, 4))
    every = np.histogram(value, 40)
    histogram = np.bincount(rank * bins + np.minimum(bins - 1, (value / peak[rank] * bins).astype(int)), minlength=len(live) * bins)
    stats = {"density": counts / (C * T), "mean": mean, "mean square": np.add.reduceat(value**2, starts) / (C * T), "skew": skew, "kurtosis": kurtosis, "max": peak}

    # The tokens that carry most of a latent's activation.
    pairs, where = np.unique(rank.astype(np.int64) * model.config.n_vocab + ids[token], return_inverse=True)
    share = np.bincount(where, value) / (mean * counts)[pairs // model.config.n_vocab]
    order = np.lexsort((-share, pairs // model.config.n_vocab))
    of = (pairs // model.config.n_vocab)[order]
    place = np.arange(len(of)) - np.searchsorted(of, of)
    main, main_share = np.zeros((len(live), 5), int), np.zeros((len(live), 5))
    best = place < 5
    main[of[best], place[best]], main_share[of[best], place[best]] = (pairs % model.config.n_vocab)[order][best], share[order][best]

    # Examples: whole contexts, the highest peaks first, then evenly spaced among the others.
    group = np.flatnonzero(np.diff(rank * C + token // T, prepend=-1))
    size, top = np.diff(group, append=len(rank)), np.maximum.reduceat(value, group)
    order = np.lexsort((-top, rank[group]))
    of = rank[group][order]
    place, total = np.arange(len(of)) - np.searchsorted(of, of), np.bincount(of, minlength=len(live))
    later, last = place - examples, np.maximum(total[of] - examples - 1, 1)  # evenly spaced from the first of the later ones to the last
    some = order[(place < examples) | (later >= 0) & (later * (examples - 1) // last != (later - 1) * (examples - 1) // last)]
    of_pairs = ranges(group[some], size[some])
    shown = {"context": smallest(token[group[some]] // T), "pairs": smallest(size[some]), "per latent": smallest(np.bincount(rank[group[some]], minlength=len(live))),
             "position": smallest(token[of_pairs] % T), "value": np.maximum(1, np.round(value[of_pairs] / peak[rank[of_pairs]] * 65535)).astype(np.uint16)}

    # Effects on the logits, and neighbours.
    W_dec, every_row = sae.W_dec[torch.from_numpy(live).to(sae.W_dec.device)].float(), F.normalize(sae.W_dec.float(), dim=1)
    rows = {name: [] for name in ("direct", "direct value", "near", "near cosine", "effect", "effect value", "effect size")}
    k = min(8, model.config.n_vocab // 2)
    unembedding, near = model.wte.weight.float(), min(6, sae.n_latents)
    for w in W_dec.split(1024):
        if w.shape[1] == unembedding.shape[1] and site != "mlp_post_act":
            logits = (w - w.mean(1, keepdim=True)) * model.ln_f.weight.float() @ unembedding.T
            tokens_, values_ = top_two_ways(logits - logits.mean(1, keepdim=True), k)
            rows["direct"].append(tokens_), rows["direct value"].append(values_ / values_.abs().amax(1, keepdim=True).clamp_min(1e-30))
        cosine, at = (F.normalize(w, dim=1) @ every_row.T).topk(near, dim=1)  # itself among them
        rows["near"].append(at), rows["near cosine"].append(cosine.clamp(-1, 1))
    at = np.zeros(len(live), int)  # the token of each latent's highest activation
    highest = np.lexsort((-value, rank))
    at[rank[highest[::-1]]] = token[highest[::-1]]
    found = measured_effects(sae, model, tokens, layer, site, live, at, peak, k)
    rows["effect"], rows["effect value"], rows["effect size"] = ([v] for v in found)
    joined = {name: torch.cat(parts).cpu().numpy() for name, parts in rows.items() if parts}
    shares = ("direct value", "near cosine")  # between -1 and 1
    numbers = {name: np.round(32767 * a).astype(np.int16) if name in shares else smallest(a) if a.dtype.kind == "i" else a for name, a in joined.items()}
    known = token_ids(encoding)
    text = [encoding.decode_single_token_bytes(i).decode("utf-8", "backslashreplace") if i in known else "" for i in range(model.config.n_vocab)]
    return {
        "T": T, "n_live": len(live), "held_out": C if held_out is None else held_out, "normalized": sae.normalized, "bins": bins, "top": k, "near": near, "examples": examples,
        "tokens": pack(smallest(ids)), "vocabulary": text, "latents": pack(live.astype(np.uint32)),
        "activations": {"edges": every[1].tolist(), "counts": every[0].tolist()}, "histogram": pack(smallest(histogram)),
        "stats": {name: pack(v.astype(np.float32)) for name, v in stats.items()},
        "main": pack(smallest(main)), "main share": pack(np.round(255 * main_share).astype(np.uint8)),
        "shown": {name: pack(v) for name, v in shown.items()}, "numbers": {name: pack(v) for name, v in numbers.items()},
    }  # fmt: skip


def token_ids(encoding):
    """The ids that stand for bytes; a vocabulary may have gaps."""
    return {encoding.encode_single_token(b) for b in encoding.token_byte_values()} | {encoding.eot_token}


@torch.no_grad()
def measured_effects(sae, model, tokens, layer, site, latents, at, values, k):
    """Take each latent's contribution away where it is highest: `at` (L), a place in the flattened tokens (C, T), its `values` (L) there.

    -> tokens (L, 2 k) whose logits, against the mean over the vocabulary, it raises and lowers most; by how much, in nats; and (L, 2): what its
    absence adds to the loss of the next token (nan at the end of a context), and KL(with || without) there, in nats.
    """
    T, device, out = tokens.shape[1], model.device, []
    batch = max(1, min(256, 2**28 // (model.config.n_vocab * T)))  # 1 GB of logits
    order = np.argsort(at % T, kind="stable")  # contexts are cut after the place, so equal lengths run together
    progress = Progress(len(order), "ablation", " latents")
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        place = torch.from_numpy(at[some] % T).to(device)
        rows, every = tokens[at[some] // T].to(device), torch.arange(len(some), device=device)
        following = rows.gather(1, (place + 1).clamp(max=T - 1)[:, None])[:, 0]
        rows = rows[:, : int(place.max()) + 1]
        taken = torch.from_numpy(values[some, None]).to(sae.W_dec) * sae.W_dec[torch.from_numpy(latents[some]).to(device)]

        def edit(a):
            norm = normalize(a[every, place].to(taken))[2] if sae.normalized else 1.0
            a = a.clone()
            a[every, place] -= (taken * norm).to(a)
            return a

        clean, without = (model(rows, *args)[every, place].float().log_softmax(1) for args in ((), (layer, site, edit)))
        change = clean - without
        loss = torch.where(place < T - 1, change.gather(1, following[:, None])[:, 0], math.nan)
        kl = (clean.exp() * change).sum(1).clamp_min(0)
        out.append((*top_two_ways(change - change.mean(1, keepdim=True), k), torch.stack([loss, kl], 1)))
        progress(start + len(some))
    progress.finish()
    back = torch.from_numpy(np.argsort(order))
    return tuple(torch.cat(part).cpu()[back] for part in zip(*out))


def write_report(path, page):
    """Write the page to `path`, its data as one JSON block in which no `<` is left to be taken for a tag."""

    def finite(v):
        if isinstance(v, dict):
            return {k: finite(x) for k, x in v.items()}
        return [finite(x) for x in v] if isinstance(v, (list, tuple)) else None if isinstance(v, float) and not math.isfinite(v) else v

    data = json.dumps(finite(page), allow_nan=False).replace("<", "\\u003c")
    part = Path(path).with_name(Path(path).name + ".part")
    part.write_text(PAGE.replace("/*STYLE*/", STYLE).replace("/*SCRIPT*/", SCRIPT).replace("/*DATA*/", data), encoding="utf-8")
    part.replace(path)


def make_report(path, results, page, run, runs):
    """Everything known: the results so far, the training curves, the latents, and where several runs were given the law through them."""
    log = Path(run) / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    metrics = [[label, value, error, unit if value is not None else why, size]
               for metric, result in results.items() if isinstance(result, dict) for label, value, error, unit, size, why in cells(metric, result)]  # fmt: skip
    tasks = [[name, *(t[kind]["held_out"] for kind in ("latent", "channel")), t["majority"]] for name, t in results.get("probes", {}).get("per_task", {}).items()]
    dense = [list(row.values()) for row in results.get("dense_latents", {}).get("densest", [])]
    plots = {name: results[metric][name] for metric, name in (("density", "log10_density"), ("density", "log10_mean_square")) if metric in results}
    plots |= {"positions": {key: results["positions"][key] for key in ("nmse", "norm")}} if "positions" in results else {}
    plots |= {"test_time_k": {key: results["test_time_k"][key] for key in ("at", "nmse", "delta_ce")}} if "test_time_k" in results else {}
    overlay = []
    if len(runs) > 1:
        try:
            overlay = [{key: r[key] for key in ("path", "n_latents", "k", "tokens", "nmse")} for r in read_runs(runs)]
            overlay = [r | {"law": loss} for r, loss in zip(overlay, fit_scaling_law(overlay)["fitted"])]
        except UserError as e:
            print(f"  no law through these runs: {e}", file=sys.stderr)
    per = {i: [v["precision"], v["recall"]] for i, v in results.get("n2g", {}).get("per_latent", {}).items()}
    kept = path.with_name(path.name.replace("report.html", "n2g.json"))
    patterns = {i: e["readable"][:8] for i, e in json.loads(kept.read_text())["latents"].items()} if per and kept.exists() else {}
    curves = {name: [line.get(name) for line in lines] for name in ("tokens", "nmse", "val_nmse", "dead", "l0", "tokens_per_s")}
    write_report(path, page | {"about": results["about"], "metrics": metrics, "tasks": tasks, "dense": dense, "plots": plots, "curves": curves,
                               "runs": overlay, "n2g": per, "patterns": patterns})  # fmt: skip


# --------------------------------------------------------------------------------------------------
# The command line.

QUICK = ("reconstruction", "memorization", "density", "dense_latents", "positions", "downstream")
SLOW = ("refinement", "test_time_k", "fixed_threshold", "probes", "n2g", "explanation_reconstruction", "ablation_sparsity")

ROWS = [  # metric, key, what the table says, unit, what the sample counts
    ("reconstruction", "nmse", "NMSE, held-out", "", "tokens"),
    ("reconstruction", "l0", "L0", "latents/token", "tokens"),
    ("reconstruction", "norm_ratio", "norm of reconstruction / input", "", "tokens"),
    ("memorization", "nmse_train", "NMSE, training text", "", "tokens"),
    ("memorization", "gap", "held-out less training NMSE", "", "tokens"),
    ("density", "silent", "latents silent on held-out text", "of n", "tokens"),
    ("density", "rare", "latents firing on < 1e-4 of tokens", "of n", "tokens"),
    ("density", "densest", "densest latent", "of tokens", "tokens"),
    ("positions", "nmse_first", "NMSE, first position", "", "contexts"),
    ("positions", "nmse_later", "NMSE, later positions", "", "contexts"),
    ("positions", "norm_first", "norm of the input, first position", "", "contexts"),
    ("positions", "norm_later", "norm of the input, later positions", "", "contexts"),
    ("downstream", "ce", "CE of the model itself", "nats/token", "tokens"),
    ("downstream", "ce_sae", "CE with the reconstruction", "nats/token", "tokens"),
    ("downstream", "delta_ce", "ΔCE", "nats/token", "tokens"),
    ("downstream", "kl", "KL(original || patched)", "nats/token", "tokens"),
    ("downstream", "ce_mean", "CE, mean ablation", "nats/token", "tokens"),
    ("downstream", "ce_zero", "CE, zero ablation", "nats/token", "tokens"),
    ("downstream", "recovered_mean", "loss recovered against mean ablation", "", "tokens"),
    ("downstream", "recovered_zero", "loss recovered against zero ablation", "", "tokens"),
    ("downstream", "compute_equivalent", "compute-equivalent", "of training", "tokens"),
    ("refinement", "ratio", "refined / original activations", "", "tokens"),
    ("refinement", "ratio_median", "the same, median of single ones", "", "tokens"),
    ("refinement", "nmse_refined", "NMSE after refinement", "", "tokens"),
    ("refinement", "gain", "share of the error that it removes", "", "tokens"),
    ("test_time_k", "nmse", "NMSE at k' = {}", "", "tokens"),
    ("test_time_k", "delta_ce", "ΔCE at k' = {}", "nats/token", "contexts"),
    ("fixed_threshold", "l0", "L0 at a fixed threshold", "latents/token", "tokens"),
    ("fixed_threshold", "nmse", "NMSE at a fixed threshold", "", "tokens"),
    ("fixed_threshold", "delta_ce", "ΔCE at a fixed threshold", "nats/token", "contexts"),
    ("probes", "held_out", "probe loss, best latent, held-out half", "nats", "tasks"),
    ("probes", "loss", "probe loss, best latent, selection half", "nats", "tasks"),
    ("probes", "channel_held_out", "probe loss, best channel, held-out half", "nats", "tasks"),
    ("probes", "majority", "probe loss, majority", "nats", "tasks"),
    ("n2g", "recall", "N2G recall", "", "latents"),
    ("n2g", "precision", "N2G precision", "", "latents_with_precision"),
    ("explanation_reconstruction", "ce", "CE of the explanations", "nats/token", "tokens"),
    ("explanation_reconstruction", "delta_ce", "ΔCE of the explanations", "nats/token", "tokens"),
    ("explanation_reconstruction", "ce_without_latents", "CE with no latent at all", "nats/token", "tokens"),
    ("explanation_reconstruction", "bigram", "CE of a bigram model", "nats/token", "tokens"),
    ("ablation_sparsity", "latents", "logits moved by ablating a latent", "of V T", "samples"),
    ("ablation_sparsity", "channels", "the same, a channel", "of V T", "samples"),
    ("ablation_sparsity", "random", "the same, a random direction", "of V T", "samples"),
    ("ablation_sparsity", "latents_here", "at its own position alone, a latent", "of V", "samples"),
    ("ablation_sparsity", "channels_here", "the same, a channel", "of V", "samples"),
    ("ablation_sparsity", "random_here", "the same, a random direction", "of V", "samples"),
]


def cells(metric, result):
    """One metric's result (dict) -> (label, value, standard error, unit, sample) of each line of the table; None for what there is not."""
    for key, label, unit_, of in (row[1:] for row in ROWS if row[0] == metric and row[1] in result):
        several = isinstance(result[key], list)
        values, errors = (result.get(name) if several else [result.get(name)] for name in (key, key + "_se"))
        for at, value, error in zip(result["at"] if several else [""], values, errors):
            yield label.format(at), value, error if error is not None and math.isfinite(error) else None, unit_, f"{result[of]:,} {of.replace('_', ' ')}", result.get(key + "_why")


def table(metric, result):
    """One metric's result (dict) -> lines of the table: value, standard error, unit, sample size."""
    lines = []
    for label, value, error, unit_, size, why in cells(metric, result):
        value = f"{value:10.4f}" if value is not None else f"         -  ({why})"
        error = f" ± {error:.4f}" if error is not None else ""
        count, of = size.split(" ", 1)
        lines.append(f"  {label:<40}{value}{error:<10} {unit_:<14} {count:>9} {of}".rstrip())
    if metric == "n2g":
        lines.append(f"    skipped, too few positives: {result['skipped']} of {result['explained']} explained; too few to explain: {result['unexplained']} latents")
        lines += [f"    latent {i}: {'  '.join(text)}" for i, text in result["samples"].items()]
    if metric == "explanation_reconstruction":
        lines.append(f"    {result['explained']} of {result['of_latents']} latents explained, the others are zero")
    if metric == "dense_latents":
        lines += ["    latent {latent}: fires on {density:.1%}; correlation with position {position:+.2f}, first token {first_token:+.2f}, repetition {repetition:+.2f}".format(**r)
                  for r in result["densest"][:5]]  # fmt: skip
    if metric == "probes":
        lines += [f"    {name:<28} latent {t['latent']['held_out']:.4f}  channel {t['channel']['held_out']:.4f}  majority {t['majority']:.4f}" for name, t in result["per_task"].items()]
    return lines


def load(path, device):
    """A run directory or a file -> (SAE, its file, the JSON file for its results)."""
    path = Path(path)
    if path.is_file():
        return SAE.load(path, device), path, path.with_suffix(".evals.json")
    if not (path / "sae.pt").exists() and any(path.glob("checkpoint*.pt")):
        raise UserError(f"{path} is not finished; continue it with: python sae.py --resume --out {path} and the options it was started with")
    return SAE.load(path / "sae.pt" if path.is_dir() else path, device), path / "sae.pt", path / "evals.json"


def stamp(path):
    """A local file or folder as something that changes when it does; names such as `stdlib` stay themselves."""
    path = Path(path)
    return [str(path), *([path.stat().st_size, path.stat().st_mtime] if path.exists() else [])]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", help="directories under runs/, or files: sae.pt or one of OpenAI's autoencoders")
    p.add_argument("--all", action="store_true", help="every metric, not only the quick ones")
    p.add_argument("--only", default="", help=f"just these, separated by commas: {','.join(QUICK + SLOW)}")
    p.add_argument("--fit", action="store_true", help="fit the scaling laws through the runs, and nothing else")
    p.add_argument("--probes", help='folder of NAME.jsonl with {"text": ..., "label": 0|1}: probe these instead of the built-in token tasks')
    p.add_argument("--acts", help="harvested activations; default: those it was trained on, else text is run through --model")
    p.add_argument("--model", help="subject model where there are no harvested activations (default: the one it was trained on)")
    p.add_argument("--layer", type=int, help="default: the one it was trained on, else two thirds of the depth")
    p.add_argument("--site", help=f"default: the one it was trained on, else resid_post_mlp; one of {', '.join(SITES)}")
    p.add_argument("--text", help="text where there are no harvested activations (default: what the model was trained on)")
    p.add_argument("--tokens", type=int, default=0, help="tokens for NMSE, density, probes, N2G; 0: 2^18 on CUDA, 2^16 on CPU")
    p.add_argument("--contexts", type=int, default=0, help="held-out contexts for downstream losses; 0: 2048 on CUDA, 512 on CPU")
    p.add_argument("--report", action="store_true", help="write report.html beside the results, a page to open in a browser; several runs are overlaid")
    p.add_argument("--latents", type=int, default=0, help="most latents that N2G explains (default: 2048) and that --report shows (default: all that fire)")
    p.add_argument("--device", default="", help="cuda or cpu; default: cuda if there")
    p.add_argument("--again", action="store_true", help="compute anew what is asked for")
    p.add_argument("--json", action="store_true", help="print JSON instead of the table")
    a = p.parse_args(argv)
    keep_heap()
    if a.fit:
        out = fit_main(a.runs)
        return print(json.dumps(out, indent=1)) if a.json else None
    wanted = a.only.split(",") if a.only else QUICK + (SLOW if a.all else ("probes",) * bool(a.probes))
    if unknown := [name for name in wanted if name not in QUICK + SLOW]:
        raise UserError(f"no metric {', '.join(unknown)}; choose among {', '.join(QUICK + SLOW)}")
    for run in a.runs:
        evaluate(run, wanted, a)


def evaluate(run, wanted, a):
    """Compute the metrics `wanted` of one autoencoder, print them as they come, and keep them beside it. a: the command line."""
    device = harvest.pick_device(a.device)
    cuda = device.startswith("cuda")
    n_contexts = a.contexts or (2048 if cuda else 512)
    n_tokens = a.tokens or (2**18 if cuda else 2**16)
    began = time.time()
    sae, file, out = load(run, device)
    trained = sae.meta

    # Text and activations: training and held-out ones where the harvest that it was trained on is there, else held-out text alone.
    acts = a.acts or trained.get("config", {}).get("acts")
    asked = {name: value for name in ("model", "layer", "site", "text") if (value := getattr(a, name)) is not None}
    place = {name: trained[name] for name in ("model", "layer", "site", "text") if name in trained} | asked
    if a.acts or (acts and harvest.is_harvested(acts) and all(harvest.read_meta(acts)[name] == value for name, value in place.items())):
        held_out, train = harvest.Acts(acts, "val"), harvest.Acts(acts, "train")
        where = train.meta
        for name, value in place.items():
            if where[name] != value:
                raise UserError(f"{acts} holds {name} {where[name]}, but {run} {'is asked about' if name in asked else 'was trained on'} {name} {value}; give other --acts")
        model, encoding = harvest.load_model(where["model"], device)
    else:
        model, encoding = harvest.load_model(place.get("model", "auto"), device, needs_text="text" not in place)
        text = place.get("text") or harvest.default_text(model)
        held_out, train = harvest.Stream(model, encoding, text, place.get("layer"), place.get("site", "resid_post_mlp"), trained.get("context")), None
        where = held_out.meta
    if where["d_model"] != sae.d_model:
        raise UserError(f"{run} is for activations of width {sae.d_model}, these have {where['d_model']}; give its own --model, --layer and --site")
    T, layer, site = where["context"], where["layer"], where["site"]
    n_samples = max(1, n_tokens // T)
    first = max(n_samples, n_contexts)
    val_tokens, val = held_out.sample((first if train else first + n_samples) * T)
    if train:  # contexts in the order in which training saw them
        order = next(harvest.shuffled_blocks(len(train), len(train), trained.get("config", {}).get("seed", 0), 0))[0]
        seen_tokens, seen = train[order[:n_samples]]
    else:  # without training text: further held-out contexts
        seen_tokens, seen = val_tokens[first:], val[first:]
    chosen, val_tokens, val, seen = val_tokens[:first][:n_contexts], val_tokens[:first][:n_samples], val[:first][:n_samples].float(), seen.float()

    kind = f"TopK k = {sae.k}" if sae.k < sae.n_latents else "ReLU"
    about = f"{run}: {where['model']}, layer {layer}, {site}, d = {sae.d_model}, n = {sae.n_latents}, {kind}; text: {where['text']}"
    settings = {"where": where, "trained": trained, "files": [stamp(path) for path in (file, where["model"], where["text"])]}
    results = {"about": about, "settings": settings}
    # What an earlier call found for the same file and place is kept, so an interrupted evaluation goes on where it stopped.
    earlier = json.loads(out.read_text()) if out.exists() else {}
    if json.loads(json.dumps(settings)) == earlier.get("settings"):
        results = earlier
    sizes = {"tokens": n_tokens, "contexts": n_contexts}

    def explanations():
        """Made once and kept in n2g.json, beside the results."""
        kept, key = out.with_name(out.name.replace("evals", "n2g")), json.loads(json.dumps(settings | sizes | {"latents": a.latents or 2048}))
        if kept.exists() and not a.again and (saved := json.loads(kept.read_text()))["settings"] == key:
            return {int(i): N2G(e["patterns"]) for i, e in saved["latents"].items()}
        pad = encoding.encode_ordinary(" _")[-1]
        found = explain(sae, model, seen_tokens, seen, layer, site, pad, a.latents or 2048)
        latents = {i: {"patterns": e.patterns, "readable": e.readable(encoding)} for i, e in found.items()}
        harvest.write_json(kept, {"settings": key, "latents": latents})
        return found

    def run_n2g():
        found = explanations()
        result = n2g(sae, found, val_tokens, val, n_contexts)
        some = np.random.default_rng(0).permutation(sorted(result["per_latent"]))[:5].tolist()
        samples = {i: found[i].readable(encoding)[:6] for i in some}
        return result | {"explained": len(found), "unexplained": sae.n_latents - len(found), "samples": samples}

    def run_explanations():
        _, bigram = harvest.ngram_losses(train.tokens, chosen.numpy(), model.config.n_vocab) if train else (None, None)
        return explanation_reconstruction(sae, model, explanations(), seen_tokens[:n_contexts], seen[:n_contexts], chosen, layer, site, bigram)

    texts = read_tasks(a.probes) if a.probes else None  # complain about a bad file before any work

    def run_probes():
        return probes(sae, text_tasks(sae, model, encoding, texts, layer, site, T) if texts else token_tasks(sae, val, val_tokens, encoding))

    k = sae.k if sae.k < sae.n_latents else max(1, round(reconstruction(sae, val[:64])["l0"]))
    metrics = {  # name -> (function, what its result depends on)
        "reconstruction": (lambda: reconstruction(sae, val), sizes),
        "memorization": (lambda: memorization(sae, seen, val), sizes),
        "density": (lambda: density(sae, val.flatten(0, 1)), sizes),
        "dense_latents": (lambda: dense_latents(sae, val, val_tokens), sizes),
        "positions": (lambda: positions(sae, val), sizes),
        "downstream": (lambda: downstream(sae, model, chosen, layer, site, val.mean((0, 1))), sizes),
        "refinement": (lambda: refinement(sae, val[: max(1, 2**14 // T)]), sizes),
        "test_time_k": (lambda: test_time_k(sae, val[: max(1, 2**14 // T)], model, chosen[:256], layer, site, k), sizes),
        "fixed_threshold": (lambda: fixed_threshold(sae, seen[: max(1, 2**14 // T)], val, model, chosen, layer, site), sizes),
        "probes": (run_probes, sizes | {"probes": a.probes and [a.probes, *map(stamp, sorted(Path(a.probes).glob("*.jsonl")))]}),
        "n2g": (run_n2g, sizes | {"latents": a.latents or 2048}),
        "explanation_reconstruction": (run_explanations, sizes | {"latents": a.latents or 2048}),
        "ablation_sparsity": (lambda: ablation_sparsity(sae, model, chosen, layer, site), sizes),
    }
    without = {} if sae.k < sae.n_latents else {"fixed_threshold": "a ReLU autoencoder has no k to calibrate a threshold for"}
    if not train or Path(train.path) != Path(trained.get("config", {}).get("acts") or ""):
        without["memorization"] = "the activations it was trained on are not at hand"
    if not len(seen):
        without |= dict.fromkeys(("fixed_threshold", "n2g", "explanation_reconstruction"), "the held-out text is too short; give more --text")
    if not a.json:
        print(about)
    for name in wanted:
        compute, depends = metrics[name]
        if name in without:
            print(f"  {name}: {without[name]}", file=sys.stderr)
            continue
        depends = json.loads(json.dumps(depends))
        if a.again or results.get(name, {}).get("asked") != depends:
            try:
                results[name] = {"asked": depends} | compute()
            except UserError as e:  # too little data for this one: the others go on
                print(f"  {name}: {e}", file=sys.stderr)
                continue
            harvest.write_json(out, results)
        if not a.json:
            print("\n".join(table(name, results[name])), flush=True)
    if a.json:
        print(json.dumps(results, indent=1))
    if a.report:
        page = report(sae, model, encoding, torch.cat([val_tokens, seen_tokens]), torch.cat([val, seen]), layer, site, a.latents, len(val) if train else None)
        out = out.with_name(out.name.replace("evals.json", "report.html"))
        make_report(out, results, page, run, a.runs)
    print(f"{time.time() - began:.0f} s; written to {out}", file=sys.stderr)


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
