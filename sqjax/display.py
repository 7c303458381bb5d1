"""Results on the terminal, as tables."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from sqjax.run import MIB

Result = dict[str, Any]


def _new_table(title: str, *columns: str, justify: str = "right") -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify=justify, overflow="fold")
    return table


def file_table(result: Result) -> Table:
    """Shows what a file is."""
    table = _new_table(result["file"], "", "", justify="left")
    for key, shown in (
        ("types", ", ".join(f"{count} {kind}" for kind, count in result["types"].items())),
        ("bytes", f"{result['file_bytes']:,} (tensors {result['tensor_bytes']:,})"),
        ("bits per weight", f"{result['bits_per_weight']:.4f}"),
        ("parameters", f"{result['parameters']:,}"),
        ("SHA-256", result["sha256"]),
    ):
        table.add_row(key, shown)
    return table


def files_table(result: Result) -> Group:
    """Shows several files, one after the other."""
    return Group(*(file_table(file) for file in result["files"].values()))


def release_table(result: Result) -> Group:
    """Shows what a release holds, and whether it was uploaded."""
    table = _new_table(result["repository"], "", "bytes")
    for name, size in result["files"].items():
        table.add_row(name, f"{size:,}")
    done = f"uploaded: {result['url']}" if result["uploaded"] else "nothing was uploaded; --upload does it"
    return Group(table, f"folder: {result['folder']}", f"card: {Path(result['folder']) / 'README.md'}", done)


def record_table(result: Result) -> Table:
    """Shows everything in a result."""
    table = _new_table(result["folder"], "", "", justify="left")
    for key, value in result.items():
        if key != "folder" and value is not None:
            table.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
    return table


def inspection_table(result: Result) -> Table:
    """Shows a file and its metadata."""
    table = file_table(result)
    table.add_section()
    for key, value in result["metadata"].items():
        shown = f"{value['length']:,} entries" if isinstance(value, dict) else str(value)
        table.add_row(key, shown if len(shown) <= 60 else shown[:57] + "...")
    return table


def evaluation_table(files: dict[str, Result]) -> Table:
    """One row a file, and one for each of its domains and roles; an interval is shown as half its width."""
    columns = ("", "tokens", "KL", "±", "p99", "top-1", "loss", "gap", "±", "bpw", "MiB")
    table = _new_table("KL divergence and loss in nats per token, intervals at 95%", *columns)
    for name, result in files.items():
        table.add_row(
            name, *_metrics_row(result), f"{result['bits_per_weight']:.2f}", f"{result['file_bytes'] / MIB:.1f}"
        )
        for part, metrics in (result.get("domains", result.get("suites", {})) | result.get("roles", {})).items():
            table.add_row(f"  {part}", *_metrics_row(metrics), "", "")
    table.caption = _overlaps(files)
    return table


def _overlaps(files: dict[str, Result]) -> str | None:
    """Says which files were measured on text that they were made on."""
    found = [name for name, file in files.items() if file.get("disjoint_from_calibration") is False]
    return f"made on some of this text: {', '.join(found)}" if found else None


def plan_table(result: Result) -> Table:
    """Shows what each stage needs on each topology."""
    columns = ("", "stage", "fits", "shard", "batch", "passes", "GB a device", "from", "least time", "bound by")
    table = _new_table(f"{result['model']}: what a device holds, and the least time of each stage", *columns)
    for topology, rows in result["plans"].items():
        for row in rows:
            if row["fits"]:
                fits, time = "yes", f"{row['seconds']:.1f} s"
            else:
                fits, time = f"from {row['needs']}" if row.get("needs") else "no", ""
            cells = (row.get("shard"), row.get("batch"), row.get("passes"))
            shown = ["" if cell is None else str(cell) for cell in cells]
            source = (f"{row['bytes'] / 1e9:.1f}", row["source"])
            table.add_row(topology, row["stage"], fits, *shown, *source, time, row.get("bound", ""))
        table.add_section()
    return table


def made_table(result: Result) -> Table:
    """Shows what became of a plan."""
    results = {Path(result["file"]).name: "quantized", "plain rounding": "plain"}
    return evaluation_table({name: result["evaluation"][key] for name, key in results.items()})


def sweep_table(result: Result) -> Group:
    """One row for each setting that was tried, the best first, and where the report is."""
    rows = result["ranking"]
    texts, names = list(rows[0]["ratio"]), list(rows[0]["settings"])
    counts = ", ".join(f"{count} {state}" for state, count in result["trials"].items())
    title = f"{result['study']}: KL over that of plain rounding; {counts}; * on the Pareto front"
    table = _new_table(title, "", *(name.split(".")[-1] for name in names), *result["objectives"], "±", *texts, "seeds")
    for row in rows:
        values = [f"{value:.4f}" for value in row["values"]]
        ratios = [f"{row['ratio'][text]:.4f}" for text in texts]
        values_of = [row["settings"][name] for name in names]
        settings = [f"{value:g}" if isinstance(value, float) else str(value) for value in values_of]
        spread = f"{max(row['spread']):.4f}"
        table.add_row("*" if row["on_front"] else "", *settings, *values, spread, *ratios, str(len(row["trials"])))
    return Group(table, f"report: {result['report']['html']}")


def demo_table(result: Result) -> Group:
    """Shows the demonstration's files, and where its report is."""
    return Group(evaluation_table(result["files"]), f"report: {result['report']['html']}")


