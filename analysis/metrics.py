"""What every number in a table means: one definition each, for reports and for docs/results.md.

    define("err/fog:5").better      # "lower"
    define("til/acc_last").text     # a sentence

Formulas stand beside the code that computes them: `core/metrics.py`, `core/open_world.py`,
`core/arrivals.py`, `core/estimates.py`, `core/cost.py`. `python tools/metrics_table.py` writes the
table of docs/results.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Group = Literal["error", "memory", "task", "open", "time", "estimate", "cost", "count"]
GROUPS: dict[Group, str] = {  # in the order of tables; the name of the table, if it has its own
    "error": "errors of an adaptation stream",
    "memory": "learning and forgetting",
    "task": "accuracy of a stream of tasks",
    "open": "unknown classes",
    "time": "time",
    "estimate": "accuracy without labels",
    "count": "what rules, budgets and the guard counted",
    "cost": "cost",
}


@dataclass(frozen=True)
class Metric:
    """One number that a run reports.

    Args:
        name: in `summary.json`; one that ends in `<...>` stands for all names with that beginning.
        better: which direction is; empty for a number that is neither good nor bad.
        digits: after the point.
        unit: `%`, `points` of percent, or another; empty for pure numbers.
        text: the definition, in a sentence.
        source: the paper whose definition it is; empty where it is plain counting.
        head: of its column; empty: its name.
        still: what a method that never changes has by that alone, so that it is no merit.
    """

    name: str
    group: Group
    better: Literal["lower", "higher", ""]
    digits: int
    unit: str
    text: str
    source: str = ""
    head: str = ""
    still: float | None = None

    @property
    def arrow(self) -> str:
        return {"lower": " ↓", "higher": " ↑", "": ""}[self.better]

    @property
    def called(self) -> str:
        """How its column is headed, where a reader could not tell the name from that."""
        return f", in tables {self.head}" if self.head and "<" not in self.name else ""


GEM = "Lopez-Paz and Ranzato, NeurIPS 2017"
WALK = "Chaudhry et al., ECCV 2018"
IMAGENET_C = "Hendrycks and Dietterich, ICLR 2019"
EATA = "Niu et al., ICML 2022"
TEMPORA = "Sreeram et al., ICML 2026"
AETTA = "Lee et al., CVPR 2024"
OURS = "this framework"
R = "R[i, j] is the accuracy on domain or task j after segment or task i"

METRICS = [
    # -------------------------------------------------------------- errors of a stream
    Metric("err_mean", "error", "lower", 1, "%",
           "Error of the answers given while adapting, mean over the domains.", IMAGENET_C),
    Metric("gain", "error", "higher", 1, "points",
           "Error of the source model, which is the same network without adaptation, minus that of "
           "the method, on the same images. Below zero, doing nothing is better.", OURS),
    Metric("err_images", "error", "lower", 1, "%", "Error over all images of the stream."),
    Metric("err_worst", "error", "lower", 1, "%", "The largest of the domains' errors.", OURS),
    Metric("err/<domain>", "error", "lower", 1, "%",
           "Error on one domain, over all segments in which it comes.", IMAGENET_C),
    Metric("err_segments", "error", "lower", 1, "%",
           "Mean over the segments of the error of each, where domains come back or mix."),
    Metric("err_round/<r>", "error", "lower", 1, "%",
           "Mean over the domains of the error in one round of a stream that repeats.",
           "Wang et al., CVPR 2022"),
    Metric("err_severity/<s>", "error", "lower", 1, "%",
           "Mean over the segments of one severity."),
    Metric("mce", "error", "lower", 1, "%",
           "Mean corruption error: errors over the five severities relative to AlexNet's, mean "
           "over the 15 corruptions.", IMAGENET_C),
    Metric("ece", "error", "lower", 3, "",
           "Expected calibration error: distance of confidence and accuracy in 15 bins of equal "
           "width, weighted by images.", "Guo et al., ICML 2017"),
    Metric("nll", "error", "lower", 3, "nats", "Mean of minus the log probability of the label."),
    Metric("brier", "error", "lower", 3, "",
           "Mean squared distance of the probabilities to the label's.", "Brier, 1950"),
    # -------------------------------------------------------------- learning and forgetting
    Metric("acc_inc", "task", "higher", 2, "%",
           "Average incremental accuracy: accuracy on all classes seen so far, mean over the tasks "
           "after which it is measured.", "Rebuffi et al., CVPR 2017"),
    Metric("acc_last", "task", "higher", 2, "%",
           "Accuracy on all classes (or domains) after the last task, each image counted once.",
           "Rebuffi et al., CVPR 2017"),
    Metric("acc_inc_macro", "task", "higher", 2, "%",
           "As acc_inc, with each task counted once whatever its number of images."),
    Metric("acc_last_macro", "task", "higher", 2, "%",
           "As acc_last, with each task counted once whatever its number of images."),
    Metric("plasticity", "memory", "higher", 2, "%",
           f"Learning accuracy: mean over j of R[j, j]. {R}, on held-out images, without adapting "
           "to them.", GEM),
    Metric("stability", "memory", "higher", 2, "%",
           "Mean share of R[j, j] that later rows of R keep, each at most 1.", OURS, still=100),
    Metric("forgetting", "memory", "lower", 2, "points",
           "Best earlier accuracy on a task or domain minus that at the end, mean over the old "
           "ones.", WALK, still=0),
    Metric("bwt", "memory", "higher", 2, "points",
           "Backward transfer: mean over the old j of R[end, j] - R[j, j].", GEM, still=0),
    Metric("fwt", "memory", "higher", 2, "points",
           "Forward transfer: mean over j of R[j-1, j] minus the accuracy before anything was "
           "learned.", GEM, still=0),
    Metric("intransigence", "task", "lower", 2, "points",
           "Accuracy of joint training (strategy=joint) on a task minus R[j, j], mean over the "
           "tasks.", WALK),
    Metric("clean_err_before", "memory", "lower", 1, "%",
           "Error on clean images before the stream."),
    Metric("clean_err_after", "memory", "lower", 1, "%",
           "Error on clean images after the stream, without adapting to them."),
    Metric("source_forgetting", "memory", "lower", 2, "points",
           "Accuracy on clean images before the stream minus after it, the method standing still.",
           EATA, still=0),
    Metric("clean_err_before_adapting", "memory", "lower", 1, "%",
           "Error on clean images before the stream, adapting to them."),
    Metric("clean_err_after_adapting", "memory", "lower", 1, "%",
           "Error on clean images after the stream, adapting to them."),
    Metric("source_forgetting_adapting", "memory", "lower", 2, "points",
           "As source_forgetting, while a copy of the method adapts to the clean images.",
           EATA, head="sf_adapting", still=0),
    Metric("nfa", "task", "higher", 2, "%",
           "Near-future accuracy: on a batch that comes so much later that recent labels no longer "
           "help, before it is learned.", "Hammoud et al., ICCV 2023"),
    Metric("nfa_blind", "task", "", 2, "%",
           "The same of a classifier that answers with the commonest recent label.",
           "Hammoud et al., ICCV 2023"),
    Metric("nfa_shift", "task", "", 0, "batches", "How much later those batches come.",
           "Hammoud et al., ICCV 2023"),
    # -------------------------------------------------------------- unknown classes
    Metric("unknown", "open", "", 0, "images", "Images of classes that the network does not have."),
    Metric("auroc", "open", "higher", 2, "%",
           "Chance that a known image has a larger top probability than an unknown one, ties half; "
           "mean over the domains.", "Hendrycks and Gimpel, ICLR 2017"),
    Metric("fpr95", "open", "lower", 2, "%",
           "Unknown images that pass the threshold which 95 % of the known ones pass.",
           "Gao et al., CVPR 2024"),
    Metric("h_score", "open", "higher", 2, "%",
           "Harmonic mean of the accuracy on known images and auroc.", "Yu et al., ECCV 2024"),
    # -------------------------------------------------------------- time
    Metric("time/utility", "time", "higher", 1, "%",
           "What the answers are worth when time counts: right ones of all images (deadline: in "
           "time alone), or their accuracy times timeliness plus alignment (decay).", TEMPORA),
    Metric("time/availability", "time", "higher", 1, "%",
           "Images in batches that the method answered itself, of all.", TEMPORA, still=100),
    Metric("time/err_served", "time", "lower", 1, "%", "Error on the images that it answered.",
           "Alfarra et al., ICML 2024"),
    Metric("time/missed", "time", "lower", 0, "batches",
           "Batches that came while the method was busy.", "Alfarra et al., ICML 2024", still=0),
    Metric("time/timeliness", "time", "higher", 1, "%",
           "Mean discount of an answer: 100 within the source's own time, 50 at the threshold.",
           TEMPORA, still=100),
    Metric("time/alignment", "time", "higher", 2, "points",
           "Covariance of accuracy and discount: above zero where the late batches are the worse "
           "ones.", TEMPORA, still=0),
    Metric("time/adapted", "time", "higher", 0, "batches",
           "Batches adapted to before the extra time was spent.", TEMPORA),
    Metric("time/spent", "time", "", 2, "s", "Seconds beyond the source's own time.", TEMPORA),
    # -------------------------------------------------------------- accuracy without labels
    Metric("estimate/agreement", "estimate", "", 1, "%",
           "Estimated accuracy: share of images that the method and the method one batch before "
           "predict alike.", "Jiang et al., ICLR 2022"),
    Metric("estimate/agreement_mae", "estimate", "lower", 1, "points",
           "Distance of this estimate to the true accuracy, mean over the batches.", AETTA),
    Metric("estimate/aetta", "estimate", "", 1, "%",
           "Estimated accuracy: agreement with predictions under dropout, corrected by entropy.",
           AETTA),
    Metric("estimate/aetta_mae", "estimate", "lower", 1, "points",
           "Distance of this estimate to the true accuracy, mean over the batches.", AETTA),
    # -------------------------------------------------------------- what was counted
    Metric("collapse", "count", "lower", 3, "",
           "Share of the batches (of tasks: evaluations) whose predictions fall in at most two "
           "classes.", OURS),
    Metric("nan", "count", "lower", 0, "rows", "Rows of scores with a NaN or an infinity."),
    Metric("method/labels_bought", "count", "", 0, "labels",
           "Labels of the stream that the method paid for.", "Gui et al., ICLR 2024"),
    Metric("method/labels_share", "count", "", 3, "", "The same, as a share of the images."),
    Metric("method/resets_on_collapse", "count", "", 0, "",
           "How often around=reset_on_collapse put the method back to its start."),
    Metric("method/rollbacks", "count", "", 0, "",
           "How often around=rollback put back a method that had diverged."),
    Metric("method/recoveries", "count", "", 0, "",
           "How often SAR put its weights back because it had collapsed.", "Niu et al., ICLR 2023"),
    Metric("method/rails_probes", "count", "", 0, "batches",
           "around=rails: batches that method and source both predicted, to be compared.", OURS),
    Metric("method/rails_judged", "count", "", 0, "batches",
           "around=rails: batches since the first comparison that could be judged.", OURS),
    Metric("method/rails_worse", "count", "lower", 0, "batches",
           "around=rails: batches in which the method was likely worse than not adapting, as told "
           "without labels.", OURS),
    Metric("method/rails_by_source", "count", "", 0, "batches",
           "around=rails: batches that the source answered.", OURS),
    Metric("method/rails_by_both", "count", "", 0, "batches",
           "around=rails: batches that method and source answered together.", OURS),
    Metric("method/rails_paused", "count", "", 0, "batches",
           "around=rails: batches without an update, since entropy was too high.", OURS),
    Metric("method/rails_back", "count", "", 0, "",
           "around=rails: how often the method went back to an earlier state.", OURS),
    Metric("method/<count>", "count", "", 3, "", "A count that the method itself reports."),
    Metric("guard/input", "count", "lower", 0, "batches",
           "Batches with images that are not finite."),
    Metric("guard/scores", "count", "lower", 0, "batches",
           "Batches with scores that are not finite."),
    Metric("guard/loss", "count", "lower", 0, "batches", "Batches with a loss that is not finite."),
    Metric("guard/gradients", "count", "lower", 0, "batches",
           "Batches with gradients that are not finite."),
    Metric("guard/exploding", "count", "lower", 0, "batches", "Batches with exploding gradients."),
    Metric("guard/weights", "count", "lower", 0, "batches",
           "Batches after which weights are not finite or have exploded."),
    Metric("guard/collapse", "count", "lower", 0, "windows",
           "Windows of predictions that fall in one or two classes."),
    Metric("guard/answered", "count", "lower", 0, "batches",
           "Bad batches that guard=skip, rollback or reset answered."),
    # -------------------------------------------------------------- cost
    Metric("cost/seconds_per_batch", "cost", "lower", 3, "s",
           "Median seconds of learning from a batch, without loading.", head="s/batch"),
    Metric("cost/seconds_total", "cost", "lower", 1, "s",
           "Seconds of all these steps.", head="steps s"),
    Metric("cost/end_of_task_seconds", "cost", "lower", 1, "s",
           "Seconds of what comes after the last epoch of each task.", head="end of task s"),
    Metric("cost/evaluation_seconds", "cost", "lower", 1, "s",
           "Seconds of scoring test images, loading included.", head="test s"),
    Metric("cost/test_ms", "cost", "lower", 2, "ms",
           "Milliseconds to answer a test image, loading included; not of runs that kept features "
           "from one evaluation to the next (runtime.feature_cache_mb=0 keeps none).",
           head="ms/test image"),
    Metric("cost/peak_memory_mb", "cost", "lower", 0, "MiB",
           "Peak memory: of the device on a GPU, of the process on a CPU.", head="peak MiB"),
    Metric("cost/forward_per_image", "cost", "lower", 1, "",
           "Forward passes of the network an image of the stream.", head="forward/image"),
    Metric("cost/backward_per_image", "cost", "lower", 1, "",
           "Backward passes an image.", head="backward/image"),
    Metric("cost/parameters_updated", "cost", "lower", 0, "",
           "Parameters that an optimiser changes.", head="updated"),
    Metric("cost/parameters_total", "cost", "lower", 0, "",
           "Parameters of the method, copies of the network included.", head="parameters"),
    Metric("cost/state_mib", "cost", "lower", 2, "MiB",
           "What the method keeps beside the network: copies, moments, statistics, adapters.",
           head="state MiB"),
    Metric("cost/task_mib", "cost", "lower", 3, "MiB",
           "What a task adds to that, moments of optimisers left out; mean over all tasks but the "
           "first.", head="MiB a task"),
    Metric("method/memory_images", "cost", "lower", 0, "images",
           "Training images that the method keeps to see them again.", head="buffer images"),
    Metric("method/memory_mib", "cost", "lower", 2, "MiB",
           "What these images take, with their labels and scores.", head="buffer MiB"),
    Metric("cost/<cost>", "cost", "", 1, "", "A cost that the run reports; see docs/runs.md."),
]  # fmt: skip
EXACT = {metric.name: metric for metric in METRICS if "<" not in metric.name}
FAMILIES = {m.name.partition("<")[0]: m for m in METRICS if "<" in m.name}
OWN = Metric("", "count", "", 2, "", "Not a number of this framework: the run wrote it itself.")


def define(name: str) -> Metric:
    """The definition of a metric by its name in a result, whatever its beginning or end.

    One that nobody defined, for example of a method of one's own, has no direction.
    """
    if name in EXACT:
        return EXACT[name]
    if name.startswith("til/"):
        known = define(name.removeprefix("til/"))
        text = f"{known.text} With the task of each test image given (task-incremental)."
        return replace(known, name=name, text=text)
    if name.endswith("_energy"):
        known = define(name.removesuffix("_energy"))
        text = f"{known.text} By the energy of the logits in place of the probability."
        return replace(known, name=name, text=text, source="Liu et al., NeurIPS 2020")
    for beginning, family in FAMILIES.items():
        if name.startswith(beginning):
            short = name if name.startswith("err_") else name.partition("/")[2]
            return replace(family, head=short)
    return replace(OWN, name=name)


def of_group(group: Group) -> list[str]:
    """Names of the metrics of one group, in the order of columns."""
    return [m.name for m in METRICS if m.group == group and "<" not in m.name]


def sentences(names: Iterable[str]) -> list[tuple[str, str, str]]:
    """For each metric: its name with arrow and heading, the definition with unit, the source.

    Metrics of one family, such as the errors of all domains, are told once.
    """
    told: dict[str, tuple[str, str, str]] = {}
    for metric in map(define, names):
        unit = f" In {metric.unit}." if metric.unit not in ("", "%") else ""
        percent = " Percent." if metric.unit == "%" else ""
        head = f"{metric.name}{metric.arrow}{metric.called}"
        told.setdefault(metric.name, (head, f"{metric.text}{unit}{percent}", metric.source))
    return list(told.values())
