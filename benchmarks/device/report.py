# SPDX-License-Identifier: Apache-2.0
"""The results of a device as tables in Markdown, as far as there are any."""

from collections.abc import Iterable, Sequence

from benchmarks.device.records import Record, chosen

PRESETS = {"768p_5s": "768p, 5 s", "384p_5s": "384p, 5 s"}
DONE = "done"  # how a step should end
PARTS = ("values", "dq", "dk", "dv")  # of what attention computes
# Kernels of this package, and what they are compared with.
OURS = ("pallas_triton", "pallas_mosaic_gpu", "pallas_tpu")
RIVALS = {
    "cudnn": "cuDNN with the mask as a matrix",
    "flex": "FlexAttention with the mask by blocks",
    "flex_flash": "the same on FlashAttention-4",
    "pallas_triton": "the Triton kernels",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; "" if there is no row."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    if not lines:
        return ""
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines])


def heading(records: Sequence[Record]) -> str:
    """The device, versions, commit and date of results."""
    begun = [record["environment"] for record in chosen(records, "begins")]
    if not begun:
        return "nothing was run"
    first = begun[0]
    commits = ", ".join(dict.fromkeys(where["commit"] for where in begun))
    tiny = (
        " (small shapes: no measurement)"
        if chosen(records, "begins", tiny=True)
        else ""
    )
    return (
        f"{first['device']}{tiny}: jax {first['jax']}, python {first['python']}, "
        f"commit {commits}, {first['date']}"
    )


def summary(records: Sequence[Record]) -> list[tuple[str, str]]:
    """What matters most, each with its value."""
    rows = []
    for record in chosen(records, "product"):
        rows.append(("product of bfloat16 matrices", f"{record['tflops']:.3g} TFLOP/s"))
    for record in chosen(records, "copy"):
        rows.append(("copy in memory", f"{record['tbps']:.3g} TB/s"))
    for preset, name in PRESETS.items():
        rows += _video(name, chosen(records, "units", preset=preset))
    rows += _trained(records) + _faster(records)
    for record in chosen(records, "decoded"):
        height, width = record["size"]
        name = (
            f"decoder, {height} x {width}, {record['latents_at_once']} latents at once"
        )
        rate = f"{record['frames_per_second']:.1f} frames/s to the host"
        rate += f", {record['on_device']:.1f} on the device"
        rows.append((name, rate + _gib(record["peak_gib"])))
    for record in [] if chosen(records, "decoded") else chosen(records, "piece"):
        begins = "first piece" if record["frames"] == 1 else "later piece"
        name = f"decoder, {begins}, {record['latents_at_once']} latents at once"
        name += ", with its compilation" * record["compiles"]
        rows.append((name, f"{record['seconds']:.2f} s for {record['frames']} frames"))
    for record in chosen(records, "encoded"):
        name = "text encoders, prompt and negative prompt"
        rows.append((name, f"{record['ms']['median']:.1f} ms"))
    return rows + _right(records)


