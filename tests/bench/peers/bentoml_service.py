"""BentoML, one worker, arrays as JSON. Usage: bentoml_service.py NAME MODEL HTTP_PORT GRPC_PORT FOLDER."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import bentoml
import numpy as np
import onnxruntime


@bentoml.service(workers=1, metrics={"enabled": False}, logging={"access": {"enabled": False}})
class Service:
    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["BENCH_MODEL"], options)

    @bentoml.api
    def infer(self, x: np.ndarray) -> np.ndarray:
        return self.session.run(["y"], {"x": x.astype(np.float32)})[0]


def main() -> None:
    _, model, http, _, folder = sys.argv[1:]
    environment = {"BENCH_MODEL": model, "BENTOML_HOME": folder, "BENTOML_DO_NOT_TRACK": "True"}
    os.environ.update(environment)
    os.chdir(Path(__file__).parent)
    command = ["serve", "bentoml_service:Service", "--host", "127.0.0.1", "--port", http]
    os.execv(Path(sys.executable).with_name("bentoml"), ["bentoml", *command])  # noqa: S606


if __name__ == "__main__":
    main()
