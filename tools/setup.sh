#!/bin/sh
# Build the virtual environment DIR and install one list of packages into it.
#
#   sh tools/setup.sh DIR run|lab|test [PYTHON]
#
# Used by the Makefile. Says what is missing, and what to do, where a machine lacks it.
set -eu
venv=$1
list=$2
python=${3:-}

say() { printf 'flashmoe set-up: %s\n' "$*" >&2; }

usable() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
        2>/dev/null
}

can_make_venv() { "$1" -c 'import venv, ensurepip' 2>/dev/null; }

find_python() {
    incomplete=
    for name in ${python:-python3 python3.13 python3.12 python3.11 python}; do
        if usable "$name"; then
            if can_make_venv "$name"; then
                command -v "$name"
                return
            fi
            incomplete=${incomplete:-$name}
        fi
    done
    if [ -n "$incomplete" ]; then
        say "$incomplete lacks the modules venv and ensurepip;" \
            "on Debian and Ubuntu: apt-get install python3-venv"
    elif [ -n "$python" ]; then
        say "$python is not Python 3.11, 3.12 or 3.13, but" \
            "$("$python" --version 2>/dev/null || echo 'no Python at all')"
    else
        say "needs Python 3.11, 3.12 or 3.13, found" \
            "$(python3 --version 2>/dev/null || echo 'no python3')."
        say "Install one, for example 'apt-get install python3 python3-venv' (Debian" \
            "12, 13), 'brew install python@3.12' (macOS) or conda with" \
            "environment.yml; or name one: make PYTHON=/path/to/python3.12 ..."
    fi
    exit 1
}

if ! usable "$venv/bin/python"; then
    python=$(find_python)
    say "making $venv with $("$python" --version)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi

case $list in
    run) target=. ; also= ;;
    lab) target='.[lab]' ; also=run ;;
    test) target='.[test]' ; also='run lab' ;;
    *) say "unknown list $list: one of run, lab, test" ; exit 1 ;;
esac

say "installing packages into $venv (downloads; may take minutes)"
if ! "$venv/bin/python" -m pip install -qq --disable-pip-version-check \
    --editable "$target"; then
    say "pip could not install them (see above); it needs to reach PyPI." \
        "'make clean' starts afresh."
    exit 1
fi
for done in $list $also; do
    touch "$venv/.has-$done"
done
