#!/usr/bin/env bash
# Executed instructions of one repetition of a benchmark, under emulation: the difference between
# 2 N repetitions and N, over N, start-up excluded. With a number of multiply-accumulates, those per
# instruction too.
#
#   INSN_PLUGIN=plugin.so QEMU_CPU=cortex-a76 benches/arm/count.sh [-n N] [-m MAC] [-r FLAG] PROGRAM ARGUMENTS...
#
# FLAG, `--repeat` if not given, is how PROGRAM is told the number of repetitions. The plugin prints a
# line with `insns: COUNT` at the end.
set -euo pipefail
n=1 mac=0 flag=--repeat
while getopts n:m:r: option; do
  case $option in
    n) n=$OPTARG ;;
    m) mac=$OPTARG ;;
    r) flag=$OPTARG ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
: "${INSN_PLUGIN:?the path of a QEMU plugin that counts instructions}"
: "${1:?a program to run}"
count() {
  local log
  log=$(qemu-aarch64 -L "${SYSROOT:-/usr/aarch64-linux-gnu}" -plugin "$INSN_PLUGIN" "${@:2}" "$flag" "$1" 2>&1) ||
    { printf '%s\n' "$log" >&2; exit 1; }
  grep -oE 'insns: *[0-9]+' <<<"$log" | grep -oE '[0-9]+' ||
    { printf '%s\nno instruction count in this output\n' "$log" >&2; exit 1; }
}
once=$(count "$n" "$@")
twice=$(count $((2 * n)) "$@")
awk -v i=$((twice - once)) -v n="$n" -v m="$mac" -v cpu="${QEMU_CPU:-default}" 'BEGIN {
  printf "%s: %.0f instructions", cpu, i / n
  if (m > 0) printf ", %.2f MAC per instruction", m * n / i
  print ""
}'
