# Sourced after environment.sh: steps that go on where one fails, a table of them at the end, and what
# they share.
# shellcheck shell=bash disable=SC2154 # bin: the folder of programs, of the script that sources this
failed=()
steps=() # a line each for the table

step() { # step NAME COMMAND...: run, time, remember a failure and go on, so that one run tells everything
    local name=$1 start=$SECONDS
    shift
    echo "== $name"
    local state=passed
    "$@" || state=FAILED
    if [ $state = FAILED ]; then failed+=("$name"); fi
    steps+=("$(printf '%-12s %5d s  %s' "$name" $((SECONDS - start)) $state)")
    echo "-- $name: $((SECONDS - start)) s"
}

verdict() { # the table, and false if a step failed
    printf '%s\n' "== steps" "${steps[@]}"
    if ((${#failed[@]})); then
        echo "FAILED: ${failed[*]}"
        return 1
    fi
    echo "All checks passed in $SECONDS s."
}

with_triton() { # with_triton VERSION FOLDER COMMAND...: with another Triton, put into FOLDER where it is not yet
    local version=$1 folder=$2
    shift 2
    if [ ! -d "$folder/triton" ]; then # without it COMMAND would find the environment's, and say nothing of this one
        "$bin/python" -m pip install -q --no-compile --no-deps --target "$folder" "triton==$version.*" || return 1
    fi
    PYTHONPATH=$folder${PYTHONPATH:+:$PYTHONPATH} "$@"
}
