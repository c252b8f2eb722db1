#!/usr/bin/env bash
# What the chart renders, in tests/chart/*_test.py; names of tests, such as `names_test`, run those alone. Needs
# .cache/bin/helm (or HELM), promtool, lua5.4 and Python's yaml.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/chart"
if [ $# -eq 0 ]; then set -- discover --pattern '*_test.py'; fi
PYTHONDONTWRITEBYTECODE=1 exec python3 -W error -m unittest "$@" --quiet
