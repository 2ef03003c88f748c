"""Rows as groups, for training and for evaluation."""

from typing import Any

from ..data import FixedGroups, GroupDataset, Grouping, GroupStream


def train_groups(dataset: Any, grouping: Grouping) -> Any:
    """Returns the groups of rows: a [`GroupDataset`], or a [`GroupStream`] if the rows have no length."""
    if dataset is None or isinstance(dataset, (GroupDataset, GroupStream)):
        return dataset
    return GroupDataset([(dataset, 1.0)], grouping) if hasattr(dataset, "__len__") else GroupStream(dataset, grouping)


def evaluation_groups(dataset: Any, grouping: Grouping) -> Any:
    """Returns the groups of rows as [`FixedGroups`], or by name if there are several datasets."""
    if dataset is None or isinstance(dataset, FixedGroups):
        return dataset
    if isinstance(dataset, dict):
        return {name: evaluation_groups(rows, grouping) for name, rows in dataset.items()}
    if isinstance(dataset, (GroupDataset, GroupStream)):
        return FixedGroups(dataset if isinstance(dataset, GroupDataset) else list(dataset))
    return FixedGroups(GroupDataset([(dataset if hasattr(dataset, "__len__") else list(dataset), 1.0)], grouping))


def check_instructions(groups: Any, prompt_template: str) -> None:
    """Raises ValueError for a row with an instruction if the template has no field for it. A stream is not read."""
    for each in groups.values() if isinstance(groups, dict) else [groups]:
        dataset = each.groups if isinstance(each, FixedGroups) else each
        if isinstance(dataset, GroupDataset):
            dataset.check_instructions(prompt_template)
