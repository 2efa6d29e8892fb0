"""`e88 doctor`: what this machine can run, and why not."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from e88.cli import EXIT_FAILED, app, options

# Presets whose layers --kernels checks, on a CPU and on a GPU.
LAYERS = {
    False: ("tiny-e88", "tiny-gdn", "tiny-mamba2", "tiny-transformer"),
    True: ("e88-500m", "gdn-500m", "gdn-500m-doc", "mamba2-500m", "transformer-500m"),
}


@app.command()
def doctor(
    kernels: Annotated[bool, typer.Option("--kernels", help="Also check the kernels against float64.")] = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Say what this machine can run: hardware, packages, backends, libraries, and the reason for what it cannot.

    With --kernels: which backend each shape and each model's layer gets, and how far it is from float64. Exit code 1
    where one is wrong. On a GPU the libraries tune their kernels first, which takes minutes.
    """
    facts = _facts()
    if kernels:
        facts["kernels"] = _kernels(device)
        facts["layers"] = _layers(device)
    wrong = [name for part in ("kernels", "layers") for name, row in facts.get(part, {}).items() if not row["ok"]]
    if as_json:
        print(json.dumps(facts))
    else:
        width = max(len(key) for part in facts.values() for key in part)
        for title, part in facts.items():
            print(title)
            for key, value in part.items():
                checked = title in ("kernels", "layers")
                text = _verdict(value) if checked else "not installed" if value is None else value
                print(f"  {key:<{width}}  {text}")
    if wrong:
        raise typer.Exit(EXIT_FAILED)


def _facts() -> dict[str, dict[str, Any]]:
    import os

    import torch

    from e88 import runtime
    from e88.layers.mixer import rival_libraries
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
        "rivals' libraries": rival_libraries(),
    }


def _kernels(device: str) -> dict[str, dict[str, Any]]:
    """For shapes a model may have: the backend that `auto` takes, its largest relative error, and where it is."""
    import torch

    from e88.ops import record_backends
    from e88.ops.accuracy import TOLERANCE, Shape, check, worst
    from e88.runtime import choose_device

    where = choose_device(device)
    dtypes = (torch.float32,) if where.type == "cpu" else (torch.float32, torch.bfloat16)
    sizes = [(8, 8), (16, 16), (24, 24), (32, 32), (48, 48), (64, 64), (128, 128), (32, 64), (64, 32)]
    shapes = [Shape(2, 67, 3, K, V) for K, V in sizes] + [Shape(8, 1, 8, 32, 32), Shape(1, 1025, 2, 32, 32)]
    rows = {}
    for dtype in dtypes:
        for shape in shapes:
            with record_backends() as used:
                errors = check(shape, where, dtype)
            # The float64 side of the check runs on the plain backend, which is no news.
            backend = "/".join(sorted(used - {"checkpointed"})) or "checkpointed"
            tensor, error = worst(errors)
            ok = error <= TOLERANCE[dtype]
            key = f"{str(dtype).removeprefix('torch.')} {shape}"
            rows[key] = {"backend": backend, "error": error, "tensor": tensor, "ok": ok}
    return rows


def _layers(device: str) -> dict[str, dict[str, Any]]:
    """For E88's layer and its rivals', at sizes that are compared: what runs, its largest relative error, and where."""
    import torch

    from e88.layers.accuracy import check
    from e88.runtime import choose_device
    from e88.sizing.presets import preset

    where = choose_device(device)
    on_gpu = where.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rows = {}
    for name in LAYERS[on_gpu]:
        typer.echo(f"checking the layer of {name}", err=True)
        found = check(preset(name), where, dtype, tune=(32, 512) if on_gpu else None)
        key = f"{str(dtype).removeprefix('torch.')} {name}"
        rows[key] = {"backend": "/".join(found.backends), "error": found.error, "tensor": found.tensor, "ok": found.ok}
    return rows


def _verdict(row: dict[str, Any]) -> str:
    mark = "ok" if row["ok"] else "WRONG"
    return f"{row['backend']:<12} {mark:<5} largest relative error {row['error']:.1e} ({row['tensor']})"
