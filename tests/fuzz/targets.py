"""All targets."""

from . import jobs, losses, measures, prompts, readers, rows
from .target import Target

TARGETS: list[Target] = [
    *prompts.TARGETS,
    *readers.TARGETS,
    *rows.TARGETS,
    *jobs.TARGETS,
    *losses.TARGETS,
    *measures.TARGETS,
]
