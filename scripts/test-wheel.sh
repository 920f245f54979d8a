#!/usr/bin/env bash
# Build and audit this machine's wheel, install it into an environment of its own and run the fast lane
# there, far from the sources. The dependencies are those of .venv, by path: only fusedops is installed anew.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$PWD/.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip() { "$python" -m pip --quiet --disable-pip-version-check "$@"; }
site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

bash scripts/wheel.sh
wheel=$(ls -t dist/*"$(uname -m)".whl | head -1)

echo "wheel: install $wheel"
"$python" -m venv --without-pip "$work/venv"
pip --python "$work/venv/bin/python" install --no-deps "$wheel"
# A path in a .pth file is searched but its own .pth files are not read: the editable install of
# .venv stays invisible.
site "$python" >"$(site "$work/venv/bin/python")/dependencies.pth"

mkdir "$work/run"
cp -R pyproject.toml tests benchmarks "$work/run"
cd "$work/run"
"$work/venv/bin/python" - "$work/venv" <<'PYTHON'
import pathlib
import sys

import fusedops

path, venv = (pathlib.Path(p).resolve() for p in (fusedops.__file__, sys.argv[1]))
if venv not in path.parents:
    sys.exit(f"wheel: imported fusedops from {path}, not from {venv}")
PYTHON

echo "wheel: fast lane"
"$work/venv/bin/python" -m pytest -n 2 --dist loadfile -m "not slow and not source" -p no:cacheprovider
