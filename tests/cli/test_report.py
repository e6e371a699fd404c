"""``recalkv report``: a page that says what the checkpoint holds, and needs nothing else."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies

from recalkv_vllm.band_format import token_bytes
from recalkv_vllm.checkpoint import AttentionGeometry, RecalkvConfig, read_hf_config
from recalkv_vllm.cli import main
from recalkv_vllm.report.layer_map import layer_rows
from recalkv_vllm.report.results import SERVE_COLUMNS
from recalkv_vllm.report.spectra import SHARES, singular_values, spectrum

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FEW = ["--num-samples", "4", "--seq-len", "32", "--dataset", "builtin"]
#: Ways to compress, by name.
WAYS = {
    "bands": ["--compression", "0.6"],
    "int8": ["--compression", "0.6", "--method", "svd", "--latent-dtype", "int8"],
    "full": ["--compression", "0"],
}


@pytest.fixture(scope="module")
def checkpoints(tiny, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECALKV_CACHE", str(folder / "cache"))
        for name, options in WAYS.items():
            assert main(["compress", str(tiny), "-o", str(folder / name), *options, *FEW]) == 0
    return {name: folder / name for name in WAYS}


@pytest.fixture
def copy(checkpoints, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoints["bands"], tmp_path / "copy"))


def report(checkpoint: Path, out: Path, *results: Path) -> str:
    given = [part for path in results for part in ("--result", str(path))]
    assert main(["report", str(checkpoint), "-o", str(out), *given]) == 0
    return out.read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Whether tags close in order, and what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta",):
            self.open.append(tag)
        self.fetched += [str(value) for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("way", WAYS)
def test_page(way, checkpoints, tmp_path, capsys) -> None:
    page = report(checkpoints[way], tmp_path / "page.html")
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert not tags.fetched
    assert "url(" not in page
    assert "@import" not in page

    capsys.readouterr()
    assert main(["inspect", str(checkpoints[way]), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    size = seen["kv_bytes_per_token"]
    assert f"<b>{size['compressed']:,}</b>" in page
    assert f"dense: {size['dense']:,}" in page
    assert f"<b>{seen['compression']:.1%}</b>" in page
    for layer in seen["layers"]:
        assert f"<td>{layer['k_error']:.4f}</td><td>{layer['v_error']:.4f}</td>" in page
    for value in (seen["calibration"] | seen["tool_versions"]).values():
        assert str(value) in page
    if way == "bands":
        assert f"<b>{seen['settings']['expected_loss']:.4f}</b>" in page


@pytest.mark.parametrize("way", WAYS)
def test_parts_of_a_layer_add_up_to_what_a_token_takes(way, checkpoints) -> None:
    config = read_hf_config(checkpoints[way])
    recalkv = RecalkvConfig.from_hf_config(config)
    rows = layer_rows(recalkv, AttentionGeometry.from_hf_config(config), itemsize=2)
    for i, (row, layout) in enumerate(zip(rows, recalkv.layers, strict=True)):
        stored = token_bytes(recalkv.latent_format(i), layout.rank, 2)
        assert row.stored_bytes == stored
        assert 0 <= stored - sum(part.bytes for part in row.stored) < 16
        assert sum(part.columns for part in row.stored) == layout.rank
        for parts, spans in ((row.keys, layout.k_spans), (row.values, layout.v_spans)):
            read = {n for start, end in spans for n in range(start, end)}
            assert sum(part.columns for part in parts) == len(read)


@given(
    n=strategies.integers(1, 12), w=strategies.integers(1, 12), hidden=strategies.integers(1, 16)
)
@settings(deadline=None)
def test_singular_values_are_those_of_the_product(n: int, w: int, hidden: int) -> None:
    generator = torch.Generator().manual_seed(n * 1000 + w * 10 + hidden)
    up, down = (torch.randn(*size, generator=generator) for size in ((n, w), (w, hidden)))
    expected = torch.linalg.svdvals(up.double() @ down.double())
    found = singular_values(up, down)
    rank = min(n, w, hidden)
    torch.testing.assert_close(found[:rank].double(), expected[:rank], rtol=1e-3, atol=1e-4)


def test_directions_that_hold_the_energy() -> None:
    assert SHARES == (0.9, 0.99, 0.999)
    found = spectrum(torch.tensor([1.0, 3.0, 0.2, 0.0]))
    assert found.directions == 4
    assert found.holding == (2, 2, 3)  # 9, 10 and 10.04 of 10.04
    assert spectrum(torch.ones(1)).holding == (1, 1, 1)
    assert spectrum(torch.zeros(2)).holding == (1, 1, 1)


def test_names_are_text(copy, tmp_path) -> None:
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["recalkv"]["settings"]["base_model"] = "<script>alert('x')</script>"
    path.write_text(json.dumps(config))
    page = report(copy, tmp_path / "page.html")
    assert "<script" not in page
    assert html.escape("<script>alert('x')</script>", quote=False).split("'")[0] in page


def test_foreign_factors_record_no_errors(copy, tmp_path) -> None:
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["recalkv"] |= {"settings": {"healing": "by time"}, "calibration": {}}
    path.write_text(json.dumps(config))
    page = report(copy, tmp_path / "page.html")
    assert "error of keys" not in page
    assert "<th>calibration</th><td>none</td>" in page


def test_results(checkpoints, tmp_path, capsys) -> None:
    model = str(checkpoints["bands"])
    ruler = {"metric": "ruler", "engine": "vllm", "model": model, "score": 0.5, "prompts": 4}
    row = {"length": 1024, "score": 0.25, "base_score": 0.5}
    shares = (("vt", 0.5), ("cwe", None))
    ruler["rows"] = [{"task": task, **row, "retained": share} for task, share in shares]
    ppl = {"metric": "ppl", "engine": "transformers", "model": model, "perplexity": 22.25}
    ppl |= {"nll": 3.1, "tokens": 99, "dataset": "text.txt", "seq_len": 64}
    kernel = {"geometry": "g", "compression": 0.5, "ratio": 0.875, "kernel": "C++"}
    kernels = {"roof": {}, "rows": [kernel], "dtype": "bfloat16", "device": "a device"}
    bench = {"partial": False, "kv_cache_memory_bytes": 1 << 20, "machine": "a machine"}
    bench |= {"versions": {"vllm": "0.32.0"}}
    row = {"system": "stock", "round": 0, "requests_per_second": 1.5, "tokens_per_second": 1234.5}
    offline = {**bench, "rows": [{**row, "latency_s": 0.25}]}
    row = dict.fromkeys(SERVE_COLUMNS, 0) | {"server": "stock", "ttft_ms_p50": 12.5}
    served = {**bench, "partial": True, "rows": [row]}
    capsys.readouterr()
    plan = ("plan", model, "--kv-cache-memory-bytes", "1MiB", "--max-model-len", "64", "--json")
    assert main([*plan]) == 0
    planned = json.loads(capsys.readouterr().out) | {"relative_decode_time": 0.625}
    paths = []
    for number, raw in enumerate((ruler, ppl, kernels, offline, served, planned)):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(raw))
    page = report(checkpoints["bands"], tmp_path / "page.html", *paths)
    for expected in (
        "RULER (1024 tokens, vllm)",
        "<td>50%</td>",
        "<td>base too low to compare</td>",
        "22.2500 (nll 3.10000)",
        "<td>0.88</td>",
        "a device",
        "<td>1234</td>",
        "<td>12.5</td>",
        "<p>partial; 1,048,576 bytes",
        "1,048,576 bytes of KV cache each; vllm 0.32.0",
        "predicted decode time 0.62 of the dense cache",
        f"<td>{planned['kv_cache_tokens']['compressed']:,}</td>",
    ):
        assert expected in page


def test_results_on_the_model_card(copy, tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April. " * 20)
    line = f"eval {copy} --dataset {text} --seq-len 32 --max-tokens 64 --card --quiet"
    assert main(line.split()) == 0
    assert "<li>perplexity (62 tokens of text.txt" in report(copy, tmp_path / "page.html")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("no JSON", "not readable as JSON"),
        ("[1]", "expected what recalkv eval, bench or plan prints with --json"),
        ('{"metric": "ppl"}', "not as recalkv prints it (KeyError: 'engine')"),
        ('{"roof": {}, "rows": []}', "not as recalkv prints it (IndexError"),
    ],
)
def test_results_that_are_none(written, message, checkpoints, tmp_path, fails) -> None:
    path, out = tmp_path / "result.json", tmp_path / "page.html"
    path.write_text(written)
    error = fails("report", checkpoints["bands"], "-o", out, "--result", path)
    assert f"--result {path}: " in error
    assert message in error
    assert not out.exists()


def test_no_checkpoint(tiny, tmp_path, fails) -> None:
    out = tmp_path / "page.html"
    assert "config.json: no such file" in fails("report", tmp_path / "nowhere", "-o", out)
    assert "expected a compressed checkpoint, found a model" in fails("report", tiny, "-o", out)
    assert not out.exists()


def test_checkpoint_of_the_future(copy, tmp_path, fails, monkeypatch) -> None:
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["recalkv"]["format_version"] = 99
    path.write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    assert "format_version: expected 1 or 2, found 99" in fails(
        "report", copy, "-o", tmp_path / "p"
    )


def test_damaged_checkpoint(copy, tmp_path, fails) -> None:
    path = copy / "recalkv.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "the file is not what was written" in fails("report", copy, "-o", tmp_path / "page.html")
    path.write_bytes(data[: len(data) // 2])
    assert "not a readable safetensors" in fails("report", copy, "-o", tmp_path / "page.html")


def test_page_that_cannot_be_written(tmp_path, fails) -> None:
    """Said before any work."""
    nowhere = tmp_path / "nowhere"
    assert "a directory" in fails("report", nowhere, "-o", tmp_path)
    error = fails("report", nowhere, "-o", tmp_path / "missing" / "page.html")
    assert f"no directory {tmp_path / 'missing'}" in error


def test_name_of_the_page(checkpoints, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(checkpoints["full"])]) == 0
    assert capsys.readouterr().out == f"{checkpoints['full']}: report in full-report.html\n"
    assert (tmp_path / "full-report.html").is_file()


#: Reports how a page lies in its frame.
MEASURE = """<script>addEventListener("load", () => {
  const root = document.documentElement, bars = [...document.querySelectorAll(".bar")];
  parent.document.body.append(JSON.stringify({
    inner: innerWidth, scroll: root.scrollWidth,
    background: getComputedStyle(document.body).backgroundColor,
    requests: performance.getEntriesByType("resource").length,
    bars: bars.length, narrowest: Math.min(...bars.map(bar => bar.clientWidth)),
  }) + "\\n");
});</script>"""


@pytest.mark.slow  # starts a browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium in PATH")
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(dark, checkpoints, tmp_path) -> None:
    page = report(checkpoints["bands"], tmp_path / "page.html")
    framed = html.escape(page.replace("</body>", f"{MEASURE}</body>"))
    frames = "".join(
        f'<iframe srcdoc="{framed}" style="width:{width}px;height:900px;border:0"></iframe>'
        for width in (320, 400, 1200)
    )
    (tmp_path / "frames.html").write_text(f"<!doctype html><body>{frames}</body>")
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-extensions"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"),
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            *("--dump-dom", (tmp_path / "frames.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    seen = [json.loads(each) for each in re.findall(r"\{\"inner\".*?\}", done.stdout)]
    assert sorted(each["inner"] for each in seen) == [320, 400, 1200], done.stderr[-2000:]
    for each in seen:
        assert each["scroll"] <= each["inner"]
        assert each["requests"] == 0
        assert each["bars"] == 2 * 5
        assert each["narrowest"] >= 50
        red = int(re.findall(r"\d+", each["background"])[0])
        assert red < 64 if dark else red > 192
