"""KServe's Python SDK. Usage: kserve_service.py NAME MODEL HTTP_PORT GRPC_PORT FOLDER."""

from __future__ import annotations

import logging
import sys

import onnxruntime
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer

NAME, MODEL, HTTP, GRPC, FOLDER = sys.argv[1:]


class OnnxModel(Model):
    def __init__(self) -> None:
        super().__init__(NAME)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(MODEL, options)
        self.ready = True

    async def predict(self, payload: InferRequest, headers=None, response_headers=None) -> InferResponse:
        (y,) = self.session.run(["y"], {"x": payload.inputs[0].as_numpy()})
        output = InferOutput("y", list(y.shape), "FP32")
        output.set_data_from_numpy(y, binary_data=True)
        binary = payload.use_binary_outputs
        return InferResponse(payload.id or "", NAME, [output], from_grpc=payload.from_grpc, use_binary_outputs=binary)


if __name__ == "__main__":
    logging.disable(logging.INFO)
    # argparse would take our own arguments for the server's.
    sys.argv = sys.argv[:1]
    ModelServer(http_port=int(HTTP), grpc_port=int(GRPC), workers=1, enable_latency_logging=False).start([OnnxModel()])
