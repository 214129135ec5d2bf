# Two commands are all most people need: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench bench-peers bench-update backend fuzz soak mutants messages fleet powercut kills offline renewals metadata upgrade delta strace faketime stubs zoo clean mosquitto redis h2load

demo: $(VENV)/.demo            ## three tiers on this machine, watched end to end
	@$(BIN)/tierline demo $(ARGS)

test: $(VENV)/.test mosquitto redis faketime ## the whole suite, with the real broker and the real Redis
	$(BIN)/pytest $(ARGS)

check: $(VENV)/.test           ## formatting, lint, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.bench $(VENV)/.test h2load  ## held against the budgets, beside raw onnxruntime and FastAPI (about 8 minutes)
	$(BIN)/python tests/bench/run.py $(ARGS)

bench-peers: $(VENV)/.bench $(VENV)/.test h2load  ## other model servers, each in its own environment (about 15 minutes)
	$(BIN)/python tests/bench/rivals.py --venvs build/peers $(ARGS)

bench-update: $(VENV)/.bench $(VENV)/.test mosquitto h2load  ## an edge node's p99 while the hub has it take 100 MB
	$(BIN)/python tests/bench/update.py $(ARGS)

backend: $(VENV)/.test         ## ONNX's own test cases through a running server
	$(BIN)/python tests/proofs/backend.py $(ARGS)

fuzz: $(VENV)/.test            ## 10,000 malformed requests over REST, gRPC and WebSocket
	$(BIN)/python tests/proofs/fuzz.py $(ARGS)

soak: $(VENV)/.test            ## 200 load cycles and 1,000 hot swaps under load
	$(BIN)/python tests/proofs/soak.py $(ARGS)

mutants: $(VENV)/.test         ## 10,000 damaged ONNX and LiteRT files through delivery and probe
	$(BIN)/python tests/proofs/mutants.py $(ARGS)

messages: $(VENV)/.test mosquitto  ## 10,000 malformed control-plane messages to a real hub and edge node
	$(BIN)/python tests/proofs/messages.py $(ARGS)

fleet: $(VENV)/.test mosquitto    ## 1,000 simulated nodes coming back at once to a real broker and hub
	$(BIN)/python tests/proofs/fleet.py $(ARGS)

powercut: $(VENV)/.test strace ## what a power cut may leave of a node's disk: every state must start
	$(BIN)/python tests/proofs/powercut.py $(ARGS)

kills: $(VENV)/.test mosquitto ## 1,000 kill -9 over broker, hub, edge and device while events flow (about 10 minutes)
	$(BIN)/python tests/proofs/kills.py $(ARGS)

offline: $(VENV)/.test mosquitto faketime ## 400 days without hub and broker, and back
	$(BIN)/python tests/proofs/offline.py $(ARGS)

renewals: $(VENV)/.test mosquitto ## certificates renewed again and again while a connection stands
	$(BIN)/python tests/proofs/renewals.py $(ARGS)

metadata: $(VENV)/.test        ## bytes and time of update metadata, 1,000 models
	$(BIN)/python tests/proofs/metadata.py $(ARGS)

upgrade: $(VENV)/.test mosquitto ## a real edge node upgraded to another wheel, and taken back from a broken one
	$(BIN)/python tests/proofs/upgrade.py $(ARGS)

delta: $(VENV)/.test           ## what deltas between model versions save
	$(BIN)/python tests/proofs/delta.py $(ARGS)

stubs:                         ## models/serving/grpc/inference_pb2.py anew from its .proto, in an environment of its own
	$(PYTHON) -m venv build/stubs && build/stubs/bin/python -m pip install --quiet 'grpcio-tools==1.73.*'
	build/stubs/bin/python -m grpc_tools.protoc -I models/serving/grpc --python_out=models/serving/grpc models/serving/grpc/inference.proto
	sed -i -e '1i # ruff: noqa\n# fmt: off' -e 's/_descriptor_pool\.Default()/_descriptor_pool.DescriptorPool()/' models/serving/grpc/inference_pb2.py

zoo: $(VENV)/.convert          ## retrain the zoo's models into build/digits (needs torch; the model card has the other steps)
	$(BIN)/python -m models.zoo.digits.train --work build/digits
	$(BIN)/python -m models.zoo.digits.int8 --work build/digits

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Tierline needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "The venv module is missing: apt-get install python3-venv"; exit 1; }
	@touch $@

$(VENV)/.demo $(VENV)/.test $(VENV)/.bench $(VENV)/.convert: $(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/.python
	@echo "installing into $(VENV): $*"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	@touch $@

mosquitto:
	@PATH="$$PATH:/usr/sbin" command -v mosquitto >/dev/null || $(MAKE) --no-print-directory package NAME=mosquitto

redis:
	@command -v redis-server valkey-server >/dev/null || $(MAKE) --no-print-directory package NAME=redis-server

faketime:
	@command -v faketime >/dev/null || $(MAKE) --no-print-directory package NAME=faketime

strace:
	@command -v strace >/dev/null || $(MAKE) --no-print-directory package NAME=strace

h2load:
	@command -v h2load >/dev/null || $(MAKE) --no-print-directory package NAME=nghttp2-client

# Install a system package where the user may; say so and go on where not.
.PHONY: package
package:
	@if [ "$$(id -u)" = 0 ]; then as=; elif sudo -n true 2>/dev/null; then as="sudo -n"; else \
	  echo "$(NAME) is not installed and may not be installed by this user: what needs it is left out"; exit 0; fi; \
	echo "installing $(NAME)"; \
	$$as apt-get update -qq && $$as env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(NAME) >/dev/null \
	  || echo "$(NAME) could not be installed: what needs it is left out"
