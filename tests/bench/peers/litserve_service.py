"""LitServe, one worker, floats as JSON (its default). Usage: litserve_service.py NAME MODEL HTTP_PORT GRPC_PORT FOLDER."""

from __future__ import annotations

import sys

import litserve
import numpy as np
import onnxruntime

NAME, MODEL, HTTP, GRPC, FOLDER = sys.argv[1:]


class Api(litserve.LitAPI):
    def setup(self, device) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(MODEL, options)
        self.shape = [1, *self.session.get_inputs()[0].shape[1:]]

    def decode_request(self, request):
        return np.array(request["x"], np.float32).reshape(self.shape)

    def predict(self, x):
        return self.session.run(["y"], {"x": x})[0]

    def encode_response(self, output):
        return {"y": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Api(), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(HTTP), num_api_servers=1, generate_client_file=False, log_level="warning")
