"""evals.py: an autoencoder -> every metric of the paper, as a table and as JSON.

    python evals.py runs/n32768_k32                     # a run of sae.py, on what it was trained on
    python evals.py runs/n32768_k32 --all               # the slow ones too; or --only probes
    python evals.py 8.pt --model gpt2 --layer 8 --all   # one of OpenAI's released autoencoders
    python evals.py FOLDER --acts mine.npy --all        # SAELens', sparsify's, ... on given rows
    python evals.py --fit runs/*                        # scaling laws through many runs
    python evals.py --compare runs/*                    # a table of them, by activation function
    python evals.py runs/n32768_k32 --report            # report.html: all latents, in a browser
    python evals.py runs/n2048_k32 runs/n8192_k32       # several, and their paired differences

One function a metric, its call and its rows of the table in `@metric` above it. It takes an SAE and
plain tensors or a place in a language model, in the order sae, site, tokens, and returns a dict of
numbers; NAME_se is the standard error of NAME, over documents where text is sampled. Losses are in
nats per token. Results are kept: a second call computes what is missing. Sections are the paper's;
the first two of them are quick."""

import argparse
import base64
import copy
import itertools
import json
import math
import os
import sys
import time
from array import array
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import harvest
from harvest import SITES, Progress, UserError
from sae import FOREIGN, Sparse, activation_name, keep_heap, load_file, normalize, thresholded

CHUNK = 8192  # tokens encoded at a time
METRICS = {}  # name -> what `@metric` says, in the order in which they run
PLACE = ("model", "layer", "site", "text")  # what tells activations from others
HASHES = ("acts_sha256", "model_sha256", "text_sha256")  # and their names do not

@dataclass
class metric:
    """Above a function: makes it, without gradients, a metric of table, JSON and page."""
    compute: Callable  # Case -> the function's result, a dict
    rows: list = ()  # of the table: key in the result, label; unit and `of` where they differ
    unit: str = ""
    of: str = "tokens"  # key in the result of the sample's size
    quick: bool = False  # computed without --all
    needs: tuple = ()  # what Case.missing must not have, even where an earlier result is kept
    depends: tuple = ()  # what of the Case, beside its sizes, the result depends on
    notes: Callable = lambda result: []  # -> further lines of the table
    page: Callable = lambda result: {}  # -> further parts of the report

    def __call__(self, function):
        METRICS[function.__name__] = self
        return torch.no_grad()(function)

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
        return self.model(tokens, self.layer, self.name, edit or (lambda act: act))

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
        yield slice(start, min(start + size, n))
        progress(min(start + size, n))
    progress.finish()

def means(**samples):
    """{name: independent samples (N)} -> {name: their mean, name_se: its standard error}."""
    out = {}
    for name, v in samples.items():
        v = torch.as_tensor(v, dtype=torch.float64)
        error = (v.std() / math.sqrt(len(v))).item() if len(v) > 1 else math.nan
        out |= {name: v.mean().item(), name + "_se": error}
    return out

def leave_one_out(document, top, bottom=None):
    """Sum of `top` over that of `bottom` (default: 1 each), both (C) of contexts -> of all of them,
    then without each document in turn: (1 + G). document: the number of each context's own (at
    least C), or None where they are independent."""
    top = torch.as_tensor(top, dtype=torch.float64).cpu()
    bottom = torch.ones_like(top) if bottom is None else bottom.double().cpu()
    document = torch.arange(len(top)) if document is None else document[: len(top)]
    which = document.unique(return_inverse=True)[1]
    sums = torch.zeros(int(which.max()) + 1, 2, dtype=torch.float64)
    sums.index_add_(0, which, torch.stack([top, bottom], 1))
    top, bottom = torch.cat([sums.sum(0)[None], sums.sum(0) - sums]).T
    return top / bottom

def jackknife(without):
    """Estimates (G, ...), each without one of G groups -> standard error (Efron 1981); nan for
    one."""
    without = np.asarray(without, float)
    with np.errstate(invalid="ignore"):  # of infinite ones
        error = without.std(0) * math.sqrt(len(without) - 1)
    return error if len(without) > 1 else error * math.nan

def estimates(**values):
    """{name: any function of what `leave_one_out` gave} -> {name, name_se: over documents}; and
    `replicates`, the estimates without each of them, with which two results can be compared."""
    out = {name: v[0].item() for name, v in values.items()}
    out |= {name + "_se": float(jackknife(v[1:])) for name, v in values.items()}
    return out | {"replicates": {name: v[1:].tolist() for name, v in values.items()}}

def joined(a, b):
    """Two results as one."""
    return a | b | {"replicates": a["replicates"] | b["replicates"]}

def pick(result, *keys):
    """Those entries of a dict, as far as it has them."""
    return {key: result[key] for key in keys if key in result}


# --------------------------------------------------------------------------------------------------
# Reconstruction, section 2.1; memorisation, density and positions, appendix.

def squared_errors(sae, x, code=None):
    """Raw x (..., d) -> (...) each: squared error, norm of û over that of u (inf or nan where
    that is 0), active latents."""
    parts = []
    for u, values, indices in codes(sae, x, code):
        u_hat = sae.decode(values, indices)
        ratio = u_hat.norm(dim=1) / u.norm(dim=1)
        parts.append(((u - u_hat).square().sum(1), ratio, (values > 0).sum(1)))
    return [torch.cat(part).double().view(x.shape[:-1]) for part in zip(*parts)]

def by_chunk(x, function):
    """function of raw x (..., d), some at a time -> (...) float64."""
    parts = [function(chunk).double() for chunk in x.flatten(0, -2).split(CHUNK)]
    return torch.cat(parts).view(x.shape[:-1])

def spread(x, unit=None):
    """Of raw x (..., d), normalised by unit(x)[0] if given: squared distances from their mean
    (...), over which errors are an NMSE."""
    of = (lambda part: unit(part)[0].double()) if unit else torch.Tensor.double
    mean = sum(of(part).sum(0) for part in x.flatten(0, -2).split(CHUNK)) / math.prod(x.shape[:-1])
    return by_chunk(x, lambda part: (of(part) - mean).square().sum(1)).clamp_min(1e-30)

def half_explained(result):
    """A line for the table where it is less."""
    if result["nmse"] <= 0.5:
        return []
    found = result.get("otherwise", {"as they are": 1.0})
    better = {name: v for name, v in found.items() if v < min(0.5, 0.8 * found["as they are"])}
    why = "is it of these activations (model, layer, site), and scaled as they are?"
    for name in sorted(better, key=better.get)[:1]:
        why = f"on {name} its NMSE is {better[name]:.4f}: it was trained on such"
    return [f"    it explains less than half of the variance: {why}"]

def otherwise(sae, x):
    """{another way to scale x (..., d): the NMSE with that}, for one that explains little."""
    size = x.float().norm(dim=-1).mean()
    u, root = normalize(x.float())[0], math.sqrt(x.shape[-1])
    ways = {"raw activations": x, "activations normalised to norm 1": u,
            "activations normalised to norm sqrt(d - 1)": u * math.sqrt(x.shape[-1] - 1),
            "activations of a mean norm of 1": x / size,
            "activations of a mean norm of sqrt(d)": x * root / size}
    ways.pop("activations normalised to norm 1" if sae.normalized else "raw activations")
    plain = copy.copy(sae)
    plain.normalized = False
    found = {name: reconstruction(plain, way.to(sae.W_dec))["nmse"] for name, way in ways.items()}
    return found | {"as they are": reconstruction(sae, x)["nmse"]}

def with_doubts(c):
    """Case -> `reconstruction`; if that is bad, `otherwise` too."""
    result = reconstruction(c.sae, c.val, document=c.document)
    return result | ({"otherwise": otherwise(c.sae, c.val[:64])} if result["nmse"] > 0.5 else {})

@metric(with_doubts, quick=True, notes=half_explained, rows=[
    ("nmse", "NMSE, held-out"), ("nmse_raw", "the same, before normalisation"),
    ("l0", "L0", "latents/token"), ("norm_ratio", "norm of reconstruction / input")])
def reconstruction(sae, x, code=None, document=None):
    """Raw x (N, d) or (contexts, T, d) -> nmse (squared error over that of always predicting the
    mean, both normalised if the autoencoder's inputs are, and then nmse_raw without), l0 (active
    latents a token), norm_ratio (of reconstruction over input). code: u -> (values, indices), or
    sae.encode. document: as in `leave_one_out`."""
    x = x.reshape(len(x), -1, x.shape[-1])
    of = partial(leave_one_out, document)
    errors, ratios, active = squared_errors(sae, x, code)
    found = {"nmse": of(errors.mean(1), spread(x, sae.unit).mean(1))}
    if sae.normalized:
        norm = by_chunk(x, lambda part: sae.unit(part)[2][:, 0])
        found["nmse_raw"] = of((errors * norm.square()).mean(1), spread(x).mean(1))
    defined = ratios.isfinite().double()
    ratio = of(ratios.where(defined > 0, 0.0).mean(1), defined.mean(1))
    found |= {"l0": of(active.mean(1)), "norm_ratio": ratio}
    return estimates(**found) | {"tokens": math.prod(x.shape[:-1])}

@metric(lambda c: denoise(c.sae, c.val[: c.few], document=c.document), rows=[
    ("nmse", "NMSE against the clean input, noise {}"),
    ("agreement", "share of its active set, noise {}")])
def denoise(sae, x, at=(0.1, 0.3, 1.0), document=None, seed=0):
    """Gaussian noise on x (contexts, T, d), its norm `at` times that of the (centred) input: nmse
    against the clean input, and agreement, active latents in both over those in either (means over
    tokens): lists. document: as in `leave_one_out`."""
    gen, parts, distances = torch.Generator().manual_seed(seed), [], spread(x, sae.unit).mean(1)
    active = lambda values, indices: indices.where(values > 0, -1)
    for part in x.flatten(0, -2).split(CHUNK):
        u, mean, norm = sae.unit(part)
        clean, part = active(*sae.encode(u)), part.to(u)
        noise = torch.randn(part.shape, generator=gen).to(u) * part.shape[1] ** -0.5
        for sigma in at:
            noisy, its_mean, its_norm = sae.unit(part + sigma * noise * normalize(part)[2])
            code = sae.encode(noisy)
            back = (sae.decode(*code) * its_norm + its_mean - mean) / (norm + (norm == 0))
            row = torch.cat([clean, active(*code)], 1).sort(1).values
            both = ((row[:, 1:] == row[:, :-1]) & (row[:, 1:] >= 0)).sum(1)
            shared = both / ((row >= 0).sum(1) - both).clamp_min(1)
            parts.append(torch.stack([(u - back).square().sum(1), shared]).double())  # (2, B)
    by_sigma = [torch.cat(parts[i :: len(at)], 1) for i in range(len(at))]  # (2, contexts T) each
    of = partial(leave_one_out, document)
    found = [estimates(nmse=of(error, distances), agreement=of(shared))
             for error, shared in (pair.view(2, *x.shape[:2]).mean(2) for pair in by_sigma)]
    out = {"at": list(at), "tokens": len(x) * x.shape[1]}
    keys = "nmse", "nmse_se", "agreement", "agreement_se"
    return out | {key: [result[key] for result in found] for key in keys}

@metric(lambda c: memorization(c.sae, *c.trained_and_kept), quick=True, needs=("trained_on",),
    rows=[("nmse_train", "NMSE, contexts trained on"),
          ("nmse_kept", "NMSE, kept back between these"), ("gap", "kept back less trained on")])
def memorization(sae, train, kept, document=None):
    """NMSE on contexts that were trained on and on such of the same documents as were not, x
    (contexts, T, d) each: a gap that grows with n. document: of all, those trained on first."""
    x = torch.cat([train, kept])
    errors, distances = squared_errors(sae, x)[0].mean(1), spread(x, sae.unit).mean(1)
    first = (torch.arange(len(x)) < len(train)).to(errors)
    a, b = (leave_one_out(document, errors * w, distances * w) for w in (first, 1 - first))
    found = estimates(nmse_train=a, nmse_kept=b, gap=b - a)
    return found | {"tokens": math.prod(x.shape[:-1])}

def latent_sums(sae, x):
    """Raw x (..., d) -> (n) each: how many tokens a latent fires on, the sum of its z^2 there."""
    counts = torch.zeros(sae.n_latents, dtype=torch.double, device=sae.W_dec.device)
    squares = torch.zeros_like(counts)
    for _, values, indices in codes(sae, x):
        counts.index_add_(0, indices.flatten(), (values > 0).flatten().double())
        squares.index_add_(0, indices.flatten(), values.square().flatten().double())
    return counts, squares

@metric(lambda c: density(c.sae, c.val.flatten(0, 1)), quick=True, unit="of n",
    page=lambda r: {"plots": pick(r, "log10_density", "log10_mean_square")}, rows=[
    ("silent", "latents silent on held-out text"), ("rare", "latents firing on < 1e-4 of tokens"),
    ("densest", "densest latent", "of tokens")])
def density(sae, x, rare=1e-4):
    """Fractions of latents that never fire on x (N, d), or on fewer than `rare` of its tokens; and
    histograms over those that fire, of log10 of E[1(z > 0)] and E[z^2]."""
    x = x.flatten(0, -2)
    share, mean_square = (sums / len(x) for sums in latent_sums(sae, x))
    fraction = lambda which: which.double().mean().item()
    out = {"silent": fraction(share == 0)}
    out |= {"rare": fraction(share < rare)} if len(x) * rare >= 1 else {}
    edges = np.arange(-12, 4.01, 0.25)
    for name, v in (("log10_density", share), ("log10_mean_square", mean_square)):
        counts = np.histogram(v[share > 0].log10().clamp(-12, 4).cpu(), edges)[0]
        out[name] = {"edges": edges.tolist(), "counts": counts.tolist()}
    return out | {"densest": share.max().item(), "tokens": len(x)}

DENSE = "antipodality", "position", "rank_position", "first_token", "repetition"

def dense_note(row):
    """A row of `dense_latents` as a line of the table."""
    told = [f"{name.replace('_', ' ')} {row[name]:+.2f}" for name in DENSE if name in row]
    return "    latent {latent}: fires on {density:.1%}; ".format(**row) + ", ".join(told)

def ranks(v):
    """v (N, m) -> ranks in each column, equal values sharing their mean rank."""
    out = []
    for column in v.T:
        _, which, counts = column.unique(return_inverse=True, return_counts=True)
        out.append((counts.cumsum(0) - (counts - 1) / 2)[which].double())
    return torch.stack(out, 1)

