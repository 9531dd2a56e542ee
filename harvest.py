"""
harvest.py: text -> tokens -> GPT-2 -> activations, on disk or streamed.

    python harvest.py                              # GPT-2 small if it can be had, else `stdlib`
    python harvest.py --model stdlib --out acts    # the embedded model: nothing to download
    python harvest.py --model gpt2 --layer 8 --site resid_post_mlp --text my_texts/ --tokens 2000000

    GPT2             the subject model in plain PyTorch; every site can be read or edited
    load_model       published weights (Hugging Face's names and shapes), local ones, or `stdlib`
    documents        .txt, .jsonl, .jsonl.gz, folders, standard input, or OpenAI's WebText sample
    stdlib           a small real language model, trained once on Python's own source
    harvest, Acts    activations written to shards (resumable, atomic) and read back, shuffled
    Given            the same of any model's: .npy, .npz, .pt, .safetensors, a folder of such
    Stream           the same batches without a disk

What is written, for `--out acts`:
    acts/meta.json                    what was harvested, how much, and whether it is complete
    acts/{train,val}/tokens-00000.npy int32   (contexts, T)
    acts/{train,val}/acts-00000.npy   float16 (contexts, T, d)

Downloads and `stdlib` are kept in cache/ beside this file, or in the folder that SAE_CACHE names.
"""

import argparse
import contextlib
import copy
import errno
import functools
import gzip
import hashlib
import heapq
import itertools
import json
import math
import mmap
import os
import platform
import re
import socket
import sys
import sysconfig
import time
import urllib.request
import zipfile
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import regex  # tiktoken brings it along
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

from sae import keep_heap, read_safetensors

SITES = ("resid_delta_attn", "resid_post_attn", "resid_delta_mlp", "resid_post_mlp", "mlp_post_act")
CACHE = Path(os.environ.get("SAE_CACHE", Path(__file__).parent / "cache"))
EMBEDDED = re.compile(r"stdlib(?:-(\d+))?").fullmatch  # names of the model that needs no download
PUBLISHED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
WEIGHTS = "https://huggingface.co/openai-community/{}/resolve/main/model.safetensors"
WEBTEXT = "https://openaipublic.blob.core.windows.net/gpt-2/output-dataset/v1/webtext.train.jsonl"
GPT2_TOKENS = 50257  # in its vocabulary
EOT = "<|endoftext|>"
KINDS = (".txt", ".jsonl", ".jsonl.gz")
SHARD = 1024  # contexts in one shard: 65,536 tokens, 100 MB at d = 768
FORMAT = 4  # of harvested directories, and the build of the embedded model
PATHS = ("model", "text")  # what may be one in meta.json
COUNT = {"train": "tokens", "val": "val_tokens"}  # of a split in meta.json
KEEP = 64  # every so many contexts of harvested text, one is kept back from training

class UserError(ValueError):
    """Something the user can put right: printed as one line, exit status 2."""

def run_main(main):
    """Run a script's main(); what its user can put right is one line (SAE_DEBUG=1: traceback)."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # not those that are closed
        stream.reconfigure(errors="backslashreplace")  # a terminal may lack û
    try:
        main()
        print(end="", flush=True)
    except (ValueError, OSError, RuntimeError, MemoryError, KeyboardInterrupt) as e:
        message = told(e)
        if os.environ.get("SAE_DEBUG") or message is None:
            raise
        with contextlib.suppress(OSError):
            say(message)
        try:
            print(end="", flush=True)
        except OSError:  # the interpreter would try once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(130 if isinstance(e, KeyboardInterrupt) else 2)

def told(e):
    """An exception as one line that says what to do; None for one that is the code's own fault."""
    if isinstance(e, KeyboardInterrupt):
        return f"\n{e if e.args else 'interrupted'}"
    if isinstance(e, BrokenPipeError):
        return "error: what was reading this output has gone"
    if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        kept = "what was complete is kept: free some room and run again"
        return f"error: no space left on the disk; {kept}"
    if isinstance(e, OSError) and e.filename:
        return f"error: {e.filename}: {e.strerror}"
    if isinstance(e, MemoryError) or isinstance(e, RuntimeError) and "memory" in str(e):
        return "error: not enough memory; lower --n_latents, --batch or --tokens"
    return None if isinstance(e, RuntimeError) else f"error: {e}"

def say(line):
    print(line, file=sys.stderr)

class Progress:
    """One line on stderr: what is done, of how much (0: unknown), rate of the last half minute and
    time left or taken. Twice a second on a terminal, elsewhere every 20 s; `finish()` ends it."""
    def __init__(self, total, label, unit=""):
        self.total, self.label, self.unit = total, label, unit
        self.done, self.note = 0, ""
        self.start = time.time()
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
        recent = [s for s, later in zip(self.shown, self.shown[1:]) if later[0] > now - 30]
        self.shown = [*recent, self.shown[-1], (now, self.done)]
        since, before = self.shown[0]
        rate = (self.done - before) / max(now - since, 1e-9)
        digits = 1 if rate < 100 else 0
        of = f"/{self.total:,}" if self.total else ""
        clock = f"{now - self.start:5.0f} s"
        if self.total and end == "\r":
            clock = f"{(self.total - self.done) / max(rate, 1e-9):5.0f} s left"
        line = f"  {self.label} {self.done:>9,}{of}{self.unit} | {rate:9,.{digits}f}/s | {clock} | "
        end = end if sys.stderr.isatty() else "\n"
        print(f"{line}{self.note}   ", end=end, file=sys.stderr, flush=True)

def pick_device(name=""):
    """No name -> cuda if there, else cpu; a name is checked. Raises UserError."""
    here = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    if name and name.split(":")[0] not in here:
        raise UserError(f"no device {name} here; use --device {' or '.join(here)}")
    return name or here[0]

HELD = set()  # the folders that this process holds

@contextlib.contextmanager
def hold(folder, wait=False, name=".lock"):
    """Keep other processes from writing into a folder, made if need be: by a lock that ends with
    the process. If another has it: `wait`, or UserError, which names the holder."""
    path = Path(folder).resolve() / name
    if path in HELD:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as lock:
        try:
            import fcntl  # which Windows does not have
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            lock.seek(0)
            who = lock.read().strip() or "another process"
            advice = "wait for it, or write elsewhere"
            raise UserError(f"{who} is writing to {folder}; {advice}") from None
        except (ImportError, OSError):  # nor every file system
            pass
        lock.truncate(0)
        command = " ".join(sys.argv)[:200]
        lock.write(f"process {os.getpid()} on {socket.gethostname()} ({command})")
        lock.flush()
        HELD.add(path)
        try:
            yield
        finally:
            HELD.discard(path)

@contextlib.contextmanager
def atomic(path, mode="wb"):
    """Yield an open file that becomes `path` once it is whole and on the disk, or not at all."""
    part = Path(f"{path}.{os.getpid()}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except RuntimeError as e:
        raise e.__context__ if isinstance(e.__context__, OSError) else e  # torch's, of a full disk
    finally:
        part.unlink(missing_ok=True)

def write_json(path, obj):
    with atomic(path, "w") as f:
        json.dump(obj, f, indent=1)

def write_npy(path, array):
    with atomic(path) as f:
        np.lib.format.write_array_header_1_0(f, np.lib.format.header_data_from_array_1_0(array))
        f.write(np.ascontiguousarray(array).data)  # np.save says less of a disk that is full

def read_json(path):
    """What `write_json` wrote; {} where there is no such file. Raises UserError for another."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}); move it away and run again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object; move it away and run again")
    return found

def sha256(parts):
    """Of bytes, one after another: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]

def blocks(file, size=2**22):
    """The bytes of a file."""
    with open(file, "rb") as f:
        while some := f.read(size):
            yield some


# --------------------------------------------------------------------------------------------------
# GPT-2. Parameters carry Hugging Face's names and shapes, so published weights load as they are.

@dataclass(frozen=True)
class GPT2Config:
    n_vocab: int = 50257
    n_ctx: int = 1024
    d_model: int = 768
    n_layer: int = 12
    n_head: int = 12
    activation: str = "gelu_new"
    eps: float = 1e-5  # of the LayerNorms
    scaled: bool = True  # attention, by 1 / sqrt(d / heads)
    scaled_by_layer: bool = False  # and by 1 / (layer + 1)

GELU = {name: lambda x: F.gelu(x, approximate="tanh") for name in ("gelu_new", "gelu_pytorch_tanh")}
ACTIVATIONS = GELU | {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "swish": F.silu}

