"""The page in a real Chromium, against a real server: each view, a job from its images to a served model, and a server that dies."""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from support.landscapes import archive, landscape, png
from support.page_server import ADMIN_KEY, PATIENCE_S, QUIET, PageServer, add_twin, chromium, embedded, page_server

from service.http.schemas import JOB_EXAMPLE

pytestmark = pytest.mark.timeout(3 * PATIENCE_S)

DEFAULT = "efficientnet_lite0"
TOP_K = 5  # of the page
GPU = {"used": 3221, "total": 8590}  # megabytes
KEEP_PLOTS = """let made; window.plots = [];
    const keep = {construct: (uPlot, given) => (plots.push(new uPlot(...given)), plots.at(-1))};
    Object.defineProperty(window, "uPlot", {configurable: true, set: (uPlot) => (made = new Proxy(uPlot, keep)), get: () => made})"""
VIEWS = ("try", "models", "train", "server")
MARKUP = "<img src=x onerror=\"document.title='owned'\"> it's.png"
LONG_LABELS = [  # of ImageNet, and one without a space
    "American Staffordshire terrier",
    "black-and-tan coonhound",
    "European fire salamander",
    "Hungarian_wirehaired_pointer_or_vizsla_" * 3,
    "sulphur-crested cockatoo",
]
COUNTS = {f"class {n}": n for n in range(1, 101)}
AUDIT = {
    "layout": "a folder per class",
    "images": 5050,
    "class_counts": {"train": COUNTS},
    "parts": {"train": 4000, "val": 1050, "test": 0},
    "totals": dict.fromkeys(["bad", "conflicts", "duplicates", "near_duplicates"], 0),
    "warnings": [],
    **{kind: [] for kind in ("bad", "conflicts", "duplicates", "near_duplicates")},
}
LICENCE = "the licence CC-BY-NC-4.0 restricts the use of these weights"
GIVE_KEY = f"sessionStorage.setItem('imago.key', '{ADMIN_KEY}')"
File = dict[str, Any]

expect.set_options(timeout=1000 * PATIENCE_S)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium()
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path, args=QUIET) as browser:
        yield browser


@pytest.fixture(scope="module")
def server(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    root = tmp_path_factory.mktemp("server")
    add_twin(embedded(root))
    with page_server(root) as server:
        yield server


@pytest.fixture
def page(browser: Browser, server: PageServer) -> Iterator[Page]:
    """A page that asked no other host, and did nothing that its policy forbids."""
    page = browser.new_page(base_url=server.url)
    page.set_default_timeout(1000 * PATIENCE_S)
    asked, said = list[str](), list[str]()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(f"Uncaught {error}"))
    yield page
    page.close()
    assert not [url for url in asked if not url.startswith((f"{server.url}/", "blob:", "data:", "about:"))]
    assert not [text for text in said if "Content Security Policy" in text or "Uncaught" in text]


@pytest.fixture
def admin(page: Page) -> Page:
    page.add_init_script(GIVE_KEY)
    return page


def drawn(name: str, kind: str = "sea", size: tuple[int, int] = (64, 64)) -> File:
    return {"name": name, "mimeType": "image/png", "buffer": png(landscape(kind, 1, 64).resize(size))}


def give(page: Page, *files: File) -> None:
    page.set_input_files("input[multiple]", list(files))  # type: ignore[arg-type]


def tally(page: Page, said: str) -> None:
    expect(page.locator(".tally")).to_contain_text(said)


# Try


