"""A FastAPI app that calls the model in its route, as in most tutorials.

PEER_ROUTE: `async` (on the event loop) or `sync` (in a thread).
"""

import os
import sys
from typing import Any

import uvicorn
from fastapi import Body, FastAPI, Request

from benchmarks.peers.network import classify, load_model, preprocess

app = FastAPI()
model = load_model()


async def predict_async(request: Request) -> dict[str, Any]:
    return classify(model, preprocess(await request.body())[None])[0]


def predict_sync(image: bytes = Body(media_type="application/octet-stream")) -> dict[str, Any]:
    return classify(model, preprocess(image)[None])[0]


app.post("/predict")(predict_async if os.environ["PEER_ROUTE"] == "async" else predict_sync)


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
