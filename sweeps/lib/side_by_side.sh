# Sourced by scripts of two sweeps at once. They have: out, options (what they were called with), python.

# what all of them are asked for. W&B's runs take 1 to 2 seconds each beside its own process, and can be made from the
# records at any time: python -m alignbench.report wandb "$out" --runs offline. The embedded model has room for more
# samples at once than a larger one (a tenth faster).
common=(output_dir="$out" hardware.threads=1 hardware.generation_batch=1024 tracking=disabled)

# glibc hands freed memory back to the system and asks for it again in every step; what it keeps instead is a twentieth
# of a training's time on a CPU
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-2000000000}
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-33554432}

# one sweep; what fails is remembered, and the rest goes on
status=0
sweep() {
    "$python" main.py -m "${common[@]}" "$@" ${options[@]+"${options[@]}"} || status=$?
}

# first NAME: whether this lane is the first to ask for it; what is left at the end goes to whichever lane is free
first() { mkdir "$asked/$1" 2>/dev/null; }

planned() {
    case " ${options[*]-} " in *" plan=true "*) return 0 ;; esac
    return 1
}

# side_by_side FUNCTION...: run them at once, each in a process group of its own, so that all of it can be stopped: by
# Ctrl-C, which the background does not hear, or by a signal to the script alone. Plans come one after the other, for
# they are to be read. The result is that of a function that failed.
side_by_side() {
    local each failed=0
    asked=$(mktemp -d)
    trap 'rm -r "$asked"' EXIT
    if planned; then
        for each in "$@"; do "$each" || failed=$?; done
        return "$failed"
    fi
    lanes=()
    for each in "$@"; do
        set -m
        "$each" &
        set +m
        lanes+=("$!")
    done
    trap 'kill -- "${lanes[@]/#/-}" 2>/dev/null || true; rm -r "$asked"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    for each in "${lanes[@]}"; do
        wait "$each" || failed=$?
    done
    trap 'rm -r "$asked"' EXIT
    trap - INT TERM
    return "$failed"
}