class Conv1D(nn.Module):
    """x W + b, with W stored (in, out) as in OpenAI's checkpoints."""
    def __init__(self, d_in, d_out, std=0.02):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out) * std)
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, x):
        return F.linear(x, self.weight.T, self.bias)

class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        d, std = c.d_model, 0.02 / math.sqrt(2 * c.n_layer)
        self.n_head, self.act = c.n_head, ACTIVATIONS[c.activation]
        self.scale = (d / c.n_head) ** -0.5 if c.scaled else 1.0
        self.scale /= layer + 1 if c.scaled_by_layer else 1
        self.ln_1 = nn.LayerNorm(d, c.eps)
        self.attn = nn.ModuleDict({"c_attn": Conv1D(d, 3 * d), "c_proj": Conv1D(d, d, std)})
        self.ln_2 = nn.LayerNorm(d, c.eps)
        self.mlp = nn.ModuleDict({"c_fc": Conv1D(d, 4 * d), "c_proj": Conv1D(4 * d, d, std)})

    def forward(self, x, tap):
        """x (B, T, d) -> (B, T, d). `tap(site, act) -> act` sees, and may replace, the SITES."""
        qkv = self.attn.c_attn(self.ln_1(x)).unflatten(-1, (3, self.n_head, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, d/heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        y = self.attn.c_proj(y.transpose(1, 2).flatten(2))
        x = tap("resid_post_attn", x + tap("resid_delta_attn", y))
        h = tap("mlp_post_act", self.act(self.mlp.c_fc(self.ln_2(x))))
        return tap("resid_post_mlp", x + tap("resid_delta_mlp", self.mlp.c_proj(h)))

class GPT2(nn.Module):
    """GPT-2: pre-LayerNorm transformer, learned positions, tied unembedding. `name` says which one;
    `curve` is its held-out loss against training FLOPs, [{"flops", "loss"}], or []."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.name, self.curve, self.vocabulary = "gpt2-random", [], ""
        self.wte = nn.Embedding(config.n_vocab, config.d_model)
        self.wpe = nn.Embedding(config.n_ctx, config.d_model)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model, config.eps)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.01)

    def forward(self, tokens, layer=None, site=None, edit=None):
        """tokens (B, T) integers -> logits (B, T, V). With `edit`, the activation at `site` of the
        block `layer` (0-based) is replaced by `edit(act)`, and the model goes on with that."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for i, block in enumerate(self.h):
            x = block(x, lambda name, act: edit(act) if (i, name) == (layer, site) else act)
        return F.linear(self.ln_f(x), self.wte.weight)

    def acts(self, tokens, layer, site):
        """tokens (B, T) -> the activation (B, T, d_site) at a site; nothing above is computed."""
        self.place(layer, site)

        def stop(act):
            raise StopIteration(act)

        try:
            self(tokens, layer, site, stop)
        except StopIteration as found:
            return found.value

    def place(self, layer=None, site="resid_post_mlp", length=None):
        """Where activations are taken, as in meta.json: checked, and defaults filled in. These are
        two thirds of the way up (8 of 12, as in the paper; 2 of 4), 64 tokens. Raises UserError."""
        c = self.config
        layer = c.n_layer * 2 // 3 if layer is None else layer
        length = min(64, c.n_ctx) if length is None else length
        d = 4 * c.d_model if site == "mlp_post_act" else c.d_model
        check_site(site)
        if not 0 <= layer < c.n_layer:
            raise UserError(f"{self.name} has no layer {layer}; choose 0 to {c.n_layer - 1}")
        if not 2 <= length <= c.n_ctx:
            raise UserError(f"--ctx {length}: {self.name} takes contexts of 2 to {c.n_ctx} tokens")
        where = {"layer": layer, "site": site, "d_model": d, "context": length}
        return {"model": self.name, "model_sha256": self.sha256} | where

    @functools.cached_property
    def sha256(self):
        """Of all that it computes with: configuration, vocabulary if it has its own, weights."""
        weights = (w.detach().cpu().contiguous().numpy() for w in self.state_dict().values())
        said = f"{self.config} {self.vocabulary}"
        return sha256([said.encode(), *(w.data for w in weights)])

    def load_state_dict(self, state, *args, **kwargs):
        """Takes published ones: see `plain_names`, and a tied `lm_head.weight`."""
        state = plain_names(state)
        head = state.pop("lm_head.weight", state.get("wte.weight"))
        if head is not None and not torch.equal(head, state["wte.weight"]):
            raise ValueError("its unembedding lm_head is not its embedding wte")
        self.__dict__.pop("sha256", None)
        return super().load_state_dict(state, *args, **kwargs)

    @property
    def device(self):
        return self.wte.weight.device


def check_site(site):
    if site not in SITES:
        raise UserError(f"unknown site {site!r}; choose one of {', '.join(SITES)}")

def plain_names(state):
    """Weights by GPT-2's own names: without what wrappers put before them, and mask buffers."""
    for prefix in ("_orig_mod.", "module.", "transformer."):
        state = {name.removeprefix(prefix): w for name, w in state.items()}
    buffers = (".attn.bias", ".attn.masked_bias")
    return {name: w for name, w in state.items() if not name.endswith(buffers)}


# --------------------------------------------------------------------------------------------------
# Weights: fetched, local, or trained here.

def download(url, path):
    """Fetch `url` unless it is there -> path, which is whole or absent. Raises UserError."""
    if path.exists():
        return path
    try:
        with hold(path.parent, wait=True), urllib.request.urlopen(url, timeout=10) as r, \
                atomic(path) as f:
            if path.exists():  # another process has it by now
                return path
            size = int(r.headers["Content-Length"] or 0)
            progress = Progress(size, path.name, " bytes")
            while some := r.read(2**20):
                f.write(some)
                progress(f.tell())
            progress.finish()
            if size and f.tell() != size:
                raise OSError(f"got {f.tell()} of {size} bytes")
    except Exception as e:
        if isinstance(e, UserError) or getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        remedy = f"copy it to {path} by hand, name your own --text, or use --model stdlib"
        raise UserError(f"cannot download {url} ({getattr(e, 'reason', e)}); {remedy}") from e
    return path

def read_file(path):
    """A file of weights, of any kind -> dict. Raises UserError."""
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        takes = f"{', '.join(PUBLISHED)}, stdlib, auto, or a path"
        raise UserError(f"no weights at {path}; --model takes {takes}") from None
    except Exception as e:
        why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:80]}"
        ours = "; delete it and run again" if path.parent == CACHE else ""
        raise UserError(f"{path} is not a readable weight file ({why}){ours}") from e

def read_weights(path):
    """A file or folder of weights -> a dict as `train_stdlib` saves it; of other models it has the
    state, and the config that is in it or beside it. Raises UserError."""
    path, files = Path(path), [Path(path)]
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        names = [name + end for name in ("model.safetensors", "pytorch_model.bin")
                 for end in (".index.json", "")]
        files = [path / name for name in names] + sorted(path.glob("*.pt"))
        files = [file for file in files if file.exists()]
        if not files:
            raise UserError(f"{path} holds no model.safetensors, pytorch_model.bin or .pt file")
        if files[0].suffix == ".pt" and len(files) > 1:
            raise UserError(f"{path} holds {len(files)} .pt files; name the one that is meant")
    files = files[:1]
    if files[0].name.endswith(".index.json"):
        files = sorted({folder / part for part in read_json(files[0])["weight_map"].values()})
    state = {}
    for file in files:
        state |= read_file(file)
    if "merges" in state:
        return state
    if "model_args" in state:  # nanoGPT's; its blocks have torch's own GELU
        config = {"n_head": state["model_args"]["n_head"], "activation_function": "gelu",
                  "bias": state["model_args"].get("bias", True)}
        return {"state": state["model"], "config": config}
    config = read_json(folder / "config.json")
    check_tokenizer(folder)
    return {"state": state, "config": config}

def check_tokenizer(folder):
    """Raises UserError for a tokenizer, beside the weights, that is not GPT-2's."""
    vocab = read_json(folder / "vocab.json")
    vocab = vocab or read_json(folder / "tokenizer.json").get("model", {}).get("vocab", {})
    kind = read_json(folder / "tokenizer_config.json").get("tokenizer_class") or "GPT2Tokenizer"
    others = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
    if not kind.startswith("GPT2Tok") or any((folder / name).exists() for name in others):
        vocab = {"?": 0}
    if not vocab:
        return
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as OpenAI's encoder.py has it
    rest = [b for b in range(256) if b not in printed]
    byte_of = {chr(b): b for b in printed} | {chr(256 + i): b for i, b in enumerate(rest)}
    ranks = gpt2_encoding()._mergeable_ranks
    of = lambda token: ranks.get(bytes(byte_of.get(c, 0) for c in token))
    wrong = sum(i < len(ranks) and of(token) != i for token, i in dict(vocab).items())
    if wrong or len(vocab) < len(ranks):
        raise UserError(f"the tokenizer in {folder} is not GPT-2's; only models with GPT-2's "
                        "vocabulary can be read")