def comparison_table(result: Result) -> Group:
    """One row a file, smallest divergence first; of each suite the loss, and KL where it is out of domain."""
    suites = result["suites"]
    outside = [name for name, suite in suites.items() if suite["out_of_domain"]]
    columns = ("", "bpw", "MiB", "KL", "±", "over plain", "recovery", "top-1", *(f"loss {name}" for name in suites))
    table = _new_table(f"against {result['reference']}; nats per token, intervals at 95%", *columns, "KL out of domain")
    facts = result["reference_facts"]
    losses = [f"{suite['cross_entropy']:.4f}" for suite in facts["suites"].values()]
    size = (f"{facts['bits_per_weight']:.2f}", f"{facts['file_bytes'] / MIB:.1f}")
    table.add_row("reference", *size, "0", "", "", "", "", *losses, "")
    files = result["files"] | {result["baseline"]["name"]: result["baseline"]}
    for name, file in sorted(files.items(), key=lambda item: item[1]["kl"]):
        recovery, ratio = file["recovery"], file["difference_from_plain"]["ratio"]
        shown = recovery["label"] if recovery["value"] is None else f"{recovery['value']:.1%}"
        table.add_row(
            name if name in result["files"] else f"{name} (made here)",
            *(f"{file['bits_per_weight']:.2f}", f"{file['file_bytes'] / MIB:.1f}", f"{file['kl']:.5f}"),
            f"{(file['kl_interval'][1] - file['kl_interval'][0]) / 2:.5f}",
            "" if ratio is None else f"{ratio:.3f}",
            "fits the data" if recovery["label"] == "fits the data" else shown,
            f"{file['top1']:.2%}",
            *(f"{suite['cross_entropy']:.4f}" for suite in file["suites"].values()),
            ", ".join(f"{file['suites'][suite]['kl']:.5f} {suite}" for suite in outside) or "none given",
        )
    table.caption = _overlaps(files)
    pages = [f"{kind}: {path}" for kind, path in result.get("report", {}).items() if kind in ("html", "markdown")]
    return Group(table, *pages)


def _metrics_row(metrics: Result) -> list[str]:
    half = {name: (metrics[name][1] - metrics[name][0]) / 2 for name in ("kl_interval", "gap_interval")}
    return [
        f"{metrics['tokens']:,}",
        f"{metrics['kl']:.5f}",
        f"{half['kl_interval']:.5f}",
        f"{metrics['kl_p99']:.3f}",
        f"{metrics['top1']:.2%}",
        f"{metrics['cross_entropy']:.4f}",
        f"{metrics['gap']:+.4f}",
        f"{half['gap_interval']:.4f}",
    ]
