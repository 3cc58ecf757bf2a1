"""A forecast as tables to read, and as plain data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from nemo_like.observability.records import Table
from nemo_like.plan.outline import Outline, group_name
from nemo_like.plan.watch import ACTIVATIONS, OPTIMIZER, Message


def plan_tables(found: Outline) -> Iterator[Table]:
    """Places, memory, traffic, time, and what does not fit."""
    yield _places(found)
    yield _memory(found)
    yield _traffic(found)
    yield _time(found)
    yield _verdict(found)


def plan_data(found: Outline) -> dict[str, Any]:
    """The same numbers. Units: bytes, FLOPs, seconds."""
    return {
        "device": asdict(found.device),
        "micro_batches": found.work.num_micro_batches,
        "row_tokens": found.work.row_tokens,
        "num_parameters": found.num_parameters,
        "ranks": {
            rank: {
                "fullest_moment": dict(own.peak),
                "after_a_forward_pass": dict(own.after_forward),
                "sent": [
                    {"part": m.part, "sort": m.sort, "ranks": group_name(m), "bytes": amount}
                    for m, amount in own.sent.items()
                ],
                "flops": dict(own.flops),
            }
            for rank, own in found.ranks.items()
        },
        "fullest_rank": found.fullest,
        "with_other_recomputation": dict(found.other),
        "muon": {
            "exchange_bytes": found.exchange_bytes,
            "exchange_buffer": found.exchange_buffer,
            "newton_schulz_flops": found.newton_schulz_flops,
        },
        "engine": None if found.engine is None else asdict(found.engine),
        "seconds": found.seconds(),
        "misfits": list(found.misfits()),
        "places": [asdict(place) for place in found.placement.ranks],
    }


def _places(found: Outline) -> Table:
    """The coordinates of ranks; of many ranks those where one begins anew."""
    ranks = found.placement.ranks
    shown = ranks if len(ranks) <= 16 else [p for p in ranks if p.local_rank in (0, 1)]
    shown = shown if len(shown) <= 32 else [p for p in shown if p.local_rank == 0]
    rows = tuple(
        tuple(map(str, (p.rank, p.node, p.pipeline, p.data, p.context, p.tensor))) for p in shown
    )
    columns = ("rank", "machine", "pipeline", "data", "context", "tensor")
    title = "Who is where" + ("" if len(shown) == len(ranks) else " (a part of the ranks)")
    return Table(title, columns, rows)


def _memory(found: Outline) -> Table:
    """GB by kind, of each rank that was looked at."""
    peaks = {rank: own.peak for rank, own in found.ranks.items()}
    kinds = dict.fromkeys(kind for own in peaks.values() for kind in own)
    rows = [
        (kind, *(_gb(own.get(kind, 0)) for own in peaks.values()))
        for kind in kinds
        if any(own.get(kind, 0) > 5e5 for own in peaks.values())
    ]
    rows.append(("together", *(_gb(sum(own.values())) for own in peaks.values())))
    rows.append(
        (
            f"{ACTIVATIONS} after a forward pass",
            *(_gb(own.after_forward.get(ACTIVATIONS, 0)) for own in found.ranks.values()),
        )
    )
    how = "without" if found.recomputes else "with"
    rows.append(
        (
            f"the same {how} activation_checkpointing",
            *(
                _gb(found.other.get(ACTIVATIONS, 0)) if rank == found.fullest else ""
                for rank in found.ranks
            ),
        )
    )
    if found.exchange_buffer:
        rows.append(
            (
                "Muon's exchange, in the optimizer",
                _gb(found.exchange_buffer),
                *("" for _ in range(len(found.ranks) - 1)),
            )
        )
    columns = ("at the fullest moment of a step", *(f"rank {rank}, GB" for rank in found.ranks))
    return Table("Memory of a rank", columns, tuple(rows))


def _traffic(found: Outline) -> Table:
    """MB that a rank sends in an optimizer step, by what for."""
    own = found.ranks[found.fullest]
    amounts: defaultdict[Message, float] = defaultdict(float)
    for message, amount in own.sent.items():
        if not (message.part == OPTIMIZER and message.sort == "all-to-all"):
            amounts[message] += amount
    rows = [
        (f"{m.sort}, {group_name(m)}", m.part, str(len(m.ranks)), f"{amount / 1e6:,.1f}")
        for m, amount in sorted(amounts.items(), key=lambda pair: -pair[1])
        if amount >= 5e4
    ]
    if found.exchange_bytes:
        rows.append(("Muon's exchange", OPTIMIZER, "", f"{found.exchange_bytes / 1e6:,.1f}"))
    if found.engine:
        weights = 4 * found.num_parameters / 1e6
        rows.append(("weights, to each engine", "step", "", f"{weights:,.1f}"))
    columns = ("what", "part of the step", "ranks", "MB")
    return Table(f"What rank {found.fullest} sends in an optimizer step", columns, tuple(rows))


def _time(found: Outline) -> Table:
    """Seconds at stated peaks, and shares."""
    seconds = found.seconds()
    total = sum(seconds.values())
    rows = tuple(
        (name, f"{value:,.4f}", f"{value / total:.1%}")
        for name, value in sorted(seconds.items(), key=lambda pair: -pair[1])
    )
    title = "An optimizer step at the device's stated peaks, nothing overlapped"
    return Table(title, ("part", "seconds", "share"), rows)


def _verdict(found: Outline) -> Table:
    """Whether it fits, and what an engine has room for."""
    misfits = list(found.misfits())
    facts = [
        ("fits" if not misfits else "does not fit", text)
        for text in misfits
        or [f"{found.peak / 1e9:,.1f} of {found.device.memory / 1e9:,.0f} GB at the fullest moment"]
    ]
    facts.append(
        (
            "a rank's step",
            f"{found.work.num_micro_batches} micro-batches of "
            f"{len(found.work.rows)} row(s) of {found.work.row_tokens:,} tokens",
        )
    )
    if (engine := found.engine) is not None:
        facts.append(
            (
                "keys and values of an engine",
                (
                    f"{max(0, engine.cache) / 1e9:,.1f} GB of each GPU beside "
                    f"{engine.weights / 1e9:,.1f} GB "
                    f"of weights: {engine.sequences:,.1f} longest sequences at the same time "
                    f"(max_num_seqs={engine.asked})"
                ),
            )
        )
    facts.append(("source of the peaks", found.device.source))
    return Table("Does it fit?", ("", ""), tuple(facts))


def _gb(size: float) -> str:
    return f"{size / 1e9:,.3f}"
