"""mosec, raw bytes both ways. Usage: mosec_service.py NAME MODEL HTTP_PORT GRPC_PORT FOLDER ROWS.

ROWS: most requests of one batch, waited for 2 ms; 1 = no batching.
"""

from __future__ import annotations

import os
import sys

import numpy as np
import onnxruntime
from mosec import Server, Worker

WAIT_MS = 2


class _Onnx(Worker):
    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["BENCH_MODEL"], options)
        self.shape = self.session.get_inputs()[0].shape[1:]

    def deserialize(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.float32).reshape(1, *self.shape)

    def serialize(self, data: np.ndarray) -> bytes:
        return data.tobytes()


class One(_Onnx):
    def forward(self, data: np.ndarray) -> np.ndarray:
        return self.session.run(["y"], {"x": data})[0]


class Many(_Onnx):
    def forward(self, data: list[np.ndarray]) -> list[np.ndarray]:
        return list(self.session.run(["y"], {"x": np.concatenate(data)})[0])


def main() -> None:
    _, model, http, _, folder, rows = sys.argv[1:]
    os.environ["BENCH_MODEL"] = model
    sys.argv = [
        sys.argv[0],
        "--address",
        "127.0.0.1",
        "--port",
        http,
        "--path",
        f"{folder}/ipc",
        "--log-level",
        "error",
    ]
    server = Server()
    if int(rows) > 1:
        server.append_worker(Many, num=1, max_batch_size=int(rows), max_wait_time=WAIT_MS)
    else:
        server.append_worker(One, num=1)
    server.run()


if __name__ == "__main__":
    main()