ALIASES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "n_ctx": "n_positions",
           "num_attention_heads": "n_head", "max_position_embeddings": "n_positions"}

def gpt2_config(state, known):
    """The configuration of weights (state, by GPT-2's own names) and of a config.json, `known`.
    Raises ValueError for whatever GPT2 would compute otherwise."""
    known = {ALIASES.get(name, name): v for name, v in known.items() if v is not None}
    n_vocab, d = state["wte.weight"].shape
    sizes = {"vocab_size": n_vocab, "n_positions": len(state["wpe.weight"]), "n_embd": d,
             "n_layer": 1 + max(int(k.split(".")[1]) for k in state if k.startswith("h.")),
             "n_inner": 4 * d}
    fixed = {"model_type": "gpt2", "add_cross_attention": False, "tie_word_embeddings": True}
    for name, value in (sizes | fixed).items():
        if known.get(name, value) != value:
            raise ValueError(f"its {name} is {known[name]}, here it can only be {value}")
    for name in ("auto_map", "quantization_config", "pruned_heads"):
        if known.get(name):
            raise ValueError(f"its {name} is not understood here")
    activation = known.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise ValueError(f"its activation_function is {activation}; known are "
                         f"{', '.join(ACTIVATIONS)}")
    kinds = {"layer_norm_epsilon": float, "scale_attn_weights": bool, "n_head": int,
             "scale_attn_by_inverse_layer_idx": bool}
    for name, kind in kinds.items():
        if type(known.get(name, kind())) is not kind or not known.get(name, 1) >= 0:
            raise ValueError(f"its {name} is {known[name]!r}")
    n_head = known.get("n_head") or {768: 12, 1024: 16, 1280: 20, 1600: 25}.get(d, 0)
    if n_head < 1 or d % n_head:
        raise ValueError(f"{n_head or 'no'} heads for a width of {d}; a config.json beside the "
                         "weights must give n_head")
    return GPT2Config(n_vocab, sizes["n_positions"], d, sizes["n_layer"], n_head, activation,
                      known.get("layer_norm_epsilon", 1e-5), known.get("scale_attn_weights", True),
                      known.get("scale_attn_by_inverse_layer_idx", False))

def gpt2_from(state, config, least=0):
    """A GPT2 of published weights, whose vocabulary has at `least` so many tokens. Raises
    ValueError for others."""
    state = plain_names(state)
    if "wte.weight" not in state:
        raise ValueError("it has no wte.weight")
    if odd := [name for name, w in state.items() if not w.is_floating_point()]:
        raise ValueError(f"its {odd[0]} is of type {state[odd[0]].dtype}")
    state = {name: w.float() for name, w in state.items()}
    d = state["wte.weight"].shape[1]
    if state["h.0.attn.c_attn.weight"].shape[0] == 3 * d:  # nn.Linear's way round, as nanoGPT's
        sides = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        state = {name: w.T if name.endswith(sides) else w for name, w in state.items()}
    if (size := len(state["wte.weight"])) < least:
        raise ValueError(f"its vocabulary has {size:,} tokens, its tokenizer {least:,}")
    own = config if "d_model" in config else asdict(gpt2_config(state, config))
    model = GPT2(GPT2Config(**own))
    if config.get("bias") is False:  # nanoGPT's
        biases = {name: w for name, w in model.state_dict().items() if name.endswith("bias")}
        state = {name: torch.zeros_like(w) for name, w in biases.items()} | state
    model.load_state_dict(state)
    return model

def load_model(name_or_path="auto", device="cpu", needs_text=False):
    """-> (GPT2 in eval mode without gradients, tiktoken.Encoding). Raises UserError with a remedy.

    name_or_path: gpt2, gpt2-medium, gpt2-large, gpt2-xl (weights fetched once into cache/),
    `stdlib` (trained once, cached; `stdlib-64`, `stdlib-256`, ...: of another width), a file or
    folder of weights (Hugging Face's GPT-2, nanoGPT's), or `auto`: gpt2 if its weights, and where
    `needs_text` its text, are cached or can be downloaded, else stdlib; says which. A config.json
    beside weights is honoured or refused."""
    if name_or_path == "auto":
        try:
            found = load_model("gpt2", device)
            if needs_text:
                documents("webtext")
            say("model: gpt2 (its weights are at hand)")
            return found
        except UserError as e:
            say(f"model: stdlib, the embedded one, because GPT-2 is not to be had: {e}")
            name_or_path = "stdlib"
    path, name = Path(name_or_path), str(name_or_path)
    if embedded := EMBEDDED(name):
        width = int(embedded[1] or 128)
        if not 0 < width <= 1024 or width % 32:
            raise UserError(f"{name}: a width is a multiple of 32, at most 1024")
        path = CACHE / f"{name}-{platform.python_version()}-v{FORMAT}.pt"
        with contextlib.nullcontext() if path.exists() else hold(path.parent, wait=True):
            if not path.exists():
                train_stdlib(path, device, d_model=width, n_head=width // 32)
    elif name in PUBLISHED:
        path = download(WEIGHTS.format(name), CACHE / f"{name}.safetensors")
    else:
        name = str(path.resolve())  # to be found from any directory
    try:
        saved = read_weights(path)
        merges = saved.get("merges")
        tokens = GPT2_TOKENS if merges is None else 257 + len(merges)
        model = gpt2_from(saved["state"], saved["config"], tokens)
    except UserError:
        raise
    except (AttributeError, KeyError, ValueError, TypeError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:160]
        kind = "" if isinstance(e, ValueError) else f"{type(e).__name__}: "
        raise UserError(f"{path} holds no GPT-2 that can be read here: {kind}{reason}") from e
    model.name, model.curve = name, saved.get("curve", [])
    model.vocabulary = str(merges or "")
    encoding = gpt2_encoding() if merges is None else bpe_encoding(merges)
    return model.to(device).eval().requires_grad_(False), encoding

def gpt2_encoding():
    """tiktoken's GPT-2 vocabulary. Raises UserError where it is neither cached nor to be had."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as e:
        remedy = "set TIKTOKEN_CACHE_DIR to a folder that has it, or use --model stdlib"
        raise UserError(f"GPT-2's vocabulary cannot be downloaded ({type(e).__name__}); {remedy}")


# --------------------------------------------------------------------------------------------------
# Text.

def documents(source):
    """The documents (str) of a text source in a fixed order. Raises UserError naming file and line.

    source: `stdlib` (Python's own library), `webtext` (OpenAI's published sample of GPT-2's
    training text), `-` (standard input), a .txt, .jsonl or .jsonl.gz file (field "text"), a folder
    of such, or any iterable of strings. A .txt file has a document per <|endoftext|>, or, where it
    has none, one per 4,000 characters or so, cut at blank lines. Standard input is either kind."""
    if not isinstance(source, (str, Path)):
        return map(as_text, source)
    if source == "stdlib":
        return library()
    if source == "-":
        if sys.stdin is None:
            raise UserError("standard input is closed; --text takes a path too")
        text = sys.stdin.buffer.read().decode("utf-8-sig", "replace").replace("\r\n", "\n")
        lines, where = text.strip().split("\n"), "standard input"
        as_json = is_json(lines[0]) or is_json(text)
        return parse_jsonl(lines, where) if as_json else legible(split_text(text), where)
    return itertools.chain.from_iterable(map(read_text, text_files(source)))

def is_json(text):
    try:
        return isinstance(json.loads(text), (dict, list))
    except ValueError:
        return False

def as_text(doc):
    if not isinstance(doc, str):
        raise UserError(f"a text is a string, this one is of type {type(doc).__name__}")
    return doc

def text_files(source):
    """The files of a path, or of `webtext`, in order. Raises UserError where there is no text."""
    if source == "webtext":
        return [download(WEBTEXT, CACHE / "webtext.train.jsonl")]
    path = Path(source)
    kinds = f"{', '.join(KINDS[:-1])} or {KINDS[-1]} file"
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        files = [file for file in inside if file.name.endswith(KINDS)]
        if not files:
            raise UserError(f"{path} holds no {kinds}")
        if others := len(inside) - len(files):
            say(f"{path}: {others} of {len(inside)} files are no {kinds}, and left out")
        return files
    if not path.exists():
        takes = f"a {kinds}, a folder of them, -, webtext or stdlib"
        raise UserError(f"no text at {path}; --text takes {takes}")
    if not path.is_file() or not path.name.endswith(KINDS):
        raise UserError(f"{path} is no {kinds}; convert it, or rename it if it is one")
    return [path]

def read_text(path):
    """Yield the documents of a file, one of KINDS. Raises UserError."""
    if path.name.endswith(".txt"):
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        return legible(split_text(text), path)
    return read_jsonl(path)

def legible(texts, where):
    """Yield the same texts. Raises UserError if too much of them was not text in UTF-8."""
    bad = size = 0
    for text in texts:
        bad, size = bad + text.count("\ufffd") + text.count("\0"), size + len(text)
        if bad > 3 + size / 300:
            raise UserError(f"{where} is not text in UTF-8: {bad} of its first {size:,} characters "
                            "cannot be read; convert it, as with iconv -t UTF-8")
        yield text

def library():
    """Yield Python's standard library, its files in pieces of about 4,000 characters, none twice:
    as whole files, 15 would be most of the held-out text."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data"}
    files = (f for f in sorted(root.rglob("*.py")) if not skip & set(f.relative_to(root).parts))
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    yield from dict.fromkeys(itertools.chain.from_iterable(map(split_text, texts)))

