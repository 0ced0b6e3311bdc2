"""Importing costs nothing and changes nothing, and what is public is documented and typed."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from contracts.sources import Function, Source, decorators, definitions, functions, is_public

import detrkit

HEAVY = {"torch", "numpy", "scipy", "PIL", "hotcoco", "safetensors", "rich", "tyro", "yaml", "jaxtyping"}

OPTIONAL = {
    *("matplotlib", "sklearn", "supervision", "tensorboard", "simplejpeg", "huggingface_hub", "transformers", "timm"),
    *("torchvision", "pycocotools", "onnx", "onnxruntime", "openvino", "starlette", "uvicorn", "ray", "cv2", "pandas"),
}

IMPORT_EVERYTHING = """
import importlib, json, locale, logging, os, random, sys, threading, warnings
import numpy, torch, scipy.optimize, scipy.ndimage, PIL.Image, PIL.ImageFile, safetensors.torch, tyro, rich.progress
import yaml, jaxtyping, hotcoco, defusedxml.ElementTree

def state():
    return {
        "random state": hash(random.getstate()),
        "NumPy's random state": numpy.random.get_state()[1].tolist(),
        "torch's random state": torch.get_rng_state().tolist(),
        "torch's default type": str(torch.get_default_dtype()),
        "torch's threads": torch.get_num_threads(),
        "torch's matmul precision": torch.get_float32_matmul_precision(),
        "gradient mode": torch.is_grad_enabled(),
        "cuDNN's flags": [torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic],
        "Pillow's limits": [PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES],
        "logging": [logging.root.level, len(logging.root.handlers)],
        "warning filters": [str(item) for item in warnings.filters],
        "working folder": os.getcwd(),
        "environment": dict(os.environ),
        "locale": locale.setlocale(locale.LC_ALL),
        "threads": threading.active_count(),
        "recursion limit": sys.getrecursionlimit(),
    }

absent, modules = json.loads(sys.argv[1])
for name in absent:
    if name not in sys.modules:
        sys.modules[name] = None  # importing it now fails as if it were not installed
before = state()
for name in modules:
    importlib.import_module(name)
after = state()
print(json.dumps([name for name in before if before[name] != after[name]]))
"""


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def report(breaches: Iterator[str]) -> None:
    listed = list(breaches)
    assert not listed, "\n" + "\n".join(listed)


def test_importing_the_package_loads_nothing_else():
    loaded = json.loads(run_python("import sys, json, detrkit; print(json.dumps(sorted(sys.modules)))"))
    assert HEAVY.isdisjoint(loaded), f"import detrkit also imports {sorted(HEAVY.intersection(loaded))}"
    ours = [name for name in loaded if name.startswith("detrkit.")]
    assert set(ours) <= {"detrkit.errors"}, f"import detrkit also imports {ours}"


def test_every_module_imports_without_extras_and_leaves_no_trace(sources):
    names = [source.name for source in sources if not source.name.endswith("__main__")]
    output = run_python(IMPORT_EVERYTHING, json.dumps([sorted(OPTIONAL), names]))
    changed = json.loads(output.splitlines()[-1])
    assert len(output.splitlines()) == 1, f"importing a module prints: {output[:200]}"
    assert not changed, f"importing the modules changes {changed}"


def test_public_names_are_there():
    assert detrkit.__all__, "detrkit.__all__ lists nothing"
    assert len(set(detrkit.__all__)) == len(detrkit.__all__)
    assert set(detrkit.__all__) <= set(dir(detrkit))
    for name in detrkit.__all__:
        assert getattr(detrkit, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = detrkit.no_such_name


def test_version_is_stated_once_for_all(root: Path):
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    assert detrkit.__version__ == project["version"]
    assert f"[{project['version']}]" in (root / "CHANGELOG.md").read_text("utf-8")


NAMES = re.compile(r"(?:from (detrkit(?:\.\w+)*) import ([\w, ]+)|\bdetrkit(?:\.[a-zA-Z_]\w*)+)")

RESOLVE = """
import importlib, json, sys
import detrkit

def is_there(home, names):
    for name in names:
        if not hasattr(home, name):
            return False
        home = getattr(home, name)
    return True

wrong = []
for said, module, names in json.loads(sys.argv[1]):
    home = importlib.import_module(module) if module != "detrkit" else detrkit
    if not is_there(home, names):
        wrong.append(said)
