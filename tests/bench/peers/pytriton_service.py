"""NVIDIA's pytriton: Triton in front of a Python function. Usage: pytriton_service.py NAME MODEL HTTP_PORT GRPC_PORT FOLDER."""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

NAME, MODEL, HTTP, GRPC, FOLDER = sys.argv[1:]
MAX_ROWS = 32


def main() -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(MODEL, options)

    @batch
    def infer(x: np.ndarray) -> list[np.ndarray]:
        return session.run(["y"], {"x": x})

    addresses = {"http_address": "127.0.0.1", "grpc_address": "127.0.0.1", "allow_metrics": False}
    config = TritonConfig(http_port=int(HTTP), grpc_port=int(GRPC), **addresses)
    tensors = [tuple(each.shape[1:]) for each in (session.get_inputs()[0], session.get_outputs()[0])]
    with Triton(config=config) as triton:
        triton.bind(
            model_name=NAME,
            infer_func=infer,
            inputs=[Tensor(name="x", dtype=np.float32, shape=tensors[0])],
            outputs=[Tensor(name="y", dtype=np.float32, shape=tensors[1])],
            config=ModelConfig(max_batch_size=MAX_ROWS, batcher=DynamicBatcher()),
        )
        triton.serve()


if __name__ == "__main__":
    main()
