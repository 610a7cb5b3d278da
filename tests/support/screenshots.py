"""Takes the pictures of the page in docs/screenshots: `PYTHONPATH=tests python -m support.screenshots`. The images on them are drawn."""

import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from support.landscapes import KINDS, archive, landscape, png
from support.page_server import ADMIN_KEY, CHROMIUM, PATIENCE_S, QUIET, PageServer, embedded, page_server

TARGET = Path(__file__).parents[2] / "docs" / "screenshots"
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
MEASURED_S = 40  # how long the server is watched under load
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        root = Path(folder)
        embedded(root)
        with page_server(root) as server, playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET) as browser:
            page = browser.new_page(base_url=server.url, reduced_motion="reduce")
            page.set_default_timeout(1000 * PATIENCE_S)
            page.add_init_script(f"sessionStorage.setItem('imago.key', '{ADMIN_KEY}')")
            job = train(server, archive(root / "landscapes.zip", per_class=60, side=128))
            show_views(page, server, job)


def train(server: PageServer, dataset: Path) -> str:
    """A head, and then the whole network; -> the id of the second job."""
    with httpx.Client(base_url=server.url, headers=ADMIN, timeout=PATIENCE_S) as http:
        zipped = {"Content-Type": "application/zip"}
        http.post("/datasets?name=landscapes", content=dataset.read_bytes(), headers=zipped).raise_for_status()
        run(http, {"dataset": "landscapes.zip", "name": "landscapes"})
        finetune = {"base": "cifar10", "mode": "finetune", "hyperparameters": {"epochs": 8, "lr": 0.002}}
        return run(http, {"dataset": "landscapes.zip", "name": "landscapes", **finetune})


def run(http: httpx.Client, request: dict[str, Any]) -> str:
    id: str = http.post("/finetune", json=request).raise_for_status().json()["id"]
    while not (job := http.get(f"/finetune/{id}").json())["terminal"]:
        time.sleep(0.5)
    if job["status"] != "succeeded":
        sys.exit(f"the job has {job['status']}: {job['error']}")
    return id


def show_views(page: Page, server: PageServer, job: str) -> None:
    page.goto("/#try")
    page.get_by_role("checkbox", name="landscapes").check()
    page.get_by_role("checkbox", name="efficientnet_lite0").uncheck()
    page.get_by_label("Heat map").check()
    drawn = [(f"{kind}-{seed}.png", landscape(kind, 900 + seed)) for seed in (1, 2) for kind in KINDS]
    files = [{"name": name, "mimeType": "image/png", "buffer": png(image)} for name, image in drawn]
    page.set_input_files("input[multiple]", files)  # type: ignore[arg-type]
    page.get_by_label("Heat map").check()
    page.locator("canvas.heat").nth(7).wait_for()
    shoot(page, "try")
    page.goto("/#models")
    page.get_by_text("Versions").last.click()
    page.get_by_text("Roll back to").or_(page.get_by_text("Remove the model")).first.wait_for()
    shoot(page, "models")
    page.goto("/#train")
    page.get_by_label("landscapes.zip").check()
    page.locator("#base-choice").wait_for()
    page.get_by_text("good images").wait_for()
    shoot(page, "train")
    page.goto(f"/#train/{job}")
    page.get_by_role("button", name="Open the report").wait_for()
    shoot(page, "job")
    with load(server):
        page.goto("/#server")
        page.wait_for_timeout(1000 * MEASURED_S)
        shoot(page, "server")


@contextmanager
def load(server: PageServer) -> Iterator[None]:
    """Somebody asks all the while, now more and now less."""
    over, files = threading.Event(), [("file", png(landscape(kind, 1))) for kind in KINDS]

    def ask(pause_s: float) -> None:
        with httpx.Client(timeout=PATIENCE_S) as http:
            while not over.wait(pause_s * (1 + time.monotonic() % 7)):
                http.post(f"{server.url}/predict", files=files)

    threads = [threading.Thread(target=ask, args=(pause_s,)) for pause_s in (0.02, 0.05, 0.1)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def shoot(page: Page, view: str) -> None:
    for scheme in ("light", "dark"):
        for size, (width, height) in SIZES.items():
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": height})
            page.wait_for_timeout(400)  # for the plots, which follow the width
            page.evaluate("scrollTo(0, 0)")
            TARGET.mkdir(exist_ok=True)
            image = Image.open(BytesIO(page.screenshot())).convert("RGB").quantize(256, kmeans=1)
            image.save(TARGET / f"{view}-{scheme}-{size}.png", optimize=True)


if __name__ == "__main__":
    main()
