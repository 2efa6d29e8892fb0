"""`e88 doctor`: what this machine can run, and why not."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from e88.cli import app


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Say what this machine can run: hardware, packages, operator backends, and the reason for what it cannot."""
    facts = _facts()
    if as_json:
        print(json.dumps(facts))
        return
    width = max(len(key) for part in facts.values() for key in part)
    for title, part in facts.items():
        print(title)
        for key, value in part.items():
            print(f"  {key:<{width}}  {value if value is not None else 'not installed'}")


def _facts() -> dict[str, dict[str, Any]]:
    import os

    import torch

    from e88 import runtime
    from e88.ops import available_backends

    gpus = {f"GPU {i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    reason = "none: this torch was built without CUDA" if torch.version.cuda is None else "none: torch sees no device"
    return {
        "machine": {
            "processor": runtime.cpu_name(),
            "CPU threads": torch.get_num_threads(),
            "vector extension": torch.backends.cpu.get_cpu_capability(),
            "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
            **(gpus or {"GPU": reason}),
            "cache": str(runtime.cache_folder()),
        },
        "packages": {**runtime.versions(), **{p: None for p in runtime.PACKAGES if not runtime.package_version(p)}},
        "operator backends": {n: "ready" if why is None else f"no: {why}" for n, why in available_backends().items()},
    }
