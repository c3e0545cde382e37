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

with_package() { # with_package REQUIREMENT FOLDER COMMAND...: found first, in FOLDER, where it is put if it is not yet
    local requirement=$1 folder=$2
    shift 2
    # Without it COMMAND would find the environment's or none, and say nothing of this one.
    if ! compgen -G "$folder/*.dist-info" >/dev/null; then
        "$bin/python" -m pip install -q --no-compile --no-deps --target "$folder" "$requirement" || return 1
    fi
    PYTHONPATH=$folder${PYTHONPATH:+:$PYTHONPATH} "$@"
}