def read_jsonl(path):
    """Yield the "text" of each line of a .jsonl or .jsonl.gz file. Raises UserError."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", errors="replace") as f:
        yield from parse_jsonl(f, path)

def parse_jsonl(lines, where):
    """Yield the "text" of each line that is not blank. Raises UserError naming the line."""
    number = 0
    try:
        for number, line in enumerate(legible(lines, where), 1):
            if line.strip():
                yield json.loads(line)["text"] + ""
    except UserError:
        raise
    except (ValueError, KeyError, TypeError):
        message = f'{where}, line {number}: not a JSON object with a string "text"'
        raise UserError(message) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise UserError(f"{where} is damaged after line {number}: {e}") from None

def text_sha256(source):
    """Of a text's content. source: as of `documents`, but an iterable can be read again."""
    if isinstance(source, (str, Path)) and source != "stdlib":
        heads = (f"{file.suffix} {file.stat().st_size} ".encode() for file in text_files(source))
        parts = ([head, *blocks(file)] for head, file in zip(heads, text_files(source)))
        return sha256(itertools.chain.from_iterable(parts))
    docs = (as_text(doc).encode("utf-8", "replace") for doc in documents(source))
    return sha256(b"%d " % len(doc) + doc for doc in docs)

def split_text(text, size=4000):
    """Yield the documents of one long text: cut at <|endoftext|>, or else, after every `size`
    characters, at the next blank line, line or word."""
    if EOT in text:
        yield from text.split(EOT)
        return
    start = 0
    while start < len(text):
        most = start + 2 * size
        ends = (text.find(gap, start + size, most) for gap in ("\n\n", "\n", " "))
        end = next((e + 1 for e in ends if e >= 0), most)
        yield text[start:end]
        start = end

def is_val(i):
    """Every 20th document is held out, from the language model and from the autoencoder alike."""
    return i % 20 == 10

def token_stream(docs, encoding):
    """Yield (document number, its tokens followed by <|endoftext|>), tokenised in parallel."""
    docs, number = iter(docs), itertools.count()
    while some := list(itertools.islice(docs, 256)):
        for ids in encoding.encode_ordinary_batch(some):
            yield next(number), ids + [encoding.eot_token]

def contexts(text_source, encoding, length=64):
    """Yield rows of `length` token ids: documents joined by <|endoftext|> and cut, no short row.
    Raises UserError for a length below 1."""
    if length < 1:
        raise UserError(f"a context of {length} tokens has none")
    stream = token_stream(documents(text_source), encoding)
    ids = itertools.chain.from_iterable(ids for _, ids in stream)
    while len(row := list(itertools.islice(ids, length))) == length:
        yield row

def split_contexts(text_source, encoding, split, length=64, part=0, parts=1):
    """`contexts` of one split's documents, or of every `parts`-th; UserError if there are none."""
    docs = enumerate(documents(text_source))
    docs = (doc for i, doc in docs if is_val(i) == (split == "val"))
    rows = contexts(itertools.islice(docs, part, None, parts), encoding, length)
    if (first := next(rows, None)) is None:
        gives = f"it gives no {split} context of {length} tokens"
        raise UserError(f"the text is too short: {gives} (every 20th document is held out)")
    return itertools.chain([first], rows)


# --------------------------------------------------------------------------------------------------
# `stdlib`: a language model that needs no download. Vocabulary and weights are learned once from
# the source text of Python's standard library, which every machine has, and cached.

def bpe_encoding(merges):
    """tiktoken.Encoding of learned tokens (latin-1 strings, after the 256 bytes, by rank)."""
    gpt2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    tokens = [bytes([i]) for i in range(256)] + [m.encode("latin-1") for m in merges]
    ranks = {token: i for i, token in enumerate(tokens)}
    special = {EOT: len(ranks)}
    return tiktoken.Encoding("stdlib", pat_str=gpt2, mergeable_ranks=ranks, special_tokens=special)

def learn_bpe(docs, n_merges):
    """Byte-pair encoding: `n_merges` times, merge the most frequent adjacent pair; ties go to the
    smaller one. docs: list of str. Returns the new tokens as latin-1 strings in order of rank."""
    split = regex.compile(bpe_encoding([])._pat_str)
    counts = Counter(itertools.chain.from_iterable(map(split.findall, docs)))
    words = [[bytes([b]) for b in w.encode()] for w in counts]
    weight = list(counts.values())
    pairs, where = Counter(), defaultdict(set)
    for i, w in enumerate(words):
        for p in zip(w, w[1:]):
            pairs[p] += weight[i]
            where[p].add(i)
    heap = sorted((-c, p) for p, c in pairs.items())
    merges = {}
    while len(merges) < n_merges and heap:
        count, best = heapq.heappop(heap)
        if -count != pairs[best]:  # counts fall while an entry waits, so it goes back with its own
            if pairs[best] > 0:
                heapq.heappush(heap, (-pairs[best], best))
            continue
        merges.setdefault(b"".join(best).decode("latin-1"))  # two pairs may spell the same token
        touched = set()
        for i in where.pop(best):
            old, new = words[i], []
            for piece in old:
                if new and (new[-1], piece) == best:
                    new[-1] += piece
                else:
                    new.append(piece)
            words[i] = new
            for p in zip(old, old[1:]):
                pairs[p] -= weight[i]
            for p in zip(new, new[1:]):
                pairs[p] += weight[i]
                where[p].add(i)
                touched.add(p)
        for p in touched:
            heapq.heappush(heap, (-pairs[p], p))
    return list(merges)

def ngram_losses(train, val, n_vocab):
    """Rows of tokens (contexts, T) -> nats per token on `val` of a unigram and a bigram model, the
    bigram interpolated with the unigram by Witten-Bell weights."""
    uni = np.bincount(train.ravel(), minlength=n_vocab) + 1.0
    uni /= uni.sum()
    pairs = train[:, :-1].astype(np.int64) * n_vocab + train[:, 1:]
    pair, count = np.unique(pairs, return_counts=True)
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
    """Mean cross-entropy (nats) on tokens (B, T), the last of which is only predicted."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

def orthogonal(X, steps=5):
    """X (..., m, n) -> with singular values near 1: Newton-Schulz, by Muon's quintic polynomial."""
    if X.shape[-2] > X.shape[-1]:
        return orthogonal(X.mT, steps).mT
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (2.0315 * A @ A - 4.775 * A) @ X
    return X

