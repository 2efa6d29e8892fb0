"""`e88 generate`: text from a checkpoint, streamed to the terminal."""

from __future__ import annotations

import codecs
import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from e88.cli import app
from e88.errors import UserError


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "\n",
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest that hold this probability; 1 is off.")] = 1.0,
    max_bytes: Annotated[int, typer.Option(min=1, help="Stop after this many bytes.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    save_state: Annotated[Optional[Path], typer.Option(help="Write the recurrent state reached (safetensors).")] = None,
    load_state: Annotated[Optional[Path], typer.Option(help="Go on from a state written by --save-state.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end instead.")] = False,
) -> None:
    """Generate text from a checkpoint with constant memory."""
    from e88.models.generate import Sampling, stream
    from e88.runtime import choose_device
    from e88.training.checkpoint import load_model
    from e88.training.checkpoint import load_state as read_state
    from e88.training.checkpoint import save_state as write_state

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    where = choose_device(device)
    model, meta = load_model(checkpoint, where)
    codec = _codec(meta)
    tokens, state = codec.encode(prompt.encode("utf-8", "surrogateescape")), None
    if load_state:
        state, pending = read_state(load_state, model.config, where)
        tokens = pending + tokens
    out, written = codecs.getincrementaldecoder("utf-8")(errors="replace"), bytearray()
    last = None
    for token, state in stream(model, tokens, state=state, sampling=sampling, seed=seed):
        last = token
        piece = codec.decode([token])
        written += piece
        if not as_json:
            sys.stdout.write(out.decode(piece))
            sys.stdout.flush()
        if len(written) >= max_bytes:
            break
    if save_state and state is not None and last is not None:
        # The state holds everything before the last token, which is kept beside it to be read first.
        write_state(save_state, state, model.config, [last])
    if as_json:
        text = bytes(written).decode("utf-8", "replace")
        print(json.dumps({"prompt": prompt, "text": text, "bytes": len(written), "seed": seed}))
    else:
        sys.stdout.write(out.decode(b"", final=True) + "\n")


def _codec(meta: dict) -> object:
    from e88.data.codec import codec_of

    try:
        return codec_of(meta["data"])
    except KeyError as error:
        raise UserError(f"the checkpoint does not say how its data was encoded (no {error})") from error
