"""All targets."""

from . import command_line, jobs, losses, measures, prompts, readers, recipes, rows
from .target import Target

TARGETS: list[Target] = [
    *prompts.TARGETS,
    *readers.TARGETS,
    *rows.TARGETS,
    *recipes.TARGETS,
    *jobs.TARGETS,
    *losses.TARGETS,
    *measures.TARGETS,
    *command_line.TARGETS,
]
