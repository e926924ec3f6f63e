#!/bin/sh
# Installs the programs that the tests run beside the server, or names those that are missing when it may not.
# Usage: clients.sh VENV "PYTHON PACKAGES" DEBIAN-PACKAGE...
set -eu
venv=$1 python_packages=$2
shift 2

missing=
for package in "$@"; do
    if ! dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed'; then
        missing="$missing $package"
    fi
done
if [ -n "$missing" ] && command -v apt-get >/dev/null; then
    if [ "$(id -u)" = 0 ]; then
        # The tests start processes of their own on free ports: the packages' services stay off, also while installing.
        policy=/usr/sbin/policy-rc.d
        made=
        if [ ! -e $policy ]; then
            printf '#!/bin/sh\nexit 101\n' > $policy && chmod +x $policy && made=$policy
        fi
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -q || true
        # shellcheck disable=SC2086
        apt-get install -q -y --no-install-recommends $missing || echo "cannot install:$missing"
        [ -z "$made" ] || rm -f "$made"
    else
        echo "the tests skip what needs these Debian packages, which are not installed:$missing"
        echo "install them with: sudo apt-get install --no-install-recommends$missing"
    fi
fi

# DuckDB reads the data files independently of the server; its extensions come as Python packages.
if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv" || { echo "cannot make a Python environment at $venv"; exit 0; }
fi
# shellcheck disable=SC2086
"$venv/bin/pip" install -q --disable-pip-version-check $python_packages \
    || echo "cannot install into $venv: $python_packages; the tests skip what needs them"
