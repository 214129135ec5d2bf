"""MLServer without parallel workers (its faster setting). Usage: mlserver_service.py NAME MODEL HTTP_PORT GRPC_PORT FOLDER."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class OnnxModel(MLModel):
    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.settings.parameters.uri, options)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        (y,) = self.session.run(["y"], {"x": NumpyCodec.decode_input(payload.inputs[0])})
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", y)])


def main() -> None:
    name, model, http, grpc, folder = sys.argv[1:]
    here = Path(folder)
    settings = {
        "host": "127.0.0.1",
        "http_port": int(http),
        "grpc_port": int(grpc),
        "parallel_workers": 0,
        "metrics_endpoint": None,
        "debug": False,
        "use_structured_logging": False,
    }
    (here / "settings.json").write_text(json.dumps(settings))
    chosen = {"name": name, "implementation": "mlserver_service.OnnxModel", "parameters": {"uri": model}}
    (here / "model-settings.json").write_text(json.dumps(chosen))
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    os.chdir(here)
    os.execv(Path(sys.executable).with_name("mlserver"), ["mlserver", "start", str(here)])  # noqa: S606


if __name__ == "__main__":
    main()
