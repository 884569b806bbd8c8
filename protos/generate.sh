#!/usr/bin/env bash
# Regenerates blitzjax/v1/*_pb2*.py from protos/. Needs `pip install blitzjax[dev]`; the result is committed.
set -eu
cd "$(dirname "$0")/.."
python -m grpc_tools.protoc -I protos --python_out=. --pyi_out=. --grpc_python_out=. \
  protos/blitzjax/v1/inference.proto protos/blitzjax/v1/worker.proto protos/blitzjax/v1/vllm_engine.proto
