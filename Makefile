# make demo: set up, make the demo's data, run everything, print the table.
# make test: set up and run all tests that a fresh machine can.
# make bench-accuracy DATA=left_atrium DATA_FOLDER=/path/to/LeftAtrium_1.25mm: train and score what is
#   missing of the benchmark (hours), and redraw its docs; OPTIONS="--sets 0 --experiments labels_first"
PYTHON ?= python3
VENV ?= .venv
CORES ?= all
BIN := $(VENV)/bin
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: demo test lint bench-accuracy schema clean

demo: $(VENV)/ready
	@echo "Some minutes; in another window: $(BIN)/cotrain status demo"
	@echo "(The demo's brains are stored in two orientations on purpose, and it warns of that.)"
	$(RUN) cotrain make-demo-data --folder data/demo
	$(RUN) snakemake --cores $(CORES) --configfile config/demo.yaml --quiet rules \
		--set-threads train=1 infer_pseudo_masks=1 infer_test_masks=1 \
		|| { $(BIN)/cotrain status demo; exit 1; }
	@cat results/demo/summary/summary.txt
	@echo
	@echo "Look next: results/demo/summary/montage.png (one case through the rounds),"
	@echo "results/demo/cases/dataset_report.html, results/demo/cotrain/round-01/audit/train_3d.html,"
	@echo "results/demo/model (a plain nnU-Net folder), README.md (your own data)."

# The tests of a file share what they train; those on SLURM mostly wait.
test: lint
	$(RUN) pytest -q -m "not slow" -n 2 --dist loadfile --ignore tests/slurm
	$(RUN) pytest -q -m "not slow" -n 3 tests/slurm

lint: $(VENV)/ready
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) snakefmt --check Snakefile workflow/rules
	$(RUN) snakemake --lint

bench-accuracy: $(VENV)/ready
	$(RUN) python benchmarks/accuracy.py run --data $(DATA) --data-folder $(DATA_FOLDER) $(OPTIONS)
	$(RUN) python benchmarks/accuracy.py report

schema: $(VENV)/ready
	$(BIN)/cotrain schema > config/schema.json.new
	mv config/schema.json.new config/schema.json
	sed -i "/^| setting/,\$$d" config/README.md
	$(BIN)/cotrain schema --table >> config/README.md

$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 13) else f"Python {v[0]}.{v[1]} found, 3.11 or 3.12 wanted; run: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

# Not .snakemake: it holds what the results of other experiments were made with.
clean:
	rm -rf $(VENV) data/demo results/demo logs/demo benchmarks/demo
