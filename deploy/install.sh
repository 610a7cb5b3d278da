#!/bin/sh
# Installs a lock file by uv, every wheel checked against the lock's hashes. usage: install.sh LOCK TORCH UV-PIP-INSTALL...
#
#   sh deploy/install.sh requirements.lock cuda uv pip install --python PYTHON   as locked: torch with CUDA
#   sh deploy/install.sh requirements.lock cpu uv pip install --python PYTHON    torch without CUDA
#
# PyPI has no wheels of torch and torchvision without CUDA, so the lock has no hashes of them. uv knows where they are
# (--torch-backend) and installs them at the lock's versions, without a hash. Everything else keeps its hash.
set -eu
lock=$1 torch=$2
shift 2

case $torch in
cuda)
    exec "$@" --require-hashes --requirement "$lock"
    ;;
cpu)
    # An entry of the lock is a line NAME==VERSION and its hashes; the last of its lines is the one without a backslash.
    sed -E '/^(torch|torchvision|triton|(nvidia|cuda)-[a-z0-9-]+)==/,/[^\\]$/d' "$lock" \
        | "$@" --require-hashes --no-deps --requirement -
    exec "$@" --no-deps --reinstall-package torch --reinstall-package torchvision --torch-backend cpu \
        $(sed -nE 's/^((torch|torchvision)==[^ ;]+).*/\1/p' "$lock")
    ;;
*)
    echo "TORCH=$torch: it is cuda, or cpu for torch without CUDA" >&2
    exit 2
    ;;
esac