def highlights(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Of the summary, what a visitor wants to know."""
    rows = []
    for preset, name in PRESETS.items():
        rows += _video(name, chosen(records, "units", preset=preset))
    return rows + _trained(records) + _faster(records)


def report(records: Sequence[Record]) -> str:
    """All tables of one device."""
    head = ("preset", "units", "stage", "tokens", "ms per step", "of the peak")
    steps = (
        (
            PRESETS.get(record["preset"], record["preset"]),
            step["units"],
            str(step["stage"]),
            " to ".join(f"{n:,}" for n in dict.fromkeys(step["tokens"])),
            f"{1e3 * step['step']['median']:.1f}",
            _percent(step["utilisation"]),
        )
        for record in chosen(records, "step")
        for step in [record["measured"]]
    )
    parts = [
        table(("", ""), summary(records)),
        table(head, steps),
        _attention(records),
        _errors(records),
        _tiles(records),
        _ended(records),
    ]
    return "\n\n".join(part for part in parts if part)


def _video(name: str, units: Sequence[Record]) -> list[tuple[str, str]]:
    """All Euler steps of a video, or of its later units if only they are known."""
    if not units:
        return []
    seconds = sum(record["seconds"] for record in units)
    flops = sum(record["flops"] for record in units)
    which = "" if len(units) == 2 else f", {units[0]['units']} units only"
    share, used = "", [record["utilisation"] for record in units]
    if None not in used:
        of_peak = (u * r["seconds"] for u, r in zip(used, units, strict=True))
        share = _share(sum(of_peak) / seconds)
    value = f"{seconds:.1f} s for {flops / 1e15:.2f} PFLOP{share}"
    memory = _gib(units[0]["peak_gib"])
    return [(f"Euler steps of a video, {name}{which}", value + memory)]


def _trained(records: Sequence[Record]) -> list[tuple[str, str]]:
    rows = []
    for record in chosen(records, "trained"):
        rate = f"{record['seconds']:.2f} s{_share(record['utilisation'])}"
        memory = _gib(record["peak_gib"])
        rows.append((f"training step, {record['tokens']:,} tokens", rate + memory))
    return rows


def _faster(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Each kernel of this package beside others on the same row."""
    times = [r for r in chosen(records, "time") if not r["measured"]["skipped"]]
    rows = []
    for ours in (r for r in times if r["rival"] in OURS):
        for other in chosen(times, "time", case=ours["case"]):
            if other["rival"] in RIVALS and other["rival"] != ours["rival"]:
                pairs = zip(
                    ours["measured"]["rates"], other["measured"]["rates"], strict=True
                )
                once, both = (mine / theirs for mine, theirs in pairs)
                about, beside = f"{ours['rival']}, {ours['case']}", other["rival"]
                name = f"{about}, beside {RIVALS[beside]}"
                value = f"{once:.1f} times as fast, {both:.1f} times with gradients"
                rows.append((name, value))
    return rows


def _right(records: Sequence[Record]) -> list[tuple[str, str]]:
    """How many trials each kernel passed, and its largest errors."""
    rows = []
    for kernel in dict.fromkeys(r["kernel"] for r in chosen(records, "trial")):
        trials = chosen(records, "trial", kernel=kernel)
        passed = len(chosen(trials, "trial", failure=None))
        rows.append((f"{kernel}: trials passed", f"{passed} of {len(trials)}"))
        errors = chosen(records, "error", kernel=kernel)
        for dtype in dict.fromkeys(record["dtype"] for record in errors):
            those = chosen(errors, "error", dtype=dtype)
            shares = [record.get(part) for record in those for part in PARTS]
            worst = "not finite" if None in shares else f"{max(shares):.1e}"
            right = sum(record["right"] for record in those)
            name = f"{kernel}: largest error in {dtype}"
            rows.append((name, f"{worst}; {right} of {len(those)} rows right"))
    return rows


def _attention(records: Sequence[Record]) -> str:
    head = ("row", "attention by", "forward, ms", "TFLOP/s", "both ways, ms", "TFLOP/s")
    rows = []
    for record in chosen(records, "time"):
        one, name = record["measured"], [record["case"], record["rival"]]
        if one["rates"] is None:
            rows.append([*name, f"skipped: {_one_line(one['skipped'])}", "", "", ""])
            continue
        cells = [
            cell
            for way, rate in zip(("forward", "both"), one["rates"], strict=True)
            for cell in (f"{one[way]['median']:.3f}", f"{rate:.3g}")
        ]
        rows.append([*name, *cells])
    return table(head, rows)


def _errors(records: Sequence[Record]) -> str:
    head = ("kernel", "row", "type", *PARTS, "")
    rows = []
    for record in chosen(records, "error"):
        cells = [_small(record.get(part)) for part in PARTS]
        verdict = "" if record["right"] else "**wrong** " + record.get("failure", "")
        about = [record[part] for part in ("kernel", "case", "dtype")]
        rows.append([*about, *cells, _one_line(verdict)])
    return table(head, rows)


def _tiles(records: Sequence[Record]) -> str:
    head = ("row", "tiles", "before, ms", "after, ms")
    rows = []
    for record in chosen(records, "tiles"):
        sizes = "; ".join(
            f"{kernel} {tuple(tile.values())}"
            for kernel, tile in record["tiles"].items()
        )
        times = (f"{record[when]:.3f}" for when in ("before", "after"))
        rows.append([record["case"], sizes, *times])
    return table(head, rows)


def _ended(records: Sequence[Record]) -> str:
    """The steps that did not come to their end."""
    rows = []
    for record in chosen(records, "ends"):
        if record["outcome"] != DONE:
            reasons = chosen(records, "failed", step=record["step"])
            reason = _one_line(reasons[0]["reason"]) if reasons else ""
            rows.append([record["step"], record["outcome"], reason])
    return table(("step", "ended", ""), rows)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").replace("|", "/").split())[:160]


def _small(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def _percent(part: float | None) -> str:
    return "" if part is None else f"{part:.0%}"


def _share(part: float | None) -> str:
    return "" if part is None else f", {part:.0%} of the peak"


def _gib(memory: float | None) -> str:
    return "" if memory is None else f", {memory:.1f} GiB"
