# Both commands set up .venv first: minutes the first time, nothing after.
.PHONY: demo test quick lint docs benchmark setup

demo: setup  ## BN and psBN finetuned side by side on drawn images
	.venv/bin/python -m studies.demo

test: setup  ## every test, the slow ones too; two files at a time, each on one thread
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "" -n 2 --dist loadfile --durations 20

quick: setup  ## the tests of daily use
	.venv/bin/python -m pytest

lint: setup
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
	.venv/bin/python -m mypy

docs: setup  ## the site, in build/docs/README.html; a warning is an error
	.venv/bin/python -m sphinx -c docs -n -W --keep-going -q . build/docs

benchmark: setup  ## the ratios of docs/measured.md
	.venv/bin/python tools/benchmark.py
	.venv/bin/python tools/benchmark_ap.py speed

setup:
	@tools/setup.sh
