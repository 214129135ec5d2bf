"""What one would write without Tierline: FastAPI, pydantic, onnxruntime. Usage: fastapi_baseline.py NAME MODEL PORT."""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

NAME, MODEL, PORT = sys.argv[1:]

app = FastAPI()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])


class Tensor(BaseModel):
    name: str
    datatype: str
    shape: list[int]
    data: list[float]


class Inference(BaseModel):
    inputs: list[Tensor]


class Answer(BaseModel):
    model_name: str
    outputs: list[Tensor]


@app.post(f"/v2/models/{NAME}/infer")
async def infer(request: Inference) -> Answer:
    feed = {tensor.name: np.array(tensor.data, np.float32).reshape(tensor.shape) for tensor in request.inputs}
    (y,) = session.run(["y"], feed)
    output = Tensor(name="y", datatype="FP32", shape=list(y.shape), data=y.ravel().tolist())
    return Answer(model_name=NAME, outputs=[output])


if __name__ == "__main__":
    uvicorn.run(
        app, host="127.0.0.1", port=int(PORT), http="httptools", loop="uvloop", access_log=False, log_level="warning"
    )
