# make run     the whole job on the embedded model: install, harvest, train, evaluate, write a page to open in a browser
# make test    the tests
# make gpt2    the paper's setting: GPT-2 small, layer 8, n = 32768, k = 32, activations streamed (needs CUDA and a download)
# make bench   tokens/s of a training step, its parts and the plain objective, at three sizes
# make peers   the same beside sparsify, SAELens and dictionary_learning, which are installed into an environment of their own
# make clean   remove everything generated except the virtual environments and downloads (cache/)

PYTHON ?= python3
PY := .venv/bin/python
RUN := runs/stdlib_n8192_k32

run: $(RUN)/sae.pt
	@$(PY) evals.py $(RUN) --report

test: .venv/ready
	$(PY) -m pytest -q test_sae.py

gpt2: .venv/ready
	test -e runs/gpt2_n32768_k32/sae.pt || $(PY) sae.py --n_latents 32768 --k 32 --model gpt2 --stream --resume --out runs/gpt2_n32768_k32
	$(PY) evals.py runs/gpt2_n32768_k32 --report

bench: .venv/ready
	@for n in 32768 131072 524288; do $(PY) test_sae.py --bench --n_latents $$n; done

peers: .venv-peers/ready
	@.venv-peers/bin/python test_sae.py --bench --peers

# Each step is skipped when its result is there, and continues where it was interrupted.
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --requirement requirements.txt
	@touch $@

.venv-peers/ready: requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --requirement requirements.txt eai-sparsify==1.3.3 sae-lens==6.54.12 dictionary-learning==0.1.0
	.venv-peers/bin/python -m pip uninstall --quiet --yes torchvision  # comes with a peer, unused; it may not fit a CPU build of torch
	@touch $@

acts/ready: .venv/ready
	$(PY) harvest.py --model stdlib --tokens 1000000 --out acts
	@touch $@

$(RUN)/sae.pt: acts/ready
	$(PY) sae.py --n_latents 8192 --k 32 --lr 2e-3 --resume --out $(RUN)

clean:
	rm -rf acts runs .pytest_cache .hypothesis __pycache__

.PHONY: run test gpt2 bench peers clean
