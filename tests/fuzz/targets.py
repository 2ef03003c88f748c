"""All targets."""

from . import checkpoints, command_line, jobs, losses, measures, prompts, readers, recipes, rows
from .target import Target

TARGETS: list[Target] = [
    *prompts.TARGETS,
    *readers.TARGETS,
    *rows.TARGETS,
    *recipes.TARGETS,
    *jobs.TARGETS,
    *losses.TARGETS,
    *measures.TARGETS,
    *checkpoints.TARGETS,
    *command_line.TARGETS,
]
