"""
evals.py: an autoencoder -> the paper's metrics, as a table and as JSON.

    python evals.py runs/n32768_k32                     # a run of sae.py; reads the activations it was trained on
    python evals.py 8.pt --model gpt2 --layer 8         # one of OpenAI's released autoencoders

One function a metric. Each takes an SAE and plain tensors or a model, and returns a dict of numbers; a key ending in `_se`
is the standard error of the mean of the number before it. Losses are in nats per token.

    reconstruction   NMSE and L0                                         section 2.1
    density          how often each latent fires; dead and rare ones     appendix
    downstream       cross-entropy, ΔCE, KL, loss recovered, compute     section 4.1
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import harvest
from harvest import SITES, UserError
from sae import SAE, keep_heap, normalize

CHUNK = 8192  # tokens encoded at a time


def unit(sae, x):
    """Raw activations (N, d) as the autoencoder sees them: normalised, unless it was released for raw inputs."""
    x = x.to(sae.W_dec.device, sae.W_dec.dtype)
    return normalize(x)[0] if sae.normalized else x


# --------------------------------------------------------------------------------------------------
# Reconstruction and density, section 2.1.


@torch.no_grad()
def reconstruction(sae, x, k=None):
    """Raw activations x (N, d) or (contexts, T, d) -> nmse (squared error over that of always predicting their mean, both normalised),
    l0 (mean count of active latents), norm_ratio (mean norm of the reconstruction over that of the input).

    The standard error is over the first dimension: tokens of one context are not independent.
    """
    errors, norms, active, total, square = [], 0.0, 0, 0.0, 0.0
    for chunk in x.flatten(0, -2).split(CHUNK):
        u = unit(sae, chunk)
        values, indices = sae.encode(u, k)
        u_hat = sae.decode(values, indices)
        errors.append((u - u_hat).square().sum(1).double())
        active += int((values > 0).sum())
        norms += (u_hat.norm(dim=1) / u.norm(dim=1).clamp_min(1e-30)).sum().item()
        total, square = total + u.sum(0).double(), square + u.square().sum().double()
    n = x.flatten(0, -2).shape[0]
    variance = (square / n - (total / n).square().sum()).clamp_min(1e-30)
    nmse = torch.cat(errors).view(len(x), -1).mean(1) / variance
    return {"nmse": nmse.mean().item(), "nmse_se": standard_error(nmse), "l0": active / n, "norm_ratio": norms / n, "tokens": n}


def standard_error(samples):
    """Of the mean of samples (N); nan for one sample."""
    return (samples.std() / math.sqrt(len(samples))).item() if len(samples) > 1 else math.nan


@torch.no_grad()
def latent_counts(sae, x):
    """Raw activations x (N, d) -> how many of the N tokens each latent fires on, (n) int64."""
    counts = torch.zeros(sae.n_latents, dtype=torch.long, device=sae.W_dec.device)
    for chunk in x.split(CHUNK):
        values, indices = sae.encode(unit(sae, chunk))
        counts += torch.bincount(indices[values > 0], minlength=sae.n_latents)
    return counts


def density(sae, x, rare=1e-4):
    """Fractions of latents that never fire on x (N, d), and that fire on fewer than `rare` of its tokens (the silent ones included)."""
    share = latent_counts(sae, x) / len(x)
    return {"silent": (share == 0).double().mean().item(), "rare": (share < rare).double().mean().item(), "densest": share.max().item(), "tokens": len(x)}


# --------------------------------------------------------------------------------------------------
# Downstream loss, section 4.1: what the language model loses when it must go on with the reconstruction.


def compute_equivalent(curve, delta_ce):
    """The share of the model's training compute at which its own loss was `delta_ce` nats above its final one.

    curve: list of {"flops", "loss"}; interpolated in log-compute. Returns None where the curve does not reach: (value, reason).
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
def downstream(sae, model, tokens, layer, site, mean=None):
    """Replace the activation by its reconstruction at every position of tokens (C, T), run the rest of the model, and compare.

    sae: an SAE, or any function from activations (B, T, d) to their replacement. mean (d): the activation for mean ablation
    (default: the mean over `tokens`). Returns ce, ce_sae, delta_ce, kl (original || patched), ce_zero, ce_mean, recovered_zero and
    recovered_mean ((CE_ablated - CE_sae) / (CE_ablated - CE); zero ablation flatters it), compute_equivalent (or None, with
    compute_equivalent_why), in nats per token. Standard errors are over contexts.
    """
    if mean is None:
        mean = harvest.activations(model, tokens, layer, site).flatten(0, 1).mean(0)
    edits = {"ce_sae": sae, "ce_zero": torch.zeros_like, "ce_mean": lambda a: mean.to(a).expand_as(a)}
    sums = {name: [] for name in ("ce", "kl", *edits)}  # one mean a context
    size = max(1, 2**24 // (model.config.n_vocab * tokens.shape[1]))
    progress = harvest.Progress(len(tokens), "downstream", " contexts")
    for chunk in tokens.split(size):
        chunk = chunk.to(model.device)
        labels = chunk[:, 1:, None]
        clean = F.log_softmax(model(chunk)[:, :-1], dim=-1)
        sums["ce"].append(-clean.gather(2, labels).mean((1, 2)))
        for name, edit in edits.items():
            patched = F.log_softmax(model(chunk, layer, site, edit)[:, :-1], dim=-1)
            sums[name].append(-patched.gather(2, labels).mean((1, 2)))
            if name == "ce_sae":
                sums["kl"].append((clean.exp() * (clean - patched)).sum(-1).mean(1))
        progress(min(len(sums["ce"]) * size, len(tokens)))
    progress.finish()
    per = {name: torch.cat(parts).double() for name, parts in sums.items()}
    per["delta_ce"] = per["ce_sae"] - per["ce"]
    m = {name: v.mean().item() for name, v in per.items()}
    out = {}
    for name in ("ce", "ce_sae", "delta_ce", "kl", "ce_zero", "ce_mean"):
        out |= {name: m[name], name + "_se": standard_error(per[name])}
    for name in ("zero", "mean"):
        gap = m[f"ce_{name}"] - m["ce"]
        out[f"recovered_{name}"] = (m[f"ce_{name}"] - m["ce_sae"]) / gap if gap else math.nan
    out["compute_equivalent"], out["compute_equivalent_why"] = compute_equivalent(model.curve, m["delta_ce"])
    return out | {"contexts": len(tokens), "tokens": len(tokens) * (tokens.shape[1] - 1)}


# --------------------------------------------------------------------------------------------------
# The command line.

ROWS = [  # metric, key, what the table says, unit
    ("held_out", "nmse", "NMSE, held-out", ""),
    ("train", "nmse", "NMSE, training text", ""),
    ("held_out", "l0", "L0", "latents/token"),
    ("held_out", "norm_ratio", "norm of reconstruction / input", ""),
    ("density", "silent", "latents silent on held-out text", "of n"),
    ("density", "rare", "latents firing on < 1e-4 of tokens", "of n"),
    ("density", "densest", "densest latent", "of tokens"),
    ("downstream", "ce", "CE of the model itself", "nats/token"),
    ("downstream", "ce_sae", "CE with the reconstruction", "nats/token"),
    ("downstream", "delta_ce", "ΔCE", "nats/token"),
    ("downstream", "kl", "KL(original || patched)", "nats/token"),
    ("downstream", "ce_mean", "CE, mean ablation", "nats/token"),
    ("downstream", "ce_zero", "CE, zero ablation", "nats/token"),
    ("downstream", "recovered_mean", "loss recovered against mean ablation", ""),
    ("downstream", "recovered_zero", "loss recovered against zero ablation", ""),
    ("downstream", "compute_equivalent", "compute-equivalent", "of training"),
]


def table(results):
    """Results (dict of the metrics' dicts) -> the lines of a table: value, standard error, unit, sample size."""
    lines = [results["about"]]
    for metric, key, label, unit_ in ROWS:
        if metric in results and key in results[metric]:
            r = results[metric]
            value = f"{r[key]:10.4f}" if r[key] is not None else f"         -  ({r[key + '_why']})"
            error = f" ± {r[key + '_se']:.4f}" if math.isfinite(r.get(key + "_se", math.nan)) else ""
            lines.append(f"  {label:<38}{value}{error:<10} {unit_:<14} {r['tokens']:>9,} tokens")
    return lines


def load(path, device):
    """A run directory or a file -> (SAE, its file, the JSON file for its results)."""
    path = Path(path)
    if path.is_file():
        return SAE.load(path, device), path, path.with_suffix(".evals.json")
    if not (path / "sae.pt").exists() and (path / "checkpoint.pt").exists():
        raise UserError(f"{path} is not finished; continue it with: python sae.py --resume --out {path} and the options it was started with")
    return SAE.load(path / "sae.pt" if path.is_dir() else path, device), path / "sae.pt", path / "evals.json"


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", help="a directory under runs/, or a file: sae.pt or one of OpenAI's autoencoders")
    p.add_argument("--acts", help="harvested activations; default: those it was trained on, else text is run through --model")
    p.add_argument("--model", help="subject model where there are no harvested activations (default: the one it was trained on)")
    p.add_argument("--layer", type=int, help="default: the one it was trained on, else two thirds of the depth")
    p.add_argument("--site", help=f"default: the one it was trained on, else resid_post_mlp; one of {', '.join(SITES)}")
    p.add_argument("--text", help="text where there are no harvested activations (default: what the model was trained on)")
    p.add_argument("--tokens", type=int, default=0, help="held-out tokens for NMSE and density; 0: 2^18 on CUDA, 2^16 on CPU")
    p.add_argument("--contexts", type=int, default=0, help="held-out contexts for the downstream loss; 0: 2048 on CUDA, 512 on CPU")
    p.add_argument("--device", default="", help="cuda or cpu; default: cuda if there")
    p.add_argument("--again", action="store_true", help="compute everything anew")
    p.add_argument("--json", action="store_true", help="print JSON instead of the table")
    a = p.parse_args(argv)
    keep_heap()
    device = harvest.pick_device(a.device)
    cuda = device.startswith("cuda")
    n_contexts = a.contexts or (2048 if cuda else 512)
    n_tokens = a.tokens or (2**18 if cuda else 2**16)
    began = time.time()
    sae, file, out = load(a.run, device)
    trained = sae.meta

    acts = a.acts or trained.get("config", {}).get("acts")
    asked = {name: value for name in ("model", "layer", "site", "text") if (value := getattr(a, name)) is not None}
    place = {name: trained[name] for name in ("model", "layer", "site", "text") if name in trained} | asked
    if a.acts or (acts and harvest.is_harvested(acts) and all(harvest.read_meta(acts)[name] == value for name, value in place.items())):
        held_out, train = harvest.Acts(acts, "val"), harvest.Acts(acts, "train")
        where = train.meta
        for name, value in place.items():
            if where[name] != value:
                raise UserError(f"{acts} holds {name} {where[name]}, but {a.run} {'is asked about' if name in asked else 'was trained on'} {name} {value}; give other --acts")
        val_tokens, val = held_out.sample(max(n_tokens, n_contexts * where["context"]))
        seen = train.sample(n_tokens)[1]
        model, _ = harvest.load_model(where["model"], device)
    else:
        model, encoding = harvest.load_model(place.get("model", "auto"), device, needs_text="text" not in place)
        text = place.get("text") or harvest.default_text(model)
        held_out = harvest.Stream(model, encoding, text, place.get("layer"), place.get("site", "resid_post_mlp"), trained.get("context"))
        where, seen = held_out.meta, None
        val_tokens, val = held_out.sample(max(n_tokens, n_contexts * where["context"]))
    if where["d_model"] != sae.d_model:
        raise UserError(f"{a.run} is for activations of width {sae.d_model}, these have {where['d_model']}; give its own --model, --layer and --site")
    layer, site, text = where["layer"], where["site"], where["text"]
    chosen, val = val_tokens[:n_contexts], val[: max(1, n_tokens // where["context"])].float()

    kind = f"TopK k = {sae.k}" if sae.k < sae.n_latents else "ReLU"
    results = {"about": f"{a.run}: {where['model']}, layer {layer}, {site}, d = {sae.d_model}, n = {sae.n_latents}, {kind}; text: {text}"}
    results["settings"] = {"where": where, "tokens": n_tokens, "contexts": n_contexts, "trained": trained,
                           "file": [str(file), file.stat().st_size, file.stat().st_mtime]}  # fmt: skip

    # What an earlier call found with the same settings is kept, so an interrupted evaluation goes on where it stopped.
    earlier = json.loads(out.read_text()) if out.exists() and not a.again else {}
    if json.loads(json.dumps(results["settings"])) == earlier.get("settings"):
        results = earlier

    def measure(name, metric, *args):
        if name not in results:
            results[name] = metric(*args)
            harvest.write_json(out, results)

    measure("held_out", reconstruction, sae, val)
    if seen is not None:
        measure("train", reconstruction, sae, seen.float())
    measure("density", density, sae, val.flatten(0, 1))
    measure("downstream", downstream, sae, model, chosen, layer, site, val.mean((0, 1)))
    print(json.dumps(results, indent=1) if a.json else "\n".join(table(results)))
    print(f"{time.time() - began:.0f} s; written to {out}", file=sys.stderr)


if __name__ == "__main__":
    harvest.run_main(main)
