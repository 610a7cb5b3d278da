import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.training_reports import HOSTILE, report

from models.training.candidates import BaseChoice, ScoredBase
from models.training.reports import AugmentedThumbnails, Report, html, write_tensorboard
from models.training.reports.plots import Scale, Series, confusion, lines
from models.training.reports.tensorboard import scalars

JPEG = b"\xff\xd8\xff\xe0thumbnail"


class Tags(HTMLParser):
    """Every start tag with its attributes, and whether all elements were closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    return html(report(), {HOSTILE: JPEG, "bee/1.jpg": JPEG})


def test_the_record_is_json_and_back() -> None:
    written = report()
    assert Report.model_validate_json(written.model_dump_json()) == written


def test_the_page_is_whole(page: str) -> None:
    assert Tags(page).open == []
    for said in (
        "insects v2",
        "Notes",
        "Confusion matrix",
        "Choice of the base",
        "Would more images help?",
        "stopped after 8 of 20 epochs",
        'aria-label="loss by epoch"',
        'aria-label="accuracy by epoch"',
        'aria-label="accuracy by confidence"',
        'aria-label="confusion matrix',
        "Labels to check",
    ):
        assert said in page


def test_the_page_needs_nothing_else(page: str) -> None:
    tags = Tags(page).found
    assert {"script", "link", "iframe"}.isdisjoint(tag for tag, _ in tags)
    sources = [value or "" for _, attributes in tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "url(" not in page
    assert "@import" not in page


@pytest.mark.abuse("J16")
def test_names_cannot_become_markup(page: str) -> None:
    assert "<script" not in page
    assert "ant/&#34;&gt;&lt;script&gt;" in page
    assert "cat &amp; &lt;dog&gt;" in page


def test_pictures_are_there_for_those_that_have_one() -> None:
    written = report()
    wrong = written.val.mistakes[0].path
    pictures = [tag for tag, _ in Tags(html(written, {wrong: JPEG})).found if tag == "img"]
    times = sum(e.path == wrong for e in written.label_errors) + 1
    assert len(pictures) == times


def test_a_batch_is_shown_with_its_labels() -> None:
    batch = AugmentedThumbnails("As the network saw it.", (("ant", JPEG), ("70% bee, 30% <b>", JPEG)))
    page = html(report(), {}, batch)
    assert [attributes["alt"] for tag, attributes in Tags(page).found if tag == "img"] == ["ant", "70% bee, 30% <b>"]
    assert "As the network saw it." in page


def test_the_layer_table_marks_what_was_frozen(page: str) -> None:
    assert "60,255 parameters, of which 255 were trained." in page
    assert "<p>Newly initialised: layer3, layer4.</p>" in page
    assert "<td>\u2003\u2003conv1</td><td>Conv2d</td>" in page
    assert page.count("<td>frozen</td>") == 2


def test_the_choice_of_an_architecture_shows_time_and_spread() -> None:
    rows = (
        ScoredBase(name="nin", accuracy=0.91, spread=0.02, seconds=12.0, seconds_spread=0.5),
        ScoredBase(name="lenet5", accuracy=0.84, spread=0.01, seconds=3.0, seconds_spread=0.1),
    )
    choice = BaseChoice(best="nin", candidates=rows, folds=3, epochs=2)
    page = html(report().model_copy(update={"candidates": choice}), {})
    assert '<td><b>nin</b></td><td class="number">91.0% ± 2.0%</td><td class="number">12.0 s ± 0.5 s</td>' in page
    assert "Each was trained for 2 epochs on each of 3 folds" in page
    assert choice.seconds == 45.0


def test_it_says_which_images_were_looked_at_for_wrong_labels() -> None:
    found = report().model_copy(update={"labels_checked": ("val", "test")})
    assert "Validation and test images that" in html(found, {})
    assert "None of the validation and test images." in html(found.model_copy(update={"label_errors": ()}), {})


def test_a_report_of_the_least_is_a_page_too() -> None:
    full = report()
    least = full.model_copy(
        update={
            field: Report.model_fields[field].default
            for field in ("history", "path", "candidates", "verdict", "layers")
        }
        | {
            "label_errors": (),
            "labels_checked": (),
            "learning_curve": None,
            "version": None,
            "stopping": None,
            "stop_reason": None,
        }
    )
    page = html(least, {})
    assert Tags(page).open == []
    assert "Training</h2>" not in page


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        pytest.param(Scale(0, 1, 0, 100), [0, 0.2, 0.4, 0.6, 0.8, 1], id="shares"),
        pytest.param(Scale(1, 8, 0, 100), [2, 4, 6, 8], id="epochs"),
        pytest.param(Scale(1e-5, 4.6, 0, 100, log=True), [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1], id="strengths"),
        pytest.param(Scale(0.9, 0.9, 0, 100), [0.9], id="all equal"),
    ],
)
def test_ticks(scale: Scale, ticks: list[float]) -> None:
    assert scale.ticks() == pytest.approx(ticks)


def test_a_line_goes_from_edge_to_edge() -> None:
    drawn = ElementTree.fromstring(lines([Series("a", [(1, 0.0), (5, 1.0)])], "epoch", "loss"))
    line = drawn.find(".//polyline")
    assert line is not None
    assert line.attrib["points"] == "54.0,228.4 446.0,35.6"  # 5 % of air below and above


def test_a_confusion_matrix_draws_what_is_not_0() -> None:
    drawn = ElementTree.fromstring(confusion([[3, 1], [0, 4]], ["a", "b"]))
    assert [r.attrib["class"] for r in drawn.iter("rect")] == ["right", "wrong", "right", "frame"]
    assert next(drawn.iter("title")).text == "a, predicted as a: 3 (75.0%)"


def test_plots_escape_names() -> None:
    drawn = confusion([[1]], ['<b>"&'])
    assert "<b>" not in drawn
    assert next(ElementTree.fromstring(drawn).iter("title")).text == '<b>"&, predicted as <b>"&: 1 (100.0%)'


def test_scalars_are_those_that_were_measured() -> None:
    found = scalars(report())
    assert [value for tag, step, value in found if (tag, step) == ("loss/val", 2)] == pytest.approx([1.2])
    assert {tag for tag, _, _ in found} >= {"head/cv_loss", "accuracy/val", "final/val_accuracy"}
    assert not any(tag in ("lr", "final/test_accuracy") for tag, _, _ in found)


def test_tensorboard_files_are_written(tmp_path: Path) -> None:
    write_tensorboard(report(), tmp_path / "runs")
    content = b"".join(path.read_bytes() for path in (tmp_path / "runs").iterdir())
    assert b"head/cv_loss" in content


def test_without_tensorboardx_a_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    write_tensorboard(report(), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    assert "pip install 'imago[tensorboard]'" in caplog.text