@pytest.mark.abuse("J16")
def test_images_are_answered_in_their_places(page: Page) -> None:
    page.goto("/")
    page.get_by_label("twin").check()
    give(page, drawn("sea.png"), drawn(MARKUP), {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"text"})
    tally(page, "3 images: 2 answered, 1 refused")
    card = page.locator(".card", has_text=MARKUP)
    expect(card.locator("h3")).to_have_text([f"{DEFAULT} version 1", "twin version 1"])
    expect(card.locator(".bars li")).to_have_count(2 * TOP_K)
    left, right = (card.locator("section").nth(n).bounding_box() for n in (0, 1))
    assert left is not None and right is not None  # noqa: PT018
    assert (left["y"], left["x"] + left["width"] <= right["x"]) == (right["y"], True)  # side by side
    expect(card.locator(".times")).to_contain_text("compute")
    expect(page.locator(".card", has_text="notes.txt")).to_contain_text("JPEG, PNG")
    assert page.title() == "Try - Imago"


@pytest.mark.abuse("J16")
@pytest.mark.parametrize(
    ("status", "said"),
    [
        pytest.param(200, {"predictions": [{"label": MARKUP, "index": 0, "probability": 1.0}]}, id="class"),
        pytest.param(200, {"error": {"code": "invalid_image", "message": MARKUP}}, id="error of an image"),
        pytest.param(422, {"code": "invalid_image", "message": MARKUP, "param": None}, id="error"),
    ],
)
def test_markup_in_what_the_server_says_is_text(page: Page, status: int, said: dict[str, Any]) -> None:
    result = {"model": "cifar10", "version": 1, "results": [{"filename": None, **said}]}
    page.route(
        "**/predict*", lambda route: route.fulfill(status=status, json={"error": said} if status > 200 else result)
    )
    page.goto("/")
    give(page, drawn("sea.png"))
    expect(page.locator(".card")).to_contain_text(MARKUP)
    expect(page.locator(".card img[onerror]")).to_have_count(0)
    assert page.title() == "Try - Imago"


def test_a_dropped_image_and_a_pasted_one(page: Page) -> None:
    page.goto("/")
    for kind, holder in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.evaluate(
            """([kind, holder, bytes]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(bytes)], `${kind}.png`));
                const event = new Event(kind, {bubbles: true, cancelable: true});
                document.body.dispatchEvent(Object.assign(event, {[holder]: transfer}));
            }""",
            [kind, holder, list(drawn("x.png")["buffer"])],
        )
    tally(page, "2 images: 2 answered")