print(json.dumps(wrong))
"""


def names_said(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """Each `detrkit.x.y` and `from detrkit.x import y` of a text: what it says, what is imported, what is asked of it.

    Of `import detrkit` alone the names in `detrkit.__all__` are there; another module may only seem to be, since one
    that is named before it has imported it.
    """
    for found in NAMES.finditer(text):
        if found[1]:
            for name in found[2].split(","):
                yield found[0], found[1], [name.strip()]
        else:
            first, *others = found[0].split(".")[1:]
            yield found[0], "detrkit", [first, *others] if first in detrkit.__all__ else [f"{first} is not public"]


def test_names_in_the_documents_are_there(root: Path):
    files = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    said = [name for file in files for name in names_said(file.read_text("utf-8"))]
    assert len(said) > 10
    wrong = json.loads(run_python(RESOLVE, json.dumps(said)))
    assert not wrong, f"the documents name what is not there: {wrong}"


def test_the_rule_of_names_in_documents_finds():
    text = "`detrkit.load(x)` and detrkit.visualize.draw_it, detrkit.nn.x. `from detrkit.boxes import nms, iou`"
    assert [(module, names) for _, module, names in names_said(text)] == [
        ("detrkit", ["load"]),
        ("detrkit", ["visualize", "draw_it"]),
        ("detrkit", ["nn is not public"]),
        ("detrkit.boxes", ["nms"]),
        ("detrkit.boxes", ["iou"]),
    ]
    assert json.loads(run_python(RESOLVE, json.dumps(list(names_said(text))[:2]))) == ["detrkit.visualize.draw_it"]


def undocumented(name: str, value: object) -> Iterator[str]:
    """What the docstring of a public name leaves out."""
    documented = isinstance(value, ModuleType | type) or callable(value)
    if not documented:
        return
    text = value.__doc__ or ""
    if not text.strip() or text.startswith(f"{name}("):  # what dataclasses and named tuples get of themselves
        yield f"detrkit.{name} has no docstring"
    elif inspect.isfunction(value):
        for parameter in inspect.signature(value).parameters:
            if not re.search(rf"\b{parameter}\b", text):
                yield f"detrkit.{name} does not explain its parameter {parameter!r}"


@pytest.mark.parametrize("name", detrkit.__all__)
def test_public_names_are_explained(name):
    report(undocumented(name, getattr(detrkit, name)))


def missing_docstrings(source: Source) -> Iterator[str]:
    """Modules, and public classes, functions and methods in them, that say nothing about themselves."""
    if not ast.get_docstring(source.tree):
        yield f"{source.path}:1 the module has no docstring"
    for name, node in definitions(source):
        spared = decorators(node) & {"overload", "override", "setter"}
        if is_public(name) and not spared and not ast.get_docstring(node):
            yield f"{source.at(node)} {name} has no docstring"


def missing_annotations(source: Source) -> Iterator[str]:
    """Parameters and results of public functions and methods that have no type."""
    for name, node in functions(source):
        if not is_public(name):
            continue
        method = "." in name and "staticmethod" not in decorators(node)
        for argument in all_arguments(node)[method:]:
            if argument.annotation is None:
                yield f"{source.at(node)} {name} does not say the type of {argument.arg!r}"
        if node.returns is None:
            yield f"{source.at(node)} {name} does not say what it returns"


def all_arguments(node: Function) -> list[ast.arg]:
    """The parameters of a function in their order."""
    stated = node.args
    starred = [argument for argument in (stated.vararg, stated.kwarg) if argument]
    return [*stated.posonlyargs, *stated.args, *stated.kwonlyargs, *starred]


def test_sources_are_documented(sources):
    report(breach for source in sources for breach in missing_docstrings(source))


def test_sources_are_typed(sources):
    report(breach for source in sources for breach in missing_annotations(source))


def test_the_public_name_rule_finds():
    def explained(path: str) -> str:
        """Open `path`."""
        return path

    def unexplained(path: str, mode: str) -> str:
        """Open `path`."""
        return path + mode

    assert not list(undocumented("explained", explained))
    assert list(undocumented("f", unexplained)) == ["detrkit.f does not explain its parameter 'mode'"]
    assert len(list(undocumented("f", lambda: 1))) == 1
    assert not list(undocumented("LIMIT", 3))


def test_the_docstring_rule_finds():
    text = "class A:\n  def f(self): ...\n  def _g(self): ...\ndef _h():\n  def inner(): ...\n"
    assert len(list(missing_docstrings(Source("detrkit.x", "x.py", text)))) == 3  # the module, A and A.f


def test_the_annotation_rule_finds():
    text = "class A:\n  def f(self, x, *rest: int) -> int: ...\n  @staticmethod\n  def g(y: int): ...\ndef _h(z): ...\n"
    breaches = list(missing_annotations(Source("detrkit.x", "x.py", text)))
    assert [breach.partition(" ")[2] for breach in breaches] == [
        "A.f does not say the type of 'x'",
        "A.g does not say what it returns",
    ]
