#!/bin/sh
# Print the newest supported Python on the path that runs:  find_python.sh [VERSION …]
#
# Versions default to all supported ones, newest first. A name on the path may be a version
# manager's shim that only prints an error, and a system's Python may lack venv. So each one is run.
set -u
versions=${*:-3.13 3.12 3.11 3.10}
for version in $versions; do
    if "python$version" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        command -v "python$version"
        exit 0
    fi
done
echo "none of Python $versions runs here: install one of them (with venv), or give PYTHON=…" >&2
exit 2
