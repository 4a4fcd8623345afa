"""How many tokens the parts of a reply may take, where those of free length share what the others leave."""

import math
from collections.abc import Mapping
from dataclasses import replace

from omniform.errors import OmniformError
from omniform.inference.protocol import Request
from omniform.modeling.generation_config import SamplingSettings

Settings = Mapping[str, SamplingSettings]


def fit(
    request: Request,
    n_context: int,
    max_length: int,
    fixed_grids: Mapping[str, tuple[int, ...] | None],
    fewest: Mapping[str, int],
    *,
    bounded: bool,
) -> tuple[Settings, Settings]:
    """Lower `max_new_tokens` of parts of free length, so that all parts of a reply fit.

    Args:
        n_context: rows of the prompt.
        max_length: most rows of prompt and reply.
        fixed_grids: by modality, the grid of a part; None where it is of free length.
        fewest: by modality, the tokens of the shortest part of free length that holds anything.
        bounded: the caller chose `max_new_tokens`, which then is not lowered.

    Returns:
        Settings of what is asked for, and of what lies on the way. That has the room that parts of fixed size leave,
        or half of it where a part of the reply is of free length too.

    Raises:
        OmniformError: the reply does not fit, or `max_new_tokens` of one of its parts holds nothing.
    """
    # Where the model chooses, one part must fit; the session bounds the others by the room that is left.
    shortest = min(fixed_grids, key=lambda name: math.prod(fixed_grids[name] or (2,)))
    names = request.to.names[len(request.through) :] if request.to.names else (shortest,)
    fixed = sum(_n_rows(math.prod(grid), free=False) for name in names if (grid := fixed_grids[name]) is not None)
    free = [name for name in names if fixed_grids[name] is None]
    room = max_length - n_context - fixed
    for name in {*request.through, *names}:
        most = (request.through if name in request.through else request.settings)[name].max_new_tokens
        if fixed_grids[name] is None and most < fewest[name]:
            raise OmniformError(
                f"max_new_tokens is {most}, but {name} takes {fewest[name]} for one frame of its codes: give at least "
                "as many"
            )
    through, n_before = dict(request.through), 0
    for name, chosen in through.items():
        n_tokens = math.prod(fixed_grids[name] or ())
        if fixed_grids[name] is None:
            share = room // (2 if free else 1) - _n_rows(0, free=True)
            n_tokens = max(fewest[name], min(chosen.max_new_tokens, share))
            through[name] = replace(chosen, max_new_tokens=n_tokens)
        n_before += _n_rows(n_tokens, free=fixed_grids[name] is None)
    room -= n_before
    per_span = room // len(free) - _n_rows(0, free=True) if free else 0
    wanted = max((request.settings[name].max_new_tokens for name in free), default=0)
    least = max((fewest[name] for name in free), default=0)
    if room < 0 or (free and (per_span < least or (bounded and per_span < wanted))):
        n_reply = n_before + fixed + len(free) * _n_rows(wanted if bounded else least, free=True)
        long = "reply" if n_reply > max_length else "prompt"
        advice = "ask for fewer parts" if long == "reply" else "shorten the prompt"
        if bounded and free:
            advice += " or lower max_new_tokens"
        if through:
            advice += f", or give direct=True: {n_before} of these are for the {', '.join(through)} on the way"
        raise OmniformError(
            f"{long} too long: the prompt takes {n_context} of this model's {max_length} tokens, and the reply takes "
            f"{n_reply} or more: {advice}"
        )
    bound = per_span if request.to.names else max_length
    settings = {
        name: replace(chosen, max_new_tokens=min(chosen.max_new_tokens, bound)) if fixed_grids[name] is None else chosen
        for name, chosen in request.settings.items()
    }
    return settings, through


def _n_rows(n_tokens: int, *, free: bool) -> int:
    """Return the rows of a part: its begin marker, its tokens, and the end of one of free length."""
    return 1 + n_tokens + int(free)
