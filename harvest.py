"""
harvest.py: text -> tokens -> GPT-2 -> activations, on disk or streamed.

    python harvest.py                                    # GPT-2 small if it can be had, else the embedded model
    python harvest.py --model stdlib --out acts          # the embedded model: nothing to download
    python harvest.py --model gpt2 --layer 8 --site resid_post_mlp --text my_texts/ --tokens 2000000

What is here, from top to bottom:
    GPT2             the subject model in plain PyTorch; every site can be read (stopping early) or edited
    load_model       published weights (Hugging Face's names and shapes), local files, or `stdlib`
    documents        .txt, .jsonl, .jsonl.gz, folders, standard input, or OpenAI's WebText sample
    stdlib           a small real language model, trained in about four minutes on Python's own source text
    harvest, Acts    activations written to shards (resumable, atomic) and read back, shuffled
    Stream           the same batches without a disk

On disk, for one directory `acts/`:
    meta.json                    what was harvested, how much, and whether it is complete
    {train,val}/tokens-00000.npy int32   (contexts, T)
    {train,val}/acts-00000.npy   float16 (contexts, T, d)
"""

import argparse
import errno
import functools
import gzip
import hashlib
import heapq
import http.client
import itertools
import json
import math
import os
import platform
import socket
import sys
import sysconfig
import time
import urllib.request
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

SITES = ("resid_delta_attn", "resid_post_attn", "resid_delta_mlp", "resid_post_mlp", "mlp_post_act")
CACHE = Path(os.environ.get("SAE_CACHE", Path(__file__).parent / "cache"))
PUBLISHED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
WEIGHTS_URL = "https://huggingface.co/openai-community/{}/resolve/main/model.safetensors"
WEBTEXT_URL = "https://openaipublic.blob.core.windows.net/gpt-2/output-dataset/v1/webtext.train.jsonl"
EOT = "<|endoftext|>"
SHARD = 1024  # contexts in one shard: 65,536 tokens, 100 MB at d = 768
FORMAT = 2  # of harvested directories, and the build of the embedded model


class UserError(ValueError):
    """Something the user can put right: printed as one line, exit status 2."""


def run_main(main):
    """Run a script's main(). What the user can put right ends it with one line on stderr; SAE_DEBUG=1 shows tracebacks."""
    try:
        return main()
    except (ValueError, OSError, KeyboardInterrupt) as e:
        if os.environ.get("SAE_DEBUG"):
            raise
        if isinstance(e, KeyboardInterrupt):
            message, status = f"\n{e if e.args else 'interrupted'}", 130
        elif isinstance(e, OSError) and e.errno == errno.ENOSPC:
            message, status = "error: no space left on the disk; what was complete is kept: free some room and run again", 2
        else:
            message, status = f"error: {e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else f"error: {e}", 2
    print(message, file=sys.stderr)
    sys.exit(status)


def pick_device(name=""):
    """"" -> cuda if there, else cpu; a name is checked. Raises UserError."""
    if name.startswith("cuda") and not torch.cuda.is_available() or name and not name.startswith(("cuda", "cpu")):
        raise UserError(f"no device {name} here; use --device {'cuda or ' * torch.cuda.is_available()}cpu")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


# --------------------------------------------------------------------------------------------------
# GPT-2. Parameters carry Hugging Face's names and shapes, so published weights load as they are.


@dataclass(frozen=True)
class GPT2Config:
    n_vocab: int = 50257
    n_ctx: int = 1024
    d_model: int = 768
    n_layer: int = 12
    n_head: int = 12