class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum (Jordan 2024) as torch.optim.Muon, but in float32 and equal shapes at
    once: processors without bf16 units emulate bf16, for 70 % of a step."""
    def __init__(self, matrices, lr, weight_decay=0.01, momentum=0.95):
        shapes = defaultdict(list)
        for p in matrices:
            shapes[p.shape].append(p)
        groups = [{"params": ps, "m": torch.zeros_like(torch.stack(ps))} for ps in shapes.values()]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, m, lr = group["params"], group["m"], group["lr"]
            g = torch.stack([p.grad for p in params])
            m.lerp_(g, 1 - group["momentum"])
            update = orthogonal(g.lerp(m, group["momentum"]))
            size = lr * max(1, g.shape[-2] / g.shape[-1]) ** 0.5
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_sub_(params, list(update * size))

def fit_lm(model, train, val, steps, batch):
    """Train on rows of tokens (contexts, T + 1) -> held-out loss on the way, [{"flops", "loss"}].
    The rate is constant and the model the average of its weights, those of step s counted about as
    s^8 (the last ninth): every point of the curve is of a finished model, as a decay to the end
    leaves only the last one. FLOPs per token = 6 (12 L d^2 + d V) + 12 L d T."""
    c, T = model.config, model.config.n_ctx
    weights = 12 * c.n_layer * c.d_model**2 + c.d_model * c.n_vocab
    flops = batch * T * (6 * weights + 12 * c.n_layer * c.d_model * T)  # of a step
    gen = torch.Generator().manual_seed(0)
    some = torch.randperm(len(val), generator=gen)[:256]
    val = val[some, :T].to(model.device)  # as long as those of `evals.downstream`
    order = torch.randint(len(train), (steps, batch), generator=gen)
    matrices = [p for p in model.h.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    muon = Muon(matrices, lr=0.02)
    adamw = torch.optim.AdamW(others, lr=1.2e-2, betas=(0.9, 0.95), weight_decay=0.0)
    curve, average = [], copy.deepcopy(model)
    progress = Progress(steps, "lm")
    milestones = {1, steps} | {round(1.4**i) for i in range(8, 60)}
    for step, rows in enumerate(order, 1):
        loss = lm_loss(model, train[rows].to(model.device))
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * min(step / 50, 1.0)
            optimizer.step()
        with torch.no_grad():
            pairs = list(average.parameters()), list(model.parameters())
            torch._foreach_lerp_(*pairs, 9 / (step + 8))
            if step in milestones:
                curve.append({"flops": step * flops, "loss": lm_loss(average, val).item()})
        progress(step, f"held-out loss {curve[-1]['loss']:.3f}")
    progress.finish()
    model.load_state_dict(average.state_dict())
    return curve

def train_stdlib(path, device="cpu", n_vocab=4096, n_layer=4, d_model=128, n_head=4, steps=500,
                 batch=32, length=64, text="stdlib"):  # fmt: skip
    """Train the embedded language model and save {config, state, merges, curve, losses} at `path`.
    `curve`: held-out loss against FLOPs, for the compute-equivalent metric (paper section 4.1)."""
    say("training the embedded language model (minutes on two cores; cached afterwards)")
    start = time.time()
    docs = list(documents(text))
    merges = learn_bpe([doc for i, doc in enumerate(docs) if not is_val(i)], n_vocab - 257)
    encoding = bpe_encoding(merges)
    train = torch.tensor(list(split_contexts(docs, encoding, "train", length + 1)))
    val = torch.tensor(list(split_contexts(docs, encoding, "val", length + 1)))
    config = GPT2Config(encoding.n_vocab, length, d_model, n_layer, n_head)
    unigram, bigram = ngram_losses(train.numpy(), val.numpy(), config.n_vocab)
    size = f"{sum(map(len, docs)) / 1e6:.1f} M characters, {train.numel() / 1e6:.2f} M tokens"
    say(f"  {size}, vocabulary {config.n_vocab}, {time.time() - start:.0f} s")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2(config).to(device)
    curve = fit_lm(model, train, val, steps, batch)
    losses = {"unigram": unigram, "bigram": bigram, "model": curve[-1]["loss"]}
    saved = {"config": asdict(config), "state": model.state_dict(), "merges": merges}
    with atomic(path) as f:
        torch.save(saved | {"curve": curve, "losses": losses}, f)
    told = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    say(f"  held-out nats per token: {told}; {time.time() - start:.0f} s")


# --------------------------------------------------------------------------------------------------
# Harvesting to disk.

@torch.inference_mode()
def activations(model, rows, layer, site, batch=256):
    """rows (contexts, T) int64 -> (contexts, T, d) float32 on the model's device, in batches."""
    # bf16 products on CUDA; the residual stream stays float32: autocast adds bf16 updates to it.
    with torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda"):
        chunks = (chunk.to(model.device) for chunk in rows.split(batch))
        return torch.cat([model.acts(chunk, layer, site).float() for chunk in chunks])

def to_half(acts, where):
    """float32 -> float16, or a UserError that names the first value that does not survive."""
    half = acts.half()
    if not torch.isfinite(half).all():
        i, t, j = (~torch.isfinite(half)).nonzero()[0].tolist()
        lost = f"the activation {acts[i, t, j].item():g} does not fit float16"
        raise UserError(f"{where}, context {i}, position {t}: {lost}; harvest another site")
    return half

def about(text, docs, encoding):
    """What meta says of a text: its name, a hash of the content (of docs, the same), separator."""
    name = "given"
    if isinstance(text, (str, Path)):
        name = text if text in ("stdlib", "webtext", "-") else str(Path(text).resolve())
    return {"text": name, "text_sha256": text_sha256(docs), "eot": encoding.eot_token}

def check_free(out):
    """Raises UserError for a directory that holds something else than a harvest."""
    own = (out / "meta.json").exists() or not out.exists()
    if not own and any(file.name != ".lock" for file in out.iterdir()):
        raise UserError(f"{out} is not empty and holds no harvest; choose another --out")

def more(asked, before):
    """Whether `asked` tokens are more than those asked for before; 0: the whole text."""
    return before != 0 and (asked == 0 or asked > before)

def claim(out, want):
    """Make `out` ready for the harvest `want` -> meta; UserError if it holds anything else. More
    tokens of the same may be asked for than before."""
    check_free(out)
    found = read_meta(out) if (out / "meta.json").exists() else {}
    if found and any(out.rglob("*.npy")):
        names = [k for k in want if k not in ("model", "text", "asked")]  # these by their sha256
        differs = [k for k in names if found.get(k) != want[k]]
        same = found.get("asked") == want["asked"]
        if differs or not (same or more(want["asked"], found.get("asked", 0))):
            differs = differs or ["asked"]
            told = "; ".join(f"{k}: {found.get(k)} there, {want[k]} wanted" for k in differs)
            whole = f"give --tokens {found['asked']} or " if differs == ["asked"] else "choose "
            raise UserError(f"{out} holds another harvest ({told}); {whole}another --out")
        if found["complete"] and same:
            return found
    meta = want | {"complete": False, "tokens": 0, "val_tokens": 0}
    write_json(out / "meta.json", meta)
    return meta

def cut_shards(docs, encoding, length, wanted):
    """Yield (split, token ids for a shard) until there are `wanted` tokens for training and one
    context is held out, or the text ends: whole contexts, and fewer than SHARD in the last."""
    pending, got = {"train": [], "val": []}, Counter()
    left = {"train": wanted, "val": sys.maxsize}  # tokens still to be yielded
    for i, ids in token_stream(docs, encoding):
        split = "val" if is_val(i) else "train"
        got[split] += len(ids)
        pending[split] += ids[: left[split]]
        while len(pending[split]) >= (size := min(SHARD * length, left[split])) > 0:
            yield split, pending[split][:size]
            del pending[split][:size]
            left[split] -= size
        if not left["train"] and got["val"] >= length:
            break
    for split, ids in pending.items():
        if len(ids) >= length and left[split]:
            yield split, ids[: len(ids) // length * length]

def harvest(
    model, encoding, text, out, layer=None, site="resid_post_mlp", tokens=0, length=None, batch=256
):
    """Write activations of `tokens` training tokens (0: the whole text) and of the held-out
    documents met on the way -> meta (dict). A harvest of the same model and text, by their content,
    is continued, or goes on to more tokens: shards that are there are kept. Raises UserError."""
    out, place = Path(out), model.place(layer, site, length)
    again = isinstance(text, (str, Path)) and text != "-"  # it can be read more than once
    docs = text if again else list(documents(text))
    want = {"format": FORMAT} | place | about(text, docs, encoding) | {"asked": tokens}
    with hold(out):
        meta = claim(out, want)
        if meta["complete"]:
            say(f"{out} is already complete: {meta['tokens']:,} tokens")
            return meta
        write_shards(model, encoding, docs, out, meta, batch)
        if not meta["tokens"] or not meta["val_tokens"]:
            gave = f"it gave {meta['tokens']} training and {meta['val_tokens']} held-out tokens"
            raise UserError(f"the text is too short: {gave} (every 20th document is held out)")
        if meta["tokens"] < tokens:
            say(f"the text ended after {meta['tokens']:,} training tokens")
        write_json(out / "meta.json", meta | {"complete": True})
    return meta | {"complete": True}

def write_shards(model, encoding, docs, out, meta, batch):
    """The shards that are not there yet; counts tokens in `meta`, and adds the hash of them all."""
    length, tokens, digest = meta["context"], meta["asked"], hashlib.sha256()
    progress = Progress(tokens, "harvest", " tokens")
    wanted = math.ceil(tokens / length) * length if tokens else sys.maxsize
    # Ctrl-C loses the shard in work at most: the same command continues.
    for split, ids in cut_shards(documents(docs), encoding, length, wanted):
        rows = np.array(ids, dtype=np.int32).reshape(-1, length)
        number = meta[COUNT[split]] // (SHARD * length)
        tokens_file = out / split / f"tokens-{number:05d}.npy"
        acts_file = out / split / f"acts-{number:05d}.npy"
        # Tokens are written last: where they are, the activations are too.
        there = np.load(tokens_file) if tokens_file.exists() else rows[:0]
        if not np.array_equal(there, rows[: len(there)]):
            raise UserError(f"{tokens_file} is of another text; choose another --out")
        if len(there) < len(rows):  # the last one of a shorter harvest is made anew
            x = torch.from_numpy(rows).long()
            acts = activations(model, x, meta["layer"], meta["site"], batch)
            write_npy(acts_file, to_half(acts, acts_file).cpu().numpy())
            write_npy(tokens_file, rows)
        digest.update(rows.tobytes())
        meta[COUNT[split]] += rows.size
        progress(meta["tokens"])
    progress.finish()
    meta["tokens_sha256"] = digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# Reading back. A batch is a pure function of (seed, step): a resumed run sees the same ones.

BLOCK = 2**18, 2**28  # mixed at a time: so many tokens, and bytes at most

def shuffled_blocks(n_contexts, block, seed, first):
    """Yield (rows, permutation seed) for block first, first + 1, ...: epoch after epoch, all
    contexts in random order."""
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

def apart(shape, dtype):
    """An empty tensor outside the heap, in which blocks of this size would leave holes."""
    size = math.prod(shape) * dtype.itemsize
    if not size or not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)

