"""Experiments side by side: in, settings with a table of changes; out, checked settings of each.

Imported by the Snakefile, like the settings.
"""

from pathlib import Path

import yaml

from cotrain.errors import InputError
from cotrain.files import read_table
from cotrain.settings import Settings, check

NOT_A_SETTING = "group"
"""Column of the table that says which experiments are averaged."""


def experiments_of(content: dict, *, source: str) -> tuple[dict[str, Settings], dict[str, str]]:
    """Return the settings of each experiment by its name, and the group of each.

    content: a settings file. Without `experiments` it is one experiment in no group. With it, each
    row of that table is one: the file's settings, changed by the row's cells. A column is named
    after a setting (`seed`, `cotraining.teacher`), a cell is YAML and an empty one changes nothing;
    the column `group` names the experiments to average. Raises InputError for what `check` refuses,
    where names are missing, not unique or the file's own, and for a `review` of them all.
    """
    table_path = content.get("experiments")
    if table_path is None:
        settings = check(content, source=source)
        return {settings.experiment: settings}, {}
    if not isinstance(content.get("experiment"), str):
        raise InputError(
            f"{source}: the setting `experiment` is missing; beside `experiments` it names the "
            "comparison."
        )
    if content.get("review") is not None:
        raise InputError(
            f"{source}: `review` beside `experiments` would judge the masks of them all, where a "
            f"person looked at those of one; give it as a column `review` of {table_path}, in the "
            "row of the experiment whose masks were judged."
        )
    table = read_table(Path(table_path))
    if "experiment" not in table:
        raise InputError(f"{table_path} has no column `experiment`; name each experiment in it.")
    if table.empty:
        raise InputError(f"{table_path} has no rows; add one for each experiment.")
    experiments, groups = {}, {}
    for row in table.to_dict("records"):
        name = row["experiment"]
        if not name:
            raise InputError(f"{table_path} has a row without a name in `experiment`; name it.")
        changed = {key: value for key, value in content.items() if key != "experiments"}
        for column, cell in row.items():
            if column == NOT_A_SETTING or cell == "":
                continue
            try:
                value = yaml.safe_load(cell)
            except yaml.YAMLError:
                raise InputError(
                    f"{table_path}, experiment {name}: `{column}` holds {cell!r}, which is not "
                    "YAML; write a number, a word or a list such as [8, 16]."
                ) from None
            # A name may look like a number.
            if column == "experiment" and not isinstance(value, str):
                value = cell.strip()
            changed = _with(changed, column.split("."), value)
        settings = check(changed, source=f"{table_path}, experiment {name}")
        # Folders of the same name are one folder on some file systems, whatever the case.
        taken = {each.lower() for each in (content["experiment"], *experiments)}
        if settings.experiment.lower() in taken:
            raise InputError(
                f"{table_path} has the experiment {settings.experiment!r} twice, or it is the name "
                "of the whole comparison; each has its own results folder, so give it another name."
            )
        experiments[settings.experiment] = settings
        groups[settings.experiment] = row.get(NOT_A_SETTING) or "all"
    return experiments, groups


def _with(content: dict, keys: list[str], value: object) -> dict:
    """Return a copy of nested settings with one value changed."""
    key, *rest = keys
    if rest:
        inner = content.get(key)
        value = _with(inner if isinstance(inner, dict) else {}, rest, value)
    return {**content, key: value}
