#!/usr/bin/env sh
# Puts the `cotrain` command into the conda environment that Snakemake has just made.
#
# Snakemake runs this script with the new environment active, but from a copy beside it and in the
# working directory, so neither $0 nor $PWD says where the clone is: the Snakefile exports it.
# The install is editable, as the environment is made once and the clone changes; the dependencies
# are pinned in cotrain.yaml, so pip must bring none.
set -eu
python -m pip install --no-deps --no-build-isolation --editable "${COTRAIN_CLONE:?is set by the Snakefile}"
