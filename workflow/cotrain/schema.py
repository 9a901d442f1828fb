"""The settings as documents: in, nothing; out, a JSON schema for editors or a table for people."""

import argparse
import json

from pydantic_core import PydanticUndefined

from cotrain.settings import Section, Settings, is_section


def settings_table(model: type[Section] = Settings, prefix: str = "") -> list[str]:
    """Return one Markdown table row a setting: its full key, default and description."""
    rows = []
    for name, field in model.model_fields.items():
        if is_section(field.annotation):
            rows += settings_table(field.annotation, f"{prefix}{name}.")
            continue
        default = "required" if field.default is PydanticUndefined else f"`{_plain(field.default)}`"
        rows.append(f"| `{prefix}{name}` | {default} | {field.description} |")
    return rows


def _plain(value: object) -> str:
    """Return a default as one would write it in YAML."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `cotrain schema`."""
    parser.add_argument(
        "--table", action="store_true", help="print the Markdown table of config/README.md instead"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run `cotrain schema`; config/schema.json and config/README.md hold its output."""
    if arguments.table:
        print("\n".join(["| setting | default | meaning |", "|---|---|---|", *settings_table()]))
    else:
        print(json.dumps(Settings.model_json_schema(), indent=2))
