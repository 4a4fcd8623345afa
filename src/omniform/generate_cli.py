"""`omniform generate`: its options, and what it prints."""

from pathlib import Path
from typing import Annotated, Any

import typer

from omniform.console import Json, print_json
from omniform.errors import OmniformError
from omniform.inference.terminal_text import harmless


def generate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model folder, e.g. runs/demo/model.")],
    prompt: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Parts in order: text, or @file; @@ for a literal @.")
    ] = None,
    to: Annotated[
        list[str] | None,
        typer.Option(
            help="Modality to generate, such as text, image, speech or video. Several: image,speech; any: the model "
            "chooses. (default: text, or image with --image)"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File for the result, or a folder, or a name without suffix; several get numbers. Formats: png jpg "
            "webp bmp tiff, wav flac mp3 ogg, mp4 webm gif, txt, json. (default: omniform-SEED.png, .wav, .mp4; text "
            "is printed)"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same result. (default: a new one each time)")] = None,
    n: Annotated[int, typer.Option(help="Number of samples.")] = 1,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most likely token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the most likely tokens of this total.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How strongly the prompt counts; 1 is plain.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance leads away from.")] = None,
    steps: Annotated[int | None, typer.Option(help="Refinement steps of a picture or video.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest text or speech, in tokens.")] = None,
    max_parts: Annotated[int | None, typer.Option(help="Most parts of a reply to --to any. (default: 8)")] = None,
    direct: Annotated[
        bool, typer.Option("--direct", help="Go by way of no other modality, where the model otherwise would.")
    ] = False,
    suffix: Annotated[
        str | None, typer.Option(help="Text after the one that is wanted, of a model that fills gaps.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="Which of the model's denoisers a text is asked of (model.denoisers).")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Picture to draw anew in part.")] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="What of it: a picture of its size, black where it stays. (default: transparent)"),
    ] = None,
    strength: Annotated[float | None, typer.Option(help="Instead of a mask: fraction to vary, in (0, 1].")] = None,
    outpaint: Annotated[
        tuple[int, int, int, int] | None,
        typer.Option(
            metavar="LEFT TOP RIGHT BOTTOM", help="Instead of a mask: pixels to add at each side, to a square."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate text, pictures, speech or video from any of them; or draw a part of a picture anew.

    omniform generate runs/demo/model "a handwritten seven" --to image --out seven.png

    omniform generate runs/demo/model @seven.png --to text

    omniform generate runs/demo/model @seven.wav --to video --out seven.mp4

    omniform generate runs/demo/model "a seven" --to speech,image --out seven

    omniform generate runs/demo/model "a one" --image seven.png --strength 0.7 --out one.png

    omniform generate runs/ul2/model "the digit" --suffix " comes first"
    """
    from omniform.inference.command import generate_files

    given: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "steps": steps,
        "max_new_tokens": max_new_tokens,
        "max_parts": max_parts,
        "strength": strength,
        "suffix": suffix,
        "mode": mode,
        "direct": direct,
    }
    keywords = {key: value for key, value in given.items() if value is not None}
    to = to or ["text" if image is None else "image"]
    outputs = generate_files(
        model, prompt or [], to, out, seed, n, image=image, mask=mask, margins=outpaint, **keywords
    )
    if as_json:
        print_json([vars(output) for output in outputs])
    else:
        for output in outputs:
            if output.path is not None:
                way = f"; by way of: {harmless(' '.join(', '.join(output.through).split()))}" if output.through else ""
                print(f"{output.path} (seed {output.seed}{way})")
            elif output.text is not None:
                print(harmless(output.text))
    if empty := sum(output.path is None and output.text is None for output in outputs):
        raise OmniformError(
            f"{empty} of {len(outputs)} parts are speech without a sample, for which no file was written (seed "
            f"{outputs[0].seed}): the model ended them at once; give another --seed"
        )
