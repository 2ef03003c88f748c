"""All targets."""

from . import losses, measures, prompts, readers, rows
from .target import Target

TARGETS: list[Target] = [
    *prompts.TARGETS,
    *readers.TARGETS,
    *rows.TARGETS,
    *losses.TARGETS,
    *measures.TARGETS,
]