@metric(lambda c: dense_latents(c.sae, c.in_contexts, c.words), quick=True,
    notes=lambda r: list(map(dense_note, r["densest"][:5])),
    page=lambda r: {"dense": [[row.get(name) for name in ("latent", "density", *DENSE)]
                              for row in r["densest"]]})
def dense_latents(sae, x, tokens=None, top=10):
    """The `top` densest latents on x (contexts, T, d): antipodality, the largest product of cosines
    of encoder and decoder with another latent (arXiv 2506.15679; of a pair of opposites 1); the
    correlation of the activation with position, that of the ranks (Spearman), with being first (if
    T > 1) and, with tokens (contexts, T), with repetition (the token was there earlier)."""
    C, T = x.shape[:2]
    share = latent_sums(sae, x)[0] / (C * T)
    latents = share.topk(min(top, sae.n_latents)).indices
    of = lambda values, indices: torch.stack([(values * (indices == i)).sum(1) for i in latents], 1)
    z = torch.cat([of(*code) for _, *code in codes(sae, x)]).double().cpu()  # (C T, top)
    at = torch.arange(T).expand(C, T)
    facts = {"position": at, "first_token": at == 0} if T > 1 else {}
    if tokens is not None:
        facts["repetition"] = (tokens[:, :, None] == tokens[:, None, :]).tril(-1).any(2).cpu()
    score = lambda v: (v - v.mean(0)) / v.std(0).clamp_min(1e-12)
    correlation = lambda z, v: (score(z).T @ score(v) / (len(z) - 1))[:, 0].tolist()
    column = lambda fact: fact.reshape(-1, 1).double()
    cosines = [F.normalize(W[latents], dim=1) @ F.normalize(W, dim=1).T
               for W in (sae.W_enc, sae.W_dec)]  # (top, n) each
    others = torch.arange(sae.n_latents).to(latents) != latents[:, None]
    pairs = (cosines[0] * cosines[1]).where(others, -1.0).amax(1)
    found = {"latent": latents.tolist(), "density": share[latents].tolist(),
             "antipodality": pairs.tolist()}
    found |= {name: correlation(z, column(fact)) for name, fact in facts.items()}
    found |= {"rank_position": correlation(ranks(z), ranks(column(at)))} if T > 1 else {}
    return {"densest": [dict(zip(found, row)) for row in zip(*found.values())], "tokens": len(z)}

@metric(lambda c: positions(c.sae, c.val, c.document), quick=True, needs=("contexts",),
    of="contexts",
    page=lambda r: {"plots": {"positions": pick(r, "nmse", "norm")}}, rows=[
    ("nmse_first", "NMSE, first position"), ("nmse_later", "NMSE, later positions"),
    ("norm_first", "norm of the input, first position"),
    ("norm_later", "norm of the input, later positions")])
def positions(sae, x, document=None):
    """x (contexts, T, d) -> nmse (mean: as `reconstruction`) and norm: lists over T, first, later.
    document: as in `leave_one_out`."""
    errors, distances = squared_errors(sae, x)[0], spread(x, sae.unit).mean(1)
    norm = x.to(errors.device).float().norm(dim=2).double()
    found, of = {}, partial(leave_one_out, document)
    for name, v, over in (("nmse", errors, distances), ("norm", norm, None)):
        found |= {name + "_first": of(v[:, 0], over), name + "_later": of(v[:, 1:].mean(1), over)}
    lists = {"nmse": (errors.mean(0) / distances.mean()).tolist(), "norm": norm.mean(0).tolist()}
    return estimates(**found) | lists | {"contexts": len(x)}


# --------------------------------------------------------------------------------------------------
# Downstream loss, section 4.1: what the model loses when it goes on with the reconstruction.

def compute_equivalent(curve, delta_ce):
    """The share of the model's training compute at which its own loss was `delta_ce` nats above its
    final one: (share, how); None and why where the curve, a list of {"flops", "loss"}, does not
    reach. Its points must be finished models, as `stdlib`'s are (`harvest.fit_lm`): along one run
    whose rate decays to the end it reads too high. Interpolated in log FLOPs, which is our way."""
    if not curve:
        return None, "no loss-against-compute curve for this model"
    if delta_ce <= 0:
        return 1.0, "loss not increased"
    flops, loss = np.array([(p["flops"], p["loss"]) for p in curve], float).T
    loss = np.minimum.accumulate(loss)
    if (target := loss[-1] + delta_ce) > loss[0]:
        return None, "worse than the model at the first point of its curve"
    reached = np.exp(np.interp(-target, -loss, np.log(flops)))
    return float(reached / flops[-1]), f"{len(curve)} points"

@torch.no_grad()
def patched_losses(site, tokens, edits, label="downstream"):
    """Cross-entropy of the model on tokens (C, T), as it is and with each of `edits` in place:
    {name: a function on activations (B, T, d), or a tensor (C, T, d) of replacements}. -> "ce", and
    for each edit "ce_NAME", "delta_NAME", "kl_NAME" (original || patched), (C): nats per token."""
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

@metric(lambda c: downstream(c.sae, c.site, c.chosen, c.val.mean((0, 1)), c.document),
    quick=True, needs=("model",), unit="nats/token", rows=[
    ("ce", "CE of the model itself"), ("ce_sae", "CE with the reconstruction"), ("delta_ce", "ΔCE"),
    ("kl", "KL(original || patched)"),
    ("ce_mean", "CE, mean ablation"), ("ce_zero", "CE, zero ablation"),
    ("recovered_mean", "loss recovered against mean ablation", ""),
    ("recovered_zero", "loss recovered against zero ablation", ""),
    ("compute_equivalent", "compute-equivalent", "of training")])
def downstream(sae, site, tokens, mean=None, document=None):
    """Losses (nats a token) of the model on tokens (C, T) with each activation replaced by its
    reconstruction, zero, or mean (d; default: over `tokens`). sae: an SAE, or a function from
    activations (B, T, d) to their replacement. recovered_X: (CE_X - CE_sae) / (CE_X - CE), which X
    = zero flatters. compute_equivalent may be None: see its _why. document: as `leave_one_out`."""
    if mean is None:
        mean = site.acts(tokens).flatten(0, 1).mean(0)
    edits = {"sae": sae, "zero": torch.zeros_like, "mean": lambda a: mean.to(a).expand_as(a)}
    per, of = patched_losses(site, tokens, edits), partial(leave_one_out, document)
    found = {name: of(per[name]) for name in ("ce", "ce_sae", "ce_zero", "ce_mean")}
    found |= {"delta_ce": of(per["delta_sae"]), "kl": of(per["kl_sae"])}
    for name in ("zero", "mean"):
        found["recovered_" + name] = 1 - of(per["delta_sae"], per["delta_" + name])
    shares = [compute_equivalent(site.model.curve, delta) for delta in found["delta_ce"].tolist()]
    known = [math.nan if share is None else share for share, _ in shares]
    found["compute_equivalent"] = torch.tensor(known, dtype=torch.float64)
    share, why = shares[0]
    return estimates(**found) | {"compute_equivalent": share, "compute_equivalent_why": why,
                                 "contexts": len(tokens),
                                 "tokens": len(tokens) * (tokens.shape[1] - 1)}


# --------------------------------------------------------------------------------------------------
# Shrinkage, section 5.1: with decoder and support fixed, are the encoder's activations the best?

def nnls(G, h, z0, sweeps=20):
    """Batched argmin over z >= 0 of z'Gz / 2 - h'z, G (B, k, k) positive definite, h, z0 (B, k) ->
    z (B, k). Block principal pivoting (Kim and Park 2011): all coordinates of the wrong sign change
    sides at once. Rows not done after so many sweeps (k near or above G's rank) go downhill from z0
    by Lawson and Hanson's active set (1974), which ends."""
    k = h.shape[1]
    eye = torch.eye(k).to(h)
    tol = 1e-10 * (h.abs() + z0).amax(1, keepdim=True)
    z, free, left = z0.clone(), h > 0, torch.arange(len(h), device=h.device)
    def solve(on):
        G_, h_ = G[left], h[left]
        inside = torch.where(on[:, :, None] & on[:, None, :], G_, eye)
        best = torch.linalg.solve(inside, (h_ * on)[:, :, None])
        return best[:, :, 0], (G_ @ best)[:, :, 0] - h_
    for _ in range(sweeps):
        on = free[left]
        best, slope = solve(on)
        wrong = torch.where(on, best, slope) < -tol[left]
        free[left] = on ^ wrong
        done = ~wrong.any(1)
        z[left[done]] = best[done].clamp_min(0)
        left = left[~done]
        if not len(left):
            return z
    free[left] = z[left] > 0
    for _ in range(30 * k):
        on, now = free[left], z[left]
        best, slope = solve(on)
        share = torch.where(best < 0, now / (now - best), 1)  # of the way on which z stays >= 0
        step = share.amin(1, keepdim=True)
        on &= (best >= 0) | (share > step)
        z[left] = torch.where(on, (now + step * (best - now)).clamp_min(0), 0)
        steepest, j = torch.where(on, 0, slope).min(1)
        arrived = step[:, 0] == 1
        enters = arrived & (steepest < -tol[left, 0])
        on[enters, j[enters]] = True
        free[left] = on
        left = left[~arrived | enters]
        if not len(left):
            break
    return z

def refit(W, v, z, ridge):
    """The z (B, k) >= 0 that explain v (B, d) best by rows W (B, k, d), where z > 0 before."""
    on = z > 0
    G = (W @ W.mT) * (on[:, :, None] & on[:, None, :]) + torch.diag_embed(ridge + (~on).double())
    h = ((W @ v[:, :, None])[:, :, 0] + ridge * z) * on
    return nnls(G, h, z)

@metric(lambda c: refinement(c.sae, c.val[: c.few], document=c.document), rows=[
    ("ratio", "refined / original activations"),
    ("ratio_median", "the same, median of single ones"),
    ("nmse_refined", "NMSE after refinement"), ("gain", "share of the error that it removes")])
def refinement(sae, x, ridge=1e-9, document=None):
    """Refit the active values of each token of x (contexts, T, d), z >= 0, decoder and support
    fixed, exactly. ratio: sum of the refined over the sum of the original ones (above 1: they were
    shrunk); ratio_median: the median of single ones; nmse, nmse_refined. The tiny ridge, towards
    the original values, only decides where active decoder rows are linearly dependent. document:
    as in `leave_one_out`."""
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
    distances, of = spread(x, sae.unit).mean(1), partial(leave_one_out, document)
    out = estimates(ratio=of(refined, original), nmse=of(before, distances),
                    nmse_refined=of(after, distances), gain=1 - of(after, before))
    return out | {"ratio_median": ratios.median().item(), "ratio_mean": ratios.mean().item(),
                  "tokens": x.shape[0] * x.shape[1]}


# --------------------------------------------------------------------------------------------------
# Other codes of the same autoencoder, section 5.3: another k, a threshold.

def other_codes(sae, site, tokens, x, encoders, label, document):
    """{name: function u -> (values, indices)} -> {name: its NMSE and L0 on x, ΔCE on tokens}, that
    if there is a site."""
    found = {name: reconstruction(sae, x, f, document) for name, f in encoders.items()}
    if site:
        edits = {str(name): partial(reconstructed, sae, code=f) for name, f in encoders.items()}
        per = patched_losses(site, tokens, edits, label)
        for name in found:
            delta = estimates(delta_ce=leave_one_out(document, per[f"delta_{name}"]))
            found[name] = joined(found[name], delta | {"contexts": len(tokens)})
    return found

@metric(lambda c: test_time_k(c.sae, c.site, c.chosen[:256], c.val[: c.few], c.k, c.document),
    page=lambda r: {"plots": {"test_time_k": pick(r, "at", "nmse", "delta_ce")}}, rows=[
    ("nmse", "NMSE at k' = {}"), ("delta_ce", "ΔCE at k' = {}", "nats/token", "contexts")])
def test_time_k(sae, site, tokens, x, k=None, document=None):
    """NMSE on x (contexts, T, d) and ΔCE on tokens (C, T) at k' = 1, 2, 4, ... 4k active latents:
    lists, beside `at`, the k'. k: default sae.k; for a ReLU autoencoder give its mean L0. document:
    as in `leave_one_out`, where x and tokens begin with the same contexts."""
    k = k or sae.k
    powers = [2**i for i in range(int(math.log2(4 * k)) + 1)]
    at = sorted({min(k_, sae.n_latents) for k_ in (*powers, k, 4 * k)})
    encoders = {k_: partial(sae.encode, k=k_) for k_ in at}
    found = other_codes(sae, site, tokens, x, encoders, "test-time k", document)
    collect = lambda results, *keys: {key: [r[key] for r in results] for key in keys
                                      if key in results[0]}
    results, sizes = list(found.values()), pick(found[at[0]], "tokens", "contexts")
    lists = collect(results, "nmse", "nmse_se", "delta_ce", "delta_ce_se")
    replicates = collect([r["replicates"] for r in results], "nmse", "delta_ce")
    return {"at": at} | lists | sizes | {"replicates": replicates}

def calibrate_threshold(sae, x):
    """θ at which the mean L0 of J_θ on raw x (..., d) is k. Exact."""
    width = min(4 * sae.k, sae.n_latents)
    while True:
        parts = [values for _, values, _ in codes(sae, x, partial(sae.encode, k=width))]
        widest = max(v.shape[1] for v in parts)  # with width = n they may differ
        values = torch.cat([F.pad(v, (0, widest - v.shape[1])) for v in parts])
        rank = values.numel() - sae.k * len(values)
        between = (values.flatten().kthvalue(rank + i).values.item() for i in (0, 1))
        theta = sum(between) / 2 if rank > 0 else 0.0
        if width == sae.n_latents or theta >= values.amin(1).max():  # no row was cut short
            return theta
        width = min(2 * width, sae.n_latents)

@metric(lambda c: fixed_threshold(c.sae, c.site, c.chosen, c.more[: c.few], c.val, c.document),
    needs=("more",), rows=[
    ("l0", "L0 at a fixed threshold", "latents/token"), ("nmse", "NMSE at a fixed threshold"),
    ("delta_ce", "ΔCE at a fixed threshold", "nats/token", "contexts")])
def fixed_threshold(sae, site, tokens, train, x, document=None):
    """One threshold for all tokens in place of TopK, calibrated on `train`: realised L0 and NMSE on
    the held-out x (both (contexts, T, d)), ΔCE on tokens (C, T). Raises UserError where k = n.
    document: as in `test_time_k`."""
    if sae.k == sae.n_latents:
        kind = activation_name(sae)
        raise UserError(f"a {kind} autoencoder has no k to calibrate a threshold for")
    theta = calibrate_threshold(sae, train)
    encoders = {"theta": thresholded(sae, sae.W_enc, sae.b_enc, theta).encode}
    found = other_codes(sae, site, tokens, x, encoders, "fixed threshold", document)
    return found["theta"] | {"theta": theta}


