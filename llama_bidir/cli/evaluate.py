"""Measure a run against qrels and compare it with a baseline."""

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.outputs import check_apart, check_free, write_whole
from ..utils.tables import format_table
from .options import add_identical_option

if TYPE_CHECKING:
    from ..evaluation import Comparison, Evaluation, Qrels, Report, Run, System

MEASURES = "nDCG@10 RR@10 R@100"
INPUTS = ("qrels", "run", "baseline", "queries", "corpus", "latency")
OUTPUTS = ("json", "report")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.epilog = (
        "Documents are ranked by falling score. Equal scores are ranked by falling identifier, as in trec_eval. "
        "A judged query that the run lacks counts as 0. Queries that are not judged are ignored. Input files may be "
        "gzipped (.gz)."
    )
    parser.add_argument(
        "--qrels", required=True, metavar="QRELS", help="judgements: BEIR TSV with a header, or 4-column TREC"
    )
    parser.add_argument("--run", required=True, metavar="A.trec", help="6-column TREC run")
    parser.add_argument("--baseline", metavar="B.trec", help="run to compare with")
    parser.add_argument(
        "--measures", nargs="+", default=[MEASURES], metavar="M", help=f"names from ir_measures; default: {MEASURES}"
    )
    parser.add_argument("--json", metavar="OUT", help="write all values, also per query, unrounded")
    parser.add_argument(
        "--report", metavar="OUT.html", help="write a page with tables, charts and the queries that changed most"
    )
    parser.add_argument("--queries", metavar="Q", help="texts for the report: JSON Lines (_id, text)")
    parser.add_argument("--corpus", metavar="C", help="texts for the report: JSON Lines (_id, title, text)")
    parser.add_argument("--latency", metavar="L.json", help="latencies for the report: JSON object of seconds by query")
    add_identical_option(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT and OUT.html if they exist")


def run(arguments: argparse.Namespace) -> None:
    """Evaluates the runs, writes the requested outputs and prints the table."""
    _check_paths(arguments)
    from ..data.identical import drop_own_ids, tell_identical
    from ..data.trec import no_common_query
    from ..evaluation import System, compare, evaluate_queries, make_report, read_qrels, read_run
    from ..evaluation.measures import parse_measures

    measures = [str(measure) for measure in parse_measures(" ".join(arguments.measures))]
    qrels = read_qrels(arguments.qrels)
    paths = [path for path in (arguments.run, arguments.baseline) if path]
    has_short_names = len({Path(path).name for path in paths}) == len(paths)
    systems = []
    for path in paths:
        entries = read_run(path)
        judged: Run = {query_id: entries[query_id] for query_id in qrels if query_id in entries}
        if not judged:
            raise no_common_query(f"{path}: the run", arguments.qrels)
        print(_coverage(path, qrels, entries))
        if arguments.ignore_identical_ids:
            judged, num_identical = drop_own_ids(qrels, judged)
            tell_identical(path, num_identical, "documents")
        name = Path(path).name if has_short_names else path
        systems.append(System(name, judged, evaluate_queries(qrels, judged, measures, ignore_identical_ids=False)))
    system, baseline = systems[0], systems[1] if len(systems) > 1 else None
    comparisons = compare(system.evaluation, baseline.evaluation) if baseline else []
    outputs = {}
    if arguments.json:
        outputs[arguments.json] = _to_json(arguments, system, baseline, comparisons)
    if arguments.report:
        report = make_report(qrels, system, baseline, comparisons)
        outputs[arguments.report] = _render(
            arguments, report, qrels, {Path(path): each.run for path, each in zip(paths, systems, strict=True)}
        )
    _write(outputs, arguments.overwrite)
    print("", *_format(system.evaluation, comparisons), sep="\n")
    for path in outputs:
        print(f"written: {path}")


def _check_paths(arguments: argparse.Namespace) -> None:
    """Refuses paths that would fail after the work, and outputs that would replace an input."""
    if arguments.baseline and os.path.realpath(arguments.run) == os.path.realpath(arguments.baseline):
        raise ValueError("--run and --baseline must be different files, got the same one twice")
    for name in ("queries", "corpus", "latency"):
        if getattr(arguments, name) and not arguments.report:
            raise ValueError(f"--{name} is for the report: add --report OUT.html, or leave it out")
    outputs = {f"--{name}": path for name in OUTPUTS if (path := getattr(arguments, name))}
    check_apart({f"--{name}": getattr(arguments, name) or None for name in INPUTS}, outputs)
    for path in outputs.values():
        check_free(path, overwrite=arguments.overwrite, is_file=True)


def _write(outputs: dict[str, str], overwrite: bool) -> None:
    for path, text in outputs.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        check_free(path, overwrite=overwrite, is_file=True)  # a file may have appeared during the work
        write_whole(path, text)


def _coverage(path: str, qrels: "Qrels", entries: "Run") -> str:
    missing = sum(query_id not in entries for query_id in qrels)
    unjudged = sum(query_id not in qrels for query_id in entries)
    parts = [f"{path}: {len(qrels)} judged queries"]
    if missing:
        parts.append(f"not in the run (counted as 0): {missing}")
    if unjudged:
        parts.append(f"in the run but not judged (ignored): {unjudged}")
    if not any(doc_id in entries.get(query_id, ()) for query_id, docs in qrels.items() for doc_id in docs):
        parts.append("no document of the run is judged: do the identifiers match?")
    return "; ".join(parts)


def _to_json(
    arguments: argparse.Namespace, system: "System", baseline: "System | None", comparisons: "Sequence[Comparison]"
) -> str:
    from ..evaluation.comparison import NUM_PERMUTATIONS

    content: dict[str, Any] = {"qrels": arguments.qrels, "run": arguments.run, **system.evaluation._asdict()}
    if baseline:
        content["baseline"] = {"run": arguments.baseline, **baseline.evaluation._asdict()}
        content["comparison"] = {each.measure: each._asdict() for each in comparisons}
        content["num_permutations"] = NUM_PERMUTATIONS
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _render(arguments: argparse.Namespace, report: "Report", qrels: "Qrels", runs: "dict[Path, Run]") -> str:
    from ..evaluation import read_documents, read_queries, render_report

    queries = read_queries(arguments.queries, qrels, arguments.qrels) if arguments.queries else None
    documents = None
    if arguments.corpus:
        documents = read_documents(arguments.corpus, report.doc_ids, runs)
    latency = _read_latency(arguments.latency) if arguments.latency else None
    return render_report(report, queries=queries, documents=documents, latency=latency)


def _read_latency(path: str) -> dict[str, float]:
    from ..data.files import check_file, read_json
    from ..utils.validation import describe

    latency = read_json(check_file(path))
    if not latency:
        raise ValueError(f'{path}: the file has no queries; it must map each query to seconds, as in {{"q1": 0.25}}')
    for query_id, seconds in latency.items():
        is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        if not is_number or not 0 <= seconds < math.inf:
            raise ValueError(f"{path}: the seconds of {query_id!r} must be a number from 0, got {describe(seconds)}")
    return latency


def _format(evaluation: "Evaluation", comparisons: "Sequence[Comparison]") -> list[str]:
    if not comparisons:
        return [f"{measure:<16}{value:>10.4f}" for measure, value in evaluation.aggregated.items()]
    from ..evaluation.comparison import format_p

    header = ("measure", "run", "baseline", "difference", "wins/losses/ties", "p (t-test)", "p (randomization)")
    rows = [
        (
            each.measure,
            f"{each.run:.4f}",
            f"{each.baseline:.4f}",
            f"{each.difference:+.4f}",
            f"{each.wins}/{each.losses}/{each.ties}",
            format_p(each.t_test_holm),
            format_p(each.randomization_holm),
        )
        for each in comparisons
    ]
    note = "p: two-sided, corrected for the number of measures (Holm)"
    return [*format_table([header, *rows], "<>>>>>>"), note]
