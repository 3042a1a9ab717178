#!/usr/bin/env bash
# Runs a training job on a Cloud TPU slice: creates the slice, installs this repository on all of its hosts, runs
# grpo_jax.main on all of them, and deletes the slice, even after an error or Ctrl-C. Running it again with the same
# workdir resumes the run.
#
#   launch/tpu_pod.sh --name=r1zero --project=my-project --zone=us-west4-a \
#       --accelerator=v5litepod-16 --runtime=v2-alpha-tpuv5-lite --workdir=/runs/r1zero \
#       --setup='sudo apt-get install -y nfs-common && sudo mkdir -p /runs && sudo mount 10.0.0.2:/share /runs' \
#       -- --config.total_steps=200 --config.mesh.fsdp=4
#
#   --name=NAME          name of the queued resource and of its node
#   --project=PROJECT    Google Cloud project that is billed
#   --zone=ZONE          zone that offers the accelerator
#   --accelerator=TYPE   accelerator type, such as v5litepod-16 (four hosts) or v6e-8 (one host)
#   --runtime=VERSION    TPU software version, such as v2-alpha-tpuv5-lite or v2-alpha-tpuv6e
#   --workdir=/PATH      workdir of the run: a folder, not a gs:// address. Every host writes its shards of a checkpoint
#                        there, so all hosts must mount the file system it is on, such as Filestore (NFS)
#   --setup=COMMAND      command to run first on every host, for example to mount that file system
#   --config=FILE.py     config file, relative to the repository's root; default: configs/r1zero.py
#   --spot               request a spot slice, which is cheaper but can be preempted
#   --wait=MINUTES       how long to wait for the slice; default: 60
#   --keep               do not delete the slice at the end, but print the command that deletes it
#   --dry-run            print the gcloud commands, one per line, without running any
#   -- FLAGS             flags for grpo_jax.main
#
# Requires gcloud, logged in, and an SSH key that has no passphrase or is in ssh-agent. Only files tracked by git are
# copied, with uncommitted changes. Keep the terminal open, for example in tmux: the job ends when it closes.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name='' project='' zone='' accelerator='' runtime='' workdir='' setup='' config=configs/r1zero.py wait=60
spot='' keep='' dry_run=''
passed=()

say() { printf '%s\n' "$*" >&2; }
die() { say "error: ${2//$'\n'/ }"; exit "$1"; }

while (($#)); do
  case $1 in
    --name | --project | --zone | --accelerator | --runtime | --workdir | --setup | --config | --wait)
      (($# > 1)) || die 2 "$1 needs a value; found none. Write $1=VALUE."
      set -- "$1=$2" "${@:3}" ;;
    --name=* | --project=* | --zone=* | --accelerator=* | --runtime=* | --workdir=* | --setup=* | --config=* | --wait=*)
      key=${1%%=*}
      printf -v "${key#--}" '%s' "${1#*=}"
      shift ;;
    --spot | --keep) printf -v "${1#--}" yes; shift ;;
    --dry-run) dry_run=yes; shift ;;
    --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
    --) shift; passed=("$@"); break ;;
    *) die 2 "Flags must be among those that --help lists; found $1. Put flags of grpo_jax.main after --." ;;
  esac
done
for key in name project zone accelerator runtime workdir; do
  [[ ${!key} ]] || die 2 "--$key is required; found none. Pass --$key=VALUE; see --help."
done
[[ $workdir == /* ]] ||
  die 2 "--workdir must be an absolute path that all hosts mount; found $workdir. Mount a file system with --setup."
[[ -f $root/${config%%:*} ]] ||
  die 2 "--config must name a file in $root, such as configs/r1zero.py; found no ${config%%:*} there. Correct --config."
[[ $wait =~ ^[0-9]+$ ]] || die 2 "--wait must be a number of minutes; found $wait. Write --wait=60."
[[ $dry_run ]] || command -v gcloud > /dev/null ||
  die 2 "gcloud must be in PATH; found none. Install the Google Cloud CLI and run: gcloud auth login"

where=(--zone="$zone" --project="$project")
delete=(queued-resources delete "$name" "${where[@]}" --force --quiet)
describe=(queued-resources describe "$name" "${where[@]}" '--format=value(state.state)')
archive=$root/build/$name.tar
created=''

show() {  # prints the gcloud command as a line that can be pasted into a shell
  local line
  printf -v line '%q ' gcloud compute tpus "$@"
  printf '%s\n' "${line% }"
}
tpus() { if [[ $dry_run ]]; then show "$@"; else gcloud compute tpus "$@"; fi; }
on_all() { tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"; }

finish() {
  local status=$?
  trap '' INT TERM HUP  # a second Ctrl-C must not leave the slice behind
  set +e
  [[ $dry_run ]] || rm -f "$archive"
  if [[ $created && ! $keep ]]; then
    [[ $dry_run ]] || say "deleting $name"
    if ! tpus "${delete[@]}"; then
      say "error: $name may still cost money: it could not be deleted; gcloud failed. Run: $(show "${delete[@]}")"
      ((status)) || status=1
    fi
  elif [[ $created && ! $dry_run ]]; then
    say "kept $name; to delete it, run: $(show "${delete[@]}")"
  fi
  exit "$status"
}
trap finish EXIT

if [[ ! $dry_run ]]; then
  trap '' PIPE  # nor must a closed terminal leave the slice behind
  mkdir -p "$root/build"
  changed=$(git -C "$root" stash create)  # a commit with the uncommitted changes; empty without any
  git -C "$root" archive --output="$archive" "${changed:-HEAD}"
fi

trap '' INT TERM HUP  # delay interrupts until it is known whether the slice has been requested
tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$accelerator" \
  --runtime-version="$runtime" "${where[@]}" ${spot:+--spot} ||
  die 1 "$name could not be created; gcloud failed (see above). If it exists nevertheless, run: $(show "${delete[@]}")"
created=yes
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

if [[ $dry_run ]]; then
  tpus "${describe[@]}"
else
  while :; do
    state=$(tpus "${describe[@]}") || state=UNKNOWN
    minutes=$((SECONDS / 60))
    say "$name: $state after $minutes of at most $wait minutes"
    case $state in
      ACTIVE) break ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        die 1 "$name should become ACTIVE; found $state. Try another zone, another accelerator or --spot." ;;
    esac
    ((minutes < wait)) ||
      die 1 "$name should become ACTIVE within $wait minutes; found $state. Raise --wait or try another zone."
    sleep 30
  done
fi

tpus tpu-vm scp "$archive" "$name:grpo_jax.tar" "${where[@]}" --worker=all
[[ ! $setup ]] || on_all "$setup"
# The runtimes come with Python 3.10; uv installs 3.11, which constraints.txt is for.
on_all "mkdir -p grpo_jax && tar -xf grpo_jax.tar -C grpo_jax && cd grpo_jax &&\
 PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv &&\
 python3 -m uv venv --quiet --clear --seed --python=3.11 .venv &&\
 .venv/bin/python -m pip install --quiet -c constraints.txt '.[tpu]'"
on_all "cd grpo_jax && GRPO_JAX_DISTRIBUTED=1 .venv/bin/python -u -m grpo_jax.main\
$(printf ' %q' --config="$config" --workdir="$workdir" ${passed[@]+"${passed[@]}"})"
