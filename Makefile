# make run     the whole job on the embedded model: install, harvest, train, evaluate, write a page to open in a browser.
#                About ten minutes on two CPU cores.
# make test    the tests
# make gpt2    the paper's setting: GPT-2 small, layer 8, n = 32768, k = 32, activations streamed (needs CUDA and a download)
# make bench   tokens/s of a training step and its parts against the encoder product alone, at three sizes
# make clean   remove everything generated except the virtual environment and downloads (cache/)

PYTHON ?= python3
PY := .venv/bin/python
RUN := runs/stdlib_n32768_k32

run: $(RUN)/sae.pt
	@$(PY) evals.py $(RUN) --report

test: .venv/ready
	$(PY) -m pytest -q test_sae.py

gpt2: .venv/ready
	test -e runs/gpt2_n32768_k32/sae.pt || $(PY) sae.py --n_latents 32768 --k 32 --model gpt2 --stream --out runs/gpt2_n32768_k32 \
	    $$(test ! -e runs/gpt2_n32768_k32/checkpoint.pt || echo --resume)
	$(PY) evals.py runs/gpt2_n32768_k32 --report

bench: .venv/ready
	@for n in 32768 131072 524288; do $(PY) sae.py --n_latents $$n --k 32 --bench; done

# Each step is skipped when its result is there, and continues where it was interrupted.
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --requirement requirements.txt
	@touch $@

acts/ready: .venv/ready
	$(PY) harvest.py --model stdlib --out acts
	@touch $@

$(RUN)/sae.pt: acts/ready
	$(PY) sae.py --n_latents 32768 --k 32 --tokens 2500000 --out $(RUN) $$(test ! -e $(RUN)/checkpoint.pt || echo --resume)

clean:
	rm -rf acts runs .pytest_cache .hypothesis __pycache__

.PHONY: run test gpt2 bench clean
