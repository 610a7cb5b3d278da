"""LitServe.

As documented: its image example, one image at a time. Tuned: batches of 16 after at most 10 ms, decoded by a pool, fast_queue.
"""

# mypy: disable-error-code="import-not-found,misc"

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import litserve as ls
import torch
from fastapi import Request
from torch import Tensor

from benchmarks.peers.network import BATCH, TUNED, WAIT_MS, classify, load_model, preprocess


class Documented(ls.LitAPI):
    def setup(self, device: str) -> None:
        self.model = load_model()

    def decode_request(self, request: Request) -> Tensor:
        return preprocess(request["file"].file.read())  # LitServe passes the form

    def predict(self, x: Tensor) -> dict[str, Any]:
        return classify(self.model, x[None])[0]

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


class Tuned(ls.LitAPI):
    def setup(self, device: str) -> None:
        self.model = load_model()
        self.pool = ThreadPoolExecutor(2)

    def decode_request(self, request: Request) -> bytes:
        data: bytes = request["file"].file.read()
        return data

    def batch(self, inputs: list[bytes]) -> Tensor:
        return torch.stack(list(self.pool.map(preprocess, inputs)))

    def predict(self, x: Tensor) -> list[dict[str, Any]]:
        return classify(self.model, x)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    api = Tuned(max_batch_size=BATCH, batch_timeout=WAIT_MS / 1000) if TUNED else Documented()
    server = ls.LitServer(api, accelerator="cpu", timeout=120, fast_queue=TUNED)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
