"""The page about a run: whole, self-contained, and of what was written."""

import html
import html.parser
import json
import re
import shutil
import subprocess

import keras
import pytest
from helpers import documents, llama

import keras_ebft

HISTORY = {
    "feature_matching_loss": [1.0, 0.8],
    "val_feature_matching_loss": [1.1, 0.9],
    "reward": [0.1, 0.2],
    "grad_norm": [3.0, 2.0],
}
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(html.parser.HTMLParser):
    """What a browser sees: texts, spans of tokens, names, and addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.tokens = [], [], []
        self.names, self.addresses = [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.names += [attrs["id"]] if "id" in attrs else []
        for name in ("src", "href", "xlink:href"):
            self.addresses += [attrs[name]] if attrs.get(name) else []
        if attrs.get("class") == "token":
            self.tokens.append([attrs["title"], attrs["style"], ""])
        if tag not in VOID:
            self.open.append((tag, attrs.get("class")))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] == ("span", "token"):
            self.tokens[-1][2] += data


def line(step, row=0, anchor=4, tokens=("<b>", "\n"), reward=0.5):
    rollout = {
        "text": "".join(tokens),
        "alignment": reward,
        "diversity": 0.0,
        "reward": reward,
        "advantage": None,
        "tokens": list(tokens),
        "log_prob": [-3.0, None],
        "ended": None,
    }
    return json.dumps(
        {
            "step": step,
            "row": row,
            "anchor": anchor,
            "prompt": "def <i>f",
            "truth": "(x): & y",
            "rollouts": [rollout],
        }
    )


@pytest.fixture
def written(tmp_path):
    """Steps 0, 5 and 10, the last of them written again, and half a line."""
    path = tmp_path / "run.jsonl"
    last = line(10, reward=0.125)
    path.write_text("\n".join([line(0), line(5), line(10), last, line(9)[:40]]))
    return path


@pytest.mark.backend_independent
def test_a_page_of_one_run(written, tmp_path):
    path = keras_ebft.report({"one": HISTORY}, tmp_path / "new" / "r.html", written)
    page = Page(path.read_text(encoding="utf-8"))
    text = "".join(page.texts)
    # Two columns, of the first step and the last; the last line of that counts.
    assert re.findall(r"step \d+", text) == ["step 0", "step 10"]
    assert "0.500" in text
    assert "0.125" in text
    assert [token for _, _, token in page.tokens] == ["<b>", "↵\n"] * 2
    hint, style, _ = page.tokens[0]
    assert hint == "-3.00 nats"
    # Half as red as 6 nats.
    assert float(re.search(r"([\d.]+)\)$", style)[1]) == pytest.approx(0.35)
    for part in ("def <i>f", "(x): & y"):
        assert part in page.texts
    # Nothing is fetched, and every name is there once.
    assert all(address.startswith("#") for address in page.addresses)
    assert len(set(page.names)) == len(page.names)
    assert set(page.addresses) <= {f"#{name}" for name in page.names}


@pytest.mark.backend_independent
def test_two_runs_in_the_same_blocks(written, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(line(7, anchor=9) + "\n" + line(7, reward=0.25) + "\n")
    runs = {"one": HISTORY, "two": {**HISTORY, "chrf": [3.0]}}
    path = keras_ebft.report(
        runs, tmp_path / "r.html", {"one": written, "two": other}, most_blocks=1
    )
    text = "".join(Page(path.read_text(encoding="utf-8")).texts)
    assert re.findall(r"\w+, step \d+", text) == ["one, step 10", "two, step 7"]
    assert "row 0, anchor 4" in text
    assert "anchor 9" not in text
    assert "1 more blocks are not shown" in text


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0],), TypeError, "what `fit` returned"),
        (({},), TypeError, "what `fit` returned"),
        (({"loss": [1.0]},), TypeError, "run 'loss'"),
        (({"a": HISTORY, "b": HISTORY}, "x"), ValueError, "by names of runs"),
        (({"a": HISTORY}, {"b": "x"}), ValueError, r"\['a'\].*b"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, arguments, error, message):
    runs, *completions = arguments
    with pytest.raises(error, match=message):
        keras_ebft.report(runs, tmp_path / "r.html", *completions)
    assert not (tmp_path / "r.html").exists()


@pytest.mark.backend_independent
def test_a_file_without_completions_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="after it has fired"):
        keras_ebft.report({"a": HISTORY}, tmp_path / "r.html", tmp_path / "empty.jsonl")


@pytest.mark.on_torch
def test_a_history_knows_its_settings_and_data(tmp_path):
    sampler = keras_ebft.BlockSampler(3, 5, 4, num_samples=2)
    model = keras_ebft.EBFTModel(
        llama(num_layers=1), sampler, keras_ebft.FeatureNetwork(layers=(1,)), seed=7
    )
    model.compile(keras.optimizers.SGD(0.0))
    x, path = documents(2, 12), tmp_path / "run.jsonl"
    completions = keras_ebft.callbacks.Completions(x, path=path, show=False)
    history = model.fit(x, verbose=0, callbacks=[completions])
    page = keras_ebft.report(history, tmp_path / "r.html", path)
    text = "".join(Page(page.read_text(encoding="utf-8")).texts)
    assert "2 documents in 2 rows, 24 tokens, 2 live blocks per row" in text
    assert re.search(r"rollout_length\s*3", text)
    assert re.search(r"seed\s*7", text)
    assert text.count("row 1, anchor 9") == 1


# Written into the page's end, where `--dump-dom` finds it.
MEASURE = """<script>
document.title = JSON.stringify({
  pictures: [...document.querySelectorAll("svg")].map(
    s => s.getBoundingClientRect().width),
  colours: [...document.querySelectorAll(".token")].map(
    t => getComputedStyle(t).backgroundColor),
  overflow: document.documentElement.scrollWidth - window.innerWidth,
  failed: performance.getEntriesByType("resource").length,
});
</script>"""


def seen(page, width):
    """What a browser makes of a page."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    measured = page.with_name("measured.html")
    measured.write_text(page.read_text(encoding="utf-8") + MEASURE, encoding="utf-8")
    options = ["--headless", "--no-sandbox", f"--window-size={width},900"]
    done = subprocess.run(
        [browser, *options, "--dump-dom", measured.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))


@pytest.mark.slow
@pytest.mark.backend_independent
@pytest.mark.parametrize("width", [1250, 500])
def test_a_browser_shows_the_page(written, tmp_path, width):
    page = keras_ebft.report({"one": HISTORY}, tmp_path / "r.html", written)
    found = seen(page, width)
    # Curves are as wide as the style says, and texts no wider than the window.
    assert found["pictures"]
    assert all(250 < picture <= width for picture in found["pictures"])
    assert found["overflow"] <= 0
    assert found["failed"] == 0
    # 3 nats are half as red as a token that could not be.
    assert found["colours"] == ["rgba(220, 60, 40, 0.35)", "rgba(220, 60, 40, 0.7)"] * 2
