"""A finished run as text for the terminal."""

from __future__ import annotations

from typing import Any

from driftline.core.console import table
from driftline.core.identity import method_name


def result_table(summary: dict[str, Any]) -> str:
    """The result as text: errors against the source model, or the metrics of a task stream."""
    metrics, about = summary["metrics"], summary["run"]
    method = method_name(about["strategy"], about.get("around", []))
    title = f"{method} on {about['scenario']}, backbone {about['backbone']}"
    cost = summary["cost"]
    foot = [
        f"{cost['seconds_per_batch']:.3f} s/batch, peak {cost['peak_memory_mb']:.0f} MiB, "
        f"{cost['forward_per_image']:.1f} forward and {cost['backward_per_image']:.1f} backward "
        f"passes an image, {cost['parameters_updated']:,} of {cost['parameters_total']:,} "
        "parameters updated"
    ]
    if "err_mean" not in metrics:
        rows = [(k, f"{v:.2f}") for k, v in metrics.items() if k not in ("collapse", "nan")]
        bad = [f"{k} {metrics[k]:.2f}" for k in ("collapse", "nan") if metrics.get(k)]
        foot = [*([", ".join(bad)] if bad else []), *_guarded(summary), *foot]
        foot += _published(summary)
        return "\n".join([title, table(("metric", "%"), rows), *foot])
    against = {
        title: summary[key]["metrics"]
        for key, title in (("source", "source"), ("frozen", "prepared only"))
        if key in summary
    }
    columns = {**against, method: metrics}
    domains = [k for k in metrics if k.startswith("err/")]
    head = ("error %", *columns)
    rows = [(k.removeprefix("err/"), *(f"{m[k]:.1f}" for m in columns.values())) for k in domains]
    rows += [
        (k.removeprefix("err_").replace("/", " "), *(f"{m[k]:.1f}" for m in columns.values()))
        for k in metrics
        if k.startswith(("err_round/", "err_severity/", "mce"))
    ]
    rows.append(("mean", *(f"{m['err_mean']:.1f}" for m in columns.values())))
    names = ("plasticity", "stability", "forgetting", "source_forgetting")
    names += ("source_forgetting_adapting", "auroc", "fpr95", "h_score", "collapse", "nan")
    shown = [k for k in names if k in metrics] + [
        k for k in metrics if k.startswith(("time/", "estimate/"))
    ]
    figures = [f"{k} {metrics[k]:.2f}" for k in shown]
    figures += [f"{k} {v:g}" for k, v in summary.get("method", {}).items()]
    figures = [text for text in figures if text not in ("collapse 0.00", "nan 0.00")]
    foot = [*([", ".join(figures)] if figures else []), *_guarded(summary), *foot]
    foot = [*_doubted(summary), *foot, *_timed(summary), *_published(summary)]
    return "\n".join([title, table(head, rows), *foot])


def _doubted(summary: dict[str, Any]) -> list[str]:
    """What `around=rails` said of the method, without a label."""
    method = summary.get("method", {})
    worse, judged = method.get("rails_worse", 0), method.get("rails_judged", 0)
    if not worse:
        return []
    likely = "worse than not adapting is likely" if 2 * worse >= judged else "worse now and then"
    return [f"{likely}: in {worse:g} of {judged:g} batches, told without labels (around=rails)"]


def _timed(summary: dict[str, Any]) -> list[str]:
    """Whose time `time/...` speaks of; none where the stream waited for the method."""
    if "time" not in summary:
        return []
    time = summary["time"]
    latency = time["latency"]
    of_method = latency if latency == "measured" else f"{latency:g} s a batch"
    text = f"time={time['protocol']}: latency {of_method}, source {time['source_seconds']:.3g} s"
    return [text if time["repeatable"] else f"{text}, on {time['device']}"]


def _guarded(summary: dict[str, Any]) -> list[str]:
    """What went bad and how it was answered, in one line; none where nothing did."""
    guard = summary.get("guard") or {"first": {}}
    kinds = [f"{kind} {guard[kind]} (first in batch {n})" for kind, n in guard["first"].items()]
    answered = f"; answered {n}" if (n := guard.get("answered")) else ""
    return [f"guard={guard['answer']}: {', '.join(kinds)}{answered}"] if kinds else []


def _published(summary: dict[str, Any]) -> list[str]:
    """Published figures, ours beside them where data and settings are the published ones."""
    lines = []
    for row in summary.get("reference") or []:
        ours = f"ours {row['ours']:.1f}" if row["comparable"] else "not comparable"
        what = f"published {row['strategy']} {row['metric']} {row['value']}"
        lines.append(f"{what} ({row['source']}; {row['status']}): {ours}")
    return lines
