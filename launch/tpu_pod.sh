#!/usr/bin/env bash
# A pod, in its simplest form: creates a Cloud TPU slice, installs this repository on all its hosts, runs the main job
# on all of them and deletes the slice, also after an error or Ctrl-C. Run again with the same workdir, it resumes.
#
#   launch/tpu_pod.sh --name=r1zero --project=my-project --zone=us-west4-a \
#       --accelerator=v5litepod-16 --runtime=v2-alpha-tpuv5-lite --workdir=/runs/r1zero \
#       --setup='sudo apt-get install -y nfs-common && sudo mkdir -p /runs && sudo mount 10.0.0.2:/share /runs' \
#       -- --config.total_steps=200 --config.mesh.fsdp=4
#
#   --name=NAME          of the queued resource and of its node
#   --project=PROJECT    that pays
#   --zone=ZONE          that has the accelerator
#   --accelerator=TYPE   v5litepod-16 (four hosts), v6e-8 (one), ...
#   --runtime=VERSION    v2-alpha-tpuv5-lite, v2-alpha-tpuv6e, ...
#   --workdir=/PATH      a folder, not a gs:// address. Every host writes its part of a checkpoint there, so on more
#                        than one host it lies on a file system that all of them mount, such as Filestore (NFS)
#   --setup=COMMAND      run first on every host, to mount that file system
#   --config=FILE.py     from the repository's root; default: configs/r1zero.py
#   --spot               cheaper, and may be taken away
#   --wait=MINUTES       how long to wait for the slice; default: 60
#   --keep               do not delete the slice, nor what still runs on it; says how to
#   --dry-run            print the gcloud commands, one a line, and run nothing
#   -- FLAGS             passed to grpo_jax.main
#
# Needs gcloud, logged in, with an SSH key without a passphrase or in ssh-agent. Only files that git tracks are copied,
# as they are now. Keep the terminal open (tmux): the job ends with it.

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
      (($# > 1)) || die 2 "expected a value for $1; found none; write $1=VALUE"
      set -- "$1=$2" "${@:3}" ;;
    --name=* | --project=* | --zone=* | --accelerator=* | --runtime=* | --workdir=* | --setup=* | --config=* | --wait=*)
      key=${1%%=*}
      printf -v "${key#--}" '%s' "${1#*=}"
      shift ;;
    --spot | --keep) printf -v "${1#--}" yes; shift ;;
    --dry-run) dry_run=yes; shift ;;
    --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
    --) shift; passed=("$@"); break ;;
    *) die 2 "expected flags as --help lists them; found $1; put flags of grpo_jax.main behind --" ;;
  esac
done
for key in name project zone accelerator runtime workdir; do
  [[ ${!key} ]] || die 2 "expected --$key=VALUE; found none; see --help"
done
[[ $workdir == /* ]] ||
  die 2 "expected --workdir=/PATH on a file system that all hosts mount; found $workdir; mount one with --setup"
[[ -f $root/${config%%:*} ]] ||
  die 2 "expected --config to name a file of $root such as configs/r1zero.py; found no ${config%%:*}; correct --config"
[[ $wait =~ ^[0-9]+$ ]] || die 2 "expected --wait to be a number of minutes; found $wait; write --wait=60"
[[ $dry_run ]] || command -v gcloud > /dev/null ||
  die 2 "expected gcloud in PATH; found none; install the Google Cloud CLI and run: gcloud auth login"

where=(--zone="$zone" --project="$project")
delete=(queued-resources delete "$name" "${where[@]}" --force --quiet)
describe=(queued-resources describe "$name" "${where[@]}" '--format=value(state.state)')
archive=$root/build/$name.tar
created=''

show() {  # the gcloud command as a line that can be pasted into a shell
  local line
  printf -v line '%q ' gcloud compute tpus "$@"
  printf '%s\n' "${line% }"
}
tpus() { if [[ $dry_run ]]; then show "$@"; else gcloud compute tpus "$@"; fi; }
on_all() { tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"; }

finish() {
  local status=$?
  trap '' INT TERM HUP  # a second Ctrl-C may not leave a slice behind
  set +e
  [[ $dry_run ]] || rm -f "$archive"
  if [[ $created && ! $keep ]]; then
    [[ $dry_run ]] || say "deleting $name"
    if ! tpus "${delete[@]}"; then
      say "error: expected to delete $name; gcloud failed, so it may still cost money; run: $(show "${delete[@]}")"
      ((status)) || status=1
    fi
  elif [[ $created && ! $dry_run ]]; then
    say "kept $name; to delete it: $(show "${delete[@]}")"
  fi
  exit "$status"
}
trap finish EXIT

if [[ ! $dry_run ]]; then
  trap '' PIPE  # nor may a closed terminal
  mkdir -p "$root/build"
  changed=$(git -C "$root" stash create)  # a commit of the tracked files as they are now; nothing if none has changed
  git -C "$root" archive --output="$archive" "${changed:-HEAD}"
fi

trap '' INT TERM HUP  # the request is made, or it is not: an interrupt waits until that is known
tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$accelerator" \
  --runtime-version="$runtime" "${where[@]}" ${spot:+--spot} ||
  die 1 "expected to create $name; gcloud failed (see above); if it is there nevertheless: $(show "${delete[@]}")"
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
        die 1 "expected $name to become ACTIVE; found $state; try another zone, another accelerator or --spot" ;;
    esac
    ((minutes < wait)) ||
      die 1 "expected $name to become ACTIVE within $wait minutes; found $state; raise --wait or try another zone"
    sleep 30
  done
fi

tpus tpu-vm scp "$archive" "$name:grpo_jax.tar" "${where[@]}" --worker=all
[[ ! $setup ]] || on_all "$setup"
# The runtimes carry Python 3.10; uv brings 3.11, the Python of constraints.txt.
on_all "mkdir -p grpo_jax && tar -xf grpo_jax.tar -C grpo_jax && cd grpo_jax &&\
 PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv &&\
 python3 -m uv venv --quiet --clear --seed --python=3.11 .venv &&\
 .venv/bin/python -m pip install --quiet -c constraints.txt '.[tpu]'"
on_all "cd grpo_jax && GRPO_JAX_DISTRIBUTED=1 .venv/bin/python -u -m grpo_jax.main\
$(printf ' %q' --config="$config" --workdir="$workdir" ${passed[@]+"${passed[@]}"})"
