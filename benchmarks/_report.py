"""What every benchmark shares: the machine in the result, and how a result is shown."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parser(document: str | None) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark."""
    made = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--short", action="store_true", help="a small case, in seconds")
    made.add_argument("--json", action="store_true", help="print the whole result as one JSON document")
    return made


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Processor, versions and commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": commit.stdout.strip() if commit.returncode == 0 else None,
    }


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print a result: one JSON document, or a table of its plain figures."""
    if as_json:
        print(json.dumps(result, indent=1))
        return
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"  {name}")
            for inner, entry in value.items():
                print(f"    {inner:<32}{entry}")
        else:
            print(f"  {name:<34}{value}")


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        for line in facts.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