class Conv1D(nn.Module):
    """x W + b, with W stored (in, out) as in OpenAI's checkpoints."""

    def __init__(self, d_in, d_out, std=0.02):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out) * std)
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, x):
        return F.linear(x, self.weight.T, self.bias)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.c_attn = Conv1D(c.d_model, 3 * c.d_model)
        self.c_proj = Conv1D(c.d_model, c.d_model, 0.02 / math.sqrt(2 * c.n_layer))

    def forward(self, x):
        B, T, d = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, T, d/heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, d))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_fc = Conv1D(c.d_model, 4 * c.d_model)
        self.c_proj = Conv1D(4 * c.d_model, c.d_model, 0.02 / math.sqrt(2 * c.n_layer))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(c.d_model), Attention(c)
        self.ln_2, self.mlp = nn.LayerNorm(c.d_model), MLP(c)

    def forward(self, x, tap):
        """x (B, T, d) -> (B, T, d). `tap(site, act) -> act` sees, and may replace, each of the five SITES."""
        x = tap("resid_post_attn", x + tap("resid_delta_attn", self.attn(self.ln_1(x))))
        h = tap("mlp_post_act", F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh"))
        return tap("resid_post_mlp", x + tap("resid_delta_mlp", self.mlp.c_proj(h)))


class _Found(Exception):
    """Ends a forward pass at the site that was asked for."""


class GPT2(nn.Module):
    """GPT-2 (pre-LayerNorm transformer, learned positions, tanh GELU, tied unembedding).

    `name` says which model this is; `curve` is its own held-out loss against training FLOPs,
    a list of {"flops", "loss"}, where known (`stdlib`), else empty.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.name, self.curve = config, "gpt2-random", []
        self.wte = nn.Embedding(config.n_vocab, config.d_model)
        self.wpe = nn.Embedding(config.n_ctx, config.d_model)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.01)

    def forward(self, tokens, layer=None, site=None, edit=None):
        """tokens (B, T) integers -> logits (B, T, V).

        With `edit`, the activation at `site` of block `layer` (0-based) is replaced by `edit(activation)`
        and the rest of the model runs on that.
        """

        def tap(i, name, act):
            return edit(act) if i == layer and name == site else act

        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for i, block in enumerate(self.h):
            x = block(x, functools.partial(tap, i))
        return F.linear(self.ln_f(x), self.wte.weight)

    def acts(self, tokens, layer, site):
        """tokens (B, T) -> the activation (B, T, d_site) at `site` of block `layer`; nothing above it is computed."""
        self.check_site(layer, site)

        def stop(act):
            raise _Found(act)

        try:
            self(tokens, layer, site, stop)
        except _Found as found:
            return found.args[0]

    def check_site(self, layer, site):
        """Raises UserError unless this model has that layer and site."""
        if site not in SITES:
            raise UserError(f"unknown site {site!r}; choose one of {', '.join(SITES)}")
        if not 0 <= layer < self.config.n_layer:
            raise UserError(f"{self.name} has no layer {layer}; choose 0 to {self.config.n_layer - 1}")

    def load_state_dict(self, state, *args, **kwargs):
        """Accepts published state dicts: an optional `transformer.` prefix, mask buffers and a tied `lm_head.weight`."""
        state = {name.removeprefix("transformer."): w for name, w in state.items()}
        extra = (".attn.bias", ".attn.masked_bias", "lm_head.weight")
        return super().load_state_dict({name: w for name, w in state.items() if not name.endswith(extra)}, *args, **kwargs)

    @property
    def device(self):
        return self.wte.weight.device


def site_width(config, site):
    """Width d of the activations at `site`."""
    return 4 * config.d_model if site == "mlp_post_act" else config.d_model


def forward_precision(device):
    """bf16 products on CUDA. The residual stream itself stays float32: autocast adds bf16 updates to a float32 stream."""
    return torch.autocast("cuda", torch.bfloat16, enabled=torch.device(device).type == "cuda")


# --------------------------------------------------------------------------------------------------
# Weights: fetched, local, or trained here.


def download(url, path):
    """Fetch `url` to `path` with a progress bar. `path` appears only once every byte has arrived. Raises UserError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as r:
            size = int(r.headers["Content-Length"] or 0)
        torch.hub.download_url_to_file(url, str(part))
        if size and part.stat().st_size != size:
            raise OSError(f"got {part.stat().st_size} of {size} bytes")
        part.replace(path)
    except (OSError, http.client.HTTPException) as e:
        if getattr(e, "errno", None) == errno.ENOSPC:
            raise
        raise UserError(f"cannot download {url} ({getattr(e, 'reason', e)}); copy it to {path} by hand, name your own --text, or use --model stdlib") from e
    finally:
        part.unlink(missing_ok=True)
        socket.setdefaulttimeout(timeout)


def read_safetensors(path):
    """A .safetensors file as a dict of tensors: 8 bytes of header length, a JSON header, raw little-endian buffers."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
              "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
    raw = bytearray(Path(path).read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(bytes(raw[8:start]))
    header.pop("__metadata__", None)
    if len(raw) - start != max((t["data_offsets"][1] for t in header.values()), default=0):
        raise ValueError("truncated")
    return {
        name: torch.frombuffer(raw, dtype=dtypes[t["dtype"]], count=math.prod(t["shape"]), offset=start + t["data_offsets"][0]).view(t["shape"])
        for name, t in header.items()
    }  # fmt: skip


def read_weights(path):
    """A file or folder of weights -> (state dict, number of heads or None, extras).

    Knows `model.safetensors`, `pytorch_model.bin`, a plain state dict, and what `train_stdlib` saves. Raises UserError.
    """
    path, n_head = Path(path), None
    if path.is_dir():
        if (path / "config.json").exists():
            n_head = json.loads((path / "config.json").read_text()).get("n_head")
        found = [path / f for f in ("model.safetensors", "pytorch_model.bin") if (path / f).exists()] or sorted(path.glob("*.pt"))
        if not found:
            raise UserError(f"{path} holds no model.safetensors, pytorch_model.bin or .pt file")
        path = found[0]
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path), n_head, {}
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no weights at {path}; --model takes {', '.join(PUBLISHED)}, stdlib, auto, or a path") from None
    except Exception as e:
        raise UserError(f"{path} is not a readable weight file ({type(e).__name__}: {str(e).splitlines()[0][:80]}); delete it and run again") from e
    return (state["state"], state["config"]["n_head"], state) if "merges" in state else (state, n_head, {})


def load_model(name_or_path="auto", device="cpu", needs_text=False):
    """-> (GPT2 in eval mode without gradients, tiktoken.Encoding).

    name_or_path: gpt2, gpt2-medium, gpt2-large, gpt2-xl (weights fetched once into cache/), `stdlib` (trained once, cached),
    `auto` (gpt2 if its weights, and its text where `needs_text`, are cached or can be downloaded, else stdlib; says which and why),
    or a file or folder of weights. Raises UserError with a remedy.
    """
    if name_or_path == "auto":
        try:
            model = load_model("gpt2", device)
            if needs_text:
                fetch_webtext()
            print("model: gpt2 (its weights are at hand)", file=sys.stderr)
            return model
        except UserError as e:
            print(f"model: stdlib, the embedded one, because GPT-2 is not to be had: {e}", file=sys.stderr)
            name_or_path = "stdlib"
    if name_or_path == "stdlib":
        path = CACHE / f"stdlib-{platform.python_version()}-v{FORMAT}.pt"
        if not path.exists():
            train_stdlib(path, device)
    elif name_or_path in PUBLISHED:
        path = CACHE / f"{name_or_path}.safetensors"
        if not path.exists():
            download(WEIGHTS_URL.format(name_or_path), path)
    else:
        path = Path(name_or_path)
    state, n_head, extras = read_weights(path)
    try:
        state = {k.removeprefix("transformer."): v.float() for k, v in state.items()}
        n_vocab, d = state["wte.weight"].shape
        n_layer = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("h."))
        model = GPT2(GPT2Config(n_vocab, len(state["wpe.weight"]), d, n_layer, n_head or d // 64))
        model.load_state_dict(state)
    except (AttributeError, KeyError, ValueError, RuntimeError) as e:
        raise UserError(f"{path} holds no GPT-2 ({type(e).__name__}: {' '.join(str(e).split())[:80]})") from e
    model.name, model.curve = str(name_or_path), extras.get("curve", [])
    encoding = bpe_encoding(extras["merges"]) if extras else gpt2_encoding()
    return model.to(device).eval().requires_grad_(False), encoding


def gpt2_encoding():
    """tiktoken's GPT-2 vocabulary. Raises UserError when it is neither cached nor to be downloaded."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as e:
        raise UserError(f"GPT-2's vocabulary cannot be downloaded ({type(e).__name__}); set TIKTOKEN_CACHE_DIR to a folder that has it, or use --model stdlib") from e  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Text.


def documents(source):
    """Yield the documents (str) of a text source, in a fixed order.

    source: `stdlib` (Python's own library), `webtext` (OpenAI's published sample of GPT-2's training text), `-` (standard input),
    a .txt, .jsonl or .jsonl.gz file (field "text"), a folder of such, or any iterable of strings.
    A .txt file has a document per <|endoftext|>, or, where it has none, one per 4,000 characters or so, cut at blank lines.
    Raises UserError naming file and line.
    """
    if not isinstance(source, (str, Path)):
        yield from source
    elif source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        # pydoc_data is one generated file of 7 % of the text: where it is held out, it would be half of what is held out.
        skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data", "__pycache__"}
        for file in sorted(root.rglob("*.py")):
            if not skip & set(file.relative_to(root).parts):
                yield file.read_text(encoding="utf-8", errors="replace")
    elif source == "-":
        yield from split_text(sys.stdin.read())
    elif source == "webtext":
        yield from documents(fetch_webtext())
    elif (path := Path(source)).is_dir():
        files = sorted(f for f in path.rglob("*") if f.name.endswith((".txt", ".jsonl", ".jsonl.gz")))
        if not files:
            raise UserError(f"{path} holds no .txt, .jsonl or .jsonl.gz file")
        for file in files:
            yield from documents(file)
    elif not path.exists():
        raise UserError(f"no text at {path}; --text takes a .txt, .jsonl or .jsonl.gz file, a folder of them, -, webtext or stdlib")
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        number = 0
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", errors="replace") as f:
                for number, line in enumerate(f, 1):
                    yield json.loads(line)["text"] + ""
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{path}, line {number}: not a JSON object with a string "text"') from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise UserError(f"{path} is damaged after line {number}: {e}") from None
    else:
        yield from split_text(path.read_text(encoding="utf-8", errors="replace"))


def fetch_webtext():
    """Path of OpenAI's WebText sample, downloaded once. Raises UserError."""
    path = CACHE / "webtext.train.jsonl"
    if not path.exists():
        download(WEBTEXT_URL, path)
    return path


def split_text(text, size=4000):
    """Cut one long text into documents: at <|endoftext|>, or else, after every `size` characters, at the next blank line, line or word."""
    if EOT in text:
        yield from text.split(EOT)
        return
    start = 0
    while start < len(text):
        ends = (text.find(gap, start + size, start + 2 * size) for gap in ("\n\n", "\n", " "))
        end = next((e + 1 for e in ends if e >= 0), start + 2 * size)
        yield text[start:end]
        start = end


def is_val(i):
    """Every 20th document is held out, from the language model `stdlib` and from the autoencoder alike."""
    return i % 20 == 10


def token_stream(docs, encoding):
    """Yield (document number, its tokens followed by <|endoftext|>), tokenised in parallel."""
    docs, number = iter(docs), itertools.count()
    while some := list(itertools.islice(docs, 256)):
        for ids in encoding.encode_ordinary_batch(some):
            yield next(number), ids + [encoding.eot_token]


def contexts(text_source, encoding, length=64):
    """Yield token rows, each a list of `length` ids: documents joined by <|endoftext|> and cut; the last short row is dropped."""
    row = []
    for _, ids in token_stream(documents(text_source), encoding):
        row += ids
        cut = len(row) - len(row) % length
        yield from (row[i : i + length] for i in range(0, cut, length))
        row = row[cut:]


def split_contexts(text_source, encoding, split, length=64, part=0, parts=1):
    """`contexts` of the documents of one split, "train" or "val", or of every `parts`-th of those."""
    keep = (doc for i, doc in enumerate(documents(text_source)) if is_val(i) == (split == "val"))
    return contexts(itertools.islice(keep, part, None, parts), encoding, length)


# --------------------------------------------------------------------------------------------------
# `stdlib`: a language model that needs no download. Vocabulary and weights are learned once from the source text of
# Python's standard library, which every machine has, and cached.


def bpe_encoding(merges):
    """tiktoken.Encoding from learned tokens (latin-1 strings, after the 256 bytes, in order of rank)."""
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # GPT-2's own
    ranks = {bytes([i]): i for i in range(256)} | {m.encode("latin-1"): 256 + i for i, m in enumerate(merges)}
    return tiktoken.Encoding("stdlib", pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


def learn_bpe(docs, n_merges):
    """Byte-pair encoding: `n_merges` times, merge the most frequent adjacent pair, counted over distinct words.

    docs: list of str. Returns the new tokens as latin-1 strings in order of rank. Deterministic (ties go to the smaller pair).
    """
    import regex  # tiktoken brings it along

    split = regex.compile(bpe_encoding([])._pat_str)
    counts = Counter(itertools.chain.from_iterable(map(split.findall, docs)))
    words = [[bytes([b]) for b in w.encode()] for w in counts]
    weight = list(counts.values())
    pairs, where = Counter(), defaultdict(set)
    for i, w in enumerate(words):
        for p in zip(w, w[1:]):
            pairs[p] += weight[i]
            where[p].add(i)
    heap = [(-c, p) for p, c in pairs.items()]
    heapq.heapify(heap)
    merges = {}
    while len(merges) < n_merges and heap:
        count, best = heapq.heappop(heap)
        if -count != pairs[best]:  # counts only fall while an entry waits, so a stale one goes back with its true count
            if pairs[best] > 0:
                heapq.heappush(heap, (-pairs[best], best))
            continue
        new = best[0] + best[1]
        merges.setdefault(new.decode("latin-1"))  # two pairs may spell the same token
        touched = set()
        for i in where.pop(best):
            old, w, j = words[i], [], 0
            while j < len(old):
                pair = old[j : j + 2] == list(best)
                w.append(new if pair else old[j])
                j += 1 + pair
            for p in zip(old, old[1:]):
                pairs[p] -= weight[i]
            for p in zip(w, w[1:]):
                pairs[p] += weight[i]
                where[p].add(i)
                touched.add(p)
            words[i] = w
        for p in touched:
            heapq.heappush(heap, (-pairs[p], p))
    return list(merges)


def ngram_losses(train, val, n_vocab):
    """Rows of tokens (contexts, T) -> nats per token of unigram and bigram models on `val` (bigram: interpolated with the unigram by Witten-Bell weights)."""
    uni = np.bincount(train.ravel(), minlength=n_vocab) + 1.0
    uni /= uni.sum()
    pair, count = np.unique(train[:, :-1].astype(np.int64) * n_vocab + train[:, 1:], return_counts=True)
    first = pair // n_vocab
    seen, kinds = np.bincount(first, count, n_vocab), np.bincount(first, minlength=n_vocab)
    a, b = val[:, :-1].ravel(), val[:, 1:].ravel()
    key = a.astype(np.int64) * n_vocab + b
    at = np.minimum(np.searchsorted(pair, key), len(pair) - 1)
    hits = np.where(pair[at] == key, count[at], 0)
    bigram = (hits + kinds[a] * uni[b]) / np.maximum(seen[a] + kinds[a], 1e-9)
    bigram = np.where(seen[a] > 0, bigram, uni[b])
    return float(-np.log(uni[b]).mean()), float(-np.log(bigram).mean())


def lm_loss(model, tokens):
    """Mean next-token cross-entropy (nats) of `model` on tokens (B, T), of which the last is only predicted."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), tokens[:, 1:].reshape(-1))


def train_stdlib(path, device="cpu", n_vocab=4096, n_layer=4, d_model=128, n_head=4, steps=1000, batch=32, length=64, text="stdlib"):
    """Train the embedded language model and save {config, state, merges, curve, losses} at `path`, atomically.

    About four minutes on two cores. `curve` is its held-out loss against training FLOPs, for the compute-equivalent
    metric (paper section 4.1); FLOPs per token = 6 (12 L d^2 + d V) + 12 L d T.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    print("training the embedded language model (about four minutes on two cores; cached afterwards)", file=sys.stderr)
    start = time.time()
    docs = list(documents(text))
    merges = learn_bpe([doc for i, doc in enumerate(docs) if not is_val(i)], n_vocab - 257)
    encoding = bpe_encoding(merges)
    rows = {s: torch.tensor(list(split_contexts(docs, encoding, s, length + 1))) for s in ("train", "val")}  # the last is only predicted
    config = GPT2Config(encoding.n_vocab, length, d_model, n_layer, n_head)
    losses = dict(zip(("unigram", "bigram"), ngram_losses(rows["train"].numpy(), rows["val"].numpy(), config.n_vocab)))
    print(f"  {sum(map(len, docs)) / 1e6:.1f} M characters, {rows['train'].numel() / 1e6:.2f} M tokens, vocabulary {config.n_vocab}, {time.time() - start:.0f} s", file=sys.stderr)  # fmt: skip

    gen = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2(config).to(device)
    val = rows["val"][torch.randperm(len(rows["val"]), generator=gen)[:512], :length].to(device)  # as long as those of `evals.downstream`
    flops = batch * length * (6 * (12 * n_layer * d_model**2 + d_model * config.n_vocab) + 12 * n_layer * d_model * length)
    matrices = [p for p in model.h.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [torch.optim.Muon(matrices, lr=0.01, weight_decay=0.01), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)]
    peak = [o.param_groups[0]["lr"] for o in optimizers]
    curve, progress = [], Progress(steps, "lm")
    order = torch.randint(len(rows["train"]), (steps, batch), generator=gen)
    milestones = {round(1.25**i) for i in range(100)} | {steps}
    for step in range(1, steps + 1):
        lr = min(step / 50, 1.0) * min(1.0, (steps - step) / (0.5 * steps) + 0.02)  # warm up, hold, decay to near zero
        for o, p in zip(optimizers, peak):
            o.param_groups[0]["lr"] = p * lr
        loss = lm_loss(model, rows["train"][order[step - 1]].to(device))
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers:
            o.step()
        if step in milestones:
            with torch.no_grad():
                curve.append({"flops": step * flops, "loss": lm_loss(model, val).item()})
        progress(step, f"held-out loss {curve[-1]['loss']:.3f}")
    progress.finish()
    losses["model"] = curve[-1]["loss"]
    part = path.with_name(path.name + ".part")
    torch.save({"config": asdict(config), "state": model.state_dict(), "merges": merges, "curve": curve, "losses": losses}, part)
    part.replace(path)
    print("  held-out nats per token: " + ", ".join(f"{k} {v:.3f}" for k, v in losses.items()) + f"; {time.time() - start:.0f} s", file=sys.stderr)


class Progress:
    """One line on stderr: what is done, of how much where that is known (else 0), rate of the last half minute, time left or taken.

    Rewritten twice a second on a terminal; elsewhere a line every 20 s. `finish()` ends it.
    """

    def __init__(self, total, label, unit=""):
        self.total, self.label, self.unit, self.start, self.done, self.note = total, label, unit, time.time(), 0, ""
        self.shown = [(self.start, 0)]  # when, and what was done

    def __call__(self, done, note=""):
        self.done, self.note = done, note
        if time.time() - self.shown[-1][0] > (0.5 if sys.stderr.isatty() else 20):
            self._show("\r")

    def finish(self):
        self.shown = [(self.start, 0)]  # in the end, the rate of the whole
        self._show("\n")

    def _show(self, end):
        now = time.time()
        self.shown = [s for s, later in zip(self.shown, self.shown[1:]) if later[0] > now - 30] + [self.shown[-1], (now, self.done)]
        rate = (self.done - self.shown[0][1]) / max(now - self.shown[0][0], 1e-9)
        left = f"{(self.total - self.done) / max(rate, 1e-9):5.0f} s left" if self.total and end == "\r" else f"{now - self.start:5.0f} s"
        of = f"/{self.total:,}" if self.total else ""
        line = f"  {self.label} {self.done:>9,}{of}{self.unit} | {rate:9,.{1 if rate < 100 else 0}f}/s | {left} | {self.note}   "
        print(line, end=end if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------
# Harvesting to disk.


@torch.inference_mode()
def activations(model, rows, layer, site, batch=256):
    """rows (contexts, T) int64 on any device -> (contexts, T, d) float32 on the model's device, `batch` contexts at a time."""
    out = []
    with forward_precision(model.device):
        for chunk in rows.split(batch):
            out.append(model.acts(chunk.to(model.device), layer, site).float())
    return torch.cat(out)


def to_half(acts, where):
    """float32 -> float16, or a UserError that names the first value that does not survive."""
    half = acts.half()
    if not torch.isfinite(half).all():
        bad = tuple((~torch.isfinite(half)).nonzero()[0].tolist())
        raise UserError(f"{where}, context {bad[0]}, position {bad[1]}: the activation {acts[bad].item():g} does not fit float16; harvest another site")
    return half


def write_json(path, obj):
    part = Path(path).with_name(Path(path).name + ".part")
    part.write_text(json.dumps(obj, indent=1))
    part.replace(path)


def write_npy(path, array):
    """np.save through a temporary file: `path` is either whole or absent."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            np.save(f, array, allow_pickle=False)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def harvest(model, encoding, text, out, layer=None, site="resid_post_mlp", tokens=0, length=None, batch=256):
    """Write activations of `tokens` training tokens (0: the whole text) and of the held-out documents met on the way.

    Continues an interrupted harvest of the same thing: shards that are there are kept. Returns meta (dict). Raises UserError.
    """
    out = Path(out)
    layer, length = resolve_place(model, layer, site, length)
    want = {"format": FORMAT, "model": model.name, "layer": layer, "site": site, "d_model": site_width(model.config, site),
            "context": length, "text": str(text) if isinstance(text, (str, Path)) else "given", "asked": tokens}  # fmt: skip
    meta_file = out / "meta.json"
    if meta_file.exists():
        meta = read_meta(out)
        differs = [f"{k}: {meta.get(k)} there, {v} wanted" for k, v in want.items() if meta.get(k) != v]
        if differs and any(out.rglob("*.npy")):
            raise UserError(f"{out} holds another harvest ({'; '.join(differs)}); remove it or choose another --out")
        if meta["complete"] and not differs:
            print(f"{out} is already complete: {meta['tokens']:,} tokens", file=sys.stderr)
            return meta
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no harvest; choose another --out")
    for split in ("train", "val"):
        (out / split).mkdir(parents=True, exist_ok=True)
    meta = want | {"complete": False, "tokens": 0, "val_tokens": 0}
    write_json(meta_file, meta)

    pending, shards, count, digest = {"train": [], "val": []}, Counter(), Counter(), hashlib.sha256()
    room = {"train": math.ceil(tokens / length) if tokens else math.inf, "val": math.inf}  # contexts still wanted
    progress = Progress(tokens, "harvest", " tokens")

    def flush(split, at_least):
        """Write the pending contexts of `split` as shards, as long as there are `at_least` so many; keep shards that are there."""
        while (n := min(len(pending[split]) // length, SHARD, room[split])) >= max(1, at_least):
            rows = np.array(pending[split][: n * length], dtype=np.int32).reshape(n, length)
            tokens_file, acts_file = (out / split / f"{kind}-{shards[split]:05d}.npy" for kind in ("tokens", "acts"))
            if not tokens_file.exists():  # it is written last: where it is, the activations are too
                acts = activations(model, torch.from_numpy(rows).long(), layer, site, batch)
                write_npy(acts_file, to_half(acts, acts_file).cpu().numpy())
                write_npy(tokens_file, rows)
            elif not np.array_equal(np.load(tokens_file), rows):
                raise UserError(f"{tokens_file} was made from another text; remove {out} or choose another --out")
            digest.update(rows.tobytes())
            del pending[split][: n * length]
            shards[split] += 1
            count[split] += n * length
            room[split] -= n
            progress(count["train"])

    # Ctrl-C loses the shard in work at most: the same command continues.
    for i, ids in token_stream(documents(text), encoding):
        split = "val" if is_val(i) else "train"
        pending[split] += ids if room[split] else []
        flush(split, min(SHARD, room[split]))
        if not room["train"] and count["val"] + len(pending["val"]) >= length:
            break
    for split in ("train", "val"):
        flush(split, 1)
    progress.finish()
    if not count["train"] or not count["val"]:
        raise UserError(f"the text is too short: it gave {count['train']} training and {count['val']} held-out tokens (every 20th document is held out)")
    if tokens and count["train"] < tokens:
        print(f"the text ended after {count['train']:,} training tokens", file=sys.stderr)
    meta |= {"complete": True, "tokens": count["train"], "val_tokens": count["val"], "sha256": digest.hexdigest()}
    write_json(meta_file, meta)
    return meta


def resolve_place(model, layer, site, length):
    """-> (layer, context length), defaults filled in: the block two thirds of the way up (8 of 12, as in the paper; 2 of 4), 64 tokens."""
    layer = model.config.n_layer * 2 // 3 if layer is None else layer
    length = min(64, model.config.n_ctx) if length is None else length
    model.check_site(layer, site)
    if not 2 <= length <= model.config.n_ctx:
        raise UserError(f"--ctx {length}: {model.name} has only {model.config.n_ctx} positions; choose 2 to {model.config.n_ctx}")
    return layer, length


# --------------------------------------------------------------------------------------------------
# Reading back. A batch is a pure function of (seed, step), so a resumed run sees exactly the batches it would have seen.

BLOCK = 4096  # contexts mixed at a time: 262,144 tokens, 400 MB at d = 768 in float16


def shuffled_blocks(n_contexts, block, seed, first):
    """Yield (rows, permutation seed) for block number first, first + 1, ...: epoch after epoch, all contexts in random order."""
    per_epoch = math.ceil(n_contexts / block)
    for b in itertools.count(first):
        order = np.random.default_rng((seed, b // per_epoch)).permutation(n_contexts)
        i = b % per_epoch * block
        yield order[i : i + block], (seed, b)


def ahead(iterator):
    """The same items, each made in a background thread while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, iterator, None)
            yield item


def read_meta(path):
    """meta.json of a harvested directory. Raises UserError for another kind of file."""
    try:
        meta = json.loads((Path(path) / "meta.json").read_text())
        return meta | {key: meta[key] for key in ("complete", "context", "d_model")}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{Path(path) / 'meta.json'} was not written by harvest.py; remove {path} and harvest again, or name another directory") from None


def is_harvested(path):
    """Whether a complete harvest is at `path`; False where there is none yet or an unfinished one. Raises UserError."""
    return (Path(path) / "meta.json").exists() and read_meta(path)["complete"]


class Acts:
    """A harvested directory, memory-mapped: `meta` (dict), `tokens` (contexts, T) int32, `acts` (list of float16 memory maps, one
    a shard, each (contexts, T, d)), `len()` in contexts, `acts[rows]` -> (tokens, activations). Raises UserError.
    """

    def __init__(self, path, split="train"):
        path = Path(path)
        if not (path / "meta.json").exists():
            raise UserError(f"no activations at {path} (no meta.json); make them with: python harvest.py --out {path}")
        self.meta = read_meta(path)
        complete, length, d = self.meta["complete"], self.meta["context"], self.meta["d_model"]
        if self.meta.get("format") != FORMAT:
            raise UserError(f"{path} has format {self.meta.get('format')}, this harvest.py reads {FORMAT}; harvest again")
        if not complete:
            raise UserError(f"the harvest in {path} is not finished; run the same harvest.py command again to complete it")
        self.path, self.split, self.acts, tokens = path, split, [], []
        for file in sorted((path / split).glob("tokens-*.npy")):
            acts_file = file.with_name(file.name.replace("tokens", "acts"))
            try:
                tokens.append(np.load(file, allow_pickle=False))
                self.acts.append(np.load(acts_file, mmap_mode="c", allow_pickle=False))
            except (ValueError, OSError, EOFError) as e:
                raise UserError(f"{acts_file} is damaged ({str(e).splitlines()[0][:60]}); remove it and its tokens file, set \"complete\" to false in meta.json and run harvest.py again") from None  # fmt: skip
            if self.acts[-1].shape != (len(tokens[-1]), length, d) or self.acts[-1].dtype != np.float16:
                raise UserError(f"{acts_file} has shape {self.acts[-1].shape} {self.acts[-1].dtype}, expected {(len(tokens[-1]), length, d)} float16; harvest again")
        wanted = self.meta["tokens" if split == "train" else "val_tokens"]
        if sum(t.size for t in tokens) != wanted:
            raise UserError(f"{path / split} holds {sum(t.size for t in tokens)} of {wanted} tokens: shards are missing; harvest again")
        self.tokens = np.concatenate(tokens)
        self._starts = np.cumsum([0] + [len(t) for t in tokens])

    def __len__(self):
        return len(self.tokens)

    @property
    def d_model(self):
        return self.meta["d_model"]

    @property
    def n_tokens(self):
        return self.tokens.size

    def __getitem__(self, rows):
        """rows: context numbers (array) or a slice -> (tokens (n, T) int64, activations (n, T, d) float16), on CPU."""
        rows = np.arange(len(self))[rows]
        acts = self.read(rows)
        if not (finite := acts.isfinite().flatten(1).all(1)).all():
            row = rows[int((~finite).nonzero()[0])]
            shard = int(np.searchsorted(self._starts, row, side="right")) - 1
            raise UserError(f"NaN or Inf in {self.path / self.split}/acts-{shard:05d}.npy, row {row - self._starts[shard]}; harvest that directory again")
        return torch.from_numpy(self.tokens[rows]).long(), acts

    def read(self, rows, pinned=False):
        """Activations (n, T, d) float16 of context numbers `rows`, unchecked, by all cores."""
        shard = np.searchsorted(self._starts, rows, side="right") - 1
        out = torch.empty(len(rows), *self.acts[0].shape[1:], dtype=torch.float16, pin_memory=pinned)
        cuts = [0, *np.flatnonzero(np.diff(shard)) + 1, len(rows)]  # runs of rows from one shard
        for a, b in zip(cuts, cuts[1:]):
            if a < b:
                torch.index_select(torch.from_numpy(self.acts[shard[a]]), 0, torch.from_numpy(rows[a:b] - self._starts[shard[a]]), out=out[a:b])
        return out

    def batches(self, batch, seed=0, step=0, device="cpu", part=0, parts=1):
        """Yield float16 (batch, d) for ever, from step `step` on: contexts shuffled over the whole set, tokens within BLOCK contexts.

        With several parts every reader has its own contexts, and all as many.
        """
        n = len(self) // parts
        block = min(BLOCK, n)
        per_epoch, T = math.ceil(n / block), self.tokens.shape[1]
        epoch_tokens = n * T
        start = step * batch
        first = start // epoch_tokens * per_epoch + start % epoch_tokens // (block * T)
        skip = start % epoch_tokens % (block * T)
        rest = torch.empty(0, self.d_model, dtype=torch.float16, device=device)
        cuda = torch.device(device).type == "cuda"

        def read(rows, key):
            order = torch.from_numpy(np.random.default_rng((*key, 1)).permutation(len(rows) * T))
            rows = np.sort(rows) * parts + part
            if cuda:  # checking every number would take longer than training on it; the loss shows NaN soon enough
                return self.read(rows, pinned=True).flatten(0, 1), order.pin_memory()
            return self[rows][1].flatten(0, 1), order

        blocks = (read(*block) for block in shuffled_blocks(n, block, seed, first))
        for acts, order in ahead(blocks) if cuda else blocks:
            mixed = acts.to(device, non_blocking=True)[order.to(device, non_blocking=True)][skip:]
            rest, skip = torch.cat([rest, mixed]), 0
            while len(rest) >= batch:
                yield rest[:batch]
                rest = rest[batch:]

    def sample(self, n_tokens, seed=0):
        """A fixed random sample of whole contexts with about `n_tokens` tokens: (tokens (n, T), activations (n, T, d) float16)."""
        n = min(len(self), max(1, n_tokens // self.tokens.shape[1]))
        return self[np.random.default_rng(seed).permutation(len(self))[:n]]


class Stream:
    """The same interface as Acts without a disk: contexts are run through the model as training asks for them.

    A block of contexts at a time is harvested onto the device and shuffled, so memory is bounded by `block` contexts, and a
    resumed run repeats at most one block. Texts are read again from the start when they end.
    """

    def __init__(self, model, encoding, text, layer=None, site="resid_post_mlp", length=None, block=None, batch=1024):
        self.model, self.encoding, self.site, self.chunk = model, encoding, site, batch
        self.text = list(documents("-")) if text == "-" else text  # standard input can be read only once
        self.block = block or (16384 if model.device.type == "cuda" else 2048)
        self.layer, self.length = resolve_place(model, layer, site, length)
        self.meta = {"model": model.name, "layer": self.layer, "site": site, "d_model": site_width(model.config, site),
                     "context": self.length, "text": str(text)}  # fmt: skip
        self.d_model = self.meta["d_model"]

    def contexts(self, split, part=0, parts=1):
        """Token rows of one split, once through the text, or of every `parts`-th document of it. Raises UserError if it gives none."""
        rows = split_contexts(self.text, self.encoding, split, self.length, part, parts)
        if (first := next(rows, None)) is None:
            raise UserError(f"the text is too short: it gives no {split} context of {self.length} tokens (every 20th document is held out)")
        return itertools.chain([first], rows)

    def batches(self, batch, seed=0, step=0, device=None, part=0, parts=1):
        first, skip = divmod(step * batch, self.block * self.length)
        rows = itertools.chain.from_iterable(self.contexts("train", part, parts) for _ in itertools.count())
        rows = itertools.islice(rows, first * self.block, None)
        rest = None
        for b in itertools.count(first):
            tokens = torch.tensor(list(itertools.islice(rows, self.block)))
            acts = activations(self.model, tokens, self.layer, self.site, self.chunk).half().flatten(0, 1)
            order = torch.from_numpy(np.random.default_rng((seed, b, 1)).permutation(len(acts))).to(acts.device)
            mixed, skip = acts[order][skip:], 0
            rest = mixed if rest is None else torch.cat([rest, mixed])
            while len(rest) >= batch:
                yield rest[:batch]
                rest = rest[batch:]

    def sample(self, n_tokens, seed=0):
        """The first held-out contexts, about `n_tokens` tokens: (tokens (n, T), activations (n, T, d) float16)."""
        tokens = torch.tensor(list(itertools.islice(self.contexts("val"), max(1, n_tokens // self.length))))
        return tokens, activations(self.model, tokens, self.layer, self.site, self.chunk).half()


# --------------------------------------------------------------------------------------------------


def default_text(model):
    """What a model was trained on: Python's library for `stdlib`, WebText for GPT-2."""
    return "stdlib" if model.name == "stdlib" else "webtext"


def source(cfg, alone=True):
    """What to train on -> (Acts or Stream, the same of held-out text, training tokens there are).

    cfg: has acts, model, text, stream and device, as in sae.py's Config; its `acts` becomes "" where
    activations are streamed. alone: whether missing activations may be harvested here; else, as one
    of several processes, UserError says how.
    """
    cuda = cfg.device.startswith("cuda")
    if cfg.stream or cuda and not is_harvested(cfg.acts):
        cfg.acts = ""
        model, encoding = load_model(cfg.model, cfg.device, needs_text=not cfg.text)
        data = Stream(model, encoding, cfg.text or default_text(model))
        return data, data, 400_000_000
    if not is_harvested(cfg.acts):
        how = ["--model", cfg.model, "--out", cfg.acts]
        if not alone:
            raise UserError(
                f"no complete activations at {cfg.acts}; make them first: "
                f"python harvest.py {' '.join(how)}, or give --stream"
            )
        print(f"no complete activations at {cfg.acts}: harvesting", file=sys.stderr)
        main([*how, "--device", cfg.device] + (["--text", cfg.text] if cfg.text else []))
    data = Acts(cfg.acts)
    if cfg.model not in ("auto", data.meta["model"]) or cfg.text not in ("", data.meta["text"]):
        raise UserError(
            f"{cfg.acts} holds activations of {data.meta['model']} on {data.meta['text']}; "
            "name another --acts, or leave out --model and --text"
        )
    return data, Acts(cfg.acts, "val"), data.n_tokens


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="auto", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, stdlib, a file or folder of weights, or auto (default): gpt2 if it can be had, else stdlib")
    p.add_argument("--layer", type=int, help="0-based block; default: two thirds of the depth (8 of 12, 2 of 4)")
    p.add_argument("--site", default="resid_post_mlp", help=f"one of {', '.join(SITES)}; default: resid_post_mlp")
    p.add_argument("--tokens", type=int, help="training tokens, 0 for the whole text; default: the whole text for stdlib, else 10 M on CUDA and 1 M on CPU")
    p.add_argument("--text", help=".txt, .jsonl, .jsonl.gz, a folder of them, - for standard input, webtext, stdlib; default: what the model was trained on")
    p.add_argument("--ctx", type=int, help="tokens in a context; default: 64, as in the paper")
    p.add_argument("--out", default="acts", help="directory to write; default: acts")
    p.add_argument("--device", default="", help="cuda or cpu; default: cuda if there")
    p.add_argument("--batch", type=int, help="contexts per forward pass; default: 1024 on CUDA, 256 on CPU")
    a = p.parse_args(argv)
    device = pick_device(a.device)
    cuda = device.startswith("cuda")
    model, encoding = load_model(a.model, device, needs_text=not a.text)
    text = a.text or default_text(model)
    tokens = a.tokens if a.tokens is not None else 0 if text == "stdlib" else 10_000_000 if cuda else 1_000_000
    batch = a.batch or (1024 if cuda else 256)
    meta = harvest(model, encoding, text, a.out, a.layer, a.site, tokens, a.ctx, batch)
    print(f"{a.out}: {meta['tokens']:,} training and {meta['val_tokens']:,} held-out tokens of {meta['model']}, layer {meta['layer']}, {meta['site']}, d = {meta['d_model']}")


if __name__ == "__main__":
    run_main(main)
