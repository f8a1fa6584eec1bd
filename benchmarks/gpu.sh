#!/usr/bin/env bash
# All that is measured on a GPU, in under 6 minutes: benchmarks/gpu.sh [--output FOLDER] [--rehearse] [--only PART...]
# Works from any folder, with or without an environment and installed packages of this checkout. What it runs: gpu.py.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P) || exit 1
export PYTHONPATH="$here/../tools${PYTHONPATH:+:$PYTHONPATH}"

usable='import sys; from importlib.util import find_spec; sys.exit(sys.version_info < (3, 11) or not find_spec("torch"))'
for python in "${PYTHON:-}" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "$here/../.venv/bin/python" python3 python; do
    if [ -n "$python" ] && "$python" -c "$usable" 2>/dev/null; then
        exec "$python" "$here/gpu.py" "$@"
    fi
done
echo "gpu.sh: no Python of at least 3.11 with torch in \$PYTHON, \$VIRTUAL_ENV, .venv or PATH; run 'make test' once, which sets up .venv" >&2
exit 1
