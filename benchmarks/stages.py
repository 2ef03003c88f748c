"""The stages of `benchmarks.gpu`. Each measures the cells that are missing in a file, until a deadline."""

import argparse
import gc
import tempfile
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from . import trainers
from .cells import Cells
from .groups import choose_batches
from .implementations import choose
from .machine import Deadline, is_cuda
from .models import write_checkpoint
from .precision import judge, own_precisions, read_qrels, score
from .report import SPEED, Columns, number, print_rows
from .speed import Name, compare, expected_scores, load_scorers, relative_error, time_workload
from .training import COLUMNS, add_ratios, summarize
from .workloads import Workload, make_collection, make_workloads, read_collection

DTYPE = "bfloat16"
# In the order of their importance.
WORKLOADS = ("nq", "latency", "one-query", "long")
QUALITY: Columns = {
    "model": lambda row: row["model"],
    "precision": lambda row: row["precision"],
    "nDCG@10": number("ndcg", "{:.4f}"),
    "first stage": number("first_stage_ndcg", "{:.4f}"),
    "pairs/s": number("pairs_per_second", "{:,.1f}"),
    "error": number("error", "{:.4f}"),
}


def measure_scoring(args: argparse.Namespace, cells: Cells, deadline: Deadline) -> None:
    """Lets the implementations take turns. A cell is a model, a workload, an implementation and a dtype."""
    names = choose(args.implementations, args.dtypes, "cuda")
    collection = read_collection(args.data) if args.data else make_collection()
    for shape in args.shapes:
        missing = {
            workload: [
                (name, dtype)
                for name, dtype in names
                if cells.is_missing(model=shape, workload=workload, implementation=name, dtype=dtype)
            ]
            for workload in args.workloads
        }
        missing = {workload: of_workload for workload, of_workload in missing.items() if of_workload}
        if not missing or deadline.is_over():
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(shape, args.checkpoint, folder, device=args.device, dtype=DTYPE)
            made = make_workloads(
                list(missing),
                collection,
                AutoTokenizer.from_pretrained(folder),
                num_queries=args.queries,
                growth=[],
                max_pairs=args.max_pairs,
            )
            workloads = sorted(made, key=lambda workload: WORKLOADS.index(workload.name))
            expected = expected_scores(folder, workloads, args.device)
            for _, group in groupby(workloads, key=lambda workload: workload.max_length):
                measure_group(list(group), missing, expected, shape, folder, args, cells, deadline)
    print_rows(cells.rows, {"model": lambda row: row["model"], **SPEED}, header=True)


def measure_group(
    workloads: list[Workload],
    missing: dict[str, list[Name]],
    expected: dict[str, Any],
    shape: str,
    folder: str,
    args: argparse.Namespace,
    cells: Cells,
    deadline: Deadline,
) -> None:
    """Measures workloads with the same maximum length. The implementations are loaded once for all of them."""
    if deadline.is_over():
        return

    def skip(skipped: list[Workload], name: Name, reason: str) -> None:
        for workload in skipped:
            if name in missing[workload.name]:
                cells.skip(reason, model=shape, workload=workload.name, implementation=name[0], dtype=name[1])

    wanted = dict.fromkeys(name for workload in workloads for name in missing[workload.name])
    scorers = load_scorers(
        list(wanted), folder, device=args.device, max_length=workloads[0].max_length, skip=partial(skip, workloads)
    )
    for workload in workloads:
        if deadline.is_over():
            return
        chosen = {name: scorer for name, scorer in scorers.items() if name in missing[workload.name]}
        if not chosen:
            continue
        rows = time_workload(
            chosen,
            workload,
            folder=folder,
            expected=expected[workload.name],
            rounds=args.rounds,
            device=args.device,
            skip=partial(skip, [workload]),
        )
        measured = [{"model": shape, **row} for row in rows]
        earlier = [row for row in cells.rows if (row["model"], row["workload"]) == (shape, workload.name)]
        names = {(row["implementation"], row["dtype"]) for row in measured}
        kept = [row for row in earlier if (row["implementation"], row["dtype"]) not in names]
        cells.add(compare([*kept, *measured]))


def measure_quality(args: argparse.Namespace, cells: Cells, deadline: Deadline) -> None:
    """Scores judged candidates in each precision. A cell is a model and a precision."""
    model = Path(args.reranker).name
    precisions = {
        name: options
        for name, options in own_precisions(args.device).items()
        if cells.is_missing(model=model, precision=name)
    }
    if precisions:
        judged = judge(read_collection(args.data), read_qrels(args.data), queries=args.queries, depth=args.depth)
        config = AutoConfig.from_pretrained(args.reranker)
        # The other precisions are compared with it, in a resumed run too.
        expected, _ = score(args.reranker, own_precisions(args.device)["float32"], judged.pairs)
        for name, options in precisions.items():
            if deadline.is_over():
                break
            try:
                scores, speed = score(args.reranker, options, judged.pairs)
            except Exception as error:
                # A precision that is not supported yet, or not on this card.
                cells.skip(f"{type(error).__name__}: {error}", model=model, precision=name)
                continue
            row = {
                "model": model,
                "precision": name,
                "layers": config.num_hidden_layers,
                "hidden_size": config.hidden_size,
                "queries": len(judged.doc_ids),
                "pairs": len(judged.pairs),
                "ndcg": judged.ndcg(scores),
                "first_stage_ndcg": judged.first_stage(),
                "pairs_per_second": speed,
                "error": relative_error(scores, expected),
            }
            cells.add([row])
    print_rows(cells.rows, QUALITY, header=True)


def measure_training(args: argparse.Namespace, cells: Cells, deadline: Deadline) -> None:
    """Trains with each implementation in turn, in this process. A cell is a model and an implementation."""
    sizes = {"steps": args.steps, "groups": args.groups, "group_size": args.group_size}
    for shape in args.shapes:
        names = [name for name in trainers.IMPLEMENTATIONS if cells.is_missing(model=shape, implementation=name)]
        if not names or deadline.is_over():
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(shape, args.checkpoint, folder, device=args.device, dtype=DTYPE)
            config = AutoConfig.from_pretrained(folder)
            batches, _ = choose_batches(
                args.rows, AutoTokenizer.from_pretrained(folder), **sizes, max_length=config.rerank_max_length
            )
            task = trainers.Task(folder, batches, args.steps, config.rerank_max_length, DTYPE, args.device)
            for name in names:
                if deadline.is_over():
                    break
                try:
                    run = trainers.train(name, task)
                except Exception as error:
                    cells.skip(f"{type(error).__name__}: {error}", model=shape, implementation=name)
                else:
                    cells.add(
                        [
                            {
                                "model": shape,
                                "dtype": DTYPE,
                                **sizes,
                                **run._asdict(),
                                **summarize({name: [run]}, task)[0],
                            }
                        ]
                    )
                release(args.device)
        cells.add(add_ratios([row for row in cells.rows if row["model"] == shape]))
    print_rows(cells.rows, {"model": lambda row: row["model"], **COLUMNS}, header=True)


def release(device: str) -> None:
    """Frees the memory of a run that has ended."""
    gc.collect()
    if is_cuda(device):
        torch.cuda.empty_cache()


def measure_tests(args: argparse.Namespace, cells: Cells, deadline: Deadline) -> None:
    """Runs the tests that need a GPU. A cell is a test."""
    from .device_tests import run_device_tests  # no other stage needs pytest

    run_device_tests(cells, deadline)
