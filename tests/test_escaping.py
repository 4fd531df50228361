"""Text from files in every place where people read it, opened in a real browser: nothing of it runs."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from conftest import needs_browser
from hms_brain.core import CLASSES, NOTICE
from hms_brain.score_plots import plot_history
from hms_brain.predict import Prediction
from hms_brain.records import Issue
from hms_brain.scan import Scan
from hms_brain.simulate import simulate_recording

PAYLOADS = ("<script>hit()</script>", "<img src=x onerror=hit()>", "<svg onload=hit()>", '"><img src=x onerror=hit()>', "'><svg onload=hit()>", "</script><script>hit()</script>", "</title></style></textarea><img src=x onerror=hit()>",
            "--><script>hit()</script>", "<iframe srcdoc='<script>parent.hit()</script>'></iframe>", "<a href=javascript:hit() id=lure>x</a>", "<details open ontoggle=hit()>x</details>", "<input autofocus onfocus=hit()>", "<style onload=hit()>*{}</style>",
            "{{hit()}}{%x%}${hit()}<%=hit()%>", "\\u003cimg src=x onerror=hit()\\u003e", "&lt;img src=x onerror=hit()&gt;", "<img src=x onerror=&#104;it()>", "<math><mtext></mtext><script>hit()</script></math>")
RECORD = {"id": "1" * 16, "duration": 550.0, "reference": "referential", "channel_map": {}, "issues": []}


def scan_of(text):
    "A scan of nine minutes, whose every word is the text."
    table = pd.DataFrame({"at": np.arange(25, 525, 2.0), **{c: 0.1 for c in CLASSES}, "predicted": "seizure", "abstained": False, "reasons": "", "quality": text}).assign(seizure=0.9)
    table.loc[200:220, ["abstained", "predicted", "reasons"]] = (True, "", text)
    return Scan({"format": 1, "state": "done", "step": 2.0, "gaps": [], "bundle": {"name": text, "sha256": text, "simulated": True}, "notice": NOTICE,
                 "recording": RECORD | {"id": text, "reference": text, "issues": [{"kind": text, "detail": text, "channels": [text]}]}}, table)


def answer_of(text):
    "An answer whose every word is the text."
    return Prediction(dict.fromkeys(CLASSES, 1 / 6), "seizure", ({"kind": text, "detail": text, "channels": [text]},), True, (text,), {"name": text, "sha256": text, "simulated": True}, (text,), 30.0, 0.1,
                      measured={"name": text, "rate": 1.0, "side": text}, doubts=({"kind": text, "value": 1.0, "limit": 1.0, "detail": text},))


def as_page(path, *pieces):
    "Pieces of HTML, as an application puts them into its page."
    path.write_text("<!doctype html><meta charset=utf-8><body>" + "".join(pieces))
    return path


def values(widget):
    "The HTML of a widget and of what it holds."
    import ipywidgets as w
    own = [widget.value] if isinstance(widget, w.HTML) else []
    return own + [v for child in getattr(widget, "children", ()) for v in values(child)]


def an_answer(text, path):
    from hms_brain.exports import write_report
    recording = replace(simulate_recording(seed=1, pattern="lpd", duration=60), issues=(Issue("duplicate", text, (text,)),), reference=text, id=text)
    write_report(path, answer_of(text), recording, title=text)
    return path


def a_scan(text, path):
    from hms_brain.events import find_events
    from hms_brain.scan_files import write_scan_report
    scan = scan_of(text)
    write_scan_report(path, scan, find_events(scan.table, scan.step))
    return path


def a_run(text, path):
    from hms_brain.report import Page, Section, write_page
    write_page(path, Page(text, text, text, [(text, text, text)], [Section(text, text, (), [{text: text}], [text])], text))
    return path


def the_app(text, path):
    from hms_brain.app import fill
    from hms_brain.core import CLASS_LABELS
    from hms_brain.events import find_events
    from hms_brain.scan_files import describe
    from hms_brain.results import REPORT, render
    scan = scan_of(text)
    told = describe(scan, find_events(scan.table, scan.step))
    report = render(REPORT, told=told, facts=[(text, text)], peak={"place": text, "rows": [(text, text)], "like": [(text,) * 3]}, classes=[CLASS_LABELS[c] for c in CLASSES[:-1]], apart=text, notice=NOTICE, simulated=True)
    return as_page(path, fill("error", message=text), fill("facts", facts=[(text, text)], issues=(Issue("duplicate", text, (text,)),)), fill("viewer", at=text, token=text), fill("formats", limit=text), report)


def the_dashboards(text, path):
    pytest.importorskip("ipywidgets", reason="dashboards need the extra dash")
    from hms_brain.events import find_events
    from hms_brain.explorer import answer_text, scan_text
    from hms_brain.panels import grid, html, note, nothing
    from hms_brain.views import alert_text, service_text
    scan = scan_of(text)
    alert = dict.fromkeys(("id", "state", "severity", "rule", "fired", "ended", "by", "note", "words"), text)
    service = {("hms_model_info", (("name", text), ("sha256", text), ("simulated", text))): 1.0, ("hms_ready", ()): 1.0}
    return as_page(path, grid([{text: text}]), note(text), nothing(text, text), answer_text(answer_of(text)), *scan_text(scan, find_events(scan.table, scan.step), 0.5), alert_text([alert | {"by": None}, alert])[0],
                   service_text(None, text), service_text(service, text), *values(html(note(text, bad=True))))


def the_figures(text, path):
    "Names of runs and of channels are drawn by plotly, which knows some tags."
    from hms_brain.panels import plot_compared
    history = pd.DataFrame({"epoch": [1, 2], "learning_rate": .1, "train_loss": 1.0, "val_kl": [1.0, .5], "prior_kl": 1.1, "seconds": 1.0})
    figures = [plot_compared({text: history, "b": history}), plot_history(history).update_layout(title=text)]
    path.write_text("<!doctype html><meta charset=utf-8><body>" + "".join(f.to_html(full_html=False, include_plotlyjs=not k) for k, f in enumerate(figures)))
    return path


PLACES = {f.__name__: f for f in (an_answer, a_scan, a_run, the_app, the_dashboards, the_figures)}


@pytest.fixture
def shown(browser):
    "Opens a page and gives what ran in it."
    context, hits = browser.new_context(offline=True), []
    context.expose_function("hit", lambda: hits.append("hit"))
    def show(path):
        hits.clear()
        page = context.new_page()
        page.on("dialog", lambda d: (hits.append("dialog"), d.dismiss()))
        page.goto(path.as_uri())
        lure = page.locator("#lure")
        for k in range(lure.count()): lure.nth(k).click(timeout=5000)
        page.wait_for_timeout(100)
        page.close()
        return list(hits)
    yield show
    context.close()


@needs_browser
def test_control_unescaped_payloads_run(shown, tmp_path):
    "Most payloads do run where nobody escapes them; the rest are for templates, scripts and twice escaped text."
    ran = [bool(shown(as_page(tmp_path / "page.html", text))) for text in PAYLOADS]
    assert sum(ran) >= 13, dict(zip(PAYLOADS, ran))


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("place", PLACES)
def test_no_payload_runs(shown, tmp_path, monkeypatch, place):
    "Every payload in every word of a place."
    if place != "the_figures": monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "window.Plotly = {newPlot() {}}")
    for k, text in enumerate(PAYLOADS):
        page = PLACES[place](text, tmp_path / f"{k}.html")
        assert "it()" in page.read_text(), "the text is there"
        assert shown(page) == [], text