def rebatch(blocks, batch, skip):
    """Endless blocks of activations (n, d) -> batches (batch, d), without the first `skip` rows. No
    block is held while the next one is made."""
    rest, block = [], next(blocks)[skip:]
    while True:
        while sum(map(len, rest)) + len(block) >= batch:
            need = batch - sum(map(len, rest))
            yield torch.cat([*rest, block[:need]]) if rest else block[:need]
            rest, block = [], block[need:]
        rest.append(block.clone())
        del block
        block = next(blocks)

def read_meta(path):
    """meta.json of a harvested directory. Raises UserError for another kind of file."""
    meta, needed = read_json(Path(path) / "meta.json"), ("complete", "format")
    if meta.get("complete") and meta.get("format") == FORMAT:
        needed = (*PATHS, "layer", "site", "d_model", "context", "model_sha256", "text_sha256",
                  "eot", "asked", "tokens", "val_tokens", "tokens_sha256")
    if missing := [key for key in needed if key not in meta]:
        advice = "harvest into another directory, or name another one"
        raise UserError(f"{path}/meta.json was not written by harvest.py (it has no "
                        f"{missing[0]!r}); {advice}")
    if meta["format"] != FORMAT:
        found = f"{path} has format {meta['format']}, this harvest.py reads {FORMAT}"
        raise UserError(f"{found}; harvest again, into another directory")
    return meta

def is_harvested(path):
    """Whether a complete harvest is at `path`: False for none or part of one. Raises UserError."""
    return (Path(path) / "meta.json").exists() and read_meta(path)["complete"]

def npy_header(f):
    """An open .npy file -> (shape, whether in Fortran's order, dtype), the file at its data."""
    version, form = np.lib.format.read_magic(f), np.lib.format
    return (form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0)(f)

def mapped(file, start, shape, fortran, dtype):
    """Numbers in a file, from byte `start` on, as a tensor, memory-mapped, writable in memory only;
    but where they are not aligned, it holds no file open, of which a process may have few."""
    if dtype.kind not in "fiub" or not dtype.isnative:
        raise ValueError(f"values of type {dtype.str}")
    count, empty, shape = math.prod(shape), np.empty(0, dtype), shape[::-1] if fortran else shape
    if start % dtype.itemsize or not count:
        flat = torch.from_numpy(np.memmap(file, dtype, "c", start, (count,)) if count else empty)
    else:
        first, kind = start // dtype.itemsize, torch.from_numpy(empty).dtype
        flat = torch.from_file(str(file), size=first + count, dtype=kind)[first:]
    return flat.view(shape).permute(*reversed(range(len(shape)))) if fortran else flat.view(shape)

def map_npy(file):
    """A .npy file as a tensor of its shape: see `mapped`. Raises ValueError."""
    with open(file, "rb") as f:
        shape, fortran, dtype = npy_header(f)
        start, size = f.tell(), os.fstat(f.fileno()).st_size
    if size != start + dtype.itemsize * math.prod(shape):
        raise ValueError(f"{size} bytes, not {start + dtype.itemsize * math.prod(shape)}")
    return mapped(file, start, shape, fortran, dtype)

def open_shard(tokens_file, length, d):
    """-> tokens (n, length) array, activations (n, length, d), mapped. Raises UserError."""
    file = tokens_file.with_name(tokens_file.name.replace("tokens", "acts"))
    try:
        tokens = np.load(tokens_file, allow_pickle=False)
        acts = map_npy(file)
        if acts.dtype != torch.float16:
            raise ValueError(f"{acts.dtype} values, not float16")
    except (ValueError, EOFError) as e:
        damage = f"{file} is damaged ({str(e).splitlines()[0][:60]})"
        advice = 'move it and its tokens file away, set "complete" to false in meta.json'
        raise UserError(f"{damage}; {advice} and run harvest.py again") from None
    shape = (len(tokens), length, d)
    if acts.shape != shape:
        raise UserError(f"{file} has shape {tuple(acts.shape)}, expected {shape}; harvest again")
    return tokens, acts

def starts_in(tokens, eot):
    """tokens (contexts, T) of joined documents -> the number of that in which each one starts."""
    ended = (tokens == eot).sum(1)
    return ended.cumsum(0) - ended

