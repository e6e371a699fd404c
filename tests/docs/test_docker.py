"""What ``docker/`` refers to is there, and its parts name each other right. No image is built."""

import json
import re

import pytest
import yaml

from tests.docs.pages import ROOT

DOCKER = ROOT / "docker"


def load(name: str):
    return yaml.safe_load((DOCKER / name).read_text())


COMPOSE = load("compose.yaml")
SERVICES = COMPOSE["services"]


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_images_are_of_files_that_are_there(name):
    build = load(name)["services"]["server"]["build"]
    assert (ROOT / build["dockerfile"]).is_file()


def test_mounted_files_are_there():
    for service in SERVICES.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (DOCKER / source).exists(), volume
            elif not source.startswith("${"):
                assert source in COMPOSE["volumes"], volume


def test_nothing_is_reached_from_outside():
    ports = [port for service in SERVICES.values() for port in service["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_prometheus_scrapes_the_server():
    [job] = load("prometheus/prometheus.yml")["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert SERVICES[host]["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_grafana_finds_prometheus_and_the_dashboard():
    [source] = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    host, port = re.fullmatch(r"http://(\w+):(\d+)", source["url"]).groups()
    assert SERVICES[host]["ports"] == [f"127.0.0.1:{port}:{port}"]
    [provider] = load("grafana/provisioning/dashboards/recalkv.yaml")["providers"]
    mount = f"./grafana/dashboards:{provider['options']['path']}:ro"
    assert mount in SERVICES["grafana"]["volumes"]


def test_panels_do_not_overlap():
    panels = json.loads((DOCKER / "grafana" / "dashboards" / "recalkv.json").read_text())["panels"]
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.mark.parametrize("name", ["cpu.Dockerfile", "cuda.Dockerfile"])
def test_what_an_image_copies_is_not_ignored(name):
    """Every file that the build of the package reads is let through by ``.dockerignore``."""
    let_through = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    needed = {"setup.py", "cuda_build.py", "pyproject.toml", "README.md", "LICENSE"}
    needed |= {"recalkv_vllm", "kernels", "benchmarks", "csrc"}
    text = (DOCKER / name).read_text()
    assert "\nCOPY . .\n" in text
    needed |= set(re.findall(r"^COPY (\w+) \./$", text, re.MULTILINE))
    assert needed <= let_through
