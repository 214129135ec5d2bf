"""The client of an Open Inference Protocol server: ours, or any other.

from tierline import Client

with Client("http://127.0.0.1:8000") as client:
    answer = client.infer("digits", {"image": pixels})
    print(answer["probabilities"], answer.tier)
"""

from models.client.answer import Answer, Metadata, ModelState, ModelStatistics
from models.client.asynchronous import AsyncClient
from models.client.blocking import Client
from models.client.retries import Retries

__all__ = ["Answer", "AsyncClient", "Client", "Metadata", "ModelState", "ModelStatistics", "Retries"]
