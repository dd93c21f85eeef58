#!/bin/sh
# The aarch64 Python of this tree, run by QEMU in user mode: ROOT/bin/arm-python SCRIPT ...
# QEMU_CPU selects the processor (default cortex-a53, the weakest); ROOT/cpu lists what there is.
# Files and network are the host's; only libraries, /etc and /proc/cpuinfo come from the tree.
me=$(readlink -f -- "$0")
root=${me%/usr/bin/arm-python}
QEMU_CPU=${QEMU_CPU:-cortex-a53}
view=$root/cpu/${QEMU_CPU%%,*}
if [ ! -r "$view/one-processor" ]; then
    echo "arm-python: no processor '${QEMU_CPU%%,*}' here, only: $(cd "$root/cpu" && echo *)" >&2
    exit 2
fi
# ONNX Runtime detects its CPU from /proc/cpuinfo and crashes on an x86 one: show it the emulated processor, as many
# times as this host has cores. The count may change between runs (containers), hence here and not in the build.
cores=$(getconf _NPROCESSORS_CONF)
if [ "$(grep -c '^processor' "$view/proc/cpuinfo" 2>/dev/null)" != "$cores" ]; then
    fresh=$view/proc/cpuinfo.$$
    n=0
    while [ "$n" -lt "$cores" ]; do
        printf 'processor\t: %d\n' "$n"
        cat "$view/one-processor"
        n=$((n + 1))
    done >"$fresh" && mv -f "$fresh" "$view/proc/cpuinfo"
fi
# The host's module path holds x86 libraries; what the emulated Python may import comes in under another name.
unset LD_PRELOAD LD_LIBRARY_PATH PYTHONHOME PYTHONEXECUTABLE VIRTUAL_ENV
PYTHONPATH=${ARM_PYTHONPATH-}
PYTHONNOUSERSITE=1
export QEMU_CPU PYTHONPATH PYTHONNOUSERSITE
# With this name as argv[0], sys.executable is the wrapper: child interpreters start through it too.
exec "$root/qemu-aarch64" -0 "$me" -L "$view" "$root/usr/bin/python@PYTHON@" "$@"