class Acts:
    """A harvested directory, memory-mapped: `meta` (dict), `tokens` (contexts, T) int32, `acts` (a
    list of float16 tensors, one a shard, each (contexts, T, d)) of `files`, `len()` in contexts,
    `document` (the number of the one in which each context starts), `kept` (contexts that `batches`
    keeps back), `n_train` (tokens that it does not); `acts[rows]` -> (tokens, activations). Raises
    UserError."""
    def __init__(self, path, split="train"):
        self.path, self.split = Path(path), split
        if not (self.path / "meta.json").exists():
            advice = f"make them with: python harvest.py --out {path}"
            raise UserError(f"no activations at {path} (no meta.json); {advice}")
        self.meta = read_meta(path)
        if not self.meta["complete"]:
            advice = "run the same harvest.py command again to complete it"
            raise UserError(f"the harvest in {path} is not finished; {advice}")
        files = sorted((self.path / split).glob("tokens-*.npy"))
        shards = [open_shard(f, self.meta["context"], self.meta["d_model"]) for f in files]
        found = sum(tokens.size for tokens, _ in shards)
        wanted = self.meta[COUNT[split]]
        if found != wanted:
            holds = f"{self.path / split} holds {found} of {wanted} tokens"
            raise UserError(f"{holds}: shards are missing; harvest again")
        self.files = [f.with_name(f.name.replace("tokens", "acts")) for f in files]
        self.acts = [acts for _, acts in shards]
        self.tokens = np.concatenate([tokens for tokens, _ in shards])
        self.rows, self.document = np.arange(len(self)), starts_in(self.tokens, self.meta["eot"])
        self.count()

    def count(self):
        """What follows from the rest."""
        self.d_model, self.n_tokens = self.meta["d_model"], self.tokens.size
        self.kept = np.arange(KEEP - 1, len(self), KEEP)
        self.n_train = self.n_tokens - self.tokens[self.kept].size
        self._starts = np.cumsum([0] + [len(acts) for acts in self.acts])

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, rows):
        """rows: context numbers (array) or a slice -> (tokens (n, T) int64, activations (n, T, d)),
        on CPU. Raises UserError for NaN or Inf."""
        rows = np.arange(len(self))[rows]
        acts = self.read(rows)
        bad = self.rows[rows[~acts.isfinite().flatten(1).all(1).numpy()]]
        if len(bad):
            shard = int(np.searchsorted(self._starts, bad[0], side="right")) - 1
            row = bad[0] - self._starts[shard]
            T = self.meta["context"]
            at = f"rows {T * row} to {T * row + T - 1}" if self.meta.get("flat") else f"row {row}"
            raise UserError(f"NaN or Inf in {self.files[shard]}, {at}; make these activations anew")
        return torch.from_numpy(self.tokens[rows]).long(), acts

    def read(self, rows, pinned=False):
        """Activations (n, T, d) of context numbers `rows`, unchecked, by all cores."""
        rows = self.rows[rows]
        shard = np.searchsorted(self._starts, rows, side="right") - 1
        shape = (len(rows), *self.acts[0].shape[1:])
        kind = self.acts[0].dtype
        out = torch.empty(shape, dtype=kind, pin_memory=True) if pinned else apart(shape, kind)
        cuts = [0, *np.flatnonzero(np.diff(shard)) + 1, len(rows)]  # runs of rows from one shard
        for a, b in zip(cuts, cuts[1:]):
            if a < b:
                within = torch.from_numpy(rows[a:b] - self._starts[shard[a]])
                torch.index_select(self.acts[shard[a]], 0, within, out=out[a:b])
        return out

    def batches(self, batch, seed=0, step=0, device="cpu", part=0, parts=1):
        """Yield (batch, d) for ever, from step `step` on: contexts shuffled over the whole set,
        less those `kept` back, tokens within a BLOCK of them; each of several parts has its own,
        and all as many."""
        n, T = (len(self) - len(self.kept)) // parts, self.tokens.shape[1]
        if not n:
            raise UserError(f"{len(self)} contexts are too few for {parts} processes")
        each = min(BLOCK[0], BLOCK[1] // (self.d_model * self.acts[0].itemsize))  # tokens
        block = max(1, min(each // T, n))
        epoch, start = divmod(step * batch, n * T)
        first, skip = divmod(start, block * T)
        first += epoch * math.ceil(n / block)
        cuda = torch.device(device).type == "cuda"

        def read(rows, key):
            order = torch.from_numpy(np.random.default_rng((*key, 1)).permutation(len(rows) * T))
            rows = np.sort(rows) * parts + part
            rows += rows // (KEEP - 1)
            if cuda:  # checking all numbers would take longer than training; the loss shows NaN too
                return self.read(rows, pinned=True).flatten(0, 1), order.pin_memory()
            return self[rows][1].flatten(0, 1), order

        def mix(acts, order):
            if cuda:
                return acts.to(device, non_blocking=True)[order.to(device, non_blocking=True)]
            return torch.index_select(acts, 0, order, out=apart(acts.shape, acts.dtype))

        blocks = itertools.starmap(read, shuffled_blocks(n, block, seed, first))
        return rebatch(itertools.starmap(mix, ahead(blocks) if cuda else blocks), batch, skip)

    def sample(self, n_tokens, skip=0, seed=0):
        """Random contexts, about `n_tokens` tokens, after the first `skip` of that order -> (tokens
        (n, T), activations (n, T, d), the documents (n) in which they start)."""
        n = max(1, n_tokens // self.tokens.shape[1])
        rows = np.random.default_rng(seed).permutation(len(self))[skip : skip + n]
        return *self[rows], torch.from_numpy(self.document[rows])

ARRAYS = ".npy", ".npz", ".pt", ".safetensors"
ROWS, GROUP = 64, 1024  # rows of (N, d) read together, and about so many held out together

def map_npz(file):
    """A .npz file -> {name: tensor} of its numbers, memory-mapped unless they are compressed."""
    found = {}
    with zipfile.ZipFile(file) as members, open(file, "rb") as f, np.load(file) as arrays:
        for member in members.infolist():
            name = member.filename.removesuffix(".npy")
            with members.open(member) as inside:
                header = npy_header(inside)
                offset = inside.tell()
            if header[2].kind not in "fiub":
                continue
            if member.compress_type != zipfile.ZIP_STORED:
                found[name] = torch.from_numpy(arrays[name])
                continue
            f.seek(member.header_offset + 26)  # the lengths of name and extra, which come before
            lengths = [int.from_bytes(f.read(2), "little") for _ in range(2)]
            found[name] = mapped(file, f.tell() + sum(lengths) + offset, *header)
    return found

def map_pt(file):
    """A .pt file -> {name: what it holds}, memory-mapped unless it is of the old kind."""
    load = functools.partial(torch.load, file, map_location="cpu", weights_only=True)
    try:
        found = load(mmap=True)
    except RuntimeError:
        found = load()
    found = dict(enumerate(found)) if isinstance(found, (list, tuple)) else found
    return found if isinstance(found, dict) else {"": found}

def read_array(file):
    """The activations in a file of one of the kinds ARRAYS: (N, d) or (contexts, T, d), floats,
    memory-mapped. Raises UserError for a file that holds none, or several."""
    maps = {".npy": lambda f: {"": map_npy(f)}, ".npz": map_npz, ".pt": map_pt}
    try:
        found = maps.get(file.suffix, read_safetensors)(file)
    except Exception as e:  # zip, pickle and header errors come in many types
        why = (str(e).splitlines() or [""])[0]
        raise UserError(f"{file} cannot be read ({type(e).__name__}: {why:.80})") from None
    found = {name: x for name, x in found.items() if isinstance(x, torch.Tensor)}
    floats = torch.float64, torch.float32, torch.float16, torch.bfloat16
    fit = [x for x in found.values() if x.dtype in floats and x.layout == torch.strided
           and x.ndim in (2, 3) and x.numel()]
    if len(fit) != 1:
        held = [f"{name} {tuple(x.shape)} {x.dtype}".strip() for name, x in found.items()][:8]
        raise UserError(f"{file} holds {', '.join(held) or 'no tensor'}; activations are one array "
                        "of floats, (N, d) or (contexts, T, d), in a file of its own")
    return fit[0].detach()

def array_files(path):
    """The files of activations at a path, itself or those of a folder, by the numbers in them."""
    digits = lambda f: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", f.name)]
    files = Path(path).iterdir() if Path(path).is_dir() else [Path(path)]
    own = lambda f: f.suffix in ARRAYS and f.is_file() and not f.name.startswith("._")
    return sorted(filter(own, files), key=digits)

class Given(Acts):
    """Activations of any model, as Acts: a .npy, .npz, .pt or .safetensors of (N, d) or (contexts,
    T, d), or a folder of such, memory-mapped. Rows (N, d) are taken some at a time, up to 64, as if
    these were contexts. Of each 20 groups of about 1,024 rows, fewer of small files, one is held
    out (split "val"); rows that may be of one context with those are left out of "train"; "all" has
    everything. `document` is the number of the group, `tokens` are those of the rows. Raises
    UserError."""
    def __init__(self, path, split="train"):
        self.path, self.files = Path(path), array_files(path)
        if not self.files:
            raise UserError(f"no activations at {path}: neither a harvest (meta.json) nor a file "
                            f"or folder of {', '.join(ARRAYS)}")
        arrays = [read_array(file) for file in self.files]
        for file, x in zip(self.files, arrays):
            alike = x.ndim == arrays[0].ndim and x.dtype == arrays[0].dtype
            if not alike or x.shape[1:] != arrays[0].shape[1:]:
                raise UserError(f"{file} holds {tuple(x.shape)} {x.dtype}, {self.files[0].name} "
                                f"{tuple(arrays[0].shape)} {arrays[0].dtype}; they must be alike")
        flat, sizes = arrays[0].ndim == 2, list(map(len, arrays))
        lost = lambda T: sum(size % T for size in sizes)  # of each file, at its end
        T = next(T for T in range(ROWS, 0, -1) if 100 * lost(T) <= sum(sizes))
        cut = lambda x: x[: len(x) // T * T].unflatten(0, (-1, T))
        self.acts = list(map(cut, arrays)) if flat else arrays
        digest = sampled_sha256(arrays)
        self.meta = {"acts": str(self.path.resolve()), "acts_sha256": digest, "flat": flat,
                     "tokens_sha256": digest} | dict(zip(("context", "d_model"),
                                                         self.acts[0].shape[1:]))
        self.take(split)

    def take(self, split):
        """Become that split."""
        T, n = self.meta["context"], sum(map(len, self.acts))
        group = np.arange(n) // max(1, min(GROUP // T, n // 400))
        held = is_val(group)
        if held.sum() < 2:
            raise UserError(f"{self.path} holds {n} times {T} activations, too few to hold some "
                            "out; 31 times are enough")
        near = -(-ROWS // T) if self.meta["flat"] else 0  # what may be of one context
        beside = np.convolve(held, np.ones(2 * near + 1), "same") > 0.5
        self.split, of = split, {"train": ~beside, "val": held, "all": held | True}
        self.rows = np.flatnonzero(of[split])
        self.tokens = self.rows[:, None] * T + np.arange(T)
        self.document = group[self.rows]
        self.count()

    def other(self, split):
        """Another split of the same files."""
        own = copy.copy(self)
        own.take(split)
        return own

def sampled_sha256(arrays):
    """Of shapes, types and 1,024 rows of each array: all of them may be too many to read."""
    def parts():
        for x in arrays:
            some = torch.linspace(0, len(x) - 1, min(len(x), 1024), dtype=torch.double).long()
            yield f"{tuple(x.shape)} {x.dtype}".encode()
            rows = x[some, 0] if x.ndim == 3 else x[some]
            yield rows.contiguous().view(torch.uint8).numpy().data
    return sha256(parts())

def open_acts(path):
    """Activations on disk -> (those to train on, held-out ones). Raises UserError."""
    there = Path(path).exists() and not (Path(path) / "meta.json").exists()
    if there or Path(path).suffix in ARRAYS:
        return (data := Given(path)), data.other("val")
    return Acts(path), Acts(path, "val")

def called(meta):
    """What activations are of, for people."""
    return "{model}, layer {layer}, {site}".format_map(meta) if "model" in meta else meta["acts"]

class Stream:
    """The same interface as Acts without a disk: as training asks for them, `block` contexts at a
    time go through the model and are shuffled on its device. This bounds memory, and what a resumed
    run repeats. Texts are read again when they end."""
    def __init__(self, model, encoding, text, layer=None, site="resid_post_mlp", length=None,
                 block=None, batch=1024):  # fmt: skip
        self.model, self.encoding, self.chunk = model, encoding, batch
        again = isinstance(text, (str, Path)) and text != "-"  # it can be read more than once
        self.text = text if again else list(documents(text))
        self.block = block or (16384 if model.device.type == "cuda" else 2048)
        self.meta = model.place(layer, site, length) | about(text, self.text, encoding)
        self.layer, self.site = self.meta["layer"], site
        self.length, self.d_model = self.meta["context"], self.meta["d_model"]

    def run(self, rows):
        """Rows of tokens -> (tokens (n, T), activations (n, T, d) float16)."""
        tokens = torch.tensor(list(rows))
        acts = activations(self.model, tokens, self.layer, self.site, self.chunk)
        return tokens, acts.half()

    def batches(self, batch, seed=0, step=0, device=None, part=0, parts=1):
        """As those of Acts, on the model's device; a part is every `parts`-th document."""
        where = (self.text, self.encoding, "train", self.length, part, parts)
        first, skip = divmod(step * batch, self.block * self.length)
        rows = itertools.chain.from_iterable(split_contexts(*where) for _ in itertools.count())
        rows = itertools.islice(rows, first * self.block, None)

        def mix(b):
            acts = self.run(itertools.islice(rows, self.block))[1].flatten(0, 1)
            order = torch.from_numpy(np.random.default_rng((seed, b, 1)).permutation(len(acts)))
            return acts[order.to(acts.device)]

        return rebatch(map(mix, itertools.count(first)), batch, skip)

    def sample(self, n_tokens, skip=0):
        """The first held-out contexts, about `n_tokens` tokens, as those of Acts."""
        n = max(1, n_tokens // self.length)
        rows = list(itertools.islice(
            split_contexts(self.text, self.encoding, "val", self.length), skip + n))
        if len(rows) <= skip:
            raise UserError(f"the held-out text ends after {len(rows)} contexts; give more --text")
        document = starts_in(torch.tensor(rows), self.encoding.eot_token)
        return *self.run(rows[skip:]), document[skip:]


# --------------------------------------------------------------------------------------------------
# The command.

def differs(meta, asked):
    """What of `asked`, {name: value}, is not as in the meta of activations: a model or text that is
    a path by its content."""
    def same(name, value):
        if name not in meta:
            return False
        if name not in PATHS or value in (*PUBLISHED, "stdlib", "webtext", "-"):
            return meta[name] == value
        content = text_sha256(value) if name == "text" else load_model(value)[0].sha256
        return meta[name + "_sha256"] == content

    return "; ".join(f"{name}: {meta.get(name)} there, {value} asked for"
                     for name, value in asked.items() if not same(name, value))

def check_options(text, site):
    """Raises UserError for a text that is not there, and for an unknown site."""
    check_site(site)
    if text not in (None, "", "-", "stdlib", "webtext"):
        text_files(text)

def default_text(model):
    """What a model was trained on: Python's library for `stdlib`, WebText for GPT-2."""
    return "stdlib" if EMBEDDED(model.name) else "webtext"

def source(cfg, alone=True):
    """What to train on -> (Acts or Stream, the same of held-out text, training tokens there are).
    cfg: has acts, model, text, layer, site, ctx, tokens, stream, device, as in sae.py's Config; its
    `acts` and `stream` become what is done. alone: whether missing ones may be harvested here,
    which one of several processes may not. Raises UserError."""
    if cfg.stream and cfg.acts:
        raise UserError(f"--stream reads no activations from disk; leave out --acts {cfg.acts}")
    given = {name: getattr(cfg, name) for name in ("model", "text", "layer", "site", "ctx")}
    given = {name: value for name, value in given.items() if value not in (None, "", "auto")}
    acts, cuda = cfg.acts or "acts", cfg.device.startswith("cuda")
    cfg.stream = cfg.stream or cuda and not cfg.acts and not is_harvested(acts)
    if cfg.stream:
        check_options(cfg.text, site := cfg.site or SITES[3])
        model, encoding = load_model(cfg.model, cfg.device, needs_text=not cfg.text)
        text = cfg.text or default_text(model)
        data = Stream(model, encoding, text, cfg.layer, site, cfg.ctx)
        return data, data, 400_000_000
    if not cfg.acts and not is_harvested(acts):
        options = [f"--{name}={value}" for name, value in given.items()]
        options += [f"--tokens={cfg.tokens}"] if cfg.tokens else []
        missing = f"no complete activations at {acts}"
        if not alone:
            advice = f"python harvest.py --out {acts} {' '.join(options)}, or give --stream"
            raise UserError(f"{missing}; make them first: {advice}")
        say(f"{missing}: harvesting")
        main([*options, "--out", acts, "--device", cfg.device])
    data, held_out = open_acts(acts)
    if told := differs(data.meta | {"ctx": data.meta["context"]}, given):
        raise UserError(f"{acts} holds other activations ({told}); name another --acts, or leave "
                        "out what is asked for")
    cfg.acts = str(Path(acts).resolve())
    return data, held_out, data.n_train

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    add = p.add_argument
    # fmt: off
    add("--model", default="auto", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, stdlib (stdlib-"
        "64, stdlib-256, ...: in another width than 128), a file or folder of weights, or auto "
        "(default): gpt2 if it can be had, else stdlib")
    add("--layer", type=int, help="0-based block; default: two thirds up (8 of 12, 2 of 4)")
    add("--site", default=SITES[3], help=f"one of {', '.join(SITES)}; default: {SITES[3]}")
    add("--tokens", type=int, help="training tokens, 0 for the whole text; default: the whole text "
        "for stdlib, else 10 M on CUDA and 1 M on CPU; a finished harvest goes on to more")
    add("--text", help=".txt, .jsonl, .jsonl.gz, a folder of them, - for standard input, webtext, "
        "stdlib; default: what the model was trained on")
    add("--ctx", type=int, help="tokens in a context; default: 64, as in the paper")
    add("--out", default="acts", help="directory to write; default: acts")
    add("--device", default="", help="cuda or cpu; default: cuda if there")
    add("--batch", type=int, help="contexts per forward pass; default: 1024 on CUDA, 256 on CPU")
    # fmt: on
    a = p.parse_args(argv)
    device, out = pick_device(a.device), Path(a.out)
    cuda = device.startswith("cuda")
    if min(a.tokens or 0, a.batch or 1) < 0 or a.batch == 0:
        raise UserError(f"--tokens {a.tokens} --batch {a.batch}: there are no negative sizes")
    check_options(a.text, a.site)  # before a model is fetched or trained
    check_free(out)
    keep_heap()
    with hold(out):
        model, encoding = load_model(a.model, device, needs_text=not a.text)
        text = a.text or default_text(model)
        batch = a.batch or (1024 if cuda else 256)
        usual = 10_000_000 if cuda else 1_000_000
        if a.tokens is None:
            a.tokens = 0 if text == "stdlib" else usual
        meta = harvest(model, encoding, text, out, a.layer, a.site, a.tokens, a.ctx, batch)
    size = "{tokens:,} training and {val_tokens:,} held-out tokens of {model}".format_map(meta)
    print(f"{a.out}: {size}, layer {meta['layer']}, {meta['site']}, d = {meta['d_model']}")

if __name__ == "__main__":
    run_main(main)