@pytest.mark.parametrize("models", [[], ["twin"]], ids=["one model", "two"])
@pytest.mark.parametrize("language", ["curl", "Python"])
def test_the_code_does_the_same(page: Page, tmp_path: Path, language: str, models: list[str]) -> None:
    command = {"curl": ["bash", "-c"], "Python": [sys.executable, "-c"]}[language]
    if language == "curl" and not shutil.which("curl"):
        pytest.skip("no curl")
    page.goto("/")
    for model in models:
        page.get_by_label(model, exact=True).check()
    files = [drawn(MARKUP.replace('"', "")), drawn("a;b, c.png")]  # a quotation mark in a file's name is sent as %22
    give(page, *files)
    page.get_by_text("The same from your own code").click()
    text = page.locator(".snippet", has_text=language).locator("pre").inner_text()
    for file in files:
        (tmp_path / file["name"]).write_bytes(file["buffer"])
    ran = subprocess.run([*command, text], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    answers = 2 * (1 + len(models))
    assert ran.stdout.count("'predictions'" if language == "Python" else '"predictions"') == answers, ran.stderr


def test_a_heat_map(page: Page) -> None:
    page.goto("/")
    page.get_by_label("Heat map").check()
    give(page, drawn("sea.png"))
    tally(page, "1 image: 1 answered")
    assert max(heat_of_columns(page)) > 180
    page.locator(".bars button").nth(1).click()
    expect(page.locator(".bars button").nth(1)).to_have_attribute("aria-pressed", "true")


def heat_of_columns(page: Page) -> list[int]:
    """The opacity of each column's hottest pixel, where the heat covers the picture as it is seen."""
    heat = page.get_by_role("img", name="What speaks for")
    assert heat.bounding_box() == page.locator(".picture img").bounding_box()
    found: list[int] = heat.evaluate(
        """c => Array.from({length: c.width}, (_, x) =>
            Math.max(...c.getContext("2d").getImageData(x, 0, 1, c.height).data.filter((_, i) => i % 4 == 3)))"""
    )
    return found


@pytest.mark.parametrize(("size", "first", "last"), [((900, 90), 0.45, 0.55), ((90, 900), 0, 1)], ids=["wide", "tall"])
def test_heat_lies_on_the_square_that_the_network_sees(
    page: Page, size: tuple[int, int], first: float, last: float
) -> None:
    page.goto("/")
    page.get_by_label("Heat map").check()
    give(page, drawn("sea.png", size=size))
    tally(page, "1 image: 1 answered")
    heat = heat_of_columns(page)
    warm = [place for place, opacity in enumerate(heat) if opacity]
    assert first * len(heat) - 1 <= warm[0] < warm[-1] <= last * len(heat) + 1


def test_a_full_server_is_asked_again(page: Page) -> None:
    full = {"error": {"code": "queue_full", "message": "full", "param": None, "request_id": "1"}}
    page.goto("/")
    page.route("**/predict*", lambda route: route.fulfill(status=429, json=full), times=1)
    give(page, drawn("sea.png"))
    expect(page.locator(".card")).to_contain_text("held until the server can take it")
    tally(page, "1 image: 1 answered")


def answered(page: Page, labels: list[str], **result: Any) -> None:
    """The server answers `labels` to every image."""
    scores = [{"label": label, "index": n, "probability": 0.5**n} for n, label in enumerate(labels, 1)]
    results = [{"filename": None, "predictions": scores, **result}]
    page.route("**/predict*", lambda route: route.fulfill(json={"model": DEFAULT, "version": 1, "results": results}))


def test_long_names_of_classes_on_a_phone(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    answered(page, LONG_LABELS)
    page.goto("/")
    give(page, drawn("sea.png"))
    rows = page.locator(".card .bars li")
    expect(rows).to_have_count(len(LONG_LABELS))
    card = page.locator(".card").bounding_box()
    assert card is not None
    for row in rows.all():
        label, number = row.locator(".label").bounding_box(), row.locator(".number").bounding_box()
        assert label is not None and number is not None  # noqa: PT018
        assert label["x"] + label["width"] <= number["x"]
        assert number["x"] + number["width"] <= card["x"] + card["width"]
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 360


@pytest.mark.parametrize(
    ("decision", "said", "reason"),
    [
        ("accept", "Accept", "certain enough"),
        ("review", "Review", "a person looks"),
        ("reject", "Reject", "none of these classes"),
    ],
)
def test_a_decision_is_a_word_with_its_reason(page: Page, decision: str, said: str, reason: str) -> None:
    answered(page, ["bee"], decision=decision)
    page.goto("/")
    give(page, drawn("sea.png"))
    expect(page.locator(".card .decision")).to_have_text(said)
    assert reason in str(page.locator(".card .decision").get_attribute("title"))


@pytest.mark.parametrize(
    ("view", "summary"), [("try", f"Search the 1,000 classes of {DEFAULT}"), ("models", "Search the classes")]
)
def test_a_thousand_classes_are_searched(page: Page, view: str, summary: str) -> None:
    page.goto(f"/#{view}")
    page.get_by_text(summary).click()
    expect(page.locator(".found li")).to_have_count(30)
    expect(page.locator("main")).to_contain_text("970 more")
    box = page.get_by_label(f"Search the 1,000 classes of {DEFAULT}")
    box.fill("terrier american")
    expect(page.locator(".found li")).to_have_text(["180 American Staffordshire terrier"])
    box.fill("no such class")
    expect(page.locator("main")).to_contain_text("No class matches.")


# Models


def test_a_key_is_asked_for_and_a_version_activated_and_rolled_back(page: Page) -> None:
    page.goto("/#models")
    expect(page.locator("main")).to_contain_text("3 models on 2 backbones")
    expect(page.locator("main")).to_contain_text("shared with cifar10")
    twin = page.locator(".rows > .card", has=page.get_by_role("heading", name="twin"))
    twin.get_by_text("Versions").click()
    page.get_by_label("Key").fill("k" * 39)
    page.get_by_role("button", name="Go on").click()
    page.get_by_label("Key").fill(ADMIN_KEY)
    page.get_by_role("button", name="Go on").click()
    expect(twin.locator(".versions")).to_contain_text("90.1 % (89.5 % to 90.7 %) of 10,000 test images")
    twin.get_by_role("button", name="Activate").click()
    page.get_by_role("dialog").get_by_role("button", name="Activate").click()
    expect(twin.locator("h2")).to_contain_text("version 2")
    twin.get_by_role("button", name="Roll back to version 1").click()
    page.get_by_role("dialog").get_by_role("button", name="Roll back").click()
    expect(twin.locator("h2")).to_contain_text("version 1")


def test_a_download_tells_how_far_it_is(admin: Page) -> None:
    told = 'data: {"bytes": 1048576, "total": 4194304}\n\n'
    failed = 'event: error\ndata: {"code": "download_failed", "message": "404 <b>Not</b> Found"}\n\n'
    admin.goto("/#models")
    admin.route("**/models/pull", lambda route: route.fulfill(content_type="text/event-stream", body=told + failed))
    admin.get_by_label("Architecture").fill("resnet18")
    admin.get_by_role("button", name="Pull").click()
    expect(admin.get_by_role("alert")).to_have_text("404 <b>Not</b> Found")


def versions_of(page: Page, name: str) -> Any:
    """The card of a model, with its versions open."""
    page.goto("/#models")
    card = page.locator(".rows > .card", has=page.get_by_role("heading", name=name))
    card.get_by_text("Versions").click()
    return card


def test_a_version_is_exported(admin: Page, tmp_path: Path) -> None:
    card = versions_of(admin, "twin")
    card.get_by_label("Export format of version 1").select_option("store")
    with admin.expect_download() as download:
        card.get_by_role("button", name="Export version 1").click()
    assert download.value.suggested_filename == "twin-1-store.zip"
    expect(card).to_contain_text("twin-1-store.zip, 1")
    download.value.save_as(tmp_path / "twin.zip")
    assert zipfile.is_zipfile(tmp_path / "twin.zip")


def test_a_licence_that_restricts_is_shown(admin: Page) -> None:
    headers = {"Content-Disposition": 'attachment; filename="twin-1-onnx.zip"', "X-Licence-Warning": LICENCE}
    admin.route("**/export?format=onnx", lambda route: route.fulfill(body=b"zip", headers=headers))
    card = versions_of(admin, "twin")
    card.get_by_role("button", name="Export version 1").click()
    expect(card.locator(".warnings")).to_contain_text(LICENCE)


@pytest.mark.parametrize(("status", "code"), [(503, "export_busy"), (422, "export_failed")])
def test_an_export_that_fails_says_why(admin: Page, status: int, code: str) -> None:
    waiting = list[Route]()
    admin.route("**/export?format=onnx", lambda route: waiting.append(route))
    card = versions_of(admin, "twin")
    button = card.get_by_role("button", name="Export version 1")
    button.click()
    expect(button).to_be_disabled()
    expect(card).to_contain_text("The server converts the model.")
    waiting[0].fulfill(status=status, json={"error": {"code": code, "message": MARKUP, "param": None}})
    expect(card.get_by_role("alert")).to_have_text(MARKUP)
    expect(button).to_be_enabled()


def test_licences_are_shown_where_the_server_names_them(page: Page) -> None:
    def licensed(route: Route) -> None:
        models = route.fetch().json()["models"]
        route.fulfill(json={"models": [model | {"licences": ["Apache-2.0", None]} for model in models]})

    page.route("**/models", licensed)
    page.goto("/#models")
    expect(page.locator("dl").first).to_contain_text("Apache-2.0, unknown")


# Train


def with_dataset(page: Page) -> None:
    """The Train view with a dataset chosen whose audit is `AUDIT`."""
    dataset = {
        "object": "dataset",
        "name": "photos.zip",
        "kind": "zip",
        "bytes": 1,
        "modified": JOB_EXAMPLE["created_at"],
    }
    listed = {"object": "list", "data": [dataset], "has_more": False}
    page.route("**/datasets?*", lambda route: route.fulfill(json=listed))
    page.route("**/datasets/validate", lambda route: route.fulfill(json={"audit": AUDIT, "estimate": {"total": 12.9}}))
    page.goto("/#train")
    page.get_by_label("photos.zip").check()


@pytest.fixture
def bodies(admin: Page) -> list[dict[str, Any]]:
    """The bodies of the jobs that the page starts; the server starts none."""
    sent = list[dict[str, Any]]()

    def refuse(route: Route) -> None:
        sent.append(json.loads(route.request.post_data or "{}"))
        route.fulfill(status=422, json={"error": {"code": "x", "message": "refused", "param": None}})

    admin.route("**/finetune", refuse)
    return sent


def start_training(page: Page, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    before = len(bodies)
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_role("alert")).to_have_text("refused")
    assert len(bodies) == before + 1
    return bodies[-1]


def test_the_bases_at_hand_the_best_first(admin: Page, bodies: list[dict[str, Any]]) -> None:
    with_dataset(admin)
    base = admin.get_by_label("base", exact=True)
    expect(base).to_have_value(DEFAULT)
    names = [text.partition(":")[0] for text in base.locator("option").all_inner_texts()]
    lites = ["efficientnet_lite2", "efficientnet_lite1", f"{DEFAULT} (default)"]
    assert names == [*lites, "cifar10", "auto", "Another name, or several"]
    expect(admin.locator(".chosen")).to_contain_text("74.8 % on ImageNet, 13")
    base.select_option("efficientnet_lite2")
    expect(admin.locator(".chosen")).to_contain_text(
        "260 x 260 pixels, speed not measured yet, converted when first used"
    )
    assert start_training(admin, bodies)["base"] == "efficientnet_lite2"
    base.select_option("auto")
    assert start_training(admin, bodies)["base"] == "auto"
    base.select_option(DEFAULT)
    assert "base" not in start_training(admin, bodies)


def test_the_audit_of_many_classes(admin: Page) -> None:
    with_dataset(admin)
    expect(admin.locator(".layout")).to_have_text("Recognised as: a folder per class")
    admin.get_by_text("Images by class").click()
    expect(admin.locator(".bars li")).to_have_count(30)
    admin.get_by_label("Search the 100 classes of the data set").fill("class 100")
    expect(admin.locator(".bars li")).to_have_text("class 100100")


def test_how_a_dataset_is_read_is_sent_with_the_audit_and_the_job(admin: Page, bodies: list[dict[str, Any]]) -> None:
    with_dataset(admin)
    asked = {"layout": "classes", "near_duplicates": "report", "min_per_class": 5, "encoding": "cp932"}
    for name, value in asked.items():
        field = admin.locator(f"#{name}")
        expect(field).to_have_count(1)
        with admin.expect_request("**/datasets/validate") as audited:
            if isinstance(value, str) and name != "encoding":
                field.select_option(value)
            else:
                field.fill(str(value))
                field.press("Tab")
    assert json.loads(audited.value.post_data or "") == asked | {"dataset": "photos.zip"}
    expect(admin.locator(".layout")).to_be_visible()
    body = start_training(admin, bodies)
    assert {name: body[name] for name in asked} == asked
    with admin.expect_request("**/datasets/validate") as audited:
        admin.get_by_label("Encoding of names and tables").fill(" ")
        admin.keyboard.press("Tab")
    assert "encoding" not in json.loads(audited.value.post_data or "")


def test_several_bases_are_typed(admin: Page, bodies: list[dict[str, Any]]) -> None:
    with_dataset(admin)
    admin.get_by_label("base", exact=True).select_option("other")
    admin.locator("input#base").fill("cifar10, efficientnet_lite0")
    assert start_training(admin, bodies)["base"] == ["cifar10", "efficientnet_lite0"]
    admin.get_by_label("mode", exact=True).select_option(label="scratch")
    expect(admin.locator("#base-choice")).to_have_count(0)
    expect(admin.locator("input#base")).to_have_value("cifar10, efficientnet_lite0")


def test_the_speed_of_a_base_is_shown(admin: Page) -> None:
    def fast(route: Route) -> None:
        schema = route.fetch().json()
        route.fulfill(json=schema | {"bases": [base | {"images_per_s": 1234.4} for base in schema["bases"]]})

    admin.route("**/finetune/schema", fast)
    with_dataset(admin)
    expect(admin.locator("#base-choice option").first).to_contain_text("1,234 images/s")
    expect(admin.locator(".chosen")).to_contain_text("1,234 images/s")


def test_from_a_zip_to_a_served_model(admin: Page, tmp_path: Path) -> None:
    admin.goto("/#train")
    admin.set_input_files("input[type=file]", archive(tmp_path / "My Views.zip", per_class=10))
    expect(admin.get_by_label("my-views.zip")).to_be_checked()
    expect(admin.locator("main")).to_contain_text("41 good images in 4 classes")
    expect(admin.locator(".layout")).to_have_text("Recognised as: a folder per class")
    admin.get_by_text("Bad files, left out: 2").click()
    expect(admin.locator("main")).to_contain_text("sea/notes.jpg")
    admin.get_by_text("Duplicates: 1", exact=True).click()
    expect(admin.locator(".paths li", has_text="night/again.png").locator("img")).to_have_count(2)
    assert admin.locator(".paths li img").first.evaluate("image => image.naturalWidth") == 96
    admin.get_by_label("base", exact=True).select_option("cifar10")  # the smallest
    admin.get_by_role("button", name="Start training").click()
    expect(admin.locator("main")).to_contain_text("It serves now.")
    expect(admin.locator(".log")).to_contain_text("my-views@1: activated")
    admin.get_by_role("button", name="Open the report").click()
    expect(admin.frame_locator("iframe").get_by_role("heading", name="my-views v1")).to_be_visible()
    admin.get_by_role("button", name="Close the report").click()
    admin.get_by_role("link", name="Try it").click()
    give(admin, drawn("night.png", "night"))
    expect(admin.locator(".card h3")).to_have_text("my-views version 1")
    expect(admin.locator(".card .label").first).to_have_text("night")


def test_a_wrong_hyperparameter_is_named_at_its_field(admin: Page, tmp_path: Path) -> None:
    admin.goto("/#train")
    admin.route(
        "**/datasets/validate", lambda route: route.fulfill(status=422, json={})
    )  # tested above, and takes seconds
    admin.set_input_files("input[type=file]", archive(tmp_path / "few.zip", per_class=1, side=8))
    admin.get_by_text("Everything else").click()
    admin.get_by_label("epochs", exact=True).fill("-3")
    admin.get_by_role("button", name="Start training").click()
    wrong = admin.locator(".field", has=admin.get_by_label("epochs", exact=True))
    expect(wrong).to_contain_text("greater than or equal to 1")


def test_curves_and_a_verdict_that_is_left_to_the_person(admin: Page) -> None:
    job = {"id": "ftjob-1", "status": "succeeded", "terminal": True, "progress": 1, "model": "twin", "version": 2}
    job |= {"deployment": "rejected: it is worse", "request": {"name": "twin", "dataset": "d", "mode": "finetune"}}
    lines = "".join(f'id: {n}\ndata: {{"seq": {n}, "epoch": {n}, "loss": 0.{n}, "accuracy": 0.5}}\n\n' for n in (1, 2))

    def answer(route: Route) -> None:
        if route.request.url.endswith("/events"):
            route.fulfill(content_type="text/event-stream", body=f"{lines}event: end\ndata: {{}}\n\n")
        else:
            route.fulfill(json=job)

    admin.route("**/finetune/ftjob-1**", answer)
    admin.goto("/#train/ftjob-1")
    expect(admin.get_by_role("img", name="Accuracy by epoch")).to_be_visible()
    expect(admin.locator("main")).to_contain_text("Not put to service: it is worse")
    expect(admin.get_by_role("button", name="Serve version 2")).to_be_enabled()


# Server


def test_the_server_as_it_is_now(page: Page) -> None:
    page.goto("/#server")
    expect(page.locator(".plot canvas")).to_have_count(7)
    expect(page.locator(".plot", has_text="memory")).to_contain_text("MB")


def test_the_memory_of_its_gpus(page: Page) -> None:
    def with_gpu(route: Route) -> None:
        gpu = "".join(f'imago_device_memory_{what}_bytes{{device="cuda:0"}} {mb}e6\n' for what, mb in GPU.items())
        route.fulfill(body=route.fetch().text() + gpu)

    page.route("**/metrics", with_gpu)
    page.goto("/#server")
    expect(page.locator(".plot", has_text="GPU memory")).to_contain_text("3.0 GB")


def test_the_first_measure_is_seen_on_an_axis_of_a_minute(page: Page) -> None:
    page.add_init_script(KEEP_PLOTS)
    looks = iter(range(2))
    page.route("**/metrics", lambda route: route.continue_() if next(looks, None) is not None else route.abort())
    page.goto("/#server")
    expect(page.locator(".plot canvas")).to_have_count(7)
    assert page.evaluate("plots.map(({scales: {x}}) => x.max - x.min)") == [60] * 7


# All of it


def test_a_server_that_dies_and_comes_back(page: Page, server: PageServer) -> None:
    page.goto("/")
    expect(page.get_by_role("checkbox", name=DEFAULT)).to_be_checked()
    server.kill()
    give(page, drawn("sea.png"))
    expect(page.locator(".notice")).to_contain_text("does not answer")
    tally(page, "1 image: 1 to come")
    server.start()
    tally(page, "1 image: 1 answered")
    expect(page.locator(".notice")).to_be_hidden()


def opened(page: Page, view: str) -> None:
    """A view with all of it to be seen: the versions and classes of a model, the form of a training."""
    if view == "models":
        versions_of(page, "twin")
        page.get_by_text("Search the classes").click()
    elif view == "train":
        with_dataset(page)
        expect(page.locator("#base-choice")).to_be_visible()
    else:
        page.goto(f"/#{view}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(admin: Page, scheme: Any) -> None:
    admin.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    found = []
    for view in VIEWS:
        opened(admin, view)
        if view == "try":
            give(admin, drawn("sea.png"), {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"text"})
            tally(admin, "1 refused")
        expect(admin.locator("h1")).to_be_visible()
        admin.wait_for_load_state("networkidle")
        found += [(view, each["id"], each["nodes"][0]["html"]) for each in Axe().run(admin).response["violations"]]
    assert not found


@pytest.mark.parametrize("view", VIEWS)
def test_a_phone_shows_it_without_scrolling_sideways(admin: Page, view: str) -> None:
    admin.set_viewport_size({"width": 360, "height": 740})
    opened(admin, view)
    admin.wait_for_load_state("networkidle")
    assert admin.evaluate("document.scrollingElement.scrollWidth") <= 360
    assert admin.evaluate("document.querySelector('header').offsetHeight") < 70  # in one line


def test_by_keyboard_alone(page: Page) -> None:
    page.goto("/")
    expect(page.locator("h1")).to_have_text("Try")
    for _ in range(4):  # skip link, brand, Try, Models
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("Models")
