"""`e88 generate`: text from a checkpoint, streamed to the terminal."""

from __future__ import annotations

import codecs
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from e88.cli import app, options
from e88.errors import unknown_name


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run.")],
    prompt: Annotated[str | None, typer.Option(help="Text to go on from.  [default: a new line]")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest that hold this mass; 1 is off.")] = 1.0,
    max_bytes: Annotated[int, typer.Option(min=1, help="Stop after this many bytes.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    save_state: Annotated[Path | None, typer.Option(help="Write the recurrent state reached (safetensors).")] = None,
    load_state: Annotated[Path | None, typer.Option(help="Go on from a state written by --save-state.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16 or float32.  [default: bf16 on a GPU, else float32]")] = "auto",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Generate text from a checkpoint, as it comes, with constant memory."""
    import torch

    from e88.data.codec import Codec
    from e88.models.generate import Decoder, Sampling, prepare
    from e88.runtime import choose_device
    from e88.training import checkpoint as files

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    where = choose_device(device)
    dtypes = {"bf16": torch.bfloat16, "float32": torch.float32}
    dtypes["auto"] = dtypes["bf16" if where.type == "cuda" else "float32"]
    if dtype not in dtypes:
        raise unknown_name("dtype", dtype, list(dtypes))
    model, meta = files.load_model(checkpoint, where)
    codec = Codec.from_dict(meta["tokenizer"])
    # Surrogates stand for bytes of the command line that are not UTF-8.
    text = ("\n" if prompt is None and load_state is None else prompt or "").encode("utf-8", "surrogateescape")
    tokens, state = list(codec.encode(text)), None
    if load_state:
        state, pending = files.load_state(load_state, model.config, where)
        tokens = pending + tokens
    decoder = Decoder(prepare(model, dtypes[dtype]), state=state, sampling=sampling, seed=seed)
    decoder.read(torch.tensor([tokens], dtype=torch.int64))
    text_of, written, last = codecs.getincrementaldecoder("utf-8")(errors="replace"), bytearray(), -1
    while len(written) < max_bytes:
        # So many tokens are needed whatever they are; the state must not go beyond the last one.
        for token in decoder.tokens(-(-(max_bytes - len(written)) // codec.longest)):
            last = int(token)
            piece = codec.decode([last])
            written += piece
            if not as_json:
                sys.stdout.write(text_of.decode(piece))
                sys.stdout.flush()
    if save_state:
        files.save_state(save_state, decoder.state, [last], model.config)
    if as_json:
        answer = {"prompt": prompt, "text": written.decode("utf-8", "replace"), "bytes": len(written), "seed": seed}
        print(json.dumps(answer))
    else:
        print(text_of.decode(b"", final=True))