# --------------------------------------------------------------------------------------------------
# Probe loss, section 4.2: how well does the best single latent tell a known feature?

def logistic_loss(t, sign):
    """-log σ of the margins sign * t, averaged over the first dimension."""
    return F.softplus(-sign * t).mean(0)

def newton_logistic(z, y, steps=100, tol=1e-9):
    """The m logistic regressions of y (N) in {0, 1} on single columns of z (N, m), by Newton's
    method -> loss (m), mean nats, within 1e-6 of the optimum, and w, b (m) of the probe σ(w z + b):
    finite if separable, w = 0 if constant. ValueError unless y has both classes."""
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
    w, b = torch.zeros_like(scale), torch.logit(y.mean()).expand_as(scale)
    loss = logistic_loss(x * w + b, sign)
    for _ in range(steps):
        p = torch.sigmoid(-sign * (x * w + b))  # (N, m), the probability of being wrong
        g, h = -sign * p, p * (1 - p)
        h_b = h.mean(0).clamp_min(1e-30)
        c = (h * x).mean(0) / h_b
        x_c = x - c  # centred by the weights h: the 2 x 2 Hessian is diagonal
        h_w = (h * x_c.square()).mean(0).clamp_min(1e-30)
        g_w, g_b = (g * x_c).mean(0), g.mean(0)
        d_w, d_b = torch.where(constant, 0.0, g_w / h_w), g_b / h_b
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
        pairs = ((new_w, w), (new_b, b), (new, loss))
        w, b, loss = (torch.where(better, after, before) for after, before in pairs)
        if not better.any():  # down to rounding
            break
    w = w / scale
    return loss, w, b - w * center

