# Sourced by the scripts beside it: a virtual environment in the clone, made from nothing on Debian and Ubuntu.
# shellcheck shell=bash
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
export PIP_DISABLE_PIP_VERSION_CHECK=1

usage() { # usage SCRIPT: the comment that it begins with
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$1"
}

help_for() { # help_for SCRIPT OPTIONS...: print its usage and end, where an option asks for it; nothing is set up
    local script=$1 option
    shift
    for option in "$@"; do
        if [ "$option" = -h ] || [ "$option" = --help ]; then
            usage "$script"
            exit 0
        fi
    done
}

refuse() { # refuse SCRIPT MESSAGE: say what is wrong with the options, and end
    echo "$2" >&2
    usage "$1" >&2
    exit 2
}

check_pytest_options() { # check_pytest_options SCRIPT PYTHON OPTIONS...: end, with the usage, where pytest does not know one
    local script=$1 python=$2 said
    shift 2
    said=$("$python" -m pytest --markers "$@" 2>&1 >/dev/null) || refuse "$script" "$said" # it reads options, runs nothing
}

usable() { # usable PYTHON: is it 3.10 or newer, and can it make a virtual environment with pip in it?
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

find_python() { # prints an interpreter: $PYTHON if set, else the first that will do
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

as_root() { # as_root COMMAND...: as root or by a sudo that asks nothing; false if neither can
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@" 2>/dev/null; fi
}

require_starpu() { # StarPU, MPI and what their bindings are compiled with, of the distribution; false, saying so, if not to be had
    local packages=() python=$1
    if ! { pkg-config --exists starpu-1.4 || pkg-config --exists starpu-1.3; } 2>/dev/null; then
        packages+=(libstarpu-dev pkg-config)
    fi
    if ! command -v mpicc >/dev/null || ! command -v mpirun >/dev/null; then packages+=(libopenmpi-dev openmpi-bin); fi
    if ! command -v cc >/dev/null; then packages+=(gcc libc6-dev); fi
    if ! "$python" -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))'; then
        packages+=(python3-dev)
    fi
    if ((${#packages[@]} == 0)); then return; fi
    echo "Installing ${packages[*]} for the tests of StarPU and MPI ..." >&2
    if command -v apt-get >/dev/null && as_root apt-get update -qq >&2 && as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${packages[@]}" >&2; then return; fi
    echo "Not installed (no apt-get, or neither root nor sudo): the tests of StarPU and MPI skip, and say so." >&2
    return 1
}

require_python() { # sets python; installs Debian's when there is none and we may
    if python=$(find_python); then return; fi
    if [ -z "${PYTHON:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "No Python >= 3.10 with venv found: installing the distribution's." >&2
        apt-get update -qq >&2
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3 python3-venv >&2
        if python=$(find_python); then return; fi
    fi
    cat >&2 <<'ADVICE'
flashtile needs Python 3.10 or newer with the venv module. On Debian 12+ or Ubuntu 22.04+:
    sudo apt-get install python3 python3-venv
With another interpreter: PYTHON=/path/to/python3 in front of the command.
ADVICE
    exit 1
}

cpu_torch() { # cpu_torch PYTHON [DEVICES]: pip's options for PyTorch's CPU build, 5 GB smaller; none where a GPU is
    local python=$1 devices=${2:-/dev} index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
    if compgen -G "$devices/nvidia[0-9]*" >/dev/null || [ -e "$devices/kfd" ]; then return; fi
    # An index that does not answer would make pip fail; without it pip takes what its own indexes have.
    if "$python" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=15).close()' "$index/torch/" \
        2>/dev/null; then echo "--extra-index-url $index"; fi
}

install_into() { # install_into VENV EXTRAS: this clone, editable; costs nothing when neither has changed since
    local venv=$1 extras=$2 stamp wanted options=()
    require_python
    wanted=$( (echo "$extras $ROOT"; "$python" -V; cat pyproject.toml) | sha256sum)
    stamp=$venv/.installed-${extras//,/-}
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return; fi
    if ! "$venv/bin/python" -c "import sys; sys.exit(sys.version_info[:2] != $("$python" -c 'import sys; print(sys.version_info[:2])'))" 2>/dev/null; then
        "$python" -m venv --clear "$venv"
    fi
    echo "Installing flashtile[$extras] into $venv ..." >&2
    if [[ $extras == *dev* || $extras == *bench* ]]; then read -ra options <<<"$(cpu_torch "$venv/bin/python")"; fi
    "$venv/bin/python" -m pip install -q --no-compile "${options[@]}" -e ".[$extras]"
    echo "$wanted" >"$stamp"
}
