#!/bin/sh
# Begin the run FEDROBUST_RUN, or go on with it where it stopped; further arguments go to `fedrobust serve`.
set -eu
runs=${FEDROBUST_RUNS:-/runs}
run=${FEDROBUST_RUN:?set FEDROBUST_RUN to the name of the run}
if [ -e "$runs/$run/ledger.sqlite" ]; then
    exec fedrobust serve --resume "$runs/$run" "$@"
fi
exec fedrobust serve --run "$run" --runs-dir "$runs" "$@"