def best_probe(features, width, y, fit, rest):
    """The best probe of y on `width` features (slice -> (N, m)), fitted on examples `fit`: its loss
    there, and `held_out`, its loss on the others, where it is no surer than 1 in 2 len(fit): one
    that separates them would be as sure as one likes."""
    best, m, most = {"loss": math.inf}, max(1, 2**21 // len(fit)), math.log(2 * len(fit))
    for start in range(0, width, m):
        z = features(slice(start, start + m)).float()
        loss, w, b = newton_logistic(z[fit], y[fit])
        i = int(loss.argmin())
        if loss[i] < best["loss"]:
            margin = (z[rest, i] * w[i] + b[i]).clamp(-most, most)
            held_out = logistic_loss(margin, 2 * y[rest] - 1.0).item()
            best = {"loss": loss[i].item(), "held_out": held_out, "index": start + i}
    return best

def probe_rows(result):
    """Of each task: its name, held-out loss of the best latent and channel, and of the majority."""
    return [[name, t["latent"]["held_out"], t["channel"]["held_out"], t["majority"]]
            for name, t in result["per_task"].items()]

@metric(lambda c: probes(c.sae, text_tasks(c.sae, c.site, c.encoding, c.texts, c.where["context"])
    if c.texts else token_tasks(c.sae, c.val, c.val_tokens, c.encoding)),
    depends=("probes",), needs=("model",), unit="nats", of="tasks",
    notes=lambda r: ["    {:<28} latent {:.4f}  channel {:.4f}  majority {:.4f}".format(*row)
                     for row in probe_rows(r)],
    page=lambda r: {"tasks": probe_rows(r)}, rows=[
    (key, "probe loss, " + label) for key, label in (
        ("held_out", "latent, on the other half"), ("loss", "latent, on the half fitted"),
        ("channel_held_out", "channel, on the other half"), ("majority", "majority"))])
def probes(sae, tasks, seed=0):
    """tasks: yields (name, raw x (N, d), u (N, d) as the autoencoder sees it, y (N) in {0, 1}). The
    latent with the best probe (on pre-activations) is chosen, with that probe, on one half of the
    examples: `loss` there (the paper's, an optimistic minimum), `held_out`, the loss of the same
    probe on the other half, which it has not seen; likewise channels of x; `majority` predicts the
    share of positives. Means over tasks; UserError where there is none."""
    per_task = {}
    for name, x, u, y in tasks:
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        order = order[y.cpu()[order].sort(stable=True).indices].to(u.device)  # by class
        fit, rest = order[::2], order[1::2]
        v = u - sae.b_pre
        latents = lambda s: F.linear(v, sae.W_enc[s], sae.b_enc[s])
        majority = logistic_loss(torch.logit(y[fit].float().mean()), 2 * y[rest] - 1.0)
        per_task[name] = {"examples": len(y), "positive": y.float().mean().item(),
                          "latent": best_probe(latents, sae.n_latents, y, fit, rest),
                          "channel": best_probe(lambda s: x[:, s], x.shape[1], y, fit, rest),
                          "majority": majority.item()}
    if not per_task:
        raise UserError("no probe task has enough examples here; evaluate on more --tokens")
    means_of = {prefix + key: [task[kind][key] for task in per_task.values()]
                for kind, prefix in (("latent", ""), ("channel", "channel_"))
                for key in ("loss", "held_out")}
    means_of["majority"] = [task["majority"] for task in per_task.values()]
    return {"tasks": len(per_task), "per_task": per_task} | means(**means_of)

def token_labels(tokens, encoding, phrases=4):
    """Built-in tasks on tokens (C, T): {name: labels (C, T), 1 or 0, or -1 where it does not ask}:
    spelling, place, and whether a phrase, one of `phrases`, ends here, where its second word stands
    without its first or something else follows the first (as many of these as of those at most)."""
    bytes_of = encoding.decode_single_token_bytes
    words = [bytes_of(i).decode("utf-8", "replace") for i in range(encoding.n_vocab)]
    bare = [w.strip() for w in words]
    spelling = {"leading space": [w.startswith(" ") for w in words],
                "contains a digit": [any(c.isdigit() for c in w) for w in words],
                "all digits": [w.isdigit() for w in bare],
                "leading capital": [w[:1].isupper() for w in bare],
                "all capitals": [len(w) > 1 and w.isalpha() and w.isupper() for w in bare],
                "no alphanumeric": [not any(c.isalnum() for c in w) for w in words]}
    C, T = tokens.shape
    labels = {name: torch.tensor(of)[tokens].long() for name, of in spelling.items()}
    if labels["all digits"].equal(labels["contains a digit"]):  # digits are never mixed with others
        del labels["all digits"]
    labels["first half of the context"] = (torch.arange(T) < T // 2).long().expand(C, T)
    before = torch.cat([torch.full((C, 1), -1), tokens[:, :-1]], 1)
    newline = torch.tensor(["\n" in w for w in words])[before].long()
    labels["follows a newline"] = newline.where(before >= 0, -1)
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
            begun, ended = before == first, (tokens == second) & (before >= 0)
            alone, broken = ended & ~begun, begun & ~ended
            spare = broken & (broken.flatten().cumsum(0).view(C, T) > alone.sum())
            asked = (ended | broken) & ~spare
            labels[f"phrase {bare[first]} {bare[second]}"] = (begun & ended).long().where(asked, -1)
    return labels

def token_tasks(sae, x, tokens, encoding, most=2048, least=64, seed=0):
    """Yield for `probes` the built-in tasks on activations x (C, T, d) of tokens (C, T): as many
    positive as negative examples, `most` of each at most; tasks with fewer than `least` not."""
    for name, y in token_labels(tokens.cpu(), encoding).items():
        gen = torch.Generator().manual_seed(seed)  # one for both
        sides = [(y.flatten() == value).nonzero().flatten() for value in (0, 1)]
        size = min(most, *map(len, sides))
        if size >= least:
            orders = [torch.randperm(len(side), generator=gen)[:size] for side in sides]
            picked = torch.cat([side[order] for side, order in zip(sides, orders)])
            some = x.flatten(0, 1)[picked.to(x.device)].to(sae.W_dec)
            yield name, some, sae.unit(some)[0], y.flatten()[picked].to(some.device)

def read_tasks(folder):
    """Folder of NAME.jsonl -> {NAME: (texts, labels)}. Raises UserError naming file and line."""
    form = '{"text": "...", "label": 0 or 1}'
    files = sorted(Path(folder).glob("*.jsonl"))
    if not files:
        raise UserError(f"{folder} holds no NAME.jsonl; each line of one is {form}")
    tasks = {}
    for file in files:
        texts, labels = [], []
        text = file.read_text("utf-8-sig", "replace").split("\n")
        for number, line in enumerate(harvest.legible(text, file), 1):
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
            texts.append(text)
            labels.append(int(label))
        if min(no := labels.count(0), yes := labels.count(1)) < 2:
            have = f"{no} examples of class 0 and {yes} of class 1"
            raise UserError(f"{file}: {have}; a probe needs at least two of each")
        tasks[file.stem] = texts, labels
    return tasks

def text_tasks(sae, site, encoding, tasks, length=64, batch=256):
    """Yield for `probes` tasks {name: (texts, labels)}: a text's features are means over its
    tokens, in contexts of `length` (the mean pre-activation is that of the mean input); those of
    tasks called phrase_... stand at the last token."""
    for name, (texts, labels) in tasks.items():
        rows, at_the_end = [], name.startswith("phrase_")
        for i, ids in enumerate(encoding.encode_ordinary_batch(texts)):
            ids = ids[-length:] if at_the_end else ids
            rows += [(i, ids[j : j + length]) for j in range(0, len(ids), length)]
        rows.sort(key=lambda row: len(row[1]))
        widths = [sae.d_model, sae.d_model, 1]
        sums = torch.zeros(len(texts), sum(widths), device=site.device, dtype=sae.W_dec.dtype)
        for part in chunks(len(rows), batch, f"probes {name}", " contexts"):
            owners, ids = zip(*rows[part])
            tokens, lengths = pad_right(ids)
            at, lengths = torch.arange(tokens.shape[1])[None], lengths[:, None]
            here = at == lengths - 1 if at_the_end else at < lengths
            acts = site.acts(tokens).to(sums)[here.to(sums.device)]
            owner = torch.tensor(owners).repeat_interleave(here.sum(1)).to(sums.device)
            more = torch.cat([acts, sae.unit(acts)[0], torch.ones_like(acts[:, :1])], 1)
            sums.index_add_(0, owner, more)
        x, u, count = sums.split(widths, 1)
        yield name, x / count, u / count, torch.tensor(labels, device=sums.device)

def pad_right(sequences):
    """Lists of ids -> (tokens (B, longest), lengths (B)). A causal model sees no padding."""
    rows = [torch.tensor(ids) for ids in sequences]
    lengths = torch.tensor([len(row) for row in rows])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


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
        signs = {WILDCARD: "*", START: "^"}
        quoted = lambda text: json.dumps(text, ensure_ascii=False).replace("\\\\", "\\")
        lines = []
        for pattern, act in sorted(self.patterns, key=lambda p: -p[1]):
            shown = []
            for exact, ids in itertools.groupby(pattern, lambda t: t >= 0):
                shown += map(quoted, spell(ids, encoding)) if exact else [signs[t] for t in ids]
            lines.append(f"{' '.join(shown)}  ({act:.3f})")
        return lines

def spell(ids, encoding):
    """Token ids -> their texts, parts of a character joined; bytes that make up none as \\xNN."""
    texts, part = [], b""
    for i in ids:
        part += encoding.decode_single_token_bytes(i)
        try:
            part.decode()
        except UnicodeDecodeError as e:
            if e.reason == "unexpected end of data":
                continue
        texts, part = [*texts, part], b""
    return [text.decode("utf-8", "backslashreplace") for text in (*texts, part) if text]

def insert(trie, pattern):
    """The node of a trie that `pattern` leads to, made if it is not there."""
    for token in reversed(pattern):
        trie = trie.setdefault(token, {})
    return trie

def matches(trie, tokens, t):
    """What stands at END of every pattern in the trie that ends at position t: the exact token
    before the wildcard (unlike the released code, also after a dead end), longer before shorter."""
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
    """One example, cut after the token it fires on. A generator: yields lists of token-id lists, is
    sent the activation on the last token of each, returns (pattern, activation), or None if 0."""
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
    """Run {key: generator that yields lists of questions} at once, so that their questions reach
    the model in full batches -> {key: what each returned}. ask: [(key, question)] -> answers."""
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
    """asked: [((latent, example), ids)] -> [its activation on the last token]; equal ids run
    once."""
    order = sorted({tuple(tokens) for _, tokens in asked}, key=len)
    place = {tokens: i for i, tokens in enumerate(order)}
    latent = torch.tensor([key[0] for key, _ in asked])
    row, by_row = torch.tensor([place[tuple(tokens)] for _, tokens in asked]).sort(stable=True)
    answers = torch.zeros(len(asked))
    start = 0
    while start < len(order):
        most = batch_tokens // len(order[start])
        longest = len(order[min(start + most, len(order)) - 1])
        end = start + max(1, batch_tokens // longest)
        tokens, lengths = pad_right(order[start:end])
        acts = site.acts(tokens, len(tokens))[torch.arange(len(tokens)), lengths - 1]
        values, indices = (c.cpu() for c in sae.encode(sae.unit(acts)[0]))
        some = slice(*torch.searchsorted(row, torch.tensor([start, end])).tolist())
        for r, which in zip(row[some].split(2**16), by_row[some].split(2**16)):
            hits = indices[r - start] == latent[which][:, None]
            answers[which] = (values[r - start] * hits).sum(1).float()
        start = end
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
    T, rows = tokens.shape[1], tokens.tolist()
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
        for t in range(T):
            first = {}  # the first match of each latent counts
            for leaf in matches(trie, rows[part.start], t):
                first |= {i: act for i, act in leaf.items() if i not in first}
            here = [part.start * T + t] * len(first)
            for column, more in zip(found, (first, here, first.values())):
                column.extend(more)
    latent, at, value = (torch.from_numpy(np.array(column)) for column in found)
    return latent[value > 0], at[value > 0], value[value > 0]

def n2g_and_samples(c):
    """Case -> what `n2g` finds, how many latents are explained, and some explanations to read."""
    found = c.explanations
    result = n2g(c.sae, found, c.val_tokens, c.val, c.n_contexts)
    some = np.random.default_rng(0).permutation(sorted(result["per_latent"]))[:5].tolist()
    samples = {i: found[i].readable(c.encoding)[:6] for i in some}
    return result | {"explained": len(found), "unexplained": c.sae.n_latents - len(found),
                     "samples": samples}

@metric(n2g_and_samples, needs=("model", "more"), depends=("latents",), of="latents",
    notes=lambda r: ["    skipped, too few positives: {skipped} of {explained} explained; too few"
                     " to explain: {unexplained} latents".format(**r)] + [
                     f"    latent {i}: {'  '.join(text)}" for i, text in r["samples"].items()],
    page=lambda r: {"n2g": {i: [v["precision"], v["recall"]] for i, v in r["per_latent"].items()}},
    rows=[("recall", "N2G recall"), ("precision", "N2G precision", "", "latents_with_precision")])
def n2g(sae, explanations, tokens, x, contexts=512, examples=16, seed=0):
    """Precision and recall of explanations on other text, tokens (C, T) with activations x (C, T,
    d). recall: share of `examples` random tokens where the latent fires on which this is predicted.
    precision: share of all predictions (if any) in the first `contexts` contexts where it fires.
    Means over latents with standard errors; those with fewer examples are skipped and counted."""
    T, rows = tokens.shape[1], tokens.tolist()
    where = positives(sae, x)
    recall = {}
    for i, e in explanations.items():
        if len(where.get(i, ())) >= examples:
            chosen = some_of(where[i], examples, seed)
            recall[i] = float(np.mean([e.at(rows[p // T], p % T) > 0 for p in chosen]))
    latent, token, _ = simulate({i: explanations[i] for i in recall}, tokens[:contexts])
    truth = torch.cat([latent[:0], *(p + i * tokens.numel() for i, p in where.items())])
    right = torch.isin(latent * tokens.numel() + token, truth).double()
    said = torch.bincount(latent, minlength=sae.n_latents)
    hits = torch.bincount(latent, right, minlength=sae.n_latents)
    precision = {i: (hits[i] / said[i]).item() for i in recall if said[i]}
    per_latent = {i: {"recall": r, "precision": precision.get(i)} for i, r in recall.items()}
    return means(precision=list(precision.values()), recall=list(recall.values())) | {
        "latents": len(recall), "latents_with_precision": len(precision),
        "skipped": len(explanations) - len(recall), "per_latent": per_latent}


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
    products = torch.stack([s * a, s * s]).float()
    sums = torch.zeros(2, sae.n_latents).index_add_(1, latent, products)
    return sums[0] / sums[1].clamp_min(1e-30)

@metric(lambda c: explanation_reconstruction(c.sae, c.site, c.chosen, c.explanations,
    c.more_tokens[: c.n_contexts], c.more[: c.n_contexts],
    c.train and harvest.ngram_losses(c.train.tokens, c.chosen.numpy(), c.site.n_vocab)[1],
    c.document),
    needs=("model", "more"), depends=("latents",), unit="nats/token",
    notes=lambda r: ["    {explained} of {of_latents} latents explained, the others are zero"
                     .format(**r)], rows=[
    ("ce", "CE of the explanations"), ("delta_ce", "ΔCE of the explanations"),
    ("ce_without_latents", "CE with no latent at all"), ("bigram", "CE of a bigram model")])
def explanation_reconstruction(sae, site, tokens, explanations, train_tokens, train, bigram=None,
                               document=None):
    """ΔCE on tokens (C', T) when each latent is replaced by its explanation's prediction s, scaled
    by E[s a] / E[s^2] from training text (train_tokens (C, T), activations train (C, T, d)); zero
    without explanation. bigram: a bigram model's loss, to beat. document: as `leave_one_out`."""
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
    names = {"ce": "ce_explained", "delta_ce": "delta_explained", "ce_without_latents": "ce_b_pre"}
    out = estimates(**{name: leave_one_out(document, per[key]) for name, key in names.items()})
    out |= {"bigram": bigram} if bigram else {}
    return out | {"explained": len(explanations), "of_latents": sae.n_latents,
                  "tokens": len(tokens) * (tokens.shape[1] - 1)}


# --------------------------------------------------------------------------------------------------
# Sparsity of ablation effects, section 4.5.

def effect_sparsity(delta):
    """Differences of logits (..., T, V) -> (...) (L1 / L2)^2 / (V T), less their median over V: the
    share that is moved. 1/(V T) for a single one, 2/π for Gaussian noise, 1 for equal sizes."""
    delta = (delta - delta.median(-1, keepdim=True).values).flatten(-2)
    share = delta.abs().sum(-1).square() / delta.square().sum(-1) / delta.shape[-1]
    return share if share.ndim else share.item()

def take_away(place, part):
    """An edit of (B, T, d): at position place[b], part(activations there (B, d)) is taken away."""
    at = (torch.arange(len(place), device=place.device), place)
    return lambda a: a.index_put(at, a[at] - part(a[at]).to(a))

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

@metric(lambda c: ablation_sparsity(c.sae, c.site, c.chosen, document=c.document), of="samples",
    needs=("model",),
    rows=[
    (kind + where, label, unit) for where, first, unit in (
        ("", "logits moved by ablating a latent", "of V T"),
        ("_first", "at the first position, a latent", "of V T"),
        ("_middle", "in the middle of the context, a latent", "of V T"),
        ("_here", "at its own position alone, a latent", "of V")) for kind, label in (
        ("latents", first), ("channels", "the same, a channel"),
        ("random", "the same, a random direction"))])
def ablation_sparsity(sae, site, tokens, T=16, samples=64, directions=32, seed=0, document=None):
    """The share of the next T positions' logits that ablating one thing at one position moves:
    means over `samples` random places of tokens (C, length), and over the first and the middle
    ones of as many contexts. latents: the contribution of each active one is taken from the
    activation, whose error stays; channels: `directions` random ones are zeroed; random:
    projections on so many directions are taken away. `_here`: of the random places, at that
    position alone. document: as in `leave_one_out`."""
    T = min(T, tokens.shape[1])
    rng, gen = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    found, effects, most = defaultdict(list), 0, tokens.shape[1] - T
    for sample in chunks(3 * samples, 1, "ablation", " positions"):
        context, place = int(rng.integers(len(tokens))), ("", "_first", "_middle")[sample.start % 3]
        own = context if document is None else document[context]
        at = {"": int(rng.integers(most + 1)), "_first": 0, "_middle": most // 2}[place]
        row = tokens[context, : at + T].to(site.device)
        act = site.model.acts(row[None], site.layer, site.name)[0, at].to(sae.W_dec)
        u, _, norm = sae.unit(act[None])
        values, indices = (c[0] for c in sae.encode(u))
        some = torch.randperm(len(act), generator=gen)[:directions].to(act.device)
        lines = F.normalize(torch.randn(directions, len(act), generator=gen), dim=1).to(act)
        parts = {"latents": (sae.W_dec[indices] * values[:, None] * norm)[values > 0],
                 "channels": F.one_hot(some, len(act)).to(act) * act[some, None],
                 "random": lines * (lines @ act)[:, None]}
        for name, part in parts.items():
            shares = ablation_shares(site, row, at, part)
            effects += len(shares) if name == "latents" else 0
            found[name + place] += [(own, *shares.mean(0).tolist())] if len(shares) else []
    values = {}
    for name, rows in found.items():
        own, every, here = torch.tensor(rows or [(0, math.nan, math.nan)], dtype=torch.float64).T
        values[name] = leave_one_out(own, every)
        values |= {} if "_" in name else {name + "_here": leave_one_out(own, here)}
    return estimates(**values) | {"samples": samples, "ablations": effects}


# --------------------------------------------------------------------------------------------------
# Scaling laws, section 3.
LAW = ("alpha", "beta_k", "beta_n", "gamma", "zeta", "eta")  # the parameters of L(n, k)
BRIEF = ("path", "n_latents", "k", "tokens", "nmse")  # what is shown of a run

def levenberg_marquardt(model, theta, keep):
    """Least squares from B starts at once, each of the rows where its keep (B, R) is 1. model: θ
    (B, p), keep -> r (B, R), Jacobian (B, R, p), 0 in other rows. -> θ, sums of squares (B)."""
    theta, damping, left = theta.copy(), np.full(len(theta), 1e-3), np.arange(len(theta))
    r, J = model(theta, keep)
    for _ in range(500):
        size = np.sqrt((J[left] ** 2).sum(1)) + 1e-12
        S = J[left] / size[:, None]
        damped = S.transpose(0, 2, 1) @ S + damping[left, None, None] * np.eye(theta.shape[1])
        step = np.linalg.solve(damped, S.transpose(0, 2, 1) @ r[left][:, :, None])[:, :, 0] / size
        with np.errstate(over="ignore", invalid="ignore"):
            new = theta[left] - step
            r_new, J_new = model(new, keep[left])
            before, after = (r[left] ** 2).sum(1), (r_new**2).sum(1)
        better = after < before
        at = left[better]
        theta[at], r[at], J[at] = new[better], r_new[better], J_new[better]
        damping[left] = np.where(better, np.maximum(damping[left] / 5, 1e-12), damping[left] * 4)
        done = (after > (1 - 1e-12) * before) | (after < 1e-28)
        left = left[~np.where(better, done, damping[left] > 1e12)]
        if not len(left):
            break
    return theta, (r**2).sum(1)

def leave_out(model, starts, groups):
    """θ without each of the G groups (G, p). starts (many, p): the first is the θ of all points;
    groups (R): alike for points that err together. All nan with no more groups than parameters, or
    if noise of 1e-6 would move one of these by 1: the others then hold for a vanished term only."""
    names, (many, p) = np.unique(groups), starts.shape
    J = model(starts[:1], 1)[1][0]
    if len(names) <= p or np.linalg.svd(J, compute_uv=False)[-1] < 1e-6:
        return np.full((len(names), p), np.nan)
    keep = np.repeat(groups != names[:, None], many, 0)
    found, rss = levenberg_marquardt(model, np.tile(starts, (len(names), 1)), keep)
    best = rss.reshape(-1, many).argmin(1)
    return found.reshape(-1, many, p)[np.arange(len(names)), best]

def fit_exponentials(terms, loss, groups, seed=0):
    """Least squares of ln loss (R) by ln Σ_j exp(terms[j] @ θ_j), two terms (R, p_j), many starts
    -> all θ (p), residual sum of squares, θ without each of the G groups (G, p)."""
    y, rng = np.log(loss), np.random.default_rng(seed)
    def model(theta, keep):
        halves = np.split(theta, [terms[0].shape[1]], 1)
        parts = np.stack([t @ X.T for X, t in zip(terms, halves)])  # (terms, B, R)
        top = parts.max(0)
        total = top + np.log(np.exp(parts - top).sum(0))
        slopes = [X * (keep * np.exp(p - total))[:, :, None] for X, p in zip(terms, parts)]
        return (total - y) * keep, np.concatenate(slopes, 2)
    # A start: the second term is a constant floor, the first explains what is left above it.
    floors = np.repeat([0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98], 8) * loss.min()
    targets = np.log(loss[:, None] - floors), np.log(np.tile(floors, (len(y), 1)))
    pairs = zip(terms, targets)
    starts = np.concatenate([np.linalg.lstsq(X, t, rcond=None)[0] for X, t in pairs]).T
    starts = starts + 0.1 * rng.standard_normal(starts.shape) * np.abs(starts)
    found, rss = levenberg_marquardt(model, starts, np.ones((len(starts), len(y))))
    best = rss.argmin()
    few = np.concatenate([found[[best]], found[::8]])
    return found[best], float(rss[best]), leave_out(model, few, groups)

def fit_law(names, terms, loss, groups=None):
    """A sum of two exponentials fitted to loss (R): parameters by `names`, errors, `fitted`, r2 and
    rmse of ln loss; these also `_without` the second, delta_aic (AICc) > 0 where it is needed. ->
    these, parameters without each group (G, p): see `leave_out`."""
    if not (loss > 0).all():
        raise UserError(f"an NMSE of {loss.min():g} has no logarithm; nothing is fitted")
    R, y = len(loss), np.log(loss)
    groups = np.arange(R) if groups is None else groups
    theta, rss, without = fit_exponentials(terms, loss, groups)
    first = np.linalg.lstsq(terms[0], y, rcond=None)[0]
    rss_without = float(((terms[0] @ first - y) ** 2).sum())
    r2 = lambda rss: 1 - rss / max(float(((y - y.mean()) ** 2).sum()), 1e-300)
    def aicc(rss, p):
        spare = R - p - 1
        return R * math.log(max(rss, 1e-300)) + 2 * p * R / spare if spare > 0 else math.nan
    halves = np.split(theta, [len(first)])
    fitted = sum(np.exp(X @ t) for X, t in zip(terms, halves))
    out = dict(zip(names, theta.tolist()))
    out |= {name + "_se": error for name, error in zip(names, jackknife(without).tolist())}
    delta_aic = aicc(rss_without, len(first) + 1) - aicc(rss, len(theta) + 1)  # + 1: the variance
    return out | {"fitted": fitted.tolist(), "r2": r2(rss), "rmse": math.sqrt(rss / R),
                  "r2_without": r2(rss_without), "rmse_without": math.sqrt(rss_without / R),
                  "delta_aic": delta_aic, "runs": R}, without

def fit_scaling_law(runs):
    """L(n, k) = exp(α + β_k ln k + β_n ln n + γ ln k ln n) + exp(ζ + η ln k) through runs (dicts
    with n_latents, k, nmse): see `fit_law`, names in LAW; delta_aic is nan with fewer than 9 runs.
    Raises UserError for fewer runs than parameters, n or k that hardly vary."""
    n, k, loss = (np.array([r[key] for r in runs], float) for key in ("n_latents", "k", "nmse"))
    why = ""
    if len(runs) < len(LAW):
        why = f"has {len(LAW)} parameters, and there are {len(runs)} runs"
    elif len(set(k)) < 2 or len(set(n)) < 3:
        k, n = (sorted({r[key] for r in runs}) for key in ("k", "n_latents"))
        here = f"k {k} and n {n}"
        why = f"needs at least two k and three n; here are {here}"
    if why:
        raise UserError(f"L(n, k) {why}; nothing is fitted")
    one, lk, ln = np.ones(len(k)), np.log(k), np.log(n)
    return fit_law(LAW, [np.stack([one, lk, ln, lk * ln], 1), np.stack([one, lk], 1)], loss)[0]

def fit_power_law(x, loss, groups=None):
    """L = exp(a + b ln x) + exp(c): L(N) with x = n, L(C) with x = compute in FLOPs. groups: what
    points came from the same run, each its own by default. -> a, b, floor = exp(c), errors, r2,
    r2_without. Raises UserError for fewer points than parameters."""
    if (points := len(set(x))) < 3:
        raise UserError("a power law with a floor has 3 parameters, and there are"
                        f" {points} points; nothing is fitted")
    terms = [np.stack([np.ones(len(x)), np.log(np.array(x, float))], 1), np.ones((len(x), 1))]
    fit, without = fit_law(("a", "b", "c"), terms, np.array(loss, float), groups)
    fit["floor"], fit["floor_se"] = math.exp(fit["c"]), float(jackknife(np.exp(without[:, 2])))
    return pick(fit, "a", "a_se", "b", "b_se", "floor", "floor_se", "r2", "r2_without", "runs")

def read_lines(path):
    """A log of JSON lines as a list of dicts, without one that a crash has cut short; empty where
    there is none."""
    lines = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
        with suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]

@cache
def read_runs(paths):
    """Run directories -> dicts: n_latents, k, nmse, where, curve [(FLOPs, held-out NMSE)]."""
    runs = []
    for path in dict.fromkeys(Path(path).resolve() for path in paths):
        try:
            own = load_file(path / "sae.pt").get("sae", {})
        except ValueError as e:
            why = e if (path / "sae.pt").exists() else "no finished run"
            print(f"  {path}: {why}, left out", file=sys.stderr)
            continue
        meta = own.get("meta", {})
        config = meta.get("config", {})
        score = min(meta.get("nmse", {}).values(), default=math.nan)
        other = config.get("activation", "topk") != "topk" or any(
            config.get(name) for name in ("l1", "multi_topk", "prefixes"))
        if other or not math.isfinite(score):
            why = "not a plain TopK run" if math.isfinite(score) else "has no held-out NMSE"
            print(f"  {path}: {why}, left out", file=sys.stderr)
            continue
        flops = 6 * own["d_model"] * own["n_latents"]  # a token, dense, as the appendix counts
        lines = [line for line in read_lines(path / "log.jsonl") if "val_nmse" in line]
        curve = [(flops * line["tokens"], line["val_nmse"]) for line in lines]
        where = {name: meta.get(name + "_sha256", meta.get(name)) for name in ("acts", *PLACE)}
        runs.append({"path": str(path), "tokens": meta["tokens"], "nmse": score, "curve": curve,
                     "where": where} | pick(own, "n_latents", "k"))
    if len(kinds := sorted({str(run["where"]) for run in runs})) > 1:
        raise UserError("these runs are of different models, layers, sites or texts; fit one kind"
                        f" at a time: {'; '.join(kinds)}")
    if not runs:
        raise UserError("there is no finished TopK run among these")
    return runs

def fit_main(paths):
    """`--fit`: L(n, k) through all runs, then L(N) and L(C) at the k with the most n."""
    runs = read_runs(tuple(paths))
    out = {"runs": [pick(run, *BRIEF) for run in runs]}
    pm = lambda fit, name: f"{fit[name]:.4g} ± {fit[name + '_se']:.2g}"
    for run in sorted(runs, key=lambda r: (r["k"], r["n_latents"])):
        print("  n {n_latents:>8}  k {k:>4}  {tokens:>13,} tokens  NMSE {nmse:.4f}".format(**run))
    try:
        fit = out["L(n, k)"] = fit_scaling_law(runs)
        print("L(n, k) = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n)"
              f" + exp(zeta + eta ln k)\n  {', '.join(f'{name} {pm(fit, name)}' for name in LAW)}")
        print("  R² of ln L {r2:.5f}, rms error {rmse:.3%}; without the irreducible term"
              " {r2_without:.5f}, {rmse_without:.3%}; ΔAIC {delta_aic:.1f} in its favour;"
              " {runs} runs".format(**fit))
    except UserError as e:
        print(f"L(n, k): {e}")
    sizes = lambda k: len({run["n_latents"] for run in runs if run["k"] == k})
    k = max((run["k"] for run in runs), key=lambda k: (sizes(k), k), default=0)
    same = [run for run in runs if run["k"] == k]
    curves = [(*point, i) for i, run in enumerate(same) for point in run["curve"]]
    frontier = []
    for point in sorted(curves):
        if not frontier or point[1] < frontier[-1][1]:
            frontier.append(point)
    of_n = [(run["n_latents"], run["nmse"], i) for i, run in enumerate(same)]
    for name, points in (("L(N)", of_n), ("L(C)", frontier)):
        try:
            fit = out[f"{name}, k = {k}"] = fit_power_law(*np.array(points).reshape(-1, 3).T)
            print(f"{name} at k = {k}: exp({pm(fit, 'a')}) x^({pm(fit, 'b')}) + {pm(fit, 'floor')};"
                  " R² {r2:.5f}, without the floor {r2_without:.5f}; {runs} points".format(**fit))
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
    out = {"density": counts / n_tokens, "mean": mean,
           "mean square": np.add.reduceat(value**2, starts) / n_tokens}
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
    """Contexts of each latent's n highest peaks, then n evenly spaced to the lowest: number, count
    of activations; how many a latent; of all pairs position and value (65535: the latent's
    peak)."""
    context = token // T
    group = np.flatnonzero(np.diff(row * (context.max() + 1) + context, prepend=-1))
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
    return {"context": context[first], "pairs": size, "per latent": np.bincount(row[first]),
            "position": token[pairs] % T, "value": shown.astype(np.uint16)}

def decoder_rows(sae, site, live, k, near):
    """Of latents live (L): direct effect on the logits over its largest, and nearest rows."""
    parts = defaultdict(list)
    every = F.normalize(sae.W_dec.float(), dim=1)
    unembedding = site.model.wte.weight.float() if site else every[:0, :0]
    to_int16 = lambda v: (32767 * v).round().to(torch.int16)  # of -1 to 1
    for w in sae.W_dec[torch.from_numpy(live).to(every.device)].float().split(1024):
        if w.shape[1] == unembedding.shape[1] and site.name != "mlp_post_act":
            out = (w - w.mean(1, keepdim=True)) * site.model.ln_f.weight.float()
            tokens, values = top_two_ways(out @ unembedding.T, k)
            largest = values.abs().amax(1, keepdim=True).clamp_min(1e-30)
            parts["direct"].append(tokens)
            parts["direct value"].append(to_int16(values / largest))
        cosine, latents = (F.normalize(w, dim=1) @ every.T).topk(near, dim=1)
        parts["near"].append(latents)
        parts["near cosine"].append(to_int16(cosine.clamp(-1, 1)))
    return {name: torch.cat(part).cpu().numpy() for name, part in parts.items()}

def measured_effects(sae, site, tokens, latents, at, values, k):
    """Take each latent's contribution away where it is highest: `at` (L) of the flat tokens (C, T),
    `values` (L) -> tokens (L, 2 k) whose logits, less their mean, it raises and lowers most; by how
    many nats; (L, 2): the rise of the next token's loss (nan: no next one), KL(with || without)."""
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

def known_tokens(encoding):
    """The numbers of all tokens, the separator's too."""
    return [*map(encoding.encode_single_token, encoding.token_byte_values()), encoding.eot_token]

@torch.no_grad()
def report(sae, site, tokens, x, encoding, most=0, held_out=None, examples=6, bins=12, seed=0,
           flat=False):
    """What the page shows of single latents, from tokens (C, T) with raw activations x (C, T, d),
    as a dict ready for JSON: moments, histogram, `examples` contexts with the highest peaks and as
    many evenly spaced to the lowest, main tokens, direct effect on the logits (decoder row, final
    norm, unembedding), the measured one where it is highest, nearest decoder rows. most: seeded
    sample of latents, 0: all that fire. held_out: so many contexts, the first, are (default:
    all). flat: rows that are in no contexts."""
    C, T = tokens.shape
    V = site.n_vocab if site else T  # without a model, positions stand for words
    ids = tokens.flatten().numpy() if site else tokens.flatten().numpy() % T
    live, row, token, value = live_pairs(sae, x, most, seed)
    stats = moments(row, value, C * T)
    peak = stats["max"]
    counts, edges = np.histogram(value, 40)
    bin_of = np.minimum(bins - 1, (value / peak[row] * bins).astype(int))
    main, share = main_tokens(row, ids[token], value, V)
    order, place = ranked(row, value)
    highest = token[order[place == 0]]
    k, near = min(8, V // 2), min(6, sae.n_latents)
    numbers = decoder_rows(sae, site, live, k, near)
    numbers |= measured_effects(sae, site, tokens, live, highest, peak, k) if site else {}
    shown = example_contexts(row, token, value, peak, T, examples)
    vocabulary = dict(enumerate(f"{i} " for i in range(T))) if not site else {
        i: "".join(spell([i], encoding)) for i in known_tokens(encoding)}  # with gaps
    return {"T": T, "n_live": len(live), "held_out": C if held_out is None else held_out,
            "normalized": sae.normalized, "bins": bins, "top": k, "near": near,
            "examples": examples, "tokens": pack(ids), "latents": pack(live.astype(np.uint32)),
            "vocabulary": [vocabulary.get(i, "") for i in range(V)],
            "rows": None if site else pack(tokens[:, 0].double().numpy()), "flat": flat,
            "activations": {"edges": edges.tolist(), "counts": counts.tolist()},
            "histogram": pack(np.bincount(row * bins + bin_of, minlength=len(live) * bins)),
            "stats": {name: pack(v.astype(np.float32)) for name, v in stats.items()},
            "main": pack(main), "main share": pack(np.round(255 * share).astype(np.uint8)),
            "shown": {name: pack(v) for name, v in shown.items()},
            "numbers": {name: pack(v) for name, v in numbers.items()}}

def write_report(path, page):
    """The page as a file, its data a JSON block with no `<` that could be taken for a tag."""
    page = json.loads(json.dumps(page), parse_constant=lambda name: None)  # null: nan, infinity
    data = json.dumps(page, allow_nan=False).replace("<", "\\u003c")
    text = PAGE.replace("/*STYLE*/", STYLE).replace("/*SCRIPT*/", SCRIPT)
    with harvest.atomic(path) as f:
        f.write(text.replace("/*DATA*/", data).encode())

def make_report(case, results, runs, rows=()):
    """Everything known: results, curves, latents, the law through several runs, rows of `frontier`.
    -> its path"""
    tokens = torch.cat([case.val_tokens, case.more_tokens])
    page = report(case.sae, case.site, tokens, torch.cat([case.val, case.more]), case.encoding,
                  case.a.latents, len(case.val) if case.train else None,
                  flat=bool(case.where.get("flat")))
    lines = read_lines(Path(case.run) / "log.jsonl")
    curves = ("tokens", "nmse", "val_nmse", "dead", "l0", "tokens_per_s")
    page |= {"about": results["about"], "metrics": [], "tasks": [], "dense": [], "plots": {},
             "curves": {name: [line.get(name) for line in lines] for name in curves},
             "runs": [], "frontier": rows, "compared": [*COMPARED], "n2g": {}, "patterns": {}}
    for name in [name for name in METRICS if name in results]:
        for key, value in METRICS[name].page(results[name]).items():
            page[key] = page[key] | value if key == "plots" else value
    for name in [name for name in results if name in METRICS]:
        for label, value, error, unit, size, why in cells(name, results[name]):
            page["metrics"].append([label, value, error, why if value is None else unit, size])
    if len(runs) > 1:
        try:
            page["runs"] = [pick(run, *BRIEF) for run in read_runs(tuple(runs))]
            for run, loss in zip(page["runs"], fit_scaling_law(page["runs"])["fitted"]):
                run["law"] = loss
        except UserError as e:
            if len(runs) >= len(LAW):
                print(f"  no law through these runs: {e}", file=sys.stderr)
    if page["n2g"]:
        latents = harvest.read_json(case.beside("n2g.json")).get("latents", {})
        page["patterns"] = {i: e["readable"][:8] for i, e in latents.items()}
    write_report(case.beside("report.html"), page)
    return case.beside("report.html")


# --------------------------------------------------------------------------------------------------
# The command line.

def load(path, device):
    """A run directory, another library's folder, or a file -> (SAE, its file, the JSON file for its
    results)."""
    path = Path(path)
    file = path / "sae.pt" if path.is_dir() else path
    out = path / "evals.json" if path.is_dir() else path.with_suffix(".evals.json")
    if not file.exists() and any(path.glob("checkpoint*")):
        raise UserError(f"{path} is not finished; continue it with: python sae.py --resume --out"
                        f" {path}")
    sae = Sparse.load(path, device)
    return sae, next((f for f in (file, *map(path.joinpath, FOREIGN)) if f.is_file()), file), out

def stamp(path):
    """A file as something that changes with it."""
    return [path.name, path.stat().st_size, path.stat().st_mtime]

def changed(there, known):
    """What is not as `known`, where an autoencoder was trained, in the meta `there`."""
    pairs = ((name, there.get(name), value) for name, value in known.items())
    return "; ".join(f"{name}: {a} there, {b} trained on" for name, a, b in pairs if a != b)

class Case:
    """One autoencoder with what its metrics need; a: the command line. What cannot be had in the
    constructor ends the evaluation; what only some metrics need is made, or missed, by them."""
    def __init__(self, run, a):
        self.run, self.a = run, a
        self.device = harvest.pick_device(a.device or "")
        cuda = self.device.startswith("cuda")
        self.latents = a.latents or 2048
        self.n_contexts = a.contexts or (2048 if cuda else 512)
        n_tokens = a.tokens or (2**18 if cuda else 2**16)
        self.sizes = {"tokens": n_tokens, "contexts": self.n_contexts}
        self.texts = a.probes and read_tasks(a.probes)
        self.probes = a.probes and list(map(stamp, sorted(Path(a.probes).glob("*.jsonl"))))
        self.sae, file, self.out = load(run, self.device)
        if not all(p.isfinite().all() for p in self.sae.state_dict().values()):
            raise UserError(f"{run} has weights that are NaN or infinite")
        self.config = self.sae.meta.get("config", {})
        held_out, self.train, model, self.encoding = self.source()
        self.where = where = held_out.meta
        d, n, k = self.sae.d_model, self.sae.n_latents, self.sae.k
        if where["d_model"] != d:
            raise UserError(f"{run} is for activations of width {d}, these have {where['d_model']};"
                            " give its own --acts, or --model, --layer and --site")
        self.site = model and Site(model, where["layer"], where["site"])
        inputs = "normalised" if self.sae.normalized else "raw"
        text = f"; text: {where['text']}" if model else ""
        if self.sae.meta.get("acts_sha256", own := where.get("acts_sha256")) != own:
            text += "; not what it was trained on, all of it taken as held out"
        self.about = (f"{run}: {harvest.called(where)}, d = {d}, n = {n},"
                      f" {activation_name(self.sae)}, {inputs} inputs{text}")
        self.sample(held_out, max(1, n_tokens // where["context"]))
        sampled = harvest.sha256([self.val_tokens.numpy().tobytes()])
        beside = [file.with_name(name) for name in ("cfg.json", "config.json")]
        files = [file, *(beside if file.name in FOREIGN else ()), *getattr(held_out, "files", ())]
        settings = {"where": where, "trained": self.sae.meta, "text": sampled,
                    "file": [stamp(f) for f in files if f.exists()]}
        self.settings = json.loads(json.dumps(settings))  # as it will be read back
        l0 = k if k < n else reconstruction(self.sae, self.val[:64])["l0"]
        self.k = max(1, round(l0))  # active latents a token, as measured where k = n

    def source(self):
        """Held-out and training activations: of --acts, or of the harvest it was trained on if
        still there; else of held-out text, and None. And model and encoding."""
        a, meta = self.a, self.sae.meta
        asked = {name: value for name in PLACE if (value := getattr(a, name)) is not None}
        known = {name: meta[name] for name in ("layer", "site", *HASHES) if name in meta}
        known = {n: v for n, v in known.items() if n.removesuffix("_sha256") not in asked}
        if a.acts or {"model", "layer"} <= asked.keys():
            known.pop("acts_sha256", None)
        acts, whose = a.acts or self.config.get("acts"), {"model", "layer"} <= {*meta, *asked}
        told = "nothing"
        there = harvest.is_harvested if whose else os.path.exists
        if a.acts or acts and there(acts):
            train, held_out = harvest.open_acts(acts)
            if "model" not in train.meta and a.acts:
                known = {}  # any activations of that width
            told = changed(train.meta, known) or harvest.differs(train.meta, asked)
            if not told and "model" in train.meta:
                return held_out, train, *self.load_model(train.meta)
            if not told:  # of a file that it was not trained on, all is held out
                own = train.meta["acts_sha256"] == meta.get("acts_sha256")
                both = (held_out, train) if own else (train.other("all"), None)
                return *both, None, None
            if a.acts:
                raise UserError(f"{acts} holds other activations ({told}); give other --acts")
        if not whose:
            why = "does not say whose activations it is for"
            if "acts_sha256" in meta:
                why = f"was trained on what is no longer at {acts} (there is {told})"
            raise UserError(f"{self.run} {why}; give --acts, or --model, --layer and --site")
        if (text := asked.get("text") or meta.get("text")) == "-" and not a.text:
            raise UserError(f"{self.run} was trained on standard input; give --text or --acts")
        harvest.check_options(text, site := asked.get("site") or meta.get("site", SITES[3]))
        model, encoding = self.load_model({"model": asked.get("model") or meta["model"]})
        text = text or harvest.default_text(model)
        layer = asked.get("layer", meta.get("layer"))
        stream = harvest.Stream(model, encoding, text, layer, site, meta.get("context"))
        if told := changed(stream.meta, known):
            raise UserError(f"{self.run} was trained on what is no longer there ({told}); give the"
                            " --model and --text to evaluate on")
        return stream, None, model, encoding

    def load_model(self, meta):
        """The model of a harvest or run. Raises UserError if it is not the same any more."""
        model, encoding = harvest.load_model(meta["model"], self.device)
        if meta.get("model_sha256", model.sha256) != model.sha256:
            raise UserError(f"the model {meta['model']} has changed since its activations were "
                            "harvested; give other --acts, or --model")
        return model, encoding

    def sample(self, held_out, n):
        """Take n contexts each: val, held-out activations (n, T, d), and `more`: of training text,
        else held-out; and chosen, tokens for losses. None are those on which weights were chosen.
        """
        T, known = self.where["context"], self.sae.meta
        same = all(self.where.get(name) == known.get(name) for name in HASHES)
        skip = known.get("chosen_on", 0) if same else 0
        first = max(n, self.n_contexts)
        size = T * (first if self.train else first + n)
        tokens, acts, self.document = held_out.sample(size, skip)
        if not len(tokens):
            raise UserError("nothing is held out beside what weights were chosen on; give more "
                            f"{'--text' if self.site else '--acts'}")
        self.more_tokens, more, _ = self.train.sample(n * T) if self.train else (
            tokens[first:], acts[first:], None)
        self.val_tokens, self.val, self.more = tokens[:n], acts[:n].float(), more.float()
        self.chosen = tokens[: self.n_contexts]
        self.few = max(1, 2**14 // T)  # contexts for what is slow
        self.missing = {}  # what cannot be had: why
        if not self.site:
            self.missing["model"] = "there is no language model behind these activations"
        if self.where.get("flat") or T == 1:
            self.missing["contexts"] = "these activations are rows (N, d), not in contexts"
        if not len(more):
            more = "text is too short; give more --text" if self.site else "activations are too few"
            self.missing["more"] = f"the held-out {more}"
        if not self.train or self.train.meta["tokens_sha256"] != self.sae.meta.get("tokens_sha256"):
            self.missing["trained_on"] = "the activations it was trained on are not at hand"
        elif self.config.get("tokens", 0) < self.train.n_train or not len(self.train.kept):
            self.missing["trained_on"] = "not all that could be trained on was"

    @property
    def words(self):
        """The held-out tokens, if that is what they are."""
        return self.val_tokens if self.site else None

    @property
    def in_contexts(self):
        """The held-out activations (contexts, T, d), each alone if there are none."""
        return self.val.flatten(0, 1)[:, None] if self.where.get("flat") else self.val

    @cached_property
    def trained_and_kept(self):
        """Contexts trained on, those that were kept back between them, and the documents of all."""
        kept = self.train.kept[: len(self.val)]
        beside = np.union1d(kept - 1, kept + 1)
        beside = beside[beside < len(self.train)]
        document = torch.from_numpy(self.train.document[np.concatenate([beside, kept])])
        return self.train[beside][1].float(), self.train[kept][1].float(), document

    def beside(self, name):
        """The path of another file about this autoencoder."""
        return self.out.with_name(self.out.name.replace("evals.json", name))

    @cached_property
    def explanations(self):
        """{latent: N2G}, made once and kept in n2g.json."""
        path = self.beside("n2g.json")
        key = self.settings | self.sizes | {"latents": self.latents}
        saved = {} if self.a.again else harvest.read_json(path)
        if saved.get("settings") == key:
            return {int(i): N2G(e["patterns"]) for i, e in saved["latents"].items()}
        pad = self.encoding.encode_ordinary(" _")[-1]
        found = explain(self.sae, self.site, self.more_tokens, self.more, pad, self.latents)
        latents = {i: {"patterns": e.patterns, "readable": e.readable(self.encoding)}
                   for i, e in found.items()}
        keep(path, {"settings": key, "latents": latents})
        return found

def keep(path, results, case=None):
    """Write results, beside what else is known of a case: if that is allowed here, they are printed
    in any case."""
    try:
        with harvest.hold(path.parent, wait=True, name=f".{path.name}-lock"):
            harvest.write_json(path, (known(case) if case else {}) | results)
    except OSError as e:
        print(f"  {path} is not written: {e.strerror}", file=sys.stderr)

def cells(name, result):
    """A result -> (label, value, standard error, unit, sample, why no value) of each line."""
    this = METRICS[name]
    for key, label, *own in [row for row in this.rows if row[0] in result]:
        unit, of = [*own, *(this.unit, this.of)[len(own) :]]
        values, errors = result[key], result.get(key + "_se")
        if not isinstance(values, list):
            values, errors = [values], [errors]
        size = f"{result[of]:,} {of.replace('_', ' ')}"
        if documents := result.get("replicates", {}).get(key):
            documents = documents[0] if isinstance(result[key], list) else documents
            size += f", {len(documents):,} documents"
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

def evaluate(run, wanted, a, page=None):
    """Compute, print and keep the metrics `wanted` of one autoencoder -> all that is known of it.
    a: the command line. page: write its report too, with these rows of `frontier`."""
    began = time.time()
    case = Case(run, a)
    out = case.out
    # What an earlier call found for the same file and place is kept: what was interrupted goes on.
    results, fresh = known(case), {}
    if wanted and not a.json:
        print(case.about)
    for name in wanted:
        this = METRICS[name]
        asked = case.sizes | {key: getattr(case, key) for key in this.depends}
        try:
            for need in filter(case.missing.get, this.needs):
                raise UserError(case.missing[need])
            if a.again or results.get(name, {}).get("asked") != asked:
                results[name] = fresh[name] = {"asked": asked} | this.compute(case)
        except UserError as e:  # too little data for this one: the others go on
            print(f"  {name}: {e}", file=sys.stderr)
            continue
        if not a.json:
            print("\n".join(table(name, results[name])), flush=True)
        if name in fresh:
            keep(out, fresh, case)
    if a.json and wanted:
        print(json.dumps(results, indent=1))
    if page is not None:
        out = make_report(case, results, a.runs, page)
    print(f"{time.time() - began:.0f} s; written to {out}", file=sys.stderr)
    return results | {"activation": activation_name(case.sae)}

def known(case):
    """What is kept of an autoencoder, as it is now, on these data."""
    results = harvest.read_json(case.out)
    same = results.get("settings") == case.settings
    return results if same else {"about": case.about, "settings": case.settings}

def differences(a, b, wanted):
    """Lines of the table: b less a, of two results on the same text, and the standard error of the
    difference, which is less than what their own errors say."""
    if a["settings"]["text"] != b["settings"]["text"]:
        return ["  not on the same text: no differences"]
    lines = []
    same = lambda name: name in a and name in b and a[name]["asked"] == b[name]["asked"]
    for name in filter(same, wanted):
        for key, label, *_ in METRICS[name].rows:
            one, other = (np.array(r[name].get("replicates", {}).get(key, [])) for r in (a, b))
            alike = one.ndim == 1 and one.size and one.shape == other.shape
            if alike and np.isfinite([one, other]).all():
                value = b[name][key] - a[name][key]
                lines.append(f"  {label:<40}{value:10.4f} ± {jackknife(other - one):.4f}")
    return lines

COMPARED = {  # what --compare shows: metric, key
    "L0": ("reconstruction", "l0"), "NMSE": ("reconstruction", "nmse"),
    "silent": ("density", "silent"), "ΔCE": ("downstream", "delta_ce"),
    "probe loss": ("probes", "held_out"), "N2G recall": ("n2g", "recall"),
    "N2G precision": ("n2g", "precision"), "refined / original": ("refinement", "ratio")}

def frontier(results):
    """{run: what is known of it} -> rows: run, activation, its settings but for those that change
    only the draw or nothing, COMPARED. Raises UserError where they are of different texts."""
    rows, free = [], ("seed", "out", "resume", "minutes", "device")
    for run, known in results.items():
        config = known["settings"]["trained"].get("config", {})
        told = {name: value for name, value in config.items() if name not in free}
        found = {label: known.get(name, {}).get(key) for label, (name, key) in COMPARED.items()}
        kind = config.get("activation") or known["activation"].split()[0]
        rows.append({"run": run, "activation": kind, "settings": json.dumps(told or run)} | found)
    if len({known["settings"]["text"] for known in results.values()}) > 1:
        raise UserError("these were evaluated on different texts; give all the same --acts or"
                        " --model, --text, --tokens")
    return rows

def show_frontier(rows):
    """The rows of `frontier` as a table; of runs that differ in their seed only the means, and
    their standard errors."""
    print(f"{'activation':<11}" + "".join(f"{label:>19}" for label in COMPARED) + "  run")
    for _, group in itertools.groupby(sorted(rows, key=lambda r: (r["activation"], r["settings"])),
                                      lambda r: r["settings"]):
        group, cells = list(group), ""
        for label in COMPARED:
            known = [row[label] for row in group if row[label] is not None]
            found = means(it=known) if known else {"it": math.nan, "it_se": math.nan}
            error = f" ± {found['it_se']:.4f}" if len(known) > 1 else ""
            cells += f"{found['it']:.4f}{error}".rjust(19)
        seeds = f", {len(group)} seeds" if len(group) > 1 else ""
        print(f"{group[0]['activation']:<11}{cells}  {group[0]['run']}{seeds}")

OPTIONS = [  # name, type, help
    ("all", bool, "every metric, not only the quick ones"),
    ("only", str, f"just these, separated by commas: {','.join(METRICS)}"),
    ("fit", bool, "fit the scaling laws through the runs, and nothing else"),
    ("compare", bool, "a table of the runs, by activation function; --report: the frontier too"),
    ("probes", str, 'folder of NAME.jsonl, lines {"text": ..., "label": 0|1} (default: built-in)'),
    ("acts", str, "a harvest, or .npy, .npz, .pt, .safetensors, or a folder of such (default: those"
     " it was trained on, else text is run)"),
    ("model", str, "subject model where none are harvested (default: the one it was trained on)"),
    ("layer", int, "default: the one it was trained on, else two thirds of the depth"),
    ("site", str, f"{', '.join(SITES)}; default: the one it was trained on, else resid_post_mlp"),
    ("text", str, "text where none are harvested (default: what the model was trained on)"),
    ("tokens", int, "for NMSE, density, probes, N2G (default: 2^18 on CUDA, 2^16 on CPU)"),
    ("contexts", int, "held-out, for downstream losses (default: 2048 on CUDA, 512 on CPU)"),
    ("report", bool, "write report.html, a page to open in a browser; several runs are overlaid"),
    ("latents", int, "most that N2G explains (default: 2048), --report shows (default: all)"),
    ("device", str, "cuda or cpu (default: cuda if there)"),
    ("again", bool, "compute anew what is asked for"),
    ("json", bool, "print JSON instead of the table")]

def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    p.add_argument("runs", nargs="+", help="runs, sae.pt, OpenAI's files, folders of SAELens,"
                   " sparsify, dictionary_learning, Gemma Scope")
    for name, kind, text in OPTIONS:
        how = {"action": "store_true"} if kind is bool else {"type": kind}
        p.add_argument("--" + name, help=text, **how)
    a = p.parse_args(argv)
    keep_heap()
    for name in ("tokens", "contexts", "latents"):
        if (value := getattr(a, name)) is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    if a.fit:
        out = fit_main(a.runs)
        if a.json:
            print(json.dumps(out, indent=1))
        return
    compared = {name for name, _ in COMPARED.values()} if a.compare else ()
    asked = lambda name: (a.all or name in compared or name == "probes" and a.probes
                          or METRICS[name].quick and not a.compare)
    wanted = a.only.split(",") if a.only else list(filter(asked, METRICS))
    if unknown := [name for name in wanted if name not in METRICS]:
        raise UserError(f"no metric {', '.join(unknown)}; choose among {', '.join(METRICS)}")
    results = {}
    for run in a.runs:
        try:
            results[run] = evaluate(run, wanted, a, [] if a.report and not a.compare else None)
        except ValueError as e:  # the other ones go on
            if len(a.runs) == 1:
                raise
            print(f"error: {e}", file=sys.stderr)
    first, *others = results
    for run in others if not (a.json or a.compare) else ():
        print(f"{run} less {first}, paired by document")
        print("\n".join(differences(results[first], results[run], wanted)))
    if a.compare:
        rows = frontier(results)
        if not a.json:
            show_frontier(rows)
        for run in results if a.report else ():  # now that all are known
            evaluate(run, [], a, rows)
    if len(results) < len(a.runs):
        raise UserError(f"{len(a.runs) - len(results)} of {len(a.runs)} could not be evaluated")


# --------------------------------------------------------------------------------------------------
# The page of the report: template, style and script.

PAGE = r"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<title>Sparse autoencoder</title><style>/*STYLE*/</style></head><body>
<header><nav aria-label="Pages"><a href="#overview">Overview</a> <a href="#latents">Latents</a>
  <button id="random" type="button">Random latent (r)</button></nav>
<form id="search" role="search"><label for="query">Find latents by word or token</label>
  <input id="query" type="search" autocomplete="off" placeholder="a word  ( / )"></form>
<span id="status" role="status"></span></header><main id="main" tabindex="-1"></main>
<noscript>This page needs JavaScript, its own; it loads nothing.</noscript>
<script type="application/json" id="data">/*DATA*/</script><script>/*SCRIPT*/</script></body></html>
"""

STYLE = """
:root { color-scheme: light dark; --mark: 214, 106, 0; --shade: 214, 106, 0;
  --ink: #1a1a1a; --paper: #fdfdfb; --faint: #6a6a66; --line: #d8d8d2; --blue: #1f5fa8; }
@media (prefers-color-scheme: dark) { :root { --mark: 255, 160, 60; --shade: 180, 85, 0;
  --ink: #e8e6e1; --paper: #17181a; --faint: #a3a19b; --line: #3a3b3e; --blue: #8ab8f0; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body, figure { margin: 0; } a { color: var(--blue); } nav a, nav button { margin-right: .8em; }
header { display: flex; flex-wrap: wrap; gap: .5em 2em; align-items: center;
  padding: .6em 1em; border-bottom: 1px solid var(--line); }
main { padding: 0 1em 3em; max-width: 75em; margin: auto; outline: none; }
button, input { font: inherit; color: inherit; background: var(--paper); padding: .15em .5em;
  border: 1px solid var(--faint); border-radius: 4px; }
:focus-visible { outline: 3px solid var(--blue); outline-offset: 1px; }
h1 { font-size: 1.35em; margin: 1em 0 .3em; } h2 { font-size: 1.05em; margin: 1.6em 0 .3em; }
h1, p, li { overflow-wrap: anywhere; } p, ul { max-width: 60em; } section { flex: 1 1 19em; }
li { white-space: pre-wrap; font: 13px/1.6 ui-monospace, monospace; }
.faint, details { color: var(--faint); } details { font-size: .9em; }
.columns { display: flex; flex-wrap: wrap; gap: 0 2.5em; } .columns > * { min-width: 0; }
.scroll { overflow-x: auto; font-variant-numeric: tabular-nums; }
td, th { padding: .1em .7em .1em 0; text-align: left; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; } td { white-space: nowrap; } td .word { white-space: pre; }
.number { text-align: right; } th button { border: 0; padding: 0; font-weight: 600; }
[aria-sort=ascending] button::after { content: " ▲"; }
[aria-sort=descending] button::after { content: " ▼"; }
.plots { display: grid; grid: auto / repeat(auto-fill, minmax(min(100%, 21em), 1fr)); gap: 1em; }
figcaption { font-weight: 600; } svg { width: 100%; height: auto; display: block; }
text { fill: var(--ink); font-size: 11px; text-anchor: middle; } .left { text-anchor: end; }
path { fill: none; stroke: currentColor; stroke-width: 1.6; } circle, rect { fill: currentColor; }
.key { white-space: nowrap; margin-right: 1em; font-size: .85em; }
.key svg { width: 30px; height: 8px; display: inline-block; margin-right: .4em; }
.axis { stroke: var(--line); } .key line { stroke: currentColor; stroke-width: 2; }
.context { font: 13px/1.9 ui-monospace, monospace; overflow-wrap: anywhere;
  border-left: 3px solid var(--line); padding-left: .7em; margin: .4em 0; }
.token { unicode-bidi: isolate; border-bottom: 0 solid rgb(var(--mark)); }
.token[style] { border-bottom-width: calc(1px + 3px * var(--share));
  background: rgba(var(--shade), calc(.12 + .6 * var(--share))); }
.peak { font-weight: 700; text-decoration: underline dotted; text-underline-offset: 4px; }
.word { font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  unicode-bidi: isolate; border: 1px solid var(--line); border-radius: 3px; padding: 0 .25em; }
"""

SCRIPT = r"""
const byId = id => document.getElementById(id);
const say = text => byId('status').textContent = text;
const upTo = n => Array.from({length: n}, (_, i) => i);
const zip = (a = [], b = []) => a.map((v, i) => [v, b[i]]);  // of what is missing, nothing
// The data. Its arrays are packed, and unpacked when they are first asked for.
const data = JSON.parse(byId('data').textContent);
const kinds = {u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i2: Int16Array, f4: Float32Array,
  f8: Float64Array};
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const unpack = packed => packed && new kinds[packed.type](bytes(packed.data).buffer);
const lazily = make => new Proxy({}, {get: (made, name) => made[name] ??= make(name)});
const arrays = {...data, latent: data.latents, ...data.stats, ...data.shown, ...data.numbers};
const array = lazily(name => unpack(arrays[name]));
const rowOf = (name, width, r) => [...array[name].subarray(width * r, width * (r + 1))];
const pairsOf = (name, other, width, r) => zip(rowOf(name, width, r), rowOf(other, width, r));
const sums = counts => { let sum = 0; return [0, ...counts].map(n => sum += n); };
const start = lazily(name => sums(array[name]));  // of each latent's examples, each example's pairs
const rankOf = id => array.latent.indexOf(+id);

// Makers of elements. Text only ever goes in as text; null, undefined and false are left out.
const flat = content => content.flat(Infinity).filter(c => c != null && c !== false);
const maker = namespace => (tag, ...content) => {
  const [name, style] = tag.split('.');
  const element = document.createElementNS(namespace, name);
  const attributes = content[0]?.constructor === Object ? content.shift() : {};
  for (const [attribute, value] of Object.entries({class: style, ...attributes}))
    if (attribute.startsWith('on')) element.addEventListener(attribute.slice(2), value);
    else if (value != null) element.setAttribute(attribute, value);
  element.append(...flat(content));
  return element;
};
const [el, draw] = ['1999/xhtml', '2000/svg'].map(name => maker('http://www.w3.org/' + name));
const show = (...content) => byId('main').replaceChildren(...flat(content));
const link = (id, text = 'latent ' + id) => el('a', {href: '#latent/' + id}, text);
const button = (text, onclick, id) => el('button', {type: 'button', id, onclick}, text);
const details = (summary, content) => el('details', el('summary', summary), content);
const signs = {' ': '·', '\n': '↵', '\t': '⇥', '\r': '␍'};
const sign = c => signs[c] ?? '\\u{' + c.codePointAt(0).toString(16) + '}';
const visible = text => text.replace(/[ \p{C}\u2028\u2029\ufffd]/gu, sign) || '∅';
const word = id => el('span.word', visible(data.vocabulary[id]));
const figure = v => v == null || Number.isNaN(v) ? '–'
  : Number.isInteger(v) ? v.toLocaleString('en')
  : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3 ? v.toExponential(2) : String(+v.toPrecision(4));
const others = array.tokens.length / data.T - data.held_out;
const texts = [[data.held_out, 'held-out'], [others, 'training']].filter(([contexts]) => contexts)
  .map(([contexts, of]) => `${figure(contexts * data.T)} ${of} tokens`).join(' and ');
const cell = v => v == null || typeof v === 'number' ? el('td.number', figure(v)) : el('td', v);
function table(head, rows, label = head.join(', ')) {
  const heading = (text, j) => el(typeof rows[0]?.[j] === 'number' ? 'th.number' : 'th', text);
  const th = (text, j) => text instanceof Element ? text : heading(text, j);
  return el('div.scroll', {tabindex: 0, role: 'region', 'aria-label': label}, el('table',
    el('thead', el('tr', head.map(th))), el('tbody', rows.map(row => el('tr', row.map(cell))))));
}

// Plots. An axis is a function from values to places, and about five round values with theirs.
const WIDTH = 380, HEIGHT = 230, LEFT = 56, RIGHT = 370, TOP = 8, BOTTOM = 190;
const ROUND = upTo(40).flatMap(p => [1, 2, 5].map(digit => digit * 10 ** (p - 20)));
function evenTicks(low, high) {
  const step = ROUND.find(v => v >= (high - low) / 4);
  const first = Math.ceil(low / step);
  return upTo(Math.floor(high / step + 1e-9) - first + 1).map(i => (first + i) * step);
}
function logTicks(low, high) {
  const near = ROUND.filter(v => Math.log10(v) >= low - 1e-9 && Math.log10(v) <= high + 1e-9);
  const ticks = high - low < 1.5 ? near : near.filter(v => Number.isInteger(Math.log10(v)));
  return ticks.length > 1 ? ticks : evenTicks(10 ** low, 10 ** high);
}
const tickLabel = v => !Number.isInteger(v) ? Math.abs(v) < 1e-3 ? v.toExponential() : String(v)
  : Math.abs(v) < 1e4 ? figure(v)
  : v.toLocaleString('en', {notation: 'compact', maximumSignificantDigits: 6});
function axis(values, log, from, to) {
  const scale = log ? Math.log10 : v => v;
  const scaled = values.map(scale);
  let [low, high] = [Math.min(...scaled), Math.max(...scaled)];
  if (high - low < 1e-9) [low, high] = [low - .5, high + .5];
  const at = v => from + (scale(v) - low) / (high - low) * (to - from);
  const ticks = (log ? logTicks : evenTicks)(low, high).map(v => +v.toPrecision(12));
  return Object.assign(at, {ticks: ticks.map(v => [at(v), tickLabel(v)])});
}
const line = (x1, x2, y1, y2) => draw('line.axis', {x1, x2, y1, y2});
const write = (x, y, text, style) => draw('text', {x, y, class: style}, text);
const grid = (x, y) => [
  x.ticks.map(([at, text]) => [line(at, at, TOP, BOTTOM), write(at, BOTTOM + 14, text)]),
  y.ticks.map(([at, text]) => [line(LEFT, RIGHT, at, at), write(LEFT - 4, at + 4, text, 'left')])];
const COLOURS = ['var(--blue)', 'rgb(var(--mark))', 'var(--ink)', 'var(--faint)'];
const DASHES = ['none', '6 3', '2 2', '8 2 2 2', '12 3'];
const look = (i, dash = DASHES[i % 5]) => `color: ${COLOURS[i % 4]}; stroke-dasharray: ${dash}`;
const legend = (s, i) => el('span.key', draw('svg', {viewBox: '0 0 30 8', 'aria-hidden': 'true',
  style: look(i)}, line(0, 30, 4, 4), draw('circle', {cx: 15, cy: 4, r: 3})), s.name);
// series: {name, points: [[x, y], ...], law: is it one}, laws last; bars: how wide, from x on.
function plot(title, xLabel, yLabel, series, {log = '', bars = 0} = {}) {
  const finite = s => s.points.filter(p => p.every(Number.isFinite));
  const drawable = p => (!log.includes('x') || p[0] > 0) && (!log.includes('y') || p[1] > 0);
  series = series.map(s => ({...s, all: finite(s), points: finite(s).filter(drawable)}));
  series = series.filter(s => s.points.length);
  if (!series.length) return null;
  const measured = series.filter(s => !s.law);
  const points = series.flatMap(s => s.points);
  const x = axis(points.flatMap(p => [p[0], p[0] + bars]), log.includes('x'), LEFT, RIGHT);
  const y = axis(points.flatMap(p => bars ? [0, p[1]] : p[1]), log.includes('y'), BOTTOM, TOP);
  const range = p => bars ? `${figure(p[0])} to ${figure(p[0] + bars)}` : figure(p[0]);
  const text = p => `${xLabel} ${range(p)}, ${yLabel} ${figure(p[1])}`;
  const tip = (s, p) => draw('title', s.name ? `${s.name}: ${text(p)}` : text(p));
  const radius = s => s.points.length > 60 ? 1.6 : 3;
  const dot = s => p => draw('circle', {cx: x(p[0]), cy: y(p[1]), r: radius(s)}, tip(s, p));
  const bar = s => p => draw('rect', {x: x(p[0]), width: Math.max(1, x(p[0] + bars) - x(p[0]) - 1),
    y: y(p[1]), height: Math.max(0, BOTTOM - y(p[1]))}, tip(s, p));
  const d = s => 'M' + s.points.map(p => [x(p[0]), y(p[1])]).join('L');
  const path = s => draw('path', {d: d(s)}, s.law && draw('title', s.name));
  const marks = (s, i) => draw('g', {style: look(i % measured.length, s.law && '1 4')},
    !bars && path(s), !s.law && s.points.map((bars ? bar : dot)(s)));
  const label = `${title}: ${yLabel} against ${xLabel}; the numbers are in the table below`;
  const svg = draw('svg', {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: 'img', 'aria-label': label},
    grid(x, y), write((LEFT + WIDTH) / 2, HEIGHT - 8, xLabel),
    draw('g', {transform: `rotate(-90 12 ${BOTTOM / 2})`}, write(12, BOTTOM / 2, yLabel)),
    series.map(marks));
  const many = series.length > 1;
  const row = (name, ...pair) => many ? [name, ...pair] : pair;
  const rows = series.flatMap(s => s.all.map(p => row(s.name, bars ? range(p) : p[0], p[1])));
  return el('figure', el('figcaption', title), svg, el('div', many && measured.map(legend),
    series.length > measured.length && el('span.key', 'dotted: the fitted law')),
    details('as a table', table(row('series', xLabel, yLabel), rows, title)));
}
function histogram(title, xLabel, {counts, edges} = {counts: [], edges: []}, yLabel = 'latents') {
  const used = upTo(counts.length).filter(i => counts[i]);
  const points = zip(edges, counts).slice(used[0], used.at(-1) + 1);
  return plot(title, xLabel, yLabel, [{points}], {bars: edges[1] - edges[0]});
}
// All runs against x: a curve for each value of `each`, and the law through it.
function runs(x, xLabel, each) {
  const all = data.runs.map(run => ({...run, n: run.n_latents})).sort((a, b) => a[x] - b[x]);
  const values = [...new Set(all.map(run => run[each]))].sort((a, b) => a - b);
  const along = (y, v) => all.filter(run => run[each] === v).map(run => [run[x], run[y]]);
  const curves = values.map(v => ({name: `${each} = ${v}`, points: along('nmse', v)}));
  const laws = values.map(v => ({name: `law, ${each} = ${v}`, points: along('law', v), law: true}));
  return plot('All runs: NMSE against ' + x, xLabel, 'NMSE', [...curves, ...laws], {log: 'xy'});
}
// Each figure of the runs given together against L0, a line for each activation function.
function frontier(figure) {
  const kinds = [...new Set(data.frontier.map(row => row.activation))];
  const of = kind => data.frontier.filter(row => row.activation === kind);
  const points = kind => of(kind).map(row => [row.L0, row[figure]]).sort((a, b) => a[0] - b[0]);
  const series = kinds.map(name => ({name, points: points(name)}));
  return plot(`All runs: ${figure} against L0`, 'L0', figure, series, {log: 'x'});
}
function overview() {
  const {tokens, nmse, val_nmse, dead, l0, tokens_per_s} = data.curves;
  const {log10_density, log10_mean_square, positions = {}, test_time_k: other = {}} = data.plots;
  const place = 'position in the context';
  const curve = (x, y, name) => ({name, points: zip(x, y)});
  const titled = (title, head, rows) => rows[0] && [el('h2', title), table(head, rows, title)];
  show(el('h1', 'Sparse autoencoder'), el('p', data.about),
    el('p', `${figure(data.n_live)} latents are shown, on ${texts}; `,
      el('a', {href: '#latents'}, 'the table of all of them'), '.'),
    el('h2', 'Plots'), el('div.plots',
      plot('Training: NMSE', 'tokens', 'NMSE', [curve(tokens, nmse, 'training batches'),
        curve(tokens, val_nmse, 'held-out')], {log: 'y'}),
      plot('Training: dead latents', 'tokens', 'latents', [curve(tokens, dead)]),
      plot('Training: L0', 'tokens', 'latents a token', [curve(tokens, l0)]),
      plot('Training: speed', 'tokens', 'tokens a second', [curve(tokens, tokens_per_s)]),
      histogram('How often latents fire, held-out', 'log10 of the share of tokens', log10_density),
      histogram('Mean square activation, held-out', 'log10 E[z²]', log10_mean_square),
      histogram('Activations of the latents shown', 'activation', data.activations, 'tokens'),
      plot('NMSE by position', place, 'NMSE', [curve(upTo(data.T), positions.nmse)]),
      plot('Norm of the input by position', place, 'norm', [curve(upTo(data.T), positions.norm)]),
      plot('NMSE at other k', "k'", 'NMSE', [curve(other.at, other.nmse)], {log: 'xy'}),
      plot('ΔCE at other k', "k'", 'nats a token', [curve(other.at, other.delta_ce)], {log: 'xy'}),
      runs('n', 'latents n', 'k'), runs('k', 'k', 'n'),
      data.frontier[0] && data.compared.filter(name => name !== 'L0').map(frontier)),
    titled('Metrics', ['metric', 'value', '± standard error', 'unit', 'sample'], data.metrics),
    titled('Probe tasks: loss on the held-out half, nats',
      ['task', 'best latent', 'best channel', 'majority'], data.tasks),
    titled('Densest latents, and correlations',
      ['latent', 'share of tokens', 'antipodality', 'position', 'its rank', 'first token',
        'repetition'],
      data.dense.map(([id, ...row]) => [link(id), ...row])),
    titled('Runs given together', ['run', 'n', 'k', 'tokens', 'NMSE in training'],
      data.runs.map(run => [run.path, run.n_latents, run.k, run.tokens, run.nmse])));
}

// The table of latents. Its order, of ranks r, is the order in which the arrow keys step.
const n2g = data.rows ? [] : ['N2G precision', 'N2G recall'];
n2g.forEach((name, j) => array[name] = Array.from(array.latent, id => data.n2g[id]?.[j] ?? NaN));
const statistics = [...Object.keys(data.stats), ...n2g];
const numbers = r => statistics.map(name => array[name][r]);
const fires = r => Math.round(array.density[r] * array.tokens.length);
const mainOf = (r, many) => pairsOf('main', 'main share', 5, r).slice(0, many).filter(([, n]) => n);
const mainTokens = (r, many) => data.rows ? [] : mainOf(r, many)
  .map(([id, share]) => el('span', word(id), ` ${Math.round(100 * share / 255)} % `));
// Whether a text has a query, as it is or as shown; outer spaces count if there is nothing else.
const plain = query => (query.trim() || query).toLowerCase();
const matches = (query, text) =>
  [text, visible(text)].some(form => form.toLowerCase().includes(plain(query)));
const view = {by: 'latent', up: true, wanted: '', fewest: 0, rows: 100};
let order = [];
function arrange(change) {
  Object.assign(view, change);
  const wanted = r => mainOf(r, 3).some(([id]) => matches(view.wanted, data.vocabulary[id]));
  order = upTo(data.n_live).filter(r => fires(r) >= view.fewest && (!view.wanted || wanted(r)));
  const compare = (a, b) => Number.isNaN(a) - Number.isNaN(b) || (view.up ? a - b : b - a);
  const values = array[view.by];
  order.sort((r, s) => compare(values[r], values[s]));
}
function refill(change) {  // not the fields and buttons, so that they keep the focus
  arrange(change);
  const row = r => el('tr', el('td.number', link(array.latent[r], array.latent[r])),
    [...numbers(r), mainTokens(r, 3)].map(cell));
  document.querySelector('tbody').replaceChildren(...order.slice(0, view.rows).map(row));
  const way = view.up ? 'ascending' : 'descending';
  for (const th of document.querySelectorAll('th[data-by]'))
    th.setAttribute('aria-sort', th.dataset.by === view.by ? way : 'none');
  byId('more').hidden = view.rows >= order.length;
  say(`${figure(order.length)} of ${figure(data.n_live)} latents`);
}
function latents() {
  const sort = by => refill({by, up: view.by === by ? !view.up : by === 'latent'});
  const th = by => el('th.number', {'data-by': by}, button(by, () => sort(by)));
  const field = (label, type, name, read) => el('label', label + ' ', el('input', {type, size: 10,
    value: view[name], onchange: event => refill({[name]: read(event.target.value), rows: 100})}));
  show(el('h1', 'Latents'),
    el('p.columns', field('fires on', 'search', 'wanted', String),
      field('on at least this many tokens', 'number', 'fewest', Number)),
    el('p.faint', `On ${texts}. density: share of tokens it fires on; mean, skew, kurtosis, max: `
      + 'of its activations where it fires; mean square: over all tokens.'),
    data.normalized && el('p.faint', 'The inputs have norm 1.'),
    table([...['latent', ...statistics].map(th), 'fires on'], [], 'all latents'),
    el('p', button('More rows', () => refill({rows: view.rows + 500}), 'more')));
  refill();
}

// One latent.
function exampleOf(r, i) {
  const e = start['per latent'][r] + i;
  const context = array.context[e];
  const tokens = rowOf('tokens', data.T, context).map(id => data.vocabulary[id]);
  const acts = tokens.map(() => 0);
  for (let p = start.pairs[e]; p < start.pairs[e + 1]; p++)
    acts[array.position[p]] = array.value[p] / 65535 * array.max[r];
  return {context, tokens, acts, peak: acts.indexOf(Math.max(...acts))};
}
function contextView(r, i) {
  const {context, tokens, acts, peak} = exampleOf(r, i);
  const share = t => acts[t] / array.max[r];
  const token = (text, t) => el(t === peak ? 'span.token peak' : 'span.token',
    {title: `${text}  ${figure(acts[t])}`, style: acts[t] ? `--share: ${share(t)}` : null}, text);
  const rows = zip(tokens.map(visible), acts).map((row, t) => [t, ...row]).filter(row => row[2]);
  const source = context < data.held_out ? 'held-out' : 'training';
  const row = data.rows && figure(array.rows[context]);
  const what = row ? `row ${row} and on, ${source}` : `${source} text`;
  const percent = Math.round(100 * share(peak));
  const first = data.flat && array.rows[context];
  if (data.flat) return el('ul', acts.map((v, t) => [t, v]).filter(([, v]) => v).map(([t, v]) =>
    el('li', `row ${figure(first + t)}, ${source}: ${figure(v)}`)));
  return el('div', el('div.context', tokens.map(visible).map(token)),
    details(`peak ${figure(acts[peak])}, ${percent} % of its maximum, ${what}; values`,
      table(['position', 'token', 'activation'], rows)));
}
function effects(r, name, unit, scale) {
  if (!array[name]) return el('p.faint', 'not defined at this site');
  const k = data.top;
  const rows = pairsOf(name, name + ' value', 2 * k, r).map(([id, v]) => [word(id), v * scale]);
  const list = (title, some) => el('div', title, table(['token', unit], some, title));
  return el('div.columns', list('raises', rows.slice(0, k)), list('lowers', rows.slice(k)));
}
function latent(id) {
  const r = rankOf(id);
  if (r < 0) return show(el('h1', 'Latent ' + id),
    el('p', 'It does not fire on this text, or is not part of this report.'));
  if (!order.includes(r)) arrange({wanted: '', fewest: 0});
  const examples = upTo(array['per latent'][r]).map(i => contextView(r, i));
  const patterns = data.patterns[id]?.map(pattern => el('li', pattern));
  const [loss, kl] = data.rows ? [] : rowOf('effect size', 2, r);
  const change = Number.isNaN(loss) ? 'no next token is there to lose on'
    : `the loss changes by ${figure(loss)}`;
  const near = pairsOf('near', 'near cosine', data.near, r).filter(([other]) => other !== +id);
  const row = ([o, cosine]) => rankOf(o) < 0 ? ['latent ' + o, cosine / 32767, '–']
    : [link(o), cosine / 32767, mainTokens(rankOf(o), 2)];
  const bars = array.max[r] / data.bins;
  const points = rowOf('histogram', data.bins, r).map((n, i) => [i * bars, n]);
  show(el('h1', 'Latent ' + id),
    el('p', button('← previous', () => stepBy(-1), 'previous'), ' ',
      button('next →', () => stepBy(1), 'next'), el('span.faint',
        ` ${order.indexOf(r) + 1} of ${order.length}, in the order of the table`)),
    !data.rows && el('p', 'Fires on ', mainTokens(r, 5),
      el('span.faint', '(share of its activation)')),
    table(statistics, [numbers(r)], 'statistics'),
    el('h2', data.flat ? 'Rows with the highest, and those read with them' : 'Highest contexts'),
    examples.slice(0, data.examples),
    examples[data.examples] && el('h2', 'From the highest to the lowest'),
    examples.slice(data.examples),
    patterns && [el('h2', 'N2G patterns'), el('p.faint',
      '^ start of the context, * any token; the activation predicted'), el('ul', patterns)],
    el('div.columns',
      !data.rows && el('section', el('h2', 'Next tokens: direct effect'), el('p.faint',
        'decoder row through the final norm and the unembedding, relative to the largest'),
        effects(r, 'direct', 'relative', 1 / 32767)),
      !data.rows && el('section', el('h2', 'Next tokens: measured effect'), el('p.faint',
        `at its highest activation; without it ${change}, KL is ${figure(kl)} nats`),
        effects(r, 'effect', 'nats', 1)),
      el('section', plot('Activations where it fires', 'activation', 'tokens', [{points}], {bars}),
        el('h2', 'Nearest decoder rows'), table(['latent', 'cosine', 'fires on'], near.map(row)))));
}
const visit = r => location.hash = 'latent/' + array.latent[r];
function stepBy(by) {
  const at = order.indexOf(rankOf(location.hash.split('/')[1])) + by;
  if (order.length) visit(order.at(at % order.length));
}

// A latent is found by the tokens that carry its activation, and by what ends at its highest one.
function search(query = '') {
  const exact = text => plain(text) === plain(query) || visible(text) === query;
  const worth = data.vocabulary.map(text => exact(text) ? 4 : matches(query, text) ? 1 : 0);
  const carried = r => Math.max(0, ...mainOf(r, 5).map(([id, share]) => worth[id] * share / 255));
  const ending = ({tokens, peak}) => tokens.slice(0, peak + 1).slice(-4).join('');
  const ended = r => matches(query, ending(exampleOf(r, 0))) ? .3 : 0;
  const trust = r => 1 - Math.exp(-fires(r) / 10);  // what fires once proves little
  const found = upTo(query ? data.n_live : 0).map(r => [(carried(r) + ended(r)) * trust(r), r])
    .filter(([score]) => score > 0).sort((a, b) => b[0] - a[0]);
  const more = found.length > 100 ? '; the first 100' : '';
  say(found.length ? `${figure(found.length)} found${more}` : 'none found');
  const row = ([, r]) => [link(array.latent[r]), array.density[r], array.max[r], mainTokens(r, 4)];
  show(el('h1', `Latents for “${query}”`),
    table(['latent', 'density', 'max', 'fires on'], found.slice(0, 100).map(row)));
}

// The address says what is shown: #overview, #latents, #latent/NUMBER or #search/WORD.
const decoded = text => { try { return decodeURIComponent(text); } catch { return text; } };
function route() {
  const [page, what] = decoded(location.hash.slice(1)).split(/\/(.*)/s);
  say('');
  document.title = page === 'latent' ? 'Latent ' + what : 'Sparse autoencoder';
  ({latents, latent, search}[page] || overview)(what);
  for (const a of document.querySelectorAll('nav a'))
    a.setAttribute('aria-current', a.hash === '#' + (page || 'overview') ? 'page' : 'false');
  scrollTo(0, 0);
}
addEventListener('hashchange', () => {
  const focused = document.activeElement?.id;
  route();
  (byId(focused) || byId('main')).focus({preventScroll: true});  // keyboards go on where they were
});
const random = () => visit(Math.floor(Math.random() * data.n_live));
byId('random').addEventListener('click', random);
byId('search').hidden = !!data.rows;  // there are no words
byId('search').addEventListener('submit', event => {
  event.preventDefault();
  location.hash = 'search/' + encodeURIComponent(byId('query').value);
});
addEventListener('keydown', event => {
  if (event.target.matches('input') || event.ctrlKey || event.metaKey || event.altKey) return;
  const steps = location.hash.startsWith('#latent/') && !event.target.closest('.scroll');
  const by = steps && {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (by || event.key === '/') event.preventDefault();
  if (by) stepBy(by);
  if (event.key === '/') byId('query').focus();
  if (event.key === 'r') random();
});
arrange();
route();
"""

if __name__ == "__main__":
    harvest.run_main(main)
