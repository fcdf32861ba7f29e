#!/usr/bin/env bash
# Run Python with the arguments. method.sh starts all stages by this: messages go to a file in METHOD_LOGS, and METHOD_TIMES gets
# a line with begin, end, exit code, that file and the arguments.
# SIGTERM goes to the whole group. Python writes a checkpoint then, and this script waits for it. `make` does not wait: its shell
# ends at once. So a lock says that a stage is still running.
trap : TERM
exec 9>> "$METHOD_LOGS/running.lock"
flock --shared 9
log=$(mktemp "$METHOD_LOGS/XXXXXXXX.log")
begin=$(date +%s.%N)
"$METHOD_PYTHON" "$@" 2> "$log"
code=$?
printf '%s\t%s\t%s\t%s\t%s\n' "$begin" "$(date +%s.%N)" "$code" "$log" "$*" >> "$METHOD_TIMES"
exit $code
